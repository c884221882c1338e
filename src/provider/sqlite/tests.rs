//! SQLite against the suite, and what only a file can get wrong.

use std::sync::atomic::AtomicI64;

use super::*;
use crate::provider::conformance::Fixture;
use crate::provider::inbox::InboxRow;

struct File {
    folder: tempfile::TempDir,
    time: Arc<AtomicI64>,
}

impl File {
    fn new() -> Self {
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { folder: tempfile::tempdir().unwrap(), time }
    }

    fn options(&self) -> Options {
        let path = self.folder.path().join("t.db");
        Options { url: format!("sqlite://{}", path.display()), ..Options::default() }
    }

    async fn provider(&self) -> SqliteProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        SqliteProvider::with_clock(self.options(), clock).await.unwrap()
    }
}

#[async_trait]
impl Fixture for File {
    async fn open(&self) -> Arc<dyn Provider> {
        Arc::new(self.provider().await)
    }

    fn reopens(&self) -> Result<(), &'static str> {
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        self.time.fetch_add(writer::as_micros(by), Ordering::Relaxed);
    }

    async fn leave(&self, rows: &[InboxRow]) -> Result<(), &'static str> {
        let mut connection = raw(self).await;
        let text = "INSERT INTO inbox (id, type, source, created_at, key, user_id, session_id, instance_id, schema, \
            entity, operation, trace_parent, caused_by, metadata, content_type, payload, binary) \
            VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)";
        for row in rows {
            let query = sqlx::query(text).bind(&row.id).bind(&row.event_type).bind(row.source).bind(row.created_at);
            let query = query.bind(&row.key).bind(&row.user_id).bind(&row.session_id).bind(&row.instance_id);
            let query = query.bind(&row.schema).bind(&row.entity).bind(&row.operation).bind(&row.trace_parent);
            let query = query.bind(&row.caused_by).bind(&row.metadata).bind(&row.content_type);
            query.bind(&row.payload).bind(&row.binary).execute(&mut connection).await.unwrap();
        }
        Ok(())
    }
}

mod conformance {
    use super::File;

    conformance_tests!(File::new());
}

use crate::delivery::Next;
use crate::event::{Event, Payload, Source};
use crate::provider::{Lease, Want};
use crate::subscription::Ordering as Turn;

fn appends(count: usize) -> Vec<Append> {
    let subscriptions: Arc<[Arc<str>]> = [Arc::from("s")].into();
    let event = || Event::new(Source::System, "a.b.c".parse().unwrap(), Payload::default());
    (0..count).map(|_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&subscriptions) }).collect()
}

async fn claim(provider: &SqliteProvider, room: usize) -> Vec<Lease> {
    let want = Want { subscription: "s".into(), room, ordering: Turn::None };
    let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] };
    provider.claim(&request).await.unwrap().leases
}

async fn refusal(url: &str) -> String {
    let options = Options { url: url.to_owned(), ..Options::default() };
    SqliteProvider::open(options).await.err().unwrap().to_string()
}

/// FACTS: across processes, `PRAGMA data_version` is the wake-up.
#[tokio::test]
async fn two_instances_on_one_file_wake_each_other() {
    let file = File::new();
    let (here, there) = (file.provider().await, file.provider().await);
    let mut wake = there.wake();
    // The first look of a fresh instance may tick for nothing.
    wake.changed().await.unwrap();
    here.append(appends(1)).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_secs(30), wake.changed()).await;
    assert!(matches!(waited, Ok(Ok(()))));
    assert_eq!(claim(&there, 9).await.len(), 1);
    assert!(claim(&here, 9).await.is_empty());
}

/// SQLite takes any value into any column, and nothing of it stops the inbox.
#[tokio::test]
async fn values_of_the_wrong_kind_in_the_inbox_stop_nobody() {
    let file = File::new();
    let provider = file.provider().await;
    let hostile = "INSERT INTO inbox (type, source, created_at, key, payload) VALUES \
        (x'ff', 0, NULL, NULL, NULL), ('a.b', 'x', NULL, NULL, NULL), ('a.b', 0, 'soon', NULL, NULL), \
        ('a.b', 0, NULL, x'fe', NULL), ('a.b', 0, NULL, 5, 7), ('a.b', 0, 9223372036854775807, NULL, x'5b5d')";
    sqlx::raw_sql(hostile).execute(&mut raw(&file).await).await.unwrap();
    let matcher = |_: &crate::event::EventType| -> Arc<[Arc<str>]> { [].into() };
    let request = RouteRequest { matcher: &matcher, max: 99, max_payload: 100 };
    assert_eq!(provider.route(&request).await.unwrap().taken, 6);
    let events = provider.read(0, 99).await.unwrap().events;
    let types: Vec<&str> = events.iter().map(|event| event.event_type.as_str()).collect();
    let refused = crate::provider::inbox::REFUSED;
    assert_eq!(types, [refused, refused, "a.b", refused, "a.b", refused]);
    assert_eq!((events[4].key.as_deref(), &events[4].payload.bytes()[..]), (Some("5"), &b"7"[..]));
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM inbox").fetch_one(&mut raw(&file).await).await.unwrap();
    assert_eq!(left, 0);
}

/// A batch that cannot be stored leaves those that were committed with it alone.
#[tokio::test]
async fn a_request_that_fails_does_not_undo_its_neighbours() {
    let file = File::new();
    let provider = Arc::new(file.provider().await);
    let trap =
        "CREATE TRIGGER trap BEFORE INSERT ON events WHEN new.type = 'trap' BEGIN SELECT RAISE(ABORT, 'no'); END";
    let mut connection = raw(&file).await;
    sqlx::raw_sql(trap).execute(&mut connection).await.unwrap();
    let mut tasks = Vec::new();
    for at in 0..20 {
        let provider = Arc::clone(&provider);
        tasks.push(tokio::spawn(async move {
            let mut batch = appends(3);
            if at % 5 == 0 {
                Arc::make_mut(&mut batch[2].event).event_type = "trap".parse().unwrap();
            }
            provider.append(batch).await.is_ok()
        }));
    }
    let mut stored = 0;
    for (at, task) in tasks.into_iter().enumerate() {
        let is_stored = task.await.unwrap();
        assert_eq!(is_stored, at % 5 != 0, "{at}");
        stored += usize::from(is_stored);
    }
    let stats = provider.stats().await.unwrap();
    assert_eq!((stats.head_seq, stats.total_events), (stored as u64 * 3, stored as u64 * 3));
    // What was undone is not remembered: seqs that it had belong to other events now.
    let leased: Vec<_> = claim(&provider, 99).await.into_iter().map(|lease| lease.event).collect();
    assert_eq!(leased, provider.read(0, 99).await.unwrap().events);
    assert_eq!(leased.len(), stored * 3);
}

/// A first claim finds events in memory, later claims and other instances find them in the file.
#[tokio::test]
async fn a_lease_says_the_same_from_memory_and_from_the_file() {
    let file = File::new();
    let (here, there) = (file.provider().await, file.provider().await);
    let mut batch = appends(5);
    Arc::make_mut(&mut batch[1].event).metadata.insert("n".into(), 1.into());
    Arc::make_mut(&mut batch[2].event).payload = Payload::new("application/x-b", vec![0, 255]).unwrap();
    here.append(batch).await.unwrap();
    file.advance(Duration::from_secs(7)).await;
    let mut seen = Vec::new();
    for provider in [&here, &here, &there] {
        let leases = claim(provider, 9).await;
        seen.push(leases.iter().map(|lease| (Arc::clone(&lease.event), lease.age, lease.number)).collect::<Vec<_>>());
        let release = |lease: Lease| Settlement {
            key: lease.key,
            next: Next::Release,
            attempt: None,
            published: Vec::new(),
            writes: Vec::new(),
        };
        provider.settle(leases.into_iter().map(release).collect()).await.unwrap();
    }
    assert_eq!((seen[0].len(), seen[0][0].1, seen[0][0].2), (5, Duration::from_secs(7), 1));
    assert_eq!((&seen[1], &seen[2]), (&seen[0], &seen[0]));
}

/// An event that is in memory is not handed out once it is erased, by whichever instance.
#[tokio::test]
async fn an_erased_event_is_not_remembered() {
    let file = File::new();
    let (here, there) = (file.provider().await, file.provider().await);
    let batch = appends(3);
    let ids: Vec<String> = batch.iter().map(|append| append.event.id.to_string()).collect();
    here.append(batch).await.unwrap();
    for (provider, id) in [&here, &there].into_iter().zip(&ids) {
        assert_eq!(provider.amend(Amendment::Erase { id: id.clone() }).await.unwrap(), 1);
    }
    let left: Vec<String> = claim(&here, 9).await.iter().map(|lease| lease.event.id.to_string()).collect();
    assert_eq!(left, ids[2..]);
}

async fn raw(file: &File) -> sqlx::SqliteConnection {
    use sqlx::ConnectOptions as _;
    let path = file.folder.path().join("t.db");
    sqlx::sqlite::SqliteConnectOptions::new().filename(path).connect().await.unwrap()
}

#[tokio::test]
async fn a_newer_schema_and_a_foreign_database_are_refused() {
    let file = File::new();
    file.provider().await.close().await.unwrap();
    sqlx::raw_sql("PRAGMA user_version = 99").execute(&mut raw(&file).await).await.unwrap();
    let text = refusal(&file.options().url).await;
    assert!(text.contains("has schema 99") && text.contains("newer tidegate"), "{text}");
    let foreign = File::new();
    std::fs::write(foreign.folder.path().join("t.db"), b"").unwrap();
    sqlx::raw_sql("CREATE TABLE users (id)").execute(&mut raw(&foreign).await).await.unwrap();
    let text = refusal(&foreign.options().url).await;
    assert!(text.contains("something else"), "{text}");
}

#[tokio::test]
async fn a_database_of_the_first_schema_opens_with_its_events() {
    let file = File::new();
    std::fs::write(file.folder.path().join("t.db"), b"").unwrap();
    let first = concat!(
        include_str!("schema.sql"),
        "PRAGMA application_id = 0x74696465; PRAGMA user_version = 1; PRAGMA journal_mode = wal;",
        "INSERT INTO head VALUES (1, 1, 0, 1, 0, 'epoch');",
        "INSERT INTO events (seq, id, type, source, created_at, appended_at, instance_id, caused_by, payload) \
         VALUES (1, 'kept', 'a.b', 0, 1, 1, 'here', 'cause', x'31');"
    );
    sqlx::raw_sql(first).execute(&mut raw(&file).await).await.unwrap();
    let kept = file.provider().await.get("kept").await.unwrap().unwrap().record.event;
    assert_eq!((kept.seq, &kept.payload.bytes()[..], kept.depth), (Some(1), &b"1"[..], 0));
}

#[tokio::test]
async fn a_place_that_cannot_be_used_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("sqlite://{}/{name}", folder.path().display());
    std::fs::write(folder.path().join("text"), "this is a text and no database, which is easy to see").unwrap();
    std::fs::write(folder.path().join("fixed"), "").unwrap();
    let mut permissions = std::fs::metadata(folder.path().join("fixed")).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(folder.path().join("fixed"), permissions).unwrap();
    let rows = [
        (at("missing/t.db"), "does not exist: make it first"),
        (at(""), "is a directory"),
        (at("text"), "not a SQLite database"),
        (at("fixed"), "may only be read"),
        ("sqlite::memory:".to_owned(), "memory:"),
        ("sqlite://".to_owned(), "must name a file"),
        ("postgres://x".to_owned(), "must begin with sqlite://"),
    ];
    for (url, words) in rows {
        let text = refusal(&url).await;
        assert!(text.contains(words), "{url}: {text}");
    }
}

/// Attempts stand in a table of their own, and go with their delivery.
#[tokio::test]
async fn nothing_is_left_of_what_was_pruned() {
    let file = File::new();
    let provider = file.provider().await;
    provider.append(appends(3)).await.unwrap();
    for next in [Next::Retry { after: Duration::ZERO }, Next::Complete] {
        let attempts = claim(&provider, 9).await.into_iter().map(|lease| Settlement {
            attempt: Some(record(&lease)),
            key: lease.key,
            next,
            published: Vec::new(),
            writes: Vec::new(),
        });
        provider.settle(attempts.collect()).await.unwrap();
    }
    let retention = Retention { max_age: None, max_events: Some(0) };
    assert_eq!(provider.prune(&retention).await.unwrap(), 3);
    for table in ["events", "deliveries", "attempts", "progress"] {
        let text = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let left: i64 = sqlx::query_scalar(text).fetch_one(&mut raw(&file).await).await.unwrap();
        assert_eq!(left, 0, "{table}");
    }
}

fn record(lease: &Lease) -> crate::delivery::Attempt {
    let at = crate::event::micros(0);
    crate::provider::rules::lost_attempt(lease.number, "w".into(), at, at)
}

/// A prune goes step by step, and still counts all.
#[tokio::test]
async fn a_long_prune_counts_all_its_steps() {
    let file = File::new();
    let provider = file.provider().await;
    let nobody: Arc<[Arc<str>]> = [].into();
    let batch = appends(1_203).into_iter().map(|append| Append { subscriptions: Arc::clone(&nobody), ..append });
    provider.append(batch.collect()).await.unwrap();
    let retention = Retention { max_age: None, max_events: Some(100) };
    assert_eq!(provider.prune(&retention).await.unwrap(), 1_103);
    assert_eq!(provider.read(0, 1).await.unwrap().floor, 1_104);
}

/// However much of what is ready waits for one key, the heads of others are found.
#[tokio::test]
async fn a_long_line_behind_one_key_hides_nobody() {
    let file = File::new();
    let provider = file.provider().await;
    let mut batch = appends(400);
    for (at, append) in batch.iter_mut().enumerate() {
        Arc::make_mut(&mut append.event).key = match at {
            0..397 => Some("hot".into()),
            397 => None,
            _ => Some("cold".into()),
        };
    }
    provider.append(batch).await.unwrap();
    let want = Want { subscription: "s".into(), room: 3, ordering: Turn::Key };
    let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] };
    let leases = provider.claim(&request).await.unwrap().leases;
    let seqs: Vec<Seq> = leases.iter().map(|lease| lease.key.seq).collect();
    assert_eq!(seqs, [1, 398, 399]);
    assert!(provider.claim(&request).await.unwrap().leases.is_empty());
}

/// Beyond a few types, lists are read another way.
#[tokio::test]
async fn a_pattern_of_many_types_lists_as_one_of_few_does() {
    let file = File::new();
    let provider = file.provider().await;
    let mut batch = appends(300);
    for (at, append) in batch.iter_mut().enumerate() {
        Arc::make_mut(&mut append.event).event_type = format!("{}.t{}", ["a", "b"][at % 2], at / 2).parse().unwrap();
    }
    provider.append(batch).await.unwrap();
    let leases = claim(&provider, 2).await;
    assert_eq!(leases.len(), 2);
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

/// An erased event's content is gone from the file, not only from the tables.
#[tokio::test]
async fn nothing_of_an_erased_event_is_left_in_the_file() {
    let file = File::new();
    let provider = file.provider().await;
    let mut batch = appends(3);
    Arc::make_mut(&mut batch[1].event).payload = Payload::json_text(format!("\"{}\"", "SECRET".repeat(3_000))).unwrap();
    let id = batch[1].event.id.to_string();
    provider.append(batch).await.unwrap();
    assert_eq!(provider.amend(Amendment::Erase { id }).await.unwrap(), 1);
    provider.close().await.unwrap();
    let bytes = std::fs::read(file.folder.path().join("t.db")).unwrap();
    assert!(!bytes.windows(6).any(|window| window == b"SECRET"));
}

/// A look changes nothing, and says what a migration would do.
#[tokio::test]
async fn a_look_makes_no_file_and_says_what_is_pending() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.db");
    let options = Options { url: format!("sqlite://{}", path.display()), ..Options::default() };
    let look = async || SqliteProvider::open_for(options.clone(), Opening::AsItIs).await.map(drop);
    let text = look().await.unwrap_err().to_string();
    assert!(text.contains("is not made yet") && !path.exists(), "{text}");
    std::fs::write(&path, "").unwrap();
    let text = look().await.unwrap_err().to_string();
    assert!(text.contains("holds nothing yet"), "{text}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    SqliteProvider::open(options.clone()).await.unwrap().close().await.unwrap();
    look().await.unwrap();
    let version = async |text: &'static str| {
        let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect(&options.url).await.unwrap();
        sqlx::query_scalar::<_, i64>(text).fetch_optional(&mut connection).await.unwrap()
    };
    version("PRAGMA user_version = 2").await;
    let text = look().await.unwrap_err().to_string();
    assert!(text.contains("has version 2, and this binary needs 3"), "{text}");
    assert_eq!(version("PRAGMA user_version").await, Some(2));
}
