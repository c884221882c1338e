//! The broker and its SQLite provider against the same SQL by hand. Everything durable: WAL, `synchronous=FULL`.
//!
//! `cargo bench -- sqlite`. By hand means the shortest honest code over the same store: no broker, no matching, no
//! retries, one statement per batch of 1,000 over `json_each`, three transactions per batch.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};
use tidegate::broker::Options;
use tidegate::provider::Provider;
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{Broker, Event, EventType, Handler, Metrics, Payload, Source, Subscription, native};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};

use crate::support;

const EVENTS: usize = 50_000;
const BATCH: usize = 1_000;
const SINGLES: usize = 8_000;
const CALLERS: usize = 32;
const PACED: usize = 150;

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    support::compare(
        "SQLite FULL, publish → claim → settle in batches, native handler",
        "≥ 0.5 of by hand",
        || runtime.block_on(batches(idle())),
        || runtime.block_on(batches_by_hand()),
    );
    drain_and_singles(&runtime);
    latency(&runtime);
}

/// Against apalis-sqlite, which runs as a process of its own (its sqlx is another version).
fn drain_and_singles(runtime: &Runtime) {
    let Some(peer) = support::peer("apalis-sqlite") else { return };
    support::compare(
        "SQLite FULL, drain of 4,000 stored events, one native handler",
        "≥ 10 × apalis-sqlite",
        || runtime.block_on(drain(4_000)),
        || peer.measure(&["drain", "4000"]),
    );
    support::compare(
        "SQLite FULL, 32 callers, one event each, acknowledged durable",
        "≥ 8 × apalis-sqlite",
        || runtime.block_on(singles()),
        || peer.measure(&["publish", "3200"]),
    );
}

/// A broker over a store.
pub(crate) struct Rig {
    pub(crate) broker: Broker,
    metrics: Metrics,
    pub(crate) stop: Arc<Notify>,
    service: Option<tidegate::broker::Service>,
    /// What goes with the rig.
    _folder: Option<tempfile::TempDir>,
}

impl Rig {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("bench.db").display());
        let provider = SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await.unwrap();
        Self { _folder: Some(folder), ..Self::over(Arc::new(provider)).await }
    }

    pub(crate) async fn over(provider: Arc<dyn Provider>) -> Self {
        let options = Options {
            instance_id: "bench".into(),
            buffer_size: NonZeroUsize::new(4_000).unwrap(),
            ..Options::default()
        };
        let metrics = Metrics::default();
        let (broker, service) = Broker::open(provider, options, metrics.clone()).await.unwrap();
        Self { broker, metrics, stop: Arc::default(), service: Some(service), _folder: None }
    }

    pub(crate) fn run(&mut self) -> tokio::task::JoinHandle<tidegate::Result<()>> {
        let stop = Arc::clone(&self.stop);
        tokio::spawn(self.service.take().unwrap().run(async move { stop.notified().await }))
    }

    /// Subscribes a handler; the notification comes after the `all`-th call.
    pub(crate) async fn subscribe(&self, all: usize, handler: Arc<dyn Handler>) -> Arc<Notify> {
        let (handled, done) = (AtomicUsize::new(0), Arc::new(Notify::new()));
        let notify = Arc::clone(&done);
        let handler = support::watched(handler, move |_| {
            if handled.fetch_add(1, Ordering::Relaxed) + 1 == all {
                notify.notify_one();
            }
        });
        self.broker.subscribe(Subscription::new("all", "shop.orders.*".parse().unwrap()), handler).await.unwrap();
        done
    }

    /// Waits until so many attempts are settled. The metrics tell without asking the store, which is busy.
    pub(crate) async fn completed(&self, count: usize) {
        let line = format!("tidegate_attempts_total{{subscription=\"all\",verdict=\"ok\"}} {count}");
        while !self.metrics.encode().lines().any(|found| found == line) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

pub(crate) fn event() -> Event {
    let event_type: EventType = "shop.orders.create".parse().unwrap();
    Event::new(Source::Internal, event_type, Payload::json_text(support::payload()).unwrap())
}

/// A handler that does nothing.
pub(crate) fn idle() -> Arc<dyn Handler> {
    native(|_| async { Ok(()) })
}

/// Publishes in batches while the handler runs, until all is settled.
pub(crate) async fn batches(handler: Arc<dyn Handler>) -> f64 {
    let mut rig = Rig::open().await;
    let done = rig.subscribe(EVENTS, handler).await;
    let running = rig.run();
    let began = Instant::now();
    for _ in 0..EVENTS / BATCH {
        rig.broker.publish_batch((0..BATCH).map(|_| event()).collect()).await.unwrap();
    }
    done.notified().await;
    rig.completed(EVENTS).await;
    let rate = support::per_second(EVENTS, began);
    rig.stop.notify_one();
    running.await.unwrap().unwrap();
    rate
}

/// Handles what was stored before.
async fn drain(count: usize) -> f64 {
    let mut rig = Rig::open().await;
    let done = rig.subscribe(count, idle()).await;
    // Paused while the events are stored, so that what is timed is their handling alone.
    let pause = |paused| tidegate::broker::SubscriptionPatch { paused: Some(paused), ..Default::default() };
    rig.broker.patch_subscription("all", pause(true)).await.unwrap();
    let running = rig.run();
    for _ in 0..count / BATCH {
        rig.broker.publish_batch((0..BATCH).map(|_| event()).collect()).await.unwrap();
    }
    let began = Instant::now();
    rig.broker.patch_subscription("all", pause(false)).await.unwrap();
    done.notified().await;
    rig.completed(count).await;
    let rate = support::per_second(count, began);
    rig.stop.notify_one();
    running.await.unwrap().unwrap();
    rate
}

/// 32 callers, each publishing one event after the other, each acknowledged durable.
async fn singles() -> f64 {
    let mut rig = Rig::open().await;
    let running = rig.run();
    let began = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let broker = rig.broker.clone();
            tokio::spawn(async move {
                for _ in 0..SINGLES / CALLERS {
                    broker.publish(event()).await.unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    let rate = support::per_second(SINGLES, began);
    rig.stop.notify_one();
    running.await.unwrap().unwrap();
    rate
}

/// Time from publish to the start of the handler, at 50 a second.
fn latency(runtime: &Runtime) {
    let mut rows = Vec::new();
    for _ in 0..support::PAIRS {
        rows.push((runtime.block_on(pick_up()), runtime.block_on(pick_up_by_hand())));
    }
    for share in [0.5, 0.99] {
        let of = |times: &Vec<Duration>| support::quantile(times.clone(), share).as_secs_f64() * 1e3;
        let (ours, other): (Vec<f64>, Vec<f64>) = rows.iter().map(|(a, b)| (of(a), of(b))).unzip();
        let ratio = support::median(ours.iter().zip(&other).map(|(a, b)| a / b).collect());
        let what = format!("SQLite FULL, pick-up latency at 50/s, p{}", share * 100.0);
        let (ours, other) = (support::median(ours), support::median(other));
        println!("{what:<72} ours {ours:>8.2} ms    other {other:>8.2} ms    ratio {ratio:>6.2}  goal ≤ 2");
    }
}

async fn pick_up() -> Vec<Duration> {
    let mut rig = Rig::open().await;
    let (send, mut receive) = mpsc::unbounded_channel();
    let handler = native(move |call: tidegate::Call| {
        let sent: u128 = call.event.payload.parse().unwrap_or_default();
        send.send((sent, Instant::now())).ok();
        async { Ok(()) }
    });
    rig.broker.subscribe(Subscription::new("all", "*".parse().unwrap()), handler).await.unwrap();
    let running = rig.run();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let base = Instant::now();
    let mut times = Vec::new();
    for _ in 0..PACED {
        ticks.tick().await;
        let payload = Payload::json(&base.elapsed().as_nanos()).unwrap();
        rig.broker.publish(Event::new(Source::Internal, "a.b".parse().unwrap(), payload)).await.unwrap();
        let (sent, at) = receive.recv().await.unwrap();
        times.push(at.duration_since(base).saturating_sub(Duration::from_nanos(sent as u64)));
    }
    rig.stop.notify_one();
    running.await.unwrap().unwrap();
    times
}

/// A connection as both sides by hand use it.
async fn connect(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging()
        .connect()
        .await
        .unwrap()
}

/// A fresh file with two narrow tables.
async fn by_hand(folder: &Path) -> SqliteConnection {
    let mut connection = connect(&folder.join("hand.db")).await;
    for statement in [
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, type TEXT NOT NULL, payload TEXT NOT NULL, created_at INTEGER NOT NULL)",
        "CREATE TABLE deliveries (seq INTEGER PRIMARY KEY, status INTEGER NOT NULL, token INTEGER, lease_end INTEGER)",
        "CREATE INDEX pending ON deliveries (seq) WHERE status = 0",
    ] {
        sqlx::query(statement).execute(&mut connection).await.unwrap();
    }
    connection
}

async fn publish_by_hand(connection: &mut SqliteConnection, first: usize, count: usize, payload: &str) {
    let rows: Vec<_> =
        (first..first + count).map(|seq| serde_json::json!([seq, uuid::Uuid::now_v7().to_string(), payload])).collect();
    let rows = serde_json::to_string(&rows).unwrap();
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.unwrap();
    sqlx::query(
        "INSERT INTO events SELECT value ->> 0, value ->> 1, 'shop.orders.create', value ->> 2, unixepoch() FROM json_each(?)",
    )
    .bind(&rows)
    .execute(&mut *transaction)
    .await
    .unwrap();
    sqlx::query("INSERT INTO deliveries SELECT value ->> 0, 0, NULL, NULL FROM json_each(?)")
        .bind(&rows)
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
}

async fn claim_by_hand(connection: &mut SqliteConnection, count: usize) -> Vec<(i64, String)> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let rows = sqlx::query(
        "UPDATE deliveries SET status = 1, token = abs(random()), lease_end = unixepoch() + 30
         WHERE seq IN (SELECT seq FROM deliveries WHERE status = 0 ORDER BY seq LIMIT ?)
         RETURNING seq, (SELECT payload FROM events WHERE events.seq = deliveries.seq) AS payload",
    )
    .bind(i64::try_from(count).unwrap())
    .fetch_all(&mut *transaction)
    .await
    .unwrap();
    transaction.commit().await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn complete_by_hand(connection: &mut SqliteConnection, seqs: &[i64]) {
    let seqs = serde_json::to_string(seqs).unwrap();
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.unwrap();
    sqlx::query("UPDATE deliveries SET status = 2 WHERE seq IN (SELECT value FROM json_each(?)) AND status = 1")
        .bind(&seqs)
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
}

async fn batches_by_hand() -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let mut connection = by_hand(folder.path()).await;
    let payload = support::payload();
    let began = Instant::now();
    for batch in 0..EVENTS / BATCH {
        publish_by_hand(&mut connection, batch * BATCH + 1, BATCH, &payload).await;
        let claimed = claim_by_hand(&mut connection, BATCH).await;
        let seqs: Vec<i64> = claimed
            .iter()
            .map(|(seq, payload)| {
                std::hint::black_box(payload);
                *seq
            })
            .collect();
        complete_by_hand(&mut connection, &seqs).await;
    }
    support::per_second(EVENTS, began)
}

async fn pick_up_by_hand() -> Vec<Duration> {
    let folder = tempfile::tempdir().unwrap();
    let mut publisher = by_hand(folder.path()).await;
    let (send, mut receive) = mpsc::unbounded_channel::<()>();
    let (started, mut starts) = mpsc::unbounded_channel();
    let path = folder.path().join("hand.db");
    let worker = tokio::spawn(async move {
        let mut connection = connect(&path).await;
        while receive.recv().await.is_some() {
            let claimed = claim_by_hand(&mut connection, 10).await;
            started.send(Instant::now()).unwrap();
            let seqs: Vec<i64> = claimed.iter().map(|row| row.0).collect();
            complete_by_hand(&mut connection, &seqs).await;
        }
    });
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut times = Vec::new();
    for n in 0..PACED {
        ticks.tick().await;
        let began = Instant::now();
        publish_by_hand(&mut publisher, n + 1, 1, "1").await;
        send.send(()).unwrap();
        times.push(starts.recv().await.unwrap().duration_since(began));
    }
    drop(send);
    worker.await.unwrap();
    times
}
