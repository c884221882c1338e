//! PostgreSQL against the suite, and what only a server can get wrong.

mod crossing;
mod examine;
mod inbox;
mod opening;
mod outage;
mod thrift;

use std::sync::atomic::AtomicI64;

use super::*;
use crate::delivery::{Attempt, Next, Status};
use crate::event::{Event, Payload, Source};
use crate::provider::conformance::{Fixture, Scene, claims};
use crate::provider::inbox::InboxRow;
use crate::provider::{Lease, Replay, Want, rules};
use crate::subscription::Ordering as Turn;
use sqlx::Connection as _;

#[path = "../../../tests/it/support/postgres.rs"]
mod server;

use self::server::{Fsync, Postgres};

fn options(schema: &str) -> Options {
    Options { url: Postgres::shared().url("postgres"), schema: schema.to_owned(), ..Options::default() }
}

/// A schema of one's own, and a clock that stands still.
struct Schema {
    options: Options,
    time: Arc<AtomicI64>,
}

impl Schema {
    fn new() -> Self {
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { options: options(&Postgres::shared().fresh_name()), time }
    }

    /// As behind a pooler that keeps no prepared statements.
    fn unprepared() -> Self {
        let schema = Self::new();
        Self { options: Options { prepared: false, ..schema.options }, ..schema }
    }

    async fn provider(&self) -> PostgresProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        PostgresProvider::with_clock(self.options.clone(), clock).await.unwrap()
    }

    /// What SQL says about this schema, which `{s}` stands for.
    fn sql(&self, text: &str) -> String {
        Postgres::shared().psql("postgres", &text.replace("{s}", &self.options.schema))
    }
}

#[async_trait]
impl Fixture for Schema {
    async fn open(&self) -> Arc<dyn Provider> {
        Arc::new(self.provider().await)
    }

    fn reopens(&self) -> Result<(), &'static str> {
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        self.time.fetch_add(row::as_micros(by), Ordering::Relaxed);
    }

    async fn leave(&self, rows: &[InboxRow]) -> Result<(), &'static str> {
        let text = format!(
            "INSERT INTO {}.inbox (id, type, source, created_at, key, user_id, session_id, instance_id, schema, entity, \
             operation, trace_parent, caused_by, metadata, content_type, payload, \"binary\") \
             VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14,$15,$16,$17)",
            self.options.schema
        );
        let mut connection = sqlx::PgConnection::connect(&self.options.url).await.unwrap();
        for row in rows {
            let query = sqlx::query(sqlx::AssertSqlSafe(text.clone())).bind(&row.id).bind(&row.event_type);
            let query = query.bind(i16::try_from(row.source).unwrap()).bind(row.created_at).bind(&row.key);
            let query = query.bind(&row.user_id).bind(&row.session_id).bind(&row.instance_id).bind(&row.schema);
            let query = query.bind(&row.entity).bind(&row.operation).bind(&row.trace_parent).bind(&row.caused_by);
            let query = query.bind(&row.metadata).bind(&row.content_type).bind(&row.payload).bind(&row.binary);
            query.execute(&mut connection).await.unwrap();
        }
        Ok(())
    }
}

mod conformance {
    use super::Schema;

    conformance_tests!(Schema::new());
}

#[tokio::test]
async fn without_prepared_statements_all_is_the_same() {
    claims::a_random_walk_ends_where_the_reference_ends(Scene::open(Schema::unprepared()).await).await;
    claims::hostile_texts_are_only_texts(Scene::open(Schema::unprepared()).await).await;
}

fn appends_to(count: usize, subscriptions: &[&str]) -> Vec<Append> {
    let subscriptions: Arc<[Arc<str>]> = subscriptions.iter().map(|&name| Arc::from(name)).collect();
    let event = || Event {
        instance_id: "here".into(),
        ..Event::new(Source::System, "a.b.c".parse().unwrap(), Payload::default())
    };
    (0..count).map(|_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&subscriptions) }).collect()
}

fn appends(count: usize) -> Vec<Append> {
    appends_to(count, &["s"])
}

fn request(subscription: &str, room: usize, ordering: Turn) -> ClaimRequest {
    let want = Want { subscription: subscription.into(), room, ordering };
    ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] }
}

async fn claim(provider: &PostgresProvider, room: usize) -> Vec<Lease> {
    provider.claim(&request("s", room, Turn::None)).await.unwrap().leases
}

fn record(lease: &Lease) -> Attempt {
    let at = crate::event::micros(0);
    rules::lost_attempt(lease.number, "w".into(), at, at)
}

fn ended(lease: &Lease, next: Next) -> Settlement {
    let attempt = Some(record(lease));
    Settlement { key: lease.key.clone(), next, attempt, published: Vec::new(), writes: Vec::new() }
}

/// DESIGN §2, invariant 2: who has read seq n never later meets a smaller one.
#[tokio::test]
async fn a_reader_of_another_instance_meets_every_seq_in_order() {
    let schema = Schema::new();
    let open = || PostgresProvider::open(schema.options.clone());
    let (here, there, reader) = (open().await.unwrap(), open().await.unwrap(), open().await.unwrap());
    let writers: Vec<_> = [Arc::new(here), Arc::new(there)]
        .iter()
        .cycle()
        .take(6)
        .map(|provider| {
            let provider = Arc::clone(provider);
            tokio::spawn(async move {
                for count in [1, 7, 2, 30, 1, 1, 12, 5] {
                    provider.append(appends(count)).await.unwrap();
                }
            })
        })
        .collect();
    let mut seqs: Vec<Seq> = Vec::new();
    while seqs.len() < 6 * 59 {
        let page = reader.read(seqs.last().copied().unwrap_or(0), 10).await.unwrap();
        seqs.extend(page.events.iter().filter_map(|event| event.seq));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(seqs, (1..=6 * 59).collect::<Vec<Seq>>());
}

#[tokio::test]
async fn two_instances_wake_each_other() {
    let schema = Schema::new();
    let options = Options { poll_interval: Duration::from_millis(20), ..schema.options.clone() };
    let (here, there) =
        (PostgresProvider::open(options.clone()).await.unwrap(), PostgresProvider::open(options).await.unwrap());
    let mut wake = there.wake();
    let mut next = async || {
        let waited = tokio::time::timeout(Duration::from_secs(30), wake.changed()).await;
        assert!(matches!(waited, Ok(Ok(()))));
    };
    // The first look.
    next().await;
    here.append(appends(1)).await.unwrap();
    next().await;
    schema.sql("INSERT INTO {s}.inbox (type, payload) VALUES ('a.b', '1')");
    next().await;
    assert_eq!(claim(&there, 9).await.len(), 1);
}

/// A claim begins where the last one ended, but not for ever.
#[tokio::test]
async fn what_another_instance_gives_back_is_found() {
    let schema = Schema::new();
    let (here, there) = (schema.provider().await, schema.provider().await);
    here.append(appends(6)).await.unwrap();
    let theirs = claim(&there, 3).await;
    assert_eq!(claim(&here, 9).await.len(), 3);
    let release = |lease: &Lease| Settlement { attempt: None, ..ended(lease, Next::Release) };
    there.settle(theirs.iter().map(release).collect()).await.unwrap();
    here.append(appends(1)).await.unwrap();
    let finding = async {
        let mut found = Vec::new();
        while found.len() < 4 {
            found.extend(claim(&here, 2).await.iter().map(|lease| lease.key.seq));
        }
        found
    };
    let mut found = tokio::time::timeout(Duration::from_secs(30), finding).await.unwrap();
    found.sort_unstable();
    assert_eq!(found, [1, 2, 3, 7]);
}

/// However much of what is ready waits for one key, the heads of others are found.
#[tokio::test]
async fn a_long_line_behind_one_key_hides_nobody() {
    let provider = Schema::new().provider().await;
    let mut batch = appends(400);
    for (at, append) in batch.iter_mut().enumerate() {
        Arc::make_mut(&mut append.event).key = match at {
            0..397 => Some("hot".into()),
            397 => None,
            _ => Some("cold".into()),
        };
    }
    provider.append(batch).await.unwrap();
    let leases = provider.claim(&request("s", 3, Turn::Key)).await.unwrap().leases;
    let seqs: Vec<Seq> = leases.iter().map(|lease| lease.key.seq).collect();
    assert_eq!(seqs, [1, 398, 399]);
    assert!(provider.claim(&request("s", 3, Turn::Key)).await.unwrap().leases.is_empty());
}

/// Beyond a few types, lists are read another way.
#[tokio::test]
async fn a_pattern_of_many_types_lists_as_one_of_few_does() {
    let provider = Schema::new().provider().await;
    let mut batch = appends(300);
    for (at, append) in batch.iter_mut().enumerate() {
        Arc::make_mut(&mut append.event).event_type = format!("{}.t{}", ["a", "b"][at % 2], at / 2).parse().unwrap();
    }
    provider.append(batch).await.unwrap();
    assert_eq!(claim(&provider, 2).await.len(), 2);
    for (pattern, status, expected) in [
        ("a.*", None, vec![299, 297, 295]),
        ("a.t{1,2}", None, vec![5, 3]),
        ("a.*", Some(crate::delivery::Status::Processing), vec![1]),
        ("a.t?", Some(crate::delivery::Status::Pending), vec![19, 17, 15]),
        ("*.*", Some(crate::delivery::Status::Completed), vec![]),
    ] {
        let pattern = Some(pattern.parse().unwrap());
        let filter = EventFilter { pattern, status, limit: 3, ..EventFilter::default() };
        let page = provider.list(&filter).await.unwrap();
        let seqs: Vec<Seq> = page.records.iter().map(|record| record.event.seq.unwrap()).collect();
        assert_eq!(seqs, expected, "{filter:?}");
        assert_eq!(page.next.is_some(), expected.len() == 3);
    }
}

/// A prune goes step by step, counts all, and leaves nothing of what went.
#[tokio::test]
async fn nothing_is_left_of_what_was_pruned() {
    let schema = Schema::new();
    let provider = schema.provider().await;
    provider.append(appends_to(2_103, &[])).await.unwrap();
    provider.append(appends_to(3, &["s", "t"])).await.unwrap();
    for subscription in ["s", "t"] {
        for next in [Next::Retry { after: Duration::ZERO }, Next::Complete] {
            let claimed = provider.claim(&request(subscription, 9, Turn::None)).await.unwrap().leases;
            provider.settle(claimed.iter().map(|lease| ended(lease, next)).collect()).await.unwrap();
        }
    }
    let keep_one = Retention { max_age: None, max_events: Some(1) };
    assert_eq!(provider.prune(&keep_one).await.unwrap(), 2_105);
    assert_eq!(provider.read(0, 1).await.unwrap().floor, 2_106);
    assert_eq!(schema.sql("SELECT count(*) FROM {s}.attempts"), "4");
    schema.advance(Duration::from_secs(60)).await;
    let young = Retention { max_age: Some(Duration::from_secs(1)), max_events: None };
    assert_eq!(provider.prune(&young).await.unwrap(), 1);
    for table in ["events", "deliveries", "attempts", "progress"] {
        assert_eq!(schema.sql(&format!("SELECT count(*) FROM {{s}}.{table}")), "0", "{table}");
    }
}

/// An event that gets a second delivery later is counted like one that had it from the beginning.
#[tokio::test]
async fn an_event_that_gets_company_is_closed_by_its_last_delivery() {
    let provider = Schema::new().provider().await;
    provider.append(appends(1)).await.unwrap();
    let first = claim(&provider, 1).await.remove(0);
    let replay = Replay {
        subscription: "late".into(),
        pattern: "*".parse().unwrap(),
        from_seq: None,
        to_seq: None,
        from: None,
        to: None,
        missing_only: true,
        dry_run: false,
    };
    assert_eq!(provider.amend(Amendment::Replay(replay)).await.unwrap(), 1);
    let second = provider.claim(&request("late", 1, Turn::None)).await.unwrap().leases.remove(0);
    assert_eq!(provider.stats().await.unwrap().processing_events, 1);
    let open = async |lease: &Lease, next| provider.settle(vec![ended(lease, next)]).await.unwrap().remove(0);
    assert_eq!(open(&first, Next::Fail).await, Settled::Done { finished: None });
    assert_eq!(provider.stats().await.unwrap().processing_events, 1);
    assert_eq!(open(&second, Next::Complete).await, Settled::Done { finished: Some(Status::Failed) });
    let stats = provider.stats().await.unwrap();
    assert_eq!((stats.failed_events, stats.processing_events, stats.dead_letters), (1, 0, 1));
}

/// Names of documents are any text, also what PostgreSQL takes for none.
#[tokio::test]
async fn a_document_may_have_nothing_but_zeros_in_its_name() {
    let provider = Schema::new().provider().await;
    for key in ["\0", "\0\0", "a\0b"] {
        provider.put_document("\0c", key, key.to_owned().into(), Expect::Absent, None).await.unwrap();
    }
    let listed: Vec<String> =
        provider.list_documents("\0c", None, 9).await.unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(listed, ["\0", "\0\0", "a\0b"]);
}
