//! What can be counted: every metric, declared once, in one table.
//!
//! A clone shares its counts. Handles are looked up once per type, subscription or plugin and then kept by whoever
//! counts, so that the hot path touches atomics only. Nothing here serves HTTP: [`Metrics::encode`] gives the text.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use foldhash::HashMap;
use parking_lot::RwLock;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::delivery::{Status, Verdict};
use crate::event::{EventType, Source};

/// How many types get a label of their own unless configured; later ones count as `other`.
pub const DEFAULT_TYPES: usize = 200;

/// How many versions of a plugin keep their figures: enough to compare a new one with those before it.
const KEPT_VERSIONS: usize = 8;

/// All metrics of one process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    families: Families,
    max_types: usize,
    types: RwLock<HashMap<(Source, EventType), Arc<TypeMetrics>>>,
    /// The digests with figures, by plugin, the one that was asked for last at the end.
    versions: RwLock<HashMap<String, VecDeque<String>>>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TypeLabels {
    source: &'static str,
    r#type: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StatusLabels {
    source: &'static str,
    r#type: String,
    status: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SubscriptionLabels {
    subscription: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerdictLabels {
    subscription: String,
    verdict: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PluginLabels {
    plugin: String,
    digest: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PluginVerdictLabels {
    plugin: String,
    digest: String,
    verdict: &'static str,
}

impl PluginVerdictLabels {
    fn new(plugin: &str, digest: &str, verdict: Verdict) -> Self {
        Self { plugin: plugin.to_owned(), digest: digest.to_owned(), verdict: verdict.as_str() }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// From 10 µs to about 5 minutes, a factor of 3 apart: one set for queue waits, handlers and stores alike.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_01, 3.0, 16))
}

/// Powers of two up to 1,024, for batches.
fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 11))
}

/// From 1,000 to about 1 G, a factor of 4 apart.
fn fuels() -> Histogram {
    Histogram::new(exponential_buckets(1_000.0, 4.0, 11))
}

struct Families {
    published: Family<TypeLabels, Counter>,
    processed: Family<StatusLabels, Counter>,
    duration: Histograms<TypeLabels>,
    queue_size: Gauge,
    workers_active: Gauge,
    refused: Counter,
    attempts: Family<VerdictLabels, Counter>,
    retries: Family<SubscriptionLabels, Counter>,
    dead_letters: Family<SubscriptionLabels, Counter>,
    queue_wait: Histograms<SubscriptionLabels>,
    stale: Counter,
    plugin_attempts: Family<PluginVerdictLabels, Counter>,
    guest_time: Histograms<PluginLabels>,
    fuel: Histograms<PluginLabels>,
    store_time: Histograms<OperationLabels>,
    batch_size: Histograms<OperationLabels>,
    feed: FeedMetrics,
}

impl Families {
    fn register(registry: &mut Registry) -> Self {
        let families = Self {
            published: Family::default(),
            processed: Family::default(),
            duration: Family::new_with_constructor(seconds),
            queue_size: Gauge::default(),
            workers_active: Gauge::default(),
            refused: Counter::default(),
            attempts: Family::default(),
            retries: Family::default(),
            dead_letters: Family::default(),
            queue_wait: Family::new_with_constructor(seconds),
            stale: Counter::default(),
            plugin_attempts: Family::default(),
            guest_time: Family::new_with_constructor(seconds),
            fuel: Family::new_with_constructor(fuels),
            store_time: Family::new_with_constructor(seconds),
            batch_size: Family::new_with_constructor(sizes),
            feed: FeedMetrics::default(),
        };
        let f = &families;
        registry.register("eventbroker_events_published", "Events acknowledged", f.published.clone());
        registry.register(
            "eventbroker_events_processed",
            "Events that became completed or failed",
            f.processed.clone(),
        );
        registry.register("eventbroker_event_processing_duration_seconds", "Time in one attempt", f.duration.clone());
        registry.register(
            "eventbroker_queue_size",
            "Publishes waiting for the store, and leased deliveries waiting for a worker",
            f.queue_size.clone(),
        );
        registry.register("eventbroker_workers_active", "Attempts in progress", f.workers_active.clone());
        registry.register("tidegate_publishes_refused", "Publishes refused for load", f.refused.clone());
        registry.register("tidegate_attempts", "Attempts by how they ended", f.attempts.clone());
        registry.register("tidegate_retries", "Deliveries put back for another attempt", f.retries.clone());
        registry.register("tidegate_dead_letters", "Deliveries that became dead letters", f.dead_letters.clone());
        registry.register(
            "tidegate_queue_wait_seconds",
            "Time from lease to the start of the attempt",
            f.queue_wait.clone(),
        );
        registry.register(
            "tidegate_stale_settlements",
            "Settlements refused because the lease was no longer held",
            f.stale.clone(),
        );
        registry.register(
            "tidegate_plugin_attempts",
            "Attempts of plugins by how they ended",
            f.plugin_attempts.clone(),
        );
        registry.register("tidegate_guest_seconds", "Time in a call of a guest", f.guest_time.clone());
        registry.register("tidegate_guest_fuel", "Fuel used by a call of a guest", f.fuel.clone());
        registry.register("tidegate_store_seconds", "Time of a store operation", f.store_time.clone());
        registry.register("tidegate_store_batch_size", "Entries of a store operation", f.batch_size.clone());
        f.feed.register(registry);
        families
    }

    fn forget_version(&self, plugin: &str, digest: &str) {
        let labels = PluginLabels { plugin: plugin.to_owned(), digest: digest.to_owned() };
        self.guest_time.remove(&labels);
        self.fuel.remove(&labels);
        for verdict in Verdict::ALL {
            self.plugin_attempts.remove(&PluginVerdictLabels::new(plugin, digest, verdict));
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(DEFAULT_TYPES)
    }
}

impl Metrics {
    /// Metrics that start at zero, with labels of their own for the first `max_types` types.
    #[must_use]
    pub fn new(max_types: usize) -> Self {
        let mut registry = Registry::default();
        let families = Families::register(&mut registry);
        let (types, versions) = (RwLock::default(), RwLock::default());
        Self { inner: Arc::new(Inner { registry, families, max_types, types, versions }) }
    }

    /// Everything in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.inner.registry).is_err() {
            // Writing to a String cannot fail; should a collector do, the scrape shows where it stopped.
            let _ = write!(text, "# incomplete");
        }
        text
    }

    /// The handles of one source and type.
    #[must_use]
    pub fn of_type(&self, source: Source, event_type: &EventType) -> Arc<TypeMetrics> {
        let key = (source, event_type.clone());
        if let Some(known) = self.inner.types.read().get(&key) {
            return Arc::clone(known);
        }
        let mut types = self.inner.types.write();
        if types.len() >= self.inner.max_types {
            return Arc::new(TypeMetrics::new(&self.inner.families, source, "other"));
        }
        let made = types
            .entry(key)
            .or_insert_with(|| Arc::new(TypeMetrics::new(&self.inner.families, source, event_type.as_str())));
        Arc::clone(made)
    }

    /// The handles of one subscription.
    #[must_use]
    pub fn of_subscription(&self, name: &str) -> SubscriptionMetrics {
        SubscriptionMetrics::new(&self.inner.families, name)
    }

    /// The handles of one version of a plugin. Of each plugin the versions asked for last are kept; what was counted for
    /// earlier ones is forgotten, so that replacing a plugin every minute does not fill the memory.
    #[must_use]
    pub fn of_plugin(&self, plugin: &str, digest: &str) -> PluginMetrics {
        let mut versions = self.inner.versions.write();
        let kept = versions.entry(plugin.to_owned()).or_default();
        kept.retain(|known| known != digest);
        kept.push_back(digest.to_owned());
        while kept.len() > KEPT_VERSIONS {
            kept.pop_front().iter().for_each(|old| self.inner.families.forget_version(plugin, old));
        }
        PluginMetrics::new(&self.inner.families, plugin, digest)
    }

    /// The handles of one operation of the store.
    #[must_use]
    pub fn of_operation(&self, operation: &'static str) -> OperationMetrics {
        let labels = OperationLabels { operation };
        OperationMetrics {
            time: self.inner.families.store_time.get_or_create_owned(&labels),
            batch: self.inner.families.batch_size.get_or_create_owned(&labels),
        }
    }

    /// Publishes waiting for the store, and leased deliveries waiting for a worker.
    #[must_use]
    pub fn queue_size(&self) -> &Gauge {
        &self.inner.families.queue_size
    }

    /// Attempts in progress.
    #[must_use]
    pub fn workers_active(&self) -> &Gauge {
        &self.inner.families.workers_active
    }

    /// Publishes refused for load.
    #[must_use]
    pub fn refused(&self) -> &Counter<u64, AtomicU64> {
        &self.inner.families.refused
    }

    /// The figures of the feed.
    #[must_use]
    pub fn feed(&self) -> &FeedMetrics {
        &self.inner.families.feed
    }

    /// Settlements refused because the lease was no longer held.
    #[must_use]
    pub fn stale_settlements(&self) -> &Counter<u64, AtomicU64> {
        &self.inner.families.stale
    }
}

/// Counts of one source and type.
pub struct TypeMetrics {
    /// Events acknowledged.
    pub published: Counter,
    completed: Counter,
    failed: Counter,
    /// Seconds in one attempt.
    pub duration: Histogram,
}

impl TypeMetrics {
    fn new(families: &Families, source: Source, event_type: &str) -> Self {
        let source = source.as_str();
        let labels = TypeLabels { source, r#type: event_type.to_owned() };
        let processed = |status: Status| {
            let labels = StatusLabels { source, r#type: event_type.to_owned(), status: status.as_str() };
            families.processed.get_or_create_owned(&labels)
        };
        Self {
            published: families.published.get_or_create_owned(&labels),
            completed: processed(Status::Completed),
            failed: processed(Status::Failed),
            duration: families.duration.get_or_create_owned(&labels),
        }
    }

    /// Counts an event that reached `status`, if that is a final one.
    pub fn processed(&self, status: Status) {
        match status {
            Status::Completed => self.completed.inc(),
            Status::Failed => self.failed.inc(),
            Status::Pending | Status::Processing => return,
        };
    }
}

/// Counts of one subscription.
pub struct SubscriptionMetrics {
    attempts: [Counter; Verdict::ALL.len()],
    /// Deliveries put back for another attempt.
    pub retries: Counter,
    /// Deliveries that became dead letters.
    pub dead_letters: Counter,
    /// Seconds from lease to the start of the attempt.
    pub queue_wait: Histogram,
}

impl SubscriptionMetrics {
    fn new(families: &Families, name: &str) -> Self {
        let labels = SubscriptionLabels { subscription: name.to_owned() };
        Self {
            attempts: Verdict::ALL.map(|verdict| {
                let labels = VerdictLabels { subscription: name.to_owned(), verdict: verdict.as_str() };
                families.attempts.get_or_create_owned(&labels)
            }),
            retries: families.retries.get_or_create_owned(&labels),
            dead_letters: families.dead_letters.get_or_create_owned(&labels),
            queue_wait: families.queue_wait.get_or_create_owned(&labels),
        }
    }

    /// Counts an attempt that ended with `verdict`.
    pub fn attempt(&self, verdict: Verdict) {
        count(&self.attempts, verdict);
    }
}

/// Counts of one version of a plugin.
pub struct PluginMetrics {
    attempts: [Counter; Verdict::ALL.len()],
    guest_time: Histogram,
    fuel: Histogram,
}

impl PluginMetrics {
    fn new(families: &Families, plugin: &str, digest: &str) -> Self {
        let labels = PluginLabels { plugin: plugin.to_owned(), digest: digest.to_owned() };
        Self {
            attempts: Verdict::ALL.map(|verdict| {
                families.plugin_attempts.get_or_create_owned(&PluginVerdictLabels::new(plugin, digest, verdict))
            }),
            guest_time: families.guest_time.get_or_create_owned(&labels),
            fuel: families.fuel.get_or_create_owned(&labels),
        }
    }

    /// Counts an attempt: how it ended.
    pub fn attempt(&self, verdict: Verdict) {
        count(&self.attempts, verdict);
    }

    /// Counts a call of the guest, with one event or with several: how many seconds it took, and the fuel it used where
    /// that is measured.
    pub fn call(&self, seconds: f64, fuel: Option<u64>) {
        self.guest_time.observe(seconds);
        if let Some(fuel) = fuel {
            #[expect(clippy::cast_precision_loss, reason = "a histogram needs no more than 52 bits of fuel")]
            self.fuel.observe(fuel as f64);
        }
    }
}

fn count(attempts: &[Counter; Verdict::ALL.len()], verdict: Verdict) {
    let place = Verdict::ALL.iter().position(|&known| known == verdict);
    if let Some(counter) = place.and_then(|place| attempts.get(place)) {
        counter.inc();
    }
}

/// Counts of one operation of the store.
pub struct OperationMetrics {
    time: Histogram,
    batch: Histogram,
}

impl OperationMetrics {
    /// Counts one call for `entries` entries that took `time`, where that was measured.
    #[expect(clippy::cast_precision_loss, reason = "a batch is far below 2^52")]
    pub fn observe(&self, time: Option<Duration>, entries: usize) {
        time.iter().for_each(|time| self.time.observe(time.as_secs_f64()));
        self.batch.observe(entries as f64);
    }
}

/// Figures of the feed. A clone shares its counts.
#[derive(Clone, Default)]
pub struct FeedMetrics {
    /// Clients that follow the feed in this process.
    pub clients: Gauge,
    /// Resets told to clients.
    pub resets: Counter,
    /// Clients that fell out of what is kept in memory and read on in the log.
    pub lagged: Counter,
    /// How many events the client that is furthest behind has not got.
    pub lag: Gauge,
}

impl FeedMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("tidegate_feed_clients", "Clients that follow the feed", self.clients.clone());
        registry.register("tidegate_feed_resets", "Resets told to clients of the feed", self.resets.clone());
        registry.register("tidegate_feed_lagged", "Clients of the feed moved back to the log", self.lagged.clone());
        registry.register(
            "tidegate_feed_lag",
            "Events that the client of the feed furthest behind has not got",
            self.lag.clone(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BEHAVIOURS F7.
    #[test]
    fn the_documented_names_and_labels_are_served() {
        let metrics = Metrics::default();
        let users = metrics.of_type(Source::Database, &"public.users.create".parse().unwrap());
        users.published.inc();
        users.processed(Status::Completed);
        users.processed(Status::Processing);
        users.duration.observe(0.1);
        metrics.of_subscription("audit").attempt(Verdict::OutOfFuel);
        let text = metrics.encode();
        for line in [
            "eventbroker_events_published_total{source=\"database\",type=\"public.users.create\"} 1",
            "eventbroker_events_processed_total{source=\"database\",type=\"public.users.create\",status=\"completed\"} 1",
            "eventbroker_event_processing_duration_seconds_count{source=\"database\",type=\"public.users.create\"} 1",
            "eventbroker_queue_size 0",
            "eventbroker_workers_active 0",
            "tidegate_attempts_total{subscription=\"audit\",verdict=\"out-of-fuel\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn the_number_of_type_labels_is_bounded() {
        let metrics = Metrics::new(2);
        for name in ["a", "b", "c", "d", "a"] {
            metrics.of_type(Source::System, &name.parse().unwrap()).published.inc();
        }
        let text = metrics.encode();
        assert!(text.contains("published_total{source=\"system\",type=\"a\"} 2"), "{text}");
        assert!(text.contains("published_total{source=\"system\",type=\"other\"} 2"), "{text}");
        assert!(!text.contains("type=\"c\""), "{text}");
    }

    #[test]
    fn the_versions_of_a_plugin_that_keep_their_figures_are_bounded() {
        let metrics = Metrics::default();
        let count = |digest: &str| {
            let metrics = metrics.of_plugin("totals", digest);
            metrics.attempt(Verdict::Ok);
            metrics.call(0.1, Some(1));
        };
        metrics.of_plugin("other", "d0").attempt(Verdict::Ok);
        (0..KEPT_VERSIONS).for_each(|n| count(&format!("d{n}")));
        count("d0");
        count("new");
        let text = metrics.encode();
        assert!(text.contains("attempts_total{plugin=\"totals\",digest=\"d0\",verdict=\"ok\"} 2"), "{text}");
        assert!(text.contains("fuel_count{plugin=\"totals\",digest=\"new\"} 1"), "{text}");
        assert!(text.contains("plugin=\"other\",digest=\"d0\"") && !text.contains("digest=\"d1\""), "{text}");
    }
}
