//! What a gateway asks of its database and its upstream, step by step; a test can stop it at any of them.

use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// Where a step is stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Moment {
    /// Nothing of it has arrived.
    Before,
    /// It has its effect, and the answer is not handed back.
    After,
}

/// Which step is stopped.
#[derive(Clone, Copy)]
enum Trap {
    /// The one with this number.
    Number(usize),
    /// The first one of this statement.
    Named(&'static str),
}

/// What taps pass their questions through. Clones are the same gate.
#[derive(Clone, Default)]
pub(crate) struct Gate {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Since the trap was set.
    steps: Vec<String>,
    trap: Option<(Trap, Moment)>,
    /// A step is being stopped, and no other one begins.
    closed: bool,
    caught: CancellationToken,
    opened: CancellationToken,
}

/// The gate was opened again: the connection of a step that was stopped is to be dropped.
#[derive(Debug)]
pub(crate) struct Stopped;

/// A step that goes on.
pub(crate) struct Step {
    /// Its answer is for [`Gate::withhold`].
    pub(crate) is_withheld: bool,
}

impl Gate {
    /// Stops at the `n`-th step from now on (1: the next one), and lets no other one begin from then on.
    pub(crate) fn set(&self, n: usize, moment: Moment) {
        self.trap(Trap::Number(n), moment);
    }

    /// The same at the next step that is this statement of the store.
    pub(crate) fn set_at(&self, name: &'static str, moment: Moment) {
        self.trap(Trap::Named(name), moment);
    }

    fn trap(&self, trap: Trap, moment: Moment) {
        self.change(|state| {
            state.steps.clear();
            state.trap = Some((trap, moment));
        });
    }

    /// Resolves once a step has been stopped.
    pub(crate) async fn caught(&self) {
        let caught = self.change(|state| state.caught.clone());
        caught.cancelled().await;
    }

    /// Lets everything pass again, and drops the connections of what was stopped. What passed or was stopped since the
    /// trap was set, in order.
    pub(crate) fn open(&self) -> Vec<String> {
        let before = self.change(std::mem::take);
        before.opened.cancel();
        before.steps
    }

    /// To be asked by a tap before it hands a question on. Does not return if it is to be stopped there.
    pub(crate) async fn step(&self, what: impl FnOnce() -> String) -> Result<Step, Stopped> {
        let (stop, opened, caught) = self.change(|state| {
            let mut stop = None;
            if state.closed {
                stop = Some((Moment::Before, false));
            } else if let Some((trap, moment)) = state.trap {
                let what = what();
                let is_it = match trap {
                    Trap::Number(n) => state.steps.len() + 1 == n,
                    Trap::Named(name) => what == name,
                };
                state.steps.push(what);
                if is_it {
                    state.closed = true;
                    stop = Some((moment, true));
                }
            }
            (stop, state.opened.clone(), state.caught.clone())
        });
        match stop {
            None => Ok(Step { is_withheld: false }),
            Some((Moment::After, _)) => Ok(Step { is_withheld: true }),
            Some((Moment::Before, is_it)) => {
                if is_it {
                    caught.cancel();
                }
                opened.cancelled().await;
                Err(Stopped)
            }
        }
    }

    /// To be called when the answer of such a step is there.
    pub(crate) async fn withhold(&self) -> Stopped {
        let (opened, caught) = self.change(|state| (state.opened.clone(), state.caught.clone()));
        caught.cancel();
        opened.cancelled().await;
        Stopped
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl From<Stopped> for std::io::Error {
    fn from(_: Stopped) -> Self {
        Self::other("stopped")
    }
}
