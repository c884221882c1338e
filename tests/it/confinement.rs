//! Attempts to get out of the sandbox, from the inside, and what each gets.
//!
//! The table is also the one in `docs/sandbox.md`, and a test compares the two. The guest in C is `guests/escape.c`,
//! which is compiled here; where no compiler for it is installed its rows are skipped, and the test says so. The guest
//! in Rust is the sample `faults`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tidegate::handler::{KvRead, Outcome};
use tidegate::host::component::embed_manifest;
use tidegate::host::{Host, Options, Plugin, PluginOptions};
use tidegate::{Call, Event, Handler, Payload, Result, Source, Verdict};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME as ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER as ADAPTER,
};
use wit_component::{ComponentEncoder, StringEncoding};

/// What is tried: in words, in which language, with which payload, and what it gets.
struct Row(&'static str, Language, &'static str, &'static str);

#[derive(Clone, Copy, PartialEq)]
enum Language {
    C,
    Rust,
}

use Language::{C, Rust};

/// Rows that get this are given less time than the others.
const TIMEOUT: &str = "verdict `timeout`";

const TABLE: &[(&str, &[Row])] = &[
    (
        "Files",
        &[
            Row("open `/etc/passwd`", C, "open /etc/passwd", "error ENOTCAPABLE"),
            Row("open `etc/passwd`", C, "open etc/passwd", "error ENOTCAPABLE"),
            Row("open `.`", C, "open .", "error ENOTCAPABLE"),
            Row("open `..`", C, "open ..", "error ENOTCAPABLE"),
            Row("open `/`", C, "open /", "error ENOTCAPABLE"),
            Row("open `../../../../etc/passwd`", C, "open ../../../../etc/passwd", "error ENOTCAPABLE"),
            Row("open `/proc/self/environ`", C, "open /proc/self/environ", "error ENOTCAPABLE"),
            Row("open `/dev/stdin`", C, "open /dev/stdin", "error ENOTCAPABLE"),
            Row("create `/tmp/tidegate-escape`", C, "create /tmp/tidegate-escape", "error ENOTCAPABLE"),
            Row("create `tidegate-escape`", C, "create tidegate-escape", "error ENOTCAPABLE"),
            Row("remove `Cargo.toml`", C, "unlink Cargo.toml", "error ENOTCAPABLE"),
            Row("make the folder `/tmp/tidegate-escape`", C, "mkdir /tmp/tidegate-escape", "error ENOTCAPABLE"),
            Row("list `/`", C, "opendir /", "error ENOTCAPABLE"),
            Row("make a symbolic link to `/etc/passwd`", C, "symlink link", "error ENOTCAPABLE"),
            Row("read the symbolic link `/proc/self/exe`", C, "readlink /proc/self/exe", "error ENOTCAPABLE"),
            Row("rename `Cargo.toml`", C, "rename Cargo.toml", "error ENOTCAPABLE"),
            Row("ask about `/`", C, "stat /", "error ENOTCAPABLE"),
            Row("find a folder that was opened for it, in descriptors 0 to 99", C, "preopens", "0 preopened folders"),
            Row("open a path below descriptor 3 without libc", C, "path-open", "error EBADF"),
            Row("write to descriptors 3 to 99", C, "descriptors", "0 of 97 written to, error EBADF"),
            Row("read stdin", C, "stdin", "0 bytes"),
        ],
    ),
    (
        "Surroundings",
        &[
            Row("read the environment variable `PATH`", C, "getenv PATH", "not set"),
            Row("count environment variables", C, "environment", "0 variables"),
            Row("count arguments", C, "arguments", "0 arguments"),
            Row("ask the time", C, "time", "the time"),
            Row("ask the monotonic clock", C, "monotonic", "the time"),
            Row("draw random numbers", C, "random", "random numbers"),
            Row("print to stdout", C, "stdout hello", r#"done; log line "hello" at level 2"#),
            Row("print to stderr", C, "stderr careful", r#"done; log line "careful" at level 3"#),
            Row("sleep for a millisecond", C, "sleep 0", "slept"),
            Row("sleep for an hour", C, "sleep 3600", TIMEOUT),
        ],
    ),
    (
        "Network",
        &[
            Row("make a TCP socket, IPv4", C, "tcp 0", "error access-denied"),
            Row("make a TCP socket, IPv6", C, "tcp 1", "error access-denied"),
            Row("make a UDP socket, IPv4", C, "udp 0", "error access-denied"),
            Row("make a UDP socket, IPv6", C, "udp 1", "error access-denied"),
            Row("look up `localhost`", C, "resolve localhost", "error permanent-resolver-failure"),
            Row("look up `127.0.0.1`", C, "resolve 127.0.0.1", "error permanent-resolver-failure"),
            Row(
                "listen on a socket that it was never given",
                C,
                "forged-handle",
                "verdict `trap`: unknown handle index 4711",
            ),
            Row(
                "accept a connection on descriptor 3",
                C,
                "accept",
                "verdict `trap`: wasm trap: wasm `unreachable` instruction executed",
            ),
        ],
    ),
    (
        "Ending the host",
        &[
            Row("`exit(0)`", C, "exit 0", "verdict `trap`: the guest exited with status 0"),
            Row("`exit(1)`", C, "exit 1", "verdict `trap`: the guest exited with status 1"),
            Row("`abort()`", C, "abort", "verdict `trap`: wasm trap: wasm `unreachable` instruction executed"),
            Row("`raise(SIGKILL)`", C, "raise 9", "verdict `trap`: wasm trap: wasm `unreachable` instruction executed"),
            Row(
                "`raise(SIGSEGV)`",
                C,
                "raise 11",
                "verdict `trap`: wasm trap: wasm `unreachable` instruction executed",
            ),
            Row("a trap instruction", C, "trap", "verdict `trap`: wasm trap: wasm `unreachable` instruction executed"),
            Row("divide by zero", C, "divide", "verdict `trap`: wasm trap: integer divide by zero"),
            Row("convert 1e30 to an integer", C, "convert", "verdict `trap`: wasm trap: integer overflow"),
            Row(
                "read outside of its memory",
                C,
                "read-outside",
                "verdict `trap`: wasm trap: out of bounds memory access",
            ),
            Row(
                "write outside of its memory",
                C,
                "write-outside",
                "verdict `trap`: wasm trap: out of bounds memory access",
            ),
            Row("read address 0", C, "read-null", "its own byte 0"),
            Row(
                "call a function as one of another type",
                C,
                "wrong-function",
                "verdict `trap`: wasm trap: indirect call type mismatch",
            ),
            Row(
                "call a function that does not exist",
                C,
                "no-function",
                "verdict `trap`: wasm trap: undefined element: out of bounds table access",
            ),
            Row("recurse without end", C, "overflow-stack", "verdict `trap`: wasm trap: out of bounds memory access"),
            Row("compute without end", C, "spin", TIMEOUT),
            Row("`malloc` until it fails", C, "allocate", "NULL before 64 MiB"),
            Row("grow its memory to 4 GiB", C, "grow", "-1"),
            Row(
                "a trap instruction",
                Rust,
                r#"{"fault":"trap"}"#,
                "verdict `trap`: wasm trap: wasm `unreachable` instruction executed",
            ),
            Row(
                "panic",
                Rust,
                r#"{"fault":"panic"}"#,
                "verdict `trap`: wasm trap: wasm `unreachable` instruction executed",
            ),
            Row(
                "recurse with large frames",
                Rust,
                r#"{"fault":"stack-overflow"}"#,
                "verdict `trap`: wasm trap: out of bounds memory access",
            ),
            Row(
                "recurse with no frames",
                Rust,
                r#"{"fault":"deep-calls"}"#,
                "verdict `trap`: wasm trap: call stack exhausted",
            ),
            Row("compute without end", Rust, r#"{"fault":"loop"}"#, TIMEOUT),
            Row("call the host without end", Rust, r#"{"fault":"loop-in-host"}"#, "verdict `out-of-fuel`"),
            Row("take all memory", Rust, r#"{"fault":"memory"}"#, "verdict `out-of-memory`"),
        ],
    ),
    (
        "Lying to the host",
        &[
            Row(
                "a string outside of its memory",
                C,
                "key-outside",
                "verdict `trap`: string pointer/length out of bounds of memory",
            ),
            Row(
                "a string of 4 GiB",
                C,
                "length-outside",
                "verdict `trap`: string pointer/length out of bounds of memory",
            ),
            Row(
                "a string that is not UTF-8",
                C,
                "key-not-utf8",
                "verdict `trap`: invalid utf-8 sequence of 1 bytes from index 0",
            ),
            Row(
                "a list of 268 million entries",
                C,
                "list-outside",
                "verdict `trap`: list pointer/length out of bounds of memory",
            ),
            Row(
                "room for an answer outside of its memory",
                C,
                "result-outside",
                "verdict `trap`: pointer out of bounds",
            ),
            Row("room for an answer that is not aligned", C, "result-unaligned", "verdict `trap`: pointer not aligned"),
            Row(
                "memory for an answer outside of its own, when asked for some",
                C,
                "unruly-realloc",
                "verdict `trap`: realloc return: beyond end of memory",
            ),
            Row(
                "a result outside of its memory",
                C,
                "return-outside",
                "verdict `trap`: pointer out of bounds of memory",
            ),
            Row("a result that is not aligned", C, "return-unaligned", "verdict `trap`: return pointer not aligned"),
            Row(
                "a result that is neither success nor failure",
                C,
                "return-no-case",
                "verdict `trap`: invalid expected discriminant",
            ),
            Row(
                "a reply outside of its memory",
                C,
                "return-body-outside",
                "verdict `trap`: list pointer/length out of bounds of memory",
            ),
            Row(
                "a reply whose content type is not UTF-8",
                C,
                "return-not-utf8",
                "verdict `trap`: invalid utf-8 sequence of 1 bytes from index 0",
            ),
        ],
    ),
    (
        "Powers that were not granted",
        &[
            Row("read a bucket that was not granted", C, "kv-get other", "fault `denied`"),
            Row("write a bucket that was not granted", C, "kv-set other", "fault `denied`"),
            Row("read another plugin's bucket by its full name", C, "kv-get kv/faults/faults", "fault `denied`"),
            Row("read the bucket `../faults/faults`", C, "kv-get ../faults/faults", "fault `denied`"),
            Row("read the bucket with no name", C, "kv-get ", "fault `denied`"),
            Row(
                "write the key `/../../x` of its own bucket",
                C,
                "kv-key /../../x",
                "done; `/../../x` in `kv/escape/own`",
            ),
            Row("write a key with a NUL in it", C, "kv-key-nul", "fault `invalid-key`"),
            Row("write a key of 1000 bytes", C, "kv-key-long", "fault `invalid-key`"),
            Row("write the empty key", C, "kv-key ", "fault `invalid-key`"),
            Row("write a value of 9 MiB", C, "kv-value-big", "fault `too-large`"),
            Row("read a setting that it requested", C, "config greeting", "hello"),
            Row("read a setting that it did not request", C, "config secret", "verdict `denied`"),
            Row("publish a type that was not granted", C, "publish shop.orders.create", "fault `denied`"),
            Row("publish the type `own..create`", C, "publish own..create", "fault `invalid-type`"),
            Row("publish the type `own.../../shop`", C, "publish own.../../shop", "fault `invalid-type`"),
            Row("publish the type `own.*`", C, "publish own.*", "fault `invalid-type`"),
            Row("publish with a `source` of its choice", C, "attribute source", "fault `invalid-attribute`"),
            Row("publish with a `caused-by` of its choice", C, "attribute caused-by", "fault `invalid-attribute`"),
            Row("publish with a `user-id` of its choice", C, "attribute user-id", "fault `invalid-attribute`"),
            Row("publish with an `id` of its choice", C, "attribute id", "fault `invalid-attribute`"),
            Row("publish 101 events", C, "publish-many", "fault `too-many`"),
            Row("log a line of 10 MiB at level 255", C, "log-long", "done; a log line that is cut"),
            Row(
                "read a bucket that was not granted",
                Rust,
                r#"{"fault":"kv-get","bucket":"other","key":"k"}"#,
                "fault `denied`",
            ),
            Row(
                "increment in a bucket that was not granted",
                Rust,
                r#"{"fault":"kv-increment","bucket":"other","key":"k","by":1}"#,
                "fault `denied`",
            ),
            Row(
                "delete from a bucket that was not granted",
                Rust,
                r#"{"fault":"kv-delete","bucket":"other","key":"k"}"#,
                "fault `denied`",
            ),
            Row(
                "write a key with a NUL in it",
                Rust,
                r#"{"fault":"kv-set","key":"a\u0000b","value":""}"#,
                "fault `invalid-key`",
            ),
            Row(
                "publish a type that was not granted",
                Rust,
                r#"{"fault":"publish","count":1,"event_type":"shop.orders.create"}"#,
                "fault `denied`",
            ),
            Row("publish 101 events", Rust, r#"{"fault":"publish","count":101}"#, "fault `too-many`"),
            Row("reply with 65 537 bytes", Rust, r#"{"fault":"reply","bytes":65537}"#, "fault `reply-too-large`"),
        ],
    ),
];

/// What a C program may want to call and cannot: nothing of that name is there to be linked.
const ABSENT: &[&str] = &[
    "fork",
    "vfork",
    "execve",
    "system",
    "popen",
    "waitpid",
    "kill",
    "ptrace",
    "socket",
    "connect",
    "bind",
    "listen",
    "getaddrinfo",
    "gethostbyname",
    "dlopen",
    "pthread_create",
    "mmap",
    "setuid",
    "chroot",
    "chown",
    "mount",
];

const ESCAPE: &str = r#"
    name = "escape"
    version = "1.0.0"
    [capabilities]
    kv = ["own"]
    events = ["own.**"]
    config = ["greeting"]
"#;

/// A compiler for C and its linker.
struct Compiler {
    clang: PathBuf,
    linker: PathBuf,
}

impl Compiler {
    /// The one of Debian that `make setup` installs, where all of it is there.
    fn find() -> Option<Self> {
        let parts = [
            "/usr/bin/clang-22",
            "/usr/bin/wasm-ld-22",
            "/usr/lib/wasm32-wasi/libc.a",
            "/usr/lib/llvm-22/lib/clang/22/lib/wasi/libclang_rt.builtins-wasm32.a",
        ];
        let [clang, linker, ..] = parts;
        let is_complete = parts.iter().all(|part| Path::new(part).exists());
        is_complete.then(|| Self { clang: clang.into(), linker: linker.into() })
    }

    /// Compiles and links a C file as a module with the exports that it names.
    fn compile(&self, source: &Path, module: &Path) -> std::process::Output {
        let mut clang = Command::new(&self.clang);
        clang.args(["--target=wasm32-wasi", "-Wno-deprecated", "-Wno-infinite-recursion", "-O1"]);
        clang.args(["-mexec-model=reactor", "-D_WASI_EMULATED_SIGNAL"]);
        clang.arg(format!("-fuse-ld={}", self.linker.display()));
        clang.arg(source).arg("-o").arg(module).arg("-lwasi-emulated-signal").output().unwrap()
    }
}

fn compiler() -> Option<&'static Compiler> {
    static FOUND: OnceLock<Option<Compiler>> = OnceLock::new();
    let found = FOUND.get_or_init(Compiler::find).as_ref();
    if found.is_none() {
        // Past the test harness, which keeps what is printed by tests that pass to itself.
        let words = "SKIPPED: attempts in C, since no compiler for them is here. They run where `make setup` has installed \
                     one: as root on Debian, or after apt-get install clang-22 lld-22 wasi-libc libclang-rt-22-dev-wasm32\n";
        std::io::stderr().write_all(words.as_bytes()).unwrap();
    }
    found
}

/// The guest in C as a component, made of the module that the compiler gives, its interfaces, and the adapter that
/// serves the WASI of its libc by means of WASI 0.2.
fn escape(compiler: &Compiler) -> Vec<u8> {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("escape.wasm");
    let compiled = compiler.compile(&guests.join("escape.c"), &path);
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let mut module = std::fs::read(path).unwrap();
    let mut resolve = wit_parser::Resolve::default();
    resolve.push_source("plugin.wit", include_str!("../../wit/plugin.wit")).unwrap();
    let package = resolve.push_source("escape.wit", include_str!("../guests/escape.wit")).unwrap();
    let world = resolve.select_world(&[package], Some("escape")).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    let encoder = ComponentEncoder::default().validate(true).module(&module).unwrap();
    let component = encoder.adapter(ADAPTER_NAME, ADAPTER).unwrap().encode().unwrap();
    embed_manifest(&component, ESCAPE).unwrap()
}

struct NoValues;

#[async_trait]
impl KvRead for NoValues {
    async fn get(&self, bucket: &str, _: &str) -> Result<Option<Bytes>> {
        assert!(["kv/escape/own", "kv/faults/faults"].contains(&bucket), "{bucket}");
        Ok(None)
    }
}

fn call(payload: &str) -> Call {
    let payload = match payload.starts_with('{') {
        true => Payload::json_text(payload.to_owned()).unwrap(),
        false => Payload::new("text/plain", payload.as_bytes().to_vec()).unwrap(),
    };
    Call {
        event: Arc::new(Event::new(Source::System, "escape.tests.create".parse().unwrap(), payload)),
        subscription: "tests".into(),
        attempt: 1,
        max_attempts: 4,
        timeout: Duration::from_secs(30),
        is_replay: false,
        kv: Arc::new(NoValues),
    }
}

const ESCAPE_OPTIONS: &str = r#"
    grants = { kv = ["own"], events = ["own.**"], config = ["greeting"] }
    config = { greeting = "hello", secret = "not for it" }
"#;

const FAULTS_OPTIONS: &str = r#"
    grants = { kv = ["faults"], events = ["faulty.**"], config = ["greeting", "self-check"] }
"#;

fn host() -> Host {
    let mut options = Options::default();
    for (name, own) in [("escape", ESCAPE_OPTIONS), ("faults", FAULTS_OPTIONS)] {
        options.plugins.insert(name.to_owned(), toml::from_str::<PluginOptions>(own).unwrap());
    }
    Host::new(options, None).unwrap()
}

/// The guests by their language: the one in C only where it can be compiled.
async fn guests(host: &Host) -> Vec<(Language, Plugin)> {
    let mut guests = vec![(Rust, host.load("faults.wasm", super::support::guests::faults("").into()).await.unwrap())];
    if let Some(compiler) = compiler() {
        guests.push((C, host.load("escape.wasm", escape(compiler).into()).await.unwrap()));
    }
    guests
}

/// What an attempt got, in a line.
fn got(outcome: &Outcome) -> String {
    let fault = outcome.fault.as_ref();
    let words = match outcome.verdict {
        Verdict::Ok => {
            outcome.reply.as_ref().map_or_else(String::new, |r| String::from_utf8_lossy(&r.body).into_owned())
        }
        Verdict::Reject => format!("fault `{}`", fault.map_or("", |fault| &fault.code)),
        Verdict::Trap => format!("verdict `trap`: {}", fault.map_or("", |fault| &fault.message)),
        verdict => format!("verdict `{}`", verdict.as_str()),
    };
    let log =
        outcome.trace.log.iter().filter(|_| outcome.verdict == Verdict::Ok).map(|line| match line.message.len() {
            0..100 => format!("log line \"{}\" at level {}", line.message, line.level),
            _ => "a log line that is cut".to_owned(),
        });
    let writes = outcome.effects.writes.iter().map(|write| format!("`{}` in `{}`", write.key, write.bucket));
    [words].into_iter().chain(log).chain(writes).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Invariants 6 and 10, from the inside.
#[tokio::test]
async fn no_attempt_to_get_out_of_the_sandbox_succeeds() {
    let host = host();
    let guests = guests(&host).await;
    let mut wrong = Vec::new();
    for Row(words, language, payload, expected) in TABLE.iter().flat_map(|(_, rows)| *rows) {
        let Some((_, guest)) = guests.iter().find(|(known, _)| known == language) else { continue };
        let short = Duration::from_millis(300);
        let timeout = if *expected == TIMEOUT { short } else { Duration::from_secs(30) };
        let outcome = guest.handle(Call { timeout, ..call(payload) }).await;
        if got(&outcome) != *expected {
            wrong.push(format!("{words}: {payload} => {}", got(&outcome)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (_, guest) in &guests {
        let after = guest.handle(call(r#"{"fault":"none"}"#)).await;
        assert_eq!(after.verdict, Verdict::Ok, "nothing is left of all that: {after:?}");
    }
}

/// A guest that sleeps waits as an async host call does: here it shares its only thread with the other attempt.
#[tokio::test]
async fn a_guest_that_sleeps_holds_no_thread() {
    let guests = guests(&host()).await;
    let Some((_, guest)) = guests.into_iter().find(|(language, _)| *language == C) else { return };
    let guest = Arc::new(guest);
    let sleeping = tokio::spawn({
        let guest = Arc::clone(&guest);
        async move { guest.handle(call("sleep 3600")).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(got(&guest.handle(call("stdin")).await), "0 bytes");
    assert!(!sleeping.is_finished());
    sleeping.abort();
    assert!(sleeping.await.unwrap_err().is_cancelled(), "it ends when it is dropped");
}

#[test]
fn what_would_leave_the_sandbox_does_not_link() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let [source, module] = ["absent.c", "absent.wasm"].map(|name| folder.path().join(name));
    let links = |function: &str| {
        let text = format!(
            "int {function}(void);\n__attribute__((export_name(\"f\"))) int f(void) {{ return {function}(); }}\n"
        );
        std::fs::write(&source, text).unwrap();
        let answer = compiler.compile(&source, &module);
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert!(answer.status.success() || said.contains(&format!("undefined symbol: {function}")), "{said}");
        answer.status.success()
    };
    assert!(links("rand"), "what is there links");
    let there: Vec<_> = ABSENT.iter().filter(|function| links(function)).collect();
    assert!(there.is_empty(), "{there:?}");
}

/// The table as the documentation has it.
fn documented() -> String {
    let mut text = String::new();
    for (area, rows) in TABLE {
        text += &format!("### {area}\n\n| attempt | by a guest in | what it gets |\n|---|---|---|\n");
        for Row(words, language, _, expected) in *rows {
            let language = if *language == C { "C" } else { "Rust" };
            text += &format!("| {words} | {language} | {expected} |\n");
        }
        text += "\n";
    }
    let absent: Vec<_> = ABSENT.iter().map(|function| format!("`{function}`")).collect();
    text + "### What does not link\n\n" + &absent.join(", ") + "\n"
}

#[test]
fn the_documented_attempts_are_these() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/sandbox.md");
    let page = std::fs::read_to_string(page).unwrap();
    let attempts: usize = TABLE.iter().map(|(_, rows)| rows.len()).sum();
    let documented = documented();
    assert!(page.ends_with(&documented), "docs/sandbox.md does not end with\n\n{documented}");
    assert!(page.contains(&format!("{attempts} attempts")), "there are {attempts}");
}
