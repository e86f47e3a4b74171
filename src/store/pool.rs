//! Connections to lend.
//!
//! The driver's own pool asks a connection for a sign of life each time it comes back: one more round trip for each
//! statement, and one without a time limit. This one asks only connections that were idle for a while, bounds each
//! call in time, and gives up the connection of a call that failed or was dropped half-way.
//!
//! A server that goes away takes all connections with it, so one that turns out to be broken stands for all that were
//! opened or lent before: none of them is lent again. So after an outage nobody pays for a connection that died in it but
//! those who found out, and nobody waits for signs of life from one connection after another.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool::Runtime;
use deadpool::managed::{self, Manager, Metrics, PoolError, RecycleError, RecycleResult};
use sqlx::{ConnectOptions, Connection};
use tokio::time::timeout;

use super::StoreError;

/// A connection that was idle for so long is asked for a sign of life before it is used.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How long it has to give one.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// What is known of a server, by all pools of connections to it.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// When a connection was last found to be broken. Those from before are not used any more.
    broken_at: Mutex<Option<Instant>>,
}

impl Trust {
    /// A connection to the server has turned out to be broken.
    pub(super) fn lose(&self) {
        *self.broken_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_had_by(&self, metrics: &Metrics) -> bool {
        let broken_at = *self.broken_at.lock().unwrap_or_else(PoisonError::into_inner);
        broken_at.is_none_or(|broken_at| metrics.recycled.unwrap_or(metrics.created) > broken_at)
    }
}

/// Connections that are opened when they are needed and kept.
pub(super) struct Pool<C: Connection> {
    lenders: managed::Pool<Opener<C>>,
    acquire_timeout: Duration,
    call_timeout: Duration,
}

impl<C: Connection> Pool<C> {
    /// Up to `size` connections. `acquire_timeout` bounds the wait for one, `call_timeout` what is done with it.
    pub(super) fn new(
        options: C::Options,
        trust: Arc<Trust>,
        size: u32,
        acquire_timeout: Duration,
        call_timeout: Duration,
    ) -> Result<Self, StoreError> {
        let lenders = managed::Pool::builder(Opener { options, trust })
            .max_size(size.max(1) as usize)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(acquire_timeout))
            .create_timeout(Some(acquire_timeout))
            .build()
            .map_err(|error| StoreError::Open(format!("the connection pool cannot be made: {error}")))?;
        Ok(Self { lenders, acquire_timeout, call_timeout })
    }

    /// A free connection, soon.
    pub(super) async fn lend(&self) -> Result<Lent<C>, StoreError> {
        match timeout(self.acquire_timeout, self.lenders.get()).await {
            Ok(Ok(connection)) => Ok(Lent { connection: Some(connection) }),
            // Whatever the server says to a new connection, it may say otherwise soon.
            Ok(Err(PoolError::Backend(error))) => Err(StoreError::Unavailable(error.into())),
            Ok(Err(other)) => Err(StoreError::Unavailable(other.to_string().into())),
            Err(_) => Err(StoreError::Unavailable("no connection in time".into())),
        }
    }

    /// Bounds a call in time.
    pub(super) async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let Ok(result) = timeout(self.call_timeout, call).await else {
            self.lenders.manager().trust.lose();
            return Err(StoreError::Unavailable(format!("no answer within {:?}", self.call_timeout).into()));
        };
        if result.as_ref().is_err_and(is_broken) {
            self.lenders.manager().trust.lose();
        }
        result
    }

    /// Lends no more, and closes what is not lent.
    pub(super) async fn close(&self) {
        let idle = self.lenders.retain(|_, _| false).removed;
        self.lenders.close();
        for connection in idle {
            // Whether the goodbye arrives does not matter.
            let _ = timeout(PING_TIMEOUT, connection.close()).await;
        }
    }
}

/// Does something with a connection of a pool: `on!(pool, connection => a_future_that_uses(connection))`.
macro_rules! on {
    ($pool:expr, $connection:ident => $call:expr) => {{
        let pool = &$pool;
        let mut lent = pool.lend().await?;
        let result = {
            let $connection = lent.connection();
            pool.within(async move { $call.await }).await
        };
        lent.give_back(&result);
        result
    }};
}
pub(super) use on;

/// A connection on loan. Dropped without being given back, it is closed: nobody knows in which state it is.
pub(super) struct Lent<C: Connection> {
    connection: Option<managed::Object<Opener<C>>>,
}

impl<C: Connection> Lent<C> {
    pub(super) fn connection(&mut self) -> &mut C {
        self.connection.as_mut().expect("a loan holds its connection until it is given back")
    }

    /// Gives it back if the call went well. After any error it may be out of step, or still in a transaction.
    pub(super) fn give_back<T>(mut self, result: &Result<T, StoreError>) {
        if matches!(result, Ok(_) | Err(StoreError::UnknownCursor)) {
            drop(self.connection.take());
        }
    }
}

impl<C: Connection> Drop for Lent<C> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(managed::Object::take(connection));
        }
    }
}

struct Opener<C: Connection> {
    options: C::Options,
    trust: Arc<Trust>,
}

impl<C: Connection> Manager for Opener<C> {
    type Type = C;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<C, sqlx::Error> {
        self.options.connect().await
    }

    async fn recycle(&self, connection: &mut C, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        if !self.trust.is_had_by(metrics) {
            return Err(RecycleError::message("the server was away"));
        }
        if metrics.last_used() > PING_AFTER_IDLE {
            let silent = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
            let pong = timeout(PING_TIMEOUT, connection.ping()).await.unwrap_or_else(|_| Err(silent()));
            pong.inspect_err(|_| self.trust.lose()).map_err(RecycleError::Backend)?;
        }
        Ok(())
    }
}

/// Whether an error tells that the connection is broken, and not only that a statement came to nothing.
fn is_broken(error: &StoreError) -> bool {
    let StoreError::Unavailable(cause) = error else { return false };
    match cause.downcast_ref() {
        Some(sqlx::Error::Io(_)) => true,
        // The server stops, or has crashed.
        Some(sqlx::Error::Database(cause)) => {
            cause.code().is_some_and(|code| ["57P01", "57P02"].contains(&&*code))
        }
        _ => false,
    }
}

impl<C: Connection> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("call_timeout", &self.call_timeout).finish_non_exhaustive()
    }
}
