//! What can go wrong on the way to the server and back, in words and in kinds that a caller can act on.

use std::time::Duration;

use crate::error::{Cause, Error};

/// Why a call came to nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// An id was taken meanwhile: look first.
    Taken,
    /// Two transactions were in each other's way: the same once more.
    Crossed(sqlx::Error),
    /// The server did not answer in time.
    Late(Duration),
    /// Anything else.
    Store(sqlx::Error),
    /// Refused by a rule, not by the server.
    Refused(Error),
}

pub(super) type Step<T> = std::result::Result<T, Trouble>;

/// The unique index over the ids of events.
const IDS: &str = "events_by_id";

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        let database = error.as_database_error();
        let code = database.and_then(|database| database.code());
        match code.as_deref() {
            Some("23505") if database.and_then(|database| database.constraint()) == Some(IDS) => Self::Taken,
            // Serialization failure, deadlock, lock not available.
            Some("40001" | "40P01" | "55P03") => Self::Crossed(error),
            _ => Self::Store(error),
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl Trouble {
    /// Whether the connection is in order, and only the statement was refused.
    pub(super) fn spares_connection(&self) -> bool {
        match self {
            Self::Taken | Self::Crossed(_) | Self::Refused(_) => true,
            Self::Late(_) => false,
            Self::Store(error) => {
                // The server goes away or ends this very session, or became a standby: another connection may lead to
                // the new primary.
                let code = error.as_database_error().and_then(|error| error.code());
                code.is_some_and(|code| {
                    !code.starts_with("57P") && !code.starts_with("08") && code != "25P03" && code != "25006"
                })
            }
        }
    }

    /// The error that a caller gets.
    pub(super) fn told(self, action: String) -> Error {
        match self {
            Self::Refused(error) => error,
            Self::Store(sqlx::Error::PoolClosed) => Error::Stopped("provider"),
            Self::Store(error) | Self::Crossed(error) => Error::store("postgres", action, explain(error)),
            Self::Taken => Error::store("postgres", action, "an event's id was taken again and again meanwhile"),
            Self::Late(limit) => {
                let words = format!("the server did not answer within {} s", limit.as_secs());
                Error::store("postgres", action, words)
            }
        }
    }
}

/// What to do about an error, and the error.
#[derive(Debug, thiserror::Error)]
#[error("{advice}")]
struct Advised {
    advice: &'static str,
    #[source]
    source: sqlx::Error,
}

/// The error with what to do about it, where that is known.
pub(super) fn explain(error: sqlx::Error) -> Cause {
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
    let advice = match (&error, code.as_str()) {
        (sqlx::Error::Io(_), _) => "the server cannot be reached or closed the connection: is it running?",
        (sqlx::Error::Tls(_), _) => "TLS failed: check sslmode and sslrootcert in the URL",
        (sqlx::Error::PoolTimedOut, _) => {
            "no connection became free within postgres.acquire_timeout: the server is away, or busy beyond \
             postgres.max_connections"
        }
        (_, "28P01" | "28000") => "the server refused user or password: check the URL and pg_hba.conf",
        (_, "3D000") => "there is no such database: create it first (createdb)",
        (_, "25006") => "the server can only be read (a standby?): name the primary",
        (_, "42501") => "the database user lacks a permission: see docs/postgres.md",
        (_, "3F000" | "42P01") => "a table is missing: run `tidegate migrate`",
        (_, "53300") => {
            "the server has no connection left: lower postgres.max_connections or raise its max_connections"
        }
        (_, "53100") => "the server's disk is full",
        (_, "57014") => "the server took longer than postgres.statement_timeout",
        (_, "25P03") => "the transaction stood still for too long and was ended",
        (_, "57P01" | "57P02" | "57P03") => "the server is stopping or starting",
        (_, "26000" | "42P05" | "08P01") => {
            "prepared statements got lost: behind PgBouncer in transaction mode set postgres.prepared = false"
        }
        _ => return error.into(),
    };
    Advised { advice, source: error }.into()
}

/// How often a call is made again whose transaction crossed another's.
const TRIES: u32 = 8;

/// Counts how often a call was made.
#[derive(Default)]
pub(super) struct Turns {
    made: u32,
    /// Whether to look before what was taken for granted is written.
    pub(super) careful: bool,
}

impl Turns {
    /// The answer, unless the call is to be made again.
    pub(super) fn judge<T>(&mut self, result: Step<T>) -> Option<Step<T>> {
        self.made += 1;
        match result {
            Err(Trouble::Taken) if self.made < TRIES => self.careful = true,
            Err(Trouble::Crossed(_)) if self.made < TRIES => {}
            result => return Some(result),
        }
        None
    }
}
