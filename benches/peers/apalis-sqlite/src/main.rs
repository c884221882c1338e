//! apalis-sqlite, as its documentation shows it: WAL, `synchronous=FULL`, a payload of about 300 bytes.
//!
//! `publish N` pushes N jobs from 32 callers, one each at a time; `drain N` handles N jobs that were pushed before.
//! Prints work per second on the last line.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use apalis::prelude::*;
use peer::{Config, SqliteStorage};
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

const CALLERS: usize = 32;

fn payload() -> String {
    "x".repeat(300)
}

async fn open(folder: &std::path::Path) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(folder.join("peer.db"))
        .create_if_missing(true)
        .busy_timeout(Duration::from_secs(30))
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
    SqliteStorage::setup(&pool).await.unwrap();
    pool
}

async fn publish(count: usize) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).await;
    let began = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let mut storage = SqliteStorage::new(&pool);
            tokio::spawn(async move {
                for _ in 0..count / CALLERS {
                    storage.push(payload()).await.unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    count as f64 / began.elapsed().as_secs_f64()
}

async fn drain(count: usize) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(folder.path()).await;
    let config = Config::default().queue("drain").batch_size(500);
    let mut storage = SqliteStorage::new(&pool).with_config(config);
    let mut jobs = futures::stream::iter((0..count).map(|_| TaskBuilder::new(payload()).build()));
    storage.push_all(&mut jobs).await.unwrap();
    let handled = Arc::new(AtomicUsize::new(0));
    let calls = Arc::clone(&handled);
    let began = Instant::now();
    let worker = WorkerBuilder::new("drain").backend(storage).concurrency(10).build(move |_: String, worker: WorkerContext| {
        let calls = Arc::clone(&calls);
        async move {
            if calls.fetch_add(1, Ordering::SeqCst) + 1 == count {
                worker.stop().unwrap();
            }
            Ok::<(), BoxDynError>(())
        }
    });
    worker.run().await.unwrap();
    count as f64 / began.elapsed().as_secs_f64()
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let count = arguments[2].parse().unwrap();
    let rate = match arguments[1].as_str() {
        "publish" => publish(count).await,
        "drain" => drain(count).await,
        other => panic!("publish or drain, not {other}"),
    };
    println!("{rate:.0}");
}
