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
    /// Was the first when it asked; asks again before it acts on it.
    HasTurn,
    Started,
    Gone,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Join(usize),
    /// Joins to go next.
    JoinNext(usize),
    Poll(usize),
    Recorded(usize),
    /// The store has started its run: of recorded ones, one at a time.
    Started(usize),
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
    /// Tasks in line.
    line: Vec<usize>,
    /// The same in order of joining.
    joined: Vec<usize>,
}

/// What tells two states apart: who is in line and in which order, at which stage, and who is awake.
type Abstract = (Vec<usize>, Vec<usize>, [Stage; TASKS], [bool; TASKS]);

impl World {
    fn new() -> Self {
        Self {
            map: LockMap::new(TASKS),
            places: [const { None }; TASKS],
            stages: [Stage::Outside; TASKS],
            flags: std::array::from_fn(|_| Arc::default()),
            line: Vec::new(),
            joined: Vec::new(),
        }
    }

    fn awake(&self, task: usize) -> bool {
        self.flags[task].0.load(Ordering::SeqCst)
    }

    fn state(&self) -> Abstract {
        (self.line.clone(), self.joined.clone(), self.stages, std::array::from_fn(|task| self.awake(task)))
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let none_started = self.stages.iter().all(|stage| *stage != Stage::Started);
        for task in 0..TASKS {
            match self.stages[task] {
                // The last one alone may go next, and only it: else there are too many states.
                Stage::Outside if task + 1 == TASKS => steps.push(Step::JoinNext(task)),
                Stage::Outside => steps.push(Step::Join(task)),
                Stage::WantsToRecord => steps.extend([Step::Poll(task), Step::Leave(task)]),
                Stage::MayRecord => steps.extend([Step::Recorded(task), Step::Leave(task)]),
                Stage::WantsTurn | Stage::HasTurn => {
                    steps.extend([Step::Poll(task), Step::Leave(task)]);
                    if none_started {
                        steps.push(Step::Started(task));
                    }
                }
                Stage::Started => steps.push(Step::Leave(task)),
                Stage::Gone => {}
            }
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Join(task) | Step::JoinNext(task) => {
                let next = matches!(step, Step::JoinNext(_));
                let place = if next { self.map.join_next("key") } else { self.map.join("key") };
                self.places[task] = Some(place.unwrap());
                self.stages[task] = Stage::WantsToRecord;
                self.flags[task].0.store(true, Ordering::SeqCst);
                let started = self.line.iter().filter(|task| self.stages[**task] == Stage::Started).count();
                self.line.insert(if next { started } else { self.line.len() }, task);
                self.joined.push(task);
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
                // Mutual exclusion and order: only the first is told that it is its turn.
                if next == Stage::HasTurn {
                    assert_eq!(poll.is_ready(), self.line[0] == task, "{:?}", self.state());
                }
                if poll.is_ready() {
                    self.stages[task] = next;
                } else if self.stages[task] == Stage::HasTurn {
                    self.stages[task] = Stage::WantsTurn;
                }
            }
            Step::Recorded(task) => {
                self.places[task].as_mut().unwrap().recorded();
                self.stages[task] = Stage::WantsTurn;
                self.flags[task].0.store(true, Ordering::SeqCst);
            }
            Step::Started(task) => {
                self.places[task].as_mut().unwrap().started();
                self.stages[task] = Stage::Started;
                self.line.retain(|other| *other != task);
                self.line.insert(0, task);
            }
            Step::Leave(task) => {
                self.places[task] = None;
                self.stages[task] = Stage::Gone;
                self.flags[task].0.store(false, Ordering::SeqCst);
                self.line.retain(|other| *other != task);
                self.joined.retain(|other| *other != task);
            }
        }
    }

    fn check(&self) {
        let is_recorded =
            |task: usize| matches!(self.stages[task], Stage::WantsTurn | Stage::HasTurn | Stage::Started);
        for (rank, &task) in self.line.iter().enumerate() {
            let may_record =
                || self.joined.iter().take_while(|other| **other != task).all(|task| is_recorded(*task));
            match self.stages[task] {
                Stage::Started => assert_eq!(rank, 0, "{:?}", self.state()),
                // Recording goes in order of joining, one at a time.
                Stage::MayRecord => assert!(may_record(), "{:?}", self.state()),
                // No lost wake-up: who may go is awake. One that was overtaken asks again before it acts.
                Stage::WantsTurn => assert!(rank > 0 || self.awake(task), "{:?}", self.state()),
                Stage::WantsToRecord => assert!(!may_record() || self.awake(task), "{:?}", self.state()),
                Stage::HasTurn => {}
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
