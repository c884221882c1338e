//! The one error type: few kinds, each one that a caller can act on.
//!
//! A handler's refusal is a [`Verdict`](crate::delivery::Verdict), never an `Error`: an `Error` means that tidegate
//! itself could not do what it was asked. Messages are fragments that read after "failed to …: "; the cause stands in
//! `source()` and is not repeated in the text.

use std::borrow::Cow;
use std::time::Duration;

/// What `std::error::Error` values are boxed as when they become a [`source`](std::error::Error::source).
pub type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why tidegate could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value breaks a rule. Nothing was stored.
    #[error("{field}: {reason} (got {value})")]
    Invalid {
        /// The field as the caller spells it, such as `type` or `retry.max_delay`.
        field: Cow<'static, str>,
        /// The offending value, shortened to what fits on a line.
        value: String,
        /// The rule, such as "must be at most 255 bytes".
        reason: Cow<'static, str>,
    },
    /// A value is larger than its limit. Nothing was stored.
    #[error("{field} has {size} bytes, more than the limit of {limit}")]
    TooLarge {
        /// The field as the caller spells it.
        field: Cow<'static, str>,
        /// The size that was sent, in bytes (the least it can be, where reading stopped early).
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The named thing does not exist.
    #[error("{what} not found: {id}")]
    NotFound {
        /// The kind of thing, such as `event`.
        what: &'static str,
        /// The id or name that was asked for.
        id: String,
    },
    /// The named thing is in a state that forbids the call.
    #[error("{what} {id}: {reason}")]
    Conflict {
        /// The kind of thing, such as `subscription`.
        what: &'static str,
        /// Its id or name.
        id: String,
        /// What stands in the way, and what to do.
        reason: Cow<'static, str>,
    },
    /// There is no room now; nothing was stored, and the same call may succeed later.
    #[error("event queue is full: {reason}")]
    Overloaded {
        /// Which bound was hit.
        reason: Cow<'static, str>,
        /// When to try again.
        retry_after: Duration,
    },
    /// The broker, provider or host was stopped.
    #[error("{0} is not running")]
    Stopped(&'static str),
    /// The store failed or could not be reached.
    #[error("{action} in {provider}")]
    Store {
        /// The provider's name, such as `sqlite`.
        provider: &'static str,
        /// What was being done, such as "append 12 events".
        action: Cow<'static, str>,
        /// What the store said.
        #[source]
        source: Cause,
    },
    /// Something was written by a version, or for an interface, that this binary does not serve.
    #[error("{what}: {reason}")]
    Incompatible {
        /// The thing, such as a database path or a plugin.
        what: String,
        /// What does not fit, and what to do.
        reason: Cow<'static, str>,
    },
    /// A plugin, or a file that should be one, cannot be used.
    #[error("plugin {plugin}: {reason}")]
    Plugin {
        /// The plugin's name, or the file's when it has none yet.
        plugin: String,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// The longest value quoted in an error message, in characters.
const QUOTED: usize = 80;

impl Error {
    /// An [`Error::Invalid`], with `value` shortened for display.
    pub fn invalid(
        field: impl Into<Cow<'static, str>>,
        value: impl AsRef<str>,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Invalid { field: field.into(), value: quote(value.as_ref()), reason: reason.into() }
    }

    /// An [`Error::NotFound`].
    pub fn not_found(what: &'static str, id: impl Into<String>) -> Self {
        Self::NotFound { what, id: id.into() }
    }

    /// An [`Error::Conflict`].
    pub fn conflict(what: &'static str, id: impl Into<String>, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Conflict { what, id: id.into(), reason: reason.into() }
    }

    /// An [`Error::Store`].
    pub fn store(provider: &'static str, action: impl Into<Cow<'static, str>>, source: impl Into<Cause>) -> Self {
        Self::Store { provider, action: action.into(), source: source.into() }
    }

    /// An [`Error::Plugin`].
    pub fn plugin(plugin: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Plugin { plugin: plugin.into(), reason: reason.into() }
    }

    /// A stable code for programs, the same in HTTP problems, in the CLI's `--json` and in logs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::TooLarge { .. } => "too_large",
            Self::NotFound { .. } => "not_found",
            Self::Conflict { .. } => "conflict",
            Self::Overloaded { .. } => "queue_full",
            Self::Stopped(_) => "not_running",
            Self::Store { .. } => "store_failed",
            Self::Incompatible { .. } => "incompatible",
            Self::Plugin { .. } => "plugin_unusable",
        }
    }
}

/// `value` in double quotes, escaped, and cut after 80 characters with a mark.
#[must_use]
pub fn quote(value: &str) -> String {
    match value.char_indices().nth(QUOTED) {
        None => format!("{value:?}"),
        Some((end, _)) => format!("{:?}…", value.get(..end).unwrap_or_default()),
    }
}

/// The one of `known` that `given` was probably meant to be, or `None` when nothing is near.
#[must_use]
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(given, name), name))
        .filter(|&(distance, name)| distance <= 1 + name.chars().count() / 4)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_is_cut_on_a_character_boundary_with_a_mark() {
        let error = Error::invalid("type", "é".repeat(500), "must be at most 255 bytes");
        let text = error.to_string();
        assert!(text.starts_with("type: must be at most 255 bytes (got \"é"), "{text}");
        assert!(text.chars().count() < 140, "{text}");
        assert!(text.contains('…'), "{text}");
    }

    #[test]
    fn control_characters_in_a_value_are_escaped() {
        assert_eq!(quote("a\nb\u{0}"), "\"a\\nb\\0\"");
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        let known = ["worker_count", "buffer_size", "mode"];
        assert_eq!(nearest("worker_cuont", known), Some("worker_count"));
        assert_eq!(nearest("workers", known), None);
        assert_eq!(nearest("mod", known), Some("mode"));
        assert_eq!(nearest("x", []), None);
    }
}
