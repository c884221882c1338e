//! A broker with its service, and what is asked of several of them on one store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidegate::broker::{EventFilter, Options};
use tidegate::provider::Provider;
use tidegate::{Broker, Event, Handler, Metrics, Payload, RetryPolicy, Source, Status, Subscription, native};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running instance.
pub(crate) struct Instance {
    pub(crate) broker: Broker,
    stop: oneshot::Sender<()>,
    service: JoinHandle<tidegate::Result<()>>,
}

impl Instance {
    pub(crate) async fn start(provider: Arc<dyn Provider>, name: &str) -> Self {
        let retry = RetryPolicy { jitter: 0.0, ..RetryPolicy::default() };
        let poll = Duration::from_millis(200);
        let lease = Duration::from_secs(5);
        let options = Options { instance_id: name.into(), retry, poll, lease, ..Options::default() };
        let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { broker, stop, service }
    }

    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.service.await.unwrap().unwrap();
    }
}

/// How often each event was handled, by its id.
pub(crate) type Calls = Arc<Mutex<BTreeMap<String, usize>>>;

pub(crate) fn counting(calls: &Calls) -> Arc<dyn Handler> {
    let calls = Arc::clone(calls);
    native(move |call: tidegate::Call| {
        *calls.lock().unwrap().entry(call.event.id.to_string()).or_default() += 1;
        async { Ok(()) }
    })
}

pub(crate) fn subscription(name: &str, pattern: &str) -> Subscription {
    Subscription::new(name, pattern.parse().unwrap())
}

pub(crate) fn event(event_type: &str) -> Event {
    Event::new(Source::Internal, event_type.parse().unwrap(), Payload::default())
}

pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Two overlapping patterns in three instances: each of the events is handled once for either.
pub(crate) async fn overlapping_subscriptions(open: impl AsyncFn() -> Arc<dyn Provider>) {
    let (wide, narrow) = (Calls::default(), Calls::default());
    let mut instances = Vec::new();
    for name in ["one", "two", "three"] {
        let instance = Instance::start(open().await, name).await;
        instance.broker.subscribe(subscription("wide", "shop.**"), counting(&wide)).await.unwrap();
        instance.broker.subscribe(subscription("narrow", "shop.orders.*"), counting(&narrow)).await.unwrap();
        instances.push(instance);
    }
    for at in 0..200 {
        instances[at % 3].broker.publish(event("shop.orders.create")).await.unwrap();
    }
    instances[0].broker.publish(event("chat.message")).await.unwrap();
    let filter = EventFilter { status: Some(Status::Completed), ..EventFilter::default() };
    until("not all was handled", async || instances[1].broker.events(&filter).await.unwrap().records.len() == 201)
        .await;
    for calls in [&wide, &narrow] {
        let calls = calls.lock().unwrap();
        assert_eq!((calls.len(), calls.values().max()), (200, Some(&1)));
    }
    for instance in instances {
        instance.stop().await;
    }
}

/// What was acknowledged is handled, though the server is away for ten seconds: `strike(false)` ends it, `strike(true)` starts
/// it again.
pub(crate) async fn outage(provider: Arc<dyn Provider>, mut strike: impl FnMut(bool)) {
    let instance = Instance::start(provider, "one").await;
    let calls = Calls::default();
    instance.broker.subscribe(subscription("all", "**"), counting(&calls)).await.unwrap();
    let broker = instance.broker.clone();
    let (acknowledge, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
    let publisher = tokio::spawn(async move {
        let mut refused = 0;
        loop {
            let event = event("shop.orders.create");
            let id = event.id.to_string();
            match broker.publish(event).await {
                Ok(_) if acknowledge.send(id).is_err() => return refused,
                Ok(_) => {}
                // Refusals come at once while the server is away: without a pause the publisher would spin.
                Err(_) => {
                    refused += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    });
    let mut ids = Vec::new();
    for _ in 0..300 {
        ids.push(acknowledged.recv().await.unwrap());
    }
    strike(false);
    tokio::time::sleep(Duration::from_secs(10)).await;
    strike(true);
    while let Ok(id) = acknowledged.try_recv() {
        ids.push(id);
    }
    for _ in 0..100 {
        ids.push(tokio::time::timeout(PATIENCE, acknowledged.recv()).await.unwrap().unwrap());
    }
    drop(acknowledged);
    assert!(publisher.await.unwrap() > 0, "nothing was refused while the server was away");
    until("an acknowledged event was not handled", async || {
        let calls = calls.lock().unwrap();
        ids.iter().all(|id| calls.contains_key(id))
    })
    .await;
    instance.stop().await;
}
