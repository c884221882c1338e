//! Everything at once: no call fails for another's sake, and the figures add up afterwards.

use super::*;
use crate::delivery::{KvChange, KvWrite};

const ROUNDS: usize = 25;

fn chain(lease: &Lease, n: usize) -> Settlement {
    let mut published = appends_to(1, &["t", "s"]);
    Arc::make_mut(&mut published[0].event).id =
        format!("child-{}-{}", lease.key.seq, lease.key.subscription).parse().unwrap();
    let keys = ["x", "y", "z"];
    // In another order each time: locks must not depend on it.
    let write = |at: usize| KvWrite {
        bucket: "b".into(),
        key: keys[(n + at * (1 + n % 2)) % 3].into(),
        change: KvChange::Increment { by: 1 },
    };
    let published = if n.is_multiple_of(5) { published } else { Vec::new() };
    Settlement { published, writes: (0..3).map(write).collect(), ..ended(lease, Next::Complete) }
}

async fn work(provider: Arc<PostgresProvider>, subscription: &'static str) -> u64 {
    let mut written = 0;
    for n in 0..ROUNDS {
        provider.append(appends_to(4, &["s", "t"])).await.unwrap();
        let mut leases = provider.claim(&request(subscription, 6, Turn::None)).await.unwrap().leases;
        if n.is_multiple_of(2) {
            leases.reverse();
        }
        let batch: Vec<Settlement> = leases
            .iter()
            .enumerate()
            .map(|(at, lease)| match (at + n) % 4 {
                0 => ended(lease, Next::Retry { after: Duration::ZERO }),
                1 => ended(lease, Next::Fail),
                _ => chain(lease, n),
            })
            .collect();
        let writes = batch.iter().map(|one| one.writes.len() as u64).sum::<u64>();
        let settled = provider.settle(batch).await.unwrap();
        assert!(settled.iter().all(|one| matches!(one, Settled::Done { .. })), "{settled:?}");
        written += writes;
    }
    written
}

async fn operate(provider: Arc<PostgresProvider>) {
    for n in 0..ROUNDS {
        let filter = DeadLetterFilter { limit: 3, ..DeadLetterFilter::default() };
        provider.amend(Amendment::Redrive(filter)).await.unwrap();
        let replay = Replay {
            subscription: ["s", "late"][n % 2].into(),
            pattern: "a.**".parse().unwrap(),
            from_seq: Some(n as u64 * 3),
            to_seq: Some(n as u64 * 3 + 4),
            from: None,
            to: None,
            missing_only: n.is_multiple_of(3),
            dry_run: false,
        };
        provider.amend(Amendment::Replay(replay)).await.unwrap();
        if n % 5 == 4 {
            provider.amend(Amendment::Cancel { subscription: "late".into() }).await.unwrap();
            provider.prune(&Retention { max_age: None, max_events: Some(150) }).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn workers_and_operators_of_two_instances_get_on_with_each_other() {
    let schema = Schema::new();
    let both = [Arc::new(schema.provider().await), Arc::new(schema.provider().await)];
    let workers: Vec<_> =
        (0..6).map(|n| tokio::spawn(work(Arc::clone(&both[n % 2]), ["s", "t", "s"][n % 3]))).collect();
    let operators: Vec<_> = both.iter().map(|provider| tokio::spawn(operate(Arc::clone(provider)))).collect();
    let mut written = 0;
    for worker in workers {
        written += worker.await.unwrap();
    }
    for operator in operators {
        operator.await.unwrap();
    }
    let mut sum = 0;
    for key in ["x", "y", "z"] {
        let document = both[0].document("b", key).await.unwrap().unwrap();
        sum += std::str::from_utf8(&document.value).unwrap().parse::<u64>().unwrap();
    }
    assert_eq!(sum, written);
    let stats = both[0].stats().await.unwrap();
    let listed = both[1].list(&EventFilter::default()).await.unwrap().records;
    let count = |status| listed.iter().filter(|record| record.status == status).count() as u64;
    use crate::delivery::Status;
    assert_eq!(stats.total_events, listed.len() as u64);
    assert_eq!(
        [stats.pending_events, stats.processing_events, stats.completed_events, stats.failed_events],
        [Status::Pending, Status::Processing, Status::Completed, Status::Failed].map(count)
    );
    assert!(stats.total_events > 0 && stats.head_seq >= 6 * 4 * ROUNDS as u64);
    // All lock rows in one order, so that nobody waits for one who waits for him.
    assert!(!Postgres::shared().log().contains("deadlock detected"));
}

/// Two workers that end the last two deliveries of an event at once: exactly one of them is told that it closed it, and how.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_that_close_an_event_at_once_one_is_told() {
    let schema = Schema::new();
    let provider = Arc::new(schema.provider().await);
    provider.append(appends_to(40, &["s", "t"])).await.unwrap();
    let mut tasks = Vec::new();
    for subscription in ["s", "t"] {
        for lease in provider.claim(&request(subscription, 99, Turn::None)).await.unwrap().leases {
            let provider = Arc::clone(&provider);
            let next = if subscription == "s" { Next::Fail } else { Next::Complete };
            tasks.push(tokio::spawn(async move { provider.settle(vec![ended(&lease, next)]).await.unwrap() }));
        }
    }
    let mut closed = 0;
    for task in tasks {
        closed += usize::from(task.await.unwrap() == [Settled::Done { finished: Some(Status::Failed) }]);
    }
    assert_eq!(closed, 40);
}
