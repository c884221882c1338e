//! What the operator decides: where plugins are, what attempts may use, and what each plugin is granted.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::cache::Folder;
use super::limits::{Limits, bytes};
use super::manifest::{Batch, Capabilities, Limits as Choices};
use crate::error::{Error, Result};
use crate::event::MAX_PAYLOAD;

/// The host as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The folder whose `*.wasm` files are the plugins; `None` for no plugins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Where compiled code is kept.
    pub cache: CodeCache,
    /// The folder that [`CodeCache::Auto`] stands for, which whoever reads the environment puts here; `None` for none.
    #[serde(skip)]
    pub user_cache: Option<PathBuf>,
    /// The largest component that is read, in bytes, so that no file in the folder can fill the memory.
    pub max_component: ByteSize,
    /// Attempts at once, over all plugins; one more waits for an instance within its own timeout.
    pub instances: NonZeroU32,
    /// What an attempt may use, unless the plugin's section says otherwise.
    pub limits: Limits,
    /// The largest payload of an event that a plugin publishes, in bytes. In the configuration `limits.max_payload`.
    #[serde(skip)]
    pub max_payload: u64,
    /// By plugin name. A section of its own in the configuration, `[plugins.<name>]`, which whoever reads the
    /// configuration puts here.
    #[serde(skip)]
    pub plugins: BTreeMap<String, PluginOptions>,
}

/// The default of [`Options::max_component`]: a guest that brings a whole Python has 40 MiB.
const MAX_COMPONENT: ByteSize = ByteSize::mib(64);

/// The default of [`Options::instances`]: more than the workers of any sensible broker.
const INSTANCES: NonZeroU32 = NonZeroU32::MIN.saturating_add(255);

impl Default for Options {
    fn default() -> Self {
        Self {
            directory: None,
            cache: CodeCache::default(),
            user_cache: None,
            max_component: MAX_COMPONENT,
            instances: INSTANCES,
            limits: Limits::default(),
            max_payload: MAX_PAYLOAD,
            plugins: BTreeMap::new(),
        }
    }
}

/// Where compiled code is kept, so that a start need not compile. Written as `"auto"`, `"off"` or a path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CodeCache {
    /// In the user's own cache folder, where there is one and it is private; otherwise nowhere.
    #[default]
    Auto,
    /// Nowhere: everything is compiled at every start.
    Off,
    /// In this folder, which must be private, or not exist yet.
    Folder(PathBuf),
}

impl TryFrom<String> for CodeCache {
    type Error = &'static str;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        match text.as_str() {
            "" => Err("must be \"auto\", \"off\" or a folder"),
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => Ok(Self::Folder(text.into())),
        }
    }
}

impl From<CodeCache> for String {
    fn from(cache: CodeCache) -> Self {
        match cache {
            CodeCache::Auto => "auto".to_owned(),
            CodeCache::Off => "off".to_owned(),
            CodeCache::Folder(folder) => folder.to_string_lossy().into_owned(),
        }
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

    /// Checks the limits, those of single plugins too.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key of the configuration.
    pub fn validate(&self) -> Result<()> {
        let at = |section: String, limits: &Limits| {
            limits.validate().map_err(|error| match error {
                Error::Invalid { field, value, reason } => {
                    Error::Invalid { field: format!("{section}.limits.{field}").into(), value, reason }
                }
                other => other,
            })
        };
        at("host".to_owned(), &self.limits)?;
        self.plugins.keys().try_for_each(|name| at(format!("plugins.{name}"), &self.limits_of(name)))
    }

    /// The folder for compiled code, if there is to be one.
    pub(super) fn cache_folder(&self) -> Option<Folder> {
        match &self.cache {
            CodeCache::Auto => self.user_cache.clone().map(|path| Folder { path, required: false }),
            CodeCache::Off => None,
            CodeCache::Folder(path) => Some(Folder { path: path.clone(), required: true }),
        }
    }

    /// The most memory that any plugin is allowed, in bytes.
    pub(super) fn max_memory(&self) -> usize {
        let own = self.plugins.values().filter_map(|plugin| plugin.limits.memory.map(ByteSize));
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
            ("cache = \"\"", "must be \"auto\", \"off\" or a folder"),
        ] {
            let error = toml::from_str::<Options>(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = toml::from_str::<PluginOptions>("[grants]\nbuckets = []").unwrap_err().to_string();
        assert!(error.contains("buckets"), "{error}");
    }

    #[test]
    fn only_a_folder_that_was_named_must_be_usable() {
        let folder = |text: &str| {
            let options: Options = toml::from_str(text).unwrap();
            assert_eq!(toml::from_str::<Options>(&toml::to_string(&options).unwrap()).unwrap(), options, "{text}");
            Options { user_cache: Some("/home/me/.cache/tidegate".into()), ..options }.cache_folder()
        };
        let user = Folder { path: "/home/me/.cache/tidegate".into(), required: false };
        assert_eq!(folder(""), Some(user));
        assert_eq!(folder("cache = \"off\""), None);
        assert_eq!(folder("cache = \"./off\""), Some(Folder { path: "./off".into(), required: true }));
        assert_eq!(Options::default().cache_folder(), None, "nobody has said where");
    }

    #[test]
    fn a_plugins_section_replaces_the_servers_limits() {
        let own = "grants = { kv = [\"totals\"] }\nconfig = { currency = \"EUR\" }\nlimits = { memory = \"256MiB\" }";
        let mut options: Options = toml::from_str("limits = { fuel = 7 }").unwrap();
        options.plugins.insert("order-totals".into(), toml::from_str(own).unwrap());
        assert_eq!(options.limits_of("order-totals").memory.as_u64(), 256 << 20);
        assert_eq!(options.limits_of("order-totals").fuel, Some(7));
        assert_eq!(options.limits_of("other").memory.as_u64(), 64 << 20);
        assert_eq!(options.max_memory(), 256 << 20);
    }
}
