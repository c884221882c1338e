//! How fast a lane goes: how far it leases ahead of its workers, and how many attempts a second it may start.
//!
//! Pure arithmetic over instants that are given.

use std::time::Duration;

use tokio::time::Instant;

/// A lane that had to wait longer than this for a worker leases less far ahead.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// How far a lane leases ahead of its workers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    ahead: usize,
    least: usize,
    most: usize,
}

impl Window {
    pub(super) fn new(limit: usize, most: usize) -> Self {
        let least = limit.min(most);
        Self { ahead: least, least, most }
    }

    /// How far it leases ahead where no more than `share` may wait for a worker, which never is less than it can run.
    pub(super) fn within(&self, share: usize) -> usize {
        self.ahead.min(share.max(self.least))
    }

    /// The lane ran dry although the last claim gave all it asked for: lease twice as far ahead.
    pub(super) fn ran_dry(&mut self) {
        self.ahead = self.ahead.saturating_mul(2).min(self.most);
    }

    /// A delivery waited long: leave more to other instances.
    pub(super) fn waited(&mut self, wait: Duration) {
        if wait > LONG_WAIT {
            self.ahead = (self.ahead / 2).max(self.least);
        }
    }
}

/// At most so many starts a second, with as many at once after a pause.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Rate {
    pub(super) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, tokens: per_second, at: Instant::now() }
    }

    pub(super) fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.per_second);
        self.at = now;
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "tokens are between 0 and u32::MAX")]
    pub(super) fn room(&self) -> usize {
        self.tokens as usize
    }

    #[expect(clippy::cast_precision_loss, reason = "a claim is far below 2^52")]
    pub(super) fn take(&mut self, count: usize) {
        self.tokens -= count as f64;
    }

    pub(super) fn next_token(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens) / self.per_second).max(0.0))
    }
}
