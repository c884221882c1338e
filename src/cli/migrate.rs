//! `tidegate migrate`: makes the store's schema, or brings it up to date, and ends.
//!
//! For those who let `serve` connect as a user that may change no tables. Whatever the number of processes that do it at
//! once, each change is made once.

use anyhow::Result;
use serde_json::json;

use super::config::Flags;
use super::exit::Exit;
use super::print_line;
use super::serve::open_provider;
use crate::provider::finding::Opening;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Print what was done as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Opens the store, which is what migrates it, and closes it again.
pub(super) async fn run(args: Args) -> Result<Exit> {
    let config = args.flags.load()?;
    let provider = open_provider(&config, Opening::Migrate).await?;
    let stats = provider.stats().await?;
    provider.close().await?;
    let version = stats.provider_specific.get("schema_version");
    let store = config.provider_shown();
    if args.json {
        return print_line(
            json!({"provider": stats.provider_type, "store": store, "schema_version": version}).to_string(),
        );
    }
    print_line(match version {
        Some(version) => format!("{store} is up to date: schema version {version}"),
        None => format!("{store} has no schema: there is nothing to do"),
    })
}
