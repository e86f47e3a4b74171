//! Submits a message: checks it, reserves room, spawns the task of its run, and has the store
//! admit it.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::idempotency::repeated;
use super::read::{is_reachable, takes_work};
use super::subscription::{RunSubscription, Submitted};
use super::threads;
use crate::config::AssistantConfig;
use crate::domain::{
    ConversationKey, MessageId, Metadata, MultitaskStrategy, OrphanId, RunId, ThreadId, UserContent,
};
use crate::error::{Error, TooOften};
use crate::locks::{NoPermit, QueueFull, Share, Ticket};
use crate::runs::context::{Context, NO_THREAD};
use crate::runs::execution::queue::Reservation;
use crate::runs::execution::task::{AdmittedRun, Next, run_admitted};
use crate::runs::execution::withdraw::take_back;
use crate::runs::log::event::RunEvent;
use crate::runs::redaction;
use crate::runs::registry::{ActiveRun, Refused};
use crate::store::{Admission, Admitted, Idempotency, InputMessage, NotWritten, RunLease};

/// Most tries to admit a message whose idempotency key the store reports as used, but whose
/// earlier run is not found.
const MAX_REPEATS: u32 = 3;

/// A user's message that asks for a run, or a run that answers the last messages again.
#[derive(Debug)]
pub struct NewMessage {
    /// `None`: the run answers the last messages of the user again.
    pub content: Option<UserContent>,
    /// Name of the assistant; `None`: the default assistant.
    pub assistant: Option<String>,
    /// Whether it came with a user's own token, which may not choose every assistant.
    pub by_user: bool,
    pub strategy: MultitaskStrategy,
    pub metadata: Metadata,
    /// Deadline of the run, counted from its start; `None`: the assistant's timeout, else the
    /// configured one.
    pub timeout: Option<Duration>,
    /// Lifetime of the thread from now on; `None`: unchanged.
    pub ttl: Option<Duration>,
    /// Cancels the run from its admission on; harmless after its end. It does not cancel a queued
    /// run that the message joins, or the earlier run of a repeated message.
    pub cancel: CancellationToken,
    pub idempotency: Option<Idempotency>,
    /// If set, the message is accepted only as a repeat of an earlier one, and refused for this
    /// reason otherwise.
    pub only_repeats: Option<TooOften>,
    /// Share of the memory budget for bodies, held while the content is in memory.
    pub share: Share,
}

/// Admits a message. When this returns, its run is durable: started or queued. The run continues
/// whatever happens to the caller. If this future is dropped, the message may or may not have been
/// admitted.
///
/// A repeated idempotency key with the same request gets the earlier run.
pub(in crate::runs) async fn submit(
    ctx: &Arc<Context>,
    key: ConversationKey,
    mut new: NewMessage,
) -> Result<Submitted, Error> {
    // Without the token, a stop could find no task between this check and the spawn below.
    let _token = ctx.tasks.tracker.token();
    takes_work(ctx)?;
    let (name, assistant) = assistant(ctx, new.assistant.as_deref(), new.by_user)?;
    let run_timeout = new
        .timeout
        .or(assistant.timeout)
        .unwrap_or(ctx.config.runs.timeout);
    if run_timeout.is_zero() || run_timeout > ctx.config.runs.max_timeout {
        let max = ctx.config.runs.max_timeout.as_millis();
        return Err(Error::Invalid(format!(
            "`timeout_ms` must be between 1 and {max}"
        )));
    }
    let refused = ctx
        .upstream(&assistant.upstream)
        .zip(new.content.as_ref())
        .and_then(|(upstream, content)| upstream.refuses(content.parts()));
    if let Some(why) = refused {
        return Err(Error::Invalid(why.to_owned()));
    }
    if new.content.is_none() && new.strategy == MultitaskStrategy::Merge {
        return Err(Error::Invalid(
            "`multitask_strategy`: a run without a message has nothing to merge; choose `enqueue`, `reject`, \
             `interrupt` or `rollback`"
                .to_owned(),
        ));
    }
    let reservation = match reserve(ctx, &key, &mut new, &assistant.upstream) {
        Ok(reservation) => reservation,
        // A repeat gets its earlier answer however busy this replica is.
        Err(refused) => {
            return repeated(ctx, &key, new.idempotency.as_ref())
                .await?
                .ok_or(refused);
        }
    };
    let again = new.content.is_none();
    let admission = Admission {
        new_thread: ThreadId::new(),
        limits: ctx.config.lifetimes.of(&key.scope),
        ttl: new
            .ttl
            .map(|ttl| threads::ttl(ctx, &key, ttl))
            .transpose()?,
        key: key.clone(),
        upstream: assistant.upstream.clone(),
        run_id: RunId::new(),
        assistant: name.to_owned(),
        strategy: new.strategy,
        metadata: new.metadata,
        message: InputMessage {
            id: MessageId::new(),
            content: new.content.map(UserContent::into_parts).unwrap_or_default(),
        },
        again,
        timeout: run_timeout,
        replica: ctx.replica,
        intent: needs_thread(ctx, &assistant.upstream).then(OrphanId::new),
        idempotency: new.idempotency.clone(),
        idempotency_ttl: ctx.config.runs.idempotency_ttl,
    };
    // From here on a task does the work, so that a recorded run continues if the caller
    // disconnects.
    let (answer, answered) = oneshot::channel();
    let active = ctx.registry.begins(admission.run_id, new.cancel);
    let task = run_task(
        Arc::clone(ctx),
        active,
        reservation,
        Arc::new(admission),
        answer,
    );
    ctx.tasks.tracker.spawn(task.in_current_span());
    match answered.await.unwrap_or(Err(Error::Internal(None))) {
        // The store has nothing of this request, so its key means an earlier request or none.
        Err(refused @ (Error::Overloaded | Error::StoreUnavailable(None))) => {
            repeated(ctx, &key, new.idempotency.as_ref())
                .await?
                .ok_or(refused)
        }
        answered => answered,
    }
}

/// Returns the assistant of this name, or the default one, if the caller may choose it. A
/// forbidden assistant gets the same answer as a missing one.
fn assistant<'a>(
    ctx: &'a Context,
    named: Option<&str>,
    by_user: bool,
) -> Result<(&'a str, &'a AssistantConfig), Error> {
    let (assistants, default_assistant) = (&ctx.config.assistants, &ctx.config.default_assistant);
    let name = named.unwrap_or(default_assistant);
    let may_choose = |(name, assistant): &(&String, &AssistantConfig)| {
        !by_user || assistant.user_selectable || *name == default_assistant
    };
    if let Some((name, assistant)) = assistants.get_key_value(name).filter(may_choose) {
        return Ok((name, assistant));
    }
    let known: Vec<_> = assistants
        .iter()
        .filter(may_choose)
        .map(|(name, _)| name.as_str())
        .collect();
    let known = known.join(", ");
    Err(Error::Invalid(format!(
        "there is no assistant of this name; there are: {known}"
    )))
}

/// Returns whether conversations have threads of their own at this upstream.
fn needs_thread(ctx: &Context, upstream: &str) -> bool {
    ctx.upstream(upstream)
        .is_some_and(|upstream| upstream.capabilities().has_threads)
}

/// Reserves the permits, the ticket and the memory that a message needs until its run starts.
///
/// # Errors
/// A limit is reached, the breaker is open, or only a repeat was allowed.
fn reserve(
    ctx: &Context,
    key: &ConversationKey,
    new: &mut NewMessage,
    upstream: &str,
) -> Result<Reservation, Error> {
    if let Some(too_often) = new.only_repeats {
        return Err(too_often.into());
    }
    is_reachable(ctx, upstream)?;
    let tenant_run = ctx
        .tenant_runs
        .take(&key.tenant)
        .map_err(|none| match none {
            NoPermit::Full => Error::Overloaded,
            NoPermit::KeyFull(limit) => Error::TooManyRuns { limit },
        })?;
    let bytes = new.content.as_ref().map_or(0, UserContent::size);
    let queued_bytes = ctx
        .queued_bytes
        .take_many(key, bytes)
        .map_err(|_| match new.strategy {
            MultitaskStrategy::Reject => Error::ThreadBusy,
            _ => Error::QueueBytesFull {
                limit: ctx.config.runs.max_queue_bytes,
            },
        })?;
    let full = |full: QueueFull| Error::QueueFull {
        limit: full.max_waiting,
    };
    let ticket = match new.strategy {
        MultitaskStrategy::Enqueue | MultitaskStrategy::Merge => {
            ctx.queue.join(key.clone()).map_err(full)?
        }
        MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback => {
            ctx.queue.join_next(key.clone()).map_err(full)?
        }
        // Only the store knows whether the thread is idle. The runs in the queue may be on another
        // thread, and an earlier copy of this request may be what keeps the thread busy.
        MultitaskStrategy::Reject => ctx.queue.join(key.clone()).map_err(|_| Error::ThreadBusy)?,
    };
    Ok(Reservation {
        ticket,
        tenant_run,
        queued_bytes,
        memory: mem::take(&mut new.share),
    })
}

/// The task of a message: has the message recorded, answers the caller, and leads the run to its
/// end.
async fn run_task(
    ctx: Arc<Context>,
    active: ActiveRun,
    mut reservation: Reservation,
    admission: Arc<Admission>,
    answer: oneshot::Sender<Result<Submitted, Error>>,
) {
    let span = ctx.span_of(admission.run_id, &admission.key);
    async move {
        match record(&ctx, &mut reservation.ticket, &admission).await {
            Recorded::New(admitted) => {
                reservation.ticket.recorded(admitted.thread.id);
                active.log.push(match admitted.next {
                    Next::Start(_) => RunEvent::Started,
                    Next::Wait { position, .. } => RunEvent::Queued { position },
                });
                let (thread, run) = (admitted.thread.clone(), admitted.run.clone());
                let follow = RunSubscription::live(&ctx, &thread, run.id, active.log.reader());
                // A caller that has disconnected gets no answer; the run continues.
                drop(answer.send(Ok(Submitted {
                    thread,
                    run,
                    follow,
                    replayed: false,
                })));
                drop(admission);
                run_admitted(&ctx, active, reservation, *admitted).await;
            }
            Recorded::Elsewhere(submitted) => {
                drop(reservation.ticket);
                drop(answer.send(Ok(*submitted)));
            }
            Recorded::Refused(error) => drop((answer.send(Err(error)), reservation.ticket)),
            Recorded::Unknown(error) => {
                let refused = Refused::of(&admission);
                ctx.registry.refuse(admission.run_id, refused.clone());
                drop((answer.send(Err(error)), reservation.ticket));
                let lease = RunLease {
                    run_id: admission.run_id,
                    fence: 1,
                };
                take_back(&ctx, active, lease, &refused).await;
            }
        }
    }
    .instrument(span)
    .await;
}

/// The result of the attempt to record a message.
enum Recorded {
    /// Its run is recorded.
    New(Box<AdmittedRun>),
    /// The message joined another run, or repeats an earlier message.
    Elsewhere(Box<Submitted>),
    /// The store has nothing of the message.
    Refused(Error),
    /// The caller gets the error that the message was not recorded, but its run may have been
    /// recorded.
    Unknown(Error),
}

/// Records a message after all earlier messages of its key are recorded.
async fn record(
    ctx: &Arc<Context>,
    ticket: &mut Ticket<ConversationKey, ThreadId>,
    admission: &Arc<Admission>,
) -> Recorded {
    if timeout(ctx.config.admission_timeout, ticket.to_record())
        .await
        .is_err()
    {
        return Recorded::Refused(Error::StoreUnavailable(None));
    }
    let mut admitted = redaction::admit(ctx, admission).await;
    for _ in 0..MAX_REPEATS {
        let Ok(Admitted::Repeated) = admitted else {
            break;
        };
        match repeated(ctx, &admission.key, admission.idempotency.as_ref()).await {
            Ok(Some(earlier)) => return Recorded::Elsewhere(Box::new(earlier)),
            // The key's earlier run has been deleted since.
            Ok(None) => admitted = redaction::admit(ctx, admission).await,
            Err(error) => return Recorded::Refused(error),
        }
    }
    match admitted {
        Ok(Admitted::Started(started)) => Recorded::New(Box::new(AdmittedRun {
            thread: started.thread.clone(),
            run: started.run.clone(),
            next: Next::Start(started),
        })),
        Ok(Admitted::Queued {
            lease,
            thread,
            run,
            position,
        }) => {
            let next = Next::Wait { lease, position };
            Recorded::New(Box::new(AdmittedRun {
                thread: *thread,
                run: *run,
                next,
            }))
        }
        Ok(Admitted::Merged { thread, run }) => {
            let follow = RunSubscription::of(ctx, &thread, run.id);
            let submitted = Submitted {
                thread: *thread,
                run: *run,
                follow,
                replayed: false,
            };
            Recorded::Elsewhere(Box::new(submitted))
        }
        Ok(Admitted::Repeated) => Recorded::Refused(Error::StoreUnavailable(None)),
        Ok(Admitted::NoThread) => Recorded::Refused(NO_THREAD),
        Ok(Admitted::NoMessage) => Recorded::Refused(Error::NothingToRun),
        Ok(Admitted::Busy) => Recorded::Refused(Error::ThreadBusy),
        Ok(Admitted::OtherUpstream(thread)) => {
            let assistant = admission.assistant.clone();
            Recorded::Refused(Error::OtherUpstream { thread, assistant })
        }
        Err(NotWritten::Lost(error)) if admission.strategy == MultitaskStrategy::Merge => {
            Recorded::Unknown(Error::MaybeMerged(error))
        }
        Err(NotWritten::Lost(error)) => Recorded::Unknown(error.into()),
        Err(NotWritten::Unsent(error) | NotWritten::Refused(error)) => {
            Recorded::Refused(error.into())
        }
    }
}
