//! Expiry of threads, and what follows it. Tests move times in the database instead of clocks.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::gateway::{Gateway, PATIENCE, text};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol, on_each_store};

on_each_protocol!(
    janitor_archives_clears_and_erases,
    undeletable_thread_does_not_block_janitor,
    fresh_thread_ignores_run_of_expired_thread,
    fresh_thread_ignores_run_of_deleted_thread,
);
on_each_store!(
    session_ttl_counts_from_creation_or_last_message,
    request_can_set_thread_ttl,
    user_and_topic_threads_expire_when_configured,
    changed_expiry_configuration_applies_to_existing_threads,
);

const HOUR: Duration = Duration::from_hours(1);
/// With these settings the janitor works only on request.
const BY_HAND: &str = "[janitor]\ninterval = \"1h\"\ncalls_per_second = 10000\n";

async fn clean_up(gateway: &Gateway) -> Value {
    gateway.post("/v1/admin/cleanup", &json!({})).await.ok()
}

async fn planned(gateway: &Gateway) -> Value {
    gateway
        .post("/v1/admin/cleanup?dry_run=true", &json!({}))
        .await
        .ok()
}

fn id(answer: &Value) -> &str {
    answer["thread"]["id"].as_str().unwrap()
}

async fn session_ttl_counts_from_creation_or_last_message(scene: Scene) {
    let scope = "/v1/users/alice/sessions/tab";
    for (from, slides) in [("creation", false), ("last_activity", true)] {
        let settings = format!("{BY_HAND}[sessions]\nttl = \"1h\"\nttl_from = \"{from}\"\n");
        let gateway = scene.gateway_with(&settings).await;
        let scope = format!("{scope}-{from}");
        let first = gateway.say(&scope, "one").await;
        scene.database.age_threads(HOUR * 2 / 3).await;
        let second = gateway.say(&scope, "two").await;
        assert_eq!(id(&first), id(&second));
        scene.database.age_threads(HOUR * 2 / 3).await;
        let third = gateway.say(&scope, "three").await;
        assert_eq!(id(&second) == id(&third), slides, "{from}");
        if !slides {
            assert_eq!(third["thread"]["previous_thread"], first["thread"]["id"]);
        }
        // Times count in milliseconds, so the thread has expired by the next statement.
        scene.database.age_threads(HOUR).await;
        let fourth = gateway.say(&scope, "four").await;
        assert_ne!(id(&third), id(&fourth));
        assert!(
            text(&fourth["message"]).contains("turn 1"),
            "the fresh thread knows nothing of the old one"
        );
        let all = gateway
            .get(&format!(
                "{scope}/messages?archived=true&order=asc&limit=100"
            ))
            .await
            .ok();
        assert_eq!(all["data"].as_array().unwrap().len(), 8);
        assert_eq!(all["data"][0]["content"][0]["text"], "one");
        let own = gateway.get(&format!("{scope}/messages")).await.ok();
        assert_eq!(own["data"].as_array().unwrap().len(), 2);
        drop(gateway);
    }
}

async fn request_can_set_thread_ttl(scene: Scene) {
    let gateway = scene
        .gateway_with(&format!("{BY_HAND}[threads]\nmax_ttl = \"2h\"\n"))
        .await;
    let scope = "/v1/users/alice/topics/quick";
    let say = async |body: Value| gateway.post(&format!("{scope}/messages"), &body).await;
    let first = say(json!({"content": "one", "ttl_ms": 60_000})).await.ok();
    let life = |answer: &Value| {
        let at = |name: &str| {
            answer["thread"][name]
                .as_str()
                .unwrap()
                .parse::<chrono::DateTime<chrono::Utc>>()
        };
        (at("expires_at").unwrap() - at("created_at").unwrap()).num_milliseconds()
    };
    assert_eq!(life(&first), 60_000);
    let second = say(json!({"content": "two", "ttl_ms": 7_200_000}))
        .await
        .ok();
    assert_eq!(id(&first), id(&second));
    assert!(life(&second) >= 7_200_000, "the TTL counts from now");
    let third = say(json!({"content": "three"})).await.ok();
    assert_eq!(
        life(&third),
        life(&second),
        "a request without a TTL changes nothing"
    );
    scene.database.age_threads(2 * HOUR).await;
    let fourth = say(json!({"content": "four"})).await.ok();
    assert_ne!(id(&fourth), id(&first));
    assert_eq!(
        fourth["thread"]["expires_at"],
        Value::Null,
        "the fresh thread has the configured TTL"
    );
    for bad in [0, 7_200_001] {
        assert_eq!(
            say(json!({"content": "x", "ttl_ms": bad})).await.problem(),
            (422, "invalid-request")
        );
    }
}

async fn user_and_topic_threads_expire_when_configured(scene: Scene) {
    let settings = format!("{BY_HAND}[threads]\nmax_age = \"10h\"\nmax_idle = \"1h\"\n");
    let gateway = scene.gateway_with(&settings).await;
    for scope in ["/v1/users/alice", "/v1/users/alice/topics/news"] {
        let first = gateway.say(scope, "one").await;
        scene.database.age_threads(HOUR / 2).await;
        assert_eq!(id(&first), id(&gateway.say(scope, "two").await));
        scene.database.age_threads(HOUR).await;
        let idle = gateway.say(scope, "three").await;
        assert_ne!(id(&first), id(&idle), "the thread was idle for too long");
        for _ in 0..15 {
            scene.database.age_threads(HOUR * 2 / 3).await;
            gateway.say(scope, "still here").await;
        }
        assert_ne!(
            id(&idle),
            id(&gateway.say(scope, "last").await),
            "the thread is too old"
        );
    }
}

async fn janitor_archives_clears_and_erases(scene: Scene) {
    let settings = format!("{BY_HAND}[archive]\nkeep = \"10h\"\n");
    let gateway = scene.gateway_with(&settings).await;
    let scope = "/v1/users/alice/sessions/tab";
    let first = gateway.say(scope, "needle").await;
    gateway.say("/v1/users/bob", "stays").await;
    assert_eq!(planned(&gateway).await["threads"], json!([]));
    scene.database.age_threads(24 * HOUR).await;
    let plan = planned(&gateway).await;
    assert_eq!(plan["threads"].as_array().unwrap().len(), 1, "{plan:#}");
    assert_eq!(
        (&plan["threads"][0]["action"], &plan["dry_run"]),
        (&json!("archive"), &json!(true))
    );
    assert!(
        plan["threads"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("expired at")
    );
    assert_eq!(
        gateway.get(&format!("{scope}/thread")).await.ok()["lifecycle"],
        "current",
        "a dry run changes nothing"
    );

    let done = clean_up(&gateway).await;
    assert_eq!(
        (&done["expired"], &done["upstream_cleared"], &done["failed"]),
        (&json!(1), &json!(1), &json!(0))
    );
    let archived = gateway.get(&format!("{scope}/thread")).await.ok();
    assert_eq!(
        (&archived["lifecycle"], &archived["id"]),
        (&json!("archived"), &first["thread"]["id"])
    );
    assert_eq!(archived["upstream_thread_id"], Value::Null);
    assert_eq!(
        scene.simulator.holds_text("needle"),
        Vec::<String>::new(),
        "the upstream copy is gone"
    );
    assert!(!scene.simulator.holds_text("stays").is_empty());
    let said = gateway
        .get(&format!("{scope}/messages?order=asc"))
        .await
        .ok();
    assert_eq!(
        said["data"][0]["content"][0]["text"], "needle",
        "the archived thread can be read"
    );

    // The key's next message starts a fresh thread, which names the old one.
    let next = gateway.say(scope, "again").await;
    assert_eq!(next["thread"]["previous_thread"], first["thread"]["id"]);
    let before = gateway
        .get(&format!("/v1/threads/{}", id(&first)))
        .await
        .ok();
    assert_eq!(before["next_thread"], next["thread"]["id"]);

    scene.database.age_threads(10 * HOUR).await;
    assert_eq!(planned(&gateway).await["threads"][0]["action"], "erase");
    let done = clean_up(&gateway).await;
    assert_eq!(
        (&done["discarded"], &done["deleted"]),
        (&json!(1), &json!(1)),
        "{done:#}"
    );
    assert_eq!(
        gateway
            .get(&format!("/v1/threads/{}", id(&first)))
            .await
            .status,
        404
    );
    assert_eq!(scene.database.holding("needle").await, Vec::<String>::new());
    assert_eq!(
        gateway.say(scope, "and again").await["thread"]["id"],
        next["thread"]["id"]
    );
}

async fn changed_expiry_configuration_applies_to_existing_threads(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    gateway.say("/v1/users/alice", "one").await;
    drop(gateway);
    scene.database.age_threads(2 * HOUR).await;
    let settings = "[threads]\nmax_idle = \"1h\"\n[janitor]\ninterval = \"100ms\"\n";
    let gateway = scene.gateway_with(settings).await;
    gateway
        .until("/v1/users/alice/thread", |answer| {
            answer.body["lifecycle"] == "archived"
        })
        .await;
}

async fn undeletable_thread_does_not_block_janitor(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let settings =
        "[janitor]\ninterval = \"1h\"\nbatch_size = 1\nconcurrency = 1\ncalls_per_second = 10000\n";
    let gateway = scene.gateway_with(settings).await;
    for n in 0..5 {
        gateway
            .say(&format!("/v1/users/alice/sessions/{n}"), "hello")
            .await;
    }
    scene.database.age_threads(24 * HOUR).await;
    let delete = if scene.protocol == Protocol::Assistants {
        "delete_thread"
    } else {
        "delete_conversation"
    };
    // The upstream refuses for good, so a retry would not help.
    scene.fault(delete, "status=400", 1);
    let done = clean_up(&gateway).await;
    assert_eq!(
        (&done["expired"], &done["upstream_cleared"], &done["failed"]),
        (&json!(5), &json!(4), &json!(1))
    );
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM threads WHERE attempts = 1")
            .await,
        1
    );
    scene
        .database
        .execute("UPDATE threads SET due_at = archived_at WHERE attempts = 1")
        .await;
    assert_eq!(clean_up(&gateway).await["upstream_cleared"], 1);
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM threads WHERE attempts > 0")
            .await,
        0
    );
    assert_eq!(scene.upstream_threads(), Vec::<String>::new());
}

/// Leaves the run of an old thread active, since its upstream is silent, and uses a fresh thread
/// meanwhile.
async fn use_fresh_thread(gateway: &Gateway, scope: &str, old: &str) {
    let busy = json!({"content": "two [[sim: tokens=40 rate=10ms]]", "stream": true});
    let first = gateway
        .request(reqwest::Method::POST, &format!("{scope}/messages"))
        .json(&busy)
        .send();
    let mut first = crate::support::gateway::EventReader::new(first.await.unwrap());
    assert_eq!(first.next().await.unwrap().name, "run.started");
    let waits = gateway.say(scope, "three").await;
    assert_eq!(waits["run"]["status"], "completed", "{waits:#}");
    assert_ne!(id(&waits), old);
    first.rest().await;
    for strategy in ["reject", "enqueue", "interrupt", "merge"] {
        let body = json!({"content": "on", "multitask_strategy": strategy});
        let answer = gateway.post(&format!("{scope}/messages"), &body).await.ok();
        assert_eq!(
            (id(&answer), &answer["run"]["status"]),
            (id(&waits), &json!("completed")),
            "{strategy}"
        );
    }
}

async fn fresh_thread_ignores_run_of_expired_thread(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    let scope = "/v1/users/alice/sessions/tab";
    let mut old = gateway.stream(scope, "one [[sim: silent]]").await;
    let started = old.next().await.unwrap();
    let thread = started.data["thread_id"].as_str().unwrap().to_owned();
    scene.database.age_threads(24 * HOUR).await;
    let body = json!({"content": "at once", "multitask_strategy": "reject"});
    let answer = gateway.post(&format!("{scope}/messages"), &body).await.ok();
    assert_ne!(id(&answer), thread, "the fresh thread has no active run");
    use_fresh_thread(&gateway, scope, &thread).await;
    let run = format!("{scope}/runs/{}", started.data["run_id"].as_str().unwrap());
    assert_eq!(gateway.get(&run).await.ok()["run"]["status"], "in_progress");
    gateway
        .post(&format!("{run}/cancel"), &json!({}))
        .await
        .ok();
    assert_eq!(old.rest().await.pop().unwrap().name, "run.cancelled");
}

async fn fresh_thread_ignores_run_of_deleted_thread(scene: Scene) {
    // A chain gets no request before its run ends.
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene
        .gateway_with(&format!("{BY_HAND}[runs]\nsettle_timeout = \"1h\"\n"))
        .await;
    let scope = "/v1/users/alice/topics/news";
    let mut old = gateway.stream(scope, "one [[sim: silent_after=1]]").await;
    let started = old.next().await.unwrap();
    assert_eq!(
        old.next().await.unwrap().name,
        "message.delta",
        "the run is known upstream"
    );
    let thread = started.data["thread_id"].as_str().unwrap().to_owned();
    // The cancel at the upstream takes long.
    let on = if scene.protocol == Protocol::Assistants {
        "cancel_run"
    } else {
        "list_items"
    };
    scene.fault(on, "latency=1h", 1);
    let answer = gateway
        .delete_after(&format!("{scope}/thread"), "respond-async")
        .await;
    assert_eq!(answer.status, 202, "{:#}", answer.body);
    use_fresh_thread(&gateway, scope, &thread).await;
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    assert_eq!(
        scene.database.number(unfinished).await,
        1,
        "the old run has not ended"
    );
    gateway.kill();
}

/// The gate stops the janitor between its lease of a thread and the reschedule.
#[tokio::test(flavor = "multi_thread")]
async fn ttl_patched_while_janitor_works_is_kept() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let database = &scene.database;
    let gateway = scene
        .gateway_with(&format!("{BY_HAND}[threads]\nmax_idle = \"24h\"\n"))
        .await;
    gateway.say("/v1/users/alice", "hello").await;
    database
        .execute(
            "CREATE TABLE gate (); \
             CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM FROM gate; RETURN NULL; END $$; \
             CREATE TRIGGER pass BEFORE UPDATE OF last_failure ON threads \
             FOR EACH STATEMENT EXECUTE FUNCTION pass(); \
             UPDATE threads SET due_at = created_at",
        )
        .await;
    let gate = database.lock("gate").await;
    let look = gateway.post_in_background("/v1/admin/cleanup", &json!({}));
    let start = std::time::Instant::now();
    while database
        .number("SELECT count(*) FROM pg_locks WHERE NOT granted")
        .await
        == 0
    {
        assert!(
            start.elapsed() < PATIENCE,
            "the janitor did not take the thread in time"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let patched = gateway
        .patch("/v1/users/alice/thread", &json!({"ttl_ms": 60_000}))
        .await
        .ok();
    drop(gate);
    look.join_all().await;
    let due = database.due_at("alice").await.unwrap();
    let expires = patched["expires_at"]
        .as_str()
        .unwrap()
        .parse::<chrono::DateTime<chrono::Utc>>()
        .unwrap();
    assert!(
        (due - expires).num_milliseconds().abs() <= 1,
        "due at {due}, expires at {expires}"
    );
}
