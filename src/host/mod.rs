//! The host of plugins: what a component is and asks for, how it is built, and how it runs.
//!
//! A plugin is a WebAssembly component under a name, loaded by a [`Host`] as a [`Handler`](crate::Handler): a fresh
//! instance per event, unless it asks for less, within limits, with no power but what the operator granted. The host has
//! never heard of a database or a broker: key-value data is read through the [`Call`](crate::Call), and what an attempt
//! writes and publishes leaves in its [`Outcome`](crate::handler::Outcome).
//!
//! From the inside out: `instance` is one call of a guest, with an event or with a batch of them, `exports` what is called
//! of it, `imports` what it can ask for meanwhile, `compute` where it goes on when it takes long, and `slots` how many
//! instances there are. `load` makes something callable of bytes, as `grants` decides, `registry` keeps what is active, and
//! `reload` follows a folder: what `files` sees there, as far as `claims` allows.

pub mod component;
pub mod guest;
pub mod manifest;
mod options;
mod limits;
mod grants;
mod bindings;
mod log;
mod convert;
mod wasi;
mod imports;
mod cache;
mod slots;
mod engine;
mod compute;
mod exports;
mod instance;
mod load;
mod registry;
mod files;
mod claims;
mod check;
mod reloader;
mod reload;

pub use check::{CheckedFile, check_files};
pub use grants::needed_grants;
pub use limits::Limits;
pub use options::{CodeCache, Options, PluginOptions};
pub use registry::{Checked, Host, Plugin, PluginDetail, PluginStatus, Refusal, VersionStatus, check};
pub use reload::{Change, Folder};
pub use reloader::{Reloaded, Reloader};

#[cfg(test)]
mod tests;
