//! What one attempt came to: its verdict, what the handler said, what the host saw, and what it changes.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::event::JSON;

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

    /// Whether the handler is not to blame: such an attempt counts against [`INFRA_BUDGET`](super::INFRA_BUDGET), not
    /// against the policy.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_to_what_they_name() {
        for verdict in Verdict::ALL {
            assert_eq!(Verdict::parse(verdict.as_str()).unwrap(), verdict);
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
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
