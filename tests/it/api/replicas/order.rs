//! Messages that reach one conversation at several replicas.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;

use super::{LONG, SCOPE, half_way, user_messages};
use crate::support::TestDatabase;
use crate::support::gateway::{EventReader, Gateway, PATIENCE, text_of};
use crate::support::history::{all, assert_same};
use crate::support::scene::{Backend, Protocol, Scene, on_shared_scene};

on_shared_scene!(runs_across_replicas_start_in_arrival_order);

async fn runs_across_replicas_start_in_arrival_order(scene: Scene) {
    let gateways = join_all((0..3).map(|_| scene.gateway_with(LONG))).await;
    scene.simulator.hold();
    let mut streams = Vec::new();
    for n in 0..12 {
        let mut stream = gateways[n % 3].stream(SCOPE, &format!("message {n}")).await;
        let first = stream.next().await.unwrap();
        let place = (n > 0).then_some(n);
        assert_eq!(
            first.data["position"].as_u64(),
            place.map(|n| n as u64),
            "{first:?}"
        );
        streams.push(stream);
    }
    scene.simulator.release();
    for (n, events) in join_all(streams.into_iter().map(EventReader::rest))
        .await
        .iter()
        .enumerate()
    {
        assert_eq!(
            events.last().unwrap().name,
            "run.completed",
            "message {n}: {events:#?}"
        );
        assert!(
            text_of(events).contains(&format!("message {n}. (This is turn {} of", n + 1)),
            "{events:#?}"
        );
    }
    let wanted: Vec<_> = (0..12).map(|n| format!("message {n}")).collect();
    assert_eq!(user_messages(&gateways[1], SCOPE).await, wanted);
    let runs = all(&gateways[2], &format!("{SCOPE}/runs")).await;
    for two in runs.windows(2) {
        let (ended, began) = (
            two[0]["finished_at"].as_str().unwrap(),
            two[1]["started_at"].as_str().unwrap(),
        );
        assert!(
            ended <= began,
            "a run began before the one before it had ended: {two:#?}"
        );
    }
    let stats = scene.simulator.stats();
    assert_eq!(
        (stats.max_active_runs_per_thread, stats.lock_refusals),
        (1, 0),
        "{stats:?}"
    );
    assert_same(&scene, &gateways[0], SCOPE).await;
}

/// Runs wait at one replica for runs of another one until both poll rarely. With polls once a
/// second they would start half a second late on average.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_run_on_other_replica_is_woken_promptly() {
    const USERS: usize = 16;
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateways = [
        scene.gateway_with(LONG).await,
        scene.gateway_with(LONG).await,
    ];
    scene.simulator.hold();
    let mut streams = Vec::new();
    for user in 0..USERS {
        for turn in 0..2 {
            let gateway = &gateways[(user + turn) % 2];
            let mut stream = gateway
                .stream(&format!("/v1/users/{user}"), &format!("turn {turn}"))
                .await;
            stream.next().await.unwrap();
            streams.push(stream);
        }
    }
    // The pauses between polls have grown by then.
    tokio::time::sleep(Duration::from_secs(3)).await;
    scene.simulator.release();
    for stream in streams {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
    let delays = "SELECT (extract(epoch FROM b.started_at - a.finished_at) * 1000)::bigint::text \
        FROM runs a JOIN runs b ON a.thread_id = b.thread_id AND a.seq = 1 AND b.seq = 2";
    let delays = scene.database.texts(delays).await;
    let mut delays: Vec<i64> = delays.iter().map(|delay| delay.parse().unwrap()).collect();
    delays.sort_unstable();
    assert_eq!(delays.len(), USERS);
    assert!(
        delays[USERS / 2] < 250,
        "waiting runs start late: {delays:?} ms"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_alternate_between_replicas_without_pauses() {
    const TURNS: u32 = 20;
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateways = [
        scene.gateway_with(LONG).await,
        scene.gateway_with(LONG).await,
    ];
    scene.simulator.hold();
    let mut streams = Vec::new();
    for n in 0..TURNS as usize {
        let mut stream = gateways[n % 2].stream(SCOPE, &format!("turn {n}")).await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    let begun = Instant::now();
    scene.simulator.release();
    for stream in streams {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
    let slow_poll = Duration::from_millis(500);
    assert!(
        begun.elapsed() < TURNS * slow_poll,
        "{TURNS} runs took {:?}",
        begun.elapsed()
    );
}

/// Starts a gateway that gets no notifications. It listens on another database, as behind a
/// pooler that drops notifications.
async fn gateway_without_notifications(scene: &Scene, elsewhere: &TestDatabase) -> Gateway {
    let direct = format!("[store]\ndirect_url = {:?}\n", elsewhere.url());
    Gateway::start(&scene.config(LONG).replace("[store]\n", &direct)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn missed_notifications_are_compensated_by_polling() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let elsewhere = TestDatabase::postgres().await;
    let (one, other) = tokio::join!(
        gateway_without_notifications(&scene, &elsewhere),
        gateway_without_notifications(&scene, &elsewhere)
    );
    scene.simulator.hold();
    let mut streams = vec![one.stream(SCOPE, &half_way("tell me")).await];
    let run = super::run_of(&streams[0].next().await.unwrap());
    for n in 1..5 {
        let mut stream = [&one, &other][n % 2]
            .stream(SCOPE, &format!("turn {n}"))
            .await;
        assert_eq!(stream.next().await.unwrap().data["position"], json!(n));
        streams.push(stream);
    }
    // The text still arrives live.
    let mut follower = other.events(SCOPE, &run, None).await;
    follower.until_text("You said: tell me.").await;
    let begun = Instant::now();
    scene.simulator.release();
    for stream in streams {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
    assert_eq!(follower.rest().await.last().unwrap().name, "run.completed");
    assert!(
        begun.elapsed() < PATIENCE / 2,
        "5 runs took {:?}",
        begun.elapsed()
    );
    assert_same(&scene, &other, SCOPE).await;
}
