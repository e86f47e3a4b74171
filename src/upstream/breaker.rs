//! Leaves an upstream alone after too many failures in a row.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The longest that a call is put off while another one tries whether the upstream is back.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// Counts the failures of calls. After too many in a row it lets none through for a while, then one, or another one
/// after as long if that has no answer yet, until one is answered. Silence is neither: the upstream may be thinking.
#[derive(Debug)]
pub(super) struct Breaker {
    /// 0: calls always pass.
    max_failures: u32,
    rest: Duration,
    circuit: Mutex<Circuit>,
}

#[derive(Debug)]
struct Circuit {
    state: State,
    /// Probes so far, to tell them apart.
    probes: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Calls pass. So many have failed since the last answer.
    Closed { failures: u32 },
    /// No call passes until then. After that the next one is a probe.
    Open { until: Instant },
    /// A probe is under way. The next one does not wait for it beyond then.
    Probing { probe: u64, until: Instant },
}

/// The right to make one call. Its drop without a verdict changes nothing, but lets the next call be the probe if this
/// one was.
#[derive(Debug)]
#[must_use = "the call's outcome has to be told"]
pub(super) struct Permit {
    breaker: Arc<Breaker>,
    probe: Option<u64>,
}

impl Breaker {
    pub(super) fn new(max_failures: u32, rest: Duration) -> Self {
        let circuit = Circuit { state: State::Closed { failures: 0 }, probes: 0 };
        Self { max_failures, rest, circuit: Mutex::new(circuit) }
    }

    /// Whether a call would pass now; if not, for how long none will.
    pub(super) fn check(&self) -> Result<(), Duration> {
        self.circuit().state.check(Instant::now())
    }

    /// Lets a call through, or says for how long none passes.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Permit, Duration> {
        let (mut circuit, now) = (self.circuit(), Instant::now());
        circuit.state.check(now)?;
        let probe = match circuit.state {
            State::Closed { .. } => None,
            State::Open { .. } | State::Probing { .. } => {
                circuit.probes += 1;
                circuit.state = State::Probing { probe: circuit.probes, until: now + self.rest };
                Some(circuit.probes)
            }
        };
        drop(circuit);
        Ok(Permit { breaker: Arc::clone(self), probe })
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(self, now: Instant) -> Result<(), Duration> {
        match self {
            Self::Closed { .. } => Ok(()),
            Self::Open { until } | Self::Probing { until, .. } if until <= now => Ok(()),
            Self::Open { until } => Err(until - now),
            Self::Probing { until, .. } => Err((until - now).min(PROBE_TIME)),
        }
    }

    /// This probe is the one that is waited for.
    const fn is_probe(self, number: u64) -> bool {
        matches!(self, Self::Probing { probe, .. } if probe == number)
    }
}

impl Permit {
    /// The upstream has answered, whatever it said.
    pub(super) fn answered(mut self) {
        self.probe = None;
        self.breaker.circuit().state = State::Closed { failures: 0 };
    }

    /// The upstream was not reached, broke off before it answered, or answered that it is broken. Tells whether it is left alone
    /// because of this.
    pub(super) fn failed(mut self) -> bool {
        let breaker = &self.breaker;
        let mut circuit = breaker.circuit();
        let open = State::Open { until: Instant::now() + breaker.rest };
        circuit.state = match circuit.state {
            State::Closed { failures } if breaker.max_failures > 0 => {
                let failures = failures + 1;
                if failures < breaker.max_failures { State::Closed { failures } } else { open }
            }
            State::Probing { probe, .. } if self.probe == Some(probe) => open,
            // Calls that were made before the upstream was left alone say nothing new.
            state => state,
        };
        let opened = circuit.state == open;
        drop(circuit);
        self.probe = None;
        opened
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(mine) = self.probe else { return };
        let mut circuit = self.breaker.circuit();
        if circuit.state.is_probe(mine) {
            circuit.state = State::Open { until: Instant::now() };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::advance;

    use super::*;

    const REST: Duration = Duration::from_secs(10);

    fn breaker(max_failures: u32) -> Arc<Breaker> {
        Arc::new(Breaker::new(max_failures, REST))
    }

    fn fail(breaker: &Arc<Breaker>, times: u32) {
        for _ in 0..times {
            breaker.enter().unwrap().failed();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it_and_one_probe_at_a_time_may_close_it() {
        let breaker = breaker(3);
        fail(&breaker, 2);
        breaker.enter().unwrap().answered();
        fail(&breaker, 3);
        assert_eq!(breaker.check(), Err(REST));
        advance(REST / 2).await;
        assert_eq!(breaker.enter().unwrap_err(), REST / 2);
        advance(REST / 2).await;
        assert_eq!((breaker.check(), breaker.check()), (Ok(()), Ok(())), "asking uses nothing up");

        let probe = breaker.enter().unwrap();
        assert_eq!(breaker.enter().unwrap_err(), PROBE_TIME);
        probe.failed();
        assert_eq!(breaker.check(), Err(REST));
        advance(REST).await;
        drop(breaker.enter().unwrap());
        let probe = breaker.enter().unwrap();
        probe.answered();
        fail(&breaker, 2);
        assert_eq!(breaker.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_from_before_neither_prolong_the_rest_nor_end_a_probe_of_others() {
        let breaker = breaker(1);
        let (early, late, lost) =
            (breaker.enter().unwrap(), breaker.enter().unwrap(), breaker.enter().unwrap());
        fail(&breaker, 1);
        advance(REST / 2).await;
        early.failed();
        assert_eq!(breaker.check(), Err(REST / 2));
        advance(REST / 2).await;
        let probe = breaker.enter().unwrap();
        drop(lost);
        assert_eq!(breaker.check(), Err(PROBE_TIME));
        late.answered();
        assert_eq!(breaker.check(), Ok(()), "an answer is an answer");
        drop(probe);
        assert_eq!(breaker.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_probe_holds_up_the_next_one_for_no_longer_than_the_rest() {
        let breaker = breaker(1);
        fail(&breaker, 1);
        advance(REST).await;
        let silent = breaker.enter().unwrap();
        assert_eq!(breaker.check(), Err(PROBE_TIME));
        advance(REST).await;
        let next = breaker.enter().unwrap();
        drop(silent);
        assert_eq!(breaker.check(), Err(PROBE_TIME), "it is another one that is waited for");
        next.failed();
        assert_eq!(breaker.check(), Err(REST));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_it_never_opens() {
        let breaker = breaker(0);
        fail(&breaker, 1000);
        assert_eq!(breaker.check(), Ok(()));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Enter,
        Answer(usize),
        Fail(usize),
        Drop(usize),
        Wait(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => Just(Op::Enter),
            2 => (0..8_usize).prop_map(Op::Answer),
            4 => (0..8_usize).prop_map(Op::Fail),
            1 => (0..8_usize).prop_map(Op::Drop),
            2 => (1..12_u64).prop_map(Op::Wait),
        ]
    }

    proptest! {
        #[test]
        fn it_opens_only_after_enough_failures_lets_one_probe_through_and_never_stays_shut(
            max in 1..5_u32,
            ops in proptest::collection::vec(op(), 0..80),
        ) {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let breaker = breaker(max);
                let mut permits: Vec<Permit> = Vec::new();
                let mut in_a_row = 0;
                for op in ops {
                    let refused = breaker.check().is_err();
                    match op {
                        Op::Enter => match breaker.enter() {
                            Ok(permit) => {
                                prop_assert!(!refused);
                                permits.push(permit);
                            }
                            Err(wait) => prop_assert!(refused && wait <= REST && !wait.is_zero()),
                        },
                        Op::Answer(at) if at < permits.len() => {
                            permits.swap_remove(at).answered();
                            in_a_row = 0;
                            prop_assert!(breaker.check().is_ok());
                        }
                        Op::Fail(at) if at < permits.len() => {
                            permits.swap_remove(at).failed();
                            in_a_row += 1;
                        }
                        Op::Drop(at) if at < permits.len() => drop(permits.swap_remove(at)),
                        Op::Wait(seconds) => advance(Duration::from_secs(seconds)).await,
                        Op::Answer(_) | Op::Fail(_) | Op::Drop(_) => {}
                    }
                    prop_assert!(in_a_row >= max || breaker.check().is_ok());
                    let probing = matches!(breaker.circuit().state, State::Probing { .. });
                    let probes = permits.iter().filter(|permit| {
                        breaker.circuit().state.is_probe(permit.probe.unwrap_or(0))
                    });
                    prop_assert_eq!(probes.count(), usize::from(probing));
                }
                advance(REST).await;
                prop_assert!(breaker.check().is_ok(), "even if nobody answers or gives up");
                Ok(())
            })?;
        }
    }
}
