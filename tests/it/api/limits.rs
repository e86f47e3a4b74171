//! Rate limits and limits of concurrency.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use reqwest::Method;

use serde_json::json;

use tokio::time::sleep;

use crate::support::gateway::{Answer, EventReader, Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

const LIMITS: &str = "[limits]\nuser_requests = \"1/s burst 3\"\ntenant_requests = \"1000/s\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn request_rate_limit_answers_with_retry_after() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(LIMITS).await;
    let (path, begun) = ("/v1/users/alice/threads", Instant::now());
    // The limit counts all paths together.
    let by_header = || {
        gateway
            .request(Method::GET, "/v1/user/threads")
            .header("threadkeeper-user", "alice")
    };
    let ask = async |n| {
        if n % 2 == 0 {
            gateway.get(path).await
        } else {
            gateway.send(by_header()).await
        }
    };
    let answers = join_all((0..12).map(ask)).await;
    // Each second that the loop took allows one more.
    let most = 4 + usize::try_from(begun.elapsed().as_secs()).unwrap();
    let (taken, refused): (Vec<_>, Vec<_>) =
        answers.iter().partition(|answer| answer.status == 200);
    assert!(
        taken.len() >= 3 && taken.len() <= most,
        "{} requests were accepted",
        taken.len()
    );
    for answer in &taken {
        assert_eq!(
            answer.headers["ratelimit-policy"],
            "\"user-requests\";q=3;w=3, \"tenant-requests\";q=1000;w=1"
        );
        let left = answer.headers["ratelimit"].to_str().unwrap();
        assert!(
            left.starts_with("\"user-requests\";r=") && left.contains(", \"tenant-requests\";r="),
            "{left}"
        );
    }
    for answer in &refused {
        assert_eq!(answer.problem(), (429, "rate-limited"));
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!(answer.headers["ratelimit"], "\"user-requests\";r=0;t=1");
    }
    gateway.get("/v1/users/bob/threads").await.ok();
    assert_eq!(
        gateway.get("/healthz").await.status,
        200,
        "probes are not limited"
    );
    gateway.until(path, |answer| answer.status == 200).await;
}

/// Sends a message, with an idempotency key if there is one.
async fn say(gateway: &Gateway, user: &str, content: &str, key: Option<&str>) -> Answer {
    let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
    let request = key.iter().fold(request, |request, key| {
        request.header("idempotency-key", *key)
    });
    gateway
        .send(request.json(&json!({"content": content})))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn message_rate_limit_is_separate_from_requests() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[limits]\nuser_messages = \"3/h\"\nuser_requests = \"1000/s\"\n")
        .await;
    let asked = say(
        &gateway,
        "alice",
        "weather? [[sim: tool=get_weather]]",
        Some("1"),
    )
    .await;
    assert_eq!(
        asked.headers["ratelimit-policy"],
        "\"user-messages\";q=3;w=3600"
    );
    assert_eq!(asked.headers["ratelimit"], "\"user-messages\";r=2");
    let run = &asked.ok()["run"];
    let place = format!("/v1/users/alice/runs/{}", run["id"].as_str().unwrap());
    let output =
        json!({"tool_call_id": run["required_action"]["tool_calls"][0]["id"], "output": "4 °C"});
    let outputs = json!({"tool_outputs": [output]});
    // Other requests, and repeats, do not count as messages.
    for _ in 0..5 {
        let repeat = say(
            &gateway,
            "alice",
            "weather? [[sim: tool=get_weather]]",
            Some("1"),
        )
        .await;
        assert_eq!(
            (
                repeat.status.as_u16(),
                &repeat.headers["idempotent-replayed"]
            ),
            (200, &"true".parse().unwrap())
        );
        assert!(
            repeat.headers["ratelimit"]
                .to_str()
                .unwrap()
                .starts_with("\"user-requests\""),
            "{repeat:?}"
        );
        gateway.get(&place).await.ok();
    }
    let answered = gateway
        .post(&format!("{place}/tool_outputs"), &outputs)
        .await;
    assert_eq!(
        answered.headers["ratelimit"], "\"user-messages\";r=1",
        "tool outputs count, since the model answers them"
    );
    say(&gateway, "alice", "hello", None).await.ok();

    for key in [None, Some("2")] {
        let refused = say(&gateway, "alice", "hello", key).await;
        assert_eq!(refused.problem(), (429, "rate-limited"));
        let wait: u64 = refused.headers["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!(
            (1000..=1200).contains(&wait),
            "the rate is one in 20 minutes: {wait}"
        );
        assert_eq!(
            refused.headers["ratelimit"],
            format!("\"user-messages\";r=0;t={wait}")
        );
        let told =
            format!("too many messages: each user may send 3 an hour; come back in {wait} s");
        assert_eq!(refused.body["detail"], told);
    }
    let refused = gateway
        .post(&format!("{place}/tool_outputs"), &outputs)
        .await;
    assert_eq!(refused.problem(), (429, "rate-limited"));
    // A client that lost the answer to an accepted message still gets it, and reading is never
    // limited.
    let repeat = say(
        &gateway,
        "alice",
        "weather? [[sim: tool=get_weather]]",
        Some("1"),
    )
    .await;
    assert_eq!(repeat.headers["idempotent-replayed"], "true", "{repeat:?}");
    assert!(
        repeat.headers["ratelimit"]
            .to_str()
            .unwrap()
            .starts_with("\"user-requests\""),
        "{repeat:?}"
    );
    for path in [&place, "/v1/users/alice/messages", "/v1/users/alice/thread"] {
        gateway.get(path).await.ok();
    }
    let events = gateway.open_events(&format!("{place}/events"), None).await;
    assert_eq!(events.status(), 200);
    say(&gateway, "bob", "hello", None).await.ok();
    let said = gateway.get("/v1/users/alice/messages").await.ok();
    assert_eq!(
        said["data"].as_array().unwrap().len(),
        4,
        "a refused message left something: {said:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_request_limit_still_allows_messages() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let limits = "[limits]\nuser_messages = \"1/d burst 2\"\nuser_requests = \"2/d\"\n";
    let gateway = scene.gateway_with(limits).await;
    say(&gateway, "alice", "hello", Some("1")).await.ok();
    for expected in [200, 200, 429] {
        assert_eq!(
            gateway.get("/v1/users/alice/messages").await.status,
            expected
        );
    }
    let refused = gateway.delete("/v1/users/alice/thread").await;
    assert_eq!(refused.problem(), (429, "rate-limited"));
    assert!(
        refused.body["detail"]
            .as_str()
            .unwrap()
            .starts_with("too many requests: each user may send 2 a day;")
    );
    // A repeat without room in the request limit uses the message limit, and counts there.
    assert_eq!(
        say(&gateway, "alice", "hello", Some("1")).await.headers["idempotent-replayed"],
        "true"
    );
    assert_eq!(
        say(&gateway, "alice", "hello", None).await.problem(),
        (429, "rate-limited")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_runs_are_limited_globally_and_per_tenant() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let keys = "[auth.keys.one]\nkey = \"the-key-of-the-first-tenant\"\nscope = \"chat\"\n\
                [auth.keys.two]\nkey = \"the-key-of-the-second-tenant\"\ntenant = \"two\"\nscope = \"chat\"\n";
    let settings = format!("{keys}[runs]\nmax_runs = 3\nmax_runs_per_tenant = 2\n");
    let gateway = scene.gateway_with(&settings).await;
    scene.simulator.hold();
    let say = |key: &str, user: &str| {
        let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
        let request = request.bearer_auth(format!("the-key-of-the-{key}-tenant"));
        gateway.send(
            request
                .header("prefer", "respond-async")
                .json(&json!({"content": "hello"})),
        )
    };
    // One run is active, the other one is queued.
    for _ in 0..2 {
        assert_eq!(say("first", "alice").await.status, 202);
    }
    let refused = say("first", "bob").await;
    assert_eq!(refused.problem(), (429, "too-many-runs"));
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(say("second", "alice").await.status, 202);
    let refused = say("second", "bob").await;
    assert_eq!(refused.problem(), (503, "overloaded"));
    assert_eq!(refused.headers["retry-after"], "1");
    scene.simulator.release();
    let begun = Instant::now();
    while say("first", "bob").await.status != 202 {
        assert!(begun.elapsed() < PATIENCE, "no permit was released");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_event_readers_are_limited() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[server]\nmax_readers_per_run = 3\n")
        .await;
    scene.simulator.hold();
    let own = gateway
        .request(Method::POST, "/v1/users/alice/messages")
        .header("idempotency-key", "hello");
    let own = own
        .json(&json!({"content": "hello", "stream": true}))
        .send()
        .await
        .unwrap();
    let mut own = EventReader::new(own);
    let run = own.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = format!("/v1/users/alice/runs/{run}/events");
    let (one, two) = (
        gateway.open_events(&path, None).await,
        gateway.open_events(&path, None).await,
    );
    assert_eq!((one.status().as_u16(), two.status().as_u16()), (200, 200));
    let refused = gateway.get(&path).await;
    assert_eq!(refused.problem(), (429, "too-many-readers"));
    let again = gateway
        .request(Method::POST, "/v1/users/alice/messages")
        .header("idempotency-key", "hello");
    let refused = gateway
        .send(again.json(&json!({"content": "hello", "stream": true})))
        .await;
    assert_eq!(refused.problem(), (429, "too-many-readers"));
    drop(one);
    let begun = Instant::now();
    while gateway.open_events(&path, None).await.status() != 200 {
        assert!(
            begun.elapsed() < PATIENCE,
            "a reader that left still has a permit"
        );
        sleep(Duration::from_millis(50)).await;
    }
    scene.simulator.release();
    assert_eq!(own.rest().await.last().unwrap().name, "run.completed");
}

/// There are many more callers than connections, and each waits for its answer.
#[tokio::test(flavor = "multi_thread")]
async fn callers_outnumbering_connections_are_all_served() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = scene.gateway().await;
    let gateway = &gateway;
    let call = |n: usize| async move {
        for _ in 0..10 {
            gateway.say(&format!("/v1/users/user-{n}"), "hello").await;
        }
    };
    futures_util::future::join_all((0..64).map(call)).await;
}

/// The database is locked. The statement under way is not refused, but messages that wait too
/// long behind it are.
#[tokio::test(flavor = "multi_thread")]
async fn messages_waiting_too_long_for_database_are_refused() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = Gateway::start_with(
        &scene.config(""),
        &[("THREADKEEPER_STORE__MAX_WAIT", "200ms")],
    )
    .await;
    let say = |n: usize| {
        let gateway = &gateway;
        async move {
            gateway
                .post(
                    &format!("/v1/users/user-{n}/messages"),
                    &json!({"content": "hello"}),
                )
                .await
        }
    };
    let lock = scene.database.lock("threads").await;
    let mut waiting: FuturesUnordered<_> = (0..4).map(say).collect();
    let mut further = 4..;
    // The statement under way includes the messages that were collected until it began.
    let (refused, took) = loop {
        let begun = Instant::now();
        tokio::select! {
            Some(answer) = waiting.next() => break (answer, begun.elapsed()),
            () = sleep(Duration::from_millis(20)) => waiting.push(say(further.next().unwrap())),
        }
    };
    assert_eq!(refused.problem(), (503, "overloaded"), "{refused:?}");
    assert_eq!(refused.headers["retry-after"], "1");
    assert!(took < PATIENCE);
    drop(lock);
    let mut answered = 0;
    while let Some(answer) = waiting.next().await {
        assert!(
            answer.status == 200 || answer.problem() == (503, "overloaded"),
            "{answer:?}"
        );
        answered += i64::from(answer.status == 200);
    }
    assert!(answered >= 2, "the messages of the statement under way");
    // Refused messages leave nothing.
    assert_eq!(
        scene.database.number("SELECT count(*) FROM runs").await,
        answered
    );
    say(0).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn request_size_limits_are_configurable() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let settings = "[server]\nmax_key_bytes = 8\nmax_content_parts = 2\nmax_metadata_pairs = 1\nmax_page_size = 5\n";
    let gateway = scene.gateway_with(settings).await;
    let message = "/v1/users/8%C3%A4bytes/messages";
    let part = json!({"type": "text", "text": "hello"});
    let (one, two) = (json!({"a": "1"}), json!({"a": "1", "b": "2"}));
    gateway
        .post(message, &json!({"content": [part, part], "metadata": one}))
        .await
        .ok();
    for (body, says) in [
        (
            json!({"content": [part, part, part]}),
            "`content`: content has at most 2 parts, this has 3",
        ),
        (
            json!({"content": "hello", "metadata": two}),
            "`metadata`: metadata has at most 1 pairs, this has 2",
        ),
    ] {
        let refused = gateway.post(message, &body).await;
        assert_eq!(
            (refused.problem(), refused.body["detail"].as_str()),
            ((422, "invalid-request"), Some(says))
        );
    }
    let thread = "/v1/users/8%C3%A4bytes/thread";
    assert_eq!(
        gateway
            .patch(thread, &json!({"metadata": two}))
            .await
            .problem(),
        (422, "invalid-request")
    );
    assert_eq!(
        gateway.get("/v1/users/8%C3%A4bytes/messages").await.ok()["data"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    for (path, says) in [
        (
            "/v1/users/ninebytes/thread",
            "the user key in the path: a key is at most 8 bytes of UTF-8, this one has 9",
        ),
        (
            "/v1/users/a/topics/ninebytes/thread",
            "the topic key in the path: a key is at most 8 bytes of UTF-8, this one has 9",
        ),
        (
            "/v1/users/a/threads?limit=6",
            "`limit` must be between 1 and 5",
        ),
    ] {
        let refused = gateway.get(path).await;
        assert_eq!(
            (refused.problem(), refused.body["detail"].as_str()),
            ((400, "invalid-request"), Some(says))
        );
    }
}
