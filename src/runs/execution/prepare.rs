//! Prepares an upstream thread for a message: settles an earlier run's traces, makes sure that the
//! thread exists, and collects the unsynced messages.

use std::sync::Arc;

use super::create_thread::{Seed, ThreadCreation};
use super::failure::{Failure, may_send};
use super::history::{
    Excerpt, History, MAX_BYTES, MAX_MESSAGES, PAGE, Past, Room, newest, with_content,
};
use super::progress::Progress;
use super::rerun::needs_no_input;
use super::round_context::RoundContext;
use super::settle::{Removal, take_away};
use super::store_retry::{retry_until_ok, write_until_ok};
use super::trial;
use crate::domain::{
    HistoryKept, Recovery, RecoveryCause, Rerun, RunRecovery, Thread, UpstreamSync,
};
use crate::store::Withholding;
use crate::upstream::{Ownership, UpstreamError};

/// The state of an upstream thread before a message is sent to it.
pub(in crate::runs) struct Prepared {
    /// The messages to send before the run's own message.
    pub(in crate::runs) history: History,
    /// Whether the thread must be made first.
    pub(in crate::runs) needs_thread: bool,
    /// Whether the thread is made from the transcript, so that it lacks nothing.
    pub(in crate::runs) is_rebuilt: bool,
    /// Whether the thread had no upstream thread before this run. So it lacks nothing but what
    /// comes with the run.
    pub(in crate::runs) is_new: bool,
    /// How the run recovers from a refusal. The new thread replaces the old one once the upstream
    /// has answered.
    pub(in crate::runs) recovery: Option<RunRecovery>,
}

/// Settles an earlier run's traces in the thread, and collects the messages that the thread lacks.
pub(in crate::runs) async fn prepare(
    round: &RoundContext<'_>,
    progress: &mut Progress,
) -> Result<Prepared, Failure> {
    if !settle_earlier(round).await? {
        return rebuild_unsettled(round).await;
    }
    if let Some(rebuilt) = without_messages(round).await? {
        return Ok(rebuilt);
    }
    let needs_thread = progress.thread.is_none();
    let thread = &round.started.thread;
    if needs_thread && thread.carried > 0 {
        let past = past_of(round).await?;
        return Ok(Prepared::rebuilt(past, HistoryKept::All, None));
    }
    let lacks_some = thread.unsynced_messages > 0 || thread.unsettled_run.is_some();
    let history = if lacks_some {
        unsynced_messages(round).await?
    } else {
        History::default()
    };
    Ok(Prepared {
        history,
        needs_thread,
        is_rebuilt: false,
        is_new: needs_thread,
        recovery: None,
    })
}

/// Settles an earlier run's traces once more, after the upstream reported that something holds the
/// thread. They may have arrived since the last look, with the history that was sent with them.
pub(in crate::runs) async fn prepare_again(
    round: &RoundContext<'_>,
    prepared: Prepared,
) -> Result<Prepared, Failure> {
    if settle_earlier(round).await? {
        Ok(Prepared {
            history: unsynced_messages(round).await?,
            ..prepared
        })
    } else {
        rebuild_unsettled(round).await
    }
}

/// Prepares a new upstream thread that ends before the messages of a run that answers them again,
/// if the present one has them and cannot run without an input, or has a reply to them already.
async fn without_messages(round: &RoundContext<'_>) -> Result<Option<Prepared>, Failure> {
    let is_upstream = round.started.run.rerun.is_some_and(Rerun::is_upstream);
    if !is_upstream || needs_no_input(round) {
        return Ok(None);
    }
    let past = past_of(round).await?;
    Ok(Some(Prepared::rebuilt(past, HistoryKept::All, None)))
}

/// Prepares a new upstream thread in the place of one whose state cannot be known.
async fn rebuild_unsettled(round: &RoundContext<'_>) -> Result<Prepared, Failure> {
    let past = past_of(round).await?;
    let cause = RecoveryCause::ThreadRefused;
    Ok(Prepared::rebuilt(past, HistoryKept::All, Some(cause)))
}

impl Prepared {
    /// Prepares a new upstream thread that begins with a part of the conversation. `cause`: why
    /// the upstream thread is replaced; `None` if there is none yet.
    pub(in crate::runs) fn rebuilt(
        past: Past,
        kept: HistoryKept,
        cause: Option<RecoveryCause>,
    ) -> Self {
        let Excerpt {
            history,
            omitted,
            messages_left_out,
            parts_replaced,
        } = past.excerpt(kept);
        let recovery = RunRecovery {
            recovery: cause.map(|cause| Recovery {
                cause,
                history: kept,
                messages_left_out,
                parts_replaced,
            }),
            answered: false,
            trial: None,
            omitted,
        };
        Self {
            history,
            needs_thread: true,
            is_rebuilt: true,
            is_new: true,
            recovery: Some(recovery),
        }
    }
}

/// Makes the upstream thread if necessary, and records it before it is used.
pub(in crate::runs) async fn ensure_thread(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    owner: &Ownership,
    prepared: &mut Prepared,
) -> Result<(), Failure> {
    if !prepared.needs_thread {
        return Ok(());
    }
    let recovery = prepared.recovery.clone();
    if round.upstream.capabilities().has_threads {
        create_thread(round, progress, owner, prepared).await?;
        if prepared.is_rebuilt {
            // The new thread has the history from its beginning.
            prepared.history = History::default();
        }
    } else {
        // Where threads are chains of responses, the first run makes the thread.
        progress.thread = None;
        if let Some(recovery) = recovery {
            trial::begin(round.ctx, round.started, progress, recovery).await?;
        }
    }
    prepared.needs_thread = false;
    Ok(())
}

/// Settles an earlier run's traces before anything is sent: removes them at the upstream, so that
/// this run sends what the transcript has of them. Returns `false` if the thread's state cannot be
/// known.
async fn settle_earlier(round: &RoundContext<'_>) -> Result<bool, Failure> {
    let RoundContext { ctx, started, .. } = round;
    let Some(left) = &started.thread.unsettled_run else {
        return Ok(true);
    };
    let was_there =
        match take_away(ctx, &started.lease, round.upstream, left, Removal::IfSaid).await {
            Err(Failure::Upstream(UpstreamError::Protocol(_))) => return Ok(false),
            was_there => was_there?,
        };
    let reached_the_model = left.upstream_run.is_some() || was_there.said;
    let found = if reached_the_model {
        UpstreamSync::Missing
    } else {
        UpstreamSync::Withheld
    };
    write_until_ok(|| ctx.store.record_settlement(&started.lease, left.run, found)).await?;
    Ok(true)
}

/// Returns the unsynced messages. Withholds for good those for which there is no room.
async fn unsynced_messages(round: &RoundContext<'_>) -> Result<History, Failure> {
    let (store, run) = (&*round.ctx.store, round.started.run.id);
    let mut room = Room::default();
    let unsynced_messages = newest(&mut room, |before| {
        retry_until_ok(move || store.unsynced_messages(run, before, PAGE))
    })
    .await?;
    if room.is_full {
        let before = unsynced_messages.first().map(|message| message.position);
        withhold(
            round,
            &Withholding {
                before,
                missing_only: true,
                carried: None,
            },
        )
        .await?;
    }
    Ok(History {
        messages: Arc::new(with_content(unsynced_messages)),
        carried_users: 0,
    })
}

/// Returns the conversation before this run: the messages carried over from the previous thread,
/// and the transcript, without messages that the model must not know.
pub(in crate::runs) async fn past_of(round: &RoundContext<'_>) -> Result<Past, Failure> {
    let (store, run) = (&*round.ctx.store, round.started.run.id);
    let Thread { id, carried, .. } = round.started.thread;
    let mut room = Room::default();
    let mut own = newest(&mut room, |before| {
        retry_until_ok(move || store.earlier(run, before, PAGE))
    })
    .await?;
    // If the store lacks some content, a new upstream thread begins empty, because a conversation
    // with gaps has another meaning.
    if own.iter().any(|message| message.content.is_empty()) {
        return Ok(Past {
            lost: u32::try_from(own.len()).unwrap_or(u32::MAX),
            ..Past::default()
        });
    }
    let mut messages = Vec::new();
    if carried > 0 {
        room = room.for_carried(round.ctx.config.threads.carry_over_tokens);
        messages = newest(&mut room, |before| {
            retry_until_ok(move || store.carried(id, before, PAGE))
        })
        .await?;
    }
    messages = with_content(messages);
    let carried = messages.len();
    messages.append(&mut own);
    Ok(Past {
        messages,
        carried,
        lost: u32::from(room.is_full),
    })
}

/// Withholds the oldest messages of a thread that is too long.
async fn withhold(round: &RoundContext<'_>, what: &Withholding) -> Result<(), Failure> {
    tracing::warn!(
        thread.id = %round.started.thread.id,
        first_position = what.before,
        max_messages = MAX_MESSAGES,
        max_bytes = MAX_BYTES,
        "the thread is too long for the upstream; its older messages are withheld from the model"
    );
    write_until_ok(|| round.ctx.store.withhold_earlier(&round.started.lease, what)).await
}

/// Creates an upstream thread. One that replaces another, or that may replace one, is on trial
/// until the upstream has answered.
async fn create_thread(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    owner: &Ownership,
    prepared: &Prepared,
) -> Result<(), Failure> {
    let RoundContext { ctx, started, .. } = round;
    let Some(upstream) = ctx.upstream(&started.thread.upstream) else {
        return Err(Failure::NotConfigured);
    };
    may_send(&ctx.registry)?;
    let History {
        messages,
        carried_users,
    } = prepared.history.clone();
    let creation = ThreadCreation {
        store: Arc::clone(&ctx.store),
        upstream: Arc::clone(upstream),
        lease: started.lease,
        owner: owner.clone(),
        intent: progress.intent.take(),
        seed: Seed {
            messages: if prepared.is_rebuilt {
                messages
            } else {
                Arc::default()
            },
            carried_users,
        },
        recovery: prepared.recovery.clone(),
    };
    let (thread, recovery) = creation.run(&ctx.tasks.tracker).await?;
    progress.thread = Some(thread);
    if let Some(recovery) = recovery {
        progress.recovery = Some(recovery);
    }
    Ok(())
}
