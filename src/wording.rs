//! Turns serde's errors about input, which speak of Rust's types, into the sender's words.

/// Returns what is wrong with a value, from the text of serde's error. The result has neither the
/// line nor the value, which may be the content of a message. `None`: the text is not one of serde's
/// own, so it is in the sender's words already.
pub(crate) fn plain(error: &str) -> Option<String> {
    let text = without_place(error);
    let quoted = |text: &str| text.split('`').nth(1).unwrap_or_default().to_owned();
    for begin in ["invalid type: ", "invalid value: ", "invalid length "] {
        if let Some((found, wanted)) = text
            .strip_prefix(begin)
            .and_then(|it| it.rsplit_once(", expected "))
        {
            let not = if begin == "invalid type: " {
                format!(", not {}", kind(found))
            } else {
                String::new()
            };
            return Some(format!("must be {}{not}", expected(wanted)));
        }
    }
    if text.starts_with("unknown variant `") {
        let (_, wanted) = text.rsplit_once(", expected ")?;
        return Some(format!("must be {wanted}"));
    }
    if let Some(rest) = text.strip_prefix("unknown field `") {
        let Some((name, known)) = rest.rsplit_once("`, expected ") else {
            return Some(format!(
                "there is no field `{}` here",
                rest.split('`').next().unwrap_or_default()
            ));
        };
        let known = known.strip_prefix("one of ").unwrap_or(known);
        return Some(format!("there is no field `{name}` here, only {known}"));
    }
    if text.starts_with("missing field `") {
        return Some(format!("`{}` is missing", quoted(text)));
    }
    if text.starts_with("duplicate field `") {
        return Some(format!("`{}` is given twice", quoted(text)));
    }
    if let Some(what) = text.strip_prefix("EOF while parsing ") {
        return Some(format!("it ends inside {what}"));
    }
    let told = match text {
        "expected value" | "expected ident" => "a value is missing",
        "trailing characters" => "there are characters after its end",
        "recursion limit exceeded" => "it is nested too deeply",
        "invalid digit found in string"
        | "cannot parse integer from empty string"
        | "number too large to fit in target type"
        | "number too small to fit in target type" => "must be a whole number in range",
        "provided string was not `true` or `false`" => "must be `true` or `false`",
        "premature end of input"
        | "trailing input"
        | "input contains invalid characters"
        | "input is out of range"
        | "no possible date and time matching input"
        | "input is not enough for unique date and time" => {
            "must be a time such as `2026-01-31T12:00:00Z`"
        }
        _ => return None,
    };
    Some(told.to_owned())
}

/// Cuts line and column off the text of a JSON error.
pub(crate) fn without_place(error: &str) -> &str {
    let is_place = |place: &str| {
        place
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b" column".contains(&byte))
    };
    match error.rsplit_once(" at line ") {
        Some((text, place)) if is_place(place) => text,
        _ => error,
    }
}

/// Returns the type of a value in words, from serde's description, which may contain the value.
fn kind(found: &str) -> &'static str {
    let words: [(&str, &str); 9] = [
        ("string", "a string"),
        ("character", "a string"),
        ("integer", "a number"),
        ("floating point", "a fraction"),
        ("boolean", "a boolean"),
        ("map", "an object"),
        ("sequence", "a list"),
        ("null", "null"),
        ("unit", "null"),
    ];
    words
        .iter()
        .find(|(word, _)| found.starts_with(word))
        .map_or("this type", |(_, told)| told)
}

fn expected(wanted: &str) -> String {
    let last = wanted.rsplit(' ').next().unwrap_or_default();
    match wanted {
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u16" => format!("a whole number from 0 to {}", u16::MAX),
        "u8" => format!("a whole number from 0 to {}", u8::MAX),
        "i64" | "i32" => "a whole number".to_owned(),
        "f64" | "f32" => "a number".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a map" | "map" => "an object".to_owned(),
        "a sequence" | "sequence" => "a list".to_owned(),
        "variant identifier" | "field identifier" | "string or map" | "a borrowed string" => {
            "a string".to_owned()
        }
        _ if wanted.starts_with("struct ") || wanted.contains("tagged enum ") => {
            "an object".to_owned()
        }
        _ if wanted.starts_with("enum ") => "a string".to_owned(),
        _ if last.starts_with('u') && wanted.starts_with("a nonzero ") => {
            "a whole number, 1 or more".to_owned()
        }
        _ => wanted.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde::de::DeserializeOwned;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Line {
        role: Option<Role>,
        times: Option<u32>,
        many: Option<Vec<bool>>,
        key: Option<Key>,
        inner: Option<Inner>,
        at: Option<chrono::DateTime<chrono::Utc>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Role {
        User,
        Assistant,
    }

    /// A type with its own error text.
    #[derive(Debug, Deserialize)]
    #[serde(try_from = "String")]
    struct Key;

    impl TryFrom<String> for Key {
        type Error = &'static str;

        fn try_from(text: String) -> Result<Self, Self::Error> {
            if text.is_empty() {
                Err("a key must not be empty")
            } else {
                Ok(Self)
            }
        }
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only read")]
    struct Inner {
        name: String,
    }

    fn told<T: DeserializeOwned + std::fmt::Debug>(json: &str) -> Option<String> {
        plain(&serde_json::from_str::<T>(json).unwrap_err().to_string())
    }

    #[test]
    fn nothing_of_rust_and_nothing_of_the_value_is_told() {
        for (json, expected) in [
            (
                r#"{"times": "planted \", expected"}"#,
                "must be a whole number from 0 to 4294967295, not a string",
            ),
            (
                r#"{"times": -1}"#,
                "must be a whole number from 0 to 4294967295",
            ),
            (
                r#"{"times": 1.5}"#,
                "must be a whole number from 0 to 4294967295, not a fraction",
            ),
            (
                r#"{"many": {"planted": 1}}"#,
                "must be a list, not an object",
            ),
            (
                r#"{"many": ["planted"]}"#,
                "must be `true` or `false`, not a string",
            ),
            (r#"{"inner": 7}"#, "must be an object, not a number"),
            (r#"{"inner": {}}"#, "`name` is missing"),
            (r#"{"role": "planted"}"#, "must be `user` or `assistant`"),
            (
                r#"{"tims": 1}"#,
                "there is no field `tims` here, only `role`, `times`, `many`, `key`, `inner`, `at`",
            ),
            (r#"{"times": 1, "times": 2}"#, "`times` is given twice"),
            (
                r#"{"at": "2026"}"#,
                "must be a time such as `2026-01-31T12:00:00Z`",
            ),
            (
                r#"{"at": "planted"}"#,
                "must be a time such as `2026-01-31T12:00:00Z`",
            ),
            (r#"{"role"#, "it ends inside a string"),
            ("[", "it ends inside a list"),
            ("{} x", "there are characters after its end"),
        ] {
            assert_eq!(told::<Line>(json).as_deref(), Some(expected), "{json}");
        }
        assert_eq!(told::<Line>(r#"{"key": ""}"#), None, "a type's own words");
        let error = serde_json::from_str::<Line>(r#"{"key": ""}"#)
            .unwrap_err()
            .to_string();
        assert_eq!(without_place(&error), "a key must not be empty");
    }
}
