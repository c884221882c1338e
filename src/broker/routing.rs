//! Who wants which type: the subscriptions, kept as documents, and the patterns compiled from them.
//!
//! A subscription is what a plugin or the application declared, with what an operator changed laid over it. Both are
//! kept, so that a redeployed plugin changes its declaration and leaves the operator's choices alone.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};

use crate::error::{Error, Result};
use crate::event::EventType;
use crate::pattern::PatternSet;
use crate::provider::{Document, Expect, Provider};
use crate::retry::RetryOverrides;
use crate::subscription::Subscription;

/// The collection of documents that holds subscriptions, by name.
const COLLECTION: &str = "subscriptions";

/// How many documents are read at once.
const PAGE: usize = 500;

/// How often a change is tried again when another instance changed the document at the same time.
const TRIES: usize = 10;

/// What an operator changes of a subscription. What is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubscriptionPatch {
    /// Whether deliveries wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// The most attempts at once in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroU32>,
    /// The most attempts per second in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<NonZeroU32>,
    /// Parts of the retry policy.
    #[serde(default)]
    pub retry: RetryOverrides,
    /// How long an attempt may take.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub timeout: Option<Duration>,
}

impl SubscriptionPatch {
    /// These changes, laid over earlier ones.
    fn over(self, earlier: &Self) -> Self {
        Self {
            paused: self.paused.or(earlier.paused),
            concurrency: self.concurrency.or(earlier.concurrency),
            rate: self.rate.or(earlier.rate),
            retry: self.retry.or(&earlier.retry),
            timeout: self.timeout.or(earlier.timeout),
        }
    }

    fn apply(&self, declared: &Subscription) -> Subscription {
        Subscription {
            paused: self.paused.unwrap_or(declared.paused),
            concurrency: self.concurrency.or(declared.concurrency),
            rate: self.rate.or(declared.rate),
            retry: self.retry.or(&declared.retry),
            timeout: self.timeout.or(declared.timeout),
            ..declared.clone()
        }
    }
}

/// The document of a subscription.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Stored {
    declared: Subscription,
    #[serde(default)]
    patch: SubscriptionPatch,
}

/// A subscription as it is in force.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) subscription: Subscription,
    stored: Stored,
    revision: u64,
}

impl Known {
    fn new(stored: Stored, revision: u64) -> Result<Arc<Self>> {
        let subscription = stored.patch.apply(&stored.declared);
        subscription.validate()?;
        Ok(Arc::new(Self { subscription, stored, revision }))
    }

    fn parse(name: &str, document: &Document) -> Result<Arc<Self>> {
        let stored = serde_json::from_slice(&document.value).map_err(|error| Error::Incompatible {
            what: format!("subscription {name}"),
            reason: format!("its document cannot be read: {error}").into(),
        })?;
        Self::new(stored, document.revision)
    }
}

/// Every subscription at one moment, and the set compiled when the first event asks.
#[derive(Default)]
struct Routes {
    known: BTreeMap<Arc<str>, Arc<Known>>,
    set: OnceLock<PatternSet<Arc<str>>>,
}

impl Routes {
    fn of(known: BTreeMap<Arc<str>, Arc<Known>>) -> Arc<Self> {
        Arc::new(Self { known, set: OnceLock::new() })
    }

    fn set(&self) -> Result<&PatternSet<Arc<str>>> {
        if let Some(set) = self.set.get() {
            return Ok(set);
        }
        let entries =
            self.known.values().map(|known| (&known.subscription.pattern, Arc::clone(&known.subscription.name)));
        let set = PatternSet::new(entries)?;
        Ok(self.set.get_or_init(|| set))
    }
}

/// Routes whose set is compiled.
pub(super) struct Compiled(Arc<Routes>);

impl Compiled {
    /// The names of the subscriptions that match.
    pub(super) fn matching(&self, event_type: &EventType) -> Arc<[Arc<str>]> {
        self.0.set.get().map(|set| set.matching(event_type)).unwrap_or_default()
    }
}

/// The subscriptions of all instances, as this one knows them.
pub(super) struct Router {
    routes: ArcSwap<Routes>,
    /// Held for reading from matching to append, and for writing while subscriptions change: once a change returns, no
    /// event is stored for the subscriptions that were.
    gate: RwLock<()>,
    /// Held by whoever changes subscriptions, so that changes come one after the other. Names the log that the
    /// subscriptions were last read beside.
    changing: Mutex<Option<Arc<str>>>,
}

impl Router {
    /// Reads what the provider keeps.
    pub(super) async fn load(provider: &dyn Provider) -> Result<Self> {
        let router = Self { routes: ArcSwap::default(), gate: RwLock::default(), changing: Mutex::default() };
        router.refresh(provider).await?;
        Ok(router)
    }

    /// Keeps subscriptions from changing while the guard lives.
    pub(super) async fn hold(&self) -> RwLockReadGuard<'_, ()> {
        match self.gate.try_read() {
            Ok(guard) => guard,
            Err(_) => self.gate.read().await,
        }
    }

    /// The names of the subscriptions that match.
    pub(super) fn matching(&self, event_type: &EventType) -> Result<Arc<[Arc<str>]>> {
        Ok(self.routes.load().set()?.matching(event_type))
    }

    /// The routes as they stand, by which every type can be matched. To be used while they are held.
    pub(super) fn compiled(&self) -> Result<Compiled> {
        let routes = self.routes.load_full();
        routes.set()?;
        Ok(Compiled(routes))
    }

    pub(super) fn all(&self) -> Vec<Arc<Known>> {
        self.routes.load().known.values().cloned().collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Known>> {
        self.routes.load().known.get(name).cloned()
    }

    /// Reads what other instances changed, and returns what is new or different here.
    pub(super) async fn refresh(&self, provider: &dyn Provider) -> Result<Changed> {
        let mut log = self.changing.lock().await;
        let epoch = provider.read(0, 0).await?.epoch;
        if log.as_ref().is_some_and(|log| *log != epoch) {
            self.restore(provider).await?;
        }
        *log = Some(epoch);
        let (old, mut known, mut changed) = (self.routes.load_full(), BTreeMap::new(), Changed::default());
        let mut after: Option<String> = None;
        loop {
            let page = provider.list_documents(COLLECTION, after.as_deref(), PAGE).await?;
            let last = page.len() < PAGE;
            for (name, document) in &page {
                let same = old.known.get(name.as_str()).filter(|known| known.revision == document.revision);
                let entry = match same {
                    Some(entry) => Arc::clone(entry),
                    None => Known::parse(name, document).inspect(|entry| changed.updated.push(Arc::clone(entry)))?,
                };
                known.insert(Arc::clone(&entry.subscription.name), entry);
            }
            after = page.into_iter().next_back().map(|(name, _)| name);
            if last {
                break;
            }
        }
        changed.removed = old.known.keys().filter(|name| !known.contains_key(*name)).cloned().collect();
        if !changed.updated.is_empty() || !changed.removed.is_empty() {
            self.install(known).await;
        }
        Ok(changed)
    }

    /// Keeps the subscriptions when the store was emptied under them: their handlers are still here, and nobody else would
    /// declare them again.
    async fn restore(&self, provider: &dyn Provider) -> Result<()> {
        let all = self.all();
        tracing::warn!(count = all.len(), "the store was made anew, without its events; keeping the subscriptions");
        for known in all {
            let name = &known.subscription.name;
            match provider.put_document(COLLECTION, name, document(name, &known.stored)?, Expect::Absent, None).await {
                Ok(_) | Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds or replaces a declaration. Says whether the subscription is new.
    pub(super) async fn declare(&self, provider: &dyn Provider, declared: Subscription) -> Result<(Arc<Known>, bool)> {
        declared.validate()?;
        let _changing = self.changing.lock().await;
        let name = Arc::clone(&declared.name);
        let mut is_new = false;
        let known = self
            .write(provider, &name, |current| {
                is_new = current.is_none();
                let patch = current.map(|stored| stored.patch).unwrap_or_default();
                Ok(Stored { declared: declared.clone(), patch })
            })
            .await?;
        Ok((known, is_new))
    }

    /// Lays an operator's changes over a subscription.
    pub(super) async fn patch(
        &self,
        provider: &dyn Provider,
        name: &str,
        patch: SubscriptionPatch,
    ) -> Result<Arc<Known>> {
        let _changing = self.changing.lock().await;
        self.write(provider, name, |current| {
            let stored = current.ok_or_else(|| Error::not_found("subscription", name))?;
            let patch = patch.clone().over(&stored.patch);
            patch.apply(&stored.declared).validate()?;
            Ok(Stored { patch, ..stored })
        })
        .await
    }

    /// Removes a subscription.
    pub(super) async fn remove(&self, provider: &dyn Provider, name: &str) -> Result<Arc<Known>> {
        let _changing = self.changing.lock().await;
        let removed = self.find(name).ok_or_else(|| Error::not_found("subscription", name))?;
        provider.delete_document(COLLECTION, name, Expect::Any).await?;
        let mut known = self.routes.load().known.clone();
        known.remove(name);
        self.install(known).await;
        Ok(removed)
    }

    /// Changes the document by compare-and-swap and takes the result over. The caller holds `changing`.
    async fn write(
        &self,
        provider: &dyn Provider,
        name: &str,
        mut change: impl FnMut(Option<Stored>) -> Result<Stored>,
    ) -> Result<Arc<Known>> {
        for _ in 0..TRIES {
            let current = provider.document(COLLECTION, name).await?;
            let parsed = current.as_ref().map(|document| Known::parse(name, document)).transpose()?;
            let stored = change(parsed.as_ref().map(|known| known.stored.clone()))?;
            if let Some(known) = parsed.filter(|known| known.stored == stored) {
                return Ok(self.take_over(known).await);
            }
            let expect = current.map_or(Expect::Absent, |document| Expect::Revision(document.revision));
            match provider.put_document(COLLECTION, name, document(name, &stored)?, expect, None).await {
                Ok(revision) => return Ok(self.take_over(Known::new(stored, revision)?).await),
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::conflict("subscription", name, "others keep changing it at the same time; try again"))
    }

    async fn take_over(&self, known: Arc<Known>) -> Arc<Known> {
        let mut all = self.routes.load().known.clone();
        all.insert(Arc::clone(&known.subscription.name), Arc::clone(&known));
        self.install(all).await;
        known
    }

    /// Makes `known` what events are matched against, once no event is on its way with the old.
    async fn install(&self, known: BTreeMap<Arc<str>, Arc<Known>>) {
        let _gate = self.gate.write().await;
        self.routes.store(Routes::of(known));
    }
}

fn document(name: &str, stored: &Stored) -> Result<Bytes> {
    let value = serde_json::to_vec(stored)
        .map_err(|error| Error::invalid("subscription", name, format!("has no JSON form: {error}")))?;
    Ok(value.into())
}

/// What a refresh found.
#[derive(Default)]
pub(super) struct Changed {
    pub(super) updated: Vec<Arc<Known>>,
    pub(super) removed: Vec<Arc<str>>,
}
