//! The keys of the token issuer: fetches its key set, and chooses the key of a token. Besides
//! `upstream/client.rs` the only file that names reqwest.
//!
//! A fetch is limited in size and time. Fetches are limited in number too, so that invented tokens cannot
//! make the gateway flood the issuer: one per [`PAUSE`] once there are keys, before that one per
//! [`SHORT_PAUSE`].

#[cfg(test)]
mod tests;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::header::ACCEPT;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use url::Url;

use super::jwt::{JwtRefusal, JwtSetupError};
use crate::config::JwtAlgorithm;

/// Time to connect to the issuer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Silence of the issuer.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for a whole fetch.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Size of a key set, in bytes.
const MAX_BYTES: usize = 1024 * 1024;
/// Number of keys of a set that are used.
const MAX_KEYS: usize = 100;
/// Pause between two fetches for unknown keys, and between two tries to replace an old set.
const PAUSE: Duration = Duration::from_secs(30);
/// Pause between any two fetches, also before there are any keys.
const SHORT_PAUSE: Duration = Duration::from_secs(1);
/// Age of keys that could not be fetched again. Older ones are not used: the issuer may have revoked one.
const GOOD_FOR: Duration = Duration::from_hours(24);
/// Base64 digits of the modulus of an RSA key of 2048 bits. The library would refuse a shorter key only
/// when it verifies a token.
const RSA_DIGITS: usize = 342;
/// Base64 digits of 32 bytes: a coordinate on P-256, or a key of Ed25519.
const CURVE_DIGITS: usize = 43;

/// A key set that is fetched when a token needs it.
pub(super) struct Jwks {
    source: Arc<Source>,
    refresh: Duration,
    /// The state of fetching. A task locks it while it fetches.
    fetching: Arc<Mutex<Fetching>>,
    tasks: TaskTracker,
}

/// The address of the keys, and the keys of the last fetch.
struct Source {
    http: reqwest::Client,
    url: Url,
    algorithms: Arc<[JwtAlgorithm]>,
    /// Never locked across an await.
    known: RwLock<Option<Known>>,
}

#[derive(Clone)]
struct Known {
    keys: Arc<[Key]>,
    /// Time at which the fetch of the keys began.
    as_of: Instant,
}

/// A key that fits one of the configured algorithms.
struct Key {
    id: Option<String>,
    algorithm: JwtAlgorithm,
    material: DecodingKey,
}

/// The history of the fetches.
#[derive(Default)]
struct Fetching {
    /// Time at which the last fetch ended.
    ended: Option<Instant>,
    /// Whether the last fetch failed.
    failed: bool,
    /// Time of the last fetch for an unknown key.
    searched: Option<Instant>,
}

/// Why a fetch failed. Contains nothing of the answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
enum FetchError {
    #[error("no connection")]
    Connect,
    #[error("it took too long")]
    Timeout,
    #[error("the connection broke")]
    Broken,
    #[error("the status is {0}")]
    Status(u16),
    #[error("the answer is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("the answer is not a key set")]
    NotKeys,
}

impl Jwks {
    /// Builds the client. Opens no connection.
    pub(super) fn new(
        url: Url,
        refresh: Duration,
        algorithms: &[JwtAlgorithm],
    ) -> Result<Self, JwtSetupError> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("threadkeeper/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // Fetches are too rare to reuse a connection.
            .pool_max_idle_per_host(0);
        if url.scheme() == "http" {
            // The client follows no redirects, so it never speaks TLS here, and must not fail for lack of
            // certificates.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|error| {
            let mut causes =
                std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
                    error.source()
                });
            if causes.any(|cause| cause.to_string().contains("No CA certificates")) {
                JwtSetupError::NoRootCertificates
            } else {
                JwtSetupError::Client
            }
        })?;
        let source = Source {
            http,
            url,
            algorithms: algorithms.into(),
            known: RwLock::default(),
        };
        let (fetching, tasks) = (Arc::default(), TaskTracker::new());
        Ok(Self {
            source: Arc::new(source),
            refresh,
            fetching,
            tasks,
        })
    }

    /// Returns the key that the token names, or, if it names none, the only key that fits. May fetch the
    /// key set. May be dropped at any await.
    pub(super) async fn find(
        &self,
        id: Option<&str>,
        algorithm: JwtAlgorithm,
    ) -> Result<DecodingKey, JwtRefusal> {
        let keys = self.keys().await.ok_or(JwtRefusal::Unavailable)?;
        let key = match pick(&keys, id, algorithm) {
            None if id.is_some() => pick(&self.newer_than(keys).await?, id, algorithm),
            found => found,
        };
        key.ok_or(JwtRefusal::Invalid(
            "it was signed with a key that is not in the key set of the issuer",
        ))
    }

    /// Returns the known keys. If they are old, one request at a time fetches them again.
    async fn keys(&self) -> Option<Arc<[Key]>> {
        let Some(known) = self.source.known() else {
            let fetching = Arc::clone(&self.fetching).lock_owned().await;
            if self.source.known().is_none() && has_passed(fetching.ended, SHORT_PAUSE) {
                self.fetch(fetching).await;
            }
            return self.source.known().map(|known| known.keys);
        };
        if known.as_of.elapsed() >= self.refresh
            && let Ok(fetching) = Arc::clone(&self.fetching).try_lock_owned()
            && has_passed(fetching.ended, PAUSE)
        {
            self.fetch(fetching).await;
            return self.source.known().map(|known| known.keys);
        }
        Some(known.keys)
    }

    /// Returns newer keys than these, fetched now if that is allowed; otherwise these. Returns
    /// [`JwtRefusal::Unavailable`] if the last fetch failed, because there may be newer keys.
    async fn newer_than(&self, keys: Arc<[Key]>) -> Result<Arc<[Key]>, JwtRefusal> {
        let mut fetching = Arc::clone(&self.fetching).lock_owned().await;
        let is_newest = self
            .source
            .known()
            .is_none_or(|known| Arc::ptr_eq(&known.keys, &keys));
        let has_told = if is_newest && fetching.may_search() {
            self.fetch(fetching).await
        } else {
            !is_newest || !fetching.failed
        };
        let newest = self.source.known().map_or(keys, |known| known.keys);
        if has_told {
            Ok(newest)
        } else {
            Err(JwtRefusal::Unavailable)
        }
    }

    /// Fetches the keys, and returns whether that worked. If it fails, the known keys stay.
    ///
    /// The fetch goes on if this future is dropped, and the next caller waits for it. So a caller who
    /// disconnects does not delay the keys of other callers.
    async fn fetch(&self, mut fetching: OwnedMutexGuard<Fetching>) -> bool {
        let source = Arc::clone(&self.source);
        let task = self.tasks.spawn(async move {
            let has_worked = source.fetch().await;
            (fetching.ended, fetching.failed) = (Some(Instant::now()), !has_worked);
            has_worked
        });
        task.await.unwrap_or(false)
    }
}

impl Source {
    fn known(&self) -> Option<Known> {
        let known = self
            .known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        known.filter(|known| known.as_of.elapsed() < GOOD_FOR)
    }

    async fn fetch(&self) -> bool {
        let as_of = Instant::now();
        let answer = request(&self.http, &self.url, &self.algorithms).await;
        let has_worked = answer.is_ok();
        match answer {
            Ok(keys) => {
                if keys.is_empty() {
                    tracing::warn!(
                        "the issuer's key set has no usable key, so all tokens are refused"
                    );
                }
                *self.known.write().unwrap_or_else(PoisonError::into_inner) =
                    Some(Known { keys, as_of });
            }
            Err(error) => {
                let has_keys = self.known().is_some();
                tracing::warn!(%error, jwt.has_keys = has_keys, "cannot fetch the issuer's key set");
            }
        }
        has_worked
    }
}

impl Fetching {
    /// Returns whether a fetch for an unknown key is allowed now, and if so, records it.
    fn may_search(&mut self) -> bool {
        let may = has_passed(self.searched, PAUSE) && has_passed(self.ended, SHORT_PAUSE);
        if may {
            self.searched = Some(Instant::now());
        }
        may
    }
}

fn has_passed(since: Option<Instant>, pause: Duration) -> bool {
    since.is_none_or(|since| since.elapsed() >= pause)
}

/// Returns the key with this id, or, without an id, the only key.
fn pick(keys: &[Key], id: Option<&str>, algorithm: JwtAlgorithm) -> Option<DecodingKey> {
    let has_name = |key: &&Key| id.is_none_or(|id| key.id.as_deref() == Some(id));
    let mut fitting = keys
        .iter()
        .filter(|key| key.algorithm == algorithm)
        .filter(has_name);
    let first = fitting.next()?;
    let is_clear = id.is_some() || fitting.next().is_none();
    is_clear.then(|| first.material.clone())
}

/// Fetches the key set, and returns its usable keys.
async fn request(
    http: &reqwest::Client,
    url: &Url,
    algorithms: &[JwtAlgorithm],
) -> Result<Arc<[Key]>, FetchError> {
    let body = timeout(TOTAL_TIMEOUT, async {
        let mut response = http
            .get(url.clone())
            .header(ACCEPT, "application/json")
            .send()
            .await
            .map_err(|error| failure(&error))?;
        if response.status() != http::StatusCode::OK {
            return Err(FetchError::Status(response.status().as_u16()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| failure(&error))? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(FetchError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    });
    let body = body.await.map_err(|_| FetchError::Timeout)??;
    read(&body, algorithms).ok_or(FetchError::NotKeys)
}

fn failure(error: &reqwest::Error) -> FetchError {
    if error.is_timeout() {
        FetchError::Timeout
    } else if error.is_connect() {
        FetchError::Connect
    } else {
        FetchError::Broken
    }
}

/// Returns the usable keys of a set. Ignores keys that it does not understand, as RFC 7517 demands.
fn read(body: &[u8], algorithms: &[JwtAlgorithm]) -> Option<Arc<[Key]>> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(body).ok()?;
    let keys = set
        .keys
        .iter()
        .filter_map(|key| usable(&Jwk::deserialize(key).ok()?, algorithms));
    Some(keys.take(MAX_KEYS).collect())
}

fn usable(jwk: &Jwk, algorithms: &[JwtAlgorithm]) -> Option<Key> {
    let algorithm = algorithms
        .iter()
        .copied()
        .find(|algorithm| fits(jwk, *algorithm))?;
    let material = DecodingKey::from_jwk(jwk).ok()?;
    Some(Key {
        id: jwk.common.key_id.clone(),
        algorithm,
        material,
    })
}

/// Returns whether a key has the kind and size of the algorithm, and permits its signatures.
fn fits(jwk: &Jwk, algorithm: JwtAlgorithm) -> bool {
    let common = &jwk.common;
    let is_for_it = common
        .key_algorithm
        .is_none_or(|named| named == library_name(algorithm).into());
    let is_for_signatures = common
        .public_key_use
        .as_ref()
        .is_none_or(|use_| *use_ == PublicKeyUse::Signature);
    let verifies = common
        .key_operations
        .as_ref()
        .is_none_or(|known| known.contains(&KeyOperations::Verify));
    let is_of_its_kind = match (algorithm, &jwk.algorithm) {
        (JwtAlgorithm::Rs256, AlgorithmParameters::RSA(rsa)) => rsa.n.len() >= RSA_DIGITS,
        (JwtAlgorithm::Es256, AlgorithmParameters::EllipticCurve(point)) => {
            point.curve == EllipticCurve::P256
                && point.x.len() == CURVE_DIGITS
                && point.y.len() == CURVE_DIGITS
        }
        (JwtAlgorithm::EdDsa, AlgorithmParameters::OctetKeyPair(pair)) => {
            pair.curve == EllipticCurve::Ed25519 && pair.x.len() == CURVE_DIGITS
        }
        // A key set is public, so it contains no secrets.
        _ => false,
    };
    is_for_it && is_for_signatures && verifies && is_of_its_kind
}

/// Returns the public key in a PEM text, if it is one for the algorithm.
pub(super) fn from_pem(pem: &str, algorithm: JwtAlgorithm) -> Option<DecodingKey> {
    // The library would take these too, and read something else from them.
    if ["PRIVATE KEY", "CERTIFICATE"]
        .iter()
        .any(|other| pem.contains(other))
    {
        return None;
    }
    let key = match algorithm {
        JwtAlgorithm::Hs256 => return None,
        JwtAlgorithm::Rs256 => DecodingKey::from_rsa_pem(pem.as_bytes()),
        JwtAlgorithm::Es256 => DecodingKey::from_ec_pem(pem.as_bytes()),
        JwtAlgorithm::EdDsa => DecodingKey::from_ed_pem(pem.as_bytes()),
    };
    let key = key.ok()?;
    let jwk = Jwk::from_decoding_key(&key, Some(library_name(algorithm))).ok()?;
    fits(&jwk, algorithm).then_some(key)
}

pub(super) const fn library_name(algorithm: JwtAlgorithm) -> Algorithm {
    match algorithm {
        JwtAlgorithm::Hs256 => Algorithm::HS256,
        JwtAlgorithm::Rs256 => Algorithm::RS256,
        JwtAlgorithm::Es256 => Algorithm::ES256,
        JwtAlgorithm::EdDsa => Algorithm::EdDSA,
    }
}

/// Returns the name of an algorithm in the configuration.
pub(super) const fn name(algorithm: JwtAlgorithm) -> &'static str {
    match algorithm {
        JwtAlgorithm::Hs256 => "HS256",
        JwtAlgorithm::Rs256 => "RS256",
        JwtAlgorithm::Es256 => "ES256",
        JwtAlgorithm::EdDsa => "EdDSA",
    }
}
