//! Sending entries, and waiting for what they lead to.

use std::sync::atomic::Ordering;

use async_nats::jetstream::stream::{Info, State};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::core::Outcome;
use super::entry::{Kind, PART, Part, Piece};
use super::{Core, Shared};
use crate::error::{Error, Result};

/// How long after it was sent an entry may reach the stream, in microseconds. What a connection held back for longer is
/// void, since its sender has given it up.
const PATIENCE: i64 = 30_000_000;

/// What the headers of a message that we write take beside an event's, in bytes.
const OVERHEAD: usize = 512;

/// Forgets who waits when he does not any more.
struct Waiting<'a>(&'a Shared, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().remove(&self.1);
    }
}

impl Shared {
    /// Has an entry take effect, and answers with what it led to.
    pub(super) async fn send(&self, action: &str, pieces: Vec<Piece>) -> Result<Outcome> {
        self.link.check_connected(action)?;
        self.check_known()?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let (answer, mut answered) = oneshot::channel();
        let breaks = self.link.breaks();
        self.waiting.lock().insert(number, (breaks, answer));
        let _waiting = Waiting(self, number);
        let sending = self.pass_on(action, number, pieces);
        let work = async {
            tokio::pin!(sending);
            let mut is_sent = false;
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut answered => return outcome.map_err(|_gone| self.link.failed(action, "what became of it is not known")),
                    sent = &mut sending, if !is_sent => {
                        // Where the connection broke, whoever follows the stream finds out whether it is there.
                        if let Err(error) = sent
                            && self.link.breaks() == breaks
                        {
                            // It may be that the stream is gone, or another.
                            self.look.notify_one();
                            return Err(error);
                        }
                        is_sent = true;
                    }
                }
            }
        };
        match tokio::time::timeout(self.link.options.response_timeout, work).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => {
                self.look.notify_one();
                Err(self.link.late(action))
            }
        }
    }

    /// Hands the messages of an entry to the server; only the last is acknowledged, since without one of the others it is
    /// void.
    async fn pass_on(&self, action: &str, number: u64, pieces: Vec<Piece>) -> Result<()> {
        let mut messages = cut(pieces, self.link.client.max_payload());
        let of = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        let Some((last_kind, last)) = messages.pop() else { return Ok(()) };
        let until = self.server_time().saturating_add(PATIENCE);
        let time = self.clock.as_ref().map(|clock| clock());
        let mut part = Part { entry: (self.session, number), at: 0, of, kind: Kind::More, until, time };
        for (kind, mut piece) in messages {
            part.kind = kind;
            piece.headers.insert(PART, part.write());
            let subject = format!("{}{}", self.link.names.prefix, piece.subject);
            let sent = self.link.client.publish_with_headers(subject, piece.headers, piece.body).await;
            sent.map_err(|error| self.link.failed(action, &error.to_string()))?;
            part.at += 1;
        }
        part.kind = last_kind;
        let Piece { subject, mut headers, body, .. } = last;
        headers.insert(PART, part.write());
        self.link.publish(action, format!("{}{subject}", self.link.names.prefix), headers, body).await.map(drop)
    }

    /// Waits until everything is applied that the stream has now.
    pub(super) async fn catch_up(&self, action: &str) -> Result<()> {
        self.check_known()?;
        let state = self.stream_state(action).await?;
        self.wait_for(action, state.last_sequence).await
    }

    pub(super) async fn wait_for(&self, action: &str, place: u64) -> Result<()> {
        let mut applied = self.applied.subscribe();
        let arrives = applied.wait_for(|&applied| applied >= place || self.link.check_open().is_err());
        let arrived = tokio::time::timeout(self.link.options.response_timeout, arrives).await.is_ok();
        self.link.check_open()?;
        if arrived {
            return self.check_known();
        }
        self.look.notify_one();
        Err(self.link.late(action))
    }

    /// What the stream has.
    pub(super) async fn stream_state(&self, action: &str) -> Result<State> {
        self.stream_info(action).await.map(|info| info.state)
    }

    /// What the stream is, and has.
    pub(super) async fn stream_info(&self, action: &str) -> Result<Info> {
        let info: Option<Info> = self.link.ask(action, format!("STREAM.INFO.{}", self.link.names.log), &()).await?;
        let Some(info) = info else {
            self.look.notify_one();
            return Err(self.link.failed(action, "the stream is gone; it is made anew"));
        };
        self.bytes.store(info.state.bytes, Ordering::Relaxed);
        self.max_bytes.store(u64::try_from(info.config.max_bytes).unwrap_or(0), Ordering::Relaxed);
        Ok(info)
    }

    /// Refuses events when the stream is nearly full: the rest is for what ends them.
    pub(super) fn check_room(&self) -> Result<()> {
        let (bytes, max) = (self.bytes.load(Ordering::Relaxed), self.max_bytes.load(Ordering::Relaxed));
        if max > 0 && bytes > max / 10 * 9 {
            self.is_full.store(true, Ordering::Relaxed);
            return Err(self.link.full(&format!("{bytes} of {max} bytes")));
        }
        Ok(())
    }

    /// Fails when the stream has what this version cannot read.
    fn check_known(&self) -> Result<()> {
        self.link.check_open()?;
        let core = self.core.lock();
        if core.is_foreign { Err(foreign(&self.link.names.log)) } else { Ok(()) }
    }
}

pub(super) fn foreign(stream: &str) -> Error {
    let reason = format!(
        "was written by a newer version; this version knows format {}: use the newer tidegate",
        super::core::FORMAT
    );
    Error::Incompatible { what: format!("stream {stream}"), reason: reason.into() }
}

/// The messages that these pieces are, where none may have more than `limit` bytes.
fn cut(pieces: Vec<Piece>, limit: usize) -> Vec<(Kind, Piece)> {
    let mut messages = Vec::with_capacity(pieces.len());
    for Piece { kind, subject, headers, mut body } in pieces {
        let told: usize = headers.iter().flat_map(|(_, values)| values).map(|value| value.as_str().len()).sum();
        let room = limit.saturating_sub(told + OVERHEAD).max(1);
        let first = body.split_to(room.min(body.len()));
        let more = |body: Bytes| Piece {
            kind: Kind::More,
            subject: subject.clone(),
            headers: async_nats::HeaderMap::new(),
            body,
        };
        let room = limit.saturating_sub(OVERHEAD).max(1);
        let mut rest = Vec::new();
        while !body.is_empty() {
            rest.push((Kind::More, more(body.split_to(room.min(body.len())))));
        }
        messages.push((kind, Piece { kind, subject, headers, body: first }));
        messages.extend(rest);
    }
    messages
}

impl Shared {
    /// Whether a snapshot is worth its bytes.
    pub(super) fn is_due(&self, core: &Core) -> bool {
        let every = super::snapshot::EVERY.max(self.saved_bytes.load(Ordering::Relaxed));
        // Processes of one namespace should not all do it at once.
        core.fresh_bytes > every + self.session % every
    }
}
