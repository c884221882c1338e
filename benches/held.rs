//! Whether a transaction that stays open elsewhere slows the queue down: rounds of the same work in two databases of one
//! private PostgreSQL, in one of which a REPEATABLE READ transaction keeps its snapshot from the first round to the last,
//! so that no dead row can be removed there. What is open in one database holds nothing back in another.
//!
//! `cargo bench -- held` takes twenty minutes, and runs only when it is named. `HELD_SECONDS=60` makes it shorter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};
use tidegate::provider::postgres::{Options, PostgresProvider};
use tokio::task::JoinHandle;

use crate::postgres_server::{Fsync, Postgres};
use crate::rig::{Rig, idle};
use crate::support;

/// How long the transaction stays open, unless told otherwise.
const HELD: u64 = 20 * 60;

/// How often a round begins.
const PERIOD: Duration = Duration::from_secs(20);

/// Events per round, which are published by the five hundred and handled at once.
const EVENTS: usize = 10_000;

/// The rounds at the start, in the middle and at the end whose median counts.
const ROUNDS: usize = 5;

pub(crate) fn run() {
    let length = std::env::var("HELD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(HELD);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = Postgres::start(Fsync::On);
    runtime.block_on(held(&server, Duration::from_secs(length)));
}

/// One of the two databases.
struct Side {
    database: String,
    rig: Rig,
    running: JoinHandle<tidegate::Result<()>>,
    done: usize,
}

impl Side {
    async fn open(server: &Postgres) -> Self {
        let database = server.fresh_name();
        server.psql("postgres", &format!("CREATE DATABASE {database}"));
        let options = Options { url: server.url(&database), ..Options::default() };
        let mut rig = Rig::over(Arc::new(PostgresProvider::open(options).await.unwrap())).await;
        drop(rig.subscribe(usize::MAX, idle()).await);
        let running = rig.run();
        Self { database, rig, running, done: 0 }
    }

    /// Events per second.
    async fn round(&mut self) -> f64 {
        self.done += EVENTS;
        let began = Instant::now();
        self.rig.publish(EVENTS, 500).await;
        self.rig.completed(self.done).await;
        support::per_second(EVENTS, began)
    }

    fn tell(&self, server: &Postgres, name: &str) {
        let text = "SELECT string_agg(relname || ' ' || n_dead_tup || ' dead of ' || n_live_tup + n_dead_tup || ' in ' || \
                    pg_size_pretty(pg_total_relation_size(relid)), ', ' ORDER BY relname) FROM pg_stat_user_tables \
                    WHERE relname IN ('deliveries', 'events', 'attempts', 'head')";
        println!("held, {name}: {} events; {}", self.done, server.psql(&self.database, text));
    }
}

async fn held(server: &Postgres, length: Duration) {
    let (mut held, mut free) = (Side::open(server).await, Side::open(server).await);
    held.round().await;
    free.round().await;
    let mut other = PgConnection::connect(&server.url(&held.database)).await.unwrap();
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM tidegate.events")
        .execute(&mut other)
        .await
        .unwrap();
    let (began, mut ticks, mut rows) = (Instant::now(), tokio::time::interval(PERIOD), Vec::new());
    while rows.len() < ROUNDS || began.elapsed() < length {
        ticks.tick().await;
        rows.push((held.round().await, free.round().await));
    }
    println!("held, {} rounds of {EVENTS} events in {:.0} s", rows.len(), began.elapsed().as_secs_f64());
    let middle = (rows.len() - ROUNDS) / 2;
    for (when, from) in [("start", 0), ("middle", middle), ("end", rows.len() - ROUNDS)] {
        let rows = &rows[from..from + ROUNDS];
        let of = |pick: fn(&(f64, f64)) -> f64| support::median(rows.iter().map(pick).collect());
        let what = format!("PostgreSQL, batches beside a held snapshot against without, {when}");
        let (a, b, ratio) = (of(|row| row.0), of(|row| row.1), of(|row| row.0 / row.1));
        println!("{what:<72} ours {a:>10.0}/s  other {b:>10.0}/s  ratio {ratio:>6.2}  goal ≥ 0.8");
    }
    held.tell(server, "with the snapshot");
    free.tell(server, "without");
    other.close().await.unwrap();
    held.rig.end(held.running).await;
    free.rig.end(free.running).await;
}
