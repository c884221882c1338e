//! `tidegate plugin build` and `tidegate plugin inspect`: what can be done with a plugin and no host.
//!
//! Neither runs a line of the plugin. What talks to a running host lives elsewhere.

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
    target: &'a str,
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
        let file = output(args, &built.guest);
        write_whole(&file, &built.component)?;
        let line = Line {
            name: &built.guest.manifest.name,
            version: built.guest.manifest.version.to_string(),
            digest: component::digest(&built.component),
            size: built.component.len(),
            target: toolchain.target(),
            file,
        };
        match args.json {
            true => writeln!(out, "{}", serde_json::to_string(&line)?)?,
            false => writeln!(out, "{} {} {} {}", line.name, line.version, human(line.size), line.file.display())?,
        }
    }
    Ok(())
}

/// Where a guest's component goes.
fn output(args: &BuildArgs, guest: &Guest) -> PathBuf {
    let Some(path) = &args.output else { return guest.default_output() };
    let is_folder = args.all || path.is_dir() || path.as_os_str().to_string_lossy().ends_with('/');
    if is_folder { path.join(format!("{}.wasm", guest.manifest.name)) } else { path.clone() }
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
    let shown = || args.file.display().to_string();
    let bytes = match std::fs::read(&args.file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::not_found("file", shown()).into());
        }
        read => read.with_context(|| format!("cannot read {}", shown()))?,
    };
    let inspection = examine(&bytes).with_context(|| format!("plugin {}", args.file.display()))?;
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&inspection)?)?,
        false => show(&inspection, out)?,
    }
    Ok(())
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
