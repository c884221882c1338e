//! Claims by demand: asks the store for what the lanes have room for, and starts workers.
//!
//! A claim is made when something hints at work: a publish of this process, a freed worker, a tick of the store, a due
//! time, or at the latest the poll. Hints carry no promise; the truth is always read from the store.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foldhash::HashSet;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};

use super::Shared;
use super::attempt;
use super::service::raised;
use crate::delivery::{Next, Verdict};
use crate::provider::{ClaimRequest, Claimed, Lost, Want};

/// Ticks of a shared store come with every write of every process: look at all lanes at most this often for them.
const TICK_DEBOUNCE: Duration = Duration::from_millis(5);

/// How long to leave a store alone that has just failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// Which subscriptions may have something to claim.
#[derive(Default)]
pub(super) struct Hints {
    pending: Mutex<Pending>,
    notify: Notify,
}

#[derive(Default)]
struct Pending {
    all: bool,
    names: HashSet<Arc<str>>,
    /// When to look at all lanes again: a retry of this process becomes due.
    due: Option<Instant>,
}

impl Hints {
    /// These subscriptions may have something to claim.
    pub(super) fn about<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut pending = self.lock();
        let mut news = false;
        for name in names {
            if !pending.names.contains(name) {
                pending.names.insert(Arc::clone(name));
                news = true;
            }
        }
        drop(pending);
        if news {
            self.notify.notify_one();
        }
    }

    /// Every subscription may have something to claim.
    pub(super) fn about_all(&self) {
        self.lock().all = true;
        self.notify.notify_one();
    }

    /// Something becomes due `after` from now.
    pub(super) fn due(&self, after: Duration) {
        let at = Instant::now() + after;
        let mut pending = self.lock();
        if pending.due.is_none_or(|due| at < due) {
            pending.due = Some(at);
            drop(pending);
            self.notify.notify_one();
        }
    }

    /// A lane has room again.
    pub(super) fn nudge(&self) {
        self.notify.notify_one();
    }

    fn take(&self) -> Pending {
        let mut pending = self.lock();
        let due = pending.due;
        let taken = std::mem::take(&mut *pending);
        pending.due = due;
        taken
    }

    fn forget_due(&self) {
        self.lock().due = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until `stop` turns true. Workers go on in `workers`.
pub(super) async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>, workers: &mut JoinSet<()>) {
    let mut dispatcher = Dispatcher::new(Arc::clone(&shared));
    loop {
        let wait = dispatcher.step(workers).await;
        while workers.try_join_next().is_some() {}
        tokio::select! {
            biased;
            () = raised(&mut stop) => return,
            () = dispatcher.wait(wait) => {}
        }
    }
}

/// Claims what is ready until nothing is and nobody works. For stores that forget what is pending when they close.
pub(super) async fn drain(shared: &Arc<Shared>, workers: &mut JoinSet<()>) {
    let mut dispatcher = Dispatcher::new(Arc::clone(shared));
    loop {
        shared.lanes.hint_all();
        dispatcher.step(workers).await;
        if !shared.lanes.is_idle() {
            workers.join_next().await;
        } else if shared.leases.is_empty() {
            return;
        } else {
            // What is being settled may publish more.
            shared.leases.emptied().await;
        }
        tokio::task::yield_now().await;
    }
}

struct Dispatcher {
    shared: Arc<Shared>,
    wake: watch::Receiver<u64>,
    /// When all lanes are looked at, whatever hints say.
    next_round: Instant,
    last_round: Instant,
    /// Kept from wait to wait: arming a timer anew costs more than waking once too early.
    timer: Pin<Box<Sleep>>,
}

impl Dispatcher {
    fn new(shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(now));
        Self { wake: shared.provider.wake(), shared, next_round: now, last_round: now, timer }
    }

    /// Claims once, and says how long there is nothing to do unless something hints.
    async fn step(&mut self, workers: &mut JoinSet<()>) -> Duration {
        let now = Instant::now();
        self.take_hints(now);
        let wants = self.shared.lanes.wants(now);
        if wants.is_empty() {
            return self.idle_for(now);
        }
        match self.shared.provider.claim(&self.request(&wants)).await {
            Ok(claimed) => {
                let claimed_at = Instant::now();
                self.shared.operations.claim.observe(claimed_at - now, claimed.leases.len());
                self.note_due(claimed.next_due, claimed_at);
                claimed.lost.iter().for_each(|lost| self.count_lost(lost));
                self.start(&wants, claimed, claimed_at, workers).await;
                if self.shared.lanes.has_hints() { Duration::ZERO } else { self.idle_for(claimed_at) }
            }
            Err(error) => {
                tracing::warn!(error = %error, cause = ?error, "cannot claim deliveries; trying again");
                self.shared.lanes.refund(&wants);
                STORE_PAUSE
            }
        }
    }

    fn request(&self, wants: &[Want]) -> ClaimRequest {
        let (worker, lease) = (Arc::clone(&self.shared.instance_id), self.shared.options.lease);
        ClaimRequest { worker, lease, wants: wants.to_vec() }
    }

    async fn start(&self, wants: &[Want], claimed: Claimed, at: Instant, workers: &mut JoinSet<()>) {
        self.shared.leases.hold(&claimed.leases, at);
        let (count, homeless) = self.shared.lanes.accept(wants, claimed.leases, at);
        for _ in 0..count {
            workers.spawn(attempt::work(Arc::clone(&self.shared)));
        }
        if let Err(error) = self.shared.release(homeless).await {
            tracing::warn!(error = %error, "cannot give leases back; they expire by themselves");
        }
    }

    /// Nobody settles an attempt that was lost: it is counted by who found out. Which version of a plugin it ran on is
    /// known to the worker that is gone, so it counts for the subscription only.
    fn count_lost(&self, lost: &Lost) {
        let Some(binding) = self.shared.lanes.binding(&lost.key.subscription) else { return };
        binding.metrics.attempt(Verdict::Lost);
        if lost.next == Next::Fail {
            self.shared.totals.failed.fetch_add(1, Ordering::Relaxed);
            binding.metrics.dead_letters.inc();
            tracing::warn!(seq = lost.key.seq, subscription = %binding.name, "a delivery was lost too often and became a dead letter");
        } else {
            binding.metrics.retries.inc();
        }
    }

    fn take_hints(&mut self, now: Instant) {
        let hints = self.shared.hints.take();
        if hints.due.is_some_and(|due| due <= now) {
            self.shared.hints.forget_due();
            self.next_round = now;
        } else if let Some(due) = hints.due {
            self.next_round = self.next_round.min(due);
        }
        if hints.all || now >= self.next_round {
            self.shared.lanes.hint_all();
            self.last_round = now;
            self.next_round = now + self.shared.options.poll;
        } else {
            self.shared.lanes.hint(&hints.names);
        }
    }

    /// Comes back for what becomes due before the next poll.
    fn note_due(&mut self, next_due: Option<Duration>, now: Instant) {
        if let Some(after) = next_due {
            // A store may be early: a moment's pause keeps an early answer from becoming a busy loop.
            self.next_round = self.next_round.min(now + after.max(TICK_DEBOUNCE));
        }
    }

    fn idle_for(&self, now: Instant) -> Duration {
        let round = self.next_round.saturating_duration_since(now);
        self.shared.lanes.next_token().map_or(round, |token| round.min(token))
    }

    /// Waits for `wait`, a hint, or a tick of a store that others write to.
    async fn wait(&mut self, wait: Duration) {
        if wait.is_zero() {
            return tokio::task::yield_now().await;
        }
        let until = Instant::now() + wait;
        if self.timer.is_elapsed() || self.timer.deadline() > until {
            self.timer.as_mut().reset(until);
        }
        let shared_store = self.shared.capabilities.shared;
        tokio::select! {
            () = self.shared.hints.notify.notified() => {}
            () = self.timer.as_mut() => {}
            changed = self.wake.changed(), if shared_store => {
                if changed.is_ok() {
                    let quiet = self.last_round + TICK_DEBOUNCE;
                    self.next_round = self.next_round.min(quiet.max(Instant::now()));
                } else {
                    self.timer.as_mut().await;
                }
            }
        }
    }
}
