//! Fewer database connections than concurrent requests.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;

use super::{LONG, TTL};
use crate::support::gateway::{Gateway, text};
use crate::support::history::assert_same;
use crate::support::scene::{Backend, Protocol, Scene};

/// Duration of the lock. It is longer than a request waits for a connection, and longer than a
/// session lives.
const STUCK: Duration = Duration::from_secs(5);
const ACQUIRE: Duration = Duration::from_secs(1);

async fn gateway(scene: &Scene, settings: &str) -> Gateway {
    let pool = format!(
        "[store]\nmax_connections = 2\nacquire_timeout = \"{}ms\"\n",
        ACQUIRE.as_millis()
    );
    Gateway::start(&scene.config(settings).replace("[store]\n", &pool)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn few_connections_serve_many_requests() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateways = [gateway(&scene, LONG).await, gateway(&scene, LONG).await];
    let all = (0..60).map(|n| {
        gateways[n % 2].say(
            &format!("/v1/users/user-{}", n % 12),
            &format!("message {n}"),
        )
    });
    for (n, answer) in join_all(all).await.iter().enumerate() {
        assert!(text(&answer["message"]).contains(&format!("message {n}")));
    }
    for user in 0..12 {
        assert_same(
            &scene,
            &gateways[user % 2],
            &format!("/v1/users/user-{user}"),
        )
        .await;
    }
}

/// A lock on the table of threads blocks all statements that need it, so all connections are in
/// use.
#[tokio::test(flavor = "multi_thread")]
async fn exhausted_pool_refuses_requests_and_keeps_sessions() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let (one, other) = (
        gateway(&scene, super::SHORT).await,
        gateway(&scene, super::SHORT).await,
    );
    scene.simulator.hold();
    let mut running = Vec::new();
    for n in 0..6 {
        let mut stream = one
            .stream(&format!("/v1/users/running-{n}"), "tell me")
            .await;
        stream.next().await.unwrap();
        running.push(stream);
    }
    let stuck = format!(
        "BEGIN; LOCK TABLE threads IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep({}); COMMIT",
        STUCK.as_secs()
    );
    let stuck = scene.database.execute(&stuck);
    let one_of = |n: usize| if n.is_multiple_of(2) { &one } else { &other };
    let meanwhile = async {
        let locked = "SELECT count(*) FROM pg_locks WHERE relation = 'threads'::regclass AND mode = 'AccessExclusiveLock'";
        super::counted(&scene, locked, 1).await;
        // The runs end now, and cannot record that yet.
        scene.simulator.release();
        let begun = Instant::now();
        let refused = join_all((0..30).map(|n| async move {
            let body = json!({"content": "hello"});
            // The first connection is in use until its statement ends. Requests behind it are
            // refused.
            let answer = one_of(n)
                .post(&format!("/v1/users/new-{n}/messages"), &body)
                .await;
            (answer, begun.elapsed())
        }));
        refused.await
    };
    let ((), refused) = tokio::join!(stuck, meanwhile);
    let mut said = 0;
    for (answer, after) in &refused {
        if answer.status == 200 {
            said += 1;
            continue;
        }
        assert_eq!(answer.problem(), (503, "store-unavailable"));
        assert!(answer.headers.contains_key("retry-after"), "{answer:?}");
        assert!(*after < STUCK + 5 * ACQUIRE, "refused after {after:?}");
    }
    assert!(said < refused.len(), "connections are free again");
    for stream in running {
        assert_eq!(
            stream.rest().await.last().unwrap().name,
            "run.completed",
            "the active runs have ended"
        );
    }
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM runs WHERE fence > 1")
            .await,
        0,
        "no session has lapsed"
    );
    const { assert!(STUCK.as_millis() > TTL.as_millis()) };
    let runs = i64::try_from(6 + said).unwrap();
    super::counted(
        &scene,
        "SELECT count(*) FROM runs WHERE finished_at IS NOT NULL AND status = 'completed'",
        runs,
    )
    .await;
}
