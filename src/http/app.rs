//! The table of routes, and what every request goes through: admission, authorisation, and no panic that leaves a client
//! without an answer.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use futures_util::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::gate::{Gate, Services};
use super::problem::Problem;
use super::{Options, auth, consumers, dead_letters, events, plugins, replays, status, stream, subscriptions};
use crate::broker::Broker;
use crate::metrics::Metrics;

/// What handlers share. Cheap to clone.
#[derive(Clone)]
pub(super) struct App {
    pub(super) options: Arc<Options>,
    pub(super) metrics: Metrics,
    pub(super) gate: Gate,
    in_progress: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl App {
    pub(super) fn new(options: Options, metrics: Metrics, gate: Gate) -> Self {
        let in_progress = Arc::new(Semaphore::new(options.max_requests.get()));
        let streams = Arc::new(Semaphore::new(options.max_streams.get()));
        Self { options: Arc::new(options), metrics, gate, in_progress, streams }
    }

    /// Room for one more stream, until the answer is dropped.
    ///
    /// # Errors
    /// 503 when there is none.
    pub(super) fn take_stream(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let full = |_| Problem::unavailable("overloaded", format!("{} streams are open", self.options.max_streams));
        Arc::clone(&self.streams).try_acquire_owned().map_err(full)
    }

    /// What is behind the edge.
    ///
    /// # Errors
    /// 503 until it is there.
    pub(super) fn services(&self) -> Result<Arc<Services>, Problem> {
        self.gate.services()
    }

    /// The broker.
    ///
    /// # Errors
    /// 503 until it is there.
    pub(super) fn broker(&self) -> Result<Broker, Problem> {
        self.services().map(|services| services.broker.clone())
    }
}

/// The id or name in a path, percent-decoded.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::malformed(format!("path: is not UTF-8 (got {:?})", parts.uri.path())))?;
        Ok(Self(name))
    }
}

/// Everything that is served.
pub(super) fn router(app: App) -> Router {
    Router::new()
        .route("/v1/events", post(events::publish).get(events::list))
        .route("/v1/events/{id}", get(events::get).delete(events::erase))
        .route("/v1/subscriptions", get(subscriptions::list).post(subscriptions::declare))
        .route("/v1/subscriptions/{name}", delete(subscriptions::remove).patch(subscriptions::patch))
        .route("/v1/dead-letters", get(dead_letters::list))
        .route("/v1/dead-letters/redrive", post(dead_letters::redrive))
        .route("/v1/replays", post(replays::start))
        .route("/v1/plugins", get(plugins::list))
        .route("/v1/plugins/{name}", get(plugins::inspect))
        .route("/v1/plugins/{name}/reload", post(plugins::reload))
        .route("/v1/stream", get(stream::stream))
        .route("/v1/consumers/{name}", get(consumers::get))
        .route("/v1/consumers/{name}/ack", post(consumers::acknowledge))
        .route("/v1/consumers/{name}/seek", post(consumers::seek))
        .route("/v1/stats", get(status::stats))
        .route("/metrics", get(status::metrics))
        .route("/healthz", get(status::live))
        .route("/readyz", get(status::ready))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        // Bodies are read by `body::read`, which has the limit and the words for it.
        .layer(DefaultBodyLimit::disable())
        .with_state(app)
}

async fn unknown_path(request: Request) -> Problem {
    let known = [
        "/v1/events",
        "/v1/stream",
        "/v1/subscriptions",
        "/v1/dead-letters",
        "/v1/replays",
        "/v1/plugins",
        "/v1/stats",
        "/metrics",
    ];
    let hint = super::problem::suggestion(request.uri().path(), known);
    Problem::new(StatusCode::NOT_FOUND, "not_found", format!("nothing is served at {}{hint}", request.uri().path()))
}

async fn unknown_method(method: Method, request: Request) -> Problem {
    let detail = format!("{method} is not served at {}", request.uri().path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail)
}

/// What every request goes through.
async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = match admit(&app, &request) {
        Err(problem) => Err(problem),
        Ok(_permit) => AssertUnwindSafe(next.run(request)).catch_unwind().await.map_err(|_| {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "a fault in tidegate; its log says more")
        }),
    };
    answer.unwrap_or_else(|problem| {
        tracing::debug!(%method, path, code = problem.code(), "a request was refused");
        problem.into_response()
    })
}

/// Room for the request, if its sender may make it. Probes always get through: a busy server still lives.
fn admit(app: &App, request: &Request) -> Result<Option<OwnedSemaphorePermit>, Problem> {
    auth::check(&app.options.tokens, request.method(), request.uri(), request.headers())?;
    if matches!(request.uri().path(), "/healthz" | "/readyz") {
        return Ok(None);
    }
    let permit = Arc::clone(&app.in_progress).try_acquire_owned();
    let full = |_| Problem::unavailable("overloaded", format!("{} requests are in progress", app.options.max_requests));
    permit.map(Some).map_err(full)
}
