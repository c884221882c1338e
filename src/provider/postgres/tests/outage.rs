//! A server that is killed, connections that are ended, and somebody who holds a lock: what was acknowledged stays, and
//! the store goes on by itself.

use super::*;

/// How long to wait for the store to answer again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Appends one event, again and again until it is taken.
async fn append_until_taken(provider: &PostgresProvider) {
    let trying = async {
        while provider.append(appends(1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trying).await.unwrap();
}

/// DESIGN §2, invariant 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_acknowledged_outlives_a_killed_server() {
    let server = Arc::new(tokio::task::spawn_blocking(|| Postgres::start(Fsync::On)).await.unwrap());
    let options =
        Options { url: server.url("postgres"), acquire_timeout: Duration::from_secs(1), ..Options::default() };
    let provider = Arc::new(PostgresProvider::open(options).await.unwrap());
    for _ in 0..3 {
        let publishers: Vec<_> = (0..4)
            .map(|_| {
                let provider = Arc::clone(&provider);
                tokio::spawn(async move {
                    let (mut ids, mut settled) = (Vec::new(), Vec::new());
                    loop {
                        let batch = appends(5);
                        let own: Vec<String> = batch.iter().map(|append| append.event.id.to_string()).collect();
                        let Ok(_) = provider.append(batch).await else { return (ids, settled) };
                        ids.extend(own);
                        let Ok(claimed) = provider.claim(&request("s", 3, Turn::None)).await else {
                            return (ids, settled);
                        };
                        let ends = claimed.leases.iter().map(|lease| ended(lease, Next::Complete)).collect();
                        let Ok(answers) = provider.settle(ends).await else { return (ids, settled) };
                        let done =
                            answers.iter().zip(&claimed.leases).filter(|(one, _)| matches!(one, Settled::Done { .. }));
                        settled.extend(done.map(|(_, lease)| lease.event.id.to_string()));
                    }
                })
            })
            .collect();
        let until = provider.stats().await.unwrap().head_seq + 100;
        while provider.stats().await.unwrap().head_seq < until {}
        let killing = Arc::clone(&server);
        tokio::task::spawn_blocking(move || killing.kill()).await.unwrap();
        let (mut ids, mut settled) = (Vec::new(), Vec::new());
        for publisher in publishers {
            let (own, ended) = publisher.await.unwrap();
            ids.extend(own);
            settled.extend(ended);
        }
        let starting = Arc::clone(&server);
        tokio::task::spawn_blocking(move || starting.run()).await.unwrap();
        append_until_taken(&provider).await;
        for id in ids {
            assert!(provider.get(&id).await.unwrap().is_some(), "{id} was acknowledged");
        }
        for id in settled {
            let detail = provider.get(&id).await.unwrap().unwrap();
            assert_eq!(detail.record.status, crate::delivery::Status::Completed, "{id} was settled");
        }
        let page = provider.read(0, 99_999).await.unwrap();
        let seqs: Vec<Seq> = page.events.iter().filter_map(|event| event.seq).collect();
        assert_eq!(seqs, (1..=page.head).collect::<Vec<_>>());
    }
}

/// A store, and a statement that ends its connections, waits until they are gone, and counts them.
async fn mortal(schema: &Schema) -> (PostgresProvider, String) {
    let name = format!("application_{}", schema.options.schema);
    let url = format!("{}?application_name={name}", schema.options.url);
    let provider = PostgresProvider::open(Options { url, ..schema.options.clone() }).await.unwrap();
    let ended = "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity WHERE application_name";
    (provider, format!("{ended} = '{name}'"))
}

#[tokio::test]
async fn terminated_connections_are_replaced() {
    let schema = Schema::new();
    let (provider, kill) = mortal(&schema).await;
    for _ in 0..5 {
        append_until_taken(&provider).await;
        assert_ne!(schema.sql(&kill), "0");
    }
    append_until_taken(&provider).await;
    assert_eq!(claim(&provider, 9).await.len(), 6);
}

/// A server that restarts breaks all connections, and one call is enough to find that out.
#[tokio::test]
async fn after_a_call_that_broke_off_no_other_meets_a_broken_connection() {
    let schema = Schema::new();
    let (provider, kill) = mortal(&schema).await;
    let connections = &provider.store.connections;
    let lent = futures_util::future::join_all((0..4).map(|_| connections.lend())).await;
    lent.into_iter().for_each(|lent| lent.unwrap().give_back());
    schema.sql(&kill);
    let mut broken = 0;
    for _ in 0..5 {
        broken += usize::from(provider.append(appends(1)).await.is_err());
    }
    // None, where the store's own work met one first.
    assert!(broken <= 1, "{broken} calls met a broken connection");
}

/// No call waits for ever: neither for a lock nor for a connection.
#[tokio::test]
async fn a_lock_that_nobody_lets_go_of_ends_calls_with_words() {
    use sqlx::Connection as _;
    let schema = Schema::new();
    let options = Options {
        statement_timeout: Duration::from_millis(300),
        acquire_timeout: Duration::from_millis(300),
        max_connections: 2,
        ..schema.options.clone()
    };
    let provider = Arc::new(PostgresProvider::open(options).await.unwrap());
    provider.append(appends(2)).await.unwrap();
    let mut holder = sqlx::PgConnection::connect(&schema.options.url).await.unwrap();
    let lock = format!("BEGIN; SELECT * FROM {}.head FOR UPDATE", schema.options.schema);
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut holder).await.unwrap();
    let told = |error: Error| std::error::Error::source(&error).unwrap().to_string();
    let error = provider.append(appends(1)).await.unwrap_err();
    assert_eq!(error.to_string(), "append 1 events in postgres");
    assert!(told(error).contains("postgres.statement_timeout"));
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let provider = Arc::clone(&provider);
            tokio::spawn(async move { provider.append(appends(1)).await.unwrap_err() })
        })
        .collect();
    let mut words = Vec::new();
    for task in waiting {
        words.push(told(task.await.unwrap()));
    }
    assert!(words.iter().any(|words| words.contains("postgres.max_connections")), "{words:?}");
    assert_eq!(claim(&provider, 1).await.len(), 1, "a claim needs no seq");
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.unwrap();
    assert_eq!(provider.append(appends(1)).await.unwrap()[0].seq, 3);
}

/// Of a damaged store what is whole is handled.
#[tokio::test]
async fn what_has_lost_its_event_keeps_nothing_else_from_being_leased() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    provider.append(appends_to(3, &["s", "t"])).await.unwrap();
    let mut anyone = sqlx::PgConnection::connect(&schema.options.url).await.unwrap();
    let damage = format!("DELETE FROM {}.events WHERE seq = 2", schema.options.schema);
    sqlx::raw_sql(sqlx::AssertSqlSafe(damage)).execute(&mut anyone).await.unwrap();
    let seqs: Vec<Seq> = claim(&provider, 10).await.iter().map(|lease| lease.key.seq).collect();
    assert_eq!(seqs, [1, 3]);
}

/// A call that is given up leaves nothing half done, and its connection harms nobody.
#[tokio::test]
async fn a_dropped_call_is_done_or_not_done() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    for n in 0..40_u64 {
        let batch = appends_to(3, &["s", "t"]);
        drop(tokio::time::timeout(Duration::from_micros(n * 150), provider.append(batch)).await);
    }
    let stats = provider.stats().await.unwrap();
    assert_eq!(
        (stats.head_seq % 3, stats.total_events, stats.pending_deliveries),
        (0, stats.head_seq, 2 * stats.head_seq)
    );
    let seqs: Vec<Seq> = claim(&provider, 999).await.iter().map(|lease| lease.key.seq).collect();
    // The last call may still be on its way at the server, and be done meanwhile.
    let (count, now) = (seqs.len() as u64, provider.stats().await.unwrap().head_seq);
    assert!(count % 3 == 0 && (stats.head_seq..=now).contains(&count), "{} <= {count} <= {now}", stats.head_seq);
    assert_eq!(seqs, (1..=count).collect::<Vec<_>>());
}
