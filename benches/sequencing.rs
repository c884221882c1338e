//! How long events that others leave in PostgreSQL's inbox take to stand in the log: from the commit of the writer's own
//! transaction to the moment at which a reader of the log has it. Figures, not ratios; everything durable.
//!
//! `cargo bench -- sequencing`. 32 writers for ten seconds, 5,000 events a second in all, one in each transaction: half of
//! them insert into a captured table, half publish by the outbox. Writers, server and reader share the machine; in the second
//! run a native handler is called for every event besides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use sqlx::{Connection as _, PgPool};
use tidegate::capture::Capture;
use tidegate::capture::outbox;
use tidegate::capture::triggers::Watch;
use tidegate::provider::Provider;
use tidegate::provider::postgres::{Options, PostgresProvider};
use tidegate::{Event, Subscription};

use crate::postgres::database;
use crate::postgres_server::{Fsync, Postgres};
use crate::rig::{self, Rig, idle};
use crate::support;

const WRITERS: u64 = 32;
const RATE: u64 = 5_000;
const EACH: u64 = 10 * RATE / WRITERS;

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = Postgres::start(Fsync::On);
    for (handled, pattern, goal) in [("none handled", "other.**", "p99 ≤ 100 ms"), ("each handled", "**", "none")] {
        let (rate, lags) = runtime.block_on(measure(&server, pattern));
        let lag = |share| support::quantile(lags.clone(), share).as_secs_f64() * 1e3;
        println!(
            "PostgreSQL, {} events by triggers and outbox from {WRITERS} writers, {handled}, {rate:.0}/s of {RATE}/s wanted: no gap; \
             commit to log p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms; goal {goal}",
            lags.len(),
            lag(0.5),
            lag(0.99),
            lag(1.0)
        );
    }
}

/// When each event was committed, in nanoseconds since the beginning; by its number, which is its key.
struct Times {
    began: Instant,
    committed: Vec<AtomicU64>,
}

impl Times {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
}

/// Events a second that were written, and the lag of each. Those whose types match the pattern are handled.
async fn measure(server: &Postgres, pattern: &str) -> (f64, Vec<Duration>) {
    let url = database(server);
    let provider = Arc::new(PostgresProvider::open(Options { url: url.clone(), ..Options::default() }).await.unwrap());
    let pool = PgPool::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE orders (id bigint PRIMARY KEY, note text NOT NULL)").execute(&pool).await.unwrap();
    Capture::postgres(pool).install(&Watch::new("public.orders".parse().unwrap())).await.unwrap();
    let mut rig = Rig::over(Arc::clone(&provider) as Arc<dyn Provider>).await;
    rig.broker.subscribe(Subscription::new("all", pattern.parse().unwrap()), idle()).await.unwrap();
    let running = rig.run();
    let mut connections = Vec::new();
    for _ in 0..WRITERS {
        connections.push(PgConnection::connect(&url).await.unwrap());
    }
    let committed = (0..WRITERS * EACH).map(|_| AtomicU64::new(0)).collect();
    let times = Arc::new(Times { began: Instant::now(), committed });
    let reading = tokio::spawn(read(provider, Arc::clone(&times)));
    let write = |(writer, connection)| tokio::spawn(write(writer, connection, Arc::clone(&times)));
    let writing: Vec<_> = (0..WRITERS).zip(connections).map(write).collect();
    for writer in writing {
        writer.await.unwrap();
    }
    let rate = support::per_second((WRITERS * EACH) as usize, times.began);
    let seen = reading.await.unwrap();
    rig.end(running).await;
    let lag = |(number, seen): (u64, u64)| seen.saturating_sub(times.committed[number as usize].load(Ordering::SeqCst));
    (rate, seen.into_iter().map(lag).map(Duration::from_nanos).collect())
}

/// Commits one event after the other at the writer's part of the rate.
async fn write(writer: u64, mut connection: PgConnection, times: Arc<Times>) {
    let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 * WRITERS / RATE));
    let note = "x".repeat(250);
    for n in 0..EACH {
        ticks.tick().await;
        let number = writer * EACH + n;
        if writer.is_multiple_of(2) {
            let insert = sqlx::query("INSERT INTO orders VALUES ($1, $2)").bind(number as i64).bind(&note);
            insert.execute(&mut connection).await.unwrap();
        } else {
            let mut transaction = connection.begin().await.unwrap();
            let event = Event { key: Some(number.to_string().into()), ..rig::event() };
            outbox::publish(&mut transaction, &event).await.unwrap();
            transaction.commit().await.unwrap();
        }
        times.committed[number as usize].store(times.now(), Ordering::SeqCst);
    }
}

/// Follows the log until all is there: the number of each event, and when it was seen.
async fn read(provider: Arc<PostgresProvider>, times: Arc<Times>) -> Vec<(u64, u64)> {
    let (mut wake, mut after) = (provider.wake(), 0);
    let mut seen = Vec::new();
    while seen.len() < times.committed.len() {
        wake.mark_unchanged();
        let page = provider.read(after, 1_000).await.unwrap();
        let now = times.now();
        for event in &page.events {
            after += 1;
            assert_eq!(event.seq, Some(after), "a gap");
            seen.push((event.key.as_deref().unwrap().parse().unwrap(), now));
        }
        if page.events.is_empty() {
            wake.changed().await.unwrap();
        }
    }
    seen
}
