//! Connections between calls.
//!
//! The pool asks the server about every connection that comes back to it: a round trip more for every call. One whose call
//! ended in order needs no such question. It is kept here for the next call, the last one used first, so that few
//! connections do most of the work and have their statements ready. The pool makes new ones, and bounds how many there are.
//!
//! A server that restarts breaks all of them: when one call breaks off, the others are tried before they are used.

use std::time::Duration;

use parking_lot::Mutex;
use sqlx::Connection as _;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

/// A connection that has not been used for this long is tried before it is used.
const STALE: Duration = Duration::from_secs(1);

/// One that has not been used for this long is closed.
const IDLE: Duration = Duration::from_secs(600);

/// One that is this old is closed.
const OLD: Duration = Duration::from_secs(1_800);

/// The connections of a store.
pub(super) struct Connections {
    pub(super) pool: PgPool,
    /// One for each connection that the pool may have.
    permits: Semaphore,
    idle: Mutex<Vec<Idle>>,
    /// When a call last broke off: what lies idle since before then may be broken as well.
    broke: Mutex<Option<Instant>>,
    /// How long a call waits for a connection.
    patience: Duration,
}

struct Idle {
    connection: PoolConnection<Postgres>,
    made: Instant,
    since: Instant,
}

/// A connection that a call has.
pub(super) struct Lent<'a> {
    owner: &'a Connections,
    _permit: SemaphorePermit<'a>,
    connection: Option<PoolConnection<Postgres>>,
    made: Instant,
    is_clean: bool,
}

impl Connections {
    pub(super) fn new(pool: PgPool, most: u32, patience: Duration) -> Self {
        let permits = Semaphore::new(usize::try_from(most).unwrap_or(1));
        Self { pool, permits, idle: Mutex::default(), broke: Mutex::default(), patience }
    }

    /// A connection for one call.
    pub(super) async fn lend(&self) -> sqlx::Result<Lent<'_>> {
        let waiting = timeout(self.patience, self.permits.acquire()).await;
        let permit = waiting.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        let lent = |connection, made| {
            Ok(Lent { owner: self, _permit: permit, connection: Some(connection), made, is_clean: false })
        };
        while let Some(Idle { mut connection, made, since }) = self.take() {
            if self.trusts(since) || matches!(timeout(self.patience, connection.ping()).await, Ok(Ok(()))) {
                return lent(connection, made);
            }
            connection.close_on_drop();
        }
        lent(self.pool.acquire().await?, Instant::now())
    }

    /// Whether what lies idle since then needs no ping.
    fn trusts(&self, since: Instant) -> bool {
        since.elapsed() < STALE && self.broke.lock().is_none_or(|broke| broke < since)
    }

    fn take(&self) -> Option<Idle> {
        self.idle.lock().pop()
    }

    /// How many connections wait for a call.
    pub(super) fn idle(&self) -> usize {
        self.idle.lock().len() + self.pool.num_idle()
    }

    /// Closes all connections, each at the end of its call.
    pub(super) async fn close(&self) {
        let closed = self.pool.close();
        self.permits.close();
        self.idle.lock().clear();
        closed.await;
    }

    fn keep(&self, mut connection: PoolConnection<Postgres>, made: Instant) {
        let mut idle = self.idle.lock();
        if self.pool.is_closed() {
            return;
        }
        if made.elapsed() > OLD {
            connection.close_on_drop();
            return;
        }
        // Where the last one used goes first, the first one is the one that nobody needs.
        if idle.first().is_some_and(|first| first.since.elapsed() > IDLE) {
            idle.remove(0).connection.close_on_drop();
        }
        idle.push(Idle { connection, made, since: Instant::now() });
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        // There may be no runtime any more on which to say goodbye.
        for Idle { connection, .. } in self.idle.get_mut().drain(..) {
            drop(connection.leak());
        }
    }
}

impl Lent<'_> {
    pub(super) fn connection(&mut self) -> sqlx::Result<&mut PgConnection> {
        self.connection.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    /// Gives it back, for others to use.
    pub(super) fn give_back(mut self) {
        self.is_clean = true;
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if self.is_clean {
            self.owner.keep(connection, self.made);
        } else {
            *self.owner.broke.lock() = Some(Instant::now());
            connection.close_on_drop();
        }
    }
}
