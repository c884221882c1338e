//! What several tests of the host need: calls, and components written as text.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use bytesize::ByteSize;

use super::component::embed_manifest;
use super::engine::{Engine, Settings};
use super::load::load;
use super::{Host, Limits, Options, PluginOptions, check};
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
    let mut unreadable = plugin(ODD, MANIFEST);
    let text = whole.len() - MANIFEST.len();
    unreadable[text + 3] = 0xff;
    let damaged = format!("has a manifest that is damaged at byte {}", text + 3);
    let rows: [(Vec<u8>, &str); 12] = [
        (b"#!/bin/sh\n".to_vec(), r##"is not WebAssembly: it begins with "#!/bin/s""##),
        (Vec::new(), "is empty"),
        (b"\n(component)".to_vec(), "is WebAssembly in its text form"),
        (b";; a comment\n(module)".to_vec(), "is WebAssembly in its text form"),
        (b"\x1f\x8b\x08\0".to_vec(), "is not WebAssembly: it begins with \"\\x1f"),
        (b"\0asm\x0e\0\x01\0".to_vec(), "of a version that this host does not know"),
        (unreadable, &damaged),
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
        (component("wasi:http/incoming-handler@0.2.6"), "WASI HTTP service"),
        (component("tidegate:plugin/handler@1.0.0-rc.1"), "a pre-release"),
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
async fn a_handler_of_another_shape_is_refused_with_what_it_lacks() {
    let error = refusal(plugin(ODD, MANIFEST), &options()).await;
    let words = "plugin sample: exports tidegate:plugin/handler@1.0.0 without its function handle: \
                 build it again with the plugin.wit of 1.0.0";
    assert_eq!(error, words);
    let module = r#"(module (func (export "tidegate:plugin/handler@1.0.0#handle") (param i32)))"#;
    let other = "package tidegate:plugin@1.0.0; interface handler { handle: func(event: u32); }";
    let world = "package tests:guests; world commanding { export tidegate:plugin/handler@1.0.0; }";
    let error = refusal(encoded(module, other, world), &options()).await;
    let words = "plugin sample: uses tidegate:plugin/handler@1.0.0, which has another shape in the version that this \
                 host serves, 1.0.0: build it again with the plugin.wit of 1.0.0 (the engine says: ";
    assert!(error.starts_with(words), "{error}");
}

#[tokio::test]
async fn a_guest_that_fails_before_it_is_called_is_not_loaded() {
    let starting = |start: &str| {
        let module = format!(
            r#"(module {HANDLER_TYPE}
                (func $start {start}) (start $start)
                (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle) i32.const 512))"#
        );
        let world = "package tests:guests; world commanding { export tidegate:plugin/handler@1.0.0; }";
        encoded(&module, PLUGIN_WIT, world)
    };
    let limited =
        "name = \"sample\"\nversion = \"1.0.0\"\n[limits]\nmemory = \"1MiB\"\nfuel = 100000\ntimeout = \"50ms\"\n";
    let fails = "fails as it starts, before it is called: wasm trap: ";
    let rows = [
        ("unreachable", format!("{fails}wasm `unreachable` instruction executed")),
        ("(loop $again (br $again))", format!("{fails}all fuel consumed by WebAssembly")),
        (
            "(if (i32.eq (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))",
            "needs more than its memory of 1.0 MiB to start: raise limits.memory".to_owned(),
        ),
    ];
    for (start, words) in rows {
        let error = refusal(embed_manifest(&starting(start), limited).unwrap(), &options()).await;
        assert_eq!(error, format!("plugin sample: {words}"));
    }
    let module = format!(
        r#"(module {HANDLER_TYPE} (memory 10) (memory 10)
            (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle) i32.const 512))"#
    );
    let world = "package tests:guests; world commanding { export tidegate:plugin/handler@1.0.0; }";
    let hungry = embed_manifest(&encoded(&module, PLUGIN_WIT, world), limited).unwrap();
    let error = refusal(hungry, &options()).await;
    assert_eq!(error, "plugin sample: needs more than its memory of 1.0 MiB to start: raise limits.memory");
    assert!(check(&options(), "fine.wasm", starting("nop").into()).await.is_ok());
}

/// What the linker says is said again in words about the plugin: what it uses, what is served, and what to do.
#[tokio::test]
async fn an_import_of_another_shape_is_refused_with_the_function_and_both_versions() {
    let importing = |interface: &str, function: &str| {
        format!(
            r#"(component
                (type $t (instance (type $f (func {function})) (export "emit" (func (type $f)))))
                (import "{interface}" (instance (type $t)))
                (instance $h) (export "tidegate:plugin/handler@1.0.0" (instance $h)))"#
        )
    };
    let missing = r#"(component
        (type $t (instance (type $f (func)) (export "later" (func (type $f)))))
        (import "tidegate:plugin/log@1.2.0" (instance (type $t)))
        (instance $h) (export "tidegate:plugin/handler@1.0.0" (instance $h)))"#;
    let rows = [
        (
            missing.to_owned(),
            "uses later of tidegate:plugin/log@1.2.0, which does not exist in the version that this host serves, 1.0.0: \
             run it on a newer tidegate, or build it for 1.0.0",
        ),
        (
            missing.replace("1.2.0", "1.0.0"),
            "uses later of tidegate:plugin/log@1.0.0, which does not exist in the version that this host serves, 1.0.0: \
             build it again with the plugin.wit of 1.0.0",
        ),
        (
            importing("tidegate:plugin/log@1.0.0", "(param \"level\" u64)"),
            "uses emit of tidegate:plugin/log@1.0.0, which has another shape in the version that this host serves, 1.0.0",
        ),
        (
            missing.replace("tidegate:plugin/log@1.2.0", "wasi:cli/stdout@0.2.99"),
            "uses later of wasi:cli/stdout@0.2.99, which does not exist in the version that this host serves, 0.2.12: \
             run it on a newer tidegate, or build it for 0.2.12",
        ),
        (
            missing.replace("tidegate:plugin/log@1.2.0", "wasi:cli/stdout@0.3.0"),
            "uses later of wasi:cli/stdout@0.3.0, which does not exist in the version that this host serves, 0.3.0: \
             build it again with the interfaces of that version",
        ),
    ];
    for (text, words) in rows {
        let error = refusal(plugin(&text, MANIFEST), &options()).await;
        assert!(error.starts_with(&format!("plugin sample: {words}")), "{error}");
    }
}

/// What a plugin may export besides is asked for its type too, before it serves.
#[tokio::test]
async fn an_optional_export_of_another_shape_is_refused_by_its_name() {
    let rows = [
        ("batch-handler", "handle-batch", "(param i32)", "interface batch-handler { handle-batch: func(event: u32); }"),
        ("batch-handler", "other", "(param i32)", "interface batch-handler { other: func(event: u32); }"),
        (
            "packed-batch-handler",
            "handle-batch",
            "(param i32)",
            "interface packed-batch-handler { handle-batch: func(event: u32); }",
        ),
        ("packed-batch-handler", "other", "(param i32)", "interface packed-batch-handler { other: func(event: u32); }"),
        ("lifecycle", "self-check", "(result i32)", "interface lifecycle { self-check: func() -> u32; }"),
    ];
    for (interface, function, core, wit) in rows {
        let module = format!(
            r#"(module {HANDLER_TYPE}
                (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle) i32.const 512)
                (func (export "tidegate:plugin/{interface}@1.0.0#{function}") {core} {}))"#,
            if core.contains("result") { "i32.const 0" } else { "" },
        );
        let types = PLUGIN_WIT.split_once("interface handler").unwrap().0;
        let other = format!(
            "{types} interface handler {{ use types.{{event, reply, failure}};
            handle: func(event: event) -> result<option<reply>, failure>; }} {wit}"
        );
        let world = format!(
            "package tests:guests; world commanding {{
            export tidegate:plugin/handler@1.0.0; export tidegate:plugin/{interface}@1.0.0; }}"
        );
        let error = refusal(encoded(&module, &other, &world), &options()).await;
        let words = match function {
            "other" => format!("exports tidegate:plugin/{interface}@1.0.0 without its function handle-batch"),
            _ => format!("uses tidegate:plugin/{interface}@1.0.0, which has another shape"),
        };
        assert!(error.starts_with(&format!("plugin sample: {words}")), "{error}");
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
    assert!(error.contains("without its function handle"), "what remains is the odd handler: {error}");
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
    import tidegate:plugin/log@1.0.0;
    import wasi:cli/exit@0.2.0;
    import wasi:cli/environment@0.2.0;
    import wasi:cli/stdout@0.2.0;
    export tidegate:plugin/handler@1.0.0;
}
"#;

/// A guest that was built for WASI: `handle` does this and then gives back what stands at 512, which is success unless
/// it wrote something else there.
fn wasi_guest(handle: &str) -> Vec<u8> {
    let module = format!(
        r#"(module
            (import "wasi:cli/exit@0.2.0" "exit" (func $exit (param i32)))
            (import "wasi:cli/environment@0.2.0" "get-environment" (func $environment (param i32)))
            (import "wasi:cli/environment@0.2.0" "get-arguments" (func $arguments (param i32)))
            (import "wasi:cli/stdout@0.2.0" "get-stdout" (func $stdout (result i32)))
            (import "wasi:io/streams@0.2.0" "[method]output-stream.blocking-write-and-flush"
                (func $write (param i32 i32 i32 i32)))
            (import "tidegate:plugin/log@1.0.0" "emit" (func $emit (param i32 i32 i32 i32 i32)))
            {HANDLER_TYPE}
            (table $table 1 funcref)
            (data (i32.const 128) "no \ff\fe text \1b[2J\n")
            (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle)
                {handle}
                i32.const 512))"#
    );
    encoded(&module, PLUGIN_WIT, WASI)
}

const PLUGIN_WIT: &str = include_str!("../../wit/plugin.wit");

/// What a handler's core module has besides the function itself.
const HANDLER_TYPE: &str = r#"
    (type $handle (func (param i32 i32 i64 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 64) "hello from stdout\n")
    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 1024)"#;

/// A component of this module, with the world `commanding` of these interfaces, and a manifest.
fn encoded(module: &str, plugin: &str, wasi: &str) -> Vec<u8> {
    let mut resolve = wit_parser::Resolve::default();
    resolve.push_source("plugin.wit", plugin).unwrap();
    let package = resolve.push_source("wasi.wit", wasi).unwrap();
    let world = resolve.select_world(&[package], Some("commanding")).unwrap();
    let mut module = wat::parse_str(module).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8).unwrap();
    embed_manifest(&super::component::componentise(&module).unwrap(), MANIFEST).unwrap()
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
    let before: Vec<&str> = PLUGIN_WIT.lines().filter(|line| !line.contains("turn: func")).collect();
    assert!(before.len() < PLUGIN_WIT.lines().count());
    let world = "package tests:guests; world commanding {
        import tidegate:plugin/delivery@1.0.0; export tidegate:plugin/handler@1.0.0; }";
    embed_manifest(&encoded(module, &before.join("\n"), world), manifest).unwrap()
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

/// A guest that takes batches in these forms. A list it answers with each event's content type and payload, and what is
/// packed with its text and each payload.
fn guest_of_batches(forms: &[&str]) -> Vec<u8> {
    let functions = [
        ("batch-handler", "", "(i64.load offset=40 (local.get $from))", 48, 64),
        (
            "packed-batch-handler",
            "(param i32 i32) (param $text i32) (param $length i32)",
            "(i64.or (i64.extend_i32_u (local.get $text)) (i64.shl (i64.extend_i32_u (local.get $length)) (i64.const 32)))",
            32,
            48,
        ),
    ];
    let functions = functions.into_iter().filter(|(form, ..)| forms.contains(form));
    let functions = functions.map(|(form, parameters, told, payload, size)| {
        format!(
            r#"(func (export "tidegate:plugin/{form}@1.0.0#handle-batch")
                (param $from i32) (param $count i32) {parameters} (result i32)
                (local $to i32)
                (i32.store (i32.const 256) (i32.const 1024))
                (i32.store (i32.const 260) (local.get $count))
                (local.set $to (i32.const 1024))
                (loop $next
                    (if (local.get $count) (then
                        (i32.store8 offset=4 (local.get $to) (i32.const 1))
                        (i64.store offset=8 (local.get $to) {told})
                        (i64.store offset=16 (local.get $to) (i64.load offset={payload} (local.get $from)))
                        (local.set $from (i32.add (local.get $from) (i32.const {size})))
                        (local.set $to (i32.add (local.get $to) (i32.const 40)))
                        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
                        (br $next))))
                (i32.const 256))"#
        )
    });
    let module = format!(
        r#"(module
            (memory (export "memory") 1)
            (global $top (mut i32) (i32.const 4096))
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (local $at i32)
                (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
                (global.set $top (i32.add (local.get $at) (local.get 3)))
                (local.get $at))
            (func (export "tidegate:plugin/handler@1.0.0#handle")
                (param i32 i32 i64 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32) (result i32) i32.const 512)
            {})"#,
        functions.collect::<String>()
    );
    let exports: String = forms.iter().map(|form| format!("export tidegate:plugin/{form}@1.0.0;")).collect();
    let world = format!("package tests:guests; world commanding {{ export tidegate:plugin/handler@1.0.0; {exports} }}");
    encoded(&module, PLUGIN_WIT, &world)
}

/// Both ways to take a batch hand over the same, and where there are both it is the cheaper one.
#[tokio::test]
async fn a_batch_is_handed_over_packed_where_it_can_be_and_else_as_a_list() {
    let calls = ["1", "\"zwei\""].map(|payload| {
        let mut call = call(payload);
        let event = Arc::make_mut(&mut call.event);
        event.id = crate::event::EventId::parse("e").unwrap();
        event.key = Some(payload.into());
        call
    });
    let text =
        |key| format!("efaults.tests.createsystemapplication/jsonschemafaultsentitytestsoperationcreatekey{key}");
    let (listed, packed) = ("application/json".to_owned(), text("1") + &text("\"zwei\""));
    let rows: [(&[&str], String); 3] = [
        (&["batch-handler"], listed),
        (&["packed-batch-handler"], packed.clone()),
        (&["batch-handler", "packed-batch-handler"], packed),
    ];
    for (forms, told) in rows {
        let host = Host::new(options(), None).unwrap();
        let plugin = host.load("batches.wasm", guest_of_batches(forms).into()).await.unwrap();
        assert_eq!(plugin.max_batch(), 64);
        let outcomes = plugin.handle_batch(calls.to_vec()).await.unwrap();
        let replies: Vec<_> = outcomes.into_iter().map(|outcome| outcome.reply.unwrap()).collect();
        let replies: Vec<_> = replies.iter().map(|reply| (&*reply.content_type, &*reply.body)).collect();
        assert_eq!(replies, [(&*told, &b"1"[..]), (&told, b"\"zwei\"")], "{forms:?}");
    }
}

#[tokio::test]
async fn what_a_wasi_guest_writes_is_each_events_own_when_it_is_used_again() {
    let host = Host::new(options(), None).unwrap();
    let handle = "(call $write (call $stdout) (i32.const 64) (i32.const 18) (i32.const 256))";
    let guest = embed_manifest(&wasi_guest(handle), &format!("reuse = 9\n{MANIFEST}")).unwrap();
    let plugin = host.load("wasi.wasm", guest.into()).await.unwrap();
    for _ in 0..3 {
        let outcome = plugin.handle(call("null")).await;
        let lines: Vec<_> = outcome.trace.log.iter().map(|line| &*line.message).collect();
        assert_eq!(lines, ["hello from stdout"]);
    }
}

async fn handled(handle: &str) -> Outcome {
    handled_within(Limits::default(), handle).await
}

async fn handled_within(limits: Limits, handle: &str) -> Outcome {
    attempted_within(limits, wasi_guest(handle), call("null")).await
}

async fn attempted(guest: Vec<u8>, call: Call) -> Outcome {
    attempted_within(Limits::default(), guest, call).await
}

async fn attempted_within(limits: Limits, guest: Vec<u8>, call: Call) -> Outcome {
    let host = Host::new(Options { limits, ..options() }, None).unwrap();
    host.load("wasi.wasm", guest.into()).await.unwrap().handle(call).await
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

/// The canonical ABI checks what a guest hands over: that ends the attempt only.
#[tokio::test]
async fn what_is_no_text_or_not_in_memory_is_a_trap() {
    let no_text = "(i32.const 2) (i32.const 128) (i32.const 5)";
    let reply = "(i32.store8 (i32.const 516) (i32.const 1)) (i32.store (i32.const 520) (i32.const 128))
        (i32.store (i32.const 524) (i32.const 5)) (i32.store (i32.const 528) (i32.const 64))";
    let rows = [
        (format!("(call $emit {no_text} (i32.const 0) (i32.const 0))"), "utf-8"),
        (reply.to_owned(), "utf-8"),
        (
            "(call $emit (i32.const 2) (i32.const 65530) (i32.const 99) (i32.const 0) (i32.const 0))".to_owned(),
            "bounds",
        ),
        (
            "(call $emit (i32.const 2) (i32.const 64) (i32.const 5) (i32.const 0) (i32.const 0x0fffffff))".to_owned(),
            "bounds",
        ),
    ];
    for (handle, words) in rows {
        let outcome = handled(&handle).await;
        assert_eq!(outcome.verdict, Verdict::Trap, "{handle}: {outcome:?}");
        let fault = outcome.fault.unwrap();
        assert_eq!(fault.code, "trap");
        assert!(fault.message.contains(words), "{handle}: {fault:?}");
    }
}

#[tokio::test]
async fn bytes_on_stdout_that_are_no_text_become_harmless_lines() {
    let outcome = handled("(call $write (call $stdout) (i32.const 128) (i32.const 16) (i32.const 256))").await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");
    let lines: Vec<_> = outcome.trace.log.iter().map(|line| &*line.message).collect();
    assert_eq!(lines, ["no \u{fffd}\u{fffd} text \\u{1b}[2J"]);
}

/// Memories and tables count together, and a table has a bound of the pool's too.
#[tokio::test]
async fn memory_and_tables_that_grow_without_end_are_out_of_memory() {
    let table = "(loop $more (br_if $more
        (i32.ne (table.grow $table (ref.null func) (i32.const 500)) (i32.const -1))))";
    let memory = "(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))";
    for grow in [table, memory] {
        for limit in [ByteSize::kib(128), ByteSize::mib(8)] {
            let limits = || Limits { memory: limit, ..Limits::default() };
            let outcome = handled_within(limits(), &format!("{grow} unreachable")).await;
            assert_eq!(outcome.verdict, Verdict::OutOfMemory, "{limit} {grow}: {outcome:?}");
            assert!(outcome.trace.peak_memory.is_some_and(|peak| peak <= limit.as_u64()), "{outcome:?}");
            let outcome = handled_within(limits(), grow).await;
            assert_eq!(outcome.verdict, Verdict::Ok, "a guest that can do with less may: {outcome:?}");
        }
    }
}

#[tokio::test]
async fn calls_of_wasi_are_calls_of_the_host() {
    let asking = |times: u32| {
        let ask = "(call $arguments (i32.const 264))";
        std::iter::repeat_n(ask, times as usize).collect::<String>()
    };
    let limits = || Limits { host_calls: 10, ..Limits::default() };
    assert_eq!(handled_within(limits(), &asking(10)).await.verdict, Verdict::Ok);
    for handle in [asking(11), format!("(loop $again {} (br $again))", asking(1))] {
        let outcome = handled_within(limits(), &handle).await;
        assert_eq!(outcome.verdict, Verdict::OutOfFuel, "{outcome:?}");
        assert_eq!(outcome.fault.unwrap().code, "too-many-host-calls");
    }
}

/// WASI 0.3 as far as these tests need it.
const WASI_0_3: &str = r#"
package tests:guests;

package wasi:cli@0.3.0 {
    interface exit { exit: func(status: result); }
    interface environment { get-arguments: func() -> list<string>; get-environment: func() -> list<tuple<string, string>>; }
    interface types { enum error-code { io, illegal-byte-sequence, pipe } }
    interface stdout {
        use types.{error-code};
        write-via-stream: func(data: stream<u8>) -> future<result<_, error-code>>;
    }
}

package wasi:clocks@0.3.0 {
    interface monotonic-clock { wait-for: async func(how-long: u64); }
}

package wasi:filesystem@0.3.0 {
    interface types { resource descriptor; }
    interface preopens { use types.{descriptor}; get-directories: func() -> list<tuple<descriptor, string>>; }
}

package wasi:random@0.3.0 {
    interface random { get-random-u64: func() -> u64; }
}

world commanding {
    import wasi:cli/exit@0.3.0;
    import wasi:cli/environment@0.3.0;
    import wasi:cli/stdout@0.3.0;
    import wasi:clocks/monotonic-clock@0.3.0;
    import wasi:filesystem/preopens@0.3.0;
    import wasi:random/random@0.3.0;
    export tidegate:plugin/handler@1.0.0;
}
"#;

/// What a core module imports of WASI 0.3.
const IMPORTS_0_3: &str = r#"
    (import "wasi:cli/exit@0.3.0" "exit" (func $exit (param i32)))
    (import "wasi:cli/environment@0.3.0" "get-environment" (func $environment (param i32)))
    (import "wasi:cli/environment@0.3.0" "get-arguments" (func $arguments (param i32)))
    (import "wasi:filesystem/preopens@0.3.0" "get-directories" (func $directories (param i32)))
    (import "wasi:random/random@0.3.0" "get-random-u64" (func $random (result i64)))
    (import "wasi:clocks/monotonic-clock@0.3.0" "wait-for" (func $wait (param i64)))
    (import "wasi:cli/stdout@0.3.0" "write-via-stream" (func $via (param i32) (result i32)))
    (import "wasi:cli/stdout@0.3.0" "[stream-new-0]write-via-stream" (func $stream (result i64)))
    (import "wasi:cli/stdout@0.3.0" "[stream-drop-writable-0]write-via-stream" (func $close (param i32)))
    (import "wasi:cli/stdout@0.3.0" "[async-lower][stream-write-0]write-via-stream"
        (func $write (param i32 i32 i32) (result i32)))"#;

/// A guest for WASI 0.3 with the handler of `plugin.wit`.
fn wasi_0_3_guest(handle: &str) -> Vec<u8> {
    let module = format!(
        r#"(module {IMPORTS_0_3} {HANDLER_TYPE}
            (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle) (local $stream i64)
                {handle}
                i32.const 512))"#
    );
    encoded(&module, PLUGIN_WIT, WASI_0_3)
}

/// The same, whose handler is an `async func` and so may wait.
fn async_guest(handle: &str) -> Vec<u8> {
    let module = format!(
        r#"(module {IMPORTS_0_3} {HANDLER_TYPE}
            (import "[export]tidegate:plugin/handler@1.0.0" "[task-return]handle"
                (func $return (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
            (func (export "[callback][async-lift]tidegate:plugin/handler@1.0.0#handle")
                (param i32 i32 i32) (result i32) unreachable)
            (func (export "[async-lift]tidegate:plugin/handler@1.0.0#handle") (type $handle)
                {handle}
                (call $return (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                    (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))
                i32.const 0))"#
    );
    let imports = module.find("(import \"[export]").unwrap();
    let (head, tail) = module.split_at(imports);
    let (import, tail) = tail.split_at(tail.find("(func (export").unwrap());
    let module = format!("(module {import} {}{tail}", head.trim_start_matches("(module"));
    encoded(&module, &PLUGIN_WIT.replace("handle: func(", "handle: async func("), WASI_0_3)
}

#[tokio::test]
async fn a_guest_for_wasi_0_3_has_clocks_random_numbers_and_a_log_and_nothing_else() {
    let sees_nothing = "(call $environment (i32.const 256)) (call $arguments (i32.const 264))
        (call $directories (i32.const 272))
        (if (i32.or (i32.or (i32.load (i32.const 260)) (i32.load (i32.const 268))) (i32.load (i32.const 276)))
            (then unreachable))
        (if (i64.eq (call $random) (call $random)) (then unreachable))";
    let outcome = attempted(wasi_0_3_guest(sees_nothing), call("null")).await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");

    let writes = "(local.set $stream (call $stream))
        (drop (call $via (i32.wrap_i64 (local.get $stream))))
        (drop (call $write (i32.wrap_i64 (i64.shr_u (local.get $stream) (i64.const 32))) (i32.const 64) (i32.const 18)))";
    let outcome = attempted(wasi_0_3_guest(writes), call("null")).await;
    let lines: Vec<_> = outcome.trace.log.iter().map(|line| (line.level, &*line.message)).collect();
    assert_eq!((outcome.verdict, lines), (Verdict::Ok, vec![(2, "hello from stdout")]), "{outcome:?}");

    let outcome = attempted(wasi_0_3_guest("(call $exit (i32.const 1))"), call("null")).await;
    assert_eq!((outcome.verdict, &*outcome.fault.unwrap().code), (Verdict::Trap, "exit"));
}

#[tokio::test]
async fn a_handler_that_is_async_may_wait_and_is_ended_by_its_timeout() {
    let outcome = attempted(async_guest("(call $wait (i64.const 1000000))"), call("null")).await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");
    let hour = async_guest("(call $wait (i64.const 3600000000000))");
    let outcome = attempted(hour, Call { timeout: Duration::from_millis(50), ..call("null") }).await;
    assert_eq!(outcome.verdict, Verdict::Timeout, "{outcome:?}");
    let endless = async_guest("(loop $again (br $again))");
    let outcome = attempted(endless, Call { timeout: Duration::from_millis(50), ..call("null") }).await;
    assert_eq!(outcome.verdict, Verdict::Timeout, "{outcome:?}");
    // What the component model does not allow to others.
    let outcome = attempted(wasi_0_3_guest("(call $wait (i64.const 1000000))"), call("null")).await;
    let fault = outcome.fault.unwrap();
    assert!(outcome.verdict == Verdict::Trap && fault.message.contains("cannot block a synchronous task"), "{fault:?}");
}

/// Where tasks are tracked an instance is used again as well, and its fuel is counted.
#[tokio::test]
async fn an_instance_with_tasks_serves_as_many_events_as_agreed_within_its_fuel() {
    let third_time_traps = "(if (i32.eq (i32.load (i32.const 2048)) (i32.const 2)) (then unreachable))
        (i32.store (i32.const 2048) (i32.add (i32.load (i32.const 2048)) (i32.const 1)))";
    use Verdict::{Ok, Trap};
    for guest in [wasi_0_3_guest(third_time_traps), async_guest(third_time_traps)] {
        for (reuse, expected) in [(2, [Ok, Ok, Ok, Ok]), (9, [Ok, Ok, Trap, Ok])] {
            let manifest = format!("reuse = {reuse}\n{MANIFEST}[limits]\nfuel = 100000\n");
            let host = Host::new(options(), None).unwrap();
            let plugin = host.load("wasi.wasm", embed_manifest(&guest, &manifest).unwrap().into()).await.unwrap();
            for verdict in expected {
                let outcome = plugin.handle(call("null")).await;
                assert_eq!(outcome.verdict, verdict, "{reuse} {outcome:?}");
                assert!(outcome.trace.fuel.is_some_and(|fuel| fuel > 0 && fuel < 1_000), "{outcome:?}");
            }
        }
    }
}

fn engine(settings: &Settings) -> Arc<Engine> {
    Arc::new(Engine::new(settings).unwrap())
}

/// A guest with WASI inside has several memories, tables and core instances; this pool has one of each.
#[tokio::test]
async fn an_attempt_that_finds_the_pool_full_runs_beside_it() {
    let engine = engine(&Settings { parts: 1, ..Settings::new(1, 64 << 20, None) });
    let guest = wasi_guest("(call $write (call $stdout) (i32.const 64) (i32.const 18) (i32.const 256))");
    for (digest, limits) in [("sha256:01", ""), ("sha256:02", "[limits]\nfuel = 100000\n")] {
        let guest = embed_manifest(&guest, &format!("{MANIFEST}{limits}")).unwrap();
        let loaded = load(&engine, &options(), digest.into(), guest.into()).await;
        let loaded = loaded.map_err(|refused| refused.reason).unwrap();
        for _ in 0..3 {
            let outcome = loaded.prepared.attempt(&engine, call("null"), Instant::now()).await;
            assert_eq!((outcome.verdict, outcome.trace.log.len()), (Verdict::Ok, 1), "{outcome:?}");
            assert_eq!(outcome.trace.fuel.is_some(), !limits.is_empty(), "{outcome:?}");
        }
    }
}

/// Runs `work` on a thread whose calls take their instances from this pool.
fn on_a_thread_at(engine: &Arc<Engine>, place: usize, work: impl AsyncFn() + Sync) {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let is_there = engine.place() == place;
        if is_there {
            runtime.block_on(work());
        }
        is_there
    };
    // Threads take places in turn, and other tests have threads too.
    let found = (0..1_000).any(|_| std::thread::scope(|scope| scope.spawn(run).join().unwrap()));
    assert!(found, "no thread came to place {place}");
}

/// What threads would count together they count apart, and every limit holds on every engine.
#[test]
fn a_thread_that_calls_often_comes_to_have_a_copy_of_the_plugin_with_the_same_limits() {
    const ENDS: [(&str, Verdict); 4] =
        [("1", Verdict::Ok), ("12", Verdict::Trap), ("123", Verdict::OutOfMemory), ("1234", Verdict::Timeout)];
    let when = |length: u32, then: &str| format!("(if (i32.eq (local.get 11) (i32.const {length})) (then {then}))");
    let grow = "(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable";
    let guest = [when(2, "unreachable"), when(3, grow), when(4, "(loop $again (br $again))")].concat();
    let guest = wasi_guest(&guest);
    for (digest, fuel) in [("sha256:01", ""), ("sha256:02", "fuel = 1000000000000\n")] {
        let engine = engine(&Settings { pools: 3, ..Settings::new(4, 64 << 20, None) });
        let manifest = format!("{MANIFEST}[limits]\nmemory = \"8MiB\"\ntimeout = \"50ms\"\n{fuel}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let bytes = embed_manifest(&guest, &manifest).unwrap().into();
        let loaded = runtime.block_on(load(&engine, &options(), digest.into(), bytes));
        let prepared = loaded.map_err(|refused| refused.reason).unwrap().prepared;
        let attempt = async |payload| prepared.attempt(&engine, call(payload), Instant::now()).await;
        let ends = async || {
            for (payload, verdict) in ENDS {
                let outcome = attempt(payload).await;
                assert_eq!(outcome.verdict, verdict, "{outcome:?}");
                assert_eq!(outcome.trace.digest.as_deref(), Some(digest));
                assert_eq!(outcome.trace.fuel.is_some(), !fuel.is_empty(), "{outcome:?}");
            }
        };
        assert_eq!(prepared.ready(), [true, false, false]);
        on_a_thread_at(&engine, 0, async || {
            for _ in 0..1_100 {
                assert_eq!(attempt("1").await.verdict, Verdict::Ok);
            }
        });
        assert_eq!(prepared.ready(), [true, false, false]);
        for place in [2, 1] {
            on_a_thread_at(&engine, place, async || {
                ends().await;
                for _ in 0..100_000 {
                    assert_eq!(attempt("1").await.verdict, Verdict::Ok);
                    tokio::task::yield_now().await;
                    if prepared.ready()[place] {
                        return ends().await;
                    }
                }
                panic!("no copy at {place}");
            });
        }
        assert_eq!(prepared.ready(), [true, true, true]);
    }
}

#[tokio::test]
async fn a_component_that_is_too_large_for_the_pool_runs_beside_it() {
    let table = HANDLER_TYPE.to_owned() + "(table 30000 funcref)";
    let module = format!(
        r#"(module {table} (func (export "tidegate:plugin/handler@1.0.0#handle") (type $handle) i32.const 512))"#
    );
    let world = "package tests:guests; world commanding { export tidegate:plugin/handler@1.0.0; }";
    let outcome = attempted(encoded(&module, PLUGIN_WIT, world), call("null")).await;
    assert_eq!(outcome.verdict, Verdict::Ok, "{outcome:?}");
}
