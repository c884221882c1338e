//! What a row of the inbox becomes: the event that it stands for, or the one that tells why it cannot be one.
//!
//! The inbox is where others leave events: triggers, and applications in transactions of their own. Whoever may write to
//! it may write anything, so nothing is taken for granted here. Pure but for the log: which rows there are, and that each
//! is moved once, is the store's business.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::bundle::{self, Part};
use super::{Append, Appended, RouteRequest, Routed, RoutedEvent};
use crate::error::{Error, Result, quote};
use crate::event::{Event, EventId, EventType, JSON, Metadata, Payload, Source, UserId, short_text};

/// The type of the event that stands for a row which cannot become one.
pub const REFUSED: &str = "tidegate.inbox.refused";

/// The instance of an event that names none.
pub const INSTANCE: &str = "database";

/// The most characters of a reason that are kept.
const REASON: usize = 1_000;

/// A row as it was read. Every text may be absent, and may hold anything.
#[derive(Debug, Clone, Default)]
pub struct InboxRow {
    /// Its place among the rows.
    pub position: i64,
    /// The event's id; one is made where it is absent.
    pub id: Option<String>,
    /// The dotted type.
    pub event_type: String,
    /// The place of the source in [`Source::ALL`].
    pub source: i64,
    /// Microseconds since the Unix epoch; now where it is absent.
    pub created_at: Option<i64>,
    /// The ordering key. What is no legal key is replaced by its hash, which orders just as well.
    pub key: Option<String>,
    /// JSON: a number or a string.
    pub user_id: Option<String>,
    /// The session.
    pub session_id: Option<String>,
    /// The instance; [`INSTANCE`] where it is absent.
    pub instance_id: Option<String>,
    /// The schema; the type's where it is absent.
    pub schema: Option<String>,
    /// The entity; the type's where it is absent.
    pub entity: Option<String>,
    /// The operation; the type's where it is absent.
    pub operation: Option<String>,
    /// W3C `traceparent`.
    pub trace_parent: Option<String>,
    /// The causing event's id.
    pub caused_by: Option<String>,
    /// JSON: an object.
    pub metadata: Option<String>,
    /// The content type; JSON where it is absent.
    pub content_type: Option<String>,
    /// The payload where it is text.
    pub payload: Option<String>,
    /// The payload where it is not.
    pub binary: Option<Vec<u8>>,
    /// How many rows of a captured table the payload holds, where it is not an event's own.
    pub rows: Option<i32>,
    /// The bytes of the largest of payload, binary and metadata where that is over the limit, and so was not read.
    pub oversize: Option<u64>,
    /// The column whose bytes are no text, where the store has such.
    pub unreadable: Option<&'static str>,
}

impl InboxRow {
    /// The events with those who get them: one, or one for each row of a table that stands here with others. What cannot
    /// be taken apart is logged, and becomes one [`REFUSED`] event.
    ///
    /// # Errors
    /// None but such as say that this code is wrong.
    pub fn into_appends(mut self, request: &RouteRequest<'_>) -> Result<Vec<Append>> {
        if self.rows.take().is_none() {
            return Ok(vec![self.into_append(request)?]);
        }
        let together = self.payload.take().unwrap_or_default();
        match bundle::parts(&self.event_type, &together) {
            Ok(parts) => {
                let alone = |Part { key, payload }| Self { id: None, key, payload: Some(payload), ..self.clone() };
                parts.into_iter().map(|part| alone(part).into_append(request)).collect()
            }
            Err(error) => Ok(vec![refused(self.position, &quote(&self.event_type), &error, request)?]),
        }
    }

    /// The event with those who get it. A row that cannot become an event is logged, and becomes a [`REFUSED`] one.
    ///
    /// # Errors
    /// None but such as say that this code is wrong.
    pub fn into_append(self, request: &RouteRequest<'_>) -> Result<Append> {
        let (position, named) = (self.position, quote(&self.event_type));
        match self.into_event(request) {
            Ok(event) => Ok(append(event, request)),
            Err(error) => refused(position, &named, &error, request),
        }
    }

    fn into_event(self, request: &RouteRequest<'_>) -> Result<Event> {
        if let Some(column) = self.unreadable {
            return Err(Error::invalid(column, "", "is not UTF-8 text"));
        }
        if let Some(size) = self.oversize {
            return Err(Error::TooLarge { field: "payload".into(), size, limit: request.max_payload });
        }
        let payload = payload(self.content_type.as_deref(), self.payload, self.binary)?;
        let mut event = Event::new(source(self.source)?, EventType::parse(&self.event_type)?, payload);
        if let Some(id) = &self.id {
            event.id = EventId::parse(id)?;
        }
        if let Some(micros) = self.created_at {
            event.created_at = instant(micros)?;
        }
        event.key = self.key.map(legal_key);
        event.user_id = self.user_id.as_deref().map(user_id).transpose()?;
        event.session_id = self.session_id.map(Arc::from);
        event.instance_id = self.instance_id.filter(|name| !name.is_empty()).map_or(INSTANCE.into(), Arc::from);
        event.schema = self.schema.map(Arc::from).or(event.schema);
        event.entity = self.entity.map(Arc::from).or(event.entity);
        event.operation = self.operation.map(Arc::from).or(event.operation);
        event.trace_parent = self.trace_parent.map(Arc::from);
        event.caused_by = self.caused_by.as_deref().map(EventId::parse).transpose()?;
        event.metadata = self.metadata.as_deref().map(metadata).transpose()?.unwrap_or_default();
        event.validate(request.max_payload)?;
        Ok(event)
    }
}

/// What is told of rows that became these, each with what the store made of it; `None` where another one took the row.
pub(super) fn routed<'a>(rows: impl IntoIterator<Item = (&'a Append, Option<Appended>)>) -> Routed {
    let mut routed = Routed::default();
    for (append, appended) in rows {
        routed.taken += 1;
        if appended.is_some_and(|appended| !appended.duplicate) {
            routed.events.push(RoutedEvent {
                source: append.event.source,
                event_type: append.event.event_type.clone(),
                subscriptions: Arc::clone(&append.subscriptions),
            });
        }
    }
    routed
}

fn append(event: Event, request: &RouteRequest<'_>) -> Append {
    let subscriptions = (request.matcher)(&event.event_type);
    Append { event: Arc::new(event), subscriptions }
}

fn refused(position: i64, named: &str, error: &Error, request: &RouteRequest<'_>) -> Result<Append> {
    tracing::warn!(position, event_type = named, %error, "a row of the inbox cannot become an event");
    let reason: String = error.to_string().chars().take(REASON).collect();
    let words = json!({"position": position, "type": named, "reason": reason});
    let mut event = Event::new(Source::System, EventType::parse(REFUSED)?, Payload::json(&words)?);
    event.instance_id = INSTANCE.into();
    Ok(append(event, request))
}

fn source(code: i64) -> Result<Source> {
    let known = usize::try_from(code).ok().and_then(|at| Source::ALL.get(at));
    known.copied().ok_or_else(|| {
        Error::invalid(
            "source",
            code.to_string(),
            "must be 0 database, 1 websocket, 2 frontend, 3 system or 4 internal",
        )
    })
}

fn instant(micros: i64) -> Result<Timestamp> {
    Timestamp::from_microsecond(micros)
        .map_err(|_| Error::invalid("created_at", micros.to_string(), "is no instant in microseconds since 1970"))
}

fn legal_key(key: String) -> Arc<str> {
    match short_text("key", &key) {
        Ok(()) => key.into(),
        Err(_) => {
            let hex: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("sha256:{hex}").into()
        }
    }
}

fn user_id(json: &str) -> Result<UserId> {
    serde_json::from_str(json)
        .map_err(|error| Error::invalid("user_id", json, format!("must be a JSON number or string: {error}")))
}

fn metadata(json: &str) -> Result<Metadata> {
    serde_json::from_str(json)
        .map_err(|error| Error::invalid("metadata", json, format!("must be a JSON object: {error}")))
}

fn payload(content_type: Option<&str>, text: Option<String>, binary: Option<Vec<u8>>) -> Result<Payload> {
    let body = match (text, binary) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid("binary", "", "is given beside payload: leave one of them out"));
        }
        (Some(text), None) => Bytes::from(text),
        (None, Some(binary)) => Bytes::from(binary),
        (None, None) if content_type.is_none_or(|content_type| content_type == JSON) => return Ok(Payload::default()),
        (None, None) => Bytes::new(),
    };
    Payload::new(content_type.unwrap_or(JSON), body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn appended(row: InboxRow) -> Append {
        let matcher = |event_type: &EventType| -> Arc<[Arc<str>]> { [Arc::from(event_type.as_str())].into() };
        row.into_append(&RouteRequest { matcher: &matcher, max: 1, max_payload: 64 }).unwrap()
    }

    fn row() -> InboxRow {
        InboxRow { position: 7, event_type: "public.users.create".into(), ..InboxRow::default() }
    }

    #[test]
    fn what_a_row_leaves_out_is_filled_in() {
        let Append { event, subscriptions } = appended(row());
        assert_eq!(&*subscriptions, [Arc::from("public.users.create")]);
        assert_eq!((event.source, &*event.instance_id), (Source::Database, INSTANCE));
        assert_eq!(event.schema.as_deref(), Some("public"));
        assert_eq!(event.operation.as_deref(), Some("create"));
        assert_eq!(event.payload.bytes(), "null");
        assert!(event.created_at.duration_until(crate::event::now()).as_secs() < 60);
    }

    #[test]
    fn what_a_row_says_is_kept() {
        let said = InboxRow {
            id: Some("o-1".into()),
            source: 4,
            created_at: Some(1),
            key: Some("k".into()),
            user_id: Some("\"u\"".into()),
            session_id: Some("s".into()),
            instance_id: Some("there".into()),
            schema: Some("Odd Schema".into()),
            caused_by: Some("c".into()),
            metadata: Some("{\"a\":[1]}".into()),
            content_type: Some("application/x-b".into()),
            binary: Some(vec![0, 255]),
            ..row()
        };
        let event = appended(said).event;
        assert_eq!((event.id.as_str(), event.source, event.created_at.as_microsecond()), ("o-1", Source::Internal, 1));
        assert_eq!((event.key.as_deref(), event.user_id.clone()), (Some("k"), Some(UserId::Text("u".into()))));
        assert_eq!((&*event.instance_id, event.schema.as_deref()), ("there", Some("Odd Schema")));
        assert_eq!((event.entity.as_deref(), event.caused_by.as_ref().unwrap().as_str()), (Some("users"), "c"));
        assert_eq!(event.metadata["a"], json!([1]));
        assert_eq!((event.payload.content_type(), &event.payload.bytes()[..]), ("application/x-b", &[0, 255][..]));
    }

    /// A key only tells events of one thing from those of another, so a hash of it does as well.
    #[test]
    fn an_illegal_key_is_hashed() {
        let key = |text: &str| appended(InboxRow { key: Some(text.into()), ..row() }).event.key.clone().unwrap();
        assert_eq!(&*key("a"), "a");
        assert!(key("a\nb").starts_with("sha256:"));
        assert_ne!(key(&"x".repeat(300)), key(&"x".repeat(301)));
    }

    #[test]
    fn a_row_that_cannot_become_an_event_becomes_a_refusal_with_its_reason() {
        let rows = [
            (InboxRow { event_type: "a..b".into(), ..row() }, "segment cannot be empty"),
            (InboxRow { event_type: "x".repeat(9_999), ..row() }, "at most 255 bytes"),
            (InboxRow { source: 9, ..row() }, "source"),
            (InboxRow { created_at: Some(i64::MAX), ..row() }, "created_at"),
            (InboxRow { id: Some(String::new()), ..row() }, "event ID is required"),
            (InboxRow { user_id: Some("Ada".into()), ..row() }, "user_id"),
            (InboxRow { session_id: Some("a\u{0}".into()), ..row() }, "session_id"),
            (InboxRow { metadata: Some("[]".into()), ..row() }, "metadata"),
            (InboxRow { payload: Some("{\"a\":".into()), ..row() }, "is not JSON"),
            (InboxRow { payload: Some("x".repeat(65)), content_type: Some("text/plain".into()), ..row() }, "65 bytes"),
            (InboxRow { payload: Some("1".into()), binary: Some(vec![1]), ..row() }, "beside payload"),
            (InboxRow { oversize: Some(99), ..row() }, "99 bytes"),
            (InboxRow { unreadable: Some("metadata"), ..row() }, "not UTF-8"),
        ];
        for (row, words) in rows {
            let Append { event, subscriptions } = appended(row);
            assert_eq!((event.event_type.as_str(), event.source), (REFUSED, Source::System), "{words}");
            assert_eq!(&*subscriptions, [Arc::from(REFUSED)]);
            let told: serde_json::Value = event.payload.parse().unwrap();
            assert_eq!(told["position"], 7);
            assert!(told["reason"].as_str().unwrap().contains(words), "{words}: {told}");
            assert!(event.payload.bytes().len() < 2_000);
        }
    }
}
