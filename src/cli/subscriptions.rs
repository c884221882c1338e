//! `tidegate subscriptions list|pause|resume`.

use std::time::Duration;

use anyhow::Result;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use super::client::{self, Client};
use super::exit::Exit;
use super::table::Table;
use super::{print, print_line};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List subscriptions
    List {
        #[command(flatten)]
        client: client::Args,
    },
    /// Let deliveries wait until they are resumed
    Pause(Named),
    /// Go on with paused deliveries
    Resume(Named),
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// The subscription
    name: String,
    #[command(flatten)]
    client: client::Args,
}

impl Command {
    pub(super) fn client(&self) -> &client::Args {
        match self {
            Self::List { client } | Self::Pause(Named { client, .. }) | Self::Resume(Named { client, .. }) => client,
        }
    }
}

#[derive(Deserialize)]
struct Listing {
    subscriptions: Vec<Subscription>,
}

#[derive(Deserialize)]
struct Subscription {
    name: String,
    pattern: String,
    handler: String,
    paused: bool,
    bound: bool,
    queued: usize,
    running: usize,
}

impl Subscription {
    /// What it does now.
    fn state(&self) -> &'static str {
        match (self.paused, self.bound) {
            (true, _) => "paused",
            (false, true) => "active",
            (false, false) => "no handler here",
        }
    }
}

/// Lists, pauses or resumes.
pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::List { client } => list(&client).await,
        Command::Pause(Named { name, client }) => set_paused(&name, true, &client).await,
        Command::Resume(Named { name, client }) => set_paused(&name, false, &client).await,
    }
}

async fn list(args: &client::Args) -> Result<Exit> {
    let answer = Client::new(args)?.get(&["subscriptions"], &[]).await?;
    if args.json {
        return print_line(answer);
    }
    let listing: Listing = serde_json::from_slice(&answer)?;
    let mut table = Table::new(&["NAME", "PATTERN", "HANDLER", "STATE", "QUEUED", "RUNNING"]);
    for one in listing.subscriptions {
        let (state, queued, running) = (one.state().to_owned(), one.queued.to_string(), one.running.to_string());
        table.row([one.name, one.pattern, one.handler, state, queued, running]);
    }
    print(table.render("no subscriptions"))
}

async fn set_paused(name: &str, paused: bool, args: &client::Args) -> Result<Exit> {
    let path = ["subscriptions", name];
    let patch = json!({"paused": paused});
    let answer = Client::new(args)?.send_json(Method::PATCH, &path, &[], &patch, Duration::ZERO).await?;
    if args.json {
        return print_line(answer);
    }
    let subscription: Subscription = serde_json::from_slice(&answer)?;
    print_line(format!("{} is {}", subscription.name, subscription.state()))
}
