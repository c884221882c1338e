//! The binary as its users meet it: HTTP, the command line, configuration, and how it starts and stops.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::server::{Server, built_plugins};
use crate::support::wire;

/// A folder with a configuration, and the arguments that serve from it.
struct Place {
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Place {
    /// SQLite, and these of the built plugins with what they ask for.
    fn with_plugins(names: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("plugins")).unwrap();
        for name in names {
            copy(name, &folder.path().join("plugins"));
        }
        let config = r#"
            [broker.retry]
            initial_delay = "10ms"
            [plugins.order-totals]
            grants = { kv = ["totals"], events = ["shop.totals.update"], config = ["currency"] }
            config = { currency = "EUR" }
            [plugins.signup-guard]
            grants = { config = ["blocked-domains"] }
        "#;
        std::fs::write(folder.path().join("tidegate.toml"), config).unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let provider = format!("sqlite://{}", at("tidegate.db"));
        let arguments = [
            "--config".to_owned(),
            at("tidegate.toml"),
            "--provider".to_owned(),
            provider,
            "--plugins".to_owned(),
            at("plugins"),
        ];
        Self { arguments: arguments.into(), folder }
    }

    async fn serve(&self) -> Server {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        Server::start(self.folder.path(), &arguments).await
    }
}

fn copy(plugin: &str, folder: &Path) -> PathBuf {
    let target = folder.join(format!("{plugin}.wasm"));
    std::fs::copy(built_plugins().join(format!("{plugin}.wasm")), &target).unwrap();
    target
}

/// Runs the binary as a client of `url`.
fn client(url: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(arguments)
        .env("TIDEGATE_URL", url)
        .env_remove("TIDEGATE_TOKEN")
        .output()
        .unwrap()
}

/// What a client printed, if it ended with this exit code.
fn printed(url: &str, exit: i32, arguments: &[&str]) -> String {
    let ran = client(url, arguments);
    let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert_eq!(ran.status.code(), Some(exit), "{arguments:?}: {errors}");
    String::from_utf8(ran.stdout).unwrap()
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

const ORDER: &str = r#"{"order_id":"o-1","customer":"c-1","total_cents":250,"currency":"EUR"}"#;

/// DESIGN §1; BEHAVIOURS E12: published, matched, handled by a plugin that publishes in turn, kept over a restart.
#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_one_event_can_be_followed_to_its_end() {
    let place = Place::with_plugins(&["order-totals", "audit-trail"]);
    let mut server = place.serve().await;
    let order = ["publish", "shop.orders.create", "--id", "o-1", "--key", "c-1", "--payload", ORDER, "--json"];
    let handled = parsed(&printed(&server.url, 0, &[&order[..], &["--wait=20s"]].concat()));
    assert_eq!((&handled["id"], &handled["seq"], &handled["status"]), (&json!("o-1"), &json!(1), &json!("completed")));
    let deliveries = handled["deliveries"].as_array().unwrap();
    let names: Vec<&str> = deliveries.iter().map(|delivery| delivery["subscription"].as_str().unwrap()).collect();
    assert!(names.contains(&"order-totals") && names.iter().any(|name| name.starts_with("audit-trail")), "{names:?}");
    let attempt =
        deliveries.iter().find(|delivery| delivery["subscription"] == "order-totals").unwrap()["attempts"][0].clone();
    assert_eq!(attempt["verdict"], "ok", "{attempt}");
    assert!(attempt["digest"].as_str().unwrap().starts_with("sha256:") && attempt["peak_memory"].is_u64(), "{attempt}");
    assert_eq!(attempt.get("fuel"), None, "nobody gave it a budget");

    let again = parsed(&printed(&server.url, 0, &order));
    assert_eq!((&again["seq"], &again["duplicate"], &again["status"]), (&json!(1), &json!(true), &json!("completed")));
    let totals = wire::get(&server.url, "/v1/events?type=shop.totals.*").await.json();
    assert_eq!(
        (&totals["events"][0]["caused_by"], &totals["events"][0]["source"]),
        (&json!("o-1"), &json!("internal"))
    );

    assert!(server.stop().success(), "{}", server.log());
    let server = place.serve().await;
    let shown = parsed(&printed(&server.url, 0, &["events", "get", "o-1", "--json"]));
    assert_eq!(
        (&shown["status"], shown["payload"].to_string().as_str()),
        (&json!("completed"), parsed(ORDER).to_string().as_str())
    );
    let listed = printed(&server.url, 0, &["events", "list", "--type", "shop.orders.*"]);
    assert!(listed.contains("shop.orders.create") && listed.contains("o-1"), "{listed}");
}

/// DESIGN §9: dead letters are listed, redriven, and counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_event_is_a_dead_letter_until_it_is_redriven() {
    let place = Place::with_plugins(&["order-totals"]);
    let server = place.serve().await;
    let foreign = ORDER.replace("EUR", "USD");
    let publish = ["publish", "shop.orders.create", "--id", "o-2", "--wait=20s", "--payload", &foreign];
    assert!(printed(&server.url, 1, &publish).contains("reject"));
    let dead = parsed(&printed(&server.url, 0, &["dead", "list", "--verdict", "reject", "--json"]));
    assert_eq!(dead["dead_letters"][0]["event"]["id"], "o-2");
    assert_eq!(dead["dead_letters"][0]["delivery"]["subscription"], "order-totals");
    assert!(printed(&server.url, 0, &["dead", "list"]).contains("unsupported-currency"));
    assert!(printed(&server.url, 0, &["dead", "list", "--verdict", "timeout"]).contains("no dead letters"));
    printed(&server.url, 2, &["dead", "redrive"]);
    assert_eq!(parsed(&printed(&server.url, 0, &["dead", "redrive", "--all", "--json"]))["redriven"], 1);
    let detail = until(&server.url, "/v1/events/o-2", |event| event["deliveries"][0]["attempts"][1].is_object()).await;
    assert_eq!(detail["deliveries"][0]["attempts"][1]["number"], 2);
    let metrics = wire::get(&server.url, "/metrics").await;
    assert!(metrics.content_type.starts_with("application/openmetrics-text"), "{}", metrics.content_type);
    assert!(metrics.text.contains("tidegate_dead_letters_total{subscription=\"order-totals\"} 2"), "{}", metrics.text);
    assert!(metrics.text.ends_with("# EOF\n"));
}

/// Asks again until the answer is as wanted.
async fn until(url: &str, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..600 {
        let json = wire::get(url, path).await.json();
        if wanted(&json) {
            return json;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{path} never became what is wanted: {}", wire::get(url, path).await.text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_subscription_lets_its_events_wait() {
    let place = Place::with_plugins(&["signup-guard"]);
    let server = place.serve().await;
    let subscriptions = parsed(&printed(&server.url, 0, &["subscriptions", "list", "--json"]));
    let name = subscriptions["subscriptions"][0]["name"].as_str().unwrap();
    assert!(printed(&server.url, 0, &["subscriptions", "pause", name]).contains("is paused"));
    let payload = r#"{"name":"Ada","email":"ada@example.org"}"#;
    let publish = ["publish", "shop.users.create", "--id", "u-1", "--payload", payload, "--wait=100ms"];
    assert!(printed(&server.url, 1, &publish).contains("pending"));
    assert!(printed(&server.url, 0, &["subscriptions", "resume", name]).contains("is active"));
    let event = until(&server.url, "/v1/events/u-1", |event| event["status"] == "completed").await;
    assert_eq!(event["deliveries"][0]["attempts"][0]["reply"]["body"]["accepted"], true);
    printed(&server.url, 3, &["subscriptions", "pause", "no-such-subscription"]);
}

/// DESIGN §7: dropped in, replaced and refused while the server runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_dropped_into_the_folder_is_served() {
    let place = Place::with_plugins(&[]);
    let server = place.serve().await;
    assert!(printed(&server.url, 0, &["plugin", "list"]).contains("no plugins"));
    copy("signup-guard", &place.folder.path().join("plugins"));
    let plugins = until(&server.url, "/v1/plugins", |all| all["plugins"][0]["active"].is_object()).await;
    assert_eq!(plugins["plugins"][0]["name"], "signup-guard");
    until(&server.url, "/v1/subscriptions", |all| all["subscriptions"][0]["bound"] == true).await;
    std::fs::write(place.folder.path().join("plugins/broken.wasm"), "no component").unwrap();
    until(&server.url, "/v1/plugins", |all| all["plugins"].as_array().is_some_and(|all| all.len() == 2)).await;
    let listed = printed(&server.url, 0, &["plugin", "list"]);
    assert!(listed.contains("refused broken") && listed.contains("signup-guard"), "{listed}");
}

/// Rewrites the manifest of a plugin in the folder, which makes another version of it.
fn reversioned(place: &Place, plugin: &str, from: &str, to: &str) {
    use tidegate::host::component::{embed_manifest, manifest};

    let bytes = std::fs::read(built_plugins().join(format!("{plugin}.wasm"))).unwrap();
    let (_, text) = manifest(&bytes).unwrap();
    assert!(text.contains(from), "{text}");
    let path = place.folder.path().join(format!("plugins/{plugin}.wasm"));
    std::fs::write(path, embed_manifest(&bytes, &text.replace(from, to)).unwrap()).unwrap();
}

/// A reload on demand answers with what came of it, over HTTP and by SIGHUP; only an admin may ask.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_is_reloaded_on_demand() {
    let place = Place::with_plugins(&["signup-guard", "audit-trail"]);
    let server = place.serve().await;
    let reload =
        async |name: &str| wire::send(&server.url, "POST", &format!("/v1/plugins/{name}/reload"), &[], "").await;
    let unknown = reload("nobody").await;
    assert_eq!((unknown.status, &unknown.json()["code"]), (404, &json!("not_found")), "{}", unknown.text);
    let with_body = wire::post(&server.url, "/v1/plugins/signup-guard/reload", "{}").await;
    assert_eq!((with_body.status, &with_body.json()["code"]), (400, &json!("malformed")), "{}", with_body.text);
    let same = reload("signup-guard").await;
    assert_eq!((same.status, &same.json()["changed"]), (200, &json!(false)), "{}", same.text);
    let first = same.json()["active"]["digest"].clone();

    reversioned(&place, "signup-guard", "1.0.0", "1.1.0");
    let reloaded = reload("signup-guard").await.json();
    assert_eq!((&reloaded["name"], &reloaded["active"]["version"]), (&json!("signup-guard"), &json!("1.1.0")));
    assert!(reloaded["active"]["digest"] != first && reloaded["active"]["active_since"].is_string(), "{reloaded}");

    // What is refused is said at once, and nothing changes.
    reversioned(&place, "signup-guard", "[\"blocked-domains\"]", "[\"blocked-domains\", \"secret\"]");
    let refused = reload("signup-guard").await;
    assert_eq!((refused.status, &refused.json()["code"]), (422, &json!("plugin_unusable")), "{}", refused.text);
    assert!(refused.text.contains("[plugins.signup-guard.grants]"), "{}", refused.text);
    let shown = wire::get(&server.url, "/v1/plugins/signup-guard").await.json();
    assert_eq!((&shown["active"]["version"], &shown["manifest"]["version"]), (&json!("1.1.0"), &json!("1.1.0")));
    let refusal = &shown["refused"];
    assert!(refusal["digest"].is_string() && refusal["at"].is_string() && refusal["error"].is_string(), "{refusal}");
    let listed = printed(&server.url, 0, &["plugin", "list"]);
    assert!(listed.contains("refused signup-guard (") && listed.contains("sha256:"), "{listed}");
    let log = server.log();
    assert_eq!(log.matches("plugin candidate refused").count(), 1, "{log}");

    reversioned(&place, "audit-trail", "1.0.0", "2.0.0");
    let hung_up = Command::new("kill").args(["-HUP", &server.pid().to_string()]).status().unwrap();
    assert!(hung_up.success());
    until(&server.url, "/v1/plugins/audit-trail", |plugin| plugin["active"]["version"] == "2.0.0").await;
    let inspected = printed("", 0, &["plugin", "inspect", "audit-trail", "--url", &server.url]);
    assert!(inspected.contains("version        2.0.0") && inspected.contains("subscribes to"), "{inspected}");
    printed("", 3, &["plugin", "inspect", "nobody", "--url", &server.url]);
}

/// `plugin check` and `inspect` on files: one or a folder, for people and for programs.
#[test]
fn files_are_checked_as_a_server_would_load_them() {
    let place = Place::with_plugins(&["order-totals", "signup-guard"]);
    let at = |name: &str| place.folder.path().join(name).display().to_string();
    let (config, folder) = (at("tidegate.toml"), at("plugins"));
    let all = printed("", 0, &["plugin", "check", "-c", &config, &folder]);
    assert_eq!(all.matches("would be served").count(), 2, "{all}");
    let one = printed("", 0, &["plugin", "check", "-c", &config, &at("plugins/order-totals.wasm"), "--json"]);
    assert_eq!(
        (&parsed(&one)["served"], &parsed(&one)["plugin"]["manifest"]["name"]),
        (&json!(true), &json!("order-totals"))
    );

    // Without grants: the section to add stands on standard output, ready for the configuration.
    let ungranted = printed("", 1, &["plugin", "check", &at("plugins/order-totals.wasm")]);
    let section = "[plugins.order-totals.grants]\nkv = [\"totals\"]\nevents = [\"shop.totals.update\"]\nconfig = [\"currency\"]\n";
    assert_eq!(ungranted.trim_start(), section);
    std::fs::write(at("grants.toml"), ungranted).unwrap();
    printed("", 0, &["plugin", "check", "-c", &at("grants.toml"), &at("plugins/order-totals.wasm")]);

    std::fs::write(at("plugins/broken.wasm"), "no component").unwrap();
    std::fs::copy(at("plugins/order-totals.wasm"), at("plugins/second.wasm")).unwrap();
    let some = parsed(&printed("", 1, &["plugin", "check", "-c", &config, &folder, "--json"]));
    let rows: Vec<(bool, &str)> = some["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["served"].as_bool().unwrap(), row["error"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), [false, true, false, true], "{some}");
    assert!(rows[0].1.contains("is not WebAssembly") && rows[2].1.contains("the name order-totals"), "{some}");

    std::fs::write(at("bad.toml"), "provder = \"memory:\"").unwrap();
    for (exit, arguments) in [
        (3, ["plugin", "check", "/nonexistent.wasm"].as_slice()),
        (3, &["plugin", "inspect", "/nonexistent.wasm"]),
        (2, &["plugin", "check", "-c", &at("bad.toml"), &folder]),
        (2, &["plugin", "check"]),
        (1, &["plugin", "inspect", &at("plugins/broken.wasm")]),
    ] {
        printed("", exit, arguments);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_can_be_replayed_and_erased() {
    let place = Place::with_plugins(&["signup-guard"]);
    let server = place.serve().await;
    let payload = r#"{"name":"Ada","email":"ada@example.org"}"#;
    printed(&server.url, 0, &["publish", "shop.users.create", "--id", "u/1 é", "--payload", payload, "--wait=20s"]);
    let counted = printed(&server.url, 0, &["replay", "signup-guard", "--dry-run"]);
    assert!(counted.starts_with("1 events would be"), "{counted}");
    printed(&server.url, 0, &["replay", "signup-guard", "--from-seq", "1"]);
    let path = "/v1/events/u%2F1%20%C3%A9";
    let event = until(&server.url, path, |event| event["deliveries"][0]["attempts"][1].is_object()).await;
    assert_eq!(event["deliveries"][0]["replay"], true);
    assert_eq!(wire::send(&server.url, "DELETE", path, &[], "").await.status, 204);
    assert_eq!(wire::get(&server.url, path).await.status, 404);
    printed(&server.url, 3, &["events", "get", "u/1 é"]);
}

/// CloudEvents 1.0 over HTTP in its three forms.
#[tokio::test(flavor = "multi_thread")]
async fn cloud_events_are_taken_in_all_three_forms() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    let one =
        |id: &str| json!({"specversion": "1.0", "id": id, "source": "/shop", "type": "shop.opened", "data": {"n": 1}});
    let send = |content_type: &'static str, body: String| {
        let url = server.url.clone();
        async move { wire::send(&url, "POST", "/v1/events", &[("content-type", content_type)], body).await }
    };
    assert_eq!(send("application/cloudevents+json", one("c-1").to_string()).await.status, 202);
    let batch =
        send("application/cloudevents-batch+json; charset=utf-8", json!([one("c-2"), one("c-3")]).to_string()).await;
    assert_eq!(batch.json()[1]["id"], "c-3", "{}", batch.text);
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "c-4"),
        ("ce-source", "frontend"),
        ("ce-type", "shop.opened"),
        ("content-type", "text/plain"),
    ];
    assert_eq!(wire::send(&server.url, "POST", "/v1/events", &headers, "hello").await.status, 202);
    let events = wire::get(&server.url, "/v1/events").await.json();
    let ids: Vec<&str> =
        events["events"].as_array().unwrap().iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["c-4", "c-3", "c-2", "c-1"]);
    let (binary, structured) = (&events["events"][0], &events["events"][3]);
    assert_eq!((&binary["payload_base64"], &binary["source"]), (&json!("aGVsbG8="), &json!("frontend")));
    assert_eq!((&structured["payload"], &structured["metadata"]["ce_source"]), (&json!({"n": 1}), &json!("/shop")));
}

/// Keyset paging: no event twice, none left out, whatever is published meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn pages_neither_repeat_nor_skip() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    let batch: Vec<Value> = (1..=7).map(|n| json!({"id": format!("e-{n}"), "type": "a.b"})).collect();
    assert_eq!(wire::post(&server.url, "/v1/events", json!(batch).to_string()).await.json()[6]["seq"], 7);
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = wire::get(&server.url, &format!("/v1/events?limit=3{cursor}")).await.json();
        seen.extend(page["events"].as_array().unwrap().iter().map(|event| event["seq"].as_u64().unwrap()));
        wire::post(&server.url, "/v1/events", r#"{"type":"late"}"#).await;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1]);
}

/// DESIGN §9: tokens with scopes; an open address without tokens never starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_where_tokens_are_configured() {
    let folder = tempfile::tempdir().unwrap();
    // The digests of "publisher-1" and "reader-1".
    let config = r#"
        provider = "memory:"
        [[http.tokens]]
        name = "publisher"
        sha256 = "PUBLISHER"
        scopes = ["publish"]
        [[http.tokens]]
        name = "reader"
        sha256 = "READER"
        scopes = ["read"]
    "#;
    let config = config.replace("PUBLISHER", &digest("publisher-1")).replace("READER", &digest("reader-1"));
    let path = folder.path().join("tidegate.toml").display().to_string();
    std::fs::write(&path, config).unwrap();
    let server = Server::start(folder.path(), &["--config", &path]).await;
    let refused = wire::get(&server.url, "/v1/events").await;
    assert_eq!((refused.status, &refused.json()["code"]), (401, &json!("unauthorized")));
    printed(&server.url, 1, &["events", "list"]);
    printed(&server.url, 0, &["events", "list", "--token", "reader-1"]);
    let denied = client(&server.url, &["publish", "a", "--token", "reader-1", "--json"]);
    let told = String::from_utf8(denied.stderr).unwrap();
    assert_eq!((denied.status.code(), &parsed(&told)["code"]), (Some(1), &json!("forbidden")));
    printed(&server.url, 0, &["publish", "a", "--token", "publisher-1"]);
    let shown = client(&server.url, &["config", "--config", &path]).stdout;
    assert!(!String::from_utf8(shown).unwrap().contains(&digest("reader-1")));
}

/// A page whose name was made to lead here sends that name, and what it asks for is not done.
#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_what_was_sent_to_another_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    let send = async |host: &str, method: &str, path: &str| {
        let headers = [("host", host), ("content-type", "application/json")];
        let event = json!({"type": "a.b", "payload": {}}).to_string();
        wire::send(&server.url, method, path, &headers, event).await
    };
    for (method, path) in [("POST", "/v1/events"), ("GET", "/v1/events"), ("GET", "/metrics")] {
        let refused = send("evil.example:7700", method, path).await;
        assert_eq!((refused.status, &refused.json()["code"]), (403, &json!("forbidden")), "{method} {path}");
        assert!(refused.text.contains("evil.example") && refused.text.contains("http.tokens"), "{}", refused.text);
    }
    assert_eq!(send("evil.example", "GET", "/healthz").await.status, 200);
    let listed = send("localhost", "GET", "/v1/events").await;
    assert_eq!((listed.status, &listed.json()["events"]), (200, &json!([])), "{}", listed.text);
}

fn digest(token: &str) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// DESIGN §9: 0 done, 1 failed, 2 usage, 3 not found, 4 unreachable; errors as JSON where JSON is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_say_what_happened() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    let rows: [(&[&str], i32); 9] = [
        (&["publish", "a.b"], 0),
        (&["publish", "a.b", "--wait"], 0),
        (&["publish", "a b"], 2),
        (&["publish"], 2),
        (&["events", "list", "--status", "done"], 2),
        (&["events", "get", "nope"], 3),
        (&["replay", "nope"], 3),
        (&["frobnicate"], 2),
        (&["--help"], 0),
    ];
    for (arguments, exit) in rows {
        printed(&server.url, exit, arguments);
    }
    printed("http://127.0.0.1:1", 4, &["events", "list"]);
    let told = String::from_utf8(client("http://127.0.0.1:1", &["events", "list", "--json"]).stderr).unwrap();
    assert_eq!(parsed(&told)["code"], "unreachable");
}

/// BEHAVIOURS F8, C12: the original's file starts a server, and a disabled broker is no error.
#[tokio::test(flavor = "multi_thread")]
async fn the_original_brokers_file_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broker.yaml");
    let path = file.display().to_string();
    let text = "event_broker:\n  enabled: true\n  provider: memory\n  mode: sync\n  worker_count: 3\n  instance_id: \"api-1\"\n";
    std::fs::write(&file, text).unwrap();
    let server = Server::start(folder.path(), &["--config", &path]).await;
    let stats = wire::get(&server.url, "/v1/stats").await.json();
    assert_eq!(
        (&stats["instance_id"], &stats["mode"], &stats["is_running"]),
        (&json!("api-1"), &json!("sync"), &json!(true))
    );
    assert_eq!(stats["provider_stats"]["provider_type"], "memory");
    std::fs::write(&file, text.replace("true", "false")).unwrap();
    let disabled = client("", &["serve", "--config", &path]);
    assert_eq!(disabled.status.code(), Some(0));
    assert!(String::from_utf8(disabled.stderr).unwrap().contains("disabled"));
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_tell_living_from_ready() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:"]).await;
    assert_eq!(wire::get(&server.url, "/healthz").await.json(), json!({"status": "ok"}));
    assert_eq!(wire::get(&server.url, "/readyz").await.json(), json!({"status": "ready"}));
}

/// A client that never finishes its request is hung up on.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_dawdles_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("tidegate.toml").display().to_string();
    std::fs::write(&config, "[http]\nheader_timeout = \"100ms\"\nbody_timeout = \"100ms\"\n").unwrap();
    let server = Server::start(folder.path(), &["--provider", "memory:", "--config", &config]).await;
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    let answer_to = move |sent: &'static str| {
        let address = address.clone();
        move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream.write_all(sent.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        }
    };
    let head = tokio::task::spawn_blocking(answer_to("GET /healthz HTTP/1.1\r\nhost: localhost\r\n")).await.unwrap();
    assert!(!head.contains("200"), "{head}");
    let body = "POST /v1/events HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    let body = tokio::task::spawn_blocking(answer_to(body)).await.unwrap();
    assert!(body.starts_with("HTTP/1.1 408") && body.contains("application/problem+json"), "{body}");
}

/// What is not built is not advertised.
#[test]
fn help_names_what_exists_and_nothing_else() {
    let help = printed("", 0, &["--help"]);
    for command in [
        "serve",
        "publish",
        "events",
        "tail",
        "subscriptions",
        "dead",
        "replay",
        "plugin",
        "capture",
        "migrate",
        "doctor",
        "config",
    ] {
        assert!(help.contains(&format!("  {command} ")), "{help}");
    }
    let plugin = printed("", 0, &["plugin", "--help"]);
    for command in ["build", "check", "inspect", "list"] {
        assert!(plugin.contains(&format!("  {command} ")), "{plugin}");
    }
    for absent in ["deploy", "rollback", "history"] {
        assert!(!help.contains(absent) && !plugin.contains(absent), "{absent}");
    }
}
