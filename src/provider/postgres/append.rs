//! Appending: seqs, events and deliveries of a whole batch in one statement.
//!
//! The common case, that every id is new, is tried without looking. When the unique index says otherwise, the batch is
//! done again with a look, under the lock that gives out seq: then nobody can come in between.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use sqlx::Row as _;

use super::row::{metadata_text, signed, source_code, stored_counter, unsigned, user_text};
use super::session::{Session, Statement};
use super::trouble::Step;
use super::{Store, Turns};
use crate::delivery::Status;
use crate::event::{EventId, Seq};
use crate::provider::{Append, Appended};

const APPEND: &str = "WITH now AS MATERIALIZED (SELECT {now} AS at), \
    head AS (UPDATE {s}.head SET head = head + $2, total = total + $2 RETURNING head - $2 AS base), \
    events AS (INSERT INTO {s}.events (seq, created_at, appended_at, depth, source, id, type, key, user_id, \
        session_id, instance_id, schema, entity, operation, trace_parent, caused_by, metadata, content_type, payload) \
        SELECT h.base + i.n, i.created_at, now.at, i.depth, i.source, i.id, i.type, i.key, i.user_id, i.session_id, \
        i.instance_id, i.schema, i.entity, i.operation, i.trace_parent, i.caused_by, i.metadata, i.content_type, i.payload \
        FROM head h CROSS JOIN now CROSS JOIN unnest((SELECT $3::text[]), (SELECT $4::text[]), (SELECT $5::smallint[]), \
        (SELECT $6::bigint[]), (SELECT $7::int[]), (SELECT $8::text[]), (SELECT $9::text[]), (SELECT $10::text[]), \
        (SELECT $11::text[]), (SELECT $12::text[]), (SELECT $13::text[]), (SELECT $14::text[]), (SELECT $15::text[]), \
        (SELECT $16::text[]), (SELECT $17::text[]), (SELECT $18::text[]), (SELECT $19::bytea[])) WITH ORDINALITY \
        AS i(id, type, source, created_at, depth, \
        key, user_id, session_id, instance_id, schema, entity, operation, trace_parent, caused_by, metadata, \
        content_type, payload, n)), \
    deliveries AS (INSERT INTO {s}.deliveries (seq, subscription, due, key, alone) \
        SELECT h.base + i.n, i.subscription, now.at, i.key, i.alone FROM head h CROSS JOIN now \
        CROSS JOIN unnest((SELECT $20::bigint[]), (SELECT $21::int[]), (SELECT $22::text[]), (SELECT $23::bool[])) \
        AS i(n, subscription, key, alone)), \
    progress AS (INSERT INTO {s}.progress (seq, open) SELECT h.base + i.n, i.open FROM head h \
        CROSS JOIN unnest((SELECT $24::bigint[]), (SELECT $25::int[])) AS i(n, open)) \
    SELECT base FROM head";

const KNOWN: &str = "SELECT e.id, e.seq, d.open, d.begun, d.failed FROM unnest($1::text[]) AS i(id) \
    JOIN {s}.events e ON e.id = i.id CROSS JOIN LATERAL (SELECT coalesce(bool_or(d.stage < 3), false) AS open, \
    coalesce(bool_or(d.started_at IS NOT NULL), false) AS begun, coalesce(bool_or(d.stage = 4), false) AS failed \
    FROM {s}.deliveries d WHERE d.seq = e.seq) d";

/// The numbers of subscriptions.
pub(super) type Numbers = HashMap<Arc<str>, i32>;

/// The ids that the log holds, with what they are answered.
pub(super) type Known = HashMap<String, (Seq, Status)>;

impl Store {
    /// Appends what is new and answers for all.
    pub(super) async fn append(&self, batch: &[&Append]) -> Step<Vec<Appended>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.append_all(batch, turns.careful).await;
            if let Some(result) = turns.judge(session.finish(result).await) {
                return result;
            }
        }
    }

    fn append_statement<'q>(&self, new: &[&'q Append], numbers: &Numbers) -> Statement<'q> {
        let events = || new.iter().map(|append| &append.event);
        let shared = |text: &'q Option<Arc<str>>| text.as_deref();
        let statement = self.statement(APPEND).bind(self.now()).bind(signed(new.len() as u64));
        let statement = statement
            .bind(events().map(|event| event.id.as_str()).collect::<Vec<_>>())
            .bind(events().map(|event| event.event_type.as_str()).collect::<Vec<_>>())
            .bind(events().map(|event| source_code(event.source)).collect::<Vec<_>>())
            .bind(events().map(|event| event.created_at.as_microsecond()).collect::<Vec<_>>())
            .bind(events().map(|event| stored_counter(event.depth)).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.key)).collect::<Vec<_>>())
            .bind(events().map(|event| event.user_id.as_ref().map(user_text)).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.session_id)).collect::<Vec<_>>())
            .bind(events().map(|event| &*event.instance_id).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.schema)).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.entity)).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.operation)).collect::<Vec<_>>())
            .bind(events().map(|event| shared(&event.trace_parent)).collect::<Vec<_>>())
            .bind(events().map(|event| event.caused_by.as_ref().map(EventId::as_str)).collect::<Vec<_>>())
            .bind(events().map(|event| metadata_text(&event.metadata)).collect::<Vec<_>>())
            .bind(events().map(|event| content_type(&event.payload)).collect::<Vec<_>>())
            .bind(events().map(|event| &**event.payload.bytes()).collect::<Vec<&[u8]>>());
        let (mut at, mut subscriptions, mut keys, mut alone) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut progress, mut open) = (Vec::<i64>::new(), Vec::<i32>::new());
        for (n, append) in (1_i64..).zip(new) {
            let count = append.subscriptions.len();
            for number in append.subscriptions.iter().filter_map(|name| numbers.get(name)) {
                at.push(n);
                subscriptions.push(*number);
                keys.push(append.event.key.as_deref());
                alone.push(count == 1);
            }
            if count > 1 {
                progress.push(n);
                open.push(i32::try_from(count).unwrap_or(i32::MAX));
            }
        }
        statement.bind(at).bind(subscriptions).bind(keys).bind(alone).bind(progress).bind(open)
    }
}

fn content_type(payload: &crate::event::Payload) -> Option<&str> {
    (!payload.is_json()).then(|| payload.content_type())
}

impl Session<'_> {
    async fn append_all(&mut self, batch: &[&Append], careful: bool) -> Step<Vec<Appended>> {
        let numbers = self.numbers(batch.iter().flat_map(|append| append.subscriptions.iter())).await?;
        if !careful {
            return self.append(batch, &Known::new(), &numbers).await;
        }
        self.begin().await?;
        let appended = self.append_carefully(batch, &numbers).await?;
        self.commit().await?;
        Ok(appended)
    }

    /// Appends within a transaction what nobody has appended, and holds the lock on `head` from then on.
    pub(super) async fn append_carefully(&mut self, batch: &[&Append], numbers: &Numbers) -> Step<Vec<Appended>> {
        let lock = self.store.statement("SELECT head FROM {s}.head FOR UPDATE");
        self.execute(lock).await?;
        let known = self.known(batch).await?;
        self.append(batch, &known, numbers).await
    }

    async fn known(&mut self, batch: &[&Append]) -> Step<Known> {
        let ids: BTreeSet<&str> = batch.iter().map(|append| append.event.id.as_str()).collect();
        let statement = self.store.statement(KNOWN).bind(ids.into_iter().collect::<Vec<_>>());
        let rows = self.rows(statement).await?;
        let known = rows.iter().map(|row| {
            let status = match (row.try_get(2)?, row.try_get(3)?, row.try_get(4)?) {
                (true, false, _) => Status::Pending,
                (true, true, _) => Status::Processing,
                (false, _, true) => Status::Failed,
                (false, _, false) => Status::Completed,
            };
            Ok((row.try_get(0)?, (unsigned(row.try_get(1)?), status)))
        });
        Ok(known.collect::<sqlx::Result<_>>()?)
    }

    /// Appends all that is not `known`, each id once.
    pub(super) async fn append(&mut self, batch: &[&Append], known: &Known, numbers: &Numbers) -> Step<Vec<Appended>> {
        let mut first: HashMap<&str, usize> = HashMap::with_capacity(batch.len());
        let mut new: Vec<&Append> = Vec::with_capacity(batch.len());
        for append in batch {
            let id = append.event.id.as_str();
            if !known.contains_key(id) && !first.contains_key(id) {
                first.insert(id, new.len());
                new.push(append);
            }
        }
        let base = match new.as_slice() {
            [] => 0,
            new => unsigned(self.row(self.store.append_statement(new, numbers)).await?.try_get(0)?),
        };
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
            Appended { seq: base + 1 + at as Seq, duplicate, status }
        };
        Ok(batch.iter().map(answer).collect())
    }
}
