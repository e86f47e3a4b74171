//! A replica without peers sends no notifications.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::timeout;

use super::SHORT;
use crate::support::gateway::{Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
const SENTINEL: &str = "NOTIFY threadkeeper, 'sentinel'";

/// Returns the first notification.
async fn told(ear: &mut PgListener) -> String {
    timeout(PATIENCE, ear.recv())
        .await
        .expect("a notification arrives")
        .unwrap()
        .payload()
        .to_owned()
}

/// Sends two messages at once. The end of the first run is news for the queued one.
async fn both(gateway: &Gateway) {
    tokio::join!(gateway.say(SCOPE, "one"), gateway.say(SCOPE, "two"));
}

/// On a Postgres server, a commit that notifies waits for all other commits that notify.
#[tokio::test(flavor = "multi_thread")]
async fn single_replica_sends_no_notifications() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = scene.gateway_with(SHORT).await;
    let mut ear = PgListener::connect(&scene.database.url()).await.unwrap();
    ear.listen("threadkeeper").await.unwrap();
    for _ in 0..3 {
        both(&gateway).await;
    }
    scene.database.execute(SENTINEL).await;
    assert_eq!(told(&mut ear).await, "sentinel");

    let _other = scene.gateway_with(SHORT).await;
    // The replica notifies as soon as it knows of the other one.
    let heard = async {
        loop {
            both(&gateway).await;
            scene.database.execute(SENTINEL).await;
            if told(&mut ear).await != "sentinel" {
                break;
            }
        }
    };
    timeout(PATIENCE + Duration::from_secs(10), heard)
        .await
        .expect("a replica with peers notifies them");
}
