//! The connection, and what its failures mean in words.
//!
//! The client makes the connection anew when it breaks, after growing pauses. Calls fail at once meanwhile. Nothing is sent
//! a second time: what became of an entry whose answer was lost is not known here, and repeating it is its caller's choice.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::connection::State;
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{Client, ConnectError, ConnectErrorKind, Event, HeaderMap};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::Options;
use super::open::{Names, Place};
use crate::error::{Error, Result};
use crate::provider::finding::pending;

/// How long whoever was told that the store is full should wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The way to the server.
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) names: Names,
    pub(super) options: Options,
    /// The server, without secrets, as messages name it.
    pub(super) server: String,
    is_closed: AtomicBool,
    /// How often the connection broke.
    breaks: watch::Receiver<u64>,
    /// Calls that failed.
    pub(super) errors: AtomicU64,
}

/// What JetStream answers to what it took in, or why it did not.
#[derive(Deserialize)]
struct Acknowledgement {
    #[serde(default)]
    seq: u64,
    error: Option<jetstream::Error>,
}

/// What to do about a connection that could not be made.
fn hint(error: &ConnectError, is_encrypted: bool) -> &'static str {
    let words = error.to_string();
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            ": set nats.username and nats.password, nats.token or nats.credentials to what the server knows"
        }
        _ if words.contains("certificate") => {
            ": only certificates of an authority that the system trusts are accepted; SSL_CERT_FILE names a file with others"
        }
        _ if is_encrypted && error.kind() != ConnectErrorKind::Dns && !words.contains("refused") => {
            ": a server that is named tls:// must speak TLS"
        }
        _ => "",
    }
}

impl Link {
    pub(super) async fn connect(
        place: Place,
        options: Options,
        changed: tokio::sync::mpsc::Sender<()>,
    ) -> Result<Self> {
        let (broke, breaks) = watch::channel(0);
        let connecting = place.connecting(&options).await?.event_callback(move |event| {
            let changed = changed.clone();
            if event == Event::Disconnected {
                broke.send_modify(|count| *count += 1);
            }
            async move {
                tracing::debug!(%event, "the connection to NATS");
                // Whoever follows the stream looks anew; one such message is enough.
                let _one_is_enough = changed.try_send(());
            }
        });
        let client = connecting.connect(&place.addresses).await.map_err(|error| {
            let hint = hint(&error, place.is_encrypted);
            Error::store("nats", format!("connect to {}", place.server), format!("{error}{hint}"))
        })?;
        let mut context = jetstream::new(client.clone());
        context.set_timeout(options.response_timeout);
        Ok(Self {
            client,
            context,
            names: Names::of(&place.namespace),
            options,
            server: place.server,
            is_closed: AtomicBool::new(false),
            breaks,
            errors: AtomicU64::new(0),
        })
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(Error::Stopped("provider")) } else { Ok(()) }
    }

    /// `false` when that was done before.
    pub(super) fn close(&self) -> bool {
        !self.is_closed.swap(true, Ordering::AcqRel)
    }

    /// Fails while there is no connection: what is handed to the client then would be sent whenever there is one.
    pub(super) fn check_connected(&self, action: &str) -> Result<()> {
        self.check_open()?;
        match self.client.connection_state() {
            State::Connected => Ok(()),
            _ => Err(self.failed(action, "the server cannot be reached, and is tried again every few seconds")),
        }
    }

    /// How often the connection broke so far.
    pub(super) fn breaks(&self) -> u64 {
        *self.breaks.borrow()
    }

    /// What is asked for, unless the connection breaks: what was on its way then is never answered.
    pub(super) async fn answer<T>(&self, action: &str, asking: impl Future<Output = T>) -> Result<T> {
        let mut breaks = self.breaks.clone();
        breaks.mark_unchanged();
        tokio::select! {
            biased;
            answer = asking => Ok(answer),
            Ok(()) = breaks.changed() => Err(self.failed(action, "the connection broke: what became of it is not known")),
        }
    }

    /// Has the stream of this subject take a message in; answers with its place.
    pub(super) async fn publish(&self, action: &str, subject: String, headers: HeaderMap, body: Bytes) -> Result<u64> {
        let request = Request::new().headers(headers).payload(body).timeout(Some(self.options.response_timeout));
        let answer = self.answer(action, self.client.send_request(subject, request)).await?;
        let answer = answer.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => self.failed(action, "the stream is gone; it is made anew"),
            RequestErrorKind::TimedOut => self.late(action),
            _ => self.failed(action, &error.to_string()),
        })?;
        let answer: Acknowledgement = serde_json::from_slice(&answer.payload)
            .map_err(|error| self.failed(action, &format!("the answer cannot be read: {error}")))?;
        match answer.error {
            None => Ok(answer.seq),
            Some(error) => Err(self.refused(action, &error)),
        }
    }

    /// The answer of JetStream's interface to a request; `None` where what is asked about is not there.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        action: &str,
        subject: String,
        body: &impl serde::Serialize,
    ) -> Result<Option<T>> {
        use jetstream::response::Response;
        self.check_connected(action)?;
        let asking = self.context.request::<_, _, Response<T>>(subject, body);
        let answer = self.answer(action, tokio::time::timeout(self.options.response_timeout, asking)).await?;
        match answer.map_err(|_elapsed| self.late(action))? {
            Ok(Response::Ok(answer)) => Ok(Some(answer)),
            Ok(Response::Err { error }) => match error.error_code() {
                ErrorCode::STREAM_NOT_FOUND | ErrorCode::NO_MESSAGE_FOUND => Ok(None),
                _ => Err(self.refused(action, &error)),
            },
            Err(error) => Err(self.failed(action, &error.to_string())),
        }
    }

    /// Fails where the streams of the namespace are not made yet.
    pub(super) async fn check_made(&self) -> Result<()> {
        for name in [&self.names.log, &self.names.snapshots] {
            let info = self.ask::<serde::de::IgnoredAny>("look for the streams", format!("STREAM.INFO.{name}"), &());
            if info.await?.is_none() {
                return Err(pending(format!("of stream {name} in {}", self.server), "is not made yet"));
            }
        }
        Ok(())
    }

    /// No answer came within the bound.
    pub(super) fn late(&self, action: &str) -> Error {
        let words = format!("no answer within {:?} (nats.response_timeout)", self.options.response_timeout);
        self.failed(action, &words)
    }

    pub(super) fn failed(&self, action: &str, words: &str) -> Error {
        if let Err(stopped) = self.check_open() {
            return stopped;
        }
        self.errors.fetch_add(1, Ordering::Relaxed);
        Error::store("nats", format!("{action} at {}", self.server), words.to_owned())
    }

    /// What it means that JetStream refused.
    pub(super) fn refused(&self, action: &str, error: &jetstream::Error) -> Error {
        const FULL: [ErrorCode; 5] = [
            ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
            ErrorCode::INSUFFICIENT_RESOURCES,
            ErrorCode::STORAGE_RESOURCES_EXCEEDED,
            ErrorCode::MEMORY_RESOURCES_EXCEEDED,
            ErrorCode::STREAM_MAX_STREAM_BYTES_EXCEEDED,
        ];
        let words = error.to_string();
        if FULL.contains(&error.error_code())
            || words.contains("maximum bytes exceeded")
            || words.contains("maximum messages")
        {
            return self.full(&words);
        }
        self.failed(action, &words)
    }

    /// The stream or the account has no room left.
    pub(super) fn full(&self, words: &str) -> Error {
        self.errors.fetch_add(1, Ordering::Relaxed);
        let reason = format!(
            "stream {} at {} is full ({words}): raise its limit, or keep less with broker.keep_for and broker.keep_events",
            self.names.log, self.server
        );
        Error::Overloaded { reason: reason.into(), retry_after: RETRY_AFTER }
    }
}
