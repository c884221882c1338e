//! Whether retention has anything to remove: an entry that would remove nothing is not written.

use super::Shared;
use super::core::Core;
use crate::error::Result;
use crate::event::Seq;
use crate::provider::Retention;
use crate::provider::state::as_micros;

/// How many events are looked at before others have their turn.
const STEP: usize = 8_192;

impl Shared {
    /// Whether retention would remove an event, what is left of one that was erased, or a document now.
    pub(super) async fn is_prunable(&self, retention: &Retention) -> Result<bool> {
        let (is_due, instant) = self.read("prune", |core, now| core.is_prunable(retention, now)).await?;
        if is_due {
            return Ok(true);
        }
        let Some(instant) = instant else { return Ok(false) };
        let mut after = 0;
        while let Some((last, is_old)) = self.core.lock().look_for_old(after, instant) {
            if is_old {
                return Ok(true);
            }
            after = last;
        }
        Ok(false)
    }
}

impl Core {
    /// Whether there is something to remove that is found at once, and which events are old.
    fn is_prunable(&self, retention: &Retention, now: i64) -> (bool, Option<i64>) {
        let log = &self.state.log;
        let instant = retention.max_age.map(|age| now.saturating_sub(as_micros(age)));
        let has_finished = log.events.completed + log.events.failed > 0;
        let is_many = has_finished && retention.max_events.is_some_and(|max| log.total() > max);
        let is_erased = |instant| log.past().1.values().any(|(_, created)| *created < instant);
        (
            is_many || instant.is_some_and(is_erased) || self.state.shelf.is_overdue(now),
            instant.filter(|_| has_finished),
        )
    }

    /// The last of the next events, and whether a finished one of them was made before `instant`; `None` behind the last.
    fn look_for_old(&self, after: Seq, instant: i64) -> Option<(Seq, bool)> {
        let mut last = None;
        for (seq, slot) in self.state.log.after(after).take(STEP) {
            if !slot.is_open() && slot.event.created_at.as_microsecond() < instant {
                return Some((seq, true));
            }
            last = Some((seq, false));
        }
        last
    }
}
