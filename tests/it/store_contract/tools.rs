//! Runs that wait for tool outputs, requests of other replicas, and the log.

use threadkeeper::domain::{LoggedEvent, ThreadState, ToolOutput, UpstreamRunId, Usage};
use threadkeeper::store::{Answered, Paused, Request, Waiting};

use super::*;

on_every_backend!(
    pause_keeps_thread_occupied,
    wait_for_tool_outputs_has_its_own_deadline,
    pause_is_idempotent,
    pause_requires_active_run,
    tool_outputs_must_match_pending_calls,
    tool_outputs_after_deadline_or_cancel_are_refused,
    concurrent_tool_outputs_are_accepted_once,
    tool_call_with_nul_characters_can_be_answered,
    run_can_pause_repeatedly,
    requests_reach_run_owner_until_fulfilled,
    paused_run_can_finish,
    event_log_is_read_in_batches,
);

fn waiting(paused: Paused) -> Waiting {
    match paused {
        Paused::Waiting(waiting) => *waiting,
        other => panic!("expected a waiting run, not {other:?}"),
    }
}

fn resumed(answered: Answered) -> Waiting {
    match answered {
        Answered::Resumed(waiting) => *waiting,
        other => panic!("expected a resumed run, not {other:?}"),
    }
}

async fn pause_keeps_thread_occupied(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (next, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let wanted = pause(&["call_1", "call_2"], 0);
    let paused = waiting(store.pause(&turn.lease, &wanted).await.unwrap());

    assert_eq!(
        (paused.thread.id, paused.thread.run_count),
        (turn.thread.id, 2)
    );
    assert_eq!(
        (paused.activity.state, paused.activity.queue_depth),
        (ThreadState::RequiresAction, 1)
    );
    assert_eq!(paused.run.status, RunStatus::RequiresAction);
    assert_eq!(
        paused.run.required_action.as_ref(),
        Some(&wanted.required_action)
    );
    assert_eq!(paused.run.upstream_run_id, wanted.upstream_run_id);
    assert_eq!(paused.run.usage, wanted.usage);
    assert_eq!(paused.run.deadline_at, turn.run.deadline_at);
    assert_eq!(
        newest_thread(store, &key).await.unwrap(),
        (paused.thread, paused.activity)
    );
    assert_eq!(
        store.run(&key, turn.run.id).await.unwrap().unwrap(),
        (paused.run, None)
    );
    assert_eq!(
        store.start_queued(&next).await.unwrap(),
        QueuedStart::NotYet
    );
    assert_eq!(
        store.start_queued(&turn.lease).await.unwrap(),
        QueuedStart::Lost
    );
    check_invariants(database).await;
}

async fn wait_for_tool_outputs_has_its_own_deadline(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let short = Pause {
        wait: Duration::from_secs(20),
        ..pause(&["call_1"], 0)
    };
    let paused = waiting(store.pause(&turn.lease, &short).await.unwrap());
    let (own, wait) = (
        turn.run.deadline_at.unwrap(),
        paused.run.deadline_at.unwrap(),
    );
    let earlier = (own - wait).num_seconds();
    assert!(
        (30..=40).contains(&earlier),
        "the run may take a minute: {earlier}"
    );
    let answer = answer(&["call_1"]);
    let answered = store
        .answer_tools(&key, turn.run.id, &answer)
        .await
        .unwrap();
    assert_eq!(resumed(answered).run.deadline_at, Some(own));
}

async fn pause_is_idempotent(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let request = admission(&key);
    let turn = started(store.admit(request.clone()).await.unwrap());
    let first = pause(&["call_1"], 0);
    let paused = waiting(store.pause(&turn.lease, &first).await.unwrap());
    assert_eq!(
        waiting(store.pause(&turn.lease, &first).await.unwrap()),
        paused
    );

    // The outputs arrived before the repeat, so the run does not wait again.
    let answer = answer(&["call_1"]);
    let answered = resumed(
        store
            .answer_tools(&key, turn.run.id, &answer)
            .await
            .unwrap(),
    );
    assert_eq!(
        waiting(store.pause(&turn.lease, &first).await.unwrap()),
        answered
    );
    let resume = Request::Resume {
        run: turn.run.id,
        outputs: answer.outputs,
    };
    assert_eq!(store.requests(request.replica).await.unwrap(), [resume]);
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), [first.events]);
}

async fn pause_requires_active_run(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (next, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let calls = pause(&["call_1"], 0);
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    assert_eq!(store.pause(&stale, &calls).await.unwrap(), Paused::Lost);
    assert_eq!(
        store.pause(&next, &calls).await.unwrap(),
        Paused::Lost,
        "the run has not started"
    );
    waiting(store.pause(&turn.lease, &calls).await.unwrap());
    let others = pause(&["call_2"], 5);
    assert_eq!(
        store.pause(&turn.lease, &others).await.unwrap(),
        Paused::Lost,
        "the run waits for other calls"
    );

    store
        .request_cancel(&key, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.pause(&turn.lease, &calls).await.unwrap(),
        Paused::Cancelling
    );
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(
        store.pause(&turn.lease, &calls).await.unwrap(),
        Paused::Lost,
        "the run has ended"
    );

    let turn = started_from_queue(store.start_queued(&next).await.unwrap());
    store
        .request_cancel(&key, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.pause(&turn.lease, &calls).await.unwrap(),
        Paused::Cancelling
    );
    assert_eq!(
        store.events(turn.run.id, 0).await.unwrap(),
        [],
        "no event was recorded"
    );
}

async fn tool_outputs_must_match_pending_calls(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let fitting = answer(&["call_1", "call_2"]);
    let id = turn.run.id;
    assert_eq!(
        store.answer_tools(&key, id, &fitting).await.unwrap(),
        Answered::NotWaiting,
        "the run does not wait yet"
    );
    let paused = waiting(
        store
            .pause(&turn.lease, &pause(&["call_1", "call_2"], 0))
            .await
            .unwrap(),
    );
    for other in [
        answer(&["call_1"]),
        answer(&["call_2", "call_1"]),
        answer(&["call_1", "call_2", "call_3"]),
    ] {
        assert_eq!(
            store.answer_tools(&key, id, &other).await.unwrap(),
            Answered::NotWaiting
        );
    }
    assert_eq!(
        store
            .answer_tools(&user("bob"), id, &fitting)
            .await
            .unwrap(),
        Answered::NotWaiting
    );
    assert_eq!(
        store
            .answer_tools(&key, RunId::new(), &fitting)
            .await
            .unwrap(),
        Answered::NotWaiting
    );
    assert_eq!(
        store.run(&key, id).await.unwrap().unwrap(),
        (paused.run, None)
    );
    resumed(store.answer_tools(&key, id, &fitting).await.unwrap());
}

async fn tool_outputs_after_deadline_or_cancel_are_refused(database: &TestDatabase, store: &Store) {
    let (key, other) = (user("alice"), user("bob"));
    let calls = pause(&["call_1"], 0);
    let turn = started(store.admit(admission(&key)).await.unwrap());
    waiting(store.pause(&turn.lease, &calls).await.unwrap());
    database
        .execute("UPDATE runs SET deadline_at = started_at")
        .await;
    let late = store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert_eq!(
        late,
        Answered::NotWaiting,
        "the deadline of the run has passed"
    );
    assert_eq!(
        store
            .run(&key, turn.run.id)
            .await
            .unwrap()
            .unwrap()
            .0
            .required_action,
        Some(calls.required_action.clone())
    );

    let turn = started(store.admit(admission(&other)).await.unwrap());
    waiting(store.pause(&turn.lease, &calls).await.unwrap());
    store
        .request_cancel(&other, turn.run.id)
        .await
        .unwrap()
        .unwrap();
    let late = store
        .answer_tools(&other, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert_eq!(late, Answered::NotWaiting, "a cancel is requested");
}

async fn concurrent_tool_outputs_are_accepted_once(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    queued(store.admit(admission(&key)).await.unwrap());
    waiting(
        store
            .pause(&turn.lease, &pause(&["call_1"], 0))
            .await
            .unwrap(),
    );
    let answer = answer(&["call_1"]);
    let answers = (0..8).map(|_| store.answer_tools(&key, turn.run.id, &answer));
    let answers: Vec<_> = futures_util::future::join_all(answers).await;
    let mut taken = answers
        .into_iter()
        .map(Result::unwrap)
        .filter(|it| *it != Answered::NotWaiting);
    let resumed = resumed(taken.next().unwrap());
    assert_eq!(taken.next(), None);
    assert_eq!(
        (resumed.run.status, &resumed.run.required_action),
        (RunStatus::InProgress, &None)
    );
    assert_eq!(
        (resumed.activity.state, resumed.activity.queue_depth),
        (ThreadState::Active, 1)
    );
    assert_eq!(
        newest_thread(store, &key).await.unwrap(),
        (resumed.thread, resumed.activity)
    );
    assert_eq!(
        store.run(&key, turn.run.id).await.unwrap().unwrap().0,
        resumed.run
    );
    check_invariants(database).await;
}

async fn tool_call_with_nul_characters_can_be_answered(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let mut odd = pause(&["call_1"], 0);
    odd.required_action.tool_calls[0]
        .arguments
        .push_str("\0 \u{fffd} \\u0000 \\\"");
    let paused = waiting(store.pause(&turn.lease, &odd).await.unwrap());
    // The caller answers the call as it was shown.
    let shown = paused.run.required_action.unwrap();
    let outputs = vec![ToolOutput::text("call_1", "\0")];
    let answer = ToolAnswer {
        expected: shown,
        outputs,
        idempotency: None,
    };
    resumed(
        store
            .answer_tools(&key, turn.run.id, &answer)
            .await
            .unwrap(),
    );
}

async fn run_can_pause_repeatedly(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let request = admission(&key);
    let turn = started(store.admit(request.clone()).await.unwrap());
    let id = |call: &str| Some(UpstreamRunId(format!("resp_{call}")));
    // The id of the last response is not known.
    for (call, first, upstream_run_id) in [
        ("call_1", 0, id("call_1")),
        ("call_2", 4, id("call_2")),
        ("call_3", 8, None),
    ] {
        let usage = Some(Usage {
            input_tokens: 1,
            output_tokens: 2,
            total_tokens: first.try_into().unwrap(),
            ..Usage::default()
        });
        let pause = Pause {
            upstream_run_id,
            usage,
            ..pause(&[call], first)
        };
        let paused = waiting(store.pause(&turn.lease, &pause).await.unwrap());
        assert_eq!(
            paused.run.upstream_run_id,
            pause.upstream_run_id.or(id("call_2"))
        );
        assert_eq!(paused.run.usage, usage);
        assert_eq!(
            store.requests(request.replica).await.unwrap(),
            [],
            "the last outputs were sent"
        );
        let answer = answer(&[call]);
        resumed(
            store
                .answer_tools(&key, turn.run.id, &answer)
                .await
                .unwrap(),
        );
        let resume = Request::Resume {
            run: turn.run.id,
            outputs: answer.outputs,
        };
        assert_eq!(store.requests(request.replica).await.unwrap(), [resume]);
    }
    let finished = closed(
        store
            .finish(&turn.lease, completed(Some("done")))
            .await
            .unwrap(),
    );
    assert_eq!(finished.run.upstream_run_id, id("call_2"));
    assert_eq!(store.requests(request.replica).await.unwrap(), []);
    check_invariants(database).await;
}

async fn requests_reach_run_owner_until_fulfilled(_: &TestDatabase, store: &Store) {
    let (me, other) = (ReplicaId::new(), ReplicaId::new());
    let (a, b, c) = (user("a"), user("b"), user("c"));
    let mine = started(
        store
            .admit(Admission {
                replica: me,
                ..admission(&a)
            })
            .await
            .unwrap(),
    );
    let (waits, ..) = queued(
        store
            .admit(Admission {
                replica: me,
                ..admission(&a)
            })
            .await
            .unwrap(),
    );
    let tools = started(
        store
            .admit(Admission {
                replica: me,
                ..admission(&b)
            })
            .await
            .unwrap(),
    );
    let others = started(
        store
            .admit(Admission {
                replica: other,
                ..admission(&c)
            })
            .await
            .unwrap(),
    );
    assert_eq!(store.requests(me).await.unwrap(), []);

    store
        .request_cancel(&a, mine.run.id)
        .await
        .unwrap()
        .unwrap();
    let cancel = |run, discard| Request::Cancel { run, discard };
    assert_eq!(
        store.requests(me).await.unwrap(),
        [cancel(mine.run.id, false)]
    );
    store.cancel_active(&waits, true).await.unwrap().unwrap();
    assert_eq!(
        store.requests(me).await.unwrap(),
        [cancel(mine.run.id, true)]
    );
    let discarded = RunEnd {
        status: RunStatus::Cancelled,
        discard: true,
        ..completed(None)
    };
    closed(store.finish(&mine.lease, discarded.clone()).await.unwrap());
    assert_eq!(store.requests(me).await.unwrap(), []);

    waiting(
        store
            .pause(&tools.lease, &pause(&["call_1"], 0))
            .await
            .unwrap(),
    );
    store
        .request_cancel(&c, others.run.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.requests(me).await.unwrap(),
        [],
        "outputs without a request, and another replica's run, do not count"
    );
    let answer = answer(&["call_1"]);
    resumed(store.answer_tools(&b, tools.run.id, &answer).await.unwrap());
    let resume = Request::Resume {
        run: tools.run.id,
        outputs: answer.outputs,
    };
    assert_eq!(store.requests(me).await.unwrap(), [resume]);
    // A cancel replaces the request to continue.
    store
        .request_cancel(&b, tools.run.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        store.requests(me).await.unwrap(),
        [cancel(tools.run.id, false)]
    );
    assert_eq!(
        store.requests(other).await.unwrap(),
        [cancel(others.run.id, false)]
    );
}

async fn paused_run_can_finish(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    waiting(
        store
            .pause(&turn.lease, &pause(&["call_1"], 0))
            .await
            .unwrap(),
    );
    let end = RunEnd {
        status: RunStatus::Expired,
        ..completed(Some("as far as it came"))
    };
    let finished = closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    assert_eq!(
        (finished.run.status, &finished.run.required_action),
        (RunStatus::Expired, &None)
    );
    assert_eq!(
        finished.run.upstream_run_id,
        pause(&[], 0).upstream_run_id,
        "the run keeps what it had"
    );
    assert_eq!(finished.activity.state, ThreadState::Idle);
    let late = store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert_eq!(late, Answered::NotWaiting);
    check_invariants(database).await;
}

async fn event_log_is_read_in_batches(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let delta = |text: &str| LoggedEvent::Delta(text.into());
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), []);
    assert_eq!(store.events(RunId::new(), 0).await.unwrap(), []);

    let first = pause(&["call_1"], 0);
    let end_of_first = first.events.end();
    assert_eq!(end_of_first, 12, "one event, ten bytes of text, one event");
    waiting(store.pause(&turn.lease, &first).await.unwrap());
    resumed(
        store
            .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
            .await
            .unwrap(),
    );
    let rest = |last| EventBatch {
        first: end_of_first,
        events: vec![delta("more \"\u{1f980}\""), delta("queued"), delta(last)],
    };
    let end = RunEnd {
        events: rest("a\0b"),
        ..completed(Some("hi"))
    };
    for _ in 0..2 {
        closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    }
    // A character that cannot be stored is replaced by one of the same length.
    let both = [first.events, rest("a\u{1a}b")];
    assert_eq!(both[1].end(), 32);
    for (from, skipped) in [
        (0, 0),
        (1, 0),
        (11, 0),
        (12, 1),
        (31, 1),
        (32, 1),
        (i64::MAX, 1),
    ] {
        assert_eq!(
            store.events(turn.run.id, from).await.unwrap(),
            both[skipped..],
            "from {from}"
        );
    }

    // For a run without events, the batch says which number follows the transcript's events.
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let end = RunEnd {
        events: EventBatch {
            first: 1,
            events: vec![],
        },
        ..completed(None)
    };
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), [end.events]);
}
