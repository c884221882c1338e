//! Connections: a bounded accept loop, timeouts for slow clients, and a stop that lets requests finish.
//!
//! Knows nothing of what is served.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How long the loop rests when the system has no file descriptors or memory for another connection.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(200);

/// How often an HTTP/2 client is asked whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// The most requests at once on one HTTP/2 connection.
const STREAMS: u32 = 128;

/// How connections are treated.
pub(super) struct Limits {
    /// The most connections at once; further ones wait in the listener's queue.
    pub(super) connections: NonZeroUsize,
    /// How long a client may take to send a request's head.
    pub(super) header_timeout: Duration,
    /// How long requests in progress may take to finish once the server stops.
    pub(super) drain: Duration,
}

/// Serves `router` until `shutdown`, then lets requests finish.
pub(super) async fn serve(listener: TcpListener, router: Router, limits: Limits, shutdown: impl Future<Output = ()>) {
    let (stop, stopped) = watch::channel(());
    let builder = builder(limits.header_timeout);
    let permits = Arc::new(Semaphore::new(limits.connections.get()));
    let mut connections = JoinSet::new();
    let accepting = async {
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let stream = accept(&listener, &mut connections).await;
            let connection = drive(builder.clone(), stream, router.clone(), stopped.clone());
            connections.spawn(async move {
                connection.await;
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        () = shutdown => {}
    }
    drop(listener);
    drop(stop);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.drain, drained).await.is_err() {
        tracing::warn!(open = connections.len(), "connections were cut: they outlived the drain");
    }
}

fn builder(header_timeout: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(header_timeout);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).max_concurrent_streams(STREAMS);
    builder
}

/// The next connection. Collects finished ones meanwhile, so that their tasks do not pile up.
async fn accept(listener: &TcpListener, connections: &mut JoinSet<()>) -> (TcpStream, SocketAddr) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => return accepted,
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "no connection can be accepted");
                    tokio::time::sleep(OUT_OF_DESCRIPTORS).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn drive(
    builder: Builder<TokioExecutor>,
    (stream, peer): (TcpStream, SocketAddr),
    router: Router,
    mut stopped: watch::Receiver<()>,
) {
    // Answers are small and final: waiting to fill a packet only adds latency.
    let _ = stream.set_nodelay(true);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection ended early");
    }
}
