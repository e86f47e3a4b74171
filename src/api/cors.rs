//! CORS: which pages of other origins may call from a browser.

use std::time::Duration;

use axum::http::Method;
use axum::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::keys;

/// Time for which a browser may cache the answer to a preflight request.
const MAX_AGE: Duration = Duration::from_hours(1);

/// Returns the layer that lets pages of these origins call. A page sends its own token; the layer
/// allows no cookies.
pub(super) fn layer(origins: &[String]) -> CorsLayer {
    let origins = origins
        .iter()
        .filter_map(|origin| HeaderValue::from_str(origin).ok());
    let named = HeaderName::from_static;
    CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
        .allow_headers([
            ACCEPT,
            AUTHORIZATION,
            CONTENT_TYPE,
            named("idempotency-key"),
            named("last-event-id"),
            named("prefer"),
            keys::USER,
            keys::SESSION,
            keys::TOPIC,
            named("x-request-id"),
        ])
        .expose_headers([
            LOCATION,
            RETRY_AFTER,
            WWW_AUTHENTICATE,
            named("idempotent-replayed"),
            named("preference-applied"),
            named("ratelimit"),
            named("ratelimit-policy"),
            named("x-request-id"),
        ])
        .max_age(MAX_AGE)
}
