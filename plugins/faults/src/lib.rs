//! The guest that misbehaves on demand, for tests of whatever has to survive it.
//!
//! The payload says how: `{"fault": "trap"}`. The README lists all faults with their parameters. A payload that is not
//! JSON is echoed byte for byte. Nothing here is an example of a good handler.

mod break_out;

use serde::Deserialize;
use serde_json::json;
use std::{
    hint::black_box,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use tidegate_plugin::{log, prelude::*};

tidegate_plugin::plugin!(misbehave, batch = misbehave_all, self_check = check);

/// How to misbehave.
#[derive(Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case", rename_all_fields = "snake_case", deny_unknown_fields)]
enum Fault {
    /// Succeeds.
    None {},
    /// Replies with the payload.
    Echo {},
    /// Executes `unreachable`.
    Trap {},
    /// Never returns, and never calls the host.
    Loop {},
    /// Never returns, and calls the host all the time.
    LoopInHost {},
    /// Keeps busy for this long by the host's clock, then succeeds.
    Spin { ms: u64 },
    /// Recurses with local arrays, until the stack in the guest's own memory is exhausted.
    StackOverflow {},
    /// Recurses without locals, until the host's stack for WebAssembly is exhausted.
    DeepCalls {},
    /// Takes memory, all there is unless a number of MiB is given, then succeeds.
    Memory { mib: Option<usize> },
    /// Asks for a retry the first `times` times.
    Fail { times: u32 },
    /// Asks for a retry, after this long if given.
    Retry { after_ms: Option<u64>, code: Option<String> },
    /// Gives the delivery up.
    Reject { code: Option<String> },
    /// Panics with a message of this many bytes.
    Panic { bytes: Option<usize> },
    /// Logs this many lines of this many bytes, or of this text.
    Log { lines: usize, bytes: Option<usize>, text: Option<String> },
    /// Replies with this many bytes.
    Reply { bytes: usize },
    /// Publishes this many events, with this many bytes of padding in each.
    Publish { count: usize, bytes: Option<usize>, event_type: Option<String> },
    /// Publishes one event with its own payload: whoever subscribes to that type does the same.
    Republish { event_type: Option<String> },
    /// Writes one value.
    KvSet { bucket: Option<String>, key: String, value: String },
    /// Adds to a number and replies with the sum.
    KvIncrement { bucket: Option<String>, key: String, by: i64 },
    /// Replies with what is kept under a key.
    KvGet { bucket: Option<String>, key: String },
    /// Forgets a key.
    KvDelete { bucket: Option<String>, key: String },
    /// Replies with the value of a setting; one that was not requested ends the attempt.
    Setting { key: String },
    /// Replies with what the host says about the attempt and the event.
    Facts {},
    /// Replies with how many events this instance has handled, this one included.
    Instance {},
    /// As the first event of a batch, misbehaves for all of it. Succeeds by itself.
    Batch { how: Whole },
    /// One after the other, until one fails. The last reply counts.
    Steps { steps: Vec<Fault> },
    /// The same so many times, until it fails.
    Repeat { times: usize, step: Box<Fault> },
}

/// What is published, and written to key-value data, unless the payload says otherwise.
const EVENT_TYPE: &str = "faulty.events.create";
const BUCKET: &str = "faults";

/// How to misbehave with a whole batch.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Whole {
    /// Writes, publishes and logs before it says whose turn it is, and fails all with what it was told.
    Early,
    /// Takes a turn that there is not.
    Far,
    /// Gives an answer too few.
    Short,
    /// Takes the last event first.
    Backwards,
}

/// Events that this instance has handled.
static HANDLED: AtomicU32 = AtomicU32::new(0);

/// Seen from outside, so that no compiler leaves the calls out.
static CALLS: AtomicU32 = AtomicU32::new(0);

fn misbehave(event: Event) -> Result<Option<Reply>, Failure> {
    misbehave_at(&event)
}

fn misbehave_at(event: &Event) -> Result<Option<Reply>, Failure> {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    if serde_json::from_slice::<serde::de::IgnoredAny>(&event.payload).is_err() {
        return Ok(Some(Reply::new("application/octet-stream", event.payload.clone())));
    }
    perform(&event.json()?, event)
}

fn misbehave_all(events: &[Event]) -> Vec<Result<Option<Reply>, Failure>> {
    let in_turn = |(index, event): (usize, &Event)| {
        delivery::turn(index);
        misbehave_at(event)
    };
    let whole = match events.first().and_then(|event| event.json().ok()) {
        Some(Fault::Batch { how }) => Some(how),
        _ => None,
    };
    match whole {
        Some(Whole::Early) => return events.iter().map(|_| early()).collect(),
        Some(Whole::Far) => delivery::turn(events.len()),
        _ => {}
    }
    let turns = events.iter().enumerate();
    let mut results: Vec<_> = match whole {
        Some(Whole::Backwards) => turns.rev().map(in_turn).collect(),
        _ => turns.map(in_turn).collect(),
    };
    match whole {
        Some(Whole::Backwards) => results.reverse(),
        Some(Whole::Short) => results.truncate(events.len().saturating_sub(1)),
        _ => {}
    }
    results
}

fn early() -> Result<Option<Reply>, Failure> {
    info!("before the first turn");
    events::publish(EVENT_TYPE, &json!({}))?;
    Ok(None)
}

/// Misbehaves before it is put to work, as the setting `self-check` says.
fn check() -> Result<(), String> {
    match config::get("self-check").as_deref() {
        None | Some("ok") => Ok(()),
        Some("trap") => break_out::trap(),
        Some("loop") => loop_without_end(),
        Some("publish") => match events::publish("faulty.events.create", &json!({})) {
            Err(fault) if fault.code == "too-many" => Ok(()),
            other => Err(format!("publishing was answered with {other:?}")),
        },
        Some("write") => match kv::bucket("faults").increment("checked", 1) {
            Ok(1) => Ok(()),
            other => Err(format!("writing was answered with {other:?}")),
        },
        Some(other) => Err(format!("asked to fail the self-check: {other}")),
    }
}

fn perform(fault: &Fault, event: &Event) -> Result<Option<Reply>, Failure> {
    match fault {
        Fault::None {} | Fault::Batch { .. } => {}
        Fault::Echo {} => return Ok(Some(Reply::new(event.content_type.clone(), event.payload.clone()))),
        Fault::Trap {} => break_out::trap(),
        Fault::Loop {} => loop_without_end(),
        Fault::LoopInHost {} => loop {
            black_box(delivery::attempt());
        },
        Fault::Spin { ms } => spin(Duration::from_millis(*ms)),
        Fault::StackOverflow {} => {
            black_box(recurse(0));
        }
        Fault::DeepCalls {} => {
            black_box(descend(0));
        }
        Fault::Memory { mib } => hoard(mib.unwrap_or(usize::MAX)),
        Fault::Fail { times } if delivery::attempt() <= *times => {
            return Err(
                Failure::retry("not-yet", format!("fails {times} times")).detail("attempt", delivery::attempt())
            );
        }
        Fault::Fail { .. } => {}
        Fault::Retry { after_ms, code } => return Err(retry(*after_ms, code.as_deref())),
        Fault::Reject { code } => {
            return Err(
                Failure::reject(code.as_deref().unwrap_or("refused"), "asked to reject").detail("event", &event.id)
            );
        }
        Fault::Panic { bytes } => break_out::panic_with(&"p".repeat(bytes.unwrap_or(16))),
        Fault::Log { lines, bytes, text } => {
            let text = text.clone().unwrap_or_else(|| "l".repeat(bytes.unwrap_or(64)));
            (0..*lines).for_each(|line| log::emit(log::Level::Info, &text, &[("line", &line)]));
        }
        Fault::Reply { bytes } => return Ok(Some(Reply::new("application/octet-stream", vec![b'r'; *bytes]))),
        Fault::Publish { count, bytes, event_type } => {
            let padding = "p".repeat(bytes.unwrap_or(0));
            for n in 0..*count {
                events::publish(event_type.as_deref().unwrap_or(EVENT_TYPE), &json!({ "n": n, "padding": padding }))?;
            }
        }
        Fault::Republish { event_type } => {
            let event_type = event_type.as_deref().unwrap_or(EVENT_TYPE);
            events::publish_bytes(event_type, &event.content_type, event.payload.clone(), &[])?;
        }
        Fault::KvSet { bucket, key, value } => kv::bucket(name(bucket)).set(key, value.as_str())?,
        Fault::KvIncrement { bucket, key, by } => {
            return Reply::json(&kv::bucket(name(bucket)).increment(key, *by)?).map(Some);
        }
        Fault::KvGet { bucket, key } => {
            let value = kv::bucket(name(bucket)).get(key)?;
            return Reply::json(&value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).map(Some);
        }
        Fault::KvDelete { bucket, key } => kv::bucket(name(bucket)).delete(key)?,
        Fault::Setting { key } => return Reply::json(&config::get(key)).map(Some),
        Fault::Facts {} => return facts(event).map(Some),
        Fault::Instance {} => return Reply::json(&HANDLED.load(Ordering::Relaxed)).map(Some),
        Fault::Steps { steps } => return in_turn(steps, event),
        Fault::Repeat { times, step } => return in_turn(std::iter::repeat_n(&**step, *times), event),
    }
    Ok(None)
}

/// One after the other, until one fails. The last reply counts.
fn in_turn<'a>(steps: impl IntoIterator<Item = &'a Fault>, event: &Event) -> Result<Option<Reply>, Failure> {
    let mut reply = None;
    for step in steps {
        reply = perform(step, event)?.or(reply);
    }
    Ok(reply)
}

fn name(bucket: &Option<String>) -> &str {
    bucket.as_deref().unwrap_or(BUCKET)
}

fn retry(after_ms: Option<u64>, code: Option<&str>) -> Failure {
    let failure = Failure::retry(code.unwrap_or("again"), "asked to retry");
    match after_ms {
        Some(ms) => failure.after(Duration::from_millis(ms)),
        None => failure,
    }
}

fn facts(event: &Event) -> Result<Reply, Failure> {
    Reply::json(&json!({
        "subscription": delivery::subscription(),
        "attempt": delivery::attempt(),
        "max_attempts": delivery::max_attempts(),
        "remaining_ms": u64::try_from(delivery::remaining().as_millis()).unwrap_or(u64::MAX),
        "idempotency_key": delivery::idempotency_key(),
        "is_replay": delivery::is_replay(),
        "greeting": config::get("greeting"),
        "event": {
            "id": event.id, "sequence": event.sequence, "type": event.event_type, "source": event.source,
            "created_at_ms": event.created_at_ms, "content_type": event.content_type, "attributes": event.attributes,
        },
    }))
}

fn loop_without_end() -> ! {
    let mut turns = 0_u64;
    loop {
        turns = black_box(turns.wrapping_add(1));
    }
}

/// The only clock of a guest is what the host says is left of the attempt. Asked now and then, since host calls are
/// limited too.
fn spin(length: Duration) {
    // Without an end where that lies behind the deadline: it is for the host to stop it there.
    let end = delivery::remaining().checked_sub(length);
    while end.is_none_or(|end| delivery::remaining() > end) {
        for turn in 0..10_000_u32 {
            black_box(turn);
        }
    }
}

/// Not a tail call, and with a frame that cannot be left out.
#[expect(unconditional_recursion, reason = "the stack is to be exhausted")]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse(depth.wrapping_add(1)).wrapping_add(frame.iter().sum())
}

/// Not a tail call either, and nothing but the calls themselves needs room.
#[expect(unconditional_recursion, reason = "the stack is to be exhausted")]
fn descend(depth: u32) -> u32 {
    CALLS.fetch_add(1, Ordering::Relaxed);
    descend(depth.wrapping_add(1)).rotate_left(3) ^ depth
}

/// Holds on to all of it at once, and touches it.
fn hoard(mib: usize) {
    let mut held = Vec::new();
    for _ in 0..mib {
        held.push(black_box(vec![1_u8; 1 << 20]));
    }
    black_box(held);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use std::time::Duration;
    use tidegate_plugin::{
        Failure, Reply,
        testing::{self, Host},
    };

    use super::{misbehave, misbehave_all};

    fn deliver(host: &Host, payload: &Value) -> Result<Option<Reply>, Failure> {
        host.deliver(misbehave, testing::event("faults.tests.create", payload))
    }

    fn host() -> Host {
        Host::for_manifest(include_str!("../plugin.toml")).unwrap()
    }

    #[test]
    fn failing_twice_succeeds_the_third_time() {
        let payload = json!({"fault": "fail", "times": 2});
        assert!(deliver(&host().attempt(1, 4), &payload).unwrap_err().is_retry());
        assert!(deliver(&host().attempt(2, 4), &payload).unwrap_err().is_retry());
        assert_eq!(deliver(&host().attempt(3, 4), &payload), Ok(None));
    }

    #[test]
    fn verdicts_carry_what_was_asked_for() {
        let failure = deliver(&host(), &json!({"fault": "retry", "after_ms": 1500, "code": "busy"})).unwrap_err();
        assert_eq!((failure.code(), failure.retry_after()), ("busy", Some(Duration::from_millis(1500))));
        let failure = deliver(&host(), &json!({"fault": "reject"})).unwrap_err();
        assert_eq!((failure.code(), failure.is_retry()), ("refused", false));
    }

    #[test]
    fn steps_that_end_badly_leave_nothing() {
        let host = host();
        let increment = json!({"fault": "kv-increment", "key": "n", "by": 2});
        let steps =
            json!({"fault": "steps", "steps": [increment, {"fault": "publish", "count": 3}, {"fault": "reject"}]});
        deliver(&host, &steps).unwrap_err();
        assert_eq!((host.kv_number("faults", "n"), host.published().len()), (None, 0));
        let reply = deliver(&host, &increment).unwrap().unwrap();
        assert_eq!(reply.body, b"2");
    }

    #[test]
    fn a_batch_misbehaves_event_by_event_or_as_a_whole() {
        let host = host();
        let batch = |payloads: &[Value]| {
            let events: Vec<_> =
                payloads.iter().map(|payload| testing::event("faults.tests.create", payload)).collect();
            host.deliver_batch(misbehave_all, &events)
        };
        let increment = json!({"fault": "kv-increment", "key": "n", "by": 2});
        let results = batch(&[increment.clone(), json!({"fault": "reject"}), increment.clone()]);
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!(host.kv_number("faults", "n"), Some(4));
        let early = batch(&[json!({"fault": "batch", "how": "early"}), increment.clone()]);
        assert!(early.iter().all(|result| result.as_ref().is_err_and(|failure| failure.code() == "no-turn")));
        assert_eq!(batch(&[json!({"fault": "batch", "how": "short"}), increment]).len(), 1);
        assert_eq!(host.kv_number("faults", "n"), Some(4));
    }

    #[test]
    fn bytes_that_are_not_json_come_back_as_they_are() {
        let mut event = testing::event("faults.tests.create", &json!(null));
        event.payload = vec![0xff, 0xfe, 0x00];
        assert_eq!(host().deliver(misbehave, event).unwrap().unwrap().body, [0xff, 0xfe, 0x00]);
    }

    #[test]
    fn an_unknown_fault_is_rejected() {
        assert_eq!(deliver(&host(), &json!({"fault": "melt"})).unwrap_err().code(), "invalid-payload");
    }

    #[test]
    fn what_is_repeated_is_done_so_many_times() {
        let host = host();
        let step = json!({"fault": "kv-increment", "key": "n", "by": 3});
        let reply = deliver(&host, &json!({"fault": "repeat", "times": 4, "step": step})).unwrap().unwrap();
        assert_eq!(reply.body, b"12");
        let again = json!({"fault": "republish", "event_type": "faulty.chain.next"});
        deliver(&host, &again).unwrap();
        assert_eq!(host.published()[0].json::<Value>().unwrap(), again);
    }

    #[test]
    fn sizes_and_counts_are_what_was_asked_for() {
        let host = host();
        assert_eq!(deliver(&host, &json!({"fault": "reply", "bytes": 70_000})).unwrap().unwrap().body.len(), 70_000);
        deliver(&host, &json!({"fault": "log", "lines": 100})).unwrap();
        assert_eq!(host.logs().len(), 100);
        let greeted = host.config("greeting", "hello");
        let facts: Value = deliver(&greeted, &json!({"fault": "facts"})).unwrap().unwrap().read().unwrap();
        assert_eq!(facts["greeting"], "hello");
        assert_eq!(facts["subscription"], "faults");
    }
}
