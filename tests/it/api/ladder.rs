//! No refusal ends a conversation. The gateway finds out what the upstream refuses, answers in a
//! new upstream thread with as much of the conversation as that takes, and tells what the model no
//! longer knows. Only a message that the upstream refuses alone is at fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::gateway::{Gateway, text};
use crate::support::history::messages;
use crate::support::picky::Picky;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
const PICTURE: &str = "https://pictures.test/signed";

macro_rules! on_every_protocol {
    ($($case:ident),+ $(,)?) => {
        on_every_protocol! { @ assistants Assistants Sqlite [$($case),+] }
        on_every_protocol! { @ responses Responses Postgres [$($case),+] }
        on_every_protocol! { @ chain Chain Sqlite [$($case),+] }
    };
    (@ $module:ident $protocol:ident $backend:ident [$($case:ident),+]) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    super::$case(Place::new(Protocol::$protocol, Backend::$backend).await).await;
                }
            )+
        }
    };
}
on_every_protocol!(
    unusable_picture_of_the_past_becomes_note,
    full_context_is_answered_with_newer_part,
    unexplained_refusal_of_thread_is_answered_in_new_thread,
    message_refused_alone_is_blamed_and_next_one_works,
    refusal_of_account_is_not_retried,
    seeding_that_is_refused_leaves_old_thread_bound,
    killed_gateway_follows_run_on_trial,
    failed_reply_after_recovery_leaves_thread_and_transcript_alike,
    failure_on_trial_leaves_nothing_of_message_in_old_thread,
);

/// A scene whose upstream refuses by a rule.
struct Place {
    scene: Scene,
    upstream: Picky,
    gateway: Gateway,
}

impl Place {
    async fn new(protocol: Protocol, backend: Backend) -> Self {
        let scene = Scene::new(protocol, backend).await;
        let upstream = Picky::before(&scene.upstream_url).await;
        let config = scene
            .config("[runs]\nmax_retries = 1\n")
            .replace(&scene.upstream_url, &upstream.url);
        let gateway = Gateway::start(&config).await;
        Self {
            scene,
            upstream,
            gateway,
        }
    }

    async fn bound(&self) -> Value {
        let thread = self.gateway.get(&format!("{SCOPE}/thread")).await.ok();
        thread["upstream_thread_id"].clone()
    }
}

/// Returns a body as OpenAI writes it.
fn refusal(code: &str, message: &str) -> String {
    json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}})
        .to_string()
}

async fn unusable_picture_of_the_past_becomes_note(place: Place) {
    let Place {
        upstream, gateway, ..
    } = &place;
    let picture = json!({"content": [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    ]});
    gateway
        .post(&format!("{SCOPE}/messages"), &picture)
        .await
        .ok();
    gateway.say(SCOPE, "and what colour?").await;
    upstream.refuse(|read| {
        let text = refusal(
            "invalid_image_url",
            &format!("Error while downloading {PICTURE}"),
        );
        read.contains(PICTURE).then_some((400, text))
    });
    upstream.starts();
    let answer = gateway.say(SCOPE, "thank you").await;
    assert!(text(&answer["message"]).contains("thank you"), "{answer:#}");
    assert_eq!(
        answer["run"]["recovered"],
        json!({"cause": "media_unusable", "history": "without_media", "messages_left_out": 0, "parts_replaced": 1}),
        "{answer:#}"
    );
    assert!(upstream.starts() <= 2);
    // The new thread has no picture, so nothing is refused any more.
    let next = gateway.say(SCOPE, "bye").await;
    assert_eq!(next["run"]["recovered"], Value::Null);
    assert_eq!(upstream.starts(), 1);
    // A rollover does not bring it back.
    gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await
        .ok();
    let rolled = gateway.say(SCOPE, "again").await;
    assert!(text(&rolled["message"]).contains("again"), "{rolled:#}");
    let picture = &messages(gateway, SCOPE).await;
    assert!(picture.len() >= 2, "{picture:#?}");
}

async fn full_context_is_answered_with_newer_part(place: Place) {
    let Place {
        upstream, gateway, ..
    } = &place;
    for n in 0..6 {
        let said = format!("{n} [[sim: tokens=3]] {}", "long ".repeat(200));
        gateway.say(SCOPE, &said).await;
    }
    upstream.refuse(|read| {
        let text = refusal(
            "context_length_exceeded",
            "Your input exceeds the context window of this model.",
        );
        (read.len() > 6000).then_some((400, text))
    });
    upstream.starts();
    let answer = gateway.say(SCOPE, &"new ".repeat(250)).await;
    let recovered = &answer["run"]["recovered"];
    assert_eq!(recovered["cause"], "context_full", "{answer:#}");
    assert_ne!(recovered["history"], "all", "{answer:#}");
    assert_ne!(recovered["history"], "nothing", "{answer:#}");
    let left_out = recovered["messages_left_out"].as_u64().unwrap();
    assert!(left_out > 0 && left_out < 12, "{answer:#}");
    assert!(upstream.starts() <= 4);
    let hidden = messages(gateway, SCOPE).await;
    let hidden = hidden.iter().filter(|it| it["visible_to_model"] == false);
    assert_eq!(hidden.count() as u64, left_out, "the transcript says so");
    gateway.say(SCOPE, "short").await;
}

async fn unexplained_refusal_of_thread_is_answered_in_new_thread(place: Place) {
    let Place {
        upstream, gateway, ..
    } = &place;
    gateway.say(SCOPE, "one [mark]").await;
    let before = place.bound().await;
    // Only the thread that exists now is refused.
    let is_old = Arc::new(AtomicBool::new(true));
    let is_over = Arc::clone(&is_old);
    upstream.refuse(move |read| {
        let refused = read.contains("[mark]") && is_over.swap(false, Ordering::Relaxed);
        refused.then(|| (400, refusal("odd", "Something is odd here.")))
    });
    let mut stream = gateway.stream(SCOPE, "two").await;
    let mut told = None;
    while let Some(event) = stream.next().await {
        if event.name == "run.recovered" {
            told = Some(event.data["recovered"].clone());
        }
    }
    assert_eq!(
        told,
        Some(
            json!({"cause": "unknown", "history": "all", "messages_left_out": 0, "parts_replaced": 0})
        )
    );
    assert_ne!(place.bound().await, before);
    gateway.say(SCOPE, "three").await;
}

async fn message_refused_alone_is_blamed_and_next_one_works(place: Place) {
    let Place {
        scene,
        upstream,
        gateway,
    } = &place;
    gateway.say(SCOPE, "one").await;
    gateway.say(SCOPE, "two").await;
    let before = place.bound().await;
    upstream.refuse(|read| {
        read.contains("unspeakable")
            .then(|| (400, refusal("odd", "Something is odd here.")))
    });
    upstream.starts();
    for _ in 0..2 {
        let answer = gateway
            .post(
                &format!("{SCOPE}/messages"),
                &json!({"content": "unspeakable"}),
            )
            .await;
        assert_eq!(
            answer.problem(),
            (422, "message-refused"),
            "{:#}",
            answer.body
        );
        assert_eq!(answer.body["upstream_code"], "odd", "{:#}", answer.body);
        assert!(upstream.starts() <= 4);
        assert_eq!(place.bound().await, before, "the thread is untouched");
    }
    let next = gateway.say(SCOPE, "three").await;
    assert_eq!(next["run"]["recovered"], Value::Null);
    assert_eq!(upstream.starts(), 1);
    if scene.protocol != Protocol::Chain {
        // The janitor deletes the threads on trial.
        scene
            .simulator
            .wait_for(|stats| {
                let made = stats.threads_created + stats.conversations_created;
                made - stats.threads_deleted - stats.conversations_deleted == 1
            })
            .await;
    }
}

async fn refusal_of_account_is_not_retried(place: Place) {
    let Place {
        upstream, gateway, ..
    } = &place;
    gateway.say(SCOPE, "one").await;
    let before = place.bound().await;
    for (status, code) in [
        (401, "invalid_api_key"),
        (429, "insufficient_quota"),
        (404, "model_not_found"),
        (400, "content_filter"),
    ] {
        upstream.refuse(move |_| Some((status, refusal(code, "No."))));
        upstream.starts();
        let answer = gateway
            .post(&format!("{SCOPE}/messages"), &json!({"content": "two"}))
            .await;
        assert!(answer.status.as_u16() >= 400, "{code}: {:#}", answer.body);
        assert_eq!(upstream.starts(), 1, "{code}");
        assert_eq!(place.bound().await, before, "{code}");
    }
    upstream.refuse(|_| None);
    let next = gateway.say(SCOPE, "three").await;
    assert_eq!(next["run"]["recovered"], Value::Null);
}

/// The upstream also refuses each request that makes a new thread.
async fn seeding_that_is_refused_leaves_old_thread_bound(place: Place) {
    let Place {
        upstream, gateway, ..
    } = &place;
    gateway.say(SCOPE, "one").await;
    let before = place.bound().await;
    upstream.refuse(|_| Some((400, refusal("odd", "Something is odd here."))));
    let answer = gateway
        .post(&format!("{SCOPE}/messages"), &json!({"content": "two"}))
        .await;
    assert!(answer.status.as_u16() >= 400, "{:#}", answer.body);
    assert!(upstream.starts() <= 5);
    assert_eq!(place.bound().await, before);
    upstream.refuse(|_| None);
    let next = gateway.say(SCOPE, "three").await;
    assert_eq!(next["run"]["recovered"], Value::Null);
    if place.scene.protocol != Protocol::Chain {
        assert_eq!(place.bound().await, before);
    }
}

/// The process dies while the upstream answers in the new thread. The next process finds the run
/// there, and the model gets the message once.
async fn killed_gateway_follows_run_on_trial(place: Place) {
    let Place {
        scene,
        upstream,
        gateway,
    } = place;
    gateway.say(SCOPE, "one [mark]").await;
    let is_old = AtomicBool::new(true);
    upstream.refuse(move |read| {
        let refused = read.contains("[mark]") && is_old.swap(false, Ordering::Relaxed);
        refused.then(|| (400, refusal("odd", "Something is odd here.")))
    });
    // The proxy passes whole answers on, so the gateway has heard nothing of the run yet.
    let body = json!({"content": "two [[sim: tokens=20 rate=100ms]]"});
    let asked = gateway.post_in_background(&format!("{SCOPE}/messages"), &body);
    scene
        .simulator
        .wait_for(|stats| stats.runs_started == 2)
        .await;
    gateway.kill();
    drop(asked);
    let config = scene
        .config("[runs]\nmax_retries = 1\n")
        .replace(&scene.upstream_url, &upstream.url);
    let gateway = Gateway::start(&config).await;
    let next = gateway.say(SCOPE, "three").await;
    assert!(text(&next["message"]).contains("three"), "{next:#}");
    // Elsewhere a response ends with its connection, and is provably gone.
    if scene.protocol == Protocol::Assistants {
        assert_eq!(scene.simulator.stats().runs_started, 3, "sent once");
    }
    crate::support::history::assert_same(&scene, &gateway, SCOPE).await;
}

/// The upstream begins to answer with a part of the conversation, and fails.
async fn failed_reply_after_recovery_leaves_thread_and_transcript_alike(place: Place) {
    let Place { scene, gateway, .. } = &place;
    gateway.say(SCOPE, "one").await;
    gateway.say(SCOPE, "two").await;
    scene.fault("start", "status=400", 2);
    let body = json!({"content": "three [[sim: mid_error]]"});
    let failed = gateway.post(&format!("{SCOPE}/messages"), &body).await;
    assert_eq!(failed.status.as_u16(), 502, "{:#}", failed.body);
    assert_eq!(scene.simulator.stats().runs_started, 3);
    gateway.say(SCOPE, "four").await;
    gateway.say(SCOPE, "five").await;
    crate::support::history::assert_same(scene, gateway, SCOPE).await;
}

/// The upstream fails at the message, refuses its repetition, and fails again in the new thread.
async fn failure_on_trial_leaves_nothing_of_message_in_old_thread(place: Place) {
    let Place { scene, gateway, .. } = &place;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "fail=server_error retry_after=0.01", 1);
    scene.fault("start", "status=400", 1);
    scene.fault("start", "fail=server_error retry_after=0.01", 1);
    let body = json!({"content": "two"});
    let failed = gateway.post(&format!("{SCOPE}/messages"), &body).await;
    assert_eq!(failed.body["code"], "upstream_failed", "{:#}", failed.body);
    gateway.say(SCOPE, "three").await;
    crate::support::history::assert_same(scene, gateway, SCOPE).await;
}
