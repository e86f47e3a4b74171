//! Stored API keys, and the key of fingerprints.

use futures_util::future::join_all;
use threadkeeper::domain::{Access, KeyId};
use threadkeeper::store::NewKey;

use super::*;

on_every_backend!(
    revoked_key_stays_listed_but_invalid,
    concurrent_requests_share_one_fingerprint_key,
);

fn key(number: u8, tenant: &str) -> NewKey {
    NewKey {
        id: KeyId::new(),
        prefix: format!("tk_{number:012}"),
        hash: [number; 32],
        tenant: TenantKey::try_from(tenant.to_owned()).unwrap(),
        access: Access::Chat,
        label: "for tests".to_owned(),
    }
}

async fn revoked_key_stays_listed_but_invalid(_: &TestDatabase, store: &Store) {
    let keys = [key(1, "acme"), key(2, "other"), key(3, "acme")];
    for key in &keys {
        store.add_key(key).await.unwrap();
    }
    assert_eq!(store.good_keys().await.unwrap(), keys);
    let revoked = store.revoke_key(&keys[0].prefix).await.unwrap().unwrap();
    assert!(revoked.revoked_at.is_some());
    assert_eq!(store.good_keys().await.unwrap(), keys[1..]);
    let listed = store.keys(None).await.unwrap();
    assert_eq!(
        listed.iter().map(|it| &it.key).collect::<Vec<_>>(),
        keys.iter().collect::<Vec<_>>()
    );
    assert_eq!(listed[0], revoked);
    assert_eq!(store.keys(Some(&keys[1].tenant)).await.unwrap().len(), 1);
    assert_eq!(
        store.revoke_key(&keys[0].prefix).await.unwrap(),
        Some(revoked),
        "the key is unchanged"
    );
    assert_eq!(store.revoke_key("tk_").await.unwrap(), None);
}

async fn concurrent_requests_share_one_fingerprint_key(database: &TestDatabase, store: &Store) {
    let asked = join_all((1..=16).map(|n| store.fingerprint_key([n; 32]))).await;
    let mut keys: Vec<_> = asked.into_iter().map(Result::unwrap).collect();
    keys.dedup();
    assert_eq!(keys.len(), 1, "{keys:?}");
    assert_eq!(store.fingerprint_key([0; 32]).await.unwrap(), keys[0]);
    assert_eq!(
        database
            .number("SELECT count(*) FROM fingerprint_key")
            .await,
        1
    );
}
