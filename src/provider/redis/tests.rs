//! Redis against the suite, and what only a server can get wrong.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use super::*;
use crate::provider::child;
use crate::provider::conformance::Fixture;

#[path = "../../../tests/it/support/redis.rs"]
mod server;

use server::RedisServer;

/// The server that tests of one process share, each with a namespace of its own.
fn shared() -> &'static RedisServer {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    SERVER.get_or_init(|| RedisServer::start(&["--appendonly", "no"]))
}

struct Place {
    url: String,
    time: Arc<AtomicI64>,
}

impl Place {
    fn new() -> Self {
        Self::on(shared())
    }

    fn on(server: &RedisServer) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let url = format!("{}?namespace=test-{}", server.url(), COUNT.fetch_add(1, Ordering::Relaxed));
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { url, time }
    }

    fn options(&self) -> Options {
        Options { url: self.url.clone(), ..Options::default() }
    }

    async fn provider(&self) -> RedisProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        RedisProvider::with_clock(self.options(), clock).await.unwrap()
    }
}

#[async_trait]
impl Fixture for Place {
    async fn open(&self) -> Arc<dyn Provider> {
        Arc::new(self.provider().await)
    }

    fn reopens(&self) -> Result<(), &'static str> {
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        self.time.fetch_add(as_micros(by), Ordering::Relaxed);
    }
}

mod conformance {
    use super::Place;

    conformance_tests!(Place::new());
}

use std::collections::BTreeSet;

use crate::delivery::{Attempt, Next, Status};
use crate::error::Error;
use crate::event::{Event, Payload, Source};
use crate::provider::{Lease, Want, rules};
use crate::subscription::Ordering as Turn;

fn appends(count: usize) -> Vec<Append> {
    let subscriptions: Arc<[Arc<str>]> = [Arc::from("s")].into();
    let event = || Event::new(Source::System, "a.b.c".parse().unwrap(), Payload::default());
    (0..count).map(|_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&subscriptions) }).collect()
}

fn request(subscription: &str, room: usize, ordering: Turn) -> ClaimRequest {
    let want = Want { subscription: subscription.into(), room, ordering };
    ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] }
}

async fn claim(provider: &RedisProvider, room: usize) -> Vec<Lease> {
    provider.claim(&request("s", room, Turn::None)).await.unwrap().leases
}

fn record(lease: &Lease) -> Attempt {
    rules::lost_attempt(lease.number, "w".into(), crate::event::micros(0), crate::event::micros(0))
}

fn ended(lease: Lease, next: Next) -> Settlement {
    let attempt = Some(record(&lease)).filter(|_| next != Next::Release);
    Settlement { key: lease.key, next, attempt, published: Vec::new(), writes: Vec::new() }
}

async fn refusal(url: &str) -> String {
    refusal_of(Options { url: url.to_owned(), ..Options::default() }).await
}

/// The words of a refusal, with their cause.
async fn refusal_of(options: Options) -> String {
    let error = RedisProvider::open(options).await.err().unwrap();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

/// A command of another client.
async fn raw(server: &RedisServer, command: &[&str]) -> ::redis::Value {
    let client = ::redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut cmd = ::redis::cmd(command[0]);
    for argument in &command[1..] {
        cmd.arg(argument);
    }
    cmd.query_async(&mut connection).await.unwrap()
}

/// FACTS: a message to those who listen is the wake-up.
#[tokio::test]
async fn two_instances_of_a_namespace_wake_each_other() {
    let place = Place::new();
    let (here, there) = (place.provider().await, place.provider().await);
    let mut wake = there.wake();
    // The first tick says that messages are heard from now on.
    wake.changed().await.unwrap();
    here.append(appends(1)).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_secs(30), wake.changed()).await;
    assert!(matches!(waited, Ok(Ok(()))));
    assert_eq!(claim(&there, 9).await.len(), 1);
    assert!(claim(&here, 9).await.is_empty());
}

/// As many as the broker settles at once, and one more.
#[tokio::test]
async fn a_large_batch_is_settled_whole() {
    let provider = Place::new().provider().await;
    provider.append(appends(1_025)).await.unwrap();
    let leases = claim(&provider, 2_000).await;
    let batch: Vec<_> = leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect();
    assert_eq!(provider.settle(batch).await.unwrap(), vec![Settled::Done { finished: Some(Status::Completed) }; 1_025]);
}

/// A server that forgot the scripts is taught them again, in the middle of work.
#[tokio::test]
async fn a_server_without_the_scripts_is_taught_them() {
    let server = RedisServer::start(&[]);
    let provider = Place::on(&server).provider().await;
    provider.append(appends(2)).await.unwrap();
    raw(&server, &["SCRIPT", "FLUSH"]).await;
    provider.append(appends(2)).await.unwrap();
    let leases = claim(&provider, 9).await;
    raw(&server, &["SCRIPT", "FLUSH"]).await;
    let batch = leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect();
    assert_eq!(provider.settle(batch).await.unwrap(), vec![Settled::Done { finished: Some(Status::Completed) }; 4]);
}

/// FACTS: after FLUSHALL cursors are ahead of the log, and the epoch says so.
#[tokio::test]
async fn a_flushed_server_shows_another_log_and_goes_on() {
    let server = RedisServer::start(&[]);
    let provider = Place::on(&server).provider().await;
    provider.append(appends(3)).await.unwrap();
    provider.put_document("c", "k", "v".into(), Expect::Any, None).await.unwrap();
    let lease = claim(&provider, 1).await.remove(0);
    let before = provider.read(3, 9).await.unwrap();
    raw(&server, &["FLUSHALL"]).await;
    let after = provider.read(3, 9).await.unwrap();
    assert_eq!((after.events.len(), after.head, after.floor), (0, 0, 1));
    assert_ne!(after.epoch, before.epoch);
    assert_eq!(provider.settle(vec![ended(lease, Next::Complete)]).await.unwrap(), [Settled::Stale]);
    assert_eq!(provider.document("c", "k").await.unwrap(), None);
    let batch = appends(2);
    let ids: Vec<_> = batch.iter().map(|append| append.event.id.clone()).collect();
    assert_eq!(provider.append(batch).await.unwrap()[0].seq, 1);
    // Events of the old log had these seqs, and are not handed out for them.
    let leased: Vec<_> = claim(&provider, 9).await.iter().map(|lease| lease.event.id.clone()).collect();
    assert_eq!(leased, ids);
    assert_eq!(provider.read(0, 1).await.unwrap().epoch, after.epoch);
    provider.put_document("c", "k", "v".into(), Expect::Absent, None).await.unwrap();
}

/// DESIGN §2, invariant 1, with `appendfsync always`.
#[tokio::test]
async fn a_killed_server_has_lost_nothing_that_was_acknowledged() {
    let mut server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let place = Place::on(&server);
    let provider = Arc::new(place.provider().await);
    assert_eq!(provider.capabilities().durability, Durability::Storage);
    let publishers: Vec<_> = (0..8)
        .map(|_| {
            let provider = Arc::clone(&provider);
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                loop {
                    let batch = appends(3);
                    let ids: Vec<_> = batch.iter().map(|append| append.event.id.to_string()).collect();
                    match provider.append(batch).await {
                        Ok(_) => acknowledged.extend(ids),
                        Err(_) => return acknowledged,
                    }
                }
            })
        })
        .collect();
    while provider.stats().await.unwrap().total_events < 300 {}
    server.kill();
    let mut acknowledged = BTreeSet::new();
    for publisher in publishers {
        acknowledged.extend(publisher.await.unwrap());
    }
    let error = provider.stats().await.unwrap_err();
    assert!(error.to_string().contains(&server.url()), "{error}");
    server.restart();
    let until = std::time::Instant::now() + Duration::from_secs(30);
    while provider.stats().await.is_err() {
        assert!(std::time::Instant::now() < until, "the server is back, and is not tried again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(acknowledged.len() >= 276, "{}", acknowledged.len());
    let stored: BTreeSet<String> =
        claim(&provider, 99_999).await.iter().map(|lease| lease.event.id.to_string()).collect();
    assert!(acknowledged.is_subset(&stored), "{} of {}", stored.len(), acknowledged.len());
    let page = provider.read(0, 1).await.unwrap();
    assert_eq!(page.head, stored.len() as u64, "seqs are dense, and what was not acknowledged is whole or absent");
}

#[tokio::test]
async fn durability_is_what_the_servers_settings_say() {
    let rows = [
        (["--appendonly", "yes", "--appendfsync", "always"], Durability::Storage),
        (["--appendonly", "yes", "--appendfsync", "everysec"], Durability::Os),
        (["--appendonly", "yes", "--appendfsync", "no"], Durability::Process),
        (["--appendonly", "no", "--appendfsync", "always"], Durability::Process),
    ];
    for (settings, durability) in rows {
        let server = RedisServer::start(&settings);
        assert_eq!(Place::on(&server).provider().await.capabilities().durability, durability, "{settings:?}");
    }
}

/// Managed servers hide their configuration.
#[tokio::test]
async fn what_the_server_does_not_say_can_be_configured() {
    let server = RedisServer::start(&["--rename-command", "CONFIG", "", "--appendonly", "yes"]);
    let place = Place::on(&server);
    assert_eq!(place.provider().await.capabilities().durability, Durability::Process);
    let options = Options { durability: Some(Durability::Storage), ..place.options() };
    let provider = RedisProvider::open(options).await.unwrap();
    assert_eq!(provider.capabilities().durability, Durability::Storage);
    let evicting = RedisServer::start(&["--rename-command", "CONFIG", "", "--maxmemory-policy", "allkeys-lru"]);
    assert!(refusal(&evicting.url()).await.contains("allkeys-lru"));
}

#[tokio::test]
async fn a_server_that_may_drop_events_is_refused_with_the_line_to_change() {
    let server = RedisServer::start(&["--maxmemory-policy", "volatile-ttl"]);
    let text = refusal(&server.url()).await;
    assert!(text.contains("volatile-ttl") && text.contains("CONFIG SET maxmemory-policy noeviction"), "{text}");
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_with_the_reason() {
    let server = RedisServer::start(&["--requirepass", "hunter2"]);
    let base = format!("127.0.0.1:{}", server.port);
    let rows = [
        (format!("redis://{base}"), "redis.password"),
        (format!("redis://:wrong@{base}"), "redis.password"),
        (format!("redis://:hunter2@{base}/99"), "no database of this number"),
        (format!("redis://:hunter2@{base}/x"), "must be a number"),
        (format!("redis://:hunter2@{base}?namespce=x"), "did you mean namespace?"),
        (format!("redis://:hunter2@{base}?namespace=a{{b"), "redis.namespace"),
        (format!("redis://:hunter2@{base}?namespace="), "redis.namespace"),
        (format!("rediss://:hunter2@{base}#insecure"), "certificates"),
        ("redis://".to_owned(), "must be redis://"),
        ("http://x".to_owned(), "must be redis://"),
    ];
    for (url, words) in rows {
        let text = refusal(&url).await;
        assert!(text.contains(words) && !text.contains("hunter2") && !text.contains("wrong@"), "{url}: {text}");
    }
    let options = Options { url: format!("redis://{base}"), password: Some("hunter2".into()), ..Options::default() };
    RedisProvider::open(options).await.unwrap().append(appends(1)).await.unwrap();
    drop(server);
    let text = refusal(&format!("redis://{base}")).await;
    assert!(text.contains(&base) && text.contains("refused"), "{text}");
}

/// Somebody who accepts connections and says nothing, in the clear or where TLS is wanted, holds nobody up.
#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    for scheme in ["redis", "rediss"] {
        let options = Options {
            url: format!("{scheme}://{}", silent.local_addr().unwrap()),
            connect_timeout: Duration::from_millis(300),
            response_timeout: Duration::from_millis(300),
            ..Options::default()
        };
        let refused = tokio::time::timeout(Duration::from_secs(60), refusal_of(options)).await.unwrap();
        assert!(refused.contains(&format!("{scheme}://127.0.0.1")), "{refused}");
    }
}

#[tokio::test]
async fn another_schema_and_foreign_keys_are_refused() {
    let server = RedisServer::start(&[]);
    Place::on(&server).provider().await;
    raw(&server, &["HSET", "{tidegate:newer}:meta", "schema", "99"]).await;
    let text = refusal(&format!("{}?namespace=newer", server.url())).await;
    assert!(text.contains("schema 99") && text.contains("newer tidegate"), "{text}");
    raw(&server, &["HSET", "{tidegate:older}:meta", "schema", "1"]).await;
    let text = refusal(&format!("{}?namespace=older", server.url())).await;
    assert!(text.contains("schema 1 ") && text.contains("another namespace"), "{text}");
    raw(&server, &["SET", "{tidegate:foreign}:meta", "1"]).await;
    let text = refusal(&format!("{}?namespace=foreign", server.url())).await;
    assert!(text.contains("redis.namespace"), "{text}");
}

/// What a full server refuses is told as overload; work goes on, and retention makes room.
#[tokio::test]
async fn a_server_without_memory_refuses_events_and_settles_those_it_has() {
    let server = RedisServer::start(&["--maxmemory", "12mb"]);
    let provider = Place::on(&server).provider().await;
    let big = || {
        let mut batch = appends(10);
        for append in &mut batch {
            Arc::make_mut(&mut append.event).payload = Payload::new("text/plain", vec![b'x'; 100_000]).unwrap();
        }
        batch
    };
    let refused = loop {
        if let Err(error) = provider.append(big()).await {
            break error;
        }
    };
    assert!(matches!(refused, Error::Overloaded { .. }), "{refused}");
    let stats = provider.stats().await.unwrap();
    assert_eq!((stats.head_seq, stats.pending_events), (stats.total_events, stats.total_events));
    let leases = claim(&provider, 999).await;
    assert_eq!(leases.len() as u64, stats.total_events);
    let done = provider.settle(leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect()).await.unwrap();
    assert!(done.iter().all(|one| *one == Settled::Done { finished: Some(Status::Completed) }));
    let retention = Retention { max_age: None, max_events: Some(0) };
    assert_eq!(provider.prune(&retention).await.unwrap(), stats.total_events);
    let next = provider.append(big()).await.unwrap()[0].seq;
    assert_eq!(next, stats.head_seq + 1);
}

/// Ids, keys, subscriptions and types that have broken stores before.
#[tokio::test]
async fn hostile_names_are_only_names() {
    let place = Place::new();
    let provider = place.provider().await;
    let names = ["\0", "a\0b", "{x}", "q:1", "1 2,3", "*", "🦀\u{2028}", "%s %d", "=", "\r\nFLUSHALL\r\n"];
    let long = "k".repeat(60_000);
    for name in names.into_iter().chain([long.as_str()]) {
        let mut batch = appends(2);
        for append in &mut batch {
            Arc::make_mut(&mut append.event).key = Some(name.into());
            append.subscriptions = [Arc::from(name), Arc::from("other")].into();
        }
        let id = batch[0].event.id.clone();
        provider.append(batch).await.unwrap();
        let mut leases = provider.claim(&request(name, 9, Turn::Key)).await.unwrap().leases;
        assert_eq!((leases.len(), leases[0].event.key.as_deref()), (1, Some(name)));
        provider.settle(vec![ended(leases.remove(0), Next::Fail)]).await.unwrap();
        assert_eq!(provider.claim(&request(name, 9, Turn::Key)).await.unwrap().leases.len(), 1);
        let detail = provider.get(id.as_str()).await.unwrap().unwrap();
        assert_eq!(detail.deliveries.iter().filter(|delivery| &*delivery.subscription == name).count(), 1);
        assert_eq!(provider.amend(Amendment::Cancel { subscription: name.into() }).await.unwrap(), 1);
    }
    let stats = provider.stats().await.unwrap();
    assert_eq!((stats.dead_letters, stats.pending_deliveries), (11, 22));
}

/// BEHAVIOURS: `chat.message` could not be published at all.
#[tokio::test]
async fn a_type_of_two_segments_is_a_type() {
    let provider = Place::new().provider().await;
    let mut batch = appends(1);
    Arc::make_mut(&mut batch[0].event).event_type = "chat.message".parse().unwrap();
    provider.append(batch).await.unwrap();
    let filter = EventFilter { pattern: Some("chat.*".parse().unwrap()), ..EventFilter::default() };
    assert_eq!(provider.list(&filter).await.unwrap().records.len(), 1);
}

#[tokio::test]
async fn twenty_five_hundred_events_are_listed_and_paged() {
    let provider = Place::new().provider().await;
    for at in 0..5 {
        let mut batch = appends(500);
        for (n, append) in batch.iter_mut().enumerate() {
            Arc::make_mut(&mut append.event).event_type =
                format!("{}.t{}", ["a", "b"][n % 2], (at * 500 + n) % 100).parse().unwrap();
        }
        provider.append(batch).await.unwrap();
    }
    assert_eq!(provider.list(&EventFilter::default()).await.unwrap().records.len(), 2_500);
    let pattern = |text: &str| Some(text.parse().unwrap());
    let none = EventFilter::default;
    let filters = [
        (none(), 2_500),
        // Beyond a few types the log is read in place of their indexes.
        (EventFilter { pattern: pattern("a.*"), ..none() }, 1_250),
        (EventFilter { pattern: pattern("{a,b}.t{1,2,30}"), ..none() }, 75),
        (EventFilter { status: Some(Status::Pending), ..none() }, 2_500),
        (EventFilter { status: Some(Status::Completed), ..none() }, 0),
        (EventFilter { status: Some(Status::Pending), pattern: pattern("b.t1"), ..none() }, 25),
    ];
    for (mut filter, count) in filters {
        filter.limit = 300;
        let mut seqs = Vec::new();
        loop {
            let page = provider.list(&filter).await.unwrap();
            assert!(page.records.len() == 300 || page.next.is_none());
            seqs.extend(page.records.iter().map(|record| record.event.seq.unwrap()));
            match page.next {
                Some(next) => filter.before = Some(next),
                None => break,
            }
        }
        assert!(seqs.is_sorted_by(|one, next| one > next), "{filter:?}");
        assert_eq!(seqs.len(), count, "{filter:?}");
    }
}

/// However much of what is ready waits for one key, the heads of others are found.
#[tokio::test]
async fn a_long_line_behind_one_key_hides_nobody() {
    let provider = Place::new().provider().await;
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
    assert_eq!(leases.iter().map(|lease| lease.key.seq).collect::<Vec<_>>(), [1, 398, 399]);
    assert!(provider.claim(&request("s", 3, Turn::Key)).await.unwrap().leases.is_empty());
}

/// Large claims, settlements and prunes go step by step, and still do all of it.
#[tokio::test]
async fn what_is_too_much_for_one_step_takes_several() {
    let place = Place::new();
    let provider = place.provider().await;
    for _ in 0..5 {
        provider.append(appends(500)).await.unwrap();
    }
    let leases = claim(&provider, 2_200).await;
    assert_eq!(leases.len(), 2_200);
    assert!(leases.is_sorted_by_key(|lease| lease.key.seq));
    place.advance(Duration::from_secs(60)).await;
    let again = provider.claim(&request("s", 9_999, Turn::None)).await.unwrap();
    assert_eq!((again.lost.len(), again.leases.len()), (2_200, 2_500));
    let stale = provider.settle(leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect()).await.unwrap();
    assert!(stale.iter().all(|one| *one == Settled::Stale));
    let mut batch: Vec<_> = again.leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect();
    for one in batch.iter_mut().take(1_300) {
        one.next = Next::Fail;
    }
    let settled = provider.settle(batch).await.unwrap();
    let (failed, completed) = settled.split_at(1_300);
    assert!(failed.iter().all(|one| *one == Settled::Done { finished: Some(Status::Failed) }));
    assert_eq!(completed, vec![Settled::Done { finished: Some(Status::Completed) }; 1_200]);
    assert_eq!(provider.amend(Amendment::Redrive(DeadLetterFilter::default())).await.unwrap(), 1_300);
    let retention = Retention { max_age: None, max_events: Some(100) };
    assert_eq!(provider.prune(&retention).await.unwrap(), 1_200, "what is open stays");
    assert_eq!(provider.amend(Amendment::Cancel { subscription: "s".into() }).await.unwrap(), 1_300);
    assert_eq!(provider.prune(&retention).await.unwrap(), 1_200);
    let stats = provider.stats().await.unwrap();
    assert_eq!((stats.total_events, stats.completed_events, stats.pending_deliveries), (100, 100, 0));
}

/// Nothing may be left of what is gone, or memory would fill for ever.
#[tokio::test]
async fn nothing_is_left_of_what_was_pruned() {
    let server = RedisServer::start(&[]);
    let place = Place::on(&server);
    let provider = place.provider().await;
    let mut batch = appends(6);
    Arc::make_mut(&mut batch[0].event).key = Some("k".into());
    Arc::make_mut(&mut batch[1].event).key = Some("k".into());
    let erased = batch[5].event.id.to_string();
    provider.append(batch).await.unwrap();
    provider.amend(Amendment::Erase { id: erased }).await.unwrap();
    for next in [Next::Retry { after: Duration::ZERO }, Next::Release, Next::Fail] {
        let leases = claim(&provider, 9).await;
        provider.settle(leases.into_iter().map(|lease| ended(lease, next)).collect()).await.unwrap();
    }
    place.advance(Duration::from_secs(60)).await;
    let retention = Retention { max_age: Some(Duration::ZERO), max_events: Some(0) };
    assert_eq!(provider.prune(&retention).await.unwrap(), 5);
    let keys = row::texts(raw(&server, &["KEYS", "*"]).await);
    let prefix = &provider.prefix;
    let mut names: Vec<&str> = keys.iter().map(|key| key.strip_prefix(prefix.as_str()).unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["log", "meta", "names", "subs"], "what names the log and its subscriptions stays");
    assert_eq!(raw(&server, &["XLEN", &provider.key("log")]).await, ::redis::Value::Int(0));
}

/// The line of the documentation, with these in place of its words.
fn documented_user(password: &str) -> Vec<String> {
    let text = include_str!("../../../docs/redis.md");
    let line = text.lines().find(|line| line.starts_with("ACL SETUSER")).unwrap();
    line.replace("PASSWORD", password).split(' ').map(str::to_owned).collect()
}

/// What operators are told to permit is enough for everything.
#[tokio::test]
async fn the_documented_permissions_are_enough() {
    let server = RedisServer::start(&["--appendonly", "yes"]);
    let rule = documented_user("hunter2");
    raw(&server, &rule.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let url = format!("redis://tidegate:hunter2@127.0.0.1:{}", server.port);
    let provider = RedisProvider::open(Options { url: url.clone(), ..Options::default() }).await.unwrap();
    assert_eq!(provider.capabilities().durability, Durability::Os);
    let mut wake = provider.wake();
    wake.changed().await.unwrap();
    let mut batch = appends(4);
    Arc::make_mut(&mut batch[3].event).key = Some("k".into());
    let id = batch[0].event.id.to_string();
    provider.append(batch).await.unwrap();
    let leases = claim(&provider, 9).await;
    let keys: Vec<LeaseKey> = leases.iter().map(|lease| lease.key.clone()).collect();
    assert_eq!(provider.renew(&keys, Duration::from_secs(9)).await.unwrap(), [true; 4]);
    let nexts = [Next::Complete, Next::Fail, Next::Retry { after: Duration::ZERO }, Next::Release];
    let batch = leases.into_iter().zip(nexts).map(|(lease, next)| ended(lease, next)).collect();
    provider.settle(batch).await.unwrap();
    assert!(provider.get(&id).await.unwrap().is_some());
    let pattern = Some("a.**".parse().unwrap());
    let filters = [
        EventFilter { pattern, ..EventFilter::default() },
        EventFilter { from: Some(crate::event::micros(0)), ..EventFilter::default() },
        EventFilter::default(),
    ];
    for filter in filters {
        assert_eq!(provider.list(&filter).await.unwrap().records.len(), 4);
    }
    assert_eq!(provider.amend(Amendment::Redrive(DeadLetterFilter::default())).await.unwrap(), 1);
    provider.put_document("c", "k", "v".into(), Expect::Any, Some(Duration::from_secs(9))).await.unwrap();
    assert_eq!(provider.list_documents("c", None, 9).await.unwrap().len(), 1);
    provider.delete_document("c", "k", Expect::Any).await.unwrap();
    provider.amend(Amendment::Erase { id }).await.unwrap();
    provider.amend(Amendment::Cancel { subscription: "s".into() }).await.unwrap();
    assert_eq!(provider.prune(&Retention { max_age: None, max_events: Some(0) }).await.unwrap(), 3);
    assert!(provider.stats().await.unwrap().provider_specific.contains_key("used_memory"));
    // And no more: the keys of others are out of reach.
    let mut outsider = ::redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut get = ::redis::cmd("HGET");
    get.arg("other").arg("k");
    let refused = get.exec_async(&mut outsider).await.unwrap_err();
    assert_eq!(refused.code(), Some("NOPERM"));
}

#[tokio::test]
async fn a_look_tells_a_server_that_writes_everything_down_from_one_that_does_not() {
    use crate::provider::{Examine as _, Severity};
    let durable = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    for (server, expected) in [(&durable, None), (shared(), Some("not-durable"))] {
        let provider = RedisProvider::open(Place::on(server).options()).await.unwrap();
        let found = provider.examine().await.unwrap();
        let todo: Vec<_> = found.iter().filter(|finding| finding.severity > Severity::Ok).collect();
        assert!(found.len() == 5 && todo.iter().map(|finding| finding.code).eq(expected), "{found:#?}");
    }
}

/// Settings can be changed while the server runs: the figures and a look show them as they are now, and what no longer may
/// serve is not opened again.
#[tokio::test]
async fn settings_that_change_while_the_server_runs_are_noticed() {
    use crate::provider::{Examine as _, Severity};
    let server = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let options = Place::on(&server).options();
    let provider = RedisProvider::open(options.clone()).await.unwrap();
    assert_eq!(provider.capabilities().durability, Durability::Storage);
    raw(&server, &["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    raw(&server, &["CONFIG", "SET", "appendfsync", "everysec"]).await;
    let figures = provider.stats().await.unwrap().provider_specific;
    assert_eq!((&figures["maxmemory_policy"], &figures["appendfsync"]), (&"allkeys-lru".into(), &"everysec".into()));
    assert_eq!(provider.capabilities().durability, Durability::Os);
    raw(&server, &["CONFIG", "SET", "appendonly", "no"]).await;
    // Retention comes by every minute.
    provider.prune(&Retention { max_age: None, max_events: None }).await.unwrap();
    assert_eq!(provider.capabilities().durability, Durability::Process);
    assert!(refusal(&server.url()).await.contains("CONFIG SET maxmemory-policy noeviction"));
    let looking = RedisProvider::open_for(options, Opening::AsItIs).await.unwrap();
    for provider in [provider, looking] {
        let found = provider.examine().await.unwrap();
        let todo: Vec<_> = found.iter().filter(|one| one.severity > Severity::Ok).map(|one| one.code).collect();
        assert_eq!(todo, ["not-durable", "evicts"], "{found:?}");
    }
}

/// A look changes nothing, and says what is missing.
#[tokio::test]
async fn a_look_makes_no_log_and_says_so() {
    let server = RedisServer::start(&[]);
    let place = Place::on(&server);
    let look = async || RedisProvider::open_for(place.options(), Opening::AsItIs).await.map(drop);
    let text = look().await.unwrap_err().to_string();
    assert!(text.contains("is not made yet"), "{text}");
    assert_eq!(raw(&server, &["DBSIZE"]).await, ::redis::Value::Int(0));
    place.provider().await;
    look().await.unwrap();
}
