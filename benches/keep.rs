//! What events take while a million of them come and go: in memory, of the server or of every process, and in the store.
//!
//! `cargo bench -- redis-memory` and `nats-memory`: figures, not ratios. Retention keeps the newest finished events, and what
//! they take must be the same after a million as after the first.

use std::io::{BufRead as _, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomically};
use std::time::{Duration, Instant};

use tidegate::provider::nats::{NatsProvider, Options};
use tidegate::provider::{
    Amendment, Append, ClaimRequest, Documents as _, EventFilter, Expect, Provider, Retention, Want,
};
use tidegate::subscription::Ordering;

use crate::nats_server::NatsServer;
use crate::peer;
use crate::process;
use crate::redis_server::RedisServer;
use crate::rig::event;
use crate::support;

const BATCH: usize = 500;

/// How many events come and go.
const EVENTS: &str = "1000000";

/// How many finished ones retention keeps, and how often it comes by.
const KEPT: usize = 50_000;
const ROUND: usize = 25_000;

/// After how many in all it is told.
const MARKS: [usize; 5] = [KEPT, 100_000, 250_000, 500_000, 1_000_000];

/// With how many finished ones a snapshot is timed.
const MANY: usize = 100_000;

pub(crate) fn redis() {
    if support::is_installed("redis-server") {
        let server = RedisServer::start(&["--appendonly", "no"]);
        of_a_process(&server.url());
    }
}

pub(crate) fn nats() {
    if support::is_installed("nats-server") {
        let server = NatsServer::start(&[]);
        of_a_process(&server.url());
    }
}

/// In a process of its own, where nothing was before.
fn of_a_process(url: &str) {
    let mut keeper = peer::ourselves().command(&["keep", url, EVENTS]).spawn().unwrap();
    for line in BufReader::new(keeper.stdout.take().unwrap()).lines() {
        println!("{}", line.unwrap());
    }
    assert!(keeper.wait().unwrap().success());
}

/// What is measured of a store: bytes of memory, and of the store where that is something else.
struct Size {
    memory: f64,
    stored: f64,
}

async fn size(provider: &dyn Provider) -> Size {
    let own = provider.stats().await.unwrap().provider_specific;
    let figure = |name: &str| own.get(name).and_then(serde_json::Value::as_f64);
    let resident = || support::resident(std::process::id()) * 1_048_576.0;
    Size { memory: figure("used_memory").unwrap_or_else(resident), stored: figure("bytes").unwrap_or_default() }
}

async fn append(provider: &dyn Provider, count: usize) {
    let names: Arc<[Arc<str>]> = [Arc::from("all")].into();
    for _ in 0..count / BATCH {
        let append = |_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&names) };
        provider.append((0..BATCH).map(append).collect()).await.unwrap();
    }
}

async fn handle(provider: &dyn Provider, count: usize) {
    for _ in 0..count / BATCH {
        let want = Want { subscription: "all".into(), room: BATCH, ordering: Ordering::None };
        let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(600), wants: vec![want] };
        let leases = provider.claim(&request).await.unwrap().leases;
        assert_eq!(leases.len(), BATCH);
        provider.settle(leases.into_iter().map(support::success).collect()).await.unwrap();
    }
}

async fn prune(provider: &dyn Provider, keep: usize) {
    let retention = Retention { max_age: None, max_events: Some(keep as u64) };
    provider.prune(&retention).await.unwrap();
}

/// Has events come and go, and prints what they take.
pub(crate) async fn run(url: &str, count: usize) {
    let provider = process::open(url).await;
    let name = provider.capabilities().provider;
    let began = Instant::now();
    let empty = size(&*provider).await;
    println!("{name}, payload {} bytes, {KEPT} finished events kept:", support::payload().len());
    for events in (ROUND..=count).step_by(ROUND) {
        let before = size(&*provider).await;
        append(&*provider, ROUND).await;
        let open = size(&*provider).await;
        handle(&*provider, ROUND).await;
        prune(&*provider, KEPT).await;
        let kept = size(&*provider).await;
        if events == ROUND {
            let per = |size: &Size, part: fn(&Size) -> f64| (part(size) - part(&empty)) / ROUND as f64;
            let (memory, stored) = (|size: &Size| size.memory, |size: &Size| size.stored);
            println!(
                "  bytes of memory per open delivery {:>6.0}, of the store {:>6.0}",
                per(&open, memory),
                per(&open, stored)
            );
            println!(
                "  bytes of memory per finished event {:>5.0}, of the store {:>6.0}",
                per(&kept, memory),
                per(&kept, stored)
            );
        }
        if MARKS.contains(&events) {
            let took = began.elapsed().as_secs_f64();
            println!(
                "  after {events:>7} events: {:>6.1} MiB of memory, {:>6.1} of the store; with {ROUND} open ones {:>5.1} more; {took:.0} s",
                (kept.memory - empty.memory) / 1_048_576.0,
                (kept.stored - empty.stored) / 1_048_576.0,
                (open.memory - before.memory) / 1_048_576.0,
            );
        }
    }
    prune(&*provider, 0).await;
    let left = size(&*provider).await;
    println!(
        "  after retention removed all: {:.1} MiB of memory, {:.1} of the store",
        (left.memory - empty.memory) / 1_048_576.0,
        (left.stored - empty.stored) / 1_048_576.0
    );
    if name == "nats" {
        snapshots(url).await;
    }
}

/// How long whoever reads waits while a snapshot of many events is made, and how long a process takes to begin with them.
async fn snapshots(url: &str) {
    let options = Options { url: url.to_owned(), namespace: "many".to_owned(), ..Options::default() };
    let provider = Arc::new(NatsProvider::open(options.clone()).await.unwrap());
    append(&*provider, MANY).await;
    handle(&*provider, MANY).await;
    provider.put_document("c", "k", "v".into(), Expect::Any, None).await.unwrap();
    let is_saving = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn({
        let (provider, is_saving) = (Arc::clone(&provider), Arc::clone(&is_saving));
        async move {
            let mut waits = [Vec::new(), Vec::new()];
            while waits[0].len() < 2_000 {
                let began = Instant::now();
                provider.document("c", "k").await.unwrap();
                waits[usize::from(is_saving.load(Atomically::Relaxed))].push(began.elapsed());
            }
            waits
        }
    });
    let mut took = Vec::new();
    for _ in 0..support::PAIRS {
        let newest = EventFilter { limit: 1, ..EventFilter::default() };
        let id = provider.list(&newest).await.unwrap().records.remove(0).event.id.to_string();
        is_saving.store(true, Atomically::Relaxed);
        let began = Instant::now();
        // What erases an event makes a snapshot without it.
        provider.amend(Amendment::Erase { id }).await.unwrap();
        took.push(began.elapsed().as_secs_f64());
        is_saving.store(false, Atomically::Relaxed);
    }
    let waits = reader.await.unwrap();
    let longest = |waits: &[Duration]| waits.iter().max().copied().unwrap_or_default().as_secs_f64() * 1e3;
    println!(
        "  a snapshot of {MANY} events takes {:.0} ms; the longest of {} readings meanwhile {:.1} ms, of {} before and after {:.1} ms",
        support::median(took) * 1e3,
        waits[1].len(),
        longest(&waits[1]),
        waits[0].len(),
        longest(&waits[0])
    );
    let began = Instant::now();
    NatsProvider::open(options).await.unwrap();
    println!("  a process begins with them in {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
}
