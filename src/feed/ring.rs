//! What is newest in the log, in memory: one contiguous stretch of it that all live clients read.
//!
//! Pure data. The stretch has bounds in entries, bytes and time, so that it is small, and so that what was erased from
//! the log is not told from here for long.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Entry;
use crate::event::Seq;
use crate::provider::LogPage;

/// The most entries.
pub(super) const ENTRIES: usize = 4_096;

/// The most bytes of payload. One event may have more.
const BYTES: usize = 16 << 20;

/// How long an entry stays: long enough for a client that hesitates.
const AGE: Duration = Duration::from_secs(5);

/// The most entries that a client takes at once, and the most bytes of payload after which it takes no more.
const TAKE: (usize, usize) = (256, 1 << 20);

/// Everything of the log after `base` and up to `tip`, but what was erased.
#[derive(Default)]
pub(super) struct Ring {
    entries: VecDeque<(Instant, Arc<Entry>)>,
    bytes: usize,
    base: Seq,
    tip: Seq,
    /// `None` while nobody follows the log.
    epoch: Option<Arc<str>>,
}

/// What the ring has for a client.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing that the client has not got.
    Nothing,
    /// The client has come further than the ring, or the ring is of no log yet.
    Ahead,
    /// Something that the client has not got is not here: it must read the log.
    Missing,
    /// What comes next, and up to where.
    Found(Vec<Arc<Entry>>, Seq),
}

impl Ring {
    /// The highest seq that was read from the log.
    pub(super) fn tip(&self) -> Seq {
        self.tip
    }

    /// Forgets everything and begins behind `head`.
    pub(super) fn restart(&mut self, epoch: Arc<str>, head: Seq) {
        *self = Self { base: head, tip: head, epoch: Some(epoch), ..Self::default() };
    }

    /// Forgets everything: nobody follows the log any more.
    pub(super) fn stop(&mut self) {
        *self = Self::default();
    }

    /// Takes in what was read after the tip. `true` when clients have something to look at.
    pub(super) fn extend(&mut self, page: LogPage, now: Instant) -> bool {
        // A head that went back is another log too, whatever it calls itself.
        if self.epoch.as_ref() != Some(&page.epoch) || page.head < self.tip {
            self.restart(page.epoch, page.head);
            return true;
        }
        if page.floor > self.tip.saturating_add(1) {
            // What lies between was pruned before it was read. Who needs it finds out in the log.
            self.entries.clear();
            self.bytes = 0;
            self.base = page.floor.saturating_sub(1);
        }
        let base = self.base;
        for event in page.events.into_iter().filter(|event| event.seq.is_some_and(|seq| seq > base)) {
            let entry = Entry::new(event);
            self.bytes += entry.weight();
            self.entries.push_back((now, Arc::new(entry)));
        }
        let before = std::mem::replace(&mut self.tip, page.next.max(base));
        self.trim(now);
        self.tip != before
    }

    /// Lets go of what is too old or too much.
    pub(super) fn trim(&mut self, now: Instant) {
        while let Some((since, entry)) = self.entries.front() {
            let is_alone = self.entries.len() == 1;
            let is_much = self.entries.len() > ENTRIES || (self.bytes > BYTES && !is_alone);
            if !is_much && now.saturating_duration_since(*since) <= AGE {
                return;
            }
            self.base = entry.seq().unwrap_or(self.base);
            self.bytes -= entry.weight();
            self.entries.pop_front();
        }
        self.base = self.tip;
    }

    /// What comes after `cursor` in the log of this `epoch`.
    pub(super) fn after(&self, cursor: Seq, epoch: &Arc<str>) -> Look {
        match &self.epoch {
            None => return Look::Ahead,
            Some(own) if own != epoch => return Look::Missing,
            Some(_) if cursor < self.base => return Look::Missing,
            Some(_) if cursor > self.tip => return Look::Ahead,
            Some(_) if cursor == self.tip => return Look::Nothing,
            Some(_) => {}
        }
        let first = self.entries.partition_point(|(_, entry)| entry.seq().is_some_and(|seq| seq <= cursor));
        let (most, enough) = TAKE;
        let (mut found, mut bytes, mut next) = (Vec::new(), 0, self.tip);
        for (_, entry) in self.entries.iter().skip(first) {
            if found.len() == most || bytes > enough {
                next = found.last().and_then(|entry: &Arc<Entry>| entry.seq()).unwrap_or(cursor);
                break;
            }
            bytes += entry.weight();
            found.push(Arc::clone(entry));
        }
        Look::Found(found, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, Payload, Source};

    fn event(seq: Seq, size: usize) -> Arc<Event> {
        let payload = Payload::new("text/plain", vec![b'x'; size]).unwrap();
        Arc::new(Event { seq: Some(seq), ..Event::new(Source::System, "a.b".parse().unwrap(), payload) })
    }

    fn page(seqs: impl IntoIterator<Item = Seq>, head: Seq, epoch: &str) -> LogPage {
        let events = seqs.into_iter().map(|seq| event(seq, 10)).collect();
        LogPage { events, next: head, floor: 1, head, epoch: epoch.into() }
    }

    fn ring(head: Seq) -> Ring {
        let mut ring = Ring::default();
        ring.restart("log".into(), head);
        ring
    }

    /// The seqs that a client at `cursor` gets, and where it stands then; `None` when it must read the log.
    fn told(ring: &Ring, cursor: Seq) -> Option<(Vec<Seq>, Seq)> {
        match ring.after(cursor, &"log".into()) {
            Look::Missing => None,
            Look::Nothing | Look::Ahead => Some((Vec::new(), cursor)),
            Look::Found(entries, next) => Some((entries.iter().filter_map(|entry| entry.seq()).collect(), next)),
        }
    }

    #[test]
    fn a_client_gets_what_comes_after_its_cursor() {
        let mut ring = ring(5);
        ring.extend(page([6, 7, 9], 10, "log"), Instant::now());
        assert_eq!(told(&ring, 5), Some((vec![6, 7, 9], 10)));
        assert_eq!(told(&ring, 7), Some((vec![9], 10)));
        assert_eq!(told(&ring, 8), Some((vec![9], 10)));
        assert_eq!(told(&ring, 9), Some((vec![], 10)), "what was erased is passed over");
        assert_eq!(told(&ring, 10), Some((vec![], 10)));
        assert_eq!(told(&ring, 4), None, "5 is not in the ring");
    }

    #[test]
    fn a_client_takes_a_bounded_stretch_at_once() {
        let mut ring = ring(0);
        ring.extend(page(1..=600, 600, "log"), Instant::now());
        assert_eq!(told(&ring, 0).unwrap().1, 256);
        assert_eq!(told(&ring, 256).unwrap().1, 512);
        assert_eq!(told(&ring, 512).unwrap().1, 600);
        let large = LogPage { events: (601..=610).map(|seq| event(seq, 600 << 10)).collect(), ..page([], 610, "log") };
        ring.extend(large, Instant::now());
        assert_eq!(told(&ring, 600).unwrap(), (vec![601, 602], 602));
    }

    #[test]
    fn entries_bytes_and_age_are_bounded() {
        let now = Instant::now();
        let mut many = ring(0);
        many.extend(page(1..=5_000, 5_000, "log"), now);
        assert_eq!(many.entries.len(), ENTRIES);
        assert_eq!(told(&many, 903), None);
        assert_eq!(told(&many, 904).unwrap().0.first(), Some(&905));

        let mut heavy = ring(0);
        let events = (1..=40).map(|seq| event(seq, 1 << 20)).collect();
        heavy.extend(LogPage { events, ..page([], 40, "log") }, now);
        assert_eq!(heavy.entries.len(), 16);

        many.trim(now + AGE + Duration::from_secs(1));
        assert!(many.entries.is_empty() && many.bytes == 0);
        assert_eq!(told(&many, 5_000), Some((vec![], 5_000)));
        assert_eq!(told(&many, 4_999), None);
    }

    #[test]
    fn another_log_sends_every_client_to_read_it() {
        let mut ring = ring(0);
        ring.extend(page(1..=3, 3, "log"), Instant::now());
        ring.extend(page([], 7, "another"), Instant::now());
        assert_eq!(told(&ring, 3), None);
        let mut ring = self::ring(5);
        ring.extend(page([], 2, "log"), Instant::now());
        assert_eq!(ring.tip(), 2, "a head that went back");
        assert!(matches!(ring.after(5, &"log".into()), Look::Ahead));
    }

    #[test]
    fn what_was_pruned_before_it_was_read_is_missing() {
        let mut ring = ring(3);
        ring.extend(LogPage { floor: 9, ..page([9, 10], 10, "log") }, Instant::now());
        assert_eq!(told(&ring, 3), None);
        assert_eq!(told(&ring, 8), Some((vec![9, 10], 10)));
    }
}
