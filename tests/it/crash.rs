//! A real server on SQLite and on Redis, killed again and again while events come in and plugins handle them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::support::history::History;
use crate::support::redis::RedisServer;
use crate::support::server::{Server, built_plugins};

const ROUNDS: u64 = 20;
const PUBLISHERS: usize = 4;
const CUSTOMERS: u64 = 5;

/// DESIGN §2.1, §2.2, §2.3, §2.8: what was acknowledged is handled, what a handler wrote is written once.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_lose_no_acknowledged_event_and_complete_none_twice() {
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    kills(folder.path(), &provider, None).await;
}

/// The same on Redis with `appendfsync always`, which is killed in every fourth round too.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_of_the_host_and_five_of_redis_lose_no_acknowledged_event() {
    let folder = tempfile::tempdir().unwrap();
    let redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    kills(folder.path(), &redis.url(), Some(redis)).await;
}

async fn kills(folder: &Path, provider: &str, mut redis: Option<RedisServer>) {
    let config = prepare(folder);
    let plugins = folder.join("plugins").display().to_string();
    let arguments = ["--config", &config, "--provider", provider, "--plugins", &plugins];
    let history = Arc::new(History::default());
    let mut rng = rand::rngs::SmallRng::seed_from_u64(20);
    for round in 0..ROUNDS {
        let server = Arc::new(tokio::sync::Mutex::new(Server::start(folder, &arguments).await));
        let url = server.lock().await.url.clone();
        let has_store = redis.is_none() || round % 4 != 3;
        let publishers: Vec<_> = (0..PUBLISHERS)
            .map(|p| tokio::spawn(publish(url.clone(), Arc::clone(&history), round, p, has_store)))
            .collect();
        // The moment of the kill is what the test varies, not what it waits for.
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..400))).await;
        if let Some(redis) = redis.as_mut().filter(|_| !has_store) {
            redis.kill();
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
            redis.restart();
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await;
        }
        server.lock().await.kill();
        for publisher in publishers {
            publisher.await.unwrap();
        }
    }
    let server = Server::start(folder, &arguments).await;
    let details = settled(&server).await;
    let log = server.all_events().await;
    assert!(history.count() > 200, "only {} events were acknowledged", history.count());
    let broken = history.violations(&log, &details);
    assert!(broken.is_empty(), "{} violations:\n{}", broken.len(), broken.join("\n"));
    let effects = wrong_totals(&details);
    assert!(effects.is_empty(), "{}", effects.join("\n"));
    println!("{} acknowledged, {} in the log, {ROUNDS} kills", history.count(), log.len());
}

fn prepare(folder: &Path) -> String {
    std::fs::create_dir(folder.join("plugins")).unwrap();
    let plugin = built_plugins().join("order-totals.wasm");
    std::fs::copy(plugin, folder.join("plugins/order-totals.wasm")).unwrap();
    let config = folder.join("tidegate.toml");
    let text = r#"
        [broker]
        lease = "1s"
        [plugins.order-totals]
        grants = { kv = ["totals"], events = ["shop.totals.update"], config = ["currency"] }
    "#;
    std::fs::write(&config, text).unwrap();
    config.display().to_string()
}

/// Publishes orders one after the other until the server is gone. It may refuse only while it has no store.
async fn publish(url: String, history: Arc<History>, round: u64, publisher: usize, has_store: bool) {
    let client = reqwest::Client::new();
    for n in 0.. {
        let id = format!("order-{round}-{publisher}-{n}");
        let customer = format!("c-{}", n % CUSTOMERS);
        let payload = json!({"order_id": id, "customer": customer, "total_cents": 100, "currency": "EUR"});
        let body = json!({"id": id, "type": "shop.orders.create", "key": customer, "payload": payload});
        history.attempting(&id);
        let Ok(answer) = client.post(format!("{url}/v1/events")).json(&body).send().await else { return };
        if answer.status() != 202 && !has_store {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        assert_eq!(answer.status(), 202, "{id}");
        let Ok(json) = answer.json::<Value>().await else { return };
        history.acknowledged(&id, json["seq"].as_u64().unwrap());
    }
}

/// Waits until nothing is open, and returns every event in detail.
async fn settled(server: &Server) -> BTreeMap<String, Value> {
    for _ in 0..600 {
        let stats = server.get("/v1/stats").await.json;
        let open = |name: &str| stats["provider_stats"][name].as_u64().unwrap();
        if open("pending_events") + open("processing_events") == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut details = BTreeMap::new();
    for event in server.all_events().await {
        let id = event["id"].as_str().unwrap().to_owned();
        let detail = server.get(&format!("/v1/events/{id}")).await.json;
        details.insert(id, detail);
    }
    details
}

/// Every completed order was counted once: the totals published for a customer count 1, 2, 3, … to the number of orders.
fn wrong_totals(details: &BTreeMap<String, Value>) -> Vec<String> {
    let mut orders: BTreeMap<&str, u64> = BTreeMap::new();
    let mut counts: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for detail in details.values() {
        let customer = detail["payload"]["customer"].as_str().unwrap();
        match detail["type"].as_str().unwrap() {
            "shop.orders.create" => *orders.entry(customer).or_default() += 1,
            _ => counts.entry(customer).or_default().push(detail["payload"]["orders"].as_u64().unwrap()),
        }
    }
    let wrong = |(customer, expected): (&&str, &u64)| {
        let mut found = counts.get(customer).cloned().unwrap_or_default();
        found.sort_unstable();
        (!found.iter().copied().eq(1..=*expected)).then(|| format!("{customer}: {expected} orders, totals {found:?}"))
    };
    orders.iter().filter_map(wrong).collect()
}
