//! The three forms of an answer about a run:
//! - JSON, when the run has ended or asks for function calls
//! - a stream of events
//! - a 202 with the path of the run

use std::convert::Infallible;

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tokio::time::timeout;
use tokio_util::sync::DropGuard;

use super::forwarded::Prefix;
use super::openapi::Doc;
use super::prefer::{PREFERENCE_APPLIED, Prefer, REPLAYED};
use super::problem::{
    CONTENT_REFUSED, CONTEXT_FULL, DRAINING, MESSAGE_REFUSED, NOT_FOUND, REPLICA_LOST,
    TOO_MANY_READERS, UPSTREAM_ERROR, UPSTREAM_RATE_LIMITED, UPSTREAM_TIMEOUT,
};
use super::sse;
use super::sse::EventView;
use super::state::AppState;
use super::views::{MessageView, RunResponse, ThreadView};
use crate::domain::{ConversationKey, Reader, RunStatus, ThreadActivity, ThreadState};
use crate::error::Error;
use crate::runs::{Answer, DELETED, EventOffset, Outcome, Runs, Submitted};
use crate::store::ThreadName;

/// The parts of a request that decide the form of its answer.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) headers: HeaderMap,
    uri: Uri,
    prefix: Prefix,
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let prefix = Prefix::from_request_parts(parts, state).await?;
        Ok(Self {
            headers: parts.headers.clone(),
            uri: parts.uri.clone(),
            prefix,
        })
    }
}

/// The form that a caller chose.
pub(super) struct ResponseMode<'a> {
    pub(super) stream: Option<bool>,
    pub(super) asked: &'a Asked,
    pub(super) reader: Reader,
    /// Cancels the run when it is dropped.
    pub(super) on_drop: Option<DropGuard>,
}

/// Describes the three forms for `/openapi.json`.
pub(super) fn answer_doc(doc: Doc) -> Doc {
    doc.prefer()
        .idempotent()
        .gives::<RunResponse>(StatusCode::OK, "The run has ended, or asks for function calls.")
        .streams::<EventView>(
            "text/event-stream",
            "With `stream`, or if `Accept` prefers it: the events until then. The schema shows the fields \
             of one event, with `data` parsed as JSON.",
        )
        .gives::<RunResponse>(
            StatusCode::ACCEPTED,
            "The run goes on: the caller's `prefer` allows no longer wait, or this replica stops.",
        )
        .with(StatusCode::OK, &[&REPLAYED])
        .with(StatusCode::ACCEPTED, &[&REPLAYED, &header::LOCATION, &PREFERENCE_APPLIED])
        .refuses(&[
            NOT_FOUND,
            CONTENT_REFUSED,
            MESSAGE_REFUSED,
            CONTEXT_FULL,
            UPSTREAM_ERROR,
            UPSTREAM_RATE_LIMITED,
            UPSTREAM_TIMEOUT,
            DRAINING,
            REPLICA_LOST,
            TOO_MANY_READERS,
        ])
}

/// Answers a request about a run, in the form that the caller chose. A stream begins with the event
/// `from`.
pub(super) async fn answer(
    state: &AppState,
    key: &ConversationKey,
    submitted: Submitted,
    from: EventOffset,
    form: ResponseMode<'_>,
) -> Result<Response, Error> {
    let replayed = submitted.replayed;
    let response = if form
        .stream
        .unwrap_or_else(|| accepts_events(&form.asked.headers))
    {
        // An error here is "too many readers", which is not an answer about the run: no `REPLAYED`.
        Ok(streamed(state, submitted, from, form)?)
    } else {
        as_json(state, key, submitted, from, form).await
    };
    if !replayed {
        return response;
    }
    // A repeated request gets the same failure again, also with this header.
    let mut response = response.into_response();
    response
        .headers_mut()
        .insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

fn streamed(
    state: &AppState,
    submitted: Submitted,
    from: EventOffset,
    ResponseMode {
        asked,
        reader,
        on_drop,
        ..
    }: ResponseMode<'_>,
) -> Result<Response, Error> {
    let Submitted {
        run,
        follow,
        replayed,
        ..
    } = submitted;
    let seat = match state.readers.take(&run.id) {
        // The first request for a run always gets its stream. Only repeats are limited.
        Err(_) if replayed => {
            return Err(Error::TooManyReaders {
                limit: state.server.max_readers_per_run.get(),
            });
        }
        seat => seat.ok(),
    };
    let keep_alive = state.server.stream_keep_alive;
    Ok(sse::until_answered(
        &run,
        &scope_of(&asked.prefix, &asked.uri),
        follow,
        from,
        reader,
        (on_drop, seat),
        keep_alive,
    ))
}

async fn as_json(
    state: &AppState,
    key: &ConversationKey,
    submitted: Submitted,
    from: EventOffset,
    form: ResponseMode<'_>,
) -> Result<Response, Error> {
    let ResponseMode {
        asked,
        reader,
        on_drop,
        ..
    } = form;
    let prefer = Prefer::of(&asked.headers);
    let waits = submitted.follow.answer(from);
    let answered = match prefer.patience() {
        None => Some(waits.await),
        Some(wait) => timeout(wait, waits).await.ok(),
    };
    if answered.as_ref().is_some_and(Option::is_none) && !state.runs.is_draining() {
        return Err(DELETED);
    }
    if let Some(answered) = answered.flatten() {
        // The caller has its answer, so closing the connection must not cancel the run.
        drop(on_drop.map(DropGuard::disarm));
        return Ok(Json(turn(&state.runs, &answered, reader)?).into_response());
    }
    // The gateway accepted the message, so no later failure may look like a refusal.
    let (run, message) = state
        .runs
        .run(key, submitted.run.id)
        .await
        .unwrap_or((submitted.run, None));
    let (thread, activity) = match state
        .runs
        .thread(ThreadName::Id(&key.tenant, run.thread_id))
        .await
    {
        Ok(report) => (report.thread, report.activity),
        Err(_) => (
            submitted.thread,
            ThreadActivity {
                state: ThreadState::Active,
                queue_depth: 0,
            },
        ),
    };
    let place = format!("{}/runs/{}", scope_of(&asked.prefix, &asked.uri), run.id);
    // The caller gets the path of the run, so closing the connection must not cancel the run.
    drop(on_drop.map(DropGuard::disarm));
    let view = RunResponse {
        thread: ThreadView::new(&state.runs, thread, activity),
        run: run.into(),
        message: message.map(|message| MessageView::new(message, reader)),
    };
    let mut response = (
        StatusCode::ACCEPTED,
        [(header::LOCATION, place)],
        Json(view),
    )
        .into_response();
    // Without a preference the reason for the 202 is that this process stops.
    if let Some(applied) = prefer
        .patience()
        .and_then(|_| HeaderValue::from_str(&prefer.to_string()).ok())
    {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    Ok(response)
}

fn turn(runs: &Runs, answered: &Answer, reader: Reader) -> Result<RunResponse, Error> {
    let outcome = match answered {
        Answer::Ended(outcome) => outcome,
        Answer::RequiresAction(waiting) => {
            return Ok(RunResponse {
                thread: ThreadView::new(runs, waiting.thread.clone(), waiting.activity),
                run: waiting.run.clone().into(),
                message: None,
            });
        }
    };
    let Outcome {
        thread,
        activity,
        run,
        message,
        retry_after,
    } = &**outcome;
    match run.status {
        RunStatus::Failed | RunStatus::Expired => Err(Error::RunFailed {
            run: Box::new(run.clone()),
            retry_after: *retry_after,
        }),
        _ => Ok(RunResponse {
            thread: ThreadView::new(runs, thread.clone(), *activity),
            run: run.clone().into(),
            message: message
                .clone()
                .map(|message| MessageView::new(message, reader)),
        }),
    }
}

/// Returns the path of the conversation as the caller wrote it: the part before `/messages` or
/// `/runs/{run}/…`.
pub(super) fn scope_of(prefix: &Prefix, uri: &Uri) -> String {
    let path = uri.path();
    let scope = path.strip_suffix("/messages").unwrap_or_else(|| {
        let up = |path: &str| path.rfind('/').map_or(0, |at| at);
        // …/runs/{run}/tool_outputs, …/runs/{run}/events
        let mut end = path.len();
        for _ in 0..3 {
            end = up(&path[..end]);
        }
        &path[..end]
    });
    format!("{}{scope}", prefix.0)
}

/// Returns whether `Accept` prefers a stream to JSON (RFC 9110): it names the type, and gives JSON no
/// higher weight. Ignores entries that it cannot read.
fn accepts_events(headers: &HeaderMap) -> bool {
    let ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let ranges = ranges
        .flat_map(|value| value.split(','))
        .filter_map(weighted)
        .collect::<Vec<_>>();
    let weight_of = |kind: &str| {
        let weights = ranges
            .iter()
            .filter(|(range, _)| range.eq_ignore_ascii_case(kind));
        weights.map(|(_, weight)| *weight).max()
    };
    let json = ["application/json", "application/*", "*/*"]
        .into_iter()
        .find_map(weight_of);
    weight_of("text/event-stream").is_some_and(|events| events > 0 && events >= json.unwrap_or(0))
}

/// Reads a media range and its weight in thousandths.
fn weighted(range: &str) -> Option<(&str, u16)> {
    let mut parts = range.split(';').map(str::trim);
    let kind = parts.next().filter(|kind| kind.contains('/'))?;
    let mut weight = 1000;
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        if name.eq_ignore_ascii_case("q") {
            weight = thousandths(value)?;
        }
    }
    Some((kind, weight))
}

/// Reads a weight from `0` to `1` with up to three decimals, in thousandths.
fn thousandths(weight: &str) -> Option<u16> {
    let (whole, decimals) = weight.split_once('.').unwrap_or((weight, ""));
    let is_number = ["0", "1"].contains(&whole)
        && decimals.len() <= 3
        && decimals.bytes().all(|digit| digit.is_ascii_digit());
    let weight = format!("{whole}{decimals:0<3}")
        .parse()
        .ok()
        .filter(|weight| *weight <= 1000);
    weight.filter(|_| is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_below_its_conversation() {
        for path in [
            "/v1/users/a%2Fb/messages",
            "/v1/users/a%2Fb/runs/run_1/tool_outputs",
            "/v1/users/a%2Fb/runs/run_1/events",
        ] {
            let prefix = Prefix("/api".to_owned());
            assert_eq!(
                scope_of(&prefix, &path.parse().unwrap()),
                "/api/v1/users/a%2Fb"
            );
        }
    }

    #[test]
    fn the_highest_weight_decides() {
        for (lines, streams) in [
            (&[][..], false),
            (&["text/event-stream"], true),
            (&["Text/Event-Stream; q=0.3"], true),
            (&["application/json, text/event-stream"], true),
            (&["application/json, text/event-stream;q=0"], false),
            (&["text/event-stream;q=0.0"], false),
            (&["application/json;q=0.9, text/event-stream;q=0.8"], false),
            (&["application/json;q=0.8, text/event-stream;q=0.9"], true),
            (&["application/json;q=0.5", "text/event-stream"], true),
            (&["text/event-stream;q=0.9, */*"], false),
            (&["text/event-stream, */*;q=0.1"], true),
            (
                &["text/event-stream;q=0.5, application/json;q=0.1, */*"],
                true,
            ),
            (&["text/event-stream;q=0, text/event-stream;q=1"], true),
            (&["text/*", "*/*"], false),
            (&["text/event-stream;q=2"], false),
            (&["text/event-stream;q=high"], false),
            (&["text/event-stream;q=0.1234"], false),
            (&["text/event-stream;q="], false),
            (&[",;,", "text/event-stream"], true),
            (&["application/json;q=x, text/event-stream;q=0.1"], true),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::ACCEPT, HeaderValue::from_static(line));
            }
            assert_eq!(accepts_events(&headers), streams, "{lines:?}");
        }
    }
}
