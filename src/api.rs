//! The HTTP API: all routes, and the middleware of every answer.

mod authorize;
mod body;
mod caller;
mod canonical;
mod cors;
mod deletions;
mod extract;
mod forwarded;
mod health;
mod keys;
mod limits;
mod messages;
mod openapi;
mod operators;
mod prefer;
mod problem;
mod request_log;
mod run_response;
mod runs;
mod sse;
mod state;
mod threads;
mod users;
mod views;

use std::any::Any;
use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::extract::Extension;
use axum::handler::Handler;
use axum::http::Method;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use bytes::Bytes;
use serde_json::Value;
use tower_http::catch_panic::CatchPanicLayer;

use self::authorize::Asks;
use self::keys::{CONVERSATION, Place, USERS};
use self::limits::Counted;
pub use self::limits::Limits;
use self::openapi::Doc;
pub use self::openapi::Route;
use self::request_log::Observed;
pub use self::state::AppState;
use crate::domain::Access;
use crate::error::Error;

/// The three kinds of conversation by path, and all of them by headers. All have the same resources.
const SCOPES: [&str; 4] = [
    "/v1/users/{user}",
    "/v1/users/{user}/sessions/{session}",
    "/v1/users/{user}/topics/{topic}",
    CONVERSATION,
];

/// Returns the router with every route of the gateway.
pub fn router(state: AppState) -> Router {
    let router = all().router.layer(Extension(state.clone()));
    let observed = Observed {
        server: Arc::clone(&state.server),
        logs_clients: state.logs_clients,
    };
    finished(router, observed).with_state(state)
}

/// Returns the list of all routes.
pub fn routes() -> Vec<Route> {
    all().table.into_iter().map(|(route, _)| route).collect()
}

/// Returns the OpenAPI document, for tests that check answers against it.
pub fn openapi() -> Value {
    openapi::document(&all().table)
}

/// The OpenAPI document. It depends on the version alone, not on the configuration.
static DOCUMENT: LazyLock<Bytes> =
    LazyLock::new(|| serde_json::to_vec(&openapi()).unwrap_or_default().into());

/// Sends the OpenAPI document.
async fn show_openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.clone())
}

fn all() -> Routes {
    let mut routes = Routes::default();
    routes.open("/healthz", health::healthz, health::healthz_doc);
    routes.open("/readyz", health::readyz, health::readyz_doc);
    routes.open("/openapi.json", show_openapi, openapi::show_doc);
    for scope in SCOPES {
        conversation(&mut routes, scope);
    }
    for user in USERS {
        users(&mut routes, user);
    }
    operators(&mut routes);
    routes
}

/// Adds the routes of a conversation, below the path that names it.
fn conversation(routes: &mut Routes, scope: &str) {
    use Access::{Chat, Read};
    let at = |rest: &str| format!("{scope}{rest}");
    routes.add_message(at("/messages"), messages::create, messages::create_doc);
    routes.add(
        Read,
        Method::GET,
        at("/messages"),
        messages::list,
        messages::list_doc,
    );
    routes.add(
        Read,
        Method::GET,
        at("/thread"),
        threads::show,
        threads::show_doc,
    );
    routes.add(
        Chat,
        Method::PATCH,
        at("/thread"),
        threads::update,
        threads::update_doc,
    );
    routes.add(
        Chat,
        Method::DELETE,
        at("/thread"),
        threads::delete,
        threads::delete_doc,
    );
    routes.add(
        Chat,
        Method::POST,
        at("/thread/rollover"),
        threads::roll_over,
        threads::roll_over_doc,
    );
    routes.add(
        Chat,
        Method::POST,
        at("/thread/cancel"),
        threads::cancel,
        threads::cancel_doc,
    );
    routes.add(
        Chat,
        Method::POST,
        at("/runs/{run}/cancel"),
        runs::cancel,
        runs::cancel_doc,
    );
    routes.add_message(
        at("/runs/{run}/tool_outputs"),
        runs::tool_outputs,
        runs::tool_outputs_doc,
    );
    routes.add(
        Read,
        Method::GET,
        at("/runs/{run}/events"),
        runs::events,
        runs::events_doc,
    );
    routes.add_message(at("/runs"), runs::create, runs::create_doc);
    routes.add(Read, Method::GET, at("/runs"), runs::list, runs::list_doc);
    routes.add(
        Read,
        Method::GET,
        at("/runs/{run}"),
        runs::show,
        runs::show_doc,
    );
}

/// Adds the routes of a user as a whole.
fn users(routes: &mut Routes, user: &str) {
    use Access::{Chat, Read};
    let at = |rest: &str| format!("{user}{rest}");
    routes.add(Chat, Method::DELETE, user, users::delete, users::delete_doc);
    routes.add(
        Read,
        Method::GET,
        at("/threads"),
        users::threads,
        users::threads_doc,
    );
    routes.add(
        Read,
        Method::GET,
        at("/export"),
        users::export,
        users::export_doc,
    );
}

/// Adds the routes about threads of all users, the work in the background, and deletions.
fn operators(routes: &mut Routes) {
    use Access::{Admin, Operator, Read};
    routes.add(
        Read,
        Method::GET,
        "/v1/deletions/{deletion}",
        deletions::show,
        deletions::show_doc,
    );
    routes.add(
        Admin,
        Method::GET,
        "/v1/threads",
        operators::threads,
        operators::threads_doc,
    );
    routes.add(
        Admin,
        Method::GET,
        "/v1/threads/{thread}",
        operators::thread,
        operators::thread_doc,
    );
    routes.add(
        Admin,
        Method::GET,
        "/v1/threads/{thread}/messages",
        operators::messages,
        operators::messages_doc,
    );
    routes.add(
        Operator,
        Method::POST,
        "/v1/admin/cleanup",
        operators::cleanup,
        operators::cleanup_doc,
    );
}

/// Collects routes, each with its guard and the description of its handler.
#[derive(Default)]
struct Routes {
    router: Router<AppState>,
    table: Vec<(Route, Describe)>,
}

type Describe = fn() -> Doc;

impl Routes {
    /// Adds a `GET` that is open to everybody, with any query: load balancers and caches add their own.
    fn open<H: Handler<T, AppState>, T: 'static>(&mut self, path: &str, handler: H, doc: Describe) {
        self.put(None, Method::GET, path.to_owned(), get(handler), doc);
    }

    fn add<H: Handler<T, AppState>, T: 'static>(
        &mut self,
        needs: Access,
        method: Method,
        path: impl Into<String>,
        handler: H,
        doc: Describe,
    ) {
        self.guard((needs, Counted::Request), method, path.into(), handler, doc);
    }

    /// Adds a `POST` that a model answers, which counts as a message.
    fn add_message<H: Handler<T, AppState>, T: 'static>(
        &mut self,
        path: String,
        handler: H,
        doc: Describe,
    ) {
        self.guard(
            (Access::Chat, Counted::Message),
            Method::POST,
            path,
            handler,
            doc,
        );
    }

    fn guard<H: Handler<T, AppState>, T: 'static>(
        &mut self,
        (needs, counted): (Access, Counted),
        method: Method,
        path: String,
        handler: H,
        doc: Describe,
    ) {
        // The filter knows all methods that are used here.
        let filter = MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::GET);
        let asks = Asks {
            needs,
            counted,
            keys: Place::of(&path),
            query: authorize::Query::of(doc),
        };
        let guarded = on(filter, handler)
            .route_layer(from_fn(authorize::guard))
            .route_layer(Extension(asks));
        self.put(Some(needs), method, path, guarded, doc);
    }

    fn put(
        &mut self,
        needs: Option<Access>,
        method: Method,
        path: String,
        route: MethodRouter<AppState>,
        doc: Describe,
    ) {
        self.router = std::mem::take(&mut self.router).route(&path, route);
        self.table.push((
            Route {
                method,
                path,
                needs,
            },
            doc,
        ));
    }
}

/// Adds the fallbacks and the middleware of every answer.
fn finished<S: Clone + Send + Sync + 'static>(router: Router<S>, observed: Observed) -> Router<S> {
    let origins = &observed.server.cors_origins;
    let router = router
        .fallback(async || Error::NotFound("there is nothing at this path: see `/openapi.json`"))
        .method_not_allowed_fallback(async || Error::MethodNotAllowed)
        .layer(CatchPanicLayer::custom(panicked));
    let router = if origins.is_empty() {
        router
    } else {
        router.layer(cors::layer(origins))
    };
    router.layer(from_fn_with_state(observed, request_log::observe))
}

/// Turns a panic into a problem. The hook has logged the panic. Its text may have content, so it is not sent.
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
        let router: Router = finished(
            Router::new().route("/broken", get(broken)),
            Observed::default(),
        );
        let request = Request::get("/broken")
            .header("x-request-id", "my-id")
            .body(Body::empty())
            .unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(
            response.headers()[header::CONTENT_TYPE],
            "application/problem+json"
        );
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["type"], "urn:threadkeeper:problem:internal");
        assert_eq!(problem["request_id"], "my-id");
        assert!(!problem.to_string().contains("planted"));
    }
}
