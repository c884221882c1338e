//! Claiming and renewing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::link::Script;
use super::{RedisProvider, as_micros, row};
use crate::delivery::INFRA_BUDGET;
use crate::error::Result;
use crate::event::{Event, Seq};
use crate::provider::{ClaimRequest, Claimed, Lease, LeaseKey, Lost, Want, rules};
use crate::subscription::Ordering;

static CLAIM: Script = Script::new(concat!(include_str!("lua/prelude.lua"), include_str!("lua/claim.lua")));
static RENEW: Script = Script::new(concat!(include_str!("lua/prelude.lua"), include_str!("lua/renew.lua")));

/// The most deliveries that one call of a script leases, makes ready or takes away: it holds the server up for so long.
const STEP: usize = 1_000;

/// A lease as the script answers, without its event.
struct Leased {
    want: usize,
    key: LeaseKey,
    attempt: u32,
    number: u32,
    infra_faults: u32,
    is_replay: bool,
    appended_at: i64,
}

/// What one call of the script gave.
#[derive(Default)]
struct Step {
    epoch: String,
    now: i64,
    leased: Vec<Leased>,
    lost: Vec<Lost>,
    next_due: Option<i64>,
    /// More has become due or has expired than one call may move.
    is_more: bool,
}

impl RedisProvider {
    pub(super) async fn claim_all(&self, request: &ClaimRequest) -> Result<Claimed> {
        self.link.check_open()?;
        let mut rooms: Vec<usize> = request.wants.iter().map(|want| want.room).collect();
        let mut claimed = Claimed::default();
        loop {
            let room = rooms.iter().fold(0_usize, |sum, &room| sum.saturating_add(room)).min(STEP);
            let step = match self.claim_step(request, &rooms, room).await {
                Ok(step) => step,
                // What earlier steps gave is held, and must not be lost with the rest.
                Err(_) if !claimed.leases.is_empty() || !claimed.lost.is_empty() => return Ok(claimed),
                Err(error) => return Err(error),
            };
            claimed.lost.extend(step.lost);
            let until = |at: i64| Duration::from_micros(u64::try_from(at.saturating_sub(step.now)).unwrap_or(0));
            claimed.next_due = step.next_due.map(until);
            for one in &step.leased {
                if let Some(room) = rooms.get_mut(one.want) {
                    *room = room.saturating_sub(1);
                }
            }
            let is_full = step.leased.len() == room;
            claimed.leases.extend(self.with_events(step.leased, &step.epoch, step.now).await?);
            if !step.is_more && (!is_full || rooms.iter().all(|&room| room == 0)) {
                return Ok(claimed);
            }
        }
    }

    async fn claim_step(&self, request: &ClaimRequest, rooms: &[usize], room: usize) -> Result<Step> {
        let action = "claim deliveries";
        let mut command = self.call(action, &CLAIM).await?;
        let mut tokens = vec![0_u8; room * 8];
        rand::fill(&mut tokens[..]);
        command.arg(&*request.worker).arg(as_micros(request.lease)).arg(&tokens[..]).arg(INFRA_BUDGET).arg(STEP);
        for (want, room) in request.wants.iter().zip(rooms) {
            let is_ordered = want.ordering == Ordering::Key;
            command.arg(&*want.subscription).arg(room.min(&STEP)).arg(u8::from(is_ordered));
        }
        let answer = self.link.run(action, &CLAIM, &command).await?;
        read_step(&request.wants, answer).ok_or_else(|| row::broken("the answer to a claim"))
    }

    /// The leases with their events: from memory what is there, the rest from the log. What was erased in between has no
    /// event any more, and its lease is gone with it.
    async fn with_events(&self, leased: Vec<Leased>, epoch: &str, now: i64) -> Result<Vec<Lease>> {
        let mut events: Vec<Option<Arc<Event>>> = {
            let mut remembered = self.remembered();
            let recent = remembered.of(epoch);
            leased.iter().map(|one| recent.claim(one.key.seq).map(|stored| stored.event)).collect()
        };
        let absent = leased.iter().zip(&events).filter(|(_, event)| event.is_none());
        let mut missing: Vec<Seq> = absent.map(|(one, _)| one.key.seq).collect();
        missing.sort_unstable();
        missing.dedup();
        let stored: BTreeMap<Seq, Arc<Event>> = self.events(&missing).await?;
        for (one, event) in leased.iter().zip(&mut events) {
            if event.is_none() {
                *event = stored.get(&one.key.seq).cloned();
            }
        }
        let with_event = |(one, event): (Leased, Option<Arc<Event>>)| {
            Some(Lease {
                event: event?,
                key: one.key,
                attempt: one.attempt,
                number: one.number,
                infra_faults: one.infra_faults,
                age: Duration::from_micros(u64::try_from(now.saturating_sub(one.appended_at)).unwrap_or(0)),
                is_replay: one.is_replay,
            })
        };
        Ok(leased.into_iter().zip(events).filter_map(with_event).collect())
    }

    pub(super) async fn renew_all(&self, keys: &[LeaseKey], lease: Duration) -> Result<Vec<bool>> {
        self.link.check_open()?;
        let mut held = Vec::with_capacity(keys.len());
        for keys in keys.chunks(STEP) {
            let action = format!("renew {} leases", keys.len());
            let mut command = self.call(&action, &RENEW).await?;
            command.arg(as_micros(lease));
            for key in keys {
                command.arg(&*key.subscription).arg(key.seq).arg(&key.token.to_le_bytes()[..]);
            }
            let answer = row::bytes(self.link.run(&action, &RENEW, &command).await?);
            held.extend(answer.iter().map(|&letter| letter == b'1'));
        }
        Ok(held)
    }
}

fn read_step(wants: &[Want], answer: Value) -> Option<Step> {
    let mut parts = row::list(answer).into_iter();
    let epoch = row::text(parts.next()?);
    let now = row::text(parts.next()?).parse().ok()?;
    let (leases, losses) = (row::bytes(parts.next()?), row::bytes(parts.next()?));
    let (next_due, is_more) = (row::text(parts.next()?), row::text(parts.next()?) == "1");
    let mut step = Step { epoch, now, next_due: next_due.parse().ok(), is_more, ..Step::default() };
    let mut records = row::Record(&leases);
    while !records.is_empty() {
        let (want, key) = read_key(wants, &mut records)?;
        let (tries, infra_faults, number) = (records.small()?, records.small()?, records.small()?);
        let (replay, appended_at) = (records.byte()?, records.instant()?);
        let (attempt, number) = (tries.saturating_add(1), number.saturating_add(1));
        step.leased.push(Leased { want, key, attempt, number, infra_faults, is_replay: replay != 0, appended_at });
    }
    let mut records = row::Record(&losses);
    while !records.is_empty() {
        let (_, key) = read_key(wants, &mut records)?;
        // The script was told the budget; what follows from it is the rules' to say.
        let faults = if records.byte()? == 1 { INFRA_BUDGET + 1 } else { 1 };
        step.lost.push(Lost { key, next: rules::lost_next(faults) });
    }
    Some(step)
}

fn read_key(wants: &[Want], records: &mut row::Record<'_>) -> Option<(usize, LeaseKey)> {
    let want = (records.small()? as usize).checked_sub(1)?;
    let subscription = Arc::clone(&wants.get(want)?.subscription);
    Some((want, LeaseKey { seq: records.seq()?, subscription, token: records.token()? }))
}
