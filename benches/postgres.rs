//! The broker and its PostgreSQL provider against the same SQL by hand, on the same private server. Everything durable:
//! `fsync` and `synchronous_commit` are on.
//!
//! `cargo bench -- postgres`; needs PostgreSQL's programs. By hand means the shortest honest code over the same store: an
//! events table and a delivery row each, `UNNEST` of 500 to publish, `SKIP LOCKED` of 500 to claim, one statement per
//! batch to complete; no broker, no matching, no retries, no attempts kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnection, PgListener};
use sqlx::{Connection as _, Row as _};
use tidegate::provider::postgres::{Options, PostgresProvider};
use tokio::sync::mpsc;

use crate::postgres_server::{Fsync, Postgres};
use crate::rig::{Rig, compare_latency, idle};
use crate::{plugins, support};

const BATCH: usize = 500;
const EVENTS: usize = 50_000;
const DRAINED: usize = 100_000;
const SINGLES: usize = 8_000;
const CALLERS: usize = 32;
const PACED: usize = 150;

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = Postgres::start(Fsync::On);
    let hand = || runtime.block_on(ByHand::open(&server));
    support::compare(
        "PostgreSQL, publish → claim → settle in batches, native handler",
        "≥ 0.5 of by hand",
        || runtime.block_on(async { rig(&server).await.batches(EVENTS, BATCH, idle()).await }),
        || runtime.block_on(hand().batches()),
    );
    support::compare(
        "PostgreSQL, drain of 100,000 stored events, against by hand",
        "none",
        || runtime.block_on(async { rig(&server).await.drain(DRAINED, BATCH).await }),
        || runtime.block_on(hand().drain()),
    );
    support::compare(
        "PostgreSQL, 32 callers, one event each, against one insert each",
        "none",
        || runtime.block_on(async { rig(&server).await.singles(SINGLES, CALLERS).await }),
        || runtime.block_on(singles_by_hand(&server)),
    );
    let plugin = plugins::Ours::idle(&runtime, "");
    support::compare(
        "PostgreSQL, no-op plugin, published in batches, against native handler",
        "≥ 0.7",
        || {
            let handler = support::watched(Arc::clone(&plugin.plugin), |_| {});
            runtime.block_on(async { rig(&server).await.batches(EVENTS, BATCH, handler).await })
        },
        || runtime.block_on(async { rig(&server).await.batches(EVENTS, BATCH, idle()).await }),
    );
    compare_latency(
        "PostgreSQL",
        ["none", "none"],
        || runtime.block_on(async { rig(&server).await.pick_up(PACED).await }),
        || runtime.block_on(pick_up_by_hand(&server)),
    );
}

/// A database of its own for every run, so that none finds what another left.
pub(crate) fn database(server: &Postgres) -> String {
    let name = server.fresh_name();
    server.psql("postgres", &format!("CREATE DATABASE {name}"));
    server.url(&name)
}

pub(crate) async fn rig(server: &Postgres) -> Rig {
    rig_on(&database(server)).await
}

/// A broker on this database.
pub(crate) async fn rig_on(url: &str) -> Rig {
    let url = url.to_owned();
    Rig::over(Arc::new(PostgresProvider::open(Options { url, ..Options::default() }).await.unwrap())).await
}

const TABLES: &str = "CREATE TABLE events (seq bigserial PRIMARY KEY, id uuid UNIQUE, type text, payload text, at timestamptz DEFAULT now());
    CREATE TABLE deliveries (seq bigint PRIMARY KEY, stage smallint NOT NULL DEFAULT 0, token bigint, claimed timestamptz,
        done timestamptz) WITH (fillfactor = 70);
    CREATE INDEX ready ON deliveries (seq) WHERE stage = 0";

const PUBLISH: &str =
    "WITH new AS (INSERT INTO events (id, type, payload) SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[])
    RETURNING seq) INSERT INTO deliveries (seq) SELECT seq FROM new";

const CLAIM: &str =
    "UPDATE deliveries d SET stage = 1, token = $2, claimed = now() FROM (SELECT seq FROM deliveries WHERE stage = 0
    ORDER BY seq LIMIT $1 FOR UPDATE SKIP LOCKED) ready, events e WHERE d.seq = ready.seq AND e.seq = d.seq
    RETURNING d.seq, e.payload";

const COMPLETE: &str = "UPDATE deliveries SET stage = 2, done = now() WHERE seq = ANY($1) AND token = $2";

/// The same work with three statements.
struct ByHand {
    connection: PgConnection,
    payload: String,
}

impl ByHand {
    async fn open(server: &Postgres) -> Self {
        let mut connection = PgConnection::connect(&database(server)).await.unwrap();
        sqlx::raw_sql(TABLES).execute(&mut connection).await.unwrap();
        Self { connection, payload: support::payload() }
    }

    async fn publish(&mut self, count: usize) {
        let ids: Vec<String> = (0..count).map(|_| uuid::Uuid::now_v7().to_string()).collect();
        let types = vec!["shop.orders.create"; count];
        let payloads = vec![self.payload.as_str(); count];
        let insert = sqlx::query(PUBLISH).bind(ids).bind(types).bind(payloads);
        insert.execute(&mut self.connection).await.unwrap();
    }

    /// How many there were.
    async fn claim_and_complete(&mut self) -> usize {
        let rows = sqlx::query(CLAIM).bind(BATCH as i64).bind(7_i64).fetch_all(&mut self.connection).await.unwrap();
        let seqs: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        assert!(rows.iter().all(|row| !row.get::<&str, _>(1).is_empty()));
        sqlx::query(COMPLETE).bind(&seqs).bind(7_i64).execute(&mut self.connection).await.unwrap();
        seqs.len()
    }

    async fn batches(mut self) -> f64 {
        let began = Instant::now();
        for _ in 0..EVENTS / BATCH {
            self.publish(BATCH).await;
            assert_eq!(self.claim_and_complete().await, BATCH);
        }
        support::per_second(EVENTS, began)
    }

    async fn drain(mut self) -> f64 {
        for _ in 0..DRAINED / BATCH {
            self.publish(BATCH).await;
        }
        let began = Instant::now();
        for _ in 0..DRAINED / BATCH {
            assert_eq!(self.claim_and_complete().await, BATCH);
        }
        support::per_second(DRAINED, began)
    }
}

/// 32 connections, each inserting one event after the other, each committed.
async fn singles_by_hand(server: &Postgres) -> f64 {
    let url = database(server);
    let mut first = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(TABLES).execute(&mut first).await.unwrap();
    let mut connections = Vec::new();
    for _ in 0..CALLERS {
        connections.push(PgConnection::connect(&url).await.unwrap());
    }
    let began = Instant::now();
    let call = |connection| {
        tokio::spawn(async move {
            let mut hand = ByHand { connection, payload: support::payload() };
            for _ in 0..SINGLES / CALLERS {
                hand.publish(1).await;
            }
        })
    };
    let calling: Vec<_> = connections.into_iter().map(call).collect();
    for caller in calling {
        caller.await.unwrap();
    }
    support::per_second(SINGLES, began)
}

/// Times from an insert with a notification to the claim by whoever listens, at 50 a second.
async fn pick_up_by_hand(server: &Postgres) -> Vec<Duration> {
    let url = database(server);
    let mut publisher = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(TABLES).execute(&mut publisher).await.unwrap();
    let mut listener = PgListener::connect(&url).await.unwrap();
    listener.listen("new").await.unwrap();
    let mut worker = ByHand { connection: PgConnection::connect(&url).await.unwrap(), payload: String::new() };
    let (started, mut starts) = mpsc::unbounded_channel();
    let working = tokio::spawn(async move {
        for _ in 0..PACED {
            listener.recv().await.unwrap();
            let rows =
                sqlx::query(CLAIM).bind(BATCH as i64).bind(7_i64).fetch_all(&mut worker.connection).await.unwrap();
            started.send(Instant::now()).unwrap();
            let seqs: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
            sqlx::query(COMPLETE).bind(&seqs).bind(7_i64).execute(&mut worker.connection).await.unwrap();
        }
    });
    let mut publisher = ByHand { connection: publisher, payload: "1".to_owned() };
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut times = Vec::new();
    for _ in 0..PACED {
        ticks.tick().await;
        let began = Instant::now();
        publisher.publish(1).await;
        sqlx::query("NOTIFY new").execute(&mut publisher.connection).await.unwrap();
        times.push(starts.recv().await.unwrap().duration_since(began));
    }
    working.await.unwrap();
    times
}
