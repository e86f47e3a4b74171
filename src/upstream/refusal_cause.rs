//! What a refusal is about, by the codes and sentences of the servers and relays that people use.
//! Pure.
//!
//! The tables hold the words of OpenAI, Azure, Gemini, Mistral and xAI, of vLLM, `SGLang`,
//! llama.cpp, LM Studio and Ollama, and of the relays `LiteLLM` and `OpenRouter`. Codes stand in
//! lower case and without separators, sentences in lower case.

use crate::upstream::error::{RefusalCause, UpstreamError};
use crate::upstream::error_detail::{ErrorDetail, plain};

/// Codes for which waiting does not help, because the account has no more money.
const QUOTA_CODES: &[&str] = &[
    "insufficientquota",
    "creditbalanceexhausted",
    "billinghardlimitreached",
    "billingnotactive",
    "quotaexceeded",
    "insufficientcredits",
    "insufficientbalance",
    "budgetexceeded",
];
const QUOTA_TEXTS: &[&str] = &[
    "exceeded your current quota",
    "insufficient credit",
    "insufficient balance",
    "credit balance is too low",
    "requires more credits",
    "used all available credits",
    "out of credits",
    "budget has been exceeded",
    "over budget",
];

/// Fragments of codes and types for which waiting helps. Up to index 4 they mean a rate limit
/// (429), the others an overload (503).
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

const THREAD_CODES: &[&str] = &["invalidencryptedcontent"];
const THREAD_TEXTS: &[&str] = &[
    "zero data retention",
    "expected an id that begins with",
    "do not have an approval",
    "approval request",
    "no tool output found for",
    "no tool call found for",
    "must be followed by tool messages",
    "preceding message with 'tool_calls'",
    "tool_result",
    "without its required",
    "items are not persisted",
    "encrypted content",
    "previous response",
    "previous_response_id",
    "belongs to a different",
    "belongs to another",
    "does not belong to",
];
/// Fields of a request that name the thread.
const THREAD_FIELDS: &[&str] = &[
    "conversation",
    "conversation_id",
    "previous_response_id",
    "response_id",
    "thread",
    "thread_id",
];

const CONTEXT_CODES: &[&str] = &[
    "contextlengthexceeded",
    "contextwindowexceeded",
    "contextwindowexceedederror",
    "exceedcontextsizeerror",
    "requesttoolarge",
    "payloadtoolarge",
    "requestentitytoolarge",
    "tokenslimitreached",
    "prompttoolong",
    "inputtoolong",
];
const CONTEXT_TEXTS: &[&str] = &[
    "context window",
    "context length",
    "context size",
    "maximum prompt length",
    "max_model_len",
    "maximum model length",
    "prompt is too long",
    "input is too long",
    "prompt too long",
    "input too long",
    "too many tokens",
    "too many input tokens",
    "input token count",
    "input tokens exceed",
    "reduce the length of",
    "request too large",
    "request is too large",
    "request entity too large",
    "payload too large",
    "content too large",
    "body is too large",
    "too many items",
];
/// Limits of one field. The caller can keep to them only if the field is the input.
const LENGTH_CODES: &[&str] = &[
    "stringabovemaxlength",
    "arrayabovemaxlength",
    "stringtoolong",
    "listtoolong",
];
const LENGTH_TEXTS: &[&str] = &[
    "string too long",
    "array too long",
    "list should have at most",
];

const POLICY_CODES: &[&str] = &[
    "contentfilter",
    "contentfiltered",
    "contentpolicyviolation",
    "contentpolicyviolationerror",
    "responsibleaipolicyviolation",
    "invalidprompt",
    "imagecontentpolicyviolation",
    "moderationblocked",
    "datainspectionfailed",
];
const POLICY_TEXTS: &[&str] = &[
    "content management policy",
    "content policy",
    "content filter",
    "responsible ai",
    "usage policy",
    "usage policies",
    "usage guidelines",
    "safety system",
    "requires moderation",
    "was flagged",
    "inappropriate content",
];

const MEDIA_CODES: &[&str] = &[
    "invalidimage",
    "invalidimageurl",
    "invalidimageformat",
    "invalidbase64image",
    "imageparseerror",
    "imagetoolarge",
    "imagetoosmall",
    "imagefiletoolarge",
    "imagefilenotfound",
    "emptyimagefile",
    "failedtodownloadimage",
    "unsupportedimagemediatype",
    "unsupportedfile",
    "unsupportedfiletype",
    "invalidfile",
    "invalidfileid",
    "filenotfound",
    "emptyfile",
];
const MEDIA_TEXTS: &[&str] = &[
    "error while downloading",
    "timeout while downloading",
    "failed to download",
    "could not process image",
    "cannot identify image",
    "not a valid image",
    "not a multimodal model",
    "no such file",
    "unsupported file",
    "file type",
];
/// Fields of a picture or file.
const MEDIA_FIELDS: &[&str] = &["image", "file_id", "file_url", "file_data"];
/// Words for a picture or file, and what may be wrong with it.
const PICTURE_WORDS: &[&str] = &[
    "image",
    "images",
    "image_url",
    "input_image",
    "input_file",
    "picture",
];
const PICTURE_TEXTS: &[&str] = &[
    "download",
    "fetch",
    "decode",
    "unable to process",
    "parse",
    "not support",
    "that support",
    "unsupported",
    "only supported",
    "invalid",
    "corrupt",
    "valid image",
    "too large",
    "too many",
    "at most",
    "exceeds",
];

const CONFIGURATION_CODES: &[&str] = &[
    "invalidapikey",
    "authenticationerror",
    "permissionerror",
    "permissiondenied",
    "permissiondeniederror",
    "unsupportedcountryregionterritory",
    "unsupportedapiversion",
    "unknownurl",
    "accountdeactivated",
    "organizationdeactivated",
];
const MODEL_CODES: &[&str] = &[
    "modelnotfound",
    "modelnotavailable",
    "modelnotsupported",
    "invalidmodel",
    "deploymentnotfound",
];
const CONFIGURATION_TEXTS: &[&str] = &[
    "api key",
    "must be verified",
    "have access to",
    "unsupported country",
    "country, region",
    "user location is not supported",
    "unsupported parameter",
    "unrecognized request argument",
    "unknown parameter",
    "invalid url",
    "requested url",
    "cannot post",
    "data policy",
    "invalid model",
    "valid model",
    "no models loaded",
];
/// Objects that the configuration names, and the caller does not.
const CONFIGURED_NOUNS: &[&str] = &["model", "deployment", "assistant", "store", "endpoint"];
/// Fields of a request that carry what the users said. All others are the configuration's.
const INPUT_FIELDS: &[&str] = &[
    "additional_messages",
    "attachments",
    "body",
    "content",
    "file",
    "file_data",
    "file_id",
    "file_url",
    "image",
    "image_file",
    "image_url",
    "input",
    "input_tokens",
    "item",
    "item_id",
    "items",
    "messages",
    "prompt",
    "role",
    "tool_outputs",
    "url",
];

/// Returns true if the account has no more money.
pub(super) fn is_quota(detail: &ErrorDetail) -> bool {
    detail.is_called(QUOTA_CODES) || detail.says(QUOTA_TEXTS)
}

/// Returns what the operator may do about a refusal: the setting to check, or who must act.
pub(super) fn hint(detail: &ErrorDetail, error: &UpstreamError) -> Option<&'static str> {
    let (status, cause) = match error {
        UpstreamError::RateLimited { quota: true, .. } => {
            return Some(
                "the account at the server has no quota left: its owner must add credit or raise the limit",
            );
        }
        UpstreamError::Refused { status, cause, .. } => (*status, *cause),
        _ => return None,
    };
    let words = detail.words();
    let lacks = |nouns: &[&str]| nouns.iter().any(|noun| is_missing(&words, noun));
    let names = |field: &str| detail.params().any(|param| param == field);
    let hint = match status {
        300..=399 => {
            "the server redirects, and the gateway does not follow: `base_url` must be the last address"
        }
        _ if cause != RefusalCause::Configuration => return None,
        _ if detail.says(&["must be verified"]) => {
            "the organisation must be verified by its owner before it may use this model so: verify it, or \
             choose another `model`"
        }
        _ if names("stream") => "the model does not stream: choose another `model`",
        401 => "the server does not accept the key: check `api_key` or `api_key_file`, and `auth`",
        403 => {
            "the key may not do this: check `api_key` or `api_key_file`, and what its account may use"
        }
        _ if detail.says(&["api key"]) => {
            "the server does not accept the key: check `api_key` or `api_key_file`, and `auth`"
        }
        _ if names("model") || detail.is_called(MODEL_CODES) || lacks(&["model", "deployment"]) => {
            "the server does not know this model, or the account may not use it: check the assistant's `model`"
        }
        _ if lacks(&["assistant"]) => {
            "the server does not know this assistant: check the assistant's `assistant_id`"
        }
        404 | 405 | 501 => "the server has no such path: check `base_url`: should it end in /v1?",
        _ if detail.params().next().is_some() => {
            "the server does not take a field of the request: check the assistant's `parameters` and `tools`"
        }
        _ => return None,
    };
    Some(hint)
}

/// Returns the status that matches the error, if waiting helps.
pub(super) fn passes(detail: &ErrorDetail) -> Option<u16> {
    let at = detail
        .codes_and_kinds()
        .map(plain)
        .filter_map(|word| PASSING_WORDS.iter().position(|known| word.contains(known)))
        .min()?;
    Some(if at <= 4 { 429 } else { 503 })
}

/// Returns true if the request alone is larger than the rate limit. Then waiting does not help.
pub(super) fn exceeds_rate_alone(detail: &ErrorDetail) -> bool {
    detail.says(&["request too large", "request is too large"])
}

/// Returns true if a field of the request that the error names is the thread's.
pub(super) fn is_thread_field(param: &str) -> bool {
    THREAD_FIELDS.contains(&param)
}

/// Returns what a refusal with this status is about. The narrower statement decides: a filter
/// answers with 403 too, and a picture that cannot be fetched with 400 or 404.
pub(super) fn cause(detail: &ErrorDetail, status: u16) -> RefusalCause {
    let words = detail.words();
    let configured = |param: &str| !INPUT_FIELDS.contains(&param) && !is_thread_field(param);
    let names_setting = detail.params().any(configured);
    let names_picture = || words.iter().any(|word| PICTURE_WORDS.contains(word));
    let lacks = |nouns: &[&str]| nouns.iter().any(|noun| is_missing(&words, noun));

    if status == 413 || detail.is_called(CONTEXT_CODES) || detail.says(CONTEXT_TEXTS) {
        RefusalCause::Size
    } else if detail.is_called(THREAD_CODES)
        || detail.says(THREAD_TEXTS)
        || detail.params().any(is_thread_field)
        || lacks(&["thread", "conversation", "response", "item", "message"])
    {
        RefusalCause::Thread
    } else if detail.is_called(POLICY_CODES) || detail.says(POLICY_TEXTS) {
        RefusalCause::Policy
    } else if names_setting {
        RefusalCause::Configuration
    } else if detail.is_called(MEDIA_CODES)
        || detail.says(MEDIA_TEXTS)
        || detail.param_has(MEDIA_FIELDS)
        || lacks(&["file", "files"])
        || (names_picture() && detail.says(PICTURE_TEXTS))
    {
        RefusalCause::Media
    } else if detail.is_called(LENGTH_CODES) || detail.says(LENGTH_TEXTS) {
        RefusalCause::Size
    } else if is_configuration(status, detail)
        || detail.is_called(CONFIGURATION_CODES)
        || detail.is_called(MODEL_CODES)
        || detail.says(CONFIGURATION_TEXTS)
        || CONFIGURED_NOUNS
            .iter()
            .any(|noun| is_missing(&words, noun) || is_not_offered(&words, noun))
    {
        RefusalCause::Configuration
    } else {
        RefusalCause::Unknown
    }
}

/// Returns true if the status alone says that no input would be taken. A 404 does if nothing
/// else is said than that, as frameworks say it of unknown paths.
fn is_configuration(status: u16, detail: &ErrorDetail) -> bool {
    let says_nothing = || {
        detail.layers.iter().all(|layer| {
            let words = layer.lower_words();
            let known = ["error", "not", "found", "page", "resource", "the", "path"];
            words
                .iter()
                .all(|word| known.contains(&word.as_str()) || word == "404")
        })
    };
    match status {
        300..=399 | 401..=403 | 405 | 451 | 501 => true,
        404 => says_nothing() || detail.says(&["route", "method not allowed"]),
        _ => false,
    }
}

/// Words that may stand between a noun and what is said of it: an id, or `with id …`.
const BETWEEN: usize = 8;

/// Returns true if the words say that an object of this kind does not exist.
fn is_missing(words: &[&str], noun: &str) -> bool {
    words.iter().enumerate().any(|(at, word)| {
        if *word != noun || is_place(words, at) {
            return false;
        }
        let before = at.checked_sub(1).map(|at| words[at]);
        let after = said_after(words, at);
        matches!(before, Some("such" | "unknown"))
            || (before == Some("no") && after.first() == Some(&"found"))
            || after.windows(2).any(|pair| {
                matches!(
                    pair,
                    ["not", "found" | "exist" | "exists"] | ["no", "longer"]
                )
            })
    })
}

/// Returns true if the words say that an object of this kind is not for this account or server.
fn is_not_offered(words: &[&str], noun: &str) -> bool {
    words.iter().enumerate().any(|(at, word)| {
        *word == noun
            && said_after(words, at).windows(2).any(|pair| {
                matches!(
                    pair,
                    ["not", "available" | "supported" | "allowed" | "loaded"]
                )
            })
    })
}

/// Returns what is said of the noun at this place, up to the next noun of another kind.
fn said_after<'a>(words: &'a [&'a str], at: usize) -> &'a [&'a str] {
    const OTHERS: [&str; 3] = ["file", "run", "tool"];
    let after = &words[at + 1..(at + 3 + BETWEEN).min(words.len())];
    let is_other = |word: &&str| CONFIGURED_NOUNS.contains(word) || OTHERS.contains(word);
    &after[..after.iter().position(is_other).unwrap_or(after.len())]
}

/// Returns true if the noun at this place is only the place of another thing: "the run in thread
/// … was not found".
pub(super) fn is_place(words: &[&str], at: usize) -> bool {
    let mut before = &words[..at];
    while let [
        rest @ ..,
        "previous" | "stored" | "the" | "this" | "requested",
    ] = before
    {
        before = rest;
    }
    matches!(
        before.last(),
        Some(
            &("in"
                | "of"
                | "for"
                | "from"
                | "on"
                | "to"
                | "by"
                | "with"
                | "and"
                | "or"
                | "within"
                | "under"
                | "inside"
                | "using"
                | "via"
                | "at")
        )
    )
}
