//! Our own JSON into an [`Event`]: which members a publisher may set, and what each must look like.
//!
//! Nothing is stored here, and nothing is read that the publisher did not send.

use std::sync::Arc;

use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::value::RawValue;

use super::body::{Members, depth};
use crate::error::{Error, Result};
use crate::event::{Event, EventId, EventType, JSON, Payload, Source, UserId};

/// What a publisher may set.
const SETTABLE: [&str; 16] = [
    "id",
    "source",
    "type",
    "payload",
    "payload_base64",
    "content_type",
    "user_id",
    "session_id",
    "instance_id",
    "schema",
    "entity",
    "operation",
    "key",
    "metadata",
    "trace_parent",
    "ephemeral",
];

/// What an event's JSON holds too, but only ever from us.
const READ_ONLY: [&str; 8] =
    ["seq", "status", "retry_count", "error", "created_at", "processed_at", "completed_at", "caused_by"];

/// How deep payload and metadata may nest. Common parsers stop at 128, and lists of events add a few levels.
pub(super) const MAX_DEPTH: usize = 100;

/// What an event gets when its publisher does not say.
pub(super) struct Defaults {
    /// The instance that publishes.
    pub(super) instance_id: Arc<str>,
    /// The trace that the request belongs to.
    pub(super) trace_parent: Option<Arc<str>>,
    /// The largest payload in bytes.
    pub(super) max_payload: u64,
}

/// An event as it was sent, and what is to be done with it.
pub(super) struct Incoming {
    pub(super) event: Event,
    /// It is shown to live feeds, and neither kept nor handled.
    pub(super) is_ephemeral: bool,
}

/// The event that `raw` describes. `source` is `internal` unless given.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::TooLarge`] naming the member.
pub(super) fn event(raw: &RawValue, field: &str, defaults: &Defaults) -> Result<Incoming> {
    let members = Members::of(raw, field)?;
    refuse_read_only(&members)?;
    members.only(&SETTABLE)?;
    let is_ephemeral = members.read::<bool>("ephemeral", "true or false")?.unwrap_or(false);
    let event_type = EventType::parse(&members.text("type")?.unwrap_or_default())?;
    let source = members.text("source")?.map_or(Ok(Source::Internal), |name| Source::parse(&name))?;
    let mut event = Event::new(source, event_type, payload(&members)?);
    if let Some(id) = members.text("id")? {
        event.id = EventId::parse(&id)?;
    }
    event.user_id = members.read::<UserId>("user_id", "a 64-bit integer or a string")?;
    set(&mut event.session_id, &members, "session_id")?;
    set(&mut event.schema, &members, "schema")?;
    set(&mut event.entity, &members, "entity")?;
    set(&mut event.operation, &members, "operation")?;
    set(&mut event.key, &members, "key")?;
    event.instance_id = match members.text("instance_id")? {
        Some(own) => own.into(),
        None => Arc::clone(&defaults.instance_id),
    };
    event.trace_parent = match members.text("trace_parent")? {
        Some(own) => Some(checked_trace_parent(&own)?),
        None => defaults.trace_parent.clone(),
    };
    if let Some(raw) = members.raw("metadata") {
        within_depth("metadata", raw.get().as_bytes())?;
        event.metadata = members.read("metadata", "a JSON object")?.unwrap_or_default();
    }
    event.validate(defaults.max_payload)?;
    Ok(Incoming { event, is_ephemeral })
}

fn refuse_read_only(members: &Members<'_>) -> Result<()> {
    match READ_ONLY.into_iter().find_map(|name| members.raw(name).map(|raw| (name, raw))) {
        Some((name, raw)) => Err(Error::invalid(name, raw.get(), "is set by tidegate and cannot be given")),
        None => Ok(()),
    }
}

fn set(field: &mut Option<Arc<str>>, members: &Members<'_>, name: &'static str) -> Result<()> {
    if let Some(text) = members.text(name)? {
        *field = Some(text.into());
    }
    Ok(())
}

fn payload(members: &Members<'_>) -> Result<Payload> {
    let content_type = members.text("content_type")?;
    match (members.raw("payload"), members.text("payload_base64")?) {
        (Some(_), Some(encoded)) => Err(Error::invalid("payload_base64", encoded, "cannot be given beside payload")),
        (None, Some(encoded)) => {
            let body = BASE64
                .decode(&encoded)
                .map_err(|error| Error::invalid("payload_base64", &encoded, format!("is not base64: {error}")))?;
            from_bytes(content_type.as_deref().unwrap_or("application/octet-stream"), body)
        }
        (raw, None) => match content_type {
            Some(other) if other != JSON => {
                Err(Error::invalid("content_type", other, "needs payload_base64: a payload is application/json"))
            }
            _ => raw.map_or_else(|| Ok(Payload::default()), from_json),
        },
    }
}

fn from_json(raw: &RawValue) -> Result<Payload> {
    within_depth("payload", raw.get().as_bytes())?;
    Ok(Payload::raw(raw))
}

/// A body of any type; JSON is held to the same rules as a payload written in place.
///
/// # Errors
/// [`Error::Invalid`] naming `payload` or `content_type`.
pub(super) fn from_bytes(content_type: &str, body: impl Into<bytes::Bytes>) -> Result<Payload> {
    let payload = Payload::new(content_type, body)?;
    if payload.is_json() {
        within_depth("payload", payload.bytes())?;
    }
    Ok(payload)
}

fn within_depth(field: &'static str, json: &[u8]) -> Result<()> {
    if depth(json) > MAX_DEPTH {
        let shown = String::from_utf8_lossy(json.get(..200).unwrap_or(json));
        return Err(Error::invalid(field, shown, "must not nest deeper than 100 levels"));
    }
    Ok(())
}

/// The `traceparent` header, if it is a legal one: a broken header is no reason to refuse an event (W3C Trace Context).
pub(super) fn trace_parent_of(headers: &HeaderMap) -> Option<Arc<str>> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    checked_trace_parent(text).ok()
}

/// `text` as a `traceparent`.
///
/// # Errors
/// [`Error::Invalid`] naming `trace_parent`.
pub(super) fn checked_trace_parent(text: &str) -> Result<Arc<str>> {
    let hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<&str> = text.split('-').collect();
    match parts.as_slice() {
        [version, trace, span, flags]
            if hex(version, 2)
                && hex(trace, 32)
                && hex(span, 16)
                && hex(flags, 2)
                && *version != "ff"
                && trace.bytes().any(|byte| byte != b'0')
                && span.bytes().any(|byte| byte != b'0') =>
        {
            Ok(text.into())
        }
        _ => Err(Error::invalid("trace_parent", text, "must be a W3C traceparent such as 00-<32 hex>-<16 hex>-01")),
    }
}

/// `error` about the `index`-th entry of a batch.
pub(super) fn at(index: usize, error: Error) -> Error {
    let named = |field: &str| match field.starts_with('[') {
        true => field.to_owned(),
        false => format!("[{index}].{field}"),
    };
    match error {
        Error::Invalid { field, value, reason } => Error::Invalid { field: named(&field).into(), value, reason },
        Error::TooLarge { field, size, limit } => Error::TooLarge { field: named(&field).into(), size, limit },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Event> {
        let raw = RawValue::from_string(text.to_owned()).unwrap();
        let defaults = Defaults { instance_id: "here".into(), trace_parent: None, max_payload: 1024 };
        event(&raw, "", &defaults).map(|incoming| incoming.event)
    }

    #[test]
    fn every_settable_member_arrives() {
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let made = read(&format!(
            r#"{{"id":"i-1","source":"frontend","type":"shop.orders.create","payload": {{ "b":1.50 }},"user_id":7,
            "session_id":"s","instance_id":"there","schema":"x","entity":"y","operation":"z","key":"k",
            "metadata":{{"a":[1]}},"trace_parent":"{trace}","ephemeral":false}}"#
        ))
        .unwrap();
        assert_eq!((made.id.as_str(), made.source), ("i-1", Source::Frontend));
        assert_eq!(made.payload.bytes(), r#"{ "b":1.50 }"#);
        assert_eq!((made.user_id, made.key.as_deref()), (Some(UserId::Number(7)), Some("k")));
        assert_eq!((made.schema.as_deref(), made.operation.as_deref()), (Some("x"), Some("z")));
        assert_eq!((&*made.instance_id, made.trace_parent.as_deref()), ("there", Some(trace)));
        assert_eq!(made.metadata["a"], serde_json::json!([1]));
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let made = read(r#"{"type":"shop.orders.create","session_id":null,"user_id":null}"#).unwrap();
        assert_eq!((made.source, &*made.instance_id), (Source::Internal, "here"));
        assert_eq!(made.payload.bytes(), "null");
        assert_eq!((made.entity.as_deref(), made.session_id), (Some("orders"), None));
    }

    #[test]
    fn any_other_body_travels_as_base64() {
        let made = read(r#"{"type":"a","payload_base64":"AP8=","content_type":"image/png"}"#).unwrap();
        assert_eq!((made.payload.content_type(), &made.payload.bytes()[..]), ("image/png", &[0_u8, 255][..]));
        let json = read(r#"{"type":"a","payload_base64":"eyJhIjoxfQ==","content_type":"application/json"}"#).unwrap();
        assert_eq!(json.payload.bytes(), r#"{"a":1}"#);
    }

    /// Who could set them would shorten or hide a chain of events.
    #[test]
    fn nobody_outside_says_what_an_event_was_caused_by() {
        let error = read(r#"{"type":"a","caused_by":"e-1"}"#).unwrap_err().to_string();
        assert!(error.starts_with("caused_by: is set by tidegate"), "{error}");
        let error = read(r#"{"type":"a","depth":0}"#).unwrap_err().to_string();
        assert!(error.starts_with("depth: "), "{error}");
        let made = read(r#"{"type":"a","metadata":{"depth":9}}"#).unwrap();
        assert_eq!((made.depth, made.caused_by), (0, None));
    }

    #[test]
    fn an_error_in_a_batch_names_the_entry() {
        let error = at(3, read(r#"{"type":"a b"}"#).unwrap_err()).to_string();
        assert!(error.starts_with("[3].type: "), "{error}");
    }

    #[test]
    fn a_trace_parent_is_checked() {
        for bad in ["", "00-1-2-3", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "ff-a-b-c"] {
            assert!(checked_trace_parent(bad).is_err(), "{bad}");
        }
    }
}
