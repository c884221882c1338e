//! `tidegate dead list|redrive`.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use serde::{Deserialize, Serialize};

use super::client::{self, Client};
use super::exit::Exit;
use super::table::{Table, short};
use super::{print, print_line, view};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List dead letters, newest first
    List(List),
    /// Give dead letters new attempts: those that a filter names, or all
    Redrive(Redrive),
}

/// Which dead letters are meant.
#[derive(Debug, Clone, clap::Args, Serialize)]
struct Filter {
    /// Only of this subscription
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    subscription: Option<String>,
    /// Only of this event
    #[arg(long, value_name = "ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<String>,
    /// Only of types that this pattern matches
    #[arg(long = "type", value_name = "PATTERN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<String>,
    /// Only those whose last attempt ended with this verdict, such as reject or timeout
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<String>,
    /// Only those whose last attempt ran this plugin version: sha256:<hex>
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// Only those that failed for good at this instant or later, such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "INSTANT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    /// The most dead letters, the newest first
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    filter: Filter,
    /// Go on where an earlier page ended
    #[arg(long)]
    cursor: Option<String>,
    #[command(flatten)]
    client: client::Args,
}

#[derive(Debug, clap::Args)]
pub(super) struct Redrive {
    #[command(flatten)]
    filter: Filter,
    /// Every dead letter
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    client: client::Args,
}

impl Command {
    pub(super) fn client(&self) -> &client::Args {
        match self {
            Self::List(args) => &args.client,
            Self::Redrive(args) => &args.client,
        }
    }
}

#[derive(Deserialize)]
struct Page {
    dead_letters: Vec<Letter>,
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
struct Letter {
    event: view::Event,
    delivery: view::Delivery,
}

#[derive(Serialize)]
struct Wanted {
    #[serde(flatten)]
    filter: Filter,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    all: bool,
}

#[derive(Deserialize)]
struct Redriven {
    redriven: u64,
}

/// Lists or redrives.
pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::List(args) => list(args).await,
        Command::Redrive(args) => redrive(args).await,
    }
}

async fn list(List { filter, cursor, client: args }: List) -> Result<Exit> {
    let query = [
        ("subscription", filter.subscription),
        ("event_id", filter.event_id),
        ("type", filter.r#type),
        ("verdict", filter.verdict),
        ("digest", filter.digest),
        ("since", filter.since),
        ("limit", filter.limit.map(|limit| limit.to_string())),
        ("cursor", cursor),
    ];
    let answer = Client::new(&args)?.get(&["dead-letters"], &query).await?;
    if args.json {
        return print_line(answer);
    }
    let page: Page = serde_json::from_slice(&answer)?;
    print(table(&page.dead_letters))?;
    if let Some(cursor) = page.next_cursor {
        eprintln!("there are more: --cursor {cursor}");
    }
    Ok(Exit::Done)
}

fn table(letters: &[Letter]) -> String {
    let mut table = Table::new(&["SEQ", "TYPE", "SUBSCRIPTION", "VERDICT", "ATTEMPTS", "DIED", "ERROR", "ID"]);
    for Letter { event, delivery } in letters {
        table.row([
            event.seq(),
            event.r#type.clone(),
            delivery.subscription.clone(),
            delivery.verdict.clone().unwrap_or_default(),
            delivery.attempts.len().to_string(),
            delivery.completed_at.clone().unwrap_or_default(),
            delivery.error.as_deref().map(|error| short(error, 60)).unwrap_or_default(),
            short(&event.id, 40),
        ]);
    }
    table.render("no dead letters")
}

async fn redrive(Redrive { filter, all, client: args }: Redrive) -> Result<Exit> {
    let path = ["dead-letters", "redrive"];
    let wanted = Wanted { filter, all };
    let answer = Client::new(&args)?.send_json(Method::POST, &path, &[], &wanted, Duration::ZERO).await?;
    if args.json {
        return print_line(answer);
    }
    let Redriven { redriven } = serde_json::from_slice(&answer)?;
    print_line(format!("{redriven} dead letters get new attempts"))
}
