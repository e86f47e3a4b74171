//! Classifies a refusal: from status, headers and body to a [`Rejection`]. Pure; keeps none of
//! the server's prose.

use std::time::Duration;

use chrono::DateTime;
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value};

use crate::domain::UpstreamRunId;
use crate::upstream::error::UpstreamError;

/// Codes of a 429 for which waiting does not help.
const QUOTA_CODES: [&str; 5] = [
    "insufficient_quota",
    "credit_balance_exhausted",
    "billing_hard_limit_reached",
    "billing_not_active",
    "quota_exceeded",
];

/// Fragments of codes and types for which waiting helps, in lower case and without separators. Up
/// to index 4 they mean a rate limit (429), the others an overload (503).
const PASSING_WORDS: [&str; 12] = [
    "ratelimit",
    "toomanyrequests",
    "throttl",
    "resourceexhausted",
    "429",
    "overloaded",
    "slowdown",
    "serverbusy",
    "serviceunavailable",
    "nocapacity",
    "503",
    "529",
];
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
/// The only fields of an error object that stands without a wrapper.
const ERROR_FIELDS: [&str; 8] = [
    "message", "detail", "code", "type", "param", "status", "object", "title",
];

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
    /// A function call without an output.
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
    let missing = match &detail {
        Some(detail) => detail.says_missing(status, asked),
        None => says_missing(status, std::str::from_utf8(body).unwrap_or_default(), asked),
    };
    let detail = detail.unwrap_or_default();
    let damage = detail.damage().filter(|_| status.is_client_error());
    Rejection {
        error: meaning(status, headers, detail, missing),
        damage,
    }
}

fn meaning(
    status: StatusCode,
    headers: &HeaderMap,
    detail: ErrorDetail,
    missing: bool,
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
    if status == StatusCode::TOO_MANY_REQUESTS {
        let quota = should_retry.map_or_else(|| detail.is_quota(), |retry| !retry);
        return UpstreamError::RateLimited {
            retry_after: retry_after(headers).or_else(|| pause_in(&detail.message)),
            quota,
            code: detail.code,
        };
    }
    if client_error && detail.names_missing_thread(status) {
        return UpstreamError::ThreadGone;
    }
    if matches!(status, StatusCode::CONFLICT | StatusCode::LOCKED)
        || (client_error && detail.is_conflict())
    {
        return UpstreamError::Busy {
            blocking_run: detail.blocking_run(),
        };
    }
    // After a 408 (the server gave up waiting) the fate of the request is as unknown as after a
    // 5xx.
    let is_broken = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
    if is_broken || status == StatusCode::REQUEST_TIMEOUT {
        return UpstreamError::Unavailable {
            status: status.as_u16(),
            retry_after: retry_after(headers),
            no_retry: should_retry == Some(false),
            code: detail.code,
        };
    }
    UpstreamError::Refused {
        status: status.as_u16(),
        code: detail.code,
        missing,
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

/// The details of an error: from the body of an answer, from an `error` event, or from inside a
/// run or response.
#[derive(Clone, Debug, Default)]
pub(super) struct ErrorDetail {
    /// The error's code, if [`token`] lets it pass.
    pub(super) code: Option<String>,
    kind: Option<String>,
    /// The server's prose. It serves to tell cases apart and is never passed on.
    message: String,
    /// The error is an object as the protocols describe it, not an error page or a framework's
    /// own shape.
    shaped: bool,
}

impl ErrorDetail {
    /// Reads a body in any of the known forms. Returns `None` if it is not a JSON object.
    fn from_body(body: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Map<String, Value>>(body)
            .ok()
            .map(|object| Self::from_object(&object))
    }

    /// Reads an event that does not belong to the protocol. Returns `None` if it is no error.
    ///
    /// A proxy, or a server that fails before it speaks the protocol, writes its errors so. An
    /// event with another `name` (a server's `status`, `ping` or `progress`) counts as an error
    /// only if it cannot be anything else.
    pub(super) fn of_event(name: Option<&str>, data: &str) -> Option<Self> {
        let object: Map<String, Value> = serde_json::from_str(data).ok()?;
        let is_named = name.is_some_and(|name| {
            !name.is_empty() && name != "message" && !name.to_ascii_lowercase().contains("error")
        });
        let is_all = || {
            object
                .keys()
                .all(|key| key == "error" || ERROR_FIELDS.contains(&key.as_str()))
        };
        let is_error = match object.get("error") {
            Some(Value::Object(_)) => !is_named || is_all(),
            Some(Value::String(text)) => !text.is_empty() && (!is_named || is_all()),
            _ => stands_alone(&object) && (!is_named || is_called_error(&object)),
        };
        is_error.then(|| Self::from_object(&object))
    }

    /// Reads `{"error": {…}}`, the bare `{"message": …, "type": …}`, and their relatives:
    /// `{"error": "…"}`, and `{"detail": …}` with either inside.
    pub(super) fn from_object(object: &Map<String, Value>) -> Self {
        if let (None, Some(Value::Object(detail))) = (object.get("error"), object.get("detail")) {
            return Self {
                shaped: false,
                ..Self::from_object(detail)
            };
        }
        let inner = object.get("error").and_then(Value::as_object);
        let error = inner.unwrap_or(object);
        let text = |key: &str| error.get(key).and_then(Value::as_str);
        let message = text("message")
            .or_else(|| text("error"))
            .or_else(|| text("detail"));
        let code = match error.get("code") {
            Some(Value::String(code)) => token(code),
            Some(Value::Number(code)) => token(&code.to_string()),
            _ => None,
        };
        let marked = ["type", "code", "param"]
            .iter()
            .any(|key| error.contains_key(*key));
        Self {
            code,
            kind: text("type").map(str::to_owned),
            message: message.unwrap_or_default().to_owned(),
            shaped: text("message").is_some() && (inner.is_some() || marked),
        }
    }

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

    fn meaning_without_status(self) -> Result<UpstreamError, Option<String>> {
        if self.names_missing_thread(StatusCode::NOT_FOUND) {
            return Ok(UpstreamError::ThreadGone);
        }
        if self.is_conflict() {
            return Ok(UpstreamError::Busy {
                blocking_run: self.blocking_run(),
            });
        }
        let is =
            |word: &str| self.code.as_deref() == Some(word) || self.kind.as_deref() == Some(word);
        if self.is_quota() {
            let code = self.word();
            return Ok(UpstreamError::RateLimited {
                retry_after: None,
                quota: true,
                code,
            });
        }
        // The status was 200, so the server may have taken the request.
        if let Some(status) = self.passes() {
            let code = self.word();
            return Ok(UpstreamError::Unavailable {
                status,
                retry_after: None,
                no_retry: false,
                code,
            });
        }
        // Some servers put the status that they would have sent into the code.
        match self.code.as_deref().and_then(|code| code.parse().ok()) {
            Some(409 | 423) => {
                return Ok(UpstreamError::Busy {
                    blocking_run: self.blocking_run(),
                });
            }
            Some(status @ 400..500) if status != 408 => {
                let code = self.kind.as_deref().and_then(token);
                return Ok(UpstreamError::Refused {
                    status,
                    code,
                    missing: false,
                });
            }
            _ => {}
        }
        if is("invalid_request_error") || is("invalid_prompt") || self.damage().is_some() {
            return Ok(UpstreamError::Refused {
                status: 400,
                code: self.code,
                missing: false,
            });
        }
        Err(self.word())
    }

    /// Returns the failure of a run that the server had accepted, if it may pass. Then the same
    /// messages may succeed in another run.
    pub(super) fn passing(&self) -> Option<UpstreamError> {
        if self.is_quota() || self.damage().is_some() {
            return None;
        }
        let retry_after = pause_in(&self.message);
        let code = self.word();
        let status = self
            .passes()
            .or_else(|| self.has_word(&FAILURE_WORDS).then_some(500))?;
        Some(if status == 429 {
            UpstreamError::RateLimited {
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

    /// Returns true if the code or the type is one of these words, apart from case and separators.
    fn has_word(&self, known: &[&str]) -> bool {
        let mut words = [&self.code, &self.kind].into_iter().flatten();
        words.any(|word| known.contains(&plain(word).as_str()))
    }

    /// Returns the status that matches the error, if waiting helps.
    fn passes(&self) -> Option<u16> {
        let words = [&self.code, &self.kind].into_iter().flatten();
        let at = words
            .map(|word| plain(word))
            .filter_map(|word| PASSING_WORDS.iter().position(|known| word.contains(known)))
            .min()?;
        Some(if at <= 4 { 429 } else { 503 })
    }

    /// Returns the code, or else the type of the error, if [`token`] lets it pass.
    pub(super) fn word(&self) -> Option<String> {
        self.code
            .clone()
            .or_else(|| self.kind.as_deref().and_then(token))
    }

    fn is_quota(&self) -> bool {
        [&self.code, &self.kind]
            .into_iter()
            .flatten()
            .any(|word| QUOTA_CODES.contains(&word.as_str()))
    }

    /// Returns true if another run or response holds the thread. Servers report that with a code,
    /// or only in prose.
    fn is_conflict(&self) -> bool {
        if self.code.as_deref() == Some("conversation_locked") {
            return true;
        }
        let message = self.message.to_ascii_lowercase();
        let has = |text: &str| message.contains(text);
        has("already has an active run")
            || (has("add messages to") && has("while a run"))
            || has("currently operating on this conversation")
            || ((has("in-progress response") || has("in progress response")) && has("exist"))
    }

    /// Returns the damage of the conversation, if the error is about that.
    pub(super) fn damage(&self) -> Option<Damage> {
        let message = self.message.to_ascii_lowercase();
        let has = |text: &str| message.contains(text);
        if has("no tool output found for") {
            Some(Damage::OpenCall)
        } else if has("reasoning") && has("without its required following item") {
            Some(Damage::OrphanedReasoning(self.named("rs_")))
        } else {
            None
        }
    }

    /// Returns the run that the text of a conflict names.
    fn blocking_run(&self) -> Option<UpstreamRunId> {
        self.named("run_").map(UpstreamRunId)
    }

    /// Returns the first id in the text with this prefix.
    fn named(&self, prefix: &str) -> Option<String> {
        self.message
            .split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-')))
            .find(|word| word.len() > prefix.len() && word.len() <= 128 && word.starts_with(prefix))
            .map(str::to_owned)
    }

    /// Returns true if the requested object does not exist, by the text or by a code such as
    /// `response_not_found`.
    fn says_missing(&self, status: StatusCode, asked: &str) -> bool {
        let of = |code: &str| {
            NOUNS
                .into_iter()
                .any(|noun| code.strip_suffix("_not_found") == Some(noun))
        };
        let by_code = status.is_client_error() && self.code.as_deref().is_some_and(of);
        by_code || says_missing(status, &self.message, asked)
    }

    /// Returns true if the error says that the thread, conversation or previous response itself
    /// does not exist. A missing endpoint or another missing object does not count: the gateway
    /// gives an upstream thread up only on evidence.
    fn names_missing_thread(&self, status: StatusCode) -> bool {
        if !self.shaped {
            return false;
        }
        if self.code.as_deref() == Some("previous_response_not_found") {
            return true;
        }
        if !matches!(status, StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST) {
            return false;
        }
        let message = self.message.to_ascii_lowercase();
        let words: Vec<&str> = message
            .split_whitespace()
            .map(|word| word.trim_matches(|c: char| !(c.is_alphanumeric() || c == '_')))
            .collect();
        let (missing_first, words) = match words.as_slice() {
            ["no", rest @ ..] => (true, rest),
            ["previous", "response", ..] => (false, &words[1..]),
            rest => (false, rest),
        };
        let [noun, rest @ ..] = words else {
            return false;
        };
        if !matches!(*noun, "thread" | "conversation" | "response") {
            return false;
        }
        match rest {
            ["found", "with", "id", id, ..] => missing_first && is_id(id),
            ["with", "id", id, "not", "found", ..]
            | ["with", "id", id, "was", "not", "found", ..]
            | ["with", "id", id, "does", "not", "exist", ..]
            | [id, "not", "found", ..]
            | [id, "was", "not", "found", ..]
            | [id, "does", "not", "exist", ..] => !missing_first && is_id(id),
            _ => false,
        }
    }
}

/// Returns true if the object is an error without a wrapper, and cannot be anything else.
fn stands_alone(object: &Map<String, Value>) -> bool {
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    (has("message") || has("detail"))
        && object
            .keys()
            .all(|key| ERROR_FIELDS.contains(&key.as_str()))
        && (is_called_error(object) || has("code") || (!has("type") && !has("object")))
}

/// Returns true if the object's `type` or `object` names it an error.
fn is_called_error(object: &Map<String, Value>) -> bool {
    let kind = |key: &str| {
        object
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_ascii_lowercase)
    };
    ["type", "object"]
        .iter()
        .any(|key| kind(key).is_some_and(|it| it.contains("error")))
}

/// Returns the text if it is safe to show: at most 64 characters, words and short numbers with
/// `_`, `.` or `-` between them. A server may echo a key, or a piece of it, in the place of a
/// code. Keys do not have this form.
pub(super) fn token(text: &str) -> Option<String> {
    const LONGEST_WORD: usize = 32;
    const LONGEST_NUMBER: usize = 4;
    let is_word = |part: &str| {
        let letters = part.trim_end_matches(|c: char| c.is_ascii_digit());
        letters.len() <= LONGEST_WORD
            && part.len() - letters.len() <= LONGEST_NUMBER
            && letters.bytes().all(|byte| byte.is_ascii_alphabetic())
    };
    ((1..=64).contains(&text.len()) && text.split(['_', '.', '-']).all(is_word))
        .then(|| text.to_owned())
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

/// Returns a word in lower case, without separators.
fn plain(word: &str) -> String {
    word.to_ascii_lowercase().replace(['_', '-', '.', ' '], "")
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
            match ErrorDetail::from_object(error.as_object().unwrap()).passing()? {
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
                format!("{failed} 429 (429)"),
            ),
            (
                r#"{"error":{"type":"overloaded_error","message":"m"}}"#,
                format!("{failed} 503 (overloaded_error)"),
            ),
            (
                r#"{"object":"error","message":"m","type":"ServiceUnavailable","code":503}"#,
                format!("{failed} 503 (503)"),
            ),
            (
                r#"{"error":{"type":"insufficient_quota","message":"m"}}"#,
                "the upstream limits the rate (insufficient_quota)".to_owned(),
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
                "the upstream refused the request with status 401".to_owned(),
            ),
            // An error after a 200 that names nothing known is the end of the run.
            (
                r#"{"error":{"type":"server_error","message":"m"}}"#,
                "failed server_error".to_owned(),
            ),
            (
                r#"{"error":{"code":"content_filter","message":"m"}}"#,
                "failed content_filter".to_owned(),
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
                r#"{"error":"Thread t already has an active run run_9."}"#,
                "the upstream thread is held by another run".to_owned(),
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
        fn arbitrary_bytes_have_a_meaning(status in 300_u16..600, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let error = classify(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), &body, "x_1").error;
            if status >= 500 && status != 501 {
                let unavailable = matches!(error, UpstreamError::Unavailable { .. });
                prop_assert!(unavailable);
            }
        }
    }
}
