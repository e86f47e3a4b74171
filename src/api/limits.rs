//! Rate limits: token buckets for messages and for all other requests, for each user and each tenant, in
//! this process.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use crate::config::{LimitsConfig, Rate};
use crate::domain::{TenantKey, UserKey};
use crate::error::{TooOften, whole_seconds};

/// Buckets of one kind in memory, 13 MB. A caller may name one invented user after the other.
const MAX_BUCKETS: usize = 400_000;
/// Number of buckets up to which full ones are not searched for.
const FEW_BUCKETS: usize = 1024;
pub(super) const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub(super) const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The kind of bucket that a request takes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Counted {
    /// A request that a model answers: a message, or the outputs of function calls. A repeat with the same
    /// idempotency key counts as [`Request`](Self::Request).
    Message,
    /// Any other request.
    Request,
}

/// All buckets of this process.
#[derive(Debug)]
pub struct Limits {
    messages: Both,
    requests: Both,
    hasher: RandomState,
}

/// The buckets of users and of tenants.
#[derive(Debug)]
struct Both {
    users: Option<Buckets>,
    tenants: Option<Buckets>,
}

/// Buckets with the same rate.
#[derive(Debug)]
struct Buckets {
    /// Name of the policy in the headers.
    name: &'static str,
    whose: &'static str,
    what: &'static str,
    rate: Rate,
    known: Mutex<Known>,
}

/// The buckets that are not full.
#[derive(Debug, Default)]
struct Known {
    /// Time at which each bucket is full again, by the hash of its key. The hash has a secret key of the
    /// process, so that nobody can search for a user who shares another user's bucket.
    full_at: HashMap<u64, Instant>,
    /// Number of buckets above which full ones are removed.
    enough: usize,
}

/// The remaining tokens of the buckets that a request took from, for the headers of its answer.
#[derive(Debug, Default)]
pub(super) struct Left {
    policies: Vec<String>,
    limits: Vec<String>,
}

impl Limits {
    pub fn new(config: &LimitsConfig) -> Self {
        let new = |name, whose, what, rate: Option<Rate>| {
            rate.map(|rate| Buckets {
                name,
                whose,
                what,
                rate,
                known: Mutex::default(),
            })
        };
        let (messages, requests) = ("messages", "requests");
        Self {
            messages: Both {
                users: new("user-messages", "user", messages, config.user_messages),
                tenants: new(
                    "tenant-messages",
                    "tenant",
                    messages,
                    config.tenant_messages,
                ),
            },
            requests: Both {
                users: new("user-requests", "user", requests, config.user_requests),
                tenants: new(
                    "tenant-requests",
                    "tenant",
                    requests,
                    config.tenant_requests,
                ),
            },
            hasher: RandomState::new(),
        }
    }

    /// Takes a token from the user's bucket, if the user is known, and one from the tenant's. If one bucket
    /// refuses, the other loses no token.
    pub(super) fn take(
        &self,
        counted: Counted,
        tenant: &TenantKey,
        user: Option<&UserKey>,
    ) -> (Left, Result<(), TooOften>) {
        let mut left = Left::default();
        let own = self.own(counted, tenant, user);
        let taken = own
            .map_or(Ok(()), |(users, key)| users.take(key, &mut left))
            .and_then(|()| {
                let Some(tenants) = &self.both(counted).tenants else {
                    return Ok(());
                };
                let taken = tenants.take(self.hasher.hash_one(tenant), &mut left);
                if let (Err(_), Some((users, key))) = (&taken, own) {
                    users.give_back(key);
                }
                taken
            });
        (left, taken)
    }

    /// Moves the token of a message that turned out to be a repeat: takes one for a request, and gives the
    /// message's back. `None`: no request is allowed now, and the message's token stays taken.
    pub(super) fn was_repeat(&self, tenant: &TenantKey, user: Option<&UserKey>) -> Option<Left> {
        let (left, taken) = self.take(Counted::Request, tenant, user);
        taken.ok()?;
        if let Some((users, key)) = self.own(Counted::Message, tenant, user) {
            users.give_back(key);
        }
        if let Some(tenants) = &self.messages.tenants {
            tenants.give_back(self.hasher.hash_one(tenant));
        }
        Some(left)
    }

    fn both(&self, counted: Counted) -> &Both {
        match counted {
            Counted::Message => &self.messages,
            Counted::Request => &self.requests,
        }
    }

    fn own(
        &self,
        counted: Counted,
        tenant: &TenantKey,
        user: Option<&UserKey>,
    ) -> Option<(&Buckets, u64)> {
        Some((
            self.both(counted).users.as_ref()?,
            self.hasher.hash_one((tenant, user?)),
        ))
    }
}

impl Buckets {
    fn take(&self, key: u64, left: &mut Left) -> Result<(), TooOften> {
        let (period, burst, now) = (self.rate.period(), self.rate.burst(), Instant::now());
        let whole = period * burst.get();
        left.policies.push(format!(
            "\"{}\";q={burst};w={}",
            self.name,
            whole_seconds(whole)
        ));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let full_at = known
            .full_at
            .get(&key)
            .map_or(now, |full_at| now.max(*full_at))
            + period;
        // The time until the bucket is full says how many tokens it lacks.
        let lacks = full_at - now;
        if lacks > whole {
            let retry_after = lacks.saturating_sub(whole);
            left.limits.push(format!(
                "\"{}\";r=0;t={}",
                self.name,
                whole_seconds(retry_after)
            ));
            return Err(TooOften {
                whose: self.whose,
                what: self.what,
                rate: self.rate,
                retry_after,
            });
        }
        known.put(key, full_at, now);
        let remaining = whole.saturating_sub(lacks).as_nanos() / period.as_nanos();
        left.limits.push(format!("\"{}\";r={remaining}", self.name));
        Ok(())
    }

    fn give_back(&self, key: u64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(full_at) = known.full_at.get_mut(&key) {
            *full_at = full_at.checked_sub(self.rate.period()).unwrap_or(*full_at);
        }
    }
}

impl Known {
    fn put(&mut self, key: u64, full_at: Instant, now: Instant) {
        self.full_at.insert(key, full_at);
        if self.full_at.len() > self.enough.max(FEW_BUCKETS) {
            self.forget(now);
        }
    }

    /// Removes full buckets, because a user without a bucket has the same rights. If too many are left,
    /// removes those that lack least. A caller who invents users therefore cannot make the gateway forget
    /// an empty bucket.
    fn forget(&mut self, now: Instant) {
        self.full_at.retain(|_, full_at| *full_at > now);
        let most = MAX_BUCKETS / 2;
        if let Some(surplus) = self.full_at.len().checked_sub(most + 1) {
            let mut times: Vec<_> = self.full_at.values().copied().collect();
            let (_, last, _) = times.select_nth_unstable(surplus);
            let last = *last;
            self.full_at.retain(|_, full_at| *full_at > last);
        }
        self.enough = self.full_at.len() * 2;
        self.full_at.shrink_to(self.enough);
    }
}

impl Left {
    /// Writes the headers `RateLimit-Policy` and `RateLimit`.
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
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::time::advance;

    use super::*;

    fn limits(user: &str, tenant: &str) -> Limits {
        let (user, tenant) = (user.parse().ok(), tenant.parse().ok());
        let config = LimitsConfig {
            user_messages: user,
            tenant_messages: tenant,
            ..LimitsConfig::default()
        };
        Limits::new(&config)
    }

    fn user(name: &str) -> UserKey {
        name.to_owned().try_into().unwrap()
    }

    fn asks(limits: &Limits, name: &str) -> bool {
        limits
            .take(Counted::Message, &TenantKey::default(), Some(&user(name)))
            .1
            .is_ok()
    }

    fn headers(left: &Left) -> (String, String) {
        let mut headers = HeaderMap::new();
        left.tell(&mut headers);
        let text = |name| {
            headers
                .get(name)
                .map_or("", |value: &HeaderValue| value.to_str().unwrap())
                .to_owned()
        };
        (text(POLICY), text(LIMIT))
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_who_asks_too_often_costs_the_others_nothing() {
        let limits = limits("1/h burst 2", "1/h burst 4");
        assert_eq!(
            ["a", "a", "a", "a"].map(|name| asks(&limits, name)),
            [true, true, false, false]
        );
        assert_eq!(
            ["b", "b", "c"].map(|name| asks(&limits, name)),
            [true, true, false],
            "the tenant has four"
        );
        let other = TenantKey::try_from("other".to_owned()).unwrap();
        assert!(
            limits
                .take(Counted::Message, &other, Some(&user("a")))
                .1
                .is_ok()
        );
        advance(Duration::from_hours(1)).await;
        assert_eq!(
            ["c", "c"].map(|name| asks(&limits, name)),
            [true, false],
            "the tenant's refusals cost c nothing"
        );
        advance(Duration::from_hours(1)).await;
        assert!(asks(&limits, "c"), "one of two, and then the other");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_is_told_and_when_there_is_more() {
        let limits = limits("10/m", "3/s burst 4");
        let ask = || limits.take(Counted::Message, &TenantKey::default(), Some(&user("a")));
        let (left, _) = ask();
        let policies = "\"user-messages\";q=10;w=60, \"tenant-messages\";q=4;w=2".to_owned();
        assert_eq!(
            headers(&left),
            (
                policies,
                "\"user-messages\";r=9, \"tenant-messages\";r=3".to_owned()
            )
        );
        for _ in 0..9 {
            advance(Duration::from_millis(400)).await;
            assert!(ask().1.is_ok());
        }
        // 3.6 of the 6 seconds until the next token have passed.
        let (left, refused) = ask();
        let refused = refused.unwrap_err();
        assert_eq!(refused.retry_after, Duration::from_millis(2400));
        assert_eq!(headers(&left).1, "\"user-messages\";r=0;t=3");
        let told = crate::error::Error::from(refused).to_string();
        assert_eq!(
            told,
            "too many messages: each user may send 10 a minute; send this one again in 3 s"
        );
        advance(Duration::from_millis(2399)).await;
        assert!(ask().1.is_err());
        advance(Duration::from_millis(1)).await;
        assert_eq!([ask().1.is_ok(), ask().1.is_ok()], [true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn messages_and_other_requests_are_counted_apart() {
        let rate = "1/d".parse().ok();
        let limits = Limits::new(&LimitsConfig {
            user_messages: rate,
            user_requests: rate,
            ..LimitsConfig::default()
        });
        let (tenant, alice) = (TenantKey::default(), user("alice"));
        let ask = |counted| limits.take(counted, &tenant, Some(&alice)).1.is_ok();
        assert_eq!([Counted::Message, Counted::Message].map(ask), [true, false]);
        // The message was a repeat, so it empties the bucket of requests instead.
        let left = limits.was_repeat(&tenant, Some(&alice)).unwrap();
        assert_eq!(headers(&left).1, "\"user-requests\";r=0");
        assert_eq!(
            [Counted::Request, Counted::Message, Counted::Message].map(ask),
            [false, true, false]
        );
        assert!(
            limits.was_repeat(&tenant, Some(&alice)).is_none(),
            "it stays a message"
        );
        assert!(!ask(Counted::Message));
    }

    #[test]
    fn without_a_rate_there_is_no_limit() {
        let limits = Limits::new(&LimitsConfig::default());
        let (left, taken) = limits.take(Counted::Request, &TenantKey::default(), Some(&user("a")));
        assert!(taken.is_ok() && headers(&left).0.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn full_buckets_are_forgotten_and_others_only_if_there_are_too_many() {
        let limits = limits("10/d", "");
        let known = || {
            limits
                .messages
                .users
                .as_ref()
                .unwrap()
                .known
                .lock()
                .unwrap()
                .full_at
                .len()
        };
        for _ in 0..10 {
            assert!(asks(&limits, "alice"));
        }
        assert!(asks(&limits, "bob"));
        advance(Duration::from_mins(143)).await;
        for n in 0..=FEW_BUCKETS {
            asks(&limits, &n.to_string());
        }
        assert_eq!(
            known(),
            FEW_BUCKETS + 3,
            "a bucket of 10 a day is full again after 144 minutes"
        );
        advance(Duration::from_mins(145)).await;
        for n in 0..=FEW_BUCKETS {
            asks(&limits, &format!("again-{n}"));
        }
        let forgotten = known();
        assert!(forgotten < 2 * FEW_BUCKETS, "{forgotten}");
        for n in 0..=MAX_BUCKETS {
            asks(&limits, &format!("made-up-{n}"));
            assert!(known() <= MAX_BUCKETS);
        }
        assert_eq!(
            [asks(&limits, "alice"), asks(&limits, "alice")],
            [true, true],
            "after two of 144 minutes"
        );
        assert!(!asks(&limits, "alice"), "hers was not forgotten");
    }

    proptest! {
        /// At any pace of requests, no more pass than the rate and the burst allow, and none is refused while
        /// fewer came.
        #[test]
        fn a_bucket_lets_through_what_its_rate_says(
            (count, burst) in (1..20_u32, 1..20_u32),
            pauses in prop::collection::vec(0..90_u64, 1..80),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let limits = limits(&format!("{count}/m burst {burst}"), "");
                let (begun, mut taken) = (Instant::now(), 0_u32);
                for pause in pauses {
                    advance(Duration::from_secs(pause)).await;
                    let added = begun.elapsed().as_secs_f64() * f64::from(count) / 60.0;
                    let is_taken = asks(&limits, "a");
                    taken += u32::from(is_taken);
                    assert!(f64::from(taken) <= f64::from(burst) + added + 1e-6);
                    assert!(is_taken || taken >= burst);
                }
            });
        }
    }
}
