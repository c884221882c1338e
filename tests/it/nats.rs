//! The broker over NATS JetStream: several instances of one namespace, a server that goes away, and a stream that is deleted.

use std::sync::Arc;

use tidegate::Payload;
use tidegate::broker::EventFilter;
use tidegate::provider::Provider;
use tidegate::provider::nats::{NatsProvider, Options};

use crate::support::instance::{self, Calls, Instance, PATIENCE, counting, event, subscription, until};
use crate::support::nats::NatsServer;
use crate::support::server::Server;

async fn open(server: &NatsServer) -> Arc<dyn Provider> {
    let options = Options { url: server.url(), ..Options::default() };
    Arc::new(NatsProvider::open(options).await.unwrap())
}

/// BEHAVIOURS E11, and "two overlapping subjects": fan-out to all, each event to one process per subscription.
#[tokio::test]
async fn two_overlapping_subscriptions_on_nats_get_each_event_once() {
    let server = NatsServer::start(&[]);
    instance::overlapping_subscriptions(async || open(&server).await).await;
}

/// DESIGN §2, invariant 1: what was acknowledged is handled, though the server is killed and away for ten seconds.
#[tokio::test]
async fn a_nats_that_is_away_for_ten_seconds_loses_no_acknowledged_event() {
    let mut server = NatsServer::start(&[]);
    instance::outage(open(&server).await, |back| if back { server.restart() } else { server.kill() }).await;
}

/// BEHAVIOURS E10: what operators see of this kind of store. Nothing that is printed or logged has the password.
#[tokio::test]
async fn a_served_nats_shows_its_figures_and_hides_its_password() {
    let nats = NatsServer::start(&["--user", "app", "--pass", "hunter2"]);
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("nats://app:hunter2@127.0.0.1:{}?namespace=shop", nats.port);
    let mut server = Server::start(folder.path(), &["--provider", &provider]).await;
    let client = crate::support::wire::client();
    let body = serde_json::json!({"type": "chat.message", "payload": {"text": "hi"}});
    let answer = client.post(format!("{}/v1/events", server.url)).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    let stats = server.get("/v1/stats").await.json;
    let own = &stats["provider_stats"]["provider_specific"];
    assert_eq!(stats["provider_stats"]["provider_type"], "nats");
    assert_eq!((&own["stream_name"], &own["subject_prefix"]), (&"tidegate-shop".into(), &"tidegate.shop".into()));
    assert!(own["messages"].as_u64().unwrap() >= 2 && own["bytes"].as_u64().unwrap() > 0, "{own}");
    assert!(own["consumers"] == 1 && own["consumer_errors"] == 0 && own["max_age"].is_null(), "{own}");
    assert!(server.stop().success());
    assert!(!server.log().contains("hunter2"), "{}", server.log());
}

/// Subscriptions stand in the store, and their handlers do not go with it.
#[tokio::test]
async fn subscriptions_are_kept_when_the_stream_is_deleted() {
    let server = NatsServer::start(&[]);
    let instance = Instance::start(open(&server).await, "one").await;
    let calls = Calls::default();
    instance.broker.subscribe(subscription("all", "**"), counting(&calls)).await.unwrap();
    let handled = async || {
        let answer = instance.broker.publish_sync(event("shop.orders.create"), PATIENCE).await.unwrap();
        assert!(answer.finished);
        answer.detail
    };
    assert_eq!(handled().await.deliveries.len(), 1);
    let client = async_nats::connect(server.url()).await.unwrap();
    async_nats::jetstream::new(client).delete_stream("tidegate-default").await.unwrap();
    let other = open(&server).await;
    until("the subscription is not declared again", async || {
        other.list_documents("subscriptions", None, 9).await.is_ok_and(|documents| documents.len() == 1)
    })
    .await;
    let detail = handled().await;
    assert_eq!((detail.record.event.seq, detail.deliveries.len()), (Some(1), 1));
    assert_eq!(calls.lock().unwrap().len(), 2);
    instance.stop().await;
}

/// FACTS: "listing and filtering over more than 1,000 messages".
#[tokio::test]
async fn two_thousand_and_five_hundred_events_are_listed_and_paged() {
    let server = NatsServer::start(&[]);
    let instance = Instance::start(open(&server).await, "one").await;
    for batch in 0..5 {
        let events = (0..500).map(|n| {
            let mut event = event(if n % 2 == 0 { "shop.orders.create" } else { "chat.message" });
            event.payload = Payload::json_text(format!("{{\"n\":{}}}", batch * 500 + n)).unwrap();
            event
        });
        instance.broker.publish_batch(events.collect()).await.unwrap();
    }
    let other = open(&server).await;
    let pattern = Some("shop.orders.*".parse().unwrap());
    let mut filter = EventFilter { pattern, limit: 100, ..EventFilter::default() };
    let mut numbers = Vec::new();
    loop {
        let page = other.list(&filter).await.unwrap();
        numbers.extend(
            page.records
                .iter()
                .map(|record| record.event.payload.parse::<serde_json::Value>().unwrap()["n"].as_u64().unwrap()),
        );
        filter.before = page.next;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(numbers, (0..1_250).rev().map(|n| n * 2).collect::<Vec<_>>());
    let all = other.list(&EventFilter::default()).await.unwrap();
    assert_eq!(all.records.len(), 2_500);
    instance.stop().await;
}
