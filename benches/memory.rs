//! The broker over memory against a channel and a slab: what status, retries and matching cost when nothing is stored.
//!
//! `cargo bench -- memory`. One publisher, a payload of about 300 bytes, nothing durable on either side. Events are published
//! one by one, with up to 1,000 in flight, and workers have two threads; the publisher is the program's main thread, as in
//! `#[tokio::main]`, or one task more of the workers' threads, as where HTTP publishes. Where each is awaited, on a single thread,
//! an event is published once the one before is completed. By hand, an event has an id that its publisher
//! gets, a type, a status and three times, and is kept until 10,000 others are done; there is no matching, no retry, no
//! attempt record, no lease and no metric.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tidegate::{Event, Payload, Source, Subscription, native};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use crate::support::{self, Running};

const EVENTS: usize = 200_000;
const IN_FLIGHT: usize = 1_000;

/// Places among those in flight are taken and given back by as many, so that they are no part of what is measured.
const PLACES: usize = 50;
const SINGLES: usize = 50_000;

/// Runs take a fraction of a second, in which a machine is now fast and now slow: more of them than elsewhere.
const PAIRS: usize = 15;

pub(crate) fn run() {
    let runtime = two_threads();
    support::compare_over(
        PAIRS,
        "memory, native handler, published one by one by the main thread",
        "≥ 0.35",
        || runtime.block_on(ours(1)),
        || runtime.block_on(by_hand()),
    );
    support::compare_over(
        PAIRS,
        "memory, native handler, published one by one by a task",
        "none",
        || on(&runtime, ours(1)),
        || on(&runtime, by_hand()),
    );
    let single = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    support::compare_over(
        PAIRS,
        "memory, native handler, each awaited before the next",
        "none",
        || single.block_on(one_by_one()),
        || single.block_on(one_by_one_by_hand()),
    );
}

/// What a publish costs when many subscriptions do not match.
pub(crate) fn matching() {
    let runtime = two_threads();
    for subscriptions in [100, 10_000] {
        support::compare_over(
            PAIRS,
            &format!("the same with {subscriptions} subscriptions of which one matches, against 1"),
            "≥ 0.83",
            || on(&runtime, ours(subscriptions)),
            || on(&runtime, ours(1)),
        );
    }
}

fn two_threads() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The publisher runs on the same two threads as the workers, as one that answers HTTP does.
fn on(runtime: &Runtime, work: impl Future<Output = f64> + Send + 'static) -> f64 {
    runtime.block_on(runtime.spawn(work)).unwrap()
}

/// Each event is published once the one before is completed.
async fn one_by_one() -> f64 {
    let running = Running::over_memory().await;
    let broker = &running.broker;
    let subscription = Subscription::new("s", "shop.orders.*".parse().unwrap());
    broker.subscribe(subscription, native(|_| async { Ok(()) })).await.unwrap();
    let event_type: tidegate::EventType = "shop.orders.create".parse().unwrap();
    let payload = Payload::json_text(support::payload()).unwrap();
    let began = Instant::now();
    for _ in 0..SINGLES {
        let event = Event::new(Source::Internal, event_type.clone(), payload.clone());
        let answer = broker.publish_sync(event, Duration::from_secs(10)).await.unwrap();
        assert!(answer.finished);
    }
    let rate = support::per_second(SINGLES, began);
    running.stop().await;
    rate
}

/// A slab of jobs, a channel of keys with somebody who waits for each, a boxed async handler.
async fn one_by_one_by_hand() -> f64 {
    let slab = Arc::new(std::sync::Mutex::new(slab::Slab::<Job>::new()));
    let (send, mut receive) = mpsc::channel::<(usize, oneshot::Sender<()>)>(IN_FLIGHT);
    let jobs = Arc::clone(&slab);
    let handler = by_hand_handler();
    let worker = tokio::spawn(async move {
        let mut done = VecDeque::new();
        while let Some((key, waiting)) = receive.recv().await {
            handle_by_hand(&jobs, key, &handler, &mut done).await;
            waiting.send(()).unwrap();
        }
    });
    let payload = Bytes::from(support::payload());
    let began = Instant::now();
    for _ in 0..SINGLES {
        let key = slab.lock().unwrap().insert(Job::new(&payload));
        let (done, waiting) = oneshot::channel();
        send.send((key, done)).await.unwrap();
        waiting.await.unwrap();
    }
    drop(send);
    worker.await.unwrap();
    support::per_second(SINGLES, began)
}

/// Publishes with up to 1,000 events in flight, and waits until every event is completed.
async fn ours(subscriptions: usize) -> f64 {
    let running = Running::over_memory().await;
    let broker = &running.broker;
    let (handled, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let room = Arc::new(Semaphore::new(IN_FLIGHT - PLACES));
    for n in 0..subscriptions {
        let pattern = if n == 0 { "shop.orders.*".to_owned() } else { format!("shop.table{n}.*") };
        let subscription = Subscription::new(&format!("s{n}"), pattern.parse().unwrap());
        let (handled, all, room) = (Arc::clone(&handled), Arc::clone(&all), Arc::clone(&room));
        let handler = native(move |_| {
            let count = handled.fetch_add(1, Ordering::Relaxed) + 1;
            if count.is_multiple_of(PLACES) {
                room.add_permits(PLACES);
            }
            if count == EVENTS {
                all.notify_one();
            }
            async { Ok(()) }
        });
        broker.subscribe(subscription, handler).await.unwrap();
    }
    let event_type: tidegate::EventType = "shop.orders.create".parse().unwrap();
    let payload = Payload::json_text(support::payload()).unwrap();
    let publish = || broker.publish(Event::new(Source::Internal, event_type.clone(), payload.clone()));
    publish().await.unwrap();
    let began = Instant::now();
    for n in 1..EVENTS {
        if n.is_multiple_of(PLACES) {
            room.acquire_many(PLACES as u32).await.unwrap().forget();
        }
        publish().await.unwrap();
    }
    all.notified().await;
    running.completed(EVENTS).await;
    let rate = support::per_second(EVENTS, began);
    assert_eq!(handled.load(Ordering::Relaxed), EVENTS);
    running.stop().await;
    rate
}

struct Job {
    id: uuid::Uuid,
    event_type: &'static str,
    payload: Bytes,
    created: SystemTime,
    started: Option<SystemTime>,
    completed: Option<SystemTime>,
}

impl Job {
    fn new(payload: &Bytes) -> Self {
        let (id, created) = (uuid::Uuid::now_v7(), SystemTime::now());
        let payload = payload.clone();
        Self { id, event_type: "shop.orders.create", payload, created, started: None, completed: None }
    }
}

type Jobs = std::sync::Mutex<slab::Slab<Job>>;
type Handler = Box<dyn Fn(Bytes) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

fn by_hand_handler() -> Handler {
    Box::new(|payload| {
        Box::pin(async move {
            std::hint::black_box(payload);
        })
    })
}

/// Calls the handler, keeps the times, and forgets the oldest job once 10,000 others are done.
async fn handle_by_hand(jobs: &Jobs, key: usize, handler: &Handler, done: &mut VecDeque<usize>) {
    let payload = {
        let mut jobs = jobs.lock().unwrap();
        let job = &mut jobs[key];
        job.started = Some(SystemTime::now());
        job.payload.clone()
    };
    handler(payload).await;
    let mut jobs = jobs.lock().unwrap();
    jobs[key].completed = Some(SystemTime::now());
    done.push_back(key);
    if done.len() > 10_000 {
        let old = jobs.remove(done.pop_front().unwrap());
        std::hint::black_box((old.id, old.event_type, old.created, old.started));
    }
}

/// The least that could be called the same: a slab of jobs, a channel of keys, a boxed async handler.
async fn by_hand() -> f64 {
    let slab = Arc::new(std::sync::Mutex::new(slab::Slab::<Job>::new()));
    let (send, mut receive) = mpsc::channel::<usize>(IN_FLIGHT);
    let jobs = Arc::clone(&slab);
    let handler = by_hand_handler();
    let worker = tokio::spawn(async move {
        let mut done = VecDeque::new();
        while let Some(key) = receive.recv().await {
            handle_by_hand(&jobs, key, &handler, &mut done).await;
        }
    });
    let payload = Bytes::from(support::payload());
    let began = Instant::now();
    for _ in 0..EVENTS {
        let key = slab.lock().unwrap().insert(Job::new(&payload));
        send.send(key).await.unwrap();
    }
    drop(send);
    worker.await.unwrap();
    let rate = support::per_second(EVENTS, began);
    assert!(slab.lock().unwrap().iter().all(|(_, job)| job.completed.is_some()));
    rate
}
