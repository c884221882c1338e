//! The interface of `wit/plugin.wit` in Rust. All of it is generated; `host::wasm` puts it into this crate's words.

wit_bindgen::generate!({
    path: "wit",
    world: "plugin",
    pub_export_macro: true,
    export_macro_name: "export",
    default_bindings_module: "tidegate_plugin::bindings",
});
