//! The broker over SQLite: what stands in the file when a broker stops, and what the next one makes of it.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidegate::broker::Options;
use tidegate::provider::Provider;
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{
    Broker, Call, Event, Failure, Handler, Metrics, Payload, RetryPolicy, Source, Status, Subscription, native,
};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

/// Longer than any test may run: what waits for it is waiting still.
const LONG: Duration = Duration::from_secs(3_600);

/// Far more than a stop or an event takes, far less than [`LONG`].
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    broker: Broker,
    provider: Arc<SqliteProvider>,
    stop: oneshot::Sender<()>,
    service: JoinHandle<tidegate::Result<()>>,
}

impl Rig {
    async fn open(folder: &Path, options: Options) -> Self {
        let url = format!("sqlite://{}", folder.join("tidegate.db").display());
        let provider = SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await.unwrap();
        let provider = Arc::new(provider);
        let shared = Arc::clone(&provider) as Arc<dyn Provider>;
        let (broker, service) = Broker::open(shared, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { broker, provider, stop, service }
    }

    async fn on(&self, pattern: &str, handler: Arc<dyn Handler>) {
        self.broker.subscribe(Subscription::new("all", pattern.parse().unwrap()), handler).await.unwrap();
    }

    async fn close(self) {
        drop(self.stop);
        let stopped = tokio::time::timeout(PATIENCE, self.service).await;
        stopped.expect("a stop waits for no back-off").unwrap().unwrap();
        self.provider.close().await.unwrap();
    }
}

fn options() -> Options {
    Options { instance_id: "test".into(), ..Options::default() }
}

fn event(id: &str) -> Event {
    Event { id: id.parse().unwrap(), ..Event::new(Source::Internal, "a.b".parse().unwrap(), Payload::default()) }
}

/// "Stop waited 7 s for a back-off": here it waits for none, and the retry is still due after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_a_back_off_leaves_the_retry_due_for_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let retry = RetryPolicy { initial_delay: LONG, max_delay: LONG, ..RetryPolicy::default() };
    let rig = Rig::open(folder.path(), Options { retry, ..options() }).await;
    rig.on("*", native(|_: Call| async { Err::<(), _>(Failure::retry("busy", "not yet")) })).await;
    rig.broker.publish(event("e-1")).await.unwrap();
    let waiting = retried(&rig.broker, "e-1").await;
    rig.close().await;

    let rig = Rig::open(folder.path(), options()).await;
    rig.on("*", native(|_: Call| async { Ok(()) })).await;
    let found = rig.broker.event("e-1").await.unwrap();
    assert_eq!(found.deliveries, waiting.deliveries);
    assert_eq!((found.deliveries[0].status, found.deliveries[0].retry_count), (Status::Pending, 1));
    assert!(found.deliveries[0].due_at.unwrap() > tidegate::event::now());
    rig.close().await;
}

/// The event once its first attempt is settled.
async fn retried(broker: &Broker, id: &str) -> tidegate::EventDetail {
    loop {
        let detail = broker.event(id).await.unwrap();
        if detail.deliveries[0].retry_count > 0 {
            return detail;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_pending_at_a_stop_is_handled_after_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::open(folder.path(), options()).await;
    rig.broker.declare(Subscription::new("all", "*".parse().unwrap())).await.unwrap();
    for n in 0..50 {
        rig.broker.publish(event(&format!("e-{n}"))).await.unwrap();
    }
    rig.close().await;

    let rig = Rig::open(folder.path(), options()).await;
    rig.on("*", native(|_: Call| async { Ok(()) })).await;
    for n in 0..50 {
        let again = rig.broker.publish_sync(event(&format!("e-{n}")), PATIENCE).await.unwrap();
        assert!(again.duplicate && again.finished);
        assert_eq!(again.detail.record.status, Status::Completed);
    }
    rig.close().await;
}

/// "Queue full: the event is stored and counted, the caller gets an error, and nothing ever runs it."
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_publishes_at_once_into_a_buffer_of_ten_are_each_handled_or_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let buffer_size = NonZeroUsize::new(10).unwrap();
    let rig = Rig::open(folder.path(), Options { buffer_size, ..options() }).await;
    let open = Arc::new(Notify::new());
    let handler = {
        let open = Arc::clone(&open);
        native(move |_: Call| {
            let open = Arc::clone(&open);
            async move {
                // The first call holds its worker until all publishes are answered.
                open.notified().await;
                open.notify_one();
                Ok(())
            }
        })
    };
    rig.on("*", handler).await;
    let publishes: Vec<_> = (0..200)
        .map(|n| {
            let broker = rig.broker.clone();
            tokio::spawn(async move { broker.publish(event(&format!("e-{n}"))).await })
        })
        .collect();
    let (mut accepted, mut refused) = (Vec::new(), Vec::new());
    for (n, publish) in publishes.into_iter().enumerate() {
        match publish.await.unwrap() {
            Ok(published) => accepted.push(published.id.to_string()),
            Err(error) => {
                assert_eq!(error.code(), "queue_full", "{error}");
                refused.push(format!("e-{n}"));
            }
        }
    }
    open.notify_one();
    assert_eq!(accepted.len() + refused.len(), 200);
    for id in &refused {
        assert!(rig.provider.get(id).await.unwrap().is_none(), "{id} was refused and stored");
    }
    for id in &accepted {
        let answer = rig.broker.publish_sync(event(id), PATIENCE).await.unwrap();
        assert!(answer.duplicate && answer.finished, "{id} was accepted and not handled");
    }
    let stats = rig.broker.stats().await.unwrap();
    assert_eq!(stats.provider_stats.total_events, accepted.len() as u64);
    assert_eq!((stats.queue_size, stats.provider_stats.pending_events), (0, 0));
    rig.close().await;
}
