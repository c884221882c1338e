//! The broker and its SQLite provider against the same SQL by hand. Everything durable: WAL, `synchronous=FULL`.
//!
//! `cargo bench -- sqlite`. By hand means the shortest honest code over the same store: no broker, no matching, no
//! retries, one statement per batch of 1,000 over `json_each`, three transactions per batch.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};
use tidegate::Handler;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::rig::{Rig, compare_latency, idle};
use crate::{peer, support};

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
    compare_latency(
        "SQLite FULL",
        ["≤ 2", "≤ 2"],
        || runtime.block_on(async { Rig::on_sqlite().await.pick_up(PACED).await }),
        || runtime.block_on(pick_up_by_hand()),
    );
}

/// Against apalis-sqlite, which runs as a process of its own (its sqlx is another version).
fn drain_and_singles(runtime: &Runtime) {
    let Some(peer) = peer::cargo("apalis-sqlite") else { return };
    support::compare(
        "SQLite FULL, drain of 4,000 stored events, one native handler",
        "≥ 10 × apalis-sqlite",
        || runtime.block_on(async { Rig::on_sqlite().await.drain(4_000, BATCH).await }),
        || peer.measure(&["drain", "4000"]),
    );
    support::compare(
        "SQLite FULL, 32 callers, one event each, acknowledged durable",
        "≥ 8 × apalis-sqlite",
        || runtime.block_on(async { Rig::on_sqlite().await.singles(SINGLES, CALLERS).await }),
        || peer.measure(&["publish", "3200"]),
    );
}

/// Publishes in batches while the handler runs, until all is settled.
pub(crate) async fn batches(handler: Arc<dyn Handler>) -> f64 {
    Rig::on_sqlite().await.batches(EVENTS, BATCH, handler).await
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
