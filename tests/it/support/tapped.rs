//! A store behind which the store can be exchanged, whose reads are counted and whose claims are noted down.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tidegate::delivery::EventDetail;
use tidegate::event::Seq;
use tidegate::provider::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, DeadLetterFilter, DeadLetterPage, Document,
    Documents, EventFilter, EventPage, Expect, LeaseKey, LogPage, Provider, ProviderStats, Retention, RouteRequest,
    Routed, Settled, Settlement,
};
use tidegate::{Error, Result};
use tokio::sync::watch;

/// The subscriptions of a claim, and how much room each had.
pub(crate) type Claim = Vec<(Arc<str>, usize)>;

/// Hands everything on to another store.
pub(crate) struct Tapped {
    inner: RwLock<Arc<dyn Provider>>,
    reads: AtomicUsize,
    /// How many of the next reads fail.
    failures: AtomicUsize,
    /// Whether the store says that it gains from large calls.
    groups: AtomicBool,
    claims: Mutex<Vec<Claim>>,
}

impl Tapped {
    pub(crate) fn new(inner: Arc<dyn Provider>) -> Arc<Self> {
        let groups = inner.capabilities().grouping.into();
        let (reads, failures, claims) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::default());
        Arc::new(Self { inner: RwLock::new(inner), reads, failures, groups, claims })
    }

    /// From now on it says that it gains from large calls.
    pub(crate) fn group(&self) {
        self.groups.store(true, Ordering::SeqCst);
    }

    /// What was claimed since this was last asked.
    pub(crate) fn claims(&self) -> Vec<Claim> {
        std::mem::take(&mut self.claims.lock().unwrap())
    }

    /// From now on it is another store.
    pub(crate) fn exchange(&self, other: Arc<dyn Provider>) {
        *self.inner.write().unwrap() = other;
    }

    /// How often the log was read.
    pub(crate) fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }

    /// The next `count` reads of the log fail.
    pub(crate) fn fail(&self, count: usize) {
        self.failures.store(count, Ordering::SeqCst);
    }

    fn inner(&self) -> Arc<dyn Provider> {
        Arc::clone(&self.inner.read().unwrap())
    }
}

#[async_trait]
impl Provider for Tapped {
    fn capabilities(&self) -> Capabilities {
        Capabilities { grouping: self.groups.load(Ordering::SeqCst), ..self.inner().capabilities() }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        self.inner().append(batch).await
    }

    async fn route(&self, request: &RouteRequest<'_>) -> Result<Routed> {
        self.inner().route(request).await
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        let claim = request.wants.iter().map(|want| (Arc::clone(&want.subscription), want.room)).collect();
        self.claims.lock().unwrap().push(claim);
        self.inner().claim(request).await
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        self.inner().renew(keys, lease).await
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        self.inner().settle(batch).await
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let fewer = |left: usize| left.checked_sub(1);
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer).is_ok() {
            return Err(Error::store("tapped", "read the log", "out of order"));
        }
        self.inner().read(after, max).await
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        self.inner().get(id).await
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        self.inner().list(filter).await
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.inner().dead_letters(filter).await
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        self.inner().amend(amendment).await
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        self.inner().prune(retention).await
    }

    async fn stats(&self) -> Result<ProviderStats> {
        self.inner().stats().await
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.inner().wake()
    }

    async fn close(&self) -> Result<()> {
        self.inner().close().await
    }
}

#[async_trait]
impl Documents for Tapped {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.inner().document(collection, key).await
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        self.inner().put_document(collection, key, value, expect, ttl).await
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        self.inner().delete_document(collection, key, expect).await
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.inner().list_documents(collection, after, max).await
    }
}
