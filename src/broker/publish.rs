//! Taking events in: validate, match, append.
//!
//! Where the store gains from it, what callers publish at the same time is appended together by one task: while the
//! store writes one group the next one gathers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};

use super::service::raised;
use super::{Published, Shared};
use crate::error::{Error, Result};
use crate::event::{Event, EventId, EventType, Source};
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

/// What is still known of an event once the store has it.
struct Told {
    id: EventId,
    source: Source,
    event_type: EventType,
    subscriptions: Arc<[Arc<str>]>,
}

impl Shared {
    pub(super) async fn publish_one(&self, mut event: Arc<Event>) -> Result<Published> {
        self.check(&mut event)?;
        let (told, appended) = {
            let _gate = self.router.hold().await;
            let (told, append) = self.routed(event)?;
            (told, self.append(vec![append]).await?)
        };
        let appended = appended.first().ok_or(Error::Stopped("store"))?;
        Ok(self.acknowledged(told, appended))
    }

    pub(super) async fn publish_all(&self, mut events: Vec<Arc<Event>>) -> Result<Vec<Published>> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        for (index, event) in events.iter_mut().enumerate() {
            self.check(event).map_err(|error| at_index(error, index))?;
        }
        let (told, appended) = {
            let _gate = self.router.hold().await;
            let routed = events.into_iter().map(|event| self.routed(event)).collect::<Result<Vec<_>>>()?;
            let (told, batch): (Vec<Told>, Vec<Append>) = routed.into_iter().unzip();
            (told, self.append(batch).await?)
        };
        Ok(told.into_iter().zip(&appended).map(|(told, appended)| self.acknowledged(told, appended)).collect())
    }

    /// Matches an event. The caller holds the router until it is appended.
    fn routed(&self, event: Arc<Event>) -> Result<(Told, Append)> {
        let subscriptions = self.router.matching(&event.event_type)?;
        let (id, source, event_type) = (event.id.clone(), event.source, event.event_type.clone());
        let told = Told { id, source, event_type, subscriptions: Arc::clone(&subscriptions) };
        Ok((told, Append { event, subscriptions }))
    }

    /// Counts an event that the store has taken, and has its deliveries claimed.
    fn acknowledged(&self, told: Told, appended: &Appended) -> Published {
        let &Appended { seq, duplicate, status } = appended;
        if !duplicate {
            self.totals.published.fetch_add(1, Ordering::Relaxed);
            let metrics = self.metrics.of_type(told.source, &told.event_type);
            metrics.published.inc();
            if told.subscriptions.is_empty() {
                metrics.processed(status);
            }
            self.offer(told.subscriptions.iter());
        }
        Published { id: told.id, seq, status, duplicate }
    }

    fn check(&self, event: &mut Arc<Event>) -> Result<()> {
        if !self.accepting.load(Ordering::SeqCst) {
            return Err(Error::Stopped("broker"));
        }
        if event.instance_id.is_empty() {
            Arc::make_mut(event).instance_id = Arc::clone(&self.instance_id);
        }
        event.validate(self.options.max_payload)
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
        let (count, began) = (batch.len(), self.timing());
        let appended = self.provider.append(batch).await?;
        self.operations.append.observe(began.map(|began| began.elapsed()), count);
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
                _ => {
                    gather(&mut jobs, &mut group).await;
                    append_group(&shared, group.drain(..)).await;
                }
            },
        }
    }
}

/// Takes in what comes meanwhile. Callers that were answered together publish again together: a group that went as
/// soon as the first of them is back would leave the others for the next.
async fn gather(jobs: &mut mpsc::Receiver<Job>, group: &mut Vec<Job>) {
    loop {
        let before = group.len();
        tokio::task::yield_now().await;
        while group.len() < GROUP
            && let Ok(job) = jobs.try_recv()
        {
            group.push(job);
        }
        if group.len() == before || group.len() == GROUP {
            return;
        }
    }
}

async fn append_group(shared: &Shared, group: impl Iterator<Item = Job>) {
    let (mut together, mut callers) = (Vec::new(), Vec::new());
    for Job { batch, answer } in group {
        callers.push((batch.len(), answer));
        together.extend(batch);
    }
    if callers.len() == 1 {
        let appended = shared.append_now(together).await;
        callers.pop().map(|(_, answer)| answer.send(appended));
        return;
    }
    match shared.append_now(together.clone()).await {
        Ok(appended) => {
            let mut appended = appended.into_iter();
            for (count, answer) in callers {
                // A caller that went away still has its events stored: it was never told otherwise.
                drop(answer.send(Ok(appended.by_ref().take(count).collect())));
            }
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
