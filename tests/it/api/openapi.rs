//! The gateway's own OpenAPI document.

use std::collections::BTreeSet;

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use threadkeeper::api::{openapi, routes};

use crate::support::contract;
use crate::support::scene::{Backend, Protocol, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn openapi_document_needs_no_authentication() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[auth.keys.one]\nkey = \"the-key-of-the-only-tenant\"\nscope = \"read\"\n")
        .await;
    let answer = gateway.get("/openapi.json").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.ok(), openapi());
}

#[test]
fn openapi_document_describes_exactly_served_routes() {
    let there: BTreeSet<_> = routes()
        .iter()
        .map(|route| (route.path.clone(), route.method.as_str().to_lowercase()))
        .collect();
    let described: BTreeSet<_> = operations(&openapi())
        .into_iter()
        .map(|(path, method, _)| (path, method))
        .collect();
    assert_eq!(there, described);
}

#[test]
fn every_reference_resolves() {
    let document = openapi();
    let mut found = 0;
    walk(&document, &mut |value| {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            let place = reference
                .strip_prefix('#')
                .unwrap_or_else(|| panic!("{reference}"));
            assert!(
                document.pointer(place).is_some(),
                "{reference} has no target"
            );
            found += 1;
        }
    });
    assert!(found > 100, "{found}");
}

/// The schemas must be JSON Schema 2020-12, which OpenAPI 3.1 uses.
#[test]
fn every_schema_is_valid_json_schema() {
    let document = openapi();
    let mut schemas: Vec<Value> = document["components"]["schemas"]
        .as_object()
        .unwrap()
        .values()
        .cloned()
        .collect();
    walk(&document, &mut |value| {
        // Schemas of parameters, headers and contents.
        if let Some(schema) = value
            .get("schema")
            .filter(|_| value.get("properties").is_none())
        {
            schemas.push(schema.clone());
        }
    });
    assert!(schemas.len() > 200, "{}", schemas.len());
    for schema in schemas {
        jsonschema::meta::validate(&schema).unwrap_or_else(|error| panic!("{error}: {schema:#}"));
        let whole = json!({"components": document["components"], "allOf": [schema]});
        jsonschema::draft202012::new(&whole).unwrap_or_else(|error| panic!("{error}: {schema:#}"));
    }
}

#[test]
fn operations_are_complete_and_consistent() {
    let document = openapi();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let tags: Vec<_> = document["tags"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tag| &tag["name"])
        .collect();
    let schemes = document["components"]["securitySchemes"]
        .as_object()
        .unwrap();
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let what = format!("{method} {path}");
        let id = operation["operationId"].as_str().unwrap();
        assert!(
            ids.insert(id.to_owned()),
            "{what}: another operation has the id {id}, too"
        );
        assert!(
            operation["summary"]
                .as_str()
                .is_some_and(|text| text.ends_with('.')),
            "{what}"
        );
        assert!(
            operation["tags"]
                .as_array()
                .unwrap()
                .iter()
                .all(|tag| tags.contains(&tag)),
            "{what}"
        );
        for requirement in operation["security"].as_array().unwrap() {
            assert!(
                requirement
                    .as_object()
                    .unwrap()
                    .keys()
                    .all(|name| schemes.contains_key(name)),
                "{what}"
            );
        }
        let (mut in_path, mut others) = (BTreeSet::new(), BTreeSet::new());
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let name = parameter["name"].as_str().unwrap();
            assert!(
                parameter["schema"].is_object(),
                "{what}: {name} has no schema"
            );
            let all = if parameter["in"] == "path" {
                &mut in_path
            } else {
                &mut others
            };
            assert!(all.insert(name), "{what}: {name} twice");
        }
        let wanted: BTreeSet<_> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .collect();
        assert_eq!(in_path, wanted, "{what}");
        let responses = operation["responses"].as_object().unwrap();
        assert!(
            responses.keys().any(|status| status.starts_with('2')),
            "{what}"
        );
        for (status, response) in responses {
            let response = resolved(&document, response);
            assert!(
                response["description"]
                    .as_str()
                    .is_some_and(|it| !it.is_empty()),
                "{what} {status}"
            );
            assert!(
                response["headers"]["x-request-id"].is_object(),
                "{what} {status}"
            );
            let is_problem = response["content"]
                .get("application/problem+json")
                .is_some();
            assert_eq!(is_problem, status.as_str() >= "400", "{what} {status}");
        }
    }
}

/// All other tests rely on this check.
#[test]
fn undocumented_answers_are_detected() {
    let only = |lines: &[(&'static str, &str)]| {
        lines
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect::<HeaderMap>()
    };
    let headers =
        |lines: &[(&'static str, &str)]| only(&[lines, &[("cache-control", "no-store")]].concat());
    let kept = only(&[("x-request-id", "1"), ("content-type", "application/json")]);
    let good = headers(&[("x-request-id", "1"), ("content-type", "application/json")]);
    let bare = headers(&[("content-type", "application/json")]);
    let more = headers(&[
        ("x-request-id", "1"),
        ("content-type", "application/json"),
        ("location", "/elsewhere"),
    ]);
    let html = headers(&[("x-request-id", "1"), ("content-type", "text/html")]);
    let (ok, ready) = (StatusCode::OK, r#"{"status":"ok"}"#);
    let told = |status, headers: &HeaderMap, body: &str| {
        contract::checked(&Method::GET, "/healthz", status, headers, Some(body)).is_ok()
    };
    assert!(told(ok, &good, ready));
    assert!(!told(ok, &good, r#"{"status":"ok","more":1}"#), "a field");
    assert!(!told(ok, &good, r#"{"status":"fine"}"#), "a value");
    assert!(!told(ok, &good, "ok"), "no JSON");
    assert!(!told(ok, &bare, ready), "the answer lacks an id");
    assert!(!told(ok, &kept, ready), "a cache could store the answer");
    assert!(!told(ok, &more, ready), "a header");
    assert!(!told(ok, &html, ready), "a type");
    assert!(!told(StatusCode::CREATED, &good, ready), "a status");
}

/// Returns every operation with its path and its method.
fn operations(document: &Value) -> Vec<(String, String, &Value)> {
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            all.push((path.clone(), method.clone(), operation));
        }
    }
    all
}

fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let place = value["$ref"]
        .as_str()
        .and_then(|reference| reference.strip_prefix('#'));
    place.map_or(value, |place| document.pointer(place).unwrap())
}

fn walk(value: &Value, visit: &mut impl FnMut(&Value)) {
    visit(value);
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, visit)),
        Value::Object(fields) => fields.values().for_each(|field| walk(field, visit)),
        _ => {}
    }
}
