//! Real processes on one PostgreSQL, and a broker whose database goes away for a while.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::broker::Options;
use tidegate::provider::postgres::{self, PostgresProvider};
use tidegate::{Broker, Call, Event, EventId, Metrics, Payload, Source, Status, Subscription, native};
use tokio::sync::oneshot;

use crate::support::postgres::{Fsync, Postgres};
use crate::support::server::{Server, built_plugins};
use crate::support::wire;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the database is away.
const OUTAGE: Duration = Duration::from_secs(10);

fn config(folder: &Path, schema: &str) -> String {
    let file = folder.join("tidegate.toml");
    let text = format!(
        "[postgres]\nschema = \"{schema}\"\n[broker]\nlease = \"2s\"\n[plugins.order-totals]\n\
         grants = {{ kv = [\"totals\"], events = [\"shop.totals.update\"], config = [\"currency\"] }}\n"
    );
    std::fs::write(&file, text).unwrap();
    file.display().to_string()
}

/// Waits until `holds` says yes.
async fn wait_until(mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it never came true");
}

async fn shared() -> &'static Postgres {
    tokio::task::spawn_blocking(Postgres::shared).await.unwrap()
}

#[tokio::test]
async fn two_servers_on_one_database_are_one_to_those_who_ask() {
    let database = shared().await;
    let folder = tempfile::tempdir().unwrap();
    let (config, url) = (config(folder.path(), &database.fresh_name()), database.url("postgres"));
    let plugins = built_plugins().join("order-totals.wasm");
    std::fs::create_dir(folder.path().join("plugins")).unwrap();
    std::fs::copy(plugins, folder.path().join("plugins/order-totals.wasm")).unwrap();
    let plugins = folder.path().join("plugins").display().to_string();
    let arguments = ["--config", &config, "--provider", &url, "--plugins", &plugins];
    let both = [Server::start(folder.path(), &arguments).await, Server::start(folder.path(), &arguments).await];
    let mut seqs = BTreeSet::new();
    for n in 0..40 {
        let id = format!("order-{n}");
        let payload = json!({"order_id": id, "customer": "c", "total_cents": 100, "currency": "EUR"});
        let body = json!({"id": id, "type": "shop.orders.create", "key": "c", "payload": payload});
        let answer = wire::post(&both[n % 2].url, "/v1/events", body.to_string()).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        seqs.insert(answer.json()["seq"].as_u64().unwrap());
    }
    assert_eq!(seqs.len(), 40);
    let open = async |server: &Server| {
        let stats = server.get("/v1/stats").await.json;
        let figure = |name: &str| stats["provider_stats"][name].as_u64().unwrap();
        figure("pending_events") + figure("processing_events")
    };
    wait_until(async || open(&both[0]).await == 0).await;
    // One delivery of each order succeeded, whoever made it: the customer's totals count 1, 2, 3, …
    let mut counts: Vec<u64> = Vec::new();
    for event in both[1].all_events().await {
        assert_eq!(event["status"], "completed", "{event}");
        if event["type"] == "shop.totals.update" {
            counts.push(event["payload"]["orders"].as_u64().unwrap());
        }
    }
    counts.sort_unstable();
    assert_eq!(counts, (1..=40).collect::<Vec<_>>());
}

/// DESIGN §9: exit codes, and secrets that are not told.
#[tokio::test]
async fn migrate_makes_the_schema_and_says_what_stands_in_the_way() {
    let database = shared().await;
    let folder = tempfile::tempdir().unwrap();
    let schema = database.fresh_name();
    let config = config(folder.path(), &schema);
    let migrate = |url: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(["migrate", "--json", "--config", &config, "--provider", url]).output().unwrap()
    };
    let url = database.url("postgres").replace("postgres@", "postgres:hunter2@");
    for _ in 0..2 {
        let done = migrate(&url);
        let told: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(
            (done.status.code(), &told["provider"], &told["schema_version"]),
            (Some(0), &json!("postgres"), &json!(2))
        );
        assert!(!told.to_string().contains("hunter2"), "{told}");
    }
    assert_eq!(database.psql("postgres", &format!("SELECT max(version) FROM {schema}.tidegate_versions")), "2");
    let refused = migrate(&database.url("nowhere"));
    let told: Value = serde_json::from_slice(&refused.stderr).unwrap();
    assert_eq!((refused.status.code(), &told["code"]), (Some(2), &json!("invalid")));
    assert!(told["detail"].as_str().unwrap().contains("create it first"), "{told}");
    let away = migrate("postgres://x@127.0.0.1:1/x");
    assert_eq!(away.status.code(), Some(1));
}

/// Exit codes of the doctor: 0 where nothing needs doing, 1 where something does, 2 where it cannot begin.
#[tokio::test]
async fn doctor_says_what_needs_doing_and_ends_accordingly() {
    let database = tokio::task::spawn_blocking(|| Postgres::start(Fsync::On)).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (config, url) = (config(folder.path(), "doctored"), database.url("postgres"));
    let tidegate = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(arguments).output().unwrap()
    };
    let doctor = |provider: &str| {
        let ended = tidegate(&["doctor", "--json", "--config", &config, "--provider", provider]);
        let told = if ended.stdout.is_empty() { ended.stderr } else { ended.stdout };
        (ended.status.code(), serde_json::from_slice::<Value>(&told).unwrap())
    };
    let todo = |told: &Value| -> Vec<String> {
        let findings = told["findings"].as_array().unwrap().iter().filter(|finding| finding["severity"] != "ok");
        findings.map(|finding| finding["code"].as_str().unwrap().to_owned()).collect()
    };
    let (code, told) = doctor(&url);
    assert_eq!((code, todo(&told)), (Some(1), vec!["schema-pending".to_owned()]), "{told:#}");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'doctored'";
    assert_eq!(database.psql("postgres", schemas), "0", "a look makes nothing");
    assert!(tidegate(&["migrate", "--config", &config, "--provider", &url]).status.success());
    let (code, told) = doctor(&url.replace("postgres@", "postgres:hunter2@"));
    assert_eq!((code, &told["healthy"], &told["provider"]), (Some(0), &json!(true), &json!("postgres")), "{told:#}");
    assert_eq!(todo(&told), Vec::<String>::new());
    assert!(!told.to_string().contains("hunter2"), "{told}");

    database.psql("postgres", "CREATE TABLE users (id int PRIMARY KEY)");
    let place = ["--database", &url, "--schema", "doctored"];
    let installed = tidegate(&[&["capture", "install", "public.users"], &place[..]].concat());
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    database.psql("postgres", "INSERT INTO users VALUES (1); DROP TABLE users; DROP INDEX doctored.events_by_age");
    let (code, told) = doctor(&url);
    assert_eq!((code, &told["healthy"]), (Some(1), &json!(false)));
    assert_eq!(todo(&told), ["missing-index", "inbox-stands-still", "capture-drift"], "{told:#}");
    let text = tidegate(&["doctor", "--config", &config, "--provider", &url]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("PROBLEM  missing-index: index events_by_age is missing\n         "), "{text}");
    assert!(text.ends_with("3 things need doing\n"), "{text}");

    assert_eq!(doctor("memory:").0, Some(0));
    let path = folder.path().join("t.db");
    let file = format!("sqlite://{}", path.display());
    assert_eq!((todo(&doctor(&file).1), path.exists()), (vec!["schema-pending".to_owned()], false));
    assert!(tidegate(&["migrate", "--provider", &file]).status.success());
    assert_eq!(doctor(&file).1["findings"][0]["severity"], "ok");
    assert_eq!(doctor("postgrs://x@127.0.0.1/x").0, Some(2));
    assert_eq!(doctor("postgres://x@127.0.0.1:1/x").0, Some(1));
}

/// Publishers are refused while the database is away, attempts in progress are settled once it is back, and nobody has to
/// restart anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_goes_on_after_its_database_was_away() {
    let database = Arc::new(tokio::task::spawn_blocking(|| Postgres::start(Fsync::On)).await.unwrap());
    let options = postgres::Options {
        url: database.url("postgres"),
        acquire_timeout: Duration::from_secs(1),
        ..postgres::Options::default()
    };
    let provider = Arc::new(PostgresProvider::open(options).await.unwrap());
    let options = Options { instance_id: "here".into(), lease: Duration::from_secs(3), ..Options::default() };
    let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let handler = native(move |_: Call| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    });
    broker.subscribe(Subscription::new("all", "**".parse().unwrap()), handler).await.unwrap();
    let publish = async |broker: &Broker| {
        let mut event = Event::new(Source::System, "a.b".parse().unwrap(), Payload::default());
        event.instance_id = "here".into();
        broker.publish(event).await.map(|published| published.id)
    };
    let mut ids: Vec<EventId> = Vec::new();
    for _ in 0..50 {
        ids.push(publish(&broker).await.unwrap());
    }
    let killing = Arc::clone(&database);
    tokio::task::spawn_blocking(move || killing.kill()).await.unwrap();
    let until = tokio::time::Instant::now() + OUTAGE;
    let mut refused = 0;
    while tokio::time::Instant::now() < until {
        refused += usize::from(publish(&broker).await.is_err());
    }
    assert!(refused > 0);
    let starting = Arc::clone(&database);
    tokio::task::spawn_blocking(move || starting.run()).await.unwrap();
    wait_until(async || match publish(&broker).await {
        Ok(id) => {
            ids.push(id);
            true
        }
        Err(_) => false,
    })
    .await;
    let completed = async |id: &EventId| {
        let detail = broker.event(id.as_str()).await;
        detail.is_ok_and(|detail| detail.record.status == Status::Completed)
    };
    for id in &ids {
        wait_until(async || completed(id).await).await;
    }
    assert!(calls.load(Ordering::SeqCst) >= ids.len());
    drop(stop);
    tokio::time::timeout(PATIENCE, service).await.unwrap().unwrap().unwrap();
}
