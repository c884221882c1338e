//! `tidegate plugin …`: what works on files, and what asks a server.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{self, Client};
use super::exit::Exit;
use super::plugin::{self, BuildArgs, EmbedArgs, InspectArgs, Inspection};
use super::table::{Table, short};
use super::{print, print_line};
use crate::config::{Config, Sources};
use crate::error::Error;
use crate::host::component::Interface;
use crate::host::manifest::Manifest;
use crate::host::{self, Checked, CheckedFile, needed_grants};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Build a plugin from its sources
    Build(BuildArgs),
    /// Make a plugin of a component that another language's tools built: add its manifest
    Embed(EmbedArgs),
    /// Show what a component, or a server's plugin, says about itself, without running it
    Inspect(InspectArgs),
    /// Verify components, compare them with their grants, compile and link them: all but serve them
    Check(Check),
    /// List the plugins that a server runs
    List {
        #[command(flatten)]
        client: client::Args,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The component, or a folder of them as --plugins takes it
    path: PathBuf,
    /// The configuration that grants what is asked for
    #[arg(short, long, env = "TIDEGATE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print what was found as JSON
    #[arg(long)]
    json: bool,
}

impl Command {
    pub(super) fn is_json(&self) -> bool {
        match self {
            Self::Build(args) => args.json,
            Self::Embed(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Check(args) => args.json,
            Self::List { client } => client.json,
        }
    }
}

/// The widest path and the widest reason in a line about a file.
const WIDE: usize = 2_000;

#[derive(Deserialize)]
struct Listing {
    plugins: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    name: String,
    active: Option<Version>,
    refused: Option<Refusal>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
    digest: String,
    size: usize,
    active_since: String,
}

#[derive(Deserialize)]
struct Refusal {
    origin: String,
    digest: Option<String>,
    error: String,
    at: String,
}

impl Refusal {
    /// What was refused, when, and why.
    fn shown(&self, name: &str) -> String {
        let digest = self.digest.as_ref().map_or_else(|| "unread".to_owned(), |digest| short(digest, 19));
        let (origin, error) = (short(&self.origin, WIDE), short(&self.error, WIDE));
        format!("refused {} ({origin}, {digest}, {}): {error}\n", short(name, WIDE), self.at)
    }
}

/// Builds, inspects, checks or lists.
pub(super) fn run(command: Command) -> Result<Exit> {
    let mut out = Vec::new();
    match command {
        Command::Build(args) => plugin::build(&args, &mut out)?,
        Command::Embed(args) => plugin::embed(&args, &mut out)?,
        Command::Inspect(InspectArgs { file, url: Some(url), token, json }) => {
            return super::wait(inspect(file, client::Args { url, token, json }));
        }
        Command::Inspect(args) => plugin::inspect(&args, &mut out)?,
        Command::Check(args) => return super::wait(check(args)),
        Command::List { client } => return super::wait(list(client)),
    }
    print(out)
}

async fn check(args: Check) -> Result<Exit> {
    let config = Config::load(&Sources::new(args.config, Vec::new()))?;
    let files = host::check_files(&config.host, &args.path).await?;
    let (is_folder, all) = (args.path.is_dir(), files.len());
    let needed = |file: &CheckedFile| file.manifest.as_ref().and_then(|one| needed_grants(one, &config.host));
    if args.json {
        let entries: Vec<Value> = files.iter().map(|file| entry(file, needed(file))).collect();
        match entries.as_slice() {
            [entry] if !is_folder => print_line(entry.to_string())?,
            entries => print_line(json!({ "plugins": entries }).to_string())?,
        };
    } else {
        print(files.iter().filter_map(|file| shown(file, is_folder)).collect::<String>())?;
        print(files.iter().filter_map(needed).map(|grants| format!("\n{grants}")).collect::<String>())?;
    }
    let refused: Vec<Error> = files.into_iter().filter_map(|file| file.outcome.err()).collect();
    match (refused.len(), refused.into_iter().next().filter(|_| !is_folder)) {
        (0, _) => Ok(Exit::Done),
        (_, Some(error)) => Err(error.into()),
        (refused, None) => bail!("{refused} of {all} plugins would be refused"),
    }
}

/// What was found of a file, as JSON.
fn entry(file: &CheckedFile, grants: Option<String>) -> Value {
    let path = file.path.display().to_string();
    match &file.outcome {
        Ok(checked) => json!({"file": path, "served": true, "plugin": checked}),
        Err(error) => {
            let manifest = file.manifest.as_ref();
            json!({"file": path, "served": false, "error": error.to_string(), "manifest": manifest, "grants": grants})
        }
    }
}

/// What was found of a file, in words; nothing where that is told as an error.
fn shown(file: &CheckedFile, is_folder: bool) -> Option<String> {
    match &file.outcome {
        Ok(Checked { manifest, digest, .. }) => {
            Some(format!("{} {} {digest} would be served\n", manifest.name, manifest.version))
        }
        Err(error) => is_folder.then(|| {
            format!("refused {}: {}\n", short(&file.path.to_string_lossy(), WIDE), short(&error.to_string(), WIDE))
        }),
    }
}

/// What a server's plugin says about itself.
#[derive(Deserialize)]
struct Detail {
    name: String,
    active: Option<Version>,
    manifest: Option<Manifest>,
    #[serde(default)]
    imports: Vec<String>,
    #[serde(default)]
    exports: Vec<String>,
}

async fn inspect(name: PathBuf, args: client::Args) -> Result<Exit> {
    let name = name.to_string_lossy();
    let answer = Client::new(&args)?.get(&["plugins", &name], &[]).await?;
    if args.json {
        return print_line(answer);
    }
    let Detail { name, active, manifest, imports, exports } = serde_json::from_slice(&answer)?;
    let (Some(Version { digest, size, .. }), Some(manifest)) = (active, manifest) else {
        bail!("plugin {name} has no active version: `tidegate plugin list` says why");
    };
    let interface = Interface { imports, exports };
    let mut out = Vec::new();
    plugin::show(&Inspection { manifest, digest, size, interface }, &mut out)?;
    print(out)
}

async fn list(args: client::Args) -> Result<Exit> {
    let answer = Client::new(&args)?.get(&["plugins"], &[]).await?;
    if args.json {
        return print_line(answer);
    }
    let Listing { plugins } = serde_json::from_slice(&answer)?;
    let mut table = Table::new(&["NAME", "VERSION", "DIGEST", "ACTIVE SINCE"]);
    for Plugin { name, active, .. } in &plugins {
        let [version, digest, loaded] = match active {
            Some(active) => [active.version.clone(), short(&active.digest, 19), active.active_since.clone()],
            None => ["none".to_owned(), String::new(), String::new()],
        };
        table.row([name.clone(), version, digest, loaded]);
    }
    print(table.render("no plugins"))?;
    let refused = plugins.iter().filter_map(|plugin| Some((&plugin.name, plugin.refused.as_ref()?)));
    print(refused.map(|(name, refusal)| refusal.shown(name)).collect::<String>())
}
