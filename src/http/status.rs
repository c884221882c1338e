//! How tidegate fares: figures, metrics, and the two probes.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::app::App;
use super::problem::Problem;
use super::query::Query;
use crate::broker::BrokerStats;

/// The media type of the text that [`Metrics::encode`](crate::metrics::Metrics::encode) writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `GET /v1/stats`.
pub(super) async fn stats(State(app): State<App>, RawQuery(raw): RawQuery) -> Result<Json<BrokerStats>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    Ok(Json(app.broker()?.stats().await?))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], app.metrics.encode())
}

/// `GET /healthz`: the process lives.
pub(super) async fn live() -> impl IntoResponse {
    Json(json!({"status": "ok"}))
}

/// `GET /readyz`: everything behind the edge is there, or why not.
pub(super) async fn ready(State(app): State<App>) -> Response {
    let reasons = app.gate.reasons();
    if reasons.is_empty() {
        return Json(json!({"status": "ready"})).into_response();
    }
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reasons.join(", ")).into_response()
}
