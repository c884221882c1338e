//! The broker over the memory store, under paused time: what is published, called, retried, ordered and given back.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tidegate::broker::{DeadLetterFilter, EventFilter, Mode, Options, SubscriptionPatch};
use tidegate::delivery::{Fault, KvChange, KvWrite};
use tidegate::handler::{Effects, Publish, Success};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::{ClaimRequest, Documents as _, Provider, Want};
use tidegate::subscription::{Ordering as Keys, Start};
use tidegate::{
    Broker, Call, Error, Event, EventDetail, Failure, Handler, Metrics, Payload, Reply, RetryPolicy, Source, Status,
    Subscription, Verdict, native,
};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::support::tapped::Tapped;

/// A running broker over a memory store.
struct Rig {
    broker: Broker,
    provider: Arc<MemoryProvider>,
    stop: Option<oneshot::Sender<()>>,
    service: JoinHandle<tidegate::Result<()>>,
}

fn options() -> Options {
    let retry = RetryPolicy { jitter: 0.0, ..RetryPolicy::default() };
    Options { instance_id: "test".into(), retry, seed: Some(7), ..Options::default() }
}

impl Rig {
    async fn start() -> Self {
        Self::with(options(), memory::Options::default()).await
    }

    async fn with(options: Options, memory: memory::Options) -> Self {
        let provider = Arc::new(MemoryProvider::open(memory).unwrap());
        let shared = Arc::clone(&provider) as Arc<dyn Provider>;
        let (broker, service) = Broker::open(shared, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { broker, provider, stop: Some(stop), service }
    }

    async fn on(&self, name: &str, pattern: &str, handler: Arc<dyn Handler>) {
        self.broker.subscribe(subscription(name, pattern), handler).await.unwrap();
    }

    /// Publishes and waits until the event is completed or failed.
    async fn handled(&self, event: Event) -> EventDetail {
        let answer = self.broker.publish_sync(event, Duration::from_secs(3600)).await.unwrap();
        assert!(answer.finished);
        answer.detail
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        (&mut self.service).await.unwrap().unwrap();
    }

    async fn status(&self, id: &str) -> Status {
        self.broker.event(id).await.unwrap().record.status
    }
}

fn subscription(name: &str, pattern: &str) -> Subscription {
    Subscription::new(name, pattern.parse().unwrap())
}

fn event(event_type: &str) -> Event {
    Event::new(Source::Internal, event_type.parse().unwrap(), Payload::json(&json!({"n": 1})).unwrap())
}

fn event_with_id(event_type: &str, id: &str) -> Event {
    Event { id: id.parse().unwrap(), ..event(event_type) }
}

/// Counts its calls and succeeds.
fn counting(calls: &Arc<AtomicUsize>) -> Arc<dyn Handler> {
    let calls = Arc::clone(calls);
    native(move |_| {
        calls.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    })
}

/// Fails the first `times` calls, then succeeds.
fn failing(times: usize, calls: &Arc<AtomicUsize>) -> Arc<dyn Handler> {
    let calls = Arc::clone(calls);
    native(move |_| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        async move { if call < times { Err(Failure::retry("busy", "not yet")) } else { Ok(()) } }
    })
}

fn calls() -> Arc<AtomicUsize> {
    Arc::default()
}

/// BEHAVIOURS A8, and "the stored copy never got retry_count, processed_at, completed_at".
#[tokio::test(start_paused = true)]
async fn a_handled_event_is_completed_with_its_attempt_and_times_in_order() {
    let rig = Rig::start().await;
    rig.on("totals", "shop.orders.*", native(|_| async { Ok(Reply::json(&json!({"total": 3}))?) })).await;
    let detail = rig.handled(event("shop.orders.create")).await;
    let record = &detail.record;
    assert_eq!((record.status, record.retry_count, &record.error), (Status::Completed, 0, &None));
    assert!(record.event.created_at <= record.processed_at.unwrap());
    assert!(record.processed_at.unwrap() <= record.completed_at.unwrap());
    let [delivery] = &detail.deliveries[..] else { panic!("one delivery: {detail:?}") };
    let [attempt] = &delivery.attempts[..] else { panic!("one attempt: {detail:?}") };
    assert_eq!((attempt.number, attempt.verdict, &*attempt.worker), (1, Verdict::Ok, "test"));
    assert_eq!(attempt.reply.as_ref().unwrap().body, "{\"total\":3}");
}

/// BEHAVIOURS B8, A9, and "an event nobody handles stayed pending for ever".
#[tokio::test(start_paused = true)]
async fn every_matching_subscription_is_called_once_and_an_unmatched_event_is_completed() {
    let rig = Rig::start().await;
    let (all, chats, orders) = (calls(), calls(), calls());
    rig.on("all", "*", counting(&all)).await;
    rig.on("chats", "chat.*", counting(&chats)).await;
    rig.on("orders", "shop.orders.*", counting(&orders)).await;
    let chat = Event { source: Source::Websocket, ..event("chat.message") };
    assert_eq!(rig.handled(chat).await.deliveries.len(), 2);
    assert_eq!([&all, &chats, &orders].map(|calls| calls.load(Ordering::SeqCst)), [1, 1, 0]);
    rig.broker.unsubscribe("all").await.unwrap();
    let lonely = rig.broker.publish(event("nobody.cares")).await.unwrap();
    assert_eq!(lonely.status, Status::Completed);
}

/// BEHAVIOURS D2, D3: after 1, 2 and 4 seconds.
#[tokio::test(start_paused = true)]
async fn a_failing_handler_is_called_again_after_one_two_and_four_seconds() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.on("flaky", "*", failing(3, &calls)).await;
    let began = Instant::now();
    let detail = rig.handled(event("a.b")).await;
    assert_eq!((detail.record.status, detail.record.retry_count), (Status::Completed, 3));
    assert_eq!(calls.load(Ordering::SeqCst), 4);
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(7) && took < Duration::from_millis(7_200), "{took:?}");
}

/// BEHAVIOURS C9, C10: all handlers run, and the event fails with the text of the one that failed.
#[tokio::test(start_paused = true)]
async fn a_handler_that_never_succeeds_makes_a_dead_letter_and_nobody_else_runs_again() {
    let rig = Rig::start().await;
    let (bad, good) = (calls(), calls());
    rig.on("bad", "*", failing(usize::MAX, &bad)).await;
    rig.on("good", "*", counting(&good)).await;
    let detail = rig.handled(event("a.b")).await;
    assert_eq!([&bad, &good].map(|calls| calls.load(Ordering::SeqCst)), [4, 1]);
    assert_eq!((detail.record.status, detail.record.retry_count), (Status::Failed, 3));
    let error = detail.record.error.unwrap();
    assert!(error.contains("handler failed after 4 attempts: not yet"), "{error}");
    let dead = rig.broker.dead_letters(&DeadLetterFilter { limit: 10, ..Default::default() }).await.unwrap();
    assert_eq!(dead.letters.len(), 1);
    assert_eq!(dead.letters[0].delivery.attempts.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_event_is_dead_at_once() {
    let rig = Rig::start().await;
    rig.on("strict", "*", native(|_| async { Err::<(), _>(Failure::reject("bad-order", "no total")) })).await;
    let detail = rig.handled(event("a.b")).await;
    assert_eq!((detail.record.status, detail.record.retry_count), (Status::Failed, 0));
    assert_eq!(detail.record.error.as_deref(), Some("bad-order: no total"));
    assert_eq!(detail.deliveries[0].verdict, Some(Verdict::Reject));
}

/// "A handler's panic killed the process": here it is a trap, and the next event is handled.
#[tokio::test(start_paused = true)]
async fn a_panic_ends_that_attempt_only() {
    let rig = Rig::start().await;
    let seen = calls();
    let handler = {
        let seen = Arc::clone(&seen);
        native(move |_| {
            let first = seen.fetch_add(1, Ordering::SeqCst) == 0;
            async move { if first { panic!("boom") } else { Ok(()) } }
        })
    };
    rig.on("shaky", "*", handler).await;
    let detail = rig.handled(event("a.b")).await;
    assert_eq!(detail.record.status, Status::Completed);
    let first = &detail.deliveries[0].attempts[0];
    assert_eq!(first.verdict, Verdict::Trap);
    assert_eq!(first.error.as_ref().unwrap().message, "the handler panicked: boom");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_takes_too_long_is_a_timeout() {
    let rig = Rig::start().await;
    let slow = Subscription { timeout: Some(Duration::from_secs(2)), ..subscription("slow", "*") };
    let handler = native(|call: Call| async move {
        if call.attempt == 1 {
            std::future::pending::<()>().await;
        }
        Ok(())
    });
    rig.broker.subscribe(slow, handler).await.unwrap();
    let detail = rig.handled(event("a.b")).await;
    let verdicts: Vec<Verdict> = detail.deliveries[0].attempts.iter().map(|attempt| attempt.verdict).collect();
    assert_eq!(verdicts, [Verdict::Timeout, Verdict::Ok]);
    assert_eq!(detail.deliveries[0].attempts[0].duration_us / 1_000_000, 2);
}

/// "Back-off sleeping inside a worker: two failing events delayed 100 healthy ones by 7 s".
#[tokio::test(start_paused = true)]
async fn two_poison_events_on_two_workers_do_not_delay_a_hundred_good_ones() {
    let two = std::num::NonZeroUsize::new(2).unwrap();
    let rig = Rig::with(Options { worker_count: two, ..options() }, memory::Options::default()).await;
    let done = Arc::new(Semaphore::new(0));
    let handler = {
        let done = Arc::clone(&done);
        native(move |call: Call| {
            let done = Arc::clone(&done);
            async move {
                if call.event.event_type.as_str() == "poison" {
                    return Err(Failure::retry("poison", "never works"));
                }
                done.add_permits(1);
                Ok(())
            }
        })
    };
    rig.on("all", "*", handler).await;
    let began = Instant::now();
    for id in ["poison-1", "poison-2"] {
        rig.broker.publish(event_with_id("poison", id)).await.unwrap();
    }
    for _ in 0..100 {
        rig.broker.publish(event("good")).await.unwrap();
    }
    drop(done.acquire_many(100).await.unwrap());
    assert!(began.elapsed() < Duration::from_millis(900), "before the first retry: {:?}", began.elapsed());
}

/// "Stop waited 7 s for a back-off": the event is still due, and no time passes.
#[tokio::test(start_paused = true)]
async fn a_stop_during_a_back_off_is_immediate_and_keeps_the_event() {
    let mut rig = Rig::start().await;
    let failed = Arc::new(Notify::new());
    let handler = {
        let failed = Arc::clone(&failed);
        native(move |_| {
            failed.notify_one();
            async { Err::<(), _>(Failure::retry("busy", "not yet")) }
        })
    };
    rig.on("flaky", "*", handler).await;
    let published = rig.broker.publish(event("a.b")).await.unwrap();
    failed.notified().await;
    let began = Instant::now();
    rig.stop().await;
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
    let detail = rig.provider.get(published.id.as_str()).await.unwrap().unwrap();
    assert_eq!(detail.deliveries[0].status, Status::Pending);
    assert_eq!(detail.deliveries[0].retry_count, 1);
}

/// BEHAVIOURS C8: 2 workers, 5 queued handlers of 50 ms, all handled before the stop returns.
#[tokio::test(start_paused = true)]
async fn a_stop_drains_what_is_queued() {
    let two = std::num::NonZeroUsize::new(2).unwrap();
    let mut rig = Rig::with(Options { worker_count: two, ..options() }, memory::Options::default()).await;
    let done = calls();
    let handler = {
        let done = Arc::clone(&done);
        native(move |_| {
            let done = Arc::clone(&done);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                done.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        })
    };
    rig.on("slow", "*", handler).await;
    for _ in 0..5 {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    rig.stop().await;
    assert_eq!(done.load(Ordering::SeqCst), 5);
    let refused = rig.broker.publish(event("a.b")).await.unwrap_err();
    assert_eq!(refused.to_string(), "broker is not running");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_outlives_the_grace_is_given_back_unpunished() {
    let mut rig = Rig::start().await;
    let started = Arc::new(Notify::new());
    let handler = {
        let started = Arc::clone(&started);
        native(move |_| {
            started.notify_one();
            std::future::pending::<Result<(), Failure>>()
        })
    };
    let long = Subscription { timeout: Some(Duration::from_secs(3600)), ..subscription("stuck", "*") };
    rig.broker.subscribe(long, handler).await.unwrap();
    let published = rig.broker.publish(event("a.b")).await.unwrap();
    started.notified().await;
    rig.stop().await;
    let detail = rig.provider.get(published.id.as_str()).await.unwrap().unwrap();
    assert_eq!(detail.record.status, Status::Pending);
    assert!(detail.deliveries[0].attempts.is_empty());
    let want = Want { subscription: "stuck".into(), room: 1, ordering: Keys::None };
    let request = ClaimRequest { worker: "next".into(), lease: Duration::from_secs(1), wants: vec![want] };
    assert_eq!(rig.provider.claim(&request).await.unwrap().leases[0].attempt, 1);
}

/// "Queue full: the event is stored and counted, the caller gets an error, and nothing ever runs it"; "a queue gauge
/// that never falls back to 0". BEHAVIOURS C7.
#[tokio::test(start_paused = true)]
async fn two_hundred_publishes_into_room_for_ten_are_each_handled_or_refused() {
    let memory = memory::Options { max_events: 10, ..memory::Options::default() };
    let rig = Rig::with(options(), memory).await;
    let handled = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let handled = Arc::clone(&handled);
        native(move |call: Call| {
            let handled = Arc::clone(&handled);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                handled.lock().unwrap().push(call.event.id.clone());
                Ok(())
            }
        })
    };
    rig.on("slow", "*", handler).await;
    let (mut accepted, mut refused) = (Vec::new(), Vec::new());
    for n in 0..200 {
        let event = event_with_id("a.b", &format!("event-{n}"));
        match rig.broker.publish(event).await {
            Ok(published) => accepted.push(published.id),
            Err(error) => {
                assert_eq!(error.code(), "queue_full", "{error}");
                assert!(error.to_string().starts_with("event queue is full"), "{error}");
                refused.push(format!("event-{n}"));
            }
        }
    }
    assert!(accepted.len() >= 10 && refused.len() >= 100, "{} {}", accepted.len(), refused.len());
    let mut rig = rig;
    rig.stop().await;
    let mut handled = handled.lock().unwrap().clone();
    handled.sort();
    accepted.sort();
    assert_eq!(handled, accepted);
    for id in refused {
        assert!(rig.provider.get(&id).await.unwrap().is_none(), "{id} was refused and stored");
    }
    let stats = rig.broker.stats().await.unwrap();
    assert_eq!((stats.queue_size, stats.active_workers), (0, 0));
    assert_eq!(stats.provider_stats.pending_events + stats.provider_stats.processing_events, 0);
}

/// DESIGN §2.11.
#[tokio::test(start_paused = true)]
async fn the_same_id_twice_runs_handlers_once() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.on("all", "*", counting(&calls)).await;
    let first = rig.broker.publish(event_with_id("a.b", "order-17")).await.unwrap();
    let again = rig.broker.publish_sync(event_with_id("a.b", "order-17"), Duration::from_secs(9)).await.unwrap();
    assert!(!first.duplicate && again.duplicate && again.finished);
    assert_eq!(again.detail.record.event.seq, Some(first.seq));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

/// DESIGN §6: one open delivery per key, and a failing head blocks only its key.
#[tokio::test(start_paused = true)]
async fn events_of_one_key_are_handled_in_order_and_a_failing_head_blocks_only_its_key() {
    let rig = Rig::start().await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let order = Arc::clone(&order);
        native(move |call: Call| {
            let order = Arc::clone(&order);
            async move {
                let id = call.event.id.to_string();
                if id == "a1" && call.attempt < 3 {
                    return Err(Failure::retry("busy", "not yet"));
                }
                order.lock().unwrap().push(id);
                Ok(())
            }
        })
    };
    let keyed = Subscription { ordering: Keys::Key, ..subscription("keyed", "*") };
    rig.broker.subscribe(keyed, handler).await.unwrap();
    for id in ["a1", "b1", "a2", "b2", "a3"] {
        let key = Some(id[..1].into());
        rig.broker.publish(Event { key, ..event_with_id("x.y", id) }).await.unwrap();
    }
    let last = Event { key: Some("a".into()), ..event_with_id("x.y", "a4") };
    rig.handled(last).await;
    let order = order.lock().unwrap().clone();
    assert_eq!(order, ["b1", "b2", "a1", "a2", "a3", "a4"]);
}

#[tokio::test(start_paused = true)]
async fn a_paused_subscription_keeps_its_deliveries_until_it_is_resumed() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.on("all", "*", counting(&calls)).await;
    let pause = |paused| SubscriptionPatch { paused: Some(paused), ..SubscriptionPatch::default() };
    assert!(rig.broker.patch_subscription("all", pause(true)).await.unwrap().subscription.paused);
    let waiting = rig.broker.publish_sync(event("a.b"), Duration::from_secs(60)).await.unwrap();
    assert!(!waiting.finished);
    assert_eq!(waiting.detail.record.status, Status::Pending);
    // What an operator chose survives a new declaration of the same subscription.
    rig.on("all", "*", counting(&calls)).await;
    assert!(rig.broker.subscriptions()[0].subscription.paused);
    rig.broker.patch_subscription("all", pause(false)).await.unwrap();
    rig.handled(event("a.c")).await;
    assert_eq!(rig.status(waiting.detail.record.event.id.as_str()).await, Status::Completed);
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

/// BEHAVIOURS B9, B7.
#[tokio::test(start_paused = true)]
async fn nothing_published_after_unsubscribe_reaches_the_handler() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.on("all", "*", counting(&calls)).await;
    rig.handled(event("a.b")).await;
    rig.broker.unsubscribe("all").await.unwrap();
    assert_eq!(rig.broker.publish(event("a.b")).await.unwrap().status, Status::Completed);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    let unknown = rig.broker.unsubscribe("all").await.unwrap_err();
    assert_eq!(unknown.to_string(), "subscription not found: all");
}

/// DESIGN §2.8: what a handler publishes and writes commits with its success, or not at all.
#[tokio::test(start_paused = true)]
async fn effects_commit_with_success_only_and_once() {
    let rig = Rig::start().await;
    let seen = calls();
    let handler = native(|call: Call| async move {
        let publish = Publish {
            event_type: "shop.totals.update".parse()?,
            payload: Payload::json(&json!({"attempt": call.attempt}))?,
            key: None,
            metadata: tidegate::event::Metadata::new(),
        };
        let write = KvWrite { bucket: "kv/t/totals".into(), key: "c-1".into(), change: KvChange::Increment { by: 5 } };
        if call.attempt == 1 {
            return Err(Failure::retry("busy", "not yet"));
        }
        Ok(Success { reply: None, effects: Effects { published: vec![publish], writes: vec![write] } })
    });
    rig.on("totals", "shop.orders.*", handler).await;
    rig.on("watch", "shop.totals.*", counting(&seen)).await;
    let order = rig.handled(event("shop.orders.create")).await;
    let page = rig.broker.events(&EventFilter { limit: 10, ..Default::default() }).await.unwrap();
    assert_eq!(page.records.len(), 2, "the failed attempt published nothing");
    let caused = &page.records[0].event;
    assert_eq!(caused.caused_by.as_ref(), Some(&order.record.event.id));
    assert_eq!(caused.payload.bytes(), "{\"attempt\":2}");
    let total = rig.provider.document("kv/t/totals", "c-1").await.unwrap().unwrap();
    assert_eq!(total.value, "5");
    let mut rig = rig;
    rig.stop().await;
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

/// Two handlers that publish what the other one subscribes to. "A loop between handlers goes on for ever."
#[tokio::test(start_paused = true)]
async fn a_ring_of_handlers_ends_at_the_depth_limit_with_its_chain_named() {
    let mut rig = Rig::with(Options { max_depth: 3, ..options() }, memory::Options::default()).await;
    let made = calls();
    let ring = native({
        let made = Arc::clone(&made);
        move |call: Call| {
            made.fetch_add(1, Ordering::SeqCst);
            let next = if call.event.event_type.as_str() == "ring.a" { "ring.b" } else { "ring.a" };
            let publish = Publish {
                event_type: next.parse().unwrap(),
                payload: Payload::default(),
                key: None,
                metadata: tidegate::event::Metadata::new(),
            };
            let write = KvWrite { bucket: "kv/ring/n".into(), key: "n".into(), change: KvChange::Increment { by: 1 } };
            async move { Ok(Success { reply: None, effects: Effects { published: vec![publish], writes: vec![write] } }) }
        }
    });
    rig.on("ring", "ring.*", ring).await;
    let first = rig.handled(event("ring.a")).await;
    assert_eq!(first.record.status, Status::Completed, "its own handler did nothing wrong");
    rig.stop().await;

    let page = rig.broker.events(&EventFilter { limit: 10, ..Default::default() }).await.unwrap();
    let events: Vec<_> = page.records.iter().rev().map(|record| &record.event).collect();
    assert_eq!(events.iter().map(|event| event.depth).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for pair in events.windows(2) {
        assert_eq!(pair[1].caused_by.as_ref(), Some(&pair[0].id));
    }
    let dead = rig.broker.dead_letters(&DeadLetterFilter { limit: 10, ..Default::default() }).await.unwrap();
    let [letter] = &dead.letters[..] else { panic!("one dead letter: {dead:?}") };
    assert_eq!((&letter.event.event.id, letter.delivery.attempts.len()), (&events[3].id, 1), "and no other attempt");
    let attempt = &letter.delivery.attempts[0];
    let fault = attempt.error.as_ref().unwrap();
    assert_eq!((attempt.verdict, fault.code.as_str()), (Verdict::Denied, "too-deep"));
    let words = "more than 3 events that handlers published (limits.max_depth): ring.a → ring.b → ring.a → ring.b";
    assert!(fault.message.contains(words), "{}", fault.message);
    let named: Vec<_> = fault.details.iter().map(|(_, id)| id.as_str()).collect();
    assert_eq!(named, events.iter().map(|event| event.id.as_str()).collect::<Vec<_>>());
    assert_eq!(made.load(Ordering::SeqCst), 4);
    let counted = rig.provider.document("kv/ring/n", "n").await.unwrap().unwrap();
    assert_eq!(counted.value, "3", "what the refused attempt wrote is gone");
}

#[tokio::test(start_paused = true)]
async fn a_chain_of_which_the_store_has_forgotten_the_beginning_is_named_as_far_as_it_is_known() {
    let rig = Rig::with(Options { max_depth: 9, ..options() }, memory::Options::default()).await;
    rig.on(
        "again",
        "again",
        native(|_| async {
            let publish = Publish {
                event_type: "again".parse()?,
                payload: Payload::default(),
                key: None,
                metadata: tidegate::event::Metadata::new(),
            };
            Ok(Success { reply: None, effects: Effects { published: vec![publish], writes: Vec::new() } })
        }),
    )
    .await;
    let deep = Event { depth: 9, caused_by: Some("gone".parse().unwrap()), ..event("again") };
    let detail = rig.handled(deep).await;
    let error = detail.record.error.unwrap();
    assert!(error.contains("limits.max_depth): … → again"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_write_that_cannot_be_applied_is_a_host_fault_and_leaves_nothing() {
    let rig = Rig::start().await;
    rig.provider.put_document("kv/t/names", "k", "text".into(), tidegate::provider::Expect::Any, None).await.unwrap();
    let handler = native(|_| async {
        let write = KvWrite { bucket: "kv/t/names".into(), key: "k".into(), change: KvChange::Increment { by: 1 } };
        Ok(Success { reply: None, effects: Effects { published: Vec::new(), writes: vec![write] } })
    });
    rig.on("bad", "*", handler).await;
    let detail = rig.handled(event("a.b")).await;
    assert_eq!(detail.record.status, Status::Failed);
    let verdicts: Vec<Verdict> = detail.deliveries[0].attempts.iter().map(|attempt| attempt.verdict).collect();
    assert_eq!(verdicts, [Verdict::HostFault; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_new_subscription_may_start_in_the_past() {
    let rig = Rig::start().await;
    for _ in 0..3 {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    let (earliest, second, late) = (calls(), calls(), calls());
    for (name, start, calls) in
        [("earliest", Start::Earliest, &earliest), ("second", Start::Seq(2), &second), ("late", Start::Now, &late)]
    {
        let subscription = Subscription { start, ..subscription(name, "a.*") };
        rig.broker.subscribe(subscription.clone(), counting(calls)).await.unwrap();
        rig.broker.subscribe(subscription, counting(calls)).await.unwrap();
    }
    let mut rig = rig;
    rig.stop().await;
    assert_eq!([&earliest, &second, &late].map(|calls| calls.load(Ordering::SeqCst)), [3, 2, 0]);
}

#[tokio::test(start_paused = true)]
async fn concurrency_bounds_the_attempts_at_once() {
    let rig = Rig::start().await;
    let (now, most) = (calls(), calls());
    let handler = {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        native(move |_| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(10)).await;
                now.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
        })
    };
    let three = Subscription { concurrency: std::num::NonZeroU32::new(3), ..subscription("three", "*") };
    rig.broker.subscribe(three, handler).await.unwrap();
    for _ in 0..30 {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    let mut rig = rig;
    rig.stop().await;
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn rate_bounds_the_attempts_per_second() {
    let rig = Rig::start().await;
    let calls = calls();
    let limited = Subscription { rate: std::num::NonZeroU32::new(10), ..subscription("limited", "*") };
    rig.broker.subscribe(limited, counting(&calls)).await.unwrap();
    let began = Instant::now();
    for _ in 0..40 {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    let last = event("a.b");
    rig.handled(last).await;
    let took = began.elapsed();
    assert_eq!(calls.load(Ordering::SeqCst), 41);
    assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(5), "{took:?}");
}

/// On one thread, where whoever does not yield keeps all others waiting.
#[tokio::test]
async fn handlers_that_never_wait_leave_others_their_turn() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.broker.declare(subscription("s", "*")).await.unwrap();
    rig.broker.publish_batch((0..1_000).map(|_| event("a.b")).collect()).await.unwrap();
    rig.on("s", "*", counting(&calls)).await;
    while calls.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let handled = calls.load(Ordering::SeqCst);
    assert!(handled < 500, "{handled} events were handled before anybody else had a turn");
}

/// A worker takes several deliveries at once while attempts are short; when one waits, the others go on without it.
#[tokio::test(start_paused = true)]
async fn deliveries_that_a_worker_took_together_do_not_wait_for_one_that_waits() {
    let rig = Rig::start().await;
    let (gate, handled) = (Arc::new(Semaphore::new(0)), calls());
    let (opened, counted) = (Arc::clone(&gate), Arc::clone(&handled));
    let handler = native(move |call: Call| {
        let (gate, handled) = (Arc::clone(&opened), Arc::clone(&counted));
        async move {
            if call.event.id.as_str() == "slow" {
                gate.acquire().await?.forget();
            }
            handled.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    });
    rig.on("s", "a.*", handler).await;
    let short = |count: usize| (0..count).map(|_| event("a.b"));
    rig.broker.publish_batch(short(200).collect()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(handled.load(Ordering::SeqCst), 200);
    let slow = std::iter::once(event_with_id("a.b", "slow"));
    rig.broker.publish_batch(slow.chain(short(100)).collect()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(handled.load(Ordering::SeqCst), 300);
    assert_eq!(rig.status("slow").await, Status::Processing);
    gate.add_permits(1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((handled.load(Ordering::SeqCst), rig.status("slow").await), (301, Status::Completed));
}

/// While attempts are short nobody but the worker that makes them is woken for what comes meanwhile. One that turns out to wait
/// leaves that to others at once.
#[tokio::test(start_paused = true)]
async fn what_comes_while_an_attempt_begins_is_not_kept_waiting_when_that_waits() {
    let rig = Rig::with(Options { poll: Duration::from_secs(3600), ..options() }, memory::Options::default()).await;
    let (gate, handled, broker) = (Arc::new(Semaphore::new(0)), calls(), rig.broker.clone());
    let (opened, counted) = (Arc::clone(&gate), Arc::clone(&handled));
    let handler = native(move |call: Call| {
        let (gate, handled, broker) = (Arc::clone(&opened), Arc::clone(&counted), broker.clone());
        async move {
            if call.event.id.as_str() == "slow" {
                for _ in 0..3 {
                    broker.publish(event("a.b")).await?;
                }
                gate.acquire().await?.forget();
            }
            handled.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    });
    rig.on("s", "a.*", handler).await;
    for _ in 0..100 {
        rig.broker.publish(event("a.b")).await.unwrap();
        tokio::task::yield_now().await;
    }
    rig.broker.publish(event_with_id("a.b", "slow")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((handled.load(Ordering::SeqCst), rig.status("slow").await), (103, Status::Processing));
    gate.add_permits(1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((handled.load(Ordering::SeqCst), rig.status("slow").await), (104, Status::Completed));
}

/// A handler that keeps its thread, which it must not, keeps what comes meanwhile from others until the next poll only: while
/// attempts are short, when nobody is woken for it, and while they are not, when who is woken for it waits for the thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_comes_while_a_handler_blocks_its_thread_waits_for_a_poll_at_most() {
    for each in [Duration::ZERO, Duration::from_millis(1)] {
        let mut rig =
            Rig::with(Options { poll: Duration::from_millis(50), ..options() }, memory::Options::default()).await;
        let (send, receive) = std::sync::mpsc::channel();
        let (receive, handled, broker) = (Arc::new(Mutex::new(receive)), calls(), rig.broker.clone());
        let counted = Arc::clone(&handled);
        let handler = native(move |call: Call| {
            let (send, receive, broker, handled) =
                (send.clone(), Arc::clone(&receive), broker.clone(), Arc::clone(&counted));
            async move {
                match call.event.id.as_str() {
                    "blocks" => {
                        broker.publish(event_with_id("a.b", "meanwhile")).await?;
                        receive.lock().unwrap().recv_timeout(Duration::from_secs(60))?;
                    }
                    "meanwhile" => send.send(())?,
                    _ => std::thread::sleep(each),
                }
                handled.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        });
        rig.on("s", "a.*", handler).await;
        for _ in 0..100 {
            rig.handled(event("a.b")).await;
        }
        let detail = rig.handled(event_with_id("a.b", "blocks")).await;
        assert_eq!((detail.record.status, detail.deliveries[0].attempts.len()), (Status::Completed, 1), "{each:?}");
        // What lets the other go may not have ended by then.
        rig.stop().await;
        let meanwhile = rig.provider.get("meanwhile").await.unwrap().unwrap();
        assert_eq!((meanwhile.record.status, handled.load(Ordering::SeqCst)), (Status::Completed, 102), "{each:?}");
    }
}

/// Subscriptions with a backlog each claim the deliveries of the same events at the same time, and none takes the others' room.
#[tokio::test(start_paused = true)]
async fn subscriptions_with_much_to_do_claim_together_and_leave_each_other_room() {
    const NAMES: [&str; 4] = ["billing", "mail", "search", "stock"];
    const EVENTS: usize = 2_000;
    const BUFFER: usize = 400;
    let store = Tapped::new(Arc::new(MemoryProvider::open(memory::Options::default()).unwrap()));
    store.group();
    let options = Options { buffer_size: NonZeroUsize::new(BUFFER).unwrap(), ..options() };
    let workers = options.worker_count.get();
    let (broker, service) = Broker::open(Arc::clone(&store) as _, options, Metrics::default()).await.unwrap();
    let handled: Arc<[AtomicUsize; 4]> = Arc::default();
    let apart = calls();
    for (at, name) in NAMES.into_iter().enumerate() {
        let (handled, apart) = (Arc::clone(&handled), Arc::clone(&apart));
        let handler = native(move |_| {
            handled[at].fetch_add(1, Ordering::SeqCst);
            let counts = handled.each_ref().map(|count| count.load(Ordering::SeqCst));
            apart.fetch_max(counts.iter().max().unwrap() - counts.iter().min().unwrap(), Ordering::SeqCst);
            async { Ok(()) }
        });
        broker.subscribe(subscription(name, "*.*"), handler).await.unwrap();
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async move { drop(stopped.await) }));
    let events = (0..EVENTS).map(|_| event("a.b")).collect();
    broker.publish_batch(events).await.unwrap();
    drop(stop);
    running.await.unwrap().unwrap();
    assert_eq!(handled.each_ref().map(|count| count.load(Ordering::SeqCst)), [EVENTS; 4]);
    let claims: Vec<_> =
        store.claims().into_iter().filter(|claim| claim.iter().any(|(_, room)| *room > 2 * workers)).collect();
    let together = claims.iter().filter(|claim| claim.len() == NAMES.len()).count();
    assert!(claims.len() >= EVENTS * NAMES.len() / (BUFFER + 4 * workers), "{claims:?}");
    assert!(together * 10 >= claims.len() * 9, "{together} of {}: {claims:?}", claims.len());
    // And as much each, so that they go on getting the deliveries of the same events.
    let uneven = claims.iter().filter(|claim| claim.iter().any(|(_, room)| *room != claim[0].1)).count();
    assert_eq!(uneven, 0, "{claims:?}");
    let most = claims.iter().flatten().map(|(_, room)| *room).max().unwrap();
    assert!(most <= BUFFER / NAMES.len() + workers, "{most}: {claims:?}");
    let apart = apart.load(Ordering::SeqCst);
    assert!(apart <= BUFFER / NAMES.len(), "{apart}");
}

/// What a rate holds back is taken up with the next token, not with the next poll.
#[tokio::test(start_paused = true)]
async fn one_event_more_than_the_rate_waits_for_one_token() {
    let rig = Rig::start().await;
    let calls = calls();
    let limited = Subscription { rate: std::num::NonZeroU32::new(10), ..subscription("limited", "*") };
    rig.broker.subscribe(limited, counting(&calls)).await.unwrap();
    let began = Instant::now();
    for _ in 0..10 {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    rig.handled(event("a.b")).await;
    let took = began.elapsed();
    assert_eq!(calls.load(Ordering::SeqCst), 11);
    assert!(took >= Duration::from_millis(100) && took < Duration::from_millis(200), "{took:?}");
}

/// BEHAVIOURS C4, and all-or-nothing batches.
#[tokio::test(start_paused = true)]
async fn a_batch_with_one_bad_event_stores_none() {
    let rig = Rig::start().await;
    let huge = Payload::json(&"x".repeat(2 << 20)).unwrap();
    let batch = vec![event("a.b"), Event { payload: huge, ..event("a.b") }];
    let error = rig.broker.publish_batch(batch).await.unwrap_err();
    assert!(error.to_string().starts_with("[1].payload has 2097154 bytes"), "{error}");
    assert!(matches!(error, Error::TooLarge { .. }));
    assert_eq!(rig.broker.stats().await.unwrap().provider_stats.total_events, 0);
    let good = rig.broker.publish_batch(vec![event("a.b"), event("a.c")]).await.unwrap();
    assert_eq!(good.iter().map(|published| published.seq).collect::<Vec<_>>(), [1, 2]);
}

/// BEHAVIOURS C5.
#[tokio::test(start_paused = true)]
async fn in_sync_mode_publish_returns_when_the_handlers_are_done_and_keeps_the_callers_order() {
    let rig = Rig::with(Options { mode: Mode::Sync, ..options() }, memory::Options::default()).await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let order = Arc::clone(&order);
        native(move |call: Call| {
            let order = Arc::clone(&order);
            async move {
                order.lock().unwrap().push(call.event.seq.unwrap());
                if call.event.event_type.as_str() == "bad" {
                    return Err(Failure::Reject(Fault::new("bad", "no")));
                }
                Ok(())
            }
        })
    };
    rig.on("all", "*", handler).await;
    for (event_type, status) in [("good", Status::Completed), ("bad", Status::Failed), ("good", Status::Completed)] {
        assert_eq!(rig.broker.publish(event(event_type)).await.unwrap().status, status);
    }
    assert_eq!(*order.lock().unwrap(), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_redriven_dead_letter_gets_a_fresh_budget() {
    let rig = Rig::start().await;
    let calls = calls();
    rig.on("flaky", "*", failing(5, &calls)).await;
    let dead = rig.handled(event("a.b")).await;
    assert_eq!(dead.record.status, Status::Failed);
    assert_eq!(rig.broker.redrive(DeadLetterFilter::default()).await.unwrap(), 1);
    let id = dead.record.event.id.clone();
    let again =
        rig.broker.publish_sync(Event { id: id.clone(), ..event("a.b") }, Duration::from_secs(60)).await.unwrap();
    assert_eq!(again.detail.record.status, Status::Completed);
    let numbers: Vec<u32> = again.detail.deliveries[0].attempts.iter().map(|attempt| attempt.number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert_eq!(calls.load(Ordering::SeqCst), 6);
}

/// DESIGN §2.3: an attempt whose lease went to somebody else changes nothing.
#[tokio::test(start_paused = true)]
async fn a_settlement_after_its_lease_has_gone_is_refused_and_counted() {
    let rig = Rig::start().await;
    let (started, finish) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (started, finish) = (Arc::clone(&started), Arc::clone(&finish));
        native(move |_| {
            let finish = Arc::clone(&finish);
            started.notify_one();
            async move {
                finish.notified().await;
                Ok(())
            }
        })
    };
    rig.on("slow", "*", handler).await;
    let published = rig.broker.publish(event("a.b")).await.unwrap();
    started.notified().await;
    rig.broker.erase(published.id.as_str()).await.unwrap();
    finish.notify_one();
    let mut rig = rig;
    rig.stop().await;
    assert_eq!(rig.broker.stats().await.unwrap().stale_settlements, 1);
    assert!(rig.provider.get(published.id.as_str()).await.unwrap().is_none());
}

/// On real threads, where hints, claims and workers race.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_forgotten_when_publishers_and_workers_race() {
    const EVENTS: usize = 20_000;
    let memory = memory::Options { max_events: 2 * EVENTS as u64, ..memory::Options::default() };
    let rig = Rig::with(options(), memory).await;
    let (handled, all) = (calls(), Arc::new(Notify::new()));
    let handler = {
        let (handled, all) = (Arc::clone(&handled), Arc::clone(&all));
        native(move |_| {
            if handled.fetch_add(1, Ordering::SeqCst) + 1 == EVENTS {
                all.notify_one();
            }
            async { Ok(()) }
        })
    };
    rig.on("all", "*", handler).await;
    for _ in 0..EVENTS {
        rig.broker.publish(event("a.b")).await.unwrap();
    }
    if tokio::time::timeout(Duration::from_secs(20), all.notified()).await.is_err() {
        panic!("{} of {EVENTS} handled; {:?}", handled.load(Ordering::SeqCst), rig.broker.stats().await.unwrap());
    }
}

/// Takes up to eight events in one call; how many came together is written down. A batch with a poison event in it
/// comes to nothing, and the poison is refused when it comes alone.
struct Batches {
    calls: Mutex<Vec<usize>>,
}

#[async_trait::async_trait]
impl Handler for Batches {
    async fn handle(&self, call: Call) -> tidegate::handler::Outcome {
        self.calls.lock().unwrap().push(1);
        if call.event.id.as_str() == "poison" {
            return tidegate::handler::Outcome::failed(Verdict::Reject, Fault::new("poison", "refused"));
        }
        tidegate::handler::Outcome::ok()
    }

    fn max_batch(&self) -> usize {
        8
    }

    async fn handle_batch(&self, calls: Vec<Call>) -> Option<Vec<tidegate::handler::Outcome>> {
        self.calls.lock().unwrap().push(calls.len());
        match calls.iter().any(|call| call.event.id.as_str() == "poison") {
            true if calls.len().is_multiple_of(2) => panic!("one of them is bad"),
            true => None,
            false => Some(calls.iter().map(|_| tidegate::handler::Outcome::ok()).collect()),
        }
    }
}

/// Publishes these ids while nobody handles them, then has them handled in batches. Returns the sizes of the calls once
/// all are done.
async fn batched(ids: &[String]) -> (Vec<usize>, HashMap<String, EventDetail>) {
    let mut rig = Rig::start().await;
    let handler = Arc::new(Batches { calls: Mutex::default() });
    rig.broker.declare(subscription("s", "*")).await.unwrap();
    for id in ids {
        rig.broker.publish(event_with_id("a.b", id)).await.unwrap();
    }
    rig.on("s", "*", Arc::clone(&handler) as Arc<dyn Handler>).await;
    let mut details = HashMap::new();
    for id in ids {
        details.insert(id.clone(), rig.handled(event_with_id("a.b", id)).await);
    }
    rig.stop().await;
    let calls = handler.calls.lock().unwrap().clone();
    (calls, details)
}

fn numbered(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("e-{n}"))
}

fn completed_at_once(detail: &EventDetail) -> bool {
    detail.record.status == Status::Completed && detail.deliveries[0].attempts.len() == 1
}

#[tokio::test(start_paused = true)]
async fn events_that_wait_are_handed_over_together_and_each_has_one_attempt() {
    let (calls, details) = batched(&numbered(20).collect::<Vec<_>>()).await;
    assert!(details.values().all(completed_at_once), "{details:?}");
    assert_eq!((calls.iter().sum::<usize>(), calls.iter().max()), (20, Some(&8)), "{calls:?}");
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_comes_to_nothing_is_made_up_for_one_by_one() {
    for others in [6, 7] {
        let ids: Vec<_> = std::iter::once("poison".to_owned()).chain(numbered(others)).collect();
        let (calls, mut details) = batched(&ids).await;
        let poison = details.remove("poison").unwrap();
        assert_eq!(poison.deliveries[0].verdict, Some(Verdict::Reject));
        assert!(details.values().all(completed_at_once), "{details:?}");
        assert_eq!(calls, std::iter::once(others + 1).chain(std::iter::repeat_n(1, others + 1)).collect::<Vec<_>>());
    }
}
