//! The broker over memory against a channel and a slab: what status, retries and matching cost when nothing is stored.
//!
//! `cargo bench -- memory`. Both sides run on a runtime of two threads, with one publisher and a payload of about
//! 300 bytes. Nothing is durable on either side.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use tidegate::broker::Options;
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::{Broker, Event, Metrics, Payload, Source, Subscription, native};
use tokio::sync::{Notify, mpsc};

use crate::support;

const EVENTS: usize = 200_000;

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    support::compare(
        "memory, native handler, publish → completed, one by one",
        "≥ 0.35",
        || runtime.block_on(ours(1)),
        || runtime.block_on(by_hand()),
    );
    for subscriptions in [100, 10_000] {
        support::compare(
            &format!("the same with {subscriptions} subscriptions of which one matches, against 1"),
            "≥ 0.83",
            || runtime.block_on(ours(subscriptions)),
            || runtime.block_on(ours(1)),
        );
    }
}

/// Publishes one by one and waits until every event is completed.
async fn ours(subscriptions: usize) -> f64 {
    let memory = memory::Options { max_events: EVENTS as u64 * 2, ..memory::Options::default() };
    let provider = Arc::new(MemoryProvider::open(memory).unwrap());
    let worker_count = NonZeroUsize::new(10).unwrap();
    let options = Options { instance_id: "bench".into(), worker_count, ..Options::default() };
    let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
    let stop = Arc::new(Notify::new());
    let stopped = Arc::clone(&stop);
    let service = tokio::spawn(service.run(async move { stopped.notified().await }));
    let (handled, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    for n in 0..subscriptions {
        let pattern = if n == 0 { "shop.orders.*".to_owned() } else { format!("shop.table{n}.*") };
        let subscription = Subscription::new(&format!("s{n}"), pattern.parse().unwrap());
        let (handled, all) = (Arc::clone(&handled), Arc::clone(&all));
        let handler = native(move |_| {
            if handled.fetch_add(1, Ordering::Relaxed) + 1 == EVENTS {
                all.notify_one();
            }
            async { Ok(()) }
        });
        broker.subscribe(subscription, handler).await.unwrap();
    }
    let event_type: tidegate::EventType = "shop.orders.create".parse().unwrap();
    let payload = Payload::json_text(support::payload()).unwrap();
    broker.publish(Event::new(Source::Internal, event_type.clone(), payload.clone())).await.unwrap();
    let began = Instant::now();
    for _ in 1..EVENTS {
        broker.publish(Event::new(Source::Internal, event_type.clone(), payload.clone())).await.unwrap();
    }
    all.notified().await;
    while broker.stats().await.unwrap().total_processed < EVENTS as u64 {
        tokio::task::yield_now().await;
    }
    let rate = support::per_second(EVENTS, began);
    assert_eq!(handled.load(Ordering::Relaxed), EVENTS);
    stop.notify_one();
    service.await.unwrap().unwrap();
    rate
}

/// The least that could be called the same: a slab of jobs, a channel of keys, a boxed async handler.
async fn by_hand() -> f64 {
    struct Job {
        payload: Bytes,
        done: bool,
    }
    type Handler = Box<dyn Fn(Bytes) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send>;
    let slab = Arc::new(std::sync::Mutex::new(slab::Slab::new()));
    let (send, mut receive) = mpsc::channel::<usize>(1_000);
    let jobs = Arc::clone(&slab);
    let handler: Handler = Box::new(|payload| {
        Box::pin(async move {
            std::hint::black_box(payload);
        })
    });
    let worker = tokio::spawn(async move {
        let mut done = VecDeque::new();
        while let Some(key) = receive.recv().await {
            let payload: Bytes = jobs.lock().unwrap().get(key).map(|job: &Job| job.payload.clone()).unwrap();
            handler(payload).await;
            let mut jobs = jobs.lock().unwrap();
            jobs[key].done = true;
            done.push_back(key);
            if done.len() > 10_000 {
                let old = done.pop_front().unwrap();
                jobs.remove(old);
            }
        }
    });
    let payload = Bytes::from(support::payload());
    let began = Instant::now();
    for _ in 0..EVENTS {
        let key = slab.lock().unwrap().insert(Job { payload: payload.clone(), done: false });
        send.send(key).await.unwrap();
    }
    drop(send);
    worker.await.unwrap();
    let rate = support::per_second(EVENTS, began);
    assert!(slab.lock().unwrap().iter().all(|(_, job)| job.done));
    rate
}
