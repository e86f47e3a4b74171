//! API keys: of each a hash, never the key. And the key of fingerprints.

use async_trait::async_trait;

use super::StoreError;
use crate::domain::{Access, KeyId, TenantKey, Timestamp};

/// The keys that callers prove with who they are.
#[async_trait]
pub trait Keys: Send + Sync {
    /// Adds a key.
    async fn add_key(&self, key: &NewKey) -> Result<(), StoreError>;

    /// All keys, of one tenant or of all, oldest first, revoked ones included.
    async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError>;

    /// Those that open something: not revoked. Of all tenants, oldest first.
    async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError>;

    /// Revokes the key that begins so. It is as it was if it was revoked before; `None` if there is none.
    async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError>;

    /// The key of the HMAC that makes [fingerprints](crate::domain::Fingerprints), the same for all processes on this database:
    /// the recorded one, or `fresh`, which is recorded if there is none.
    async fn fingerprint_key(&self, fresh: [u8; 32]) -> Result<[u8; 32], StoreError>;
}

/// A key to be added.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewKey {
    pub id: KeyId,
    /// How the key begins: enough to find it, too little to use it.
    pub prefix: String,
    /// The SHA-256 of the whole key.
    pub hash: [u8; 32],
    pub tenant: TenantKey,
    pub access: Access,
    /// What it is for, in its maker's words.
    pub label: String,
}

/// A key as it is recorded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredKey {
    pub key: NewKey,
    pub created_at: Timestamp,
    pub revoked_at: Option<Timestamp>,
}
