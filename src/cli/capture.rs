//! `tidegate capture install|status|remove`: triggers that turn writes to a table into events.
//!
//! The one client command that talks to a database and not to a server: no server need run.

use std::path::PathBuf;

use anyhow::Result;
use bytesize::ByteSize;
use serde_json::json;

use super::exit::{Exit, Usage};
use super::table::Table as Columns;
use super::{print, print_line};
use crate::capture::Capture;
use crate::capture::outbox::SCHEMA;
use crate::capture::triggers::{Operation, Status, Table, Watch};
use crate::config::{Config, Sources};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Tell of every row of a table that is created, updated or deleted
    ///
    /// Installing again changes what is told, and mends what status finds. Writes to the table wait for a moment.
    Install(Install),
    /// Show what is captured, and whether it still is as it was installed; exits with 1 when it is not
    Status {
        #[command(flatten)]
        database: Database,
    },
    /// Stop telling of a table, and remove what was installed for it
    Remove {
        #[arg(help = TABLE)]
        table: Table,
        #[command(flatten)]
        database: Database,
    },
}

const TABLE: &str = "The table, such as public.users or 'public.\"Odd Name\"'";

#[derive(Debug, clap::Args)]
pub(super) struct Install {
    #[arg(help = TABLE)]
    table: Table,
    /// What is told [default: all]; delete tells in PostgreSQL of TRUNCATE too
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    ops: Vec<Operation>,
    /// Tell of these columns only: a change to others is no event [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    columns: Vec<String>,
    /// Columns that appear nowhere, such as password
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Of a row that makes a larger event only the key is told [default: limits.max_payload, or 1 MiB]
    #[arg(long, value_name = "SIZE")]
    max_payload: Option<ByteSize>,
    #[command(flatten)]
    database: Database,
}

#[derive(Debug, clap::Args)]
pub(super) struct Database {
    /// The database: postgres://… or sqlite://PATH [default: the provider of the configuration]
    #[arg(long, value_name = "URL", env = "TIDEGATE_DATABASE", hide_env_values = true)]
    database: Option<String>,
    /// The schema of PostgreSQL that holds tidegate's inbox [default: tidegate, or the configuration's postgres.schema]
    #[arg(long, value_name = "NAME")]
    schema: Option<String>,
    /// The configuration file that names the provider, where no database is given
    #[arg(short, long, env = "TIDEGATE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Database {
    /// The database, and the largest payload that the configuration allows where it was asked.
    async fn open(&self) -> Result<(Capture, Option<u64>)> {
        let (url, schema, limit) = match &self.database {
            Some(url) => (url.clone(), SCHEMA.to_owned(), None),
            None => {
                let config = Config::load(&Sources::new(self.config.clone(), Vec::new()))?;
                (config.provider, config.postgres.schema, Some(config.limits.max_payload.as_u64()))
            }
        };
        if url.starts_with("memory:") {
            let words = "the configured provider is memory:, which has no tables: name a database with --database";
            return Err(Usage(words.to_owned()).into());
        }
        Ok((Capture::connect(&url).await?.schema(self.schema.as_ref().unwrap_or(&schema)), limit))
    }
}

impl Command {
    pub(super) fn is_json(&self) -> bool {
        match self {
            Self::Install(Install { database, .. }) | Self::Status { database } | Self::Remove { database, .. } => {
                database.json
            }
        }
    }
}

/// Installs, shows or removes.
pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Install(install) => install.run().await,
        Command::Status { database } => status(&database).await,
        Command::Remove { table, database } => {
            database.open().await?.0.remove(&table).await?;
            match database.json {
                true => print_line(json!({"removed": table.to_string()}).to_string()),
                false => print_line(format!("{table} is no longer captured")),
            }
        }
    }
}

impl Install {
    async fn run(self) -> Result<Exit> {
        let Self { table, mut ops, columns, exclude, max_payload, database } = self;
        let (capture, limit) = database.open().await?;
        let mut watch = Watch::new(table);
        if !ops.is_empty() {
            ops.sort_unstable();
            ops.dedup();
            watch.operations = ops;
        }
        watch.columns = (!columns.is_empty()).then_some(columns);
        watch.exclude = exclude;
        watch.max_payload = max_payload.map(|size| size.as_u64()).or(limit).unwrap_or(watch.max_payload);
        let status = capture.install(&watch).await?;
        match database.json {
            true => print_line(json!(status).to_string()),
            false => print_line(format!("{} is captured: {}", status.table, events(&status))),
        }
    }
}

async fn status(database: &Database) -> Result<Exit> {
    let all = database.open().await?.0.status().await?;
    let is_well = all.iter().all(|status| status.drift.is_empty());
    match database.json {
        true => print_line(json!({"captures": all}).to_string())?,
        false => print(as_text(&all))?,
    };
    Ok(if is_well { Exit::Done } else { Exit::Failed })
}

fn as_text(all: &[Status]) -> String {
    let mut table = Columns::new(&["TABLE", "EVENTS", "KEY", "COLUMNS", "STATE"]);
    for status in all {
        let columns = match (&status.columns, &*status.exclude) {
            (Some(columns), _) => columns.join(","),
            (None, []) => "all".to_owned(),
            (None, exclude) => format!("all but {}", exclude.join(",")),
        };
        let key = if status.key.is_empty() { "none".to_owned() } else { status.key.join(",") };
        let state = if status.drift.is_empty() { "as installed" } else { "has drifted" };
        table.row([status.table.clone(), events(status), key, columns, state.to_owned()]);
    }
    let mut text = table.render("no table is captured");
    for status in all {
        for words in &status.drift {
            text.push_str(&format!("{}: {words}\n", status.table));
        }
    }
    text
}

fn events(status: &Status) -> String {
    let operations: Vec<&str> = status.operations.iter().map(|operation| operation.as_str()).collect();
    format!("{}.{{{}}}", status.event_type, operations.join(","))
}
