//! The broker over Redis: several instances of one namespace, a server that goes away, and one that is emptied.

use std::process::Command;
use std::sync::Arc;

use tidegate::provider::Provider;
use tidegate::provider::redis::{Options, RedisProvider};

use crate::support::instance::{self, Calls, Instance, PATIENCE, counting, event, subscription, until};
use crate::support::redis::RedisServer;
use crate::support::server::Server;

async fn open(server: &RedisServer) -> Arc<dyn Provider> {
    let options = Options { url: server.url(), ..Options::default() };
    Arc::new(RedisProvider::open(options).await.unwrap())
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
    instance::overlapping_subscriptions(async || open(&server).await).await;
}

/// DESIGN §2, invariant 1: what was acknowledged is handled, though the server is killed and away for ten seconds.
#[tokio::test]
async fn a_server_that_is_away_for_ten_seconds_loses_no_acknowledged_event() {
    let mut server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    instance::outage(open(&server).await, |back| if back { server.restart() } else { server.kill() }).await;
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
    let instance = Instance::start(open(&server).await, "one").await;
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
