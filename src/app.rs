//! The composition root: builds the parts from the configuration, starts them, stops them. The only file that
//! names concrete backends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, AppState};
use crate::config::{Config, StoreConfig, UpstreamConfig, UpstreamKind};
use crate::domain::ReplicaId;
use crate::runs::{Runs, RunsParts};
use crate::server::{self, ServerStop};
use crate::store::{BackendKind, PostgresStore, SqliteStore, Store};
use crate::upstream::{AssistantsUpstream, ResponsesUpstream, Upstream, UpstreamClient};

/// Time for runs to record their end once they are told to stop, and for connections to close after that.
const LAST_WORDS: Duration = Duration::from_secs(4);

/// A gateway that is bound and connected, and not serving yet.
#[derive(Debug)]
pub struct App {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    runs: Runs,
    store: Arc<dyn Store>,
    config: Config,
    tasks: TaskTracker,
    draining: CancellationToken,
    stop: CancellationToken,
}

impl App {
    /// Connects the store, brings its schema up to date, binds the address and registers the replica.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let store = open_store(&config.store).await?;
        let upstreams = upstreams(&config)?;
        let default_assistant = config.default_assistant().context("no assistant is configured")?.to_owned();
        let listener = TcpListener::bind(config.server.listen)
            .await
            .with_context(|| format!("cannot listen on {} (server.listen)", config.server.listen))?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "callers on other machines are served although nobody has to prove who they are");
        }
        let (tasks, draining, stop) =
            (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let runs = Runs::new(RunsParts {
            store: Arc::clone(&store),
            upstreams,
            assistants: config.assistants.clone(),
            default_assistant,
            runs: config.runs.clone(),
            sessions: config.sessions.clone(),
            admission_timeout: config.store.acquire_timeout,
            replica: ReplicaId::new(),
            attend_every: config.replica.session_ttl / 3,
            tasks: tasks.clone(),
            draining: draining.clone(),
            stop: stop.clone(),
        });
        runs.renew(&address.to_string(), config.replica.session_ttl)
            .await
            .context("cannot register this replica in the store")?;
        let state = AppState { runs: runs.clone(), server: Arc::new(config.server.clone()) };
        Ok(Self { listener, address, router: api::router(state), runs, store, config, tasks, draining, stop })
    }

    /// Where it listens; tells the port if the configuration left it open.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `signals` resolves, then stops in two steps: no new runs, while running ones have the grace
    /// time to end; after it, or when `signals` resolves again, what still runs is ended and recorded as failed.
    ///
    /// # Errors
    /// A part of the gateway ended by itself.
    pub async fn run(self, mut signals: impl AsyncFnMut()) -> anyhow::Result<()> {
        let parts = TaskTracker::new();
        let server_stop = ServerStop::default();
        let mut session = parts
            .spawn(self.runs.clone().keep_session(self.address.to_string(), self.config.replica.session_ttl));
        let (listener, router, settings, stop) =
            (self.listener, self.router, self.config.server.clone(), server_stop.clone());
        let mut server = parts.spawn(async move { server::serve(listener, router, &settings, stop).await });
        tracing::info!(address = %self.address, "listening");

        // A replica whose session nobody keeps would only refuse from then on: better to end and be started again.
        let ended = tokio::select! {
            () = signals() => None,
            ended = &mut server => Some(format!("the server ended by itself: {ended:?}")),
            ended = &mut session => Some(format!("the session's keeper ended by itself: {ended:?}")),
        };
        let (runs, lines) = self.runs.load();
        let grace_ms = u64::try_from(self.config.server.shutdown_grace.as_millis())?;
        tracing::info!(runs, lines, grace_ms, "stopping");
        self.draining.cancel();
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => {}
            () = signals() => {}
            () = sleep(self.config.server.shutdown_grace) => {}
        }
        self.stop.cancel();
        if timeout(LAST_WORDS, self.tasks.wait()).await.is_err() {
            tracing::error!(runs = self.tasks.len(), "some runs could not record their end");
        }
        server_stop.soft.cancel();
        if !server.is_finished() && timeout(LAST_WORDS / 2, &mut server).await.is_err() {
            tracing::warn!("some connections did not close in time");
            server_stop.hard.cancel();
        }
        let closed = timeout(LAST_WORDS, async {
            if !session.is_finished() {
                drop(session.await);
            }
            self.runs.retire().await;
            self.store.close().await;
        });
        if closed.await.is_err() {
            tracing::warn!("the store's connections could not be closed in time");
        }
        match ended {
            None => Ok(()),
            Some(ended) => bail!(ended),
        }
    }
}

/// Brings the schema of the configured store up to date.
pub async fn migrate(config: &StoreConfig) -> anyhow::Result<()> {
    let store = open_store(&StoreConfig { migrate_on_start: true, ..config.clone() }).await?;
    store.close().await;
    Ok(())
}

async fn open_store(config: &StoreConfig) -> anyhow::Result<Arc<dyn Store>> {
    let url = config.url.as_ref().context("no store is configured: set store.url or DATABASE_URL")?;
    let store: Arc<dyn Store> = match BackendKind::of(url.expose_secret())? {
        BackendKind::Postgres => {
            let store = PostgresStore::connect(config).await?;
            if config.migrate_on_start {
                store.migrate().await?;
            }
            Arc::new(store)
        }
        BackendKind::Sqlite => {
            let store = SqliteStore::open(config).await?;
            if config.migrate_on_start {
                store.migrate().await?;
            }
            Arc::new(store)
        }
    };
    store.ready().await?;
    Ok(store)
}

fn upstreams(config: &Config) -> anyhow::Result<BTreeMap<String, Arc<dyn Upstream>>> {
    config
        .upstreams
        .iter()
        .map(|(name, upstream)| Ok((name.clone(), build_upstream(name, upstream)?)))
        .collect()
}

fn build_upstream(name: &str, config: &UpstreamConfig) -> anyhow::Result<Arc<dyn Upstream>> {
    let client = UpstreamClient::new(name, config)?;
    Ok(match config.kind {
        UpstreamKind::Assistants => Arc::new(AssistantsUpstream::new(client, config)),
        UpstreamKind::Responses => Arc::new(ResponsesUpstream::new(client, config)),
    })
}
