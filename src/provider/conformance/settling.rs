//! Claims about `settle`.

use std::sync::Arc;
use std::time::Duration;

use super::scene::{
    LEASE, Scene, appends, attempt, ended, ended_by, event, event_with_id, forged, retry, set, success_with, write,
};
use crate::delivery::{Attempt, Fault, INFRA_BUDGET, KvChange, LogLine, Next, Reply, Seen, Status, Verdict};
use crate::event::EventId;
use crate::provider::{Amendment, DeadLetterFilter, Expect, Settled, Settlement};

const OPEN: Settled = Settled::Done { finished: None };
const COMPLETED: Settled = Settled::Done { finished: Some(Status::Completed) };
const FAILED: Settled = Settled::Done { finished: Some(Status::Failed) };

/// What a success leaves behind.
pub async fn a_success_completes_delivery_and_event(scene: Scene) {
    let id = scene.add_one(&["s", "t"]).await;
    let (first, second) = (scene.claim_one("s").await, scene.claim_one("t").await);
    assert_eq!(scene.settle(ended(&first, Next::Complete)).await, OPEN);
    assert_eq!(scene.detail(&id).await.record.status, Status::Processing);
    assert_eq!(scene.settle(ended(&second, Next::Complete)).await, COMPLETED);
    let detail = scene.detail(&id).await;
    let names: Vec<&str> = detail.deliveries.iter().map(|delivery| &*delivery.subscription).collect();
    assert_eq!(names, ["s", "t"]);
    assert_eq!((detail.record.status, detail.record.retry_count), (Status::Completed, 0));
    assert!(detail.record.processed_at.is_some() && detail.record.completed_at >= detail.record.processed_at);
    for delivery in &detail.deliveries {
        assert_eq!(
            (delivery.status, delivery.verdict, delivery.attempts.len()),
            (Status::Completed, Some(Verdict::Ok), 1)
        );
        assert_eq!((&delivery.error, delivery.due_at), (&None, None));
    }
    scene.advance(LEASE * 2).await;
    assert!(scene.claim("s", 9).await.is_empty());
}

/// DESIGN §3: the status of an event follows from its deliveries.
pub async fn an_event_is_failed_only_when_nothing_is_open(scene: Scene) {
    let id = scene.add_one(&["s", "t"]).await;
    scene.end(&scene.claim_one("s").await, Next::Fail).await;
    assert_eq!(scene.detail(&id).await.record.status, Status::Processing);
    scene.end(&scene.claim_one("t").await, Next::Complete).await;
    let record = scene.detail(&id).await.record;
    assert_eq!(record.status, Status::Failed);
    assert_eq!(record.error.as_deref(), Some("card: declined 1"));
    let stats = scene.stats().await;
    assert_eq!((stats.failed_events, stats.dead_letters, stats.completed_events), (1, 1, 0));
}

/// DESIGN §2, invariant 4.
pub async fn a_retry_becomes_due_after_exactly_its_delay(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    scene.end(&lease, Next::Retry { after: Duration::from_micros(1_500_001) }).await;
    let delivery = scene.delivery(&id).await;
    assert_eq!((delivery.status, delivery.retry_count), (Status::Pending, 1));
    assert!(delivery.due_at.is_some() && delivery.completed_at.is_none());
    assert_eq!(scene.detail(&id).await.record.status, Status::Processing);
    scene.advance(Duration::from_micros(1_500_000)).await;
    assert!(scene.claim("s", 1).await.is_empty());
    scene.advance(Duration::from_micros(1)).await;
    let again = scene.claim_one("s").await;
    assert_eq!((again.attempt, again.number, again.infra_faults), (2, 2, 0));
}

/// DESIGN §4: host faults do not eat the handler's budget.
pub async fn attempts_are_numbered_and_counted_by_who_is_to_blame(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let verdicts = [Verdict::Retry, Verdict::HostFault, Verdict::Timeout, Verdict::HostFault, Verdict::Trap];
    let expected = [(1, 1, 0), (2, 2, 0), (2, 3, 1), (3, 4, 1), (3, 5, 2)];
    for (verdict, expected) in verdicts.into_iter().zip(expected) {
        let lease = scene.claim_one("s").await;
        assert_eq!((lease.attempt, lease.number, lease.infra_faults), expected);
        let settled = scene.settle(ended_by(&lease, retry(0), verdict)).await;
        assert_eq!(settled, OPEN);
    }
    let delivery = scene.delivery(&id).await;
    let numbers: Vec<u32> = delivery.attempts.iter().map(|attempt| attempt.number).collect();
    assert_eq!((numbers, delivery.retry_count), (vec![1, 2, 3, 4, 5], 5));
    assert_eq!(delivery.verdict, Some(Verdict::Trap));
    assert!(scene.claim_one("s").await.infra_faults <= INFRA_BUDGET);
}

/// DESIGN §4: `reject`.
pub async fn a_refusal_is_a_dead_letter_at_once(scene: Scene) {
    let id = scene.run_one("s", Next::Fail).await;
    let detail = scene.detail(&id).await;
    let delivery = &detail.deliveries[0];
    assert_eq!((delivery.status, delivery.verdict), (Status::Failed, Some(Verdict::Reject)));
    assert_eq!(delivery.error.as_deref(), Some("card: declined 1"));
    assert_eq!(detail.record.completed_at, delivery.completed_at);
    assert!(delivery.completed_at.is_some());
    let letters = scene.provider.dead_letters(&DeadLetterFilter::default()).await.unwrap().letters;
    assert_eq!((letters.len(), &letters[0].event, &letters[0].delivery), (1, &detail.record, delivery));
}

/// DESIGN §2, invariant 3.
pub async fn a_stale_token_changes_nothing(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    let before = scene.detail(&id).await;
    for next in [Next::Complete, retry(0), Next::Fail, Next::Release] {
        let mut stale = ended(&lease, next);
        stale.key = forged(&lease.key);
        stale.published = appends(vec![event("never.seen")], &["s"]);
        stale.writes = vec![set("k", "never")];
        assert_eq!(scene.settle(stale).await, Settled::Stale);
    }
    let mut elsewhere = ended(&lease, Next::Complete);
    elsewhere.key.subscription = "unheard-of".into();
    assert_eq!(scene.settle(elsewhere).await, Settled::Stale);
    let mut beyond = ended(&lease, Next::Complete);
    beyond.key.seq = 99;
    assert_eq!(scene.settle(beyond).await, Settled::Stale);
    assert_eq!(scene.detail(&id).await, before);
    assert_eq!((scene.stats().await.head_seq, scene.text("b", "k").await), (1, None));
    scene.end(&lease, Next::Complete).await;
    assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, Settled::Stale);
}

/// A store may do at once what many settlements of a batch have in common: what differs is not drawn in.
pub async fn each_settlement_of_a_mixed_batch_counts_by_itself(scene: Scene) {
    scene.add(7, &["s"]).await;
    scene.add(1, &["s", "t"]).await;
    let leases = scene.claim("s", 9).await;
    let mut batch: Vec<Settlement> = leases.iter().map(|lease| ended(lease, Next::Complete)).collect();
    batch[1] = ended(&leases[1], retry(0));
    batch[2] = ended(&leases[2], Next::Fail);
    batch[3].key = forged(&leases[3].key);
    batch[4].writes = vec![set("k", "v")];
    batch[5].published = appends(vec![event("more.of.it")], &["u"]);
    batch.push(ended(&leases[0], Next::Fail));
    batch.push(ended(&leases[2], Next::Complete));
    let answers = scene.provider.settle(batch).await.unwrap();
    let late = [Settled::Stale, Settled::Stale];
    let first = [COMPLETED, OPEN, FAILED, Settled::Stale, COMPLETED, COMPLETED, COMPLETED, OPEN];
    assert_eq!(answers, [&first[..], &late].concat());
    assert_eq!(scene.text("b", "k").await.as_deref(), Some("v"));
    let stats = scene.stats().await;
    assert_eq!((stats.completed_events, stats.failed_events, stats.dead_letters), (4, 1, 1));
    assert_eq!((stats.pending_deliveries, stats.processing_deliveries, stats.head_seq), (3, 1, 9));

    // What came through together is settled together again, one for the first time.
    let again = scene.claim_one("s").await;
    let ends = [&again, &leases[3]].map(|lease| ended(lease, Next::Complete));
    assert_eq!(scene.provider.settle(ends.into()).await.unwrap(), [COMPLETED, COMPLETED]);
    for (lease, attempts) in leases.iter().zip([1, 2, 1, 1, 1, 1, 1, 1]) {
        let detail = scene.detail(&lease.event.id).await;
        assert_eq!(detail.deliveries[0].attempts.len(), attempts, "{detail:?}");
        assert!(detail.deliveries[0].completed_at >= detail.deliveries[0].started_at, "{detail:?}");
    }
}

/// What most settlements of a large batch have in common does not cover the one whose token is another.
pub async fn a_stale_token_among_many_of_a_claim_changes_nothing(scene: Scene) {
    scene.add(60, &["s"]).await;
    scene.add(60, &["s", "t"]).await;
    let mut leases = scene.claim("s", 80).await;
    leases.extend(scene.claim("s", 40).await);
    assert_eq!(leases.len(), 120);
    let next = |at: usize| if at.is_multiple_of(3) { Next::Fail } else { Next::Complete };
    let mut batch: Vec<Settlement> = leases.iter().enumerate().map(|(at, lease)| ended(lease, next(at))).collect();
    for stale in [7, 99] {
        batch[stale].key = forged(&leases[stale].key);
    }
    // Two of a claim that have changed places are as wrong as any other.
    let (one, other) = (leases[20].key.token, leases[22].key.token);
    (batch[20].key.token, batch[22].key.token) = (other, one);
    batch.rotate_left(50);
    let mut answers = scene.provider.settle(batch).await.unwrap();
    answers.rotate_right(50);
    for (at, (answer, lease)) in answers.iter().zip(&leases).enumerate() {
        let detail = scene.detail(&lease.event.id).await;
        let delivery = detail.deliveries.iter().find(|delivery| &*delivery.subscription == "s").unwrap();
        let (expected, status, attempts) = match (at, at.is_multiple_of(3)) {
            (7 | 20 | 22 | 99, _) => (Settled::Stale, Status::Processing, 0),
            (60.., _) => (OPEN, if at.is_multiple_of(3) { Status::Failed } else { Status::Completed }, 1),
            (_, true) => (FAILED, Status::Failed, 1),
            (_, false) => (COMPLETED, Status::Completed, 1),
        };
        assert_eq!((answer, delivery.status, delivery.attempts.len()), (&expected, status, attempts), "{at}");
    }
    let stats = scene.stats().await;
    assert_eq!((stats.processing_deliveries, stats.pending_deliveries, stats.dead_letters), (4, 60, 39));
}

/// DESIGN §2, invariant 3.
pub async fn a_lease_taken_away_cannot_be_settled(scene: Scene) {
    let reclaimed = scene.add_one(&["s"]).await;
    let stale = scene.claim_one("s").await;
    scene.advance(LEASE * 2).await;
    let lease = scene.claim_one("s").await;
    assert_eq!(scene.settle(ended(&stale, Next::Fail)).await, Settled::Stale);
    scene.end(&lease, Next::Fail).await;
    scene.provider.amend(Amendment::Redrive(DeadLetterFilter::default())).await.unwrap();
    assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, Settled::Stale);
    let after_redrive = scene.claim_one("s").await;
    scene.provider.amend(Amendment::Cancel { subscription: "s".into() }).await.unwrap();
    assert_eq!(scene.settle(ended(&after_redrive, Next::Complete)).await, Settled::Stale);
    assert!(scene.detail(&reclaimed).await.deliveries.is_empty());
    let erased = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    scene.provider.amend(Amendment::Erase { id: erased.to_string() }).await.unwrap();
    assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, Settled::Stale);
    assert_eq!(scene.provider.renew(&[lease.key], LEASE).await.unwrap(), [false]);
}

/// Whoever waits for an event hears once that it is finished.
pub async fn one_settlement_closes_an_event(scene: Scene) {
    scene.add(2, &["s", "t", "u"]).await;
    let mut leases = Vec::new();
    for subscription in ["s", "t", "u"] {
        leases.extend(scene.claim(subscription, 9).await);
    }
    let nexts = [Next::Complete, Next::Fail, Next::Complete, Next::Complete, Next::Fail, retry(0)];
    let batch = leases.iter().zip(nexts).map(|(lease, next)| ended(lease, next)).collect();
    let settled = scene.provider.settle(batch).await.unwrap();
    let mut expected = vec![OPEN; 6];
    expected[4] = FAILED;
    assert_eq!(settled, expected);
}

/// Whoever closes an event is told how it ended, by all of its deliveries.
pub async fn the_settlement_that_closes_an_event_is_told_how_it_ended(scene: Scene) {
    let ends = [
        ([Next::Fail, Next::Complete], FAILED),
        ([Next::Complete, Next::Fail], FAILED),
        ([Next::Fail, Next::Fail], FAILED),
        ([Next::Complete, Next::Complete], COMPLETED),
    ];
    for (nexts, closing) in ends {
        for at_once in [true, false] {
            scene.add(1, &["s", "t"]).await;
            let leases = [scene.claim_one("s").await, scene.claim_one("t").await];
            let mut batch: Vec<Settlement> = leases.iter().zip(nexts).map(|(lease, next)| ended(lease, next)).collect();
            let mut settled = Vec::new();
            while !batch.is_empty() {
                let rest = batch.split_off(if at_once { 2 } else { 1 });
                settled.extend(scene.provider.settle(std::mem::replace(&mut batch, rest)).await.unwrap());
            }
            assert_eq!(settled, [OPEN, closing.clone()], "{nexts:?}, at once: {at_once}");
        }
    }
}

/// A redriven letter that succeeds does not complete an event that has another one.
pub async fn an_event_that_is_closed_again_ends_by_all_of_its_deliveries(scene: Scene) {
    scene.add(1, &["s", "t"]).await;
    for (subscription, expected) in [("s", OPEN), ("t", FAILED)] {
        let lease = scene.claim_one(subscription).await;
        assert_eq!(scene.settle(ended(&lease, Next::Fail)).await, expected);
    }
    for (subscription, expected) in [("s", FAILED), ("t", COMPLETED)] {
        let filter = DeadLetterFilter { subscription: Some(subscription.into()), ..DeadLetterFilter::default() };
        assert_eq!(scene.provider.amend(Amendment::Redrive(filter)).await.unwrap(), 1);
        let lease = scene.claim_one(subscription).await;
        assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, expected);
    }
}

/// One stale or refused settlement does not hold back its neighbours.
pub async fn each_settlement_of_a_batch_stands_for_itself(scene: Scene) {
    scene.add(5, &["s"]).await;
    let leases = scene.claim("s", 5).await;
    let mut batch = vec![
        ended(&leases[0], Next::Complete),
        ended(&leases[1], Next::Complete),
        success_with(&leases[2], vec![set("word", "x"), write("word", KvChange::Increment { by: 1 })]),
        ended(&leases[3], Next::Fail),
        success_with(&leases[4], vec![write("count", KvChange::Increment { by: 5 })]),
        ended(&leases[0], Next::Complete),
    ];
    batch[1].key = forged(&leases[1].key);
    let settled = scene.provider.settle(batch).await.unwrap();
    assert_eq!([&settled[0], &settled[3], &settled[4]], [&COMPLETED, &FAILED, &COMPLETED]);
    assert_eq!([&settled[1], &settled[5]], [&Settled::Stale; 2]);
    assert!(matches!(&settled[2], Settled::Conflict { reason } if reason.contains("word")), "{:?}", settled[2]);
    let stats = scene.stats().await;
    assert_eq!((stats.completed_events, stats.failed_events, stats.processing_events), (2, 1, 2));
    assert_eq!((scene.text("b", "count").await.as_deref(), scene.text("b", "word").await), (Some("5"), None));
}

/// DESIGN §2, invariant 8.
pub async fn what_a_success_publishes_and_writes_commits_with_it(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    let mut child = event_with_id("child");
    child.caused_by = Some(id.clone());
    child.depth = 1;
    let settlement = Settlement {
        published: appends(vec![child, event_with_id("lonely")], &["t"]),
        writes: vec![set("k", "v"), write("n", KvChange::Increment { by: 3 })],
        ..ended(&lease, Next::Complete)
    };
    assert_eq!(scene.settle(settlement).await, COMPLETED);
    let leases = scene.claim("t", 9).await;
    assert_eq!(leases.iter().map(|lease| lease.key.seq).collect::<Vec<_>>(), [2, 3]);
    assert_eq!((leases[0].event.caused_by.as_ref(), leases[0].event.depth), (Some(&id), 1));
    assert_eq!(scene.text("b", "k").await.as_deref(), Some("v"));
    assert_eq!(scene.text("b", "n").await.as_deref(), Some("3"));
}

/// DESIGN §2, invariant 11: an attempt that is repeated publishes the same ids.
pub async fn published_events_are_idempotent_by_id(scene: Scene) {
    scene.append(vec![event_with_id("known")], &[]).await;
    scene.add(2, &["s"]).await;
    let leases = scene.claim("s", 2).await;
    let publishes = |lease| Settlement {
        published: appends(vec![event_with_id("known"), event_with_id("new"), event_with_id("new")], &["t"]),
        ..ended(lease, Next::Complete)
    };
    let settled = scene.provider.settle(vec![publishes(&leases[0]), publishes(&leases[1])]).await.unwrap();
    assert_eq!(settled, [COMPLETED, COMPLETED]);
    assert_eq!(scene.claim("t", 9).await.len(), 1);
    assert_eq!(scene.stats().await.head_seq, 4);
}

/// Increments are added at commit to what is stored then.
pub async fn increments_at_once_lose_nothing(scene: Scene) {
    scene.add(40, &["s"]).await;
    let scene = Arc::new(scene);
    let mut leases = scene.claim("s", 40).await;
    let mut workers = Vec::new();
    while !leases.is_empty() {
        let (scene, mine) = (Arc::clone(&scene), leases.split_off(leases.len() - 5));
        workers.push(tokio::spawn(async move {
            for lease in mine {
                let by = i64::try_from(lease.key.seq).unwrap();
                let writes = vec![write("sum", KvChange::Increment { by }), write("n", KvChange::Increment { by: 1 })];
                assert_eq!(scene.settle(success_with(&lease, writes)).await, COMPLETED);
            }
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(scene.text("b", "sum").await.as_deref(), Some("820"));
    assert_eq!(scene.text("b", "n").await.as_deref(), Some("40"));
}

/// DESIGN §2, invariant 8.
pub async fn a_write_that_cannot_be_applied_changes_nothing(scene: Scene) {
    let big = i64::MAX.to_string();
    scene.provider.put_document("b", "word", "1.5".into(), Expect::Any, None).await.unwrap();
    scene.provider.put_document("b", "big", big.clone().into(), Expect::Any, None).await.unwrap();
    let id = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    let before = scene.detail(&id).await;
    for key in ["word", "big"] {
        let mut settlement = success_with(&lease, vec![set("k", "v"), write(key, KvChange::Increment { by: 1 })]);
        settlement.published = appends(vec![event_with_id("never")], &["s"]);
        let settled = scene.settle(settlement).await;
        assert!(matches!(&settled, Settled::Conflict { reason } if reason.contains(key)), "{settled:?}");
    }
    assert_eq!(scene.detail(&id).await, before);
    assert_eq!((scene.text("b", "k").await, scene.text("b", "big").await), (None, Some(big)));
    assert!(scene.provider.get("never").await.unwrap().is_none());
    scene.end(&lease, Next::Complete).await;
}

/// Writes are applied in order.
pub async fn writes_of_one_success_see_each_other(scene: Scene) {
    scene.provider.put_document("b", "n", "7".into(), Expect::Any, None).await.unwrap();
    scene.add(1, &["s"]).await;
    let writes = vec![
        write("n", KvChange::Increment { by: -2 }),
        write("n", KvChange::Increment { by: 10 }),
        set("m", "1"),
        write("m", KvChange::Increment { by: 1 }),
        set("gone", "x"),
        write("gone", KvChange::Delete),
        write("absent", KvChange::Delete),
        set("o", "word"),
        write("o", KvChange::Delete),
        write("o", KvChange::Increment { by: 4 }),
    ];
    let settled = scene.settle(success_with(&scene.claim_one("s").await, writes)).await;
    assert_eq!(settled, COMPLETED);
    let texts = [scene.text("b", "n").await, scene.text("b", "m").await, scene.text("b", "o").await];
    assert_eq!(texts.map(Option::unwrap), ["15", "2", "4"]);
    assert_eq!((scene.text("b", "gone").await, scene.text("b", "absent").await), (None, None));
}

/// DESIGN §2, invariant 8.
pub async fn what_a_failure_would_write_is_not_written(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    for next in [retry(0), Next::Release, Next::Fail] {
        let lease = scene.claim_one("s").await;
        let published = appends(vec![event_with_id("never")], &["s"]);
        let settlement = Settlement { published, writes: vec![set("k", "v")], ..ended(&lease, next) };
        assert!(matches!(scene.settle(settlement).await, Settled::Done { .. }));
    }
    assert_eq!(scene.delivery(&id).await.status, Status::Failed);
    assert_eq!((scene.text("b", "k").await, scene.stats().await.head_seq), (None, 1));
}

/// DESIGN §7: every attempt records what the host saw.
pub async fn an_attempt_comes_back_as_it_was_recorded(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let mut expected = Vec::new();
    for hostile in super::publishing::hostile_texts() {
        let lease = scene.claim_one("s").await;
        let line =
            LogLine { level: 3, message: format!("{hostile}\n"), fields: vec![(hostile.clone(), hostile.clone())] };
        let record = Attempt {
            verdict: Verdict::Trap,
            started_at: crate::event::micros(1_700_000_000_000_001),
            duration_us: u64::from(u32::MAX) * 2,
            worker: hostile.as_str().into(),
            error: Some(Box::new(Fault {
                details: vec![(hostile.clone(), "\t".into())],
                ..Fault::new("code", &*hostile)
            })),
            reply: Some(Box::new(Reply { content_type: "image/png".into(), body: vec![0, 255, 7].into() })),
            trace: Seen {
                digest: None,
                fuel: Some(u64::MAX >> 1),
                peak_memory: Some(0),
                log: vec![line],
                backtrace: vec![hostile],
            }
            .into(),
            ..attempt(&lease, Verdict::Trap)
        };
        let settlement = Settlement { attempt: Some(record.clone()), ..ended(&lease, retry(0)) };
        assert!(matches!(scene.settle(settlement).await, Settled::Done { .. }));
        expected.push(record);
    }
    let delivery = scene.delivery(&id).await;
    assert_eq!(delivery.attempts, expected);
    assert_eq!(delivery.error.as_deref(), Some(&*expected[10].error.as_ref().unwrap().to_string()));
    assert!(EventId::parse(id.as_str()).is_ok());
}
