//! Settling: the ends of many attempts in one statement, each fenced by its token.
//!
//! A batch that writes documents or publishes events takes a transaction: leases are looked up and locked, writes are
//! planned here, and those settlements whose writes cannot be applied are left out of what follows.

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::Row as _;

use super::append::Numbers;
use super::documents::Shelf;
use super::row::{COMPLETED, FAILED, READY, WAITING, as_micros, signed, stored_counter};
use super::session::Session;
use super::trouble::Step;
use super::{Store, Turns};
use crate::delivery::{Attempt, Next, Status, Verdict};
use crate::provider::{Append, Settled, Settlement};

// Only a lease has a token. That it is one is not said beside: the server would take it as leave to go through all leases,
// where the key of the row leads to it at once.

const HELD: &str = "SELECT d.seq, d.subscription, d.token FROM unnest($1::bigint[], $2::int[], $3::bigint[]) \
    AS i(seq, subscription, token) JOIN {s}.deliveries d ON d.seq = i.seq AND d.subscription = i.subscription \
    WHERE d.token = i.token ORDER BY d.seq, d.subscription FOR UPDATE OF d";

/// Ends leases that are held, records the attempts, and counts what that means for events with several deliveries.
/// Answers with the leases that were held and whether the next of their keys may come now, and then with how many deliveries
/// of such events are open and have failed.
const END: &str = "WITH now AS MATERIALIZED (SELECT {now} AS at), \
    ended AS (UPDATE {s}.deliveries d SET stage = i.stage, due = coalesce(now.at + i.delay, d.due), \
        completed_at = CASE WHEN i.stage >= 3 THEN now.at END, retry_count = d.retry_count + (i.cost IN (1, 2))::int, \
        tries = d.tries + (i.cost = 1)::int, infra = d.infra + (i.cost = 2)::int, \
        started_at = CASE WHEN i.cost = 3 AND d.fresh THEN NULL ELSE d.started_at END, \
        number = coalesce(i.number, d.number), token = NULL, lease_end = NULL, claimed_at = NULL, worker = NULL \
        FROM now CROSS JOIN unnest((SELECT $2::bigint[]), (SELECT $3::int[]), (SELECT $4::bigint[]), \
        (SELECT $5::smallint[]), (SELECT $6::bigint[]), (SELECT $7::smallint[]), (SELECT $8::int[]), \
        (SELECT $9::smallint[]), (SELECT $10::text[]), (SELECT $11::text[])) WITH ORDINALITY \
        AS i(seq, subscription, token, stage, delay, cost, number, verdict, digest, record, n) \
        WHERE d.seq = ANY(ARRAY[i.seq]) AND d.subscription = i.subscription AND d.token = i.token \
        RETURNING d.seq, d.subscription, d.stage, d.alone, d.fresh, d.key, i.cost, i.number, i.verdict, i.digest, i.record, i.n), \
    recorded AS (INSERT INTO {s}.attempts (seq, subscription, number, verdict, digest, record) \
        SELECT seq, subscription, number, verdict, digest, record FROM ended WHERE record IS NOT NULL), \
    shifted AS (UPDATE {s}.progress p SET open = p.open - e.closed, failed = p.failed + e.failed, \
        begun = p.begun - e.unbegun FROM (SELECT seq, count(*) FILTER (WHERE stage >= 3) AS closed, \
        count(*) FILTER (WHERE stage = 4) AS failed, count(*) FILTER (WHERE cost = 3 AND fresh) AS unbegun FROM ended \
        WHERE NOT alone AND (stage >= 3 OR cost = 3) GROUP BY seq ORDER BY seq) e WHERE p.seq = ANY(ARRAY[e.seq]) \
        RETURNING p.seq, p.open, p.failed) \
    SELECT n, seq, alone, NULL::int, NULL::int, key IS NOT NULL AND stage >= 3 FROM ended \
    UNION ALL SELECT NULL, seq, NULL, open, failed, false FROM shifted";

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
    seq: i64,
    subscription: i32,
    token: i64,
    stage: i16,
    /// When it is due again, from now.
    delay: Option<i64>,
    cost: Cost,
    number: Option<i32>,
    verdict: Option<i16>,
    digest: Option<String>,
    record: Option<String>,
}

/// The code of a verdict.
pub(super) fn verdict_code(verdict: Verdict) -> i16 {
    let at = Verdict::ALL.iter().position(|&one| one == verdict);
    at.and_then(|at| i16::try_from(at).ok()).unwrap_or(-1)
}

impl End {
    pub(super) fn new(seq: i64, subscription: i32, token: i64, next: Next, attempt: Option<&Attempt>) -> Self {
        let attempt = attempt.filter(|_| next != Next::Release);
        let (stage, delay, cost) = match next {
            Next::Complete => (COMPLETED, None, Cost::Nothing),
            Next::Fail => (FAILED, None, Cost::Nothing),
            Next::Release => (READY, None, Cost::Release),
            Next::Retry { after } => {
                let is_infra = attempt.is_some_and(|attempt| attempt.verdict.is_infra());
                let stage = if after.as_micros() == 0 { READY } else { WAITING };
                (stage, Some(as_micros(after)), if is_infra { Cost::Infra } else { Cost::Try })
            }
        };
        // What dead letters are looked for by.
        let death = attempt.filter(|_| next == Next::Fail);
        Self {
            seq,
            subscription,
            token,
            stage,
            delay,
            cost,
            number: attempt.map(|attempt| stored_counter(attempt.number)),
            verdict: death.map(|attempt| verdict_code(attempt.verdict)),
            digest: death.and_then(|attempt| attempt.trace.digest.as_deref().map(str::to_owned)),
            record: attempt.map(|attempt| serde_json::to_string(attempt).unwrap_or_default()),
        }
    }

    /// The order in which rows are locked.
    pub(super) fn place(&self) -> (i64, i32) {
        (self.seq, self.subscription)
    }

    fn is_open(&self) -> bool {
        self.stage < COMPLETED
    }
}

/// The answers to a batch, and whether the next deliveries of some key may come now.
type Answers = (Vec<Settled>, bool);

/// Which claim a settlement is about.
type Key = (i64, i32, i64);

impl Store {
    /// Settles what is held and answers for all. Tells of it where it leaves something to claim or to read.
    pub(super) async fn settle(&self, batch: &[Settlement]) -> Step<Vec<Settled>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.settle(batch, turns.careful).await;
            let result = session.finish(result).await;
            self.forget_reopened(batch);
            if let Some(result) = turns.judge(result) {
                let (settled, frees_keys) = result?;
                if frees_keys || batch.iter().any(leaves_news) {
                    self.wrote();
                }
                return Ok(settled);
            }
        }
    }

    /// What waits for another attempt may be behind where claims begin.
    fn forget_reopened(&self, batch: &[Settlement]) {
        let reopened = batch.iter().filter(|settlement| reopens(settlement));
        let reopened: HashSet<&str> = reopened.map(|settlement| &*settlement.key.subscription).collect();
        if !reopened.is_empty() {
            let numbers: Vec<i32> = reopened.into_iter().filter_map(|name| self.number(name)).collect();
            self.fronts().forget(numbers);
        }
    }
}

impl Session<'_> {
    async fn settle(&mut self, batch: &[Settlement], careful: bool) -> Step<Answers> {
        let numbers = self.known_numbers(batch.iter().map(|settlement| &settlement.key.subscription)).await?;
        let key = |settlement: &Settlement| {
            let number = *numbers.get(&settlement.key.subscription)?;
            Some((signed(settlement.key.seq), number, settlement.key.token.cast_signed()))
        };
        let keys: Vec<Option<Key>> = batch.iter().map(key).collect();
        let distinct: HashSet<Key> = keys.iter().copied().flatten().collect();
        let is_plain = |settlement: &Settlement| {
            settlement.next != Next::Complete || (settlement.published.is_empty() && settlement.writes.is_empty())
        };
        if distinct.len() == batch.len() && batch.iter().all(is_plain) {
            let ends = batch.iter().zip(&keys).enumerate().filter_map(|(at, (one, key))| Some((at, end(one, (*key)?))));
            return self.end_all(ends.collect(), vec![Settled::Stale; batch.len()]).await;
        }
        let published = batch.iter().flat_map(|settlement| &settlement.published);
        let numbers = self.numbers(published.flat_map(|append| append.subscriptions.iter())).await?;
        self.begin().await?;
        let settled = self.settle_with_effects(batch, &keys, &numbers, careful).await?;
        self.commit().await?;
        Ok(settled)
    }

    async fn settle_with_effects(
        &mut self,
        batch: &[Settlement],
        keys: &[Option<Key>],
        numbers: &Numbers,
        careful: bool,
    ) -> Step<Answers> {
        let mut held = self.held(keys).await?;
        let writing = batch.iter().zip(keys).filter(|(settlement, key)| {
            settlement.next == Next::Complete && key.as_ref().is_some_and(|key| held.contains(key))
        });
        let mut shelf = Shelf::lock(self, writing.flat_map(|(settlement, _)| &settlement.writes)).await?;
        let mut answers = vec![Settled::Stale; batch.len()];
        let (mut ends, mut published): (Vec<(usize, End)>, Vec<&Append>) = (Vec::new(), Vec::new());
        for ((at, settlement), key) in batch.iter().enumerate().zip(keys) {
            let Some(key) = key.filter(|key| held.contains(key)) else { continue };
            if settlement.next == Next::Complete {
                if let Err(reason) = shelf.write(&settlement.writes) {
                    if let Some(answer) = answers.get_mut(at) {
                        *answer = Settled::Conflict { reason };
                    }
                    continue;
                }
                published.extend(&settlement.published);
            }
            held.remove(&key);
            ends.push((at, end(settlement, key)));
        }
        shelf.store(self).await?;
        let answers = self.end_all(ends, answers).await?;
        match (published.is_empty(), careful) {
            (true, _) => {}
            (false, true) => drop(self.append_carefully(&published, numbers).await?),
            (false, false) => drop(self.append(&published, &HashMap::new(), numbers).await?),
        }
        Ok(answers)
    }

    /// Locks the leases that are held.
    async fn held(&mut self, keys: &[Option<Key>]) -> Step<HashSet<Key>> {
        let known: HashSet<Key> = keys.iter().copied().flatten().collect();
        let mut known: Vec<Key> = known.into_iter().collect();
        known.sort_unstable();
        let statement = self
            .store
            .statement(HELD)
            .bind(known.iter().map(|key| key.0).collect::<Vec<_>>())
            .bind(known.iter().map(|key| key.1).collect::<Vec<_>>())
            .bind(known.iter().map(|key| key.2).collect::<Vec<_>>());
        let rows = self.rows(statement).await?;
        let held = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)));
        Ok(held.collect::<sqlx::Result<_>>()?)
    }

    /// Applies the ends , each of which stands beside its place in the batch, and answers for them.
    async fn end_all(&mut self, ends: Vec<(usize, End)>, mut answers: Vec<Settled>) -> Step<Answers> {
        // Rows are locked in one order; which of an event's ends was the last is told by the order of the batch.
        let mut sorted: Vec<(usize, End)> = ends;
        sorted.sort_by_key(|(_, end)| end.place());
        let (places, ends): (Vec<usize>, Vec<End>) = sorted.into_iter().unzip();
        let Ended { held, shared, frees_keys } = self.end(&ends).await?;
        let mut applied: Vec<(usize, &End, bool)> = places
            .iter()
            .zip(&ends)
            .enumerate()
            .filter_map(|(n, (&at, end))| Some((at, end, *held.get(&n)?)))
            .collect();
        applied.sort_by_key(|&(at, ..)| std::cmp::Reverse(at));
        let mut closed = HashSet::new();
        for (at, end, is_alone) in applied {
            let status = match shared.get(&end.seq).filter(|_| !is_alone) {
                _ if end.is_open() => None,
                Some(&(open, _)) if open > 0 => None,
                Some(&(_, failed)) if failed > 0 => Some(Status::Failed),
                None if end.stage == FAILED => Some(Status::Failed),
                Some(_) | None => Some(Status::Completed),
            };
            let finished = status.filter(|_| closed.insert(end.seq));
            if let Some(answer) = answers.get_mut(at) {
                *answer = Settled::Done { finished };
            }
        }
        Ok((answers, frees_keys))
    }

    /// Applies ends, which are in the order of their places.
    pub(super) async fn end(&mut self, ends: &[End]) -> Step<Ended> {
        let mut ended = Ended::default();
        if ends.is_empty() {
            return Ok(ended);
        }
        let statement = self
            .store
            .statement(END)
            .bind(self.store.now())
            .bind(ends.iter().map(|end| end.seq).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.subscription).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.token).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.stage).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.delay).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.cost as i16).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.number).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.verdict).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.digest.as_deref()).collect::<Vec<_>>())
            .bind(ends.iter().map(|end| end.record.as_deref()).collect::<Vec<_>>());
        for row in self.rows(statement).await? {
            ended.frees_keys |= row.try_get::<bool, _>(5)?;
            match row.try_get::<Option<i64>, _>(0)? {
                Some(n) => drop(ended.held.insert(usize::try_from(n).unwrap_or(0).saturating_sub(1), row.try_get(2)?)),
                None => drop(ended.shared.insert(row.try_get(1)?, (row.try_get(3)?, row.try_get(4)?))),
            }
        }
        Ok(ended)
    }
}

/// Whether the delivery goes on.
fn reopens(settlement: &Settlement) -> bool {
    matches!(settlement.next, Next::Release | Next::Retry { .. })
}

/// Whether there is something to claim or to read after it, whatever its key.
fn leaves_news(settlement: &Settlement) -> bool {
    reopens(settlement) || !settlement.published.is_empty()
}

fn end(settlement: &Settlement, (seq, subscription, token): Key) -> End {
    End::new(seq, subscription, token, settlement.next, settlement.attempt.as_ref())
}

/// What became of ends.
#[derive(Default)]
pub(super) struct Ended {
    /// Which of them were held, by their place in the list, and whether each was its event's only delivery.
    held: HashMap<usize, bool>,
    /// Of events with several deliveries: how many are open now, and how many have failed.
    shared: BTreeMap<i64, (i32, i32)>,
    /// Whether a delivery with a key is closed: the next of its key may come.
    frees_keys: bool,
}
