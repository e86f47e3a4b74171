//! Clients that ask and do not stay for the answer.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
/// Of `store.max_connections`, one is set aside for what must not wait.
const SETTINGS: [(&str, &str); 2] =
    [("THREADKEEPER_STORE__MAX_CONNECTIONS", "4"), ("THREADKEEPER_STORE__ACQUIRE_TIMEOUT", "1s")];
const FOR_CALLERS: i64 = 3;
/// Those, and two more, for the session and for what others tell.
const MOST: i64 = 6;
/// The statements of callers who read, which wait for a lock.
const STUCK: &str = "FROM pg_stat_activity WHERE application_name = 'threadkeeper' AND datname = current_database() \
                     AND wait_event_type = 'Lock' AND query LIKE '%FROM messages%'";

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hang_up_cost_no_connections() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = Gateway::start_with(&scene.config(""), &SETTINGS).await;
    gateway.say(SCOPE, "hello").await;
    let count = async |what: String| scene.database.number(&format!("SELECT count(*) {what}")).await;
    let ours =
        "FROM pg_stat_activity WHERE application_name = 'threadkeeper' AND datname = current_database()";

    let lock = scene.database.lock("messages").await;
    for n in 1..=2 * FOR_CALLERS {
        let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
        let request = format!("GET {SCOPE}/messages HTTP/1.1\r\nhost: x\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        // Until the database works on it, or it is told that no connection is free.
        let told = async {
            while timeout(Duration::from_millis(20), socket.readable()).await.is_err() {
                if count(STUCK.to_owned()).await >= n {
                    break;
                }
            }
        };
        timeout(Duration::from_secs(20), told).await.expect("the request comes to something");
        socket.shutdown().await.unwrap();
        // The gateway has let go of it.
        socket.read_to_end(&mut Vec::new()).await.unwrap();
        let connections = count(ours.to_owned()).await;
        assert!(connections <= MOST, "{connections} connections after {n} clients have hung up");
    }
    let stuck = scene.database.texts(&format!("SELECT pid::text {STUCK}")).await;
    assert_eq!(i64::try_from(stuck.len()).unwrap(), FOR_CALLERS);

    drop(lock);
    gateway.get(&format!("{SCOPE}/messages")).await.ok();
    let same = count(format!("{ours} AND pid IN ({})", stuck.join(", "))).await;
    assert_eq!(same, FOR_CALLERS, "the connections are used again");
}
