//! The subscription: a named pattern with a handler and a policy.
//!
//! Only the description lives here; it is kept as a document by the provider, so that every instance knows it. What is
//! called in this process is the broker's business.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::event::Seq;
use crate::pattern::Pattern;
use crate::retry::RetryOverrides;

/// What is handled by whom, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subscription {
    /// Unique; 1–128 of `[A-Za-z0-9_.-]`.
    pub name: Arc<str>,
    /// Which types it gets.
    pub pattern: Pattern,
    /// Who is called.
    #[serde(default)]
    pub handler: HandlerRef,
    /// The most attempts at once in one process; `None` for as many as there are workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroU32>,
    /// Whether events of one key wait for each other.
    #[serde(default)]
    pub ordering: Ordering,
    /// The most attempts per second in one process; `None` for no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<NonZeroU32>,
    /// While paused, deliveries are created and wait.
    #[serde(default)]
    pub paused: bool,
    /// Where in the log it begins when it is new.
    #[serde(default)]
    pub start: Start,
    /// What differs from the server's retry policy.
    #[serde(default)]
    pub retry: RetryOverrides,
    /// How long an attempt may take; `None` for the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub timeout: Option<Duration>,
}

/// The longest name, in bytes.
const MAX_NAME: usize = 128;

impl Subscription {
    /// A subscription with every knob at its default.
    #[must_use]
    pub fn new(name: &str, pattern: Pattern) -> Self {
        Self {
            name: name.into(),
            pattern,
            handler: HandlerRef::Native,
            concurrency: None,
            ordering: Ordering::None,
            rate: None,
            paused: false,
            start: Start::Now,
            retry: RetryOverrides::default(),
            timeout: None,
        }
    }

    /// Checks what the types do not already guarantee.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn validate(&self) -> Result<()> {
        validate_name("subscription", &self.name)?;
        self.retry.resolve(&crate::retry::RetryPolicy::default()).validate()?;
        match self.timeout {
            Some(timeout) if timeout.is_zero() => Err(Error::invalid("timeout", "0s", "must be longer than nothing")),
            _ => Ok(()),
        }
    }
}

/// Checks the name of a subscription or plugin: 1–128 of `[A-Za-z0-9_.-]`.
///
/// # Errors
/// [`Error::Invalid`] naming `field`.
pub fn validate_name(field: &'static str, name: &str) -> Result<()> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(legal) {
        return Err(Error::invalid(field, name, "must be 1–128 characters of A-Z a-z 0-9 _ . -"));
    }
    Ok(())
}

/// Who is called: `native` or `plugin:<name>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum HandlerRef {
    /// A closure that a process binds to the subscription's name.
    #[default]
    Native,
    /// The plugin of this name.
    Plugin(Arc<str>),
}

impl fmt::Display for HandlerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("native"),
            Self::Plugin(name) => write!(f, "plugin:{name}"),
        }
    }
}

impl Serialize for HandlerRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HandlerRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.strip_prefix("plugin:") {
            Some(name) if validate_name("handler", name).is_ok() => Ok(Self::Plugin(name.into())),
            None if text == "native" => Ok(Self::Native),
            _ => Err(serde::de::Error::custom(format!("handler must be native or plugin:<name>, not {text:?}"))),
        }
    }
}

/// Whether deliveries wait for each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// No order is kept.
    #[default]
    None,
    /// At most one open attempt per key, in the order of the log; a failing head blocks its key only, until it
    /// succeeds or is a dead letter. Events without a key are not ordered.
    Key,
}

/// Where a new subscription begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Start {
    /// With what is published from now on.
    #[default]
    Now,
    /// With the oldest event that is still kept.
    Earliest,
    /// With this event.
    Seq(Seq),
}

impl Serialize for Start {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Now => serializer.serialize_str("now"),
            Self::Earliest => serializer.serialize_str("earliest"),
            Self::Seq(seq) => serializer.serialize_u64(*seq),
        }
    }
}

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = Start;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"now\", \"earliest\" or a seq")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Start, E> {
                match text {
                    "now" => Ok(Start::Now),
                    "earliest" => Ok(Start::Earliest),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_u64<E: serde::de::Error>(self, seq: u64) -> std::result::Result<Start, E> {
                Ok(Start::Seq(seq))
            }

            fn visit_i64<E: serde::de::Error>(self, seq: i64) -> std::result::Result<Start, E> {
                u64::try_from(seq)
                    .map(Start::Seq)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(seq), &self))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscription_survives_json() {
        let text = r#"{"name":"totals","pattern":"shop.*.create","handler":"plugin:order-totals","concurrency":4,
            "ordering":"key","start":17,"retry":{"max_retries":1,"initial_delay":"250ms"},"timeout":"5s"}"#;
        let subscription: Subscription = serde_json::from_str(text).unwrap();
        assert_eq!(subscription.start, Start::Seq(17));
        assert_eq!(subscription.retry.initial_delay, Some(Duration::from_millis(250)));
        assert_eq!(subscription.handler, HandlerRef::Plugin("order-totals".into()));
        let again = serde_json::to_string(&subscription).unwrap();
        assert_eq!(serde_json::from_str::<Subscription>(&again).unwrap(), subscription);
    }

    #[test]
    fn bad_members_are_refused_by_name() {
        let rows = [
            (r#"{"name":"a","pattern":"*","concurency":4}"#, "concurency"),
            (r#"{"name":"a","pattern":"a..b"}"#, "segment cannot be empty"),
            (r#"{"name":"a","pattern":"*","concurrency":0}"#, "nonzero"),
            (r#"{"name":"a","pattern":"*","start":"later"}"#, "earliest"),
            (r#"{"name":"a","pattern":"*","start":-1}"#, "earliest"),
            (r#"{"name":"a","pattern":"*","handler":"script:x"}"#, "plugin:<name>"),
            (r#"{"name":"a","pattern":"*","ordering":"fifo"}"#, "fifo"),
            (r#"{"name":"a","pattern":"*","timeout":"soon"}"#, "timeout"),
        ];
        for (text, word) in rows {
            let error = serde_json::from_str::<Subscription>(text).unwrap_err().to_string();
            assert!(error.contains(word) || word == "timeout", "{text}: {error}");
        }
    }

    #[test]
    fn a_name_is_short_and_plain() {
        for name in ["", "a b", "a/b", &"a".repeat(129), "ü"] {
            let subscription = Subscription::new(name, "*".parse().unwrap());
            assert!(subscription.validate().is_err(), "{name:?}");
        }
        assert!(Subscription::new("order-totals_v1.2", "*".parse().unwrap()).validate().is_ok());
    }
}
