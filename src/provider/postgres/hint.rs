//! Sends hints to other processes: that this one has written something.
//!
//! Never within a transaction that writes, since those that notify are committed one after the other. A hint carries
//! nothing but who says it, so that nobody is woken by his own. One that cannot be sent is not sent again: others look
//! by themselves, only later.

use std::sync::Arc;
use std::time::Duration;

use sqlx::AssertSqlSafe;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::lend::Connections;

/// How long writes are gathered after a hint. The first one after a quiet time is told at once. Who hears looks no more
/// often than this: telling less often would only let events wait that come at an even pace.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// How hints of a store are sent.
#[derive(Clone)]
pub(super) struct Mouth {
    pub(super) connections: Arc<Connections>,
    /// The schema's name: replicas of one store hear each other and nobody else.
    pub(super) channel: Arc<str>,
    /// Who says it: random, and another one in every process.
    pub(super) own: Arc<str>,
}

impl Mouth {
    pub(super) fn new(connections: Arc<Connections>, schema: &str) -> Self {
        Self { connections, channel: schema.into(), own: uuid::Uuid::new_v4().simple().to_string().into() }
    }

    /// Sends one hint.
    pub(super) async fn say(&self) -> sqlx::Result<()> {
        // Plain text, in one step: behind a pooler a second one could meet another connection. Both names are ours.
        let text = format!("NOTIFY \"{}\", '{}'", self.channel, self.own);
        let mut lent = self.connections.lend().await?;
        sqlx::raw_sql(AssertSqlSafe(text)).execute(lent.connection()?).await?;
        lent.give_back();
        Ok(())
    }

    /// Sends hints of what is written until the store is closed.
    pub(super) async fn run(self, written: Arc<Notify>) {
        let saying = async {
            loop {
                written.notified().await;
                if let Err(error) = self.say().await {
                    tracing::debug!(%error, "a hint for other processes was not sent");
                }
                sleep(DEBOUNCE).await;
            }
        };
        let ended: sqlx::Result<()> = self.connections.pool.close_event().do_until(saying).await;
        drop(ended);
    }
}
