//! The state machine of a run, as a pure function: the status that a step leads to.

use super::RunStatus;

/// An event in the life of a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// The run starts.
    Start,
    /// The model asks for function calls.
    AwaitTools,
    /// The caller answers the calls.
    Resume,
    /// A caller, or a new message, cancels the run.
    Cancel,
    /// The run ends with this status, which must be final.
    End(RunStatus),
}

/// A step that the run's status does not allow.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a run that is {from} cannot take the step {step:?}")]
pub struct IllegalTransition {
    pub from: RunStatus,
    pub step: Step,
}

impl RunStatus {
    /// Returns the status after a step.
    ///
    /// - A queued run can start, or end without a start.
    /// - A run that holds its thread can end at any time, in the ways that its status allows.
    /// - A cancel that loses the race to another end is no error.
    /// - Nothing leaves a final status.
    ///
    /// # Errors
    /// [`IllegalTransition`] if the status does not allow the step.
    pub const fn on(self, step: Step) -> Result<Self, IllegalTransition> {
        let illegal = Err(IllegalTransition { from: self, step });
        match (self, step) {
            (Self::Queued, Step::Start) | (Self::RequiresAction, Step::Resume) => {
                Ok(Self::InProgress)
            }
            (Self::InProgress, Step::AwaitTools) => Ok(Self::RequiresAction),
            (Self::Queued, Step::Cancel) => Ok(Self::Cancelled),
            (Self::InProgress | Self::RequiresAction | Self::Cancelling, Step::Cancel) => {
                Ok(Self::Cancelling)
            }
            // A run with these statuses cannot complete: it has no answer of the model.
            (Self::Queued | Self::RequiresAction, Step::End(end)) => match end {
                Self::Failed | Self::Cancelled | Self::Expired => Ok(end),
                _ => illegal,
            },
            (Self::InProgress | Self::Cancelling, Step::End(end)) if end.is_final() => Ok(end),
            _ => illegal,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::ThreadState;

    fn status() -> impl Strategy<Value = RunStatus> {
        proptest::sample::select(RunStatus::ALL)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Start),
            Just(Step::AwaitTools),
            Just(Step::Resume),
            Just(Step::Cancel),
            status().prop_map(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn nothing_leaves_a_final_status(from in status(), step in step()) {
            prop_assume!(from.is_final());
            prop_assert_eq!(from.on(step), Err(IllegalTransition { from, step }));
        }

        #[test]
        fn whatever_happens_a_run_can_still_end_and_does_so_once(steps in proptest::collection::vec(step(), 0..40)) {
            let mut at = RunStatus::Queued;
            let mut ends = 0;
            for step in steps {
                let Ok(next) = at.on(step) else { continue };
                ends += usize::from(next.is_final());
                // No step leads back into the queue.
                prop_assert!(next != RunStatus::Queued);
                at = next;
            }
            prop_assert!(ends <= 1);
            prop_assert_eq!(ends == 1, at.is_final());
            for end in [RunStatus::Failed, RunStatus::Cancelled, RunStatus::Expired] {
                prop_assert_eq!(at.on(Step::End(end)).is_ok(), !at.is_final());
            }
        }

        #[test]
        fn a_step_that_ends_ends_as_it_says(from in status(), end in status()) {
            if let Ok(next) = from.on(Step::End(end)) {
                prop_assert!(next == end && end.is_final());
            }
        }

        #[test]
        fn a_thread_is_busy_exactly_while_a_run_holds_it(steps in proptest::collection::vec(step(), 0..40)) {
            let mut at = RunStatus::Queued;
            for step in steps {
                at = at.on(step).unwrap_or(at);
                let state = ThreadState::of(at.is_active().then_some(at));
                prop_assert_eq!(state == ThreadState::Idle, at.is_final() || at == RunStatus::Queued);
                prop_assert_eq!(state == ThreadState::RequiresAction, at == RunStatus::RequiresAction);
            }
        }
    }

    /// Every status that is not final has a step to a final one.
    #[test]
    fn every_path_ends() {
        let steps = || {
            let ends = RunStatus::ALL.iter().map(|end| Step::End(*end));
            ends.chain([Step::Start, Step::AwaitTools, Step::Resume, Step::Cancel])
        };
        for from in RunStatus::ALL.iter().filter(|status| !status.is_final()) {
            let final_ones = steps()
                .filter(|step| from.on(*step).is_ok_and(RunStatus::is_final))
                .count();
            assert!(final_ones > 0, "{from} has no way to its end");
        }
        // A run leaves `InProgress` for a tool wait and comes back only with an answer: no cycle
        // without a caller.
        assert_eq!(
            RunStatus::InProgress.on(Step::AwaitTools),
            Ok(RunStatus::RequiresAction)
        );
        assert_eq!(RunStatus::Cancelling.on(Step::AwaitTools).ok(), None);
        assert_eq!(RunStatus::Cancelling.on(Step::Resume).ok(), None);
    }
}
