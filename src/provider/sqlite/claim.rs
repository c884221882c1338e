//! Claiming and renewing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::row::{EVENT_COLUMNS, counter, delivery_id, event, seq_of, unsigned};
use super::settle::End;
use super::statement::{Values, json_list};
use super::writer::{Step, Tx, as_micros};
use crate::delivery::Next;
use crate::event::micros;
use crate::provider::{ClaimRequest, Claimed, Lease, LeaseKey, Lost, Want, rules};
use crate::subscription::Ordering;

const LOOK: Values = Values {
    head: "WITH v(at, subscription) AS (VALUES",
    columns: 2,
    tail: ") SELECT v.at, v.subscription, \
           EXISTS (SELECT 1 FROM deliveries d WHERE d.subscription = v.subscription AND d.stage = 0 AND d.key IS NULL) \
           OR EXISTS (SELECT 1 FROM deliveries d \
                      WHERE d.subscription = v.subscription AND d.stage = 0 AND d.key IS NOT NULL), \
           (SELECT min(d.due) FROM deliveries d WHERE d.subscription = v.subscription AND d.stage = 1), \
           (SELECT min(d.lease_end) FROM deliveries d WHERE d.subscription = v.subscription AND d.stage = 2) FROM v",
};
const LEASE: Values = Values {
    head: "WITH v(id, token, claimed_at, lease_end, worker) AS (VALUES",
    columns: 5,
    tail: ") UPDATE deliveries SET stage = 2, token = v.token, claimed_at = v.claimed_at, lease_end = v.lease_end, \
           worker = v.worker, fresh = started_at IS NULL, started_at = coalesce(started_at, v.claimed_at) \
           FROM v WHERE deliveries.id = v.id",
};
const BEGIN: Values = Values {
    head: "WITH v(seq, begun) AS (VALUES",
    columns: 2,
    tail: ") UPDATE progress SET begun = progress.begun + v.begun FROM v WHERE progress.seq = v.seq",
};
const RENEW: Values = Values {
    head: "WITH v(id, token, lease_end) AS (VALUES",
    columns: 3,
    tail: ") UPDATE deliveries SET lease_end = v.lease_end FROM v \
           WHERE deliveries.id = v.id AND deliveries.stage = 2 AND deliveries.token = v.token RETURNING id, deliveries.token",
};

/// The ready heads of all keys of a subscription.
const KEY_BY_KEY: &str = "WITH RECURSIVE k(key) AS (\
    SELECT min(key) FROM deliveries WHERE subscription = ?1 AND key IS NOT NULL AND stage < 3 UNION ALL \
    SELECT (SELECT min(key) FROM deliveries WHERE subscription = ?1 AND key > k.key AND key IS NOT NULL AND stage < 3) \
    FROM k WHERE k.key IS NOT NULL) \
    SELECT d.id FROM k JOIN deliveries d ON d.id = (SELECT min(h.id) FROM deliveries h \
    WHERE h.subscription = ?1 AND h.key = k.key AND h.key IS NOT NULL AND h.stage < 3) \
    WHERE d.stage = 0 ORDER BY d.id LIMIT ?2";

/// A query for deliveries whose ids `ids` gives, oldest first, with their events.
fn with_events(ids: &str) -> String {
    format!(
        "SELECT d.id, d.tries, d.infra, d.number, d.replay, d.started_at IS NULL, {EVENT_COLUMNS} FROM ({ids}) r \
         CROSS JOIN deliveries d ON d.id = r.id CROSS JOIN events e ON e.seq = d.id >> 20 ORDER BY d.id"
    )
}

fn as_limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The columns before the event's.
const OWN_COLUMNS: usize = 6;

/// How a wanted subscription stands.
struct Look {
    at: usize,
    subscription: i64,
    is_ready: bool,
    due: Option<i64>,
    lease_end: Option<i64>,
}

impl Look {
    fn read(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            at: usize::try_from(row.try_get::<i64, _>(0)?).unwrap_or(usize::MAX),
            subscription: row.try_get(1)?,
            is_ready: row.try_get(2)?,
            due: row.try_get(3)?,
            lease_end: row.try_get(4)?,
        })
    }

    fn is_past(&self, now: i64) -> bool {
        self.due.is_some_and(|due| due <= now) || self.lease_end.is_some_and(|end| end <= now)
    }
}

impl Tx<'_> {
    /// Leases what is ready.
    pub(super) async fn claim(&mut self, request: &ClaimRequest) -> Step<Claimed> {
        let mut wants = Vec::with_capacity(request.wants.len());
        for (at, want) in request.wants.iter().enumerate() {
            wants.push((at as i64, self.subscription(&want.subscription).await?));
        }
        let mut looks = self.look(&wants).await?;
        let mut claimed = Claimed::default();
        if looks.iter().any(|look| look.is_past(self.now)) {
            for look in &looks {
                if let Some(want) = request.wants.get(look.at) {
                    claimed.lost.extend(self.catch_up(look, want).await?);
                }
            }
            looks = self.look(&wants).await?;
        }
        let mut begun = BTreeMap::new();
        for look in looks.iter().filter(|look| look.is_ready) {
            if let Some(want) = request.wants.get(look.at) {
                claimed.leases.extend(self.take(look.subscription, want, &mut begun).await?);
            }
        }
        self.lease(request, &wants, &claimed.leases).await?;
        let begun: Vec<(i64, i64)> = begun.into_iter().collect();
        BEGIN
            .execute(self.connection, &begun, |&(seq, begun), to| {
                to.add(seq).add(begun);
            })
            .await?;
        let own = (!claimed.leases.is_empty()).then(|| self.now.saturating_add(as_micros(request.lease)));
        let next = looks.iter().flat_map(|look| [look.due, look.lease_end]).flatten().chain(own).min();
        claimed.next_due = next.map(|at| Duration::from_micros(unsigned(at.saturating_sub(self.now))));
        Ok(claimed)
    }

    async fn look(&mut self, wants: &[(i64, i64)]) -> Step<Vec<Look>> {
        let rows = LOOK
            .fetch(self.connection, wants, |&(at, id), to| {
                to.add(at).add(id);
            })
            .await?;
        Ok(rows.iter().map(Look::read).collect::<sqlx::Result<_>>()?)
    }

    /// Makes ready what has become due, and takes away leases that have expired.
    async fn catch_up(&mut self, look: &Look, want: &Want) -> Step<Vec<Lost>> {
        if look.due.is_some_and(|due| due <= self.now) {
            let ready = "UPDATE deliveries SET stage = 0 WHERE subscription = ? AND stage = 1 AND due <= ?";
            sqlx::query(ready).bind(look.subscription).bind(self.now).execute(&mut *self.connection).await?;
        }
        if look.lease_end.is_none_or(|end| end > self.now) {
            return Ok(Vec::new());
        }
        let expired = "SELECT id, token, number, infra, worker, claimed_at FROM deliveries \
                       WHERE subscription = ? AND stage = 2 AND lease_end <= ?";
        let rows = sqlx::query(expired).bind(look.subscription).bind(self.now).fetch_all(&mut *self.connection).await?;
        let now = self.now;
        let lost = rows.iter().map(|row| {
            let (number, infra) = (counter(row, 2)? + 1, counter(row, 3)? + 1);
            let worker = row.try_get::<Option<&str>, _>(4)?.unwrap_or_default().into();
            let attempt = rules::lost_attempt(number, worker, micros(row.try_get(5)?), micros(now));
            let (id, token, next): (i64, i64, Next) = (row.try_get(0)?, row.try_get(1)?, rules::lost_next(infra));
            let subscription = Arc::clone(&want.subscription);
            let key = LeaseKey { seq: seq_of(id), subscription, token: token.cast_unsigned() };
            Ok((End::new(id, token, next, Some(&attempt), now), Lost { key, next }))
        });
        let (ends, lost): (Vec<End>, Vec<Lost>) = lost.collect::<sqlx::Result<Vec<_>>>()?.into_iter().unzip();
        self.end(&ends).await?;
        Ok(lost)
    }

    async fn take(&mut self, subscription: i64, want: &Want, begun: &mut BTreeMap<i64, i64>) -> Step<Vec<Lease>> {
        let rows = match want.ordering {
            Ordering::None => self.oldest(subscription, want.room).await?,
            Ordering::Key => self.heads(subscription, want.room).await?,
        };
        let mut leases = Vec::with_capacity(rows.len());
        for row in &rows {
            let id: i64 = row.try_get(0)?;
            if row.try_get(5)? {
                *begun.entry(id >> super::row::SUBSCRIPTION_BITS).or_insert(0) += 1;
            }
            let appended_at: i64 = row.try_get(OWN_COLUMNS + 5)?;
            let key = LeaseKey {
                seq: seq_of(id),
                subscription: Arc::clone(&want.subscription),
                token: rand::random::<u64>() >> 1,
            };
            leases.push(Lease {
                event: Arc::new(event(row, OWN_COLUMNS)?),
                key,
                attempt: counter(row, 1)? + 1,
                number: counter(row, 3)? + 1,
                infra_faults: counter(row, 2)?,
                age: Duration::from_micros(unsigned(self.now - appended_at)),
                is_replay: row.try_get(4)?,
            });
        }
        Ok(leases)
    }

    /// The oldest ready deliveries with their events.
    async fn oldest(&mut self, subscription: i64, room: usize) -> Step<Vec<SqliteRow>> {
        let text = with_events(
            "SELECT id FROM (SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 0 AND key IS NULL \
             ORDER BY id LIMIT ?2) UNION ALL SELECT id FROM (SELECT id FROM deliveries \
             WHERE subscription = ?1 AND stage = 0 AND key IS NOT NULL ORDER BY id LIMIT ?2) ORDER BY id LIMIT ?2",
        );
        let query = sqlx::query(AssertSqlSafe(text)).bind(subscription).bind(as_limit(room));
        Ok(query.fetch_all(&mut *self.connection).await?)
    }

    /// The oldest ready deliveries that have no key, or whose key has no earlier open one, with their events.
    async fn heads(&mut self, subscription: i64, room: usize) -> Step<Vec<SqliteRow>> {
        let plain =
            "SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 0 AND key IS NULL ORDER BY id LIMIT ?2";
        let mut ids = self.ids(plain, subscription, room).await?;
        let few =
            "SELECT id FROM deliveries WHERE subscription = ?1 AND stage = 0 AND key IS NOT NULL ORDER BY id LIMIT ?2";
        let bound = room.saturating_mul(2).saturating_add(64);
        let ready = self.ids(few, subscription, bound).await?;
        let mut heads = self.heads_among(&ready).await?;
        if heads.len() < room && ready.len() == bound {
            // Most of what is ready waits for its key: then it is cheaper to go from key to key.
            heads = self.ids(KEY_BY_KEY, subscription, usize::MAX).await?;
        }
        ids.append(&mut heads);
        ids.sort_unstable();
        ids.truncate(room);
        let text = with_events("SELECT value AS id FROM json_each(?1)");
        Ok(sqlx::query(AssertSqlSafe(text)).bind(json_list(ids)).fetch_all(&mut *self.connection).await?)
    }

    async fn ids(&mut self, text: &'static str, subscription: i64, limit: usize) -> Step<Vec<i64>> {
        let query = sqlx::query_scalar(text).bind(subscription).bind(as_limit(limit));
        Ok(query.fetch_all(&mut *self.connection).await?)
    }

    /// Those of these deliveries that no earlier open one of their key stands before.
    async fn heads_among(&mut self, ready: &[i64]) -> Step<Vec<i64>> {
        if ready.is_empty() {
            return Ok(Vec::new());
        }
        let text = "SELECT d.id FROM json_each(?) j JOIN deliveries d ON d.id = j.value WHERE NOT EXISTS \
            (SELECT 1 FROM deliveries h INDEXED BY deliveries_keyed WHERE h.subscription = d.subscription \
             AND h.key = d.key AND h.key IS NOT NULL AND h.stage < 3 AND h.id < d.id)";
        let query = sqlx::query_scalar(text).bind(json_list(ready.iter().copied()));
        Ok(query.fetch_all(&mut *self.connection).await?)
    }

    async fn lease(&mut self, request: &ClaimRequest, wants: &[(i64, i64)], leases: &[Lease]) -> Step<()> {
        let end = self.now.saturating_add(as_micros(request.lease));
        let ids: BTreeMap<&str, i64> =
            request.wants.iter().map(|want| &*want.subscription).zip(wants.iter().map(|want| want.1)).collect();
        let now = self.now;
        let bind = |lease: &Lease, to: &mut super::statement::Parameters| {
            let subscription = ids.get(&*lease.key.subscription).copied().unwrap_or_default();
            to.add(delivery_id(lease.key.seq, subscription)).add(lease.key.token.cast_signed());
            to.add(now).add(end).add(&*request.worker);
        };
        LEASE.execute(self.connection, leases, bind).await?;
        Ok(())
    }

    /// Moves the ends of leases.
    pub(super) async fn renew(&mut self, keys: &[LeaseKey], lease: Duration) -> Step<Vec<bool>> {
        let end = self.now.saturating_add(as_micros(lease));
        let mut rows = Vec::with_capacity(keys.len());
        for key in keys {
            let subscription = self.subscription(&key.subscription).await?;
            rows.push((delivery_id(key.seq, subscription), key.token.cast_signed()));
        }
        let renewed = RENEW
            .fetch(self.connection, &rows, |&(id, token), to| {
                to.add(id).add(token).add(end);
            })
            .await?;
        let held = renewed.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        let held: std::collections::HashSet<(i64, i64)> = held.collect::<sqlx::Result<_>>()?;
        Ok(rows.iter().map(|row| held.contains(row)).collect())
    }
}
