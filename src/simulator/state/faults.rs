//! Faults that wait for the next matching requests, whatever their content.

use serde::{Deserialize, Serialize};

use crate::simulator::behaviour::plan::Plan;
use crate::simulator::wire::operation::Operation;

/// A fault for the next `times` requests of one kind.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// An operation (`create_run`, `get_response`, …), `start` (any operation that starts a run),
    /// `create_thread` (of either protocol), or `any`.
    pub on: String,
    /// Directives in the form of a user's text: `status=500`, `silent_after=3 crlf`, …
    pub fault: String,
    #[serde(default = "once")]
    pub times: u32,
}

/// The queued faults, oldest first.
#[derive(Debug, Default)]
pub(in crate::simulator) struct Faults(Vec<Fault>);

impl Faults {
    /// Adds a fault. An error says what is wrong with the fault.
    pub(in crate::simulator) fn add(&mut self, fault: Fault) -> Result<(), String> {
        Plan::default().apply(&fault.fault)?;
        if !(Operation::exists(&fault.on) || ["any", "start"].contains(&fault.on.as_str())) {
            return Err(format!("there is no operation '{}'", fault.on));
        }
        if fault.times > 0 {
            self.0.push(fault);
        }
        Ok(())
    }

    /// Takes one use of the oldest fault for `operation`. Returns `None` also if the fault's
    /// `chance` spares this request.
    pub(in crate::simulator) fn take(&mut self, operation: Operation) -> Option<String> {
        let at = self
            .0
            .iter()
            .position(|fault| operation.answers_to(&fault.on))?;
        let fault = &mut self.0[at];
        fault.times -= 1;
        let directives = if fault.times == 0 {
            self.0.remove(at).fault
        } else {
            fault.fault.clone()
        };
        let mut plan = Plan::default();
        plan.apply(&directives)
            .ok()
            .filter(|()| plan.is_hit())
            .map(|()| directives)
    }

    pub(in crate::simulator) fn list(&self) -> &[Fault] {
        &self.0
    }

    pub(in crate::simulator) fn clear(&mut self) {
        self.0.clear();
    }
}

const fn once() -> u32 {
    1
}
