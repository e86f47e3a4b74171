//! Fingerprints: they stand for the names of tenants, users, sessions and topics in logs, at
//! upstreams and in receipts, where the names must not be readable.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{ConversationKey, Scope, TenantKey, UserKey};

/// Makes fingerprints: the first 128 bits of an HMAC-SHA-256, as 32 hex digits.
///
/// Names are often e-mail addresses, which an attacker can guess and hash. Without the key of the
/// HMAC, a hashed guess proves nothing.
#[derive(Clone)]
pub struct Fingerprints {
    keyed: Hmac<Sha256>,
}

impl Fingerprints {
    /// `key` must be the same for all replicas of a database, and after every restart.
    pub fn new(key: &[u8; 32]) -> Self {
        // The array is as long as a block, so no length error is possible. HMAC pads a shorter key
        // with zeros too.
        let mut block = [0; 64];
        block[..key.len()].copy_from_slice(key);
        Self {
            keyed: Hmac::new(&block.into()),
        }
    }

    pub fn tenant(&self, tenant: &TenantKey) -> String {
        self.of(&[tenant.as_str()])
    }

    /// Includes the tenant: users of the same name in two tenants get different fingerprints.
    pub fn user(&self, tenant: &TenantKey, user: &UserKey) -> String {
        self.of(&[tenant.as_str(), user.as_str()])
    }

    /// Returns the fingerprint of a session or topic. The user's one conversation has the user's
    /// fingerprint.
    pub fn conversation(&self, key: &ConversationKey) -> String {
        let (tenant, user) = (key.tenant.as_str(), key.user.as_str());
        match &key.scope {
            Scope::User => self.of(&[tenant, user]),
            scope => self.of(&[tenant, user, scope.kind(), scope.name()]),
        }
    }

    /// Prefixes each part with its length, so that two keys share a fingerprint only if the HMAC
    /// collides.
    fn of(&self, parts: &[&str]) -> String {
        let mut keyed = self.keyed.clone();
        for part in parts {
            keyed.update(&(part.len() as u64).to_be_bytes());
            keyed.update(part.as_bytes());
        }
        let code = keyed.finalize().into_bytes();
        let (head, _) = code
            .split_first_chunk()
            .expect("an HMAC-SHA-256 has 32 bytes");
        format!("{:032x}", u128::from_be_bytes(*head))
    }
}

impl fmt::Debug for Fingerprints {
    /// Leaves the HMAC key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fingerprints").finish_non_exhaustive()
    }
}

/// The parts of a conversation's key, in clear or as fingerprints, for somebody outside the
/// gateway.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyNames {
    pub tenant: String,
    pub user: String,
    /// Kind (`session` or `topic`) and name; `None`: the user's one conversation.
    pub scope: Option<(&'static str, String)>,
}

impl KeyNames {
    /// Returns the names in clear, as the caller wrote them.
    pub fn in_clear(key: &ConversationKey) -> Self {
        Self {
            tenant: key.tenant.as_str().to_owned(),
            user: key.user.as_str().to_owned(),
            scope: (key.scope != Scope::User)
                .then(|| (key.scope.kind(), key.scope.name().to_owned())),
        }
    }

    /// Returns fingerprints in place of the names.
    pub fn hidden(key: &ConversationKey, by: &Fingerprints) -> Self {
        Self {
            tenant: by.tenant(&key.tenant),
            user: by.user(&key.tenant, &key.user),
            scope: (key.scope != Scope::User).then(|| (key.scope.kind(), by.conversation(key))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::{SessionKey, TopicKey};

    fn key((tenant, user, kind, name): (String, String, u8, String)) -> ConversationKey {
        ConversationKey {
            tenant: TenantKey::try_from(tenant).unwrap(),
            user: UserKey::try_from(user).unwrap(),
            scope: match kind {
                0 => Scope::User,
                1 => Scope::Session(SessionKey::try_from(name).unwrap()),
                _ => Scope::Topic(TopicKey::try_from(name).unwrap()),
            },
        }
    }

    #[test]
    fn a_fingerprint_is_the_beginning_of_an_hmac_of_the_parts_and_their_lengths() {
        let by = Fingerprints::new(&[7; 32]);
        let key = key(("t".to_owned(), "é".to_owned(), 1, "s".to_owned()));
        let names = KeyNames::hidden(&key, &by);
        assert_eq!(names.tenant, "fd6242d654e9b93d91bc76071c2379ab");
        assert_eq!(names.user, "f61e9236f62ad90382d1455d46a360d4");
        assert_eq!(
            names.scope,
            Some(("session", "13dd93315bb1648768d98a16ffc6ceb7".to_owned()))
        );
        assert_eq!(names.scope.unwrap().1, by.conversation(&key));
        assert!(!format!("{by:?}").contains('7'));
    }

    proptest! {
        /// Holds wherever the parts begin and end, and for every kind of scope.
        #[test]
        fn distinct_keys_have_distinct_fingerprints(
            a in ("[ab:]{1,4}", "[ab:]{1,4}", 0..3_u8, "[ab:]{1,4}"),
            b in ("[ab:]{1,4}", "[ab:]{1,4}", 0..3_u8, "[ab:]{1,4}"),
        ) {
            let by = Fingerprints::new(&[7; 32]);
            let (a, b) = (key(a), key(b));
            prop_assert_eq!(a == b, by.conversation(&a) == by.conversation(&b));
            prop_assert_eq!(
                (&a.tenant, &a.user) == (&b.tenant, &b.user),
                by.user(&a.tenant, &a.user) == by.user(&b.tenant, &b.user)
            );
            prop_assert_eq!(a.tenant == b.tenant, by.tenant(&a.tenant) == by.tenant(&b.tenant));
            let all = BTreeSet::from([by.tenant(&a.tenant), by.user(&a.tenant, &a.user), by.conversation(&a)]);
            prop_assert_eq!(all.len(), if a.scope == Scope::User { 2 } else { 3 });
            prop_assert!(all.iter().all(|it| it.len() == 32));
            prop_assert_ne!(by.conversation(&a), Fingerprints::new(&[8; 32]).conversation(&a));
        }
    }
}
