//! The engines: how components are compiled, how much may be compiled and run at once, and the clock that ends guests.
//!
//! Nothing here knows what a plugin is: bytes go in, a compiled component comes out. Nearly all of them run on engines
//! whose instances come from a pool: the first, and copies of it for other threads, which would wait for each other at what
//! an engine counts. The others are made when the first component needs them. Whether fuel is counted is decided when code
//! is made, so that those with a budget of it have engines of their own.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;
use wasmtime::component::Component;
use wasmtime::{
    Config, Enabled, EngineWeak, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails,
};

use super::cache::{self, Cache, Folder};
use super::limits::MAX_TABLE;
use super::slots::Slots;
use crate::error::{Error, Result};

/// How often guests that compute are interrupted: to let other tasks run, and to see whether their time is up.
const TICK: Duration = Duration::from_millis(1);

/// How often it is looked whether there are guests to interrupt, while there is none.
const LOOK: Duration = Duration::from_millis(10);

/// How often idle instances are looked through.
const SWEEP: Duration = Duration::from_secs(1);

/// Compiling uses every core by itself; more at once only takes memory.
const COMPILES_AT_ONCE: usize = 2;

/// Memory of a slot that stays resident between attempts: enough for the heap of a light call.
const RESIDENT_MEMORY: usize = 128 << 10;

/// The same for tables.
const RESIDENT_TABLE: usize = 64 << 10;

/// What a guest's own calls may take of the stack. Recursion beyond it is a trap; compilers of guests keep their larger
/// data in linear memory, so that this is some ten thousand calls deep.
const GUEST_STACK: usize = 512 << 10;

/// The stack of an attempt: the guest's share, and three times as much for the host functions that run above it, which
/// are ours, WASI's, and whatever reads a value for the guest. Only pages that were touched take memory.
const STACK: usize = 4 * GUEST_STACK;

/// Core instances, memories and tables that the pool holds per attempt: guests with WASI inside have a few of each.
const PARTS_PER_ATTEMPT: u32 = 4;

/// What a small pool has of them nevertheless: one Python guest takes some thirty.
const FEWEST_PARTS: u32 = 256;

/// The most pools there are of a kind. Each takes address space for all slots, and a copy of the code that it runs.
const MOST_POOLS: usize = 8;

/// Code that takes more than this, in bytes, is not copied: what runs so much of it takes long anyway.
const LARGEST_COPY: usize = 16 << 20;

/// What the engines are made with.
pub(super) struct Settings {
    /// Attempts at once.
    pub(super) slots: u32,
    /// Core instances, memories and tables in the pool, of each as many.
    pub(super) parts: u32,
    /// Pools of a kind: one for each core, so that threads seldom share one.
    pub(super) pools: usize,
    /// The most memory that any plugin may be allowed, in bytes.
    pub(super) max_memory: usize,
    /// Where compiled code is kept.
    pub(super) cache: Option<Folder>,
}

impl Settings {
    /// Enough for this many attempts at once.
    pub(super) fn new(slots: u32, max_memory: usize, cache: Option<Folder>) -> Self {
        let parts = slots.saturating_mul(PARTS_PER_ATTEMPT).max(FEWEST_PARTS);
        let pools = cores().min(MOST_POOLS).min(usize::try_from(slots).unwrap_or(usize::MAX)).max(1);
        Self { slots, parts, pools, max_memory, cache }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// What a component has to have of its engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    /// A count of the fuel that its code uses.
    pub(super) fuel: bool,
    /// The tasks and streams of WASI 0.3. That a component uses them without importing WASI 0.3 is found out by the
    /// compiler.
    pub(super) tasks: bool,
}

/// Compiles components and says when they may run.
pub(super) struct Engine {
    unmetered: Set,
    /// The same again, for code that counts its fuel.
    metered: Set,
    pool: PoolingAllocationConfig,
    slots: Arc<Slots>,
    compiles: Arc<Semaphore>,
    /// Where guests are that compute for long.
    computing: Semaphore,
    cache: Option<Cache>,
    /// Takes engines to the thread that ticks for all of them. Dropping it ends the thread.
    ticker: Sender<EngineWeak>,
}

/// The engines for code of one kind.
struct Set {
    fuel: bool,
    config: Config,
    /// Instances from a pool: the fast way. `None` where its address space cannot be had.
    pooled: Box<[OnceLock<Option<wasmtime::Engine>>]>,
    /// Instances one by one, for what does not fit into the pool or finds it full. It runs the same compiled code.
    single: OnceLock<wasmtime::Engine>,
    /// Instances one by one, with the tasks and streams of WASI 0.3, which cost every call something, used or not.
    concurrent: OnceLock<wasmtime::Engine>,
}

impl Set {
    fn new(fuel: bool, pools: usize) -> Self {
        let (single, concurrent) = Default::default();
        let pooled = std::iter::repeat_with(OnceLock::new).take(pools).collect();
        Self { fuel, config: config(fuel), pooled, single, concurrent }
    }

    /// Whether it is the first engine with a pool that this component runs on.
    fn pools(&self, component: &Component) -> bool {
        let first = self.pooled.first().and_then(OnceLock::get).and_then(Option::as_ref);
        first.is_some_and(|engine| wasmtime::Engine::same(engine, component.engine()))
    }
}

impl Engine {
    /// Starts the first engine and the ticking thread.
    ///
    /// Where the address space for the pool cannot be had, instances are allocated one by one instead, which is said
    /// once in the log.
    ///
    /// # Errors
    /// [`Error::Incompatible`] when the platform cannot run guests, and [`Error::Invalid`] for a cache folder that was
    /// asked for and is not private or cannot be written to.
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        let slots = Slots::new(settings.slots);
        let engine = Self {
            unmetered: Set::new(false, settings.pools),
            metered: Set::new(true, settings.pools),
            pool: pool(settings),
            slots: Arc::clone(&slots),
            compiles: Arc::new(Semaphore::new(COMPILES_AT_ONCE)),
            computing: Semaphore::new(cores()),
            cache: settings.cache.as_ref().map_or(Ok(None), Cache::open)?,
            ticker: tick(&slots)?,
        };
        if engine.pooled(&engine.unmetered, 0).is_none() {
            engine.single(&engine.unmetered).map_err(|error| unusable(format!("cannot be started: {error:#}")))?;
        }
        Ok(engine)
    }

    /// What an instance holds one of.
    pub(super) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// A place for each core, for guests that compute for long.
    pub(super) fn computing(&self) -> &Semaphore {
        &self.computing
    }

    /// The compiled form of a component, from the cache where there is one. Never blocks the caller's thread.
    ///
    /// # Errors
    /// What the compiler says about `bytes`.
    pub(super) async fn compile(
        self: &Arc<Self>,
        digest: &Arc<str>,
        bytes: Bytes,
        needs: Needs,
    ) -> wasmtime::Result<Component> {
        let digest = Arc::clone(digest);
        self.blocking(move |engine| engine.compile_now(&digest, &bytes, needs)).await
    }

    /// The same compiled code for an instance that found the pool full.
    ///
    /// # Errors
    /// Those of the engine, which there are none of as long as both engines have the same settings.
    pub(super) async fn outside_the_pool(
        self: &Arc<Self>,
        component: &Component,
        fuel: bool,
    ) -> wasmtime::Result<Component> {
        let component = component.clone();
        self.blocking(move |engine| cache::copy(&component, &engine.single(engine.set(fuel))?)).await
    }

    /// Which of the pools the present thread takes its instances from: threads take them in turn.
    pub(super) fn place(&self) -> usize {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local!(static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed));
        THREAD.with(|thread| thread.checked_rem(self.unmetered.pooled.len())).unwrap_or_default()
    }

    /// How many pools besides the first are for this component.
    pub(super) fn more_places(&self, component: &Component) -> usize {
        let code = component.image_range();
        let is_small = code.end.addr().saturating_sub(code.start.addr()) <= LARGEST_COPY;
        let is_pooled = self.unmetered.pools(component) || self.metered.pools(component);
        if is_small && is_pooled { self.unmetered.pooled.len().saturating_sub(1) } else { 0 }
    }

    /// The same compiled code for instances of another pool.
    ///
    /// # Errors
    /// When the pool cannot be had, or has no room for the component.
    pub(super) async fn at(
        self: &Arc<Self>,
        place: usize,
        component: &Component,
        fuel: bool,
    ) -> wasmtime::Result<Component> {
        let component = component.clone();
        let missing = || wasmtime::Error::msg("there is no address space for it");
        let copied =
            move |engine: &Self| cache::copy(&component, engine.pooled(engine.set(fuel), place).ok_or_else(missing)?);
        self.blocking(copied).await
    }

    /// Runs `work` where blocking is no harm, with as much of it at once as the machine can bear.
    async fn blocking(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> wasmtime::Result<Component> + Send + 'static,
    ) -> wasmtime::Result<Component> {
        let permit = Arc::clone(&self.compiles).acquire_owned().await?;
        let engine = Arc::clone(self);
        let work = move || {
            let _permit = permit;
            work(&engine)
        };
        tokio::task::spawn_blocking(work).await?
    }

    fn compile_now(&self, digest: &Arc<str>, bytes: &[u8], needs: Needs) -> wasmtime::Result<Component> {
        let set = self.set(needs.fuel);
        if !needs.tasks {
            // What neither of the two takes, because it is too large for the pool or uses what they do not know, fails
            // there before any code is made, mostly.
            if let Some(Ok(component)) = self.pooled(set, 0).map(|engine| self.compile_for(engine, digest, bytes)) {
                return Ok(component);
            }
            if let Ok(component) = self.compile_for(&self.single(set)?, digest, bytes) {
                return Ok(component);
            }
        }
        self.compile_for(&self.concurrent(set)?, digest, bytes)
    }

    fn compile_for(&self, engine: &wasmtime::Engine, digest: &Arc<str>, bytes: &[u8]) -> wasmtime::Result<Component> {
        if let Some(known) = self.cache.as_ref().and_then(|cache| cache.get(engine, digest)) {
            return Ok(known);
        }
        let component = Component::from_binary(engine, bytes)?;
        if let Some(cache) = &self.cache {
            cache.put(engine, digest, &component);
        }
        Ok(component)
    }

    fn set(&self, fuel: bool) -> &Set {
        match fuel {
            true => &self.metered,
            false => &self.unmetered,
        }
    }

    fn pooled<'a>(&self, set: &'a Set, place: usize) -> Option<&'a wasmtime::Engine> {
        let make = || {
            let mut config = set.config.clone();
            config.allocation_strategy(InstanceAllocationStrategy::Pooling(self.pool.clone()));
            let pooled = wasmtime::Engine::new(&config).inspect_err(|error| {
                let (fuel, error) = (set.fuel, format!("{error:#}"));
                tracing::warn!(
                    fuel,
                    place,
                    error,
                    "no pool for instances: without the first, each is allocated by itself"
                );
            });
            pooled.inspect(|engine| self.keep_time_of(engine)).ok()
        };
        set.pooled.get(place)?.get_or_init(make).as_ref()
    }

    fn single(&self, set: &Set) -> wasmtime::Result<wasmtime::Engine> {
        self.lazily(&set.single, &set.config)
    }

    fn concurrent(&self, set: &Set) -> wasmtime::Result<wasmtime::Engine> {
        let mut config = set.config.clone();
        self.lazily(&set.concurrent, config.concurrency_support(true).wasm_component_model_async(true))
    }

    /// Two who come at once make one each, and one of them is kept.
    fn lazily(&self, kept: &OnceLock<wasmtime::Engine>, config: &Config) -> wasmtime::Result<wasmtime::Engine> {
        if let Some(engine) = kept.get() {
            return Ok(engine.clone());
        }
        let made = wasmtime::Engine::new(config)?;
        let engine = kept.get_or_init(|| {
            self.keep_time_of(&made);
            made
        });
        Ok(engine.clone())
    }

    fn keep_time_of(&self, engine: &wasmtime::Engine) {
        // The thread lives as long as its sender.
        let _ = self.ticker.send(engine.weak());
    }
}

fn unusable(reason: String) -> Error {
    Error::Incompatible { what: "the engine for plugins".to_owned(), reason: reason.into() }
}

fn config(fuel: bool) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .consume_fuel(fuel)
        .memory_init_cow(true)
        .concurrency_support(false)
        .max_wasm_stack(GUEST_STACK)
        .async_stack_size(STACK)
        // A limiter is not asked about shared memories.
        .wasm_threads(false)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable);
    config
}

fn pool(settings: &Settings) -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(settings.slots)
        .total_stacks(settings.slots)
        .total_core_instances(settings.parts)
        .total_memories(settings.parts)
        .total_tables(settings.parts)
        .table_elements(MAX_TABLE)
        .max_memory_size(settings.max_memory);
    if PoolingAllocationConfig::is_pagemap_scan_available() {
        // Without the scan, resetting resident memory costs more than mapping it anew.
        pool.pagemap_scan(Enabled::Yes)
            .linear_memory_keep_resident(RESIDENT_MEMORY)
            .table_keep_resident(RESIDENT_TABLE);
    }
    pool
}

/// Ticks from a thread of its own: a guest that computes can keep every thread of the runtime busy, timers included.
/// Now and then it lets idle instances go.
fn tick(slots: &Arc<Slots>) -> Result<Sender<EngineWeak>> {
    let (ticker, coming) = mpsc::channel::<EngineWeak>();
    let slots = Arc::downgrade(slots);
    let work = move || {
        let mut engines = Vec::new();
        let mut swept = Instant::now();
        loop {
            let is_busy = slots.upgrade().is_some_and(|slots| slots.are_taken());
            match coming.recv_timeout(if is_busy { TICK } else { LOOK }) {
                Ok(engine) => engines.push(engine),
                Err(RecvTimeoutError::Timeout) => {
                    engines.iter().filter_map(EngineWeak::upgrade).for_each(|engine| engine.increment_epoch());
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
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
    Ok(ticker)
}
