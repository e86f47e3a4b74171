//! An exhaustive search through every order in which a few tasks can join, be polled and leave.
//!
//! All state changes of a queue happen under one mutex. So its behaviour is the set of sequences
//! of whole operations: no finer interleaving exists. The search replays the shortest path to each
//! reachable state on a real [`KeyedQueue`] and takes every step that is possible from there. A
//! lost wake-up shows as a state in which a task that may go is asleep. The search also polls
//! tasks that were not woken, each time with a new waker.

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
    /// Waits to record. If `awake`, it joined or was woken, and has not been polled since.
    WantsToRecord,
    MayRecord,
    /// Recorded in a track; waits to start.
    WantsTurn(u8),
    /// Was the first of its track when it asked. It asks again before it starts.
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
    /// Joins before all tasks that have not started.
    JoinNext(usize),
    Poll(usize),
    Recorded(usize, u8),
    /// The store has started the task's run: one recorded task of a track at a time.
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
    /// Tasks in the order of the queue.
    queue: Vec<usize>,
    /// Tasks in the order of joining.
    joined: Vec<usize>,
    /// The track of the last recorded task. A key moves on to a fresh thread and never back.
    track: u8,
    scope: Scope,
}

/// Numbers of tasks and tracks in a search. Many of both would make too many states.
#[derive(Clone, Copy)]
struct Scope {
    tasks: usize,
    tracks: u8,
}

/// What distinguishes two states: queue order, joining order, stages, who is awake, and the newest
/// track.
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

    /// Returns whether all tasks before this one are known to be in other tracks.
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
                // Only the last task may go next, and it does nothing else: else there are too
                // many states.
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
                // Each poll uses a new future and a new waker, because the caller may have dropped
                // the old future.
                self.flags[task] = Arc::default();
                let waker = Waker::from(Arc::clone(&self.flags[task]));
                let mut cx = Context::from_waker(&waker);
                let ticket = self.entries[task].as_mut().unwrap();
                let (poll, next) = match self.stages[task].track() {
                    None => (pin!(ticket.to_record()).poll(&mut cx), Stage::MayRecord),
                    Some(track) => (pin!(ticket.turn()).poll(&mut cx), Stage::HasTurn(track)),
                };
                // Mutual exclusion and order: only the first of a track may start.
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
                // Tasks record one at a time, in the order of joining.
                Stage::MayRecord => assert!(may_record(), "{:?}", self.state()),
                // No lost wake-up: a task that may go is awake. A task that was overtaken asks
                // again before it starts.
                Stage::WantsTurn(_) => {
                    assert!(
                        !self.is_first(task) || self.awake(task),
                        "{:?}",
                        self.state()
                    );
                }
                Stage::WantsToRecord => {
                    assert!(!may_record() || self.awake(task), "{:?}", self.state());
                }
                Stage::HasTurn(_) => {}
                Stage::Outside | Stage::Gone => unreachable!("not in queue"),
            }
        }
        assert_eq!(
            self.map.is_empty(),
            self.queue.is_empty(),
            "a queue exists as long as it has entries"
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

/// Checks all reachable states and returns their number.
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
    // One final state for each track that can be the last.
    assert_eq!(
        all_gone,
        usize::from(scope.tracks),
        "there is a further step until all tasks have left"
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
