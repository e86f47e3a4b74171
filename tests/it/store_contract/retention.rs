//! Threads that the janitor is due to look at, expiry, and pruning.

use std::collections::BTreeSet;
use std::time::Duration;

use threadkeeper::domain::{
    Deletion, Lifecycle, Lifetimes, Limits, NewLife, OrphanId, Timestamp, Ttl,
};
use threadkeeper::store::{
    DeletionRequest, DeletionTarget, DueThread, Made, OrphanKind, OrphanName, Pruned, Pruning,
    ThreadName, ThreadUpdate,
};
use uuid::Uuid;

use super::deletion::request;
use super::*;

on_every_backend!(
    due_thread_is_leased_by_one_janitor,
    longest_due_threads_are_leased_first,
    stale_reschedule_keeps_newer_due_time,
    janitor_reschedule_keeps_ttl_set_meanwhile,
    deletion_begun_during_janitor_pass_keeps_its_hold,
    reschedule_without_lease_only_moves_due_time_earlier,
    janitor_failures_are_counted_until_success,
    changed_limits_set_due_time_to_expiry,
    only_expired_threads_are_archived,
    expired_thread_is_archived_and_its_runs_continue,
    archived_thread_is_discarded_after_retention,
    pruning_spares_recent_and_unfinished_runs,
    expired_records_are_pruned_in_batches,
    pruned_runs_leave_stored_responses_as_upstream_orphans,
);

pub(super) const HOUR: Duration = Duration::from_hours(1);

pub(super) fn is_postgres(database: &TestDatabase) -> bool {
    database.url().starts_with("postgres")
}

/// Returns an id as an SQL literal.
pub(super) fn id(database: &TestDatabase, id: Uuid) -> String {
    if is_postgres(database) {
        format!("'{id}'::uuid")
    } else {
        format!("x'{}'", id.simple())
    }
}

/// Moves the times in some columns back by `by`.
pub(super) async fn earlier(database: &TestDatabase, table: &str, columns: &[&str], by: Duration) {
    let ms = by.as_millis();
    let by = if is_postgres(database) {
        format!("{ms} * interval '1 millisecond'")
    } else {
        ms.to_string()
    };
    let set: Vec<_> = columns
        .iter()
        .map(|column| format!("{column} = {column} - {by}"))
        .collect();
    database
        .execute(&format!("UPDATE {table} SET {}", set.join(", ")))
        .await;
}

/// Moves all times of the runs back by `by`, and the times within their ids too.
async fn older_runs(database: &TestDatabase, by: Duration) {
    earlier(
        database,
        "runs",
        &["created_at", "started_at", "finished_at"],
        by,
    )
    .await;
    if is_postgres(database) {
        database
            .execute(&format!(
                "SET session_replication_role = replica; \
                 CREATE FUNCTION aged(old uuid) RETURNS uuid LANGUAGE sql AS $$ SELECT (lpad(to_hex( \
                 ('x' || lpad(substr(replace(old::text, '-', ''), 1, 12), 16, '0'))::bit(64)::bigint - {}), 12, '0') || \
                 substr(replace(old::text, '-', ''), 13))::uuid $$; \
                 UPDATE run_events SET run_id = aged(run_id); UPDATE messages SET run_id = aged(run_id); \
                 UPDATE idempotency_keys SET run_id = aged(run_id); UPDATE runs SET id = aged(id); \
                 DROP FUNCTION aged",
                by.as_millis()
            ))
            .await;
    } else {
        for (table, column) in [
            ("run_events", "run_id"),
            ("messages", "run_id"),
            ("idempotency_keys", "run_id"),
            ("runs", "id"),
        ] {
            // The recursion reads hexadecimal digits, which SQLite has no function for.
            database
                .execute(&format!(
                    "PRAGMA foreign_keys = OFF; UPDATE {table} SET {column} = unhex(printf('%012x', ( \
                     WITH RECURSIVE d (n, v) AS (SELECT 1, 0 UNION ALL SELECT n + 1, v * 16 + \
                     instr('0123456789ABCDEF', substr(hex({column}), n, 1)) - 1 FROM d WHERE n <= 12) \
                     SELECT v FROM d WHERE n = 13) - {}) || substr(hex({column}), 13))",
                    by.as_millis()
                ))
                .await;
        }
    }
}

/// Returns a time of a thread's row in milliseconds; -1 for none.
pub(super) async fn time(database: &TestDatabase, column: &str, thread: ThreadId) -> i64 {
    let column = if is_postgres(database) {
        format!("(EXTRACT(epoch FROM {column}) * 1000)::bigint")
    } else {
        column.to_owned()
    };
    let thread = id(database, thread.uuid());
    database
        .number(&format!(
            "SELECT COALESCE({column}, -1) FROM threads WHERE id = {thread}"
        ))
        .await
}

async fn due_now(database: &TestDatabase) {
    database
        .execute("UPDATE threads SET due_at = last_active_at")
        .await;
}

fn ids(due: &[DueThread]) -> Vec<ThreadId> {
    due.iter().map(|due| due.thread.id).collect()
}

pub(super) async fn thread(store: &Store, id: ThreadId) -> Option<Thread> {
    let name = ThreadName::Id(&TenantKey::default(), id);
    store
        .report(name)
        .await
        .unwrap()
        .map(|report| report.thread)
}

async fn due_thread_is_leased_by_one_janitor(database: &TestDatabase, store: &Store) {
    let made = exchange(store, &user("alice")).await.thread;
    assert_eq!(
        store.due_threads(10).await.unwrap(),
        [],
        "the thread has no limits"
    );
    due_now(database).await;
    let due = store.due_threads(10).await.unwrap();
    assert_eq!((ids(&due), due[0].attempts), (vec![made.id], 0));
    assert_eq!(due[0].thread, made);
    assert!(due[0].now >= made.last_active_at);
    assert_eq!(
        ids(&store.due_threads(10).await.unwrap()),
        [made.id],
        "reading changes nothing"
    );

    let claimed = store.lease_due_threads(10, HOUR).await.unwrap();
    assert_eq!((ids(&claimed), &claimed[0].thread), (vec![made.id], &made));
    assert_eq!(store.lease_due_threads(10, HOUR).await.unwrap(), []);
    assert_eq!(store.due_threads(10).await.unwrap(), []);
    earlier(database, "threads", &["due_at"], HOUR * 2).await;
    assert_eq!(
        ids(&store.lease_due_threads(10, HOUR).await.unwrap()),
        [made.id],
        "the lease of a dead replica has ended"
    );
    check_invariants(database).await;
}

async fn longest_due_threads_are_leased_first(database: &TestDatabase, store: &Store) {
    let mut threads = vec![];
    for n in 0..5 {
        threads.push(exchange(store, &user(&n.to_string())).await.thread.id);
    }
    // The youngest thread has been due longest.
    for thread in &threads {
        earlier(database, "threads", &["due_at"], HOUR).await;
        let thread = id(database, thread.uuid());
        database
            .execute(&format!(
                "UPDATE threads SET due_at = created_at WHERE id = {thread}"
            ))
            .await;
    }
    assert_eq!(ids(&store.due_threads(2).await.unwrap()), threads[..2]);
    assert_eq!(
        ids(&store.lease_due_threads(2, HOUR).await.unwrap()),
        threads[..2]
    );
    assert_eq!(
        ids(&store.lease_due_threads(2, HOUR).await.unwrap()),
        threads[2..4]
    );
    assert_eq!(
        ids(&store.lease_due_threads(2, HOUR).await.unwrap()),
        threads[4..]
    );
    // A thread that always fails goes behind the others.
    earlier(database, "threads", &["due_at"], HOUR * 2).await;
    let first = lease(store).await;
    store
        .reschedule(
            first.thread.id,
            first.claimed,
            Some(Duration::ZERO),
            Some("broken"),
        )
        .await
        .unwrap();
    let others = ids(&store.lease_due_threads(4, HOUR).await.unwrap());
    assert!(
        others.len() == 4 && !others.contains(&first.thread.id),
        "{others:?}"
    );
}

async fn stale_reschedule_keeps_newer_due_time(database: &TestDatabase, store: &Store) {
    let made = exchange(store, &user("alice")).await.thread.id;
    due_now(database).await;
    let looked = lease(store).await;
    due_now(database).await;
    store
        .reschedule(made, looked.claimed, None, None)
        .await
        .unwrap();
    assert_eq!(
        ids(&store.due_threads(1).await.unwrap()),
        [made],
        "the thread was made due meanwhile"
    );
    let looked = lease(store).await;
    store
        .reschedule(made, looked.claimed, Some(HOUR * 5), None)
        .await
        .unwrap();
    let now = time(database, "last_active_at", made).await;
    let due = time(database, "due_at", made).await;
    assert!((due - now - 5 * 3_600_000).abs() < 60_000, "{due}");
    due_now(database).await;
    let looked = lease(store).await;
    store
        .reschedule(made, looked.claimed, None, None)
        .await
        .unwrap();
    assert_eq!(time(database, "due_at", made).await, -1);
    store
        .reschedule(made, looked.claimed, Some(HOUR), Some("late"))
        .await
        .unwrap();
    assert_eq!(
        time(database, "due_at", made).await,
        -1,
        "the thread's lease has ended"
    );
    store
        .reschedule(ThreadId::new(), None, None, None)
        .await
        .unwrap();
}

/// Leases the thread that has been due longest.
async fn lease(store: &Store) -> DueThread {
    let mut due = store.lease_due_threads(1, HOUR).await.unwrap();
    assert!(due.len() == 1 && due[0].claimed.is_some(), "{due:?}");
    due.remove(0)
}

/// How a look at a thread may end: the time of the next look, and the error.
const ENDS: [(Option<Duration>, Option<&str>); 3] = [
    (None, None),
    (Some(Duration::from_hours(24)), None),
    (Some(Duration::from_hours(24)), Some("broken")),
];

async fn janitor_reschedule_keeps_ttl_set_meanwhile(database: &TestDatabase, store: &Store) {
    for (n, (after, failure)) in ENDS.into_iter().enumerate() {
        for by_message in [false, true] {
            let key = user(&format!("u{n}-{by_message}"));
            let made = exchange(store, &key).await.thread.id;
            let row = id(database, made.uuid());
            database
                .execute(&format!(
                    "UPDATE threads SET due_at = created_at WHERE id = {row}"
                ))
                .await;
            let looked = lease(store).await;
            assert_eq!(looked.thread.id, made);
            let minute = Ttl::FromNow(HOUR / 60);
            if by_message {
                let admission = Admission {
                    ttl: Some(minute),
                    ..admission(&key)
                };
                started(store.admit(admission.clone()).await.unwrap());
            } else {
                let life = Some(NewLife::Own(minute));
                let update = ThreadUpdate {
                    life,
                    ..ThreadUpdate::default()
                };
                store.update_thread(&key, &update).await.unwrap().unwrap();
            }
            let due = time(database, "due_at", made).await;
            store
                .reschedule(made, looked.claimed, after, failure)
                .await
                .unwrap();
            assert_eq!(
                time(database, "due_at", made).await,
                due,
                "{by_message} {failure:?}"
            );
            let failures = format!("SELECT attempts FROM threads WHERE id = {row}");
            assert_eq!(
                database.number(&failures).await,
                i64::from(failure.is_some())
            );
        }
    }
}

async fn deletion_begun_during_janitor_pass_keeps_its_hold(database: &TestDatabase, store: &Store) {
    for (n, (after, failure)) in ENDS.into_iter().enumerate() {
        let key = user(&n.to_string());
        let made = exchange(store, &key).await.thread.id;
        let row = id(database, made.uuid());
        database
            .execute(&format!(
                "UPDATE threads SET due_at = created_at WHERE id = {row}"
            ))
            .await;
        let looked = lease(store).await;
        let request = request(DeletionTarget::Key(key), Deletion::Erase);
        let request = DeletionRequest {
            hold: HOUR / 60,
            ..request
        };
        assert_eq!(store.begin_deletion(&request, 1).await.unwrap(), 1);
        let due = time(database, "due_at", made).await;
        store
            .reschedule(made, looked.claimed, after, failure)
            .await
            .unwrap();
        assert_eq!(time(database, "due_at", made).await, due, "{failure:?}");
    }
}

/// A replica that got a request to delete works on threads whose due time is put off for it.
async fn reschedule_without_lease_only_moves_due_time_earlier(
    database: &TestDatabase,
    store: &Store,
) {
    let made = exchange(store, &user("alice")).await.thread.id;
    due_now(database).await;
    lease(store).await;
    let held = time(database, "due_at", made).await;
    store
        .reschedule(made, None, Some(HOUR * 2), Some("broken"))
        .await
        .unwrap();
    store.reschedule(made, None, None, None).await.unwrap();
    assert_eq!(time(database, "due_at", made).await, held);
    store
        .reschedule(made, None, Some(Duration::ZERO), Some("broken"))
        .await
        .unwrap();
    assert_eq!(store.due_threads(1).await.unwrap()[0].attempts, 1);
    store
        .reschedule(made, None, Some(HOUR), Some("broken"))
        .await
        .unwrap();
    assert_eq!(
        store.due_threads(1).await.unwrap()[0].attempts,
        2,
        "the thread stays due"
    );
}

async fn janitor_failures_are_counted_until_success(database: &TestDatabase, store: &Store) {
    let made = exchange(store, &user("alice")).await.thread.id;
    for attempts in 0..3 {
        due_now(database).await;
        let looked = lease(store).await;
        assert_eq!(looked.attempts, attempts);
        store
            .reschedule(
                made,
                looked.claimed,
                Some(HOUR),
                Some("the upstream is away"),
            )
            .await
            .unwrap();
        assert_eq!(store.due_threads(1).await.unwrap(), []);
    }
    store
        .reschedule(made, None, Some(HOUR), None)
        .await
        .unwrap();
    due_now(database).await;
    assert_eq!(store.due_threads(1).await.unwrap()[0].attempts, 0);
}

fn limits(max_age: Option<Duration>, max_idle: Option<Duration>) -> Limits {
    Limits { max_age, max_idle }
}

/// Makes threads with all combinations of limits: no own ones, each of them, and both.
async fn threads_with_limits(database: &TestDatabase, store: &Store) -> Vec<Thread> {
    let mut threads = vec![];
    for (n, own) in [
        (None, None),
        (Some(5), None),
        (None, Some(2)),
        (Some(3), Some(4)),
        (Some(1), Some(9)),
    ]
    .iter()
    .enumerate()
    {
        for key in [
            session("alice", &n.to_string()),
            topic("alice", &n.to_string()),
        ] {
            let made = exchange(store, &key).await.thread.id;
            let hours = |own: Option<i64>| {
                own.map_or("NULL".to_owned(), |own| (own * 3_600_000).to_string())
            };
            let (age, idle, thread) = (hours(own.0), hours(own.1), id(database, made.uuid()));
            database
                .execute(&format!(
                    "UPDATE threads SET max_age_ms = {age}, max_idle_ms = {idle} WHERE id = {thread}"
                ))
                .await;
            threads.push(made);
        }
    }
    earlier(
        database,
        "threads",
        &["created_at", "last_active_at"],
        HOUR + HOUR / 2,
    )
    .await;
    earlier(database, "threads", &["created_at"], HOUR).await;
    let mut found = vec![];
    for made in threads {
        found.push(thread(store, made).await.unwrap());
    }
    found
}

fn lifetimes() -> Lifetimes {
    Lifetimes {
        sessions: limits(Some(HOUR * 24), Some(HOUR)),
        others: limits(None, Some(HOUR * 48)),
    }
}

async fn changed_limits_set_due_time_to_expiry(database: &TestDatabase, store: &Store) {
    let threads = threads_with_limits(database, store).await;
    let archived = exchange(store, &user("archived")).await.thread.id;
    database
        .execute(
            "UPDATE threads SET lifecycle = 'archived', archived_at = created_at WHERE user_key = 'archived'",
        )
        .await;
    for lifetimes in [lifetimes(), Lifetimes::default(), lifetimes()] {
        let mut after = None;
        let mut pages = 0;
        while let Some(last) = store
            .apply_changed_limits(after, 3, &lifetimes)
            .await
            .unwrap()
        {
            after = Some(last);
            pages += 1;
        }
        assert!(pages <= 5, "{pages}");
        assert_eq!(after, Some(archived));
        for made in &threads {
            let wanted = super::retention::lifetimes()
                .expiry(made)
                .map(|at| at.timestamp_millis());
            let due = time(database, "due_at", made.id).await;
            assert!(
                (due - wanted.unwrap()).abs() <= 1,
                "{made:?} is due at {due}"
            );
        }
    }
    assert_eq!(
        time(database, "due_at", archived).await,
        -1,
        "the thread is not current"
    );
    let expired = threads.iter().filter(|made| {
        lifetimes()
            .expiry(made)
            .is_some_and(|at| at <= threads[0].last_active_at + HOUR + HOUR / 2)
    });
    assert_eq!(store.due_threads(100).await.unwrap().len(), expired.count());
    // An early due time is not put off, and a late one is moved forward.
    database
        .execute("UPDATE threads SET due_at = created_at WHERE scope_kind = 'topic'")
        .await;
    store.lease_due_threads(100, HOUR * 1000).await.unwrap();
    database
        .execute("UPDATE threads SET due_at = created_at WHERE scope_kind = 'topic'")
        .await;
    store
        .apply_changed_limits(None, 100, &lifetimes())
        .await
        .unwrap();
    for made in &threads {
        let due = time(database, "due_at", made.id).await;
        let wanted = match made.key.scope {
            Scope::Topic(_) => made.created_at,
            _ => lifetimes().expiry(made).unwrap(),
        };
        assert!(
            (due - wanted.timestamp_millis()).abs() <= 1,
            "{made:?} is due at {due}"
        );
    }
}

async fn only_expired_threads_are_archived(database: &TestDatabase, store: &Store) {
    let threads = threads_with_limits(database, store).await;
    let now: Timestamp = threads[0].last_active_at + HOUR + HOUR / 2;
    due_now(database).await;
    let mut archived = BTreeSet::new();
    for made in &threads {
        let limits = lifetimes().of(&made.key.scope);
        let end = lifetimes().expiry(made);
        let is_over = end.is_some_and(|at| at <= now);
        assert_eq!(
            store.expire(made.id, limits).await.unwrap(),
            is_over,
            "{made:?}"
        );
        assert!(!store.expire(made.id, limits).await.unwrap(), "{made:?}");
        let found = thread(store, made.id).await.unwrap();
        assert_eq!(found.lifecycle == Lifecycle::Archived, is_over);
        if is_over {
            archived.insert(made.id);
        } else {
            let due = time(database, "due_at", made.id).await;
            assert!(
                (due - end.unwrap().timestamp_millis()).abs() <= 1,
                "{made:?} is due at {due}"
            );
        }
    }
    assert_eq!(
        ids(&store.due_threads(100).await.unwrap())
            .into_iter()
            .collect::<BTreeSet<_>>(),
        archived
    );
    assert!(archived.len() == 3 && archived.len() < threads.len());
    let endless = threads
        .iter()
        .find(|made| made.limits == Limits::NONE && !archived.contains(&made.id))
        .unwrap();
    assert!(!store.expire(endless.id, Limits::NONE).await.unwrap());
    assert_eq!(
        time(database, "due_at", endless.id).await,
        -1,
        "the thread never expires"
    );
    check_invariants(database).await;
}

async fn expired_thread_is_archived_and_its_runs_continue(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    database
        .execute("UPDATE threads SET rollover_pending = true")
        .await;
    assert!(
        store
            .expire(first.thread.id, limits(None, Some(Duration::ZERO)))
            .await
            .unwrap()
    );
    let due = store.due_threads(10).await.unwrap();
    assert_eq!(ids(&due), [first.thread.id]);
    let DueThread { thread, now, .. } = &due[0];
    assert_eq!(
        (thread.lifecycle, thread.rolls),
        (Lifecycle::Archived, false)
    );
    assert!(
        thread.archived_at.unwrap() <= *now && thread.archived_at.unwrap() >= thread.created_at
    );
    // The runs of the archived thread continue.
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    started_from_queue(store.start_queued(&second).await.unwrap());
    closed(store.finish(&second, completed(None)).await.unwrap());
    assert_ne!(exchange(store, &key).await.thread.id, first.thread.id);
    assert!(!store.expire(ThreadId::new(), Limits::NONE).await.unwrap());
    check_invariants(database).await;
}

async fn archived_thread_is_discarded_after_retention(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let made = turn.thread.id;
    assert!(
        !store.discard(made, Duration::ZERO).await.unwrap(),
        "the thread is current"
    );
    assert!(
        store
            .expire(made, limits(Some(Duration::ZERO), None))
            .await
            .unwrap()
    );
    assert!(!store.discard(made, HOUR).await.unwrap());
    earlier(database, "threads", &["archived_at"], HOUR).await;
    database.execute("UPDATE threads SET due_at = NULL").await;
    assert!(store.discard(made, HOUR).await.unwrap());
    let due = store.due_threads(10).await.unwrap();
    assert_eq!(
        (due[0].thread.lifecycle, due[0].thread.deletion),
        (Lifecycle::Deleting, Some(Deletion::Erase))
    );
    assert!(
        !store.discard(made, HOUR).await.unwrap(),
        "the deletion has begun"
    );
    let run = store.run(&key, turn.run.id).await.unwrap().unwrap().0;
    assert_eq!(run.status, RunStatus::Cancelling);
}

/// Settings under which all records are old enough.
fn all() -> Pruning {
    Pruning {
        runs: Some(HOUR),
        events: Some(HOUR),
        idempotency_keys: Some(HOUR),
        receipts: Some(HOUR),
        storing: vec![],
    }
}

async fn pruning_spares_recent_and_unfinished_runs(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let once = Admission {
        idempotency: Some(idempotency("k")),
        ..admission(&key)
    };
    let turn = started(store.admit(once.clone()).await.unwrap());
    store
        .pause(&turn.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    queued(store.admit(admission(&key)).await.unwrap());
    older_runs(database, HOUR * 2).await;
    let made = exchange(store, &user("bob")).await;
    assert_eq!(store.prune(&all(), 100).await.unwrap(), Pruned::default());
    assert_eq!(
        store.prunable(&all(), 100).await.unwrap(),
        Pruned::default()
    );
    assert_eq!(
        store.prune(&Pruning::default(), 100).await.unwrap(),
        Pruned::default()
    );
    assert_eq!(database.number("SELECT count(*) FROM runs").await, 3);

    // A run that an unsettled run names is still needed. A run that ended late counts as young.
    older_runs(database, HOUR * 2).await;
    database
        .execute("UPDATE runs SET finished_at = created_at WHERE finished_at IS NOT NULL")
        .await;
    let named = database
        .number("SELECT count(*) FROM runs WHERE finished_at IS NOT NULL")
        .await;
    assert_eq!(named, 1);
    let spelled = if is_postgres(database) {
        "replace(r.id::text, '-', '')"
    } else {
        "lower(hex(r.id))"
    };
    database
        .execute(&format!(
            "UPDATE threads SET unsettled_run = (SELECT '{{\"run\": \"run_' || {spelled} || '\"}}' FROM runs r \
             WHERE r.thread_id = threads.id){} WHERE user_key = 'bob'",
            if is_postgres(database) { "::jsonb" } else { "" }
        ))
        .await;
    assert_eq!(store.prunable(&all(), 100).await.unwrap().runs, 0);
    assert_eq!(
        store
            .prune(
                &Pruning {
                    events: None,
                    ..all()
                },
                100
            )
            .await
            .unwrap(),
        Pruned::default()
    );
    database
        .execute("UPDATE threads SET unsettled_run = NULL")
        .await;
    assert_eq!(
        store.prunable(&all(), 100).await.unwrap(),
        Pruned {
            runs: 1,
            events: 1,
            ..Pruned::default()
        }
    );
    assert_eq!(
        store.prune(&all(), 100).await.unwrap(),
        Pruned {
            runs: 1,
            events: 1,
            ..Pruned::default()
        }
    );
    let page = store.transcript(made.thread.id, 0, 10).await.unwrap();
    assert_eq!(page.len(), 2, "the messages are kept");
}

async fn expired_records_are_pruned_in_batches(database: &TestDatabase, store: &Store) {
    for n in 0..5 {
        let key = user(&n.to_string());
        let once = Admission {
            idempotency: Some(idempotency("k")),
            ..admission(&key)
        };
        let turn = started(store.admit(once.clone()).await.unwrap());
        closed(
            store
                .finish(&turn.lease, completed(Some("hi")))
                .await
                .unwrap(),
        );
        let request = request(DeletionTarget::Key(user("nobody")), Deletion::Erase);
        assert_eq!(store.begin_deletion(&request, 10).await.unwrap(), 0);
    }
    assert_eq!(
        store.prunable(&all(), 100).await.unwrap(),
        Pruned::default()
    );
    older_runs(database, HOUR * 2).await;
    database.age_idempotency_keys(HOUR * 2).await;
    earlier(database, "deletions", &["finished_at"], HOUR * 2).await;
    let found = |n| Pruned {
        runs: n,
        events: n,
        idempotency_keys: n,
        receipts: n,
    };
    assert_eq!(store.prunable(&all(), 100).await.unwrap(), found(5));
    assert_eq!(store.prunable(&all(), 2).await.unwrap(), found(2));
    let keys_alone = Pruning {
        runs: None,
        events: None,
        receipts: None,
        ..all()
    };
    let keys = Pruned {
        idempotency_keys: 1,
        ..Pruned::default()
    };
    assert_eq!(store.prune(&keys_alone, 1).await.unwrap(), keys);
    for n in [2, 2, 1, 0] {
        let pruned = store.prune(&all(), 2).await.unwrap();
        assert_eq!((pruned.runs, pruned.events, pruned.receipts), (n, n, n));
    }
    assert_eq!(store.prunable(&all(), 100).await.unwrap(), found(0));
    for table in ["runs", "run_events", "idempotency_keys", "deletions"] {
        assert_eq!(
            database
                .number(&format!("SELECT count(*) FROM {table}"))
                .await,
            0,
            "{table}"
        );
    }
    assert_eq!(database.number("SELECT count(*) FROM messages").await, 10);
    exchange(store, &user("0")).await;
}

async fn pruned_runs_leave_stored_responses_as_upstream_orphans(
    database: &TestDatabase,
    store: &Store,
) {
    let mut threads = vec![];
    for upstream in ["storing", "other"] {
        let key = user(upstream);
        let request = Admission {
            upstream: upstream.to_owned(),
            ..admission(&key)
        };
        let turn = started(store.admit(request.clone()).await.unwrap());
        store
            .pause(&turn.lease, &pause(&["call_1"], 0))
            .await
            .unwrap();
        store
            .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
            .await
            .unwrap();
        let second = UpstreamRunId("resp_2".to_owned());
        let end = RunEnd {
            upstream_run_id: Some(second),
            ..completed(None)
        };
        closed(store.finish(&turn.lease, end.clone()).await.unwrap());
        threads.push(turn.thread.id);
    }
    older_runs(database, HOUR * 2).await;
    let pruning = Pruning {
        storing: vec!["storing".to_owned()],
        ..all()
    };
    assert_eq!(store.prune(&pruning, 100).await.unwrap().runs, 2);
    let orphans = store.upstream_orphans(threads[0], true, 100).await.unwrap();
    let ids: BTreeSet<_> = orphans
        .iter()
        .map(|it| it.upstream_id.as_deref().unwrap())
        .collect();
    assert_eq!(ids.into_iter().collect::<Vec<_>>(), ["resp_1", "resp_2"]);
    assert!(
        orphans
            .iter()
            .all(|it| it.kind == OrphanKind::Run && it.upstream == "storing")
    );
    assert!(
        orphans
            .iter()
            .all(|it| matches!(it.name, OrphanName::Row(_)) && it.attempts == 0)
    );
    assert_eq!(
        store.upstream_orphans(threads[1], true, 100).await.unwrap(),
        []
    );
    assert_eq!(
        store.due_upstream_orphans(100).await.unwrap(),
        [],
        "the orphans are deleted with their thread"
    );
    assert_eq!(store.lease_upstream_orphans(100, HOUR).await.unwrap(), []);
    store
        .reschedule_upstream_orphan(OrphanId::new(), None, None)
        .await
        .unwrap();
}

/// Two replicas lease many threads at once. Each thread goes to one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_lease_disjoint_due_threads() {
    const THREADS: usize = 60;
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    for n in 0..THREADS {
        exchange(&replicas[n % 2], &user(&n.to_string())).await;
    }
    database
        .execute("UPDATE threads SET due_at = created_at")
        .await;
    let claim = |n: usize| {
        let store = &replicas[n % 2];
        async move {
            let mut all = vec![];
            loop {
                let some = store.lease_due_threads(4, HOUR).await.unwrap();
                if some.is_empty() && store.due_threads(1).await.unwrap().is_empty() {
                    return all;
                }
                all.extend(ids(&some));
            }
        }
    };
    let claimed = futures_util::future::join_all((0..6).map(claim))
        .await
        .concat();
    assert_eq!(claimed.len(), THREADS);
    assert_eq!(claimed.into_iter().collect::<BTreeSet<_>>().len(), THREADS);
    for store in replicas {
        store.close().await;
    }
}

/// Beside many threads with long histories, the janitor reads no whole table, as the server
/// counts reads.
#[tokio::test]
async fn janitor_reads_bounded_rows() {
    let database = TestDatabase::postgres().await;
    let key = user("alice");
    let store = database.store().await;
    for _ in 0..3 {
        exchange(&store, &key).await;
    }
    store.close().await;
    fill(&database).await;
    super::engines::alone(&database).await;
    database.execute("SELECT pg_stat_reset()").await;

    let store = database.store().await;
    keep(&store).await;
    roll_over(&store, &key).await;
    store.close().await;

    super::engines::alone(&database).await;
    for (column, most) in [("seq_scan", 0), ("idx_tup_fetch", 1500)] {
        for table in [
            "threads",
            "runs",
            "messages",
            "run_events",
            "idempotency_keys",
            "upstream_orphans",
            "deletions",
            "deleted_threads",
        ] {
            let number = format!(
                "SELECT COALESCE({column}, 0) FROM pg_stat_user_tables WHERE relname = '{table}'"
            );
            let number = database.number(&number).await;
            assert!(number <= most, "{table}.{column}: {number}");
        }
    }
    let read = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'threads'";
    assert!(database.number(read).await > 0, "the server counts reads");
}

/// Adds many threads, runs, requests and so on, two days old by their ids.
async fn fill(database: &TestDatabase) {
    let old = "(lpad(to_hex((EXTRACT(epoch FROM now() - interval '2 days') * 1000)::bigint + n), 12, '0') || \
               substr(md5(n::text || 'x'), 13))::uuid";
    database
        .execute(&format!(
            "INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, message_count, \
             last_position, run_count, created_at, last_active_at, archived_at, due_at) \
             SELECT {old}, 'default', 'u' || n % 50, 'session', 's' || n, 'main', \
             (CASE WHEN n % 3 = 0 THEN 'archived' ELSE 'current' END)::thread_lifecycle, 1, 1, 1, \
             now() - interval '2 days', now() - interval '2 days', now() - interval '2 days', \
             now() + (n - 10) * interval '1 second' FROM generate_series(1, 5000) n; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, \
             started_at, finished_at, deadline_at, upstream_run_id) \
             SELECT {old}, {old}, 1, 'completed', 'enqueue', 'default', 1, 1, now(), \
             now(), now() - (2500 - n) * interval '1 second' - interval '1 hour', now(), 'r' \
             FROM generate_series(1, 5000) n; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at) \
             SELECT gen_random_uuid(), id, p, 'user', '[]', id, now() FROM threads, generate_series(1, 3) p \
             WHERE user_key <> 'alice'; \
             INSERT INTO run_events (run_id, first_offset, end_offset, events) SELECT id, 0, 0, '[]' FROM runs \
             WHERE upstream_run_id = 'r'; \
             INSERT INTO idempotency_keys SELECT tenant, user_key, scope_kind, scope_name, 'k', r.id, \
             decode(repeat('00', 32), 'hex'), r.finished_at FROM runs r JOIN threads t ON t.id = r.thread_id \
             WHERE user_key <> 'alice'; \
             INSERT INTO deletions (id, tenant, user_key, archive, requested_at, finished_at) \
             SELECT {old}, 'default', 'u' || n, false, now(), \
             CASE WHEN n % 10 > 0 THEN now() - n * interval '1 second' END FROM generate_series(1, 5000) n; \
             INSERT INTO deleted_threads (deletion_id, thread_id, upstream, messages, runs, finished_at) \
             SELECT id, id, 'main', 1, 1, now() FROM deletions; \
             INSERT INTO upstream_orphans (id, thread_id, upstream, kind, upstream_id, due_at) \
             SELECT id, id, 'main', 'run', 'r', \
             CASE WHEN user_key <> 'u1' THEN now() + interval '1 second' * message_count END FROM threads; \
             ANALYZE"
        ))
        .await;
}

/// Calls the store as the janitor does.
async fn keep(store: &Store) {
    let tenant = TenantKey::default();
    assert!(!store.due_threads(20).await.unwrap().is_empty());
    let due = store.lease_due_threads(10, HOUR).await.unwrap();
    let current = due
        .iter()
        .find(|due| due.thread.lifecycle == Lifecycle::Current)
        .unwrap();
    let (current, claimed) = (current.thread.id, current.claimed);
    let archived = due
        .iter()
        .find(|due| due.thread.lifecycle == Lifecycle::Archived)
        .unwrap()
        .thread
        .id;
    store
        .reschedule(current, claimed, Some(HOUR), Some("x"))
        .await
        .unwrap();
    store
        .apply_changed_limits(None, 100, &lifetimes())
        .await
        .unwrap();
    store
        .apply_changed_limits(Some(archived), 100, &lifetimes())
        .await
        .unwrap();
    assert!(
        store
            .expire(current, limits(Some(HOUR), None))
            .await
            .unwrap()
    );
    assert!(store.discard(archived, HOUR).await.unwrap());
    store
        .removed(
            archived,
            &super::deletion::gone(),
            &[OrphanName::Row(OrphanId::new())],
        )
        .await
        .unwrap();
    assert!(store.conclude(archived, 10).await.unwrap());
    let target = DeletionTarget::User(user("u7").user);
    let request = DeletionRequest {
        tenant: tenant.clone(),
        ..request(target, Deletion::Erase)
    };
    assert_eq!(store.begin_deletion(&request, 20).await.unwrap(), 20);
    let report = store
        .deletion(&tenant, request.id, None, 10)
        .await
        .unwrap()
        .unwrap();
    store
        .deletion_under_way(&tenant, &request.target)
        .await
        .unwrap()
        .unwrap();
    let thread = report.threads.data[0].id;
    let orphans = store.upstream_orphans(thread, true, 10).await.unwrap();
    let names: Vec<_> = orphans.into_iter().map(|it| it.name).collect();
    store
        .removed(thread, &super::deletion::gone(), &names)
        .await
        .unwrap();
    while !store.conclude(thread, 2).await.unwrap() {}
    let pruning = Pruning {
        storing: vec!["main".to_owned()],
        ..all()
    };
    store.prunable(&pruning, 50).await.unwrap();
    let pruned = store.prune(&pruning, 50).await.unwrap();
    assert_eq!(
        pruned,
        Pruned {
            runs: 50,
            events: 50,
            idempotency_keys: 50,
            receipts: 50
        }
    );
    store.due_upstream_orphans(10).await.unwrap();
    store.lease_upstream_orphans(10, HOUR).await.unwrap();
}

/// Rolls a thread over and binds an upstream thread, as runs do while the janitor works.
async fn roll_over(store: &Store, key: &ConversationKey) {
    let turn = started(store.admit(admission(key)).await.unwrap());
    queued(store.admit(admission(key)).await.unwrap());
    let rollover = threadkeeper::store::Rollover {
        thread: turn.thread.id,
        by: Some(turn.lease),
        new_thread: ThreadId::new(),
        carry_over: 2,
        limits: Limits::NONE,
    };
    store.roll_over(&rollover).await.unwrap();
    assert_eq!(
        store
            .carried(rollover.new_thread, None, 100)
            .await
            .unwrap()
            .data
            .len(),
        2
    );
    let external = threadkeeper::store::ExternalMessage {
        id: MessageId::new(),
        after: 0,
        role: threadkeeper::domain::Role::User,
        content: text("x"),
        upstream_message_id: Some("m".to_owned()),
        created_at: None,
    };
    store
        .insert_external_messages(rollover.new_thread, Some(turn.lease), &[external])
        .await
        .unwrap();
    let intents = [OrphanId::new(), OrphanId::new()];
    for intent in intents {
        assert!(store.intend(&turn.lease, intent).await.unwrap());
    }
    store.resolve(intents[0], Made::Nothing).await.unwrap();
    let made = UpstreamThreadId("c".to_owned());
    let binding = Binding {
        id: made.clone(),
        intent: intents[1],
        seeded: true,
        carried_users: 1,
    };
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, binding.clone())
            .await
            .unwrap(),
        Bound::Done
    );
    store.baseline(turn.run.id).await.unwrap();
    store
        .reschedule_upstream_orphan(intents[0], None, Some(HOUR))
        .await
        .unwrap();
}
