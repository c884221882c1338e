//! Leased deliveries waiting for a worker: one lane per subscription with a handler in this process.
//!
//! Lanes take turns, each runs at most its concurrency, and how far each leases ahead of its workers follows from how
//! fast it drains. Everything here is synchronous and behind one lock that is never held across an await.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::HashMap;
use tokio::time::Instant;

use super::Options;
use super::routing::Known;
use crate::handler::Handler;
use crate::metrics::{Metrics, SubscriptionMetrics};
use crate::provider::{Lease, Want};
use crate::retry::RetryPolicy;
use crate::subscription::Ordering;

/// A lane that had to wait longer than this for a worker leases less far ahead.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// The most lanes asked about in one claim.
const WANTS: usize = 256;

/// What a worker needs to make attempts for a subscription.
pub(super) struct Binding {
    pub(super) name: Arc<str>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) policy: RetryPolicy,
    pub(super) timeout: Duration,
    pub(super) ordering: Ordering,
    pub(super) metrics: SubscriptionMetrics,
}

/// A leased delivery on its way to a worker.
pub(super) struct Queued {
    pub(super) lease: Lease,
    pub(super) since: Instant,
}

/// One attempt for a worker to make.
pub(super) struct Job {
    pub(super) binding: Arc<Binding>,
    pub(super) queued: Queued,
}

/// How far a lane leases ahead of its workers.
#[derive(Debug, Clone, Copy)]
struct Window {
    ahead: usize,
    least: usize,
    most: usize,
}

impl Window {
    fn new(limit: usize, most: usize) -> Self {
        let least = limit.min(most);
        Self { ahead: least, least, most }
    }

    /// The lane ran dry although the last claim gave all it asked for: lease twice as far ahead.
    fn ran_dry(&mut self) {
        self.ahead = self.ahead.saturating_mul(2).min(self.most);
    }

    /// A delivery waited long: leave more to other instances.
    fn waited(&mut self, wait: Duration) {
        if wait > LONG_WAIT {
            self.ahead = (self.ahead / 2).max(self.least);
        }
    }
}

/// At most so many starts a second, with as many at once after a pause.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Rate {
    fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, tokens: per_second, at: Instant::now() }
    }

    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.per_second);
        self.at = now;
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "tokens are between 0 and u32::MAX")]
    fn room(&self) -> usize {
        self.tokens as usize
    }

    #[expect(clippy::cast_precision_loss, reason = "a claim is far below 2^52")]
    fn take(&mut self, count: usize) {
        self.tokens -= count as f64;
    }

    fn next_token(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens) / self.per_second).max(0.0))
    }
}

struct Lane {
    binding: Arc<Binding>,
    queue: VecDeque<Queued>,
    running: usize,
    limit: usize,
    paused: bool,
    rate: Option<Rate>,
    window: Window,
    /// Whether there may be more to claim.
    hinted: bool,
    /// How many deliveries the claim being taken in gave.
    given: usize,
    /// Whether the last claim gave all that was asked for.
    filled: bool,
    /// Whether the lane stands in the queue of lanes with work.
    in_turn: bool,
}

impl Lane {
    fn new(binding: Arc<Binding>, known: &Known, workers: usize, buffer: usize) -> Self {
        let limit = known.subscription.concurrency.map_or(workers, |limit| (limit.get() as usize).min(workers));
        Self {
            binding,
            queue: VecDeque::new(),
            running: 0,
            limit,
            paused: known.subscription.paused,
            rate: known.subscription.rate.map(|rate| Rate::new(rate.get())),
            window: Window::new(limit, buffer),
            hinted: false,
            given: 0,
            filled: false,
            in_turn: false,
        }
    }

    fn is_runnable(&self) -> bool {
        !self.queue.is_empty() && self.running < self.limit
    }

    /// How many deliveries to claim now. Nothing while the queue is more than half full: claims come in batches.
    fn room(&mut self, now: Instant) -> usize {
        if self.paused || self.queue.len() > self.window.ahead / 2 {
            return 0;
        }
        let room = (self.limit + self.window.ahead).saturating_sub(self.running + self.queue.len());
        match &mut self.rate {
            None => room,
            Some(rate) => {
                rate.refill(now);
                room.min(rate.room())
            }
        }
    }
}

struct State {
    lanes: HashMap<Arc<str>, Lane>,
    /// Lanes that are hinted, so that ten thousand idle ones cost nothing.
    hinted: VecDeque<Arc<str>>,
    /// Lanes with runnable work, in turn.
    turns: VecDeque<Arc<str>>,
    workers: usize,
    queued: usize,
}

/// All lanes of this process.
pub(super) struct Lanes {
    state: Mutex<State>,
    max_workers: usize,
    buffer: usize,
    metrics: Metrics,
}

/// How much a lane holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneStatus {
    pub(super) queued: usize,
    pub(super) running: usize,
}

/// How much all lanes hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) lanes: usize,
    pub(super) queued: usize,
    pub(super) running: usize,
}

impl Lanes {
    pub(super) fn new(max_workers: usize, buffer: usize, metrics: Metrics) -> Self {
        let (hinted, turns) = (VecDeque::new(), VecDeque::new());
        let state = State { lanes: HashMap::default(), hinted, turns, workers: 0, queued: 0 };
        Self { state: Mutex::new(state), max_workers, buffer, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock only means that a panic passed by: every change below leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a subscription a handler, or a new one. What it has leased stays.
    pub(super) fn bind(&self, known: &Known, handler: Arc<dyn Handler>, options: &Options) {
        let subscription = &known.subscription;
        let binding = Arc::new(Binding {
            name: Arc::clone(&subscription.name),
            handler,
            policy: subscription.retry.resolve(&options.retry),
            timeout: subscription.timeout.unwrap_or(options.timeout),
            ordering: subscription.ordering,
            metrics: self.metrics.of_subscription(&subscription.name),
        });
        let mut lane = Lane::new(binding, known, self.max_workers, self.buffer);
        let mut state = self.lock();
        if let Some(old) = state.lanes.remove(&subscription.name) {
            (lane.queue, lane.running) = (old.queue, old.running);
            (lane.in_turn, lane.hinted) = (old.in_turn, old.hinted);
        }
        let name = Arc::clone(&subscription.name);
        state.lanes.insert(Arc::clone(&name), lane);
        state.hint(&name);
        state.take_turn(&name);
    }

    /// Changes the knobs of a bound subscription; returns the leases that it must give back because it is paused now.
    pub(super) fn update(&self, known: &Known, options: &Options) -> Vec<Lease> {
        let name = &known.subscription.name;
        let Some(handler) = self.lock().lanes.get(name).map(|lane| Arc::clone(&lane.binding.handler)) else {
            return Vec::new();
        };
        self.bind(known, handler, options);
        if known.subscription.paused { self.lock().empty(name) } else { Vec::new() }
    }

    /// Takes the handler away; returns the leases that were waiting for it.
    pub(super) fn unbind(&self, name: &str) -> Vec<Lease> {
        let mut state = self.lock();
        let leases = state.empty(name);
        state.lanes.remove(name);
        leases
    }

    pub(super) fn status(&self, name: &str) -> Option<LaneStatus> {
        self.lock().lanes.get(name).map(|lane| LaneStatus { queued: lane.queue.len(), running: lane.running })
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        let running = state.lanes.values().map(|lane| lane.running).sum();
        Load { lanes: state.lanes.len(), queued: state.queued, running }
    }

    /// Notes that these lanes, or all, may have something to claim.
    pub(super) fn hint<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut state = self.lock();
        names.into_iter().for_each(|name| state.hint(name));
    }

    pub(super) fn hint_all(&self) {
        let mut state = self.lock();
        let idle: Vec<Arc<str>> =
            state.lanes.iter().filter(|(_, lane)| !lane.hinted).map(|(name, _)| Arc::clone(name)).collect();
        idle.iter().for_each(|name| state.hint(name));
    }

    /// What to claim now. The lanes named are no longer hinted: what a claim finds decides whether they are again.
    pub(super) fn wants(&self, now: Instant) -> Vec<Want> {
        let mut state = self.lock();
        let mut budget = self.buffer.saturating_sub(state.queued);
        let mut wants = Vec::new();
        for _ in 0..state.hinted.len() {
            let Some(name) = state.hinted.pop_front() else { break };
            let Some(lane) = state.lanes.get_mut(&name) else { continue };
            let room = lane.room(now).min(budget);
            if room == 0 || wants.len() == WANTS {
                state.hinted.push_back(name);
                continue;
            }
            if lane.filled && lane.queue.is_empty() {
                lane.window.ran_dry();
            }
            lane.hinted = false;
            budget -= room;
            wants.push(Want { subscription: name, room, ordering: lane.binding.ordering });
        }
        wants
    }

    /// How long until a lane that is held back by its rate may claim again.
    pub(super) fn next_token(&self) -> Option<Duration> {
        let state = self.lock();
        let held = state.hinted.iter().filter_map(|name| state.lanes.get(name)).filter(|lane| !lane.paused);
        held.filter_map(|lane| lane.rate.filter(|rate| rate.room() == 0)).map(|rate| rate.next_token()).min()
    }

    /// Queues what a claim gave; returns how many workers to start, and what came for lanes that are gone.
    pub(super) fn accept(&self, wants: &[Want], leases: Vec<Lease>, since: Instant) -> (usize, Vec<Lease>) {
        let mut state = self.lock();
        let mut homeless = Vec::new();
        for lease in leases {
            match state.lanes.get_mut(&lease.key.subscription) {
                Some(lane) if !lane.paused => {
                    lane.given += 1;
                    lane.queue.push_back(Queued { lease, since });
                    state.queued += 1;
                }
                _ => homeless.push(lease),
            }
        }
        wants.iter().for_each(|want| state.claimed(want));
        self.metrics.queue_size().set(i64::try_from(state.queued).unwrap_or(i64::MAX));
        (state.start_workers(self.max_workers), homeless)
    }

    /// What attempts for this subscription are made with.
    pub(super) fn binding(&self, name: &str) -> Option<Arc<Binding>> {
        self.lock().lanes.get(name).map(|lane| Arc::clone(&lane.binding))
    }

    /// Gives a failed claim's lanes their hints back.
    pub(super) fn refund(&self, wants: &[Want]) {
        self.hint(wants.iter().map(|want| &want.subscription));
    }

    /// The next attempt for a worker that has just finished one of `finished`; `None` sends the worker home.
    ///
    /// The second value says that some lane could do with another claim.
    pub(super) fn next(&self, finished: Option<&Arc<Binding>>) -> (Option<Job>, bool) {
        let mut state = self.lock();
        if let Some(binding) = finished {
            state.finish(&binding.name);
            self.metrics.workers_active().dec();
        }
        let Some((job, hungry)) = state.take_job() else {
            state.workers -= 1;
            return (None, !state.hinted.is_empty());
        };
        self.metrics.workers_active().inc();
        self.metrics.queue_size().set(i64::try_from(state.queued).unwrap_or(i64::MAX));
        (Some(job), hungry)
    }

    /// Whether some lane may have something to claim.
    pub(super) fn has_hints(&self) -> bool {
        !self.lock().hinted.is_empty()
    }

    /// Whether nothing is queued and nobody works.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.lock();
        state.queued == 0 && state.workers == 0
    }
}

impl State {
    fn hint(&mut self, name: &Arc<str>) {
        if let Some(lane) = self.lanes.get_mut(name)
            && !lane.hinted
        {
            lane.hinted = true;
            self.hinted.push_back(Arc::clone(name));
        }
    }

    fn claimed(&mut self, want: &Want) {
        let Some(lane) = self.lanes.get_mut(&want.subscription) else { return };
        let count = std::mem::take(&mut lane.given);
        lane.filled = count >= want.room;
        if let Some(rate) = &mut lane.rate {
            rate.take(count);
        }
        if lane.filled {
            self.hint(&want.subscription);
        }
        self.take_turn(&want.subscription);
    }

    fn take_turn(&mut self, name: &Arc<str>) {
        if let Some(lane) = self.lanes.get_mut(name)
            && !lane.in_turn
            && lane.is_runnable()
        {
            lane.in_turn = true;
            self.turns.push_back(Arc::clone(name));
        }
    }

    fn start_workers(&mut self, max: usize) -> usize {
        let runnable = self.turns.iter().filter_map(|name| self.lanes.get(name));
        let wanted: usize = runnable.map(|lane| lane.queue.len().min(lane.limit.saturating_sub(lane.running))).sum();
        let count = wanted.min(max.saturating_sub(self.workers));
        self.workers += count;
        count
    }

    fn finish(&mut self, name: &Arc<str>) {
        if let Some(lane) = self.lanes.get_mut(name) {
            lane.running = lane.running.saturating_sub(1);
        }
        self.take_turn(name);
    }

    /// The next job in turn, and whether its lane would like another claim.
    fn take_job(&mut self) -> Option<(Job, bool)> {
        while let Some(name) = self.turns.pop_front() {
            let Some(lane) = self.lanes.get_mut(&name) else { continue };
            lane.in_turn = false;
            if !lane.is_runnable() {
                continue;
            }
            let Some(queued) = lane.queue.pop_front() else { continue };
            self.queued -= 1;
            lane.running += 1;
            let wait = queued.since.elapsed();
            lane.window.waited(wait);
            lane.binding.metrics.queue_wait.observe(wait.as_secs_f64());
            let hungry = lane.hinted && lane.queue.len() <= lane.window.ahead / 2;
            let binding = Arc::clone(&lane.binding);
            self.take_turn(&name);
            return Some((Job { binding, queued }, hungry));
        }
        None
    }

    fn empty(&mut self, name: &str) -> Vec<Lease> {
        let Some(lane) = self.lanes.get_mut(name) else { return Vec::new() };
        let leases: Vec<Lease> = lane.queue.drain(..).map(|queued| queued.lease).collect();
        self.queued -= leases.len();
        leases
    }
}
