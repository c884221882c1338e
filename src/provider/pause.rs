//! How long a server that cannot be reached is left alone.

use std::time::Duration;

/// The pause after a connection could not be made: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The pause after so many failures and one more.
pub(super) fn pause(failures: u32) -> Duration {
    PAUSES.0.saturating_mul(1 << failures.min(10)).min(PAUSES.1)
}
