//! The broker over Redis: several instances of one namespace, a server that goes away, and one that is emptied.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidegate::broker::{EventFilter, Options};
use tidegate::provider::redis::{self, RedisProvider};
use tidegate::{Broker, Event, Handler, Metrics, Payload, RetryPolicy, Source, Status, Subscription, native};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::support::redis::RedisServer;
use crate::support::server::Server;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running instance.
struct Instance {
    broker: Broker,
    stop: oneshot::Sender<()>,
    service: JoinHandle<tidegate::Result<()>>,
}

impl Instance {
    async fn start(server: &RedisServer, name: &str) -> Self {
        let options = redis::Options { url: server.url(), ..redis::Options::default() };
        let provider = Arc::new(RedisProvider::open(options).await.unwrap());
        let retry = RetryPolicy { jitter: 0.0, ..RetryPolicy::default() };
        let poll = Duration::from_millis(200);
        let lease = Duration::from_secs(5);
        let options = Options { instance_id: name.into(), retry, poll, lease, ..Options::default() };
        let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { broker, stop, service }
    }

    async fn stop(self) {
        drop(self.stop);
        self.service.await.unwrap().unwrap();
    }
}

/// How often each event was handled, by its id.
type Calls = Arc<Mutex<BTreeMap<String, usize>>>;

fn counting(calls: &Calls) -> Arc<dyn Handler> {
    let calls = Arc::clone(calls);
    native(move |call: tidegate::Call| {
        *calls.lock().unwrap().entry(call.event.id.to_string()).or_default() += 1;
        async { Ok(()) }
    })
}

fn subscription(name: &str, pattern: &str) -> Subscription {
    Subscription::new(name, pattern.parse().unwrap())
}

fn event(event_type: &str) -> Event {
    Event::new(Source::Internal, event_type.parse().unwrap(), Payload::default())
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What `redis-cli` prints.
fn cli(server: &RedisServer, arguments: &[&str]) -> String {
    let output = Command::new("redis-cli").args(["-p", &server.port.to_string()]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// BEHAVIOURS E11, and "one consumer group for all patterns: two subscriptions steal from each other".
#[tokio::test]
async fn two_overlapping_subscriptions_in_three_instances_get_each_event_once() {
    let server = RedisServer::start(&[]);
    let (wide, narrow) = (Calls::default(), Calls::default());
    let mut instances = Vec::new();
    for name in ["one", "two", "three"] {
        let instance = Instance::start(&server, name).await;
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

/// DESIGN §2, invariant 1: what was acknowledged is handled, though the server is killed and away for ten seconds.
#[tokio::test]
async fn a_server_that_is_away_for_ten_seconds_loses_no_acknowledged_event() {
    let mut server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let instance = Instance::start(&server, "one").await;
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
    server.kill();
    tokio::time::sleep(Duration::from_secs(10)).await;
    server.restart();
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

/// BEHAVIOURS E9: what operators see of this kind of store. Nothing that is printed or logged has the password.
#[tokio::test]
async fn a_served_redis_shows_its_figures_and_hides_its_password() {
    let redis = RedisServer::start(&["--requirepass", "hunter2", "--appendonly", "yes"]);
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("redis://:hunter2@127.0.0.1:{}/2?namespace=shop", redis.port);
    let mut server = Server::start(folder.path(), &["--provider", &provider]).await;
    let client = crate::support::wire::client();
    let body = serde_json::json!({"type": "chat.message", "payload": {"text": "hi"}});
    let answer = client.post(format!("{}/v1/events", server.url)).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let stats = server.get("/v1/stats").await.json;
    let own = &stats["provider_stats"]["provider_specific"];
    assert_eq!(stats["provider_stats"]["provider_type"], "redis");
    assert_eq!((&own["stream_name"], &own["stream_length"]), (&"{tidegate:shop}:log".into(), &1.into()));
    assert_eq!((&own["first_entry_id"], &own["last_entry_id"]), (&"1-0".into(), &"1-0".into()));
    assert!(own["used_memory"].as_u64().unwrap() > 0 && own["consumer_errors"] == 0);
    assert!(server.stop().success());
    assert!(!server.log().contains("hunter2"), "{}", server.log());
}

/// Subscriptions stand in the store, and their handlers do not go with it.
#[tokio::test]
async fn subscriptions_are_kept_when_the_server_is_flushed() {
    let server = RedisServer::start(&[]);
    let instance = Instance::start(&server, "one").await;
    let calls = Calls::default();
    instance.broker.subscribe(subscription("all", "**"), counting(&calls)).await.unwrap();
    let handled = async || {
        let answer = instance.broker.publish_sync(event("shop.orders.create"), PATIENCE).await.unwrap();
        assert!(answer.finished);
        answer.detail
    };
    assert_eq!(handled().await.deliveries.len(), 1);
    cli(&server, &["FLUSHALL"]);
    until("the subscription is not declared again", async || {
        cli(&server, &["HLEN", "{tidegate:default}:c:subscriptions"]) == "1"
    })
    .await;
    let detail = handled().await;
    assert_eq!((detail.record.event.seq, detail.deliveries.len()), (Some(1), 1));
    assert_eq!(calls.lock().unwrap().len(), 2);
    instance.stop().await;
}
