//! Proxies in front of Postgres and of an upstream, which a [`Gate`] can stop at each step. The
//! one for Postgres counts the round trips of the frontend/backend protocol.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use url::Url;

use super::gate::Gate;

/// Which requests count as steps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Steps {
    All,
    /// Requests that may change something for others. Reads and uncommitted statements do not
    /// count.
    Changes,
}

/// A proxy in front of a database.
pub(crate) struct DatabaseTap {
    pub(crate) url: String,
    trips: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl DatabaseTap {
    /// Opens a proxy in front of the database with this URL.
    pub(crate) async fn on(url: &str) -> Self {
        Self::gated(url, &Gate::default(), Steps::All).await
    }

    /// The same with a gate. Each executed statement is a step.
    pub(crate) async fn gated(url: &str, gate: &Gate, steps: Steps) -> Self {
        let target = Url::parse(url).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut tapped = target.clone();
        tapped.set_host(Some("127.0.0.1")).unwrap();
        tapped
            .set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        tapped.set_query(Some("sslmode=disable"));
        let trips: Arc<AtomicUsize> = Arc::default();
        let (counter, gate) = (Arc::clone(&trips), gate.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (counter, target, gate) = (Arc::clone(&counter), target.clone(), gate.clone());
                connections.spawn(async move {
                    let socket = target
                        .query_pairs()
                        .find(|(name, _)| name == "host")
                        .map(|(_, folder)| folder.into_owned());
                    let port = target.port().unwrap_or(5432);
                    // Either side may close at any time.
                    let _ = if let Some(folder) = socket {
                        let path = PathBuf::from(folder).join(format!(".s.PGSQL.{port}"));
                        relay(
                            client,
                            UnixStream::connect(path).await.unwrap(),
                            &counter,
                            (&gate, steps),
                        )
                        .await
                    } else {
                        let host = target.host_str().unwrap_or("localhost");
                        relay(
                            client,
                            TcpStream::connect((host, port)).await.unwrap(),
                            &counter,
                            (&gate, steps),
                        )
                        .await
                    };
                });
            }
        });
        Self {
            url: tapped.into(),
            trips,
            _task: task,
        }
    }

    /// Returns how often a client has waited for an answer.
    pub(crate) fn round_trips(&self) -> usize {
        self.trips.load(Ordering::SeqCst)
    }
}

async fn relay(
    client: TcpStream,
    server: impl AsyncRead + AsyncWrite,
    trips: &AtomicUsize,
    (gate, steps): (&Gate, Steps),
) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let (from_client, mut to_client) = tokio::io::split(client);
    let (from_server, mut to_server) = tokio::io::split(server);
    let (mut from_client, mut from_server) =
        (BufReader::new(from_client), BufReader::new(from_server));
    let is_withheld = AtomicBool::new(false);
    let questions = async {
        // The start-up message has no type.
        let length = from_client.read_i32().await?;
        let mut message = length.to_be_bytes().to_vec();
        message.resize(usize::try_from(length).unwrap(), 0);
        from_client.read_exact(&mut message[4..]).await?;
        to_server.write_all(&message).await?;
        let mut statements = Statements::default();
        let (mut asked, mut executes) = (false, false);
        // The messages of one group are sent together.
        let mut group = Vec::new();
        loop {
            let (kind, message) = next_message(&mut from_client).await?;
            statements.read(kind, &message[5..]);
            group.extend(message);
            executes |= kind == b'E' || kind == b'Q';
            // The client waits after a Query, and after the Sync that ends a group of extended
            // messages. A Sync alone is a sign of life, which the pool asks only of connections
            // that were idle for long.
            if kind == b'Q' || (kind == b'S' && asked) {
                trips.fetch_add(1, Ordering::SeqCst);
            }
            asked = kind != b'S' && kind != b'Q';
            if !asked
                && std::mem::take(&mut executes)
                && (statements.may_change() || steps == Steps::All)
            {
                let step = gate.step(|| statements.last.clone()).await?;
                is_withheld.store(step.is_withheld, Ordering::SeqCst);
            }
            if !b"PBDEC".contains(&kind) {
                to_server.write_all(&group).await?;
                to_server.flush().await?;
                group.clear();
            }
        }
    };
    let answers = async {
        let mut answers = Vec::new();
        loop {
            let (kind, message) = next_message(&mut from_server).await?;
            if is_withheld.load(Ordering::SeqCst) {
                // The answer is complete when the server is ready for the next query.
                if kind == b'Z' {
                    return Err(gate.withhold().await.into());
                }
                continue;
            }
            answers.extend(message);
            if from_server.buffer().is_empty() {
                to_client.write_all(&answers).await?;
                answers.clear();
            }
        }
    };
    tokio::select! {
        asked = questions => asked,
        answered = answers => answered,
    }
}

/// Reads the next message of those that have a type.
pub(super) async fn next_message(
    from: &mut (impl AsyncRead + Unpin),
) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_i32().await?;
    let mut message = vec![kind];
    message.extend(length.to_be_bytes());
    message.resize(1 + usize::try_from(length).unwrap(), 0);
    from.read_exact(&mut message[5..]).await?;
    Ok((kind, message))
}

/// Name and first word of a statement. The name is the one that the store writes in front, or
/// else the first words. The first word of a call of the store's functions is `CALL`.
type Asked = (String, String);

fn asked(bytes: &[u8]) -> Asked {
    let text = String::from_utf8_lossy(bytes);
    let named = text
        .strip_prefix("/* ")
        .and_then(|rest| rest.split_once(" */"));
    let said = named.map_or(&*text, |(_, said)| said);
    let words: Vec<&str> = said.split_whitespace().take(12).collect();
    let name = named.map_or_else(|| words.join(" "), |(name, _)| name.to_owned());
    let verb = if said.contains(" FROM threadkeeper_") {
        "CALL"
    } else {
        words.first().copied().unwrap_or_default()
    };
    (name, verb.to_owned())
}

/// The statements of a connection.
#[derive(Default)]
struct Statements {
    prepared: HashMap<Vec<u8>, Asked>,
    /// Name (or beginning, without a name) and first word of the last requested statement.
    last: String,
    verb: String,
    in_transaction: bool,
}

impl Statements {
    /// Reads the body of a client's message.
    fn read(&mut self, kind: u8, body: &[u8]) {
        let texts: Vec<&[u8]> = body.splitn(3, |byte| *byte == 0).collect();
        match (kind, texts.as_slice()) {
            (b'Q', [said, ..]) => (self.last, self.verb) = asked(said),
            // The name of the statement, and its text.
            (b'P', [name, said, ..]) => {
                self.prepared.insert(name.to_vec(), asked(said));
            }
            // The name of the portal, and of the statement.
            (b'B', [_, name, ..]) => {
                (self.last, self.verb) = self.prepared.get(*name).cloned().unwrap_or_default();
            }
            _ => {}
        }
    }

    /// Whether executing the last statement may change something for others.
    fn may_change(&mut self) -> bool {
        match &*self.verb {
            "BEGIN" => self.in_transaction = true,
            "COMMIT" => {
                self.in_transaction = false;
                return true;
            }
            "ROLLBACK" if self.last == "ROLLBACK" => self.in_transaction = false,
            "SELECT" | "SET" | "ROLLBACK" => {}
            _ => return !self.in_transaction,
        }
        false
    }
}

/// A proxy in front of an upstream. Each request is a step.
pub(crate) struct HttpTap {
    /// The upstream's base URL through this proxy.
    pub(crate) url: String,
    _task: JoinSet<()>,
}

#[derive(Clone)]
struct Way {
    /// The upstream's origin, without a path.
    target: String,
    client: reqwest::Client,
    gate: Gate,
    steps: Steps,
}

impl HttpTap {
    /// Opens a proxy in front of the upstream with this base URL, with a gate.
    pub(crate) async fn gated(url: &str, gate: &Gate, steps: Steps) -> Self {
        let target = Url::parse(url).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut tapped = target.clone();
        tapped
            .set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let way = Way {
            target: target.origin().ascii_serialization(),
            client,
            gate: gate.clone(),
            steps,
        };
        let router = Router::new().fallback(pass).with_state(way);
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            url: tapped.into(),
            _task: task,
        }
    }
}

async fn pass(
    State(way): State<Way>,
    method: Method,
    uri: Uri,
    mut headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut is_withheld = false;
    if way.steps == Steps::All || method != Method::GET {
        let Ok(step) = way.gate.step(|| format!("{method} {}", uri.path())).await else {
            return StatusCode::BAD_GATEWAY.into_response();
        };
        is_withheld = step.is_withheld;
    }
    headers.remove(header::HOST);
    headers.remove(header::CONNECTION);
    let request = way
        .client
        .request(method, format!("{}{uri}", way.target))
        .headers(headers)
        .body(body);
    let Ok(answer) = request.send().await else {
        return StatusCode::BAD_GATEWAY.into_response();
    };
    let (status, mut headers) = (answer.status(), answer.headers().clone());
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::CONNECTION);
    if is_withheld {
        let _ = answer.bytes().await;
        let _ = way.gate.withhold().await;
        return StatusCode::BAD_GATEWAY.into_response();
    }
    (status, headers, Body::from_stream(answer.bytes_stream())).into_response()
}
