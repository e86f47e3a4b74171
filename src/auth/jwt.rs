//! JSON web tokens: verifies the signature of a token, and reads the caller from its claims.
//!
//! The configuration names the allowed algorithms. The algorithm that a token names is only compared with
//! them. No part of a token, claim or key gets into a log, an error or the output of `Debug`.

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

/// Length of a token, in bytes.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Types that a token may have. Other types of the same issuer, such as a logout token or a proof of
/// possession, prove something else.
const TYPES: [&str; 2] = ["jwt", "at+jwt"];

/// Verifies the tokens of one issuer. All requests share it.
pub struct JwtVerifier {
    algorithms: Vec<JwtAlgorithm>,
    keys: Keys,
    rules: Rules,
}

enum Keys {
    /// One key for all configured algorithms.
    Fixed(DecodingKey),
    Fetched(Box<Jwks>),
}

impl fmt::Debug for JwtVerifier {
    /// Shows the algorithms and nothing else.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtVerifier")
            .field("algorithms", &self.algorithms)
            .finish_non_exhaustive()
    }
}

impl JwtVerifier {
    /// Builds the verifier. `fingerprints` makes the names of token holders for logs. Reads no file, and
    /// nothing from the network: the first token fetches the key set.
    ///
    /// # Errors
    ///
    /// The keys do not fit the algorithms. [`Config::load`](crate::config::Config::load) finds only some of
    /// these mistakes.
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

    /// Returns the caller that the token proves. `token` is the text after `Bearer`, at most 8 KiB.
    ///
    /// May wait some seconds for the issuer's key set: for the first token, for a token with an unknown
    /// key, and when the set is old. It may be dropped at any await: a fetch that it has begun goes on for
    /// the next request that needs it.
    ///
    /// # Errors
    ///
    /// [`JwtRefusal::Invalid`]: the token proves nothing. [`JwtRefusal::Unavailable`]: there are no keys at
    /// present.
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

    /// Returns the algorithm of a token. Refuses an algorithm that is not allowed, and a header with
    /// extensions or another type.
    fn algorithm(&self, header: &Header) -> Result<JwtAlgorithm, JwtRefusal> {
        if header.crit.is_some() {
            // The library would ignore it.
            return Err(JwtRefusal::Invalid(
                "its header has `crit`, which the gateway does not support",
            ));
        }
        if header
            .typ
            .as_deref()
            .is_some_and(|kind| !is_known_type(kind))
        {
            return Err(JwtRefusal::Invalid(
                "it is a token of another type than `JWT` or `at+jwt`",
            ));
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

/// Makes the library check only the signature, with this algorithm. The gateway checks the claims itself:
/// the library uses the machine's clock instead of the database's, and accepts a list of issuers.
fn signature_alone(algorithm: JwtAlgorithm) -> Validation {
    let mut validation = Validation::new(jwks::library_name(algorithm));
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}
