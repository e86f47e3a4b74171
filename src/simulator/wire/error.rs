//! Error answers in the shape of the protocols: `{"error": {message, type, param, code}}`.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

/// An error answer.
#[derive(Clone, Debug)]
pub(in crate::simulator) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<String>,
    retry_after: Option<String>,
}

impl ApiError {
    /// 400 without `param` and `code`.
    pub(in crate::simulator) fn invalid(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            message.into(),
        )
    }

    /// 404 without `param` and `code`.
    pub(in crate::simulator) fn not_found(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            message.into(),
        )
    }

    pub(in crate::simulator) fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "Incorrect API key provided.".to_owned(),
        )
        .code("invalid_api_key")
    }

    /// Returns the usual body of an error status.
    pub(in crate::simulator) fn of_status(
        status: StatusCode,
        code: Option<&str>,
        retry_after: Option<&str>,
    ) -> Self {
        let error = match status {
            StatusCode::UNAUTHORIZED => Self::unauthorized(),
            StatusCode::TOO_MANY_REQUESTS => Self::new(
                status,
                "requests",
                "Rate limit reached for requests.".to_owned(),
            )
            .code("rate_limit_exceeded"),
            status if status.is_server_error() => Self::new(
                status,
                "server_error",
                "The server had an error while processing your request.".to_owned(),
            ),
            status => Self::new(
                status,
                "invalid_request_error",
                "A directive asked the simulator to refuse this request.".to_owned(),
            ),
        };
        let error = Self {
            retry_after: retry_after.map(str::to_owned),
            ..error
        };
        match code {
            Some("insufficient_quota") => Self {
                kind: "insufficient_quota",
                ..error
            }
            .code("insufficient_quota"),
            Some(code) => error.code(code),
            None => error,
        }
    }

    pub(in crate::simulator) fn too_large() -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            "The request body is too large.".to_owned(),
        )
    }

    /// Returns the error for a path that exists for other methods only.
    pub(in crate::simulator) fn wrong_method(method: &str, path: &[&str]) -> Self {
        let message = format!("Not allowed to {method} on /v1/{}.", path.join("/"));
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            message,
        )
    }

    pub(in crate::simulator) fn param(self, param: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..self
        }
    }

    pub(in crate::simulator) fn code(self, code: impl Into<String>) -> Self {
        Self {
            code: Some(code.into()),
            ..self
        }
    }

    fn new(status: StatusCode, kind: &'static str, message: String) -> Self {
        Self {
            status,
            kind,
            message,
            param: None,
            code: None,
            retry_after: None,
        }
    }
}

/// Refuses a run whose context has more words than the model reads.
pub(in crate::simulator) fn refuse_if_full(most: Option<u64>, words: u64) -> Result<(), ApiError> {
    if most.is_none_or(|most| words <= most) {
        return Ok(());
    }
    let error = ApiError::invalid("Your input exceeds the context window of this model.");
    Err(error.param("input").code("context_length_exceeded"))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }});
        let mut response = (self.status, json_body(&body)).into_response();
        if let Some(value) = self
            .retry_after
            .and_then(|text| HeaderValue::from_str(&text).ok())
        {
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        response
    }
}

/// Returns a JSON answer with status 200.
pub(in crate::simulator) fn json_body(body: &impl serde::Serialize) -> Response {
    let text = serde_json::to_vec(body).expect("the simulator's objects are plain JSON");
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
