//! What the messages of the stream make, one after the other: the same in every process that reads them.
//!
//! Nothing here looks at a clock or at chance: time is that of the stream, and the seeds of lease tokens stand in the
//! entries. Beside the state of the log this knows where in the stream events and records stand, and what of the stream is
//! not needed any more.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::entry::{End, Facts, Kind, Move, Part, expectation, read_event};
use crate::error::Result;
use crate::event::{Event, EventId, Seq};
use crate::provider::header::Texts;
use crate::provider::state::{Capture, Image, State, bare};
use crate::provider::{Amendment, Append, Appended, Claimed, Settled};

/// The layout of entries and snapshots that this version writes.
pub(super) const FORMAT: u32 = 1;

/// An entry that is not whole by then is void, in microseconds after its first message.
const PATIENCE: i64 = 30_000_000;

/// How many bytes of payloads are kept in memory. Beyond, those of the oldest events are left to the stream.
const KEPT: usize = 64 << 20;

/// The places of the messages that a piece is: most are one message.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "Vec<u64>", into = "Vec<u64>")]
pub(super) enum Spot {
    One(u64),
    Several(Arc<[u64]>),
}

impl Spot {
    pub(super) fn places(&self) -> &[u64] {
        match self {
            Self::One(place) => std::slice::from_ref(place),
            Self::Several(places) => places,
        }
    }
}

impl From<Vec<u64>> for Spot {
    fn from(places: Vec<u64>) -> Self {
        match places[..] {
            [place] => Self::One(place),
            _ => Self::Several(places.into()),
        }
    }
}

impl From<Spot> for Vec<u64> {
    fn from(spot: Spot) -> Self {
        spot.places().to_vec()
    }
}

/// A message of the stream.
#[derive(Serialize, Deserialize)]
pub(super) struct Incoming {
    /// Its place in the stream.
    pub(super) at: u64,
    /// When the stream took it in, in nanoseconds since the Unix epoch.
    pub(super) stamp: i64,
    /// `None` for one that is none of ours.
    pub(super) part: Option<Part>,
    pub(super) facts: Facts,
    pub(super) body: Bytes,
}

/// What an entry led to.
pub(super) enum Outcome {
    /// Nothing: it came too late, or not whole.
    Void,
    Appended(Vec<Appended>),
    Claimed(Claimed),
    Renewed(Vec<bool>),
    Settled(Vec<Settled>),
    Changed(u64),
    Document(Result<u64>),
    Noted,
}

/// Where an event and the heavy parts of its attempts stand.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) event: Spot,
    /// By subscription and the attempt's number.
    pub(super) records: Vec<(Arc<str>, u32, Spot)>,
    /// Whether only the stream has the payload. A matter of this process alone.
    #[serde(skip, default = "yes")]
    pub(super) is_bare: bool,
}

fn yes() -> bool {
    true
}

#[derive(Serialize, Deserialize)]
struct Staged {
    since: i64,
    parts: Vec<Incoming>,
}

/// A piece that was put together.
struct Piece {
    kind: Kind,
    facts: Facts,
    body: Bytes,
    spot: Vec<u64>,
}

/// All of it.
pub(super) struct Core {
    /// Names the log; empty before it began.
    pub(super) epoch: Arc<str>,
    pub(super) state: State,
    /// The last message that was applied, and when the stream took it in.
    pub(super) applied: u64,
    pub(super) stamp: i64,
    /// The store's time: never goes back.
    pub(super) now: i64,
    staged: BTreeMap<(u64, u64), Staged>,
    pub(super) places: BTreeMap<Seq, Place>,
    /// Places in the stream of what nobody needs any more, with the place of the message that made it so.
    pub(super) gone: BTreeMap<u64, u64>,
    /// Below this place of the stream nothing is needed to make the state.
    pub(super) swept: u64,
    /// Whether an entry was met that this version cannot read.
    pub(super) is_foreign: bool,
    /// The events whose payloads are in memory, oldest first, and how many bytes those have.
    kept: VecDeque<(Seq, usize)>,
    kept_bytes: usize,
    texts: Texts,
    /// Bytes of messages since the last snapshot.
    pub(super) fresh_bytes: u64,
}

/// A core as it was after one message; in bytes it is what [`Saved`] is.
#[derive(Serialize)]
pub(super) struct Captured {
    epoch: Arc<str>,
    pub(super) applied: u64,
    pub(super) stamp: i64,
    now: i64,
    state: Capture,
    places: Vec<(Seq, Place)>,
    gone: Vec<(u64, u64)>,
    swept: u64,
    staged: Vec<((u64, u64), Staged)>,
}

/// A core as it is kept.
#[derive(Deserialize)]
pub(super) struct Saved {
    epoch: String,
    applied: u64,
    stamp: i64,
    now: i64,
    state: Image,
    places: Vec<(Seq, Place)>,
    gone: Vec<(u64, u64)>,
    swept: u64,
    staged: Vec<((u64, u64), Staged)>,
}

impl Core {
    /// Before the log began, behind the message `applied`.
    pub(super) fn new(applied: u64) -> Self {
        Self {
            epoch: Arc::default(),
            state: State::new(u64::MAX, 0),
            applied,
            stamp: 0,
            now: 0,
            staged: BTreeMap::new(),
            places: BTreeMap::new(),
            gone: BTreeMap::new(),
            swept: 0,
            is_foreign: false,
            kept: VecDeque::new(),
            kept_bytes: 0,
            texts: Texts::default(),
            fresh_bytes: 0,
        }
    }

    /// This core as it is now, at little cost.
    pub(super) fn capture(&self) -> Captured {
        let copy =
            |incoming: &Incoming| Incoming { facts: incoming.facts.clone(), body: incoming.body.clone(), ..*incoming };
        let staged = |(&entry, staged): (&(u64, u64), &Staged)| {
            (entry, Staged { since: staged.since, parts: staged.parts.iter().map(copy).collect() })
        };
        Captured {
            epoch: Arc::clone(&self.epoch),
            applied: self.applied,
            stamp: self.stamp,
            now: self.now,
            state: self.state.capture(),
            places: self.places.iter().map(|(&seq, place)| (seq, place.clone())).collect(),
            gone: self.gone.iter().map(|(&place, &since)| (place, since)).collect(),
            swept: self.swept,
            staged: self.staged.iter().map(staged).collect(),
        }
    }

    pub(super) fn restore(saved: Saved) -> Option<Self> {
        let state = State::of(saved.state, saved.now)?;
        Some(Self {
            epoch: saved.epoch.into(),
            state,
            stamp: saved.stamp,
            now: saved.now,
            staged: saved.staged.into_iter().collect(),
            places: saved.places.into_iter().collect(),
            gone: saved.gone.into_iter().collect(),
            swept: saved.swept,
            ..Self::new(saved.applied)
        })
    }

    /// The lowest place in the stream that an event or a record that is kept has, below `bound`: for each of the two.
    pub(super) fn lowest(&self, bound: u64) -> (u64, u64) {
        let staged = self.staged.values().flat_map(|staged| &staged.parts).map(|part| part.at);
        let bound = staged.fold(bound, u64::min);
        let (mut event, mut record) = (bound, bound);
        for place in self.places.values() {
            event = place.event.places().iter().copied().fold(event, u64::min);
            let records = place.records.iter().flat_map(|(_, _, spot)| spot.places()).copied();
            record = records.fold(record, u64::min);
        }
        (event, record)
    }

    /// Applies the next message. Answers with the entry that took effect with it, or came to nothing, and what it led to.
    pub(super) fn apply(&mut self, message: Incoming) -> Option<((u64, u64), Outcome)> {
        let taken_in = message.stamp / 1_000;
        (self.applied, self.stamp) = (message.at, message.stamp);
        self.fresh_bytes += (message.body.len() + 200) as u64;
        if !self.staged.is_empty() {
            let gone = &mut self.gone;
            self.staged.retain(|_, staged| {
                let stays = taken_in - staged.since <= PATIENCE;
                if !stays {
                    gone.extend(staged.parts.iter().map(|part| (part.at, message.at)));
                }
                stays
            });
        }
        let Some(part) = message.part else {
            self.gone.insert(message.at, message.at);
            return None;
        };
        self.now = self.now.max(part.time.unwrap_or(taken_in));
        let is_last = part.at + 1 == part.of;
        if part.until < taken_in {
            self.gone.insert(message.at, message.at);
            return is_last.then_some((part.entry, Outcome::Void));
        }
        let parts = if part.of == 1 {
            vec![message]
        } else {
            let staged = self.staged.entry(part.entry).or_insert_with(|| Staged { since: taken_in, parts: Vec::new() });
            let follows = staged.parts.len() == part.at as usize;
            staged.parts.push(message);
            if follows && !is_last {
                return None;
            }
            let parts = self.staged.remove(&part.entry).map(|staged| staged.parts).unwrap_or_default();
            if !follows {
                self.drop_all(parts.iter().map(|part| part.at));
                return is_last.then_some((part.entry, Outcome::Void));
            }
            parts
        };
        Some((part.entry, self.carry_out(pieces(parts))))
    }

    fn carry_out(&mut self, pieces: Vec<Piece>) -> Outcome {
        let (mut events, mut records, mut last) = (VecDeque::new(), VecDeque::new(), None);
        for piece in pieces {
            match piece.kind {
                Kind::Event => match read_event(&piece.facts, piece.body, None) {
                    Some(mut append) => {
                        self.texts.share(Arc::make_mut(&mut append.event));
                        events.push_back((append, piece.spot.into()));
                    }
                    None => self.is_foreign = true,
                },
                Kind::Record => records.push_back(piece.spot.into()),
                Kind::Move => match Move::read(&piece.body) {
                    Some(change) => last = Some(change),
                    None => self.is_foreign = true,
                },
                Kind::More => {}
            }
        }
        if let Some(Move::Begin { epoch, format, after }) = last {
            if after + 1 != self.applied {
                return Outcome::Void;
            }
            *self = Self { stamp: self.stamp, now: self.now, ..Self::new(self.applied) };
            self.is_foreign = format > FORMAT;
            self.epoch = epoch.into();
            return Outcome::Noted;
        }
        if self.is_foreign || self.epoch.is_empty() {
            return Outcome::Void;
        }
        match last {
            None => Outcome::Appended(self.append(events)),
            Some(change) => self.change(change, events, records),
        }
    }

    fn append(&mut self, events: VecDeque<(Append, Spot)>) -> Vec<Appended> {
        let head = self.state.log.head;
        let (batch, marks): (Vec<_>, Vec<_>) = events.into_iter().map(split).unzip();
        // No bound is set: nothing is refused.
        let appended = self.state.append(batch, self.now).unwrap_or_default();
        self.place(head, marks);
        appended
    }

    /// Notes where events stand that may have got their seqs after `head`.
    fn place(&mut self, head: Seq, marks: Vec<(EventId, usize, Spot)>) {
        for (id, size, spot) in marks {
            let seq = self.state.log.seq_of(id.as_str()).filter(|seq| *seq > head && !self.places.contains_key(seq));
            let Some(seq) = seq else {
                self.drop_all(spot.places().iter().copied());
                continue;
            };
            self.places.insert(seq, Place { event: spot, records: Vec::new(), is_bare: false });
            self.kept.push_back((seq, size));
            self.kept_bytes += size;
        }
        while self.kept_bytes > KEPT
            && let Some((seq, size)) = self.kept.pop_front()
        {
            self.kept_bytes -= size;
            if let Some(slot) = self.state.log.get(seq)
                && let Some(place) = self.places.get_mut(&seq)
            {
                place.is_bare = true;
                let event = Arc::new(bare(&slot.event));
                self.state.log.replace(event);
            }
        }
    }

    fn change(&mut self, change: Move, events: VecDeque<(Append, Spot)>, records: VecDeque<Spot>) -> Outcome {
        let now = self.now;
        match change {
            Move::Begin { .. } => Outcome::Noted,
            Move::Claim { request, seed } => {
                self.state.reseed(seed);
                Outcome::Claimed(self.state.claim(&request.into(), now))
            }
            Move::Renew { keys, lease } => {
                let lease = super::entry::span(lease);
                Outcome::Renewed(keys.into_iter().map(|key| self.state.renew(&key.into(), lease, now)).collect())
            }
            Move::Settle(ends) => Outcome::Settled(self.settle(ends, events, records)),
            Move::Redrive(letters) => self.amend(&Amendment::Redrive(letters.into())),
            Move::Replay(stretch) => self.amend(&Amendment::Replay(stretch.into())),
            Move::Cancel { subscription } => self.amend(&Amendment::Cancel { subscription }),
            Move::Erase { id } => {
                let seq = self.state.log.seq_of(&id);
                let outcome = self.amend(&Amendment::Erase { id });
                if let Some(place) = seq.and_then(|seq| self.places.remove(&seq)) {
                    self.let_go([place]);
                }
                outcome
            }
            Move::Prune { age, events } => {
                let log = &mut self.state.log;
                let old = age.map_or(0, |age| log.expire(now.saturating_sub(age)));
                let many = events.map_or(0, |max| log.shrink(max));
                self.state.shelf.expire(now);
                let log = &self.state.log;
                let pruned: Vec<_> = self.places.extract_if(.., |seq, _| log.get(*seq).is_none()).collect();
                self.let_go(pruned.into_iter().map(|(_, place)| place));
                drop(self.state.log.take_gone());
                Outcome::Changed(old + many)
            }
            Move::Document { collection, key, value, expect, ttl } => {
                let shelf = &mut self.state.shelf;
                let there = shelf.check(&collection, &key, expectation(expect), now);
                Outcome::Document(there.map(|was_there| match value {
                    Some(value) => shelf.put(&collection, &key, value, ttl.map(|ttl| now.saturating_add(ttl))),
                    None => {
                        shelf.remove(&collection, &key);
                        was_there.into()
                    }
                }))
            }
            Move::Swept { below, seen } => {
                self.swept = self.swept.max(below);
                self.gone.retain(|&place, &mut since| place >= below || since > seen);
                self.fresh_bytes = 0;
                Outcome::Noted
            }
        }
    }

    fn amend(&mut self, amendment: &Amendment) -> Outcome {
        Outcome::Changed(self.state.amend(amendment, self.now))
    }

    /// Nobody needs these messages from here on.
    fn drop_all(&mut self, places: impl IntoIterator<Item = u64>) {
        let since = self.applied;
        self.gone.extend(places.into_iter().map(|place| (place, since)));
    }

    fn let_go(&mut self, places: impl IntoIterator<Item = Place>) {
        for place in places {
            self.drop_all(place.event.places().iter().copied());
            self.drop_all(place.records.iter().flat_map(|(_, _, spot)| spot.places()).copied());
        }
    }

    fn settle(
        &mut self,
        ends: Vec<End>,
        mut events: VecDeque<(Append, Spot)>,
        mut records: VecDeque<Spot>,
    ) -> Vec<Settled> {
        let mut settled = Vec::with_capacity(ends.len());
        for end in ends {
            let own = usize::try_from(end.published).unwrap_or(usize::MAX).min(events.len());
            let (published, marks): (Vec<_>, Vec<_>) = events.drain(..own).map(split).unzip();
            let record = if end.is_heavy { records.pop_front() } else { None };
            let mut settlement = end.settlement(published);
            let number = settlement.attempt.as_mut().map_or(0, |attempt| {
                self.texts.share_name(&mut attempt.worker);
                attempt.number
            });
            let (seq, subscription) = (settlement.key.seq, Arc::clone(&settlement.key.subscription));
            let head = self.state.log.head;
            let answer = self.state.settle(settlement, self.now);
            self.place(head, marks);
            if let Some(spot) = record {
                match self.places.get_mut(&seq).filter(|_| matches!(answer, Settled::Done { .. })) {
                    Some(place) => place.records.push((subscription, number, spot)),
                    None => self.drop_all(spot.places().iter().copied()),
                }
            }
            settled.push(answer);
        }
        settled
    }
}

/// An event, and what is to be remembered of it beside the log.
fn split((append, spot): (Append, Spot)) -> (Append, (EventId, usize, Spot)) {
    let size = weight(&append.event);
    let mark = (append.event.id.clone(), size, spot);
    (append, mark)
}

/// What the heavy parts of an event take, roughly, and what it takes to remember that they are here.
fn weight(event: &Event) -> usize {
    64 + event.payload.bytes().len() + 64 * event.metadata.len()
}

fn pieces(parts: Vec<Incoming>) -> Vec<Piece> {
    let mut pieces: Vec<(Piece, BytesMut)> = Vec::with_capacity(parts.len());
    for Incoming { at, part, facts, body, .. } in parts {
        let kind = part.map_or(Kind::More, |part| part.kind);
        match pieces.last_mut().filter(|_| kind == Kind::More) {
            Some((piece, rest)) => {
                piece.spot.push(at);
                rest.extend_from_slice(&body);
            }
            None => {
                pieces.push((Piece { kind, facts, body, spot: vec![at] }, BytesMut::new()));
            }
        }
    }
    let whole = |(piece, rest): (Piece, BytesMut)| {
        if rest.is_empty() {
            // A message's bytes are a part of a larger buffer, which they would keep.
            return Piece { body: Bytes::copy_from_slice(&piece.body), ..piece };
        }
        let mut body = BytesMut::from(&*piece.body);
        body.unsplit(rest);
        Piece { body: body.freeze(), ..piece }
    };
    pieces.into_iter().map(whole).collect()
}
