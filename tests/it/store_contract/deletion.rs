//! Requests to delete, from the mark on a thread to the receipt.

use threadkeeper::domain::{Deletion, DeletionId, Lifecycle, Removed, UpstreamOutcome};
use threadkeeper::store::{
    Deletable, DeletedThread, DeletionReport, DeletionRequest, DeletionTarget, OrphanName, Rolled,
};

use super::retention::{HOUR, earlier, id, thread, time};
use super::rollover::rollover;
use super::*;

on_every_backend!(
    thread_under_erasure_accepts_no_new_messages,
    erasure_covers_all_threads_of_target,
    deletion_marks_threads_in_batches,
    deletion_of_empty_target_finishes_at_once,
    threads_created_after_deletion_request_are_spared,
    rollover_after_erasure_request_is_erased_too,
    rollover_between_deletion_batches_is_erased_too,
    deletion_concludes_only_after_runs_and_upstream_cleanup,
    erasure_concludes_in_bounded_steps,
    archive_keeps_transcript,
    archive_can_be_escalated_to_erasure,
    discarded_thread_appears_in_later_deletion_receipt,
    deletion_waits_for_threads_of_overlapping_request,
    deletion_interrupted_between_batches_still_completes,
    upstream_removals_are_recorded,
    unacknowledged_upstream_requests_are_counted,
    deletion_receipt_is_paged,
    deletion_under_way_is_found_by_target,
    expired_deletion_receipt_is_pruned,
    deletion_preview_counts_target_content,
);

pub(super) fn request(target: DeletionTarget, end: Deletion) -> DeletionRequest {
    DeletionRequest {
        id: DeletionId::new(),
        tenant: TenantKey::default(),
        fingerprint: format!("of {}", target.user().as_str()),
        target,
        end,
        hold: Duration::ZERO,
    }
}

fn erase(key: &ConversationKey) -> DeletionRequest {
    request(DeletionTarget::Key(key.clone()), Deletion::Erase)
}

fn erase_user(key: &ConversationKey) -> DeletionRequest {
    request(DeletionTarget::User(key.user.clone()), Deletion::Erase)
}

async fn report(store: &Store, request: &DeletionRequest) -> DeletionReport {
    store
        .deletion(&request.tenant, request.id, None, 100)
        .await
        .unwrap()
        .unwrap()
}

/// Records that a thread's upstream copy is deleted.
pub(super) async fn gone_upstream(store: &Store, thread: ThreadId) {
    store.removed(thread, &gone(), &[]).await.unwrap();
}

pub(super) fn gone() -> Removed {
    Removed {
        outcome: Some(UpstreamOutcome::Deleted),
        items: 7,
        ..Removed::default()
    }
}

/// Archives the key's current thread.
async fn archive(database: &TestDatabase, key: &ConversationKey) {
    let (user, kind, name) = (key.user.as_str(), key.scope.kind(), key.scope.name());
    database
        .execute(&format!(
            "UPDATE threads SET lifecycle = 'archived', archived_at = last_active_at \
             WHERE lifecycle = 'current' AND user_key = '{user}' AND scope_kind = '{kind}' AND scope_name = '{name}'"
        ))
        .await;
}

async fn thread_under_erasure_accepts_no_new_messages(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let active = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    database
        .execute("UPDATE threads SET attempts = 3, last_failure = 'x', rollover_pending = true, upstream_cleanup = '{}'")
        .await;
    let erase = erase(&key);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 1);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 0);

    let due = store.lease_due_threads(10, HOUR).await.unwrap();
    let [due] = &due[..] else { panic!("{due:?}") };
    assert_eq!((due.thread.id, due.attempts), (active.thread.id, 0));
    assert_eq!(
        (due.thread.lifecycle, due.thread.deletion),
        (Lifecycle::Deleting, Some(Deletion::Erase))
    );
    assert_eq!(
        (due.thread.rolls, &due.thread.removed),
        (false, &Removed::default())
    );

    let fresh = started(store.admit(admission(&key)).await.unwrap());
    assert_ne!(fresh.thread.id, active.thread.id);
    assert_eq!(fresh.thread.previous_thread, None);
    let unfinished = store.unfinished_of(active.thread.id).await.unwrap();
    let statuses: Vec<_> = unfinished.iter().map(|run| run.status).collect();
    assert_eq!(
        statuses,
        [RunStatus::Cancelling, RunStatus::Queued],
        "queued runs are left for others to end"
    );
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    closed(
        store
            .finish(&active.lease, cancelled.clone())
            .await
            .unwrap(),
    );
    assert_eq!(
        store.start_queued(&waiting).await.unwrap(),
        QueuedStart::NotYet,
        "the queued run does not start"
    );
    closed(store.finish(&waiting, cancelled.clone()).await.unwrap());
    let report = report(store, &erase).await;
    assert_eq!(
        (report.id, report.archive, report.done, report.pending),
        (erase.id, false, 0, 1)
    );
    assert_eq!(
        (report.finished_at, report.threads.data[0].finished_at),
        (None, None)
    );
    check_invariants(database).await;
}

async fn erasure_covers_all_threads_of_target(database: &TestDatabase, store: &Store) {
    let keys = [
        user("alice"),
        session("alice", "a"),
        session("alice", "b"),
        topic("alice", "a"),
        user("bob"),
    ];
    let mut of_key = vec![];
    for key in &keys {
        let old = exchange(store, key).await.thread.id;
        archive(database, key).await;
        of_key.push([old, exchange(store, key).await.thread.id]);
    }
    let erase = erase(&keys[1]);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 2);
    for (n, threads) in of_key.iter().enumerate() {
        for id in threads {
            let is_deleting = thread(store, *id).await.unwrap().lifecycle == Lifecycle::Deleting;
            assert_eq!(is_deleting, n == 1, "{n}");
        }
    }
    let all = erase_user(&keys[1]);
    assert_eq!(
        store.begin_deletion(&all, 10).await.unwrap(),
        6,
        "nothing of another key is deleted"
    );
    assert_eq!(report(store, &erase).await.pending, 2);
    assert_eq!(report(store, &all).await.pending, 6);
    for id in of_key[4] {
        assert_ne!(
            thread(store, id).await.unwrap().lifecycle,
            Lifecycle::Deleting
        );
    }
    let other = TenantKey::try_from("other".to_owned()).unwrap();
    assert!(
        store
            .deletion(&other, all.id, None, 10)
            .await
            .unwrap()
            .is_none()
    );
}

async fn deletion_marks_threads_in_batches(_: &TestDatabase, store: &Store) {
    for n in 0..5 {
        exchange(store, &session("alice", &n.to_string())).await;
    }
    let erase = erase_user(&user("alice"));
    for begun in [2, 2, 1, 0] {
        assert_eq!(store.begin_deletion(&erase, 2).await.unwrap(), begun);
    }
    let report = report(store, &erase).await;
    assert_eq!((report.pending, report.finished_at), (5, None));
}

async fn deletion_of_empty_target_finishes_at_once(database: &TestDatabase, store: &Store) {
    exchange(store, &user("bob")).await;
    for request in [
        erase(&user("alice")),
        erase_user(&user("alice")),
        request(DeletionTarget::Key(user("alice")), Deletion::Archive),
    ] {
        assert_eq!(store.begin_deletion(&request, 10).await.unwrap(), 0);
        let report = report(store, &request).await;
        assert!(report.finished_at.unwrap() >= report.requested_at);
        assert_eq!(
            (report.done, report.pending, report.threads.data.len()),
            (0, 0, 0)
        );
        assert_eq!(
            (report.user, report.fingerprint.as_deref()),
            (None, Some("of alice"))
        );
        assert_eq!(
            store
                .deletion_under_way(&request.tenant, &request.target)
                .await
                .unwrap(),
            None
        );
        // The receipt does not change later.
        exchange(store, &user("alice")).await;
        assert_eq!(store.begin_deletion(&request, 10).await.unwrap(), 0);
        database
            .execute("DELETE FROM threads WHERE user_key = 'alice'")
            .await;
    }
    let keys =
        "SELECT count(*) FROM deletions WHERE user_key IS NOT NULL OR scope_kind IS NOT NULL";
    assert_eq!(database.number(keys).await, 0);
}

async fn deletion_preview_counts_target_content(database: &TestDatabase, store: &Store) {
    let (key, other) = (user("alice"), session("alice", "s"));
    exchange(store, &other).await;
    exchange(store, &user("bob")).await;
    archive(database, &other).await;
    exchange(store, &key).await;
    started(store.admit(admission(&key)).await.unwrap());
    let of_user = DeletionTarget::User(key.user.clone());
    let counted = async |target: &DeletionTarget, end| {
        let found = store.deletable(&key.tenant, target, end).await.unwrap();
        [
            found.threads,
            found.messages,
            found.runs,
            found.unfinished_runs,
        ]
    };
    let current = [1, 3, 2, 1];
    assert_eq!(counted(&of_user, Deletion::Archive).await, current);
    assert_eq!(counted(&of_user, Deletion::Erase).await, [2, 5, 3, 1]);
    assert_eq!(
        counted(&DeletionTarget::Key(key.clone()), Deletion::Erase).await,
        current
    );
    assert_eq!(
        counted(&DeletionTarget::Key(other.clone()), Deletion::Archive).await,
        [0; 4]
    );
    assert_eq!(
        counted(&DeletionTarget::Key(other), Deletion::Erase).await,
        [1, 2, 1, 0]
    );
    let elsewhere = TenantKey::try_from("elsewhere".to_owned()).unwrap();
    let found = store
        .deletable(&elsewhere, &of_user, Deletion::Erase)
        .await
        .unwrap();
    assert_eq!(found, Deletable::default());
    // Threads that another request erases still count.
    assert_eq!(
        store.begin_deletion(&erase_user(&key), 10).await.unwrap(),
        2
    );
    assert_eq!(counted(&of_user, Deletion::Erase).await, [2, 5, 3, 1]);
}

async fn threads_created_after_deletion_request_are_spared(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    exchange(store, &key).await;
    let erase = erase(&key);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 1);
    earlier(database, "deletions", &["requested_at"], HOUR).await;
    let later = exchange(store, &key).await.thread.id;
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 0);
    assert_eq!(
        thread(store, later).await.unwrap().lifecycle,
        Lifecycle::Current
    );
}

/// A rollover replaces a thread that the request includes. The fresh thread has a message that
/// was acknowledged before the request.
async fn rollover_after_erasure_request_is_erased_too(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = exchange(store, &key).await.thread.id;
    let (active, waiting) = (admission(&key), admission(&key));
    let active = started(store.admit(active.clone()).await.unwrap());
    let (waiting, ..) = queued(store.admit(waiting.clone()).await.unwrap());
    let erase = erase(&key);
    assert_eq!(
        store.begin_deletion(&erase, 0).await.unwrap(),
        0,
        "the request is recorded, and has no thread yet"
    );
    closed(
        store
            .finish(&active.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let turn = started_from_queue(store.start_queued(&waiting).await.unwrap());
    for lease in [Some(turn.lease), None] {
        let before = newest_thread(store, &key).await.unwrap().0.id;
        let rolled = store.roll_over(&rollover(before, lease)).await.unwrap();
        assert!(
            matches!(rolled, Rolled::Done { .. } | Rolled::Later(_)),
            "{rolled:?}"
        );
    }
    let fresh = newest_thread(store, &key).await.unwrap().0;
    assert_eq!(fresh.previous_thread, Some(old));
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 2);
    let after = started(store.admit(admission(&key)).await.unwrap());
    assert_eq!(
        store.begin_deletion(&erase, 10).await.unwrap(),
        0,
        "a thread after the request is spared"
    );
    closed(
        store
            .finish(&turn.lease, completed(Some("too late")))
            .await
            .unwrap(),
    );
    for thread in [old, fresh.id] {
        gone_upstream(store, thread).await;
        assert!(store.conclude(thread, 100).await.unwrap());
    }
    let report = report(store, &erase).await;
    assert_eq!(
        (report.done, report.pending, report.finished_at.is_some()),
        (2, 0, true)
    );
    let left = format!(
        "SELECT count(*) FROM messages WHERE thread_id <> {}",
        id(database, after.thread.id.uuid())
    );
    assert_eq!(database.number(&left).await, 0);
}

/// A user's threads are marked in batches, and rolled over in between.
async fn rollover_between_deletion_batches_is_erased_too(database: &TestDatabase, store: &Store) {
    let keys = [session("alice", "a"), session("alice", "b")];
    for key in &keys {
        exchange(store, key).await;
    }
    let erase = erase_user(&keys[0]);
    assert_eq!(store.begin_deletion(&erase, 1).await.unwrap(), 1);
    let mut current = newest_thread(store, &keys[1]).await.unwrap().0;
    for _ in 0..2 {
        store.roll_over(&rollover(current.id, None)).await.unwrap();
        current = newest_thread(store, &keys[1]).await.unwrap().0;
        exchange(store, &keys[1]).await;
    }
    while store.begin_deletion(&erase, 1).await.unwrap() > 0 {}
    assert_eq!(report(store, &erase).await.pending, 4);
    assert_eq!(
        database
            .number("SELECT count(*) FROM threads WHERE lifecycle <> 'deleting'")
            .await,
        0
    );
}

async fn deletion_concludes_only_after_runs_and_upstream_cleanup(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let made = turn.thread.id;
    gone_upstream(store, made).await;
    assert!(
        !store.conclude(made, 10).await.unwrap(),
        "no request includes the thread"
    );
    let erase = erase(&key);
    store.begin_deletion(&erase, 10).await.unwrap();
    gone_upstream(store, made).await;
    assert!(
        !store.conclude(made, 10).await.unwrap(),
        "a run is unfinished"
    );
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    store
        .removed(
            made,
            &Removed {
                items: 7,
                ..Removed::default()
            },
            &[],
        )
        .await
        .unwrap();
    assert!(
        !store.conclude(made, 10).await.unwrap(),
        "the thread is still upstream"
    );
    gone_upstream(store, made).await;
    assert!(store.conclude(made, 10).await.unwrap());
    assert!(
        store.conclude(made, 10).await.unwrap(),
        "a repeat after a lost acknowledgement succeeds"
    );
}

async fn erasure_concludes_in_bounded_steps(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let other = exchange(store, &user("bob")).await.thread.id;
    for n in 0..5 {
        let once = Admission {
            idempotency: Some(idempotency(&n.to_string())),
            ..admission(&key)
        };
        let turn = started(store.admit(once.clone()).await.unwrap());
        closed(
            store
                .finish(&turn.lease, completed(Some("hi")))
                .await
                .unwrap(),
        );
    }
    let turn = started(store.admit(admission(&key)).await.unwrap());
    assert!(store.intend(&turn.lease, OrphanId::new()).await.unwrap());
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    let made = turn.thread.id;
    let erase = erase(&key);
    store.begin_deletion(&erase, 10).await.unwrap();
    gone_upstream(store, made).await;
    let mut steps = 0;
    while !store.conclude(made, 3).await.unwrap() {
        steps += 1;
        let left = report(store, &erase).await;
        assert_eq!((left.done, left.pending, left.finished_at), (0, 1, None));
        assert_eq!(
            left.threads.data[0].messages, 11,
            "the receipt counts the content"
        );
    }
    assert!((4..=6).contains(&steps), "{steps}");
    assert_eq!(thread(store, made).await, None);
    for table in ["threads", "runs", "run_events"] {
        assert_eq!(
            database
                .number(&format!("SELECT count(*) FROM {table}"))
                .await,
            1,
            "{table}"
        );
    }
    for table in ["upstream_orphans", "idempotency_keys"] {
        assert_eq!(
            database
                .number(&format!("SELECT count(*) FROM {table}"))
                .await,
            0,
            "{table}"
        );
    }
    assert_eq!(store.transcript(other, 0, 10).await.unwrap().len(), 2);
    let report = report(store, &erase).await;
    assert_eq!(
        (report.done, report.pending, report.threads.has_more),
        (1, 0, false)
    );
    let [line] = &report.threads.data[..] else {
        panic!("{report:?}")
    };
    let expected = DeletedThread {
        id: made,
        upstream: "main".to_owned(),
        messages: 11,
        runs: 6,
        removed: Removed {
            outcome: Some(UpstreamOutcome::Deleted),
            items: 7,
            ..Removed::default()
        },
        finished_at: line.finished_at,
        attempts: 0,
        last_failure: None,
    };
    assert_eq!(*line, expected);
    assert!(line.finished_at.unwrap() <= report.finished_at.unwrap());
    let keys =
        "SELECT count(*) FROM deletions WHERE user_key IS NOT NULL OR scope_name IS NOT NULL";
    assert_eq!(
        database.number(keys).await,
        0,
        "no row names the user any more"
    );
    let fresh = exchange(store, &key).await.thread;
    assert_eq!((fresh.previous_thread, fresh.message_count), (None, 2));
    check_invariants(database).await;
}

async fn archive_keeps_transcript(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = exchange(store, &key).await.thread.id;
    archive(database, &key).await;
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let made = turn.thread.id;
    assert!(bind(store, &turn.lease, &UpstreamThreadId("c".to_owned()), false).await);
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let archive = request(DeletionTarget::Key(key.clone()), Deletion::Archive);
    assert_eq!(
        store.begin_deletion(&archive, 10).await.unwrap(),
        1,
        "the preview counts the current thread only"
    );
    assert_eq!(
        thread(store, old).await.unwrap().lifecycle,
        Lifecycle::Archived
    );
    assert_eq!(
        thread(store, made).await.unwrap().deletion,
        Some(Deletion::Archive)
    );
    assert!(!store.conclude(made, 1).await.unwrap());
    gone_upstream(store, made).await;
    assert_eq!(thread(store, made).await.unwrap().upstream_thread_id, None);
    database.execute("UPDATE threads SET due_at = NULL").await;
    assert!(store.conclude(made, 1).await.unwrap());
    let found = thread(store, made).await.unwrap();
    assert_eq!(
        (found.lifecycle, found.deletion),
        (Lifecycle::Archived, None)
    );
    assert!(found.archived_at.unwrap() >= found.last_active_at);
    assert_eq!(
        store.due_threads(10).await.unwrap()[0].thread,
        found,
        "the archived thread is kept for a while only"
    );
    assert_eq!(store.transcript(made, 0, 10).await.unwrap().len(), 2);
    let report = report(store, &archive).await;
    assert_eq!((report.archive, report.done, report.pending), (true, 1, 0));
    assert!(report.finished_at.is_some());
    assert_eq!(
        (report.threads.data[0].messages, report.threads.data[0].runs),
        (2, 1)
    );
    assert!(
        !store.conclude(made, 1).await.unwrap(),
        "no deletion is under way"
    );
    check_invariants(database).await;
}

async fn archive_can_be_escalated_to_erasure(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let made = exchange(store, &key).await.thread.id;
    let archive = request(DeletionTarget::Key(key.clone()), Deletion::Archive);
    assert_eq!(store.begin_deletion(&archive, 10).await.unwrap(), 1);
    store
        .removed(
            made,
            &Removed {
                items: 3,
                ..Removed::default()
            },
            &[],
        )
        .await
        .unwrap();
    store.lease_due_threads(1, HOUR).await.unwrap();
    let erase = erase(&key);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 1);
    let due = store.due_threads(1).await.unwrap();
    assert_eq!(
        (due[0].thread.id, due[0].thread.deletion),
        (made, Some(Deletion::Erase))
    );
    assert_eq!(
        due[0].thread.removed.items, 3,
        "earlier removals still count"
    );
    gone_upstream(store, made).await;
    assert!(store.conclude(made, 10).await.unwrap());
    assert_eq!(thread(store, made).await, None);
    let (first, second) = (report(store, &archive).await, report(store, &erase).await);
    assert_eq!(
        (first.done, first.pending, second.done, second.pending),
        (0, 0, 1, 0)
    );
    assert!(first.finished_at.is_some() && second.finished_at.is_some());
    let keys = "SELECT count(*) FROM deletions WHERE user_key IS NOT NULL";
    assert_eq!(database.number(keys).await, 0);
}

async fn discarded_thread_appears_in_later_deletion_receipt(
    database: &TestDatabase,
    store: &Store,
) {
    let key = user("alice");
    let made = exchange(store, &key).await.thread.id;
    archive(database, &key).await;
    assert!(store.discard(made, Duration::ZERO).await.unwrap());
    let erase = erase(&key);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 1);
    gone_upstream(store, made).await;
    assert!(store.conclude(made, 10).await.unwrap());
    let report = report(store, &erase).await;
    assert_eq!((report.done, report.finished_at.is_some()), (1, true));

    // Without a request there is no receipt, and the deletion succeeds all the same.
    let made = exchange(store, &key).await.thread.id;
    archive(database, &key).await;
    assert!(store.discard(made, Duration::ZERO).await.unwrap());
    gone_upstream(store, made).await;
    assert!(store.conclude(made, 10).await.unwrap());
    assert_eq!(
        database
            .number("SELECT count(*) FROM deleted_threads")
            .await,
        1
    );
}

async fn deletion_waits_for_threads_of_overlapping_request(_: &TestDatabase, store: &Store) {
    let (one, two) = (session("alice", "1"), session("alice", "2"));
    let first = exchange(store, &one).await.thread.id;
    let second = exchange(store, &two).await.thread.id;
    let erase = erase(&one);
    store.begin_deletion(&erase, 10).await.unwrap();
    let all = erase_user(&one);
    assert_eq!(store.begin_deletion(&all, 10).await.unwrap(), 1);
    for id in [first, second] {
        gone_upstream(store, id).await;
    }
    assert!(store.conclude(second, 10).await.unwrap());
    let left = report(store, &all).await;
    assert_eq!(
        (left.done, left.pending, left.finished_at),
        (1, 0, None),
        "the user still has a thread"
    );
    assert!(store.conclude(first, 10).await.unwrap());
    assert!(report(store, &all).await.finished_at.is_some());
    assert!(report(store, &erase).await.finished_at.is_some());
}

async fn deletion_interrupted_between_batches_still_completes(_: &TestDatabase, store: &Store) {
    let mut threads = vec![];
    for n in 0..5 {
        threads.push(
            exchange(store, &session("alice", &n.to_string()))
                .await
                .thread
                .id,
        );
    }
    let erase = erase_user(&user("alice"));
    assert_eq!(store.begin_deletion(&erase, 2).await.unwrap(), 2);
    // No client repeats the request. Each finished thread leads to the next batch.
    let mut rounds = 0;
    while report(store, &erase).await.finished_at.is_none() {
        rounds += 1;
        for due in store.lease_due_threads(10, HOUR).await.unwrap() {
            gone_upstream(store, due.thread.id).await;
            while !store.conclude(due.thread.id, 2).await.unwrap() {}
        }
        assert!(rounds < 10);
    }
    let report = report(store, &erase).await;
    assert_eq!((report.done, report.pending), (5, 0));
    assert!(report.threads.data.iter().map(|line| line.id).eq(threads));
}

async fn upstream_removals_are_recorded(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let made = turn.thread.id;
    assert!(bind(store, &turn.lease, &UpstreamThreadId("c".to_owned()), false).await);
    let intents = [OrphanId::new(), OrphanId::new()];
    for intent in intents {
        assert!(store.intend(&turn.lease, intent).await.unwrap());
    }
    let end = RunEnd {
        upstream_run_id: Some(UpstreamRunId("resp_1".to_owned())),
        ..completed(None)
    };
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    database
        .execute("UPDATE threads SET unsettled_run = '{}'")
        .await;
    let left = |orphans: Vec<threadkeeper::store::UpstreamOrphan>| {
        orphans
            .into_iter()
            .map(|orphan| orphan.name)
            .collect::<Vec<_>>()
    };
    let rows = intents.map(OrphanName::Row);
    let run = OrphanName::Run(turn.run.id);
    assert_eq!(
        left(store.upstream_orphans(made, true, 10).await.unwrap()),
        [rows[0].clone(), rows[1].clone(), run.clone()]
    );

    let removed = Removed {
        items: 5,
        unknown: 1,
        ..Removed::default()
    };
    store.removed(made, &removed, &rows[..1]).await.unwrap();
    database
        .execute("UPDATE threads SET unsettled_run = NULL")
        .await;
    let found = thread(store, made).await.unwrap();
    assert_eq!(found.removed, removed);
    assert_eq!(
        found.upstream_thread_id,
        Some(UpstreamThreadId("c".to_owned()))
    );
    assert_eq!(
        left(store.upstream_orphans(made, true, 10).await.unwrap()),
        [rows[1].clone(), run.clone()]
    );

    let removed = Removed {
        outcome: Some(UpstreamOutcome::AlreadyGone),
        responses: 1,
        ..removed
    };
    store
        .removed(made, &removed, &[run, rows[1].clone()])
        .await
        .unwrap();
    let found = thread(store, made).await.unwrap();
    assert_eq!(
        (found.removed, found.upstream_thread_id, found.unsettled_run),
        (removed, None, None)
    );
    assert_eq!(store.upstream_orphans(made, true, 10).await.unwrap(), []);
    assert_eq!(
        store
            .run(&key, turn.run.id)
            .await
            .unwrap()
            .unwrap()
            .0
            .upstream_run_id,
        None
    );
    store
        .removed(ThreadId::new(), &Removed::default(), &[])
        .await
        .unwrap();
}

async fn deletion_receipt_is_paged(_: &TestDatabase, store: &Store) {
    let mut threads = vec![];
    for n in 0..5 {
        threads.push(
            exchange(store, &session("alice", &n.to_string()))
                .await
                .thread
                .id,
        );
    }
    let erase = erase_user(&user("alice"));
    store.begin_deletion(&erase, 10).await.unwrap();
    for done in [threads[1], threads[4]] {
        gone_upstream(store, done).await;
        assert!(store.conclude(done, 10).await.unwrap());
    }
    store
        .reschedule(threads[2], None, Some(HOUR), Some("refused"))
        .await
        .unwrap();
    let (mut lines, mut after, mut pages) = (vec![], None, 0);
    loop {
        let report = store
            .deletion(&erase.tenant, erase.id, after, 2)
            .await
            .unwrap()
            .unwrap();
        assert_eq!((report.done, report.pending), (2, 3));
        after = report.threads.data.last().map(|line| line.id);
        lines.extend(report.threads.data);
        pages += 1;
        if !report.threads.has_more {
            break;
        }
    }
    assert_eq!(pages, 3);
    assert!(lines.iter().map(|line| line.id).eq(threads.iter().copied()));
    let done: Vec<_> = lines
        .iter()
        .map(|line| line.finished_at.is_some())
        .collect();
    assert_eq!(done, [false, true, false, false, true]);
    assert_eq!(
        (lines[2].attempts, lines[2].last_failure.as_deref()),
        (1, Some("refused"))
    );
    assert!(
        lines
            .iter()
            .all(|line| (line.messages, line.runs) == (2, 1))
    );
}

async fn deletion_under_way_is_found_by_target(_: &TestDatabase, store: &Store) {
    let tenant = TenantKey::default();
    let (key, other) = (session("alice", "1"), session("alice", "2"));
    let made = exchange(store, &key).await.thread.id;
    exchange(store, &other).await;
    let of_key = DeletionTarget::Key(key.clone());
    let of_other = DeletionTarget::Key(other);
    let of_user = DeletionTarget::User(key.user.clone());
    let found =
        async |target: &DeletionTarget| store.deletion_under_way(&tenant, target).await.unwrap();
    assert_eq!(found(&of_key).await, None);
    let one = erase(&key);
    store.begin_deletion(&one, 10).await.unwrap();
    assert_eq!(
        (
            found(&of_key).await,
            found(&of_other).await,
            found(&of_user).await
        ),
        (Some(one.id), None, None)
    );
    gone_upstream(store, made).await;
    assert!(store.conclude(made, 10).await.unwrap());
    assert_eq!(found(&of_key).await, None);
    let all = erase_user(&key);
    store.begin_deletion(&all, 10).await.unwrap();
    for target in [&of_key, &of_other, &of_user] {
        assert_eq!(found(target).await, Some(all.id));
    }
}

async fn expired_deletion_receipt_is_pruned(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let made = exchange(store, &key).await.thread.id;
    let erase = erase(&key);
    store.begin_deletion(&erase, 10).await.unwrap();
    let pruning = threadkeeper::store::Pruning {
        receipts: Some(Duration::ZERO),
        ..Default::default()
    };
    assert_eq!(store.prune(&pruning, 10).await.unwrap().receipts, 0);
    gone_upstream(store, made).await;
    assert!(time(database, "due_at", made).await > 0);
    assert!(store.conclude(made, 10).await.unwrap());
    assert_eq!(
        database
            .number(&format!(
                "SELECT count(*) FROM deleted_threads WHERE thread_id = {}",
                id(database, made.uuid())
            ))
            .await,
        1
    );
    assert_eq!(store.prune(&pruning, 10).await.unwrap().receipts, 1);
    assert!(
        store
            .deletion(&erase.tenant, erase.id, None, 10)
            .await
            .unwrap()
            .is_none()
    );
    assert_eq!(
        database
            .number("SELECT count(*) FROM deleted_threads")
            .await,
        0
    );
}

/// Messages arrive and runs end while a user is being deleted. Nothing may deadlock, and nothing
/// may be left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_deletions_and_messages_leave_nothing_behind() {
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    let keys = [
        session("alice", "1"),
        session("alice", "2"),
        session("alice", "3"),
    ];
    let end = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    let send = |n: usize| {
        let (store, key, end) = (&replicas[n % 2], &keys[n % 3], &end);
        async move {
            let lease = match store.admit(admission(key)).await.unwrap() {
                Admitted::Started(turn) => turn.lease,
                Admitted::Queued { lease, .. } => {
                    if n.is_multiple_of(2) {
                        store.start_queued(&lease).await.unwrap();
                    }
                    lease
                }
                other => panic!("{other:?}"),
            };
            closed(store.finish(&lease, end.clone()).await.unwrap());
        }
    };
    let delete = |n: usize| {
        let (store, key) = (&replicas[n % 2], &keys[n % 3]);
        async move {
            let end = if n.is_multiple_of(4) {
                Deletion::Archive
            } else {
                Deletion::Erase
            };
            let request = match n % 5 {
                0 => erase_user(key),
                _ => request(DeletionTarget::Key(key.clone()), end),
            };
            while store.begin_deletion(&request, 1).await.unwrap() > 0 {}
            for due in store.lease_due_threads(10, Duration::ZERO).await.unwrap() {
                gone_upstream(store, due.thread.id).await;
                store.conclude(due.thread.id, 2).await.unwrap();
            }
        }
    };
    for round in 0..6 {
        let sends = futures_util::future::join_all((0..24).map(send));
        let deletes = futures_util::future::join_all((0..10).map(delete));
        tokio::join!(sends, deletes);
        if round % 2 == 0 {
            let active = "SELECT count(*) FROM runs r JOIN threads t ON t.id = r.thread_id WHERE t.lifecycle = \
                          'deleting' AND r.status IN ('in_progress', 'requires_action')";
            assert_eq!(database.number(active).await, 0);
        }
    }
    let last = erase_user(&keys[0]);
    while replicas[0].begin_deletion(&last, 100).await.unwrap() > 0 {}
    database
        .execute("UPDATE threads SET due_at = created_at WHERE lifecycle = 'deleting'")
        .await;
    for due in replicas[0].lease_due_threads(1000, HOUR).await.unwrap() {
        gone_upstream(&replicas[0], due.thread.id).await;
        while !replicas[0].conclude(due.thread.id, 50).await.unwrap() {}
    }
    for table in ["threads", "runs", "messages", "run_events"] {
        assert_eq!(
            database
                .number(&format!("SELECT count(*) FROM {table}"))
                .await,
            0,
            "{table}"
        );
    }
    assert_eq!(
        database
            .number("SELECT count(*) FROM deletions WHERE finished_at IS NULL")
            .await,
        0
    );
    for store in replicas {
        store.close().await;
    }
}

async fn unacknowledged_upstream_requests_are_counted(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let thread = turn.thread.id;
    assert_eq!(store.unacknowledged_requests(thread).await.unwrap(), 0);
    assert!(store.sends_again(&turn.lease).await.unwrap());
    assert!(store.sends_again(&turn.lease).await.unwrap());
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    assert!(
        !store.sends_again(&stale).await.unwrap(),
        "another replica owns the run"
    );
    assert_eq!(store.unacknowledged_requests(thread).await.unwrap(), 2);
    let unacknowledged_requests = RunEnd {
        unacknowledged_requests: 1,
        ..completed(Some("hi"))
    };
    closed(
        store
            .finish(&turn.lease, unacknowledged_requests.clone())
            .await
            .unwrap(),
    );
    assert!(
        !store.sends_again(&turn.lease).await.unwrap(),
        "the run is over"
    );
    let next = started(store.admit(admission(&key)).await.unwrap());
    closed(
        store
            .finish(&next.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    assert_eq!(store.unacknowledged_requests(thread).await.unwrap(), 3);
}
