//! Plugins as a host runs them: every verdict, what they may do, and that one cannot harm another.
//!
//! The guests are the built samples; a manifest of another wording makes another version of the same code.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tidegate::delivery::{KvChange, KvWrite};
use tidegate::host::component::embed_manifest;
use tidegate::host::{CodeCache, Host, Options};
use tidegate::{Call, Handler, Verdict};
use tokio::sync::Semaphore;

use crate::support::guests::{
    FAULTS, GRANTS, Gate, METERED, Values, attempt, call, code, faults, guest, host, loaded, reply,
};

#[tokio::test]
async fn every_way_to_end_has_its_verdict() {
    let host = host();
    let handler = loaded(&host, METERED).await;
    let rows = [
        (json!({"fault": "none"}), Verdict::Ok, ""),
        (json!({"fault": "retry", "code": "busy"}), Verdict::Retry, "busy"),
        (json!({"fault": "reject", "code": "no"}), Verdict::Reject, "no"),
        (json!({"fault": "trap"}), Verdict::Trap, "trap"),
        (json!({"fault": "panic"}), Verdict::Trap, "trap"),
        (json!({"fault": "stack-overflow"}), Verdict::Trap, "trap"),
        (json!({"fault": "deep-calls"}), Verdict::Trap, "trap"),
        (json!({"fault": "loop"}), Verdict::OutOfFuel, "out-of-fuel"),
        (json!({"fault": "memory"}), Verdict::OutOfMemory, "out-of-memory"),
        (json!({"fault": "reply", "bytes": 65_537}), Verdict::Reject, "reply-too-large"),
        (json!({"fault": "reply", "bytes": 65_536}), Verdict::Ok, ""),
        (json!({"fault": "none"}), Verdict::Ok, ""),
    ];
    for (payload, verdict, expected) in rows {
        let outcome = attempt(&handler, payload.clone()).await;
        assert_eq!((outcome.verdict, code(&outcome)), (verdict, expected), "{payload}: {outcome:?}");
        assert!(outcome.trace.digest.as_ref().is_some_and(|digest| digest.starts_with("sha256:")), "{payload}");
        assert!(outcome.trace.fuel.is_some_and(|fuel| fuel > 0), "{payload}");
        assert!(outcome.trace.peak_memory.is_some_and(|peak| peak > 0 && peak <= 64 << 20), "{payload}");
    }
}

/// Fuel is counted where manifest or operator set a limit to it, and costs nothing elsewhere.
#[tokio::test]
async fn fuel_is_counted_for_those_who_have_a_budget_of_it() {
    const OPERATORS: &str = "[limits]\nfuel = 400000000\n";
    let rows = [("", "", None), ("", METERED, Some(500_000_000)), (OPERATORS, "", Some(400_000_000))];
    for (operator, manifest, budget) in rows {
        let mut options: Options = toml::from_str(operator).unwrap();
        options.plugins.insert("faults".to_owned(), toml::from_str(GRANTS).unwrap());
        let host = Host::new(options, None).unwrap();
        let handler = loaded(&host, manifest).await;
        assert_eq!(host.status("faults").unwrap().active.unwrap().limits.fuel, budget);
        let done = attempt(&handler, json!({"fault": "none"})).await;
        assert_eq!((done.verdict, done.trace.fuel.is_some()), (Verdict::Ok, budget.is_some()), "{done:?}");
        let short = Duration::from_millis(if budget.is_some() { 30_000 } else { 50 });
        let endless = handler.handle(Call { timeout: short, ..call(&json!({"fault": "loop"})) }).await;
        let verdict = if budget.is_some() { Verdict::OutOfFuel } else { Verdict::Timeout };
        assert_eq!((endless.verdict, endless.trace.fuel), (verdict, budget), "{endless:?}");
    }
}

#[tokio::test]
async fn a_delay_that_the_handler_asks_for_is_handed_on() {
    let host = host();
    let handler = loaded(&host, "").await;
    let outcome = attempt(&handler, json!({"fault": "retry", "after_ms": 1500})).await;
    assert_eq!(outcome.retry_after, Some(Duration::from_millis(1500)));
}

#[tokio::test]
async fn a_trap_comes_with_the_guests_functions_and_its_last_words() {
    let host = host();
    let handler = loaded(&host, "").await;
    let outcome = attempt(&handler, json!({"fault": "trap"})).await;
    let backtrace = outcome.trace.backtrace.join("\n");
    assert!(backtrace.contains("::perform") && backtrace.contains("handler@1.0.0#handle"), "{backtrace}");
    let outcome = attempt(&handler, json!({"fault": "panic", "bytes": 3})).await;
    assert!(outcome.trace.log.iter().any(|line| line.level == 4 && line.message.contains("ppp")), "{outcome:?}");
}

#[tokio::test]
async fn of_a_long_log_the_end_is_kept() {
    let host = host();
    let handler = loaded(&host, "[limits]\nlog = \"1KiB\"\n").await;
    let outcome = attempt(&handler, json!({"fault": "log", "lines": 1000})).await;
    assert_eq!(outcome.verdict, Verdict::Ok);
    let log = &outcome.trace.log;
    assert_eq!(log.first().map(|line| &*line.message), Some("earlier lines were cut"));
    assert_eq!(log.last().unwrap().fields, [("line".to_owned(), "999".to_owned())]);
    assert!(log.len() < 20, "{}", log.len());
}

/// Invariant 6: an endless loop ends that attempt only. Here it even shares the only thread with the other call.
#[tokio::test]
async fn an_endless_loop_ends_as_a_timeout_while_another_plugin_goes_on() {
    let host = host();
    let handler = loaded(&host, "").await;
    let audit = host.load("audit-trail.wasm", guest("audit-trail").into()).await.unwrap();

    let endless = tokio::spawn({
        let handler = Arc::clone(&handler);
        async move { handler.handle(call(&json!({"fault": "loop"}))).await }
    });
    tokio::task::yield_now().await;
    let other = audit.handle(call(&json!({"id": 1}))).await;
    assert_eq!(other.verdict, Verdict::Ok, "{other:?}");
    assert!(!endless.is_finished());
    endless.abort();
    assert!(endless.await.unwrap_err().is_cancelled(), "a guest that computes ends when it is dropped");

    for fault in ["loop", "loop-in-host"] {
        let outcome =
            handler.handle(Call { timeout: Duration::from_millis(50), ..call(&json!({"fault": fault})) }).await;
        assert_eq!((outcome.verdict, code(&outcome)), (Verdict::Timeout, "timeout"), "{outcome:?}");
        assert!(!outcome.trace.backtrace.is_empty(), "the epoch knows where it was");
    }
    assert_eq!(attempt(&handler, json!({"fault": "none"})).await.verdict, Verdict::Ok);
}

#[tokio::test]
async fn the_shorter_timeout_of_subscription_and_plugin_counts() {
    let host = host();
    let handler = loaded(&host, "[limits]\ntimeout = \"50ms\"\n").await;
    let outcome = attempt(&handler, json!({"fault": "loop"})).await;
    assert_eq!(outcome.verdict, Verdict::Timeout);
    assert!(outcome.fault.unwrap().message.contains("50ms"));
}

/// Counts how often a task is woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A task that wakes itself is ready again before the runtime has looked at timers and sockets, which it then does after
/// every 61st only.
#[tokio::test]
async fn a_guest_that_computes_goes_on_after_timers_and_sockets_had_their_turn() {
    let host = host();
    let handler = loaded(&host, "").await;
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut endless = handler.handle(call(&json!({"fault": "loop"})));
    for turn in 0..3 {
        assert!(endless.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!(wakes.0.load(Ordering::SeqCst), turn, "the runtime has not looked yet");
        tokio::task::yield_now().await;
        assert_eq!(wakes.0.load(Ordering::SeqCst), turn + 1);
    }
}

#[tokio::test]
async fn a_guest_that_waits_for_the_host_is_ended_by_the_timer() {
    let host = host();
    let handler = loaded(&host, METERED).await;
    let payload = json!({"fault": "kv-get", "key": "k"});
    let waiting = Call { kv: Arc::new(Gate::default()), timeout: Duration::from_millis(20), ..call(&payload) };
    let outcome = handler.handle(waiting).await;
    assert_eq!((outcome.verdict, code(&outcome)), (Verdict::Timeout, "timeout"), "{outcome:?}");
    assert!(outcome.trace.digest.is_some() && outcome.trace.fuel.is_some_and(|fuel| fuel > 0), "{outcome:?}");
}

/// Invariant 6: a memory hog ends that attempt only.
#[tokio::test]
async fn a_memory_hog_ends_out_of_memory_and_leaves_nothing_behind() {
    let host = host();
    let handler = loaded(&host, "[limits]\nmemory = \"8MiB\"\n").await;
    for _ in 0..3 {
        let outcome = attempt(&handler, json!({"fault": "memory"})).await;
        assert_eq!(outcome.verdict, Verdict::OutOfMemory, "{outcome:?}");
        assert!(outcome.trace.peak_memory.is_some_and(|peak| peak > 4 << 20 && peak <= 8 << 20));
    }
    assert_eq!(attempt(&handler, json!({"fault": "memory", "mib": 4})).await.verdict, Verdict::Ok);
}

/// Attempts that look the same share what was seen of them, and no others do.
#[tokio::test]
async fn what_was_seen_of_an_attempt_is_never_that_of_another() {
    for (manifest, is_metered) in [("", false), (METERED, true)] {
        let host = host();
        let handler = loaded(&host, manifest).await;
        let seen = async |payload: Value| attempt(&handler, payload).await.trace;
        let plain = seen(json!({"fault": "none"})).await;
        let loud = seen(json!({"fault": "log", "lines": 2})).await;
        let large = seen(json!({"fault": "memory", "mib": 4})).await;
        assert_eq!((plain.log.len(), loud.log.len(), large.log.len()), (0, 2, 0));
        assert!(large.peak_memory > plain.peak_memory, "{large:?} {plain:?}");
        assert_eq!((large.fuel > plain.fuel, plain.fuel.is_some()), (is_metered, is_metered), "{large:?} {plain:?}");
        assert_eq!(seen(json!({"fault": "none"})).await, plain);
    }
}

#[tokio::test]
async fn every_event_gets_a_fresh_instance() {
    let host = host();
    let handler = loaded(&host, "").await;
    for _ in 0..2 {
        assert_eq!(reply(&attempt(&handler, json!({"fault": "instance"})).await), 1);
    }
}

#[tokio::test]
async fn a_guest_is_told_about_its_attempt_and_its_event() {
    let host = host();
    let handler = loaded(&host, "").await;
    let call = Call { attempt: 2, is_replay: true, ..call(&json!({"fault": "facts"})) };
    let (id, key) = (call.event.id.to_string(), call.idempotency_key());
    let facts = reply(&handler.handle(call).await);
    assert_eq!(facts["subscription"], "tests");
    assert_eq!((&facts["attempt"], &facts["max_attempts"]), (&json!(2), &json!(4)));
    assert_eq!((&facts["idempotency_key"], &facts["is_replay"]), (&json!(key), &json!(true)));
    assert!(facts["remaining_ms"].as_u64().is_some_and(|ms| ms > 0 && ms <= 30_000), "{facts}");
    assert_eq!(facts["greeting"], "hello");
    assert_eq!((&facts["event"]["id"], &facts["event"]["sequence"]), (&json!(id), &json!(7)));
    assert_eq!((&facts["event"]["type"], &facts["event"]["source"]), (&json!("faults.tests.create"), &json!("system")));
}

/// Invariant 8: what a handler publishes and writes commits with its success, or not at all.
#[tokio::test]
async fn effects_leave_with_success_only() {
    let host = host();
    let handler = loaded(&host, METERED).await;
    let steps = |last: &str| {
        json!({"fault": "steps", "steps": [
            {"fault": "kv-set", "key": "a", "value": "1"},
            {"fault": "publish", "count": 2},
            {"fault": last},
        ]})
    };
    let done = attempt(&handler, steps("none")).await;
    assert_eq!((done.effects.writes.len(), done.effects.published.len()), (1, 2));
    assert_eq!(done.effects.published[0].event_type.as_str(), "faulty.events.create");
    for failing in ["retry", "reject", "trap", "loop"] {
        let failed = attempt(&handler, steps(failing)).await;
        assert!(failed.effects.writes.is_empty() && failed.effects.published.is_empty(), "{failing}");
    }
}

#[tokio::test]
async fn an_attempt_reads_its_own_writes_before_what_is_committed() {
    let host = host();
    let handler = loaded(&host, "").await;
    let committed: HashMap<String, Bytes> = [("n".to_owned(), "40".into()), ("t".to_owned(), "x".into())].into();
    let with = |payload: Value| Call { kv: Arc::new(Values(committed.clone())), ..call(&payload) };

    let increment = json!({"fault": "kv-increment", "key": "n", "by": 1});
    let outcome = handler.handle(with(json!({"fault": "steps", "steps": [increment, increment]}))).await;
    assert_eq!(reply(&outcome), 42);
    let add = KvWrite { bucket: "kv/faults/faults".into(), key: "n".into(), change: KvChange::Increment { by: 1 } };
    assert_eq!(outcome.effects.writes, [add.clone(), add]);

    let get = json!({"fault": "kv-get", "key": "t"});
    assert_eq!(reply(&handler.handle(with(get.clone())).await), "x");
    let rows = [
        (json!({"fault": "kv-set", "key": "t", "value": "y"}), json!("y")),
        (json!({"fault": "kv-delete", "key": "t"}), Value::Null),
    ];
    for (write, expected) in rows {
        let outcome = handler.handle(with(json!({"fault": "steps", "steps": [write, get]}))).await;
        assert_eq!(reply(&outcome), expected);
    }
    let odd = handler.handle(with(json!({"fault": "kv-increment", "key": "t", "by": 1}))).await;
    assert_eq!((odd.verdict, code(&odd)), (Verdict::Reject, "invalid-value"));
}

/// Invariant 10: a plugin can do nothing that the operator did not grant.
#[tokio::test]
async fn what_is_not_granted_is_denied() {
    let host = host();
    let handler = loaded(&host, "").await;
    let rows = [
        json!({"fault": "kv-get", "bucket": "other", "key": "k"}),
        json!({"fault": "kv-set", "bucket": "other", "key": "k", "value": ""}),
        json!({"fault": "kv-delete", "bucket": "other", "key": "k"}),
        json!({"fault": "kv-increment", "bucket": "other", "key": "k", "by": 1}),
        json!({"fault": "publish", "count": 1, "event_type": "shop.orders.create"}),
    ];
    for payload in rows {
        let outcome = attempt(&handler, payload.clone()).await;
        assert_eq!((outcome.verdict, code(&outcome)), (Verdict::Reject, "denied"), "{payload}");
        assert!(outcome.effects.writes.is_empty() && outcome.effects.published.is_empty());
    }
    // A setting that was not requested cannot be answered with a fault: it ends the attempt.
    let other = FAULTS.replace("greeting", "other");
    let plugin = host.load("faults.wasm", embed_manifest(&guest("faults"), &other).unwrap().into()).await.unwrap();
    let outcome = plugin.handle(call(&json!({"fault": "facts"}))).await;
    assert_eq!((outcome.verdict, code(&outcome)), (Verdict::Denied, "denied"), "{outcome:?}");
    assert!(outcome.fault.unwrap().message.contains("greeting"));
}

const TIGHT: &str = r#"
    [limits]
    published_events = 3
    published_bytes = "1KiB"
    kv_operations = 3
    kv_bytes = "1KiB"
    host_calls = 50
    reply = "1KiB"
"#;

/// What a guest reaches of its limits, and what one step more is answered with. Beyond them nothing is left of the
/// attempt.
#[tokio::test]
async fn every_limit_is_held_against_a_guest_that_passes_it() {
    let repeat = |times: usize, step: Value| json!({"fault": "repeat", "times": times, "step": step});
    let get = |key: &str| json!({"fault": "kv-get", "key": key});
    let set = |bytes: usize| json!({"fault": "kv-set", "key": "k", "value": "v".repeat(bytes)});
    let increment = || json!({"fault": "kv-increment", "key": "n", "by": 1});
    let publish = |count: usize, bytes: usize| json!({"fault": "publish", "count": count, "bytes": bytes});
    let reply = |bytes: usize| json!({"fault": "reply", "bytes": bytes});
    let log = |lines: usize| json!({"fault": "log", "lines": lines});
    let rows = [
        (publish(3, 0), publish(4, 0), Verdict::Reject, "too-many", "3 events (limits.published_events)"),
        (publish(2, 480), publish(3, 480), Verdict::Reject, "too-large", "1.0 KiB of events (limits.published_bytes)"),
        (repeat(3, get("none")), repeat(4, get("none")), Verdict::Reject, "too-many", "3 times (limits.kv_operations)"),
        (repeat(3, set(1)), repeat(4, set(1)), Verdict::Reject, "too-many", "limits.kv_operations"),
        (repeat(3, increment()), repeat(4, increment()), Verdict::Reject, "too-many", "limits.kv_operations"),
        (repeat(2, set(511)), repeat(3, set(511)), Verdict::Reject, "too-large", "(limits.kv_bytes)"),
        (repeat(2, get("half")), repeat(3, get("half")), Verdict::Reject, "too-large", "(limits.kv_bytes)"),
        (reply(1024), reply(1025), Verdict::Reject, "reply-too-large", "limit of 1024"),
        (log(50), log(51), Verdict::OutOfFuel, "too-many-host-calls", "50 times (limits.host_calls)"),
    ];
    let half: HashMap<String, Bytes> = [("half".to_owned(), Bytes::from(vec![b'h'; 512]))].into();
    let host = host();
    let handler = loaded(&host, TIGHT).await;
    for (within, beyond, verdict, expected, words) in rows {
        let with = |payload: &Value| Call { kv: Arc::new(Values(half.clone())), ..call(payload) };
        let outcome = handler.handle(with(&within)).await;
        assert_eq!(outcome.verdict, Verdict::Ok, "{within}: {outcome:?}");
        let outcome = handler.handle(with(&beyond)).await;
        assert_eq!((outcome.verdict, code(&outcome)), (verdict, expected), "{beyond}: {outcome:?}");
        assert!(outcome.fault.as_ref().unwrap().message.contains(words), "{outcome:?}");
        assert!(outcome.effects.writes.is_empty() && outcome.effects.published.is_empty(), "{outcome:?}");
    }
}

/// The operator's limits are wider here than the server's defaults, and a manifest's own are not obeyed beyond them.
#[tokio::test]
async fn the_stricter_of_operator_and_manifest_counts() {
    let mut options = Options::default();
    let own = GRANTS.replace("limits = {", "limits = { kv_operations = 2, published_events = 200,");
    options.plugins.insert("faults".to_owned(), toml::from_str(&own).unwrap());
    let host = Host::new(options, None).unwrap();
    let handler = loaded(&host, "[limits]\nkv_operations = 5\npublished_events = 150\n").await;
    let publish = |count: usize| json!({"fault": "publish", "count": count});
    let get = |times: usize| json!({"fault": "repeat", "times": times, "step": {"fault": "kv-get", "key": "k"}});
    for (payload, expected) in [(publish(150), ""), (publish(151), "too-many"), (get(2), ""), (get(3), "too-many")] {
        assert_eq!(code(&attempt(&handler, payload.clone()).await), expected, "{payload}");
    }
}

#[tokio::test]
async fn an_event_larger_than_the_server_takes_is_refused_where_it_is_published() {
    let mut options = Options { max_payload: 1024, ..Options::default() };
    options.plugins.insert("faults".to_owned(), toml::from_str(GRANTS).unwrap());
    let handler = loaded(&Host::new(options, None).unwrap(), "").await;
    let outcome = attempt(&handler, json!({"fault": "publish", "count": 1, "bytes": 1024})).await;
    assert_eq!((outcome.verdict, code(&outcome)), (Verdict::Reject, "too-large"), "{outcome:?}");
    let fault = outcome.fault.unwrap();
    assert!(fault.message.contains("payload") && fault.message.contains("1024"), "{fault:?}");
}

/// A guest that does nothing but call the host uses next to no fuel, and would keep the host busy until its time is up.
#[tokio::test]
async fn a_guest_that_only_calls_the_host_is_ended_by_its_calls() {
    let host = host();
    let handler = loaded(&host, "[limits]\nhost_calls = 1000\n").await;
    let outcome = attempt(&handler, json!({"fault": "loop-in-host"})).await;
    assert_eq!((outcome.verdict, code(&outcome)), (Verdict::OutOfFuel, "too-many-host-calls"), "{outcome:?}");
    assert!(outcome.trace.backtrace.iter().any(|frame| frame.contains("::perform")), "{outcome:?}");
}

#[tokio::test]
async fn a_plugin_without_its_grants_is_not_loaded() {
    let host = Host::new(Options::default(), None).unwrap();
    let refused = host.load("faults.wasm", faults("").into()).await.map(|_| ()).unwrap_err().to_string();
    let lines = r#"add kv = ["faults"] and events = ["faulty.**"] and config = ["greeting", "self-check"] to [plugins.faults.grants]"#;
    assert!(refused.contains(lines), "{refused}");
    let unasked = embed_manifest(&guest("faults"), "name = \"faults\"\nversion = \"1.0.0\"\n").unwrap();
    let refused = host.load("faults.wasm", unasked.into()).await.map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("without requesting it"), "{refused}");
}

/// Invariant 7: in-flight attempts finish on the version that they started with.
#[tokio::test]
async fn a_call_in_progress_finishes_on_its_version() {
    let host = host();
    let handler = loaded(&host, "").await;
    let old = Arc::clone(host.active("faults").unwrap().digest());
    let gate = Arc::new(Gate::default());
    let waiting = Call {
        kv: Arc::clone(&gate) as Arc<dyn tidegate::handler::KvRead>,
        ..call(&json!({"fault": "kv-get", "key": "k"}))
    };
    let in_progress = tokio::spawn({
        let handler = Arc::clone(&handler);
        async move { handler.handle(waiting).await }
    });
    gate.asked.notified().await;
    loaded(&host, "# another version\n").await;
    let new = Arc::clone(host.active("faults").unwrap().digest());
    assert_ne!(old, new);
    gate.open.notify_one();
    let outcome = in_progress.await.unwrap();
    assert_eq!((outcome.verdict, outcome.trace.digest.as_deref()), (Verdict::Ok, Some(&*old)));
    assert_eq!(attempt(&handler, json!({"fault": "none"})).await.trace.digest, Some(new));
    host.remove("faults");
    assert_eq!(code(&attempt(&handler, json!({"fault": "none"})).await), "no-active-version");
}

#[tokio::test]
async fn more_attempts_than_instances_wait_for_their_turn() {
    let mut options = Options { instances: std::num::NonZeroU32::MIN, ..Options::default() };
    options.plugins.insert("faults".to_owned(), toml::from_str(GRANTS).unwrap());
    let host = Host::new(options, None).unwrap();
    let handler = loaded(&host, "").await;
    let finished = Arc::new(Semaphore::new(0));
    for _ in 0..8 {
        let (handler, finished) = (Arc::clone(&handler), Arc::clone(&finished));
        tokio::spawn(async move {
            let outcome = attempt(&handler, json!({"fault": "none"})).await;
            assert_eq!(outcome.verdict, Verdict::Ok);
            finished.add_permits(1);
        });
    }
    finished.acquire_many(8).await.unwrap().forget();
}

#[tokio::test]
async fn a_cache_spares_the_second_compilation_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("code");
    let mut written = Vec::new();
    for _ in 0..2 {
        let mut options = Options { cache: CodeCache::Folder(cache.clone()), ..Options::default() };
        options.plugins.insert("faults".to_owned(), toml::from_str(GRANTS).unwrap());
        let handler = loaded(&Host::new(options, None).unwrap(), "").await;
        assert_eq!(attempt(&handler, json!({"fault": "none"})).await.verdict, Verdict::Ok);
        assert!(attempt(&handler, json!({"fault": "trap"})).await.trace.backtrace[0].contains("::perform"));
        let files = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
        written.push(files.map(|file| file.ino()).collect::<Vec<_>>());
    }
    assert_eq!(written[0].len(), 1);
    assert_eq!(written[0], written[1], "the second host wrote nothing");
}

/// Somebody who never heard of the cache is served without one; somebody who names a folder gets that folder or an error.
#[test]
fn a_cache_folder_that_cannot_be_used_stops_only_those_who_asked_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    std::fs::write(path("file"), "").unwrap();
    let audit = super::support::server::built_plugins().join("audit-trail.wasm");
    let check = |environment: &[(&str, String)]| {
        let mut tidegate = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        tidegate.args(["plugin", "check"]).arg(&audit).current_dir(folder.path()).env_clear();
        tidegate.envs(environment.iter().cloned()).output().unwrap()
    };
    let compiled = |folder: &str| std::fs::read_dir(path(folder)).map_or(0, |entries| entries.count());

    let unusable = check(&[("XDG_CACHE_HOME", path("file"))]);
    assert!(unusable.status.success(), "{unusable:?}");
    let usable = check(&[("XDG_CACHE_HOME", path("caches"))]);
    assert!(usable.status.success() && compiled("caches/tidegate") == 1, "{usable:?}");
    let off = check(&[("XDG_CACHE_HOME", path("none")), ("TIDEGATE_HOST__CACHE", "off".to_owned())]);
    assert!(off.status.success() && !Path::new(&path("none")).exists(), "{off:?}");
    let homeless = check(&[]);
    assert!(homeless.status.success(), "{homeless:?}");
    let named = check(&[("TIDEGATE_HOST__CACHE", path("file"))]);
    let said = String::from_utf8_lossy(&named.stderr);
    assert!(named.status.code() == Some(2) && said.contains("host.cache: cannot be used"), "{named:?}");
}

/// What a test does again in a process of its own is said by this variable.
const CONFINED: &str = "TIDEGATE_TEST_WITHOUT_POOL";

/// The pool takes terabytes of address space, and a single guest a little more than four gigabytes.
#[test]
fn without_address_space_for_a_pool_instances_are_allocated_one_by_one() {
    if std::env::var_os(CONFINED).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let host = host();
            let handler = loaded(&host, "").await;
            for (fault, verdict) in [("none", Verdict::Ok), ("trap", Verdict::Trap), ("none", Verdict::Ok)] {
                assert_eq!(attempt(&handler, json!({"fault": fault})).await.verdict, verdict);
            }
        });
        return;
    }
    let name = "host::without_address_space_for_a_pool_instances_are_allocated_one_by_one";
    let limited = |kilobytes: u64| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -v {kilobytes} && exec \"$0\" \"$@\"")]);
        shell.arg(std::env::current_exe().unwrap()).args([name, "--exact", "--nocapture"]);
        shell.env(CONFINED, "1").output().unwrap()
    };
    let answer = limited(16 << 20);
    let said = String::from_utf8_lossy(&answer.stdout);
    assert!(
        answer.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&answer.stderr)
    );
    // The limit bites: with less than one guest needs, nothing runs.
    assert!(!limited(3 << 20).status.success());
}
