//! What operators change: redrive, replay, cancel, erase, prune.
//!
//! Rare, so the counts of the events that are touched are made anew from their deliveries.

use std::time::Duration;

use sqlx::{QueryBuilder, Sqlite};

use super::read;
use super::row::SUBSCRIPTION_BITS;
use super::statement::json_list;
use super::writer::{Step, Tx, as_micros};
use crate::provider::{Amendment, DeadLetterFilter, Replay, Retention};

/// How many events one step of a prune removes: others get their turn in between.
const PRUNE_STEP: i64 = 500;

impl Tx<'_> {
    pub(super) async fn amend(&mut self, amendment: &Amendment) -> Step<u64> {
        match amendment {
            Amendment::Redrive(filter) => self.redrive(filter).await,
            Amendment::Replay(replay) => self.replay(replay).await,
            Amendment::Cancel { subscription } => self.cancel(subscription).await,
            Amendment::Erase { id } => self.erase(id).await,
        }
    }

    /// Executes a statement whose one parameter is a list of integers.
    async fn on_list(&mut self, text: &'static str, list: &str) -> sqlx::Result<u64> {
        Ok(sqlx::query(text).bind(list).execute(&mut *self.connection).await?.rows_affected())
    }

    async fn recount(&mut self, seqs: &str) -> Step<()> {
        self.on_list("DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?))", seqs).await?;
        let count = "INSERT INTO progress (seq, open, begun, failed) \
            SELECT j.value, sum(d.stage < 3), sum(d.started_at IS NOT NULL), sum(d.stage = 4) FROM json_each(?) j \
            JOIN deliveries d ON d.id BETWEEN (j.value << 20) AND (j.value << 20) | 1048575 GROUP BY j.value \
            HAVING sum(d.stage < 3) > 0 OR sum(d.stage = 4) > 0";
        self.on_list(count, seqs).await?;
        Ok(())
    }

    async fn reopen(&mut self, ids: &str, is_replay: bool) -> Step<()> {
        let text = "UPDATE deliveries SET stage = 0, due = ?, completed_at = NULL, tries = 0, infra = 0, \
                    replay = max(replay, ?) WHERE id IN (SELECT value FROM json_each(?))";
        sqlx::query(text).bind(self.now).bind(is_replay).bind(ids).execute(&mut *self.connection).await?;
        Ok(())
    }

    async fn redrive(&mut self, filter: &DeadLetterFilter) -> Step<u64> {
        let dead = read::dead_ids(self.connection, filter, filter.bound()).await?;
        self.reopen(&json_list(dead.iter().map(|&(id, _)| id)), false).await?;
        let mut seqs: Vec<i64> = dead.iter().map(|&(id, _)| id >> SUBSCRIPTION_BITS).collect();
        seqs.dedup();
        self.recount(&json_list(seqs)).await?;
        Ok(dead.len() as u64)
    }

    async fn replay(&mut self, replay: &Replay) -> Step<u64> {
        let subscription = self.subscription(&replay.subscription).await?;
        let types = read::as_json(&read::types(self.connection, &replay.pattern).await?)?;
        let mut query = QueryBuilder::<Sqlite>::new("SELECT e.seq, d.id FROM events e LEFT JOIN deliveries d");
        query.push(" ON d.id = (e.seq << 20) | ").push_bind(subscription);
        query.push(" WHERE e.type IN (SELECT value FROM json_each(").push_bind(types);
        query.push(if replay.missing_only { ")) AND d.id IS NULL" } else { ")) AND (d.id IS NULL OR d.stage >= 3)" });
        let bounds = [
            (" AND e.seq >= ", replay.from_seq.map(super::row::signed)),
            (" AND e.seq <= ", replay.to_seq.map(super::row::signed)),
            (" AND e.created_at >= ", replay.from.map(|from| from.as_microsecond())),
            (" AND e.created_at <= ", replay.to.map(|to| to.as_microsecond())),
        ];
        for (condition, bound) in bounds {
            if let Some(bound) = bound {
                query.push(condition).push_bind(bound);
            }
        }
        let stretch: Vec<(i64, Option<i64>)> = query.build_query_as().fetch_all(&mut *self.connection).await?;
        if replay.dry_run || stretch.is_empty() {
            return Ok(stretch.len() as u64);
        }
        self.reopen(&json_list(stretch.iter().filter_map(|&(_, id)| id)), true).await?;
        let missing = json_list(stretch.iter().filter(|(_, id)| id.is_none()).map(|&(seq, _)| seq));
        let deliver = "INSERT INTO deliveries (id, subscription, due, key, replay) \
            SELECT (e.seq << 20) | ?1, ?1, ?2, e.key, ?3 FROM json_each(?4) j JOIN events e ON e.seq = j.value";
        let deliver = sqlx::query(deliver).bind(subscription).bind(self.now).bind(!replay.missing_only).bind(missing);
        deliver.execute(&mut *self.connection).await?;
        self.recount(&json_list(stretch.iter().map(|&(seq, _)| seq))).await?;
        Ok(stretch.len() as u64)
    }

    async fn cancel(&mut self, name: &std::sync::Arc<str>) -> Step<u64> {
        let subscription = self.subscription(name).await?;
        let open = "SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 0 AND key IS NULL \
            UNION ALL SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 0 AND key IS NOT NULL \
            UNION ALL SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 1 \
            UNION ALL SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 2";
        let open: Vec<i64> = sqlx::query_scalar(open).bind(subscription).fetch_all(&mut *self.connection).await?;
        let ids = json_list(open.iter().copied());
        self.on_list("DELETE FROM deliveries WHERE id IN (SELECT value FROM json_each(?))", &ids).await?;
        self.on_list("DELETE FROM attempts WHERE delivery IN (SELECT value FROM json_each(?))", &ids).await?;
        self.recount(&json_list(open.iter().map(|id| id >> SUBSCRIPTION_BITS))).await?;
        Ok(open.len() as u64)
    }

    async fn erase(&mut self, id: &str) -> Step<u64> {
        let blank = "UPDATE events SET type = NULL, source = NULL, appended_at = NULL, key = NULL, user_id = NULL, \
            session_id = NULL, instance_id = NULL, schema = NULL, entity = NULL, operation = NULL, metadata = NULL, \
            trace_parent = NULL, caused_by = NULL, depth = 0, content_type = NULL, payload = NULL \
            WHERE id = ? AND type IS NOT NULL RETURNING seq";
        // What is freed is overwritten too, not only forgotten.
        sqlx::query("PRAGMA secure_delete = ON").execute(&mut *self.connection).await?;
        let seq: Option<i64> = sqlx::query_scalar(blank).bind(id).fetch_optional(&mut *self.connection).await?;
        if let Some(seq) = seq {
            self.drop_deliveries(&json_list([seq])).await?;
            sqlx::query("UPDATE head SET total = total - 1").execute(&mut *self.connection).await?;
        }
        sqlx::query("PRAGMA secure_delete = OFF").execute(&mut *self.connection).await?;
        Ok(u64::from(seq.is_some()))
    }

    async fn drop_deliveries(&mut self, seqs: &str) -> Step<()> {
        let deliveries = "DELETE FROM deliveries WHERE id IN (SELECT d.id FROM json_each(?) j \
            JOIN deliveries d ON d.id BETWEEN (j.value << 20) AND (j.value << 20) | 1048575)";
        let attempts = "DELETE FROM attempts WHERE delivery IN (SELECT a.delivery FROM json_each(?) j \
            JOIN attempts a ON a.delivery BETWEEN (j.value << 20) AND (j.value << 20) | 1048575)";
        self.on_list(deliveries, seqs).await?;
        self.on_list(attempts, seqs).await?;
        self.on_list("DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?))", seqs).await?;
        Ok(())
    }

    /// Removes some of what retention does not keep. Returns how many events went, and whether there may be more.
    pub(super) async fn prune(&mut self, retention: &Retention) -> Step<(u64, bool)> {
        super::documents::expire(self.connection, self.now).await?;
        let mut gone = 0;
        let mut is_more = false;
        if let Some(age) = retention.max_age {
            let (events, rows) = self.prune_old(age).await?;
            gone += events;
            is_more |= rows == PRUNE_STEP as u64;
        }
        if let Some(max) = retention.max_events {
            let events = self.prune_many(max).await?;
            gone += events;
            is_more |= events == PRUNE_STEP as u64;
        }
        Ok((gone, is_more))
    }

    async fn prune_old(&mut self, age: Duration) -> Step<(u64, u64)> {
        let text = "SELECT e.seq, e.type IS NOT NULL FROM events e LEFT JOIN progress p ON p.seq = e.seq \
                    WHERE e.created_at < ? AND coalesce(p.open, 0) = 0 ORDER BY e.created_at LIMIT ?";
        let instant = self.now.saturating_sub(as_micros(age));
        let query = sqlx::query_as(text).bind(instant).bind(PRUNE_STEP);
        let rows: Vec<(i64, bool)> = query.fetch_all(&mut *self.connection).await?;
        let events = rows.iter().filter(|&&(_, is_event)| is_event).count() as u64;
        self.remove(&rows.iter().map(|&(seq, _)| seq).collect::<Vec<_>>(), events).await?;
        Ok((events, rows.len() as u64))
    }

    async fn prune_many(&mut self, max: u64) -> Step<u64> {
        let text = "SELECT e.seq FROM events e LEFT JOIN progress p ON p.seq = e.seq \
                    WHERE e.type IS NOT NULL AND coalesce(p.open, 0) = 0 \
                    ORDER BY e.seq LIMIT max(0, min(?, (SELECT total FROM head) - ?))";
        let query = sqlx::query_scalar(text).bind(PRUNE_STEP).bind(super::row::signed(max));
        let seqs: Vec<i64> = query.fetch_all(&mut *self.connection).await?;
        self.remove(&seqs, seqs.len() as u64).await?;
        Ok(seqs.len() as u64)
    }

    async fn remove(&mut self, seqs: &[i64], events: u64) -> Step<()> {
        let Some(&last) = seqs.iter().max() else { return Ok(()) };
        let list = json_list(seqs.iter().copied());
        self.drop_deliveries(&list).await?;
        self.on_list("DELETE FROM events WHERE seq IN (SELECT value FROM json_each(?))", &list).await?;
        let text = "UPDATE head SET pruned = max(pruned, ?), total = total - ?";
        sqlx::query(text).bind(last).bind(super::row::signed(events)).execute(&mut *self.connection).await?;
        Ok(())
    }
}
