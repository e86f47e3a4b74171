//! The life of runs in situations that cannot be brought about over HTTP.

use std::num::NonZeroU32;

use threadkeeper::config::StoreConfig;
use threadkeeper::domain::{
    ContentPart, Message, MessageId, PageRequest, Run, ToolOutput, UpstreamSync, UpstreamThreadId,
    append_messages,
};
use threadkeeper::runs::{NewOutputs, Outcome, Resumed, Submitted};
use threadkeeper::store::{Admission, Admitted, InputMessage, QueuedStart, RunLease, ThreadName};

use tokio::task::JoinSet;

use super::*;
use crate::store_contract::completed;
use crate::support::gate::{Gate, Moment};
use crate::support::gateway::PATIENCE;
use crate::support::recording_proxy::{DatabaseTap, Steps};

/// Two stores on one database, as two processes have them.
struct Stores {
    database: TestDatabase,
    one: Arc<Store>,
    other: Arc<Store>,
}

impl Stores {
    /// Makes a process with the first store, and its upstream.
    async fn process(&self, chain: bool) -> (Process, Arc<Scripted>) {
        let upstream = Scripted::new(chain);
        (
            Process::alive(Arc::clone(&self.one), upstream.clone()).await,
            upstream,
        )
    }
}

/// Runs a case on both backends. On SQLite both stores are the same, since a file can be open
/// only once.
async fn on_both(case: impl AsyncFn(Stores)) {
    let database = TestDatabase::sqlite().await;
    let one = database.store().await;
    case(Stores {
        database,
        other: Arc::clone(&one),
        one,
    })
    .await;
    let database = TestDatabase::postgres().await;
    let (one, other) = (database.store().await, database.store().await);
    case(Stores {
        database,
        one,
        other,
    })
    .await;
}

/// Awaits something that must happen soon.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("the step ends in time")
}

async fn until(what: impl AsyncFn() -> bool) {
    soon(async {
        while !what().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

async fn ended(submitted: &Submitted) -> Arc<Outcome> {
    let mut from = 0;
    soon(async {
        loop {
            match submitted.follow.answer(from).await {
                Some(Answer::Ended(outcome)) => return outcome,
                Some(Answer::RequiresAction(_)) => from += 1,
                None => panic!("the log ended without the run's end"),
            }
        }
    })
    .await
}

async fn stored(store: &Store, run: &Run) -> Run {
    store.run(&key(), run.id).await.unwrap().unwrap().0
}

/// Returns the texts of the transcript and their sync states.
async fn transcript(store: &Store) -> Vec<(String, UpstreamSync)> {
    let page = PageRequest::<MessageId> {
        limit: 100,
        ascending: true,
        after: None,
        before: None,
    };
    let page = store
        .messages(ThreadName::Newest(&key()), false, &page)
        .await
        .unwrap()
        .unwrap();
    page.data
        .into_iter()
        .map(|message| (said(&message), message.sync))
        .collect()
}

fn said(message: &Message) -> String {
    let [ContentPart::Text { text, .. }] = &message.content[..] else {
        panic!("{message:?}")
    };
    text.clone()
}

fn lines(wanted: &[(&str, UpstreamSync)]) -> Vec<(String, UpstreamSync)> {
    wanted
        .iter()
        .map(|(text, sync)| ((*text).to_owned(), *sync))
        .collect()
}

/// A message that reaches the store past all processes.
fn admission(words: &str, strategy: MultitaskStrategy) -> Admission {
    let message = InputMessage {
        id: MessageId::new(),
        content: text(words),
    };
    Admission {
        strategy,
        message,
        ..crate::store_contract::admission(&key())
    }
}

async fn queue(store: &Store, words: &str, strategy: MultitaskStrategy) -> RunLease {
    match store.admit(admission(words, strategy)).await.unwrap() {
        Admitted::Queued { lease, .. } => lease,
        other => panic!("expected a queued run, since the thread is busy, not {other:?}"),
    }
}

#[tokio::test]
async fn draining_process_hands_over_run_awaiting_tool_outputs() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        let submitted = process.runs.submit(key(), message("ask")).await.unwrap();
        let waiting = match soon(submitted.follow.answer(0)).await {
            Some(Answer::RequiresAction(waiting)) => waiting,
            other => panic!("{other:?}"),
        };
        let next = process
            .runs
            .submit(key(), message("and then?"))
            .await
            .unwrap();
        let events = submitted
            .follow
            .events(0)
            .map(|(_, event)| event)
            .collect::<Vec<_>>();
        // The stop ends the queued run, but not the run that awaits outputs.
        process.draining.cancel();
        process.stop.cancel();
        process.tasks.close();
        soon(process.tasks.wait()).await;

        let events = soon(events).await;
        assert!(
            matches!(events.last(), Some(RunEvent::RequiresAction(_))),
            "{events:?}"
        );
        assert_eq!(stored(&stores.one, &submitted.run).await, waiting.run);
        assert_eq!(
            stored(&stores.one, &next.run).await.status,
            RunStatus::Failed
        );
        assert_eq!(
            upstream.calls(),
            ["start [] ask"],
            "the gateway cancels nothing upstream"
        );
        process.runs.retire().await;

        let heir = Process::alive(Arc::clone(&stores.other), upstream.clone()).await;
        let janitor = heir.runs.clone();
        let mut session = JoinSet::new();
        session.spawn(async move { janitor.keep_session("127.0.0.1:2".to_owned(), ALIVE).await });
        // After the takeover, a task can continue the run at once.
        soon(async {
            while heir.runs.load().runs == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let calls = &waiting.run.required_action.as_ref().unwrap().tool_calls;
        let outputs = calls
            .iter()
            .map(|call| ToolOutput::text(call.id.clone(), "4"));
        let new = NewOutputs {
            outputs: outputs.collect(),
            by_user: false,
            idempotency: None,
            only_repeats: None,
        };
        let Resumed {
            submitted: resumed,
            from,
        } = heir
            .runs
            .answer_tools(&key(), submitted.run.id, new)
            .await
            .unwrap();
        let Some(Answer::Ended(outcome)) = soon(resumed.follow.answer(from)).await else {
            panic!("the run did not end")
        };
        assert_eq!(outcome.run.status, RunStatus::Completed);
        let content = outcome.message.as_ref().unwrap().content.clone();
        let (call, said): (Vec<_>, Vec<_>) = content
            .into_iter()
            .partition(|part| part.as_call().is_some());
        let mut whole = text("let me see");
        append_messages(&mut whole, text("thanks"));
        assert_eq!(said, whole, "the reply includes the text before the call");
        let outputs: Vec<_> = call
            .iter()
            .filter_map(|part| part.as_call()?.output.as_deref())
            .collect();
        assert_eq!(outputs, ["4"]);
        assert_eq!(upstream.calls(), ["answer 4"]);
        heir.stop.cancel();
        soon(session.join_all()).await;
    })
    .await;
}

#[tokio::test]
async fn discard_mark_in_store_removes_run_upstream() {
    on_both(async |stores: Stores| {
        // This holds for upstreams with threads and with chains.
        for (words, chain) in [("hold", false), ("hold", true)] {
            let (process, upstream) = stores.process(chain).await;
            let submitted = process.runs.submit(key(), message(words)).await.unwrap();
            let place = submitted.run.seq;
            let rollback = queue(&stores.other, "instead", MultitaskStrategy::Rollback).await;
            assert_eq!(
                stores.other.cancel_active(&rollback, true).await.unwrap(),
                Some(submitted.run.id)
            );
            upstream.let_go();

            let outcome = ended(&submitted).await;
            assert_eq!(
                (outcome.run.status, &outcome.run.error),
                (RunStatus::Cancelled, &None),
                "{place}"
            );
            assert_eq!((outcome.run.discarded, &outcome.message), (true, &None));
            let run = format!("run of {words}");
            assert_eq!(
                upstream.calls()[1..],
                [format!("settle {run}"), format!("remove {run}")],
                "the run is cancelled and removed upstream"
            );
            assert_eq!(transcript(&stores.one).await, []);
            let moved = outcome
                .thread
                .upstream_thread_id
                .as_ref()
                .map(UpstreamThreadId::as_str);
            assert_ne!(moved, Some(run.as_str()), "the chain does not move");
            assert_eq!(outcome.thread.unsettled_run, None);
            let QueuedStart::Started(turn) = stores.other.start_queued(&rollback).await.unwrap()
            else {
                panic!("the queued run starts next")
            };
            assert_eq!(turn.run.id, rollback.run_id);
            // Makes room for the next case.
            stores
                .database
                .execute("DELETE FROM idempotency_keys")
                .await;
            stores.database.archive_threads().await;
        }
    })
    .await;
}

#[tokio::test]
async fn failed_removal_of_discarded_run_leaves_unsettled_run() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        upstream.settles(Settling::Fails);
        let submitted = process.runs.submit(key(), message("hold")).await.unwrap();
        let rollback = queue(&stores.other, "instead", MultitaskStrategy::Rollback).await;
        stores.other.cancel_active(&rollback, true).await.unwrap();
        upstream.let_go();
        let outcome = ended(&submitted).await;
        assert_eq!(
            (outcome.run.status, outcome.run.discarded),
            (RunStatus::Cancelled, true)
        );
        let unsettled_run = outcome
            .thread
            .unsettled_run
            .as_ref()
            .expect("the run is left unsettled");
        assert_eq!(
            (unsettled_run.run, unsettled_run.remove),
            (submitted.run.id, true)
        );
        assert_eq!(transcript(&stores.one).await, []);
    })
    .await;
}

#[tokio::test]
async fn discard_mark_in_store_prevents_pause() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        let submitted = process.runs.submit(key(), message("ponder")).await.unwrap();
        let rollback = queue(&stores.other, "instead", MultitaskStrategy::Rollback).await;
        stores.other.cancel_active(&rollback, true).await.unwrap();
        upstream.let_go();
        let outcome = ended(&submitted).await;
        assert_eq!(
            (outcome.run.status, outcome.run.discarded),
            (RunStatus::Cancelled, true)
        );
        assert_eq!(transcript(&stores.one).await, []);
        let run = "run of ponder";
        let calls = upstream.calls();
        assert_eq!(
            calls[calls.len() - 2..],
            [format!("settle {run}"), format!("remove {run}")]
        );
    })
    .await;
}

#[tokio::test]
async fn deadline_passed_during_settling_sends_nothing() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        upstream.settles(Settling::Fails);
        let broken = process.runs.submit(key(), message("break")).await.unwrap();
        let outcome = ended(&broken).await;
        let unsettled_run = outcome
            .thread
            .unsettled_run
            .clone()
            .expect("the run is left unsettled");
        upstream.calls();

        upstream.settles(Settling::Hangs);
        let hasty = NewMessage {
            timeout: Some(Duration::from_millis(100)),
            ..message("hasty")
        };
        let hasty = process.runs.submit(key(), hasty).await.unwrap();
        let outcome = ended(&hasty).await;
        assert_eq!(outcome.run.status, RunStatus::Expired);
        assert_eq!(
            outcome.run.error.as_ref().unwrap().code,
            RunErrorCode::DeadlineExceeded
        );
        assert_eq!(
            outcome.thread.unsettled_run,
            Some(unsettled_run),
            "the run is still unsettled"
        );
        assert_eq!(
            upstream.calls(),
            ["settle run of break"],
            "nothing is sent, and nothing is settled"
        );
        let wanted = lines(&[
            ("break", UpstreamSync::Unknown),
            ("hasty", UpstreamSync::Withheld),
        ]);
        assert_eq!(transcript(&stores.one).await, wanted);

        upstream.settles(Settling::Held);
        let next = process.runs.submit(key(), message("next")).await.unwrap();
        let outcome = ended(&next).await;
        assert_eq!(
            (outcome.run.status, &outcome.thread.unsettled_run),
            (RunStatus::Completed, &None)
        );
        assert_eq!(
            upstream.calls(),
            [
                "settle run of break",
                "remove run of break",
                "start [break] next"
            ],
            "the unsynced message is sent with the run, the expired one is not"
        );
    })
    .await;
}

/// The session lapses while an earlier run is settled upstream. By then the run may be another
/// process's, so this one removes nothing upstream and sends nothing. Nobody tells the task that
/// the session has lapsed, as in a process that was suspended.
#[tokio::test]
async fn session_lapsed_during_settling_removes_and_sends_nothing() {
    const SHORT_LIFE: Duration = Duration::from_millis(600);
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        upstream.settles(Settling::Fails);
        ended(&process.runs.submit(key(), message("break")).await.unwrap()).await;
        upstream.settles(Settling::Waits);
        upstream.calls();
        let next = process.runs.submit(key(), message("next")).await.unwrap();
        let mut calls = Vec::new();
        soon(async {
            while calls.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
                calls = upstream.calls();
            }
        })
        .await;
        assert_eq!(calls, ["settle run of break"]);
        // A renewal fails if the store takes longer than a third of the life.
        until(async || process.runs.renew("127.0.0.1:1", SHORT_LIFE).await.is_ok()).await;
        tokio::time::sleep(SHORT_LIFE).await;
        upstream.let_go();
        until(async || process.tasks.is_empty()).await;
        assert_eq!(
            upstream.calls(),
            [""; 0],
            "nothing is removed, and nothing is sent"
        );
        assert_eq!(
            stored(&stores.one, &next.run).await.status,
            RunStatus::InProgress,
            "the next owner continues the run"
        );
    })
    .await;
}

/// The process stops while it cannot read what the run left upstream.
#[tokio::test(flavor = "multi_thread")]
async fn stop_before_lookup_of_left_traces_leaves_run_unfinished() {
    let database = TestDatabase::postgres().await;
    let gate = Gate::default();
    let tap = DatabaseTap::gated(&database.url(), &gate, Steps::All).await;
    let config = StoreConfig {
        url: Some(tap.url.as_str().into()),
        ..database.config()
    };
    let store = Arc::new(Store::open(&config).await.unwrap());
    let process = Process::alive(store, Scripted::new(false)).await;
    gate.set_at("sync.find_place", Moment::Before);
    let broken = process.runs.submit(key(), message("break")).await.unwrap();
    soon(gate.caught()).await;
    process.stop.cancel();
    // A run that ends has two seconds for the look after a stop.
    tokio::time::sleep(Duration::from_secs(3)).await;
    gate.open();
    until(async || process.tasks.is_empty()).await;
    let store = database.store().await;
    assert_eq!(
        stored(&store, &broken.run).await.status,
        RunStatus::InProgress,
        "the next owner settles the run"
    );
    assert_eq!(
        transcript(&store).await,
        lines(&[("break", UpstreamSync::Present)]),
        "the message is not withheld, since the upstream has it"
    );
}

#[tokio::test]
async fn unsynced_messages_of_abandoned_chain_run_are_resent() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(true).await;
        upstream.settles(Settling::Absent);
        ended(
            &process
                .runs
                .submit(key(), message("break 1"))
                .await
                .unwrap(),
        )
        .await;
        upstream.settles(Settling::Fails);
        ended(
            &process
                .runs
                .submit(key(), message("break 2"))
                .await
                .unwrap(),
        )
        .await;
        upstream.settles(Settling::Held);
        let outcome = ended(&process.runs.submit(key(), message("next")).await.unwrap()).await;
        let starts: Vec<_> = upstream
            .calls()
            .into_iter()
            .filter(|call| call.starts_with("start"))
            .collect();
        // The chain continues from before both messages.
        let wanted = [
            "start [] break 1",
            "start [break 1] break 2",
            "start [break 1 + break 2] next",
        ];
        assert_eq!(starts, wanted);
        assert_eq!(
            (
                outcome.thread.unsynced_messages,
                &outcome.thread.unsettled_run
            ),
            (0, &None)
        );
        let moved = outcome
            .thread
            .upstream_thread_id
            .as_ref()
            .map(UpstreamThreadId::as_str);
        assert_eq!(moved, Some("run of next"));
    })
    .await;
}

/// A rollover removes what an earlier run left upstream, and then fails. The run continues on the
/// old thread, which still has the history that was sent with the earlier run.
#[tokio::test]
async fn unsynced_messages_not_resent_after_failed_rollover() {
    on_both(async |stores: Stores| {
        let mut config = Config::default();
        config.threads.max_messages = NonZeroU32::new(2);
        let upstream = Scripted::new(false);
        let store = Arc::clone(&stores.one);
        let process = Process::configured(store, upstream.clone(), true, config);
        process.runs.renew("127.0.0.1:1", ALIVE).await.unwrap();
        let say =
            async |words| ended(&process.runs.submit(key(), message(words)).await.unwrap()).await;
        upstream.settles(Settling::Absent);
        say("break 1").await;
        upstream.settles(Settling::Fails);
        say("break 2").await;
        upstream.settles(Settling::Held);
        upstream.fail_history();
        let outcome = say("next").await;
        let calls = upstream.calls();
        assert!(
            calls.contains(&"remove run of break 2".to_owned()),
            "{calls:?}"
        );
        let last = calls.iter().rfind(|call| call.starts_with("start"));
        assert_eq!(last.unwrap(), "start [break 2] next", "{calls:?}");
        assert_eq!(outcome.thread.previous_thread, None, "the rollover failed");
    })
    .await;
}

#[tokio::test]
async fn merge_into_run_being_cancelled_keeps_message() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        let first = process.runs.submit(key(), message("hold")).await.unwrap();
        let mut joined = 0;
        let mut wanted = vec!["hold".to_owned()];
        for n in 0..20 {
            let waiting = process
                .runs
                .submit(key(), message(&format!("waits {n}")))
                .await
                .unwrap();
            let joins = format!("joins {n}");
            wanted.extend([format!("waits {n}"), joins.clone()]);
            let merge = NewMessage {
                strategy: MultitaskStrategy::Merge,
                ..message(&joins)
            };
            let merge = process.runs.submit(key(), merge);
            let (key, id) = (key(), waiting.run.id);
            // Each cancel comes a little later than the one before, as far as the scheduler
            // allows.
            let cancel = async {
                for _ in 0..n {
                    tokio::task::yield_now().await;
                }
                process.runs.cancel(&key, id).await
            };
            let (merged, cancelled) = tokio::join!(merge, cancel);
            let merged = merged.unwrap();
            assert_eq!(cancelled.unwrap().0.status, RunStatus::Cancelled);
            if merged.run.id == id {
                joined += 1;
                assert_eq!(ended(&merged).await.run.status, RunStatus::Cancelled, "{n}");
            } else {
                // The cancel came first, so the merged message waits in a run of its own.
                process.runs.cancel(&key, merged.run.id).await.unwrap();
            }
            assert_eq!(ended(&waiting).await.run.status, RunStatus::Cancelled);
            assert_eq!(ended(&merged).await.run.status, RunStatus::Cancelled);
        }
        println!("{joined} of 20 joined");
        upstream.let_go();
        ended(&first).await;
        wanted.push("re hold".to_owned());
        let all: Vec<_> = transcript(&stores.one)
            .await
            .into_iter()
            .map(|(words, _)| words)
            .collect();
        assert_eq!(all, wanted, "each message is recorded once");
    })
    .await;
}

/// The statement of a lost acknowledgement may have taken effect.
#[tokio::test(flavor = "multi_thread")]
async fn message_reported_as_not_recorded_never_runs() {
    let database = TestDatabase::postgres().await;
    let gate = Gate::default();
    let tap = DatabaseTap::gated(&database.url(), &gate, Steps::Changes).await;
    let config = StoreConfig {
        url: Some(tap.url.as_str().into()),
        ..database.config()
    };
    let upstream = Scripted::new(false);
    let process = Process::alive(
        Arc::new(Store::open(&config).await.unwrap()),
        upstream.clone(),
    )
    .await;
    gate.set(1, Moment::After);
    let refused = process.runs.submit(key(), message("hello")).await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(
        database
            .number("SELECT count(*) FROM runs WHERE finished_at IS NULL")
            .await,
        1
    );
    gate.open();
    let voided =
        "SELECT count(*) FROM runs WHERE status = 'failed' AND error ->> 'code' = 'not_recorded'";
    until(async || database.number(voided).await == 1).await;
    assert_eq!(upstream.calls(), [""; 0], "nothing is sent");
    assert_eq!(
        transcript(&*database.store().await).await,
        [],
        "the client may send the message again"
    );
    let again = process.runs.submit(key(), message("hello")).await.unwrap();
    assert_eq!(ended(&again).await.run.status, RunStatus::Completed);
}

#[tokio::test]
async fn runs_lost_to_takeover_are_not_ended_upstream() {
    on_both(async |stores: Stores| {
        let (process, upstream) = stores.process(false).await;
        let waits = process.runs.submit(key(), message("ask")).await.unwrap();
        assert!(matches!(
            soon(waits.follow.answer(0)).await,
            Some(Answer::RequiresAction(_))
        ));
        let in_line = process
            .runs
            .submit(key(), message("in line"))
            .await
            .unwrap();
        let other_key = crate::store_contract::user("bob");
        let at_work = process
            .runs
            .submit(other_key, message("hold"))
            .await
            .unwrap();
        let other = ReplicaId::new();
        stores
            .other
            .renew_replica(other, "127.0.0.1:2", ALIVE)
            .await
            .unwrap();
        stores.one.retire_replica(process.replica).await.unwrap();
        let taken = stores.other.adopt_orphans(other, &[], 10).await.unwrap();
        assert_eq!(taken.len(), 3);
        upstream.calls();

        let janitor = process.runs.clone();
        let mut session = JoinSet::new();
        session.spawn(async move { janitor.keep_session("127.0.0.1:1".to_owned(), ALIVE).await });
        until(async || process.tasks.is_empty()).await;
        assert_eq!(upstream.calls(), [""; 0], "the new owner continues the run");
        assert_eq!(
            stored(&stores.one, &waits.run).await.status,
            RunStatus::RequiresAction
        );
        for orphan in taken {
            stores
                .other
                .finish(&orphan.lease, completed(Some("done elsewhere")))
                .await
                .unwrap();
        }
        for run in [&waits, &in_line, &at_work] {
            assert_eq!(
                ended(run).await.run.status,
                RunStatus::Completed,
                "readers learn of the takeover"
            );
        }
        process.stop.cancel();
        soon(session.join_all()).await;
    })
    .await;
}

/// The database refuses the run's events again and again. The run is to be discarded with all its
/// text.
#[tokio::test]
async fn discarded_run_ends_when_log_is_refused() {
    let database = TestDatabase::postgres().await;
    let (one, other) = (database.store().await, database.store().await);
    let upstream = Scripted::new(false);
    let process = Process::alive(Arc::clone(&one), upstream.clone()).await;
    let submitted = process.runs.submit(key(), message("hold")).await.unwrap();
    let rollback = queue(&other, "instead", MultitaskStrategy::Rollback).await;
    other.cancel_active(&rollback, true).await.unwrap();
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'refused'; END $$;
        CREATE TRIGGER no_events BEFORE INSERT ON run_events FOR EACH ROW WHEN (NEW.events <> '[]')
        EXECUTE FUNCTION refuse()";
    database.execute(refuse).await;
    upstream.let_go();
    let outcome = ended(&submitted).await;
    assert!(outcome.run.discarded, "{outcome:?}");
    assert_eq!(transcript(&one).await, []);
}
