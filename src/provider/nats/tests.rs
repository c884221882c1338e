//! JetStream against the suite, and what only a replicated state can get wrong.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::provider::child;
use crate::provider::conformance::Fixture;

#[path = "../../../tests/it/support/nats.rs"]
mod server;

use server::NatsServer;

/// The server that tests of one process share, each with a namespace of its own.
fn shared() -> &'static NatsServer {
    static SERVER: OnceLock<NatsServer> = OnceLock::new();
    SERVER.get_or_init(|| NatsServer::start(&[]))
}

struct Place {
    url: String,
    time: Arc<AtomicI64>,
}

impl Place {
    fn new() -> Self {
        Self::on(shared())
    }

    fn on(server: &NatsServer) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let url = format!("{}?namespace=test-{}", server.url(), COUNT.fetch_add(1, Ordering::Relaxed));
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { url, time }
    }

    fn options(&self) -> Options {
        Options { url: self.url.clone(), ..Options::default() }
    }

    async fn provider(&self) -> NatsProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        NatsProvider::with_clock(self.options(), clock).await.unwrap()
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

use futures_util::StreamExt as _;

use crate::delivery::{Attempt, LogLine, Next, Status};
use crate::event::{Event, Payload, Source};
use crate::provider::{Examine as _, Lease, Severity, Want, rules};
use crate::subscription::Ordering as Turn;

fn event(payload: &str) -> Event {
    let payload = Payload::json_text(payload.to_owned()).unwrap();
    Event { instance_id: "here".into(), ..Event::new(Source::System, "a.b.c".parse().unwrap(), payload) }
}

fn appends(count: usize) -> Vec<Append> {
    let subscriptions: Arc<[Arc<str>]> = [Arc::from("s")].into();
    (0..count).map(|_| Append { event: Arc::new(event("1")), subscriptions: Arc::clone(&subscriptions) }).collect()
}

async fn claim(provider: &NatsProvider, room: usize) -> Vec<Lease> {
    let want = Want { subscription: "s".into(), room, ordering: Turn::None };
    let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(30), wants: vec![want] };
    provider.claim(&request).await.unwrap().leases
}

fn record(lease: &Lease) -> Attempt {
    rules::lost_attempt(lease.number, "w".into(), crate::event::micros(0), crate::event::micros(0))
}

fn ended(lease: Lease, next: Next) -> Settlement {
    let attempt = Some(record(&lease)).filter(|_| next != Next::Release);
    Settlement { key: lease.key, next, attempt, published: Vec::new(), writes: Vec::new() }
}

/// A state as bytes.
fn image(provider: &NatsProvider) -> Vec<u8> {
    postcard::to_stdvec(&provider.shared.core.lock().capture()).unwrap()
}

async fn messages(provider: &NatsProvider) -> u64 {
    provider.shared.stream_state("count").await.unwrap().messages
}

async fn refusal_of(options: Options) -> String {
    let error = NatsProvider::open(options).await.err().unwrap();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

/// Works as brokers do: some succeed, some fail, some publish, write and log, some are given back.
async fn work(provider: &NatsProvider, seed: u64) {
    use rand::{RngExt as _, SeedableRng as _};
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    for _ in 0..30 {
        provider.append(appends(rng.random_range(1..20))).await.unwrap();
        let mut batch = Vec::new();
        for lease in claim(provider, rng.random_range(1..20)).await {
            let mut settlement = match rng.random_range(0..6) {
                0 => ended(lease, Next::Fail),
                1 => ended(lease, Next::Release),
                2 => ended(lease, Next::Retry { after: Duration::from_millis(1) }),
                _ => ended(lease, Next::Complete),
            };
            if settlement.next == Next::Complete && rng.random_ratio(1, 3) {
                settlement.published = appends(2);
                let attempt = settlement.attempt.as_mut().unwrap();
                let message = "x".repeat(rng.random_range(0..600));
                attempt.trace.log = vec![LogLine { level: 2, message, fields: Vec::new() }];
            }
            batch.push(settlement);
        }
        provider.settle(batch).await.unwrap();
        let value = Bytes::from(rng.random_range(0..9).to_string());
        provider.put_document("c", &rng.random_range(0..9).to_string(), value, Expect::Any, None).await.unwrap();
        if rng.random_ratio(1, 5) {
            provider.amend(Amendment::Redrive(DeadLetterFilter::default())).await.unwrap();
            provider.prune(&Retention { max_age: None, max_events: Some(60) }).await.unwrap();
        }
    }
}

/// What the design stands on: the same entries make the same state, in a process that saw them come, in one that reads them
/// all later, and in one that begins with a snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn every_process_comes_to_the_same_state() {
    let place = Place::new();
    let options = place.options();
    let here = NatsProvider::open(options.clone()).await.unwrap();
    let there = NatsProvider::open(options.clone()).await.unwrap();
    tokio::join!(work(&here, 1), work(&there, 2));
    let late = NatsProvider::open(options.clone()).await.unwrap();
    for provider in [&here, &there] {
        provider.shared.catch_up("compare").await.unwrap();
    }
    assert!(image(&here) == image(&there), "two that saw the entries come");
    assert!(image(&here) == image(&late), "one that read them later");
    here.shared.save().await.unwrap();
    let resumed = NatsProvider::open(options).await.unwrap();
    assert!(resumed.shared.core.lock().swept > 0, "it began with a snapshot");
    // What comes after it makes no difference either.
    tokio::join!(work(&resumed, 3), work(&late, 4));
    for provider in [&here, &there, &late, &resumed] {
        provider.shared.catch_up("compare").await.unwrap();
        assert!(image(provider) == image(&here));
    }
}

/// What is behind a snapshot is removed but for what is kept, and nothing is missing to one that comes then.
#[tokio::test]
async fn what_is_of_no_use_goes_with_a_snapshot_and_nothing_else_does() {
    let place = Place::new();
    let provider = place.provider().await;
    let log = |length: usize| vec![LogLine { level: 2, message: "y".repeat(length), fields: Vec::new() }];
    let append = |n: usize| Append { event: Arc::new(event(&format!("{{\"n\":{n}}}"))), ..appends(1).remove(0) };
    provider.append((0..300).map(append).collect()).await.unwrap();
    let ids: Vec<_> = provider.read(0, 300).await.unwrap().events.iter().map(|event| event.id.to_string()).collect();
    for lease in claim(&provider, 300).await {
        let mut settlement = ended(lease, Next::Complete);
        settlement.attempt.as_mut().unwrap().trace.log = log(400);
        provider.settle(vec![settlement]).await.unwrap();
    }
    // 300 events, 300 records, 300 moves that settle them, and those that begin and claim.
    assert_eq!(messages(&provider).await, 902);
    provider.prune(&Retention { max_age: None, max_events: Some(100) }).await.unwrap();
    provider.shared.save().await.unwrap();
    // Of each event its message and its record, the prune, and the note of the sweep.
    assert_eq!(messages(&provider).await, 202);
    let late = place.provider().await;
    let detail = late.get(&ids[250]).await.unwrap().unwrap();
    assert_eq!(detail.record.event.payload.bytes(), "{\"n\":250}");
    assert_eq!(detail.deliveries[0].attempts[0].trace.log, log(400));
    assert!(late.get(&ids[199]).await.unwrap().is_none());
    let page = late.read(200, 1_000).await.unwrap();
    assert_eq!((page.events.len(), page.floor, page.head), (100, 201, 300));
    // An event that is erased is gone from the stream too, and not only from what is shown.
    late.amend(Amendment::Erase { id: ids[250].clone() }).await.unwrap();
    // Its two messages went, and the two moves since.
    assert_eq!(messages(&provider).await, 200);
    assert_eq!(provider.list(&EventFilter::default()).await.unwrap().records.len(), 99);
}

/// Retention comes by every minute, and writes nothing where it has nothing to remove.
#[tokio::test]
async fn retention_without_anything_to_remove_writes_nothing() {
    let place = Place::new();
    let provider = place.provider().await;
    provider.append(appends(4)).await.unwrap();
    let done = claim(&provider, 2).await.into_iter().map(|lease| ended(lease, Next::Complete)).collect();
    provider.settle(done).await.unwrap();
    let hour = Duration::from_secs(3_600);
    let value = || Bytes::from("v");
    provider.put_document("c", "k", value(), Expect::Any, Some(2 * hour)).await.unwrap();
    let prune = async |max_age: Option<Duration>, max_events: Option<u64>| {
        let before = provider.shared.stream_state("look").await.unwrap().last_sequence;
        let pruned = provider.prune(&Retention { max_age, max_events }).await.unwrap();
        (pruned, provider.shared.stream_state("look").await.unwrap().last_sequence - before)
    };
    assert_eq!(prune(None, None).await, (0, 0));
    assert_eq!(prune(Some(hour), Some(4)).await, (0, 0));
    assert_eq!(prune(Some(hour), Some(3)).await, (1, 1));
    place.advance(hour * 3 / 2).await;
    assert_eq!(prune(Some(hour), None).await, (1, 1));
    // What is left is open.
    assert_eq!(prune(Some(hour), Some(0)).await, (0, 0));
    place.advance(hour).await;
    // The document has expired.
    assert_eq!(prune(None, None).await, (0, 1));
    assert_eq!(prune(None, None).await, (0, 0));
    let id = provider.read(0, 1).await.unwrap().events.remove(0).id.to_string();
    provider.amend(Amendment::Erase { id }).await.unwrap();
    assert_eq!(prune(Some(hour), None).await, (0, 1));
    assert_eq!(prune(Some(hour), Some(0)).await, (0, 0));
}

/// An erased event's content is in no message any more, wherever it stands among those that are kept.
#[tokio::test]
async fn what_is_erased_is_in_no_message() {
    let place = Place::new();
    let provider = place.provider().await;
    let secret = Append { event: Arc::new(event("\"secret\"")), ..appends(1).remove(0) };
    let id = secret.event.id.to_string();
    provider.append([appends(3), vec![secret], appends(3)].concat()).await.unwrap();
    assert_eq!(provider.amend(Amendment::Erase { id }).await.unwrap(), 1);
    let last = provider.shared.stream_state("look").await.unwrap().last_sequence;
    let mut met = 0;
    for at in 1..=last {
        if let Some(message) = provider.shared.stored(at).await.unwrap() {
            met += 1;
            assert!(!String::from_utf8_lossy(&message.payload).contains("secret"), "{at}");
        }
    }
    assert!(met >= 6);
    assert_eq!(place.provider().await.read(0, 9).await.unwrap().events.len(), 6);
}

/// Larger than a message may be: as several, whole or not at all.
#[tokio::test]
async fn an_event_and_a_record_larger_than_a_message_are_several() {
    let place = Place::new();
    let provider = place.provider().await;
    let mut large = event(&format!("\"{}\"", "z".repeat((1 << 20) - 2)));
    large.metadata.insert("m".into(), "w".repeat(300_000).into());
    let id = large.id.to_string();
    let published = Append { event: Arc::new(event(&format!("\"{}\"", "v".repeat(2 << 20)))), ..appends(1).remove(0) };
    provider.append(vec![Append { event: Arc::new(large.clone()), ..appends(1).remove(0) }]).await.unwrap();
    let mut settlement = ended(claim(&provider, 1).await.remove(0), Next::Complete);
    let log = vec![LogLine { level: 2, message: "u".repeat(3 << 20), fields: Vec::new() }];
    settlement.attempt.as_mut().unwrap().trace.log.clone_from(&log);
    settlement.published = vec![published.clone()];
    assert_eq!(provider.settle(vec![settlement]).await.unwrap(), [Settled::Done { finished: Some(Status::Completed) }]);
    provider.shared.save().await.unwrap();
    for provider in [provider, place.provider().await] {
        let detail = provider.get(&id).await.unwrap().unwrap();
        assert_eq!(detail.record.event.payload, large.payload);
        assert_eq!(detail.record.event.metadata, large.metadata);
        assert_eq!(detail.deliveries[0].attempts[0].trace.log, log);
        let leased = provider.read(1, 1).await.unwrap().events.remove(0);
        assert_eq!(leased.payload, published.event.payload);
    }
}

/// Of an entry whose rest never came nothing takes effect, and its messages go.
#[tokio::test]
async fn an_entry_that_is_not_whole_is_void() {
    let place = Place::new();
    let provider = place.provider().await;
    let mut pieces: Vec<_> = appends(3).iter().map(entry::event_piece).collect();
    let part = entry::Part { entry: (7, 7), at: 0, of: 3, kind: entry::Kind::Event, until: i64::MAX, time: None };
    let send = async |at: u32, until: i64, piece: entry::Piece| {
        let mut headers = piece.headers;
        headers.insert(entry::PART, entry::Part { at, until, ..part }.write());
        let subject = format!("{}{}", provider.shared.link.names.prefix, piece.subject);
        provider.shared.link.publish("send", subject, headers, piece.body).await.unwrap();
    };
    send(0, i64::MAX, pieces.remove(0)).await;
    send(2, i64::MAX, pieces.remove(0)).await;
    send(0, 5, pieces.remove(0)).await;
    provider.append(appends(1)).await.unwrap();
    let page = provider.read(0, 9).await.unwrap();
    assert_eq!((page.head, page.events.len()), (1, 1));
    provider.shared.save().await.unwrap();
    assert_eq!(messages(&provider).await, 2, "the event, and the note of the sweep");
}

/// Native clients follow the subjects: the payload is the body, and the headers are those of the original broker.
#[tokio::test]
async fn other_clients_follow_the_events_by_their_subjects() {
    let place = Place::new();
    let provider = place.provider().await;
    let link = &provider.shared.link;
    let mut others = link.client.subscribe(format!("{}events.chat.*", link.names.prefix)).await.unwrap();
    let chat = Event { event_type: "chat.message".parse().unwrap(), ..event("{\"text\":\"hi\"}") };
    let id = chat.id.to_string();
    provider.append(vec![Append { event: Arc::new(chat), subscriptions: Arc::default() }]).await.unwrap();
    let message = others.next().await.unwrap();
    assert_eq!(
        (&*message.subject, &*message.payload),
        (&*format!("{}events.chat.message", link.names.prefix), &b"{\"text\":\"hi\"}"[..])
    );
    let headers = message.headers.unwrap();
    let header = |name: &str| headers.get(name).unwrap().as_str().to_owned();
    assert_eq!(
        ["Event-ID", "Event-Type", "Event-Source", "Instance-ID"].map(header),
        [id, "chat.message".to_owned(), "system".to_owned(), "here".to_owned()]
    );
}

/// FACTS: "limits with discard-old delete unread": a full stream refuses, ends what it has, and takes in again.
#[tokio::test]
async fn a_full_stream_refuses_events_and_still_finishes_them() {
    let place = Place::new();
    let options = Options { max_bytes: Some(ByteSize::kib(512)), ..place.options() };
    let provider = NatsProvider::open(options).await.unwrap();
    let mut stored = 0;
    let refused = loop {
        let append = Append { event: Arc::new(event(&format!("\"{}\"", "t".repeat(4_000)))), ..appends(1).remove(0) };
        match provider.append(vec![append]).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        provider.stats().await.unwrap();
    };
    assert!(matches!(refused, Error::Overloaded { .. }), "{refused}");
    assert!(refused.to_string().contains("is full"), "{refused}");
    assert!(provider.examine().await.unwrap().iter().any(|finding| finding.severity == Severity::Problem));
    let leases = claim(&provider, 1_000).await;
    assert_eq!(leases.len(), stored);
    let batch: Vec<_> = leases.into_iter().map(|lease| ended(lease, Next::Complete)).collect();
    assert!(provider.settle(batch).await.unwrap().iter().all(|settled| *settled != Settled::Stale));
    assert_eq!(provider.prune(&Retention { max_age: None, max_events: Some(0) }).await.unwrap(), stored as u64);
    provider.shared.save().await.unwrap();
    provider.stats().await.unwrap();
    provider.append(appends(1)).await.unwrap();
}

/// DESIGN §2, invariant 1, where the server's own process is killed.
#[tokio::test]
async fn a_killed_nats_has_lost_nothing_that_was_acknowledged() {
    let mut server = NatsServer::start(&[]);
    let options = Options { response_timeout: Duration::from_secs(3), ..Place::on(&server).options() };
    let provider = Arc::new(NatsProvider::open(options.clone()).await.unwrap());
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
    let leased = claim(&provider, 99_999).await;
    let stored: BTreeSet<String> = leased.iter().map(|lease| lease.event.id.to_string()).collect();
    assert!(acknowledged.is_subset(&stored), "{} of {}", stored.len(), acknowledged.len());
    let page = provider.read(0, 1).await.unwrap();
    assert_eq!(page.head, stored.len() as u64, "seqs are dense, and what was not acknowledged is whole or absent");
    let late = NatsProvider::open(options).await.unwrap();
    provider.shared.catch_up("compare").await.unwrap();
    assert!(image(&late) == image(&provider));
}

/// What was on its way when the connection broke is known as soon as the stream is followed again: nobody waits for an answer
/// that will not come, however long he would.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_broken_connection_held_is_known_once_it_is_made_anew() {
    let mut server = NatsServer::start(&[]);
    let options = Options { response_timeout: Duration::from_secs(600), ..Place::on(&server).options() };
    let provider = Arc::new(NatsProvider::open(options).await.unwrap());
    let enough = Arc::new(AtomicBool::new(false));
    let publishers: Vec<_> = (0..8)
        .map(|_| {
            let (provider, enough) = (Arc::clone(&provider), Arc::clone(&enough));
            tokio::spawn(async move {
                let (mut acknowledged, mut refused) = (Vec::new(), 0);
                while !enough.load(Ordering::Relaxed) {
                    let batch = appends(3);
                    let ids: Vec<_> = batch.iter().map(|append| append.event.id.to_string()).collect();
                    match provider.append(batch).await {
                        Ok(_) => acknowledged.extend(ids),
                        // While there is no connection calls fail at once.
                        Err(_) => {
                            refused += 1;
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                }
                (acknowledged, refused)
            })
        })
        .collect();
    let total = async || provider.stats().await.map_or(0, |stats| stats.total_events);
    let (until, mut goal) = (std::time::Instant::now() + Duration::from_secs(60), 0);
    for _ in 0..4 {
        goal += 150;
        while total().await < goal {
            assert!(std::time::Instant::now() < until, "nothing is appended");
        }
        server.kill();
        server.restart();
    }
    goal += 150;
    while total().await < goal {
        assert!(std::time::Instant::now() < until, "nothing is appended");
    }
    enough.store(true, Ordering::Relaxed);
    let (mut acknowledged, mut refusals) = (BTreeSet::new(), 0);
    for publisher in publishers {
        let ended = tokio::time::timeout(Duration::from_secs(60), publisher);
        let (ids, refused) = ended.await.expect("somebody waits for ever").unwrap();
        acknowledged.extend(ids);
        refusals += refused;
    }
    assert!(refusals > 0, "no blow fell on anything");
    let stored: BTreeSet<String> =
        claim(&provider, 99_999).await.iter().map(|lease| lease.event.id.to_string()).collect();
    assert!(acknowledged.is_subset(&stored), "{} of {}", stored.len(), acknowledged.len());
}

#[tokio::test]
async fn urls_and_logins_that_cannot_be_used_are_refused_by_name() {
    let server = NatsServer::start(&["--user", "app", "--pass", "p@ss"]);
    let at = |address: &str| Options { url: address.to_owned(), ..Options::default() };
    for (url, words) in [
        ("nats://127.0.0.1:1", "nats://127.0.0.1:1"),
        ("nats://", "must be nats://"),
        ("nats://h/x", "must be nats://"),
        ("nats://secret@h", "nats.token"),
        ("nats://h?namespce=x", "did you mean namespace?"),
        ("nats://h?namespace=a.b", "nats.namespace"),
    ] {
        let words_of = refusal_of(at(url)).await;
        assert!(words_of.contains(words) && !words_of.contains("secret"), "{url}: {words_of}");
    }
    let refused = refusal_of(at(&server.url())).await;
    assert!(refused.contains("nats.username"), "{refused}");
    let port = server.port;
    NatsProvider::open(at(&format!("nats://app:p%40ss@127.0.0.1:{port}"))).await.unwrap();
    let (username, password) = (Some("app".to_owned()), Some("p@ss".to_owned()));
    NatsProvider::open(Options { username, password, ..at(&server.url()) }).await.unwrap();
    let replicas = refusal_of(Options { replicas: 6, ..at(&server.url()) }).await;
    assert!(replicas.contains("nats.replicas"), "{replicas}");
    let guarded = NatsServer::start(&["--auth", "t0ken"]);
    NatsProvider::open(Options { token: Some("t0ken".to_owned()), ..at(&guarded.url()) }).await.unwrap();
}

/// A stream that somebody else made, and one that a newer version wrote.
#[tokio::test]
async fn streams_that_would_lose_events_or_are_of_another_format_are_refused() {
    let place = Place::new();
    let options = Options { url: shared().url(), namespace: "made-elsewhere".to_owned(), ..Options::default() };
    let context = async_nats::jetstream::new(async_nats::connect(shared().url()).await.unwrap());
    let config = async_nats::jetstream::stream::Config {
        name: "tidegate-made-elsewhere".to_owned(),
        subjects: vec!["tidegate.made-elsewhere.>".to_owned()],
        max_messages: 10,
        ..Default::default()
    };
    context.create_stream(config).await.unwrap();
    assert!(refusal_of(options).await.contains("drop what nobody has read"));
    let provider = place.provider().await;
    let after = provider.shared.stream_state("look").await.unwrap().last_sequence;
    let newer = Move::Begin { epoch: "e".to_owned(), format: 9, after };
    provider.shared.announce(&newer).await.unwrap();
    let refused = refusal_of(place.options()).await;
    assert!(refused.contains("newer version"), "{refused}");
    while !matches!(provider.append(appends(1)).await, Err(Error::Incompatible { .. })) {}
}

#[tokio::test]
async fn durability_is_what_the_storage_means_unless_it_is_said() {
    let of = async |options: Options| NatsProvider::open(options).await.unwrap().capabilities().durability;
    let place = Place::new();
    let options = place.options();
    assert_eq!(of(options.clone()).await, Durability::Os);
    assert_eq!(of(Options { durability: Some(Durability::Storage), ..options }).await, Durability::Storage);
    let memory = Options { storage: Storage::Memory, ..Place::new().options() };
    assert_eq!(of(memory).await, Durability::Process);
}

/// Processes of different versions read each other's entries and snapshots: another layout is another format, and has its own
/// number.
#[test]
fn the_layout_of_entries_and_snapshots_is_that_of_format_1() {
    use sha2::Digest as _;

    let at = |number: u64| (number as i64) * 1_000_000_000;
    let mut core = Core::new(0);
    let mut count = 0;
    let mut entries = Vec::new();
    let mut apply = |pieces: Vec<entry::Piece>| {
        let of = pieces.len() as u32;
        for (place, piece) in pieces.into_iter().enumerate() {
            count += 1;
            let entry = (1, count - place as u64);
            let part = entry::Part { entry, at: place as u32, of, kind: piece.kind, until: i64::MAX, time: None };
            entries.extend_from_slice(part.write().as_bytes());
            entries.extend_from_slice(&piece.body);
            let facts = entry::Facts::read(&piece.headers);
            let message = core::Incoming { at: count, stamp: at(count), part: Some(part), facts, body: piece.body };
            core.apply(message);
        }
    };
    apply(vec![Move::Begin { epoch: "e".to_owned(), format: core::FORMAT, after: 0 }.piece()]);
    let mut fixed = event("{\"a\":1}");
    fixed.id = "order-1".parse().unwrap();
    fixed.created_at = crate::event::micros(5);
    fixed.metadata.insert("m".to_owned(), 1.into());
    let append = |id: &str| {
        let event = Event { id: id.parse().unwrap(), ..fixed.clone() };
        Append { event: Arc::new(event), subscriptions: [Arc::from("s"), Arc::from("t")].into() }
    };
    apply(["order-1", "order-2", "order-3"].map(|id| entry::event_piece(&append(id))).into());
    let want = |name: &str| Want { subscription: name.into(), room: 2, ordering: Turn::Key };
    let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(9), wants: vec![want("s")] };
    apply(vec![Move::claim(&request, 7).piece()]);
    // SplitMix64 of 7: the tokens that every version gives.
    let tokens = [7_191_089_600_892_374_487, 309_689_372_594_955_804];
    let key = |seq: u64| LeaseKey { seq, subscription: "s".into(), token: tokens[seq as usize - 1] };
    let settlement = |seq: u64, next: Next| {
        let attempt = rules::lost_attempt(1, "w".into(), crate::event::micros(0), crate::event::micros(9));
        Settlement { key: key(seq), next, attempt: Some(attempt), published: Vec::new(), writes: Vec::new() }
    };
    let mut success = settlement(1, Next::Complete);
    success.published = vec![append("order-4")];
    let (mut pieces, last) = Move::settle(vec![success, settlement(2, Next::Retry { after: Duration::from_secs(1) })]);
    pieces.push(last.piece());
    apply(pieces);
    apply(vec![Move::document("c", "k", Some("v".into()), Expect::Absent, Some(Duration::from_secs(60))).piece()]);
    apply(vec![Move::amend(Amendment::Erase { id: "order-3".to_owned() }).piece()]);
    assert_eq!((core.state.log.events.pending, core.state.log.events.processing, core.state.log.head), (1, 2, 4));
    let digest =
        |bytes: &[u8]| sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let snapshot = postcard::to_stdvec(&core.capture()).unwrap();
    let known = [
        "efef71aa1239bd14a7b62e4435ebb3dd3b88a69c1fcc8772f4b79c29a2299fb1",
        "840c673e6df5c8628526d89d1a0430ef4af0dc0131228c189b6e652b1f755e45",
    ];
    assert_eq!([digest(&entries), digest(&snapshot)], known);
}
