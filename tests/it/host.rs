//! Plugins as a host runs them: every verdict, what they may do, and that one cannot harm another.
//!
//! The guests are the built samples; a manifest of another wording makes another version of the same code.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use tidegate::delivery::{KvChange, KvWrite};
use tidegate::handler::{KvRead, Outcome};
use tidegate::host::component::embed_manifest;
use tidegate::host::{CodeCache, Host, Options, PluginOptions};
use tidegate::{Call, Event, Handler, Payload, Result, Source, Verdict};
use tokio::sync::{Notify, Semaphore};

/// A built sample.
pub(crate) fn guest(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/plugins/{name}.wasm"));
    match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) => panic!("{} cannot be read ({error}): run `make plugins` first", path.display()),
    }
}

pub(crate) const FAULTS: &str = r#"
    name = "faults"
    version = "1.0.0"
    [capabilities]
    kv = ["faults"]
    events = ["faulty.**"]
    config = ["greeting", "self-check"]
"#;

pub(crate) const GRANTS: &str = r#"
    grants = { kv = ["faults"], events = ["faulty.**"], config = ["greeting", "other", "self-check"] }
    config = { greeting = "hello" }
    limits = { fuel = 1000000000000, host_calls = 1000000000000 }
"#;

/// The misbehaving guest with this much added to its manifest.
pub(crate) fn faults(more: &str) -> Vec<u8> {
    embed_manifest(&guest("faults"), &format!("{FAULTS}{more}")).unwrap()
}

/// A host that grants what the misbehaving guest asks for.
pub(crate) fn host() -> Host {
    let mut options = Options::default();
    options.plugins.insert("faults".to_owned(), toml::from_str::<PluginOptions>(GRANTS).unwrap());
    Host::new(options, None).unwrap()
}

/// The misbehaving guest, loaded with this much added to its manifest.
async fn loaded(host: &Host, more: &str) -> Arc<dyn Handler> {
    let plugin = host.load("faults.wasm", faults(more).into()).await.unwrap();
    host.handler(host.activate(plugin).name())
}

/// Committed values by key.
#[derive(Default)]
struct Values(HashMap<String, Bytes>);

#[async_trait]
impl KvRead for Values {
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        assert_eq!(bucket, "kv/faults/faults");
        Ok(self.0.get(key).cloned())
    }
}

/// A store that says when it is asked, and answers when it is let.
#[derive(Default)]
struct Gate {
    asked: Notify,
    open: Notify,
}

#[async_trait]
impl KvRead for Gate {
    async fn get(&self, _: &str, _: &str) -> Result<Option<Bytes>> {
        self.asked.notify_one();
        self.open.notified().await;
        Ok(None)
    }
}

fn call(payload: &Value) -> Call {
    let mut event = Event::new(Source::System, "faults.tests.create".parse().unwrap(), Payload::json(payload).unwrap());
    event.seq = Some(7);
    Call {
        event: Arc::new(event),
        subscription: "tests".into(),
        attempt: 1,
        max_attempts: 4,
        timeout: Duration::from_secs(30),
        is_replay: false,
        kv: Arc::new(Values::default()),
    }
}

async fn attempt(handler: &Arc<dyn Handler>, payload: Value) -> Outcome {
    handler.handle(call(&payload)).await
}

fn code(outcome: &Outcome) -> &str {
    outcome.fault.as_ref().map_or("", |fault| &fault.code)
}

fn reply(outcome: &Outcome) -> Value {
    let reply = outcome.reply.as_ref().unwrap_or_else(|| panic!("no reply: {outcome:?}"));
    serde_json::from_slice(&reply.body).unwrap()
}

/// The server's default, where the operator of these tests allows far more.
const LEAN: &str = "[limits]\nfuel = 500000000\n";

#[tokio::test]
async fn every_way_to_end_has_its_verdict() {
    let host = host();
    let handler = loaded(&host, LEAN).await;
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

#[tokio::test]
async fn a_guest_that_waits_for_the_host_is_ended_by_the_timer() {
    let host = host();
    let handler = loaded(&host, "").await;
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
    let handler = loaded(&host, LEAN).await;
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
    let waiting = Call { kv: Arc::clone(&gate) as Arc<dyn KvRead>, ..call(&json!({"fault": "kv-get", "key": "k"})) };
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
    assert_eq!((outcome.verdict, outcome.trace.digest), (Verdict::Ok, Some(old)));
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

/// The misbehaving guest under `options`, with this before and after the usual lines of its manifest.
async fn prepared(options: &str, before: &str, after: &str) -> Result<(Host, Arc<dyn Handler>)> {
    let mut all = Options::default();
    all.plugins.insert("faults".to_owned(), toml::from_str(&format!("{options}{GRANTS}")).unwrap());
    let host = Host::new(all, None).unwrap();
    let manifest = format!("{before}\n{FAULTS}{after}");
    let plugin = host.load("faults.wasm", embed_manifest(&guest("faults"), &manifest).unwrap().into()).await?;
    let handler = host.handler(host.activate(plugin).name());
    Ok((host, handler))
}

async fn batch(handler: &Arc<dyn Handler>, payloads: &[Value]) -> Option<Vec<Outcome>> {
    handler.handle_batch(payloads.iter().map(call).collect()).await
}

#[tokio::test]
async fn a_batch_has_a_verdict_for_each_event_and_each_keeps_what_is_its_own() {
    let host = host();
    let handler = loaded(&host, "").await;
    assert_eq!(handler.max_batch(), 64);
    let calls: Vec<Call> = [
        json!({"fault": "kv-increment", "key": "n", "by": 2}),
        json!({"fault": "steps", "steps": [{"fault": "publish", "count": 2}, {"fault": "reject", "code": "no"}]}),
        json!({"fault": "kv-increment", "key": "n", "by": 3}),
        json!({"fault": "retry", "after_ms": 1500}),
        json!({"fault": "log", "lines": 2}),
        json!({"fault": "publish", "count": 1}),
        json!({"fault": "facts"}),
    ]
    .iter()
    .map(call)
    .collect();
    let key = calls[6].idempotency_key();
    let outcomes = handler.handle_batch(calls).await.unwrap();
    let verdicts: Vec<_> = outcomes.iter().map(|outcome| outcome.verdict).collect();
    use Verdict::{Ok, Reject, Retry};
    assert_eq!(verdicts, [Ok, Reject, Ok, Retry, Ok, Ok, Ok]);
    assert_eq!((reply(&outcomes[0]), reply(&outcomes[2])), (json!(2), json!(3)), "none sees what another writes");
    let effects = |index: usize| (outcomes[index].effects.writes.len(), outcomes[index].effects.published.len());
    assert_eq!([0, 1, 2, 4, 5].map(effects), [(1, 0), (0, 0), (1, 0), (0, 0), (0, 1)]);
    assert_eq!(outcomes[3].retry_after, Some(Duration::from_millis(1500)));
    let lines: Vec<_> = outcomes.iter().map(|outcome| outcome.trace.log.len()).collect();
    assert_eq!(lines, [0, 0, 0, 0, 2, 0, 0]);
    assert_eq!(reply(&outcomes[6])["idempotency_key"], key);
    assert!(outcomes.iter().all(|outcome| outcome.trace.digest.is_some() && outcome.trace.fuel > Some(0)));
}

/// Invariant 6: a trap, an endless loop or a memory hog ends that attempt only, also in a batch.
#[tokio::test]
async fn a_batch_that_ends_without_verdicts_decides_nothing() {
    let host = host();
    let limits = "[limits]\ntimeout = \"300ms\"\nmemory = \"8MiB\"\n";
    let handler = loaded(&host, limits).await;
    let write = json!({"fault": "kv-set", "key": "k", "value": "v"});
    let whole = |how: &str| json!({"fault": "batch", "how": how});
    let rows = [
        (json!({"fault": "trap"}), Verdict::Trap),
        (json!({"fault": "panic"}), Verdict::Trap),
        (json!({"fault": "loop"}), Verdict::Timeout),
        (json!({"fault": "memory"}), Verdict::OutOfMemory),
        (whole("short"), Verdict::Ok),
        (whole("far"), Verdict::Ok),
    ];
    for (fault, verdict) in rows {
        assert_eq!(batch(&handler, &[fault.clone(), write.clone()]).await, None, "{fault}");
        assert_eq!(attempt(&handler, fault.clone()).await.verdict, verdict, "{fault}");
    }
    let outcomes = batch(&handler, &[write.clone(), write]).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.effects.writes.len() == 1));
}

#[tokio::test]
async fn turns_come_in_any_order_and_before_the_first_nothing_is_published() {
    let host = host();
    let handler = loaded(&host, "").await;
    let whole = |how: &str| json!({"fault": "batch", "how": how});
    let log = json!({"fault": "log", "lines": 1});
    let write = json!({"fault": "kv-set", "key": "k", "value": "v"});
    let outcomes = batch(&handler, &[whole("backwards"), log.clone(), write.clone()]).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.verdict == Verdict::Ok), "{outcomes:?}");
    let own: Vec<_> = outcomes.iter().map(|one| (one.trace.log.len(), one.effects.writes.len())).collect();
    assert_eq!(own, [(0, 0), (1, 0), (0, 1)]);

    let outcomes = batch(&handler, &[whole("early"), log, write]).await.unwrap();
    assert!(outcomes.iter().all(|one| (one.verdict, code(one)) == (Verdict::Retry, "no-turn")), "{outcomes:?}");
    let lines: Vec<_> = outcomes.iter().map(|one| one.trace.log.len()).collect();
    assert_eq!(lines, [3, 0, 0], "a line without a turn is the first event's");
}

#[tokio::test]
async fn a_batch_has_the_fuel_of_its_events_and_the_time_of_one() {
    let host = host();
    let handler = loaded(&host, "").await;
    let busy = json!({"fault": "log", "lines": 50});
    let used = attempt(&handler, busy.clone()).await.trace.fuel.unwrap();
    let handler = loaded(&host, &format!("[limits]\nfuel = {}\n", used + used / 10)).await;
    assert_eq!(attempt(&handler, json!({"fault": "log", "lines": 100})).await.verdict, Verdict::OutOfFuel);
    let outcomes = batch(&handler, &vec![busy; 16]).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.verdict == Verdict::Ok), "{outcomes:?}");

    let handler = loaded(&host, "[limits]\ntimeout = \"200ms\"\n").await;
    let spin = json!({"fault": "spin", "ms": 150});
    assert_eq!(attempt(&handler, spin.clone()).await.verdict, Verdict::Ok);
    assert_eq!(batch(&handler, &[spin.clone(), spin]).await, None);
}

#[tokio::test]
async fn a_batch_is_no_larger_than_agreed() {
    let none = json!({"fault": "none"});
    for (options, manifest, expected) in [("", "[batch]\nmax = 3\n", 3), ("batch = { max = 2 }", "", 2)] {
        let (_host, handler) = prepared(options, "", manifest).await.unwrap();
        assert_eq!(handler.max_batch(), expected);
        assert!(batch(&handler, &vec![none.clone(); expected]).await.is_some());
        assert_eq!(batch(&handler, &vec![none.clone(); expected + 1]).await, None);
    }
    // Payloads that would leave the guest no room are not tried together.
    let host = host();
    let handler = loaded(&host, "[limits]\nmemory = \"4MiB\"\n").await;
    let large = json!({"fault": "steps", "steps": [], "more": "x".repeat(600 << 10)});
    assert_eq!(batch(&handler, &[large.clone(), large]).await, None);
}

/// What a batch writes waits in memory together; alone each of these events would be within its bounds.
#[tokio::test]
async fn a_batch_that_writes_too_much_together_decides_nothing() {
    let host = host();
    let handler = loaded(&host, "").await;
    let large = json!({"fault": "kv-set", "key": "k", "value": "x".repeat(3 << 20)});
    assert_eq!(batch(&handler, &vec![large.clone(); 3]).await, None);
    assert_eq!(attempt(&handler, large.clone()).await.verdict, Verdict::Ok);
    let outcomes = batch(&handler, &[large.clone(), large]).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.effects.writes.len() == 1));
}

/// The misbehaving guest, whose self-check does what `how` says.
async fn checked(how: &str, more: &str) -> std::result::Result<(), String> {
    let mut options = Options::default();
    let mut own: PluginOptions = toml::from_str(GRANTS).unwrap();
    own.config.insert("self-check".to_owned(), how.to_owned());
    options.plugins.insert("faults".to_owned(), own);
    Host::new(options, None)
        .unwrap()
        .load("faults.wasm", faults(more).into())
        .await
        .map(drop)
        .map_err(|e| e.to_string())
}

/// Invariant 7: a candidate that finds fault with itself never serves.
#[tokio::test]
async fn a_self_check_that_does_not_pass_refuses_the_candidate_with_its_words() {
    for how in ["ok", "publish", "write"] {
        assert_eq!(checked(how, "").await, Ok(()), "{how}");
    }
    let rows = [
        ("no mail server", "", "self-check failed: asked to fail the self-check: no mail server"),
        ("trap", "", "self-check failed: trap: wasm trap: wasm `unreachable`"),
        ("loop", "[limits]\ntimeout = \"200ms\"\n", "self-check failed: timeout: "),
        ("loop", LEAN, "self-check failed: out-of-fuel: "),
    ];
    for (how, more, words) in rows {
        let refused = checked(how, more).await.unwrap_err();
        assert!(refused.starts_with("plugin faults: ") && refused.contains(words), "{refused}");
    }
}

/// How many events the instance has handled that handles this one.
async fn handled(handler: &Arc<dyn Handler>) -> Value {
    reply(&attempt(handler, json!({"fault": "instance"})).await)
}

#[tokio::test]
async fn an_instance_serves_as_many_events_as_agreed() {
    for (options, manifest, expected) in
        [("", "reuse = 3", [1, 2, 3, 1]), ("reuse = 2", "reuse = 3", [1, 2, 1, 2]), ("reuse = 1", "reuse = 3", [1; 4])]
    {
        let (_host, handler) = prepared(options, manifest, "").await.unwrap();
        for expected in expected {
            assert_eq!(handled(&handler).await, expected, "{options} {manifest}");
        }
    }
    let (_host, handler) = prepared("reuse = 9", "", "").await.unwrap();
    assert_eq!([handled(&handler).await, handled(&handler).await], [1, 1], "only a plugin itself asks for it");

    let (_host, handler) = prepared("", "reuse = 5", "").await.unwrap();
    let instance = json!({"fault": "instance"});
    let outcomes = batch(&handler, &vec![instance; 4]).await.unwrap();
    assert_eq!(outcomes.iter().map(reply).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!([handled(&handler).await, handled(&handler).await], [5, 1], "the events of a batch count");
}

#[tokio::test]
async fn an_instance_is_never_used_again_after_it_was_ended() {
    let (_host, handler) =
        prepared("", "reuse = 1000", "[limits]\nmemory = \"8MiB\"\nfuel = 500000000\n").await.unwrap();
    for fault in ["none", "retry", "reject"] {
        attempt(&handler, json!({"fault": fault})).await;
    }
    assert_eq!(handled(&handler).await, 4, "what the handler decides itself ends nothing");
    let short = Duration::from_millis(30);
    let rows = [
        (call(&json!({"fault": "trap"})), Verdict::Trap),
        (call(&json!({"fault": "memory"})), Verdict::OutOfMemory),
        (call(&json!({"fault": "loop"})), Verdict::OutOfFuel),
        (Call { timeout: short, ..call(&json!({"fault": "loop-in-host"})) }, Verdict::Timeout),
        (
            Call { timeout: short, kv: Arc::new(Gate::default()), ..call(&json!({"fault": "kv-get", "key": "k"})) },
            Verdict::Timeout,
        ),
    ];
    for (call, verdict) in rows {
        assert_eq!(handler.handle(call).await.verdict, verdict);
        assert_eq!([handled(&handler).await, handled(&handler).await], [1, 2], "{verdict}");
    }
}

#[tokio::test]
async fn nothing_of_an_event_is_left_for_the_next_but_the_guests_own_memory() {
    let (_host, handler) =
        prepared("", "reuse = 1000", "[limits]\nlog = \"1KiB\"\npublished_events = 3\n").await.unwrap();
    let write = json!({"fault": "kv-set", "key": "k", "value": "v"});
    let busy =
        json!({"fault": "steps", "steps": [write, {"fault": "publish", "count": 3}, {"fault": "log", "lines": 99}]});
    let first = attempt(&handler, busy.clone()).await;
    for _ in 0..3 {
        let again = attempt(&handler, busy.clone()).await;
        assert_eq!((again.verdict, &again.effects), (Verdict::Ok, &first.effects));
        assert_eq!(again.trace.log, first.trace.log);
        assert!(again.trace.fuel <= first.trace.fuel, "{:?} {:?}", again.trace.fuel, first.trace.fuel);
        let read = attempt(&handler, json!({"fault": "kv-get", "key": "k"})).await;
        assert_eq!((reply(&read), read.trace.log.len(), read.effects.published.len()), (Value::Null, 0, 0));
    }
    assert_eq!(handled(&handler).await, 8);
}

#[tokio::test]
async fn a_new_version_starts_with_instances_of_its_own() {
    let (host, handler) = prepared("", "reuse = 1000", "").await.unwrap();
    assert_eq!([handled(&handler).await, handled(&handler).await], [1, 2]);
    let next = embed_manifest(&guest("faults"), &format!("reuse = 1000\n{FAULTS}# next\n")).unwrap();
    let before = host.active("faults").unwrap();
    host.activate(host.load("faults.wasm", next.into()).await.unwrap());
    assert_eq!([handled(&handler).await, handled(&handler).await], [1, 2]);
    let before: Arc<dyn Handler> = before;
    assert_eq!([handled(&before).await, handled(&before).await], [1, 1], "a version that was replaced keeps none");
}

#[tokio::test]
async fn idle_instances_hold_nobody_up() {
    let mut options = Options { instances: std::num::NonZeroU32::MIN, ..Options::default() };
    options.plugins.insert("faults".to_owned(), toml::from_str(GRANTS).unwrap());
    let host = Host::new(options, None).unwrap();
    let reusing = embed_manifest(&guest("faults"), &format!("reuse = 1000\n{FAULTS}")).unwrap();
    let handler = host.handler(host.activate(host.load("faults.wasm", reusing.into()).await.unwrap()).name());
    let audit = host.load("audit-trail.wasm", guest("audit-trail").into()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(
            [handled(&handler).await, handled(&handler).await],
            [1, 2],
            "it was used again until it was in the way"
        );
        assert_eq!(audit.handle(call(&json!({"id": 1}))).await.verdict, Verdict::Ok);
    }
    let calls = (0..20).map(|_| {
        let handler = Arc::clone(&handler);
        tokio::spawn(async move { attempt(&handler, json!({"fault": "none"})).await.verdict })
    });
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), Verdict::Ok);
    }
}

/// An event's own limits begin anew with every event, in an instance that is used again and in a batch.
#[tokio::test]
async fn no_count_of_an_event_is_left_for_the_next() {
    let times = |times: u32, step: &Value| json!({"fault": "repeat", "times": times, "step": step});
    let get = json!({"fault": "kv-get", "key": "k"});
    let set = json!({"fault": "kv-set", "key": "k", "value": "x".repeat(10)});
    let publish = json!({"fault": "publish", "count": 3, "bytes": 200});
    let log = json!({"fault": "log", "lines": 25});
    let rows = [
        ("kv_operations = 5", times(5, &get), "too-many"),
        ("kv_bytes = 60", times(5, &set), "too-large"),
        ("published_events = 3", publish.clone(), "too-many"),
        ("published_bytes = \"1KiB\"", publish, "too-large"),
        ("host_calls = 40", log, "too-many-host-calls"),
    ];
    for (limit, light, words) in rows {
        let (_host, handler) = prepared("", "reuse = 1000", &format!("[limits]\n{limit}\n")).await.unwrap();
        let heavy = times(2, &light);
        for _ in 0..4 {
            assert_eq!(attempt(&handler, light.clone()).await.verdict, Verdict::Ok, "{limit}");
        }
        assert_eq!(handled(&handler).await, 5, "{limit}: one instance");
        assert_eq!(code(&attempt(&handler, heavy.clone()).await), words, "{limit}");
        assert_eq!(attempt(&handler, light.clone()).await.verdict, Verdict::Ok, "{limit}");
        let ends = words == "too-many-host-calls";
        assert_eq!(handled(&handler).await, if ends { 2 } else { 8 }, "{limit}");

        let outcomes = batch(&handler, &vec![light.clone(); 4]).await.unwrap();
        assert!(outcomes.iter().all(|outcome| outcome.verdict == Verdict::Ok), "{limit}: {outcomes:?}");
        // The calls of the host are those of all events together.
        match batch(&handler, &[heavy.clone(), light, heavy]).await {
            Some(outcomes) if !ends => {
                let codes: Vec<_> =
                    outcomes.iter().map(|outcome| outcome.fault.as_ref().map(|fault| &*fault.code)).collect();
                assert_eq!(codes, [Some(words), None, Some(words)], "{limit}");
            }
            together => assert!(ends && together.is_none(), "{limit}: {together:?}"),
        }
    }
}
