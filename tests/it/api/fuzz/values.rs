//! Values that a schema allows, and ways to spoil them.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Map, Number, Value, json};

use super::pool::{PREFIXES, Pool};

/// Texts that have broken software somewhere. None is a directive of the simulator.
pub(super) const TEXTS: [&str; 16] = [
    "a",
    "Hello!",
    " ",
    "\u{feff}a byte order mark",
    "e\u{301}\u{302}\u{303}",
    "👩‍👩‍👧‍👦",
    "\u{202e}right to left",
    "line\nfeed\r\n\r\nand: more",
    "data: x\n\nevent: run.completed",
    "\u{7f}\u{85}\u{2028}",
    "\u{10ffff}\u{fffd}\u{ffff}",
    "'; DROP TABLE runs; --",
    "%00%ff\\u0000",
    "${jndi:x} {{7*7}} <script>",
    "[[sim",
    "null",
];

pub(super) struct Values<'a> {
    pub(super) rng: &'a mut StdRng,
    pub(super) document: &'a Value,
    pub(super) pool: &'a Pool,
}

impl Values<'_> {
    /// Returns a value that the schema allows.
    pub(super) fn of(&mut self, schema: &Value) -> Value {
        if let Some(reference) = schema["$ref"].as_str() {
            let document = self.document;
            return self.of(document.pointer(&reference[1..]).unwrap());
        }
        if let Some(only) = schema.get("const") {
            return only.clone();
        }
        for several in ["enum", "oneOf"] {
            if let Some(all) = schema[several].as_array() {
                let one = all.choose(self.rng).unwrap();
                return if several == "enum" {
                    one.clone()
                } else {
                    self.of(one)
                };
            }
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => kinds.choose(self.rng).unwrap(),
            kind => kind,
        };
        match kind.as_str().unwrap_or("object") {
            "string" => self.text(schema).into(),
            "integer" => self.number(schema),
            "boolean" => self.rng.random_bool(0.5).into(),
            "null" => Value::Null,
            "array" => {
                let (least, most) = (
                    size(schema, "minItems").unwrap_or(0),
                    size(schema, "maxItems"),
                );
                let length = self
                    .rng
                    .random_range(least..=most.unwrap_or(64).min(least + 3));
                let length = most
                    .filter(|_| self.rng.random_bool(0.05))
                    .unwrap_or(length);
                (0..length).map(|_| self.of(&schema["items"])).collect()
            }
            _ => self.object(schema),
        }
    }

    fn object(&mut self, schema: &Value) -> Value {
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let mut object = Map::new();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            if required.contains(&json!(name)) || self.rng.random_bool(0.25) {
                object.insert(name.clone(), self.of(property));
            }
        }
        if schema["additionalProperties"].is_object() {
            let most = size(schema, "maxProperties").unwrap_or(4);
            for _ in 0..*[0, 1, 2, most].choose(self.rng).unwrap() {
                object.insert(
                    self.text(&schema["propertyNames"]),
                    self.of(&schema["additionalProperties"]),
                );
            }
        }
        object.into()
    }

    pub(super) fn text(&mut self, schema: &Value) -> String {
        let pattern = schema["pattern"].as_str().unwrap_or_default();
        if let Some(prefix) = PREFIXES.into_iter().find(|prefix| pattern.contains(prefix)) {
            return self.id(prefix);
        }
        if schema["format"] == "date-time" {
            let times = [
                "2026-11-22T09:00:00Z",
                "1970-01-01T00:00:00Z",
                "9999-12-31T23:59:59.999999999Z",
            ];
            return (*times.choose(self.rng).unwrap()).to_owned();
        }
        let most = size(schema, "maxLength");
        let is_key = pattern.contains("\\u001f");
        let text = match self.rng.random_range(0..12) {
            0..=1 if most.is_none() => {
                format!("{} [[sim: tool=f]]", TEXTS.choose(self.rng).unwrap())
            }
            // The longest allowed text. Keys count bytes, other texts count characters.
            2 if is_key => "k".repeat(most.unwrap_or(3000)),
            2 => "é".repeat(most.unwrap_or(3000)),
            _ => (*TEXTS.choose(self.rng).unwrap()).to_owned(),
        };
        let text: String = text
            .chars()
            .filter(|c| !(is_key && c.is_control()))
            .collect();
        let text = if text.is_empty() { "k" } else { &text };
        text.chars().take(most.unwrap_or(usize::MAX)).collect()
    }

    /// Returns an id from an earlier answer, or one that never existed.
    pub(super) fn id(&mut self, prefix: &str) -> String {
        let known = if self.rng.random_bool(0.9) {
            self.pool.id(prefix, self.rng)
        } else {
            None
        };
        known.unwrap_or_else(|| format!("{prefix}{:032x}", self.rng.random::<u128>()))
    }

    fn number(&mut self, schema: &Value) -> Value {
        let least = schema["minimum"].as_i64().unwrap_or(i64::MIN);
        let most = schema["maximum"].as_i64().unwrap_or(i64::MAX);
        let all = [
            least,
            least.saturating_add(1),
            1000,
            60_000,
            most.saturating_sub(1),
            most,
        ];
        let fits = all
            .into_iter()
            .filter(|it| (least..=most).contains(it))
            .collect::<Vec<_>>();
        (*fits.choose(self.rng).unwrap()).into()
    }

    /// Spoils something in a value.
    pub(super) fn spoil(&mut self, value: &mut Value) {
        let mut places = Vec::new();
        collect(value, String::new(), &mut places);
        let place = places.choose(self.rng).unwrap().clone();
        let junk = self.junk();
        let Some(at) = value.pointer_mut(&place) else {
            return;
        };
        match (self.rng.random_range(0..4), at) {
            (0, Value::Object(fields)) => {
                fields.insert((*TEXTS.choose(self.rng).unwrap()).to_owned(), junk);
            }
            (1, Value::Object(fields)) => {
                let name = fields
                    .keys()
                    .cloned()
                    .collect::<Vec<_>>()
                    .choose(self.rng)
                    .cloned();
                fields.remove(&name.unwrap_or_default());
            }
            (0, Value::Array(items)) => items.push(junk),
            (1, Value::Array(items)) => items.clear(),
            (2, Value::Array(items)) => {
                let again = items
                    .iter()
                    .cycle()
                    .take(100 * usize::from(!items.is_empty()))
                    .cloned()
                    .collect();
                *items = again;
            }
            (_, at) => *at = junk,
        }
    }

    fn junk(&mut self) -> Value {
        match self.rng.random_range(0..14) {
            0 => Value::Null,
            1 => true.into(),
            2 => json!(-1),
            3 => json!(0),
            4 => json!(u64::MAX),
            5 => json!(1.5),
            6 => Number::from_f64(1e300).unwrap().into(),
            7 => "".into(),
            8 => "nul \u{0} in it".into(),
            9 => "x".repeat(20_000).into(),
            10 => json!([]),
            11 => json!({}),
            12 => (0..self.rng.random_range(1..100)).fold(json!(1), |inner, _| json!([inner])),
            _ => (0..self.rng.random_range(1..60))
                .fold(json!(1), |inner, _| json!({"content": inner})),
        }
    }

    /// Spoils the text of a JSON object.
    pub(super) fn spoil_text(&mut self, text: String) -> Vec<u8> {
        let mut bytes = text.into_bytes();
        let at = self.rng.random_range(0..=bytes.len());
        match self.rng.random_range(0..14) {
            0 => bytes.truncate(at),
            1 => bytes
                .splice(1..1, *br#""content":"once","content":"twice","#)
                .for_each(drop),
            2 => bytes
                .splice(1..1, *br#""stream":true,"stream":true,"#)
                .for_each(drop),
            3 => bytes.splice(at..at, *b"\xff\xc0\x80").for_each(drop),
            4 => bytes.splice(at..at, *b"\\ud800").for_each(drop),
            5 => bytes.splice(at..at, *b"\0").for_each(drop),
            6 => bytes.splice(0..0, *b"\xef\xbb\xbf").for_each(drop),
            7 => bytes.extend_from_slice(b" {}"),
            8 => bytes = b"[".repeat(10_000),
            9 => bytes = br#"{"content":"#.repeat(5_000),
            10 => bytes = vec![b' '; 70_000],
            11 => bytes = br#"{"content":"\ud800","timeout_ms":1e400}"#.to_vec(),
            12 => bytes = br#"["hello"]"#.to_vec(),
            _ => bytes.clear(),
        }
        bytes
    }
}

fn size(schema: &Value, name: &str) -> Option<usize> {
    schema[name]
        .as_u64()
        .and_then(|it| usize::try_from(it).ok())
}

/// Collects pointers to all values within a value.
fn collect(value: &Value, at: String, places: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let name = name.replace('~', "~0").replace('/', "~1");
                collect(field, format!("{at}/{name}"), places);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                collect(item, format!("{at}/{index}"), places);
            }
        }
        _ => {}
    }
    places.push(at);
}
