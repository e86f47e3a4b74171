//! Where a thread lives upstream, once that is known.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Serialize;
use sqlx::FromRow;
use uuid::Uuid;

use super::backend::Backend;
use super::errors::NotWritten;
use super::errors::StoreError;
use super::lane::{Answer, Answers, Item, Write};
use super::pool::Connection;
use super::rows::corrupt;
use super::statement::Statement;
use super::values::RunLease;
use crate::domain::{OrphanId, TenantKey, UpstreamThreadId};

static BIND: Statement = Statement::for_each_engine(
    "binding.bind",
    "SELECT * FROM {function bind}(:items, :alone)",
    include_str!("sql/bind.sqlite.sql"),
);

pub(super) static STATEMENTS: &[&Statement] = &[&BIND];

/// A binding for a run's thread.
pub(super) struct Leased {
    pub(super) lease: RunLease,
    pub(super) binding: Binding,
}

impl Item for Leased {
    type Answer = Bound;

    fn tenant(&self) -> Option<&TenantKey> {
        None
    }

    fn bytes(&self) -> usize {
        self.binding.id.as_str().len()
    }

    fn meets(&self, other: &Self) -> bool {
        self.lease.run_id == other.lease.run_id
    }

    fn may_change(_: &Bound) -> bool {
        false
    }
}

/// Writes bindings.
pub(super) struct Bindings {
    pub(super) backend: Arc<Backend>,
}

#[async_trait]
impl Write for Bindings {
    type Item = Leased;

    async fn together(&self, items: &[Leased]) -> Result<Answers<Leased>, NotWritten> {
        let mut c = self
            .backend
            .vital_writer()
            .await
            .map_err(NotWritten::Unsent)?;
        bind_all(&mut c, items, false).await
    }

    async fn alone(&self, item: &Leased) -> Answer<Leased> {
        let mut c = self
            .backend
            .vital_writer()
            .await
            .map_err(NotWritten::Unsent)?;
        let mut answers = bind_all(&mut c, std::slice::from_ref(item), true).await?;
        answers
            .pop()
            .flatten()
            .ok_or_else(|| corrupt("no answer").into())
    }
}

async fn bind_all(
    c: &mut Connection,
    items: &[Leased],
    alone: bool,
) -> Result<Answers<Leased>, NotWritten> {
    let fields: Vec<_> = items.iter().map(Fields::of).collect();
    c.begin_script().await?;
    let rows: Vec<BoundRow> = c.batch(&BIND, &fields, alone).await?;
    c.commit_script().await?;
    let bound = |row: BoundRow| match &*row.outcome {
        "bound" => Ok(Some(Bound::Done)),
        "lost" => Ok(Some(Bound::Lost)),
        "unrecorded" => Ok(Some(Bound::Unrecorded)),
        "held" => Ok(None),
        other => Err(StoreError::Corrupt(format!("a binding that is `{other}`"))),
    };
    Ok(rows.into_iter().map(bound).collect::<Result<_, _>>()?)
}

/// A binding as the database takes it: see bind.function.sql.
#[derive(Serialize)]
struct Fields<'a> {
    run: Uuid,
    fence: i64,
    upstream_thread: &'a str,
    intent: Uuid,
    seeded: bool,
    carried_users: u32,
    orphan: Uuid,
}

impl<'a> Fields<'a> {
    fn of(Leased { lease, binding }: &'a Leased) -> Self {
        Self {
            run: lease.run_id.uuid(),
            fence: lease.fence,
            upstream_thread: binding.id.as_str(),
            intent: binding.intent.uuid(),
            seeded: binding.seeded,
            carried_users: binding.carried_users,
            orphan: OrphanId::new().uuid(),
        }
    }
}

#[derive(FromRow)]
struct BoundRow {
    outcome: String,
}

/// An upstream thread that was made for a run's thread.
#[derive(Clone, Debug)]
pub struct Binding {
    pub id: UpstreamThreadId,
    /// What was intended, and is done now.
    pub intent: OrphanId,
    /// It was made with the transcript, so it holds all earlier messages that are not withheld, under new ids: what was
    /// missing or unknown is present, the ids of messages upstream and the unsettled run are void. The upstream thread that
    /// the thread had before becomes a upstream orphan.
    pub seeded: bool,
    /// How many of the user's messages of the thread before it begins with.
    pub carried_users: u32,
}

/// What became of a [`Binding`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bound {
    /// The thread of the run lives there now.
    Done,
    /// The lease was lost. The record has the id all the same: as a upstream orphan, or as the thread's own since an earlier call.
    Lost,
    /// The lease was lost, and the record has no place for the id: whoever made the upstream thread has to delete it.
    Unrecorded,
}
