//! What `wit/plugin.wit` says, as Rust types and traits.
//!
//! Generated. The host side of the imports is written in [`imports`](super::imports), the calls of the exports in
//! [`exports`](super::exports).

wasmtime::component::bindgen!({
    path: "wit/plugin.wit",
    // All that a plugin may export, the optional too. Each export is looked for by itself.
    inline: "package tidegate:host;
        world probed {
            include tidegate:plugin/plugin@1.0.0;
            export tidegate:plugin/batch-handler@1.0.0;
            export tidegate:plugin/packed-batch-handler@1.0.0;
            export tidegate:plugin/lifecycle@1.0.0;
        }",
    world: "tidegate:host/probed",
    // Events are lowered from where they are, without a copy in between.
    ownership: Borrowing { duplicate_if_necessary: true },
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

/// What it calls with many events at once, where a component has it.
pub(super) const BATCH_HANDLER: &str = "tidegate:plugin/batch-handler";

/// The same with the events packed, which it prefers.
pub(super) const PACKED_BATCH_HANDLER: &str = "tidegate:plugin/packed-batch-handler";

/// What it calls before a version may serve, where a component has it.
pub(super) const LIFECYCLE: &str = "tidegate:plugin/lifecycle";
