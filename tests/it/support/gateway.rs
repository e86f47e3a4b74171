//! The real binary as a child process, with its own configuration and port.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;
use tempfile::TempDir;

use super::contract;

/// Longest wait for anything that a test does not measure. It is long, since the machine may be
/// busy.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A running gateway. Dropping it kills the process; a panic that it logged fails the test.
#[derive(Debug)]
pub(crate) struct Gateway {
    child: Child,
    url: String,
    logs: Arc<Mutex<Vec<String>>>,
    client: reqwest::Client,
    _config: TempDir,
}

/// An answer of the gateway; `body` is a string if the body is not JSON.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{:#}", self.body);
        self.body
    }

    /// Returns status and problem type of a problem document.
    #[track_caller]
    pub(crate) fn problem(&self) -> (u16, &str) {
        assert_eq!(
            self.headers["content-type"], "application/problem+json",
            "{self:?}"
        );
        let name = self.body["type"]
            .as_str()
            .unwrap()
            .strip_prefix("urn:threadkeeper:problem:")
            .unwrap();
        assert_eq!(
            self.body["request_id"],
            self.headers["x-request-id"].to_str().unwrap()
        );
        assert_eq!(self.body["status"], self.status.as_u16());
        (self.status.as_u16(), name)
    }
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) data: Value,
}

impl Gateway {
    /// Starts `threadkeeper serve` with this configuration (TOML) and waits until it listens.
    /// `listen` is added.
    pub(crate) async fn start(config: &str) -> Self {
        Self::start_with(config, &[]).await
    }

    /// The same with these environment variables.
    pub(crate) async fn start_with(config: &str, environment: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Self::command(&["serve", "--listen", "127.0.0.1:0", "--config"]);
        command.arg(&file).envs(environment.iter().copied());
        Self::spawn(command, folder).await
    }

    /// Returns a command that starts the binary in an environment without the test process's
    /// settings.
    pub(crate) fn command(args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_threadkeeper"));
        command
            .args(args)
            .env_remove("DATABASE_URL")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        for (name, _) in std::env::vars_os()
            .filter(|(name, _)| name.to_string_lossy().starts_with("THREADKEEPER_"))
        {
            command.env_remove(name);
        }
        // This hides a configuration in the usual place of this machine.
        command.env("THREADKEEPER_CONFIG", "/dev/null");
        command
    }

    /// Starts a command that opens a listener, and waits until it listens.
    pub(crate) async fn spawn(mut command: Command, config: TempDir) -> Self {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let logs: Arc<Mutex<Vec<String>>> = Arc::default();
        let (listening, listens) = mpsc::channel();
        let sink = Arc::clone(&logs);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("listening")
                    && let Some(address) = address_in(&line)
                {
                    drop(listening.send(address));
                }
                sink.lock().unwrap().push(line);
            }
        });
        let address = tokio::task::spawn_blocking(move || listens.recv_timeout(PATIENCE))
            .await
            .unwrap();
        let Ok(address) = address else {
            drop(child.kill());
            panic!(
                "the gateway did not start:\n{}",
                logs.lock().unwrap().join("\n")
            );
        };
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .unwrap();
        Self {
            child,
            url: format!("http://{address}"),
            logs,
            client,
            _config: config,
        }
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub(crate) async fn send(&self, request: RequestBuilder) -> Answer {
        let request = request.build().unwrap();
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let response = self.client.execute(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        // CORS preflights are answered before the routes, and the document does not describe
        // them.
        if method != Method::OPTIONS {
            contract::check(&method, &path, status, &headers, &text);
        }
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer {
            status,
            headers,
            body,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::PATCH, path).json(body))
            .await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Deletes with this `Prefer` header, for example to wait.
    pub(crate) async fn delete_after(&self, path: &str, prefer: &str) -> Answer {
        self.send(self.request(Method::DELETE, path).header("prefer", prefer))
            .await
    }

    /// Posts, and does not wait for the answer.
    pub(crate) fn post_in_background(&self, path: &str, body: &Value) -> tokio::task::JoinSet<()> {
        let request = self.request(Method::POST, path).json(body);
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move { drop(request.send().await) });
        task
    }

    /// Posts a text to `{scope}/messages`, which must succeed. Returns the answer's JSON.
    #[track_caller]
    pub(crate) fn say(&self, scope: &str, text: &str) -> impl Future<Output = Value> + use<> {
        let request = self.request(Method::POST, &format!("{scope}/messages"));
        let request = request.json(&serde_json::json!({"content": text}));
        async move {
            let response = request.send().await.unwrap();
            let (status, headers) = (response.status(), response.headers().clone());
            let (path, body) = (
                response.url().path().to_owned(),
                response.text().await.unwrap(),
            );
            contract::check(&Method::POST, &path, status, &headers, &body);
            assert_eq!(status, StatusCode::OK, "{body}");
            serde_json::from_str(&body).unwrap()
        }
    }

    /// Opens the events of a run that follow the one with id `after`.
    pub(crate) async fn events(&self, scope: &str, run: &str, after: Option<&str>) -> EventReader {
        EventReader::new(
            self.open_events(&format!("{scope}/runs/{run}/events"), after)
                .await,
        )
    }

    /// Requests the events at this path that follow the one with id `after`.
    pub(crate) async fn open_events(&self, path: &str, after: Option<&str>) -> Response {
        let mut request = self.request(Method::GET, path);
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response = request.send().await.unwrap();
        contract::check_head(&Method::GET, path, response.status(), response.headers());
        response
    }

    /// Posts a message with `stream: true`.
    pub(crate) async fn stream(&self, scope: &str, text: &str) -> EventReader {
        let body = serde_json::json!({"content": text, "stream": true});
        let response = self
            .request(Method::POST, &format!("{scope}/messages"))
            .json(&body)
            .send()
            .await
            .unwrap();
        assert_eq!(
            response.status(),
            StatusCode::OK,
            "{:?}",
            response.text().await
        );
        EventReader::new(response)
    }

    /// Repeats a GET until `wanted` accepts the answer.
    pub(crate) async fn until(&self, path: &str, wanted: impl Fn(&Answer) -> bool) -> Answer {
        let start = Instant::now();
        loop {
            let answer = self.get(path).await;
            if wanted(&answer) {
                return answer;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{path} never gave the wanted answer: {answer:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until `wanted` accepts a line of the log. All earlier lines can be read then.
    pub(crate) async fn logged(&self, wanted: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !self.logs().iter().any(|line| wanted(line)) {
            assert!(
                start.elapsed() < PATIENCE,
                "the gateway never logged the wanted line"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn logs(&self) -> Vec<String> {
        self.logs.lock().unwrap().clone()
    }

    /// Sends SIGKILL and waits for the end.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    /// Sends SIGSTOP and waits until all threads have stopped. [`thaw`](Self::thaw) continues the
    /// process.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
        let start = Instant::now();
        // A thread that runs when the signal arrives continues for a moment.
        while !self.is_stopped() {
            assert!(start.elapsed() < PATIENCE, "the gateway did not stop");
            std::thread::yield_now();
        }
    }

    fn is_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        threads.into_iter().all(|thread| {
            // A missing file is a thread that has just ended. The name in parentheses may contain
            // anything.
            let status =
                std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
            status
                .rsplit_once(") ")
                .is_none_or(|(_, rest)| rest.starts_with('T'))
        })
    }

    /// Sends SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Waits until the process ends without a signal from here.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the gateway did not exit");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let logs = self.logs();
            let tail = logs
                .iter()
                .rev()
                .take(40)
                .rev()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join("\n");
            eprintln!("the gateway's last log lines:\n{tail}");
        } else if let Some(line) = self.logs().iter().find(|line| line.contains("panic")) {
            panic!("the gateway panicked: {line}");
        }
    }
}

/// Reads an event stream and checks its events against the OpenAPI document.
pub(crate) struct EventReader {
    bytes: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    /// Bytes that are not a whole character yet.
    pending: Vec<u8>,
    buffer: String,
    pub(crate) comments: usize,
}

impl EventReader {
    pub(crate) fn new(response: Response) -> Self {
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let path = response.url().path();
        let method = if path.ends_with("/events") {
            Method::GET
        } else {
            Method::POST
        };
        contract::check_head(&method, path, response.status(), response.headers());
        Self {
            bytes: response.bytes_stream().boxed(),
            pending: Vec::new(),
            buffer: String::new(),
            comments: 0,
        }
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.next_or_broken().await.unwrap()
    }

    /// The next event of a connection that may break.
    pub(crate) async fn next_or_broken(&mut self) -> reqwest::Result<Option<Event>> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..end + 2).collect();
                let field = |name: &str| {
                    block
                        .lines()
                        .find_map(|line| line.strip_prefix(name))
                        .unwrap_or_default()
                        .trim()
                        .to_owned()
                };
                if block.starts_with(':') {
                    self.comments += 1;
                    continue;
                }
                let data = serde_json::from_str(&field("data:")).unwrap();
                let event = Event {
                    id: field("id:"),
                    name: field("event:"),
                    data,
                };
                contract::check_event(&event);
                return Ok(Some(event));
            }
            let chunk = tokio::time::timeout(PATIENCE, self.bytes.next()).await;
            let Some(chunk) = chunk.expect("the stream went silent") else {
                return Ok(None);
            };
            self.pending.extend_from_slice(&chunk?);
            // A chunk may end within a character.
            let whole = self
                .pending
                .utf8_chunks()
                .next()
                .map_or(0, |chunk| chunk.valid().len());
            self.buffer
                .push_str(std::str::from_utf8(&self.pending[..whole]).unwrap());
            self.pending.drain(..whole);
        }
    }

    /// Returns the events up to the one whose deltas complete `text`.
    pub(crate) async fn until_text(&mut self, text: &str) -> Vec<Event> {
        let mut events = Vec::new();
        while !text_of(&events).contains(text) {
            events.push(self.next().await.expect("the stream goes on"));
        }
        events
    }

    /// Returns the events before the connection breaks.
    pub(crate) async fn until_broken(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Ok(Some(event)) = self.next_or_broken().await {
            events.push(event);
        }
        events
    }

    pub(crate) async fn rest(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// The text of all deltas.
pub(crate) fn text_of(events: &[Event]) -> String {
    events
        .iter()
        .filter(|e| e.name == "message.delta")
        .map(|e| e.data["text"].as_str().unwrap())
        .collect()
}

/// Joins the deltas of one message that follow each other, since a second reading may split the
/// text differently.
pub(crate) fn joined(events: &[Event]) -> Vec<Event> {
    let mut joined: Vec<Event> = Vec::new();
    for event in events {
        match joined.last_mut() {
            Some(last) if last.name == "message.delta" && is_same_message(last, event) => {
                let text = format!(
                    "{}{}",
                    last.data["text"].as_str().unwrap(),
                    event.data["text"].as_str().unwrap()
                );
                (last.data["text"], last.id) = (text.into(), event.id.clone());
            }
            _ => joined.push(event.clone()),
        }
    }
    joined
}

fn is_same_message(one: &Event, other: &Event) -> bool {
    let fields = |event: &Event| (event.data["message"].clone(), event.data["phase"].clone());
    one.name == other.name && fields(one) == fields(other)
}

/// The text of a message's first part.
pub(crate) fn text(message: &Value) -> &str {
    let mut parts = message["content"].as_array().into_iter().flatten();
    parts
        .find_map(|part| part["text"].as_str())
        .unwrap_or_else(|| panic!("no text in {message:#}"))
}

fn address_in(line: &str) -> Option<String> {
    let start = line.find("127.0.0.1:").or_else(|| line.find("0.0.0.0:"))?;
    let address: String = line[start..]
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.' || *c == ':')
        .collect();
    Some(address.replace("0.0.0.0:", "127.0.0.1:"))
}

/// The path as a TOML string.
pub(crate) fn quoted(path: &Path) -> String {
    Value::String(path.display().to_string()).to_string()
}
