//! Authentication: API keys and tokens, and what each of them opens.

mod jwks;
mod jwt;
mod keys;
#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::AuthConfig;
use crate::domain::{Fingerprints, Principal};
use crate::error::{Chain, Error};
use crate::store::{Store, StoreError};

pub use jwt::{JwtRefusal, JwtSetupError, JwtVerifier};
pub use keys::{FreshKey, KEY_PREFIX, Keyring};

/// Interval at which the stored keys are read again. A revoked key opens nothing shortly after it.
const REFRESH: Duration = Duration::from_secs(2);

/// The credentials that this gateway takes.
#[derive(Debug)]
pub struct Auth {
    keys: Keyring,
    /// The store with further keys, if `auth.stored_keys` is true.
    recorded: Option<Arc<Store>>,
    /// The verifier of tokens, if an issuer is configured.
    tokens: Option<JwtVerifier>,
    is_open: bool,
}

impl Auth {
    /// # Errors
    /// The configured keys of the issuer cannot be used.
    pub fn new(
        config: &AuthConfig,
        store: Arc<Store>,
        fingerprints: &Fingerprints,
    ) -> Result<Self, JwtSetupError> {
        let verifier = |config| JwtVerifier::new(config, fingerprints.clone());
        Ok(Self {
            keys: Keyring::new(&config.keys),
            recorded: config.stored_keys.then_some(store),
            tokens: config.jwt.as_ref().map(verifier).transpose()?,
            is_open: !config.is_configured(),
        })
    }

    /// Returns the caller who sent this key or token, the text after `Bearer`. It may be dropped at any
    /// await.
    ///
    /// # Errors
    /// - [`Error::Unauthenticated`]: the request has no key or token.
    /// - [`Error::InvalidToken`]: the key or token opens nothing.
    /// - [`Error::StoreUnavailable`], [`Error::IssuerUnavailable`]: the valid keys are not known at present.
    pub async fn identify(&self, token: Option<&str>) -> Result<Principal, Error> {
        if self.is_open {
            return Ok(Principal::anybody());
        }
        let token = token.ok_or(Error::Unauthenticated)?;
        if let Some(principal) = self.keys.find(token) {
            return Ok(principal);
        }
        match &self.tokens {
            // Three parts make a token: no API key has two dots.
            Some(tokens) if token.matches('.').count() == 2 => {
                tokens.verify(token).await.map_err(|refusal| match refusal {
                    JwtRefusal::Invalid(why) => Error::InvalidToken(why),
                    JwtRefusal::Unavailable => Error::IssuerUnavailable,
                })
            }
            // The key may be new, and the stored keys are out of date.
            _ if self.recorded.is_some() && !self.keys.is_fresh() => {
                Err(Error::StoreUnavailable(None))
            }
            _ => Err(Error::InvalidToken("there is no such API key")),
        }
    }

    /// Reads the stored keys.
    ///
    /// # Errors
    /// The store failed. The known keys stay valid for a while.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        let Some(store) = &self.recorded else {
            return Ok(());
        };
        self.keys.renew(store.good_keys().await?);
        Ok(())
    }

    /// Keeps the stored keys up to date until `stop`.
    pub async fn keep_fresh(self: Arc<Self>, stop: CancellationToken) {
        if self.recorded.is_none() {
            return;
        }
        let mut ticks = interval(REFRESH);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if let Err(error) = self.refresh().await {
                tracing::warn!(error = %Chain(&error), "cannot read the API keys");
            }
        }
    }
}
