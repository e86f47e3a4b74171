//! A user's client. It accepts any answer or silence, and repeats what is safe to repeat.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;
use reqwest::{Method, RequestBuilder, StatusCode};
use tokio::time::{sleep, timeout};

use super::world::{Teller, World};
use crate::support::contract;
use crate::support::gateway::{Answer, EventReader};

/// Longest wait for an answer.
const ATTEMPT: Duration = Duration::from_secs(12);
/// Longest time for which a request is repeated. It is more than twice the longest outage.
pub(super) const PERSEVERANCE: Duration = Duration::from_mins(2);

pub(super) struct Client {
    pub(super) world: Arc<World>,
    pub(super) user: usize,
    http: reqwest::Client,
}

/// The result of one request.
pub(super) enum Reply {
    /// No answer, or a part of one. What the request did is not known.
    Broken(String),
    Stream(EventReader),
    Answer(Answer),
}

impl Client {
    /// Makes a client. With `keeps_alive` it reuses connections, so that most requests reach the
    /// same replica.
    pub(super) fn new(world: Arc<World>, user: usize, keeps_alive: bool) -> Self {
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(usize::from(keeps_alive) * 4);
        Self {
            world,
            user,
            http: http.build().unwrap(),
        }
    }

    pub(super) fn teller(&self) -> Teller {
        Teller::User(self.user)
    }

    pub(super) fn tell(&self, what: impl Into<String>) {
        self.world.tell(self.teller(), what);
    }

    pub(super) fn fault(&self, what: impl Into<String>) {
        self.world.fault(self.teller(), what);
    }

    pub(super) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.world.fleet.balancer.url))
    }

    pub(super) async fn ask(&self, request: RequestBuilder) -> Reply {
        let answered = async {
            let request = request.build()?;
            let (method, path) = (request.method().clone(), request.url().path().to_owned());
            let response = self.http.execute(request).await?;
            let (status, headers) = (response.status(), response.headers().clone());
            if headers
                .get("content-type")
                .is_some_and(|kind| kind == "text/event-stream")
            {
                return Ok(Reply::Stream(EventReader::new(response)));
            }
            let text = response.text().await?;
            if let Err(error) = contract::checked(&method, &path, status, &headers, Some(&text)) {
                self.fault(format!(
                    "{method} {path}: the answer breaks the OpenAPI document: {error}"
                ));
            }
            let body = serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text));
            Ok::<_, reqwest::Error>(Reply::Answer(Answer {
                status,
                headers,
                body,
            }))
        };
        let reply = match timeout(ATTEMPT, answered).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => Reply::Broken(innermost(&error)),
            Err(_) => Reply::Broken("no answer in time".to_owned()),
        };
        if let Reply::Answer(answer) = &reply {
            self.judge(answer);
        }
        reply
    }

    /// Checks that an answer is one that may occur during faults.
    fn judge(&self, answer: &Answer) {
        let status = answer.status;
        let kind = answer.body["type"]
            .as_str()
            .unwrap_or_default()
            .rsplit(':')
            .next()
            .unwrap_or_default();
        let code = answer.body["code"].as_str().unwrap_or_default();
        self.world
            .count(format!("answers: {} {kind} {code}", status.as_u16()).trim_end());
        if status == StatusCode::INTERNAL_SERVER_ERROR
            || (status.is_client_error() && kind.is_empty())
        {
            self.fault(format!("unexpected answer: {answer:?}"));
        }
        // A run that has ended gives the same answer however long its sender waits.
        let has_ended = answer.body["run_id"].is_string();
        if status == StatusCode::SERVICE_UNAVAILABLE
            && !has_ended
            && !answer.headers.contains_key("retry-after")
        {
            self.fault(format!("503 without Retry-After: {answer:?}"));
        }
    }

    /// Repeats a request until its answer is not that of an unavailable service. The request must
    /// be safe to repeat. Returns `None` if there never was such an answer.
    pub(super) async fn retry_until_answered(
        &self,
        what: &str,
        request: impl Fn() -> RequestBuilder,
    ) -> Option<Answer> {
        let begun = Instant::now();
        while begun.elapsed() < PERSEVERANCE {
            match self.ask(request()).await {
                Reply::Answer(answer) if answer.status != StatusCode::SERVICE_UNAVAILABLE => {
                    return Some(answer);
                }
                // The run failed. No later answer will say more.
                Reply::Answer(answer) if answer.body["run_id"].is_string() => return Some(answer),
                Reply::Answer(_) | Reply::Broken(_) => self.pause().await,
                Reply::Stream(_) => {
                    self.fault(format!("{what}: an unrequested stream"));
                    return None;
                }
            }
        }
        self.fault(format!("{what}: never answered"));
        None
    }

    pub(super) async fn get(&self, path: &str) -> Option<Answer> {
        self.retry_until_answered(path, || self.request(Method::GET, path))
            .await
    }

    /// Waits before a request is repeated.
    pub(super) async fn pause(&self) {
        let time = rand::rng().random_range(50..400);
        sleep(Duration::from_millis(time)).await;
    }
}

/// Returns the innermost cause of an error. The outer ones only say that a request failed.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
