//! `GET /v1/stream` and `tidegate tail`, as clients meet them.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::server::{Server, free_port};
use crate::support::stream::Stream;
use crate::support::wire;

async fn in_memory(config: &str) -> (tempfile::TempDir, Server) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    std::fs::write(&path, config).unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:", "--config", path.to_str().unwrap()]).await;
    (folder, server)
}

async fn publish(server: &Server, body: Value) -> Value {
    let answer = wire::post(&server.url, "/v1/events", body.to_string()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    answer.json()
}

async fn publish_many(server: &Server, count: usize) {
    let batch: Vec<Value> = (0..count).map(|n| json!({"type": "shop.orders.create", "payload": {"n": n}})).collect();
    publish(server, batch.into()).await;
}

/// A figure of `/metrics`.
async fn figure(url: &str, name: &str) -> u64 {
    let text = wire::get(url, "/metrics").await.text;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
}

async fn until_figure(url: &str, name: &str, wanted: u64) {
    for _ in 0..600 {
        if figure(url, name).await == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{name} never became {wanted}");
}

/// BEHAVIOURS I12.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_replays_and_goes_on_live() {
    let (_folder, server) = in_memory("").await;
    publish_many(&server, 3).await;
    let mut stream = Stream::open(&server.url, "?since=1", &[]).await;
    let first = stream.block().await.unwrap();
    assert_eq!((first.id, first.retry, &first.data), (Some(1), Some(1_000), &None), "where it begins, at once");
    let frame = stream.frame().await;
    let shown = wire::get(&server.url, &format!("/v1/events/{}", frame.json()["id"].as_str().unwrap())).await.json();
    for (name, value) in frame.json().as_object().unwrap() {
        assert_eq!(Some(value), shown.get(name), "{name}");
    }
    assert_eq!((frame.id, frame.json()["seq"].as_u64(), frame.name.as_str()), (Some(2), Some(2), ""));
    assert_eq!((&frame.json()["payload"], frame.json().get("status")), (&json!({"n": 1}), None));
    assert_eq!(stream.ids(1).await, [3]);
    publish_many(&server, 2).await;
    assert_eq!(stream.ids(2).await, [4, 5]);
    assert_eq!(stream.header("cache-control"), "no-store");
    assert!(!stream.header("tidegate-epoch").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_event_id_wins_over_since() {
    let (_folder, server) = in_memory("").await;
    publish_many(&server, 5).await;
    let mut stream = Stream::open(&server.url, "?since=1", &[("last-event-id", "3")]).await;
    assert_eq!(stream.ids(2).await, [4, 5]);
    let mut stream = Stream::open(&server.url, "?since=beginning", &[("last-event-id", "")]).await;
    assert_eq!(stream.ids(5).await, [1, 2, 3, 4, 5]);
    let mut latest = Stream::open(&server.url, "", &[]).await;
    assert_eq!(latest.block().await.unwrap().id, Some(5), "a client that is told nothing yet knows where to come back");
    publish_many(&server, 1).await;
    assert_eq!(latest.ids(1).await, [6]);
}

/// BEHAVIOURS I11.
#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_served_is_answered_with_one_reset() {
    let (_folder, server) = in_memory("[memory]\nmax_events = 10\n").await;
    publish_many(&server, 30).await;
    for (query, headers) in [("?since=0", vec![]), ("?since=99", vec![]), ("?since=25", vec![("last-event-id", "3")])] {
        let mut stream = Stream::open(&server.url, query, &headers).await;
        let reset = stream.frame().await;
        assert_eq!(reset.data.as_deref(), Some(r#"{"type":"feed_reset","from_seq":31}"#), "{query}");
        assert_eq!((reset.name.as_str(), reset.id), ("reset", Some(30)));
        // Who comes back to the place that a reset gave is not reset again.
        let mut again = Stream::open(&server.url, "", &[("last-event-id", "30")]).await;
        assert_eq!(again.block().await.unwrap().id, Some(30));
    }
    let mut old = Stream::open(&server.url, "?since=25&epoch=of-another-log", &[]).await;
    assert_eq!(old.frame().await.name, "reset");
    let epoch = old.header("tidegate-epoch");
    let mut same = Stream::open(&server.url, &format!("?since=25&epoch={epoch}"), &[]).await;
    assert_eq!(same.ids(5).await, [26, 27, 28, 29, 30]);
    let mut all = Stream::open(&server.url, "?since=beginning", &[]).await;
    assert_eq!(all.ids(10).await, (21..=30).collect::<Vec<_>>());
    publish_many(&server, 1).await;
    assert_eq!((old.ids(1).await, same.ids(1).await, all.ids(1).await), (vec![31], vec![31], vec![31]));
    assert_eq!(figure(&server.url, "tidegate_feed_resets_total").await, 4);
}

/// A payload is kept byte for byte, line breaks and all; a stream must not take them for its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_payload_with_line_breaks_stays_one_frame() {
    let (_folder, server) = in_memory("").await;
    let mut stream = Stream::open(&server.url, "", &[]).await;
    let payloads = ["{\n\"a\": 1.50,\r\n\r\n\"data\": \"id: 7\\n\\nevent: x\"\n}", "\"größe \u{2028}\"", "[\r1\r]"];
    for payload in payloads {
        wire::post(&server.url, "/v1/events", format!("{{\"type\":\"a\",\"payload\":{payload}}}")).await;
        let frame = stream.frame().await;
        assert_eq!(frame.json()["payload"], serde_json::from_str::<Value>(payload).unwrap());
        assert!(frame.data.unwrap().contains("1.50") || !payload.contains("1.50"));
    }
    wire::post(&server.url, "/v1/events", r#"{"type":"a","payload_base64":"AP8=","content_type":"image/png"}"#).await;
    assert_eq!(stream.frame().await.json()["payload_base64"], "AP8=");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_shows_what_is_asked_for() {
    let (_folder, server) = in_memory("").await;
    let query = "?since=beginning&pattern=shop.*.create&pattern=chat.**&source=frontend&user_id=7";
    let mut stream = Stream::open(&server.url, query, &[]).await;
    let rows = [
        (json!({"type": "shop.orders.create", "source": "frontend", "user_id": 7}), true),
        (json!({"type": "shop.orders.create", "source": "frontend", "user_id": "7"}), false),
        (json!({"type": "shop.orders.create", "source": "frontend"}), false),
        (json!({"type": "shop.orders.create", "source": "system", "user_id": 7}), false),
        (json!({"type": "shop.orders.update", "source": "frontend", "user_id": 7}), false),
        (json!({"type": "chat.room.message", "source": "frontend", "user_id": 7}), true),
    ];
    let mut expected = Vec::new();
    for (event, is_meant) in rows {
        let seq = publish(&server, event).await["seq"].as_u64().unwrap();
        expected.extend(is_meant.then_some(seq));
    }
    assert_eq!(stream.ids(2).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_question_to_the_stream_is_refused_by_name() {
    let (_folder, server) = in_memory("").await;
    type Row = (&'static str, &'static [(&'static str, &'static str)], u16, &'static str, &'static str);
    let rows: [Row; 13] = [
        ("?since=yesterday", &[], 422, "since", "yesterday"),
        ("?since=-1", &[], 422, "since", "-1"),
        ("?since=18446744073709551616", &[], 422, "since", "18446744073709551616"),
        ("?pattern=a..b", &[], 422, "pattern", "a..b"),
        ("?pattern=a&pattern=b[", &[], 422, "pattern", "b["),
        ("?source=mars", &[], 422, "source", "mars"),
        ("", &[("last-event-id", "x")], 422, "Last-Event-ID", "x"),
        ("", &[("last-event-id", "latest")], 422, "Last-Event-ID", "latest"),
        ("?since=last-acknowledged", &[], 422, "since", "last-acknowledged"),
        ("?since=1&consumer=a", &[], 422, "consumer", "a"),
        ("?consumer=", &[], 422, "consumer", ""),
        ("?patern=a", &[], 400, "patern", "a"),
        ("?since=1&since=2", &[], 400, "since", "2"),
    ];
    for (query, headers, status, field, value) in rows {
        let answer = wire::send(&server.url, "GET", &format!("/v1/stream{query}"), headers, "").await;
        let problem = answer.json();
        assert_eq!((answer.status, answer.content_type.as_str()), (status, "application/problem+json"), "{query}");
        assert_eq!((&problem["field"], &problem["value"]), (&json!(field), &json!(value)), "{problem}");
    }
    assert_eq!(figure(&server.url, "tidegate_feed_clients").await, 0);
    let posted = wire::send(&server.url, "POST", "/v1/stream", &[], "").await;
    assert_eq!(posted.status, 405);
}

/// BEHAVIOURS J10: who goes unregisters itself; who does not fit is told.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_counted_bounded_and_given_up_when_their_client_goes() {
    let (_folder, server) = in_memory("[http]\nmax_streams = 2\n").await;
    let first = Stream::open(&server.url, "", &[]).await;
    let mut second = Stream::open(&server.url, "", &[]).await;
    until_figure(&server.url, "tidegate_feed_clients", 2).await;
    let refused = wire::get(&server.url, "/v1/stream").await;
    assert_eq!((refused.status, &refused.json()["code"]), (503, &json!("overloaded")), "{}", refused.text);
    assert!(refused.text.contains("2 streams are open"), "{}", refused.text);
    assert_eq!(wire::get(&server.url, "/v1/events").await.status, 200, "streams keep no request out");
    drop(first);
    until_figure(&server.url, "tidegate_feed_clients", 1).await;
    let mut third = Stream::open(&server.url, "", &[]).await;
    publish_many(&server, 1).await;
    assert_eq!((second.ids(1).await, third.ids(1).await), (vec![1], vec![1]));
}

/// BEHAVIOURS G8, G9.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_keeps_its_place_with_the_server() {
    let (_folder, server) = in_memory("").await;
    publish_many(&server, 5).await;
    let put = async |path: &str, body: &str| wire::post(&server.url, &format!("/v1/consumers/{path}"), body).await;
    assert_eq!(wire::get(&server.url, "/v1/consumers/reports").await.status, 404);
    assert_eq!(Stream::open(&server.url, "?consumer=reports", &[]).await.ids(5).await, [1, 2, 3, 4, 5]);
    assert_eq!(put("reports/ack", r#"{"seq":3}"#).await.json(), json!({"name": "reports", "seq": 3}));
    assert_eq!(put("reports/ack", r#"{"seq":2}"#).await.json(), json!({"name": "reports", "seq": 3}));
    let query = "?since=last-acknowledged&consumer=reports";
    assert_eq!(Stream::open(&server.url, query, &[]).await.ids(2).await, [4, 5]);
    assert_eq!(Stream::open(&server.url, query, &[("last-event-id", "4")]).await.ids(1).await, [5]);
    assert_eq!(put("reports/seek", r#"{"seq":1}"#).await.json(), json!({"name": "reports", "seq": 1}));
    assert_eq!(wire::get(&server.url, "/v1/consumers/reports").await.json(), json!({"name": "reports", "seq": 1}));
    let rows = [
        ("reports/ack", r#"{"seq":6}"#, "seq: is beyond the head of the log, 5"),
        ("reports/ack", r#"{"seq":-1}"#, "seq: must be a seq"),
        ("reports/seek", "{}", "seq: is required"),
        ("reports/seek", r#"{"sqe":1}"#, "did you mean seq?"),
    ];
    for (path, body, words) in rows {
        let refused = put(path, body).await;
        assert!(refused.status == 422 && refused.text.contains(words), "{body}: {}", refused.text);
    }
}

/// A token that may publish may not follow.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_needs_the_scope_read() {
    use sha2::Digest as _;
    let digest =
        |token: &str| -> String { sha2::Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect() };
    let token = |name: &str, scope: &str| {
        format!("[[http.tokens]]\nname = \"{name}\"\nsha256 = \"{}\"\nscopes = [\"{scope}\"]\n", digest(name))
    };
    let (_folder, server) = in_memory(&(token("writer", "publish") + &token("reader", "read"))).await;
    for (headers, status) in [(vec![], 401), (vec![("authorization", "Bearer writer")], 403)] {
        assert_eq!(wire::send(&server.url, "GET", "/v1/stream", &headers, "").await.status, status);
    }
    let mut stream = Stream::open(&server.url, "", &[("authorization", "Bearer reader")]).await;
    assert_eq!(stream.block().await.unwrap().id, Some(0));
}

/// Open streams do not hold a stop: they end at once, not with the drain.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_open_streams_at_once() {
    let (_folder, mut server) = in_memory("[http]\ndrain = \"1h\"\n[broker]\ngrace = \"1h\"\n").await;
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(Stream::open(&server.url, "", &[]).await);
    }
    publish_many(&server, 1).await;
    let stopped = tokio::task::spawn_blocking(move || server.stop());
    for stream in &mut streams {
        assert_eq!(stream.ids(1).await, [1]);
        assert_eq!(stream.block().await, None);
    }
    assert!(stopped.await.unwrap().success());
}

/// A client that reads nothing holds no memory and loses nothing: it finds the rest in the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_for_long_misses_nothing() {
    let (_folder, server) = in_memory("").await;
    let mut slow = Stream::open(&server.url, "", &[]).await;
    let mut quick = Stream::open(&server.url, "", &[]).await;
    let large = "x".repeat(16 << 10);
    for _ in 0..20 {
        let batch: Vec<Value> = (0..250).map(|_| json!({"type": "a", "payload": large})).collect();
        publish(&server, batch.into()).await;
        quick.ids(250).await;
    }
    assert_eq!(slow.ids(5_000).await, (1..=5_000).collect::<Vec<_>>());
    assert_eq!(figure(&server.url, "tidegate_feed_lagged_total").await, 1);
    assert_eq!(figure(&server.url, "tidegate_feed_resets_total").await, 0);
}

/// DESIGN §3.
#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_event_is_streamed_and_not_kept() {
    let (_folder, server) = in_memory("").await;
    let mut stream = Stream::open(&server.url, "?pattern=chat.*", &[]).await;
    let answer = publish(&server, json!({"id": "t-1", "type": "chat.typing", "ephemeral": true})).await;
    assert_eq!(answer, json!({"id": "t-1", "seq": null, "status": "completed", "duplicate": false}));
    let frame = stream.frame().await;
    assert_eq!((frame.id, &frame.json()["ephemeral"], &frame.json()["id"]), (None, &json!(true), &json!("t-1")));
    assert_eq!(wire::get(&server.url, "/v1/events/t-1").await.status, 404);
    publish(&server, json!({"type": "chat.message"})).await;
    assert_eq!(stream.ids(1).await, [1]);
    let waited = wire::post(&server.url, "/v1/events?wait=1s", r#"{"type":"a","ephemeral":true}"#).await;
    assert_eq!(waited.status, 400, "{}", waited.text);
}

/// DESIGN §2, invariant 9, between two processes on one file.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_server_takes_in_the_clients_of_another_see_once_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    let here = Server::start(folder.path(), &["--provider", &provider]).await;
    let there = Server::start(folder.path(), &["--provider", &provider]).await;
    let mut clients = [Stream::open(&here.url, "", &[]).await, Stream::open(&there.url, "", &[]).await];
    let publishing = async {
        for _ in 0..10 {
            publish_many(&here, 10).await;
            publish_many(&there, 10).await;
        }
    };
    let [a, b] = &mut clients;
    let ((), a, b) = tokio::join!(publishing, a.ids(200), b.ids(200));
    assert_eq!((&a, &b), (&(1..=200).collect(), &(1..=200).collect()));
    let mut elsewhere = Stream::open(&there.url, "", &[("last-event-id", "150")]).await;
    assert_eq!(elsewhere.ids(50).await, (151..=200).collect::<Vec<_>>());
}

/// A running `tidegate tail`.
struct Tail {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Tail {
    fn start(url: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .arg("tail")
            .args(arguments)
            .args(["--url", url])
            .env_remove("TIDEGATE_TOKEN")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }

    /// How it ended, and what it said about trouble.
    fn ended(mut self) -> (Option<i32>, String) {
        let mut told = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        (self.child.wait().unwrap().code(), told)
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// BEHAVIOURS I12: a client that reconnects goes on where it was, over a restart of the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_tail_goes_on_over_a_restart_of_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    let listen = format!("127.0.0.1:{}", free_port());
    let arguments = ["--provider", &provider];
    let mut server = Server::spawn_on(&listen, folder.path(), &arguments);
    server.ready().await;
    publish_many(&server, 2).await;
    let mut tail = Tail::start(&server.url, &["shop.**", "--since", "0", "--json", "--limit", "6"]);
    let mut seqs = Vec::new();
    let mut take = |count: usize, tail: &mut Tail| {
        for _ in 0..count {
            seqs.push(serde_json::from_str::<Value>(&tail.line()).unwrap()["seq"].as_u64().unwrap());
        }
    };
    take(2, &mut tail);
    assert!(server.stop().success());
    let mut server = Server::spawn_on(&listen, folder.path(), &arguments);
    server.ready().await;
    publish_many(&server, 2).await;
    take(2, &mut tail);
    server.kill();
    let mut server = Server::spawn_on(&listen, folder.path(), &arguments);
    server.ready().await;
    publish_many(&server, 2).await;
    take(2, &mut tail);
    assert_eq!(seqs, [1, 2, 3, 4, 5, 6]);
    let (exit, told) = tail.ended();
    assert_eq!((exit, told.matches("connecting again").count()), (Some(0), 2), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_shows_lines_says_resets_and_ends_as_it_should() {
    let (_folder, server) = in_memory("[memory]\nmax_events = 2\n").await;
    publish(
        &server,
        json!([{"type": "a"}, {"type": "b", "payload": {"k": "\u{1b}[2J"}}, {"id": "e-3", "type": "c.d"}]),
    )
    .await;
    let mut tail = Tail::start(&server.url, &["--since", "beginning", "--limit", "2"]);
    assert!(tail.line().starts_with("SEQ "));
    let (b, c) = (tail.line(), tail.line());
    assert!(b.starts_with("2 ") && b.contains(r#"{"k":"\u001b[2J"}"#), "{b}");
    assert!(c.starts_with("3 ") && c.contains("c.d") && c.contains("e-3") && c.ends_with("null"), "{c}");
    assert_eq!(tail.ended().0, Some(0));

    let mut reset = Tail::start(&server.url, &["--since", "0", "--limit", "1", "--json"]);
    until_figure(&server.url, "tidegate_feed_resets_total", 1).await;
    publish(&server, json!({"type": "e"})).await;
    assert!(reset.line().contains("\"seq\":4,"));
    let (exit, told) = reset.ended();
    assert_eq!((exit, told.trim()), (Some(0), r#"{"type":"feed_reset","from_seq":4}"#));

    until_figure(&server.url, "tidegate_feed_clients", 0).await;
    let interrupted = Tail::start(&server.url, &[]);
    until_figure(&server.url, "tidegate_feed_clients", 1).await;
    assert!(Command::new("kill").args(["-INT", &interrupted.child.id().to_string()]).status().unwrap().success());
    assert_eq!(interrupted.ended().0, Some(0));
    assert_eq!(Tail::start(&server.url, &["--for", "50ms"]).ended().0, Some(0));
    let rows: [(&str, &[&str], i32, &str); 4] = [
        (&server.url, &["a..b"], 2, "pattern"),
        (&server.url, &["--since", "soon"], 2, "since"),
        (&server.url, &["--for", "soon"], 2, "--for"),
        ("http://127.0.0.1:1", &[], 4, "no tidegate answers"),
    ];
    for (url, arguments, exit, words) in rows {
        let (code, told) = Tail::start(url, arguments).ended();
        assert!(code == Some(exit) && told.contains(words), "{arguments:?}: {code:?} {told}");
    }
}
