//! The interface of `wit/plugin.wit` in Rust. All of it is generated; `host::wasm` puts it into this crate's words.

wit_bindgen::generate!({
    path: "wit",
    world: "plugin",
    pub_export_macro: true,
    export_macro_name: "export",
    default_bindings_module: "tidegate_plugin::bindings",
});

/// The optional export that is called with many events at once, packed: [`Batch`](crate::host::Batch) unpacks them.
pub mod batch {
    wit_bindgen::generate!({
        path: "wit",
        inline: "package tidegate:sdk; world batched { export tidegate:plugin/packed-batch-handler@1.0.0; }",
        world: "tidegate:sdk/batched",
        with: { "tidegate:plugin/types@1.0.0": crate::bindings::tidegate::plugin::types },
        pub_export_macro: true,
        export_macro_name: "export_batch",
        default_bindings_module: "tidegate_plugin::bindings::batch",
    });
}

/// The optional export that is called before a new version takes over.
pub mod self_check {
    wit_bindgen::generate!({
        path: "wit",
        inline: "package tidegate:sdk; world checked { export tidegate:plugin/lifecycle@1.0.0; }",
        world: "tidegate:sdk/checked",
        pub_export_macro: true,
        export_macro_name: "export_self_check",
        default_bindings_module: "tidegate_plugin::bindings::self_check",
    });
}
