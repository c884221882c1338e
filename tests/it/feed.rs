//! The feed over every store: what a client is told, from where on, and what it is told when that cannot be served.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tidegate::event::{Seq, UserId};
use tidegate::feed::{Filter, Frame, Position, Request, Subscriber};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::nats::{self, NatsProvider};
use tidegate::provider::postgres::{self, PostgresProvider};
use tidegate::provider::redis::{self, RedisProvider};
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::provider::{Amendment, Append, Provider, Retention};
use tidegate::{Error, Event, Feed, Metrics, Payload, Source};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::nats::NatsServer;
use crate::support::postgres::Postgres;
use crate::support::redis::RedisServer;
use crate::support::tapped::Tapped;

/// How long a frame may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long nothing must come for nothing to come.
const QUIET: Duration = Duration::from_millis(400);

/// A store that is there for one test.
struct Place {
    provider: Arc<dyn Provider>,
    folder: Option<tempfile::TempDir>,
}

impl Place {
    async fn memory() -> Self {
        let options = memory::Options { max_events: 100_000, ..memory::Options::default() };
        Self { provider: Arc::new(MemoryProvider::open(options).unwrap()), folder: None }
    }

    async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { provider: sqlite_in(&folder).await, folder: Some(folder) }
    }

    async fn postgres() -> Self {
        let (url, schema) = (Postgres::shared().url("postgres"), Postgres::shared().fresh_name());
        let options = postgres::Options { url, schema, ..postgres::Options::default() };
        Self { provider: Arc::new(PostgresProvider::open(options).await.unwrap()), folder: None }
    }

    async fn redis() -> Self {
        Self { provider: redis_at(&fresh_redis()).await, folder: None }
    }

    async fn nats() -> Self {
        Self { provider: nats_at(&fresh_nats()).await, folder: None }
    }

    async fn add(&self, count: usize) {
        add(&*self.provider, count).await;
    }

    /// Removes all that is there.
    async fn prune(&self) {
        self.provider.prune(&Retention { max_age: None, max_events: Some(0) }).await.unwrap();
    }
}

async fn sqlite_in(folder: &tempfile::TempDir) -> Arc<dyn Provider> {
    let url = format!("sqlite://{}", folder.path().join("events.db").display());
    let options = sqlite::Options { url, ..sqlite::Options::default() };
    Arc::new(SqliteProvider::open(options).await.unwrap())
}

/// A namespace of its own on the one server of this process.
fn fresh_redis() -> String {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let server = SERVER.get_or_init(|| RedisServer::start(&["--appendonly", "no"]));
    format!("{}?namespace=feed-{}", server.url(), COUNT.fetch_add(1, Ordering::Relaxed))
}

async fn redis_at(url: &str) -> Arc<dyn Provider> {
    let options = redis::Options { url: url.to_owned(), ..redis::Options::default() };
    Arc::new(RedisProvider::open(options).await.unwrap())
}

/// The same on the one NATS server of this process.
fn fresh_nats() -> String {
    static SERVER: OnceLock<NatsServer> = OnceLock::new();
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let server = SERVER.get_or_init(|| NatsServer::start(&[]));
    format!("{}?namespace=feed-{}", server.url(), COUNT.fetch_add(1, Ordering::Relaxed))
}

async fn nats_at(url: &str) -> Arc<dyn Provider> {
    let options = nats::Options { url: url.to_owned(), ..nats::Options::default() };
    Arc::new(NatsProvider::open(options).await.unwrap())
}

fn event(event_type: &str) -> Event {
    let payload = Payload::json_text("{\"n\": 1}").unwrap();
    Event { instance_id: "here".into(), ..Event::new(Source::System, event_type.parse().unwrap(), payload) }
}

async fn append(provider: &dyn Provider, events: Vec<Event>) {
    let nobody: Arc<[Arc<str>]> = Arc::default();
    let batch = events.into_iter();
    let batch = batch.map(|event| Append { event: Arc::new(event), subscriptions: Arc::clone(&nobody) }).collect();
    provider.append(batch).await.unwrap();
}

async fn add(provider: &dyn Provider, count: usize) {
    append(provider, (0..count).map(|_| event("a.b.c")).collect()).await;
}

/// A feed whose service runs.
struct Running {
    feed: Feed,
    metrics: Metrics,
    stop: Option<oneshot::Sender<()>>,
    service: JoinHandle<()>,
}

impl Running {
    fn over(provider: &Arc<dyn Provider>) -> Self {
        let metrics = Metrics::default();
        let (feed, service) = Feed::new(Arc::clone(provider), metrics.clone());
        let (stop, stopped) = oneshot::channel();
        let service = tokio::spawn(service.run(async move { drop(stopped.await) }));
        Self { feed, metrics, stop: Some(stop), service }
    }

    async fn at(&self, position: Position) -> Subscriber {
        self.feed.subscribe(Request { position, ..Request::default() }).await.unwrap()
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        (&mut self.service).await.unwrap();
    }
}

/// A frame, as tests compare it.
#[derive(Debug, PartialEq)]
enum Told {
    Seq(Seq),
    Ephemeral,
    Reset(Seq),
}

fn told(frame: &Frame) -> Told {
    match frame {
        Frame::Event(entry) => entry.seq().map_or(Told::Ephemeral, Told::Seq),
        Frame::Reset { from_seq } => Told::Reset(*from_seq),
    }
}

async fn next(subscriber: &mut Subscriber) -> Vec<Told> {
    let frames = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("a frame comes");
    frames.expect("the feed goes on").iter().map(told).collect()
}

/// The next frames, until there are `count`.
async fn take(subscriber: &mut Subscriber, count: usize) -> Vec<Told> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(next(subscriber).await);
    }
    assert_eq!(all.len(), count, "{all:?}");
    all
}

async fn quiet(subscriber: &mut Subscriber) {
    if let Ok(frames) = tokio::time::timeout(QUIET, subscriber.next()).await {
        panic!("nothing was to come, and {:?} came", frames.map(|frames| frames.iter().map(told).collect::<Vec<_>>()));
    }
}

fn seqs(range: std::ops::RangeInclusive<Seq>) -> Vec<Told> {
    range.map(Told::Seq).collect()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waited = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("{what}"));
}

/// Publishes one by one from `writers` tasks.
fn publish(provider: &Arc<dyn Provider>, writers: usize, each: usize) -> Vec<JoinHandle<()>> {
    let write = |provider: Arc<dyn Provider>| async move {
        for _ in 0..each {
            add(&*provider, 1).await;
            tokio::task::yield_now().await;
        }
    };
    (0..writers).map(|_| tokio::spawn(write(Arc::clone(provider)))).collect()
}

/// BEHAVIOURS I10, G10.
async fn a_client_that_resumes_gets_each_event_once_while_many_publish(place: Place) {
    let running = Running::over(&place.provider);
    place.add(40).await;
    let writers = publish(&place.provider, 8, 50);
    let (mut all, mut cursor, mut turns) = (Vec::new(), 0, 0);
    while all.len() < 440 {
        let mut subscriber = running.at(Position::After(cursor)).await;
        turns += 1;
        for _ in 0..turns % 5 + 1 {
            if all.len() < 440 {
                all.extend(next(&mut subscriber).await);
            }
        }
        cursor = subscriber.cursor();
    }
    assert_eq!(all, seqs(1..=440));
    for writer in writers {
        writer.await.unwrap();
    }
    quiet(&mut running.at(Position::After(440)).await).await;
}

/// BEHAVIOURS I10, K4: more than what is kept in memory comes while a client does not ask.
async fn a_client_that_lags_reads_on_in_the_log(place: Place) {
    let running = Running::over(&place.provider);
    let mut slow = running.at(Position::Latest).await;
    place.add(1).await;
    assert_eq!(next(&mut slow).await, seqs(1..=1));
    quiet(&mut slow).await;
    for _ in 0..12 {
        place.add(500).await;
    }
    until("the feed reads what is new", || running.metrics.feed().lag.get() == 6_000).await;
    assert_eq!(take(&mut slow, 6_000).await, seqs(2..=6_001));
    assert_eq!(running.metrics.feed().lagged.get(), 1);
    place.add(1).await;
    assert_eq!(next(&mut slow).await, seqs(6_002..=6_002));
    assert_eq!(running.metrics.feed().resets.get(), 0);
}

/// BEHAVIOURS I11; a cursor of 0 on a pruned log has missed something too.
async fn a_cursor_below_the_floor_gets_one_reset_and_then_what_is_new(place: Place) {
    let running = Running::over(&place.provider);
    place.add(10).await;
    place.prune().await;
    let mut missed = [running.at(Position::After(0)).await, running.at(Position::After(9)).await];
    for subscriber in &mut missed {
        assert_eq!(next(subscriber).await, [Told::Reset(11)]);
        assert_eq!(subscriber.cursor(), 10);
        quiet(subscriber).await;
    }
    let mut whole = [
        running.at(Position::After(10)).await,
        running.at(Position::Beginning).await,
        running.at(Position::Latest).await,
    ];
    place.add(2).await;
    for subscriber in missed.iter_mut().chain(&mut whole) {
        assert_eq!(take(subscriber, 2).await, seqs(11..=12));
    }
    assert_eq!(running.metrics.feed().resets.get(), 2);
}

/// Pruned under a reader that has begun.
async fn a_reader_that_is_overtaken_by_retention_is_told(place: Place) {
    let running = Running::over(&place.provider);
    place.add(100).await;
    let mut subscriber = running.at(Position::Beginning).await;
    let first = next(&mut subscriber).await;
    assert!(first.len() < 100 && first.first() == Some(&Told::Seq(1)), "{first:?}");
    place.prune().await;
    assert_eq!(next(&mut subscriber).await, [Told::Reset(101)]);
    place.add(1).await;
    assert_eq!(next(&mut subscriber).await, seqs(101..=101));
}

async fn a_cursor_ahead_of_the_head_gets_one_reset(place: Place) {
    let running = Running::over(&place.provider);
    place.add(3).await;
    for cursor in [4, 1_000, Seq::MAX] {
        let mut subscriber = running.at(Position::After(cursor)).await;
        assert_eq!(next(&mut subscriber).await, [Told::Reset(4)], "{cursor}");
        quiet(&mut subscriber).await;
    }
    let mut subscriber = running.at(Position::After(9)).await;
    place.add(8).await;
    assert_eq!(next(&mut subscriber).await, [Told::Reset(4)]);
    assert_eq!(take(&mut subscriber, 8).await, seqs(4..=11));
}

async fn a_cursor_of_another_log_gets_one_reset(place: Place) {
    let running = Running::over(&place.provider);
    place.add(3).await;
    let epoch = running.at(Position::Latest).await.epoch().to_owned();
    let at = |epoch: &str| Request { position: Position::After(1), epoch: Some(epoch.into()), ..Request::default() };
    let mut own = running.feed.subscribe(at(&epoch)).await.unwrap();
    assert_eq!(take(&mut own, 2).await, seqs(2..=3));
    let mut other = running.feed.subscribe(at("another")).await.unwrap();
    assert_eq!(next(&mut other).await, [Told::Reset(4)]);
    assert_eq!(other.epoch(), epoch);
    quiet(&mut other).await;
}

/// DESIGN §9: feeds pass over erased events, in the log and while they are live.
async fn an_erased_event_is_passed_over(place: Place) {
    let running = Running::over(&place.provider);
    let mut live = running.at(Position::Latest).await;
    let events: Vec<Event> = (0..6).map(|_| event("a.b")).collect();
    let ids: Vec<String> = events.iter().map(|event| event.id.to_string()).collect();
    append(&*place.provider, events).await;
    assert_eq!(take(&mut live, 6).await, seqs(1..=6));
    for id in [&ids[1], &ids[2], &ids[5]] {
        place.provider.amend(Amendment::Erase { id: id.clone() }).await.unwrap();
    }
    let mut late = running.at(Position::Beginning).await;
    assert_eq!(take(&mut late, 3).await, [Told::Seq(1), Told::Seq(4), Told::Seq(5)]);
    quiet(&mut late).await;
    assert_eq!(late.cursor(), 6);
    place.add(1).await;
    assert_eq!((next(&mut late).await, next(&mut live).await), (seqs(7..=7), seqs(7..=7)));
}

async fn a_filter_passes_over_the_rest_and_the_cursor_gets_on(place: Place) {
    let running = Running::over(&place.provider);
    let mut orders: Vec<Event> =
        (0..300).map(|n| event(if n == 250 { "shop.orders.create" } else { "noise" })).collect();
    orders[10].user_id = Some(UserId::Text("u-1".into()));
    append(&*place.provider, orders).await;
    let filter = |patterns: &[&str]| Filter {
        patterns: patterns.iter().map(|text| text.parse().unwrap()).collect(),
        ..Filter::default()
    };
    let from_start = |filter| Request { filter, position: Position::Beginning, epoch: None };
    let mut some = running.feed.subscribe(from_start(filter(&["shop.*.create", "chat.**"]))).await.unwrap();
    assert_eq!(next(&mut some).await, [Told::Seq(251)]);
    quiet(&mut some).await;
    assert_eq!(some.cursor(), 300);
    let mut none = running.feed.subscribe(from_start(filter(&["no.such.type"]))).await.unwrap();
    quiet(&mut none).await;
    assert_eq!(none.cursor(), 300);
    let of_user = Filter { user_id: Some(UserId::Text("u-1".into())), ..Filter::default() };
    let mut of_user = running.feed.subscribe(from_start(of_user)).await.unwrap();
    assert_eq!(next(&mut of_user).await, [Told::Seq(11)]);
    let from_database = Filter { source: Some(Source::Database), ..Filter::default() };
    quiet(&mut running.feed.subscribe(from_start(from_database)).await.unwrap()).await;
    append(&*place.provider, vec![event("noise"), event("chat.room.message")]).await;
    assert_eq!(next(&mut some).await, [Told::Seq(302)]);
}

/// BEHAVIOURS K1 for stores: the live tail is read once, however many clients there are.
async fn a_hundred_clients_see_every_event_once_and_share_its_reading(place: Place) {
    let tapped = Tapped::new(Arc::clone(&place.provider));
    let provider: Arc<dyn Provider> = Arc::clone(&tapped) as _;
    let running = Running::over(&provider);
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(running.at(Position::Latest).await);
    }
    assert_eq!(running.metrics.feed().clients.get(), 100);
    place.add(1).await;
    for client in &mut clients {
        assert_eq!(next(client).await, seqs(1..=1));
    }
    let before = tapped.reads();
    let following: Vec<_> = clients
        .into_iter()
        .map(|mut client| tokio::spawn(async move { (take(&mut client, 400).await, client) }))
        .collect();
    for writer in publish(&place.provider, 4, 100) {
        writer.await.unwrap();
    }
    for client in following {
        assert_eq!(client.await.unwrap().0, seqs(2..=401));
    }
    let reads = tapped.reads() - before;
    assert!(reads < 2_000, "{reads} reads of 400 events for 100 clients");
    assert_eq!(running.feed.clients(), 0);
}

async fn without_clients_nothing_is_read(place: Place) {
    let tapped = Tapped::new(Arc::clone(&place.provider));
    let provider: Arc<dyn Provider> = Arc::clone(&tapped) as _;
    let running = Running::over(&provider);
    place.add(3).await;
    let mut client = running.at(Position::Beginning).await;
    assert_eq!(take(&mut client, 3).await, seqs(1..=3));
    drop(client);
    until("the reading ends", || running.metrics.feed().clients.get() == 0).await;
    quiet_reads(&tapped).await;
    assert_eq!(take(&mut running.at(Position::After(1)).await, 2).await, seqs(2..=3));
}

/// Reads stop.
async fn quiet_reads(tapped: &Tapped) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let before = tapped.reads();
        tokio::time::sleep(QUIET * 2).await;
        if tapped.reads() == before {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "the log is read although nobody asks");
    }
}

/// Every client of a log that is made anew is told once, whatever it waits for.
async fn a_log_made_anew_resets_every_client_once(place: Place) {
    let tapped = Tapped::new(Arc::clone(&place.provider));
    let provider: Arc<dyn Provider> = Arc::clone(&tapped) as _;
    let running = Running::over(&provider);
    place.add(5).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = running.at(Position::Beginning).await;
        assert_eq!(take(&mut client, 5).await, seqs(1..=5));
        clients.push(client);
    }
    let another = Place::memory().await;
    another.add(5).await;
    tapped.exchange(Arc::clone(&another.provider));
    for client in &mut clients {
        assert_eq!(next(client).await, [Told::Reset(6)]);
    }
    another.add(2).await;
    for client in &mut clients {
        assert_eq!(take(client, 2).await, seqs(6..=7));
    }
    assert_eq!(running.metrics.feed().resets.get(), 3);
}

/// A store that fails for a while is waited for.
async fn trouble_of_the_store_is_outlived(place: Place) {
    let tapped = Tapped::new(Arc::clone(&place.provider));
    let provider: Arc<dyn Provider> = Arc::clone(&tapped) as _;
    let running = Running::over(&provider);
    let mut client = running.at(Position::Latest).await;
    place.add(1).await;
    assert_eq!(next(&mut client).await, seqs(1..=1));
    tapped.fail(6);
    place.add(3).await;
    assert_eq!(take(&mut client, 3).await, seqs(2..=4));
    tapped.fail(1);
    let refused = running.feed.subscribe(Request::default()).await;
    assert!(refused.is_ok() || matches!(refused, Err(Error::Store { .. })));
}

/// DESIGN §3; BEHAVIOURS I4, G5.
async fn an_ephemeral_event_reaches_who_is_there_and_leaves_nothing(place: Place) {
    let running = Running::over(&place.provider);
    assert_eq!(running.feed.publish_ephemeral(event("typing")).unwrap(), 0);
    let mut here = running.at(Position::Latest).await;
    let filter = Filter { patterns: vec!["chat.*".parse().unwrap()], ..Filter::default() };
    let mut elsewhere = running.feed.subscribe(Request { filter, ..Request::default() }).await.unwrap();
    assert_eq!(running.feed.publish_ephemeral(event("typing")).unwrap(), 2);
    let frames = tokio::time::timeout(PATIENCE, here.next()).await.unwrap().unwrap();
    let Frame::Event(entry) = &frames[0] else { panic!("{frames:?}") };
    let json: serde_json::Value = serde_json::from_slice(entry.json()).unwrap();
    assert_eq!((&json["ephemeral"], &json["type"], json.get("seq")), (&true.into(), &"typing".into(), None));
    quiet(&mut elsewhere).await;
    assert_eq!(place.provider.read(0, 10).await.unwrap().head, 0);
    place.add(1).await;
    assert_eq!(next(&mut here).await, seqs(1..=1));
}

/// BEHAVIOURS G8, G9.
async fn a_consumer_goes_on_where_it_acknowledged(place: Place) {
    let running = Running::over(&place.provider);
    place.add(5).await;
    let at = |name: &str| Position::Acknowledged(name.into());
    let feed = &running.feed;
    assert_eq!(take(&mut running.at(at("a")).await, 5).await, seqs(1..=5), "never acknowledged: from the first");
    feed.acknowledge("a", 3).await.unwrap();
    feed.acknowledge("a", 2).await.unwrap();
    assert_eq!((feed.acknowledged("a").await.unwrap(), feed.acknowledged("b").await.unwrap()), (Some(3), None));
    assert_eq!(take(&mut running.at(at("a")).await, 2).await, seqs(4..=5));
    assert_eq!(take(&mut running.at(at("b")).await, 5).await, seqs(1..=5), "consumers are independent");
    feed.seek("a", 1).await.unwrap();
    assert_eq!(take(&mut running.at(at("a")).await, 4).await, seqs(2..=5));
    for (name, seq, words) in [("a", 6, "seq: is beyond the head of the log, 5"), ("", 1, "consumer: cannot be empty")]
    {
        let error = feed.acknowledge(name, seq).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    place.prune().await;
    assert_eq!(next(&mut running.at(at("a")).await).await, [Told::Reset(6)]);
    let all: Vec<_> = (1..=5).map(|seq| feed.acknowledge("many", seq)).collect();
    assert!(futures_util::future::join_all(all).await.into_iter().all(|result| result.is_ok()));
    assert_eq!(feed.acknowledged("many").await.unwrap(), Some(5));
}

/// `close` must not hang while a stream is open.
async fn a_stop_ends_every_feed_at_once(place: Place) {
    let mut running = Running::over(&place.provider);
    let mut waiting = running.at(Position::Latest).await;
    let mut idle = running.at(Position::Beginning).await;
    let waits = tokio::spawn(async move { waiting.next().await.is_none() });
    place.add(1).await;
    running.stop().await;
    place.provider.close().await.unwrap();
    let _ = tokio::time::timeout(PATIENCE, waits).await.expect("it ends").unwrap();
    assert!(tokio::time::timeout(PATIENCE, idle.next()).await.expect("it ends").is_none());
    assert!(matches!(running.feed.subscribe(Request::default()).await, Err(Error::Stopped(_))));
    assert!(matches!(running.feed.publish_ephemeral(event("a")), Err(Error::Stopped(_))));
}

async fn a_closed_store_ends_every_feed(place: Place) {
    let running = Running::over(&place.provider);
    let mut client = running.at(Position::Latest).await;
    place.provider.close().await.unwrap();
    assert!(tokio::time::timeout(PATIENCE, client.next()).await.expect("it ends").is_none());
}

macro_rules! on_every_store {
    ($($claim:ident,)+) => {
        mod memory_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $claim() {
                super::$claim(super::Place::memory().await).await;
            })+
        }
        mod postgres_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $claim() {
                super::$claim(super::Place::postgres().await).await;
            })+
        }
        mod redis_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $claim() {
                super::$claim(super::Place::redis().await).await;
            })+
        }
        mod nats_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $claim() {
                super::$claim(super::Place::nats().await).await;
            })+
        }
        mod sqlite_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $claim() {
                super::$claim(super::Place::sqlite().await).await;
            })+
        }
    };
}

on_every_store! {
    a_client_that_resumes_gets_each_event_once_while_many_publish,
    a_client_that_lags_reads_on_in_the_log,
    a_cursor_below_the_floor_gets_one_reset_and_then_what_is_new,
    a_reader_that_is_overtaken_by_retention_is_told,
    a_cursor_ahead_of_the_head_gets_one_reset,
    a_cursor_of_another_log_gets_one_reset,
    an_erased_event_is_passed_over,
    a_filter_passes_over_the_rest_and_the_cursor_gets_on,
    a_hundred_clients_see_every_event_once_and_share_its_reading,
    without_clients_nothing_is_read,
    a_log_made_anew_resets_every_client_once,
    trouble_of_the_store_is_outlived,
    an_ephemeral_event_reaches_who_is_there_and_leaves_nothing,
    a_consumer_goes_on_where_it_acknowledged,
    a_stop_ends_every_feed_at_once,
    a_closed_store_ends_every_feed,
}

/// BEHAVIOURS J1, J4: two processes on one store, the clients of either see everything once.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_two_instances_on_one_file_see_the_same() {
    let here = Place::sqlite().await;
    let there = sqlite_in(here.folder.as_ref().unwrap()).await;
    both_see_the_same(&here.provider, &there).await;
}

/// The same where the store is a Redis server.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_two_instances_on_one_redis_see_the_same() {
    let url = fresh_redis();
    both_see_the_same(&redis_at(&url).await, &redis_at(&url).await).await;
}

/// The same where it is a NATS server.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_two_instances_on_one_nats_see_the_same() {
    let url = fresh_nats();
    both_see_the_same(&nats_at(&url).await, &nats_at(&url).await).await;
}

/// FLUSHALL makes a log anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_is_one_reset_and_the_feed_goes_on() {
    let server = RedisServer::start(&["--appendonly", "no"]);
    let flush = ::redis::Client::open(server.url()).unwrap();
    one_reset(redis_at(&server.url()).await, async || {
        ::redis::cmd("FLUSHALL")
            .exec_async(&mut flush.get_multiplexed_async_connection().await.unwrap())
            .await
            .unwrap();
    })
    .await;
}

/// So does deleting the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_stream_is_one_reset_and_the_feed_goes_on() {
    let server = NatsServer::start(&[]);
    let client = async_nats::connect(server.url()).await.unwrap();
    one_reset(nats_at(&server.url()).await, async || {
        async_nats::jetstream::new(client.clone()).delete_stream("tidegate-default").await.unwrap();
    })
    .await;
}

/// A server that had it in memory and was killed has nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_nats_in_memory_is_one_reset_and_the_feed_goes_on() {
    let server = Mutex::new(NatsServer::start(&[]));
    let options = nats::Options { url: server.lock().unwrap().url(), ..nats::Options::default() };
    let options = nats::Options { storage: nats::Storage::Memory, ..options };
    one_reset(Arc::new(NatsProvider::open(options).await.unwrap()), async || {
        let mut server = server.lock().unwrap();
        server.kill();
        server.restart();
    })
    .await;
}

/// And so does emptying it, for a process that comes then and for those that were there.
#[tokio::test(flavor = "multi_thread")]
async fn a_purged_stream_is_one_reset_and_the_feed_goes_on() {
    let server = NatsServer::start(&[]);
    let client = async_nats::connect(server.url()).await.unwrap();
    one_reset(nats_at(&server.url()).await, async || {
        let stream = async_nats::jetstream::new(client.clone()).get_stream("tidegate-default").await.unwrap();
        stream.purge().await.unwrap();
        nats_at(&server.url()).await.close().await.unwrap();
    })
    .await;
}

/// A log that is made anew is one reset for each client, whatever it had read, and then what is new.
async fn one_reset(provider: Arc<dyn Provider>, empty: impl AsyncFn()) {
    let running = Running::over(&provider);
    add(&*provider, 5).await;
    let mut clients = [running.at(Position::Beginning).await, running.at(Position::Latest).await];
    assert_eq!(take(&mut clients[0], 5).await, seqs(1..=5));
    add(&*provider, 1).await;
    for client in &mut clients {
        assert_eq!(next(client).await, seqs(6..=6));
    }
    empty().await;
    for client in &mut clients {
        assert_eq!(next(client).await, [Told::Reset(1)]);
    }
    add(&*provider, 2).await;
    for client in &mut clients {
        assert_eq!(take(client, 2).await, seqs(1..=2));
    }
    assert_eq!(running.metrics.feed().resets.get(), 2);
}

async fn both_see_the_same(here: &Arc<dyn Provider>, there: &Arc<dyn Provider>) {
    let feeds = [Running::over(here), Running::over(there)];
    let mut clients = [feeds[0].at(Position::Latest).await, feeds[1].at(Position::Latest).await];
    let writers = [publish(here, 2, 50), publish(there, 2, 50)];
    for client in &mut clients {
        assert_eq!(take(client, 200).await, seqs(1..=200));
    }
    for writer in writers.into_iter().flatten() {
        writer.await.unwrap();
    }
}

/// What is kept in memory has an age, so that what is erased is not told from there for long.
#[tokio::test(start_paused = true)]
async fn what_is_old_is_read_from_the_log_again() {
    let place = Place::memory().await;
    let running = Running::over(&place.provider);
    let mut idle = running.at(Position::Latest).await;
    place.add(1).await;
    assert_eq!(next(&mut idle).await, seqs(1..=1));
    quiet(&mut idle).await;
    let erased = event("a.b");
    let id = erased.id.to_string();
    append(&*place.provider, vec![event("a.b"), erased, event("a.b")]).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    place.provider.amend(Amendment::Erase { id }).await.unwrap();
    assert_eq!(take(&mut idle, 2).await, [Told::Seq(2), Told::Seq(4)]);
}
