//! The feed: the log as it was and then as it grows, for any number of clients.
//!
//! ```text
//! provider ── wake ──▶ tail ── one read for all ──▶ ring ──▶ Subscriber, Subscriber, …
//!     └─────────── read, page by page, for who resumes or lags ─────────▲
//! ```
//!
//! One task per process, [`Service`], follows the log while there are clients and keeps what is newest in a bounded
//! ring. A [`Subscriber`] first reads the log from its cursor to the head, then goes on in the ring. One that falls out
//! of the ring goes back to the log. All of it is by seq, so that nothing is skipped or told twice, and the feed is the
//! same in every process on one store. Wake-ups are hints: the truth is always read.
//!
//! Nothing is queued per client: who does not ask costs nothing but its cursor. The feed shows facts and does not know
//! how they are handled, and it has never heard of HTTP.

mod cursor;
mod replay;
mod ring;
mod tail;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use foldhash::HashMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, broadcast, watch};

use crate::error::{Error, Result};
use crate::event::{Event, Seq, Source, UserId};
use crate::metrics::Metrics;
use crate::pattern::Pattern;
use crate::provider::Provider;

pub use cursor::Position;
pub use replay::Subscriber;
pub use tail::Service;

/// How many clients read the log at once; the others wait their turn, page by page. Stores have few connections to read
/// with, and others want to read too.
const READERS: usize = 2;

/// How many ephemeral events wait for a client. One that is further behind misses the oldest: they carry no promise.
const EPHEMERAL: usize = 256;

/// Which events a client gets: those that meet every condition. An empty filter admits all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of types that one of these matches; of any type where there are none.
    pub patterns: Vec<Pattern>,
    /// From this source.
    pub source: Option<Source>,
    /// Of this user.
    pub user_id: Option<UserId>,
}

impl Filter {
    fn admits(&self, event: &Event) -> bool {
        self.source.is_none_or(|source| source == event.source)
            && self.user_id.as_ref().is_none_or(|user| event.user_id.as_ref() == Some(user))
            && (self.patterns.is_empty() || self.patterns.iter().any(|pattern| pattern.matches(&event.event_type)))
    }
}

/// What a client asks for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Which events.
    pub filter: Filter,
    /// From where on.
    pub position: Position,
    /// The log that [`Position::After`] is of, where the client knows it: in another log that seq means nothing.
    pub epoch: Option<String>,
}

/// What a client is told.
#[derive(Debug, Clone)]
pub enum Frame {
    /// An event of the log, or an ephemeral one.
    Event(Arc<Entry>),
    /// The client has missed something, or its cursor is of another log. What follows begins with this seq.
    Reset {
        /// One more than the head of the log.
        from_seq: Seq,
    },
}

/// An event as clients share it: its JSON is made once.
#[derive(Debug)]
pub struct Entry {
    event: Arc<Event>,
    json: OnceLock<Bytes>,
}

impl Entry {
    fn new(event: Arc<Event>) -> Self {
        Self { event, json: OnceLock::new() }
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &Arc<Event> {
        &self.event
    }

    /// Its place in the log; `None` for an ephemeral event.
    #[must_use]
    pub fn seq(&self) -> Option<Seq> {
        self.event.seq
    }

    /// The event as JSON.
    #[must_use]
    pub fn json(&self) -> &Bytes {
        // A payload was checked when it was taken in, so that there is always a JSON form.
        self.json.get_or_init(|| serde_json::to_vec(&*self.event).unwrap_or_default().into())
    }

    fn weight(&self) -> usize {
        self.event.payload.bytes().len()
    }
}

/// Gives clients the feed. Cheap to clone.
#[derive(Clone)]
pub struct Feed {
    shared: Arc<Shared>,
}

impl Feed {
    /// A feed of what `provider` keeps. Clients get the live tail while [`Service::run`] is polled.
    pub fn new(provider: Arc<dyn Provider>, metrics: Metrics) -> (Self, Service) {
        let shared = Arc::new(Shared {
            provider,
            metrics,
            ring: Mutex::default(),
            grown: watch::Sender::new(0),
            ephemeral: broadcast::Sender::new(EPHEMERAL),
            places: Mutex::default(),
            next_place: AtomicU64::new(0),
            come_or_gone: Notify::new(),
            readers: Semaphore::new(READERS),
            is_ended: AtomicBool::new(false),
        });
        (Self { shared: Arc::clone(&shared) }, Service::new(shared))
    }

    /// A client's feed. A position that the log cannot serve is no error: the client is told by a [`Frame::Reset`].
    ///
    /// # Errors
    /// [`Error::Stopped`] once the service has ended, or what the store answers.
    pub async fn subscribe(&self, request: Request) -> Result<Subscriber> {
        self.check_running()?;
        Subscriber::open(Arc::clone(&self.shared), request).await
    }

    /// Hands an event to the clients that are there now, in this process. It gets no seq, is not stored and not
    /// handled. Returns how many clients there are.
    ///
    /// # Errors
    /// [`Error::Stopped`] once the service has ended.
    pub fn publish_ephemeral(&self, event: Event) -> Result<usize> {
        self.check_running()?;
        let event = Event { seq: None, ..event };
        // That nobody listens is no failure.
        let clients = self.shared.ephemeral.send(Arc::new(Entry::new(Arc::new(event)))).unwrap_or(0);
        self.shared.tick();
        Ok(clients)
    }

    /// How many clients there are in this process.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.places().len()
    }

    fn check_running(&self) -> Result<()> {
        if self.shared.is_ended() { Err(Error::Stopped("feed")) } else { Ok(()) }
    }
}

/// What the handle, the service and the clients share.
struct Shared {
    provider: Arc<dyn Provider>,
    metrics: Metrics,
    ring: Mutex<ring::Ring>,
    /// Ticks when the ring has changed, an ephemeral event has come, or the feed has ended.
    grown: watch::Sender<u64>,
    ephemeral: broadcast::Sender<Arc<Entry>>,
    /// How far each client has come.
    places: Mutex<HashMap<u64, Arc<AtomicU64>>>,
    next_place: AtomicU64,
    come_or_gone: Notify,
    readers: Semaphore,
    is_ended: AtomicBool,
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, ring::Ring> {
        self.ring.lock()
    }

    fn places(&self) -> MutexGuard<'_, HashMap<u64, Arc<AtomicU64>>> {
        self.places.lock()
    }

    fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::SeqCst)
    }

    fn tick(&self) {
        self.grown.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
    }

    /// No client is told anything from now on.
    fn end(&self) {
        self.is_ended.store(true, Ordering::SeqCst);
        self.tick();
    }

    /// The least that any client has come to.
    fn furthest_behind(&self) -> Option<Seq> {
        self.places().values().map(|at| at.load(Ordering::Relaxed)).min()
    }
}

/// A client's entry among those that are counted. It goes with the client.
struct Place {
    shared: Arc<Shared>,
    number: u64,
    at: Arc<AtomicU64>,
}

impl Place {
    fn take(shared: Arc<Shared>) -> Self {
        let number = shared.next_place.fetch_add(1, Ordering::Relaxed);
        // Until its place is known it is not behind.
        let at = Arc::new(AtomicU64::new(Seq::MAX));
        shared.places().insert(number, Arc::clone(&at));
        shared.metrics.feed().clients.inc();
        shared.come_or_gone.notify_one();
        Self { shared, number, at }
    }

    fn move_to(&self, seq: Seq) {
        self.at.store(seq, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.places().remove(&self.number);
        self.shared.metrics.feed().clients.dec();
        self.shared.come_or_gone.notify_one();
    }
}
