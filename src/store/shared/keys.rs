//! API keys, and the key of fingerprints.

macro_rules! keys {
    ($database:ty) => {
        use crate::domain::TenantKey;
        use crate::store::rows::corrupt;
        use crate::store::shared::KeyRow;
        use crate::store::{NewKey, StoreError, StoredKey};

        type Connection = <$database as sqlx::Database>::Connection;

        macro_rules! key_columns {
            () => {
                "k.id, k.prefix, k.hash, k.tenant, k.access, k.label, k.created_at, k.revoked_at"
            };
        }

        /// Implements [`Keys::add_key`](crate::store::Keys::add_key).
        pub(super) async fn add(connection: &mut Connection, key: &NewKey) -> Result<(), StoreError> {
            sqlx::query(concat!(
                "INSERT INTO api_keys (id, prefix, hash, tenant, access, label, created_at)
                VALUES ($1, $2, $3, $4, $5, $6, ",
                now!(),
                ")",
            ))
            .bind(key.id.uuid())
            .bind(&key.prefix)
            .bind(&key.hash[..])
            .bind(key.tenant.as_str())
            .bind(key.access.as_str())
            .bind(&key.label)
            .execute(connection)
            .await?;
            Ok(())
        }

        /// Implements [`Keys::keys`](crate::store::Keys::keys).
        pub(super) async fn all(
            connection: &mut Connection,
            tenant: Option<&TenantKey>,
        ) -> Result<Vec<StoredKey>, StoreError> {
            let rows: Vec<KeyRow> = sqlx::query_as(concat!(
                "SELECT ",
                key_columns!(),
                " FROM api_keys k WHERE $1 IS NULL OR k.tenant = $1 ORDER BY k.id",
            ))
            .bind(tenant.map(TenantKey::as_str))
            .fetch_all(connection)
            .await?;
            rows.into_iter().map(StoredKey::try_from).collect()
        }

        /// Implements [`Keys::good_keys`](crate::store::Keys::good_keys).
        pub(super) async fn good(connection: &mut Connection) -> Result<Vec<NewKey>, StoreError> {
            let rows: Vec<KeyRow> = sqlx::query_as(concat!(
                "SELECT ",
                key_columns!(),
                " FROM api_keys k WHERE k.revoked_at IS NULL ORDER BY k.id",
            ))
            .fetch_all(connection)
            .await?;
            rows.into_iter().map(|row| StoredKey::try_from(row).map(|stored| stored.key)).collect()
        }

        /// Implements [`Keys::revoke_key`](crate::store::Keys::revoke_key).
        pub(super) async fn revoke(
            connection: &mut Connection,
            prefix: &str,
        ) -> Result<Option<StoredKey>, StoreError> {
            let row: Option<KeyRow> = sqlx::query_as(concat!(
                "UPDATE api_keys AS k SET revoked_at = COALESCE(k.revoked_at, ",
                now!(),
                ") WHERE k.prefix = $1 RETURNING id, prefix, hash, tenant, access, label, created_at, revoked_at",
            ))
            .bind(prefix)
            .fetch_optional(connection)
            .await?;
            row.map(StoredKey::try_from).transpose()
        }

        /// Implements [`Keys::fingerprint_key`](crate::store::Keys::fingerprint_key).
        pub(super) async fn fingerprint_key(
            connection: &mut Connection,
            fresh: [u8; 32],
        ) -> Result<[u8; 32], StoreError> {
            const READ: &str = "SELECT k.secret FROM fingerprint_key k WHERE k.id = 1";
            if let Some(secret) = sqlx::query_scalar(READ).fetch_optional(&mut *connection).await? {
                return thirty_two(secret);
            }
            // Of several processes that get here at once one records its own.
            sqlx::query("INSERT INTO fingerprint_key (id, secret) VALUES (1, $1) ON CONFLICT (id) DO NOTHING")
                .bind(&fresh[..])
                .execute(&mut *connection)
                .await?;
            thirty_two(sqlx::query_scalar(READ).fetch_one(connection).await?)
        }

        fn thirty_two(secret: Vec<u8>) -> Result<[u8; 32], StoreError> {
            secret.try_into().map_err(|_| corrupt("a key of fingerprints of another length"))
        }
    };
}
pub(in crate::store) use keys;
