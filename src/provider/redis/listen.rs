//! Hearing of changes by other instances, on a connection of its own.
//!
//! What is heard is a hint and no more: whoever waits for it reads the store, and polls slowly besides.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::watch;

use super::link::Link;
use crate::error::Error;
use crate::provider::pause::pause;

/// How often a quiet connection is tried, and how long the answer may take.
const TRY_EVERY: Duration = Duration::from_secs(15);

/// Ticks `wake` for what others tell on the channel, for ever. Ends when the store is closed.
pub(super) async fn run(link: Arc<Link>, channel: String, own: String, wake: watch::Sender<u64>) {
    let mut failures = 0;
    loop {
        match link.listen(&channel).await {
            Ok(listener) => {
                failures = 0;
                // What was told before is lost: it may have been anything.
                tick(&wake);
                hear(listener, &own, &wake).await;
                tracing::info!(server = %link.server, "the connection that listens for changes broke; making another");
            }
            Err(Error::Stopped(_)) => return,
            Err(error) => {
                tracing::warn!(%error, cause = ?error, "cannot listen for changes by other instances; trying again");
            }
        }
        tokio::time::sleep(pause(failures)).await;
        failures += 1;
    }
}

/// Returns when the connection is of no use any more.
async fn hear(listener: redis::aio::PubSub, own: &str, wake: &watch::Sender<u64>) {
    let (mut sink, mut messages) = listener.split();
    loop {
        match tokio::time::timeout(TRY_EVERY, messages.next()).await {
            Ok(Some(message)) if message.get_payload_bytes() == own.as_bytes() => {}
            Ok(Some(_)) => tick(wake),
            Ok(None) => return,
            Err(_quiet) => {
                let answer = tokio::time::timeout(TRY_EVERY, sink.ping::<redis::Value>()).await;
                if !matches!(answer, Ok(Ok(_))) {
                    return;
                }
            }
        }
    }
}

fn tick(wake: &watch::Sender<u64>) {
    wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
}
