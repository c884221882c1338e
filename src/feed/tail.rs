//! Follows the log for all clients of this process: one task, one read at a time.
//!
//! It reads when the store hints at something new, and slowly even when it does not. While there is no client it does
//! nothing at all, so that a server without clients pays nothing for the feed.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::Shared;
use super::replay::{FIRST_PAGE, next_page};
use crate::error::{Error, Result};

/// How often the log is looked at although nothing hinted at anything.
const POLL: Duration = Duration::from_millis(250);

/// How long hints are gathered after a look. The first one after a quiet time is followed at once.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// How long to leave a store alone that has just failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// The work behind a [`Feed`](super::Feed). Runs once; when it ends, or is dropped, the clients' feeds end too.
#[must_use = "clients get the live tail while the service runs"]
pub struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Follows the log until `shutdown` completes or the store is closed. Then every client's feed ends.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            () = self.follow() => {}
            () = shutdown => {}
        }
    }

    /// Goes on while the store is open.
    async fn follow(&self) {
        let shared = &*self.shared;
        let mut is_in_trouble = false;
        loop {
            shared.until(|clients| clients > 0).await;
            let ended = tokio::select! {
                ended = shared.tail(&mut is_in_trouble) => ended,
                () = shared.until(|clients| clients == 0) => Ok(()),
            };
            shared.ring().stop();
            shared.metrics.feed().lag.set(0);
            match ended {
                Ok(()) => {}
                Err(Error::Stopped(_)) => return,
                Err(error) => {
                    if !std::mem::replace(&mut is_in_trouble, true) {
                        tracing::warn!(error = %error, cause = ?error, "the feed cannot read the log; trying again");
                    }
                    sleep(STORE_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.ring().stop();
        self.shared.end();
    }
}

impl Shared {
    /// Waits until the number of clients is `as_wanted`.
    async fn until(&self, as_wanted: impl Fn(usize) -> bool) {
        while !as_wanted(self.places().len()) {
            self.come_or_gone.notified().await;
        }
    }

    /// Keeps the ring in step with the log.
    async fn tail(&self, is_in_trouble: &mut bool) -> Result<()> {
        let mut wake = self.provider.wake();
        let start = self.provider.read(0, 0).await?;
        self.ring().restart(start.epoch, start.head);
        self.tick();
        let mut size = FIRST_PAGE;
        loop {
            // Marked before the read, so that a hint during it is followed.
            wake.borrow_and_update();
            size = self.catch_up(size).await?;
            *is_in_trouble = false;
            self.measure();
            sleep(DEBOUNCE).await;
            hint(&mut wake).await;
        }
    }

    /// Reads from the ring's tip to the head, `size` events at first. Returns with how many to begin the next time.
    async fn catch_up(&self, mut size: usize) -> Result<usize> {
        loop {
            let tip = self.ring().tip();
            let page = self.provider.read(tip, size).await?;
            let is_last = page.next >= page.head;
            size = next_page(size, page.events.iter().map(|event| event.payload.bytes().len()).sum());
            if self.ring().extend(page, Instant::now()) {
                self.tick();
            }
            if is_last {
                return Ok(size);
            }
        }
    }

    fn measure(&self) {
        let behind = self.furthest_behind().map_or(0, |seq| self.ring().tip().saturating_sub(seq));
        self.metrics.feed().lag.set(i64::try_from(behind).unwrap_or(i64::MAX));
    }
}

/// Waits for a hint, at most until the next poll.
async fn hint(wake: &mut watch::Receiver<u64>) {
    // A store that is gone hints no more; the next read says so.
    if let Ok(Err(_)) = tokio::time::timeout(POLL, wake.changed()).await {
        sleep(POLL).await;
    }
}
