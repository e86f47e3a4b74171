//! Prepares an upstream thread for a message: settles an earlier run's traces, makes sure that the
//! thread exists, and collects the unsynced messages.

use std::sync::Arc;

use super::create_thread::ThreadCreation;
use super::failure::{Failure, may_send};
use super::history::{
    History, MAX_BYTES, MAX_MESSAGES, PAGE, Room, count_users, newest, with_content,
};
use super::progress::Progress;
use super::round_context::RoundContext;
use super::settle::{Removal, take_away};
use super::store_retry::{retry_until_ok, write_until_ok};
use crate::domain::{Thread, UpstreamSync};
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
}

/// Settles an earlier run's traces in the thread, and collects the messages that the thread lacks.
pub(in crate::runs) async fn prepare(
    round: &RoundContext<'_>,
    progress: &mut Progress,
) -> Result<Prepared, Failure> {
    if !settle_earlier(round).await? {
        return rebuild(round, progress).await;
    }
    let needs_thread = progress.thread.is_none();
    let thread = &round.started.thread;
    if needs_thread && thread.carried > 0 {
        let history = history_before(round).await?;
        return Ok(Prepared {
            history,
            needs_thread,
            is_rebuilt: true,
        });
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
    })
}

/// Settles an earlier run's traces once more, after the upstream reported that something holds the
/// thread. They may have arrived since the last look, with the history that was sent with them.
pub(in crate::runs) async fn prepare_again(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    prepared: Prepared,
) -> Result<Prepared, Failure> {
    if settle_earlier(round).await? {
        Ok(Prepared {
            history: unsynced_messages(round).await?,
            ..prepared
        })
    } else {
        rebuild(round, progress).await
    }
}

/// Gives the upstream thread up for a new one, which is made from the transcript.
pub(in crate::runs) async fn rebuild(
    round: &RoundContext<'_>,
    progress: &mut Progress,
) -> Result<Prepared, Failure> {
    let history = history_before(round).await?;
    tracing::warn!(
        messages = history.messages.len(),
        "the upstream thread is gone or broken; making a new one from the transcript"
    );
    progress.thread = None;
    Ok(Prepared {
        history,
        needs_thread: true,
        is_rebuilt: true,
    })
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
    if round.upstream.capabilities().has_threads {
        let seed = prepared.is_rebuilt.then_some(&prepared.history);
        create_thread(round, progress, owner, seed).await?;
        if prepared.is_rebuilt {
            // The new thread has the history from its beginning.
            prepared.history = History::default();
        }
    } else {
        // Where threads are chains of responses, the first run makes the thread.
        progress.thread = None;
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

/// Returns the first messages of a new upstream thread: those carried over from the previous
/// thread, and the transcript up to this run, without messages that the model must not know.
/// Withholds for good those for which there is no room.
async fn history_before(round: &RoundContext<'_>) -> Result<History, Failure> {
    let (store, run) = (&*round.ctx.store, round.started.run.id);
    let Thread { id, carried, .. } = round.started.thread;
    let mut room = Room::default();
    let mut own = newest(&mut room, |before| {
        retry_until_ok(move || store.earlier(run, before, PAGE))
    })
    .await?;
    if own.iter().any(|message| message.content.is_empty()) {
        return nothing_before(round).await;
    }
    let before = own.first().map(|message| message.position);
    let mut messages = Vec::new();
    if carried > 0 {
        messages = newest(&mut room, |before| {
            retry_until_ok(move || store.carried(id, before, PAGE))
        })
        .await?;
    }
    if room.is_full {
        let carried = Some(u32::try_from(messages.len()).unwrap_or(u32::MAX));
        withhold(
            round,
            &Withholding {
                before,
                missing_only: false,
                carried,
            },
        )
        .await?;
    }
    messages = with_content(messages);
    let carried_users = count_users(&messages);
    messages.append(&mut own);
    Ok(History {
        messages: Arc::new(messages),
        carried_users,
    })
}

/// Withholds all earlier messages. If the store lacks some content, a new upstream thread begins
/// empty, because a conversation with gaps has another meaning.
async fn nothing_before(round: &RoundContext<'_>) -> Result<History, Failure> {
    let all = Withholding {
        carried: Some(0),
        ..Withholding::default()
    };
    write_until_ok(|| round.ctx.store.withhold_earlier(&round.started.lease, &all)).await?;
    Ok(History::default())
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

async fn create_thread(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    owner: &Ownership,
    seed: Option<&History>,
) -> Result<(), Failure> {
    let RoundContext { ctx, started, .. } = round;
    let Some(upstream) = ctx.upstream(&started.thread.upstream) else {
        return Err(Failure::NotConfigured);
    };
    may_send(&ctx.registry)?;
    let creation = ThreadCreation {
        store: Arc::clone(&ctx.store),
        upstream: Arc::clone(upstream),
        lease: started.lease,
        owner: owner.clone(),
        intent: progress.intent.take(),
        seed: seed.map(|seed| (Arc::clone(&seed.messages), seed.carried_users)),
    };
    progress.thread = Some(creation.run(&ctx.tasks.tracker).await?);
    Ok(())
}
