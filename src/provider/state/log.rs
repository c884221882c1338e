//! The log in memory: events by seq with their deliveries, and counts by status that are always in step.
//!
//! Knows nothing of what waits, is due or is leased; those are [`line`](super::line)'s.

use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use smallvec::SmallVec;

use super::queue::Queue;
use super::work::{Tally, Work};
use crate::delivery::Status;
use crate::event::{Event, EventId, Seq};

/// An event and its deliveries.
#[derive(Clone)]
pub(in crate::provider) struct Slot {
    pub(in crate::provider) event: Arc<Event>,
    /// When it was sequenced.
    pub(in crate::provider) appended: i64,
    /// The hash of its id.
    hash: u64,
    /// In ascending order of `Work::subscription`.
    works: SmallVec<[Work; 1]>,
    tally: Tally,
    /// How many of `works` were ever begun.
    started: u32,
}

impl Slot {
    pub(in crate::provider) fn status(&self) -> Status {
        Status::of_event(self.tally.present(), self.started > 0)
    }

    pub(in crate::provider) fn is_open(&self) -> bool {
        self.tally.open() > 0
    }

    /// How many deliveries are open.
    pub(in crate::provider) fn open_works(&self) -> u64 {
        self.tally.open()
    }

    pub(in crate::provider) fn works(&self) -> &[Work] {
        &self.works
    }

    /// The delivery to a subscription.
    pub(in crate::provider) fn work(&self, subscription: usize) -> Option<&Work> {
        let at = self.place(subscription).ok()?;
        self.works.get(at)
    }

    fn place(&self, subscription: usize) -> Result<usize, usize> {
        self.works.binary_search_by_key(&subscription, |work| work.subscription)
    }
}

/// An id that was looked up.
pub(in crate::provider) struct Found {
    hash: u64,
    /// Where it stands.
    pub(in crate::provider) seq: Option<Seq>,
}

/// Seqs by the hash of their event's id. The ids themselves are left where they are: an event that goes has not been looked
/// at for long, and reading its id again would wait for memory.
#[derive(Default)]
struct Ids {
    hasher: RandomState,
    entries: HashTable<(u64, Seq)>,
}

impl Ids {
    fn hash(&self, id: &str) -> u64 {
        self.hasher.hash_one(id)
    }

    /// The seq of this hash that `is_it`.
    fn find(&self, hash: u64, is_it: impl Fn(Seq) -> bool) -> Option<Seq> {
        self.entries.find(hash, |&(known, seq)| known == hash && is_it(seq)).map(|&(_, seq)| seq)
    }

    fn insert(&mut self, hash: u64, seq: Seq) {
        self.entries.insert_unique(hash, (hash, seq), |&(hash, _)| hash);
    }

    fn remove(&mut self, hash: u64, seq: Seq) {
        if let Ok(entry) = self.entries.find_entry(hash, |&(_, known)| known == seq) {
            entry.remove();
        }
    }
}

/// Events by seq. An erased event leaves its id and seq behind.
#[derive(Default)]
pub(in crate::provider) struct Log {
    /// The highest seq given out.
    pub(in crate::provider) head: Seq,
    /// The highest seq that was pruned or evicted.
    pruned: Seq,
    /// The slots from `head + 1 - recent.len()` to `head`.
    recent: VecDeque<Option<Arc<Slot>>>,
    /// How many of `recent` are empty.
    holes: usize,
    /// Slots below `recent`: open events that outlived most of what came after them.
    older: BTreeMap<Seq, Arc<Slot>>,
    /// Which id stands where; also those of erased events.
    ids: Ids,
    /// Erased events, with the time that they were made.
    erased: BTreeMap<Seq, (EventId, i64)>,
    /// Events that may be finished, oldest first.
    finished: Queue,
    /// What was forgotten since it was last asked for.
    gone: Vec<Arc<Slot>>,
    /// Events by status.
    pub(in crate::provider) events: Tally,
    /// Deliveries by status.
    pub(in crate::provider) deliveries: Tally,
}

/// The most events that are removed together. What was not touched for long is slow to come by, and several are fetched in the
/// time of one.
pub(super) const TOGETHER: usize = 32;

/// Below this many slots, holes cost nothing worth moving anything for.
const FEW_SLOTS: usize = 1_024;

impl Log {
    pub(in crate::provider) fn total(&self) -> u64 {
        let Tally { pending, processing, completed, failed } = self.events;
        pending + processing + completed + failed
    }

    pub(in crate::provider) fn floor(&self) -> Seq {
        self.pruned + 1
    }

    #[cfg(test)]
    pub(in crate::provider) fn places(&self) -> usize {
        self.recent.len()
    }

    pub(in crate::provider) fn seq_of(&self, id: &str) -> Option<Seq> {
        self.find(self.ids.hash(id), id)
    }

    fn find(&self, hash: u64, id: &str) -> Option<Seq> {
        self.ids.find(hash, |seq| self.id_at(seq).is_some_and(|known| known.as_str() == id))
    }

    /// Looks up an id for [`push`](Self::push).
    pub(in crate::provider) fn look_up(&self, id: &EventId) -> Found {
        let hash = self.ids.hash(id.as_str());
        Found { hash, seq: self.find(hash, id.as_str()) }
    }

    fn id_at(&self, seq: Seq) -> Option<&EventId> {
        self.get(seq).map(|slot| &slot.event.id).or_else(|| self.erased.get(&seq).map(|(id, _)| id))
    }

    fn first_recent(&self) -> Seq {
        self.head + 1 - self.recent.len() as Seq
    }

    pub(in crate::provider) fn get(&self, seq: Seq) -> Option<&Slot> {
        match seq.checked_sub(self.first_recent()) {
            Some(offset) => self.recent.get(usize::try_from(offset).ok()?)?.as_deref(),
            None => self.older.get(&seq).map(|slot| &**slot),
        }
    }

    fn get_mut(&mut self, seq: Seq) -> Option<&mut Slot> {
        let slot = match seq.checked_sub(self.first_recent()) {
            Some(offset) => self.recent.get_mut(usize::try_from(offset).ok()?)?.as_mut(),
            None => self.older.get_mut(&seq),
        };
        slot.map(Arc::make_mut)
    }

    /// All slots as they are now, ascending: what is changed from here on is changed in a copy.
    pub(in crate::provider) fn shared(&self) -> Vec<(Seq, Arc<Slot>)> {
        let older = self.older.iter().map(|(&seq, slot)| (seq, Arc::clone(slot)));
        let recent = (self.first_recent()..).zip(&self.recent);
        older.chain(recent.filter_map(|(seq, slot)| Some((seq, Arc::clone(slot.as_ref()?))))).collect()
    }

    /// The slots after `after`, ascending.
    pub(in crate::provider) fn after(&self, after: Seq) -> impl Iterator<Item = (Seq, &Slot)> {
        let first = self.first_recent();
        let skip = usize::try_from((after + 1).saturating_sub(first)).unwrap_or(usize::MAX).min(self.recent.len());
        let older = self.older.range(after.saturating_add(1)..).map(|(&seq, slot)| (seq, &**slot));
        let recent = self.recent.range(skip..).enumerate();
        older.chain(
            recent.filter_map(move |(offset, slot)| {
                slot.as_deref().map(|slot| (first + skip as Seq + offset as Seq, slot))
            }),
        )
    }

    /// The slots before `before`, descending.
    pub(in crate::provider) fn before(&self, before: Option<Seq>) -> impl Iterator<Item = (Seq, &Slot)> {
        let first = self.first_recent();
        let before = before.unwrap_or(Seq::MAX);
        let keep = usize::try_from(before.saturating_sub(first)).unwrap_or(usize::MAX).min(self.recent.len());
        let older = self.older.range(..before).rev().map(|(&seq, slot)| (seq, &**slot));
        let recent = self.recent.range(..keep).enumerate().rev();
        recent.filter_map(move |(offset, slot)| slot.as_deref().map(|slot| (first + offset as Seq, slot))).chain(older)
    }

    /// Puts another form of the same event in its place.
    pub(in crate::provider) fn replace(&mut self, event: Arc<Event>) {
        if let Some(slot) = event.seq.and_then(|seq| self.get_mut(seq)) {
            slot.event = event;
        }
    }

    /// The highest seq that is gone, and the erased events by seq: their ids, and when they were made.
    pub(in crate::provider) fn past(&self) -> (Seq, &BTreeMap<Seq, (EventId, i64)>) {
        (self.pruned, &self.erased)
    }

    /// Makes an empty log one that reached `head` with this past.
    pub(in crate::provider) fn resume(&mut self, head: Seq, pruned: Seq, erased: BTreeMap<Seq, (EventId, i64)>) {
        for (&seq, (id, _)) in &erased {
            self.ids.insert(self.ids.hash(id.as_str()), seq);
        }
        (self.head, self.pruned, self.erased) = (head, pruned, erased);
    }

    /// Puts an event back where it stood, before others are added.
    pub(in crate::provider) fn restore(&mut self, seq: Seq, event: Arc<Event>, appended: i64, works: Vec<Work>) {
        let hash = self.ids.hash(event.id.as_str());
        self.ids.insert(hash, seq);
        let mut tally = Tally::default();
        for work in &works {
            tally.add(work.status);
            self.deliveries.add(work.status);
        }
        let started = works.iter().filter(|work| work.started_at.is_some()).count() as u32;
        let slot = Slot { event, appended, hash, works: works.into(), tally, started };
        self.events.add(slot.status());
        if !slot.is_open() {
            self.finished.push(seq);
        }
        self.older.insert(seq, Arc::new(slot));
    }

    /// Adds an event whose id is new; `subscriptions` ascend.
    pub(in crate::provider) fn push(
        &mut self,
        mut event: Arc<Event>,
        Found { hash, .. }: Found,
        subscriptions: &[usize],
        now: i64,
    ) -> Status {
        self.head += 1;
        Arc::make_mut(&mut event).seq = Some(self.head);
        self.ids.insert(hash, self.head);
        let works = match subscriptions {
            &[subscription] => SmallVec::from_buf([Work::new(subscription, now)]),
            many => many.iter().map(|&subscription| Work::new(subscription, now)).collect(),
        };
        let tally = Tally { pending: subscriptions.len() as u64, ..Tally::default() };
        let slot = Slot { event, appended: now, hash, works, tally, started: 0 };
        self.deliveries.pending += tally.pending;
        let status = slot.status();
        self.events.add(status);
        if subscriptions.is_empty() {
            self.finished.push(self.head);
        }
        self.recent.push_back(Some(Arc::new(slot)));
        status
    }

    /// Changes one delivery through `edit` and keeps the counts in step. `None` when there is no such delivery.
    pub(in crate::provider) fn change<T>(
        &mut self,
        seq: Seq,
        subscription: usize,
        edit: impl FnOnce(&Event, &mut Work) -> T,
    ) -> Option<T> {
        let (mut events, mut deliveries) = (self.events, self.deliveries);
        let slot = self.get_mut(seq)?;
        let (before, was_open) = (slot.status(), slot.is_open());
        let at = slot.place(subscription).ok()?;
        let work = slot.works.get_mut(at)?;
        let (from, begun) = (work.status, work.started_at.is_some());
        let answer = edit(&slot.event, work);
        slot.tally.shift(from, work.status);
        deliveries.shift(from, work.status);
        slot.started = slot.started + u32::from(work.started_at.is_some()) - u32::from(begun);
        events.shift(before, slot.status());
        let finished = was_open && !slot.is_open();
        (self.events, self.deliveries) = (events, deliveries);
        if finished {
            self.finished.push(seq);
        }
        Some(answer)
    }

    /// Adds a delivery to an event that has none for the subscription. `false` when it has one, or is gone.
    pub(in crate::provider) fn deliver(&mut self, seq: Seq, work: Work) -> bool {
        let mut events = self.events;
        let Some(slot) = self.get_mut(seq) else { return false };
        let Err(at) = slot.place(work.subscription) else { return false };
        let before = slot.status();
        slot.tally.add(work.status);
        let status = work.status;
        slot.works.insert(at, work);
        events.shift(before, slot.status());
        self.events = events;
        self.deliveries.add(status);
        true
    }

    /// Takes a delivery away.
    pub(in crate::provider) fn withdraw(&mut self, seq: Seq, subscription: usize) -> Option<Work> {
        let mut events = self.events;
        let slot = self.get_mut(seq)?;
        let at = slot.place(subscription).ok()?;
        let (before, was_open) = (slot.status(), slot.is_open());
        let work = slot.works.remove(at);
        slot.tally.remove(work.status);
        slot.started -= u32::from(work.started_at.is_some());
        events.shift(before, slot.status());
        let finished = was_open && !slot.is_open();
        self.events = events;
        self.deliveries.remove(work.status);
        if finished {
            self.finished.push(seq);
        }
        Some(work)
    }

    fn take(&mut self, seq: Seq) -> Option<Arc<Slot>> {
        let slot = match seq.checked_sub(self.first_recent()) {
            Some(offset) => self.recent.get_mut(usize::try_from(offset).ok()?)?.take().inspect(|_| self.holes += 1),
            None => self.older.remove(&seq),
        }?;
        self.events.remove(slot.status());
        for work in &slot.works {
            self.deliveries.remove(work.status);
        }
        Some(slot)
    }

    /// Removes an event's content for good, and returns it.
    pub(in crate::provider) fn erase(&mut self, seq: Seq) -> Option<Arc<Slot>> {
        let slot = self.take(seq)?;
        self.erased.insert(seq, (slot.event.id.clone(), slot.event.created_at.as_microsecond()));
        Some(slot)
    }

    fn forget(&mut self, seq: Seq) -> bool {
        let Some(slot) = self.take(seq) else { return false };
        self.ids.remove(slot.hash, seq);
        self.pruned = self.pruned.max(seq);
        self.gone.push(slot);
        true
    }

    /// What was forgotten, for the caller to drop where nobody waits: of memory that was not touched for long that takes as
    /// long as all the rest of an append.
    pub(in crate::provider) fn take_gone(&mut self) -> Vec<Arc<Slot>> {
        std::mem::take(&mut self.gone)
    }

    /// Removes up to `count` of the oldest finished events, and says how many it found.
    pub(in crate::provider) fn evict(&mut self, count: usize) -> u64 {
        // First all are looked at, and then they are taken.
        let mut oldest: SmallVec<[Seq; TOGETHER]> = SmallVec::new();
        while oldest.len() < count
            && let Some(seq) = self.finished.pop()
        {
            if self.get(seq).is_some_and(|slot| !slot.is_open()) {
                oldest.push(seq);
            }
        }
        let gone = oldest.into_iter().filter(|&seq| self.forget(seq)).count();
        self.tidy();
        gone as u64
    }

    /// Removes the oldest finished events while there are more than `max` events.
    pub(in crate::provider) fn shrink(&mut self, max: u64) -> u64 {
        let mut gone = 0;
        while self.total() > max {
            let too_many = usize::try_from(self.total() - max).unwrap_or(usize::MAX);
            match self.evict(too_many.min(TOGETHER)) {
                0 => break,
                more => gone += more,
            }
        }
        gone
    }

    /// Removes the finished events that were made before `instant`, and the last traces of those erased so long ago.
    pub(in crate::provider) fn expire(&mut self, instant: i64) -> u64 {
        let old = |slot: &Slot| !slot.is_open() && slot.event.created_at.as_microsecond() < instant;
        let gone: Vec<Seq> = self.after(0).filter(|(_, slot)| old(slot)).map(|(seq, _)| seq).collect();
        for &seq in &gone {
            self.forget(seq);
        }
        for (seq, (id, _)) in self.erased.extract_if(.., |_, (_, created)| *created < instant) {
            self.ids.remove(self.ids.hash(id.as_str()), seq);
            self.pruned = self.pruned.max(seq);
        }
        self.tidy();
        gone.len() as u64
    }

    /// Lets go of empty places, and moves lone old slots away when they would keep many empty places alive.
    fn tidy(&mut self) {
        loop {
            let first = self.first_recent();
            let sparse = self.recent.len() > FEW_SLOTS && self.holes * 2 > self.recent.len();
            match self.recent.front_mut() {
                Some(None) => self.holes -= 1,
                Some(front) if sparse => self.older.extend(front.take().map(|slot| (first, slot))),
                _ => return,
            }
            self.recent.pop_front();
        }
    }
}
