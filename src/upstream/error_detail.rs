//! Reads an error in any of the known forms: from the body of an answer, from an event, or from
//! inside a run or response. Pure.

use serde_json::{Map, Value};

/// Levels of nesting that are read.
const MAX_DEPTH: usize = 8;
/// Layers of one error that are kept.
const MAX_LAYERS: usize = 16;
/// Places in a text at which a JSON object may begin that are tried.
const MAX_TRIES: usize = 4;
/// The fields that hold an error's prose, the most telling first.
const MESSAGE_FIELDS: [&str; 6] = [
    "message",
    "msg",
    "error",
    "detail",
    "error_description",
    "title",
];
/// The fields in which a further error may stand.
const NESTED_FIELDS: [&str; 8] = [
    "error",
    "errors",
    "detail",
    "details",
    "message",
    "innererror",
    "cause",
    "raw",
];
/// The only fields of an error object that stands without a wrapper.
const LONE_ERROR_FIELDS: [&str; 8] = [
    "message", "detail", "code", "type", "param", "status", "object", "title",
];

/// The details of an error.
///
/// A relay wraps the error of the server behind it into its own. Each of them is a [`Layer`],
/// the outermost first.
#[derive(Clone, Debug, Default)]
pub(super) struct ErrorDetail {
    pub(super) layers: Vec<Layer>,
    /// All prose and codes in lower case, a line for each.
    prose: String,
}

/// One error of a server.
#[derive(Clone, Debug, Default)]
pub(super) struct Layer {
    /// The code as the server wrote it. Some servers write a sentence.
    code: Option<String>,
    kind: Option<String>,
    /// The field of the request that the error is about.
    param: Option<String>,
    /// The server's prose. It serves to tell cases apart and is never passed on.
    pub(super) message: String,
    /// The error is an object as the protocols describe it, not an error page or a framework's
    /// own shape.
    pub(super) shaped: bool,
    /// The error stands inside the prose of another one, so a relay quotes it.
    quoted: bool,
    /// The HTTP status that the error itself names.
    status: Option<u16>,
}

/// Where a value stands in an error.
#[derive(Clone, Copy)]
struct Place {
    depth: usize,
    /// Inside a field that holds an error.
    is_inner: bool,
    quoted: bool,
}

impl ErrorDetail {
    /// Reads the body of an answer. A text that is no JSON is prose, and a page of HTML says
    /// nothing.
    pub(super) fn from_body(body: &[u8]) -> Self {
        if let Ok(value) = serde_json::from_slice(body) {
            return Self::from_value(&value);
        }
        let text = std::str::from_utf8(body).unwrap_or_default().trim();
        if text.is_empty() || text.starts_with('<') {
            return Self::default();
        }
        Self::from_value(&Value::from(text))
    }

    /// Reads `{"error": {…}}`, the bare `{"message": …, "type": …}`, and their relatives.
    pub(super) fn from_object(object: &Map<String, Value>) -> Self {
        let mut layers = Vec::new();
        read_object(object, Place::OUTSIDE, &mut layers);
        Self::new(layers)
    }

    fn from_value(value: &Value) -> Self {
        let mut layers = Vec::new();
        read(value, Place::OUTSIDE, &mut layers);
        Self::new(layers)
    }

    fn new(layers: Vec<Layer>) -> Self {
        let mut prose = String::new();
        for layer in &layers {
            for text in layer.code.iter().chain([&layer.message]) {
                prose.push_str(&text.to_lowercase().replace('’', "'"));
                prose.push('\n');
            }
        }
        Self { layers, prose }
    }

    /// Reads an event that does not belong to the protocol. Returns `None` if it is no error.
    ///
    /// A proxy, or a server that fails before it speaks the protocol, writes its errors so. An
    /// event with another `name` (a server's `status`, `ping` or `progress`) counts as an error
    /// only if it cannot be anything else.
    pub(super) fn of_event(name: Option<&str>, data: &str) -> Option<Self> {
        let object = match serde_json::from_str(data).ok()? {
            Value::Object(object) => object,
            // Gemini puts the object into an array.
            Value::Array(mut values) if values.len() == 1 => match values.pop()? {
                Value::Object(object) => object,
                _ => return None,
            },
            _ => return None,
        };
        let is_named = name.is_some_and(|name| {
            !name.is_empty() && name != "message" && !name.to_ascii_lowercase().contains("error")
        });
        let is_all = || {
            object
                .keys()
                .all(|key| key == "error" || LONE_ERROR_FIELDS.contains(&key.as_str()))
        };
        let is_error = match object.get("error") {
            Some(Value::Object(_)) => !is_named || is_all(),
            Some(Value::String(text)) => !text.is_empty() && (!is_named || is_all()),
            _ => stands_alone(&object) && (!is_named || is_called_error(&object)),
        };
        is_error.then(|| Self::from_object(&object))
    }

    /// Returns the code of the error, if [`token`] lets it pass. A number says less than a name.
    pub(super) fn code(&self) -> Option<String> {
        let codes = || {
            self.layers
                .iter()
                .filter_map(|layer| token(layer.code.as_deref()?))
        };
        codes()
            .find(|code| !is_number(code))
            .or_else(|| codes().next())
    }

    /// Returns the code, or else the type of the error, if [`token`] lets it pass.
    pub(super) fn word(&self) -> Option<String> {
        let code = self.code();
        let kinds = self.layers.iter().map(|layer| layer.kind.as_deref());
        match code {
            Some(code) if !is_number(&code) => Some(code),
            number => kinds.flatten().find_map(token).or(number),
        }
    }

    /// Returns the HTTP status that the outermost error names.
    pub(super) fn status(&self) -> Option<u16> {
        self.layers.iter().find_map(|layer| layer.status)
    }

    /// Returns the statuses that a relay quotes from the answer of the server behind it.
    pub(super) fn quoted_statuses(&self) -> impl Iterator<Item = u16> {
        let told = self.layers.iter().filter(|layer| layer.quoted);
        told.filter_map(|layer| layer.status)
            .chain(self.layers.iter().filter_map(Layer::status_in_prose))
    }

    /// Returns true if the prose has one of these phrases, which are in lower case.
    pub(super) fn says(&self, phrases: &[&str]) -> bool {
        phrases.iter().any(|phrase| self.prose.contains(phrase))
    }

    /// Returns true if a code or type is one of these names, or if the prose quotes one. The
    /// names are in lower case and without separators, and more than one word.
    pub(super) fn is_called(&self, names: &[&str]) -> bool {
        let is_one = |word: &str| names.contains(&plain(word).as_str());
        self.codes_and_kinds().any(is_one) || words(&self.prose).any(is_one)
    }

    pub(super) fn codes_and_kinds(&self) -> impl Iterator<Item = &str> {
        self.layers
            .iter()
            .flat_map(|layer| [layer.code.as_deref(), layer.kind.as_deref()])
            .flatten()
    }

    /// Returns the names of the request's fields that the error is about, without what follows a
    /// field's own name.
    pub(super) fn params(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().filter_map(|layer| {
            let param = layer.param.as_deref()?;
            param.split(['.', '[', '/']).find(|part| !part.is_empty())
        })
    }

    /// Returns true if a field of the request that the error is about has this in its path.
    pub(super) fn param_has(&self, parts: &[&str]) -> bool {
        let params = self.layers.iter().filter_map(Layer::param);
        params
            .into_iter()
            .any(|param| parts.iter().any(|part| param.contains(part)))
    }

    /// Returns the server's words as it wrote them, a line for each layer.
    pub(super) fn messages(&self) -> String {
        let messages = self.layers.iter().map(|layer| layer.message.as_str());
        messages.collect::<Vec<_>>().join("\n")
    }

    /// Returns the words of the prose, layer after layer.
    pub(super) fn words(&self) -> Vec<&str> {
        words(&self.prose).collect()
    }

    /// Returns the first id in the prose with this prefix.
    pub(super) fn named(&self, prefix: &str) -> Option<String> {
        self.layers
            .iter()
            .flat_map(|layer| words(&layer.message))
            .find(|word| word.len() > prefix.len() && word.len() <= 128 && word.starts_with(prefix))
            .map(str::to_owned)
    }
}

impl Layer {
    /// Returns the lower-case words of the prose.
    pub(super) fn lower_words(&self) -> Vec<String> {
        let lower = self.message.to_lowercase();
        words(&lower).map(str::to_owned).collect()
    }

    pub(super) fn code(&self) -> Option<&str> {
        self.code.as_deref()
    }

    pub(super) fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// Returns the status that HTTP libraries write before the body of an error.
    fn status_in_prose(&self) -> Option<u16> {
        const BEFORE: [&str; 4] = ["error code: ", "status code ", "status code: ", "'code': "];
        let text = self.message.to_lowercase();
        BEFORE.iter().find_map(|before| {
            let (_, after) = text.split_once(before)?;
            client_or_server_error(after.get(..3)?)
        })
    }
}

impl Place {
    const OUTSIDE: Self = Self {
        depth: 0,
        is_inner: false,
        quoted: false,
    };

    const fn inner(self) -> Self {
        Self {
            depth: self.depth + 1,
            is_inner: true,
            ..self
        }
    }
}

fn read(value: &Value, place: Place, layers: &mut Vec<Layer>) {
    if place.depth >= MAX_DEPTH || layers.len() >= MAX_LAYERS {
        return;
    }
    match value {
        Value::Object(object) => read_object(object, place, layers),
        Value::Array(values) => {
            let place = Place {
                depth: place.depth + 1,
                ..place
            };
            for value in values {
                read(value, place, layers);
            }
        }
        Value::String(text) => {
            layers.push(Layer {
                message: text.clone(),
                quoted: place.quoted,
                ..Layer::default()
            });
            read_quoted(text, place, layers);
        }
        _ => {}
    }
}

fn read_object(object: &Map<String, Value>, place: Place, layers: &mut Vec<Layer>) {
    // LiteLLM writes what is absent as "None".
    let is_told = |text: &str| !["", "None", "null"].contains(&text);
    let text = |key: &str| {
        let text = object.get(key)?.as_str()?;
        Some(text).filter(|text| is_told(text))
    };
    let scalar = |key: &str| match object.get(key)? {
        Value::String(text) => Some(text.clone()).filter(|text| is_told(text)),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let message = MESSAGE_FIELDS
        .iter()
        .find_map(|key| Some((*key, text(key)?)));
    let code = scalar("code");
    let status = ["code", "status", "status_code", "statusCode"]
        .iter()
        .find_map(|key| client_or_server_error(&scalar(key)?));
    let kind = text("type")
        .or_else(|| text("status"))
        .filter(|kind| *kind != "error");
    let is_marked = ["type", "code", "param"]
        .iter()
        .any(|key| object.contains_key(*key));
    let layer = Layer {
        param: scalar("param").or_else(|| location(object.get("loc")?)),
        kind: kind.map(str::to_owned),
        shaped: message.is_some_and(|(key, _)| place.is_inner || is_marked || key == "detail"),
        message: message.map_or_else(String::new, |(_, text)| text.to_owned()),
        quoted: place.quoted,
        status,
        code,
    };
    if !layer.message.is_empty() || layer.code.is_some() || layer.kind.is_some() {
        layers.push(layer);
    }
    // Of the metadata only the quoted answer: the rest may be the user's.
    let metadata = object.get("metadata").and_then(|it| it.get("raw"));
    let nested = NESTED_FIELDS.iter().filter_map(|key| object.get(*key));
    for value in nested.chain(metadata) {
        match value {
            // The text itself is this layer's.
            Value::String(text) => read_quoted(text, place.inner(), layers),
            value => read(value, place.inner(), layers),
        }
    }
}

/// Reads the JSON object that stands in a text, perhaps with its quotation marks escaped.
fn read_quoted(text: &str, place: Place, layers: &mut Vec<Layer>) {
    let place = Place {
        quoted: true,
        is_inner: false,
        depth: place.depth + 1,
    };
    let starts = text.match_indices('{').map(|(at, _)| &text[at..]);
    for rest in starts.take(MAX_TRIES) {
        let unescaped;
        let rest = if rest.starts_with("{\\\"") {
            unescaped = rest.replace("\\\"", "\"");
            &unescaped
        } else {
            rest
        };
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        if let Some(Ok(value @ Value::Object(_))) = values.next() {
            return read(&value, place, layers);
        }
    }
}

/// Returns the field that a list of invalid fields names: `["body", "input", 0]` is `input.0`.
fn location(loc: &Value) -> Option<String> {
    let parts = loc.as_array()?.iter().map(|part| match part {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    });
    let places = ["body", "path", "query"];
    let parts: Vec<String> = parts
        .skip_while(|part| places.contains(&part.as_str()))
        .collect();
    (!parts.is_empty()).then(|| parts.join("."))
}

fn client_or_server_error(text: &str) -> Option<u16> {
    text.parse()
        .ok()
        .filter(|status| (400..600).contains(status))
}

fn is_number(code: &str) -> bool {
    code.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns the word in lower case and without separators.
pub(super) fn plain(word: &str) -> String {
    word.to_ascii_lowercase().replace(['_', '-', '.', ' '], "")
}

/// Returns the words of a text, ids included.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-')))
        .filter(|word| !word.is_empty())
}

/// Returns true if the object is an error without a wrapper, and cannot be anything else.
fn stands_alone(object: &Map<String, Value>) -> bool {
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    (has("message") || has("detail"))
        && object
            .keys()
            .all(|key| LONE_ERROR_FIELDS.contains(&key.as_str()))
        && (is_called_error(object) || has("code") || (!has("type") && !has("object")))
}

/// Returns true if the object's `type` or `object` names it an error.
fn is_called_error(object: &Map<String, Value>) -> bool {
    let kind = |key: &str| {
        object
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_ascii_lowercase)
    };
    ["type", "object"]
        .iter()
        .any(|key| kind(key).is_some_and(|it| it.contains("error")))
}

/// Returns the text if it is safe to show: at most 64 characters, words and short numbers with
/// `_`, `.` or `-` between them. A server may echo a key, or a piece of it, in the place of a
/// code. Keys do not have this form.
pub(super) fn token(text: &str) -> Option<String> {
    const LONGEST_WORD: usize = 32;
    const LONGEST_NUMBER: usize = 4;
    let is_word = |part: &str| {
        let letters = part.trim_end_matches(|c: char| c.is_ascii_digit());
        letters.len() <= LONGEST_WORD
            && part.len() - letters.len() <= LONGEST_NUMBER
            && letters.bytes().all(|byte| byte.is_ascii_alphabetic())
    };
    ((1..=64).contains(&text.len()) && text.split(['_', '.', '-']).all(is_word))
        .then(|| text.to_owned())
}
