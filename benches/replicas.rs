//! Three processes that share one PostgreSQL against one, on the same cores: what sharing costs, and whether every
//! subscription gets its part. Everything durable.
//!
//! `cargo bench -- replicas`. Each process has a broker of its own with the same four subscriptions and native handlers;
//! what is timed is the handling of what was stored before, until all is settled.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tidegate::Subscription;
use tokio::runtime::Runtime;

use crate::postgres_server::{Fsync, Postgres};
use crate::rig::idle;
use crate::{peer, postgres, support};

/// Each matches every event.
pub(crate) const SUBSCRIPTIONS: [&str; 4] = ["billing", "mail", "search", "stock"];

const EVENTS: usize = 50_000;
const BATCH: usize = 500;

/// How long processes may say nothing: one that hangs ends the benchmark with an error, and not never.
const SILENCE: Duration = Duration::from_secs(60);

/// How long a drain may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = Postgres::start(Fsync::On);
    let mut least: f64 = 1.0;
    support::compare(
        "PostgreSQL, drain of 50,000 × 4 deliveries, 3 processes against 1",
        "≥ 0.9",
        || {
            let (rate, share) = drain(&runtime, &server, 3);
            least = least.min(share);
            rate
        },
        || drain(&runtime, &server, 1).0,
    );
    println!(
        "the same with 3 processes, half of all handled: the last of the four subscriptions had {:.0} % of an even share at the least",
        least * 100.0
    );
}

/// Deliveries a second of so many processes, and how much of an even share the last subscription had when half of all
/// was handled.
fn drain(runtime: &Runtime, server: &Postgres, processes: usize) -> (f64, f64) {
    let url = postgres::database(server);
    runtime.block_on(fill(&url));
    let (send, counts) = mpsc::channel();
    let mut replicas: Vec<Replica> = (0..processes).map(|n| Replica::start(&url, n, &send)).collect();
    for _ in &replicas {
        assert_eq!(counts.recv_timeout(SILENCE).unwrap().1, None);
    }
    let began = Instant::now();
    replicas.iter_mut().for_each(|replica| replica.input.write_all(b"go\n").unwrap());
    let all = EVENTS * SUBSCRIPTIONS.len();
    let (mut settled, mut share) = (vec![[0; SUBSCRIPTIONS.len()]; processes], None);
    let rate = loop {
        let (process, of_each) = counts.recv_timeout(SILENCE).unwrap();
        settled[process] = of_each.unwrap();
        let of = |subscription: usize| settled.iter().map(|counts| counts[subscription]).sum::<usize>();
        let each: Vec<usize> = (0..SUBSCRIPTIONS.len()).map(of).collect();
        let sum: usize = each.iter().sum();
        if share.is_none() && sum >= all / 2 {
            share = Some(*each.iter().min().unwrap() as f64 * each.len() as f64 / sum as f64);
        }
        if sum >= all {
            break support::per_second(all, began);
        }
        assert!(began.elapsed() < PATIENCE, "{settled:?} of {all}");
    };
    replicas.into_iter().for_each(Replica::end);
    (rate, share.unwrap())
}

/// Stores what is to be handled.
async fn fill(url: &str) {
    let mut rig = postgres::rig_on(url).await;
    for name in SUBSCRIPTIONS {
        let paused = Subscription { paused: true, ..Subscription::new(name, "shop.orders.*".parse().unwrap()) };
        rig.broker.subscribe(paused, idle()).await.unwrap();
    }
    let running = rig.run();
    rig.publish(EVENTS, BATCH).await;
    rig.end(running).await;
}

/// A process that handles.
struct Replica {
    child: Child,
    input: ChildStdin,
}

impl Replica {
    /// Tells `counts` what the process says: nothing once it is ready, then how much is settled.
    fn start(url: &str, number: usize, counts: &mpsc::Sender<(usize, Option<[usize; SUBSCRIPTIONS.len()]>)>) -> Self {
        let mut child = peer::ourselves().command(&["share", url, "0"]).stdin(Stdio::piped()).spawn().unwrap();
        let (counts, output) = (counts.clone(), BufReader::new(child.stdout.take().unwrap()));
        std::thread::spawn(move || {
            for line in output.lines() {
                let line = line.unwrap();
                let numbers: Vec<usize> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
                // Nobody listens any more when all is counted.
                counts.send((number, numbers.try_into().ok())).ok();
            }
        });
        let input = child.stdin.take().unwrap();
        Self { child, input }
    }

    fn end(self) {
        let Self { mut child, input } = self;
        drop(input);
        assert!(child.wait().unwrap().success());
    }
}
