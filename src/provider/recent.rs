//! Events that this process has just appended, kept until their deliveries are claimed.
//!
//! Most events are claimed moments after they came in, by the process that has them in memory still: then the store
//! need not read and decode what it has just encoded and written. An event is never changed, and when it is erased or
//! pruned its deliveries go with it; so whoever leases a delivery finds here what the file has, or nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::event::{Event, Seq, micros};
use crate::provider::Append;

/// How many bytes of events are kept, roughly. Beyond, the oldest go.
const BOUND: usize = 16 << 20;

/// What an event takes beside its payload, roughly.
const OVERHEAD: usize = 1_024;

/// An event and when it was appended.
pub(in crate::provider) struct Stored {
    pub(in crate::provider) event: Arc<Event>,
    pub(in crate::provider) appended_at: i64,
}

struct Kept {
    event: Arc<Event>,
    appended_at: i64,
    /// How many of its deliveries were not claimed yet.
    unclaimed: usize,
}

/// The events kept, by seq.
#[derive(Default)]
pub(in crate::provider) struct Recent {
    kept: BTreeMap<Seq, Kept>,
    size: usize,
}

fn size(event: &Event) -> usize {
    event.payload.bytes().len() + OVERHEAD
}

impl Recent {
    /// Keeps an event that gets deliveries.
    pub(in crate::provider) fn keep(&mut self, seq: Seq, append: &Append, now: i64) {
        let unclaimed = append.subscriptions.len();
        if unclaimed == 0 {
            return;
        }
        let created_at = micros(append.event.created_at.as_microsecond());
        let mut event = Arc::clone(&append.event);
        let kept = Arc::make_mut(&mut event);
        (kept.seq, kept.created_at) = (Some(seq), created_at);
        self.size += size(&event);
        self.kept.insert(seq, Kept { event, appended_at: now, unclaimed });
        while self.size > BOUND {
            let Some((_, oldest)) = self.kept.pop_first() else { break };
            self.size -= size(&oldest.event);
        }
    }

    /// The event of a delivery that is claimed, if it is here.
    pub(in crate::provider) fn claim(&mut self, seq: Seq) -> Option<Stored> {
        let kept = self.kept.get_mut(&seq)?;
        kept.unclaimed = kept.unclaimed.saturating_sub(1);
        let stored = Stored { event: Arc::clone(&kept.event), appended_at: kept.appended_at };
        if kept.unclaimed == 0 {
            self.size -= size(&stored.event);
            self.kept.remove(&seq);
        }
        Some(stored)
    }

    /// Forgets all: a transaction was rolled back, and some of it may not be in the file.
    pub(in crate::provider) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Payload, Source};

    fn append(size: usize) -> Append {
        let payload = Payload::json_text(format!("\"{}\"", "x".repeat(size))).unwrap();
        let event = Event::new(Source::System, "a.b".parse().unwrap(), payload);
        Append { event: Arc::new(event), subscriptions: [Arc::from("s"), Arc::from("t")].into() }
    }

    #[test]
    fn an_event_is_kept_until_each_of_its_deliveries_was_claimed() {
        let mut recent = Recent::default();
        let mut nobody = append(1);
        nobody.subscriptions = [].into();
        recent.keep(1, &append(1), 5);
        recent.keep(2, &nobody, 5);
        assert!(recent.claim(2).is_none());
        for _ in 0..2 {
            let stored = recent.claim(1).unwrap();
            assert_eq!((stored.event.seq, stored.appended_at), (Some(1), 5));
        }
        assert!(recent.claim(1).is_none());
        assert_eq!((recent.kept.len(), recent.size), (0, 0));
    }

    #[test]
    fn beyond_the_bound_the_oldest_go() {
        let mut recent = Recent::default();
        for seq in 1..=5 {
            recent.keep(seq, &append(BOUND / 4), 5);
        }
        assert!(recent.size <= BOUND);
        assert!(recent.claim(2).is_none());
        assert!(recent.claim(3).is_some());
        recent.clear();
        assert!(recent.claim(4).is_none());
        assert_eq!(recent.size, 0);
    }
}
