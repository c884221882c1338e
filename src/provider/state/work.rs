//! A delivery as memory keeps it, and its moves.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::delivery::{Attempt, Delivery, Move, Next, Status, Verdict};
use crate::event::micros;

/// A delivery as it is kept. All instants are microseconds since the Unix epoch. The layout of snapshots follows from the
/// fields and their order.
#[derive(Clone, Serialize, Deserialize)]
pub(in crate::provider) struct Work {
    /// An index into the subscriptions.
    pub(in crate::provider) subscription: usize,
    pub(in crate::provider) status: Status,
    pub(in crate::provider) token: u64,
    pub(in crate::provider) due: i64,
    pub(in crate::provider) lease_end: i64,
    pub(in crate::provider) claimed_at: i64,
    pub(in crate::provider) worker: Option<Arc<str>>,
    pub(in crate::provider) started_at: Option<i64>,
    /// Whether `started_at` comes from an earlier claim than the present one.
    pub(in crate::provider) started_before: bool,
    pub(in crate::provider) completed_at: Option<i64>,
    pub(in crate::provider) retry_count: u32,
    /// Attempts of the handler that were put back.
    pub(in crate::provider) tries: u32,
    pub(in crate::provider) infra_faults: u32,
    pub(in crate::provider) is_replay: bool,
    pub(in crate::provider) verdict: Option<Verdict>,
    pub(in crate::provider) error: Option<Arc<str>>,
    #[serde(with = "super::image::attempts")]
    pub(in crate::provider) attempts: SmallVec<[Attempt; 1]>,
}

impl Work {
    /// A delivery that waits from `now` on.
    pub(in crate::provider) fn new(subscription: usize, now: i64) -> Self {
        Self {
            subscription,
            status: Status::Pending,
            token: 0,
            due: now,
            lease_end: 0,
            claimed_at: 0,
            worker: None,
            started_at: None,
            started_before: false,
            completed_at: None,
            retry_count: 0,
            tries: 0,
            infra_faults: 0,
            is_replay: false,
            verdict: None,
            error: None,
            attempts: SmallVec::new(),
        }
    }

    pub(in crate::provider) fn is_held(&self, token: u64) -> bool {
        self.status == Status::Processing && self.token == token
    }

    /// Leases it.
    pub(in crate::provider) fn claim(&mut self, worker: &Arc<str>, token: u64, now: i64, lease_end: i64) {
        let Some(to) = self.status.after(Move::Claim) else { return };
        self.status = to;
        self.started_before = self.started_at.is_some();
        self.started_at = self.started_at.or(Some(now));
        (self.token, self.claimed_at, self.lease_end) = (token, now, lease_end);
        self.worker = Some(Arc::clone(worker));
    }

    /// Ends the claim as `next` says.
    pub(in crate::provider) fn settle(&mut self, next: Next, attempt: Option<Attempt>, now: i64) {
        let (step, attempt) = match next {
            Next::Complete => (Move::Complete, attempt),
            Next::Retry { .. } => (Move::Retry, attempt),
            Next::Fail => (Move::Fail, attempt),
            Next::Release => (Move::Release, None),
        };
        let Some(to) = self.status.after(step) else { return };
        self.status = to;
        self.worker = None;
        match next {
            Next::Complete | Next::Fail => self.completed_at = Some(now),
            Next::Retry { after } => {
                self.due = now.saturating_add(as_micros(after));
                self.retry_count += 1;
                let infra = attempt.as_ref().is_some_and(|attempt| attempt.verdict.is_infra());
                *(if infra { &mut self.infra_faults } else { &mut self.tries }) += 1;
            }
            Next::Release => self.started_at = self.started_at.filter(|_| self.started_before),
        }
        if let Some(attempt) = attempt {
            self.record(attempt);
        }
    }

    fn record(&mut self, attempt: Attempt) {
        self.verdict = Some(attempt.verdict);
        self.error = attempt.error.as_ref().map(|fault| fault.to_string().into());
        self.attempts.push(attempt);
    }

    /// Makes a finished delivery wait again, with fresh budgets.
    pub(in crate::provider) fn reopen(&mut self, step: Move, now: i64) {
        let Some(to) = self.status.after(step) else { return };
        (self.status, self.due, self.completed_at) = (to, now, None);
        (self.tries, self.infra_faults) = (0, 0);
    }

    pub(in crate::provider) fn number(&self) -> u32 {
        self.attempts.last().map_or(0, |attempt| attempt.number).saturating_add(1)
    }

    pub(in crate::provider) fn delivery(&self, subscription: Arc<str>) -> Delivery {
        Delivery {
            subscription,
            status: self.status,
            retry_count: self.retry_count,
            verdict: self.verdict,
            error: self.error.clone(),
            due_at: (self.status == Status::Pending).then(|| micros(self.due)),
            started_at: self.started_at.map(micros),
            completed_at: self.completed_at.map(micros),
            replay: self.is_replay,
            attempts: self.attempts.to_vec(),
        }
    }
}

/// How many there are in each status.
#[derive(Debug, Default, Clone, Copy)]
pub(in crate::provider) struct Tally {
    pub(in crate::provider) pending: u64,
    pub(in crate::provider) processing: u64,
    pub(in crate::provider) completed: u64,
    pub(in crate::provider) failed: u64,
}

impl Tally {
    fn of(&mut self, status: Status) -> &mut u64 {
        match status {
            Status::Pending => &mut self.pending,
            Status::Processing => &mut self.processing,
            Status::Completed => &mut self.completed,
            Status::Failed => &mut self.failed,
        }
    }

    pub(in crate::provider) fn present(self) -> impl Iterator<Item = Status> {
        let counts = [self.pending, self.processing, self.completed, self.failed];
        Status::ALL.into_iter().zip(counts).filter(|&(_, count)| count > 0).map(|(status, _)| status)
    }

    pub(in crate::provider) fn add(&mut self, status: Status) {
        *self.of(status) += 1;
    }

    pub(in crate::provider) fn remove(&mut self, status: Status) {
        let count = self.of(status);
        *count = count.saturating_sub(1);
    }

    pub(in crate::provider) fn shift(&mut self, from: Status, to: Status) {
        if from != to {
            self.remove(from);
            self.add(to);
        }
    }

    pub(in crate::provider) fn open(self) -> u64 {
        self.pending + self.processing
    }
}

/// A span in microseconds; what is too long for the type is as long as the type allows.
pub(in crate::provider) fn as_micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}
