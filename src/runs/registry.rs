//! The runs that this process works on, how to reach their tasks, and how long this process's session is good.

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

/// How long it is remembered that an admission was refused. The server gives up its statement long before.
const REFUSED_FOR: Duration = Duration::from_mins(10);

/// The runs that this process works on, and its session.
#[derive(Debug)]
pub(in crate::runs) struct RunRegistry {
    /// Runs that a task of this process works on, from before they are recorded until their end is.
    active: Arc<Mutex<HashMap<RunId, RunHandle>>>,
    /// Admissions of which it is not known whether they were recorded, and whose senders heard that they were not. Kept
    /// for [`REFUSED_FOR`]: no admission arrives later.
    refused: Mutex<HashMap<RunId, (Refused, Instant)>>,
    /// Held while runs change hands: what this process has just taken is not to be taken again as a stray.
    pub(in crate::runs) taking: tokio::sync::Mutex<()>,
    session: Mutex<Session>,
}

/// A message whose sender heard that it was not taken.
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
    /// Until when it is surely good, by this process's own clock.
    good_until: Instant,
    /// Before this, those whose session has lapsed are not taken for dead.
    trusts_from: Instant,
}

/// What others in this process can do about a run that it works on.
#[derive(Clone, Debug)]
pub(in crate::runs) struct RunHandle {
    /// Tells this task's entry from a later one of the same run.
    serial: u64,
    pub(in crate::runs) lease: RunLease,
    pub(in crate::runs) cancel: Cancel,
    pub(in crate::runs) log: RunLog,
    /// What the store does not keep of it.
    pub(in crate::runs) unstored: Unstored,
    outputs: Arc<watch::Sender<Vec<ToolOutput>>>,
    lost: CancellationToken,
}

impl RunHandle {
    /// Hands the run outputs of its function calls. Those that it does not wait for (any more) are passed over.
    pub(in crate::runs) fn answer(&self, outputs: Vec<ToolOutput>) {
        self.outputs.send_replace(outputs);
    }

    /// Has the task let go of the run: it stops at once and writes nothing more of it, unless it is writing its end.
    pub(in crate::runs) fn let_go(&self) {
        self.lost.cancel();
    }
}

/// Somebody wants a run to end.
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

    /// `discard`: and its messages to be removed.
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

/// Says, while it lives, that this process works on a run.
#[derive(Debug)]
pub(in crate::runs) struct ActiveRun {
    pub(in crate::runs) lease: RunLease,
    serial: u64,
    pub(in crate::runs) cancel: Cancel,
    pub(in crate::runs) log: RunLogWriter,
    /// What was [handed](RunHandle::answer) last.
    pub(in crate::runs) outputs: watch::Receiver<Vec<ToolOutput>>,
    /// Cancelled when the task has to [let go](RunHandle::let_go) of the run: others have taken it over, may do so from now
    /// on, or shall.
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

    /// Says that a task works on a new run.
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

    /// Says that a task works on a run that was taken over. `stored`: the number after all that is stored of its log.
    pub(in crate::runs) fn goes_on(&self, lease: RunLease, stored: i64) -> ActiveRun {
        let log = RunLogWriter::resumed(stored, others_from(&lease));
        self.works_on(lease, log, Unstored::default(), CancellationToken::new())
    }

    /// Says that a task goes on with a run without the one whose message made it: what cancels that one's request does not
    /// concern the others. Those who follow the run go on to do so.
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

    /// The runs that tasks of this process work on.
    pub(in crate::runs) fn runs(&self) -> Vec<RunId> {
        lock(&self.active).keys().copied().collect()
    }

    pub(in crate::runs) fn handles(&self) -> Vec<RunHandle> {
        lock(&self.active).values().cloned().collect()
    }

    pub(in crate::runs) fn handle(&self, run: RunId) -> Option<RunHandle> {
        lock(&self.active).get(&run).cloned()
    }

    /// Has all tasks [let go](RunHandle::let_go) of their runs.
    pub(in crate::runs) fn let_go(&self) {
        for handle in lock(&self.active).values() {
            handle.let_go();
        }
    }

    /// The sender of the message of this run heard that it was not taken.
    pub(in crate::runs) fn refuse(&self, run: RunId, refused: Refused) {
        let (mut all, now) = (lock(&self.refused), Instant::now());
        all.retain(|_, (_, since)| now - *since < REFUSED_FOR);
        all.insert(run, (refused, now));
    }

    /// It is not settled yet what became of the message that this run was made for.
    pub(in crate::runs) fn is_refused(&self, run: RunId) -> bool {
        lock(&self.refused).contains_key(&run)
    }

    /// It is settled what became of it. What had been refused, if it had.
    pub(in crate::runs) fn was_refused(&self, run: RunId) -> Option<Refused> {
        lock(&self.refused).remove(&run).map(|(refused, _)| refused)
    }

    /// The session is good until then.
    pub(in crate::runs) fn renewed(&self, good_until: Instant) {
        lock(&self.session).good_until = good_until;
    }

    pub(in crate::runs) fn good_until(&self) -> Instant {
        lock(&self.session).good_until
    }

    /// Others may take this process for dead.
    pub(in crate::runs) fn has_lapsed(&self) -> bool {
        Instant::now() >= self.good_until()
    }

    /// Until then nobody is taken for dead.
    pub(in crate::runs) fn trust_from(&self, then: Instant) {
        lock(&self.session).trusts_from = then;
    }

    /// A process without a session counts as dead.
    pub(in crate::runs) fn trusts_sessions(&self) -> bool {
        Instant::now() >= lock(&self.session).trusts_from
    }

    /// What the store does not keep of a run that a task of this process works on.
    pub(in crate::runs) fn unstored(&self, run: RunId) -> Option<Unstored> {
        self.handle(run).map(|handle| handle.unstored)
    }

    /// Gives a run that starts what it is to say. What is not known here stays empty.
    pub(in crate::runs) fn give_input(&self, started: &mut StartedRun) {
        // A message that has only just joined is held under the run that it would have had by itself. It is added here before
        // it is removed there: so a task that looks here last does not miss it.
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

    /// Gives a run the arguments of the calls that it waits for, if they are known here.
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
        // A run that was lost and taken over again has another task's entry by now.
        if all
            .get(&self.lease.run_id)
            .is_some_and(|handle| handle.serial == self.serial)
        {
            all.remove(&self.lease.run_id);
        }
    }
}

/// Nothing in here panics half-way through a change.
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
            content: vec![ContentPart::Text {
                text: text.to_owned(),
            }],
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
            "others have joined it"
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
