//! One client's way through the feed: the log from its cursor to the head, then the ring, and back when it lags.
//!
//! A client asks; nothing is pushed to it. What it is told and where it stands change together, without an await between
//! them, so that a call that is dropped has told nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use super::cursor::{Cursor, Position};
use super::ring::Look;
use super::{Entry, Filter, Frame, Place, Request, Shared};
use crate::error::{Error, Result};
use crate::event::Seq;
use crate::provider::LogPage;

/// The events of a first page. Later ones are larger while events are small.
pub(super) const FIRST_PAGE: usize = 16;

/// The most events of a page.
const LARGEST_PAGE: usize = 256;

/// How many bytes of payload a page should have at most.
const PAGE_BYTES: usize = 1 << 20;

/// How long a client that has come further than the ring waits for it before it looks at the log again.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to leave a store alone that has just failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// A client's feed. It counts as a client until it is dropped.
pub struct Subscriber {
    shared: Arc<Shared>,
    place: Place,
    filter: Filter,
    cursor: Cursor,
    /// Told first: the position asked for could not be served.
    reset: Option<Seq>,
    /// Whether the log is read, not the ring.
    is_replaying: bool,
    /// Whether the ring has served it since it last read the log.
    is_live: bool,
    page: usize,
    grown: watch::Receiver<u64>,
    ephemeral: broadcast::Receiver<Arc<Entry>>,
}

impl Subscriber {
    pub(super) async fn open(shared: Arc<Shared>, request: Request) -> Result<Self> {
        let (grown, ephemeral) = (shared.grown.subscribe(), shared.ephemeral.subscribe());
        let place = Place::take(Arc::clone(&shared));
        let kept = match &request.position {
            Position::Acknowledged(consumer) => shared.kept(consumer).await?.map(|(kept, _)| kept),
            _ => None,
        };
        let page = shared.provider.read(0, 0).await?;
        let cursor = match (request.position, kept) {
            (Position::Latest, _) => Cursor::at(page.head, &page),
            (Position::Beginning | Position::Acknowledged(_), None) => Cursor::at_floor(&page),
            (Position::After(seq), _) => Cursor::at(seq, &page).of(request.epoch.map(Arc::from)),
            (_, Some(kept)) => Cursor::at(kept.seq, &page).of(Some(kept.epoch)),
        };
        let mut subscriber = Self {
            shared,
            place,
            filter: request.filter,
            cursor,
            reset: None,
            is_replaying: true,
            is_live: false,
            page: FIRST_PAGE,
            grown,
            ephemeral,
        };
        if !subscriber.cursor.fits(&page) {
            subscriber.reset = subscriber.mend(&page);
        }
        subscriber.place.move_to(subscriber.cursor.seq);
        Ok(subscriber)
    }

    /// Everything up to here was told, or was not to be told: resuming after it misses nothing.
    #[must_use]
    pub fn cursor(&self) -> Seq {
        self.cursor.seq
    }

    /// Names the log that the cursor is of.
    #[must_use]
    pub fn epoch(&self) -> &str {
        &self.cursor.epoch
    }

    /// What comes next, at least one frame; `None` once the feed has ended. May be dropped at any time: nothing is
    /// lost by it.
    pub async fn next(&mut self) -> Option<Vec<Frame>> {
        loop {
            if self.shared.is_ended() {
                return None;
            }
            if let Some(from_seq) = self.reset.take() {
                return Some(vec![Frame::Reset { from_seq }]);
            }
            // Marked before the look, so that a change after it is noticed.
            self.grown.borrow_and_update();
            let (mut frames, patience) = match self.is_replaying {
                true => (self.replayed().await, Duration::ZERO),
                false => self.live(),
            };
            frames.extend(self.ephemeral());
            if !frames.is_empty() {
                return Some(frames);
            }
            if !patience.is_zero() && !self.wait(patience).await {
                self.is_replaying = true;
            }
        }
    }

    /// The ephemeral events that have come.
    fn ephemeral(&mut self) -> Vec<Frame> {
        use broadcast::error::TryRecvError;
        let mut frames = Vec::new();
        loop {
            match self.ephemeral.try_recv() {
                Ok(entry) if self.filter.admits(entry.event()) => frames.push(Frame::Event(entry)),
                Ok(_) | Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return frames,
            }
        }
    }

    /// What the next page of the log has for this client.
    async fn replayed(&mut self) -> Vec<Frame> {
        match self.read().await {
            Ok(page) => {
                // Where memory answers at once, others would not get a turn.
                tokio::task::yield_now().await;
                self.told(page)
            }
            // The service meets the same, and ends the feed if the store is closed.
            Err(error) => {
                tracing::debug!(%error, "a client of the feed waits for the store");
                self.wait(STORE_PAUSE).await;
                Vec::new()
            }
        }
    }

    async fn read(&self) -> Result<LogPage> {
        let _turn = self.shared.readers.acquire().await.map_err(|_| Error::Stopped("feed"))?;
        self.shared.provider.read(self.cursor.seq, self.page).await
    }

    fn told(&mut self, page: LogPage) -> Vec<Frame> {
        if !self.cursor.fits(&page) {
            let reset = self.mend(&page);
            self.place.move_to(self.cursor.seq);
            return reset.map(|from_seq| Frame::Reset { from_seq }).into_iter().collect();
        }
        self.is_replaying = page.next < page.head;
        self.cursor.move_to(page.next);
        self.place.move_to(page.next);
        let entries: Vec<_> = page.events.into_iter().map(|event| Arc::new(Entry::new(event))).collect();
        self.page = next_page(self.page, entries.iter().map(|entry| entry.weight()).sum());
        self.admitted(entries)
    }

    /// Goes to where the log can be served from. The seq with which a client that must be told goes on.
    fn mend(&mut self, page: &LogPage) -> Option<Seq> {
        if !self.cursor.mend(page) {
            return None;
        }
        self.is_replaying = false;
        self.shared.metrics.feed().resets.inc();
        Some(page.head.saturating_add(1))
    }

    /// What the ring has, and how long to wait where that is nothing.
    fn live(&mut self) -> (Vec<Frame>, Duration) {
        let look = self.shared.ring().after(self.cursor.seq, &self.cursor.epoch);
        match look {
            Look::Found(entries, next) => {
                self.is_live = true;
                self.cursor.move_to(next);
                self.place.move_to(next);
                (self.admitted(entries), Duration::ZERO)
            }
            Look::Nothing => {
                self.is_live = true;
                (Vec::new(), Duration::MAX)
            }
            Look::Missing => {
                if std::mem::take(&mut self.is_live) {
                    self.shared.metrics.feed().lagged.inc();
                }
                (self.is_replaying, self.page) = (true, FIRST_PAGE);
                (Vec::new(), Duration::ZERO)
            }
            // Mostly the ring gets there. A log that went back shows when it is read.
            Look::Ahead => (Vec::new(), PATIENCE),
        }
    }

    fn admitted(&self, entries: Vec<Arc<Entry>>) -> Vec<Frame> {
        entries.into_iter().filter(|entry| self.filter.admits(entry.event())).map(Frame::Event).collect()
    }

    /// Waits until the ring has changed or an ephemeral event has come. `false` when neither did for so long.
    async fn wait(&mut self, patience: Duration) -> bool {
        let changed = self.grown.changed();
        // The sender lives as long as this client.
        match Instant::now().checked_add(patience) {
            Some(until) => tokio::time::timeout_at(until, changed).await.is_ok(),
            None => changed.await.is_ok(),
        }
    }
}

/// The size of the page after one of `size` that had so many bytes.
pub(super) fn next_page(size: usize, bytes: usize) -> usize {
    match bytes {
        bytes if bytes > PAGE_BYTES => (size.saturating_mul(PAGE_BYTES) / bytes).max(1),
        bytes if bytes < PAGE_BYTES / 4 => size.saturating_mul(2).min(LARGEST_PAGE),
        _ => size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_grow_while_events_are_small_and_shrink_when_they_are_large() {
        assert_eq!(next_page(FIRST_PAGE, 1_000), 32);
        assert_eq!(next_page(LARGEST_PAGE, 1_000), LARGEST_PAGE);
        assert_eq!(next_page(64, PAGE_BYTES / 2), 64);
        assert_eq!(next_page(64, PAGE_BYTES * 64), 1);
        assert_eq!(next_page(1, PAGE_BYTES * 2), 1);
    }
}
