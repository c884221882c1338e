//! Events in PostgreSQL: the store that several processes share.
//!
//! An inbox that anybody may write to in his own transaction, a log in which every event stands once, and narrow
//! deliveries that are leased with SKIP LOCKED. `seq` is given out under the lock of one row, so it follows the order
//! of commits. Almost every call is one statement over all it is about. Nothing is kept here that the database does not
//! have, but the numbers of subscriptions, which never change. Listening for notifications is not done here.

mod open;
mod session;
mod trouble;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::postgres::PgPool;
use tokio::sync::watch;

use self::session::Session;
use self::trouble::{Step, Trouble, Turns};
use super::Clock;
use crate::error::{Error, Result};
use crate::event::MAX_PAYLOAD;

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
    /// The largest payload that is taken from the inbox, in bytes. In the configuration `limits.max_payload`.
    #[serde(skip)]
    pub max_payload: u64,
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
            max_payload: MAX_PAYLOAD,
        }
    }
}

/// The store in a PostgreSQL database.
pub struct PostgresProvider {
    store: Store,
}

/// What every call needs.
struct Store {
    pool: PgPool,
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
    names: Mutex<HashMap<Arc<str>, i32>>,
}

/// How much longer than the server this side waits, so that the server's word comes first.
const SLACK: Duration = Duration::from_secs(5);

impl PostgresProvider {
    /// Connects, and brings the schema up to date.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the setting that must change, [`Error::Incompatible`] when the schema was written by a
    /// newer version or by something else, and [`Error::Store`] when the server cannot be reached or fails.
    pub async fn open(options: Options) -> Result<Self> {
        Self::start(options, None).await
    }

    /// As [`open`](Self::open), with another clock than the server's.
    #[cfg(test)]
    async fn with_clock(options: Options, clock: Clock) -> Result<Self> {
        Self::start(options, Some(clock)).await
    }

    async fn start(options: Options, clock: Option<Clock>) -> Result<Self> {
        let open::Opened { pool, schema, place, server } = open::open(&options).await?;
        let limit = options.statement_timeout.saturating_add(SLACK);
        let store = Store { pool, schema, place, server, limit, clock, names: Mutex::default(), options };
        Ok(Self { store })
    }
}

#[cfg(test)]
mod tests;
