//! API keys, and the key of fingerprints.

use async_trait::async_trait;

use super::SqliteStore;
use super::dialect::now;
use crate::store::Keys;
use crate::store::pool::on;
use crate::store::shared::keys;

keys!(sqlx::Sqlite);

#[async_trait]
impl Keys for SqliteStore {
    async fn add_key(&self, key: &NewKey) -> Result<(), StoreError> {
        on!(self.writer, c => add(c, key))
    }

    async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError> {
        on!(self.readers, c => all(c, tenant))
    }

    async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError> {
        on!(self.readers, c => good(c))
    }

    async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError> {
        on!(self.writer, c => revoke(c, prefix))
    }

    async fn fingerprint_key(&self, fresh: [u8; 32]) -> Result<[u8; 32], StoreError> {
        on!(self.writer, c => fingerprint_key(c, fresh))
    }
}
