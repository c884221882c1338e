//! What follows from how a Redis server is set up: TLS, and what its ways of keeping data lose when it is killed.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate::provider::redis::{Options, RedisProvider};
use tidegate::provider::{Append, Durability, Provider as _};
use tidegate::{Event, Payload, Source};

use crate::support::certificates;
use crate::support::redis::RedisServer;
use crate::support::server::{Server, free_port};

/// A certificate is checked against what the system trusts, and there is no way around it.
#[tokio::test]
async fn a_server_with_tls_is_used_if_its_certificate_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let authority = certificates::make(folder.path()).display().to_string();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let port = free_port();
    let redis = RedisServer::start(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &file("server.pem"),
        "--tls-key-file",
        &file("server.key"),
        "--tls-ca-cert-file",
        &authority,
        "--tls-auth-clients",
        "no",
        "--requirepass",
        "hunter2",
    ]);
    let url = format!("rediss://:hunter2@127.0.0.1:{port}");
    let listen = format!("127.0.0.1:{}", free_port());
    let trusted = [("SSL_CERT_FILE", authority.as_str())];
    let mut server = Server::spawn_with(&listen, folder.path(), &["--provider", &url], &trusted);
    server.ready().await;
    let body = json!({"type": "chat.message", "payload": {"text": "hi"}}).to_string();
    assert_eq!(crate::support::wire::post(&server.url, "/v1/events", body).await.status, 202);
    assert_eq!(server.all_events().await.len(), 1);
    assert!(server.stop().success());
    let refused = |provider: &str, authority: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        let output =
            command.args(["migrate", "--json", "--provider", provider]).env("SSL_CERT_FILE", authority).output();
        let output = output.unwrap();
        let told: Value = serde_json::from_slice(&output.stderr).unwrap();
        (output.status.code(), told["detail"].as_str().unwrap().to_owned())
    };
    // An authority that has not signed it, a name that is not in it, and a server that speaks no TLS at all.
    let other = tempfile::tempdir().unwrap();
    let unknown = certificates::make(other.path()).display().to_string();
    let rows = [
        (url.clone(), unknown, "certificate"),
        (url.replace("127.0.0.1", "localhost"), authority.clone(), "certificate"),
        (format!("rediss://:hunter2@127.0.0.1:{}", redis.port), authority.clone(), ""),
    ];
    for (url, authority, words) in rows {
        let (code, text) = refused(&url, &authority);
        assert!(code == Some(1) && text.contains(words), "{url}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

/// Appends one by one for as long as it takes until the server is killed, and returns when each was acknowledged.
async fn acknowledged_until_killed(server: &mut RedisServer, provider: &RedisProvider) -> Vec<(String, Instant)> {
    let (killed, began) = (Duration::from_millis(3_500), Instant::now());
    let mut acknowledged = Vec::new();
    while began.elapsed() < killed {
        let event = Event::new(Source::Internal, "a.b".parse().unwrap(), Payload::default());
        let id = event.id.to_string();
        provider.append(vec![Append { event: event.into(), subscriptions: [].into() }]).await.unwrap();
        acknowledged.push((id, Instant::now()));
    }
    server.kill();
    acknowledged
}

/// What each setting promises of an acknowledged event when the server itself is killed; what it loses beyond that is only
/// printed.
#[tokio::test]
async fn a_killed_server_keeps_what_its_settings_promise() {
    let rows = [
        (["--appendonly", "yes", "--appendfsync", "always"], Durability::Storage),
        (["--appendonly", "yes", "--appendfsync", "everysec"], Durability::Os),
        (["--appendonly", "yes", "--appendfsync", "no"], Durability::Process),
        (["--appendonly", "no", "--appendfsync", "no"], Durability::Process),
    ];
    for (settings, durability) in rows {
        let mut server = RedisServer::start(&settings);
        let options = Options { url: server.url(), ..Options::default() };
        let provider = RedisProvider::open(options.clone()).await.unwrap();
        assert_eq!(provider.capabilities().durability, durability);
        let acknowledged = acknowledged_until_killed(&mut server, &provider).await;
        let killed = Instant::now();
        provider.close().await.unwrap();
        server.restart();
        let provider = RedisProvider::open(options).await.unwrap();
        let mut lost = Vec::new();
        for (id, at) in &acknowledged {
            if provider.get(id).await.unwrap().is_none() {
                lost.push(killed.duration_since(*at));
            }
        }
        let oldest = lost.iter().max().copied().unwrap_or_default();
        println!(
            "{settings:?}: {} acknowledged, {} lost, the oldest {oldest:?} before the kill",
            acknowledged.len(),
            lost.len()
        );
        match durability {
            Durability::Storage => assert!(lost.is_empty(), "{lost:?}"),
            Durability::Os => assert!(oldest < Duration::from_secs(3), "{oldest:?}"),
            _ => {}
        }
        // Whatever is left is a whole log.
        let mut seqs = Vec::new();
        loop {
            let page = provider.read(seqs.len() as u64, 500).await.unwrap();
            seqs.extend(page.events.iter().filter_map(|event| event.seq));
            if page.events.is_empty() {
                break;
            }
        }
        assert!(seqs.iter().copied().eq(1..=seqs.len() as u64), "{seqs:?}");
        assert_eq!(acknowledged.len() - lost.len(), seqs.len());
    }
}
