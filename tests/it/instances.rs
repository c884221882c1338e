//! What an instance serves: many events in one call, many calls one after the other, and the self-check before any.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::host::component::embed_manifest;
use tidegate::host::{Host, Options, PluginOptions};
use tidegate::{Call, Handler, Verdict};

use crate::support::guests::{
    FAULTS, GRANTS, Gate, METERED, attempt, batch, call, code, faults, guest, host, loaded, prepared, reply,
};

#[tokio::test]
async fn a_batch_has_a_verdict_for_each_event_and_each_keeps_what_is_its_own() {
    let host = host();
    let handler = loaded(&host, METERED).await;
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

/// What is packed for a batch is unpacked as it was.
#[tokio::test]
async fn an_event_of_a_batch_is_the_one_that_is_handed_over_alone() {
    let host = host();
    let handler = loaded(&host, "").await;
    let mut calls = vec![call(&json!({"fault": "facts"})); 5];
    let events = calls.iter_mut().map(|call| Arc::make_mut(&mut call.event)).collect::<Vec<_>>();
    let [plain, rich, bare, empty, binary] = events.try_into().unwrap();
    plain.user_id = Some(tidegate::event::UserId::Number(42));
    (rich.key, rich.session_id) = (Some("ключ 🗝".into()), Some(String::new().into()));
    rich.caused_by = Some("cause".parse().unwrap());
    rich.metadata.extend((0..300).map(|n| (format!("schlüssel-{n}"), json!({"länge": "x".repeat(n)}))));
    (bare.schema, bare.entity, bare.operation, bare.instance_id) = (None, None, None, "".into());
    empty.metadata.insert(String::new(), json!(""));
    binary.payload = tidegate::Payload::new("application/x-\"odd\"", vec![0xff, 0, 0xfe]).unwrap();
    let mut alone = Vec::new();
    for call in &calls {
        alone.push(*handler.handle(call.clone()).await.reply.unwrap());
    }
    let together = handler.handle_batch(calls).await.unwrap();
    let together: Vec<_> = together.into_iter().map(|outcome| *outcome.reply.unwrap()).collect();
    assert_eq!(together.last(), alone.last());
    assert_eq!(&*together[4].body, [0xff, 0, 0xfe]);
    let event = |reply: &tidegate::Reply| serde_json::from_slice::<Value>(&reply.body).unwrap()["event"].take();
    let [alone, together] = [alone, together].map(|replies| replies[..4].iter().map(event).collect::<Vec<_>>());
    assert_eq!(together, alone);
    let counts: Vec<_> = together.iter().map(|event| event["attributes"].as_array().unwrap().len()).collect();
    assert_eq!(counts[1] - 300, counts[0] + 2, "{counts:?}");
    assert_eq!(counts[2], 0);
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
    let handler = loaded(&host, METERED).await;
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
        let (host, handler) = prepared(options, "", manifest).await.unwrap();
        assert_eq!(handler.max_batch(), expected);
        assert_eq!(host.status("faults").unwrap().active.unwrap().max_batch, expected);
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
        ("loop", METERED, "self-check failed: out-of-fuel: "),
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

    let (host, handler) = prepared("", "reuse = 5", "").await.unwrap();
    assert_eq!(host.status("faults").unwrap().active.unwrap().reuse, 5);
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
        prepared("", "reuse = 1000", &format!("{METERED}log = \"1KiB\"\npublished_events = 3\n")).await.unwrap();
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
