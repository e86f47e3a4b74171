//! Random sequences of steps against a plain model of the queue.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use threadkeeper::domain::{MultitaskStrategy, RunStatus};

use super::*;

on_every_backend!(any_sequence_of_steps_keeps_the_order);

/// What the store should hold of one thread: the lease of the active run and of those that wait.
#[derive(Default)]
struct Model {
    active: Option<RunLease>,
    waiting: VecDeque<RunLease>,
    messages: i64,
    runs: i64,
}

/// 300 random steps on three keys. The seed of a failure is printed; set it in `THREADKEEPER_TEST_SEED` to repeat.
async fn any_sequence_of_steps_keeps_the_order(database: &TestDatabase, store: &dyn Store) {
    let seed = match std::env::var("THREADKEEPER_TEST_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => RandomState::new().hash_one(0_u8),
    };
    println!("THREADKEEPER_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let keys = [user("a"), session("a", "s"), topic("a", "t")];
    let mut models: [Model; 3] = Default::default();
    let (mut owner, mut adopter) = (ReplicaId::new(), ReplicaId::new());
    let alive = Duration::from_mins(10);
    store.renew_replica(owner, "127.0.0.1:1", alive).await.unwrap();

    for step in 0..300 {
        let which = rng.random_range(0..3);
        let (key, model) = (&keys[which], &mut models[which]);
        match rng.random_range(0..10) {
            0..4 => {
                let strategy = match rng.random_range(0..3) {
                    0 => MultitaskStrategy::Reject,
                    _ => MultitaskStrategy::Enqueue,
                };
                let request = Admission { strategy, replica: owner, ..admission(key) };
                let busy = model.active.is_some() || !model.waiting.is_empty();
                match store.admit(&request).await.unwrap() {
                    Admitted::Started(turn) => {
                        assert!(!busy, "step {step}");
                        model.active = Some(turn.lease);
                        model.messages += 1;
                        model.runs += 1;
                        assert_eq!((turn.thread.message_count, turn.run.seq), (model.messages, model.runs));
                    }
                    Admitted::Queued { lease, run, position, .. } => {
                        assert!(busy && strategy == MultitaskStrategy::Enqueue, "step {step}");
                        model.waiting.push_back(lease);
                        model.runs += 1;
                        assert_eq!(run.seq, model.runs);
                        assert_eq!(position, i64::try_from(model.waiting.len()).unwrap(), "step {step}");
                    }
                    Admitted::Busy => assert!(busy && strategy == MultitaskStrategy::Reject, "step {step}"),
                    other @ Admitted::OtherUpstream(_) => panic!("step {step}: {other:?}"),
                }
            }
            4..7 => {
                let Some(lease) = model.active.take() else { continue };
                let reply = rng.random_bool(0.75).then_some("hi");
                let finished = store.finish(&lease, &completed(reply)).await.unwrap().unwrap();
                model.messages += i64::from(reply.is_some());
                assert_eq!(finished.thread.message_count, model.messages, "step {step}");
            }
            7 | 8 => {
                if model.waiting.is_empty() {
                    continue;
                }
                let place = rng.random_range(0..model.waiting.len());
                let lease = model.waiting[place];
                match store.claim(&lease).await.unwrap() {
                    Claim::Started(turn) => {
                        assert!(place == 0 && model.active.is_none(), "step {step}");
                        model.active = model.waiting.pop_front();
                        model.messages += 1;
                        assert_eq!(turn.thread.message_count, model.messages, "step {step}");
                    }
                    Claim::NotYet => assert!(place > 0 || model.active.is_some(), "step {step}"),
                    Claim::Lost => panic!("step {step}: {lease:?}"),
                }
            }
            _ if rng.random_bool(0.5) => {
                let Some(lease) = model.waiting.pop_back() else { continue };
                let cancelled = RunEnd { status: RunStatus::Cancelled, ..completed(None) };
                store.finish(&lease, &cancelled).await.unwrap().unwrap();
                model.messages += 1;
            }
            _ => {
                store.renew_replica(adopter, "127.0.0.1:2", alive).await.unwrap();
                store.retire_replica(owner).await.unwrap();
                let orphans = store.adopt_orphans(adopter, &[], 1000).await.unwrap();
                (owner, adopter) = (adopter, ReplicaId::new());
                let mut left: VecDeque<_> = orphans.iter().map(|orphan| orphan.lease).collect();
                let known =
                    models.iter_mut().flat_map(|model| model.active.iter_mut().chain(&mut model.waiting));
                for lease in known {
                    let at =
                        left.iter().position(|it| it.run_id == lease.run_id).expect("every run was adopted");
                    let mine = left.remove(at).unwrap();
                    assert_eq!(mine.fence, lease.fence + 1, "step {step}");
                    *lease = mine;
                }
                assert!(left.is_empty(), "step {step}: {left:?}");
            }
        }
        if step % 50 == 49 {
            check_invariants(database).await;
        }
    }
    check_invariants(database).await;
}
