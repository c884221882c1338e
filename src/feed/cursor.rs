//! Where a client stands in the log, whether that place can be served, and the places that named consumers keep.
//!
//! A place is a seq and the log that it is of. Only what is told is checked here: nothing is read for a client.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Feed;
use crate::error::{Error, Result};
use crate::event::{Seq, short_text};
use crate::provider::{Document, Expect, LogPage};

/// The documents with the places of named consumers.
const COLLECTION: &str = "feed-consumers";

/// How often a place is put again after somebody else's change of it came first.
const ATTEMPTS: usize = 16;

/// From where on a client gets the feed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Position {
    /// Everything that is kept.
    Beginning,
    /// What comes from now on.
    #[default]
    Latest,
    /// What comes after this seq.
    After(Seq),
    /// What comes after the place that this consumer acknowledged, or everything where it never did.
    Acknowledged(Arc<str>),
}

impl Position {
    /// Reads `beginning`, `latest` or a seq.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `since`.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "beginning" => Ok(Self::Beginning),
            "latest" => Ok(Self::Latest),
            // A sign would be read as a number too.
            seq if seq.bytes().all(|byte| byte.is_ascii_digit()) => seq.parse().map(Self::After).map_err(|_| ()),
            _ => Err(()),
        }
        .map_err(|()| Error::invalid("since", text, "must be a seq such as 17, or beginning, or latest"))
    }
}

/// A client's place.
#[derive(Debug, Clone)]
pub(super) struct Cursor {
    /// Everything up to here is told, or was not to be told.
    pub(super) seq: Seq,
    pub(super) epoch: Arc<str>,
    /// Stands at what is oldest and has been told nothing: what is pruned now, it has not missed.
    is_untold: bool,
}

impl Cursor {
    /// At a seq of the log that the page is of.
    pub(super) fn at(seq: Seq, page: &LogPage) -> Self {
        Self { seq, epoch: Arc::clone(&page.epoch), is_untold: false }
    }

    /// The same seq in the log of this name, where one is known.
    pub(super) fn of(self, epoch: Option<Arc<str>>) -> Self {
        Self { epoch: epoch.unwrap_or(self.epoch), ..self }
    }

    /// At what is oldest.
    pub(super) fn at_floor(page: &LogPage) -> Self {
        Self { is_untold: true, ..Self::at(page.floor.saturating_sub(1), page) }
    }

    /// Whether the page follows this place with nothing missing between.
    pub(super) fn fits(&self, page: &LogPage) -> bool {
        self.epoch == page.epoch && self.seq <= page.head && self.seq.saturating_add(1) >= page.floor
    }

    /// Goes to where nothing is missing: to what is oldest, if nothing was told yet; else to the head, and the client
    /// must be told.
    pub(super) fn mend(&mut self, page: &LogPage) -> bool {
        let must_be_told = !self.is_untold;
        *self = if self.is_untold { Self::at_floor(page) } else { Self::at(page.head, page) };
        must_be_told
    }

    /// Everything up to `seq` is told.
    pub(super) fn move_to(&mut self, seq: Seq) {
        self.seq = seq;
        self.is_untold = false;
    }
}

/// The place that a consumer keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) seq: Seq,
    pub(super) epoch: Arc<str>,
}

impl Feed {
    /// The seq up to which this consumer has acknowledged the feed; `None` where it never did.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name, or what the store answers.
    pub async fn acknowledged(&self, consumer: &str) -> Result<Option<Seq>> {
        Ok(self.shared.kept(consumer).await?.map(|(kept, _)| kept.seq))
    }

    /// Keeps that this consumer has dealt with everything up to `seq`. One that has come further already stays there.
    /// Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name or a seq beyond the head, [`Error::Conflict`] when too many acknowledge for
    /// one consumer at once, or what the store answers.
    pub async fn acknowledge(&self, consumer: &str, seq: Seq) -> Result<()> {
        self.shared.keep(consumer, seq, false).await
    }

    /// Moves this consumer's place to `seq`, back or forth: it goes on with what comes after.
    ///
    /// # Errors
    /// As [`acknowledge`](Self::acknowledge).
    pub async fn seek(&self, consumer: &str, seq: Seq) -> Result<()> {
        self.shared.keep(consumer, seq, true).await
    }
}

impl super::Shared {
    pub(super) async fn kept(&self, consumer: &str) -> Result<Option<(Kept, u64)>> {
        if consumer.is_empty() {
            return Err(Error::invalid("consumer", consumer, "cannot be empty"));
        }
        short_text("consumer", consumer)?;
        let Some(Document { value, revision }) = self.provider.document(COLLECTION, consumer).await? else {
            return Ok(None);
        };
        let kept = serde_json::from_slice(&value)
            .map_err(|error| Error::store("feed", format!("read the place of consumer {consumer}"), error))?;
        Ok(Some((kept, revision)))
    }

    async fn keep(&self, consumer: &str, seq: Seq, may_go_back: bool) -> Result<()> {
        let page = self.provider.read(0, 0).await?;
        if seq > page.head {
            let reason = format!("is beyond the head of the log, {}", page.head);
            return Err(Error::invalid("seq", seq.to_string(), reason));
        }
        let value = serde_json::to_vec(&Kept { seq, epoch: Arc::clone(&page.epoch) })
            .map_err(|error| Error::store("feed", "write a place", error))?;
        for _ in 0..ATTEMPTS {
            let expect = match self.kept(consumer).await? {
                None => Expect::Absent,
                Some((kept, _)) if kept.epoch == page.epoch && kept.seq >= seq && !may_go_back => return Ok(()),
                Some((_, revision)) => Expect::Revision(revision),
            };
            match self.provider.put_document(COLLECTION, consumer, value.clone().into(), expect, None).await {
                Err(Error::Conflict { .. }) => {}
                other => return other.map(drop),
            }
        }
        Err(Error::conflict("consumer", consumer, "its place is being changed by others all the time; try again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(floor: Seq, head: Seq, epoch: &str) -> LogPage {
        LogPage { events: Vec::new(), next: head, floor, head, epoch: epoch.into() }
    }

    #[test]
    fn a_position_is_a_word_or_a_number() {
        assert_eq!(Position::parse("0").unwrap(), Position::After(0));
        assert_eq!(Position::parse("18446744073709551615").unwrap(), Position::After(Seq::MAX));
        assert_eq!(Position::parse("latest").unwrap(), Position::Latest);
        for bad in ["", "-1", "+1", "1.0", "Latest", "0x1", "18446744073709551616", " 1"] {
            assert!(Position::parse(bad).unwrap_err().to_string().starts_with("since: must be a seq"), "{bad}");
        }
    }

    #[test]
    fn a_place_is_served_from_just_below_the_floor_to_the_head() {
        let at = |seq| Cursor::at(seq, &page(1, 0, "a"));
        let rows = [
            (0, page(1, 0, "a"), true),
            (0, page(1, 9, "a"), true),
            (9, page(1, 9, "a"), true),
            (10, page(1, 9, "a"), false),
            (4, page(5, 9, "a"), true),
            (3, page(5, 9, "a"), false),
            (0, page(2, 9, "a"), false),
            (9, page(10, 9, "a"), true),
            (4, page(1, 9, "b"), false),
            (Seq::MAX, page(1, 9, "a"), false),
        ];
        for (seq, page, fits) in rows {
            assert_eq!(at(seq).fits(&page), fits, "{seq} in {page:?}");
        }
    }

    #[test]
    fn who_was_told_nothing_has_missed_nothing() {
        let mut beginner = Cursor::at_floor(&page(1, 9, "a"));
        assert!(!beginner.mend(&page(5, 12, "a")));
        assert_eq!(beginner.seq, 4);
        beginner.move_to(6);
        assert!(beginner.mend(&page(9, 14, "a")));
        assert_eq!(beginner.seq, 14);
    }
}
