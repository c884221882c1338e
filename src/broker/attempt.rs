//! One worker: takes leases in turn, makes one attempt for each, and hands over what came of it.
//!
//! An attempt ends by itself, by its timeout, or by a panic that is caught here; in each case the worker lives on.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::Shared;
use super::chain;
use super::lanes::{Binding, Job, Turn};
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
const TOGETHER: usize = 32;
const SHORT: Duration = Duration::from_micros(50);

/// Works until the lanes are closed and empty. Before the worker waits for anything, what it did is settled.
pub(super) async fn work(shared: Arc<Shared>) {
    let mut finished: Option<Arc<Binding>> = None;
    let mut ended = Vec::with_capacity(TOGETHER);
    loop {
        let (turn, hungry) = shared.lanes.next(finished.take().as_ref());
        let busy = matches!(turn, Turn::Work(_));
        let refilled = hungry && shared.refill(busy).await;
        match turn {
            Turn::Work(job) => {
                finished = Some(Arc::clone(&job.binding));
                attempts(&shared, job, &mut ended).await;
            }
            _ if !ended.is_empty() => shared.settle(&mut ended).await,
            Turn::Wait if refilled => {}
            Turn::Wait => shared.lanes.work().await,
            Turn::Leave => return,
        }
    }
}

/// Makes the attempts of a job: in one call where the handler takes several, else one after the other. What they came
/// to is settled in time.
async fn attempts(shared: &Arc<Shared>, Job { binding, leases, began }: Job, ended: &mut Vec<Ended>) {
    if leases.len() > 1 {
        shared.settle(ended).await;
        let (started_at, calls) = (now(), leases.iter().map(|lease| call(shared, &binding, lease)).collect());
        if let Some(outcomes) = together(&binding, calls).await.filter(|outcomes| outcomes.len() == leases.len()) {
            let duration = began.elapsed();
            for (lease, outcome) in leases.into_iter().zip(outcomes) {
                let binding = Arc::clone(&binding);
                let outcome = within_chain(shared, &lease, outcome).await;
                ended.push(Ended { lease, binding, outcome, started_at, duration });
            }
            return settle_in_time(shared, ended).await;
        }
    }
    for lease in leases {
        attempt(shared, &binding, lease, ended).await;
        settle_in_time(shared, ended).await;
    }
}

/// Settles unless there are few results and the last took no time, so that the next hardly will.
///
/// Handlers that never wait would keep the thread for as long as there is work, and the runtime lets nobody else take
/// over what was woken here last, be it another worker or a publisher: hence a turn for others.
async fn settle_in_time(shared: &Arc<Shared>, ended: &mut Vec<Ended>) {
    if ended.len() >= TOGETHER || ended.last().is_some_and(|last| last.duration > SHORT) {
        shared.settle(ended).await;
        tokio::task::yield_now().await;
    }
}

fn call(shared: &Arc<Shared>, binding: &Binding, lease: &Lease) -> Call {
    Call {
        event: Arc::clone(&lease.event),
        subscription: Arc::clone(&binding.name),
        attempt: lease.attempt,
        max_attempts: binding.policy.max_attempts(),
        timeout: binding.timeout,
        is_replay: lease.is_replay,
        kv: Arc::clone(shared) as Arc<dyn KvRead>,
    }
}

async fn attempt(shared: &Arc<Shared>, binding: &Arc<Binding>, lease: Lease, ended: &mut Vec<Ended>) {
    let (began, started_at) = (Instant::now(), now());
    let outcome = {
        let mut handling = pin!(AssertUnwindSafe(binding.handler.handle(call(shared, binding, &lease))).catch_unwind());
        // What ends at once needs no timer.
        match handling.as_mut().now_or_never() {
            Some(outcome) => outcome.unwrap_or_else(|panic| panicked(&*panic)),
            None => {
                shared.settle(ended).await;
                patiently(binding, handling).await
            }
        }
    };
    let outcome = within_chain(shared, &lease, outcome).await;
    let duration = began.elapsed();
    ended.push(Ended { lease, binding: Arc::clone(binding), outcome, started_at, duration });
}

async fn within_chain(shared: &Shared, lease: &Lease, outcome: Outcome) -> Outcome {
    let publishes = !outcome.effects.published.is_empty();
    if publishes { chain::bounded(shared, &lease.event, outcome).await } else { outcome }
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

#[async_trait]
impl KvRead for Shared {
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        Ok(self.provider.document(bucket, key).await?.map(|document| document.value))
    }
}
