//! What is refused at opening, and why.

use super::*;

async fn refusal(options: Options) -> String {
    let error = PostgresProvider::open(options).await.err().unwrap();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

/// FACTS: migrations run under a transaction-level advisory lock.
#[tokio::test]
async fn ten_replicas_that_start_at_once_make_one_schema() {
    let schema = Schema::new();
    let starting = (0..10).map(|_| tokio::spawn(PostgresProvider::open(schema.options.clone())));
    for replica in starting.collect::<Vec<_>>() {
        replica.await.unwrap().unwrap();
    }
    let versions = schema.sql("SELECT count(*), max(version) FROM {s}.tidegate_versions");
    assert_eq!(versions, format!("{0}|{0}", open::served()));
}

/// FACTS: an older binary must refuse a newer schema.
#[tokio::test]
async fn a_newer_schema_and_a_foreign_one_are_refused() {
    let schema = Schema::new();
    schema.provider().await.close().await.unwrap();
    schema.sql("INSERT INTO {s}.tidegate_versions (version, binary_version) VALUES (99, 'later')");
    let text = refusal(schema.options.clone()).await;
    let knows = format!("knows up to {}", open::served());
    assert!(text.contains("version 99") && text.contains(&knows) && text.contains("newer tidegate"), "{text}");
    let foreign = Schema::new();
    foreign.sql("CREATE SCHEMA {s}; CREATE TABLE {s}.users (id int)");
    let text = refusal(foreign.options.clone()).await;
    assert!(text.contains("something else") && text.contains("postgres.schema"), "{text}");
    assert_eq!(foreign.sql("SELECT count(*) FROM pg_class WHERE relnamespace = '{s}'::regnamespace"), "1");
}

/// What waits in the inbox of an older schema is an event of its own, as it was when it was left there.
#[tokio::test]
async fn an_older_schema_is_brought_up_to_date_with_what_it_holds() {
    let schema = Schema::new();
    schema.provider().await.close().await.unwrap();
    schema.sql("ALTER TABLE {s}.inbox DROP COLUMN rows; DELETE FROM {s}.tidegate_versions WHERE version > 1");
    schema.sql("INSERT INTO {s}.inbox (type, payload) VALUES ('a.b', '[1]')");
    let provider = schema.provider().await;
    let matcher = |_: &crate::event::EventType| -> Arc<[Arc<str>]> { [Arc::from("s")].into() };
    let request = RouteRequest { matcher: &matcher, max: 9, max_payload: 99 };
    assert_eq!(provider.route(&request).await.unwrap().taken, 1);
    assert_eq!(claim(&provider, 9).await[0].event.payload.bytes(), "[1]".as_bytes());
}

#[tokio::test]
async fn a_name_that_is_no_identifier_is_refused_and_one_with_capitals_works() {
    for schema in ["", "1a", "a-b", "a\"b", "pg_temp", "a b", "ä", &"a".repeat(64), "a;drop schema public"] {
        let text = refusal(options(schema)).await;
        assert!(text.contains("schema: must be a name"), "{schema}: {text}");
    }
    let name = format!("Tide_{}", Postgres::shared().fresh_name());
    let provider = PostgresProvider::open(options(&name)).await.unwrap();
    provider.append(appends(1)).await.unwrap();
    assert_eq!(provider.stats().await.unwrap().provider_specific["schema"], name);
}

#[tokio::test]
async fn what_stands_in_the_way_is_said_with_what_to_do() {
    let server = Postgres::shared();
    let name = server.fresh_name();
    server.psql("postgres", "CREATE ROLE guarded LOGIN PASSWORD 'right'");
    server.psql("postgres", &format!("CREATE ROLE reader_{name} LOGIN CONNECTION LIMIT 5"));
    server.psql("postgres", &format!("CREATE ROLE full_{name} LOGIN CONNECTION LIMIT 0"));
    let url = |user: &str, database: &str| server.url(database).replace("postgres@", &format!("{user}@"));
    let rows = [
        (url("guarded:wrong", "postgres"), "refused user or password"),
        (url("postgres", "nowhere"), "no such database: create it first"),
        (url(&format!("reader_{name}"), "postgres"), "permission is missing: let its owner run `tidegate migrate`"),
        (url(&format!("full_{name}"), "postgres"), "no connection left: lower postgres.max_connections"),
        ("postgres://x@127.0.0.1:1/x".to_owned(), "cannot be reached"),
        ("postgres://x@127.0.0.1:x/x".to_owned(), "is no URL of a PostgreSQL database"),
        (format!("{}?sslmode=require", server.url("postgres")), "TLS failed: check sslmode"),
        ("sqlite://x.db".to_owned(), "must begin with postgres://"),
    ];
    for (url, words) in rows {
        let text = refusal(Options { url: url.clone(), schema: name.clone(), ..Options::default() }).await;
        assert!(text.contains(words), "{url}: {text}");
        assert!(!text.contains("wrong"), "{text}");
    }
}

/// Whoever may not make tables works with those that another has made.
#[tokio::test]
async fn a_user_that_may_change_no_tables_works_with_those_that_are_there() {
    let schema = Schema::new();
    schema.provider().await.close().await.unwrap();
    let user = format!("worker_{}", schema.options.schema);
    schema.sql(&format!(
        "CREATE ROLE {user} LOGIN; GRANT USAGE ON SCHEMA {{s}} TO {user}; \
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {{s}} TO {user}; \
         GRANT USAGE ON ALL SEQUENCES IN SCHEMA {{s}} TO {user}"
    ));
    let url = schema.options.url.replace("postgres@", &format!("{user}@"));
    let provider = PostgresProvider::open(Options { url, ..schema.options.clone() }).await.unwrap();
    provider.append(appends_to(2, &["s", "t"])).await.unwrap();
    // So much that the claim takes its turn, which is a lock on a table.
    let leases = claim(&provider, 300).await;
    assert_eq!(leases.len(), 2);
    provider.settle(leases.iter().map(|lease| ended(lease, Next::Complete)).collect()).await.unwrap();
    provider.put_document("c", "k", "v".into(), Expect::Any, None).await.unwrap();
    provider.prune(&Retention { max_age: None, max_events: Some(0) }).await.unwrap();
    assert_eq!(provider.stats().await.unwrap().processing_events, 2);
}

/// A look changes nothing, and says what a migration would do.
#[tokio::test]
async fn a_look_makes_no_schema_and_says_what_is_pending() {
    let schema = Schema::new();
    let look = async || PostgresProvider::open_for(schema.options.clone(), Opening::AsItIs).await.map(drop);
    let text = look().await.unwrap_err().to_string();
    assert!(text.contains("is not made yet"), "{text}");
    assert_eq!(schema.sql("SELECT count(*) FROM pg_namespace WHERE nspname = '{s}'"), "0");
    schema.provider().await.close().await.unwrap();
    look().await.unwrap();
    schema.sql("DELETE FROM {s}.tidegate_versions");
    let text = look().await.unwrap_err().to_string();
    let needs = format!("has version 0, and this binary needs {}", open::served());
    assert!(text.contains(&needs), "{text}");
    assert_eq!(schema.sql("SELECT count(*) FROM {s}.tidegate_versions"), "0");
}

#[tokio::test]
async fn a_standby_is_refused_with_what_to_do() {
    let both = tokio::task::spawn_blocking(|| {
        let primary = Postgres::start(Fsync::Off);
        let standby = primary.standby();
        (primary, standby)
    });
    let (_primary, standby) = both.await.unwrap();
    let options = Options { url: standby.url("postgres"), ..Options::default() };
    let text = refusal(options.clone()).await;
    assert!(text.contains("is a standby, which can only be read: name the primary"), "{text}");
    // Once it is promoted it serves.
    standby.psql("postgres", "SELECT pg_promote(true, 60)");
    let provider = PostgresProvider::open(options).await.unwrap();
    provider.append(appends(1)).await.unwrap();
}
