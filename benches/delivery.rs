//! Plugins behind the broker: what is left of the speed of a call once events are published, claimed and settled.
//!
//! `cargo bench -- plugins-delivery`. A payload of about 300 bytes, a fresh instance per event, the default limits
//! on, two worker threads of tokio. Over memory nothing is durable, and up to 1,000 events are in flight; raw calls are made
//! by two threads at once on one engine, with nothing between the calls. The host has an engine for each thread, and what that
//! is worth by hand has a row of its own. Over SQLite everything is durable (WAL, `synchronous=FULL`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tidegate::{Event, Handler, Subscription};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use crate::plugins::{self, Ours, Raw};
use crate::support::Running;
use crate::{rig, sqlite, support};

const EVENTS: usize = 100_000;
const IN_FLIGHT: usize = 1_000;

/// Places among those in flight are taken and given back by as many.
const PLACES: usize = 50;

pub(crate) fn run() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let event = Arc::new(plugins::event());
    let raws = [Raw::new(), Raw::new()];
    let idle = Ours::idle(&runtime, "");
    support::compare(
        "memory, no-op plugin, publish → completed, against wasmtime by hand × 2",
        "≥ 0.6",
        || delivered(&runtime, &idle),
        || on_two_threads(|runtime, _| runtime.block_on(raws[0].fresh(&event))),
    );
    support::compare(
        "wasmtime by hand × 2, an engine for each thread, against one for both",
        "none",
        || on_two_threads(|runtime, thread| runtime.block_on(raws[thread].fresh(&event))),
        || on_two_threads(|runtime, _| runtime.block_on(raws[0].fresh(&event))),
    );
    if let Some(sample) = Ours::built(&runtime, "audit-trail") {
        support::compare(
            "memory, audit-trail, publish → completed, against handler calls × 2",
            "none",
            || delivered(&runtime, &sample),
            || on_two_threads(|runtime, _| runtime.block_on(sample.handle(&event))),
        );
    }
    support::compare(
        "SQLite FULL, no-op plugin, published in batches, against native handler",
        "≥ 0.7",
        || runtime.block_on(sqlite::batches(Arc::clone(&idle.plugin))),
        || runtime.block_on(sqlite::batches(rig::idle())),
    );
}

/// What two threads do together, each with a runtime of its own.
fn on_two_threads(work: impl Fn(&Runtime, usize) -> f64 + Sync) -> f64 {
    let one = |thread| work(&Builder::new_current_thread().enable_all().build().unwrap(), thread);
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|thread| scope.spawn(move || one(thread)));
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

/// The publisher runs on the same two threads as the workers.
fn delivered(runtime: &Runtime, plugin: &Ours) -> f64 {
    runtime.block_on(runtime.spawn(deliver(Arc::clone(&plugin.plugin)))).unwrap()
}

/// Publishes one by one with up to 1,000 events in flight, and waits until every event is completed.
async fn deliver(handler: Arc<dyn Handler>) -> f64 {
    let running = Running::over_memory().await;
    let broker = &running.broker;
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let (places, handled) = (Arc::clone(&room), AtomicUsize::new(0));
    let handler = support::watched(handler, move |_| {
        if (handled.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(PLACES) {
            places.add_permits(PLACES);
        }
    });
    broker.subscribe(Subscription::new("bench", "shop.orders.*".parse().unwrap()), handler).await.unwrap();
    let template = plugins::event();
    let began = Instant::now();
    for n in 0..EVENTS {
        if n.is_multiple_of(PLACES) {
            room.acquire_many(PLACES as u32).await.unwrap().forget();
        }
        let event = Event::new(template.source, template.event_type.clone(), template.payload.clone());
        broker.publish(event).await.unwrap();
    }
    running.completed(EVENTS).await;
    let rate = support::per_second(EVENTS, began);
    running.stop().await;
    rate
}
