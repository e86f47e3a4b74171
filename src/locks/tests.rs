//! Every order in which a few tasks can join, be polled and give up, explored exhaustively.
//!
//! All state changes of a queue happen under one mutex, so its behaviour is the set of sequences of whole
//! operations: no finer interleaving exists. The search runs each reachable state's shortest path anew on a real
//! [`KeyedQueue`] and takes every step that is possible from there. A lost wake-up shows as a state in which the task
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
    /// Recorded in a track; waits for its turn.
    WantsTurn(u8),
    /// Was the first of its track when it asked; asks again before it acts on it.
    HasTurn(u8),
    Started(u8),
    Gone,
}

impl Stage {
    fn track(self) -> Option<u8> {
        match self {
            Self::WantsTurn(track) | Self::HasTurn(track) | Self::Started(track) => Some(track),
            Self::Outside | Self::WantsToRecord | Self::MayRecord | Self::Gone => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Join(usize),
    /// Joins to go next.
    JoinNext(usize),
    Poll(usize),
    Recorded(usize, u8),
    /// The store has started its run: of those recorded in a track, one at a time.
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
    map: KeyedQueue<&'static str, u8>,
    entries: [Option<Ticket<&'static str, u8>>; TASKS],
    stages: [Stage; TASKS],
    flags: [Arc<Flag>; TASKS],
    /// Tasks in queue.
    queue: Vec<usize>,
    /// The same in order of joining.
    joined: Vec<usize>,
    /// The track in which the last one was recorded: a key goes on to a fresh thread, and never back.
    track: u8,
    scope: Scope,
}

/// How many tasks and tracks a search is about: of both at once there would be too many states.
#[derive(Clone, Copy)]
struct Scope {
    tasks: usize,
    tracks: u8,
}

/// What tells two states apart: who is in queue and in which order, at which stage, who is awake, and the newest track.
type Abstract = (Vec<usize>, Vec<usize>, [Stage; TASKS], [bool; TASKS], u8);

impl World {
    fn new(scope: Scope) -> Self {
        Self {
            scope,
            map: KeyedQueue::new(TASKS),
            entries: [const { None }; TASKS],
            stages: [Stage::Outside; TASKS],
            flags: std::array::from_fn(|_| Arc::default()),
            queue: Vec::new(),
            joined: Vec::new(),
            track: 0,
        }
    }

    /// All before the task in queue are known to be in other tracks.
    fn is_first(&self, task: usize) -> bool {
        let track = self.stages[task].track();
        let before = self.queue.iter().take_while(|other| **other != task);
        before
            .map(|other| self.stages[*other].track())
            .all(|other| other.is_some() && other != track)
    }

    fn awake(&self, task: usize) -> bool {
        self.flags[task].0.load(Ordering::SeqCst)
    }

    fn state(&self) -> Abstract {
        let awake = std::array::from_fn(|task| self.awake(task));
        (
            self.queue.clone(),
            self.joined.clone(),
            self.stages,
            awake,
            self.track,
        )
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let none_started = |track: u8| {
            self.stages
                .iter()
                .all(|stage| *stage != Stage::Started(track))
        };
        for task in 0..self.scope.tasks {
            match self.stages[task] {
                // The last one alone may go next, and only it: else there are too many states.
                Stage::Outside if task + 1 == self.scope.tasks => steps.push(Step::JoinNext(task)),
                Stage::Outside => steps.push(Step::Join(task)),
                Stage::WantsToRecord => steps.extend([Step::Poll(task), Step::Leave(task)]),
                Stage::MayRecord => {
                    steps.extend(
                        (self.track..self.scope.tracks).map(|track| Step::Recorded(task, track)),
                    );
                    steps.push(Step::Leave(task));
                }
                Stage::WantsTurn(track) | Stage::HasTurn(track) => {
                    steps.extend([Step::Poll(task), Step::Leave(task)]);
                    if none_started(track) {
                        steps.push(Step::Started(task));
                    }
                }
                Stage::Started(_) => steps.push(Step::Leave(task)),
                Stage::Gone => {}
            }
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Join(task) | Step::JoinNext(task) => {
                let next = matches!(step, Step::JoinNext(_));
                let ticket = if next {
                    self.map.join_next("key")
                } else {
                    self.map.join("key")
                };
                self.entries[task] = Some(ticket.unwrap());
                self.stages[task] = Stage::WantsToRecord;
                self.flags[task].0.store(true, Ordering::SeqCst);
                let has_started = |task: &&usize| matches!(self.stages[**task], Stage::Started(_));
                let started = self.queue.iter().take_while(has_started).count();
                self.queue
                    .insert(if next { started } else { self.queue.len() }, task);
                self.joined.push(task);
            }
            Step::Poll(task) => {
                // Each time a new future with a new waker: the one before may have been dropped.
                self.flags[task] = Arc::default();
                let waker = Waker::from(Arc::clone(&self.flags[task]));
                let mut cx = Context::from_waker(&waker);
                let ticket = self.entries[task].as_mut().unwrap();
                let (poll, next) = match self.stages[task].track() {
                    None => (pin!(ticket.to_record()).poll(&mut cx), Stage::MayRecord),
                    Some(track) => (pin!(ticket.turn()).poll(&mut cx), Stage::HasTurn(track)),
                };
                // Mutual exclusion and order: only the first of a track is told that it is its turn.
                if next != Stage::MayRecord {
                    assert_eq!(poll.is_ready(), self.is_first(task), "{:?}", self.state());
                }
                if poll.is_ready() {
                    self.stages[task] = next;
                } else if let Stage::HasTurn(track) = self.stages[task] {
                    self.stages[task] = Stage::WantsTurn(track);
                }
            }
            Step::Recorded(task, track) => {
                self.entries[task].as_mut().unwrap().recorded(track);
                self.stages[task] = Stage::WantsTurn(track);
                self.track = track;
                self.flags[task].0.store(true, Ordering::SeqCst);
            }
            Step::Started(task) => {
                self.entries[task].as_mut().unwrap().started();
                self.stages[task] = Stage::Started(self.stages[task].track().unwrap());
                self.queue.retain(|other| *other != task);
                self.queue.insert(0, task);
            }
            Step::Leave(task) => {
                self.entries[task] = None;
                self.stages[task] = Stage::Gone;
                self.flags[task].0.store(false, Ordering::SeqCst);
                self.queue.retain(|other| *other != task);
                self.joined.retain(|other| *other != task);
            }
        }
    }

    fn check(&self) {
        let is_recorded = |task: usize| self.stages[task].track().is_some();
        for &task in &self.queue {
            let may_record = || {
                self.joined
                    .iter()
                    .take_while(|other| **other != task)
                    .all(|task| is_recorded(*task))
            };
            match self.stages[task] {
                Stage::Started(_) => assert!(self.is_first(task), "{:?}", self.state()),
                // Recording goes in order of joining, one at a time.
                Stage::MayRecord => assert!(may_record(), "{:?}", self.state()),
                // No lost wake-up: who may go is awake. One that was overtaken asks again before it acts.
                Stage::WantsTurn(_) => {
                    assert!(
                        !self.is_first(task) || self.awake(task),
                        "{:?}",
                        self.state()
                    );
                }
                Stage::WantsToRecord => {
                    assert!(!may_record() || self.awake(task), "{:?}", self.state())
                }
                Stage::HasTurn(_) => {}
                Stage::Outside | Stage::Gone => unreachable!("not in queue"),
            }
        }
        assert_eq!(
            self.map.is_empty(),
            self.queue.is_empty(),
            "a queue lives as long as its entries"
        );
    }
}

#[test]
fn every_interleaving_keeps_order_and_exclusion_and_loses_no_wake_up() {
    assert!(
        search(Scope {
            tasks: TASKS,
            tracks: 1
        }) > 4_000
    );
    assert!(
        search(Scope {
            tasks: TASKS - 1,
            tracks: 2
        }) > 1_000
    );
}

/// Checks all states that can be reached. How many there are.
fn search(scope: Scope) -> usize {
    let mut seen = HashSet::from([World::new(scope).state()]);
    let mut paths: VecDeque<Vec<Step>> = VecDeque::from([Vec::new()]);
    let replay = |path: &[Step]| {
        let mut world = World::new(scope);
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
    // Whatever track was the last.
    assert_eq!(
        all_gone,
        usize::from(scope.tracks),
        "there is a further step until all have left"
    );
    seen.len()
}

#[test]
fn a_line_is_bounded_and_other_keys_are_not_affected() {
    let map = KeyedQueue::<_, u8>::new(1);
    let first = map.join("a").unwrap();
    let second = map.join("a").unwrap();
    assert_eq!(map.join("a").unwrap_err(), QueueFull { max_waiting: 1 });
    let other = map.join("b").unwrap();
    drop((first, other));
    assert_eq!(map.len(), 1, "one still waits");
    drop(second);
    assert!(map.is_empty());
}

#[test]
fn places_that_moved_wait_for_those_of_their_new_lane() {
    let map = KeyedQueue::new(3);
    let mut entries: Vec<_> = (0..3).map(|_| map.join("a").unwrap()).collect();
    for (ticket, track) in entries.iter_mut().zip([0, 0, 1]) {
        ticket.recorded(track);
    }
    let mut cx = Context::from_waker(Waker::noop());
    let mut may_go = |ticket: &mut Ticket<_, _>| pin!(ticket.turn()).poll(&mut cx).is_ready();
    assert_eq!(
        entries.iter_mut().map(&mut may_go).collect::<Vec<_>>(),
        [true, false, true]
    );
    map.moved(&"a", 0, 1);
    assert_eq!(
        entries.iter_mut().map(&mut may_go).collect::<Vec<_>>(),
        [true, false, false]
    );
    map.moved(&"b", 0, 1);
    drop(entries.remove(0));
    assert_eq!(
        entries.iter_mut().map(&mut may_go).collect::<Vec<_>>(),
        [true, false]
    );
}
