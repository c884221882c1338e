//! Hears hints of other processes: one connection per process that LISTENs, however many wait for news here.
//!
//! A hint says that there may be news, and nothing else: what there is, is always read. So nothing depends on a hint
//! being heard. Whatever puts that in doubt (a connection that ends, fails or falls silent) counts as a hint itself,
//! and the slow look of [`watch`](super::watch) goes on meanwhile. Hints are sent elsewhere, in [`hint`](super::hint).

use std::sync::Arc;
use std::time::Duration;

use sqlx::Executor as _;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::hint::Mouth;
use super::lend::Connections;

/// How long to wait before a lost connection is made anew: at first, and at most. Doubled every time.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// After so much silence the server is asked whether it is still there: TCP alone notices after hours.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long our own hint may take to come back. Behind a pooler that shares connections it never does.
const PROBE: Duration = Duration::from_secs(1);

/// How long opening a store waits to know whether hints are heard. It does not fail when they are not.
const KNOWN: Duration = Duration::from_secs(3);

/// Whether hints are heard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Hearing {
    /// Not known yet.
    #[default]
    Starting,
    /// They are.
    Listening,
    /// There is no connection.
    Away,
    /// There is a connection, and hints do not come through it.
    Deaf,
}

impl Hearing {
    /// The name in figures.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Listening => "listening",
            Self::Away => "away",
            Self::Deaf => "deaf",
        }
    }
}

/// How it stands with the listening connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ears {
    pub(super) hearing: Hearing,
    /// How many connections have listened: 1 after the first, one more after each that was lost.
    pub(super) generation: u64,
}

/// What a store has to hear of others and be heard of. Ends when the store is closed or dropped.
pub(super) struct Relay {
    /// Told of every write, so that other processes are.
    pub(super) written: Arc<Notify>,
    pub(super) ears: watch::Receiver<Ears>,
    /// Whether hints were heard when the store was opened.
    pub(super) is_told: bool,
    tasks: [AbortHandle; 2],
}

impl Relay {
    /// Begins to listen and to tell, and waits a moment to know whether hints come through.
    pub(super) async fn start(connections: &Arc<Connections>, schema: &str, wake: &watch::Sender<u64>) -> Self {
        let (written, mouth) = (Arc::new(Notify::new()), Mouth::new(Arc::clone(connections), schema));
        let (told, mut ears) = watch::channel(Ears::default());
        let ear = Ear { mouth: mouth.clone(), wake: wake.clone(), ears: told };
        let tasks = [tokio::spawn(ear.run()), tokio::spawn(mouth.run(Arc::clone(&written)))];
        let known = ears.wait_for(|ears| ears.hearing != Hearing::Starting);
        let is_told = matches!(timeout(KNOWN, known).await, Ok(Ok(ears)) if ears.hearing == Hearing::Listening);
        Self { written, ears, is_told, tasks: tasks.map(|task| task.abort_handle()) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Why there is nobody listening.
enum Failure {
    Away(sqlx::Error),
    Late,
    Deaf,
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Away(error)
    }
}

/// Listens for a store.
struct Ear {
    mouth: Mouth,
    wake: watch::Sender<u64>,
    ears: watch::Sender<Ears>,
}

impl Ear {
    /// Listens until the store is closed.
    async fn run(self) {
        // Also while it waits to connect again.
        drop(self.mouth.connections.pool.close_event().do_until(self.listen()).await);
        self.becomes(Hearing::Away);
    }

    async fn listen(&self) {
        let mut pause = PAUSE.0;
        loop {
            let hearing = match self.begin().await {
                Ok(listener) => {
                    pause = PAUSE.0;
                    self.begins();
                    self.hear(listener).await;
                    tracing::warn!("the connection that listens for hints was lost; connecting again");
                    Hearing::Away
                }
                Err(failure) => self.fails(failure),
            };
            self.becomes(hearing);
            // What was said in between is lost: everything in doubt is read again.
            self.tick();
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(PAUSE.1);
        }
    }

    /// A connection that listens, and hears.
    async fn begin(&self) -> Result<PgListener, Failure> {
        let connecting = async {
            let mut listener = PgListener::connect_with(&lone_pool(&self.mouth.connections.pool)).await?;
            listener.ignore_pool_close_event(true);
            // It would connect again by itself, with a pause in which hints are lost.
            listener.eager_reconnect(false);
            listener.listen(&self.mouth.channel).await?;
            self.mouth.say().await?;
            Ok::<_, sqlx::Error>(listener)
        };
        let mut listener = timeout(PATIENCE, connecting).await.map_err(|_| Failure::Late)??;
        let own = async {
            loop {
                match listener.try_recv().await? {
                    Some(hint) if hint.payload() == &*self.mouth.own => return Ok(()),
                    Some(_) => self.tick(),
                    None => return Err(Failure::Away(sqlx::Error::PoolClosed)),
                }
            }
        };
        timeout(PROBE, own).await.map_err(|_| Failure::Deaf)??;
        Ok(listener)
    }

    /// Ticks at every hint until the connection is lost.
    async fn hear(&self, mut listener: PgListener) {
        loop {
            match timeout(HEARTBEAT, listener.try_recv()).await {
                // Our own writes have ticked already.
                Ok(Ok(Some(hint))) if hint.payload() == &*self.mouth.own => {}
                Ok(Ok(Some(_))) => self.tick(),
                Ok(Ok(None) | Err(_)) => return,
                Err(_) => {
                    // Hints that come before the answer are kept by the listener.
                    let alive = timeout(PATIENCE, listener.execute("SELECT 1")).await;
                    if !matches!(alive, Ok(Ok(_))) {
                        return;
                    }
                }
            }
        }
    }

    fn begins(&self) {
        self.ears.send_modify(|ears| {
            if !matches!(ears.hearing, Hearing::Starting) {
                tracing::info!(generation = ears.generation + 1, "hints of other processes are heard again");
            }
            *ears = Ears { hearing: Hearing::Listening, generation: ears.generation + 1 };
        });
        // Listening first, then reading what came before.
        self.tick();
    }

    /// Says what is wrong, once for each time that it begins to be.
    fn fails(&self, failure: Failure) -> Hearing {
        let before = self.ears.borrow().hearing;
        match failure {
            Failure::Deaf if before == Hearing::Deaf => Hearing::Deaf,
            Failure::Deaf => {
                tracing::warn!(
                    "hints do not come through this connection, as behind a pooler in transaction mode: the log is looked \
                     at every postgres.poll_interval instead; connect to the server itself for less delay"
                );
                Hearing::Deaf
            }
            Failure::Late | Failure::Away(_) if before == Hearing::Away => Hearing::Away,
            Failure::Late => {
                tracing::warn!("nobody answers who could be listened to for hints; trying again");
                Hearing::Away
            }
            Failure::Away(error) => {
                tracing::warn!(%error, "hints of other processes cannot be listened for; trying again");
                Hearing::Away
            }
        }
    }

    fn becomes(&self, hearing: Hearing) {
        self.ears.send_modify(|ears| ears.hearing = hearing);
    }

    fn tick(&self) {
        self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
    }
}

/// A pool of one connection of its own: those of the store are lent to calls, and closed when they are old.
fn lone_pool(store: &PgPool) -> PgPool {
    let options: Arc<PgConnectOptions> = store.connect_options();
    let name = format!("{} listener", options.get_application_name().unwrap_or("tidegate"));
    PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .acquire_timeout(PATIENCE)
        .connect_lazy_with(options.as_ref().clone().application_name(&name))
}
