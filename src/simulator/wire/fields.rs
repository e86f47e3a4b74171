//! Reads request bodies with closed schemas: every field is taken by name, and an unknown one is
//! refused.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::simulator::wire::error::ApiError;

/// String pairs of an object.
pub(in crate::simulator) type Metadata = BTreeMap<String, String>;

/// The fields of one object of a request.
#[derive(Debug)]
pub(in crate::simulator) struct Fields {
    map: Map<String, Value>,
    /// The path of the object in the body: empty, or `input[2]`.
    at: String,
}

impl Fields {
    /// Takes the fields of the body itself. Refuses names that are not in `known`.
    pub(in crate::simulator) fn of_body(
        map: Map<String, Value>,
        known: &[&str],
    ) -> Result<Self, ApiError> {
        Self {
            map,
            at: String::new(),
        }
        .closed(known)
    }

    /// Takes the fields of an object at `at` within the body.
    pub(in crate::simulator) fn of_value(
        value: Value,
        at: String,
        known: &[&str],
    ) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Self { map, at }.closed(known),
            other => Err(wrong_type(&at, "an object", &other)),
        }
    }

    /// Returns the value of `name`; null counts as absent.
    pub(in crate::simulator) fn any(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(in crate::simulator) fn needed(&mut self, name: &str) -> Result<Value, ApiError> {
        self.any(name).ok_or_else(|| self.missing(name))
    }

    pub(in crate::simulator) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.any(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    pub(in crate::simulator) fn needed_text(&mut self, name: &str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    pub(in crate::simulator) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.any(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(&self.path(name), "a boolean", &other)),
        }
    }

    /// Returns an integer of at least `min`.
    pub(in crate::simulator) fn integer(
        &mut self,
        name: &str,
        min: u64,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.any(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let number = value
            .as_i64()
            .ok_or_else(|| wrong_type(&path, "an integer", &value))?;
        match u64::try_from(number) {
            Ok(number) if number >= min => Ok(Some(number)),
            _ => Err(below_minimum(&path, min, number)),
        }
    }

    /// Returns a number from 0 to `max`.
    pub(in crate::simulator) fn number(
        &mut self,
        name: &str,
        max: f64,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.any(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let number = value
            .as_f64()
            .ok_or_else(|| wrong_type(&path, "a decimal", &value))?;
        if (0.0..=max).contains(&number) {
            return Ok(Some(number));
        }
        let (bound, code) = if number < 0.0 {
            (
                "below its minimum of 0".to_owned(),
                "decimal_below_min_value",
            )
        } else {
            (
                format!("above its maximum of {max}"),
                "decimal_above_max_value",
            )
        };
        Err(
            ApiError::invalid(format!("Invalid '{path}': {number} is {bound}."))
                .param(path)
                .code(code),
        )
    }

    /// Returns an array of at most `max` elements.
    pub(in crate::simulator) fn array(
        &mut self,
        name: &str,
        max: usize,
    ) -> Result<Option<Vec<Value>>, ApiError> {
        let Some(value) = self.any(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        match value {
            Value::Array(list) if list.len() <= max => Ok(Some(list)),
            Value::Array(list) => Err(ApiError::invalid(format!(
                "Invalid '{path}': array too long. Expected at most {max} elements, but got {}.",
                list.len()
            ))
            .param(path)
            .code("array_above_max_length")),
            other => Err(wrong_type(&path, "an array", &other)),
        }
    }

    /// Returns metadata within its limits: 16 pairs of text, keys up to 64 characters, values up
    /// to 512.
    pub(in crate::simulator) fn metadata(&mut self) -> Result<Option<Metadata>, ApiError> {
        let Some(value) = self.any("metadata") else {
            return Ok(None);
        };
        let path = self.path("metadata");
        let Value::Object(map) = value else {
            return Err(wrong_type(&path, "an object", &value));
        };
        if map.len() > 16 {
            return Err(ApiError::invalid(format!(
                "Invalid '{path}': too many properties. Expected at most 16, but got {}.",
                map.len()
            ))
            .param(path)
            .code("object_above_max_properties"));
        }
        let mut metadata = Metadata::new();
        for (key, value) in map {
            let pair = format!("{path}.{key}");
            within(&pair, &key, 64)?;
            let Value::String(value) = value else {
                return Err(wrong_type(&pair, "a string", &value));
            };
            within(&pair, &value, 512)?;
            metadata.insert(key, value);
        }
        Ok(Some(metadata))
    }

    pub(in crate::simulator) fn path(&self, name: &str) -> String {
        if self.at.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.at)
        }
    }

    fn closed(self, known: &[&str]) -> Result<Self, ApiError> {
        match self.map.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(self),
            Some(name) => {
                let path = self.path(name);
                Err(ApiError::invalid(format!("Unknown parameter: '{path}'."))
                    .param(path)
                    .code("unknown_parameter"))
            }
        }
    }

    pub(in crate::simulator) fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::invalid(format!("Missing required parameter: '{path}'."))
            .param(path)
            .code("missing_required_parameter")
    }
}

/// Refuses a text of more than `max` characters.
pub(in crate::simulator) fn within(path: &str, text: &str, max: usize) -> Result<(), ApiError> {
    if text.len() <= max || text.chars().count() <= max {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "Invalid '{path}': string too long. Expected at most {max} characters, but got {}.",
        text.chars().count()
    ))
    .param(path)
    .code("string_above_max_length"))
}

/// Returns the refusal of a value of the wrong type.
pub(in crate::simulator) fn wrong_type(path: &str, wanted: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(format!(
        "Invalid type for '{path}': expected {wanted}, but got {got} instead."
    ))
    .param(path)
    .code("invalid_type")
}

/// Returns the refusal of a value outside of a fixed set.
pub(in crate::simulator) fn wrong_value(path: &str, got: &str, wanted: &str) -> ApiError {
    ApiError::invalid(format!(
        "Invalid value: '{got}'. Supported values are: {wanted}."
    ))
    .param(path)
    .code("invalid_value")
}

pub(in crate::simulator) fn below_minimum(path: &str, min: u64, got: i64) -> ApiError {
    ApiError::invalid(format!(
        "Invalid '{path}': integer below minimum value. Expected a value >= {min}, but got {got} instead."
    ))
    .param(path)
    .code("integer_below_min_value")
}
