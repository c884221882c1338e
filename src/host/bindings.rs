//! What `wit/plugin.wit` says, as Rust types and traits.
//!
//! Generated. The host side of the imports is written in [`imports`](super::imports), the calls of the exports in
//! [`instance`](super::instance).

wasmtime::component::bindgen!({
    path: "wit/plugin.wit",
    world: "plugin",
    imports: {
        // The two that may have to ask the store.
        "tidegate:plugin/kv.get": async | trappable,
        "tidegate:plugin/kv.increment": async | trappable,
        default: trappable,
    },
    exports: { default: async },
});

/// The package that every interface of ours belongs to.
pub(super) const PACKAGE: &str = "tidegate:plugin";

/// The version that this host serves, and every plugin for an older one of the same major version.
pub(super) const VERSION: &str = "1.0.0";

/// The major version that this host serves. A second one would get bindings of its own beside these.
pub(super) const MAJOR: &str = "1";

/// What the host calls.
pub(super) const HANDLER: &str = "tidegate:plugin/handler";
