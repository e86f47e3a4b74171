//! What callers prove with who they are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use secrecy::SecretString;
use serde::Deserialize;

use crate::domain::{Access, TenantKey};

/// What callers prove with who they are. Without any of it nobody has to prove anything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AuthConfig {
    /// The keys that `threadkeeper keys create` has made open, too.
    pub stored_keys: bool,
    /// Keys of the configuration, by names of its own.
    pub keys: BTreeMap<String, KeyConfig>,
}

/// A key of the configuration: itself, or its SHA-256.
#[derive(Clone, Debug, Deserialize)]
pub struct KeyConfig {
    #[serde(default)]
    pub key: Option<SecretString>,
    /// A file that holds it. Read by [`Config::load`](super::Config::load), which puts the key where it belongs.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// 64 hexadecimal digits.
    #[serde(default)]
    pub sha256: Option<String>,
    /// Whose conversations it opens.
    #[serde(default)]
    pub tenant: TenantKey,
    pub scope: Access,
}

impl AuthConfig {
    /// Somebody has to prove something.
    pub fn is_configured(&self) -> bool {
        self.stored_keys || !self.keys.is_empty()
    }
}

impl KeyConfig {
    /// The hash that is written; `None` if there is none that could be one.
    pub fn hash(&self) -> Option<[u8; 32]> {
        let digits = self.sha256.as_ref()?.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let text =
                std::str::from_utf8(pair).ok().filter(|it| it.bytes().all(|b| b.is_ascii_hexdigit()))?;
            *byte = u8::from_str_radix(text, 16).ok()?;
        }
        Some(hash)
    }
}
