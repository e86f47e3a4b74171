//! `…/messages`: append and run, or read the transcript.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::extract::{ApiJson, ApiKey, ApiPage};
use super::prefer::{PREFERENCE_APPLIED, Prefer};
use super::views::{ListView, MessageView, OnDisconnect, PostMessage, ThreadView, TurnView};
use super::{AppState, sse};
use crate::domain::{MessageId, MultitaskStrategy, RunStatus, ThreadActivity, ThreadState};
use crate::error::Error;
use crate::runs::{NewMessage, Outcome};

/// Appends a message, runs the assistant, and answers when the run has ended, or streams what happens, or, if the
/// caller prefers not to wait, tells where to look.
pub(super) async fn create(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    uri: Uri,
    headers: HeaderMap,
    ApiJson(body): ApiJson<PostMessage>,
) -> Result<Response, Error> {
    let stream = body.stream.unwrap_or_else(|| accepts_events(&headers));
    let cancel = CancellationToken::new();
    // Dropped with the answer, or with this handler when the caller leaves before there is one.
    let on_drop = (body.on_disconnect == Some(OnDisconnect::Cancel)).then(|| cancel.clone().drop_guard());
    let message = NewMessage {
        content: body.content.0.try_into().map_err(|error| Error::Invalid(format!("`content`: {error}")))?,
        assistant: body.assistant,
        strategy: body.multitask_strategy.unwrap_or(MultitaskStrategy::Enqueue),
        metadata: body.metadata.unwrap_or_default(),
        timeout: body.timeout_ms.map(Duration::from_millis),
        cancel,
    };
    let submitted = state.runs.submit(key.clone(), message).await?;
    if stream {
        return Ok(sse::follow(&submitted, on_drop, state.server.keep_alive));
    }
    let prefer = Prefer::of(&headers);
    let ended = match prefer.patience() {
        None => Ok(submitted.feed.ended().await),
        Some(wait) => timeout(wait, submitted.feed.ended()).await,
    };
    if let Ok(outcome) = ended {
        return Ok(Json(turn(&*outcome.ok_or(Error::Internal(None))?)?).into_response());
    }
    // The message was taken, so nothing that fails from here on may look as if it was not.
    let (run, message) = state.runs.run(&key, submitted.run.id).await.unwrap_or((submitted.run, None));
    let (thread, activity) = match state.runs.thread(&key).await {
        Ok((thread, activity)) if thread.id == run.thread_id => (thread, activity),
        _ => (submitted.thread, ThreadActivity { state: ThreadState::Active, queue_depth: 0 }),
    };
    let scope = uri.path().strip_suffix("/messages").unwrap_or(uri.path());
    let place = format!("{scope}/runs/{}", run.id);
    // The caller is told where to look: leaving now is no disconnect.
    drop(on_drop.map(DropGuard::disarm));
    let view = TurnView {
        thread: ThreadView::new(thread, activity),
        run: run.into(),
        message: message.map(Into::into),
    };
    let headers = [(header::LOCATION, place), (PREFERENCE_APPLIED, prefer.to_string())];
    Ok((StatusCode::ACCEPTED, headers, Json(view)).into_response())
}

/// The transcript.
pub(super) async fn list(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    ApiPage(page): ApiPage<MessageId>,
) -> Result<Json<ListView<MessageView>>, Error> {
    let page = state.runs.messages(&key, &page).await?;
    Ok(Json(ListView::new(page, |message| message.id.to_string(), MessageView::from)))
}

fn turn(outcome: &Outcome) -> Result<TurnView, Error> {
    let run = &outcome.run;
    match run.status {
        RunStatus::Failed | RunStatus::Expired => {
            Err(Error::RunFailed { run: Box::new(run.clone()), retry_after: outcome.retry_after })
        }
        _ => Ok(TurnView {
            thread: ThreadView::new(outcome.thread.clone(), outcome.activity),
            run: run.clone().into(),
            message: outcome.message.clone().map(Into::into),
        }),
    }
}

fn accepts_events(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|kind| {
            kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
        })
    })
}
