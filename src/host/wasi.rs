//! WASI 0.2 and 0.3 for guests that were built for it: clocks and random numbers, and nothing else.
//!
//! No files, no environment, no arguments, no sockets; stdin is empty, stdout and stderr become log lines. A call of
//! `exit` ends the attempt only.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::{ResourceTable, WasiCtx, WasiCtxView};

use super::log::{INFO, Log, WARN};

/// The newest WASI 0.2 that is served.
pub(super) const WASI_0_2: &str = "0.2.12";

/// The newest WASI 0.3 that is served.
pub(super) const WASI_0_3: &str = "0.3.0";

/// The WASI of one attempt.
pub(super) struct Wasi {
    context: WasiCtx,
    table: ResourceTable,
}

impl Wasi {
    /// A WASI in which nothing is granted and whose output goes to `log`.
    pub(super) fn new(log: &Log) -> Self {
        let stream = |level| Stream { log: log.clone(), level };
        let mut context = WasiCtx::builder();
        context.stdout(stream(INFO)).stderr(stream(WARN)).allow_tcp(false).allow_udp(false);
        Self { context: context.build(), table: ResourceTable::new() }
    }

    /// What the generated bindings work on.
    pub(super) fn view(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.context, table: &mut self.table }
    }
}

/// Stdout or stderr. A clone writes to the same lines.
#[derive(Clone)]
struct Stream {
    log: Log,
    level: u8,
}

/// How much a guest may write at once.
const PERMIT: usize = 64 << 10;

impl IsTerminal for Stream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Stream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

/// What WASI 0.3 writes to.
impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.log.write(self.level, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What WASI 0.2 writes to.
impl OutputStream for Stream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.log.write(self.level, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(PERMIT)
    }
}

#[async_trait::async_trait]
impl Pollable for Stream {
    async fn ready(&mut self) {}
}
