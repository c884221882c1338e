//! The HTTP edge: what clients, operators and monitoring ask for.
//!
//! Handlers translate and nothing more: what an event is, who gets it and what is stored is decided behind
//! [`Broker`](crate::broker::Broker). Everything that is not a success answers `application/problem+json`. There is no
//! TLS here: put a proxy in front where others can listen in.

mod app;
mod auth;
mod body;
mod cloudevents;
mod consumers;
mod dead_letters;
mod events;
mod gate;
mod input;
mod plugins;
mod problem;
mod query;
mod replays;
mod serve;
mod status;
mod stream;
mod subscriptions;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

use bytesize::ByteSize;
use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use crate::error::{Error, Result};
use crate::metrics::Metrics;

pub use auth::{Scope, Token};
pub use gate::{Gate, Services};

/// How the edge behaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The largest request body; batches and base64 need more room than the largest payload.
    pub max_body: ByteSize,
    /// The most connections at once; further ones wait.
    pub max_connections: NonZeroUsize,
    /// The most requests at once; further ones are refused with 503.
    pub max_requests: NonZeroUsize,
    /// The most streams of the feed at once; further ones are refused with 503. Over HTTP/1.1 each is a connection.
    pub max_streams: NonZeroUsize,
    /// How long a client may take to send a request's head.
    #[serde(with = "friendly::required")]
    pub header_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[serde(with = "friendly::required")]
    pub body_timeout: Duration,
    /// The longest `?wait=`.
    #[serde(with = "friendly::required")]
    pub max_wait: Duration,
    /// How long requests in progress may take to finish when the server stops.
    #[serde(with = "friendly::required")]
    pub drain: Duration,
    /// Who may call; none is only legal on a loopback address, where everybody may.
    pub tokens: Vec<Token>,
}

const CONNECTIONS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1_023);

/// Half of the connections, so that streams never keep requests out.
const STREAMS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(511);

impl Default for Options {
    fn default() -> Self {
        Self {
            max_body: ByteSize::mib(16),
            max_connections: CONNECTIONS,
            max_requests: CONNECTIONS,
            max_streams: STREAMS,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            max_wait: Duration::from_secs(60),
            drain: Duration::from_secs(10),
            tokens: Vec::new(),
        }
    }
}

impl Options {
    /// Checks what the types do not already guarantee, for a server that listens on `listen`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option, or `listen` when that address needs tokens and there are none.
    pub fn validate(&self, listen: SocketAddr) -> Result<()> {
        auth::validate(listen, &self.tokens)?;
        let bounds = [
            ("http.header_timeout", self.header_timeout),
            ("http.body_timeout", self.body_timeout),
            ("http.max_wait", self.max_wait),
        ];
        match bounds.into_iter().find(|(_, bound)| bound.is_zero()) {
            Some((field, _)) => Err(Error::invalid(field, "0s", "must be longer than nothing")),
            None => Ok(()),
        }
    }
}

/// A bound socket and what is served on it.
pub struct Server {
    listener: TcpListener,
    options: Options,
    app: axum::Router,
}

impl Server {
    /// Binds `listen`. What is behind the edge arrives through the [`Gate`]: until it is open, calls answer 503.
    ///
    /// # Errors
    /// [`Error::Invalid`] for bad options, or an address that cannot be bound.
    pub async fn bind(listen: SocketAddr, options: Options, metrics: Metrics, gate: Gate) -> Result<Self> {
        options.validate(listen)?;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|error| Error::invalid("listen", listen.to_string(), format!("cannot be bound: {error}")))?;
        let app = app::router(app::App::new(options.clone(), metrics, gate));
        Ok(Self { listener, options, app })
    }

    /// The address that is listened on; with the port that the system chose when 0 was asked for.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the socket is gone.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|_| Error::Stopped("listener"))
    }

    /// Serves until `shutdown`, then lets requests in progress finish.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let limits = serve::Limits {
            connections: self.options.max_connections,
            header_timeout: self.options.header_timeout,
            drain: self.options.drain,
        };
        serve::serve(self.listener, self.app, limits, shutdown).await;
    }
}
