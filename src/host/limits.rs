//! What an attempt may use: the numbers, who decides them, and the meter that counts memory.
//!
//! Time and fuel are watched by the engine; the numbers for them stand here, the watching in
//! [`instance`](super::instance).

use std::time::Duration;

use bytesize::ByteSize;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use wasmtime::ResourceLimiter;

use super::manifest::Limits as Choices;
use crate::error::{Error, Result};

/// What an attempt may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// All memories and tables of an instance together.
    pub memory: ByteSize,
    /// About one per instruction; `None` for no limit, and no count either, which costs a guest that computes a sixth of
    /// its speed (`cargo bench -- plugins`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
    /// From the start of the attempt, waiting for an instance included. A subscription's own timeout may be shorter.
    #[serde(with = "friendly::required")]
    pub timeout: Duration,
    /// The body of a reply.
    pub reply: ByteSize,
    /// Events that an attempt may publish; 0 for none.
    pub published_events: u32,
    /// All published events together: payloads, keys and metadata.
    pub published_bytes: ByteSize,
    /// Reads and writes of key-value data; 0 for none.
    pub kv_operations: u32,
    /// Keys and values that are written, and values that are read, together.
    pub kv_bytes: ByteSize,
    /// Calls of the host, whatever for: a guest that only calls uses next to no fuel.
    pub host_calls: u64,
    /// What is kept of an attempt's log.
    pub log: ByteSize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: ByteSize::mib(64),
            fuel: None,
            timeout: Duration::from_secs(30),
            reply: ByteSize::kib(64),
            published_events: 100,
            published_bytes: ByteSize::mib(4),
            kv_operations: 1_000,
            kv_bytes: ByteSize::mib(4),
            host_calls: 100_000,
            log: ByteSize::kib(64),
        }
    }
}

impl Limits {
    /// Checks that no limit leaves nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the limit.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("memory", self.memory),
            ("reply", self.reply),
            ("published_bytes", self.published_bytes),
            ("kv_bytes", self.kv_bytes),
            ("log", self.log),
        ];
        let counts = [("fuel", self.fuel.unwrap_or(u64::MAX)), ("host_calls", self.host_calls)];
        let sizes = sizes.into_iter().map(|(limit, size)| (limit, size.as_u64() == 0));
        let mut all = sizes.chain(counts.map(|(limit, count)| (limit, count == 0)));
        let none = all.find(|(_, is_nothing)| *is_nothing).map(|(limit, _)| (limit, "0"));
        match none.or_else(|| self.timeout.is_zero().then_some(("timeout", "0s"))) {
            Some((limit, value)) => Err(Error::invalid(limit, value, "leaves nothing: give it some, or leave it out")),
            None => Ok(()),
        }
    }

    /// These limits, with the operator's choices in their place.
    #[must_use]
    pub fn replaced(&self, by: &Choices) -> Self {
        Self {
            memory: by.memory.map_or(self.memory, ByteSize),
            fuel: by.fuel.or(self.fuel),
            timeout: by.timeout.unwrap_or(self.timeout),
            reply: by.reply.map_or(self.reply, ByteSize),
            published_events: by.published_events.unwrap_or(self.published_events),
            published_bytes: by.published_bytes.map_or(self.published_bytes, ByteSize),
            kv_operations: by.kv_operations.unwrap_or(self.kv_operations),
            kv_bytes: by.kv_bytes.map_or(self.kv_bytes, ByteSize),
            host_calls: by.host_calls.unwrap_or(self.host_calls),
            log: by.log.map_or(self.log, ByteSize),
        }
    }

    /// These limits, or a plugin's own where they are stricter: a plugin can never widen them.
    #[must_use]
    pub fn tightened(&self, by: &Choices) -> Self {
        let wished = self.replaced(by);
        Self {
            memory: self.memory.min(wished.memory),
            fuel: [self.fuel, wished.fuel].into_iter().flatten().min(),
            timeout: self.timeout.min(wished.timeout),
            reply: self.reply.min(wished.reply),
            published_events: self.published_events.min(wished.published_events),
            published_bytes: self.published_bytes.min(wished.published_bytes),
            kv_operations: self.kv_operations.min(wished.kv_operations),
            kv_bytes: self.kv_bytes.min(wished.kv_bytes),
            host_calls: self.host_calls.min(wished.host_calls),
            log: self.log.min(wished.log),
        }
    }
}

/// A byte count as this machine addresses it; more than it can address means "all of it".
pub(super) fn bytes(size: ByteSize) -> usize {
    usize::try_from(size.as_u64()).unwrap_or(usize::MAX)
}

/// The most elements of one table: the pool has room of one size for all plugins' tables.
pub(super) const MAX_TABLE: usize = 20_000;

/// What an element of a table takes.
const TABLE_ELEMENT: usize = size_of::<usize>();

/// Counts the memory of one store, and refuses what is too much.
///
/// The engine asks per memory and per table; the limit is on their sum.
#[derive(Debug)]
pub(super) struct Meter {
    limit: usize,
    memory: usize,
    tables: usize,
    peak_memory: usize,
    /// What the last permission was for, should it turn out that it could not be used.
    last: usize,
    refused: bool,
}

impl Meter {
    /// A meter that permits `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, memory: 0, tables: 0, peak_memory: 0, last: 0, refused: false }
    }

    /// Begins to count for another call. What the instance holds it goes on holding.
    pub(super) fn restart(&mut self) {
        (self.peak_memory, self.refused) = (0, false);
    }

    /// The most linear memory held at once, in bytes.
    pub(super) fn peak_memory(&self) -> usize {
        self.peak_memory.max(self.memory)
    }

    /// Whether the guest asked for more than it may have.
    pub(super) fn has_refused(&self) -> bool {
        self.refused
    }

    fn permits(&mut self, more: usize) -> bool {
        let total = self.memory.saturating_add(self.tables).saturating_add(more);
        self.refused |= total > self.limit;
        self.last = more;
        total <= self.limit
    }
}

impl ResourceLimiter for Meter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let more = desired.saturating_sub(current);
        let permitted = self.permits(more);
        if permitted {
            self.peak_memory = self.peak_memory.max(self.memory);
            self.memory = self.memory.saturating_add(more);
        }
        Ok(permitted)
    }

    fn memory_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.memory = self.memory.saturating_sub(self.last);
        self.last = 0;
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if let Some(maximum) = maximum.filter(|&maximum| desired > maximum) {
            // The lower of the table's own maximum and the pool's; the latter is a limit like that on memory.
            self.refused |= maximum >= MAX_TABLE;
            return Ok(false);
        }
        let more = desired.saturating_sub(current).saturating_mul(TABLE_ELEMENT);
        let permitted = self.permits(more);
        if permitted {
            self.tables = self.tables.saturating_add(more);
        }
        Ok(permitted)
    }

    fn table_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.tables = self.tables.saturating_sub(self.last);
        self.last = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 64 << 10;

    #[test]
    fn memories_and_tables_count_together() {
        let mut meter = Meter::new(4 * PAGE);
        assert!(meter.memory_growing(0, PAGE, None).unwrap());
        assert!(meter.memory_growing(0, 2 * PAGE, None).unwrap(), "a second memory");
        assert!(meter.table_growing(0, PAGE / TABLE_ELEMENT, None).unwrap());
        assert!(!meter.has_refused());
        assert!(!meter.memory_growing(PAGE, 2 * PAGE, None).unwrap());
        assert!(meter.has_refused());
        assert_eq!(meter.peak_memory(), 3 * PAGE, "tables are no linear memory");
    }

    #[test]
    fn growth_that_did_not_happen_is_not_counted() {
        let mut meter = Meter::new(4 * PAGE);
        assert!(meter.memory_growing(0, 3 * PAGE, None).unwrap());
        meter.memory_grow_failed(wasmtime::Error::msg("no address space")).unwrap();
        assert_eq!(meter.peak_memory(), 0);
        assert!(meter.memory_growing(0, 4 * PAGE, None).unwrap());
    }

    #[test]
    fn a_guest_at_its_own_maximum_is_refused_without_blame() {
        let mut meter = Meter::new(4 * PAGE);
        assert!(!meter.memory_growing(0, 2 * PAGE, Some(PAGE)).unwrap());
        assert!(!meter.table_growing(0, 2, Some(1)).unwrap());
        assert!(!meter.has_refused());
        assert!(!meter.table_growing(0, MAX_TABLE + 1, Some(MAX_TABLE)).unwrap());
        assert!(meter.has_refused(), "but not at the pool's");
    }

    #[test]
    fn a_plugin_can_only_tighten_what_the_operator_allows() {
        let server = Limits::default();
        let operator = Choices { memory: Some(256 << 20), fuel: Some(9), ..Choices::default() };
        let allowed = server.replaced(&operator);
        let plugin = Choices {
            memory: Some(128 << 20),
            fuel: Some(10),
            timeout: Some(Duration::from_secs(2)),
            published_events: Some(1000),
            published_bytes: Some(1),
            kv_operations: Some(2),
            kv_bytes: Some(u64::MAX),
            host_calls: Some(3),
            ..Choices::default()
        };
        let limits = allowed.tightened(&plugin);
        assert_eq!(limits.memory, ByteSize::mib(128));
        assert_eq!(limits.fuel, Some(9));
        assert_eq!(limits.timeout, Duration::from_secs(2));
        assert_eq!(limits.published_events, 100);
        assert_eq!((limits.published_bytes, limits.kv_operations), (ByteSize(1), 2));
        assert_eq!((limits.kv_bytes, limits.host_calls), (ByteSize::mib(4), 3));
    }
}
