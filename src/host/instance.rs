//! One call of a guest within its limits, with an event or with a batch of them, and what came of it.
//!
//! An instance serves one call and is dropped with its store. Where the plugin asks for it, it is kept and serves more
//! events one after the other, unless a call ended in any other way than by the handler's own return. Time is watched
//! twice: the epoch interrupts a guest that computes, and a timer ends one that waits in a host call.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use smallvec::SmallVec;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};
use wasmtime::component::{Component, InstancePre};
use wasmtime::{PoolConcurrencyLimitError, Store, Trap, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use super::bindings::tidegate::plugin::types;
use super::compute;
use super::convert;
use super::engine::Engine;
use super::exports::{Answers, Bound, Export, Exports};
use super::imports::{State, Stop, Terms, link};
use super::limits::{Limits, bytes};
use super::slots::{Idle, Slots};
use crate::delivery::{Fault, LogLine, Seen, Trace, Verdict};
use crate::error::Result;
use crate::event::{Event, EventType, Payload, Source};
use crate::handler::{Call, Effects, KvRead, Outcome};

/// How long a self-check may take once it has an instance. A plugin's own timeout may be shorter.
const SELF_CHECK: Duration = Duration::from_secs(5);

/// The share of an instance's memory that the payloads of a batch may take: they are copied into it, and parsed.
const PAYLOAD_SHARE: usize = 4;

/// The memory of an instance that held more than this, in bytes, is given back elsewhere: it takes milliseconds, in which the
/// thread can do nothing else.
const LARGE: usize = 4 << 20;

/// After so many calls by threads that have another pool, the component is made ready there.
const OFTEN: u32 = 1_000;

/// A linked component with the terms that it runs under.
pub(super) struct Prepared {
    pub(super) terms: Arc<Terms>,
    sites: Arc<Sites>,
    /// The same for instances that found the pool full.
    outside: OnceCell<Arc<Site>>,
    /// The instances that wait for another event, where they are used again.
    idle: Option<Arc<Idle<Instance>>>,
}

/// A linked component on the engines with a pool that it was called on.
struct Sites {
    first: Arc<Site>,
    /// In the order of the places after the first.
    others: Box<[Other]>,
}

/// A place where the component may be made ready.
#[derive(Default)]
struct Other {
    site: OnceLock<Arc<Site>>,
    /// How often it was missing.
    calls: AtomicU32,
}

/// A linked component on one engine, and what all its calls there share. Threads that count references to the same thing wait
/// for each other, so each engine's calls have copies of their own.
struct Site {
    linked: Linked,
    terms: Arc<Terms>,
    /// What is seen of most attempts.
    usual: OnceLock<Trace>,
}

/// A component of which instances can be made.
pub(super) struct Linked {
    pub(super) pre: InstancePre<State>,
    pub(super) exports: Exports,
}

/// Why a version may not serve.
pub(super) enum Unstarted {
    /// In words.
    Failed(String),
    /// What the engine says about an export of another type than the one that we call.
    Unfit(wasmtime::Error),
}

/// What came of the events of a call; most calls have one.
type Outcomes = SmallVec<[Outcome; 1]>;

/// An instance, its store and the slot that it takes.
struct Instance {
    store: Store<State>,
    site: Arc<Site>,
    /// `None` until it is instantiated, which happens within the first call's limits.
    bound: Option<Bound>,
    /// The events that it has served.
    served: u32,
    /// After the store: the slot is free when the instance is gone.
    _slot: OwnedSemaphorePermit,
}

/// How a call ended, before anybody judged it.
enum End {
    /// The guest returned.
    Returned(Answers),
    /// It could not begin.
    NotBegun(wasmtime::Error),
    /// It was ended while it ran.
    Stopped(wasmtime::Error),
    /// It was waiting for the host when its time was up.
    Waiting,
}

impl Prepared {
    /// A component whose instances are used as the terms say.
    pub(super) fn new(engine: &Engine, linked: Linked, terms: Terms) -> Self {
        let idle = (terms.reuse > 1).then(|| Idle::new(engine.slots()));
        let others = engine.more_places(linked.pre.component());
        let others = std::iter::repeat_with(Other::default).take(others).collect();
        let terms = Arc::new(terms);
        let first = Arc::new(Site { linked, terms: Arc::new(Terms::clone(&terms)), usual: OnceLock::new() });
        Self { terms, sites: Arc::new(Sites { first, others }), outside: OnceCell::new(), idle }
    }

    /// Makes one attempt, which began just now, within the shorter of the call's timeout and the plugin's own.
    pub(super) async fn attempt(&self, engine: &Arc<Engine>, call: Call, began: Instant) -> Outcome {
        let allowed = call.timeout.min(self.terms.limits.timeout);
        let events = [Arc::clone(&call.event)];
        let time = Allowed { began, allowed };
        let ended = self.within(engine, Export::Handle, &events, [call], time).await;
        ended.map_or_else(|outcome| *outcome, only)
    }

    /// Makes one attempt for each of these calls, all in one call of the guest.
    ///
    /// # Errors
    /// How the call of the guest ended, when it ended without a verdict for each event.
    pub(super) async fn batch(
        &self,
        engine: &Arc<Engine>,
        calls: Vec<Call>,
        began: Instant,
    ) -> Result<Vec<Outcome>, Box<Outcome>> {
        let timeouts = calls.iter().map(|call| call.timeout);
        let allowed = timeouts.fold(self.terms.limits.timeout, Duration::min);
        let events: Vec<Arc<Event>> = calls.iter().map(|call| Arc::clone(&call.event)).collect();
        let time = Allowed { began, allowed };
        self.within(engine, Export::HandleBatch, &events, calls, time).await.map(SmallVec::into_vec)
    }

    /// Where the component is ready, by place.
    #[cfg(test)]
    pub(super) fn ready(&self) -> Vec<bool> {
        let others = self.sites.others.iter().map(|other| other.site.get().is_some());
        std::iter::once(true).chain(others).collect()
    }

    /// Whether a batch may be tried: no more events than agreed, and payloads that leave the guest room to work.
    pub(super) fn takes(&self, calls: &[Call]) -> bool {
        let payloads = calls.iter().map(|call| call.event.payload.bytes().len()).fold(0, usize::saturating_add);
        let room = bytes(self.terms.limits.memory).checked_div(PAYLOAD_SHARE).unwrap_or_default();
        calls.len() <= self.terms.max_batch && payloads <= room
    }

    /// Instantiates the component once and lets it check itself, where it can. Only then is it known whether its exports
    /// have the types that we call, and whether it fails before it is called at all. Waits for a slot as long as it takes:
    /// a busy host is no reason to refuse a version.
    ///
    /// # Errors
    /// [`Unstarted`].
    pub(super) async fn self_check(&self, engine: &Arc<Engine>) -> Result<(), Unstarted> {
        let failed = |error: &dyn std::error::Error| Unstarted::Failed(error.to_string());
        let allowed = SELF_CHECK.min(self.terms.limits.timeout);
        let slot = engine.slots().acquire().await.map_err(|error| failed(&error))?;
        // It may publish nothing, and what it writes is dropped with its outcome.
        let limits = Limits { published_events: 0, ..self.terms.limits.clone() };
        let terms = Arc::new(Terms { limits, ..Terms::clone(&self.terms) });
        let mut instance = Instance::new(&self.sites.first, &terms, slot);
        let call = introduction(&terms.name, allowed).map_err(|error| failed(&error))?;
        let began = Instant::now();
        instance.begin([call], began.checked_add(allowed), self.fuel(1));
        match self.run(engine, &mut instance, Export::SelfCheck, &[], began).await {
            End::NotBegun(error) => Err(self.unstarted(error, instance.store.data().meter.has_refused())),
            End::Waiting if instance.bound.is_none() => {
                Err(Unstarted::Failed(format!("takes longer than {allowed:?} to start")))
            }
            end => {
                let outcome = self.judge(end, &mut instance, 1, allowed).map_or_else(|outcome| *outcome, only);
                let failed = |fault| Err(Unstarted::Failed(format!("its self-check failed: {fault}")));
                outcome.fault.map_or(Ok(()), failed)
            }
        }
    }

    fn unstarted(&self, error: wasmtime::Error, has_refused_memory: bool) -> Unstarted {
        if has_refused_memory {
            let limit = self.terms.limits.memory;
            return Unstarted::Failed(format!("needs more than its memory of {limit} to start: raise limits.memory"));
        }
        let is_of_guest =
            error.is::<Trap>() || error.is::<WasmBacktrace>() || error.is::<I32Exit>() || error.is::<Stop>();
        match is_of_guest || error.is::<PoolConcurrencyLimitError>() {
            true => Unstarted::Failed(format!("fails as it starts, before it is called: {}", error.root_cause())),
            false => Unstarted::Unfit(error),
        }
    }

    /// Whether instances that have served are kept: not those of a version that has been replaced.
    pub(super) fn keep_instances(&self, keep: bool) {
        match &self.idle {
            Some(idle) if keep => idle.open(),
            Some(idle) => idle.close(),
            None => {}
        }
    }

    /// Makes one call of the guest, in an instance that is idle or a fresh one.
    async fn within(
        &self,
        engine: &Arc<Engine>,
        export: Export,
        events: &[Arc<Event>],
        calls: impl IntoIterator<Item = Call>,
        Allowed { began, allowed }: Allowed,
    ) -> Result<Outcomes, Box<Outcome>> {
        let deadline = began.checked_add(allowed);
        let mut instance = match self.idle.as_ref().and_then(|idle| idle.take()) {
            Some(instance) => instance,
            None => match slot(engine.slots(), allowed).await {
                Some(slot) => {
                    let site = self.site(engine);
                    Instance::new(site, &site.terms, slot)
                }
                None => return Err(Box::new(self.busy(allowed))),
            },
        };
        instance.begin(calls, deadline, self.fuel(events.len()));
        let end = self.run(engine, &mut instance, export, events, began).await;
        let may_go_on = matches!(&end, End::Returned(answers) if answers.len() == events.len())
            && instance.store.data().is_within_limits();
        let ended = self.judge(end, &mut instance, events.len(), allowed);
        if let Some(idle) = &self.idle
            && may_go_on
            && instance.served < self.terms.reuse
        {
            idle.put(instance);
        } else if instance.store.data().meter.peak_memory() > LARGE {
            tokio::task::spawn_blocking(move || drop(instance));
        }
        ended
    }

    /// Calls an export of an instance whose limits are armed, in the pool, or beside it where that is full.
    async fn run(
        &self,
        engine: &Arc<Engine>,
        instance: &mut Instance,
        export: Export,
        events: &[Arc<Event>],
        began: Instant,
    ) -> End {
        let deadline = instance.store.data().deadline();
        instance.served = instance.served.saturating_add(u32::try_from(events.len()).unwrap_or(u32::MAX));
        let end = until(engine, began, deadline, pin!(call_in(instance, export, events))).await;
        if !is_pool_full(&end) {
            return end;
        }
        // Boxed, so that calls which find room do not carry this one's along.
        Box::pin(self.run_outside_the_pool(engine, instance, export, events)).await.unwrap_or(end)
    }

    async fn run_outside_the_pool(
        &self,
        engine: &Arc<Engine>,
        instance: &mut Instance,
        export: Export,
        events: &[Arc<Event>],
    ) -> Option<End> {
        let outside = self.outside_the_pool(engine).await?;
        instance.move_to(outside, self.fuel(events.len()));
        let deadline = instance.store.data().deadline();
        Some(until(engine, Instant::now(), deadline, pin!(call_in(instance, export, events))).await)
    }

    /// What runs on an engine without a pool, made at the first need of it.
    async fn outside_the_pool(&self, engine: &Arc<Engine>) -> Option<&Arc<Site>> {
        let make = async || {
            tracing::info!(plugin = %self.terms.name, "the pool is full, instances are allocated beside it");
            let first = &self.sites.first;
            first.again(&engine.outside_the_pool(first.component(), first.has_fuel()).await?)
        };
        let made = self.outside.get_or_try_init(make).await;
        made.inspect_err(|error| tracing::error!(error = format!("{error:#}"), "no instance beside the pool")).ok()
    }

    /// Where the present thread makes its instances: on an engine that it shares with as few as possible.
    fn site(&self, engine: &Arc<Engine>) -> &Arc<Site> {
        let Sites { first, others } = &*self.sites;
        let place = engine.place();
        let Some(other) = place.checked_sub(1).and_then(|at| others.get(at)) else { return first };
        if let Some(site) = other.site.get() {
            return site;
        }
        if other.calls.fetch_add(1, Ordering::Relaxed) == OFTEN {
            tokio::spawn(Arc::clone(&self.sites).spread(Arc::clone(engine), place));
        }
        first
    }

    fn busy(&self, allowed: Duration) -> Outcome {
        let words = format!("no instance became free within {allowed:?}: raise host.instances");
        let seen = Seen { digest: Some(Arc::clone(&self.terms.digest)), ..Seen::default() };
        Outcome { trace: seen.into(), ..Outcome::failed(Verdict::HostFault, Fault::new("host-busy", words)) }
    }

    /// The fuel of a call with this many events, where it is counted.
    fn fuel(&self, events: usize) -> Option<u64> {
        let shares = u64::try_from(events.max(1)).unwrap_or(u64::MAX);
        self.terms.limits.fuel.map(|fuel| fuel.saturating_mul(shares))
    }

    /// What came of a call with `count` events, one outcome for each.
    ///
    /// # Errors
    /// One outcome for all of them, when the guest gave no verdict for each.
    fn judge(
        &self,
        end: End,
        instance: &mut Instance,
        count: usize,
        allowed: Duration,
    ) -> Result<Outcomes, Box<Outcome>> {
        let Instance { store, site, .. } = instance;
        let left = || store.get_fuel().unwrap_or_default();
        let used = self.fuel(count).map(|fuel| fuel.saturating_sub(left()));
        let shares = u64::try_from(count.max(1)).unwrap_or(u64::MAX);
        let state = store.data_mut();
        let (refused, is_crowded) = (state.meter.has_refused(), state.is_crowded());
        let called_too_often = state.called_too_often();
        let (fuel, peak_memory) =
            (used.and_then(|used| used.checked_div(shares)), u64::try_from(state.meter.peak_memory()).ok());
        let seen = |log, backtrace| site.seen(fuel, peak_memory, log, backtrace);
        let backtrace = match &end {
            End::NotBegun(error) | End::Stopped(error) => frames(error),
            End::Returned(_) | End::Waiting => Vec::new(),
        };
        let turns = state.end();
        let without_verdicts = match end {
            // One that returned between two ticks has done too much all the same.
            End::Returned(_) | End::Stopped(_) if called_too_often => self.called_too_often(),
            End::Returned(answers) if answers.len() == count && !is_crowded => {
                let outcomes = answers.into_iter().zip(turns).map(|(answer, turn)| {
                    let (effects, log) = turn.finish();
                    Outcome { trace: seen(log, Vec::new()), ..self.answered(answer, effects) }
                });
                return Ok(outcomes.collect());
            }
            End::Returned(answers) => undecided(answers.len(), count),
            End::Waiting => timed_out(allowed),
            End::Stopped(error) => self.stopped(&error, refused, allowed),
            End::NotBegun(error) if is_ours(&error) && !refused => {
                Outcome::failed(Verdict::HostFault, Fault::new("no-instance", format!("{error:#}")))
            }
            End::NotBegun(error) => self.stopped(&error, refused, allowed),
        };
        let log = turns.flat_map(|turn| turn.finish().1).collect();
        Err(Box::new(Outcome { trace: seen(log, backtrace), ..without_verdicts }))
    }

    fn called_too_often(&self) -> Outcome {
        let limit = self.terms.limits.host_calls;
        let words = format!("called the host more often than {limit} times (limits.host_calls)");
        Outcome::failed(Verdict::OutOfFuel, Fault::new("too-many-host-calls", words))
    }

    /// What the handler itself decided.
    fn answered(&self, answer: Result<Option<types::Reply>, types::Failure>, effects: Effects) -> Outcome {
        match answer {
            Ok(reply) => {
                let reply = reply.map(convert::reply);
                let (size, limit) = (reply.as_ref().map_or(0, |reply| reply.body.len()), self.terms.limits.reply);
                if size > bytes(limit) {
                    let words = format!("reply has {size} bytes, more than the limit of {}", limit.as_u64());
                    return Outcome::failed(Verdict::Reject, Fault::new("reply-too-large", words));
                }
                Outcome { reply: reply.map(Box::new), effects, ..Outcome::ok() }
            }
            Err(types::Failure::Retry(retry)) => {
                let (fault, retry_after) = convert::retry(retry);
                Outcome { retry_after, ..Outcome::failed(Verdict::Retry, fault) }
            }
            Err(types::Failure::Reject(fault)) => Outcome::failed(Verdict::Reject, convert::fault(fault)),
        }
    }

    /// Why the attempt was ended.
    fn stopped(&self, error: &wasmtime::Error, refused_memory: bool, allowed: Duration) -> Outcome {
        let failed = |verdict: Verdict, words: String| Outcome::failed(verdict, Fault::new(verdict.as_str(), words));
        if let Some(stop) = error.downcast_ref::<Stop>() {
            return match stop {
                Stop::Denied(words) => failed(Verdict::Denied, words.clone()),
                Stop::HostFault(error) => failed(Verdict::HostFault, whole(error)),
            };
        }
        if let Some(I32Exit(status)) = error.downcast_ref::<I32Exit>() {
            return Outcome::failed(
                Verdict::Trap,
                Fault::new("exit", format!("the guest exited with status {status}")),
            );
        }
        let limits = &self.terms.limits;
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => timed_out(allowed),
            Some(Trap::OutOfFuel) => {
                failed(Verdict::OutOfFuel, format!("used up its fuel of {}", limits.fuel.unwrap_or_default()))
            }
            // A guest whose allocation fails usually traps right after, in words of its own language.
            _ if refused_memory => {
                failed(Verdict::OutOfMemory, format!("asked for more memory than its limit of {}", limits.memory))
            }
            Some(trap) => failed(Verdict::Trap, trap.to_string()),
            None => failed(Verdict::Trap, format!("{:#}", error.root_cause())),
        }
    }
}

/// When a call began, and how long it may take.
#[derive(Clone, Copy)]
struct Allowed {
    began: Instant,
    allowed: Duration,
}

impl Sites {
    /// Makes the component ready at another place.
    async fn spread(self: Arc<Self>, engine: Arc<Engine>, place: usize) {
        let Self { first, others } = &*self;
        let made = async { first.again(&engine.at(place, first.component(), first.has_fuel()).await?) };
        match (made.await, place.checked_sub(1).and_then(|at| others.get(at))) {
            (Ok(site), Some(other)) => {
                other.site.get_or_init(|| site);
            }
            (Err(error), _) => {
                let (plugin, error) = (&first.terms.name, format!("{error:#}"));
                tracing::info!(%plugin, place, error, "no copy of the plugin for other threads, which share one");
            }
            (Ok(_), None) => {}
        }
    }
}

impl Site {
    fn component(&self) -> &Component {
        self.linked.pre.component()
    }

    fn has_fuel(&self) -> bool {
        self.terms.limits.fuel.is_some()
    }

    /// The same on the engine of this copy of the component.
    fn again(&self, component: &Component) -> wasmtime::Result<Arc<Self>> {
        let pre = link(component, &self.terms.powers)?;
        let linked = Linked { exports: self.linked.exports.again(&pre)?, pre };
        Ok(Arc::new(Self { linked, terms: Arc::new(Terms::clone(&self.terms)), usual: OnceLock::new() }))
    }

    /// What was seen of an attempt.
    fn seen(&self, fuel: Option<u64>, peak_memory: Option<u64>, log: Vec<LogLine>, backtrace: Vec<String>) -> Trace {
        let made = |log, backtrace| {
            let digest = Some(Arc::clone(&self.terms.digest));
            Trace::from(Seen { digest, fuel, peak_memory, log, backtrace })
        };
        if !log.is_empty() || !backtrace.is_empty() {
            return made(log, backtrace);
        }
        let plain = || made(Vec::new(), Vec::new());
        let usual = self.usual.get_or_init(plain);
        if (usual.fuel, usual.peak_memory) == (fuel, peak_memory) { usual.clone() } else { plain() }
    }
}

impl Instance {
    /// An instance to be, with all limits but those of a call.
    fn new(site: &Arc<Site>, terms: &Arc<Terms>, slot: OwnedSemaphorePermit) -> Self {
        let store = store(&site.linked, State::new(terms));
        Self { store, site: Arc::clone(site), bound: None, served: 0, _slot: slot }
    }

    /// Begins one attempt for each call, with all limits armed.
    fn begin(&mut self, calls: impl IntoIterator<Item = Call>, deadline: Option<Instant>, fuel: Option<u64>) {
        self.store.data_mut().begin(calls, deadline);
        self.arm(fuel);
    }

    /// Begins the same attempts again, where an instance can be made.
    fn move_to(&mut self, site: &Arc<Site>, fuel: Option<u64>) {
        self.store = store(&site.linked, self.store.data_mut().again());
        self.site = Arc::clone(site);
        self.arm(fuel);
    }

    fn arm(&mut self, fuel: Option<u64>) {
        self.store.set_epoch_deadline(1);
        if let Some(fuel) = fuel
            && let Err(error) = self.store.set_fuel(fuel)
        {
            tracing::error!(error = format!("{error:#}"), "fuel is not measured");
        }
    }
}

/// A slot within the time allowed; there is hardly ever one to wait for, and then no timer to arm.
async fn slot(slots: &Slots, allowed: Duration) -> Option<OwnedSemaphorePermit> {
    match slots.try_acquire() {
        Some(slot) => Some(slot),
        None => tokio::time::timeout(allowed, slots.acquire()).await.ok()?.ok(),
    }
}

fn store(linked: &Linked, state: State) -> Store<State> {
    let mut store = Store::new(linked.pre.engine(), state);
    store.limiter(|state| &mut state.meter);
    store.epoch_deadline_callback(|store| {
        let state = store.data();
        let is_time_left = state.deadline().is_some_and(|deadline| Instant::now() < deadline);
        let may_go_on = is_time_left && !state.called_too_often();
        // The engine's own way to yield is behind all other tasks of the thread, but before its timers and sockets, which
        // would wait for 61 turns of guests that compute.
        let turn = || UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()));
        Ok(if may_go_on { turn() } else { UpdateDeadline::Interrupt })
    });
    store
}

/// Waits for a call that began at an instant, and a little longer than until its deadline.
async fn until(
    engine: &Engine,
    began: Instant,
    deadline: Option<Instant>,
    call: Pin<&mut impl Future<Output = End>>,
) -> End {
    compute::until(began, deadline, engine.computing(), call).await.unwrap_or(End::Waiting)
}

/// Calls an export of an instance, which is made first where it is not there yet.
async fn call_in(instance: &mut Instance, export: Export, events: &[Arc<Event>]) -> End {
    let Instance { store, site, bound, .. } = instance;
    let linked = &site.linked;
    let bound = match bound {
        Some(bound) => bound,
        None => match linked.pre.instantiate_async(&mut *store).await {
            Ok(fresh) => bound.insert(Bound::new(fresh)),
            Err(error) => return End::NotBegun(error),
        },
    };
    if let Err(error) = linked.exports.bind(bound, store, export) {
        return End::NotBegun(error);
    }
    match bound.call(export, store, events).await {
        Ok(answers) => End::Returned(answers),
        Err(error) => End::Stopped(error),
    }
}

fn is_pool_full(end: &End) -> bool {
    matches!(end, End::NotBegun(error) if error.is::<PoolConcurrencyLimitError>())
}

/// The call of a self-check: there is no event, and what asks about it is told of one that says so.
fn introduction(plugin: &Arc<str>, allowed: Duration) -> Result<Call> {
    let event = Event::new(Source::Internal, EventType::parse("tidegate.plugins.check")?, Payload::json(&**plugin)?);
    Ok(Call {
        event: Arc::new(event),
        subscription: "self-check".into(),
        attempt: 1,
        max_attempts: 1,
        timeout: allowed,
        is_replay: false,
        kv: Arc::new(Nothing),
    })
}

/// A store in which nothing was ever kept.
struct Nothing;

#[async_trait]
impl KvRead for Nothing {
    async fn get(&self, _bucket: &str, _key: &str) -> Result<Option<Bytes>> {
        Ok(None)
    }
}

/// The outcome of a call with one event.
fn only(mut outcomes: Outcomes) -> Outcome {
    outcomes.pop().unwrap_or_else(|| undecided(0, 1))
}

fn undecided(answers: usize, count: usize) -> Outcome {
    let words = match answers == count {
        true => "publishes and writes more than the events of one call may together".to_owned(),
        false => format!("gave {answers} answers to {count} events"),
    };
    Outcome::failed(Verdict::HostFault, Fault::new("undecided", format!("the handler {words}")))
}

/// Whether an instance is missing for reasons that are not the guest's.
fn is_ours(error: &wasmtime::Error) -> bool {
    error.is::<PoolConcurrencyLimitError>() || !(error.is::<Trap>() || error.is::<WasmBacktrace>())
}

fn timed_out(allowed: Duration) -> Outcome {
    Outcome::failed(Verdict::Timeout, Fault::new("timeout", format!("the attempt took longer than {allowed:?}")))
}

/// An error with its causes, in one line.
fn whole(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Guest frames, innermost first, as `offset - module!function`, with source lines where the guest brought them.
fn frames(error: &wasmtime::Error) -> Vec<String> {
    let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() else { return Vec::new() };
    let text = backtrace.to_string();
    text.lines().skip(1).map(|line| unnumbered(line.trim_start()).to_owned()).collect()
}

fn unnumbered(line: &str) -> &str {
    match line.split_once(": ") {
        Some((number, frame)) if number.bytes().all(|byte| byte.is_ascii_digit()) => frame.trim_start(),
        _ => line,
    }
}
