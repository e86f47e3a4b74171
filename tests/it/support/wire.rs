//! A running simulator, and a plain client of its wire protocols.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::{Method, RequestBuilder};
use serde_json::Value;
use threadkeeper::simulator::{Simulator, SimulatorConfig, SimulatorHandle, Stats};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A simulator on a free port. Dropping it stops the simulator.
pub(crate) struct Sim {
    pub(crate) base: String,
    pub(crate) root: String,
    pub(crate) handle: SimulatorHandle,
    client: reqwest::Client,
    _server: JoinSet<()>,
    _stop: DropGuard,
}

/// An event of a stream: its `event:` line (empty without one) and its data.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) data: String,
}

impl Event {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).expect("the data of this event is JSON")
    }
}

impl Sim {
    pub(crate) async fn start(config: SimulatorConfig) -> Self {
        let simulator = Simulator::bind(config, SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        let stop = CancellationToken::new();
        let (base, handle) = (simulator.base_url(), simulator.handle());
        let root = format!("http://{}", simulator.addr());
        let mut server = JoinSet::new();
        server.spawn(simulator.run(stop.clone()));
        let client = reqwest::Client::builder()
            .tcp_nodelay(true)
            .build()
            .unwrap();
        Self {
            base,
            root,
            handle,
            client,
            _server: server,
            _stop: stop.drop_guard(),
        }
    }

    pub(crate) async fn instant() -> Self {
        Self::start(SimulatorConfig::default()).await
    }

    /// A request with credentials and the beta header. `path` begins with a slash and is below
    /// `/v1`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth("sk-test")
            .header("OpenAI-Beta", "assistants=v2")
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, Value) {
        let request = self.request(method, path);
        let request = if let Some(body) = body {
            request.json(body)
        } else {
            request
        };
        let response = tokio::time::timeout(PATIENCE, request.send())
            .await
            .unwrap()
            .unwrap();
        let status = response.status().as_u16();
        (status, response.json().await.unwrap())
    }

    /// Posts, which must succeed. Returns the answer.
    pub(crate) async fn post(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.send(Method::POST, path, Some(&body)).await;
        assert_eq!(status, 200, "POST {path}: {answer}");
        answer
    }

    /// Gets, which must succeed. Returns the answer.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, answer) = self.send(Method::GET, path, None).await;
        assert_eq!(status, 200, "GET {path}: {answer}");
        answer
    }

    /// Deletes, which must succeed. Returns the answer.
    pub(crate) async fn delete(&self, path: &str) -> Value {
        let (status, answer) = self.send(Method::DELETE, path, None).await;
        assert_eq!(status, 200, "DELETE {path}: {answer}");
        answer
    }

    /// Posts, which must fail. Returns status and error object.
    pub(crate) async fn refused(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, answer) = self.send(Method::POST, path, Some(&body)).await;
        assert!(status >= 400, "POST {path}: {answer}");
        (status, answer["error"].clone())
    }

    /// Posts, and returns the answer's event stream, which is still open.
    pub(crate) async fn open(&self, path: &str, body: &Value) -> Stream {
        Stream::of(self.request(Method::POST, path).json(body)).await
    }

    /// Posts, and returns all events of the answer's stream.
    pub(crate) async fn events(&self, path: &str, body: Value) -> Vec<Event> {
        self.open(path, &body)
            .await
            .rest()
            .await
            .expect("the stream ends properly")
    }

    /// Waits until `reached` accepts the simulator's statistics. Returns them.
    pub(crate) async fn wait_for(&self, reached: impl FnMut(&Stats) -> bool) -> Stats {
        tokio::time::timeout(PATIENCE, self.handle.wait_for(reached))
            .await
            .expect("the simulator reaches the state in time")
    }

    pub(crate) async fn thread(&self) -> String {
        id(&self.post("/threads", serde_json::json!({})).await)
    }

    pub(crate) async fn conversation(&self) -> String {
        id(&self.post("/conversations", serde_json::json!({})).await)
    }
}

/// The id of an object.
pub(crate) fn id(object: &Value) -> String {
    object["id"]
        .as_str()
        .expect("the object has an id")
        .to_owned()
}

/// Names of events. Repeats in a row count once.
pub(crate) fn names(events: &[Event]) -> Vec<&str> {
    let mut names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    names
}

/// An event stream, read by the rules of the format.
pub(crate) struct Stream {
    pub(crate) content_type: String,
    body: BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    pending: Vec<u8>,
}

impl Stream {
    pub(crate) async fn of(request: RequestBuilder) -> Self {
        let response = tokio::time::timeout(PATIENCE, request.send())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(response.status(), 200);
        let content_type = response.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        Self {
            content_type,
            body: response.bytes_stream().boxed(),
            pending: Vec::new(),
        }
    }

    /// Returns the next event, `None` at the proper end, or an error if the connection broke.
    pub(crate) async fn next(&mut self) -> reqwest::Result<Option<Event>> {
        loop {
            if let Some(event) = self.take() {
                return Ok(Some(event));
            }
            match tokio::time::timeout(PATIENCE, self.body.next())
                .await
                .expect("the stream goes on in time")
            {
                None => return Ok(None),
                Some(chunk) => self.pending.extend_from_slice(&chunk?),
            }
        }
    }

    /// Reads up to the next event with this name, and returns it.
    pub(crate) async fn until(&mut self, name: &str) -> Event {
        loop {
            let event = self
                .next()
                .await
                .unwrap()
                .unwrap_or_else(|| panic!("the stream ended before {name}"));
            if event.name == name {
                return event;
            }
        }
    }

    pub(crate) async fn rest(&mut self) -> reqwest::Result<Vec<Event>> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await? {
            events.push(event);
        }
        Ok(events)
    }

    /// Returns the remaining chunks as they arrive, not parsed.
    pub(crate) async fn raw(mut self) -> Vec<bytes::Bytes> {
        let mut chunks = Vec::new();
        while let Some(chunk) = self.body.next().await {
            chunks.push(chunk.unwrap());
        }
        chunks
    }

    fn take(&mut self) -> Option<Event> {
        loop {
            let text = &self.pending;
            let ends = |gap: &[u8]| {
                text.windows(gap.len())
                    .position(|at| at == gap)
                    .map(|at| (at, gap.len()))
            };
            let (end, gap) = [ends(b"\n\n"), ends(b"\r\n\r\n")]
                .into_iter()
                .flatten()
                .min()?;
            let block: Vec<u8> = self.pending.drain(..end + gap).collect();
            let block = String::from_utf8(block).unwrap();
            let field = |name: &str| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::to_owned)
            };
            if let Some(data) = field("data: ") {
                return Some(Event {
                    name: field("event: ").unwrap_or_default(),
                    data,
                });
            }
        }
    }
}
