//! Events in PostgreSQL: the store that several processes share.
//!
//! An inbox that anybody may write to in his own transaction, a log in which every event stands once, and narrow
//! deliveries that are leased with SKIP LOCKED. `seq` is given out under the lock of one row, so it follows the order
//! of commits. Almost every call is one statement over all it is about. Nothing is kept here that the database does not
//! have, but the numbers of subscriptions, which never change, and a guess of where ready deliveries begin. One
//! connection listens for hints of other processes; nothing depends on them.

mod append;
mod claim;
mod documents;
mod examine;
mod front;
mod hint;
mod lend;
mod listen;
mod names;
mod open;
mod operate;
mod read;
mod route;
mod row;
mod session;
mod settle;
mod trouble;
mod turn;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use tokio::sync::watch as channel;

use self::append::Numbers;
use self::front::Fronts;
use self::lend::Connections;
use self::listen::Relay;
use self::trouble::{Step, Turns};
use self::turn::Turn;
use super::finding::Opening;
use super::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, Clock, DeadLetterFilter, DeadLetterPage,
    Document, Documents, Durability, EventFilter, EventPage, Expect, Inbox, LeaseKey, LogPage, Provider, ProviderStats,
    Retention, RouteRequest, Routed, Settled, Settlement,
};
use crate::delivery::EventDetail;
use crate::error::{Error, Result};
use crate::event::Seq;

/// Where the database is, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…`. In the configuration it is `provider`.
    #[serde(skip)]
    pub url: String,
    /// The schema that holds the tables; made when it is not there.
    pub schema: String,
    /// The most connections of this process.
    pub max_connections: u32,
    /// How long a call waits for a connection.
    #[serde(with = "friendly::required")]
    pub acquire_timeout: Duration,
    /// How long a statement may take.
    #[serde(with = "friendly::required")]
    pub statement_timeout: Duration,
    /// How often to look whether another process has written.
    #[serde(with = "friendly::required")]
    pub poll_interval: Duration,
    /// Whether statements are prepared. `false` for PgBouncer in transaction mode.
    pub prepared: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: String::new(),
            schema: "tidegate".to_owned(),
            max_connections: 8,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(30),
            poll_interval: Duration::from_millis(500),
            prepared: true,
        }
    }
}

impl Options {
    /// Checks what the types do not already guarantee.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn validate(&self) -> Result<()> {
        open::quoted(&self.schema)?;
        let spans = [
            ("acquire_timeout", self.acquire_timeout),
            ("statement_timeout", self.statement_timeout),
            ("poll_interval", self.poll_interval),
        ];
        for (field, span) in spans {
            if span < Duration::from_millis(1) || span > Duration::from_secs(86_400) {
                return Err(Error::invalid(field, format!("{span:?}"), "must be between 1ms and 24h"));
            }
        }
        if self.max_connections < 2 {
            let reason = "must be at least 2: one to write, one to read";
            return Err(Error::invalid("max_connections", self.max_connections.to_string(), reason));
        }
        Ok(())
    }
}

/// The store in a PostgreSQL database.
pub struct PostgresProvider {
    store: Arc<Store>,
}

/// What every call needs.
struct Store {
    connections: Arc<Connections>,
    /// Quoted.
    schema: String,
    /// Server, database and user.
    place: String,
    /// The server's version.
    server: String,
    options: Options,
    /// How long a statement may take before it is given up on this side.
    limit: Duration,
    /// In tests, instead of the server's.
    clock: Option<Clock>,
    /// The numbers of subscriptions.
    names: Mutex<Numbers>,
    fronts: Mutex<Fronts>,
    turn: Turn,
    wake: channel::Sender<u64>,
    relay: Relay,
    is_closed: AtomicBool,
}

/// How much longer than the server this side waits, so that the server's word comes first.
const SLACK: Duration = Duration::from_secs(5);

/// How long a close waits for calls in progress.
const GRACE: Duration = Duration::from_secs(10);

impl PostgresProvider {
    /// Connects, and brings the schema up to date.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the setting that must change, [`Error::Incompatible`] when the schema was written by a
    /// newer version or by something else, and [`Error::Store`] when the server cannot be reached or fails.
    pub async fn open(options: Options) -> Result<Self> {
        Self::start(options, Opening::Migrate, None).await
    }

    /// As [`open`](Self::open), changing the schema or not.
    pub(crate) async fn open_for(options: Options, opening: Opening) -> Result<Self> {
        Self::start(options, opening, None).await
    }

    /// As [`open`](Self::open), with another clock than the server's.
    #[cfg(test)]
    async fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        Self::start(options, Opening::Migrate, Some(clock)).await
    }

    async fn start(options: Options, opening: Opening, clock: Option<Clock>) -> Result<Self> {
        options.validate()?;
        let open::Opened { pool, schema, place, server } = open::open(&options, opening).await?;
        let limit = options.statement_timeout.saturating_add(SLACK);
        let every = options.poll_interval.max(Duration::from_millis(1));
        let (names, fronts, turn) = (Mutex::default(), Mutex::default(), Turn::default());
        let (wake, is_closed) = (channel::Sender::new(0), AtomicBool::new(false));
        let connections = Arc::new(Connections::new(pool, options.max_connections, options.acquire_timeout));
        let relay = Relay::start(&connections, &options.schema, &wake).await;
        let store = Store {
            connections,
            schema,
            place,
            server,
            limit,
            clock,
            names,
            fronts,
            turn,
            wake,
            relay,
            is_closed,
            options,
        };
        let store = Arc::new(store);
        tokio::spawn(watch::run(Arc::downgrade(&store), every));
        Ok(Self { store })
    }

    /// Runs a call unless the store is closed, and puts what went wrong into words.
    async fn call<T>(&self, action: impl FnOnce() -> String, work: impl Future<Output = Step<T>> + Send) -> Result<T> {
        self.store.check_open()?;
        work.await.map_err(|trouble| trouble.told(action()))
    }

    /// As [`call`](Self::call), for work after which there may be something to claim or to read.
    async fn change<T>(
        &self,
        action: impl FnOnce() -> String,
        work: impl Future<Output = Step<T>> + Send,
    ) -> Result<T> {
        let answer = self.call(action, work).await?;
        self.store.wrote();
        Ok(answer)
    }
}

impl Store {
    fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(Error::Stopped("provider")) } else { Ok(()) }
    }

    /// What is remembered of where ready deliveries begin.
    fn fronts(&self) -> MutexGuard<'_, Fronts> {
        self.fronts.lock()
    }

    /// The time, where it is not the server's.
    fn now(&self) -> Option<i64> {
        self.clock.as_ref().map(|clock| clock())
    }
}

#[async_trait]
impl Provider for PostgresProvider {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            provider: "postgres",
            durability: Durability::Storage,
            grouping: true,
            shared: true,
            transactions: true,
            key_ordering: true,
            push: self.store.relay.is_told,
            inbox: Inbox::Polled,
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        let batch: Vec<&Append> = batch.iter().collect();
        self.change(|| format!("append {} events", batch.len()), self.store.append(&batch)).await
    }

    async fn route(&self, request: &RouteRequest<'_>) -> Result<Routed> {
        let routed = self.call(|| "take events from the inbox".to_owned(), self.store.route(request)).await?;
        if routed.taken > 0 {
            self.store.wrote();
        }
        Ok(routed)
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        let action = || format!("claim for {} subscriptions", request.wants.len());
        self.call(action, self.store.claim(request)).await
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        self.call(|| format!("renew {} leases", keys.len()), self.store.renew(keys, lease)).await
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        self.call(|| format!("settle {} attempts", batch.len()), self.store.settle(&batch)).await
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.call(|| "read the log".to_owned(), self.store.log(after, max)).await
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        self.call(|| "read an event".to_owned(), self.store.get(id)).await
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        self.call(|| "list events".to_owned(), self.store.list(filter)).await
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.call(|| "list dead letters".to_owned(), self.store.dead_letters(filter)).await
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        self.change(|| "amend deliveries".to_owned(), self.store.amend(&amendment)).await
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        self.call(|| "prune events".to_owned(), self.store.prune(retention)).await
    }

    async fn stats(&self) -> Result<ProviderStats> {
        self.call(|| "count".to_owned(), self.store.stats()).await
    }

    fn wake(&self) -> channel::Receiver<u64> {
        self.store.wake.subscribe()
    }

    async fn close(&self) -> Result<()> {
        if self.store.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        if tokio::time::timeout(GRACE, self.store.connections.close()).await.is_err() {
            tracing::warn!("connections were still busy when the store was closed");
        }
        self.store.tick();
        Ok(())
    }
}

#[async_trait]
impl Documents for PostgresProvider {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.call(|| "read a document".to_owned(), self.store.document(collection, key)).await
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        let action = || format!("store document {collection}/{key}");
        self.call(action, self.store.put(collection, key, &value, expect, ttl)).await
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        let action = || format!("remove document {collection}/{key}");
        self.call(action, self.store.delete(collection, key, expect)).await
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.call(|| "list documents".to_owned(), self.store.documents(collection, after, max)).await
    }
}

#[cfg(test)]
mod tests;
