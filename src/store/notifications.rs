//! Notifications between replicas, over the database's own channel (LISTEN and NOTIFY).
//!
//! A notification is not sent by the statement that causes it: the server makes commits that
//! notify wait for each other.

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

/// A channel belongs to one database, so replicas on another database of the same server do not
/// receive its notifications.
const CHANNEL: &str = "threadkeeper";
/// The most bytes of one payload. The server accepts less than 8000.
const MAX_PAYLOAD: usize = 7900;
/// The longest silence of the connection before it is pinged. Nothing else would show that the
/// network drops everything.
const PING_AFTER_SILENCE: Duration = Duration::from_secs(5);
/// The longest wait for opening the connection, and for the answer to a ping.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before the next attempt to listen grows from 100 ms to 2 s.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

static TELL: Statement = Statement::on_postgres(
    "notifications.notify",
    "SELECT pg_notify(:channel, e.value) FROM {each_text :payloads}",
);

pub(super) static STATEMENTS: &[&Statement] = &[&TELL];

impl Store {
    /// Sends notifications to all replicas. A notification may get lost, so no caller may depend
    /// on it.
    pub async fn notify_replicas(&self, notifications: &[Notification]) -> Result<(), StoreError> {
        let payloads = payloads(notifications);
        // A SQLite file serves only one process.
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

    /// Returns the notifications that replicas [send](Self::notify_replicas) each other, including
    /// this replica's own, from the first poll until the store is closed. After a lost connection
    /// [`Notification::Missed`] stands for those that were not received.
    pub fn notifications(&self) -> BoxStream<'static, Notification> {
        let notifications = match &*self.backend {
            Backend::Postgres { health, direct, .. } => {
                let listener = Listener {
                    options: (**direct).clone(),
                    health: Arc::clone(health),
                    connection: None,
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

/// The receiver of notifications.
struct Listener {
    /// The address of the server itself. A pooler that lends a connection for one transaction
    /// accepts LISTEN and forgets it.
    options: PgConnectOptions,
    health: Arc<ServerHealth>,
    /// `None` while there is no connection.
    connection: Option<PgListener>,
    heard: Vec<Notification>,
    /// The pause before the next attempt to connect.
    pause: Duration,
}

impl Listener {
    /// Waits for the next notifications, and returns at least one.
    async fn next(&mut self) -> Vec<Notification> {
        while self.heard.is_empty() {
            match &mut self.connection {
                None => self.open().await,
                Some(listener) => match receive(listener).await {
                    Ok(text) => {
                        self.heard = text.split_ascii_whitespace().filter_map(read).collect();
                    }
                    Err(error) => {
                        tracing::warn!(%error, "lost the connection that receives notifications of other replicas; reconnecting");
                        self.connection = None;
                        self.health.lose();
                    }
                },
            }
        }
        std::mem::take(&mut self.heard)
    }

    /// Tries to connect, after a pause if the last attempt failed.
    async fn open(&mut self) {
        sleep(self.pause).await;
        let late = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
        match timeout(ANSWER_TIMEOUT, listen(&self.options))
            .await
            .unwrap_or_else(|_| Err(late()))
        {
            Ok(listener) => {
                self.connection = Some(listener);
                self.heard.push(Notification::Missed);
                self.pause = Duration::ZERO;
            }
            Err(error) => {
                // Without notifications a replica still looks at the database, only later. So one
                // warning is enough.
                if self.pause.is_zero() {
                    tracing::warn!(%error, "cannot listen for notifications of other replicas; retrying");
                }
                self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            }
        }
    }
}

async fn listen(options: &PgConnectOptions) -> Result<PgListener, sqlx::Error> {
    // The listener takes its one connection from a pool.
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    // A new connection has missed notifications. So the driver must not reconnect unnoticed.
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// Waits for the next payload. Fails if the connection is lost.
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

/// Encodes notifications as words, and packs these into as few payloads as possible.
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

/// Encodes a notification as a letter, and its id in hexadecimal if it has one. `None` for
/// [`Missed`](Notification::Missed), which only the receiver makes.
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

/// Decodes a word. `None` for a word of a newer version.
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

/// A notification between replicas. It spares them polling the database.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Notification {
    /// A run of the thread has ended: a queued run may start.
    Thread(ThreadId),
    /// The run has new events, or has ended.
    Run(RunId),
    /// A request to an active run was recorded. Its owner should read its
    /// [`requests`](Store::requests).
    Asked(RunId),
    /// Another replica follows the run by what the owner [records](Store::record).
    Followed(RunId),
    /// There are runs to adopt.
    Orphans,
    /// Notifications of any kind may have been lost.
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
        assert_eq!(payloads.len(), 3, "as few payloads as possible");
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
