//! What several tests of the host need: calls, and components written as text.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::component::embed_manifest;
use super::{Host, Options, PluginOptions, check};
use crate::delivery::Verdict;
use crate::error::Result;
use crate::event::{Event, EventType, Payload, Source};
use crate::handler::{Call, Handler as _, KvRead, Outcome};

struct Empty;

#[async_trait]
impl KvRead for Empty {
    async fn get(&self, _: &str, _: &str) -> Result<Option<Bytes>> {
        Ok(None)
    }
}

/// A first attempt at an event with this payload.
pub(super) fn call(payload: &'static str) -> Call {
    let payload = Payload::json_text(payload).unwrap();
    Call {
        event: Arc::new(Event::new(Source::System, EventType::parse("faults.tests.create").unwrap(), payload)),
        subscription: "tests".into(),
        attempt: 1,
        max_attempts: 4,
        timeout: Duration::from_secs(30),
        is_replay: false,
        kv: Arc::new(Empty),
    }
}

const MANIFEST: &str = "name = \"sample\"\nversion = \"1.0.0\"\n";

fn options() -> Options {
    Options { instances: NonZeroU32::MIN, ..Options::default() }
}

/// A component of this text with a manifest.
fn plugin(text: &str, manifest: &str) -> Vec<u8> {
    embed_manifest(&wat::parse_str(text).unwrap(), manifest).unwrap()
}

async fn refusal(bytes: Vec<u8>, options: &Options) -> String {
    check(options, "plugins/candidate.wasm", bytes.into()).await.unwrap_err().to_string()
}

/// Exports a handler, but none of the right type.
const ODD: &str = r#"(component
    (instance $handler)
    (export "tidegate:plugin/handler@1.0.0" (instance $handler)))"#;

#[tokio::test]
async fn bytes_that_are_no_component_are_refused_with_what_they_are() {
    let whole = plugin(ODD, MANIFEST);
    let cut = whole.get(..whole.len() - 5).unwrap().to_vec();
    let rows: [(Vec<u8>, &str); 7] = [
        (b"#!/bin/sh\n".to_vec(), r##"is not WebAssembly: it begins with "#!/bin/s""##),
        (Vec::new(), "is cut short: it has 0 bytes"),
        (b"\0asm\x0d".to_vec(), "is cut short: it has 5 bytes"),
        (cut, "is cut short: a section goes on"),
        (wat::parse_str("(module)").unwrap(), "is a core module"),
        (b"\x7fELF\x02\x01\x01\0 and more".to_vec(), "is compiled code, which is never loaded"),
        (b"\0asm\x0d\0\x01\0\x0a\x03\x01\x07\0".to_vec(), "is damaged at byte"),
    ];
    for (bytes, words) in rows {
        let error = refusal(bytes, &options()).await;
        assert!(error.starts_with("plugin candidate.wasm: ") && error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_component_of_another_kind_is_refused_with_what_it_is() {
    let component = |export: &str| {
        let text = format!("(component (instance $i) (export {export:?} (instance $i)))");
        wat::parse_str(text).unwrap()
    };
    let rows = [
        (component("wasi:cli/run@0.2.0"), "WASI command"),
        (component("acme:web/serve@1.0.0"), "exports acme:web/serve@1.0.0"),
        (component("tidegate:plugin/handler@2.0.0"), "this host serves 1.x"),
        (component("tidegate:plugin/handler@1.0.0"), "has no manifest"),
        (wat::parse_str("(component)").unwrap(), "exports nothing"),
    ];
    for (bytes, words) in rows {
        let error = refusal(bytes, &options()).await;
        assert!(error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_handler_of_another_shape_is_refused_with_both_sides_named() {
    let error = refusal(plugin(ODD, MANIFEST), &options()).await;
    assert!(error.starts_with("plugin sample: uses tidegate:plugin/handler@1.0.0 in a shape that differs"), "{error}");
}

#[tokio::test]
async fn a_component_that_cannot_be_instantiated_is_refused_before_it_serves() {
    let handler = |function: &str| {
        format!(
            r#"(component
                (core module $m (func (export "h")) {function})
                (core instance $i (instantiate $m))
                (func $f (canon lift (core func $i "h")))
                (instance $h (export "handle" (func $f)))
                (export "tidegate:plugin/handler@1.0.0" (instance $h)))"#
        )
    };
    let rows = [
        (handler(""), "cannot be instantiated: no-instance: "),
        (handler("(func $begin unreachable) (start $begin)"), "cannot be instantiated: trap: wasm trap"),
    ];
    for (text, words) in rows {
        let error = refusal(plugin(&text, MANIFEST), &options()).await;
        assert!(error.contains(words), "{error}");
    }
}

#[tokio::test]
async fn imports_are_compared_with_requests_and_requests_with_grants() {
    let importing = |import: &str| {
        format!(
            "(component (import {import:?} (instance)) (instance $h) (export \"tidegate:plugin/handler@1.0.0\" (instance $h)))"
        )
    };
    let kv = importing("tidegate:plugin/kv@1.0.0");
    let requesting = format!("{MANIFEST}[capabilities]\nkv = [\"totals\"]\n");
    let error = refusal(plugin(&kv, MANIFEST), &options()).await;
    assert!(error.contains("imports tidegate:plugin/kv@1.0.0 without requesting it"), "{error}");
    let error = refusal(plugin(&kv, &requesting), &options()).await;
    assert!(error.contains("add kv = [\"totals\"] to [plugins.sample.grants]"), "{error}");

    let mut granting = options();
    let own: PluginOptions = toml::from_str("grants = { kv = [\"totals\"] }").unwrap();
    granting.plugins.insert("sample".to_owned(), own);
    let error = refusal(plugin(&kv, &requesting), &granting).await;
    assert!(error.contains("in a shape that differs"), "what remains is the odd handler: {error}");
    let error = refusal(plugin(&importing("acme:db/query@1.0.0"), MANIFEST), &options()).await;
    assert!(error.contains("imports acme:db/query@1.0.0, which this host does not offer"), "{error}");
}

#[tokio::test]
async fn memory_that_cannot_be_had_is_refused_before_it_is_needed() {
    let text = r#"(component
        (core module $m (memory 32)) (core instance (instantiate $m))
        (instance $h) (export "tidegate:plugin/handler@1.0.0" (instance $h)))"#;
    let limited = format!("{MANIFEST}[limits]\nmemory = \"1MiB\"\n");
    let error = refusal(plugin(text, &limited), &options()).await;
    assert!(error.contains("begins with 2.0 MiB of memory, more than its limit of 1.0 MiB"), "{error}");
}

#[tokio::test]
async fn a_name_without_a_version_answers_as_a_host_fault() {
    let host = Host::new(options(), None).unwrap();
    let outcome = host.handler("missing").handle(call("null")).await;
    assert_eq!(outcome.verdict, Verdict::HostFault);
    assert_eq!(outcome.fault.unwrap().code, "no-active-version");
    assert!(host.plugins().is_empty());
}

/// WASI 0.2 as far as these tests need it.
const WASI: &str = r#"
package tests:guests;

package wasi:io@0.2.0 {
    interface error { resource error; }
    interface streams {
        use error.{error};
        resource output-stream {
            blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>;
        }
        variant stream-error { last-operation-failed(error), closed }
    }
}

package wasi:cli@0.2.0 {
    interface exit { exit: func(status: result); }
    interface environment { get-arguments: func() -> list<string>; get-environment: func() -> list<tuple<string, string>>; }
    interface stdout { use wasi:io/streams@0.2.0.{output-stream}; get-stdout: func() -> output-stream; }
}

world commanding {
    import wasi:cli/exit@0.2.0;
    import wasi:cli/environment@0.2.0;
    import wasi:cli/stdout@0.2.0;
    export tidegate:plugin/handler@1.0.0;
}
"#;

/// A guest that was built for WASI: `handle` does this and then succeeds.
fn wasi_guest(handle: &str) -> Vec<u8> {
    wasi_guest_with(handle, MANIFEST)
}

fn wasi_guest_with(handle: &str, manifest: &str) -> Vec<u8> {
    let module = format!(
        r#"(module
            (import "wasi:cli/exit@0.2.0" "exit" (func $exit (param i32)))
            (import "wasi:cli/environment@0.2.0" "get-environment" (func $environment (param i32)))
            (import "wasi:cli/environment@0.2.0" "get-arguments" (func $arguments (param i32)))
            (import "wasi:cli/stdout@0.2.0" "get-stdout" (func $stdout (result i32)))
            (import "wasi:io/streams@0.2.0" "[method]output-stream.blocking-write-and-flush"
                (func $write (param i32 i32 i32 i32)))
            (memory (export "memory") 1)
            (data (i32.const 64) "hello from stdout\n")
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 1024)
            (func (export "tidegate:plugin/handler@1.0.0#handle")
                (param i32 i32 i64 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32) (result i32)
                {handle}
                i32.const 512))"#
    );
    let mut resolve = wit_parser::Resolve::default();
    resolve.push_source("plugin.wit", include_str!("../../wit/plugin.wit")).unwrap();
    let package = resolve.push_source("wasi.wit", WASI).unwrap();
    let world = resolve.select_world(&[package], Some("commanding")).unwrap();
    let mut module = wat::parse_str(module).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8).unwrap();
    embed_manifest(&super::component::componentise(&module).unwrap(), manifest).unwrap()
}

/// A guest of the interface as it was before turns: it takes the number of its attempt for a pointer to its answer.
fn guest_before_turns(manifest: &str) -> Vec<u8> {
    let module = r#"(module
        (import "tidegate:plugin/delivery@1.0.0" "attempt" (func $attempt (result i32)))
        (memory (export "memory") 1)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 1024)
        (func (export "tidegate:plugin/handler@1.0.0#handle")
            (param i32 i32 i64 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32) (result i32)
            (i32.mul (call $attempt) (i32.const 512))))"#;
    let before: Vec<&str> =
        include_str!("../../wit/plugin.wit").lines().filter(|line| !line.contains("turn: func")).collect();
    assert!(before.len() < include_str!("../../wit/plugin.wit").lines().count());
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_source("plugin.wit", &before.join("\n")).unwrap();
    let world = resolve.select_world(&[package], Some("plugin")).unwrap();
    let mut module = wat::parse_str(module).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8).unwrap();
    embed_manifest(&super::component::componentise(&module).unwrap(), manifest).unwrap()
}

#[tokio::test]
async fn a_guest_built_before_there_were_turns_and_batches_is_served_event_by_event() {
    let host = Host::new(options(), None).unwrap();
    let plugin = host.load("old.wasm", guest_before_turns(MANIFEST).into()).await.unwrap();
    assert_eq!(plugin.handle(call("null")).await.verdict, Verdict::Ok);
    assert_eq!(plugin.max_batch(), 1);
    assert_eq!(plugin.handle_batch(vec![call("null"), call("null")]).await, None);

    let asking = format!("{MANIFEST}[batch]\nmax = 8\n");
    let refused = refusal(guest_before_turns(&asking), &options()).await;
    assert!(refused.contains("batch.max = 8") && refused.contains("does not export"), "{refused}");
}

#[tokio::test]
async fn what_a_wasi_guest_writes_is_each_events_own_when_it_is_used_again() {
    let host = Host::new(options(), None).unwrap();
    let handle = "(call $write (call $stdout) (i32.const 64) (i32.const 18) (i32.const 256))";
    let guest = wasi_guest_with(handle, &format!("reuse = 9\n{MANIFEST}"));
    let plugin = host.load("wasi.wasm", guest.into()).await.unwrap();
    for _ in 0..3 {
        let outcome = plugin.handle(call("null")).await;
        let lines: Vec<_> = outcome.trace.log.iter().map(|line| &*line.message).collect();
        assert_eq!(lines, ["hello from stdout"]);
    }
}

async fn handled(handle: &str) -> Outcome {
    let host = Host::new(options(), None).unwrap();
    host.load("wasi.wasm", wasi_guest(handle).into()).await.unwrap().handle(call("null")).await
}

#[tokio::test]
async fn what_a_wasi_guest_writes_to_stdout_becomes_log_lines() {
    let outcome = handled("(call $write (call $stdout) (i32.const 64) (i32.const 18) (i32.const 256))").await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");
    let lines: Vec<_> = outcome.trace.log.iter().map(|line| (line.level, &*line.message)).collect();
    assert_eq!(lines, [(2, "hello from stdout")]);
}

#[tokio::test]
async fn exit_ends_the_attempt_only() {
    let outcome = handled("(call $exit (i32.const 1))").await;
    assert_eq!(outcome.verdict, Verdict::Trap, "{outcome:?}");
    let fault = outcome.fault.unwrap();
    assert_eq!((&*fault.code, &*fault.message), ("exit", "the guest exited with status 1"));
}

#[tokio::test]
async fn a_wasi_guest_sees_no_environment_and_no_arguments() {
    let neither = "(call $environment (i32.const 256)) (call $arguments (i32.const 264))
        (if (i32.or (i32.load (i32.const 260)) (i32.load (i32.const 268))) (then unreachable))";
    let outcome = handled(neither).await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");
}
