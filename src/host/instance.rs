//! One attempt: a fresh instance, a call within its limits, and what came of it.
//!
//! An instance serves one event and is dropped with its store, whatever happened. Time is watched twice: the epoch
//! interrupts a guest that computes, and a timer ends one that waits in a host call.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::OnceCell;
use wasmtime::{PoolConcurrencyLimitError, Store, Trap, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use super::bindings::PluginPre;
use super::bindings::tidegate::plugin::types;
use super::convert;
use super::engine::{Engine, TICK};
use super::imports::{State, Stop, Terms, link};
use super::limits::bytes;
use crate::delivery::{Fault, Trace, Verdict};
use crate::event::{Event, EventType, Payload, Source};
use crate::handler::{Call, Effects, KvRead, Outcome};

/// How much later than the epoch the timer fires: the epoch knows where the guest was, the timer does not.
const GRACE: Duration = TICK.saturating_mul(5);

/// A linked component with the terms that it runs under.
pub(super) struct Prepared {
    pre: PluginPre<State>,
    /// The same for instances that found the pool full.
    outside: OnceCell<PluginPre<State>>,
    pub(super) terms: Arc<Terms>,
}

/// Why no instance could be made at all.
pub(super) enum Unstarted {
    /// In words.
    Failed(String),
    /// What the engine says about a handler of another type than the one that we call.
    Unfit(wasmtime::Error),
}

/// How a call ended, before anybody judged it.
enum End {
    /// The handler returned.
    Returned(Result<Option<types::Reply>, types::Failure>),
    /// It could not begin.
    NotBegun(wasmtime::Error),
    /// It was ended while it ran.
    Stopped(wasmtime::Error),
    /// It was waiting for the host when its time was up.
    Waiting,
}

impl Prepared {
    /// A linked component that runs under these terms.
    pub(super) fn new(pre: PluginPre<State>, terms: Terms) -> Self {
        Self { pre, outside: OnceCell::new(), terms: Arc::new(terms) }
    }

    /// Makes an instance and lets it go. Only then is it known whether the handler has the type that we call, and
    /// whether the guest fails before it is called at all.
    ///
    /// # Errors
    /// [`Unstarted`].
    pub(super) async fn start(&self, engine: &Arc<Engine>) -> Result<(), Unstarted> {
        let allowed = self.terms.limits.timeout;
        let Ok(_slot) = tokio::time::timeout(allowed, engine.slots().acquire()).await else {
            return Err(Unstarted::Failed(busy(allowed)));
        };
        let deadline = Instant::now().checked_add(allowed).unwrap_or_else(Instant::now);
        let mut pre = &self.pre;
        loop {
            let call = nobodys_call().map_err(|error| Unstarted::Failed(error.to_string()))?;
            let mut store = self.store(pre, call, deadline);
            let left = deadline.saturating_duration_since(Instant::now()).saturating_add(GRACE);
            let error = match tokio::time::timeout(left, pre.instantiate_async(&mut store)).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => return Err(Unstarted::Failed(format!("takes longer than {allowed:?} to start"))),
            };
            let outside =
                if error.is::<PoolConcurrencyLimitError>() { self.outside_the_pool(engine).await } else { None };
            match outside {
                Some(outside) => pre = outside,
                None => return Err(self.unstarted(error, store.data().meter.has_refused())),
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

    /// Makes one attempt, within the shorter of the call's timeout and the plugin's own.
    pub(super) async fn attempt(&self, engine: &Arc<Engine>, call: Call) -> Outcome {
        let allowed = call.timeout.min(self.terms.limits.timeout);
        let began = Instant::now();
        let Ok(slot) = tokio::time::timeout(allowed, engine.slots().acquire()).await else {
            let trace = Trace { digest: Some(Arc::clone(&self.terms.digest)), ..Trace::default() };
            return Outcome { trace, ..Outcome::failed(Verdict::HostFault, Fault::new("host-busy", busy(allowed))) };
        };
        let event = convert::guest_event(&call.event);
        let deadline = began.checked_add(allowed).unwrap_or(began);
        let mut store = self.store(&self.pre, call, deadline);
        let mut end = within(deadline, call_in(&self.pre, &mut store, &event)).await;
        if is_pool_full(&end)
            && let Some(outside) = self.outside_the_pool(engine).await
        {
            store = self.store(outside, store.into_data().into_call(), deadline);
            end = within(deadline, call_in(outside, &mut store, &event)).await;
        }
        let outcome = self.outcome(end, allowed, store);
        // Not before the store is gone, and the instance with it.
        drop(slot);
        outcome
    }

    /// A store with all limits armed.
    fn store(&self, pre: &PluginPre<State>, call: Call, deadline: Instant) -> Store<State> {
        let mut store = Store::new(pre.engine(), State::new(&self.terms, call, deadline));
        store.limiter(|state| &mut state.meter);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |store| {
            let may_go_on = Instant::now() < deadline && !store.data().called_too_often();
            Ok(if may_go_on { UpdateDeadline::Yield(1) } else { UpdateDeadline::Interrupt })
        });
        if let Err(error) = store.set_fuel(self.terms.limits.fuel) {
            tracing::error!(error = format!("{error:#}"), "fuel is not measured");
        }
        store
    }

    /// What runs on an engine without a pool, made at the first need of it.
    async fn outside_the_pool(&self, engine: &Arc<Engine>) -> Option<&PluginPre<State>> {
        let make = async || {
            tracing::info!(plugin = %self.terms.name, "the pool is full, instances are allocated beside it");
            link(&engine.outside_the_pool(self.pre.instance_pre().component()).await?, &self.terms.powers)
        };
        let made = self.outside.get_or_try_init(make).await;
        made.inspect_err(|error| tracing::error!(error = format!("{error:#}"), "no instance beside the pool")).ok()
    }

    fn outcome(&self, end: End, allowed: Duration, store: Store<State>) -> Outcome {
        let fuel = self.terms.limits.fuel.saturating_sub(store.get_fuel().unwrap_or_default());
        let state = store.into_data();
        let backtrace = match &end {
            End::NotBegun(error) | End::Stopped(error) => frames(error),
            End::Returned(_) | End::Waiting => Vec::new(),
        };
        let trace = Trace {
            digest: Some(Arc::clone(&self.terms.digest)),
            fuel: Some(fuel),
            peak_memory: u64::try_from(state.meter.peak_memory()).ok(),
            log: state.log.finish(),
            backtrace,
        };
        let refused = state.meter.has_refused();
        let outcome = match end {
            // One that returned between two ticks has done too much all the same.
            End::Returned(_) | End::Stopped(_) if state.called_too_often() => self.called_too_often(),
            End::Returned(answer) => self.answered(answer, state.effects),
            End::Waiting => timed_out(allowed),
            End::Stopped(error) => self.stopped(&error, refused, allowed),
            End::NotBegun(error) if is_ours(&error) && !refused => {
                Outcome::failed(Verdict::HostFault, Fault::new("no-instance", format!("{error:#}")))
            }
            End::NotBegun(error) => self.stopped(&error, refused, allowed),
        };
        Outcome { trace, ..outcome }
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
                Outcome { reply, effects, ..Outcome::ok() }
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
            Some(Trap::OutOfFuel) => failed(Verdict::OutOfFuel, format!("used up its fuel of {}", limits.fuel)),
            // A guest whose allocation fails usually traps right after, in words of its own language.
            _ if refused_memory => {
                failed(Verdict::OutOfMemory, format!("asked for more memory than its limit of {}", limits.memory))
            }
            Some(trap) => failed(Verdict::Trap, trap.to_string()),
            None => failed(Verdict::Trap, format!("{:#}", error.root_cause())),
        }
    }
}

/// The call that an instance is made for which nobody calls.
fn nobodys_call() -> crate::error::Result<Call> {
    let event = Event::new(Source::System, EventType::parse("tidegate.plugins.start")?, Payload::json_text("null")?);
    Ok(Call {
        event: Arc::new(event),
        subscription: "".into(),
        attempt: 1,
        max_attempts: 1,
        timeout: Duration::ZERO,
        is_replay: false,
        kv: Arc::new(NoValues),
    })
}

/// A store with nothing in it.
struct NoValues;

#[async_trait]
impl KvRead for NoValues {
    async fn get(&self, _: &str, _: &str) -> crate::error::Result<Option<Bytes>> {
        Ok(None)
    }
}

/// Instantiates and calls.
async fn call_in(pre: &PluginPre<State>, store: &mut Store<State>, event: &types::Event) -> End {
    let plugin = match pre.instantiate_async(&mut *store).await {
        Ok(plugin) => plugin,
        Err(error) => return End::NotBegun(error),
    };
    match plugin.tidegate_plugin_handler().call_handle(store, event).await {
        Ok(answer) => End::Returned(answer),
        Err(error) => End::Stopped(error),
    }
}

/// Waits for the call, and a little longer than until `deadline`.
async fn within(deadline: Instant, call: impl Future<Output = End>) -> End {
    let left = deadline.saturating_duration_since(Instant::now());
    tokio::time::timeout(left.saturating_add(GRACE), call).await.unwrap_or(End::Waiting)
}

fn is_pool_full(end: &End) -> bool {
    matches!(end, End::NotBegun(error) if error.is::<PoolConcurrencyLimitError>())
}

/// Whether an instance is missing for reasons that are not the guest's.
fn is_ours(error: &wasmtime::Error) -> bool {
    error.is::<PoolConcurrencyLimitError>() || !(error.is::<Trap>() || error.is::<WasmBacktrace>())
}

fn busy(allowed: Duration) -> String {
    format!("no instance became free within {allowed:?}: raise host.instances")
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
