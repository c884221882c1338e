//! Publishers that wait for their events to be finished, told by whoever settles the last delivery.
//!
//! What became of an event is not known here: who is told looks it up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use foldhash::HashMap;
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::Notify;

use crate::event::EventId;

/// Publishers waiting for events to be finished, by event id.
#[derive(Default)]
pub(super) struct Waiters {
    count: AtomicUsize,
    by_id: Mutex<HashMap<EventId, SmallVec<[Arc<Notify>; 1]>>>,
}

impl Waiters {
    /// Is told of this event from now on.
    pub(super) fn register(&self, id: &EventId) -> Waiting<'_> {
        let notify = Arc::new(Notify::new());
        let mut by_id = self.by_id.lock();
        by_id.entry(id.clone()).or_default().push(Arc::clone(&notify));
        self.count.fetch_add(1, Ordering::SeqCst);
        drop(by_id);
        Waiting { waiters: self, id: id.clone(), notify }
    }

    fn forget(&self, id: &EventId, notify: &Arc<Notify>) {
        let mut by_id = self.by_id.lock();
        if let Some(list) = by_id.get_mut(id) {
            list.retain(|known| !Arc::ptr_eq(known, notify));
            if list.is_empty() {
                by_id.remove(id);
            }
        }
        self.count.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn tell(&self, id: &EventId) {
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let by_id = self.by_id.lock();
        by_id.get(id).into_iter().flatten().for_each(|notify| notify.notify_one());
    }
}

/// Forgets its waiter when the waiting ends, however it ends.
pub(super) struct Waiting<'a> {
    waiters: &'a Waiters,
    id: EventId,
    notify: Arc<Notify>,
}

impl Waiting<'_> {
    /// Waits to be told, for `patience` at most.
    pub(super) async fn at_most(&self, patience: Duration) {
        let _ = tokio::time::timeout(patience, self.notify.notified()).await;
    }

    /// Lets other tasks have a turn: many a handler is done after it, and no timer needs to be armed.
    pub(super) async fn briefly(&self) -> bool {
        let mut notified = std::pin::pin!(self.notify.notified());
        let mut polls = 0;
        std::future::poll_fn(|context| {
            polls += 1;
            match notified.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending if polls > 1 => Poll::Ready(false),
                Poll::Pending => {
                    context.waker().wake_by_ref();
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waiters.forget(&self.id, &self.notify);
    }
}
