//! What operators change: redrive, replay, cancel, erase, prune.
//!
//! One of these at a time, whatever the number of processes. They are rare, so the counts of the events that are touched
//! are made anew from their deliveries, which are locked for it: whoever settles or claims them meanwhile waits.

use std::time::Duration;

use sqlx::{QueryBuilder, Row as _};

use super::row::{as_micros, signed};
use super::session::Session;
use super::trouble::Step;
use super::{Store, Turns};
use crate::provider::{Amendment, DeadLetterFilter, Replay, Retention};

/// How many events one step of a prune removes: others get their turn in between.
const PRUNE_STEP: i64 = 1_000;

/// Locks all deliveries of events.
const LOCK: &str = "SELECT count(*) FROM (SELECT 1 FROM unnest($1::bigint[]) AS i(seq) JOIN {s}.deliveries d ON d.seq = i.seq \
    ORDER BY d.seq, d.subscription FOR UPDATE OF d) locked";
const ACCOMPANY: &str = "UPDATE {s}.deliveries d SET alone = false FROM unnest($1::bigint[]) AS i(seq) WHERE d.seq = i.seq \
    AND d.alone AND EXISTS (SELECT 1 FROM {s}.deliveries o WHERE o.seq = d.seq AND o.subscription <> d.subscription)";
const FORGET: &str = "DELETE FROM {s}.progress p USING unnest($1::bigint[]) AS i(seq) WHERE p.seq = i.seq";
const RECOUNT: &str = "INSERT INTO {s}.progress (seq, open, begun, failed) SELECT d.seq, \
    count(*) FILTER (WHERE d.stage < 3), count(*) FILTER (WHERE d.started_at IS NOT NULL), \
    count(*) FILTER (WHERE d.stage = 4) FROM unnest($1::bigint[]) AS i(seq) JOIN {s}.deliveries d ON d.seq = i.seq \
    GROUP BY d.seq HAVING bool_or(NOT d.alone)";
const REOPEN: &str = "UPDATE {s}.deliveries d SET stage = 0, due = {now}, completed_at = NULL, tries = 0, infra = 0, \
    replay = d.replay OR $2 FROM unnest($3::bigint[], $4::int[]) AS i(seq, subscription) \
    WHERE d.seq = i.seq AND d.subscription = i.subscription AND d.stage >= 3";
const DELIVER: &str = "INSERT INTO {s}.deliveries (seq, subscription, due, key, alone, replay) \
    SELECT e.seq, $2, {now}, e.key, NOT EXISTS (SELECT 1 FROM {s}.deliveries o WHERE o.seq = e.seq), $3 \
    FROM unnest($4::bigint[]) AS i(seq) JOIN {s}.events e ON e.seq = i.seq";
const OPEN: &str = "SELECT seq FROM {s}.deliveries WHERE subscription = $1 AND stage = 0 UNION ALL \
    SELECT seq FROM {s}.deliveries WHERE subscription = $1 AND stage = 1 UNION ALL \
    SELECT seq FROM {s}.deliveries WHERE subscription = $1 AND stage = 2";
const CANCEL: &str = "DELETE FROM {s}.deliveries d USING unnest($1::bigint[]) AS i(seq) \
    WHERE d.seq = i.seq AND d.subscription = $2 AND d.stage < 3 RETURNING d.seq";
const DROP_ATTEMPTS: &str = "DELETE FROM {s}.attempts a USING unnest($1::bigint[]) AS i(seq) \
    WHERE a.seq = i.seq AND a.subscription = $2";
const BLANK: &str = "UPDATE {s}.events SET type = NULL, source = NULL, appended_at = NULL, key = NULL, user_id = NULL, \
    session_id = NULL, instance_id = NULL, schema = NULL, entity = NULL, operation = NULL, metadata = NULL, \
    trace_parent = NULL, caused_by = NULL, depth = 0, content_type = NULL, payload = NULL \
    WHERE id = $1 AND type IS NOT NULL RETURNING seq";
const DROP: [&str; 3] = [
    "DELETE FROM {s}.attempts a USING unnest($1::bigint[]) AS i(seq) WHERE a.seq = i.seq",
    "DELETE FROM {s}.deliveries d USING unnest($1::bigint[]) AS i(seq) WHERE d.seq = i.seq",
    FORGET,
];
const DROP_EVENTS: &str = "DELETE FROM {s}.events e USING unnest($1::bigint[]) AS i(seq) WHERE e.seq = i.seq";
const COUNT_OFF: &str = "UPDATE {s}.head SET pruned = greatest(pruned, $1), total = total - $2";

/// Finished events that were made before an instant, oldest first, after a place. As a subquery the instant is found out once
/// and leads the index, and is not compared with every event.
pub(super) const OLD: &str = "SELECT e.seq, e.type IS NOT NULL, e.created_at FROM {s}.events e \
    WHERE e.created_at < (SELECT {now} - $2) AND (e.created_at, e.seq) > ($3, $4) AND NOT EXISTS (SELECT 1 FROM {s}.deliveries d \
    WHERE d.seq = e.seq AND d.stage < 3) ORDER BY e.created_at, e.seq LIMIT $5";
/// The oldest finished events after a place, as many as there are too many.
const MANY: &str = "SELECT e.seq, true, 0::bigint FROM {s}.events e WHERE e.seq > $1 AND e.type IS NOT NULL AND NOT EXISTS \
    (SELECT 1 FROM {s}.deliveries d WHERE d.seq = e.seq AND d.stage < 3) ORDER BY e.seq \
    LIMIT greatest(0, least($2, (SELECT total FROM {s}.head) - $3))";

/// Where a prune has come to: the age and seq of the last event that it removed.
#[derive(Clone, Copy)]
struct Place {
    created_at: i64,
    seq: i64,
}

impl Store {
    /// Carries out an operator's change.
    pub(super) async fn amend(&self, amendment: &Amendment) -> Step<u64> {
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.amend(amendment).await;
            let result = session.finish(result).await;
            self.fronts().forget_all();
            if let Some(result) = turns.judge(result) {
                return result;
            }
        }
    }

    /// Removes what retention does not keep, step by step.
    pub(super) async fn prune(&self, retention: &Retention) -> Step<u64> {
        self.expire().await?;
        let mut gone = 0;
        if let Some(age) = retention.max_age {
            gone += self.prune_all(Some(age), 0).await?;
        }
        if let Some(max) = retention.max_events {
            gone += self.prune_all(None, max).await?;
        }
        Ok(gone)
    }

    /// Removes finished events older than `age`, or the oldest beyond `max`.
    async fn prune_all(&self, age: Option<Duration>, max: u64) -> Step<u64> {
        let (mut gone, mut turns) = (0, Turns::default());
        let mut place = Place { created_at: i64::MIN, seq: 0 };
        loop {
            let mut session = self.session().await?;
            let result = session.prune_step(age, max, place).await;
            match turns.judge(session.finish(result).await) {
                None => {}
                Some(Err(trouble)) => return Err(trouble),
                Some(Ok((events, Some(last)))) => {
                    gone += events;
                    (place, turns) = (last, Turns::default());
                }
                Some(Ok((events, None))) => return Ok(gone + events),
            }
        }
    }
}

impl Session<'_> {
    async fn amend(&mut self, amendment: &Amendment) -> Step<u64> {
        let numbers = match amendment {
            Amendment::Replay(replay) => self.numbers(std::iter::once(&replay.subscription)).await?,
            Amendment::Cancel { subscription } => self.known_numbers(std::iter::once(subscription)).await?,
            Amendment::Redrive(_) | Amendment::Erase { .. } => super::append::Numbers::new(),
        };
        let number = numbers.values().next().copied();
        self.begin_operating().await?;
        let changed = match amendment {
            Amendment::Redrive(filter) => self.redrive(filter).await?,
            Amendment::Replay(replay) => self.replay(replay, number.unwrap_or_default()).await?,
            Amendment::Cancel { .. } => match number {
                Some(number) => self.cancel(number).await?,
                None => 0,
            },
            Amendment::Erase { id } => self.erase(id).await?,
        };
        self.commit().await?;
        Ok(changed)
    }

    /// Executes a statement whose one parameter is a list of seqs.
    async fn on_seqs(&mut self, text: &str, seqs: &[i64]) -> Step<u64> {
        self.execute(self.store.statement(text).bind(seqs.to_vec())).await
    }

    async fn lock(&mut self, seqs: &[i64]) -> Step<()> {
        self.on_seqs(LOCK, seqs).await.map(drop)
    }

    /// Counts events anew whose deliveries are locked.
    async fn recount(&mut self, seqs: &[i64]) -> Step<()> {
        for text in [ACCOMPANY, FORGET, RECOUNT] {
            self.on_seqs(text, seqs).await?;
        }
        Ok(())
    }

    async fn reopen(&mut self, deliveries: &[(i64, i32)], is_replay: bool) -> Step<()> {
        let (seqs, numbers): (Vec<i64>, Vec<i32>) = deliveries.iter().copied().unzip();
        let statement = self.store.statement(REOPEN).bind(self.store.now()).bind(is_replay).bind(seqs).bind(numbers);
        self.execute(statement).await.map(drop)
    }

    async fn redrive(&mut self, filter: &DeadLetterFilter) -> Step<u64> {
        // Dead deliveries stay dead until an operator changes them, and there is one operator at a time.
        let dead = self.dead(filter, filter.bound()).await?;
        let mut seqs: Vec<i64> = dead.iter().map(|&(seq, ..)| seq).collect();
        seqs.sort_unstable();
        seqs.dedup();
        self.lock(&seqs).await?;
        let deliveries: Vec<(i64, i32)> = dead.iter().map(|&(seq, number, _)| (seq, number)).collect();
        self.reopen(&deliveries, false).await?;
        self.recount(&seqs).await?;
        Ok(dead.len() as u64)
    }

    /// The events of a stretch that a replay concerns, and whether each has a delivery to the subscription already.
    async fn stretch(&mut self, replay: &Replay, number: i32) -> Step<Vec<(i64, bool)>> {
        let types = self.types(&replay.pattern).await?;
        let mut query = QueryBuilder::new("SELECT e.seq, d.seq IS NOT NULL FROM ");
        query.push(self.store.text("{s}.events e LEFT JOIN {s}.deliveries d ON d.seq = e.seq AND d.subscription = "));
        query.push_bind(number).push(" WHERE e.type = ANY(").push_bind(types);
        query.push(if replay.missing_only { ") AND d.seq IS NULL" } else { ") AND (d.seq IS NULL OR d.stage >= 3)" });
        let bounds = [
            (" AND e.seq >= ", replay.from_seq.map(signed)),
            (" AND e.seq <= ", replay.to_seq.map(signed)),
            (" AND e.created_at >= ", replay.from.map(|from| from.as_microsecond())),
            (" AND e.created_at <= ", replay.to.map(|to| to.as_microsecond())),
        ];
        for (condition, bound) in bounds {
            if let Some(bound) = bound {
                query.push(condition).push_bind(bound);
            }
        }
        query.push(" ORDER BY e.seq");
        let rows = self.rows(query.build().persistent(false)).await?;
        Ok(rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<sqlx::Result<_>>()?)
    }

    async fn replay(&mut self, replay: &Replay, number: i32) -> Step<u64> {
        if replay.dry_run {
            return Ok(self.stretch(replay, number).await?.len() as u64);
        }
        let stretch = self.stretch(replay, number).await?;
        let seqs: Vec<i64> = stretch.iter().map(|&(seq, _)| seq).collect();
        self.lock(&seqs).await?;
        let again: Vec<(i64, i32)> =
            stretch.iter().filter(|(_, is_there)| *is_there).map(|&(seq, _)| (seq, number)).collect();
        self.reopen(&again, true).await?;
        let missing: Vec<i64> = stretch.iter().filter(|(_, is_there)| !is_there).map(|&(seq, _)| seq).collect();
        let deliver = self.store.statement(DELIVER).bind(self.store.now()).bind(number);
        self.execute(deliver.bind(!replay.missing_only).bind(missing)).await?;
        self.recount(&seqs).await?;
        Ok(stretch.len() as u64)
    }

    async fn cancel(&mut self, number: i32) -> Step<u64> {
        let rows = self.rows(self.store.statement(OPEN).bind(number)).await?;
        let mut seqs: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        seqs.sort_unstable();
        seqs.dedup();
        self.lock(&seqs).await?;
        // Some may have ended before they were locked.
        let rows = self.rows(self.store.statement(CANCEL).bind(seqs).bind(number)).await?;
        let gone: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        self.execute(self.store.statement(DROP_ATTEMPTS).bind(gone.clone()).bind(number)).await?;
        self.recount(&gone).await?;
        Ok(gone.len() as u64)
    }

    async fn erase(&mut self, id: &str) -> Step<u64> {
        let rows = self.rows(self.store.statement(BLANK).bind(id)).await?;
        let Some(row) = rows.first() else { return Ok(0) };
        let seqs = [row.try_get(0)?];
        self.lock(&seqs).await?;
        for text in DROP {
            self.on_seqs(text, &seqs).await?;
        }
        self.execute(self.store.statement(COUNT_OFF).bind(0_i64).bind(1_i64)).await?;
        Ok(1)
    }

    /// Removes some of what retention does not keep. Returns how many events went, and where to go on if there may be
    /// more.
    async fn prune_step(&mut self, age: Option<Duration>, max: u64, from: Place) -> Step<(u64, Option<Place>)> {
        self.begin_operating().await?;
        let statement = match age {
            Some(age) => self
                .store
                .statement(OLD)
                .bind(self.store.now())
                .bind(as_micros(age))
                .bind(from.created_at)
                .bind(from.seq)
                .bind(PRUNE_STEP),
            None => self.store.statement(MANY).bind(from.seq).bind(PRUNE_STEP).bind(signed(max)),
        };
        let rows = self.rows(statement).await?;
        let (mut seqs, mut events, mut last) = (Vec::with_capacity(rows.len()), 0_u64, None);
        for row in &rows {
            let (seq, is_event, created_at): (i64, bool, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            seqs.push(seq);
            events += u64::from(is_event);
            last = Some(Place { created_at, seq });
        }
        if let Some(&highest) = seqs.iter().max() {
            seqs.sort_unstable();
            for text in DROP {
                self.on_seqs(text, &seqs).await?;
            }
            self.on_seqs(DROP_EVENTS, &seqs).await?;
            self.execute(self.store.statement(COUNT_OFF).bind(highest).bind(signed(events))).await?;
        }
        self.commit().await?;
        Ok((events, last.filter(|_| signed(rows.len() as u64) == PRUNE_STEP)))
    }
}
