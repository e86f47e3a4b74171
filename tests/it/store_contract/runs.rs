//! Runs from the queue to the end.

use threadkeeper::domain::{
    Role, RunError, RunErrorCode, RunStatus, ThreadState, UpstreamRunId, UpstreamThreadId, Usage,
};

use super::*;

on_every_backend!(
    runs_start_in_order_of_admission,
    start_requires_current_lease_of_unfinished_run,
    concurrent_start_calls_start_run_once,
    finish_returns_all_recorded_fields,
    finish_is_idempotent,
    conflicting_finish_changes_nothing,
    cancelled_queued_run_keeps_its_message,
    reply_with_nul_characters_finishes_run,
    upstream_thread_binding_persists,
    unknown_run_is_lost,
    database_refuses_second_active_run,
    dropped_call_is_atomic,
);

async fn runs_start_in_order_of_admission(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let say = |words: &str| Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: text(words),
        },
        ..admission(&key)
    };
    let first = started(store.admit(say("1")).await.unwrap());
    let (second, ..) = queued(store.admit(say("2")).await.unwrap());
    let (third, ..) = queued(store.admit(say("3")).await.unwrap());

    for waiting in [&second, &third] {
        assert_eq!(
            store.start_queued(waiting).await.unwrap(),
            QueuedStart::NotYet
        );
    }
    closed(
        store
            .finish(&first.lease, completed(Some("one")))
            .await
            .unwrap(),
    );
    assert_eq!(
        store.start_queued(&third).await.unwrap(),
        QueuedStart::NotYet,
        "the run before it is queued, too"
    );

    let turn = started_from_queue(store.start_queued(&second).await.unwrap());
    assert_eq!(
        (turn.lease, turn.run.status, turn.run.seq),
        (second, RunStatus::InProgress, 2)
    );
    assert_eq!((turn.input.len(), turn.thread.message_count), (1, 3));
    assert_eq!(
        turn.run.deadline_at.unwrap() - turn.run.started_at.unwrap(),
        chrono::TimeDelta::seconds(60)
    );
    assert_eq!(
        store.start_queued(&third).await.unwrap(),
        QueuedStart::NotYet
    );
    closed(store.finish(&second, completed(Some("two"))).await.unwrap());
    started_from_queue(store.start_queued(&third).await.unwrap());
    closed(
        store
            .finish(&third, completed(Some("three")))
            .await
            .unwrap(),
    );

    let wanted = [
        "user: 1",
        "assistant: one",
        "user: 2",
        "assistant: two",
        "user: 3",
        "assistant: three",
    ];
    assert_eq!(transcript(store, &key).await, wanted);
    check_invariants(database).await;
}

async fn start_requires_current_lease_of_unfinished_run(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    assert_eq!(
        started_from_queue(store.start_queued(&first.lease).await.unwrap()),
        first,
        "the run has started, and the start says so"
    );
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let stale = RunLease {
        fence: second.fence - 1,
        ..second
    };
    assert_eq!(store.start_queued(&stale).await.unwrap(), QueuedStart::Lost);
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    assert_eq!(
        store.start_queued(&first.lease).await.unwrap(),
        QueuedStart::Lost,
        "the run has ended"
    );
    assert_eq!(store.start_queued(&stale).await.unwrap(), QueuedStart::Lost);
    let turn = started_from_queue(store.start_queued(&second).await.unwrap());
    assert_eq!(
        started_from_queue(store.start_queued(&second).await.unwrap()),
        turn,
        "a start whose acknowledgement was lost can be repeated"
    );
    assert_eq!(store.start_queued(&stale).await.unwrap(), QueuedStart::Lost);
    closed(store.finish(&second, completed(None)).await.unwrap());
    assert_eq!(
        store.start_queued(&second).await.unwrap(),
        QueuedStart::Lost,
        "the run has ended"
    );
}

async fn concurrent_start_calls_start_run_once(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    let claims = futures_util::future::join_all((0..8).map(|_| store.start_queued(&second))).await;
    let turns: Vec<_> = claims
        .into_iter()
        .map(|claim| started_from_queue(claim.unwrap()))
        .collect();
    assert!(turns.iter().all(|turn| *turn == turns[0]), "{turns:#?}");
    assert_eq!(transcript(store, &key).await.len(), 2);
    check_invariants(database).await;
}

async fn finish_returns_all_recorded_fields(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    queued(store.admit(admission(&key)).await.unwrap());
    let end = RunEnd {
        status: RunStatus::Incomplete,
        error: Some(RunError {
            upstream_code: Some("context_length_exceeded".to_owned()),
            upstream_status: Some(400),
            ..RunError::new(RunErrorCode::UpstreamFailed, "too \"long\"")
        }),
        usage: Some(Usage {
            input_tokens: 3,
            output_tokens: 4,
            total_tokens: 7,
            ..Usage::default()
        }),
        upstream_run_id: Some(UpstreamRunId("resp_1".to_owned())),
        upstream_thread_id: Some(UpstreamThreadId("conv_1".to_owned())),
        reply: Some(Reply {
            id: MessageId::new(),
            content: vec![ContentPart::text("as far as"), ContentPart::refusal("no")],
            upstream_message_id: Some("msg_upstream".to_owned()),
            sync: UpstreamSync::Present,
        }),
        ..completed(None)
    };
    let finished = closed(store.finish(&turn.lease, end.clone()).await.unwrap());

    let reply = end.reply.as_ref().unwrap();
    let message = finished.message.clone().unwrap();
    assert_eq!((message.id, &message.content), (reply.id, &reply.content));
    assert_eq!((message.role, message.position), (Role::Assistant, 2));
    assert_eq!(
        (message.thread_id, message.run_id),
        (turn.thread.id, Some(turn.run.id))
    );
    assert_eq!(message.upstream_message_id, reply.upstream_message_id);
    assert_eq!(
        (finished.run.id, finished.run.status),
        (turn.run.id, end.status)
    );
    assert_eq!(
        (&finished.run.error, finished.run.usage),
        (&end.error, end.usage)
    );
    assert_eq!(finished.run.upstream_run_id, end.upstream_run_id);
    assert_eq!(finished.run.started_at, turn.run.started_at);
    assert!(finished.run.finished_at >= finished.run.started_at);
    assert_eq!(finished.thread.upstream_thread_id, end.upstream_thread_id);
    assert_eq!(
        (finished.thread.message_count, finished.thread.run_count),
        (2, 2)
    );
    assert_eq!(
        (finished.activity.state, finished.activity.queue_depth),
        (ThreadState::Idle, 1)
    );

    // Another request reads the same.
    assert_eq!(
        newest_thread(store, &key).await.unwrap(),
        (finished.thread, finished.activity)
    );
    assert_eq!(
        store.run(&key, turn.run.id).await.unwrap().unwrap(),
        (finished.run, finished.message)
    );
}

async fn finish_is_idempotent(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let end = completed(Some("hi"));
    let ends =
        futures_util::future::join_all((0..8).map(|_| store.finish(&turn.lease, end.clone())))
            .await;
    let answers: Vec<Finished> = ends.into_iter().map(|end| closed(end.unwrap())).collect();
    assert!(
        answers.iter().all(|answer| *answer == answers[0]),
        "{answers:#?}"
    );
    assert_eq!(answers[0].activity.state, ThreadState::Idle);
    assert_eq!(
        transcript(store, &key).await,
        ["user: hello", "assistant: hi"]
    );
    check_invariants(database).await;
}

async fn conflicting_finish_changes_nothing(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    assert_eq!(
        store.finish(&stale, completed(Some("hi"))).await.unwrap(),
        Closing::Lost
    );
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let failed = RunEnd {
        status: RunStatus::Failed,
        ..completed(Some("no"))
    };
    assert_eq!(
        store.finish(&turn.lease, failed.clone()).await.unwrap(),
        Closing::Lost
    );
    assert_eq!(
        store.finish(&stale, completed(Some("hi"))).await.unwrap(),
        Closing::Lost
    );
    assert_eq!(
        transcript(store, &key).await,
        ["user: hello", "assistant: hi"]
    );
    assert_eq!(
        store
            .run(&key, turn.run.id)
            .await
            .unwrap()
            .unwrap()
            .0
            .status,
        RunStatus::Completed
    );
}

async fn cancelled_queued_run_keeps_its_message(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let waiting = Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: text("never mind"),
        },
        ..admission(&key)
    };
    let (second, ..) = queued(store.admit(waiting.clone()).await.unwrap());
    let (third, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    let finished = closed(store.finish(&second, cancelled.clone()).await.unwrap());
    assert_eq!(
        (finished.run.status, finished.run.started_at),
        (RunStatus::Cancelled, None)
    );
    assert_eq!(
        (finished.activity.state, finished.activity.queue_depth),
        (ThreadState::Active, 1)
    );
    assert_eq!((finished.message, finished.thread.message_count), (None, 2));
    assert_eq!(
        closed(store.finish(&second, cancelled.clone()).await.unwrap()).thread,
        finished.thread
    );
    assert_eq!(
        store.start_queued(&second).await.unwrap(),
        QueuedStart::Lost
    );

    closed(
        store
            .finish(&first.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    started_from_queue(store.start_queued(&third).await.unwrap());
    let lines = transcript(store, &key).await;
    assert_eq!(
        lines,
        [
            "user: hello",
            "user: never mind",
            "assistant: hi",
            "user: hello"
        ]
    );
    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (page.data[1].id, page.data[1].run_id),
        (waiting.message.id, Some(second.run_id))
    );
    check_invariants(database).await;
}

async fn reply_with_nul_characters_finishes_run(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let error = Some(RunError::new(RunErrorCode::UpstreamFailed, "a\0b"));
    let end = RunEnd {
        status: RunStatus::Failed,
        error,
        ..completed(Some("x\0\\u0000\\\0"))
    };
    let finished = closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    assert_eq!(
        finished.message.unwrap().content,
        text("x\u{fffd}\\u0000\\\u{fffd}")
    );
    assert_eq!(finished.run.error.unwrap().message, "a\u{fffd}b");
}

async fn upstream_thread_binding_persists(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let id = UpstreamThreadId("conv_1".to_owned());
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    assert!(!bind(store, &stale, &id, false).await);
    assert!(
        !bind(store, &waiting, &id, false).await,
        "the run has not started"
    );
    assert_eq!(
        newest_thread(store, &key)
            .await
            .unwrap()
            .0
            .upstream_thread_id,
        None
    );
    assert!(bind(store, &turn.lease, &id, false).await);
    assert!(
        bind(store, &turn.lease, &id, false).await,
        "a repeat is harmless"
    );

    // A finish without an upstream thread does not change it.
    let finished = closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(finished.thread.upstream_thread_id.as_ref(), Some(&id));
    let late = UpstreamThreadId("conv_2".to_owned());
    assert!(
        !bind(store, &turn.lease, &late, false).await,
        "the run has ended"
    );
    let next = started_from_queue(store.start_queued(&waiting).await.unwrap());
    assert_eq!(next.thread.upstream_thread_id, Some(id));
}

async fn unknown_run_is_lost(_: &TestDatabase, store: &Store) {
    let lease = RunLease {
        run_id: RunId::new(),
        fence: 1,
    };
    assert_eq!(store.start_queued(&lease).await.unwrap(), QueuedStart::Lost);
    assert_eq!(
        store.finish(&lease, completed(None)).await.unwrap(),
        Closing::Lost
    );
    assert!(!bind(store, &lease, &UpstreamThreadId("x".to_owned()), false).await);
}

async fn database_refuses_second_active_run(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    queued(store.admit(admission(&key)).await.unwrap());
    for status in ["in_progress", "requires_action", "cancelling"] {
        let start = format!(
            "UPDATE runs SET status = '{status}', queued_input = NULL, started_at = created_at, deadline_at = created_at \
             WHERE seq = 2"
        );
        let error = database.try_execute(&start).await.unwrap_err();
        let kind = error
            .as_database_error()
            .map(sqlx::error::DatabaseError::kind);
        assert!(
            matches!(kind, Some(sqlx::error::ErrorKind::UniqueViolation)),
            "{status}: {error}"
        );
    }
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    check_invariants(database).await;
}

/// Drops calls after 0, 1, 2, … polls, at whichever step that is.
async fn dropped_call_is_atomic(database: &TestDatabase, store: &Store) {
    async fn drop_after<F: Future>(polls: usize, call: F) -> Option<F::Output> {
        let mut call = std::pin::pin!(call);
        for _ in 0..polls {
            if let Some(output) = futures_util::FutureExt::now_or_never(call.as_mut()) {
                return Some(output);
            }
            tokio::task::yield_now().await;
        }
        None
    }

    let key = user("alice");
    let (mut dropped, mut runs, mut lines) = (0, 0, 0);
    store.close().await;
    for polls in (0..60).step_by(2) {
        let request = admission(&key);
        let lease = RunLease {
            run_id: request.run_id,
            fence: 1,
        };
        let end = completed(Some("hi"));
        let store = database.store().await;
        dropped += usize::from(
            drop_after(polls, store.admit(request.clone()))
                .await
                .is_none(),
        );
        dropped += usize::from(
            drop_after(polls, store.finish(&lease, end.clone()))
                .await
                .is_none(),
        );
        // Closing waits for statements under way.
        store.close().await;

        let store = database.store().await;
        if let Closing::Finished(finished) = store.finish(&lease, end.clone()).await.unwrap() {
            runs += 1;
            lines += 2;
            assert_eq!(finished.run.seq, runs, "after {polls} polls");
            assert_eq!(finished.thread.message_count, lines, "after {polls} polls");
            assert_eq!(finished.message.unwrap().id, end.reply.unwrap().id);
        } else {
            assert_eq!(
                store.run(&key, request.run_id).await.unwrap(),
                None,
                "after {polls} polls"
            );
        }
        check_invariants(database).await;
        store.close().await;
    }
    assert!(dropped > 0, "no call was dropped");
}
