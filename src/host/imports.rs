//! What a guest can ask of the host during an attempt, and the linker that offers it.
//!
//! Nothing is carried out here: events and writes are collected as [`Effects`], and reads of key-value data go through
//! the [`Call`]. A request that breaks a rule is answered with a fault that the guest can read:
//! `denied` (not granted), `invalid-…`, `too-large`, `too-many`, or `no-turn` in a batch. Only what cannot be answered so
//! ends the attempt: a setting that was never requested ([`Stop::Denied`]) and a store that cannot be read
//! ([`Stop::HostFault`]). So does calling the host too often, which [`instance`](super::instance) watches by the count that
//! is kept here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use smallvec::SmallVec;
use wasmtime::component::{Component, HasSelf, InstancePre, Linker};
use wasmtime_wasi::{WasiCtxView, WasiView};

use super::bindings::tidegate::plugin::events::Attributes;
use super::bindings::tidegate::plugin::types::Fault;
use super::bindings::tidegate::plugin::{config, delivery, events, kv, log, types};
use super::convert::refusal;
use super::grants::Powers;
use super::limits::{Limits, Meter, bytes};
use super::log::{Log, Tail};
use super::wasi::Wasi;
use crate::delivery::{KvChange, KvWrite, LogLine};
use crate::event::{EventId, EventType, MAX_TEXT, Metadata, Payload, body_size, short_text};
use crate::handler::{Call, Effects, Publish};

/// Why a host function ended the attempt.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stop {
    /// The guest did what it was not granted, where it cannot be told otherwise.
    #[error("{0}")]
    Denied(String),
    /// The host could not do what it offers.
    #[error("{0}")]
    HostFault(crate::error::Error),
}

/// What is fixed for all attempts of a plugin.
#[derive(Clone)]
pub(super) struct Terms {
    pub(super) name: Arc<str>,
    pub(super) digest: Arc<str>,
    pub(super) powers: Powers,
    pub(super) limits: Limits,
    /// The largest payload of an event, in bytes.
    pub(super) max_payload: u64,
    /// The most events of one call; 1 for a guest that takes them one by one.
    pub(super) max_batch: usize,
    /// How many events an instance may serve; 1 for a fresh one each.
    pub(super) reuse: u32,
}

/// What an attempt has used of its own limits.
#[derive(Debug, Default)]
struct Used {
    published_bytes: usize,
    kv_operations: u32,
    kv_bytes: usize,
}

/// What a store holds: an instance's own, and the attempts that it is busy with.
pub(super) struct State {
    pub(super) meter: Meter,
    terms: Arc<Terms>,
    /// Where the guest's lines go, from the first of them on: most guests write none.
    log: Option<Log>,
    deadline: Option<Instant>,
    /// One per event of the call.
    turns: SmallVec<[Turn; 1]>,
    /// Whose turn it is. The log of that event is in `log`.
    turn: usize,
    /// Whether the guest has said so, or there is only one.
    is_said: bool,
    /// The calls of the host since the call of the guest began, whichever event they were for.
    host_calls: u64,
    /// What the effects of all events hold, in bytes: it waits in memory for the end of the call.
    held: usize,
    is_crowded: bool,
    wasi: Option<Box<Wasi>>,
}

/// One attempt.
pub(super) struct Turn {
    call: Call,
    effects: Effects,
    /// This attempt's own writes: a value, or `None` for deleted.
    written: BTreeMap<(String, String), Option<Bytes>>,
    used: Used,
    /// `None` before it has lines, and while it has its turn.
    log: Option<Box<Tail>>,
}

impl Turn {
    fn new(call: Call) -> Self {
        Self { call, effects: Effects::default(), written: BTreeMap::new(), used: Used::default(), log: None }
    }

    /// Where its lines go from here on.
    fn open_log(&mut self, terms: &Terms) -> Box<Tail> {
        let fresh = || Box::new(Tail::new(&terms.name, &self.call, bytes(terms.limits.log)));
        self.log.take().unwrap_or_else(fresh)
    }

    fn move_kv(&mut self, more: usize, limit: ByteSize) -> Result<(), Fault> {
        self.used.kv_bytes = within(self.used.kv_bytes, more, limit).ok_or_else(|| {
            let words = format!("an attempt may read and write {limit} of key-value data (limits.kv_bytes)");
            refusal("too-large", words)
        })?;
        Ok(())
    }

    /// What the attempt wants done, and its log.
    pub(super) fn finish(self) -> (Effects, Vec<LogLine>) {
        (self.effects, self.log.map(|mut log| log.finish()).unwrap_or_default())
    }
}

impl State {
    /// The state of an instance that is busy with nothing yet.
    pub(super) fn new(terms: &Arc<Terms>) -> Self {
        Self {
            meter: Meter::new(bytes(terms.limits.memory)),
            terms: Arc::clone(terms),
            log: None,
            deadline: None,
            turns: SmallVec::new(),
            turn: 0,
            is_said: false,
            host_calls: 0,
            held: 0,
            is_crowded: false,
            wasi: None,
        }
    }

    /// Begins one attempt for each call.
    pub(super) fn begin(&mut self, calls: impl IntoIterator<Item = Call>, deadline: Option<Instant>) {
        self.meter.restart();
        (self.deadline, self.host_calls, self.held, self.is_crowded) = (deadline, 0, 0, false);
        self.turns.clear();
        self.turns.extend(calls.into_iter().map(Turn::new));
        (self.turn, self.is_said) = (0, self.turns.len() == 1);
        if let Some(log) = &self.log {
            log.exchange(self.turns.first_mut().map(|turn| turn.open_log(&self.terms)));
        }
    }

    /// Ends all attempts; the state is busy with nothing once they have been taken.
    pub(super) fn end(&mut self) -> smallvec::Drain<'_, [Turn; 1]> {
        if let Some(log) = &self.log
            && let Some(turn) = self.turns.get_mut(self.turn)
        {
            turn.log = log.exchange(None);
        }
        // What WASI writes to stays.
        self.log = self.log.take().filter(|_| self.wasi.is_some());
        self.turns.drain(..)
    }

    /// The same attempts from their start, for another instance.
    pub(super) fn again(&mut self) -> Self {
        let mut state = Self::new(&self.terms);
        state.begin(self.turns.drain(..).map(|turn| turn.call), self.deadline);
        state
    }

    /// Counts a call of the host. Every interface of the linker takes the state through here.
    fn called(&mut self) -> &mut Self {
        self.host_calls = self.host_calls.saturating_add(1);
        self
    }

    /// Whether the host was called more often than allowed for all events of the call together.
    pub(super) fn called_too_often(&self) -> bool {
        let events = u64::try_from(self.turns.len().max(1)).unwrap_or(u64::MAX);
        self.host_calls > self.terms.limits.host_calls.saturating_mul(events)
    }

    /// Whether the guest has kept to what it is not told about when it passes it.
    pub(super) fn is_within_limits(&self) -> bool {
        !self.meter.has_refused() && !self.called_too_often()
    }

    /// When the guest is to be interrupted; `None` for at once.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the effects of a batch were too large for no other reason than that they came together: what the guest
    /// then decided about an event it might not decide about that event alone.
    pub(super) fn is_crowded(&self) -> bool {
        self.is_crowded
    }

    /// The attempt that facts and log lines belong to.
    fn current(&self) -> wasmtime::Result<&Turn> {
        self.turns.get(self.turn).ok_or_else(nobody)
    }

    /// The attempt that effects belong to.
    fn acting(&mut self) -> Result<&mut Turn, Fault> {
        let turn = self.is_said.then_some(self.turn);
        turn.and_then(|turn| self.turns.get_mut(turn)).ok_or_else(no_turn)
    }

    fn take_turn(&mut self, index: u32) -> wasmtime::Result<()> {
        let (count, next) = (self.turns.len(), usize::try_from(index).unwrap_or(usize::MAX));
        let Some(turn) = self.turns.get_mut(next) else {
            return Err(wasmtime::Error::msg(format!("there is no turn {index}: the call has {count} events")));
        };
        self.is_said = true;
        if next == self.turn {
            return Ok(());
        }
        if let Some(log) = &self.log {
            let before = log.exchange(Some(turn.open_log(&self.terms)));
            if let Some(turn) = self.turns.get_mut(self.turn) {
                turn.log = before;
            }
        }
        self.turn = next;
        Ok(())
    }

    /// The collection that a bucket is, once it is granted and one more use of `key` in it is within the limit.
    fn operation(&mut self, bucket: &str, key: &str) -> Result<String, Fault> {
        if !self.terms.powers.kv.contains(bucket) {
            return Err(denied("kv bucket", bucket, "kv"));
        }
        check_key(key)?;
        let limit = self.terms.limits.kv_operations;
        let Some(turn) = self.turns.get_mut(self.turn) else { return Err(no_turn()) };
        if turn.used.kv_operations >= limit {
            let words = format!("an attempt may read and write key-value data {limit} times (limits.kv_operations)");
            return Err(refusal("too-many", words));
        }
        turn.used.kv_operations = turn.used.kv_operations.saturating_add(1);
        Ok(format!("kv/{}/{bucket}", self.terms.name))
    }

    /// Exclusive although it only reads: WASI's parts cannot be shared between threads, and this waits.
    async fn read(&mut self, collection: &str, key: &str) -> wasmtime::Result<Result<Option<Bytes>, Fault>> {
        let limit = self.terms.limits.kv_bytes;
        let turn = self.turns.get_mut(self.turn).ok_or_else(nobody)?;
        // A tuple of borrowed strings is no key of the map; the clones are small beside the read.
        let value = match turn.written.get(&(collection.to_owned(), key.to_owned())) {
            Some(own) => own.clone(),
            None => turn.call.kv.get(collection, key).await.map_err(Stop::HostFault)?,
        };
        Ok(turn.move_kv(value.as_ref().map_or(0, Bytes::len), limit).map(|()| value))
    }

    fn write(&mut self, bucket: String, key: String, change: KvChange, now: Option<Bytes>) -> Result<(), Fault> {
        let size = now.as_ref().map_or(0, Bytes::len).saturating_add(key.len());
        let limit = self.terms.limits.kv_bytes;
        self.acting()?.move_kv(size, limit)?;
        self.hold(size)?;
        let turn = self.acting()?;
        turn.written.insert((bucket.clone(), key.clone()), now);
        turn.effects.writes.push(KvWrite { bucket, key, change });
        Ok(())
    }

    /// One attempt cannot reach this limit by itself: its own are lower.
    fn hold(&mut self, more: usize) -> Result<(), Fault> {
        let Limits { published_bytes, kv_bytes, .. } = &self.terms.limits;
        let limit = ByteSize(published_bytes.as_u64().saturating_add(kv_bytes.as_u64()));
        let held = within(self.held, more, limit);
        self.is_crowded |= held.is_none();
        self.held = held.ok_or_else(|| {
            refusal("too-large", format!("the events of a batch may publish and write {limit} together"))
        })?;
        Ok(())
    }

    fn publish(&mut self, publish: Publish) -> Result<String, Fault> {
        if !self.terms.powers.may_publish(&publish.event_type) {
            return Err(denied("event type", publish.event_type.as_str(), "events"));
        }
        let (limits, max_payload) = (&self.terms.limits, self.terms.max_payload);
        let (count, limit) = (limits.published_events, limits.published_bytes);
        let turn = self.acting()?;
        let index = turn.effects.published.len();
        if u32::try_from(index).is_ok_and(|index| index >= count) {
            let words = format!("an attempt may publish {count} events (limits.published_events)");
            return Err(refusal("too-many", words));
        }
        let size = body_size(&publish.payload, &publish.metadata, max_payload)
            .map_err(|error| refusal("too-large", error.to_string()))?
            .saturating_add(publish.key.as_ref().map_or(0, |key| key.len()));
        turn.used.published_bytes = within(turn.used.published_bytes, size, limit).ok_or_else(|| {
            refusal("too-large", format!("an attempt may publish {limit} of events (limits.published_bytes)"))
        })?;
        self.hold(size)?;
        let turn = self.acting()?;
        turn.effects.published.push(publish);
        Ok(EventId::caused(&turn.call.event.id, &turn.call.subscription, index).to_string())
    }
}

/// Where the lines of whose turn it is go.
fn opened<'a>(log: &'a mut Option<Log>, turns: &mut [Turn], turn: usize, terms: &Terms) -> &'a Log {
    log.get_or_insert_with(|| {
        let log = Log::default();
        log.exchange(turns.get_mut(turn).map(|turn| turn.open_log(terms)));
        log
    })
}

fn nobody() -> wasmtime::Error {
    wasmtime::Error::msg("there is no event to ask about")
}

fn no_turn() -> Fault {
    refusal("no-turn", "in a batch, delivery.turn says whose event it is before anything is published or written")
}

/// What is used together, unless that is more than the limit.
fn within(used: usize, more: usize, limit: ByteSize) -> Option<usize> {
    Some(used.saturating_add(more)).filter(|&sum| sum <= bytes(limit))
}

fn denied(what: &str, name: &str, capability: &str) -> Fault {
    let words = format!("{what} {name:?} is not granted: request it in plugin.toml, under capabilities.{capability}");
    refusal("denied", words)
}

fn check_key(key: &str) -> Result<(), Fault> {
    match short_text("key", key) {
        Ok(()) if !key.is_empty() => Ok(()),
        _ => Err(refusal("invalid-key", format!("key must have 1–{MAX_TEXT} printable characters"))),
    }
}

/// What a guest wants published, checked.
fn publish(event_type: &str, content_type: &str, body: Vec<u8>, attributes: Attributes) -> Result<Publish, Fault> {
    let event_type = EventType::parse(event_type).map_err(|error| refusal("invalid-type", error.to_string()))?;
    let payload = Payload::new(content_type, body).map_err(|error| refusal("invalid-payload", error.to_string()))?;
    let mut publish = Publish { event_type, payload, key: None, metadata: Metadata::new() };
    for (name, value) in attributes {
        attribute(&mut publish, &name, value)?;
    }
    Ok(publish)
}

fn attribute(publish: &mut Publish, name: &str, value: String) -> Result<(), Fault> {
    let invalid = |words: String| Err(refusal("invalid-attribute", words));
    match (name, name.strip_prefix("metadata.")) {
        ("key", _) => match check_key(&value) {
            Ok(()) => publish.key = Some(value.into()),
            Err(fault) => return Err(fault),
        },
        (_, Some(entry)) => match serde_json::from_str(&value) {
            Ok(json) => drop(publish.metadata.insert(entry.to_owned(), json)),
            Err(error) => return invalid(format!("{name} is not JSON: {error}")),
        },
        _ => return invalid(format!("{name:?} is unknown: an event takes key and metadata.<name>")),
    }
    Ok(())
}

impl types::Host for State {}

impl delivery::Host for State {
    fn subscription(&mut self) -> wasmtime::Result<String> {
        Ok(self.current()?.call.subscription.to_string())
    }

    fn attempt(&mut self) -> wasmtime::Result<u32> {
        Ok(self.current()?.call.attempt)
    }

    fn max_attempts(&mut self) -> wasmtime::Result<u32> {
        Ok(self.current()?.call.max_attempts)
    }

    fn remaining_ms(&mut self) -> wasmtime::Result<u64> {
        let left = self.deadline.map(|end| end.saturating_duration_since(Instant::now())).unwrap_or_default();
        Ok(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    fn idempotency_key(&mut self) -> wasmtime::Result<String> {
        Ok(self.current()?.call.idempotency_key())
    }

    fn is_replay(&mut self) -> wasmtime::Result<bool> {
        Ok(self.current()?.call.is_replay)
    }

    fn turn(&mut self, index: u32) -> wasmtime::Result<()> {
        self.take_turn(index)
    }
}

impl log::Host for State {
    fn emit(&mut self, level: u8, message: String, fields: Attributes) -> wasmtime::Result<()> {
        let Self { log, turns, turn, terms, .. } = self;
        opened(log, turns, *turn, terms).add(LogLine { level, message, fields });
        Ok(())
    }
}

impl config::Host for State {
    fn get(&mut self, key: String) -> wasmtime::Result<Option<String>> {
        match self.terms.powers.config.get(&key) {
            Some(value) => Ok(value.clone()),
            None => Err(Stop::Denied(format!(
                "setting {} is not granted: request it in plugin.toml, under capabilities.config",
                crate::error::quote(&key)
            ))
            .into()),
        }
    }
}

impl events::Host for State {
    fn publish(
        &mut self,
        event_type: String,
        content_type: String,
        payload: Vec<u8>,
        attributes: Attributes,
    ) -> wasmtime::Result<Result<String, Fault>> {
        Ok(publish(&event_type, &content_type, payload, attributes).and_then(|publish| self.publish(publish)))
    }
}

impl kv::Host for State {
    async fn get(&mut self, bucket: String, key: String) -> wasmtime::Result<Result<Option<Vec<u8>>, Fault>> {
        match self.operation(&bucket, &key) {
            Ok(collection) => Ok(self.read(&collection, &key).await?.map(|value| value.map(Vec::from))),
            Err(fault) => Ok(Err(fault)),
        }
    }

    fn set(
        &mut self,
        bucket: String,
        key: String,
        value: Vec<u8>,
        ttl_s: Option<u32>,
    ) -> wasmtime::Result<Result<(), Fault>> {
        Ok(self.set(&bucket, key, value.into(), ttl_s))
    }

    fn delete(&mut self, bucket: String, key: String) -> wasmtime::Result<Result<(), Fault>> {
        Ok(self.delete(&bucket, key))
    }

    async fn increment(&mut self, bucket: String, key: String, by: i64) -> wasmtime::Result<Result<i64, Fault>> {
        let collection = match self.operation(&bucket, &key) {
            Ok(collection) => collection,
            Err(fault) => return Ok(Err(fault)),
        };
        let before = self.read(&collection, &key).await?;
        Ok(before.and_then(|before| self.increment(collection, key, before.as_deref(), by)))
    }
}

impl State {
    fn set(&mut self, bucket: &str, key: String, value: Bytes, ttl_s: Option<u32>) -> Result<(), Fault> {
        let collection = self.operation(bucket, &key)?;
        if ttl_s == Some(0) {
            return Err(refusal("invalid-ttl", "ttl-s must be at least 1: leave it out for a value that stays"));
        }
        let ttl = ttl_s.map(|seconds| Duration::from_secs(seconds.into()));
        self.write(collection, key, KvChange::Set { value: value.clone(), ttl }, Some(value))
    }

    fn delete(&mut self, bucket: &str, key: String) -> Result<(), Fault> {
        let collection = self.operation(bucket, &key)?;
        self.write(collection, key, KvChange::Delete, None)
    }

    fn increment(&mut self, collection: String, key: String, before: Option<&[u8]>, by: i64) -> Result<i64, Fault> {
        let sum = sum(before, by).map_err(|words| refusal("invalid-value", format!("value of {key} {words}")))?;
        self.write(collection, key, KvChange::Increment { by }, Some(sum.to_string().into()))?;
        Ok(sum)
    }
}

fn sum(before: Option<&[u8]>, by: i64) -> Result<i64, &'static str> {
    let number = match before {
        None => 0,
        Some(text) => {
            std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or("is not a decimal integer")?
        }
    };
    i64::checked_add(number, by).ok_or("would not fit into 64 bits")
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.called();
        let Self { log, turns, turn, terms, wasi, .. } = self;
        let log = opened(log, turns, *turn, terms);
        wasi.get_or_insert_with(|| Box::new(Wasi::new(log))).view()
    }
}

/// A component with exactly what these powers say behind its imports.
///
/// # Errors
/// Words of the engine about an import or export of another shape than ours.
pub(super) fn link(component: &Component, powers: &Powers) -> wasmtime::Result<InstancePre<State>> {
    linker(component.engine(), powers)?.instantiate_pre(component)
}

/// A linker that offers exactly what these powers say.
///
/// # Errors
/// Those of the engine, which there are none of as long as no name is added twice.
fn linker(engine: &wasmtime::Engine, powers: &Powers) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    types::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    delivery::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    log::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    if !powers.config.is_empty() {
        config::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    }
    if !powers.events.is_empty() {
        events::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    }
    if !powers.kv.is_empty() {
        kv::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called)?;
    }
    if powers.wasi {
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    }
    if powers.wasi_3 {
        wasmtime_wasi::p3::add_to_linker(&mut linker)?;
    }
    Ok(linker)
}
