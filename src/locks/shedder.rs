//! Turns work away when more arrives than can be done, so that what is taken stays quick.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long more may be under way than is good before it counts as no mere burst; and how long the rate is counted for.
const BURST: Duration = Duration::from_millis(100);
/// Got through in a second, where nothing has for a moment: so a long delay lets in much even then.
const SLOWEST: f64 = 1.0;
/// After something was turned away nothing counts as a burst for so long: where far too much arrives, a moment's pause of
/// those who send it must not let in a crowd.
const CALM: Duration = Duration::from_secs(1);

/// Counts what is under way through a bottleneck, and how fast it gets through.
///
/// A burst is let in, however large: it is worked off in a while. When work keeps coming faster than it is done, only so
/// much is let in as gets through soon, and the rest is turned away at once. How fast the bottleneck is, is seen, not
/// set, so it may be anything: the processor, the database, or the way to it.
#[derive(Debug)]
pub struct Shedder {
    /// So many at once are never too many: the bottleneck is as wide.
    width: usize,
    max_delay: Duration,
    flow: Arc<Mutex<Flow>>,
}

#[derive(Debug)]
struct Flow {
    under_way: usize,
    /// When last nothing was under way.
    busy_since: Instant,
    /// When last something was turned away.
    overrun_at: Option<Instant>,
    /// Got through since then.
    done: u32,
    counted_since: Instant,
    /// Got through in a second, lately.
    rate: f64,
}

/// More arrives than can be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Overrun;

/// Something that is under way, until it is dropped.
#[derive(Debug)]
pub struct Pass {
    flow: Arc<Mutex<Flow>>,
    is_through: bool,
}

impl Shedder {
    /// For a bottleneck through which `width` may go at once. What is let in when more arrives than gets through waits
    /// about `max_delay` for its turn there, and not much longer.
    pub fn new(width: usize, max_delay: Duration) -> Self {
        let now = Instant::now();
        let flow =
            Flow { under_way: 0, busy_since: now, overrun_at: None, done: 0, counted_since: now, rate: 0.0 };
        Self { width, max_delay, flow: Arc::new(Mutex::new(flow)) }
    }

    /// Lets it in, at once or not at all.
    pub fn enter(&self) -> Result<Pass, Overrun> {
        let (now, mut flow) = (Instant::now(), lock(&self.flow));
        flow.count(now);
        if !flow.is_burst(now) && flow.under_way >= self.width + flow.in_time(self.max_delay) {
            flow.overrun_at = Some(now);
            return Err(Overrun);
        }
        Ok(self.pass(&mut flow, now))
    }

    /// Lets in what cannot be turned away. It counts like the rest.
    pub fn enter_anyway(&self) -> Pass {
        let (now, mut flow) = (Instant::now(), lock(&self.flow));
        flow.count(now);
        self.pass(&mut flow, now)
    }

    fn pass(&self, flow: &mut Flow, now: Instant) -> Pass {
        if flow.under_way == 0 {
            flow.busy_since = now;
        }
        flow.under_way += 1;
        Pass { flow: Arc::clone(&self.flow), is_through: false }
    }
}

impl Flow {
    /// Takes stock from time to time.
    fn count(&mut self, now: Instant) {
        let time = now.duration_since(self.counted_since);
        if time >= BURST {
            self.rate = f64::from(self.done) / time.as_secs_f64();
            (self.done, self.counted_since) = (0, now);
        }
    }

    /// Whatever comes now is let in.
    fn is_burst(&self, now: Instant) -> bool {
        let is_calm = self.overrun_at.is_none_or(|at| now.duration_since(at) >= CALM);
        is_calm && (self.under_way == 0 || now.duration_since(self.busy_since) < BURST)
    }

    /// So many get through in this time.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it saturates, and is not negative"
    )]
    fn in_time(&self, time: Duration) -> usize {
        (self.rate.max(SLOWEST) * time.as_secs_f64()) as usize
    }
}

impl Pass {
    /// It got through. Dropped without it, it did not get as far.
    pub fn is_through(mut self) {
        self.is_through = true;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut flow = lock(&self.flow);
        flow.under_way -= 1;
        flow.done += u32::from(self.is_through);
    }
}

/// Nothing in here panics half-way through a change.
fn lock(flow: &Mutex<Flow>) -> MutexGuard<'_, Flow> {
    flow.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const DELAY: Duration = Duration::from_millis(10);

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_in_whole() {
        let shedder = Shedder::new(2, DELAY);
        let burst: Vec<_> = (0..1000).map(|_| shedder.enter().unwrap()).collect();
        advance(BURST).await;
        assert_eq!(shedder.enter().unwrap_err(), Overrun, "it has not been worked off");
        drop(burst);
        assert!(shedder.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_keeps_coming_is_let_in_as_fast_as_it_gets_through() {
        let shedder = Shedder::new(2, DELAY);
        // Four come and one gets through in each millisecond.
        let (mut under_way, mut longest) = (std::collections::VecDeque::new(), 0);
        for millisecond in 0..2000 {
            under_way.extend((0..4).filter_map(|_| shedder.enter().ok()));
            under_way.pop_front().unwrap().is_through();
            if millisecond >= 500 {
                longest = longest.max(under_way.len());
                assert!(!under_way.is_empty());
            }
            advance(Duration::from_millis(1)).await;
        }
        // 1,000 a second are 10 in 10 ms.
        assert!((9..=12).contains(&longest), "{longest} were under way");
        // A moment in which nothing comes is no calm.
        drop(under_way);
        let crowd: Vec<_> = (0..1000).filter_map(|_| shedder.enter().ok()).collect();
        assert!(crowd.len() <= 12, "{} were let in", crowd.len());
        drop(crowd);
        advance(CALM).await;
        let burst: Vec<_> = (0..1000).map(|_| shedder.enter().unwrap()).collect();
        assert_eq!(burst.len(), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_slow_but_narrow_enough_is_no_overload() {
        let shedder = Shedder::new(2, DELAY);
        let mut before = shedder.enter().unwrap();
        for _ in 0..100 {
            advance(Duration::from_secs(1)).await;
            let next = shedder.enter().unwrap();
            std::mem::replace(&mut before, next).is_through();
        }
    }
}
