//! Building guests: finds a toolchain, runs cargo in a plugin's folder and makes a component of the result.
//!
//! It never installs anything: where no toolchain is found, it says what to install. Compiler messages go to the
//! terminal as cargo writes them. A guest in another language than Rust is built by its own tools.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde::Deserialize;

use super::component::{componentise, embed_manifest};
use super::manifest::Manifest;
use crate::error::{Error, Result};

/// What turns Rust into WebAssembly here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Toolchain {
    /// The target `wasm32-wasip2` of the cargo on the path.
    Wasip2,
    /// The target `wasm32-unknown-unknown` of the cargo on the path.
    Unknown,
    /// Debian's own Rust, which builds the standard library from its sources.
    Debian {
        /// Debian's linker for WebAssembly, such as `/usr/bin/wasm-ld-22`.
        linker: PathBuf,
    },
}

/// What to do when there is no toolchain.
const INSTALL: &str = "no Rust toolchain for WebAssembly is installed: run `rustup target add wasm32-wasip2`, \
     or on Debian `apt-get install rustc-web cargo-web rust-web-src lld-22`";

impl Toolchain {
    /// The first of these that is there: `wasm32-wasip2`, `wasm32-unknown-unknown`, Debian's packages.
    ///
    /// `dir` is the plugin's folder, because a `rust-toolchain.toml` in it decides which Rust is asked.
    ///
    /// # Errors
    /// [`Error::Plugin`] that says what to install.
    pub fn find(dir: &Path) -> Result<Self> {
        if has_target(dir, "wasm32-wasip2") {
            return Ok(Self::Wasip2);
        }
        if has_target(dir, "wasm32-unknown-unknown") {
            return Ok(Self::Unknown);
        }
        match debian_linker(Path::new("/usr/bin"), Path::new("/usr/lib/rustlib/src/rust/library/std")) {
            Some(linker) => Ok(Self::Debian { linker }),
            None => Err(Error::plugin(dir.display().to_string(), INSTALL)),
        }
    }

    /// The target triple.
    #[must_use]
    pub fn target(&self) -> &'static str {
        match self {
            Self::Wasip2 => "wasm32-wasip2",
            Self::Unknown | Self::Debian { .. } => "wasm32-unknown-unknown",
        }
    }

    /// `cargo build` for this target, in release.
    fn cargo_build(&self) -> Command {
        let mut cargo = match self {
            Self::Wasip2 | Self::Unknown => Command::new("cargo"),
            Self::Debian { linker } => {
                let mut cargo = Command::new("/usr/bin/cargo");
                // Without RUSTC, Debian's cargo takes the first rustc on the path. Building the standard library needs
                // the bootstrap switch on a stable compiler.
                cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                cargo.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
                cargo
            }
        };
        cargo.args(["build", "--release", "--message-format=json-render-diagnostics", "--target", self.target()]);
        if matches!(self, Self::Debian { .. }) {
            cargo.arg("-Zbuild-std=std,panic_abort");
        }
        cargo
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian { .. } => write!(f, "{} with Debian's Rust", self.target()),
            Self::Wasip2 | Self::Unknown => f.write_str(self.target()),
        }
    }
}

/// Whether the Rust on the path has the target's standard library. It names the folder also when that is not there.
fn has_target(dir: &Path, target: &str) -> bool {
    let asked = Command::new("rustc").args(["--print", "target-libdir", "--target", target]).current_dir(dir).output();
    asked.is_ok_and(|answer| {
        let folder = String::from_utf8_lossy(&answer.stdout);
        answer.status.success() && Path::new(folder.trim()).is_dir()
    })
}

/// The newest `wasm-ld-NN` in `bin`, when compiler, cargo and the sources of the standard library are there too.
fn debian_linker(bin: &Path, std_source: &Path) -> Option<PathBuf> {
    let complete = bin.join("rustc").is_file() && bin.join("cargo").is_file() && std_source.is_dir();
    if !complete {
        return None;
    }
    let version = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("wasm-ld-")?.parse::<u32>().ok();
    let files = std::fs::read_dir(bin).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let newest = files.filter_map(|path| Some((version(&path)?, path))).max();
    newest.map(|(_, path)| path)
}

/// A folder with a Rust plugin in it.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The folder.
    pub dir: PathBuf,
    /// What its `plugin.toml` says.
    pub manifest: Manifest,
    manifest_text: String,
    /// The cargo package.
    package: String,
    /// What cargo knows about the packages around it.
    workspace: Arc<Metadata>,
}

/// A guest and the component that was made of it.
#[derive(Debug, Clone)]
pub struct Built {
    /// What was built.
    pub guest: Guest,
    /// The component, with its manifest.
    pub component: Vec<u8>,
}

impl Guest {
    /// The plugin in `dir`.
    ///
    /// # Errors
    /// [`Error::Plugin`] when it is no cargo package, makes no cdylib, or has no valid `plugin.toml`.
    pub fn find(dir: &Path) -> Result<Self> {
        let workspace = Arc::new(metadata(dir)?);
        let file = dir.join("Cargo.toml");
        let file = file.canonicalize().unwrap_or(file);
        match workspace.packages.iter().find(|package| package.manifest_path == file) {
            Some(package) => Self::of(package, &workspace),
            None => Err(Error::plugin(
                dir.display().to_string(),
                "is a cargo workspace and not a package: name a plugin's folder, or build all of them with --all",
            )),
        }
    }

    /// Every package of the workspace in `dir` that has a `plugin.toml`.
    ///
    /// # Errors
    /// [`Error::Plugin`] when there is none, or one of them is not in order.
    pub fn find_all(dir: &Path) -> Result<Vec<Self>> {
        let workspace = Arc::new(metadata(dir)?);
        let guests: Vec<Self> =
            workspace.plugins().map(|package| Self::of(package, &workspace)).collect::<Result<_>>()?;
        if guests.is_empty() {
            return Err(Error::plugin(
                dir.display().to_string(),
                "has no package with a plugin.toml beside its Cargo.toml",
            ));
        }
        Ok(guests)
    }

    fn of(package: &Package, workspace: &Arc<Metadata>) -> Result<Self> {
        let dir = package.dir().to_path_buf();
        let refuse = |reason: String| Error::plugin(dir.display().to_string(), reason);
        if !package.targets.iter().any(|target| target.crate_types.iter().any(|kind| kind == "cdylib")) {
            let reason = "makes no cdylib: add crate-type = [\"cdylib\"] under [lib] in its Cargo.toml";
            return Err(refuse(reason.to_owned()));
        }
        let manifest_text = std::fs::read_to_string(dir.join(MANIFEST_FILE)).map_err(|why| {
            refuse(format!(
                "cannot read {MANIFEST_FILE}: {why}; it names the plugin, as in name = \"{}\"",
                package.name
            ))
        })?;
        let manifest = Manifest::parse(&manifest_text).map_err(|why| refuse(why.to_string()))?;
        Ok(Self { manifest, manifest_text, package: package.name.clone(), workspace: Arc::clone(workspace), dir })
    }

    /// Where the component goes unless told otherwise: `plugins/<name>.wasm` in cargo's output folder, which every
    /// project's `.gitignore` has already.
    #[must_use]
    pub fn default_output(&self) -> PathBuf {
        self.workspace.target_directory.join("plugins").join(format!("{}.wasm", self.manifest.name))
    }
}

/// What a plugin's manifest is called beside its sources.
pub const MANIFEST_FILE: &str = "plugin.toml";

/// Builds these guests of the workspace around `dir` with one run of cargo.
///
/// # Errors
/// [`Error::Plugin`] when cargo fails, whose output has been shown by then, or its result is no plugin.
pub fn build(dir: &Path, guests: &[Guest], toolchain: &Toolchain) -> Result<Vec<Built>> {
    let mut cargo = toolchain.cargo_build();
    for guest in guests {
        cargo.arg("--package").arg(&guest.package);
    }
    if let Some(guest) = guests.first() {
        cargo.arg("--config").arg(remapping(toolchain, &guest.workspace));
    }
    let answer = run(dir, cargo.stderr(Stdio::inherit()), "cargo build")?;
    let artifacts = artifacts(&answer);
    guests.iter().map(|guest| finish(guest, &artifacts)).collect()
}

/// The setting that keeps this machine's folders out of the component: they are nobody's business, and without them
/// the same sources and the same compiler have the same digest everywhere. Cargo adds it to what the project sets, and
/// ignores it when the environment has RUSTFLAGS.
fn remapping(toolchain: &Toolchain, workspace: &Metadata) -> String {
    let folders = workspace.foreign_folders();
    let folders = folders.iter().map(|folder| (folder.as_path(), "/deps"));
    let flags = folders.chain([(workspace.workspace_root.as_path(), "/plugin")]);
    let flags = flags.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()).into()).collect();
    format!("target.{}.rustflags={}", toolchain.target(), toml::Value::Array(flags))
}

fn finish(guest: &Guest, artifacts: &[Artifact]) -> Result<Built> {
    let refuse = |reason: String| Error::plugin(&guest.manifest.name, reason);
    let is_ours = |artifact: &&Artifact| artifact.manifest_path.parent() == Some(guest.dir.as_path());
    let file = artifacts.iter().filter(is_ours).find_map(Artifact::wasm);
    let file = file.ok_or_else(|| refuse(format!("cargo made no .wasm file of package {}", guest.package)))?;
    let compiled = std::fs::read(file).map_err(|why| refuse(format!("cannot read {}: {why}", file.display())))?;
    let component = componentise(&compiled).and_then(|component| embed_manifest(&component, &guest.manifest_text));
    let component = component.map_err(|why| refuse(why.to_string()))?;
    Ok(Built { guest: guest.clone(), component })
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
    workspace_root: PathBuf,
    target_directory: PathBuf,
}

impl Metadata {
    fn plugins(&self) -> impl Iterator<Item = &Package> {
        let members = self.packages.iter().filter(|package| self.workspace_members.contains(&package.id));
        members.filter(|package| package.dir().join(MANIFEST_FILE).is_file())
    }

    /// Where the packages are kept that came from elsewhere.
    fn foreign_folders(&self) -> BTreeSet<PathBuf> {
        let foreign = self.packages.iter().filter(|package| package.source.is_some());
        foreign.filter_map(|package| Some(package.dir().parent()?.to_path_buf())).collect()
    }
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    id: String,
    /// Absent for packages that are on this disk.
    source: Option<String>,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

impl Package {
    fn dir(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }
}

#[derive(Debug, Deserialize)]
struct Target {
    crate_types: Vec<String>,
}

/// A line of cargo's report on a build. Other lines have neither field filled.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Artifact {
    manifest_path: PathBuf,
    filenames: Vec<PathBuf>,
}

impl Artifact {
    fn wasm(&self) -> Option<&Path> {
        self.filenames.iter().map(PathBuf::as_path).find(|file| file.extension().is_some_and(|kind| kind == "wasm"))
    }
}

fn artifacts(report: &[u8]) -> Vec<Artifact> {
    report.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// What cargo knows about the packages around `dir`.
fn metadata(dir: &Path) -> Result<Metadata> {
    let refuse = |reason: String| Error::plugin(dir.display().to_string(), reason);
    if !dir.join("Cargo.toml").is_file() {
        return Err(refuse("is no cargo package: there is no Cargo.toml in it".to_owned()));
    }
    let mut cargo = Command::new(any_cargo());
    cargo.args(["metadata", "--format-version", "1"]);
    let answer = run(dir, &mut cargo, "cargo metadata")?;
    serde_json::from_slice(&answer).map_err(|why| refuse(format!("cannot read what cargo metadata says: {why}")))
}

/// Debian's packages do not put a cargo anywhere else than here, and the path may lack the folder.
fn any_cargo() -> OsString {
    let on_path = Command::new("cargo").arg("--version").output().is_ok_and(|answer| answer.status.success());
    if on_path { "cargo".into() } else { "/usr/bin/cargo".into() }
}

/// Runs a command in `dir` and gives back what it printed.
fn run(dir: &Path, command: &mut Command, name: &str) -> Result<Vec<u8>> {
    let refuse = |reason: String| Error::plugin(dir.display().to_string(), reason);
    let answer = command.current_dir(dir).stdin(Stdio::null()).output();
    let answer = answer.map_err(|why| refuse(format!("cannot run {name}: {why}; {INSTALL}")))?;
    if !answer.status.success() {
        let said = String::from_utf8_lossy(&answer.stderr);
        let said = if said.is_empty() { "what it said is above" } else { said.trim() };
        return Err(refuse(format!("{name} failed with {}; {said}", answer.status)));
    }
    Ok(answer.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = dir.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        dir
    }

    const CARGO: &str = "[package]\nname = \"sample\"\nversion = \"1.0.0\"\nedition = \"2024\"\n[workspace]\n";
    const LIB: &str = "[lib]\ncrate-type = [\"cdylib\"]\n";
    const MANIFEST: &str = "name = \"sample\"\nversion = \"1.0.0\"\n";

    fn refusal(files: &[(&str, &str)]) -> String {
        Guest::find(package(files).path()).unwrap_err().to_string()
    }

    #[test]
    fn a_folder_that_is_no_plugin_is_refused_with_what_it_lacks() {
        let cdylib = format!("{CARGO}{LIB}");
        let source = ("src/lib.rs", "");
        assert!(refusal(&[]).contains("no Cargo.toml"));
        assert!(
            refusal(&[("Cargo.toml", CARGO), source, ("plugin.toml", MANIFEST)]).contains("crate-type = [\"cdylib\"]")
        );
        assert!(refusal(&[("Cargo.toml", &cdylib), source]).contains("cannot read plugin.toml"));
        let broken = refusal(&[("Cargo.toml", &cdylib), source, ("plugin.toml", "name = \"A B\"")]);
        assert!(broken.contains("plugin.toml line 1: name \"A B\" must be"), "{broken}");
        let member = CARGO.replace("[workspace]\n", "");
        let workspace =
            [("Cargo.toml", "[workspace]\nmembers = [\"a\"]\n"), ("a/Cargo.toml", &member), ("a/src/lib.rs", "")];
        assert!(refusal(&workspace).contains("--all"));
        assert!(refusal(&[("Cargo.toml", "[package")]).contains("cargo metadata failed"));
    }

    #[test]
    fn a_plugin_is_found_with_its_output_in_cargos_own_folder() {
        let cdylib = format!("{CARGO}{LIB}");
        let dir = package(&[("Cargo.toml", &cdylib), ("src/lib.rs", ""), ("plugin.toml", MANIFEST)]);
        let guest = Guest::find(dir.path()).unwrap();
        assert_eq!(guest.manifest.name, "sample");
        assert!(guest.default_output().ends_with("plugins/sample.wasm"));
        assert_eq!(Guest::find_all(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn debians_rust_counts_only_when_it_is_complete() {
        let parts = ["bin/rustc", "bin/cargo", "bin/wasm-ld-9", "bin/wasm-ld-22", "bin/wasm-ld", "std/lib.rs"];
        let look = |parts: &[&str]| {
            let dir = package(&parts.iter().map(|part| (*part, "")).collect::<Vec<_>>());
            let found = debian_linker(&dir.path().join("bin"), &dir.path().join("std"));
            found.and_then(|linker| Some(linker.file_name()?.to_str()?.to_owned()))
        };
        assert_eq!(look(&parts).as_deref(), Some("wasm-ld-22"));
        for missing in ["bin/rustc", "bin/cargo", "std/lib.rs"] {
            let rest: Vec<&str> = parts.into_iter().filter(|part| *part != missing).collect();
            assert_eq!(look(&rest), None, "{missing}");
        }
        assert_eq!(look(&["bin/rustc", "bin/cargo", "std/lib.rs"]), None);
    }

    #[test]
    fn folders_of_this_machine_are_kept_out_of_the_component() {
        let metadata = r#"{
            "packages": [
                {"name": "serde", "id": "1", "source": "registry", "manifest_path": "/home/a b/registry/serde-1/Cargo.toml", "targets": []},
                {"name": "sample", "id": "2", "source": null, "manifest_path": "/src/sample/Cargo.toml", "targets": []}
            ],
            "workspace_members": ["2"], "workspace_root": "/src", "target_directory": "/src/target"
        }"#;
        let setting = remapping(&Toolchain::Unknown, &serde_json::from_str(metadata).unwrap());
        let setting: toml::Table = toml::from_str(&setting).unwrap();
        let flags: Vec<&str> = setting["target"]["wasm32-unknown-unknown"]["rustflags"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(toml::Value::as_str)
            .collect();
        assert_eq!(flags, ["--remap-path-prefix=/home/a b/registry=/deps", "--remap-path-prefix=/src=/plugin"]);
    }

    #[test]
    fn only_lines_about_artifacts_name_files() {
        let report = concat!(
            r#"{"reason":"compiler-artifact","manifest_path":"/p/Cargo.toml","filenames":["/t/a.rlib","/t/a.wasm"]}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
            "\nwarning: not a line of the report\n"
        );
        let artifacts = artifacts(report.as_bytes());
        assert_eq!(artifacts.len(), 2);
        assert_eq!(artifacts[0].wasm(), Some(Path::new("/t/a.wasm")));
        assert_eq!(artifacts[1].wasm(), None);
    }
}
