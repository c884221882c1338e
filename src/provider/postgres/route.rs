//! Moving what others left in the inbox into the log.
//!
//! One process at a time takes the oldest committed rows, makes events of them, and appends them in the same
//! transaction; only that last step holds the lock that gives out seq. A row that cannot be an event becomes one that
//! says so: nothing stands in the way of what is behind it, and nothing is lost in silence.

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::row::limit;
use super::session::Session;
use super::trouble::Step;
use super::{Store, Turns};
use crate::error::Error;
use crate::provider::inbox::{InboxRow, routed};
use crate::provider::{Append, RouteRequest, Routed};

const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT 1 FROM {s}.inbox)";
const LOCK: &str = "SELECT pg_try_advisory_xact_lock(hashtextextended('tidegate route ' || $1, 0))";
/// Rows for about so many events: the one with which there are enough is the last.
const TAKE: &str = "DELETE FROM {s}.inbox WHERE position IN (SELECT position FROM (SELECT position, \
    sum(greatest(rows, 1)) OVER (ORDER BY position) - greatest(rows, 1) AS before \
    FROM (SELECT position, rows FROM {s}.inbox ORDER BY position LIMIT $2) AS first) AS counted WHERE before < $2) \
    RETURNING position, id, type, source, coalesce(created_at, {now}), key, user_id, session_id, instance_id, schema, \
    entity, operation, trace_parent, caused_by, metadata, content_type, payload, \"binary\", rows";

impl Store {
    /// Moves events from the inbox into the log.
    pub(super) async fn route(&self, request: &RouteRequest<'_>) -> Step<Routed> {
        let mut session = self.session().await?;
        let row = session.row(self.statement(IS_EMPTY)).await;
        if session.finish(row).await?.try_get(0)? {
            return Ok(Routed::default());
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.route(request, turns.careful).await;
            if let Some(result) = turns.judge(session.finish(result).await) {
                return result;
            }
        }
    }
}

impl Session<'_> {
    async fn route(&mut self, request: &RouteRequest<'_>, careful: bool) -> Step<Routed> {
        self.begin().await?;
        let lock = self.store.statement(LOCK).bind(self.store.schema.clone());
        if !self.row(lock).await?.try_get::<bool, _>(0)? {
            // Another process is at it.
            self.commit().await?;
            return Ok(Routed::default());
        }
        let take = self.store.statement(TAKE).bind(self.store.now()).bind(limit(request.max));
        let mut rows = Vec::new();
        for row in &self.rows(take).await? {
            rows.push(inbox_row(row)?);
        }
        rows.sort_unstable_by_key(|row| row.position);
        let appends = rows.into_iter().map(|row| row.into_appends(request)).collect::<Result<Vec<_>, Error>>();
        let appends: Vec<Append> = appends.map_err(super::row::broken)?.into_iter().flatten().collect();
        let batch: Vec<&Append> = appends.iter().collect();
        let numbers = self.numbers(batch.iter().flat_map(|append| append.subscriptions.iter())).await?;
        let appended = if careful {
            self.append_carefully(&batch, &numbers).await?
        } else {
            self.append(&batch, &super::append::Known::new(), &numbers).await?
        };
        self.commit().await?;
        Ok(routed(batch.into_iter().zip(appended.into_iter().map(Some))))
    }
}

/// A row as it was read.
fn inbox_row(row: &PgRow) -> sqlx::Result<InboxRow> {
    Ok(InboxRow {
        position: row.try_get(0)?,
        id: row.try_get(1)?,
        event_type: row.try_get(2)?,
        source: i64::from(row.try_get::<i16, _>(3)?),
        created_at: Some(row.try_get(4)?),
        key: row.try_get(5)?,
        user_id: row.try_get(6)?,
        session_id: row.try_get(7)?,
        instance_id: row.try_get(8)?,
        schema: row.try_get(9)?,
        entity: row.try_get(10)?,
        operation: row.try_get(11)?,
        trace_parent: row.try_get(12)?,
        caused_by: row.try_get(13)?,
        metadata: row.try_get(14)?,
        content_type: row.try_get(15)?,
        payload: row.try_get(16)?,
        binary: row.try_get(17)?,
        rows: row.try_get(18)?,
        oversize: None,
        unreadable: None,
    })
}
