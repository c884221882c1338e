//! CloudEvents 1.0 into an [`Event`]: structured, binary and batched over HTTP.
//!
//! `id` and `type` become ours, and so must follow our rules; `traceparent` and `partitionkey` become `trace_parent` and
//! `key`. Everything else is kept as metadata: `source`, `subject`, `time` and `dataschema` under `ce_source` …,
//! extensions under their own names. A CloudEvents source that is the name of one of ours is taken for it, any other
//! means `internal`. Events are told apart by `id` alone.

use std::collections::BTreeMap;

use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use super::body::Members;
use super::input::{self, Defaults};
use crate::error::{Error, Result};
use crate::event::{Event, EventId, EventType, JSON, Metadata, Payload, Source};

/// One event as JSON.
pub(super) const STRUCTURED: &str = "application/cloudevents+json";

/// An array of events as JSON.
pub(super) const BATCH: &str = "application/cloudevents-batch+json";

/// The header that marks the binary form.
const VERSION_HEADER: &str = "ce-specversion";

/// Attributes that are kept under another name.
const KEPT: [&str; 4] = ["source", "subject", "time", "dataschema"];

/// Whether a request is a CloudEvent in the binary form.
pub(super) fn is_binary(headers: &HeaderMap) -> bool {
    headers.contains_key(VERSION_HEADER)
}

/// The event that a structured CloudEvent describes.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::TooLarge`] naming the attribute.
pub(super) fn structured(raw: &RawValue, field: &str, defaults: &Defaults) -> Result<Event> {
    let members = Members::of(raw, field)?;
    let content_type = members.text("datacontenttype")?;
    let encoded = members.text("data_base64")?;
    let payload = match (members.raw("data"), encoded) {
        (Some(_), Some(encoded)) => return Err(Error::invalid("data_base64", encoded, "cannot be given beside data")),
        (Some(data), None) => data_payload(data, content_type.as_deref())?,
        (None, Some(encoded)) => {
            let body = BASE64
                .decode(&encoded)
                .map_err(|error| Error::invalid("data_base64", &encoded, format!("is not base64: {error}")))?;
            input::from_bytes(content_type.as_deref().unwrap_or(JSON), body)?
        }
        (None, None) => Payload::default(),
    };
    let mut attributes = BTreeMap::new();
    for (name, raw) in members.iter() {
        if !matches!(name, "data" | "data_base64" | "datacontenttype") && raw.get() != "null" {
            let value = serde_json::from_str(raw.get())
                .map_err(|_| Error::invalid(name.to_owned(), raw.get(), "must be a string, number or boolean"))?;
            attributes.insert(name.to_owned(), value);
        }
    }
    event(attributes, payload, defaults)
}

/// `data` of a structured event: JSON as it stands, or a JSON string holding text of another type.
fn data_payload(data: &RawValue, content_type: Option<&str>) -> Result<Payload> {
    match content_type.filter(|&content_type| !is_json(content_type)) {
        None => input::from_bytes(JSON, data.get().to_owned()),
        Some(other) => match serde_json::from_str::<String>(data.get()) {
            Ok(text) => input::from_bytes(other, text),
            Err(_) => {
                Err(Error::invalid("data", data.get(), format!("must be a string, as datacontenttype is {other}")))
            }
        },
    }
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == JSON || essence.ends_with("+json")
}

/// The event that a request in the binary form describes: attributes in `ce-` headers, the body is the data.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::TooLarge`] naming the attribute.
pub(super) fn binary(headers: &HeaderMap, body: Bytes, defaults: &Defaults) -> Result<Event> {
    let mut attributes = BTreeMap::new();
    for (name, value) in headers {
        let Some(attribute) = name.as_str().strip_prefix("ce-") else { continue };
        let text = value.to_str().map_err(|_| Error::invalid(name.to_string(), "", "must be printable ASCII"))?;
        if attributes.insert(attribute.to_owned(), Value::String(percent_decoded(text))).is_some() {
            return Err(Error::invalid(name.to_string(), text, "is given twice"));
        }
    }
    let content_type = headers.get(axum::http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let payload = match content_type {
        None if body.is_empty() => Payload::default(),
        None => input::from_bytes("application/octet-stream", body)?,
        Some(json) if is_json(json) => input::from_bytes(JSON, body)?,
        Some(other) => input::from_bytes(other, body)?,
    };
    event(attributes, payload, defaults)
}

/// Header values carry what is not printable ASCII percent-encoded.
fn percent_decoded(text: &str) -> String {
    // A plus sign is itself here, unlike in a form.
    let guarded = format!("v={}", text.replace('+', "%2B").replace('&', "%26"));
    form_urlencoded::parse(guarded.as_bytes()).next().map_or_else(String::new, |(_, value)| value.into_owned())
}

fn event(mut attributes: BTreeMap<String, Value>, payload: Payload, defaults: &Defaults) -> Result<Event> {
    let version = required(&mut attributes, "specversion")?;
    if version != "1.0" {
        return Err(Error::invalid("specversion", version, "must be 1.0"));
    }
    let id = EventId::parse(&required(&mut attributes, "id")?)?;
    let event_type = EventType::parse(&required(&mut attributes, "type")?)?;
    let source = attributes.get("source").and_then(Value::as_str).unwrap_or_default();
    if source.is_empty() {
        return Err(Error::invalid("source", source, "is required by CloudEvents"));
    }
    let mut event = Event::new(Source::parse(source).unwrap_or(Source::Internal), event_type, payload);
    event.id = id;
    event.instance_id = std::sync::Arc::clone(&defaults.instance_id);
    event.key = optional(&mut attributes, "partitionkey")?.map(Into::into);
    event.trace_parent = match optional(&mut attributes, "traceparent")? {
        Some(own) => Some(input::checked_trace_parent(&own)?),
        None => defaults.trace_parent.clone(),
    };
    event.metadata = metadata(attributes)?;
    event.validate(defaults.max_payload)?;
    Ok(event)
}

fn required(attributes: &mut BTreeMap<String, Value>, name: &'static str) -> Result<String> {
    optional(attributes, name)?.ok_or_else(|| Error::invalid(name, "", "is required by CloudEvents"))
}

fn optional(attributes: &mut BTreeMap<String, Value>, name: &'static str) -> Result<Option<String>> {
    match attributes.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Error::invalid(name, other.to_string(), "must be a string")),
    }
}

fn metadata(attributes: BTreeMap<String, Value>) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    for (name, value) in attributes {
        let legal = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if name.is_empty() || !legal {
            return Err(Error::invalid(name, value.to_string(), "is no CloudEvents attribute: a-z and 0-9 only"));
        }
        if value.is_array() || value.is_object() {
            return Err(Error::invalid(name, value.to_string(), "must be a string, number or boolean"));
        }
        let kept = if KEPT.contains(&name.as_str()) { format!("ce_{name}") } else { name };
        metadata.insert(kept, value);
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Defaults {
        Defaults { instance_id: "here".into(), trace_parent: None, max_payload: 1024 }
    }

    fn read(text: &str) -> Result<Event> {
        structured(&RawValue::from_string(text.to_owned()).unwrap(), "", &defaults())
    }

    #[test]
    fn a_structured_event_keeps_data_and_attributes() {
        let made = read(
            r#"{"specversion":"1.0","id":"c-1","source":"/shop","type":"com.example.order","subject":"o/7",
            "time":"2026-01-31T12:00:00Z","datacontenttype":"application/json","data":{ "b":1.50 },"comtenant":"x",
            "partitionkey":"k"}"#,
        )
        .unwrap();
        assert_eq!((made.id.as_str(), made.source, made.key.as_deref()), ("c-1", Source::Internal, Some("k")));
        assert_eq!(made.payload.bytes(), r#"{ "b":1.50 }"#);
        let kept: Vec<&str> = made.metadata.keys().map(String::as_str).collect();
        assert_eq!(kept, ["ce_source", "ce_subject", "ce_time", "comtenant"]);
    }

    #[test]
    fn the_binary_form_takes_attributes_from_headers() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "c%20%E2%82%AC+1"),
            ("ce-source", "system"),
            ("ce-type", "a.b"),
            ("content-type", "text/plain"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let made = binary(&headers, "hello".into(), &defaults()).unwrap();
        assert_eq!((made.id.as_str(), made.source), ("c €+1", Source::System));
        assert_eq!((made.payload.content_type(), &made.payload.bytes()[..]), ("text/plain", &b"hello"[..]));
    }

    #[test]
    fn what_breaks_the_specification_is_refused_by_name() {
        let rows = [
            (r#"{"id":"1","source":"s","type":"a"}"#, "specversion"),
            (r#"{"specversion":"0.3","id":"1","source":"s","type":"a"}"#, "specversion"),
            (r#"{"specversion":"1.0","source":"s","type":"a"}"#, "id"),
            (r#"{"specversion":"1.0","id":"1","type":"a"}"#, "source"),
            (r#"{"specversion":"1.0","id":"1","source":"s"}"#, "type"),
            (r#"{"specversion":"1.0","id":"1","source":"s","type":"a","My_Ext":1}"#, "My_Ext"),
            (r#"{"specversion":"1.0","id":"1","source":"s","type":"a","ext":{}}"#, "ext"),
            (r#"{"specversion":"1.0","id":"1","source":"s","type":"a","data":1,"data_base64":"AA=="}"#, "data_base64"),
            (
                r#"{"specversion":"1.0","id":"1","source":"s","type":"a","data":1,"datacontenttype":"text/plain"}"#,
                "data",
            ),
        ];
        for (text, field) in rows {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{field}:")), "{text}: {error}");
        }
    }
}
