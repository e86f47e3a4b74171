//! A pool of connections.
//!
//! The driver's own pool pings a connection each time it comes back. That is one more round trip
//! for each statement, and it has no time limit. This pool pings only connections that were idle
//! for a while. It also bounds the time of each call, and closes the connection of a call that
//! failed.
//!
//! A caller may drop a call half-way and leave the server at work. [`Dropped`] says what happens
//! to the connection:
//! - Where clients that hang up cause that, the connection keeps its permit until the server is
//!   done, in a task of the pool. Then it is lent again. If the pool closed it at once, each such
//!   client would open a new connection beside those that are still at work.
//! - Where tasks of the gateway drop what takes too long and try again, the connection is closed.
//!   Perhaps nothing gets through it any more.
//!
//! A server that goes away breaks all its connections. So after one connection turns out to be
//! broken, the pool lends none that was opened or lent before. After an outage only the callers
//! that noticed it pay for a dead connection, and no caller waits for pings of one connection
//! after another.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Manager, Metrics, PoolError, RecycleError, RecycleResult};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection as _};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::StoreError;
use super::errors::is_broken;

/// The longest time that a connection may be idle without a ping before its next use.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);
/// The longest wait for the answer to a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// The health of a server, shared by all pools of connections to it.
#[derive(Debug, Default)]
pub(super) struct ServerHealth {
    /// The last time at which a connection turned out to be broken. Connections from before that
    /// are not used any more.
    broken_at: Mutex<Option<std::time::Instant>>,
}

impl ServerHealth {
    /// Records that a connection to the server has turned out to be broken.
    pub(super) fn lose(&self) {
        let now = std::time::Instant::now();
        *self
            .broken_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    fn is_good_for(&self, metrics: &Metrics) -> bool {
        let broken_at = *self
            .broken_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        broken_at.is_none_or(|broken_at| metrics.recycled.unwrap_or(metrics.created) > broken_at)
    }
}

/// What happens to the connection of a call that is dropped half-way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Dropped {
    /// It is lent again once the server is done with the call. Until then it keeps its permit.
    Settled,
    /// It is closed, and another one may be opened at once.
    Closed,
}

/// The options with which connections are opened.
pub(super) enum Options {
    Postgres(PgConnectOptions),
    Sqlite(SqliteConnectOptions),
}

/// The settings of a pool.
pub(super) struct PoolSettings {
    pub(super) options: Options,
    pub(super) health: Arc<ServerHealth>,
    /// The most connections.
    pub(super) size: u32,
    /// The longest wait for a connection.
    pub(super) acquire_timeout: Duration,
    /// The longest use of a connection, from the time at which the caller gets it.
    pub(super) call_timeout: Duration,
    pub(super) dropped: Dropped,
}

/// A pool that opens connections when they are needed, and keeps them.
pub(super) struct Pool {
    connections: managed::Pool<Opener>,
    /// One permit for each connection.
    places: Arc<Semaphore>,
    acquire_timeout: Duration,
}

impl Pool {
    pub(super) fn new(settings: PoolSettings) -> Result<Self, StoreError> {
        let PoolSettings {
            options,
            health,
            size,
            acquire_timeout,
            call_timeout,
            dropped,
        } = settings;
        let (tasks, closed) = (TaskTracker::new(), CancellationToken::new());
        let size = size.max(1) as usize;
        let opener = Opener {
            options,
            health,
            call_timeout,
            dropped,
            tasks,
            closed,
        };
        let connections = managed::Pool::builder(opener)
            .max_size(size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(acquire_timeout))
            .create_timeout(Some(acquire_timeout))
            .build()
            .map_err(|error| {
                StoreError::Open(format!("the connection pool cannot be created: {error}"))
            })?;
        Ok(Self {
            connections,
            places: Arc::new(Semaphore::new(size)),
            acquire_timeout,
        })
    }

    /// Waits for a free connection, for `acquire_timeout` at most.
    pub(super) async fn acquire(&self) -> Result<Connection, StoreError> {
        let acquired = timeout(self.acquire_timeout, self.next()).await;
        acquired.unwrap_or_else(|_| Err(StoreError::Unavailable("no connection was free".into())))
    }

    async fn next(&self) -> Result<Connection, StoreError> {
        let place = Arc::clone(&self.places)
            .acquire_owned()
            .await
            .map_err(|_| closed())?;
        let connections = self.connections.clone();
        let Opener { tasks, dropped, .. } = self.connections.manager();
        let mut ready = Box::pin(async move {
            let opener = connections.manager();
            let connection = opener
                .closed
                .run_until_cancelled(Box::pin(connections.get()))
                .await;
            match connection.ok_or_else(closed)? {
                Ok(connection) => {
                    let deadline = Instant::now() + opener.call_timeout;
                    let held = Some(Held { connection, place });
                    Ok(Connection {
                        held,
                        state: State::InStep,
                        depth: 0,
                        deadline,
                    })
                }
                // The server may refuse a new connection now and accept one soon.
                Err(PoolError::Backend(error)) => Err(StoreError::Unavailable(error.into())),
                Err(other) => Err(StoreError::Unavailable(other.to_string().into())),
            }
        });
        match poll_fn(|context| Poll::Ready(ready.as_mut().poll(context))).await {
            Poll::Ready(acquired) => acquired,
            // The server was sent something. A task waits for its answer, also if the caller
            // leaves.
            Poll::Pending if *dropped == Dropped::Settled => {
                tasks.spawn(ready).await.unwrap_or_else(|_| Err(closed()))
            }
            Poll::Pending => ready.await,
        }
    }

    /// Lends no more connections, and closes those that are idle.
    pub(super) async fn close(&self) {
        let Opener { tasks, closed, .. } = self.connections.manager();
        self.places.close();
        closed.cancel();
        let idle = self.connections.retain(|_, _| false).removed;
        self.connections.close();
        for connection in idle {
            // It does not matter whether the server receives this.
            let _ = timeout(PING_TIMEOUT, connection.close()).await;
        }
        tasks.close();
        tasks.wait().await;
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed".into())
}

/// A borrowed connection. It goes back to its pool when it is dropped.
pub(super) struct Connection {
    held: Option<Held>,
    pub(super) state: State,
    /// The number of open transactions: the outer one and its savepoints.
    pub(super) depth: u32,
    /// The deadline of its use.
    deadline: Instant,
}

/// A connection and its permit, which is released after it.
struct Held {
    connection: managed::Object<Opener>,
    place: OwnedSemaphorePermit,
}

#[derive(Clone, Copy)]
pub(super) enum State {
    /// No call is in progress.
    InStep,
    /// A call is in progress, or was dropped half-way.
    AtWork,
    /// A call has failed, and the connection may be out of step with the server.
    Failed,
    /// The call was dropped, and a task waits for its end.
    Settling,
}

const HELD: &str = "a connection is held until it is dropped";

impl Connection {
    pub(super) fn raw(&self) -> &Raw {
        &self.held.as_ref().expect(HELD).connection
    }

    /// Begins a call. Returns the connection and the deadline of the call.
    pub(super) fn begin_call(&mut self) -> (&mut Raw, Instant) {
        self.state = State::AtWork;
        (
            &mut self.held.as_mut().expect(HELD).connection,
            self.deadline,
        )
    }

    /// Tells the pools of the same server if an error shows that the server is gone.
    pub(super) fn tell_health(&self, error: &sqlx::Error) {
        let pool = self
            .held
            .as_ref()
            .and_then(|held| managed::Object::pool(&held.connection));
        if let Some(pool) = pool.filter(|_| is_broken(error)) {
            pool.manager().health.lose();
        }
    }

    fn close(&mut self) {
        if let Some(Held { connection, place }) = self.held.take() {
            drop(managed::Object::take(connection));
            drop(place);
        }
    }

    /// Lends the connection again once the server is done with the dropped call.
    fn settle(&mut self) {
        let pool = self
            .held
            .as_ref()
            .and_then(|held| managed::Object::pool(&held.connection));
        let (Some(pool), Ok(_)) = (pool, Handle::try_current()) else {
            return self.close();
        };
        if pool.manager().dropped == Dropped::Closed {
            return self.close();
        }
        let lent = Self {
            held: self.held.take(),
            state: State::Settling,
            depth: 0,
            deadline: self.deadline,
        };
        let tasks = pool.manager().tasks.clone();
        tasks.spawn(lent.settled(pool));
    }

    async fn settled(mut self, pool: managed::Pool<Opener>) {
        let Some(held) = &mut self.held else { return };
        let settled = timeout(pool.manager().call_timeout, held.connection.back_in_step());
        match pool.manager().closed.run_until_cancelled(settled).await {
            Some(Ok(Ok(()))) => self.state = State::InStep,
            Some(Ok(Err(error))) => self.tell_health(&error),
            Some(Err(_)) => pool.manager().health.lose(),
            None => {}
        }
    }
}

/// A connection to either engine.
pub(super) enum Raw {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Raw {
    /// Brings a connection back into step with the server. The driver first reads the rest of the
    /// call. Then it ends a transaction that the driver does not know of.
    ///
    /// # Errors
    /// Fails also if the dropped call has failed. The Postgres driver then reports that error, and
    /// sends nothing more.
    async fn back_in_step(&mut self) -> sqlx::Result<()> {
        match (self.control("ROLLBACK").await, &*self) {
            // There is no transaction to end.
            (Err(sqlx::Error::Database(_)), Self::Sqlite(_)) => Ok(()),
            (result, _) => result,
        }
    }

    async fn ping(&mut self) -> sqlx::Result<()> {
        match self {
            Self::Postgres(c) => c.ping().await,
            Self::Sqlite(c) => c.ping().await,
        }
    }

    async fn close(self) -> sqlx::Result<()> {
        match self {
            Self::Postgres(c) => c.close().await,
            Self::Sqlite(c) => c.close().await,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        match self.state {
            State::InStep if self.depth == 0 => {}
            // A call or a transaction was dropped half-way.
            State::InStep | State::AtWork => self.settle(),
            State::Failed | State::Settling => self.close(),
        }
    }
}

struct Opener {
    options: Options,
    health: Arc<ServerHealth>,
    call_timeout: Duration,
    dropped: Dropped,
    /// Tasks that finish calls for which no caller waits any more.
    tasks: TaskTracker,
    closed: CancellationToken,
}

impl Manager for Opener {
    type Type = Raw;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Raw, sqlx::Error> {
        Ok(match &self.options {
            Options::Postgres(options) => Raw::Postgres(options.connect().await?),
            Options::Sqlite(options) => Raw::Sqlite(options.connect().await?),
        })
    }

    async fn recycle(&self, connection: &mut Raw, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        if !self.health.is_good_for(metrics) {
            return Err(RecycleError::message(
                "the connection is older than an outage of the server",
            ));
        }
        if metrics.last_used() > PING_AFTER_IDLE {
            let silent = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
            let pong = timeout(PING_TIMEOUT, connection.ping())
                .await
                .unwrap_or_else(|_| Err(silent()));
            pong.inspect_err(|_| self.health.lose())
                .map_err(RecycleError::Backend)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("acquire_timeout", &self.acquire_timeout)
            .finish_non_exhaustive()
    }
}
