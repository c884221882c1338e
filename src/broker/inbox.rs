//! Moving what others left in the store's inbox into the log, so that it is handled like what is published.
//!
//! Any number of instances may do it at once: that each row is moved by one of them is the store's promise. Nothing is
//! lost when a look fails or a hint is missed, only late.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::Shared;
use super::service::raised;
use crate::error::Result;
use crate::event::EventType;
use crate::provider::{Inbox, RouteRequest, RoutedEvent};

/// How many rows are moved at once.
const ROUTE: usize = 500;

/// Hints come with every write to the store, whatever it is: the inbox is looked into at most this often for them.
const HINT_DEBOUNCE: Duration = Duration::from_millis(10);

/// How often an inbox is looked into whose writers nobody hears of. An event waits half of it on average.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How soon such an inbox is looked into again where something was found: while events keep coming, each waits for the look that
/// is on its way and for the next one, and not for a pause in between as well.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// How long to leave a store alone that has just failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// Routes until `stop` turns true. Ends at once where there is no inbox.
pub(super) async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    // How long to leave it alone after something was found and after nothing was, and how long to wait for a hint after that.
    let (again, pause, patience) = match shared.capabilities.inbox {
        Inbox::None => return,
        Inbox::Hinted => (HINT_DEBOUNCE, HINT_DEBOUNCE, shared.options.poll.saturating_sub(HINT_DEBOUNCE)),
        Inbox::Polled => (LOOK_AGAIN, LOOK_EVERY, Duration::ZERO),
    };
    let mut wake = shared.provider.wake();
    loop {
        wake.mark_unchanged();
        let (pause, patience) = match shared.route().await {
            Ok(true) => (again, patience),
            Ok(false) => (pause, patience),
            Err(error) => {
                tracing::warn!(%error, cause = ?error, "the inbox cannot be routed; trying again");
                (STORE_PAUSE, Duration::ZERO)
            }
        };
        let next = async {
            tokio::time::sleep(pause).await;
            // Nothing but the poll is left where nobody can tick any more.
            let hinted = async {
                if wake.changed().await.is_err() {
                    std::future::pending().await
                }
            };
            let _ = tokio::time::timeout(patience, hinted).await;
        };
        tokio::select! {
            () = raised(&mut stop) => return,
            () = next => {}
        }
    }
}

impl Shared {
    /// Moves all that there is; `false` when that was nothing.
    async fn route(&self) -> Result<bool> {
        let mut found = false;
        loop {
            let began = self.timing();
            let routed = {
                let _gate = self.router.hold().await;
                let routes = self.router.compiled()?;
                let request = RouteRequest {
                    matcher: &|event_type: &EventType| routes.matching(event_type),
                    max: ROUTE,
                    max_payload: self.options.max_payload,
                };
                self.provider.route(&request).await?
            };
            if routed.taken > 0 {
                found = true;
                self.operations.route.observe(began.map(|began| began.elapsed()), routed.taken);
                routed.events.iter().for_each(|event| self.took_in(event));
            }
            if routed.taken < ROUTE {
                return Ok(found);
            }
        }
    }

    /// Counts an event that came by the inbox, and has its deliveries claimed.
    fn took_in(&self, event: &RoutedEvent) {
        self.totals.published.fetch_add(1, Ordering::Relaxed);
        let metrics = self.metrics.of_type(event.source, &event.event_type);
        metrics.published.inc();
        if event.subscriptions.is_empty() {
            metrics.processed(crate::delivery::Status::Completed);
        }
        self.offer(event.subscriptions.iter());
    }
}
