//! `tidegate plugin build`, `embed` and `inspect`: what can be done with a plugin and no host.
//!
//! None runs a line of the plugin. What talks to a running host lives elsewhere.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bytesize::ByteSize;
use serde::Serialize;

use crate::error::Error;
use crate::host::component::{self, Interface};
use crate::host::guest::{self, Guest, Toolchain};
use crate::host::manifest::Manifest;

/// Arguments of `plugin build`.
#[derive(Debug, Clone, clap::Args)]
pub struct BuildArgs {
    /// The plugin's folder, with its Cargo.toml and plugin.toml
    #[arg(value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Where the component goes: a file, or a folder (with --all, or when it exists or ends in a slash), where it is
    /// called NAME.wasm. Default: plugins/NAME.wasm in cargo's target folder
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Build every package of the workspace that has a plugin.toml
    #[arg(long)]
    pub all: bool,
    /// Print what was built as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `plugin embed`.
#[derive(Debug, Clone, clap::Args)]
pub struct EmbedArgs {
    /// What the other tool made: a component, or a core module that holds the types of its world
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The manifest, which takes the place of any that the component has
    #[arg(short, long, value_name = "FILE", default_value = guest::MANIFEST_FILE)]
    pub manifest: PathBuf,
    /// Where the plugin goes: a file, or a folder (when it exists or ends in a slash), where it is called NAME.wasm
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
    /// Print what was made as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `plugin inspect`.
#[derive(Debug, Clone, clap::Args)]
pub struct InspectArgs {
    /// The component; with --url the name of a plugin
    #[arg(value_name = "FILE|NAME")]
    pub file: PathBuf,
    /// Ask this server for its plugin
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// The token, where the server asks for one
    #[arg(long, env = "TIDEGATE_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Print it as JSON
    #[arg(long)]
    pub json: bool,
}

/// What a component says about itself without being run.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// All that its manifest says.
    #[serde(flatten)]
    pub manifest: Manifest,
    /// Its content address.
    pub digest: String,
    /// Its size in bytes.
    pub size: usize,
    /// What it imports and exports.
    #[serde(flatten)]
    pub interface: Interface,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    version: String,
    digest: String,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<&'a str>,
    file: PathBuf,
}

/// Builds one plugin, or all of a workspace, and says where the components are.
///
/// # Errors
/// When there is no toolchain, the folder is no plugin, cargo fails or the result cannot be written.
pub fn build(args: &BuildArgs, out: &mut dyn Write) -> Result<()> {
    let guests = if args.all { Guest::find_all(&args.dir)? } else { vec![Guest::find(&args.dir)?] };
    let toolchain = Toolchain::find(&args.dir)?;
    for built in guest::build(&args.dir, &guests, &toolchain)? {
        let manifest = &built.guest.manifest;
        let file =
            args.output.as_deref().map_or_else(|| built.guest.default_output(), |to| output(to, args.all, manifest));
        deliver(file, manifest, &built.component, Some(toolchain.target()), args.json, out)?;
    }
    Ok(())
}

/// Makes a plugin of a component that another tool built, by embedding its manifest, and says where it is.
///
/// # Errors
/// When a file cannot be read or written, the manifest is not valid, or the component is no plugin.
pub fn embed(args: &EmbedArgs, out: &mut dyn Write) -> Result<()> {
    let shown = args.file.display().to_string();
    let text = String::from_utf8(read(&args.manifest)?).with_context(|| args.manifest.display().to_string())?;
    let manifest = Manifest::parse(&text).with_context(|| args.manifest.display().to_string())?;
    let plugin = component::componentise(&read(&args.file)?);
    let plugin = plugin.and_then(|component| component::embed_manifest(&component, &text)).context(shown)?;
    deliver(output(&args.output, false, &manifest), &manifest, &plugin, None, args.json, out)
}

/// Writes a plugin to its file and says so.
fn deliver(
    file: PathBuf,
    manifest: &Manifest,
    plugin: &[u8],
    target: Option<&str>,
    json: bool,
    out: &mut dyn Write,
) -> Result<()> {
    write_whole(&file, plugin)?;
    let line = Line {
        name: &manifest.name,
        version: manifest.version.to_string(),
        digest: component::digest(plugin),
        size: plugin.len(),
        target,
        file,
    };
    match json {
        true => writeln!(out, "{}", serde_json::to_string(&line)?)?,
        false => writeln!(out, "{} {} {} {}", line.name, line.version, human(line.size), line.file.display())?,
    }
    Ok(())
}

/// The file that a plugin goes to when it is told to go to `path`.
fn output(path: &Path, is_folder: bool, manifest: &Manifest) -> PathBuf {
    let is_folder = is_folder || path.is_dir() || path.as_os_str().to_string_lossy().ends_with('/');
    if is_folder { path.join(format!("{}.wasm", manifest.name)) } else { path.to_owned() }
}

/// Writes beside the file and renames, so that whoever watches the folder never sees half a component.
fn write_whole(file: &Path, bytes: &[u8]) -> Result<()> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create folder {}", dir.display()))?;
    let write = || {
        let mut whole = tempfile::Builder::new().prefix(".building-").tempfile_in(dir)?;
        whole.write_all(bytes)?;
        open_to_readers(whole.as_file())?;
        whole.persist(file).map_err(|refused| refused.error)
    };
    write().map(drop).with_context(|| format!("cannot write {}", file.display()))
}

/// A temporary file is for its owner alone; a component is an ordinary file.
#[cfg(unix)]
fn open_to_readers(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn open_to_readers(_file: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

/// Prints what a component says about itself.
///
/// # Errors
/// When the file cannot be read or is no component with a manifest.
pub fn inspect(args: &InspectArgs, out: &mut dyn Write) -> Result<()> {
    let inspection = examine(&read(&args.file)?).with_context(|| format!("plugin {}", args.file.display()))?;
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&inspection)?)?,
        false => show(&inspection, out)?,
    }
    Ok(())
}

fn read(file: &Path) -> Result<Vec<u8>> {
    match std::fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::not_found("file", file.display().to_string()).into())
        }
        read => read.with_context(|| format!("cannot read {}", file.display())),
    }
}

/// Reads everything about a component that can be read without running it.
///
/// # Errors
/// [`component::ComponentError`] when it is none or has no valid manifest.
pub fn examine(bytes: &[u8]) -> Result<Inspection, component::ComponentError> {
    let (manifest, _) = component::manifest(bytes)?;
    let interface = component::interface(bytes)?;
    Ok(Inspection { manifest, digest: component::digest(bytes), size: bytes.len(), interface })
}

pub(super) fn show(plugin: &Inspection, out: &mut dyn Write) -> std::io::Result<()> {
    let manifest = &plugin.manifest;
    writeln!(out, "name           {}", manifest.name)?;
    writeln!(out, "version        {}", manifest.version)?;
    if !manifest.description.is_empty() {
        writeln!(out, "description    {}", manifest.description)?;
    }
    writeln!(out, "digest         {}", plugin.digest)?;
    writeln!(out, "size           {} ({} bytes)", human(plugin.size), plugin.size)?;
    let subscriptions = manifest.subscriptions();
    list(out, "subscribes to", subscriptions.iter().map(|one| format!("{} as {}", one.pattern, one.name)))?;
    let wants = &manifest.capabilities;
    let requests = wants.kv.iter().map(|bucket| format!("kv {bucket}"));
    let requests = requests.chain(wants.events.iter().map(|pattern| format!("events {pattern}")));
    let requests = requests.chain(wants.config.iter().map(|key| format!("config {key}")));
    list(out, "requests", requests.chain(wants.http.iter().map(|origin| format!("http {origin}"))))?;
    list(out, "imports", plugin.interface.imports.iter())?;
    list(out, "exports", plugin.interface.exports.iter())
}

/// A label beside the first entry and nothing beside the others.
fn list(
    out: &mut dyn Write,
    label: &str,
    entries: impl Iterator<Item = impl std::fmt::Display>,
) -> std::io::Result<()> {
    let mut label = label;
    for entry in entries {
        writeln!(out, "{label:<15}{entry}")?;
        label = "";
    }
    if !label.is_empty() {
        writeln!(out, "{label:<15}none")?;
    }
    Ok(())
}

fn human(bytes: usize) -> ByteSize {
    ByteSize::b(u64::try_from(bytes).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = r#"
        name = "sample"
        version = "1.0.0"
        [[subscribe]]
        pattern = "shop.orders.*"
        [capabilities]
        kv = ["totals"]
    "#;

    fn plugin_file(manifest: Option<&str>) -> tempfile::NamedTempFile {
        let text = r#"(component (import "tidegate:plugin/log@1.0.0" (instance)) (instance $handler)
            (export "tidegate:plugin/handler@1.0.0" (instance $handler)))"#;
        let mut bytes = wat::parse_str(text).unwrap();
        if let Some(manifest) = manifest {
            bytes = component::embed_manifest(&bytes, manifest).unwrap();
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn inspected(file: &Path, json: bool) -> Result<String> {
        let mut out = Vec::new();
        inspect(&InspectArgs { file: file.to_owned(), url: None, token: None, json }, &mut out)?;
        Ok(String::from_utf8(out)?)
    }

    #[test]
    fn a_plugin_is_shown_for_people_and_for_programs() {
        let file = plugin_file(Some(MANIFEST));
        let text = inspected(file.path(), false).unwrap();
        for line in [
            "name           sample",
            "subscribes to  shop.orders.* as sample",
            "requests       kv totals",
            "imports        tidegate:plugin/log@1.0.0",
            "exports        tidegate:plugin/handler@1.0.0",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
        let json: serde_json::Value = serde_json::from_str(&inspected(file.path(), true).unwrap()).unwrap();
        assert_eq!(json["name"], "sample");
        assert_eq!(json["capabilities"]["kv"][0], "totals");
        assert_eq!(json["imports"][0], "tidegate:plugin/log@1.0.0");
        assert!(json["digest"].as_str().unwrap().starts_with("sha256:"));
    }

    #[test]
    fn a_plugin_without_a_manifest_is_refused() {
        let file = plugin_file(None);
        let error = format!("{:#}", inspected(file.path(), false).unwrap_err());
        assert!(error.contains("has no manifest") && error.contains("tidegate plugin build"), "{error}");
    }

    /// Embeds `manifest` in `component`, both written to a folder first where they are given.
    fn embedded(component: Option<&[u8]>, manifest: Option<&[u8]>) -> Result<(String, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, bytes) in [("made.wasm", component), ("plugin.toml", manifest)] {
            bytes.into_iter().for_each(|bytes| std::fs::write(at(name), bytes).unwrap());
        }
        let args =
            EmbedArgs { file: at("made.wasm"), manifest: at("plugin.toml"), output: at("handlers/"), json: true };
        let mut out = Vec::new();
        let result = embed(&args, &mut out);
        assert_eq!(at("handlers").exists(), result.is_ok(), "a refusal leaves nothing behind");
        result?;
        let line: serde_json::Value = serde_json::from_slice(&out)?;
        Ok((line["digest"].as_str().unwrap().to_owned(), std::fs::read(line["file"].as_str().unwrap())?))
    }

    #[test]
    fn a_component_of_another_tool_becomes_a_plugin_and_a_manifest_that_it_has_is_replaced() {
        for before in [None, Some("name = \"older\"\nversion = \"0.9.0\"\n")] {
            let component = std::fs::read(plugin_file(before).path()).unwrap();
            let (digest, plugin) = embedded(Some(&component), Some(MANIFEST.as_bytes())).unwrap();
            let inspection = examine(&plugin).unwrap();
            assert_eq!((inspection.manifest.name.as_str(), inspection.digest), ("sample", digest));
            assert_eq!(inspection.interface, component::interface(&component).unwrap());
        }
    }

    #[test]
    fn what_cannot_be_embedded_is_refused_by_its_file_and_reason() {
        let good = std::fs::read(plugin_file(None).path()).unwrap();
        let [empty_component, core] = ["(component)", "(module)"].map(|text| wat::parse_str(text).unwrap());
        let manifest = MANIFEST.as_bytes();
        for (component, manifest, file, reason) in [
            (None, Some(manifest), "made.wasm", "not found"),
            (Some(b"export const handler = {}".as_slice()), Some(manifest), "made.wasm", "is not WebAssembly"),
            (Some(good.get(..good.len() - 3).unwrap()), Some(manifest), "made.wasm", "is damaged"),
            (Some(&empty_component), Some(manifest), "made.wasm", "does not export the interface"),
            (Some(&core), Some(manifest), "made.wasm", "does not export the interface"),
            (Some(&good), None, "plugin.toml", "not found"),
            (Some(&good), Some(b"name = \"sample\"\n"), "plugin.toml", "missing field `version`"),
            (Some(&good), Some(b"\xff"), "plugin.toml", "utf-8"),
        ] {
            let error = format!("{:#}", embedded(component, manifest).unwrap_err());
            assert!(error.contains(file) && error.contains(reason), "{file} {reason}: {error}");
        }
    }

    #[test]
    fn a_component_is_written_whole_and_readable() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("deep/er/x.wasm");
        write_whole(&file, b"first").unwrap();
        write_whole(&file, b"second").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }
}
