//! Components as bytes: made from core modules, given their manifest, read without being run.
//!
//! Pure functions; no engine, no disk and no compiler. Whether a component links is for the engine to say.

use std::fmt::Write as _;

use serde::Serialize;
use sha2::{Digest, Sha256};
use wasm_encoder::{ComponentSection, CustomSection};
use wasmparser::{Parser, Payload};
use wit_component::ComponentEncoder;

use super::manifest::{Manifest, ManifestError};

/// The custom section that holds the text of `plugin.toml`.
pub const MANIFEST_SECTION: &str = "tidegate:manifest";

/// The export that makes a component a plugin. Everything after the `@` is compatible within the major version.
pub const HANDLER_EXPORT: &str = "tidegate:plugin/handler@1.";

/// Why bytes are not a usable plugin.
#[derive(Debug, thiserror::Error)]
pub enum ComponentError {
    /// Something else, such as a source file.
    #[error("is not WebAssembly: it does not begin with the bytes 00 61 73 6d")]
    NotWasm,
    /// WebAssembly that is cut short or damaged.
    #[error("is damaged: build or copy it again")]
    Damaged(#[from] wasmparser::BinaryReaderError),
    /// A core module where a component is needed.
    #[error("is a core module and not a component: build it with `tidegate plugin build`")]
    CoreModule,
    /// The module cannot become a component.
    #[error("cannot be made a component: {0:#}")]
    Encode(anyhow::Error),
    /// Something else than a plugin.
    #[error(
        "does not export the interface tidegate:plugin/handler 1.x, so it is no plugin: \
         use tidegate_plugin::plugin! in it, or generate bindings for the world tidegate:plugin/plugin"
    )]
    NoHandler,
    /// A plugin of nobody.
    #[error(
        "has no manifest (custom section {MANIFEST_SECTION}): build it with `tidegate plugin build`, \
         or add its plugin.toml with `tidegate plugin embed`"
    )]
    NoManifest,
    /// A manifest that is not text.
    #[error("has a manifest that is damaged at byte {0}: build it again with `tidegate plugin build`")]
    ManifestNotText(usize),
    /// A manifest that breaks a rule.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// The top level of a component.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// The names of its imports, in order, such as `tidegate:plugin/log@1.0.0`.
    pub imports: Vec<String>,
    /// The names of its exports, in order.
    pub exports: Vec<String>,
}

impl Interface {
    /// Whether it is a plugin at all.
    #[must_use]
    pub fn is_plugin(&self) -> bool {
        self.exports.iter().any(|name| name.starts_with(HANDLER_EXPORT))
    }
}

/// The content address of a component: `sha256:` and 64 hex digits.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Makes a component of what a compiler produced: a core module is encoded, a component is taken as it is.
///
/// # Errors
/// [`ComponentError`] when the bytes are broken or the result is no plugin.
pub fn componentise(compiled: &[u8]) -> Result<Vec<u8>, ComponentError> {
    let component = match Parser::is_core_wasm(compiled) {
        true => encode(compiled).map_err(ComponentError::Encode)?,
        false => compiled.to_vec(),
    };
    match interface(&component)?.is_plugin() {
        true => Ok(component),
        false => Err(ComponentError::NoHandler),
    }
}

fn encode(module: &[u8]) -> anyhow::Result<Vec<u8>> {
    ComponentEncoder::default().validate(true).module(module)?.encode()
}

/// The component with this manifest text in place of any that it had. The text must be valid.
///
/// # Errors
/// [`ComponentError`] when the text or the component is not valid.
pub fn embed_manifest(component: &[u8], text: &str) -> Result<Vec<u8>, ComponentError> {
    Manifest::parse(text)?;
    let mut bytes = Vec::with_capacity(component.len().saturating_add(text.len()).saturating_add(64));
    let mut kept = 0;
    for section in manifest_sections(component)? {
        bytes.extend_from_slice(component.get(kept..section.start).unwrap_or_default());
        kept = section.end;
    }
    bytes.extend_from_slice(component.get(kept..).unwrap_or_default());
    CustomSection { name: MANIFEST_SECTION.into(), data: text.as_bytes().into() }.append_to_component(&mut bytes);
    Ok(bytes)
}

/// The manifest of a component, and its text.
///
/// # Errors
/// [`ComponentError`] when there is none, or it or the component is not valid.
pub fn manifest(component: &[u8]) -> Result<(Manifest, String), ComponentError> {
    let mut found = None;
    top_level(component, |payload| {
        if let Payload::CustomSection(section) = payload
            && section.name() == MANIFEST_SECTION
        {
            found = Some((section.data_offset(), section.data()));
        }
        Ok(())
    })?;
    let (offset, data) = found.ok_or(ComponentError::NoManifest)?;
    let text = std::str::from_utf8(data)
        .map_err(|error| ComponentError::ManifestNotText(offset.saturating_add(error.valid_up_to())))?;
    Ok((Manifest::parse(text)?, text.to_owned()))
}

/// What a component imports and exports.
///
/// # Errors
/// [`ComponentError`] when it is none.
pub fn interface(component: &[u8]) -> Result<Interface, ComponentError> {
    let mut interface = Interface::default();
    top_level(component, |payload| {
        match payload {
            Payload::ComponentImportSection(section) => {
                for import in section.clone() {
                    interface.imports.push(import?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section.clone() {
                    interface.exports.push(export?.name.name.to_owned());
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(interface)
}

/// Where the manifest's sections begin, with their headers, and end.
fn manifest_sections(component: &[u8]) -> Result<Vec<std::ops::Range<usize>>, ComponentError> {
    let mut sections = Vec::new();
    let mut end = 0;
    top_level(component, |payload| {
        if let Payload::CustomSection(section) = payload
            && section.name() == MANIFEST_SECTION
        {
            sections.push(end..section.range().end);
        }
        // A nested module or component has its end after its header, which is where its own payloads begin.
        end = match payload {
            Payload::Version { range, .. } => range.end,
            Payload::ModuleSection { unchecked_range, .. } | Payload::ComponentSection { unchecked_range, .. } => {
                unchecked_range.end
            }
            other => other.as_section().map_or(end, |(_, range)| range.end),
        };
        Ok(())
    })?;
    Ok(sections)
}

/// Shows the payloads of the component itself, and not those of what is nested in it.
fn top_level<'a>(
    component: &'a [u8],
    mut see: impl FnMut(&Payload<'a>) -> Result<(), wasmparser::BinaryReaderError>,
) -> Result<(), ComponentError> {
    if !component.starts_with(b"\0asm") {
        return Err(ComponentError::NotWasm);
    }
    if Parser::is_core_wasm(component) {
        return Err(ComponentError::CoreModule);
    }
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(component) {
        let payload = payload?;
        match &payload {
            Payload::End(_) => depth = depth.saturating_sub(1),
            payload if depth == 0 => see(payload)?,
            _ => {}
        }
        if matches!(payload, Payload::ModuleSection { .. } | Payload::ComponentSection { .. }) {
            depth = depth.saturating_add(1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "name = \"sample\"\nversion = \"1.0.0\"\n";

    fn component() -> Vec<u8> {
        let text = r#"(component
            (import "tidegate:plugin/log@1.0.0" (instance))
            (core module (import "a" "b" (func)) (@custom "tidegate:manifest" "not this one"))
            (component (import "nested" (func)))
            (instance $handler)
            (export "tidegate:plugin/handler@1.0.0" (instance $handler)))"#;
        wat::parse_str(text).unwrap()
    }

    /// A guest as version 1.0.0 of the SDK and interface compiled it: it logs, replies with the event's id, and no more.
    const GUEST_1_0: &[u8] = include_bytes!("../../tests/fixtures/guest-1.0.core.wasm");

    #[test]
    fn a_guest_compiled_for_the_first_interface_becomes_a_plugin_that_imports_only_what_it_uses() {
        let component = componentise(GUEST_1_0).unwrap();
        let interface = interface(&component).unwrap();
        assert_eq!(interface.imports, ["tidegate:plugin/types@1.0.0", "tidegate:plugin/log@1.0.0"]);
        assert_eq!(interface.exports, ["tidegate:plugin/handler@1.0.0"]);
        assert_eq!(componentise(&component).unwrap(), component);
    }

    #[test]
    fn only_the_top_level_is_the_interface() {
        let interface = interface(&component()).unwrap();
        assert_eq!(interface.imports, ["tidegate:plugin/log@1.0.0"]);
        assert_eq!(interface.exports, ["tidegate:plugin/handler@1.0.0"]);
        assert!(interface.is_plugin());
    }

    #[test]
    fn a_manifest_is_read_back_as_it_was_embedded() {
        assert!(matches!(manifest(&component()), Err(ComponentError::NoManifest)));
        let plugin = embed_manifest(&component(), MANIFEST).unwrap();
        let (manifest, text) = manifest(&plugin).unwrap();
        assert_eq!((manifest.name.as_str(), text.as_str()), ("sample", MANIFEST));
        assert_eq!(interface(&plugin).unwrap(), interface(&component()).unwrap());
    }

    #[test]
    fn a_second_manifest_replaces_the_first() {
        let once = embed_manifest(&component(), MANIFEST).unwrap();
        let other = "name = \"other\"\nversion = \"2.0.0\"\n";
        let twice = embed_manifest(&once, other).unwrap();
        assert_eq!(twice, embed_manifest(&component(), other).unwrap());
        assert_eq!(manifest(&twice).unwrap().0.name, "other");
    }

    #[test]
    fn a_manifest_that_is_not_valid_is_not_embedded() {
        let error = embed_manifest(&component(), "name = \"sample\"\n").unwrap_err();
        assert!(error.to_string().contains("missing field `version`"), "{error}");
    }

    #[test]
    fn a_core_module_of_another_world_is_no_plugin() {
        let module = wat::parse_str("(module (memory (export \"memory\") 1))").unwrap();
        assert!(matches!(componentise(&module), Err(ComponentError::NoHandler)));
        assert!(matches!(interface(&module), Err(ComponentError::CoreModule)));
        let module = wat::parse_str("(module (import \"env\" \"now\" (func)))").unwrap();
        let error = componentise(&module).unwrap_err().to_string();
        assert!(error.contains("env") && error.contains("now"), "{error}");
    }

    #[test]
    fn bytes_that_are_no_wasm_are_refused() {
        for bytes in [&b""[..], b"hello"] {
            assert!(matches!(interface(bytes), Err(ComponentError::NotWasm)), "{bytes:?}");
        }
        let whole = embed_manifest(&component(), MANIFEST).unwrap();
        for bytes in [&b"\0asm"[..], b"\0asm\x0d\0\x01\0\xff\xff", whole.get(..whole.len() - 3).unwrap()] {
            assert!(matches!(manifest(bytes), Err(ComponentError::Damaged(_))), "{bytes:?}");
        }
    }

    #[test]
    fn a_digest_is_the_sha_256_of_the_bytes() {
        assert_eq!(digest(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
