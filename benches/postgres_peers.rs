//! The broker and its PostgreSQL provider against job queues that people use on PostgreSQL, on the same private server.
//! Everything durable: `fsync` and `synchronous_commit` are on.
//!
//! `cargo bench -- postgres-peers`; the peers run in processes of their own, see `benches/peers`. A peer that is slow at
//! something does less of it: what counts is how much a second.

use tokio::runtime::Runtime;

use crate::peer::{self, Peer};
use crate::postgres::{database, rig};
use crate::postgres_server::{Fsync, Postgres};
use crate::rig::compare_latency;
use crate::support;

const BATCH: usize = 500;
const DRAINED: usize = 100_000;
const SINGLES: usize = 8_000;
const CALLERS: usize = 32;
/// Ten seconds of it: of fewer, the slowest hundredth would be one or two.
const PACED: usize = 500;

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ours = Ours { runtime, server: Postgres::start(Fsync::On) };
    if let Some(peer) = peer::node("graphile-worker") {
        ours.drain("graphile-worker, tuned", "≥ 1.5", &peer, &["100000"]);
        ours.singles("graphile-worker", &peer, "1600");
        ours.pick_up("graphile-worker", &peer);
    }
    if let Some(peer) = peer::node("pg-boss") {
        ours.drain("pg-boss", "≥ 2", &peer, &["100000"]);
        ours.singles("pg-boss", &peer, "3200");
    }
    if let Some(peer) = peer::cargo("apalis-postgres") {
        ours.drain("10,000 of apalis-postgres as it comes, in batches of 10", "≥ 8", &peer, &["10000", "10"]);
        ours.drain("20,000 of apalis-postgres in batches of 500", "none", &peer, &["20000"]);
        ours.singles("apalis-postgres", &peer, "6400");
        ours.pick_up("apalis-postgres with NOTIFY", &peer);
    }
}

struct Ours {
    runtime: Runtime,
    server: Postgres,
}

impl Ours {
    /// `arguments` are how many jobs the peer handles, and what else it is told.
    fn drain(&self, name: &str, goal: &str, peer: &Peer, arguments: &[&str]) {
        support::compare(
            &format!("PostgreSQL, drain of 100,000 stored events, against {name}"),
            goal,
            || self.runtime.block_on(async { rig(&self.server).await.drain(DRAINED, BATCH).await }),
            || peer.measure(&[&["drain", &*database(&self.server)], arguments].concat()),
        );
    }

    fn singles(&self, name: &str, peer: &Peer, count: &str) {
        support::compare(
            &format!("PostgreSQL, 32 callers, one event each, against {name}"),
            "≥ 4",
            || self.runtime.block_on(async { rig(&self.server).await.singles(SINGLES, CALLERS).await }),
            || peer.measure(&["publish", &database(&self.server), count]),
        );
    }

    fn pick_up(&self, name: &str, peer: &Peer) {
        compare_latency(
            &format!("PostgreSQL, process to process, against {name}"),
            ["< 1", "< 1"],
            || peer::ourselves().pick_up(&database(&self.server), PACED),
            || peer.pick_up(&database(&self.server), PACED),
        );
    }
}
