//! Claims about `route` and the inbox.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::scene::{Scene, event_with_id};
use crate::event::{EventType, Seq, Source, UserId};
use crate::provider::inbox::{INSTANCE, InboxRow, REFUSED};
use crate::provider::{Inbox, RouteRequest, Routed};

fn row(event_type: &str) -> InboxRow {
    InboxRow { event_type: event_type.to_owned(), payload: Some("{\"n\": 1}".to_owned()), ..InboxRow::default() }
}

/// Routes with `s` as the one subscription of every type, and a limit of 1,000 bytes.
async fn route(scene: &Scene, max: usize) -> Routed {
    let matcher = |_: &EventType| -> Arc<[Arc<str>]> { [Arc::from("s")].into() };
    let request = RouteRequest { matcher: &matcher, max, max_payload: 1_000 };
    scene.provider.route(&request).await.unwrap()
}

/// Leaves rows in the inbox. `false`, with the reason printed, where there is none.
async fn leave(scene: &Scene, rows: &[InboxRow]) -> bool {
    let has_one = scene.provider.capabilities().inbox != Inbox::None;
    match scene.leave(rows).await {
        Ok(()) => assert!(has_one, "a store without an inbox cannot take rows"),
        Err(reason) => println!("skipped: {reason}"),
    }
    has_one
}

/// DESIGN §5, `route`.
pub async fn an_inbox_that_is_empty_or_absent_gives_nothing(scene: Scene) {
    let routed = route(&scene, 10).await;
    assert_eq!((routed.taken, routed.events.len()), (0, 0));
}

/// DESIGN §2, invariant 2.
pub async fn what_others_left_is_moved_in_order_with_its_deliveries(scene: Scene) {
    let rows: Vec<InboxRow> = (0..7).map(|n| InboxRow { id: Some(format!("i-{n}")), ..row("a.b.c") }).collect();
    if !leave(&scene, &rows).await {
        return;
    }
    scene.add(1, &[]).await;
    let first = route(&scene, 5).await;
    assert_eq!((first.taken, first.events.len()), (5, 5));
    assert_eq!(route(&scene, 5).await.taken, 2);
    assert_eq!(route(&scene, 5).await.taken, 0);
    let log = scene.log(1, 100).await;
    let ids: Vec<String> = log.iter().map(|event| event.id.to_string()).collect();
    assert_eq!(ids, (0..7).map(|n| format!("i-{n}")).collect::<Vec<_>>());
    assert_eq!(log.iter().filter_map(|event| event.seq).collect::<Vec<Seq>>(), (2..=8).collect::<Vec<_>>());
    assert_eq!(scene.claim("s", 99).await.len(), 7);
}

/// Every column reaches the event.
pub async fn what_a_row_says_reaches_the_event(scene: Scene) {
    let text = |text: &str| Some(text.to_owned());
    let said = InboxRow {
        id: text("o-1"),
        source: 3,
        created_at: Some(1_700_000_000_000_000),
        key: text("k ✓"),
        user_id: text("17"),
        session_id: text("s'\"\\"),
        instance_id: text("there"),
        schema: text("Sch"),
        entity: text("Ent"),
        operation: text("op"),
        trace_parent: text("00-1-2-01"),
        caused_by: text("cause"),
        metadata: text("{\"table_name\":\"übrig\"}"),
        content_type: text("application/x-b"),
        payload: None,
        binary: Some(vec![0, 1, 255]),
        ..row("x.y")
    };
    if !leave(&scene, &[said, row("x.y.z")]).await {
        return;
    }
    route(&scene, 9).await;
    let log = scene.log(0, 9).await;
    let event = &log[0];
    assert_eq!((event.id.as_str(), event.source, event.event_type.as_str()), ("o-1", Source::System, "x.y"));
    assert_eq!((event.created_at.as_second(), event.key.as_deref()), (1_700_000_000, Some("k ✓")));
    assert_eq!((&event.user_id, event.session_id.as_deref()), (&Some(UserId::Number(17)), Some("s'\"\\")));
    let parts = [&event.schema, &event.entity, &event.operation].map(|part| part.as_deref().unwrap());
    assert_eq!((parts, &*event.instance_id), (["Sch", "Ent", "op"], "there"));
    assert_eq!(
        (event.trace_parent.as_deref(), event.caused_by.as_ref().unwrap().as_str()),
        (Some("00-1-2-01"), "cause")
    );
    assert_eq!(event.metadata["table_name"], "übrig");
    assert_eq!((event.payload.content_type(), &event.payload.bytes()[..]), ("application/x-b", &[0, 1, 255][..]));
    let plain = &log[1];
    assert_eq!((plain.source, &*plain.instance_id, plain.entity.as_deref()), (Source::Database, INSTANCE, Some("y")));
    assert_eq!((&plain.payload.bytes()[..], &plain.user_id), (&b"{\"n\": 1}"[..], &None));
}

/// DESIGN §2, invariant 12.
pub async fn a_row_that_cannot_become_an_event_holds_nobody_up(scene: Scene) {
    let rows = [
        row("not a type"),
        InboxRow { payload: Some("{".to_owned()), ..row("a.b") },
        InboxRow { payload: Some(format!("\"{}\"", "x".repeat(1_000))), ..row("a.b") },
        InboxRow { metadata: Some(format!("{{\"m\":\"{}\"}}", "x".repeat(1_000))), ..row("a.b") },
        InboxRow { source: 77, ..row("a.b") },
        row("good.one"),
    ];
    if !leave(&scene, &rows).await {
        return;
    }
    assert_eq!(route(&scene, 99).await.taken, 6);
    let log = scene.log(0, 99).await;
    let types: Vec<&str> = log.iter().map(|event| event.event_type.as_str()).collect();
    assert_eq!(types, [REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, "good.one"]);
    for (event, words) in log.iter().zip(["segments may hold", "is not JSON", "1002 bytes", "1008 bytes", "source"]) {
        assert!(String::from_utf8_lossy(event.payload.bytes()).contains(words), "{words}: {:?}", event.payload);
    }
}

/// DESIGN §2, invariant 11.
pub async fn an_id_of_the_inbox_that_the_log_has_is_a_duplicate(scene: Scene) {
    let rows = ["known", "new", "new"].map(|id| InboxRow { id: Some(id.to_owned()), ..row("a.b") });
    scene.append(vec![event_with_id("known")], &["s"]).await;
    if !leave(&scene, &rows).await {
        return;
    }
    let routed = route(&scene, 99).await;
    assert_eq!((routed.taken, routed.events.len()), (3, 1));
    assert_eq!(scene.log(0, 9).await.len(), 2);
    assert_eq!(scene.claim("s", 9).await.len(), 2);
    assert_eq!(scene.stats().await.head_seq, 2);
}

/// Correctness comes from the store, not from a leader.
pub async fn rows_that_many_route_at_once_are_moved_once(scene: Scene) {
    let rows: Vec<InboxRow> = (0..200).map(|n| InboxRow { id: Some(format!("i-{n}")), ..row("a.b") }).collect();
    if !leave(&scene, &rows).await {
        return;
    }
    let scene = Arc::new(scene);
    let routers: Vec<_> = (0..8)
        .map(|_| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move {
                let mut moved = 0;
                for _ in 0..20 {
                    moved += route(&scene, 30).await.events.len();
                }
                moved
            })
        })
        .collect();
    let mut moved = 0;
    for router in routers {
        moved += router.await.unwrap();
    }
    // Whoever finds another one at it may leave it to that one.
    while moved < 200 {
        let rest = route(&scene, 30).await;
        assert!(rest.taken > 0, "only {moved} of 200 were moved");
        moved += rest.events.len();
    }
    assert_eq!(moved, 200);
    let seqs: BTreeSet<Seq> = scene.log(0, 99).await.iter().filter_map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=200).collect());
    assert_eq!(scene.claim("s", 999).await.len(), 200);
}
