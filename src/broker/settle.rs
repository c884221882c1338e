//! The end of attempts: decides what becomes of each delivery, and writes it in groups.
//!
//! One task does all settling. While the store writes one batch the next one gathers, so that a busy broker writes few
//! and large batches and an idle one does not wait.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::Shared;
use super::lanes::Binding;
use super::service::raised;
use crate::delivery::{Attempt, EventRecord, Fault, Next, Status, Verdict};
use crate::error::Result;
use crate::handler::{Effects, Outcome};
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
    pub(super) binding: Arc<Binding>,
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
        self.by_token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hold(&self, leases: &[Lease]) {
        let now = Instant::now();
        self.lock().extend(leases.iter().map(|lease| (lease.key.token, (lease.key.clone(), now))));
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
    let seed = shared.options.seed.unwrap_or_else(rand::random);
    let mut settler = Settler { shared, rng: SmallRng::seed_from_u64(seed) };
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            () = raised(&mut quit), if !queue.is_closed() => queue.close(),
            count = queue.recv_many(&mut batch, BATCH) => match count {
                0 => return,
                _ => settler.settle(std::mem::take(&mut batch)).await,
            },
        }
    }
}

struct Settler {
    shared: Arc<Shared>,
    rng: SmallRng,
}

impl Settler {
    async fn settle(&mut self, batch: Vec<Ended>) {
        let mut decided: Vec<Decided> = batch.into_iter().map(|ended| self.decide(ended)).collect();
        let shared = Arc::clone(&self.shared);
        let _gate = shared.router.hold().await;
        for entry in &mut decided {
            if let Err(error) = self.attach_effects(entry) {
                self.refuse_effects(entry, &error.to_string());
            }
        }
        let Some(results) = self.write(&decided).await else { return };
        let mut conflicts = Vec::new();
        for (entry, result) in decided.into_iter().zip(results) {
            match result {
                Settled::Done { event_open } => self.done(&entry, event_open).await,
                Settled::Stale => self.stale(&entry),
                Settled::Conflict { reason } => conflicts.push((entry, reason)),
            }
        }
        self.settle_conflicts(conflicts).await;
    }

    /// What could not be applied counts as a fault of the host: the attempt is made again.
    async fn settle_conflicts(&mut self, conflicts: Vec<(Decided, String)>) {
        let mut again = Vec::new();
        for (mut entry, reason) in conflicts {
            self.refuse_effects(&mut entry, &reason);
            again.push(entry);
        }
        if again.is_empty() {
            return;
        }
        let Some(results) = self.write(&again).await else { return };
        for (entry, result) in again.iter().zip(results) {
            match result {
                Settled::Done { event_open } => self.done(entry, event_open).await,
                Settled::Stale | Settled::Conflict { .. } => self.stale(entry),
            }
        }
    }

    fn decide(&mut self, ended: Ended) -> Decided {
        let next = self.next(&ended.lease, &ended.binding, &ended.outcome);
        let Ended { lease, binding, outcome, started_at, duration } = ended;
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
            worker: Arc::clone(&self.shared.instance_id),
            error,
            reply: outcome.reply,
            trace: outcome.trace,
        };
        let settlement = Settlement {
            key: lease.key.clone(),
            next,
            attempt: Some(attempt),
            published: Vec::new(),
            writes: Vec::new(),
        };
        Decided { settlement, effects: outcome.effects, lease, binding, duration }
    }

    fn next(&mut self, lease: &Lease, binding: &Binding, outcome: &Outcome) -> Next {
        binding.policy.next(&retry::Ended {
            verdict: outcome.verdict,
            attempt: lease.attempt,
            infra_faults: lease.infra_faults + u32::from(outcome.verdict.is_infra()),
            age: lease.age,
            after: outcome.retry_after,
            roll: self.rng.random(),
        })
    }

    /// Turns what a success wants published and written into what the store applies.
    fn attach_effects(&self, entry: &mut Decided) -> Result<()> {
        if entry.settlement.next != Next::Complete {
            return Ok(());
        }
        let Effects { published, writes } = std::mem::take(&mut entry.effects);
        for (index, publish) in published.into_iter().enumerate() {
            let cause = &entry.lease.event;
            let event = publish.into_event(cause, &entry.binding.name, index, &self.shared.instance_id);
            event.validate(self.shared.options.max_payload)?;
            let subscriptions = self.shared.router.matching(&event.event_type)?;
            entry.settlement.published.push(Append { event, subscriptions });
        }
        entry.settlement.writes = writes;
        Ok(())
    }

    fn refuse_effects(&mut self, entry: &mut Decided, reason: &str) {
        let fault =
            Fault::new("effects-refused", format!("what the handler wrote or published cannot be applied: {reason}"));
        let outcome = Outcome::failed(Verdict::HostFault, fault.clone());
        entry.settlement.next = self.next(&entry.lease, &entry.binding, &outcome);
        entry.settlement.published.clear();
        entry.settlement.writes.clear();
        if let Some(attempt) = &mut entry.settlement.attempt {
            (attempt.verdict, attempt.error, attempt.reply) = (Verdict::HostFault, Some(fault), None);
        }
    }

    /// Writes the batch, patiently. `None` when the store kept failing: the leases expire, and others take over.
    async fn write(&self, decided: &[Decided]) -> Option<Vec<Settled>> {
        let mut pause = FIRST_PAUSE;
        for _ in 0..TRIES {
            let batch = decided.iter().map(|entry| entry.settlement.clone()).collect();
            let started = Instant::now();
            match self.shared.provider.settle(batch).await {
                Ok(results) => {
                    self.shared.operations.settle.observe(started.elapsed(), decided.len());
                    self.shared.leases.forget(decided.iter().map(|entry| entry.lease.key.token));
                    return Some(results);
                }
                Err(error) => {
                    tracing::warn!(error = %error, cause = ?error, count = decided.len(), "cannot settle attempts; trying again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        tracing::error!(count = decided.len(), "gave up settling attempts; their leases will expire");
        self.shared.leases.forget(decided.iter().map(|entry| entry.lease.key.token));
        None
    }

    async fn done(&self, entry: &Decided, event_open: bool) {
        self.count(entry);
        match entry.settlement.next {
            Next::Retry { after } => self.shared.hints.due(after),
            _ if entry.binding.ordering == subscription::Ordering::Key => {
                self.shared.hints.about([&entry.binding.name])
            }
            _ => {}
        }
        for published in &entry.settlement.published {
            self.shared.count_published(&published.event);
            self.shared.hints.about(published.subscriptions.iter());
        }
        if !event_open {
            self.finished(entry).await;
        }
    }

    fn count(&self, entry: &Decided) {
        let (binding, totals) = (&entry.binding, &self.shared.totals);
        let Some(attempt) = &entry.settlement.attempt else { return };
        binding.metrics.attempt(attempt.verdict);
        totals.processed.fetch_add(1, Ordering::Relaxed);
        let event = &entry.lease.event;
        self.shared.metrics.of_type(event.source, &event.event_type).duration.observe(entry.duration.as_secs_f64());
        match entry.settlement.next {
            Next::Retry { .. } => {
                binding.metrics.retries.inc();
            }
            Next::Fail => {
                totals.failed.fetch_add(1, Ordering::Relaxed);
                binding.metrics.dead_letters.inc();
                let error = attempt.error.as_ref().map(ToString::to_string).unwrap_or_default();
                tracing::warn!(event = %event.id, subscription = %binding.name, verdict = %attempt.verdict, error, "a delivery became a dead letter");
            }
            Next::Complete | Next::Release => {}
        }
    }

    /// The event has no open delivery any more.
    async fn finished(&self, entry: &Decided) {
        let event = &entry.lease.event;
        let metrics = self.shared.metrics.of_type(event.source, &event.event_type);
        // Only the store knows whether another delivery of the event failed; ask only where there can be another.
        let status = match entry.settlement.next {
            Next::Fail => Status::Failed,
            _ if self.shared.router.matching(&event.event_type).is_ok_and(|names| names.len() <= 1) => {
                Status::Completed
            }
            _ => self.shared.status_of(event.id.as_str()).await.unwrap_or(Status::Completed),
        };
        metrics.processed(status);
        self.shared.waiters.tell(&event.id);
    }

    fn stale(&self, entry: &Decided) {
        self.shared.totals.stale.fetch_add(1, Ordering::Relaxed);
        self.shared.metrics.stale_settlements().inc();
        let event = &entry.lease.event;
        tracing::info!(event = %event.id, subscription = %entry.binding.name, "a settlement came after its lease had gone");
    }
}

/// An attempt whose consequence is decided.
struct Decided {
    settlement: Settlement,
    effects: Effects,
    lease: Lease,
    binding: Arc<Binding>,
    duration: Duration,
}

impl Shared {
    async fn status_of(&self, id: &str) -> Option<Status> {
        let detail = self.provider.get(id).await.ok().flatten()?;
        Some(EventRecord::derive(Arc::clone(&detail.record.event), &detail.deliveries).status)
    }

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
