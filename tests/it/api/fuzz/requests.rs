//! Requests for the operations of the document.

use std::fmt::Write as _;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use super::pool::Pool;
use super::values::{TEXTS, Values};
use super::{ALICE, OPERATOR};
use crate::support::contract;

/// Few keys, so that requests meet each other.
const KEYS: [&str; 7] = [
    "alice",
    "bob",
    "carol",
    "é 日本",
    "a/b%c?d#e",
    "%2e",
    "auth0|5f7c",
];
/// Segments instead of a key or an id. Some are no valid part of a path.
const ODD_SEGMENTS: [&str; 20] = [
    "",
    ".",
    "..",
    "%",
    "%z",
    "%zz",
    "%ff",
    "%00",
    "%0a",
    "%2F",
    "%2e%2e",
    "%F0%9F",
    "%C0%AF",
    "+",
    ";a=b",
    "a:b",
    "run_0",
    "%ED%A0%80",
    "%C2%85",
    "a%7Fb",
];
const ODD_TARGETS: [&str; 8] = [
    "/",
    "//",
    "/v1",
    "/v1/users",
    "/v1/users/",
    "/v1//users/alice/thread",
    "*",
    "/openapi.json/../healthz",
];
const ODD_ENDS: [&str; 9] = [
    "/",
    "/x",
    "%20",
    " x",
    "\u{e9}",
    "\u{1}",
    "#fragment",
    "\\",
    "\"<>`{}|^",
];
const ODD_METHODS: [&str; 7] = ["GET", "HEAD", "OPTIONS", "PUT", "TRACE", "get", "PROPFIND"];
const ODD_QUERIES: [&str; 9] = [
    "=",
    "&&",
    "a=b",
    "limit=1&limit=2",
    "%zz=%ff",
    "after=",
    "limit=%00",
    "order=%F0%9F",
    "x",
];
const ODD_VALUES: [&str; 12] = [
    "",
    "\0",
    "a\0b",
    "-1",
    "0",
    "99999999999999999999",
    "1e3",
    "+262142-12-31T23:59:59Z",
    "-262143-01-01T00:00:00Z",
    "-0001-01-01T00:00:00Z",
    "2026-02-30T00:00:00Z",
    "\u{202e}",
];
const PREFERENCES: [&str; 11] = [
    "respond-async",
    "wait=0",
    "wait=1",
    "wait=18446744073709551615",
    "wait=99999999999999999999",
    "wait=-1",
    "respond-async, wait=1",
    "wait=\"1\"; x",
    ",,;=",
    "wait",
    "return=minimal",
];
/// Longest head in bytes that the default configuration is sure to accept.
const LONGEST_HEAD: usize = 31 * 1024;
const EVENT_NUMBERS: [&str; 4] = ["0", "1", "5", "9223372036854775807"];
const ODD_EVENT_NUMBERS: [&str; 5] = ["9223372036854775808", "-1", "x", "", "1:2"];
const ODD_CREDENTIALS: [&str; 10] = [
    "Bearer chatter-of-the-tenant-default",
    "Bearer reader-of-the-tenant-default",
    "Bearer operator-of-the-tenant-other",
    "Bearer",
    "Bearer ",
    "Basic YTpi",
    "Bearer a.b.c",
    "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSJ9.",
    "bearer  x  y",
    "",
];
const ACCEPTED: [&str; 6] = [
    "text/event-stream",
    "application/json",
    "*/*",
    "text/event-stream;q=0",
    "",
    ",;,",
];
const ODD_TYPES: [&str; 6] = [
    "text/plain",
    "application/jsonx",
    "multipart/form-data",
    "",
    "application/",
    "\u{e9}",
];
const TYPES: [&str; 4] = [
    "application/json",
    "application/vnd.x+json",
    "application/json; charset=x",
    "APPLICATION/JSON",
];
/// Further headers, which must not change how the gateway reads a request.
const FURTHER: [(&str, &str); 13] = [
    ("x-request-id", "an id"),
    ("x-request-id", "mine"),
    ("cookie", "a=b"),
    ("expect", "100-continue"),
    ("origin", "https://elsewhere.example"),
    ("upgrade", "h2c"),
    ("accept-encoding", "gzip"),
    ("content-encoding", "gzip"),
    ("range", "bytes=0-1"),
    ("if-none-match", "*"),
    ("te", "trailers"),
    ("x-http-method-override", "DELETE"),
    ("x-forwarded-for", "'"),
];
const BROKEN: [(&str, &str); 7] = [
    ("bad name", "x"),
    ("x-nul", "\0"),
    ("x-long", "long"),
    ("", "x"),
    ("x-many", "many"),
    ("host", "twice"),
    ("expect", "the unexpected"),
];

/// One operation of the document.
pub(super) struct Operation {
    method: String,
    path: String,
    about: Value,
}

impl Operation {
    pub(super) fn all(document: &Value) -> Vec<Self> {
        let mut all = Vec::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, about) in methods.as_object().unwrap() {
                all.push(Self {
                    method: method.to_uppercase(),
                    path: path.clone(),
                    about: about.clone(),
                });
            }
        }
        all
    }
}

pub(super) struct Request {
    /// The operation that the request was made for.
    pub(super) operation: String,
    pub(super) method: String,
    /// The path as it was sent, without the query.
    pub(super) path: String,
    pub(super) bytes: Vec<u8>,
    /// Something in the request may be refused before any route.
    pub(super) may_be_no_http: bool,
    /// The document allows the request.
    pub(super) is_good: bool,
    /// The document's objection to the body.
    pub(super) wrong_body: Option<String>,
}

pub(super) struct Generator<'a> {
    values: Values<'a>,
    may_be_no_http: bool,
    is_good: bool,
    wrong_body: Option<String>,
}

impl<'a> Generator<'a> {
    pub(super) fn new(rng: &'a mut StdRng, document: &'a Value, pool: &'a Pool) -> Self {
        Self {
            values: Values {
                rng,
                document,
                pool,
            },
            may_be_no_http: false,
            is_good: true,
            wrong_body: None,
        }
    }

    fn chance(&mut self, of: f64) -> bool {
        self.values.rng.random_bool(of)
    }

    /// Chooses a text that the document does not allow.
    fn odd(&mut self, of: &[&'static str]) -> &'static str {
        self.is_good = false;
        self.one(of)
    }

    fn no_http(&mut self) {
        self.may_be_no_http = true;
        self.is_good = false;
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(self.values.rng).unwrap()
    }

    pub(super) fn request(mut self, operations: &[Operation]) -> Request {
        let mut operation = operations.choose(self.values.rng).unwrap();
        // Some requests must create what others refer to.
        if self.chance(0.25) {
            let messages = operations
                .iter()
                .filter(|it| it.method == "POST" && it.path.ends_with("/messages"));
            operation = self.one(&messages.collect::<Vec<_>>());
        }
        let (path, calls) = self.path(operation);
        let method = if self.chance(0.03) {
            self.odd(&ODD_METHODS)
        } else {
            &operation.method
        };
        let method = method.to_owned();
        let is_another = method != operation.method;
        let query = self.query(operation);
        let body = operation.about.get("requestBody").map(|body| {
            let schema = &body["content"]["application/json"]["schema"];
            self.body(operation, schema, calls)
        });
        let mut head = format!("{method} {path}{query} HTTP/1.1\r\n").into_bytes();
        self.headers(&mut head, operation);
        if head.len() > LONGEST_HEAD {
            self.no_http();
        }
        let bytes = self.framed(head, body);
        Request {
            operation: format!("{} {}", operation.method, operation.path),
            method,
            path: path.split(['?', '#']).next().unwrap_or_default().to_owned(),
            bytes,
            may_be_no_http: self.may_be_no_http,
            is_good: self.is_good,
            wrong_body: self.wrong_body.filter(|_| !is_another),
        }
    }

    /// Returns a path for the operation. If it leads to a run that waits for outputs, also the
    /// ids of its calls.
    fn path(&mut self, operation: &Operation) -> (String, Option<Vec<String>>) {
        if self.chance(0.02) {
            self.no_http();
            return (self.one(&ODD_TARGETS).to_owned(), None);
        }
        let (mut path, mut calls) = (operation.path.clone(), None);
        if let Some((scope, rest)) = operation.path.split_once("/runs/{run}")
            && self.chance(0.8)
        {
            let segments = scope.split('/').count();
            let asked = self.values.pool.asked(segments, self.values.rng);
            let known = match asked
                .filter(|_| rest == "/tool_outputs" || self.values.rng.random_bool(0.2))
            {
                Some((scope, run, ids)) => {
                    calls = Some(ids);
                    Some((scope, run))
                }
                None => self.values.pool.run(segments, self.values.rng),
            };
            if let Some((scope, run)) = known {
                path = format!("{scope}/runs/{run}{rest}");
            }
        }
        for (name, prefix) in [("run", "run_"), ("thread", "thr_"), ("deletion", "del_")] {
            if path.contains(&format!("{{{name}}}")) {
                let id = self.values.id(prefix);
                path = path.replace(&format!("{{{name}}}"), &id);
            }
        }
        for name in ["{user}", "{session}", "{topic}"] {
            if path.contains(name) {
                let segment = self.segment();
                path = path.replace(name, &segment);
            }
        }
        match self.values.rng.random_range(0..100) {
            0 => path.insert(0, '/'),
            1..5 => {
                self.no_http();
                path.push_str(self.one(&ODD_ENDS));
            }
            _ => return (path, calls),
        }
        self.is_good = false;
        (path, calls)
    }

    fn segment(&mut self) -> String {
        match self.values.rng.random_range(0..100) {
            0..6 => self.odd(&ODD_SEGMENTS).to_owned(),
            6 => encoded(&"k".repeat(self.one(&[255, 256]))),
            7 => encoded(&"é".repeat(128)),
            8 => {
                self.is_good = false;
                encoded(&self.one(&["k", "é"]).repeat(self.one(&[257, 4000])))
            }
            9 => encoded(self.odd(&TEXTS)),
            // The raw bytes, which hyper accepts.
            10 => {
                self.no_http();
                "é".to_owned()
            }
            // Longer than a head may be.
            11 if self.chance(0.2) => {
                self.no_http();
                "k".repeat(40_000)
            }
            _ => encoded(self.one(&KEYS)),
        }
    }

    fn query(&mut self, operation: &Operation) -> String {
        let mut pairs = Vec::new();
        for parameter in operation.about["parameters"]
            .as_array()
            .into_iter()
            .flatten()
        {
            if parameter["in"] != "query" || !self.chance(0.3) {
                continue;
            }
            let name = parameter["name"].as_str().unwrap();
            let value = self.values.of(&parameter["schema"]);
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            let text = if self.chance(0.2) {
                self.odd(&ODD_VALUES).to_owned()
            } else {
                text
            };
            pairs.push(format!("{name}={}", encoded(&text)));
        }
        // The two parameters exclude each other.
        self.is_good &= !pairs.iter().any(|it| it.starts_with("after"))
            || !pairs.iter().any(|it| it.starts_with("before"));
        if self.chance(0.04) {
            pairs.push(self.odd(&ODD_QUERIES).to_owned());
        }
        if pairs.is_empty() {
            String::new()
        } else {
            format!("?{}", pairs.join("&"))
        }
    }

    fn body(
        &mut self,
        operation: &Operation,
        schema: &Value,
        calls: Option<Vec<String>>,
    ) -> Vec<u8> {
        let mut value = self.values.of(schema);
        // Fitting outputs, or a message that asks for calls.
        if let Some(calls) = calls.filter(|_| value.get("tool_outputs").is_some()) {
            let outputs = calls
                .iter()
                .map(|call| json!({"tool_call_id": call, "output": self.one(&TEXTS)}));
            value["tool_outputs"] = outputs.collect();
        }
        // An assistant that is not configured would be refused.
        if value.get("assistant").is_some() && self.chance(0.9) {
            value["assistant"] = "default".into();
        }
        if self.chance(0.1) {
            self.is_good = false;
            return self.values.spoil_text(value.to_string());
        }
        if self.chance(0.25) {
            self.values.spoil(&mut value);
        }
        self.wrong_body =
            contract::checked_request(&operation.method, &operation.path, &value).err();
        self.is_good &= self.wrong_body.is_none();
        value.to_string().into_bytes()
    }

    fn headers(&mut self, head: &mut Vec<u8>, operation: &Operation) {
        let mut lines: Vec<(&str, String)> = vec![
            ("host", "gateway".to_owned()),
            ("connection", "close".to_owned()),
        ];
        if self.chance(0.93) {
            let credential = if self.chance(0.9) { OPERATOR } else { ALICE };
            lines.push(("authorization", format!("Bearer {credential}")));
        }
        if self.chance(0.04) {
            lines.retain(|(name, _)| *name != "authorization" || self.values.rng.random_bool(0.2));
            lines.push(("authorization", self.one(&ODD_CREDENTIALS).to_owned()));
        }
        for parameter in operation.about["parameters"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let name = parameter["name"].as_str().unwrap();
            let is_required = parameter["required"] == true;
            if parameter["in"] != "header" || !self.chance(if is_required { 0.98 } else { 0.3 }) {
                self.is_good &= !is_required || parameter["in"] != "header";
                continue;
            }
            let value = match name {
                "threadkeeper-user" | "threadkeeper-session" | "threadkeeper-topic" => {
                    // A conversation has at most one of these headers.
                    self.is_good &= name != "threadkeeper-topic"
                        || !lines
                            .iter()
                            .any(|(name, _)| *name == "threadkeeper-session");
                    self.segment()
                }
                "prefer" => self.one(&PREFERENCES).to_owned(),
                "idempotency-key" if self.chance(0.8) => self.one(&["1", "2", "3"]).to_owned(),
                "idempotency-key" => self.odd(&["", "with space", "\u{e9}", "\t"]).to_owned(),
                _ => self.last_event_id(head),
            };
            lines.push((name, value));
            if self.chance(0.05) {
                self.is_good = false;
                lines.push((name, "1".to_owned()));
            }
        }
        if self.chance(0.01) && operation.path.contains("{user}") {
            self.is_good = false;
            lines.push(("threadkeeper-user", "alice".to_owned()));
        }
        if self.chance(0.15) {
            lines.push(("accept", self.one(&ACCEPTED).to_owned()));
        }
        if operation.about.get("requestBody").is_some() || self.chance(0.05) {
            let kind = if self.chance(0.04) {
                self.odd(&ODD_TYPES)
            } else {
                self.one(&TYPES)
            };
            lines.push(("content-type", kind.to_owned()));
        }
        if self.chance(0.1) {
            let (name, value) = self.one(&FURTHER);
            lines.push((name, value.to_owned()));
        }
        if self.chance(0.02) {
            self.no_http();
            let (name, value) = self.one(&BROKEN);
            match value {
                "long" => lines.push((name, "x".repeat(40_000))),
                "many" => lines.extend((0..200).map(|n| (name, n.to_string()))),
                value => lines.push((name, value.to_owned())),
            }
        }
        for (name, value) in lines {
            head.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
    }

    /// Returns a `Last-Event-ID`, mostly of the run in the head.
    fn last_event_id(&mut self, head: &[u8]) -> String {
        let own = run_in(head).filter(|_| self.chance(0.9));
        let run = own.unwrap_or_else(|| {
            self.is_good = false;
            self.values.id("run_")
        });
        let n = if self.chance(0.8) {
            self.one(&EVENT_NUMBERS)
        } else {
            self.odd(&ODD_EVENT_NUMBERS)
        };
        format!("{run}:{n}")
    }

    /// Joins head and body, with the length between them.
    fn framed(&mut self, mut head: Vec<u8>, body: Option<Vec<u8>>) -> Vec<u8> {
        let Some(body) = body else {
            head.extend_from_slice(b"\r\n");
            return head;
        };
        match self.values.rng.random_range(0..200) {
            // Half of the body never arrives.
            0 => write(
                &mut head,
                &format!("content-length: {}\r\n\r\n", body.len() + 10),
            ),
            1 => {
                self.no_http();
                write(&mut head, "transfer-encoding: chunked\r\n\r\nzz\r\n");
            }
            2 => {
                self.no_http();
                write(&mut head, "content-length: 1\r\ncontent-length: 2\r\n\r\n");
            }
            3 => {
                self.no_http();
                write(&mut head, "content-length: -1\r\n\r\n");
            }
            4..20 => {
                write(
                    &mut head,
                    &format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len()),
                );
                head.extend_from_slice(&body);
                // An empty chunk would end the body.
                write(
                    &mut head,
                    if body.is_empty() {
                        "\r\n"
                    } else {
                        "\r\n0\r\n\r\n"
                    },
                );
                return head;
            }
            _ => write(
                &mut head,
                &format!("content-length: {}\r\n\r\n", body.len()),
            ),
        }
        head.extend_from_slice(&body);
        head
    }
}

fn write(head: &mut Vec<u8>, text: &str) {
    head.extend_from_slice(text.as_bytes());
}

/// Returns the run in the path of the head.
fn run_in(head: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(head);
    let at = line.find("/runs/run_")? + "/runs/".len();
    line.get(at..at + 36).map(str::to_owned)
}

/// Encodes a text as a path segment or a query value.
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").unwrap();
        }
    }
    encoded
}
