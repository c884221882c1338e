//! What is called for a delivery: a [`Handler`], be it a native closure or a plugin.
//!
//! A handler gets a [`Call`] and gives an [`Outcome`]. It touches no store: what it wants written and published travels
//! in the outcome as [`Effects`] and commits together with its success, or not at all.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::delivery::{Fault, KvWrite, Reply, Trace, Verdict};
use crate::error::Result;
use crate::event::{Event, EventType, Metadata, Payload, Source};

/// Something that handles deliveries.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Makes one attempt.
    ///
    /// The caller ends the call after [`Call::timeout`] by dropping the future, and catches a panic: either ends this
    /// attempt only. A handler that cannot be ended by dropping its future (because it computes without awaiting)
    /// must watch the time itself.
    ///
    /// It runs on a thread of the runtime, beside the broker's own tasks. Whoever keeps that thread (a client that blocks,
    /// `std::thread::sleep`, a second of computing) keeps what was woken there from running, which may be the task that
    /// claims for every subscription: such work belongs into [`spawn_blocking`](tokio::task::spawn_blocking).
    async fn handle(&self, call: Call) -> Outcome;

    /// The most calls that [`handle_batch`](Self::handle_batch) takes at once; 1 for a handler that has use for single
    /// calls only. It may change from one moment to the next, when a plugin is replaced.
    fn max_batch(&self) -> usize {
        1
    }

    /// Makes one attempt for each of these calls, together. Their outcomes are those of single calls and in the same
    /// order, one for each.
    ///
    /// `None` when it ended without them: a trap, the time or the fuel of one ends all, and nobody knows whose fault it
    /// was. Nothing has happened then and no attempt was made: the caller makes single [calls](Self::handle), which are
    /// the attempts that count. `None` as well for more calls than [`max_batch`](Self::max_batch).
    ///
    /// All of them are made within the shortest [`Call::timeout`] among them; see [`handle`](Self::handle) for who ends
    /// them.
    async fn handle_batch(&self, calls: Vec<Call>) -> Option<Vec<Outcome>> {
        drop(calls);
        None
    }

    /// Whether the handler ends an attempt at [`Call::timeout`] itself, to report what it saw of it. The caller then
    /// steps in a moment later only.
    fn keeps_time(&self) -> bool {
        false
    }
}

/// One attempt to be made.
#[derive(Clone)]
pub struct Call {
    /// The event, shared by all its deliveries.
    pub event: Arc<Event>,
    /// The subscription on whose behalf the call is made.
    pub subscription: Arc<str>,
    /// 1 for the first call; a redrive starts again at 1.
    pub attempt: u32,
    /// How many attempts the policy allows.
    pub max_attempts: u32,
    /// How long the attempt may take.
    pub timeout: Duration,
    /// Whether an operator asked for this delivery by a replay.
    pub is_replay: bool,
    /// Reads of key-value data, as committed.
    pub kv: Arc<dyn KvRead>,
}

impl Call {
    /// The same for every attempt of this delivery: hand it to the systems that the handler calls.
    #[must_use]
    pub fn idempotency_key(&self) -> String {
        format!("{}/{}", self.event.id, self.subscription)
    }
}

/// Committed key-value data, as a handler may read it.
#[async_trait]
pub trait KvRead: Send + Sync {
    /// The value of `key` in `bucket`, or `None` when it was never set, was deleted or has expired.
    ///
    /// # Errors
    /// [`Error::Store`](crate::error::Error::Store) when the store cannot be read.
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>>;
}

/// What came of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub verdict: Verdict,
    /// Why it did not succeed.
    pub fault: Option<Box<Fault>>,
    /// The delay that the handler asks for before the next attempt.
    pub retry_after: Option<Duration>,
    /// The handler's answer.
    pub reply: Option<Box<Reply>>,
    /// What commits with success. Ignored for any verdict but [`Verdict::Ok`].
    pub effects: Effects,
    /// What the host saw.
    pub trace: Trace,
}

impl Outcome {
    /// Success, with nothing to say or write.
    #[must_use]
    pub fn ok() -> Self {
        Self::ended(Verdict::Ok, None)
    }

    /// An attempt that ended with `verdict` because of `fault`.
    #[must_use]
    pub fn failed(verdict: Verdict, fault: Fault) -> Self {
        Self::ended(verdict, Some(Box::new(fault)))
    }

    fn ended(verdict: Verdict, fault: Option<Box<Fault>>) -> Self {
        Self { verdict, fault, retry_after: None, reply: None, effects: Effects::default(), trace: Trace::default() }
    }
}

/// What a successful attempt wants done, atomically with its completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Effects {
    /// Events to publish, in order.
    pub published: Vec<Publish>,
    /// Key-value writes, in order.
    pub writes: Vec<KvWrite>,
}

/// An event that a handler publishes. Its id follows from the delivery, so that a repeated attempt publishes it once.
#[derive(Debug, Clone, PartialEq)]
pub struct Publish {
    /// The new event's type.
    pub event_type: EventType,
    /// The new event's body.
    pub payload: Payload,
    /// The new event's ordering key.
    pub key: Option<Arc<str>>,
    /// The new event's metadata.
    pub metadata: Metadata,
}

impl Publish {
    /// The event of `cause`'s handler: source `internal`, `caused_by`, the depth and the trace set.
    #[must_use]
    pub fn into_event(self, cause: &Event, subscription: &str, index: usize, instance_id: &Arc<str>) -> Event {
        let mut event = Event::new(Source::Internal, self.event_type, self.payload);
        event.id = crate::event::EventId::caused(&cause.id, subscription, index);
        event.instance_id = Arc::clone(instance_id);
        event.key = self.key;
        event.metadata = self.metadata;
        event.user_id.clone_from(&cause.user_id);
        event.session_id.clone_from(&cause.session_id);
        event.trace_parent.clone_from(&cause.trace_parent);
        event.caused_by = Some(cause.id.clone());
        event.depth = cause.depth.saturating_add(1);
        event
    }
}

/// Why a native handler did not succeed.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// Transient: back off and try again.
    Retry {
        /// What went wrong.
        fault: Fault,
        /// Overrides the policy's delay, within `max_age`.
        after: Option<Duration>,
    },
    /// Permanent: straight to the dead letters.
    Reject(Fault),
}

impl Failure {
    /// A transient failure, with the policy's delay.
    pub fn retry(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Retry { fault: Fault::new(code, message), after: None }
    }

    /// A permanent failure.
    pub fn reject(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Reject(Fault::new(code, message))
    }
}

impl<E: std::error::Error> From<E> for Failure {
    /// Any error is taken for transient.
    fn from(error: E) -> Self {
        Self::retry("error", error.to_string())
    }
}

/// What a native handler may return on success.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Success {
    /// The answer.
    pub reply: Option<Reply>,
    /// What commits with the success.
    pub effects: Effects,
}

impl From<()> for Success {
    fn from((): ()) -> Self {
        Self::default()
    }
}

impl From<Reply> for Success {
    fn from(reply: Reply) -> Self {
        Self { reply: Some(reply), effects: Effects::default() }
    }
}

impl From<Option<Reply>> for Success {
    fn from(reply: Option<Reply>) -> Self {
        Self { reply, effects: Effects::default() }
    }
}

/// A native closure as a [`Handler`]. As in any async code, its future must not [block](Handler::handle) its thread.
///
/// ```
/// use tidegate::{Call, Failure, native};
///
/// let handler = native(|call: Call| async move {
///     let order: serde_json::Value = call.event.payload.parse()?;
///     if order["total"].is_null() { Err(Failure::reject("no-total", "an order needs a total")) } else { Ok(()) }
/// });
/// ```
pub fn native<F, Fut, S>(function: F) -> Arc<dyn Handler>
where
    F: Fn(Call) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = std::result::Result<S, Failure>> + Send + 'static,
    S: Into<Success> + 'static,
{
    Arc::new(Native { function })
}

struct Native<F> {
    function: F,
}

#[async_trait]
impl<F, Fut, S> Handler for Native<F>
where
    F: Fn(Call) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = std::result::Result<S, Failure>> + Send + 'static,
    S: Into<Success> + 'static,
{
    async fn handle(&self, call: Call) -> Outcome {
        match (self.function)(call).await {
            Ok(success) => {
                let Success { reply, effects } = success.into();
                Outcome { reply: reply.map(Box::new), effects, ..Outcome::ok() }
            }
            Err(Failure::Retry { fault, after }) => {
                Outcome { retry_after: after, ..Outcome::failed(Verdict::Retry, fault) }
            }
            Err(Failure::Reject(fault)) => Outcome::failed(Verdict::Reject, fault),
        }
    }
}
