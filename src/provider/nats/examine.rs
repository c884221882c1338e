//! What `tidegate doctor` finds in what the server says of the stream; and the figures of `/v1/stats`.

use std::sync::atomic::Ordering;

use async_nats::jetstream::stream::{Info, StorageType};
use async_trait::async_trait;

use super::{NatsProvider, Shared};
use crate::error::Result;
use crate::provider::finding::size;
use crate::provider::{Durability, Examine, Finding, ProviderStats};

/// Beyond this share of its bytes, in percent, a stream is nearly full; and beyond the second as good as full.
const FULL: (u64, u64) = (75, 90);

#[async_trait]
impl Examine for NatsProvider {
    async fn examine(&self) -> Result<Vec<Finding>> {
        self.shared.link.check_open()?;
        let info = self.shared.stream_info("ask for the stream's state").await?;
        let (server, before, after) = *self.shared.clocks.lock();
        let mut found = vec![Finding::of_clocks(server, before, after), self.shared.keeps(&info), room(&info)];
        found.extend(replicas(&info));
        Ok(found)
    }
}

impl Shared {
    fn keeps(&self, info: &Info) -> Finding {
        let config = &info.config;
        let storage = if config.storage == StorageType::File { "file" } else { "memory" };
        let settings = format!("storage {storage}, {} replicas", config.num_replicas);
        match self.durability() {
            Durability::Storage => {
                Finding::ok("durability", format!("an acknowledged event survives loss of power ({settings})"))
            }
            Durability::Os => {
                let words = "an acknowledged event survives a crash of the server, and loss of power but for what it had not \
                    synced yet (sync_interval, two minutes unless it is set)";
                Finding::ok("durability", format!("{words} ({settings})"))
            }
            Durability::Process => Finding::warning(
                "not-durable",
                format!("an acknowledged event is gone with the server ({settings})"),
                "Delete the streams and set nats.storage to file, or see that the server is never the only one that has them.",
            ),
        }
    }

    /// The figures of the store.
    pub(super) async fn figures(&self) -> Result<ProviderStats> {
        self.catch_up("ask for the stream's state").await?;
        let info = self.stream_info("ask for the stream's state").await?;
        let names = &self.link.names;
        let mut own = serde_json::Map::new();
        own.insert("stream_name".into(), names.log.clone().into());
        own.insert("subject_prefix".into(), names.prefix.trim_end_matches('.').into());
        own.insert("max_age".into(), serde_json::Value::Null);
        own.insert("max_bytes".into(), info.config.max_bytes.into());
        own.insert("consumer_errors".into(), self.link.errors.load(Ordering::Relaxed).into());
        own.insert("messages".into(), info.state.messages.into());
        own.insert("bytes".into(), info.state.bytes.into());
        own.insert("consumers".into(), info.state.consumer_count.into());
        let core = self.core.lock();
        own.insert("last_sequence".into(), core.applied.into());
        own.insert("snapshot_sequence".into(), core.swept.into());
        own.insert("snapshot_bytes".into(), self.saved_bytes.load(Ordering::Relaxed).into());
        let log = &core.state.log;
        Ok(ProviderStats {
            provider_type: "nats",
            total_events: log.total(),
            pending_events: log.events.pending,
            processing_events: log.events.processing,
            completed_events: log.events.completed,
            failed_events: log.events.failed,
            pending_deliveries: log.deliveries.pending,
            processing_deliveries: log.deliveries.processing,
            dead_letters: log.deliveries.failed,
            head_seq: log.head,
            floor_seq: log.floor(),
            provider_specific: own,
        })
    }
}

fn room(info: &Info) -> Finding {
    let Some(max) = u64::try_from(info.config.max_bytes).ok().filter(|&max| max > 0) else {
        return Finding::ok("stream", format!("the stream has {} and no bound of its own", size(info.state.bytes)));
    };
    let words = format!("the stream has {} of {}", size(info.state.bytes), size(max));
    let advice = "Beyond nine tenths events are refused: raise max_bytes of the stream (nats stream edit), or keep less with \
        broker.keep_for and broker.keep_events.";
    match info.state.bytes.saturating_mul(100) / max {
        share if share >= FULL.1 => Finding::problem("stream-full", words, advice),
        share if share >= FULL.0 => Finding::warning("stream-short", words, advice),
        _ => Finding::ok("stream", words),
    }
}

/// Servers of the cluster that have fallen behind or are away.
fn replicas(info: &Info) -> Option<Finding> {
    let peers = &info.cluster.as_ref()?.replicas;
    let away: Vec<&str> = peers.iter().filter(|peer| peer.offline || !peer.current).map(|peer| &*peer.name).collect();
    if away.is_empty() {
        return Some(Finding::ok(
            "replicas",
            format!("the other {} servers of the stream are up to date", peers.len()),
        ));
    }
    let advice = "While most of them are away, events are refused: see to those servers.";
    Some(Finding::warning(
        "replicas-behind",
        format!("servers of the stream are away or behind: {}", away.join(", ")),
        advice,
    ))
}
