//! Claiming and renewing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::row::{EVENT_COLUMNS, SUBSCRIPTION_BITS, counter, delivery_id, event, seq_of, signed, unsigned};
use super::settle::End;
use super::statement::{Values, json_list};
use super::writer::{Step, Tx, as_micros};
use crate::delivery::Next;
use crate::event::micros;
use crate::provider::recent::Stored;
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
/// A first claim begins an event.
const BEGIN: &str = "UPDATE progress SET begun = begun + 1 WHERE seq IN (SELECT value FROM json_each(?))";
const RENEW: Values = Values {
    head: "WITH v(id, token, lease_end) AS (VALUES",
    columns: 3,
    tail: ") UPDATE deliveries SET lease_end = v.lease_end FROM v \
           WHERE deliveries.id = v.id AND deliveries.stage = 2 AND deliveries.token = v.token RETURNING id, deliveries.token",
};

/// Leases the deliveries that a query gives: `?1` now, `?2` the leases' end, `?3` the worker, `?4` what makes tokens
/// random, and `?5` on the query's own. Answers with ids, and whether each is as it was appended; to ask for more columns,
/// which are mostly 0, would cost a quarter of it all.
macro_rules! lease {
    ($ids:literal) => {
        concat!(
            "UPDATE deliveries SET stage = 2, token = ?4 + id, claimed_at = ?1, lease_end = ?2, worker = ?3, ",
            "fresh = started_at IS NULL, started_at = coalesce(started_at, ?1) WHERE id IN (",
            $ids,
            ") RETURNING id, fresh AND number = 0 AND NOT replay"
        )
    };
}

/// The oldest ready ones.
const LEASE_OLDEST: &str = lease!(
    "SELECT id FROM (SELECT id FROM deliveries WHERE subscription = ?5 AND stage = 0 AND key IS NULL \
     ORDER BY id LIMIT ?6) UNION ALL SELECT id FROM (SELECT id FROM deliveries \
     WHERE subscription = ?5 AND stage = 0 AND key IS NOT NULL ORDER BY id LIMIT ?6) ORDER BY id LIMIT ?6"
);
/// Those of a list.
const LEASE_LIST: &str = lease!("SELECT value FROM json_each(?5)");

/// The ready heads of all keys of a subscription.
const KEY_BY_KEY: &str = "WITH RECURSIVE k(key) AS (\
    SELECT min(key) FROM deliveries WHERE subscription = ?1 AND key IS NOT NULL AND stage < 3 UNION ALL \
    SELECT (SELECT min(key) FROM deliveries WHERE subscription = ?1 AND key > k.key AND key IS NOT NULL AND stage < 3) \
    FROM k WHERE k.key IS NOT NULL) \
    SELECT d.id FROM k JOIN deliveries d ON d.id = (SELECT min(h.id) FROM deliveries h \
    WHERE h.subscription = ?1 AND h.key = k.key AND h.key IS NOT NULL AND h.stage < 3) \
    WHERE d.stage = 0 ORDER BY d.id LIMIT ?2";

fn as_limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

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

/// A delivery that was just leased.
struct Leased {
    id: i64,
    token: u64,
    past: Past,
}

/// What a delivery has behind it.
struct Past {
    /// Whether this is its first claim.
    is_first: bool,
    tries: u32,
    infra: u32,
    number: u32,
    is_replay: bool,
}

impl Past {
    const NONE: Self = Self { is_first: true, tries: 0, infra: 0, number: 0, is_replay: false };

    fn read(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            is_first: row.try_get(1)?,
            tries: counter(row, 2)?,
            infra: counter(row, 3)?,
            number: counter(row, 4)?,
            is_replay: row.try_get(5)?,
        })
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
        for look in looks.iter().filter(|look| look.is_ready) {
            if let Some(want) = request.wants.get(look.at) {
                claimed.leases.extend(self.take(request, look.subscription, want).await?);
            }
        }
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

    async fn take(&mut self, request: &ClaimRequest, subscription: i64, want: &Want) -> Step<Vec<Lease>> {
        let leased = self.lease(request, subscription, want).await?;
        let begun = leased.iter().filter(|one| one.past.is_first).map(|one| one.id >> SUBSCRIPTION_BITS);
        sqlx::query(BEGIN).bind(json_list(begun)).execute(&mut *self.connection).await?;
        let events = self.events(&leased).await?;
        let lease = |(one, stored): (&Leased, Option<Stored>)| {
            let Stored { event, appended_at } = stored?;
            let (seq, subscription) = (seq_of(one.id), Arc::clone(&want.subscription));
            Some(Lease {
                event,
                key: LeaseKey { seq, subscription, token: one.token },
                attempt: one.past.tries + 1,
                number: one.past.number + 1,
                infra_faults: one.past.infra,
                age: Duration::from_micros(unsigned(self.now - appended_at)),
                is_replay: one.past.is_replay,
            })
        };
        Ok(leased.iter().zip(events).filter_map(lease).collect())
    }

    /// Leases the oldest ready deliveries, and returns them in the order of their events.
    async fn lease(&mut self, request: &ClaimRequest, subscription: i64, want: &Want) -> Step<Vec<Leased>> {
        let (end, salt) = (self.now.saturating_add(as_micros(request.lease)), signed(rand::random::<u64>() >> 2));
        let query = match want.ordering {
            Ordering::None => sqlx::query(LEASE_OLDEST),
            Ordering::Key => sqlx::query(LEASE_LIST),
        };
        let query = query.bind(self.now).bind(end).bind(&*request.worker).bind(salt);
        let query = match want.ordering {
            Ordering::None => query.bind(subscription).bind(as_limit(want.room)),
            Ordering::Key => query.bind(json_list(self.heads(subscription, want.room).await?)),
        };
        let rows = query.fetch_all(&mut *self.connection).await?;
        let mut leased = Vec::with_capacity(rows.len());
        for row in &rows {
            leased.push((row.try_get(0)?, row.try_get(1)?));
        }
        leased.sort_unstable();
        let again = json_list(leased.iter().filter(|(_, is_new)| !is_new).map(|&(id, _)| id));
        let mut pasts = self.pasts(&again).await?;
        let with_past = |(id, _): (i64, bool)| {
            let past = pasts.remove(&id).unwrap_or(Past::NONE);
            Leased { id, token: unsigned(salt + id), past }
        };
        Ok(leased.into_iter().map(with_past).collect())
    }

    /// What became of these deliveries before.
    async fn pasts(&mut self, ids: &str) -> Step<HashMap<i64, Past>> {
        if ids == "[]" {
            return Ok(HashMap::new());
        }
        let text = "SELECT d.id, d.fresh, d.tries, d.infra, d.number, d.replay FROM json_each(?) j \
                    JOIN deliveries d ON d.id = j.value";
        let rows = sqlx::query(text).bind(ids).fetch_all(&mut *self.connection).await?;
        Ok(rows.iter().map(|row| Ok((row.try_get(0)?, Past::read(row)?))).collect::<sqlx::Result<_>>()?)
    }

    /// The events of these deliveries: from memory what is there, the rest from the file.
    async fn events(&mut self, leased: &[Leased]) -> Step<Vec<Option<Stored>>> {
        let mut events: Vec<Option<Stored>> = leased.iter().map(|one| self.recent.claim(seq_of(one.id))).collect();
        let missing = |(at, _): &(usize, _)| events.get(*at).is_some_and(Option::is_none);
        let missing: Vec<(usize, i64)> =
            leased.iter().map(|one| one.id >> SUBSCRIPTION_BITS).enumerate().filter(missing).collect();
        if missing.is_empty() {
            return Ok(events);
        }
        let text = format!("SELECT {EVENT_COLUMNS} FROM json_each(?) j CROSS JOIN events e ON e.seq = j.value");
        let list = json_list(missing.iter().map(|&(_, seq)| seq));
        let rows = sqlx::query(AssertSqlSafe(text)).bind(list).fetch_all(&mut *self.connection).await?;
        let mut rows = rows.iter().peekable();
        for (at, seq) in missing {
            let Some(row) = rows.next_if(|row| row.try_get::<i64, _>(0).is_ok_and(|found| found == seq)) else {
                continue;
            };
            let stored = Stored { event: Arc::new(event(row, 0)?), appended_at: row.try_get(5)? };
            if let Some(place) = events.get_mut(at) {
                *place = Some(stored);
            }
        }
        Ok(events)
    }

    /// The oldest ready deliveries that have no key, or whose key has no earlier open one.
    async fn heads(&mut self, subscription: i64, room: usize) -> Step<Vec<i64>> {
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
        Ok(ids)
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
