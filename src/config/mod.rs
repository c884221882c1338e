//! The configuration: one strict tree, from a file, the environment and flags, in this order.
//!
//! The file is TOML, or YAML when its name ends in `.yaml` or `.yml`; a YAML file whose one key is `event_broker` is the
//! original broker's and loads unchanged. An environment variable `TIDEGATE_A__B_C` sets `a.b_c`. What is not known is
//! refused, never ignored. Here and nowhere else files and environment are read for settings.

mod instance;
mod original;
mod secrets;
mod tree;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::provider::{memory, nats, postgres, redis, sqlite};
use crate::{broker, host, http, metrics};

pub use tree::Setting;

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `false`: there is no broker, and `serve` says so and ends.
    pub enabled: bool,
    /// Where HTTP is served.
    pub listen: SocketAddr,
    /// The store, as a URL: `memory:`, `sqlite://PATH`, `postgres://USER:PASSWORD@HOST/DATABASE`, `redis://HOST` or
    /// `nats://HOST`.
    pub provider: String,
    /// Names this process; empty for the host's name. `${NAME}` is replaced by that environment variable.
    pub instance_id: String,
    /// Bounds that more than one part keeps.
    pub limits: Limits,
    /// What is logged, and how.
    pub log: Log,
    /// The broker.
    pub broker: broker::Options,
    /// The HTTP edge.
    pub http: http::Options,
    /// The store in memory.
    pub memory: memory::Options,
    /// The store in a SQLite file.
    pub sqlite: sqlite::Options,
    /// The store in a PostgreSQL database.
    pub postgres: postgres::Options,
    /// The store in a Redis server.
    pub redis: redis::Options,
    /// The store in a NATS server.
    pub nats: nats::Options,
    /// What runs plugins.
    pub host: host::Options,
    /// What each plugin is granted and configured with, by its name.
    pub plugins: BTreeMap<String, host::PluginOptions>,
}

/// Bounds that more than one part keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The largest payload of an event.
    pub max_payload: ByteSize,
    /// How long a chain of events that handlers publish may grow; 0 lets no handler publish.
    pub max_depth: u32,
    /// How many event types get metrics of their own; later ones count as `other`.
    pub metric_types: usize,
}

/// What is logged, and how. Always to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Lines for people, or one JSON object each.
    pub format: LogFormat,
    /// Which levels of which modules, such as `info` or `warn,tidegate=debug`. `RUST_LOG` wins.
    pub filter: String,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from(([127, 0, 0, 1], 7700)),
            provider: "sqlite://tidegate.db".to_owned(),
            instance_id: String::new(),
            limits: Limits::default(),
            log: Log::default(),
            broker: broker::Options::default(),
            http: http::Options::default(),
            memory: memory::Options::default(),
            sqlite: sqlite::Options::default(),
            postgres: postgres::Options::default(),
            redis: redis::Options::default(),
            nats: nats::Options::default(),
            host: host::Options::default(),
            plugins: BTreeMap::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let broker::Options { max_payload, max_depth, .. } = broker::Options::default();
        Self { max_payload: ByteSize::b(max_payload), max_depth, metric_types: metrics::DEFAULT_TYPES }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

/// The stores that this version serves, by the scheme of their URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderUrl {
    /// `memory:`.
    Memory,
    /// `sqlite://PATH`.
    Sqlite,
    /// `postgres://…` or `postgresql://…`.
    Postgres,
    /// `redis://HOST`, or `rediss://HOST` for TLS.
    Redis,
    /// `nats://HOST`, or `tls://HOST` for TLS.
    Nats,
}

impl ProviderUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `provider`: an unknown scheme, one that this version does not serve, or no path.
    pub fn parse(url: &str) -> Result<Self> {
        let served = "this version serves memory:, sqlite://PATH, postgres://USER:PASSWORD@HOST/DATABASE, redis://HOST and nats://HOST";
        let refuse = |reason: String| Err(Error::invalid("provider", secrets::without_password(url), reason));
        let (scheme, rest) = url.split_once(':').unwrap_or((url, ""));
        match (scheme, rest.strip_prefix("//").unwrap_or(rest)) {
            ("memory", "") => Ok(Self::Memory),
            ("memory", _) => refuse("must be memory: with nothing behind it".to_owned()),
            ("sqlite", "") => refuse("names no file: write sqlite://PATH".to_owned()),
            ("sqlite", _) if url.starts_with("sqlite://") => Ok(Self::Sqlite),
            ("sqlite", _) => refuse("must be sqlite://PATH".to_owned()),
            ("postgres" | "postgresql", "") => {
                refuse(format!("names no server: write {scheme}://USER:PASSWORD@HOST/DATABASE"))
            }
            ("postgres" | "postgresql", _) if rest.starts_with("//") => Ok(Self::Postgres),
            ("postgres" | "postgresql", _) => refuse(format!("must be {scheme}://USER:PASSWORD@HOST/DATABASE")),
            ("database", _) => refuse(
                "names no server: the original broker was handed its connection; set TIDEGATE_PROVIDER or --provider to \
                 postgres://USER:PASSWORD@HOST/DATABASE"
                    .to_owned(),
            ),
            ("redis" | "rediss" | "nats" | "tls", "") => refuse(format!("names no server: write {scheme}://HOST:PORT")),
            ("redis" | "rediss", _) if rest.starts_with("//") => Ok(Self::Redis),
            ("nats" | "tls", _) if rest.starts_with("//") => Ok(Self::Nats),
            ("redis" | "rediss" | "nats" | "tls", _) => refuse(format!("must be {scheme}://HOST:PORT")),
            _ => refuse(format!("unknown provider: {scheme}; {served}")),
        }
    }
}

/// Where settings come from, each overriding the one before.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file.
    pub file: Option<PathBuf>,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
    /// Flags, as settings.
    pub flags: Vec<Setting>,
}

impl Sources {
    /// Settings from `file`, this process's environment and `flags`.
    #[must_use]
    pub fn new(file: Option<PathBuf>, flags: Vec<Setting>) -> Self {
        // A variable that is no Unicode cannot be one of ours.
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self { file, environment: environment.collect(), flags }
    }

    /// `$XDG_CACHE_HOME/tidegate` or `~/.cache/tidegate`, as the XDG base directory specification has it: a path that
    /// is not absolute counts as none.
    fn user_cache(&self) -> Option<PathBuf> {
        let folder = |name: &str| self.variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(caches.join("tidegate"))
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.environment.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key, its value, where it was set and what it may be.
    pub fn load(sources: &Sources) -> Result<Self> {
        let base = sources.file.as_deref().map_or_else(|| Ok(Value::Object(serde_json::Map::new())), read_file)?;
        let mut settings = tree::from_environment(&sources.environment)?;
        settings.extend(sources.flags.iter().cloned());
        let origin = sources.file.as_ref().map(|file| file.display().to_string());
        let mut config: Self = tree::read(base, &settings, origin.as_deref())?;
        if let Some(filter) = sources.variable("RUST_LOG").filter(|filter| !filter.is_empty()) {
            filter.clone_into(&mut config.log.filter);
        }
        config.instance_id = instance::resolve(&config.instance_id, |name| sources.variable(name).map(str::to_owned))?;
        config.broker.instance_id.clone_from(&config.instance_id);
        config.broker.max_payload = config.limits.max_payload.as_u64();
        config.broker.max_depth = config.limits.max_depth;
        config.sqlite.url.clone_from(&config.provider);
        config.postgres.url.clone_from(&config.provider);
        config.redis.url.clone_from(&config.provider);
        config.nats.url.clone_from(&config.provider);
        config.host.plugins.clone_from(&config.plugins);
        config.host.max_payload = config.limits.max_payload.as_u64();
        config.host.user_cache = sources.user_cache();
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        self.broker.validate().map_err(|error| within("broker", error))?;
        self.http.validate(self.listen)?;
        self.host.validate()?;
        self.postgres.validate().map_err(|error| within("postgres", error))?;
        ProviderUrl::parse(&self.provider)?;
        if self.http.max_body.as_u64() < self.limits.max_payload.as_u64().saturating_mul(2) {
            let reason = "must be at least twice limits.max_payload: base64 and the event around it need room";
            return Err(Error::invalid("http.max_body", self.http.max_body.to_string(), reason));
        }
        Ok(())
    }

    /// What is in force, for people to read and to keep as a file; secrets are masked.
    ///
    /// # Errors
    /// [`Error::Invalid`] when some value has no form in TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(&self.to_json())
            .map_err(|error| Error::invalid("config", "", format!("cannot be shown as TOML: {error}")))
    }

    /// The store's URL for people to read: a password in it is masked.
    #[must_use]
    pub fn provider_shown(&self) -> String {
        secrets::without_password(&self.provider)
    }

    /// What is in force as JSON; secrets are masked.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut tree = serde_json::to_value(self).unwrap_or_default();
        secrets::mask(&mut tree);
        tree
    }
}

/// An error of a part, with the part's name before the field's. What several parts share keeps its name.
fn within(part: &str, error: Error) -> Error {
    match error {
        Error::Invalid { field, value, reason } if field != "instance_id" => {
            Error::Invalid { field: format!("{part}.{field}").into(), value, reason }
        }
        other => other,
    }
}

fn read_file(path: &Path) -> Result<Value> {
    let refuse = |reason: String| Error::invalid("config", path.display().to_string(), reason);
    let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "yaml" | "yml" => parse_yaml(&text).map_err(|error| match error {
            Problem::Syntax(words) => refuse(words),
            Problem::Content(error) => error,
        }),
        "toml" => toml::from_str(&text).map_err(|error| refuse(format!("is not TOML: {error}"))),
        _ => Err(refuse("must end in .toml, .yaml or .yml".to_owned())),
    }
}

/// What can be wrong with a YAML file.
enum Problem {
    Syntax(String),
    Content(Error),
}

fn parse_yaml(text: &str) -> Result<Value, Problem> {
    let tree: Value = serde_saphyr::from_str(text).map_err(|error| Problem::Syntax(format!("is not YAML: {error}")))?;
    match tree {
        Value::Null => Ok(Value::Object(serde_json::Map::new())),
        Value::Object(root) if root.contains_key("event_broker") => original::translate(root).map_err(Problem::Content),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests;
