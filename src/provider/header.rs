//! An event as a store of messages keeps it: a header of JSON beside the payload, which stays as it is.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::event::{Event, EventId, EventType, Metadata, Payload, Seq, Source, UserId, micros};

/// All of an event but its id, type and payload, as JSON.
#[derive(Serialize, Deserialize)]
struct Header<'a> {
    source: Source,
    #[serde(rename = "at")]
    created_at: i64,
    instance: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<UserId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<Arc<str>>,
    /// Schema, entity and operation, where they are not what the type says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parts: Option<[Option<Arc<str>>; 3]>,
    #[serde(default, skip_serializing_if = "is_empty")]
    metadata: Cow<'a, Metadata>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    caused_by: Option<EventId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content_type: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "is_zero")]
    depth: u32,
}

fn is_empty(metadata: &Metadata) -> bool {
    metadata.is_empty()
}

fn is_zero(depth: &u32) -> bool {
    *depth == 0
}

fn derived(event_type: &EventType) -> [Option<Arc<str>>; 3] {
    event_type.parts().cloned().map(|parts| parts.map(Some)).unwrap_or_default()
}

/// The header of an event.
pub(super) fn header(event: &Event) -> Vec<u8> {
    let parts = [&event.schema, &event.entity, &event.operation];
    let is_derived = match event.event_type.parts() {
        Some(derived) => derived.iter().zip(parts).all(|(one, other)| other.as_ref() == Some(one)),
        None => parts.iter().all(|part| part.is_none()),
    };
    let header = Header {
        source: event.source,
        created_at: event.created_at.as_microsecond(),
        instance: Arc::clone(&event.instance_id),
        key: event.key.clone(),
        user: event.user_id.clone(),
        session: event.session_id.clone(),
        parts: (!is_derived).then(|| parts.map(Clone::clone)),
        metadata: Cow::Borrowed(&event.metadata),
        trace: event.trace_parent.clone(),
        caused_by: event.caused_by.clone(),
        content_type: (!event.payload.is_json()).then(|| event.payload.content_type().into()),
        depth: event.depth,
    };
    serde_json::to_vec(&header).unwrap_or_default()
}

/// The event of a header, with what stands beside it.
pub(super) fn event(
    header: &[u8],
    id: EventId,
    event_type: EventType,
    payload: Bytes,
    seq: Option<Seq>,
) -> Option<Event> {
    let header: Header<'_> = serde_json::from_slice(header).ok()?;
    let [schema, entity, operation] = header.parts.unwrap_or_else(|| derived(&event_type));
    let content_type = header.content_type.as_deref().unwrap_or(crate::event::JSON);
    Some(Event {
        id,
        seq,
        source: header.source,
        event_type,
        payload: Payload::stored(content_type, payload),
        user_id: header.user,
        session_id: header.session,
        instance_id: header.instance,
        schema,
        entity,
        operation,
        key: header.key,
        created_at: micros(header.created_at),
        metadata: header.metadata.into_owned(),
        trace_parent: header.trace,
        caused_by: header.caused_by,
        depth: header.depth,
    })
}

/// How many texts are shared before it begins afresh.
const SHARED: usize = 8_192;

/// Texts that many events have, each kept once: whoever keeps events that were read one by one is spared many copies.
#[derive(Default)]
pub(super) struct Texts {
    types: HashSet<EventType>,
    names: HashSet<Arc<str>>,
}

impl Texts {
    /// Has the event share its type and the name of its instance with the others.
    pub(super) fn share(&mut self, event: &mut Event) {
        if let Some(known) = self.types.get(&event.event_type) {
            let parts = derived(known);
            if [&event.schema, &event.entity, &event.operation].into_iter().eq(&parts) {
                [event.schema, event.entity, event.operation] = parts;
            }
            event.event_type = known.clone();
        } else {
            make_room(&mut self.types);
            self.types.insert(event.event_type.clone());
        }
        self.share_name(&mut event.instance_id);
    }

    /// The same for any name.
    pub(super) fn share_name(&mut self, name: &mut Arc<str>) {
        if let Some(known) = self.names.get(name) {
            *name = Arc::clone(known);
        } else {
            make_room(&mut self.names);
            self.names.insert(Arc::clone(name));
        }
    }
}

fn make_room<T>(texts: &mut HashSet<T>) {
    if texts.len() >= SHARED {
        texts.clear();
    }
}
