//! The composition root: builds the parts from the configuration, starts them and stops them. No other
//! file names concrete backends.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use futures_util::TryStreamExt;
use rand::Rng;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, AppState, Limits};
use crate::auth::{Auth, FreshKey};
use crate::config::{Config, StoreConfig, UpstreamConfig, UpstreamKind};
use crate::domain::{
    Access, ConversationKey, Fingerprints, KeyNames, Reader, ReplicaId, RetentionPolicy, TenantKey,
};
use crate::export_import::{self, Refused, Summary, What};
use crate::lifecycle::{Janitor, JanitorParts};
use crate::locks::{Budget, KeyedSemaphore};
use crate::runs::{Breaker, ConfiguredUpstream, Load, RunSettings, Runs, RunsParts, Tasks};
use crate::server::{self, ServerStop};
use crate::store::{Store, StoreError, StoredKey};
use crate::upstream::{AssistantsUpstream, ResponsesUpstream, Upstream, UpstreamClient};

/// Time for the last steps of a shutdown: runs record their end, connections close.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(4);

/// Pause between two tries of a step of the start.
const PAUSE: Duration = Duration::from_millis(250);

/// A gateway that has its port and its database, but does not serve yet.
#[derive(Debug)]
pub struct App {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    runs: Runs,
    janitor: Janitor,
    auth: Arc<Auth>,
    store: Arc<Store>,
    config: Config,
    tasks: TaskTracker,
    draining: CancellationToken,
    stop: CancellationToken,
}

impl App {
    /// Connects the store, brings its schema up to date, binds the address, and registers the replica.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let store = open_store(&config.store).await?;
        let fingerprints = fingerprints(&config.store, &store).await?;
        let upstreams = upstreams(&config)?;
        let default_assistant = config
            .default_assistant()
            .context("no assistant is configured")?
            .to_owned();
        let listener = TcpListener::bind(config.server.listen)
            .await
            .with_context(|| {
                format!(
                    "cannot listen on {} (--listen, or server.listen)",
                    config.server.listen
                )
            })?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() && !config.auth.is_configured() {
            tracing::warn!(%address, "callers on other machines are served without credentials");
        }
        let (tasks, draining, stop) = (
            TaskTracker::new(),
            CancellationToken::new(),
            CancellationToken::new(),
        );
        let runs = Runs::new(RunsParts {
            store: Arc::clone(&store),
            upstreams: configured(&config, &upstreams),
            settings: RunSettings {
                assistants: config.assistants.clone(),
                default_assistant,
                runs: config.runs.clone(),
                sessions: config.sessions.clone(),
                threads: config.threads.clone(),
                lifetimes: config.lifetimes(),
                fingerprints: fingerprints.clone(),
                admission_timeout: config.store.acquire_timeout,
                attend_every: config.replica.session_ttl / 3,
            },
            replica: ReplicaId::new(),
            tasks: Tasks {
                tracker: tasks.clone(),
                draining: draining.clone(),
                stop: stop.clone(),
            },
        });
        let (place, ttl) = (address.to_string(), config.replica.session_ttl);
        with_retries(&config.store, || runs.renew(&place, ttl))
            .await
            .context("cannot register this replica in the store")?;
        let janitor = Janitor::new(JanitorParts {
            store: Arc::clone(&store),
            upstreams,
            runs: runs.clone(),
            fingerprints: fingerprints.clone(),
            lifetimes: config.lifetimes(),
            archive: RetentionPolicy {
                transcript: Some(config.archive.keep),
                upstream: config.archive.keep_upstream,
            },
            retention: config.retention.clone(),
            idempotency_ttl: config.runs.idempotency_ttl,
            janitor: config.janitor.clone(),
            patience: config.runs.settle_timeout,
            tasks: tasks.clone(),
            draining: draining.clone(),
        });
        let auth =
            Auth::new(&config.auth, Arc::clone(&store), &fingerprints).context("auth.jwt")?;
        let auth = Arc::new(auth);
        with_retries(&config.store, || auth.refresh())
            .await
            .context("cannot read the API keys")?;
        let state = AppState {
            runs: runs.clone(),
            janitor: janitor.clone(),
            auth: Arc::clone(&auth),
            limits: Arc::new(Limits::new(&config.limits)),
            readers: Arc::new(KeyedSemaphore::new(
                usize::MAX,
                config.server.max_readers_per_run.get(),
            )),
            bodies: Budget::new(config.server.max_buffered_body_bytes),
            server: Arc::new(config.server.clone()),
            logs_clients: config.log.client_address,
        };
        Ok(Self {
            listener,
            address,
            router: api::router(state),
            runs,
            janitor,
            auth,
            store,
            config,
            tasks,
            draining,
            stop,
        })
    }

    /// Returns the address that the gateway listens on, with the real port if the configured one is 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the routes, to serve them without [`run`](Self::run) and its background tasks.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// Serves until `signals` resolves, then stops in two steps:
    ///
    /// 1. It takes no new runs. Active runs have the grace time to end. Other replicas go on with queued
    ///    runs.
    /// 2. After the grace time, or when `signals` resolves again, it hands the other active runs over to
    ///    another replica or to the next process.
    ///
    /// # Errors
    /// A part of the gateway ended by itself.
    pub async fn run(self, mut signals: impl AsyncFnMut()) -> anyhow::Result<()> {
        let parts = TaskTracker::new();
        let server_stop = ServerStop::default();
        let mut session = parts.spawn(
            self.runs
                .clone()
                .keep_session(self.address.to_string(), self.config.replica.session_ttl),
        );
        let mut janitor = parts.spawn(self.janitor.work());
        parts.spawn(self.auth.keep_fresh(self.stop.clone()));
        let (listener, router, settings, stop) = (
            self.listener,
            self.router,
            self.config.server.clone(),
            server_stop.clone(),
        );
        let mut server =
            parts.spawn(async move { server::serve(listener, router, &settings, stop).await });
        tracing::info!(address = %self.address, "listening");

        // A replica without its session can only refuse requests, so it ends, to be started again.
        let ended = tokio::select! {
            () = signals() => None,
            ended = &mut server => Some(format!("the server ended by itself: {ended:?}")),
            ended = &mut janitor => Some(format!("the janitor ended by itself: {ended:?}")),
            ended = &mut session => Some(format!("the session task ended by itself: {ended:?}")),
        };
        let Load { runs, queues } = self.runs.load();
        let grace_ms = u64::try_from(self.config.server.shutdown_grace.as_millis())?;
        tracing::info!(runs, lines = queues, grace_ms, "stopping");
        self.draining.cancel();
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => {}
            () = signals() => {}
            () = sleep(self.config.server.shutdown_grace) => {}
        }
        // The replicas that take over the other runs need their latest events.
        if timeout(SHUTDOWN_DEADLINE / 4, self.runs.record_now())
            .await
            .is_err()
        {
            tracing::warn!("cannot record the latest events of the runs in time");
        }
        self.runs.let_go();
        self.stop.cancel();
        let last_words = async {
            tokio::select! {
                () = self.tasks.wait() => {}
                () = self.runs.deliver() => {}
            }
        };
        if timeout(SHUTDOWN_DEADLINE, last_words).await.is_err() {
            tracing::error!(
                runs = self.tasks.len(),
                "some runs did not record their end in time"
            );
        }
        server_stop.soft.cancel();
        if !server.is_finished() && timeout(SHUTDOWN_DEADLINE / 2, &mut server).await.is_err() {
            tracing::warn!("some connections did not close in time");
            server_stop.hard.cancel();
        }
        let closed = timeout(SHUTDOWN_DEADLINE, async {
            if !session.is_finished() {
                drop(session.await);
            }
            self.runs.retire().await;
            self.store.close().await;
        });
        if closed.await.is_err() {
            tracing::warn!("the connections of the store did not close in time");
        }
        match ended {
            None => Ok(()),
            Some(ended) => bail!(ended),
        }
    }
}

/// Brings the schema of the configured store up to date.
pub async fn migrate(config: &StoreConfig) -> anyhow::Result<()> {
    let store = open_store(&StoreConfig {
        migrate_on_start: true,
        ..config.clone()
    })
    .await?;
    store.close().await;
    Ok(())
}

/// Writes all conversations of a tenant as lines, and returns the number of lines. Calls `open` for the
/// output once the store is connected.
///
/// Does not change the schema, because a running gateway may still use it.
pub async fn export<W: Write>(
    config: &StoreConfig,
    tenant: TenantKey,
    open: impl FnOnce() -> anyhow::Result<W>,
) -> anyhow::Result<u64> {
    let store = open_store(&StoreConfig {
        migrate_on_start: false,
        ..config.clone()
    })
    .await?;
    let mut out = open()?;
    let mut lines = pin!(export_import::export(
        Arc::clone(&store),
        What::All(tenant),
        Reader::Backend
    ));
    let mut written = 0;
    while let Some(line) = lines.try_next().await? {
        out.write_all(line.as_bytes()).context("cannot write")?;
        written += 1;
    }
    out.flush().context("cannot write")?;
    store.close().await;
    Ok(written)
}

/// Reads lines and adds their conversations. Calls `refused` for each line that it refuses.
pub async fn import(
    config: &Config,
    input: impl BufRead,
    refused: impl FnMut(Refused),
) -> anyhow::Result<Summary> {
    let store = open_store(&config.store).await?;
    let summary = export_import::import(Arc::clone(&store), config, input, refused).await?;
    store.close().await;
    Ok(summary)
}

/// Creates an API key and stores it.
pub async fn create_key(
    config: &StoreConfig,
    tenant: TenantKey,
    access: Access,
    label: String,
) -> anyhow::Result<FreshKey> {
    let store = open_store(config).await?;
    let key = FreshKey::new(tenant, access, label);
    store.add_key(&key.record).await?;
    store.close().await;
    Ok(key)
}

/// Returns the stored keys of one tenant, or of all.
pub async fn keys(
    config: &StoreConfig,
    tenant: Option<&TenantKey>,
) -> anyhow::Result<Vec<StoredKey>> {
    let store = open_store(config).await?;
    let keys = store.keys(tenant).await?;
    store.close().await;
    Ok(keys)
}

/// Revokes the key with this prefix.
pub async fn revoke_key(config: &StoreConfig, prefix: &str) -> anyhow::Result<StoredKey> {
    let store = open_store(config).await?;
    let key = store.revoke_key(prefix).await?;
    store.close().await;
    key.with_context(|| format!("no key begins with {prefix}: `threadkeeper keys list` shows all"))
}

/// Returns the fingerprints of a conversation's key, as logs and upstreams see them.
pub async fn fingerprint(config: &StoreConfig, key: &ConversationKey) -> anyhow::Result<KeyNames> {
    let store = open_store(&StoreConfig {
        migrate_on_start: false,
        ..config.clone()
    })
    .await?;
    let names = KeyNames::hidden(key, &fingerprints(config, &store).await?);
    store.close().await;
    Ok(names)
}

/// Returns the maker of this database's fingerprints. The first process on a database creates the key.
async fn fingerprints(config: &StoreConfig, store: &Store) -> anyhow::Result<Fingerprints> {
    let mut fresh = [0; 32];
    rand::rng().fill_bytes(&mut fresh);
    let key = with_retries(config, || store.fingerprint_key(fresh)).await;
    Ok(Fingerprints::new(
        &key.context("cannot read the key of fingerprints")?,
    ))
}

async fn open_store(config: &StoreConfig) -> anyhow::Result<Arc<Store>> {
    config
        .url
        .as_ref()
        .context("no store is configured: set store.url or DATABASE_URL")?;
    let store = Store::open(config).await?;
    if config.migrate_on_start {
        with_retries(config, || store.migrate()).await?;
    }
    with_retries(config, || store.ready()).await?;
    Ok(Arc::new(store))
}

/// Performs a step of the start, and repeats it within `store.startup_timeout` while the database is away.
async fn with_retries<T>(
    config: &StoreConfig,
    step: impl AsyncFn() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let deadline = Instant::now() + config.startup_timeout;
    loop {
        match step().await {
            Err(StoreError::Unavailable(error)) if Instant::now() + PAUSE < deadline => {
                tracing::warn!(%error, "the database went away, trying again");
                sleep(PAUSE).await;
            }
            done => return done,
        }
    }
}

fn upstreams(config: &Config) -> anyhow::Result<BTreeMap<String, Arc<dyn Upstream>>> {
    config
        .upstreams
        .iter()
        .map(|(name, upstream)| Ok((name.clone(), build_upstream(name, upstream)?)))
        .collect()
}

fn configured(
    config: &Config,
    upstreams: &BTreeMap<String, Arc<dyn Upstream>>,
) -> BTreeMap<String, ConfiguredUpstream> {
    let configured = |(name, upstream): (&String, &UpstreamConfig)| {
        let adapter = Arc::clone(upstreams.get(name)?);
        let configured = ConfiguredUpstream {
            adapter,
            breaker: Some(Arc::new(Breaker::new(name, upstream))),
            has_external_writers: upstream.external_writers,
            gets_keys: upstream.send_identifiers,
        };
        Some((name.clone(), configured))
    };
    config.upstreams.iter().filter_map(configured).collect()
}

fn build_upstream(name: &str, config: &UpstreamConfig) -> anyhow::Result<Arc<dyn Upstream>> {
    let client = UpstreamClient::new(name, config)?;
    Ok(match config.kind {
        UpstreamKind::Assistants => Arc::new(AssistantsUpstream::new(client, config)),
        UpstreamKind::Responses => Arc::new(ResponsesUpstream::new(client, config)),
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{HeaderName, HeaderValue, Method, Request, StatusCode};
    use axum::response::Response;
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use tower::ServiceExt;

    use super::*;
    use crate::api::{Route, routes};
    use crate::config::{ConfigFile, Sources};

    const KEY: &str = "a-key-that-opens-everything";

    async fn app(folder: &std::path::Path) -> App {
        let text = format!(
            // No task renews the session, so it must live long.
            "[server]\nlisten = \"127.0.0.1:0\"\n[replica]\nsession_ttl = \"1h\"\n[store]\nurl = \"sqlite:{}/t.db\"\n\
             [auth.keys.all]\nkey = \"{KEY}\"\nscope = \"operator\"\n\
             [upstreams.none]\nkind = \"responses\"\nbase_url = \"http://127.0.0.1:9/v1\"\n\
             [assistants.default]\nupstream = \"none\"\nmodel = \"m\"\n",
            folder.display()
        );
        let file = Some(ConfigFile::Text {
            name: "g.toml".to_owned(),
            text,
        });
        let config = Config::load_for_serve(Sources {
            file,
            ..Sources::default()
        })
        .unwrap();
        App::build(config).await.unwrap()
    }

    /// A request to one of the routes, with damage.
    #[derive(Clone, Debug)]
    struct Asked {
        method: Method,
        path: Vec<u8>,
        headers: Vec<(&'static str, Vec<u8>)>,
        body: Vec<u8>,
    }

    fn asked() -> impl Strategy<Value = Asked> {
        let odd = || {
            prop_oneof![
                "[a-z]{1,3}".prop_map(String::into_bytes),
                "(run|thr|del)_[0-9a-f]{32}".prop_map(String::into_bytes),
                "(%[0-9a-fA-F]{2}|%[g-z]?|[./;:@]){1,6}".prop_map(String::into_bytes),
                prop::collection::vec(0x80_u8.., 1..4),
            ]
        };
        let header = (
            prop::sample::select(
                &[
                    "prefer",
                    "last-event-id",
                    "idempotency-key",
                    "authorization",
                    "accept",
                    "x-request-id",
                    "origin",
                ][..],
            ),
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..40),
                prop::sample::select(
                    &[
                        "wait=18446744073709551615",
                        "respond-async",
                        "text/event-stream",
                        "Bearer x",
                        "1"
                    ][..]
                )
                .prop_map(|text| text.as_bytes().to_vec()),
            ],
        );
        let body = prop_oneof![
            "[^{]{0,20}".prop_map(String::into_bytes),
            prop::sample::select(
                &[
                    r#"{"metadata": {"a": "b"}}"#,
                    r#"{"tool_outputs": []}"#,
                    r#"{"ttl_ms": null}"#,
                    r#"{"content": 1}"#
                ][..]
            )
            .prop_map(|text| text.as_bytes().to_vec()),
        ];
        let query = prop_oneof![
            Just(Vec::new()),
            "\\?(limit|order|after|before|which|verify|[a-z%]{0,2}|&|=|%ff|[0-9]{0,12}){0,6}"
                .prop_map(String::into_bytes),
        ];
        let given = (
            prop::collection::vec(odd(), 3),
            prop::collection::vec(header, 0..4),
            body,
            query,
            any::<bool>(),
        );
        (prop::sample::select(routes()), given).prop_map(|(route, given)| {
            let Route { method, path, .. } = route;
            let (names, mut headers, body, query, has_key) = given;
            let mut names = names.iter();
            let segment = |segment: &str| match segment.strip_prefix('{') {
                Some(_) => names.next().cloned().unwrap_or_default(),
                None => segment.as_bytes().to_vec(),
            };
            let path = path.split('/').map(segment).collect::<Vec<_>>().join(&b'/');
            if has_key {
                headers.retain(|(name, _)| *name != "authorization");
                headers.push(("authorization", format!("Bearer {KEY}").into_bytes()));
            }
            headers.push(("content-type", b"application/json".to_vec()));
            Asked {
                method,
                path: [path, query].concat(),
                headers,
                body,
            }
        })
    }

    /// Sends a request. `None` if it is not a valid request of HTTP.
    async fn ask(router: Router, asked: Asked) -> Option<Response> {
        let mut request = Request::builder().method(asked.method).uri(asked.path);
        for (name, value) in asked.headers {
            let Ok(value) = HeaderValue::from_bytes(&value) else {
                continue;
            };
            request = request.header(HeaderName::from_static(name), value);
        }
        let request = request.body(Body::from(asked.body)).ok()?;
        Some(router.oneshot(request).await.unwrap())
    }

    #[test]
    fn whatever_is_asked_has_an_answer() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let app = runtime.block_on(app(folder.path()));
        proptest!(|(asked in asked())| {
            let told = runtime.block_on(async {
                let response = ask(app.router.clone(), asked.clone()).await?;
                let (status, headers) = (response.status(), response.headers().clone());
                let body = response.into_body().collect().await.unwrap().to_bytes();
                Some((status, headers, body))
            });
            if let Some((status, headers, body)) = told {
                prop_assert!(!status.is_server_error(), "{:?}: {}", asked, status);
                prop_assert!(headers.contains_key("x-request-id"));
                if status.is_client_error() {
                    prop_assert_eq!(&headers["content-type"], "application/problem+json");
                    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
                    prop_assert_eq!(&problem["status"], status.as_u16());
                    prop_assert!(problem["type"].is_string() && problem["detail"].is_string());
                } else {
                    prop_assert!(status == StatusCode::ACCEPTED || status == StatusCode::OK, "{}", status);
                }
            }
        });
        runtime.shutdown_background();
    }
}
