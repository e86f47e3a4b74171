//! API keys, of which the database has hashes only, and the key of the fingerprints.

use sqlx::FromRow;
use uuid::Uuid;

use super::params::params;
use super::rows::{At, corrupt, word};
use super::statement::Statement;
use super::{Store, StoreError};
use crate::domain::{Access, KeyId, TenantKey, Timestamp};

static ADD: Statement = Statement::new(
    "api_keys.add",
    "INSERT INTO api_keys (id, prefix, hash, tenant, access, label, created_at)
    VALUES (:id, :prefix, :hash, :tenant, {as api_access, :access}, :label, {now})",
);

static LIST: Statement = Statement::new(
    "api_keys.list",
    "SELECT k.id, k.prefix, k.hash, k.tenant, {text k.access} AS access, k.label, k.created_at, k.revoked_at
    FROM api_keys k
    WHERE {as text, :tenant} IS NULL OR k.tenant = :tenant
    ORDER BY k.id",
);

static LIST_GOOD: Statement = Statement::new(
    "api_keys.list_good",
    "SELECT k.id, k.prefix, k.hash, k.tenant, {text k.access} AS access, k.label, k.created_at, k.revoked_at
    FROM api_keys k
    WHERE k.revoked_at IS NULL
    ORDER BY k.id",
);

static REVOKE: Statement = Statement::new(
    "api_keys.revoke",
    "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, {now})
    WHERE prefix = :prefix
    RETURNING id, prefix, hash, tenant, {text access} AS access, label, created_at, revoked_at",
);

static READ_FINGERPRINT_KEY: Statement = Statement::new(
    "api_keys.read_fingerprint_key",
    "SELECT k.secret FROM fingerprint_key k WHERE k.id = 1",
);

static ADD_FINGERPRINT_KEY: Statement = Statement::new(
    "api_keys.add_fingerprint_key",
    "INSERT INTO fingerprint_key (id, secret) VALUES (1, :secret) ON CONFLICT (id) DO NOTHING",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &ADD,
    &LIST,
    &LIST_GOOD,
    &REVOKE,
    &READ_FINGERPRINT_KEY,
    &ADD_FINGERPRINT_KEY,
];

impl Store {
    /// Adds an API key.
    pub async fn add_key(&self, key: &NewKey) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        let values = params()
            .set("id", key.id.uuid())
            .set("prefix", &key.prefix)
            .set("hash", &key.hash[..])
            .set("tenant", key.tenant.as_str())
            .set("access", key.access.as_str())
            .set("label", &key.label);
        c.execute(&ADD, values).await?;
        Ok(())
    }

    /// Returns all API keys of one tenant or of all, oldest first, revoked ones included.
    pub async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError> {
        let mut c = self.backend.reader().await?;
        let rows: Vec<KeyRow> = c
            .all(&LIST, params().set("tenant", tenant.map(TenantKey::as_str)))
            .await?;
        rows.into_iter().map(StoredKey::try_from).collect()
    }

    /// Returns the API keys of all tenants that are not revoked, oldest first.
    pub async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError> {
        let mut c = self.backend.reader().await?;
        let rows: Vec<KeyRow> = c.all(&LIST_GOOD, params()).await?;
        rows.into_iter()
            .map(|row| StoredKey::try_from(row).map(|stored| stored.key))
            .collect()
    }

    /// Revokes the API key with this prefix, and returns it. A key that was revoked before keeps
    /// its time. `None`: there is no such key.
    pub async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError> {
        let mut c = self.backend.writer().await?;
        let row: Option<KeyRow> = c.optional(&REVOKE, params().set("prefix", prefix)).await?;
        row.map(StoredKey::try_from).transpose()
    }

    /// Returns the key of the HMAC that makes [fingerprints](crate::domain::Fingerprints), the
    /// same for all processes on this database. If none is recorded, it records `fresh`.
    pub async fn fingerprint_key(&self, fresh: [u8; 32]) -> Result<[u8; 32], StoreError> {
        let mut c = self.backend.writer().await?;
        let mut found: Option<(Vec<u8>,)> = c.optional(&READ_FINGERPRINT_KEY, params()).await?;
        if found.is_none() {
            // If several processes get here at the same time, one of them records its own.
            c.execute(&ADD_FINGERPRINT_KEY, params().set("secret", &fresh[..]))
                .await?;
            found = Some(c.one(&READ_FINGERPRINT_KEY, params()).await?);
        }
        let (secret,) = found.unwrap_or_default();
        secret
            .try_into()
            .map_err(|_| corrupt("a fingerprint key of the wrong length"))
    }
}

#[derive(FromRow)]
struct KeyRow {
    id: Uuid,
    prefix: String,
    hash: Vec<u8>,
    tenant: String,
    access: String,
    label: String,
    created_at: At,
    revoked_at: Option<At>,
}

impl TryFrom<KeyRow> for StoredKey {
    type Error = StoreError;

    fn try_from(row: KeyRow) -> Result<Self, StoreError> {
        Ok(Self {
            key: NewKey {
                id: KeyId::from_uuid(row.id),
                prefix: row.prefix,
                hash: row
                    .hash
                    .try_into()
                    .map_err(|_| corrupt("the hash of an API key, of the wrong length"))?,
                tenant: TenantKey::try_from(row.tenant)
                    .map_err(|_| corrupt("the tenant of an API key"))?,
                access: word(&row.access)?,
                label: row.label,
            },
            created_at: row.created_at.0,
            revoked_at: row.revoked_at.map(|at| at.0),
        })
    }
}

/// An API key to be added.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewKey {
    pub id: KeyId,
    /// The beginning of the key: enough to find it, too little to use it.
    pub prefix: String,
    /// The SHA-256 of the whole key.
    pub hash: [u8; 32],
    pub tenant: TenantKey,
    pub access: Access,
    /// The purpose of the key, in the words of its creator.
    pub label: String,
}

/// An API key as it is recorded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredKey {
    pub key: NewKey,
    pub created_at: Timestamp,
    pub revoked_at: Option<Timestamp>,
}
