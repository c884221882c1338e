//! The real host: every function is one import of the interface, and is only imported when it is called.

use core::time::Duration;

use super::Attributes;
use crate::{
    Event, Failure, Fault, Reply,
    bindings::{
        batch::exports::tidegate::plugin::packed_batch_handler::PackedEvent,
        exports::tidegate::plugin::handler as exported, tidegate::plugin as imported,
    },
    log::Level,
};

pub(crate) fn log(level: Level, message: &str, fields: Attributes) {
    imported::log::emit(level.number(), message, &fields);
}

pub(crate) fn config(key: &str) -> Option<String> {
    imported::config::get(key)
}

pub(crate) fn subscription() -> String {
    imported::delivery::subscription()
}

pub(crate) fn attempt() -> u32 {
    imported::delivery::attempt()
}

pub(crate) fn max_attempts() -> u32 {
    imported::delivery::max_attempts()
}

pub(crate) fn remaining_ms() -> u64 {
    imported::delivery::remaining_ms()
}

pub(crate) fn idempotency_key() -> String {
    imported::delivery::idempotency_key()
}

pub(crate) fn is_replay() -> bool {
    imported::delivery::is_replay()
}

pub(crate) fn turn(index: u32) {
    imported::delivery::turn(index);
}

pub(crate) fn kv_get(bucket: &str, key: &str) -> Result<Option<Vec<u8>>, Fault> {
    imported::kv::get(bucket, key).map_err(Fault::from)
}

pub(crate) fn kv_set(bucket: &str, key: &str, value: Vec<u8>, ttl_s: Option<u32>) -> Result<(), Fault> {
    imported::kv::set(bucket, key, &value, ttl_s).map_err(Fault::from)
}

pub(crate) fn kv_delete(bucket: &str, key: &str) -> Result<(), Fault> {
    imported::kv::delete(bucket, key).map_err(Fault::from)
}

pub(crate) fn kv_increment(bucket: &str, key: &str, by: i64) -> Result<i64, Fault> {
    imported::kv::increment(bucket, key, by).map_err(Fault::from)
}

pub(crate) fn publish(
    event_type: &str,
    content_type: &str,
    payload: Vec<u8>,
    attributes: Attributes,
) -> Result<String, Fault> {
    imported::events::publish(event_type, content_type, &payload, &attributes).map_err(Fault::from)
}

impl From<imported::types::Fault> for Fault {
    fn from(fault: imported::types::Fault) -> Self {
        Self { code: fault.code, message: fault.message, details: fault.details }
    }
}

impl From<Fault> for imported::types::Fault {
    fn from(fault: Fault) -> Self {
        Self { code: fault.code, message: fault.message, details: fault.details }
    }
}

impl From<exported::Event> for Event {
    fn from(event: exported::Event) -> Self {
        Self {
            id: event.id,
            sequence: event.sequence,
            event_type: event.type_,
            source: event.source,
            created_at_ms: event.created_at_ms,
            content_type: event.content_type,
            payload: event.payload,
            attributes: event.attributes,
        }
    }
}

/// The events of a call, packed as `packed-batch-handler` says.
pub struct Batch {
    pub events: Vec<PackedEvent>,
    pub attributes: Vec<(u32, u32)>,
    pub text: String,
}

impl Batch {
    /// The events, each unpacked when its turn comes.
    pub(crate) fn unpack(self) -> impl Iterator<Item = Event> {
        let Self { events, attributes, text } = self;
        let (mut attributes, mut at) = (attributes.into_iter(), 0);
        events.into_iter().map(move |event| {
            let mut take = |length: u32| {
                let from = at;
                at += length as usize;
                text.get(from..at).unwrap_or_default().to_owned()
            };
            Event {
                id: take(event.id_length),
                sequence: event.sequence,
                event_type: take(event.type_length),
                source: take(event.source_length),
                created_at_ms: event.created_at_ms,
                content_type: take(event.content_type_length),
                payload: event.payload,
                attributes: (attributes.by_ref().take(event.attribute_count as usize))
                    .map(|(name, value)| (take(name), take(value)))
                    .collect(),
            }
        })
    }
}

impl From<Reply> for exported::Reply {
    fn from(reply: Reply) -> Self {
        Self { content_type: reply.content_type, body: reply.body }
    }
}

impl From<Failure> for exported::Failure {
    fn from(failure: Failure) -> Self {
        if !failure.is_retry() {
            return Self::Reject(failure.into_fault().into());
        }
        let after_ms = failure.retry_after().map(whole_ms);
        Self::Retry(imported::types::Retry { fault: failure.into_fault().into(), after_ms })
    }
}

fn whole_ms(delay: Duration) -> u32 {
    u32::try_from(delay.as_millis()).unwrap_or(u32::MAX)
}
