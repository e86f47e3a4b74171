//! Settings of upstream servers, and of the assistants on them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Deserializer};
use url::Url;

/// One upstream server.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a setting of its own"
)]
pub struct UpstreamConfig {
    pub kind: UpstreamKind,
    /// URL before every path of the protocol, such as `https://api.openai.com/v1`, without a slash at its
    /// end.
    #[serde(deserialize_with = "url_without_echo")]
    pub base_url: Url,
    #[serde(default)]
    pub api_key: Option<SecretString>,
    /// File with the key. [`Config::load`](super::Config::load) reads it into `api_key`.
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    /// Header that carries the key.
    #[serde(default)]
    pub auth: AuthScheme,
    /// Fixed headers of every request.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretString>,
    /// Fixed query parameters of every request, such as `api-version`. Some servers take their key here.
    #[serde(default)]
    pub query: BTreeMap<String, SecretString>,
    /// Whether the server has `/conversations` (kind `responses` only). If not, each thread is a chain of
    /// responses.
    #[serde(default = "yes")]
    pub conversations: bool,
    /// Whether responses run in the background (kind `responses` only). They then outlive a broken
    /// connection and can be cancelled, but their first token comes later.
    #[serde(default)]
    pub background: bool,
    /// Whether other programs write to the threads. The gateway then puts their messages into the
    /// transcript before it archives a thread.
    #[serde(default)]
    pub external_writers: bool,
    /// Whether the metadata of threads and responses names tenants, users, sessions and topics in clear,
    /// instead of by fingerprints.
    #[serde(default)]
    pub send_identifiers: bool,
    /// Whether the log has the server's own words about a refusal, up to 1 KiB and without keys. A server may
    /// quote what users said.
    #[serde(default)]
    pub log_upstream_errors: bool,
    #[serde(
        default = "UpstreamConfig::default_connect_timeout",
        with = "humantime_serde"
    )]
    pub connect_timeout: Duration,
    /// Time for a call that starts no run: a list, a look at a run, a deletion. The gateway waits for a run
    /// until its deadline, even if the server is silent.
    #[serde(
        default = "UpstreamConfig::default_call_timeout",
        with = "humantime_serde"
    )]
    pub call_timeout: Duration,
    /// Time for which the gateway keeps an idle connection for the next request. A request on a connection that
    /// the server closes at that moment breaks, so keep it shorter than the server's own keep-alive time.
    #[serde(
        default = "UpstreamConfig::default_pool_idle_timeout",
        with = "humantime_serde"
    )]
    pub pool_idle_timeout: Duration,
    /// Bytes of one event of a stream, of the text assembled from one stream, of one JSON answer, and of all
    /// pages of a list that are needed together.
    #[serde(default = "UpstreamConfig::default_max_event_bytes")]
    pub max_event_bytes: usize,
    /// Time for which a thread may stay locked at the server after its run has ended. A response without a
    /// connection counts as stopped after this time.
    #[serde(
        default = "UpstreamConfig::default_lock_window",
        with = "humantime_serde"
    )]
    pub lock_window: Duration,
    /// Least number of requests within `breaker_window` for the breaker to open. It opens, and refuses
    /// messages, if more than half of them failed with all their retries. 0: it never opens.
    #[serde(default = "UpstreamConfig::default_breaker_min_requests")]
    pub breaker_min_requests: u32,
    /// Time for which the result of a request counts.
    #[serde(
        default = "UpstreamConfig::default_breaker_window",
        with = "humantime_serde"
    )]
    pub breaker_window: Duration,
    /// Time for which an open breaker refuses all messages. Then it lets a few pass, and the result of most
    /// of them decides.
    #[serde(
        default = "UpstreamConfig::default_breaker_open_duration",
        with = "humantime_serde"
    )]
    pub breaker_open_duration: Duration,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamKind {
    /// Assistants v2: threads, messages, runs.
    Assistants,
    /// Conversations + Responses.
    Responses,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum AuthScheme {
    /// `Authorization: Bearer <key>`.
    #[default]
    Bearer,
    /// `api-key: <key>`.
    ApiKey,
}

/// An assistant: the model, instructions and tools that answer messages.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssistantConfig {
    /// Name of the upstream.
    pub upstream: String,
    /// Id of the assistant at the server (kind `assistants`).
    pub assistant_id: Option<String>,
    /// Name of the model. Required for kind `responses`. For kind `assistants`, replaces the assistant's own.
    pub model: Option<String>,
    pub instructions: Option<String>,
    /// Tool definitions, sent unchanged.
    pub tools: Vec<serde_json::Value>,
    /// Further fields of the request that starts a run, sent unchanged: `temperature`,
    /// `max_output_tokens`, …
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// Time limit of a run, instead of `runs.timeout`.
    #[serde(with = "humantime_serde")]
    pub timeout: Option<Duration>,
    /// Whether a message with a user's own token may name this assistant. The default assistant is open to
    /// every user anyway.
    pub user_selectable: bool,
    /// Whether a user's own token may send the outputs of this assistant's function calls. If not, only a
    /// backend may, with an API key.
    pub client_tools: bool,
}

impl UpstreamConfig {
    /// Returns the settings of a server without a key, with defaults for everything else.
    pub fn new(kind: UpstreamKind, base_url: Url) -> Self {
        Self {
            kind,
            base_url,
            api_key: None,
            api_key_file: None,
            auth: AuthScheme::default(),
            headers: BTreeMap::new(),
            query: BTreeMap::new(),
            conversations: true,
            background: false,
            external_writers: false,
            send_identifiers: false,
            log_upstream_errors: false,
            connect_timeout: Self::default_connect_timeout(),
            call_timeout: Self::default_call_timeout(),
            pool_idle_timeout: Self::default_pool_idle_timeout(),
            max_event_bytes: Self::default_max_event_bytes(),
            lock_window: Self::default_lock_window(),
            breaker_min_requests: Self::default_breaker_min_requests(),
            breaker_window: Self::default_breaker_window(),
            breaker_open_duration: Self::default_breaker_open_duration(),
        }
    }

    pub(super) fn default_connect_timeout() -> Duration {
        Duration::from_secs(5)
    }

    pub(super) fn default_call_timeout() -> Duration {
        Duration::from_mins(1)
    }

    pub(super) fn default_pool_idle_timeout() -> Duration {
        Duration::from_secs(4)
    }

    pub(super) fn default_max_event_bytes() -> usize {
        16 * 1024 * 1024
    }

    pub(super) fn default_lock_window() -> Duration {
        Duration::from_secs(10)
    }

    pub(super) fn default_breaker_min_requests() -> u32 {
        10
    }

    pub(super) fn default_breaker_window() -> Duration {
        Duration::from_secs(10)
    }

    pub(super) fn default_breaker_open_duration() -> Duration {
        Duration::from_secs(2)
    }
}

fn yes() -> bool {
    true
}

/// Reads a URL. `Url`'s own reader would repeat the text in its error, and the text may contain a password.
pub(super) fn url_without_echo<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Url, D::Error> {
    let text = String::deserialize(deserializer)?;
    Url::parse(&text).map_err(|error| serde::de::Error::custom(format_args!("not a URL: {error}")))
}

pub(super) fn optional_url<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Url>, D::Error> {
    url_without_echo(deserializer).map(Some)
}
