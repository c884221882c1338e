//! Between our own types and those that guests see.
//!
//! Whatever comes from a guest is bounded here, because it is stored and shown.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::bindings::exports::tidegate::plugin::packed_batch_handler::PackedEvent;
use super::bindings::tidegate::plugin::types;
use super::log::cut;
use crate::delivery::{Fault, Reply};
use crate::event::Event;

/// The longest code of a fault, in bytes.
const MAX_CODE: usize = 128;

/// The longest message of a fault, and the longest name or value in its details.
const MAX_MESSAGE: usize = 4 << 10;

/// The most details of a fault.
const MAX_DETAILS: usize = 32;

/// The event as guests see it. Nothing of it is copied before it is in the guest's memory.
pub(super) fn guest_event<'a>(event: &'a Event, attributes: types::AttributesParam<'a>) -> types::Event<'a> {
    types::Event {
        id: event.id.as_str(),
        sequence: event.seq.unwrap_or_default(),
        type_: event.event_type.as_str(),
        source: event.source.as_str(),
        created_at_ms: u64::try_from(event.created_at.as_millisecond()).unwrap_or_default(),
        content_type: event.payload.content_type(),
        payload: event.payload.bytes(),
        attributes,
    }
}

/// Many events as `packed-batch-handler` takes them.
pub(super) struct Packed<'a> {
    pub(super) events: Vec<PackedEvent<'a>>,
    /// The lengths of names and values.
    pub(super) attributes: Vec<(u32, u32)>,
    pub(super) text: String,
}

/// Packs them; their payloads stay where they are. `None` when a string is too long for its length to be told.
pub(super) fn packed(events: &[Arc<Event>]) -> Option<Packed<'_>> {
    /// About what the strings of an event take.
    const TEXT: usize = 160;
    let mut packed = Packed {
        events: Vec::with_capacity(events.len()),
        attributes: Vec::with_capacity(events.len().saturating_mul(4)),
        text: String::with_capacity(events.len().saturating_mul(TEXT)),
    };
    for event in events {
        let spelled_out = spelled_out(event);
        let attributes = attributes(event, &spelled_out);
        let types::Event { id, sequence, type_, source, created_at_ms, content_type, payload, .. } =
            guest_event(event, &[]);
        let mut push = |text: &str| {
            packed.text.push_str(text);
            u32::try_from(text.len()).ok()
        };
        packed.events.push(PackedEvent {
            sequence,
            created_at_ms,
            id_length: push(id)?,
            type_length: push(type_)?,
            source_length: push(source)?,
            content_type_length: push(content_type)?,
            payload,
            attribute_count: u32::try_from(attributes.len()).ok()?,
        });
        for (name, value) in &attributes {
            packed.attributes.push((push(name)?, push(value)?));
        }
    }
    Some(packed)
}

/// The attributes that the event does not hold as text; most events have none.
pub(super) fn spelled_out(event: &Event) -> Vec<(String, String)> {
    let user = event.user_id.iter().map(|user| ("user-id".to_owned(), user.to_string()));
    let metadata = event.metadata.iter().map(|(name, value)| (format!("metadata.{name}"), value.to_string()));
    user.chain(metadata).collect()
}

/// The attributes of one event: few have more than these.
type Attributes<'a> = SmallVec<[(&'a str, &'a str); 6]>;

/// All attributes, the [spelled out](spelled_out) last.
pub(super) fn attributes<'a>(event: &'a Event, spelled_out: &'a [(String, String)]) -> Attributes<'a> {
    let known = [
        ("schema", event.schema.as_deref()),
        ("entity", event.entity.as_deref()),
        ("operation", event.operation.as_deref()),
        ("key", event.key.as_deref()),
        ("session-id", event.session_id.as_deref()),
        ("instance-id", Some(&*event.instance_id).filter(|id| !id.is_empty())),
        ("trace-parent", event.trace_parent.as_deref()),
        ("caused-by", event.caused_by.as_ref().map(crate::event::EventId::as_str)),
    ];
    let known = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let spelled_out = spelled_out.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    known.chain(spelled_out).collect()
}

/// What a guest replied.
pub(super) fn reply(reply: types::Reply) -> Reply {
    let mut content_type = reply.content_type;
    cut(&mut content_type, crate::event::MAX_TEXT);
    Reply { content_type, body: reply.body.into() }
}

/// A guest's fault and the delay it asks for, if any.
pub(super) fn retry(retry: types::Retry) -> (Fault, Option<Duration>) {
    (fault(retry.fault), retry.after_ms.map(|ms| Duration::from_millis(ms.into())))
}

/// A guest's fault, cut to a size that can be stored.
pub(super) fn fault(fault: types::Fault) -> Fault {
    let types::Fault { mut code, mut message, mut details } = fault;
    cut(&mut code, MAX_CODE);
    cut(&mut message, MAX_MESSAGE);
    details.truncate(MAX_DETAILS);
    for (name, value) in &mut details {
        cut(name, MAX_MESSAGE);
        cut(value, MAX_MESSAGE);
    }
    Fault { code, message, details }
}

/// A refusal that the guest can read and act on.
pub(super) fn refusal(code: &str, message: impl Into<String>) -> types::Fault {
    types::Fault { code: code.to_owned(), message: message.into(), details: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EventId, EventType, Payload, Source, UserId};

    fn event() -> Event {
        Event::new(Source::Database, EventType::parse("shop.orders.create").unwrap(), Payload::json(&1).unwrap())
    }

    #[test]
    fn what_is_known_of_an_event_travels_in_its_attributes() {
        let mut event = event();
        event.seq = Some(7);
        event.key = Some("c1".into());
        event.user_id = Some(UserId::Number(42));
        event.caused_by = Some(EventId::parse("cause").unwrap());
        event.instance_id = "node-1".into();
        event.metadata.insert("tags".into(), serde_json::json!(["a", 1]));
        event.metadata.insert("note".into(), serde_json::json!("text"));
        let spelled_out = spelled_out(&event);
        let attributes = attributes(&event, &spelled_out);
        let guest = guest_event(&event, &attributes);
        let value = |name: &str| guest.attributes.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        assert_eq!(guest.sequence, 7);
        assert_eq!(guest.source, "database");
        assert_eq!(guest.payload, b"1");
        for (name, expected) in [
            ("schema", Some("shop")),
            ("entity", Some("orders")),
            ("operation", Some("create")),
            ("key", Some("c1")),
            ("user-id", Some("42")),
            ("instance-id", Some("node-1")),
            ("caused-by", Some("cause")),
            ("metadata.tags", Some("[\"a\",1]")),
            ("metadata.note", Some("\"text\"")),
            ("session-id", None),
            ("trace-parent", None),
        ] {
            assert_eq!(value(name), expected, "{name}");
        }
    }

    #[test]
    fn what_a_guest_says_is_cut_to_a_size() {
        let long = "x".repeat(1 << 20);
        let details = vec![(long.clone(), long.clone()); 100];
        let fault = fault(types::Fault { code: long.clone(), message: long, details });
        assert!(fault.code.len() <= MAX_CODE && fault.message.len() <= MAX_MESSAGE);
        assert_eq!(fault.details.len(), MAX_DETAILS);
        assert!(fault.details.iter().all(|(name, value)| name.len().max(value.len()) <= MAX_MESSAGE));
    }
}
