//! Reading: the log, lists, dead letters and figures, on connections that can only read.

use std::collections::BTreeMap;
use std::sync::Arc;

use sqlx::sqlite::{SqliteConnection, SqlitePool};
use sqlx::{AssertSqlSafe, QueryBuilder, Row as _, Sqlite};

use super::row::{
    DELIVERY_COLUMNS, EVENT_COLUMNS, SUBSCRIPTION_BITS, attempt, delivery, event, seq_of, signed, unsigned,
};
use super::statement::json_list;
use crate::delivery::{Delivery, EventDetail, EventRecord, Status};
use crate::event::{Event, EventType, Seq, Source, UserId};
use crate::pattern::Pattern;
use crate::provider::{
    DeadLetter, DeadLetterFilter, DeadLetterPage, EventFilter, EventPage, LogPage, ProviderStats, rules,
};

/// A page of the log, as of one instant.
pub(super) async fn log(pool: &SqlitePool, after: Seq, max: usize) -> sqlx::Result<LogPage> {
    let text = format!(
        "SELECT h.head, h.pruned, h.epoch, {EVENT_COLUMNS} FROM head h LEFT JOIN \
         (SELECT * FROM events WHERE seq > ? AND type IS NOT NULL ORDER BY seq LIMIT ?) e ORDER BY e.seq"
    );
    let query = sqlx::query(AssertSqlSafe(text)).bind(signed(after)).bind(signed(max as u64));
    let rows = query.fetch_all(pool).await?;
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

/// The deliveries of events, with all attempts, in the order of the subscriptions' names.
async fn deliveries(connection: &mut SqliteConnection, seqs: &[Seq]) -> sqlx::Result<BTreeMap<Seq, Vec<Delivery>>> {
    let list = json_list(seqs.iter().map(|&seq| signed(seq)));
    let range = format!("(j.value << {SUBSCRIPTION_BITS}) AND (j.value << {SUBSCRIPTION_BITS}) | 1048575");
    let text = format!(
        "SELECT a.delivery, a.record FROM json_each(?) j JOIN attempts a ON a.delivery BETWEEN {range} \
         ORDER BY a.delivery, a.number"
    );
    let mut attempts: BTreeMap<i64, Vec<_>> = BTreeMap::new();
    for row in sqlx::query(AssertSqlSafe(text)).bind(&*list).fetch_all(&mut *connection).await? {
        attempts.entry(row.try_get(0)?).or_default().push(attempt(row.try_get(1)?)?);
    }
    let text = format!(
        "SELECT {DELIVERY_COLUMNS} FROM json_each(?) j JOIN deliveries d ON d.id BETWEEN {range} \
         JOIN subscriptions s ON s.id = d.subscription ORDER BY j.value, s.name"
    );
    let mut all: BTreeMap<Seq, Vec<Delivery>> = BTreeMap::new();
    for row in sqlx::query(AssertSqlSafe(text)).bind(&*list).fetch_all(&mut *connection).await? {
        let id: i64 = row.try_get(0)?;
        let own = attempts.remove(&id).unwrap_or_default();
        all.entry(seq_of(id)).or_default().push(delivery(&row, own)?);
    }
    Ok(all)
}

/// An event with everything.
pub(super) async fn get(pool: &SqlitePool, id: &str) -> sqlx::Result<Option<EventDetail>> {
    let mut tx = pool.begin().await?;
    let text = format!("SELECT {EVENT_COLUMNS} FROM events e WHERE e.id = ? AND e.type IS NOT NULL");
    let Some(row) = sqlx::query(AssertSqlSafe(text)).bind(id).fetch_optional(&mut *tx).await? else { return Ok(None) };
    let event = event(&row, 0)?;
    let seq = event.seq.unwrap_or_default();
    let deliveries = deliveries(&mut tx, &[seq]).await?.remove(&seq).unwrap_or_default();
    Ok(Some(EventDetail { record: EventRecord::derive(Arc::new(event), &deliveries), deliveries }))
}

/// A list of texts as one JSON parameter.
pub(super) fn as_json(texts: &[String]) -> sqlx::Result<String> {
    serde_json::to_string(texts).map_err(|error| sqlx::Error::Encode(error.into()))
}

/// The stored types that a pattern matches.
pub(super) async fn types(connection: &mut SqliteConnection, pattern: &Pattern) -> sqlx::Result<Vec<String>> {
    let text = "WITH RECURSIVE t(type) AS (SELECT min(type) FROM events WHERE type IS NOT NULL UNION ALL \
                SELECT (SELECT min(type) FROM events WHERE type IS NOT NULL AND type > t.type) FROM t \
                WHERE t.type IS NOT NULL) SELECT type FROM t WHERE type IS NOT NULL";
    let types: Vec<String> = sqlx::query_scalar(text).fetch_all(connection).await?;
    let meant = |text: &String| EventType::parse(text).is_ok_and(|event_type| pattern.matches(&event_type));
    Ok(types.into_iter().filter(meant).collect())
}

fn event_conditions(query: &mut QueryBuilder<Sqlite>, filter: &EventFilter) {
    query.push(" WHERE e.type IS NOT NULL");
    if let Some(source) = filter.source {
        let at = Source::ALL.iter().position(|&one| one == source).unwrap_or(0);
        query.push(" AND e.source = ").push_bind(at as i64);
    }
    match &filter.user_id {
        Some(UserId::Number(number)) => drop(query.push(" AND e.user_id = ").push_bind(*number)),
        Some(UserId::Text(text)) => drop(query.push(" AND e.user_id = ").push_bind(&**text)),
        None => {}
    }
    let texts = [
        ("schema", &filter.schema),
        ("entity", &filter.entity),
        ("operation", &filter.operation),
        ("instance_id", &filter.instance_id),
    ];
    for (column, text) in texts {
        if let Some(text) = text {
            query.push(" AND e.").push(column).push(" = ").push_bind(&**text);
        }
    }
    if let Some(from) = filter.from {
        query.push(" AND e.created_at >= ").push_bind(from.as_microsecond());
    }
    if let Some(to) = filter.to {
        query.push(" AND e.created_at <= ").push_bind(to.as_microsecond());
    }
    if let Some(before) = filter.before {
        query.push(" AND e.seq < ").push_bind(signed(before));
    }
    match filter.status {
        Some(Status::Completed) => query.push(" AND NOT EXISTS (SELECT 1 FROM progress p WHERE p.seq = e.seq)"),
        Some(Status::Pending) => query.push(" AND p.status = 0"),
        Some(Status::Processing) => query.push(" AND p.status = 1"),
        Some(Status::Failed) => query.push(" AND p.status = 3"),
        None => query,
    };
}

/// How many types are looked up one by one. Beyond, what is newest is read and sifted.
const FEW_TYPES: usize = 64;

/// A query for the seqs that are meant, newest first.
fn push_seqs(query: &mut QueryBuilder<Sqlite>, filter: &EventFilter, event_type: Option<&str>, limit: i64) {
    let is_in_progress = filter.status.is_some_and(|status| status != Status::Completed);
    query.push("SELECT e.seq FROM ");
    query.push(if is_in_progress { "progress p CROSS JOIN events e ON e.seq = p.seq" } else { "events e" });
    event_conditions(query, filter);
    if let Some(event_type) = event_type {
        query.push(" AND e.type = ").push_bind(event_type);
    }
    query.push(if is_in_progress { " ORDER BY p.seq" } else { " ORDER BY e.seq" });
    query.push(" DESC LIMIT ").push_bind(limit);
}

/// The query for a page. Each of a few types has its own newest events, which the index finds at once.
fn page_query(filter: &EventFilter, types: Option<&[String]>, limit: i64) -> QueryBuilder<Sqlite> {
    let mut query = QueryBuilder::new("SELECT ");
    query.push(EVENT_COLUMNS).push(" FROM events e WHERE e.seq IN (");
    match types {
        None => push_seqs(&mut query, filter, None, limit),
        Some([]) => drop(query.push("NULL")),
        Some(types) => {
            for (at, event_type) in types.iter().enumerate() {
                query.push(if at == 0 { "SELECT seq FROM (" } else { ") UNION ALL SELECT seq FROM (" });
                push_seqs(&mut query, filter, Some(event_type), limit);
            }
            query.push(")");
        }
    }
    query.push(") ORDER BY e.seq DESC LIMIT ").push_bind(limit);
    query
}

fn many_types_query(filter: &EventFilter, types: &[String], limit: i64) -> sqlx::Result<QueryBuilder<Sqlite>> {
    let mut query = QueryBuilder::new("SELECT ");
    query.push(EVENT_COLUMNS).push(" FROM events e LEFT JOIN progress p ON p.seq = e.seq");
    event_conditions(&mut query, filter);
    // The plus keeps the index on types out of it.
    query.push(" AND +e.type IN (SELECT value FROM json_each(").push_bind(as_json(types)?);
    query.push(")) ORDER BY e.seq DESC LIMIT ").push_bind(limit);
    Ok(query)
}

/// A page of events, newest first.
pub(super) async fn list(pool: &SqlitePool, filter: &EventFilter) -> sqlx::Result<EventPage> {
    let mut tx = pool.begin().await?;
    let types = match &filter.pattern {
        Some(pattern) => Some(types(&mut tx, pattern).await?),
        None => None,
    };
    let bound = rules::bound(filter.limit);
    let limit = signed(bound.saturating_add(1) as u64);
    let mut query = match types {
        Some(types) if types.len() > FEW_TYPES => many_types_query(filter, &types, limit)?,
        types => page_query(filter, types.as_deref(), limit),
    };
    let rows = query.build().fetch_all(&mut *tx).await?;
    let events: Vec<Event> = rows.iter().take(bound).map(|row| event(row, 0)).collect::<sqlx::Result<_>>()?;
    let seqs: Vec<Seq> = events.iter().filter_map(|event| event.seq).collect();
    let mut deliveries = deliveries(&mut tx, &seqs).await?;
    let next = seqs.last().copied().filter(|_| rows.len() > bound);
    let record = |event: Event| {
        let own = event.seq.and_then(|seq| deliveries.remove(&seq)).unwrap_or_default();
        EventRecord::derive(Arc::new(event), &own)
    };
    Ok(EventPage { records: events.into_iter().map(record).collect(), next })
}

/// The ids of the dead letters that are meant, in the order of listing, at most `bound`.
pub(super) async fn dead_ids(
    connection: &mut SqliteConnection,
    filter: &DeadLetterFilter,
    bound: usize,
) -> sqlx::Result<Vec<(i64, String)>> {
    let types = match &filter.pattern {
        Some(pattern) => Some(types(connection, pattern).await?),
        None => None,
    };
    let mut query = QueryBuilder::<Sqlite>::new(
        "SELECT d.id, s.name FROM deliveries d JOIN subscriptions s ON s.id = d.subscription \
         JOIN events e ON e.seq = d.id >> 20 \
         LEFT JOIN attempts a ON a.delivery = d.id AND a.number = d.number WHERE d.stage = 4",
    );
    if let Some(types) = &types {
        query.push(" AND e.type IN (SELECT value FROM json_each(").push_bind(as_json(types)?).push("))");
    }
    if let Some(subscription) = &filter.subscription {
        query.push(" AND s.name = ").push_bind(&**subscription);
    }
    if let Some(id) = &filter.event_id {
        query.push(" AND e.id = ").push_bind(&**id);
    }
    if let Some(verdict) = filter.verdict {
        query.push(" AND a.record ->> '$.verdict' = ").push_bind(verdict.as_str());
    }
    if let Some(digest) = &filter.digest {
        query.push(" AND a.record ->> '$.digest' = ").push_bind(&**digest);
    }
    if let Some(since) = filter.since {
        query.push(" AND d.completed_at >= ").push_bind(since.as_microsecond());
    }
    if let Some((seq, name)) = &filter.after {
        query.push(" AND (d.id >> 20 < ").push_bind(signed(*seq)).push(" OR (d.id >> 20 = ").push_bind(signed(*seq));
        query.push(" AND s.name > ").push_bind(&**name).push("))");
    }
    query.push(" ORDER BY d.id >> 20 DESC, s.name LIMIT ").push_bind(signed(bound as u64));
    let rows = query.build().fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// A page of dead letters.
pub(super) async fn dead_letters(pool: &SqlitePool, filter: &DeadLetterFilter) -> sqlx::Result<DeadLetterPage> {
    let mut tx = pool.begin().await?;
    let mut ids = dead_ids(&mut tx, filter, filter.bound().saturating_add(1)).await?;
    let is_more = ids.len() > filter.bound();
    ids.truncate(filter.bound());
    let mut seqs: Vec<Seq> = ids.iter().map(|&(id, _)| seq_of(id)).collect();
    seqs.dedup();
    let text = format!("SELECT {EVENT_COLUMNS} FROM json_each(?) j JOIN events e ON e.seq = j.value");
    let list = json_list(seqs.iter().map(|&seq| signed(seq)));
    let rows = sqlx::query(AssertSqlSafe(text)).bind(list).fetch_all(&mut *tx).await?;
    let deliveries = deliveries(&mut tx, &seqs).await?;
    let mut records = BTreeMap::new();
    for row in &rows {
        let event = event(row, 0)?;
        let own = event.seq.and_then(|seq| deliveries.get(&seq)).map(Vec::as_slice).unwrap_or_default();
        records.insert(event.seq.unwrap_or_default(), EventRecord::derive(Arc::new(event), own));
    }
    let letter = |(id, name): &(i64, String)| {
        let own = deliveries.get(&seq_of(*id))?;
        let delivery = own.iter().find(|delivery| *delivery.subscription == **name)?;
        Some(DeadLetter { event: records.get(&seq_of(*id))?.clone(), delivery: delivery.clone() })
    };
    let letters = ids.iter().filter_map(letter).collect();
    let next = ids.last().filter(|_| is_more).map(|(id, name)| (seq_of(*id), name.clone()));
    Ok(DeadLetterPage { letters, next })
}

/// Figures, as of one instant.
pub(super) async fn stats(pool: &SqlitePool) -> sqlx::Result<ProviderStats> {
    let text = "SELECT h.head, h.pruned, h.total, p.pending, p.processing, p.failed, \
        (SELECT count(*) FROM deliveries WHERE stage = 0 AND key IS NULL) \
        + (SELECT count(*) FROM deliveries WHERE stage = 0 AND key IS NOT NULL) + (SELECT count(*) FROM deliveries WHERE stage = 1), \
        (SELECT count(*) FROM deliveries WHERE stage = 2), (SELECT count(*) FROM deliveries WHERE stage = 4), \
        (SELECT count(*) FROM inbox) FROM head h, (SELECT count(*) FILTER (WHERE status = 0) AS pending, \
        count(*) FILTER (WHERE status = 1) AS processing, count(*) FILTER (WHERE status = 3) AS failed FROM progress) p";
    let row = sqlx::query(text).fetch_one(pool).await?;
    let figure = |at: usize| row.try_get::<i64, _>(at).map(unsigned);
    let (pending, processing, failed) = (figure(3)?, figure(4)?, figure(5)?);
    Ok(ProviderStats {
        provider_type: "sqlite",
        total_events: figure(2)?,
        pending_events: pending,
        processing_events: processing,
        completed_events: figure(2)?.saturating_sub(pending + processing + failed),
        failed_events: failed,
        pending_deliveries: figure(6)?,
        processing_deliveries: figure(7)?,
        dead_letters: figure(8)?,
        head_seq: figure(0)?,
        floor_seq: figure(1)? + 1,
        provider_specific: [("inbox_waiting".to_owned(), figure(9)?.into())].into_iter().collect(),
    })
}
