//! What others leave in the inbox, and what becomes of it.

use super::*;
use crate::event::{EventType, UserId};

/// Everything goes to `s`, but refusals to `refusals`.
async fn route_within(provider: &PostgresProvider, max: usize, max_payload: u64) -> usize {
    let matcher = |event_type: &EventType| -> Arc<[Arc<str>]> {
        let name = if event_type.as_str() == "tidegate.inbox.refused" { "refusals" } else { "s" };
        [Arc::from(name)].into()
    };
    provider.route(&RouteRequest { matcher: &matcher, max, max_payload }).await.unwrap().taken
}

async fn route(provider: &PostgresProvider, max: usize) -> usize {
    route_within(provider, max, crate::event::MAX_PAYLOAD).await
}

#[tokio::test]
async fn rows_of_the_inbox_become_events_in_their_order() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    assert_eq!(route(&provider, 9).await, 0);
    schema.sql("INSERT INTO {s}.inbox (type, payload) SELECT 'n.' || n, n FROM generate_series(1, 7) n");
    assert_eq!((route(&provider, 3).await, route(&provider, 9).await, route(&provider, 9).await), (3, 4, 0));
    let leases = claim(&provider, 9).await;
    let types: Vec<&str> = leases.iter().map(|lease| lease.event.event_type.as_str()).collect();
    assert_eq!(types, ["n.1", "n.2", "n.3", "n.4", "n.5", "n.6", "n.7"]);
    assert_eq!(leases[6].event.payload.bytes(), "7".as_bytes());
    assert_eq!(leases[0].event.created_at.as_microsecond(), schema.time.load(Ordering::Relaxed));
}

#[tokio::test]
async fn a_row_is_taken_as_it_says_and_the_rest_is_filled_in() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    schema.sql(
        "INSERT INTO {s}.inbox (id, type, source, created_at, key, user_id, session_id, instance_id, schema, \
         trace_parent, caused_by, metadata, content_type, \"binary\") VALUES ('x', 'a.b.c', 4, 7, 'k', '-3', 'ses', 'app', \
         'other', 'tp', 'y', '{\"a\": [1]}', 'image/png', '\\x00ff')",
    );
    schema.sql("INSERT INTO {s}.inbox (type, user_id) VALUES ('public.users.create', '\"7\"')");
    assert_eq!(route(&provider, 9).await, 2);
    let leases = claim(&provider, 9).await;
    let full = &*leases[0].event;
    assert_eq!((full.id.as_str(), full.source, full.created_at.as_microsecond()), ("x", Source::Internal, 7));
    assert_eq!((full.key.as_deref(), full.user_id.as_ref()), (Some("k"), Some(&UserId::Number(-3))));
    assert_eq!((full.session_id.as_deref(), &*full.instance_id), (Some("ses"), "app"));
    assert_eq!(
        (full.schema.as_deref(), full.entity.as_deref(), full.operation.as_deref()),
        (Some("other"), Some("b"), Some("c"))
    );
    assert_eq!((full.payload.content_type(), &full.payload.bytes()[..]), ("image/png", &[0, 255][..]));
    assert_eq!(full.metadata["a"], serde_json::json!([1]));
    assert_eq!((full.trace_parent.as_deref(), full.caused_by.as_ref().unwrap().as_str()), (Some("tp"), "y"));
    let bare = &*leases[1].event;
    assert_eq!((bare.source, &*bare.instance_id), (Source::Database, "database"));
    assert_eq!((bare.entity.as_deref(), bare.user_id.as_ref()), (Some("users"), Some(&UserId::Text("7".into()))));
    assert_eq!((bare.id.as_str().len(), bare.payload.bytes()), (36, Payload::default().bytes()));
}

/// Nothing blocks what is behind it, and nothing vanishes in silence.
#[tokio::test]
async fn a_row_that_cannot_be_an_event_becomes_one_that_says_why() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    let rows = [
        ("(type) VALUES ('no type')", "type"),
        ("(type) VALUES (repeat('x', 100000))", "at most 255 bytes"),
        ("(type, payload) VALUES ('a.b', '{')", "is not JSON"),
        ("(type, payload) VALUES ('a.b', to_json(repeat('x', 200)))", "more than the limit of 100"),
        ("(type, source) VALUES ('a.b', 9)", "source"),
        ("(type, user_id) VALUES ('a.b', '1.5')", "user_id"),
        ("(type, metadata) VALUES ('a.b', '[]')", "metadata"),
        ("(type, id) VALUES ('a.b', '')", "event ID is required"),
        ("(type, payload, \"binary\") VALUES ('a.b', '1', '1')", "beside payload"),
    ];
    for (row, _) in rows {
        schema.sql(&format!("INSERT INTO {{s}}.inbox {row}"));
    }
    schema.sql("INSERT INTO {s}.inbox (type) VALUES ('good')");
    assert_eq!(route_within(&provider, 99, 100).await, 10);
    assert_eq!(claim(&provider, 9).await[0].event.event_type.as_str(), "good");
    let refusals = provider.claim(&request("refusals", 99, Turn::None)).await.unwrap().leases;
    assert_eq!(refusals.len(), rows.len());
    for (lease, (row, words)) in refusals.iter().zip(rows) {
        let told: serde_json::Value = lease.event.payload.parse().unwrap();
        assert!(told["reason"].as_str().unwrap().contains(words), "{row}: {told}");
        assert!(told["position"].is_i64() && told["type"].is_string() && lease.event.payload.bytes().len() < 2_000);
        assert_eq!(lease.event.source, Source::System);
    }
}

/// What stands together is counted as what it becomes, and one that cannot be taken apart is one refusal.
#[tokio::test]
async fn rows_of_a_table_that_stand_together_become_an_event_each() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    schema.sql(
        "INSERT INTO {s}.inbox (type, user_id, metadata, rows, payload) SELECT 'public.t.create', '7', '{\"table_name\": \"t\"}', 64, \
         '{\"pk\":[\"id\"],\"rows\":[' || string_agg('{\"id\":' || i || '}', ',' ORDER BY i) || ']}' \
         FROM generate_series(0, 191) i GROUP BY i / 64 ORDER BY i / 64",
    );
    schema.sql("INSERT INTO {s}.inbox (type, payload) VALUES ('alone', '1')");
    schema.sql("INSERT INTO {s}.inbox (type, rows, payload) VALUES ('public.t.create', -5, '{\"pk\":')");
    schema.sql(
        "INSERT INTO {s}.inbox (type, rows, payload) VALUES ('public.t.create', 2000000000, '{\"pk\":[],\"rows\":[]}')",
    );
    schema.sql("INSERT INTO {s}.inbox (type, payload) VALUES ('last', '1')");
    // As many rows as make up a hundred events, and then the rest.
    assert_eq!((route(&provider, 100).await, route(&provider, 100).await), (128, 66));
    assert_eq!((route(&provider, 100).await, route(&provider, 100).await), (1, 0));
    let leases = claim(&provider, 999).await;
    assert_eq!(leases.len(), 194);
    for (at, Lease { event, .. }) in leases.iter().take(192).enumerate() {
        let id = serde_json::json!({"id": at});
        let payload = serde_json::json!({"before": null, "after": id, "changed": null, "pk": id});
        assert_eq!(event.payload.parse::<serde_json::Value>().unwrap(), payload);
        assert_eq!(event.key.as_deref(), Some(&*at.to_string()));
        assert_eq!((&event.user_id, &event.metadata["table_name"]), (&Some(UserId::Number(7)), &"t".into()));
    }
    let types = [192, 193].map(|at| leases[at].event.event_type.as_str());
    assert_eq!(types, ["alone", "last"]);
    let refusals = provider.claim(&request("refusals", 99, Turn::None)).await.unwrap().leases;
    let reason: serde_json::Value = refusals[0].event.payload.parse().unwrap();
    assert!(refusals.len() == 1 && reason["reason"].as_str().unwrap().contains("rows of a table"), "{reason}");
}

#[tokio::test]
async fn what_was_rolled_back_is_never_seen_and_a_known_id_is_taken_once() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    let mut known = appends(1);
    Arc::make_mut(&mut known[0].event).id = "known".parse().unwrap();
    provider.append(known).await.unwrap();
    schema.sql("BEGIN; INSERT INTO {s}.inbox (type) VALUES ('never'); ROLLBACK");
    schema.sql("INSERT INTO {s}.inbox (type, id) VALUES ('a', 'known'), ('a', 'new'), ('a', 'new')");
    assert_eq!(route(&provider, 9).await, 3);
    let ids: Vec<String> = claim(&provider, 9).await.iter().map(|lease| lease.event.id.to_string()).collect();
    assert_eq!(ids, ["known", "new"]);
    assert_eq!(provider.stats().await.unwrap().head_seq, 2);
}

/// Several instances route at once while others write and publish: every row is moved once, and seq stays dense.
#[tokio::test]
async fn many_routers_move_each_row_once() {
    let schema = Schema::new();
    let provider = Arc::new(schema.provider().await);
    let other = Arc::new(schema.provider().await);
    schema.sql("INSERT INTO {s}.inbox (type) SELECT 'n.' || n FROM generate_series(1, 500) n");
    let routers = [&provider, &other].into_iter().cycle().take(6).map(|provider| {
        let provider = Arc::clone(provider);
        tokio::spawn(async move {
            let mut moved = 0;
            while provider.stats().await.unwrap().provider_specific["inbox_waiting"] != 0 {
                moved += route(&provider, 40).await;
                provider.append(appends(1)).await.unwrap();
            }
            moved
        })
    });
    let mut moved = 0;
    for router in routers.collect::<Vec<_>>() {
        moved += router.await.unwrap();
    }
    assert_eq!(moved, 500);
    let log = provider.read(0, 9_999).await.unwrap();
    let numbers: Vec<u32> =
        log.events.iter().filter_map(|event| event.event_type.as_str().strip_prefix("n.")?.parse().ok()).collect();
    assert_eq!(numbers, (1..=500).collect::<Vec<_>>());
    assert_eq!(log.events.iter().filter_map(|event| event.seq).collect::<Vec<_>>(), (1..=log.head).collect::<Vec<_>>());
}

/// Whoever may only insert can.
#[tokio::test]
async fn permission_to_insert_is_all_that_a_writer_needs() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    let user = format!("writer_{}", schema.options.schema);
    schema.sql(&format!(
        "CREATE ROLE {user}; GRANT USAGE ON SCHEMA {{s}} TO {user}; GRANT INSERT ON {{s}}.inbox TO {user}"
    ));
    schema.sql(&format!("SET ROLE {user}; INSERT INTO {{s}}.inbox (type, payload) VALUES ('a.b', '1')"));
    assert_eq!(route(&provider, 9).await, 1);
}
