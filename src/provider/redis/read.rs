//! Reading: the log, events with their deliveries, lists, dead letters and figures.
//!
//! Lists go from candidates, which an index gives by seq, to those that the filter means. Each step is bounded, and a list
//! takes as many as it needs: it is complete, but not of one instant.

mod candidates;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use redis::{Cmd, Pipeline, Value};

use self::candidates::Candidates;
use super::link::Script;
use super::{RedisProvider, open, row};
use crate::delivery::{Delivery, EventDetail, EventRecord};
use crate::error::Result;
use crate::event::{Event, Seq};
use crate::provider::{
    DeadLetter, DeadLetterFilter, DeadLetterPage, EventFilter, EventPage, LogPage, ProviderStats, rules,
};

static STATES: Script = Script::new(concat!(include_str!("lua/prelude.lua"), include_str!("lua/states.lua")));

/// The most events that one call reads.
const PAGE: usize = 500;

/// Events with their deliveries, by seq.
pub(super) type Details = BTreeMap<Seq, (Arc<Event>, Vec<Delivery>)>;

fn range(command: &'static str, key: &str, from: &str, to: &str, count: usize) -> Cmd {
    let mut cmd = redis::cmd(command);
    cmd.arg(key).arg(from).arg(to).arg("COUNT").arg(count);
    cmd
}

impl RedisProvider {
    pub(super) async fn page(&self, after: Seq, max: usize) -> Result<LogPage> {
        self.link.check_open()?;
        let action = "read the log";
        let count = max.min(PAGE);
        loop {
            let mut commands = Pipeline::new();
            commands.atomic();
            commands.cmd("HMGET").arg(&self.meta).arg("epoch").arg("head").arg("pruned");
            if count > 0 {
                let from = format!("{}-0", after.saturating_add(1));
                commands.add_command(range("XRANGE", &self.key("log"), &from, "+", count));
            }
            let mut answers = self.link.query_all(action, &commands).await?.into_iter();
            let mut meta = row::list(answers.next().unwrap_or_default()).into_iter();
            let epoch = row::text(meta.next().unwrap_or_default());
            if epoch.is_empty() {
                // The server was flushed: from here on there is another log.
                let init = self.call(action, &open::INIT).await?;
                self.link.run(action, &open::INIT, &init).await?;
                continue;
            }
            let (head, pruned) =
                (row::number(meta.next().unwrap_or_default()), row::number(meta.next().unwrap_or_default()));
            let entries = row::list(answers.next().unwrap_or_default()).into_iter();
            let events = entries.map(|entry| row::entry(entry).map(|(_, event)| event)).collect::<Result<Vec<_>>>()?;
            let last = events.last().and_then(|event| event.seq).filter(|_| events.len() == count);
            let next = if max == 0 { after } else { last.unwrap_or(head.max(after)) };
            return Ok(LogPage { events, next, floor: pruned + 1, head, epoch: epoch.into() });
        }
    }

    /// The events at these places, which ascend; those that are gone are left out.
    pub(super) async fn events(&self, seqs: &[Seq]) -> Result<BTreeMap<Seq, Arc<Event>>> {
        let mut events = BTreeMap::new();
        for seqs in seqs.chunks(PAGE) {
            let mut commands = Pipeline::new();
            for run in seqs.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
                let (from, to) = (format!("{first}-0"), format!("{last}-0"));
                commands.add_command(range("XRANGE", &self.key("log"), &from, &to, run.len()));
            }
            if commands.is_empty() {
                continue;
            }
            for entries in self.link.query_all("read events", &commands).await? {
                for entry in row::list(entries) {
                    let (seq, event) = row::entry(entry)?;
                    events.insert(seq, event);
                }
            }
        }
        Ok(events)
    }

    /// The deliveries of these events, in the order of the subscriptions' names.
    async fn deliveries(&self, seqs: &[Seq]) -> Result<BTreeMap<Seq, Vec<Delivery>>> {
        let action = "read deliveries";
        let mut all = BTreeMap::new();
        for seqs in seqs.chunks(PAGE) {
            let mut command = self.call(action, &STATES).await?;
            for seq in seqs {
                command.arg(seq);
            }
            let answers = row::list(self.link.run(action, &STATES, &command).await?);
            for (&seq, answer) in seqs.iter().zip(answers) {
                let mut parts = row::list(answer).into_iter();
                if parts.next().is_none() {
                    continue;
                }
                let mut deliveries = Vec::new();
                while let (Some(name), Some(record), Some(attempts)) = (parts.next(), parts.next(), parts.next()) {
                    let (record, attempts) = (row::bytes(record), row::bytes(attempts));
                    deliveries.push(row::delivery(&row::text(name), &record, &attempts)?);
                }
                deliveries.sort_by(|one, other| one.subscription.cmp(&other.subscription));
                all.insert(seq, deliveries);
            }
        }
        Ok(all)
    }

    /// These of the events with their deliveries; what is gone in between is left out.
    async fn with_deliveries(&self, events: BTreeMap<Seq, Arc<Event>>) -> Result<Details> {
        let seqs: Vec<Seq> = events.keys().copied().collect();
        let mut deliveries = self.deliveries(&seqs).await?;
        let joined = events.into_iter().filter_map(|(seq, event)| Some((seq, (event, deliveries.remove(&seq)?))));
        Ok(joined.collect())
    }

    /// Where the event with this id stands.
    async fn seq_of(&self, id: &str) -> Result<Option<Seq>> {
        let mut command = redis::cmd("HGET");
        command.arg(self.key("ids")).arg(id);
        let answer = self.link.query("look an event up", &command).await?;
        Ok((answer != Value::Nil).then(|| row::number(answer)))
    }

    pub(super) async fn detail(&self, id: &str) -> Result<Option<EventDetail>> {
        let Some(seq) = self.seq_of(id).await? else { return Ok(None) };
        let events = self.events(&[seq]).await?;
        let details = self.with_deliveries(events).await?;
        Ok(details.into_values().next().map(|(event, deliveries)| {
            let record = EventRecord::derive(event, &deliveries);
            EventDetail { record, deliveries }
        }))
    }

    pub(super) async fn list_events(&self, filter: &EventFilter) -> Result<EventPage> {
        let bound = rules::bound(filter.limit);
        // One more than a page holds says whether there is another page.
        let wanted = bound.saturating_add(1);
        let mut candidates = Candidates::of(self, filter).await?;
        let mut records = Vec::new();
        while records.len() < wanted {
            let Some(mut events) = candidates.next(self, wanted - records.len()).await? else { break };
            events.retain(|_, event| filter.admits_event(event));
            let found = self.with_deliveries(events).await?.into_values().rev();
            let found = found.map(|(event, deliveries)| EventRecord::derive(event, &deliveries));
            records.extend(found.filter(|record| filter.admits(record)));
        }
        let is_more = records.len() > bound;
        records.truncate(bound);
        let next = records.last().and_then(|record| record.event.seq).filter(|_| is_more);
        Ok(EventPage { records, next })
    }

    pub(super) async fn list_dead(&self, filter: &DeadLetterFilter) -> Result<DeadLetterPage> {
        self.link.check_open()?;
        let bound = filter.bound();
        let wanted = bound.saturating_add(1);
        let mut letters = Vec::new();
        let mut candidates = match &filter.event_id {
            None => Candidates::dead(self, filter.after.as_ref().map(|(seq, _)| seq.saturating_add(1))),
            Some(id) => Candidates::these(self.seq_of(id).await?.into_iter().collect()),
        };
        while letters.len() < wanted {
            let Some(mut events) = candidates.next(self, wanted - letters.len()).await? else { break };
            events.retain(|_, event| filter.pattern.as_ref().is_none_or(|pattern| pattern.matches(&event.event_type)));
            for (seq, (event, deliveries)) in self.with_deliveries(events).await?.into_iter().rev() {
                let record = EventRecord::derive(Arc::clone(&event), &deliveries);
                let meant = |delivery: &Delivery| filter.admits(seq, event.id.as_str(), &event.event_type, delivery);
                let own = deliveries.into_iter().filter(meant);
                letters.extend(own.map(|delivery| DeadLetter { event: record.clone(), delivery }));
            }
        }
        let is_more = letters.len() > bound;
        letters.truncate(bound);
        let last = letters.last().filter(|_| is_more);
        let next = last.and_then(|last| Some((last.event.event.seq?, last.delivery.subscription.to_string())));
        Ok(DeadLetterPage { letters, next })
    }

    pub(super) async fn figures(&self) -> Result<ProviderStats> {
        self.link.check_open()?;
        let log = self.key("log");
        let mut commands = Pipeline::new();
        commands.atomic();
        let fields = ["head", "pruned", "p", "x", "f", "dp", "dx"];
        commands.cmd("HMGET").arg(&self.meta).arg(&fields[..]);
        commands.cmd("HLEN").arg(self.key("ev"));
        commands.cmd("ZCARD").arg(self.key("dead"));
        commands.cmd("XLEN").arg(&log);
        commands.add_command(range("XRANGE", &log, "-", "+", 1));
        commands.add_command(range("XREVRANGE", &log, "+", "-", 1));
        let mut answers = self.link.query_all("count", &commands).await?.into_iter();
        let mut meta = row::list(answers.next().unwrap_or_default()).into_iter().map(row::number);
        let mut figure = || meta.next().unwrap_or_default();
        let (head, pruned) = (figure(), figure());
        let (pending, processing, failed, pending_deliveries, processing_deliveries) =
            (figure(), figure(), figure(), figure(), figure());
        let mut figure = || row::number(answers.next().unwrap_or_default());
        let (total, dead, length) = (figure(), figure(), figure());
        let (first, last) = (answers.next().unwrap_or_default(), answers.next().unwrap_or_default());
        let standing = self.look().await?;
        let mut stats = ProviderStats {
            provider_type: "redis",
            total_events: total,
            pending_events: pending,
            processing_events: processing,
            completed_events: total.saturating_sub(pending + processing + failed),
            failed_events: failed,
            pending_deliveries,
            processing_deliveries,
            dead_letters: dead,
            head_seq: head,
            floor_seq: pruned + 1,
            provider_specific: self.memory().await,
        };
        let mut add =
            |name: &str, value: serde_json::Value| drop(stats.provider_specific.insert(name.to_owned(), value));
        add("stream_name", log.into());
        add("stream_length", length.into());
        add("first_entry_id", place(first).into());
        add("last_entry_id", place(last).into());
        add("namespace", self.namespace.clone().into());
        add("server_version", standing.version.into());
        add("appendonly", standing.appendonly.into());
        add("appendfsync", standing.appendfsync.into());
        add("maxmemory_policy", standing.policy.into());
        add("consumer_name", self.instance.clone().into());
        add("consumer_errors", self.link.errors.load(Ordering::Relaxed).into());
        add("connections_made", self.link.connections().into());
        Ok(stats)
    }

    /// What memory the server uses and may use, where it says so.
    async fn memory(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut command = redis::cmd("INFO");
        command.arg("memory");
        let info = self.link.query("ask for the server's memory", &command).await.map(row::text).unwrap_or_default();
        let figures = info.lines().filter_map(|line| line.trim_end().split_once(':'));
        let wanted = figures.filter(|(name, _)| matches!(*name, "used_memory" | "maxmemory"));
        wanted.filter_map(|(name, value)| Some((name.to_owned(), value.parse::<u64>().ok()?.into()))).collect()
    }
}

/// The id of the only entry of a range.
fn place(entries: Value) -> Option<String> {
    let entry = row::list(entries).into_iter().next()?;
    row::list(entry).into_iter().next().map(row::text)
}
