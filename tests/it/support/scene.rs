//! A database, a simulated upstream, and gateways between them.

use std::net::SocketAddr;

use threadkeeper::simulator::{Simulator, SimulatorConfig, SimulatorHandle};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::chance::seed;
use super::database::TestDatabase;
use super::gateway::Gateway;

/// The protocol of the upstream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Protocol {
    Assistants,
    Responses,
    /// Responses at a server without conversations.
    Chain,
}

impl Protocol {
    /// Returns the protocol that the seed of this test run chooses.
    pub(crate) fn by_chance() -> Self {
        let protocol = [Self::Assistants, Self::Responses, Self::Chain][(seed() % 3) as usize];
        println!("with {protocol:?}");
        protocol
    }
}

/// The engine of the gateway's database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Backend {
    Sqlite,
    Postgres,
}

/// The database and the simulator of one test.
pub(crate) struct Scene {
    pub(crate) protocol: Protocol,
    pub(crate) backend: Backend,
    pub(crate) database: TestDatabase,
    pub(crate) simulator: SimulatorHandle,
    pub(crate) upstream_url: String,
    stop: CancellationToken,
    _tasks: JoinSet<()>,
}

impl Scene {
    pub(crate) async fn new(protocol: Protocol, backend: Backend) -> Self {
        Self::with(protocol, backend, SimulatorConfig::default()).await
    }

    /// Makes a scene with a protocol. The seed of this test run chooses the store.
    pub(crate) async fn by_chance(protocol: Protocol) -> Self {
        let backend = if seed() >> (protocol as u32) & 1 == 0 {
            Backend::Sqlite
        } else {
            Backend::Postgres
        };
        println!("on {backend:?}");
        Self::new(protocol, backend).await
    }

    pub(crate) async fn with(
        protocol: Protocol,
        backend: Backend,
        config: SimulatorConfig,
    ) -> Self {
        let database = match backend {
            Backend::Sqlite => TestDatabase::sqlite().await,
            Backend::Postgres => TestDatabase::postgres().await,
        };
        Self::on(database, protocol, backend, config).await
    }

    /// Makes a scene on an existing database.
    pub(crate) async fn on(
        database: TestDatabase,
        protocol: Protocol,
        backend: Backend,
        config: SimulatorConfig,
    ) -> Self {
        let config = SimulatorConfig {
            conversations: protocol != Protocol::Chain,
            ..config
        };
        let simulator = Simulator::bind(config, SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        let (handle, upstream_url, stop) = (
            simulator.handle(),
            simulator.base_url(),
            CancellationToken::new(),
        );
        let mut tasks = JoinSet::new();
        tasks.spawn(simulator.run(stop.clone()));
        Self {
            protocol,
            backend,
            database,
            simulator: handle,
            upstream_url,
            stop,
            _tasks: tasks,
        }
    }

    /// Starts a gateway without further settings.
    pub(crate) async fn gateway(&self) -> Gateway {
        Gateway::start(&self.config("")).await
    }

    /// Starts a gateway with further settings (TOML).
    pub(crate) async fn gateway_with(&self, more: &str) -> Gateway {
        Gateway::start(&self.config(more)).await
    }

    /// Starts a gateway with further settings (TOML) of its upstream.
    pub(crate) async fn gateway_upstream(&self, upstream: &str) -> Gateway {
        self.gateway_both("", upstream).await
    }

    /// Starts a gateway with further settings of its own and of its upstream.
    pub(crate) async fn gateway_both(&self, more: &str, upstream: &str) -> Gateway {
        Gateway::start(&self.config_with(more, upstream)).await
    }

    /// Stops a gateway and starts another one with further settings of its upstream.
    pub(crate) async fn gateway_instead(&self, mut other: Gateway, upstream: &str) -> Gateway {
        other.terminate();
        other.exit().await;
        self.gateway_upstream(upstream).await
    }

    /// Adds items to a conversation directly, as another client of the upstream may.
    pub(crate) async fn add_items(&self, conversation: &str, items: &serde_json::Value) {
        let url = format!("{}/conversations/{conversation}/items", self.upstream_url);
        let request = reqwest::Client::new().post(url).bearer_auth("sk-other");
        let answer = request
            .json(&serde_json::json!({"items": items}))
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "{:?}", answer.text().await);
    }

    /// Adds a message to an upstream thread directly, as another client of the upstream may.
    pub(crate) async fn write(&self, thread: &str, role: &str, text: &str) {
        let client = reqwest::Client::new();
        let (url, body) = if self.protocol == Protocol::Assistants {
            (
                format!("threads/{thread}/messages"),
                serde_json::json!({"role": role, "content": text}),
            )
        } else {
            let kind = if role == "user" {
                "input_text"
            } else {
                "output_text"
            };
            let part = serde_json::json!({"type": kind, "text": text});
            let item = serde_json::json!({"type": "message", "role": role, "content": [part]});
            (
                format!("conversations/{thread}/items"),
                serde_json::json!({"items": [item]}),
            )
        };
        let request = client
            .post(format!("{}/{url}", self.upstream_url))
            .bearer_auth("sk-other");
        let request = request.header("openai-beta", "assistants=v2").json(&body);
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{:?}", answer.text().await);
    }

    /// Deletes an upstream thread directly, as another client of the upstream may.
    pub(crate) async fn delete_thread(&self, thread: &str) {
        let kind = if self.protocol == Protocol::Assistants {
            "threads"
        } else {
            "conversations"
        };
        let url = format!("{}/{kind}/{thread}", self.upstream_url);
        let request = reqwest::Client::new().delete(url).bearer_auth("sk-other");
        let answer = request
            .header("openai-beta", "assistants=v2")
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "{:?}", answer.text().await);
    }

    /// Makes the next `times` requests of a kind fail with this fault.
    pub(crate) fn fault(&self, on: &str, fault: &str, times: u32) {
        let fault = threadkeeper::simulator::Fault {
            on: on.to_owned(),
            fault: fault.to_owned(),
            times,
        };
        self.simulator.add_fault(fault).unwrap();
    }

    /// Returns a configuration with this scene's database and simulator. `more` may open further
    /// tables, each once.
    pub(crate) fn config(&self, more: &str) -> String {
        self.config_with(more, "")
    }

    /// The same with further settings of its upstream. The store's wait is long, since a busy
    /// machine must not cause refusals.
    pub(crate) fn config_with(&self, more: &str, upstream: &str) -> String {
        let (kind, assistant) = match self.protocol {
            Protocol::Assistants => ("assistants", "assistant_id = \"asst_test\""),
            Protocol::Responses | Protocol::Chain => ("responses", "model = \"test-model\""),
        };
        let conversations = self.protocol != Protocol::Chain || kind == "assistants";
        let conversations = if conversations {
            ""
        } else {
            "conversations = false"
        };
        format!(
            "{more}\n[store]\nurl = {store:?}\nmax_wait = \"30s\"\n\
             [upstreams.simulated]\nkind = \"{kind}\"\nbase_url = \"{url}\"\napi_key = \"sk-planted-key\"\n{conversations}\n{upstream}\n\
             [assistants.default]\nupstream = \"simulated\"\n{assistant}\ninstructions = \"Be kind.\"\n",
            store = self.database.url(),
            url = self.upstream_url,
        )
    }

    /// Returns the ids of all upstream threads at the simulator that are not deleted.
    pub(crate) fn upstream_threads(&self) -> Vec<String> {
        let threads = self
            .simulator
            .threads()
            .into_iter()
            .filter(|thread| !thread.deleted);
        threads.map(|thread| thread.id).collect()
    }
}

impl Drop for Scene {
    /// Asserts that no gateway broke a rule of the upstream during the test.
    fn drop(&mut self) {
        self.stop.cancel();
        if !std::thread::panicking() {
            let stats = self.simulator.stats();
            assert!(
                stats.max_generating_runs_per_thread <= 1,
                "two runs at once on a thread: {stats:?}"
            );
            assert_eq!(
                stats.violations,
                Vec::<String>::new(),
                "the gateway broke a rule of the upstream"
            );
        }
    }
}

/// Makes a test of each function `case(Scene)` for every protocol on every store. It is for what
/// protocol and store decide together.
macro_rules! on_every_scene {
    ($($case:ident),+ $(,)?) => {
        on_every_scene!(@ assistants_sqlite Assistants Sqlite [$($case)+]);
        on_every_scene!(@ assistants_postgres Assistants Postgres [$($case)+]);
        on_every_scene!(@ responses_sqlite Responses Sqlite [$($case)+]);
        on_every_scene!(@ responses_postgres Responses Postgres [$($case)+]);
        on_every_scene!(@ chain_sqlite Chain Sqlite [$($case)+]);
        on_every_scene!(@ chain_postgres Chain Postgres [$($case)+]);
    };
    (@ $module:ident $protocol:ident $backend:ident [$($case:ident)+]) => {
        mod $module {
            use crate::support::scene::{Backend, Protocol, Scene};
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    super::$case(Scene::new(Protocol::$protocol, Backend::$backend).await).await;
                }
            )+
        }
    };
}
pub(crate) use on_every_scene;

/// The same for each protocol once, and for each store at least once. It is for what the protocol
/// decides.
macro_rules! on_each_protocol {
    ($($case:ident),+ $(,)?) => {
        crate::support::scene::on_every_scene!(@ assistants Assistants Sqlite [$($case)+]);
        crate::support::scene::on_every_scene!(@ responses Responses Postgres [$($case)+]);
        crate::support::scene::on_every_scene!(@ chain Chain Sqlite [$($case)+]);
    };
}
pub(crate) use on_each_protocol;

/// The same on each store with one protocol. It is for what the store decides.
macro_rules! on_each_store {
    ($($case:ident),+ $(,)?) => {
        crate::support::scene::on_every_scene!(@ sqlite Responses Sqlite [$($case)+]);
        crate::support::scene::on_every_scene!(@ postgres Responses Postgres [$($case)+]);
    };
}
pub(crate) use on_each_store;

/// The same for each protocol on a store that the seed chooses. It is for tests that take long
/// and differ in every run.
macro_rules! on_each_protocol_by_chance {
    ($($case:ident),+ $(,)?) => {
        $(
            mod $case {
                use crate::support::scene::{Protocol, Scene};

                #[tokio::test(flavor = "multi_thread")]
                async fn assistants() {
                    super::$case(Scene::by_chance(Protocol::Assistants).await).await;
                }

                #[tokio::test(flavor = "multi_thread")]
                async fn responses() {
                    super::$case(Scene::by_chance(Protocol::Responses).await).await;
                }

                #[tokio::test(flavor = "multi_thread")]
                async fn chain() {
                    super::$case(Scene::by_chance(Protocol::Chain).await).await;
                }
            }
        )+
    };
}
pub(crate) use on_each_protocol_by_chance;

/// The same for each protocol on Postgres. It is for several processes on one database, where the
/// protocol matters.
macro_rules! on_every_shared_scene {
    ($($case:ident),+ $(,)?) => {
        crate::support::scene::on_every_scene!(@ shared_assistants Assistants Postgres [$($case)+]);
        crate::support::scene::on_every_scene!(@ shared_responses Responses Postgres [$($case)+]);
        crate::support::scene::on_every_scene!(@ shared_chain Chain Postgres [$($case)+]);
    };
}
pub(crate) use on_every_shared_scene;

/// The same with one protocol on Postgres. It is for several processes, where the protocol does
/// not matter.
macro_rules! on_shared_scene {
    ($($case:ident),+ $(,)?) => {
        crate::support::scene::on_every_scene!(@ shared Responses Postgres [$($case)+]);
    };
}
pub(crate) use on_shared_scene;

/// The same on Postgres with a protocol that the seed chooses. It is for tests that take long and
/// differ in every run.
macro_rules! on_shared_scene_by_chance {
    ($($case:ident),+ $(,)?) => {
        mod shared_by_chance {
            use crate::support::scene::{Backend, Protocol, Scene};
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    super::$case(Scene::new(Protocol::by_chance(), Backend::Postgres).await).await;
                }
            )+
        }
    };
}
pub(crate) use on_shared_scene_by_chance;
