//! A circuit breaker: it stops messages to an upstream while most requests fail.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::UpstreamConfig;

/// Number of slots of the window. The gateway forgets one slot at a time, the oldest first.
const SLOTS: usize = 10;
/// Most requests that pass at once as probes, which find out whether the upstream works again.
const PROBES: u32 = 3;
/// Number of probes that decide: this many answers close the breaker, this many failures open it
/// again.
const MAJORITY: u32 = 2;
/// Time for which probes without a verdict hold up further probes. A request to a dead server may
/// take that long to fail, and not every request should become a probe.
const SILENT_AFTER: Duration = Duration::from_secs(10);
/// Longest wait that a refused caller is asked for while probes are under way.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// The circuit breaker of one upstream. It counts requests; a request is one round of a run with
/// all its tries.
///
/// - Closed: all requests pass. The breaker opens when `window` has at least `min_requests`
///   verdicts and more than half of them are failures.
/// - Open: no request passes for the time `open`.
/// - Half-open: a few probes pass, and the majority of their verdicts closes or opens the breaker.
///   Silence is no failure: after a while without a verdict, the next probes pass.
#[derive(Debug)]
pub struct Breaker {
    upstream: String,
    /// Fewest verdicts in the window that can open the breaker; 0: it never opens.
    min_requests: u32,
    window: Duration,
    open: Duration,
    circuit: Mutex<Circuit>,
}

#[derive(Debug)]
struct Circuit {
    state: State,
    /// Number of state changes so far. A verdict on a request of an earlier state says nothing
    /// about this state.
    epoch: u64,
}

#[derive(Debug)]
enum State {
    Closed(Box<Window>),
    /// No request passes before `until`. The next ones are probes.
    Open {
        until: Instant,
    },
    /// `places`: probes that may still pass before `until`. From then on `PROBES` of them may pass
    /// again.
    HalfOpen {
        places: u32,
        until: Instant,
        answers: u32,
        failures: u32,
    },
}

/// The recent verdicts.
#[derive(Debug)]
struct Window {
    begun: Instant,
    slots: [Slot; SLOTS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Number of the slot's span of time, counted from `begun`.
    number: u128,
    requests: u32,
    failures: u32,
}

/// The right to make one request. Its first verdict counts. A drop without a verdict changes
/// nothing, except that it gives a probe's place back.
#[derive(Debug)]
#[must_use = "report the request's outcome to the permit"]
pub(in crate::runs) struct Permit {
    breaker: Arc<Breaker>,
    epoch: u64,
    has_verdict: bool,
}

impl Breaker {
    pub fn new(upstream: &str, config: &UpstreamConfig) -> Self {
        let circuit = Circuit {
            state: State::Closed(Box::new(Window::new())),
            epoch: 0,
        };
        Self {
            upstream: upstream.to_owned(),
            min_requests: config.breaker_min_requests,
            window: config.breaker_window,
            open: config.breaker_open_duration,
            circuit: Mutex::new(circuit),
        }
    }

    /// Checks whether a request would pass now. Takes no permit.
    ///
    /// # Errors
    /// The time to wait before the next request.
    pub(in crate::runs) fn check(&self) -> Result<(), Duration> {
        self.circuit().state.check(Instant::now())
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// The time to wait before the next request.
    pub(in crate::runs) fn enter(self: &Arc<Self>) -> Result<Permit, Duration> {
        let (mut circuit, now) = (self.circuit(), Instant::now());
        circuit.state.check(now)?;
        let until = now + SILENT_AFTER;
        match &mut circuit.state {
            State::Closed(_) => {}
            State::Open { .. } => {
                circuit.change(State::HalfOpen {
                    places: PROBES - 1,
                    until,
                    answers: 0,
                    failures: 0,
                });
            }
            State::HalfOpen {
                places,
                until: renewal,
                ..
            } => {
                if *renewal <= now {
                    (*places, *renewal) = (PROBES, until);
                }
                *places -= 1;
            }
        }
        Ok(Permit {
            breaker: Arc::clone(self),
            epoch: circuit.epoch,
            has_verdict: false,
        })
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Circuit {
    fn change(&mut self, state: State) {
        self.state = state;
        self.epoch += 1;
    }
}

impl State {
    fn check(&self, now: Instant) -> Result<(), Duration> {
        match *self {
            Self::Closed(_) => Ok(()),
            Self::Open { until } if until <= now => Ok(()),
            Self::Open { until } => Err(until - now),
            Self::HalfOpen { places, until, .. } if places > 0 || until <= now => Ok(()),
            Self::HalfOpen { until, .. } => Err((until - now).min(PROBE_TIME)),
        }
    }
}

impl Window {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            slots: [Slot::default(); SLOTS],
        }
    }

    /// Counts a verdict. Returns the requests within the last `length`, and the failures among
    /// them.
    fn count(&mut self, length: Duration, failed: bool) -> (u32, u32) {
        let slot_nanos = (length.as_nanos() / SLOTS as u128).max(1);
        let number = self.begun.elapsed().as_nanos() / slot_nanos;
        let slot = &mut self.slots[usize::try_from(number % SLOTS as u128).unwrap_or_default()];
        if slot.number != number {
            *slot = Slot {
                number,
                ..Slot::default()
            };
        }
        slot.requests = slot.requests.saturating_add(1);
        slot.failures = slot.failures.saturating_add(u32::from(failed));
        let recent = self
            .slots
            .iter()
            .filter(|slot| slot.number + SLOTS as u128 > number);
        recent.fold((0, 0), |(requests, failures), slot| {
            (
                requests.saturating_add(slot.requests),
                failures.saturating_add(slot.failures),
            )
        })
    }
}

impl Permit {
    /// Reports that the upstream answered, whatever it said.
    pub(in crate::runs) fn answered(&mut self) {
        self.judge(false);
    }

    /// Reports that the request failed after all its tries: the upstream was not reachable, broke
    /// the connection, or answered that it is broken.
    pub(in crate::runs) fn failed(&mut self) {
        self.judge(true);
    }

    fn judge(&mut self, failed: bool) {
        if std::mem::replace(&mut self.has_verdict, true) {
            return;
        }
        let breaker = &self.breaker;
        let mut circuit = breaker.circuit();
        if circuit.epoch != self.epoch {
            return;
        }
        let opens = match &mut circuit.state {
            State::Closed(window) => {
                let (requests, failures) = window.count(breaker.window, failed);
                let is_enough = breaker.min_requests > 0 && requests >= breaker.min_requests;
                (failed && is_enough && failures > requests / 2).then_some((requests, failures))
            }
            // At the latest the third verdict decides, so each verdict that is still needed has a
            // place.
            State::HalfOpen {
                answers, failures, ..
            } => {
                *if failed {
                    &mut *failures
                } else {
                    &mut *answers
                } += 1;
                let (answers, failures) = (*answers, *failures);
                if answers >= MAJORITY {
                    circuit.change(State::Closed(Box::new(Window::new())));
                    drop(circuit);
                    tracing::info!(
                        upstream.name = breaker.upstream,
                        "the upstream answers again; the gateway sends messages again"
                    );
                    return;
                }
                (failures >= MAJORITY).then_some((answers + failures, failures))
            }
            State::Open { .. } => None,
        };
        let Some((requests, failures)) = opens else {
            return;
        };
        circuit.change(State::Open {
            until: Instant::now() + breaker.open,
        });
        drop(circuit);
        tracing::warn!(
            upstream.name = breaker.upstream,
            requests,
            failures,
            "most requests to the upstream fail; the gateway stops sending messages to it for a while"
        );
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.has_verdict {
            return;
        }
        let mut circuit = self.breaker.circuit();
        if circuit.epoch == self.epoch
            && let State::HalfOpen { places, .. } = &mut circuit.state
        {
            *places = (*places + 1).min(PROBES);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::advance;

    use super::*;
    use crate::config::UpstreamKind;

    const WINDOW: Duration = Duration::from_secs(10);
    const OPEN: Duration = Duration::from_secs(5);

    fn breaker(min_requests: u32) -> Arc<Breaker> {
        let mut config = UpstreamConfig::new(UpstreamKind::Responses, "http://h".parse().unwrap());
        config.breaker_min_requests = min_requests;
        (config.breaker_window, config.breaker_open_duration) = (WINDOW, OPEN);
        Arc::new(Breaker::new("test", &config))
    }

    fn fail(breaker: &Arc<Breaker>, times: u32) {
        for _ in 0..times {
            breaker.enter().unwrap().failed();
        }
    }

    fn answer(breaker: &Arc<Breaker>, times: u32) {
        for _ in 0..times {
            breaker.enter().unwrap().answered();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_half_of_enough_failed_requests_open_it() {
        let breaker = breaker(4);
        fail(&breaker, 3);
        assert_eq!(breaker.check(), Ok(()), "too few");
        answer(&breaker, 3);
        assert_eq!(breaker.check(), Ok(()), "half of them");
        fail(&breaker, 1);
        assert_eq!(breaker.check(), Err(OPEN));
        advance(OPEN / 2).await;
        assert_eq!(breaker.enter().unwrap_err(), OPEN / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_older_than_the_window_is_forgotten() {
        let breaker = breaker(4);
        answer(&breaker, 1000);
        fail(&breaker, 3);
        advance(WINDOW).await;
        fail(&breaker, 3);
        assert_eq!(breaker.check(), Ok(()));
        fail(&breaker, 1);
        assert_eq!(breaker.check(), Err(OPEN));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_counts_once_by_its_first_verdict() {
        let breaker = breaker(2);
        let mut request = breaker.enter().unwrap();
        for _ in 0..9 {
            request.failed();
        }
        let mut broke_later = breaker.enter().unwrap();
        broke_later.answered();
        broke_later.failed();
        assert_eq!(breaker.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_majority_of_several_probes_decides() {
        for (verdicts, closes) in [([true, true], true), ([false, false], false)] {
            let breaker = breaker(1);
            fail(&breaker, 1);
            advance(OPEN).await;
            assert_eq!(
                (breaker.check(), breaker.check()),
                (Ok(()), Ok(())),
                "asking uses nothing up"
            );
            let mut probes: Vec<_> = (0..PROBES).map(|_| breaker.enter().unwrap()).collect();
            assert_eq!(breaker.enter().unwrap_err(), PROBE_TIME);
            let mut first = probes.pop().unwrap();
            if closes {
                first.failed();
            } else {
                first.answered();
            }
            assert_eq!(breaker.check(), Err(PROBE_TIME));
            for verdict in verdicts {
                let mut probe = probes.pop().unwrap();
                if verdict {
                    probe.answered();
                } else {
                    probe.failed();
                }
            }
            assert_eq!(breaker.check(), if closes { Ok(()) } else { Err(OPEN) });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_without_a_verdict_gives_its_place_back() {
        let breaker = breaker(1);
        fail(&breaker, 1);
        advance(OPEN).await;
        let _silent: Vec<_> = (1..PROBES).map(|_| breaker.enter().unwrap()).collect();
        let given_up = breaker.enter().unwrap();
        assert_eq!(breaker.check(), Err(PROBE_TIME));
        drop(given_up);
        assert_eq!(breaker.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn silent_probes_hold_up_the_next_ones_only_for_a_while() {
        let breaker = breaker(1);
        fail(&breaker, 1);
        advance(OPEN).await;
        let mut silent: Vec<_> = (0..PROBES).map(|_| breaker.enter().unwrap()).collect();
        assert_eq!(breaker.check(), Err(PROBE_TIME));
        advance(SILENT_AFTER).await;
        breaker.enter().unwrap().answered();
        silent.pop().unwrap().answered();
        fail(&breaker, 1);
        assert_eq!(
            breaker.check(),
            Err(OPEN),
            "both answers count, so the breaker closes, and one failure opens it"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn requests_from_before_say_nothing_about_later() {
        let breaker = breaker(1);
        let (mut early, mut late) = (breaker.enter().unwrap(), breaker.enter().unwrap());
        fail(&breaker, 1);
        early.answered();
        assert_eq!(breaker.check(), Err(OPEN));
        advance(OPEN).await;
        answer(&breaker, 2);
        late.failed();
        assert_eq!(breaker.check(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_least_number_it_never_opens() {
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
            2 => (1..8_u64).prop_map(Op::Wait),
        ]
    }

    proptest! {
        #[test]
        fn it_opens_only_after_enough_failures_bounds_its_probes_and_never_stays_shut(
            min in 1..5_u32,
            ops in proptest::collection::vec(op(), 0..80),
        ) {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let breaker = breaker(min);
                let mut permits: Vec<Permit> = Vec::new();
                let (mut told, mut failed, mut was_open) = (0, 0, false);
                for op in ops {
                    let refused = breaker.check().is_err();
                    match op {
                        Op::Enter => match breaker.enter() {
                            Ok(permit) => {
                                prop_assert!(!refused);
                                permits.push(permit);
                            }
                            Err(wait) => prop_assert!(refused && wait <= OPEN && !wait.is_zero()),
                        },
                        Op::Answer(at) if at < permits.len() => {
                            permits.swap_remove(at).answered();
                            told += 1;
                            prop_assert!(refused || breaker.check().is_ok(), "an answer does not open it");
                        }
                        Op::Fail(at) if at < permits.len() => {
                            permits.swap_remove(at).failed();
                            (told, failed) = (told + 1, failed + 1);
                        }
                        Op::Drop(at) if at < permits.len() => {
                            drop(permits.swap_remove(at));
                            prop_assert!(refused || breaker.check().is_ok(), "a drop does not open it");
                        }
                        Op::Wait(seconds) => {
                            advance(Duration::from_secs(seconds)).await;
                            prop_assert!(refused || breaker.check().is_ok(), "time does not open it");
                        }
                        Op::Answer(_) | Op::Fail(_) | Op::Drop(_) => {}
                    }
                    let circuit = breaker.circuit();
                    was_open |= !matches!(circuit.state, State::Closed(_));
                    prop_assert!(!was_open || (told >= min && 2 * failed > min));
                    if let State::HalfOpen { places, answers, failures, .. } = circuit.state {
                        prop_assert!(places <= PROBES && answers < MAJORITY && failures < MAJORITY);
                    }
                }
                advance(OPEN.max(SILENT_AFTER)).await;
                prop_assert!(breaker.check().is_ok(), "even without any verdict or drop");
                Ok(())
            })?;
        }
    }
}
