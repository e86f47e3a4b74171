//! Operators' requests: threads of all users, upstream orphans, and cleanup of old data.

use std::time::Duration;

use serde_json::{Value, json};
use threadkeeper::simulator::SimulatorConfig;

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol, on_each_store};

on_each_protocol!(
    runs_and_events_past_retention_are_pruned,
    single_cleanup_prunes_all_events_past_retention,
    orphaned_upstream_thread_is_reported_or_deleted,
    crash_during_thread_creation_leaves_no_orphan,
);
on_each_store!(thread_list_filters_by_state_and_attributes);

const BY_HAND: &str = "[janitor]\ninterval = \"1h\"\ncalls_per_second = 10000\n";

async fn clean_up(gateway: &Gateway) -> Value {
    gateway.post("/v1/admin/cleanup", &json!({})).await.ok()
}

async fn listed(gateway: &Gateway, query: &str) -> Vec<String> {
    let list = gateway
        .get(&format!("/v1/threads?order=asc&limit=100&{query}"))
        .await
        .ok();
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["key"]["user"].as_str().unwrap().to_owned())
        .collect()
}

async fn thread_list_filters_by_state_and_attributes(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    for user in ["a", "b", "c", "d"] {
        gateway.say(&format!("/v1/users/{user}"), "hello").await;
    }
    scene.database.age_threads(Duration::from_hours(1)).await;
    gateway.say("/v1/users/b", "hello").await;
    let asks = json!({"content": "[[sim: tool=look_up]]"});
    gateway.post("/v1/users/c/messages", &asks).await.ok();
    scene.simulator.hold();
    let mut stream = gateway.stream("/v1/users/d", "hello").await;
    stream.next().await.unwrap();
    gateway
        .post("/v1/users/a/thread/rollover", &json!({}))
        .await
        .ok();

    assert_eq!(listed(&gateway, "").await, ["a", "b", "c", "d", "a"]);
    assert_eq!(listed(&gateway, "lifecycle=archived").await, ["a"]);
    assert_eq!(listed(&gateway, "state=active").await, ["d"]);
    assert_eq!(listed(&gateway, "state=requires_action").await, ["c"]);
    assert_eq!(
        listed(&gateway, "state=idle&lifecycle=current").await,
        ["b", "a"]
    );
    assert_eq!(listed(&gateway, "user=b&upstream=simulated").await, ["b"]);
    assert_eq!(
        listed(&gateway, "upstream=other").await,
        Vec::<String>::new()
    );
    // Half an hour ago by the database's clock.
    let shown = gateway.get("/v1/users/b/thread").await.ok()["last_active_at"].clone();
    let active: chrono::DateTime<chrono::Utc> = shown.as_str().unwrap().parse().unwrap();
    let ago = (active - chrono::TimeDelta::minutes(30))
        .format("%Y-%m-%dT%H:%M:%SZ")
        .to_string();
    assert_eq!(
        listed(&gateway, &format!("created_before={ago}")).await,
        ["a", "b", "c", "d"]
    );
    assert_eq!(
        listed(&gateway, &format!("inactive_since={ago}")).await,
        ["a"]
    );
    for bad in [
        "state=asleep",
        "lifecycle=gone",
        "created_before=yesterday",
        "colour=red",
        "user=",
        "limit=0",
    ] {
        assert_eq!(
            gateway.get(&format!("/v1/threads?{bad}")).await.problem(),
            (400, "invalid-request"),
            "{bad}"
        );
    }
    scene.simulator.release();
    stream.rest().await;
}

async fn runs_and_events_past_retention_are_pruned(scene: Scene) {
    let settings = format!("{BY_HAND}[retention]\nruns = \"10h\"\nevents = \"1h\"\n");
    let gateway = scene.gateway_with(&settings).await;
    let scope = "/v1/users/alice";
    let post = gateway.request(reqwest::Method::POST, &format!("{scope}/messages"));
    // This run does not complete, so its log is stored: the transcript alone does not describe
    // it.
    let body = json!({"content": "hello [[sim: incomplete]]"});
    let first = gateway
        .send(post.header("idempotency-key", "k").json(&body))
        .await
        .ok();
    let run = first["run"]["id"].as_str().unwrap().to_owned();
    let count = async |table: &str| {
        scene
            .database
            .number(&format!("SELECT count(*) FROM {table}"))
            .await
    };
    assert_eq!(clean_up(&gateway).await["pruned"]["events"], 0);
    assert_eq!((count("runs").await, count("run_events").await), (1, 1));

    scene.database.backdate_runs(Duration::from_hours(2)).await;
    assert_eq!(clean_up(&gateway).await["pruned"]["events"], 1);
    assert_eq!((count("runs").await, count("run_events").await), (1, 0));

    scene.database.backdate_runs(Duration::from_hours(10)).await;
    scene
        .database
        .age_idempotency_keys(Duration::from_hours(24))
        .await;
    let pruned = clean_up(&gateway).await["pruned"].clone();
    assert_eq!(
        (&pruned["runs"], count("runs").await),
        (&json!(1), 0),
        "{pruned:#}"
    );
    assert_eq!(count("idempotency_keys").await, 0);
    assert_eq!(
        gateway.get(&format!("{scope}/runs/{run}")).await.status,
        404
    );
    let said = gateway.get(&format!("{scope}/messages")).await.ok();
    assert_eq!(
        said["data"].as_array().unwrap().len(),
        2,
        "the messages stay"
    );
    // The thread stays in use, and a later deletion still removes what the pruned run stored
    // upstream.
    gateway.say(scope, "needle").await;
    gateway.delete(&format!("{scope}/thread")).await.ok();
    assert_eq!(scene.simulator.stored_responses(), Vec::<String>::new());
}

/// The number of rows is that of many streams over a while.
async fn single_cleanup_prunes_all_events_past_retention(scene: Scene) {
    const ROWS: i64 = 120_000;
    if scene.protocol != Protocol::Responses {
        return;
    }
    let gateway = scene
        .gateway_with(&format!("{BY_HAND}[retention]\nevents = \"1h\"\n"))
        .await;
    gateway.say("/v1/users/alice", "hello").await;
    let (numbers, json) = match scene.backend {
        Backend::Postgres => (
            format!("SELECT generate_series(100, {}) AS n", ROWS + 99),
            "'[]'::jsonb",
        ),
        Backend::Sqlite => (
            format!(
                "WITH RECURSIVE g (n) AS (SELECT 100 UNION ALL SELECT n + 1 FROM g WHERE n < {}) SELECT n FROM g",
                ROWS + 99
            ),
            "'[]'",
        ),
    };
    scene.database.backdate_runs(Duration::from_hours(2)).await;
    let fill = format!(
        "INSERT INTO run_events (run_id, first_offset, events, end_offset) \
         SELECT r.id, g.n, {json}, g.n + 1 FROM runs r, ({numbers}) g"
    );
    scene.database.execute(&fill).await;
    let done = clean_up(&gateway).await;
    assert!(
        done["pruned"]["events"].as_i64().unwrap() >= ROWS,
        "{done:#}"
    );
    assert_eq!(done["has_more"], false);
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM run_events")
            .await,
        0
    );
}

/// Loses the answer to the creation of an upstream thread.
async fn lose_creation_answer(scene: &Scene, gateway: &Gateway) {
    scene.fault("create_thread", "drop=after", 1);
    gateway.say("/v1/users/alice", "hello").await;
    assert_eq!(
        scene.upstream_threads().len(),
        2,
        "the answer of one creation is lost"
    );
    assert_eq!(
        clean_up(gateway).await["upstream_orphans_deleted"],
        0,
        "the creation may still be under way"
    );
    scene.database.execute("UPDATE upstream_orphans SET due_at = (SELECT t.created_at FROM threads t WHERE t.id = thread_id)").await;
}

async fn orphaned_upstream_thread_is_reported_or_deleted(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene.gateway_with(BY_HAND).await;
    lose_creation_answer(&scene, &gateway).await;
    let plan = gateway
        .post("/v1/admin/cleanup?dry_run=true", &json!({}))
        .await
        .ok();
    assert_eq!(plan["upstream_orphans"][0]["action"], "find_and_delete");
    clean_up(&gateway).await;
    gateway
        .logged(|line| line.contains("may exist that cannot be found"))
        .await;
    drop(gateway);

    // A server that lists threads shows the orphan.
    let lists = SimulatorConfig {
        list_threads: true,
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(scene.protocol, scene.backend, lists).await;
    let gateway = scene.gateway_with(BY_HAND).await;
    lose_creation_answer(&scene, &gateway).await;
    assert_eq!(clean_up(&gateway).await["upstream_orphans_deleted"], 1);
    let thread = gateway.get("/v1/users/alice/thread").await.ok();
    assert_eq!(
        scene.upstream_threads(),
        [thread["upstream_thread_id"].as_str().unwrap()]
    );
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM upstream_orphans")
            .await,
        0
    );
}

async fn crash_during_thread_creation_leaves_no_orphan(scene: Scene) {
    if scene.protocol == Protocol::Chain || scene.backend == Backend::Sqlite {
        return;
    }
    // The process dies after the creation of the upstream thread and before its record.
    let ttl = "[replica]\nsession_ttl = \"1s\"\n";
    let lists = SimulatorConfig {
        list_threads: true,
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(scene.protocol, scene.backend, lists).await;
    let gateway = scene.gateway_with(ttl).await;
    scene.fault("create_thread", "silent", 1);
    let waiting =
        gateway.post_in_background("/v1/users/alice/messages", &json!({"content": "hello"}));
    scene.simulator.wait_for(|stats| stats.requests >= 1).await;
    gateway.kill();
    drop(waiting);
    let gateway = scene.gateway_with(&format!("{BY_HAND}{ttl}")).await;
    let answer = gateway.say("/v1/users/alice", "again").await;
    scene.database.execute("UPDATE upstream_orphans SET due_at = (SELECT t.created_at FROM threads t WHERE t.id = thread_id)").await;
    clean_up(&gateway).await;
    assert_eq!(
        scene.upstream_threads(),
        [answer["thread"]["upstream_thread_id"].as_str().unwrap()]
    );
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM upstream_orphans")
            .await,
        0
    );
}

/// Values that one engine accepts and another one does not, and values that no engine accepts.
#[tokio::test(flavor = "multi_thread")]
async fn filter_values_unsupported_by_databases_are_refused() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        let gateway = scene.gateway_with(BY_HAND).await;
        gateway.say("/v1/users/alice", "hello").await;
        for query in [
            "created_before=-262143-01-01T00:00:00Z",
            "inactive_since=-262143-01-01T00:00:00Z",
            "created_before=%2B262142-12-31T23:59:59Z",
            "inactive_since=-0001-12-31T23:59:59Z",
            "created_before=%2B10000-01-01T00:00:00Z",
            "upstream=%00",
        ] {
            let answer = gateway.get(&format!("/v1/threads?{query}")).await;
            assert_eq!(
                answer.problem(),
                (400, "invalid-request"),
                "{query} on {backend:?}: {answer:?}"
            );
            let name = query.split('=').next().unwrap();
            assert!(
                answer.body["detail"].as_str().unwrap().contains(name),
                "{answer:?}"
            );
        }
        let all = "created_before=9999-12-31T23:59:59Z&inactive_since=9999-12-31T23:59:59Z";
        assert_eq!(listed(&gateway, all).await, ["alice"]);
        assert!(
            listed(&gateway, "created_before=0000-01-01T00:00:00Z")
                .await
                .is_empty()
        );
    }
}
