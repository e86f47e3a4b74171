//! API keys, and the key of fingerprints.

use async_trait::async_trait;

use super::PostgresStore;
use super::dialect::now;
use crate::store::Keys;
use crate::store::pool::on;
use crate::store::shared::keys;

keys!(sqlx::Postgres);

#[async_trait]
impl Keys for PostgresStore {
    async fn add_key(&self, key: &NewKey) -> Result<(), StoreError> {
        on!(self.general, c => add(c, key))
    }

    async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError> {
        on!(self.general, c => all(c, tenant))
    }

    async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError> {
        on!(self.general, c => good(c))
    }

    async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError> {
        on!(self.general, c => revoke(c, prefix))
    }

    async fn fingerprint_key(&self, fresh: [u8; 32]) -> Result<[u8; 32], StoreError> {
        on!(self.general, c => fingerprint_key(c, fresh))
    }
}
