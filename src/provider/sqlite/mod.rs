//! Events in one SQLite file: the store that needs nothing beside it.
//!
//! One writing connection in a task of its own, which commits what callers ask for at once as a group; some connections
//! that only read. Several processes may share the file. Nothing here keeps state that the file does not have; what is
//! remembered of it, the numbers of subscriptions and the newest events, never changes.

mod append;
mod claim;
mod documents;
mod examine;
mod inbox;
mod open;
mod operate;
mod read;
mod row;
mod settle;
mod statement;
mod writer;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqlitePool;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use self::documents::Put;
use self::writer::{Answer, Job, Request, Writer};
use super::finding::Opening;
use super::recent::Recent;
use super::{
    Amendment, Append, Appended, Capabilities, ClaimRequest, Claimed, Clock, DeadLetterFilter, DeadLetterPage,
    Document, Documents, Durability, EventFilter, EventPage, Expect, Inbox, LeaseKey, LogPage, Provider, ProviderStats,
    Retention, RouteRequest, Routed, Settled, Settlement,
};
use crate::delivery::EventDetail;
use crate::error::{Error, Result};
use crate::event::Seq;
use crate::provider::inbox::routed;

/// Where the file is, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// `sqlite://` and a path, relative to the working directory unless it begins with a slash. In the configuration
    /// it is `provider`.
    #[serde(skip, default = "Options::default_url")]
    pub url: String,
    /// How many connections read.
    pub readers: u32,
    /// How often to look whether another process has written.
    #[serde(with = "friendly::required")]
    pub poll_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { url: Self::default_url(), readers: 4, poll_interval: Duration::from_millis(50) }
    }
}

impl Options {
    fn default_url() -> String {
        "sqlite://tidegate.db".to_owned()
    }
}

/// Calls that wait for the writer beyond this many wait for room.
const QUEUE: usize = 1_024;

/// The store in a SQLite file.
pub struct SqliteProvider {
    jobs: mpsc::Sender<Job>,
    readers: SqlitePool,
    wake: watch::Sender<u64>,
    clock: Clock,
    is_closed: AtomicBool,
    path: PathBuf,
}

impl SqliteProvider {
    /// Opens the file, making it when there is none, and starts the task that writes.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `provider` when the file cannot be used, [`Error::Incompatible`] when it was written
    /// by a newer version or by something else, and [`Error::Store`] when SQLite fails.
    pub async fn open(options: Options) -> Result<Self> {
        Self::with_clock(options, system_clock()).await
    }

    /// As [`open`](Self::open), with another clock than the system's. All instances on one file should agree on it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        Self::start(options, Opening::Migrate, clock).await
    }

    /// As [`open`](Self::open), changing the schema or not.
    pub(crate) async fn open_for(options: Options, opening: Opening) -> Result<Self> {
        Self::start(options, opening, system_clock()).await
    }

    async fn start(options: Options, opening: Opening, clock: Clock) -> Result<Self> {
        let open::Opened { writer, checkpointer, readers, path } = open::open(&options, opening).await?;
        let wake = watch::Sender::new(0);
        let (jobs, queue) = mpsc::channel(QUEUE);
        let mut log = path.clone().into_os_string();
        log.push("-wal");
        let checkpoint = Arc::new(Notify::new());
        let writer = Writer {
            connection: writer,
            checkpoints: tokio::spawn(writer::checkpoints(checkpointer, Arc::clone(&checkpoint))),
            checkpoint,
            unmoved: 0,
            clock: Arc::clone(&clock),
            wake: wake.clone(),
            poll: options.poll_interval.max(Duration::from_millis(1)),
            log: log.into(),
            names: HashMap::new(),
            recent: Recent::default(),
            last_now: i64::MIN,
            data_version: 0,
            is_full: true,
        };
        tokio::spawn(writer.run(queue));
        Ok(Self { jobs, readers, wake, clock, is_closed: AtomicBool::new(false), path })
    }

    fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(Error::Stopped("provider")) } else { Ok(()) }
    }

    /// Has the writer do it, and waits until it is committed.
    async fn write(&self, request: Request) -> Result<Answer> {
        self.check_open()?;
        self.send(request).await
    }

    async fn send(&self, request: Request) -> Result<Answer> {
        let (answer, answered) = oneshot::channel();
        let stopped = Error::Stopped("provider");
        match self.jobs.send(Job { request, answer }).await {
            Ok(()) => answered.await.unwrap_or(Err(stopped)),
            Err(_) => Err(stopped),
        }
    }

    /// Words for what a reader ran into.
    fn failed(&self, action: &'static str) -> impl Fn(sqlx::Error) -> Error + '_ {
        move |error| match error {
            sqlx::Error::PoolClosed => Error::Stopped("provider"),
            error => Error::store("sqlite", action, error),
        }
    }
}

fn system_clock() -> Clock {
    Arc::new(|| crate::event::now().as_microsecond())
}

/// The writer answers each request in its own kind; anything else cannot happen, and is told as a failure if it does.
fn mismatch() -> Error {
    Error::store("sqlite", "answer a request", "the writer answered another one")
}

#[async_trait]
impl Provider for SqliteProvider {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            provider: "sqlite",
            durability: Durability::Storage,
            grouping: true,
            shared: true,
            transactions: true,
            key_ordering: true,
            push: true,
            inbox: Inbox::Hinted,
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        match self.write(Request::Append(batch)).await? {
            Answer::Append(appended) => Ok(appended),
            _ => Err(mismatch()),
        }
    }

    async fn route(&self, request: &RouteRequest<'_>) -> Result<Routed> {
        self.check_open()?;
        let rows = inbox::read(&self.readers, request).await.map_err(self.failed("read the inbox"))?;
        if rows.is_empty() {
            return Ok(Routed::default());
        }
        let appends = rows.into_iter().map(|row| Ok((row.position, row.into_append(request)?)));
        let appends = Arc::new(appends.collect::<Result<Vec<_>>>()?);
        match self.write(Request::Route(Arc::clone(&appends))).await? {
            Answer::Route(moved) => Ok(routed(appends.iter().map(|(_, append)| append).zip(moved))),
            _ => Err(mismatch()),
        }
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed> {
        match self.write(Request::Claim(request.clone())).await? {
            Answer::Claim(claimed) => Ok(claimed),
            _ => Err(mismatch()),
        }
    }

    async fn renew(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        match self.write(Request::Renew(keys.to_vec(), lease)).await? {
            Answer::Renew(held) => Ok(held),
            _ => Err(mismatch()),
        }
    }

    async fn settle(&self, batch: Vec<Settlement>) -> Result<Vec<Settled>> {
        match self.write(Request::Settle(batch)).await? {
            Answer::Settle(settled) => Ok(settled),
            _ => Err(mismatch()),
        }
    }

    async fn read(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.check_open()?;
        read::log(&self.readers, after, max).await.map_err(self.failed("read the log"))
    }

    async fn get(&self, id: &str) -> Result<Option<EventDetail>> {
        self.check_open()?;
        read::get(&self.readers, id).await.map_err(self.failed("read an event"))
    }

    async fn list(&self, filter: &EventFilter) -> Result<EventPage> {
        self.check_open()?;
        read::list(&self.readers, filter).await.map_err(self.failed("list events"))
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.check_open()?;
        read::dead_letters(&self.readers, filter).await.map_err(self.failed("list dead letters"))
    }

    async fn amend(&self, amendment: Amendment) -> Result<u64> {
        match self.write(Request::Amend(amendment)).await? {
            Answer::Amend(changed) => Ok(changed),
            _ => Err(mismatch()),
        }
    }

    async fn prune(&self, retention: &Retention) -> Result<u64> {
        let mut total = 0;
        loop {
            match self.write(Request::Prune(*retention)).await? {
                Answer::Prune(gone, true) => total += gone,
                Answer::Prune(gone, false) => return Ok(total + gone),
                _ => return Err(mismatch()),
            }
        }
    }

    async fn stats(&self) -> Result<ProviderStats> {
        self.check_open()?;
        let mut stats = read::stats(&self.readers).await.map_err(self.failed("count"))?;
        stats.provider_specific.insert("path".to_owned(), self.path.display().to_string().into());
        stats.provider_specific.insert("schema_version".to_owned(), open::served().into());
        Ok(stats)
    }

    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn close(&self) -> Result<()> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.readers.close().await;
        match self.send(Request::Close).await {
            Ok(_) | Err(Error::Stopped(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Documents for SqliteProvider {
    async fn document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        self.check_open()?;
        documents::get(&self.readers, collection, key, (self.clock)()).await.map_err(self.failed("read a document"))
    }

    async fn put_document(
        &self,
        collection: &str,
        key: &str,
        value: Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        let (collection, key) = (collection.to_owned(), key.to_owned());
        match self.write(Request::Put(Put { collection, key, value: Some(value), expect, ttl })).await? {
            Answer::Put(revision) => revision,
            _ => Err(mismatch()),
        }
    }

    async fn delete_document(&self, collection: &str, key: &str, expect: Expect) -> Result<bool> {
        let (collection, key) = (collection.to_owned(), key.to_owned());
        match self.write(Request::Put(Put { collection, key, value: None, expect, ttl: None })).await? {
            Answer::Put(was_there) => was_there.map(|count| count > 0),
            _ => Err(mismatch()),
        }
    }

    async fn list_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.check_open()?;
        let listed = documents::list(&self.readers, collection, after, max, (self.clock)()).await;
        listed.map_err(self.failed("list documents"))
    }
}

#[cfg(test)]
mod tests;
