//! `tidegate doctor`: looks at the store, and tells what is not as it should be and what to do.
//!
//! Talks to the store and to no server, which may run or not. The looking is the provider's; capture's word on its
//! triggers is joined here, since neither knows the other. Mends nothing, and makes no schema: one that is missing or
//! older is a finding.

use std::cmp::Reverse;

use anyhow::Result;
use serde_json::json;

use super::config::Flags;
use super::exit::Exit;
use super::serve::open_provider;
use super::table::short;
use super::{print, print_line};
use crate::capture::Capture;
use crate::config::{Config, ProviderUrl};
use crate::error::Error;
use crate::provider::finding::{Opening, SCHEMA};
use crate::provider::{Finding, Severity};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Print the findings as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Looks, and prints what was found, what matters most first.
pub(super) async fn run(args: Args) -> Result<Exit> {
    let config = args.flags.load()?;
    let (name, mut found) = match open_provider(&config, Opening::AsItIs).await {
        Ok(provider) => {
            let found = provider.examine().await;
            provider.close().await?;
            let mut found = found?;
            // A pooler may serve the store and not capture, which prepares its statements.
            found.extend(captures(&config).await.unwrap_or_else(|error| {
                let advice = "Whether captures have drifted is not known: ask `tidegate capture status` with a URL of the server itself.";
                vec![Finding::warning("not-examined", format!("captures: {error:#}"), advice)]
            }));
            (Some(provider.capabilities().provider), found)
        }
        Err(Error::Conflict { what: SCHEMA, id, reason }) => (None, vec![pending(&id, &reason)]),
        Err(error) => return Err(error.into()),
    };
    found.sort_by_key(|finding| Reverse(finding.severity));
    let count = found.iter().filter(|finding| finding.severity > Severity::Ok).count();
    match args.json {
        true => print_line(
            json!({"provider": name, "store": config.provider_shown(), "healthy": count == 0, "findings": found})
                .to_string(),
        )?,
        false => print(as_text(&config.provider_shown(), &found, count))?,
    };
    Ok(if count == 0 { Exit::Done } else { Exit::Failed })
}

/// The store cannot be looked into before it is migrated.
fn pending(place: &str, reason: &str) -> Finding {
    Finding::warning(
        "schema-pending",
        format!("{place} {reason}"),
        "`tidegate serve` sees to it when it starts, if its user may change the store; `tidegate migrate` does now. Nothing \
         else could be looked at.",
    )
}

/// Whether triggers stand as they were installed.
async fn captures(config: &Config) -> Result<Vec<Finding>> {
    if !matches!(ProviderUrl::parse(&config.provider)?, ProviderUrl::Postgres | ProviderUrl::Sqlite) {
        return Ok(Vec::new());
    }
    let captures = Capture::connect(&config.provider).await?.schema(&config.postgres.schema).status().await?;
    let drift = captures.iter().flat_map(|status| status.drift.iter().map(move |words| (&status.table, words)));
    let mut found: Vec<Finding> = drift
        .map(|(table, words)| {
            let advice =
                "Writes to the table give other events than were asked for, or none: see `tidegate capture status`.";
            Finding::warning("capture-drift", format!("{table}: {words}"), advice)
        })
        .collect();
    if found.is_empty() && !captures.is_empty() {
        found.push(Finding::ok("captures", format!("{} captured tables stand as installed", captures.len())));
    }
    Ok(found)
}

/// The widest line that is told: an index's statement fits.
const WIDTH: usize = 600;

fn as_text(store: &str, found: &[Finding], count: usize) -> String {
    let mut text = format!("{store}\n");
    for finding in found {
        let word = match finding.severity {
            Severity::Ok => "ok",
            Severity::Warning => "WARNING",
            Severity::Problem => "PROBLEM",
        };
        text.push_str(&format!("{word:<8} {}: {}\n", finding.code, short(&finding.what, WIDTH)));
        if !finding.advice.is_empty() {
            text.push_str(&format!("         {}\n", short(&finding.advice, WIDTH)));
        }
    }
    text.push_str(&match count {
        0 => "nothing needs doing\n".to_owned(),
        1 => "1 thing needs doing\n".to_owned(),
        count => format!("{count} things need doing\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_told_with_what_to_do_and_drive_no_terminal() {
        let found = [Finding::warning("held-transaction", "by \u{1b}[2J", "end it"), Finding::ok("clock", "agrees")];
        let text = as_text("memory:", &found, 1);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "memory:",
                "WARNING  held-transaction: by \\u{1b}[2J",
                "         end it",
                "ok       clock: agrees",
                "1 thing needs doing"
            ]
        );
    }
}
