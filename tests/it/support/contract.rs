//! Checks the gateway's answers against its own OpenAPI document.

use std::sync::LazyLock;

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::gateway::Event;
use super::openapi::Document;

static CONTRACT: LazyLock<Document> = LazyLock::new(|| {
    let mut document = threadkeeper::api::openapi();
    let mut operations = Map::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let mut operation = operation.clone();
            close(&mut operation["responses"]);
            if let Some(body) = operation.pointer("/requestBody/content/application~1json/schema") {
                operation["request"] = body.clone();
            }
            operations.insert(format!("{} {path}", method.to_uppercase()), operation);
        }
    }
    // `allOf` refers to these copies, which stay open: a closed part would refuse the fields of
    // the others.
    let open = document["components"]["schemas"].clone();
    for schema in document["components"]["schemas"]
        .as_object_mut()
        .unwrap()
        .values_mut()
    {
        close(schema);
    }
    for response in document["components"]["responses"]
        .as_object_mut()
        .unwrap()
        .values_mut()
    {
        close(response);
    }
    let components = document["components"].take();
    let root = json!({"operations": operations, "components": components, "open": open});
    Document::new(root, &["components", "open"])
});

/// Closes all objects of a schema. The document leaves them open, since a client may meet fields
/// that it does not know. In tests, a field that the document lacks is an error.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            let is_whole = fields.contains_key("properties") || fields.contains_key("allOf");
            if let Some(parts) = fields.get_mut("allOf").and_then(Value::as_array_mut) {
                for part in parts {
                    if let Some(name) = part["$ref"].as_str() {
                        part["$ref"] = name.replace("#/components/schemas/", "#/open/").into();
                    }
                }
            }
            for (name, field) in fields.iter_mut().filter(|(name, _)| *name != "allOf") {
                if name == "properties" {
                    field
                        .as_object_mut()
                        .into_iter()
                        .flatten()
                        .for_each(|(_, property)| close(property));
                } else {
                    close(field);
                }
            }
            if is_whole && !fields.contains_key("additionalProperties") {
                fields.insert("unevaluatedProperties".to_owned(), false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// Checks an answer.
///
/// # Panics
/// If the document does not describe the answer.
#[track_caller]
pub(crate) fn check(
    method: &Method,
    path: &str,
    status: StatusCode,
    headers: &HeaderMap,
    body: &str,
) {
    if let Err(error) = checked(method, path, status, headers, Some(body)) {
        panic!("{method} {path}: the answer breaks the OpenAPI document: {error}");
    }
}

/// Checks status and headers of an answer whose body has not arrived yet.
///
/// # Panics
/// If the document does not describe the answer.
#[track_caller]
pub(crate) fn check_head(method: &Method, path: &str, status: StatusCode, headers: &HeaderMap) {
    if let Err(error) = checked(method, path, status, headers, None) {
        panic!("{method} {path}: the answer breaks the OpenAPI document: {error}");
    }
}

/// Checks an event of a stream.
///
/// # Panics
/// If the document does not describe the event.
pub(crate) fn check_event(event: &Event) {
    if let Err(error) = checked_event(event) {
        panic!("an event breaks the OpenAPI document: {error}");
    }
}

/// Checks an event. The error says what is wrong with it.
pub(crate) fn checked_event(event: &Event) -> Result<(), String> {
    let mut whole = json!({"event": event.name, "data": event.data});
    if !event.id.is_empty() {
        whole["id"] = event.id.clone().into();
    }
    CONTRACT.check(
        "event",
        &json!({"$ref": "#/components/schemas/Event"}),
        &whole,
    )
}

/// Checks the body of a request to an operation. The error says what is wrong with it.
pub(crate) fn checked_request(method: &str, template: &str, body: &Value) -> Result<(), String> {
    let key = format!("{method} {template}");
    CONTRACT.check(
        &format!("{key} request"),
        &CONTRACT.operation(&key)?["request"],
        body,
    )
}

/// Checks an answer. The error says what is wrong with it.
pub(crate) fn checked(
    method: &Method,
    path: &str,
    status: StatusCode,
    headers: &HeaderMap,
    body: Option<&str>,
) -> Result<(), String> {
    let path = path.split('?').next().unwrap_or_default();
    let asked = if *method == Method::HEAD {
        &Method::GET
    } else {
        method
    };
    let response = if let Some(template) = CONTRACT.template(asked.as_str(), path) {
        let key = format!("{asked} {template}");
        let declared = CONTRACT.operation(&key)?["responses"].get(status.as_str());
        declared.ok_or_else(|| format!("{key} does not answer with {status}: {body:?}"))?
    } else {
        let methods = ["GET", "POST", "PATCH", "DELETE"];
        let is_there = methods
            .iter()
            .any(|method| CONTRACT.template(method, path).is_some());
        let wanted = if is_there {
            "405.open.method-not-allowed"
        } else {
            "404.open.not-found"
        };
        if !wanted.starts_with(status.as_str()) {
            return Err(format!("{status} instead of {wanted}"));
        }
        CONTRACT.component("responses", wanted)
    };
    let response = CONTRACT.resolved(response);
    check_headers(response, headers)?;
    check_caching(headers)?;
    let kind = headers
        .get("content-type")
        .map(|kind| kind.to_str().unwrap_or_default());
    let Some(kind) = kind else {
        let is_empty = body.is_none_or(str::is_empty);
        let may_be = response.get("content").is_none() || *method == Method::HEAD;
        return if is_empty && may_be {
            Ok(())
        } else {
            Err(format!("{status} without a type: {body:?}"))
        };
    };
    let essence = kind.split(';').next().unwrap_or_default();
    let Some(content) = response["content"].get(essence) else {
        return Err(format!("{status} as {kind}"));
    };
    let (schema, what) = (&content["schema"], content["schema"].to_string());
    let Some(body) = body.filter(|_| *method != Method::HEAD) else {
        return Ok(());
    };
    match essence {
        "application/x-ndjson" => body
            .lines()
            .try_for_each(|line| CONTRACT.check(&what, schema, &json(line)?)),
        "text/event-stream" => Ok(()),
        kind if kind.ends_with("json") => CONTRACT.check(&what, schema, &json(body)?),
        _ => CONTRACT.check(&what, schema, &body.into()),
    }
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("no JSON ({error}): {text}"))
}

/// Checks that no cache stores the answer, and that no proxy buffers a stream.
fn check_caching(headers: &HeaderMap) -> Result<(), String> {
    let values = |name: &str| -> Vec<_> {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect()
    };
    let is_stream = values("content-type") == ["text/event-stream"];
    let wanted = if is_stream {
        ["no-store, no-transform"]
    } else {
        ["no-store"]
    };
    let (caching, buffering) = (values("cache-control"), values("x-accel-buffering"));
    if caching != wanted || is_stream != (buffering == ["no"]) {
        return Err(format!(
            "cache-control {caching:?}, x-accel-buffering {buffering:?}"
        ));
    }
    Ok(())
}

/// Checks that all required headers are there, and that the response declares each header that
/// the gateway adds.
fn check_headers(response: &Value, headers: &HeaderMap) -> Result<(), String> {
    let declared = &response["headers"];
    for name in CONTRACT.names_of("headers") {
        let value = headers
            .get(name)
            .map(|value| value.to_str().unwrap_or_default());
        match (
            declared.get(name).map(|header| CONTRACT.resolved(header)),
            value,
        ) {
            (None, Some(value)) => {
                return Err(format!("the header {name} ({value}) is not declared"));
            }
            (Some(header), None) if header["required"] == true => {
                return Err(format!("no header {name}"));
            }
            (_, None) => {}
            (Some(header), Some(value)) => {
                CONTRACT.check(
                    &header["schema"].to_string(),
                    &header["schema"],
                    &value.into(),
                )?;
            }
        }
    }
    Ok(())
}
