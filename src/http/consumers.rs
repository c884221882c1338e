//! `/v1/consumers/{name}`: the places in the feed that consumers keep here instead of with themselves.
//!
//! A consumer is nothing but a name and a seq. It comes about when it acknowledges for the first time.

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use serde::Serialize;
use serde_json::value::RawValue;

use super::app::{App, Named};
use super::body::{self, Members};
use super::problem::Problem;
use super::query::Query;
use crate::error::Error;
use crate::event::Seq;

/// A consumer and its place.
#[derive(Serialize)]
pub(super) struct Consumer {
    name: String,
    /// It goes on with what comes after.
    seq: Seq,
}

/// `GET /v1/consumers/{name}`.
pub(super) async fn get(
    State(app): State<App>,
    Named(name): Named,
    RawQuery(raw): RawQuery,
) -> Result<Json<Consumer>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    let seq = app.services()?.feed.acknowledged(&name).await?;
    let seq = seq.ok_or_else(|| Error::not_found("consumer", &name))?;
    Ok(Json(Consumer { name, seq }))
}

/// `POST /v1/consumers/{name}/ack`: everything up to a seq is dealt with. Never goes back.
pub(super) async fn acknowledge(
    State(app): State<App>,
    Named(name): Named,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Consumer>, Problem> {
    let seq = seq(&app, raw, &headers, body).await?;
    let feed = app.services()?.feed.clone();
    feed.acknowledge(&name, seq).await?;
    let seq = feed.acknowledged(&name).await?.unwrap_or(seq);
    Ok(Json(Consumer { name, seq }))
}

/// `POST /v1/consumers/{name}/seek`: goes to a seq, back or forth.
pub(super) async fn seek(
    State(app): State<App>,
    Named(name): Named,
    RawQuery(raw): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Consumer>, Problem> {
    let seq = seq(&app, raw, &headers, body).await?;
    app.services()?.feed.seek(&name, seq).await?;
    Ok(Json(Consumer { name, seq }))
}

/// The one member of the body.
async fn seq(app: &App, raw: Option<String>, headers: &HeaderMap, body: Body) -> Result<Seq, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    body::require_json(headers)?;
    let bytes = body::read(body, body::SMALL, app.options.body_timeout).await?;
    let whole: &RawValue = body::json(&bytes)?;
    let members = Members::of(whole, "")?;
    members.only(&["seq"])?;
    let seq = members.read::<Seq>("seq", "a seq such as 17")?;
    Ok(seq.ok_or_else(|| Error::invalid("seq", "", "is required"))?)
}
