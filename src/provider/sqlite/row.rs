//! How events and deliveries stand in rows.

use std::sync::Arc;

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, TypeInfo as _, ValueRef as _};

use super::statement::Parameters;
use crate::delivery::{Attempt, Delivery, Status};
use crate::event::{Event, EventId, EventType, Metadata, Payload, Seq, Source, UserId, micros};

/// How many low bits of a delivery's id are the subscription's.
pub(super) const SUBSCRIPTION_BITS: u32 = 20;

/// Pending, and due.
pub(super) const READY: i64 = 0;
/// Pending, and due later.
pub(super) const WAITING: i64 = 1;
/// Processing.
pub(super) const LEASED: i64 = 2;
/// Completed.
pub(super) const COMPLETED: i64 = 3;
/// Failed.
pub(super) const FAILED: i64 = 4;

/// The id of a delivery.
pub(super) fn delivery_id(seq: Seq, subscription: i64) -> i64 {
    (signed(seq) << SUBSCRIPTION_BITS) | subscription
}

/// The seq that a delivery's id stands for.
pub(super) fn seq_of(delivery: i64) -> Seq {
    unsigned(delivery >> SUBSCRIPTION_BITS)
}

/// A number that the store keeps as a signed one.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A stored number that is never below 0.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn count(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The columns of an event, in the order in which [`bind_event`] and [`event`] have them.
pub(super) const EVENT_COLUMNS: &str = "e.seq, e.id, e.type, e.source, e.created_at, e.appended_at, e.key, e.user_id, \
    e.session_id, e.instance_id, e.schema, e.entity, e.operation, e.metadata, e.trace_parent, e.caused_by, \
    e.content_type, e.payload, e.depth";

/// Binds an event as a row. Texts that are shared go without being copied.
pub(super) fn bind_event(event: &Event, seq: Seq, now: i64, to: &mut Parameters) {
    let source = Source::ALL.iter().position(|&source| source == event.source).unwrap_or(0);
    to.add(signed(seq)).add(event.id.shared()).add(event.event_type.as_str()).add(source as i64);
    to.add(event.created_at.as_microsecond()).add(now).add(event.key.clone());
    match &event.user_id {
        Some(UserId::Number(number)) => to.add(*number),
        Some(UserId::Text(text)) => to.add(&**text),
        None => to.add(None::<i64>),
    };
    let metadata = (!event.metadata.is_empty()).then(|| serde_json::to_string(&event.metadata).unwrap_or_default());
    to.add(event.session_id.clone()).add(Arc::clone(&event.instance_id)).add(event.schema.clone());
    to.add(event.entity.clone()).add(event.operation.clone()).add(metadata);
    to.add(event.trace_parent.clone()).add(event.caused_by.as_ref().map(EventId::shared));
    to.add((!event.payload.is_json()).then(|| event.payload.content_type())).add(&**event.payload.bytes());
    to.add(i64::from(event.depth));
}

fn broken(error: impl Into<sqlx::error::BoxDynError>) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}

fn user_id(row: &SqliteRow, at: usize) -> sqlx::Result<Option<UserId>> {
    let raw = row.try_get_raw(at)?;
    if raw.is_null() {
        return Ok(None);
    }
    let is_number = raw.type_info().name() == "INTEGER";
    Ok(Some(match is_number {
        true => UserId::Number(row.try_get_unchecked(at)?),
        false => UserId::Text(row.try_get_unchecked::<&str, _>(at)?.into()),
    }))
}

/// The event whose columns begin at `at`.
pub(super) fn event(row: &SqliteRow, at: usize) -> sqlx::Result<Event> {
    let text = |column: usize| row.try_get::<Option<&str>, _>(at + column).map(|text| text.map(Arc::<str>::from));
    let metadata = match row.try_get::<Option<&str>, _>(at + 13)? {
        Some(json) => serde_json::from_str(json).map_err(broken)?,
        None => Metadata::new(),
    };
    let body = Bytes::from(row.try_get::<Option<Vec<u8>>, _>(at + 17)?.unwrap_or_default());
    let source = usize::try_from(row.try_get::<i64, _>(at + 3)?).ok().and_then(|at| Source::ALL.get(at));
    let caused_by = row.try_get::<Option<&str>, _>(at + 15)?;
    Ok(Event {
        seq: Some(unsigned(row.try_get(at)?)),
        id: EventId::parse(row.try_get(at + 1)?).map_err(broken)?,
        event_type: EventType::parse(row.try_get(at + 2)?).map_err(broken)?,
        source: *source.ok_or_else(|| broken("an event has an unknown source"))?,
        created_at: micros(row.try_get(at + 4)?),
        key: text(6)?,
        user_id: user_id(row, at + 7)?,
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

/// The columns of a delivery, in the order in which [`delivery`] has them.
pub(super) const DELIVERY_COLUMNS: &str = "d.id, s.name, d.stage, d.due, d.started_at, d.completed_at, d.retry_count, \
    d.replay";

/// A delivery whose attempts are these.
pub(super) fn delivery(row: &SqliteRow, attempts: Vec<Attempt>) -> sqlx::Result<Delivery> {
    let status = match row.try_get::<i64, _>(2)? {
        READY | WAITING => Status::Pending,
        LEASED => Status::Processing,
        COMPLETED => Status::Completed,
        _ => Status::Failed,
    };
    let last = attempts.last();
    let error = last.and_then(|last| last.error.as_ref()).map(|fault| fault.to_string().into());
    Ok(Delivery {
        subscription: row.try_get::<&str, _>(1)?.into(),
        status,
        retry_count: count(row.try_get(6)?),
        verdict: last.map(|last| last.verdict),
        error,
        due_at: (status == Status::Pending).then_some(micros(row.try_get(3)?)),
        started_at: row.try_get::<Option<i64>, _>(4)?.map(micros),
        completed_at: row.try_get::<Option<i64>, _>(5)?.map(micros),
        replay: row.try_get::<i64, _>(7)? != 0,
        attempts,
    })
}

/// An attempt's record.
pub(super) fn attempt(json: &str) -> sqlx::Result<Attempt> {
    serde_json::from_str(json).map_err(broken)
}

/// A counter.
pub(super) fn counter(row: &SqliteRow, at: usize) -> sqlx::Result<u32> {
    row.try_get(at).map(count)
}

/// The status that `progress` tells; an event that does not stand there is completed.
pub(super) fn event_status(stored: Option<i64>) -> Status {
    match stored {
        Some(0) => Status::Pending,
        Some(1) => Status::Processing,
        Some(3) => Status::Failed,
        _ => Status::Completed,
    }
}
