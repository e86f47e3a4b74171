//! Getting to the server, and the pools.

use std::str::FromStr;
use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::log::LevelFilter;

use crate::config::StoreConfig;
use crate::store::StoreError;

/// A statement that takes so long is logged with a warning.
const SLOW_STATEMENT: Duration = Duration::from_secs(1);
/// Pauses between attempts to reach a server that is not up yet.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Reads the URL.
pub(super) fn options(config: &StoreConfig) -> Result<PgConnectOptions, StoreError> {
    let url = config.url.as_ref().ok_or_else(|| StoreError::Open("store.url is not set".to_owned()))?;
    // The cause is left out: it might quote the URL, which may hold a password.
    let options = PgConnectOptions::from_str(url.expose_secret()).map_err(|_| {
        StoreError::Open("store.url is not of the form `postgres://user@host:port/database`".to_owned())
    })?;
    Ok(options
        .application_name("threadkeeper")
        .options([
            // No statement of ours takes long: one that does waits for a lock that a stuck client holds.
            ("statement_timeout", "10s"),
            ("idle_in_transaction_session_timeout", "30s"),
            // All of them look rows up by key: one plan serves every key, and planning takes longer than the rest.
            ("plan_cache_mode", "force_generic_plan"),
            ("jit", "off"),
        ])
        .log_statements(LevelFilter::Debug)
        .log_slow_statements(LevelFilter::Warn, SLOW_STATEMENT))
}

/// Tries to connect until it works, waiting does not help, or the time is up.
pub(super) async fn wait_until_up(options: &PgConnectOptions, limit: Duration) -> Result<(), StoreError> {
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    loop {
        let error = match timeout_at(deadline, PgConnection::connect_with(options)).await {
            Ok(Ok(connection)) => {
                // Whether the goodbye arrives does not matter.
                let _ = connection.close().await;
                return Ok(());
            }
            Ok(Err(error)) => error,
            Err(_) => sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()),
        };
        if let Some(text) = beyond_waiting(&error, options) {
            return Err(StoreError::Open(text));
        }
        if Instant::now() + pause >= deadline {
            let text = format!("{} let nobody in within {limit:?}: {error}", place(options));
            return Err(StoreError::Unavailable(text.into()));
        }
        if !told {
            told = true;
            tracing::warn!(%error, "the database is not up yet; trying again for {limit:?}");
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What to do about an error that stays the same however long one waits.
fn beyond_waiting(error: &sqlx::Error, options: &PgConnectOptions) -> Option<String> {
    let place = place(options);
    match error {
        sqlx::Error::Database(cause) => {
            let (user, code) = (options.get_username(), cause.code().unwrap_or_default());
            match &*code {
                "28P01" | "28000" => Some(format!(
                    "{place} refused the user `{user}`: check user and password in store.url ({})",
                    cause.message()
                )),
                "3D000" => Some(format!(
                    "{place} has no database `{}`: create it, or correct store.url",
                    options.get_database().unwrap_or(user)
                )),
                "42501" => {
                    Some(format!("{place} does not let the user `{user}` connect: {}", cause.message()))
                }
                _ => None,
            }
        }
        sqlx::Error::Tls(cause) => {
            Some(format!("no TLS connection to {place}: {cause}; see sslmode and sslrootcert of store.url"))
        }
        sqlx::Error::Configuration(_) => {
            Some("store.url has a parameter that Postgres connections do not know".to_owned())
        }
        _ => None,
    }
}

fn place(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(folder) => format!("the database at the socket in {}", folder.display()),
        None => format!("the database at {}:{}", options.get_host(), options.get_port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> StoreConfig {
        StoreConfig { url: Some(url.to_owned().into()), ..StoreConfig::default() }
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_it() {
        for url in ["postgres://u:secret@host:port/db", "postgres://u:secret@host/db?sslmode=secret"] {
            let error = options(&config(url)).unwrap_err();
            assert!(matches!(error, StoreError::Open(_)), "{error:?}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_stays_away_is_given_up_and_named() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = options(&config(&format!("postgres://u:secret@127.0.0.1:{port}/db"))).unwrap();
        let error = wait_until_up(&options, Duration::from_millis(200)).await.unwrap_err();
        let text = format!("{error:?}");
        assert!(matches!(error, StoreError::Unavailable(_)), "{text}");
        assert!(text.contains(&format!("127.0.0.1:{port}")) && !text.contains("secret"), "{text}");
    }
}
