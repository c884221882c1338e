//! All of a state as data, to be kept elsewhere and made a state again.
//!
//! A state is captured at once and at little cost; what takes its time, writing it down, is done to the capture, while the
//! state goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};

use super::State;
use super::log::Slot;
use super::work::Work;
use crate::delivery::Status;
use crate::event::{Event, EventId, EventType, Seq};
use crate::provider::Document;
use crate::provider::header::{self, Texts};

/// A state as data. Payloads and metadata of events are not part of it. It is written as a [`Capture`].
#[derive(Deserialize)]
pub(in crate::provider) struct Image {
    head: Seq,
    pruned: Seq,
    /// The subscriptions, in the order that deliveries name them by.
    subscriptions: Vec<Arc<str>>,
    events: Vec<Row>,
    /// Erased events: seq, id, and when they were made.
    erased: Vec<(Seq, String, i64)>,
    revision: u64,
    /// Collection, key, value, revision, expiry.
    documents: Vec<(String, String, Bytes, u64, Option<i64>)>,
}

#[derive(Deserialize)]
struct Row {
    seq: Seq,
    id: String,
    event_type: String,
    header: Bytes,
    appended: i64,
    works: Vec<Work>,
}

/// A state as it was at one instant. What it shares with the state is copied when the state changes. In bytes it is an
/// [`Image`]: the fields and their order are the same.
#[derive(Serialize)]
pub(in crate::provider) struct Capture {
    head: Seq,
    pruned: Seq,
    subscriptions: Vec<Arc<str>>,
    #[serde(serialize_with = "rows")]
    events: Vec<(Seq, Arc<Slot>)>,
    erased: Vec<(Seq, String, i64)>,
    revision: u64,
    documents: Vec<(String, String, Bytes, u64, Option<i64>)>,
}

/// As [`Row`].
#[derive(Serialize)]
struct RowOf<'a> {
    seq: Seq,
    id: &'a str,
    event_type: &'a str,
    header: Bytes,
    appended: i64,
    works: &'a [Work],
}

fn rows<S: Serializer>(events: &[(Seq, Arc<Slot>)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(events.iter().map(|(seq, slot)| RowOf {
        seq: *seq,
        id: slot.event.id.as_str(),
        event_type: slot.event.event_type.as_str(),
        header: header::header(&bare(&slot.event)).into(),
        appended: slot.appended,
        works: slot.works(),
    }))
}

/// An event without its heavy parts: payload and metadata.
pub(in crate::provider) fn bare(event: &Event) -> Event {
    let payload = crate::event::Payload::stored(event.payload.content_type(), Bytes::new());
    Event { payload, metadata: crate::event::Metadata::new(), ..event.clone() }
}

impl State {
    /// This state as it is now.
    pub(in crate::provider) fn capture(&self) -> Capture {
        let (pruned, erased) = self.log.past();
        let document = |(collection, key, document, expires): (&str, &str, Document, Option<i64>)| {
            (collection.to_owned(), key.to_owned(), document.value, document.revision, expires)
        };
        Capture {
            head: self.log.head,
            pruned,
            subscriptions: self.lines.list.iter().map(|line| Arc::clone(&line.name)).collect(),
            events: self.log.shared(),
            erased: erased.iter().map(|(&seq, (id, created))| (seq, id.to_string(), *created)).collect(),
            revision: self.shelf.revision(),
            documents: self.shelf.contents().into_iter().map(document).collect(),
        }
    }

    /// The state of an image at the instant `now`; `None` where it holds what no state can.
    pub(in crate::provider) fn of(image: Image, now: i64) -> Option<Self> {
        let mut state = Self::new(u64::MAX, 0);
        for name in &image.subscriptions {
            state.lines.index(name);
        }
        let erased = image.erased.into_iter();
        let erased: Option<BTreeMap<_, _>> =
            erased.map(|(seq, id, created)| Some((seq, (EventId::parse(&id).ok()?, created)))).collect();
        state.log.resume(image.head, image.pruned, erased?);
        let mut texts = Texts::default();
        for mut row in image.events {
            let (id, event_type) = (EventId::parse(&row.id).ok()?, EventType::parse(&row.event_type).ok()?);
            let mut event = header::event(&row.header, id, event_type, Bytes::new(), Some(row.seq))?;
            texts.share(&mut event);
            for work in &mut row.works {
                work.attempts.iter_mut().for_each(|attempt| texts.share_name(&mut attempt.worker));
                let line = state.lines.get(work.subscription)?;
                match work.status {
                    Status::Pending => line.wait(row.seq, work.due, now),
                    Status::Processing => line.lease(work.lease_end, row.seq, work.token),
                    Status::Completed | Status::Failed => {}
                }
            }
            state.log.restore(row.seq, Arc::new(event), row.appended, row.works);
        }
        state.shelf.resume(image.revision);
        for (collection, key, value, revision, expires) in image.documents {
            state.shelf.restore(collection, key, Document { value, revision }, expires);
        }
        Some(state)
    }
}

/// Attempts as JSON, which says by itself what it holds.
pub(super) mod attempts {
    use bytes::Bytes;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};
    use smallvec::SmallVec;

    use crate::delivery::Attempt;

    pub(in super::super) fn serialize<S: Serializer>(attempts: &[Attempt], to: S) -> Result<S::Ok, S::Error> {
        let json =
            if attempts.is_empty() { Vec::new() } else { serde_json::to_vec(attempts).map_err(S::Error::custom)? };
        Bytes::from(json).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<SmallVec<[Attempt; 1]>, D::Error> {
        let json = Bytes::deserialize(from)?;
        if json.is_empty() {
            return Ok(SmallVec::new());
        }
        let attempts: Vec<Attempt> = serde_json::from_slice(&json).map_err(D::Error::custom)?;
        Ok(attempts.into_iter().collect())
    }
}
