//! Where the server is, and whether it can be trusted with events: its version, its eviction policy, what it writes down.

use std::time::Duration;

use redis::{ConnectionInfo, IntoConnectionInfo as _, Value};

use super::link::{Link, Script};
use super::row;
use super::{Options, SCHEMA};
use crate::error::{Error, Result, nearest};
use crate::provider::Durability;

/// Makes the log where there is none.
pub(super) static INIT: Script = Script::new(concat!(include_str!("lua/prelude.lua"), include_str!("lua/init.lua")));

/// The oldest version that is served.
const OLDEST: u64 = 7;

/// The server, and the part of it that is used.
pub(super) struct Place {
    pub(super) info: ConnectionInfo,
    /// For messages.
    pub(super) server: String,
    pub(super) namespace: String,
    pub(super) connect_timeout: Duration,
    pub(super) response_timeout: Duration,
}

impl Place {
    /// Reads `redis://[user[:password]@]host[:port][/db][?namespace=…]`.
    pub(super) fn read(options: &Options) -> Result<Self> {
        let server = without_login(&options.url);
        let refuse = |reason: String| Error::invalid("provider", &server, reason);
        let form = "must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB][?namespace=NAME], or rediss:// for TLS";
        let mut url = redis::parse_redis_url(&options.url).ok_or_else(|| refuse(form.to_owned()))?;
        if !matches!(url.scheme(), "redis" | "rediss") || url.host_str().is_none_or(str::is_empty) {
            return Err(refuse(form.to_owned()));
        }
        if url.fragment().is_some() {
            return Err(refuse("can have nothing behind a #: certificates are always checked".to_owned()));
        }
        let mut namespace = options.namespace.clone();
        for (name, value) in url.query_pairs() {
            if name != "namespace" {
                let hint = nearest(&name, ["namespace"]).map(|name| format!("; did you mean {name}?"));
                return Err(refuse(format!("{name} is no parameter{}", hint.unwrap_or_default())));
            }
            namespace = value.into_owned();
        }
        check_namespace(&namespace)?;
        for (name, bound) in [("connect", options.connect_timeout), ("response", options.response_timeout)] {
            if bound.is_zero() {
                return Err(Error::invalid(format!("redis.{name}_timeout"), "0s", "must be longer than nothing"));
            }
        }
        url.set_query(None);
        if url.path().trim_matches('/').parse::<u32>().is_err() && !url.path().trim_matches('/').is_empty() {
            return Err(refuse(format!("the database must be a number, not {}", url.path().trim_matches('/'))));
        }
        let info = url.into_connection_info().map_err(|error| refuse(error.to_string()))?;
        let mut login = info.redis_settings().clone();
        if let Some(username) = &options.username {
            login = login.set_username(username);
        }
        if let Some(password) = &options.password {
            login = login.set_password(password);
        }
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        Ok(Self {
            info: info.set_redis_settings(login).set_tcp_settings(tcp),
            server,
            namespace,
            connect_timeout: options.connect_timeout,
            response_timeout: options.response_timeout,
        })
    }
}

fn check_namespace(namespace: &str) -> Result<()> {
    let is_legal = |c: char| !c.is_control() && !c.is_whitespace() && c != '{' && c != '}';
    if namespace.is_empty() || namespace.len() > 100 || !namespace.chars().all(is_legal) {
        let reason = "must be 1 to 100 bytes without spaces, control characters and braces";
        return Err(Error::invalid("redis.namespace", namespace, reason));
    }
    Ok(())
}

/// A URL without who logs in, and without its parameters.
fn without_login(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("redis", ""));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    format!("{scheme}://{host}")
}

/// What the server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) version: String,
    pub(super) durability: Durability,
    pub(super) appendonly: String,
    pub(super) appendfsync: String,
    pub(super) policy: String,
    /// Whether it answers CONFIG GET; otherwise less is known.
    pub(super) is_open: bool,
}

/// Shown where the server does not say.
const UNKNOWN: &str = "unknown";

impl Standing {
    /// Says what neither the server nor `promised` tells, and refuses one that may drop events.
    pub(super) fn check(&self, link: &Link, promised: Option<Durability>) -> Result<()> {
        let is_silent = self.appendonly == UNKNOWN || (self.appendonly == "yes" && self.appendfsync == UNKNOWN);
        if is_silent && promised.is_none() {
            tracing::warn!(
                server = %link.server,
                "the server does not say how it keeps data: nothing is promised; set redis.durability to what it does"
            );
        }
        check_policy(link, &self.policy)
    }

    /// What is known once the server has been asked again: what it does not say this time is as it was.
    pub(super) fn or(self, before: &Self) -> Self {
        let is_said = self.version != UNKNOWN && self.is_open == before.is_open;
        if is_said { self } else { before.clone() }
    }

    /// Whether the server may drop events when memory is short; `None` where it does not say.
    pub(super) fn evicts(&self) -> Option<bool> {
        (self.policy != UNKNOWN).then(|| self.policy != "noeviction")
    }
}

/// Asks the server what it is; its configuration too, unless it is known to keep that to itself.
pub(super) async fn inspect(link: &Link, promised: Option<Durability>, is_open: bool) -> Result<Standing> {
    // A server may forbid either; that both are forbidden is told below, by what is not known then.
    let info = link.query("ask for the server's state", &redis::cmd("INFO")).await;
    let info = info.ok().map(row::text).unwrap_or_default();
    let of_info = |name: &str| {
        let lines = info.lines().filter_map(|line| line.trim_end().split_once(':'));
        lines.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    let mut command = redis::cmd("CONFIG");
    command.arg("GET").arg("appendonly").arg("appendfsync").arg("maxmemory-policy");
    let config = match is_open {
        true => link.query("read the server's configuration", &command).await.map(row::texts),
        false => Ok(Vec::new()),
    };
    let config = match config {
        Err(Error::Store { action, source, .. }) => {
            tracing::info!(%action, %source, "the server keeps its configuration to itself");
            Vec::new()
        }
        config => config?,
    };
    let of_config = |name: &str| {
        let mut pairs = config.chunks_exact(2);
        pairs
            .find_map(|pair| Some((pair.first()?, pair.last()?)).filter(|(key, _)| *key == name))
            .map(|(_, v)| v.clone())
    };
    let version = of_info("redis_version").unwrap_or_else(|| UNKNOWN.to_owned());
    check_version(link, &version)?;
    let policy = of_config("maxmemory-policy").or_else(|| of_info("maxmemory_policy"));
    let policy = policy.unwrap_or_else(|| UNKNOWN.to_owned());
    let aof = of_info("aof_enabled").map(|enabled| if enabled == "1" { "yes" } else { "no" }.to_owned());
    let appendonly = of_config("appendonly").or(aof).unwrap_or_else(|| UNKNOWN.to_owned());
    let appendfsync = of_config("appendfsync").unwrap_or_else(|| UNKNOWN.to_owned());
    let durability = promised.unwrap_or_else(|| stated(&appendonly, &appendfsync));
    Ok(Standing { version, durability, appendonly, appendfsync, policy, is_open: !config.is_empty() })
}

/// What an acknowledged write survives, by the server's settings.
fn stated(appendonly: &str, appendfsync: &str) -> Durability {
    match (appendonly, appendfsync) {
        ("yes", "always") => Durability::Storage,
        ("yes", "everysec") => Durability::Os,
        // When the file reaches the disk is the kernel's choice: nothing can be promised.
        _ => Durability::Process,
    }
}

fn check_version(link: &Link, version: &str) -> Result<()> {
    let major = version.split('.').next().and_then(|major| major.parse::<u64>().ok());
    if major.is_some_and(|major| major < OLDEST) {
        let reason = format!("runs version {version}, and {OLDEST}.0 or newer is needed");
        return Err(Error::Incompatible { what: link.server.clone(), reason: reason.into() });
    }
    Ok(())
}

fn check_policy(link: &Link, policy: &str) -> Result<()> {
    match policy {
        "noeviction" => Ok(()),
        UNKNOWN => {
            let words = "the server does not say whether it evicts keys: its maxmemory-policy must be noeviction";
            tracing::warn!(server = %link.server, "{words}");
            Ok(())
        }
        other => Err(Error::invalid(
            "provider",
            &link.server,
            format!(
                "the server's maxmemory-policy is {other}, which drops events when memory is short: \
                 CONFIG SET maxmemory-policy noeviction, and `maxmemory-policy noeviction` in redis.conf"
            ),
        )),
    }
}

/// Whether there is a log; refuses one of another layout, and whoever may not read it.
pub(super) async fn check_schema(link: &Link, key: &str) -> Result<bool> {
    let mut command = redis::cmd("HGET");
    command.arg(key).arg("schema");
    let schema = link.first_query("read the schema", &command).await?;
    if schema == Value::Nil {
        return Ok(false);
    }
    let schema = row::text(schema).parse().unwrap_or(u64::MAX);
    if schema != SCHEMA {
        // No release has written an older one: there is nothing to bring up to date.
        let what_to_do = match schema > SCHEMA {
            true => "use the newer tidegate",
            false => "use another namespace, or the tidegate that wrote it",
        };
        let reason = format!("has schema {schema} under {key}; this version knows {SCHEMA}: {what_to_do}");
        return Err(Error::Incompatible { what: link.server.clone(), reason: reason.into() });
    }
    Ok(true)
}
