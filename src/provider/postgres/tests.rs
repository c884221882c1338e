//! PostgreSQL against the suite, and what only a server can get wrong.

use super::*;

#[path = "../../../tests/it/support/postgres.rs"]
mod server;

use self::server::Postgres;

fn options(schema: &str) -> Options {
    Options { url: Postgres::shared().url("postgres"), schema: schema.to_owned(), ..Options::default() }
}

/// FACTS: migrations run under a transaction-level advisory lock.
#[tokio::test]
async fn ten_replicas_that_start_at_once_make_one_schema() {
    let schema = Postgres::shared().fresh_name();
    let starting = (0..10).map(|_| tokio::spawn(PostgresProvider::open(options(&schema))));
    for replica in starting.collect::<Vec<_>>() {
        replica.await.unwrap().unwrap();
    }
    let versions =
        Postgres::shared().psql("postgres", &format!("SELECT count(*), max(version) FROM {schema}.tidegate_versions"));
    assert_eq!(versions, format!("1|{}", open::served()));
}
