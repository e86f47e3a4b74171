//! Cursor pages: `limit` 1..100 (default 20), `order` (default `desc`), `after`, `before`.

use std::collections::BTreeMap;

use axum::response::Response;
use serde::Serialize;
use serde_json::json;

use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::fields::{below_minimum, wrong_value};

/// The cursor parameters of a list call.
#[derive(Debug)]
pub(in crate::simulator) struct Paging {
    limit: usize,
    ascending: bool,
    after: Option<String>,
    before: Option<String>,
}

impl Paging {
    /// Reads the query. `before` exists in the Assistants protocol only.
    pub(in crate::simulator) fn of_query(
        query: &BTreeMap<String, String>,
        with_before: bool,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            limit: limit(query.get("limit").map(String::as_str))?,
            ascending: match query.get("order").map(String::as_str) {
                None | Some("desc") => false,
                Some("asc") => true,
                Some(other) => return Err(wrong_value("order", other, "'asc' and 'desc'")),
            },
            after: query.get("after").cloned(),
            before: query.get("before").filter(|_| with_before).cloned(),
        })
    }

    /// Returns the paging for everything, in the given order.
    pub(in crate::simulator) const fn whole() -> Self {
        Self {
            limit: usize::MAX,
            ascending: true,
            after: None,
            before: None,
        }
    }

    /// Returns the page of `rows`, which come oldest first.
    pub(in crate::simulator) fn answer<'a, T: Serialize + 'a>(
        &self,
        rows: impl DoubleEndedIterator<Item = &'a T>,
        id: impl Fn(&T) -> &str,
    ) -> Result<Response, ApiError> {
        let mut ordered: Vec<&T> = if self.ascending {
            rows.collect()
        } else {
            rows.rev().collect()
        };
        let position = |wanted: &str, name: &str| {
            ordered
                .iter()
                .position(|row| id(row) == wanted)
                .ok_or_else(|| {
                    ApiError::invalid(format!(
                        "Invalid '{name}': no object with id '{wanted}' in this list."
                    ))
                    .param(name)
                })
        };
        let start = self
            .after
            .as_deref()
            .map(|cursor| position(cursor, "after"))
            .transpose()?
            .map_or(0, |at| at + 1);
        let end = self
            .before
            .as_deref()
            .map(|cursor| position(cursor, "before"))
            .transpose()?;
        let end = end.unwrap_or(ordered.len()).max(start);
        // With `before` alone, the page is the one right before the cursor.
        let start = if self.before.is_some() && self.after.is_none() {
            end.saturating_sub(self.limit)
        } else {
            start
        };
        let stop = end.min(start.saturating_add(self.limit));
        let has_more = if self.before.is_some() && self.after.is_none() {
            start > 0
        } else {
            stop < end
        };
        let page: Vec<&T> = ordered.drain(start..stop).collect();
        Ok(json_body(&json!({
            "object": "list",
            "first_id": page.first().map(|row| id(row)),
            "last_id": page.last().map(|row| id(row)),
            "has_more": has_more,
            "data": page,
        })))
    }
}

fn limit(text: Option<&str>) -> Result<usize, ApiError> {
    let Some(text) = text else { return Ok(20) };
    let number: i64 = text.parse().map_err(|_| {
        ApiError::invalid(format!(
            "Invalid type for 'limit': expected an integer, but got '{text}' instead."
        ))
        .param("limit")
        .code("invalid_type")
    })?;
    match usize::try_from(number) {
        Ok(number @ 1..=100) => Ok(number),
        Ok(1..) => Err(ApiError::invalid(format!(
            "Invalid 'limit': integer above maximum value. Expected a value <= 100, but got {number} instead."
        ))
        .param("limit")
        .code("integer_above_max_value")),
        _ => Err(below_minimum("limit", 1, number)),
    }
}
