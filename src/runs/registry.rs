//! The registry: the runs that this process works on, the handles to their tasks, and this
//! process's session.

pub(in crate::runs) mod unstored;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::domain::{MessageId, Run, RunId, ToolOutput};
use crate::runs::log::offset::others_from;
use crate::runs::log::writer::{RunLog, RunLogWriter};
use crate::store::{Admission, RunLease, StartedRun, redacted_action};
use unstored::Unstored;

/// Time for which a refused admission is remembered. The database server cancels its statement
/// long before.
const REFUSED_FOR: Duration = Duration::from_mins(10);

/// The runs that this process works on, and its session.
#[derive(Debug)]
pub(in crate::runs) struct RunRegistry {
    /// Runs with a task in this process, from before they are recorded until their end is
    /// recorded.
    active: Arc<Mutex<HashMap<RunId, RunHandle>>>,
    /// Admissions that may have been recorded although their callers got an error. Kept for
    /// [`REFUSED_FOR`]: no admission arrives later.
    refused: Mutex<HashMap<RunId, (Refused, Instant)>>,
    /// Held while runs change hands, so that this process does not adopt a run as a stray that it
    /// has just adopted.
    pub(in crate::runs) taking: tokio::sync::Mutex<()>,
    session: Mutex<Session>,
}

/// A message whose caller got the error that it was not recorded.
#[derive(Clone, Debug)]
pub(in crate::runs) struct Refused {
    pub(in crate::runs) message: MessageId,
    pub(in crate::runs) idempotency_key: Option<String>,
}

impl Refused {
    pub(in crate::runs) fn of(admission: &Admission) -> Self {
        let idempotency_key = admission.idempotency.as_ref().map(|used| used.key.clone());
        Self {
            message: admission.message.id,
            idempotency_key,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Session {
    /// Time until which the session is surely good, by this process's own clock.
    good_until: Instant,
    /// Time before which no replica with a lapsed session is taken for dead.
    trusts_from: Instant,
}

/// A handle to a run's task, for other tasks of this process.
#[derive(Clone, Debug)]
pub(in crate::runs) struct RunHandle {
    /// Tells this task's entry from the entry of a later task of the same run.
    serial: u64,
    pub(in crate::runs) lease: RunLease,
    pub(in crate::runs) cancel: Cancel,
    pub(in crate::runs) log: RunLog,
    /// The run's content that the store does not keep.
    pub(in crate::runs) unstored: Unstored,
    outputs: Arc<watch::Sender<Vec<ToolOutput>>>,
    lost: CancellationToken,
}

impl RunHandle {
    /// Hands the run the outputs of its function calls. The run ignores outputs that it does not
    /// wait for.
    pub(in crate::runs) fn answer(&self, outputs: Vec<ToolOutput>) {
        self.outputs.send_replace(outputs);
    }

    /// Makes the task let go of the run. The task stops at once and writes nothing more, unless it
    /// is writing the end.
    pub(in crate::runs) fn let_go(&self) {
        self.lost.cancel();
    }
}

/// A request to end a run.
#[derive(Clone, Debug)]
pub(in crate::runs) struct Cancel {
    token: CancellationToken,
    discard: Arc<AtomicBool>,
}

impl Cancel {
    pub(in crate::runs) fn new(token: CancellationToken) -> Self {
        Self {
            token,
            discard: Arc::default(),
        }
    }

    /// Requests the end of the run. `discard`: also removes its messages.
    pub(in crate::runs) fn request(&self, discard: bool) {
        self.discard.fetch_or(discard, Ordering::SeqCst);
        self.token.cancel();
    }

    pub(in crate::runs) async fn requested(&self) {
        self.token.cancelled().await;
    }

    pub(in crate::runs) fn discards(&self) -> bool {
        self.discard.load(Ordering::SeqCst)
    }
}

/// The entry of a run in the registry; its drop removes the entry.
#[derive(Debug)]
pub(in crate::runs) struct ActiveRun {
    pub(in crate::runs) lease: RunLease,
    serial: u64,
    pub(in crate::runs) cancel: Cancel,
    pub(in crate::runs) log: RunLogWriter,
    /// The outputs that [`RunHandle::answer`] handed over last.
    pub(in crate::runs) outputs: watch::Receiver<Vec<ToolOutput>>,
    /// Cancelled when the task must [let go](RunHandle::let_go) of the run, because another
    /// process has taken it over, may do so, or should.
    pub(in crate::runs) lost: CancellationToken,
    all: Arc<Mutex<HashMap<RunId, RunHandle>>>,
}

impl RunRegistry {
    pub(in crate::runs) fn new() -> Self {
        let now = Instant::now();
        Self {
            active: Arc::default(),
            refused: Mutex::default(),
            taking: tokio::sync::Mutex::default(),
            session: Mutex::new(Session {
                good_until: now,
                trusts_from: now,
            }),
        }
    }

    /// Registers the task of a new run.
    pub(in crate::runs) fn begins(&self, run: RunId, cancel: CancellationToken) -> ActiveRun {
        self.works_on(
            RunLease {
                run_id: run,
                fence: 1,
            },
            RunLogWriter::new(),
            Unstored::default(),
            cancel,
        )
    }

    /// Registers the task of a run that was taken over. `stored`: the number after the stored
    /// events of its log.
    pub(in crate::runs) fn goes_on(&self, lease: RunLease, stored: i64) -> ActiveRun {
        let log = RunLogWriter::resumed(stored, others_from(&lease));
        self.works_on(lease, log, Unstored::default(), CancellationToken::new())
    }

    /// Registers a task that continues a run without the message that made it, for the messages
    /// that joined it. A cancel of the first caller's request does not concern them. The run's
    /// readers keep their log.
    pub(in crate::runs) fn goes_on_for_others(&self, mut active: ActiveRun) -> ActiveRun {
        let log = std::mem::replace(&mut active.log, RunLogWriter::new());
        let unstored = self
            .handle(active.lease.run_id)
            .map(|handle| handle.unstored)
            .unwrap_or_default();
        let anew = self.works_on(active.lease, log, unstored, CancellationToken::new());
        if active.lost.is_cancelled() {
            anew.lost.cancel();
        }
        anew
    }

    fn works_on(
        &self,
        lease: RunLease,
        log: RunLogWriter,
        unstored: Unstored,
        cancel: CancellationToken,
    ) -> ActiveRun {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (sender, outputs) = watch::channel(Vec::new());
        let (cancel, lost) = (Cancel::new(cancel), CancellationToken::new());
        let handle = RunHandle {
            serial,
            lease,
            cancel: cancel.clone(),
            log: log.reader(),
            unstored,
            outputs: Arc::new(sender),
            lost: lost.clone(),
        };
        lock(&self.active).insert(lease.run_id, handle);
        ActiveRun {
            lease,
            serial,
            cancel,
            log,
            outputs,
            lost,
            all: Arc::clone(&self.active),
        }
    }

    /// Returns the runs with a task in this process.
    pub(in crate::runs) fn runs(&self) -> Vec<RunId> {
        lock(&self.active).keys().copied().collect()
    }

    pub(in crate::runs) fn handles(&self) -> Vec<RunHandle> {
        lock(&self.active).values().cloned().collect()
    }

    pub(in crate::runs) fn handle(&self, run: RunId) -> Option<RunHandle> {
        lock(&self.active).get(&run).cloned()
    }

    /// Makes all tasks [let go](RunHandle::let_go) of their runs.
    pub(in crate::runs) fn let_go(&self) {
        for handle in lock(&self.active).values() {
            handle.let_go();
        }
    }

    /// Notes that the caller of this run's message got the error that it was not recorded.
    pub(in crate::runs) fn refuse(&self, run: RunId, refused: Refused) {
        let (mut all, now) = (lock(&self.refused), Instant::now());
        all.retain(|_, (_, since)| now - *since < REFUSED_FOR);
        all.insert(run, (refused, now));
    }

    /// Returns whether the run was refused and it is not settled yet what happened to its message.
    pub(in crate::runs) fn is_refused(&self, run: RunId) -> bool {
        lock(&self.refused).contains_key(&run)
    }

    /// Notes that it is settled what happened to the message. Returns the refused message, if the
    /// run was refused.
    pub(in crate::runs) fn was_refused(&self, run: RunId) -> Option<Refused> {
        lock(&self.refused).remove(&run).map(|(refused, _)| refused)
    }

    /// Notes that the session is good until `good_until`.
    pub(in crate::runs) fn renewed(&self, good_until: Instant) {
        lock(&self.session).good_until = good_until;
    }

    pub(in crate::runs) fn good_until(&self) -> Instant {
        lock(&self.session).good_until
    }

    /// Returns whether other replicas may take this process for dead.
    pub(in crate::runs) fn has_lapsed(&self) -> bool {
        Instant::now() >= self.good_until()
    }

    /// Notes that before `then` no replica is taken for dead.
    pub(in crate::runs) fn trust_from(&self, then: Instant) {
        lock(&self.session).trusts_from = then;
    }

    /// Returns whether a process without a session counts as dead.
    pub(in crate::runs) fn trusts_sessions(&self) -> bool {
        Instant::now() >= lock(&self.session).trusts_from
    }

    /// Returns the content that the store does not keep of a run with a task in this process.
    pub(in crate::runs) fn unstored(&self, run: RunId) -> Option<Unstored> {
        self.handle(run).map(|handle| handle.unstored)
    }

    /// Fills in the messages of a run that starts. A message that this process does not know stays
    /// empty.
    pub(in crate::runs) fn give_input(&self, started: &mut StartedRun) {
        // A message that has just joined another run is first held under the run that it would
        // have had by itself. It is added to the joined run before it is removed there. This task
        // looks at its own run last, so it does not miss the message.
        let others = self.handles().into_iter().map(|handle| handle.unstored);
        let all: Vec<Unstored> = others.chain(self.unstored(started.run.id)).collect();
        for message in started
            .input
            .iter_mut()
            .filter(|message| message.content.is_empty())
        {
            let known = all.iter().find_map(|unstored| {
                let content = unstored.lock();
                content
                    .input
                    .iter()
                    .find(|it| it.id == message.id)
                    .map(|it| it.content.clone())
            });
            message.content = known.unwrap_or_default();
        }
    }

    /// Fills in the arguments of the calls that a run waits for, if this process knows them.
    pub(in crate::runs) fn give_arguments(&self, run: &mut Run) {
        let Some(action) = &mut run.required_action else {
            return;
        };
        let Some(unstored) = self.unstored(run.id) else {
            return;
        };
        let content = unstored.lock();
        if let Some(asked) = content
            .asked
            .as_ref()
            .filter(|asked| redacted_action(asked) == *action)
        {
            action.clone_from(asked);
        }
    }
}

impl Drop for ActiveRun {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        // If the run was lost and taken over again, the entry is another task's.
        if all
            .get(&self.lease.run_id)
            .is_some_and(|handle| handle.serial == self.serial)
        {
            all.remove(&self.lease.run_id);
        }
    }
}

/// No code panics between the two halves of a change, so the poison can be ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ContentPart;
    use crate::store::InputMessage;

    fn message(text: &str) -> InputMessage {
        InputMessage {
            id: MessageId::new(),
            content: vec![ContentPart::text(text)],
        }
    }

    #[test]
    fn content_goes_with_the_task_of_its_run() {
        let registry = RunRegistry::new();
        let run = RunId::new();
        let active = registry.begins(run, CancellationToken::new());
        registry.unstored(run).unwrap().add(&message("one"));
        let active = registry.goes_on_for_others(active);
        assert_eq!(
            registry.unstored(run).unwrap().lock().input.len(),
            1,
            "messages that joined it stay"
        );
        drop(active);
        assert!(registry.unstored(run).is_none());
    }

    #[test]
    fn what_is_held_is_not_printed() {
        let registry = RunRegistry::new();
        let run = RunId::new();
        let _working = registry.begins(run, CancellationToken::new());
        registry.unstored(run).unwrap().add(&message("planted"));
        assert!(!format!("{registry:?}").contains("planted"));
    }
}
