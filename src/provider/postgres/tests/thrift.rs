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

/// Making a plan takes longer than following it.
#[tokio::test]
async fn the_statements_of_every_event_keep_their_plans() {
    let provider = Schema::new().provider().await;
    for _ in 0..20 {
        provider.append(appends_to(1, &["s", "t"])).await.unwrap();
        let lease = claim(&provider, 1).await.remove(0);
        provider.settle(vec![ended(&lease, Next::Complete)]).await.unwrap();
    }
    let connections = &provider.store.connections;
    let (mut kept, mut held) = (0, Vec::new());
    for _ in 0..connections.idle() {
        let mut lent = connections.lend().await.unwrap();
        let counts = "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement LIKE 'WITH now%'";
        let counts: Vec<(i64, i64)> = sqlx::query_as(counts).fetch_all(lent.connection().unwrap()).await.unwrap();
        // The server tries five times what a plan for these very values gains.
        assert!(counts.iter().all(|&(custom, _)| custom <= 5), "{counts:?}");
        kept += counts.iter().map(|&(_, generic)| generic).sum::<i64>();
        held.push(lent);
    }
    assert!(kept > 0);
}

/// Others need not look because of what leaves them nothing to do.
#[tokio::test]
async fn a_settlement_ticks_only_where_it_leaves_something_to_claim_or_to_read() {
    let schema = Schema::new();
    let options = Options { poll_interval: Duration::from_secs(3_600), ..schema.options.clone() };
    let provider = PostgresProvider::open(options).await.unwrap();
    let mut batch = appends(4);
    Arc::make_mut(&mut batch[3].event).key = Some("k".into());
    provider.append(batch).await.unwrap();
    let leases = claim(&provider, 4).await;
    let child = Settlement { published: appends(1), ..ended(&leases[2], Next::Complete) };
    let ends = [
        (ended(&leases[0], Next::Complete), false),
        (ended(&leases[1], Next::Retry { after: Duration::ZERO }), true),
        (child, true),
        (ended(&leases[3], Next::Fail), true),
    ];
    let mut wake = provider.wake();
    for (settlement, expected) in ends {
        wake.mark_unchanged();
        let told = format!("{settlement:?}");
        assert!(matches!(provider.settle(vec![settlement]).await.unwrap()[..], [Settled::Done { .. }]));
        assert_eq!(wake.has_changed().unwrap(), expected, "{told}");
    }
}

/// Two large claims at a time go through each other's, so they take turns; but a process that is stopped within its own holds
/// up nobody.
#[tokio::test]
async fn large_claims_take_turns_and_none_waits_for_one_that_stands_still() {
    let schema = Schema::new();
    let (one, other) = (schema.provider().await, schema.provider().await);
    one.append(appends(600)).await.unwrap();
    let mut stopped = one.store.session().await.unwrap();
    assert!(stopped.begin_turn().await.unwrap());
    assert!(other.store.turn.is_due(1, 300));
    assert_eq!(claim(&other, 300).await.len(), 300);
    // Nor does it wait again soon.
    assert!(!other.store.turn.is_due(1, 300));
    stopped.commit().await.unwrap();
    let mut next = other.store.session().await.unwrap();
    assert!(next.begin_turn().await.unwrap());
    next.commit().await.unwrap();
    assert!(one.store.turn.is_due(1, 300));
    assert_eq!(claim(&one, 300).await.len(), 300);
}

/// What is young is most of a log.
#[tokio::test]
async fn a_prune_is_led_by_the_index_past_what_is_young() {
    let provider = Schema::new().provider().await;
    let mut lent = provider.store.connections.lend().await.unwrap();
    let text = format!("EXPLAIN {}", provider.store.text(operate::OLD));
    let explain = sqlx::query_scalar::<_, String>(sqlx::AssertSqlSafe(text));
    let explain = explain.bind(7_i64).bind(5_i64).bind(0_i64).bind(0_i64).bind(9_i64);
    let plan = explain.fetch_all(lent.connection().unwrap()).await.unwrap().join("\n");
    let led = plan.lines().find(|line| line.contains("Index Cond") && line.contains("created_at <"));
    assert!(led.is_some(), "{plan}");
}
