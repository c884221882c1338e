//! Events in the application's own transaction: there with it, or never.

use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use sqlx::{Acquire as _, Connection as _, PgConnection, PgPool, Row as _, SqliteConnection};
use tidegate::capture::{Outbox, outbox};
use tidegate::event::UserId;
use tidegate::provider::Provider as _;
use tidegate::provider::postgres::{self, PostgresProvider};
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{Event, Payload, Source};

use crate::support::postgres::Postgres;

fn event(id: &str) -> Event {
    let payload = Payload::json_text("{\"n\": 1.50}").unwrap();
    let mut event = Event::new(Source::Internal, "shop.orders.create".parse().unwrap(), payload);
    event.id = id.parse().unwrap();
    event
}

async fn postgres(schema: &str) -> (PgPool, String) {
    let server = Postgres::shared();
    let name = server.fresh_name();
    server.psql("postgres", &format!("CREATE DATABASE {name}"));
    let url = server.url(&name);
    let options = postgres::Options { url: url.clone(), schema: schema.to_owned(), ..postgres::Options::default() };
    drop(PostgresProvider::open(options).await.unwrap());
    (PgPool::connect(&url).await.unwrap(), url)
}

async fn sqlite() -> (SqlitePool, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.db");
    let url = format!("sqlite://{}", path.display());
    let provider = SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await.unwrap();
    provider.close().await.unwrap();
    (SqlitePool::connect_with(SqliteConnectOptions::new().filename(path)).await.unwrap(), folder)
}

#[tokio::test]
async fn what_is_rolled_back_in_postgresql_is_never_seen() {
    let (pool, url) = postgres("tidegate").await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &event("committed")).await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    outbox::publish(&mut savepoint, &event("of a savepoint")).await.unwrap();
    savepoint.rollback().await.unwrap();
    let mut kept = tx.begin().await.unwrap();
    outbox::publish(&mut *kept, &event("of a kept savepoint")).await.unwrap();
    kept.commit().await.unwrap();
    // Bad input leaves the transaction as it was.
    let refused = Outbox::default().max_payload(3).publish(&mut tx, &event("too large")).await.unwrap_err();
    assert!(refused.to_string().contains("more than the limit of 3"), "{refused}");
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &event("rolled back")).await.unwrap();
    drop(tx);
    let mut plain = PgConnection::connect(&url).await.unwrap();
    outbox::publish(&mut plain, &event("without a transaction")).await.unwrap();
    outbox::publish(&mut pool.acquire().await.unwrap(), &event("of a pool")).await.unwrap();
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT id FROM tidegate.inbox ORDER BY position").fetch_all(&pool).await.unwrap();
    assert_eq!(ids, ["committed", "of a kept savepoint", "without a transaction", "of a pool"]);
}

#[tokio::test]
async fn what_is_rolled_back_in_sqlite_is_never_seen() {
    let (pool, folder) = sqlite().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &event("committed")).await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    outbox::publish(&mut savepoint, &event("of a savepoint")).await.unwrap();
    savepoint.rollback().await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &event("rolled back")).await.unwrap();
    tx.rollback().await.unwrap();
    let path = folder.path().join("app.db");
    let mut plain = SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.unwrap();
    outbox::publish(&mut plain, &event("without a transaction")).await.unwrap();
    let ids: Vec<String> = sqlx::query_scalar("SELECT id FROM inbox ORDER BY position").fetch_all(&pool).await.unwrap();
    assert_eq!(ids, ["committed", "without a transaction"]);
}

/// Everything that an event says reaches the inbox, in either database, and in a schema of another name.
#[tokio::test]
async fn an_event_reaches_the_inbox_whole() {
    let mut full = event("full");
    full.source = Source::Frontend;
    full.user_id = Some(UserId::Text("Ada".into()));
    full.session_id = Some("s".into());
    full.instance_id = "there".into();
    full.key = Some("k".into());
    full.trace_parent = Some("t".into());
    full.caused_by = Some("cause".parse().unwrap());
    full.metadata.insert("m".into(), json!([1]));
    full.payload = Payload::new("application/x-b", vec![0, 255]).unwrap();
    let plain = event("plain");
    let at = plain.created_at.as_microsecond();
    let created_at = full.created_at.as_microsecond();
    let expected = json!([
        {"id": "full", "type": "shop.orders.create", "source": 2, "created_at": created_at, "key": "k", "user_id": "\"Ada\"",
         "session_id": "s", "instance_id": "there", "schema": "shop", "entity": "orders", "operation": "create",
         "trace_parent": "t", "caused_by": "cause", "metadata": "{\"m\":[1]}", "content_type": "application/x-b",
         "payload": null, "hex": "00ff"},
        {"id": "plain", "type": "shop.orders.create", "source": 4, "created_at": at, "key": null, "user_id": null,
         "session_id": null, "instance_id": null, "schema": "shop", "entity": "orders", "operation": "create",
         "trace_parent": null, "caused_by": null, "metadata": null, "content_type": null,
         "payload": "{\"n\": 1.50}", "hex": null},
    ]);
    let other = "other_schema";
    let (pool, _) = postgres(other).await;
    let outbox = Outbox::default().schema(other);
    let mut tx = pool.begin().await.unwrap();
    outbox.publish(&mut tx, &full).await.unwrap();
    outbox.publish(&mut tx, &plain).await.unwrap();
    tx.commit().await.unwrap();
    let text = "SELECT (to_jsonb(i) - 'position' - 'binary' - 'rows' || jsonb_build_object('hex', encode(i.\"binary\", 'hex')))::text \
        FROM other_schema.inbox i ORDER BY position";
    let rows: Vec<String> = sqlx::query_scalar(text).fetch_all(&pool).await.unwrap();
    let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect();
    assert_eq!(json!(rows), expected);

    let (pool, _folder) = sqlite().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &full).await.unwrap();
    outbox::publish(&mut tx, &plain).await.unwrap();
    tx.commit().await.unwrap();
    let text = "SELECT json_object('id', id, 'type', type, 'source', source, 'created_at', created_at, 'key', key, \
        'user_id', user_id, 'session_id', session_id, 'instance_id', instance_id, 'schema', schema, 'entity', entity, \
        'operation', operation, 'trace_parent', trace_parent, 'caused_by', caused_by, 'metadata', metadata, \
        'content_type', content_type, 'payload', payload, 'hex', iif(binary IS NULL, NULL, lower(hex(binary)))) \
        FROM inbox ORDER BY position";
    let rows = sqlx::query(text).fetch_all(&pool).await.unwrap();
    let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row.get(0)).unwrap()).collect();
    assert_eq!(json!(rows), expected);
}

#[tokio::test]
async fn a_database_without_an_inbox_says_what_to_do() {
    let (pool, _) = postgres("tidegate").await;
    let mut connection = pool.acquire().await.unwrap();
    let refused = Outbox::default().schema("elsewhere").publish(&mut connection, &event("x")).await.unwrap_err();
    assert!(refused.to_string().contains("elsewhere") && refused.to_string().contains("has no inbox"), "{refused}");
    let mut memory = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    let refused = outbox::publish(&mut memory, &event("x")).await.unwrap_err();
    assert!(refused.to_string().contains("has no inbox"), "{refused}");
}
