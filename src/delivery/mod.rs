//! What becomes of an event: its deliveries, their attempts, and the legal moves between statuses.
//!
//! Everything here is data and pure decisions. Which delay a retry gets is decided by [`retry`](crate::retry), and what
//! is durable when is the [`provider`](crate::provider)'s promise.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use jiff::Timestamp;
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::event::{Event, JSON};

/// Where a delivery, or an event as a whole, stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Waiting for its first attempt or its next one.
    Pending,
    /// Leased to a worker.
    Processing,
    /// Done.
    Completed,
    /// A dead letter.
    Failed,
}

/// What may happen to a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// A worker leases it.
    Claim,
    /// Its attempt succeeded.
    Complete,
    /// Its attempt failed and another one is allowed.
    Retry,
    /// Its lease expired.
    Lose,
    /// Its worker gives it back unpunished.
    Release,
    /// Its attempt failed for good.
    Fail,
    /// An operator gives a dead letter new attempts.
    Redrive,
    /// An operator has it delivered once more, whatever came of it.
    Replay,
}

impl Status {
    /// All statuses, in the order of an event's life.
    pub const ALL: [Self; 4] = [Self::Pending, Self::Processing, Self::Completed, Self::Failed];

    /// The name in JSON and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// Parses a name.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `status` and listing the names.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| Error::invalid("status", text, "must be one of pending, processing, completed, failed"))
    }

    /// Whether nothing more happens by itself.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }

    /// Where `step` leads from here, or `None` where it is not a legal move. The one place that knows.
    #[must_use]
    pub fn after(self, step: Move) -> Option<Self> {
        match (self, step) {
            (Self::Pending, Move::Claim) => Some(Self::Processing),
            (Self::Processing, Move::Complete) => Some(Self::Completed),
            (Self::Processing, Move::Fail) => Some(Self::Failed),
            (Self::Processing, Move::Retry | Move::Lose | Move::Release) => Some(Self::Pending),
            (Self::Failed, Move::Redrive) | (Self::Completed | Self::Failed, Move::Replay) => Some(Self::Pending),
            _ => None,
        }
    }

    /// The status of an event whose deliveries have these. `started` says whether any attempt was ever begun.
    ///
    /// An event that nothing matched is `completed`.
    #[must_use]
    pub fn of_event(deliveries: impl IntoIterator<Item = Self>, started: bool) -> Self {
        let (mut open, mut failed, mut begun) = (false, false, started);
        for status in deliveries {
            open |= !status.is_terminal();
            failed |= status == Self::Failed;
            begun |= status != Self::Pending;
        }
        match (open, begun, failed) {
            (true, false, _) => Self::Pending,
            (true, true, _) => Self::Processing,
            (false, _, true) => Self::Failed,
            (false, _, false) => Self::Completed,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The handler succeeded.
    Ok,
    /// The handler asks for another attempt.
    Retry,
    /// The handler refuses the event for good.
    Reject,
    /// The guest trapped, or the native handler panicked.
    Trap,
    /// The attempt took longer than allowed.
    Timeout,
    /// The attempt used up its instructions, or its calls of the host.
    OutOfFuel,
    /// The attempt asked for more memory than allowed.
    OutOfMemory,
    /// The handler did what it was not granted, or made too long a chain of events.
    Denied,
    /// The host could not run the handler, or could not apply what it wrote.
    HostFault,
    /// The lease expired: the worker is gone or stuck.
    Lost,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 10] = [
        Self::Ok,
        Self::Retry,
        Self::Reject,
        Self::Trap,
        Self::Timeout,
        Self::OutOfFuel,
        Self::OutOfMemory,
        Self::Denied,
        Self::HostFault,
        Self::Lost,
    ];

    /// Whether the handler is not to blame: such an attempt counts against [`INFRA_BUDGET`], not against the policy.
    #[must_use]
    pub fn is_infra(self) -> bool {
        matches!(self, Self::HostFault | Self::Lost)
    }

    /// The name in JSON and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Retry => "retry",
            Self::Reject => "reject",
            Self::Trap => "trap",
            Self::Timeout => "timeout",
            Self::OutOfFuel => "out-of-fuel",
            Self::OutOfMemory => "out-of-memory",
            Self::Denied => "denied",
            Self::HostFault => "host-fault",
            Self::Lost => "lost",
        }
    }

    /// Parses a name.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `verdict` and listing the names.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.as_str() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            Error::invalid("verdict", text, format!("must be one of {names}"))
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How many lost leases and host faults a delivery survives; one more makes it a dead letter.
pub const INFRA_BUDGET: u32 = 3;

/// What an attempt's verdict means for its delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Done.
    Complete,
    /// Pending again, due `after` from now by the store's clock.
    Retry {
        /// How long to wait.
        after: Duration,
    },
    /// A dead letter.
    Fail,
    /// Pending again at once, as if it had never been claimed: no attempt is recorded.
    Release,
}

/// What a handler says about a refusal: an open code, words for people, and pairs for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// An open, stable string such as `upstream-timeout`.
    pub code: String,
    /// Words for people.
    pub message: String,
    /// Anything a program may want to know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<(String, String)>,
}

impl Fault {
    /// A fault without details.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), details: Vec::new() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code.as_str() {
            "" => f.write_str(&self.message),
            code => write!(f, "{code}: {}", self.message),
        }
    }
}

/// What a handler answers to a publisher that waits. JSON bodies travel as JSON, others as base64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The content type.
    pub content_type: String,
    /// The bytes.
    pub body: Bytes,
}

impl Reply {
    /// `value` as a JSON reply.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `reply` when `value` has no JSON form.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        let body = serde_json::to_vec(value)
            .map_err(|error| Error::invalid("reply", "", format!("has no JSON form: {error}")))?;
        Ok(Self { content_type: JSON.into(), body: body.into() })
    }
}

#[derive(Serialize, Deserialize)]
struct ReplyJson {
    content_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
}

impl Serialize for Reply {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let text = (self.content_type == JSON).then(|| String::from_utf8(self.body.to_vec()).ok()).flatten();
        // A guest may call anything JSON: what is not travels as base64, so that the answer around it stays readable.
        let body = text.and_then(|text| RawValue::from_string(text).ok());
        let body_base64 = body.is_none().then(|| BASE64.encode(&self.body));
        ReplyJson { content_type: self.content_type.clone(), body, body_base64 }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Reply {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let json = ReplyJson::deserialize(deserializer)?;
        let body = match (json.body, json.body_base64) {
            (Some(raw), _) => Bytes::copy_from_slice(raw.get().as_bytes()),
            (None, Some(text)) => BASE64.decode(text).map_err(serde::de::Error::custom)?.into(),
            (None, None) => Bytes::new(),
        };
        Ok(Self { content_type: json.content_type, body })
    }
}

/// What the host saw of an attempt, beyond its verdict. All empty for a native handler, and then it takes no memory. Shared by
/// the records of which it is true: most attempts of a plugin look the same, and many records are kept.
#[derive(Debug, Clone, Default)]
pub struct Trace(Option<Arc<Seen>>);

impl Trace {
    /// The parts of one in which nothing was seen.
    const EMPTY: &Seen = &Seen { digest: None, fuel: None, peak_memory: None, log: Vec::new(), backtrace: Vec::new() };
}

impl From<Seen> for Trace {
    fn from(seen: Seen) -> Self {
        Self((seen != *Self::EMPTY).then(|| Arc::new(seen)))
    }
}

impl Deref for Trace {
    type Target = Seen;

    fn deref(&self) -> &Seen {
        self.0.as_deref().unwrap_or(Self::EMPTY)
    }
}

impl DerefMut for Trace {
    fn deref_mut(&mut self) -> &mut Seen {
        Arc::make_mut(self.0.get_or_insert_default())
    }
}

impl PartialEq for Trace {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Serialize for Trace {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        Seen::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Trace {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Seen::deserialize(deserializer).map(Self::from)
    }
}

/// The parts of a [`Trace`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Digest of the plugin version that ran, as `sha256:<hex>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Arc<str>>,
    /// Fuel used, in wasmtime's units (about one per instruction).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
    /// The most linear memory held at once, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The last log lines, capped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<LogLine>,
    /// Guest frames of a trap, innermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backtrace: Vec<String>,
}

/// One line that a handler logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// 0 trace, 1 debug, 2 info, 3 warn, 4 error.
    pub level: u8,
    /// The text.
    pub message: String,
    /// Structured fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<(String, String)>,
}

/// The record of one call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// 1 for the delivery's first call ever; goes on counting after a redrive.
    pub number: u32,
    /// How it ended.
    pub verdict: Verdict,
    /// When the call began.
    pub started_at: Timestamp,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// The instance that made the call.
    pub worker: Arc<str>,
    /// Why it did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Box<Fault>>,
    /// What the handler answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<Box<Reply>>,
    /// What the host saw.
    #[serde(flatten)]
    pub trace: Trace,
}

/// One change to key-value data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvWrite {
    /// The bucket, with its owner: the collection of documents that it is.
    pub bucket: String,
    /// The key.
    pub key: String,
    /// What is done to it.
    pub change: KvChange,
}

/// What a [`KvWrite`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvChange {
    /// Stores a value, for `ttl` where given.
    Set {
        /// The value.
        value: Bytes,
        /// How long it lives, by the store's clock.
        ttl: Option<Duration>,
    },
    /// Removes the value; fine when there is none.
    Delete,
    /// Adds to a decimal integer, 0 when there is none: added to what is stored at commit, so that two attempts at
    /// once lose nothing.
    Increment {
        /// What is added.
        by: i64,
    },
}

/// One event owed to one subscription.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Delivery {
    /// The subscription's name.
    pub subscription: Arc<str>,
    /// Where it stands.
    pub status: Status,
    /// How often it was put back for another attempt.
    pub retry_count: u32,
    /// The verdict of the last attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The error of the last attempt, or of the retry budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Arc<str>>,
    /// When it may be claimed, while it is pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Timestamp>,
    /// When it was first claimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it became completed or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Timestamp>,
    /// Whether it was asked for by a replay.
    pub replay: bool,
    /// Every call, oldest first.
    pub attempts: Vec<Attempt>,
}

/// An event and how its handling stands, as lists show it.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRecord {
    /// The fact.
    pub event: Arc<Event>,
    /// Derived from the deliveries by [`Status::of_event`].
    pub status: Status,
    /// The sum over the deliveries.
    pub retry_count: u32,
    /// The error of a failed delivery.
    pub error: Option<Arc<str>>,
    /// When the first attempt began.
    pub processed_at: Option<Timestamp>,
    /// When the last delivery became terminal; when the event was sequenced, for one that nothing matched.
    pub completed_at: Option<Timestamp>,
}

impl EventRecord {
    /// The record that follows from an event's deliveries.
    #[must_use]
    pub fn derive(event: Arc<Event>, deliveries: &[Delivery]) -> Self {
        let started = deliveries.iter().any(|delivery| delivery.started_at.is_some());
        let status = Status::of_event(deliveries.iter().map(|delivery| delivery.status), started);
        let failed = deliveries.iter().find(|delivery| delivery.status == Status::Failed);
        let last_end = deliveries.iter().filter_map(|delivery| delivery.completed_at).max();
        // The event carries its publisher's clock and the deliveries the store's: where they disagree, order wins.
        let first_start = deliveries.iter().filter_map(|delivery| delivery.started_at).min();
        let processed_at = first_start.map(|start| start.max(event.created_at));
        Self {
            status,
            retry_count: deliveries.iter().map(|delivery| delivery.retry_count).sum(),
            error: failed.and_then(|delivery| delivery.error.clone()),
            processed_at,
            completed_at: status.is_terminal().then(|| last_end.max(processed_at).unwrap_or(event.created_at)),
            event,
        }
    }
}

impl Serialize for EventRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(&self.event, Some(self), &mut map)?;
        map.end()
    }
}

/// The fact alone, as feeds show it: what becomes of it is told by [`EventRecord`]. An event without a place in the log
/// says that it is ephemeral.
impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(self, None, &mut map)?;
        if self.seq.is_none() {
            map.serialize_entry("ephemeral", &true)?;
        }
        map.end()
    }
}

/// The JSON members in the order of the contract, with how the event's handling stands where that is told.
fn members<M: serde::ser::SerializeMap>(
    event: &Event,
    standing: Option<&EventRecord>,
    map: &mut M,
) -> std::result::Result<(), M::Error> {
    map.serialize_entry("id", &event.id)?;
    optional(map, "seq", event.seq.as_ref())?;
    map.serialize_entry("source", &event.source)?;
    map.serialize_entry("type", &event.event_type)?;
    if let Some(record) = standing {
        map.serialize_entry("status", &record.status)?;
        map.serialize_entry("retry_count", &record.retry_count)?;
        optional(map, "error", record.error.as_ref())?;
    }
    if event.payload.is_json() {
        let raw: &RawValue = serde_json::from_slice(event.payload.bytes()).map_err(serde::ser::Error::custom)?;
        map.serialize_entry("payload", raw)?;
    } else {
        map.serialize_entry("payload_base64", &BASE64.encode(event.payload.bytes()))?;
    }
    map.serialize_entry("content_type", event.payload.content_type())?;
    optional(map, "user_id", event.user_id.as_ref())?;
    optional(map, "session_id", event.session_id.as_ref())?;
    map.serialize_entry("instance_id", &event.instance_id)?;
    optional(map, "schema", event.schema.as_ref())?;
    optional(map, "entity", event.entity.as_ref())?;
    optional(map, "operation", event.operation.as_ref())?;
    optional(map, "key", event.key.as_ref())?;
    map.serialize_entry("created_at", &event.created_at)?;
    if let Some(record) = standing {
        optional(map, "processed_at", record.processed_at.as_ref())?;
        optional(map, "completed_at", record.completed_at.as_ref())?;
    }
    map.serialize_entry("metadata", &event.metadata)?;
    optional(map, "trace_parent", event.trace_parent.as_ref())?;
    optional(map, "caused_by", event.caused_by.as_ref())
}

fn optional<M: serde::ser::SerializeMap, T: Serialize + ?Sized>(
    map: &mut M,
    name: &'static str,
    value: Option<&T>,
) -> std::result::Result<(), M::Error> {
    value.map_or(Ok(()), |value| map.serialize_entry(name, value))
}

/// An event with all that became of it: the members of [`EventRecord`], then `deliveries`.
#[derive(Debug, Clone, PartialEq)]
pub struct EventDetail {
    /// The event and its derived status.
    pub record: EventRecord,
    /// In the order of the subscriptions' names.
    pub deliveries: Vec<Delivery>,
}

impl Serialize for EventDetail {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        members(&self.record.event, Some(&self.record), &mut map)?;
        map.serialize_entry("deliveries", &self.deliveries)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DESIGN §3: everything that is not listed there is refused.
    #[test]
    fn only_the_documented_moves_are_legal() {
        use Status::{Completed, Failed, Pending, Processing};
        let legal = [
            (Pending, Move::Claim, Processing),
            (Processing, Move::Complete, Completed),
            (Processing, Move::Retry, Pending),
            (Processing, Move::Lose, Pending),
            (Processing, Move::Release, Pending),
            (Processing, Move::Fail, Failed),
            (Failed, Move::Redrive, Pending),
            (Failed, Move::Replay, Pending),
            (Completed, Move::Replay, Pending),
        ];
        let moves = [
            Move::Claim,
            Move::Complete,
            Move::Retry,
            Move::Lose,
            Move::Release,
            Move::Fail,
            Move::Redrive,
            Move::Replay,
        ];
        for status in Status::ALL {
            for step in moves {
                let expected = legal.iter().find(|row| row.0 == status && row.1 == step).map(|row| row.2);
                assert_eq!(status.after(step), expected, "{status} {step:?}");
            }
        }
    }

    #[test]
    fn the_status_of_an_event_follows_from_its_deliveries() {
        use Status::{Completed, Failed, Pending, Processing};
        let rows: [(&[Status], bool, Status); 9] = [
            (&[], false, Completed),
            (&[Pending], false, Pending),
            (&[Pending, Pending], false, Pending),
            (&[Pending], true, Processing),
            (&[Processing, Pending], true, Processing),
            (&[Completed, Pending], true, Processing),
            (&[Failed, Processing], true, Processing),
            (&[Completed, Completed], true, Completed),
            (&[Completed, Failed], true, Failed),
        ];
        for (deliveries, started, expected) in rows {
            assert_eq!(Status::of_event(deliveries.iter().copied(), started), expected, "{deliveries:?}");
        }
    }

    #[test]
    fn names_parse_back_to_what_they_name() {
        for verdict in Verdict::ALL {
            assert_eq!(Verdict::parse(verdict.as_str()).unwrap(), verdict);
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
        }
        for status in Status::ALL {
            assert_eq!(Status::parse(status.as_str()).unwrap(), status);
        }
        assert!(Verdict::parse("nope").unwrap_err().to_string().contains("out-of-fuel"));
    }

    #[test]
    fn a_reply_survives_json_whatever_it_holds() {
        let replies = [
            Reply { content_type: JSON.into(), body: "{\"a\": 1}".into() },
            Reply { content_type: JSON.into(), body: "not json".into() },
            Reply { content_type: "image/png".into(), body: Bytes::from_static(&[0, 159, 146, 150]) },
            Reply { content_type: "text/plain".into(), body: Bytes::new() },
        ];
        for reply in replies {
            let text = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply, "{text}");
        }
    }
}
