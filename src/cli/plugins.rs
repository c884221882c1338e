//! `tidegate plugin …`: what works on files, and what asks a server.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::client::{self, Client};
use super::exit::Exit;
use super::plugin::{self, BuildArgs, InspectArgs};
use super::table::{Table, short};
use super::{print, print_line};
use crate::config::{Config, Sources};
use crate::host::{self, Checked};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Build a plugin from its sources
    Build(BuildArgs),
    /// Show what a component says about itself, without running it
    Inspect(InspectArgs),
    /// Verify a component, compare it with its grants, compile and link it: all but serve it
    Check(Check),
    /// List the plugins that a server runs
    List {
        #[command(flatten)]
        client: client::Args,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The component
    file: PathBuf,
    /// The configuration that grants what it asks for
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
            Self::Inspect(args) => args.json,
            Self::Check(args) => args.json,
            Self::List { client } => client.json,
        }
    }
}

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
    active_since: String,
}

#[derive(Deserialize)]
struct Refusal {
    origin: String,
    error: String,
}

/// Builds, inspects, checks or lists.
pub(super) fn run(command: Command) -> Result<Exit> {
    let mut out = Vec::new();
    match command {
        Command::Build(args) => plugin::build(&args, &mut out)?,
        Command::Inspect(args) => plugin::inspect(&args, &mut out)?,
        Command::Check(args) => return super::wait(check(args)),
        Command::List { client } => return super::wait(list(client)),
    }
    print(out)
}

async fn check(args: Check) -> Result<Exit> {
    let config = Config::load(&Sources::new(args.config, Vec::new()))?;
    let shown = args.file.display().to_string();
    let bytes = std::fs::read(&args.file).with_context(|| format!("cannot read {shown}"))?;
    let checked = host::check(&config.host, &shown, bytes.into()).await?;
    if args.json {
        return print_line(serde_json::to_vec(&checked)?);
    }
    let Checked { manifest, digest, .. } = checked;
    print_line(format!("{} {} {digest} would be served", manifest.name, manifest.version))
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
    let lines = refused.map(|(name, refusal)| format!("refused {name} ({}): {}\n", refusal.origin, refusal.error));
    print(lines.collect::<String>())
}
