//! The broker and its Redis provider against the same work by hand, on the same private server.
//!
//! `cargo bench -- redis`; needs `redis-server`. By hand means the shortest honest code over the same store: a stream with
//! one consumer group and a status per event, `MULTI` of 500 to publish and to complete, one read of 500 to claim; no broker,
//! no matching, no retries, no leases, no attempts kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redis::aio::MultiplexedConnection;
use ::redis::{Cmd, Value};
use tidegate::provider::redis::{Options, RedisProvider};
use tokio::sync::mpsc;

use crate::redis_server::RedisServer;
use crate::rig::{Rig, compare_latency, idle};
use crate::support;

const BATCH: usize = 500;
const PACED: usize = 150;

pub(crate) fn run() {
    if !support::is_installed("redis-server") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for (fsync, goal, events) in [("always", "≥ 0.4 of by hand", 20_000), ("everysec", "≥ 0.35 of by hand", 50_000)]
    {
        let server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", fsync]);
        support::compare(
            &format!("Redis {fsync}, publish → claim → settle in batches, native handler"),
            goal,
            || runtime.block_on(async { rig(&server).await.batches(events, BATCH, idle()).await }),
            || runtime.block_on(batches_by_hand(&server, events)),
        );
        compare_latency(
            &format!("Redis {fsync}"),
            ["none", "none"],
            || runtime.block_on(async { rig(&server).await.pick_up(PACED).await }),
            || runtime.block_on(pick_up_by_hand(&server)),
        );
    }
}

async fn connect(server: &RedisServer) -> MultiplexedConnection {
    // Emptying a large store takes the server longer than a client waits by default.
    let config = ::redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(60)));
    let client = ::redis::Client::open(server.url()).unwrap();
    client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
}

/// Leaves nothing on the server.
pub(crate) async fn empty(server: &RedisServer) {
    ::redis::cmd("FLUSHALL").exec_async(&mut connect(server).await).await.unwrap();
}

/// A provider on an emptied server.
async fn provider(server: &RedisServer) -> Arc<RedisProvider> {
    empty(server).await;
    Arc::new(RedisProvider::open(Options { url: server.url(), ..Options::default() }).await.unwrap())
}

pub(crate) async fn rig(server: &RedisServer) -> Rig {
    Rig::over(provider(server).await).await
}

/// An emptied server with a stream and a group.
async fn by_hand(server: &RedisServer) -> MultiplexedConnection {
    empty(server).await;
    let mut connection = connect(server).await;
    let mut group = ::redis::cmd("XGROUP");
    group.arg("CREATE").arg("s").arg("g").arg("0").arg("MKSTREAM");
    group.exec_async(&mut connection).await.unwrap();
    connection
}

async fn publish_by_hand(connection: &mut MultiplexedConnection, first: usize, count: usize, payload: &str) {
    let mut commands = ::redis::pipe();
    commands.atomic();
    for seq in first..first + count {
        let place = format!("{seq}-0");
        let id = uuid::Uuid::now_v7().to_string();
        commands.cmd("XADD").arg("s").arg(&place).arg("id").arg(id).arg("type").arg("shop.orders.create");
        commands.arg("payload").arg(payload).ignore();
        commands.cmd("HSET").arg("status").arg(&place).arg("0").ignore();
    }
    commands.exec_async(connection).await.unwrap();
}

/// The places of what is read, and how many bytes came with them.
async fn claim_by_hand(connection: &mut MultiplexedConnection, block: Option<usize>) -> Vec<String> {
    let mut read: Cmd = ::redis::cmd("XREADGROUP");
    read.arg("GROUP").arg("g").arg("c").arg("COUNT").arg(BATCH);
    if let Some(millis) = block {
        read.arg("BLOCK").arg(millis);
    }
    read.arg("STREAMS").arg("s").arg(">");
    let answer: Value = read.query_async(connection).await.unwrap();
    let list = |value: &Value| value.as_sequence().unwrap_or_default().to_vec();
    let stream = list(&answer).into_iter().next().unwrap_or_default();
    let entries = list(&stream).into_iter().nth(1).unwrap_or_default();
    let place = |entry: &Value| match list(entry).into_iter().next() {
        Some(Value::BulkString(place)) => String::from_utf8(place).unwrap(),
        other => panic!("{other:?}"),
    };
    list(&entries).iter().map(place).collect()
}

async fn complete_by_hand(connection: &mut MultiplexedConnection, places: &[String]) {
    let mut commands = ::redis::pipe();
    commands.atomic();
    for place in places {
        commands.cmd("XACK").arg("s").arg("g").arg(place).ignore();
        commands.cmd("HSET").arg("status").arg(place).arg("2").ignore();
    }
    commands.exec_async(connection).await.unwrap();
}

async fn batches_by_hand(server: &RedisServer, count: usize) -> f64 {
    let mut connection = by_hand(server).await;
    let payload = support::payload();
    let began = Instant::now();
    for batch in 0..count / BATCH {
        publish_by_hand(&mut connection, batch * BATCH + 1, BATCH, &payload).await;
        let places = claim_by_hand(&mut connection, None).await;
        assert_eq!(places.len(), BATCH);
        complete_by_hand(&mut connection, &places).await;
    }
    support::per_second(count, began)
}

async fn pick_up_by_hand(server: &RedisServer) -> Vec<Duration> {
    let mut publisher = by_hand(server).await;
    let mut worker_connection = connect(server).await;
    let (started, mut starts) = mpsc::unbounded_channel();
    let worker = tokio::spawn(async move {
        let mut seen = 0;
        while seen < PACED {
            let places = claim_by_hand(&mut worker_connection, Some(400)).await;
            started.send(Instant::now()).unwrap();
            seen += places.len();
            complete_by_hand(&mut worker_connection, &places).await;
        }
    });
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut times = Vec::new();
    for n in 0..PACED {
        ticks.tick().await;
        let began = Instant::now();
        publish_by_hand(&mut publisher, n + 1, 1, "1").await;
        times.push(starts.recv().await.unwrap().duration_since(began));
    }
    worker.await.unwrap();
    times
}
