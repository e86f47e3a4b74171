//! Idempotency keys.

use std::time::Duration;

use threadkeeper::domain::{Lifecycle, MultitaskStrategy, RunError, RunErrorCode};
use threadkeeper::store::{Answered, Idempotency, Repeated};

use super::*;

on_every_backend!(
    idempotent_retry_stores_nothing,
    idempotency_key_resolves_to_its_run,
    merged_message_has_own_idempotency_key,
    refused_message_uses_no_idempotency_key,
    idempotent_retry_is_recognised_before_refusal,
    idempotency_key_is_scoped_to_conversation,
    idempotency_key_outlives_its_thread,
    idempotency_key_expires_after_ttl,
    admission_reuses_expired_idempotency_key,
    idempotency_key_of_unrecorded_run_is_released,
    tool_outputs_have_own_idempotency_key,
);

const DAY: Duration = Duration::from_hours(24);

fn once(key: &ConversationKey, idempotency_key: &str) -> Admission {
    Admission {
        idempotency: Some(idempotency(idempotency_key)),
        ..admission(key)
    }
}

async fn repeated(store: &Store, key: &ConversationKey, idempotency_key: &str) -> Option<Repeated> {
    store.repeated(key, idempotency_key, DAY).await.unwrap()
}

async fn idempotent_retry_stores_nothing(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(once(&key, "k")).await.unwrap());
    queued(store.admit(once(&key, "other")).await.unwrap());
    let before = newest_thread(store, &key).await;
    for strategy in MultitaskStrategy::ALL {
        let again = Admission {
            strategy: *strategy,
            ..once(&key, "k")
        };
        assert_eq!(
            store.admit(again.clone()).await.unwrap(),
            Admitted::Repeated,
            "{strategy}"
        );
        assert_eq!(
            store.run(&key, again.run_id).await.unwrap(),
            None,
            "{strategy}"
        );
    }
    assert_eq!(newest_thread(store, &key).await, before);

    // This also holds on a free thread, and for a key without a thread.
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(
        store.admit(once(&key, "k")).await.unwrap(),
        Admitted::Repeated
    );
    database.archive_threads().await;
    assert_eq!(
        store.admit(once(&key, "k")).await.unwrap(),
        Admitted::Repeated
    );
    assert_eq!(
        newest_thread(store, &key).await.unwrap().0.lifecycle,
        Lifecycle::Archived
    );
    assert_eq!(database.number("SELECT count(*) FROM runs").await, 2);
    started(store.admit(once(&key, "new")).await.unwrap());
    check_invariants(database).await;
}

async fn idempotency_key_resolves_to_its_run(_: &TestDatabase, store: &Store) {
    let key = topic("alice", "t");
    assert_eq!(repeated(store, &key, "k").await, None);
    let request_hash = std::array::from_fn(|n| u8::try_from(n * 8).unwrap());
    let used = Some(Idempotency {
        key: "k".to_owned(),
        request_hash,
    });
    let turn = started(
        store
            .admit(Admission {
                idempotency: used,
                ..admission(&key)
            })
            .await
            .unwrap(),
    );
    let found = repeated(store, &key, "k").await.unwrap();
    assert_eq!(
        found,
        Repeated {
            request_hash,
            thread: turn.thread,
            run: turn.run
        }
    );
    let (waiting, ..) = queued(store.admit(once(&key, "'; -- \u{1f980}")).await.unwrap());
    assert_eq!(
        repeated(store, &key, "'; -- \u{1f980}")
            .await
            .unwrap()
            .run
            .id,
        waiting.run_id
    );
    // The answer shows the run as it is now.
    let finished = closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let found = repeated(store, &key, "k").await.unwrap();
    assert_eq!(
        found,
        Repeated {
            request_hash,
            thread: finished.thread,
            run: finished.run
        }
    );
}

async fn merged_message_has_own_idempotency_key(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(once(&key, "a")).await.unwrap());
    let merge = |name| Admission {
        strategy: MultitaskStrategy::Merge,
        ..once(&key, name)
    };
    assert!(matches!(
        store.admit(merge("b")).await.unwrap(),
        Admitted::Merged { .. }
    ));
    assert_eq!(store.admit(merge("b")).await.unwrap(), Admitted::Repeated);
    assert_eq!(store.admit(merge("a")).await.unwrap(), Admitted::Repeated);
    for name in ["a", "b"] {
        assert_eq!(
            repeated(store, &key, name).await.unwrap().run.id,
            waiting.run_id
        );
    }
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    closed(store.finish(&waiting, cancelled.clone()).await.unwrap());
    assert_eq!(
        transcript(store, &key).await.len(),
        3,
        "each message is stored once"
    );
    check_invariants(database).await;
}

async fn refused_message_uses_no_idempotency_key(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let reject = || Admission {
        strategy: MultitaskStrategy::Reject,
        ..once(&key, "k")
    };
    assert_eq!(store.admit(reject()).await.unwrap(), Admitted::Busy);
    let elsewhere = Admission {
        upstream: "spare".to_owned(),
        ..once(&key, "k")
    };
    assert_eq!(
        store.admit(elsewhere.clone()).await.unwrap(),
        Admitted::OtherUpstream("main".to_owned())
    );
    assert_eq!(repeated(store, &key, "k").await, None);
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    started(store.admit(reject()).await.unwrap());
    check_invariants(database).await;
}

async fn idempotent_retry_is_recognised_before_refusal(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let reject = || Admission {
        strategy: MultitaskStrategy::Reject,
        ..once(&key, "k")
    };
    started(store.admit(reject()).await.unwrap());
    // Its own first attempt keeps the thread busy.
    assert_eq!(store.admit(reject()).await.unwrap(), Admitted::Repeated);
    let elsewhere = Admission {
        upstream: "spare".to_owned(),
        ..reject()
    };
    assert_eq!(
        store.admit(elsewhere.clone()).await.unwrap(),
        Admitted::Repeated
    );
}

async fn idempotency_key_is_scoped_to_conversation(_: &TestDatabase, store: &Store) {
    let tenant = TenantKey::try_from("other".to_owned()).unwrap();
    let keys = [
        user("alice"),
        user("bob"),
        session("alice", "x"),
        topic("alice", "x"),
        ConversationKey {
            tenant,
            ..user("alice")
        },
    ];
    for key in &keys {
        assert_eq!(repeated(store, key, "k").await, None, "{key:?}");
        let turn = started(store.admit(once(key, "k")).await.unwrap());
        assert_eq!(
            repeated(store, key, "k").await.unwrap().run,
            turn.run,
            "{key:?}"
        );
        assert_eq!(repeated(store, key, "K").await, None, "{key:?}");
    }
}

async fn idempotency_key_outlives_its_thread(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let with_ttl = |name| Admission {
        limits: limits(Duration::from_mins(1)),
        ..once(&key, name)
    };
    let old = started(store.admit(with_ttl("a")).await.unwrap());
    database.age_threads(Duration::from_mins(1)).await;
    // A repeat does not replace the expired thread.
    assert_eq!(
        store.admit(with_ttl("a")).await.unwrap(),
        Admitted::Repeated
    );
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 1);
    let fresh = started(store.admit(with_ttl("b")).await.unwrap());
    assert_ne!(fresh.thread.id, old.thread.id);
    assert_eq!(
        store.admit(with_ttl("a")).await.unwrap(),
        Admitted::Repeated
    );
    let found = repeated(store, &key, "a").await.unwrap();
    assert_eq!((found.thread.id, found.run), (old.thread.id, old.run));
    check_invariants(database).await;
}

async fn admission_reuses_expired_idempotency_key(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let once = |ttl| Admission {
        idempotency_ttl: ttl,
        ..once(&key, "k")
    };
    started(store.admit(once(DAY)).await.unwrap());
    database.age_keys(DAY, "k").await;
    assert_eq!(
        store.admit(once(DAY * 2)).await.unwrap(),
        Admitted::Repeated
    );
    let (again, ..) = queued(store.admit(once(DAY)).await.unwrap());
    assert_eq!(
        repeated(store, &key, "k").await.unwrap().run.id,
        again.run_id
    );
    assert_eq!(
        store.admit(once(DAY)).await.unwrap(),
        Admitted::Repeated,
        "the key is in use again"
    );

    let error = Some(RunError::new(RunErrorCode::NotRecorded, "x"));
    let refused = RunEnd {
        status: RunStatus::Failed,
        error,
        ..completed(None)
    };
    closed(
        store
            .finish(
                &RunLease {
                    run_id: again.run_id,
                    fence: 1,
                },
                refused,
            )
            .await
            .unwrap(),
    );
    let (last, ..) = queued(store.admit(once(DAY)).await.unwrap());
    assert_eq!(
        repeated(store, &key, "k").await.unwrap().run.id,
        last.run_id
    );
    check_invariants(database).await;
}

async fn idempotency_key_expires_after_ttl(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = started(store.admit(once(&key, "k")).await.unwrap());
    queued(store.admit(once(&key, "young")).await.unwrap());
    database.age_keys(DAY / 2, "k").await;
    assert_eq!(
        repeated(store, &key, "k").await.unwrap().run,
        old.run,
        "half of the time is left"
    );
    database.age_keys(DAY / 2, "k").await;
    for _ in 0..2 {
        assert_eq!(repeated(store, &key, "k").await, None);
    }
    assert!(repeated(store, &key, "young").await.is_some());
    let (again, ..) = queued(store.admit(once(&key, "k")).await.unwrap());
    assert_eq!(
        repeated(store, &key, "k").await.unwrap().run.id,
        again.run_id
    );
    // The caller decides how long a key is remembered.
    assert_eq!(
        store.repeated(&key, "young", Duration::ZERO).await.unwrap(),
        None
    );
    assert!(
        store
            .repeated(&key, "k", Duration::MAX)
            .await
            .unwrap()
            .is_some()
    );
}

async fn idempotency_key_of_unrecorded_run_is_released(database: &TestDatabase, store: &Store) {
    let (key, other) = (user("alice"), user("bob"));
    let failed = |code| RunEnd {
        status: RunStatus::Failed,
        error: Some(RunError::new(code, "its message names not_recorded")),
        ..completed(None)
    };
    for code in RunErrorCode::ALL {
        let turn = started(store.admit(once(&key, code.as_str())).await.unwrap());
        // The same key in another conversation stays in use, and so does another key in this one.
        let same = started(store.admit(once(&other, code.as_str())).await.unwrap());
        closed(store.finish(&same.lease, completed(None)).await.unwrap());
        let found = repeated(store, &key, code.as_str())
            .await
            .expect("the run has not failed yet");
        assert_eq!(found.run, turn.run, "{code}");
        let finished = closed(store.finish(&turn.lease, failed(*code)).await.unwrap());
        let found = repeated(store, &key, code.as_str())
            .await
            .map(|found| found.run);
        if *code != RunErrorCode::NotRecorded {
            assert_eq!(found, Some(finished.run), "{code}");
            continue;
        }
        assert_eq!(found, None);
        assert_eq!(
            repeated(store, &other, code.as_str()).await.unwrap().run.id,
            same.run.id
        );
        let again = started(store.admit(once(&key, code.as_str())).await.unwrap());
        assert_eq!(
            repeated(store, &key, code.as_str()).await.unwrap().run,
            again.run
        );
        closed(store.finish(&again.lease, completed(None)).await.unwrap());
        assert!(
            repeated(store, &key, code.as_str()).await.is_some(),
            "the new use is kept"
        );
    }
    for code in RunErrorCode::ALL {
        assert!(
            repeated(store, &key, code.as_str()).await.is_some(),
            "{code}"
        );
    }
    check_invariants(database).await;
}

async fn tool_outputs_have_own_idempotency_key(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(once(&key, "message")).await.unwrap());
    store
        .pause(&turn.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    let once = |name| ToolAnswer {
        idempotency: Some(idempotency(name)),
        ..answer(&["call_1"])
    };
    let other = ToolAnswer {
        expected: pause(&["call_2"], 0).required_action,
        ..once("answer")
    };
    assert_eq!(
        store.answer_tools(&key, turn.run.id, &other).await.unwrap(),
        Answered::NotWaiting
    );
    assert_eq!(
        repeated(store, &key, "answer").await,
        None,
        "a refusal uses no key"
    );
    assert_eq!(
        store
            .answer_tools(&key, turn.run.id, &once("message"))
            .await
            .unwrap(),
        Answered::Repeated
    );
    let (run, _) = store.run(&key, turn.run.id).await.unwrap().unwrap();
    assert_eq!(
        run.status,
        RunStatus::RequiresAction,
        "the thread is unchanged"
    );

    let answered = store
        .answer_tools(&key, turn.run.id, &once("answer"))
        .await
        .unwrap();
    assert!(matches!(answered, Answered::Resumed(_)), "{answered:?}");
    assert_eq!(
        store
            .answer_tools(&key, turn.run.id, &once("answer"))
            .await
            .unwrap(),
        Answered::Repeated
    );
    assert_eq!(
        store
            .answer_tools(&key, turn.run.id, &once("late"))
            .await
            .unwrap(),
        Answered::NotWaiting
    );
    let found = repeated(store, &key, "answer").await.unwrap();
    assert_eq!((found.run.id, found.request_hash), (turn.run.id, [7; 32]));
    assert_eq!(
        store
            .admit(Admission {
                idempotency: Some(idempotency("answer")),
                ..admission(&key)
            })
            .await
            .unwrap(),
        Admitted::Repeated
    );
}
