//! One worker: takes leases in turn, makes one attempt for each, and hands over what came of it.
//!
//! An attempt ends by itself, by its timeout, or by a panic that is caught here; in each case the worker lives on.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;

use super::chain;
use super::lanes::{Binding, Job, Turn};
use super::settle::Ended;
use super::{Shared, poll_once};
use crate::delivery::{Fault, Verdict};
use crate::error::Result;
use crate::event::now;
use crate::handler::{Call, KvRead, Outcome};

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
        let busy = matches!(turn, Turn::Attempt(_));
        let refilled = hungry && shared.refill(busy).await;
        match turn {
            Turn::Attempt(job) => {
                finished = Some(Arc::clone(&job.binding));
                attempt(&shared, job, &mut ended).await;
                if ended.len() == TOGETHER || ended.last().is_some_and(|last| last.duration > SHORT) {
                    shared.settle(&mut ended).await;
                }
            }
            _ if !ended.is_empty() => shared.settle(&mut ended).await,
            Turn::Wait if refilled => {}
            Turn::Wait => shared.lanes.work().await,
            Turn::Leave => return,
        }
    }
}

async fn attempt(shared: &Arc<Shared>, Job { binding, lease, began }: Job, ended: &mut Vec<Ended>) {
    let call = Call {
        event: Arc::clone(&lease.event),
        subscription: Arc::clone(&binding.name),
        attempt: lease.attempt,
        max_attempts: binding.policy.max_attempts(),
        timeout: binding.timeout,
        is_replay: lease.is_replay,
        kv: Arc::clone(shared) as Arc<dyn KvRead>,
    };
    let started_at = now();
    let outcome = {
        let mut handling = pin!(AssertUnwindSafe(binding.handler.handle(call)).catch_unwind());
        // What ends at once needs no timer.
        match poll_once(handling.as_mut()).await {
            Poll::Ready(outcome) => outcome.unwrap_or_else(|panic| panicked(&*panic)),
            Poll::Pending => {
                shared.settle(ended).await;
                patiently(&binding, handling).await
            }
        }
    };
    let publishes = !outcome.effects.published.is_empty();
    let outcome = if publishes { chain::bounded(shared, &lease.event, outcome).await } else { outcome };
    ended.push(Ended { lease, binding, outcome, started_at, duration: began.elapsed() });
}

/// Waits for a handler within its timeout; a panic becomes a trap.
async fn patiently(binding: &Binding, handling: impl Future<Output = std::thread::Result<Outcome>>) -> Outcome {
    let timeout = binding.timeout;
    let patience = if binding.handler.keeps_time() { timeout.saturating_add(MOMENT) } else { timeout };
    match tokio::time::timeout(patience, handling).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => panicked(&*panic),
        Err(_) => {
            let message = format!("the attempt took longer than {timeout:?}");
            Outcome::failed(Verdict::Timeout, Fault::new("timeout", message))
        }
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
