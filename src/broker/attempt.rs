//! One worker: takes leases in turn, makes one attempt for each, and hands over what came of it.
//!
//! An attempt ends by itself, by its timeout, or by a panic that is caught here; in each case the worker lives on.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::Shared;
use super::chain;
use super::lanes::{Binding, Job};
use super::settle::Ended;
use crate::delivery::{Fault, Verdict};
use crate::error::Result;
use crate::event::now;
use crate::handler::{Call, KvRead, Outcome};

/// How long after its timeout a handler that keeps time itself is ended for it.
const MOMENT: Duration = Duration::from_secs(1);

/// Works until there is nothing to do.
pub(super) async fn work(shared: Arc<Shared>) {
    let mut finished: Option<Arc<Binding>> = None;
    loop {
        let (job, hungry) = shared.lanes.next(finished.as_ref());
        if hungry {
            shared.hints.nudge();
        }
        let Some(job) = job else { return };
        finished = Some(Arc::clone(&job.binding));
        let ended = attempt(&shared, job).await;
        if shared.settlements.send(ended).await.is_err() {
            // The settling task is gone: the lease is given back, or expires.
            tracing::debug!("an attempt ended after settlement had stopped");
        }
    }
}

async fn attempt(shared: &Arc<Shared>, Job { binding, queued }: Job) -> Ended {
    let lease = queued.lease;
    let call = Call {
        event: Arc::clone(&lease.event),
        subscription: Arc::clone(&binding.name),
        attempt: lease.attempt,
        max_attempts: binding.policy.max_attempts(),
        timeout: binding.timeout,
        is_replay: lease.is_replay,
        kv: Arc::clone(shared) as Arc<dyn KvRead>,
    };
    let (started_at, began) = (now(), Instant::now());
    let outcome = chain::bounded(shared, &lease.event, caught(&binding, call).await).await;
    Ended { lease, binding, outcome, started_at, duration: began.elapsed() }
}

/// Calls the handler within its timeout; a panic becomes a trap.
async fn caught(binding: &Binding, call: Call) -> Outcome {
    let timeout = binding.timeout;
    let patience = if binding.handler.keeps_time() { timeout.saturating_add(MOMENT) } else { timeout };
    let guarded = AssertUnwindSafe(tokio::time::timeout(patience, binding.handler.handle(call))).catch_unwind();
    match guarded.await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => {
            let message = format!("the attempt took longer than {timeout:?}");
            Outcome::failed(Verdict::Timeout, Fault::new("timeout", message))
        }
        Err(panic) => Outcome::failed(Verdict::Trap, Fault::new("panic", panic_message(&*panic))),
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("(no message)"))
}

#[async_trait]
impl KvRead for Shared {
    async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        Ok(self.provider.document(bucket, key).await?.map(|document| document.value))
    }
}
