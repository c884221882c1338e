//! Key-value storage in named buckets, each of which `plugin.toml` must request (`kv = ["totals"]`).
//!
//! Writes are seen by later reads of the same attempt. They take effect when the attempt succeeds, together with
//! everything that it published, or not at all: a handler that fails half way leaves nothing to clean up.

use core::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Fault, host};

/// A bucket by its name. Nothing happens until it is used.
pub fn bucket(name: &str) -> Bucket<'_> {
    Bucket { name }
}

/// A named set of keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Bucket<'a> {
    name: &'a str,
}

impl Bucket<'_> {
    /// The bytes kept under `key`.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Fault> {
        host::kv_get(self.name, key)
    }

    /// Keeps `value` under `key`.
    pub fn set(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<(), Fault> {
        host::kv_set(self.name, key, value.into(), None)
    }

    /// Keeps `value` under `key` for this long, in whole seconds, rounded up.
    pub fn set_for(&self, key: &str, value: impl Into<Vec<u8>>, lifetime: Duration) -> Result<(), Fault> {
        let seconds = lifetime.as_secs().saturating_add(u64::from(lifetime.subsec_nanos() > 0));
        host::kv_set(self.name, key, value.into(), Some(u32::try_from(seconds).unwrap_or(u32::MAX)))
    }

    /// The value under `key` read as JSON. Fails with the code `invalid-value` when it is of another shape.
    pub fn get_json<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Fault> {
        let Some(bytes) = self.get(key)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|why| self.misfit(key, &why))
    }

    /// Keeps `value` under `key` as JSON.
    pub fn set_json(&self, key: &str, value: &impl Serialize) -> Result<(), Fault> {
        self.set(key, serde_json::to_vec(value).map_err(|why| self.misfit(key, &why))?)
    }

    /// Forgets `key`; it need not exist.
    pub fn delete(&self, key: &str) -> Result<(), Fault> {
        host::kv_delete(self.name, key)
    }

    /// Adds to the number under `key`, which starts at 0, and gives back the sum.
    pub fn increment(&self, key: &str, by: i64) -> Result<i64, Fault> {
        host::kv_increment(self.name, key, by)
    }

    fn misfit(&self, key: &str, why: &serde_json::Error) -> Fault {
        Fault::new("invalid-value", format!("value of {key} in bucket {} does not fit: {why}", self.name))
    }
}
