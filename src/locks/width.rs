//! How much work at once keeps a bottleneck busy, and no more.

use std::time::Duration;

use tokio::time::Instant;

/// So much keeps a bottleneck busy that is near.
const NARROWEST: usize = 2;
/// To begin with.
const FIRST: usize = 4;
/// How long is looked before the width changes, and at how many pieces of work at least.
const WINDOW: Duration = Duration::from_millis(100);
const ENOUGH: u32 = 8;
/// So many times as long as when little is at work: pieces of work wait for each other then, so more of them at once
/// get no more done.
const STRETCH: f64 = 1.5;
/// How long what was seen when little was at work is taken for true. Then it is tried again.
const EPOCH: Duration = Duration::from_secs(10);

/// Finds out how much work at once is worth it, from how long pieces of it take: the idea of TCP Vegas. As long as each
/// takes hardly longer than when little is at work, there is room for one more.
#[derive(Debug)]
pub(super) struct Width {
    at_once: usize,
    narrowest: usize,
    widest: usize,
    window: Window,
    /// The least mean of a window in this epoch, and in the one before.
    quickest: Option<Duration>,
    quickest_before: Option<Duration>,
    epoch_since: Instant,
    /// What it was before it was narrowed to see how long work takes then.
    tried_from: Option<usize>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    took: Duration,
    pieces: u32,
    /// Something had to wait because of the width.
    was_short: bool,
}

impl Width {
    pub(super) fn new(widest: usize, now: Instant) -> Self {
        let widest = widest.max(1);
        Self {
            at_once: FIRST.min(widest),
            narrowest: NARROWEST.min(widest),
            widest,
            window: Window::new(now),
            quickest: None,
            quickest_before: None,
            epoch_since: now,
            tried_from: None,
        }
    }

    pub(super) fn at_once(&self) -> usize {
        self.at_once
    }

    /// Something had to wait for its turn.
    pub(super) fn was_short(&mut self) {
        self.window.was_short = true;
    }

    /// A piece of work took so long.
    pub(super) fn took(&mut self, time: Duration, now: Instant) {
        self.window.took += time;
        self.window.pieces += 1;
        if self.window.pieces >= ENOUGH && now.duration_since(self.window.since) >= WINDOW {
            let window = std::mem::replace(&mut self.window, Window::new(now));
            self.learn(window.took / window.pieces, window.was_short, now);
        }
    }

    fn learn(&mut self, mean: Duration, was_short: bool, now: Instant) {
        let quickest = self.quickest.map_or(mean, |quickest| quickest.min(mean));
        let usual = self.quickest_before.map_or(quickest, |before| before.min(quickest));
        self.quickest = Some(quickest);
        if let Some(before) = self.tried_from.take() {
            self.at_once = before;
        } else if was_short && mean > usual.mul_f64(STRETCH) {
            self.at_once = (self.at_once * 3 / 4).max(self.narrowest);
        } else if was_short {
            self.at_once = (self.at_once + 1).min(self.widest);
        }
        if now.duration_since(self.epoch_since) >= EPOCH {
            (self.quickest_before, self.quickest, self.epoch_since) = (Some(quickest), None, now);
            if was_short {
                self.tried_from = Some(std::mem::replace(&mut self.at_once, self.narrowest));
            }
        }
    }
}

impl Window {
    fn new(since: Instant) -> Self {
        Self { since, took: Duration::ZERO, pieces: 0, was_short: false }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::Semaphore;
    use tokio::task::JoinSet;
    use tokio::time::sleep;

    use super::super::gate::Gate;
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Something slow: each piece of work is on its way for a while, and then needs one of few processors.
    struct Slow {
        way: Mutex<Duration>,
        processors: Semaphore,
        service: Duration,
    }

    impl Slow {
        fn new(way: Duration, processors: usize, service: Duration) -> Arc<Self> {
            Arc::new(Self { way: Mutex::new(way), processors: Semaphore::new(processors), service })
        }

        async fn work(&self) -> Result<(), tokio::sync::AcquireError> {
            let way = *self.way.lock().unwrap();
            sleep(way).await;
            let _processor = self.processors.acquire().await?;
            sleep(self.service).await;
            Ok(())
        }

        /// Pieces of work a second of so many callers who never pause, and how long each takes once it is its turn.
        async fn load(self: &Arc<Self>, gate: &Arc<Gate>, callers: usize, time: Duration) -> (f64, Duration) {
            let (begun, mut tasks) = (Instant::now(), JoinSet::new());
            for _ in 0..callers {
                let (slow, gate) = (Arc::clone(self), Arc::clone(gate));
                tasks.spawn(async move {
                    let (mut done, mut took) = (0_u32, Duration::ZERO);
                    while begun.elapsed() < time {
                        let pass = gate.enter().unwrap_or_else(|_| gate.enter_anyway());
                        let turn = pass.turn().await;
                        let since = Instant::now();
                        turn.take(slow.work()).await.unwrap();
                        (done, took) = (done + 1, took + since.elapsed());
                    }
                    (done, took)
                });
            }
            let all = tasks.join_all().await;
            let done = all.iter().map(|(done, _)| done).sum::<u32>();
            (f64::from(done) / time.as_secs_f64(), all.iter().map(|(_, took)| *took).sum::<Duration>() / done)
        }
    }

    /// What is 5 ms of work for one processor, and so far away: once for a while, then far too often.
    async fn overloaded(way: Duration) -> (f64, Duration) {
        let (slow, gate) = (Slow::new(way, 1, 5 * MS), Arc::new(Gate::new(16, Some(16))));
        slow.load(&gate, 1, Duration::from_secs(5)).await;
        slow.load(&gate, 50, Duration::from_mins(1)).await
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_near_is_kept_busy_and_no_more() {
        let (rate, took) = overloaded(Duration::ZERO).await;
        assert!(rate > 190.0, "{rate} of 200");
        assert!(took <= 20 * MS, "{took:?} instead of 5 ms");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_far_away_has_more_on_the_way() {
        // Eight at once keep it busy.
        let (rate, took) = overloaded(35 * MS).await;
        assert!(rate > 170.0, "{rate} of 200");
        assert!(took <= 80 * MS, "{took:?} instead of 40 ms");
    }

    #[tokio::test(start_paused = true)]
    async fn a_longer_way_is_noticed_under_load() {
        let (slow, gate) = (Slow::new(5 * MS, 1, 5 * MS), Arc::new(Gate::new(16, Some(16))));
        slow.load(&gate, 50, Duration::from_secs(30)).await;
        *slow.way.lock().unwrap() = 45 * MS;
        // With two at once it would be 40 a second.
        slow.load(&gate, 50, Duration::from_secs(30)).await;
        let (rate, _) = slow.load(&gate, 50, Duration::from_secs(30)).await;
        assert!(rate > 160.0, "{rate}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_at_once_is_possible() {
        let (slow, gate) = (Slow::new(Duration::ZERO, 4, 5 * MS), Arc::new(Gate::new(1, Some(1))));
        let (rate, took) = slow.load(&gate, 8, Duration::from_secs(30)).await;
        assert!(rate > 150.0, "{rate}");
        assert!(took <= 6 * MS, "{took:?}");
    }
}
