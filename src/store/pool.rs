//! Connections to lend.
//!
//! The driver's own pool asks a connection for a sign of life each time it comes back: one more round trip for each
//! statement, and one without a time limit. This one asks only connections that were idle for a while, bounds each
//! call in time, and gives up the connection of a call that failed.
//!
//! A call that is dropped half-way leaves the server at work. Where clients that hang up do that, its connection keeps its
//! place until the server is done, in a task of the pool, and is lent again then: closed at once, each such client would
//! make a new one, beside those whose work goes on. Where it is our own callers, who drop what takes too long and try
//! again, the connection is closed: it may be that nothing comes through it any more ([`Dropped`]).
//!
//! A server that goes away takes all connections with it, so one that turns out to be broken stands for all that were
//! opened or lent before: none of them is lent again. So after an outage nobody pays for a connection that died in it but
//! those who found out, and nobody waits for signs of life from one connection after another.

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

/// A connection that was idle for so long is asked for a sign of life before it is used.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How long it has to give one.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// What is known of a server, by all pools of connections to it.
#[derive(Debug, Default)]
pub(super) struct ServerHealth {
    /// When a connection was last found to be broken. Those from before are not used any more.
    broken_at: Mutex<Option<std::time::Instant>>,
}

impl ServerHealth {
    /// A connection to the server has turned out to be broken.
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

/// What becomes of the connection of a call that is dropped half-way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Dropped {
    /// It is lent again once the server is done with the call. Until then it keeps its place.
    Settled,
    /// It is closed, and another one may take its place at once.
    Closed,
}

/// How connections are opened.
pub(super) enum Options {
    Postgres(PgConnectOptions),
    Sqlite(SqliteConnectOptions),
}

/// What a pool is made of.
pub(super) struct PoolSettings {
    pub(super) options: Options,
    pub(super) health: Arc<ServerHealth>,
    /// The most connections.
    pub(super) size: u32,
    /// Bounds the wait for a connection.
    pub(super) acquire_timeout: Duration,
    /// Bounds what is done with one, from when it is had.
    pub(super) call_timeout: Duration,
    pub(super) dropped: Dropped,
}

/// Connections that are opened when they are needed and kept.
pub(super) struct Pool {
    connections: managed::Pool<Opener>,
    /// One for each connection that there may be.
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
                StoreError::Open(format!("the connection pool cannot be made: {error}"))
            })?;
        Ok(Self {
            connections,
            places: Arc::new(Semaphore::new(size)),
            acquire_timeout,
        })
    }

    /// A free connection, soon.
    pub(super) async fn acquire(&self) -> Result<Connection, StoreError> {
        let acquired = timeout(self.acquire_timeout, self.next()).await;
        acquired.unwrap_or_else(|_| Err(StoreError::Unavailable("no connection in time".into())))
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
                // Whatever the server says to a new connection, it may say otherwise soon.
                Err(PoolError::Backend(error)) => Err(StoreError::Unavailable(error.into())),
                Err(other) => Err(StoreError::Unavailable(other.to_string().into())),
            }
        });
        match poll_fn(|context| Poll::Ready(ready.as_mut().poll(context))).await {
            Poll::Ready(acquired) => acquired,
            // The server has been asked for something: a task waits for it, also if the caller does not.
            Poll::Pending if *dropped == Dropped::Settled => {
                tasks.spawn(ready).await.unwrap_or_else(|_| Err(closed()))
            }
            Poll::Pending => ready.await,
        }
    }

    /// Lends no more, and closes what is not lent.
    pub(super) async fn close(&self) {
        let Opener { tasks, closed, .. } = self.connections.manager();
        self.places.close();
        closed.cancel();
        let idle = self.connections.retain(|_, _| false).removed;
        self.connections.close();
        for connection in idle {
            // Whether the goodbye arrives does not matter.
            let _ = timeout(PING_TIMEOUT, connection.close()).await;
        }
        tasks.close();
        tasks.wait().await;
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed".into())
}

/// A connection on loan. It goes back to its pool when it is dropped.
pub(super) struct Connection {
    held: Option<Held>,
    pub(super) state: State,
    /// Transactions that are open: the outer one and savepoints.
    pub(super) depth: u32,
    /// What is done with it has to be done by then.
    deadline: Instant,
}

/// A connection and, to be given up after it, its place.
struct Held {
    connection: managed::Object<Opener>,
    place: OwnedSemaphorePermit,
}

#[derive(Clone, Copy)]
pub(super) enum State {
    /// Nothing is under way.
    InStep,
    /// A call is under way, or was dropped half-way.
    AtWork,
    /// A call has failed, and the connection may be out of step.
    Failed,
    /// The call was dropped, and what came of it is waited for.
    Settling,
}

const HELD: &str = "a connection is held until it is dropped";

impl Connection {
    pub(super) fn raw(&self) -> &Raw {
        &self.held.as_ref().expect(HELD).connection
    }

    /// Says that a call begins. The connection, and when the call has to be done.
    pub(super) fn begin_call(&mut self) -> (&mut Raw, Instant) {
        self.state = State::AtWork;
        (
            &mut self.held.as_mut().expect(HELD).connection,
            self.deadline,
        )
    }

    /// Lets the other connections to the server know if an error says that it is gone.
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

    /// Lends the connection again once the server is done with what was dropped.
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

/// A connection to either database.
pub(super) enum Raw {
    Postgres(PgConnection),
    Sqlite(SqliteConnection),
}

impl Raw {
    /// Brings a connection back into step: the driver reads what is left of the call first, and a transaction of which
    /// the driver knows nothing ends.
    ///
    /// # Errors
    /// Also if the call has failed meanwhile: the driver of Postgres tells that instead, and sends nothing more.
    async fn back_in_step(&mut self) -> sqlx::Result<()> {
        match (self.control("ROLLBACK").await, &*self) {
            // There is none to end.
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
            // A call was dropped half-way, or a transaction was.
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
    /// What is seen to its end though nobody waits for it.
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
            return Err(RecycleError::message("the server was away"));
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
