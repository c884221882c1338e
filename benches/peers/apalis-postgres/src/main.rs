//! apalis-postgres, with its lock on each job: a payload of about 300 bytes.
//!
//! The lock is on, as it is by default: `get_jobs` takes a batch in the worker's name, and a middleware asks for another
//! `UPDATE` of each job when its handler begins. Since 1.0 these requests are gathered together with the results, and the one
//! for a job whose result is in the same batch is left out. So a handler that takes no time, as in `drain`, never has its
//! jobs locked by a statement of their own, and 20,000 jobs take 40 statements to claim and 40 to complete.
//!
//! `publish URL N` pushes N jobs from 32 callers, one each at a time; `drain URL N` handles N jobs that were pushed before,
//! in batches of 500, or of as many as a fourth argument says; both print work per second. `pace URL N` pushes N jobs, 50 a second, each with the time at which it
//! was sent; `work URL N` hears of them by NOTIFY, prints `ready` first, and for each the milliseconds that it took.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use apalis::prelude::*;
use peer::{Config, PostgresStorage};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

const CALLERS: usize = 32;
const QUEUE: &str = "orders";

fn payload() -> String {
    "x".repeat(300)
}

fn millis() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

async fn open(url: &str) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(CALLERS as u32).connect(url).await.unwrap();
    PostgresStorage::setup(&pool).await.unwrap();
    pool
}

fn storage(pool: &PgPool, batch: usize) -> PostgresStorage<String> {
    PostgresStorage::new(pool).with_config(Config::default().queue(QUEUE).batch_size(batch).lock_tasks(true))
}

async fn publish(pool: &PgPool, count: usize) -> f64 {
    let began = Instant::now();
    let caller = |_| {
        let mut storage = storage(pool, 500);
        tokio::spawn(async move {
            for _ in 0..count / CALLERS {
                storage.push(payload()).await.unwrap();
            }
        })
    };
    for caller in (0..CALLERS).map(caller).collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    count as f64 / began.elapsed().as_secs_f64()
}

async fn drain(pool: &PgPool, count: usize, batch: usize) -> f64 {
    let mut storage = storage(pool, batch);
    let mut jobs = futures::stream::iter((0..count).map(|_| TaskBuilder::new(payload()).build()));
    storage.push_all(&mut jobs).await.unwrap();
    sqlx::query("ANALYZE").execute(pool).await.unwrap();
    let handled = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let worker = WorkerBuilder::new("drain").backend(storage).concurrency(10).build(move |_: String, worker: WorkerContext| {
        let handled = Arc::clone(&handled);
        async move {
            if handled.fetch_add(1, Ordering::SeqCst) + 1 == count {
                worker.stop().unwrap();
            }
            Ok::<(), BoxDynError>(())
        }
    });
    worker.run().await.unwrap();
    count as f64 / began.elapsed().as_secs_f64()
}

async fn pace(pool: &PgPool, count: usize) {
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut pushes = Vec::new();
    for _ in 0..count {
        ticks.tick().await;
        let mut storage = storage(pool, 500);
        let job = format!("{} {}", millis(), payload());
        pushes.push(tokio::spawn(async move { storage.push(job).await.unwrap() }));
    }
    for push in pushes {
        push.await.unwrap();
    }
}

async fn work(pool: &PgPool, count: usize) {
    let backend = storage(pool, 10).with_pubsub();
    let times = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&times);
    let worker = WorkerBuilder::new("work").backend(backend).concurrency(10).build(move |job: String, worker: WorkerContext| {
        let noted = Arc::clone(&noted);
        async move {
            let sent: f64 = job.split(' ').next().unwrap().parse().unwrap();
            let mut times = noted.lock().unwrap();
            times.push(millis() - sent);
            if times.len() == count {
                worker.stop().unwrap();
            }
            Ok::<(), BoxDynError>(())
        }
    });
    println!("ready");
    worker.run().await.unwrap();
    times.lock().unwrap().iter().for_each(|time| println!("{time}"));
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let pool = open(&arguments[2]).await;
    let count = arguments[3].parse().unwrap();
    match arguments[1].as_str() {
        "publish" => println!("{:.0}", publish(&pool, count).await),
        "drain" => {
            let batch = arguments.get(4).map_or(500, |batch| batch.parse().unwrap());
            println!("{:.0}", drain(&pool, count, batch).await);
        }
        "pace" => pace(&pool, count).await,
        "work" => work(&pool, count).await,
        other => panic!("publish, drain, pace or work, not {other}"),
    }
}
