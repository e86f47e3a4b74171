//! Reads threads, messages and runs, and the state of this replica.

use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use tokio::time::Instant;

use crate::domain::{
    ConversationKey, Message, MessageId, Page, PageRequest, Reader, Run, RunId, TenantKey, Thread,
    ThreadActivity, ThreadId, UserKey,
};
use crate::error::Error;
use crate::export_import;
use crate::runs::context::{Context, NO_THREAD};
use crate::store::{StoreError, ThreadFilter, ThreadName, ThreadReport};

/// Time for which the store counts as ready after a check.
const READY_FOR: Duration = Duration::from_secs(1);

/// How much this process works on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Load {
    /// Runs with a task in this process.
    pub runs: usize,
    /// Conversations with a run in this process's queue.
    pub queues: usize,
}

/// Returns a thread and what it is doing.
pub(in crate::runs) async fn thread(
    ctx: &Context,
    name: ThreadName<'_>,
) -> Result<ThreadReport, Error> {
    let mut report = ctx.store.report(name).await?.ok_or(NO_THREAD)?;
    if let Some(run) = &mut report.last_run {
        ctx.registry.give_arguments(run);
    }
    Ok(report)
}

/// Returns a page of threads, by age.
pub(in crate::runs) async fn threads(
    ctx: &Context,
    filter: &ThreadFilter,
    page: &PageRequest<ThreadId>,
) -> Result<Page<(Thread, ThreadActivity)>, Error> {
    Ok(ctx.store.threads(filter, page).await?)
}

/// Streams everything that the store keeps of a user, as lines of text.
pub(in crate::runs) fn export(
    ctx: &Context,
    tenant: TenantKey,
    user: UserKey,
    reader: Reader,
) -> impl Stream<Item = Result<String, StoreError>> + Send + use<> {
    export_import::export(
        Arc::clone(&ctx.store),
        export_import::What::User(tenant, user),
        reader,
    )
}

/// Returns a page of a thread's transcript or, with `across`, of the transcripts of all threads
/// that its key has and had.
pub(in crate::runs) async fn messages(
    ctx: &Context,
    name: ThreadName<'_>,
    across: bool,
    page: &PageRequest<MessageId>,
) -> Result<Page<Message>, Error> {
    ctx.store
        .messages(name, across, page)
        .await?
        .ok_or(NO_THREAD)
}

/// Returns a page of the current thread's runs.
pub(in crate::runs) async fn runs(
    ctx: &Context,
    key: &ConversationKey,
    page: &PageRequest<RunId>,
) -> Result<Page<Run>, Error> {
    let mut page = ctx.store.runs(key, page).await?.ok_or(NO_THREAD)?;
    for run in &mut page.data {
        ctx.registry.give_arguments(run);
    }
    Ok(page)
}

/// Returns a run and its reply, if it has one.
pub(in crate::runs) async fn run(
    ctx: &Context,
    key: &ConversationKey,
    id: RunId,
) -> Result<(Run, Option<Message>), Error> {
    let found = ctx.store.run(key, id).await?;
    let (mut run, message) = found.ok_or(Error::NotFound("this conversation has no such run"))?;
    ctx.registry.give_arguments(&mut run);
    Ok((run, message))
}

/// Returns how much this process works on.
pub(in crate::runs) fn load(ctx: &Context) -> Load {
    Load {
        runs: ctx.tasks.tracker.len(),
        queues: ctx.queue.len(),
    }
}

/// Checks that this replica takes new work.
pub(in crate::runs) fn takes_work(ctx: &Context) -> Result<(), Error> {
    if ctx.tasks.draining.is_cancelled() {
        return Err(Error::Draining);
    }
    if ctx.registry.has_lapsed() {
        return Err(Error::StoreUnavailable(None));
    }
    Ok(())
}

/// Checks that the breaker of this upstream lets requests pass.
pub(in crate::runs) fn is_reachable(ctx: &Context, upstream: &str) -> Result<(), Error> {
    match ctx.breaker(upstream).map(|breaker| breaker.check()) {
        Some(Err(retry_after)) => Err(Error::UpstreamUnavailable { retry_after }),
        _ => Ok(()),
    }
}

/// Checks that this replica takes new runs, and that its store works, or worked a second ago.
pub(in crate::runs) async fn ready(ctx: &Context) -> Result<(), Error> {
    takes_work(ctx)?;
    let mut seen = ctx.seen_ready.lock().await;
    if seen.is_none_or(|seen| seen.elapsed() > READY_FOR) {
        *seen = None;
        ctx.store.ready().await?;
        *seen = Some(Instant::now());
    }
    Ok(())
}
