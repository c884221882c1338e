//! Claims about `read`, `list` and `dead_letters`.

use std::collections::BTreeSet;

use super::scene::{Scene, ended_by, event, event_with_id, retry};
use crate::delivery::{Next, Status, Verdict};
use crate::event::{Event, Seq, Source, UserId, micros};
use crate::provider::{Amendment, DeadLetterFilter, DeadLetterPage, EventFilter};

/// DESIGN §2, invariant 9.
pub async fn the_log_is_read_in_pages_without_gaps(scene: Scene) {
    let empty = scene.provider.read(0, 5).await.unwrap();
    assert_eq!((empty.events.len(), empty.next, empty.floor, empty.head), (0, 0, 1, 0));
    assert!(!empty.epoch.is_empty());
    scene.add(23, &["s"]).await;
    for page in [1, 5, 23, 100] {
        let seqs: Vec<Seq> = scene.log(0, page).await.iter().map(|event| event.seq.unwrap()).collect();
        assert_eq!(seqs, (1..=23).collect::<Vec<Seq>>(), "pages of {page}");
    }
    let page = scene.provider.read(20, 2).await.unwrap();
    assert_eq!((page.next, page.head, page.floor), (22, 23, 1));
    assert_eq!(page.epoch, empty.epoch);
    let ahead = scene.provider.read(99, 2).await.unwrap();
    assert_eq!((ahead.events.len(), ahead.next, ahead.head), (0, 99, 23));
}

/// DESIGN §9: feeds pass over erased events.
pub async fn a_reader_passes_over_erased_events(scene: Scene) {
    let ids: Vec<String> = (1..=6).map(|n| format!("e{n}")).collect();
    scene.append(ids.iter().map(|id| event_with_id(id)).collect(), &[]).await;
    for id in ["e2", "e3", "e6"] {
        assert_eq!(scene.provider.amend(Amendment::Erase { id: id.into() }).await.unwrap(), 1);
    }
    let seqs = |events: &[std::sync::Arc<Event>]| events.iter().filter_map(|event| event.seq).collect::<Vec<Seq>>();
    assert_eq!(seqs(&scene.log(0, 2).await), [1, 4, 5]);
    assert_eq!(seqs(&scene.log(0, 1).await), [1, 4, 5]);
    let tail = scene.provider.read(5, 10).await.unwrap();
    assert_eq!((tail.events.len(), tail.next, tail.head, tail.floor), (0, 6, 6, 1));
}

async fn listed(scene: &Scene, filter: EventFilter) -> Vec<Seq> {
    let page = scene.provider.list(&filter).await.unwrap();
    page.records.iter().map(|record| record.event.seq.unwrap()).collect()
}

/// BEHAVIOURS E2.
pub async fn lists_are_newest_first_and_paging_is_complete(scene: Scene) {
    scene.add(10, &["s"]).await;
    let mut filter = EventFilter { limit: 4, ..EventFilter::default() };
    let (mut seqs, mut sizes) = (Vec::new(), Vec::new());
    loop {
        let page = scene.provider.list(&filter).await.unwrap();
        sizes.push(page.records.len());
        seqs.extend(page.records.iter().map(|record| record.event.seq.unwrap()));
        match page.next {
            Some(next) => filter.before = Some(next),
            None => break,
        }
    }
    assert_eq!((seqs, sizes), ((1..=10).rev().collect::<Vec<Seq>>(), vec![4, 4, 2]));
    assert_eq!(listed(&scene, EventFilter::default()).await.len(), 10);
    let exact = scene.provider.list(&EventFilter { limit: 10, ..EventFilter::default() }).await.unwrap();
    assert_eq!((exact.records.len(), exact.next), (10, None));
}

/// Pages over a moving log neither repeat nor skip.
pub async fn paging_is_stable_while_events_come_in(scene: Scene) {
    scene.add(20, &[]).await;
    let mut filter = EventFilter { limit: 3, ..EventFilter::default() };
    let mut seqs = Vec::new();
    loop {
        let page = scene.provider.list(&filter).await.unwrap();
        seqs.extend(page.records.iter().map(|record| record.event.seq.unwrap()));
        scene.add(2, &[]).await;
        match page.next {
            Some(next) => filter.before = Some(next),
            None => break,
        }
    }
    assert_eq!(seqs, (1..=20).rev().collect::<Vec<Seq>>());
}

/// Eight events that differ in every field that can be asked for.
fn varied() -> Vec<Event> {
    (1..=8_i64)
        .map(|n| {
            let types = ["shop.orders.create", "shop.orders.update", "chat.message", "shop.carts.create"];
            let mut event = event(types[usize::try_from(n).unwrap() % 4]);
            event.source = if n % 2 == 0 { Source::Database } else { Source::Websocket };
            event.user_id = match n % 3 {
                0 => None,
                1 => Some(UserId::Number(1)),
                _ => Some(UserId::Text("1".into())),
            };
            event.instance_id = if n > 4 { "east".into() } else { "west".into() };
            event.created_at = micros(1_700_000_000_000_000 + n);
            event
        })
        .collect()
}

/// BEHAVIOURS E2.
pub async fn every_filter_works_alone_and_with_others(scene: Scene) {
    let all = varied();
    scene.append(all.clone(), &[]).await;
    let at = |n: i64| Some(micros(1_700_000_000_000_000 + n));
    let none = EventFilter::default;
    let pattern = |text: &str| Some(text.parse().unwrap());
    let filters = [
        EventFilter { pattern: pattern("shop.*.create"), ..none() },
        EventFilter { pattern: pattern("*"), ..none() },
        EventFilter { pattern: pattern("no.such.type"), ..none() },
        EventFilter { source: Some(Source::Database), ..none() },
        EventFilter { user_id: Some(UserId::Number(1)), ..none() },
        EventFilter { user_id: Some(UserId::Text("1".into())), ..none() },
        EventFilter { schema: Some("shop".into()), ..none() },
        EventFilter { entity: Some("carts".into()), ..none() },
        EventFilter { operation: Some("update".into()), ..none() },
        EventFilter { instance_id: Some("east".into()), ..none() },
        EventFilter { instance_id: Some("' OR 1=1 --".into()), ..none() },
        EventFilter { from: at(3), ..none() },
        EventFilter { to: at(3), ..none() },
        EventFilter { from: at(3), to: at(6), status: Some(Status::Completed), ..none() },
        EventFilter { pattern: pattern("shop.**"), source: Some(Source::Database), to: at(7), ..none() },
        EventFilter { schema: Some("shop".into()), user_id: Some(UserId::Number(1)), from: at(2), ..none() },
    ];
    for filter in filters {
        let meant = |(event, seq): (&Event, Seq)| filter.admits_event(event).then_some(seq);
        let mut expected: Vec<Seq> = all.iter().zip(1..).filter_map(meant).collect();
        expected.reverse();
        assert_eq!(listed(&scene, filter.clone()).await, expected, "{filter:?}");
        let page = EventFilter { limit: 1, before: Some(5), ..filter.clone() };
        expected.retain(|&seq| seq < 5);
        expected.truncate(1);
        assert_eq!(listed(&scene, page).await, expected, "{filter:?}");
    }
}

/// BEHAVIOURS E12.
pub async fn filters_by_status_follow_the_deliveries(scene: Scene) {
    let of = async |status| listed(&scene, EventFilter { status: Some(status), ..EventFilter::default() }).await;
    scene.add(4, &["s"]).await;
    scene.add(1, &[]).await;
    let leases = scene.claim("s", 3).await;
    scene.end(&leases[0], Next::Complete).await;
    scene.end(&leases[1], Next::Fail).await;
    assert_eq!(of(Status::Pending).await, [4]);
    assert_eq!(of(Status::Processing).await, [3]);
    assert_eq!(of(Status::Completed).await, [5, 1]);
    assert_eq!(of(Status::Failed).await, [2]);
    scene.end(&leases[2], retry(0)).await;
    assert_eq!(of(Status::Processing).await, [3], "an event once begun is processing while it waits for a retry");
    let lease = scene.claim("s", 9).await.remove(1);
    scene.end(&lease, Next::Release).await;
    assert_eq!(of(Status::Pending).await, [4]);
}

async fn letters(scene: &Scene, filter: DeadLetterFilter) -> DeadLetterPage {
    scene.provider.dead_letters(&filter).await.unwrap()
}

/// The order, the pages and the conditions of dead letters.
pub async fn dead_letters_are_filtered_and_paged(scene: Scene) {
    let mut events = varied();
    events.truncate(4);
    let first_id = events[0].id.to_string();
    scene.append(events, &["b", "a"]).await;
    for subscription in ["a", "b"] {
        for lease in scene.claim(subscription, 9).await {
            let verdict = if lease.key.seq == 2 { Verdict::OutOfFuel } else { Verdict::Reject };
            let mut settlement = ended_by(&lease, Next::Fail, verdict);
            settlement.attempt.as_mut().unwrap().trace.digest = Some(format!("sha256:{subscription}").into());
            scene.settle(settlement).await;
        }
        scene.advance(std::time::Duration::from_secs(60)).await;
    }
    let all = letters(&scene, DeadLetterFilter::default()).await;
    let order: Vec<(Seq, &str)> =
        all.letters.iter().map(|letter| (letter.event.event.seq.unwrap(), &*letter.delivery.subscription)).collect();
    assert_eq!(order, [(4, "a"), (4, "b"), (3, "a"), (3, "b"), (2, "a"), (2, "b"), (1, "a"), (1, "b")]);
    assert_eq!(all.next, None);
    let mut filter = DeadLetterFilter { limit: 3, ..DeadLetterFilter::default() };
    let mut paged = BTreeSet::new();
    loop {
        let page = letters(&scene, filter.clone()).await;
        paged.extend(page.letters.iter().map(|one| (one.event.event.seq, one.delivery.subscription.clone())));
        match page.next {
            Some(next) => filter.after = Some(next),
            None => break,
        }
    }
    assert_eq!(paged.len(), 8);
    let none = DeadLetterFilter::default;
    let since = all.letters[1].delivery.completed_at;
    let rows = [
        (DeadLetterFilter { subscription: Some("a".into()), ..none() }, 4),
        (DeadLetterFilter { event_id: Some(first_id), ..none() }, 2),
        (DeadLetterFilter { pattern: Some("shop.orders.*".parse().unwrap()), ..none() }, 4),
        (DeadLetterFilter { verdict: Some(Verdict::OutOfFuel), ..none() }, 2),
        (DeadLetterFilter { digest: Some("sha256:b".into()), ..none() }, 4),
        (DeadLetterFilter { since, ..none() }, 4),
        (DeadLetterFilter { since, subscription: Some("a".into()), ..none() }, 0),
        (DeadLetterFilter { verdict: Some(Verdict::Reject), digest: Some("sha256:a".into()), ..none() }, 3),
    ];
    for (filter, count) in rows {
        assert_eq!(letters(&scene, filter.clone()).await.letters.len(), count, "{filter:?}");
    }
}
