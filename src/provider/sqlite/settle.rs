//! Settling: the ends of many attempts in a handful of statements.
//!
//! As in [`append`](super::append), the common case (every lease is held, nothing is written) is tried without looking.

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::{Row as _, SqliteConnection};

use super::row::{COMPLETED, FAILED, READY, SUBSCRIPTION_BITS, WAITING, delivery_id};
use super::statement::{Parameters, Values, json_list};
use super::writer::{Step, Trouble, Tx, as_micros};
use crate::delivery::{Attempt, Next};
use crate::provider::{Append, Settled, Settlement};

const HELD: Values = Values {
    head: "WITH v(id, token) AS (VALUES",
    columns: 2,
    tail: ") SELECT d.id, d.token, d.fresh FROM v JOIN deliveries d ON d.id = v.id WHERE d.stage = 2 AND d.token = v.token",
};
const ARCHIVE: Values = Values {
    head: "WITH v(id, token) AS (VALUES",
    columns: 2,
    tail: ") INSERT INTO attempts (delivery, number, record) SELECT d.id, d.number, d.last FROM v \
           JOIN deliveries d ON d.id = v.id WHERE d.stage = 2 AND d.token = v.token AND d.last IS NOT NULL",
};
const END: Values = Values {
    head: "WITH v(id, token, stage, due, completed_at, retry, tries, infra, release, number, verdict, last) AS (VALUES",
    columns: 12,
    tail: ") UPDATE deliveries SET stage = v.stage, due = coalesce(v.due, deliveries.due), \
           completed_at = v.completed_at, retry_count = retry_count + v.retry, tries = deliveries.tries + v.tries, \
           infra = deliveries.infra + v.infra, number = coalesce(v.number, deliveries.number), \
           verdict = coalesce(v.verdict, deliveries.verdict), last = coalesce(v.last, deliveries.last), \
           started_at = CASE WHEN v.release AND fresh THEN NULL ELSE started_at END, \
           token = NULL, lease_end = NULL, worker = NULL \
           FROM v WHERE deliveries.id = v.id AND deliveries.stage = 2 AND deliveries.token = v.token",
};
const SHIFT: Values = Values {
    head: "WITH v(seq, open, begun, failed) AS (VALUES",
    columns: 4,
    tail: ") UPDATE progress SET open = progress.open + v.open, begun = progress.begun + v.begun, \
           failed = progress.failed + v.failed FROM v WHERE progress.seq = v.seq",
};

/// The end of a claim, as columns.
pub(super) struct End {
    id: i64,
    token: i64,
    stage: i64,
    due: Option<i64>,
    completed_at: Option<i64>,
    retry: i64,
    tries: i64,
    infra: i64,
    is_release: bool,
    /// Whether the claim was the delivery's first; known for a release only.
    is_fresh: bool,
    attempt: Option<(u32, &'static str, String)>,
}

impl End {
    pub(super) fn new(id: i64, token: i64, next: Next, attempt: Option<&Attempt>, now: i64) -> Self {
        let is_release = next == Next::Release;
        let attempt = attempt.filter(|_| !is_release);
        let is_infra = attempt.is_some_and(|attempt| attempt.verdict.is_infra());
        let mut end = Self {
            id,
            token,
            stage: READY,
            due: None,
            completed_at: None,
            retry: 0,
            tries: 0,
            infra: 0,
            is_release,
            is_fresh: false,
            attempt: attempt.map(|attempt| {
                (attempt.number, attempt.verdict.as_str(), serde_json::to_string(attempt).unwrap_or_default())
            }),
        };
        match next {
            Next::Complete => (end.stage, end.completed_at) = (COMPLETED, Some(now)),
            Next::Fail => (end.stage, end.completed_at) = (FAILED, Some(now)),
            Next::Release => {}
            Next::Retry { after } => {
                let due = now.saturating_add(as_micros(after));
                end.stage = if due <= now { READY } else { WAITING };
                (end.due, end.retry) = (Some(due), 1);
                (end.tries, end.infra) = if is_infra { (0, 1) } else { (1, 0) };
            }
        }
        end
    }

    fn bind(&self, to: &mut Parameters) {
        to.add(self.id).add(self.token).add(self.stage).add(self.due).add(self.completed_at);
        to.add(self.retry).add(self.tries).add(self.infra).add(self.is_release);
        match &self.attempt {
            Some((number, verdict, record)) => to.add(*number).add(*verdict).add(record.as_str()),
            None => to.add(None::<i64>).add(None::<&str>).add(None::<&str>),
        };
    }

    /// What it changes in its event's counts: open, begun and failed deliveries.
    fn shift(&self) -> [i64; 3] {
        match self.stage {
            COMPLETED => [-1, 0, 0],
            FAILED => [-1, 0, 1],
            _ => [0, -i64::from(self.is_release && self.is_fresh), 0],
        }
    }

    fn seq(&self) -> i64 {
        self.id >> SUBSCRIPTION_BITS
    }
}

impl Tx<'_> {
    /// Settles what is held and answers for all.
    pub(super) async fn settle(&mut self, batch: &[&Settlement], careful: bool) -> Step<Vec<Settled>> {
        let mut keys = Vec::with_capacity(batch.len());
        for settlement in batch {
            let subscription = self.subscription(&settlement.key.subscription).await?;
            let id = delivery_id(settlement.key.seq, subscription);
            keys.push((id, settlement.key.token.cast_signed()));
        }
        let plain = |settlement: &&&Settlement| {
            settlement.next != Next::Release && settlement.published.is_empty() && settlement.writes.is_empty()
        };
        let is_plain = !careful
            && batch.iter().filter(plain).count() == batch.len()
            && keys.iter().collect::<HashSet<_>>().len() == keys.len();
        let mut held = if is_plain { keys.iter().map(|&key| (key, false)).collect() } else { self.held(&keys).await? };
        let mut answers = vec![Settled::Stale; batch.len()];
        let (mut ends, mut published): (Vec<(usize, End)>, Vec<&Append>) = (Vec::new(), Vec::new());
        for (at, (settlement, key)) in batch.iter().zip(&keys).enumerate() {
            let Some(&is_fresh) = held.get(key) else { continue };
            if let Err(reason) = self.write(settlement).await? {
                if let Some(answer) = answers.get_mut(at) {
                    *answer = Settled::Conflict { reason };
                }
                continue;
            }
            held.remove(key);
            let end = End::new(key.0, key.1, settlement.next, settlement.attempt.as_ref(), self.now);
            ends.push((at, End { is_fresh, ..end }));
            if settlement.next == Next::Complete {
                published.extend(&settlement.published);
            }
        }
        let (places, ends): (Vec<usize>, Vec<End>) = ends.into_iter().unzip();
        let open = self.end(&ends).await?;
        let mut closed = HashSet::new();
        for (at, end) in places.into_iter().zip(&ends).rev() {
            // Of an event's ends in one batch, the last is the one that closed it.
            let event_open = open.contains(&end.seq()) || !closed.insert(end.seq());
            if let Some(answer) = answers.get_mut(at) {
                *answer = Settled::Done { event_open };
            }
        }
        if !published.is_empty() {
            self.append(&published, true).await?;
        }
        Ok(answers)
    }

    /// The leases that are held, and whether each is its delivery's first.
    async fn held(&mut self, keys: &[(i64, i64)]) -> Step<HashMap<(i64, i64), bool>> {
        let rows = HELD
            .fetch(self.connection, keys, |&(id, token), to| {
                to.add(id).add(token);
            })
            .await?;
        let held = rows.iter().map(|row| Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?)));
        Ok(held.collect::<sqlx::Result<_>>()?)
    }

    /// Applies ends, and returns the events that are still open.
    pub(super) async fn end(&mut self, ends: &[End]) -> Step<HashSet<i64>> {
        let again: Vec<&End> = ends.iter().filter(|end| end.attempt.as_ref().is_some_and(|one| one.0 > 1)).collect();
        ARCHIVE
            .execute(self.connection, &again, |end, to| {
                to.add(end.id).add(end.token);
            })
            .await?;
        if END.execute(self.connection, ends, |end, to| end.bind(to)).await? < ends.len() as u64 {
            return Err(Trouble::Careful);
        }
        let mut shifts: BTreeMap<i64, [i64; 3]> = BTreeMap::new();
        for end in ends {
            let [open, begun, failed] = shifts.entry(end.seq()).or_default();
            let [by_open, by_begun, by_failed] = end.shift();
            (*open, *begun, *failed) = (*open + by_open, *begun + by_begun, *failed + by_failed);
        }
        Ok(shift(self.connection, &shifts).await?)
    }
}

/// Changes the counts of events, and returns those that are still open.
async fn shift(connection: &mut SqliteConnection, shifts: &BTreeMap<i64, [i64; 3]>) -> sqlx::Result<HashSet<i64>> {
    if shifts.is_empty() {
        return Ok(HashSet::new());
    }
    let seqs = json_list(shifts.keys().copied());
    if shifts.values().all(|shift| *shift == [-1, 0, 0]) {
        // The last delivery of each has succeeded, as a rule: then one statement says it all.
        let last = "DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?)) AND open = 1 AND failed = 0";
        let done = sqlx::query(last).bind(&*seqs).execute(&mut *connection).await?.rows_affected();
        if done == shifts.len() as u64 {
            return Ok(HashSet::new());
        }
    }
    let rows: Vec<(i64, [i64; 3])> = shifts.iter().map(|(&seq, &shift)| (seq, shift)).collect();
    let bind = |&(seq, [open, begun, failed]): &(i64, [i64; 3]), to: &mut Parameters| {
        to.add(seq).add(open).add(begun).add(failed);
    };
    SHIFT.execute(&mut *connection, &rows, bind).await?;
    let done = "DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?)) AND open = 0 AND failed = 0";
    sqlx::query(done).bind(&*seqs).execute(&mut *connection).await?;
    let open = "SELECT seq FROM progress WHERE seq IN (SELECT value FROM json_each(?)) AND open > 0";
    let open: Vec<i64> = sqlx::query_scalar(open).bind(&*seqs).fetch_all(&mut *connection).await?;
    Ok(open.into_iter().collect())
}
