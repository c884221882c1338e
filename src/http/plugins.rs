//! `GET /v1/plugins`: what runs here, and what was refused.

use axum::Json;
use axum::extract::{RawQuery, State};
use serde::Serialize;

use super::app::App;
use super::problem::Problem;
use super::query::Query;
use crate::host::{Host, PluginStatus};

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
