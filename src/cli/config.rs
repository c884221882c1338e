//! `tidegate config`, and the flags that `serve` shares with it.

use std::path::PathBuf;

use anyhow::Result;

use super::exit::Exit;
use super::{print, print_line};
use crate::config::{Config, LogFormat, Setting, Sources};

/// Where the configuration comes from.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Flags {
    /// The configuration file: TOML, or YAML (also the original broker's)
    #[arg(short, long, env = "TIDEGATE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where HTTP is served [default: 127.0.0.1:7700]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// The store: memory:, sqlite://PATH, postgres://USER:PASSWORD@HOST/DATABASE, redis://HOST or nats://HOST [default: sqlite://tidegate.db]
    #[arg(long, value_name = "URL")]
    provider: Option<String>,
    /// The folder whose *.wasm files are the plugins, followed while the server runs [default: no plugins]
    #[arg(long, value_name = "DIR")]
    plugins: Option<String>,
    /// How the log looks, on standard error [default: text]
    #[arg(long, value_name = "FORMAT")]
    log: Option<LogFormat>,
}

impl Flags {
    /// The configuration in force.
    pub(super) fn load(self) -> Result<Config> {
        let log = self.log.map(|log| if log == LogFormat::Json { "json" } else { "text" }.to_owned());
        let flags = [
            ("listen", "--listen", self.listen),
            ("provider", "--provider", self.provider),
            ("host.directory", "--plugins", self.plugins),
            ("log.format", "--log", log),
        ];
        let settings = flags.into_iter().filter_map(|(key, flag, text)| Some(Setting::new(key, text?, flag)));
        Ok(Config::load(&Sources::new(self.config, settings.collect()))?)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Print it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Prints the configuration in force.
pub(super) fn run(args: Args) -> Result<Exit> {
    let config = args.flags.load()?;
    match args.json {
        true => print_line(config.to_json().to_string()),
        false => print(config.to_toml()?),
    }
}
