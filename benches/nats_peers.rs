//! The broker and its NATS provider against a consumer of nats.js on the same private server. Both store in files and
//! acknowledge before they are flushed; the consumer keeps no status, retries nothing by itself and matches one subject.
//!
//! `cargo bench -- nats-peers`; everything runs in processes of its own, see `benches/peers`.

use tokio::runtime::Runtime;

use crate::nats::emptied;
use crate::nats_server::NatsServer;
use crate::peer;
use crate::rig::compare_latency;
use crate::support;

const PACED: usize = 150;

pub(crate) fn run() {
    if !support::is_installed("nats-server") {
        return;
    }
    let Some(other) = peer::node("nats") else { return };
    let runtime = Runtime::new().unwrap();
    let server = NatsServer::start(&[]);
    compare_latency(
        "NATS file, process to process, against nats.js",
        ["≤ 2", "≤ 2"],
        || {
            runtime.block_on(emptied(&server));
            peer::ourselves().pick_up(&server.url(), PACED)
        },
        || {
            runtime.block_on(emptied(&server));
            other.pick_up(&server.url(), PACED)
        },
    );
}
