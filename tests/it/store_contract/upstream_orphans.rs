//! Upstream orphans: what an upstream has, or may have, besides the threads in use.

use threadkeeper::domain::{Baseline, Deletion, Omitted, RunRecovery, Trial};
use threadkeeper::store::{
    DeletionTarget, Made, ORPHAN_AFTER, OrphanKind, OrphanName, UpstreamOrphan,
};

use super::deletion::{gone_upstream, request};
use super::retention::{HOUR, earlier, thread};
use super::*;

on_every_backend!(
    unanswered_intent_becomes_due_after_timeout,
    upstream_creation_stays_pending_until_answer_or_dead_replica,
    intent_requires_active_lease,
    resolved_intent_leaves_only_created_upstream_thread,
    bound_upstream_thread_is_no_orphan,
    binding_under_lost_lease_leaves_upstream_orphan,
    recreated_upstream_thread_leaves_old_one_as_upstream_orphan,
    run_keeps_all_its_upstream_ids,
    upstream_ids_of_run_stay_on_one_page,
    upstream_orphan_is_leased_by_one_janitor,
    upstream_orphan_resolved_during_janitor_pass_stays_due,
    baseline_skips_carried_messages_without_anchor,
    upstream_thread_on_trial_is_deleted_after_its_run,
);

/// Starts a run of a live replica.
async fn run_of_live_replica(store: &Store, key: &ConversationKey) -> StartedRun {
    let admission = admission(key);
    store
        .renew_replica(admission.replica, "127.0.0.1:1", HOUR)
        .await
        .unwrap();
    started(store.admit(admission.clone()).await.unwrap())
}

fn upstream(id: &str) -> UpstreamThreadId {
    UpstreamThreadId(id.to_owned())
}

/// Returns the upstream ids of a thread's orphans.
async fn left(store: &Store, thread: ThreadId) -> Vec<Option<String>> {
    store
        .upstream_orphans(thread, true, 100)
        .await
        .unwrap()
        .into_iter()
        .map(|it| it.upstream_id)
        .collect()
}

async fn unanswered_intent_becomes_due_after_timeout(database: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let intent = OrphanId::new();
    for _ in 0..2 {
        assert!(store.intend(&turn.lease, intent).await.unwrap());
    }
    let expected = UpstreamOrphan {
        name: OrphanName::Row(intent),
        thread: turn.thread.id,
        upstream: "main".to_owned(),
        kind: OrphanKind::Thread,
        upstream_id: None,
        attempts: 0,
    };
    let expected = [expected];
    assert_eq!(
        store
            .upstream_orphans(turn.thread.id, false, 10)
            .await
            .unwrap(),
        expected
    );
    assert!(store.makes_upstream_thread(turn.thread.id).await.unwrap());
    assert_eq!(store.due_upstream_orphans(10).await.unwrap(), []);
    assert_eq!(store.lease_upstream_orphans(10, HOUR).await.unwrap(), []);
    earlier(database, "upstream_orphans", &["due_at"], ORPHAN_AFTER).await;
    assert_eq!(store.due_upstream_orphans(10).await.unwrap(), expected);
    assert!(
        !store.makes_upstream_thread(turn.thread.id).await.unwrap(),
        "the time for an answer is over"
    );
    assert_eq!(
        store.lease_upstream_orphans(10, HOUR).await.unwrap(),
        expected
    );
    assert!(
        !store.makes_upstream_thread(turn.thread.id).await.unwrap(),
        "the janitor's lease does not count as a creation"
    );
}

/// The run was cut off and has ended. A deletion of the thread waits until the id is known.
async fn upstream_creation_stays_pending_until_answer_or_dead_replica(
    database: &TestDatabase,
    store: &Store,
) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let thread = turn.thread.id;
    let makes = async || store.makes_upstream_thread(thread).await.unwrap();
    let intents = [OrphanId::new(), OrphanId::new(), OrphanId::new()];
    for intent in intents {
        assert!(store.intend(&turn.lease, intent).await.unwrap());
    }
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    store.resolve(intents[0], Made::Unknown).await.unwrap();
    assert!(makes().await);
    assert_eq!(
        store.due_upstream_orphans(10).await.unwrap(),
        [],
        "a request without an answer may still take effect"
    );
    let made = upstream("t_1");
    let binding = |intent| Binding {
        id: made.clone(),
        intent,
        seeded: true,
        carried_users: 0,
    };
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, binding(intents[1]))
            .await
            .unwrap(),
        Bound::Lost
    );
    assert!(makes().await);
    assert_eq!(
        store.due_upstream_orphans(10).await.unwrap()[0]
            .upstream_id
            .as_deref(),
        Some("t_1")
    );
    earlier(database, "replicas", &["expires_at"], HOUR).await;
    assert!(!makes().await, "the replica that sent the request is dead");
    // The thread is erased before the next answer.
    let key = turn.thread.key.clone();
    let erase = request(DeletionTarget::Key(key), Deletion::Erase);
    assert_eq!(store.begin_deletion(&erase, 10).await.unwrap(), 1);
    gone_upstream(store, thread).await;
    assert!(store.conclude(thread, 10).await.unwrap());
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, binding(intents[2]))
            .await
            .unwrap(),
        Bound::Unrecorded
    );
    check_invariants(database).await;
}

async fn intent_requires_active_lease(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = run_of_live_replica(store, &key).await;
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let other = RunLease {
        fence: turn.lease.fence + 1,
        ..turn.lease
    };
    let unknown = RunLease {
        run_id: RunId::new(),
        fence: 1,
    };
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    for lease in [turn.lease, other, unknown, waiting] {
        assert!(!store.intend(&lease, OrphanId::new()).await.unwrap());
    }
    assert_eq!(left(store, turn.thread.id).await, []);
}

async fn resolved_intent_leaves_only_created_upstream_thread(_: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let (nothing, something) = (OrphanId::new(), OrphanId::new());
    for intent in [nothing, something] {
        assert!(store.intend(&turn.lease, intent).await.unwrap());
    }
    store.resolve(nothing, Made::Nothing).await.unwrap();
    store
        .resolve(something, Made::Unused(&upstream("t_1")))
        .await
        .unwrap();
    store
        .resolve(OrphanId::new(), Made::Unused(&upstream("t_2")))
        .await
        .unwrap();
    assert_eq!(left(store, turn.thread.id).await, [Some("t_1".to_owned())]);
    assert_eq!(
        store.due_upstream_orphans(10).await.unwrap()[0].name,
        OrphanName::Row(something)
    );
}

async fn bound_upstream_thread_is_no_orphan(_: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let intent = OrphanId::new();
    assert!(store.intend(&turn.lease, intent).await.unwrap());
    let binding = Binding {
        id: upstream("t_1"),
        intent,
        seeded: false,
        carried_users: 0,
    };
    for _ in 0..2 {
        assert_eq!(
            store
                .bind_upstream_thread(&turn.lease, binding.clone())
                .await
                .unwrap(),
            Bound::Done
        );
        assert_eq!(left(store, turn.thread.id).await, []);
    }
    let found = thread(store, turn.thread.id).await.unwrap();
    assert_eq!(found.upstream_thread_id, Some(upstream("t_1")));
}

async fn binding_under_lost_lease_leaves_upstream_orphan(_: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let intent = OrphanId::new();
    assert!(store.intend(&turn.lease, intent).await.unwrap());
    let lost = RunLease {
        fence: turn.lease.fence + 1,
        ..turn.lease
    };
    for seeded in [false, true] {
        let binding = Binding {
            id: upstream("t_1"),
            intent,
            seeded,
            carried_users: 1,
        };
        assert_eq!(
            store
                .bind_upstream_thread(&lost, binding.clone())
                .await
                .unwrap(),
            Bound::Lost
        );
        assert_eq!(left(store, turn.thread.id).await, [Some("t_1".to_owned())]);
    }
    assert_eq!(
        store.due_upstream_orphans(10).await.unwrap()[0].name,
        OrphanName::Row(intent)
    );
    assert_eq!(thread(store, turn.thread.id).await.unwrap(), turn.thread);
    // An upstream thread that was bound before the lease was lost is in use.
    let intent = OrphanId::new();
    assert!(store.intend(&turn.lease, intent).await.unwrap());
    let binding = Binding {
        id: upstream("t_2"),
        intent,
        seeded: false,
        carried_users: 0,
    };
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, binding.clone())
            .await
            .unwrap(),
        Bound::Done
    );
    assert_eq!(
        store
            .bind_upstream_thread(&lost, binding.clone())
            .await
            .unwrap(),
        Bound::Lost
    );
    assert_eq!(left(store, turn.thread.id).await, [Some("t_1".to_owned())]);
}

async fn recreated_upstream_thread_leaves_old_one_as_upstream_orphan(
    database: &TestDatabase,
    store: &Store,
) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    for (id, seeded, expected) in [
        ("t_1", false, vec![]),
        ("t_1", true, vec![]),
        ("t_2", true, vec!["t_1"]),
        ("t_2", true, vec!["t_1"]),
        ("t_3", true, vec!["t_1", "t_2"]),
    ] {
        assert!(bind(store, &turn.lease, &upstream(id), seeded).await);
        let expected: Vec<_> = expected.into_iter().map(|id| Some(id.to_owned())).collect();
        assert_eq!(left(store, turn.thread.id).await, expected);
    }
    let due = store.lease_upstream_orphans(10, HOUR).await.unwrap();
    assert!(
        due.len() == 2
            && due
                .iter()
                .all(|it| it.kind == OrphanKind::Thread && it.upstream == "main")
    );
    check_invariants(database).await;
}

async fn run_keeps_all_its_upstream_ids(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = run_of_live_replica(store, &key).await;
    for (n, id) in (0..).zip(["resp_1", "resp_2", "resp_2", "resp_3"]) {
        let pause = Pause {
            upstream_run_id: Some(UpstreamRunId(id.to_owned())),
            ..pause(&["call_1"], n * 10)
        };
        for _ in 0..2 {
            store.pause(&turn.lease, &pause).await.unwrap();
        }
        store
            .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
            .await
            .unwrap();
    }
    let end = |id: Option<&str>| RunEnd {
        upstream_run_id: id.map(|id| UpstreamRunId(id.to_owned())),
        events: EventBatch {
            first: 100,
            events: vec![],
        },
        ..completed(None)
    };
    for _ in 0..2 {
        closed(
            store
                .finish(&turn.lease, end(Some("resp_4")))
                .await
                .unwrap(),
        );
    }
    let ids = |ids: &[&str]| {
        ids.iter()
            .map(|id| Some((*id).to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        left(store, turn.thread.id).await,
        ids(&["resp_1", "resp_2", "resp_3", "resp_4"])
    );
    let orphans = store
        .upstream_orphans(turn.thread.id, true, 10)
        .await
        .unwrap();
    assert!(
        orphans
            .iter()
            .all(|it| it.name == OrphanName::Run(turn.run.id) && it.kind == OrphanKind::Run)
    );
    assert_eq!(
        store
            .upstream_orphans(turn.thread.id, false, 10)
            .await
            .unwrap(),
        []
    );

    // One run keeps its id, and one ends without any.
    for last in [Some("run_1"), None] {
        let key = user(last.unwrap_or("none"));
        let turn = self::run_of_live_replica(store, &key).await;
        let pause = Pause {
            upstream_run_id: Some(UpstreamRunId("run_1".to_owned())),
            ..pause(&["call_1"], 0)
        };
        store.pause(&turn.lease, &pause).await.unwrap();
        closed(store.finish(&turn.lease, end(last)).await.unwrap());
        assert_eq!(left(store, turn.thread.id).await, ids(&["run_1"]));
    }
}

async fn upstream_ids_of_run_stay_on_one_page(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    for n in 0..3 {
        let turn = run_of_live_replica(store, &key).await;
        let id = |round: i32| UpstreamRunId(format!("resp_{n}_{round}"));
        store
            .pause(
                &turn.lease,
                &Pause {
                    upstream_run_id: Some(id(1)),
                    ..pause(&["call_1"], 0)
                },
            )
            .await
            .unwrap();
        let mut end = RunEnd {
            upstream_run_id: Some(id(2)),
            ..completed(None)
        };
        end.events.first = 4;
        closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    }
    let made = newest_thread(store, &key).await.unwrap().0.id;
    for (limit, found) in [(1, 2), (2, 2), (3, 2), (4, 4), (5, 4), (6, 6)] {
        assert_eq!(
            store
                .upstream_orphans(made, true, limit)
                .await
                .unwrap()
                .len(),
            found,
            "{limit}"
        );
    }
}

async fn upstream_orphan_is_leased_by_one_janitor(database: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let mut intents = vec![];
    for _ in 0..5 {
        let intent = OrphanId::new();
        assert!(store.intend(&turn.lease, intent).await.unwrap());
        store
            .resolve(intent, Made::Unused(&upstream(&intent.to_string())))
            .await
            .unwrap();
        // Each orphan has been due longer than the next one.
        earlier(database, "upstream_orphans", &["due_at"], HOUR).await;
        intents.push(OrphanName::Row(intent));
    }
    let names =
        |found: Vec<UpstreamOrphan>| found.into_iter().map(|it| it.name).collect::<Vec<_>>();
    assert_eq!(
        names(store.due_upstream_orphans(2).await.unwrap()),
        intents[..2]
    );
    assert_eq!(
        names(store.lease_upstream_orphans(2, HOUR).await.unwrap()),
        intents[..2]
    );
    assert_eq!(
        names(store.lease_upstream_orphans(10, HOUR).await.unwrap()),
        intents[2..]
    );
    assert_eq!(store.lease_upstream_orphans(10, HOUR).await.unwrap(), []);
    earlier(database, "upstream_orphans", &["due_at"], HOUR * 2).await;
    let row = |name: &OrphanName| match name {
        OrphanName::Row(id) => *id,
        OrphanName::Run(_) => panic!("{name:?}"),
    };
    let id_of = |name: &OrphanName| row(name).to_string();
    store
        .reschedule_upstream_orphan(row(&intents[0]), Some(&id_of(&intents[0])), None)
        .await
        .unwrap();
    store
        .reschedule_upstream_orphan(row(&intents[1]), Some(&id_of(&intents[1])), Some(HOUR))
        .await
        .unwrap();
    assert_eq!(
        names(store.due_upstream_orphans(10).await.unwrap()),
        intents[2..]
    );
    earlier(database, "upstream_orphans", &["due_at"], HOUR * 2).await;
    let due = store.due_upstream_orphans(10).await.unwrap();
    let attempts = |name| {
        due.iter()
            .find(|it| it.name == intents[name])
            .map(|it| it.attempts)
    };
    assert_eq!(
        (attempts(0), attempts(1), attempts(2)),
        (None, Some(1), Some(0))
    );
}

/// The janitor looks for a thread of which only the intent is known. Meanwhile the answer to its
/// creation arrives.
async fn upstream_orphan_resolved_during_janitor_pass_stays_due(
    database: &TestDatabase,
    store: &Store,
) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    for n in 0..3 {
        let intent = OrphanId::new();
        assert!(store.intend(&turn.lease, intent).await.unwrap());
        earlier(database, "upstream_orphans", &["due_at"], HOUR).await;
        let claimed = store.lease_upstream_orphans(10, HOUR).await.unwrap();
        assert_eq!((claimed.len(), &claimed[0].upstream_id), (1, &None));
        store
            .resolve(intent, Made::Unused(&upstream(&format!("t_{n}"))))
            .await
            .unwrap();
        match n {
            0 => store
                .reschedule_upstream_orphan(intent, None, None)
                .await
                .unwrap(),
            1 => store
                .reschedule_upstream_orphan(intent, None, Some(HOUR))
                .await
                .unwrap(),
            _ => store.keep_upstream_orphan(intent, None).await.unwrap(),
        }
        let due = store.lease_upstream_orphans(10, HOUR).await.unwrap();
        assert_eq!(due.len(), 1, "{n}");
        assert_eq!(
            (due[0].upstream_id.clone(), due[0].attempts),
            (Some(format!("t_{n}")), 0)
        );
        store
            .reschedule_upstream_orphan(intent, due[0].upstream_id.as_deref(), None)
            .await
            .unwrap();
    }
}

async fn baseline_skips_carried_messages_without_anchor(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = run_of_live_replica(store, &key).await;
    let (id, other) = (upstream("t_1"), upstream("t_2"));
    let seed = |id: &UpstreamThreadId, carried_users| Binding {
        id: id.clone(),
        intent: OrphanId::new(),
        seeded: true,
        carried_users,
    };
    assert_eq!(
        store
            .bind_upstream_thread(&turn.lease, seed(&id, 3))
            .await
            .unwrap(),
        Bound::Done
    );
    assert_eq!(
        store.baseline(turn.run.id).await.unwrap(),
        Baseline {
            anchor: None,
            skip: 3
        }
    );
    // A binding that is not seeded does not change the skipped messages.
    assert!(bind(store, &turn.lease, &id, false).await);
    let mut end = completed(Some("hi"));
    end.reply.as_mut().unwrap().upstream_message_id = Some("m_1".to_owned());
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    let next = self::run_of_live_replica(store, &key).await;
    let anchor = Some("m_1".to_owned());
    assert_eq!(
        store.baseline(next.run.id).await.unwrap(),
        Baseline { anchor, skip: 0 }
    );
    assert_eq!(
        store
            .bind_upstream_thread(&next.lease, seed(&other, 2))
            .await
            .unwrap(),
        Bound::Done
    );
    assert_eq!(
        store.baseline(next.run.id).await.unwrap(),
        Baseline {
            anchor: None,
            skip: 2 + 1
        }
    );
}

async fn upstream_thread_on_trial_is_deleted_after_its_run(database: &TestDatabase, store: &Store) {
    let turn = run_of_live_replica(store, &user("alice")).await;
    let orphan = OrphanId::new();
    assert!(store.intend(&turn.lease, orphan).await.unwrap());
    let recovery = RunRecovery {
        recovery: None,
        answered: false,
        trial: Some(Trial {
            thread: upstream("trial"),
            orphan,
            users: 0,
            carried_users: 0,
        }),
        omitted: Omitted::default(),
    };
    for _ in 0..2 {
        assert_eq!(
            store.record_recovery(&turn.lease, &recovery).await.unwrap(),
            Bound::Done
        );
    }
    assert_eq!(store.due_upstream_orphans(10).await.unwrap(), []);
    earlier(database, "upstream_orphans", &["due_at"], HOUR * 2).await;
    assert_eq!(
        store.lease_upstream_orphans(10, HOUR).await.unwrap(),
        [],
        "the run may be at work there"
    );
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    let due = store.lease_upstream_orphans(10, HOUR).await.unwrap();
    assert_eq!(due.len(), 1);
    assert_eq!(due[0].upstream_id.as_deref(), Some("trial"));

    // A process that has lost the run leaves its trial to the janitor, or deletes it itself.
    assert_eq!(
        store.record_recovery(&turn.lease, &recovery).await.unwrap(),
        Bound::Lost
    );
    assert_eq!(store.due_upstream_orphans(10).await.unwrap().len(), 1);
    store.resolve(orphan, Made::Nothing).await.unwrap();
    assert_eq!(
        store.record_recovery(&turn.lease, &recovery).await.unwrap(),
        Bound::Unrecorded
    );
}
