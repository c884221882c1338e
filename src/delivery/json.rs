//! Events and what became of them as JSON, in the order of the contract.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::{EventDetail, EventRecord};
use crate::event::Event;

impl Serialize for EventRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(&self.event, Some(self), &mut map)?;
        map.end()
    }
}

/// The fact alone, as feeds show it: what becomes of it is told by [`EventRecord`]. An event without a place in the log
/// says that it is ephemeral.
impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(self, None, &mut map)?;
        if self.seq.is_none() {
            map.serialize_entry("ephemeral", &true)?;
        }
        map.end()
    }
}

/// The JSON members in the order of the contract, with how the event's handling stands where that is told.
fn members<M: serde::ser::SerializeMap>(
    event: &Event,
    standing: Option<&EventRecord>,
    map: &mut M,
) -> std::result::Result<(), M::Error> {
    map.serialize_entry("id", &event.id)?;
    optional(map, "seq", event.seq.as_ref())?;
    map.serialize_entry("source", &event.source)?;
    map.serialize_entry("type", &event.event_type)?;
    if let Some(record) = standing {
        map.serialize_entry("status", &record.status)?;
        map.serialize_entry("retry_count", &record.retry_count)?;
        optional(map, "error", record.error.as_ref())?;
    }
    if event.payload.is_json() {
        let raw: &RawValue = serde_json::from_slice(event.payload.bytes()).map_err(serde::ser::Error::custom)?;
        map.serialize_entry("payload", raw)?;
    } else {
        map.serialize_entry("payload_base64", &BASE64.encode(event.payload.bytes()))?;
    }
    map.serialize_entry("content_type", event.payload.content_type())?;
    optional(map, "user_id", event.user_id.as_ref())?;
    optional(map, "session_id", event.session_id.as_ref())?;
    map.serialize_entry("instance_id", &event.instance_id)?;
    optional(map, "schema", event.schema.as_ref())?;
    optional(map, "entity", event.entity.as_ref())?;
    optional(map, "operation", event.operation.as_ref())?;
    optional(map, "key", event.key.as_ref())?;
    map.serialize_entry("created_at", &event.created_at)?;
    if let Some(record) = standing {
        optional(map, "processed_at", record.processed_at.as_ref())?;
        optional(map, "completed_at", record.completed_at.as_ref())?;
    }
    map.serialize_entry("metadata", &event.metadata)?;
    optional(map, "trace_parent", event.trace_parent.as_ref())?;
    optional(map, "caused_by", event.caused_by.as_ref())
}

fn optional<M: serde::ser::SerializeMap, T: Serialize + ?Sized>(
    map: &mut M,
    name: &'static str,
    value: Option<&T>,
) -> std::result::Result<(), M::Error> {
    value.map_or(Ok(()), |value| map.serialize_entry(name, value))
}

impl Serialize for EventDetail {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(&self.record.event, Some(&self.record), &mut map)?;
        map.serialize_entry("deliveries", &self.deliveries)?;
        map.end()
    }
}
