//! Where a list begins: the events that an index gives for a filter, newest first and page by page.
//!
//! An index may give more than is meant, never less. Where none is any help, all of the log is gone through.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use redis::{Cmd, Pipeline};

use super::super::{RedisProvider, row};
use super::{PAGE, range};
use crate::delivery::Status;
use crate::error::Result;
use crate::event::{Event, EventType, Seq};
use crate::pattern::Pattern;
use crate::provider::EventFilter;

/// With more types than this the log is read instead of their indexes.
const MANY_TYPES: usize = 32;

/// With more events than this in a stretch of time the log is read instead of the index.
const MANY_EVENTS: u64 = 5_000;

/// The fewest events that a page looks at.
const FEW: usize = 16;

enum Source {
    /// Seqs that are known, descending.
    These(Vec<Seq>),
    /// Sorted sets by seq, with members that begin with it.
    Sets(Vec<String>),
    /// The log itself.
    Log,
}

/// A way through the events, downwards.
pub(in crate::provider::redis) struct Candidates {
    source: Source,
    /// Only events with a smaller seq.
    before: Option<Seq>,
    is_done: bool,
}

impl Candidates {
    fn new(source: Source, before: Option<Seq>) -> Self {
        Self { source, before, is_done: false }
    }

    /// These events, which descend.
    pub(super) fn these(seqs: Vec<Seq>) -> Self {
        Self::new(Source::These(seqs), None)
    }

    /// Events with dead letters.
    pub(super) fn dead(provider: &RedisProvider, before: Option<Seq>) -> Self {
        Self::new(Source::Sets(vec![provider.key("dead")]), before)
    }

    /// What the most selective index gives for a filter.
    pub(super) async fn of(provider: &RedisProvider, filter: &EventFilter) -> Result<Self> {
        provider.link.check_open()?;
        let before = filter.before;
        match filter.status {
            Some(Status::Pending | Status::Processing) => {
                return Ok(Self::new(Source::Sets(vec![provider.key("open")]), before));
            }
            Some(Status::Failed) => return Ok(Self::dead(provider, before)),
            Some(Status::Completed) | None => {}
        }
        if (filter.from.is_some() || filter.to.is_some())
            && let Some(seqs) = provider.made_within(filter).await?
        {
            return Ok(Self::new(Source::These(seqs), None));
        }
        if let Some(pattern) = &filter.pattern {
            let types = provider.types(pattern).await?;
            if types.len() <= MANY_TYPES {
                let keys = types.iter().map(|name| provider.key(&format!("t:{name}"))).collect();
                return Ok(Self::new(Source::Sets(keys), before));
            }
        }
        Ok(Self::new(Source::Log, before))
    }

    /// The next events; `None` when there are no more.
    pub(super) async fn next(
        &mut self,
        provider: &RedisProvider,
        wanted: usize,
    ) -> Result<Option<BTreeMap<Seq, Arc<Event>>>> {
        if self.is_done {
            return Ok(None);
        }
        let size = wanted.clamp(FEW, PAGE);
        match &mut self.source {
            Source::These(seqs) => {
                let mut page: Vec<Seq> = seqs.drain(..size.min(seqs.len())).collect();
                self.is_done = seqs.is_empty();
                page.reverse();
                Ok(Some(provider.events(&page).await?))
            }
            Source::Sets(keys) => {
                let (page, is_last) = provider.below(keys, self.before, size).await?;
                self.is_done = is_last;
                self.before = page.first().copied().or(self.before);
                Ok(Some(provider.events(&page).await?))
            }
            Source::Log => {
                let from = match self.before {
                    None => "+".to_owned(),
                    Some(before) => format!("({before}-0"),
                };
                let command = range("XREVRANGE", &provider.key("log"), &from, "-", size);
                let entries = row::list(provider.link.query("list events", &command).await?);
                self.is_done = entries.len() < size;
                let events = entries.into_iter().map(row::entry).collect::<Result<BTreeMap<_, _>>>()?;
                self.before = events.keys().next().copied().or(self.before);
                Ok(Some(events))
            }
        }
    }
}

fn limited(command: &'static str, key: &str, from: &str, to: &str, count: usize) -> Cmd {
    let mut cmd = redis::cmd(command);
    cmd.arg(key).arg(from).arg(to).arg("LIMIT").arg(0).arg(count);
    cmd
}

/// The seq that a member begins with.
fn seq_of(member: &str) -> Option<Seq> {
    member.split(':').next()?.parse().ok()
}

impl RedisProvider {
    /// The greatest seqs of these sets below `before`, ascending, and whether there are no more.
    async fn below(&self, keys: &[String], before: Option<Seq>, size: usize) -> Result<(Vec<Seq>, bool)> {
        if keys.is_empty() {
            return Ok((Vec::new(), true));
        }
        let from = before.map_or_else(|| "+inf".to_owned(), |before| format!("({before}"));
        let mut commands = Pipeline::new();
        for key in keys {
            commands.add_command(limited("ZREVRANGEBYSCORE", key, &from, "-inf", size));
        }
        let (mut seqs, mut floor, mut is_last) = (BTreeSet::new(), 0, true);
        for answer in self.link.query_all("look events up", &commands).await? {
            let members = row::texts(answer);
            // Below the last member of a full page there may be more of this set, and what others have there must wait.
            if members.len() == size {
                is_last = false;
                floor = floor.max(members.last().and_then(|member| seq_of(member)).unwrap_or_default());
            }
            seqs.extend(members.iter().filter_map(|member| seq_of(member)));
        }
        Ok((seqs.split_off(&floor).into_iter().collect(), is_last))
    }

    /// The events made within a filter's stretch of time, descending; `None` when they are many.
    async fn made_within(&self, filter: &EventFilter) -> Result<Option<Vec<Seq>>> {
        let bound = |at: Option<jiff::Timestamp>, open: &str| {
            at.map_or_else(|| open.to_owned(), |at| at.as_microsecond().to_string())
        };
        let (key, from, to) = (self.key("age"), bound(filter.from, "-inf"), bound(filter.to, "+inf"));
        let mut command = redis::cmd("ZCOUNT");
        command.arg(&key).arg(&from).arg(&to);
        if row::number(self.link.query("count events", &command).await?) > MANY_EVENTS {
            return Ok(None);
        }
        let mut command = redis::cmd("ZRANGEBYSCORE");
        command.arg(&key).arg(&from).arg(&to);
        let members = row::texts(self.link.query("look events up", &command).await?);
        let mut seqs: Vec<Seq> = members.iter().filter_map(|member| seq_of(member)).collect();
        seqs.retain(|&seq| filter.before.is_none_or(|before| seq < before));
        seqs.sort_unstable_by(|one, other| other.cmp(one));
        Ok(Some(seqs))
    }

    /// The stored types that a pattern matches.
    pub(in crate::provider::redis) async fn types(&self, pattern: &Pattern) -> Result<Vec<String>> {
        let mut command = redis::cmd("SMEMBERS");
        command.arg(self.key("types"));
        let types = row::texts(self.link.query("read the types", &command).await?);
        let meant = |text: &String| EventType::parse(text).is_ok_and(|event_type| pattern.matches(&event_type));
        Ok(types.into_iter().filter(meant).collect())
    }

    /// The events of these types with seqs from `from` to `to`, ascending.
    pub(in crate::provider::redis) async fn of_types(&self, types: &[String], from: Seq, to: Seq) -> Result<Vec<Seq>> {
        let mut seqs = Vec::new();
        for name in types {
            let (key, mut next) = (self.key(&format!("t:{name}")), from);
            loop {
                let command = limited("ZRANGEBYSCORE", &key, &next.to_string(), &to.to_string(), PAGE * 10);
                let members = row::texts(self.link.query("look events up", &command).await?);
                seqs.extend(members.iter().filter_map(|member| seq_of(member)));
                match members.last().and_then(|last| seq_of(last)) {
                    Some(last) if members.len() == PAGE * 10 => next = last.saturating_add(1),
                    _ => break,
                }
            }
        }
        seqs.sort_unstable();
        Ok(seqs)
    }
}
