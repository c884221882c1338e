//! Guests that compute for long, and calls that must not wait for all of them.
//!
//! A guest keeps its thread until the next tick of the epoch, and then lets others have a turn. Where many compute, turns of
//! theirs would be most of what goes on. So a guest that has computed for long needs a place to go on, of which there are as
//! many as cores, and leaves every second turn to others: a thread gives one guest a turn for two turns of everybody else, and
//! not one to each guest for each of those.

use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::poll_fn;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout_at;

/// How much later than the epoch the timer fires: the epoch knows where the guest was, the timer does not.
const GRACE: Duration = Duration::from_millis(50);

/// A guest that was at it for this long without a pause computes. The tick may come at any moment of its turn.
const LONG: Duration = Duration::from_micros(100);

/// How much of its turns a guest has before another one may take its place.
const STINT: Duration = Duration::from_millis(4);

/// Waits for a call that began at an instant, and a little longer than until its deadline, if any. `None` when it is still
/// waiting for something then.
pub(super) async fn until<T>(
    began: Instant,
    deadline: Option<Instant>,
    places: &Semaphore,
    mut call: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    // What ends at once needs no timer.
    if let Poll::Ready(end) = poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await {
        return Some(end);
    }
    let rest = finish(call, began.elapsed() >= LONG, deadline, places);
    match deadline.and_then(|deadline| deadline.checked_add(GRACE)) {
        Some(latest) => timeout_at(latest.into(), rest).await.ok(),
        // Nobody lives to see it.
        None => Some(rest.await),
    }
}

/// Goes on with a call that was polled before.
async fn finish<T>(
    mut call: Pin<&mut impl Future<Output = T>>,
    mut computes: bool,
    deadline: Option<Instant>,
    places: &Semaphore,
) -> T {
    let (mut place, mut stint) = (None, Duration::ZERO);
    loop {
        woken().await;
        if computes {
            tokio::task::yield_now().await;
            if place.is_none() {
                place = self::place(places, deadline).await;
            }
        }
        let began = Instant::now();
        if let Poll::Ready(end) = poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await {
            return end;
        }
        let took = began.elapsed();
        computes = took >= LONG;
        stint = stint.saturating_add(took);
        if !computes || stint >= STINT {
            (place, stint) = (None, Duration::ZERO);
        }
    }
}

/// A place to compute at. `None` once the time is up: then the epoch has to see where the guest is.
async fn place(places: &Semaphore, deadline: Option<Instant>) -> Option<SemaphorePermit<'_>> {
    match (places.try_acquire(), deadline) {
        (Ok(place), _) => Some(place),
        (Err(_), Some(deadline)) => timeout_at(deadline.into(), places.acquire()).await.ok()?.ok(),
        (Err(_), None) => places.acquire().await.ok(),
    }
}

/// Waits until the task is woken, which is up to what was polled before.
async fn woken() {
    let mut is_woken = false;
    poll_fn(|_| if std::mem::replace(&mut is_woken, true) { Poll::Ready(()) } else { Poll::Pending }).await;
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::pin::pin;

    use futures_util::future::{join, join_all};

    use super::*;

    /// Computes for so many turns, each of which is told.
    async fn compute(turns: usize, tell: impl Fn()) -> usize {
        for _ in 0..turns {
            tell();
            let until = Instant::now() + LONG;
            while Instant::now() < until {}
            tokio::task::yield_now().await;
        }
        turns
    }

    /// Of those that compute, as many as have a place have a turn between two of somebody else, and all come to an end.
    #[tokio::test]
    async fn guests_that_compute_take_turns_at_the_places_and_not_all_between_two_turns_of_others() {
        let (places, turn) = (Semaphore::new(2), Cell::new(0));
        let seen = RefCell::new(Vec::new());
        let calls = (0..6).map(|guest| {
            let (places, turn, seen) = (&places, &turn, &seen);
            let tell = move || seen.borrow_mut().push((turn.get(), guest));
            async move { until(Instant::now(), None, places, pin!(compute(100, tell))).await }
        });
        let others = async {
            // The first turn needs no place.
            while seen.borrow().len() < 600 {
                turn.set(turn.get() + 1);
                tokio::task::yield_now().await;
            }
        };
        let (ends, ()) = join(join_all(calls), others).await;
        assert_eq!(ends, [Some(100); 6]);
        let seen = seen.into_inner();
        let turns: Vec<_> = seen.chunk_by(|one, other| one.0 == other.0).map(<[_]>::len).collect();
        // But for the first turn, which needs no place, and for those at which one guest follows upon another.
        let crowded = turns.iter().filter(|&&guests| guests > 2).count();
        assert!(crowded * 5 < turns.len(), "{crowded} of {}: {seen:?}", turns.len());
        let begun: std::collections::BTreeSet<_> = seen[..300].iter().skip(6).map(|(_, guest)| guest).collect();
        assert_eq!(begun.len(), 6, "one after the other: {seen:?}");
    }

    /// A guest without a place is looked at when its time is up; what waits for something else is given up then.
    #[tokio::test]
    async fn a_deadline_is_met_without_a_place() {
        let (places, began) = (Semaphore::new(0), Instant::now());
        let soon = || Some(Instant::now() + Duration::from_millis(5));
        assert_eq!(until(began, soon(), &places, pin!(std::future::pending::<()>())).await, None);
        let turns = Cell::new(0);
        let ended = until(Instant::now(), soon(), &places, pin!(compute(2, || turns.set(turns.get() + 1)))).await;
        assert_eq!((ended, turns.get()), (Some(2), 2));
    }
}
