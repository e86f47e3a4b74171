//! The query plans of Postgres. The store sends each statement, and the test reads its plan from
//! the server's log. The module `auto_explain`, which comes with the server, writes the plans.
//! Without it no connection can be made, and the test fails.
//!
//! A connection plans a statement once and keeps the plan. So the test plans the statements under
//! one state of the statistics, and judges the plans once the tables have other content.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use threadkeeper::config::StoreConfig;
use threadkeeper::domain::{
    Access, Deletion, HistoryKept, KeyId, KnownRefusal, Lifecycle, Lifetimes, Omitted, Rerun, Role,
    RunRecovery, ThreadState, Trial,
};
use threadkeeper::store::{
    Answered, DeletionTarget, Engine, ExternalMessage, Imported, ImportedMessage, Made, NewKey,
    Notification, Pruning, Rollover, RunProgress, Sent, ThreadUpdate, Withdrawal, Withdrawn,
    Withholding, functions_called_by, statements,
};

use super::deletion::{gone, request};
use super::*;
use crate::support::cluster::Cluster;

/// Most rows that one scan of a plan may read, including rows that it filters out.
const MOST: f64 = 40.0;
/// Tables with few rows, which may be read from end to end.
const SMALL: &[&str] = &[
    "replicas",
    "api_keys",
    "fingerprint_key",
    "schema_versions",
    "_sqlx_migrations",
];
/// Statements that read all runs of a thread. Each is sent once for a thread that is being
/// deleted.
const OF_A_WHOLE_THREAD: &[&str] = &["orphans.count_unacknowledged"];
/// Sizes of the tables when the plans are judged.
const UNFINISHED: i64 = 2000;
const HISTORY: i64 = 2000;
const ARCHIVED: i64 = 2000;
const LIMIT: u32 = 10;
const NO_LIMITS: Lifetimes = Lifetimes {
    sessions: Limits::NONE,
    others: Limits::NONE,
};

/// The statistics of the tables when the statements are planned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Statistics {
    /// No statistics, as in a new database or after a restore.
    Missing,
    OfEmptyTables,
    OfFewUnfinishedRuns,
    OfManyUnfinishedRuns,
}

/// Statements that the story does not send: those that run once or in another schema; and lists
/// of all active runs, whose number the replicas limit.
const NOT_TOLD: &[&str] = &[
    "api_keys.add_fingerprint_key",
    "schema.count_migrations",
    "schema.read_role",
    "threads.list_at_work_upwards",
    "threads.list_at_work_downwards",
];

/// Indexes that only enforce uniqueness.
const UPHOLDING: &[&str] = &[
    "api_keys_pkey",
    "fingerprint_key_pkey",
    "schema_versions_pkey",
    "_sqlx_migrations_pkey",
];

#[tokio::test]
async fn query_plans_read_bounded_rows_under_any_statistics() {
    let cluster = Cluster::start();
    let mut faults = BTreeSet::new();
    for known in [
        Statistics::Missing,
        Statistics::OfEmptyTables,
        Statistics::OfFewUnfinishedRuns,
        Statistics::OfManyUnfinishedRuns,
    ] {
        faults.extend(judged(&cluster, known).await);
    }
    assert!(
        faults.is_empty(),
        "{} faults\n{}",
        faults.len(),
        Vec::from_iter(faults).join("\n")
    );
}

/// `threadkeeper sql` prints statements without the types of their parameters, so the text alone
/// must determine them.
#[tokio::test]
async fn every_printed_statement_prepares_without_declared_types() {
    let database = TestDatabase::postgres().await;
    let mut faults = Vec::new();
    for Sent { name, sql, .. } in statements(Engine::Postgres) {
        if let Err(error) = database
            .try_execute(&format!("PREPARE pasted AS {sql}"))
            .await
        {
            faults.push(format!("{name}: {error}"));
        }
        for definition in functions_called_by(sql) {
            let function = definition.split(['(', ' ']).nth(2).unwrap();
            let anew = format!("DROP FUNCTION {function}; {definition}");
            if let Err(error) = database.try_execute(&anew).await {
                faults.push(format!("{function}: {error}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Returns the faults of the plans that were made with these statistics.
async fn judged(cluster: &Cluster, known: Statistics) -> Vec<String> {
    let database = TestDatabase::on(cluster).await;
    database
        .execute(
            "DO $$ BEGIN
                EXECUTE format('ALTER DATABASE %I SET session_preload_libraries = auto_explain', current_database());
                EXECUTE format('ALTER DATABASE %I SET auto_explain.log_min_duration = 0', current_database());
                EXECUTE format('ALTER DATABASE %I SET auto_explain.log_analyze = on', current_database());
                EXECUTE format('ALTER DATABASE %I SET auto_explain.log_timing = off', current_database());
                EXECUTE format('ALTER DATABASE %I SET auto_explain.log_format = json', current_database());
                EXECUTE format('ALTER DATABASE %I SET auto_explain.log_nested_statements = on', current_database());
            END $$",
        )
        .await;
    let key = user("alice");
    match known {
        Statistics::Missing => {}
        Statistics::OfEmptyTables => {
            database.execute("ANALYZE").await;
            // For empty tables all ways of reading cost the same, so the tables must take some
            // space.
            let store = database.store().await;
            story(&store, &user("first")).await;
            store.close().await;
        }
        Statistics::OfFewUnfinishedRuns => {
            fill(&database, &key, 0).await;
            database.execute("ANALYZE").await;
        }
        Statistics::OfManyUnfinishedRuns => {
            fill(&database, &key, UNFINISHED).await;
            database.execute("ANALYZE").await;
        }
    }
    // Each pool has one connection, so that the judged plans are those that were made before.
    let config = StoreConfig {
        max_connections: 2,
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let first = cluster.log().len();
    story(&store, &user("warm")).await;
    let planned = plans(&cluster.log()[first..]);
    match known {
        Statistics::Missing | Statistics::OfEmptyTables => fill(&database, &key, UNFINISHED).await,
        Statistics::OfFewUnfinishedRuns => unfinished(&database, UNFINISHED).await,
        Statistics::OfManyUnfinishedRuns => {}
    }
    let second = cluster.log().len();
    story(&store, &key).await;
    let judged = plans(&cluster.log()[second..]);
    store.close().await;
    assert!(
        judged.len() >= 100 && planned.len() >= 100,
        "the server logs no plans: {}",
        judged.len()
    );
    let told: BTreeSet<&str> = planned
        .iter()
        .chain(&judged)
        .filter_map(Plan::name)
        .collect();
    let all: Vec<&str> = statements(Engine::Postgres).map(|it| it.name).collect();
    let missing: Vec<_> = all
        .iter()
        .filter(|name| !told.contains(**name) && !NOT_TOLD.contains(name))
        .collect();
    assert!(missing.is_empty(), "the story does not send {missing:?}");
    let leading = leading(&database).await;
    let read: BTreeSet<String> = planned
        .iter()
        .chain(&judged)
        .flat_map(Plan::indexes)
        .collect();
    let unread: Vec<_> = leading
        .keys()
        .filter(|it| !read.contains(*it) && !UPHOLDING.contains(&it.as_str()))
        .collect();
    assert!(
        unread.is_empty(),
        "no statement uses the indexes {unread:?}"
    );
    let faults = planned
        .iter()
        .chain(&judged)
        .flat_map(|plan| faults(plan, &leading));
    faults.map(|fault| format!("{known:?}: {fault}")).collect()
}

/// Adds a thread of the key with a long history, archived threads of others, and unfinished runs
/// of live replicas.
async fn fill(database: &TestDatabase, key: &ConversationKey, unfinished_runs: i64) {
    let (tenant, user) = (key.tenant.as_str(), key.user.as_str());
    database
        .execute(&format!(
            "INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, message_count, \
             last_position, run_count, created_at, last_active_at) \
             VALUES (gen_random_uuid(), '{tenant}', '{user}', 'user', '', 'main', 'current', {HISTORY}, {HISTORY}, \
             {HISTORY}, now(), now()); \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, \
             started_at, finished_at, deadline_at, upstream_run_id) \
             SELECT gen_random_uuid(), id, n, 'completed', 'enqueue', 'default', 1, 1, now(), now(), now(), now(), 'r' \
             FROM threads, generate_series(1, {HISTORY}) n WHERE user_key = '{user}'; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_message_id, created_at) \
             SELECT gen_random_uuid(), thread_id, seq, 'assistant', '[]', id, 'm', now() FROM runs WHERE seq <= {HISTORY} \
             AND thread_id IN (SELECT id FROM threads WHERE user_key = '{user}'); \
             INSERT INTO run_events (run_id, first_offset, end_offset, events) SELECT id, 0, 0, '[]' FROM runs \
             WHERE thread_id IN (SELECT id FROM threads WHERE user_key = '{user}'); \
             INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, created_at, \
             last_active_at, archived_at, due_at) \
             SELECT gen_random_uuid(), 'large', 'u' || n, 'session', 's', 'main', 'archived', now(), now(), now(), \
             now() + interval '1 day' FROM generate_series(1, {ARCHIVED}) n"
        ))
        .await;
    if unfinished_runs > 0 {
        unfinished(database, unfinished_runs).await;
    }
}

async fn unfinished(database: &TestDatabase, number: i64) {
    database
        .execute(&format!(
            "INSERT INTO replicas (id, address, expires_at) \
             SELECT gen_random_uuid(), 'x', now() + interval '1 hour' FROM generate_series(1, 2); \
             INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, run_count, \
             created_at, last_active_at) \
             SELECT gen_random_uuid(), 'large', 'u' || n, 'user', '', 'main', 'current', 2, now(), now() \
             FROM generate_series(1, {number} / 2) n; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, queued_input, owner, fence, timeout_ms, \
             created_at, started_at, deadline_at) \
             SELECT gen_random_uuid(), t.id, n, (CASE n WHEN 1 THEN 'in_progress' ELSE 'queued' END)::run_status, 'enqueue', 'default', \
             CASE n WHEN 1 THEN NULL ELSE '[]'::jsonb END, p.id, 1, 3600000, now(), CASE n WHEN 1 THEN now() END, \
             CASE n WHEN 1 THEN now() + interval '1 hour' END \
             FROM threads t, generate_series(1, 2) n, \
             (SELECT id, row_number() OVER () AS place FROM replicas WHERE address = 'x') p \
             WHERE t.tenant = 'large' AND t.lifecycle = 'current' AND p.place = n"
        ))
        .await;
}

/// Sends all statements of a replica, about one key.
async fn story(store: &Store, key: &ConversationKey) {
    let me = ReplicaId::new();
    store
        .renew_replica(me, "127.0.0.1:1", Duration::from_hours(1))
        .await
        .unwrap();
    keys(store, key).await;
    turns(store, key, me).await;
    reads(store, key).await;
    lists(store, key).await;
    life(store, key, me).await;
    store.retire_replica(me).await.unwrap();
}

/// A run, and everything that may happen to it.
async fn turns(store: &Store, key: &ConversationKey, me: ReplicaId) {
    let with = |strategy| Admission {
        strategy,
        replica: me,
        ..admission(key)
    };
    let once = || Admission {
        idempotency: Some(idempotency("k")),
        ..with(MultitaskStrategy::Enqueue)
    };
    store
        .repeated(key, "k", Duration::from_hours(1))
        .await
        .unwrap();
    let turn = started(store.admit(once()).await.unwrap());
    assert_eq!(store.admit(once()).await.unwrap(), Admitted::Repeated);
    let reject = Admission {
        idempotency: Some(idempotency("new")),
        ..with(MultitaskStrategy::Reject)
    };
    assert_eq!(store.admit(reject.clone()).await.unwrap(), Admitted::Busy);
    expiries(store, key).await;
    let (waiting, ..) = queued(store.admit(with(MultitaskStrategy::Merge)).await.unwrap());
    store.admit(with(MultitaskStrategy::Merge)).await.unwrap();
    let (first, ..) = queued(
        store
            .admit(with(MultitaskStrategy::Interrupt))
            .await
            .unwrap(),
    );
    assert_eq!(
        store.start_queued(&waiting).await.unwrap(),
        QueuedStart::NotYet
    );
    let intent = OrphanId::new();
    assert!(store.intend(&turn.lease, intent).await.unwrap());
    let id = UpstreamThreadId("c".to_owned());
    let binding = Binding {
        id: id.clone(),
        intent,
        seeded: false,
        carried_users: 0,
    };
    assert!(store.makes_upstream_thread(turn.thread.id).await.unwrap());
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, binding.clone())
            .await
            .unwrap(),
        Bound::Done
    );
    assert_eq!(
        store
            .bind_upstream_thread(&first, binding.clone())
            .await
            .unwrap(),
        Bound::Lost
    );
    for made in [Made::Nothing, Made::Unused(&id), Made::Unknown] {
        store.resolve(OrphanId::new(), made).await.unwrap();
    }
    let refused = with(MultitaskStrategy::Enqueue);
    let (taken_back, ..) = queued(store.admit(refused.clone()).await.unwrap());
    store.admit(with(MultitaskStrategy::Merge)).await.unwrap();
    let withdrawal = Withdrawal {
        message: refused.message.id,
        idempotency_key: Some("other".to_owned()),
        end: RunEnd {
            discard: true,
            status: RunStatus::Failed,
            ..completed(None)
        },
    };
    let shared = store.withdraw(&taken_back, &withdrawal).await.unwrap();
    assert!(matches!(shared, Withdrawn::Shared { .. }), "{shared:?}");
    closed(
        store
            .finish(&taken_back, withdrawal.end.clone())
            .await
            .unwrap(),
    );
    let shown = EventBatch {
        first: 0,
        events: vec![LoggedEvent::Started],
    };
    let upstream_run_id = Some(UpstreamRunId("resp".to_owned()));
    let progress = RunProgress {
        lease: turn.lease,
        upstream_run_id,
        events: shown,
    };
    assert_eq!(store.record(&[progress]).await.unwrap(), [turn.run.id]);
    assert!(store.begins_again(&turn.lease, None).await.unwrap());
    assert!(store.sends_again(&turn.lease).await.unwrap());
    store
        .pause(&turn.lease, &pause(&["call_1"], 1))
        .await
        .unwrap();
    store
        .pause(&turn.lease, &pause(&["call_1"], 1))
        .await
        .unwrap();
    store
        .answer_tools(key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    let again = ToolAnswer {
        idempotency: Some(idempotency("k")),
        ..answer(&["call_1"])
    };
    assert_eq!(
        store.answer_tools(key, turn.run.id, &again).await.unwrap(),
        Answered::Repeated
    );
    assert_eq!(store.requests(me).await.unwrap().len(), 1);
    assert!(store.sends_outputs(&turn.lease).await.unwrap());
    assert_eq!(store.runs_taken_over(me, &[turn.run.id]).await.unwrap(), []);
    store
        .request_cancel(key, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    store.cancel_active(&first, true).await.unwrap().unwrap();
    store.cancel_active(&first, true).await.unwrap().unwrap();
    assert_eq!(
        store.finish(&turn.lease, completed(None)).await.unwrap(),
        Closing::MustDiscard
    );
    let discarded = RunEnd {
        discard: true,
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    closed(store.finish(&turn.lease, discarded.clone()).await.unwrap());
    closed(store.finish(&turn.lease, discarded.clone()).await.unwrap());
    started_from_queue(store.start_queued(&first).await.unwrap());
    started_from_queue(store.start_queued(&first).await.unwrap());
    store
        .unsynced_messages(first.run_id, None, LIMIT)
        .await
        .unwrap();
    store.earlier(first.run_id, None, LIMIT).await.unwrap();
    let some = Withholding {
        before: Some(1),
        missing_only: false,
        carried: Some(1),
    };
    assert!(store.withhold_earlier(&first, &some).await.unwrap());
    let trial = OrphanId::new();
    assert!(store.intend(&first, trial).await.unwrap());
    let recovery = RunRecovery {
        recovery: None,
        answered: false,
        trial: Some(Trial {
            thread: UpstreamThreadId("trial".to_owned()),
            orphan: trial,
            users: 1,
            carried_users: 0,
        }),
        omitted: Omitted::default(),
    };
    assert_eq!(
        store.record_recovery(&first, &recovery).await.unwrap(),
        Bound::Done
    );
    assert_eq!(
        store.record_recovery(&turn.lease, &recovery).await.unwrap(),
        Bound::Lost
    );
    store.resolve(trial, Made::Nothing).await.unwrap();
    let refusal = KnownRefusal {
        status: 400,
        code: None,
        cure: HistoryKept::All,
    };
    assert!(store.record_refusal(&first, &refusal).await.unwrap());
    assert!(store.last_refusal(turn.thread.id).await.unwrap().is_some());
    assert!(
        store
            .record_settlement(&first, turn.run.id, UpstreamSync::Missing)
            .await
            .unwrap()
    );
    assert!(store.took_along(&first, first.run_id).await.unwrap());
    assert!(
        store
            .record_settlement(&first, first.run_id, UpstreamSync::Missing)
            .await
            .unwrap()
    );
    let end = RunEnd {
        synced: true,
        said: UpstreamSync::Missing,
        ..completed(Some("hi"))
    };
    closed(store.finish(&first, end.clone()).await.unwrap());
    store.release(&[waiting]).await.unwrap();
    let orphans = store.adopt_orphans(me, &[], LIMIT).await.unwrap();
    assert_eq!(
        orphans
            .iter()
            .map(|orphan| orphan.run.id)
            .collect::<Vec<_>>(),
        [waiting.run_id]
    );
    let waiting = store
        .take_queued(me, waiting.run_id)
        .await
        .unwrap()
        .unwrap();
    started_from_queue(store.start_queued(&waiting).await.unwrap());
    store.release(&[waiting]).await.unwrap();
    let orphans = store.adopt_orphans(me, &[], LIMIT).await.unwrap();
    closed(
        store
            .finish(&orphans[0].lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let again = Admission {
        again: true,
        ..with(MultitaskStrategy::Enqueue)
    };
    let (lease, ..) = queued(store.admit(again).await.unwrap());
    started_from_queue(store.start_queued(&lease).await.unwrap());
    let taken = started_from_queue(store.take_last_messages(&lease).await.unwrap());
    assert_eq!(taken.run.rerun, Some(Rerun::Answered));
    store.withhold_replaced(&lease).await.unwrap();
    closed(store.finish(&lease, completed(Some("ho"))).await.unwrap());
}

/// API keys, and checks of the schema.
async fn keys(store: &Store, key: &ConversationKey) {
    store.ready().await.unwrap();
    let new = NewKey {
        id: KeyId::new(),
        prefix: format!("tk_{}", key.user.as_str()),
        hash: [1; 32],
        tenant: key.tenant.clone(),
        access: Access::Chat,
        label: "x".to_owned(),
    };
    store.add_key(&new).await.unwrap();
    store.keys(None).await.unwrap();
    store.good_keys().await.unwrap();
    store.revoke_key(&new.prefix).await.unwrap().unwrap();
    store.fingerprint_key([1; 32]).await.unwrap();
    store
        .notify_replicas(&[Notification::Orphans])
        .await
        .unwrap();
}

/// An expired thread is replaced.
async fn expiries(store: &Store, key: &ConversationKey) {
    let key = session("expires", key.user.as_str());
    let admission = Admission {
        limits: limits(Duration::ZERO),
        ..admission(&key)
    };
    let turn = started(store.admit(admission.clone()).await.unwrap());
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    let again = Admission {
        limits: limits(Duration::ZERO),
        ..super::admission(&key)
    };
    let turn = started(store.admit(again.clone()).await.unwrap());
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
}

async fn reads(store: &Store, key: &ConversationKey) {
    let turn = started(store.admit(admission(key)).await.unwrap());
    store.admit(admission(key)).await.unwrap();
    store.baseline(turn.run.id).await.unwrap();
    store.events(turn.run.id, 0).await.unwrap();
    assert_eq!(store.unfinished(key).await.unwrap().unwrap().len(), 2);
    store.run(key, turn.run.id).await.unwrap().unwrap();
    store
        .report(ThreadName::Newest(key))
        .await
        .unwrap()
        .unwrap();
    store
        .report(ThreadName::Id(&key.tenant, turn.thread.id))
        .await
        .unwrap()
        .unwrap();
    store.thread(turn.thread.id).await.unwrap().unwrap();
    store
        .runs_of(&[turn.thread.id], (turn.thread.id, 0), LIMIT)
        .await
        .unwrap();
    store
        .transcripts(&[turn.thread.id], (turn.thread.id, 0), LIMIT)
        .await
        .unwrap();
    store.transcript(turn.thread.id, 0, LIMIT).await.unwrap();
    for ascending in [true, false] {
        let page = PageRequest {
            limit: LIMIT,
            ascending,
            ..first_page()
        };
        store.runs(key, &page).await.unwrap();
        for across in [true, false] {
            let page = PageRequest {
                limit: LIMIT,
                ascending,
                ..first_page()
            };
            store
                .messages(ThreadName::Newest(key), across, &page)
                .await
                .unwrap();
            store
                .messages(ThreadName::Id(&key.tenant, turn.thread.id), across, &page)
                .await
                .unwrap();
        }
    }
    store
        .update_thread(key, &ThreadUpdate::default())
        .await
        .unwrap()
        .unwrap();
}

/// Lists of a tenant with few threads beside a tenant with many. Lists of active threads read all
/// active runs, whose number the replicas limit.
async fn lists(store: &Store, key: &ConversationKey) {
    let all = ThreadFilter {
        tenant: key.tenant.clone(),
        ..every_thread()
    };
    let soon = "2100-01-01T00:00:00Z".parse().unwrap();
    let mut filters = vec![
        ThreadFilter {
            user: Some(key.user.clone()),
            ..all.clone()
        },
        ThreadFilter {
            upstream: Some("main".to_owned()),
            ..all.clone()
        },
        ThreadFilter {
            created_before: Some(soon),
            ..all.clone()
        },
        ThreadFilter {
            inactive_since: Some(soon),
            ..all.clone()
        },
        ThreadFilter {
            state: Some(ThreadState::Idle),
            ..all.clone()
        },
    ];
    for lifecycle in [Lifecycle::Current, Lifecycle::Archived, Lifecycle::Deleting] {
        filters.push(ThreadFilter {
            lifecycle: Some(lifecycle),
            ..all.clone()
        });
    }
    filters.push(all);
    for filter in &filters {
        for ascending in [true, false] {
            let page = PageRequest {
                limit: LIMIT,
                ascending,
                ..first_page()
            };
            let found = store.threads(filter, &page).await.unwrap();
            if let Some((thread, _)) = found.data.last() {
                let page = PageRequest {
                    after: Some(thread.id),
                    ..page
                };
                store.threads(filter, &page).await.unwrap();
            }
        }
    }
}

/// Work of the janitor, rollovers, deletions and imports.
async fn life(store: &Store, key: &ConversationKey, me: ReplicaId) {
    let report = store
        .report(ThreadName::Newest(key))
        .await
        .unwrap()
        .unwrap();
    let thread = report.thread.id;
    assert_eq!(store.unfinished_of(thread).await.unwrap().len(), 2);
    let orphans = store.adopt_orphans(me, &[], LIMIT).await.unwrap();
    let [active, _] = &orphans[..] else {
        panic!("{orphans:?}")
    };
    let rollover = |thread, by| Rollover {
        thread,
        by,
        new_thread: ThreadId::new(),
        carry_over: 5,
        limits: Limits::NONE,
    };
    store.roll_over(&rollover(thread, None)).await.unwrap();
    let by_run = rollover(thread, Some(active.lease));
    store.roll_over(&by_run).await.unwrap();
    store.roll_over(&by_run).await.unwrap();
    store.carried(by_run.new_thread, None, LIMIT).await.unwrap();
    let external = ExternalMessage {
        id: MessageId::new(),
        after: 0,
        role: Role::User,
        content: text("x"),
        upstream_message_id: Some("x".to_owned()),
        created_at: None,
    };
    let inserted = store
        .insert_external_messages(by_run.new_thread, Some(active.lease), &[external])
        .await
        .unwrap();
    assert_eq!(inserted, 1);
    let message = ImportedMessage {
        id: MessageId::new(),
        role: Role::User,
        content: text("x"),
        upstream_message_id: None,
        sync: None,
        created_at: None,
    };
    let elsewhere = session("imported", key.user.as_str());
    let other = ImportedThread {
        upstream: "other".to_owned(),
        ..imported(&elsewhere)
    };
    let all = [&imported(&elsewhere), &other];
    let [Imported::Added(added), Imported::Taken(_)] =
        store.import_threads(&all).await.unwrap()[..]
    else {
        panic!("one thread is added, and the other id is taken")
    };
    store
        .threads_of(&elsewhere.tenant, &BTreeSet::from([added]))
        .await
        .unwrap();
    let archive = request(DeletionTarget::Key(elsewhere.clone()), Deletion::Archive);
    assert_eq!(store.begin_deletion(&archive, LIMIT).await.unwrap(), 1);
    store.removed(added, &gone(), &[]).await.unwrap();
    assert!(store.conclude(added, LIMIT).await.unwrap());
    assert_eq!(
        import_messages(store, by_run.new_thread, &[message]).await,
        1
    );
    store.expire(by_run.new_thread, Limits::NONE).await.unwrap();
    store
        .apply_changed_limits(None, LIMIT, &NO_LIMITS)
        .await
        .unwrap();
    store.due_threads(LIMIT).await.unwrap();
    store
        .lease_due_threads(LIMIT, Duration::ZERO)
        .await
        .unwrap();
    store.reschedule(thread, None, None, None).await.unwrap();
    store.upstream_orphans(thread, true, LIMIT).await.unwrap();
    store.due_upstream_orphans(LIMIT).await.unwrap();
    store
        .lease_upstream_orphans(LIMIT, Duration::ZERO)
        .await
        .unwrap();
    store.unacknowledged_requests(thread).await.unwrap();
    for after in [None, Some(Duration::ZERO)] {
        store
            .reschedule_upstream_orphan(OrphanId::new(), None, after)
            .await
            .unwrap();
    }
    store
        .keep_upstream_orphan(OrphanId::new(), None)
        .await
        .unwrap();
    store
        .discard(thread, Duration::from_hours(1))
        .await
        .unwrap();
    store.discard(thread, Duration::ZERO).await.unwrap();
    let pruning = Pruning {
        runs: Some(Duration::ZERO),
        events: Some(Duration::ZERO),
        idempotency_keys: Some(Duration::ZERO),
        receipts: Some(Duration::ZERO),
        storing: vec!["main".to_owned()],
    };
    store.prunable(&pruning, LIMIT).await.unwrap();
    store.prune(&pruning, LIMIT).await.unwrap();
    for target in [
        DeletionTarget::Key(key.clone()),
        DeletionTarget::User(key.user.clone()),
    ] {
        store
            .deletable(&key.tenant, &target, Deletion::Erase)
            .await
            .unwrap();
    }
    let erase = request(DeletionTarget::User(key.user.clone()), Deletion::Erase);
    assert_eq!(store.begin_deletion(&erase, LIMIT).await.unwrap(), 2);
    store
        .deletion_under_way(&key.tenant, &erase.target)
        .await
        .unwrap()
        .unwrap();
    for orphan in store.adopt_orphans(me, &[], LIMIT).await.unwrap() {
        let ended = RunEnd {
            status: RunStatus::Cancelled,
            ..completed(None)
        };
        closed(store.finish(&orphan.lease, ended.clone()).await.unwrap());
    }
    for thread in [thread, by_run.new_thread] {
        store.removed(thread, &gone(), &[]).await.unwrap();
        store.conclude(thread, LIMIT).await.unwrap();
    }
    store
        .deletion(&key.tenant, erase.id, None, LIMIT)
        .await
        .unwrap()
        .unwrap();
}

/// A statement and its plan.
struct Plan {
    text: String,
    root: Value,
}

impl Plan {
    /// The name of the statement, if it belongs to the store.
    fn name(&self) -> Option<&str> {
        self.text
            .strip_prefix("/* ")?
            .split_once(" */")
            .map(|(name, _)| name)
    }

    /// The indexes that the plan reads.
    fn indexes(&self) -> Vec<String> {
        let (mut found, mut nodes) = (Vec::new(), vec![&self.root]);
        while let Some(node) = nodes.pop() {
            nodes.extend(node["Plans"].as_array().into_iter().flatten());
            found.extend(node["Index Name"].as_str().map(str::to_owned));
        }
        found
    }
}

/// Parses the plans in a part of the server's log.
fn plans(log: &str) -> Vec<Plan> {
    let mut plans = Vec::new();
    let mut lines = log.lines().peekable();
    while let Some(line) = lines.next() {
        if !(line.contains("LOG:  duration:") && line.ends_with("plan:")) {
            continue;
        }
        let mut json = String::new();
        while let Some(line) = lines.next_if(|line| line.starts_with('\t')) {
            json.push_str(line);
        }
        let told: Value = serde_json::from_str(&json).expect("a plan is JSON");
        let text = told["Query Text"]
            .as_str()
            .expect("a plan has the text of its statement")
            .to_owned();
        plans.push(Plan {
            text,
            root: told["Plan"].clone(),
        });
    }
    plans
}

/// Returns the first column of each index.
async fn leading(database: &TestDatabase) -> BTreeMap<String, String> {
    let columns = "SELECT i.relname || ' ' || a.attname FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid \
                   JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0] \
                   WHERE i.relnamespace = 'public'::regnamespace";
    let columns = database.texts(columns).await;
    columns
        .iter()
        .map(|text| text.split_once(' ').unwrap())
        .map(|(i, c)| (i.into(), c.into()))
        .collect()
}

/// Returns what a plan does that it must not.
fn faults(plan: &Plan, leading: &BTreeMap<String, String>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut nodes = vec![&plan.root];
    while let Some(node) = nodes.pop() {
        nodes.extend(node["Plans"].as_array().into_iter().flatten());
        let text = |name: &str| node[name].as_str().unwrap_or_default();
        let number = |name: &str| node[name].as_f64().unwrap_or(0.0);
        let (kind, table, index) = (text("Node Type"), text("Relation Name"), text("Index Name"));
        let is_ours = leading.contains_key(index) || leading.contains_key(&format!("{table}_pkey"));
        if !is_ours || SMALL.contains(&table) || !kind.contains("Scan") {
            continue;
        }
        let read = number("Actual Loops")
            * (number("Actual Rows")
                + number("Rows Removed by Filter")
                + number("Rows Removed by Index Recheck"));
        let what = if kind == "Seq Scan" {
            format!("reads {table} from end to end")
        } else if !index.is_empty()
            && !text("Index Cond").contains(&format!("({} ", leading[index]))
        {
            format!(
                "reads {index} from end to end ({} {})",
                text("Index Cond"),
                text("Filter")
            )
        } else if read > MOST
            && !plan
                .name()
                .is_some_and(|name| OF_A_WHOLE_THREAD.contains(&name))
        {
            format!(
                "reads {read} rows of {table} by {index} ({}; {})",
                text("Index Cond"),
                text("Filter")
            )
        } else {
            continue;
        };
        let statement = plan.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let tail = statement.len().saturating_sub(200);
        faults.push(format!(
            "{what}, in: {:.60} … {}",
            statement,
            statement.get(tail..).unwrap_or_default()
        ));
    }
    faults
}

/// Tables that grow with use.
const GROWING: &[&str] = &[
    "threads",
    "runs",
    "messages",
    "run_events",
    "idempotency_keys",
    "upstream_orphans",
    "deletions",
    "deleted_threads",
];
/// Statements that read a whole index of unfinished runs. SQLite serves one process, so these are
/// only its own runs.
const OF_ALL_UNFINISHED: &[&str] = &[
    "replicas.find_orphans",
    "threads.list_at_work_upwards",
    "threads.list_at_work_downwards",
];

/// SQLite plans without the values of parameters, and uses statistics only after `ANALYZE`.
#[tokio::test]
async fn sqlite_plans_never_scan_growing_tables() {
    let database = TestDatabase::sqlite().await;
    let mut faults = BTreeSet::new();
    for filled in [false, true] {
        if filled {
            fill_sqlite(&database).await;
        }
        for analyzed in [false, true] {
            if analyzed {
                database.execute("ANALYZE").await;
            }
            for Sent {
                name, sql: script, ..
            } in statements(Engine::Sqlite)
            {
                for (statement, steps) in database.sqlite_plans(script).await {
                    for step in steps {
                        let is_fine =
                            !scans_what_grows(statement, &step) || OF_ALL_UNFINISHED.contains(name);
                        if !is_fine {
                            faults.insert(format!("{name}: {step}"));
                        }
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", Vec::from_iter(faults).join("\n"));
}

/// Whether a step of a plan reads a growing table, which it names by its name or alias.
fn scans_what_grows(statement: &str, step: &str) -> bool {
    let Some(rest) = step.strip_prefix("SCAN ") else {
        return false;
    };
    let scanned = rest.split(' ').next().unwrap_or_default();
    let words: Vec<&str> = statement
        .split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|it| !it.is_empty())
        .collect();
    let stands_for = |table: &&str| {
        let named = |pair: &[&str]| pair[0] == *table && pair[1] == scanned;
        let named_as =
            |three: &[&str]| three[0] == *table && three[1] == "AS" && three[2] == scanned;
        *table == scanned || words.windows(2).any(named) || words.windows(3).any(named_as)
    };
    !rest.contains("VIRTUAL TABLE") && GROWING.iter().any(stands_for)
}

/// Adds many threads, each with two runs, some messages and their rows.
async fn fill_sqlite(database: &TestDatabase) {
    database
        .execute(&format!(
            "INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, created_at, \
             last_active_at, due_at, run_count, message_count, last_position) \
             WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {HISTORY}) \
             SELECT randomblob(16), 'default', 'u' || n, 'user', '', 'main', 'current', n, n, n, 2, 3, 3 FROM n; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, started_at, \
             finished_at, deadline_at) SELECT randomblob(16), t.id, s.value, 'completed', 'enqueue', 'default', 1, 1, 1, 1, 1, 1 \
             FROM threads t, json_each('[1, 2]') s; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at) \
             SELECT randomblob(16), thread_id, seq + 1, 'user', '[]', id, 1 FROM runs; \
             INSERT INTO messages (id, thread_id, position, role, content, upstream_sync, created_at) \
             SELECT randomblob(16), id, 1, 'user', '[]', CASE WHEN created_at % 2 THEN 'missing' ELSE 'present' END, 1 \
             FROM threads; \
             INSERT INTO run_events (run_id, first_offset, end_offset, events) SELECT id, 0, 1, '[]' FROM runs; \
             INSERT INTO idempotency_keys SELECT tenant, user_key, scope_kind, scope_name, 'k', r.id, x'00', 1 \
             FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.seq = 1; \
             INSERT INTO deletions (id, tenant, archive, requested_at, finished_at) \
             SELECT id, tenant, 0, 1, created_at FROM threads; \
             INSERT INTO deleted_threads (deletion_id, thread_id, upstream, messages, runs, finished_at) \
             SELECT id, id, 'main', 1, 1, 1 FROM threads; \
             INSERT INTO upstream_orphans (id, thread_id, upstream, kind, due_at) SELECT id, id, 'main', 'run', 1 FROM threads"
        ))
        .await;
}
