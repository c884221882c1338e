//! extism, as its documentation shows it: a guest that does nothing with a payload of about 300 bytes.
//!
//! `fresh N` makes a `Plugin` from one `CompiledPlugin` for each of N calls; `warm N` calls one `Plugin` N times.
//! Prints calls per second on the last line.

use std::time::Instant;

use extism::{CompiledPlugin, Manifest, Plugin, PluginBuilder, Wasm};

/// A guest of one page whose only function succeeds. It is text: wasmtime parses it.
const GUEST: &str = r#"(module (memory (export "memory") 2) (func (export "handle") (result i32) i32.const 0))"#;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let count: usize = arguments[2].parse().unwrap();
    let payload = "x".repeat(300);
    let manifest = Manifest::new([Wasm::data(GUEST)]);
    let compiled = CompiledPlugin::new(PluginBuilder::new(manifest)).unwrap();
    let call = |plugin: &mut Plugin| {
        plugin.call::<&str, &[u8]>("handle", &payload).unwrap();
    };
    let began = match arguments[1].as_str() {
        "fresh" => {
            let began = Instant::now();
            for _ in 0..count {
                call(&mut Plugin::new_from_compiled(&compiled).unwrap());
            }
            began
        }
        "warm" => {
            let mut plugin = Plugin::new_from_compiled(&compiled).unwrap();
            let began = Instant::now();
            for _ in 0..count {
                call(&mut plugin);
            }
            began
        }
        other => panic!("fresh or warm, not {other}"),
    };
    println!("{:.0}", count as f64 / began.elapsed().as_secs_f64());
}
