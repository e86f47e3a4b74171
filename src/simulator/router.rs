//! Routes a request to its protocol: checks credentials, applies faults, and records the request.

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};

use super::{assistants, control, responses};
use crate::simulator::behaviour::plan::Plan;
use crate::simulator::behaviour::refusal::{Dropped, LateHead};
use crate::simulator::state::Server;
use crate::simulator::state::stats::Recorded;
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::operation::Operation;

/// Bytes of a request body.
const MAX_BODY: usize = 64 * 1024 * 1024;
/// Bytes of a request body that is recorded.
const MAX_RECORDED_BODY: usize = 256 * 1024;

/// Answers one request.
pub(super) async fn answer(
    server: Arc<Server>,
    request: Request<Incoming>,
) -> Result<Response, Dropped> {
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return Ok(ApiError::too_large().into_response());
        }
        Err(_) => return Err(Dropped), // the client left during the request
    };
    let path: Vec<&str> = parts.uri.path().split('/').skip(1).collect();
    if let ["_simulator", rest @ ..] = path.as_slice() {
        return Ok(control::answer(&server, &parts.method, rest, &body));
    }
    let mut response = protocol(&server, &parts, &path, body).await?;
    if let Some(LateHead(time)) = response.extensions_mut().remove() {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = server.stop.cancelled() => return Err(Dropped),
        }
    }
    if let Ok(id) = HeaderValue::from_str(&server.id("req")) {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

async fn protocol(
    server: &Arc<Server>,
    parts: &Parts,
    path: &[&str],
    body: Bytes,
) -> Result<Response, Dropped> {
    let path = match path {
        ["v1", rest @ ..] => rest,
        _ => &[],
    };
    let operation = Operation::of(&parts.method, path);
    let payload = Payload::read(&body);
    let fault = {
        let mut world = server.world();
        world.counters.request(operation.map(Operation::name));
        if server.config.recorded > 0 {
            world.counters.record(
                recorded(parts, &body, &payload, operation),
                server.config.recorded,
            );
        }
        operation.and_then(|operation| world.faults.take(operation))
    };
    server.changed();
    let Some(operation) = operation else {
        return Ok(unknown_path(parts));
    };
    if !server.config.conversations && path[0] == "conversations" {
        return Ok(bare_not_found());
    }
    if !server.config.list_threads {
        match operation {
            Operation::ListThreads => return Ok(unknown_path(parts)),
            Operation::ListConversations => {
                return Ok(ApiError::wrong_method("GET", path).into_response());
            }
            _ => {}
        }
    }
    if let Err(error) = admitted(server, &parts.headers, path[0]) {
        return Ok(error.into_response());
    }
    let mut plan = Plan::default();
    if let Some(fault) = &fault {
        plan.apply(fault)
            .expect("faults are checked when they are added");
    }
    let asked = path.last().copied().unwrap_or_default();
    if let Err(refused) = plan.worded(asked).and_then(|()| plan.refused()) {
        return refused.answer(operation);
    }
    if !operation.generates() {
        if plan.is_silent() {
            server.stop.cancelled().await;
            return Err(Dropped);
        }
        if let Some(latency) = plan.latency {
            tokio::time::sleep(latency).await;
        }
    }
    if operation == Operation::ListModels {
        return Ok(json_body(&json!({"object": "list", "data": []})));
    }
    let body = match payload.into_object() {
        Ok(body) => body,
        Err(error) => return Ok(error.into_response()),
    };
    let query = parts.uri.query().unwrap_or_default().as_bytes();
    let call = Call {
        operation,
        path: path.iter().map(|&segment| segment.to_owned()).collect(),
        query: url::form_urlencoded::parse(query).into_owned().collect(),
        body,
        fault,
    };
    let answer = if path[0] == "threads" {
        assistants::answer(server, call)
    } else {
        responses::answer(server, call).await
    };
    match answer {
        Ok(response) if plan.drop.is_none() => Ok(response),
        Ok(_) => Err(Dropped),
        Err(refused) => refused.answer(operation),
    }
}

fn admitted(server: &Server, headers: &HeaderMap, family: &str) -> Result<(), ApiError> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let bearer = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let key = bearer
        .or_else(|| text("api-key"))
        .unwrap_or_default()
        .trim();
    let accepted = match &server.config.api_key {
        Some(required) => key == required.expose_secret(),
        None => !key.is_empty() && !key.starts_with("bad"),
    };
    if !accepted {
        return Err(ApiError::unauthorized());
    }
    let beta = headers
        .get_all("openai-beta")
        .iter()
        .filter_map(|value| value.to_str().ok());
    if family == "threads"
        && !beta
            .flat_map(|value| value.split(','))
            .any(|item| item.trim() == "assistants=v2")
    {
        return Err(ApiError::invalid(
            "You must provide the 'OpenAI-Beta' header to access this API: 'OpenAI-Beta: assistants=v2'.",
        )
        .code("invalid_beta"));
    }
    Ok(())
}

/// The body of a request, parsed once.
enum Payload {
    Empty,
    Json(Value),
    Unreadable,
}

impl Payload {
    fn read(body: &[u8]) -> Self {
        if body.trim_ascii().is_empty() {
            return Self::Empty;
        }
        serde_json::from_slice(body).map_or(Self::Unreadable, Self::Json)
    }

    /// Returns the object; no body counts as `{}`.
    fn into_object(self) -> Result<Map<String, Value>, ApiError> {
        match self {
            Self::Empty => Ok(Map::new()),
            Self::Json(Value::Object(map)) => Ok(map),
            Self::Json(other) => Err(crate::simulator::wire::fields::wrong_type(
                "body",
                "an object",
                &other,
            )),
            Self::Unreadable => Err(ApiError::invalid(
                "The body of the request is not valid JSON.",
            )
            .code("invalid_json")),
        }
    }
}

fn recorded(
    parts: &Parts,
    body: &[u8],
    payload: &Payload,
    operation: Option<Operation>,
) -> Recorded {
    const SECRET: [&str; 4] = ["authorization", "api-key", "cookie", "proxy-authorization"];
    let headers = parts
        .headers
        .iter()
        .filter(|(name, _)| !SECRET.contains(&name.as_str()));
    let headers = headers.map(|(name, value)| {
        (
            name.as_str().to_owned(),
            String::from_utf8_lossy(value.as_bytes()).into_owned(),
        )
    });
    let body = match payload {
        Payload::Empty => Value::Null,
        _ if body.len() > MAX_RECORDED_BODY => Value::Null,
        Payload::Json(json) => json.clone(),
        Payload::Unreadable => String::from_utf8_lossy(body).into(),
    };
    Recorded {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().map(str::to_owned),
        headers: headers.collect(),
        body,
        operation: operation.map(|operation| operation.name().to_owned()),
    }
}

fn unknown_path(parts: &Parts) -> Response {
    ApiError::not_found(format!(
        "Invalid URL ({} {})",
        parts.method,
        parts.uri.path()
    ))
    .into_response()
}

/// Returns the 404 of a server without such an endpoint, in the shape of its framework.
fn bare_not_found() -> Response {
    let mut response = (
        StatusCode::NOT_FOUND,
        Body::from(r#"{"detail":"Not Found"}"#),
    )
        .into_response();
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
