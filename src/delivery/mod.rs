//! What becomes of an event: its deliveries, their attempts, and the legal moves between statuses.
//!
//! Everything here is data and pure decisions. Which delay a retry gets is decided by [`retry`](crate::retry), and what
//! is durable when is the [`provider`](crate::provider)'s promise. What one attempt came to is in `attempt`, and how all
//! of it looks in JSON in `json`.

mod attempt;
mod json;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::attempt::{Attempt, Fault, KvChange, KvWrite, LogLine, Reply, Seen, Trace, Verdict};
use crate::error::{Error, Result};
use crate::event::Event;

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

/// An event with all that became of it: the members of [`EventRecord`], then `deliveries`.
#[derive(Debug, Clone, PartialEq)]
pub struct EventDetail {
    /// The event and its derived status.
    pub record: EventRecord,
    /// In the order of the subscriptions' names.
    pub deliveries: Vec<Delivery>,
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
        for status in Status::ALL {
            assert_eq!(Status::parse(status.as_str()).unwrap(), status);
        }
    }
}
