//! Builds `/openapi.json` from the description of each handler and from what is true of every route.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::header::{ALLOW, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, Method, StatusCode};
use serde_json::{Map, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::schema::Schema;
use utoipa::{IntoParams, PartialSchema, ToSchema};

use super::extract::PageQuery;
use super::keys::{self, Place};
use super::limits::{LIMIT, POLICY};
use super::prefer::{PREFER, PREFERENCE_APPLIED, REPLAYED};
use super::problem::{
    Document as Problem, FORBIDDEN, IDEMPOTENCY_MISMATCH, INTERNAL, INVALID_REQUEST,
    ISSUER_UNAVAILABLE, Kind, METHOD_NOT_ALLOWED, NOT_FOUND, OVERLOADED, PAYLOAD_TOO_LARGE,
    RATE_LIMITED, REPLICA_LOST, REQUEST_TIMEOUT, STORE_UNAVAILABLE, UNAUTHENTICATED, UNPROCESSABLE,
    UNSUPPORTED_MEDIA_TYPE,
};
use super::request_log::REQUEST_ID;
use super::views::ListView;
use crate::domain::{Access, DeletionId, KeyText, RunId, SessionKey, ThreadId, TopicKey, UserKey};

pub(super) fn show_doc() -> Doc {
    Doc::new("health", "openapi", "Shows this document.").gives_as(
        StatusCode::OK,
        "application/json",
        &json!({"type": "object"}),
        "The document, OpenAPI 3.1.",
    )
}

const ABOUT: &str = "An HTTP gateway that keeps chatbot conversations: one thread for each key, one run at a time.

A conversation belongs to a user, to a session of a user, or to a topic of a user. All three have the \
same resources. Keys in paths are percent-encoded and compared byte for byte.

A gateway that has neither API keys nor a token issuer in its configuration asks for no credentials.

Every error is a problem document (RFC 9457). An unknown path gets a 404 `not-found`. A method that a \
path does not take gets a 405 `method-not-allowed` with the header `allow`. `HEAD` works wherever `GET` \
does. `OPTIONS` works if pages of other origins may call. A request head that is not HTTP, that is too \
large, or that has not exactly one `Host`, gets a bare 400 or 431.";

/// Groups of operations.
const TAGS: [(&str, &str); 7] = [
    ("messages", "Post a message, and read the transcript."),
    (
        "runs",
        "A run is a message and its reply: events, function calls, cancellation.",
    ),
    (
        "threads",
        "The thread of a conversation: show, change, delete, roll over.",
    ),
    ("users", "All data of a user: list, export, delete."),
    ("deletions", "Receipts of deletions."),
    (
        "operators",
        "For operators: threads of all users, and the janitor.",
    ),
    ("health", "For load balancers, and this document."),
];

/// Returns the document about these routes.
pub(super) fn document<'a>(routes: impl IntoIterator<Item = &'a (Route, fn() -> Doc)>) -> Value {
    let mut document = Document::default();
    for (route, doc) in routes {
        document.add(route, doc());
    }
    document.finish()
}

type Schemas = BTreeMap<String, Value>;

/// A route, and the access that it needs. `None`: it is open to everybody.
#[derive(Clone, Debug)]
pub struct Route {
    pub method: Method,
    pub path: String,
    pub needs: Option<Access>,
}

/// The description of one handler: what it takes and gives. A handler may have several routes.
#[derive(Debug)]
pub(super) struct Doc {
    tag: &'static str,
    id: &'static str,
    summary: &'static str,
    about: Option<&'static str>,
    parameters: Vec<Value>,
    body: Option<Value>,
    answers: BTreeMap<u16, Value>,
    kinds: Vec<Kind>,
    schemas: Schemas,
}

impl Doc {
    /// Begins a description. `id` becomes the operation's id, after the kind of conversation.
    pub(super) fn new(tag: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self {
            tag,
            id,
            summary,
            about: None,
            parameters: Vec::new(),
            body: None,
            answers: BTreeMap::new(),
            kinds: Vec::new(),
            schemas: Schemas::new(),
        }
    }

    /// Adds details that the summary lacks.
    pub(super) fn about(mut self, about: &'static str) -> Self {
        self.about = Some(about);
        self
    }

    /// Adds the parameters that the query may have.
    pub(super) fn query<Q: IntoParams>(mut self) -> Self {
        self.parameters
            .extend(
                Q::into_params(|| Some(ParameterIn::Query))
                    .iter()
                    .map(|parameter| {
                        let mut parameter = value(parameter);
                        never_null(&mut parameter["schema"]);
                        parameter
                    }),
            );
        self
    }

    /// Returns the names of the parameters that the query may have.
    pub(super) fn query_names(self) -> Vec<String> {
        let names = self
            .parameters
            .iter()
            .filter(|parameter| parameter["in"] == "query");
        names
            .filter_map(|parameter| parameter["name"].as_str())
            .map(str::to_owned)
            .collect()
    }

    /// Adds the parameters that choose a page of a list.
    pub(super) fn page<Id: ToSchema>(self) -> Self {
        let cursor = value(&Id::schema());
        let mut doc = self.query::<PageQuery>().refuses(&[UNPROCESSABLE]);
        for parameter in &mut doc.parameters {
            if ["after", "before"]
                .iter()
                .any(|name| parameter["name"] == *name)
            {
                parameter["schema"] = cursor.clone();
            }
        }
        doc
    }

    /// Adds the parameters that choose a page of a list with one direction.
    pub(super) fn page_after<Id: ToSchema>(self) -> Self {
        let mut doc = self.page::<Id>();
        doc.parameters
            .retain(|parameter| parameter["name"] != "before");
        doc
    }

    /// Adds a header that the request may have.
    pub(super) fn header(mut self, name: &HeaderName, schema: &Value, about: &str) -> Self {
        self.parameters.push(
            json!({"name": name.as_str(), "in": "header", "required": false, "description": about, "schema": schema}),
        );
        self
    }

    /// Adds the header `prefer`.
    pub(super) fn prefer(self) -> Self {
        let about = "How long to wait for the end (RFC 7240): `respond-async` or `wait=<seconds>`. Other \
                     preferences are ignored.";
        self.header(&PREFER, &json!({"type": "string"}), about)
    }

    /// Adds the header `idempotency-key` and its error.
    pub(super) fn idempotent(self) -> Self {
        let schema =
            json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"});
        let about = "A name for this request. A repeat with the same key gets the run of the first request.";
        self.header(&HeaderName::from_static("idempotency-key"), &schema, about)
            .refuses(&[IDEMPOTENCY_MISMATCH])
    }

    /// Adds a JSON object as the body.
    pub(super) fn body<B: ToSchema>(self) -> Self {
        self.takes::<B>(true)
    }

    /// Adds a JSON object as the body, which may be absent.
    pub(super) fn optional_body<B: ToSchema>(self) -> Self {
        self.takes::<B>(false)
    }

    fn takes<B: ToSchema>(mut self, required: bool) -> Self {
        let schema = self.schema::<B>();
        self.body = Some(
            json!({"required": required, "content": {"application/json": {"schema": schema}}}),
        );
        self.refuses(&[
            UNPROCESSABLE,
            REQUEST_TIMEOUT,
            PAYLOAD_TOO_LARGE,
            UNSUPPORTED_MEDIA_TYPE,
            OVERLOADED,
        ])
    }

    /// Adds an answer in JSON.
    pub(super) fn gives<A: ToSchema>(mut self, status: StatusCode, about: &str) -> Self {
        let schema = self.schema::<A>();
        self.gives_as(status, "application/json", &schema, about)
    }

    /// Adds an answer in JSON that has one of two shapes.
    pub(super) fn gives_one_of<A: ToSchema, B: ToSchema>(
        mut self,
        status: StatusCode,
        about: &str,
    ) -> Self {
        let schema = json!({"oneOf": [self.schema::<A>(), self.schema::<B>()]});
        self.gives_as(status, "application/json", &schema, about)
    }

    /// Adds an answer that is a list.
    pub(super) fn lists<A: ToSchema>(mut self, about: &str) -> Self {
        let item = self.schema::<A>();
        let name = format!("{}_{}", ListView::<A>::name(), A::name());
        let mut list = value(&ListView::<A>::schema());
        list["properties"]["data"]["items"] = item;
        self.schemas.insert(name.clone(), list);
        self.gives_as(
            StatusCode::OK,
            "application/json",
            &reference("schemas", &name),
            about,
        )
    }

    /// Adds an answer that is a stream. The schema describes one line or event of it.
    pub(super) fn streams<A: ToSchema>(mut self, content_type: &str, about: &str) -> Self {
        let schema = self.schema::<A>();
        self.gives_as(StatusCode::OK, content_type, &schema, about)
    }

    /// Adds an answer with this content type. Several answers of one status are alternatives.
    pub(super) fn gives_as(
        mut self,
        status: StatusCode,
        content_type: &str,
        schema: &Value,
        about: &str,
    ) -> Self {
        let answer = self
            .answers
            .entry(status.as_u16())
            .or_insert_with(|| json!({"headers": {}}));
        let before = answer["description"]
            .as_str()
            .map(|before| format!("{before} "))
            .unwrap_or_default();
        answer["description"] = format!("{before}{about}").into();
        answer["content"][content_type] = json!({"schema": schema});
        self
    }

    /// Adds an answer without a body.
    pub(super) fn gives_nothing(mut self, status: StatusCode, about: &str) -> Self {
        self.answers.insert(
            status.as_u16(),
            json!({"headers": {}, "description": about}),
        );
        self
    }

    /// Adds headers to an answer, besides those of all answers.
    pub(super) fn with(mut self, status: StatusCode, headers: &[&HeaderName]) -> Self {
        for header in headers {
            let headers = &mut self.answers.entry(status.as_u16()).or_default()["headers"];
            headers[header.as_str()] = reference("headers", header.as_str());
        }
        self
    }

    /// Adds a header that only some of these answers have.
    pub(super) fn with_some(mut self, status: StatusCode, header: &HeaderName) -> Self {
        let reference = reference("headers", &format!("{header}{IF_ANY}"));
        self.answers.entry(status.as_u16()).or_default()["headers"][header.as_str()] = reference;
        self
    }

    /// Adds problems, besides those of all routes.
    pub(super) fn refuses(mut self, kinds: &[Kind]) -> Self {
        self.kinds.extend(kinds);
        self
    }

    /// Adds the schema of a type, and returns a reference to it.
    fn schema<T: ToSchema>(&mut self) -> Value {
        let mut schemas = Vec::<(String, RefOr<Schema>)>::new();
        T::schemas(&mut schemas);
        schemas.push((T::name().into_owned(), T::schema()));
        self.schemas.extend(
            schemas
                .into_iter()
                .map(|(name, schema)| (name, value(&schema))),
        );
        reference("schemas", &T::name())
    }
}

/// The document while routes are added.
#[derive(Debug, Default)]
pub(super) struct Document {
    paths: Map<String, Value>,
    schemas: Schemas,
    responses: BTreeMap<String, Value>,
}

impl Document {
    /// Adds a route, from its handler's description and from the route itself.
    pub(super) fn add(&mut self, route: &Route, doc: Doc) {
        let mut parameters: Vec<Value> = names(&route.path).map(path_parameter).collect();
        parameters.extend(key_headers(Place::of(&route.path)));
        parameters.extend(doc.parameters);
        let mut kinds = doc.kinds;
        let replays = kinds.contains(&IDEMPOTENCY_MISMATCH);
        kinds.push(INTERNAL);
        if route.needs.is_some() {
            kinds.extend([
                INVALID_REQUEST,
                UNAUTHENTICATED,
                FORBIDDEN,
                RATE_LIMITED,
                ISSUER_UNAVAILABLE,
                STORE_UNAVAILABLE,
            ]);
        }
        let mut answers = Map::new();
        for (status, mut answer) in doc.answers {
            answer["headers"][REQUEST_ID.as_str()] = reference("headers", REQUEST_ID.as_str());
            if route.needs.is_some() {
                for limit in [LIMIT, POLICY] {
                    answer["headers"][limit.as_str()] = reference("headers", limit.as_str());
                }
            }
            answers.insert(status.to_string(), answer);
        }
        let statuses = kinds
            .iter()
            .map(|kind| kind.status.as_u16())
            .collect::<BTreeSet<_>>();
        for status in statuses {
            let of_status = kinds.iter().filter(|kind| kind.status.as_u16() == status);
            let of_status = of_status
                .map(|kind| (kind.name, *kind))
                .collect::<BTreeMap<_, _>>();
            let refusal = self.refusal(status, of_status.values(), route.needs.is_some(), replays);
            answers.insert(status.to_string(), refusal);
        }
        let mut operation = json!({
            "tags": [doc.tag],
            "summary": doc.summary,
            "operationId": operation_id(&route.path, doc.id),
            "responses": answers,
            "security": security(route.needs),
        });
        let further = [
            ("description", doc.about.map(Value::from)),
            (
                "parameters",
                Some(parameters.into()).filter(|it: &Value| it != &json!([])),
            ),
            ("requestBody", doc.body),
        ];
        for (name, it) in further {
            if let Some(it) = it {
                operation[name] = it;
            }
        }
        for (name, schema) in doc.schemas {
            let known = self.schemas.entry(name).or_insert_with(|| schema.clone());
            debug_assert_eq!(*known, schema, "two types have one name");
        }
        let path = self
            .paths
            .entry(route.path.clone())
            .or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation;
    }

    /// Returns a reference to the problems of one status. Equal sets are in the document once.
    fn refusal<'a>(
        &mut self,
        status: u16,
        kinds: impl Iterator<Item = &'a Kind> + Clone,
        guarded: bool,
        replays: bool,
    ) -> Value {
        let names = kinds.clone().map(|kind| kind.name).collect::<Vec<_>>();
        let mut headers = vec![REQUEST_ID];
        headers.extend([LIMIT, POLICY].into_iter().filter(|_| guarded));
        // Statuses of a failed run. A repeated request gets them again, with this header.
        let replays = replays && matches!(status, 404 | 409 | 500 | 502..=504);
        headers.extend(replays.then_some(REPLAYED));
        let open = if guarded { "" } else { ".open" };
        let repeated = if replays { ".repeated" } else { "" };
        let name = format!("{status}{open}{repeated}.{}", names.join("."));
        match status {
            405 => headers.push(ALLOW),
            401 => headers.push(WWW_AUTHENTICATE),
            403 if guarded => headers.push(WWW_AUTHENTICATE),
            409 | 421 | 429 | 502..=504 => headers.push(RETRY_AFTER),
            _ => {}
        }
        // With other statuses, the header depends on the error. With 503, it does where the answer may
        // tell of a run that is on record: to send that request again would not help.
        let tells_pause = match status {
            429 => true,
            503 => kinds.clone().all(|kind| kind.name != REPLICA_LOST.name),
            _ => false,
        };
        let headers = headers.iter().map(|it| {
            let header = if *it == RETRY_AFTER && tells_pause {
                RETRY_AFTER_ALWAYS
            } else if *it == WWW_AUTHENTICATE && status == 403 {
                SCOPE_CHALLENGE
            } else {
                it.as_str()
            };
            (it.as_str().to_owned(), reference("headers", header))
        });
        let urns = kinds.clone().map(|kind| kind.urn()).collect::<Vec<_>>();
        let about = kinds
            .map(|kind| format!("`{}`: {}", kind.name, kind.when))
            .collect::<Vec<_>>();
        let answer = json!({
            "description": about.join(" "),
            "headers": headers.collect::<Map<_, _>>(),
            "content": {"application/problem+json": {"schema": {
                "allOf": [reference("schemas", &Problem::name())],
                "properties": {"type": {"enum": urns}, "status": {"const": status}},
            }}},
        });
        self.responses.insert(name.clone(), answer);
        reference("responses", &name)
    }

    fn finish(mut self) -> Value {
        // These belong to no operation: they answer unknown paths and methods.
        for kind in [NOT_FOUND, METHOD_NOT_ALLOWED] {
            self.refusal(kind.status.as_u16(), [kind].iter(), false, false);
        }
        let mut problem = Doc::new("", "", "");
        problem.schema::<Problem<'_>>();
        self.schemas.extend(problem.schemas);
        let tags = TAGS.map(|(name, about)| json!({"name": name, "description": about}));
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Threadkeeper",
                "version": env!("CARGO_PKG_VERSION"),
                "description": ABOUT,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "tags": tags,
            "paths": self.paths,
            "components": {
                "schemas": self.schemas,
                "responses": self.responses,
                "headers": headers(),
                "securitySchemes": {
                    "key": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "An API key of the gateway. The scopes, in order: `read`, `chat`, \
                                        `admin`, `operator`. Each opens its own calls and those of the \
                                        scopes before it.",
                    },
                    "token": {
                        "type": "http",
                        "scheme": "bearer",
                        "bearerFormat": "JWT",
                        "description": "A token of the configured issuer. It has the scope `chat` for the \
                                        user in its `sub`. A token of an admin has the scope `admin`.",
                    },
                },
            },
        })
    }
}

/// Returns a unique name of a route: the kind of conversation, if it has one, and the handler's name.
fn operation_id(path: &str, id: &str) -> String {
    let kinds = [("session_", "/sessions/{"), ("topic_", "/topics/{")];
    let kind = match Place::of(path) {
        Place::Conversation | Place::User => "header_",
        _ => kinds
            .iter()
            .find(|(_, part)| path.contains(part))
            .map_or("", |(kind, _)| kind),
    };
    format!("{kind}{id}")
}

/// Returns the credentials that open a route: a key of that scope, or a token if tokens can open it.
fn security(needs: Option<Access>) -> Value {
    match needs {
        None => json!([]),
        Some(Access::Operator) => json!([{"key": [Access::Operator]}]),
        Some(needs) => json!([{"key": [needs]}, {"token": [needs]}]),
    }
}

/// Returns the placeholders of a path template.
fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

/// Returns the description of a placeholder. An unknown one gets the schema `false`, which a test refuses.
fn path_parameter(name: &str) -> Value {
    let (schema, about) = match name {
        "user" => (
            UserKey::schema(),
            "Your id of a user: 1 to 256 bytes of UTF-8.",
        ),
        "session" => (SessionKey::schema(), "Your id of a session of the user."),
        "topic" => (TopicKey::schema(), "Your name of a topic of the user."),
        "run" => (RunId::schema(), "The id of a run."),
        "thread" => (ThreadId::schema(), "The id of a thread."),
        "deletion" => (DeletionId::schema(), "The id of a deletion."),
        _ => return json!({"name": name, "in": "path", "required": true, "schema": false}),
    };
    json!({"name": name, "in": "path", "required": true, "description": about, "schema": value(&schema)})
}

/// Returns the headers with the keys, for a route that has none in its path.
fn key_headers(place: Place) -> Vec<Value> {
    let all = [
        (keys::USER, true, "Your id of a user."),
        (
            keys::SESSION,
            false,
            "Your id of a session of the user. Not together with a topic.",
        ),
        (
            keys::TOPIC,
            false,
            "Your name of a topic of the user. Not together with a session.",
        ),
    ];
    let count = match place {
        Place::Nowhere | Place::Path => 0,
        Place::User => 1,
        Place::Conversation => 3,
    };
    // Each byte of a key may be percent-encoded.
    let schema = json!({
        "type": "string",
        "minLength": 1,
        "maxLength": 3 * KeyText::MAX_BYTES,
        "pattern": r"^(?!(\.|%2[Ee]){1,2}$)([!-$&-+\--~]|%[0-9A-Fa-f]{2})+$",
    });
    let of = |(name, required, about): (HeaderName, bool, &str)| {
        let about =
            format!("{about} 1 to 256 bytes of UTF-8, percent-encoded as by `encodeURIComponent`.");
        json!({"name": name.as_str(), "in": "header", "required": required, "description": about, "schema": schema})
    };
    all.into_iter().take(count).map(of).collect()
}

/// Returns the headers of answers. `retry-after` has two entries: some answers always have it, others
/// sometimes.
fn headers() -> Value {
    let text = || json!({"type": "string"});
    let seconds = || json!({"type": "string", "pattern": "^[1-9][0-9]*$"});
    let mut all = Map::new();
    let mut add = |name: &str, required: bool, schema: Value, about: &str| {
        let header = json!({"required": required, "schema": schema, "description": about});
        all.insert(name.to_owned(), header);
    };
    add(
        REQUEST_ID.as_str(),
        true,
        text(),
        "The id of the request: the one that the caller sent, if it was usable, or a new one.",
    );
    add(LOCATION.as_str(), true, text(), "The path of the result.");
    let receipt = "The path of the receipt. Absent after a `dry_run`.";
    add(&format!("{LOCATION}{IF_ANY}"), false, text(), receipt);
    add(
        PREFERENCE_APPLIED.as_str(),
        false,
        text(),
        "The preference that the gateway followed.",
    );
    let replayed = "Present if the run belongs to an earlier request with this `Idempotency-Key`.";
    add(REPLAYED.as_str(), false, json!({"const": "true"}), replayed);
    add(
        RETRY_AFTER.as_str(),
        false,
        seconds(),
        "Seconds after which to send the request again. Absent if that would not help.",
    );
    add(
        RETRY_AFTER_ALWAYS,
        true,
        seconds(),
        "Seconds after which to send the request again.",
    );
    let challenge = json!({
        "type": "string",
        "pattern": "^Bearer( error=\"invalid_token\", error_description=\"[^\"]+\")?$",
    });
    let about = "The scheme of credentials that the gateway takes. With an `error` (RFC 6750) if it \
                 refuses the key or token of the request.";
    add(WWW_AUTHENTICATE.as_str(), true, challenge, about);
    let scope = json!({"type": "string", "pattern": "^Bearer error=\"insufficient_scope\", scope=\"[a-z]+\"$"});
    add(
        SCOPE_CHALLENGE,
        false,
        scope,
        "The scope that the request needs, if the key or token lacks it (RFC 6750).",
    );
    add(
        ALLOW.as_str(),
        true,
        text(),
        "The methods that the path takes.",
    );
    add(
        LIMIT.as_str(),
        false,
        text(),
        "The remaining requests of each limit. Absent without limits.",
    );
    add(
        POLICY.as_str(),
        false,
        text(),
        "The limits. Absent without limits.",
    );
    all.into()
}

const RETRY_AFTER_ALWAYS: &str = "retry-after-always";
const SCOPE_CHALLENGE: &str = "www-authenticate-scope";
/// Suffix of the name of a header that only some answers have.
const IF_ANY: &str = "-if-any";

/// Removes `null` from the schema of a query parameter: an absent parameter is not `null`.
fn never_null(schema: &mut Value) {
    for (word, is_null) in [("type", json!("null")), ("oneOf", json!({"type": "null"}))] {
        let Some(kinds) = schema.get_mut(word).and_then(Value::as_array_mut) else {
            continue;
        };
        kinds.retain(|kind| *kind != is_null);
        match kinds.as_slice() {
            [only] if word == "type" => schema[word] = only.clone(),
            [only] => *schema = only.clone(),
            _ => {}
        }
    }
}

fn reference(kind: &str, name: &str) -> Value {
    json!({"$ref": format!("#/components/{kind}/{name}")})
}

fn value(of: &impl serde::Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_default()
}
