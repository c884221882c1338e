//! What plugins that misbehave cost the others: an endless loop and memory without end, beside a plugin that does its work.
//!
//! `cargo bench -- plugins-isolation`. Over memory, two worker threads of tokio, ten workers, fresh instances. The plugin
//! `faults` gets 200 events at once, which by turns never return (200 ms are allowed) and take all memory they can get
//! (64 MiB); none is tried again. 1,000 events of a plugin that does nothing come meanwhile, paced or at once. Latency is from
//! publish to the end of the handler.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidegate::retry::RetryOverrides;
use tidegate::{Event, Handler, Payload, Source, Subscription};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::plugins::{self, Ours};
use crate::support::{self, Running};

const HEALTHY: usize = 1_000;
const FAULTY: usize = 200;
const ALLOWED: Duration = Duration::from_millis(200);

/// How many of the ten workers the plugin that misbehaves may have.
const CONCURRENCY: NonZeroU32 = NonZeroU32::MIN.saturating_add(3);

pub(crate) fn run() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let healthy = Ours::idle(&runtime, "");
    let Some(faulty) = Ours::built(&runtime, "faults") else { return };
    for (pace, how) in [(Some(Duration::from_millis(4)), "250 a second"), (None, "all at once")] {
        let mut rows = Vec::new();
        for _ in 0..support::PAIRS {
            rows.push((p99(&runtime, &healthy, Some(&faulty), pace), p99(&runtime, &healthy, None, pace)));
        }
        let (beside, alone): (Vec<f64>, Vec<f64>) = rows.iter().copied().unzip();
        let ratio = support::median(rows.iter().map(|(a, b)| a / b).collect());
        let what = format!("p99 of 1,000 events, {how}, beside 200 of a plugin that misbehaves");
        let (beside, alone) = (support::median(beside), support::median(alone));
        println!("{what:<72} beside {beside:>7.2} ms    alone {alone:>7.2} ms    ratio {ratio:>6.2}  goal ≤ 3");
    }
}

/// Milliseconds.
fn p99(runtime: &Runtime, healthy: &Ours, faulty: Option<&Ours>, pace: Option<Duration>) -> f64 {
    let faulty = faulty.map(|faulty| Arc::clone(&faulty.plugin));
    let times = runtime.block_on(runtime.spawn(latencies(Arc::clone(&healthy.plugin), faulty, pace))).unwrap();
    support::quantile(times, 0.99).as_secs_f64() * 1e3
}

async fn latencies(
    healthy: Arc<dyn Handler>,
    faulty: Option<Arc<dyn Handler>>,
    pace: Option<Duration>,
) -> Vec<Duration> {
    let running = Running::over_memory().await;
    let broker = &running.broker;
    let (times, all) = (Arc::new(Mutex::new(Vec::with_capacity(HEALTHY))), Arc::new(Notify::new()));
    let (seen, notify) = (Arc::clone(&times), Arc::clone(&all));
    let healthy = support::watched(healthy, move |event| {
        let now = jiff::Timestamp::now();
        let mut seen = seen.lock().unwrap();
        seen.push(now.duration_since(event.created_at).unsigned_abs());
        if seen.len() == HEALTHY {
            notify.notify_one();
        }
    });
    broker.subscribe(Subscription::new("healthy", "shop.**".parse().unwrap()), healthy).await.unwrap();
    let faults = if faulty.is_some() { FAULTY } else { 0 };
    if let Some(faulty) = faulty {
        let subscription = Subscription {
            concurrency: Some(CONCURRENCY),
            timeout: Some(ALLOWED),
            retry: RetryOverrides { max_retries: Some(0), ..RetryOverrides::default() },
            ..Subscription::new("faulty", "faults.**".parse().unwrap())
        };
        broker.subscribe(subscription, faulty).await.unwrap();
    }
    for n in 0..faults {
        let fault = if n % 2 == 0 { r#"{"fault":"loop"}"# } else { r#"{"fault":"memory"}"# };
        let payload = Payload::json_text(fault.to_owned()).unwrap();
        broker.publish(Event::new(Source::Internal, "faults.now".parse().unwrap(), payload)).await.unwrap();
    }
    let template = plugins::event();
    let mut ticks = pace.map(tokio::time::interval);
    for _ in 0..HEALTHY {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let event = Event::new(template.source, template.event_type.clone(), template.payload.clone());
        broker.publish(event).await.unwrap();
    }
    all.notified().await;
    // Each has failed in the end, so that none was harmless.
    while broker.stats().await.unwrap().total_failed < faults as u64 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    running.stop().await;
    std::mem::take(&mut *times.lock().unwrap())
}
