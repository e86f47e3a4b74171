//! API keys: creates them, and finds the owner of a key.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fmt::Write as _;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use rand::Rng;
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::Instant;

use crate::config::KeyConfig;
use crate::domain::{Access, KeyId, Principal, TenantKey};
use crate::store::NewKey;

/// Beginning of every key, by which scanners find leaked keys.
const MARK: &str = "tk_";
/// Number of digits after the mark that name a key.
const NAME_DIGITS: usize = 12;
/// Length of the prefix that names a key: the mark and the digits.
pub const KEY_PREFIX: usize = MARK.len() + NAME_DIGITS;
/// Age of stored keys that could not be read again. Older ones open nothing: one may have been revoked.
const GOOD_FOR: Duration = Duration::from_secs(15);

/// A new key. Nobody can see it again later.
#[derive(Debug)]
pub struct FreshKey {
    pub key: SecretString,
    pub record: NewKey,
}

impl FreshKey {
    /// Creates a key of 256 random bits.
    pub fn new(tenant: TenantKey, access: Access, label: String) -> Self {
        let mut random = Zeroizing::new([0_u8; NAME_DIGITS / 2 + 32]);
        rand::rng().fill_bytes(&mut *random);
        let mut digits = Zeroizing::new(String::with_capacity(random.len() * 2));
        for byte in *random {
            let _ = write!(digits, "{byte:02x}");
        }
        let (name, secret) = digits.split_at(NAME_DIGITS);
        let prefix = format!("{MARK}{name}");
        let key = SecretString::from(format!("{prefix}_{secret}"));
        let hash = hash_of(key.expose_secret());
        Self {
            key,
            record: NewKey {
                id: KeyId::new(),
                prefix,
                hash,
                tenant,
                access,
                label,
            },
        }
    }
}

/// The valid keys.
#[derive(Debug)]
pub struct Keyring {
    /// The keys of the configuration.
    fixed: Vec<Entry>,
    recorded: RwLock<Recorded>,
}

#[derive(Debug, Default)]
struct Recorded {
    /// The keys by their prefix.
    entries: HashMap<String, Entry>,
    read_at: Option<Instant>,
}

struct Entry {
    hash: [u8; 32],
    principal: Principal,
}

impl fmt::Debug for Entry {
    /// Shows the owner, and not the hash: a key of the configuration may be easy to guess.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("principal", &self.principal)
            .finish_non_exhaustive()
    }
}

impl Keyring {
    /// Builds the keyring from the keys of the configuration, by their names.
    pub fn new(fixed: &BTreeMap<String, KeyConfig>) -> Self {
        let entry = |(name, config): (&String, &KeyConfig)| {
            let hash = match (&config.key, config.hash()) {
                (Some(key), _) => hash_of(key.expose_secret()),
                (None, Some(hash)) => hash,
                (None, None) => return None,
            };
            let principal = Principal {
                tenant: config.tenant.clone(),
                access: config.scope,
                user: None,
                name: name.clone(),
            };
            Some(Entry { hash, principal })
        };
        Self {
            fixed: fixed.iter().filter_map(entry).collect(),
            recorded: RwLock::default(),
        }
    }

    /// Returns the owner of a key, in a time that does not depend on how nearly the key is right.
    pub(super) fn find(&self, key: &str) -> Option<Principal> {
        let hash = hash_of(key);
        let opens = |entry: &&Entry| bool::from(entry.hash.ct_eq(&hash));
        // Compares every key, so that the time does not tell which one fits.
        let fixed = self
            .fixed
            .iter()
            .fold(None, |found, entry| found.or(Some(entry).filter(opens)));
        if let Some(entry) = fixed {
            return Some(entry.principal.clone());
        }
        let recorded = self.recorded.read().unwrap_or_else(PoisonError::into_inner);
        let entry = key
            .get(..KEY_PREFIX)
            .and_then(|prefix| recorded.entries.get(prefix))?;
        (recorded.is_fresh() && opens(&entry)).then(|| entry.principal.clone())
    }

    /// Returns whether the stored keys were read recently.
    pub(super) fn is_fresh(&self) -> bool {
        self.recorded
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_fresh()
    }

    /// Replaces the stored keys with those that are valid now.
    pub(super) fn renew(&self, keys: Vec<NewKey>) {
        let entry = |key: NewKey| {
            let principal = Principal {
                tenant: key.tenant,
                access: key.access,
                user: None,
                name: key.prefix.clone(),
            };
            (
                key.prefix,
                Entry {
                    hash: key.hash,
                    principal,
                },
            )
        };
        let entries = keys.into_iter().map(entry).collect();
        let mut recorded = self
            .recorded
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *recorded = Recorded {
            entries,
            read_at: Some(Instant::now()),
        };
    }
}

impl Recorded {
    fn is_fresh(&self) -> bool {
        self.read_at.is_some_and(|at| at.elapsed() < GOOD_FOR)
    }
}

fn hash_of(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::damaged;

    fn fresh() -> FreshKey {
        FreshKey::new(TenantKey::default(), Access::Chat, "for tests".to_owned())
    }

    #[test]
    fn a_key_is_long_random_and_known_by_its_beginning() {
        let (one, other) = (fresh(), fresh());
        let text = one.key.expose_secret();
        assert_eq!(text.len(), 3 + 12 + 1 + 64, "{text}");
        assert!(text.starts_with(&format!("{}_", one.record.prefix)));
        assert_ne!(text, other.key.expose_secret());
        assert_ne!(one.record.prefix, other.record.prefix);
        assert!(
            !format!("{one:?}").contains(&text[16..]),
            "it is in no text"
        );
    }

    #[test]
    fn nothing_but_the_key_opens() {
        let key = fresh();
        let ring = Keyring::new(&BTreeMap::new());
        ring.renew(vec![key.record.clone()]);
        let text = key.key.expose_secret().to_owned();
        proptest!(|(
            other in prop_oneof!["\\PC{0,100}", "tk_[0-9a-f]{12}_[0-9a-f]{64}"],
            damaged in damaged(text.clone().into_bytes()),
        )| {
            let damaged = String::from_utf8_lossy(&damaged).into_owned();
            let prefixed = [&text[..KEY_PREFIX], &other].concat();
            for guess in [other, damaged, prefixed] {
                prop_assert_eq!(ring.find(&guess).is_some(), guess == text);
            }
        });
    }

    #[tokio::test(start_paused = true)]
    async fn recorded_keys_open_while_they_are_good() {
        let ring = Keyring::new(&BTreeMap::new());
        let (good, unknown) = (fresh(), fresh());
        assert_eq!(ring.find(good.key.expose_secret()), None);
        ring.renew(vec![good.record.clone()]);
        let found = ring.find(good.key.expose_secret()).unwrap();
        assert_eq!(
            (found.name, found.access),
            (good.record.prefix.clone(), Access::Chat)
        );
        assert_eq!(ring.find(unknown.key.expose_secret()), None);
        let text = good.key.expose_secret();
        for wrong in [
            &text[..15],
            &text[..79],
            &format!("{text}0"),
            &text.to_uppercase(),
            "",
            "tk_",
            "é",
        ] {
            assert_eq!(ring.find(wrong), None, "{wrong}");
        }
        tokio::time::advance(GOOD_FOR).await;
        assert_eq!(ring.find(text), None, "it may have been revoked");
    }
}
