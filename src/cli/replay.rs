//! `tidegate replay`.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use serde::{Deserialize, Serialize};

use super::client::{self, Client};
use super::exit::Exit;
use super::print_line;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    stretch: Stretch,
    #[command(flatten)]
    pub(super) client: client::Args,
}

/// Which stretch of the log, and to whom.
#[derive(Debug, clap::Args, Serialize)]
struct Stretch {
    /// The subscription that gets the events
    subscription: String,
    /// Only types that this pattern matches, whatever the subscription's own pattern says [default: that one]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pattern: Option<String>,
    /// From this place in the log
    #[arg(long, value_name = "SEQ")]
    #[serde(skip_serializing_if = "Option::is_none")]
    from_seq: Option<u64>,
    /// Up to this place in the log
    #[arg(long, value_name = "SEQ")]
    #[serde(skip_serializing_if = "Option::is_none")]
    to_seq: Option<u64>,
    /// Only created at this instant or later, such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "INSTANT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    /// Only created at this instant or earlier
    #[arg(long, value_name = "INSTANT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    /// Only count what would be delivered
    #[arg(long)]
    dry_run: bool,
}

#[derive(Deserialize)]
struct Answer {
    deliveries: u64,
    dry_run: bool,
}

/// Replays, and says how much.
pub(super) async fn run(Args { stretch, client: args }: Args) -> Result<Exit> {
    let answer = Client::new(&args)?.send_json(Method::POST, &["replays"], &[], &stretch, Duration::ZERO).await?;
    if args.json {
        return print_line(answer);
    }
    let Answer { deliveries, dry_run } = serde_json::from_slice(&answer)?;
    let would = if dry_run { "would be" } else { "are" };
    print_line(format!("{deliveries} events {would} delivered to {}", stretch.subscription))
}
