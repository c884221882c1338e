//! How events, deliveries and attempts stand in Redis, and how answers are read.
//!
//! The layouts of records are those that the scripts pack; all numbers are little-endian.

use std::sync::Arc;

use redis::Value;

use crate::delivery::{Attempt, Delivery, Status};
use crate::error::{Error, Result};
use crate::event::{Event, EventId, EventType, Seq, micros};
use crate::provider::{header, rules};

/// What cannot be read.
pub(super) fn broken(what: &str) -> Error {
    Error::store("redis", format!("read {what}"), "what is stored was not written by this version, or is damaged")
}

/// The bytes of an answer; none where it is something else.
pub(super) fn bytes(value: Value) -> Vec<u8> {
    match value {
        Value::BulkString(bytes) => bytes,
        Value::SimpleString(text) => text.into_bytes(),
        Value::Int(number) => number.to_string().into_bytes(),
        Value::Okay => b"OK".to_vec(),
        _ => Vec::new(),
    }
}

/// The text of an answer.
pub(super) fn text(value: Value) -> String {
    String::from_utf8(bytes(value)).unwrap_or_default()
}

/// The members of a list.
pub(super) fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(list) | Value::Set(list) => list,
        Value::Map(pairs) => pairs.into_iter().flat_map(|(key, value)| [key, value]).collect(),
        _ => Vec::new(),
    }
}

/// The texts of a list.
pub(super) fn texts(value: Value) -> Vec<String> {
    list(value).into_iter().map(text).collect()
}

/// A number that is never below 0.
pub(super) fn number(value: Value) -> u64 {
    match value {
        Value::Int(number) => u64::try_from(number).unwrap_or(0),
        other => text(other).parse().unwrap_or(0),
    }
}

/// A record that is read from its beginning on.
pub(super) struct Record<'a>(pub(super) &'a [u8]);

impl<'a> Record<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn small(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn token(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// An instant: scripts have no integers, and doubles are exact for all of these.
    pub(super) fn instant(&mut self) -> Option<i64> {
        self.array().map(f64::from_le_bytes).map(|number| number as i64)
    }

    pub(super) fn seq(&mut self) -> Option<Seq> {
        self.instant().and_then(|number| u64::try_from(number).ok())
    }

    /// Bytes behind their length.
    pub(super) fn sized(&mut self) -> Option<&'a [u8]> {
        let size = self.small()? as usize;
        let (first, rest) = self.0.split_at_checked(size)?;
        self.0 = rest;
        Some(first)
    }
}

/// An entry of the log: its seq, and the event.
pub(super) fn entry(value: Value) -> Result<(Seq, Arc<Event>)> {
    read_entry(value).ok_or_else(|| broken("an event"))
}

fn read_entry(value: Value) -> Option<(Seq, Arc<Event>)> {
    let mut parts = list(value).into_iter();
    let (place, fields) = (text(parts.next()?), list(parts.next()?));
    let seq: Seq = place.split('-').next()?.parse().ok()?;
    let (mut id, mut event_type, mut json, mut payload) = (None, None, None, None);
    let mut fields = fields.into_iter();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        match &*bytes(name) {
            b"id" => id = EventId::parse(&text(value)).ok(),
            b"type" => event_type = EventType::parse(&text(value)).ok(),
            b"event" => json = Some(bytes(value)),
            b"payload" => payload = Some(bytes(value)),
            _ => {}
        }
    }
    let event = header::event(&json?, id?, event_type?, payload?.into(), Some(seq))?;
    Some((seq, Arc::new(event)))
}

/// A delivery from its subscription's name, its record, and those of its attempts. The second part is when it ended, as
/// the scripts have it.
pub(super) fn delivery(name: &str, record: &[u8], attempts: &[u8]) -> Result<Delivery> {
    read_delivery(name, record, attempts).ok_or_else(|| broken("a delivery"))
}

fn read_delivery(name: &str, record: &[u8], attempts: &[u8]) -> Option<Delivery> {
    let mut record = Record(record);
    let (stage, _fresh, replay) = (record.byte()?, record.byte()?, record.byte()?);
    let (_keyed, _sole) = (record.byte()?, record.byte()?);
    let (_appended, due, started, completed) =
        (record.instant()?, record.instant()?, record.instant()?, record.instant()?);
    let _claimed = record.instant()?;
    let retry_count = record.small()?;
    let status = match stage {
        0 => Status::Pending,
        1 => Status::Processing,
        2 => Status::Completed,
        _ => Status::Failed,
    };
    let attempts = read_attempts(attempts)?;
    let last = attempts.last();
    let instant = |at: i64| (at != 0).then(|| micros(at));
    Some(Delivery {
        subscription: name.into(),
        status,
        retry_count,
        verdict: last.map(|last| last.verdict),
        error: last.and_then(|last| last.error.as_ref()).map(|fault| fault.to_string().into()),
        due_at: (status == Status::Pending).then(|| micros(due)),
        started_at: instant(started),
        completed_at: instant(completed),
        replay: replay != 0,
        attempts,
    })
}

/// Attempts stand one behind the other: as JSON after a 1, and after a 0 what is known of one that was lost.
fn read_attempts(records: &[u8]) -> Option<Vec<Attempt>> {
    let (mut records, mut attempts) = (Record(records), Vec::new());
    while !records.is_empty() {
        let mut record = Record(records.sized()?);
        let attempt = match record.byte()? {
            0 => {
                let (number, claimed, now) = (record.small()?, record.instant()?, record.instant()?);
                let worker = std::str::from_utf8(record.0).ok()?;
                rules::lost_attempt(number, worker.into(), micros(claimed), micros(now))
            }
            _ => serde_json::from_slice(record.0).ok()?,
        };
        attempts.push(attempt);
    }
    Some(attempts)
}
