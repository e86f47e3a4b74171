//! The words of SQLite in what both backends say: see [`shared`](crate::store::shared). Nothing is locked, since there is
//! one writer.

use sqlx::types::Json;
use uuid::Uuid;

/// So many milliseconds, to add to a time.
macro_rules! ms {
    ($number:literal) => {
        concat!("(", $number, ")")
    };
}

/// What is left of a time limit, in milliseconds, that the thread `t` has had since it was made.
macro_rules! left_of {
    ($limit:literal) => {
        concat!("max(0, ", $limit, " - (", $crate::store::sqlite::now!(), " - t.created_at))")
    };
}

/// The time that so many milliseconds since 1970 are, as a text.
macro_rules! at {
    ($ms:literal) => {
        concat!("CAST(", $ms, " AS INTEGER)")
    };
}

/// An id (UUIDv7) that is higher than all that were made so many milliseconds ago or earlier.
macro_rules! id_after {
    ($ago:literal) => {
        concat!(
            "unhex(printf('%012x', max(0, ",
            $crate::store::sqlite::now!(),
            " - (",
            $ago,
            ") + 1)) || '00000000000000000000')"
        )
    };
}

/// An id as it is spelled outside the database, but for its prefix.
macro_rules! spelled {
    ($id:literal) => {
        concat!("lower(hex(", $id, "))")
    };
}

/// An id in such a spelling.
macro_rules! id {
    ($text:literal) => {
        concat!("unhex(", $text, ")")
    };
}

/// Whether what stands before is one of the [`ids`] of a parameter.
macro_rules! among {
    ($ids:literal) => {
        concat!(" IN (SELECT unhex(i.value) FROM json_each(", $ids, ") i)")
    };
}

macro_rules! among_found {
    ($($query:tt)+) => {
        concat!(" IN (", $($query)+, ")")
    };
}

/// The values of a JSON array in a parameter, as a table `e`.
macro_rules! each {
    ($array:literal) => {
        concat!("json_each(", $array, ") e")
    };
}

/// The texts of a JSON array in a parameter, as a table `e`.
macro_rules! each_text {
    ($array:literal) => {
        concat!("json_each(", $array, ") e")
    };
}

macro_rules! locked {
    ($table:literal) => {
        ""
    };
}

macro_rules! locked_whole {
    ($table:literal) => {
        ""
    };
}

macro_rules! locked_if_free {
    ($table:literal) => {
        ""
    };
}

macro_rules! held {
    ($table:literal) => {
        ""
    };
}

/// `rows_of!("x") FROM table x … and_no_more!("x")` is true of the rows of the table that the query finds.
macro_rules! rows_of {
    ($table:literal) => {
        concat!("rowid IN (SELECT ", $table, ".rowid")
    };
}

/// See [`rows_of!`].
macro_rules! and_no_more {
    ($table:literal) => {
        ")"
    };
}

/// A step of a list of messages: see the other one. A window would copy what goes through it, so only sizes do.
macro_rules! listed {
    ($order:literal, $limit:literal, $bytes:literal, $($rows:tt)*) => {
        concat!(
            "SELECT ", $crate::store::columns::message_columns!(), ", p.found FROM (
                SELECT q.*, count(*) OVER () AS found,
                    sum(q.size) OVER (ORDER BY ", $order, " ROWS UNBOUNDED PRECEDING) - q.size AS before
                FROM (
                    SELECT m.rowid AS row, m.thread_id AS m_thread_id, m.position AS m_position,
                        octet_length(m.content) AS size
                    ", $($rows)*, " LIMIT ", $limit, " + 1
                ) q
            ) p
            CROSS JOIN messages m ON m.rowid = p.row
            WHERE p.before < ", $bytes, "
            ORDER BY ", $order, "
            LIMIT ", $limit
        )
    };
}

/// Bytes that one step of a list reads, and one message more: nothing is compressed, so one step makes a page.
#[expect(clippy::cast_possible_wrap, reason = "a few MiB")]
pub(super) const STEP_BYTES: i64 = crate::store::PAGE_BYTES as i64;

pub(super) use super::{now, write};
pub(super) use {
    among, among_found, and_no_more, at, each, each_text, held, id, id_after, left_of, listed, locked,
    locked_if_free, locked_whole, ms, rows_of, spelled,
};

/// Ids as a parameter: a list, in hexadecimal.
pub(super) fn ids(ids: impl IntoIterator<Item = Uuid>) -> Json<Vec<String>> {
    Json(ids.into_iter().map(|id| id.simple().to_string()).collect())
}
