//! Machines whose clock is an hour off.

use std::time::{Duration, Instant};

use chrono::TimeDelta;
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use threadkeeper::domain::Timestamp;

use super::{LONG, user_messages};
use crate::support::clock::shift;
use crate::support::gateway::{Gateway, text};
use crate::support::history::all;
use crate::support::scene::{Backend, Protocol, Scene};

const HOUR: i64 = 3600;

/// Starts a gateway whose clock is off by `seconds`.
async fn off_by(scene: &Scene, seconds: i64, settings: &str) -> Gateway {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, scene.config(settings)).unwrap();
    let mut command = Gateway::command(&["serve", "--listen", "127.0.0.1:0", "--config"]);
    command.arg(&file);
    shift(&mut command, seconds);
    Gateway::spawn(command, folder).await
}

/// Starts three gateways: one with the right time, one ahead, and one behind.
async fn three_gateways(scene: &Scene, settings: &str) -> [Gateway; 3] {
    let (right, ahead, behind) = tokio::join!(
        scene.gateway_with(settings),
        off_by(scene, HOUR, settings),
        off_by(scene, -HOUR, settings)
    );
    [right, ahead, behind]
}

async fn shared() -> Scene {
    Scene::new(Protocol::Responses, Backend::Postgres).await
}

fn time(of: &Value, name: &str) -> Timestamp {
    of[name]
        .as_str()
        .unwrap_or_else(|| panic!("no {name}: {of:#}"))
        .parse()
        .unwrap()
}

/// If this fails, the other tests prove nothing.
#[tokio::test(flavor = "multi_thread")]
async fn gateway_clock_shift_takes_effect() {
    let scene = shared().await;
    let [right, ahead, behind] = three_gateways(&scene, LONG).await;
    let mut times = Vec::new();
    for gateway in [&behind, &right, &ahead] {
        gateway.say("/v1/users/alice", "hello").await;
        let line = gateway
            .logs()
            .into_iter()
            .next_back()
            .expect("the gateway logs its start");
        let line: Value = serde_json::from_str(&line).unwrap();
        times.push(time(&line, "timestamp"));
    }
    for two in times.windows(2) {
        let apart = (two[1] - two[0]).num_seconds();
        assert!((HOUR - 60..HOUR + 60).contains(&apart), "{times:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_chronological_despite_clock_skew() {
    let scene = shared().await;
    let gateways = three_gateways(&scene, LONG).await;
    let mut made = Vec::new();
    for n in 0..9 {
        let answer = gateways[n % 3]
            .say(&format!("/v1/users/alice/topics/t{n}"), "hello")
            .await;
        made.push(answer["thread"]["id"].as_str().unwrap().to_owned());
        gateways[n % 3]
            .say("/v1/users/bob", &format!("message {n}"))
            .await;
    }
    for gateway in &gateways {
        let ids = |list: Vec<Value>| -> Vec<_> {
            list.iter()
                .map(|it| it["id"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(ids(all(gateway, "/v1/users/alice/threads").await), made);
        assert_eq!(ids(all(gateway, "/v1/threads?user=alice").await), made);
        let wanted: Vec<_> = (0..9).map(|n| format!("message {n}")).collect();
        assert_eq!(user_messages(gateway, "/v1/users/bob").await, wanted);
        let runs = all(gateway, "/v1/users/bob/runs").await;
        let times: Vec<_> = runs
            .iter()
            .flat_map(|run| ["created_at", "started_at", "finished_at"].map(|name| time(run, name)))
            .collect();
        assert!(times.is_sorted(), "{runs:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_expire_simultaneously_despite_clock_skew() {
    const MINUTE: Duration = Duration::from_mins(1);
    let scene = shared().await;
    let settings = format!("{LONG}[sessions]\nttl = \"30m\"\n[janitor]\ninterval = \"1s\"\n");
    let gateways = three_gateways(&scene, &settings).await;
    let says = async |n: usize, scope: &str| {
        gateways[n].say(scope, "hello").await["thread"]["id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    for (n, maker) in ["zero", "one", "two"].into_iter().enumerate() {
        let scope = format!("/v1/users/{maker}/sessions/s");
        let first = says(n, &scope).await;
        for other in 0..3 {
            assert_eq!(
                says(other, &scope).await,
                first,
                "the thread lives, at {other} too"
            );
        }
        scene.database.age_threads(29 * MINUTE).await;
        for other in 0..3 {
            assert_eq!(
                says(other, &scope).await,
                first,
                "the thread still lives, at {other} too"
            );
        }
        scene.database.age_threads(2 * MINUTE).await;
        let fresh = says((n + 1) % 3, &scope).await;
        assert_ne!(fresh, first, "the thread has expired");
        assert_eq!(says((n + 2) % 3, &scope).await, fresh);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_keep_their_length_despite_clock_skew() {
    let scene = shared().await;
    for gateway in three_gateways(&scene, LONG).await {
        let body = json!({"content": "hello [[sim: silent_after=2]]", "timeout_ms": 1500});
        let begun = Instant::now();
        let late = gateway.post("/v1/users/alice/messages", &body).await;
        assert_eq!(late.problem(), (504, "upstream-timeout"));
        let took = begun.elapsed();
        assert!(
            (Duration::from_millis(1500)..Duration::from_secs(20)).contains(&took),
            "{took:?}"
        );
        let runs = gateway.get("/v1/users/alice/runs?limit=1").await.ok();
        let run = &runs["data"][0];
        assert_eq!(run["status"], "expired", "{run:#}");
        let worked = time(run, "finished_at") - time(run, "started_at");
        assert!(
            worked >= TimeDelta::milliseconds(1500) && worked < TimeDelta::seconds(20),
            "{worked}"
        );
        let tools = gateway
            .say("/v1/users/bob", "weather? [[sim: tool=get_weather]]")
            .await;
        assert_eq!(
            tools["run"]["status"], "requires_action",
            "the run waits as long as it may"
        );
        let path = format!(
            "/v1/users/bob/runs/{}/cancel",
            tools["run"]["id"].as_str().unwrap()
        );
        gateway
            .send(gateway.request(Method::POST, &path))
            .await
            .ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_is_exact_despite_clock_skew() {
    let scene = shared().await;
    let settings = format!(
        "{LONG}[retention]\nruns = \"30m\"\nevents = \"20m\"\n[janitor]\ninterval = \"1s\"\n"
    );
    let gateways = three_gateways(&scene, &settings).await;
    let clean_up = async || {
        for gateway in &gateways {
            gateway
                .send(gateway.request(Method::POST, "/v1/admin/cleanup"))
                .await
                .ok();
        }
    };
    let mut runs = Vec::new();
    for (n, gateway) in gateways.iter().enumerate() {
        let answer = gateway
            .say(
                "/v1/users/alice",
                &format!("message {n} [[sim: incomplete]]"),
            )
            .await;
        runs.push(format!(
            "/v1/users/alice/runs/{}",
            answer["run"]["id"].as_str().unwrap()
        ));
    }
    clean_up().await;
    for run in &runs {
        let read = gateways[0].get(run).await.ok();
        assert!(text(&read["message"]).contains("message"), "{read:#}");
    }
    assert_eq!(
        scene
            .database
            .number("SELECT count(DISTINCT run_id) FROM run_events")
            .await,
        3
    );
    // An id contains its time, so the ids are moved, too.
    scene.database.backdate_runs(Duration::from_mins(29)).await;
    clean_up().await;
    assert_eq!(
        scene.database.number("SELECT count(*) FROM runs").await,
        3,
        "the runs are kept"
    );
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM run_events")
            .await,
        0,
        "the runs are pruned"
    );
    scene.database.backdate_runs(Duration::from_mins(2)).await;
    clean_up().await;
    assert_eq!(
        scene.database.number("SELECT count(*) FROM runs").await,
        0,
        "all are gone"
    );
    assert_eq!(
        user_messages(&gateways[1], "/v1/users/alice").await.len(),
        3,
        "the messages stay"
    );
}
