//! Claiming and renewing.
//!
//! Leases are committed without waiting for the disk. A crash of the server may forget them, together with whatever
//! came after them: then nobody's token stands in the row, a settlement with it is stale, and the delivery is leased
//! again. A settlement does wait for the disk, and by then so does all that was written before it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::PgRow;
use tokio::time::Instant;

use super::append::Numbers;
use super::front::{Reach, Seen};
use super::row::{self, as_micros, counter, limit, signed, unsigned};
use super::session::{Session, Statement};
use super::settle::End;
use super::trouble::Step;
use super::{Store, Turns};
use crate::event::{Event, micros};
use crate::provider::{ClaimRequest, Claimed, Lease, LeaseKey, Lost, Want, rules};
use crate::subscription::Ordering;

/// The time, and a commit that does not wait for the disk.
macro_rules! quiet_now {
    () => {
        "WITH now AS MATERIALIZED (SELECT {now} AS at, set_config('synchronous_commit', 'off', true) AS quiet)"
    };
}

/// Leases what `picked` gives and has locked: `$2` the worker, `$3` how long, `$4` what makes tokens random.
macro_rules! lease {
    () => {
        ", leased AS (UPDATE {s}.deliveries d SET stage = 2, token = $4 # ((d.seq << 20) | d.subscription), \
          claimed_at = now.at, lease_end = now.at + $3, worker = $2, fresh = d.started_at IS NULL, \
          started_at = coalesce(d.started_at, now.at) \
          FROM picked p CROSS JOIN now WHERE d.seq = ANY(ARRAY[p.seq]) AND d.subscription = p.subscription \
          RETURNING d.seq, d.subscription, d.token, d.tries, d.infra, d.number, d.replay, d.fresh, d.alone), \
         leases AS (SELECT l.seq, l.subscription, l.token, l.tries, l.infra, l.number, l.replay, \
          CASE row_number() OVER (PARTITION BY l.seq) WHEN 1 THEN l.seq END AS first FROM leased l), \
         begun AS (UPDATE {s}.progress p SET begun = p.begun + b.count FROM (SELECT seq, count(*) AS count \
          FROM leased WHERE fresh AND NOT alone GROUP BY seq ORDER BY seq) b WHERE p.seq = ANY(ARRAY[b.seq])) "
    };
}

/// A lease, with its event unless that stands beside another lease on it.
macro_rules! told {
    () => {
        "l.seq, l.subscription, l.token, l.tries, l.infra, l.number, l.replay, {event}"
    };
}

/// Leases the oldest ready deliveries of subscriptions, unless some of theirs have become due or were lost: `$5` the
/// subscriptions, `$6` the room for each, `$7` where each begins, `$8` whether to look at each for what is due or lost,
/// and `$9` whether to lease all the same.
const LEASE_OLDEST: &str = concat!(
    quiet_now!(),
    ", wants AS MATERIALIZED (SELECT * FROM unnest((SELECT $5::int[]), (SELECT $6::bigint[]), \
      (SELECT $7::bigint[]), (SELECT $8::bool[])) AS w(subscription, room, floor, looks)), \
     looks AS MATERIALIZED (SELECT \
      (SELECT min(d.due) FROM {s}.deliveries d WHERE d.subscription = w.subscription AND d.stage = 1) AS due, \
      (SELECT min(d.lease_end) FROM {s}.deliveries d WHERE d.subscription = w.subscription AND d.stage = 2) AS lease_end \
      FROM wants w WHERE w.looks), \
     look AS MATERIALIZED (SELECT min(due) AS due, min(lease_end) AS lease_end FROM looks), \
     gate AS MATERIALIZED (SELECT $9 OR (coalesce(due > at, true) AND coalesce(lease_end > at, true)) AS is_open \
      FROM look CROSS JOIN now), \
     picked AS MATERIALIZED (SELECT r.seq, r.subscription FROM wants w CROSS JOIN LATERAL (\
      SELECT c.seq, c.subscription FROM {s}.deliveries c \
      WHERE (c.subscription, c.seq) >= (w.subscription, w.floor) AND c.subscription <= w.subscription AND c.stage = 0 \
      ORDER BY c.subscription, c.seq LIMIT CASE WHEN (SELECT is_open FROM gate) THEN w.room ELSE 0 END FOR UPDATE SKIP LOCKED) r)",
    lease!(),
    "SELECT now.at, look.due, look.lease_end, ",
    told!(),
    " FROM look CROSS JOIN now LEFT JOIN leases l ON true LEFT JOIN {s}.events e ON e.seq = ANY(ARRAY[l.first])"
);

/// Leases those of a list (`$6`) that are ready still and that no earlier one of their key stands before, in a
/// subscription (`$5`), at most `$7`.
const LEASE_LIST: &str = concat!(
    quiet_now!(),
    ", picked AS MATERIALIZED (SELECT c.seq, c.subscription FROM {s}.deliveries c \
      WHERE c.subscription = $5 AND c.seq = ANY($6::bigint[]) AND c.stage = 0 AND (c.key IS NULL OR NOT EXISTS (\
      SELECT 1 FROM {s}.deliveries h WHERE h.subscription = c.subscription AND h.key = c.key AND h.key IS NOT NULL \
      AND h.stage < 3 AND h.seq < c.seq)) ORDER BY c.seq LIMIT $7 FOR UPDATE SKIP LOCKED)",
    lease!(),
    "SELECT now.at, NULL::bigint, NULL::bigint, ",
    told!(),
    " FROM now CROSS JOIN leases l LEFT JOIN {s}.events e ON e.seq = ANY(ARRAY[l.first])"
);

/// The oldest `$2` ready deliveries of a subscription, and whether each may be leased.
const HEADS: &str = "WITH few AS MATERIALIZED (SELECT seq, key FROM {s}.deliveries \
    WHERE subscription = $1 AND stage = 0 ORDER BY seq LIMIT $2) \
    SELECT f.seq, f.key IS NULL OR NOT EXISTS (SELECT 1 FROM {s}.deliveries h WHERE h.subscription = $1 \
    AND h.key = f.key AND h.key IS NOT NULL AND h.stage < 3 AND h.seq < f.seq) FROM few f";

/// The ready heads of all keys of a subscription, and the oldest `$2` ready deliveries without a key.
const KEY_BY_KEY: &str = "WITH RECURSIVE k(key) AS (\
    (SELECT key FROM {s}.deliveries WHERE subscription = $1 AND key IS NOT NULL AND stage < 3 ORDER BY key LIMIT 1) \
    UNION ALL SELECT (SELECT d.key FROM {s}.deliveries d WHERE d.subscription = $1 AND d.key > k.key \
    AND d.key IS NOT NULL AND d.stage < 3 ORDER BY d.key LIMIT 1) FROM k WHERE k.key IS NOT NULL), \
    heads AS (SELECT h.seq FROM k CROSS JOIN LATERAL (SELECT d.seq, d.stage FROM {s}.deliveries d \
    WHERE d.subscription = $1 AND d.key = k.key AND d.key IS NOT NULL AND d.stage < 3 ORDER BY d.seq LIMIT 1) h \
    WHERE h.stage = 0), \
    plain AS (SELECT seq FROM {s}.deliveries WHERE subscription = $1 AND stage = 0 AND key IS NULL \
    ORDER BY seq LIMIT $2) \
    SELECT seq FROM (SELECT seq FROM heads UNION ALL SELECT seq FROM plain) a ORDER BY seq LIMIT $2";

/// Makes ready what has become due.
const WAKE: &str = concat!(
    quiet_now!(),
    ", due AS MATERIALIZED (SELECT d.seq, d.subscription FROM unnest($2::int[]) AS w(subscription) \
      CROSS JOIN now CROSS JOIN LATERAL (SELECT c.seq, c.subscription FROM {s}.deliveries c \
      WHERE c.subscription = w.subscription AND c.stage = 1 AND c.due <= now.at ORDER BY c.due LIMIT $3 \
      FOR UPDATE SKIP LOCKED) d) \
     UPDATE {s}.deliveries d SET stage = 0 FROM due WHERE d.seq = due.seq AND d.subscription = due.subscription"
);

/// Leases that have expired.
const EXPIRED: &str = "WITH now AS MATERIALIZED (SELECT {now} AS at) \
    SELECT now.at, d.seq, d.subscription, d.token, d.number, d.infra, d.worker, d.claimed_at \
    FROM unnest($2::int[]) AS w(subscription) CROSS JOIN now CROSS JOIN LATERAL (SELECT * FROM {s}.deliveries c \
    WHERE c.subscription = w.subscription AND c.stage = 2 AND c.lease_end <= now.at ORDER BY c.lease_end LIMIT $3 \
    FOR UPDATE SKIP LOCKED) d";

const RENEW: &str = concat!(
    quiet_now!(),
    " UPDATE {s}.deliveries d SET lease_end = now.at + $2 FROM now CROSS JOIN \
      unnest($3::bigint[], $4::int[], $5::bigint[]) AS i(seq, subscription, token) \
      WHERE d.seq = i.seq AND d.subscription = i.subscription AND d.token = i.token \
      RETURNING d.seq, d.subscription, d.token"
);

/// The most deliveries of a subscription that one claim makes ready or takes from those who lost them.
const CATCH_UP: i64 = 5_000;

/// How wanted subscriptions stand.
struct Look {
    now: i64,
    due: Option<i64>,
    lease_end: Option<i64>,
}

impl Look {
    fn read(rows: &[PgRow]) -> sqlx::Result<Self> {
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        Ok(Self { now: row.try_get(0)?, due: row.try_get(1)?, lease_end: row.try_get(2)? })
    }

    fn is_past(&self) -> bool {
        [self.due, self.lease_end].into_iter().flatten().any(|at| at <= self.now)
    }
}

/// The names of subscriptions by their numbers.
type Names = HashMap<i32, Arc<str>>;

/// What is asked of one subscription.
struct Ask<'r> {
    number: i32,
    want: &'r Want,
    reach: Reach,
}

impl Ask<'_> {
    /// How much of it is leased without regard to keys.
    fn room(&self) -> i64 {
        if self.want.ordering == Ordering::Key { 0 } else { limit(self.want.room) }
    }
}

impl Store {
    /// Leases what is ready.
    pub(super) async fn claim(&self, request: &ClaimRequest) -> Step<Claimed> {
        if request.wants.is_empty() {
            return Ok(Claimed::default());
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.claim(request).await;
            if let Some(result) = turns.judge(session.finish(result).await) {
                return result;
            }
        }
    }

    /// Moves the ends of leases.
    pub(super) async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Step<Vec<bool>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.renew(keys, lease).await;
            if let Some(result) = turns.judge(session.finish(result).await) {
                return result;
            }
        }
    }

    /// How far to reach for each want, and what [`keep`](Self::keep) needs.
    fn asks<'r>(&self, request: &'r ClaimRequest, numbers: &Numbers) -> (u64, Vec<Ask<'r>>) {
        let (fronts, now, store_now) = (self.fronts(), Instant::now(), self.now());
        let ask = |want: &'r Want| {
            let number = *numbers.get(&want.subscription)?;
            Some(Ask { number, want, reach: fronts.reach(number, now, store_now) })
        };
        (fronts.generation(), request.wants.iter().filter_map(ask).collect())
    }

    /// Deliveries of these subscriptions have become ready.
    fn forget_fronts(&self, subscriptions: impl Iterator<Item = i32>) -> u64 {
        let mut fronts = self.fronts();
        fronts.forget(subscriptions);
        fronts.generation()
    }

    /// Remembers how far the ready deliveries were leased.
    fn keep(&self, generation: u64, began: Instant, look: &Look, own: i64, asks: &[Ask<'_>], leases: &[Lease]) {
        let mut leased: HashMap<&str, (i64, i64)> = HashMap::new();
        for lease in leases {
            let (count, highest) = leased.entry(&lease.key.subscription).or_default();
            (*count, *highest) = (*count + 1, (*highest).max(signed(lease.key.seq)));
        }
        let (mut fronts, mut took_all) = (self.fronts(), true);
        for ask in asks {
            let leased = leased.get(&*ask.want.subscription);
            let (last, is_full) = (leased.map(|&(_, highest)| highest), leased.map_or(0, |one| one.0) >= ask.room());
            took_all &= !is_full || ask.room() == 0;
            let known = if ask.reach.looks { [look.due, look.lease_end] } else { [ask.reach.next, None] };
            // In the order of keys more is leased afterwards.
            let leases_more = last.is_some() || ask.want.ordering == Ordering::Key;
            let next = known.into_iter().flatten().chain(leases_more.then_some(own)).min();
            let seen = Seen { subscription: ask.number, reach: ask.reach, last, is_full, next };
            fronts.keep(generation, began, look.now, seen);
        }
        self.turn.claimed(took_all);
    }

    /// A statement that leases, with the first four parameters.
    fn leasing<'q>(&self, text: &str, request: &'q ClaimRequest) -> Statement<'q> {
        let salt = signed(rand::random::<u64>() >> 1);
        let statement = self.statement(&text.replace("{event}", row::EVENT_COLUMNS));
        statement.bind(self.now()).bind(&*request.worker).bind(as_micros(request.lease)).bind(salt)
    }
}

impl Session<'_> {
    async fn claim(&mut self, request: &ClaimRequest) -> Step<Claimed> {
        let numbers = self.numbers(request.wants.iter().map(|want| &want.subscription)).await?;
        let names: Names = numbers.iter().map(|(name, &number)| (number, Arc::clone(name))).collect();
        let (mut generation, mut asks) = self.store.asks(request, &numbers);
        let mut claimed = Claimed::default();
        let mut began = Instant::now();
        let room = request.wants.iter().map(|want| want.room).fold(0, usize::saturating_add);
        let is_turn = self.store.turn.is_due(request.wants.len(), room) && self.begin_turn().await?;
        let rows = self.lease_oldest(request, &asks, false).await?;
        if is_turn {
            // Nobody has to wait until the rows are read.
            self.commit().await?;
        }
        let mut look = Look::read(&rows)?;
        read_leases(&rows, &names, &mut claimed.leases)?;
        if look.is_past() {
            claimed.lost = self.catch_up(&numbers, &names).await?;
            generation = self.store.forget_fronts(numbers.values().copied());
            asks.iter_mut().for_each(|ask| ask.reach = Reach::FULL);
            began = Instant::now();
            let rows = self.lease_oldest(request, &asks, true).await?;
            look = Look::read(&rows)?;
            read_leases(&rows, &names, &mut claimed.leases)?;
        }
        let own = look.now.saturating_add(as_micros(request.lease));
        self.store.keep(generation, began, &look, own, &asks, &claimed.leases);
        for want in request.wants.iter().filter(|want| want.ordering == Ordering::Key && want.room > 0) {
            if let Some(&number) = numbers.get(&want.subscription) {
                self.lease_heads(request, want, number, &names, &mut claimed.leases).await?;
            }
        }
        claimed.leases.sort_by(|a, b| (&a.key.subscription, a.key.seq).cmp(&(&b.key.subscription, b.key.seq)));
        let own = (!claimed.leases.is_empty()).then_some(own);
        let next = asks.iter().map(|ask| ask.reach.next).chain([look.due, look.lease_end, own]).flatten().min();
        claimed.next_due = next.map(|at| Duration::from_micros(unsigned(at.saturating_sub(look.now))));
        Ok(claimed)
    }

    /// Leases for those who want no order of keys, and looks how all stand.
    async fn lease_oldest(&mut self, request: &ClaimRequest, asks: &[Ask<'_>], all_the_same: bool) -> Step<Vec<PgRow>> {
        let statement = self
            .store
            .leasing(LEASE_OLDEST, request)
            .bind(asks.iter().map(|ask| ask.number).collect::<Vec<_>>())
            .bind(asks.iter().map(Ask::room).collect::<Vec<_>>())
            .bind(asks.iter().map(|ask| ask.reach.floor).collect::<Vec<_>>())
            .bind(asks.iter().map(|ask| ask.reach.looks).collect::<Vec<_>>())
            .bind(all_the_same);
        self.rows(statement).await
    }

    /// Leases the oldest ready deliveries that have no key, or whose key has no earlier open one.
    async fn lease_heads(
        &mut self,
        request: &ClaimRequest,
        want: &Want,
        number: i32,
        names: &Names,
        leases: &mut Vec<Lease>,
    ) -> Step<()> {
        let bound = want.room.saturating_mul(2).saturating_add(64);
        let rows = self.rows(self.store.statement(HEADS).bind(number).bind(limit(bound))).await?;
        let mut heads: Vec<i64> = Vec::new();
        for row in &rows {
            if row.try_get(1)? {
                heads.push(row.try_get(0)?);
            }
        }
        if heads.len() < want.room && rows.len() == bound {
            // Most of what is ready waits for its key: then it is cheaper to go from key to key.
            let rows = self.rows(self.store.statement(KEY_BY_KEY).bind(number).bind(limit(bound))).await?;
            heads = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        }
        if heads.is_empty() {
            return Ok(());
        }
        let statement = self.store.leasing(LEASE_LIST, request).bind(number).bind(heads).bind(limit(want.room));
        let rows = self.rows(statement).await?;
        Ok(read_leases(&rows, names, leases)?)
    }

    /// Makes ready what has become due, and takes away leases that have expired.
    async fn catch_up(&mut self, numbers: &Numbers, names: &Names) -> Step<Vec<Lost>> {
        let subscriptions: Vec<i32> = numbers.values().copied().collect();
        let wake = self.store.statement(WAKE).bind(self.store.now()).bind(subscriptions.clone()).bind(CATCH_UP);
        self.execute(wake).await?;
        self.begin().await?;
        let expired = self.store.statement(EXPIRED).bind(self.store.now()).bind(subscriptions).bind(CATCH_UP);
        let rows = self.rows(expired).await?;
        let (mut ends, mut lost) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        for row in &rows {
            let (now, number): (i64, i32) = (row.try_get(0)?, row.try_get(2)?);
            let (seq, token): (i64, i64) = (row.try_get(1)?, row.try_get(3)?);
            let worker = row.try_get::<Option<&str>, _>(6)?.unwrap_or_default().into();
            let claimed_at = micros(row.try_get::<Option<i64>, _>(7)?.unwrap_or(now));
            let attempt = rules::lost_attempt(counter(row, 4)? + 1, worker, claimed_at, micros(now));
            let next = rules::lost_next(counter(row, 5)? + 1);
            ends.push(End::new(seq, number, token, next, Some(&attempt)));
            let subscription = names.get(&number).map(Arc::clone).unwrap_or_default();
            lost.push(Lost { key: LeaseKey { seq: unsigned(seq), subscription, token: token.cast_unsigned() }, next });
        }
        ends.sort_by_key(End::place);
        self.end(&ends).await?;
        self.commit().await?;
        Ok(lost)
    }

    async fn renew(&mut self, keys: &[LeaseKey], lease: Duration) -> Step<Vec<bool>> {
        let numbers = self.known_numbers(keys.iter().map(|key| &key.subscription)).await?;
        let place = |key: &LeaseKey| {
            let number = numbers.get(&key.subscription).copied();
            number.map(|number| (signed(key.seq), number, key.token.cast_signed()))
        };
        let mut wanted: Vec<(i64, i32, i64)> = keys.iter().filter_map(place).collect();
        wanted.sort_unstable();
        let statement = self.store.statement(RENEW).bind(self.store.now()).bind(as_micros(lease));
        let statement = statement
            .bind(wanted.iter().map(|one| one.0).collect::<Vec<_>>())
            .bind(wanted.iter().map(|one| one.1).collect::<Vec<_>>())
            .bind(wanted.iter().map(|one| one.2).collect::<Vec<_>>());
        let rows = self.rows(statement).await?;
        let held = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)));
        let held: std::collections::HashSet<(i64, i32, i64)> = held.collect::<sqlx::Result<_>>()?;
        Ok(keys.iter().map(|key| place(key).is_some_and(|place| held.contains(&place))).collect())
    }
}

/// Adds the leases of these rows. One event goes to many subscriptions, mostly at the same time, and comes once.
fn read_leases(rows: &[PgRow], names: &Names, leases: &mut Vec<Lease>) -> sqlx::Result<()> {
    const LEASE: usize = 3;
    const EVENT: usize = LEASE + 7;
    let mut events: HashMap<i64, (Arc<Event>, i64)> = HashMap::with_capacity(rows.len());
    for row in rows {
        if let Some(seq) = row.try_get::<Option<i64>, _>(EVENT)? {
            events.insert(seq, (Arc::new(row::event(row, EVENT)?), row.try_get(EVENT + 5)?));
        }
    }
    leases.reserve(rows.len());
    for row in rows {
        let Some(seq) = row.try_get::<Option<i64>, _>(LEASE)? else { continue };
        let (now, number, token): (i64, i32, i64) = (row.try_get(0)?, row.try_get(LEASE + 1)?, row.try_get(LEASE + 2)?);
        // What has no event in a damaged store keeps nothing else from being leased; its own lease runs out.
        let Some((event, appended_at)) = events.get(&seq) else { continue };
        let subscription = names.get(&number).map(Arc::clone).unwrap_or_default();
        leases.push(Lease {
            key: LeaseKey { seq: unsigned(seq), subscription, token: token.cast_unsigned() },
            event: Arc::clone(event),
            attempt: counter(row, LEASE + 3)? + 1,
            infra_faults: counter(row, LEASE + 4)?,
            number: counter(row, LEASE + 5)? + 1,
            age: Duration::from_micros(unsigned(now.saturating_sub(*appended_at))),
            is_replay: row.try_get(LEASE + 6)?,
        });
    }
    Ok(())
}
