//! The broker: takes events in, matches them, leases deliveries, calls handlers and settles what came of it.
//!
//! ```text
//! publish ─▶ routing ─▶ append ─▶ provider ─▶ dispatch ─▶ workers ─▶ settle ─▶ provider
//!            who wants it  grouped     log        by demand    handlers     grouped
//! ```
//!
//! [`Broker::open`] gives a handle that is cheap to clone and a [`Service`] whose [`run`](Service::run) does the work.
//! The broker knows providers through their port only, and handlers through [`Handler`] only: it has never heard of
//! WebAssembly or of HTTP.

mod attempt;
mod chain;
mod dispatch;
mod inbox;
mod lanes;
mod maintenance;
mod pace;
mod publish;
mod routing;
mod service;
mod settle;
mod waiters;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::delivery::{EventDetail, Status};
use crate::error::{Error, Result};
use crate::event::{Event, EventId, MAX_PAYLOAD, Seq};
use crate::handler::Handler;
use crate::metrics::{Metrics, OperationMetrics};
use crate::provider::{Amendment, Provider};
use crate::retry::RetryPolicy;
use crate::subscription::Subscription;

pub use routing::SubscriptionPatch;
pub use service::Service;

pub use crate::provider::{
    Capabilities, DeadLetter, DeadLetterFilter, DeadLetterPage, EventFilter, EventPage, ProviderStats, Replay,
};

/// Whether `publish` waits for the handlers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// `publish` returns once the event is stored.
    #[default]
    Async,
    /// `publish` returns once every delivery is completed or failed.
    Sync,
}

/// How the broker works.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether `publish` waits for the handlers.
    pub mode: Mode,
    /// The most attempts at once.
    pub worker_count: NonZeroUsize,
    /// The most publishes that wait for the store at once, and the most deliveries leased ahead of free workers.
    pub buffer_size: NonZeroUsize,
    /// Names this process in events, leases and attempts. Required. A key of its own in the configuration.
    #[serde(skip)]
    pub instance_id: String,
    /// The retry policy where plugin and subscription say nothing.
    pub retry: RetryPolicy,
    /// How long an attempt may take where plugin and subscription say nothing.
    #[serde(with = "friendly::required")]
    pub timeout: Duration,
    /// How long a lease lasts; renewed every third of it.
    #[serde(with = "friendly::required")]
    pub lease: Duration,
    /// How long a stop waits for attempts in progress before it gives their deliveries back.
    #[serde(with = "friendly::required")]
    pub grace: Duration,
    /// How often the store is asked although nothing hinted at work.
    #[serde(with = "friendly::required")]
    pub poll: Duration,
    /// The longest that `publish` waits in [`Mode::Sync`].
    #[serde(with = "friendly::required")]
    pub sync_deadline: Duration,
    /// The largest payload, in bytes. In the configuration `limits.max_payload`.
    #[serde(skip)]
    pub max_payload: u64,
    /// How long a chain of events that handlers publish may grow: what is further from the event that no handler
    /// published is refused, and 0 lets no handler publish. In the configuration `limits.max_depth`.
    #[serde(skip)]
    pub max_depth: u32,
    /// Finished events older than this are removed; `None` and nothing at all (`0s`) keep them.
    #[serde(skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub keep_for: Option<Duration>,
    /// While there are more events than this, the oldest finished ones are removed; `None` for no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_events: Option<u64>,
    /// Seeds the jitter of retries; `None` for a seed of chance.
    #[serde(skip)]
    pub seed: Option<u64>,
}

/// More than any sensible flow of events has, and few enough that a loop that doubles stays small.
const MAX_DEPTH: u32 = 16;

const WORKERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9);
const BUFFER: NonZeroUsize = NonZeroUsize::MIN.saturating_add(999);

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: Mode::Async,
            worker_count: WORKERS,
            buffer_size: BUFFER,
            instance_id: String::new(),
            retry: RetryPolicy::default(),
            timeout: Duration::from_secs(30),
            lease: Duration::from_secs(30),
            grace: Duration::from_secs(10),
            poll: Duration::from_secs(1),
            sync_deadline: Duration::from_secs(30),
            max_payload: MAX_PAYLOAD,
            max_depth: MAX_DEPTH,
            keep_for: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            keep_events: None,
            seed: None,
        }
    }
}

impl Options {
    /// Checks what the types do not already guarantee.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn validate(&self) -> Result<()> {
        if self.instance_id.is_empty() {
            return Err(Error::invalid("instance_id", "", "instance ID is required"));
        }
        crate::event::short_text("instance_id", &self.instance_id)?;
        self.retry.validate()?;
        for (field, value) in [("timeout", self.timeout), ("lease", self.lease), ("poll", self.poll)] {
            if value.is_zero() {
                return Err(Error::invalid(field, "0s", "must be longer than nothing"));
            }
        }
        Ok(())
    }
}

/// What an acknowledged publish answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Published {
    /// The event's id.
    pub id: EventId,
    /// Its place in the log; for a duplicate that of the first.
    pub seq: Seq,
    /// Its status when the call returned.
    pub status: Status,
    /// Whether the id was known, so that nothing new was stored.
    pub duplicate: bool,
}

/// What a publisher who waits gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The event, its deliveries, and each handler's verdict, error and reply.
    pub detail: EventDetail,
    /// Whether the id was known, so that nothing new was stored.
    pub duplicate: bool,
    /// Whether every delivery was completed or failed before the deadline.
    pub finished: bool,
}

/// A subscription as it stands in this process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SubscriptionStatus {
    /// The subscription with what operators changed about it.
    #[serde(flatten)]
    pub subscription: Subscription,
    /// Whether this process has a handler for it.
    pub bound: bool,
    /// Deliveries leased by this process and waiting for a worker.
    pub queued: usize,
    /// Attempts in progress in this process.
    pub running: usize,
}

/// Figures of the broker, under the names of the contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BrokerStats {
    /// This process.
    pub instance_id: String,
    /// Its mode.
    pub mode: Mode,
    /// Whether it takes events in.
    pub is_running: bool,
    /// Events acknowledged by this process since it started.
    pub total_published: u64,
    /// Attempts ended in this process since it started.
    pub total_processed: u64,
    /// Deliveries that became dead letters in this process since it started.
    pub total_failed: u64,
    /// Subscriptions with a handler in this process.
    pub active_subscribers: usize,
    /// Publishes waiting for the store, and leased deliveries waiting for a worker.
    pub queue_size: usize,
    /// Attempts in progress.
    pub active_workers: usize,
    /// Settlements refused because the lease was no longer held.
    pub stale_settlements: u64,
    /// What the store is.
    pub capabilities: Capabilities,
    /// Figures of the store.
    pub provider_stats: ProviderStats,
}

/// Takes events in and has them handled. Cheap to clone.
#[derive(Clone)]
pub struct Broker {
    shared: Arc<Shared>,
}

/// What handle, dispatcher, workers and settlement share.
struct Shared {
    provider: Arc<dyn Provider>,
    capabilities: Capabilities,
    options: Options,
    instance_id: Arc<str>,
    metrics: Metrics,
    router: routing::Router,
    lanes: lanes::Lanes,
    leases: settle::Held,
    /// Wakes the dispatcher: see [`dispatch::Hints`].
    hints: dispatch::Hints,
    /// Where publishes queue when the store gains from grouping them.
    appends: mpsc::Sender<publish::Job>,
    /// Where ended attempts queue for settlement.
    settlements: mpsc::Sender<settle::Ended>,
    /// Who waits for an event to be finished.
    waiters: waiters::Waiters,
    operations: Operations,
    jitter: settle::Jitter,
    accepting: AtomicBool,
    totals: Totals,
}

#[derive(Default)]
struct Totals {
    published: AtomicU64,
    processed: AtomicU64,
    failed: AtomicU64,
    stale: AtomicU64,
    waiting_publishes: AtomicUsize,
}

/// What is measured of the store.
struct Operations {
    append: OperationMetrics,
    route: OperationMetrics,
    claim: OperationMetrics,
    settle: OperationMetrics,
}

impl Operations {
    fn new(metrics: &Metrics) -> Self {
        Self {
            append: metrics.of_operation("append"),
            route: metrics.of_operation("route"),
            claim: metrics.of_operation("claim"),
            settle: metrics.of_operation("settle"),
        }
    }
}

impl Shared {
    /// When an operation of the store begins, to be measured; `None` for a store to which reading the clock would be a
    /// good part of its work.
    fn timing(&self) -> Option<Instant> {
        (!self.capabilities.ends_with_process()).then(Instant::now)
    }
}

impl Broker {
    /// Opens a broker over `provider`: loads the subscriptions it keeps. Events are taken in from now on, and handled
    /// once [`Service::run`] is polled.
    ///
    /// # Errors
    /// [`Error::Invalid`] for bad options, or what the store answers.
    pub async fn open(provider: Arc<dyn Provider>, options: Options, metrics: Metrics) -> Result<(Self, Service)> {
        options.validate()?;
        let (appends, append_jobs) = mpsc::channel(options.buffer_size.get());
        let (settlements, ended) = mpsc::channel(settle::QUEUE);
        let router = routing::Router::load(&*provider).await?;
        let operations = Operations::new(&metrics);
        let shared = Arc::new(Shared {
            capabilities: provider.capabilities(),
            instance_id: options.instance_id.as_str().into(),
            lanes: lanes::Lanes::new(options.worker_count.get(), options.buffer_size.get(), metrics.clone()),
            jitter: settle::Jitter::new(options.seed),
            provider,
            options,
            metrics,
            router,
            leases: settle::Held::default(),
            hints: dispatch::Hints::default(),
            appends,
            settlements,
            waiters: waiters::Waiters::default(),
            operations,
            accepting: AtomicBool::new(true),
            totals: Totals::default(),
        });
        let service = Service::new(Arc::clone(&shared), append_jobs, ended);
        Ok((Self { shared }, service))
    }

    /// The options that the broker was opened with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// Publishes as the mode says: returns once the event is stored, or in [`Mode::Sync`] once it is handled (or
    /// [`Options::sync_deadline`] has passed).
    ///
    /// # Errors
    /// As [`publish_async`](Self::publish_async).
    pub fn publish(&self, event: Event) -> impl Future<Output = Result<Published>> + Send {
        // Shared before there is a future, which would be as large as the event and is moved about.
        let event = Arc::new(event);
        async move {
            match self.shared.options.mode {
                Mode::Async => self.shared.publish_one(event).await,
                Mode::Sync => Box::pin(self.publish_and_wait(event)).await,
            }
        }
    }

    async fn publish_and_wait(&self, event: Arc<Event>) -> Result<Published> {
        let answer = self.answered(event, self.shared.options.sync_deadline).await?;
        let event = &answer.detail.record.event;
        let (id, seq) = (event.id.clone(), event.seq.unwrap_or_default());
        Ok(Published { id, seq, status: answer.detail.record.status, duplicate: answer.duplicate })
    }

    /// Stores the event with a delivery for every subscription that matches, and returns once that is durable.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::TooLarge`] naming the field, [`Error::Overloaded`], [`Error::Stopped`], or what the
    /// store answers. After an error nothing is stored that would ever run, except that a [`Error::Store`] leaves open
    /// whether the store wrote it: publishing the same id again is safe.
    pub fn publish_async(&self, event: Event) -> impl Future<Output = Result<Published>> + Send {
        self.shared.publish_one(Arc::new(event))
    }

    /// Stores the events, all or none, in this order.
    ///
    /// # Errors
    /// As [`publish_async`](Self::publish_async); the field of a bad event is named as `[index].field`.
    pub async fn publish_batch(&self, events: Vec<Event>) -> Result<Vec<Published>> {
        self.shared.publish_all(events.into_iter().map(Arc::new).collect()).await
    }

    /// Stores the event and waits until all its deliveries are completed or failed, or `deadline` has passed.
    ///
    /// The event goes on being handled when the deadline passes or the future is dropped.
    ///
    /// # Errors
    /// As [`publish_async`](Self::publish_async).
    pub async fn publish_sync(&self, event: Event, deadline: Duration) -> Result<Answer> {
        self.answered(Arc::new(event), deadline).await
    }

    async fn answered(&self, event: Arc<Event>, deadline: Duration) -> Result<Answer> {
        let began = Instant::now();
        let id = event.id.clone();
        let waiting = self.shared.waiters.register(&id);
        let published = self.shared.publish_one(event).await?;
        let mut finished = published.status.is_terminal() || waiting.briefly().await;
        loop {
            let left = deadline.saturating_sub(began.elapsed());
            if !finished {
                // Whoever finishes the event in another process does not notify here: hence the slow poll.
                let patience = left.min(self.shared.options.poll);
                waiting.at_most(patience).await;
            }
            let detail = self.event(id.as_str()).await?;
            finished = detail.record.status.is_terminal();
            if finished || left.is_zero() {
                return Ok(Answer { detail, duplicate: published.duplicate, finished });
            }
        }
    }

    /// Adds or replaces a subscription and binds it to `handler` in this process. Operators' changes to a subscription
    /// of that name (paused, retry, …) stay in force.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, or what the store answers.
    pub async fn subscribe(&self, subscription: Subscription, handler: Arc<dyn Handler>) -> Result<()> {
        let known = self.shared.declare(subscription).await?;
        self.shared.lanes.bind(&known, handler, &self.shared.options);
        self.shared.hints.about([&known.subscription.name]);
        Ok(())
    }

    /// Adds or replaces a subscription without a handler: its deliveries are created and wait.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, or what the store answers.
    pub async fn declare(&self, subscription: Subscription) -> Result<()> {
        self.shared.declare(subscription).await.map(drop)
    }

    /// Takes the handler of a subscription away from this process. Attempts in progress finish; deliveries are still
    /// created and wait.
    ///
    /// # Errors
    /// What the store answers when leased deliveries cannot be given back; they expire by themselves then.
    pub async fn unbind(&self, name: &str) -> Result<()> {
        let queued = self.shared.lanes.unbind(name);
        self.shared.release(queued).await
    }

    /// Removes a subscription and its open deliveries. No event published after this returns reaches it.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the store answers.
    pub async fn unsubscribe(&self, name: &str) -> Result<()> {
        let removed = self.shared.router.remove(&*self.shared.provider, name).await?;
        let queued = self.shared.lanes.unbind(name);
        self.shared.leases.forget(queued.iter().map(|lease| lease.key.token));
        let subscription = Arc::clone(&removed.subscription.name);
        self.shared.provider.amend(Amendment::Cancel { subscription }).await.map(drop)
    }

    /// Changes what an operator may change of a subscription, and returns the result.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`] naming the field, or what the store answers.
    pub async fn patch_subscription(&self, name: &str, patch: SubscriptionPatch) -> Result<SubscriptionStatus> {
        let known = self.shared.router.patch(&*self.shared.provider, name, patch).await?;
        self.shared.apply(&known).await?;
        Ok(self.status_of(&known.subscription))
    }

    /// Every subscription, by name.
    #[must_use]
    pub fn subscriptions(&self) -> Vec<SubscriptionStatus> {
        self.shared.router.all().iter().map(|known| self.status_of(&known.subscription)).collect()
    }

    /// The subscription of this name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn subscription(&self, name: &str) -> Result<SubscriptionStatus> {
        let known = self.shared.router.find(name).ok_or_else(|| Error::not_found("subscription", name))?;
        Ok(self.status_of(&known.subscription))
    }

    fn status_of(&self, subscription: &Subscription) -> SubscriptionStatus {
        let lane = self.shared.lanes.status(&subscription.name);
        SubscriptionStatus {
            subscription: subscription.clone(),
            bound: lane.is_some(),
            queued: lane.map_or(0, |lane| lane.queued),
            running: lane.map_or(0, |lane| lane.running),
        }
    }

    /// The event with its deliveries and attempts.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the store answers.
    pub async fn event(&self, id: &str) -> Result<EventDetail> {
        self.shared.provider.get(id).await?.ok_or_else(|| Error::not_found("event", id))
    }

    /// Events that meet `filter`, newest first.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn events(&self, filter: &EventFilter) -> Result<EventPage> {
        self.shared.provider.list(filter).await
    }

    /// Dead letters that meet `filter`, newest first.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.shared.provider.dead_letters(filter).await
    }

    /// Gives dead letters new attempts, and returns how many.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn redrive(&self, filter: DeadLetterFilter) -> Result<u64> {
        self.amend(Amendment::Redrive(filter)).await
    }

    /// Delivers a stretch of the log to a subscription, and returns how many deliveries that makes.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown subscription, or what the store answers.
    pub async fn replay(&self, replay: Replay) -> Result<u64> {
        if self.shared.router.find(&replay.subscription).is_none() {
            return Err(Error::not_found("subscription", &*replay.subscription));
        }
        self.amend(Amendment::Replay(replay)).await
    }

    /// Removes an event's content and its deliveries for good.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the store answers.
    pub async fn erase(&self, id: &str) -> Result<()> {
        match self.amend(Amendment::Erase { id: id.to_owned() }).await? {
            0 => Err(Error::not_found("event", id)),
            _ => Ok(()),
        }
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        let changed = self.shared.provider.amend(amendment).await?;
        self.shared.hints.about_all();
        Ok(changed)
    }

    /// Figures of this process and of the store.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn stats(&self) -> Result<BrokerStats> {
        let (shared, totals) = (&self.shared, &self.shared.totals);
        let load = shared.lanes.load();
        Ok(BrokerStats {
            instance_id: shared.options.instance_id.clone(),
            mode: shared.options.mode,
            is_running: shared.accepting.load(Ordering::SeqCst),
            total_published: totals.published.load(Ordering::Relaxed),
            total_processed: totals.processed.load(Ordering::Relaxed),
            total_failed: totals.failed.load(Ordering::Relaxed),
            active_subscribers: load.lanes,
            queue_size: load.queued + totals.waiting_publishes.load(Ordering::Relaxed),
            active_workers: load.running,
            stale_settlements: totals.stale.load(Ordering::Relaxed),
            capabilities: shared.capabilities.clone(),
            provider_stats: shared.provider.stats().await?,
        })
    }
}
