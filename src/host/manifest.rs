//! `plugin.toml`: what a plugin is called, what it subscribes to and what it asks for.
//!
//! Strict: an unknown key or a value that breaks a rule is refused with its line. Nothing is granted here, since a
//! manifest only requests, and nothing is read from disk or out of a component.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use semver::Version;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::quote;
use crate::pattern::Pattern;
use crate::retry::{RetryOverrides, RetryPolicy};
use crate::subscription::{HandlerRef, Ordering, Start, Subscription, validate_name};

/// The content of a `plugin.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The plugin's name: 1–64 of `[a-z0-9-]`.
    #[serde(deserialize_with = "plugin_name")]
    pub name: String,
    /// Its own version. tidegate tells versions apart by digest; this one is for people.
    #[serde(deserialize_with = "version")]
    pub version: Version,
    /// One sentence about it.
    #[serde(default)]
    pub description: String,
    /// What it subscribes to by itself.
    #[serde(default)]
    pub subscribe: Vec<Subscribe>,
    /// Where it differs from the server's retry policy.
    #[serde(default)]
    pub retry: RetryOverrides,
    /// Where it differs from the server's limits.
    #[serde(default)]
    pub limits: Limits,
    /// How many events an instance may serve, one after the other; absent for a fresh instance per event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reuse: Option<NonZeroU32>,
    /// How many events it takes at once.
    #[serde(default)]
    pub batch: Batch,
    /// What it asks the operator for.
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// One `[[subscribe]]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subscribe {
    /// Which types it gets.
    pub pattern: Pattern,
    /// The subscription's name, see [`Manifest::subscriptions`] for the default.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "subscription_name")]
    pub name: Option<String>,
    /// The most attempts at once in one process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroU32>,
    /// Whether events of one key wait for each other.
    #[serde(default)]
    pub ordering: Ordering,
    /// Where in the log it begins when it is new.
    #[serde(default)]
    pub start: Start,
}

/// The `[batch]` table: how many events one call may have. For plugins that export a handler of batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// The most events of one call, 1 to 1024; 1 for none but single ones. Absent means 64.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "batch_size")]
    pub max: Option<NonZeroU32>,
}

/// The `[limits]` table: what one attempt may use. Absent means the server's default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of linear memory and tables, written as `"64MiB"` or a number.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub memory: Option<u64>,
    /// Units of fuel.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "count")]
    pub fuel: Option<u64>,
    /// How long an attempt may take, written as `"30s"`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub timeout: Option<Duration>,
    /// Bytes of a reply.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub reply: Option<u64>,
    /// Events that an attempt may publish; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_events: Option<u32>,
    /// Bytes of all published events together.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub published_bytes: Option<u64>,
    /// Reads and writes of key-value data; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_operations: Option<u32>,
    /// Bytes that are read from and written to key-value data.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub kv_bytes: Option<u64>,
    /// Calls of the host, whatever for.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "count")]
    pub host_calls: Option<u64>,
    /// Bytes of log that are kept of an attempt.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub log: Option<u64>,
}

/// The `[capabilities]` table: what the plugin requests. Logging, facts about the delivery, clocks and random numbers
/// need no request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// Names of key-value buckets: 1–64 of `[a-z0-9_-]`.
    #[serde(default, deserialize_with = "bucket_names")]
    pub kv: Vec<String>,
    /// Patterns of the types that it may publish.
    #[serde(default)]
    pub events: Vec<Pattern>,
    /// Keys of settings that it may read: 1–64 of `[A-Za-z0-9_.-]`.
    #[serde(default, deserialize_with = "setting_names")]
    pub config: Vec<String>,
    /// Where it may send HTTP requests to.
    #[serde(default)]
    pub http: Vec<HttpOrigin>,
}

/// Why a `plugin.toml` is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ManifestError {
    /// The line, counted from 1, when the fault is in one place.
    pub line: Option<usize>,
    /// What is wrong, with the field and its value.
    pub reason: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "plugin.toml line {line}: {}", self.reason),
            None => write!(f, "plugin.toml: {}", self.reason),
        }
    }
}

impl Manifest {
    /// Reads and checks the text of a `plugin.toml`.
    ///
    /// # Errors
    /// [`ManifestError`] with the line, the field and its value.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self = toml::from_str(text).map_err(|error| located(text, &error))?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The subscriptions that the plugin asks for, complete with its own retry policy and timeout.
    ///
    /// One without a name is called like the plugin when it is the only one, and otherwise has its place (from 1) after
    /// a dash: `audit-trail-2`.
    #[must_use]
    pub fn subscriptions(&self) -> Vec<Subscription> {
        (1_usize..).zip(&self.subscribe).map(|(place, subscribe)| self.subscription(place, subscribe)).collect()
    }

    fn subscription(&self, place: usize, subscribe: &Subscribe) -> Subscription {
        let name = match &subscribe.name {
            Some(name) => name.clone(),
            None if self.subscribe.len() == 1 => self.name.clone(),
            None => format!("{}-{place}", self.name),
        };
        Subscription {
            handler: HandlerRef::Plugin(Arc::from(self.name.as_str())),
            concurrency: subscribe.concurrency,
            ordering: subscribe.ordering,
            start: subscribe.start,
            retry: self.retry.clone(),
            timeout: self.limits.timeout,
            ..Subscription::new(&name, subscribe.pattern.clone())
        }
    }

    /// What no single field can say.
    fn validate(&self) -> Result<(), ManifestError> {
        let whole = |reason: String| ManifestError { line: None, reason };
        self.retry.resolve(&RetryPolicy::default()).validate().map_err(|error| whole(error.to_string()))?;
        if self.limits.timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(whole("limits.timeout = \"0s\" leaves no time: give it a length, such as \"30s\"".to_owned()));
        }
        let mut names = BTreeSet::new();
        for subscription in self.subscriptions() {
            if !names.insert(Arc::clone(&subscription.name)) {
                let name = quote(&subscription.name);
                return Err(whole(format!(
                    "two subscriptions are called {name}: give each [[subscribe]] its own name"
                )));
            }
        }
        Ok(())
    }
}

/// The reader's words, with the line and its text in place of a drawing.
fn located(text: &str, error: &toml::de::Error) -> ManifestError {
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return ManifestError { line: None, reason: error.message().to_owned() };
    };
    let index = before.matches('\n').count();
    let written: String = text.lines().nth(index).unwrap_or_default().trim().chars().take(SHOWN).collect();
    ManifestError { line: Some(index.saturating_add(1)), reason: format!("{} in `{written}`", error.message()) }
}

/// How much of a faulty line is shown, in characters.
const SHOWN: usize = 80;

/// Where HTTP requests may go: scheme, host and port, all three exactly.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HttpOrigin {
    /// `http` or `https`.
    pub scheme: &'static str,
    /// The host in lower case; an IPv6 address keeps its brackets.
    pub host: String,
    /// The port; 80 or 443 when it was not written.
    pub port: u16,
}

impl FromStr for HttpOrigin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("http origin {} must be http(s)://host or http(s)://host:port", quote(text));
        let (scheme, default, authority) = match text.split_once("://") {
            Some(("https", authority)) => ("https", 443, authority),
            Some(("http", authority)) => ("http", 80, authority),
            _ => return Err(refuse()),
        };
        // The colons of an IPv6 address stand inside its brackets.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| refuse())?),
            _ => (authority, default),
        };
        let is_v6 = host.starts_with('[') && host.ends_with(']');
        let legal =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') || is_v6 && b"[]:".contains(&byte);
        if host.is_empty() || port == 0 || !host.bytes().all(legal) {
            return Err(refuse());
        }
        Ok(Self { scheme, host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for HttpOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.scheme, self.host, self.port)
    }
}

impl Serialize for HttpOrigin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HttpOrigin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The longest name of a plugin, a bucket or a setting.
const MAX_NAME: usize = 64;

/// Checks a plugin's name: 1–64 of `[a-z0-9-]`.
///
/// # Errors
/// A fragment with the name and the rule.
pub fn check_plugin_name(name: &str) -> Result<(), String> {
    spelled("name", name, "a-z 0-9 -", |byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn spelled(what: &str, name: &str, alphabet: &str, legal: impl Fn(u8) -> bool) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(legal) {
        return Err(format!("{what} {} must be 1–{MAX_NAME} characters of {alphabet}", quote(name)));
    }
    Ok(())
}

fn plugin_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_plugin_name(&name).map_err(D::Error::custom)?;
    Ok(name)
}

fn subscription_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let name = String::deserialize(deserializer)?;
    validate_name("subscribe.name", &name).map_err(D::Error::custom)?;
    Ok(Some(name))
}

fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Version, D::Error> {
    let text = String::deserialize(deserializer)?;
    Version::parse(&text).map_err(|why| D::Error::custom(format!("version {} must be like 1.0.0: {why}", quote(&text))))
}

fn bucket_names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-');
    names(deserializer, "kv bucket", "a-z 0-9 _ -", legal)
}

fn setting_names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    names(deserializer, "config key", "A-Z a-z 0-9 _ . -", legal)
}

fn names<'de, D: Deserializer<'de>>(
    deserializer: D,
    what: &str,
    alphabet: &str,
    legal: impl Fn(u8) -> bool + Copy,
) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    names.iter().try_for_each(|name| spelled(what, name, alphabet, legal)).map_err(D::Error::custom)?;
    Ok(names)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match ByteSize::deserialize(deserializer)?.as_u64() {
        0 => Err(D::Error::custom("a size of 0 leaves nothing: give it a size, such as \"64KiB\"")),
        bytes => Ok(Some(bytes)),
    }
}

fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match u64::deserialize(deserializer)? {
        0 => Err(D::Error::custom("a limit of 0 leaves nothing: give it some, or leave it out")),
        units => Ok(Some(units)),
    }
}

/// The largest batch that can be asked for: what it holds is in memory at once, and it shares one timeout.
const MAX_BATCH: u32 = 1024;

fn batch_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU32>, D::Error> {
    let max = u32::deserialize(deserializer)?;
    match NonZeroU32::new(max).filter(|_| max <= MAX_BATCH) {
        Some(max) => Ok(Some(max)),
        None => Err(D::Error::custom(format!("batch.max = {max} must be from 1 to {MAX_BATCH}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "name = \"order-totals\"\nversion = \"1.0.0\"\n";

    #[test]
    fn a_manifest_with_every_key_is_read() {
        let text = r#"
            name = "order-totals"
            version = "1.2.0-beta.1"
            reuse = 100
            description = "Totals"
            [[subscribe]]
            pattern = "shop.orders.create"
            name = "totals"
            concurrency = 4
            ordering = "key"
            start = 17
            [[subscribe]]
            pattern = "shop.**"
            start = "earliest"
            [retry]
            max_retries = 5
            initial_delay = "250ms"
            max_delay = "1m"
            backoff_factor = 1.5
            jitter = 0.2
            max_age = "1h"
            [limits]
            memory = "64MiB"
            fuel = 500000000
            timeout = "30s"
            reply = "64KiB"
            published_events = 100
            published_bytes = "1MiB"
            kv_operations = 10
            kv_bytes = "64KiB"
            host_calls = 500
            log = 4096
            [batch]
            max = 32
            [capabilities]
            kv = ["totals"]
            events = ["shop.totals.*"]
            config = ["currency"]
            http = ["https://API.example.com", "http://[::1]:8080"]
        "#;
        let manifest = Manifest::parse(text).unwrap();
        assert_eq!((manifest.reuse, manifest.batch.max), (NonZeroU32::new(100), NonZeroU32::new(32)));
        assert_eq!(manifest.limits.memory, Some(64 * 1024 * 1024));
        assert_eq!(manifest.limits.log, Some(4096));
        assert_eq!((manifest.limits.kv_operations, manifest.limits.host_calls), (Some(10), Some(500)));
        assert_eq!(manifest.limits.timeout, Some(Duration::from_secs(30)));
        assert_eq!(manifest.capabilities.http[0].to_string(), "https://api.example.com:443");
        assert_eq!(manifest.capabilities.http[1].to_string(), "http://[::1]:8080");

        let subscriptions = manifest.subscriptions();
        assert_eq!(&*subscriptions[0].name, "totals");
        assert_eq!(subscriptions[0].start, Start::Seq(17));
        assert_eq!(subscriptions[0].handler, HandlerRef::Plugin("order-totals".into()));
        assert_eq!(subscriptions[0].retry.max_delay, Some(Duration::from_secs(60)));
        assert_eq!(&*subscriptions[1].name, "order-totals-2");
        assert_eq!(subscriptions[1].timeout, Some(Duration::from_secs(30)));

        let json = serde_json::to_string(&manifest).unwrap();
        assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
    }

    #[test]
    fn a_name_and_a_version_are_enough() {
        let manifest = Manifest::parse(HEAD).unwrap();
        assert!(manifest.subscriptions().is_empty());
        assert_eq!(manifest.capabilities, Capabilities::default());
        assert_eq!(manifest.retry, RetryOverrides::default());
    }

    #[test]
    fn a_single_subscription_is_called_like_its_plugin() {
        let manifest = Manifest::parse(&format!("{HEAD}[[subscribe]]\npattern = \"*\"\n")).unwrap();
        assert_eq!(&*manifest.subscriptions()[0].name, "order-totals");
    }

    #[test]
    fn a_broken_rule_is_refused_with_its_line_and_value() {
        let rows = [
            ("naem = \"x\"", "line 3: unknown field `naem`"),
            ("[limits]\nmemroy = 1", "line 4: unknown field `memroy`"),
            ("[[subscribe]]\npattern = \"a..b\"", "line 4: pattern: a segment cannot be empty (got \"a..b\")"),
            ("[[subscribe]]\npattern = \"*\"\nname = \"a b\"", "line 5: subscribe.name: "),
            ("[[subscribe]]\npattern = \"*\"\nordering = \"fifo\"", "line 5: unknown variant `fifo`"),
            ("[[subscribe]]\npattern = \"*\"\nconcurrency = 0", "line 5: "),
            ("[[subscribe]]\npattern = \"*\"\nstart = \"later\"", "line 5: "),
            ("[[subscribe]]\nname = \"a\"", "line 3: missing field `pattern`"),
            ("[retry]\ninitial_delay = \"soon\"", "line 4: "),
            ("[retry]\njitter = 2.0", "plugin.toml: retry.jitter: must be from 0 to 1 (got \"2\")"),
            ("[limits]\nmemory = \"much\"", "line 4: "),
            ("[limits]\nreply = 0", "line 4: a size of 0"),
            ("[limits]\nfuel = 0", "line 4: a limit of 0 leaves nothing: give it some, or leave it out in `fuel = 0`"),
            ("[limits]\nhost_calls = 0", "line 4: a limit of 0"),
            ("reuse = 0", "line 3: invalid value: integer `0`"),
            ("[batch]\nmax = 0", "line 4: batch.max = 0 must be from 1 to 1024"),
            ("[batch]\nmax = 1025", "line 4: batch.max = 1025 must be from 1 to 1024"),
            ("[limits]\ntimeout = \"0s\"", "plugin.toml: limits.timeout"),
            ("[capabilities]\nkv = [\"Totals\"]", "line 4: kv bucket \"Totals\" must be 1–64"),
            ("[capabilities]\nconfig = [\"\"]", "line 4: config key \"\" must be 1–64"),
            ("[capabilities]\nhttp = [\"api.example.com\"]", "line 4: http origin \"api.example.com\" must be"),
            ("[capabilities]\nsockets = true", "line 4: unknown field `sockets`"),
            (
                "[[subscribe]]\npattern = \"a\"\nname = \"x\"\n[[subscribe]]\npattern = \"b\"\nname = \"x\"",
                "called \"x\"",
            ),
            ("= 3", "line 3: "),
        ];
        for (tail, words) in rows {
            let error = Manifest::parse(&format!("{HEAD}{tail}\n")).unwrap_err().to_string();
            assert!(error.contains(words), "{tail:?}\n got: {error}\nwant: {words}");
        }
    }

    #[test]
    fn names_and_versions_keep_their_rules() {
        for (name, version, words) in [
            ("Order Totals", "1.0.0", "line 1: name \"Order Totals\" must be 1–64"),
            ("", "1.0.0", "line 1: name \"\" must be"),
            ("a_b", "1.0.0", "line 1: name \"a_b\" must be"),
            ("a", "1.0", "line 2: version \"1.0\" must be like 1.0.0"),
        ] {
            let error =
                Manifest::parse(&format!("name = \"{name}\"\nversion = \"{version}\"\n")).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(Manifest::parse("version = \"1.0.0\"").unwrap_err().reason.contains("missing field `name`"));
    }

    #[test]
    fn an_origin_is_three_parts_exactly() {
        for bad in [
            "",
            "https://",
            "ftp://a.b",
            "https://a.b/path",
            "https://a.b:0",
            "https://a.b:99999",
            "https://*.a.b",
            "https://user@a.b",
            "https://a.b:",
            "https://[::1",
            "HTTPS://a.b",
        ] {
            assert!(bad.parse::<HttpOrigin>().is_err(), "{bad}");
        }
        assert_eq!("http://localhost".parse::<HttpOrigin>().unwrap().port, 80);
    }
}
