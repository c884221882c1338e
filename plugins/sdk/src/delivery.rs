//! Facts about the attempt in progress.
//!
//! In a batch there is one attempt per event, and [`turn`] says which one is in progress.

use core::time::Duration;

use crate::host;

/// The subscription that this delivery belongs to.
pub fn subscription() -> String {
    host::subscription()
}

/// Which attempt this is: 1 for the first.
pub fn attempt() -> u32 {
    host::attempt()
}

/// After how many attempts the host gives up.
pub fn max_attempts() -> u32 {
    host::max_attempts()
}

/// Whether the host gives up when this attempt asks for a retry.
pub fn is_last_attempt() -> bool {
    attempt() >= max_attempts()
}

/// What is left until the host ends this attempt.
pub fn remaining() -> Duration {
    Duration::from_millis(host::remaining_ms())
}

/// The same for all attempts of this delivery. Hand it to the systems that you call, so that they do a thing once.
pub fn idempotency_key() -> String {
    host::idempotency_key()
}

/// Whether the event is delivered once more on purpose: a replay, or a trial of a new plugin version.
pub fn is_replay() -> bool {
    host::is_replay()
}

/// In a batch: from here on, facts, log lines, published events and key-value writes are those of the event at this
/// index, counted from 0. Turns may come in any order and come back.
///
/// `plugin!(handle, batch)` does it for you. Before the first turn publishing and writing fail with the code `no-turn`. An
/// index that the batch does not have ends the call.
pub fn turn(index: usize) {
    host::turn(u32::try_from(index).unwrap_or(u32::MAX));
}
