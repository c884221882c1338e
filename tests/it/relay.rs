//! What one replica writes reaches the clients of another at once and exactly once, whatever happens to the connection
//! that hears of it (BEHAVIOURS J, K).

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::event::Seq;
use tidegate::feed::{Frame, Position, Request, Subscriber};
use tidegate::provider::postgres::{Options, PostgresProvider};
use tidegate::provider::{Append, Provider};
use tidegate::{Event, Feed, Metrics, Payload, Source};

use crate::support::postgres::{Fsync, Postgres};
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::stream::Stream;
use crate::support::wire;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// A poll that never comes: what arrives, a hint brought.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);

/// A schema on a server, and what replicas there call themselves.
struct Site {
    name: String,
    server: &'static Postgres,
}

impl Site {
    fn new() -> Self {
        let server = Postgres::shared();
        Self { name: server.fresh_name(), server }
    }

    fn url(&self, replica: &str) -> String {
        format!("{}?sslmode=disable&application_name={}-{replica}", self.server.url("postgres"), self.name)
    }

    fn options(&self, replica: &str) -> Options {
        Options { url: self.url(replica), schema: self.name.clone(), poll_interval: NEVER, ..Options::default() }
    }

    async fn replica(&self, name: &str) -> Arc<dyn Provider> {
        Arc::new(PostgresProvider::open(self.options(name)).await.unwrap())
    }

    /// The connections of a replica that listen.
    fn listening(&self, replica: &str) -> usize {
        let text = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}-{replica} listener'",
            self.name
        );
        self.server.psql("postgres", &text).parse().unwrap()
    }

    fn kill_listener(&self, replica: &str) {
        let text = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{}-{replica} listener'",
            self.name
        );
        assert_eq!(self.server.psql("postgres", &text), "t");
    }
}

async fn write(provider: &dyn Provider, count: usize) {
    try_write(provider, count).await.unwrap();
}

async fn try_write(provider: &dyn Provider, count: usize) -> tidegate::Result<()> {
    let nobody: Arc<[Arc<str>]> = Arc::default();
    let event = || Event {
        instance_id: "here".into(),
        ..Event::new(Source::System, "a.b.c".parse().unwrap(), Payload::default())
    };
    let batch = (0..count).map(|_| Append { event: Arc::new(event()), subscriptions: Arc::clone(&nobody) }).collect();
    provider.append(batch).await.map(drop)
}

/// The generation of the listening connection while there is one.
async fn generation(provider: &dyn Provider) -> Option<u64> {
    let specific = provider.stats().await.ok()?.provider_specific;
    specific["listener_generation"].as_u64().filter(|_| specific["listener"] == "listening")
}

async fn until<T: PartialEq + std::fmt::Debug>(what: &str, wanted: T, look: impl AsyncFn() -> T) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        if seen == wanted {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what}: {seen:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A feed over a store, whose service runs as long as the test.
async fn client(provider: &Arc<dyn Provider>, position: Position) -> (Subscriber, Feed) {
    let (feed, service) = Feed::new(Arc::clone(provider), Metrics::default());
    tokio::spawn(service.run(std::future::pending()));
    (feed.subscribe(Request { position, ..Request::default() }).await.unwrap(), feed)
}

/// Takes events until seq `last`, each once and in order.
async fn follow(subscriber: &mut Subscriber, first: Seq, last: Seq) {
    let mut expected = first;
    while expected <= last {
        let frames = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("events come").unwrap();
        for frame in frames {
            let Frame::Event(entry) = frame else { panic!("{frame:?} before {expected}") };
            assert_eq!(entry.seq(), Some(expected));
            expected += 1;
        }
    }
}

/// BEHAVIOURS J1, J4: hints reach the others, and do not go round.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_of_one_replica_wakes_the_other_and_makes_no_loop() {
    let site = Site::new();
    let (here, there) = (site.replica("here").await, site.replica("there").await);
    assert!(here.capabilities().push && there.capabilities().push);
    let mut wake = there.wake();
    for _ in 0..5 {
        wake.mark_unchanged();
        write(&*here, 1).await;
        tokio::time::timeout(PATIENCE, wake.changed()).await.expect("a hint comes").unwrap();
        let ticks = *here.wake().borrow();
        tokio::time::sleep(Duration::from_millis(100)).await;
        wake.mark_unchanged();
        assert!(tokio::time::timeout(Duration::from_millis(200), wake.changed()).await.is_err(), "one write, one hint");
        assert_eq!(*here.wake().borrow(), ticks, "nobody is woken by his own hint");
    }
}

/// The burst: 2,000 events, five times, and the connection that hears of them ended in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_is_killed_in_bursts_loses_and_repeats_nothing() {
    let site = Site::new();
    let (here, there) = (site.replica("here").await, site.replica("there").await);
    let (mut near, _near) = client(&here, Position::Latest).await;
    let (mut far, _far) = client(&there, Position::Latest).await;
    let following = tokio::spawn(async move {
        tokio::join!(follow(&mut near, 1, 10_000), follow(&mut far, 1, 10_000));
    });
    for round in 1..=5 {
        until("it listens", Some(round), || generation(&*there)).await;
        for part in 0..100 {
            write(&*here, 20).await;
            if part == 50 {
                site.kill_listener("there");
            }
        }
    }
    until("it listens again", Some(6), || generation(&*there)).await;
    tokio::time::timeout(PATIENCE, following).await.expect("all arrive").unwrap();
    assert_eq!(generation(&*here).await, Some(1));
}

/// BEHAVIOURS K1.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_clients_share_one_listening_connection() {
    let site = Site::new();
    let (here, there) = (site.replica("here").await, site.replica("there").await);
    let (first, feed) = client(&there, Position::Latest).await;
    let mut clients = vec![first];
    for _ in 1..100 {
        clients.push(feed.subscribe(Request::default()).await.unwrap());
    }
    write(&*here, 50).await;
    for client in &mut clients {
        follow(client, 1, 50).await;
    }
    assert_eq!((feed.clients(), site.listening("there")), (100, 1));
}

/// BEHAVIOURS K7, and `close` gives its connection back.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_store_listens_no_more() {
    let site = Site::new();
    let (closed, dropped) = (site.replica("closed").await, site.replica("dropped").await);
    assert_eq!((site.listening("closed"), site.listening("dropped")), (1, 1));
    tokio::time::timeout(PATIENCE, closed.close()).await.expect("it does not hang").unwrap();
    drop(dropped);
    until("no connection is left", (0, 0), async || (site.listening("closed"), site.listening("dropped"))).await;

    let late = site.replica("late").await;
    site.kill_listener("late");
    until("it waits to connect again", json!("away"), async || {
        late.stats().await.unwrap().provider_specific["listener"].clone()
    })
    .await;
    tokio::time::timeout(PATIENCE, late.close()).await.expect("it does not hang").unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(site.listening("late"), 0);
}

/// A connection that is open and carries nothing: only a heartbeat tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed_and_replaced() {
    let site = Site::new();
    let here = site.replica("here").await;
    let (address, proxy) = through_a_proxy(&site).await;
    let there = PostgresProvider::open(Options { url: address, ..site.options("there") }).await.unwrap();
    assert_eq!(generation(&there).await, Some(1));
    let mut wake = there.wake();
    proxy.freeze_listeners();
    write(&*here, 1).await;
    until("another connection listens", Some(2), || generation(&there)).await;
    assert!(wake.has_changed().unwrap(), "what is in doubt is read again");
    wake.mark_unchanged();
    write(&*here, 1).await;
    tokio::time::timeout(PATIENCE, wake.changed()).await.expect("a hint comes").unwrap();
}

/// The URL of the server as seen through a proxy.
async fn through_a_proxy(site: &Site) -> (String, Proxy) {
    let url = site.url("there");
    let address = url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned();
    let proxy = Proxy::start(address.clone()).await;
    (url.replace(&address, proxy.address()), proxy)
}

/// FACTS: LISTEN behind a pooler in transaction mode hears nothing. It is said once, and the log is polled.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_swallows_notifications_is_noticed_and_polled_around() {
    let site = Site::new();
    let here = site.replica("here").await;
    let (url, proxy) = through_a_proxy(&site).await;
    proxy.swallow_notifications();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("tidegate.toml");
    std::fs::write(&config, format!("provider = \"{url}\"\n[postgres]\nschema = \"{}\"\n", site.name)).unwrap();
    let server = Server::start(folder.path(), &["--config", config.to_str().unwrap()]).await;
    let stats = wire::get(&server.url, "/v1/stats").await.json();
    assert_eq!(
        (&stats["capabilities"]["push"], &stats["capabilities"]["provider"]),
        (&json!(false), &json!("postgres"))
    );
    let mut stream = Stream::open(&server.url, "", &[]).await;
    for n in 1..=3 {
        write(&*here, 1).await;
        assert_eq!(stream.ids(1).await, [n]);
    }
    until("it is known to be deaf", json!("deaf"), async || {
        wire::get(&server.url, "/v1/stats").await.json()["provider_stats"]["provider_specific"]["listener"].clone()
    })
    .await;
    assert_eq!(server.log().matches("hints do not come through").count(), 1, "{}", server.log());
}

/// The server ends as in a crash, in the middle of a burst, and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_server_loses_and_repeats_nothing() {
    let server: &'static Postgres = Box::leak(Box::new(Postgres::start(Fsync::On)));
    let site = Site { name: server.fresh_name(), server };
    let (here, there) = (site.replica("here").await, site.replica("there").await);
    let (mut far, _feed) = client(&there, Position::Latest).await;
    write(&*here, 100).await;
    follow(&mut far, 1, 100).await;
    tokio::task::spawn_blocking(|| {
        server.kill();
        server.run();
    })
    .await
    .unwrap();
    until("it listens again", Some(2), || generation(&*there)).await;
    for _ in 0..10 {
        // Connections of before the crash are found broken one by one: what goes to them is stored nowhere.
        until("it is written", true, async || try_write(&*here, 10).await.is_ok()).await;
    }
    follow(&mut far, 101, 200).await;
    server.kill();
}

/// DESIGN §2, invariant 9, between two processes on one database.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_of_two_servers_on_one_database_see_the_same() {
    let site = Site::new();
    let start = async |replica: &'static str| {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("tidegate.toml");
        let text = format!("provider = \"{}\"\n[postgres]\nschema = \"{}\"\n", site.url(replica), site.name);
        std::fs::write(&config, text).unwrap();
        (Server::start(folder.path(), &["--config", config.to_str().unwrap()]).await, folder)
    };
    let ((here, _a), (there, _b)) = (start("here").await, start("there").await);
    let mut clients = [Stream::open(&here.url, "", &[]).await, Stream::open(&there.url, "", &[]).await];
    let batch: Vec<Value> = (0..10).map(|n| json!({"type": "a.b.c", "payload": "x".repeat(n * 1_000)})).collect();
    let batch = Value::from(batch).to_string();
    let publishing = async {
        for _ in 0..10 {
            for server in [&here, &there] {
                assert_eq!(wire::post(&server.url, "/v1/events", batch.clone()).await.status, 202);
            }
        }
    };
    let [a, b] = &mut clients;
    let ((), a, b) = tokio::join!(publishing, a.ids(200), b.ids(200));
    assert_eq!((&a, &b), (&(1..=200).collect(), &(1..=200).collect()));
    let mut elsewhere = Stream::open(&there.url, "", &[("last-event-id", "150")]).await;
    assert_eq!(elsewhere.ids(50).await, (151..=200).collect::<Vec<_>>());
}
