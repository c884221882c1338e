//! Slots: how many instances there may be at once, and the idle ones that keep theirs for the next event.
//!
//! When slots run short, the instance that has been idle the longest gives its own up, whichever plugin it is of, and
//! one that nobody asks for goes by itself. What an instance is is not known here.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// How long an instance stays idle before its memory is given back.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The most idle instances of one plugin: more than a broker usually has workers for it.
const MAX_IDLE: usize = 16;

/// The slots of an engine.
pub(super) struct Slots {
    count: usize,
    free: Arc<Semaphore>,
    /// How many wait for a slot.
    waiting: AtomicUsize,
    idle: Mutex<Vec<Weak<dyn Idling>>>,
}

/// The idle instances of one plugin, whatever they are.
trait Idling: Send + Sync {
    /// Since when the oldest is idle.
    fn oldest(&self) -> Option<Instant>;

    /// Lets those go that have been idle since `limit` or longer, at most `count` of them, the oldest first.
    fn release(&self, limit: Instant, count: usize);
}

impl Slots {
    /// This many slots.
    pub(super) fn new(count: u32) -> Arc<Self> {
        let count = usize::try_from(count).unwrap_or(Semaphore::MAX_PERMITS).clamp(1, Semaphore::MAX_PERMITS);
        let free = Arc::new(Semaphore::new(count));
        Arc::new(Self { count, free, waiting: AtomicUsize::new(0), idle: Mutex::default() })
    }

    /// Whether some slot is taken, be it by an instance that is idle.
    pub(super) fn are_taken(&self) -> bool {
        self.free.available_permits() < self.count
    }

    /// A slot that nobody has.
    pub(super) fn try_acquire(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).try_acquire_owned().ok()
    }

    /// A slot: at once where one is free or an instance is idle, and otherwise in turn.
    ///
    /// # Errors
    /// None in practice: slots are never closed.
    pub(super) async fn acquire(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        if let Some(slot) = self.try_acquire() {
            return Ok(slot);
        }
        // Said before looking: an instance that becomes idle after the look sees that somebody waits.
        let _waiting = Waiting::new(&self.waiting);
        self.release_oldest();
        Arc::clone(&self.free).acquire_owned().await
    }

    /// Lets instances go that have been idle for [`PATIENCE`] at this time.
    pub(super) fn release_idle(&self, now: Instant) {
        let Some(limit) = now.checked_sub(PATIENCE) else { return };
        for idle in self.all() {
            idle.release(limit, usize::MAX);
        }
    }

    fn release_oldest(&self) {
        let all = self.all();
        let oldest = all.iter().filter_map(|idle| Some((idle.oldest()?, idle))).min_by_key(|(since, _)| *since);
        if let Some((since, idle)) = oldest {
            idle.release(since, 1);
        }
    }

    fn all(&self) -> Vec<Arc<dyn Idling>> {
        let mut idle = self.idle.lock();
        idle.retain(|idle| idle.strong_count() > 0);
        idle.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Counts one that waits for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The idle instances of one plugin, each with its slot inside.
pub(super) struct Idle<T> {
    slots: Arc<Slots>,
    kept: Mutex<Kept<T>>,
}

struct Kept<T> {
    is_open: bool,
    /// The one that became idle last at the back.
    instances: VecDeque<(Instant, T)>,
}

impl<T: Send + 'static> Idle<T> {
    /// None yet, of instances with these slots.
    pub(super) fn new(slots: &Arc<Slots>) -> Arc<Self> {
        let kept = Kept { is_open: true, instances: VecDeque::new() };
        let idle = Arc::new(Self { slots: Arc::clone(slots), kept: Mutex::new(kept) });
        let known: Weak<Self> = Arc::downgrade(&idle);
        slots.idle.lock().push(known);
        idle
    }

    /// The instance that became idle last: its memory is the likeliest to be at hand.
    pub(super) fn take(&self) -> Option<T> {
        self.kept.lock().instances.pop_back().map(|(_, instance)| instance)
    }

    /// Keeps an instance for later, unless there are enough, somebody waits for its slot, or nobody may come any more.
    pub(super) fn put(&self, instance: T) {
        let mut kept = self.kept.lock();
        let over = match kept.is_open {
            false => Some(instance),
            true => {
                kept.instances.push_back((Instant::now(), instance));
                (kept.instances.len() > MAX_IDLE).then(|| kept.instances.pop_front()).flatten().map(|(_, over)| over)
            }
        };
        // Letting an instance go takes longer than the lock should be held.
        drop(kept);
        drop(over);
        if self.slots.waiting.load(Ordering::SeqCst) > 0 {
            self.slots.release_oldest();
        }
    }

    /// Instances may be kept.
    pub(super) fn open(&self) {
        self.kept.lock().is_open = true;
    }

    /// Lets all go and keeps no more.
    pub(super) fn close(&self) {
        let mut kept = self.kept.lock();
        kept.is_open = false;
        let instances = std::mem::take(&mut kept.instances);
        drop(kept);
        drop(instances);
    }
}

impl<T: Send + 'static> Idling for Idle<T> {
    fn oldest(&self) -> Option<Instant> {
        self.kept.lock().instances.front().map(|(since, _)| *since)
    }

    fn release(&self, limit: Instant, count: usize) {
        for _ in 0..count {
            let mut kept = self.kept.lock();
            let is_due = kept.instances.front().is_some_and(|(since, _)| *since <= limit);
            let due = is_due.then(|| kept.instances.pop_front()).flatten();
            drop(kept);
            if due.is_none() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn slot(slots: &Slots) -> OwnedSemaphorePermit {
        tokio::time::timeout(Duration::from_secs(10), slots.acquire()).await.expect("no slot became free").unwrap()
    }

    #[tokio::test]
    async fn the_instance_that_became_idle_last_is_used_first() {
        let slots = Slots::new(4);
        let idle = Idle::new(&slots);
        assert!(idle.take().is_none());
        for name in ["a", "b"] {
            idle.put((name, slot(&slots).await));
        }
        assert_eq!(idle.take().map(|(name, _)| name), Some("b"));
        assert_eq!(idle.take().map(|(name, _)| name), Some("a"));
    }

    #[tokio::test]
    async fn idle_instances_give_their_slots_to_others_the_oldest_first() {
        let slots = Slots::new(2);
        let (one, other) = (Idle::new(&slots), Idle::new(&slots));
        one.put(("old", slot(&slots).await));
        other.put(("young", slot(&slots).await));
        let _third = slot(&slots).await;
        assert!(one.take().is_none() && other.oldest().is_some());
        let _fourth = slot(&slots).await;
        assert!(other.take().is_none());
    }

    #[tokio::test]
    async fn an_instance_for_whose_slot_somebody_waits_is_not_kept() {
        let slots = Slots::new(1);
        let idle = Idle::new(&slots);
        let busy = slot(&slots).await;
        let waiting = tokio::spawn({
            let slots = Arc::clone(&slots);
            async move { slot(&slots).await }
        });
        while slots.waiting.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        idle.put(busy);
        drop(waiting.await.unwrap());
        assert!(idle.take().is_none());
        assert_eq!(slots.waiting.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn an_instance_that_nobody_asks_for_goes_after_a_while() {
        let slots = Slots::new(1);
        let idle = Idle::new(&slots);
        idle.put(slot(&slots).await);
        slots.release_idle(Instant::now());
        assert!(idle.oldest().is_some());
        slots.release_idle(Instant::now() + PATIENCE);
        assert!(idle.oldest().is_none());
    }

    #[tokio::test]
    async fn no_more_are_kept_than_are_of_use_and_none_once_closed() {
        let slots = Slots::new(100);
        let idle = Idle::new(&slots);
        for number in 0..=MAX_IDLE {
            idle.put((number, slot(&slots).await));
        }
        assert_eq!(idle.kept.lock().instances.front().map(|(_, (number, _))| *number), Some(1));
        idle.close();
        assert_eq!(slots.free.available_permits(), 100);
        idle.put((0, slot(&slots).await));
        assert!(idle.take().is_none());
        idle.open();
        idle.put((0, slot(&slots).await));
        assert!(idle.take().is_some());
    }
}
