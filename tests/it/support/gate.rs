//! A gate for the steps of a gateway: its requests to database and upstream. A test can stop it
//! at any step.

use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// The side of a step at which the gate stops it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Moment {
    /// Before any of it has arrived.
    Before,
    /// After it has taken effect, but before its answer is returned.
    After,
}

/// The step to stop.
#[derive(Clone, Copy)]
enum Trap {
    /// The step with this number.
    Number(usize),
    /// The first step with this statement.
    Named(&'static str),
}

/// What proxies ask before they pass a step on. Clones are the same gate.
#[derive(Clone, Default)]
pub(crate) struct Gate {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The steps since the trap was set.
    steps: Vec<String>,
    trap: Option<(Trap, Moment)>,
    /// A step is stopped, and no other step begins.
    closed: bool,
    caught: CancellationToken,
    opened: CancellationToken,
}

/// The gate has opened again. The proxy must drop the connection of the stopped step.
#[derive(Debug)]
pub(crate) struct Stopped;

/// A step that may proceed.
pub(crate) struct Step {
    /// The proxy gives this step's answer to [`Gate::withhold`].
    pub(crate) is_withheld: bool,
}

impl Gate {
    /// Stops the `n`-th step from now on (1 is the next step). No other step begins after that.
    pub(crate) fn set(&self, n: usize, moment: Moment) {
        self.trap(Trap::Number(n), moment);
    }

    /// The same for the next step with this statement of the store.
    pub(crate) fn set_at(&self, name: &'static str, moment: Moment) {
        self.trap(Trap::Named(name), moment);
    }

    fn trap(&self, trap: Trap, moment: Moment) {
        self.change(|state| {
            state.steps.clear();
            state.trap = Some((trap, moment));
        });
    }

    /// Waits until a step is stopped.
    pub(crate) async fn caught(&self) {
        let caught = self.change(|state| state.caught.clone());
        caught.cancelled().await;
    }

    /// Lets all steps pass again, and drops the connections of the stopped ones. Returns the
    /// steps since the trap was set, in order.
    pub(crate) fn open(&self) -> Vec<String> {
        let before = self.change(std::mem::take);
        before.opened.cancel();
        before.steps
    }

    /// A proxy calls this before it passes a step on. If the gate stops the step here, the call
    /// fails once the gate opens.
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

    /// A proxy calls this when the answer of a withheld step has arrived.
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
