//! Claims about `amend`, `prune`, `stats`, `wake`, `close`, and what outlives a restart.

use std::sync::Arc;
use std::time::Duration;

use super::scene::{LEASE, Scene, appends, ended, event, event_with_id, request, retry, seqs, set, success_with};
use crate::delivery::{Next, Status, Verdict};
use crate::error::Error;
use crate::event::{EventId, Seq};
use crate::pattern::Pattern;
use crate::provider::{Amendment, DeadLetterFilter, EventFilter, Expect, ProviderStats, Replay, Retention, Settled};
use crate::subscription::Ordering;

fn replay(subscription: &str) -> Replay {
    Replay {
        subscription: subscription.into(),
        pattern: Pattern::parse("*").unwrap(),
        from_seq: None,
        to_seq: None,
        from: None,
        to: None,
        missing_only: false,
        dry_run: false,
    }
}

async fn amend(scene: &Scene, amendment: Amendment) -> u64 {
    scene.provider.amend(amendment).await.unwrap()
}

/// DESIGN §3: failed → pending.
pub async fn a_redriven_letter_has_fresh_budgets_and_old_attempts(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    scene.end(&scene.claim_one("s").await, retry(0)).await;
    scene.claim_one("s").await;
    scene.advance(LEASE * 2).await;
    scene.end(&scene.claim_one("s").await, Next::Fail).await;
    assert_eq!(amend(&scene, Amendment::Redrive(DeadLetterFilter::default())).await, 1);
    let detail = scene.detail(&id).await;
    let delivery = &detail.deliveries[0];
    assert_eq!((delivery.status, delivery.attempts.len(), delivery.replay), (Status::Pending, 3, false));
    assert_eq!((delivery.completed_at, detail.record.status), (None, Status::Processing));
    let lease = scene.claim_one("s").await;
    assert_eq!((lease.attempt, lease.number, lease.infra_faults, lease.is_replay), (1, 4, 0, false));
    scene.end(&lease, Next::Complete).await;
    assert_eq!(scene.delivery(&id).await.attempts.len(), 4);
    assert_eq!(amend(&scene, Amendment::Redrive(DeadLetterFilter::default())).await, 0);
}

/// The filter of a redrive is that of the list.
pub async fn a_redrive_changes_what_its_filter_means_only(scene: Scene) {
    scene.add(4, &["s", "t"]).await;
    for subscription in ["s", "t"] {
        for lease in scene.claim(subscription, 9).await {
            scene.end(&lease, Next::Fail).await;
        }
    }
    let filter = DeadLetterFilter { subscription: Some("t".into()), limit: 3, ..DeadLetterFilter::default() };
    assert_eq!(amend(&scene, Amendment::Redrive(filter.clone())).await, 3);
    assert_eq!(seqs(&scene.claim("t", 9).await), [2, 3, 4], "as many as allowed, in the order of listing");
    assert!(scene.claim("s", 9).await.is_empty());
    let none = DeadLetterFilter { verdict: Some(Verdict::Timeout), ..filter };
    assert_eq!(amend(&scene, Amendment::Redrive(none)).await, 0);
    assert_eq!(scene.stats().await.dead_letters, 5);
}

/// DESIGN §1: replay.
pub async fn a_replay_delivers_a_stretch_again(scene: Scene) {
    let ids = ["e1", "e2", "e3", "e4", "e5"];
    scene.append(ids.iter().map(|id| event_with_id(id)).collect(), &["s"]).await;
    let leases = scene.claim("s", 4).await;
    scene.end(&leases[0], Next::Complete).await;
    scene.end(&leases[1], Next::Fail).await;
    scene.end(&leases[2], Next::Complete).await;
    let stretch = Replay { from_seq: Some(2), ..replay("s") };
    assert_eq!(amend(&scene, Amendment::Replay(stretch)).await, 2, "open deliveries stay as they are");
    let again = scene.claim("s", 9).await;
    assert_eq!(seqs(&again), [2, 3, 5]);
    let flags: Vec<(bool, u32, u32)> = again.iter().map(|one| (one.is_replay, one.attempt, one.number)).collect();
    assert_eq!(flags, [(true, 1, 2), (true, 1, 2), (false, 1, 1)]);
    assert!(scene.delivery(&EventId::parse("e3").unwrap()).await.replay);
    let other = Replay { to_seq: Some(3), from_seq: Some(3), ..replay("new") };
    assert_eq!(amend(&scene, Amendment::Replay(other)).await, 1);
    let first_time = scene.claim_one("new").await;
    assert_eq!((first_time.key.seq, first_time.is_replay, first_time.number), (3, true, 1));
    let by_type = Replay { pattern: Pattern::parse("other.*").unwrap(), ..replay("new") };
    assert_eq!(amend(&scene, Amendment::Replay(by_type)).await, 0);
}

/// How a new subscription starts in the past.
pub async fn a_replay_of_what_is_missing_leaves_the_rest(scene: Scene) {
    scene.add(2, &["s"]).await;
    scene.add(2, &[]).await;
    scene.end(&scene.claim_one("s").await, Next::Complete).await;
    let missing = Replay { missing_only: true, ..replay("s") };
    assert_eq!(amend(&scene, Amendment::Replay(missing.clone())).await, 2);
    assert_eq!(amend(&scene, Amendment::Replay(missing)).await, 0);
    let leases = scene.claim("s", 9).await;
    assert_eq!(seqs(&leases), [2, 3, 4]);
    assert!(leases.iter().all(|lease| !lease.is_replay));
    assert_eq!(scene.stats().await.processing_events, 3);
}

/// A dry run counts.
pub async fn a_dry_run_changes_nothing(scene: Scene) {
    let id = scene.run_one("s", Next::Complete).await;
    // Figures that only one kind of store has may move by themselves, as the memory of a server does.
    let figures = async || ProviderStats { provider_specific: serde_json::Map::new(), ..scene.stats().await };
    let before = (scene.detail(&id).await, figures().await);
    let dry = Replay { dry_run: true, ..replay("s") };
    assert_eq!(amend(&scene, Amendment::Replay(dry.clone())).await, 1);
    assert_eq!(amend(&scene, Amendment::Replay(Replay { subscription: "t".into(), ..dry.clone() })).await, 1);
    let later = scene.detail(&id).await.record.event.created_at + Duration::from_micros(1);
    assert_eq!(amend(&scene, Amendment::Replay(Replay { from: Some(later), ..dry })).await, 0);
    assert_eq!((scene.detail(&id).await, figures().await), before);
}

/// What becomes of the work of a subscription that is deleted.
pub async fn a_cancelled_subscription_has_no_open_deliveries(scene: Scene) {
    let done = scene.run_one("s", Next::Complete).await;
    let id = scene.add_one(&["s", "t"]).await;
    let waiting = scene.add_one(&["s"]).await;
    let lease = scene.claim_one("s").await;
    assert_eq!(amend(&scene, Amendment::Cancel { subscription: "s".into() }).await, 2);
    assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, Settled::Stale);
    scene.advance(LEASE * 2).await;
    assert!(scene.claim("s", 9).await.is_empty());
    assert_eq!(scene.claim("t", 9).await.len(), 1);
    assert_eq!(scene.delivery(&done).await.status, Status::Completed);
    assert_eq!(scene.delivery(&id).await.subscription.as_ref(), "t");
    assert_eq!(scene.detail(&waiting).await.record.status, Status::Completed);
    assert_eq!(amend(&scene, Amendment::Cancel { subscription: "s".into() }).await, 0);
    assert_eq!(amend(&scene, Amendment::Cancel { subscription: "unheard-of".into() }).await, 0);
}

/// DESIGN §9: `DELETE /v1/events/{id}`.
pub async fn an_erased_event_is_gone_but_its_id_and_seq_stay_used(scene: Scene) {
    scene.append(vec![event_with_id("e1"), event_with_id("e2")], &["s"]).await;
    let lease = scene.claim_one("s").await;
    assert_eq!(amend(&scene, Amendment::Erase { id: "e1".into() }).await, 1);
    assert_eq!(amend(&scene, Amendment::Erase { id: "e1".into() }).await, 0);
    assert_eq!(amend(&scene, Amendment::Erase { id: "unheard-of".into() }).await, 0);
    assert!(scene.provider.get("e1").await.unwrap().is_none());
    assert_eq!(scene.settle(ended(&lease, Next::Complete)).await, Settled::Stale);
    let again = scene.append(vec![event_with_id("e1"), event_with_id("e3")], &["s"]).await;
    assert_eq!((again[0].seq, again[0].duplicate, again[1].seq), (1, true, 3));
    assert_eq!(seqs(&scene.claim("s", 9).await), [2, 3]);
    let stats = scene.stats().await;
    assert_eq!((stats.total_events, stats.head_seq, stats.processing_deliveries), (2, 3, 2));
    assert_eq!(scene.provider.list(&EventFilter::default()).await.unwrap().records.len(), 2);
}

/// BEHAVIOURS E6; eviction must not remove pending events.
pub async fn pruning_by_age_never_removes_open_work(scene: Scene) {
    scene.add(4, &["s"]).await;
    let leases = scene.claim("s", 3).await;
    scene.end(&leases[1], Next::Complete).await;
    scene.end(&leases[2], Next::Fail).await;
    scene.advance(Duration::from_secs(7_200)).await;
    let hour = Retention { max_age: Some(Duration::from_secs(3_600)), max_events: None };
    let kept = Retention { max_age: Some(Duration::from_secs(36_000)), max_events: None };
    assert_eq!(scene.provider.prune(&Retention::default()).await.unwrap(), 0);
    assert_eq!(scene.provider.prune(&kept).await.unwrap(), 0);
    assert_eq!(scene.provider.prune(&hour).await.unwrap(), 2);
    assert_eq!(scene.provider.prune(&hour).await.unwrap(), 0);
    let page = scene.provider.read(0, 9).await.unwrap();
    let seqs: Vec<Seq> = page.events.iter().map(|event| event.seq.unwrap()).collect();
    assert_eq!((seqs, page.floor, page.head), (vec![1, 4], 4, 4));
    let stats = scene.stats().await;
    assert_eq!((stats.total_events, stats.dead_letters, stats.floor_seq), (2, 0, 4));
    assert_eq!(scene.claim("s", 9).await.len(), 2);
}

/// BEHAVIOURS E5.
pub async fn pruning_by_count_removes_the_oldest_finished_events(scene: Scene) {
    scene.add(1, &["s"]).await;
    scene.add(9, &[]).await;
    let six = Retention { max_age: None, max_events: Some(6) };
    assert_eq!(scene.provider.prune(&six).await.unwrap(), 4);
    let seqs: Vec<Seq> = scene.log(0, 99).await.iter().map(|event| event.seq.unwrap()).collect();
    assert_eq!(seqs, [1, 6, 7, 8, 9, 10]);
    let none = Retention { max_age: None, max_events: Some(0) };
    assert_eq!(scene.provider.prune(&none).await.unwrap(), 5);
    assert_eq!(scene.stats().await.total_events, 1);
    assert_eq!(scene.claim("s", 9).await.len(), 1);
}

/// What retention lets go of is forgotten altogether, also the id of an erased event.
pub async fn an_erased_id_is_forgotten_with_its_age(scene: Scene) {
    scene.append(vec![event_with_id("e1"), event_with_id("e2")], &["s"]).await;
    amend(&scene, Amendment::Erase { id: "e1".into() }).await;
    scene.advance(Duration::from_secs(7_200)).await;
    let hour = Retention { max_age: Some(Duration::from_secs(3_600)), max_events: None };
    assert_eq!(scene.provider.prune(&hour).await.unwrap(), 0, "an erased event has gone before");
    assert_eq!(scene.provider.read(0, 9).await.unwrap().floor, 2);
    let again = scene.append(vec![event_with_id("e1"), event_with_id("e2")], &[]).await;
    assert_eq!((again[0].seq, again[0].duplicate), (3, false));
    assert_eq!((again[1].seq, again[1].duplicate), (2, true));
}

/// DESIGN §2, invariant 2.
pub async fn seq_goes_on_after_everything_was_pruned(mut scene: Scene) {
    scene.append(vec![event_with_id("e1"), event_with_id("e2")], &[]).await;
    let none = Retention { max_age: None, max_events: Some(0) };
    assert_eq!(scene.provider.prune(&none).await.unwrap(), 2);
    let page = scene.provider.read(0, 9).await.unwrap();
    assert_eq!((page.events.len(), page.next, page.floor, page.head), (0, 2, 3, 2));
    let next = scene.append(vec![event_with_id("e1")], &[]).await[0];
    assert_eq!((next.seq, next.duplicate), (3, false), "a pruned event is forgotten, its seq is not given again");
    assert_eq!(scene.provider.prune(&none).await.unwrap(), 1);
    if scene.reopen().await {
        assert_eq!(scene.add(1, &[]).await, 4);
    }
}

/// BEHAVIOURS E12.
pub async fn what_was_stored_is_there_after_reopening(mut scene: Scene) {
    let ids = [
        scene.run_one("s", Next::Complete).await,
        scene.run_one("s", Next::Fail).await,
        scene.run_one("s", retry(60_000)).await,
        scene.add_one(&["s", "t"]).await,
    ];
    let lease = scene.claim_one("t").await;
    scene.settle(success_with(&lease, vec![set("k", "v")])).await;
    let held = scene.claim_one("s").await;
    amend(&scene, Amendment::Erase { id: ids[0].to_string() }).await;
    let mut before = Vec::new();
    for id in &ids[1..] {
        before.push(scene.detail(id).await);
    }
    let (stats, page) = (scene.stats().await, scene.provider.read(0, 9).await.unwrap());
    if !scene.reopen().await {
        return;
    }
    for (id, detail) in ids[1..].iter().zip(&before) {
        assert_eq!(scene.detail(id).await, *detail);
    }
    assert_eq!(scene.stats().await.dead_letters, stats.dead_letters);
    assert_eq!(scene.stats().await.processing_events, stats.processing_events);
    assert_eq!(scene.provider.read(0, 9).await.unwrap(), page);
    assert!(scene.append(vec![event_with_id(ids[0].as_str())], &[]).await[0].duplicate);
    assert_eq!(scene.text("b", "k").await.as_deref(), Some("v"));
    scene.end(&held, Next::Complete).await;
    assert_eq!(scene.add(1, &["s"]).await, 5);
}

/// DESIGN §5: `wake` is a hint that ticks.
pub async fn a_change_ticks_whoever_waits(scene: Scene) {
    let mut wake = scene.provider.wake();
    let ticked = async |wake: &mut tokio::sync::watch::Receiver<u64>, what: &str| {
        let waited = tokio::time::timeout(Duration::from_secs(30), wake.changed()).await;
        assert!(matches!(waited, Ok(Ok(()))), "no tick after {what}");
    };
    wake.mark_unchanged();
    let id = scene.add_one(&["s"]).await;
    ticked(&mut wake, "append").await;
    let lease = scene.claim_one("s").await;
    wake.mark_unchanged();
    scene.end(&lease, retry(0)).await;
    ticked(&mut wake, "settle").await;
    wake.mark_unchanged();
    amend(&scene, Amendment::Erase { id: id.to_string() }).await;
    ticked(&mut wake, "amend").await;
}

/// Who calls while the store closes is answered one way or the other.
pub async fn closing_leaves_no_call_hanging(scene: Scene) {
    let mut calls = Vec::new();
    for _ in 0..50 {
        let provider = Arc::clone(&scene.provider);
        calls.push(tokio::spawn(async move { provider.append(appends(vec![event("a")], &["s"])).await }));
    }
    tokio::task::yield_now().await;
    scene.provider.close().await.unwrap();
    for call in calls {
        let answer = tokio::time::timeout(Duration::from_secs(30), call).await.unwrap().unwrap();
        assert!(matches!(answer, Ok(_) | Err(Error::Stopped(_))), "{answer:?}");
    }
}

/// Closing never hangs, and nothing works afterwards.
pub async fn a_closed_store_answers_stopped(scene: Scene) {
    scene.add(1, &["s"]).await;
    scene.provider.close().await.unwrap();
    scene.provider.close().await.unwrap();
    let provider = &scene.provider;
    let answers = [
        provider.append(appends(vec![event("a")], &[])).await.err(),
        provider.claim(&request(&[("s", 1)], Ordering::None)).await.err(),
        provider.renew(&[], LEASE).await.err(),
        provider.settle(Vec::new()).await.err(),
        provider.read(0, 1).await.err(),
        provider.get("a").await.err(),
        provider.list(&EventFilter::default()).await.err(),
        provider.dead_letters(&DeadLetterFilter::default()).await.err(),
        provider.amend(Amendment::Erase { id: "a".into() }).await.err(),
        provider.prune(&Retention::default()).await.err(),
        provider.stats().await.err(),
        provider.document("c", "k").await.err(),
        provider.put_document("c", "k", "v".into(), Expect::Any, None).await.err(),
        provider.delete_document("c", "k", Expect::Any).await.err(),
        provider.list_documents("c", None, 1).await.err(),
    ];
    for (at, answer) in answers.into_iter().enumerate() {
        assert!(matches!(answer, Some(Error::Stopped(_))), "call {at}: {answer:?}");
    }
}
