//! The words of Postgres in what both backends say: see [`shared`](crate::store::shared).

use sqlx::{Connection, PgConnection, Postgres, Transaction};
use uuid::Uuid;

use crate::store::StoreError;

/// The time of the step.
macro_rules! now {
    () => {
        "now()"
    };
}

/// So many milliseconds, to add to a time.
macro_rules! ms {
    ($number:literal) => {
        concat!("(", $number, ") * interval '1 millisecond'")
    };
}

/// What is left of a time limit, in milliseconds, that the thread `t` has had since it was made.
macro_rules! left_of {
    ($limit:literal) => {
        concat!("GREATEST(0, ", $limit, " - (EXTRACT(epoch FROM now() - t.created_at) * 1000)::bigint)")
    };
}

/// The time that so many milliseconds since 1970 are, as a text.
macro_rules! at {
    ($ms:literal) => {
        concat!("to_timestamp((", $ms, ")::bigint / 1000.0)")
    };
}

/// An id (UUIDv7) that is higher than all that were made so many milliseconds ago or earlier.
macro_rules! id_after {
    ($ago:literal) => {
        concat!(
            "(lpad(to_hex(GREATEST(0, (EXTRACT(epoch FROM now()) * 1000)::bigint - (",
            $ago,
            ") + 1)), 12, '0') || repeat('0', 20))::uuid"
        )
    };
}

/// An id as it is spelled outside the database, but for its prefix.
macro_rules! spelled {
    ($id:literal) => {
        concat!("replace(", $id, "::text, '-', '')")
    };
}

/// An id in such a spelling.
macro_rules! id {
    ($text:literal) => {
        concat!("(", $text, ")::uuid")
    };
}

/// Whether what stands before is one of the [`ids`] of a parameter.
macro_rules! among {
    ($ids:literal) => {
        concat!(" = ANY (", $ids, ")")
    };
}

/// Whether what stands before is one of the ids that a query gives, which is evaluated once.
macro_rules! among_found {
    ($($query:tt)+) => {
        concat!(" = ANY (ARRAY (", $($query)+, "))")
    };
}

/// The values of a JSON array in a parameter, as a table `e`.
macro_rules! each {
    ($array:literal) => {
        concat!("jsonb_array_elements(", $array, "::jsonb) AS e (value)")
    };
}

/// The texts of a JSON array in a parameter, as a table `e`.
macro_rules! each_text {
    ($array:literal) => {
        concat!("jsonb_array_elements_text(", $array, "::jsonb) AS e (value)")
    };
}

/// Locks the rows of a table that a query gives, which are to be changed.
macro_rules! locked {
    ($table:literal) => {
        concat!(" FOR NO KEY UPDATE OF ", $table)
    };
}

/// The same for rows that are to change hands.
macro_rules! locked_whole {
    ($table:literal) => {
        concat!(" FOR UPDATE OF ", $table)
    };
}

/// The same, without waiting for those that others hold: these are passed over.
macro_rules! locked_if_free {
    ($table:literal) => {
        concat!(" FOR UPDATE OF ", $table, " SKIP LOCKED")
    };
}

/// Locks the rows of a table that a query gives, which are to stay as they are.
macro_rules! held {
    ($table:literal) => {
        concat!(" FOR SHARE OF ", $table)
    };
}

/// `rows_of!("x") FROM table x … and_no_more!("x")` is true of the rows of the table that the query finds, but for those
/// that others hold.
macro_rules! rows_of {
    ($table:literal) => {
        concat!("ctid = ANY (ARRAY (SELECT ", $table, ".ctid")
    };
}

/// See [`rows_of!`].
macro_rules! and_no_more {
    ($table:literal) => {
        concat!(" FOR UPDATE OF ", $table, " SKIP LOCKED))")
    };
}

/// A step of a list of messages: of the first `$limit` `$rows`, given as what follows the columns of a query of `messages m`,
/// those up to the one with which there are `$bytes`, in an `$order` of columns of the result. `found` is how many rows there
/// are, of one more than the limit. A size is that of what is stored, which is known without reading it.
macro_rules! listed {
    ($order:literal, $limit:literal, $bytes:literal, $($rows:tt)*) => {
        concat!(
            "SELECT p.* FROM (
                SELECT q.*, count(*) OVER () AS found,
                    sum(pg_column_size(q.m_content)) OVER (ORDER BY ", $order, " ROWS UNBOUNDED PRECEDING)
                        - pg_column_size(q.m_content) AS before
                FROM (SELECT ", $crate::store::columns::message_columns!(), " ", $($rows)*, " LIMIT ", $limit, " + 1) q
            ) p
            WHERE p.before < ", $bytes, "
            ORDER BY ", $order, "
            LIMIT ", $limit
        )
    };
}

/// Stored bytes that one step of a list reads, and one message more. What was compressed may be a hundred times as long.
pub(super) const STEP_BYTES: i64 = 128 * 1024;

pub(super) use {
    among, among_found, and_no_more, at, each, each_text, held, id, id_after, left_of, listed, locked,
    locked_if_free, locked_whole, ms, now, rows_of, spelled,
};

/// Ids as a parameter.
pub(super) fn ids(ids: impl IntoIterator<Item = Uuid>) -> Vec<Uuid> {
    ids.into_iter().collect()
}

/// Begins a transaction.
pub(super) async fn write(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, StoreError> {
    Ok(connection.begin().await?)
}
