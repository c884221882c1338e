//! What `tidegate doctor` finds in the server's own report (INFO): what it writes down, how full it is, and its clock.

use async_trait::async_trait;

use super::open::Standing;
use super::{RedisProvider, row};
use crate::error::Result;
use crate::provider::finding::size;
use crate::provider::{Durability, Examine, Finding};

/// Beyond this share of its memory, in percent, a server is nearly full; and beyond the second as good as full.
const FULL: (u64, u64) = (80, 95);

#[async_trait]
impl Examine for RedisProvider {
    async fn examine(&self) -> Result<Vec<Finding>> {
        self.link.check_open()?;
        let before = crate::event::now().as_microsecond();
        let server = self.server_time().await?;
        let after = crate::event::now().as_microsecond();
        let standing = self.look().await?;
        // A server may forbid it; what it says then is nothing.
        let info = self.link.query("ask for the server's state", &redis::cmd("INFO")).await;
        let report = Report(info.ok().map(row::text).unwrap_or_default());
        let mut found = vec![Finding::of_clocks(server, before, after), durability(&standing), eviction(&standing)];
        found.extend(report.findings());
        Ok(found)
    }
}

fn durability(standing: &Standing) -> Finding {
    let settings = format!("appendonly {}, appendfsync {}", standing.appendonly, standing.appendfsync);
    match standing.durability {
        Durability::Storage => {
            Finding::ok("durability", format!("an acknowledged event survives loss of power ({settings})"))
        }
        Durability::Os => {
            let words = "an acknowledged event survives a crash of the server but for the last one or two seconds";
            Finding::ok("durability", format!("{words} ({settings}); `appendfsync always` keeps those too"))
        }
        Durability::Process => Finding::warning(
            "not-durable",
            format!("nothing is promised of an acknowledged event ({settings})"),
            "What was written since the last snapshot goes with the server: CONFIG SET appendonly yes and appendfsync \
             everysec or always, the same in redis.conf; or redis.durability where the server does not say what it does.",
        ),
    }
}

fn eviction(standing: &Standing) -> Finding {
    let policy = &standing.policy;
    match standing.evicts() {
        Some(false) => Finding::ok(
            "eviction",
            format!("the server drops no events when memory is short (maxmemory-policy {policy})"),
        ),
        Some(true) => Finding::problem(
            "evicts",
            format!("the server drops events when memory is short (maxmemory-policy {policy})"),
            "Events, open deliveries among them, vanish without a word, and no server starts on it: CONFIG SET \
             maxmemory-policy noeviction, and `maxmemory-policy noeviction` in redis.conf.",
        ),
        None => Finding::warning(
            "eviction-unknown",
            format!("whether the server drops events when memory is short is not known (maxmemory-policy {policy})"),
            "Dropped keys are lost events: see that its maxmemory-policy is noeviction, or let this user run CONFIG GET.",
        ),
    }
}

/// The answer to INFO.
struct Report(String);

impl Report {
    fn text(&self, name: &str) -> Option<&str> {
        let mut lines = self.0.lines().filter_map(|line| line.trim_end().split_once(':'));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    fn number(&self, name: &str) -> u64 {
        self.text(name).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn findings(&self) -> Vec<Finding> {
        if self.0.is_empty() {
            let advice =
                "How full it is, and whether it can write to its disk, cannot be seen: let this user run INFO.";
            return vec![Finding::warning("not-examined", "the server does not tell of its state", advice)];
        }
        let mut found = vec![self.memory()];
        let writes = ["rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status"];
        found.extend(writes.into_iter().filter_map(|name| {
            let status = self.text(name).filter(|status| *status != "ok")?;
            Some(Finding::problem(
                "disk-errors",
                format!("the server could not write to its disk ({name} is {status})"),
                "It refuses events, or loses them when it ends: its log says why; most often the disk is full, the folder \
                 cannot be written, or there is too little memory to fork.",
            ))
        }));
        if found.len() == 1 {
            found.push(Finding::ok("disk", "the server's last writes to its disk succeeded"));
        }
        found
    }

    fn memory(&self) -> Finding {
        let used = self.number("used_memory");
        let (bound, name) = match (self.number("maxmemory"), self.number("total_system_memory")) {
            (0, all) => (all, "the machine's memory (there is no maxmemory)"),
            (most, _) => (most, "maxmemory"),
        };
        let words = format!("{} of {} are used: {name}", size(used), size(bound));
        let advice = "When it is full, events are refused, or the server is killed by the system: raise maxmemory, give the \
            machine more memory, or keep less with broker.keep_for and broker.keep_events.";
        match used.saturating_mul(100).checked_div(bound) {
            None => Finding::ok("memory", format!("{} are used", size(used))),
            Some(share) if share >= FULL.1 => Finding::problem("memory-full", words, advice),
            Some(share) if share >= FULL.0 => Finding::warning("memory-short", words, advice),
            Some(_) => Finding::ok("memory", words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Severity;

    #[test]
    fn a_report_is_read_for_what_is_wrong() {
        let rows = [
            ("used_memory:10\r\nmaxmemory:100\r\naof_last_write_status:ok\r\n", Severity::Ok, "10 B of 100 B"),
            ("used_memory:85\r\nmaxmemory:100\r\n", Severity::Warning, "85 B of 100 B"),
            ("used_memory:96\r\nmaxmemory:100\r\n", Severity::Problem, "96 B"),
            ("used_memory:96\r\nmaxmemory:0\r\ntotal_system_memory:1000\r\n", Severity::Ok, "the machine's memory"),
            ("used_memory:96\r\n", Severity::Ok, "96 B are used"),
            (
                "used_memory:1\r\nmaxmemory:9\r\nrdb_last_bgsave_status:err\r\n",
                Severity::Problem,
                "bgsave_status is err",
            ),
            ("", Severity::Warning, "does not tell"),
        ];
        for (report, severity, words) in rows {
            let found = Report(report.to_owned()).findings();
            assert_eq!(found.iter().map(|finding| finding.severity).max(), Some(severity), "{found:?}");
            assert!(found.iter().any(|finding| finding.what.contains(words)), "{found:?}");
        }
    }
}
