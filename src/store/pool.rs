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
use std::time::{Duration, Instant};

use deadpool::Runtime;
use deadpool::managed::{self, Manager, Metrics, PoolError, RecycleError, RecycleResult};
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::StoreError;
use super::errors::Said;

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

/// What becomes of the connection of a call that is dropped half-way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Dropped {
    /// It is lent again once the server is done with the call. Until then it keeps its place.
    Settled,
    /// It is closed, and another one may take its place at once.
    Closed,
}

/// Connections that are opened when they are needed and kept.
pub(super) struct Pool<C: Connection + 'static> {
    lenders: managed::Pool<Opener<C>>,
    /// One for each connection that there may be.
    places: Arc<Semaphore>,
    acquire_timeout: Duration,
}

impl<C: Connection + 'static> Pool<C> {
    /// Up to `size` connections. `acquire_timeout` bounds the wait for one, `call_timeout` what is done with it.
    pub(super) fn new(
        options: C::Options,
        trust: Arc<Trust>,
        size: u32,
        acquire_timeout: Duration,
        call_timeout: Duration,
        dropped: Dropped,
    ) -> Result<Self, StoreError> {
        let (tasks, closed) = (TaskTracker::new(), CancellationToken::new());
        let size = size.max(1) as usize;
        let lenders = managed::Pool::builder(Opener { options, trust, call_timeout, dropped, tasks, closed })
            .max_size(size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(acquire_timeout))
            .create_timeout(Some(acquire_timeout))
            .build()
            .map_err(|error| StoreError::Open(format!("the connection pool cannot be made: {error}")))?;
        Ok(Self { lenders, places: Arc::new(Semaphore::new(size)), acquire_timeout })
    }

    /// A free connection, soon.
    pub(super) async fn lend(&self) -> Result<Lent<C>, StoreError> {
        let lent = timeout(self.acquire_timeout, self.next()).await;
        lent.unwrap_or_else(|_| Err(StoreError::Unavailable("no connection in time".into())))
    }

    async fn next(&self) -> Result<Lent<C>, StoreError> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| closed())?;
        let lenders = self.lenders.clone();
        let Opener { tasks, dropped, .. } = self.lenders.manager();
        let mut ready = Box::pin(async move {
            let connection = lenders.manager().closed.run_until_cancelled(lenders.get()).await;
            match connection.ok_or_else(closed)? {
                Ok(connection) => Ok(Lent { held: Some(Held { connection, place }), state: State::InStep }),
                // Whatever the server says to a new connection, it may say otherwise soon.
                Err(PoolError::Backend(error)) => Err(StoreError::Unavailable(error.into())),
                Err(other) => Err(StoreError::Unavailable(other.to_string().into())),
            }
        });
        match poll_fn(|context| Poll::Ready(ready.as_mut().poll(context))).await {
            Poll::Ready(lent) => lent,
            // The server has been asked for something: a task waits for it, also if the caller does not.
            Poll::Pending if *dropped == Dropped::Settled => {
                tasks.spawn(ready).await.unwrap_or_else(|_| Err(closed()))
            }
            Poll::Pending => ready.await,
        }
    }

    /// Bounds a call in time.
    pub(super) async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.lenders.manager().within(call).await
    }

    /// Lends no more, and closes what is not lent.
    pub(super) async fn close(&self) {
        let Opener { tasks, closed, .. } = self.lenders.manager();
        self.places.close();
        closed.cancel();
        let idle = self.lenders.retain(|_, _| false).removed;
        self.lenders.close();
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

/// A connection on loan.
pub(super) struct Lent<C: Connection + 'static> {
    held: Option<Held<C>>,
    state: State,
}

/// A connection and, to be given up after it, its place.
struct Held<C: Connection + 'static> {
    connection: managed::Object<Opener<C>>,
    place: OwnedSemaphorePermit,
}

#[derive(Clone, Copy)]
enum State {
    InStep,
    /// A call is under way, or was dropped half-way.
    AtWork,
    /// The call was dropped, and what came of it is waited for.
    Settling,
}

impl<C: Connection + 'static> Lent<C> {
    pub(super) fn connection(&mut self) -> &mut C {
        self.state = State::AtWork;
        &mut self.held.as_mut().expect("a loan holds its connection until it is given back").connection
    }

    /// Gives it back if the call went well. After any error it may be out of step, or still in a transaction.
    pub(super) fn give_back<T>(mut self, result: &Result<T, StoreError>) {
        self.state = State::InStep;
        if !matches!(result, Ok(_) | Err(StoreError::UnknownCursor)) {
            self.close();
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
        let pool = self.held.as_ref().and_then(|held| managed::Object::pool(&held.connection));
        let (Some(pool), Ok(_)) = (pool, Handle::try_current()) else { return self.close() };
        if pool.manager().dropped == Dropped::Closed {
            return self.close();
        }
        let lent = Self { held: self.held.take(), state: State::Settling };
        let tasks = pool.manager().tasks.clone();
        tasks.spawn(lent.settled(pool));
    }

    async fn settled(mut self, pool: managed::Pool<Opener<C>>) {
        let Some(held) = &mut self.held else { return };
        let settled = pool.manager().within(in_step(&mut *held.connection));
        if let Some(Ok(())) = pool.manager().closed.run_until_cancelled(settled).await {
            self.state = State::InStep;
        }
    }
}

/// Brings a connection back into step: the driver reads what is left of the call first. A sign of life would not do, for the
/// driver does not know of a transaction whose beginning was dropped; the one that begins here takes it along.
async fn in_step<C: Connection>(connection: &mut C) -> Result<(), StoreError> {
    Ok(connection.begin().await?.rollback().await?)
}

impl<C: Connection + 'static> Drop for Lent<C> {
    fn drop(&mut self) {
        match self.state {
            State::InStep => {}
            State::AtWork => self.settle(),
            State::Settling => self.close(),
        }
    }
}

struct Opener<C: Connection + 'static> {
    options: C::Options,
    trust: Arc<Trust>,
    call_timeout: Duration,
    dropped: Dropped,
    /// What is seen to its end though nobody waits for it.
    tasks: TaskTracker,
    closed: CancellationToken,
}

impl<C: Connection + 'static> Opener<C> {
    async fn within<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let Ok(result) = timeout(self.call_timeout, call).await else {
            self.trust.lose();
            return Err(StoreError::Unavailable(format!("no answer within {:?}", self.call_timeout).into()));
        };
        if result.as_ref().is_err_and(is_broken) {
            self.trust.lose();
        }
        result
    }
}

impl<C: Connection + 'static> Manager for Opener<C> {
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
    // The server stops, or has crashed.
    let stops = |said: &Said| ["57P01", "57P02"].contains(&&*said.code);
    matches!(cause.downcast_ref(), Some(sqlx::Error::Io(_))) || cause.downcast_ref().is_some_and(stops)
}

impl<C: Connection + 'static> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("acquire_timeout", &self.acquire_timeout).finish_non_exhaustive()
    }
}
