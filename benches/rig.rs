//! A broker over a store, and the work that it is measured by: batches, a drain, single callers, and pick-up.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tidegate::broker::{Options, SubscriptionPatch};
use tidegate::provider::Provider;
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{Broker, Event, EventType, Handler, Metrics, Payload, Source, Subscription, native};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::support;

/// A broker over a store.
pub(crate) struct Rig {
    pub(crate) broker: Broker,
    metrics: Metrics,
    stop: Arc<Notify>,
    service: Option<tidegate::broker::Service>,
    /// What goes with the rig.
    folder: Option<tempfile::TempDir>,
}

impl Rig {
    /// On a fresh SQLite file.
    pub(crate) async fn on_sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("bench.db").display());
        let provider = SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await.unwrap();
        Self { folder: Some(folder), ..Self::over(Arc::new(provider)).await }
    }

    pub(crate) async fn over(provider: Arc<dyn Provider>) -> Self {
        let options = Options {
            instance_id: "bench".into(),
            buffer_size: NonZeroUsize::new(4_000).unwrap(),
            ..Options::default()
        };
        let metrics = Metrics::default();
        let (broker, service) = Broker::open(provider, options, metrics.clone()).await.unwrap();
        Self { broker, metrics, stop: Arc::default(), service: Some(service), folder: None }
    }

    pub(crate) fn run(&mut self) -> tokio::task::JoinHandle<tidegate::Result<()>> {
        let stop = Arc::clone(&self.stop);
        tokio::spawn(self.service.take().unwrap().run(async move { stop.notified().await }))
    }

    /// Subscribes a handler; the notification comes after the `all`-th call.
    pub(crate) async fn subscribe(&self, all: usize, handler: Arc<dyn Handler>) -> Arc<Notify> {
        let (handled, done) = (AtomicUsize::new(0), Arc::new(Notify::new()));
        let notify = Arc::clone(&done);
        let handler = support::watched(handler, move |_| {
            if handled.fetch_add(1, Ordering::Relaxed) + 1 == all {
                notify.notify_one();
            }
        });
        self.broker.subscribe(Subscription::new("all", "shop.orders.*".parse().unwrap()), handler).await.unwrap();
        done
    }

    /// Waits until so many attempts are settled.
    pub(crate) async fn completed(&self, count: usize) {
        while self.settled_of(["all"]) < [count] {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// How many attempts of each succeeded and are settled. The metrics tell without asking the store, which is busy.
    pub(crate) fn settled_of<const N: usize>(&self, subscriptions: [&str; N]) -> [usize; N] {
        let text = self.metrics.encode();
        subscriptions.map(|subscription| {
            let label = format!("tidegate_attempts_total{{subscription=\"{subscription}\",verdict=\"ok\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&label)).map_or(0, |count| count.parse().unwrap())
        })
    }
}

impl Rig {
    /// Publishes `count` events in batches while the handler runs, until all is settled.
    pub(crate) async fn batches(mut self, count: usize, batch: usize, handler: Arc<dyn Handler>) -> f64 {
        let done = self.subscribe(count, handler).await;
        let running = self.run();
        let began = Instant::now();
        self.publish(count, batch).await;
        done.notified().await;
        self.completed(count).await;
        let rate = support::per_second(count, began);
        self.end(running).await;
        rate
    }

    /// Handles what was stored before.
    pub(crate) async fn drain(mut self, count: usize, batch: usize) -> f64 {
        let done = self.subscribe(count, idle()).await;
        // Paused while the events are stored, so that what is timed is their handling alone.
        let pause = |paused| SubscriptionPatch { paused: Some(paused), ..Default::default() };
        self.broker.patch_subscription("all", pause(true)).await.unwrap();
        let running = self.run();
        self.publish(count, batch).await;
        let began = Instant::now();
        self.broker.patch_subscription("all", pause(false)).await.unwrap();
        done.notified().await;
        self.completed(count).await;
        let rate = support::per_second(count, began);
        self.end(running).await;
        rate
    }

    /// So many callers, each publishing one event after the other, each acknowledged durable.
    pub(crate) async fn singles(mut self, count: usize, callers: usize) -> f64 {
        let running = self.run();
        let began = Instant::now();
        let call = |_| {
            let broker = self.broker.clone();
            tokio::spawn(async move {
                for _ in 0..count / callers {
                    broker.publish(event()).await.unwrap();
                }
            })
        };
        let calling: Vec<_> = (0..callers).map(call).collect();
        for caller in calling {
            caller.await.unwrap();
        }
        let rate = support::per_second(count, began);
        self.end(running).await;
        rate
    }

    /// Times from publish to the start of the handler, at 50 a second.
    pub(crate) async fn pick_up(mut self, count: usize) -> Vec<Duration> {
        let (send, mut receive) = mpsc::unbounded_channel();
        let handler = native(move |call: tidegate::Call| {
            let sent: u128 = call.event.payload.parse().unwrap_or_default();
            send.send((sent, Instant::now())).ok();
            async { Ok(()) }
        });
        self.broker.subscribe(Subscription::new("all", "*".parse().unwrap()), handler).await.unwrap();
        let running = self.run();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let base = Instant::now();
        let mut times = Vec::new();
        for _ in 0..count {
            ticks.tick().await;
            let payload = Payload::json(&base.elapsed().as_nanos()).unwrap();
            self.broker.publish(Event::new(Source::Internal, "a.b".parse().unwrap(), payload)).await.unwrap();
            let (sent, at) = receive.recv().await.unwrap();
            times.push(at.duration_since(base).saturating_sub(Duration::from_nanos(sent as u64)));
        }
        self.end(running).await;
        times
    }

    pub(crate) async fn publish(&self, count: usize, batch: usize) {
        for _ in 0..count / batch {
            self.broker.publish_batch((0..batch).map(|_| event()).collect()).await.unwrap();
        }
    }

    pub(crate) async fn end(self, running: JoinHandle<tidegate::Result<()>>) {
        self.stop.notify_one();
        running.await.unwrap().unwrap();
        drop(self.folder);
    }
}

/// Prints p50 and p99 of two sides, each measured several times in turn; a goal for each.
pub(crate) fn compare_latency(
    what: &str,
    goals: [&str; 2],
    ours: impl Fn() -> Vec<Duration>,
    other: impl Fn() -> Vec<Duration>,
) {
    let rows: Vec<_> = (0..support::PAIRS).map(|_| (ours(), other())).collect();
    for (share, goal) in [0.5, 0.99].into_iter().zip(goals) {
        let of = |times: &Vec<Duration>| support::quantile(times.clone(), share).as_secs_f64() * 1e3;
        let (ours, other): (Vec<f64>, Vec<f64>) = rows.iter().map(|(a, b)| (of(a), of(b))).unzip();
        let ratio = support::median(ours.iter().zip(&other).map(|(a, b)| a / b).collect());
        let what = format!("{what}, pick-up latency at 50/s, p{}", share * 100.0);
        let (ours, other) = (support::median(ours), support::median(other));
        println!("{what:<72} ours {ours:>8.2} ms    other {other:>8.2} ms    ratio {ratio:>6.2}  goal {goal}");
    }
}

pub(crate) fn event() -> Event {
    let event_type: EventType = "shop.orders.create".parse().unwrap();
    Event::new(Source::Internal, event_type, Payload::json_text(support::payload()).unwrap())
}

/// A handler that does nothing.
pub(crate) fn idle() -> Arc<dyn Handler> {
    native(|_| async { Ok(()) })
}
