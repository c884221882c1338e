//! Hooks around an application's own operations: what it is about to do, and what it has done, as events.
//!
//! *Before* hooks ask: the event is published and waited for, and a handler that refuses it vetoes the operation with its
//! reasons. *After* hooks tell. That an event cannot be published never fails the operation that it is about: it is logged
//! and counted. Nothing here watches a database, and nothing is undone.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::broker::{Answer, Broker, Published};
use crate::error::Result;
use crate::event::{Event, Payload, Source, UserId, event_type};

/// Which operations are told, and how long a veto is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HookOptions {
    /// Whether creating is told.
    pub create: bool,
    /// Whether reading is told. Off: reads are many.
    pub read: bool,
    /// Whether updating is told.
    pub update: bool,
    /// Whether deleting is told.
    pub delete: bool,
    /// How long an operation waits for those who may veto it. Who has not answered by then has no objection.
    #[serde(with = "friendly::required")]
    pub patience: Duration,
}

impl Default for HookOptions {
    fn default() -> Self {
        Self { create: true, read: false, update: true, delete: true, patience: Duration::from_secs(5) }
    }
}

/// What an application does with an entity.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// Creates it. The data: what is to be created, or afterwards what was.
    Create(Value),
    /// Reads it. The data: what was read.
    Read(Value),
    /// Changes it.
    Update {
        /// Which one.
        id: Value,
        /// What it becomes, or the parts that change.
        data: Value,
    },
    /// Deletes it.
    Delete {
        /// Which one.
        id: Value,
    },
}

impl Operation {
    /// Creating `data`, which may be anything with a JSON form.
    pub fn create<T: Serialize + ?Sized>(data: &T) -> Self {
        Self::Create(body(data))
    }

    /// Reading `data`.
    pub fn read<T: Serialize + ?Sized>(data: &T) -> Self {
        Self::Read(body(data))
    }

    /// Changing the entity of this id.
    pub fn update<I: Serialize + ?Sized, T: Serialize + ?Sized>(id: &I, data: &T) -> Self {
        Self::Update { id: body(id), data: body(data) }
    }

    /// Deleting the entity of this id.
    pub fn delete<I: Serialize + ?Sized>(id: &I) -> Self {
        Self::Delete { id: body(id) }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Read(_) => "read",
            Self::Update { .. } => "update",
            Self::Delete { .. } => "delete",
        }
    }

    fn payload(&self) -> Value {
        match self {
            Self::Create(data) | Self::Read(data) => data.clone(),
            Self::Update { id, data } => json!({"id": id, "data": data}),
            Self::Delete { id } => json!({"id": id}),
        }
    }

    /// What orders the events of one entity.
    fn key(&self) -> Option<String> {
        let id = match self {
            Self::Create(data) | Self::Read(data) => data.get("id")?,
            Self::Update { id, .. } | Self::Delete { id } => id,
        };
        match id {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }
}

/// What has no JSON form is told as that.
fn body<T: Serialize + ?Sized>(data: &T) -> Value {
    serde_json::to_value(data).unwrap_or_else(|error| {
        tracing::warn!(%error, "what an event should tell has no JSON form");
        json!({"error": "failed to serialize payload"})
    })
}

/// On whose behalf an operation is done. Everything may be unknown.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Actor {
    /// The user's id.
    pub user_id: Option<UserId>,
    /// The user's name.
    pub user_name: Option<String>,
    /// The user's mail address.
    pub user_email: Option<String>,
    /// The user's roles; none for unknown.
    pub user_roles: Vec<String>,
    /// The session.
    pub session_id: Option<String>,
    /// W3C `traceparent`.
    pub trace_parent: Option<String>,
}

/// Why an operation must not be done: what every handler that refused it said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Veto {
    /// At least one.
    pub reasons: Vec<Reason>,
}

/// What one handler said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The subscription that refused.
    pub subscription: Arc<str>,
    /// An open, stable string such as `email-disposable`.
    pub code: String,
    /// Words for people.
    pub message: String,
}

impl fmt::Display for Veto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.reasons.iter().map(|reason| match reason.message.as_str() {
            "" => Cow::Borrowed(reason.code.as_str()),
            message => Cow::Owned(format!("{}: {message}", reason.code)),
        });
        write!(f, "vetoed: {}", words.collect::<Vec<_>>().join("; "))
    }
}

impl std::error::Error for Veto {}

/// Tells of operations on one entity. Cheap to clone.
#[derive(Clone)]
pub struct CrudHooks {
    broker: Broker,
    schema: Arc<str>,
    entity: Arc<str>,
    options: Arc<HookOptions>,
    failures: Arc<AtomicU64>,
}

impl CrudHooks {
    /// Hooks for the entity of a schema: what is done with it is told as `schema.entity.create` and so on, and what is
    /// about to be done as `schema.entity.before-create` and so on. The schema may be empty.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) when they are no legal segments of a type.
    pub fn new(broker: Broker, schema: &str, entity: &str, options: HookOptions) -> Result<Self> {
        event_type(schema, entity, "before-create")?;
        Ok(Self {
            broker,
            schema: schema.into(),
            entity: entity.into(),
            options: options.into(),
            failures: Arc::default(),
        })
    }

    /// Asks those who may object, before the operation is done. `Ok` where nobody does, where nobody is subscribed, where
    /// the operation is switched off, and where nobody could be asked.
    ///
    /// # Errors
    /// The [`Veto`]: a handler rejected the event, or answered with a JSON object in which `accepted` is `false`, whose
    /// `reasons` are taken over. A handler that fails in another way, or is too slow, objects to nothing.
    pub async fn before(&self, operation: &Operation, actor: &Actor) -> Result<(), Veto> {
        if !self.is_on(operation) {
            return Ok(());
        }
        let answer = match self.event("before-", operation, actor) {
            Ok(event) => self.broker.publish_sync(event, self.options.patience).await,
            Err(error) => Err(error),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                self.failed(operation, &error);
                return Ok(());
            }
        };
        let reasons = objections(&answer);
        if reasons.is_empty() { Ok(()) } else { Err(Veto { reasons }) }
    }

    /// Tells that the operation was done. What was stored, if it was; never an error.
    pub async fn after(&self, operation: &Operation, actor: &Actor) -> Option<Published> {
        if !self.is_on(operation) {
            return None;
        }
        let published = match self.event("", operation, actor) {
            Ok(event) => self.broker.publish(event).await,
            Err(error) => Err(error),
        };
        published.inspect_err(|error| self.failed(operation, error)).ok()
    }

    /// How many events could not be published.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn is_on(&self, operation: &Operation) -> bool {
        match operation {
            Operation::Create(_) => self.options.create,
            Operation::Read(_) => self.options.read,
            Operation::Update { .. } => self.options.update,
            Operation::Delete { .. } => self.options.delete,
        }
    }

    fn failed(&self, operation: &Operation, error: &crate::Error) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let (entity, operation) = (&*self.entity, operation.name());
        tracing::warn!(%error, entity, operation, "an operation goes on although its event was not published");
    }

    fn event(&self, before: &str, operation: &Operation, actor: &Actor) -> Result<Event> {
        let name = operation.name();
        let event_type = event_type(&self.schema, &self.entity, &format!("{before}{name}"))?;
        let mut event = Event::new(Source::Database, event_type, Payload::json(&operation.payload())?);
        event.schema = (!self.schema.is_empty()).then(|| Arc::clone(&self.schema));
        event.entity = Some(Arc::clone(&self.entity));
        event.operation = Some(name.into());
        event.key = operation.key().map(Arc::from).filter(|key| crate::event::short_text("key", key).is_ok());
        event.user_id = Some(actor.user_id.clone().unwrap_or(UserId::Number(0)));
        event.session_id = actor.session_id.as_deref().map(Arc::from);
        event.trace_parent = actor.trace_parent.as_deref().map(Arc::from);
        event.metadata.insert("table_name".to_owned(), json!(&*self.entity));
        let known = [("user_name", &actor.user_name), ("user_email", &actor.user_email)];
        for (name, value) in known {
            if let Some(value) = value {
                event.metadata.insert(name.to_owned(), json!(value));
            }
        }
        if !actor.user_roles.is_empty() {
            event.metadata.insert("user_roles".to_owned(), json!(actor.user_roles));
        }
        Ok(event)
    }
}

fn objections(answer: &Answer) -> Vec<Reason> {
    answer.detail.deliveries.iter().flat_map(objections_of).collect()
}

fn objections_of(delivery: &crate::delivery::Delivery) -> Vec<Reason> {
    use crate::delivery::Verdict;
    let Some(last) = delivery.attempts.last() else { return Vec::new() };
    let reason = |code: &str, message: &str| Reason {
        subscription: Arc::clone(&delivery.subscription),
        code: code.to_owned(),
        message: message.to_owned(),
    };
    match (last.verdict, &last.error, &last.reply) {
        (Verdict::Reject, Some(fault), _) => vec![reason(&fault.code, &fault.message)],
        (Verdict::Reject, None, _) => vec![reason("rejected", "")],
        (Verdict::Ok, _, Some(reply)) => match serde_json::from_slice(&reply.body) {
            Ok(Judgement { accepted: false, reasons }) if reasons.is_empty() => vec![reason("refused", "")],
            Ok(Judgement { accepted: false, reasons }) => reasons.iter().map(|code| reason(code, "")).collect(),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// A reply by which a handler that succeeded says no.
#[derive(Deserialize)]
struct Judgement {
    accepted: bool,
    #[serde(default)]
    reasons: Vec<String>,
}
