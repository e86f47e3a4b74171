//! Upstream servers, and the assistants that are reached through them.

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
    /// Without the trailing slash of a folder: `https://api.openai.com/v1`.
    #[serde(deserialize_with = "url_without_echo")]
    pub base_url: Url,
    #[serde(default)]
    pub api_key: Option<SecretString>,
    /// A file that holds the key. Read by [`Config::load`](super::Config::load), which puts the key where it
    /// belongs.
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    /// How the key is sent.
    #[serde(default)]
    pub auth: AuthScheme,
    /// Fixed headers of every request.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretString>,
    /// Fixed query parameters of every request, such as `api-version`. Some servers take their key so.
    #[serde(default)]
    pub query: BTreeMap<String, SecretString>,
    /// The server has `/conversations` (kind `responses` only). Without, each thread is a chain of responses.
    #[serde(default = "yes")]
    pub conversations: bool,
    /// Responses run in the background (kind `responses` only): they outlive a broken connection, can be cancelled,
    /// and are slower to their first token.
    #[serde(default)]
    pub background: bool,
    /// Others may write to the threads, too: before one is archived, what they wrote is put into the transcript.
    #[serde(default)]
    pub external_writers: bool,
    /// Names of tenants, users, sessions and topics are sent in clear, in the metadata of threads and responses. Without, as
    /// fingerprints.
    #[serde(default)]
    pub send_identifiers: bool,
    #[serde(
        default = "UpstreamConfig::default_connect_timeout",
        with = "humantime_serde"
    )]
    pub connect_timeout: Duration,
    /// How long the server may take to answer a call that starts no run: a list, a look at a run, a deletion. A run is
    /// waited for until its deadline, however silent the server is.
    #[serde(
        default = "UpstreamConfig::default_call_timeout",
        with = "humantime_serde"
    )]
    pub call_timeout: Duration,
    /// Largest single event of a stream, most that is put together from one, largest JSON answer, and most of several
    /// pages of a list that are needed together, bytes.
    #[serde(default = "UpstreamConfig::default_max_event_bytes")]
    pub max_event_bytes: usize,
    /// How long a thread may stay locked after its run has ended, and within which a response whose connection was
    /// dropped stops.
    #[serde(
        default = "UpstreamConfig::default_lock_window",
        with = "humantime_serde"
    )]
    pub lock_window: Duration,
    /// Least number of requests within `breaker_window` by which the breaker judges. If more than half of them have failed
    /// with all their retries, it opens: messages are refused. 0: it never opens.
    #[serde(default = "UpstreamConfig::default_breaker_min_requests")]
    pub breaker_min_requests: u32,
    /// Time for which the outcome of a request counts.
    #[serde(
        default = "UpstreamConfig::default_breaker_window",
        with = "humantime_serde"
    )]
    pub breaker_window: Duration,
    /// Time for which an open breaker refuses all messages. Then a few are let through, and what most of them meet decides.
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

/// A named profile that messages are answered with.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssistantConfig {
    /// Name of the upstream.
    pub upstream: String,
    /// The assistant's id there (kind `assistants`).
    pub assistant_id: Option<String>,
    /// The model (required for kind `responses`; replaces the assistant's own otherwise).
    pub model: Option<String>,
    pub instructions: Option<String>,
    /// Tool definitions, sent as they are.
    pub tools: Vec<serde_json::Value>,
    /// Further fields of the request that starts a run, sent as they are: `temperature`, `max_output_tokens`, …
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// Replaces `runs.timeout`.
    #[serde(with = "humantime_serde")]
    pub timeout: Option<Duration>,
    /// A message sent with a user's own token may name this assistant. The default assistant is open to every user
    /// without it.
    pub user_selectable: bool,
    /// A user's own token may send the outputs of this assistant's function calls. Otherwise only a backend may, with an
    /// API key.
    pub client_tools: bool,
}

impl UpstreamConfig {
    /// A server with defaults for everything else, and no key.
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
            connect_timeout: Self::default_connect_timeout(),
            call_timeout: Self::default_call_timeout(),
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

/// `Url`'s own reader calls its error what it expects; the text may hold a password, so it is not repeated.
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
