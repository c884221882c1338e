//! Claims about `claim` and `renew`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::scene::{LEASE, Scene, appends, attempt, ended_by, event, event_with_key, forged, request, retry, seqs};
use crate::delivery::{Next, Status, Verdict};
use crate::provider::{Lost, Settled};
use crate::subscription::Ordering;

const NANO: Duration = Duration::from_micros(1);

/// DESIGN §2, invariant 3.
pub async fn no_delivery_is_leased_twice_at_once(scene: Scene) {
    scene.add(200, &["s", "t"]).await;
    let scene = Arc::new(scene);
    let claimers: Vec<_> = (0..8)
        .map(|_| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move {
                let mut leases = Vec::new();
                loop {
                    let claimed = scene.claim_with(&request(&[("s", 7), ("t", 5)], Ordering::None)).await.leases;
                    if claimed.is_empty() {
                        return leases;
                    }
                    leases.extend(claimed.into_iter().map(|lease| (lease.key.seq, lease.key.subscription)));
                }
            })
        })
        .collect();
    let mut all = Vec::new();
    for claimer in claimers {
        all.extend(claimer.await.unwrap());
    }
    assert_eq!(all.len(), 400);
    assert_eq!(all.into_iter().collect::<HashSet<_>>().len(), 400);
}

/// DESIGN §2, invariants 2 and 3, where several processes share the store.
pub async fn two_instances_share_seq_and_never_lease_a_delivery_twice(scene: Scene) {
    let Some(another) = scene.another().await else { return };
    let both = [Arc::clone(&scene.provider), another];
    let batch = |count| appends((0..count).map(|_| event("shop.orders.create")).collect(), &["s"]);
    let work = both.iter().cycle().take(8).map(|provider| {
        let provider = Arc::clone(provider);
        tokio::spawn(async move {
            let (mut given, mut leased) = (Vec::new(), Vec::new());
            for _ in 0..10 {
                given.extend(provider.append(batch(3)).await.unwrap().iter().map(|appended| appended.seq));
                leased.extend(seqs(&provider.claim(&request(&[("s", 3)], Ordering::None)).await.unwrap().leases));
            }
            (given, leased)
        })
    });
    let (mut given, mut leased) = (Vec::new(), Vec::new());
    for task in work.collect::<Vec<_>>() {
        let (own_given, own_leased) = task.await.unwrap();
        given.extend(own_given);
        leased.extend(own_leased);
    }
    leased.extend(seqs(&scene.claim("s", 999).await));
    given.sort_unstable();
    leased.sort_unstable();
    assert_eq!(given, (1..=240).collect::<Vec<_>>());
    assert_eq!(leased, given);
}

/// Oldest first, and no more than asked for.
pub async fn the_oldest_come_first_and_room_is_kept_for_each_subscription(scene: Scene) {
    scene.add(5, &["s", "t"]).await;
    let claimed = scene.claim_with(&request(&[("t", 2), ("s", 3), ("u", 4)], Ordering::None)).await.leases;
    let of = |name: &str| -> Vec<u64> {
        claimed.iter().filter(|lease| &*lease.key.subscription == name).map(|lease| lease.key.seq).collect()
    };
    assert_eq!((of("t"), of("s"), of("u")), (vec![1, 2], vec![1, 2, 3], vec![]));
    let back = claimed.iter().find(|lease| &*lease.key.subscription == "t").unwrap();
    scene.end(back, Next::Release).await;
    assert_eq!(seqs(&scene.claim("t", 10).await), [1, 3, 4, 5]);
}

/// DESIGN §2, invariant 5.
pub async fn an_expired_lease_goes_to_the_next_claim_as_lost(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let first = scene.claim_one("s").await;
    scene.advance(LEASE - NANO).await;
    assert!(scene.claim("s", 1).await.is_empty());
    scene.advance(NANO * 2).await;
    let claimed = scene.claim_with(&request(&[("t", 1), ("s", 1)], Ordering::None)).await;
    assert_eq!(claimed.lost, [Lost { key: first.key.clone(), next: retry(0) }]);
    let second = &claimed.leases[0];
    assert_ne!(first.key.token, second.key.token);
    assert_eq!((second.attempt, second.number, second.infra_faults), (1, 2, 1));
    assert!(second.age > LEASE);
    assert_eq!(scene.settle(ended_by(&first, Next::Complete, Verdict::Ok)).await, Settled::Stale);
    let delivery = scene.delivery(&id).await;
    assert_eq!((delivery.status, delivery.retry_count), (Status::Processing, 1));
    let lost = &delivery.attempts[0];
    assert_eq!((lost.number, lost.verdict, &*lost.worker), (1, Verdict::Lost, "worker-1"));
    assert_eq!(lost.error.as_ref().map(|fault| fault.code.as_str()), Some("lost"));
    scene.end(second, Next::Complete).await;
    assert_eq!(scene.detail(&id).await.record.status, Status::Completed);
}

/// What a dispatcher sleeps by.
pub async fn a_claim_says_when_to_come_back(scene: Scene) {
    let nothing = scene.claim_with(&request(&[("s", 1)], Ordering::None)).await;
    assert_eq!(nothing.next_due, None);
    scene.add(1, &["s"]).await;
    let claimed = scene.claim_with(&request(&[("s", 1)], Ordering::None)).await;
    assert!(claimed.next_due.unwrap() <= LEASE);
    scene.end(&claimed.leases[0], retry(5_000)).await;
    let waiting = scene.claim_with(&request(&[("s", 1)], Ordering::None)).await;
    assert!(waiting.leases.is_empty());
    assert!(waiting.next_due.unwrap() <= Duration::from_secs(5));
    let other = scene.claim_with(&request(&[("t", 1)], Ordering::None)).await;
    assert_eq!(other.next_due, None);
}

/// DESIGN §2, invariant 5.
pub async fn renewing_keeps_a_lease_and_refuses_a_stale_one(scene: Scene) {
    scene.add(2, &["s"]).await;
    let leases = scene.claim("s", 2).await;
    scene.advance(LEASE / 2).await;
    let keys = [leases[0].key.clone(), forged(&leases[1].key)];
    assert_eq!(scene.provider.renew(&keys, LEASE).await.unwrap(), [true, false]);
    scene.advance(LEASE / 2 + NANO).await;
    let taken = scene.claim("s", 9).await;
    assert_eq!(seqs(&taken), [2]);
    let keys = [leases[1].key.clone(), leases[0].key.clone()];
    assert_eq!(scene.provider.renew(&keys, LEASE).await.unwrap(), [false, true]);
    scene.end(&leases[0], Next::Complete).await;
    assert_eq!(scene.provider.renew(&[leases[0].key.clone()], LEASE).await.unwrap(), [false]);
    scene.advance(LEASE + NANO).await;
    assert_eq!(seqs(&scene.claim("s", 9).await), [2]);
}

/// DESIGN §4: lost leases have a budget of their own.
pub async fn the_fourth_lost_lease_makes_a_dead_letter(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    for faults in 0..4 {
        assert_eq!(scene.claim_one("s").await.infra_faults, faults);
        scene.advance(LEASE + NANO).await;
    }
    let claimed = scene.claim_with(&request(&[("s", 1)], Ordering::None)).await;
    assert!(claimed.leases.is_empty());
    assert_eq!(claimed.lost.iter().map(|lost| lost.next).collect::<Vec<_>>(), [Next::Fail]);
    let detail = scene.detail(&id).await;
    let delivery = &detail.deliveries[0];
    assert_eq!((delivery.status, delivery.attempts.len(), delivery.retry_count), (Status::Failed, 4, 3));
    assert_eq!((detail.record.status, delivery.verdict), (Status::Failed, Some(Verdict::Lost)));
    assert!(delivery.error.as_ref().unwrap().contains("lease"));
    assert_eq!(scene.stats().await.dead_letters, 1);
}

/// DESIGN §6: what a shutdown gives back is unpunished.
pub async fn a_released_delivery_is_as_if_never_claimed(scene: Scene) {
    let id = scene.add_one(&["s"]).await;
    let before = scene.detail(&id).await;
    let lease = scene.claim_one("s").await;
    scene.end(&lease, Next::Release).await;
    assert_eq!(scene.detail(&id).await, before);
    let again = scene.claim_one("s").await;
    assert_eq!((again.attempt, again.number), (1, 1));
    scene.end(&again, retry(0)).await;
    let started = scene.delivery(&id).await.started_at;
    let third = scene.claim_one("s").await;
    scene.end(&third, Next::Release).await;
    let delivery = scene.delivery(&id).await;
    assert_eq!((delivery.started_at, delivery.attempts.len(), delivery.retry_count), (started, 1, 1));
    assert_eq!(scene.claim_one("s").await.number, 2);
}

/// DESIGN §6: ordering by key.
pub async fn a_failing_head_blocks_its_key_only(scene: Scene) {
    if !scene.keeps_key_order() {
        return;
    }
    let keys = ["a", "a", "b", "a", "b", "c"];
    scene.append(keys.iter().map(|key| event_with_key(key)).collect(), &["s"]).await;
    let heads = scene.claim_by_key("s", 10).await;
    assert_eq!(seqs(&heads), [1, 3, 6]);
    assert!(scene.claim_by_key("s", 10).await.is_empty());
    scene.end(&heads[0], retry(1_000)).await;
    scene.end(&heads[1], Next::Complete).await;
    let next = scene.claim_by_key("s", 10).await;
    assert_eq!(seqs(&next), [5]);
    scene.advance(Duration::from_millis(1_001)).await;
    let head = scene.claim_by_key("s", 10).await;
    assert_eq!(seqs(&head), [1]);
    scene.end(&head[0], Next::Release).await;
    let head = scene.claim_by_key("s", 10).await;
    assert_eq!(seqs(&head), [1]);
    scene.end(&head[0], Next::Complete).await;
    assert_eq!(seqs(&scene.claim_by_key("s", 10).await), [2]);
}

/// DESIGN §6: events without a key.
pub async fn events_without_a_key_are_not_ordered(scene: Scene) {
    if !scene.keeps_key_order() {
        return;
    }
    let events = vec![event("a"), event_with_key("k"), event("a"), event_with_key("k"), event("a")];
    scene.append(events, &["s"]).await;
    assert_eq!(seqs(&scene.claim_by_key("s", 2).await), [1, 2]);
    assert_eq!(seqs(&scene.claim_by_key("s", 9).await), [3, 5]);
    assert_eq!(seqs(&scene.claim("s", 9).await), [4], "without ordering the key does not matter");
}

/// One subscription's failing key is nobody else's.
pub async fn keys_of_different_subscriptions_do_not_wait_for_each_other(scene: Scene) {
    if !scene.keeps_key_order() {
        return;
    }
    scene.append(vec![event_with_key("k"), event_with_key("k")], &["s", "t"]).await;
    assert_eq!(seqs(&scene.claim_by_key("s", 9).await), [1]);
    let other = scene.claim_by_key("t", 9).await;
    assert_eq!(seqs(&other), [1]);
    scene.end(&other[0], Next::Complete).await;
    assert_eq!(seqs(&scene.claim_by_key("t", 9).await), [2]);
    assert!(scene.claim_by_key("s", 9).await.is_empty());
}

/// A dead letter does not block its key, and an expired head stays the head.
pub async fn a_dead_or_expired_head_lets_its_key_go_on(scene: Scene) {
    if !scene.keeps_key_order() {
        return;
    }
    scene.append(vec![event_with_key("k"), event_with_key("k")], &["s"]).await;
    let head = scene.claim_by_key("s", 9).await;
    scene.advance(LEASE + NANO).await;
    let head_again = scene.claim_by_key("s", 9).await;
    assert_eq!((seqs(&head), seqs(&head_again)), (vec![1], vec![1]));
    scene.end(&head_again[0], Next::Fail).await;
    let second = scene.claim_by_key("s", 9).await;
    assert_eq!(seqs(&second), [2]);
    assert_eq!(attempt(&second[0], Verdict::Ok).number, 1);
}

/// A subscription is just a name: deliveries wait until somebody asks for it.
pub async fn a_subscription_nobody_claims_waits(scene: Scene) {
    scene.add(1, &["nobody"]).await;
    assert!(scene.claim("somebody", 9).await.is_empty());
    scene.advance(Duration::from_secs(86_400)).await;
    assert_eq!(scene.claim("nobody", 9).await.len(), 1);
}
