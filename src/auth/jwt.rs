//! JSON web tokens: who has signed this, and what does it say about the caller.
//!
//! The configuration says how tokens may be signed; what a token says about that is only compared with it. Nothing of
//! a token, a claim or a key gets into a log, an error or the output of `Debug`.

mod claims;
mod errors;
#[cfg(test)]
mod tests;

use std::fmt;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{DecodingKey, Header, Validation, decode, decode_header};
use secrecy::ExposeSecret;

use super::jwks::{self, Jwks};
use crate::config::{JwtAlgorithm, JwtConfig};
use crate::domain::{self, Fingerprints, Principal};

use claims::{Claims, Rules};

pub use errors::{JwtRefusal, JwtSetupError};

/// The longest token that is read, bytes.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// What a token may call itself. Others of the same issuer (a logout token, a proof of possession) prove something else.
const TYPES: [&str; 2] = ["jwt", "at+jwt"];

/// Verifies the tokens of one issuer. Shared by all requests.
pub struct JwtVerifier {
    algorithms: Vec<JwtAlgorithm>,
    keys: Keys,
    rules: Rules,
}

enum Keys {
    /// One key, for all of the configured algorithms.
    Fixed(DecodingKey),
    Fetched(Box<Jwks>),
}

impl fmt::Debug for JwtVerifier {
    /// How tokens may be signed, and no more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtVerifier")
            .field("algorithms", &self.algorithms)
            .finish_non_exhaustive()
    }
}

impl JwtVerifier {
    /// Prepares the verifier; by `fingerprints` logs name those who have tokens. Reads no file and nothing from the network:
    /// a key set is fetched for the first token.
    ///
    /// # Errors
    ///
    /// The keys do not fit the algorithms, which [`Config::load`](crate::config::Config::load) finds out only in part.
    pub fn new(config: &JwtConfig, fingerprints: Fingerprints) -> Result<Self, JwtSetupError> {
        let keys = match (&config.secret, &config.public_key, &config.jwks_url) {
            (Some(secret), None, None) => {
                let is_other = |algorithm: &&JwtAlgorithm| **algorithm != JwtAlgorithm::Hs256;
                if let Some(other) = config.algorithms.iter().find(is_other) {
                    return Err(JwtSetupError::Secret(jwks::name(*other)));
                }
                Keys::Fixed(DecodingKey::from_secret(secret.expose_secret().as_bytes()))
            }
            (None, Some(pem), None) => {
                let mut key = Err(JwtSetupError::Source);
                for algorithm in &config.algorithms {
                    let fitting = jwks::from_pem(pem.expose_secret(), *algorithm);
                    key = Ok(fitting.ok_or(JwtSetupError::PublicKey(jwks::name(*algorithm)))?);
                }
                Keys::Fixed(key?)
            }
            (None, None, Some(url)) => Keys::Fetched(Box::new(Jwks::new(
                url.clone(),
                config.jwks_refresh,
                &config.algorithms,
            )?)),
            _ => return Err(JwtSetupError::Source),
        };
        Ok(Self {
            algorithms: config.algorithms.clone(),
            keys,
            rules: Rules::new(config, fingerprints),
        })
    }

    /// Who the token speaks for. `token` is what stands behind `Bearer`; more than 8 KiB are not read.
    ///
    /// May wait for the issuer's key set, some seconds at most: for the first token, for one signed with a key that is
    /// not known, and now and then for one of many. It may be dropped at any await: a fetch that it has begun goes on
    /// with the next request that wants one.
    ///
    /// # Errors
    ///
    /// [`JwtRefusal::Invalid`]: the token is not good. [`JwtRefusal::Unavailable`]: there are no keys at present.
    pub async fn verify(&self, token: &str) -> Result<Principal, JwtRefusal> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(JwtRefusal::Invalid("it is longer than 8 KiB"));
        }
        let header = decode_header(token).map_err(|_| {
            JwtRefusal::Invalid("it is not a JSON web token with a known algorithm")
        })?;
        let algorithm = self.algorithm(&header)?;
        let key = match &self.keys {
            Keys::Fixed(key) => key,
            Keys::Fetched(jwks) => &jwks.find(header.kid.as_deref(), algorithm).await?,
        };
        let token = decode::<Claims>(token, key, &signature_alone(algorithm)).map_err(|error| {
            JwtRefusal::Invalid(match error.kind() {
                ErrorKind::InvalidSignature => "its signature is wrong",
                _ => "it cannot be read",
            })
        })?;
        self.rules.principal(&token.claims, domain::now())
    }

    /// How the token is signed, if it may be signed like that and asks for nothing that is not understood.
    fn algorithm(&self, header: &Header) -> Result<JwtAlgorithm, JwtRefusal> {
        if header.crit.is_some() {
            // The library would pass over it.
            return Err(JwtRefusal::Invalid(
                "its header has `crit`, which is not understood",
            ));
        }
        if header
            .typ
            .as_deref()
            .is_some_and(|kind| !is_known_type(kind))
        {
            return Err(JwtRefusal::Invalid("it is a token of another type"));
        }
        let is_it = |algorithm: &&JwtAlgorithm| jwks::library_name(**algorithm) == header.alg;
        let allowed = self.algorithms.iter().find(is_it);
        allowed
            .copied()
            .ok_or(JwtRefusal::Invalid("its algorithm is not allowed"))
    }
}

fn is_known_type(written: &str) -> bool {
    let kind = written.to_ascii_lowercase();
    TYPES.contains(&kind.strip_prefix("application/").unwrap_or(&kind))
}

/// What is asked of the library: the signature, made with this algorithm. Claims are up to us, for it goes by the
/// machine's clock, and the database's is the only one; it also takes lists where there is one issuer.
fn signature_alone(algorithm: JwtAlgorithm) -> Validation {
    let mut validation = Validation::new(jwks::library_name(algorithm));
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}
