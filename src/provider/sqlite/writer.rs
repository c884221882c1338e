//! The one writer: takes what callers ask for, commits what came in meanwhile as one group, and then answers.
//!
//! Callers that wait at once share one commit, and mostly one statement too. When a group fails, each request is done
//! again alone, so that nobody suffers for his neighbour.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::documents::Put;
use crate::error::{Error, Result};
use crate::provider::recent::Recent;
use crate::provider::{
    Amendment, Append, Appended, ClaimRequest, Claimed, Clock, LeaseKey, Retention, Settled, Settlement,
};

/// The most requests of one commit.
const GROUP: usize = 256;

/// The most events and attempts of one commit, unless a single request has more.
const WEIGHT: usize = 4_096;

/// So many rows are written between two checkpoints.
const MOVE_AFTER: usize = 4_096;

/// A write-ahead log longer than this is emptied when there is time.
const LONG_LOG: u64 = 64 << 20;

/// Something to be written.
pub(super) enum Request {
    Append(Vec<Append>),
    /// Rows of the inbox by their positions, as what they become.
    Route(Arc<Vec<(i64, Append)>>),
    Claim(ClaimRequest),
    Renew(Vec<LeaseKey>, Duration),
    Settle(Vec<Settlement>),
    Amend(Amendment),
    Prune(Retention),
    Put(Put),
    Close,
}

/// What came of a [`Request`].
pub(super) enum Answer {
    Append(Vec<Appended>),
    /// For each row what became of it; `None` where it was gone already.
    Route(Vec<Option<Appended>>),
    Claim(Claimed),
    Renew(Vec<bool>),
    Settle(Vec<Settled>),
    Amend(u64),
    Prune(u64, bool),
    Put(Result<u64>),
    Close,
}

impl Request {
    /// Whether others may want to look after it.
    fn ticks(&self) -> bool {
        matches!(self, Self::Append(_) | Self::Route(_) | Self::Settle(_) | Self::Amend(_))
    }

    /// Whether losing it in a crash only means another attempt.
    fn may_be_lost(&self) -> bool {
        matches!(self, Self::Claim(_) | Self::Renew(..))
    }

    /// How many rows it is about, roughly.
    fn weight(&self) -> usize {
        match self {
            Self::Append(batch) => batch.len(),
            Self::Route(rows) => rows.len(),
            Self::Settle(batch) => batch.len(),
            _ => 1,
        }
    }

    fn action(&self) -> String {
        match self {
            Self::Append(batch) => format!("append {} events", batch.len()),
            Self::Route(rows) => format!("route {} events", rows.len()),
            Self::Claim(request) => format!("claim for {} subscriptions", request.wants.len()),
            Self::Renew(keys, _) => format!("renew {} leases", keys.len()),
            Self::Settle(batch) => format!("settle {} attempts", batch.len()),
            Self::Amend(_) => "amend deliveries".to_owned(),
            Self::Prune(_) => "prune events".to_owned(),
            Self::Put(put) => format!("store document {}/{}", put.collection, put.key),
            Self::Close => "close".to_owned(),
        }
    }
}

/// A request and where its answer goes.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) answer: oneshot::Sender<Result<Answer>>,
}

/// Why a transaction cannot be committed as it is.
pub(super) enum Trouble {
    /// What was taken for granted does not hold: look first.
    Careful,
    Store(sqlx::Error),
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error)
    }
}

pub(super) type Step<T> = std::result::Result<T, Trouble>;

/// A span in microseconds; what is too long for the type is as long as the type allows.
pub(super) fn as_micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// A transaction.
pub(super) struct Tx<'a> {
    pub(super) connection: &'a mut SqliteConnection,
    pub(super) now: i64,
    pub(super) recent: &'a mut Recent,
    names: &'a mut HashMap<Arc<str>, i64>,
}

impl Tx<'_> {
    /// The number of a subscription, which it gets when it is new.
    pub(super) async fn subscription(&mut self, name: &Arc<str>) -> Step<i64> {
        if let Some(&id) = self.names.get(name) {
            return Ok(id);
        }
        let text =
            "INSERT INTO subscriptions (name) VALUES (?) ON CONFLICT (name) DO UPDATE SET name = name RETURNING id";
        let id: i64 = sqlx::query_scalar(text).bind(&**name).fetch_one(&mut *self.connection).await?;
        if id >> super::row::SUBSCRIPTION_BITS != 0 {
            return Err(sqlx::Error::Protocol("more than a million names of subscriptions".to_owned()).into());
        }
        self.names.insert(Arc::clone(name), id);
        Ok(id)
    }

    /// Does all requests, merging what can be.
    async fn run(&mut self, requests: &[&Request], careful: bool) -> Step<Vec<Answer>> {
        let settlements: Vec<&Settlement> = requests
            .iter()
            .flat_map(|request| if let Request::Settle(batch) = request { batch.as_slice() } else { &[] })
            .collect();
        let mut settled = self.settle(&settlements, careful).await?.into_iter();
        let appends: Vec<&Append> = requests
            .iter()
            .flat_map(|request| if let Request::Append(batch) = request { batch.as_slice() } else { &[] })
            .collect();
        let mut appended = self.append(&appends, careful).await?.into_iter();
        let mut answers = Vec::with_capacity(requests.len());
        for request in requests {
            answers.push(match request {
                Request::Append(batch) => Answer::Append(appended.by_ref().take(batch.len()).collect()),
                Request::Settle(batch) => Answer::Settle(settled.by_ref().take(batch.len()).collect()),
                Request::Route(rows) => Answer::Route(self.route(rows, careful).await?),
                Request::Claim(request) => Answer::Claim(self.claim(request).await?),
                Request::Renew(keys, lease) => Answer::Renew(self.renew(keys, *lease).await?),
                Request::Amend(amendment) => Answer::Amend(self.amend(amendment).await?),
                Request::Prune(retention) => {
                    let (gone, is_more) = self.prune(retention).await?;
                    Answer::Prune(gone, is_more)
                }
                Request::Put(put) => Answer::Put(self.put(put).await?),
                Request::Close => Answer::Close,
            });
        }
        Ok(answers)
    }
}

/// The task that writes.
pub(super) struct Writer {
    pub(super) connection: SqliteConnection,
    pub(super) clock: Clock,
    pub(super) wake: watch::Sender<u64>,
    pub(super) poll: Duration,
    /// Wakes [`checkpoints`].
    pub(super) checkpoint: Arc<Notify>,
    /// Its task.
    pub(super) checkpoints: JoinHandle<()>,
    /// Rows written since it was woken.
    pub(super) unmoved: usize,
    /// The write-ahead log's file.
    pub(super) log: PathBuf,
    pub(super) names: HashMap<Arc<str>, i64>,
    pub(super) recent: Recent,
    pub(super) last_now: i64,
    pub(super) data_version: i64,
    pub(super) is_full: bool,
}

impl Writer {
    /// Works until it is told to close, or nobody can ask any more.
    pub(super) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut next_look = Instant::now() + self.poll;
        let mut closing = None;
        while closing.is_none() {
            if Instant::now() >= next_look {
                self.look_around().await;
                next_look = Instant::now() + self.poll;
            }
            match tokio::time::timeout_at(next_look, jobs.recv()).await {
                Ok(None) => break,
                Ok(Some(job)) => closing = self.group(job, &mut jobs).await,
                Err(_) => {}
            }
        }
        jobs.close();
        self.checkpoints.abort();
        if let Err(error) = self.empty_log().await {
            tracing::warn!(error = %error, "the write-ahead log could not be emptied at close");
        }
        if let Err(error) = self.connection.close().await {
            tracing::warn!(error = %error, "the writing connection could not be closed");
        }
        tick(&self.wake);
        if let Some(answer) = closing {
            // Whoever asked may have gone.
            drop(answer.send(Ok(Answer::Close)));
        }
    }

    /// Commits a job together with those that wait already. Returns whom to tell when one of them is to close.
    async fn group(&mut self, first: Job, jobs: &mut mpsc::Receiver<Job>) -> Option<oneshot::Sender<Result<Answer>>> {
        // Callers that were just answered get the chance to be of the next group.
        tokio::task::yield_now().await;
        let (mut group, mut closing) = (Vec::new(), None);
        let mut next = Some(first);
        let mut weight = 0;
        while let Some(job) = next.take() {
            weight += job.request.weight();
            match job.request {
                Request::Close => closing = Some(job.answer),
                _ => group.push(job),
            }
            if group.len() < GROUP && weight < WEIGHT && closing.is_none() {
                next = jobs.try_recv().ok();
            }
        }
        self.commit(group).await;
        closing
    }

    async fn commit(&mut self, group: Vec<Job>) {
        if group.is_empty() {
            return;
        }
        let (group, callers): (Vec<Request>, Vec<_>) = group.into_iter().map(|job| (job.request, job.answer)).unzip();
        let requests: Vec<&Request> = group.iter().collect();
        match self.transact(&requests).await {
            Ok(answers) => {
                // Whoever is answered has gone, or goes on while the requests are freed here.
                for (caller, answer) in callers.into_iter().zip(answers) {
                    drop(caller.send(Ok(answer)));
                }
            }
            Err(error) if group.len() > 1 && !is_busy(&error) => {
                for (caller, request) in callers.into_iter().zip(&group) {
                    let answer = self.transact(&[request]).await;
                    let answer = answer.map(|mut answers| answers.pop().unwrap_or(Answer::Close));
                    drop(caller.send(answer.map_err(|error| Error::store("sqlite", request.action(), error))));
                }
            }
            Err(error) => {
                for (caller, request) in callers.into_iter().zip(&group) {
                    drop(caller.send(Err(Error::store("sqlite", request.action(), copy(&error)))));
                }
            }
        }
        self.unmoved += group.iter().map(Request::weight).sum::<usize>();
        if self.unmoved > MOVE_AFTER {
            self.unmoved = 0;
            self.checkpoint.notify_one();
        }
        if group.iter().any(Request::ticks) {
            tick(&self.wake);
        }
    }

    async fn transact(&mut self, requests: &[&Request]) -> sqlx::Result<Vec<Answer>> {
        self.set_durability(!requests.iter().all(|request| request.may_be_lost())).await?;
        for careful in [false, true] {
            match self.attempt(requests, careful).await {
                Ok(answers) => return Ok(answers),
                Err(Trouble::Careful) => self.roll_back().await?,
                Err(Trouble::Store(error)) => {
                    self.roll_back().await?;
                    return Err(error);
                }
            }
        }
        Err(sqlx::Error::Protocol("rows changed within a transaction".to_owned()))
    }

    async fn attempt(&mut self, requests: &[&Request], careful: bool) -> Step<Vec<Answer>> {
        sqlx::query("BEGIN IMMEDIATE").execute(&mut self.connection).await?;
        self.last_now = self.last_now.max((self.clock)());
        let (recent, names) = (&mut self.recent, &mut self.names);
        let mut tx = Tx { connection: &mut self.connection, now: self.last_now, recent, names };
        let answers = tx.run(requests, careful).await?;
        sqlx::query("COMMIT").execute(&mut self.connection).await?;
        Ok(answers)
    }

    async fn roll_back(&mut self) -> sqlx::Result<()> {
        self.names.clear();
        self.recent.clear();
        match sqlx::query("ROLLBACK").execute(&mut self.connection).await {
            // A transaction that could not begin, or that SQLite itself ended, is rolled back already.
            Err(sqlx::Error::Database(_)) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn set_durability(&mut self, is_full: bool) -> sqlx::Result<()> {
        if self.is_full != is_full {
            let text = if is_full { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
            sqlx::query(text).execute(&mut self.connection).await?;
            self.is_full = is_full;
        }
        Ok(())
    }

    /// Looks whether another process has written, and whether the write-ahead log has grown long.
    async fn look_around(&mut self) {
        let version = sqlx::query_scalar("PRAGMA data_version").fetch_one(&mut self.connection).await;
        match version {
            Ok(version) if version == self.data_version => {}
            Ok(version) => {
                self.data_version = version;
                tick(&self.wake);
            }
            Err(error) => tracing::warn!(error = %error, "the database could not be looked at"),
        }
        let length = tokio::fs::metadata(&self.log).await.map_or(0, |metadata| metadata.len());
        if length > LONG_LOG
            && let Err(error) = self.empty_log().await
        {
            tracing::warn!(error = %error, length, "the write-ahead log could not be emptied");
        }
    }

    async fn empty_log(&mut self) -> sqlx::Result<()> {
        let text = "PRAGMA wal_checkpoint(TRUNCATE)";
        sqlx::query(AssertSqlSafe(text)).execute(&mut self.connection).await?;
        Ok(())
    }
}

/// Moves what the write-ahead log holds into the database whenever it is woken, beside the writer, which goes on.
pub(super) async fn checkpoints(mut connection: SqliteConnection, wake: Arc<Notify>) {
    loop {
        wake.notified().await;
        if let Err(error) = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").execute(&mut connection).await {
            tracing::warn!(error = %error, "the write-ahead log could not be moved into the database");
        }
    }
}

fn tick(wake: &watch::Sender<u64>) {
    wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
}

/// Whether another process kept the file to itself for too long: then trying one by one would only take longer.
fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code()).and_then(|code| code.parse::<u32>().ok());
    code.is_some_and(|code| code & 0xff == 5)
}

/// The same words for one more caller.
fn copy(error: &sqlx::Error) -> sqlx::Error {
    sqlx::Error::Protocol(error.to_string())
}
