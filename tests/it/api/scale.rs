//! A hundred thousand threads and a million messages: lists, reads, a message, and the janitor's
//! work on them. The rate must stay the same from the first to the last tenth of a phase. No
//! table may be read from end to end.
//!
//! The test prints times but does not judge them, since the machine may be busy; run it with
//! `--nocapture`. `THREADKEEPER_TEST_SCALE` is the size in percent. A run of the whole suite uses
//! a fifth.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use threadkeeper::store::Pruning;

use crate::support::gateway::{Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

/// The tables that grow.
const TABLES: [&str; 8] = [
    "threads",
    "messages",
    "runs",
    "run_events",
    "idempotency_keys",
    "upstream_orphans",
    "deletions",
    "deleted_threads",
];
/// The janitor works only on request, at full speed, and prunes nothing else.
const SETTINGS: &str = "[janitor]\ninterval = \"100h\"\ncalls_per_second = 1000000\n\
     [retention]\nruns = \"1000d\"\nevents = \"1000d\"\nreceipts = \"1000d\"\n\
     [runs]\nidempotency_ttl = \"1000d\"\n[replica]\nsession_ttl = \"1h\"\n";
/// Smallest `THREADKEEPER_TEST_SCALE` at which the planner uses indexes wherever it can. It is
/// the default.
const USUAL: i64 = 20;
const DAY: Duration = Duration::from_hours(24);
/// Age of the oldest thread, period in which all but today's threads were made, and period of
/// today's threads, in milliseconds.
const OLDEST: i64 = 60 * DAY_MS;
const SPAN: i64 = 58 * DAY_MS;
const TODAY: i64 = 20 * HOUR_MS;
const YEAR: i64 = 365 * DAY_MS;
const DAY_MS: i64 = 24 * HOUR_MS;
const HOUR_MS: i64 = 3_600_000;

#[tokio::test(flavor = "multi_thread")]
async fn large_postgres_database_needs_no_full_table_scans() {
    grows(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_sqlite_database_is_read_and_cleaned_up() {
    grows(Backend::Sqlite).await;
}

async fn grows(backend: Backend) {
    let scale = std::env::var("THREADKEEPER_TEST_SCALE");
    let threads = scale.map_or(USUAL, |percent| percent.parse::<i64>().unwrap()) * 1000;
    let scene = Scene::new(Protocol::Responses, backend).await;
    let began = Instant::now();
    load(&scene, threads).await;
    println!(
        "{backend:?}: {threads} threads, {} messages loaded in {:.1?}",
        threads * 10,
        began.elapsed()
    );
    tell_plans(&scene).await;
    let scanned = scans(&scene).await;
    prune(&scene).await;

    let mut gateway = scene.gateway_with(SETTINGS).await;
    lists(&gateway).await;
    reads(&gateway, threads).await;
    let said = Instant::now();
    gateway.say(&user(threads * 8 / 10), "and now?").await;
    println!("a message to one of them: {:.1?}", said.elapsed());
    first_look(&scene).await;
    clean_up(&gateway).await;
    gateway.terminate();
    assert!(gateway.exit().await.success());
    for line in gateway
        .logs()
        .iter()
        .filter(|line| line.contains("Query Text"))
    {
        println!("slow: {}", line.replace("\\n", "\n"));
    }

    println!("all phases took {:.1?}", began.elapsed());
    assert_eq!(
        scans(&scene).await,
        scanned,
        "tables that were read from end to end, and how often"
    );
}

/// Prints the rows per second of each tenth of the samples. A sample has rows and time.
fn tell(what: &str, samples: &[(usize, Duration)]) {
    let tenths = samples
        .chunks(samples.len().div_ceil(10).max(1))
        .map(|part| {
            let rows: usize = part.iter().map(|(rows, _)| rows).sum();
            let time: Duration = part.iter().map(|(_, time)| time).sum();
            format!(
                "{:.0}",
                f64::from(u32::try_from(rows).unwrap()) / time.as_secs_f64()
            )
        });
    let rows: usize = samples.iter().map(|(rows, _)| rows).sum();
    let time: Duration = samples.iter().map(|(_, time)| time).sum();
    println!(
        "{what}: {rows} rows in {time:.1?}; a second: {}",
        tenths.collect::<Vec<_>>().join(" ")
    );
}

/// Returns the sequential scans of each table so far. SQLite does not count them.
async fn scans(scene: &Scene) -> Vec<String> {
    if scene.backend == Backend::Sqlite {
        return Vec::new();
    }
    let tables = TABLES.map(|table| format!("'{table}'")).join(", ");
    let counts = format!(
        "SELECT relname || ' ' || seq_scan FROM pg_stat_user_tables WHERE relname IN ({tables}) ORDER BY relname"
    );
    scene.database.texts(&counts).await
}

/// Lets Postgres log the plans of slow statements, if the role may do that.
async fn tell_plans(scene: &Scene) {
    if scene.backend == Backend::Postgres {
        let set = [
            "session_preload_libraries = auto_explain",
            "auto_explain.log_min_duration = 20",
            "auto_explain.log_level = notice",
        ];
        let set = set.map(|set| {
            format!("EXECUTE format('ALTER DATABASE %I SET {set}', current_database());")
        });
        let set = format!("LOAD 'auto_explain'; DO $$ BEGIN {} END $$", set.concat());
        drop(scene.database.try_execute(&set).await);
    }
}

/// Returns the path of the conversation of the `k`-th thread's user.
fn user(k: i64) -> String {
    format!("/v1/users/user-{k}")
}

/// Prunes all old rows, kind by kind, a thousand rows at a time.
async fn prune(scene: &Scene) {
    let (old, storing) = (Some(20 * DAY), vec!["simulated".to_owned()]);
    let none = Pruning {
        storing,
        ..Pruning::default()
    };
    let store = scene.database.store().await;
    for (what, pruning) in [
        (
            "events",
            Pruning {
                events: old,
                ..none.clone()
            },
        ),
        (
            "keys",
            Pruning {
                idempotency_keys: old,
                ..none.clone()
            },
        ),
        (
            "runs",
            Pruning {
                runs: old,
                ..none.clone()
            },
        ),
        (
            "receipts",
            Pruning {
                receipts: old,
                ..none.clone()
            },
        ),
    ] {
        let mut samples = Vec::new();
        loop {
            let began = Instant::now();
            let pruned = store.prune(&pruning, 1000).await.unwrap();
            let rows = pruned.runs + pruned.events + pruned.idempotency_keys + pruned.receipts;
            if rows == 0 {
                break;
            }
            samples.push((usize::try_from(rows).unwrap(), began.elapsed()));
        }
        tell(&format!("pruned, {what}"), &samples);
    }
    store.close().await;
}

async fn get(gateway: &Gateway, path: &str) -> (Value, Duration) {
    let began = Instant::now();
    let body = gateway.get(path).await.ok();
    (body, began.elapsed())
}

/// Reads lists of threads, each up to a number of pages.
async fn lists(gateway: &Gateway) {
    for (filter, most) in [
        ("order=asc", 100),
        ("order=desc", 100),
        ("user=user-7", 10),
        ("upstream=simulated", 20),
        ("upstream=another", 10),
        ("lifecycle=current", 20),
        ("lifecycle=archived", 20),
        ("lifecycle=deleting", 20),
        ("state=idle", 20),
        ("state=requires_action", 10),
        ("created_before=2020-01-01T00:00:00Z", 10),
        ("inactive_since=2020-01-01T00:00:00Z", 10),
        ("inactive_since=2100-01-01T00:00:00Z", 20),
        (
            "lifecycle=archived&state=idle&order=asc&created_before=2100-01-01T00:00:00Z",
            20,
        ),
    ] {
        let mut samples = Vec::new();
        let mut after = String::new();
        for _ in 0..most {
            let (page, time) =
                get(gateway, &format!("/v1/threads?limit=100&{filter}{after}")).await;
            samples.push((page["data"].as_array().unwrap().len(), time));
            if page["has_more"] == false {
                break;
            }
            after = format!("&after={}", page["last_id"].as_str().unwrap());
        }
        tell(&format!("listed, {filter}"), &samples);
    }
}

/// Reads users and conversations, spread over all of them.
async fn reads(gateway: &Gateway, threads: i64) {
    let (mut of_users, mut reports, mut messages) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..200 {
        let k = threads * 7 / 10 + n * (threads / 1000);
        let (page, time) = get(gateway, &format!("{}/threads", user(k % (threads / 5)))).await;
        of_users.push((page["data"].as_array().unwrap().len(), time));
        let (report, time) = get(gateway, &format!("{}/thread", user(k))).await;
        assert_eq!(report["message_count"], 10);
        reports.push((1, time));
        let (page, time) = get(gateway, &format!("{}/messages?archived=true", user(k))).await;
        messages.push((page["data"].as_array().unwrap().len(), time));
    }
    tell("threads of users", &of_users);
    tell("statistics", &reports);
    tell("messages with archived ones", &messages);
}

/// Waits until the janitor has looked through all threads after its start, and at the one that is
/// due. Then makes all work due.
async fn first_look(scene: &Scene) {
    let began = Instant::now();
    let canary = "SELECT count(*) FROM threads WHERE tenant = 'default' AND user_key = 'canary' AND lifecycle = 'current'";
    while scene.database.number(canary).await > 0 {
        assert!(
            began.elapsed() < PATIENCE,
            "the janitor looks at the thread in time"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("looked through all threads {:.1?} later", began.elapsed());
    let (now, ms) = match scene.backend {
        Backend::Postgres => ("now()", "interval '1 millisecond'"),
        Backend::Sqlite => ("CAST(unixepoch('subsec') * 1000 AS INTEGER)", "1"),
    };
    let plan = if scene.backend == Backend::Postgres {
        "SET enable_seqscan = off;"
    } else {
        ""
    };
    let (back, late) = ((101 * DAY).as_millis(), (90 * DAY).as_millis());
    let flip = format!(
        "{plan} UPDATE threads SET max_age_ms = NULL, due_at = due_at - {back} * {ms} WHERE due_at > {now} + {late} * {ms}"
    );
    scene.database.execute(&flip).await;
}

async fn clean_up(gateway: &Gateway) {
    for n in 0..3 {
        let (outlook, time) = post(gateway, "dry_run=true&limit=1000").await;
        assert_eq!(outlook["threads"].as_array().unwrap().len(), 1000);
        println!("a dry run, {n}: {time:.1?}");
    }
    let mut samples = Vec::new();
    let mut all = [0; 4];
    for _ in 0..20 {
        let (tally, time) = post(gateway, "limit=100").await;
        assert_eq!(tally["failed"], 0, "{tally:#}");
        let done = ["expired", "upstream_cleared", "discarded", "deleted"]
            .map(|what| tally[what].as_u64().unwrap());
        samples.push((usize::try_from(done.iter().sum::<u64>()).unwrap(), time));
        all = [0, 1, 2, 3].map(|n| all[n] + done[n]);
    }
    tell(
        &format!("cleaned up, {all:?} expired, cleared, discarded, deleted"),
        &samples,
    );
    assert!(
        all.iter().all(|done| *done > 0),
        "some kind of work was never done"
    );
}

async fn post(gateway: &Gateway, query: &str) -> (Value, Duration) {
    let began = Instant::now();
    let request = gateway.request(Method::POST, &format!("/v1/admin/cleanup?{query}"));
    let body = gateway.send(request).await.ok();
    (body, began.elapsed())
}

/// Loads threads by age: archived ones past their retention, expired sessions, deletions under
/// way, archived ones, users' threads, and today's sessions. Each has ten messages and two runs
/// with their rows.
async fn load(scene: &Scene, threads: i64) {
    let pg = scene.backend == Backend::Postgres;
    // Ids sort by their first part, the milliseconds since 1970, like UUIDs of that time.
    let id = |ms: &str, n: &str| {
        if pg {
            format!("(lpad(to_hex({ms}), 12, '0') || '70008' || lpad(to_hex({n}), 15, '0'))::uuid")
        } else {
            format!("unhex(printf('%012x70008%015x', {ms}, {n}))")
        }
    };
    let at = |ms: &str| {
        if pg {
            format!("to_timestamp(({ms}) / 1000.0)")
        } else {
            ms.to_owned()
        }
    };
    let json = |text: &str| {
        if pg {
            format!("CAST('{text}' AS jsonb)")
        } else {
            format!("'{text}'")
        }
    };
    let [scope_kind, lifecycle, deletion, role] = enumerations(pg);
    let (prepare, now, series, hash) = beginnings(pg, threads);
    let said = json(
        r#"[{"type": "text", "text": "Something that somebody said, of a usual length, more or less."}]"#,
    );
    let sql = format!(
        "{prepare}
        CREATE TEMP TABLE plan AS
        SELECT k, created, now, {thread} AS id, CASE
                WHEN k * 100 < {threads} * 10 THEN 'past' WHEN k * 100 < {threads} * 60 THEN 'expired'
                WHEN k * 100 < {threads} * 61 THEN 'deleting' WHEN k * 100 < {threads} * 70 THEN 'archived'
                WHEN k * 100 < {threads} * 90 THEN 'user' ELSE 'session'
            END AS kind
        FROM (
            SELECT k, {now} AS now, {now} - CASE
                    WHEN k * 10 < {threads} * 9 THEN {OLDEST} - k * {SPAN} / ({threads} * 9 / 10)
                    ELSE {TODAY} - (k - {threads} * 9 / 10) * {TODAY} / ({threads} / 10)
                END AS created
            FROM ({series}) s
        ) p;
        CREATE TEMP TABLE places (p INTEGER);
        INSERT INTO places VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9), (10);
        BEGIN;
        INSERT INTO threads (
            id, tenant, user_key, scope_kind, scope_name, upstream, upstream_thread_id, lifecycle, message_count, run_count,
            last_position, created_at, last_active_at, archived_at, max_age_ms, due_at, deletion, upstream_cleanup
        )
        SELECT id, 'default', 'user-' || CASE kind WHEN 'user' THEN k ELSE k % ({threads} / 5) END,
            {scope_kind},
            CASE kind WHEN 'user' THEN '' ELSE 's' || k END,
            'simulated', CASE k % 10 WHEN 0 THEN 'conv_' || k END,
            {lifecycle},
            10, 2, 10, {created}, {active}, CASE WHEN kind IN ('past', 'archived') THEN {active} END,
            CASE kind WHEN 'expired' THEN {YEAR} END,
            CASE
                WHEN kind IN ('past', 'expired', 'deleting') OR (kind = 'archived' AND k % 2 = 0) THEN {soon}
                WHEN kind = 'archived' THEN {kept}
                WHEN kind = 'session' THEN {expires}
            END,
            {deletion},
            CASE WHEN kind = 'archived' AND k % 2 = 1 THEN {cleared} END
        FROM plan ORDER BY k;
        INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
        SELECT {message}, id, p, {role}, {said},
            CASE WHEN p > 8 THEN {second} WHEN p > 6 THEN {first} END, {said_at}
        FROM plan, places ORDER BY k, p;
        INSERT INTO runs (
            id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, upstream_run_id, created_at, started_at,
            finished_at, deadline_at
        )
        SELECT {run}, id, p, 'completed', 'enqueue', 'default', 1, 120000, CASE k % 100 WHEN 0 THEN 'resp_' || (k * 2 + p) END,
            {said_at}, {said_at}, {said_at}, {said_at}
        FROM plan, places WHERE p < 3 ORDER BY k, p;
        INSERT INTO run_events (run_id, first_offset, end_offset, events) SELECT {second}, 0, 0, {nothing} FROM plan ORDER BY k;
        INSERT INTO idempotency_keys (tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at)
        SELECT 'default', 'user-' || k, 'session', 's' || k, 'key-' || k, {second}, {hash}, {created}
        FROM plan WHERE k % 2 = 0 ORDER BY k;
        INSERT INTO upstream_orphans (id, thread_id, upstream, kind, upstream_id, due_at)
        SELECT {thread}, id, 'simulated', 'run', 'resp_given_up_' || k, CASE k % 100 WHEN 0 THEN {created} END
        FROM plan WHERE k % 5 = 0 ORDER BY k;
        INSERT INTO deletions (id, tenant, archive, requested_at, finished_at)
        SELECT {thread}, 'default', {no}, {created}, {created} FROM plan WHERE k % 5 = 0 ORDER BY k;
        INSERT INTO deleted_threads (deletion_id, thread_id, upstream, messages, runs, finished_at)
        SELECT {thread}, id, 'simulated', 10, 2, {created} FROM plan WHERE k % 5 = 0 ORDER BY k;
        INSERT INTO threads (
            id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, created_at, last_active_at, due_at
        )
        SELECT {canary}, 'default', 'canary', 'session', 's', 'simulated', 'current', {created}, {created}, {created}
        FROM plan WHERE k = 0;
        COMMIT;
        ANALYZE;",
        thread = id("created", "k"),
        message = id("created + p", "k * 10 + p"),
        run = id("created", "k * 2 + p"),
        first = id("created", "k * 2 + 1"),
        second = id("created", "k * 2 + 2"),
        canary = id("created", "1000000000"),
        created = at("created"),
        active = at(&format!("created + CASE kind WHEN 'session' THEN 60000 ELSE {HOUR_MS} END")),
        said_at = at("created + p"),
        kept = at(&format!("created + {}", HOUR_MS + 30 * DAY_MS)),
        expires = at(&format!("created + {DAY_MS}")),
        // The due times are not in the order of the threads. They lie in the future, and are
        // moved back by as much later.
        soon = at(&format!("now + {} + (k * 7919) % 3000000", 100 * DAY_MS)),
        cleared = json(r#"{"outcome": "deleted"}"#),
        nothing = json("[]"),
        no = if pg { "false" } else { "0" },
    );
    scene.database.execute(&sql).await;
}

/// SQL for a thread's scope, its lifecycle, its deletion, and a message's role. In Postgres these
/// are enumeration types.
fn enumerations(pg: bool) -> [String; 4] {
    [
        (
            "scope_kind",
            "kind WHEN 'user' THEN 'user' WHEN 'past' THEN 'topic' WHEN 'archived' THEN 'topic' ELSE 'session'",
        ),
        (
            "thread_lifecycle",
            "kind WHEN 'past' THEN 'archived' WHEN 'archived' THEN kind WHEN 'deleting' THEN kind ELSE 'current'",
        ),
        ("thread_deletion", "kind WHEN 'deleting' THEN 'erase'"),
        ("message_role", "p % 2 WHEN 1 THEN 'user' ELSE 'assistant'"),
    ]
    .map(|(name, cases)| {
        if pg { format!("CAST(CASE {cases} END AS {name})") } else { format!("CASE {cases} END") }
    })
}

/// SQL that comes before the load, SQL for the present time, whole numbers from 0 on, and 32
/// bytes.
fn beginnings(pg: bool, threads: i64) -> (&'static str, &'static str, String, &'static str) {
    if pg {
        (
            // References are not checked, if the role may do that.
            "SELECT set_config('session_replication_role', 'replica', false)
            FROM pg_roles WHERE rolname = current_user AND rolsuper;",
            "CAST(extract(epoch FROM now()) * 1000 AS bigint)",
            format!("SELECT CAST(k AS bigint) AS k FROM generate_series(0, {threads} - 1) AS k"),
            "decode(repeat('00', 32), 'hex')",
        )
    } else {
        (
            "PRAGMA foreign_keys = off; PRAGMA synchronous = off; PRAGMA cache_size = -200000;",
            "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            format!(
                "WITH RECURSIVE s (k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM s WHERE k < {threads} - 1) SELECT k FROM s"
            ),
            "zeroblob(32)",
        )
    }
}
