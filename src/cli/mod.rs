//! The command line: `serve`, and a client for everything that a running server is asked.
//!
//! Answers go to standard output, as tables for people or as the server's JSON with `--json`; words about trouble go to
//! standard error. Exit codes: 0 done, 1 failed, 2 usage or bad configuration, 3 not found, 4 host unreachable.

mod capture;
mod client;
mod config;
mod dead;
mod doctor;
mod events;
mod exit;
pub mod follow;
mod migrate;
pub mod plugin;
mod plugins;
mod publish;
mod replay;
mod serve;
mod sse;
mod subscriptions;
mod table;
mod tail;
mod view;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

use self::exit::Exit;

/// An event handler host: durable events, glob subscriptions, sandboxed WebAssembly handlers.
#[derive(Parser)]
#[command(name = "tidegate", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 usage or bad configuration, 3 not found, 4 host unreachable";

#[derive(Subcommand)]
enum Command {
    /// Run the server: the broker, the plugins and HTTP
    Serve(serve::Args),
    /// Publish an event, or several from a file
    Publish(publish::Args),
    /// List events, or show one
    #[command(subcommand)]
    Events(events::Command),
    /// Follow events as they come
    Tail(tail::Args),
    /// List subscriptions, pause and resume them
    #[command(subcommand)]
    Subscriptions(subscriptions::Command),
    /// List dead letters (deliveries that failed for good), or give them new attempts
    #[command(subcommand)]
    Dead(dead::Command),
    /// Deliver a stretch of the log to a subscription again
    Replay(replay::Args),
    /// Build, check and inspect plugins; list those that a server runs
    #[command(subcommand)]
    Plugin(plugins::Command),
    /// Turn writes to tables of a database into events
    #[command(subcommand)]
    Capture(capture::Command),
    /// Make the store's schema or bring it up to date, and end
    Migrate(migrate::Args),
    /// Look at the store: what is not as it should be, why it matters, and what to do
    ///
    /// Changes nothing: a schema that serve would make or bring up to date is a finding. Exits with 0 when nothing needs
    /// doing, with 1 when something does or the store does not answer.
    Doctor(doctor::Args),
    /// Print the configuration that is in force, secrets masked
    Config(config::Args),
}

/// Runs the command that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    let json = command.is_json();
    match run(command) {
        Ok(exit) => exit.into(),
        Err(error) => exit::report(&error, json).into(),
    }
}

impl Command {
    /// Whether trouble is told as JSON too.
    fn is_json(&self) -> bool {
        match self {
            Self::Serve(_) => false,
            Self::Publish(args) => args.client.json,
            Self::Events(command) => command.client().json,
            Self::Tail(args) => args.client.json,
            Self::Subscriptions(command) => command.client().json,
            Self::Dead(command) => command.client().json,
            Self::Replay(args) => args.client.json,
            Self::Plugin(command) => command.is_json(),
            Self::Capture(command) => command.is_json(),
            Self::Migrate(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Config(args) => args.json,
        }
    }
}

fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Serve(args) => serve::run(args),
        Command::Publish(args) => wait(publish::run(args)),
        Command::Events(command) => wait(events::run(command)),
        Command::Tail(args) => wait(tail::run(args)),
        Command::Subscriptions(command) => wait(subscriptions::run(command)),
        Command::Dead(command) => wait(dead::run(command)),
        Command::Replay(args) => wait(replay::run(args)),
        Command::Plugin(command) => plugins::run(command),
        Command::Capture(command) => wait(capture::run(command)),
        Command::Migrate(args) => wait(migrate::run(args)),
        Command::Doctor(args) => wait(doctor::run(args)),
        Command::Config(args) => config::run(args),
    }
}

/// Runs a client's work: one thread is plenty.
fn wait(work: impl Future<Output = Result<Exit>>) -> Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the runtime")?.block_on(work)
}

/// Writes to standard output. That nobody reads any more is no failure.
fn print(text: impl AsRef<[u8]>) -> Result<Exit> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_ref()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(Exit::Done),
    }
}

/// Writes a JSON text as a line.
fn print_line(text: impl AsRef<[u8]>) -> Result<Exit> {
    let mut line = text.as_ref().to_vec();
    line.push(b'\n');
    print(line)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_tree_is_sound() {
        super::Cli::command().debug_assert();
    }
}
