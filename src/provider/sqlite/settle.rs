//! Settling: the ends of many attempts in a handful of statements.
//!
//! As in [`append`](super::append), the common case (every lease is held, nothing is written) is tried without looking.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use sqlx::{Row as _, SqliteConnection};

use super::row::{COMPLETED, FAILED, READY, SUBSCRIPTION_BITS, WAITING, delivery_id, event_status};
use super::statement::{Parameters, Values, json_list};
use super::writer::{Step, Trouble, Tx, as_micros};
use crate::delivery::{Attempt, Next, Status};
use crate::provider::{Append, Settled, Settlement};

const HELD: Values = Values {
    head: "WITH v(id, token) AS (VALUES",
    columns: 2,
    tail: ") SELECT d.id, d.token, d.fresh FROM v JOIN deliveries d ON d.id = v.id WHERE d.stage = 2 AND d.token = v.token",
};
const RECORD: Values = Values { head: "INSERT INTO attempts (delivery, number, record) VALUES", columns: 3, tail: "" };
const END: Values = Values {
    head: "WITH v(id, token, stage, at, cost, number) AS (VALUES",
    columns: 6,
    tail: ") UPDATE deliveries SET stage = v.stage, due = iif(v.stage < 3, coalesce(v.at, due), due), \
           completed_at = iif(v.stage < 3, NULL, v.at), retry_count = retry_count + (v.cost IN (1, 2)), \
           tries = tries + (v.cost = 1), infra = infra + (v.cost = 2), \
           started_at = iif(v.cost = 3 AND fresh, NULL, started_at), \
           number = coalesce(v.number, deliveries.number), token = NULL, lease_end = NULL, worker = NULL \
           FROM v WHERE deliveries.id = v.id AND deliveries.stage = 2 AND deliveries.token = v.token",
};
/// Ends for good, given the ids, of leases of one claim: their tokens are all as far from their ids.
const END_FOR_GOOD: &str = "UPDATE deliveries SET stage = ?3, completed_at = ?4, number = coalesce(?5, number), \
    token = NULL, lease_end = NULL, worker = NULL \
    WHERE id IN (SELECT value FROM json_each(?1)) AND stage = 2 AND token = ?2 + id";
/// From how many on they get a list of their own: that is a statement more, which costs about as much as twenty rows in another.
const MANY: usize = 32;
const SHIFT: Values = Values {
    head: "WITH v(seq, open, begun, failed) AS (VALUES",
    columns: 4,
    tail: ") UPDATE progress SET open = progress.open + v.open, begun = progress.begun + v.begun, \
           failed = progress.failed + v.failed FROM v WHERE progress.seq = v.seq",
};

/// What another attempt is counted as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cost {
    /// There is none.
    Nothing = 0,
    /// One of the handler's tries.
    Try = 1,
    /// A lost lease or a fault of the host.
    Infra = 2,
    /// It is as if the claim had never been.
    Release = 3,
}

/// The end of a claim, as columns.
pub(super) struct End {
    id: i64,
    token: i64,
    stage: i64,
    /// When it was completed, or is due again.
    at: Option<i64>,
    cost: Cost,
    /// Whether the claim was the delivery's first; known for a release only.
    is_fresh: bool,
    /// The attempt's number and record.
    attempt: Option<(u32, Arc<str>)>,
}

/// What many ends of a batch have in common, so that one list of ids says the rest.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Alike {
    /// What the token is beyond the id: the same for all leases of a claim.
    salt: i64,
    stage: i64,
    at: Option<i64>,
    number: Option<u32>,
}

impl End {
    pub(super) fn new(id: i64, token: i64, next: Next, attempt: Option<&Attempt>, now: i64) -> Self {
        let attempt = attempt.filter(|_| next != Next::Release);
        let (stage, at, cost) = match next {
            Next::Complete => (COMPLETED, Some(now), Cost::Nothing),
            Next::Fail => (FAILED, Some(now), Cost::Nothing),
            Next::Release => (READY, None, Cost::Release),
            Next::Retry { after } => {
                let due = now.saturating_add(as_micros(after));
                let is_infra = attempt.is_some_and(|attempt| attempt.verdict.is_infra());
                let stage = if due <= now { READY } else { WAITING };
                (stage, Some(due), if is_infra { Cost::Infra } else { Cost::Try })
            }
        };
        let record = |attempt: &Attempt| serde_json::to_string(attempt).unwrap_or_default().into();
        let attempt = attempt.map(|attempt| (attempt.number, record(attempt)));
        Self { id, token, stage, at, cost, is_fresh: false, attempt }
    }

    /// What it has in common with others that end for good.
    fn alike(&self) -> Option<Alike> {
        let (id, number) = (self.id, self.attempt.as_ref().map(|attempt| attempt.0));
        let is_for_good = matches!(self.stage, COMPLETED | FAILED);
        is_for_good.then(|| Alike { salt: self.token.wrapping_sub(id), stage: self.stage, at: self.at, number })
    }

    fn bind(&self, to: &mut Parameters) {
        to.add(self.id).add(self.token).add(self.stage).add(self.at).add(self.cost as i64);
        to.add(self.attempt.as_ref().map(|attempt| attempt.0));
    }

    /// What it changes in its event's counts: open, begun and failed deliveries.
    fn shift(&self) -> [i64; 3] {
        match self.stage {
            COMPLETED => [-1, 0, 0],
            FAILED => [-1, 0, 1],
            _ => [0, -i64::from(self.cost == Cost::Release && self.is_fresh), 0],
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
        let unfinished = self.end(&ends).await?;
        let mut closed = HashSet::new();
        for (at, end) in places.into_iter().zip(&ends).rev() {
            // Of an event's ends in one batch, the last is the one that closed it.
            let status = unfinished.get(&end.seq()).copied().unwrap_or(Status::Completed);
            let finished = (status.is_terminal() && closed.insert(end.seq())).then_some(status);
            if let Some(answer) = answers.get_mut(at) {
                *answer = Settled::Done { finished };
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

    /// Applies ends, and returns the events that are not completed, with their statuses.
    pub(super) async fn end(&mut self, ends: &[End]) -> Step<HashMap<i64, Status>> {
        if self.end_claims(ends).await? < ends.len() as u64 {
            return Err(Trouble::Careful);
        }
        let records: Vec<(i64, &(u32, Arc<str>))> =
            ends.iter().filter_map(|end| Some((end.id, end.attempt.as_ref()?))).collect();
        RECORD
            .execute(self.connection, &records, |(id, (number, record)), to| {
                to.add(*id).add(*number).add(Arc::clone(record));
            })
            .await?;
        let mut shifts: BTreeMap<i64, [i64; 3]> = BTreeMap::new();
        for end in ends {
            let [open, begun, failed] = shifts.entry(end.seq()).or_default();
            let [by_open, by_begun, by_failed] = end.shift();
            (*open, *begun, *failed) = (*open + by_open, *begun + by_begun, *failed + by_failed);
        }
        Ok(shift(self.connection, &shifts).await?)
    }

    /// Ends the claims of those that are held, and returns how many these are.
    async fn end_claims(&mut self, ends: &[End]) -> Step<u64> {
        let mut alike: BTreeMap<Alike, Vec<&End>> = BTreeMap::new();
        let mut others: Vec<&End> = Vec::new();
        for end in ends {
            match end.alike() {
                Some(kind) => alike.entry(kind).or_default().push(end),
                None => others.push(end),
            }
        }
        others.extend(alike.extract_if(.., |_, ends| ends.len() < MANY).flat_map(|(_, ends)| ends));
        let mut ended = END.execute(self.connection, &others, |end, to| end.bind(to)).await?;
        for (Alike { salt, stage, at, number }, ends) in alike {
            let ids = json_list(ends.iter().map(|end| end.id));
            let query = sqlx::query(END_FOR_GOOD).bind(ids).bind(salt).bind(stage).bind(at).bind(number);
            ended += query.execute(&mut *self.connection).await?.rows_affected();
        }
        Ok(ended)
    }
}

/// Changes the counts of events, and returns those that are not completed, with their statuses.
async fn shift(
    connection: &mut SqliteConnection,
    shifts: &BTreeMap<i64, [i64; 3]>,
) -> sqlx::Result<HashMap<i64, Status>> {
    if shifts.is_empty() {
        return Ok(HashMap::new());
    }
    let seqs = json_list(shifts.keys().copied());
    if shifts.values().all(|shift| *shift == [-1, 0, 0]) {
        // The last delivery of each has succeeded, as a rule: then one statement says it all.
        let last = "DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?)) AND open = 1 AND failed = 0";
        let done = sqlx::query(last).bind(&*seqs).execute(&mut *connection).await?.rows_affected();
        if done == shifts.len() as u64 {
            return Ok(HashMap::new());
        }
    }
    let rows: Vec<(i64, [i64; 3])> = shifts.iter().map(|(&seq, &shift)| (seq, shift)).collect();
    let bind = |&(seq, [open, begun, failed]): &(i64, [i64; 3]), to: &mut Parameters| {
        to.add(seq).add(open).add(begun).add(failed);
    };
    SHIFT.execute(&mut *connection, &rows, bind).await?;
    let done = "DELETE FROM progress WHERE seq IN (SELECT value FROM json_each(?)) AND open = 0 AND failed = 0";
    sqlx::query(done).bind(&*seqs).execute(&mut *connection).await?;
    let left = "SELECT seq, status FROM progress WHERE seq IN (SELECT value FROM json_each(?))";
    let left = sqlx::query(left).bind(&*seqs).fetch_all(&mut *connection).await?;
    left.iter().map(|row| Ok((row.try_get(0)?, event_status(row.try_get(1)?)))).collect()
}
