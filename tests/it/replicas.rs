//! Several real servers over one store that behave as one, whatever is done to one of them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tidegate::host::component::embed_manifest;

use crate::support::history::History;
use crate::support::nats::NatsServer;
use crate::support::orders;
use crate::support::postgres::{Fsync, Postgres};
use crate::support::redis::RedisServer;
use crate::support::server::{Server, built_plugins};
use crate::support::wire;

const REPLICAS: usize = 3;
const PUBLISHERS: usize = 3;

/// As [`orders::prepare`] sets it.
const LEASE: Duration = Duration::from_secs(1);

/// Servers over one store, with publishers that go to another server when theirs does not answer.
struct Replicas<'a> {
    folder: &'a Path,
    arguments: Vec<Vec<String>>,
    servers: Vec<Server>,
    urls: Arc<Mutex<Vec<String>>>,
    history: Arc<History>,
}

/// Something that happens to one of the servers, or to the store.
enum Blow<'a> {
    /// It is killed, and started again.
    Kill,
    /// It stops for longer than its leases last, and goes on as if nothing had happened.
    Freeze,
    /// Whatever can happen to this store.
    Store(&'a (dyn Fn() + Sync)),
}

impl<'a> Replicas<'a> {
    async fn start(folder: &'a Path, provider: &str) -> Self {
        let arguments: Vec<_> =
            (0..REPLICAS).map(|n| orders::prepare(folder, &format!("replica-{n}"), provider)).collect();
        let mut servers = Vec::new();
        for arguments in &arguments {
            servers.push(Server::start(folder, &borrowed(arguments)).await);
        }
        let urls = servers.iter().map(|server| server.url.clone()).collect();
        Self { folder, arguments, servers, urls: Arc::new(Mutex::new(urls)), history: Arc::default() }
    }

    async fn strike(&mut self, blow: &Blow<'_>, at: usize) {
        match blow {
            Blow::Kill => {
                self.servers[at].kill();
                self.servers[at] = Server::start(self.folder, &borrowed(&self.arguments[at])).await;
                self.urls.lock().unwrap()[at].clone_from(&self.servers[at].url);
            }
            Blow::Freeze => {
                self.servers[at].freeze();
                // That the lease runs out meanwhile is the point.
                tokio::time::sleep(LEASE + Duration::from_millis(500)).await;
                self.servers[at].thaw();
            }
            Blow::Store(strike) => tokio::task::block_in_place(strike),
        }
    }

    /// Publishes while `rounds` blows fall, waits until everything is done, and checks what the store then shows.
    async fn under(mut self, rounds: usize, seed: u64, blows: &[Blow<'_>]) {
        let stop = Arc::new(AtomicBool::new(false));
        let publish = |p| publish(Arc::clone(&self.urls), Arc::clone(&self.history), Arc::clone(&stop), p);
        let publishers: Vec<_> = (0..PUBLISHERS).map(|p| tokio::spawn(publish(p))).collect();
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        for round in 0..rounds {
            // The moment of the blow is what the test varies, not what it waits for.
            tokio::time::sleep(Duration::from_millis(rng.random_range(20..300))).await;
            self.strike(&blows[round % blows.len()], rng.random_range(0..REPLICAS)).await;
        }
        stop.store(true, Ordering::SeqCst);
        for publisher in publishers {
            publisher.await.unwrap();
        }
        let quiet = Instant::now();
        let details = orders::settled(&self.servers[0]).await;
        let took = quiet.elapsed();
        orders::quiet(&self.servers[1]).await;
        let log = self.servers[1].all_events().await;
        let broken = self.history.violations(&log, &details);
        assert!(broken.is_empty(), "{} violations:\n{}", broken.len(), broken.join("\n"));
        let effects = orders::wrong_totals(&details);
        assert!(effects.is_empty(), "{}", effects.join("\n"));
        assert!(self.history.count() > 50, "only {} events were acknowledged", self.history.count());
        assert_eq!(workers(&details), REPLICAS, "not every server worked");
        println!(
            "{} acknowledged, {} in the log, {rounds} blows, done after {took:?}",
            self.history.count(),
            log.len()
        );
    }
}

fn borrowed(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// How many processes made attempts.
fn workers(details: &std::collections::BTreeMap<String, Value>) -> usize {
    let deliveries = details.values().flat_map(|detail| detail["deliveries"].as_array().into_iter().flatten());
    let attempts = deliveries.flat_map(|delivery| delivery["attempts"].as_array().into_iter().flatten());
    attempts.filter_map(|attempt| attempt["worker"].as_str()).collect::<std::collections::BTreeSet<_>>().len()
}

/// Publishes orders until it is stopped, each as often and wherever it takes until it is acknowledged.
async fn publish(urls: Arc<Mutex<Vec<String>>>, history: Arc<History>, stop: Arc<AtomicBool>, publisher: usize) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).build().unwrap();
    let mut at = publisher;
    for n in 0.. {
        let (id, body) = orders::order(&format!("{publisher}-{n}"), n);
        history.attempting(&id);
        loop {
            let url = urls.lock().unwrap()[at % REPLICAS].clone();
            let answer = client.post(format!("{url}/v1/events")).json(&body).send().await;
            let answer = answer.and_then(reqwest::Response::error_for_status);
            if let Ok(answer) = answer
                && let Ok(json) = answer.json::<Value>().await
            {
                history.acknowledged(&id, json["seq"].as_u64().unwrap());
                break;
            }
            at += 1;
            tokio::task::yield_now().await;
        }
        if stop.load(Ordering::SeqCst) {
            return;
        }
    }
}

/// DESIGN §2.3, §2.5 and BEHAVIOURS E12, where the store is a file that processes share.
#[tokio::test(flavor = "multi_thread")]
async fn three_servers_on_one_file_lose_nothing_when_one_is_killed_or_stands_still() {
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    Replicas::start(folder.path(), &provider).await.under(6, 3, &[Blow::Kill, Blow::Freeze]).await;
}

/// The same on PostgreSQL, whose connections are cut and which itself is killed now and then.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_blows_to_three_servers_on_postgresql_and_to_itself_lose_nothing() {
    let database = tokio::task::spawn_blocking(|| Postgres::start(Fsync::On)).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cut = || {
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()";
        database.psql("postgres", others);
    };
    let restart = || {
        database.kill();
        database.run();
    };
    let blows = [Blow::Kill, Blow::Store(&cut), Blow::Freeze, Blow::Kill, Blow::Store(&restart)];
    Replicas::start(folder.path(), &database.url("postgres")).await.under(20, 4, &blows).await;
}

/// And on Redis with `appendfsync always`.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_blows_to_three_servers_on_redis_and_to_itself_lose_nothing() {
    let redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let (folder, url) = (tempfile::tempdir().unwrap(), redis.url());
    let redis = Mutex::new(redis);
    let restart = || {
        let mut redis = redis.lock().unwrap();
        redis.kill();
        redis.restart();
    };
    let blows = [Blow::Kill, Blow::Freeze, Blow::Kill, Blow::Store(&restart)];
    Replicas::start(folder.path(), &url).await.under(20, 5, &blows).await;
}

/// And on NATS with file storage: what it acknowledged is with the kernel, and outlives its process.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_blows_to_three_servers_on_nats_and_to_itself_lose_nothing() {
    let nats = NatsServer::start(&[]);
    let (folder, url) = (tempfile::tempdir().unwrap(), nats.url());
    let nats = Mutex::new(nats);
    let restart = || {
        let mut nats = nats.lock().unwrap();
        nats.kill();
        nats.restart();
    };
    let blows = [Blow::Kill, Blow::Freeze, Blow::Kill, Blow::Store(&restart)];
    Replicas::start(folder.path(), &url).await.under(20, 6, &blows).await;
}

/// Three servers with two subscriptions each that overlap: every event goes to both subscriptions, and for each to one
/// server only.
async fn each_event_goes_to_one_server_per_subscription(provider: &str) {
    const EVENTS: usize = 300;
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    std::fs::create_dir(&plugins).unwrap();
    let guest = std::fs::read(built_plugins().join("audit-trail.wasm")).unwrap();
    for (name, pattern) in [("wide", "shop.**"), ("narrow", "shop.orders.*")] {
        let manifest = format!("name = \"{name}\"\nversion = \"1.0.0\"\n[[subscribe]]\npattern = \"{pattern}\"\n");
        std::fs::write(plugins.join(format!("{name}.wasm")), embed_manifest(&guest, &manifest).unwrap()).unwrap();
    }
    let plugins = plugins.display().to_string();
    let mut servers = Vec::new();
    for n in 0..REPLICAS {
        let config = folder.path().join(format!("{n}.toml"));
        std::fs::write(&config, format!("instance_id = \"replica-{n}\"\n")).unwrap();
        let config = config.display().to_string();
        let arguments = ["--config", &config, "--plugins", &plugins, "--provider", provider];
        servers.push(Server::start(folder.path(), &arguments).await);
    }
    for n in 0..EVENTS / 10 {
        let batch: Vec<Value> = (0..10).map(|at| orders::order(&format!("{n}-{at}"), at).1).collect();
        let answer = wire::post(&servers[n % REPLICAS].url, "/v1/events", json!(batch).to_string()).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
    }
    let details = orders::settled(&servers[0]).await;
    assert_eq!(details.len(), EVENTS);
    for detail in details.values() {
        let deliveries = detail["deliveries"].as_array().unwrap();
        let told = |delivery: &Value| {
            let attempts = delivery["attempts"].as_array().unwrap().len();
            (delivery["subscription"].as_str().unwrap().to_owned(), delivery["status"].clone(), attempts)
        };
        let mut told: Vec<_> = deliveries.iter().map(told).collect();
        told.sort_by(|a, b| a.0.cmp(&b.0));
        let expected = ["narrow", "wide"].map(|name| (name.to_owned(), json!("completed"), 1));
        assert_eq!(told, expected, "{detail}");
    }
    assert_eq!(workers(&details), REPLICAS, "not every server worked");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_goes_to_one_of_three_servers_per_subscription_on_postgresql() {
    let database = tokio::task::spawn_blocking(|| Postgres::start(Fsync::Off)).await.unwrap();
    each_event_goes_to_one_server_per_subscription(&database.url("postgres")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_goes_to_one_of_three_servers_per_subscription_on_redis() {
    let redis = RedisServer::start(&[]);
    each_event_goes_to_one_server_per_subscription(&redis.url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_goes_to_one_of_three_servers_per_subscription_on_nats() {
    let nats = NatsServer::start(&[]);
    each_event_goes_to_one_server_per_subscription(&nats.url()).await;
}
