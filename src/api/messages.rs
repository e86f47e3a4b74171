//! `…/messages`: posts a message, or lists the transcript.

use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use axum::{Extension, Json};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::authorize::OnlyRepeats;
use super::caller::Caller;
use super::extract::{ApiConversation, ApiJson, ApiPage};
use super::openapi::Doc;
use super::problem::{MAYBE_MERGED, NOT_FOUND, QUEUE_FULL, THREAD_BUSY, TOO_MANY_RUNS};
use super::run_response::{Asked, ResponseMode, answer, answer_doc};
use super::state::AppState;
use super::views::{ListView, MessageView, OnDisconnect, PostMessage, PostRun};
use crate::domain::{
    ContentPart, ConversationKey, InvalidContent, InvalidMetadata, MessageId, Metadata,
    MultitaskStrategy, Principal, UserContent,
};
use crate::error::Error;
use crate::locks::Share;
use crate::runs::{FIRST_EVENT, NewMessage};
use crate::store::{Idempotency, ThreadName};

pub(super) fn create_doc() -> Doc {
    let doc = Doc::new("messages", "create_message", "Appends a message and runs the assistant.")
        .about(
            "Answers when the run has ended or asks for function calls. With `stream`, answers with the \
             events of the run. With `prefer`, answers earlier and names the path of the run. The first \
             message of a key creates its thread.",
        )
        .body::<PostMessage>();
    answer_doc(doc).refuses(&[THREAD_BUSY, QUEUE_FULL, TOO_MANY_RUNS, MAYBE_MERGED])
}

/// Appends a message, runs the assistant, and answers in one of the three forms of [`answer`].
pub(super) async fn create(
    State(state): State<AppState>,
    Caller(caller): Caller,
    only_repeats: Option<Extension<OnlyRepeats>>,
    ApiConversation(key): ApiConversation,
    asked: Asked,
    ApiJson(body, idempotency, share): ApiJson<PostMessage>,
) -> Result<Response, Error> {
    let new = NewRun {
        content: Some(content_within(&state, body.content.0)?),
        options: PostRun {
            assistant: body.assistant,
            multitask_strategy: body.multitask_strategy,
            stream: body.stream,
            on_disconnect: body.on_disconnect,
            metadata: body.metadata,
            timeout_ms: body.timeout_ms,
            ttl_ms: body.ttl_ms,
        },
        only_repeats,
        idempotency,
        share,
    };
    submit(&state, &caller, key, &asked, new).await
}

/// A run that a request asks for.
pub(super) struct NewRun {
    /// `None`: the run answers the last messages of the user again.
    pub(super) content: Option<UserContent>,
    pub(super) options: PostRun,
    pub(super) only_repeats: Option<Extension<OnlyRepeats>>,
    pub(super) idempotency: Option<Idempotency>,
    pub(super) share: Share,
}

/// Submits a run, and answers in one of the three forms of [`answer`].
pub(super) async fn submit(
    state: &AppState,
    caller: &Principal,
    key: ConversationKey,
    asked: &Asked,
    new: NewRun,
) -> Result<Response, Error> {
    let options = new.options;
    let cancel = CancellationToken::new();
    // Dropped with the answer, or with this future if the caller leaves before there is an answer.
    let on_drop =
        (options.on_disconnect == Some(OnDisconnect::Cancel)).then(|| cancel.clone().drop_guard());
    let metadata = metadata_within(state, options.metadata)?;
    let message = NewMessage {
        content: new.content,
        assistant: options.assistant,
        by_user: caller.user.is_some(),
        strategy: options
            .multitask_strategy
            .unwrap_or(MultitaskStrategy::Enqueue),
        metadata: metadata.unwrap_or_default(),
        timeout: options.timeout_ms.map(Duration::from_millis),
        ttl: options.ttl_ms.map(Duration::from_millis),
        cancel,
        idempotency: new.idempotency,
        only_repeats: new.only_repeats.map(|Extension(OnlyRepeats(why))| why),
        share: new.share,
    };
    let submitted = state.runs.submit(key.clone(), message).await?;
    let form = ResponseMode {
        stream: options.stream,
        asked,
        reader: caller.reader(),
        on_drop,
    };
    answer(state, &key, submitted, FIRST_EVENT, form).await
}

#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Archived {
    /// `true`: also the messages of the threads before the current one.
    #[serde(default)]
    archived: bool,
}

pub(super) fn list_doc() -> Doc {
    Doc::new("messages", "list_messages", "Lists the transcript.")
        .about(
            "A page ends before `limit`, with `has_more`, when its messages have 4 MiB of content.",
        )
        .page::<MessageId>()
        .query::<Archived>()
        .lists::<MessageView>("A page of messages.")
        .refuses(&[NOT_FOUND])
}

/// Lists the transcript.
pub(super) async fn list(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiConversation(key): ApiConversation,
    ApiPage(page, Archived { archived }): ApiPage<MessageId, Archived>,
) -> Result<Json<ListView<MessageView>>, Error> {
    let page = state
        .runs
        .messages(ThreadName::Newest(&key), archived, &page)
        .await?;
    Ok(Json(ListView::new(
        page,
        |message| message.id.to_string(),
        |message| MessageView::new(message, caller.reader()),
    )))
}

/// Checks content against the settings and the rules of the domain.
fn content_within(state: &AppState, parts: Vec<ContentPart>) -> Result<UserContent, Error> {
    let limit = state.server.max_content_parts;
    let content = if parts.len() > limit {
        Err(InvalidContent::TooManyParts {
            limit,
            parts: parts.len(),
        })
    } else {
        parts.try_into()
    };
    content.map_err(|error| Error::Invalid(format!("`content`: {error}")))
}

/// Checks metadata against the settings.
pub(super) fn metadata_within(
    state: &AppState,
    metadata: Option<Metadata>,
) -> Result<Option<Metadata>, Error> {
    let limit = state.server.max_metadata_pairs;
    let pairs = metadata.iter().flat_map(Metadata::iter).count();
    if pairs > limit {
        let error = InvalidMetadata::TooManyPairs { limit, pairs };
        return Err(Error::Invalid(format!("`metadata`: {error}")));
    }
    Ok(metadata)
}
