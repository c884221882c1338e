//! The port to a store: one small trait, and what its methods promise.
//!
//! ```text
//!        append / route                 claim                    settle
//! caller ───────────────▶ log ──▶ pending ──────▶ processing ───────────────▶ completed | failed
//!                         seq        ▲   lease+token │    ▲                        │
//!                                    └───────────────┘    └── renew                │
//!                                    └──────────────── amend (redrive, replay) ────┘
//! ```
//!
//! Rules for all providers:
//!
//! * What a method returned is as durable as [`Capabilities::durability`] says, before it returns.
//! * `seq` is dense, strictly increasing in commit order and never reused, also across restarts and pruning.
//! * There is one delivery per (event, subscription), and at most one live lease on it. Every transition out of a lease
//!   is checked against the lease's random token; a stale token changes nothing.
//! * A lease is held until it is settled or taken away: by a claim after its end, or by an amendment. That its end has
//!   passed does not take it away yet.
//! * Due times and leases follow the store's clock, never the host's.
//! * Legal moves are those of [`Status::after`](crate::delivery::Status::after) and no others.
//! * A batch is all or nothing, except that each entry of `renew` and `settle` stands for itself.
//!
//! Nothing here knows how events are matched, what a handler is or how long to back off. The suite in `conformance`
//! (feature `conformance`) is what makes a store a provider.

#[cfg(any(test, feature = "conformance"))]
#[expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a claim that does not hold ends in a panic")]
#[macro_use]
pub mod conformance;
mod bundle;
#[cfg(test)]
#[path = "../../tests/it/support/child.rs"]
mod child;
pub(crate) mod finding;
mod header;
pub mod inbox;
pub mod memory;
pub mod nats;
mod pause;
pub mod postgres;
mod recent;
pub mod redis;
pub mod rules;
pub mod sqlite;
mod state;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::finding::{Examine, Finding, Severity};
use crate::delivery::{Attempt, Delivery, EventDetail, EventRecord, KvWrite, Next, Status, Verdict};
use crate::error::Result;
use crate::event::{Event, EventType, Seq, Source, UserId};
use crate::pattern::Pattern;
use crate::subscription::Ordering;

/// A store's clock: microseconds since the Unix epoch. It may jump, as clocks do, but should not go back.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// A store of events, deliveries and documents.
///
/// All methods may be called at once from any number of tasks. A dropped future leaves its call done or not done, never
/// half done.
#[async_trait]
pub trait Provider: Documents {
    /// What this store is, as data. Never changes while the store is open.
    fn capabilities(&self) -> Capabilities;

    /// Gives each event its seq and creates one pending delivery per subscription named, in one atomic step.
    ///
    /// Durable when it returns. Idempotent by event id: an id that the log holds already (or that stands earlier in
    /// the batch) stores nothing and is answered with `duplicate`. An event without subscriptions is `completed` at
    /// once. On an error nothing of the batch is stored.
    ///
    /// # Errors
    /// [`Error::Overloaded`](crate::Error::Overloaded) when a bound of the store is hit.
    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>>;

    /// Moves events that others wrote (triggers, an application's transaction) from the inbox into the log: gives them
    /// their seq in commit order and the deliveries that the matcher names, in one atomic step.
    ///
    /// Durable when it returns. Any instance may call it at any time, also at once: a row is moved by one of them. A row
    /// that cannot become an event does not hold up those behind it: [`inbox`] says what it becomes. Its id in the log
    /// already makes a row a duplicate, which is taken and gives no event. A store without an inbox has nothing to move.
    async fn route(&self, request: &RouteRequest<'_>) -> Result<Routed>;

    /// Leases ready deliveries of the wanted subscriptions, oldest first, at most `room` for each.
    ///
    /// Ready is what is pending and due, or processing with an expired lease. An expired lease is recorded as an
    /// attempt that ended [`Verdict::Lost`]; one more than [`INFRA_BUDGET`](crate::delivery::INFRA_BUDGET) of them makes the
    /// delivery a dead letter instead. With [`Ordering::Key`] a delivery is ready only when no earlier one of the same
    /// subscription and key is open. A claim that is lost in a crash only means another attempt, so it need not be as
    /// durable as the rest.
    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed>;

    /// Moves the end of each lease to `lease` from now. `false` for a lease that is no longer held.
    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>>;

    /// Applies each attempt's end: the move that `next` says, the attempt's record, and for a success the published
    /// events and key-value writes, atomically per settlement. Durable when it returns.
    ///
    /// Published events are idempotent by id, as in [`append`](Self::append). Must never apply anything of a
    /// settlement that it answers with [`Settled::Stale`] or [`Settled::Conflict`].
    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>>;

    /// The log after `after`, in seq order, at most `max` events. Erased events are passed over.
    async fn read(&self, after: Seq, max: usize) -> Result<LogPage>;

    /// An event with its deliveries and attempts.
    async fn get(&self, id: &str) -> Result<Option<EventDetail>>;

    /// Events that meet every condition of `filter`, newest (highest seq) first.
    async fn list(&self, filter: &EventFilter) -> Result<EventPage>;

    /// Dead letters that meet every condition of `filter`, newest first.
    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage>;

    /// Carries out an operator's change in one atomic step, and returns how many deliveries (for
    /// [`Amendment::Erase`]: events) it changed, or would change in a dry run.
    async fn amend(&self, amendment: Amendment) -> Result<u64>;

    /// Removes finished events, oldest first, until `retention` is met. Never removes an event with open deliveries,
    /// and never lowers a seq. Returns how many events went.
    async fn prune(&self, retention: &Retention) -> Result<u64>;

    /// Figures of the store as a whole.
    async fn stats(&self) -> Result<ProviderStats>;

    /// A hint that ticks when there may be something to claim or to read. Lossy: it carries no data, may tick for
    /// nothing and may miss. Whoever waits on it also polls, slowly.
    fn wake(&self) -> watch::Receiver<u64>;

    /// Ends all work, flushes what can be flushed and frees the store. Calls in progress and later ones answer
    /// [`Error::Stopped`](crate::Error::Stopped) or finish; none hangs. Closing twice is fine.
    async fn close(&self) -> Result<()>;
}

/// Named documents with compare-and-swap: subscriptions, plugin versions, cursors, key-value data.
///
/// A document lives in a collection under a key. Both are any text of up to 512 bytes; keys list in byte order.
#[async_trait]
pub trait Documents: Send + Sync + 'static {
    /// The document, unless there is none or it has expired.
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>>;

    /// Stores `value` if the document stands as `expect` says, and returns its new revision. With a `ttl` it expires.
    ///
    /// # Errors
    /// [`Error::Conflict`](crate::Error::Conflict) when it does not stand so; nothing is changed then.
    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64>;

    /// Removes the document if it stands as `expect` says. `false` when there was none.
    ///
    /// # Errors
    /// [`Error::Conflict`](crate::Error::Conflict) when it does not stand so; nothing is changed then.
    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool>;

    /// Up to `max` documents of a collection with keys after `after`, in the order of the keys.
    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>>;
}

/// A stored value and its revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The bytes.
    pub value: Bytes,
    /// Grows with every change of this document; never the same twice while it exists.
    pub revision: u64,
}

/// How a document must stand for a change to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// In any way.
    Any,
    /// Not there.
    Absent,
    /// There, with this revision.
    Revision(u64),
}

/// What a store is. Shown by `/v1/stats`; read by the broker and by the conformance suite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// The provider's name, such as `sqlite`.
    pub provider: &'static str,
    /// What an acknowledged write survives.
    pub durability: Durability,
    /// Whether writing many at once is much cheaper per piece: the broker then groups what callers do at the same time.
    pub grouping: bool,
    /// Whether several processes may share the store.
    pub shared: bool,
    /// Whether events, documents and deliveries change in one transaction.
    pub transactions: bool,
    /// Whether [`Ordering::Key`] is kept.
    pub key_ordering: bool,
    /// Whether `wake` is told of writes by other processes.
    pub push: bool,
    /// Whether others may leave events in the store, and how one learns of them.
    pub inbox: Inbox,
}

/// How one learns of what others left in a store's inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inbox {
    /// There is none.
    None,
    /// `wake` ticks after a write to it.
    Hinted,
    /// By looking: a look that finds nothing is cheap.
    Polled,
}

impl Capabilities {
    /// Whether the store is a part of this process, and gone with it.
    #[must_use]
    pub fn ends_with_process(&self) -> bool {
        self.durability == Durability::Process && !self.shared
    }
}

/// What an acknowledged write survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Nothing: it is gone with the process.
    Process,
    /// A crash of the process, and loss of power but for the last moments.
    Os,
    /// Loss of power: it is on stable storage.
    Storage,
}

/// An event to append, with the names of the subscriptions that get it.
#[derive(Debug, Clone)]
pub struct Append {
    /// The event; its `seq` is not looked at.
    pub event: Arc<Event>,
    /// The subscriptions, each once.
    pub subscriptions: Arc<[Arc<str>]>,
}

/// What became of an appended event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its place in the log; for a duplicate that of the first.
    pub seq: Seq,
    /// Whether the id was known: nothing was stored.
    pub duplicate: bool,
    /// The status of the event in the log.
    pub status: Status,
}

/// Names the subscriptions of a type.
pub type Matcher<'a> = dyn Fn(&EventType) -> Arc<[Arc<str>]> + Send + Sync + 'a;

/// What is moved out of the inbox, and what is filled in on the way.
pub struct RouteRequest<'a> {
    /// Names the subscriptions of a type.
    pub matcher: &'a Matcher<'a>,
    /// The most rows to take.
    pub max: usize,
    /// The largest payload of an event, in bytes.
    pub max_payload: u64,
}

/// What was moved out of the inbox.
#[derive(Debug, Clone, Default)]
pub struct Routed {
    /// The rows that were taken. When they are as many as were allowed, there may be more.
    pub taken: usize,
    /// What is new in the log.
    pub events: Vec<RoutedEvent>,
}

/// What is told of an event that was moved.
#[derive(Debug, Clone)]
pub struct RoutedEvent {
    /// Where it comes from.
    pub source: Source,
    /// What happened.
    pub event_type: EventType,
    /// The subscriptions that get it.
    pub subscriptions: Arc<[Arc<str>]>,
}

/// What a worker can take on now.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// The instance that asks.
    pub worker: Arc<str>,
    /// How long the leases last unless renewed.
    pub lease: Duration,
    /// The subscriptions, each once.
    pub wants: Vec<Want>,
}

/// How much of one subscription a worker can take on.
#[derive(Debug, Clone)]
pub struct Want {
    /// The subscription's name.
    pub subscription: Arc<str>,
    /// The most deliveries to lease.
    pub room: usize,
    /// Whether keys are ordered.
    pub ordering: Ordering,
}

/// What a claim gave.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The leases, oldest event first within a subscription.
    pub leases: Vec<Lease>,
    /// How long until the next delivery of a wanted subscription becomes due, or a lease on one expires; `None` when
    /// nothing is waiting for a time. At most as late as the truth: it may be early.
    pub next_due: Option<Duration>,
    /// The leases that this call took away because they had expired, each recorded as an attempt that was lost.
    pub lost: Vec<Lost>,
}

/// A lease that had expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The claim that no longer holds.
    pub key: LeaseKey,
    /// What became of its delivery: [`Next::Retry`], or [`Next::Fail`] when it was lost once too often.
    pub next: Next,
}

/// A worker's fenced, expiring claim on a delivery.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The event.
    pub event: Arc<Event>,
    /// Which delivery this is, and the token that proves the claim.
    pub key: LeaseKey,
    /// Which of the handler's attempts this is: 1 for the first. Lost attempts and host faults do not count, and a
    /// redrive or replay begins at 1 again.
    pub attempt: u32,
    /// The number that the attempt's record gets: counts every attempt of the delivery.
    pub number: u32,
    /// Lost leases and host faults since the delivery was created, redriven or replayed.
    pub infra_faults: u32,
    /// How long the event has been in the log, by the store's clock.
    pub age: Duration,
    /// Whether a replay asked for this delivery.
    pub is_replay: bool,
}

/// A delivery and the proof of a claim on it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LeaseKey {
    /// The event's place in the log.
    pub seq: Seq,
    /// The subscription's name.
    pub subscription: Arc<str>,
    /// Random, new for every claim.
    pub token: u64,
}

/// The end of one attempt.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The claim.
    pub key: LeaseKey,
    /// Where the delivery goes.
    pub next: Next,
    /// The attempt's record; `None` only with [`Next::Release`], after which it is as if the claim had never been.
    pub attempt: Option<Attempt>,
    /// Events to append with a success.
    pub published: Vec<Append>,
    /// Key-value writes to apply with a success, in order. `bucket` is the documents' collection.
    pub writes: Vec<KvWrite>,
}

/// What became of a settlement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// Applied.
    Done {
        /// How the event ended, if this settlement ended it: [`Status::Completed`] or [`Status::Failed`], by all of its
        /// deliveries. Of those that end an event's last deliveries, also within one batch, exactly one is told; `None`
        /// for the others, and while deliveries of the event are open.
        finished: Option<Status>,
    },
    /// The lease is no longer held: nothing changed.
    Stale,
    /// A write cannot be applied (an increment of what is no integer): nothing changed, and the lease is still held.
    Conflict {
        /// Which write, and why.
        reason: String,
    },
}

/// A stretch of the log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogPage {
    /// The events, in seq order.
    pub events: Vec<Arc<Event>>,
    /// Read on after this seq: every event up to it was returned, erased or pruned.
    pub next: Seq,
    /// The lowest seq from which on everything is kept: one more than the highest that was pruned, so 1 while nothing
    /// was and head + 1 when all was. A reader whose cursor is below `floor - 1` has missed something.
    pub floor: Seq,
    /// The highest seq given out; 0 in an empty log.
    pub head: Seq,
    /// Names this log; another value means that the log was made anew and older cursors mean nothing.
    pub epoch: Arc<str>,
}

/// Which events to list. Conditions are joined by "and"; an empty filter lists all.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Types that this pattern matches.
    pub pattern: Option<Pattern>,
    /// From this source.
    pub source: Option<Source>,
    /// In this status.
    pub status: Option<Status>,
    /// Of this user.
    pub user_id: Option<UserId>,
    /// With this schema.
    pub schema: Option<String>,
    /// With this entity.
    pub entity: Option<String>,
    /// With this operation.
    pub operation: Option<String>,
    /// Published by this instance.
    pub instance_id: Option<String>,
    /// Created at this instant or later.
    pub from: Option<Timestamp>,
    /// Created at this instant or earlier.
    pub to: Option<Timestamp>,
    /// Only events with a smaller seq: the cursor.
    pub before: Option<Seq>,
    /// The most events of a page; 0 for no bound.
    pub limit: usize,
}

/// One page of events.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EventPage {
    /// Newest first.
    pub records: Vec<EventRecord>,
    /// What to pass as [`EventFilter::before`] for the next page; `None` on the last.
    pub next: Option<Seq>,
}

/// Which dead letters are meant. Conditions are joined by "and".
#[derive(Debug, Clone, Default)]
pub struct DeadLetterFilter {
    /// Of this subscription.
    pub subscription: Option<String>,
    /// Of this event.
    pub event_id: Option<String>,
    /// Of types that this pattern matches.
    pub pattern: Option<Pattern>,
    /// Whose last attempt ended so.
    pub verdict: Option<Verdict>,
    /// Whose last attempt ran this plugin version.
    pub digest: Option<String>,
    /// That became dead at this instant or later.
    pub since: Option<Timestamp>,
    /// Only letters after this one in the order of listing: the cursor.
    pub after: Option<(Seq, String)>,
    /// The most letters of a page, or to redrive at once; 0 for no bound.
    pub limit: usize,
}

/// A dead letter: the event, and the delivery that failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeadLetter {
    /// The event.
    pub event: EventRecord,
    /// The failed delivery, with its attempts.
    pub delivery: Delivery,
}

/// One page of dead letters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeadLetterPage {
    /// By descending seq, then by subscription name.
    pub letters: Vec<DeadLetter>,
    /// What to pass as [`DeadLetterFilter::after`] for the next page; `None` on the last.
    pub next: Option<(Seq, String)>,
}

/// An operator's change to what is stored.
#[derive(Debug, Clone)]
pub enum Amendment {
    /// Failed deliveries become pending, with a fresh retry budget.
    Redrive(DeadLetterFilter),
    /// A stretch of the log is delivered to a subscription: again where it was delivered, for the first time where it
    /// was not. Deliveries that are open already stay as they are.
    Replay(Replay),
    /// The open deliveries of a subscription are removed; leases on them become stale.
    Cancel {
        /// The subscription's name.
        subscription: Arc<str>,
    },
    /// An event's content and its deliveries are removed for good; leases on them become stale. Its seq stays used and
    /// its id stays known as a duplicate.
    Erase {
        /// The event's id.
        id: String,
    },
}

/// Which stretch of the log is delivered to whom.
#[derive(Debug, Clone)]
pub struct Replay {
    /// The subscription's name.
    pub subscription: Arc<str>,
    /// Only types that this matches.
    pub pattern: Pattern,
    /// From this seq (included).
    pub from_seq: Option<Seq>,
    /// To this seq (included).
    pub to_seq: Option<Seq>,
    /// Created at this instant or later.
    pub from: Option<Timestamp>,
    /// Created at this instant or earlier.
    pub to: Option<Timestamp>,
    /// Only events that the subscription never got; such deliveries do not count as replays. This is how a new
    /// subscription starts in the past.
    pub missing_only: bool,
    /// Count only.
    pub dry_run: bool,
}

/// How much of the finished past is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// Finished events that were created longer ago go.
    pub max_age: Option<Duration>,
    /// While there are more events than this, the oldest finished ones go.
    pub max_events: Option<u64>,
}

/// Figures of a store, under the names of the contract.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ProviderStats {
    /// The provider's name.
    pub provider_type: &'static str,
    /// Events kept.
    pub total_events: u64,
    /// Of these, pending.
    pub pending_events: u64,
    /// Of these, processing.
    pub processing_events: u64,
    /// Of these, completed.
    pub completed_events: u64,
    /// Of these, failed.
    pub failed_events: u64,
    /// Deliveries that are pending.
    pub pending_deliveries: u64,
    /// Deliveries that are leased.
    pub processing_deliveries: u64,
    /// Deliveries that are dead.
    pub dead_letters: u64,
    /// The highest seq given out.
    pub head_seq: Seq,
    /// The lowest seq from which on everything is kept.
    pub floor_seq: Seq,
    /// Figures that only this kind of store has.
    pub provider_specific: serde_json::Map<String, serde_json::Value>,
}
