//! Side-by-side measurement: two pieces of work in turn, the median of each and of their ratio.
//!
//! Single figures of a noisy machine mean little; ratios of two runs within the same minute mean something. Every
//! figure is work per second, so a ratio above 1 says that ours is faster than the other side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::broker::{Broker, Options};
use tidegate::delivery::{Attempt, Next, Trace};
use tidegate::handler::Outcome;
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::{Lease, Settlement};
use tidegate::{Call, Event, Handler, Metrics, Verdict};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How many pairs are run; their median counts.
pub(crate) const PAIRS: usize = 5;

/// About 300 bytes of JSON, as an order would have.
pub(crate) fn payload() -> String {
    let note = "x".repeat(180);
    format!(
        r#"{{"order_id":"o-100017","customer":"c-1017","total_cents":4599,"currency":"EUR","note":"{note}","lines":3}}"#
    )
}

/// The middle of `values`.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value below which `share` of `values` lie.
pub(crate) fn quantile(mut values: Vec<Duration>, share: f64) -> Duration {
    values.sort();
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// Runs `ours` and `other` in turn after one warm-up each; both return work per second. Prints the medians and the
/// median ratio, and returns that.
pub(crate) fn compare(what: &str, goal: &str, ours: impl FnMut() -> f64, other: impl FnMut() -> f64) -> f64 {
    compare_over(PAIRS, what, goal, ours, other)
}

/// The same over another number of pairs.
pub(crate) fn compare_over(
    pairs: usize,
    what: &str,
    goal: &str,
    mut ours: impl FnMut() -> f64,
    mut other: impl FnMut() -> f64,
) -> f64 {
    ours();
    other();
    let mut rows = Vec::new();
    for _ in 0..pairs {
        rows.push((ours(), other()));
    }
    let ratio = median(rows.iter().map(|(a, b)| a / b).collect());
    let (a, b) = (median(rows.iter().map(|row| row.0).collect()), median(rows.iter().map(|row| row.1).collect()));
    println!("{what:<72} ours {a:>10.0}/s  other {b:>10.0}/s  ratio {ratio:>6.2}  goal {goal}");
    ratio
}

/// The end of an attempt that succeeded.
pub(crate) fn success(lease: Lease) -> Settlement {
    let attempt = Attempt {
        number: lease.number,
        verdict: Verdict::Ok,
        started_at: tidegate::event::now(),
        duration_us: 1_000,
        worker: "bench".into(),
        error: None,
        reply: None,
        trace: Trace::default(),
    };
    let attempt = Some(attempt);
    Settlement { key: lease.key, next: Next::Complete, attempt, published: Vec::new(), writes: Vec::new() }
}

/// How many a second `count` in the time since `began` are.
pub(crate) fn per_second(count: usize, began: Instant) -> f64 {
    count as f64 / began.elapsed().as_secs_f64()
}

/// MiB of memory that a process has resident.
pub(crate) fn resident(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or_default() / 1024.0
}

/// Whether there is such a server; if not, says so.
pub(crate) fn is_installed(server: &str) -> bool {
    let is_installed = std::process::Command::new(server).arg("--version").output().is_ok();
    if !is_installed {
        println!("{server} is not installed: rows against it are left out");
    }
    is_installed
}

/// A broker over memory that runs until it is told to stop.
pub(crate) struct Running {
    pub(crate) broker: Broker,
    stop: oneshot::Sender<()>,
    service: JoinHandle<tidegate::Result<()>>,
}

impl Running {
    /// With ten workers, as by default.
    pub(crate) async fn over_memory() -> Self {
        let provider = Arc::new(MemoryProvider::open(memory::Options::default()).unwrap());
        let options = Options { instance_id: "bench".into(), ..Options::default() };
        let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        Self { broker, stop, service: tokio::spawn(service.run(async { drop(stopped.await) })) }
    }

    /// Returns when all is settled, for `count` attempts.
    pub(crate) async fn completed(&self, count: usize) {
        while self.broker.stats().await.unwrap().total_processed < count as u64 {
            tokio::task::yield_now().await;
        }
    }

    /// Stops the broker.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.service.await.unwrap().unwrap();
    }
}

/// A handler after whose every call, each of which has to succeed, `after` is told of the event. It takes one event at a
/// time, so that a plugin has a fresh instance for each.
pub(crate) fn watched(handler: Arc<dyn Handler>, after: impl Fn(&Event) + Send + Sync + 'static) -> Arc<dyn Handler> {
    Arc::new(Watched { handler, after })
}

struct Watched<F> {
    handler: Arc<dyn Handler>,
    after: F,
}

#[async_trait::async_trait]
impl<F: Fn(&Event) + Send + Sync + 'static> Handler for Watched<F> {
    async fn handle(&self, call: Call) -> Outcome {
        let event = Arc::clone(&call.event);
        let outcome = self.handler.handle(call).await;
        assert_eq!(outcome.verdict, Verdict::Ok);
        (self.after)(&event);
        outcome
    }

    fn keeps_time(&self) -> bool {
        self.handler.keeps_time()
    }
}
