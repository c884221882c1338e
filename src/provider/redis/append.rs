//! Appending: a batch as the arguments of one script.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use redis::{Cmd, Value};

use super::link::Script;
use super::{RedisProvider, row};
use crate::delivery::Status;
use crate::error::Result;
use crate::event::Event;
use crate::provider::{Append, Appended, header};

static PUBLISH: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/append.lua"),
    include_str!("lua/publish.lua")
));

/// The lists of subscriptions that events go to, each once: most events of a batch go to the same.
#[derive(Default)]
pub(super) struct Lists {
    names: Vec<Arc<str>>,
    places: HashMap<Arc<str>, usize>,
    lists: Vec<String>,
    known: HashMap<String, usize>,
    last: Option<(Arc<[Arc<str>]>, usize)>,
}

impl Lists {
    /// The place of a list, counted from 1 as scripts count.
    pub(super) fn place(&mut self, subscriptions: &Arc<[Arc<str>]>) -> usize {
        if let Some((last, place)) = &self.last
            && Arc::ptr_eq(last, subscriptions)
        {
            return *place;
        }
        let (mut text, mut seen) = (String::new(), HashSet::new());
        for name in subscriptions.iter().filter(|name| seen.insert(Arc::clone(name))) {
            let next = self.names.len() + 1;
            let place = *self.places.entry(Arc::clone(name)).or_insert(next);
            if place == next {
                self.names.push(Arc::clone(name));
            }
            text.push_str(&place.to_string());
            text.push(',');
        }
        let next = self.lists.len() + 1;
        let place = *self.known.entry(text.clone()).or_insert(next);
        if place == next {
            self.lists.push(text);
        }
        self.last = Some((Arc::clone(subscriptions), place));
        place
    }

    pub(super) fn write(&self, command: &mut Cmd) {
        command.arg(self.names.len());
        for name in &self.names {
            command.arg(&**name);
        }
        command.arg(self.lists.len());
        for list in &self.lists {
            command.arg(list);
        }
    }
}

/// The arguments of an event that goes to the list at `place`.
pub(super) fn write_event(event: &Event, place: usize, command: &mut Cmd) {
    command.arg(event.id.as_str()).arg(event.event_type.as_str()).arg(event.created_at.as_microsecond());
    match &event.key {
        Some(key) => command.arg(format!("={key}")),
        None => command.arg(""),
    };
    command.arg(header::header(event)).arg(&event.payload.bytes()[..]).arg(place);
}

impl RedisProvider {
    pub(super) async fn append_all(&self, batch: &[Append]) -> Result<Vec<Appended>> {
        self.link.check_open()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let action = format!("append {} events", batch.len());
        let mut command = self.call(&action, &PUBLISH).await?;
        let mut lists = Lists::default();
        let places: Vec<usize> = batch.iter().map(|append| lists.place(&append.subscriptions)).collect();
        lists.write(&mut command);
        for (append, place) in batch.iter().zip(places) {
            write_event(&append.event, place, &mut command);
        }
        let answer = self.link.run(&action, &PUBLISH, &command).await?;
        self.appended(batch, answer).ok_or_else(|| row::broken("the answer to an append"))
    }

    fn appended(&self, batch: &[Append], answer: Value) -> Option<Vec<Appended>> {
        let mut parts = row::list(answer).into_iter();
        let epoch = row::text(parts.next()?);
        let now: i64 = row::text(parts.next()?).parse().ok()?;
        let records = row::bytes(parts.next()?);
        let mut records = row::Record(&records);
        let mut remembered = self.remembered();
        let recent = remembered.of(&epoch);
        let answers = batch.iter().map(|append| {
            let (seq, is_known, status) = (records.seq()?, records.byte()?, records.byte()?);
            let duplicate = is_known == 1;
            if !duplicate {
                recent.keep(seq, append, now);
            }
            Some(Appended { seq, duplicate, status: status_of(status) })
        });
        answers.collect()
    }
}

/// A status as the scripts have it.
fn status_of(letter: u8) -> Status {
    match letter {
        b'p' => Status::Pending,
        b'x' => Status::Processing,
        b'f' => Status::Failed,
        _ => Status::Completed,
    }
}
