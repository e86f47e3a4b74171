//! Random sequences of steps, compared with a plain model of the queue.

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use threadkeeper::domain::{MultitaskStrategy, RunStatus};
use threadkeeper::store::{Answered, MAX_MERGED, Paused};

use super::*;
use crate::support::chance::seed;

on_every_backend!(random_steps_match_queue_model);

/// What the store should have of one thread: the active run, and the queued ones in order.
#[derive(Default)]
struct Model {
    active: Option<ModelRun>,
    waiting: VecDeque<ModelRun>,
    messages: i64,
    missing: i64,
    runs: i64,
}

struct ModelRun {
    lease: RunLease,
    seq: i64,
    assistant: &'static str,
    inputs: i64,
    status: RunStatus,
    discard: bool,
    pauses: i64,
}

impl Model {
    fn is_busy(&self) -> bool {
        self.active.is_some() || !self.waiting.is_empty()
    }

    /// Whether a message would join the last queued run.
    fn joins(&self, request: &Admission) -> bool {
        let most = i64::try_from(MAX_MERGED).unwrap();
        request.strategy == MultitaskStrategy::Merge
            && self
                .waiting
                .back()
                .is_some_and(|it| it.assistant == request.assistant && it.inputs < most)
    }
}

/// Makes 600 random steps on three keys. A failure prints its seed; set `THREADKEEPER_TEST_SEED`
/// to repeat it.
async fn random_steps_match_queue_model(database: &TestDatabase, store: &Store) {
    let mut rng = StdRng::seed_from_u64(seed());

    let keys = [user("a"), session("a", "s"), topic("a", "t")];
    let mut models: [Model; 3] = Default::default();
    let (mut owner, mut adopter) = (ReplicaId::new(), ReplicaId::new());
    store
        .renew_replica(owner, "127.0.0.1:1", ALIVE)
        .await
        .unwrap();

    for step in 0..600 {
        let which = rng.random_range(0..3);
        let (key, model) = (&keys[which], &mut models[which]);
        match rng.random_range(0..14) {
            0..4 => {
                let strategy = *MultitaskStrategy::ALL.choose(&mut rng).unwrap();
                let assistant = *["default", "other"].choose(&mut rng).unwrap();
                let request = Admission {
                    strategy,
                    assistant: assistant.to_owned(),
                    replica: owner,
                    ..admission(key)
                };
                admit(store, model, &request, assistant, step).await;
            }
            4..7 => end(store, model, &mut rng, step).await,
            7 | 8 => {
                if model.waiting.is_empty() {
                    continue;
                }
                let place = rng.random_range(0..model.waiting.len());
                match store
                    .start_queued(&model.waiting[place].lease)
                    .await
                    .unwrap()
                {
                    QueuedStart::Started(turn) => {
                        assert!(place == 0 && model.active.is_none(), "step {step}");
                        let next = model.waiting.pop_front().unwrap();
                        assert_eq!(
                            i64::try_from(turn.input.len()).unwrap(),
                            next.inputs,
                            "step {step}"
                        );
                        model.messages += next.inputs;
                        assert_eq!(turn.thread.message_count, model.messages, "step {step}");
                        model.active = Some(ModelRun {
                            status: RunStatus::InProgress,
                            ..next
                        });
                    }
                    QueuedStart::NotYet => {
                        assert!(place > 0 || model.active.is_some(), "step {step}");
                    }
                    QueuedStart::Lost => panic!("step {step}"),
                }
            }
            9 => {
                let waiting: Vec<_> = model
                    .waiting
                    .iter()
                    .map(|run| (run.lease, run.seq))
                    .collect();
                let Some((lease, seq)) = waiting.choose(&mut rng) else {
                    continue;
                };
                let discard = rng.random_bool(0.5);
                let displaced = store.cancel_active(lease, discard).await.unwrap();
                let active = model.active.as_mut().filter(|active| active.seq < *seq);
                assert_eq!(
                    displaced,
                    active.as_ref().map(|active| active.lease.run_id),
                    "step {step}"
                );
                if let Some(active) = active {
                    active.status = RunStatus::Cancelling;
                    active.discard |= discard;
                }
            }
            10 | 11 => wait_or_answer(store, key, model, step).await,
            12 => {
                let Some(run) = model.waiting.pop_back() else {
                    continue;
                };
                let said = *[UpstreamSync::Withheld, UpstreamSync::Missing]
                    .choose(&mut rng)
                    .unwrap();
                let discard = rng.random_bool(0.3);
                let end = RunEnd {
                    status: RunStatus::Cancelled,
                    said,
                    discard,
                    ..completed(None)
                };
                let finished = closed(store.finish(&run.lease, end.clone()).await.unwrap());
                if !discard {
                    model.messages += run.inputs;
                    model.missing += if said == UpstreamSync::Missing {
                        run.inputs
                    } else {
                        0
                    };
                }
                assert_eq!(finished.thread.message_count, model.messages, "step {step}");
                assert_eq!(
                    finished.thread.unsynced_messages, model.missing,
                    "step {step}"
                );
            }
            _ => {
                adopt(store, &mut models, owner, adopter, step).await;
                (owner, adopter) = (adopter, ReplicaId::new());
            }
        }
        if step % 50 == 49 {
            check_invariants(database).await;
        }
    }
    check_invariants(database).await;
}

const ALIVE: Duration = Duration::from_mins(10);

async fn admit(
    store: &Store,
    model: &mut Model,
    request: &Admission,
    assistant: &'static str,
    step: usize,
) {
    use MultitaskStrategy::{Interrupt, Reject, Rollback};
    let (strategy, is_busy) = (request.strategy, model.is_busy());
    let run = |lease, status| ModelRun {
        lease,
        seq: model.runs + 1,
        assistant,
        inputs: 1,
        status,
        discard: false,
        pauses: 0,
    };
    match store.admit(request.clone()).await.unwrap() {
        Admitted::Started(turn) => {
            assert!(!is_busy, "step {step}");
            model.active = Some(run(turn.lease, RunStatus::InProgress));
            model.messages += 1;
            model.runs += 1;
            assert_eq!(
                (turn.thread.message_count, turn.run.seq),
                (model.messages, model.runs)
            );
        }
        Admitted::Queued {
            lease,
            run: stored,
            position,
            ..
        } => {
            assert!(
                is_busy && strategy != Reject && !model.joins(request),
                "step {step}"
            );
            let run = run(lease, RunStatus::Queued);
            assert_eq!(stored.seq, run.seq);
            model.runs += 1;
            if matches!(strategy, Interrupt | Rollback) {
                assert_eq!(position, 1, "step {step}");
                model.waiting.push_front(run);
            } else {
                model.waiting.push_back(run);
                assert_eq!(
                    position,
                    i64::try_from(model.waiting.len()).unwrap(),
                    "step {step}"
                );
            }
        }
        Admitted::Merged { run, .. } => {
            assert!(model.joins(request), "step {step}");
            let last = model.waiting.back_mut().unwrap();
            assert_eq!(run.id, last.lease.run_id, "step {step}");
            last.inputs += 1;
        }
        Admitted::Busy => assert!(is_busy && strategy == Reject, "step {step}"),
        other => panic!("step {step}: {other:?}"),
    }
}

/// Ends the active run in one of many ways.
async fn end(store: &Store, model: &mut Model, rng: &mut StdRng, step: usize) {
    let Some(run) = model.active.take() else {
        return;
    };
    let sync = |rng: &mut StdRng| {
        *[
            UpstreamSync::Present,
            UpstreamSync::Present,
            UpstreamSync::Missing,
            UpstreamSync::Unknown,
        ]
        .choose(rng)
        .unwrap()
    };
    let mut end = completed(rng.random_bool(0.75).then_some("hi"));
    end.events.first = run.pauses * 4;
    end.said = sync(rng);
    end.synced = rng.random_bool(0.2);
    if rng.random_bool(0.5) {
        end.status = RunStatus::Failed;
    }
    if let Some(reply) = &mut end.reply {
        reply.sync = sync(rng);
    }
    if run.discard {
        assert_eq!(
            store.finish(&run.lease, end.clone()).await.unwrap(),
            Closing::MustDiscard,
            "step {step}"
        );
    }
    end.discard = run.discard || rng.random_bool(0.1);
    // The unsynced messages before the run's own were sent with it, later ones were not.
    let earlier = store
        .unsynced_messages(run.lease.run_id, None, 1000)
        .await
        .unwrap()
        .data
        .len();
    let finished = closed(store.finish(&run.lease, end.clone()).await.unwrap());
    if end.synced {
        model.missing -= i64::try_from(earlier).unwrap();
    }
    if end.discard {
        model.messages -= run.inputs;
    } else {
        let replied = end.reply.as_ref().map(|reply| reply.sync);
        model.messages += i64::from(replied.is_some());
        model.missing += if end.said == UpstreamSync::Missing {
            run.inputs
        } else {
            0
        };
        model.missing += i64::from(replied == Some(UpstreamSync::Missing));
    }
    assert_eq!(finished.thread.message_count, model.messages, "step {step}");
    assert_eq!(
        finished.thread.unsynced_messages, model.missing,
        "step {step}"
    );
    assert_eq!(finished.run.discarded, end.discard, "step {step}");
}

/// Lets the active run wait for tool outputs, or answers its call.
async fn wait_or_answer(store: &Store, key: &ConversationKey, model: &mut Model, step: usize) {
    let Some(run) = &mut model.active else { return };
    let call = format!("call_{}", run.pauses);
    let (pause, answer) = (pause(&[&call], run.pauses * 4), answer(&[&call]));
    if run.status == RunStatus::RequiresAction {
        let answered = store
            .answer_tools(key, run.lease.run_id, &answer)
            .await
            .unwrap();
        assert!(
            matches!(answered, Answered::Resumed(_)),
            "step {step}: {answered:?}"
        );
        run.status = RunStatus::InProgress;
        run.pauses += 1;
        return;
    }
    let answered = store
        .answer_tools(key, run.lease.run_id, &answer)
        .await
        .unwrap();
    assert_eq!(answered, Answered::NotWaiting, "step {step}");
    match store.pause(&run.lease, &pause).await.unwrap() {
        Paused::Waiting(waiting) => {
            assert_eq!(run.status, RunStatus::InProgress, "step {step}");
            run.status = waiting.run.status;
            assert_eq!(run.status, RunStatus::RequiresAction, "step {step}");
        }
        Paused::Cancelling => assert_eq!(run.status, RunStatus::Cancelling, "step {step}"),
        Paused::Lost => panic!("step {step}"),
    }
}

/// Lets another replica take all runs over.
async fn adopt(
    store: &Store,
    models: &mut [Model; 3],
    owner: ReplicaId,
    adopter: ReplicaId,
    step: usize,
) {
    store
        .renew_replica(adopter, "127.0.0.1:2", ALIVE)
        .await
        .unwrap();
    store.retire_replica(owner).await.unwrap();
    let mut orphans = store.adopt_orphans(adopter, &[], 1000).await.unwrap();
    let known = models
        .iter_mut()
        .flat_map(|model| model.active.iter_mut().chain(&mut model.waiting));
    for run in known {
        let at = orphans
            .iter()
            .position(|it| it.run.id == run.lease.run_id)
            .expect("every run was taken over");
        let orphan = orphans.remove(at);
        assert_eq!(orphan.lease.fence, run.lease.fence + 1, "step {step}");
        assert_eq!(
            (orphan.run.status, orphan.run.discarded),
            (run.status, run.discard),
            "step {step}"
        );
        let has_waited = run.pauses > 0 || run.status == RunStatus::RequiresAction;
        assert!(
            run.status == RunStatus::Cancelling || orphan.content.is_empty() != has_waited,
            "step {step}"
        );
        if run.status == RunStatus::InProgress {
            assert_eq!(orphan.outputs.is_some(), run.pauses > 0, "step {step}");
        }
        assert_eq!(
            orphan.time_left.is_zero(),
            run.status == RunStatus::Queued,
            "step {step}"
        );
        run.lease = orphan.lease;
    }
    assert!(orphans.is_empty(), "step {step}: {orphans:?}");
}
