//! What is not kept in memory, from the stream: payloads of older events, and the heavy parts of attempts.

use std::collections::HashMap;
use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use super::Shared;
use super::core::Spot;
use super::entry::{Facts, Heavy, read_event};
use crate::delivery::Delivery;
use crate::error::Result;
use crate::event::{Event, Seq};
use crate::provider::Claimed;

/// How many messages are asked for at once.
const AT_ONCE: usize = 64;

/// The headers and the body of a piece.
type Message = (HeaderMap, Bytes);

impl Shared {
    /// These events with their payloads; `None` for one that was removed meanwhile.
    pub(super) async fn full(&self, events: Vec<Arc<Event>>) -> Result<Vec<Option<Arc<Event>>>> {
        let spots: Vec<Option<Spot>> = {
            let core = self.core.lock();
            let spot = |event: &Arc<Event>| {
                let place = core.places.get(&event.seq?)?;
                place.is_bare.then(|| place.event.clone())
            };
            events.iter().map(spot).collect()
        };
        if spots.iter().all(Option::is_none) {
            return Ok(events.into_iter().map(Some).collect());
        }
        let full = events.into_iter().zip(spots).map(|(event, spot)| async move {
            let Some(spot) = spot else { return Ok(Some(event)) };
            let Some((headers, body)) = self.message(&spot).await? else { return Ok(None) };
            Ok(read_event(&Facts::read(&headers), body, event.seq).map(|append| append.event))
        });
        stream::iter(full).buffered(AT_ONCE).try_collect().await
    }

    /// What was claimed with the payloads of its events, without those that were removed meanwhile.
    pub(super) async fn with_events(&self, mut claimed: Claimed) -> Result<Claimed> {
        let events = self.full(claimed.leases.iter().map(|lease| Arc::clone(&lease.event)).collect()).await?;
        let leases = claimed.leases.into_iter().zip(events);
        claimed.leases =
            leases.filter_map(|(lease, event)| Some(crate::provider::Lease { event: event?, ..lease })).collect();
        Ok(claimed)
    }

    /// These deliveries of events with the heavy parts of their attempts.
    pub(super) async fn with_records(&self, mut deliveries: Vec<(Seq, Delivery)>) -> Result<Vec<Delivery>> {
        let mut spots = HashMap::new();
        {
            let core = self.core.lock();
            for (at, (seq, delivery)) in deliveries.iter().enumerate() {
                let records = core.places.get(seq).into_iter().flat_map(|place| &place.records);
                for (_, number, spot) in records.filter(|(name, ..)| *name == delivery.subscription) {
                    spots.insert((at, *number), spot.clone());
                }
            }
        }
        let fetched =
            spots.into_iter().map(|(key, spot)| async move { self.message(&spot).await.map(|message| (key, message)) });
        let fetched: Vec<(_, Option<Message>)> = stream::iter(fetched).buffer_unordered(AT_ONCE).try_collect().await?;
        for ((at, number), message) in fetched {
            let heavy = message.and_then(|(_, body)| serde_json::from_slice::<Heavy>(&body).ok());
            let attempts = deliveries.get_mut(at).into_iter().flat_map(|(_, delivery)| &mut delivery.attempts);
            if let (Some(heavy), Some(attempt)) = (heavy, attempts.into_iter().find(|attempt| attempt.number == number))
            {
                heavy.put(attempt);
            }
        }
        Ok(deliveries.into_iter().map(|(_, delivery)| delivery).collect())
    }

    /// The piece that stands in these messages; `None` when one is gone.
    async fn message(&self, spot: &Spot) -> Result<Option<Message>> {
        let (mut headers, mut body) = (HeaderMap::new(), BytesMut::new());
        let places = spot.places();
        for (at, &place) in places.iter().enumerate() {
            let Some(message) = self.stored(place).await? else { return Ok(None) };
            if at == 0 {
                headers = message.headers;
            }
            if places.len() == 1 {
                return Ok(Some((headers, Bytes::copy_from_slice(&message.payload))));
            }
            body.extend_from_slice(&message.payload);
        }
        Ok(Some((headers, body.freeze())))
    }

    /// A message of the log.
    pub(super) async fn stored(&self, place: u64) -> Result<Option<StreamMessage>> {
        self.stored_in(&self.link.names.log, place).await
    }

    /// A message of a stream, from any server that has it, or from the one that surely would.
    pub(super) async fn stored_in(&self, stream: &str, place: u64) -> Result<Option<StreamMessage>> {
        const ACTION: &str = "fetch a message";
        self.link.check_connected(ACTION)?;
        let stream = self.link.answer(ACTION, self.link.context.get_stream_no_info(stream)).await?;
        let stream = stream.map_err(|error| self.link.failed(ACTION, &error.to_string()))?;
        if let Ok(message) = self.link.answer(ACTION, stream.direct_get(place)).await? {
            return Ok(Some(message));
        }
        use async_nats::jetstream::ErrorCode;
        use async_nats::jetstream::stream::RawMessageErrorKind as Kind;
        match self.link.answer(ACTION, stream.get_raw_message(place)).await? {
            Ok(message) => Ok(Some(message)),
            Err(error) => match error.kind() {
                Kind::NoMessageFound => Ok(None),
                Kind::JetStream(error)
                    if matches!(error.error_code(), ErrorCode::STREAM_NOT_FOUND | ErrorCode::NO_MESSAGE_FOUND) =>
                {
                    Ok(None)
                }
                _ => Err(self.link.failed(ACTION, &error.to_string())),
            },
        }
    }
}
