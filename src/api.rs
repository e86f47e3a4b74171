//! The HTTP surface: routes, and the middleware that every answer passes.

mod deletions;
mod extract;
mod health;
mod messages;
mod observe;
mod operators;
mod prefer;
mod problem;
mod runs;
mod sse;
mod threads;
mod turn;
mod users;
mod views;

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::config::ServerConfig;
use crate::error::Error;
use crate::life::Keeper;
use crate::runs::Runs;

/// What handlers reach.
#[derive(Clone, Debug)]
pub struct AppState {
    pub runs: Runs,
    pub keeper: Keeper,
    pub server: Arc<ServerConfig>,
}

/// The three kinds of conversation, each with the same resources below it.
const SCOPES: [&str; 3] =
    ["/v1/users/{user}", "/v1/users/{user}/sessions/{session}", "/v1/users/{user}/topics/{topic}"];

/// Every route of the gateway.
pub fn router(state: AppState) -> Router {
    let mut router =
        Router::new().route("/healthz", get(health::healthz)).route("/readyz", get(health::readyz));
    for scope in SCOPES {
        router = router
            .route(&format!("{scope}/messages"), post(messages::create).get(messages::list))
            .route(
                &format!("{scope}/thread"),
                get(threads::show).patch(threads::update).delete(threads::delete),
            )
            .route(&format!("{scope}/thread/rollover"), post(threads::roll_over))
            .route(&format!("{scope}/thread/cancel"), post(threads::cancel))
            .route(&format!("{scope}/runs/{{run}}/cancel"), post(runs::cancel))
            .route(&format!("{scope}/runs/{{run}}/tool_outputs"), post(runs::tool_outputs))
            .route(&format!("{scope}/runs/{{run}}/events"), get(runs::events))
            .route(&format!("{scope}/runs"), get(runs::list))
            .route(&format!("{scope}/runs/{{run}}"), get(runs::show));
    }
    router = router
        .route("/v1/users/{user}", delete(users::delete))
        .route("/v1/users/{user}/threads", get(users::threads))
        .route("/v1/users/{user}/export", get(users::export))
        .route("/v1/deletions/{deletion}", get(deletions::show))
        .route("/v1/threads", get(operators::threads))
        .route("/v1/threads/{thread}", get(operators::thread))
        .route("/v1/threads/{thread}/messages", get(operators::messages))
        .route("/v1/admin/cleanup", post(operators::cleanup));
    finished(router).with_state(state)
}

/// The routes with what every answer passes.
fn finished<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    router
        .fallback(async || Error::NotFound("there is nothing at this path"))
        .method_not_allowed_fallback(async || Error::MethodNotAllowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(observe::observe))
}

/// The panic itself has been logged by the hook; its text may hold anything, so the caller does not see it.
fn panicked(_panic: Box<dyn Any + Send + 'static>) -> Response {
    Error::Internal(None).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, StatusCode, header};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_a_problem_that_does_not_repeat_it() {
        async fn broken() -> &'static str {
            panic!("planted text")
        }
        let router: Router = finished(Router::new().route("/broken", get(broken)));
        let request = Request::get("/broken").header("x-request-id", "my-id").body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["type"], "urn:threadkeeper:problem:internal");
        assert_eq!(problem["request_id"], "my-id");
        assert!(!problem.to_string().contains("planted"));
    }
}
