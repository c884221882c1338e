//! What operators see and change: lists, dead letters, redrive, replay, cancel and erase.

use std::sync::Arc;

use super::State;
use super::log::Slot;
use super::work::Work;
use crate::delivery::{Delivery, EventDetail, EventRecord, Move, Status};
use crate::event::Seq;
use crate::provider::{
    Amendment, DeadLetter, DeadLetterFilter, DeadLetterPage, EventFilter, EventPage, LogPage, Replay, rules,
};

impl State {
    fn deliveries(&self, slot: &Slot) -> Vec<Delivery> {
        let mut deliveries: Vec<Delivery> =
            slot.works().iter().map(|work| work.delivery(self.lines.name(work.subscription))).collect();
        deliveries.sort_by(|a, b| a.subscription.cmp(&b.subscription));
        deliveries
    }

    fn record(&self, slot: &Slot) -> EventRecord {
        EventRecord::derive(Arc::clone(&slot.event), &self.deliveries(slot))
    }

    pub(in crate::provider) fn get(&self, id: &str) -> Option<EventDetail> {
        let slot = self.log.get(self.log.seq_of(id)?)?;
        let deliveries = self.deliveries(slot);
        Some(EventDetail { record: EventRecord::derive(Arc::clone(&slot.event), &deliveries), deliveries })
    }

    pub(in crate::provider) fn read(&self, after: Seq, max: usize, epoch: Arc<str>) -> LogPage {
        let events: Vec<_> = self.log.after(after).take(max).map(|(_, slot)| Arc::clone(&slot.event)).collect();
        let last = events.last().and_then(|event| event.seq).filter(|_| events.len() == max);
        let next = if max == 0 { after } else { last.unwrap_or(self.log.head.max(after)) };
        LogPage { events, next, floor: self.log.floor(), head: self.log.head, epoch }
    }

    pub(in crate::provider) fn list(&self, filter: &EventFilter) -> EventPage {
        let bound = rules::bound(filter.limit);
        let is_meant = |slot: &Slot| {
            filter.status.is_none_or(|status| status == slot.status()) && filter.admits_event(&slot.event)
        };
        let mut meant = self.log.before(filter.before).filter(|(_, slot)| is_meant(slot));
        let page: Vec<(Seq, &Slot)> = meant.by_ref().take(bound).collect();
        let next = page.last().map(|&(seq, _)| seq).filter(|_| meant.next().is_some());
        EventPage { records: page.into_iter().map(|(_, slot)| self.record(slot)).collect(), next }
    }

    /// Every dead letter that is meant, in the order of listing.
    fn dead<'a>(&'a self, filter: &'a DeadLetterFilter) -> impl Iterator<Item = (Seq, &'a Slot, Delivery)> {
        let from = filter.after.as_ref().map(|(seq, _)| seq.saturating_add(1));
        let dead =
            self.log.before(from).filter(|(_, slot)| slot.works().iter().any(|work| work.status == Status::Failed));
        dead.flat_map(|(seq, slot)| self.deliveries(slot).into_iter().map(move |delivery| (seq, slot, delivery)))
            .filter(|(seq, slot, delivery)| {
                filter.admits(*seq, slot.event.id.as_str(), &slot.event.event_type, delivery)
            })
    }

    pub(in crate::provider) fn dead_letters(&self, filter: &DeadLetterFilter) -> DeadLetterPage {
        let mut dead = self.dead(filter);
        let letter = |(_, slot, delivery): (Seq, &Slot, Delivery)| DeadLetter { event: self.record(slot), delivery };
        let letters: Vec<DeadLetter> = dead.by_ref().take(filter.bound()).map(letter).collect();
        let last = letters.last().filter(|_| dead.next().is_some());
        let next = last.and_then(|last| Some((last.event.event.seq?, last.delivery.subscription.to_string())));
        DeadLetterPage { letters, next }
    }

    pub(in crate::provider) fn amend(&mut self, amendment: &Amendment, now: i64) -> u64 {
        match amendment {
            Amendment::Redrive(filter) => self.redrive(filter, now),
            Amendment::Replay(replay) => self.replay(replay, now),
            Amendment::Cancel { subscription } => self.cancel(subscription),
            Amendment::Erase { id } => self.erase(id),
        }
    }

    fn redrive(&mut self, filter: &DeadLetterFilter, now: i64) -> u64 {
        let dead: Vec<(Seq, Arc<str>)> =
            self.dead(filter).take(filter.bound()).map(|(seq, _, delivery)| (seq, delivery.subscription)).collect();
        for (seq, name) in &dead {
            if let Some(index) = self.lines.find(name) {
                self.reopen(*seq, index, Move::Redrive, now);
            }
        }
        dead.len() as u64
    }

    fn reopen(&mut self, seq: Seq, index: usize, step: Move, now: i64) {
        let Self { log, lines, .. } = self;
        let Some(line) = lines.get(index) else { return };
        log.change(seq, index, |event, work| {
            work.reopen(step, now);
            work.is_replay |= step == Move::Replay;
            line.open(seq, event.key.as_ref());
            line.wait(seq, work.due, now);
        });
    }

    fn replay(&mut self, replay: &Replay, now: i64) -> u64 {
        let index = self.lines.index(&replay.subscription);
        let wanted = |slot: &Slot| match slot.work(index) {
            None => true,
            Some(work) => !replay.missing_only && work.status.is_terminal(),
        };
        let from = replay.from_seq.unwrap_or(0).saturating_sub(1);
        let stretch = self.log.after(from).filter(|(seq, slot)| replay.covers(*seq, &slot.event) && wanted(slot));
        let seqs: Vec<Seq> = stretch.map(|(seq, _)| seq).collect();
        if !replay.dry_run {
            for &seq in &seqs {
                self.deliver(seq, index, !replay.missing_only, now);
            }
        }
        seqs.len() as u64
    }

    fn deliver(&mut self, seq: Seq, index: usize, is_replay: bool, now: i64) {
        let mut work = Work::new(index, now);
        work.is_replay = is_replay;
        if !self.log.deliver(seq, work) {
            return self.reopen(seq, index, Move::Replay, now);
        }
        let key = self.log.get(seq).and_then(|slot| slot.event.key.clone());
        if let Some(line) = self.lines.get(index) {
            line.open(seq, key.as_ref());
            line.wait(seq, now, now);
        }
    }

    fn cancel(&mut self, subscription: &str) -> u64 {
        let Some(index) = self.lines.find(subscription) else { return 0 };
        let is_open = |slot: &Slot| slot.work(index).is_some_and(|work| !work.status.is_terminal());
        let open: Vec<Seq> = self.log.after(0).filter(|(_, slot)| is_open(slot)).map(|(seq, _)| seq).collect();
        for &seq in &open {
            self.log.withdraw(seq, index);
        }
        if let Some(line) = self.lines.get(index) {
            line.restart(line.ordering());
        }
        open.len() as u64
    }

    fn erase(&mut self, id: &str) -> u64 {
        let Some((seq, slot)) = self.log.seq_of(id).and_then(|seq| Some((seq, self.log.erase(seq)?))) else { return 0 };
        for work in slot.works().iter().filter(|work| !work.status.is_terminal()) {
            let Some(line) = self.lines.get(work.subscription) else { continue };
            line.close(seq, slot.event.key.as_ref());
            if work.status == Status::Processing {
                line.unlease();
            }
        }
        1
    }
}
