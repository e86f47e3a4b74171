//! A pooler that lends connections to the database by the transaction. `store.url` leads to the
//! pooler, `store.direct_url` to the database.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use threadkeeper::config::StoreConfig;
use threadkeeper::store::Store;

use crate::store_contract::check_invariants;
use crate::support::TestDatabase;
use crate::support::gateway::{Answer, Event, EventReader, Gateway, PATIENCE, text, text_of};
use crate::support::history::{all, assert_same, messages, transcript};
use crate::support::pooler::Pooler;
use crate::support::scene::{Backend, Protocol, Scene, on_shared_scene};

on_shared_scene!(
    messages_of_many_users_are_answered,
    busy_thread_honours_multitask_strategies,
    two_gateways_serve_conversation_in_order,
);

const SCOPE: &str = "/v1/users/alice";
const USERS: usize = 24;

async fn gateway(scene: &Scene, pooler: &Pooler) -> Gateway {
    let direct = scene.database.url();
    let ways = format!("[store]\nurl = {:?}\ndirect_url = {direct:?}\n", pooler.url);
    Gateway::start(
        &scene
            .config("")
            .replace(&format!("[store]\nurl = {direct:?}\n"), &ways),
    )
    .await
}

/// Sends a message with an idempotency key.
async fn say(gateway: &Gateway, user: usize, turn: &str) -> Answer {
    let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
    let request = request
        .header("idempotency-key", turn)
        .json(&json!({"content": format!("{turn} turn")}));
    gateway.send(request).await
}

/// Posts a message as a stream and reads its first event.
async fn begin(gateway: &Gateway, strategy: &str, content: &str) -> (EventReader, Event) {
    let body = json!({"content": content, "multitask_strategy": strategy, "stream": true});
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .json(&body);
    let mut stream = EventReader::new(request.send().await.unwrap());
    let first = stream.next().await.unwrap();
    (stream, first)
}

/// Checks the invariants of the database, and that no connection is left with an open transaction
/// or a session lock.
async fn assert_sound(scene: &Scene) {
    check_invariants(&scene.database).await;
    for left in [
        "SELECT count(*) FROM pg_stat_activity \
         WHERE datname = current_database() AND state LIKE 'idle in transaction%'",
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database \
         WHERE l.locktype = 'advisory' AND d.datname = current_database()",
    ] {
        let begun = Instant::now();
        // Background work of the gateway may be under way.
        while scene.database.number(left).await != 0 {
            assert!(begun.elapsed() < PATIENCE, "not 0: {left}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn messages_of_many_users_are_answered(scene: Scene) {
    scene
        .database
        .execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        .await;
    let pooler = Pooler::on(&scene.database.url()).await;
    let gateway = gateway(&scene, &pooler).await;
    let known = 0..USERS / 2;
    for answer in join_all(known.clone().map(|user| say(&gateway, user, "first"))).await {
        answer.ok();
    }
    let second: Vec<_> = join_all((0..USERS).map(|user| say(&gateway, user, "second"))).await;
    let second: Vec<Value> = second.into_iter().map(Answer::ok).collect();
    let again = join_all((0..USERS).map(|user| say(&gateway, user, "second"))).await;
    for (user, (second, again)) in second.iter().zip(again).enumerate() {
        assert_eq!(again.headers["idempotent-replayed"], "true");
        let again = again.ok();
        assert_eq!(
            (&again["run"], &again["message"]),
            (&second["run"], &second["message"])
        );
        let turn = if known.contains(&user) { 2 } else { 1 };
        assert!(
            text(&second["message"]).contains(&format!("turn {turn} of")),
            "user {user}: {second:#}"
        );
        let scope = format!("/v1/users/{user}");
        assert_eq!(messages(&gateway, &scope).await.len(), 2 * turn);
        assert_same(&scene, &gateway, &scope).await;
    }
    assert_sound(&scene).await;
}

/// Lists are planned each time, so their statements have no name. A pooler does not carry unnamed
/// statements to another connection.
#[tokio::test(flavor = "multi_thread")]
async fn thread_lists_are_complete() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let pooler = Pooler::on(&scene.database.url()).await;
    let gateway = gateway(&scene, &pooler).await;
    for answer in join_all((0..USERS).map(|user| say(&gateway, user, "first"))).await {
        answer.ok();
    }
    let filters = [
        "",
        "&lifecycle=current",
        "&lifecycle=archived",
        "&state=idle",
        "&user=7",
    ];
    let paths = filters.map(|filter| format!("/v1/threads?limit=100{filter}"));
    let wanted = [USERS, USERS, 0, USERS, 1];
    let lists = join_all((0..60).map(|n| gateway.get(&paths[n % paths.len()]))).await;
    for (n, list) in lists.into_iter().enumerate() {
        let (path, list) = (&paths[n % paths.len()], list.ok());
        assert_eq!(
            list["data"].as_array().unwrap().len(),
            wanted[n % paths.len()],
            "{path}"
        );
    }
    assert_sound(&scene).await;
}

async fn busy_thread_honours_multitask_strategies(scene: Scene) {
    let pooler = Pooler::on(&scene.database.url()).await;
    let gateway = gateway(&scene, &pooler).await;
    gateway.say(SCOPE, "hello").await;
    let (mut active, _) = begin(&gateway, "enqueue", "a long story [[sim: silent_after=3]]").await;
    active.until_text("said: a").await;
    let (waiting, queued) = begin(&gateway, "enqueue", "and I wait").await;
    assert_eq!(
        (queued.name.as_str(), &queued.data["position"]),
        ("run.queued", &json!(1))
    );
    let (joined, first) = begin(&gateway, "merge", "me too").await;
    assert_eq!(
        first.data["run_id"], queued.data["run_id"],
        "both callers get the run"
    );
    let (urgent, first) = begin(&gateway, "interrupt", "stop that").await;
    assert_eq!(
        (first.name.as_str(), &first.data["position"]),
        ("run.queued", &json!(1)),
        "the interrupting run is next"
    );
    assert_eq!(active.rest().await.last().unwrap().name, "run.cancelled");
    for (stream, wanted) in [
        (urgent, "stop that"),
        (waiting, "me too"),
        (joined, "me too"),
    ] {
        let events = stream.rest().await;
        assert_eq!(events.last().unwrap().name, "run.completed", "{events:#?}");
        assert!(text_of(&events).contains(wanted), "{events:#?}");
    }
    let said = transcript(&gateway, SCOPE).await;
    let users: Vec<_> = said
        .iter()
        .filter(|(role, _)| role == "user")
        .map(|(_, text)| text)
        .collect();
    assert_eq!(users[2..], ["stop that", "and I wait", "me too"]);
    assert_same(&scene, &gateway, SCOPE).await;
    let receipt = gateway.delete(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(receipt["status"], "completed", "{receipt:#}");
    assert_eq!(
        scene.database.holding("long story").await,
        Vec::<String>::new()
    );
    assert_eq!(
        scene.simulator.holds_text("long story"),
        Vec::<String>::new()
    );
    assert_sound(&scene).await;
}

async fn two_gateways_serve_conversation_in_order(scene: Scene) {
    const TURNS: usize = 12;
    let pooler = Pooler::on(&scene.database.url()).await;
    let gateways = [
        gateway(&scene, &pooler).await,
        gateway(&scene, &pooler).await,
    ];
    scene.simulator.hold();
    let mut streams = Vec::new();
    for n in 0..TURNS {
        let mut stream = gateways[n % 2].stream(SCOPE, &format!("message {n}")).await;
        let first = stream.next().await.unwrap();
        assert_eq!(
            first.data["position"].as_u64(),
            (n > 0).then_some(n as u64),
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
    let runs = all(&gateways[0], &format!("{SCOPE}/runs")).await;
    assert_eq!(runs.len(), TURNS);
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
    for gateway in &gateways {
        assert_same(&scene, gateway, SCOPE).await;
    }
    assert_sound(&scene).await;
}

/// Connects to the pooler without the startup parameter that it refuses.
async fn client(pooler: &Pooler) -> PgConnection {
    let options: PgConnectOptions = pooler.url.parse().unwrap();
    options.extra_float_digits(None).connect().await.unwrap()
}

async fn backend(connection: &mut PgConnection) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(connection)
        .await
        .unwrap()
}

/// The test's pooler lends by the transaction: a gateway that works with it works with such
/// poolers.
#[tokio::test]
async fn pooler_keeps_only_named_statements_across_transactions() {
    let database = TestDatabase::postgres().await;
    let pooler = Pooler::on(&database.url()).await;
    let mut one = client(&pooler).await;
    // A setting stays with the server's connection on which it was made.
    one.execute("SET statement_timeout = '4321s'")
        .await
        .unwrap();
    let mut shown = Vec::new();
    for _ in 0..6 {
        let setting: String = sqlx::query_scalar("SHOW statement_timeout")
            .fetch_one(&mut one)
            .await
            .unwrap();
        shown.push(setting);
    }
    assert!(
        shown.iter().any(|setting| setting == "4321s")
            && shown.iter().any(|setting| setting == "0")
    );
    // A named statement has the same name for all clients. The pooler prepares it on connections
    // that lack it.
    let mut other = client(&pooler).await;
    for n in 0..6 {
        for client in [&mut one, &mut other] {
            let twice: i32 = sqlx::query_scalar("SELECT 2 * $1::int")
                .bind(n)
                .fetch_one(client)
                .await
                .unwrap();
            assert_eq!(twice, 2 * n);
        }
    }
    // An unnamed statement stays on its connection.
    let unnamed = sqlx::query("SELECT 3 * $1::int").bind(1).persistent(false);
    let error = unnamed.execute(&mut one).await.unwrap_err();
    assert_eq!(
        error.as_database_error().unwrap().code().unwrap(),
        "26000",
        "{error}"
    );
    // After an error the client can use the connection again.
    let error = sqlx::query("SELECT 1 / $1::int")
        .bind(0)
        .execute(&mut one)
        .await
        .unwrap_err();
    assert_eq!(
        error.as_database_error().unwrap().code().unwrap(),
        "22012",
        "{error}"
    );
    one.ping().await.unwrap();

    let (first, next) = (backend(&mut one).await, backend(&mut one).await);
    assert_ne!(first, next, "the next statement gets another connection");
    let mut transaction = one.begin().await.unwrap();
    let kept = backend(&mut transaction).await;
    for _ in 0..3 {
        assert_eq!(
            backend(&mut transaction).await,
            kept,
            "a transaction keeps its connection"
        );
        assert_ne!(
            backend(&mut other).await,
            kept,
            "no other client gets that connection"
        );
    }
    // A client that leaves during a transaction loses the connection for all.
    drop(transaction);
    drop(one);
    let open = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {kept}");
    let begun = Instant::now();
    while database.number(&open).await != 0 {
        assert!(begun.elapsed() < PATIENCE, "the transaction stays open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_ne!(
        backend(&mut other).await,
        backend(&mut other).await,
        "a new connection replaces the lost one"
    );
}

#[tokio::test]
async fn pooler_without_direct_url_is_refused_with_hint() {
    let database = TestDatabase::postgres().await;
    let pooler = Pooler::on(&database.url()).await;
    let config = StoreConfig {
        url: Some(pooler.url.clone().into()),
        ..database.config()
    };
    let error = Store::open(&config).await.unwrap_err().to_string();
    assert!(
        error.contains("unsupported startup parameter: options"),
        "{error}"
    );
    assert!(error.contains("set store.direct_url"), "{error}");
}
