//! Events in memory: the reference for every other store, and gone with the process.
//!
//! One lock around one state, never held across an await. There is no task: what is old goes when somebody calls. Time
//! is tokio's, so that tests which pause it pause the store too.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use super::state::{State, as_micros};
use super::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, Clock, DeadLetterFilter, DeadLetterPage,
    Document, Documents, Durability, EventFilter, EventPage, Examine, Expect, Finding, Inbox, LeaseKey, LogPage,
    Provider, ProviderStats, Retention, RouteRequest, Routed, Settled, Settlement,
};
use crate::delivery::EventDetail;
use crate::error::{Error, Result};
use crate::event::Seq;

/// How much memory may be used, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The most events kept. The oldest finished ones make room for a new one, up to 32 at once and of 64 not more than one;
    /// when all are open, publishing is refused.
    pub max_events: u64,
    /// Finished events go when they are older.
    #[serde(with = "friendly::required")]
    pub max_age: Duration,
    /// How often to look for such.
    #[serde(with = "friendly::required")]
    pub cleanup_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_events: 10_000,
            max_age: Duration::from_secs(24 * 60 * 60),
            cleanup_interval: Duration::from_secs(5 * 60),
        }
    }
}

/// How often a caller looks whether the lock is free before it goes to sleep: for a few microseconds, as long as a batch
/// takes. To sleep and to be woken takes longer than that.
const LOOKS: usize = 100;

/// The store in memory.
pub struct MemoryProvider {
    options: Options,
    /// `None` once closed.
    contents: Mutex<Option<Contents>>,
    wake: watch::Sender<u64>,
    clock: Clock,
    epoch: Arc<str>,
}

struct Contents {
    state: State,
    /// When to look for old events next.
    next_cleanup: i64,
}

impl MemoryProvider {
    /// An empty store.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `max_events` when it is 0.
    pub fn open(options: Options) -> Result<Self> {
        let (start, wall) = (Instant::now(), crate::event::now().as_microsecond());
        Self::with_clock(options, Arc::new(move || wall.saturating_add(as_micros(start.elapsed()))))
    }

    /// As [`open`](Self::open), with another clock than tokio's.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        if options.max_events == 0 {
            return Err(Error::invalid("max_events", "0", "must be at least 1"));
        }
        let state = State::new(options.max_events, rand::random());
        let contents = Mutex::new(Some(Contents { state, next_cleanup: 0 }));
        let epoch = uuid::Uuid::new_v4().to_string().into();
        Ok(Self { contents, wake: watch::Sender::new(0), clock, epoch, options })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Contents>> {
        for _ in 0..LOOKS {
            if let Some(guard) = self.contents.try_lock() {
                return guard;
            }
            std::hint::spin_loop();
        }
        self.contents.lock()
    }

    /// Runs `work` on the state at the present instant.
    fn enter<T>(&self, work: impl FnOnce(&mut State, i64) -> T) -> Result<T> {
        let mut guard = self.lock();
        // Read under the lock: time must go on in the order in which calls change the state, or a claim could meet a
        // delivery that is due in its future and drop the hint of it.
        let now = (self.clock)();
        let Contents { state, next_cleanup } = guard.as_mut().ok_or(Error::Stopped("provider"))?;
        if now >= *next_cleanup {
            *next_cleanup = now.saturating_add(as_micros(self.options.cleanup_interval));
            state.log.expire(now.saturating_sub(as_micros(self.options.max_age)));
            state.shelf.expire(now);
        }
        let answer = work(state, now);
        let gone = state.log.take_gone();
        drop(guard);
        drop(gone);
        Ok(answer)
    }

    /// As [`enter`](Self::enter), for work after which there may be something to claim or to read.
    fn change<T>(&self, work: impl FnOnce(&mut State, i64) -> T) -> Result<T> {
        let answer = self.enter(work)?;
        if self.wake.receiver_count() > 0 {
            self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
        }
        Ok(answer)
    }
}

#[async_trait]
impl Provider for MemoryProvider {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            provider: "memory",
            durability: Durability::Process,
            grouping: false,
            shared: false,
            transactions: true,
            key_ordering: true,
            push: true,
            inbox: Inbox::None,
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        self.change(|state, now| state.append(batch, now))?
    }

    async fn route(&self, _request: &RouteRequest<'_>) -> Result<Routed> {
        self.enter(|_, _| Routed::default())
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        self.enter(|state, now| state.claim(request, now))
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        self.enter(|state, now| keys.iter().map(|key| state.renew(key, lease, now)).collect())
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        self.change(|state, now| batch.into_iter().map(|settlement| state.settle(settlement, now)).collect())
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.enter(|state, _| state.read(after, max, Arc::clone(&self.epoch)))
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        // Nothing is looked up more often: no clock is read for it.
        Ok(self.lock().as_ref().ok_or(Error::Stopped("provider"))?.state.get(id))
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        self.enter(|state, _| state.list(filter))
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.enter(|state, _| state.dead_letters(filter))
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        self.change(|state, now| state.amend(&amendment, now))
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        self.enter(|state, now| {
            let old = retention.max_age.map_or(0, |age| state.log.expire(now.saturating_sub(as_micros(age))));
            let many = retention.max_events.map_or(0, |max| state.log.shrink(max));
            state.shelf.expire(now);
            old + many
        })
    }

    async fn stats(&self) -> Result<ProviderStats> {
        let mut provider_specific = match serde_json::to_value(&self.options) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        self.enter(|state, _| {
            provider_specific.insert("evictions".to_owned(), state.evictions.into());
            let (events, deliveries) = (state.log.events, state.log.deliveries);
            ProviderStats {
                provider_type: "memory",
                total_events: state.log.total(),
                pending_events: events.pending,
                processing_events: events.processing,
                completed_events: events.completed,
                failed_events: events.failed,
                pending_deliveries: deliveries.pending,
                processing_deliveries: deliveries.processing,
                dead_letters: deliveries.failed,
                head_seq: state.log.head,
                floor_seq: state.log.floor(),
                provider_specific,
            }
        })
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn close(&self) -> Result<()> {
        self.contents.lock().take();
        self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
        Ok(())
    }
}

#[async_trait]
impl Examine for MemoryProvider {
    async fn examine(&self) -> Result<Vec<Finding>> {
        Ok(vec![Finding::ok("memory", "nothing is kept: what is published is gone with the process")])
    }
}

#[async_trait]
impl Documents for MemoryProvider {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.enter(|state, now| state.shelf.get(collection, key, now))
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        self.enter(|state, now| {
            state.shelf.check(collection, key, expect, now)?;
            let expires = ttl.map(|ttl| now.saturating_add(as_micros(ttl)));
            Ok(state.shelf.put(collection, key, value, expires))
        })?
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        self.enter(|state, now| {
            let was_there = state.shelf.check(collection, key, expect, now)?;
            state.shelf.remove(collection, key);
            Ok(was_there)
        })?
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.enter(|state, now| state.shelf.list(collection, after, max, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod conformance {
        use std::sync::atomic::{AtomicI64, Ordering};

        use super::*;
        use crate::provider::conformance::Fixture;

        struct Memory(Arc<AtomicI64>);

        #[async_trait]
        impl Fixture for Memory {
            async fn open(&self) -> Arc<dyn Provider> {
                let time = Arc::clone(&self.0);
                let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
                Arc::new(MemoryProvider::with_clock(Options::default(), clock).unwrap())
            }

            fn reopens(&self) -> Result<(), &'static str> {
                Err("what is in memory is gone with its provider")
            }

            async fn advance(&self, by: Duration) {
                self.0.fetch_add(as_micros(by), Ordering::Relaxed);
            }
        }

        conformance_tests!(Memory(Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000))));
    }
    use crate::delivery::{Attempt, Next, Trace, Verdict};
    use crate::event::{Event, EventType, Payload, Source};
    use crate::provider::{Lease, Want};
    use crate::subscription::Ordering;

    fn appends(count: usize, subscriptions: &[&str]) -> Vec<Append> {
        let names: Arc<[Arc<str>]> = subscriptions.iter().map(|&name| Arc::from(name)).collect();
        let event_type = EventType::parse("a.b.c").unwrap();
        let event = || Event::new(Source::System, event_type.clone(), Payload::default());
        (0..count).map(|_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&names) }).collect()
    }

    async fn claim(provider: &MemoryProvider, room: usize) -> Vec<Lease> {
        let want = Want { subscription: "s".into(), room, ordering: Ordering::None };
        let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] };
        provider.claim(&request).await.unwrap().leases
    }

    fn success(lease: Lease) -> Settlement {
        let attempt = Attempt {
            number: lease.number,
            verdict: Verdict::Ok,
            started_at: crate::event::now(),
            duration_us: 1,
            worker: "w".into(),
            error: None,
            reply: None,
            trace: Trace::default(),
        };
        let attempt = Some(attempt);
        Settlement { key: lease.key, next: Next::Complete, attempt, published: Vec::new(), writes: Vec::new() }
    }

    fn with_max(max_events: u64) -> MemoryProvider {
        MemoryProvider::open(Options { max_events, ..Options::default() }).unwrap()
    }

    async fn evictions(provider: &MemoryProvider) -> serde_json::Value {
        provider.stats().await.unwrap().provider_specific["evictions"].clone()
    }

    /// BEHAVIOURS E5.
    #[tokio::test]
    async fn the_oldest_finished_events_make_room_for_new_ones() {
        let provider = with_max(3);
        let batches = appends(5, &[]);
        let ids: Vec<_> = batches.iter().map(|append| append.event.id.clone()).collect();
        for append in batches {
            provider.append(vec![append]).await.unwrap();
        }
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(provider.get(id.as_str()).await.unwrap().is_some(), at >= 2, "{at}");
        }
        assert_eq!(evictions(&provider).await, 2);
        assert_eq!(provider.read(0, 10).await.unwrap().floor, 3);
    }

    #[tokio::test]
    async fn open_events_are_never_evicted_and_a_full_store_refuses_whole_batches() {
        let provider = with_max(3);
        provider.append(appends(2, &["s"])).await.unwrap();
        provider.append(appends(4, &[])).await.unwrap();
        let refused = provider.append(appends(2, &["s"])).await.unwrap_err();
        assert!(matches!(refused, Error::Overloaded { .. }), "{refused}");
        let stats = provider.stats().await.unwrap();
        assert_eq!((stats.pending_events, stats.total_events, stats.head_seq), (2, 3, 6));
        let settlements = claim(&provider, 1).await.into_iter().map(success).collect();
        provider.settle(settlements).await.unwrap();
        provider.append(appends(2, &["s"])).await.unwrap();
        assert_eq!(provider.stats().await.unwrap().pending_events, 3);
    }

    /// BEHAVIOURS E6.
    #[tokio::test(start_paused = true)]
    async fn the_cleanup_removes_finished_events_only() {
        let provider = MemoryProvider::open(Options::default()).unwrap();
        provider.append(appends(1, &["s"])).await.unwrap();
        provider.append(appends(1, &[])).await.unwrap();
        tokio::time::advance(Duration::from_secs(25 * 60 * 60)).await;
        let stats = provider.stats().await.unwrap();
        assert_eq!((stats.pending_events, stats.total_events), (1, 1));
    }

    /// A straggler must not keep the places of all that came after it alive.
    #[tokio::test]
    async fn one_old_open_event_does_not_hold_memory_for_those_after_it() {
        let provider = with_max(2_000);
        provider.append(appends(1, &["s"])).await.unwrap();
        for _ in 0..100 {
            provider.append(appends(500, &[])).await.unwrap();
        }
        assert!(provider.enter(|state, _| state.log.places()).unwrap() < 10_000);
        assert_eq!(claim(&provider, 10).await.len(), 1);
        let seqs: Vec<_> = provider.read(0, 3).await.unwrap().events.iter().map(|event| event.seq.unwrap()).collect();
        let next = seqs[1];
        assert_eq!(seqs, [1, next, next + 1]);
        // Up to 32 make room for one.
        assert!((48_003..48_003 + 32).contains(&next), "{next}");
    }

    /// Where nearly all are open, what has just finished is not swept out with the oldest.
    #[tokio::test]
    async fn an_event_among_many_open_ones_stays_until_older_finished_ones_are_gone() {
        let provider = with_max(3_000);
        provider.append(appends(2_990, &["s"])).await.unwrap();
        let batches = appends(30, &[]);
        let ids: Vec<_> = batches.iter().map(|append| append.event.id.clone()).collect();
        for append in batches {
            provider.append(vec![append]).await.unwrap();
        }
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(provider.get(id.as_str()).await.unwrap().is_some(), at >= 20, "{at}");
        }
    }

    /// BEHAVIOURS E5: there are never more than may be, and never many fewer.
    /// When the first of a key ends, the next one is lined up once more before later ones of other keys.
    #[tokio::test]
    async fn a_delivery_that_stands_in_line_twice_is_leased_once() {
        let provider = with_max(10);
        let want = |room| Want { subscription: "s".into(), room, ordering: Ordering::Key };
        let claim = async |room| {
            let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want(room)] };
            provider.claim(&request).await.unwrap().leases
        };
        assert!(claim(1).await.is_empty(), "in the order of keys from now on");
        let mut batch = appends(3, &["s"]);
        for (append, key) in batch.iter_mut().zip(["a", "a", "b"]) {
            Arc::make_mut(&mut append.event).key = Some(key.into());
        }
        provider.append(batch).await.unwrap();
        provider.settle(claim(1).await.into_iter().map(success).collect()).await.unwrap();
        let seqs: Vec<_> = claim(10).await.iter().map(|lease| lease.key.seq).collect();
        assert_eq!(seqs, [2, 3]);
    }

    #[tokio::test]
    async fn few_more_go_than_have_to() {
        for (max, at_once) in [(63, 1), (130, 2), (10_000, 32)] {
            let provider = with_max(max);
            let mut kept = Vec::new();
            for append in appends(usize::try_from(max).unwrap() + 200, &[]) {
                provider.append(vec![append]).await.unwrap();
                kept.push(provider.stats().await.unwrap().total_events);
            }
            let (first, full) = kept.split_at(usize::try_from(max).unwrap());
            assert_eq!(first.last(), Some(&max));
            assert_eq!((full.iter().min(), full.iter().max()), (Some(&(max + 1 - at_once)), Some(&max)));
            let gone = max + 200 - kept.last().unwrap();
            assert_eq!(evictions(&provider).await, gone);
        }
    }
}
