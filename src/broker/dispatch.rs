//! Claims by demand: asks the store for what the lanes have room for, and wakes workers.
//!
//! A claim is made when something hints at work: a publish of this process, a freed worker, a tick of the store, a due
//! time, or at the latest the poll. Hints carry no promise; the truth is always read from the store.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foldhash::HashSet;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, Sleep};

use super::Shared;
use super::lanes::{Claim, Lanes, Places, Wanted};
use super::service::raised;
use crate::delivery::{Next, Verdict};
use crate::provider::{ClaimRequest, Claimed, Lease, Lost};

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

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock()
    }
}

impl Shared {
    /// These subscriptions may have something to claim. Where the store does not gain from large claims a worker claims
    /// before it works; elsewhere the dispatcher does, for all who hint at the same time.
    pub(super) fn offer<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        if self.capabilities.grouping { self.hints.about(names) } else { self.lanes.offer(names) }
    }

    /// A lane has room again: claims for it, or has it claimed for. `true` when there may be something to do now, for the
    /// worker that asks, or for others if it is `busy`.
    pub(super) async fn refill(&self, busy: bool) -> bool {
        if self.capabilities.grouping {
            self.hints.nudge();
            return false;
        }
        let now = Instant::now();
        let wanted = self.lanes.wants(now);
        if wanted.is_empty() {
            // The dispatcher comes back for a lane that its rate holds.
            if self.lanes.next_token().is_some() {
                self.hints.nudge();
            }
            return false;
        }
        let Some((next_due, _)) = self.claim(wanted, now, busy).await else {
            self.hints.due(STORE_PAUSE);
            return false;
        };
        if let Some(due) = next_due
            && due < self.options.poll
        {
            self.hints.due(due);
        }
        true
    }

    /// Claims what the lanes want. The answer is how long until more becomes due, as far as the store knows, and when
    /// it was given; `None` when the store failed. With `wake` a worker is woken for what it gave.
    async fn claim(&self, wanted: Wanted, now: Instant, wake: bool) -> Option<(Option<Duration>, Instant)> {
        let mut claiming = Claiming::new(self, wanted);
        let Claimed { leases, lost, next_due } = match self.provider.claim(&claiming.request).await {
            Ok(claimed) => claimed,
            Err(error) => {
                tracing::warn!(error = %error, cause = ?error, "cannot claim deliveries; trying again");
                return None;
            }
        };
        let given = self.timing();
        self.operations.claim.observe(given.map(|at| at - now), leases.len());
        let at = given.unwrap_or(now);
        self.leases.hold(&leases, at);
        let homeless = claiming.end(leases, at, wake);
        if let Err(error) = self.release(homeless).await {
            tracing::warn!(error = %error, "cannot give leases back; they expire by themselves");
        }
        lost.iter().for_each(|lost| self.count_lost(lost));
        Some((next_due, at))
    }

    /// Nobody settles an attempt that was lost: it is counted by who found out. Which version of a plugin it ran on is
    /// known to the worker that is gone, so it counts for the subscription only.
    fn count_lost(&self, lost: &Lost) {
        let Some(binding) = self.lanes.binding(&lost.key.subscription) else { return };
        binding.metrics.attempt(Verdict::Lost);
        if lost.next == Next::Fail {
            self.totals.failed.fetch_add(1, Ordering::Relaxed);
            binding.metrics.dead_letters.inc();
            tracing::warn!(seq = lost.key.seq, subscription = %binding.name, "a delivery was lost too often and became a dead letter");
        } else {
            binding.metrics.retries.inc();
        }
    }
}

/// A claim on its way. Dropped before its end, it gives the lanes their hints back.
struct Claiming<'a> {
    lanes: &'a Lanes,
    request: ClaimRequest,
    places: Places,
    ended: bool,
}

impl<'a> Claiming<'a> {
    fn new(shared: &'a Shared, wanted: Wanted) -> Self {
        let Wanted { wants, places } = wanted;
        let (worker, lease) = (Arc::clone(&shared.instance_id), shared.options.lease);
        Self { lanes: &shared.lanes, request: ClaimRequest { worker, lease, wants }, places, ended: false }
    }

    /// Hands the lanes what they got; returns what is not theirs.
    fn end(&mut self, leases: Vec<Lease>, at: Instant, wake: bool) -> Vec<Lease> {
        self.ended = true;
        self.lanes.accept(Claim { request: &self.request, places: &self.places, leases, at }, wake)
    }
}

impl Drop for Claiming<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.lanes.refund(&self.places);
        }
    }
}

/// Runs until `stop` turns true.
pub(super) async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let mut dispatcher = Dispatcher::new(shared);
    loop {
        let wait = dispatcher.step().await;
        tokio::select! {
            biased;
            () = raised(&mut stop) => return,
            () = dispatcher.wait(wait) => {}
        }
    }
}

/// Claims what is ready until nothing is and nobody works. For stores that forget what is pending when they close.
pub(super) async fn drain(shared: &Arc<Shared>) {
    let mut dispatcher = Dispatcher::new(Arc::clone(shared));
    loop {
        shared.lanes.hint_all();
        dispatcher.step().await;
        if !shared.lanes.idled().await {
            if shared.leases.is_empty() {
                return;
            }
            // What is being settled may publish more.
            shared.leases.emptied().await;
        }
        tokio::task::yield_now().await;
    }
}

struct Dispatcher {
    shared: Arc<Shared>,
    /// Ticks of a store that others write to.
    wake: Option<watch::Receiver<u64>>,
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
        let wake = shared.capabilities.shared.then(|| shared.provider.wake());
        Self { wake, shared, next_round: now, last_round: now, timer }
    }

    /// Claims once, and says how long there is nothing to do unless something hints.
    async fn step(&mut self) -> Duration {
        let now = Instant::now();
        self.take_hints(now);
        let wanted = self.shared.lanes.wants(now);
        if wanted.is_empty() {
            return self.idle_for(now);
        }
        let Some((next_due, claimed_at)) = self.shared.claim(wanted, now, true).await else { return STORE_PAUSE };
        self.note_due(next_due, claimed_at);
        if self.shared.lanes.has_hints() { Duration::ZERO } else { self.idle_for(claimed_at) }
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
        tokio::select! {
            () = self.shared.hints.notify.notified() => {}
            () = self.timer.as_mut() => {}
            () = ticked(self.wake.as_mut()) => {
                let quiet = self.last_round + TICK_DEBOUNCE;
                self.next_round = self.next_round.min(quiet.max(Instant::now()));
            }
        }
    }
}

/// Waits for a tick; for ever where none can come any more.
async fn ticked(wake: Option<&mut watch::Receiver<u64>>) {
    if let Some(wake) = wake
        && wake.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
