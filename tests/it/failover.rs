//! A PostgreSQL whose standby takes over, beneath servers that run on.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::orders;
use crate::support::postgres::{Fsync, Postgres};
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::wire;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// The address in a URL.
fn address(server: &Postgres) -> String {
    server.url("").split_once('@').unwrap().1.trim_end_matches('/').to_owned()
}

/// Does it on a thread that may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect(what);
}

/// Publishes an order; the answer's status and text.
async fn publish(server: &Server, n: usize) -> (u16, String) {
    let (_, body) = orders::order(&n.to_string(), n);
    let answer = wire::post(&server.url, "/v1/events", body.to_string()).await;
    (answer.status, answer.text)
}

/// What the figures say of the listener.
async fn listener(server: &Server) -> Value {
    server.get("/v1/stats").await.json["provider_stats"]["provider_specific"]["listener"].clone()
}

/// With a synchronous standby, so that what was acknowledged is there too. An address leads to whichever of the two serves,
/// as an operator would have it.
#[tokio::test(flavor = "multi_thread")]
async fn servers_go_on_when_a_standby_takes_over_and_lose_nothing() {
    let (primary, standby) = blocking(|| {
        let primary = Postgres::start(Fsync::On);
        let standby = primary.standby();
        primary.psql("postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'");
        primary.psql("postgres", "SELECT pg_reload_conf()");
        (Arc::new(primary), Arc::new(standby))
    })
    .await;
    let proxy = Proxy::start(address(&primary)).await;
    let url = format!("postgres://postgres@{}/postgres?sslmode=disable", proxy.address());
    let folder = tempfile::tempdir().unwrap();
    let mut both = Vec::new();
    for name in ["one", "two"] {
        let arguments = orders::prepare(folder.path(), name, &url);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        both.push(Server::start(folder.path(), &arguments).await);
    }
    for n in 0..20 {
        let (status, text) = publish(&both[n % 2], n).await;
        assert_eq!(status, 202, "{text}");
    }
    let listening = async || listener(&both[0]).await == "listening" && listener(&both[1]).await == "listening";
    wait_until("nobody listens", listening).await;

    let killing = Arc::clone(&primary);
    blocking(move || killing.kill()).await;
    proxy.lead_to(address(&standby));
    // Until it is promoted it can only be read, and says so.
    let away = publish(&both[0], 20).await;
    assert_eq!(away.0, 503, "{away:?}");
    wait_until("the log does not say that the server can only be read", async || {
        both[0].log().contains("can only be read")
    })
    .await;
    let refused = blocking(move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(["migrate", "--json", "--provider", &url]).output().unwrap()
    })
    .await;
    let told: Value = serde_json::from_slice(&refused.stderr).unwrap();
    assert_eq!((refused.status.code(), &told["code"]), (Some(2), &json!("invalid")), "{told}");
    assert!(
        told["detail"].as_str().unwrap().contains("is a standby, which can only be read: name the primary"),
        "{told}"
    );

    let promoting = Arc::clone(&standby);
    blocking(move || promoting.psql("postgres", "SELECT pg_promote(true, 60)")).await;
    for n in 20..40 {
        wait_until("nothing is taken after the promotion", async || publish(&both[n % 2], n).await.0 == 202).await;
    }
    wait_until("nobody listens after the promotion", listening).await;
    let details = orders::settled(&both[0]).await;
    let orders = details.values().filter(|detail| detail["type"] == "shop.orders.create").count();
    assert_eq!(orders, 40);
    assert!(details.values().all(|detail| detail["status"] == "completed"));
    let wrong = orders::wrong_totals(&details);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
