//! What a guest can ask of the host during an attempt, and the linker that offers it.
//!
//! Nothing is carried out here: events and writes are collected as [`Effects`], and reads of key-value data go through
//! the [`Call`]. A request that breaks a rule is answered with a fault that the guest can read:
//! `denied` (not granted), `invalid-…`, `too-large` or `too-many`. Only what cannot be answered so ends the attempt: a
//! setting that was never requested ([`Stop::Denied`]) and a store that cannot be read ([`Stop::HostFault`]). So does
//! calling the host too often, which [`instance`](super::instance) watches by the count that is kept here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime_wasi::{WasiCtxView, WasiView};

use super::bindings::PluginPre;
use super::bindings::tidegate::plugin::types::{Attributes, Fault};
use super::bindings::tidegate::plugin::{config, delivery, events, kv, log, types};
use super::convert::refusal;
use super::grants::Powers;
use super::limits::{Limits, Meter, bytes};
use super::log::Log;
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
pub(super) struct Terms {
    pub(super) name: Arc<str>,
    pub(super) digest: Arc<str>,
    pub(super) powers: Powers,
    pub(super) limits: Limits,
    /// The largest payload of an event, in bytes.
    pub(super) max_payload: u64,
}

/// What an attempt has used of its limits, as far as it is counted here.
#[derive(Debug, Default)]
struct Used {
    host_calls: u64,
    published_bytes: usize,
    kv_operations: u32,
    kv_bytes: usize,
}

/// What a store holds: one attempt.
pub(super) struct State {
    pub(super) meter: Meter,
    pub(super) log: Log,
    pub(super) effects: Effects,
    terms: Arc<Terms>,
    call: Call,
    deadline: Instant,
    /// This attempt's own writes: a value, or `None` for deleted.
    written: HashMap<(String, String), Option<Bytes>>,
    used: Used,
    wasi: Option<Wasi>,
}

impl State {
    pub(super) fn new(terms: &Arc<Terms>, call: Call, deadline: Instant) -> Self {
        let log = Log::new(&terms.name, &call, bytes(terms.limits.log));
        Self {
            meter: Meter::new(bytes(terms.limits.memory)),
            log,
            effects: Effects::default(),
            terms: Arc::clone(terms),
            call,
            deadline,
            written: HashMap::new(),
            used: Used::default(),
            wasi: None,
        }
    }

    /// Counts a call of the host. Every interface of the linker takes the state through here.
    fn called(&mut self) -> &mut Self {
        self.used.host_calls = self.used.host_calls.saturating_add(1);
        self
    }

    /// Whether the host was called more often than allowed.
    pub(super) fn called_too_often(&self) -> bool {
        self.used.host_calls > self.terms.limits.host_calls
    }

    /// The call, to be made again from the start.
    pub(super) fn into_call(self) -> Call {
        self.call
    }

    /// The collection that a bucket is, once it is granted and one more use of `key` in it is within the limit.
    fn operation(&mut self, bucket: &str, key: &str) -> Result<String, Fault> {
        if !self.terms.powers.kv.contains(bucket) {
            return Err(denied("kv bucket", bucket, "kv"));
        }
        check_key(key)?;
        let limit = self.terms.limits.kv_operations;
        if self.used.kv_operations >= limit {
            let words = format!("an attempt may read and write key-value data {limit} times (limits.kv_operations)");
            return Err(refusal("too-many", words));
        }
        self.used.kv_operations = self.used.kv_operations.saturating_add(1);
        Ok(format!("kv/{}/{bucket}", self.terms.name))
    }

    /// Exclusive although it only reads: WASI's parts cannot be shared between threads, and this waits.
    async fn read(&mut self, collection: &str, key: &str) -> wasmtime::Result<Result<Option<Bytes>, Fault>> {
        // A tuple of borrowed strings is no key of the map; the clones are small beside the read.
        let value = match self.written.get(&(collection.to_owned(), key.to_owned())) {
            Some(own) => own.clone(),
            None => self.call.kv.get(collection, key).await.map_err(Stop::HostFault)?,
        };
        Ok(self.move_kv(value.as_ref().map_or(0, Bytes::len)).map(|()| value))
    }

    fn write(&mut self, bucket: String, key: String, change: KvChange, now: Option<Bytes>) -> Result<(), Fault> {
        self.move_kv(now.as_ref().map_or(0, Bytes::len).saturating_add(key.len()))?;
        self.written.insert((bucket.clone(), key.clone()), now);
        self.effects.writes.push(KvWrite { bucket, key, change });
        Ok(())
    }

    fn move_kv(&mut self, more: usize) -> Result<(), Fault> {
        let limit = self.terms.limits.kv_bytes;
        self.used.kv_bytes = within(self.used.kv_bytes, more, limit).ok_or_else(|| {
            let words = format!("an attempt may read and write {limit} of key-value data (limits.kv_bytes)");
            refusal("too-large", words)
        })?;
        Ok(())
    }

    fn publish(&mut self, publish: Publish) -> Result<String, Fault> {
        if !self.terms.powers.may_publish(&publish.event_type) {
            return Err(denied("event type", publish.event_type.as_str(), "events"));
        }
        let index = self.effects.published.len();
        let limit = self.terms.limits.published_events;
        if u32::try_from(index).is_ok_and(|index| index >= limit) {
            let words = format!("an attempt may publish {limit} events (limits.published_events)");
            return Err(refusal("too-many", words));
        }
        let size = body_size(&publish.payload, &publish.metadata, self.terms.max_payload)
            .map_err(|error| refusal("too-large", error.to_string()))?
            .saturating_add(publish.key.as_ref().map_or(0, |key| key.len()));
        let limit = self.terms.limits.published_bytes;
        self.used.published_bytes = within(self.used.published_bytes, size, limit).ok_or_else(|| {
            refusal("too-large", format!("an attempt may publish {limit} of events (limits.published_bytes)"))
        })?;
        self.effects.published.push(publish);
        Ok(EventId::caused(&self.call.event.id, &self.call.subscription, index).to_string())
    }
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
        Ok(self.call.subscription.to_string())
    }

    fn attempt(&mut self) -> wasmtime::Result<u32> {
        Ok(self.call.attempt)
    }

    fn max_attempts(&mut self) -> wasmtime::Result<u32> {
        Ok(self.call.max_attempts)
    }

    fn remaining_ms(&mut self) -> wasmtime::Result<u64> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Ok(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    fn idempotency_key(&mut self) -> wasmtime::Result<String> {
        Ok(self.call.idempotency_key())
    }

    fn is_replay(&mut self) -> wasmtime::Result<bool> {
        Ok(self.call.is_replay)
    }
}

impl log::Host for State {
    fn emit(&mut self, level: u8, message: String, fields: Attributes) -> wasmtime::Result<()> {
        self.log.add(LogLine { level, message, fields });
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
        let log = &self.log;
        self.wasi.get_or_insert_with(|| Wasi::new(log)).view()
    }
}

/// A component with exactly what these powers say behind its imports.
///
/// # Errors
/// Words of the engine about an import or export of another shape than ours.
pub(super) fn link(component: &Component, powers: &Powers) -> wasmtime::Result<PluginPre<State>> {
    PluginPre::new(linker(component.engine(), powers)?.instantiate_pre(component)?)
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
