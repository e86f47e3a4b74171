//! Any replica shows any run, during the run and afterwards.

use futures_util::StreamExt;
use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::json;
use threadkeeper::store::Notification;

use super::{
    Half, LONG, SCOPE, ask, assert_ascending, completed, counted, half_way, outputs, whole,
};
use crate::support::gateway::{Answer, EventReader, Gateway, PATIENCE, text_of};
use crate::support::scene::{Scene, on_shared_scene};

on_shared_scene!(
    reply_streams_live_on_every_replica,
    follower_on_other_replica_notifies_owner,
    reader_resumes_on_any_replica,
    idempotent_retry_joins_run_on_other_replica,
    tool_outputs_posted_at_other_replica_are_streamed_live,
    reply_to_tool_outputs_excludes_earlier_events,
);

async fn two_gateways(scene: &Scene) -> (Gateway, Gateway) {
    tokio::join!(scene.gateway_with(LONG), scene.gateway_with(LONG))
}

async fn reply_streams_live_on_every_replica(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    owner.say(SCOPE, "hello").await;
    let half = Half::at(&scene, &owner, "tell me").await;
    // The upstream sends no more for now.
    let mut follower = other.events(SCOPE, &half.run, None).await;
    let mut elsewhere = follower.until_text(&half.text()).await;
    assert_eq!(
        (&elsewhere[0].name, &elsewhere[0].id),
        (&half.seen[0].name, &half.seen[0].id)
    );
    assert_eq!(text_of(&elsewhere), half.text());
    assert_eq!(
        elsewhere.last().unwrap().id,
        half.last(),
        "text has the same numbers at every replica"
    );
    // A reader may continue after any event of the owner's stream.
    for at in [0, half.seen.len() / 2] {
        let mut later = other
            .events(SCOPE, &half.run, Some(&half.seen[at].id))
            .await;
        let rest = text_of(&half.seen[at + 1..]);
        assert_eq!(text_of(&later.until_text(&rest).await), rest);
    }
    scene.simulator.release();
    let (rest, more) = tokio::join!(half.stream.rest(), follower.rest());
    elsewhere.extend(more);
    let shown = [half.seen, rest].concat();
    assert_eq!(shown.last().unwrap().name, "run.completed");
    assert_eq!(text_of(&elsewhere), text_of(&shown));
    assert_eq!(text_of(&elsewhere), completed(&shown));
    assert_eq!(
        elsewhere[elsewhere.len() - 2..],
        shown[shown.len() - 2..],
        "both streams end alike"
    );
    assert_ascending(&elsewhere);
}

async fn follower_on_other_replica_notifies_owner(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let store = scene.database.store().await;
    let mut notifications = store.notifications();
    assert_eq!(
        notifications.next().await,
        Some(Notification::Missed),
        "the listener is connected"
    );
    let half = Half::at(&scene, &owner, "tell me").await;
    let follower = other.events(SCOPE, &half.run, None).await;
    let run = Notification::Followed(half.run.parse().unwrap());
    let heard =
        async { while notifications.next().await.expect("notifications continue") != run {} };
    tokio::time::timeout(PATIENCE, heard)
        .await
        .expect("the owner is notified");
    scene.simulator.release();
    let (seen, shown) = tokio::join!(follower.rest(), half.stream.rest());
    assert_eq!(text_of(&seen), text_of(&[half.seen, shown].concat()));
    store.close().await;
}

async fn reader_resumes_on_any_replica(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let shown = owner
        .stream(SCOPE, "tell me [[sim: tokens=40 rate=10ms]]")
        .await
        .rest()
        .await;
    let run = super::run_of(&shown[0]);
    assert_ascending(&shown);
    for (at, seen) in shown.iter().enumerate() {
        for gateway in [&owner, &other] {
            let rest = gateway
                .open_events(&format!("{SCOPE}/runs/{run}/events"), Some(&seen.id))
                .await;
            if at + 1 == shown.len() {
                assert_eq!(rest.status(), StatusCode::NO_CONTENT);
                continue;
            }
            let rest = EventReader::new(rest).rest().await;
            assert_eq!(text_of(&rest), text_of(&shown[at + 1..]), "after {at}");
            assert_eq!(rest.last(), shown.last());
            assert_ascending(&rest);
        }
    }
}

async fn repeat(
    gateway: &Gateway,
    header: (&'static str, &str),
    content: &str,
) -> reqwest::Response {
    let request = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
    let request = request
        .header("idempotency-key", "k1")
        .header(header.0, header.1);
    let response = request
        .json(&json!({"content": content}))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["idempotent-replayed"], "true");
    response
}

async fn json_of(response: reqwest::Response) -> Answer {
    let (status, headers) = (response.status(), response.headers().clone());
    Answer {
        status,
        headers,
        body: response.json().await.unwrap(),
    }
}

async fn idempotent_retry_joins_run_on_other_replica(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    scene.simulator.hold();
    let content = half_way("tell me");
    let first = owner
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", "k1");
    let first = owner.send(first.json(&json!({"content": content})));
    let replays = async {
        scene
            .simulator
            .wait_for(|stats| stats.runs_started == 1)
            .await;
        // Live as a stream, while the owner has nothing to answer yet …
        let stream = repeat(&other, ("accept", "text/event-stream"), &content).await;
        let mut stream = EventReader::new(stream);
        let seen = stream.until_text("You said: tell me.").await;
        // … with a link to the result, for a caller that does not wait long …
        let taken = json_of(repeat(&other, ("prefer", "wait=1"), &content).await).await;
        assert_eq!(taken.status, StatusCode::ACCEPTED, "{taken:?}");
        assert_eq!(taken.body["run"]["status"], "in_progress", "{taken:?}");
        let place = taken.headers["location"].to_str().unwrap().to_owned();
        assert_eq!(
            other.get(&place).await.ok()["run"]["id"],
            taken.body["run"]["id"]
        );
        // … and whole, for a caller that does.
        let answers = join_all(["wait=50", "handling=strict"].map(|wish| async {
            json_of(repeat(&other, ("prefer", wish), &content).await)
                .await
                .ok()
        }));
        let (answers, rest) = tokio::join!(answers, async {
            scene.simulator.release();
            stream.rest().await
        });
        (answers, [seen, rest].concat())
    };
    let (first, (answers, events)) = tokio::join!(first, replays);
    let first = first.ok();
    for answer in answers {
        assert_eq!(
            (&answer["run"], &answer["message"]),
            (&first["run"], &first["message"])
        );
    }
    assert_eq!(text_of(&events), whole(&first["message"]));
    assert_eq!(events.last().unwrap().data["run"], first["run"]);
    assert_eq!(scene.simulator.stats().runs_started, 1);
}

/// Outputs that are posted at another replica get the same answers as at the owner, in all forms.
async fn tool_outputs_posted_at_other_replica_are_streamed_live(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    let run = asked["run"]["id"].as_str().unwrap();
    let mut follower = other.events(SCOPE, run, None).await;
    let mut seen = Vec::new();
    while seen
        .last()
        .is_none_or(|event: &crate::support::gateway::Event| event.name != "run.requires_action")
    {
        seen.push(follower.next().await.unwrap());
    }
    let (path, mut body) = outputs(SCOPE, &asked);
    body["stream"] = json!(true);
    let answered = EventReader::new(
        other
            .request(Method::POST, &path)
            .json(&body)
            .send()
            .await
            .unwrap(),
    );
    let (answered, rest) = tokio::join!(answered.rest(), follower.rest());
    assert_eq!(answered.last().unwrap().name, "run.completed");
    assert!(text_of(&answered).contains("4 °C"), "{answered:#?}");
    assert_eq!(
        text_of(&rest),
        text_of(&answered),
        "the stream has only the later events"
    );
    assert_eq!(rest.last(), answered.last());
    assert_ascending(&[seen, rest].concat());
    assert_eq!(
        answered.last().unwrap().data["run"],
        owner.get(&format!("{SCOPE}/runs/{run}")).await.ok()["run"]
    );
}

/// The answer leaves out earlier events even if the log, which says where they end, cannot be
/// read at that moment.
async fn reply_to_tool_outputs_excludes_earlier_events(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    let (path, mut body) = outputs(SCOPE, &asked);
    body["stream"] = json!(true);
    let give = || {
        other
            .request(Method::POST, &path)
            .header("idempotency-key", "outputs")
            .json(&body)
    };
    // The outputs are sent for the first time, and again after the end.
    for _ in 0..2 {
        let locked = scene.database.lock("run_events").await;
        let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks
            WHERE relation = 'run_events'::regclass AND NOT granted";
        let (refused, ()) = tokio::join!(other.send(give()), counted(&scene, cut, 1));
        assert_eq!(refused.problem(), (503, "store-unavailable"));
        drop(locked);
        let told = EventReader::new(give().send().await.unwrap()).rest().await;
        assert!(text_of(&told).contains("4 °C"), "{told:#?}");
        assert!(
            told.iter().all(|event| event.name != "run.requires_action"),
            "{told:#?}"
        );
    }
}
