//! The original broker's YAML, `event_broker:` …, translated into our tree.
//!
//! Every key that it knew is read and checked. What configures a store that this version does not serve, or that is not
//! the one in use, has no counterpart and goes no further.

use std::time::Duration;

use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::tree;
use crate::broker::Mode;
use crate::error::{Error, Result};
use crate::provider::nats::Storage;

/// The one key of the file.
const ROOT: &str = "event_broker";

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Original {
    enabled: bool,
    provider: String,
    mode: Mode,
    worker_count: u64,
    buffer_size: u64,
    instance_id: String,
    retry_policy: Retry,
    redis: Option<Redis>,
    nats: Option<Nats>,
    database: Option<Database>,
}

impl Default for Original {
    fn default() -> Self {
        Self {
            enabled: false,
            provider: "memory".to_owned(),
            mode: Mode::Async,
            worker_count: 10,
            buffer_size: 1_000,
            instance_id: String::new(),
            retry_policy: Retry::default(),
            redis: None,
            nats: None,
            database: None,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Retry {
    max_retries: u32,
    #[serde(with = "friendly::required")]
    initial_delay: Duration,
    #[serde(with = "friendly::required")]
    max_delay: Duration,
    backoff_factor: f64,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_retries: 3,
            initial_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(30),
            backoff_factor: 2.0,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Redis {
    stream_name: String,
    /// Subscriptions are what groups were.
    #[serde(rename = "consumer_group")]
    _consumer_group: String,
    max_len: Option<i64>,
    host: String,
    port: u16,
    password: String,
    db: u32,
}

impl Default for Redis {
    fn default() -> Self {
        Self {
            stream_name: "resolvespec:events".to_owned(),
            _consumer_group: String::new(),
            max_len: None,
            host: "localhost".to_owned(),
            port: 6379,
            password: String::new(),
            db: 0,
        }
    }
}

impl Redis {
    fn url(&self) -> String {
        // An address of IP version 6 stands in brackets in a URL, and need not have any here.
        let is_bare = self.host.contains(':') && !self.host.starts_with('[');
        let host = if is_bare { format!("[{}]", self.host) } else { self.host.clone() };
        format!("redis://{host}:{}/{}", self.port, self.db)
    }

    fn table(&self) -> Value {
        let mut table = json!({ "namespace": self.stream_name });
        if let Value::Object(table) = &mut table {
            if !self.password.is_empty() {
                table.insert("password".to_owned(), self.password.clone().into());
            }
            table.extend(self.max_len.map(|max_len| ("max_len".to_owned(), max_len.into())));
        }
        table
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Nats {
    url: String,
    stream_name: String,
    subjects: Vec<String>,
    storage: Storage,
    #[serde(with = "friendly::optional")]
    max_age: Option<Duration>,
}

impl Default for Nats {
    fn default() -> Self {
        Self {
            url: "nats://localhost:4222".to_owned(),
            stream_name: "RESOLVESPEC_EVENTS".to_owned(),
            subjects: Vec::new(),
            storage: Storage::File,
            max_age: None,
        }
    }
}

impl Nats {
    fn table(&self) -> Value {
        let max_age = self.max_age.map(|age| format!("{}us", age.as_micros()));
        let Self { stream_name, subjects, storage, .. } = self;
        json!({"namespace": stream_name, "subjects": subjects, "storage": storage, "max_age": max_age})
    }
}

/// The table and the channel are the original's own: ours have other names, in a schema of their own.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Database {
    #[serde(rename = "table_name")]
    _table_name: String,
    #[serde(rename = "channel")]
    _channel: String,
    #[serde(with = "friendly::optional")]
    poll_interval: Option<Duration>,
}

/// The tree that `root` means.
///
/// # Errors
/// [`Error::Invalid`] naming the key below `event_broker`.
pub(super) fn translate(mut root: Map<String, Value>) -> Result<Value> {
    let section = root.remove(ROOT).unwrap_or_default();
    if let Some(other) = root.keys().next() {
        let reason = "cannot stand beside event_broker: that is the original broker's file, which has no other key";
        return Err(Error::invalid(other.clone(), "", reason));
    }
    let section = if section.is_null() { Value::Object(Map::new()) } else { section };
    let original: Original = tree::read(section, &[], None).map_err(|error| super::within(ROOT, error))?;
    let poll = original.database.and_then(|database| database.poll_interval).filter(|every| !every.is_zero());
    let postgres = poll.map_or_else(|| json!({}), |every| json!({"poll_interval": format!("{}us", every.as_micros())}));
    let redis = (original.provider == "redis").then(|| original.redis.unwrap_or_default());
    let nats = (original.provider == "nats").then(|| original.nats.unwrap_or_default());
    let provider = match (&redis, &nats) {
        (Some(redis), _) => redis.url(),
        (_, Some(nats)) => nats.url.clone(),
        _ => provider(&original.provider)?,
    };
    Ok(json!({
        "postgres": postgres,
        "enabled": original.enabled,
        "provider": provider,
        "redis": redis.as_ref().map_or_else(|| json!({}), Redis::table),
        "nats": nats.as_ref().map_or_else(|| json!({}), Nats::table),
        "instance_id": original.instance_id,
        "broker": {
            "mode": original.mode,
            "worker_count": original.worker_count,
            "buffer_size": original.buffer_size,
            "retry": serde_json::to_value(original.retry_policy).unwrap_or_default(),
        },
    }))
}

/// The URL of a store that the original knew by name. Whether it is served is not decided here.
fn provider(name: &str) -> Result<String> {
    match name {
        "memory" | "database" => Ok(format!("{name}:")),
        other => Err(Error::invalid("event_broker.provider", other, format!("unknown provider: {other}"))),
    }
}
