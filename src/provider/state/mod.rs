//! All that a store in memory holds, and what happens to it: append, claim, renew and settle.
//!
//! A state machine: synchronous, handed the time and the seed of its lease tokens, so that the same calls in the same order
//! make the same state anywhere. The lock, the clock and what outlives the process are its provider's.

mod documents;
mod image;
mod line;
mod log;
mod operate;
mod queue;
mod work;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use smallvec::SmallVec;

use self::documents::Shelf;
pub(in crate::provider) use self::image::{Capture, Image, bare};
use self::line::Line;
use self::log::Log;
use self::work::Work;
pub(in crate::provider) use self::work::as_micros;
use crate::delivery::{Attempt, Next, Status};
use crate::error::{Error, Result};
use crate::event::{Event, Seq, micros};
use crate::provider::{
    Append, Appended, ClaimRequest, Claimed, Lease, LeaseKey, Lost, Settled, Settlement, Want, rules,
};
use crate::subscription::Ordering;

/// The contents of the store.
pub(in crate::provider) struct State {
    pub(in crate::provider) log: Log,
    pub(in crate::provider) lines: Lines,
    pub(in crate::provider) shelf: Shelf,
    pub(in crate::provider) evictions: u64,
    /// Where lease tokens come from.
    tokens: Tokens,
    max_events: u64,
}

/// The share of the finished events that go at once: what has just finished may still be asked for.
const EVICTION_SHARE: u64 = 64;

/// The lines by subscription. An index, once given, stays.
#[derive(Default)]
pub(in crate::provider) struct Lines {
    list: Vec<Line>,
    names: HashMap<Arc<str>, usize>,
    /// Publishers hand in the same list of names again and again.
    last: Option<Lookup>,
}

/// Lease tokens: SplitMix64 (Steele, Lea and Flood, 2014), the same from the same seed on every machine and in every
/// version.
struct Tokens(u64);

impl Tokens {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A list of names, and the indices that it stands for.
struct Lookup {
    names: Arc<[Arc<str>]>,
    indices: Arc<[usize]>,
}

impl Lines {
    pub(in crate::provider) fn find(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    pub(in crate::provider) fn index(&mut self, name: &Arc<str>) -> usize {
        if let Some(index) = self.find(name) {
            return index;
        }
        self.names.insert(Arc::clone(name), self.list.len());
        self.list.push(Line::new(Arc::clone(name)));
        self.list.len() - 1
    }

    /// The indices of these names, ascending and each once.
    fn indices(&mut self, names: &Arc<[Arc<str>]>) -> Arc<[usize]> {
        if let Some(last) = &self.last
            && Arc::ptr_eq(&last.names, names)
        {
            return Arc::clone(&last.indices);
        }
        let mut indices: Vec<usize> = names.iter().map(|name| self.index(name)).collect();
        indices.sort_unstable();
        indices.dedup();
        let indices: Arc<[usize]> = indices.into();
        self.last = Some(Lookup { names: Arc::clone(names), indices: Arc::clone(&indices) });
        indices
    }

    pub(in crate::provider) fn get(&mut self, index: usize) -> Option<&mut Line> {
        self.list.get_mut(index)
    }

    pub(in crate::provider) fn name(&self, index: usize) -> Arc<str> {
        self.list.get(index).map(|line| Arc::clone(&line.name)).unwrap_or_default()
    }
}

impl State {
    /// Empty, with room for `max_events`; `seed` is where its lease tokens come from.
    pub(in crate::provider) fn new(max_events: u64, seed: u64) -> Self {
        Self {
            log: Log::default(),
            lines: Lines::default(),
            shelf: Shelf::default(),
            evictions: 0,
            tokens: Tokens(seed),
            max_events,
        }
    }

    pub(in crate::provider) fn append(&mut self, batch: Vec<Append>, now: i64) -> Result<Vec<Appended>> {
        if !self.has_room(&batch, 0) {
            let reason = format!("all of the {} events that memory may hold are open", self.max_events);
            return Err(Error::Overloaded { reason: reason.into(), retry_after: Duration::from_secs(1) });
        }
        Ok(batch.into_iter().map(|append| self.append_one(append, now)).collect())
    }

    /// Whether the batch fits once finished events are evicted and `closing` open ones are finished.
    fn has_room(&self, batch: &[Append], closing: u64) -> bool {
        let open = self.log.events.open().saturating_sub(closing);
        if open + batch.len() as u64 <= self.max_events {
            return true;
        }
        let mut ids = HashSet::new();
        let opens = |append: &&Append| {
            let id = append.event.id.as_str();
            !append.subscriptions.is_empty() && self.log.seq_of(id).is_none() && ids.insert(id.to_owned())
        };
        open + batch.iter().filter(opens).count() as u64 <= self.max_events
    }

    fn append_one(&mut self, append: Append, now: i64) -> Appended {
        let Append { event, subscriptions } = append;
        let id = self.log.look_up(&event.id);
        if let Some(seq) = id.seq {
            let status = self.log.get(seq).map_or(Status::Completed, log::Slot::status);
            return Appended { seq, duplicate: true, status };
        }
        let indices = self.lines.indices(&subscriptions);
        let key = event.key.clone();
        let status = self.log.push(event, id, &indices, now);
        let seq = self.log.head;
        for &index in &*indices {
            if let Some(line) = self.lines.get(index) {
                line.open(seq, key.as_ref());
                line.wait(seq, now, now);
            }
        }
        if self.log.total() > self.max_events {
            let finished = self.log.total() - self.log.events.open();
            let some = (finished / EVICTION_SHARE).clamp(1, log::TOGETHER as u64);
            self.evictions += self.log.evict(some as usize);
        }
        Appended { seq, duplicate: false, status }
    }

    /// Has the lease tokens that come next follow from `seed` alone.
    pub(in crate::provider) fn reseed(&mut self, seed: u64) {
        self.tokens = Tokens(seed);
    }

    /// When a claim may next give or take away something: in the past when it may now, `None` when nothing waits.
    pub(in crate::provider) fn next_time(&self, request: &ClaimRequest) -> Option<i64> {
        let lines = request.wants.iter().filter_map(|want| {
            let line = self.lines.list.get(self.lines.find(&want.subscription)?)?;
            if line.ordering() == want.ordering { line.next_time_or_ready() } else { Some(i64::MIN) }
        });
        lines.min()
    }

    pub(in crate::provider) fn claim(&mut self, request: &ClaimRequest, now: i64) -> Claimed {
        let mut claimed = Claimed::default();
        let mut next_time: Option<i64> = None;
        for want in &request.wants {
            let index = self.lines.index(&want.subscription);
            self.set_ordering(index, want.ordering, now);
            self.expire_leases(index, now, &mut claimed.lost);
            self.take(index, want, request, now, &mut claimed.leases);
            let time = self.lines.get(index).and_then(|line| line.next_time());
            next_time = next_time.into_iter().chain(time).min();
        }
        let until = |time: i64| Duration::from_micros(u64::try_from(time.saturating_sub(now)).unwrap_or(0));
        claimed.next_due = next_time.map(until);
        claimed
    }

    /// Makes the line anew when it is claimed in another order than before.
    fn set_ordering(&mut self, index: usize, ordering: Ordering, now: i64) {
        let Some(line) = self.lines.get(index) else { return };
        if line.ordering() == ordering {
            return;
        }
        line.restart(ordering);
        for (seq, slot) in self.log.after(0) {
            let Some(work) = slot.work(index) else { continue };
            match work.status {
                Status::Pending => line.wait(seq, work.due, now),
                Status::Processing => line.lease(work.lease_end, seq, work.token),
                Status::Completed | Status::Failed => continue,
            }
            line.open(seq, slot.event.key.as_ref());
        }
    }

    fn expire_leases(&mut self, index: usize, now: i64, lost: &mut Vec<Lost>) {
        while let Some((seq, token)) = self.lines.get(index).and_then(|line| line.pop_expired(now)) {
            let Some(work) = self.log.get(seq).and_then(|slot| slot.work(index)) else { continue };
            if !work.is_held(token) || work.lease_end > now {
                continue;
            }
            let worker = work.worker.clone().unwrap_or_default();
            let attempt = rules::lost_attempt(work.number(), worker, micros(work.claimed_at), micros(now));
            let next = rules::lost_next(work.infra_faults + 1);
            self.end(index, seq, next, Some(attempt), now);
            if let Some(subscription) = self.lines.get(index).map(|line| Arc::clone(&line.name)) {
                lost.push(Lost { key: LeaseKey { seq, subscription, token }, next });
            }
        }
    }

    fn take(&mut self, index: usize, want: &Want, request: &ClaimRequest, now: i64, leases: &mut Vec<Lease>) {
        let Self { log, lines, tokens, .. } = self;
        let Some(line) = lines.get(index) else { return };
        let lease_end = now.saturating_add(as_micros(request.lease));
        let full = leases.len().saturating_add(want.room);
        let is_ready = |work: &Work| work.status == Status::Pending && work.due <= now;
        loop {
            // First several are looked at, and then they are leased: what another processor wrote is fetched in the time
            // of one.
            let mut next: SmallVec<[Seq; log::TOGETHER]> = SmallVec::new();
            while next.len() < log::TOGETHER.min(full - leases.len())
                && let Some(seq) = line.pop(now)
            {
                let Some(slot) = log.get(seq) else { continue };
                if slot.work(index).is_some_and(is_ready) && line.is_turn(seq, slot.event.key.as_ref()) {
                    next.push(seq);
                }
            }
            if next.is_empty() {
                break;
            }
            for seq in next {
                // An entry may stand in line more than once.
                let Some(slot) = log.get(seq).filter(|slot| slot.work(index).is_some_and(is_ready)) else { continue };
                let (event, appended) = (Arc::clone(&slot.event), slot.appended);
                let token = tokens.next();
                let lease = log.change(seq, index, |_, work| {
                    work.claim(&request.worker, token, now, lease_end);
                    Lease {
                        event,
                        key: LeaseKey { seq, subscription: Arc::clone(&line.name), token },
                        attempt: work.tries.saturating_add(1),
                        number: work.number(),
                        infra_faults: work.infra_faults,
                        age: Duration::from_micros(u64::try_from(now - appended).unwrap_or(0)),
                        is_replay: work.is_replay,
                    }
                });
                line.lease(lease_end, seq, token);
                leases.extend(lease);
            }
        }
        line.tidy(log, index);
    }

    pub(in crate::provider) fn renew(&mut self, key: &LeaseKey, lease: Duration, now: i64) -> bool {
        let Some(index) = self.held(key) else { return false };
        let end = now.saturating_add(as_micros(lease));
        self.log.change(key.seq, index, |_, work| work.lease_end = end);
        if let Some(line) = self.lines.get(index) {
            line.renew(end, key.seq, key.token);
        }
        true
    }

    /// The index of the subscription, if the lease is held.
    fn held(&self, key: &LeaseKey) -> Option<usize> {
        let index = self.lines.find(&key.subscription)?;
        let work = self.log.get(key.seq)?.work(index)?;
        work.is_held(key.token).then_some(index)
    }

    pub(in crate::provider) fn settle(&mut self, settlement: Settlement, now: i64) -> Settled {
        let Settlement { key, next, attempt, published, writes } = settlement;
        let Some(index) = self.held(&key) else { return Settled::Stale };
        if next != Next::Complete {
            self.end(index, key.seq, next, attempt, now);
            return Settled::Done { finished: self.finished(key.seq) };
        }
        let changes = match self.shelf.plan(&writes, now) {
            Ok(changes) => changes,
            Err(reason) => return Settled::Conflict { reason },
        };
        let closing = self.log.get(key.seq).is_some_and(|slot| slot.open_works() == 1);
        if !published.is_empty() && !self.has_room(&published, closing.into()) {
            let reason = format!("no room for {} published events: memory is full of open ones", published.len());
            return Settled::Conflict { reason };
        }
        self.shelf.apply(changes);
        self.end(index, key.seq, next, attempt, now);
        let finished = self.finished(key.seq);
        for append in published {
            self.append_one(append, now);
        }
        Settled::Done { finished }
    }

    /// How an event ended that has no open delivery.
    fn finished(&self, seq: Seq) -> Option<Status> {
        self.log.get(seq).filter(|slot| !slot.is_open()).map(log::Slot::status)
    }

    /// Ends a claim and lines the delivery up again, or the next one of its key.
    fn end(&mut self, index: usize, seq: Seq, next: Next, attempt: Option<Attempt>, now: i64) {
        let Self { log, lines, .. } = self;
        let Some(line) = lines.get(index) else { return };
        let edit = |event: &Event, work: &mut work::Work| {
            work.settle(next, attempt, now);
            line.unlease();
            match work.status.is_terminal() {
                true => line.close(seq, event.key.as_ref()),
                false => line.wait(seq, work.due, now),
            }
        };
        log.change(seq, index, edit);
    }
}
