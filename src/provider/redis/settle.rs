//! Settling: the ends of many attempts as the arguments of one script.

use std::collections::HashMap;

use redis::{Cmd, Value};

use super::append::{Lists, write_event};
use super::link::Script;
use super::{RedisProvider, as_micros, row};
use crate::delivery::{KvChange, KvWrite, Next, Status};
use crate::error::Result;
use crate::provider::{Settled, Settlement, rules};

static SETTLE: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/append.lua"),
    include_str!("lua/documents.lua"),
    include_str!("lua/settle.lua")
));

/// The most settlements that one call of the script applies: it holds the server up for so long. As many as the broker
/// settles at once, so that what it tries again after a failure was applied as a whole or not at all.
const STEP: usize = 1_024;

impl RedisProvider {
    pub(super) async fn settle_all(&self, batch: &[Settlement]) -> Result<Vec<Settled>> {
        self.link.check_open()?;
        let mut settled = Vec::with_capacity(batch.len());
        for part in batch.chunks(STEP) {
            let action = format!("settle {} attempts", part.len());
            let mut command = self.call(&action, &SETTLE).await?;
            write(part, &mut command);
            let answer = self.link.run(&action, &SETTLE, &command).await?;
            settled.extend(read(part, answer).ok_or_else(|| row::broken("the answer to a settlement"))?);
        }
        Ok(settled)
    }
}

/// How many bytes what the script knows as HEAD has.
const HEAD: usize = 35;

/// A number of four bytes.
fn small(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes()
}

/// The arguments of these settlements.
fn write(batch: &[Settlement], command: &mut Cmd) {
    let (mut lists, mut names, mut places) = (Lists::default(), Vec::new(), HashMap::new());
    for settlement in batch {
        for append in effects(settlement).1 {
            lists.place(&append.subscriptions);
        }
        let name = &*settlement.key.subscription;
        places.entry(name).or_insert_with(|| {
            names.push(name);
            names.len()
        });
    }
    lists.write(command);
    command.arg(batch.len()).arg(names.len());
    for name in names {
        command.arg(name);
    }
    for settlement in batch {
        let key = &settlement.key;
        let place = places.get(&*key.subscription).copied().unwrap_or_default();
        let (kind, after) = match settlement.next {
            Next::Complete => (b'c', 0),
            Next::Fail => (b'f', 0),
            Next::Retry { after } => (b'r', as_micros(after)),
            Next::Release => (b'l', 0),
        };
        let attempt = settlement.attempt.as_ref().filter(|_| settlement.next != Next::Release);
        let (writes, published) = effects(settlement);
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(&small(place));
        head.extend_from_slice(&key.token.to_le_bytes());
        head.push(kind);
        head.extend_from_slice(&(after as f64).to_le_bytes());
        head.push(attempt.is_some_and(|attempt| attempt.verdict.is_infra()).into());
        head.extend_from_slice(&attempt.map_or(0, |attempt| attempt.number).to_le_bytes());
        head.push(misnamed(writes).is_some().into());
        head.extend_from_slice(&small(writes.len()));
        head.extend_from_slice(&small(published.len()));
        let record = attempt.and_then(|attempt| serde_json::to_vec(attempt).ok()).unwrap_or_default();
        command.arg(&head[..]).arg(key.seq).arg(record);
        writes.iter().for_each(|one| write_change(one, command));
        for append in published {
            let place = lists.place(&append.subscriptions);
            write_event(&append.event, place, command);
        }
    }
}

/// What a settlement writes and publishes; nothing unless it is a success.
fn effects(settlement: &Settlement) -> (&[KvWrite], &[crate::provider::Append]) {
    match settlement.next {
        Next::Complete => (&settlement.writes, &settlement.published),
        _ => (&[], &[]),
    }
}

/// Why the first write whose document cannot have its name cannot be applied.
fn misnamed(writes: &[KvWrite]) -> Option<String> {
    writes.iter().find_map(|write| {
        let error = rules::check_document_name(&write.bucket, &write.key).err()?;
        Some(refusal(write, &error.to_string()))
    })
}

fn refusal(write: &KvWrite, reason: &str) -> String {
    format!("key {:?} of bucket {:?}: {reason}", write.key, write.bucket)
}

fn write_change(write: &KvWrite, command: &mut Cmd) {
    command.arg(&write.bucket).arg(&write.key);
    match &write.change {
        KvChange::Set { value, ttl: None } => command.arg("s").arg(&value[..]),
        KvChange::Set { value, ttl: Some(ttl) } => command.arg(format!("s{}", as_micros(*ttl))).arg(&value[..]),
        KvChange::Delete => command.arg("d").arg(""),
        KvChange::Increment { by } => command.arg("i").arg(by.to_string()),
    };
}

fn read(batch: &[Settlement], answer: Value) -> Option<Vec<Settled>> {
    let mut parts = row::list(answer).into_iter();
    let letters = row::bytes(parts.next()?);
    let mut conflicts = row::list(parts.next()?).into_iter();
    let settled = batch.iter().zip(letters).map(|(settlement, letter)| {
        Some(match letter {
            b'o' => Settled::Done { finished: None },
            b'c' => Settled::Done { finished: Some(Status::Completed) },
            b'f' => Settled::Done { finished: Some(Status::Failed) },
            b'x' => {
                let mut part = || conflicts.next();
                let (_place, write, why, stored) = (part()?, row::number(part()?), row::text(part()?), part()?);
                let write = (write as usize).checked_sub(1).and_then(|at| settlement.writes.get(at));
                Settled::Conflict { reason: reason(settlement, write, &why, &row::bytes(stored)) }
            }
            _ => Settled::Stale,
        })
    });
    settled.collect()
}

/// Why a write cannot be applied, in the words of the rules.
fn reason(settlement: &Settlement, write: Option<&KvWrite>, why: &str, stored: &[u8]) -> String {
    let Some(write) = write.filter(|_| why != "w") else { return misnamed(&settlement.writes).unwrap_or_default() };
    let KvChange::Increment { by } = write.change else { return refusal(write, "cannot be applied") };
    let words = rules::incremented(Some(stored), by).err();
    refusal(write, &words.unwrap_or_else(|| "the stored value cannot be added to".to_owned()))
}
