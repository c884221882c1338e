//! The hint that there may be news: ticked after this process's own writes, and, while somebody waits for it, when a
//! look now and then finds that another process has written.

use std::sync::Weak;

use sqlx::Row as _;

use super::Store;
use super::trouble::Step;

const LOOK: &str = "SELECT h.head, EXISTS (SELECT 1 FROM {s}.inbox) FROM {s}.head h";

impl Store {
    /// Wakes whoever waits.
    pub(super) fn tick(&self) {
        self.wake.send_modify(|ticks| *ticks = ticks.wrapping_add(1));
    }

    /// Something was written by this process.
    pub(super) fn wrote(&self) {
        self.tick();
        self.relay.written.notify_one();
    }

    async fn look(&self) -> Step<(i64, bool)> {
        let mut session = self.session().await?;
        let row = session.row(self.statement(LOOK)).await;
        let row = session.finish(row).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }
}

/// Looks until the store is gone or closed.
pub(super) async fn run(store: Weak<Store>, every: std::time::Duration) {
    let (mut seen, mut is_away) = (None, false);
    loop {
        tokio::time::sleep(every).await;
        let Some(store) = store.upgrade().filter(|store| store.check_open().is_ok()) else { return };
        if store.wake.receiver_count() == 0 {
            continue;
        }
        match store.look().await {
            Ok((head, is_waiting)) => {
                // The first look may tick for nothing, and so does the first after the server was away.
                if is_waiting || seen != Some(head) || is_away {
                    store.tick();
                }
                (seen, is_away) = (Some(head), false);
            }
            Err(trouble) => {
                if !std::mem::replace(&mut is_away, true) {
                    let error = trouble.told("look for news".to_owned());
                    tracing::warn!(error = %error, cause = ?error, "the database does not answer; trying again");
                }
            }
        }
    }
}
