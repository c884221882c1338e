//! Whether memory stays flat while a plugin is replaced again and again under load: figures, not ratios.
//!
//! `cargo bench -- soak`: a million attempts on a thousand versions, over memory, in a few minutes. It runs only when it
//! is named. `SOAK_RELOADS=20` makes it shorter; each version handles a thousand events.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::broker::{self, Broker};
use tidegate::cli::follow::Follower;
use tidegate::host::component::embed_manifest;
use tidegate::host::{self, Folder, Host, Reloader};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::{Event, Metrics, Payload, Source};
use tokio::sync::oneshot;

use crate::support;

/// Versions that take over one after the other, unless told otherwise.
const RELOADS: usize = 1_000;

/// Events per version.
const EVENTS: usize = 1_000;

/// How often memory is looked at.
const LOOKS: usize = 10;

/// How many events wait at most while the next version is made.
const BACKLOG: u64 = 2_000;

pub(crate) fn run() {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/plugins/audit-trail.wasm");
    let Ok(guest) = std::fs::read(&built) else {
        println!("{} is not built: run `make plugins` first; the rows of soak are left out", built.display());
        return;
    };
    let reloads = std::env::var("SOAK_RELOADS").ok().and_then(|text| text.parse().ok()).unwrap_or(RELOADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(soak(&guest, reloads));
}

async fn soak(guest: &[u8], reloads: usize) {
    let directory = tempfile::tempdir().unwrap();
    put(directory.path(), &version(guest, 0));
    let provider = Arc::new(MemoryProvider::open(memory::Options::default()).unwrap());
    let options = broker::Options { instance_id: "soak".into(), ..broker::Options::default() };
    let metrics = Metrics::default();
    let (broker, service) = Broker::open(provider, options, metrics.clone()).await.unwrap();
    let host = Host::new(host::Options::default(), Some(metrics)).unwrap();
    let folder = Folder::open(host.clone(), directory.path()).unwrap();
    let reloader = folder.reloader();
    let mut follower = Follower::new(host, folder, broker.clone());
    follower.look().await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let following = tokio::spawn(follower.run(std::future::pending()));
    let working = tokio::spawn(service.run(async { drop(stopped.await) }));

    let began = Instant::now();
    let mut looks = Vec::new();
    for n in 0..=reloads {
        if n * LOOKS % reloads.max(LOOKS) < LOOKS {
            looks.push((n, support::resident(std::process::id())));
        }
        if n < reloads {
            one_version(&broker, &reloader, directory.path(), &version(guest, n + 1)).await;
        }
    }
    while waiting(&broker).await > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let stats = broker.stats().await.unwrap();
    let (total, failed) = (stats.total_processed, stats.total_failed);
    println!("soak, {reloads} reloads and {total} attempts, {failed} failed: {:.0} s", began.elapsed().as_secs_f64());
    for (n, resident) in &looks {
        println!("soak, resident memory after {n:>5} reloads: {resident:.1} MiB");
    }
    println!("soak, resident memory at the end: {:.1} MiB", support::resident(std::process::id()));
    drop(stop);
    working.await.unwrap().unwrap();
    following.abort();
}

/// Publishes what one version handles, and has it replaced meanwhile.
async fn one_version(broker: &Broker, reloader: &Reloader, directory: &Path, next: &[u8]) {
    let event = |_| Event::new(Source::System, "soak.tests.create".parse().unwrap(), payload());
    broker.publish_batch((0..EVENTS).map(event).collect()).await.unwrap();
    put(directory, next);
    // The watcher may have been first: either way the version serves from here on.
    let active = reloader.reload("soak").await.unwrap().plugin.active.unwrap();
    assert_eq!(*active.digest, *host::component::digest(next));
    while waiting(broker).await > BACKLOG {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Deliveries that are not done.
async fn waiting(broker: &Broker) -> u64 {
    let stats = broker.stats().await.unwrap().provider_stats;
    stats.pending_deliveries + stats.processing_deliveries
}

fn payload() -> Payload {
    Payload::json_text(support::payload()).unwrap()
}

/// The nth version of the guest: another manifest gives it another digest, and it is compiled like any other.
fn version(guest: &[u8], n: usize) -> Vec<u8> {
    let manifest = format!("name = \"soak\"\nversion = \"1.{n}.0\"\n[[subscribe]]\npattern = \"soak.**\"\n");
    embed_manifest(guest, &manifest).unwrap()
}

/// Puts the component in place in one step.
fn put(directory: &Path, bytes: &[u8]) {
    let beside = directory.join(".beside");
    std::fs::write(&beside, bytes).unwrap();
    std::fs::rename(beside, directory.join("soak.wasm")).unwrap();
}
