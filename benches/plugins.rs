//! What a call of a plugin costs: a handler that does nothing, against extism and against wasmtime by hand.
//!
//! `cargo bench -- plugins`. One thread, a payload of about 300 bytes, nothing durable. Ours has the default limits on:
//! epoch, memory, calls of the host and time; against extism a budget of fuel too. extism 1.30 runs as a process of its own
//! (its wasmtime is another version), with a guest that does nothing either; fresh is a `Plugin` of one `CompiledPlugin`
//! per call, warm one `Plugin` for all. By hand is wasmtime with the same pool and epoch, without any other limit.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::handler::KvRead;
use tidegate::host::component::{self, componentise, embed_manifest};
use tidegate::host::{Host, Options, PluginOptions};
use tidegate::{Call, Event, Handler, Payload, Source, Verdict};
use wasmtime::component::{Component, ComponentType, InstancePre, Lift, Linker, Lower, TypedFunc};
use wasmtime::{Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, Store, UpdateDeadline};

use crate::peer;
use crate::support::{compare, payload, per_second};

const CALLS: usize = 20_000;
const BATCH: usize = 64;
const BATCHES: usize = 3_000;
const FUEL: u64 = 500_000_000;
const METERED: &str = "[limits]\nfuel = 500000000\n";
const HANDLER: &str = "tidegate:plugin/handler@1.0.0";
/// How a guest takes batches: with the events in a list, or packed, as those of the SDK do.
const LISTED: &str = "batch-handler";
const PACKED: &str = "packed-batch-handler";
const REUSED: &str = "reuse = 1000000000\n";

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let raw = Raw::new();
    let fresh = Ours::idle(&runtime, "");
    let listing = Ours::new(&runtime, idle(LISTED, ""));
    let reused = Ours::idle(&runtime, REUSED);
    let event = Arc::new(event());
    if let Some(extism) = peer::cargo("extism") {
        let fresh = Ours::idle(&runtime, METERED);
        let reused = Ours::idle(&runtime, &format!("{REUSED}{METERED}"));
        compare(
            "no-op handler, fresh instance per event, against extism's fresh plugin",
            "≥ 12",
            || runtime.block_on(fresh.handle(&event)),
            || extism.measure(&["fresh", "3000"]),
        );
        compare(
            "no-op handler, instance reused, against extism's warm plugin",
            "≥ 2.5",
            || runtime.block_on(reused.handle(&event)),
            || extism.measure(&["warm", "100000"]),
        );
    }
    compare(
        "no-op handler, batch of 64 per fresh instance, against one per instance",
        "≥ 8",
        || runtime.block_on(fresh.batches(&event)),
        || runtime.block_on(fresh.handle(&event)),
    );
    compare(
        "the same with the events in a list, each string by itself",
        "none",
        || runtime.block_on(listing.batches(&event)),
        || runtime.block_on(listing.handle(&event)),
    );
    if let Some(bytes) = built("faults") {
        let manifest = component::manifest(&bytes).unwrap().1.replace("max = 1", "max = 64");
        let built = Ours::new(&runtime, embed_manifest(&bytes, &manifest).unwrap());
        let payload = Payload::json_text(r#"{"fault":"none"}"#.to_owned()).unwrap();
        let event = Arc::new(Event { payload, ..self::event() });
        compare(
            "a guest of the SDK that parses 16 B, batch of 64 per fresh instance, against one per instance",
            "none",
            || runtime.block_on(built.batches(&event)),
            || runtime.block_on(built.handle(&event)),
        );
    }
    compare(
        "no-op handler, batch of 64 in a list, against wasmtime by hand",
        "none",
        || runtime.block_on(listing.batches(&event)),
        || runtime.block_on(raw.batches(&event)),
    );
    compare(
        "no-op handler, fresh instance per event, against wasmtime by hand",
        "> 0.8",
        || runtime.block_on(fresh.handle(&event)),
        || runtime.block_on(raw.fresh(&event)),
    );
    compare(
        "no-op handler, instance reused, against wasmtime by hand",
        "1 µs",
        || runtime.block_on(reused.handle(&event)),
        || runtime.block_on(raw.reused(&event)),
    );
    what_fuel_costs(&runtime);
}

/// What fuel costs on top of the epoch where a guest computes: it parses JSON of some 4 KiB.
fn what_fuel_costs(runtime: &tokio::runtime::Runtime) {
    let Some(guest) = built("faults") else { return };
    let (metered, unmetered) = (Raw::of(&guest, true), Raw::of(&guest, false));
    let steps = vec![serde_json::json!({ "fault": "none" }); 240];
    let large = Payload::json(&serde_json::json!({ "fault": "steps", "steps": steps })).unwrap();
    let event = Event { payload: large, ..event() };
    println!("a payload of {} bytes, parsed by the guest", event.payload.bytes().len());
    compare(
        "parsing guest, instance reused, by hand: with fuel and epoch, against epoch alone",
        "≥ 0.9",
        || runtime.block_on(metered.reused(&event)),
        || runtime.block_on(unmetered.reused(&event)),
    );
    compare(
        "parsing guest, fresh instances, by hand: with fuel and epoch, against epoch alone",
        "≥ 0.9",
        || runtime.block_on(metered.fresh(&event)),
        || runtime.block_on(unmetered.fresh(&event)),
    );
}

pub(crate) fn event() -> Event {
    let payload = Payload::json_text(payload()).unwrap();
    let mut event = Event::new(Source::System, "shop.orders.create".parse().unwrap(), payload);
    event.seq = Some(7);
    event
}

/// A guest that succeeds with every event, alone or in a batch. It looks at none of them, so that all may lie in one place.
fn guest(form: &str) -> Vec<u8> {
    let parameters = if form == LISTED { "" } else { "i32 i32 i32 i32" };
    let module = format!(
        r#"(module
        (memory (export "memory") 2)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 1024)
        (func (export "tidegate:plugin/handler@1.0.0#handle")
            (param i32 i32 i64 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32) (result i32) i32.const 512)
        (func (export "tidegate:plugin/{form}@1.0.0#handle-batch") (param i32 i32 {parameters}) (result i32)
            (i32.store (i32.const 256) (i32.const 65536))
            (i32.store (i32.const 260) (local.get 1))
            i32.const 256))"#
    );
    let world = format!(
        "package tests:bench; world both {{
        export tidegate:plugin/handler@1.0.0; export tidegate:plugin/{form}@1.0.0; }}"
    );
    let mut resolve = wit_parser::Resolve::default();
    resolve.push_source("plugin.wit", include_str!("../wit/plugin.wit")).unwrap();
    let package = resolve.push_source("bench.wit", &world).unwrap();
    let world = resolve.select_world(&[package], Some("both")).unwrap();
    let mut module = wat::parse_str(&module).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8).unwrap();
    componentise(&module).unwrap()
}

/// The same with a manifest that has these lines more.
fn idle(form: &str, manifest: &str) -> Vec<u8> {
    embed_manifest(&guest(form), &format!("name = \"bench\"\nversion = \"1.0.0\"\n{manifest}")).unwrap()
}

/// A component of `make plugins`; `None`, with the reason printed, when it is not built.
fn built(name: &str) -> Option<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/plugins").join(name).with_extension("wasm");
    let bytes = std::fs::read(&file);
    if bytes.is_err() {
        println!("{} is not built: run `make plugins` first; rows with it are left out", file.display());
    }
    bytes.ok()
}

/// A plugin in our host.
pub(crate) struct Ours {
    pub(crate) plugin: Arc<dyn Handler>,
    _host: Host,
}

impl Ours {
    /// The guest that does nothing, with these lines more in its manifest.
    pub(crate) fn idle(runtime: &tokio::runtime::Runtime, manifest: &str) -> Self {
        Self::new(runtime, self::idle(PACKED, manifest))
    }

    /// A plugin of `make plugins`; `None`, with the reason printed, when it is not
    /// built.
    pub(crate) fn built(runtime: &tokio::runtime::Runtime, name: &str) -> Option<Self> {
        built(name).map(|bytes| Self::new(runtime, bytes))
    }

    /// With all that its manifest requests.
    fn new(runtime: &tokio::runtime::Runtime, bytes: Vec<u8>) -> Self {
        let (manifest, _) = component::manifest(&bytes).unwrap();
        let granted = PluginOptions { grants: manifest.capabilities, ..PluginOptions::default() };
        let plugins = BTreeMap::from([(manifest.name.clone(), granted)]);
        let host = Host::new(Options { plugins, ..Options::default() }, None).unwrap();
        let plugin = runtime.block_on(host.load("bench.wasm", bytes.into())).unwrap();
        host.activate(plugin);
        Self { plugin: host.handler(&manifest.name), _host: host }
    }

    /// Calls per second, one after the other.
    pub(crate) async fn handle(&self, event: &Arc<Event>) -> f64 {
        let call = call(event);
        let began = Instant::now();
        for _ in 0..CALLS {
            assert_eq!(self.plugin.handle(call.clone()).await.verdict, Verdict::Ok);
        }
        per_second(CALLS, began)
    }

    async fn batches(&self, event: &Arc<Event>) -> f64 {
        let calls = vec![call(event); BATCH];
        let began = Instant::now();
        for _ in 0..BATCHES {
            assert_eq!(self.plugin.handle_batch(calls.clone()).await.unwrap().len(), BATCH);
        }
        per_second(BATCHES * BATCH, began)
    }
}

fn call(event: &Arc<Event>) -> Call {
    Call {
        event: Arc::clone(event),
        subscription: "bench".into(),
        attempt: 1,
        max_attempts: 4,
        timeout: Duration::from_secs(30),
        is_replay: false,
        kv: Arc::new(Nothing),
    }
}

struct Nothing;

#[async_trait::async_trait]
impl KvRead for Nothing {
    async fn get(&self, _: &str, _: &str) -> tidegate::Result<Option<bytes::Bytes>> {
        Ok(None)
    }
}

#[derive(ComponentType, Lower)]
#[component(record)]
struct RawEvent<'a> {
    id: &'a str,
    sequence: u64,
    #[component(name = "type")]
    event_type: &'a str,
    source: &'a str,
    #[component(name = "created-at-ms")]
    created_at_ms: u64,
    #[component(name = "content-type")]
    content_type: &'a str,
    payload: &'a [u8],
    attributes: &'a [(&'a str, &'a str)],
}

#[derive(ComponentType, Lift)]
#[component(record)]
#[expect(dead_code, reason = "only its shape matters")]
struct RawReply {
    #[component(name = "content-type")]
    content_type: String,
    body: Vec<u8>,
}

#[derive(ComponentType, Lift)]
#[component(record)]
#[expect(dead_code, reason = "only its shape matters")]
struct RawFault {
    code: String,
    message: String,
    details: Vec<(String, String)>,
}

#[derive(ComponentType, Lift)]
#[component(record)]
#[expect(dead_code, reason = "only its shape matters")]
struct RawRetry {
    fault: RawFault,
    #[component(name = "after-ms")]
    after_ms: Option<u32>,
}

#[derive(ComponentType, Lift)]
#[component(variant)]
#[expect(dead_code, reason = "only its shape matters")]
enum RawFailure {
    #[component(name = "retry")]
    Retry(RawRetry),
    #[component(name = "reject")]
    Reject(RawFault),
}

type Answer = Result<Option<RawReply>, RawFailure>;
type Handle<'a> = TypedFunc<(RawEvent<'a>,), (Answer,)>;
type HandleBatch<'a> = TypedFunc<(&'a [RawEvent<'a>],), (Vec<Answer>,)>;

/// wasmtime with the host's settings, and nothing else.
pub(crate) struct Raw {
    engine: wasmtime::Engine,
    pre: InstancePre<()>,
    metered: bool,
}

impl Raw {
    pub(crate) fn new() -> Self {
        Self::of(&guest(LISTED), false)
    }

    /// A component none of whose imports are called; with fuel or without.
    fn of(component: &[u8], metered: bool) -> Self {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(256).total_stacks(256).max_memory_size(64 << 20);
        if PoolingAllocationConfig::is_pagemap_scan_available() {
            pool.pagemap_scan(Enabled::Yes).linear_memory_keep_resident(128 << 10).table_keep_resident(64 << 10);
        }
        let mut config = Config::new();
        config.epoch_interruption(true).consume_fuel(metered).concurrency_support(false);
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        let engine = wasmtime::Engine::new(&config).unwrap();
        let component = Component::from_binary(&engine, component).unwrap();
        let mut linker = Linker::new(&engine);
        linker.define_unknown_imports_as_traps(&component).unwrap();
        let pre = linker.instantiate_pre(&component).unwrap();
        Self { engine, pre, metered }
    }

    /// An instance, and this function of one of its exported interfaces.
    async fn instance(&self, interface: &str, function: &str) -> (Store<()>, wasmtime::component::Func) {
        let mut store = Store::new(&self.engine, ());
        self.fuel(&mut store);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|_| Ok(UpdateDeadline::Yield(1)));
        let instance = self.pre.instantiate_async(&mut store).await.unwrap();
        let interface = instance.get_export_index(&mut store, None, interface).unwrap();
        let function = instance.get_export_index(&mut store, Some(&interface), function).unwrap();
        let function = instance.get_func(&mut store, function).unwrap();
        (store, function)
    }

    fn fuel(&self, store: &mut Store<()>) {
        if self.metered {
            store.set_fuel(FUEL).unwrap();
        }
    }

    /// Calls per second, one after the other, each of an instance of its own.
    pub(crate) async fn fresh(&self, event: &Event) -> f64 {
        let began = Instant::now();
        for _ in 0..CALLS {
            let (mut store, function) = self.instance(HANDLER, "handle").await;
            let handle = function.typed(&store).unwrap();
            assert!(called(&mut store, &handle, event).await);
        }
        per_second(CALLS, began)
    }

    async fn batches(&self, event: &Event) -> f64 {
        let events: Vec<&Event> = vec![event; BATCH];
        let began = Instant::now();
        for _ in 0..BATCHES {
            let (mut store, function) = self.instance("tidegate:plugin/batch-handler@1.0.0", "handle-batch").await;
            let handle: HandleBatch<'_> = function.typed(&store).unwrap();
            let events: Vec<RawEvent<'_>> = events.iter().map(|event| lowered(event)).collect();
            assert_eq!(handle.call_async(&mut store, (&events,)).await.unwrap().0.len(), BATCH);
        }
        per_second(BATCHES * BATCH, began)
    }

    async fn reused(&self, event: &Event) -> f64 {
        let (mut store, function) = self.instance(HANDLER, "handle").await;
        let handle = function.typed(&store).unwrap();
        let began = Instant::now();
        for _ in 0..CALLS {
            self.fuel(&mut store);
            assert!(called(&mut store, &handle, event).await);
        }
        per_second(CALLS, began)
    }
}

/// The three attributes that an event of this type has.
const ATTRIBUTES: &[(&str, &str)] = &[("schema", "shop"), ("entity", "orders"), ("operation", "create")];

fn lowered(event: &Event) -> RawEvent<'_> {
    RawEvent {
        id: event.id.as_str(),
        sequence: event.seq.unwrap_or_default(),
        event_type: event.event_type.as_str(),
        source: event.source.as_str(),
        created_at_ms: 0,
        content_type: event.payload.content_type(),
        payload: event.payload.bytes(),
        attributes: ATTRIBUTES,
    }
}

async fn called<'a>(store: &mut Store<()>, handle: &Handle<'a>, event: &'a Event) -> bool {
    handle.call_async(store, (lowered(event),)).await.unwrap().0.is_ok()
}
