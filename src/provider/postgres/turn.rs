//! Whether a claim takes its turn among the claims of all processes that share the store.
//!
//! Of two claims at a time each goes through what the other is leasing, row by row, to find that it is not its own. Worse,
//! each leaves with some deliveries of an event whose others the other one has; every later claim begins where these
//! ended, so that this goes on, and the processes wait for each other's rows when they settle. So claims come one after
//! the other while there is a backlog, and each process works on events of its own.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// A claim of so many deliveries takes its turn whatever was ready before.
const MUCH: usize = 256;

/// How long turns are not waited for after one did not come: whoever has it may stand still for long.
const PAUSE: Duration = Duration::from_secs(10);

/// What this process knows of turns.
#[derive(Default)]
pub(super) struct Turn(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// Whether the last claim left nothing that is ready.
    took_all: bool,
    /// Until when no turn is waited for.
    pause: Option<Instant>,
}

impl Turn {
    /// Whether a claim for so many subscriptions with so much room together takes its turn.
    pub(super) fn is_due(&self, subscriptions: usize, room: usize) -> bool {
        let known = self.0.lock();
        let has_backlog = subscriptions > 1 && !known.took_all;
        (has_backlog || room >= MUCH) && known.pause.is_none_or(|until| Instant::now() >= until)
    }

    /// A claim came back, and left something that is ready or not.
    pub(super) fn claimed(&self, took_all: bool) {
        self.0.lock().took_all = took_all;
    }

    /// A turn was waited for in vain.
    pub(super) fn missed(&self) {
        self.0.lock().pause = Some(Instant::now() + PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_due_for_much_and_for_several_while_there_is_a_backlog() {
        let turn = Turn::default();
        let due = || [turn.is_due(1, MUCH), turn.is_due(2, 10), turn.is_due(1, 10)];
        assert_eq!(due(), [true, true, false]);
        turn.claimed(true);
        assert_eq!(due(), [true, false, false]);
        turn.claimed(false);
        assert_eq!(due(), [true, true, false]);
        turn.missed();
        assert_eq!(due(), [false, false, false]);
        tokio::time::advance(PAUSE).await;
        assert_eq!(due(), [true, true, false]);
    }
}
