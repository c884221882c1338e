//! What the operator decides: where plugins are, what attempts may use, and what each plugin is granted.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::limits::{Limits, bytes};
use super::manifest::{Batch, Capabilities, Limits as Choices};

/// The host as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The folder whose `*.wasm` files are the plugins; `None` for no plugins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// A private folder for compiled code; `None` to compile at every start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Attempts at once, over all plugins; one more waits for an instance within its own timeout.
    pub instances: NonZeroU32,
    /// What an attempt may use, unless the plugin's section says otherwise.
    pub limits: Limits,
    /// By plugin name. A section of its own in the configuration, `[plugins.<name>]`, which whoever reads the
    /// configuration puts here.
    #[serde(skip)]
    pub plugins: BTreeMap<String, PluginOptions>,
}

/// The default of [`Options::instances`]: more than the workers of any sensible broker.
const INSTANCES: NonZeroU32 = NonZeroU32::MIN.saturating_add(255);

impl Default for Options {
    fn default() -> Self {
        Self { directory: None, cache: None, instances: INSTANCES, limits: Limits::default(), plugins: BTreeMap::new() }
    }
}

/// One plugin: `[plugins.<name>]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginOptions {
    /// What it may do, of what it requests.
    pub grants: Capabilities,
    /// The values of its settings. It sees those that it requests and that are granted.
    pub config: BTreeMap<String, String>,
    /// In place of the server's limits. The plugin's own are obeyed where they are stricter.
    pub limits: Choices,
    /// How many events its instances may serve at most, if it asks for more than one; 1 for a fresh instance per event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reuse: Option<NonZeroU32>,
    /// How many events one call may have at most, if it takes more than one; 1 for none but single ones.
    pub batch: Batch,
}

impl Options {
    /// What the operator allows the plugin to use.
    #[must_use]
    pub fn limits_of(&self, plugin: &str) -> Limits {
        self.plugins.get(plugin).map_or_else(|| self.limits.clone(), |own| self.limits.replaced(&own.limits))
    }

    /// The most memory that any plugin is allowed, in bytes.
    pub(super) fn max_memory(&self) -> usize {
        let own = self.plugins.values().filter_map(|plugin| plugin.limits.memory.map(bytesize::ByteSize));
        bytes(own.fold(self.limits.memory, Ord::max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        for (text, word) in [
            ("directry = \"plugins\"", "directry"),
            ("[limits]\nmemry = \"1MiB\"", "memry"),
            ("instances = 0", "nonzero"),
        ] {
            let error = toml::from_str::<Options>(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = toml::from_str::<PluginOptions>("[grants]\nbuckets = []").unwrap_err().to_string();
        assert!(error.contains("buckets"), "{error}");
    }

    #[test]
    fn a_plugins_section_replaces_the_servers_limits() {
        let own = "grants = { kv = [\"totals\"] }\nconfig = { currency = \"EUR\" }\nlimits = { memory = \"256MiB\" }";
        let mut options: Options = toml::from_str("limits = { fuel = 7 }").unwrap();
        options.plugins.insert("order-totals".into(), toml::from_str(own).unwrap());
        assert_eq!(options.limits_of("order-totals").memory.as_u64(), 256 << 20);
        assert_eq!(options.limits_of("order-totals").fuel, 7);
        assert_eq!(options.limits_of("other").memory.as_u64(), 64 << 20);
        assert_eq!(options.max_memory(), 256 << 20);
    }
}
