//! Events in NATS JetStream: one stream as the log of a state machine that every process runs.
//!
//! What is done stands in the stream as an entry (`entry`), and takes effect in its order: every process applies the same
//! entries to the same state (`core`), which decides every one alike. So an entry is a transaction, and the stream's order
//! is the only lock. Whoever sends an entry waits until his own process has applied it (`send`, `follow`). Snapshots of the
//! state let what is behind them be removed, and a process begin without reading it all (`snapshot`). Payloads of older
//! events are left in the stream, and fetched when they are asked for (`fetch`).

mod core;
mod entry;
mod examine;
mod fetch;
mod follow;
mod link;
mod open;
mod prune;
mod send;
mod snapshot;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use bytesize::ByteSize;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::core::{Core, Outcome};
use self::entry::Move;
use self::link::Link;
use self::open::Place;
use super::finding::Opening;
use super::state::as_micros;
use super::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, Clock, DeadLetterFilter, DeadLetterPage,
    Document, Documents, Durability, EventFilter, EventPage, Expect, Inbox, LeaseKey, LogPage, Provider, ProviderStats,
    Retention, RouteRequest, Routed, Settled, Settlement,
};
use crate::delivery::EventDetail;
use crate::error::{Error, Result};
use crate::event::Seq;

/// Where the server is, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// `nats://[USER:PASSWORD@]HOST[:PORT][,HOST…][?namespace=NAME]`, or `tls://` for TLS. In the configuration it is
    /// `provider`.
    #[serde(skip, default = "Options::default_url")]
    pub url: String,
    /// The stream is `tidegate-NAMESPACE`, its subjects begin with `tidegate.NAMESPACE.`. Instances that share it share
    /// everything. The URL's wins.
    #[serde(alias = "stream_name")]
    pub namespace: String,
    /// Where the server keeps the streams that are made.
    pub storage: Storage,
    /// On how many servers of a cluster the streams that are made are kept: 1 to 5.
    pub replicas: usize,
    /// The most bytes that the stream that is made may have; publishing is refused beyond nine tenths of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<ByteSize>,
    /// Who logs in, in place of the URL's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// With what, in place of the URL's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// The token that the server wants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// A file with a user's JWT and seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<PathBuf>,
    /// What an acknowledged write survives, where it is not what the stream's storage means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
    /// How long making a connection may take.
    #[serde(with = "friendly::required")]
    pub connect_timeout: Duration,
    /// How long an answer may take.
    #[serde(with = "friendly::required")]
    pub response_timeout: Duration,
    /// The original broker's subjects. Not used: subjects follow from the namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<String>,
    /// The original broker's bound on its stream. Not used, since it drops messages that nobody has read.
    #[serde(with = "friendly::optional", skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Duration>,
}

/// Where a server keeps a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// In files.
    #[default]
    File,
    /// In memory.
    Memory,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: Self::default_url(),
            namespace: "default".to_owned(),
            storage: Storage::default(),
            replicas: 1,
            max_bytes: None,
            username: None,
            password: None,
            token: None,
            credentials: None,
            durability: None,
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(10),
            subjects: Vec::new(),
            max_age: None,
        }
    }
}

impl Options {
    fn default_url() -> String {
        "nats://127.0.0.1:4222".to_owned()
    }
}

/// The store in a NATS server.
pub struct NatsProvider {
    shared: Arc<Shared>,
    follower: AbortHandle,
}

/// What calls and the task that follows the stream have in common.
struct Shared {
    link: Link,
    core: Mutex<Core>,
    /// Who waits for which of this process's entries, and how often the connection had broken when it was sent.
    waiting: Mutex<HashMap<u64, (u64, oneshot::Sender<Outcome>)>>,
    /// Names this process's entries.
    session: u64,
    count: AtomicU64,
    /// The place of the last message that was applied.
    applied: watch::Sender<u64>,
    wake: watch::Sender<u64>,
    /// The server's time, in microseconds since the Unix epoch, and when it was that.
    time: Mutex<(i64, Instant)>,
    /// The server's time when the stream was last followed from, between two readings of this machine's clock.
    clocks: Mutex<(i64, i64, i64)>,
    /// In place of the stream's time.
    clock: Option<Clock>,
    /// Has the stream followed anew.
    look: Notify,
    /// Bytes in the stream, roughly.
    bytes: AtomicU64,
    /// The most that it may have; 0 for no bound.
    max_bytes: AtomicU64,
    /// Whether the stream is kept in memory, which is for whoever made it to say.
    is_in_memory: AtomicBool,
    /// Whether events were refused for want of room, since room was last made.
    is_full: AtomicBool,
    /// Held while a snapshot is made.
    saving: tokio::sync::Mutex<()>,
    /// The size of the last snapshot that this process made or read.
    saved_bytes: AtomicU64,
}

impl NatsProvider {
    /// Connects, makes the streams where there are none, and reads what they hold.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `provider` or the option when the URL, the namespace, or a stream as it stands cannot be
    /// used, [`Error::Incompatible`] when a newer version has written, and [`Error::Store`] when the server cannot be
    /// reached or refuses.
    pub async fn open(options: Options) -> Result<Self> {
        Self::build(options, Opening::Migrate, None).await
    }

    /// As [`open`](Self::open), or without making anything.
    pub(crate) async fn open_for(options: Options, opening: Opening) -> Result<Self> {
        Self::build(options, opening, None).await
    }

    /// As [`open`](Self::open), with another clock than the server's. All instances of a namespace should agree on it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        Self::build(options, Opening::Migrate, Some(clock)).await
    }

    async fn build(options: Options, opening: Opening, clock: Option<Clock>) -> Result<Self> {
        let place = Place::read(&options)?;
        // Fails when something else has chosen before, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        if options.max_age.is_some() {
            tracing::warn!(
                "nats.max_age is not used, since it would drop events that nobody has handled; see broker.keep_for"
            );
        }
        let (changed, changes) = tokio::sync::mpsc::channel(1);
        let link = Link::connect(place, options, changed).await?;
        if opening == Opening::AsItIs {
            link.check_made().await?;
        }
        let server = link.client.server_info();
        let shared = Arc::new(Shared {
            core: Mutex::new(Core::new(0)),
            waiting: Mutex::default(),
            session: rand::random(),
            count: AtomicU64::new(0),
            applied: watch::Sender::new(0),
            wake: watch::Sender::new(0),
            time: Mutex::new((crate::event::now().as_microsecond(), Instant::now())),
            clocks: Mutex::default(),
            clock,
            look: Notify::new(),
            bytes: AtomicU64::new(0),
            max_bytes: AtomicU64::new(0),
            is_in_memory: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            saving: tokio::sync::Mutex::default(),
            saved_bytes: AtomicU64::new(0),
            link,
        });
        let follower = follow::start(&shared, changes).await?;
        tracing::info!(server = %shared.link.server, version = %server.version, durability = ?shared.durability(), "connected");
        Ok(Self { shared, follower })
    }
}

impl Shared {
    fn durability(&self) -> Durability {
        let is_in_memory = self.is_in_memory.load(Ordering::Relaxed);
        self.link.options.durability.unwrap_or(if is_in_memory { Durability::Process } else { Durability::Os })
    }

    /// The server's time, roughly.
    fn server_time(&self) -> i64 {
        let (time, at) = *self.time.lock();
        time.saturating_add(as_micros(at.elapsed()))
    }

    /// The server's time was this a moment ago.
    fn meet(&self, time: i64) {
        let mut last = self.time.lock();
        let now = Instant::now();
        if last.0.saturating_add(as_micros(now - last.1)) < time {
            *last = (time, now);
        }
    }

    /// The store's time, as far as it is known here.
    fn now(&self) -> i64 {
        self.clock.as_ref().map_or_else(|| self.server_time(), |clock| clock())
    }

    /// Runs `work` on the state, once it is as the stream was when this was called, at the present instant.
    async fn read<T>(&self, action: &str, work: impl FnOnce(&Core, i64) -> T) -> Result<T> {
        self.catch_up(action).await?;
        let now = self.now();
        let core = self.core.lock();
        Ok(work(&core, now.max(core.now)))
    }

    fn tick(&self) {
        self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
    }
}

impl Drop for NatsProvider {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// What an entry leads to that was not whole, or is of another kind than was sent.
fn void(link: &Link, action: &str) -> Error {
    link.failed(action, "not all of it reached the stream in time: nothing was changed")
}

macro_rules! expect_outcome {
    ($self:ident, $action:expr, $pieces:expr, $kind:ident) => {{
        let action = $action;
        match $self.shared.send(&action, $pieces).await? {
            Outcome::$kind(answer) => Ok(answer),
            _ => Err(void(&$self.shared.link, &action)),
        }
    }};
}

#[async_trait]
impl Provider for NatsProvider {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            provider: "nats",
            durability: self.shared.durability(),
            grouping: true,
            shared: true,
            transactions: true,
            key_ordering: true,
            push: true,
            inbox: Inbox::None,
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        self.shared.link.check_open()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.check_room()?;
        let pieces = batch.iter().map(entry::event_piece).collect();
        expect_outcome!(self, format!("append {} events", batch.len()), pieces, Appended)
    }

    async fn route(&self, _request: &RouteRequest<'_>) -> Result<Routed> {
        self.shared.link.check_open().map(|()| Routed::default())
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        let action = format!("claim for {} subscriptions", request.wants.len());
        let waits = |core: &Core, now: i64| (core.state.next_time(request), now);
        let (time, now) = self.shared.read(&action, waits).await?;
        if time.is_none_or(|time| time > now) {
            let next_due = time.map(|time| entry::span(time.saturating_sub(now)));
            return Ok(Claimed { next_due, ..Claimed::default() });
        }
        let pieces = vec![Move::claim(request, rand::random()).piece()];
        let claimed: Result<Claimed> = expect_outcome!(self, action, pieces, Claimed);
        self.shared.with_events(claimed?).await
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        let renewal = Move::Renew { keys: keys.iter().cloned().map(Into::into).collect(), lease: as_micros(lease) };
        expect_outcome!(self, format!("renew {} leases", keys.len()), vec![renewal.piece()], Renewed)
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        self.shared.link.check_open()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let action = format!("settle {} attempts", batch.len());
        let (mut pieces, settlement) = Move::settle(batch);
        pieces.push(settlement.piece());
        expect_outcome!(self, action, pieces, Settled)
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        let page = |core: &Core, _| core.state.read(after, max, Arc::clone(&core.epoch));
        let page = self.shared.read("read the log", page).await?;
        let events = self.shared.full(page.events).await?;
        Ok(LogPage { events: events.into_iter().flatten().collect(), ..page })
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        let found = self.shared.read("get an event", |core, _| core.state.get(id)).await?;
        let Some(EventDetail { mut record, deliveries }) = found else { return Ok(None) };
        let seq = record.event.seq.unwrap_or_default();
        let Some(event) = self.shared.full(vec![Arc::clone(&record.event)]).await?.pop().flatten() else {
            return Ok(None);
        };
        record.event = event;
        let deliveries = deliveries.into_iter().map(|delivery| (seq, delivery)).collect();
        let deliveries = self.shared.with_records(deliveries).await?;
        Ok(Some(EventDetail { record, deliveries }))
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        let page = self.shared.read("list events", |core, _| core.state.list(filter)).await?;
        let events = page.records.iter().map(|record| Arc::clone(&record.event)).collect();
        let events = self.shared.full(events).await?;
        let records = page.records.into_iter().zip(events);
        let records =
            records.filter_map(|(record, event)| Some(super::super::delivery::EventRecord { event: event?, ..record }));
        Ok(EventPage { records: records.collect(), ..page })
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        let page = self.shared.read("list dead letters", |core, _| core.state.dead_letters(filter)).await?;
        let events = page.letters.iter().map(|letter| Arc::clone(&letter.event.event)).collect();
        let events = self.shared.full(events).await?;
        let (mut records, mut deliveries) = (Vec::new(), Vec::new());
        for (mut letter, event) in page.letters.into_iter().zip(events) {
            if let Some(event) = event {
                deliveries.push((event.seq.unwrap_or_default(), letter.delivery));
                letter.event.event = event;
                records.push(letter.event);
            }
        }
        let deliveries = self.shared.with_records(deliveries).await?;
        let letters = records.into_iter().zip(deliveries);
        let letters = letters.map(|(event, delivery)| super::DeadLetter { event, delivery }).collect();
        Ok(DeadLetterPage { letters, ..page })
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        let is_erasure = matches!(amendment, Amendment::Erase { .. });
        let pieces = vec![Move::amend(amendment).piece()];
        let changed: Result<u64> = expect_outcome!(self, "amend".to_owned(), pieces, Changed);
        let changed = changed?;
        if is_erasure && changed > 0 {
            // Only what is behind a snapshot can be removed.
            self.shared.save().await?;
        }
        Ok(changed)
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        if !self.shared.is_prunable(retention).await? {
            self.shared.tidy().await;
            return Ok(0);
        }
        let prune = Move::Prune { age: retention.max_age.map(as_micros), events: retention.max_events };
        let pruned: Result<u64> = expect_outcome!(self, "prune".to_owned(), vec![prune.piece()], Changed);
        let pruned = pruned?;
        self.shared.tidy().await;
        Ok(pruned)
    }

    async fn stats(&self) -> Result<ProviderStats> {
        self.shared.figures().await
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.shared.wake.subscribe()
    }

    async fn close(&self) -> Result<()> {
        if self.shared.link.check_open().is_err() {
            return Ok(());
        }
        self.shared.tidy().await;
        if self.shared.link.close() {
            self.follower.abort();
            self.shared.waiting.lock().clear();
            self.shared.applied.send_modify(|_| {});
            self.shared.tick();
            drop(self.shared.link.client.drain().await);
        }
        Ok(())
    }
}

#[async_trait]
impl Documents for NatsProvider {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.shared.read("read a document", |core, now| core.state.shelf.get(collection, key, now)).await
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        self.change_document(collection, key, Some(value), expect, ttl).await
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        self.change_document(collection, key, None, expect, None).await.map(|was_there| was_there > 0)
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        let list = |core: &Core, now| core.state.shelf.list(collection, after, max, now);
        self.shared.read("list documents", list).await
    }
}

impl NatsProvider {
    /// The new revision; for a removal whether there was one.
    async fn change_document(
        &self,
        collection: &str,
        key: &str,
        value: Option<Bytes>,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        super::rules::check_document_name(collection, key)?;
        let change = Move::document(collection, key, value, expect, ttl);
        let changed: Result<Result<u64>> =
            expect_outcome!(self, "change a document".to_owned(), vec![change.piece()], Document);
        changed?
    }
}

#[cfg(test)]
mod tests;
