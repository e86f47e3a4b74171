//! Turns work away when more arrives than can be done, so that what is taken stays quick.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};

use super::width::Width;

/// How long more may be under way than is good before it counts as no mere burst.
const BURST: Duration = Duration::from_millis(100);
/// After something was turned away nothing counts as a burst for so long: where far too much arrives, a moment's pause of
/// those who send it must not let in a crowd. If nothing was for so long the overload is over.
const CALM: Duration = Duration::from_secs(1);
/// An overload counts as over after so long in any case, and is found anew if it is not: what is let in during one is so
/// little that even an ordinary load has some turned away now and then, so it would never end.
const TRIAL: Duration = Duration::from_secs(10);
/// Work that takes longer is held up by something of its own, and keeps nobody else waiting.
const HELD_UP: Duration = Duration::from_millis(100);

/// The way to what is slow: the database, or the processors that it shares with us.
///
/// A burst is let in, however large: it is worked off in a while. When work keeps coming faster than it is done, only as
/// much is let in as gets through soon, and the rest is turned away at once; from time to time it is tried whether that is
/// still needed.
///
/// What enters has its turn first come first served. In an overload only so much is at work at once as makes good use of
/// what is slow: more would hinder itself, and us. How much that is, is seen, not set.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    /// So many under way are no overload. `None`: nothing is ever turned away.
    roomy: Option<usize>,
}

#[derive(Debug)]
struct Shared {
    flow: Mutex<Flow>,
    turns: Arc<Semaphore>,
}

#[derive(Debug)]
struct Flow {
    under_way: usize,
    /// When last nothing was under way.
    busy_since: Instant,
    /// When the last overload was found.
    overrun_since: Option<Instant>,
    /// When last something was turned away.
    refused_at: Option<Instant>,
    widest: usize,
    /// What is worth it at once in an overload.
    width: Width,
    /// So many may be at work now.
    at_once: usize,
    /// Permits of the semaphore, free or held. For a while more are held than may be.
    turns: usize,
}

/// More arrives than can be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Overrun;

/// Something that is under way, until it is dropped.
#[derive(Debug)]
pub struct Pass(Arc<Shared>);

/// The right to be at work, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping a turn gives it up"]
pub struct Turn {
    shared: Arc<Shared>,
    permit: Option<OwnedSemaphorePermit>,
    since: Instant,
}

impl Gate {
    /// At most `widest` are at work at once. With `roomy` or fewer under way nothing is turned away, unless something
    /// was a moment ago; if it is `None`, nothing ever is.
    pub fn new(widest: usize, roomy: Option<usize>) -> Self {
        let now = Instant::now();
        let flow = Flow {
            under_way: 0,
            busy_since: now,
            overrun_since: None,
            refused_at: None,
            widest,
            width: Width::new(widest, now),
            at_once: widest,
            turns: widest,
        };
        let shared = Shared { flow: Mutex::new(flow), turns: Arc::new(Semaphore::new(widest)) };
        Self { shared: Arc::new(shared), roomy }
    }

    /// Lets it in, at once or not at all.
    ///
    /// # Errors
    /// [`Overrun`] if it would have to wait for long, and so would what comes after it.
    pub fn enter(&self) -> Result<Pass, Overrun> {
        let (now, mut flow) = (Instant::now(), self.shared.flow());
        if self.roomy.is_some_and(|roomy| flow.is_overrun(roomy, now)) {
            if !flow.is_overload(now) {
                flow.overrun_since = Some(now);
            }
            flow.refused_at = Some(now);
            flow.resize(&self.shared.turns, now);
            return Err(Overrun);
        }
        Ok(self.pass(&mut flow, now))
    }

    /// Lets in what cannot be turned away. It counts like the rest.
    pub fn enter_anyway(&self) -> Pass {
        self.pass(&mut self.shared.flow(), Instant::now())
    }

    fn pass(&self, flow: &mut Flow, now: Instant) -> Pass {
        if flow.under_way == 0 {
            flow.busy_since = now;
        }
        flow.under_way += 1;
        flow.resize(&self.shared.turns, now);
        Pass(Arc::clone(&self.shared))
    }
}

impl Shared {
    /// Nothing in here panics half-way through a change.
    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flow {
    /// What comes now is too much.
    fn is_overrun(&self, roomy: usize, now: Instant) -> bool {
        // Half as many wait as are at work: it is busy without a pause, and who waits has a turn soon.
        let quick = self.width.at_once() * 3 / 2;
        if self.is_overload(now) {
            return self.under_way >= quick;
        }
        let may_be_burst = self.refused_at.is_none_or(|at| now.duration_since(at) >= CALM);
        let is_burst = self.under_way == 0 || now.duration_since(self.busy_since) < BURST;
        self.under_way >= roomy.max(quick) && !(may_be_burst && is_burst)
    }

    fn is_overload(&self, now: Instant) -> bool {
        let since = |instant: Option<Instant>, time| instant.is_some_and(|at| now.duration_since(at) < time);
        since(self.overrun_since, TRIAL) && since(self.refused_at, CALM)
    }

    /// Sees to it that there are as many turns as may be, or will be when those that are held are given up.
    fn resize(&mut self, semaphore: &Semaphore, now: Instant) {
        self.at_once = if self.is_overload(now) { self.width.at_once() } else { self.widest };
        if self.at_once > self.turns {
            semaphore.add_permits(self.at_once - self.turns);
            self.turns = self.at_once;
        } else {
            self.turns -= semaphore.forget_permits(self.turns - self.at_once);
        }
    }
}

impl Pass {
    /// Waits for its turn to be at work, in the order of the calls. May be dropped and called again; it is last then.
    pub async fn turn(&self) -> Turn {
        let turns = Arc::clone(&self.0.turns);
        let permit = if let Ok(permit) = Arc::clone(&turns).try_acquire_owned() {
            Some(permit)
        } else {
            // The semaphore is never closed.
            let permit = turns.acquire_owned().await.ok();
            self.0.flow().width.was_short();
            permit
        };
        Turn { shared: Arc::clone(&self.0), permit, since: Instant::now() }
    }
}

impl Turn {
    /// Does the work, and gives the turn up: at its end, or earlier if it is held up. The gate learns from how long it takes,
    /// unless it fails.
    pub async fn take<T, E>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            biased;
            result = &mut work => {
                if result.is_ok() {
                    self.took();
                }
                return result;
            }
            () = sleep(HELD_UP) => self.took(),
        }
        work.await
    }

    fn took(self) {
        let (now, mut flow) = (Instant::now(), self.shared.flow());
        flow.width.took(now.duration_since(self.since), now);
        flow.resize(&self.shared.turns, now);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut flow = self.shared.flow();
        if flow.turns > flow.at_once
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
            flow.turns -= 1;
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.flow().under_way -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use tokio::task::JoinSet;
    use tokio::time::advance;

    use super::*;

    const ROOMY: usize = 16;

    /// Work that takes so long.
    async fn work(time: Duration) -> Result<(), Infallible> {
        sleep(time).await;
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_let_in_whole() {
        let gate = Gate::new(4, Some(ROOMY));
        let burst: Vec<_> = (0..1000).map(|_| gate.enter().unwrap()).collect();
        advance(BURST).await;
        assert_eq!(gate.enter().unwrap_err(), Overrun, "it has not been worked off");
        drop(burst);
        assert!(gate.enter().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_keeps_coming_is_let_in_as_fast_as_it_gets_through() {
        let gate = Gate::new(8, Some(ROOMY));
        // Four come and one gets through in each millisecond.
        let (mut under_way, mut longest, mut done) = (VecDeque::new(), 0, 0);
        for millisecond in 0..2000 {
            under_way.extend((0..4).filter_map(|_| gate.enter().ok()));
            if millisecond >= 1000 {
                longest = longest.max(under_way.len());
            }
            done += under_way.drain(..1).count();
            advance(Duration::from_millis(1)).await;
        }
        assert_eq!((longest, done), (6, 2000), "four are at work, two wait");
        assert_eq!(gate.shared.turns.available_permits(), 4);
        // A moment in which nothing comes is no calm.
        drop(under_way);
        let crowd: Vec<_> = (0..1000).map_while(|_| gate.enter().ok()).collect();
        assert_eq!(crowd.len(), 6);
        drop(crowd);
        advance(CALM).await;
        let burst: Vec<_> = (0..1000).map(|_| gate.enter().unwrap()).collect();
        assert_eq!(burst.len(), 1000);
        assert_eq!(gate.shared.turns.available_permits(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn an_ordinary_load_ends_an_overload() {
        let gate = Gate::new(8, Some(ROOMY));
        let flood: Vec<_> = (0..100).filter_map(|_| gate.enter().ok()).collect();
        advance(BURST).await;
        assert_eq!(gate.enter().unwrap_err(), Overrun);
        drop(flood);
        // Twelve at once from time to time: fewer than are no overload, more than are let in during one.
        let mut refused_at = vec![];
        for tenth in 0..300 {
            let passes: Vec<_> = (0..12).map(|_| gate.enter()).collect();
            if passes.iter().any(Result::is_err) {
                refused_at.push(tenth);
            }
            drop(passes);
            advance(Duration::from_millis(100)).await;
        }
        assert!((90..=101).contains(&refused_at.len()), "{refused_at:?}");
        assert!(refused_at.is_sorted() && refused_at.last() < Some(&101), "{refused_at:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_overload_that_goes_on_is_found_again() {
        let gate = Gate::new(8, Some(ROOMY));
        let (mut under_way, mut crowds) = (VecDeque::new(), vec![]);
        for millisecond in 0..30_000 {
            under_way.extend((0..4).filter_map(|_| gate.enter().ok()));
            if under_way.len() > 8 {
                crowds.push(millisecond);
            }
            under_way.pop_front();
            advance(Duration::from_millis(1)).await;
        }
        // The first burst, and a moment for each trial.
        let late = crowds.iter().filter(|at| **at > 1000).count();
        assert!((1..200).contains(&late), "{crowds:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_who_never_pause_are_no_overload() {
        let gate = Gate::new(4, Some(ROOMY));
        let mut under_way: VecDeque<_> = (0..ROOMY).map(|_| gate.enter().unwrap()).collect();
        for _ in 0..1000 {
            advance(Duration::from_secs(1)).await;
            under_way.pop_front();
            under_way.push_back(gate.enter().unwrap());
        }
        assert_eq!(gate.enter().unwrap_err(), Overrun);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_turned_away_if_nothing_may_be() {
        let gate = Gate::new(4, None);
        let first: Vec<_> = (0..1000).map(|_| gate.enter().unwrap()).collect();
        advance(CALM).await;
        assert!(gate.enter().is_ok());
        drop(first);
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_order_and_never_too_many_at_once() {
        let gate = Gate::new(8, None);
        let (mut tasks, at_work) = (JoinSet::new(), Arc::new(Mutex::new((0, 0, vec![]))));
        for number in 0..2000 {
            let (pass, at_work) = (gate.enter().unwrap(), Arc::clone(&at_work));
            tasks.spawn(async move {
                let turn = pass.turn().await;
                {
                    let mut at_work = at_work.lock().unwrap();
                    at_work.0 += 1;
                    at_work.1 = at_work.0.max(at_work.1);
                    at_work.2.push(number);
                }
                // The last piece of work is no longer at work when its turn is given up.
                let work = async {
                    work(Duration::from_millis(5)).await?;
                    at_work.lock().unwrap().0 -= 1;
                    Ok::<_, Infallible>(())
                };
                turn.take(work).await
            });
        }
        tasks.join_all().await;
        let (left, most, order) = Arc::try_unwrap(at_work).unwrap().into_inner().unwrap();
        assert_eq!((left, most), (0, 8));
        assert!(order.is_sorted(), "{order:?}");
        assert_eq!(gate.shared.turns.available_permits(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_line_or_is_held_up_keeps_nobody_waiting() {
        let gate = Gate::new(1, None);
        let (held_up, leaves, next) = (gate.enter().unwrap(), gate.enter().unwrap(), gate.enter().unwrap());
        let turn = held_up.turn().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(turn.take(work(Duration::from_mins(1))));
        assert!(tokio::time::timeout(HELD_UP / 2, leaves.turn()).await.is_err());
        let begun = Instant::now();
        let turn = next.turn().await;
        assert!(begun.elapsed() <= HELD_UP, "{:?}", begun.elapsed());
        drop(turn);
        assert!(tasks.try_join_next().is_none(), "what is held up goes on");
        tasks.join_all().await;
        assert!(begun.elapsed() >= Duration::from_secs(59), "to its end");
        assert_eq!(gate.shared.turns.available_permits(), 1);
    }
}
