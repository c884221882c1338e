//! What can be said of a store's health: findings, each with what to do.
//!
//! A trait of its own beside the port: the broker never asks for it, and a store is a provider without it. What is found
//! is told as it stands; nothing is mended here.

use std::borrow::Cow;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;

use super::Provider;
use crate::error::{Error, Result};

/// A store that can look at itself.
#[async_trait]
pub trait Examine: Provider {
    /// What there is to say of the store, in no particular order. Changes nothing. May take some seconds.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store) when the store does not answer.
    async fn examine(&self) -> Result<Vec<Finding>>;
}

/// Whether opening a store may change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opening {
    /// Makes the schema where there is none, and brings an older one up to date.
    Migrate,
    /// Leaves all as it is, for a look. What [`Migrate`](Self::Migrate) would do is told by [`pending`].
    AsItIs,
}

/// What [`Error::Conflict`] names where a schema is not as this binary needs it.
pub(crate) const SCHEMA: &str = "schema";

/// Says what a schema lacks that was not to be changed.
pub(super) fn pending(place: impl Into<String>, reason: impl Into<Cow<'static, str>>) -> Error {
    Error::conflict(SCHEMA, place, reason)
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know; there is nothing to do.
    Ok,
    /// It works, and will be slow, late or full unless something is done.
    Warning,
    /// Events are refused, stuck or at risk.
    Problem,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Names the kind of finding; stays the same over versions.
    pub code: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// Why it matters, and what to do. Empty where there is nothing to do.
    pub advice: String,
}

impl Finding {
    /// Something that is as it should be.
    #[must_use]
    pub fn ok(code: &'static str, what: impl Into<String>) -> Self {
        Self { code, severity: Severity::Ok, what: what.into(), advice: String::new() }
    }

    /// Something to see to.
    #[must_use]
    pub fn warning(code: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { code, severity: Severity::Warning, what: what.into(), advice: advice.into() }
    }

    /// Something to see to at once.
    #[must_use]
    pub fn problem(code: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { code, severity: Severity::Problem, what: what.into(), advice: advice.into() }
    }

    /// Compares a server's clock with this machine's, which stood between `before` and `after` when the server read its
    /// own: all are microseconds since the Unix epoch.
    #[must_use]
    pub(super) fn of_clocks(server: i64, before: i64, after: i64) -> Self {
        let ahead = server.saturating_sub(after);
        let behind = before.saturating_sub(server);
        let (apart, word) = if ahead >= behind { (ahead, "ahead of") } else { (behind, "behind") };
        if apart <= SKEW {
            return Self::ok("clock", "the server's clock and this machine's agree");
        }
        Self::warning(
            "clock-skew",
            format!("the server's clock is {} {word} this machine's", seconds(apart / 1_000_000)),
            "Due times and leases follow the server's clock, but events are stamped by the machine that publishes them, so \
             ages, retention and the end of retries are off by as much: have both follow the same time service (NTP).",
        )
    }
}

/// How far clocks may be apart, in microseconds.
const SKEW: i64 = 1_000_000;

/// A span in words.
pub(super) fn seconds(seconds: i64) -> String {
    match seconds {
        ..180 => format!("{seconds} s"),
        180..10_800 => format!("{} min", seconds / 60),
        10_800..259_200 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A size in words.
pub(super) fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).to_string()
}

/// Whole seconds, for those who compare with a server's.
pub(super) fn whole(span: Duration) -> i64 {
    i64::try_from(span.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_are_apart_are_told_whichever_goes_ahead() {
        let second = 1_000_000;
        let rows = [
            (100 * second, 100 * second, 101 * second, "clock", "agree"),
            (102 * second, 100 * second, 101 * second, "clock", "agree"),
            (110 * second, 100 * second, 101 * second, "clock-skew", "9 s ahead of"),
            (10 * second, 100 * second, 101 * second, "clock-skew", "90 s behind"),
            (i64::MIN, 0, 0, "clock-skew", "behind"),
        ];
        for (server, before, after, code, words) in rows {
            let finding = Finding::of_clocks(server, before, after);
            assert!(finding.code == code && finding.what.contains(words), "{finding:?}");
            assert_eq!(finding.severity > Severity::Ok, !finding.advice.is_empty());
        }
    }

    #[test]
    fn spans_are_told_in_fitting_units() {
        assert_eq!([0, 179, 180, 10_800, 259_200].map(seconds), ["0 s", "179 s", "3 min", "3 h", "3 days"]);
    }
}
