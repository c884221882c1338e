//! Leased deliveries waiting for a worker: one lane per subscription with a handler in this process.
//!
//! Lanes take turns, each runs at most its concurrency, and how far each leases ahead of its workers follows from how
//! fast it drains. Everything here is synchronous and behind one lock that is never held across an await.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Options;
use super::pace::{Rate, Window};
use super::routing::Known;
use crate::handler::Handler;
use crate::metrics::{Metrics, SubscriptionMetrics};
use crate::provider::{ClaimRequest, Lease, Want};
use crate::retry::RetryPolicy;
use crate::subscription::Ordering;

/// The most lanes asked about in one claim.
const WANTS: usize = 256;

/// The most deliveries that a worker takes at once where attempts are short.
const RUN: usize = 16;

/// How long the attempts of a job take at most that is worth waiting for: about as long as it takes to wake a thread.
const BRIEF: Duration = Duration::from_micros(100);

/// What a worker needs to make attempts for a subscription.
pub(super) struct Binding {
    pub(super) name: Arc<str>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) policy: RetryPolicy,
    pub(super) timeout: Duration,
    pub(super) ordering: Ordering,
    pub(super) metrics: SubscriptionMetrics,
    lane: LaneId,
}

/// A lane's place. A subscription keeps its place for as long as the process lives.
type LaneId = usize;

/// A leased delivery on its way to a worker.
struct Queued {
    lease: Lease,
    since: Instant,
}

/// What a worker takes on at once: one delivery, as many as the handler takes in one call, or a few of those whose
/// attempts are short.
pub(super) struct Job {
    pub(super) binding: Arc<Binding>,
    pub(super) leases: VecDeque<Lease>,
    /// Whether all are for one call.
    pub(super) is_batch: bool,
    /// Whether its attempts are expected to be short, so that nobody else is woken until the worker comes back.
    pub(super) is_brief: bool,
}

/// A job that is done.
pub(super) struct Finished {
    pub(super) binding: Arc<Binding>,
    /// Whether none of its attempts took long.
    pub(super) was_short: bool,
    /// How long all took.
    pub(super) took: Duration,
    /// Whether the lanes still count on it to be back soon.
    pub(super) is_brief: bool,
}

struct Lane {
    binding: Arc<Binding>,
    queue: VecDeque<Queued>,
    running: usize,
    limit: usize,
    /// How many deliveries a worker takes at once: more while their attempts are short, since taking one costs as much as
    /// a short attempt.
    run: usize,
    /// Whether the last of its jobs was done so soon that it would not have paid to wake somebody else meanwhile.
    is_brief: bool,
    paused: bool,
    rate: Option<Rate>,
    window: Window,
    /// Whether there may be more to claim.
    hinted: bool,
    /// Whether a claim for the lane is on its way: another one waits for it, or both would fill the same room.
    claiming: bool,
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
            run: 1,
            is_brief: false,
            paused: known.subscription.paused,
            rate: known.subscription.rate.map(|rate| Rate::new(rate.get())),
            window: Window::new(limit, buffer),
            hinted: false,
            claiming: false,
            given: 0,
            filled: false,
            in_turn: false,
        }
    }

    fn is_runnable(&self) -> bool {
        !self.queue.is_empty() && self.running < self.limit
    }

    /// How many deliveries to claim now, if `share` may wait for a worker. Nothing while the queue is more than `low` full:
    /// claims come in batches.
    fn room(&mut self, now: Instant, low: Low, share: usize) -> usize {
        let ahead = self.window.within(share);
        let enough = match low {
            Low::Half => ahead / 2,
            Low::ThreeQuarters => ahead / 4 * 3,
        };
        if self.paused || self.claiming || self.queue.len() > enough {
            return 0;
        }
        let room = (self.limit + ahead).saturating_sub(self.running + self.queue.len());
        match &mut self.rate {
            None => room,
            Some(rate) => {
                rate.refill(now);
                room.min(rate.room())
            }
        }
    }
}

/// How full a lane's queue may be when the lane claims.
#[derive(Clone, Copy)]
enum Low {
    /// Then it has to.
    Half,
    /// Then it joins others that have to: lanes that claim together get the deliveries of the same events, which costs
    /// stores less than when each comes at its own time, and keeps them out of the way of other processes.
    ThreeQuarters,
}

struct State {
    /// `None` where a subscription has no handler any more.
    lanes: Vec<Option<Lane>>,
    ids: HashMap<Arc<str>, LaneId>,
    /// Lanes that are hinted, so that ten thousand idle ones cost nothing.
    hinted: VecDeque<LaneId>,
    /// Lanes with runnable work, in turn.
    turns: VecDeque<LaneId>,
    queued: usize,
    running: usize,
    /// Of those that run, jobs that are expected to be brief.
    brief: usize,
    /// Claims on their way.
    claims: usize,
    /// How many lanes they are for.
    claiming: usize,
    /// How many deliveries may wait for a worker in each lane that has more to claim: lanes that have much leave room for the
    /// others.
    share: usize,
    /// Whether lanes were hinted since somebody last looked what to claim.
    news: bool,
    /// Whether a worker was woken and has not found out yet whether there is something for it. Whoever has news for
    /// workers wakes one only while none is on its way: it wakes the next when there is more than it takes.
    searching: bool,
    /// Whether workers go home when there is nothing to do, and nothing is accepted any more.
    closed: bool,
}

/// The lanes of a claim, one for each want.
pub(super) type Places = SmallVec<[LaneId; 1]>;

/// What lanes want claimed.
pub(super) struct Wanted {
    pub(super) wants: Vec<Want>,
    pub(super) places: Places,
}

impl Wanted {
    pub(super) fn is_empty(&self) -> bool {
        self.wants.is_empty()
    }

    /// Gives lanes with about the same room the same: those that get the same events go on getting the same ones.
    fn even_out(&mut self) {
        let most = self.wants.iter().map(|want| want.room).max().unwrap_or_default();
        let are_alike = |want: &&mut Want| want.room > most / 2;
        let even = self.wants.iter_mut().filter(are_alike).map(|want| want.room).min().unwrap_or_default();
        self.wants.iter_mut().filter(are_alike).for_each(|want| want.room = even);
    }
}

/// What a claim gave.
pub(super) struct Claim<'a> {
    pub(super) request: &'a ClaimRequest,
    /// The lanes of its wants.
    pub(super) places: &'a Places,
    pub(super) leases: Vec<Lease>,
    /// When it was given.
    pub(super) at: Instant,
}

/// All lanes of this process.
pub(super) struct Lanes {
    state: Mutex<State>,
    /// Wakes a worker. One that finds more to do than it takes wakes the next.
    work: Notify,
    idle: Notify,
    max_workers: usize,
    buffer: usize,
    metrics: Metrics,
}

/// What a worker does next.
pub(super) enum Turn {
    /// This.
    Work(Job),
    /// Waits for [`Lanes::work`].
    Wait,
    /// Goes home.
    Leave,
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
        let (lanes, ids) = (Vec::new(), HashMap::default());
        let state = State {
            lanes,
            ids,
            hinted,
            turns,
            queued: 0,
            running: 0,
            brief: 0,
            claims: 0,
            claiming: 0,
            share: buffer,
            news: false,
            searching: false,
            closed: false,
        };
        let (work, idle) = (Notify::new(), Notify::new());
        Self { state: Mutex::new(state), work, idle, max_workers, buffer, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Gives a subscription a handler, or a new one. What it has leased stays.
    pub(super) fn bind(&self, known: &Known, handler: Arc<dyn Handler>, options: &Options) {
        let subscription = &known.subscription;
        let metrics = self.metrics.of_subscription(&subscription.name);
        let mut state = self.lock();
        let id = state.id(&subscription.name);
        let binding = Arc::new(Binding {
            name: Arc::clone(&subscription.name),
            handler,
            policy: subscription.retry.resolve(&options.retry),
            timeout: subscription.timeout.unwrap_or(options.timeout),
            ordering: subscription.ordering,
            metrics,
            lane: id,
        });
        let mut lane = Lane::new(binding, known, self.max_workers, self.buffer);
        if let Some(place) = state.lanes.get_mut(id) {
            if let Some(old) = place.take() {
                (lane.queue, lane.running) = (old.queue, old.running);
                (lane.in_turn, lane.hinted, lane.claiming) = (old.in_turn, old.hinted, old.claiming);
            }
            *place = Some(lane);
        }
        state.hint(id);
        state.take_turn(id);
        self.wake_worker(state);
    }

    /// Wakes a worker, unless one comes anyway: one that makes short attempts is back sooner than another is awake, and what is
    /// queued is no more than it takes. Should its handler keep the thread after all, the next poll wakes another.
    fn wake_worker(&self, state: MutexGuard<'_, State>) {
        if state.brief == 0 || state.queued >= RUN {
            self.wake_another(state);
        }
    }

    /// Wakes a worker unless one is on its way, or all are busy.
    fn wake_another(&self, mut state: MutexGuard<'_, State>) {
        if state.searching || state.running >= self.max_workers {
            return;
        }
        state.searching = true;
        drop(state);
        self.work.notify_one();
    }

    /// Changes the knobs of a bound subscription; returns the leases that it must give back because it is paused now.
    pub(super) fn update(&self, known: &Known, options: &Options) -> Vec<Lease> {
        let name = &known.subscription.name;
        let Some(handler) = self.lock().find(name).map(|lane| Arc::clone(&lane.binding.handler)) else {
            return Vec::new();
        };
        self.bind(known, handler, options);
        if known.subscription.paused { self.lock().empty(name) } else { Vec::new() }
    }

    /// Takes the handler away; returns the leases that were waiting for it.
    pub(super) fn unbind(&self, name: &str) -> Vec<Lease> {
        let mut state = self.lock();
        let leases = state.empty(name);
        if let Some(&id) = state.ids.get(name)
            && let Some(place) = state.lanes.get_mut(id)
        {
            *place = None;
        }
        leases
    }

    pub(super) fn status(&self, name: &str) -> Option<LaneStatus> {
        self.lock().find(name).map(|lane| LaneStatus { queued: lane.queue.len(), running: lane.running })
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        Load { lanes: state.lanes.iter().flatten().count(), queued: state.queued, running: state.running }
    }

    /// Notes that these lanes, or all, may have something to claim.
    pub(super) fn hint<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        self.lock().hint_names(names);
    }

    /// The same, and wakes a worker to claim it.
    pub(super) fn offer<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut state = self.lock();
        state.hint_names(names);
        if !state.hinted.is_empty() {
            state.news = true;
            self.wake_worker(state);
        }
    }

    /// Every lane may have something to claim, and nobody counts any longer on a worker that was woken before: a handler that
    /// keeps its thread keeps whom it woke from running as well.
    pub(super) fn hint_all(&self) {
        let mut state = self.lock();
        state.searching = false;
        (0..state.lanes.len()).for_each(|id| state.hint(id));
    }

    /// What to claim now. The lanes named are no longer hinted: what a claim finds decides whether they are again.
    pub(super) fn wants(&self, now: Instant) -> Wanted {
        let mut state = self.lock();
        state.news = false;
        let mut budget = self.buffer.saturating_sub(state.queued);
        let mut wanted = Wanted { wants: Vec::new(), places: Places::new() };
        let busy = state.hinted.len() + state.claiming;
        state.share = self.buffer.checked_div(busy).unwrap_or(self.buffer);
        if !state.has_to_claim(now) {
            return wanted;
        }
        let (share, any_ran_dry) = (state.share, state.some_ran_dry());
        for _ in 0..state.hinted.len() {
            let Some(id) = state.hinted.pop_front() else { break };
            let Some(lane) = state.lane(id) else { continue };
            let room = lane.room(now, Low::ThreeQuarters, share).min(budget);
            if room == 0 || wanted.wants.len() == WANTS {
                state.hinted.push_back(id);
                continue;
            }
            // Lanes that get the same events stay in step: those that are nearly through count as dry when one is.
            if any_ran_dry && lane.filled && lane.queue.len() <= lane.window.within(share) / 2 {
                lane.window.ran_dry();
            }
            (lane.hinted, lane.claiming) = (false, true);
            budget -= room;
            let (subscription, ordering) = (Arc::clone(&lane.binding.name), lane.binding.ordering);
            wanted.wants.push(Want { subscription, room, ordering });
            wanted.places.push(id);
        }
        wanted.even_out();
        state.claims += usize::from(!wanted.is_empty());
        state.claiming += wanted.places.len();
        wanted
    }

    /// How long until a lane that is held back by its rate may claim again.
    pub(super) fn next_token(&self) -> Option<Duration> {
        let state = self.lock();
        let hinted = state.hinted.iter().filter_map(|&id| state.lanes.get(id)?.as_ref());
        let held = hinted.filter(|lane| !lane.paused);
        held.filter_map(|lane| lane.rate.filter(|rate| rate.room() == 0)).map(|rate| rate.next_token()).min()
    }

    /// Queues what a claim gave, for a worker to be woken or the one that claimed; returns what came for lanes that are
    /// gone.
    pub(super) fn accept(&self, claim: Claim<'_>, wake: bool) -> Vec<Lease> {
        let Claim { request: ClaimRequest { wants, .. }, places, leases, at: since } = claim;
        let mut state = self.lock();
        let (mut homeless, mut place, closed) = (Vec::new(), 0, state.closed);
        for lease in leases {
            // Mostly the same lane as before, or one soon after it.
            let is_its = |want: &Want| want.subscription == lease.key.subscription;
            let later = wants.iter().skip(place).position(is_its).map(|steps| place + steps);
            let found = later.or_else(|| wants.iter().position(is_its));
            place = found.unwrap_or(place);
            match found.and_then(|place| places.get(place)).and_then(|&id| state.lane(id)) {
                Some(lane) if !lane.paused && !closed => {
                    lane.given += 1;
                    lane.queue.push_back(Queued { lease, since });
                    state.queued += 1;
                }
                _ => homeless.push(lease),
            }
        }
        wants.iter().zip(places).for_each(|(want, &id)| state.claimed(id, want.room));
        self.metrics.queue_size().set(i64::try_from(state.queued).unwrap_or(i64::MAX));
        state.claims -= 1;
        state.claiming -= places.len();
        if wake && !state.turns.is_empty() {
            self.wake_another(state);
        } else {
            self.note_idle(&state);
        }
        homeless
    }

    /// What attempts for this subscription are made with.
    pub(super) fn binding(&self, name: &str) -> Option<Arc<Binding>> {
        self.lock().find(name).map(|lane| Arc::clone(&lane.binding))
    }

    /// Gives a failed claim's lanes their hints back.
    pub(super) fn refund(&self, places: &Places) {
        let mut state = self.lock();
        for &id in places {
            if let Some(lane) = state.lane(id) {
                lane.claiming = false;
            }
            state.hint(id);
        }
        state.claims -= 1;
        state.claiming -= places.len();
        self.note_idle(&state);
    }

    /// What a worker does now that it has finished an attempt of `finished`.
    ///
    /// The second value says that some lane could do with another claim.
    pub(super) fn next(&self, finished: Option<&Finished>) -> (Turn, bool) {
        let mut state = self.lock();
        match finished {
            Some(finished) => state.finish(finished),
            None => state.searching = false,
        }
        let (turn, hungry) = match state.take_job() {
            Some((job, hungry)) => (Turn::Work(job), hungry || state.news),
            None if state.closed => {
                // A worker that was not waiting yet when the lanes were closed hears of it from the one before it.
                self.work.notify_one();
                (Turn::Leave, false)
            }
            None => (Turn::Wait, !state.hinted.is_empty()),
        };
        self.metrics.queue_size().set(i64::try_from(state.queued).unwrap_or(i64::MAX));
        self.metrics.workers_active().set(i64::try_from(state.running).unwrap_or(i64::MAX));
        self.note_idle(&state);
        if !state.turns.is_empty() {
            self.wake_worker(state);
        }
        (turn, hungry)
    }

    /// Counts no longer on this job to be done soon, and queues again, before all others, what its worker took and does not get
    /// to; returns what has no lane any more.
    pub(super) fn give_back(&self, job: &mut Job) -> Vec<Lease> {
        if job.leases.is_empty() && !job.is_brief {
            return Vec::new();
        }
        let (since, mut state) = (Instant::now(), self.lock());
        state.brief -= usize::from(std::mem::take(&mut job.is_brief));
        let (id, closed) = (job.binding.lane, state.closed);
        let mut homeless = Vec::new();
        if let Some(lane) = state.lane(id).filter(|lane| !lane.paused && !closed) {
            let count = job.leases.len();
            (lane.run, lane.is_brief) = (1, false);
            while let Some(lease) = job.leases.pop_back() {
                lane.queue.push_front(Queued { lease, since });
            }
            state.queued += count;
            state.take_turn(id);
        } else {
            homeless.extend(job.leases.drain(..));
        }
        if state.news || !state.turns.is_empty() {
            self.wake_worker(state);
        }
        homeless
    }

    /// Waits for something to do.
    pub(super) async fn work(&self) {
        self.work.notified().await;
    }

    /// Lets workers finish what is queued and go home.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_one();
    }

    /// Whether some lane may have something to claim.
    pub(super) fn has_hints(&self) -> bool {
        !self.lock().hinted.is_empty()
    }

    /// Waits until nothing is queued or on its way and nobody works; `false` when that was so already.
    pub(super) async fn idled(&self) -> bool {
        let mut waited = false;
        loop {
            let idle = self.idle.notified();
            if self.is_idle() {
                return waited;
            }
            waited = true;
            idle.await;
        }
    }

    fn is_idle(&self) -> bool {
        self.lock().is_idle()
    }

    fn note_idle(&self, state: &State) {
        if state.is_idle() {
            self.idle.notify_waiters();
        }
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.queued == 0 && self.running == 0 && self.claims == 0
    }

    fn id(&mut self, name: &Arc<str>) -> LaneId {
        if let Some(&id) = self.ids.get(name) {
            return id;
        }
        self.ids.insert(Arc::clone(name), self.lanes.len());
        self.lanes.push(None);
        self.lanes.len() - 1
    }

    fn find(&self, name: &str) -> Option<&Lane> {
        self.lanes.get(*self.ids.get(name)?)?.as_ref()
    }

    fn lane(&mut self, id: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(id)?.as_mut()
    }

    fn hint_names<'a>(&mut self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        for name in names {
            if let Some(&id) = self.ids.get(name) {
                self.hint(id);
            }
        }
    }

    fn hint(&mut self, id: LaneId) {
        if let Some(lane) = self.lane(id)
            && !lane.hinted
        {
            lane.hinted = true;
            self.hinted.push_back(id);
        }
    }

    /// Whether some lane that is hinted has to claim.
    fn has_to_claim(&mut self, now: Instant) -> bool {
        let Self { hinted, lanes, share, .. } = self;
        let mut lane = |id: LaneId| lanes.get_mut(id)?.as_mut().map(|lane| lane.room(now, Low::Half, *share) > 0);
        hinted.iter().any(|&id| lane(id) == Some(true))
    }

    /// Whether a lane that would claim has nothing left of all that it asked for.
    fn some_ran_dry(&self) -> bool {
        let mut hinted = self.hinted.iter().filter_map(|&id| self.lanes.get(id)?.as_ref());
        hinted.any(|lane| lane.filled && lane.queue.is_empty() && !lane.paused && !lane.claiming)
    }

    fn claimed(&mut self, id: LaneId, room: usize) {
        let Some(lane) = self.lane(id) else { return };
        let count = std::mem::take(&mut lane.given);
        lane.claiming = false;
        lane.filled = count >= room;
        if let Some(rate) = &mut lane.rate {
            rate.take(count);
        }
        if lane.filled {
            self.hint(id);
        }
        self.take_turn(id);
    }

    fn take_turn(&mut self, id: LaneId) {
        if let Some(lane) = self.lane(id)
            && !lane.in_turn
            && lane.is_runnable()
        {
            lane.in_turn = true;
            self.turns.push_back(id);
        }
    }

    fn finish(&mut self, Finished { binding, was_short, took, is_brief }: &Finished) {
        self.brief -= usize::from(*is_brief);
        if let Some(lane) = self.lane(binding.lane) {
            lane.running = lane.running.saturating_sub(1);
            lane.run = if *was_short { (2 * lane.run).min(RUN) } else { 1 };
            lane.is_brief = *was_short && *took <= BRIEF;
        }
        self.running = self.running.saturating_sub(1);
        self.take_turn(binding.lane);
    }

    /// The next job in turn, and whether its lane would like another claim.
    fn take_job(&mut self) -> Option<(Job, bool)> {
        let share = self.share;
        while let Some(id) = self.turns.pop_front() {
            let Some(lane) = self.lane(id) else { continue };
            lane.in_turn = false;
            if !lane.is_runnable() {
                continue;
            }
            let (now, mut leases) = (Instant::now(), VecDeque::new());
            let batch = lane.binding.handler.max_batch();
            let most = if batch > 1 { batch } else { lane.run };
            let is_brief = batch == 1 && lane.is_brief;
            while leases.len() < most
                && let Some(Queued { lease, since }) = lane.queue.pop_front()
            {
                let wait = now.saturating_duration_since(since);
                lane.window.waited(wait);
                lane.binding.metrics.queue_wait.observe(wait.as_secs_f64());
                leases.push_back(lease);
            }
            lane.running += 1;
            let hungry = lane.hinted && lane.queue.len() <= lane.window.within(share) / 2;
            let binding = Arc::clone(&lane.binding);
            self.queued -= leases.len();
            self.running += 1;
            self.take_turn(id);
            self.brief += usize::from(is_brief);
            return Some((Job { binding, is_batch: batch > 1 && leases.len() > 1, is_brief, leases }, hungry));
        }
        None
    }

    fn empty(&mut self, name: &str) -> Vec<Lease> {
        let Some(lane) = self.ids.get(name).copied().and_then(|id| self.lane(id)) else { return Vec::new() };
        let leases: Vec<Lease> = lane.queue.drain(..).map(|queued| queued.lease).collect();
        self.queued -= leases.len();
        leases
    }
}

#[cfg(test)]
mod tests {
    use super::super::routing::Router;
    use super::*;
    use crate::event::{Event, Payload, Source};
    use crate::handler::native;
    use crate::provider::LeaseKey;
    use crate::provider::memory::MemoryProvider;
    use crate::subscription::Subscription;

    fn lease(subscription: &Arc<str>, seq: u64) -> Lease {
        let event = Event::new(Source::Internal, "a.b".parse().unwrap(), Payload::default());
        let key = LeaseKey { seq, subscription: Arc::clone(subscription), token: seq };
        let (event, age) = (Arc::new(event), Duration::ZERO);
        Lease { event, key, attempt: 1, number: 1, infra_faults: 0, age, is_replay: false }
    }

    /// Lanes that claim the same number go on getting the deliveries of the same events.
    #[tokio::test]
    async fn a_lane_that_is_nearly_through_claims_as_much_as_one_that_is_done() {
        let provider = MemoryProvider::open(crate::provider::memory::Options::default()).unwrap();
        let router = Router::load(&provider).await.unwrap();
        let lanes = Lanes::new(10, 4_000, Metrics::default());
        for name in ["done", "nearly"] {
            let declared = Subscription::new(name, "*".parse().unwrap());
            let (known, _) = router.declare(&provider, declared).await.unwrap();
            lanes.bind(&known, native(|_| async { Ok(()) }), &Options::default());
        }
        let (mut rooms, mut seq) = (Vec::new(), 0);
        for _ in 0..9 {
            let at = Instant::now();
            let Wanted { wants, places } = lanes.wants(at);
            rooms.push(wants.iter().map(|want| want.room).collect::<Vec<_>>());
            let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants };
            let mut leases = Vec::new();
            for want in &request.wants {
                for _ in 0..want.room {
                    seq += 1;
                    leases.push(lease(&want.subscription, seq));
                }
            }
            let homeless = lanes.accept(Claim { request: &request, places: &places, leases, at }, false);
            assert!(homeless.is_empty());
            let mut state = lanes.lock();
            for (id, left) in [0, 2].into_iter().enumerate() {
                let queue = &mut state.lane(id).unwrap().queue;
                let taken = queue.len() - left;
                queue.truncate(left);
                state.queued -= taken;
            }
        }
        assert!(rooms.iter().all(|rooms| rooms.len() == 2 && rooms[0] == rooms[1]), "{rooms:?}");
        assert!(rooms[8][0] > 1_000, "{rooms:?}");
    }
}
