//! What a configured server can do, for whoever sets the gateway up. No run is started, so nothing is paid, and what is made
//! is deleted again.

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

/// An id in the form of the protocol that no server has given.
const NO_RESPONSE: &str = "resp_000000000000000000000000000000000000000000000000";
/// What every thread that is made here carries.
const PROBE_TAG: &str = "threadkeeper_probe";

/// What was found out about one upstream.
#[derive(Clone, Debug)]
pub struct Probe {
    pub findings: Vec<Finding>,
    /// A turn can begin there, as far as that can be told without one.
    pub is_usable: bool,
}

/// What was found out about one capability.
#[derive(Clone, Debug)]
pub struct Finding {
    pub capability: &'static str,
    pub verdict: Verdict,
    /// What follows from it, or what to change.
    pub advice: Option<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    Works,
    NotSupported,
    /// With the reason.
    Refused(String),
}

/// Asks a server what it can. The texts are for the operator: they may name hosts.
///
/// # Errors
/// No client can be made of the configuration.
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

    /// Says why a call failed, and what to change.
    async fn refused(&mut self, capability: &'static str, error: &UpstreamError) {
        let of = |setting: &str| format!("`upstreams.{}.{setting}`", self.name);
        let (reason, advice) = match error {
            UpstreamError::Connect | UpstreamError::Broken { .. } => {
                let obstacle = self.client.obstacle().await;
                let reason =
                    obstacle.map_or_else(|| error.to_string(), |it| format!("unreachable: {it}"));
                (reason, Some(format!("look at {}", of("base_url"))))
            }
            UpstreamError::Refused { status: 401, .. } => (
                format!("wrong key: {error}"),
                Some(format!("look at {} and {}", of("api_key"), of("auth"))),
            ),
            UpstreamError::Refused { status: 403, .. } => (
                format!("the key may not do this: {error}"),
                Some(format!("look at {}", of("api_key"))),
            ),
            UpstreamError::Refused {
                status: 300..=399, ..
            } => (
                format!("a redirect, which is not followed: {error}"),
                Some(format!("set {} to where it leads", of("base_url"))),
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

    /// Whether the server answers at all, and takes the key.
    async fn models(&mut self) -> bool {
        const MODELS: &str = "models";
        match self.call(Method::GET, &["models"]).await {
            Ok(_) => self.works(MODELS),
            Err(error) if is_not_offered(&error) => {
                let advice = "no matter: the gateway does not need them".to_owned();
                self.found(MODELS, Verdict::NotSupported, Some(advice));
            }
            Err(error) => {
                self.refused(MODELS, &error).await;
                // A server may fail in this call alone, and a key be good for others alone.
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

    /// Something of the server was found where it is looked for.
    fn has_found(&self) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.verdict == Verdict::Works)
    }

    /// Makes a thread and deletes it. Whether it could be made.
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
                    "; or look at `upstreams.{}.base_url`: nothing is there",
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
        let stays = format!("what was made for this probe may stay there: {id}");
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
                let advice = "a reply whose connection broke cannot be looked up, and deletions leave the items";
                self.found(ITEMS, Verdict::NotSupported, Some(advice.to_owned()));
            }
            Err(error) => self.refused(ITEMS, &error).await,
        }
    }

    /// Asks for a response that does not exist, and deletes it. Whether the key is taken, and anything was found.
    async fn responses(&mut self) -> bool {
        let mut is_key_good = true;
        for (capability, method, lack) in [
            (
                "stored responses",
                Method::GET,
                "a reply whose connection broke cannot be looked up, if the server stores them at all",
            ),
            (
                "deletion of responses",
                Method::DELETE,
                "receipts of deletions will say what may remain",
            ),
        ] {
            match self.call(method, &["responses", NO_RESPONSE]).await {
                Err(error) if is_gone(&error) => self.works(capability),
                Err(error) if is_not_offered(&error) => {
                    self.found(capability, Verdict::NotSupported, Some(lack.to_owned()));
                }
                // The server looks at the id, so it has the call.
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
                "nothing is there: look at `upstreams.{}.base_url`",
                self.name
            );
            self.found("responses", Verdict::NotSupported, Some(advice));
        }
        is_key_good && self.has_found()
    }
}
