//! Who asks: what callers prove it with, and what that lets them do.

mod keys;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::AuthConfig;
use crate::domain::Principal;
use crate::error::{Chain, Error};
use crate::store::{Store, StoreError};

pub use keys::{FreshKey, KEY_PREFIX, Keyring};

/// How often recorded keys are read again: a key that is revoked opens nothing after this and a moment.
const REFRESH: Duration = Duration::from_secs(2);

/// What callers can prove themselves with.
#[derive(Debug)]
pub struct Auth {
    keys: Keyring,
    /// Where further keys are recorded, if any are.
    recorded: Option<Arc<dyn Store>>,
    is_open: bool,
}

impl Auth {
    pub fn new(config: &AuthConfig, store: Arc<dyn Store>) -> Self {
        Self {
            keys: Keyring::new(&config.keys),
            recorded: config.stored_keys.then_some(store),
            is_open: !config.is_configured(),
        }
    }

    /// Who presents this token: the text behind `Bearer`.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`]: nothing was presented, or it opens nothing. [`Error::StoreUnavailable`]: which keys are
    /// good is not known at present.
    pub fn identify(&self, token: Option<&str>) -> Result<Principal, Error> {
        if self.is_open {
            return Ok(Principal::anybody());
        }
        let token = token.ok_or(Error::Unauthenticated)?;
        match self.keys.find(token) {
            Some(principal) => Ok(principal),
            // It may be one that was made just now.
            None if self.recorded.is_some() && !self.keys.is_fresh() => Err(Error::StoreUnavailable(None)),
            None => Err(Error::Unauthenticated),
        }
    }

    /// Reads the recorded keys.
    ///
    /// # Errors
    /// The store failed; the keys that are known stay good for a while.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        let Some(store) = &self.recorded else { return Ok(()) };
        self.keys.renew(store.keys(None).await?);
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
