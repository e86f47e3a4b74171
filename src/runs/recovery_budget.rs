//! Bounds the requests that recoveries cost a user. A user whose every message is refused would
//! otherwise cost the upstream a multiple of what the other users cost it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::{ConversationKey, TenantKey, UserKey};

/// Most further requests after refusals that a user's runs may send within [`WINDOW`].
const MAX_STEPS: u32 = 30;
const WINDOW: Duration = Duration::from_mins(10);
/// Number of users above which ended windows are forgotten.
const MANY_USERS: usize = 1024;

/// The recovery steps of each user. In memory: a restart, or another replica, begins anew.
#[derive(Debug, Default)]
pub(in crate::runs) struct RecoveryBudget {
    users: Mutex<HashMap<(TenantKey, UserKey), Spent>>,
}

#[derive(Debug)]
struct Spent {
    since: Instant,
    steps: u32,
}

impl RecoveryBudget {
    /// Returns whether the user may have one more step, and counts it.
    pub(in crate::runs) fn take(&self, key: &ConversationKey) -> bool {
        let (now, mut users) = (
            Instant::now(),
            self.users.lock().unwrap_or_else(PoisonError::into_inner),
        );
        let is_over = |spent: &Spent| now.duration_since(spent.since) >= WINDOW;
        if users.len() >= MANY_USERS {
            users.retain(|_, spent| !is_over(spent));
        }
        let user = (key.tenant.clone(), key.user.clone());
        let new = || Spent {
            since: now,
            steps: 0,
        };
        let spent = users.entry(user).or_insert_with(new);
        if is_over(spent) {
            *spent = new();
        }
        spent.steps += 1;
        spent.steps <= MAX_STEPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Scope;

    fn key(user: &str) -> ConversationKey {
        ConversationKey {
            tenant: TenantKey::try_from("t".to_owned()).unwrap(),
            user: UserKey::try_from(user.to_owned()).unwrap(),
            scope: Scope::User,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn budget_is_per_user_and_comes_back() {
        let budget = RecoveryBudget::default();
        let granted = |user: &str| (0..100).filter(|_| budget.take(&key(user))).count();
        assert_eq!([granted("a"), granted("a"), granted("b")], [30, 0, 30]);
        tokio::time::advance(WINDOW).await;
        assert_eq!(granted("a"), 30);
    }
}
