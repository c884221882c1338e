//! What follows from how a NATS server is set up: who may log in and how, TLS, and what its ways of keeping data lose when it
//! is killed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use serde_json::{Value, json};
use tidegate::provider::nats::{NatsProvider, Options, Storage};
use tidegate::provider::{Append, Durability, Provider as _};
use tidegate::{Event, Payload, Source};

use crate::support::certificates;
use crate::support::nats::NatsServer;
use crate::support::server::{Server, free_port};

/// What must be seen nowhere.
const SECRETS: [&str; 4] = ["hunter2", "t0ken", "wr0ng", "PRIVATE"];

/// Runs `tidegate migrate` with these variables: its exit code, and all that it says of what it does, however closely it is
/// asked.
fn migrate(provider: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(["migrate", "--json", "--provider", provider]).env("RUST_LOG", "trace");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(!SECRETS.iter().any(|secret| said.contains(secret)), "{said}");
    (output.status.code(), said)
}

/// The field `detail` of the problem that is told last.
fn detail(said: &str) -> String {
    let problem: Value = serde_json::from_str(said.lines().last().unwrap_or_default()).unwrap_or_default();
    problem["detail"].as_str().unwrap_or(said).to_owned()
}

/// Serves for as long as an event takes.
async fn takes_an_event(provider: &str, environment: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("127.0.0.1:{}", free_port());
    let mut server = Server::spawn_with(&listen, folder.path(), &["--provider", provider], environment);
    server.ready().await;
    let body = json!({"type": "chat.message", "payload": {"text": "hi"}}).to_string();
    assert_eq!(crate::support::wire::post(&server.url, "/v1/events", body).await.status, 202);
    assert_eq!(server.all_events().await.len(), 1);
    assert!(server.stop().success());
    let log = server.log();
    assert!(!SECRETS.iter().any(|secret| log.contains(secret)), "{log}");
}

/// A login stands in the URL or beside it; one that is refused is told with what to do.
#[tokio::test]
async fn a_user_or_a_token_logs_in_and_a_wrong_one_is_told_what_to_do() {
    let nats = NatsServer::start(&["--user", "app", "--pass", "p@ss:hunter2"]);
    let bare = nats.url();
    let with = |login: &str| format!("nats://{login}@127.0.0.1:{}", nats.port);
    takes_an_event(&with("app:p%40ss%3Ahunter2"), &[]).await;
    let user = ("TIDEGATE_NATS__USERNAME", "app");
    assert_eq!(migrate(&bare, &[user, ("TIDEGATE_NATS__PASSWORD", "p@ss:hunter2")]).0, Some(0));
    assert_eq!(migrate(&with("app:wr0ng"), &[("TIDEGATE_NATS__PASSWORD", "p@ss:hunter2")]).0, Some(0));
    let guarded = NatsServer::start(&["--auth", "t0ken"]);
    takes_an_event(&guarded.url(), &[("TIDEGATE_NATS__TOKEN", "t0ken")]).await;
    let rows: [(&str, &[(&str, &str)]); 5] = [
        (&bare, &[]),
        (&with("app:wr0ng"), &[]),
        (&bare, &[user, ("TIDEGATE_NATS__PASSWORD", "wr0ng")]),
        (&guarded.url(), &[]),
        (&guarded.url(), &[("TIDEGATE_NATS__TOKEN", "wr0ng")]),
    ];
    for (provider, environment) in rows {
        let (code, said) = migrate(provider, environment);
        let told = detail(&said);
        assert_eq!(code, Some(1), "{environment:?}: {said}");
        for words in ["authorization violation", "nats.username", "nats.token", "nats.credentials"] {
            assert!(told.contains(words), "{environment:?}: {told}");
        }
    }
}

/// A certificate is checked against what the system trusts, there is no way around it, and nothing is said to a server that
/// does not encrypt.
#[tokio::test]
async fn a_nats_with_tls_is_used_if_its_certificate_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let authority = certificates::make(folder.path()).display().to_string();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (certificate, key) = (file("server.pem"), file("server.key"));
    let login = ["--user", "app", "--pass", "hunter2"];
    let nats = NatsServer::start(&[&login[..], &["--tls", "--tlscert", &certificate, "--tlskey", &key]].concat());
    let url = format!("tls://app:hunter2@127.0.0.1:{}", nats.port);
    let trusted = [("SSL_CERT_FILE", authority.as_str())];
    takes_an_event(&url, &trusted).await;
    // A server that wants TLS gets it from those who did not ask for it too.
    assert_eq!(migrate(&url.replace("tls://", "nats://"), &trusted).0, Some(0));
    let plain = NatsServer::start(&[&login[..], &["-DV"]].concat());
    let other = tempfile::tempdir().unwrap();
    let unknown = certificates::make(other.path()).display().to_string();
    let rows = [
        (url.clone(), &unknown, "certificate"),
        (url.replace("tls://", "nats://"), &unknown, "certificate"),
        (url.replace("127.0.0.1", "localhost"), &authority, "certificate"),
        (format!("tls://app:hunter2@127.0.0.1:{}", plain.port), &authority, "must speak TLS"),
    ];
    for (url, authority, words) in rows {
        let (code, said) = migrate(&url, &[("SSL_CERT_FILE", authority)]);
        let told = detail(&said);
        assert!(code == Some(1) && told.contains(words), "{url}: {told}");
    }
    let has_login = || plain.log().contains("CONNECT {");
    assert!(!has_login(), "{}", plain.log());
    assert_eq!(migrate(&format!("nats://app:hunter2@127.0.0.1:{}", plain.port), &trusted).0, Some(0));
    assert!(has_login(), "{}", plain.log());
}

/// A JWT as NATS has it: signed by `by`, of `subject`.
fn jwt(by: &KeyPair, subject: &KeyPair, name: &str, claims: Value) -> String {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(json!({"typ": "JWT", "alg": "ed25519-nkey"}));
    let claims = json!({
        "jti": name, "iat": 1_700_000_000, "iss": by.public_key(), "sub": subject.public_key(), "name": name, "nats": claims,
    });
    let signed = format!("{header}.{}", part(claims));
    let signature = URL_SAFE_NO_PAD.encode(by.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

/// An operator with an account that may use JetStream, as a configuration of a server in this folder, and the account's key.
fn operator(folder: &Path) -> (PathBuf, KeyPair) {
    let (operator, system, account) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let without =
        json!({"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1});
    let of = |limits: &Value| json!({"type": "account", "version": 2, "limits": limits});
    let text = format!(
        "operator: {}\nsystem_account: {system_key}\nresolver: MEMORY\nresolver_preload: {{\n  {system_key}: {}\n  {}: {}\n}}\n",
        jwt(&operator, &operator, "operator", json!({"type": "operator", "version": 2})),
        jwt(&operator, &system, "system", of(&without)),
        account.public_key(),
        jwt(&operator, &account, "shop", of(&limits)),
        system_key = system.public_key(),
    );
    let path = folder.join("operator.conf");
    std::fs::write(&path, text).unwrap();
    (path, account)
}

/// The credentials of a user of an account, who may do what docs/nats.md says that it takes.
fn credentials(folder: &Path, name: &str, account: &KeyPair) -> PathBuf {
    let user = KeyPair::new_user();
    let own = ["tidegate.default.>", "tidegate-snapshots.default.>", "$JS.API.>", "$JS.FC.>"];
    let claims = json!({
        "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1,
        "pub": {"allow": own}, "sub": {"allow": ["_INBOX.>"]},
    });
    let text = format!(
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        jwt(account, &user, name, claims),
        user.seed().unwrap(),
    );
    let path = folder.join(format!("{name}.creds"));
    std::fs::write(&path, text).unwrap();
    path
}

/// The line with the seed of a file with credentials.
fn seed(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().find(|line| line.starts_with("SU")).unwrap().to_owned()
}

/// A user of an account of an operator, with a file that has his JWT and his seed, and with no more than he needs.
#[tokio::test]
async fn a_file_with_credentials_logs_in_with_no_more_than_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let (config, account) = operator(folder.path());
    let nats = NatsServer::start(&["--config", config.to_str().unwrap()]);
    let own = credentials(folder.path(), "own", &account);
    let variable = |path: &Path| path.to_str().unwrap().to_owned();
    takes_an_event(&nats.url(), &[("TIDEGATE_NATS__CREDENTIALS", &variable(&own))]).await;
    assert!(!nats.log().contains("Violation"), "{}", nats.log());
    let stranger = credentials(folder.path(), "stranger", &KeyPair::new_account());
    let damaged = folder.path().join("damaged.creds");
    let text = std::fs::read_to_string(&own).unwrap();
    std::fs::write(&damaged, text.replace(&seed(&own), "SUAPRIVATE")).unwrap();
    let empty = folder.path().join("empty.creds");
    std::fs::write(&empty, "PRIVATE\n").unwrap();
    let rows = [
        (stranger.clone(), "nats.credentials"),
        (damaged, "nats.credentials"),
        (empty, "nats.credentials"),
        (folder.path().join("absent.creds"), "nats.credentials"),
    ];
    for (path, words) in rows {
        let (code, said) = migrate(&nats.url(), &[("TIDEGATE_NATS__CREDENTIALS", &variable(&path))]);
        let told = detail(&said);
        assert!(code != Some(0) && told.contains(words), "{path:?}: {code:?} {told}");
        assert!(!said.contains(&seed(&stranger)), "{said}");
    }
}

/// Appends one by one for as long as it takes until the server is killed, and returns what was acknowledged.
async fn acknowledged_until_killed(server: &mut NatsServer, provider: &NatsProvider) -> Vec<String> {
    let (killed, began) = (Duration::from_millis(3_500), Instant::now());
    let mut acknowledged = Vec::new();
    while began.elapsed() < killed {
        let event = Event::new(Source::Internal, "a.b".parse().unwrap(), Payload::default());
        let id = event.id.to_string();
        provider.append(vec![Append { event: event.into(), subscriptions: [].into() }]).await.unwrap();
        acknowledged.push(id);
    }
    server.kill();
    acknowledged
}

/// What each storage promises of an acknowledged event when the server itself is killed. A stream in memory is gone, and a
/// process says so of one that it did not make too.
#[tokio::test]
async fn a_killed_nats_keeps_what_its_storage_promises() {
    for (storage, durability) in [(Storage::File, Durability::Os), (Storage::Memory, Durability::Process)] {
        let mut server = NatsServer::start(&[]);
        let options = Options { url: server.url(), storage, ..Options::default() };
        let provider = NatsProvider::open(options.clone()).await.unwrap();
        let other = NatsProvider::open(Options { url: server.url(), ..Options::default() }).await.unwrap();
        assert_eq!(provider.capabilities().durability, durability);
        assert_eq!(other.capabilities().durability, durability);
        other.close().await.unwrap();
        let acknowledged = acknowledged_until_killed(&mut server, &provider).await;
        provider.close().await.unwrap();
        server.restart();
        let provider = NatsProvider::open(options).await.unwrap();
        let mut lost = 0;
        for id in &acknowledged {
            lost += usize::from(provider.get(id).await.unwrap().is_none());
        }
        println!("{storage:?}: {} acknowledged, {lost} lost", acknowledged.len());
        assert_eq!(lost, if storage == Storage::File { 0 } else { acknowledged.len() });
        // Whatever is left is a whole log.
        let page = provider.read(0, acknowledged.len() + 1).await.unwrap();
        assert!(page.events.iter().map(|event| event.seq.unwrap()).eq(1..=page.head));
        assert_eq!(acknowledged.len() - lost, page.events.len());
    }
}
