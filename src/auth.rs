//! Who asks: what callers prove it with, and what that lets them do.

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

/// How often recorded keys are read again: a key that is revoked opens nothing after this and a moment.
const REFRESH: Duration = Duration::from_secs(2);

/// What callers can prove themselves with.
#[derive(Debug)]
pub struct Auth {
    keys: Keyring,
    /// Where further keys are recorded, if any are.
    recorded: Option<Arc<Store>>,
    /// Verifies the tokens of an issuer, if there is one.
    tokens: Option<JwtVerifier>,
    is_open: bool,
}

impl Auth {
    /// # Errors
    /// The issuer's keys are of no use.
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

    /// Who presents this token: the text behind `Bearer`.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`]: nothing was presented. [`Error::InvalidToken`]: it opens nothing.
    /// [`Error::StoreUnavailable`], [`Error::IssuerUnavailable`]: what is good is not known at present.
    ///
    /// Harmless to drop at any point.
    pub async fn identify(&self, token: Option<&str>) -> Result<Principal, Error> {
        if self.is_open {
            return Ok(Principal::anybody());
        }
        let token = token.ok_or(Error::Unauthenticated)?;
        if let Some(principal) = self.keys.find(token) {
            return Ok(principal);
        }
        match &self.tokens {
            // What has three parts is none of our keys.
            Some(tokens) if token.matches('.').count() == 2 => {
                tokens.verify(token).await.map_err(|refusal| match refusal {
                    JwtRefusal::Invalid(why) => Error::InvalidToken(why),
                    JwtRefusal::Unavailable => Error::IssuerUnavailable,
                })
            }
            // It may be a key that was made just now.
            _ if self.recorded.is_some() && !self.keys.is_fresh() => {
                Err(Error::StoreUnavailable(None))
            }
            _ => Err(Error::InvalidToken("there is no such API key")),
        }
    }

    /// Reads the recorded keys.
    ///
    /// # Errors
    /// The store failed; the keys that are known stay good for a while.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        let Some(store) = &self.recorded else {
            return Ok(());
        };
        self.keys.renew(store.good_keys().await?);
        Ok(())
    }

    /// Keeps the recorded keys up to date, until the stop.
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
