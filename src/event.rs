//! The event: an immutable fact with a dotted type.
//!
//! What happens *to* an event (status, attempts, times) is not kept here but in [`delivery`](crate::delivery): handlers
//! share an [`Event`] and can change nothing in it.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// An event's place in the log: 1-based, dense, strictly increasing in commit order, never reused.
pub type Seq = u64;

/// Free-form facts about an event: any JSON under any name.
pub type Metadata = serde_json::Map<String, serde_json::Value>;

/// The content type of a payload that says nothing else.
pub const JSON: &str = "application/json";

/// The longest id, user-given name or other short text of an event, in bytes.
pub const MAX_TEXT: usize = 255;

/// The largest payload in bytes unless configured: 1 MiB, what the original brokers' transports carry without tuning.
pub const MAX_PAYLOAD: u64 = 1 << 20;

/// The most segments of a type.
const MAX_SEGMENTS: usize = 16;

/// A dotted event type such as `public.users.create`: 1–16 segments of `[A-Za-z0-9_-]+`, at most 255 bytes.
///
/// Cheap to clone and to compare with its own clones.
#[derive(Clone)]
pub struct EventType(Arc<Named>);

struct Named {
    text: Box<str>,
    /// Schema, entity and operation, where there are three segments: made once, shared by every event of the type.
    parts: Option<[Arc<str>; 3]>,
}

impl Named {
    fn new(text: &str) -> Self {
        let mut segments = text.split('.');
        let three = segments.next().zip(segments.next()).zip(segments.next());
        let parts = three.filter(|_| segments.next().is_none());
        Self {
            text: text.into(),
            parts: parts.map(|((schema, entity), operation)| [schema, entity, operation].map(Arc::from)),
        }
    }
}

impl PartialEq for EventType {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.text == other.0.text
    }
}

impl Eq for EventType {}

impl Hash for EventType {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.text.hash(state);
    }
}

impl PartialOrd for EventType {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for EventType {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.text.cmp(&other.0.text)
    }
}

impl EventType {
    /// Validates `text`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `type`.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |reason: &'static str| Err(Error::invalid("type", text, reason));
        if text.is_empty() {
            return refuse("event type is required");
        }
        if text.len() > MAX_TEXT {
            return refuse("must be at most 255 bytes");
        }
        let mut segments = 0;
        for segment in text.as_bytes().split(|&byte| byte == b'.') {
            segments += 1;
            if segment.is_empty() {
                return refuse("a segment cannot be empty");
            }
            if !segment.iter().all(|&byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
                return refuse("segments may hold A-Z a-z 0-9 _ - only");
            }
        }
        if segments > MAX_SEGMENTS {
            return refuse("must have at most 16 segments");
        }
        Ok(Self(Arc::new(Named::new(text))))
    }

    /// The dotted text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Schema, entity and operation of a type with exactly three segments.
    #[must_use]
    pub fn parts(&self) -> Option<&[Arc<str>; 3]> {
        self.0.parts.as_ref()
    }
}

/// What happened on which entity, as a type: `schema.entity.operation`, or `entity.operation` without a schema.
///
/// # Errors
/// [`Error::Invalid`] when a part is not a legal segment.
pub fn event_type(schema: &str, entity: &str, operation: &str) -> Result<EventType> {
    match schema {
        "" => EventType::parse(&format!("{entity}.{operation}")),
        _ => EventType::parse(&format!("{schema}.{entity}.{operation}")),
    }
}

/// Who an event is attributed to: a short text of 1–255 printable characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(Arc<str>);

impl EventId {
    /// A fresh UUID, version 7: ids made later sort later.
    #[must_use]
    pub fn random() -> Self {
        let mut buffer = uuid::Uuid::encode_buffer();
        Self(Arc::from(&*uuid::Uuid::now_v7().hyphenated().encode_lower(&mut buffer)))
    }

    /// The id that the `index`-th event published by an attempt gets: the same however often the attempt is repeated.
    ///
    /// A name-based UUID (version 5, RFC 9562 §5.5) over the causing event, the subscription and the index.
    #[must_use]
    pub fn caused(by: &EventId, subscription: &str, index: usize) -> Self {
        let name = format!("{by}\n{subscription}\n{index}");
        let uuid = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, name.as_bytes());
        Self(uuid.to_string().into())
    }

    /// Takes a caller's id.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `id` unless it is 1–255 printable characters.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::invalid("id", text, "event ID is required"));
        }
        short_text("id", text)?;
        Ok(Self(text.into()))
    }

    /// The text, shared.
    pub(crate) fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// The id's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks that `text` is at most 255 characters, all of them printable.
///
/// # Errors
/// [`Error::Invalid`] naming `field`.
pub fn short_text(field: &'static str, text: &str) -> Result<()> {
    // Almost every text: characters are not counted one by one for it, and bytes are looked at several at a time.
    if text.len() <= MAX_TEXT && text.bytes().fold(true, |legal, byte| legal & matches!(byte, b' '..=b'~')) {
        return Ok(());
    }
    if text.chars().count() > MAX_TEXT {
        return Err(Error::invalid(field, text, "must be at most 255 characters"));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid(field, text, "must hold printable characters only"));
    }
    Ok(())
}

macro_rules! text_newtype {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }

        impl std::str::FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                Self::parse(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_newtype!(EventType);
text_newtype!(EventId);

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A write to a database.
    Database,
    /// A WebSocket client.
    Websocket,
    /// A browser or app.
    Frontend,
    /// The host's surroundings.
    System,
    /// Another handler, or the application itself.
    Internal,
}

impl Source {
    /// All sources, in the order of the contract.
    pub const ALL: [Self; 5] = [Self::Database, Self::Websocket, Self::Frontend, Self::System, Self::Internal];

    /// The name in JSON and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::Websocket => "websocket",
            Self::Frontend => "frontend",
            Self::System => "system",
            Self::Internal => "internal",
        }
    }

    /// Parses a name.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `source` and listing the names.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|source| source.as_str() == text).ok_or_else(|| {
            Error::invalid("source", text, "must be one of database, websocket, frontend, system, internal")
        })
    }
}

/// The user behind an event: a number or a text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UserId {
    /// A numeric id.
    Number(i64),
    /// Any other id.
    Text(Arc<str>),
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

impl Serialize for UserId {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_i64(*number),
            Self::Text(text) => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for UserId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        use serde::de::Error as _;
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Number(number) => number
                .as_i64()
                .map(Self::Number)
                .ok_or_else(|| D::Error::custom(format!("user_id must be a 64-bit integer or a string, not {number}"))),
            serde_json::Value::String(text) => Ok(Self::Text(text.into())),
            other => Err(D::Error::custom(format!("user_id must be an integer or a string, not {other}"))),
        }
    }
}

/// The body of an event, kept byte for byte.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    /// `None` for JSON, which is what almost every payload is.
    content_type: Option<Arc<str>>,
    body: Bytes,
}

impl Payload {
    /// JSON text as it was written.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `payload` with the line and column where the text stops being JSON.
    pub fn json_text(text: impl Into<Bytes>) -> Result<Self> {
        let body: Bytes = text.into();
        let parsed: serde_json::Result<&RawValue> = serde_json::from_slice(&body);
        match parsed {
            Ok(_) => Ok(Self { content_type: None, body }),
            Err(error) => {
                Err(Error::invalid("payload", String::from_utf8_lossy(&body), format!("is not JSON: {error}")))
            }
        }
    }

    /// JSON text that a parser has already accepted.
    #[must_use]
    pub fn raw(json: &RawValue) -> Self {
        Self { content_type: None, body: Bytes::copy_from_slice(json.get().as_bytes()) }
    }

    /// `value` as JSON.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `payload` when `value` has no JSON form.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        let body = serde_json::to_vec(value)
            .map_err(|error| Error::invalid("payload", "", format!("has no JSON form: {error}")))?;
        Ok(Self { content_type: None, body: body.into() })
    }

    /// A body of any content type. JSON is checked, other types are not looked into.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an empty, overlong or unprintable content type, or a body that should be JSON and is not.
    pub fn new(content_type: &str, body: impl Into<Bytes>) -> Result<Self> {
        if content_type.is_empty() {
            return Err(Error::invalid("content_type", content_type, "cannot be empty"));
        }
        short_text("content_type", content_type)?;
        if content_type == JSON {
            return Self::json_text(body);
        }
        Ok(Self { content_type: Some(content_type.into()), body: body.into() })
    }

    /// A payload read back from a store, which checked it when it was written.
    #[must_use]
    pub fn stored(content_type: &str, body: Bytes) -> Self {
        Self { content_type: (content_type != JSON).then(|| content_type.into()), body }
    }

    /// The content type.
    #[must_use]
    pub fn content_type(&self) -> &str {
        self.content_type.as_deref().unwrap_or(JSON)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.body
    }

    /// Whether the body travels as JSON, not as base64.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.content_type.is_none()
    }

    /// Reads the body as JSON into `T`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the payload is empty, is not JSON, or does not fit `T`.
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        if self.body.is_empty() {
            return Err(Error::invalid("payload", "", "payload is empty"));
        }
        serde_json::from_slice(&self.body)
            .map_err(|error| Error::invalid("payload", String::from_utf8_lossy(&self.body), error.to_string()))
    }
}

impl Default for Payload {
    /// JSON `null`.
    fn default() -> Self {
        Self { content_type: None, body: Bytes::from_static(b"null") }
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.content_type(), crate::error::quote(&String::from_utf8_lossy(&self.body)))
    }
}

/// A fact that happened. Immutable once made; cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Chosen by the publisher, or a fresh UUID.
    pub id: EventId,
    /// Its place in the log; `None` before the store gave it one, and for ever for an ephemeral event.
    pub seq: Option<Seq>,
    /// Where it comes from.
    pub source: Source,
    /// What happened.
    pub event_type: EventType,
    /// The body.
    pub payload: Payload,
    /// Who did it.
    pub user_id: Option<UserId>,
    /// In which session.
    pub session_id: Option<Arc<str>>,
    /// Which process published it.
    pub instance_id: Arc<str>,
    /// First segment of a three-segment type, unless the publisher says otherwise.
    pub schema: Option<Arc<str>>,
    /// Second segment of a three-segment type, unless the publisher says otherwise.
    pub entity: Option<Arc<str>>,
    /// Third segment of a three-segment type, unless the publisher says otherwise.
    pub operation: Option<Arc<str>>,
    /// Events of one key are handled one after the other by subscriptions that ask for it.
    pub key: Option<Arc<str>>,
    /// When it was made, to the microsecond.
    pub created_at: Timestamp,
    /// Anything else.
    pub metadata: Metadata,
    /// W3C `traceparent` of the publisher.
    pub trace_parent: Option<Arc<str>>,
    /// The event whose handler published this one.
    pub caused_by: Option<EventId>,
    /// How many handlers stand between this event and one that no handler published: 0 for that one itself. Kept by
    /// stores, and no part of an event's JSON: nobody outside can set it.
    pub depth: u32,
}

impl Event {
    /// A new event of `source` with a fresh id, made now. `schema`, `entity` and `operation` follow from the type.
    #[must_use]
    pub fn new(source: Source, event_type: EventType, payload: Payload) -> Self {
        let [schema, entity, operation] = event_type.parts().cloned().map(|parts| parts.map(Some)).unwrap_or_default();
        Self {
            id: EventId::random(),
            seq: None,
            source,
            event_type,
            payload,
            user_id: None,
            session_id: None,
            instance_id: Arc::default(),
            schema,
            entity,
            operation,
            key: None,
            created_at: now(),
            metadata: Metadata::new(),
            trace_parent: None,
            caused_by: None,
            depth: 0,
        }
    }

    /// Checks what the types of the fields do not already guarantee.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, or [`Error::TooLarge`] for a payload or metadata over `max_payload` bytes.
    pub fn validate(&self, max_payload: u64) -> Result<()> {
        if self.instance_id.is_empty() {
            return Err(Error::invalid("instance_id", "", "instance ID is required"));
        }
        let texts = [
            ("session_id", &self.session_id),
            ("schema", &self.schema),
            ("entity", &self.entity),
            ("operation", &self.operation),
            ("key", &self.key),
            ("trace_parent", &self.trace_parent),
        ];
        for (field, text) in texts {
            if let Some(text) = text {
                short_text(field, text)?;
            }
        }
        short_text("instance_id", &self.instance_id)?;
        if let Some(UserId::Text(text)) = &self.user_id {
            short_text("user_id", text)?;
        }
        body_size(&self.payload, &self.metadata, max_payload).map(drop)
    }
}

/// How many bytes payload and metadata have together.
///
/// # Errors
/// [`Error::TooLarge`] for either of them over `max_payload` bytes.
pub fn body_size(payload: &Payload, metadata: &Metadata, max_payload: u64) -> Result<usize> {
    let payload = payload.bytes().len();
    within("payload", payload, max_payload)?;
    if metadata.is_empty() {
        return Ok(payload);
    }
    let metadata = serde_json::to_vec(metadata).unwrap_or_default().len();
    within("metadata", metadata, max_payload)?;
    Ok(payload.saturating_add(metadata))
}

fn within(field: &'static str, size: usize, limit: u64) -> Result<()> {
    let size = u64::try_from(size).unwrap_or(u64::MAX);
    if size > limit { Err(Error::TooLarge { field: field.into(), size, limit }) } else { Ok(()) }
}

/// The present instant, to the microsecond: what every store can keep.
#[must_use]
pub fn now() -> Timestamp {
    micros(Timestamp::now().as_microsecond())
}

/// The instant `micros` microseconds after the Unix epoch; the epoch itself for what no calendar can hold.
#[must_use]
pub fn micros(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_breaking_a_rule_is_refused_with_the_rule() {
        let long = "a".repeat(256);
        let deep = ["a"; 17].join(".");
        let rows = [
            ("", "event type is required"),
            (".", "segment cannot be empty"),
            ("a..b", "segment cannot be empty"),
            ("a.b.", "segment cannot be empty"),
            ("a b", "A-Z a-z 0-9 _ - only"),
            ("a.*", "A-Z a-z 0-9 _ - only"),
            ("größe", "A-Z a-z 0-9 _ - only"),
            (&long, "at most 255 bytes"),
            (&deep, "at most 16 segments"),
        ];
        for (text, rule) in rows {
            let error = EventType::parse(text).unwrap_err().to_string();
            assert!(error.contains(rule), "{text:?}: {error}");
        }
        assert!(EventType::parse(&["a"; 16].join(".")).is_ok());
    }

    /// BEHAVIOURS A5: an empty schema gives the type without it (the leading dot of the original is no legal type).
    #[test]
    fn the_type_builder_joins_what_is_given() {
        assert_eq!(event_type("public", "users", "create").unwrap().as_str(), "public.users.create");
        assert_eq!(event_type("", "system", "start").unwrap().as_str(), "system.start");
        assert!(event_type("public", "", "create").is_err());
    }

    #[test]
    fn only_three_segments_give_schema_entity_and_operation() {
        let crud = Event::new(Source::Database, "public.users.create".parse().unwrap(), Payload::default());
        assert_eq!(crud.schema.as_deref(), Some("public"));
        assert_eq!(crud.entity.as_deref(), Some("users"));
        assert_eq!(crud.operation.as_deref(), Some("create"));
        let chat = Event::new(Source::Websocket, "chat.message".parse().unwrap(), Payload::default());
        assert_eq!((chat.schema, chat.entity, chat.operation), (None, None, None));
    }

    /// BEHAVIOURS A6.
    #[test]
    fn a_payload_is_kept_byte_for_byte() {
        let text = "{ \"b\":1.50,\n \"a\" : [1e3, \"\\u00e9\"] }";
        let payload = Payload::json_text(text).unwrap();
        assert_eq!(payload.bytes(), text.as_bytes());
        assert!(Payload::json_text("{\"a\":").is_err());
        assert!(Payload::json_text("1 2").is_err());
        let empty = Payload::new("text/plain", "").unwrap();
        assert!(empty.parse::<serde_json::Value>().unwrap_err().to_string().contains("payload is empty"));
    }

    #[test]
    fn an_id_is_any_printable_text_of_up_to_255_characters() {
        assert!(EventId::parse("order/17 ✓ 'quoted\" %_").is_ok());
        assert!(EventId::parse(&"é".repeat(255)).is_ok());
        assert!(EventId::parse(&"é".repeat(256)).is_err());
        assert!(EventId::parse("a\u{0}b").is_err());
        assert_eq!(EventId::parse("").unwrap_err().to_string(), "id: event ID is required (got \"\")");
    }

    #[test]
    fn the_id_of_a_caused_event_depends_on_cause_subscription_and_index_only() {
        let cause = EventId::random();
        assert_eq!(EventId::caused(&cause, "totals", 0), EventId::caused(&cause, "totals", 0));
        assert_ne!(EventId::caused(&cause, "totals", 0), EventId::caused(&cause, "totals", 1));
        assert_ne!(EventId::caused(&cause, "totals", 0), EventId::caused(&cause, "audit", 0));
    }

    /// BEHAVIOURS A7.
    #[test]
    fn an_event_without_an_instance_is_refused() {
        let mut event = Event::new(Source::System, "a".parse().unwrap(), Payload::default());
        assert!(event.validate(10).unwrap_err().to_string().contains("instance ID is required"));
        event.instance_id = "here".into();
        assert!(event.validate(10).is_ok());
        assert!(matches!(event.validate(3), Err(Error::TooLarge { size: 4, limit: 3, .. })));
    }
}
