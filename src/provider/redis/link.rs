//! One connection that many calls share, made anew when it breaks; and what its failures mean in words.
//!
//! No call waits without a bound: a connection is made within `connect_timeout`, a call answered within
//! `response_timeout`. While a server is away it is tried again after growing pauses, and calls in between fail at once.
//! Nothing is sent a second time, but a script that the server no longer knew: what became of a call that broke off is not
//! known here.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use redis::aio::{MultiplexedConnection, PubSub};
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, Pipeline, RedisError, Value};
use tokio::time::Instant;

use super::open::Place;
use crate::error::{Error, Result};
use crate::provider::pause::pause;

/// How long to leave a server alone that is loading its data.
const LOADING: Duration = Duration::from_millis(100);

/// How long whoever was told that the store is full should wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A script, and the name that the server gave it.
pub(super) struct Script {
    text: &'static str,
    sha: OnceLock<String>,
}

impl Script {
    pub(super) const fn new(text: &'static str) -> Self {
        Self { text, sha: OnceLock::new() }
    }
}

/// The connection, or when to try to make one.
#[derive(Default)]
struct Slot {
    connection: Option<MultiplexedConnection>,
    /// Counts connections: who found one broken must not break the next.
    generation: u64,
    failures: u32,
    not_before: Option<Instant>,
    /// Why the last connection could not be made.
    why: String,
}

/// The way to the server.
pub(super) struct Link {
    client: Client,
    /// The server, without secrets, as messages name it.
    pub(super) server: String,
    connect_timeout: Duration,
    response_timeout: Duration,
    slot: Mutex<Slot>,
    connecting: tokio::sync::Mutex<()>,
    is_closed: AtomicBool,
    /// Calls that failed.
    pub(super) errors: AtomicU64,
}

impl Link {
    pub(super) fn new(place: &Place) -> Result<Self> {
        let client = Client::open(place.info.clone())
            .map_err(|error| Error::invalid("provider", &place.server, error.to_string()))?;
        Ok(Self {
            client,
            server: place.server.clone(),
            connect_timeout: place.connect_timeout,
            response_timeout: place.response_timeout,
            slot: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            is_closed: AtomicBool::new(false),
            errors: AtomicU64::new(0),
        })
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock()
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(Error::Stopped("provider")) } else { Ok(()) }
    }

    /// Ends the connection. `false` when that was done before.
    pub(super) fn close(&self) -> bool {
        let was_closed = self.is_closed.swap(true, Ordering::AcqRel);
        self.slot().connection = None;
        !was_closed
    }

    /// How many connections were made.
    pub(super) fn connections(&self) -> u64 {
        self.slot().generation
    }

    /// The answer to a command.
    pub(super) async fn query(&self, action: &str, command: &Cmd) -> Result<Value> {
        let (mut connection, generation) = self.connection(action).await?;
        let answer = command.query_async(&mut connection).await;
        answer.map_err(|error| self.failed(action, &error, generation))
    }

    /// The same, from a server that may still be loading what it has kept.
    pub(super) async fn first_query(&self, action: &str, command: &Cmd) -> Result<Value> {
        let (mut connection, generation) = self.connection(action).await?;
        let mut is_said = false;
        loop {
            let answer: redis::RedisResult<Value> = command.query_async(&mut connection).await;
            match answer {
                Err(error) if error.code() == Some("LOADING") => {
                    if !is_said {
                        tracing::info!(server = %self.server, "the server is loading its data; waiting for it");
                    }
                    is_said = true;
                    tokio::time::sleep(LOADING).await;
                }
                answer => return answer.map_err(|error| self.failed(action, &error, generation)),
            }
        }
    }

    /// The answers to commands that are sent at once.
    pub(super) async fn query_all(&self, action: &str, commands: &Pipeline) -> Result<Vec<Value>> {
        let (mut connection, generation) = self.connection(action).await?;
        let answers = commands.query_async(&mut connection).await;
        answers.map_err(|error| self.failed(action, &error, generation))
    }

    /// The answer of a script to a command that [`command`](Self::command) began. A server that does not know the script
    /// (it was restarted, or told to forget) is taught it.
    pub(super) async fn run(&self, action: &str, script: &Script, command: &Cmd) -> Result<Value> {
        let (mut connection, generation) = self.connection(action).await?;
        let mut answer = command.query_async(&mut connection).await;
        if answer.as_ref().is_err_and(|error: &RedisError| error.code() == Some("NOSCRIPT")) {
            let taught = teach(&mut connection, script).await;
            answer = match taught {
                Ok(_) => command.query_async(&mut connection).await,
                Err(error) => Err(error),
            };
        }
        answer.map_err(|error| self.failed(action, &error, generation))
    }

    /// The beginning of a call of a script.
    pub(super) async fn command(&self, action: &str, script: &Script, key: &str) -> Result<Cmd> {
        self.check_open()?;
        if script.sha.get().is_none() {
            let (mut connection, generation) = self.connection(action).await?;
            let taught = teach(&mut connection, script).await;
            let sha = taught.map_err(|error| self.failed(action, &error, generation))?;
            drop(script.sha.set(sha));
        }
        let sha = script.sha.get().map(String::as_str).unwrap_or_default();
        let mut command = redis::cmd("EVALSHA");
        command.arg(sha).arg(1).arg(key);
        Ok(command)
    }

    /// Makes the first connection.
    pub(super) async fn connect(&self) -> Result<()> {
        self.connection("connect").await.map(drop)
    }

    async fn connection(&self, action: &str) -> Result<(MultiplexedConnection, u64)> {
        self.check_open()?;
        if let Some(connection) = self.current(action)? {
            return Ok(connection);
        }
        let _connecting = self.connecting.lock().await;
        if let Some(connection) = self.current(action)? {
            return Ok(connection);
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.response_timeout));
        let connecting = self.client.get_multiplexed_async_connection_with_config(&config);
        let made = within(self.connect_timeout, connecting).await;
        self.check_open()?;
        let mut slot = self.slot();
        match made {
            Ok(connection) => {
                let generation = slot.generation + 1;
                *slot = Slot { connection: Some(connection.clone()), generation, ..Slot::default() };
                Ok((connection, generation))
            }
            Err(error) => {
                let pause = pause(slot.failures);
                slot.failures = slot.failures.saturating_add(1);
                slot.not_before = Some(Instant::now() + pause);
                slot.why = error.to_string();
                drop(slot);
                Err(self.explain(&format!("connect to {}", self.server), &error))
            }
        }
    }

    /// The connection, if there is one; an error while it is too early to make one.
    fn current(&self, action: &str) -> Result<Option<(MultiplexedConnection, u64)>> {
        let slot = self.slot();
        if let Some(connection) = &slot.connection {
            return Ok(Some((connection.clone(), slot.generation)));
        }
        if slot.not_before.is_some_and(|at| Instant::now() < at) {
            let words = format!("the server cannot be reached, and is tried again every few seconds: {}", slot.why);
            return Err(self.store(action, words));
        }
        Ok(None)
    }

    /// A connection of its own that hears a channel.
    pub(super) async fn listen(&self, channel: &str) -> Result<PubSub> {
        self.check_open()?;
        let listening = async {
            let mut listener = self.client.get_async_pubsub().await?;
            listener.subscribe(channel).await?;
            Ok(listener)
        };
        let heard = within(self.connect_timeout, listening).await;
        heard.map_err(|error| self.explain("listen for changes", &error))
    }

    fn failed(&self, action: &str, error: &RedisError, generation: u64) -> Error {
        self.errors.fetch_add(1, Ordering::Relaxed);
        // A server that became a replica, and one that does not answer, are left too: another may have the address now.
        let is_lost = error.is_unrecoverable_error() || error.is_timeout() || error.is_io_error();
        if is_lost || error.code() == Some("READONLY") {
            let mut slot = self.slot();
            if slot.generation == generation {
                slot.connection = None;
            }
        }
        self.explain(action, error)
    }

    fn store(&self, action: &str, words: String) -> Error {
        let place = if action.contains(&self.server) { String::new() } else { format!(" at {}", self.server) };
        Error::store("redis", format!("{action}{place}"), words)
    }

    /// What a failure means.
    fn explain(&self, action: &str, error: &RedisError) -> Error {
        if self.is_closed.load(Ordering::Acquire) {
            return Error::Stopped("provider");
        }
        if error.code() == Some("OOM") {
            let reason = format!(
                "{} has no memory left (maxmemory): raise it, or keep less with broker.keep_for and broker.keep_events",
                self.server
            );
            return Error::Overloaded { reason: reason.into(), retry_after: RETRY_AFTER };
        }
        let hint = self.hint(error);
        let gap = if hint.is_empty() { "" } else { ": " };
        let told = match (error.code(), error.detail()) {
            (Some(code), Some(detail)) => format!("{code} {detail}"),
            _ => error.to_string(),
        };
        self.store(action, format!("{}{gap}{hint}", told.trim_end_matches('.')))
    }

    fn hint(&self, error: &RedisError) -> Cow<'static, str> {
        let words = error.to_string();
        let hint = match error.code() {
            Some("NOAUTH") => "the server wants a password: set redis.password, or redis://:PASSWORD@HOST",
            Some("WRONGPASS") => "set redis.username and redis.password to what the server knows",
            Some("NOPERM") => "the user may not do this: docs/redis.md lists what it needs",
            Some("READONLY") => "this is a replica: name the primary",
            Some("LOADING") => "the server is still loading its data; it is tried again",
            Some("MISCONF") => "the server cannot write to its disk and refuses writes: its log says why",
            Some("MASTERDOWN") => "this is a replica that has lost its primary: name the primary",
            Some("MOVED" | "CROSSSLOT" | "CLUSTERDOWN") => "a cluster is not served: name a server of its own",
            Some("BUSY") => "a script of somebody else holds the server up",
            Some("WRONGTYPE") => "keys of this namespace hold something else: choose another redis.namespace",
            _ if error.kind() == ErrorKind::AuthenticationFailed => {
                "set redis.username and redis.password to what the server knows"
            }
            _ if words.contains("DB index") => {
                "the server has no database of this number: see `databases` in redis.conf"
            }
            _ if error.is_timeout() => {
                return format!("no answer within {:?} (redis.response_timeout)", self.response_timeout).into();
            }
            _ => "",
        };
        hint.into()
    }
}

/// Has the server learn a script, and returns its name.
async fn teach(connection: &mut MultiplexedConnection, script: &Script) -> redis::RedisResult<String> {
    redis::cmd("SCRIPT").arg("LOAD").arg(script.text).query_async(connection).await
}

async fn within<T>(bound: Duration, work: impl Future<Output = redis::RedisResult<T>>) -> redis::RedisResult<T> {
    tokio::time::timeout(bound, work).await.unwrap_or_else(|_| {
        let words = format!("no connection within {bound:?} (redis.connect_timeout)");
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, words).into())
    })
}
