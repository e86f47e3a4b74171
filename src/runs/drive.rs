//! The upstream side of a round: the thread, the call, the stream, and what to do when one of them fails.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::failure::Failure;
use super::feed::FeedWriter;
use super::making::Making;
use super::progress::{Progress, Reach};
use super::retries::{FIRST_BACK_OFF, Retries};
use super::{RunEvent, Runs, jittered};
use crate::config::AssistantConfig;
use crate::domain::{
    ContentPart, Context, Leftover, Message, MultitaskStrategy, Role, Thread, ToolOutput, UpstreamRunId,
};
use crate::error::Chain;
use crate::store::{StoreError, Turn};
use crate::upstream::{
    AnswerTools, Ended, EventStream, Ownership, Recovered, Settled, StartRun, Upstream, UpstreamError,
    UpstreamEvent,
};

/// What each streamed piece of a reply counts at least towards the limit on replies, bytes: the log of a run keeps
/// the pieces apart.
const MIN_PIECE_COST: usize = 64;
/// Messages read at a time when an upstream thread is made again.
const HISTORY_PAGE: u32 = 500;
/// Looks at what became of one request, before it is given up.
const MAX_LOOKS: u32 = 3;
/// How often a stream that breaks is taken up again.
const MAX_BREAKS: u32 = 5;

/// What a round sends.
#[derive(Clone, Copy)]
pub(super) enum Round<'a> {
    Message,
    Outputs(&'a [ToolOutput]),
    /// The message, unless another process has sent it: what became of that is to be found out first.
    Unknown,
}

/// One round at the upstream.
pub(super) struct Drive<'a> {
    pub(super) runs: &'a Runs,
    pub(super) upstream: &'a dyn Upstream,
    pub(super) assistant: &'a AssistantConfig,
    pub(super) turn: &'a Turn,
    pub(super) feed: &'a FeedWriter,
    pub(super) progress: &'a mut Progress,
    /// Whether a request is out of which it is not heard yet under which id it runs.
    pub(super) asking: &'a watch::Sender<bool>,
}

/// What a failure leads to.
enum Next {
    /// The upstream has the run, and this is what it still says.
    Follow(EventStream),
    /// It provably does not have it.
    SendAgain,
}

impl Drive<'_> {
    /// Sends what the round is about and relays the reply until the upstream says how the round ended. May be dropped at
    /// any await: what is known by then is in the progress. The stream comes back to be [drained](drain).
    pub(super) async fn round(mut self, round: Round<'_>) -> Result<(Ended, EventStream), Failure> {
        let before = self.progress.usage;
        let id_before = self.progress.upstream_run.clone();
        let result = match round {
            Round::Message => self.message(None).await,
            Round::Outputs(outputs) => self.outputs(outputs).await,
            Round::Unknown => self.taken_over().await,
        };
        let (mut ended, events) = result?;
        // An upstream that counts each round by itself gives each an id of its own.
        if let (Some(before), Some(now)) = (before, ended.usage)
            && id_before != self.progress.upstream_run
        {
            ended.usage = Some(before + now);
        }
        Ok((ended, events))
    }

    /// `doubt`: how an earlier request failed that might still come in, although the upstream does not show it.
    async fn message(&mut self, mut doubt: Option<UpstreamError>) -> Result<(Ended, EventStream), Failure> {
        let owner = self.owner();
        let is_sound = self.settle_earlier().await?;
        let (mut needs_thread, mut rebuilt) = (self.progress.thread.is_none(), !is_sound);
        let mut history = if rebuilt {
            needs_thread = true;
            self.start_anew().await?
        } else if needs_thread && self.turn.thread.carried > 0 {
            rebuilt = true;
            self.history_before().await?
        } else if self.turn.thread.backlog > 0 || self.turn.thread.leftover.is_some() {
            History { messages: self.backlog().await?, carried_users: 0 }
        } else {
            History::default()
        };
        let mut retries = Retries::new(self.runs);
        loop {
            if needs_thread {
                match self.create_thread(&owner, rebuilt.then_some(&history)).await {
                    Ok(holds_seed) => {
                        needs_thread = false;
                        if rebuilt && holds_seed {
                            history.messages.clear();
                        }
                    }
                    Err(Failure::Upstream(error)) => {
                        retries.wait_after(error).await?;
                        continue;
                    }
                    Err(failure) => return Err(failure),
                }
            }
            self.progress.went_along(&history.messages);
            self.progress.reach = self.progress.reach.max(Reach::Sent);
            let thread = self.progress.thread.clone();
            let request = StartRun {
                run: self.turn.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                history: &history.messages,
                assistant: self.assistant,
                input: &self.turn.input,
                metadata: &self.turn.run.metadata,
            };
            self.may_send()?;
            self.asks();
            let error = match self.upstream.start(request).await {
                Ok(events) => match self.relay(events, false).await {
                    // A thread that turns out to be broken only after it took the run.
                    Err(Failure::Upstream(error @ UpstreamError::ThreadGone))
                        if self.progress.text.is_empty() =>
                    {
                        error
                    }
                    relayed => return relayed,
                },
                Err(error) => error,
            };
            self.heard(&error);
            match error {
                UpstreamError::ThreadGone if !rebuilt => {
                    self.refused();
                    history = self.start_anew().await?;
                    (needs_thread, rebuilt) = (true, true);
                }
                error => {
                    let was_busy = matches!(error, UpstreamError::Busy { .. });
                    if error.is_ambiguous() {
                        doubt = Some(error.clone());
                    }
                    if let Next::Follow(events) = self.after(error, &mut retries).await? {
                        return self.relay(events, true).await;
                    }
                    // What holds the thread may be this run after all, or what an earlier one left there.
                    if was_busy
                        && let Some(doubt) = &doubt
                        && let Some(events) = self.came_in_late(doubt).await?
                    {
                        return self.relay(events, true).await;
                    }
                    if was_busy && !rebuilt && self.turn.thread.leftover.is_some() {
                        // What held it may have come in since it was looked at, and what went along with it.
                        if self.settle_earlier().await? {
                            history.messages = self.backlog().await?;
                        } else {
                            history = self.start_anew().await?;
                            (needs_thread, rebuilt) = (true, true);
                        }
                    }
                }
            }
        }
    }

    /// Goes on with a round that another process had begun, or may have.
    async fn taken_over(&mut self) -> Result<(Ended, EventStream), Failure> {
        let thread = &self.turn.thread;
        let lacks_thread = self.upstream.capabilities().has_threads && thread.upstream_thread_id.is_none();
        if lacks_thread || self.progress.reach == Reach::Here {
            // The thread is recorded before anything is sent.
            self.progress.reach = Reach::Here;
            return self.message(None).await;
        }
        let lost = UpstreamError::Broken { timeout: false };
        match self.recover(&lost).await? {
            Some(Recovered::Running(events)) => {
                tracing::info!("the upstream has the run; following it");
                self.relay(events, true).await
            }
            Some(Recovered::Absent) => {
                tracing::info!("the upstream has never seen the message; sending it");
                self.refused();
                self.sends_again().await?;
                self.message(Some(lost)).await
            }
            Some(Recovered::Unknown) | None => Err(Failure::ReplicaLost),
        }
    }

    /// Looks once more for a request that the upstream did not show, before it is sent again to a thread that is held.
    async fn came_in_late(&mut self, failure: &UpstreamError) -> Result<Option<EventStream>, Failure> {
        self.progress.reach = self.progress.reach.max(Reach::Sent);
        match self.recover(failure).await? {
            Some(Recovered::Running(events)) => Ok(Some(events)),
            Some(Recovered::Absent) => {
                self.refused();
                Ok(None)
            }
            Some(Recovered::Unknown) | None => Err(Failure::Upstream(failure.clone())),
        }
    }

    async fn outputs(&mut self, outputs: &[ToolOutput]) -> Result<(Ended, EventStream), Failure> {
        let owner = self.owner();
        let mut retries = Retries::new(self.runs);
        let upstream_run = self.progress.upstream_run.clone();
        // Calls that were found in a thread can be answered without the id of what made them.
        if upstream_run.is_none() && !self.upstream.capabilities().has_threads {
            return Err(Failure::ReplicaLost);
        }
        if std::mem::take(&mut self.progress.is_uncertain) {
            // As if the answer had been lost: it is looked up before anything is sent.
            let lost = UpstreamError::Broken { timeout: false };
            if let Next::Follow(events) = self.after(lost, &mut retries).await? {
                return self.relay(events, true).await;
            }
        }
        self.announce_outputs().await?;
        loop {
            let thread = self.progress.thread.clone();
            let request = AnswerTools {
                run: self.turn.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                upstream_run: upstream_run.as_ref(),
                assistant: self.assistant,
                outputs,
                metadata: &self.turn.run.metadata,
            };
            self.may_send()?;
            self.asks();
            let error = match self.upstream.answer_tools(request).await {
                Ok(events) => return self.relay(events, false).await,
                Err(error) => error,
            };
            self.heard(&error);
            match self.after(error, &mut retries).await? {
                Next::Follow(events) => return self.relay(events, true).await,
                Next::SendAgain => {}
            }
        }
    }

    /// Whether this process still has the thread to itself: one that was stopped for a while may not know yet that it has
    /// not.
    fn may_send(&self) -> Result<(), Failure> {
        if self.runs.parts.standing.has_lapsed() { Err(Failure::LeaseLost) } else { Ok(()) }
    }

    fn owner(&self) -> Ownership {
        let thread = &self.turn.thread;
        let expires_at = self.runs.parts.given.lifetimes.expiry(thread);
        Ownership { key: thread.key.clone(), thread: thread.id, expires_at }
    }

    /// Whoever takes the run over must know that the outputs may be there.
    async fn announce_outputs(&self) -> Result<(), Failure> {
        let store = &self.runs.parts.given.store;
        insist(|| store.sends_outputs(&self.turn.lease)).await
    }

    /// A request goes out that may start something, of which it is not heard yet under which id.
    fn asks(&mut self) {
        self.progress.unheard += 1;
        self.asking.send_replace(true);
    }

    /// Whoever says how a request failed has not left anything of it.
    fn heard(&mut self, error: &UpstreamError) {
        self.asking.send_replace(false);
        if !matches!(error, UpstreamError::Broken { .. } | UpstreamError::Protocol(_)) {
            self.progress.heard();
        }
    }

    /// A request whose answer broke off may have left something under an id that nobody heard, although the thread shows
    /// nothing of it.
    async fn sends_again(&mut self) -> Result<(), Failure> {
        if self.progress.unheard == 0 || !self.upstream.capabilities().stores_runs {
            return Ok(());
        }
        let store = &self.runs.parts.given.store;
        insist(|| store.sends_again(&self.turn.lease)).await?;
        // Only now: a run that is cut off before says at its end that there was such a request.
        self.progress.heard();
        Ok(())
    }

    /// Decides what to do after a request was refused or broke off.
    async fn after(&mut self, error: UpstreamError, retries: &mut Retries) -> Result<Next, Failure> {
        match error {
            UpstreamError::Busy { blocking_run } => {
                self.refused();
                self.conflict(blocking_run, retries).await?;
                Ok(Next::SendAgain)
            }
            error if error.is_ambiguous() => match self.recover(&error).await? {
                Some(Recovered::Running(events)) => {
                    tracing::warn!(error = %Chain(&error), "the upstream has the run all the same; following it");
                    Ok(Next::Follow(events))
                }
                Some(Recovered::Absent) => {
                    self.refused();
                    retries.wait_after(error).await?;
                    self.sends_again().await?;
                    Ok(Next::SendAgain)
                }
                Some(Recovered::Unknown) | None => Err(Failure::Upstream(error)),
            },
            error => {
                self.refused();
                retries.wait_after(error).await?;
                Ok(Next::SendAgain)
            }
        }
    }

    /// Nothing of what was sent is at the upstream; what an earlier round left there is.
    fn refused(&mut self) {
        self.progress.busy = false;
        if self.progress.reach == Reach::Sent {
            self.progress.reach = Reach::Here;
        }
    }

    /// Something else holds the thread: what the caller wants done on a busy thread is done here too.
    async fn conflict(
        &mut self,
        blocking_run: Option<UpstreamRunId>,
        retries: &mut Retries,
    ) -> Result<(), Failure> {
        // Or it is the run of who has the thread by now.
        self.may_send()?;
        tracing::warn!(
            blocking_run = blocking_run.as_ref().map(UpstreamRunId::as_str),
            "the upstream thread is held by another run"
        );
        self.progress.busy = true;
        let since = *retries.busy_since.get_or_insert_with(Instant::now);
        let strategy = self.turn.run.strategy;
        // A lock without a name may be what is left of our own last run, for a while.
        let lingers = blocking_run.is_none() && since.elapsed() < self.upstream.capabilities().lock_window;
        if strategy == MultitaskStrategy::Reject && !lingers {
            return Err(Failure::Conflict { blocking_run });
        }
        let Some(thread) = self.progress.thread.clone() else {
            sleep(jittered(FIRST_BACK_OFF)).await;
            return Ok(());
        };
        let cancel = matches!(strategy, MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback);
        if let Err(error) = self.upstream.clear(&thread, blocking_run.as_ref(), cancel).await {
            tracing::warn!(error = %Chain(&error), "cannot see what holds the upstream thread");
            sleep(jittered(FIRST_BACK_OFF)).await;
        }
        Ok(())
    }

    /// Relays the stream to its end. One that breaks is followed up as long as the upstream has the run. `followed_up`:
    /// it tells the round from its beginning again.
    async fn relay(
        &mut self,
        mut events: EventStream,
        mut followed_up: bool,
    ) -> Result<(Ended, EventStream), Failure> {
        let mut breaks = 0;
        loop {
            let error = match self.relay_once(&mut events, followed_up).await {
                Ok(ended) => return Ok((ended, events)),
                Err(Failure::Upstream(error)) if error.is_ambiguous() => error,
                Err(failure) => return Err(failure),
            };
            breaks += 1;
            if breaks > MAX_BREAKS {
                return Err(Failure::Upstream(error));
            }
            match self.recover(&error).await? {
                Some(Recovered::Running(rest)) => {
                    tracing::warn!(error = %Chain(&error), "the stream broke; following the run to its end");
                    (events, followed_up) = (rest, true);
                }
                _ => return Err(Failure::Upstream(error)),
            }
        }
    }

    async fn relay_once(&mut self, events: &mut EventStream, followed_up: bool) -> Result<Ended, Failure> {
        let progress = &mut *self.progress;
        let limit = self.runs.parts.given.runs.max_reply_bytes;
        let shown = if followed_up { progress.text.clone() } else { String::new() };
        let mut retelling = Retelling { shown, differs: false };
        while let Some(event) = events.next().await {
            match event.map_err(Failure::Upstream)? {
                UpstreamEvent::Accepted(id) => {
                    self.asking.send_replace(false);
                    self.feed.accepted(&id);
                    progress.accepted(id);
                }
                UpstreamEvent::Text(text) => {
                    let Some(text) = retelling.unheard(text) else { continue };
                    progress.cost += text.len().max(MIN_PIECE_COST);
                    if progress.cost > limit {
                        return Err(Failure::ReplyTooLarge);
                    }
                    progress.text.push_str(&text);
                    self.feed.push(RunEvent::Delta(text.into()));
                }
                UpstreamEvent::Ended(mut ended) => {
                    let calls = ended.tool_calls.iter().map(|it| it.arguments.len() + MIN_PIECE_COST);
                    progress.cost += calls.sum::<usize>();
                    let size: usize =
                        ended.content.iter().chain(&progress.content).map(ContentPart::size).sum();
                    if size.max(progress.cost) > limit {
                        return Err(Failure::ReplyTooLarge);
                    }
                    if followed_up {
                        if ended.content.starts_with(&progress.content) {
                            ended.content.drain(..progress.content.len());
                        }
                        // Whoever reads the deltas alone shall have the whole text too.
                        let text: String = ended.content.iter().filter_map(plain).collect();
                        if let Some(rest) = text.strip_prefix(&progress.text).filter(|rest| !rest.is_empty())
                        {
                            self.feed.push(RunEvent::Delta(rest.into()));
                        }
                    }
                    return Ok(*ended);
                }
            }
        }
        Err(Failure::Upstream(UpstreamError::Broken { timeout: false }))
    }

    /// Finds out what became of a request. `None` if the upstream does not say.
    async fn recover(&mut self, error: &UpstreamError) -> Result<Option<Recovered>, Failure> {
        let sent = leftover(self.runs, self.turn, self.progress).await?;
        for look in 0..MAX_LOOKS {
            if look > 0 {
                sleep(jittered(FIRST_BACK_OFF * 2_u32.pow(look))).await;
            }
            match self.upstream.recover(&sent, error).await {
                Ok(recovered) => return Ok(Some(recovered)),
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot find out what became of a request");
                }
            }
        }
        Ok(None)
    }

    /// What an earlier run may have left is looked at before anything is sent: its remains are taken away, and what
    /// the transcript holds of it goes along with this turn. `false` if the thread is in no state to tell.
    async fn settle_earlier(&self) -> Result<bool, Failure> {
        let Some(left) = &self.turn.thread.leftover else { return Ok(true) };
        let was_there = match self.take_away_earlier().await {
            Err(Failure::Upstream(UpstreamError::Protocol(_))) => return Ok(false),
            was_there => was_there?,
        };
        let reached_the_model = left.upstream_run.is_some() || was_there.said;
        let found = if reached_the_model { Context::Missing } else { Context::Withheld };
        // A chain goes on from before that run, and there nothing went along with it.
        let synced = left.synced && was_there.said && was_there.thread.is_none();
        let store = &self.runs.parts.given.store;
        insist(|| store.settled(&self.turn.lease, left.run, found, synced)).await?;
        Ok(true)
    }

    /// Gives the upstream thread up. What a new one has to be told.
    async fn start_anew(&mut self) -> Result<History, Failure> {
        let history = self.history_before().await?;
        tracing::warn!(
            messages = history.messages.len(),
            "the upstream thread is gone or broken; making it again from the transcript"
        );
        self.progress.thread = None;
        Ok(history)
    }

    /// Ends and removes what an earlier run left at the upstream, if it may have left something. What was there.
    async fn take_away_earlier(&self) -> Result<Settled, Failure> {
        let Some(left) = &self.turn.thread.leftover else { return Ok(Settled::default()) };
        self.may_send()?;
        let settled = self.upstream.settle(left).await.map_err(Failure::Upstream)?;
        if settled.said || left.remove {
            // What stands there now may be another's.
            self.may_send()?;
            self.upstream.remove(left).await.map_err(Failure::Upstream)?;
        }
        Ok(settled)
    }

    /// What the upstream thread lacks of the transcript.
    async fn backlog(&self) -> Result<Vec<Message>, Failure> {
        loop {
            match self.runs.parts.given.store.backlog(self.turn.run.id).await {
                Ok(messages) => return Ok(with_content(messages)),
                Err(error) => wait_out(error).await?,
            }
        }
    }

    /// What a new upstream thread begins with: what is carried over from the thread before, and the transcript up to
    /// this run, as far as the model may know it.
    async fn history_before(&self) -> Result<History, Failure> {
        let store = &self.runs.parts.given.store;
        let Thread { id, carried, .. } = self.turn.thread;
        let mut messages = loop {
            if carried == 0 {
                break Vec::new();
            }
            match store.carried(id).await {
                Ok(carried) => break with_content(carried),
                Err(error) => wait_out(error).await?,
            }
        };
        let carried_users = count_users(&messages);
        let mut after = 0;
        loop {
            match store.transcript(id, after, HISTORY_PAGE).await {
                Ok(page) => {
                    let Some(last) = page.last() else { break };
                    after = last.position;
                    messages.extend(page);
                }
                Err(error) => wait_out(error).await?,
            }
        }
        let own = Some(self.turn.run.id);
        messages.retain(|message| message.run_id != own && message.context != Context::Withheld);
        if messages.iter().any(|message| message.content.is_empty()) {
            return self.nothing_before().await;
        }
        Ok(History { messages, carried_users })
    }

    /// Where not all that was said is stored, a new upstream thread begins with nothing: a story with gaps is another one.
    async fn nothing_before(&self) -> Result<History, Failure> {
        let store = &self.runs.parts.given.store;
        insist(|| store.withhold_earlier(&self.turn.lease)).await?;
        Ok(History::default())
    }

    /// Makes the upstream thread and records it before it is used. Whether there is one that holds the seed: where
    /// threads are chains of responses the first run makes it.
    async fn create_thread(&mut self, owner: &Ownership, seed: Option<&History>) -> Result<bool, Failure> {
        if !self.upstream.capabilities().has_threads {
            self.progress.thread = None;
            return Ok(false);
        }
        let given = &self.runs.parts.given;
        let Some(upstream) = given.upstreams.get(&self.turn.thread.upstream) else {
            return Err(Failure::NotConfigured);
        };
        self.may_send()?;
        let making = Making {
            store: Arc::clone(&given.store),
            upstream: Arc::clone(upstream),
            lease: self.turn.lease,
            owner: owner.clone(),
            seed: seed.map(|seed| (seed.messages.clone(), seed.carried_users)),
        };
        self.progress.thread = Some(making.carry_out(&given.tasks).await?);
        Ok(true)
    }
}

/// Messages that an upstream thread lacks, oldest first.
#[derive(Default)]
struct History {
    messages: Vec<Message>,
    /// How many of the user's among them come from the thread before.
    carried_users: u32,
}

/// Without those that were said while nothing that is said was stored.
pub(super) fn with_content(mut messages: Vec<Message>) -> Vec<Message> {
    messages.retain(|message| !message.content.is_empty());
    messages
}

fn count_users(messages: &[Message]) -> u32 {
    let users = messages.iter().filter(|message| message.role == Role::User).count();
    u32::try_from(users).unwrap_or(u32::MAX)
}

/// What a turn may have left at the upstream, with what is needed to find it there.
pub(super) async fn leftover(runs: &Runs, turn: &Turn, progress: &Progress) -> Result<Leftover, Failure> {
    let mut baseline = loop {
        match runs.parts.given.store.baseline(turn.run.id).await {
            Ok(baseline) => break baseline,
            Err(error) => wait_out(error).await?,
        }
    };
    baseline.skip += progress.history_users;
    Ok(Leftover {
        run: turn.run.id,
        thread: progress.thread.clone(),
        upstream_run: progress.upstream_run.clone(),
        open_calls: progress.open_calls.clone(),
        baseline,
        inputs: progress.inputs,
        synced: progress.synced,
        remove: false,
    })
}

/// Notes something of a run that this process has, however long the database is away.
async fn insist<F>(note: impl Fn() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<bool, StoreError>>,
{
    loop {
        match note().await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Failure::LeaseLost),
            Err(error) => wait_out(error).await?,
        }
    }
}

/// Pauses before another try, if there is a point in one. The caller bounds the tries.
pub(super) async fn wait_out(error: StoreError) -> Result<(), Failure> {
    tracing::error!(error = %Chain(&error), "the store failed in the middle of a turn");
    if !matches!(error, StoreError::Unavailable(_)) {
        return Err(Failure::Store);
    }
    sleep(jittered(Duration::from_millis(500))).await;
    Ok(())
}

/// A stream that tells a round from its beginning again, of which some was shown before.
struct Retelling {
    /// What was shown and has not been told again yet.
    shown: String,
    /// It tells something else: what holds is told by the end.
    differs: bool,
}

impl Retelling {
    /// What is new of a piece of text.
    fn unheard(&mut self, text: String) -> Option<String> {
        let common = self.shown.len().min(text.len());
        if self.differs || self.shown.as_bytes()[..common] != text.as_bytes()[..common] {
            self.differs = true;
            return None;
        }
        if common == 0 {
            return Some(text);
        }
        self.shown.drain(..common);
        Some(text[common..].to_owned()).filter(|new| !new.is_empty())
    }
}

/// Reads what is left of an answer, so that its connection can be used again. The stream itself bounds that.
pub(super) async fn drain(rest: Option<EventStream>) {
    if let Some(rest) = rest {
        rest.for_each(|_| std::future::ready(())).await;
    }
}

/// The text of a part that is text.
pub(super) fn plain(part: &ContentPart) -> Option<&str> {
    match part {
        ContentPart::Text { text } => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a reader sees of a retelling in these pieces.
    fn seen(shown: &str, pieces: &[&str]) -> String {
        let mut retelling = Retelling { shown: shown.to_owned(), differs: false };
        pieces.iter().filter_map(|piece| retelling.unheard((*piece).to_owned())).collect()
    }

    #[test]
    fn what_was_shown_is_not_shown_again() {
        assert_eq!(seen("", &["a", "b"]), "ab");
        assert_eq!(seen("abc", &["ab", "cd", "e"]), "de");
        assert_eq!(seen("abc", &["abcde"]), "de");
        assert_eq!(seen("abc", &["a"]), "");
        assert_eq!(seen("abc", &["ax", "bc", "d"]), "", "another story");
        assert_eq!(seen("äö", &["ä", "öü"]), "ü");
    }

    proptest! {
        #[test]
        fn any_retelling_goes_on_where_it_was_left(text in ".{0,20}", at in 0..20_usize, cuts in proptest::collection::vec(0..20_usize, 0..4)) {
            let boundary = |at: usize| text.floor_char_boundary(at.min(text.len()));
            let mut cuts: Vec<_> = cuts.into_iter().map(boundary).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|it| &text[it[0]..it[1]]).filter(|it| !it.is_empty()).collect();
            let at = boundary(at);
            prop_assert_eq!(seen(&text[..at], &pieces), &text[at..]);
        }
    }
}
