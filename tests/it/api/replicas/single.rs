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
async fn next_notification(listener: &mut PgListener) -> String {
    timeout(PATIENCE, listener.recv())
        .await
        .expect("a notification arrives")
        .unwrap()
        .payload()
        .to_owned()
}

/// Sends two messages at once. The queued run waits for the end of the first one.
async fn send_two(gateway: &Gateway) {
    tokio::join!(gateway.say(SCOPE, "one"), gateway.say(SCOPE, "two"));
}

/// On a Postgres server, a commit that notifies waits for all other commits that notify.
#[tokio::test(flavor = "multi_thread")]
async fn single_replica_sends_no_notifications() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = scene.gateway_with(SHORT).await;
    let mut listener = PgListener::connect(&scene.database.url()).await.unwrap();
    listener.listen("threadkeeper").await.unwrap();
    for _ in 0..3 {
        send_two(&gateway).await;
    }
    scene.database.execute(SENTINEL).await;
    assert_eq!(next_notification(&mut listener).await, "sentinel");

    let _other = scene.gateway_with(SHORT).await;
    // The replica notifies as soon as it knows of the other one.
    let notified = async {
        loop {
            send_two(&gateway).await;
            scene.database.execute(SENTINEL).await;
            if next_notification(&mut listener).await != "sentinel" {
                break;
            }
        }
    };
    timeout(PATIENCE + Duration::from_secs(10), notified)
        .await
        .expect("a replica with peers notifies them");
}
