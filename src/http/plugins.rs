//! `/v1/plugins`: what runs here, what was refused, and reloading on demand.

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use serde::Serialize;

use super::app::{App, Named};
use super::body;
use super::problem::Problem;
use super::query::Query;
use crate::error::Error;
use crate::host::{Host, PluginDetail, PluginStatus, Reloaded};

#[derive(Serialize)]
pub(super) struct Listing {
    plugins: Vec<PluginStatus>,
}

/// `GET /v1/plugins`.
pub(super) async fn list(State(app): State<App>, RawQuery(raw): RawQuery) -> Result<Json<Listing>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    let plugins = app.services()?.host.as_ref().map(Host::plugins).unwrap_or_default();
    Ok(Json(Listing { plugins }))
}

/// `GET /v1/plugins/{name}`.
pub(super) async fn inspect(
    State(app): State<App>,
    Named(name): Named,
    RawQuery(raw): RawQuery,
) -> Result<Json<PluginDetail>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    let services = app.services()?;
    let host = services.host.as_ref().ok_or_else(|| Error::not_found("plugin", &name))?;
    Ok(Json(host.inspect(&name)?))
}

/// `POST /v1/plugins/{name}/reload`: answers once what the folder holds is in force.
pub(super) async fn reload(
    State(app): State<App>,
    Named(name): Named,
    RawQuery(raw): RawQuery,
    body: Body,
) -> Result<Json<Reloaded>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    if !body::read(body, body::SMALL, app.options.body_timeout).await?.is_empty() {
        return Err(Problem::malformed("body: must be empty, since a reload takes nothing"));
    }
    let services = app.services()?;
    let reloader = services.reloader.as_ref().ok_or_else(|| Error::not_found("plugin", &name))?;
    Ok(Json(reloader.reload(&name).await?))
}
