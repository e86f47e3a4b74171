//! Typed settings. The file replaces defaults, and the environment replaces both. The loader reports all
//! problems at once.
//!
//! `config/gateway.toml` lists every setting with its default.

mod auth;
mod check;
mod checker;
mod decode;
mod doubts;
mod env;
mod load;
mod names;
mod network;
mod problem;
mod rate;
mod tools;
mod tree;
mod upstreams;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use url::Url;

use crate::domain::{KeyText, Lifetimes, Limits, Metadata, UserContent};

pub use auth::{AuthConfig, JwtAlgorithm, JwtConfig, KeyConfig};
pub use check::reserved_parameters;
pub use decode::LISTEN_FORM;
pub use load::{ConfigFile, Sources, utf8_variables};
pub use network::{InvalidNetwork, Network};
pub use problem::{ConfigProblems, Origin, Problem, USUAL_FILE};
pub use rate::{InvalidRate, Rate};
pub use upstreams::{AssistantConfig, AuthScheme, UpstreamConfig, UpstreamKind};

/// Largest page of a list, in entries.
pub const MAX_PAGE: u32 = 100;

/// All settings of the gateway.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub server: ServerConfig,
    pub auth: AuthConfig,
    pub store: StoreConfig,
    pub log: LogConfig,
    pub limits: LimitsConfig,
    pub runs: RunsConfig,
    pub sessions: SessionsConfig,
    pub threads: ThreadsConfig,
    pub archive: ArchiveConfig,
    pub retention: RetentionConfig,
    pub janitor: JanitorConfig,
    pub replica: ReplicaConfig,
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    pub assistants: BTreeMap<String, AssistantConfig>,
}

/// The HTTP server.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    pub listen: SocketAddr,
    /// Serve callers on other machines without credentials.
    pub allow_unauthenticated: bool,
    /// Origins whose pages may call from a browser, such as `https://chat.example.com`, and origins of apps
    /// that are pages inside (`capacitor://localhost`).
    pub cors_origins: Vec<String>,
    /// URL at which callers reach the gateway, such as `https://chat.example.com/chat-api`, if a proxy
    /// removes a path prefix. Links begin with its path.
    #[serde(deserialize_with = "upstreams::optional_url")]
    pub public_url: Option<Url>,
    /// Proxies whose `X-Forwarded-For` and `X-Forwarded-Prefix` the gateway believes.
    pub trusted_proxies: Vec<Network>,
    /// Open connections. Further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Time for a request's head to arrive, also between two requests of a kept-alive connection. Keep it
    /// longer than the idle time of the load balancer.
    #[serde(with = "humantime_serde")]
    pub header_read_timeout: Duration,
    /// Longest silence while a request's body arrives.
    #[serde(with = "humantime_serde")]
    pub body_read_timeout: Duration,
    /// Bytes of a body that must arrive in a second, on average, counted from one `body_read_timeout` after
    /// its beginning. 0: any rate.
    pub min_body_rate: u32,
    /// Longest time for which a caller may leave an answer's bytes unread.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// Largest request body, bytes.
    pub max_body_bytes: usize,
    /// Bytes of all large bodies in memory at once, from before they are read until their runs end. Queued
    /// runs do not count.
    pub max_buffered_body_bytes: usize,
    /// Largest request head, bytes.
    pub max_header_bytes: usize,
    /// Longest key of a user, session or topic, bytes of UTF-8: [`KeyText::MAX_BYTES`] or less.
    pub max_key_bytes: usize,
    /// Most parts of a message: [`UserContent::MAX_PARTS`] or less.
    pub max_content_parts: usize,
    /// Most pairs of metadata: [`Metadata::MAX_PAIRS`] or less.
    pub max_metadata_pairs: usize,
    /// Most entries of a page of a list: [`MAX_PAGE`] or less.
    pub max_page_size: u32,
    /// Readers of one run's events.
    pub max_readers_per_run: NonZeroUsize,
    /// Interval of comments on a silent event stream.
    #[serde(with = "humantime_serde")]
    pub stream_keep_alive: Duration,
    /// Time for active runs to end after SIGTERM. The gateway then hands over or ends the rest, in up to
    /// 10 s more. Give the orchestrator's own grace time (often 30 s) room for both.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
}

/// The database.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// URL of the database: `postgres://…` or `sqlite:<path>`. A secret, because it may have a password.
    pub url: Option<SecretString>,
    /// File with the URL. [`Config::load`] reads it into `url`.
    pub url_file: Option<PathBuf>,
    /// URL of the server itself, if `url` leads to a pooler that lends connections by transaction. Postgres
    /// only.
    pub direct_url: Option<SecretString>,
    /// File with that URL. [`Config::load`] reads it into `direct_url`.
    pub direct_url_file: Option<PathBuf>,
    /// Connections of the pool (Postgres), or readers (SQLite).
    pub max_connections: u32,
    /// Longest wait for a free connection.
    #[serde(with = "humantime_serde")]
    pub acquire_timeout: Duration,
    /// Longest wait of a message for the database to record it, behind other messages. A message that waits
    /// longer, or would, is refused.
    #[serde(with = "humantime_serde")]
    pub max_wait: Duration,
    /// How long `serve` waits at start for a database that is away.
    #[serde(with = "humantime_serde")]
    pub startup_timeout: Duration,
    /// Bring the schema up to date at start. If false, `serve` refuses to start on an old schema.
    pub migrate_on_start: bool,
    /// Whether the gateway stores the content of messages.
    pub transcript: Transcript,
    /// SQLite only. `full`: acknowledged data survives a power loss. `normal`: the last commits may not.
    pub synchronous: Synchronous,
}

/// Whether the content of messages is stored.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Transcript {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Synchronous {
    Normal,
    Full,
}

/// Logs. They go to standard error.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Filter of the log, as in `RUST_LOG`: `info`, `threadkeeper=debug,info`, …
    pub filter: String,
    /// Format of the lines. If unset, json for `serve` and pretty for `dev`.
    pub format: Option<LogFormat>,
    /// Whether the log has the address of each caller.
    pub client_address: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Json,
    Pretty,
}

/// Rates of callers, in each process. A rate that is not set limits nothing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Messages and outputs of function calls of one user: a model answers each.
    pub user_messages: Option<Rate>,
    /// All other requests of one user.
    pub user_requests: Option<Rate>,
    /// Messages and outputs of function calls of a tenant.
    pub tenant_messages: Option<Rate>,
    /// All other requests of a tenant.
    pub tenant_requests: Option<Rate>,
}

/// Limits of runs and of their queues.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunsConfig {
    /// How long a run may take once it has started, unless its assistant or its request says otherwise.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// The longest that an assistant or a request may ask for.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
    /// Longest wait of a run for the outputs of its function calls. The run's own deadline can come earlier.
    #[serde(with = "humantime_serde")]
    pub tool_outputs_timeout: Duration,
    /// Queued runs of one thread in this process.
    pub max_queue: usize,
    /// Bytes of the messages of these runs together.
    pub max_queue_bytes: usize,
    /// Unfinished runs of this process, queued or active.
    pub max_runs: NonZeroUsize,
    /// Unfinished runs of each tenant in this process.
    pub max_runs_per_tenant: Option<NonZeroUsize>,
    /// Further tries of a request that the upstream provably did not take: no connection, a rate limit, or a
    /// failure that left no trace of the request there.
    pub max_retries: u32,
    /// Time to end at the upstream what a run left there.
    #[serde(with = "humantime_serde")]
    pub settle_timeout: Duration,
    /// Largest reply, bytes of text.
    pub max_reply_bytes: usize,
    /// How long an idempotency key is remembered.
    #[serde(with = "humantime_serde")]
    pub idempotency_ttl: Duration,
}

/// Session conversations.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionsConfig {
    /// Life of a session's thread. The session's next message then starts a new one.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
    /// Start of that life.
    pub ttl_from: TtlFrom,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum TtlFrom {
    /// The thread's creation.
    Creation,
    /// The thread's last activity, so that each message renews its life.
    LastActivity,
}

/// Threads of all scopes.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThreadsConfig {
    /// Life of the threads of users and topics, from their creation; for ever if left out.
    #[serde(with = "humantime_serde")]
    pub max_age: Option<Duration>,
    /// Life of the threads of users and topics, from their last activity; for ever if left out.
    #[serde(with = "humantime_serde")]
    pub max_idle: Option<Duration>,
    /// Longest life that a request may ask for.
    #[serde(with = "humantime_serde")]
    pub max_ttl: Duration,
    /// Messages of a full thread. It is archived before its next run, and a fresh one takes its place.
    pub max_messages: Option<NonZeroU32>,
    /// Tokens of a full thread: those of its last run, as the upstream counted them, and an estimate
    /// of the next message.
    pub max_tokens: Option<NonZeroU32>,
    /// Last messages of the old thread that the fresh one begins with.
    pub carry_over_messages: u32,
    /// Most tokens of those messages, by an estimate.
    pub carry_over_tokens: u32,
}

/// Archived threads.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ArchiveConfig {
    /// How long their transcripts are kept.
    #[serde(with = "humantime_serde")]
    pub keep: Duration,
    /// Keep their upstream threads for the same time.
    pub keep_upstream: bool,
}

/// Retention of rows that conversations do not need.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// How long ended runs are kept. Their messages stay.
    #[serde(with = "humantime_serde")]
    pub runs: Duration,
    /// How long the events of ended runs are kept.
    #[serde(with = "humantime_serde")]
    pub events: Duration,
    /// How long receipts of deletions are kept.
    #[serde(with = "humantime_serde")]
    pub receipts: Duration,
}

/// The janitor: the work in the background.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JanitorConfig {
    /// How often this replica looks for work, approximately.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// Threads that the janitor takes at a time.
    pub batch_size: NonZeroU32,
    /// Threads that it works on at once.
    pub concurrency: NonZeroU32,
    /// Calls of the janitor to all upstreams together.
    pub calls_per_second: NonZeroU32,
    /// How long the janitor tries a deletion that an upstream refuses or fails, from the first failure in a
    /// row. Then the receipt tells what may remain there.
    #[serde(with = "humantime_serde")]
    pub give_up_after: Duration,
}

/// This replica among the others.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplicaConfig {
    /// Time after which a replica counts as dead that has not renewed its session.
    #[serde(with = "humantime_serde")]
    pub session_ttl: Duration,
}

impl Config {
    /// Returns the lives of threads that have no time to live of their own.
    pub fn lifetimes(&self) -> Lifetimes {
        let Self {
            sessions, threads, ..
        } = self;
        Lifetimes {
            sessions: match sessions.ttl_from {
                TtlFrom::Creation => Limits {
                    max_age: Some(sessions.ttl),
                    max_idle: None,
                },
                TtlFrom::LastActivity => Limits {
                    max_age: None,
                    max_idle: Some(sessions.ttl),
                },
            },
            others: Limits {
                max_age: threads.max_age,
                max_idle: threads.max_idle,
            },
        }
    }

    /// Returns the assistant for messages that name none: the one called `default`, or the only one.
    pub fn default_assistant(&self) -> Option<&str> {
        match self.assistants.get_key_value("default") {
            Some((name, _)) => Some(name),
            None if self.assistants.len() == 1 => self.assistants.keys().next().map(String::as_str),
            None => None,
        }
    }
}

impl LogConfig {
    /// Parses the filter.
    ///
    /// # Errors
    ///
    /// The text is not a filter, for example `threadkeeper=loud`.
    pub fn env_filter(&self) -> Result<EnvFilter, tracing_subscriber::filter::ParseError> {
        EnvFilter::try_new(&self.filter)
    }
}

impl ServerConfig {
    /// Returns whether the address is a trusted proxy. It must be [canonical](IpAddr::to_canonical).
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_proxies
            .iter()
            .any(|network| network.contains(address))
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            allow_unauthenticated: false,
            cors_origins: Vec::new(),
            public_url: None,
            trusted_proxies: Vec::new(),
            max_connections: 10_240,
            header_read_timeout: Duration::from_secs(75),
            body_read_timeout: Duration::from_secs(30),
            min_body_rate: 16 * 1024,
            write_timeout: Duration::from_secs(30),
            max_body_bytes: 12 * 1024 * 1024,
            max_buffered_body_bytes: 256 * 1024 * 1024,
            max_header_bytes: 32 * 1024,
            max_key_bytes: KeyText::MAX_BYTES,
            max_content_parts: UserContent::MAX_PARTS,
            max_metadata_pairs: Metadata::MAX_PAIRS,
            max_page_size: MAX_PAGE,
            max_readers_per_run: NonZeroUsize::new(100).unwrap_or(NonZeroUsize::MAX),
            stream_keep_alive: Duration::from_secs(15),
            shutdown_grace: Duration::from_secs(20),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: None,
            url_file: None,
            direct_url: None,
            direct_url_file: None,
            max_connections: 16,
            acquire_timeout: Duration::from_secs(5),
            max_wait: Duration::from_secs(2),
            startup_timeout: Duration::from_secs(30),
            migrate_on_start: true,
            transcript: Transcript::On,
            synchronous: Synchronous::Full,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: None,
            client_address: true,
        }
    }
}

impl Default for RunsConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_mins(15),
            max_timeout: Duration::from_mins(30),
            tool_outputs_timeout: Duration::from_mins(2),
            max_queue: 256,
            max_queue_bytes: 64 * 1024 * 1024,
            max_runs: NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MAX),
            max_runs_per_tenant: None,
            max_retries: 3,
            settle_timeout: Duration::from_secs(10),
            max_reply_bytes: 4 * 1024 * 1024,
            idempotency_ttl: Duration::from_hours(24),
        }
    }
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self {
            ttl: Duration::from_hours(24),
            ttl_from: TtlFrom::Creation,
        }
    }
}

impl Default for ThreadsConfig {
    fn default() -> Self {
        Self {
            max_age: None,
            max_idle: None,
            max_ttl: Duration::from_hours(90 * 24),
            max_messages: None,
            max_tokens: None,
            carry_over_messages: 20,
            carry_over_tokens: 16_000,
        }
    }
}

impl Default for ArchiveConfig {
    fn default() -> Self {
        Self {
            keep: Duration::from_hours(30 * 24),
            keep_upstream: false,
        }
    }
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            runs: Duration::from_hours(90 * 24),
            events: Duration::from_hours(24),
            receipts: Duration::from_hours(365 * 24),
        }
    }
}

impl Default for JanitorConfig {
    fn default() -> Self {
        let number = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        Self {
            interval: Duration::from_secs(30),
            batch_size: number(100),
            concurrency: number(4),
            calls_per_second: number(10),
            give_up_after: Duration::from_hours(7 * 24),
        }
    }
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self {
            session_ttl: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = include_str!("../config/gateway.toml");

    fn load(text: String) -> Result<Config, ConfigProblems> {
        let file = Some(ConfigFile::Text {
            name: "gateway.toml".to_owned(),
            text,
        });
        Config::load(Sources {
            file,
            ..Sources::default()
        })
    }

    /// Returns the file with its examples switched on: a setting follows `#` without a blank.
    fn with_examples() -> String {
        let switch_on = |line: &str| match line.strip_prefix('#') {
            Some(setting)
                if setting
                    .starts_with(|first: char| first == '[' || first.is_ascii_lowercase()) =>
            {
                format!("{setting}\n")
            }
            _ => format!("{line}\n"),
        };
        TEXT.lines().map(switch_on).collect()
    }

    #[test]
    fn the_example_file_holds_the_defaults() {
        let config = load(TEXT.to_owned()).unwrap();
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn the_example_file_mentions_every_setting() {
        let (live, errors) = tree::Tree::from_toml("gateway.toml", TEXT);
        let (all, more_errors) = tree::Tree::from_toml("gateway.toml", &with_examples());
        assert!(
            errors.is_empty() && more_errors.is_empty(),
            "{errors:?} {more_errors:?}"
        );
        for setting in names::known_settings() {
            let at = |name: &str| -> Vec<String> {
                setting
                    .iter()
                    .map(|key| if key == names::ANY_NAME { name } else { key }.to_owned())
                    .collect()
            };
            let is_mentioned = ["openai", "azure", "default", "support", "backend"]
                .iter()
                .any(|name| all.get(&at(name)).is_some());
            assert!(is_mentioned, "{setting:?} is not in config/gateway.toml");
            // Settings with a default are live, so that the test above compares them.
            let setting: Vec<&str> = setting.iter().map(String::as_str).collect();
            let has_none = matches!(
                setting.as_slice(),
                [
                    "store",
                    "url" | "url_file" | "direct_url" | "direct_url_file"
                ] | ["log", "format"]
                    | ["server", "public_url"]
                    | ["limits", _]
                    | ["runs", "max_runs_per_tenant"]
                    | [
                        "threads",
                        "max_age" | "max_idle" | "max_messages" | "max_tokens"
                    ]
            );
            if setting.len() == 2 && !has_none {
                assert!(
                    live.get(&at("")).is_some(),
                    "{setting:?} is switched off in config/gateway.toml"
                );
            }
        }
    }

    #[test]
    fn the_examples_hold_together_and_state_the_defaults_of_their_fields() {
        // Removes one of two settings that exclude each other, and writes keys in ASCII.
        let text = [
            "api_key_file",
            "url_file",
            "direct_url_file",
            "key_file",
            "sha256",
            "secret",
            "public_key_file",
        ]
        .iter()
        .fold(with_examples(), |text, name| {
            text.replace(&format!("\n{name}"), "\n#")
        });
        let config = load(
            text.replace("sk-…", "sk-1")
                .replace("\"…\"", "\"a-key-that-is-long-enough\""),
        )
        .unwrap();
        let openai = &config.upstreams["openai"];
        assert_eq!(openai.auth, AuthScheme::default());
        assert!(openai.conversations && !openai.background);
        assert_eq!(
            openai.connect_timeout,
            UpstreamConfig::default_connect_timeout()
        );
        assert_eq!(openai.call_timeout, UpstreamConfig::default_call_timeout());
        assert_eq!(
            openai.pool_idle_timeout,
            UpstreamConfig::default_pool_idle_timeout()
        );
        assert_eq!(
            openai.max_event_bytes,
            UpstreamConfig::default_max_event_bytes()
        );
        assert_eq!(openai.lock_window, UpstreamConfig::default_lock_window());
        assert_eq!(
            openai.breaker_min_requests,
            UpstreamConfig::default_breaker_min_requests()
        );
        assert_eq!(
            openai.breaker_window,
            UpstreamConfig::default_breaker_window()
        );
        assert_eq!(
            openai.breaker_open_duration,
            UpstreamConfig::default_breaker_open_duration()
        );
        let (jwt, defaults) = (config.auth.jwt.as_ref().unwrap(), JwtConfig::default());
        assert_eq!(
            (jwt.leeway, jwt.jwks_refresh),
            (defaults.leeway, defaults.jwks_refresh)
        );
        assert_eq!(config.upstreams["azure"].auth, AuthScheme::ApiKey);
        assert_eq!(config.default_assistant(), Some("default"));
    }
}
