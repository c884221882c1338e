//! The end of attempts: decides what becomes of each delivery, and writes it.
//!
//! Where the store gains from it, one task settles in groups: while the store writes one batch the next one gathers, so
//! that a busy broker writes few and large batches and an idle one does not wait. Elsewhere each worker settles what it
//! did.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foldhash::HashMap;
use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::Shared;
use super::attempt::Own;
use super::lanes::Binding;
use super::service::raised;
use crate::delivery::{Attempt, Fault, Next, Status, Verdict};
use crate::error::Result;
use crate::event::{Event, EventType, Source};
use crate::handler::{Effects, Outcome, Publish};
use crate::metrics::TypeMetrics;
use crate::provider::{Append, Lease, LeaseKey, Settled, Settlement};
use crate::retry;
use crate::subscription;

/// Ended attempts that may wait for settlement; a full queue holds workers back.
pub(super) const QUEUE: usize = 4_096;

/// The most settlements written at once.
const BATCH: usize = 1_024;

/// How often and how long a failing store is tried before the leases are left to expire.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// An attempt that has ended.
pub(super) struct Ended {
    pub(super) lease: Lease,
    pub(super) binding: Arc<Own>,
    pub(super) outcome: Outcome,
    pub(super) started_at: Timestamp,
    pub(super) duration: Duration,
}

/// The leases that this process holds, by token: what must be renewed, and given back at the end.
#[derive(Default)]
pub(super) struct Held {
    by_token: Mutex<HashMap<u64, (LeaseKey, Instant)>>,
    emptied: Notify,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Waits until nothing is held.
    pub(super) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (LeaseKey, Instant)>> {
        self.by_token.lock()
    }

    pub(super) fn hold(&self, leases: &[Lease], since: Instant) {
        self.lock().extend(leases.iter().map(|lease| (lease.key.token, (lease.key.clone(), since))));
    }

    pub(super) fn forget(&self, tokens: impl IntoIterator<Item = u64>) {
        let mut held = self.lock();
        for token in tokens {
            held.remove(&token);
        }
        if held.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// The leases that were taken or renewed before `limit`.
    pub(super) fn older_than(&self, limit: Instant) -> Vec<LeaseKey> {
        self.lock().values().filter(|(_, since)| *since <= limit).map(|(key, _)| key.clone()).collect()
    }

    pub(super) fn renewed(&self, keys: &[LeaseKey], at: Instant) {
        let mut held = self.lock();
        for key in keys {
            if let Some((_, since)) = held.get_mut(&key.token) {
                *since = at;
            }
        }
    }

    pub(super) fn take_all(&self) -> Vec<LeaseKey> {
        self.lock().drain().map(|(_, (key, _))| key).collect()
    }
}

/// Settles until `quit` turns true and what had ended by then is settled.
pub(super) async fn run(shared: Arc<Shared>, mut queue: mpsc::Receiver<Ended>, mut quit: watch::Receiver<bool>) {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            () = raised(&mut quit), if !queue.is_closed() => queue.close(),
            count = queue.recv_many(&mut batch, BATCH) => match count {
                0 => return,
                _ => shared.settle_all(batch.drain(..)).await,
            },
        }
    }
}

impl Shared {
    /// Settles attempts, or hands them over to the task that does. None is left.
    pub(super) async fn settle(&self, ended: &mut Vec<Ended>) {
        if !self.capabilities.grouping {
            return self.settle_all(ended.drain(..)).await;
        }
        for one in ended.drain(..) {
            if self.settlements.send(one).await.is_err() {
                // The settling task is gone: the lease is given back, or expires.
                tracing::debug!("an attempt ended after settlement had stopped");
            }
        }
    }

    async fn settle_all(&self, batch: impl Iterator<Item = Ended>) {
        let (fates, results) = {
            // Held from matching what handlers publish until that is stored.
            let _gate = self.router.hold().await;
            let (fates, settlements): (Vec<Fate>, Vec<Settlement>) = batch.map(|ended| self.decide(ended)).unzip();
            let Some(results) = self.write(&fates, settlements).await else { return };
            (fates, results)
        };
        let (mut refused, mut kind) = (Vec::new(), None);
        for (mut fate, result) in fates.into_iter().zip(results) {
            match result {
                Settled::Done { finished } => self.done(&fate, finished, self.kind(&mut kind, &fate)),
                Settled::Stale => self.stale(&fate),
                Settled::Conflict { reason } => {
                    if let Some(settlement) = fate.spare.take() {
                        let settlement = self.refuse_effects(&mut fate, *settlement, &reason);
                        refused.push((fate, settlement));
                    }
                }
            }
        }
        self.settle_refused(refused).await;
    }

    /// What could not be applied counts as a fault of the host: the attempt is made again.
    async fn settle_refused(&self, refused: Vec<(Fate, Settlement)>) {
        if refused.is_empty() {
            return;
        }
        let (fates, settlements): (Vec<Fate>, Vec<Settlement>) = refused.into_iter().unzip();
        let Some(results) = self.write(&fates, settlements).await else { return };
        let mut kind = None;
        for (fate, result) in fates.iter().zip(results) {
            match result {
                Settled::Done { finished } => self.done(fate, finished, self.kind(&mut kind, fate)),
                Settled::Stale | Settled::Conflict { .. } => self.stale(fate),
            }
        }
    }

    fn decide(&self, ended: Ended) -> (Fate, Settlement) {
        let Ended { lease, binding, outcome, started_at, duration } = ended;
        let so_far = SoFar::of(&lease);
        let next = self.next(&so_far, &binding, outcome.verdict, outcome.retry_after);
        let exhausted = next == Next::Fail && outcome.verdict != Verdict::Reject && lease.attempt > 1;
        let error = outcome.fault.map(|mut fault| {
            if exhausted {
                fault.message = format!("handler failed after {} attempts: {}", lease.attempt, fault.message);
            }
            fault
        });
        let attempt = Attempt {
            number: lease.number,
            verdict: outcome.verdict,
            started_at,
            duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
            worker: Arc::clone(binding.worker()),
            error,
            reply: outcome.reply,
            trace: outcome.trace,
        };
        let Lease { key, event, .. } = lease;
        let token = key.token;
        let settlement = Settlement { key, next, attempt: Some(attempt), published: Vec::new(), writes: Vec::new() };
        let mut fate = Fate {
            verdict: outcome.verdict,
            next,
            token,
            event,
            so_far,
            binding,
            duration,
            published: Vec::new(),
            spare: None,
            death: None,
        };
        let settlement = match next {
            Next::Complete => self.with_effects(&mut fate, settlement, outcome.effects),
            _ => settlement,
        };
        fate.death = death(&settlement);
        (fate, settlement)
    }

    fn next(&self, so_far: &SoFar, binding: &Binding, verdict: Verdict, after: Option<Duration>) -> Next {
        binding.policy.next(&retry::Ended {
            verdict,
            attempt: so_far.attempt,
            infra_faults: so_far.infra_faults + u32::from(verdict.is_infra()),
            age: so_far.age,
            after,
            roll: if verdict == Verdict::Ok { 0.0 } else { self.jitter.roll() },
        })
    }

    /// Adds what a success wants published and written, in the form that the store applies.
    fn with_effects(&self, fate: &mut Fate, mut settlement: Settlement, effects: Effects) -> Settlement {
        let Effects { published, writes } = effects;
        if published.is_empty() && writes.is_empty() {
            return settlement;
        }
        match self.appends(fate, published) {
            Ok(appends) => (settlement.published, settlement.writes) = (appends, writes),
            Err(error) => return self.refuse_effects(fate, settlement, &error.to_string()),
        }
        let told =
            |append: &Append| (append.event.source, append.event.event_type.clone(), Arc::clone(&append.subscriptions));
        fate.published = settlement.published.iter().map(told).collect();
        fate.spare = Some(Box::new(settlement.clone()));
        settlement
    }

    fn appends(&self, fate: &Fate, published: Vec<Publish>) -> Result<Vec<Append>> {
        let convert = |(index, publish): (usize, Publish)| {
            let cause = &fate.event;
            let event = publish.into_event(cause, &fate.binding.name, index, &self.instance_id);
            event.validate(self.options.max_payload)?;
            let subscriptions = self.router.matching(&event.event_type)?;
            Ok(Append { event: Arc::new(event), subscriptions })
        };
        published.into_iter().enumerate().map(convert).collect()
    }

    fn refuse_effects(&self, fate: &mut Fate, mut settlement: Settlement, reason: &str) -> Settlement {
        let message = format!("what the handler wrote or published cannot be applied: {reason}");
        (fate.verdict, fate.spare) = (Verdict::HostFault, None);
        fate.published.clear();
        fate.next = self.next(&fate.so_far, &fate.binding, Verdict::HostFault, None);
        settlement.next = fate.next;
        settlement.published.clear();
        settlement.writes.clear();
        if let Some(attempt) = &mut settlement.attempt {
            attempt.error = Some(Box::new(Fault::new("effects-refused", message)));
            (attempt.verdict, attempt.reply) = (Verdict::HostFault, None);
        }
        fate.death = death(&settlement);
        settlement
    }

    /// Writes the batch, patiently. `None` when the store kept failing: the leases expire, and others take over.
    async fn write(&self, fates: &[Fate], settlements: Vec<Settlement>) -> Option<Vec<Settled>> {
        // Memory does not fail for a while: there is nothing to try again, and nothing to keep for it.
        let tries = if self.capabilities.ends_with_process() { 1 } else { TRIES };
        let (mut batch, mut pause) = (settlements, FIRST_PAUSE);
        for left in (0..tries).rev() {
            let this = if left == 0 { std::mem::take(&mut batch) } else { batch.clone() };
            let began = self.timing();
            match self.provider.settle(this).await {
                Ok(results) => {
                    self.operations.settle.observe(began.map(|began| began.elapsed()), fates.len());
                    self.leases.forget(fates.iter().map(|fate| fate.token));
                    return Some(results);
                }
                Err(error) => {
                    tracing::warn!(error = %error, cause = ?error, count = fates.len(), tries_left = left, "cannot settle attempts");
                    tokio::time::sleep(if left == 0 { Duration::ZERO } else { pause }).await;
                    pause *= 2;
                }
            }
        }
        tracing::error!(count = fates.len(), "gave up settling attempts; their leases will expire");
        self.leases.forget(fates.iter().map(|fate| fate.token));
        None
    }

    /// What is known of the event's kind: that of the one before, mostly.
    fn kind<'a>(&self, last: &'a mut Option<Kind>, fate: &Fate) -> &'a Kind {
        let event = &fate.event;
        let same = last.take().filter(|last| last.source == event.source && last.event_type == event.event_type);
        last.insert(same.unwrap_or_else(|| Kind {
            source: event.source,
            event_type: event.event_type.clone(),
            metrics: self.metrics.of_type(event.source, &event.event_type),
        }))
    }

    /// Counts what was applied, and tells who waits for an event that it finished.
    fn done(&self, fate: &Fate, finished: Option<Status>, kind: &Kind) {
        self.count(fate, &kind.metrics);
        match fate.next {
            Next::Retry { after } => self.hints.due(after),
            _ if fate.binding.ordering == subscription::Ordering::Key => {
                self.offer([&fate.binding.name]);
            }
            _ => {}
        }
        for (source, event_type, subscriptions) in &fate.published {
            self.count_published(*source, event_type);
            self.offer(subscriptions.iter());
        }
        if let Some(status) = finished {
            kind.metrics.processed(status);
            self.waiters.tell(&fate.event.id);
        }
    }

    fn count(&self, fate: &Fate, of_type: &TypeMetrics) {
        let (metrics, totals, event) = (&fate.binding.metrics, &self.totals, &fate.event);
        metrics.attempt(fate.verdict);
        totals.processed.fetch_add(1, Ordering::Relaxed);
        of_type.duration.observe(fate.duration.as_secs_f64());
        match fate.next {
            Next::Retry { .. } => {
                metrics.retries.inc();
            }
            Next::Fail => {
                totals.failed.fetch_add(1, Ordering::Relaxed);
                metrics.dead_letters.inc();
                let (error, subscription) = (fate.death.as_deref().unwrap_or_default(), &fate.binding.name);
                tracing::warn!(event = %event.id, %subscription, verdict = %fate.verdict, error, "a delivery became a dead letter");
            }
            Next::Complete | Next::Release => {}
        }
    }

    fn stale(&self, fate: &Fate) {
        self.totals.stale.fetch_add(1, Ordering::Relaxed);
        self.metrics.stale_settlements().inc();
        let event = &fate.event.id;
        tracing::info!(%event, subscription = %fate.binding.name, "a settlement came after its lease had gone");
    }
}

/// Source, type and subscriptions of an event that a handler publishes.
type Told = (Source, EventType, Arc<[Arc<str>]>);

/// What is the same for all events of one source and type.
struct Kind {
    source: Source,
    event_type: EventType,
    metrics: Arc<TypeMetrics>,
}

/// What is decided about an attempt, and known of it while the store applies that.
struct Fate {
    verdict: Verdict,
    next: Next,
    /// Of the lease.
    token: u64,
    event: Arc<Event>,
    so_far: SoFar,
    binding: Arc<Own>,
    duration: Duration,
    /// What the success publishes.
    published: Vec<Told>,
    /// The settlement once more, where the store may answer that its effects cannot be applied.
    spare: Option<Box<Settlement>>,
    /// Why the delivery becomes a dead letter, where it does.
    death: Option<String>,
}

/// What decides, besides its verdict, what comes after an attempt.
struct SoFar {
    attempt: u32,
    infra_faults: u32,
    age: Duration,
}

impl SoFar {
    fn of(lease: &Lease) -> Self {
        Self { attempt: lease.attempt, infra_faults: lease.infra_faults, age: lease.age }
    }
}

/// The error of a settlement that makes a dead letter.
fn death(settlement: &Settlement) -> Option<String> {
    let attempt = settlement.attempt.as_ref().filter(|_| settlement.next == Next::Fail)?;
    attempt.error.as_ref().map(ToString::to_string)
}

/// Rolls for the jitter of retries.
pub(super) struct Jitter(Mutex<SmallRng>);

impl Jitter {
    pub(super) fn new(seed: Option<u64>) -> Self {
        Self(Mutex::new(SmallRng::seed_from_u64(seed.unwrap_or_else(rand::random))))
    }

    fn roll(&self) -> f64 {
        self.0.lock().random()
    }
}

impl Shared {
    /// Gives leases back unpunished.
    pub(super) async fn release(&self, leases: Vec<Lease>) -> Result<()> {
        self.release_keys(leases.into_iter().map(|lease| lease.key).collect()).await
    }

    pub(super) async fn release_keys(&self, keys: Vec<LeaseKey>) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        self.leases.forget(keys.iter().map(|key| key.token));
        let give_back =
            |key| Settlement { key, next: Next::Release, attempt: None, published: Vec::new(), writes: Vec::new() };
        self.provider.settle(keys.into_iter().map(give_back).collect()).await.map(drop)
    }
}
