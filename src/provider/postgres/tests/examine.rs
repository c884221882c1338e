//! What a look at the store finds, and that it finds nothing where nothing is wrong.

use super::*;
use crate::provider::postgres::examine::Limits;
use crate::provider::{Examine as _, Finding, Severity};

/// Nobody waits for anything here.
fn at_once() -> Limits {
    Limits { held: Duration::ZERO, again: Duration::ZERO, ..Limits::default() }
}

async fn found(provider: &PostgresProvider) -> Vec<Finding> {
    provider.examine_with(&at_once()).await.unwrap()
}

async fn of_code(provider: &PostgresProvider, code: &str) -> Vec<Finding> {
    found(provider).await.into_iter().filter(|finding| finding.code == code).collect()
}

#[tokio::test]
async fn a_healthy_store_needs_nothing_until_a_slot_is_left_behind() {
    let server = tokio::task::spawn_blocking(|| Postgres::start(Fsync::On)).await.unwrap();
    for prepared in [true, false] {
        let options = Options { url: server.url("postgres"), prepared, ..Options::default() };
        let provider = PostgresProvider::open(options).await.unwrap();
        provider.append(appends(3)).await.unwrap();
        let found = provider.examine().await.unwrap();
        assert!(found.len() > 6 && found.iter().all(|finding| finding.severity == Severity::Ok), "{found:#?}");
        server.psql("postgres", "SELECT pg_create_physical_replication_slot('lefts', true)");
        let slot = of_code(&provider, "idle-slot").await.remove(0);
        assert!(slot.what.contains("lefts"), "{slot:?}");
        let (_, remedy) = slot.advice.split_once("back, or ").unwrap();
        server.psql("postgres", remedy.trim_end_matches('.'));
        assert_eq!(of_code(&provider, "idle-slot").await, []);
        provider.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_transaction_that_is_held_open_is_found_by_its_process() {
    let server = Postgres::shared();
    let database = server.fresh_name();
    server.psql("postgres", &format!("CREATE DATABASE {database}"));
    let provider = PostgresProvider::open(Options { url: server.url(&database), ..Options::default() }).await.unwrap();
    assert_eq!(of_code(&provider, "held-transaction").await, []);
    let mut other = sqlx::PgConnection::connect(&server.url(&database)).await.unwrap();
    let mut tx = other.begin().await.unwrap();
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SET application_name = 'forgetful'")
        .execute(&mut *tx)
        .await
        .unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let held = of_code(&provider, "held-transaction").await;
    assert_eq!((held.len(), held[0].severity), (1, Severity::Warning), "{held:?}");
    assert!(held[0].what.contains(&format!("process {pid} of forgetful")), "{held:?}");
    assert!(held[0].what.contains("idle in transaction"), "{held:?}");
    assert!(held[0].advice.contains(&format!("pg_terminate_backend({pid})")), "{held:?}");
    let usual = provider.examine_with(&Limits { again: Duration::ZERO, ..Limits::default() }).await.unwrap();
    assert!(usual.iter().all(|finding| finding.code != "held-transaction"), "{usual:?}");
    tx.rollback().await.unwrap();
    assert_eq!(of_code(&provider, "held-transaction").await, []);
}

#[tokio::test]
async fn what_a_server_for_tests_risks_is_said() {
    let provider = Schema::new().provider().await;
    let risks = of_code(&provider, "setting-off").await;
    let named: Vec<&str> = risks.iter().map(|finding| finding.what.as_str()).collect();
    assert_eq!(named, ["fsync is off", "full_page_writes is off"]);
    assert!(risks.iter().all(|finding| finding.severity == Severity::Problem));
}

#[tokio::test]
async fn an_index_that_was_dropped_is_found_and_the_advice_makes_it_anew() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    let expected: Vec<String> = open::indexes().into_iter().map(|(name, _)| name).collect();
    let there = schema.sql(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = '{s}'::regnamespace \
         AND NOT EXISTS (SELECT 1 FROM pg_constraint o WHERE o.conindid = c.oid) ORDER BY 1",
    );
    let mut sorted = expected.clone();
    sorted.sort();
    assert_eq!(there.lines().collect::<Vec<_>>(), sorted);
    assert_eq!(of_code(&provider, "missing-index").await, []);
    for name in &expected {
        schema.sql(&format!("DROP INDEX {{s}}.{name}"));
    }
    let missing = of_code(&provider, "missing-index").await;
    assert_eq!(missing.len(), expected.len(), "{missing:?}");
    for (finding, name) in missing.iter().zip(&expected) {
        assert!(finding.what.contains(name) && finding.severity == Severity::Problem, "{finding:?}");
        let (_, remedy) = finding.advice.split_once("owner: ").unwrap();
        schema.sql(remedy);
    }
    assert_eq!(of_code(&provider, "missing-index").await, []);
}

#[tokio::test]
async fn an_inbox_that_nobody_empties_is_found() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    schema.sql("INSERT INTO {s}.inbox (type, payload) SELECT 'a.b', '1' FROM generate_series(1, 3)");
    let waiting = of_code(&provider, "inbox-stands-still").await;
    assert!(waiting.len() == 1 && waiting[0].what.contains("3 rows"), "{waiting:?}");
    let matcher = |_: &crate::event::EventType| -> Arc<[Arc<str>]> { [].into() };
    provider.route(&RouteRequest { matcher: &matcher, max: 9, max_payload: 99 }).await.unwrap();
    assert_eq!(of_code(&provider, "inbox-stands-still").await, []);
}

#[tokio::test]
async fn a_subscription_that_lags_is_found_and_stands_in_the_figures() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    provider.append(appends_to(2, &["slow", "s"])).await.unwrap();
    schema.advance(Duration::from_secs(600)).await;
    assert_eq!(claim(&provider, 9).await.len(), 2);
    let lagging = of_code(&provider, "subscription-lag").await;
    assert!(lagging.len() == 1 && lagging[0].what.contains("delivery to slow has been due for 10 min"), "{lagging:?}");
    let lag = |stats: ProviderStats| stats.provider_specific["lag_seconds"].clone();
    assert_eq!(lag(provider.stats().await.unwrap()), serde_json::json!({"slow": 600}));
    // A lease that nobody takes away is lag too.
    schema.advance(Duration::from_secs(400)).await;
    assert_eq!(lag(provider.stats().await.unwrap()), serde_json::json!({"slow": 1_000, "s": 370}));
}

/// A look that fails is a finding, and the others go on.
#[tokio::test]
async fn a_table_that_is_gone_hides_nothing_else() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    schema.sql("DROP TABLE {s}.inbox; DROP INDEX {s}.events_by_age");
    let found = found(&provider).await;
    let said = |code: &str, words: &str| found.iter().any(|one| one.code == code && one.what.contains(words));
    assert!(said("not-examined", "inbox") && said("missing-index", "events_by_age"), "{found:#?}");
}

/// A database of one's own, whose sessions and figures are nobody else's.
fn database() -> String {
    let name = Postgres::shared().fresh_name();
    Postgres::shared().psql("postgres", &format!("CREATE DATABASE {name}"));
    name
}

#[tokio::test]
async fn a_prepared_transaction_is_found_and_the_advice_ends_it() {
    let server = tokio::task::spawn_blocking(|| {
        let server = Postgres::start(Fsync::Off);
        server.psql("postgres", "ALTER SYSTEM SET max_prepared_transactions = 5");
        server.kill();
        server.run();
        server
    });
    let server = server.await.unwrap();
    let provider = PostgresProvider::open(Options { url: server.url("postgres"), ..Options::default() }).await.unwrap();
    assert_eq!(of_code(&provider, "prepared-transaction").await, []);
    server.psql("postgres", "BEGIN; CREATE TABLE t (x int); PREPARE TRANSACTION 'it''s mine'");
    let waiting = of_code(&provider, "prepared-transaction").await;
    assert_eq!((waiting.len(), waiting[0].severity), (1, Severity::Warning), "{waiting:?}");
    assert!(waiting[0].what.contains("'it's mine' of postgres"), "{waiting:?}");
    let (_, remedy) = waiting[0].advice.split_once(" or ").unwrap();
    server.psql("postgres", remedy.trim_end_matches('.'));
    assert_eq!(of_code(&provider, "prepared-transaction").await, []);
}

#[tokio::test]
async fn dead_rows_that_nobody_vacuums_are_found_and_the_advice_removes_them() {
    let (server, database) = (Postgres::shared(), database());
    let provider = PostgresProvider::open(Options { url: server.url(&database), ..Options::default() }).await.unwrap();
    let limits = Limits { dead: (1_000, Duration::from_secs(1_000)), ..at_once() };
    let dead = async || {
        let found = provider.examine_with(&limits).await.unwrap();
        found.into_iter().filter(|finding| finding.code == "dead-rows").collect::<Vec<_>>()
    };
    assert_eq!(dead().await, []);
    server.psql(
        &database,
        "ALTER TABLE tidegate.documents SET (autovacuum_enabled = off); INSERT INTO tidegate.documents \
         SELECT 'c', n::text::bytea, '', n FROM generate_series(1, 2000) n",
    );
    server.psql(&database, "UPDATE tidegate.documents SET revision = revision + 1");
    let found = dead().await;
    assert_eq!((found.len(), found[0].severity), (1, Severity::Warning), "{found:?}");
    assert!(found[0].what.contains("documents has 2000 dead rows beside 2000 live ones"), "{found:?}");
    assert!(found[0].what.contains("never vacuumed"), "{found:?}");
    let (_, remedy) = found[0].advice.split_once("left, and ").unwrap();
    server.psql(&database, remedy.trim_end_matches('.'));
    assert_eq!(dead().await, []);
}

#[tokio::test]
async fn an_index_that_is_not_valid_is_found_and_the_advice_mends_it() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    // As a REINDEX CONCURRENTLY leaves it that was broken off.
    schema.sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{s}.events_by_id'::regclass");
    let invalid = of_code(&provider, "invalid-index").await;
    assert_eq!((invalid.len(), invalid[0].severity), (1, Severity::Problem), "{invalid:?}");
    assert!(invalid[0].what.contains("events_by_id"), "{invalid:?}");
    let (_, remedy) = invalid[0].advice.split_once("nothing: ").unwrap();
    schema.sql(remedy.trim_end_matches('.'));
    assert_eq!(of_code(&provider, "invalid-index").await, []);
}

#[tokio::test]
async fn an_inbox_that_is_emptied_too_slowly_is_found() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    schema.sql("INSERT INTO {s}.inbox (type, payload) SELECT 'a.b', '1' FROM generate_series(1, 20000)");
    let limits = Limits { inbox: 100, again: Duration::from_millis(200), ..Limits::default() };
    let matcher = |_: &crate::event::EventType| -> Arc<[Arc<str>]> { [].into() };
    let moving = async {
        loop {
            provider.route(&RouteRequest { matcher: &matcher, max: 1, max_payload: 99 }).await.unwrap();
        }
    };
    // On a busy machine nothing may have moved between two looks.
    let looking = async {
        loop {
            let found = provider.examine_with(&limits).await.unwrap();
            let inbox: Vec<_> = found.into_iter().filter(|finding| finding.code.starts_with("inbox")).collect();
            if inbox[0].code != "inbox-stands-still" {
                return inbox;
            }
        }
    };
    let inbox = tokio::select! {
        inbox = looking => inbox,
        () = moving => unreachable!(),
    };
    assert_eq!((inbox.len(), inbox[0].code, inbox[0].severity), (1, "inbox-backlog", Severity::Warning), "{inbox:?}");
}

/// Whoever may not see what others hold is told that there is something that was not looked at.
#[tokio::test]
async fn sessions_that_cannot_be_seen_are_counted_until_the_right_is_granted() {
    let (server, database) = (Postgres::shared(), database());
    let user = format!("blind_{database}");
    server.psql(&database, &format!("CREATE ROLE {user} LOGIN; GRANT CREATE ON DATABASE {database} TO {user}"));
    let url = server.url(&database).replace("postgres@", &format!("{user}@"));
    let provider = PostgresProvider::open(Options { url, ..Options::default() }).await.unwrap();
    let mut other = sqlx::PgConnection::connect(&server.url(&database)).await.unwrap();
    let tx = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM tidegate.events";
    sqlx::raw_sql(tx).execute(&mut other).await.unwrap();
    let hidden = of_code(&provider, "hidden-sessions").await;
    assert!(hidden.len() == 1 && hidden[0].what.starts_with("1 sessions of other users"), "{hidden:?}");
    assert_eq!(of_code(&provider, "held-transaction").await, []);
    let (grant, _) = hidden[0].what.split_once("looked at: ").unwrap().1.split_once(" to see").unwrap();
    server.psql(&database, &grant.replace("this user", &user));
    assert_eq!(of_code(&provider, "hidden-sessions").await, []);
    assert_eq!(of_code(&provider, "held-transaction").await.len(), 1);
}
