//! What a call costs the server: connections, plans and hints.

use super::*;

async fn backend(lent: &mut lend::Lent<'_>) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(lent.connection().unwrap()).await.unwrap()
}

/// The last one used goes first, so that few have their statements ready.
#[tokio::test]
async fn a_connection_goes_to_the_next_call_unless_its_own_broke_off() {
    let provider = Schema::new().provider().await;
    let connections = &provider.store.connections;
    let (mut first, mut second) = (connections.lend().await.unwrap(), connections.lend().await.unwrap());
    let (one, two) = (backend(&mut first).await, backend(&mut second).await);
    assert_ne!(one, two);
    first.give_back();
    second.give_back();
    let mut last = connections.lend().await.unwrap();
    assert_eq!(backend(&mut last).await, two);
    drop(last);
    let mut before = connections.lend().await.unwrap();
    assert_eq!(backend(&mut before).await, one);
    let mut new = connections.lend().await.unwrap();
    assert!(![one, two].contains(&backend(&mut new).await));
}

#[tokio::test]
async fn who_waits_for_a_connection_gets_the_next_that_is_given_back() {
    let schema = Schema::new();
    let options = Options { max_connections: 2, ..schema.options.clone() };
    let provider = PostgresProvider::open(options).await.unwrap();
    let connections = &provider.store.connections;
    let (mut first, second) = (connections.lend().await.unwrap(), connections.lend().await.unwrap());
    let one = backend(&mut first).await;
    let mut waiting = std::pin::pin!(connections.lend());
    assert!(futures_util::poll!(waiting.as_mut()).is_pending());
    first.give_back();
    let mut third = waiting.await.unwrap();
    assert_eq!(backend(&mut third).await, one);
    third.give_back();
    second.give_back();
    provider.close().await.unwrap();
    assert!(matches!(connections.lend().await, Err(sqlx::Error::PoolClosed)));
}
