//! Classifies a refusal: from status, headers and body to a [`Rejection`]. Pure; keeps none of
//! the server's prose.

use std::time::Duration;

use chrono::DateTime;
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value};

use crate::domain::{RunErrorCode, UpstreamRunId};
use crate::upstream::error::{RefusalCause, UpstreamError};
use crate::upstream::error_detail::{Layer, plain};
use crate::upstream::refusal_cause::{
    cause, exceeds_rate_alone, is_place, is_quota, is_thread_field, passes,
};

pub(super) use crate::upstream::error_detail::ErrorDetail;

/// Codes and types of a failure inside the server, in lower case and without separators.
const FAILURE_WORDS: [&str; 6] = [
    "servererror",
    "internalservererror",
    "internalerror",
    "500",
    "502",
    "504",
];
/// The objects that a call asks for by id.
const NOUNS: [&str; 5] = ["thread", "conversation", "response", "item", "message"];

/// An error, with details for the adapters only.
#[derive(Clone, Debug)]
pub(super) struct Rejection {
    pub(super) error: UpstreamError,
    /// The damage of the conversation, for which the server took nothing of the run.
    pub(super) damage: Option<Damage>,
}

/// Damage that an earlier run left in a conversation, and for which the server refuses every
/// further run. No server has a code for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Damage {
    /// A call without an output, or an approval request without an answer.
    OpenCall,
    /// A reasoning item without the item that must follow it, with its id if the server names it.
    OrphanedReasoning(Option<String>),
}

impl From<UpstreamError> for Rejection {
    fn from(error: UpstreamError) -> Self {
        Self {
            error,
            damage: None,
        }
    }
}

impl From<Rejection> for UpstreamError {
    fn from(refusal: Rejection) -> Self {
        refusal.error
    }
}

/// Classifies an answer whose status is not a success. `asked` is the last segment of the path:
/// an id, if the call asked for one.
pub(super) fn classify(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    asked: &str,
) -> Rejection {
    let detail = ErrorDetail::from_body(body);
    Rejection {
        damage: detail.damage().filter(|_| status.is_client_error()),
        error: meaning(status, headers, &detail, asked),
    }
}

/// Returns the code of a run that the upstream ended with this error code, if the code says more
/// than that the run failed.
pub(super) fn run_code_of(code: &str) -> Option<RunErrorCode> {
    let error = Map::from_iter([("code".to_owned(), Value::from(code))]);
    let meaning = ErrorDetail::from_object(&error).meaning_without_status();
    let run_code = meaning.ok()?.run_code();
    matches!(
        run_code,
        RunErrorCode::UpstreamRateLimited
            | RunErrorCode::UpstreamQuotaExhausted
            | RunErrorCode::UpstreamUnauthorized
            | RunErrorCode::UpstreamMisconfigured
            | RunErrorCode::ContentRefused
            | RunErrorCode::ContextFull
    )
    .then_some(run_code)
}

fn meaning(
    status: StatusCode,
    headers: &HeaderMap,
    detail: &ErrorDetail,
    asked: &str,
) -> UpstreamError {
    let client_error = status.is_client_error();
    // The server's own statement takes precedence over any conclusion.
    let should_retry = match headers
        .get("x-should-retry")
        .map(http::HeaderValue::as_bytes)
    {
        Some(b"true") => Some(true),
        Some(b"false") => Some(false),
        _ => None,
    };
    let limited = |quota| UpstreamError::RateLimited {
        status: status.as_u16(),
        retry_after: retry_after(headers).or_else(|| detail.pause()),
        quota,
        code: detail.word(),
    };
    if status == StatusCode::TOO_MANY_REQUESTS {
        // A request that is larger than the rate itself is refused at any time.
        if should_retry.is_none() && exceeds_rate_alone(detail) {
            return refused(status.as_u16(), false, detail);
        }
        return limited(should_retry.map_or_else(|| is_quota(detail), |retry| !retry));
    }
    if detail.names_missing_thread(status) {
        return UpstreamError::ThreadGone;
    }
    if matches!(status, StatusCode::CONFLICT | StatusCode::LOCKED)
        || (client_error && detail.is_conflict())
    {
        return UpstreamError::Busy {
            blocking_run: detail.blocking_run(),
        };
    }
    if status == StatusCode::PAYMENT_REQUIRED || (client_error && is_quota(detail)) {
        return limited(true);
    }
    if matches!(status, StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN)
        && passes(detail) == Some(429)
    {
        return limited(false);
    }
    // After a 408 (the server gave up waiting) the fate of the request is as unknown as after a
    // 5xx.
    let is_broken = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
    if is_broken || status == StatusCode::REQUEST_TIMEOUT {
        return UpstreamError::Unavailable {
            status: status.as_u16(),
            retry_after: retry_after(headers),
            no_retry: should_retry == Some(false),
            code: detail.code(),
        };
    }
    refused(status.as_u16(), detail.says_missing(status, asked), detail)
}

fn refused(status: u16, missing: bool, detail: &ErrorDetail) -> UpstreamError {
    let about = cause(detail, status);
    // A 410 may also be about a model.
    let is_thread = missing && (status != 410 || about == RefusalCause::Unknown);
    UpstreamError::Refused {
        status,
        missing,
        cause: if is_thread {
            RefusalCause::Thread
        } else {
            about
        },
        code: detail.code(),
    }
}

/// Returns true if the text says that the requested object does not exist.
///
/// A text about the endpoint does not count. A plain "not found" does not count either, because
/// frameworks send it for unknown paths.
fn says_missing(status: StatusCode, text: &str, asked: &str) -> bool {
    const MISSING: [&str; 10] = [
        "not found",
        "found with id",
        "not exist",
        "not be found",
        "no such",
        "no longer exist",
        "unknown",
        "was deleted",
        "been deleted",
        "expired",
    ];
    if status == StatusCode::GONE {
        return true;
    }
    let text = text.to_ascii_lowercase();
    let has = |words: &str| text.contains(words);
    if !matches!(status, StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)
        || text.trim_start().starts_with('<')
        || ["url", "endpoint", "route", "method"].into_iter().any(has)
    {
        return false;
    }
    let names_it = is_id(asked) && names(&text, &asked.to_ascii_lowercase());
    let is_missing = |noun: &str| {
        let (before, after) = (
            ["no such", "unknown"],
            ["not found", "was not found", "does not exist"],
        );
        before.iter().any(|words| has(&format!("{words} {noun}")))
            || after.iter().any(|words| has(&format!("{noun} {words}")))
    };
    (names_it && MISSING.into_iter().any(has))
        || (status == StatusCode::NOT_FOUND && NOUNS.into_iter().any(is_missing))
}

/// Returns true if the text contains the id as a whole word that is not part of a path.
fn names(text: &str, id: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    text.match_indices(id).any(|(at, _)| {
        let before = text[..at].bytes().next_back();
        let after = text[at + id.len()..].bytes().next();
        !before.is_some_and(|byte| is_part(byte) || byte == b'/') && !after.is_some_and(is_part)
    })
}

impl ErrorDetail {
    /// Classifies an error that a stream reports in the place of a run or response, without a
    /// status.
    ///
    /// # Errors
    /// The error's code, if the error only says that the run failed. Then that is how
    /// the run ended.
    pub(super) fn of_refused_stream(self) -> Result<Rejection, Option<String>> {
        let damage = self.damage();
        Ok(Rejection {
            error: self.meaning_without_status()?,
            damage,
        })
    }

    /// Returns what an error means that a stream told, for the log.
    pub(super) fn told(&self) -> UpstreamError {
        self.meaning_without_status()
            .unwrap_or_else(|code| UpstreamError::Unavailable {
                status: StatusCode::INTERNAL_SERVER_ERROR.as_u16(),
                retry_after: None,
                no_retry: false,
                code,
            })
    }

    fn meaning_without_status(&self) -> Result<UpstreamError, Option<String>> {
        if self.names_missing_thread(StatusCode::NOT_FOUND) {
            return Ok(UpstreamError::ThreadGone);
        }
        // Some servers put the status that they would have sent into the error.
        let status = self.status();
        if self.is_conflict() || matches!(status, Some(409 | 423)) {
            return Ok(UpstreamError::Busy {
                blocking_run: self.blocking_run(),
            });
        }
        if is_quota(self) || status == Some(402) {
            return Ok(UpstreamError::RateLimited {
                status: status.unwrap_or(429),
                retry_after: None,
                quota: true,
                code: self.word(),
            });
        }
        // The status was 200, so the server may have taken the request.
        let passing = status.filter(|status| matches!(status, 429 | 503 | 529));
        if let Some(status) = passes(self).or(passing)
            && !exceeds_rate_alone(self)
        {
            return Ok(UpstreamError::Unavailable {
                status,
                retry_after: None,
                no_retry: false,
                code: self.word(),
            });
        }
        let refusal = |status| UpstreamError::Refused {
            status,
            missing: false,
            cause: cause(self, status),
            code: self.word(),
        };
        match status {
            Some(status @ 400..500) if status != 408 => return Ok(refusal(status)),
            // The server says that it failed. Its other words do not change that.
            Some(_) => return Err(self.word()),
            None => {}
        }
        if self.is_called(&["invalidrequesterror"])
            || self.damage().is_some()
            || cause(self, 400) != RefusalCause::Unknown
        {
            return Ok(refusal(400));
        }
        Err(self.word())
    }

    /// Returns the failure of a run that the server had accepted, as a refusal of the request: one
    /// that may pass, so that another run with the same messages may succeed, or one that another
    /// thread or a shorter history may avoid.
    pub(super) fn refusal(&self) -> Option<UpstreamError> {
        if is_quota(self) || self.damage().is_some() {
            return None;
        }
        let retry_after = self.pause();
        let code = self.word();
        let is_failure = || {
            self.codes_and_kinds()
                .map(plain)
                .any(|word| FAILURE_WORDS.contains(&&*word))
        };
        let Some(status) = passes(self).or_else(|| is_failure().then_some(500)) else {
            let refusal = refused(400, false, self);
            let is_known = matches!(
                refusal,
                UpstreamError::Refused {
                    cause: RefusalCause::Thread | RefusalCause::Size | RefusalCause::Media,
                    ..
                }
            );
            return Some(refusal).filter(|_| is_known);
        };
        Some(if status == 429 {
            UpstreamError::RateLimited {
                status,
                retry_after,
                quota: false,
                code,
            }
        } else {
            UpstreamError::Unavailable {
                status,
                retry_after,
                no_retry: false,
                code,
            }
        })
    }

    /// Returns the pause before another try that the prose names.
    fn pause(&self) -> Option<Duration> {
        self.layers
            .iter()
            .find_map(|layer| pause_in(&layer.message))
    }

    /// Returns true if another run or response holds the thread. Servers report that with a code,
    /// or only in prose.
    fn is_conflict(&self) -> bool {
        self.is_called(&["conversationlocked"])
            || self.says(&[
                "already has an active run",
                "currently operating on this conversation",
            ])
            || (self.says(&["add messages to"]) && self.says(&["while a run"]))
            || (self.says(&["in-progress response", "in progress response"])
                && self.says(&["exist"]))
    }

    /// Returns the damage of the conversation, if the error is about that.
    pub(super) fn damage(&self) -> Option<Damage> {
        let lacks_approval =
            self.says(&["approval request"]) && self.says(&["not have an approval"]);
        if self.says(&["no tool output found for"]) || lacks_approval {
            Some(Damage::OpenCall)
        } else if self.says(&["reasoning"]) && self.says(&["without its required following item"]) {
            Some(Damage::OrphanedReasoning(self.named("rs_")))
        } else {
            None
        }
    }

    /// Returns the run that the text of a conflict names.
    fn blocking_run(&self) -> Option<UpstreamRunId> {
        self.named("run_").map(UpstreamRunId)
    }

    /// Returns true if the requested object does not exist, by the text or by a code such as
    /// `response_not_found`.
    fn says_missing(&self, status: StatusCode, asked: &str) -> bool {
        let of = |code: &str| {
            NOUNS
                .into_iter()
                .any(|noun| code.strip_suffix("_not_found") == Some(noun))
        };
        let by_code =
            status.is_client_error() && self.layers.iter().filter_map(Layer::code).any(of);
        by_code
            || status == StatusCode::GONE
            || self
                .layers
                .iter()
                .any(|layer| says_missing(status, &layer.message, asked))
    }

    /// Returns true if the error says that the thread, conversation or previous response itself
    /// does not exist. A missing endpoint or another missing object does not count: the gateway
    /// gives an upstream thread up only on evidence.
    ///
    /// After a 5xx the server may have accepted the request. Only a relay that quotes the refusal
    /// of the server behind it proves that it did not. Of all quoted refusals this is the one
    /// that an earlier try of the relay met too, since no server runs on a thread that it lacks.
    /// And the message then goes to a new thread, so no thread gets it twice.
    fn names_missing_thread(&self, status: StatusCode) -> bool {
        const MISSING: [u16; 3] = [400, 404, 410];
        let is_refusal = MISSING.contains(&status.as_u16())
            || (status.is_server_error() && self.quoted_statuses().any(|it| MISSING.contains(&it)));
        let by_code = status.is_client_error() && self.is_called(&["previousresponsenotfound"]);
        by_code || (is_refusal && self.layers.iter().any(Layer::names_missing_thread))
    }
}

impl Layer {
    fn names_missing_thread(&self) -> bool {
        const FIELD_TEXTS: [&str; 4] = ["not found", "not exist", "no such", "expired"];
        if !self.shaped {
            return false;
        }
        let is_code = self
            .code()
            .is_some_and(|code| ["thread_not_found", "conversation_not_found"].contains(&code));
        let text = self.message.to_lowercase();
        let is_field = self.param().is_some_and(is_thread_field)
            && FIELD_TEXTS.iter().any(|words| text.contains(words));
        let words = self.lower_words();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        is_code || is_field || (0..words.len()).any(|at| begins_missing_thread(&words, at))
    }
}

/// Returns true if a statement that a thread does not exist has its noun at this place. What
/// stands before it may be a relay's.
fn begins_missing_thread(words: &[&str], at: usize) -> bool {
    const NOUNS: [&str; 7] = [
        "thread",
        "conversation",
        "response",
        "thread_id",
        "conversation_id",
        "response_id",
        "previous_response_id",
    ];
    if !NOUNS.contains(&words[at]) {
        return false;
    }
    let last = at.checked_sub(1).map_or("", |at| words[at]);
    let is_place = is_place(words, at);
    let says_no = matches!(last, "no" | "such" | "unknown" | "find");
    let after = &words[at + 1..];
    let rest = after.strip_prefix(&["object"]).unwrap_or(after);
    match rest {
        ["found", "with", "id", id, ..] => last == "no" && is_thread_id(id),
        ["not", "found", "with", "id", id, ..]
        | ["not", "found", "id", id, ..]
        | ["not", "found", id, ..] => !is_place && is_thread_id(id),
        ["with", "id", id, rest @ ..] | ["id", id, rest @ ..] | [id, rest @ ..] => {
            is_thread_id(id) && (says_no || (!is_place && says_not_there(rest)))
        }
        [] => false,
    }
}

/// Returns true if the words after an id say that there is no such object.
fn says_not_there(words: &[&str]) -> bool {
    match words {
        ["not", "found" | "exist" | "exists", ..]
        | ["not" | "cannot", "be", "found", ..]
        | ["no", "longer", "exist" | "exists" | "available", ..]
        | ["deleted" | "expired" | "unknown", ..] => true,
        [
            "is" | "was" | "has" | "been" | "could" | "can" | "does",
            rest @ ..,
        ] => says_not_there(rest),
        _ => false,
    }
}

/// Returns true if the word can be the id of a thread: not prose, no status, and not the id of
/// another kind of thing.
fn is_thread_id(word: &str) -> bool {
    const OTHERS: [&str; 8] = ["asst", "call", "file", "item", "msg", "run", "step", "vs"];
    let prefix = word.split(['_', '-']).next().unwrap_or_default();
    is_id(word) && word.bytes().any(|byte| !byte.is_ascii_digit()) && !OTHERS.contains(&prefix)
}

/// Returns how long the server asks to wait. Returns `None` if the server does not say, or if the
/// value is invalid.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::trim)
    };
    if let Some(wait) = text("retry-after-ms").and_then(|ms| seconds(ms, 1000.0)) {
        return Some(wait);
    }
    let value = text("retry-after")?;
    if let Some(wait) = seconds(value, 1.0) {
        return Some(wait);
    }
    // A date is compared with the server's own clock, never with the gateway's.
    let until = DateTime::parse_from_rfc2822(value).ok()?;
    let now = DateTime::parse_from_rfc2822(text(header::DATE.as_str())?).ok()?;
    (until - now).to_std().ok()
}

/// Returns the pause that a text asks for: "Please try again in 7.6s", "in 20 seconds", "in 1m30s".
fn pause_in(text: &str) -> Option<Duration> {
    let text = text.to_ascii_lowercase();
    let (_, mut rest) = text.split_once("try again in ")?;
    let mut pause = None;
    while rest.starts_with(|c: char| c.is_ascii_digit()) {
        let (number, unit) = split_where(rest, |c| !(c.is_ascii_digit() || c == '.'));
        let (unit, next) = split_where(unit.trim_start(), |c| !c.is_ascii_alphabetic());
        let per_second = match unit {
            "ms" | "milliseconds" => 1000.0,
            "s" | "sec" | "second" | "seconds" => 1.0,
            "m" | "min" | "minute" | "minutes" => 1.0 / 60.0,
            _ => break,
        };
        pause = pause
            .unwrap_or(Duration::ZERO)
            .checked_add(seconds(number, per_second)?);
        rest = next;
    }
    pause
}

/// Splits a text before the first character for which `ends` is true.
fn split_where(text: &str, ends: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(ends).unwrap_or(text.len()))
}

/// Parses a count of units, of which `per_second` make a second. Returns `None` for a text that
/// is not a number, is negative or is too large.
fn seconds(text: &str, per_second: f64) -> Option<Duration> {
    text.parse::<f64>()
        .ok()
        .and_then(|number| Duration::try_from_secs_f64(number / per_second).ok())
}

/// Returns true if the word looks like an id and not like prose.
fn is_id(word: &str) -> bool {
    word.bytes()
        .any(|byte| byte.is_ascii_digit() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::error_detail::token;

    #[test]
    fn text_names_the_pause_before_another_try() {
        let ms = |text| pause_in(text).map(|pause| pause.as_millis());
        assert_eq!(
            ms("Limit reached. Please try again in 7.6s. See x"),
            Some(7600)
        );
        assert_eq!(ms("please Try again in 120ms"), Some(120));
        assert_eq!(ms("try again in 1m30s."), Some(90_000));
        assert_eq!(ms("try again in 20 seconds"), Some(20_000));
        for none in [
            "",
            "try again in a while",
            "try again in 5 parsecs",
            "try again in 1.2.3s",
        ] {
            assert_eq!(ms(none), None, "{none}");
        }
    }

    #[test]
    fn failed_runs_that_may_pass_are_told_from_others() {
        let status = |code: &str, message: &str| {
            let error = serde_json::json!({"code": code, "message": message});
            match ErrorDetail::from_object(error.as_object().unwrap()).refusal()? {
                UpstreamError::RateLimited { .. } => Some(429),
                UpstreamError::Unavailable { status, .. } => Some(status),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(status("rate_limit_exceeded", ""), Some(429));
        assert_eq!(status("server_error", ""), Some(500));
        assert_eq!(status("model_overloaded", ""), Some(503));
        for code in ["invalid_prompt", "insufficient_quota", "content_filter", ""] {
            assert_eq!(status(code, ""), None, "{code}");
        }
        let damaged = "No tool output found for function call call_1.";
        assert_eq!(status("server_error", damaged), None);
    }

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    http::HeaderName::try_from(*name).unwrap(),
                    http::HeaderValue::try_from(*value).unwrap(),
                )
            })
            .collect()
    }

    /// Shortens a classification for the tables.
    fn meaning(status: u16, pairs: &[(&str, &str)], body: &str) -> String {
        let status = StatusCode::from_u16(status).unwrap();
        let refusal = classify(status, &headers(pairs), body.as_bytes(), "");
        if let Some(damage) = refusal.damage {
            return format!("{damage:?}");
        }
        match refusal.error {
            UpstreamError::Busy { blocking_run } => {
                format!(
                    "busy {}",
                    blocking_run.map_or_else(|| "-".to_owned(), |run| run.0)
                )
            }
            UpstreamError::ThreadGone => "gone".to_owned(),
            UpstreamError::Refused { status, code, .. } => {
                format!(
                    "refused {status} {}",
                    code.unwrap_or_else(|| "-".to_owned())
                )
            }
            UpstreamError::RateLimited {
                retry_after, quota, ..
            } => {
                format!(
                    "limited {retry_after:?} {}",
                    if quota { "quota" } else { "wait" }
                )
            }
            UpstreamError::Unavailable {
                status,
                retry_after,
                no_retry,
                ..
            } => {
                format!(
                    "unavailable {status} {retry_after:?}{}",
                    if no_retry { " for good" } else { "" }
                )
            }
            other => format!("unexpected {other:?}"),
        }
    }

    fn wrapped(message: &str, code: &str) -> String {
        let code = if code.is_empty() {
            Value::Null
        } else {
            Value::from(code)
        };
        serde_json::json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}})
            .to_string()
    }

    #[test]
    fn a_code_is_made_of_words() {
        for code in [
            "context_length_exceeded",
            "429",
            "DeploymentNotFound",
            "ResponsibleAIPolicyViolation",
            "error404",
            "invalid-request.v2",
            "unsupported_country_region_territory",
        ] {
            assert_eq!(token(code).as_deref(), Some(code));
        }
        for other in [
            "",
            "two words",
            "sk-proj-a1B2c3D4e5F6g7H8i9J0k1L2m3N4",
            "sk-0123456789abcdef0123456789abcdef",
            "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ",
            "20260101",
            &"a_".repeat(33),
        ] {
            assert_eq!(token(other), None, "{other}");
        }
    }

    #[test]
    fn bodies_are_told_apart() {
        let busy_add = "Can't add messages to thread_a1 while a run run_b2 is active.";
        let busy_run = "Thread thread_a1 already has an active run run_b2.";
        let locked = "Another process is currently operating on this conversation. Please retry in a few seconds.";
        let cases: Vec<(u16, String, &str)> = vec![
            (400, wrapped(busy_add, ""), "busy run_b2"),
            (400, wrapped(&busy_add.replace('\'', "’"), ""), "busy run_b2"),
            (400, wrapped(busy_run, ""), "busy run_b2"),
            (400, wrapped(&busy_run.to_uppercase(), ""), "busy -"),
            (400, wrapped(locked, "conversation_locked"), "busy -"),
            (400, wrapped("later", "conversation_locked"), "busy -"),
            (400, wrapped(locked, ""), "busy -"),
            (400, wrapped("An in-progress response already exists for the agent.", ""), "busy -"),
            (409, wrapped("Modified by another request", "conflict"), "busy -"),
            (409, "<html>Conflict</html>".into(), "busy -"),
            (423, String::new(), "busy -"),
            // Bare, without the wrapper; integer code.
            (400, r#"{"message":"Thread t already has an active run run_9.","type":"x","code":400}"#.into(), "busy run_9"),
            (404, wrapped("No thread found with id 'thread_a1'.", ""), "gone"),
            (404, wrapped("Thread with id 'thread_a1' not found.", ""), "gone"),
            (404, wrapped("Conversation with id 'conv_a1' not found.", ""), "gone"),
            (400, wrapped("Conversation with id 'conv_a1' not found.", ""), "gone"),
            (404, wrapped("Thread thread_a1 does not exist", ""), "gone"),
            (400, wrapped("Previous response with id 'resp_1' not found.", "previous_response_not_found"), "gone"),
            (404, wrapped("Previous response with id 'resp_1' not found.", ""), "gone"),
            (
                404,
                r#"{"object":"error","message":"Response with id 'resp_1' not found.","type":"NotFoundError","param":null,"code":404}"#.into(),
                "gone",
            ),
            // No evidence that the thread is gone.
            (404, String::new(), "refused 404 -"),
            (404, "404 page not found".into(), "refused 404 -"),
            (404, r#"{"detail":"Not Found"}"#.into(), "refused 404 -"),
            (404, r#"{"message":"No thread found with id 'thread_a1'."}"#.into(), "refused 404 -"),
            (404, r#"{"error":"No thread found with id 'thread_a1'."}"#.into(), "refused 404 -"),
            (404, wrapped("Invalid URL (POST /v1/threads/thread_a1/runs)", ""), "refused 404 -"),
            (404, wrapped("No assistant found with id 'asst_1'.", ""), "refused 404 -"),
            (404, wrapped("No run found with id 'run_1' in thread 'thread_a1'.", ""), "refused 404 -"),
            (404, wrapped("Item with id 'msg_1' not found in conversation.", ""), "refused 404 -"),
            (404, wrapped("Thread not found", ""), "refused 404 -"),
            (404, wrapped("Thread endpoint not found", "not_found"), "refused 404 not_found"),
            (403, wrapped("Thread with id 'thread_a1' not found.", ""), "refused 403 -"),
            (500, wrapped("Thread with id 'thread_a1' not found.", ""), "unavailable 500 None"),
            (
                400,
                wrapped("No tool output found for function call call_1.", ""),
                "OpenCall",
            ),
            (
                400,
                wrapped("Item 'rs_1a' of type 'reasoning' was provided without its required following item.", ""),
                "OrphanedReasoning(Some(\"rs_1a\"))",
            ),
            (
                400,
                wrapped("A reasoning item was provided without its required following item.", ""),
                "OrphanedReasoning(None)",
            ),
            (500, wrapped("No tool output found for function call call_1.", ""), "unavailable 500 None"),
            // Plain refusals. The code is shown only if it has the form of a code.
            (401, wrapped("Incorrect API key provided: sk-1", "invalid_api_key"), "refused 401 invalid_api_key"),
            (400, wrapped("x", "not a word"), "refused 400 -"),
            (400, wrapped("x", &"a".repeat(65)), "refused 400 -"),
            (400, r#"{"error":{"message":"m","code":1301}}"#.into(), "refused 400 1301"),
            (400, r#"{"error":{"message":"m","code":["x"]}}"#.into(), "refused 400 -"),
            (400, "[1]".into(), "refused 400 -"),
            (400, "\u{feff}{".into(), "refused 400 -"),
            (400, wrapped("Cannot cancel run with status 'completed'.", ""), "refused 400 -"),
            (307, String::new(), "refused 307 -"),
            (501, r#"{"detail":"not implemented"}"#.into(), "refused 501 -"),
            (503, "upstream connect error".into(), "unavailable 503 None"),
            (408, String::new(), "unavailable 408 None"),
            (429, wrapped("slow down", "rate_limit_exceeded"), "limited None wait"),
            (429, wrapped("pay", "insufficient_quota"), "limited None quota"),
            (429, r#"{"error":{"message":"pay","type":"insufficient_quota"}}"#.into(), "limited None quota"),
            (429, String::new(), "limited None wait"),
        ];
        for (status, body, expected) in cases {
            assert_eq!(meaning(status, &[], &body), expected, "{status} {body}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_from_an_endpoint_that_is_not() {
        let missing = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            let refusal = classify(status, &HeaderMap::new(), body.as_bytes(), "resp_1a");
            matches!(
                refusal.error,
                UpstreamError::ThreadGone | UpstreamError::Refused { missing: true, .. }
            )
        };
        let relayed = r#"litellm.BadRequestError: Hosted_vllmException - {"error":{"message":"Response with id 'resp_1a' not found.","code":404}}. Received Model Group=m"#;
        for (status, body) in [
            (404, wrapped("Response with id 'resp_1a' not found.", "")),
            (404, wrapped(relayed, "404")),
            (400, wrapped(relayed, "")),
            (404, r#"{"detail":"Response resp_1a not found"}"#.to_owned()),
            (
                404,
                r#"{"detail":{"error":"resp_1a does not exist in the store"}}"#.to_owned(),
            ),
            (
                404,
                r#"{"code":"not-found","error":"No such object: resp_1a"}"#.to_owned(),
            ),
            (404, r#"{"message":"Response not found"}"#.to_owned()),
            (404, wrapped("No message found with id 'resp_1a'.", "")),
            (404, wrapped("It is not here.", "response_not_found")),
            (404, "resp_1a was not found".to_owned()),
            (410, String::new()),
        ] {
            assert!(missing(status, &body), "{status} {body}");
        }
        for (status, body) in [
            (404, String::new()),
            (404, r#"{"detail":"Not Found"}"#.to_owned()),
            (
                404,
                r#"{"message":"no Route matched with those values"}"#.to_owned(),
            ),
            (
                404,
                r#"{"message":"Route DELETE:/v1/responses/resp_1a not found"}"#.to_owned(),
            ),
            (
                404,
                r#"{"detail":"Not Found: /v1/responses/resp_1a"}"#.to_owned(),
            ),
            (404, r#"{"detail":"resp_1ab not found"}"#.to_owned()),
            (
                404,
                wrapped("Invalid URL (DELETE /v1/responses/resp_1a)", ""),
            ),
            (404, wrapped("Resource not found", "404")),
            (
                404,
                wrapped(
                    "litellm.NotFoundError: Error response: {\"detail\":\"Not Found\"}",
                    "404",
                ),
            ),
            (404, "<html><h1>Response not found</h1></html>".to_owned()),
            (405, r#"{"detail":"Method Not Allowed"}"#.to_owned()),
            (401, wrapped("Response with id 'resp_1a' not found.", "")),
            (403, r#"{"detail":"Response resp_1a not found"}"#.to_owned()),
            (500, r#"{"detail":"Response resp_1a not found"}"#.to_owned()),
            (501, String::new()),
        ] {
            assert!(!missing(status, &body), "{status} {body}");
        }
    }

    /// Wraps a text as a relay does.
    fn relayed(inner: &str, code: &str) -> String {
        let message =
            format!("litellm.BadRequestError: OpenAIException - {inner}. Received Model Group=m");
        serde_json::json!({"error": {"message": message, "type": null, "param": null, "code": code}}).to_string()
    }

    #[test]
    fn missing_threads_are_recognised_behind_relays() {
        let vllm = r#"{"error":{"message":"Response with id 'resp_1' not found.","type":"invalid_request_error","param":"response_id","code":404}}"#;
        let python = r#"Error code: 404 - {'error': {'message': "Response with id 'resp_1' not found.", 'code': 404}}"#;
        for (status, body) in [
            (404, relayed(vllm, "404")),
            (400, relayed(vllm, "400")),
            (500, relayed(vllm, "500")),
            (404, relayed(python, "404")),
            (500, relayed(python, "500")),
            (404, relayed("Previous response with id 'resp_1' not found.", "404")),
            (404, relayed("No thread found with id 'thread_1'.", "404")),
            (400, wrapped("The conversation conv_1 could not be found", "")),
            (400, wrapped("Unknown conversation conv_1", "")),
            (400, wrapped("previous_response_id 'resp_1' does not exist", "")),
            (404, wrapped("Response not found: resp_1", "")),
            (404, wrapped("Thread thread_1 no longer exists.", "")),
            (410, wrapped("Conversation conv_1 has been deleted", "")),
            (404, wrapped("It is not here.", "conversation_not_found")),
            (404, r#"{"code":"not-found","error":"Response with id=resp_1 not found"}"#.to_owned()),
            (404, r#"{"detail":"Response with id 'resp_1' not found"}"#.to_owned()),
            (404, r#"{"detail":{"error":"Response resp_1 was not found"}}"#.to_owned()),
            (404, r#"{"detail":{"error":{"message":"Response resp_1 was not found"}}}"#.to_owned()),
            (404, format!("[{vllm}]")),
            (404, r#"{"title":"Not Found","status":404,"detail":"Thread with id 'thread_1' not found"}"#.to_owned()),
            (400, r#"{"error":{"message":"It expired","param":"previous_response_id","code":400}}"#.to_owned()),
            (
                502,
                serde_json::json!({"error": {"message": "Provider returned error", "code": 502, "metadata": {"raw": vllm}}}).to_string(),
            ),
            (400, serde_json::json!({"error": {"message": vllm.replace('"', "\\\"")}}).to_string()),
        ] {
            assert_eq!(meaning(status, &[], &body), "gone", "{status} {body}");
        }
        let model =
            r#"{"error":{"message":"The model `m` does not exist","code":"model_not_found"}}"#;
        for (status, body) in [
            (
                404,
                wrapped("Run 'run_1' in thread thread_1 was not found", ""),
            ),
            (
                404,
                wrapped("No file found with id 'file-1' for thread thread_1.", ""),
            ),
            (
                404,
                wrapped("The vector store of conversation conv_1 does not exist", ""),
            ),
            (
                404,
                wrapped(
                    "File 'file_1' of the previous response resp_1 not found",
                    "",
                ),
            ),
            (
                404,
                wrapped(
                    "Deployment for response resp_1 not found",
                    "DeploymentNotFound",
                ),
            ),
            (404, wrapped("No endpoints found for response_model m.", "")),
            (404, wrapped("Error response: 404 not found", "")),
            (
                404,
                wrapped("Thread thread_1: assistant asst_1 not found", ""),
            ),
            (404, wrapped("No response file_1 found", "")),
            (404, relayed(model, "404")),
            (400, wrapped("Response resp_1 is not complete", "")),
            (403, wrapped("Response with id 'resp_1' not found.", "")),
            // The relay itself failed, and does not say what the server behind it answered.
            (500, wrapped("Response with id 'resp_1' not found.", "500")),
            (500, relayed("Response with id 'resp_1' not found.", "500")),
            (500, relayed(model, "500")),
            (500, relayed(&vllm.replace("404", "500"), "500")),
        ] {
            let meaning = meaning(status, &[], &body);
            let expected = if status == 500 {
                "unavailable"
            } else {
                "refused"
            };
            assert!(meaning.starts_with(expected), "{status} {body}: {meaning}");
        }
    }

    #[test]
    fn money_and_rates_are_told_apart_whatever_the_status() {
        let quota = |text: &str| serde_json::json!({"error": {"message": text}}).to_string();
        for (status, body, expected) in [
            (429, quota("You exceeded your current quota, please check your plan and billing details."), "quota"),
            (402, String::new(), "quota"),
            (402, r#"{"error":{"message":"Insufficient Balance","type":"unknown_error","code":"invalid_request_error"}}"#.to_owned(), "quota"),
            (403, wrapped("x", "insufficient_quota"), "quota"),
            (400, relayed(&wrapped("x", "insufficient_quota"), "400"), "quota"),
            (400, quota("Your credit balance is too low to access the API."), "quota"),
            (401, wrapped("x", "insufficient_quota"), "quota"),
            (400, r#"{"error":{"message":"Budget has been exceeded! Max budget: 1.0","type":"budget_exceeded","param":"None","code":"400"}}"#.to_owned(), "quota"),
            (429, wrapped("Too many tokens, please wait before trying again.", ""), "wait"),
            (429, relayed("Error code: 429 - {'error': {'code': 'insufficient_quota'}}", "429"), "quota"),
            (400, wrapped("x", "rate_limit_exceeded"), "wait"),
            (429, r#"{"error":{"code":"429","message":"Requests have exceeded call rate limit of your current pricing tier."}}"#.to_owned(), "wait"),
        ] {
            assert_eq!(meaning(status, &[], &body), format!("limited None {expected}"), "{status} {body}");
        }
    }

    #[test]
    fn the_cause_of_a_refusal_is_read_from_its_words() {
        use RefusalCause::{Configuration, Media, Policy, Size, Thread, Unknown};
        let about = |message: &str, param: &str, code: &str| {
            serde_json::json!({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}).to_string()
        };
        let context = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.";
        let image = "https://x/signed";
        for (cause, status, body) in [
            (Size, 400, about("Your input exceeds the context window of this model.", "input", "context_length_exceeded")),
            (Size, 400, r#"{"object":"error","message":"This model's maximum context length is 4096 tokens.","type":"BadRequestError","param":null,"code":400}"#.to_owned()),
            (Size, 400, about("'max_tokens' is too large: 4096. This model's maximum context length is 4096 tokens", "max_tokens", "")),
            (Size, 400, relayed(&wrapped(context, "context_length_exceeded"), "400")),
            (Size, 400, relayed(&format!("ContextWindowExceededError: {context}"), "400")),
            (Size, 400, r#"{"error":{"code":400,"message":"request (5000 tokens) exceeds the available context size (4096 tokens)","type":"exceed_context_size_error"}}"#.to_owned()),
            (Size, 400, r#"{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 210000 tokens > 200000 maximum"}}"#.to_owned()),
            (Size, 400, r#"{"code":"Client specified an invalid argument","error":"This model's maximum prompt length is 131072 but the request contains 140000 tokens."}"#.to_owned()),
            (Size, 400, r#"[{"error":{"code":400,"message":"The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).","status":"INVALID_ARGUMENT"}}]"#.to_owned()),
            (Size, 400, r#"{"error":"Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens"}"#.to_owned()),
            (Size, 400, r#"{"object":"error","message":"The input (5000 tokens) is longer than the model's context length (4096 tokens).","code":400}"#.to_owned()),
            (Size, 400, about("Invalid 'input[0].content': string too long.", "input[0].content", "string_above_max_length")),
            (Size, 400, about("Invalid 'input': array too long.", "input", "array_above_max_length")),
            (Size, 413, String::new()),
            (Size, 413, "<html><h1>413 Request Entity Too Large</h1></html>".to_owned()),
            (Size, 429, about("Request too large for gpt-5 on tokens per min (TPM): Limit 30000, Requested 40000.", "", "rate_limit_exceeded")),
            (Policy, 400, r#"{"error":{"message":"The response was filtered due to the prompt triggering Azure OpenAI's content management policy.","type":null,"param":"prompt","code":"content_filter","status":400,"innererror":{"code":"ResponsibleAIPolicyViolation","content_filter_result":{}}}}"#.to_owned()),
            (Policy, 400, about("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", "", "invalid_prompt")),
            (Policy, 400, relayed("ContentPolicyViolationError: The response was filtered", "400")),
            (Policy, 403, r#"{"error":{"message":"m requires moderation. Your input was flagged.","code":403,"metadata":{"reasons":["violence"],"flagged_input":"api key"}}}"#.to_owned()),
            (Policy, 403, r#"{"code":"The caller does not have permission","error":"Content violates usage guidelines."}"#.to_owned()),
            (Media, 400, about(&format!("Error while downloading {image}"), "url", "invalid_image_url")),
            (Media, 400, about(&format!("Error while downloading {image}"), "url", "invalid_value")),
            (Media, 400, about("The image data you provided does not represent a valid image.", "input[0].content[1].image_url", "invalid_value")),
            (Media, 400, r#"{"object":"error","message":"cannot identify image file <_io.BytesIO object>","type":"BadRequestError","code":400}"#.to_owned()),
            (Media, 400, r#"{"message":"m is not a multimodal model","type":"BadRequestError","code":400}"#.to_owned()),
            (Media, 404, r#"{"error":{"message":"No endpoints found that support image input","code":404}}"#.to_owned()),
            (Media, 404, about("No such File object: file-1", "id", "").replace("\"id\"", "null")),
            (Media, 404, about("File with id 'file_1' not found.", "input[0].content[0].file_id", "")),
            (Thread, 400, about("Previous response cannot be used for this organization due to Zero Data Retention.", "previous_response_id", "unsupported_parameter")),
            (Thread, 400, about("Invalid 'conversation': 'thread_1'. Expected an ID that begins with 'conv'.", "conversation", "invalid_value")),
            (Thread, 400, about("The following MCP approval requests do not have an approval: mcpr_1", "input", "")),
            (Thread, 400, about("Item 'fc_1' of type 'function_call' was provided without its required 'reasoning' item: 'rs_1'.", "input", "")),
            (Thread, 400, about("The encrypted content could not be verified.", "", "invalid_encrypted_content")),
            (Thread, 404, wrapped("Thread not found", "")),
            (Thread, 404, wrapped("Item with id 'rs_1' not found. Items are not persisted when `store` is set to false.", "")),
            (Configuration, 401, about("Incorrect API key provided: sk-1", "", "invalid_api_key")),
            (Configuration, 403, about("m", "", "unsupported_country_region_territory")),
            (Configuration, 403, "<html>Forbidden</html>".to_owned()),
            (Configuration, 404, r#"{"error":{"code":"DeploymentNotFound","message":"The API deployment for this resource does not exist."}}"#.to_owned()),
            (Configuration, 404, r#"{"error":{"code":"404","message":"Resource not found"}}"#.to_owned()),
            (Configuration, 404, about("The model `m` does not exist or you do not have access to it.", "", "model_not_found")),
            (Configuration, 404, r#"{"error":"model 'm' not found"}"#.to_owned()),
            (Configuration, 404, r#"{"detail":"Not Found"}"#.to_owned()),
            (Configuration, 404, "404 page not found".to_owned()),
            (Configuration, 404, "<html>Not Found</html>".to_owned()),
            (Configuration, 404, wrapped("No assistant found with id 'asst_1'.", "")),
            (Configuration, 404, wrapped("Vector store with id 'vs_1' not found.", "")),
            (Configuration, 400, about("Your organization must be verified to stream this model.", "stream", "unsupported_value")),
            (Configuration, 400, about("Unsupported parameter: 'temperature' is not supported with this model.", "temperature", "unsupported_parameter")),
            (Configuration, 400, about("string too long", "instructions", "string_above_max_length")),
            (Configuration, 422, r#"{"detail":[{"type":"extra_forbidden","loc":["body","metadata"],"msg":"Extra inputs are not permitted"}]}"#.to_owned()),
            (Configuration, 400, relayed(&about("Unknown parameter: 'metadata'.", "metadata", "unknown_parameter"), "400")),
            (Configuration, 307, String::new()),
            (Unknown, 422, r#"{"detail":[{"type":"string_type","loc":["body","input",0,"content"],"msg":"Input should be a valid string"}]}"#.to_owned()),
            (Unknown, 400, String::new()),
            (Configuration, 410, wrapped("The model `m` is no longer available.", "")),
            (Thread, 410, String::new()),
            (Thread, 404, wrapped("Not found", "response_not_found")),
            (Configuration, 404, wrapped("Error response from the server: model m was not found", "")),
            (Unknown, 400, r#"{"error":{"message":"m","type":"None","param":"None","code":"400"}}"#.to_owned()),
            (Unknown, 400, about("The message role is not supported.", "input[0].role", "")),
            (Configuration, 400, about("Response format is not supported with this model.", "text.format", "")),
            (Configuration, 404, r#"{"statusCode":404,"message":"Cannot POST /v1/responses","error":"Not Found"}"#.to_owned()),
            (Configuration, 400, r#"{"error":{"message":"m is not a valid model ID","code":400}}"#.to_owned()),
            (Media, 400, about("string too long", "input[0].content[1].image_url", "string_above_max_length")),
            (Media, 400, r#"{"message":"At most 1 image(s) may be provided in one request.","code":400}"#.to_owned()),
            (Media, 400, wrapped("File with id 'file_1' in message msg_1 was not found.", "")),
            (Thread, 400, wrapped("previous_response_id is not supported.", "")),
            (Thread, 422, r#"{"detail":[{"type":"missing","loc":["path","thread_id"],"msg":"bad"}]}"#.to_owned()),
            (Unknown, 400, about("Invalid value: 'x'.", "input[0].role", "invalid_value")),
            (Unknown, 404, wrapped("It went away.", "")),
        ] {
            let refusal = classify(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body.as_bytes(), "");
            let UpstreamError::Refused { cause: told, .. } = refusal.error else {
                panic!("{status} {body}: {:?}", refusal.error);
            };
            assert_eq!(told, cause, "{status} {body}");
        }
    }

    #[test]
    fn waits_are_read_from_every_known_form() {
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        let cases: &[(&[(&str, &str)], &str)] = &[
            (&[("retry-after", "3")], "Some(3s)"),
            (&[("retry-after", " 0.25 ")], "Some(250ms)"),
            (
                &[("retry-after-ms", "20.5"), ("retry-after", "3")],
                "Some(20.5ms)",
            ),
            (
                &[("retry-after-ms", "-1"), ("retry-after", "3")],
                "Some(3s)",
            ),
            (&[("retry-after", "-1")], "None"),
            (&[("retry-after", "NaN")], "None"),
            (&[("retry-after", "inf")], "None"),
            (&[("retry-after", "1e300")], "None"),
            (&[("retry-after", "soon")], "None"),
            (
                &[("retry-after", "Sun, 06 Nov 1994 08:50:37 GMT"), date],
                "Some(60s)",
            ),
            (
                &[("retry-after", "Sun, 06 Nov 1994 08:40:37 GMT"), date],
                "None",
            ),
            (&[("retry-after", "Sun, 06 Nov 1994 08:50:37 GMT")], "None"),
        ];
        for (pairs, expected) in cases {
            assert_eq!(
                meaning(429, pairs, ""),
                format!("limited {expected} wait"),
                "{pairs:?}"
            );
            assert_eq!(
                meaning(503, pairs, ""),
                format!("unavailable 503 {expected}"),
                "{pairs:?}"
            );
        }
    }

    #[test]
    fn the_server_may_say_whether_to_retry() {
        assert_eq!(
            meaning(429, &[("x-should-retry", "false")], ""),
            "limited None quota"
        );
        assert_eq!(
            meaning(503, &[("x-should-retry", "false")], ""),
            "unavailable 503 None for good"
        );
        assert_eq!(
            meaning(503, &[("x-should-retry", "true")], ""),
            "unavailable 503 None"
        );
        assert_eq!(meaning(409, &[("x-should-retry", "false")], ""), "busy -");
        let quota = wrapped("pay", "insufficient_quota");
        assert_eq!(
            meaning(429, &[("x-should-retry", "true")], &quota),
            "limited None wait"
        );
    }

    /// Classifies an event that has no name; `None` if it is no error.
    fn read(data: &str) -> Option<String> {
        named(None, data)
    }

    fn named(name: Option<&str>, data: &str) -> Option<String> {
        Some(
            match ErrorDetail::of_event(name, data)?.of_refused_stream() {
                Ok(refusal) => refusal.error.to_string(),
                Err(code) => format!("failed {}", code.unwrap_or_else(|| "-".to_owned())),
            },
        )
    }

    #[test]
    fn an_error_event_without_a_status_is_understood() {
        let failed = "the upstream failed with status";
        for (data, expected) in [
            (
                r#"{"code":"conversation_locked","message":"m"}"#,
                "the upstream thread is held by another run".to_owned(),
            ),
            (
                r#"{"error":{"message":"Conversation with id 'conv_1' not found."}}"#,
                "the upstream thread is gone".to_owned(),
            ),
            (
                r#"{"error":{"code":"rate_limit_exceeded","message":"m"}}"#,
                format!("{failed} 429 (rate_limit_exceeded)"),
            ),
            (
                r#"{"error":{"code":429,"message":"m"}}"#,
                format!("{failed} 429 (429)"),
            ),
            (
                r#"{"error":{"code":429,"message":"m","status":"RESOURCE_EXHAUSTED"}}"#,
                format!("{failed} 429 (RESOURCE_EXHAUSTED)"),
            ),
            (
                r#"{"error":{"type":"overloaded_error","message":"m"}}"#,
                format!("{failed} 503 (overloaded_error)"),
            ),
            (
                r#"{"object":"error","message":"m","type":"ServiceUnavailable","code":503}"#,
                format!("{failed} 503 (ServiceUnavailable)"),
            ),
            (
                r#"{"error":{"type":"insufficient_quota","message":"m"}}"#,
                "the quota at the upstream is used up (insufficient_quota)".to_owned(),
            ),
            (
                r#"{"type":"invalid_request_error","code":"x","message":"m"}"#,
                "the upstream refused the request with status 400 (x)".to_owned(),
            ),
            (
                r#"{"object":"error","message":"m","type":"BadRequestError","param":null,"code":400}"#,
                "the upstream refused the request with status 400 (BadRequestError)".to_owned(),
            ),
            (
                r#"{"error":{"message":"m","code":"401"}}"#,
                "the upstream refused the request with status 401 (401)".to_owned(),
            ),
            (
                r#"{"error":{"status":429,"message":"m"}}"#,
                format!("{failed} 429"),
            ),
            (
                r#"{"error":{"code":"content_filter","message":"m"}}"#,
                "the upstream refused the request with status 400 (content_filter)".to_owned(),
            ),
            (
                r#"[{"error":{"code":400,"message":"m","status":"INVALID_ARGUMENT"}}]"#,
                "the upstream refused the request with status 400 (INVALID_ARGUMENT)".to_owned(),
            ),
            (
                r#"{"message":"Your input exceeds the context window of this model."}"#,
                "the upstream refused the request with status 400".to_owned(),
            ),
            (
                r#"{"error":{"message":"Response with id 'resp_1' not found.","code":404}}"#,
                "the upstream thread is gone".to_owned(),
            ),
            (
                r#"{"error":"Thread t already has an active run run_9."}"#,
                "the upstream thread is held by another run".to_owned(),
            ),
        ] {
            assert_eq!(read(data).as_deref(), Some(&*expected), "{data}");
        }
    }

    #[test]
    fn an_error_event_that_names_nothing_known_is_the_end_of_the_run() {
        for (data, expected) in [
            (
                r#"{"error":{"type":"server_error","message":"m"}}"#,
                "failed server_error".to_owned(),
            ),
            (
                r#"{"error":{"code":500,"message":"m"}}"#,
                "failed 500".to_owned(),
            ),
            (
                r#"{"error":{"code":"a whole sentence","message":"m"}}"#,
                "failed -".to_owned(),
            ),
            (r#"{"error":"it failed"}"#, "failed -".to_owned()),
            (
                r#"{"error":"it failed","code":"not-found"}"#,
                "failed not-found".to_owned(),
            ),
            (
                r#"{"detail":"Internal Server Error"}"#,
                "failed -".to_owned(),
            ),
            (
                r#"{"detail":[{"loc":["body"],"msg":"m"}]}"#,
                "failed -".to_owned(),
            ),
            (
                r#"{"detail":{"error":{"code":"model_crashed","message":"m"}}}"#,
                "failed model_crashed".to_owned(),
            ),
            (
                r#"{"message":"Endpoint request timed out"}"#,
                "failed -".to_owned(),
            ),
            (
                r#"{"type":"about:blank","title":"t","status":500,"detail":"m","code":"x"}"#,
                "failed x".to_owned(),
            ),
        ] {
            assert_eq!(read(data).as_deref(), Some(&*expected), "{data}");
        }
    }

    #[test]
    fn what_is_no_error_is_not_taken_for_one() {
        for data in [
            "{}",
            "[]",
            "now",
            r#"{"error":null}"#,
            r#"{"error":""}"#,
            r#"{"type":"keepalive"}"#,
            r#"{"type":"ping","message":"m"}"#,
            r#"{"object":"thread.message","message":"m"}"#,
            r#"{"id":"x","message":"m"}"#,
            r#"{"message":null,"detail":null}"#,
        ] {
            assert_eq!(read(data), None, "{data}");
        }
        let queued = r#"{"message":"queued","code":1}"#;
        assert!(read(queued).is_some());
        for (name, data) in [
            ("status", queued),
            ("ping", r#"{"message":"m"}"#),
            ("progress", r#"{"error":{"message":"none yet"},"step":3}"#),
        ] {
            assert_eq!(named(Some(name), data), None, "{name} {data}");
        }
        for (name, data) in [
            ("message", r#"{"message":"m"}"#),
            ("server_error", r#"{"message":"m"}"#),
            ("status", r#"{"error":{"message":"m"}}"#),
            ("status", r#"{"type":"overloaded_error","message":"m"}"#),
        ] {
            assert!(named(Some(name), data).is_some(), "{name} {data}");
        }
    }

    /// Makes errors inside errors, as objects, lists and quoted in prose.
    fn nested() -> impl Strategy<Value = Value> {
        const FIELDS: &[&str] = &[
            "error", "detail", "message", "code", "type", "param", "metadata", "raw", "loc",
        ];
        let leaf = prop_oneof![
            "[a-z_ {}\"\\\\]{0,20}".prop_map(|text| Value::from(format!("{text} SECRET!"))),
            (0..700_u16).prop_map(Value::from),
            Just(Value::from("Thread with id 'thread_1' not found SECRET!")),
            Just(Value::from("content_filter")),
        ];
        leaf.prop_recursive(12, 40, 4, |inner| {
            let field = (proptest::sample::select(FIELDS), inner.clone());
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                inner.prop_map(|value| Value::from(format!("relay: {value}. End"))),
                proptest::collection::vec(field, 0..4).prop_map(|fields| {
                    fields
                        .into_iter()
                        .map(|(name, value)| (name.to_owned(), value))
                        .collect()
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_answer_has_a_meaning_that_repeats_no_prose(
            status in 300_u16..600,
            message in "\\PC{0,60}",
            code in "\\PC{0,70}",
            wait in "\\PC{0,12}",
        ) {
            let body = serde_json::json!({"error": {"message": format!("{message} SECRET!"), "code": code}}).to_string();
            let mut map = HeaderMap::new();
            for name in ["retry-after", "retry-after-ms", "date", "x-should-retry"] {
                if let Ok(value) = http::HeaderValue::from_str(&wait) {
                    map.insert(name, value);
                }
            }
            let error = classify(StatusCode::from_u16(status).unwrap(), &map, body.as_bytes(), "x_1").error;
            let shown = format!("{error:?} {error}");
            prop_assert!(!shown.contains("SECRET!"));
        }

        #[test]
        fn nested_and_broken_bodies_have_a_meaning_that_repeats_no_prose(
            status in 300_u16..600,
            body in nested(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let text = body.to_string();
            let bytes = text.as_bytes();
            for body in [bytes, &bytes[..cut.index(bytes.len())]] {
                let error = classify(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body, "x_1").error;
                let told = ErrorDetail::of_event(None, &String::from_utf8_lossy(body))
                    .map(ErrorDetail::of_refused_stream);
                let shown = format!("{error:?} {error} {:?}", told.map(|it| it.map(|refusal| refusal.error)));
                prop_assert!(!shown.contains("SECRET!"), "{shown}");
            }
        }

        #[test]
        fn arbitrary_bytes_have_a_meaning(status in 300_u16..600, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let error = classify(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), &body, "x_1").error;
            if status >= 500 && status != 501 {
                let unavailable = matches!(error, UpstreamError::Unavailable { .. });
                prop_assert!(unavailable);
            }
        }
    }
}
