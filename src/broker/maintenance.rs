//! What must happen now and then: leases renewed, subscriptions of other instances learnt, the past pruned.
//!
//! Every failure is logged and tried again at the next turn: nothing here can stop the broker.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Shared;
use super::routing::Known;
use super::service::raised;
use crate::error::Result;
use crate::provider::{Amendment, Replay, Retention};
use crate::subscription::{Start, Subscription};

/// How often the past is pruned.
const PRUNE_EVERY: Duration = Duration::from_secs(60);

/// Renews leases until `stop` turns true, every third of a lease, so that one turn may fail.
pub(super) async fn renew(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let every = shared.options.lease / 3;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = raised(&mut stop) => return,
            now = ticks.tick() => {
                // Half a turn old is old enough: such a lease meets at least two turns before it ends.
                let Some(limit) = now.checked_sub(every / 2) else { continue };
                if let Err(error) = shared.renew_held(limit).await {
                    tracing::warn!(error = %error, "cannot renew leases; trying again");
                }
            }
        }
    }
}

/// Runs the rest until `stop` turns true.
pub(super) async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let mut polls = interval(shared.options.poll);
    let mut prunes = interval(PRUNE_EVERY);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    prunes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (what, result) = tokio::select! {
            () = raised(&mut stop) => return,
            _ = polls.tick() => ("read what other instances changed", shared.catch_up().await),
            _ = prunes.tick() => ("prune", shared.prune().await),
        };
        if let Err(error) = result {
            tracing::warn!(error = %error, cause = ?error, what, "maintenance failed; trying again");
        }
    }
}

impl Shared {
    async fn renew_held(&self, older_than: Instant) -> Result<()> {
        let keys = self.leases.older_than(older_than);
        if keys.is_empty() {
            return Ok(());
        }
        let at = Instant::now();
        let renewed = self.provider.renew(&keys, self.options.lease).await?;
        self.leases.renewed(&keys, at);
        let lost: Vec<u64> = keys.iter().zip(renewed).filter(|(_, held)| !held).map(|(key, _)| key.token).collect();
        if !lost.is_empty() {
            // The attempts go on: their settlements will be refused.
            tracing::warn!(count = lost.len(), "leases were lost before they were renewed");
            self.leases.forget(lost);
        }
        Ok(())
    }

    async fn catch_up(&self) -> Result<()> {
        if self.capabilities.shared {
            let changed = self.router.refresh(&*self.provider).await?;
            for known in &changed.updated {
                self.apply(known).await?;
            }
            for name in &changed.removed {
                let queued = self.lanes.unbind(name);
                self.leases.forget(queued.iter().map(|lease| lease.key.token));
            }
        }
        Ok(())
    }

    async fn prune(&self) -> Result<()> {
        let retention = Retention {
            max_age: self.options.keep_for.filter(|age| !age.is_zero()),
            max_events: self.options.keep_events,
        };
        if retention == Retention::default() {
            return Ok(());
        }
        match self.provider.prune(&retention).await? {
            0 => {}
            count => tracing::info!(count, "finished events were pruned"),
        }
        Ok(())
    }

    /// Stores a declaration; a new subscription that begins in the past gets its deliveries.
    pub(super) async fn declare(&self, subscription: Subscription) -> Result<Arc<Known>> {
        let (known, is_new) = self.router.declare(&*self.provider, subscription).await?;
        let from_seq = match known.subscription.start {
            Start::Seq(seq) if is_new => Some(seq),
            Start::Earliest if is_new => None,
            _ => return Ok(known),
        };
        let replay = Replay {
            subscription: Arc::clone(&known.subscription.name),
            pattern: known.subscription.pattern.clone(),
            from_seq,
            to_seq: None,
            from: None,
            to: None,
            missing_only: true,
            dry_run: false,
        };
        self.provider.amend(Amendment::Replay(replay)).await?;
        Ok(known)
    }

    /// Lets a changed subscription take effect in this process.
    pub(super) async fn apply(&self, known: &Known) -> Result<()> {
        let given_back = self.lanes.update(known, &self.options);
        self.hints.about([&known.subscription.name]);
        self.release(given_back).await
    }
}
