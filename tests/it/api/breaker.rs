//! The circuit breaker counts whole requests, not their retries. `recovery.rs` tests it when it
//! is open.

use reqwest::{Method, StatusCode};

use crate::support::gateway::Gateway;
use crate::support::scene::{Protocol, Scene, on_each_protocol};

on_each_protocol!(
    breaker_counts_request_once_despite_retries,
    refusals_cancels_and_cut_streams_keep_breaker_closed
);

const SCOPE: &str = "/v1/users/alice";
/// Settings with which one failed request opens the breaker.
const AT_ONCE: &str =
    "breaker_min_requests = 1\nbreaker_open_duration = \"1h\"\nlock_window = \"300ms\"\n";

async fn gateway(scene: &Scene) -> Gateway {
    scene
        .gateway_both("[runs]\nmax_retries = 9\n", AT_ONCE)
        .await
}

async fn status_of(gateway: &Gateway, content: &str) -> StatusCode {
    gateway
        .post(
            &format!("{SCOPE}/messages"),
            &serde_json::json!({"content": content}),
        )
        .await
        .status
}

async fn breaker_counts_request_once_despite_retries(scene: Scene) {
    let gateway = gateway(&scene).await;
    // The faults hit retries of the request, or look-ups of what it did.
    scene.fault("any", "status=503 retry_after=0", 6);
    assert_eq!(
        status_of(&gateway, "the seventh call is answered").await,
        StatusCode::OK
    );
    assert_eq!(status_of(&gateway, "so is this one").await, StatusCode::OK);
}

async fn refusals_cancels_and_cut_streams_keep_breaker_closed(scene: Scene) {
    let gateway = gateway(&scene).await;
    assert_eq!(status_of(&gateway, "hello").await, StatusCode::OK);
    for refusal in [
        "status=429 code=insufficient_quota",
        "status=401",
        "status=403",
        "status=501",
    ] {
        scene.fault("start", refusal, 1);
        assert_ne!(
            status_of(&gateway, "anybody?").await,
            StatusCode::OK,
            "{refusal}"
        );
    }
    // Whether the upstream would have answered is not known.
    let mut silent = gateway.stream(SCOPE, "[[sim: silent]]").await;
    let run = silent.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let cancel = gateway.request(Method::POST, &format!("{SCOPE}/runs/{run}/cancel"));
    assert_eq!(
        gateway.send(cancel).await.ok()["run"]["status"],
        "cancelled"
    );
    // A stream that breaks off later was an answer, too.
    if scene.protocol != Protocol::Assistants {
        assert_eq!(
            status_of(&gateway, "a story [[sim: cut=2]]").await,
            StatusCode::BAD_GATEWAY
        );
    }
    assert_eq!(status_of(&gateway, "and now?").await, StatusCode::OK);
}
