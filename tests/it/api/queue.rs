//! One run at a time, in the order of arrival, at any concurrency.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};
use threadkeeper::domain::Timestamp;

use crate::support::gateway::{Gateway, PATIENCE, text_of};
use crate::support::history::{all, messages};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol, on_each_store};

on_each_protocol!(
    concurrent_messages_to_one_thread_run_serially_in_order,
    messages_to_different_threads_run_concurrently,
);
on_each_store!(
    busy_thread_refuses_message_with_reject_strategy,
    full_queue_refuses_message
);

async fn concurrent_messages_to_one_thread_run_serially_in_order(scene: Scene) {
    // Each message is recorded after the one before it, and a busy machine takes its time.
    let gateway = Gateway::start_with(
        &scene.config(""),
        &[("THREADKEEPER_STORE__ACQUIRE_TIMEOUT", "30s")],
    )
    .await;
    let answers =
        join_all((0..200).map(|n| gateway.say("/v1/users/alice", &format!("message {n}")))).await;
    let threads: BTreeSet<_> = answers
        .iter()
        .map(|answer| answer["thread"]["id"].to_string())
        .collect();
    assert_eq!(threads.len(), 1);
    let stats = scene.simulator.stats();
    assert_eq!(stats.max_active_runs_per_thread, 1);
    assert_eq!(
        (stats.runs_started, stats.lock_refusals),
        (200, 0),
        "no run is doubled and none is refused: {stats:?}"
    );

    // The order of admission, the order of the runs and the order of the transcript are the same.
    let runs = all(&gateway, "/v1/users/alice/runs").await;
    assert_eq!(runs.len(), 200);
    let messages = messages(&gateway, "/v1/users/alice").await;
    assert_eq!(messages.len(), 400);
    for (n, (run, turn)) in runs.iter().zip(messages.chunks(2)).enumerate() {
        assert_eq!(
            [&turn[0]["run_id"], &turn[1]["run_id"]],
            [&run["id"], &run["id"]],
            "turn {n}"
        );
        let reply = turn[1]["content"][0]["text"].as_str().unwrap();
        assert!(
            reply.contains(&format!("turn {} of", n + 1)),
            "turn {n}: {reply}"
        );
    }
    let time = |run: &Value, name: &str| run[name].as_str().unwrap().parse::<Timestamp>().unwrap();
    for pair in runs.windows(2) {
        let (ended, began) = (time(&pair[0], "finished_at"), time(&pair[1], "started_at"));
        assert!(
            ended <= began,
            "a run began before the one before it had ended: {pair:#?}"
        );
    }
}

async fn busy_thread_refuses_message_with_reject_strategy(scene: Scene) {
    let gateway = scene.gateway().await;
    let reject = json!({"content": "me too", "multitask_strategy": "reject"});
    scene.simulator.hold();
    let mut first = gateway.stream("/v1/users/alice", "hold the line").await;
    first.next().await.unwrap();
    let refused = gateway.post("/v1/users/alice/messages", &reject).await;
    assert_eq!(refused.problem(), (409, "thread-busy"));
    assert!(refused.headers.contains_key("retry-after"));
    // At another process the store refuses the message.
    if scene.backend == Backend::Postgres {
        let other = scene.gateway().await;
        assert_eq!(
            other
                .post("/v1/users/alice/messages", &reject)
                .await
                .problem(),
            (409, "thread-busy")
        );
    }
    let state = gateway.get("/v1/users/alice/thread").await.ok();
    assert_eq!(
        (&state["state"], &state["queue_depth"], &state["run_count"]),
        (&json!("active"), &json!(0), &json!(1))
    );
    scene.simulator.release();
    assert!(text_of(&first.rest().await).contains("hold the line"));
    gateway.post("/v1/users/alice/messages", &reject).await.ok();
}

async fn full_queue_refuses_message(scene: Scene) {
    let gateway = scene.gateway_with("[runs]\nmax_queue = 2\n").await;
    scene.simulator.hold();
    let mut first = gateway.stream("/v1/users/alice", "0").await;
    first.next().await.unwrap();
    let mut waiting = Vec::new();
    for n in 1..=2 {
        let mut stream = gateway.stream("/v1/users/alice", &n.to_string()).await;
        let queued = stream.next().await.unwrap();
        assert_eq!(
            (queued.name.as_str(), &queued.data["position"]),
            ("run.queued", &json!(n))
        );
        waiting.push(stream);
    }
    let state = gateway.get("/v1/users/alice/thread").await.ok();
    assert_eq!(
        (&state["state"], &state["queue_depth"]),
        (&json!("active"), &json!(2))
    );
    let refused = gateway
        .post("/v1/users/alice/messages", &json!({"content": "3"}))
        .await;
    assert_eq!(refused.problem(), (429, "queue-full"));
    assert!(refused.headers.contains_key("retry-after"));
    // Other keys are not affected. Their run starts, and waits at the held simulator like the
    // first one.
    assert_eq!(
        gateway
            .stream("/v1/users/bob", "hi")
            .await
            .next()
            .await
            .unwrap()
            .name,
        "run.started"
    );
    scene.simulator.release();
    for stream in [first].into_iter().chain(waiting) {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
}

async fn messages_to_different_threads_run_concurrently(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let said = (0..200)
        .map(|n| gateway.say(&format!("/v1/users/user-{n}"), "hi"))
        .collect::<Vec<_>>();
    // The wait ends only if all runs are active at once.
    let all_at_work = async {
        scene
            .simulator
            .wait_for(|stats| stats.active_runs == 200)
            .await;
        scene.simulator.release();
    };
    let (answers, ()) = tokio::time::timeout(PATIENCE, async {
        tokio::join!(join_all(said), all_at_work)
    })
    .await
    .expect("200 runs are active at once");
    assert_eq!(answers.len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn first_messages_at_two_replicas_create_one_thread() {
    for protocol in [Protocol::Assistants, Protocol::Responses] {
        let scene = Scene::new(protocol, Backend::Postgres).await;
        let gateways = [scene.gateway().await, scene.gateway().await];
        let answers = join_all(
            (0..64).map(|n| gateways[n % 2].say("/v1/users/new", &format!("message {n}"))),
        )
        .await;
        let threads: BTreeSet<_> = answers
            .iter()
            .map(|answer| answer["thread"]["id"].to_string())
            .collect();
        assert_eq!(threads.len(), 1, "there is one gateway thread");
        assert_eq!(
            scene.upstream_threads().len(),
            1,
            "there is one upstream thread"
        );
        let stats = scene.simulator.stats();
        assert_eq!(
            (
                stats.runs_started,
                stats.max_active_runs_per_thread,
                stats.lock_refusals
            ),
            (64, 1, 0),
            "{stats:?}"
        );
        assert_eq!(
            scene.database.number("SELECT count(*) FROM threads").await,
            1
        );
        let replies: BTreeSet<_> = answers
            .iter()
            .map(|answer| {
                answer["message"]["content"][0]["text"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        for n in 0..64 {
            assert!(
                replies
                    .iter()
                    .any(|reply| reply.contains(&format!("turn {} of", n + 1))),
                "turn {n}"
            );
        }
    }
}
