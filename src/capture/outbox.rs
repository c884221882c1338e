//! Publishing in the application's own transaction: committed with it, or never seen.
//!
//! The event is checked as a publish checks it, and left in the inbox beside the application's own rows. Nothing is
//! matched or handled here, and nothing is sent: a broker that is open on the database finds the row once it is
//! committed.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Database, PgConnection, SqliteConnection, Transaction};

use super::triggers::quoted;
use crate::error::{Error, Result};
use crate::event::{Event, EventId, MAX_PAYLOAD, Source};

/// The schema of PostgreSQL in which the inbox stands unless another is named.
pub const SCHEMA: &str = "tidegate";

/// What stands in for the instance while an event is checked: whoever routes it fills in its own.
const ANY_INSTANCE: &str = "outbox";

/// Leaves `event` in the inbox, with the settings of [`Outbox::default`]. On a connection that is in no transaction it is
/// committed at once.
///
/// ```no_run
/// # async fn sign_up(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// use tidegate::{Event, Payload, Source, capture::outbox};
///
/// let mut tx = pool.begin().await?;
/// sqlx::query("INSERT INTO users (name) VALUES ('Ada')").execute(&mut *tx).await?;
/// let payload = Payload::json(&serde_json::json!({"name": "Ada"}))?;
/// outbox::publish(&mut tx, &Event::new(Source::Internal, "public.users.create".parse()?, payload)).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`Outbox::publish`].
pub async fn publish<C: Leave>(connection: &mut C, event: &Event) -> Result<()> {
    Outbox::default().publish(connection, event).await
}

/// Where events are left, and how large they may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbox {
    schema: Arc<str>,
    max_payload: u64,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { schema: SCHEMA.into(), max_payload: MAX_PAYLOAD }
    }
}

impl Outbox {
    /// The schema of PostgreSQL in which the inbox stands. SQLite has none.
    #[must_use]
    pub fn schema(self, schema: &str) -> Self {
        Self { schema: schema.into(), ..self }
    }

    /// The largest payload, in bytes: what `limits.max_payload` says in the configuration of the servers.
    #[must_use]
    pub fn max_payload(self, max_payload: u64) -> Self {
        Self { max_payload, ..self }
    }

    /// Leaves `event` in the inbox, in the transaction that the connection is in.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::TooLarge`] naming the field; the transaction is as it was then.
    /// [`Error::Incompatible`] when the database has no inbox, and [`Error::Store`] when it refuses: PostgreSQL goes on
    /// with the transaction after that only from a savepoint.
    pub async fn publish<C: Leave>(&self, connection: &mut C, event: &Event) -> Result<()> {
        let mut checked = event.clone();
        if checked.instance_id.is_empty() {
            checked.instance_id = ANY_INSTANCE.into();
        }
        checked.validate(self.max_payload)?;
        connection.leave(&Row::of(event)?, &self.schema).await.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: sqlx::Error) -> Error {
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
        if code == "42P01" || error.to_string().contains("no such table") {
            return Error::Incompatible {
                what: format!("the database (inbox in schema {})", self.schema),
                reason: "has no inbox: let tidegate open it once, with this database as its provider".into(),
            };
        }
        Error::store("outbox", "leave an event in the inbox", error)
    }
}

/// A row of the inbox, as it is bound.
pub struct Row<'e> {
    event: &'e Event,
    source: i16,
    user_id: Option<String>,
    metadata: Option<String>,
    text: Option<&'e str>,
    binary: Option<&'e [u8]>,
}

impl<'e> Row<'e> {
    fn of(event: &'e Event) -> Result<Self> {
        let bytes = event.payload.bytes();
        let json = event.payload.is_json().then(|| std::str::from_utf8(bytes)).transpose();
        let text = json.map_err(|error| Error::invalid("payload", "", format!("is not JSON: {error}")))?;
        let source = Source::ALL.iter().position(|&source| source == event.source).unwrap_or_default();
        Ok(Self {
            event,
            source: i16::try_from(source).unwrap_or_default(),
            user_id: event.user_id.as_ref().map(|user| serde_json::json!(user).to_string()),
            metadata: (!event.metadata.is_empty()).then(|| serde_json::json!(event.metadata).to_string()),
            binary: text.is_none().then_some(&**bytes),
            text,
        })
    }
}

/// The columns in the order in which they are bound. `binary` is a word of SQL.
const COLUMNS: &str = "id, type, source, created_at, key, user_id, session_id, instance_id, schema, entity, operation, \
    trace_parent, caused_by, metadata, content_type, payload, \"binary\"";

macro_rules! bind {
    ($text:expr, $row:expr) => {{
        let (row, event) = ($row, $row.event);
        sqlx::query($text)
            .bind(event.id.as_str())
            .bind(event.event_type.as_str())
            .bind(row.source)
            .bind(event.created_at.as_microsecond())
            .bind(event.key.as_deref())
            .bind(row.user_id.as_deref())
            .bind(event.session_id.as_deref())
            .bind(Some(&*event.instance_id).filter(|instance| !instance.is_empty()))
            .bind(event.schema.as_deref())
            .bind(event.entity.as_deref())
            .bind(event.operation.as_deref())
            .bind(event.trace_parent.as_deref())
            .bind(event.caused_by.as_ref().map(EventId::as_str))
            .bind(row.metadata.as_deref())
            .bind((!event.payload.is_json()).then(|| event.payload.content_type()))
            .bind(row.text)
            .bind(row.binary)
    }};
}

/// What an event can be left by: a connection of PostgreSQL or SQLite, or a transaction on one.
#[async_trait]
pub trait Leave: Send {
    /// Inserts the row into the inbox of `schema`.
    ///
    /// # Errors
    /// What the database says.
    async fn leave(&mut self, row: &Row<'_>, schema: &str) -> sqlx::Result<()>;
}

#[async_trait]
impl Leave for PgConnection {
    async fn leave(&mut self, row: &Row<'_>, schema: &str) -> sqlx::Result<()> {
        let values: Vec<String> = (1..=17).map(|at| format!("${at}")).collect();
        let text = format!("INSERT INTO {}.inbox ({COLUMNS}) VALUES ({})", quoted(schema), values.join(","));
        bind!(AssertSqlSafe(text), row).execute(self).await.map(drop)
    }
}

#[async_trait]
impl Leave for SqliteConnection {
    async fn leave(&mut self, row: &Row<'_>, _schema: &str) -> sqlx::Result<()> {
        let text = format!("INSERT INTO inbox ({COLUMNS}) VALUES ({})", ["?"; 17].join(","));
        bind!(AssertSqlSafe(text), row).execute(self).await.map(drop)
    }
}

#[async_trait]
impl<DB: Database> Leave for Transaction<'_, DB>
where
    DB::Connection: Leave,
{
    async fn leave(&mut self, row: &Row<'_>, schema: &str) -> sqlx::Result<()> {
        (**self).leave(row, schema).await
    }
}

#[async_trait]
impl<DB: Database> Leave for PoolConnection<DB>
where
    DB::Connection: Leave,
{
    async fn leave(&mut self, row: &Row<'_>, schema: &str) -> sqlx::Result<()> {
        (**self).leave(row, schema).await
    }
}
