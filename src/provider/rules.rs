//! Decisions that every store takes alike: what a filter means, what an increment gives, what a lost lease leads to.
//!
//! Pure: no clock, no store. A provider that can say the same in its own query language does so, and is held to these
//! by the conformance suite.

use std::sync::Arc;

use jiff::Timestamp;

use super::{DeadLetterFilter, EventFilter, Expect, Replay};
use crate::delivery::{Attempt, Delivery, EventRecord, Fault, INFRA_BUDGET, Next, Status, Trace, Verdict};
use crate::error::{Error, Result};
use crate::event::{Event, EventType, Seq};
use std::time::Duration;

/// The longest name of a collection or key of a document, in bytes.
pub const MAX_DOCUMENT_NAME: usize = 512;

/// Checks the names of a document.
///
/// # Errors
/// [`Error::Invalid`] naming `collection` or `key`.
pub fn check_document_name(collection: &str, key: &str) -> Result<()> {
    for (field, name) in [("collection", collection), ("key", key)] {
        if name.len() > MAX_DOCUMENT_NAME {
            return Err(Error::invalid(field, name, "must be at most 512 bytes"));
        }
    }
    Ok(())
}

impl Expect {
    /// Whether a document that stands at `revision` (`None` when there is none) stands as expected.
    #[must_use]
    pub fn holds(self, revision: Option<u64>) -> bool {
        match self {
            Self::Any => true,
            Self::Absent => revision.is_none(),
            Self::Revision(expected) => revision == Some(expected),
        }
    }

    /// The conflict of a document that stands at `revision` instead.
    #[must_use]
    pub fn conflict(self, collection: &str, key: &str, revision: Option<u64>) -> Error {
        let stands =
            revision.map_or_else(|| "is not there".to_owned(), |revision| format!("is at revision {revision}"));
        let wanted = match self {
            Self::Any => "in any way".to_owned(),
            Self::Absent => "to be absent".to_owned(),
            Self::Revision(expected) => format!("at revision {expected}"),
        };
        Error::conflict(
            "document",
            format!("{collection}/{key}"),
            format!("{stands}, expected {wanted}: read it again"),
        )
    }
}

/// What an increment of `stored` by `by` gives.
///
/// # Errors
/// Words on why not: `stored` is no decimal integer, or the sum does not fit in 64 bits.
pub fn incremented(stored: Option<&[u8]>, by: i64) -> std::result::Result<i64, String> {
    let Some(stored) = stored else { return Ok(by) };
    let number = std::str::from_utf8(stored).ok().and_then(|text| text.parse::<i64>().ok());
    let number = number.ok_or_else(|| "the stored value is not a decimal integer of 64 bits".to_owned())?;
    number.checked_add(by).ok_or_else(|| format!("{number} + {by} does not fit in 64 bits"))
}

/// The record of a call whose lease expired.
#[must_use]
pub fn lost_attempt(number: u32, worker: Arc<str>, claimed_at: Timestamp, now: Timestamp) -> Attempt {
    let elapsed = now.as_microsecond().saturating_sub(claimed_at.as_microsecond());
    let message = format!("the lease of {worker} expired before it answered");
    Attempt {
        number,
        verdict: Verdict::Lost,
        started_at: claimed_at,
        duration_us: u64::try_from(elapsed).unwrap_or(0),
        worker,
        error: Some(Box::new(Fault::new("lost", message))),
        reply: None,
        trace: Trace::default(),
    }
}

/// What a lost lease means for a delivery that has had `infra_faults` of them, this one included.
#[must_use]
pub fn lost_next(infra_faults: u32) -> Next {
    if infra_faults > INFRA_BUDGET { Next::Fail } else { Next::Retry { after: Duration::ZERO } }
}

impl EventFilter {
    /// Whether an event of this record is meant. The cursor and the limit are not looked at.
    #[must_use]
    pub fn admits(&self, record: &EventRecord) -> bool {
        self.status.is_none_or(|status| status == record.status) && self.admits_event(&record.event)
    }

    /// As [`admits`](Self::admits), without the status.
    #[must_use]
    pub fn admits_event(&self, event: &Event) -> bool {
        let is = |wanted: &Option<String>, actual: &Option<Arc<str>>| {
            wanted.as_deref().is_none_or(|wanted| Some(wanted) == actual.as_deref())
        };
        self.pattern.as_ref().is_none_or(|pattern| pattern.matches(&event.event_type))
            && self.source.is_none_or(|source| source == event.source)
            && self.user_id.as_ref().is_none_or(|user| Some(user) == event.user_id.as_ref())
            && is(&self.schema, &event.schema)
            && is(&self.entity, &event.entity)
            && is(&self.operation, &event.operation)
            && self.instance_id.as_deref().is_none_or(|instance| instance == &*event.instance_id)
            && within(self.from, self.to, event.created_at)
    }
}

impl DeadLetterFilter {
    /// Whether this delivery is a dead letter that is meant. The limit is not looked at.
    #[must_use]
    pub fn admits(&self, seq: Seq, id: &str, event_type: &EventType, delivery: &Delivery) -> bool {
        let is = |wanted: &Option<String>, actual: &str| wanted.as_deref().is_none_or(|wanted| wanted == actual);
        let digest = || delivery.attempts.last().and_then(|attempt| attempt.trace.digest.as_deref());
        delivery.status == Status::Failed
            && is(&self.event_id, id)
            && is(&self.subscription, &delivery.subscription)
            && self.pattern.as_ref().is_none_or(|pattern| pattern.matches(event_type))
            && self.verdict.is_none_or(|verdict| Some(verdict) == delivery.verdict)
            && self.digest.as_deref().is_none_or(|wanted| Some(wanted) == digest())
            && self.since.is_none_or(|since| delivery.completed_at.is_some_and(|at| at >= since))
            && self.is_after(seq, &delivery.subscription)
    }

    /// Whether a letter comes after the cursor: by descending seq, then by name.
    #[must_use]
    pub fn is_after(&self, seq: Seq, subscription: &str) -> bool {
        let Some((last, name)) = &self.after else { return true };
        seq < *last || (seq == *last && subscription > name.as_str())
    }

    /// The most letters that are meant.
    #[must_use]
    pub fn bound(&self) -> usize {
        bound(self.limit)
    }
}

impl Replay {
    /// Whether the event is in the stretch.
    #[must_use]
    pub fn covers(&self, seq: Seq, event: &Event) -> bool {
        self.from_seq.is_none_or(|from| from <= seq)
            && self.to_seq.is_none_or(|to| seq <= to)
            && within(self.from, self.to, event.created_at)
            && self.pattern.matches(&event.event_type)
    }
}

fn within(from: Option<Timestamp>, to: Option<Timestamp>, at: Timestamp) -> bool {
    from.is_none_or(|from| from <= at) && to.is_none_or(|to| at <= to)
}

/// A limit as a count: 0 stands for no bound.
#[must_use]
pub fn bound(limit: usize) -> usize {
    if limit == 0 { usize::MAX } else { limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_increment_is_exact_or_refused() {
        assert_eq!(incremented(None, -3), Ok(-3));
        assert_eq!(incremented(Some(b"40"), 2), Ok(42));
        for stored in [&b"1.5"[..], b"", b"x", b" 1", b"9223372036854775808", &[0xff]] {
            assert!(incremented(Some(stored), 1).is_err(), "{stored:?}");
        }
        assert!(incremented(Some(b"9223372036854775807"), 1).unwrap_err().contains("64 bits"));
    }

    #[test]
    fn the_fourth_lost_lease_is_one_too_many() {
        assert_eq!(lost_next(3), Next::Retry { after: Duration::ZERO });
        assert_eq!(lost_next(4), Next::Fail);
    }
}
