//! `/v1/events`: publishing, listing, reading, erasing.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;

use super::app::{App, Named};
use super::input::{Defaults, Incoming};
use super::problem::Problem;
use super::query::Query;
use super::{body, cloudevents, input};
use crate::broker::EventFilter;
use crate::delivery::{EventDetail, EventRecord, Status};
use crate::error::Error;
use crate::event::{Event, EventId, JSON, Seq, Source, UserId};
use crate::feed::Feed;
use crate::pattern::Pattern;

/// The most events of a batch: they are stored in one step, and everybody else waits for it.
const MAX_BATCH: usize = 10_000;

/// What a request to publish holds.
enum Sent {
    One(Box<Event>),
    Ephemeral(Box<Event>),
    Batch(Vec<Event>),
}

/// `POST /v1/events`.
pub(super) async fn publish(
    State(app): State<App>,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let services = app.services()?;
    let broker = &services.broker;
    let wait = wait(&Query::parse(raw.as_deref(), &["wait"])?, app.options.max_wait)?;
    let bytes = body::read(body, app.options.max_body.as_u64(), app.options.body_timeout).await?;
    let defaults = Defaults {
        instance_id: broker.options().instance_id.as_str().into(),
        trace_parent: input::trace_parent_of(&headers),
        max_payload: broker.options().max_payload,
    };
    let accepted = StatusCode::ACCEPTED;
    match (sent(&headers, bytes, &defaults)?, wait) {
        (Sent::One(event), None) => Ok((accepted, Json(broker.publish(*event).await?)).into_response()),
        (Sent::One(event), Some(wait)) => Ok(Json(broker.publish_sync(*event, wait).await?.detail).into_response()),
        (Sent::Ephemeral(event), None) => Ok((accepted, Json(show(&services.feed, *event)?)).into_response()),
        (Sent::Ephemeral(_), Some(_)) => {
            Err(Problem::malformed("wait: an ephemeral event is not handled, so that there is nothing to wait for"))
        }
        (Sent::Batch(events), None) => Ok((accepted, Json(broker.publish_batch(events).await?)).into_response()),
        (Sent::Batch(_), Some(_)) => Err(Problem::malformed("wait: a batch cannot be waited for, publish one event")),
    }
}

/// What the publisher of an ephemeral event is told: the members of [`Published`](crate::broker::Published).
#[derive(Serialize)]
struct Shown {
    id: EventId,
    seq: Option<Seq>,
    status: Status,
    duplicate: bool,
}

/// Shows an event to those who follow the feed now.
fn show(feed: &Feed, event: Event) -> Result<Shown, Error> {
    let id = event.id.clone();
    feed.publish_ephemeral(event)?;
    Ok(Shown { id, seq: None, status: Status::Completed, duplicate: false })
}

fn wait(query: &Query, longest: Duration) -> Result<Option<Duration>, Problem> {
    let wait = query.duration("wait")?;
    match query.text("wait").filter(|_| wait.is_some_and(|wait| wait > longest)) {
        Some(text) => Err(Problem::query("wait", text, format!("must be at most {longest:?}"))),
        None => Ok(wait),
    }
}

/// Which of the forms this is, and what it holds.
fn sent(headers: &HeaderMap, bytes: Bytes, defaults: &Defaults) -> Result<Sent, Problem> {
    if cloudevents::is_binary(headers) {
        return Ok(Sent::One(Box::new(cloudevents::binary(headers, bytes, defaults)?)));
    }
    match body::media_type(headers)?.as_deref() {
        Some(JSON) => read(&bytes, input::event, defaults),
        Some(cloudevents::STRUCTURED | cloudevents::BATCH) => {
            let kept = |event| Incoming { event, is_ephemeral: false };
            read(&bytes, |raw, field, defaults| cloudevents::structured(raw, field, defaults).map(kept), defaults)
        }
        Some(other) => Err(body::unsupported(format!(
            "content-type {other} is not served here: send application/json, application/cloudevents+json or \
             application/cloudevents-batch+json"
        ))),
        None => Err(body::unsupported("content-type is missing: send application/json")),
    }
}

/// One event from an object, several from an array.
fn read(
    bytes: &[u8],
    parse: impl Fn(&RawValue, &str, &Defaults) -> crate::Result<Incoming>,
    defaults: &Defaults,
) -> Result<Sent, Problem> {
    let whole: &RawValue = body::json(bytes)?;
    if !whole.get().starts_with('[') {
        let Incoming { event, is_ephemeral } = parse(whole, "", defaults)?;
        return Ok(if is_ephemeral { Sent::Ephemeral(event.into()) } else { Sent::One(event.into()) });
    }
    let entries: Vec<&RawValue> = body::json(whole.get().as_bytes())?;
    if entries.len() > MAX_BATCH {
        let reason = format!("a batch holds at most {MAX_BATCH} events");
        return Err(Error::invalid("body", format!("{} events", entries.len()), reason).into());
    }
    let kept = |(index, raw): (usize, &&RawValue)| match parse(raw, &format!("[{index}]"), defaults) {
        Ok(Incoming { is_ephemeral: false, event }) => Ok(event),
        Ok(_) => {
            let reason = "must be sent alone: a batch is kept";
            Err(input::at(index, Error::invalid("ephemeral", "true", reason)))
        }
        Err(error) => Err(input::at(index, error)),
    };
    Ok(Sent::Batch(entries.iter().enumerate().map(kept).collect::<crate::Result<_>>()?))
}

#[derive(Serialize)]
pub(super) struct Page {
    events: Vec<EventRecord>,
    next_cursor: Option<String>,
}

/// What `GET /v1/events` filters by.
const FILTERS: [&str; 12] = [
    "type",
    "source",
    "status",
    "user_id",
    "schema",
    "entity",
    "operation",
    "instance_id",
    "from",
    "to",
    "limit",
    "cursor",
];

/// `GET /v1/events`.
pub(super) async fn list(State(app): State<App>, RawQuery(raw): RawQuery) -> Result<Json<Page>, Problem> {
    let query = Query::parse(raw.as_deref(), &FILTERS)?;
    let page = app.broker()?.events(&filter(&query)?).await?;
    Ok(Json(Page { events: page.records, next_cursor: page.next.map(|seq| seq.to_string()) }))
}

fn filter(query: &Query) -> Result<EventFilter, Problem> {
    Ok(EventFilter {
        pattern: query.parsed("type", Pattern::parse)?,
        source: query.parsed("source", Source::parse)?,
        status: query.parsed("status", Status::parse)?,
        user_id: query.text("user_id").map(user_id),
        schema: query.owned("schema"),
        entity: query.owned("entity"),
        operation: query.owned("operation"),
        instance_id: query.owned("instance_id"),
        from: query.instant("from")?,
        to: query.instant("to")?,
        before: query.parsed("cursor", |text| {
            text.parse().map_err(|_| "is no cursor: pass what an earlier page gave as next_cursor")
        })?,
        limit: query.limit()?,
    })
}

/// A query has no types: what reads as an integer is one.
pub(super) fn user_id(text: &str) -> UserId {
    text.parse().map_or_else(|_| UserId::Text(text.into()), UserId::Number)
}

/// `GET /v1/events/{id}`.
pub(super) async fn get(State(app): State<App>, Named(id): Named) -> Result<Json<EventDetail>, Problem> {
    Ok(Json(app.broker()?.event(&id).await?))
}

/// `DELETE /v1/events/{id}`.
pub(super) async fn erase(State(app): State<App>, Named(id): Named) -> Result<StatusCode, Problem> {
    app.broker()?.erase(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
