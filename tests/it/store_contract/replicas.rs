//! Sessions of replicas, and the runs of dead replicas.

use std::time::Duration;

use threadkeeper::domain::{RunStatus, UpstreamThreadId};
use threadkeeper::store::{OrphanedRun, Pruning};

use super::*;

on_every_backend!(
    only_dead_replicas_leave_orphans,
    orphans_are_adopted_in_order_and_batches,
    lapsed_replica_session_can_be_renewed,
    stale_fence_cannot_write,
    concurrent_adopters_share_orphans,
    replica_adopts_its_own_stray_runs,
    orphan_carries_its_run_state,
    run_taken_over_elsewhere_is_reported,
    renewal_reports_peers_and_database_time,
    released_run_is_adoptable_immediately,
    adopted_merged_run_keeps_message_order,
    long_expired_replica_sessions_are_pruned,
);

const ALIVE: Duration = Duration::from_mins(1);

/// Registers a replica and starts its run on the key.
async fn busy(store: &Store, key: &ConversationKey, replica: ReplicaId) -> StartedRun {
    store
        .renew_replica(replica, "127.0.0.1:1", ALIVE)
        .await
        .unwrap();
    started(
        store
            .admit(Admission {
                replica,
                ..admission(key)
            })
            .await
            .unwrap(),
    )
}

fn runs(orphans: &[OrphanedRun]) -> Vec<RunId> {
    orphans.iter().map(|orphan| orphan.run.id).collect()
}

async fn only_dead_replicas_leave_orphans(_: &TestDatabase, store: &Store) {
    let (alive, retired, lapsed, me) = (
        ReplicaId::new(),
        ReplicaId::new(),
        ReplicaId::new(),
        ReplicaId::new(),
    );
    busy(store, &user("a"), alive).await;
    let of_retired = busy(store, &user("b"), retired).await;
    let of_lapsed = busy(store, &user("c"), lapsed).await;
    let of_unknown = started(store.admit(admission(&user("d"))).await.unwrap());
    let done = busy(store, &user("e"), retired).await;
    closed(store.finish(&done.lease, completed(None)).await.unwrap());
    store.renew_replica(me, "127.0.0.1:2", ALIVE).await.unwrap();
    store.retire_replica(retired).await.unwrap();
    store
        .renew_replica(lapsed, "127.0.0.1:1", Duration::ZERO)
        .await
        .unwrap();

    let orphans = store.adopt_orphans(me, &[], 100).await.unwrap();
    assert_eq!(
        runs(&orphans),
        [of_retired.run.id, of_lapsed.run.id, of_unknown.run.id]
    );
    for (orphan, before) in orphans.iter().zip([&of_retired, &of_lapsed, &of_unknown]) {
        assert_eq!((&orphan.run, &orphan.thread), (&before.run, &before.thread));
        assert_eq!(orphan.lease.run_id, before.run.id);
        assert!(orphan.lease.fence > before.lease.fence);
    }
    assert_eq!(
        store.adopt_orphans(me, &runs(&orphans), 100).await.unwrap(),
        [],
        "the runs have an owner again"
    );
}

async fn orphans_are_adopted_in_order_and_batches(database: &TestDatabase, store: &Store) {
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let (first, second) = (user("a"), user("b"));
    let mut wanted = vec![busy(store, &first, dead).await.run.id];
    let other = busy(store, &second, dead).await.run.id;
    for _ in 0..4 {
        let (_, _, run, _) = queued(
            store
                .admit(Admission {
                    replica: dead,
                    ..admission(&first)
                })
                .await
                .unwrap(),
        );
        wanted.push(run.id);
    }
    wanted.push(other);
    store.retire_replica(dead).await.unwrap();
    store.renew_replica(me, "127.0.0.1:2", ALIVE).await.unwrap();

    let mut adopted = vec![];
    for expected in [2, 2, 2, 0] {
        let part = store.adopt_orphans(me, &runs(&adopted), 2).await.unwrap();
        assert_eq!(part.len(), expected);
        adopted.extend(part);
    }
    assert_eq!(runs(&adopted), wanted);
    // The new owner can continue the run.
    let end = RunEnd {
        status: RunStatus::Failed,
        ..completed(None)
    };
    for orphan in &adopted {
        if orphan.run.status == RunStatus::Queued {
            started_from_queue(store.start_queued(&orphan.lease).await.unwrap());
        }
        closed(store.finish(&orphan.lease, end.clone()).await.unwrap());
    }
    assert_eq!(transcript(store, &first).await.len(), 5);
    check_invariants(database).await;
}

async fn lapsed_replica_session_can_be_renewed(_: &TestDatabase, store: &Store) {
    let (late, me) = (ReplicaId::new(), ReplicaId::new());
    let turn = busy(store, &user("a"), late).await;
    store
        .renew_replica(late, "127.0.0.1:1", Duration::ZERO)
        .await
        .unwrap();
    // The renewal is in time, since no replica has taken the runs over yet.
    store
        .renew_replica(late, "127.0.0.1:1", ALIVE)
        .await
        .unwrap();
    assert_eq!(store.adopt_orphans(me, &[], 100).await.unwrap(), []);
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
}

async fn stale_fence_cannot_write(database: &TestDatabase, store: &Store) {
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let key = user("a");
    let turn = busy(store, &key, dead).await;
    let (waiting, ..) = queued(
        store
            .admit(Admission {
                replica: dead,
                ..admission(&key)
            })
            .await
            .unwrap(),
    );
    store.retire_replica(dead).await.unwrap();
    store.renew_replica(me, "127.0.0.1:2", ALIVE).await.unwrap();
    let orphans = store.adopt_orphans(me, &[], 100).await.unwrap();
    let before = (
        newest_thread(store, &key).await,
        store.runs(&key, &first_page()).await.unwrap(),
    );

    // The replica was only paused, and continues.
    let id = UpstreamThreadId("conv_late".to_owned());
    assert!(!bind(store, &turn.lease, &id, false).await);
    assert_eq!(
        store
            .finish(&turn.lease, completed(Some("late")))
            .await
            .unwrap(),
        Closing::Lost
    );
    assert_eq!(
        store.finish(&waiting, completed(None)).await.unwrap(),
        Closing::Lost
    );
    assert_eq!(
        store.start_queued(&waiting).await.unwrap(),
        QueuedStart::Lost
    );
    let after = (
        newest_thread(store, &key).await,
        store.runs(&key, &first_page()).await.unwrap(),
    );
    assert_eq!(before, after);

    closed(
        store
            .finish(&orphans[0].lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    assert_eq!(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
        Closing::Lost
    );
    assert_eq!(
        store.start_queued(&waiting).await.unwrap(),
        QueuedStart::Lost
    );
    started_from_queue(store.start_queued(&orphans[1].lease).await.unwrap());
    assert_eq!(
        transcript(store, &key).await,
        ["user: hello", "assistant: hi", "user: hello"]
    );
    check_invariants(database).await;
}

async fn concurrent_adopters_share_orphans(_: &TestDatabase, store: &Store) {
    let mut wanted = vec![];
    for name in 0..20 {
        wanted.push(
            started(
                store
                    .admit(admission(&user(&name.to_string())))
                    .await
                    .unwrap(),
            )
            .run
            .id,
        );
    }
    let adopters: Vec<_> = (0..4).map(|_| ReplicaId::new()).collect();
    for id in &adopters {
        store
            .renew_replica(*id, "127.0.0.1:2", ALIVE)
            .await
            .unwrap();
    }
    let mut adopted = vec![];
    // An adopter skips a row that another one has locked, so a second round may be needed.
    while adopted.len() < wanted.len() {
        let working = runs(&adopted);
        let parts = adopters
            .iter()
            .map(|id| store.adopt_orphans(*id, &working, 3));
        let parts = futures_util::future::join_all(parts).await;
        let part: Vec<_> = parts.into_iter().flat_map(Result::unwrap).collect();
        assert!(
            !part.is_empty(),
            "runs are left, and none of them is locked"
        );
        adopted.extend(part);
    }
    let mut ids = runs(&adopted);
    ids.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(ids, wanted, "each run has one new owner");
}

async fn replica_adopts_its_own_stray_runs(database: &TestDatabase, store: &Store) {
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let lost = busy(store, &user("a"), dead).await.run.id;
    store.retire_replica(dead).await.unwrap();
    let own = busy(store, &user("b"), me).await.run.id;

    // The answer to this call is lost, so no task works on its runs.
    let first = store.adopt_orphans(me, &[own], 100).await.unwrap();
    assert_eq!(runs(&first), [lost]);
    let again = store.adopt_orphans(me, &[own], 100).await.unwrap();
    assert_eq!(
        (runs(&again), again[0].previous_owner),
        (vec![lost], Some(me))
    );
    assert!(again[0].lease.fence > first[0].lease.fence);
    assert_eq!(
        store.adopt_orphans(me, &[own, lost], 100).await.unwrap(),
        []
    );

    // An own run with its first fence may be an admission under way, until it is too old for
    // that.
    assert_eq!(store.adopt_orphans(me, &[lost], 100).await.unwrap(), []);
    database.age_runs(Duration::from_mins(1)).await;
    assert_eq!(
        store.adopt_orphans(me, &[lost, own], 100).await.unwrap(),
        [],
        "a task works on the run"
    );
    let stray = store.adopt_orphans(me, &[lost], 100).await.unwrap();
    assert_eq!((runs(&stray), stray[0].lease.fence), (vec![own], 2));
    // Another replica takes neither run over, since their owner lives.
    assert_eq!(
        store
            .adopt_orphans(ReplicaId::new(), &[], 100)
            .await
            .unwrap(),
        []
    );
}

async fn orphan_carries_its_run_state(database: &TestDatabase, store: &Store) {
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let (plain, waits, answered, late) = (user("a"), user("b"), user("c"), user("d"));
    let calls = pause(&["call_1"], 0);
    let first = busy(store, &plain, dead).await;
    queued(
        store
            .admit(Admission {
                replica: dead,
                ..admission(&plain)
            })
            .await
            .unwrap(),
    );
    let turn = busy(store, &waits, dead).await;
    store.pause(&turn.lease, &calls).await.unwrap();
    let turn = busy(store, &answered, dead).await;
    store.pause(&turn.lease, &calls).await.unwrap();
    store
        .answer_tools(&answered, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    let turn = busy(store, &late, dead).await;
    database
        .execute(&format!(
            "UPDATE runs SET deadline_at = started_at WHERE thread_id IN (SELECT id FROM threads \
         WHERE user_key = '{}')",
            late.user.as_str()
        ))
        .await;
    store
        .request_cancel(&late, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    store.retire_replica(dead).await.unwrap();
    store.renew_replica(me, "127.0.0.1:2", ALIVE).await.unwrap();

    let (said, outputs) = (text("let me see"), answer(&["call_1"]).outputs);
    let wanted = [
        (RunStatus::InProgress, true, vec![], None),
        (RunStatus::Queued, false, vec![], None),
        (RunStatus::RequiresAction, true, said.clone(), None),
        (RunStatus::InProgress, true, said, Some(outputs)),
        (RunStatus::Cancelling, false, vec![], None),
    ];
    let mut orphans = store.adopt_orphans(me, &[], 10).await.unwrap();
    assert_eq!(orphans.len(), wanted.len());
    for (orphan, (status, has_time, content, outputs)) in orphans.iter().zip(&wanted) {
        assert_eq!(
            (orphan.run.status, &orphan.content, &orphan.outputs),
            (*status, content, outputs)
        );
        assert!(
            orphan.time_left <= Duration::from_mins(1),
            "{:?}",
            orphan.time_left
        );
        assert_eq!(
            orphan.time_left > Duration::from_secs(30),
            *has_time,
            "{status}: {:?}",
            orphan.time_left
        );
        assert_eq!(
            orphan.time_left.is_zero(),
            !has_time,
            "{status}: {:?}",
            orphan.time_left
        );
    }
    // Runs that have started include the user's messages.
    assert_eq!(orphans[0].input, first.input);
    assert_eq!(orphans[1].input, []);
    assert!(orphans[2..].iter().all(|orphan| orphan.input.len() == 1));
    // The new owner gets the old owner's requests, and can continue.
    let requests = store.requests(me).await.unwrap();
    assert_eq!(requests.len(), 2, "{requests:?}");
    let orphan = orphans.remove(2);
    assert_eq!(
        orphan.run.required_action,
        Some(calls.required_action.clone())
    );
    store
        .answer_tools(&waits, orphan.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    let calls = pause(&["call_2"], calls.events.end());
    let paused = store.pause(&orphan.lease, &calls).await.unwrap();
    assert!(
        matches!(paused, threadkeeper::store::Paused::Waiting(_)),
        "{paused:?}"
    );
    check_invariants(database).await;
}

async fn run_taken_over_elsewhere_is_reported(_: &TestDatabase, store: &Store) {
    let (me, other) = (ReplicaId::new(), ReplicaId::new());
    let mine = busy(store, &user("a"), me).await.run.id;
    let (waiting, ..) = queued(
        store
            .admit(Admission {
                replica: me,
                ..admission(&user("a"))
            })
            .await
            .unwrap(),
    );
    let ended = busy(store, &user("b"), me).await;
    let others = busy(store, &user("c"), other).await.run.id;
    closed(store.finish(&ended.lease, completed(None)).await.unwrap());
    // A run that is not recorded yet does not count as taken over.
    let working = [mine, waiting.run_id, ended.run.id, RunId::new()];
    assert_eq!(store.runs_taken_over(me, &working).await.unwrap(), []);
    assert_eq!(store.runs_taken_over(me, &[]).await.unwrap(), []);
    assert_eq!(
        store.runs_taken_over(me, &[others, mine]).await.unwrap(),
        [others]
    );

    let taken = store
        .take_queued(other, waiting.run_id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.runs_taken_over(me, &working).await.unwrap(),
        [waiting.run_id]
    );
    closed(store.finish(&taken, completed(None)).await.unwrap());
    assert_eq!(
        store.runs_taken_over(me, &working).await.unwrap(),
        [waiting.run_id],
        "a run counts even if it has ended there"
    );
    assert_eq!(
        store
            .runs_taken_over(me, &[mine, ended.run.id])
            .await
            .unwrap(),
        [],
        "the answer includes named runs only"
    );

    store.retire_replica(me).await.unwrap();
    store.adopt_orphans(other, &[others], 10).await.unwrap();
    assert_eq!(
        store
            .runs_taken_over(me, &[mine, ended.run.id])
            .await
            .unwrap(),
        [mine]
    );
}

async fn renewal_reports_peers_and_database_time(database: &TestDatabase, store: &Store) {
    let (me, other) = (ReplicaId::new(), ReplicaId::new());
    for (ttl, has_peers) in [
        (None, false),
        (Some(ALIVE), true),
        (Some(Duration::ZERO), false),
    ] {
        if let Some(ttl) = ttl {
            store
                .renew_replica(other, "127.0.0.1:1", ttl)
                .await
                .unwrap();
        }
        for _ in 0..2 {
            let before = database.clock().await;
            let renewed = store.renew_replica(me, "127.0.0.1:2", ALIVE).await.unwrap();
            assert_eq!(renewed.has_peers, has_peers, "{ttl:?}");
            assert!(
                (before..=database.clock().await).contains(&renewed.now),
                "{renewed:?}"
            );
        }
    }
}

async fn released_run_is_adoptable_immediately(database: &TestDatabase, store: &Store) {
    let (me, other) = (ReplicaId::new(), ReplicaId::new());
    let key = user("a");
    let turn = busy(store, &key, me).await;
    let (waiting, ..) = queued(
        store
            .admit(Admission {
                replica: me,
                ..admission(&key)
            })
            .await
            .unwrap(),
    );
    let kept = busy(store, &user("b"), me).await;
    let ended = busy(store, &user("c"), me).await;
    closed(store.finish(&ended.lease, completed(None)).await.unwrap());
    let others = busy(store, &user("d"), other).await;

    store.release(&[]).await.unwrap();
    let stale = RunLease {
        fence: others.lease.fence - 1,
        ..others.lease
    };
    let leases = [waiting, turn.lease, ended.lease, stale];
    for _ in 0..2 {
        store.release(&leases).await.unwrap();
    }
    let working = [turn.run.id, waiting.run_id, kept.run.id, ended.run.id];
    let mut lost = store.runs_taken_over(me, &working).await.unwrap();
    lost.sort_unstable();
    assert_eq!(lost, [turn.run.id, waiting.run_id]);
    store
        .request_cancel(&key, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.requests(me).await.unwrap(),
        [],
        "no replica owns the run"
    );
    check_invariants(database).await;

    // The runs can be taken over although the session of their former owner lives.
    let orphans = store
        .adopt_orphans(other, &[others.run.id], 10)
        .await
        .unwrap();
    assert_eq!(runs(&orphans), [turn.run.id, waiting.run_id]);
    for (orphan, lease) in orphans.iter().zip([turn.lease, waiting]) {
        assert_eq!(orphan.previous_owner, None);
        assert!(orphan.lease.fence > lease.fence);
    }
    // A late release takes nothing from the new owner.
    store.release(&leases).await.unwrap();
    assert_eq!(
        store.adopt_orphans(me, &[kept.run.id], 10).await.unwrap(),
        []
    );
    assert_eq!(store.requests(other).await.unwrap().len(), 1);
    closed(store.finish(&kept.lease, completed(None)).await.unwrap());
    check_invariants(database).await;
}

async fn adopted_merged_run_keeps_message_order(_: &TestDatabase, store: &Store) {
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let key = user("a");
    let first = busy(store, &key, dead).await;
    let message = |content: &str| Admission {
        strategy: MultitaskStrategy::Merge,
        replica: dead,
        message: InputMessage {
            id: MessageId::new(),
            content: text(content),
        },
        ..admission(&key)
    };
    let (lease, ..) = queued(store.admit(message("one")).await.unwrap());
    for more in ["two", "three"] {
        assert!(matches!(
            store.admit(message(more)).await.unwrap(),
            Admitted::Merged { .. }
        ));
    }
    closed(
        store
            .finish(&first.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let turn = started_from_queue(store.start_queued(&lease).await.unwrap());
    store.retire_replica(dead).await.unwrap();
    let orphans = store.adopt_orphans(me, &[], 10).await.unwrap();
    assert_eq!(orphans[0].input, turn.input);
    let said: Vec<_> = orphans[0]
        .input
        .iter()
        .map(|message| message.content.clone())
        .collect();
    assert_eq!(said, [text("one"), text("two"), text("three")]);
}

async fn long_expired_replica_sessions_are_pruned(database: &TestDatabase, store: &Store) {
    let (old, lapsed, alive) = (ReplicaId::new(), ReplicaId::new(), ReplicaId::new());
    store
        .renew_replica(old, "127.0.0.1:1", Duration::ZERO)
        .await
        .unwrap();
    let long_ago = database.before("expires_at", Duration::from_hours(25));
    database
        .execute(&format!("UPDATE replicas SET expires_at = {long_ago}"))
        .await;
    store
        .renew_replica(lapsed, "127.0.0.1:2", Duration::ZERO)
        .await
        .unwrap();
    store
        .renew_replica(alive, "127.0.0.1:3", ALIVE)
        .await
        .unwrap();
    store.prune(&Pruning::default(), 10).await.unwrap();
    let left = database
        .texts("SELECT address FROM replicas ORDER BY address")
        .await;
    assert_eq!(left, ["127.0.0.1:2", "127.0.0.1:3"]);
}
