//! How events, deliveries and attempts stand in rows.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::delivery::{Attempt, Delivery, Status};
use crate::event::{Event, EventId, EventType, Metadata, Payload, Seq, Source, UserId, micros};

/// Pending, and due.
pub(super) const READY: i16 = 0;
/// Pending, and due later.
pub(super) const WAITING: i16 = 1;
/// Processing.
pub(super) const LEASED: i16 = 2;
/// Completed.
pub(super) const COMPLETED: i16 = 3;
/// Failed.
pub(super) const FAILED: i16 = 4;

/// The longest span, some 36,000 years: added to any instant of a clock it still fits.
const LONGEST: i64 = 1 << 60;

/// A number that the store keeps as a signed one.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A stored number that is never below 0.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// A limit, or a room, as a number of rows.
pub(super) fn limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A span in microseconds.
pub(super) fn as_micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}

pub(super) fn broken(error: impl Into<sqlx::error::BoxDynError>) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}

/// The columns of an event, in the order in which [`event`] has them. The payload is the last but one.
pub(super) const EVENT_COLUMNS: &str = "e.seq, e.id, e.type, e.source, e.created_at, e.appended_at, e.key, e.user_id, \
    e.session_id, e.instance_id, e.schema, e.entity, e.operation, e.metadata, e.trace_parent, e.caused_by, \
    e.content_type, e.payload, e.depth";

/// How many columns an event has.
pub(super) const EVENT_WIDTH: usize = 19;

/// The code of a source.
pub(super) fn source_code(source: Source) -> i16 {
    let at = Source::ALL.iter().position(|&one| one == source);
    at.and_then(|at| i16::try_from(at).ok()).unwrap_or(0)
}

/// The source of a code.
pub(super) fn source_of(code: i16) -> Option<Source> {
    Source::ALL.get(usize::try_from(code).ok()?).copied()
}

/// A user as JSON text: the number 7 and the text "7" are two.
pub(super) fn user_text(user: &UserId) -> String {
    serde_json::to_string(user).unwrap_or_default()
}

/// Metadata as JSON text; nothing for none.
pub(super) fn metadata_text(metadata: &Metadata) -> Option<String> {
    (!metadata.is_empty()).then(|| serde_json::to_string(metadata).unwrap_or_default())
}

/// The event whose columns begin at `at`.
pub(super) fn event(row: &PgRow, at: usize) -> sqlx::Result<Event> {
    let text = |column: usize| row.try_get::<Option<&str>, _>(at + column).map(|text| text.map(Arc::<str>::from));
    let metadata = match row.try_get::<Option<&str>, _>(at + 13)? {
        Some(json) => serde_json::from_str(json).map_err(broken)?,
        None => Metadata::new(),
    };
    let user_id = row.try_get::<Option<&str>, _>(at + 7)?.map(serde_json::from_str).transpose().map_err(broken)?;
    let body = row.try_get::<Option<&[u8]>, _>(at + 17)?.map(Bytes::copy_from_slice).unwrap_or_default();
    let caused_by = row.try_get::<Option<&str>, _>(at + 15)?;
    Ok(Event {
        seq: Some(unsigned(row.try_get(at)?)),
        id: EventId::parse(row.try_get(at + 1)?).map_err(broken)?,
        event_type: EventType::parse(row.try_get(at + 2)?).map_err(broken)?,
        source: source_of(row.try_get(at + 3)?).ok_or_else(|| broken("an event has an unknown source"))?,
        created_at: micros(row.try_get(at + 4)?),
        key: text(6)?,
        user_id,
        session_id: text(8)?,
        instance_id: text(9)?.unwrap_or_default(),
        schema: text(10)?,
        entity: text(11)?,
        operation: text(12)?,
        metadata,
        trace_parent: text(14)?,
        caused_by: caused_by.map(EventId::parse).transpose().map_err(broken)?,
        depth: counter(row, at + 18)?,
        payload: Payload::stored(row.try_get::<Option<&str>, _>(at + 16)?.unwrap_or(crate::event::JSON), body),
    })
}

/// What [`details`] reads: events, each with its deliveries, each with its attempts. Of the rows of one event only the
/// first has the payload.
pub(super) const DETAILS: &str = "SELECT e.seq, e.id, e.type, e.source, e.created_at, e.appended_at, e.key, \
    e.user_id, e.session_id, e.instance_id, e.schema, e.entity, e.operation, e.metadata, e.trace_parent, e.caused_by, \
    e.content_type, CASE WHEN row_number() OVER (PARTITION BY e.seq ORDER BY s.name, a.number) = 1 THEN e.payload END, \
    e.depth, s.name, d.stage, d.due, d.started_at, d.completed_at, d.retry_count, d.replay, a.record \
    FROM {s}.events e LEFT JOIN {s}.deliveries d ON d.seq = e.seq LEFT JOIN {s}.subscriptions s ON s.id = d.subscription \
    LEFT JOIN {s}.attempts a ON a.seq = d.seq AND a.subscription = d.subscription ";

/// The events of these rows, which are in the order of seq, name and number.
pub(super) fn details(rows: &[PgRow]) -> sqlx::Result<Vec<(Event, Vec<Delivery>)>> {
    let mut all: Vec<(Event, Vec<Delivery>)> = Vec::new();
    for row in rows {
        let seq: Seq = unsigned(row.try_get(0)?);
        if all.last().is_none_or(|(event, _)| event.seq != Some(seq)) {
            all.push((event(row, 0)?, Vec::new()));
        }
        let (Some((_, deliveries)), Some(name)) = (all.last_mut(), row.try_get::<Option<&str>, _>(EVENT_WIDTH)?) else {
            continue;
        };
        if deliveries.last().is_none_or(|delivery| *delivery.subscription != *name) {
            deliveries.push(delivery(row, EVENT_WIDTH)?);
        }
        if let (Some(delivery), Some(json)) = (deliveries.last_mut(), row.try_get::<Option<&str>, _>(EVENT_WIDTH + 7)?)
        {
            let attempt: Attempt = serde_json::from_str(json).map_err(broken)?;
            delivery.verdict = Some(attempt.verdict);
            delivery.error = attempt.error.as_ref().map(|fault| fault.to_string().into());
            delivery.attempts.push(attempt);
        }
    }
    Ok(all)
}

/// A delivery without its attempts.
fn delivery(row: &PgRow, at: usize) -> sqlx::Result<Delivery> {
    let status = match row.try_get::<i16, _>(at + 1)? {
        READY | WAITING => Status::Pending,
        LEASED => Status::Processing,
        COMPLETED => Status::Completed,
        _ => Status::Failed,
    };
    let due: i64 = row.try_get(at + 2)?;
    Ok(Delivery {
        subscription: row.try_get::<&str, _>(at)?.into(),
        status,
        retry_count: counter(row, at + 5)?,
        verdict: None,
        error: None,
        due_at: (status == Status::Pending).then_some(micros(due)),
        started_at: row.try_get::<Option<i64>, _>(at + 3)?.map(micros),
        completed_at: row.try_get::<Option<i64>, _>(at + 4)?.map(micros),
        replay: row.try_get(at + 6)?,
        attempts: Vec::new(),
    })
}

/// A counter.
pub(super) fn counter(row: &PgRow, at: usize) -> sqlx::Result<u32> {
    row.try_get::<i32, _>(at).map(|number| u32::try_from(number).unwrap_or(0))
}

/// A counter as it is stored.
pub(super) fn stored_counter(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
