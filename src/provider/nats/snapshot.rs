//! Snapshots: the whole state as of one message, in a stream of its own, so that a process need not read all from the
//! beginning, and what is behind it and of no use can be removed.
//!
//! A snapshot is cut into messages; the last message that says where they are is the valid one, and replaces the one before
//! by compare-and-swap.

use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use tokio::time::Instant;

use super::Shared;
use super::core::{Core, FORMAT, Saved};
use super::entry::{Kind, Move, PART, Part};
use super::send::foreign;
use crate::error::Result;

/// A snapshot is made after so many bytes of messages, or as many as the last one had.
pub(super) const EVERY: u64 = 8 << 20;

/// What is worth a snapshot when there is an occasion: so many bytes, or messages that can be removed.
const WORTH: (u64, usize) = (1 << 20, 1_000);

/// How many requests are under way at once.
const AT_ONCE: usize = 32;

/// Where a snapshot is.
#[derive(Serialize, Deserialize)]
struct Pointer {
    format: u32,
    /// The message that was applied last, and when the log took it in.
    applied: u64,
    stamp: i64,
    /// The places of its messages.
    chunks: Vec<u64>,
}

impl Shared {
    /// Whether the log has this message, taken in at this time.
    pub(super) async fn stands(&self, place: u64, stamp: i64) -> Result<bool> {
        let message = self.stored(place).await?;
        Ok(message.is_some_and(|message| message.time.unix_timestamp_nanos() == i128::from(stamp)))
    }

    /// Sends a move that nobody waits for.
    pub(super) async fn announce(&self, change: &Move) -> Result<()> {
        let piece = change.piece();
        let until = i64::MAX;
        let part = Part { entry: (self.session, u64::MAX), at: 0, of: 1, kind: Kind::Move, until, time: None };
        let mut headers = piece.headers;
        headers.insert(PART, part.write());
        let subject = format!("{}{}", self.link.names.prefix, piece.subject);
        self.link.publish("write to the log", subject, headers, piece.body).await.map(drop)
    }

    /// The valid snapshot's pointer, and its place.
    async fn pointer(&self) -> Result<Option<(u64, Pointer)>> {
        #[derive(Deserialize)]
        struct Answer {
            message: async_nats::jetstream::stream::RawMessage,
        }
        let names = &self.link.names;
        let subject = format!("STREAM.MSG.GET.{}", names.snapshots);
        let last = serde_json::json!({"last_by_subj": format!("{}pointer", names.snapshot_prefix)});
        let Some(answer) = self.link.ask::<Answer>("find the snapshot", subject, &last).await? else { return Ok(None) };
        let message = async_nats::jetstream::message::StreamMessage::try_from(answer.message);
        let message = message.map_err(|error| self.link.failed("find the snapshot", &error.to_string()))?;
        let pointer: Pointer = serde_json::from_slice(&message.payload)
            .map_err(|error| self.link.failed("find the snapshot", &format!("it cannot be read: {error}")))?;
        Ok(Some((message.sequence, pointer)))
    }

    /// The state of the valid snapshot, if there is one and it is of this log.
    pub(super) async fn load(&self) -> Result<Option<Core>> {
        let Some((_, pointer)) = self.pointer().await? else { return Ok(None) };
        if !self.stands(pointer.applied, pointer.stamp).await? {
            return Ok(None);
        }
        if pointer.format > FORMAT {
            return Err(foreign(&self.link.names.snapshots));
        }
        let chunks = pointer.chunks.iter().copied().map(|place| async move {
            let chunk = self.stored_in(&self.link.names.snapshots, place).await?;
            chunk.ok_or_else(|| {
                self.link.failed("read the snapshot", "a part of it is gone; another may have replaced it")
            })
        });
        let chunks: Vec<_> = stream::iter(chunks).buffered(AT_ONCE).try_collect().await?;
        let mut bytes = BytesMut::new();
        for chunk in chunks {
            bytes.extend_from_slice(&chunk.payload);
        }
        self.saved_bytes.store(bytes.len() as u64, Ordering::Relaxed);
        let made =
            tokio::task::spawn_blocking(move || postcard::from_bytes::<Saved>(&bytes).ok().and_then(Core::restore));
        let core = made.await.ok().flatten();
        core.map(Some)
            .ok_or_else(|| self.link.failed("read the snapshot", "it was not written by this version, or is damaged"))
    }

    /// Makes a snapshot when it is worth it.
    pub(super) async fn tidy(&self) {
        let is_worth = {
            let core = self.core.lock();
            core.fresh_bytes > WORTH.0 || core.gone.len() > WORTH.1
        };
        if is_worth {
            self.save_unless_busy().await;
        }
    }

    /// Makes a snapshot, unless one is being made.
    pub(super) async fn save_unless_busy(&self) {
        let Ok(_saving) = self.saving.try_lock() else { return };
        if let Err(error) = self.write().await {
            // So that it is not tried with every message.
            self.core.lock().fresh_bytes = 0;
            tracing::warn!(%error, cause = ?error, "cannot make a snapshot");
        }
    }

    /// Makes a snapshot of the state as it is now, and removes what is of no use behind it.
    pub(super) async fn save(&self) -> Result<()> {
        let _saving = self.saving.lock().await;
        self.write().await
    }

    async fn write(&self) -> Result<()> {
        const ACTION: &str = "make a snapshot";
        self.link.check_connected(ACTION)?;
        let (last, known) = self.pointer().await?.map_or((0, None), |(place, pointer)| (place, Some(pointer)));
        let began = Instant::now();
        let captured = {
            let core = self.core.lock();
            if core.epoch.is_empty() || core.is_foreign {
                return Ok(());
            }
            core.capture()
        };
        let (applied, stamp, held) = (captured.applied, captured.stamp, began.elapsed());
        if let Some(known) = known
            && known.applied > applied
            && self.stands(known.applied, known.stamp).await?
        {
            // Another process was faster, and is further.
            return self.sweep(known.applied).await;
        }
        let encoded = tokio::task::spawn_blocking(move || postcard::to_stdvec(&captured)).await;
        let encoded = encoded.ok().and_then(std::result::Result::ok);
        let bytes = Bytes::from(encoded.ok_or_else(|| self.link.failed(ACTION, "the state has no form in bytes"))?);
        let room = self.link.client.max_payload().saturating_sub(1_024).max(1);
        let names = &self.link.names;
        let cuts: Vec<Bytes> =
            (0..bytes.len()).step_by(room).map(|from| bytes.slice(from..bytes.len().min(from + room))).collect();
        let cuts = cuts
            .into_iter()
            .map(|chunk| self.link.publish(ACTION, format!("{}chunk", names.snapshot_prefix), HeaderMap::new(), chunk));
        let chunks: Vec<u64> = stream::iter(cuts).buffered(4).try_collect().await?;
        let first = chunks.iter().copied().min().unwrap_or(0);
        let pointer = Pointer { format: FORMAT, applied, stamp, chunks };
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        let body = serde_json::to_vec(&pointer).unwrap_or_default().into();
        self.link.publish(ACTION, format!("{}pointer", names.snapshot_prefix), headers, body).await?;
        self.saved_bytes.store(bytes.len() as u64, Ordering::Relaxed);
        tracing::debug!(applied, bytes = bytes.len(), ?held, "made a snapshot");
        self.purge(&names.snapshots, None, first).await?;
        self.sweep(applied).await
    }

    /// Removes what is of no use below this place, which a snapshot stands for.
    async fn sweep(&self, below: u64) -> Result<()> {
        let names = &self.link.names;
        let (event, record, gone, seen) = {
            let core = self.core.lock();
            let (event, record) = core.lowest(below);
            let gone: Vec<u64> = core.gone.range(event.min(record)..below).map(|(&place, _)| place).collect();
            (event, record, gone, core.applied)
        };
        for (subject, bound) in [("moves", below), ("events.>", event), ("records", record)] {
            self.purge(&names.log, Some(format!("{}{subject}", names.prefix)), bound).await?;
        }
        let deletions = gone.into_iter().map(|place| async move {
            let subject = format!("STREAM.MSG.DELETE.{}", names.log);
            let asked = serde_json::json!({"seq": place});
            // One that is gone already is told as a refusal.
            const ACTION: &str = "remove messages";
            let asking = self.link.context.request::<_, _, serde_json::Value>(subject, &asked);
            let answer = self.link.answer(ACTION, asking).await?;
            answer.map(drop).map_err(|error| self.link.failed(ACTION, &error.to_string()))
        });
        stream::iter(deletions).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        self.announce(&Move::Swept { below, seen }).await
    }

    /// Removes the messages below a place, of this subject where one is given.
    async fn purge(&self, name: &str, subject: Option<String>, below: u64) -> Result<()> {
        // To the server 0 and 1 mean all.
        if below <= 1 {
            return Ok(());
        }
        let asked = serde_json::json!({"seq": below, "filter": subject});
        let purged = self.link.ask::<serde_json::Value>("remove messages", format!("STREAM.PURGE.{name}"), &asked);
        purged.await.map(drop)
    }
}
