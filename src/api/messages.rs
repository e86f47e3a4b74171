//! `…/messages`: append and run, or read the transcript.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use axum::response::Response;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::AppState;
use super::extract::{ApiConversation, ApiJson, ApiPage};
use super::turn::{Form, answer};
use super::views::{ListView, MessageView, OnDisconnect, PostMessage};
use crate::domain::{MessageId, MultitaskStrategy};
use crate::error::Error;
use crate::runs::NewMessage;
use crate::store::ThreadName;

/// Appends a message, runs the assistant, and answers when the run has ended or asks for function calls, or streams what
/// happens, or, if the caller prefers not to wait, tells where to look.
pub(super) async fn create(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    uri: Uri,
    headers: HeaderMap,
    ApiJson(body, idempotency): ApiJson<PostMessage>,
) -> Result<Response, Error> {
    let cancel = CancellationToken::new();
    // Dropped with the answer, or with this handler when the caller leaves before there is one.
    let on_drop = (body.on_disconnect == Some(OnDisconnect::Cancel)).then(|| cancel.clone().drop_guard());
    let message = NewMessage {
        content: body.content.0.try_into().map_err(|error| Error::Invalid(format!("`content`: {error}")))?,
        assistant: body.assistant,
        strategy: body.multitask_strategy.unwrap_or(MultitaskStrategy::Enqueue),
        metadata: body.metadata.unwrap_or_default(),
        timeout: body.timeout_ms.map(Duration::from_millis),
        ttl: body.ttl_ms.map(Duration::from_millis),
        cancel,
        idempotency,
    };
    let submitted = state.runs.submit(key.clone(), message).await?;
    let form = Form { stream: body.stream, headers: &headers, uri: &uri, on_drop };
    answer(&state, &key, submitted, 0, form).await
}

/// Whether the threads before the key's current one are wanted, too.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Archived {
    #[serde(default)]
    archived: bool,
}

/// The transcript.
pub(super) async fn list(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiPage(page, Archived { archived }): ApiPage<MessageId, Archived>,
) -> Result<Json<ListView<MessageView>>, Error> {
    let page = state.runs.messages(ThreadName::Newest(&key), archived, &page).await?;
    Ok(Json(ListView::new(page, |message| message.id.to_string(), MessageView::from)))
}
