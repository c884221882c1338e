//! Events that come by three ways at once into one PostgreSQL, and are read from two servers: each committed one once, in
//! one order, none that was rolled back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidegate::capture::outbox;
use tidegate::capture::triggers::{Capture, Watch};
use tidegate::{Event, EventId, Payload, Source};

use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::Stream;

const WRITERS: usize = 32;

/// How long a transaction stays open, in milliseconds, at most.
const LONGEST: u64 = 200;

/// One transaction in this many is rolled back.
const ROLLED_BACK: u32 = 5;

/// How long is written: `COMMIT_ORDER_SECONDS=60` makes it a minute.
fn span() -> Duration {
    let asked = std::env::var("COMMIT_ORDER_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(asked.unwrap_or(5))
}

/// What writers did: when each event was committed, and which were rolled back.
#[derive(Default)]
struct Written {
    committed: Mutex<BTreeMap<String, Instant>>,
    dropped: Mutex<BTreeSet<String>>,
}

/// One of the writers, and its way in.
struct Writer {
    number: usize,
    pool: PgPool,
    urls: [String; 2],
    written: Arc<Written>,
}

impl Writer {
    async fn run(self, until: Instant) {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(self.number as u64);
        let client = reqwest::Client::new();
        for n in 0.. {
            if Instant::now() >= until {
                return;
            }
            let name = format!("w{}-{n}", self.number);
            let open_for = Duration::from_millis(rng.random_range(0..=LONGEST));
            let rolls_back = rng.random_ratio(1, ROLLED_BACK);
            match self.number % 3 {
                0 => self.over_http(&client, &name, open_for).await,
                way => self.in_transaction(way == 1, &name, open_for, rolls_back).await,
            }
        }
    }

    async fn over_http(&self, client: &reqwest::Client, name: &str, pause: Duration) {
        // A pace like that of the others, not a wait for anything.
        tokio::time::sleep(pause).await;
        let url = format!("{}/v1/events", self.urls[self.number / 3 % 2]);
        let body = json!({"id": name, "type": "public.api.create", "payload": {}});
        let answer = client.post(url).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 202);
        self.committed(name);
    }

    async fn in_transaction(&self, by_outbox: bool, name: &str, open_for: Duration, rolls_back: bool) {
        let mut transaction = self.pool.begin().await.unwrap();
        if by_outbox {
            let mut event = Event::new(Source::Database, "public.outbox.create".parse().unwrap(), Payload::default());
            event.id = EventId::parse(name).unwrap();
            outbox::publish(&mut transaction, &event).await.unwrap();
        } else {
            sqlx::query("INSERT INTO things (name) VALUES ($1)").bind(name).execute(&mut *transaction).await.unwrap();
        }
        // Transactions that stay open for different times commit in another order than they wrote in.
        tokio::time::sleep(open_for).await;
        if rolls_back {
            transaction.rollback().await.unwrap();
            self.written.dropped.lock().unwrap().insert(name.to_owned());
        } else {
            transaction.commit().await.unwrap();
            self.committed(name);
        }
    }

    fn committed(&self, name: &str) {
        self.written.committed.lock().unwrap().insert(name.to_owned(), Instant::now());
    }
}

/// The name that a writer gave an event, whichever way it came.
fn name(event: &Value) -> String {
    let captured = event["payload"]["after"]["name"].as_str();
    captured.or_else(|| event["id"].as_str()).unwrap().to_owned()
}

/// Reads until `done` says how many there are, and all of them came. Each with its seq and when it came.
async fn read(
    mut stream: Stream,
    mut done: tokio::sync::watch::Receiver<Option<usize>>,
) -> Vec<(u64, String, Instant)> {
    let mut seen = Vec::new();
    loop {
        if done.borrow_and_update().is_some_and(|count| seen.len() >= count) {
            return seen;
        }
        tokio::select! {
            frame = stream.frame() => {
                assert_eq!(frame.name, "", "{frame:?}");
                seen.push((frame.id.unwrap(), name(&frame.json()), Instant::now()));
            }
            changed = done.changed() => changed.unwrap(),
        }
    }
}

/// DESIGN §2.2 and §2.9.
#[tokio::test(flavor = "multi_thread")]
async fn readers_on_two_servers_see_every_commit_once_and_in_one_order() {
    let database = tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let schema = database.fresh_name();
    database.psql("postgres", &format!("CREATE DATABASE {schema}"));
    let (folder, url) = (tempfile::tempdir().unwrap(), database.url(&schema));
    let arguments = ["--provider", url.as_str()];
    let servers = [Server::start(folder.path(), &arguments).await, Server::start(folder.path(), &arguments).await];
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(22).connect(&url).await.unwrap();
    sqlx::query("CREATE TABLE things (id bigserial PRIMARY KEY, name text)").execute(&pool).await.unwrap();
    Capture::postgres(pool.clone()).install(&Watch::new("public.things".parse().unwrap())).await.unwrap();

    let (count, done) = tokio::sync::watch::channel(None);
    let mut readers = Vec::new();
    for server in &servers {
        let stream = Stream::open(&server.url, "?since=beginning", &[]).await;
        readers.push(tokio::spawn(read(stream, done.clone())));
    }
    let (written, until) = (Arc::new(Written::default()), Instant::now() + span());
    let urls = servers.each_ref().map(|server| server.url.clone());
    let writer = |number| Writer { number, pool: pool.clone(), urls: urls.clone(), written: Arc::clone(&written) };
    let writers: Vec<_> = (0..WRITERS).map(|number| tokio::spawn(writer(number).run(until))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let (committed, dropped) = (written.committed.lock().unwrap().clone(), written.dropped.lock().unwrap().clone());
    count.send(Some(committed.len())).unwrap();

    let mut orders = Vec::new();
    for reader in readers {
        let seen = reader.await.unwrap();
        assert!(seen.iter().map(|(seq, ..)| *seq).eq(1..=committed.len() as u64), "not dense, or not in order");
        let names: BTreeSet<&String> = seen.iter().map(|(_, name, _)| name).collect();
        assert!(names.iter().copied().eq(committed.keys()), "not what was committed");
        assert!(dropped.iter().all(|name| !names.contains(name)), "what was rolled back was seen");
        let mut lags: Vec<Duration> =
            seen.iter().map(|(_, name, at)| at.saturating_duration_since(committed[name])).collect();
        lags.sort();
        let at = |share: usize| lags[(lags.len() - 1) * share / 100];
        println!(
            "{} events, {} rolled back, commit to client p50 {:?} p99 {:?}",
            seen.len(),
            dropped.len(),
            at(50),
            at(99)
        );
        orders.push(seen.into_iter().map(|(_, name, _)| name).collect::<Vec<_>>());
    }
    assert_eq!(orders[0], orders[1], "the servers disagree");
    assert!(!dropped.is_empty() && committed.len() > WRITERS, "too little happened to prove anything");
    let head = servers[0].get("/v1/stats").await.json["provider_stats"]["head_seq"].as_u64();
    assert_eq!(head, Some(committed.len() as u64), "more is in the log than was committed");
}
