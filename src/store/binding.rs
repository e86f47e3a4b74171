//! Binding a thread to its upstream thread.

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

/// A binding, and the lease of the run whose thread it is for.
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

/// Writes the bindings of a lane.
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
            .ok_or_else(|| corrupt("no outcome of a binding").into())
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
        other => Err(StoreError::Corrupt(format!(
            "the outcome `{other}` of a binding"
        ))),
    };
    Ok(rows.into_iter().map(bound).collect::<Result<_, _>>()?)
}

/// The fields of an item: see bind.function.sql.
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

/// An upstream thread that was created for a run's thread.
#[derive(Clone, Debug)]
pub struct Binding {
    pub id: UpstreamThreadId,
    /// The intent that this binding fulfils.
    pub intent: OrphanId,
    /// The upstream thread was created with the transcript. So it holds, under new ids, all
    /// earlier messages that are not withheld. Missing and unknown messages become present. The
    /// upstream ids of messages and the unsettled run become void. The thread's previous upstream
    /// thread becomes an upstream orphan.
    pub seeded: bool,
    /// The number of the user's messages of the previous thread with which it begins.
    pub carried_users: u32,
}

/// The outcome of a [`Binding`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bound {
    /// The run's thread is bound.
    Done,
    /// The lease was lost. The database has the id all the same: as an upstream orphan, or as the
    /// thread's own by an earlier call.
    Lost,
    /// The lease was lost, and the database has no row for the id. The caller has to delete the
    /// upstream thread.
    Unrecorded,
}
