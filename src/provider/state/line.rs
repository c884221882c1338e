//! What waits for one subscription: ready deliveries, later ones, leases that may expire, and whose turn it is by key.
//!
//! All entries but the keys' are hints. Whether one still stands is looked up in the log when its turn comes, so that a
//! delivery that goes another way (settled, cancelled, erased) needs no search here.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;

use super::log::Log;
use super::queue::Queue;
use crate::event::Seq;
use crate::subscription::Ordering;

/// One subscription's line.
pub(in crate::provider) struct Line {
    pub(in crate::provider) name: Arc<str>,
    ready: Queue,
    /// By due time.
    waiting: BinaryHeap<Reverse<(i64, Seq)>>,
    /// By the end of the lease, with the token; a renewed lease stands here more than once.
    leases: BinaryHeap<Reverse<(i64, Seq, u64)>>,
    /// How many leases are live.
    leased: usize,
    /// Open deliveries by key, while the subscription is claimed in their order.
    keys: Option<HashMap<Arc<str>, BTreeSet<Seq>>>,
}

/// Below this many, dead entries of leases are not worth looking for.
const FEW_LEASES: usize = 1_024;

impl Line {
    pub(in crate::provider) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            ready: Queue::default(),
            waiting: BinaryHeap::new(),
            leases: BinaryHeap::new(),
            leased: 0,
            keys: None,
        }
    }

    pub(in crate::provider) fn ordering(&self) -> Ordering {
        if self.keys.is_some() { Ordering::Key } else { Ordering::None }
    }

    /// Forgets everything and begins anew with this ordering.
    pub(in crate::provider) fn restart(&mut self, ordering: Ordering) {
        *self = Self::new(Arc::clone(&self.name));
        self.keys = (ordering == Ordering::Key).then(HashMap::new);
    }

    /// A delivery has become open.
    pub(in crate::provider) fn open(&mut self, seq: Seq, key: Option<&Arc<str>>) {
        if let (Some(keys), Some(key)) = (&mut self.keys, key) {
            keys.entry(Arc::clone(key)).or_default().insert(seq);
        }
    }

    /// A delivery waits for `due`.
    pub(in crate::provider) fn wait(&mut self, seq: Seq, due: i64, now: i64) {
        if due <= now { self.ready.push(seq) } else { self.waiting.push(Reverse((due, seq))) }
    }

    /// A delivery has ended or is gone: the next one of its key has its turn.
    pub(in crate::provider) fn close(&mut self, seq: Seq, key: Option<&Arc<str>>) {
        let (Some(keys), Some(key)) = (&mut self.keys, key) else { return };
        let Some(seqs) = keys.get_mut(key) else { return };
        seqs.remove(&seq);
        match seqs.first() {
            Some(&next) => self.ready.push(next),
            None => drop(keys.remove(key)),
        }
    }

    /// Whether no earlier delivery of the key is open.
    pub(in crate::provider) fn is_turn(&self, seq: Seq, key: Option<&Arc<str>>) -> bool {
        let (Some(keys), Some(key)) = (&self.keys, key) else { return true };
        keys.get(key).and_then(BTreeSet::first).is_none_or(|&first| first >= seq)
    }

    pub(in crate::provider) fn lease(&mut self, end: i64, seq: Seq, token: u64) {
        self.leased += 1;
        self.leases.push(Reverse((end, seq, token)));
    }

    pub(in crate::provider) fn renew(&mut self, end: i64, seq: Seq, token: u64) {
        self.leases.push(Reverse((end, seq, token)));
    }

    pub(in crate::provider) fn unlease(&mut self) {
        self.leased = self.leased.saturating_sub(1);
    }

    /// Drops the entries of leases that are no longer held, when they are most of all.
    pub(in crate::provider) fn tidy(&mut self, log: &Log, subscription: usize) {
        if self.leases.len() > FEW_LEASES + 2 * self.leased {
            let held = |&Reverse((_, seq, token)): &Reverse<(i64, Seq, u64)>| {
                log.get(seq).and_then(|slot| slot.work(subscription)).is_some_and(|work| work.is_held(token))
            };
            self.leases.retain(held);
        }
    }

    /// The next delivery that may be ready.
    pub(in crate::provider) fn pop(&mut self, now: i64) -> Option<Seq> {
        while let Some(&Reverse((due, seq))) = self.waiting.peek()
            && due <= now
        {
            self.waiting.pop();
            self.ready.push(seq);
        }
        self.ready.pop()
    }

    /// The next lease that may have expired, with its token.
    pub(in crate::provider) fn pop_expired(&mut self, now: i64) -> Option<(Seq, u64)> {
        let &Reverse((end, seq, token)) = self.leases.peek()?;
        if end > now {
            return None;
        }
        self.leases.pop();
        Some((seq, token))
    }

    /// When something may become due or expire.
    pub(in crate::provider) fn next_time(&self) -> Option<i64> {
        let due = self.waiting.peek().map(|&Reverse((due, _))| due);
        let end = self.leases.peek().map(|&Reverse((end, ..))| end);
        due.into_iter().chain(end).min()
    }

    /// As [`next_time`](Self::next_time), and the beginning of time when something may be ready already.
    pub(in crate::provider) fn next_time_or_ready(&self) -> Option<i64> {
        if self.ready.is_empty() { self.next_time() } else { Some(i64::MIN) }
    }
}
