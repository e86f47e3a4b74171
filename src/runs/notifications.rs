//! Notifications about runs and threads, inside this process and between replicas. They are hints
//! that spare tasks the polling of the database. A hint may get lost, so a task that waits for one
//! also checks now and then.

use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::store::{Notification, RunLease};

/// Time for which a replica that has just found itself alone may still receive its own
/// notifications.
const ECHOES: Duration = Duration::from_secs(3);

type Readers = Arc<Mutex<HashMap<Notification, Reader>>>;

/// All subscriptions to one subject.
#[derive(Debug)]
struct Reader {
    sender: watch::Sender<()>,
    /// Number of subscriptions. The sender's own count sinks only after a subscription is dropped,
    /// so the last subscription could not tell that it is the last.
    subscriptions: usize,
}

/// Passes notifications on: within this process at once, to other replicas by the outbox.
#[derive(Debug, Default)]
pub(in crate::runs) struct Notifier {
    readers: Readers,
    /// Wakes the task that reads requests about this process's runs.
    pub(in crate::runs) asked: Notify,
    /// Notifications may have been missed, also those about new replicas.
    pub(in crate::runs) missed: Notify,
    outbox: Mutex<Outbox>,
    posted: Notify,
    /// Whether other replicas are alive, as far as is known.
    has_peers: watch::Sender<bool>,
    /// When the last other replica disappeared.
    alone_since: Mutex<Option<Instant>>,
}

/// Deliveries to the store and to other replicas.
#[derive(Debug, Default)]
pub(in crate::runs) struct Outbox {
    pub(in crate::runs) notifications: HashSet<Notification>,
    /// Runs that this process releases.
    pub(in crate::runs) released: Vec<RunLease>,
}

impl Notifier {
    /// Subscribes to notifications about one subject.
    pub(in crate::runs) fn subscribe(&self, about: Notification) -> Subscription {
        let mut readers = lock(&self.readers);
        let reader = readers.entry(about).or_insert_with(|| Reader {
            sender: watch::Sender::new(()),
            subscriptions: 0,
        });
        reader.subscriptions += 1;
        let receiver = reader.sender.subscribe();
        Subscription {
            about,
            receiver,
            readers: Arc::clone(&self.readers),
        }
    }

    /// Notifies this process and the other replicas.
    pub(in crate::runs) fn notify(&self, notification: Notification) {
        self.receive(notification);
        lock(&self.outbox).notifications.insert(notification);
        self.posted.notify_one();
    }

    /// Releases a run, so that another process, or this one, adopts it and continues it. The run's
    /// task must have stopped before.
    pub(in crate::runs) fn release(&self, lease: RunLease) {
        lock(&self.outbox).released.push(lease);
        self.posted.notify_one();
    }

    /// Notifies this process only.
    pub(in crate::runs) fn receive(&self, notification: Notification) {
        let readers = lock(&self.readers);
        if notification == Notification::Missed {
            for reader in readers.values() {
                reader.sender.send_replace(());
            }
            self.asked.notify_one();
            self.missed.notify_one();
        } else if let Some(reader) = readers.get(&notification) {
            reader.sender.send_replace(());
        }
    }

    /// Waits until there is something to deliver.
    pub(in crate::runs) async fn posted(&self) {
        self.posted.notified().await;
    }

    /// Returns whether other replicas are alive, as far as is known.
    pub(in crate::runs) fn knows_peers(&self) -> bool {
        *self.has_peers.borrow()
    }

    /// Waits until other replicas are known to be alive.
    pub(in crate::runs) async fn has_peers(&self) {
        let mut known = self.has_peers.subscribe();
        // `self` owns the sender, so it lives long enough.
        let _ = known.wait_for(|has_peers| *has_peers).await;
    }

    /// Notes whether the renewal of the session found other replicas. As soon as it finds some,
    /// this replica notifies them, since they may not know of this one before they renew their own
    /// sessions.
    pub(in crate::runs) fn set_peers(&self, has_peers: bool) {
        let before = self.has_peers.send_replace(has_peers);
        if has_peers && !before {
            self.notify(Notification::Orphans);
        }
        if before && !has_peers {
            *lock(&self.alone_since) = Some(Instant::now());
        }
    }

    /// Notes that another replica sent a notification. A replica that believes to be alone sends
    /// none. So the notification is no echo, except shortly after the other replicas disappeared.
    pub(in crate::runs) fn meet_peers(&self) {
        if lock(&self.alone_since).is_some_and(|since| since.elapsed() < ECHOES) {
            return;
        }
        self.has_peers
            .send_if_modified(|has_peers| !std::mem::replace(has_peers, true));
    }

    /// Takes the deliveries out of the outbox.
    pub(in crate::runs) fn take(&self) -> Delivery<'_> {
        Delivery {
            notifier: self,
            outbox: std::mem::take(&mut *lock(&self.outbox)),
        }
    }
}

/// Deliveries under way. A drop returns those that are left to the outbox.
#[derive(Debug)]
pub(in crate::runs) struct Delivery<'a> {
    notifier: &'a Notifier,
    pub(in crate::runs) outbox: Outbox,
}

impl Drop for Delivery<'_> {
    fn drop(&mut self) {
        let mut outbox = lock(&self.notifier.outbox);
        outbox
            .notifications
            .extend(self.outbox.notifications.drain());
        outbox.released.append(&mut self.outbox.released);
    }
}

/// The notifications about one subject. None is missed between two calls of
/// [`changed`](Self::changed), but several may count as one.
#[derive(Debug)]
pub(in crate::runs) struct Subscription {
    about: Notification,
    receiver: watch::Receiver<()>,
    readers: Readers,
}

impl Subscription {
    /// Waits for a notification since the last call, or since the subscription.
    pub(in crate::runs) async fn changed(&mut self) {
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let Entry::Occupied(mut reader) = lock(&self.readers).entry(self.about) {
            reader.get_mut().subscriptions -= 1;
            if reader.get().subscriptions == 0 {
                reader.remove();
            }
        }
    }
}

/// No code panics between the two halves of a change, so the poison can be ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use futures_util::FutureExt;

    use super::*;
    use crate::domain::{RunId, ThreadId};

    #[tokio::test]
    async fn who_subscribed_hears_of_it_and_of_what_may_have_been_missed() {
        let (notifier, run) = (Notifier::default(), Notification::Run(RunId::new()));
        let mut subscription = notifier.subscribe(run);
        let mut other = notifier.subscribe(Notification::Thread(ThreadId::new()));
        assert!(subscription.changed().now_or_never().is_none());
        notifier.notify(run);
        notifier.notify(run);
        subscription.changed().await;
        assert!(
            subscription.changed().now_or_never().is_none(),
            "two count as one"
        );
        assert!(other.changed().now_or_never().is_none());
        notifier.receive(Notification::Missed);
        subscription.changed().await;
        other.changed().await;
        drop((subscription, other));
        assert!(lock(&notifier.readers).is_empty(), "nothing is kept");
    }

    #[tokio::test]
    async fn a_second_reader_outlives_the_first() {
        let (notifier, run) = (Notifier::default(), Notification::Run(RunId::new()));
        let (first, mut second) = (notifier.subscribe(run), notifier.subscribe(run));
        drop(first);
        notifier.notify(run);
        second.changed().await;
    }

    #[test]
    fn subscriptions_that_are_dropped_at_once_leave_nothing() {
        let (notifier, run) = (Notifier::default(), Notification::Run(RunId::new()));
        for _ in 0..5_000 {
            let start = Barrier::new(2);
            let both = [notifier.subscribe(run), notifier.subscribe(run)];
            std::thread::scope(|scope| {
                for subscription in both {
                    scope.spawn(|| {
                        start.wait();
                        drop(subscription);
                    });
                }
            });
            assert!(lock(&notifier.readers).is_empty(), "nothing is kept");
        }
    }

    #[test]
    fn what_is_not_delivered_is_not_lost() {
        let notifier = Notifier::default();
        let lease = RunLease {
            run_id: RunId::new(),
            fence: 1,
        };
        notifier.release(lease);
        drop(notifier.take());
        assert_eq!(notifier.take().outbox.released, [lease]);
        let mut taken = notifier.take();
        taken.outbox.released.clear();
        drop(taken);
        assert!(notifier.take().outbox.released.is_empty());
    }

    #[test]
    fn what_is_told_twice_is_sent_once() {
        let notifier = Notifier::default();
        notifier.notify(Notification::Orphans);
        notifier.notify(Notification::Orphans);
        assert_eq!(lock(&notifier.outbox).notifications.len(), 1);
    }
}
