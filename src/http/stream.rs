//! `/v1/stream`: the feed as server-sent events.
//!
//! Framing only: what a client is told, and in which order, the [`Feed`](crate::feed::Feed) decides. The next frames are
//! asked for when the connection has room for them, so that a slow client holds a few frames and nothing else.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;

use super::app::App;
use super::events::user_id;
use super::problem::Problem;
use super::query::Query;
use crate::error::Error;
use crate::event::{Seq, Source};
use crate::feed::{Entry, Filter, Frame, Position, Request, Subscriber};
use crate::pattern::Pattern;

/// How long a stream is silent before it says that it is still there. Proxies cut what is silent for half a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// When a browser should come back after a stream has ended, in milliseconds.
const RECONNECT: u32 = 1_000;

/// How much is written at once, in bytes. One event may be more.
const CHUNK: usize = 64 * 1024;

/// What a stream may be asked for. `pattern` may be given several times.
const PARAMETERS: [&str; 6] = ["pattern", "source", "user_id", "since", "consumer", "epoch"];

/// What `since` says where the consumer's own place is meant.
const LAST_ACKNOWLEDGED: &str = "last-acknowledged";

/// The most patterns of one stream: each is tried on every event.
const MAX_PATTERNS: usize = 64;

/// Names the log that the seqs of this stream are of.
const EPOCH: HeaderName = HeaderName::from_static("tidegate-epoch");

/// The seq of the last frame that a client got before it came again.
const LAST_EVENT_ID: &str = "last-event-id";

/// `GET /v1/stream`.
pub(super) async fn stream(
    State(app): State<App>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let feed = app.services()?.feed.clone();
    let request = request(&Query::parse_repeatable(raw.as_deref(), &PARAMETERS, &["pattern"])?, &headers)?;
    let place = app.take_stream()?;
    let subscriber = feed.subscribe(request).await?;
    let epoch = HeaderValue::from_str(subscriber.epoch()).ok();
    let frames = stream::unfold(Outgoing::new(subscriber, place), Outgoing::chunk);
    let mut response = Body::from_stream(frames).into_response();
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Known to nginx and those who follow it: hand frames on as they come.
    fields.insert("x-accel-buffering", HeaderValue::from_static("no"));
    epoch.and_then(|epoch| fields.insert(EPOCH, epoch));
    Ok(response)
}

fn request(query: &Query, headers: &HeaderMap) -> Result<Request, Error> {
    let count = query.all("pattern").count();
    if count > MAX_PATTERNS {
        let reason = format!("may be given at most {MAX_PATTERNS} times");
        return Err(Error::invalid("pattern", count.to_string(), reason));
    }
    let filter = Filter {
        patterns: query.all("pattern").map(Pattern::parse).collect::<Result<_, _>>()?,
        source: query.text("source").map(Source::parse).transpose()?,
        user_id: query.text("user_id").map(user_id),
    };
    // Read even where the header wins: a bad value is refused, never ignored.
    let since = since(query.text("since"), query.text("consumer"))?;
    let position = last_event_id(headers)?.or(since).unwrap_or_default();
    Ok(Request { filter, position, epoch: query.owned("epoch") })
}

/// Where a client asks to begin.
fn since(since: Option<&str>, consumer: Option<&str>) -> Result<Option<Position>, Error> {
    match (since, consumer) {
        (None | Some(LAST_ACKNOWLEDGED), Some(name)) => Ok(Some(Position::Acknowledged(name.into()))),
        (Some(LAST_ACKNOWLEDGED), None) => {
            Err(Error::invalid("since", LAST_ACKNOWLEDGED, "needs a consumer, whose place is meant"))
        }
        (Some(_), Some(name)) => {
            Err(Error::invalid("consumer", name, "cannot be given beside a since other than last-acknowledged"))
        }
        (since, None) => since.map(Position::parse).transpose(),
    }
}

/// Where a client that comes again got to. An empty header is none: so browsers begin.
fn last_event_id(headers: &HeaderMap) -> Result<Option<Position>, Error> {
    let Some(value) = headers.get(LAST_EVENT_ID).filter(|value| !value.is_empty()) else { return Ok(None) };
    let refuse = |text: &str| Error::invalid("Last-Event-ID", text, "must be a seq, as this stream gives it as id");
    let text = value.to_str().map_err(|_| refuse(&String::from_utf8_lossy(value.as_bytes())))?;
    match Position::parse(text) {
        Ok(Position::After(seq)) => Ok(Some(Position::After(seq))),
        _ => Err(refuse(text)),
    }
}

/// What is on its way to one client.
struct Outgoing {
    subscriber: Subscriber,
    frames: std::vec::IntoIter<Frame>,
    /// The last id that was written; `None` before the first.
    told: Option<Seq>,
    /// Free again when the client has gone.
    _place: OwnedSemaphorePermit,
}

impl Outgoing {
    fn new(subscriber: Subscriber, place: OwnedSemaphorePermit) -> Self {
        Self { subscriber, frames: Vec::new().into_iter(), told: None, _place: place }
    }

    /// The next piece of the body, and what comes after it.
    async fn chunk(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let mut text = Vec::new();
        if self.told.is_none() {
            // At once, so that a client knows that it is heard, and comes back to this place even if it is told nothing.
            text.extend_from_slice(format!("retry: {RECONNECT}\n").as_bytes());
            self.write_place(&mut text);
        } else if self.frames.as_slice().is_empty() {
            match tokio::time::timeout(KEEP_ALIVE, self.subscriber.next()).await {
                Ok(frames) => self.frames = frames?.into_iter(),
                Err(_) => self.write_keep_alive(&mut text),
            }
        }
        while text.len() < CHUNK
            && let Some(frame) = self.frames.next()
        {
            self.write(&frame, &mut text);
        }
        Some((Ok(text.into()), self))
    }

    fn write(&mut self, frame: &Frame, text: &mut Vec<u8>) {
        match frame {
            Frame::Event(entry) => {
                if let Some(seq) = entry.seq() {
                    self.told = Some(seq);
                    text.extend_from_slice(format!("id: {seq}\n").as_bytes());
                }
                write_data(entry, text);
            }
            Frame::Reset { from_seq } => {
                let id = from_seq.saturating_sub(1);
                self.told = Some(id);
                let data = format!(r#"{{"type":"feed_reset","from_seq":{from_seq}}}"#);
                text.extend_from_slice(format!("id: {id}\nevent: reset\ndata: {data}\n\n").as_bytes());
            }
        }
    }

    /// A comment, and how far the client has come where nothing since was for it.
    fn write_keep_alive(&mut self, text: &mut Vec<u8>) {
        text.extend_from_slice(b": keep-alive\n");
        if self.told == Some(self.subscriber.cursor()) {
            text.push(b'\n');
        } else {
            self.write_place(text);
        }
    }

    /// An id without data: browsers keep it and tell nobody.
    fn write_place(&mut self, text: &mut Vec<u8>) {
        let seq = self.subscriber.cursor();
        self.told = Some(seq);
        text.extend_from_slice(format!("id: {seq}\n\n").as_bytes());
    }
}

/// The data of a frame. A payload may hold line breaks, as white space of its JSON: each line is a field of its own.
fn write_data(entry: &Entry, text: &mut Vec<u8>) {
    for line in entry.json().split(|&byte| matches!(byte, b'\n' | b'\r')) {
        text.extend_from_slice(b"data: ");
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;
    use tokio::time::Instant;

    use super::*;
    use crate::event::{Event, Payload};
    use crate::feed::Feed;
    use crate::metrics::Metrics;
    use crate::provider::memory::{MemoryProvider, Options};
    use crate::provider::{Append, Provider};

    async fn append(provider: &dyn Provider, event_type: &str) {
        let event = Event::new(Source::System, event_type.parse().unwrap(), Payload::default());
        provider.append(vec![Append { event: Arc::new(event), subscriptions: Arc::default() }]).await.unwrap();
    }

    async fn next(outgoing: Outgoing) -> (String, Outgoing) {
        let (bytes, outgoing) = outgoing.chunk().await.unwrap();
        (String::from_utf8(bytes.unwrap().to_vec()).unwrap(), outgoing)
    }

    /// BEHAVIOURS I12.
    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_says_that_it_is_there_and_how_far_it_has_come() {
        let provider: Arc<dyn Provider> = Arc::new(MemoryProvider::open(Options::default()).unwrap());
        let (feed, service) = Feed::new(Arc::clone(&provider), Metrics::default());
        tokio::spawn(service.run(std::future::pending()));
        let filter = Filter { patterns: vec!["meant".parse().unwrap()], ..Filter::default() };
        let subscriber = feed.subscribe(Request { filter, ..Request::default() }).await.unwrap();
        let place = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let (first, outgoing) = next(Outgoing::new(subscriber, place)).await;
        assert_eq!(first, "retry: 1000\nid: 0\n\n");

        let began = Instant::now();
        let (silence, outgoing) = next(outgoing).await;
        assert_eq!((silence.as_str(), began.elapsed().as_secs()), (": keep-alive\n\n", 15));
        append(&*provider, "passed.over").await;
        append(&*provider, "passed.over").await;
        let (place, outgoing) = next(outgoing).await;
        assert_eq!((place.as_str(), began.elapsed().as_secs()), (": keep-alive\nid: 2\n\n", 30));
        let (again, outgoing) = next(outgoing).await;
        assert_eq!(again, ": keep-alive\n\n");
        append(&*provider, "meant").await;
        let (event, _) = next(outgoing).await;
        assert!(event.starts_with("id: 3\ndata: {") && event.ends_with("}\n\n"), "{event}");
    }
}
