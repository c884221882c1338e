//! Every way an attempt can end, from the guest through host and broker to the record and the metrics.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use tidegate::broker::{self, DeadLetterFilter};
use tidegate::delivery::Attempt;
use tidegate::handler::KvRead;
use tidegate::host::component::embed_manifest;
use tidegate::host::{self, Host, PluginOptions};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::{ClaimRequest, Provider, Want};
use tidegate::subscription::Ordering;
use tidegate::{
    Broker, Call, Event, EventDetail, Metrics, Payload, Result, RetryPolicy, Source, Status, Subscription, Verdict,
};
use tokio::sync::{Notify, oneshot};

use crate::support::server::built_plugins;

/// Long enough for the slowest machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// One retry, at once, so that a policy's retry shows as a second attempt.
fn retry() -> RetryPolicy {
    let soon = Duration::from_millis(5);
    RetryPolicy { max_retries: 1, initial_delay: soon, max_delay: soon, jitter: 0.0, ..RetryPolicy::default() }
}

const GRANTS: &str = r#"grants = { kv = ["faults"], events = ["faulty.**"], config = ["greeting", "self-check"] }"#;

/// A running broker over memory, with the misbehaving guest under two names: `faults` with little fuel and memory, and
/// `slow` with little time, whose fuel nobody counts. There is one instance for both.
struct Rig {
    broker: Broker,
    host: Host,
    provider: Arc<MemoryProvider>,
    metrics: Metrics,
    _stop: oneshot::Sender<()>,
}

impl Rig {
    async fn start(max_depth: u32) -> Self {
        let metrics = Metrics::default();
        let mut options = host::Options { instances: std::num::NonZeroU32::MIN, ..host::Options::default() };
        for name in ["faults", "slow"] {
            options.plugins.insert(name.to_owned(), toml::from_str::<PluginOptions>(GRANTS).unwrap());
        }
        let host = Host::new(options, Some(metrics.clone())).unwrap();
        let guest = std::fs::read(built_plugins().join("faults.wasm")).unwrap();
        for (name, limits) in [
            ("faults", "fuel = 20000000\nmemory = \"8MiB\"\nlog = \"1KiB\""),
            ("slow", "timeout = \"50ms\"\nlog = \"1KiB\""),
        ] {
            let manifest = format!(
                "name = \"{name}\"\nversion = \"1.0.0\"\n[limits]\n{limits}\n\
                 [capabilities]\nkv = [\"faults\"]\nevents = [\"faulty.**\"]\nconfig = [\"greeting\", \"self-check\"]\n"
            );
            let component = embed_manifest(&guest, &manifest).unwrap();
            host.activate(host.load(name, component.into()).await.unwrap());
        }
        let provider = Arc::new(MemoryProvider::open(memory::Options::default()).unwrap());
        let options =
            broker::Options { instance_id: "test".into(), retry: retry(), max_depth, ..broker::Options::default() };
        let shared = Arc::clone(&provider) as Arc<dyn Provider>;
        let (broker, service) = Broker::open(shared, options, metrics.clone()).await.unwrap();
        let (_stop, stopped) = oneshot::channel();
        tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { broker, host, provider, metrics, _stop }
    }

    async fn bind(&self, name: &str, pattern: &str, plugin: &str) {
        let subscription = Subscription::new(name, pattern.parse().unwrap());
        self.broker.subscribe(subscription, self.host.handler(plugin)).await.unwrap();
    }

    fn digest(&self, plugin: &str) -> String {
        self.host.active(plugin).unwrap().digest().to_string()
    }

    /// Publishes and waits until nothing of the event is open.
    async fn handled(&self, event: Event) -> EventDetail {
        let answer = self.broker.publish_sync(event, PATIENCE).await.unwrap();
        assert!(answer.finished, "{:?}", answer.detail);
        answer.detail
    }

    /// The value of a counter, 0 while it is not there.
    fn counted(&self, name: &str, labels: &str) -> u64 {
        let text = self.metrics.encode();
        let found = text.lines().find_map(|line| line.strip_prefix(&format!("{name}_total{{{labels}}} ")));
        found.map_or(0, |value| value.parse().unwrap())
    }
}

fn event(event_type: &str, payload: &Value) -> Event {
    Event::new(Source::System, event_type.parse().unwrap(), Payload::json(payload).unwrap())
}

/// A store that says when it is asked, and never answers.
#[derive(Default)]
struct Stalled {
    asked: Notify,
}

#[async_trait]
impl KvRead for Stalled {
    async fn get(&self, _: &str, _: &str) -> Result<Option<Bytes>> {
        self.asked.notify_one();
        std::future::pending().await
    }
}

/// A way to end, and what becomes of the delivery by default (DESIGN §4).
struct Row {
    verdict: Verdict,
    plugin: &'static str,
    fault: Value,
    code: &'static str,
    /// How many attempts are made where one may be retried.
    attempts: u64,
    status: Status,
    has_backtrace: bool,
}

fn rows() -> Vec<Row> {
    let row = |verdict, fault, code, attempts| Row {
        verdict,
        plugin: "faults",
        fault,
        code,
        attempts,
        status: if verdict == Verdict::Ok { Status::Completed } else { Status::Failed },
        has_backtrace: true,
    };
    let quiet = |row: Row| Row { has_backtrace: false, ..row };
    vec![
        quiet(row(Verdict::Ok, json!({"fault": "echo"}), "", 1)),
        quiet(row(Verdict::Retry, json!({"fault": "fail", "times": 9}), "not-yet", 2)),
        quiet(row(Verdict::Reject, json!({"fault": "reject"}), "refused", 1)),
        row(Verdict::Trap, json!({"fault": "trap"}), "trap", 2),
        row(Verdict::Trap, json!({"fault": "panic", "bytes": 100_000}), "trap", 2),
        row(Verdict::Trap, json!({"fault": "stack-overflow"}), "trap", 2),
        row(Verdict::Trap, json!({"fault": "deep-calls"}), "trap", 2),
        Row { plugin: "slow", ..row(Verdict::Timeout, json!({"fault": "loop"}), "timeout", 2) },
        row(Verdict::OutOfFuel, json!({"fault": "loop"}), "out-of-fuel", 1),
        row(Verdict::OutOfFuel, json!({"fault": "loop-in-host"}), "too-many-host-calls", 1),
        row(Verdict::OutOfMemory, json!({"fault": "memory"}), "out-of-memory", 1),
        row(Verdict::Denied, json!({"fault": "setting", "key": "other"}), "denied", 1),
    ]
}

/// What every attempt that a guest made is recorded with.
fn assert_recorded(attempt: &Attempt, row: &Row, digest: &str) {
    let said = format!("{} {attempt:?}", row.fault);
    assert_eq!(attempt.verdict, row.verdict, "{said}");
    assert_eq!(attempt.error.as_ref().map_or("", |fault| &fault.code), row.code, "{said}");
    assert!(attempt.error.as_ref().is_none_or(|fault| fault.message.len() < 8 << 10), "{said}");
    assert_eq!(attempt.trace.digest.as_deref(), Some(digest), "{said}");
    assert_eq!(attempt.trace.fuel.is_some_and(|fuel| fuel > 0), row.plugin == "faults", "{said}");
    assert!(attempt.duration_us > 0, "{said}");
    assert!(attempt.trace.peak_memory.is_some_and(|peak| peak > 0), "{said}");
    assert_eq!(attempt.reply.is_some(), row.verdict == Verdict::Ok, "{said}");
    let log = &attempt.trace.log;
    assert_eq!(log.first().map(|line| &*line.message), Some("earlier lines were cut"), "{said}");
    assert!(log.len() > 1 && log.len() < 30, "{said}");
    let backtrace = attempt.trace.backtrace.join("\n");
    assert_eq!(!backtrace.is_empty(), row.has_backtrace, "{said}");
    assert!(!row.has_backtrace || backtrace.contains("faults"), "functions have names: {said}");
}

/// DESIGN §4: every verdict has its default, its record and its counts.
#[tokio::test]
async fn every_way_to_end_is_recorded_counted_and_followed_by_its_default() {
    let rig = Rig::start(16).await;
    let (mut seen, mut by_plugin) = (BTreeSet::new(), HashMap::<(&str, Verdict), u64>::new());
    for (at, row) in rows().into_iter().enumerate() {
        let name = format!("row.{at}");
        rig.bind(&name, &name, row.plugin).await;
        let log = json!({"fault": "log", "lines": 40});
        let detail = rig.handled(event(&name, &json!({"fault": "steps", "steps": [log, row.fault]}))).await;
        let delivery = &detail.deliveries[0];
        assert_eq!((delivery.status, delivery.verdict), (row.status, Some(row.verdict)), "{delivery:?}");
        assert_eq!(delivery.attempts.len() as u64, row.attempts, "{delivery:?}");
        let digest = rig.digest(row.plugin);
        for (attempt, number) in delivery.attempts.iter().zip(1..) {
            assert_eq!(attempt.number, number);
            assert_recorded(attempt, &row, &digest);
        }
        let verdict = row.verdict.as_str();
        let subscription = format!("subscription=\"{name}\"");
        let labels = format!("{subscription},verdict=\"{verdict}\"");
        assert_eq!(rig.counted("tidegate_attempts", &labels), row.attempts, "{labels}");
        assert_eq!(rig.counted("tidegate_retries", &subscription), row.attempts - 1, "{labels}");
        let dead = u64::from(row.status == Status::Failed);
        assert_eq!(rig.counted("tidegate_dead_letters", &subscription), dead, "{labels}");
        let so_far = by_plugin.entry((row.plugin, row.verdict)).or_default();
        *so_far += row.attempts;
        let labels = format!("plugin=\"{}\",digest=\"{digest}\",verdict=\"{verdict}\"", row.plugin);
        assert_eq!(rig.counted("tidegate_plugin_attempts", &labels), *so_far, "{labels}");
        seen.insert(row.verdict);
    }
    seen.extend([host_fault(&rig).await, lost(&rig).await]);
    assert_eq!(seen, BTreeSet::from(Verdict::ALL));
}

/// The one instance is taken by a guest that is parked in the host, so that others cannot begin: four times, and dead.
async fn host_fault(rig: &Rig) -> Verdict {
    let stalled = Arc::new(Stalled::default());
    let call = Call {
        event: Arc::new(event("parked", &json!({"fault": "kv-get", "key": "k"}))),
        subscription: "parked".into(),
        attempt: 1,
        max_attempts: 1,
        timeout: PATIENCE,
        is_replay: false,
        kv: Arc::clone(&stalled) as Arc<dyn KvRead>,
    };
    let handler = rig.host.handler("faults");
    let parked = tokio::spawn(async move { handler.handle(call).await });
    stalled.asked.notified().await;
    rig.bind("busy", "busy", "slow").await;
    let detail = rig.handled(event("busy", &json!({"fault": "none"}))).await;
    parked.abort();
    let delivery = &detail.deliveries[0];
    assert_eq!((delivery.status, delivery.attempts.len()), (Status::Failed, 4), "{delivery:?}");
    for attempt in &delivery.attempts {
        let fault = attempt.error.as_ref().unwrap();
        assert_eq!((attempt.verdict, fault.code.as_str()), (Verdict::HostFault, "host-busy"));
        assert_eq!(attempt.trace.digest.as_deref(), Some(&*rig.digest("slow")));
    }
    let labels = "subscription=\"busy\",verdict=\"host-fault\"";
    assert_eq!(rig.counted("tidegate_attempts", labels), 4);
    let labels = format!("plugin=\"slow\",digest=\"{}\",verdict=\"host-fault\"", rig.digest("slow"));
    assert_eq!(rig.counted("tidegate_plugin_attempts", &labels), 4);
    Verdict::HostFault
}

/// Another process claims the delivery and dies, four times; this one finds out about the last.
async fn lost(rig: &Rig) -> Verdict {
    rig.broker.declare(Subscription::new("lost", "lost".parse().unwrap())).await.unwrap();
    let id = rig.broker.publish(event("lost", &json!({"fault": "none"}))).await.unwrap().id;
    let want = Want { subscription: "lost".into(), room: 1, ordering: Ordering::None };
    let request = ClaimRequest { worker: "dead".into(), lease: Duration::from_millis(1), wants: vec![want] };
    let until = Instant::now() + PATIENCE;
    let mut claims = 0;
    while claims < 4 {
        assert!(Instant::now() < until);
        claims += rig.provider.claim(&request).await.unwrap().leases.len();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.bind("lost", "lost", "faults").await;
    let delivery = loop {
        let detail = rig.broker.event(id.as_str()).await.unwrap();
        if detail.record.status.is_terminal() {
            break detail.deliveries.into_iter().next().unwrap();
        }
        assert!(Instant::now() < until, "{detail:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!((delivery.status, delivery.attempts.len()), (Status::Failed, 4), "{delivery:?}");
    for attempt in &delivery.attempts {
        assert_eq!((attempt.verdict, &*attempt.worker), (Verdict::Lost, "dead"));
        assert_eq!(attempt.error.as_ref().map(|fault| &*fault.code), Some("lost"));
    }
    assert_eq!(rig.counted("tidegate_attempts", "subscription=\"lost\",verdict=\"lost\""), 1);
    assert_eq!(rig.counted("tidegate_dead_letters", "subscription=\"lost\""), 1);
    Verdict::Lost
}

#[tokio::test]
async fn a_guest_is_called_again_when_it_asks_and_as_late_as_it_asks() {
    let rig = Rig::start(16).await;
    rig.bind("again", "again.*", "faults").await;
    let detail = rig.handled(event("again.once", &json!({"fault": "fail", "times": 1}))).await;
    let verdicts: Vec<_> = detail.deliveries[0].attempts.iter().map(|attempt| attempt.verdict).collect();
    assert_eq!((detail.record.status, verdicts), (Status::Completed, vec![Verdict::Retry, Verdict::Ok]));
    assert_eq!(detail.record.retry_count, 1);

    let detail = rig.handled(event("again.late", &json!({"fault": "retry", "after_ms": 60}))).await;
    let [first, second] = &detail.deliveries[0].attempts[..] else { panic!("{detail:?}") };
    let pause = second.started_at.duration_since(first.started_at);
    assert!(pause.as_millis() >= 60, "the policy's delay is 5 ms: {pause}");
    assert_eq!(detail.record.status, Status::Failed);
}

/// A plugin that subscribes to what it publishes.
#[tokio::test]
async fn a_guest_that_calls_itself_by_publishing_comes_to_an_end() {
    let rig = Rig::start(4).await;
    rig.bind("ring", "faulty.**", "faults").await;
    let again = json!({"fault": "republish", "event_type": "faulty.chain.next"});
    let first = rig.handled(event("faulty.chain.first", &again)).await;
    assert_eq!(first.record.status, Status::Completed);
    let until = Instant::now() + PATIENCE;
    let letter = loop {
        let dead = rig.broker.dead_letters(&DeadLetterFilter { limit: 9, ..Default::default() }).await.unwrap();
        if let Some(letter) = dead.letters.into_iter().next() {
            break letter;
        }
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let [attempt] = &letter.delivery.attempts[..] else { panic!("{letter:?}") };
    let fault = attempt.error.as_ref().unwrap();
    assert_eq!((attempt.verdict, fault.code.as_str()), (Verdict::Denied, "too-deep"));
    assert_eq!(attempt.trace.digest.as_deref(), Some(&*rig.digest("faults")));
    assert!(fault.message.contains(": faulty.chain.first → faulty.chain.next → "), "{}", fault.message);
    assert_eq!(fault.details.len(), 5, "{fault:?}");
    assert_eq!(rig.provider.stats().await.unwrap().head_seq, 5);
}
