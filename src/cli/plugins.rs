//! `tidegate plugin …`: what works on files, and what asks a server.

use anyhow::Result;
use serde::Deserialize;

use super::client::{self, Client};
use super::exit::Exit;
use super::plugin::{self, BuildArgs, InspectArgs};
use super::table::{Table, short};
use super::{print, print_line};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Build a plugin from its sources
    Build(BuildArgs),
    /// Show what a component says about itself, without running it
    Inspect(InspectArgs),
    /// List the plugins that a server runs
    List {
        #[command(flatten)]
        client: client::Args,
    },
}

impl Command {
    pub(super) fn is_json(&self) -> bool {
        match self {
            Self::Build(args) => args.json,
            Self::Inspect(args) => args.json,
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
    loaded_at: String,
}

#[derive(Deserialize)]
struct Refusal {
    origin: String,
    error: String,
}

/// Builds, inspects or lists.
pub(super) fn run(command: Command) -> Result<Exit> {
    let mut out = Vec::new();
    match command {
        Command::Build(args) => plugin::build(&args, &mut out)?,
        Command::Inspect(args) => plugin::inspect(&args, &mut out)?,
        Command::List { client } => return super::wait(list(client)),
    }
    print(out)
}

async fn list(args: client::Args) -> Result<Exit> {
    let answer = Client::new(&args)?.get(&["plugins"], &[]).await?;
    if args.json {
        return print_line(answer);
    }
    let Listing { plugins } = serde_json::from_slice(&answer)?;
    let mut table = Table::new(&["NAME", "VERSION", "DIGEST", "LOADED"]);
    for Plugin { name, active, .. } in &plugins {
        let [version, digest, loaded] = match active {
            Some(active) => [active.version.clone(), short(&active.digest, 19), active.loaded_at.clone()],
            None => ["none".to_owned(), String::new(), String::new()],
        };
        table.row([name.clone(), version, digest, loaded]);
    }
    print(table.render("no plugins"))?;
    let refused = plugins.iter().filter_map(|plugin| Some((&plugin.name, plugin.refused.as_ref()?)));
    let lines = refused.map(|(name, refusal)| format!("refused {name} ({}): {}\n", refusal.origin, refusal.error));
    print(lines.collect::<String>())
}
