//! Claims about `append`.

use std::collections::HashSet;
use std::sync::Arc;

use super::scene::{Scene, appends, event, event_with_id};
use crate::delivery::{Next, Status};
use crate::event::{Event, EventId, Payload, Seq, Source, UserId};

/// DESIGN §2, invariant 2.
pub async fn seq_is_dense_under_many_publishers(scene: Scene) {
    let scene = Arc::new(scene);
    let publishers = (0..32).map(|_| {
        let scene = Arc::clone(&scene);
        tokio::spawn(async move {
            let mut seqs = Vec::new();
            for size in [1, 3, 2] {
                let events = (0..size).map(|_| event("a.b")).collect();
                seqs.extend(scene.append(events, &["s"]).await.iter().map(|appended| appended.seq));
            }
            seqs
        })
    });
    let mut seqs: Vec<Seq> = Vec::new();
    for publisher in publishers.collect::<Vec<_>>() {
        let own = publisher.await.unwrap();
        assert!(own.is_sorted(), "one publisher's own order is kept");
        seqs.extend(own);
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=192).collect::<Vec<Seq>>());
    assert_eq!(scene.stats().await.head_seq, 192);
}

/// DESIGN §2, invariant 11.
pub async fn an_id_is_stored_once_whoever_sends_it_again(scene: Scene) {
    let first = scene.append(vec![event_with_id("order-1")], &["s"]).await[0];
    assert!(!first.duplicate);
    let again = scene.append(vec![event("x"), event_with_id("order-1")], &["s", "t"]).await;
    assert_eq!((again[1].seq, again[1].duplicate), (first.seq, true));
    assert_eq!(again[0].seq, first.seq + 1);
    assert_eq!(scene.detail(&EventId::parse("order-1").unwrap()).await.deliveries.len(), 1);
    assert_eq!(scene.stats().await.head_seq, first.seq + 1);
}

/// DESIGN §2, invariant 11.
pub async fn an_id_sent_by_many_at_once_is_stored_once(scene: Scene) {
    let scene = Arc::new(scene);
    let senders: Vec<_> = (0..16)
        .map(|_| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move { scene.append(vec![event_with_id("same")], &["s"]).await[0] })
        })
        .collect();
    let mut firsts = 0;
    for sender in senders {
        let appended = sender.await.unwrap();
        assert_eq!(appended.seq, 1);
        firsts += u32::from(!appended.duplicate);
    }
    assert_eq!(firsts, 1);
    assert_eq!(scene.claim("s", 10).await.len(), 1);
}

/// DESIGN §2, invariant 11.
pub async fn an_id_twice_in_one_batch_is_stored_once(scene: Scene) {
    let batch = vec![event_with_id("a"), event_with_id("b"), event_with_id("a"), event_with_id("c")];
    let appended = scene.append(batch, &["s"]).await;
    let seqs: Vec<(Seq, bool)> = appended.iter().map(|appended| (appended.seq, appended.duplicate)).collect();
    assert_eq!(seqs, [(1, false), (2, false), (1, true), (3, false)]);
    assert_eq!(scene.claim("s", 10).await.len(), 3);
}

/// The status that the caller is told is that of the log.
pub async fn a_duplicate_answers_with_the_status_of_the_first(scene: Scene) {
    let statuses = [Status::Pending, Status::Processing, Status::Completed];
    let appended = scene.append(vec![event_with_id("a")], &["s"]).await[0];
    assert_eq!(appended.status, statuses[0]);
    let lease = scene.claim_one("s").await;
    assert_eq!(scene.append(vec![event_with_id("a")], &["s"]).await[0].status, statuses[1]);
    scene.end(&lease, Next::Complete).await;
    assert_eq!(scene.append(vec![event_with_id("a")], &["s"]).await[0].status, statuses[2]);
}

/// An event nobody handles must not stay pending for ever.
pub async fn an_event_for_nobody_is_completed_at_once(scene: Scene) {
    let event = event("chat.message");
    let id = event.id.clone();
    assert_eq!(scene.append(vec![event], &[]).await[0].status, Status::Completed);
    let detail = scene.detail(&id).await;
    assert_eq!((detail.record.status, detail.deliveries.len()), (Status::Completed, 0));
    assert!(detail.record.completed_at.is_some());
    assert_eq!(scene.stats().await.completed_events, 1);
}

fn full_event() -> Event {
    let mut event = event("public.users.create");
    event.source = Source::Database;
    event.user_id = Some(UserId::Number(-7));
    event.session_id = Some("session".into());
    event.schema = Some("other".into());
    event.entity = None;
    event.key = Some("user/1".into());
    event.created_at = crate::event::micros(1_700_000_000_123_456);
    event.metadata.insert("roles".into(), serde_json::json!(["admin", 1.5, null]));
    event.trace_parent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into());
    event.caused_by = Some(EventId::random());
    event.depth = 3;
    event
}

/// BEHAVIOURS A1, A6.
pub async fn an_event_comes_back_as_it_was_sent(scene: Scene) {
    let mut plain = event("a");
    plain.user_id = Some(UserId::Text("7".into()));
    let mut sent = vec![full_event(), plain, event("a.b.c")];
    scene.append(sent.clone(), &["s"]).await;
    for (event, seq) in sent.iter_mut().zip(1..) {
        event.seq = Some(seq);
    }
    let leased: Vec<Event> = scene.claim("s", 9).await.into_iter().map(|lease| (*lease.event).clone()).collect();
    assert_eq!(leased, sent);
    let read: Vec<Event> = scene.log(0, 9).await.iter().map(|event| (**event).clone()).collect();
    assert_eq!(read, sent);
    for event in &sent {
        assert_eq!(*scene.detail(&event.id).await.record.event, *event);
    }
}

/// Texts that have broken stores before.
pub(super) fn hostile_texts() -> Vec<String> {
    let texts = [
        "'; DROP TABLE events; --",
        "\"quoted\" and 'quoted' and `quoted`",
        "50%_of*the?[chars]",
        "back\\slash \\u0000 \\n",
        "emoji 🦀👩‍👩‍👧 and ünïcödé",
        "null",
        "{\"json\":[1,2]}",
        " leading and trailing ",
        "$1 ?1 :name @p #x",
        "a:b|c,d;e\u{2028}f",
    ];
    texts.iter().map(|&text| text.to_owned()).chain([String::from("é").repeat(255)]).collect()
}

/// DESIGN §2, invariant 12.
pub async fn hostile_texts_are_only_texts(scene: Scene) {
    for (text, seq) in hostile_texts().into_iter().zip(1..) {
        let mut event = event_with_id(&text);
        event.key = Some(text.as_str().into());
        event.session_id = Some(text.as_str().into());
        event.schema = Some(text.as_str().into());
        event.user_id = Some(UserId::Text(text.as_str().into()));
        event.payload = Payload::json(&format!("{text}\n\r\t\u{1}")).unwrap();
        event.metadata.insert(text.clone(), text.clone().into());
        let expected = Event { seq: Some(seq), ..event.clone() };
        scene.append(vec![event.clone()], &["s"]).await;
        assert!(scene.append(vec![event], &["s"]).await[0].duplicate, "{text}");
        let leases = scene.claim_by_key("s", 1).await;
        assert_eq!(*leases[0].event, expected);
        assert_eq!(*scene.detail(&expected.id).await.record.event, expected);
        scene.end(&leases[0], Next::Complete).await;
    }
    assert_eq!(scene.stats().await.completed_events, 11);
}

/// BEHAVIOURS A6.
pub async fn binary_payloads_keep_every_byte(scene: Scene) {
    let every: Vec<u8> = (0..=255).cycle().take(1_000).collect();
    let bodies = [every, Vec::new(), vec![0], "ünïcödé".as_bytes().to_vec(), vec![0xff, 0xfe]];
    let payloads = bodies.map(|body| Payload::new("image/x; q='1'", body).unwrap());
    let events = payloads.iter().map(|payload| Event { payload: payload.clone(), ..event("a.b") }).collect();
    scene.append(events, &["s"]).await;
    let leased: Vec<Payload> = scene.claim("s", 9).await.iter().map(|lease| lease.event.payload.clone()).collect();
    assert_eq!(leased, payloads);
}

/// BEHAVIOURS A6.
pub async fn numbers_keep_their_spelling(scene: Scene) {
    let text = "{ \"b\" : 1.50,\n\"a\":1e400, \"c\":-0.0, \"d\":123456789012345678901234567890, \"b\":\"\\u00e9\" }";
    let event = Event { payload: Payload::json_text(text).unwrap(), ..event("a.b") };
    scene.append(vec![event], &["s"]).await;
    assert_eq!(scene.claim_one("s").await.event.payload.bytes(), text.as_bytes());
    assert_eq!(scene.log(0, 1).await[0].payload.bytes(), text.as_bytes());
}

/// DESIGN §3: payloads of up to 1 MiB.
pub async fn a_payload_of_a_mebibyte_fits(scene: Scene) {
    let body: Vec<u8> = (0..1 << 20).map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let text = serde_json::to_string(&"x\n".repeat(1 << 18)).unwrap();
    let binary = Event { payload: Payload::new("application/octet-stream", body).unwrap(), ..event("a.b") };
    let json = Event { payload: Payload::json_text(text).unwrap(), ..event("a.b") };
    let payloads = [binary.payload.clone(), json.payload.clone()];
    scene.append(vec![binary, json], &["s"]).await;
    let leased: Vec<Payload> = scene.claim("s", 9).await.iter().map(|lease| lease.event.payload.clone()).collect();
    assert!(leased == payloads);
}

/// Nothing to do is no error.
pub async fn an_empty_batch_is_fine(scene: Scene) {
    assert!(scene.provider.append(appends(Vec::new(), &["s"])).await.unwrap().is_empty());
    assert!(scene.provider.settle(Vec::new()).await.unwrap().is_empty());
    assert!(scene.provider.renew(&[], super::scene::LEASE).await.unwrap().is_empty());
    assert!(scene.claim("s", 0).await.is_empty());
    assert!(scene.log(0, 10).await.is_empty());
    let ids: HashSet<Seq> = scene.append(vec![event("a")], &[]).await.iter().map(|appended| appended.seq).collect();
    assert_eq!(ids, HashSet::from([1]));
}
