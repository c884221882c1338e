//! Taking events in: validate, match, append.
//!
//! Where the store gains from it, what callers publish at the same time is appended together by one task: while the
//! store writes one group the next one gathers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::service::raised;
use super::{Published, Shared};
use crate::error::{Error, Result};
use crate::event::{Event, EventType, Source};
use crate::provider::{Append, Appended};

/// The most events appended at once.
const GROUP: usize = 256;

/// When a refused publisher should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A caller's events on their way to the store.
pub(super) struct Job {
    batch: Vec<Append>,
    answer: oneshot::Sender<Result<Vec<Appended>>>,
}

impl Shared {
    pub(super) async fn publish_one(&self, event: Event) -> Result<Published> {
        let mut published = self.publish_checked(vec![self.checked(event)?]).await?;
        published.pop().ok_or(Error::Stopped("store"))
    }

    pub(super) async fn publish_all(&self, events: Vec<Event>) -> Result<Vec<Published>> {
        let checked = events
            .into_iter()
            .enumerate()
            .map(|(index, event)| self.checked(event).map_err(|error| at_index(error, index)));
        let events = checked.collect::<Result<Vec<_>>>()?;
        if events.is_empty() { Ok(Vec::new()) } else { self.publish_checked(events).await }
    }

    fn checked(&self, mut event: Event) -> Result<Event> {
        if !self.accepting.load(Ordering::SeqCst) {
            return Err(Error::Stopped("broker"));
        }
        if event.instance_id.is_empty() {
            event.instance_id = Arc::clone(&self.instance_id);
        }
        event.validate(self.options.max_payload)?;
        Ok(event)
    }

    async fn publish_checked(&self, events: Vec<Event>) -> Result<Vec<Published>> {
        let gate = self.router.hold().await;
        let mut batch = Vec::with_capacity(events.len());
        let mut told = Vec::with_capacity(events.len());
        for event in events {
            let subscriptions = self.router.matching(&event.event_type)?;
            told.push((event.id.clone(), event.source, event.event_type.clone(), Arc::clone(&subscriptions)));
            batch.push(Append { event, subscriptions });
        }
        let appended = self.append(batch).await?;
        drop(gate);
        let mut published = Vec::with_capacity(appended.len());
        for ((id, source, event_type, subscriptions), Appended { seq, duplicate, status }) in
            told.into_iter().zip(appended)
        {
            if !duplicate {
                self.totals.published.fetch_add(1, Ordering::Relaxed);
                let metrics = self.metrics.of_type(source, &event_type);
                metrics.published.inc();
                if subscriptions.is_empty() {
                    metrics.processed(status);
                }
                self.hints.about(subscriptions.iter());
            }
            published.push(Published { id, seq, status, duplicate });
        }
        Ok(published)
    }

    /// Counts an event that a handler published.
    pub(super) fn count_published(&self, source: Source, event_type: &EventType) {
        self.totals.published.fetch_add(1, Ordering::Relaxed);
        self.metrics.of_type(source, event_type).published.inc();
    }

    async fn append(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        if !self.capabilities.grouping {
            return self.append_now(batch).await.inspect_err(|error| self.count_refusal(error));
        }
        let (answer, answered) = oneshot::channel();
        self.totals.waiting_publishes.fetch_add(1, Ordering::Relaxed);
        let result = match self.appends.try_send(Job { batch, answer }) {
            Ok(()) => answered.await.unwrap_or(Err(Error::Stopped("broker"))),
            Err(TrySendError::Full(_)) => Err(self.full()),
            Err(TrySendError::Closed(_)) => Err(Error::Stopped("broker")),
        };
        self.totals.waiting_publishes.fetch_sub(1, Ordering::Relaxed);
        result.inspect_err(|error| self.count_refusal(error))
    }

    async fn append_now(&self, batch: Vec<Append>) -> Result<Vec<Appended>> {
        let (started, count) = (Instant::now(), batch.len());
        let appended = self.provider.append(batch).await?;
        self.operations.append.observe(started.elapsed(), count);
        Ok(appended)
    }

    fn full(&self) -> Error {
        let reason = format!("{} publishes wait for the store already", self.options.buffer_size);
        Error::Overloaded { reason: reason.into(), retry_after: RETRY_AFTER }
    }

    fn count_refusal(&self, error: &Error) {
        if matches!(error, Error::Overloaded { .. }) {
            self.metrics.refused().inc();
        }
    }
}

fn at_index(error: Error, index: usize) -> Error {
    match error {
        Error::Invalid { field, value, reason } => {
            Error::Invalid { field: format!("[{index}].{field}").into(), value, reason }
        }
        Error::TooLarge { field, size, limit } => {
            Error::TooLarge { field: format!("[{index}].{field}").into(), size, limit }
        }
        other => other,
    }
}

/// Appends in groups until `quit` turns true and what was queued by then is answered.
pub(super) async fn run(shared: Arc<Shared>, mut jobs: mpsc::Receiver<Job>, mut quit: watch::Receiver<bool>) {
    let mut group = Vec::with_capacity(GROUP);
    loop {
        tokio::select! {
            () = raised(&mut quit), if !jobs.is_closed() => jobs.close(),
            count = jobs.recv_many(&mut group, GROUP) => match count {
                0 => return,
                _ => append_group(&shared, std::mem::take(&mut group)).await,
            },
        }
    }
}

async fn append_group(shared: &Shared, group: Vec<Job>) {
    let (mut together, mut callers) = (Vec::new(), Vec::with_capacity(group.len()));
    for Job { batch, answer } in group {
        callers.push((batch.len(), answer));
        together.extend(batch);
    }
    match shared.append_now(together.clone()).await {
        Ok(appended) => {
            let mut appended = appended.into_iter();
            for (count, answer) in callers {
                // A caller that went away still has its events stored: it was never told otherwise.
                drop(answer.send(Ok(appended.by_ref().take(count).collect())));
            }
        }
        Err(error) if callers.len() == 1 => {
            callers.pop().map(|(_, answer)| answer.send(Err(error)));
        }
        // One caller's trouble (a full store, say) is not everybody's: each is tried alone and hears its own answer.
        Err(_) => {
            let mut together = together.into_iter();
            for (count, answer) in callers {
                let batch = together.by_ref().take(count).collect();
                drop(answer.send(shared.append_now(batch).await));
            }
        }
    }
}
