//! One worker: takes leases in turn, makes one attempt for each, and hands over what came of it.
//!
//! An attempt ends by itself, by its timeout, or by a panic that is caught here; in each case the worker lives on.

use std::any::Any;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::time::Instant;

use super::Shared;
use super::chain;
use super::lanes::{Binding, Finished, Job, Turn};
use super::settle::Ended;
use crate::delivery::{Fault, Verdict};
use crate::error::Result;
use crate::event::now;
use crate::handler::{Call, KvRead, Outcome};
use crate::provider::Lease;

/// How long after its timeout a handler that keeps time itself is ended for it.
const MOMENT: Duration = Duration::from_secs(1);

/// The most attempts that a worker settles at once, and how short each of them is: a result never waits long for
/// others.
const TOGETHER: usize = 48;
const SHORT: Duration = Duration::from_micros(50);

/// How long a worker keeps its thread where no handler waits: as long as a guest that computes.
const SLICE: Duration = Duration::from_millis(1);

/// What the attempts of a job refer to. Workers that count references to the same thing wait for each other, so each counts its
/// own.
pub(super) struct Own {
    binding: Arc<Binding>,
    /// The subscription's.
    name: Arc<str>,
    me: Me,
}

/// What all attempts of a worker refer to.
#[derive(Clone)]
struct Me {
    instance_id: Arc<str>,
    kv: Arc<dyn KvRead>,
}

impl Own {
    fn new(binding: &Arc<Binding>, me: &Me) -> Arc<Self> {
        Arc::new(Self { binding: Arc::clone(binding), name: Arc::from(&*binding.name), me: me.clone() })
    }

    /// This process.
    pub(super) fn worker(&self) -> &Arc<str> {
        &self.me.instance_id
    }
}

impl Deref for Own {
    type Target = Binding;

    fn deref(&self) -> &Binding {
        &self.binding
    }
}

/// Works until the lanes are closed and empty. Before the worker waits for anything, what it did is settled.
pub(super) async fn work(shared: Arc<Shared>) {
    let me = Me { instance_id: Arc::from(&*shared.instance_id), kv: Arc::new(Kv(Arc::clone(&shared))) };
    let mut finished: Option<Finished> = None;
    let mut ended = Vec::with_capacity(TOGETHER);
    let mut slice = Instant::now();
    loop {
        let (turn, hungry) = shared.lanes.next(finished.take().as_ref());
        let busy = matches!(turn, Turn::Work(_));
        let refilled = hungry && shared.refill(busy).await;
        match turn {
            Turn::Work(job) => {
                finished = Some(attempts(&shared, &me, job, &mut ended, &mut slice).await);
            }
            _ if !ended.is_empty() => shared.settle(&mut ended).await,
            Turn::Wait if refilled => {}
            Turn::Wait => shared.lanes.work().await,
            Turn::Leave => return,
        }
    }
}

/// Makes the attempts of a job: in one call where the handler takes several, else one after the other. What they came
/// to is settled in time, and what has not begun when one of them takes long is left to others.
async fn attempts(shared: &Shared, me: &Me, mut job: Job, ended: &mut Vec<Ended>, slice: &mut Instant) -> Finished {
    let own = Own::new(&job.binding, me);
    if job.is_batch {
        batch(shared, &own, &mut job, ended, slice).await;
        return job.finished(false, Duration::ZERO);
    }
    let (mut was_short, mut took, mut watch) = (true, Duration::ZERO, Watch::start());
    while let Some(lease) = job.leases.pop_front() {
        attempt(shared, &own, &mut watch, lease, &mut job, ended).await;
        let duration = ended.last().map_or(Duration::ZERO, |last| last.duration);
        took += duration;
        if duration > SHORT {
            was_short = false;
            leave(shared, &mut job).await;
        }
        if settle_in_time(shared, ended, slice).await {
            watch = Watch::start();
        }
    }
    job.finished(was_short, took)
}

impl Job {
    fn finished(self, was_short: bool, took: Duration) -> Finished {
        Finished { binding: self.binding, was_short, took, is_brief: self.is_brief }
    }
}

/// Makes attempts in one call, or each in its own where that does not work out.
async fn batch(shared: &Shared, binding: &Arc<Own>, job: &mut Job, ended: &mut Vec<Ended>, slice: &mut Instant) {
    shared.settle(ended).await;
    let leases = std::mem::take(&mut job.leases);
    let mut watch = Watch::start();
    let calls = leases.iter().map(|lease| call(binding, lease)).collect();
    if let Some(outcomes) = together(binding, calls).await.filter(|outcomes| outcomes.len() == leases.len()) {
        let (started_at, duration) = watch.lap();
        for (lease, outcome) in leases.into_iter().zip(outcomes) {
            let mut one = Ended { lease, binding: Arc::clone(binding), outcome, started_at, duration };
            bound_chain(shared, &mut one).await;
            ended.push(one);
        }
        settle_in_time(shared, ended, slice).await;
        return;
    }
    for lease in leases {
        // Nothing is left to others, who would try them in one call again.
        attempt(shared, binding, &mut Watch::start(), lease, job, ended).await;
        settle_in_time(shared, ended, slice).await;
    }
}

/// Leaves what has not begun to other workers.
async fn leave(shared: &Shared, job: &mut Job) {
    let homeless = shared.lanes.give_back(job);
    if let Err(error) = shared.release(homeless).await {
        tracing::warn!(error = %error, "cannot give leases back; they expire by themselves");
    }
}

/// Settles unless there are few results and the last took no time, so that the next hardly will.
///
/// Handlers that never wait would keep the thread for as long as there is work, and the runtime lets nobody else take
/// over what was woken here last, be it another worker or a publisher: hence a turn for others after that many attempts, or
/// at the end of a `slice`, which is given by its beginning.
async fn settle_in_time(shared: &Shared, ended: &mut Vec<Ended>, slice: &mut Instant) -> bool {
    let are_many = ended.len() >= TOGETHER;
    let is_time = are_many || ended.last().is_some_and(|last| last.duration > SHORT);
    if is_time {
        shared.settle(ended).await;
        if are_many || slice.elapsed() >= SLICE {
            tokio::task::yield_now().await;
            *slice = Instant::now();
        }
    }
    is_time
}

/// Times attempts that follow one upon the other: where one ends the next begins, so that the clock is read once for
/// each, which takes about as long as anything else that is done for a short one.
struct Watch {
    started: Instant,
    started_at: Timestamp,
    last: Instant,
}

impl Watch {
    fn start() -> Self {
        let started = Instant::now();
        Self { started, started_at: now(), last: started }
    }

    /// When the attempt that ends now began, and how long it took.
    fn lap(&mut self) -> (Timestamp, Duration) {
        let (began, ended) = (self.last, Instant::now());
        self.last = ended;
        // As exact as every other time that is kept.
        let since = Duration::from_micros(u64::try_from((began - self.started).as_micros()).unwrap_or(u64::MAX));
        (self.started_at.checked_add(since).unwrap_or(self.started_at), ended.duration_since(began))
    }
}

fn call(binding: &Own, lease: &Lease) -> Call {
    Call {
        event: Arc::clone(&lease.event),
        subscription: Arc::clone(&binding.name),
        attempt: lease.attempt,
        max_attempts: binding.policy.max_attempts(),
        timeout: binding.timeout,
        is_replay: lease.is_replay,
        kv: Arc::clone(&binding.me.kv),
    }
}

/// Makes one attempt. If it waits for something, the worker settles what it did and leaves the rest of the job to others.
async fn attempt(
    shared: &Shared,
    binding: &Arc<Own>,
    watch: &mut Watch,
    lease: Lease,
    job: &mut Job,
    ended: &mut Vec<Ended>,
) {
    let outcome = {
        let mut handling = pin!(AssertUnwindSafe(binding.handler.handle(call(binding, &lease))).catch_unwind());
        // What ends at once needs no timer.
        match handling.as_mut().now_or_never() {
            Some(outcome) => outcome.unwrap_or_else(|panic| panicked(&*panic)),
            None => {
                let computes = watch.last.elapsed() > SHORT;
                leave(shared, job).await;
                shared.settle(ended).await;
                if computes {
                    // It would go on with that at once.
                    tokio::task::yield_now().await;
                }
                patiently(binding, handling).await
            }
        }
    };
    let (started_at, duration) = watch.lap();
    ended.push(Ended { lease, binding: Arc::clone(binding), outcome, started_at, duration });
    if let Some(last) = ended.last_mut() {
        bound_chain(shared, last).await;
    }
}

/// Refuses what would make a chain of events too long.
async fn bound_chain(shared: &Shared, ended: &mut Ended) {
    if !ended.outcome.effects.published.is_empty() {
        let outcome = std::mem::replace(&mut ended.outcome, Outcome::ok());
        ended.outcome = Box::pin(chain::bounded(shared, &ended.lease.event, outcome)).await;
    }
}

/// Makes several attempts in one call. `None` when that did not work out: then it never was.
async fn together(binding: &Binding, calls: Vec<Call>) -> Option<Vec<Outcome>> {
    let handling = AssertUnwindSafe(binding.handler.handle_batch(calls)).catch_unwind();
    tokio::time::timeout(binding.patience(), handling).await.ok()?.ok()?
}

/// Waits for a handler within its timeout; a panic becomes a trap.
async fn patiently(binding: &Binding, handling: impl Future<Output = std::thread::Result<Outcome>>) -> Outcome {
    match tokio::time::timeout(binding.patience(), handling).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => panicked(&*panic),
        Err(_) => {
            let message = format!("the attempt took longer than {:?}", binding.timeout);
            Outcome::failed(Verdict::Timeout, Fault::new("timeout", message))
        }
    }
}

impl Binding {
    /// How long a call is waited for.
    fn patience(&self) -> Duration {
        if self.handler.keeps_time() { self.timeout.saturating_add(MOMENT) } else { self.timeout }
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Outcome {
    Outcome::failed(Verdict::Trap, Fault::new("panic", panic_message(panic)))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("(no message)"))
}

/// What is committed.
struct Kv(Arc<Shared>);

#[async_trait]
impl KvRead for Kv {
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        Ok(self.0.provider.document(bucket, key).await?.map(|document| document.value))
    }
}
