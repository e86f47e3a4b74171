//! Typed settings. Defaults < file < environment; every problem is reported at once.
//!
//! `config/gateway.toml` lists every setting with its default.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

/// All settings of the gateway.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Config {
    pub server: ServerConfig,
    pub store: StoreConfig,
    pub log: LogConfig,
    pub runs: RunsConfig,
    pub sessions: SessionsConfig,
    pub replica: ReplicaConfig,
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    pub assistants: BTreeMap<String, AssistantConfig>,
}

/// The HTTP server.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ServerConfig {
    pub listen: SocketAddr,
    /// Serve callers on other machines although nobody has to prove who they are.
    pub allow_unauthenticated: bool,
    /// Open connections; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Time for a request's head to arrive, counted also between two requests of a kept-alive connection: keep
    /// it longer than the load balancer's idle time.
    #[serde(with = "humantime_serde")]
    pub header_read_timeout: Duration,
    /// Longest silence while a request's body arrives.
    #[serde(with = "humantime_serde")]
    pub body_read_timeout: Duration,
    /// Largest request body, bytes.
    pub max_body_bytes: usize,
    /// Largest request head, bytes.
    pub max_header_bytes: usize,
    /// Comment interval of an idle event stream.
    #[serde(with = "humantime_serde")]
    pub keep_alive: Duration,
    /// Time for running turns to end after SIGTERM.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
}

/// The database.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct StoreConfig {
    /// `postgres://…` or `sqlite:<path>`. A secret: it may hold a password.
    pub url: Option<SecretString>,
    /// Connections of the pool (Postgres), or readers (SQLite).
    pub max_connections: u32,
    /// Longest wait for a free connection.
    #[serde(with = "humantime_serde")]
    pub acquire_timeout: Duration,
    /// How long `serve` waits at start for a database that is not up yet.
    #[serde(with = "humantime_serde")]
    pub startup_timeout: Duration,
    /// Bring the schema up to date at start. If false, `serve` refuses to start on an old one.
    pub migrate_on_start: bool,
    /// SQLite only: `normal` (a power loss may lose the last commits) or `full`.
    pub synchronous: Synchronous,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Synchronous {
    Normal,
    Full,
}

/// Logs. They go to standard error.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    /// As in `RUST_LOG`: `info`, `threadkeeper=debug,info`, …
    pub filter: String,
    /// `json`, `pretty`, or unset: json for `serve`, pretty for `dev`.
    pub format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Json,
    Pretty,
}

/// How runs are queued and bounded.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct RunsConfig {
    /// How long a run may take once it has started, unless its assistant or its request says otherwise.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// The longest that a request may ask for.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
    /// Runs that may wait on one thread in this process.
    pub max_queue: usize,
    /// How long to try to end at the upstream what a run left behind.
    #[serde(with = "humantime_serde")]
    pub settle_timeout: Duration,
    /// Largest reply, bytes of text.
    pub max_reply_bytes: usize,
}

/// Session conversations.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SessionsConfig {
    /// Life of a session's thread, from its creation.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
}

/// This process among its peers.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ReplicaConfig {
    /// A replica that has not renewed its session for so long counts as dead.
    #[serde(with = "humantime_serde")]
    pub session_ttl: Duration,
}

/// One upstream server.
#[derive(Clone, Debug, Deserialize)]
pub struct UpstreamConfig {
    pub kind: UpstreamKind,
    /// Without the trailing slash of a folder: `https://api.openai.com/v1`.
    pub base_url: Url,
    #[serde(default)]
    pub api_key: Option<SecretString>,
    #[serde(default)]
    pub api_key_file: Option<PathBuf>,
    /// How the key is sent.
    #[serde(default)]
    pub auth: AuthScheme,
    /// Fixed headers of every request.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretString>,
    /// Fixed query parameters of every request, such as `api-version`.
    #[serde(default)]
    pub query: BTreeMap<String, String>,
    /// The server has `/conversations` (kind `responses` only). Without, each thread is a chain of responses.
    #[serde(default = "yes")]
    pub conversations: bool,
    #[serde(default = "UpstreamConfig::default_connect_timeout", with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Longest silence of the server, before its answer or between two events.
    #[serde(default = "UpstreamConfig::default_idle_timeout", with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Largest single event of a stream, and largest JSON answer, bytes.
    #[serde(default = "UpstreamConfig::default_max_event_bytes")]
    pub max_event_bytes: usize,
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
#[serde(default)]
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
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            allow_unauthenticated: false,
            max_connections: 10_240,
            header_read_timeout: Duration::from_secs(75),
            body_read_timeout: Duration::from_secs(30),
            max_body_bytes: 1024 * 1024,
            max_header_bytes: 32 * 1024,
            keep_alive: Duration::from_secs(15),
            shutdown_grace: Duration::from_secs(25),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: None,
            max_connections: 16,
            acquire_timeout: Duration::from_secs(5),
            startup_timeout: Duration::from_secs(30),
            migrate_on_start: true,
            synchronous: Synchronous::Normal,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: None }
    }
}

impl Default for RunsConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_mins(2),
            max_timeout: Duration::from_mins(10),
            max_queue: 256,
            settle_timeout: Duration::from_secs(10),
            max_reply_bytes: 4 * 1024 * 1024,
        }
    }
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self { ttl: Duration::from_hours(24) }
    }
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self { session_ttl: Duration::from_secs(10) }
    }
}

impl UpstreamConfig {
    fn default_connect_timeout() -> Duration {
        Duration::from_secs(5)
    }

    fn default_idle_timeout() -> Duration {
        Duration::from_mins(1)
    }

    fn default_max_event_bytes() -> usize {
        16 * 1024 * 1024
    }
}

fn yes() -> bool {
    true
}
