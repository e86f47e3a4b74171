//! Every order in which a few tasks can join, be polled and give up, explored exhaustively.
//!
//! All state changes of a line happen under one mutex, so its behaviour is the set of sequences of whole
//! operations: no finer interleaving exists. The search runs each reachable state's shortest path anew on a real
//! [`LockMap`] and takes every step that is possible from there. A lost wake-up shows as a state in which the task
//! that may go is asleep; a task may also be polled without having been woken, anew with another waker.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use super::*;

const TASKS: usize = 4;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Stage {
    Outside,
    /// Waits to record; has not been polled since it came or was woken if `awake`.
    WantsToRecord,
    MayRecord,
    /// Recorded; waits for its turn.
    WantsTurn,
    HasTurn,
    Gone,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Join(usize),
    Poll(usize),
    Recorded(usize),
    Leave(usize),
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct World {
    map: LockMap<&'static str>,
    places: [Option<Place<&'static str>>; TASKS],
    stages: [Stage; TASKS],
    flags: [Arc<Flag>; TASKS],
    /// Tasks in line, in order of joining.
    line: Vec<usize>,
}

/// What tells two states apart: who is in line and in which order, at which stage, and who is awake.
type Abstract = (Vec<usize>, [Stage; TASKS], [bool; TASKS]);

impl World {
    fn new() -> Self {
        Self {
            map: LockMap::new(TASKS),
            places: [const { None }; TASKS],
            stages: [Stage::Outside; TASKS],
            flags: std::array::from_fn(|_| Arc::default()),
            line: Vec::new(),
        }
    }

    fn awake(&self, task: usize) -> bool {
        self.flags[task].0.load(Ordering::SeqCst)
    }

    fn state(&self) -> Abstract {
        (self.line.clone(), self.stages, std::array::from_fn(|task| self.awake(task)))
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for task in 0..TASKS {
            match self.stages[task] {
                Stage::Outside => steps.push(Step::Join(task)),
                Stage::WantsToRecord | Stage::WantsTurn => {
                    steps.extend([Step::Poll(task), Step::Leave(task)]);
                }
                Stage::MayRecord => steps.extend([Step::Recorded(task), Step::Leave(task)]),
                Stage::HasTurn => steps.push(Step::Leave(task)),
                Stage::Gone => {}
            }
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Join(task) => {
                self.places[task] = Some(self.map.join("key").unwrap());
                self.stages[task] = Stage::WantsToRecord;
                self.flags[task].0.store(true, Ordering::SeqCst);
                self.line.push(task);
            }
            Step::Poll(task) => {
                // Each time a new future with a new waker: the one before may have been dropped.
                self.flags[task] = Arc::default();
                let waker = Waker::from(Arc::clone(&self.flags[task]));
                let mut cx = Context::from_waker(&waker);
                let place = self.places[task].as_mut().unwrap();
                let (poll, next) = match self.stages[task] {
                    Stage::WantsToRecord => (pin!(place.to_record()).poll(&mut cx), Stage::MayRecord),
                    _ => (pin!(place.turn()).poll(&mut cx), Stage::HasTurn),
                };
                if poll.is_ready() {
                    self.stages[task] = next;
                }
            }
            Step::Recorded(task) => {
                self.places[task].as_mut().unwrap().recorded();
                self.stages[task] = Stage::WantsTurn;
                self.flags[task].0.store(true, Ordering::SeqCst);
            }
            Step::Leave(task) => {
                self.places[task] = None;
                self.stages[task] = Stage::Gone;
                self.flags[task].0.store(false, Ordering::SeqCst);
                self.line.retain(|other| *other != task);
            }
        }
    }

    fn check(&self) {
        for (rank, &task) in self.line.iter().enumerate() {
            let before = &self.line[..rank];
            let is_recorded = |task: usize| matches!(self.stages[task], Stage::WantsTurn | Stage::HasTurn);
            match self.stages[task] {
                // Mutual exclusion and order: only the first has the turn.
                Stage::HasTurn => assert_eq!(rank, 0, "{:?}", self.state()),
                // Recording goes in order, one at a time.
                Stage::MayRecord => {
                    assert!(before.iter().all(|&task| is_recorded(task)), "{:?}", self.state());
                }
                // No lost wake-up: who may go is awake.
                Stage::WantsTurn => assert!(rank > 0 || self.awake(task), "{:?}", self.state()),
                Stage::WantsToRecord => {
                    let may_go = before.iter().all(|&task| is_recorded(task));
                    assert!(!may_go || self.awake(task), "{:?}", self.state());
                }
                Stage::Outside | Stage::Gone => unreachable!("not in line"),
            }
        }
        assert_eq!(self.map.is_empty(), self.line.is_empty(), "a line lives as long as its places");
    }
}

#[test]
fn every_interleaving_keeps_order_and_exclusion_and_loses_no_wake_up() {
    let mut seen = HashSet::from([World::new().state()]);
    let mut paths: VecDeque<Vec<Step>> = VecDeque::from([Vec::new()]);
    let replay = |path: &[Step]| {
        let mut world = World::new();
        for &step in path {
            world.take(step);
        }
        world
    };
    let mut all_gone = 0;
    while let Some(path) = paths.pop_front() {
        let steps = replay(&path).steps();
        all_gone += usize::from(steps.is_empty());
        for step in steps {
            let mut world = replay(&path);
            world.take(step);
            world.check();
            if seen.insert(world.state()) {
                paths.push_back(path.iter().copied().chain([step]).collect());
            }
        }
    }
    assert_eq!(all_gone, 1, "the only state without a further step is the one in which all have left");
    assert!(seen.len() > 4_000, "the search saw only {} states", seen.len());
}

#[test]
fn a_line_is_bounded_and_other_keys_are_not_affected() {
    let map = LockMap::new(1);
    let first = map.join("a").unwrap();
    let second = map.join("a").unwrap();
    assert_eq!(map.join("a").unwrap_err(), QueueFull { max_waiting: 1 });
    let other = map.join("b").unwrap();
    assert!(map.join_idle("a").is_none());
    drop((first, other));
    assert!(map.join_idle("a").is_none(), "one still waits");
    drop(second);
    assert!(map.is_empty());
    assert!(map.join_idle("a").is_some());
}
