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
