//! `tidegate serve`: opens the store, runs the broker, and serves HTTP until it is told to stop.
//!
//! The one place that names both a provider and the host of plugins. A stop goes outside in: no more connections,
//! requests finish, attempts in progress finish, the store closes. A second signal ends at once.

use std::io::IsTerminal as _;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing_subscriber::EnvFilter;

use super::config::Flags;
use super::exit::Exit;
use super::follow::Follower;
use super::print_line;
use crate::broker::Broker;
use crate::config::{Config, Log, LogFormat, ProviderUrl};
use crate::error::Error;
use crate::feed::Feed;
use crate::host::{Folder, Host, Reloader};
use crate::http::{Gate, Server, Services};
use crate::metrics::Metrics;
use crate::provider::finding::Opening;
use crate::provider::memory::MemoryProvider;
use crate::provider::nats::NatsProvider;
use crate::provider::postgres::PostgresProvider;
use crate::provider::redis::RedisProvider;
use crate::provider::sqlite::SqliteProvider;
use crate::provider::{Examine, Provider};

const SETTINGS: &str = "Every setting of the configuration can be given in the environment too: TIDEGATE_PROVIDER, \
TIDEGATE_BROKER__WORKER_COUNT for worker_count below [broker], and so on. The environment wins over the file, and flags \
win over both. `tidegate config` shows what is in force.";

#[derive(Debug, clap::Args)]
#[command(after_help = SETTINGS)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// What `/readyz` says while the store is not open.
const STORE: &str = "the store is not open yet";

/// What `/readyz` says while plugins are compiled.
const PLUGINS: &str = "the plugins are not loaded yet";

/// What `/readyz` says while the broker does not run.
const BROKER: &str = "the broker does not run yet";

/// What `/readyz` says once a stop has begun.
const STOPPING: &str = "tidegate is stopping";

/// Serves until a signal.
pub(super) fn run(args: Args) -> Result<Exit> {
    let config = args.flags.load()?;
    if !config.enabled {
        eprintln!("the broker is disabled (enabled: false in the configuration): nothing is served");
        return Ok(Exit::Done);
    }
    log_to_stderr(&config.log)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(serve(config))
}

fn log_to_stderr(log: &Log) -> Result<()> {
    let filter = EnvFilter::try_new(&log.filter)
        .map_err(|error| Error::invalid("log.filter", &log.filter, format!("is no filter: {error}")))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let lines = lines.with_ansi(std::io::stderr().is_terminal());
    let started = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}

async fn serve(config: Config) -> Result<Exit> {
    let mut stop = stop_signal().context("cannot listen for signals")?;
    // From the first moment on: unheard, it would end the process.
    let hangup = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    let metrics = Metrics::new(config.limits.metric_types);
    let gate = Gate::waiting_for([STORE, PLUGINS, BROKER]);
    let server = Server::bind(config.listen, config.http.clone(), metrics.clone(), gate.clone()).await?;
    let address = server.address()?;
    let (close_edge, edge_closes) = watch::channel(false);
    let edge = tokio::spawn(server.run(raised(edge_closes)));

    let provider: Arc<dyn Provider> = open_provider(&config, Opening::Migrate).await?;
    gate.done(STORE);
    let (broker, service) = Broker::open(Arc::clone(&provider), config.broker.clone(), metrics.clone()).await?;
    let (feed, tail) = Feed::new(Arc::clone(&provider), metrics.clone());
    let (stop_feed, feed_stops) = watch::channel(false);
    let tailing = tokio::spawn(tail.run(raised(feed_stops)));
    let (stop_following, following_stops) = watch::channel(false);
    let (plugins, following) = start_plugins(&config, &broker, metrics, following_stops).await?;
    gate.done(PLUGINS);
    let (host, reloader) = plugins.unzip();
    let greeting = greeting(&config, host.as_ref());
    tokio::spawn(reload_on(hangup, reloader.clone()));
    gate.open(Services { broker, feed, host, reloader });
    let (stop_broker, broker_stops) = watch::channel(false);
    let mut working = tokio::spawn(service.run(raised(broker_stops)));
    gate.done(BROKER);
    print_line(format!("tidegate {} serves http://{address} {greeting}", env!("CARGO_PKG_VERSION")))?;

    let early = tokio::select! {
        () = raised_ref(&mut stop) => None,
        ended = &mut working => Some(ended),
    };
    gate.wait(STOPPING);
    // Streams would outlive every drain: they end first, and their clients come back to whoever serves next.
    stop_feed.send_replace(true);
    close_edge.send_replace(true);
    edge.await.context("the HTTP edge broke")?;
    tailing.await.context("the feed broke")?;
    stop_following.send_replace(true);
    following.await.context("the plugins' folder is followed no more")?;
    let ended = match early {
        Some(ended) => ended.context("the broker broke").and(Err(anyhow::anyhow!("the broker ended by itself"))),
        None => {
            stop_broker.send_replace(true);
            join(working).await
        }
    };
    provider.close().await?;
    ended.map(|()| Exit::Done)
}

async fn join(working: JoinHandle<crate::Result<()>>) -> Result<()> {
    Ok(working.await.context("the broker broke")??)
}

/// Opens the store, and brings its schema up to date or not.
pub(super) async fn open_provider(config: &Config, opening: Opening) -> crate::Result<Arc<dyn Examine>> {
    match ProviderUrl::parse(&config.provider)? {
        ProviderUrl::Memory => Ok(Arc::new(MemoryProvider::open(config.memory.clone())?)),
        ProviderUrl::Sqlite => Ok(Arc::new(SqliteProvider::open_for(config.sqlite.clone(), opening).await?)),
        ProviderUrl::Postgres => Ok(Arc::new(PostgresProvider::open_for(config.postgres.clone(), opening).await?)),
        ProviderUrl::Redis => Ok(Arc::new(RedisProvider::open_for(config.redis.clone(), opening).await?)),
        ProviderUrl::Nats => Ok(Arc::new(NatsProvider::open_for(config.nats.clone(), opening).await?)),
    }
}

/// Loads the plugins of the configured folder, if there is one, and follows it from then on.
async fn start_plugins(
    config: &Config,
    broker: &Broker,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
) -> Result<(Option<(Host, Reloader)>, JoinHandle<()>)> {
    let Some(directory) = &config.host.directory else { return Ok((None, tokio::spawn(async {}))) };
    let host = Host::new(config.host.clone(), Some(metrics))?;
    let folder = Folder::open(host.clone(), directory)?;
    let reloader = folder.reloader();
    let mut follower = Follower::new(host.clone(), folder, broker.clone());
    follower.look().await?;
    Ok((Some((host, reloader)), tokio::spawn(follower.run(raised(stop)))))
}

/// Reads the folder of plugins anew at every SIGHUP. Without a folder the signal is passed over.
async fn reload_on(mut hangup: Signal, reloader: Option<Reloader>) {
    while hangup.recv().await.is_some() {
        let Some(reloader) = &reloader else {
            tracing::info!("SIGHUP: there is no folder of plugins to reload");
            continue;
        };
        match reloader.reload_all().await {
            Ok(()) => tracing::info!("SIGHUP: the folder of plugins was read anew"),
            Err(error) => tracing::error!(%error, "SIGHUP: the plugins were not reloaded"),
        }
    }
}

/// With what is served, in words.
fn greeting(config: &Config, host: Option<&Host>) -> String {
    let plugins = match host.map(Host::plugins) {
        None => "no folder of plugins".to_owned(),
        Some(all) => counted(
            all.iter().filter(|plugin| plugin.active.is_some()).count(),
            all.iter().filter(|plugin| plugin.refused.is_some()).count(),
        ),
    };
    format!("with {} and {plugins}", config.provider_shown())
}

/// How many plugins serve, and how many files do not.
fn counted(active: usize, refused: usize) -> String {
    let noun = if active == 1 { "plugin" } else { "plugins" };
    match refused {
        0 => format!("{active} {noun}"),
        _ => format!("{active} {noun}, {refused} refused: `tidegate plugin list` says why"),
    }
}

/// A flag that the first SIGINT or SIGTERM raises. The second ends the process.
fn stop_signal() -> std::io::Result<watch::Receiver<bool>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (raise, stop) = watch::channel(false);
    tokio::spawn(async move {
        for second in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if second {
                tracing::warn!("a second signal: ending at once");
                std::process::exit(1);
            }
            tracing::info!("stopping; a second signal ends at once");
            raise.send_replace(true);
        }
    });
    Ok(stop)
}

async fn raised(mut flag: watch::Receiver<bool>) {
    raised_ref(&mut flag).await;
}

/// Completes once the flag is raised, or its owner is gone.
async fn raised_ref(flag: &mut watch::Receiver<bool>) {
    drop(flag.wait_for(|&raised| raised).await);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_starts_a_server_hears_of_plugins_that_were_refused() {
        assert_eq!(counted(0, 0), "0 plugins");
        assert_eq!(counted(1, 0), "1 plugin");
        assert_eq!(counted(2, 3), "2 plugins, 3 refused: `tidegate plugin list` says why");
    }
}
