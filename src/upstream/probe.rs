//! Finds out what a configured server can do, for the person who sets the gateway up. It starts
//! no run, so it costs nothing, and deletes what it creates.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::config::{UpstreamConfig, UpstreamKind};
use crate::domain::UpstreamThreadId;
use crate::upstream::assistants::{AssistantsUpstream, NO_THREADS};
use crate::upstream::client::{InvalidUpstream, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{Disposal, Items, Upstream};
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::responses::{NO_CONVERSATIONS, ResponsesUpstream};
use crate::upstream::retrying_client::{is_gone, is_not_offered};
use crate::upstream::wire::Created;

/// An id in the form of the protocol that no server has issued.
const NO_RESPONSE: &str = "resp_000000000000000000000000000000000000000000000000";
/// The tag of every thread that the probe creates.
const PROBE_TAG: &str = "threadkeeper_probe";

/// The findings about one upstream.
#[derive(Clone, Debug)]
pub struct Probe {
    pub findings: Vec<Finding>,
    /// A run can begin there, as far as the probe can tell without starting one.
    pub is_usable: bool,
}

/// The finding about one capability.
#[derive(Clone, Debug)]
pub struct Finding {
    pub capability: &'static str,
    pub verdict: Verdict,
    /// The consequence, or what to change.
    pub advice: Option<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    Works,
    NotSupported,
    /// With the reason.
    Refused(String),
}

/// Asks a server what it can do. The texts are for the operator and may name hosts.
///
/// # Errors
/// The configuration is not valid for an HTTP client.
pub async fn probe(name: &str, config: &UpstreamConfig) -> Result<Probe, InvalidUpstream> {
    let client = UpstreamClient::new(name, config)?;
    let mut prober = Prober {
        name,
        client,
        limit: config.call_timeout,
        findings: Vec::new(),
    };
    let is_usable = match config.kind {
        UpstreamKind::Assistants => {
            let upstream = AssistantsUpstream::new(prober.client.clone(), config);
            prober.client = prober.client.with_header("openai-beta", "assistants=v2");
            prober.models().await && prober.threads(&upstream, "threads", NO_THREADS).await
        }
        UpstreamKind::Responses => {
            let upstream = ResponsesUpstream::new(prober.client.clone(), config);
            if !prober.models().await {
                false
            } else if config.conversations {
                let is_usable = prober
                    .threads(&upstream, "conversations", NO_CONVERSATIONS)
                    .await;
                prober.responses().await;
                is_usable
            } else {
                prober.responses().await
            }
        }
    };
    Ok(Probe {
        findings: prober.findings,
        is_usable,
    })
}

struct Prober<'a> {
    name: &'a str,
    client: UpstreamClient,
    limit: Duration,
    findings: Vec<Finding>,
}

impl Prober<'_> {
    fn found(&mut self, capability: &'static str, verdict: Verdict, advice: Option<String>) {
        self.findings.push(Finding {
            capability,
            verdict,
            advice,
        });
    }

    fn works(&mut self, capability: &'static str) {
        self.found(capability, Verdict::Works, None);
    }

    /// Records why a call failed, and what to change.
    async fn refused(&mut self, capability: &'static str, error: &UpstreamError) {
        let of = |setting: &str| format!("`upstreams.{}.{setting}`", self.name);
        let (reason, advice) = match error {
            UpstreamError::Connect | UpstreamError::Broken { .. } => {
                let obstacle = self.client.obstacle().await;
                let reason =
                    obstacle.map_or_else(|| error.to_string(), |it| format!("unreachable: {it}"));
                (reason, Some(format!("check {}", of("base_url"))))
            }
            UpstreamError::Refused { status: 401, .. } => (
                format!("wrong key: {error}"),
                Some(format!("check {} and {}", of("api_key"), of("auth"))),
            ),
            UpstreamError::Refused { status: 403, .. } => (
                format!("the key may not do this: {error}"),
                Some(format!("check {}", of("api_key"))),
            ),
            UpstreamError::Refused {
                status: 300..=399, ..
            } => (
                format!("the server redirects, and the gateway does not follow redirects: {error}"),
                Some(format!(
                    "set {} to the address that the redirect names",
                    of("base_url")
                )),
            ),
            _ => (error.to_string(), None),
        };
        self.found(capability, Verdict::Refused(reason), advice);
    }

    async fn call(&self, method: Method, path: &[&str]) -> Result<Value, UpstreamError> {
        self.client
            .json::<Value>(method, path, &[])
            .await
            .map(|answer| answer.value)
    }

    /// Checks that the server answers at all and accepts the key.
    async fn models(&mut self) -> bool {
        const MODELS: &str = "models";
        match self.call(Method::GET, &["models"]).await {
            Ok(_) => self.works(MODELS),
            Err(error) if is_not_offered(&error) => {
                let advice =
                    "this does not matter: the gateway does not need the list of models".to_owned();
                self.found(MODELS, Verdict::NotSupported, Some(advice));
            }
            Err(error) => {
                self.refused(MODELS, &error).await;
                // A server may fail in this call alone, and a key may be limited to other calls.
                return !matches!(
                    error,
                    UpstreamError::Connect
                        | UpstreamError::Broken { .. }
                        | UpstreamError::Refused { status: 401, .. }
                );
            }
        }
        true
    }

    /// Returns true if any capability of the server works.
    fn has_found(&self) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.verdict == Verdict::Works)
    }

    /// Creates a thread and deletes it. Returns true if it could be created.
    async fn threads(&mut self, upstream: &dyn Upstream, path: &'static str, remedy: &str) -> bool {
        let deletion = if path == "threads" {
            "deletion of threads"
        } else {
            "deletion of conversations"
        };
        let mut body = json!({});
        body["metadata"][PROBE_TAG] = "true".into();
        let made = timeout(self.limit, self.client.make::<Created>(&[path], &body)).await;
        let made = made.unwrap_or(Err(UpstreamError::Broken { timeout: true }));
        let id = match made.and_then(Created::into_thread) {
            Ok(id) => id,
            Err(error) if is_not_offered(&error) => {
                let elsewhere = format!(
                    "; or check `upstreams.{}.base_url`: the server knows none of the paths there",
                    self.name
                );
                let advice = if self.has_found() {
                    remedy.to_owned()
                } else {
                    format!("{remedy}{elsewhere}")
                };
                self.found(path, Verdict::NotSupported, Some(advice));
                return false;
            }
            Err(error) => {
                self.refused(path, &error).await;
                return false;
            }
        };
        self.works(path);
        if path == "conversations" {
            self.items(&id).await;
        }
        let mut items = Items::default();
        let deleted = timeout(
            self.limit,
            upstream.delete_thread(&id, &RateLimiter::UNBOUND, &mut items),
        );
        let stays = format!("the thread that this probe created may remain there: {id}");
        match deleted
            .await
            .unwrap_or(Err(UpstreamError::Broken { timeout: true }))
        {
            Ok(Disposal::Deleted | Disposal::AlreadyGone) => self.works(deletion),
            Ok(Disposal::NotSupported) => {
                let advice = format!("receipts of deletions will say `not_supported`; {stays}");
                self.found(deletion, Verdict::NotSupported, Some(advice));
            }
            Err(error) => self.found(deletion, Verdict::Refused(error.to_string()), Some(stays)),
        }
        true
    }

    async fn items(&mut self, conversation: &UpstreamThreadId) {
        const ITEMS: &str = "items of conversations";
        match self
            .call(
                Method::GET,
                &["conversations", conversation.as_str(), "items"],
            )
            .await
        {
            Ok(_) => self.works(ITEMS),
            Err(error) if is_not_offered(&error) => {
                let advice = "a reply whose connection broke cannot be recovered, and deletions leave the items";
                self.found(ITEMS, Verdict::NotSupported, Some(advice.to_owned()));
            }
            Err(error) => self.refused(ITEMS, &error).await,
        }
    }

    /// Asks for a response that does not exist, and deletes it. Returns true if the key is
    /// accepted and any capability works.
    async fn responses(&mut self) -> bool {
        let mut is_key_good = true;
        for (capability, method, lack) in [
            (
                "stored responses",
                Method::GET,
                "a reply whose connection broke cannot be recovered, if the server stores responses at all",
            ),
            (
                "deletion of responses",
                Method::DELETE,
                "receipts of deletions will count the responses that may remain",
            ),
        ] {
            match self.call(method, &["responses", NO_RESPONSE]).await {
                Err(error) if is_gone(&error) => self.works(capability),
                Err(error) if is_not_offered(&error) => {
                    self.found(capability, Verdict::NotSupported, Some(lack.to_owned()));
                }
                // The server checks the id, so it supports the call.
                Ok(_)
                | Err(UpstreamError::Refused {
                    status: 400 | 422, ..
                }) => self.works(capability),
                Err(error) => {
                    is_key_good &= !matches!(error, UpstreamError::Refused { status: 401, .. });
                    self.refused(capability, &error).await;
                }
            }
        }
        if self
            .findings
            .iter()
            .all(|finding| finding.verdict == Verdict::NotSupported)
        {
            let advice = format!(
                "the server knows none of the paths: check `upstreams.{}.base_url`",
                self.name
            );
            self.found("responses", Verdict::NotSupported, Some(advice));
        }
        is_key_good && self.has_found()
    }
}
