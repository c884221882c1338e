//! The engine: how components are compiled, how much may be compiled and run at once, and the clock that ends guests.
//!
//! One engine serves all plugins. Nothing here knows what a plugin is: bytes go in, a compiled component comes out.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;
use wasmtime::component::Component;
use wasmtime::{Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails};

use super::cache::Cache;
use super::slots::Slots;
use crate::error::{Error, Result};

/// How often guests that compute are interrupted: to let other tasks run, and to see whether their time is up.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// How often idle instances are looked through.
const SWEEP: Duration = Duration::from_secs(1);

/// Compiling uses every core by itself; more at once only takes memory.
const COMPILES_AT_ONCE: usize = 2;

/// Memory of a slot that stays resident between attempts: enough for the heap of a light call.
const RESIDENT_MEMORY: usize = 128 << 10;

/// The same for tables.
const RESIDENT_TABLE: usize = 64 << 10;

/// Core instances, memories and tables that the pool holds per attempt: guests with WASI inside have a few of each.
const PARTS_PER_ATTEMPT: u32 = 4;

/// What a small pool has of them nevertheless: one Python guest takes some thirty.
const FEWEST_PARTS: u32 = 256;

/// What an engine is made with.
pub(super) struct Settings {
    /// Attempts at once.
    pub(super) slots: u32,
    /// The most memory that any plugin may be allowed, in bytes.
    pub(super) max_memory: usize,
    /// Where compiled code is kept.
    pub(super) cache: Option<PathBuf>,
}

/// Compiles components and says when they may run.
pub(super) struct Engine {
    wasmtime: wasmtime::Engine,
    slots: Arc<Slots>,
    compiles: Arc<Semaphore>,
    cache: Option<Arc<Cache>>,
    /// Dropping it ends the ticking thread.
    _ticker: Sender<()>,
}

impl Engine {
    /// Starts an engine and its ticking thread.
    ///
    /// Where the address space for the pool cannot be had, instances are allocated one by one instead, which is said
    /// once in the log.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when the platform cannot run guests, and [`Error::Invalid`] for a cache folder that
    /// others can write to.
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        let wasmtime = pooled(settings).or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "no pool for instances, each is allocated by itself");
            wasmtime::Engine::new(&config())
        });
        let wasmtime = wasmtime.map_err(|error| unusable(format!("cannot be started: {error:#}")))?;
        let cache = match &settings.cache {
            Some(folder) => Some(Arc::new(Cache::open(folder, &wasmtime)?)),
            None => None,
        };
        let slots = Slots::new(settings.slots);
        let _ticker = tick(&wasmtime, &slots)?;
        Ok(Self { wasmtime, slots, compiles: Arc::new(Semaphore::new(COMPILES_AT_ONCE)), cache, _ticker })
    }

    /// The engine itself.
    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.wasmtime
    }

    /// What an instance holds one of.
    pub(super) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// The compiled form of a component, from the cache where there is one. Never blocks the caller's thread.
    ///
    /// # Errors
    /// What the compiler says about `bytes`.
    pub(super) async fn compile(&self, digest: &str, bytes: Bytes) -> wasmtime::Result<Component> {
        let permit = Arc::clone(&self.compiles).acquire_owned().await?;
        let (engine, cache, digest) = (self.wasmtime.clone(), self.cache.clone(), digest.to_owned());
        let work = move || {
            let _permit = permit;
            if let Some(known) = cache.as_ref().and_then(|cache| cache.get(&engine, &digest)) {
                return Ok(known);
            }
            let component = Component::from_binary(&engine, &bytes)?;
            if let Some(cache) = cache {
                cache.put(&digest, &component);
            }
            Ok(component)
        };
        tokio::task::spawn_blocking(work).await?
    }
}

fn unusable(reason: String) -> Error {
    Error::Incompatible { what: "the engine for plugins".to_owned(), reason: reason.into() }
}

fn config() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .consume_fuel(true)
        .memory_init_cow(true)
        .concurrency_support(false)
        // A limiter is not asked about shared memories.
        .wasm_threads(false)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable);
    config
}

fn pooled(settings: &Settings) -> wasmtime::Result<wasmtime::Engine> {
    let parts = settings.slots.saturating_mul(PARTS_PER_ATTEMPT).max(FEWEST_PARTS);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(settings.slots)
        .total_stacks(settings.slots)
        .total_core_instances(parts)
        .total_memories(parts)
        .total_tables(parts)
        .max_memory_size(settings.max_memory);
    if PoolingAllocationConfig::is_pagemap_scan_available() {
        // Without the scan, resetting resident memory costs more than mapping it anew.
        pool.pagemap_scan(Enabled::Yes)
            .linear_memory_keep_resident(RESIDENT_MEMORY)
            .table_keep_resident(RESIDENT_TABLE);
    }
    let mut config = config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    wasmtime::Engine::new(&config)
}

/// Ticks from a thread of its own: a guest that computes can keep every thread of the runtime busy, timers included.
/// Now and then it lets idle instances go.
fn tick(engine: &wasmtime::Engine, slots: &Arc<Slots>) -> Result<Sender<()>> {
    let (alive, dropped) = mpsc::channel();
    let (engine, slots) = (engine.weak(), Arc::downgrade(slots));
    let work = move || {
        let mut swept = Instant::now();
        while let Err(RecvTimeoutError::Timeout) = dropped.recv_timeout(TICK) {
            let Some(engine) = engine.upgrade() else { return };
            engine.increment_epoch();
            if swept.elapsed() >= SWEEP
                && let Some(slots) = slots.upgrade()
            {
                swept = Instant::now();
                slots.release_idle(swept);
            }
        }
    };
    let thread = std::thread::Builder::new().name("tidegate-epochs".into());
    thread.spawn(work).map_err(|error| unusable(format!("has no thread to keep time with: {error}")))?;
    Ok(alive)
}
