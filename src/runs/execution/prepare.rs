//! What the upstream thread of a run holds before it, and what it has to be told of that.

use std::sync::Arc;

use crate::domain::{ContentPart, Context, Leftover, Message, Page, Role, RunId, Thread};
use crate::runs::Runs;
use crate::runs::execution::create_thread::Making;
use crate::runs::execution::failure::Failure;
use crate::runs::execution::round::{Drive, insist, wait_out};
use crate::store::{RunLease, Store, StoreError, Withholding};
use crate::upstream::{Ownership, Settled, Upstream, UpstreamError};

/// Messages read at a time.
const PAGE: u32 = 500;
/// Messages that an upstream thread is told at once, and bytes of their content: several times what a model reads, and more
/// than the largest body that is taken by default. All of them are in memory, more than once, until the upstream has them.
const MAX_MESSAGES: usize = 5000;
const MAX_BYTES: usize = 16 * 1024 * 1024;

impl Drive<'_> {
    /// What an earlier run may have left is looked at before anything is sent: its remains are taken away, and what
    /// the transcript holds of it goes along with this turn. `false` if the thread is in no state to tell.
    pub(in crate::runs) async fn settle_earlier(&self) -> Result<bool, Failure> {
        let Some(left) = &self.turn.thread.leftover else { return Ok(true) };
        let was_there =
            match take_away(self.runs, &self.turn.lease, self.upstream, left, Removal::IfSaid).await {
                Err(Failure::Upstream(UpstreamError::Protocol(_))) => return Ok(false),
                was_there => was_there?,
            };
        let reached_the_model = left.upstream_run.is_some() || was_there.said;
        let found = if reached_the_model { Context::Missing } else { Context::Withheld };
        let store = &self.runs.parts.given.store;
        insist(|| store.settled(&self.turn.lease, left.run, found)).await?;
        Ok(true)
    }

    /// Gives the upstream thread up. What a new one has to be told.
    pub(in crate::runs) async fn start_anew(&mut self) -> Result<History, Failure> {
        let history = self.history_before().await?;
        tracing::warn!(
            messages = history.messages.len(),
            "the upstream thread is gone or broken; making it again from the transcript"
        );
        self.progress.thread = None;
        Ok(history)
    }

    /// What the upstream thread lacks of the transcript. What is too much to be told is withheld for good.
    pub(in crate::runs) async fn backlog(&self) -> Result<History, Failure> {
        let (store, run) = (&self.runs.parts.given.store, self.turn.run.id);
        let mut room = Room::default();
        let backlog = newest(&mut room, |before| patiently(move || store.backlog(run, before, PAGE))).await?;
        if room.is_full {
            let before = backlog.first().map(|message| message.position);
            self.withhold(&Withholding { before, missing_only: true, carried: None }).await?;
        }
        Ok(History { messages: Arc::new(with_content(backlog)), carried_users: 0 })
    }

    /// What a new upstream thread begins with: what is carried over from the thread before, and the transcript up to
    /// this run, as far as the model may know it. What is too much to be told is withheld for good.
    pub(in crate::runs) async fn history_before(&self) -> Result<History, Failure> {
        let (store, run) = (&self.runs.parts.given.store, self.turn.run.id);
        let Thread { id, carried, .. } = self.turn.thread;
        let mut room = Room::default();
        let mut own = newest(&mut room, |before| patiently(move || store.earlier(run, before, PAGE))).await?;
        if own.iter().any(|message| message.content.is_empty()) {
            return self.nothing_before().await;
        }
        let before = own.first().map(|message| message.position);
        let mut messages = Vec::new();
        if carried > 0 {
            messages = newest(&mut room, |before| patiently(move || store.carried(id, before, PAGE))).await?;
        }
        if room.is_full {
            let carried = Some(u32::try_from(messages.len()).unwrap_or(u32::MAX));
            self.withhold(&Withholding { before, missing_only: false, carried }).await?;
        }
        messages = with_content(messages);
        let carried_users = count_users(&messages);
        messages.append(&mut own);
        Ok(History { messages: Arc::new(messages), carried_users })
    }

    /// Where not all that was said is stored, a new upstream thread begins with nothing: a story with gaps is another one.
    async fn nothing_before(&self) -> Result<History, Failure> {
        let store = &self.runs.parts.given.store;
        let all = Withholding { carried: Some(0), ..Withholding::default() };
        insist(|| store.withhold_earlier(&self.turn.lease, &all)).await?;
        Ok(History::default())
    }

    /// Withholds the oldest messages of a thread that is too long.
    async fn withhold(&self, what: &Withholding) -> Result<(), Failure> {
        tracing::warn!(
            thread.id = %self.turn.thread.id,
            first_position = what.before,
            max_messages = MAX_MESSAGES,
            max_bytes = MAX_BYTES,
            "the thread is too long to tell the upstream all of it; older messages are withheld from the model"
        );
        let store = &self.runs.parts.given.store;
        insist(|| store.withhold_earlier(&self.turn.lease, what)).await
    }

    /// Makes the upstream thread and records it before it is used. Whether there is one that holds the seed: where
    /// threads are chains of responses the first run makes it.
    pub(in crate::runs) async fn create_thread(
        &mut self,
        owner: &Ownership,
        seed: Option<&History>,
    ) -> Result<bool, Failure> {
        if !self.upstream.capabilities().has_threads {
            self.progress.thread = None;
            return Ok(false);
        }
        let given = &self.runs.parts.given;
        let Some(upstream) = given.upstreams.get(&self.turn.thread.upstream) else {
            return Err(Failure::NotConfigured);
        };
        self.runs.may_send()?;
        let making = Making {
            store: Arc::clone(&given.store),
            upstream: Arc::clone(upstream),
            lease: self.turn.lease,
            owner: owner.clone(),
            intent: self.progress.intent.take(),
            seed: seed.map(|seed| (Arc::clone(&seed.messages), seed.carried_users)),
        };
        self.progress.thread = Some(making.execute(&given.tasks).await?);
        Ok(true)
    }
}

/// When what a run left is taken away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) enum Removal {
    /// If the run is to be discarded.
    IfDiscarded,
    /// Also if any of it is there.
    IfSaid,
}

/// Ends what a run left at the upstream, and takes it away. What was there.
///
/// What went along with the run stays, and once the run's own messages are gone nothing at the upstream tells that it is
/// there. So that is recorded before they are removed.
pub(in crate::runs) async fn take_away(
    runs: &Runs,
    lease: &RunLease,
    upstream: &dyn Upstream,
    left: &Leftover,
    removal: Removal,
) -> Result<Settled, Failure> {
    runs.may_send()?;
    let settled = upstream.settle(left).await.map_err(Failure::Upstream)?;
    if !left.remove && !(removal == Removal::IfSaid && settled.said) {
        return Ok(settled);
    }
    // A chain goes on from before that run, and there nothing went along with it.
    if left.synced && settled.said && settled.thread.is_none() {
        insist(|| runs.store().took_along(lease, left.run)).await?;
    }
    // What stands there now may be another's.
    runs.may_send()?;
    let removed = upstream.remove(left).await.map_err(|error| match error {
        // It stays there, so what comes next goes to another thread.
        UpstreamError::Refused { status: 404 | 405 | 501, .. } => {
            UpstreamError::Protocol("the upstream does not delete messages".to_owned())
        }
        error => error,
    });
    removed.map_err(Failure::Upstream)?;
    Ok(settled)
}

/// Messages that an upstream thread lacks, oldest first. Whoever makes the thread shares them.
#[derive(Default)]
pub(in crate::runs) struct History {
    pub(in crate::runs) messages: Arc<Vec<Message>>,
    /// How many of the user's among them come from the thread before.
    pub(in crate::runs) carried_users: u32,
}

/// How much more an upstream thread may be told.
pub(in crate::runs) struct Room {
    messages: usize,
    bytes: usize,
    /// A message did not fit: no older one goes along either, since a story with gaps is another one.
    is_full: bool,
}

impl Default for Room {
    fn default() -> Self {
        Self { messages: MAX_MESSAGES, bytes: MAX_BYTES, is_full: false }
    }
}

impl Room {
    fn take(&mut self, message: &Message) -> bool {
        let bytes = message.content.iter().map(ContentPart::size).sum();
        match (self.messages.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(messages), Some(bytes)) if !self.is_full => (self.messages, self.bytes) = (messages, bytes),
            _ => self.is_full = true,
        }
        !self.is_full
    }
}

/// The newest messages for which there is room, oldest first. They are read backwards in pages, each before the position
/// at which the last one ended.
pub(in crate::runs) async fn newest<E, F>(
    room: &mut Room,
    read: impl Fn(Option<i64>) -> F,
) -> Result<Vec<Message>, E>
where
    F: Future<Output = Result<Page<Message>, E>>,
{
    let mut messages: Vec<Message> = Vec::new();
    let mut has_more = true;
    while has_more && !room.is_full {
        let page = read(messages.last().map(|message| message.position)).await?;
        has_more = page.has_more && !page.data.is_empty();
        messages.extend(page.data.into_iter().take_while(|message| room.take(message)));
    }
    messages.reverse();
    Ok(messages)
}

/// What the upstream thread of a run lacks, as far as it was told with the run.
pub(in crate::runs) async fn include_history(store: &Store, run: RunId) -> Result<Vec<Message>, StoreError> {
    let backlog = newest(&mut Room::default(), |before| store.backlog(run, before, PAGE)).await?;
    Ok(with_content(backlog))
}

/// Reads of the store until it answers.
async fn patiently<T, F>(read: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, StoreError>>,
{
    loop {
        match read().await {
            Ok(read) => return Ok(read),
            Err(error) => wait_out(error).await?,
        }
    }
}

/// Without those that were said while nothing that is said was stored.
fn with_content(mut messages: Vec<Message>) -> Vec<Message> {
    messages.retain(|message| !message.content.is_empty());
    messages
}

fn count_users(messages: &[Message]) -> u32 {
    let users = messages.iter().filter(|message| message.role == Role::User).count();
    u32::try_from(users).unwrap_or(u32::MAX)
}
