//! From bytes to something that can be called: verify, compare requests with grants, compile, link, let it check
//! itself.
//!
//! Each step that fails says in its own words what is wrong and what to do; what the engine says stands after it.

use std::num::NonZeroU32;
use std::sync::Arc;

use bytes::Bytes;
use bytesize::ByteSize;
use wasmtime::component::Component;

use super::bindings::{HANDLER, PACKAGE, VERSION};
use super::component::{ComponentError, Interface, interface, manifest};
use super::engine::{Engine, Needs};
use super::exports::Exports;
use super::grants::{check_exports, decide, max_batch, parts, served};
use super::imports::{Terms, link};
use super::instance::{Linked, Prepared, Unstarted};
use super::limits::{Limits, bytes as in_bytes};
use super::manifest::Manifest;
use super::options::{Options, PluginOptions};

/// A component that can be called.
pub(super) struct Loaded {
    pub(super) manifest: Manifest,
    pub(super) interface: Interface,
    pub(super) prepared: Prepared,
}

/// Why a component cannot be called.
#[derive(Debug)]
pub(super) struct Refused {
    /// Its name, if it was known by then.
    pub(super) plugin: Option<String>,
    /// What is wrong and what to do.
    pub(super) reason: String,
}

/// Verifies, compiles and links a component with this digest, and lets it check itself.
///
/// # Errors
/// [`Refused`].
pub(super) async fn load(
    engine: &Arc<Engine>,
    options: &Options,
    digest: Arc<str>,
    bytes: Bytes,
) -> Result<Loaded, Refused> {
    let (manifest, interface) = verify(&bytes).map_err(|reason| Refused { plugin: None, reason })?;
    let refuse = |reason: String| Refused { plugin: Some(manifest.name.clone()), reason };
    let ungranted = PluginOptions::default();
    let own = options.plugins.get(&manifest.name).unwrap_or(&ungranted);
    let powers = decide(&manifest, &interface, own).map_err(refuse)?;
    let max_batch = max_batch(&manifest, &interface, own).map_err(refuse)?;
    let limits = options.limits_of(&manifest.name).tightened(&manifest.limits);
    let needs = Needs { fuel: limits.fuel.is_some(), tasks: powers.wasi_3 };
    let compiled = engine.compile(&digest, bytes, needs).await;
    let component = compiled.map_err(|error| refuse(format!("cannot be compiled: {error:#}")))?;
    check_memory(&component, &limits).map_err(refuse)?;
    let linked = link(&component, &powers)
        .and_then(|pre| Ok(Linked { exports: Exports::find(&pre, &interface)?, pre }))
        .map_err(|error| refuse(unfit(&interface, &error)))?;
    let reuse = manifest.reuse.map_or(1, NonZeroU32::get).min(own.reuse.map_or(u32::MAX, NonZeroU32::get));
    let (name, max_payload) = (manifest.name.as_str().into(), options.max_payload);
    let terms = Terms { name, digest, powers, limits, max_payload, max_batch, reuse };
    let prepared = Prepared::new(engine, linked, terms);
    prepared.self_check(engine).await.map_err(|unstarted| match unstarted {
        Unstarted::Failed(words) => refuse(words),
        Unstarted::Unfit(error) => refuse(unfit(&interface, &error)),
    })?;
    Ok(Loaded { manifest, interface, prepared })
}

/// What the bytes say about themselves, without running or compiling anything.
fn verify(bytes: &[u8]) -> Result<(Manifest, Interface), String> {
    check_format(bytes)?;
    let interface = interface(bytes).map_err(|error| damaged(bytes, error))?;
    check_exports(&interface.exports)?;
    let (manifest, _) = manifest(bytes).map_err(|error| damaged(bytes, error))?;
    Ok((manifest, interface))
}

/// The first eight bytes of WebAssembly: the magic number, a version, and what layer it is.
const COMPONENT: [u8; 8] = *b"\0asm\x0d\0\x01\0";
const MODULE: [u8; 8] = *b"\0asm\x01\0\0\0";

fn check_format(bytes: &[u8]) -> Result<(), String> {
    let begins = bytes.get(..COMPONENT.len().min(bytes.len())).unwrap_or_default();
    if begins == COMPONENT {
        return Ok(());
    }
    Err(if bytes.is_empty() {
        "is empty: build or copy it again".to_owned()
    } else if is_text(bytes) {
        "is WebAssembly in its text form: give the component that is made of it".to_owned()
    } else if begins == MODULE {
        "is a core module and not a component: build it with `tidegate plugin build`".to_owned()
    } else if COMPONENT.starts_with(begins) || MODULE.starts_with(begins) {
        format!("is cut short: it has {} bytes", bytes.len())
    } else if begins.starts_with(b"\x7fELF") {
        "is compiled code, which is never loaded from outside: give the component that it was made from".to_owned()
    } else if begins.starts_with(b"\0asm") {
        "is WebAssembly of a version that this host does not know".to_owned()
    } else {
        format!("is not WebAssembly: it begins with \"{}\"", begins.escape_ascii())
    })
}

/// Whether it begins like a `.wat` file.
fn is_text(bytes: &[u8]) -> bool {
    let text = bytes.trim_ascii_start();
    [&b"(component"[..], b"(module", b";;", b"(;"].into_iter().any(|start| text.starts_with(start))
}

fn damaged(bytes: &[u8], error: ComponentError) -> String {
    match error {
        // wasmparser asks for more bytes exactly where they end too soon.
        ComponentError::Damaged(error) if error.message().contains("unexpected end") => {
            format!("is cut short: a section goes on after its last byte, {}", bytes.len())
        }
        ComponentError::Damaged(error) => format!("is damaged at byte {}: {}", error.offset(), error.message()),
        other => other.to_string(),
    }
}

fn check_memory(component: &Component, limits: &Limits) -> Result<(), String> {
    const PAGE: u64 = 64 << 10;
    let pages = component.resources_required().and_then(|needed| needed.max_initial_memory_size).unwrap_or(0);
    let needed = ByteSize(pages.saturating_mul(PAGE));
    match usize::try_from(needed.as_u64()) {
        Ok(needed) if needed <= in_bytes(limits.memory) => Ok(()),
        _ => Err(format!(
            "begins with {needed} of memory, more than its limit of {}: raise limits.memory",
            limits.memory
        )),
    }
}

/// What a linker means when it says "wrong type": words about the plugin, what it needs, and what is served.
fn unfit(interface: &Interface, error: &wasmtime::Error) -> String {
    let words = format!("{error:#}");
    let all = interface.imports.iter().chain(&interface.exports).map(String::as_str);
    let named = all
        .clone()
        .find(|name| words.contains(name))
        .or_else(|| all.clone().find(|name| name.split('@').next().is_some_and(|name| words.starts_with(name))))
        .or_else(|| all.clone().find(|name| is_handler(name)));
    let named = named.unwrap_or(HANDLER);
    if let Some((_, rest)) = words.split_once("does not have export `") {
        let missing = rest.split('`').next().unwrap_or_default();
        return format!(
            "exports {named} without its function {missing}: build it again with the plugin.wit of {VERSION}"
        );
    }
    let (_, _, needs) = parts(named);
    let serves = served(named).unwrap_or(VERSION);
    let what = item(&words).map_or_else(|| named.to_owned(), |item| format!("{item} of {named}"));
    let advice = match is_newer(needs, serves) {
        true => format!("run it on a newer tidegate, or build it for {serves}"),
        false if named.starts_with(PACKAGE) => format!("build it again with the plugin.wit of {serves}"),
        false => "build it again with the interfaces of that version".to_owned(),
    };
    let fault = match words.contains("implementation is missing") {
        true => "does not exist",
        false => "has another shape",
    };
    format!(
        "uses {what}, which {fault} in the version that this host serves, {serves}: {advice} (the engine says: {words})"
    )
}

fn is_handler(name: &str) -> bool {
    name.split('@').next() == Some(HANDLER)
}

/// The function or type that the linker's words are about.
fn item(words: &str) -> Option<&str> {
    let (_, rest) = words.split_once("instance export `")?;
    rest.split('`').next()
}

fn is_newer(needs: &str, serves: &str) -> bool {
    match (semver::Version::parse(needs), semver::Version::parse(serves)) {
        (Ok(needs), Ok(serves)) => needs > serves,
        _ => false,
    }
}
