//! The plugins that are loaded: candidates made from bytes, one active version per name, swapped in one step.
//!
//! Where the bytes come from is not known here, and neither is a broker or a store: a plugin is a [`Handler`] under a
//! name, and whoever serves binds its subscriptions.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use parking_lot::Mutex;
use semver::Version;
use serde::Serialize;

use super::component::{Interface, digest};
use super::engine::{Engine, Settings};
use super::instance::Prepared;
use super::limits::Limits;
use super::load::{Loaded, Refused, load};
use super::manifest::Manifest;
use super::options::Options;
use crate::delivery::{Fault, Verdict};
use crate::error::{Error, Result};
use crate::handler::{Call, Handler, Outcome};
use crate::metrics::{Metrics, PluginMetrics};

/// Runs plugins. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Engine>,
    options: Options,
    metrics: Option<Metrics>,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
    /// The last candidate of each origin that was refused and not yet replaced.
    refused: Mutex<BTreeMap<String, Refusal>>,
}

/// A name, and the version that is called by it.
struct Slot {
    name: String,
    active: ArcSwapOption<Plugin>,
}

/// One version of a plugin, ready to be called. It stays usable when it is no longer the active one.
pub struct Plugin {
    engine: Arc<Engine>,
    prepared: Prepared,
    manifest: Arc<Manifest>,
    interface: Interface,
    size: usize,
    /// Since when it is called by its name; until then, when it was loaded.
    since: Timestamp,
    metrics: Option<PluginMetrics>,
}

/// A plugin as lists show it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PluginStatus {
    /// Its name; the file's where a refused candidate has none.
    pub name: String,
    /// What is called by this name; `None` when no version was ever accepted.
    pub active: Option<VersionStatus>,
    /// The candidate that was refused since, if the last one was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

/// A plugin with what its active version says about itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PluginDetail {
    /// As lists show it.
    #[serde(flatten)]
    pub status: PluginStatus,
    /// The active version's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Arc<Manifest>>,
    /// What the active version imports and exports.
    #[serde(flatten)]
    pub interface: Option<Interface>,
}

/// A version as lists show it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionStatus {
    /// What its manifest says.
    pub version: Version,
    /// What identifies it: `sha256:<hex>` of the component.
    pub digest: Arc<str>,
    /// The component's size in bytes.
    pub size: usize,
    /// Since when it serves.
    pub active_since: Timestamp,
    /// The most events of one call.
    pub max_batch: usize,
    /// How many events an instance serves, one after the other.
    pub reuse: u32,
    /// What its attempts may use.
    pub limits: Limits,
}

/// A candidate that was not accepted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refusal {
    /// Where it came from, such as a path.
    pub origin: String,
    /// Its name, where it could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
    /// Its digest; `None` when it could not be read at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What is wrong with it and what to do.
    pub error: String,
    /// When it was refused.
    pub at: Timestamp,
}

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Checked {
    /// `sha256:<hex>` of the component.
    pub digest: Arc<str>,
    /// Its size in bytes.
    pub size: usize,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    /// What it imports and exports.
    pub interface: Interface,
    /// What its attempts may use.
    pub limits: Limits,
}

/// Does everything that loading does, short of serving.
///
/// # Errors
/// [`Error::Plugin`] with what is wrong and what to do; `origin` stands for the name until that is known.
pub async fn check(options: &Options, origin: &str, bytes: Bytes) -> Result<Checked> {
    let options = Options { instances: NonZeroU32::MIN, ..options.clone() };
    let plugin = Host::new(options, None)?.load(origin, bytes).await?;
    Ok(Checked {
        digest: Arc::clone(plugin.digest()),
        size: plugin.size,
        limits: plugin.limits().clone(),
        manifest: plugin.manifest,
        interface: plugin.interface,
    })
}

impl PluginStatus {
    /// What identifies the active version.
    pub(super) fn digest(&self) -> Option<Arc<str>> {
        self.active.as_ref().map(|active| Arc::clone(&active.digest))
    }
}

impl Host {
    /// Starts the engine. No plugin is loaded yet.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when guests cannot be run here, and [`Error::Invalid`] for a cache folder that
    /// was asked for and is not private or not writable.
    pub fn new(options: Options, metrics: Option<Metrics>) -> Result<Self> {
        let settings = Settings::new(options.instances.get(), options.max_memory(), options.cache_folder());
        let engine = Arc::new(Engine::new(&settings)?);
        let (slots, refused) = (Mutex::default(), Mutex::default());
        Ok(Self { inner: Arc::new(Inner { engine, options, metrics, slots, refused }) })
    }

    /// Makes a candidate of a component: verified, compiled and linked, its requests granted, its
    /// self-check passed. No event reaches it yet.
    ///
    /// # Errors
    /// [`Error::Plugin`] with what is wrong and what to do; `origin` stands for the name until that is known.
    pub async fn load(&self, origin: &str, bytes: Bytes) -> Result<Plugin> {
        let candidate = self.candidate(digest(&bytes).into(), bytes).await;
        candidate
            .map_err(|Refused { plugin, reason }| Error::plugin(plugin.unwrap_or_else(|| file_name(origin)), reason))
    }

    /// The same, for those who keep track of refusals themselves, of bytes with this digest.
    pub(super) async fn candidate(&self, digest: Arc<str>, bytes: Bytes) -> Result<Plugin, Refused> {
        let Inner { engine, options, .. } = &*self.inner;
        let size = bytes.len();
        let Loaded { manifest, interface, prepared } = load(engine, options, digest, bytes).await?;
        let (engine, manifest, since) = (Arc::clone(engine), Arc::new(manifest), Timestamp::now());
        Ok(Plugin { engine, prepared, manifest, interface, size, since, metrics: None })
    }

    /// Puts a version in place of the one that its name had. Calls in progress finish on theirs.
    pub fn activate(&self, mut plugin: Plugin) -> Arc<Plugin> {
        plugin.metrics = self.inner.metrics.as_ref().map(|metrics| metrics.of_plugin(plugin.name(), plugin.digest()));
        plugin.since = Timestamp::now();
        let plugin = Arc::new(plugin);
        let (name, version, digest) = (plugin.name(), &plugin.manifest.version, plugin.digest());
        tracing::info!(plugin = name, %version, %digest, "plugin version active");
        plugin.prepared.keep_instances(true);
        if let Some(before) = self.slot(name).active.swap(Some(Arc::clone(&plugin))) {
            before.prepared.keep_instances(false);
        }
        plugin
    }

    /// Leaves a name without a version. Calls in progress finish; later ones end as host faults.
    pub fn remove(&self, name: &str) {
        if let Some(before) = self.slot(name).active.swap(None) {
            before.prepared.keep_instances(false);
            tracing::info!(plugin = name, "plugin removed");
        }
    }

    /// The handler that calls whatever version is active under `name` at the time of the call.
    #[must_use]
    pub fn handler(&self, name: &str) -> Arc<dyn Handler> {
        self.slot(name)
    }

    /// The version that is active under `name`.
    #[must_use]
    pub fn active(&self, name: &str) -> Option<Arc<Plugin>> {
        self.inner.slots.lock().get(name).and_then(|slot| slot.active.load_full())
    }

    /// The version with this digest, if it is active.
    pub(super) fn active_of(&self, digest: &str) -> Option<Arc<Plugin>> {
        let slots = self.inner.slots.lock();
        slots.values().filter_map(|slot| slot.active.load_full()).find(|plugin| &**plugin.digest() == digest)
    }

    /// What the host was made with.
    pub(super) fn options(&self) -> &Options {
        &self.inner.options
    }

    /// The plugin of this name, as [`plugins`](Self::plugins) lists it.
    #[must_use]
    pub fn status(&self, name: &str) -> Option<PluginStatus> {
        self.plugins().into_iter().find(|plugin| plugin.name == name)
    }

    /// The plugin of this name, with what its active version says about itself.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a name that neither a plugin nor a refused candidate has.
    pub fn inspect(&self, name: &str) -> Result<PluginDetail> {
        let status = self.status(name).ok_or_else(|| Error::not_found("plugin", name))?;
        let active = self.active(name);
        let manifest = active.as_ref().map(|active| Arc::clone(&active.manifest));
        Ok(PluginDetail { status, manifest, interface: active.map(|active| active.interface.clone()) })
    }

    /// All plugins by name, those of refused candidates included.
    #[must_use]
    pub fn plugins(&self) -> Vec<PluginStatus> {
        let mut refused: Vec<Refusal> = self.inner.refused.lock().values().cloned().collect();
        let active = self.inner.slots.lock().values().filter_map(|slot| slot.active.load_full()).collect::<Vec<_>>();
        let mut all: Vec<PluginStatus> = active.iter().map(|plugin| plugin.status()).collect();
        for status in &mut all {
            let own = refused.iter().position(|refusal| refusal.plugin.as_ref() == Some(&status.name));
            status.refused = own.map(|index| refused.remove(index));
        }
        all.extend(refused.into_iter().map(|refusal| PluginStatus {
            name: refusal.plugin.clone().unwrap_or_else(|| file_name(&refusal.origin)),
            active: None,
            refused: Some(refusal),
        }));
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Remembers that a candidate was refused, and reports it once.
    pub(super) fn refuse(&self, refusal: Refusal) {
        let mut refused = self.inner.refused.lock();
        let is_same = |known: &Refusal| known.digest == refusal.digest && known.error == refusal.error;
        if refused.get(&refusal.origin).is_some_and(is_same) {
            return;
        }
        let Refusal { origin, digest, error, .. } = &refusal;
        tracing::warn!(origin, digest, error, "plugin candidate refused");
        refused.insert(origin.clone(), refusal);
    }

    /// Forgets the refusal of what came from `origin`.
    pub(super) fn forget_refusal(&self, origin: &str) {
        self.inner.refused.lock().remove(origin);
    }

    fn slot(&self, name: &str) -> Arc<Slot> {
        let mut slots = self.inner.slots.lock();
        let new = || Arc::new(Slot { name: name.to_owned(), active: ArcSwapOption::empty() });
        Arc::clone(slots.entry(name.to_owned()).or_insert_with(new))
    }
}

fn file_name(origin: &str) -> String {
    Path::new(origin).file_name().map_or_else(|| origin.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[async_trait]
impl Handler for Slot {
    async fn handle(&self, call: Call) -> Outcome {
        // Borrowed, and not counted: threads that count in one place wait for each other.
        match &*self.active.load() {
            Some(plugin) => plugin.attempt(call).await,
            None => {
                let words =
                    format!("plugin {} has no active version: put it back, or remove its subscription", self.name);
                Outcome::failed(Verdict::HostFault, Fault::new("no-active-version", words))
            }
        }
    }

    fn max_batch(&self) -> usize {
        self.active.load().as_ref().map_or(1, |plugin| plugin.max_batch())
    }

    async fn handle_batch(&self, calls: Vec<Call>) -> Option<Vec<Outcome>> {
        self.active.load_full()?.attempts(calls).await
    }

    fn keeps_time(&self) -> bool {
        true
    }
}

#[async_trait]
impl Handler for Plugin {
    async fn handle(&self, call: Call) -> Outcome {
        self.attempt(call).await
    }

    fn max_batch(&self) -> usize {
        self.prepared.terms.max_batch
    }

    async fn handle_batch(&self, calls: Vec<Call>) -> Option<Vec<Outcome>> {
        self.attempts(calls).await
    }

    fn keeps_time(&self) -> bool {
        true
    }
}

impl Plugin {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// What identifies it: `sha256:<hex>` of the component.
    #[must_use]
    pub fn digest(&self) -> &Arc<str> {
        &self.prepared.terms.digest
    }

    /// What it says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// What its attempts may use.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.prepared.terms.limits
    }

    async fn attempt(&self, call: Call) -> Outcome {
        let began = Instant::now();
        let outcome = self.prepared.attempt(&self.engine, call, began).await;
        self.count(std::slice::from_ref(&outcome), began.elapsed());
        outcome
    }

    async fn attempts(&self, calls: Vec<Call>) -> Option<Vec<Outcome>> {
        if !self.prepared.takes(&calls) {
            return None;
        }
        let (events, began) = (calls.len(), Instant::now());
        match self.prepared.batch(&self.engine, calls, began).await {
            Ok(outcomes) => {
                self.count(&outcomes, began.elapsed());
                Some(outcomes)
            }
            Err(ended) => {
                let (plugin, digest, verdict) = (self.name(), self.digest(), ended.verdict);
                let fault = ended.fault.map(|fault| fault.to_string());
                tracing::warn!(plugin, %digest, events, %verdict, fault, "a batch ended without verdicts");
                None
            }
        }
    }

    /// Counts one call of the guest and the attempts that it was.
    fn count(&self, outcomes: &[Outcome], took: Duration) {
        let Some(metrics) = &self.metrics else { return };
        outcomes.iter().for_each(|outcome| metrics.attempt(outcome.verdict));
        let fuel = outcomes.iter().filter_map(|outcome| outcome.trace.fuel).reduce(u64::saturating_add);
        metrics.call(took.as_secs_f64(), fuel);
    }

    fn status(&self) -> PluginStatus {
        let active = VersionStatus {
            version: self.manifest.version.clone(),
            digest: Arc::clone(self.digest()),
            size: self.size,
            active_since: self.since,
            max_batch: self.prepared.terms.max_batch,
            reuse: self.prepared.terms.reuse,
            limits: self.limits().clone(),
        };
        PluginStatus { name: self.manifest.name.clone(), active: Some(active), refused: None }
    }
}
