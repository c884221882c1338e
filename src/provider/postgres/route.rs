//! Moving what others left in the inbox into the log.
//!
//! One process at a time takes the oldest committed rows, makes events of them, and appends them in the same
//! transaction; only that last step holds the lock that gives out seq. A row that cannot be an event becomes one that
//! says so: nothing stands in the way of what is behind it, and nothing is lost in silence.

use std::sync::Arc;

use serde_json::json;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::row::{limit, source_of};
use super::session::Session;
use super::trouble::Step;
use super::{Store, Turns};
use crate::error::{Error, Result, quote};
use crate::event::{Event, EventId, EventType, Metadata, Payload, Source, UserId, micros};
use crate::provider::{Append, Matcher};

const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT 1 FROM {s}.inbox)";
const LOCK: &str = "SELECT pg_try_advisory_xact_lock(hashtextextended('tidegate route ' || $1, 0))";
const TAKE: &str = "DELETE FROM {s}.inbox WHERE position IN (SELECT position FROM {s}.inbox ORDER BY position LIMIT $2) \
    RETURNING position, id, type, source, coalesce(created_at, {now}), key, user_id, session_id, instance_id, schema, \
    entity, operation, trace_parent, caused_by, metadata, content_type, payload, \"binary\"";

/// The type of what stands for a row that cannot be an event.
const REFUSED: &str = "tidegate.inbox.refused";

/// The instance of an event that says none.
const DATABASE: &str = "database";

impl Store {
    /// Moves up to `max` events from the inbox into the log.
    pub(super) async fn route(&self, matcher: &Matcher<'_>, max: usize) -> Step<usize> {
        let mut session = self.session().await?;
        let row = session.row(self.statement(IS_EMPTY)).await;
        if session.finish(row).await?.try_get(0)? {
            return Ok(0);
        }
        let mut turns = Turns::default();
        loop {
            let mut session = self.session().await?;
            let result = session.route(matcher, max, turns.careful).await;
            if let Some(result) = turns.judge(session.finish(result).await) {
                return result;
            }
        }
    }
}

impl Session<'_> {
    async fn route(&mut self, matcher: &Matcher<'_>, max: usize, careful: bool) -> Step<usize> {
        self.begin().await?;
        let lock = self.store.statement(LOCK).bind(self.store.schema.clone());
        if !self.row(lock).await?.try_get::<bool, _>(0)? {
            // Another process is at it.
            self.commit().await?;
            return Ok(0);
        }
        let rows = self.rows(self.store.statement(TAKE).bind(self.store.now()).bind(limit(max))).await?;
        let mut events: Vec<(i64, Event)> = Vec::with_capacity(rows.len());
        for row in &rows {
            events.push((row.try_get(0)?, event_or_refusal(row, self.store.options.max_payload)?));
        }
        events.sort_unstable_by_key(|&(position, _)| position);
        let appends: Vec<Append> =
            events.into_iter().map(|(_, event)| Append { subscriptions: matcher(&event.event_type), event }).collect();
        let appends: Vec<&Append> = appends.iter().collect();
        let numbers = self.numbers(appends.iter().flat_map(|append| append.subscriptions.iter())).await?;
        if careful {
            self.append_carefully(&appends, &numbers).await?;
        } else {
            self.append(&appends, &super::append::Known::new(), &numbers).await?;
        }
        self.commit().await?;
        Ok(rows.len())
    }
}

/// The event that a row says, or one that says why it cannot be.
fn event_or_refusal(row: &PgRow, max_payload: u64) -> sqlx::Result<Event> {
    let error = match read(row, max_payload)? {
        Ok(event) => return Ok(event),
        Err(error) => error,
    };
    let (position, event_type): (i64, &str) = (row.try_get(0)?, row.try_get(2)?);
    let reason = error.to_string();
    tracing::warn!(position, event_type = quote(event_type), reason, "a row of the inbox cannot be an event");
    let payload = json!({"position": position, "type": cut(event_type), "reason": cut(&reason)});
    let refused = EventType::parse(REFUSED).map_err(super::row::broken)?;
    let payload = Payload::json(&payload).map_err(super::row::broken)?;
    let mut event = Event::new(Source::System, refused, payload);
    event.created_at = micros(row.try_get(4)?);
    event.instance_id = DATABASE.into();
    Ok(event)
}

/// The beginning of a text of any length.
fn cut(text: &str) -> &str {
    text.char_indices().nth(500).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

fn read(row: &PgRow, max_payload: u64) -> sqlx::Result<Result<Event>> {
    let text = |at: usize| row.try_get::<Option<&str>, _>(at);
    let columns = Columns {
        id: text(1)?,
        event_type: row.try_get(2)?,
        source: row.try_get(3)?,
        created_at: row.try_get(4)?,
        texts: [text(5)?, text(7)?, text(8)?, text(9)?, text(10)?, text(11)?, text(12)?],
        user_id: text(6)?,
        caused_by: text(13)?,
        metadata: text(14)?,
        content_type: text(15)?,
        payload: text(16)?,
        binary: row.try_get(17)?,
    };
    Ok(columns.event(max_payload))
}

/// What a row of the inbox says.
struct Columns<'r> {
    id: Option<&'r str>,
    event_type: &'r str,
    source: i16,
    created_at: i64,
    /// Key, session, instance, schema, entity, operation and trace.
    texts: [Option<&'r str>; 7],
    user_id: Option<&'r str>,
    caused_by: Option<&'r str>,
    metadata: Option<&'r str>,
    content_type: Option<&'r str>,
    payload: Option<&'r str>,
    binary: Option<&'r [u8]>,
}

impl Columns<'_> {
    fn event(&self, max_payload: u64) -> Result<Event> {
        let source = source_of(self.source)
            .ok_or_else(|| Error::invalid("source", self.source.to_string(), "must be 0 to 4"))?;
        let mut event = Event::new(source, EventType::parse(self.event_type)?, self.body()?);
        if let Some(id) = self.id {
            event.id = EventId::parse(id)?;
        }
        event.created_at = micros(self.created_at);
        let [key, session_id, instance_id, schema, entity, operation, trace_parent] =
            self.texts.map(|text| text.map(Arc::<str>::from));
        event.key = key;
        event.session_id = session_id;
        event.instance_id = instance_id.filter(|name| !name.is_empty()).unwrap_or_else(|| DATABASE.into());
        event.schema = schema.or(event.schema);
        event.entity = entity.or(event.entity);
        event.operation = operation.or(event.operation);
        event.trace_parent = trace_parent;
        event.user_id = self.user_id.map(|json| parsed::<UserId>("user_id", json)).transpose()?;
        event.metadata =
            self.metadata.map(|json| parsed::<Metadata>("metadata", json)).transpose()?.unwrap_or_default();
        event.caused_by = self.caused_by.map(EventId::parse).transpose()?;
        event.validate(max_payload)?;
        Ok(event)
    }

    fn body(&self) -> Result<Payload> {
        let content_type = self.content_type.unwrap_or(crate::event::JSON);
        match (self.payload, self.binary) {
            (Some(_), Some(_)) => Err(Error::invalid("payload", "", "stands beside binary: only one of them may")),
            (Some(text), None) => Payload::new(content_type, text.to_owned()),
            (None, Some(bytes)) => Payload::new(content_type, bytes.to_vec()),
            (None, None) if content_type == crate::event::JSON => Ok(Payload::default()),
            (None, None) => Payload::new(content_type, Vec::new()),
        }
    }
}

fn parsed<T: serde::de::DeserializeOwned>(field: &'static str, json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| Error::invalid(field, json, format!("is not what it must be: {error}")))
}
