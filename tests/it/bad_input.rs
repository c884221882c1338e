//! Whatever is wrong with what comes in, the answer names it, and nothing is stored (DESIGN §2.12).

use std::path::Path;
use std::process::Command;

use crate::support::server::Server;
use crate::support::wire::{self, Reply};

/// A request, the status and code it gets, and words that its detail holds.
struct Case {
    method: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
    status: u16,
    code: &'static str,
    words: &'static str,
}

/// JSON to `POST /v1/events`, refused with 422.
fn invalid(body: impl Into<Vec<u8>>, words: &'static str) -> Case {
    json(body, 422, "invalid", words)
}

/// JSON to `POST /v1/events`.
fn json(body: impl Into<Vec<u8>>, status: u16, code: &'static str, words: &'static str) -> Case {
    post("/v1/events", "application/json", body, status, code, words)
}

/// A body of any type to any path.
fn post(
    path: &'static str,
    content_type: &'static str,
    body: impl Into<Vec<u8>>,
    status: u16,
    code: &'static str,
    words: &'static str,
) -> Case {
    let headers = vec![("content-type", content_type)];
    Case { method: "POST", path, headers, body: body.into(), status, code, words }
}

/// A request without a body.
fn bare(method: &'static str, path: &'static str, status: u16, code: &'static str, words: &'static str) -> Case {
    Case { method, path, headers: Vec::new(), body: Vec::new(), status, code, words }
}

fn texts() -> Vec<Case> {
    let malformed = |body: &[u8], words| json(body, 400, "malformed", words);
    vec![
        malformed(b"", "body is empty"),
        malformed(b"   \n", "body is empty"),
        malformed(b"{", "line 1"),
        malformed(b"{\"type\":\"a\",}", "line 1 column"),
        malformed(b"{'type':'a'}", "not JSON"),
        malformed(b"{\"type\":\"a\"} {\"type\":\"b\"}", "trailing"),
        malformed(b"{\"type\":\"a\",\"payload\":01}", "not JSON"),
        malformed(b"{\"type\":\"a\",\"payload\":NaN}", "not JSON"),
        malformed(b"{\"type\":\"a\",\"payload\":\"\xff\"}", "not UTF-8 from byte 23"),
        malformed(b"\xef\xbb\xbf{\"type\":\"a\"}", "not JSON"),
        malformed("[".repeat(200_000).as_bytes(), "not JSON"),
        invalid("null", "must be a JSON object"),
        invalid("\"a\"", "must be a JSON object"),
        invalid("{\"type\":\"a\",\"type\":\"b\"}", "type: is given twice"),
        invalid("{\"tpye\":\"a\"}", "tpye: is not a field that may be given; did you mean type?"),
    ]
}

fn fields() -> Vec<Case> {
    vec![
        invalid("{}", "event type is required"),
        invalid("{\"type\":null}", "event type is required"),
        invalid("{\"type\":7}", "type: must be a string"),
        invalid("{\"type\":\"a b\"}", "type: segments may hold"),
        invalid("{\"type\":\"a..b\"}", "type: a segment cannot be empty"),
        invalid("{\"type\":\"größe\"}", "type: segments may hold"),
        invalid("{\"type\":\"a.*\"}", "type: segments may hold"),
        invalid(format!("{{\"type\":\"{}\"}}", ["a"; 17].join(".")), "type: must have at most 16 segments"),
        invalid(format!("{{\"type\":\"{}\"}}", "a".repeat(256)), "type: must be at most 255 bytes"),
        invalid("{\"type\":\"a\",\"id\":\"\"}", "event ID is required"),
        invalid("{\"type\":\"a\",\"id\":\"x\\u0000y\"}", "id: must hold printable characters"),
        invalid(format!("{{\"type\":\"a\",\"id\":\"{}\"}}", "i".repeat(256)), "id: must be at most 255"),
        invalid("{\"type\":\"a\",\"id\":17}", "id: must be a string"),
        invalid("{\"type\":\"a\",\"source\":\"mars\"}", "source: must be one of database, websocket"),
        invalid("{\"type\":\"a\",\"user_id\":1.5}", "user_id: must be a 64-bit integer or a string"),
        invalid("{\"type\":\"a\",\"user_id\":99999999999999999999}", "user_id: must be a 64-bit integer"),
        invalid("{\"type\":\"a\",\"key\":[]}", "key: must be a string"),
        invalid("{\"type\":\"a\",\"session_id\":\"a\\nb\"}", "session_id: must hold printable"),
        invalid("{\"type\":\"a\",\"instance_id\":\"\"}", "instance ID is required"),
        invalid("{\"type\":\"a\",\"metadata\":[1]}", "metadata: must be a JSON object"),
        invalid("{\"type\":\"a\",\"metadata\":{\"n\":1e400}}", "metadata: must be a JSON object: number out of range"),
        invalid("{\"type\":\"a\",\"trace_parent\":\"00-1-2-3\"}", "trace_parent: must be a W3C traceparent"),
        invalid("{\"type\":\"a\",\"ephemeral\":1}", "ephemeral: must be true or false"),
        invalid("{\"type\":\"a\",\"status\":\"completed\"}", "status: is set by tidegate"),
        invalid("{\"type\":\"a\",\"seq\":1}", "seq: is set by tidegate"),
        invalid("{\"type\":\"a\",\"created_at\":\"2026-01-31T12:00:00Z\"}", "created_at: is set by tidegate"),
        invalid("{\"type\":\"a\",\"payload\":1,\"payload_base64\":\"AA==\"}", "cannot be given beside payload"),
        invalid("{\"type\":\"a\",\"payload_base64\":\"?\"}", "payload_base64: is not base64"),
        invalid("{\"type\":\"a\",\"payload\":1,\"content_type\":\"text/plain\"}", "content_type: needs payload_base64"),
        invalid(
            "{\"type\":\"a\",\"payload_base64\":\"ew==\",\"content_type\":\"application/json\"}",
            "payload: is not JSON",
        ),
    ]
}

fn sizes_and_batches() -> Vec<Case> {
    let nested = format!("{{\"type\":\"a\",\"payload\":{}{}}}", "[".repeat(101), "]".repeat(101));
    let large = format!("{{\"type\":\"a\",\"payload\":\"{}\"}}", "x".repeat((1 << 20) - 1));
    let large_metadata = format!("{{\"type\":\"a\",\"metadata\":{{\"m\":\"{}\"}}}}", "x".repeat(1 << 20));
    let batch = |last: &str| format!("[{{\"type\":\"a\"}},{{\"type\":\"b\"}},{last}]");
    vec![
        invalid(nested, "payload: must not nest deeper than 100"),
        json(large.clone(), 413, "too_large", "payload has 1048577 bytes, more than the limit of 1048576"),
        json(large_metadata, 413, "too_large", "metadata has"),
        json(vec![b' '; (16 << 20) + 1], 413, "too_large", "body has 16777217 bytes"),
        invalid(batch("{\"type\":\"a b\"}"), "[2].type: segments may hold"),
        invalid(format!("[{}0]", "0,".repeat(10_000)), "a batch holds at most 10000 events"),
        invalid(batch("3"), "[2]: must be a JSON object"),
        invalid(batch("{\"type\":\"a\",\"ephemeral\":true}"), "[2].ephemeral: must be sent alone"),
        invalid(batch("{\"type\":\"a\",\"sourc\":\"x\"}"), "[2].sourc: is not a field"),
        json(batch(&large), 413, "too_large", "[2].payload has 1048577 bytes"),
        post(
            "/v1/events?wait=1s",
            "application/json",
            "[{\"type\":\"a\"}]",
            400,
            "malformed",
            "a batch cannot be waited for",
        ),
    ]
}

fn headers_and_addresses() -> Vec<Case> {
    let event = "{\"type\":\"a\"}";
    let unsupported =
        |content_type, words| post("/v1/events", content_type, event, 415, "unsupported_media_type", words);
    let cloud = |body: &str, words| post("/v1/events", "application/cloudevents+json", body, 422, "invalid", words);
    vec![
        Case { headers: Vec::new(), ..unsupported("", "content-type is missing") },
        unsupported("text/plain", "content-type text/plain is not served"),
        unsupported("application/json; charset=utf-16", "charset utf-16 is not served"),
        cloud(event, "specversion: is required"),
        cloud("{\"specversion\":\"0.3\",\"id\":\"1\",\"source\":\"s\",\"type\":\"a\"}", "specversion: must be 1.0"),
        cloud("{\"specversion\":\"1.0\",\"id\":\"1\",\"type\":\"a\"}", "source: is required"),
        Case {
            headers: vec![("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "s"), ("ce-type", "a b")],
            ..cloud("{}", "type: segments may hold")
        },
        post("/v1/events?wait=soon", "application/json", event, 400, "malformed", "wait: must be a duration"),
        post("/v1/events?wait=2h", "application/json", event, 400, "malformed", "wait: must be at most 60s"),
        post("/v1/events?wiat=1s", "application/json", event, 400, "malformed", "did you mean wait?"),
        bare("GET", "/v1/events?limit=0", 400, "malformed", "limit: must be a number from 1 to 1000"),
        bare("GET", "/v1/events?limit=1001", 400, "malformed", "limit: must be a number from 1 to 1000"),
        bare("GET", "/v1/events?type=a..b", 400, "malformed", "type: a segment cannot be empty"),
        bare("GET", "/v1/events?type=a[", 400, "malformed", "never closed"),
        bare("GET", "/v1/events?status=done", 400, "malformed", "status: must be one of pending"),
        bare("GET", "/v1/events?from=yesterday", 400, "malformed", "from: must be an RFC 3339"),
        bare("GET", "/v1/events?cursor=x", 400, "malformed", "cursor: is no cursor"),
        bare("GET", "/v1/events?stauts=failed", 400, "malformed", "did you mean status?"),
        bare("GET", "/v1/events/no-such-event", 404, "not_found", "event not found: no-such-event"),
        bare("GET", "/v1/events/%FF", 400, "malformed", "path: is not UTF-8"),
        bare("GET", "/v1/evnts", 404, "not_found", "did you mean /v1/events?"),
        bare("PUT", "/v1/events", 405, "method_not_allowed", "PUT is not served"),
        bare("DELETE", "/v1/events/no-such-event", 404, "not_found", "event not found"),
        bare("GET", "/v1/plugins/nobody", 404, "not_found", "plugin not found: nobody"),
        bare("POST", "/v1/plugins/nobody/reload", 404, "not_found", "plugin not found: nobody"),
        bare("POST", "/v1/plugins/nobody/reload?force=1", 400, "malformed", "force"),
        bare("GET", "/v1/plugins/nobody/reload", 405, "method_not_allowed", "GET is not served"),
        bare("GET", "/v1/dead-letters?verdict=tired", 400, "malformed", "verdict: must be one of"),
    ]
}

fn operators() -> Vec<Case> {
    let send = |path, body: &str, words| post(path, "application/json", body, 422, "invalid", words);
    vec![
        send("/v1/dead-letters/redrive", "{}", "all: is needed"),
        send("/v1/dead-letters/redrive", "{\"all\":true,\"type\":\"*\"}", "all: cannot be given beside a filter"),
        send("/v1/replays", "{}", "subscription: is required"),
        send("/v1/replays", "{\"subscription\":\"a\",\"from_seq\":-1}", "from_seq: must be a seq"),
        send("/v1/subscriptions", "{\"pattern\":\"*\"}", "name: is required"),
        send("/v1/subscriptions", "{\"name\":\"a b\",\"pattern\":\"*\"}", "subscription: must be 1–128 characters"),
        send("/v1/subscriptions", "{\"name\":\"a\",\"pattern\":\"a.[z-a]\"}", "pattern: a range in [ ]"),
        send("/v1/subscriptions", "{\"name\":\"a\",\"pattern\":\"*\",\"concurency\":1}", "did you mean concurrency?"),
        send(
            "/v1/subscriptions",
            "{\"name\":\"a\",\"pattern\":\"*\",\"handler\":\"plugin:x\"}",
            "handler: must be native",
        ),
        Case {
            method: "PATCH",
            ..post("/v1/subscriptions/none", "application/json", "{\"paused\":true}", 404, "not_found", "none")
        },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name_and_store_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let provider = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    let server = Server::start(folder.path(), &["--provider", &provider]).await;
    let cases = [texts(), fields(), sizes_and_batches(), headers_and_addresses(), operators()].into_iter().flatten();
    let mut wrong = Vec::new();
    let mut count = 0;
    for case in cases {
        let reply = wire::send(&server.url, case.method, case.path, &case.headers, case.body.clone()).await;
        wrong.extend(deviation(&case, &reply));
        count += 1;
    }
    assert!(wrong.is_empty(), "{} of {count} differ:\n{}", wrong.len(), wrong.join("\n"));
    let events = wire::get(&server.url, "/v1/events").await.json();
    assert_eq!(events["events"].as_array().unwrap().len(), 0, "{events}");
    let stats = wire::get(&server.url, "/v1/stats").await.json();
    assert_eq!((&stats["total_published"], &stats["provider_stats"]["head_seq"]), (&0.into(), &0.into()), "{stats}");
    let subscriptions = wire::get(&server.url, "/v1/subscriptions").await.json();
    assert_eq!(subscriptions["subscriptions"].as_array().unwrap().len(), 0, "{subscriptions}");
}

/// How the reply is not what the table says.
fn deviation(case: &Case, reply: &Reply) -> Option<String> {
    let problem = reply.json();
    let detail = problem["detail"].as_str().unwrap_or_default();
    let right = reply.status == case.status
        && reply.content_type == "application/problem+json"
        && problem["status"] == case.status
        && problem["code"] == case.code
        && detail.contains(case.words)
        && (case.status != 422 || (problem["field"].is_string() && problem["value"].is_string()));
    let sent = String::from_utf8_lossy(case.body.get(..120.min(case.body.len())).unwrap()).into_owned();
    (!right).then(|| {
        format!(
            "{} {} {sent}\n    wants {} {} {:?}\n    got {reply:?}",
            case.method, case.path, case.status, case.code, case.words
        )
    })
}

/// What looks strange and is legal: kept byte for byte.
#[tokio::test(flavor = "multi_thread")]
async fn a_strange_payload_is_kept_as_it_came() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    let nested = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let largest = format!("\"{}\"", "x".repeat((1 << 20) - 2));
    let payloads = [
        "1e400",
        "{\"a\":1,\"a\":2}",
        "\"\\ud800\"",
        "\"\\u0000\"",
        "[ 1.50 ,\t-0 ]",
        "12345678901234567890123",
        &nested,
        &largest,
    ];
    for (index, payload) in payloads.iter().enumerate() {
        let sent = format!("{{\"id\":\"p-{index}\",\"type\":\"a\",\"payload\": {payload} }}");
        let reply = wire::post(&server.url, "/v1/events", sent).await;
        assert_eq!(reply.status, 202, "{payload:.40}: {}", reply.text);
        let shown = wire::get(&server.url, &format!("/v1/events/p-{index}")).await;
        assert!(shown.text.contains(&format!("\"payload\":{payload},")), "{payload:.40} in {:.400}", shown.text);
    }
}

/// Arguments, the exit code, and words on standard error.
#[test]
fn bad_configurations_and_components_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let typo = file("typo.toml", b"[broker]\nworker_cuont = 3\n");
    let kind = file("kind.toml", b"[broker]\nworker_count = \"three\"\n");
    let broken = file("broken.toml", b"[broker\n");
    let original = file("original.yaml", b"event_broker:\n  enabled: true\n  provider: kafka\n");
    let nats = b"event_broker:\n  enabled: true\n  provider: nats\n  nats: {storage: tape}\n";
    let nats = file("nats.yaml", nats);
    let grants = file("grants.toml", b"[plugins.mailer]\ngrants = { buckets = [\"a\"] }\n");
    let (text, module, empty) =
        (file("text.wasm", b"hello"), file("module.wasm", b"\0asm\x01\0\0\0"), file("empty.wasm", b""));
    let component = file("bare.wasm", b"\0asm\x0d\0\x01\0");
    let rows: [(&[&str], i32, &str); 23] = [
        (&["config", "--config", &typo], 2, "broker.worker_cuont: is not a setting; did you mean worker_count?"),
        (&["config", "--config", &kind], 2, "broker.worker_count"),
        (&["config", "--config", &broken], 2, "is not TOML"),
        (&["config", "--config", "missing.toml"], 2, "missing.toml"),
        (&["config", "--config", &original], 2, "unknown provider: kafka"),
        (&["serve", "--config", &nats], 2, "event_broker.nats.storage"),
        (&["serve", "--provider", "nats://", "--listen", "127.0.0.1:0"], 2, "names no server"),
        (&["serve", "--provider", "nats://127.0.0.1:1", "--listen", "127.0.0.1:0"], 1, "nats://127.0.0.1:1"),
        (&["serve", "--provider", "redis://", "--listen", "127.0.0.1:0"], 2, "names no server"),
        (&["serve", "--provider", "redis://127.0.0.1:1", "--listen", "127.0.0.1:0"], 1, "redis://127.0.0.1:1"),
        (&["config", "--config", &grants], 2, "buckets"),
        (&["serve", "--provider", "postgres://"], 2, "names no server: write postgres://USER:PASSWORD@HOST/DATABASE"),
        (&["serve", "--listen", "localhost"], 2, "listen"),
        (&["serve", "--listen", "0.0.0.0:0"], 2, "needs tokens"),
        (
            &["serve", "--provider", "memory:", "--listen", "127.0.0.1:0", "--plugins", "no-such-folder"],
            2,
            "no-such-folder",
        ),
        (&["publish"], 2, "required"),
        (&["publish", "a", "--payload", "{"], 2, "--payload: is not JSON"),
        (&["plugin", "check", &text], 1, "text.wasm"),
        (&["plugin", "check", &module], 1, "module.wasm"),
        (&["plugin", "check", &empty], 1, "empty.wasm"),
        (&["plugin", "inspect", &component], 1, "has no manifest"),
        (&["plugin", "embed", &component], 2, "--output"),
        (&["plugin", "embed", &component, "-o", "made/"], 3, "plugin.toml"),
    ];
    for (arguments, exit, words) in rows {
        let ran = tidegate(folder.path(), arguments);
        let told = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.code() == Some(exit) && told.contains(words), "{arguments:?}: {:?} {told}", ran.status);
        assert!(ran.stdout.is_empty(), "{arguments:?} wrote to standard output");
    }
}

fn tidegate(folder: &Path, arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(arguments)
        .current_dir(folder)
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .unwrap()
}
