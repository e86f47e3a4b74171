//! Postgres 12 or newer, shared by any number of replicas: connecting to the server, and the
//! pools.
//!
//! Transactions are READ COMMITTED, the server's default. So that no two transactions deadlock,
//! all lock in one order:
//! - Statements that change a run, messages that its thread counts, and the thread lock them in
//!   this order.
//! - Admission locks the thread, and then only adds rows. An idempotency key comes last.
//! - Statements that lock several requests to delete, runs or threads lock them in this order, and
//!   each kind by id.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::log::LevelFilter;
use url::Url;

use super::StoreError;
use super::backend::Backend;
use super::errors::Said;
use super::pool::{Dropped, Options, Pool, PoolSettings, ServerHealth};
use crate::config::StoreConfig;

/// The duration from which a statement is logged with a warning.
const SLOW_STATEMENT: Duration = Duration::from_secs(1);
/// The pause before the next attempt to reach a server that is not up yet grows from 50 ms to 1 s.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest time for one step after it has a connection. It is somewhat longer than the
/// server's `statement_timeout`.
const CALL_TIMEOUT: Duration = Duration::from_secs(12);

/// The parameters of a URL that the driver knows.
const KNOWN_PARAMETERS: &str = "sslmode ssl-mode sslrootcert ssl-root-cert ssl-ca sslcert ssl-cert sslkey ssl-key statement- \
    cache-capacity host hostaddr port dbname user password application_name options";

/// Connects, and waits for a server that is not up yet.
pub(super) async fn open(config: &StoreConfig) -> Result<Backend, StoreError> {
    let (way, direct) = options(config)?;
    wait_until_up(&way, config.startup_timeout).await?;
    if let Some(direct) = &direct {
        wait_until_up(direct, config.startup_timeout).await?;
    }
    let vital = (config.max_connections / 2).max(1);
    let general = config.max_connections.saturating_sub(vital).max(1);
    let health = Arc::new(ServerHealth::default());
    let pool = |size, dropped| {
        Pool::new(PoolSettings {
            options: Options::Postgres(way.options.clone()),
            health: Arc::clone(&health),
            size,
            acquire_timeout: config.acquire_timeout,
            call_timeout: CALL_TIMEOUT,
            dropped,
        })
    };
    Ok(Backend::Postgres {
        general: pool(general, Dropped::Settled)?,
        vital: pool(vital, Dropped::Closed)?,
        session: pool(1, Dropped::Closed)?,
        direct: Box::new(direct.unwrap_or_else(|| way.clone()).options),
        health,
    })
}

/// The connection options of one URL.
#[derive(Clone)]
struct Way {
    options: PgConnectOptions,
    /// The name of the setting that has the URL.
    setting: &'static str,
}

impl fmt::Debug for Way {
    /// Leaves the options out: the driver's text of them has the password in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way")
            .field("to", &place(&self.options))
            .field("setting", &self.setting)
            .finish_non_exhaustive()
    }
}

/// Reads the URLs: the one for everything, and the direct one, if it is set, for what a pooler
/// does not let through.
fn options(config: &StoreConfig) -> Result<(Way, Option<Way>), StoreError> {
    let url = config
        .url
        .as_ref()
        .ok_or_else(|| StoreError::Open("store.url is not set".to_owned()))?;
    let way = way(url, "store.url")?;
    let Some(direct) = &config.direct_url else {
        return Ok((way.with_session_settings(), None));
    };
    let direct = self::way(direct, "store.direct_url")?.with_session_settings();
    Ok((way, Some(direct)))
}

fn way(url: &SecretString, setting: &'static str) -> Result<Way, StoreError> {
    // Leave the cause out: it might quote the URL, which may hold a password.
    let options = PgConnectOptions::from_str(url.expose_secret()).map_err(|_| {
        StoreError::Open(format!(
            "{setting} is not of the form `postgres://user@host:port/database`"
        ))
    })?;
    tell_unknown_parameters(url, setting);
    let options = options
        .application_name("threadkeeper")
        // Servers since 12 do this by themselves, and poolers do not know the parameter.
        .extra_float_digits(None)
        .log_statements(LevelFilter::Debug)
        .log_slow_statements(LevelFilter::Warn, SLOW_STATEMENT);
    Ok(Way { options, setting })
}

/// Warns of URL parameters that the driver ignores. The driver's own warning, which repeats the
/// value, is never logged.
fn tell_unknown_parameters(url: &SecretString, setting: &'static str) {
    let names = unknown_parameters(url);
    if !names.is_empty() {
        let names = names.join(", ");
        tracing::warn!(
            setting,
            parameters = names,
            "the URL has unknown parameters, which are ignored"
        );
    }
}

/// Returns the unknown parameters of a URL. It does not repeat text that does not look like a
/// name, because that may be a secret.
fn unknown_parameters(url: &SecretString) -> Vec<String> {
    let Ok(url) = Url::parse(url.expose_secret()) else {
        return Vec::new();
    };
    let is_known = |name: &str| {
        KNOWN_PARAMETERS.split(' ').any(|known| known == name) || name.starts_with("options[")
    };
    let is_word = |name: &str| {
        name.len() <= 32
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b"_-".contains(&b))
    };
    let unknown = url
        .query_pairs()
        .map(|(name, _)| name)
        .filter(|name| !is_known(name));
    unknown
        .map(|name| {
            if is_word(&name) {
                name.into_owned()
            } else {
                "(not a name)".to_owned()
            }
        })
        .collect()
}

impl Way {
    /// Adds settings of the server session. A pooler refuses them, because clients do not own
    /// sessions there.
    fn with_session_settings(self) -> Self {
        let options = self.options.options([
            // A statement of the gateway is short. One that takes this long waits for a lock that
            // a stuck client holds.
            ("statement_timeout", "10s"),
            ("idle_in_transaction_session_timeout", "30s"),
            // All statements look rows up by key, so one plan serves every key. Planning takes
            // longer than the rest.
            ("plan_cache_mode", "force_generic_plan"),
            // A plan that was made for a small table, or one that seemed small, is kept when the
            // table is large.
            ("enable_seqscan", "off"),
            ("enable_bitmapscan", "off"),
            ("enable_hashjoin", "off"),
            ("enable_mergejoin", "off"),
            ("jit", "off"),
        ]);
        Self { options, ..self }
    }
}

/// Tries to connect until it succeeds, until it meets an error that waiting does not mend, or
/// until the time is up.
async fn wait_until_up(way: &Way, limit: Duration) -> Result<(), StoreError> {
    let options = &way.options;
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    loop {
        let error = match timeout_at(deadline, PgConnection::connect_with(options)).await {
            Ok(Ok(connection)) => {
                // It does not matter whether the server receives this.
                let _ = connection.close().await;
                return Ok(());
            }
            Ok(Err(error)) => error,
            Err(_) => sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()),
        };
        if let Some(text) = beyond_waiting(&error, way) {
            return Err(StoreError::Open(text));
        }
        let error = in_its_words(error);
        if Instant::now() + pause >= deadline {
            let text = format!(
                "{} did not accept a connection within {limit:?}: {error}",
                place(options)
            );
            return Err(StoreError::Unavailable(text.into()));
        }
        if !told {
            told = true;
            tracing::warn!(%error, "the database is not up yet; retrying for up to {limit:?}");
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Returns the text for an error that waiting does not mend: what is wrong, and how to mend it.
fn beyond_waiting(error: &sqlx::Error, Way { options, setting }: &Way) -> Option<String> {
    let place = place(options);
    match error {
        sqlx::Error::Database(cause) => {
            let (user, code) = (options.get_username(), cause.code().unwrap_or_default());
            match &*code {
                "28P01" | "28000" => Some(format!(
                    "{place} refused the user `{user}`: check user and password in {setting} ({})",
                    cause.message()
                )),
                "3D000" => Some(format!(
                    "{place} has no database `{}`: create it, or correct {setting}",
                    options.get_database().unwrap_or(user)
                )),
                "08P01" if cause.message().contains("startup parameter") => Some(format!(
                    "{place} is a pooler that does not accept the gateway's session settings ({}): set store.direct_url to the \
                     URL of the server itself",
                    cause.message()
                )),
                "42501" => Some(format!(
                    "{place} does not let the user `{user}` connect: {}",
                    cause.message()
                )),
                _ => None,
            }
        }
        sqlx::Error::Tls(cause) => Some(format!(
            "no TLS connection to {place}: {cause}; check sslmode and sslrootcert in {setting}"
        )),
        sqlx::Error::Configuration(_) => Some(format!(
            "{setting} has a parameter that Postgres connections do not support: correct or remove it"
        )),
        _ => None,
    }
}

/// Returns the error's text; for an error of the server, the server's own message.
fn in_its_words(error: sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(cause) => Said::by(&*cause).to_string(),
        sqlx::Error::Io(cause) => cause.to_string(),
        other => other.to_string(),
    }
}

fn place(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(folder) => format!("the database at the socket in {}", folder.display()),
        None => format!(
            "the database at {}:{}",
            options.get_host(),
            options.get_port()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> StoreConfig {
        StoreConfig {
            url: Some(url.to_owned().into()),
            ..StoreConfig::default()
        }
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_it() {
        for url in [
            "postgres://u:secret@host:port/db",
            "postgres://u:secret@host/db?sslmode=secret",
        ] {
            let error = options(&config(url)).unwrap_err();
            assert!(matches!(error, StoreError::Open(_)), "{error:?}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }

    #[test]
    fn parameters_that_are_passed_over_are_named_without_their_values() {
        let unknown =
            |query: &str| unknown_parameters(&format!("postgres://u:secret@h/d?{query}").into());
        assert!(unknown("sslmode=require&host=%2Frun&options[a]=b").is_empty());
        assert_eq!(
            unknown("pasword=secret&sslmod=secret&Secret9=1"),
            ["pasword", "sslmod", "(not a name)"]
        );
    }

    #[test]
    fn a_password_is_in_no_text() {
        let ways = options(&config("postgres://u:secret@h/d")).unwrap();
        let text = format!("{ways:?}");
        assert!(
            text.contains("h:5432") && !text.contains("secret"),
            "{text}"
        );
    }

    #[test]
    fn a_problem_is_told_of_the_url_that_has_it() {
        let both = |direct: &str| StoreConfig {
            direct_url: Some(direct.to_owned().into()),
            ..config("postgres://u@h/d")
        };
        let error = options(&both("postgres://u:secret@host:port/db"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("store.direct_url") && !error.contains("secret"),
            "{error}"
        );
        assert_eq!(
            options(&both("postgres://u@i/d"))
                .unwrap()
                .1
                .unwrap()
                .options
                .get_host(),
            "i"
        );
        assert!(options(&config("postgres://u@h/d")).unwrap().1.is_none());
    }

    #[test]
    fn a_pooler_is_not_asked_for_settings_of_sessions() {
        let behind = StoreConfig {
            direct_url: Some("postgres://u@i/d".to_owned().into()),
            ..config("postgres://u@h/d")
        };
        let (pooled, direct) = options(&behind).unwrap();
        assert_eq!(pooled.options.get_options(), None);
        assert!(
            direct
                .unwrap()
                .options
                .get_options()
                .unwrap()
                .contains("statement_timeout")
        );
        let (way, _) = options(&config("postgres://u@h/d")).unwrap();
        assert!(
            way.options
                .get_options()
                .unwrap()
                .contains("statement_timeout")
        );
    }

    #[tokio::test]
    async fn a_server_that_stays_away_is_given_up_and_named() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let (options, _) =
            options(&config(&format!("postgres://u:secret@127.0.0.1:{port}/db"))).unwrap();
        let error = wait_until_up(&options, Duration::from_millis(200))
            .await
            .unwrap_err();
        let text = format!("{error:?}");
        assert!(matches!(error, StoreError::Unavailable(_)), "{text}");
        assert!(
            text.contains(&format!("127.0.0.1:{port}")) && !text.contains("secret"),
            "{text}"
        );
    }
}
