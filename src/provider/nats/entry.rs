//! What stands in the stream: entries, each one or several messages of which the last has it take effect.
//!
//! An entry is a sequence of pieces: events, the heavy parts of attempts, and at most one move, which is the last and says
//! what is done. Without a move its events are appended. A piece that is larger than a message may be is several.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::delivery::{Attempt, KvChange, KvWrite, LogLine, Next, Reply, Verdict};
use crate::event::{EventId, EventType, Seq, micros};
use crate::pattern::Pattern;
use crate::provider::state::as_micros;
use crate::provider::{
    Amendment, Append, ClaimRequest, DeadLetterFilter, Expect, LeaseKey, Replay, Settlement, Want, header,
};
use crate::subscription::Ordering;

/// The header that says which piece of which entry a message is.
pub(super) const PART: &str = "Tidegate";

/// The header with all of an event but its type and payload.
const EVENT: &str = "Tidegate-Event";

/// The header with an event's type.
const TYPE: &str = "Event-Type";

/// From this size on what an event has beside its payload stands before the payload in the body, and the header says how
/// long it is: a stream refuses headers of more than 64 KiB.
const LONG: usize = 16 << 10;

/// From this size on an attempt's reply, log and backtrace stand in a message of their own, in bytes of JSON.
const HEAVY: usize = 256;

/// Which piece of which entry a message is, as `session.operation.part.parts.kind.until.time`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// Who sent it, and the how many-th of his entries it is.
    pub(super) entry: (u64, u64),
    /// Its place in the entry, and how many there are.
    pub(super) at: u32,
    pub(super) of: u32,
    pub(super) kind: Kind,
    /// What the stream takes in later than this is void.
    pub(super) until: i64,
    /// The time, where a test sets it.
    pub(super) time: Option<i64>,
}

/// What a message holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// An event, or its beginning.
    Event,
    /// The heavy parts of an attempt, or their beginning.
    Record,
    /// A move, or its beginning.
    Move,
    /// More of the piece before.
    More,
}

impl Kind {
    const ALL: [(Self, char); 4] = [(Self::Event, 'e'), (Self::Record, 'r'), (Self::Move, 'm'), (Self::More, '+')];

    fn letter(self) -> char {
        Self::ALL.into_iter().find(|(kind, _)| *kind == self).map_or('+', |(_, letter)| letter)
    }
}

impl Part {
    pub(super) fn read(text: &str) -> Option<Self> {
        let mut words = text.split('.');
        let mut word = || words.next();
        let session = u64::from_str_radix(word()?, 16).ok()?;
        let entry = (session, word()?.parse().ok()?);
        let (at, of) = (word()?.parse().ok()?, word()?.parse().ok()?);
        let letter = word()?;
        let (kind, _) = Kind::ALL.into_iter().find(|(_, own)| letter.chars().eq([*own]))?;
        let until = word()?.parse().ok()?;
        let time = word().map(str::parse).transpose().ok()?;
        (at < of).then_some(Self { entry, at, of, kind, until, time })
    }

    pub(super) fn write(&self) -> String {
        let Self { entry: (session, number), at, of, kind, until, time } = self;
        let time = time.map(|time| format!(".{time}")).unwrap_or_default();
        format!("{session:x}.{number}.{at}.{of}.{}.{until}{time}", kind.letter())
    }
}

/// A piece of an entry that is to be sent.
pub(super) struct Piece {
    pub(super) kind: Kind,
    /// Behind the subject that all subjects of the namespace begin with.
    pub(super) subject: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Beside the event: its id as it is, and who gets it.
#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    id: EventId,
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    to: Arc<[Arc<str>]>,
    #[serde(borrow)]
    event: &'a RawValue,
}

/// What the headers of an event's message say of it.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Facts {
    envelope: String,
    event_type: String,
}

impl Facts {
    pub(super) fn read(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).map(|value| value.as_str().to_owned()).unwrap_or_default();
        Self { envelope: text(EVENT), event_type: text(TYPE) }
    }
}

/// The piece that an event is.
pub(super) fn event_piece(append: &Append) -> Piece {
    let event = &append.event;
    let header = String::from_utf8(header::header(event)).unwrap_or_default();
    let header = RawValue::from_string(header).unwrap_or_default();
    let envelope = Envelope { id: event.id.clone(), to: Arc::clone(&append.subscriptions), event: &header };
    let mut headers = HeaderMap::new();
    let envelope = serde_json::to_string(&envelope).unwrap_or_default();
    let payload = event.payload.bytes();
    let (told, body) = if envelope.len() < LONG {
        (envelope, payload.clone())
    } else {
        (format!("+{}", envelope.len()), [envelope.as_bytes(), payload].concat().into())
    };
    headers.insert(EVENT, told);
    // For those who follow the subjects without tidegate.
    headers.insert("Event-ID", event.id.as_str());
    headers.insert(TYPE, event.event_type.as_str());
    headers.insert("Event-Source", event.source.as_str());
    headers.insert("Instance-ID", &*event.instance_id);
    Piece { kind: Kind::Event, subject: format!("events.{}", event.event_type.as_str()), headers, body }
}

/// The event of a piece whose bodies are one behind the other in `payload`.
pub(super) fn read_event(facts: &Facts, payload: Bytes, seq: Option<Seq>) -> Option<Append> {
    let (envelope, payload) = match facts.envelope.strip_prefix('+') {
        None => (Bytes::copy_from_slice(facts.envelope.as_bytes()), payload),
        Some(length) => {
            let length: usize = length.parse().ok().filter(|&length| length <= payload.len())?;
            (payload.slice(..length), payload.slice(length..))
        }
    };
    let envelope: Envelope<'_> = serde_json::from_slice(&envelope).ok()?;
    let event_type = EventType::parse(&facts.event_type).ok()?;
    let event = header::event(envelope.event.get().as_bytes(), envelope.id, event_type, payload, seq)?;
    Some(Append { event: Arc::new(event), subscriptions: envelope.to })
}

/// What an attempt's record has that may be large.
#[derive(Serialize, Deserialize)]
pub(super) struct Heavy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reply: Option<Box<Reply>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    log: Vec<LogLine>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    backtrace: Vec<String>,
}

impl Heavy {
    /// Takes the heavy parts out of a record, where they are worth a message of their own.
    fn take(attempt: &mut Attempt) -> Option<Piece> {
        if attempt.reply.is_none() && attempt.trace.log.is_empty() && attempt.trace.backtrace.is_empty() {
            return None;
        }
        let trace = &mut *attempt.trace;
        let heavy = Self {
            reply: attempt.reply.take(),
            log: std::mem::take(&mut trace.log),
            backtrace: std::mem::take(&mut trace.backtrace),
        };
        let json = serde_json::to_vec(&heavy).unwrap_or_default();
        if json.len() < HEAVY {
            heavy.put(attempt);
            return None;
        }
        Some(Piece { kind: Kind::Record, subject: "records".to_owned(), headers: HeaderMap::new(), body: json.into() })
    }

    /// Puts them back.
    pub(super) fn put(self, attempt: &mut Attempt) {
        attempt.reply = self.reply;
        (attempt.trace.log, attempt.trace.backtrace) = (self.log, self.backtrace);
    }
}

/// What an entry does, beside the events and records that stand before it.
#[derive(Serialize, Deserialize)]
pub(super) enum Move {
    /// A log begins: what was before it means nothing. Void unless it comes right behind the message `after`.
    Begin {
        epoch: String,
        format: u32,
        after: u64,
    },
    Claim {
        request: Asked,
        seed: u64,
    },
    Renew {
        keys: Vec<Key>,
        lease: i64,
    },
    Settle(Vec<End>),
    Redrive(Letters),
    Replay(Stretch),
    Cancel {
        subscription: Arc<str>,
    },
    Erase {
        id: String,
    },
    Prune {
        age: Option<i64>,
        events: Option<u64>,
    },
    /// Documents: `value` is `None` for a removal.
    Document {
        collection: String,
        key: String,
        value: Option<Bytes>,
        expect: Option<Option<u64>>,
        ttl: Option<i64>,
    },
    /// What is below this place of the stream is in a snapshot, and what was known not to be needed of it when the message
    /// `seen` was the last was removed.
    Swept {
        below: u64,
        seen: u64,
    },
}

impl Move {
    /// The piece that a move is.
    pub(super) fn piece(&self) -> Piece {
        let body = postcard::to_stdvec(self).unwrap_or_default().into();
        Piece { kind: Kind::Move, subject: "moves".to_owned(), headers: HeaderMap::new(), body }
    }

    pub(super) fn read(body: &[u8]) -> Option<Self> {
        postcard::from_bytes(body).ok()
    }

    /// `seed` is where the tokens come from.
    pub(super) fn claim(request: &ClaimRequest, seed: u64) -> Self {
        let want = |want: &Want| (Arc::clone(&want.subscription), want.room as u64, want.ordering == Ordering::Key);
        let request = Asked {
            worker: Arc::clone(&request.worker),
            lease: as_micros(request.lease),
            wants: request.wants.iter().map(want).collect(),
        };
        Self::Claim { request, seed }
    }

    pub(super) fn amend(amendment: Amendment) -> Self {
        match amendment {
            Amendment::Redrive(filter) => Self::Redrive(filter.into()),
            Amendment::Replay(replay) => Self::Replay(replay.into()),
            Amendment::Cancel { subscription } => Self::Cancel { subscription },
            Amendment::Erase { id } => Self::Erase { id },
        }
    }

    /// The pieces before the move, and the move.
    pub(super) fn settle(batch: Vec<Settlement>) -> (Vec<Piece>, Self) {
        let (mut pieces, mut ends) = (Vec::new(), Vec::with_capacity(batch.len()));
        for settlement in batch {
            let Settlement { key, next, mut attempt, published, writes } = settlement;
            let is_success = next == Next::Complete;
            let published = if is_success { published } else { Vec::new() };
            pieces.extend(published.iter().map(event_piece));
            let record = attempt.as_mut().and_then(Heavy::take);
            let is_heavy = record.is_some();
            pieces.extend(record);
            ends.push(End {
                key: key.into(),
                next: match next {
                    Next::Complete => Ending::Complete,
                    Next::Retry { after } => Ending::Retry { after: as_micros(after) },
                    Next::Fail => Ending::Fail,
                    Next::Release => Ending::Release,
                },
                attempt: attempt.map(|attempt| serde_json::to_vec(&attempt).unwrap_or_default().into()),
                is_heavy,
                published: published.len() as u64,
                writes: if is_success { writes.into_iter().map(Into::into).collect() } else { Vec::new() },
            });
        }
        (pieces, Self::Settle(ends))
    }

    pub(super) fn document(
        collection: &str,
        key: &str,
        value: Option<Bytes>,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Self {
        let expect = match expect {
            Expect::Any => None,
            Expect::Absent => Some(None),
            Expect::Revision(revision) => Some(Some(revision)),
        };
        Self::Document {
            collection: collection.to_owned(),
            key: key.to_owned(),
            value,
            expect,
            ttl: ttl.map(as_micros),
        }
    }
}

/// How a document must stand, from what [`Move::Document`] has of it.
pub(super) fn expectation(expect: Option<Option<u64>>) -> Expect {
    match expect {
        None => Expect::Any,
        Some(None) => Expect::Absent,
        Some(Some(revision)) => Expect::Revision(revision),
    }
}

/// What a claim asks for.
#[derive(Serialize, Deserialize)]
pub(super) struct Asked {
    worker: Arc<str>,
    lease: i64,
    wants: Vec<(Arc<str>, u64, bool)>,
}

impl From<Asked> for ClaimRequest {
    fn from(Asked { worker, lease, wants }: Asked) -> Self {
        let want = |(subscription, room, is_ordered): (Arc<str>, u64, bool)| Want {
            subscription,
            room: usize::try_from(room).unwrap_or(usize::MAX),
            ordering: if is_ordered { Ordering::Key } else { Ordering::None },
        };
        Self { worker, lease: span(lease), wants: wants.into_iter().map(want).collect() }
    }
}

/// A span from microseconds.
pub(super) fn span(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// A lease.
#[derive(Serialize, Deserialize)]
pub(super) struct Key(Seq, Arc<str>, u64);

impl From<LeaseKey> for Key {
    fn from(key: LeaseKey) -> Self {
        Self(key.seq, key.subscription, key.token)
    }
}

impl From<Key> for LeaseKey {
    fn from(Key(seq, subscription, token): Key) -> Self {
        Self { seq, subscription, token }
    }
}

/// The end of an attempt.
#[derive(Serialize, Deserialize)]
pub(super) struct End {
    key: Key,
    next: Ending,
    attempt: Option<Bytes>,
    /// Whether the attempt has a record before the move.
    pub(super) is_heavy: bool,
    /// How many of the events before the move are its own.
    pub(super) published: u64,
    writes: Vec<Write>,
}

impl End {
    /// The settlement, with what it publishes.
    pub(super) fn settlement(self, published: Vec<Append>) -> Settlement {
        let next = match self.next {
            Ending::Complete => Next::Complete,
            Ending::Retry { after } => Next::Retry { after: span(after) },
            Ending::Fail => Next::Fail,
            Ending::Release => Next::Release,
        };
        let attempt = self.attempt.and_then(|json| serde_json::from_slice(&json).ok());
        let writes = self.writes.into_iter().map(Into::into).collect();
        Settlement { key: self.key.into(), next, attempt, published, writes }
    }
}

#[derive(Serialize, Deserialize)]
enum Ending {
    Complete,
    Retry { after: i64 },
    Fail,
    Release,
}

#[derive(Serialize, Deserialize)]
enum Write {
    Set { bucket: String, key: String, value: Bytes, ttl: Option<i64> },
    Delete { bucket: String, key: String },
    Increment { bucket: String, key: String, by: i64 },
}

impl From<KvWrite> for Write {
    fn from(KvWrite { bucket, key, change }: KvWrite) -> Self {
        match change {
            KvChange::Set { value, ttl } => Self::Set { bucket, key, value, ttl: ttl.map(as_micros) },
            KvChange::Delete => Self::Delete { bucket, key },
            KvChange::Increment { by } => Self::Increment { bucket, key, by },
        }
    }
}

impl From<Write> for KvWrite {
    fn from(write: Write) -> Self {
        match write {
            Write::Set { bucket, key, value, ttl } => {
                Self { bucket, key, change: KvChange::Set { value, ttl: ttl.map(span) } }
            }
            Write::Delete { bucket, key } => Self { bucket, key, change: KvChange::Delete },
            Write::Increment { bucket, key, by } => Self { bucket, key, change: KvChange::Increment { by } },
        }
    }
}

/// Which dead letters are meant.
#[derive(Serialize, Deserialize)]
pub(super) struct Letters {
    subscription: Option<String>,
    event_id: Option<String>,
    pattern: Option<Pattern>,
    verdict: Option<Verdict>,
    digest: Option<String>,
    since: Option<i64>,
    after: Option<(Seq, String)>,
    limit: u64,
}

impl From<DeadLetterFilter> for Letters {
    fn from(filter: DeadLetterFilter) -> Self {
        let DeadLetterFilter { subscription, event_id, pattern, verdict, digest, since, after, limit } = filter;
        let since = since.map(|since| since.as_microsecond());
        Self { subscription, event_id, pattern, verdict, digest, since, after, limit: limit as u64 }
    }
}

impl From<Letters> for DeadLetterFilter {
    fn from(letters: Letters) -> Self {
        let Letters { subscription, event_id, pattern, verdict, digest, since, after, limit } = letters;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Self { subscription, event_id, pattern, verdict, digest, since: since.map(micros), after, limit }
    }
}

/// Which stretch of the log is replayed.
#[derive(Serialize, Deserialize)]
pub(super) struct Stretch {
    subscription: Arc<str>,
    pattern: Pattern,
    seqs: (Option<Seq>, Option<Seq>),
    times: (Option<i64>, Option<i64>),
    missing_only: bool,
    dry_run: bool,
}

impl From<Replay> for Stretch {
    fn from(replay: Replay) -> Self {
        let Replay { subscription, pattern, from_seq, to_seq, from, to, missing_only, dry_run } = replay;
        let times = (from.map(|at| at.as_microsecond()), to.map(|at| at.as_microsecond()));
        Self { subscription, pattern, seqs: (from_seq, to_seq), times, missing_only, dry_run }
    }
}

impl From<Stretch> for Replay {
    fn from(stretch: Stretch) -> Self {
        let Stretch { subscription, pattern, seqs: (from_seq, to_seq), times: (from, to), missing_only, dry_run } =
            stretch;
        let (from, to) = (from.map(micros), to.map(micros));
        Self { subscription, pattern, from_seq, to_seq, from, to, missing_only, dry_run }
    }
}
