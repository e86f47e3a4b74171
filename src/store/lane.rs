//! Lanes: writes of many callers share calls to the database.
//!
//! While one batch is being committed, the next one fills. So a single caller does not wait, and
//! many callers share a call, a round trip and a commit. A lane is also a queue in front of the
//! database. It serves tenants in turn. A write that has waited too long is refused before it is
//! sent. A write that was sent is never refused.
//!
//! A batch waits for no row lock. An item whose rows are locked comes back and is written alone.
//! If a whole batch fails, each of its items is written alone.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::error::Error as StdError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;

use super::errors::{NotWritten, StoreError};
use crate::domain::TenantKey;

/// The most items and the most bytes of a batch: 32 items, 1 MiB. A larger item is a batch by
/// itself.
const MAX_ITEMS: usize = 32;
const MAX_BYTES: usize = 1 << 20;
/// The pause before the lane asks again for the outcome of an item whose answer was lost.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest wait of a closing store for writes that were sent.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// The weight of the last batch in the moving average of the time that a batch takes.
const WEIGHT_OF_LAST: f64 = 0.2;

/// An item that a lane writes.
pub(super) trait Item: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// Returns the tenant that the item belongs to. A lane serves tenants in turn.
    fn tenant(&self) -> Option<&TenantKey>;

    /// Returns the approximate size of the item as it is sent.
    fn bytes(&self) -> usize;

    /// Returns whether the other item touches the same rows. Two such items are never in one
    /// batch.
    fn meets(&self, other: &Self) -> bool;

    /// Returns whether the answer means that nothing was written and that a later try may get
    /// another answer.
    fn may_change(answer: &Self::Answer) -> bool;
}

/// The way a lane writes its items.
#[async_trait]
pub(super) trait Write: Send + Sync + 'static {
    type Item: Item;

    /// Writes items in one transaction that waits for no row lock. Returns an answer for each, in
    /// their order. `None`: other transactions have locked its rows, and nothing of it was
    /// written.
    async fn together(&self, items: &[Self::Item]) -> Result<Answers<Self::Item>, NotWritten>;

    /// Writes one item, and waits for the locks of its rows. If an earlier try has written the
    /// item, it answers with the state that is recorded.
    async fn alone(&self, item: &Self::Item) -> Answer<Self::Item>;
}

pub(super) type Answers<I> = Vec<Option<<I as Item>::Answer>>;
pub(super) type Answer<I> = Result<<I as Item>::Answer, NotWritten>;

/// The limits of a lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The most batches that are sent at the same time.
    pub(super) batches: usize,
    /// The most items that are written alone at the same time.
    pub(super) alone: usize,
    /// The longest wait of an item for being written alone, and the longest time for which the
    /// lane asks for a lost answer.
    pub(super) patience: Duration,
    /// The longest wait of an item before it is sent. `None`: no limit.
    pub(super) max_wait: Option<Duration>,
}

/// A queue of items, and the tasks that send them to the database.
pub(super) struct Lane<W: Write> {
    parts: Arc<Parts<W>>,
}

struct Parts<W: Write> {
    write: W,
    limits: Limits,
    line: Mutex<Line<W::Item>>,
    alone: Semaphore,
    tasks: TaskTracker,
}

/// The queued items of each tenant, and the measured speed of the lane.
struct Line<I: Item> {
    waiting: BTreeMap<Option<TenantKey>, VecDeque<Waiting<I>>>,
    /// The tenants in `waiting`, in the order in which they are served.
    turns: VecDeque<Option<TenantKey>>,
    length: usize,
    /// The number of tasks that send batches.
    carriers: usize,
    /// The moving average of the time that a batch takes.
    pace: Duration,
    last_number: u64,
}

struct Waiting<I: Item> {
    /// Grows from one item to the next.
    number: u64,
    item: I,
    sender: Sender<I>,
}

type Sender<I> = oneshot::Sender<Answer<I>>;
/// Items, and the channel to the caller of each.
type Batch<I> = (Vec<I>, Vec<Sender<I>>);

impl<W: Write> Lane<W> {
    pub(super) fn new(write: W, limits: Limits) -> Self {
        let line = Line {
            waiting: BTreeMap::new(),
            turns: VecDeque::new(),
            length: 0,
            carriers: 0,
            pace: Duration::ZERO,
            last_number: 0,
        };
        let alone = Semaphore::new(limits.alone.max(1));
        Self {
            parts: Arc::new(Parts {
                write,
                limits,
                line: Mutex::new(line),
                alone,
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Writes an item, in a batch with others if there are any. If the caller drops this future
    /// before the item was sent, the item is not sent. After that it is written all the same.
    ///
    /// # Errors
    /// [`StoreError::Overloaded`], unsent, if the item waited too long or would have to.
    pub(super) async fn write(&self, item: W::Item) -> Answer<W::Item> {
        let Parts { limits, .. } = &*self.parts;
        let (sender, mut answered) = oneshot::channel();
        let tenant = item.tenant().cloned();
        let (number, starts) = {
            let mut line = self.parts.line();
            if limits
                .max_wait
                .is_some_and(|most| line.wait(limits.batches) > most)
            {
                return Err(NotWritten::Unsent(StoreError::Overloaded));
            }
            let starts = line.carriers < limits.batches;
            line.carriers += usize::from(starts);
            (line.push(tenant.clone(), item, sender), starts)
        };
        if starts {
            let carrier = Carrier {
                parts: Arc::clone(&self.parts),
                is_done: false,
            };
            self.parts.tasks.spawn(carrier.carry());
        }
        let stopped = |_| {
            Err(NotWritten::Lost(StoreError::Unavailable(
                "the task that writes the batch stopped".into(),
            )))
        };
        if let Some(most) = limits.max_wait {
            match timeout(most, &mut answered).await {
                Ok(answer) => return answer.unwrap_or_else(stopped),
                Err(_) if self.parts.line().remove(tenant.as_ref(), number) => {
                    return Err(NotWritten::Unsent(StoreError::Overloaded));
                }
                // The item was sent already.
                Err(_) => {}
            }
        }
        answered.await.unwrap_or_else(stopped)
    }
}

impl<W: Write> Lane<W> {
    /// Waits up to [`LAST_MOMENT`] for writes that were sent.
    pub(super) async fn close(&self) {
        self.parts.tasks.close();
        // Items that are left get no connection any more.
        let _ = timeout(LAST_MOMENT, self.parts.tasks.wait()).await;
    }
}

/// Sends batches to the database until the queue is empty.
struct Carrier<W: Write> {
    parts: Arc<Parts<W>>,
    is_done: bool,
}

impl<W: Write> Carrier<W> {
    async fn carry(mut self) {
        while let Some((items, senders)) = self.next_batch() {
            let begun = Instant::now();
            let written = self.parts.write.together(&items).await;
            if written.is_ok() {
                self.parts.line().took(begun.elapsed());
            }
            self.parts.deliver(items.into_iter().zip(senders), written);
        }
    }

    fn next_batch(&mut self) -> Option<Batch<W::Item>> {
        let mut line = self.parts.line();
        let batch = line.next_batch();
        if batch.is_empty() {
            // Still under the lock, so that no caller relies on a task that is about to end.
            line.carriers -= 1;
            self.is_done = true;
            return None;
        }
        Some(
            batch
                .into_iter()
                .map(|waiting| (waiting.item, waiting.sender))
                .unzip(),
        )
    }
}

impl<W: Write> Drop for Carrier<W> {
    /// Starts another task after a panic.
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let has_more = self.parts.line().length > 0;
        if has_more && Handle::try_current().is_ok() {
            let next = Self {
                parts: Arc::clone(&self.parts),
                is_done: false,
            };
            self.parts.tasks.spawn(next.carry());
        } else {
            self.parts.line().carriers -= 1;
        }
    }
}

impl<W: Write> Parts<W> {
    /// Ignores poisoning: no code panics half-way through a change of the queue.
    fn line(&self) -> MutexGuard<'_, Line<W::Item>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(
        self: &Arc<Self>,
        batch: impl ExactSizeIterator<Item = (W::Item, Sender<W::Item>)>,
        written: Result<Answers<W::Item>, NotWritten>,
    ) {
        match written {
            Ok(answers) => {
                for ((item, sender), answer) in batch.zip(answers) {
                    match answer {
                        // The caller may be gone.
                        Some(answer) => drop(sender.send(Ok(answer))),
                        None => self.send_alone(item, sender, None),
                    }
                }
            }
            Err(NotWritten::Unsent(error)) => {
                let error = Arc::new(error);
                for (_, sender) in batch {
                    let told = StoreError::Unavailable(Told(Arc::clone(&error)).into());
                    drop(sender.send(Err(NotWritten::Unsent(told))));
                }
            }
            Err(NotWritten::Refused(error)) => {
                tracing::debug!(
                    items = batch.len(),
                    error = &error as &dyn StdError,
                    "the database refused a batch; each item is written alone"
                );
                batch.for_each(|(item, sender)| self.send_alone(item, sender, None));
            }
            Err(NotWritten::Lost(error)) => {
                tracing::warn!(
                    items = batch.len(),
                    error = &error as &dyn StdError,
                    "the database's answer to a batch was lost; asking for the outcome of each item"
                );
                let error = Arc::new(error);
                for (item, sender) in batch {
                    let told = StoreError::Unavailable(Told(Arc::clone(&error)).into());
                    self.send_alone(item, sender, Some(told));
                }
            }
        }
    }

    /// Spawns a task that writes an item alone. `lost`: the error of an earlier try whose outcome
    /// is unknown.
    fn send_alone(
        self: &Arc<Self>,
        item: W::Item,
        sender: Sender<W::Item>,
        lost: Option<StoreError>,
    ) {
        let this = Arc::clone(self);
        self.tasks.spawn(async move {
            drop(sender.send(this.alone(item, lost).await));
        });
    }

    async fn alone(&self, item: W::Item, mut lost: Option<StoreError>) -> Answer<W::Item> {
        let until = Instant::now() + self.limits.patience;
        loop {
            let error = match self.try_alone(&item).await {
                Err(NotWritten::Lost(error)) => error,
                // An earlier try that has not arrived yet may get another answer.
                Ok(answer) if lost.is_some() && W::Item::may_change(&answer) => {
                    let still =
                        || StoreError::Unavailable("an earlier try may still arrive".into());
                    return Err(NotWritten::Lost(lost.unwrap_or_else(still)));
                }
                // This try wrote nothing. The outcome of the earlier one is still unknown.
                Err(
                    NotWritten::Unsent(error)
                    | NotWritten::Refused(error @ StoreError::Unavailable(_)),
                ) if lost.is_some() => error,
                answer => return answer,
            };
            if Instant::now() >= until {
                return Err(NotWritten::Lost(error));
            }
            lost = Some(error);
            sleep(PAUSE).await;
        }
    }

    async fn try_alone(&self, item: &W::Item) -> Answer<W::Item> {
        let none = || {
            NotWritten::Unsent(StoreError::Unavailable(
                "too many writes wait for locked rows".into(),
            ))
        };
        let place = timeout(self.limits.patience, self.alone.acquire()).await;
        let _place = place.map_err(|_| none())?.map_err(|_| none())?;
        self.write.alone(item).await
    }
}

impl<I: Item> Line<I> {
    fn push(&mut self, tenant: Option<TenantKey>, item: I, sender: Sender<I>) -> u64 {
        self.last_number += 1;
        let waiting = Waiting {
            number: self.last_number,
            item,
            sender,
        };
        match self.waiting.entry(tenant) {
            Entry::Occupied(mut entry) => entry.get_mut().push_back(waiting),
            Entry::Vacant(entry) => {
                self.turns.push_back(entry.key().clone());
                entry.insert(VecDeque::from([waiting]));
            }
        }
        self.length += 1;
        self.last_number
    }

    /// Removes an item that was not sent yet. Returns whether it was still in the queue.
    fn remove(&mut self, tenant: Option<&TenantKey>, number: u64) -> bool {
        // A tenant without items is removed when it would be served next.
        let Some(of_tenant) = self.waiting.get_mut(&tenant.cloned()) else {
            return false;
        };
        let Ok(at) = of_tenant.binary_search_by_key(&number, |waiting| waiting.number) else {
            return false;
        };
        of_tenant.remove(at);
        self.length -= 1;
        true
    }

    /// Takes the next batch: one item of each tenant in turn, as long as they fit. An item that
    /// touches the same rows as another one of the batch is left for a later batch.
    fn next_batch(&mut self) -> Vec<Waiting<I>> {
        let (mut batch, mut bytes) = (Vec::<Waiting<I>>::new(), 0);
        let mut passed_over = 0;
        while batch.len() < MAX_ITEMS && passed_over < self.turns.len() {
            let Some(tenant) = self.turns.pop_front() else {
                break;
            };
            let Some(of_tenant) = self.waiting.get_mut(&tenant) else {
                continue;
            };
            while of_tenant
                .pop_front_if(|waiting| waiting.sender.is_closed())
                .is_some()
            {
                self.length -= 1;
            }
            let may_go = |it: &Waiting<I>| batch.iter().all(|other| !it.item.meets(&other.item));
            let at = of_tenant.iter().take(MAX_ITEMS).position(may_go);
            let size = at
                .and_then(|at| of_tenant.get(at))
                .map_or(0, |it| it.item.bytes());
            let fits = batch.is_empty() || bytes + size <= MAX_BYTES;
            if let Some(waiting) = at.filter(|_| fits).and_then(|at| of_tenant.remove(at)) {
                self.length -= 1;
                bytes += size;
                batch.push(waiting);
                passed_over = 0;
            } else if !of_tenant.is_empty() {
                passed_over += 1;
            }
            if of_tenant.is_empty() {
                self.waiting.remove(&tenant);
            } else {
                self.turns.push_back(tenant);
            }
        }
        batch
    }

    fn took(&mut self, time: Duration) {
        self.pace = self.pace.mul_f64(1.0 - WEIGHT_OF_LAST) + time.mul_f64(WEIGHT_OF_LAST);
    }

    /// Estimates how long one more item would wait, from the length of the queue and the time that
    /// a batch takes.
    fn wait(&self, batches: usize) -> Duration {
        let before_it = u32::try_from(self.length / MAX_ITEMS / batches.max(1)).unwrap_or(u32::MAX);
        self.pace.saturating_mul(before_it)
    }
}

/// An error that many callers get.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Told(#[source] Arc<StoreError>);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::task::JoinSet;

    use super::*;

    /// An item of a tenant, with a number and a size.
    #[derive(Clone, Debug)]
    struct Thing {
        tenant: TenantKey,
        number: u32,
        bytes: usize,
    }

    impl Item for Thing {
        type Answer = u32;

        fn tenant(&self) -> Option<&TenantKey> {
            Some(&self.tenant)
        }

        fn bytes(&self) -> usize {
            self.bytes
        }

        fn meets(&self, other: &Self) -> bool {
            self.number == other.number
        }

        fn may_change(answer: &u32) -> bool {
            *answer == REFUSED
        }
    }

    /// An item whose answer says that nothing was written, and may change.
    const REFUSED: u32 = 99;

    /// A database that takes a millisecond for each batch, and records what it was sent.
    #[derive(Default)]
    struct Paper {
        sent: Mutex<Vec<Vec<u32>>>,
        alone: Mutex<Vec<u32>>,
        /// Items whose rows other transactions have locked.
        held: BTreeSet<u32>,
        /// Items that make the database refuse their batch.
        poison: BTreeSet<u32>,
        /// Whether the answer to the first batch is lost.
        loses_first: bool,
        /// The time for which it does not answer at first.
        hangs: Duration,
    }

    #[async_trait]
    impl Write for Arc<Paper> {
        type Item = Thing;

        async fn together(&self, items: &[Thing]) -> Result<Answers<Thing>, NotWritten> {
            let numbers: Vec<u32> = items.iter().map(|it| it.number).collect();
            let is_first = {
                let mut sent = self.sent.lock().unwrap();
                sent.push(numbers.clone());
                sent.len() == 1
            };
            sleep(if is_first { self.hangs } else { Duration::ZERO } + Duration::from_millis(1))
                .await;
            if is_first && self.loses_first {
                return Err(NotWritten::Lost(StoreError::Unavailable("cut".into())));
            }
            if numbers.iter().any(|number| self.poison.contains(number)) {
                return Err(NotWritten::Refused(StoreError::Statement("poison".into())));
            }
            Ok(numbers
                .iter()
                .map(|number| (!self.held.contains(number)).then_some(*number))
                .collect())
        }

        async fn alone(&self, item: &Thing) -> Answer<Thing> {
            self.alone.lock().unwrap().push(item.number);
            if self.poison.contains(&item.number) {
                return Err(NotWritten::Refused(StoreError::Statement("poison".into())));
            }
            Ok(item.number)
        }
    }

    const LIMITS: Limits = Limits {
        batches: 1,
        alone: 2,
        patience: Duration::from_secs(5),
        max_wait: Some(Duration::from_secs(2)),
    };

    fn thing(tenant: &str, number: u32) -> Thing {
        Thing {
            tenant: TenantKey::try_from(tenant.to_owned()).unwrap(),
            number,
            bytes: 10,
        }
    }

    /// Writes all items at the same time.
    async fn write(
        paper: &Arc<Paper>,
        things: impl IntoIterator<Item = Thing>,
    ) -> Vec<Answer<Thing>> {
        let lane = Arc::new(Lane::new(Arc::clone(paper), LIMITS));
        let mut tasks = JoinSet::new();
        for thing in things {
            let lane = Arc::clone(&lane);
            tasks.spawn(async move { lane.write(thing).await });
            // Keeps the items in order.
            tokio::task::yield_now().await;
        }
        tasks.join_all().await
    }

    fn sent(paper: &Paper) -> Vec<Vec<u32>> {
        paper.sent.lock().unwrap().clone()
    }

    #[tokio::test(start_paused = true)]
    async fn what_gathers_while_a_batch_is_written_goes_together() {
        let paper = Arc::new(Paper::default());
        let answers = write(&paper, (0..70).map(|n| thing("a", n))).await;
        assert!(answers.iter().all(Result::is_ok));
        let lengths: Vec<usize> = sent(&paper).iter().map(Vec::len).collect();
        assert_eq!(lengths, [1, 32, 32, 5], "the first one does not wait");
        assert!(sent(&paper).concat().is_sorted(), "in order");
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_take_turns() {
        let paper = Arc::new(Paper::default());
        write(
            &paper,
            (0..40)
                .map(|n| thing("large", n))
                .chain([thing("small", 100), thing("other", 200)]),
        )
        .await;
        assert_eq!(sent(&paper)[1][..4], [1, 100, 200, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn items_of_the_same_rows_are_not_in_one_batch() {
        let paper = Arc::new(Paper::default());
        write(&paper, [1, 2, 2, 3, 2].map(|n| thing("a", n))).await;
        assert_eq!(sent(&paper), [vec![1], vec![2, 3], vec![2], vec![2]]);
    }

    #[tokio::test(start_paused = true)]
    async fn large_items_go_by_themselves() {
        let paper = Arc::new(Paper::default());
        let large = |n| Thing {
            bytes: MAX_BYTES,
            ..thing("a", n)
        };
        write(
            &paper,
            [thing("a", 1), thing("a", 2), large(3), thing("a", 4)],
        )
        .await;
        assert_eq!(sent(&paper), [vec![1], vec![2], vec![3], vec![4]]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_hold_goes_alone() {
        let paper = Arc::new(Paper {
            held: [2].into(),
            ..Paper::default()
        });
        let answers = write(&paper, (0..5).map(|n| thing("a", n))).await;
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(*paper.alone.lock().unwrap(), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_refused_fails_alone() {
        let paper = Arc::new(Paper {
            poison: [7].into(),
            ..Paper::default()
        });
        let answers = write(&paper, (0..20).map(|n| thing("a", n))).await;
        let failed: Vec<_> = answers.iter().filter(|answer| answer.is_err()).collect();
        assert!(
            matches!(failed[..], [Err(NotWritten::Refused(_))]),
            "{failed:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn lost_answers_are_asked_for_again() {
        let paper = Arc::new(Paper {
            loses_first: true,
            ..Paper::default()
        });
        let answers = write(&paper, (0..20).map(|n| thing("a", n))).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert_eq!(*paper.alone.lock().unwrap(), [0]);
    }

    #[tokio::test(start_paused = true)]
    async fn changeable_answer_after_lost_try_is_lost() {
        for loses_first in [true, false] {
            let paper = Arc::new(Paper {
                held: [REFUSED].into(),
                loses_first,
                ..Paper::default()
            });
            let answers = write(&paper, [thing("a", REFUSED)]).await;
            assert_eq!(*paper.alone.lock().unwrap(), [REFUSED]);
            if loses_first {
                assert!(
                    matches!(answers[..], [Err(NotWritten::Lost(_))]),
                    "the lost try may still arrive, and get another answer: {answers:?}"
                );
            } else {
                assert!(matches!(answers[..], [Ok(REFUSED)]), "{answers:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_too_long_is_refused_unsent() {
        let paper = Arc::new(Paper {
            hangs: Duration::from_secs(10),
            ..Paper::default()
        });
        let begun = Instant::now();
        let answers = write(&paper, (0..3).map(|n| thing("a", n))).await;
        assert_eq!(
            answers.iter().filter(|answer| answer.is_ok()).count(),
            1,
            "an item that was sent is not given up"
        );
        let is_overloaded =
            |it: &&Answer<Thing>| matches!(it, Err(NotWritten::Unsent(StoreError::Overloaded)));
        assert_eq!(answers.iter().filter(is_overloaded).count(), 2);
        assert_eq!(sent(&paper), [[0]]);
        assert!(begun.elapsed() < Duration::from_secs(11));
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_who_gave_up_stop_nobody() {
        let paper = Arc::new(Paper {
            hangs: Duration::from_millis(2500),
            ..Paper::default()
        });
        let lane = Arc::new(Lane::new(Arc::clone(&paper), LIMITS));
        let write = |tenant: &str, number, after| {
            let (lane, thing) = (Arc::clone(&lane), thing(tenant, number));
            async move {
                sleep(Duration::from_millis(after)).await;
                lane.write(thing).await
            }
        };
        let gave_up = (1..4).map(|n| write(&format!("gave up {n}"), n, 1));
        let later = write("later", 9, 2400);
        let (first, gave_up, later) = tokio::join!(
            write("a", 0, 0),
            futures_util::future::join_all(gave_up),
            later
        );
        assert!(first.is_ok() && gave_up.iter().all(Result::is_err));
        assert!(later.is_ok(), "{later:?}");
        assert_eq!(sent(&paper), [[0], [9]]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_would_wait_for_too_long_is_refused_at_once() {
        let paper = Arc::new(Paper::default());
        let lane = Lane::new(Arc::clone(&paper), LIMITS);
        lane.write(thing("a", 0)).await.unwrap();
        {
            // Ten batches of 210 ms each.
            let mut full = lane.parts.line();
            full.pace = Duration::from_millis(210);
            full.carriers = 1;
            for n in 0..320 {
                full.push(
                    Some(thing("a", n).tenant),
                    thing("a", n),
                    oneshot::channel().0,
                );
            }
        }
        let begun = Instant::now();
        assert!(matches!(
            lane.write(thing("a", 300)).await,
            Err(NotWritten::Unsent(StoreError::Overloaded))
        ));
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_leaves_before_it_was_sent_leaves_nothing() {
        let paper = Arc::new(Paper {
            hangs: Duration::from_secs(1),
            ..Paper::default()
        });
        let lane = Lane::new(Arc::clone(&paper), LIMITS);
        let first = lane.write(thing("a", 0));
        let others = async {
            // The first item is sent by then.
            sleep(Duration::from_millis(1)).await;
            let leaves = timeout(Duration::from_millis(10), lane.write(thing("a", 1)));
            tokio::join!(leaves, lane.write(thing("a", 2)))
        };
        let (first, (left, last)) = tokio::join!(first, others);
        assert!(first.is_ok() && left.is_err() && last.is_ok());
        assert_eq!(sent(&paper), [[0], [2]]);
        assert_eq!(lane.parts.line().length, 0);
    }
}
