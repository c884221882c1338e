//! A real server on SQLite and on Redis, killed again and again while events come in and plugins handle them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;

use crate::support::history::History;
use crate::support::orders;
use crate::support::redis::RedisServer;
use crate::support::server::Server;

const ROUNDS: u64 = 20;
const PUBLISHERS: usize = 4;
/// The longest that a round may take.
const ROUND: Duration = Duration::from_secs(60);

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
    let arguments = orders::prepare(folder, "only", provider);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (history, mut kills) = (Arc::new(History::default()), Vec::new());
    let mut rng = rand::rngs::SmallRng::seed_from_u64(20);
    for round in 0..ROUNDS {
        let server = Arc::new(tokio::sync::Mutex::new(Server::start(folder, &arguments).await));
        let url = server.lock().await.url.clone();
        let has_store = redis.is_none() || round % 4 != 3;
        let publishers: Vec<_> = (0..PUBLISHERS)
            .map(|p| tokio::spawn(publish(url.clone(), Arc::clone(&history), round, p, has_store)))
            .collect();
        // A round is as long as its events take, however fast the machine is. The moment of the kill is what the test
        // varies, not what it waits for.
        let events = history.count() + rng.random_range(10..40);
        tokio::time::timeout(ROUND, history.reaches(events)).await.expect("acknowledgements in time");
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..50))).await;
        if let Some(redis) = redis.as_mut().filter(|_| !has_store) {
            redis.kill();
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
            redis.restart();
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await;
        }
        server.lock().await.kill();
        kills.push(jiff::Timestamp::now());
        for publisher in publishers {
            publisher.await.unwrap();
        }
    }
    let server = Server::start(folder, &arguments).await;
    // A delivery that four kills happened to hit waits for an operator: he has it handled. One whose lease ran out while its
    // server lived is a fault.
    for (id, detail) in orders::settled(&server).await {
        let deliveries = detail["deliveries"].as_array().unwrap().iter();
        for lost in
            deliveries.flat_map(|one| one["attempts"].as_array().unwrap()).filter(|one| one["verdict"] == "lost")
        {
            let began: jiff::Timestamp = lost["started_at"].as_str().unwrap().parse().unwrap();
            let ended = began + Duration::from_micros(lost["duration_us"].as_u64().unwrap());
            assert!(kills.iter().any(|kill| (began..=ended).contains(kill)), "{id}: no kill during {lost}; {kills:?}");
        }
    }
    let redrive = reqwest::Client::new().post(format!("{}/v1/dead-letters/redrive", server.url));
    let answer = redrive.json(&serde_json::json!({"verdict": "lost"})).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let details = orders::settled(&server).await;
    let log = server.all_events().await;
    let broken = history.violations(&log, &details);
    assert!(broken.is_empty(), "{} violations:\n{}", broken.len(), broken.join("\n"));
    let effects = orders::wrong_totals(&details);
    assert!(effects.is_empty(), "{}", effects.join("\n"));
    println!("{} acknowledged, {} in the log, {ROUNDS} kills", history.count(), log.len());
}

/// Publishes orders one after the other until the server is gone. It may refuse only while it has no store.
async fn publish(url: String, history: Arc<History>, round: u64, publisher: usize, has_store: bool) {
    let client = reqwest::Client::new();
    for n in 0.. {
        let (id, body) = orders::order(&format!("{round}-{publisher}-{n}"), n);
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
