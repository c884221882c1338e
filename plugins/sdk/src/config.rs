//! Settings that the operator gives to the plugin.
//!
//! A key must be requested in `plugin.toml` (`config = ["currency"]`); one that is not set reads as `None`.

use crate::host;

/// The value of one setting.
pub fn get(key: &str) -> Option<String> {
    host::config(key)
}
