//! Values for the named parameters of a statement.

use std::borrow::Cow;

use serde::Serialize;
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgArguments, PgTypeInfo, Postgres};
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, Encode, Type};
use uuid::Uuid;

use super::StoreError;
use super::rows::{At, json};
use super::statement::Sent;
use crate::domain::{ConversationKey, Timestamp};

/// Parameters and their values, in any order: `params().key(key).set("run", id)`.
#[derive(Default)]
pub(super) struct Params<'a>(Vec<(&'static str, Value<'a>)>);

/// Returns an empty set of parameters.
pub(super) fn params<'a>() -> Params<'a> {
    Params::default()
}

impl<'a> Params<'a> {
    pub(super) fn set(mut self, name: &'static str, value: impl Bind<'a>) -> Self {
        self.0.push((name, Bind::value(Some(value))));
        self
    }

    /// Adds a value as JSON; `None` is NULL.
    pub(super) fn json<T: Serialize>(
        mut self,
        name: &'static str,
        value: Option<&T>,
    ) -> Result<Self, StoreError> {
        self.0.push((
            name,
            Value::Json(value.map(json).transpose()?.map(Cow::Owned)),
        ));
        Ok(self)
    }

    /// Adds a text that [`json`] or a similar function has encoded.
    pub(super) fn json_text(mut self, name: &'static str, text: impl Into<Cow<'a, str>>) -> Self {
        self.0.push((name, Value::Json(Some(text.into()))));
        self
    }

    /// Adds the parameters of a conversation's key.
    pub(super) fn key(self, key: &'a ConversationKey) -> Self {
        self.set("tenant", key.tenant.as_str())
            .set("user", key.user.as_str())
            .set("scope_kind", key.scope.kind())
            .set("scope_name", key.scope.name())
    }

    fn value(&self, name: &str) -> Result<&Value<'a>, BoxDynError> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, value)| value)
            .ok_or_else(|| format!("the parameter `{name}` has no value").into())
    }

    /// Returns the values in the order in which the statement needs them.
    pub(super) fn for_postgres(&self, sent: &Sent) -> Result<PgArguments, BoxDynError> {
        let mut arguments = PgArguments::default();
        for name in &sent.parameters {
            match self.value(name)? {
                Value::Uuid(value) => arguments.add(value),
                Value::Text(value) => arguments.add(value),
                Value::Json(value) => arguments.add(value.as_deref().map(JsonText)),
                Value::Int(value) => arguments.add(value),
                Value::Bool(value) => arguments.add(value),
                Value::Bytes(value) => arguments.add(value),
                Value::Time(value) => arguments.add(value.map(At)),
                Value::Ids(values) => arguments.add(values),
                Value::Ints(values) => arguments.add(values),
                Value::Texts(values) => arguments.add(values),
            }?;
        }
        Ok(arguments)
    }

    /// Returns the same for SQLite. Lists are JSON, with ids in hexadecimal.
    pub(super) fn for_sqlite(&self, sent: &Sent) -> Result<SqliteArguments, BoxDynError> {
        let mut arguments = SqliteArguments::default();
        for name in &sent.parameters {
            match self.value(name)? {
                Value::Uuid(value) => arguments.add(*value),
                Value::Text(value) => arguments.add(value.map(str::to_owned)),
                Value::Json(value) => arguments.add(value.as_deref().map(str::to_owned)),
                Value::Int(value) => arguments.add(*value),
                Value::Bool(value) => arguments.add(*value),
                Value::Bytes(value) => arguments.add(value.map(<[u8]>::to_vec)),
                Value::Time(value) => arguments.add(value.map(At)),
                Value::Ids(values) => {
                    let values: Vec<String> =
                        values.iter().map(|id| id.simple().to_string()).collect();
                    arguments.add(serde_json::to_string(&values)?)
                }
                Value::Ints(values) => arguments.add(serde_json::to_string(values)?),
                Value::Texts(values) => arguments.add(serde_json::to_string(values)?),
            }?;
        }
        Ok(arguments)
    }
}

/// The value of a parameter. `None` is NULL, and has a type all the same.
pub(super) enum Value<'a> {
    Uuid(Option<Uuid>),
    Text(Option<&'a str>),
    Json(Option<Cow<'a, str>>),
    Int(Option<i64>),
    Bool(Option<bool>),
    Bytes(Option<&'a [u8]>),
    Time(Option<Timestamp>),
    Ids(Vec<Uuid>),
    Ints(Vec<i64>),
    Texts(Vec<Option<String>>),
}

/// A type whose values can be parameters.
pub(super) trait Bind<'a>: Sized {
    fn value(this: Option<Self>) -> Value<'a>;
}

impl<'a, T: Bind<'a>> Bind<'a> for Option<T> {
    fn value(this: Option<Self>) -> Value<'a> {
        T::value(this.flatten())
    }
}

impl<'a> Bind<'a> for Uuid {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Uuid(this)
    }
}

impl<'a> Bind<'a> for &'a str {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Text(this)
    }
}

impl<'a> Bind<'a> for &'a String {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Text(this.map(String::as_str))
    }
}

impl<'a> Bind<'a> for i64 {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Int(this)
    }
}

impl<'a> Bind<'a> for u32 {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Int(this.map(i64::from))
    }
}

impl<'a> Bind<'a> for bool {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Bool(this)
    }
}

impl<'a> Bind<'a> for &'a [u8] {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Bytes(this)
    }
}

impl<'a> Bind<'a> for Timestamp {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Time(this)
    }
}

impl<'a> Bind<'a> for Vec<Uuid> {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Ids(this.unwrap_or_default())
    }
}

impl<'a> Bind<'a> for Vec<i64> {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Ints(this.unwrap_or_default())
    }
}

impl<'a> Bind<'a> for Vec<Option<String>> {
    fn value(this: Option<Self>) -> Value<'a> {
        Value::Texts(this.unwrap_or_default())
    }
}

/// A JSON text, sent as `jsonb`.
struct JsonText<'a>(&'a str);

impl Type<Postgres> for JsonText<'_> {
    fn type_info() -> PgTypeInfo {
        <sqlx::types::Json<()> as Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for JsonText<'_> {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        // The version of the binary format.
        buffer.push(1);
        buffer.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }
}
