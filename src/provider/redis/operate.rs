//! What operators change, and what retention removes: in steps that each hold the server up for a moment only.
//!
//! What a large change means is looked up before it is made, and each step changes only what still stands so. Until its
//! last step it can be seen half done.

use redis::Value;

use super::link::Script;
use super::{RedisProvider, as_micros, row};
use crate::error::Result;
use crate::event::Seq;
use crate::provider::{DeadLetterFilter, Replay, Retention, rules};

static REDRIVE: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/reopen.lua"),
    include_str!("lua/redrive.lua")
));
static REPLAY: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/reopen.lua"),
    include_str!("lua/replay.lua")
));
static CANCEL: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/remove.lua"),
    include_str!("lua/cancel.lua")
));
static ERASE: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/remove.lua"),
    include_str!("lua/erase.lua")
));
static PRUNE: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/remove.lua"),
    include_str!("lua/documents.lua"),
    include_str!("lua/prune.lua")
));

/// The most deliveries or events that one call of a script changes.
const STEP: usize = 500;

/// The greatest seq that stands exactly in a sorted set.
const LAST: Seq = 1 << 53;

impl RedisProvider {
    pub(super) async fn redrive(&self, mut filter: DeadLetterFilter) -> Result<u64> {
        let action = "redrive dead letters";
        let (mut left, mut total) = (rules::bound(filter.limit), 0);
        loop {
            filter.limit = left.min(STEP);
            let page = self.list_dead(&filter).await?;
            if !page.letters.is_empty() {
                let mut command = self.call(action, &REDRIVE).await?;
                for letter in &page.letters {
                    let died = letter.delivery.completed_at.map_or(0, |at| at.as_microsecond());
                    let seq = letter.event.event.seq.unwrap_or_default();
                    command.arg(&*letter.delivery.subscription).arg(seq).arg(died);
                }
                total += row::number(self.link.run(action, &REDRIVE, &command).await?);
            }
            left = left.saturating_sub(page.letters.len());
            match page.next {
                Some(next) if left > 0 => filter.after = Some(next),
                _ => return Ok(total),
            }
        }
    }

    pub(super) async fn replay(&self, replay: &Replay) -> Result<u64> {
        let action = "replay events";
        self.link.check_open()?;
        let types = self.types(&replay.pattern).await?;
        let seqs = self.of_types(&types, replay.from_seq.unwrap_or(0), replay.to_seq.unwrap_or(LAST).min(LAST)).await?;
        let mut total = 0;
        for seqs in seqs.chunks(STEP) {
            let mut command = self.call(action, &REPLAY).await?;
            command.arg(&*replay.subscription).arg(u8::from(replay.missing_only)).arg(u8::from(replay.dry_run));
            for bound in [replay.from, replay.to] {
                command.arg(bound.map_or_else(String::new, |at| at.as_microsecond().to_string()));
            }
            for seq in seqs {
                command.arg(seq);
            }
            total += row::number(self.link.run(action, &REPLAY, &command).await?);
        }
        Ok(total)
    }

    pub(super) async fn cancel(&self, subscription: &str) -> Result<u64> {
        let action = "cancel deliveries";
        let mut total = 0;
        loop {
            let mut command = self.call(action, &CANCEL).await?;
            command.arg(subscription).arg(STEP);
            match row::number(self.link.run(action, &CANCEL, &command).await?) {
                0 => return Ok(total),
                gone => total += gone,
            }
        }
    }

    pub(super) async fn erase(&self, id: &str) -> Result<u64> {
        let action = "erase an event";
        let mut command = self.call(action, &ERASE).await?;
        command.arg(id);
        Ok(row::number(self.link.run(action, &ERASE, &command).await?))
    }

    pub(super) async fn prune_all(&self, retention: &Retention) -> Result<u64> {
        let action = "prune events";
        let (mut total, mut skip) = (0, 0);
        // The instant is fixed by the first step, or open events that become old meanwhile would be passed over twice.
        let instant = match retention.max_age {
            Some(age) => (self.now().await?.saturating_sub(as_micros(age))).to_string(),
            None => String::new(),
        };
        loop {
            let mut command = self.call(action, &PRUNE).await?;
            let most = retention.max_events.map_or_else(String::new, |most| most.to_string());
            command.arg(&instant).arg(most).arg(STEP).arg(skip);
            let mut answer = row::list(self.link.run(action, &PRUNE, &command).await?).into_iter();
            let mut figure = || row::number(answer.next().unwrap_or_default());
            let (gone, passed, is_more) = (figure(), figure(), figure());
            total += gone;
            skip = passed;
            if is_more == 0 {
                return Ok(total);
            }
        }
    }

    /// The store's time.
    async fn now(&self) -> Result<i64> {
        self.link.check_open()?;
        if let Some(clock) = &self.clock {
            return Ok(clock());
        }
        self.server_time().await
    }

    /// What the server's own clock says.
    pub(super) async fn server_time(&self) -> Result<i64> {
        let mut answer = row::list(self.link.query("ask for the time", &redis::cmd("TIME")).await?).into_iter();
        let mut part = || i64::try_from(row::number(answer.next().unwrap_or(Value::Nil))).unwrap_or(0);
        Ok(part().saturating_mul(1_000_000).saturating_add(part()))
    }
}
