//! How often callers may ask: a bucket of requests for each user and each tenant, in this process.

use std::num::NonZeroU32;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota, RateLimiter};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::config::LimitsConfig;
use crate::domain::{TenantKey, UserKey};
use crate::error::Error;

/// What a bucket holds if that is not set, in seconds of its rate.
const BURST_SECONDS: u32 = 10;
/// How often buckets that are full again are forgotten: until then somebody may ask for one made-up user after the other.
const FORGET_EVERY: Duration = Duration::from_secs(5);
pub(super) const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub(super) const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The buckets.
#[derive(Debug)]
pub struct Limits {
    users: Option<Buckets<(TenantKey, UserKey)>>,
    tenants: Option<Buckets<TenantKey>>,
}

type Limiter<K> = RateLimiter<K, DefaultKeyedStateStore<K>, DefaultClock, StateInformationMiddleware>;

#[derive(Debug)]
struct Buckets<K: Clone + Eq + std::hash::Hash> {
    /// As the headers call it.
    name: &'static str,
    rate: NonZeroU32,
    burst: NonZeroU32,
    limiter: Limiter<K>,
}

/// What is left in the buckets from which a request was taken, for the headers of its answer.
#[derive(Debug, Default)]
pub(super) struct Left {
    policies: Vec<String>,
    limits: Vec<String>,
}

impl Limits {
    pub fn new(config: &LimitsConfig) -> Self {
        Self {
            users: Buckets::new("user", config.user_rate, config.user_burst),
            tenants: Buckets::new("tenant", config.tenant_rate, config.tenant_burst),
        }
    }

    /// Takes a request of a user's, if it is known whose it is, and of the tenant's. The user's first: what it refuses costs
    /// the others of the tenant nothing.
    pub(super) fn take(&self, tenant: &TenantKey, user: Option<&UserKey>) -> (Left, Result<(), Error>) {
        let mut left = Left::default();
        let taken = self.take_each(tenant, user, &mut left);
        (left, taken)
    }

    fn take_each(&self, tenant: &TenantKey, user: Option<&UserKey>, left: &mut Left) -> Result<(), Error> {
        if let (Some(users), Some(user)) = (&self.users, user) {
            users.take(&(tenant.clone(), user.clone()), left)?;
        }
        self.tenants.as_ref().map_or(Ok(()), |tenants| tenants.take(tenant, left))
    }

    /// Forgets the buckets that are full again, until the stop.
    pub async fn keep_small(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep(FORGET_EVERY) => {}
            }
            if let Some(users) = &self.users {
                users.limiter.retain_recent();
                users.limiter.shrink_to_fit();
            }
            if let Some(tenants) = &self.tenants {
                tenants.limiter.retain_recent();
                tenants.limiter.shrink_to_fit();
            }
        }
    }
}

impl<K: Clone + Eq + std::hash::Hash> Buckets<K> {
    /// `None` without a rate: then there is no limit.
    fn new(name: &'static str, rate: Option<NonZeroU32>, burst: Option<NonZeroU32>) -> Option<Self> {
        let rate = rate?;
        let burst =
            burst.unwrap_or_else(|| rate.saturating_mul(NonZeroU32::new(BURST_SECONDS).unwrap_or(rate)));
        let limiter = RateLimiter::keyed(Quota::per_second(rate).allow_burst(burst)).with_middleware();
        Some(Self { name, rate, burst, limiter })
    }

    fn take(&self, key: &K, left: &mut Left) -> Result<(), Error> {
        // The whole bucket is filled in so long, whole seconds, rounded up.
        let window = self.burst.get().div_ceil(self.rate.get());
        left.policies.push(format!("\"{}\";q={};w={window}", self.name, self.burst));
        match self.limiter.check_key(key) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                left.limits.push(format!("\"{}\";r={remaining}", self.name));
                Ok(())
            }
            Err(refused) => {
                let retry_after = refused.wait_time_from(DefaultClock::default().now());
                let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
                left.limits.push(format!("\"{}\";r=0;t={}", self.name, seconds.max(1)));
                Err(Error::RateLimited { whose: self.name, rate: self.rate.get(), retry_after })
            }
        }
    }
}

impl Left {
    /// As `RateLimit-Policy` and `RateLimit` tell it.
    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        for (name, items) in [(POLICY, &self.policies), (LIMIT, &self.limits)] {
            if let Ok(value) = HeaderValue::from_str(&items.join(", "))
                && !items.is_empty()
            {
                headers.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(user: u32, tenant: u32) -> Limits {
        let (one, some) = (NonZeroU32::new(1), NonZeroU32::new);
        Limits::new(&LimitsConfig {
            user_rate: one,
            user_burst: some(user),
            tenant_rate: one,
            tenant_burst: some(tenant),
        })
    }

    fn user(name: &str) -> UserKey {
        name.to_owned().try_into().unwrap()
    }

    #[test]
    fn a_user_who_asks_too_often_costs_the_others_nothing() {
        let (limits, tenant) = (limits(2, 4), TenantKey::default());
        let ask = |name: &str| limits.take(&tenant, Some(&user(name))).1.is_ok();
        assert_eq!([ask("a"), ask("a"), ask("a"), ask("a"), ask("a")], [true, true, false, false, false]);
        assert_eq!([ask("b"), ask("b"), ask("c")], [true, true, false], "the tenant has four in all");
        let other = TenantKey::try_from("other".to_owned()).unwrap();
        assert!(limits.take(&other, Some(&user("a"))).1.is_ok());
    }

    #[test]
    fn what_is_left_is_told() {
        let (limits, tenant) = (limits(2, 4), TenantKey::default());
        let mut headers = HeaderMap::new();
        limits.take(&tenant, Some(&user("a"))).0.tell(&mut headers);
        assert_eq!(headers[POLICY], "\"user\";q=2;w=2, \"tenant\";q=4;w=4");
        assert_eq!(headers[LIMIT], "\"user\";r=1, \"tenant\";r=3");
        let _ = limits.take(&tenant, Some(&user("a")));
        let (left, refused) = limits.take(&tenant, Some(&user("a")));
        let Err(Error::RateLimited { whose: "user", rate: 1, retry_after }) = refused else {
            panic!("{refused:?}")
        };
        assert!(!retry_after.is_zero() && retry_after <= Duration::from_secs(1), "{retry_after:?}");
        left.tell(&mut headers);
        assert_eq!(headers[LIMIT], "\"user\";r=0;t=1");
    }

    #[test]
    fn without_a_rate_there_is_no_limit() {
        let limits = Limits::new(&LimitsConfig::default());
        let (left, taken) = limits.take(&TenantKey::default(), Some(&user("a")));
        let mut headers = HeaderMap::new();
        left.tell(&mut headers);
        assert!(taken.is_ok() && headers.is_empty());
    }
}
