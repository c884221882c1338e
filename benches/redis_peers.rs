//! The broker and its Redis provider against BullMQ on the same private server, and against a JetStream consumer of nats.js,
//! which stores in files and acknowledges before they are flushed.
//!
//! `cargo bench -- redis-peers`; the peers run in processes of their own, see `benches/peers`.

use std::time::Duration;

use tokio::runtime::Runtime;

use crate::nats_server::NatsServer;
use crate::peer::{self, Peer};
use crate::redis::{empty, rig};
use crate::redis_server::RedisServer;
use crate::rig::{compare_latency, idle};
use crate::support;

const BATCH: usize = 500;
const PACED: usize = 150;

pub(crate) fn run() {
    if !support::is_installed("redis-server") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let nats = support::is_installed("nats-server").then(|| NatsServer::start(&[]));
    let (bullmq, nats) = (peer::node("bullmq"), peer::node("nats").zip(nats));
    for (fsync, events) in [("always", 20_000), ("everysec", 50_000)] {
        let server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", fsync]);
        let ours = Ours { runtime: &runtime, server: &server, name: format!("Redis {fsync}"), events };
        if let Some(bullmq) = &bullmq {
            ours.against_bullmq(bullmq);
        }
        if let Some((peer, nats)) = &nats {
            ours.pick_up("nats.js", "≤ 2", || peer.pick_up(&nats.url(), PACED));
        }
    }
}

struct Ours<'a> {
    runtime: &'a Runtime,
    server: &'a RedisServer,
    name: String,
    events: usize,
}

impl Ours<'_> {
    fn against_bullmq(&self, bullmq: &Peer) {
        let drain = || {
            self.runtime.block_on(empty(self.server));
            bullmq.measure(&["drain", &self.server.url(), "10000"])
        };
        support::compare(
            &format!("{}, publish → claim → settle in batches, against BullMQ's drain", self.name),
            "≥ 2",
            || self.runtime.block_on(async { rig(self.server).await.batches(self.events, BATCH, idle()).await }),
            drain,
        );
        support::compare(
            &format!("{}, drain of {} stored events, against BullMQ's", self.name, self.events),
            "≥ 2",
            || self.runtime.block_on(async { rig(self.server).await.drain(self.events, BATCH).await }),
            drain,
        );
        self.pick_up("BullMQ", "< 1", || {
            self.runtime.block_on(empty(self.server));
            bullmq.pick_up(&self.server.url(), PACED)
        });
    }

    fn pick_up(&self, name: &str, goal: &str, other: impl Fn() -> Vec<Duration>) {
        compare_latency(
            &format!("{}, process to process, against {name}", self.name),
            [goal, goal],
            || {
                self.runtime.block_on(empty(self.server));
                peer::ourselves().pick_up(&self.server.url(), PACED)
            },
            other,
        );
    }
}
