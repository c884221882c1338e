//! Where the ready deliveries of a subscription begin, as far as this process knows, and when to look at all of them.
//!
//! What was leased or has ended leaves traces in the indexes until the server has cleaned up, and while some transaction
//! is held open anywhere it cannot. A claim that went through these traces each time would become slower without end.
//! So most claims begin where the one before ended. What others put behind that place (a lease given back, a retry that
//! has become due) is found by a look at everything, now and then; what this process puts there, at once. That a place
//! is wrong costs a moment, never a delivery.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// How often everything is looked at, at most.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks take at most one part of so many of the time.
const SHARE: u32 = 20;

/// The places of all subscriptions.
#[derive(Default)]
pub(super) struct Fronts {
    /// Grows when something may have been put behind a place.
    generation: u64,
    by_subscription: HashMap<i32, Front>,
}

struct Front {
    /// Nothing below this seq is ready.
    floor: i64,
    /// When something becomes due or a lease ends, by the store's clock.
    next: Option<i64>,
    /// When to look at everything, by ours.
    look_at: Instant,
}

/// How much of a subscription a claim goes through.
#[derive(Clone, Copy)]
pub(super) struct Reach {
    pub(super) floor: i64,
    /// Whether to look at what is due and at all leases.
    pub(super) looks: bool,
    /// What is known without looking.
    pub(super) next: Option<i64>,
}

impl Reach {
    /// All of it.
    pub(super) const FULL: Self = Self { floor: 0, looks: true, next: None };
}

/// What came of a claim for one subscription.
pub(super) struct Seen {
    pub(super) subscription: i32,
    pub(super) reach: Reach,
    /// The highest seq that was leased.
    pub(super) last: Option<i64>,
    /// Whether there may be more that is ready.
    pub(super) is_full: bool,
    /// When something becomes due or a lease ends.
    pub(super) next: Option<i64>,
}

impl Fronts {
    /// What a claim has to hand in when it tells what it saw.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// How far to reach at `now`, by our clock, and at `store_now` where that is known.
    pub(super) fn reach(&self, subscription: i32, now: Instant, store_now: Option<i64>) -> Reach {
        let Some(front) = self.by_subscription.get(&subscription) else { return Reach::FULL };
        let is_time = store_now.zip(front.next).is_some_and(|(now, next)| now >= next);
        if is_time || now >= front.look_at {
            return Reach::FULL;
        }
        Reach { floor: front.floor, looks: false, next: front.next }
    }

    /// Keeps what a claim saw that began at `began` by our clock and stood at `store_now` by the store's.
    pub(super) fn keep(&mut self, generation: u64, began: Instant, store_now: i64, seen: Seen) {
        if generation != self.generation {
            return;
        }
        let Seen { subscription, reach, last, is_full, next } = seen;
        let before = self.by_subscription.get(&subscription);
        let after = last.map_or(0, |last| last.saturating_add(1)).max(reach.floor);
        // A claim of everything that was not given everything knows only where it stopped.
        let floor = match before {
            Some(before) if !(reach.looks && is_full) => after.max(before.floor),
            _ => after,
        };
        let look_at = match before {
            Some(before) if !reach.looks => before.look_at,
            _ => Instant::now() + (began.elapsed() * SHARE).max(LOOK_EVERY),
        };
        // The server's clock runs on: what it will say is reckoned from what it said.
        let until = next.map(|next| Duration::from_micros(super::row::unsigned(next.saturating_sub(store_now))));
        let look_at = until.map_or(look_at, |until| look_at.min(began + until));
        self.by_subscription.insert(subscription, Front { floor, next, look_at });
    }

    /// Something may have become ready behind the places of these subscriptions.
    pub(super) fn forget(&mut self, subscriptions: impl IntoIterator<Item = i32>) {
        for subscription in subscriptions {
            self.generation += 1;
            self.by_subscription.remove(&subscription);
        }
    }

    /// Something may have become ready anywhere.
    pub(super) fn forget_all(&mut self) {
        self.generation += 1;
        self.by_subscription.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(reach: Reach, last: Option<i64>, next: Option<i64>) -> Seen {
        Seen { subscription: 1, reach, last, is_full: false, next }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_finds_more_than_it_has_room_for_goes_on_from_there() {
        let mut fronts = Fronts::default();
        let at = Instant::now();
        fronts.keep(0, at, 0, seen(Reach::FULL, Some(99), None));
        fronts.keep(0, at, 0, Seen { is_full: true, ..seen(Reach::FULL, Some(3), None) });
        assert_eq!(fronts.reach(1, at, None).floor, 4);
        fronts.keep(0, at, 0, seen(Reach::FULL, None, None));
        assert_eq!(fronts.reach(1, at, None).floor, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_begins_where_the_one_before_ended_until_it_is_time_to_look() {
        let mut fronts = Fronts::default();
        let at = Instant::now();
        assert!(fronts.reach(1, at, None).looks);
        fronts.keep(0, at, 1_000, seen(Reach::FULL, Some(7), None));
        let reach = fronts.reach(1, at, None);
        assert_eq!((reach.floor, reach.looks), (8, false));
        fronts.keep(0, at, 1_000, seen(reach, Some(9), None));
        assert_eq!(fronts.reach(1, at, None).floor, 10);
        assert!(fronts.reach(1, at + LOOK_EVERY, None).looks);
        assert!(fronts.reach(2, at, None).looks);
    }

    #[tokio::test(start_paused = true)]
    async fn what_becomes_due_is_looked_for_in_time() {
        let mut fronts = Fronts::default();
        let at = Instant::now();
        fronts.keep(0, at, 1_000, seen(Reach::FULL, None, Some(6_000)));
        assert!(!fronts.reach(1, at + Duration::from_millis(4), Some(5_999)).looks);
        assert!(fronts.reach(1, at + Duration::from_millis(5), None).looks);
        assert!(fronts.reach(1, at, Some(6_000)).looks);
    }

    /// A claim that was on its way while something was put behind its place has not seen it.
    #[tokio::test(start_paused = true)]
    async fn what_was_put_behind_is_found_at_once() {
        let mut fronts = Fronts::default();
        let at = Instant::now();
        fronts.keep(0, at, 0, seen(Reach::FULL, Some(7), None));
        let generation = fronts.generation();
        fronts.forget([1]);
        assert!(fronts.reach(1, at, None).looks);
        fronts.keep(generation, at, 0, seen(Reach::FULL, Some(8), None));
        assert!(fronts.reach(1, at, None).looks);
        fronts.keep(fronts.generation(), at, 0, seen(Reach::FULL, Some(8), None));
        fronts.forget_all();
        assert!(fronts.reach(1, at, None).looks);
    }
}
