//! Events in Redis: a stream as the log, and scripts that change what belongs together in one step.
//!
//! Every transition is one script (`lua/`), and the server runs one after the other: there is nothing to lock and nothing
//! half done. Any number of processes share a namespace. Nothing here keeps state that the server does not have, but the
//! newest events, which never change. A server that was flushed shows a new log under a new epoch.

mod append;
mod claim;
mod documents;
mod examine;
mod link;
mod listen;
mod open;
mod operate;
mod read;
mod row;
mod settle;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use parking_lot::{Mutex, MutexGuard};
use redis::Cmd;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::link::{Link, Script};
use self::open::{Place, Standing};
use super::finding::{Opening, pending};
use super::recent::Recent;
use super::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, Clock, DeadLetterFilter, DeadLetterPage,
    Document, Documents, Durability, EventFilter, EventPage, Expect, Inbox, LeaseKey, LogPage, Provider, ProviderStats,
    Retention, RouteRequest, Routed, Settled, Settlement,
};
use crate::delivery::EventDetail;
use crate::error::Result;
use crate::event::Seq;

/// The layout of keys and records that this version writes, as `lua/prelude.lua` notes it beside a new log.
const SCHEMA: u64 = 2;

/// Where the server is, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB][?namespace=NAME]`, or `rediss://` for TLS. In the configuration it is
    /// `provider`.
    #[serde(skip, default = "Options::default_url")]
    pub url: String,
    /// Keys begin with `{tidegate:NAMESPACE}:`. Instances that share it share everything. The URL's wins.
    #[serde(alias = "stream_name")]
    pub namespace: String,
    /// Who logs in, in place of the URL's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// With what, in place of the URL's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// What an acknowledged write survives, where the server does not say; otherwise it is read from its settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub durability: Option<Durability>,
    /// How long making a connection may take.
    #[serde(with = "friendly::required")]
    pub connect_timeout: Duration,
    /// How long an answer may take.
    #[serde(with = "friendly::required")]
    pub response_timeout: Duration,
    /// The original broker's bound on its stream. Not used, since it drops entries that nobody has read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_len: Option<i64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: Self::default_url(),
            namespace: "default".to_owned(),
            username: None,
            password: None,
            durability: None,
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(10),
            max_len: None,
        }
    }
}

impl Options {
    fn default_url() -> String {
        "redis://127.0.0.1:6379".to_owned()
    }
}

/// The store in a Redis server.
pub struct RedisProvider {
    link: Arc<Link>,
    /// What the server said of itself when it was last asked.
    standing: Mutex<Standing>,
    /// What an acknowledged write survives, where that is configured.
    promised: Option<Durability>,
    namespace: String,
    /// What all keys begin with.
    prefix: String,
    /// The key that scripts are called with, and know the others by.
    meta: String,
    /// In place of the server's clock.
    clock: Option<Clock>,
    /// Names this instance, so that it does not wake itself by its own messages.
    instance: String,
    wake: watch::Sender<u64>,
    listener: AbortHandle,
    recent: Mutex<Remembered>,
}

/// The newest events, and the epoch of the log that they stand in.
#[derive(Default)]
struct Remembered {
    epoch: String,
    recent: Recent,
}

impl Remembered {
    /// The events of this epoch; those of another are forgotten.
    fn of(&mut self, epoch: &str) -> &mut Recent {
        if self.epoch != epoch {
            epoch.clone_into(&mut self.epoch);
            self.recent.clear();
        }
        &mut self.recent
    }
}

impl RedisProvider {
    /// Connects, checks that the server can be trusted with events, makes the log where there is none, and starts the task
    /// that listens for other instances.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) naming `provider` or `redis.namespace` when the URL, the namespace or the server's eviction policy
    /// cannot be used, [`Error::Incompatible`](crate::Error::Incompatible) when the server is too old or the namespace was written in another layout,
    /// and [`Error::Store`](crate::Error::Store) when the server cannot be reached or refuses.
    pub async fn open(options: Options) -> Result<Self> {
        Self::build(options, Opening::Migrate, None).await
    }

    /// As [`open`](Self::open), or without making the log; then a server that may evict events is not refused either.
    pub(crate) async fn open_for(options: Options, opening: Opening) -> Result<Self> {
        Self::build(options, opening, None).await
    }

    /// As [`open`](Self::open), with another clock than the server's. All instances of a namespace should agree on it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        Self::build(options, Opening::Migrate, Some(clock)).await
    }

    async fn build(options: Options, opening: Opening, clock: Option<Clock>) -> Result<Self> {
        let place = Place::read(&options)?;
        // Fails when something else has chosen before, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        let link = Arc::new(Link::new(&place)?);
        let prefix = format!("{{tidegate:{}}}:", place.namespace);
        let meta = format!("{prefix}meta");
        link.connect().await?;
        let is_there = open::check_schema(&link, &meta).await?;
        if opening == Opening::AsItIs && !is_there {
            return Err(pending(format!("of namespace {} in {}", place.namespace, link.server), "is not made yet"));
        }
        let promised = options.durability;
        let standing = open::inspect(&link, promised, true).await?;
        if opening == Opening::Migrate {
            standing.check(&link, promised)?;
        }
        if options.max_len.is_some() {
            tracing::warn!(
                "redis.max_len is not used, since it would drop events that nobody has handled; see broker.keep_events"
            );
        }
        let instance = format!("{:016x}", rand::random::<u64>());
        if !is_there {
            let mut init = link.command("make the log", &open::INIT, &meta).await?;
            begin(&mut init, clock.as_ref(), &instance);
            link.run("make the log", &open::INIT, &init).await?;
        }
        let wake = watch::Sender::new(0);
        let listening = listen::run(Arc::clone(&link), format!("{prefix}wake"), instance.clone(), wake.clone());
        let listener = tokio::spawn(listening).abort_handle();
        tracing::info!(server = %link.server, version = %standing.version, durability = ?standing.durability, "connected");
        let (namespace, recent, standing) = (place.namespace, Mutex::default(), Mutex::new(standing));
        Ok(Self { link, standing, promised, namespace, prefix, meta, clock, instance, wake, listener, recent })
    }

    /// The beginning of a call of a script; its own arguments follow.
    async fn call(&self, action: &str, script: &Script) -> Result<Cmd> {
        let mut command = self.link.command(action, script, &self.meta).await?;
        begin(&mut command, self.clock.as_ref(), &self.instance);
        Ok(command)
    }

    /// How the server is set now. Its settings can be changed while it runs: where it has come to promise less, that is
    /// said once.
    async fn look(&self) -> Result<Standing> {
        let before = self.standing.lock().clone();
        let now = open::inspect(&self.link, self.promised, before.is_open).await?.or(&before);
        *self.standing.lock() = now.clone();
        if now.evicts() == Some(true) && before.evicts() != Some(true) {
            tracing::error!(
                server = %self.link.server, policy = now.policy,
                "the server drops events from now on when memory is short: CONFIG SET maxmemory-policy noeviction"
            );
        }
        if now.durability != before.durability {
            tracing::warn!(
                server = %self.link.server, appendonly = now.appendonly, appendfsync = now.appendfsync,
                before = ?before.durability, now = ?now.durability, "the server keeps data in another way from now on"
            );
        }
        Ok(now)
    }

    /// The key of this name.
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.recent.lock()
    }

    fn tick(&self) {
        self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
    }
}

/// What every script is told: the time where a test sets it, the epoch of a log that has to be made, and who calls.
fn begin(command: &mut Cmd, clock: Option<&Clock>, instance: &str) {
    match clock {
        Some(clock) => command.arg(clock()),
        None => command.arg(""),
    };
    command.arg(uuid::Uuid::new_v4().to_string()).arg(instance);
}

/// A span in microseconds; what is too long for a script's numbers is as long as they are exact.
fn as_micros(span: Duration) -> i64 {
    const EXACT: i64 = 1 << 52;
    i64::try_from(span.as_micros()).unwrap_or(EXACT).min(EXACT)
}

impl Drop for RedisProvider {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

#[async_trait]
impl Provider for RedisProvider {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            provider: "redis",
            durability: self.standing.lock().durability,
            grouping: true,
            shared: true,
            transactions: true,
            key_ordering: true,
            push: true,
            inbox: Inbox::None,
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        let appended = self.append_all(&batch).await?;
        self.tick();
        Ok(appended)
    }

    async fn route(&self, _request: &RouteRequest<'_>) -> Result<Routed> {
        self.link.check_open().map(|()| Routed::default())
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        self.claim_all(request).await
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        self.renew_all(keys, lease).await
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        let settled = self.settle_all(&batch).await?;
        self.tick();
        Ok(settled)
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.page(after, max).await
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        self.detail(id).await
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        self.list_events(filter).await
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.list_dead(filter).await
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        let changed = match amendment {
            Amendment::Redrive(filter) => self.redrive(filter).await,
            Amendment::Replay(replay) => self.replay(&replay).await,
            Amendment::Cancel { subscription } => self.cancel(&subscription).await,
            Amendment::Erase { id } => self.erase(&id).await,
        };
        self.tick();
        changed
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        // The broker comes by every minute.
        self.look().await?;
        self.prune_all(retention).await
    }

    async fn stats(&self) -> Result<ProviderStats> {
        self.figures().await
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn close(&self) -> Result<()> {
        if self.link.close() {
            self.listener.abort();
            self.tick();
        }
        Ok(())
    }
}

#[async_trait]
impl Documents for RedisProvider {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.find_document(collection, key).await
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        self.change_document(collection, key, Some(&value), expect, ttl).await
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        self.change_document(collection, key, None, expect, None).await.map(|was_there| was_there > 0)
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.page_of_documents(collection, after, max).await
    }
}

#[cfg(test)]
mod tests;
