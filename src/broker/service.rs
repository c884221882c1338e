//! The broker's life: its tasks, and a stop that loses nothing.
//!
//! A stop takes no more events in, claims no more, lets attempts in progress finish for a while, and gives the rest
//! back unpunished. A store that forgets what is pending when it closes is drained first.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::{Shared, attempt, dispatch, inbox, maintenance, publish, settle};
use crate::error::{Error, Result};

/// The work behind a [`Broker`](super::Broker). Runs once.
#[must_use = "events are handled while the service runs"]
pub struct Service {
    shared: Arc<Shared>,
    appends: mpsc::Receiver<publish::Job>,
    ended: mpsc::Receiver<settle::Ended>,
}

impl Service {
    pub(super) fn new(
        shared: Arc<Shared>,
        appends: mpsc::Receiver<publish::Job>,
        ended: mpsc::Receiver<settle::Ended>,
    ) -> Self {
        Self { shared, appends, ended }
    }

    /// Handles events until `shutdown` completes, then stops: attempts in progress get the grace that the options give,
    /// and what is leased after that is given back.
    ///
    /// # Errors
    /// What the store answers when leases cannot be given back. They expire by themselves then.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let Self { shared, appends, ended } = self;
        let (stop, stopped) = watch::channel(false);
        let (quit, quitting) = watch::channel(false);
        let appending = tokio::spawn(publish::run(Arc::clone(&shared), appends, quitting.clone()));
        let settling = tokio::spawn(settle::run(Arc::clone(&shared), ended, quitting));
        let renewing = tokio::spawn(maintenance::renew(Arc::clone(&shared), stopped.clone()));
        let maintaining = tokio::spawn(maintenance::run(Arc::clone(&shared), stopped.clone()));
        let routing = tokio::spawn(inbox::run(Arc::clone(&shared), stopped.clone()));
        let mut workers = JoinSet::new();
        for _ in 0..shared.options.worker_count.get() {
            workers.spawn(attempt::work(Arc::clone(&shared)));
        }
        {
            let dispatching = dispatch::run(Arc::clone(&shared), stopped);
            tokio::pin!(dispatching, shutdown);
            tokio::select! {
                () = &mut dispatching => {}
                () = &mut shutdown => {
                    shared.accepting.store(false, Ordering::SeqCst);
                    stop.send_replace(true);
                    dispatching.await;
                }
            }
        }
        tracing::info!(grace = ?shared.options.grace, "stopping: attempts in progress may finish");
        drain(&shared, &mut workers).await;
        workers.shutdown().await;
        quit.send_replace(true);
        for task in [appending, settling, renewing, maintaining, routing] {
            join(task).await?;
        }
        shared.release_keys(shared.leases.take_all()).await
    }
}

/// Waits for attempts in progress, at most for the grace.
async fn drain(shared: &Arc<Shared>, workers: &mut JoinSet<()>) {
    let work = async {
        if shared.capabilities.ends_with_process() {
            dispatch::drain(shared).await;
        }
        shared.lanes.close();
        while workers.join_next().await.is_some() {}
    };
    if tokio::time::timeout(shared.options.grace, work).await.is_err() {
        tracing::warn!("attempts in progress took longer than the grace; their deliveries are given back");
    }
}

/// Completes once `flag` is true.
pub(super) async fn raised(flag: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it everything that the flag could still keep going.
    drop(flag.wait_for(|&raised| raised).await);
}

async fn join(task: JoinHandle<()>) -> Result<()> {
    task.await.map_err(|error| Error::store("broker", "end a task", error))
}
