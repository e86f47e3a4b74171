//! The settings and the banner of `threadkeeper dev`, which needs no configuration.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use secrecy::SecretString;

use crate::config::{AssistantConfig, Config, UpstreamConfig, UpstreamKind};
use crate::health::reachable;
use crate::simulator::SimulatorConfig;

/// Returns the settings of a simulator that replies at the pace of a model, so that streams look real.
pub fn simulator() -> SimulatorConfig {
    SimulatorConfig {
        latency: Duration::from_millis(150),
        token_interval: Duration::from_millis(30),
        ..SimulatorConfig::default()
    }
}

/// Returns the settings of a gateway with a SQLite file below `data`, and with an assistant for each
/// protocol of the simulator.
pub fn config(listen: SocketAddr, data: &Path, simulator: &str) -> anyhow::Result<Config> {
    let database = data.join("threadkeeper.db");
    let database = database.to_str().context("--data must be valid UTF-8")?;
    let mut config = Config::default();
    config.server.listen = listen;
    config.server.allow_unauthenticated = true;
    config.server.shutdown_grace = Duration::from_secs(5);
    config.store.url = Some(SecretString::from(format!("sqlite:{database}")));
    for (name, kind) in [
        ("simulator", UpstreamKind::Responses),
        ("simulator-assistants", UpstreamKind::Assistants),
    ] {
        let base_url = simulator.parse().context("the simulator's own URL")?;
        let upstream = UpstreamConfig {
            api_key: Some(SecretString::from("simulated")),
            ..UpstreamConfig::new(kind, base_url)
        };
        config.upstreams.insert(name.to_owned(), upstream);
    }
    let default = AssistantConfig {
        upstream: "simulator".to_owned(),
        model: Some("simulated".to_owned()),
        ..AssistantConfig::default()
    };
    let assistants = AssistantConfig {
        upstream: "simulator-assistants".to_owned(),
        assistant_id: Some("asst_simulated".to_owned()),
        ..AssistantConfig::default()
    };
    config.assistants.insert("default".to_owned(), default);
    config
        .assistants
        .insert("assistants-v2".to_owned(), assistants);
    Ok(config)
}

/// Returns the text that `dev` prints: replies are simulated, and these lines are worth a try.
pub fn banner(address: SocketAddr, data: &Path) -> String {
    let open = if address.ip().to_canonical().is_loopback() {
        String::new()
    } else {
        format!(
            "  \
  OPEN TO OTHERS: this gateway asks for no credentials. Every program that
  reaches {address} can read, write and delete all conversations. In a
  container, publish the port on loopback only: -p 127.0.0.1:{port}:{port}
",
            port = address.port()
        )
    };
    let user = format!("http://{}/v1/users/alice", reachable(address));
    format!(
        r#"
  ┌──────────────────────────────────────────────────────────────────────────┐
  │  REPLIES ARE SIMULATED, without a model. For a real one, use `serve`.    │
  └──────────────────────────────────────────────────────────────────────────┘
{open}  Conversations are stored in {data}. Ctrl-C stops. Try in another terminal:

  curl --json '{{"content": "Hello, I am Alice."}}' {user}/messages
  curl -N --json '{{"content": "Tell me more.", "stream": true}}' {user}/messages
  curl --json '{{"content": "Hello from a tab."}}' {user}/sessions/tab-1/messages
  curl --json '{{"content": "How do I return it?"}}' {user}/topics/order-4711/messages
  curl {user}/thread
  curl '{user}/messages?order=asc'
  curl -X DELETE {user}
"#,
        data = data.display(),
    )
}
