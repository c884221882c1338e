//! Appending: seqs, events and deliveries of many callers in a handful of statements.
//!
//! The common case, that every id is new, is tried without looking. When the count of rows says otherwise, the whole
//! group is done again with a look first.

use std::collections::{BTreeMap, HashMap};

use sqlx::Row as _;

use super::row::{SUBSCRIPTION_BITS, bind_event, delivery_id, event_status, signed, unsigned};
use super::statement::{Values, json_list};
use super::writer::{Step, Trouble, Tx};
use crate::delivery::Status;
use crate::event::Seq;
use crate::provider::{Append, Appended};

const KNOWN: Values = Values {
    head: "WITH v(id) AS (VALUES",
    columns: 1,
    tail: ") SELECT e.id, e.seq, p.status FROM v JOIN events e ON e.id = v.id LEFT JOIN progress p ON p.seq = e.seq",
};
const EVENTS: Values = Values {
    head: "INSERT INTO events (seq, id, type, source, created_at, appended_at, key, user_id, session_id, instance_id, \
           schema, entity, operation, metadata, trace_parent, caused_by, content_type, payload, depth) VALUES",
    columns: 19,
    tail: "ON CONFLICT (id) DO NOTHING",
};
/// Deliveries without a key, given their ids.
const DELIVERIES: &str =
    "INSERT INTO deliveries (id, subscription, due) SELECT value, value & ?2, ?3 FROM json_each(?1)";
const KEYED_DELIVERIES: Values =
    Values { head: "INSERT INTO deliveries (id, subscription, due, key) VALUES", columns: 4, tail: "" };
/// Events with as many open deliveries each.
const PROGRESS: &str = "INSERT INTO progress (seq, open) SELECT value, ?2 FROM json_each(?1)";

impl Tx<'_> {
    /// Appends what is new and answers for all.
    pub(super) async fn append(&mut self, batch: &[&Append], careful: bool) -> Step<Vec<Appended>> {
        let known = if careful { self.known(batch).await? } else { HashMap::new() };
        let mut first: HashMap<&str, usize> = HashMap::with_capacity(batch.len());
        let mut new: Vec<&Append> = Vec::with_capacity(batch.len());
        for append in batch {
            let id = append.event.id.as_str();
            if !known.contains_key(id) && !first.contains_key(id) {
                first.insert(id, new.len());
                new.push(append);
            }
        }
        let base = self.store(&new).await?;
        let mut is_taken = vec![false; new.len()];
        let answer = |append: &&Append| {
            let id = append.event.id.as_str();
            if let Some(&(seq, status)) = known.get(id) {
                return Appended { seq, duplicate: true, status };
            }
            let at = first.get(id).copied().unwrap_or_default();
            let duplicate = is_taken.get_mut(at).is_some_and(|taken| std::mem::replace(taken, true));
            let nobody = new.get(at).is_some_and(|append| append.subscriptions.is_empty());
            let status = if nobody { Status::Completed } else { Status::Pending };
            Appended { seq: base + at as Seq, duplicate, status }
        };
        Ok(batch.iter().map(answer).collect())
    }

    async fn known(&mut self, batch: &[&Append]) -> Step<HashMap<String, (Seq, Status)>> {
        let bind = |append: &&Append, to: &mut super::statement::Parameters| {
            to.add(append.event.id.as_str());
        };
        let rows = KNOWN.fetch(self.connection, batch, bind).await?;
        let known = rows.iter().map(|row| {
            let seq = unsigned(row.try_get(1)?);
            Ok((row.try_get(0)?, (seq, event_status(row.try_get(2)?))))
        });
        Ok(known.collect::<sqlx::Result<_>>()?)
    }

    /// Stores new events and returns the first one's seq.
    async fn store(&mut self, new: &[&Append]) -> Step<Seq> {
        if new.is_empty() {
            return Ok(0);
        }
        let count = new.len() as i64;
        let advance = "UPDATE head SET head = head + ?1, total = total + ?1 RETURNING head";
        let head: i64 = sqlx::query_scalar(advance).bind(count).fetch_one(&mut *self.connection).await?;
        let base = unsigned(head - count + 1);
        let now = self.now;
        let numbered: Vec<(Seq, &Append)> = (base..).zip(new.iter().copied()).collect();
        let bind = |(seq, append): &(Seq, &Append), to: &mut _| bind_event(&append.event, *seq, now, to);
        if EVENTS.execute(self.connection, &numbered, bind).await? < new.len() as u64 {
            return Err(Trouble::Careful);
        }
        self.deliver(&numbered).await?;
        for (seq, append) in &numbered {
            self.recent.keep(*seq, append, now);
        }
        Ok(base)
    }

    async fn deliver(&mut self, numbered: &[(Seq, &Append)]) -> Step<()> {
        let (mut plain, mut keyed) = (Vec::with_capacity(numbered.len()), Vec::new());
        let mut open: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
        for (seq, append) in numbered {
            for name in &*append.subscriptions {
                let subscription = self.subscription(name).await?;
                let id = delivery_id(*seq, subscription);
                match append.event.key.as_deref() {
                    None => plain.push(id),
                    Some(key) => keyed.push((id, subscription, key)),
                }
            }
            if !append.subscriptions.is_empty() {
                open.entry(append.subscriptions.len()).or_default().push(signed(*seq));
            }
        }
        let now = self.now;
        if !plain.is_empty() {
            let mask = (1_i64 << SUBSCRIPTION_BITS) - 1;
            let query = sqlx::query(DELIVERIES).bind(json_list(plain)).bind(mask).bind(now);
            query.execute(&mut *self.connection).await?;
        }
        let bind = |&(id, subscription, key): &(i64, i64, &str), to: &mut super::statement::Parameters| {
            to.add(id).add(subscription).add(now).add(key);
        };
        KEYED_DELIVERIES.execute(self.connection, &keyed, bind).await?;
        for (count, seqs) in open {
            let query = sqlx::query(PROGRESS).bind(json_list(seqs)).bind(count as i64);
            query.execute(&mut *self.connection).await?;
        }
        Ok(())
    }
}
