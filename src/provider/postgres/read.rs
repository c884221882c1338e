//! Reading: the log, lists, dead letters and figures.

use std::sync::Arc;

use sqlx::postgres::{PgRow, Postgres};
use sqlx::{QueryBuilder, Row as _};

use super::Store;
use super::examine::LAG;
use super::row::{DETAILS, EVENT_COLUMNS, details, event, limit, signed, source_code, unsigned, user_text};
use super::session::Session;
use super::settle::verdict_code;
use super::trouble::Step;
use crate::delivery::{EventDetail, EventRecord, Status};
use crate::event::{EventType, Seq};
use crate::pattern::Pattern;
use crate::provider::{
    DeadLetter, DeadLetterFilter, DeadLetterPage, EventFilter, EventPage, LogPage, ProviderStats, rules,
};

const LOG: &str = "SELECT h.head, h.pruned, h.epoch, {event} FROM {s}.head h LEFT JOIN LATERAL \
    (SELECT * FROM {s}.events WHERE seq > $1 AND seq <= h.head AND type IS NOT NULL ORDER BY seq LIMIT $2) e ON true \
    ORDER BY e.seq";

const TYPES: &str = "WITH RECURSIVE t(type) AS ((SELECT type FROM {s}.events WHERE type IS NOT NULL ORDER BY type LIMIT 1) \
    UNION ALL SELECT (SELECT e.type FROM {s}.events e WHERE e.type IS NOT NULL AND e.type > t.type ORDER BY e.type LIMIT 1) \
    FROM t WHERE t.type IS NOT NULL) SELECT type FROM t WHERE type IS NOT NULL";

const STATS: &str = "SELECT h.head, h.pruned, h.total, p.open, p.begun, p.failed, r.count, r.alone, r.begun, w.count, \
    w.alone, w.begun, l.count, l.alone, f.count, f.alone, (SELECT count(*) FROM {s}.inbox), \
    pg_total_relation_size('{s}.events') + pg_total_relation_size('{s}.deliveries') \
    + pg_total_relation_size('{s}.attempts'), \
    (SELECT coalesce(jsonb_object_agg(lag.name, lag.lag), '{}') FROM ({lag}) lag)::text \
    FROM {s}.head h \
    CROSS JOIN (SELECT (SELECT count(*) FROM {s}.progress WHERE open > 0) AS open, \
        (SELECT count(*) FROM {s}.progress WHERE open > 0 AND begun > 0) AS begun, \
        (SELECT count(*) FROM {s}.progress WHERE open = 0 AND failed > 0) AS failed) p \
    CROSS JOIN (SELECT count(*), count(*) FILTER (WHERE alone) AS alone, \
        count(*) FILTER (WHERE alone AND started_at IS NOT NULL) AS begun FROM {s}.deliveries WHERE stage = 0) r \
    CROSS JOIN (SELECT count(*), count(*) FILTER (WHERE alone) AS alone, \
        count(*) FILTER (WHERE alone AND started_at IS NOT NULL) AS begun FROM {s}.deliveries WHERE stage = 1) w \
    CROSS JOIN (SELECT count(*), count(*) FILTER (WHERE alone) AS alone FROM {s}.deliveries WHERE stage = 2) l \
    CROSS JOIN (SELECT count(*), count(*) FILTER (WHERE alone) AS alone FROM {s}.deliveries WHERE stage = 4) f";

/// How many types are looked up one by one. Beyond, what is newest is read and sifted.
const FEW_TYPES: usize = 64;

impl Store {
    /// A page of the log, as of one instant.
    pub(super) async fn log(&self, after: Seq, max: usize) -> Step<LogPage> {
        let text = LOG.replace("{event}", EVENT_COLUMNS);
        let mut session = self.session().await?;
        let rows = session.rows(self.statement(&text).bind(signed(after)).bind(limit(max))).await;
        let rows = session.finish(rows).await?;
        let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let (head, pruned, epoch) =
            (unsigned(first.try_get(0)?), unsigned(first.try_get(1)?), first.try_get::<&str, _>(2)?);
        let mut events = Vec::with_capacity(rows.len());
        for row in &rows {
            if row.try_get::<Option<i64>, _>(3)?.is_some() {
                events.push(Arc::new(event(row, 3)?));
            }
        }
        let last = events.last().and_then(|event| event.seq).filter(|_| events.len() == max);
        let next = if max == 0 { after } else { last.unwrap_or(head.max(after)) };
        Ok(LogPage { events, next, floor: pruned + 1, head, epoch: epoch.into() })
    }

    /// An event with everything, as of one instant.
    pub(super) async fn get(&self, id: &str) -> Step<Option<EventDetail>> {
        let text = format!("{DETAILS} WHERE e.id = $1 AND e.type IS NOT NULL ORDER BY s.name, a.number");
        let mut session = self.session().await?;
        let rows = session.rows(self.statement(&text).bind(id)).await;
        let rows = session.finish(rows).await?;
        let detail = details(&rows)?.pop();
        Ok(detail.map(|(event, deliveries)| EventDetail {
            record: EventRecord::derive(Arc::new(event), &deliveries),
            deliveries,
        }))
    }

    /// A page of events, newest first.
    pub(super) async fn list(&self, filter: &EventFilter) -> Step<EventPage> {
        let mut session = self.session().await?;
        let page = session.list(filter).await;
        session.finish(page).await
    }

    /// A page of dead letters.
    pub(super) async fn dead_letters(&self, filter: &DeadLetterFilter) -> Step<DeadLetterPage> {
        let mut session = self.session().await?;
        let page = session.dead_letters(filter).await;
        session.finish(page).await
    }

    /// Figures, as of one instant.
    pub(super) async fn stats(&self) -> Step<ProviderStats> {
        let mut session = self.session().await?;
        let text = STATS.replace("{lag}", LAG);
        let row = session.row(self.statement(&text).bind(self.now())).await;
        let row = session.finish(row).await?;
        let figure = |at: usize| row.try_get::<i64, _>(at).map(unsigned);
        let [open, begun, failed] = [figure(3)?, figure(4)?, figure(5)?];
        let [ready, ready_alone, ready_begun] = [figure(6)?, figure(7)?, figure(8)?];
        let [waiting, waiting_alone, waiting_begun] = [figure(9)?, figure(10)?, figure(11)?];
        let [leased, leased_alone, dead, dead_alone] = [figure(12)?, figure(13)?, figure(14)?, figure(15)?];
        // An event with one delivery stands as that does; progress counts for the others.
        let processing = begun + ready_begun + waiting_begun + leased_alone;
        let pending = (open + ready_alone + waiting_alone + leased_alone).saturating_sub(processing);
        let failed = failed + dead_alone;
        let total = figure(2)?;
        let mut stats = ProviderStats {
            provider_type: "postgres",
            total_events: total,
            pending_events: pending,
            processing_events: processing,
            completed_events: total.saturating_sub(pending + processing + failed),
            failed_events: failed,
            pending_deliveries: ready + waiting,
            processing_deliveries: leased,
            dead_letters: dead,
            head_seq: figure(0)?,
            floor_seq: figure(1)? + 1,
            provider_specific: serde_json::Map::new(),
        };
        let ears = *self.relay.ears.borrow();
        let specific = [
            ("server", self.place.clone().into()),
            ("server_version", self.server.clone().into()),
            ("schema", self.options.schema.clone().into()),
            ("schema_version", super::open::served().into()),
            ("inbox_waiting", figure(16)?.into()),
            ("bytes", figure(17)?.into()),
            ("lag_seconds", serde_json::from_str(row.try_get(18)?).unwrap_or_default()),
            ("connections", self.connections.pool.size().into()),
            ("idle_connections", self.connections.idle().into()),
            ("max_connections", self.options.max_connections.into()),
            ("listener", ears.hearing.as_str().into()),
            ("listener_generation", ears.generation.into()),
        ];
        stats.provider_specific.extend(specific.map(|(name, value): (_, serde_json::Value)| (name.to_owned(), value)));
        Ok(stats)
    }

    fn push(&self, query: &mut QueryBuilder<Postgres>, text: &str) {
        query.push(self.text(text));
    }
}

impl Session<'_> {
    /// The stored types that a pattern matches.
    pub(super) async fn types(&mut self, pattern: &Pattern) -> Step<Vec<String>> {
        let rows = self.rows(self.store.statement(TYPES)).await?;
        let types: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        let meant = |text: &String| EventType::parse(text).is_ok_and(|event_type| pattern.matches(&event_type));
        Ok(types.into_iter().filter(meant).collect())
    }

    async fn list(&mut self, filter: &EventFilter) -> Step<EventPage> {
        self.begin_reading().await?;
        let types = match &filter.pattern {
            Some(pattern) => Some(self.types(pattern).await?),
            None => None,
        };
        let bound = rules::bound(filter.limit);
        let mut query = self.store.page_query(filter, types.as_deref(), limit(bound.saturating_add(1)));
        let rows = self.rows(query.build().persistent(false)).await?;
        let mut all = details(&rows)?;
        self.commit().await?;
        let is_more = all.len() > bound;
        all.truncate(bound);
        let next = all.last().and_then(|(event, _)| event.seq).filter(|_| is_more);
        let records = all.into_iter().map(|(event, own)| EventRecord::derive(Arc::new(event), &own));
        Ok(EventPage { records: records.collect(), next })
    }

    /// The dead letters that are meant, in the order of listing, at most `bound`: seqs, and the subscriptions' numbers
    /// and names.
    pub(super) async fn dead(&mut self, filter: &DeadLetterFilter, bound: usize) -> Step<Vec<(i64, i32, String)>> {
        let types = match &filter.pattern {
            Some(pattern) => Some(self.types(pattern).await?),
            None => None,
        };
        let mut query = self.store.dead_query(filter, types, limit(bound));
        let rows = self.rows(query.build().persistent(false)).await?;
        let letter = |row: &PgRow| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        Ok(rows.iter().map(letter).collect::<sqlx::Result<_>>()?)
    }

    async fn dead_letters(&mut self, filter: &DeadLetterFilter) -> Step<DeadLetterPage> {
        self.begin_reading().await?;
        let mut dead = self.dead(filter, filter.bound().saturating_add(1)).await?;
        let is_more = dead.len() > filter.bound();
        dead.truncate(filter.bound());
        let text = format!("{DETAILS} WHERE e.seq = ANY($1::bigint[]) ORDER BY e.seq, s.name, a.number");
        let seqs: Vec<i64> = dead.iter().map(|&(seq, ..)| seq).collect();
        let rows = self.rows(self.store.statement(&text).bind(seqs)).await?;
        self.commit().await?;
        let all = details(&rows)?.into_iter().map(|(event, own)| {
            let record = EventRecord::derive(Arc::new(event), &own);
            (record.event.seq.unwrap_or_default(), (record, own))
        });
        let all: std::collections::BTreeMap<Seq, _> = all.collect();
        let letter = |(seq, _, name): &(i64, i32, String)| {
            let (record, own) = all.get(&unsigned(*seq))?;
            let delivery = own.iter().find(|delivery| *delivery.subscription == **name)?;
            Some(DeadLetter { event: record.clone(), delivery: delivery.clone() })
        };
        let letters = dead.iter().filter_map(letter).collect();
        let next = dead.last().filter(|_| is_more).map(|(seq, _, name)| (unsigned(*seq), name.clone()));
        Ok(DeadLetterPage { letters, next })
    }
}

/// What decides the status of an event, from its deliveries.
const STATUS: &str = " CROSS JOIN LATERAL (SELECT coalesce(bool_or(d.stage < 3), false) AS open, \
    coalesce(bool_or(d.started_at IS NOT NULL), false) AS begun, coalesce(bool_or(d.stage = 4), false) AS failed \
    FROM {s}.deliveries d WHERE d.seq = e.seq) d";

/// The events that may have a status, where few do.
fn candidates(status: Status) -> Option<&'static str> {
    match status {
        Status::Completed => None,
        Status::Pending | Status::Processing => Some(
            "SELECT seq FROM {s}.deliveries WHERE stage = 0 UNION SELECT seq FROM {s}.deliveries WHERE stage = 1 \
                  UNION SELECT seq FROM {s}.deliveries WHERE stage = 2",
        ),
        Status::Failed => Some("SELECT DISTINCT seq FROM {s}.deliveries WHERE stage = 4"),
    }
}

impl Store {
    fn event_conditions(&self, query: &mut QueryBuilder<Postgres>, filter: &EventFilter) {
        query.push(" WHERE e.type IS NOT NULL");
        if let Some(source) = filter.source {
            query.push(" AND e.source = ").push_bind(source_code(source));
        }
        if let Some(user) = &filter.user_id {
            query.push(" AND e.user_id = ").push_bind(user_text(user));
        }
        let texts = [
            (" AND e.schema = ", &filter.schema),
            (" AND e.entity = ", &filter.entity),
            (" AND e.operation = ", &filter.operation),
            (" AND e.instance_id = ", &filter.instance_id),
        ];
        for (condition, text) in texts {
            if let Some(text) = text {
                query.push(condition).push_bind(text.clone());
            }
        }
        let numbers = [
            (" AND e.created_at >= ", filter.from.map(|from| from.as_microsecond())),
            (" AND e.created_at <= ", filter.to.map(|to| to.as_microsecond())),
            (" AND e.seq < ", filter.before.map(signed)),
        ];
        for (condition, number) in numbers {
            if let Some(number) = number {
                query.push(condition).push_bind(number);
            }
        }
        query.push(match filter.status {
            Some(Status::Pending) => " AND d.open AND NOT d.begun",
            Some(Status::Processing) => " AND d.open AND d.begun",
            Some(Status::Completed) => " AND NOT d.open AND NOT d.failed",
            Some(Status::Failed) => " AND NOT d.open AND d.failed",
            None => "",
        });
    }

    /// Adds a query for the seqs that are meant, newest first: of these types, or of all where none is named.
    fn push_seqs(&self, query: &mut QueryBuilder<Postgres>, filter: &EventFilter, types: &[String], limit: i64) {
        query.push("SELECT e.seq FROM ");
        match filter.status.and_then(candidates) {
            Some(candidates) => self.push(query, &format!("({candidates}) c JOIN {{s}}.events e ON e.seq = c.seq")),
            None => self.push(query, "{s}.events e"),
        }
        if filter.status.is_some() {
            self.push(query, STATUS);
        }
        self.event_conditions(query, filter);
        match types {
            [] => {}
            [one] => drop(query.push(" AND e.type = ").push_bind(one.clone())),
            many => drop(query.push(" AND e.type = ANY(").push_bind(many.to_vec()).push(")")),
        }
        query.push(" ORDER BY e.seq DESC LIMIT ").push_bind(limit);
    }

    /// The query for a page. Each of a few types has its own newest events, which the index finds at once.
    fn page_query(&self, filter: &EventFilter, types: Option<&[String]>, limit: i64) -> QueryBuilder<Postgres> {
        let mut query = QueryBuilder::new("WITH page AS MATERIALIZED (");
        match types {
            None => self.push_seqs(&mut query, filter, &[], limit),
            Some([]) => drop(query.push("SELECT 0::bigint AS seq WHERE false")),
            Some(types) if types.len() > FEW_TYPES => self.push_seqs(&mut query, filter, types, limit),
            Some(types) => {
                query.push("SELECT seq FROM (");
                for (at, one) in types.chunks(1).enumerate() {
                    query.push(if at == 0 { "(" } else { ") UNION ALL (" });
                    self.push_seqs(&mut query, filter, one, limit);
                }
                query.push(")) few ORDER BY seq DESC LIMIT ").push_bind(limit);
            }
        }
        query.push(") ");
        self.push(&mut query, DETAILS);
        query.push(" JOIN page ON page.seq = e.seq ORDER BY e.seq DESC, s.name, a.number");
        query
    }

    fn dead_query(&self, filter: &DeadLetterFilter, types: Option<Vec<String>>, limit: i64) -> QueryBuilder<Postgres> {
        let mut query = QueryBuilder::new("");
        self.push(
            &mut query,
            "SELECT d.seq, d.subscription, s.name FROM {s}.deliveries d JOIN {s}.subscriptions s ON s.id = d.subscription \
             JOIN {s}.events e ON e.seq = d.seq LEFT JOIN {s}.attempts a ON a.seq = d.seq \
             AND a.subscription = d.subscription AND a.number = d.number WHERE d.stage = 4",
        );
        if let Some(types) = types {
            query.push(" AND e.type = ANY(").push_bind(types).push(")");
        }
        let texts = [
            (" AND s.name = ", &filter.subscription),
            (" AND e.id = ", &filter.event_id),
            (" AND a.digest = ", &filter.digest),
        ];
        for (condition, text) in texts {
            if let Some(text) = text {
                query.push(condition).push_bind(text.clone());
            }
        }
        if let Some(verdict) = filter.verdict {
            query.push(" AND a.verdict = ").push_bind(verdict_code(verdict));
        }
        if let Some(since) = filter.since {
            query.push(" AND d.completed_at >= ").push_bind(since.as_microsecond());
        }
        if let Some((seq, name)) = &filter.after {
            query.push(" AND (d.seq < ").push_bind(signed(*seq)).push(" OR (d.seq = ").push_bind(signed(*seq));
            query.push(" AND s.name > ").push_bind(name.clone()).push("))");
        }
        query.push(" ORDER BY d.seq DESC, s.name LIMIT ").push_bind(limit);
        query
    }
}
