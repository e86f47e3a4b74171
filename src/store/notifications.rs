//! What replicas tell each other, over the database's own channel.
//!
//! Telling is no part of the statements that make the notifications: the server lets commits that notify wait for each
//! other.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use sqlx::Executor;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::backend::Backend;
use super::params::params;
use super::pool::ServerHealth;
use super::statement::Statement;
use super::{Store, StoreError};
use crate::domain::{RunId, ThreadId};

/// Names stand for a database each, so replicas on another database of the same server do not hear of it.
const CHANNEL: &str = "threadkeeper";
/// The server takes less than 8000 bytes at a time.
const MAX_PAYLOAD: usize = 7900;
/// A connection that was silent for so long is asked for a sign of life: nothing else would tell that a
/// network lets nothing through any more.
const PING_AFTER_SILENCE: Duration = Duration::from_secs(5);
/// How long opening it, or such a sign, may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between attempts to listen again.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

static TELL: Statement = Statement::on_postgres(
    "notifications.notify",
    "SELECT pg_notify(:channel, e.value) FROM {each_text :payloads}",
);

pub(super) static STATEMENTS: &[&Statement] = &[&TELL];

impl Store {
    /// Tells all replicas that something is new. It may get lost, so nobody may depend on it.
    pub async fn notify_replicas(&self, notifications: &[Notification]) -> Result<(), StoreError> {
        let payloads = payloads(notifications);
        // A file serves one process alone.
        if matches!(*self.backend, Backend::Postgres { .. }) && !payloads.is_empty() {
            let mut c = self.backend.vital_writer().await?;
            c.execute(
                &TELL,
                params()
                    .set("channel", CHANNEL)
                    .json("payloads", Some(&payloads))?,
            )
            .await?;
        }
        Ok(())
    }

    /// What replicas [tell](Self::tell) each other, this one's own included, from the first poll on until the
    /// store is closed. What gets lost while there is no connection is made up for by [`Notification::Missed`].
    pub fn notifications(&self) -> BoxStream<'static, Notification> {
        let notifications = match &*self.backend {
            Backend::Postgres { health, direct, .. } => {
                let listener = Listener {
                    options: (**direct).clone(),
                    health: Arc::clone(health),
                    listener: None,
                    heard: Vec::new(),
                    pause: Duration::ZERO,
                };
                let heard = stream::unfold(listener, |mut listener| async move {
                    let notifications = listener.next().await;
                    Some((stream::iter(notifications), listener))
                });
                heard.flatten().left_stream()
            }
            Backend::Sqlite { .. } => stream::pending().right_stream(),
        };
        notifications
            .take_until(self.closed.clone().cancelled_owned())
            .boxed()
    }
}

/// The listening end.
struct Listener {
    /// The way to the server itself: a pooler that lends its connections by the transaction takes the wish to
    /// listen and forgets it.
    options: PgConnectOptions,
    health: Arc<ServerHealth>,
    /// `None` while there is no connection.
    listener: Option<PgListener>,
    heard: Vec<Notification>,
    /// Before the next attempt to connect.
    pause: Duration,
}

impl Listener {
    /// The next notifications, at least one.
    async fn next(&mut self) -> Vec<Notification> {
        while self.heard.is_empty() {
            match &mut self.listener {
                None => self.open().await,
                Some(listener) => match receive(listener).await {
                    Ok(text) => {
                        self.heard = text.split_ascii_whitespace().filter_map(read).collect()
                    }
                    Err(error) => {
                        tracing::warn!(%error, "notifications of other replicas do not arrive for the moment");
                        self.listener = None;
                        self.health.lose();
                    }
                },
            }
        }
        std::mem::take(&mut self.heard)
    }

    /// Tries to connect, after a pause if that did not work the last time.
    async fn open(&mut self) {
        sleep(self.pause).await;
        let late = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
        match timeout(ANSWER_TIMEOUT, listen(&self.options))
            .await
            .unwrap_or_else(|_| Err(late()))
        {
            Ok(listener) => {
                self.listener = Some(listener);
                self.heard.push(Notification::Missed);
                self.pause = Duration::ZERO;
            }
            Err(error) => {
                // Who does not hear looks for itself, only later. So one line tells.
                if self.pause.is_zero() {
                    tracing::warn!(%error, "cannot listen for notifications of other replicas; trying again");
                }
                self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            }
        }
    }
}

async fn listen(options: &PgConnectOptions) -> Result<PgListener, sqlx::Error> {
    // The listener wants a pool to take its one connection from.
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    // A new connection has missed something, so it must be told from the old one.
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// The next text. An error if the connection is lost.
async fn receive(listener: &mut PgListener) -> Result<String, sqlx::Error> {
    let lost = || sqlx::Error::Io(std::io::ErrorKind::ConnectionAborted.into());
    loop {
        if let Ok(heard) = timeout(PING_AFTER_SILENCE, listener.try_recv()).await {
            return heard?
                .map(|notification| notification.payload().to_owned())
                .ok_or_else(lost);
        }
        let pong = timeout(ANSWER_TIMEOUT, listener.execute("SELECT 1")).await;
        pong.unwrap_or_else(|_| Err(lost()))?;
    }
}

/// Words that tell the notifications, as few texts as they fit into.
fn payloads(notifications: &[Notification]) -> Vec<String> {
    let mut payloads: Vec<String> = Vec::new();
    for word in notifications.iter().filter_map(write) {
        match payloads.last_mut() {
            Some(last) if last.len() + 1 + word.len() <= MAX_PAYLOAD => {
                last.push(' ');
                last.push_str(&word);
            }
            _ => payloads.push(word),
        }
    }
    payloads
}

/// A letter, and the id in hexadecimal if there is one. `None` for what only the listener knows.
fn write(notification: &Notification) -> Option<String> {
    match notification {
        Notification::Thread(id) => Some(format!("t{}", id.uuid().simple())),
        Notification::Run(id) => Some(format!("r{}", id.uuid().simple())),
        Notification::Asked(id) => Some(format!("a{}", id.uuid().simple())),
        Notification::Followed(id) => Some(format!("f{}", id.uuid().simple())),
        Notification::Orphans => Some("o".to_owned()),
        Notification::Missed => None,
    }
}

/// The inverse. Words that it does not know are of a newer version.
fn read(word: &str) -> Option<Notification> {
    let (kind, rest) = word.split_at_checked(1)?;
    let id = || Uuid::try_parse(rest).ok();
    match kind {
        "t" => Some(Notification::Thread(ThreadId::from_uuid(id()?))),
        "r" => Some(Notification::Run(RunId::from_uuid(id()?))),
        "a" => Some(Notification::Asked(RunId::from_uuid(id()?))),
        "f" => Some(Notification::Followed(RunId::from_uuid(id()?))),
        "o" if rest.is_empty() => Some(Notification::Orphans),
        _ => None,
    }
}

/// What replicas tell each other, so that nobody has to ask the database time and again.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Notification {
    /// A run of the thread has ended: what waits may start.
    Thread(ThreadId),
    /// The run has gone on: there are more events, or it has ended.
    Run(RunId),
    /// Something was asked of an active run; its owner is to look for [`requests`](Store::requests).
    Asked(RunId),
    /// Somebody follows the run by what its owner [records](Store::record).
    Followed(RunId),
    /// There are runs to adopt.
    Orphans,
    /// Any of these may have been told and was not heard.
    Missed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notification_is_received_as_sent() {
        let mut notifications = vec![Notification::Orphans];
        for _ in 0..150 {
            let run = RunId::new();
            notifications.extend([
                Notification::Thread(ThreadId::new()),
                Notification::Run(run),
                Notification::Asked(run),
                Notification::Followed(run),
            ]);
        }
        let payloads = payloads(&notifications);
        assert_eq!(payloads.len(), 3, "as few as will do");
        assert!(payloads.iter().all(|text| text.len() < 8000));
        let heard: Vec<_> = payloads
            .iter()
            .flat_map(|text| text.split_ascii_whitespace())
            .filter_map(read)
            .collect();
        assert_eq!(heard, notifications);
    }

    #[test]
    fn words_of_other_versions_are_passed_over() {
        for word in ["x0192f5c3", "orphans", "t", "tr", "r123", "é", "oo"] {
            assert_eq!(read(word), None, "{word}");
        }
        assert!(payloads(&[Notification::Missed]).is_empty());
    }
}
