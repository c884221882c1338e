//! Orders that the sample `order-totals` counts, and a check that each was counted once.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::server::{Server, built_plugins};

const CUSTOMERS: usize = 5;

/// Puts plugin and configuration into the folder; returns the arguments of a server that uses them under this name.
/// Leases last one second.
pub(crate) fn prepare(folder: &Path, instance: &str, provider: &str) -> Vec<String> {
    let plugins = folder.join("plugins");
    if !plugins.exists() {
        std::fs::create_dir(&plugins).unwrap();
        std::fs::copy(built_plugins().join("order-totals.wasm"), plugins.join("order-totals.wasm")).unwrap();
    }
    let config = folder.join(format!("{instance}.toml"));
    let text = r#"
        [plugins.order-totals]
        grants = { kv = ["totals"], events = ["shop.totals.update"], config = ["currency"] }
        [broker]
        lease = "1s"
    "#;
    std::fs::write(&config, format!("instance_id = \"{instance}\"\n{text}")).unwrap();
    let (config, plugins) = (config.display().to_string(), plugins.display().to_string());
    ["--config", &config, "--plugins", &plugins, "--provider", provider].map(str::to_owned).to_vec()
}

/// The id and the body of an order of the nth customer's turn.
pub(crate) fn order(name: &str, n: usize) -> (String, Value) {
    let (id, customer) = (format!("order-{name}"), format!("c-{}", n % CUSTOMERS));
    let payload = json!({"order_id": id, "customer": customer, "total_cents": 100, "currency": "EUR"});
    let body = json!({"id": id, "type": "shop.orders.create", "key": customer, "payload": payload});
    (id, body)
}

/// Waits until nothing is open.
pub(crate) async fn quiet(server: &Server) {
    for _ in 0..600 {
        // A store that was just struck may be away for a moment; nothing else excuses the server.
        let stats = server.get("/v1/stats").await;
        let open = |name: &str| stats.json["provider_stats"][name].as_u64().unwrap();
        match stats.status {
            200 if open("pending_events") + open("processing_events") == 0 => break,
            200 => {}
            status => assert_eq!(status, 503, "{}", stats.json),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until nothing is open, and returns every event in detail.
pub(crate) async fn settled(server: &Server) -> BTreeMap<String, Value> {
    quiet(server).await;
    let mut details = BTreeMap::new();
    for event in server.all_events().await {
        let id = event["id"].as_str().unwrap().to_owned();
        let detail = server.get(&format!("/v1/events/{id}")).await.json;
        details.insert(id, detail);
    }
    details
}

/// Every completed order was counted once: the totals published for a customer count 1, 2, 3, … to the number of orders.
pub(crate) fn wrong_totals(details: &BTreeMap<String, Value>) -> Vec<String> {
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
