//! The guest that misbehaves on demand, and calls of it without a broker.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::Value;
use tidegate::handler::{KvRead, Outcome};
use tidegate::host::component::embed_manifest;
use tidegate::host::{Host, Options, PluginOptions};
use tidegate::{Call, Event, Handler, Payload, Result, Source};
use tokio::sync::Notify;

/// A built sample.
pub(crate) fn guest(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/plugins/{name}.wasm"));
    match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) => panic!("{} cannot be read ({error}): run `make plugins` first", path.display()),
    }
}

pub(crate) const FAULTS: &str = r#"
    name = "faults"
    version = "1.0.0"
    [capabilities]
    kv = ["faults"]
    events = ["faulty.**"]
    config = ["greeting", "self-check"]
"#;

pub(crate) const GRANTS: &str = r#"
    grants = { kv = ["faults"], events = ["faulty.**"], config = ["greeting", "other", "self-check"] }
    config = { greeting = "hello" }
    limits = { host_calls = 1000000000000 }
"#;

/// The misbehaving guest with this much added to its manifest.
pub(crate) fn faults(more: &str) -> Vec<u8> {
    embed_manifest(&guest("faults"), &format!("{FAULTS}{more}")).unwrap()
}

/// A host that grants what the misbehaving guest asks for.
pub(crate) fn host() -> Host {
    let mut options = Options::default();
    options.plugins.insert("faults".to_owned(), toml::from_str::<PluginOptions>(GRANTS).unwrap());
    Host::new(options, None).unwrap()
}

/// The misbehaving guest, loaded with this much added to its manifest.
pub(crate) async fn loaded(host: &Host, more: &str) -> Arc<dyn Handler> {
    let plugin = host.load("faults.wasm", faults(more).into()).await.unwrap();
    host.handler(host.activate(plugin).name())
}

/// Committed values by key.
#[derive(Default)]
pub(crate) struct Values(pub(crate) HashMap<String, Bytes>);

#[async_trait]
impl KvRead for Values {
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        assert_eq!(bucket, "kv/faults/faults");
        Ok(self.0.get(key).cloned())
    }
}

/// A store that says when it is asked, and answers when it is let.
#[derive(Default)]
pub(crate) struct Gate {
    pub(crate) asked: Notify,
    pub(crate) open: Notify,
}

#[async_trait]
impl KvRead for Gate {
    async fn get(&self, _: &str, _: &str) -> Result<Option<Bytes>> {
        self.asked.notify_one();
        self.open.notified().await;
        Ok(None)
    }
}

pub(crate) fn call(payload: &Value) -> Call {
    let mut event = Event::new(Source::System, "faults.tests.create".parse().unwrap(), Payload::json(payload).unwrap());
    event.seq = Some(7);
    Call {
        event: Arc::new(event),
        subscription: "tests".into(),
        attempt: 1,
        max_attempts: 4,
        timeout: Duration::from_secs(30),
        is_replay: false,
        kv: Arc::new(Values::default()),
    }
}

pub(crate) async fn attempt(handler: &Arc<dyn Handler>, payload: Value) -> Outcome {
    handler.handle(call(&payload)).await
}

pub(crate) fn code(outcome: &Outcome) -> &str {
    outcome.fault.as_ref().map_or("", |fault| &fault.code)
}

pub(crate) fn reply(outcome: &Outcome) -> Value {
    let reply = outcome.reply.as_ref().unwrap_or_else(|| panic!("no reply: {outcome:?}"));
    serde_json::from_slice(&reply.body).unwrap()
}

/// The misbehaving guest under `options`, with this before and after the usual lines of its manifest.
pub(crate) async fn prepared(options: &str, before: &str, after: &str) -> Result<(Host, Arc<dyn Handler>)> {
    let mut all = Options::default();
    all.plugins.insert("faults".to_owned(), toml::from_str(&format!("{options}{GRANTS}")).unwrap());
    let host = Host::new(all, None).unwrap();
    let manifest = format!("{before}\n{FAULTS}{after}");
    let plugin = host.load("faults.wasm", embed_manifest(&guest("faults"), &manifest).unwrap().into()).await?;
    let handler = host.handler(host.activate(plugin).name());
    Ok((host, handler))
}

pub(crate) async fn batch(handler: &Arc<dyn Handler>, payloads: &[Value]) -> Option<Vec<Outcome>> {
    handler.handle_batch(payloads.iter().map(call).collect()).await
}

/// A budget of fuel, which no plugin has unless somebody gives it one.
pub(crate) const METERED: &str = "[limits]\nfuel = 500000000\n";
