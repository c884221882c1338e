//! The application: a table of users, its routes, and the hooks around what they do.

use std::path::Path;
use std::sync::Arc;

use axum::extract::{Path as Part, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use tidegate::broker::{Broker, Options};
use tidegate::capture::CrudHooks;
use tidegate::capture::hooks::{Actor, HookOptions, Operation};
use tidegate::cli::follow::Follower;
use tidegate::event::UserId;
use tidegate::host::{self, Folder, Host};
use tidegate::provider::Provider;
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{Metrics, Result};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A user as clients send one.
#[derive(Serialize, Deserialize)]
pub(crate) struct NewUser {
    name: String,
    email: String,
}

/// A user as it is stored.
#[derive(Serialize, sqlx::FromRow)]
pub(crate) struct User {
    id: i64,
    name: String,
    email: String,
}

/// The application and the broker in it.
pub(crate) struct App {
    users: Users,
    provider: Arc<SqliteProvider>,
    /// Dropped to stop the broker.
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<()>>,
}

/// What every request needs.
#[derive(Clone)]
struct Users {
    pool: SqlitePool,
    hooks: CrudHooks,
}

impl App {
    /// Opens the file, and loads the plugins of the folder.
    pub(crate) async fn open(file: &Path, plugins: Option<&Path>) -> anyhow::Result<Self> {
        let url = format!("sqlite://{}", file.display());
        let provider = Arc::new(SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await?);
        let options = Options { instance_id: "signup".to_owned(), ..Options::default() };
        let (broker, service) =
            Broker::open(Arc::clone(&provider) as Arc<dyn Provider>, options, Metrics::default()).await?;
        if let Some(plugins) = plugins {
            bind(&broker, plugins).await?;
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(service.run(async { drop(stopped.await) }));
        let pool = SqlitePool::connect_with(SqliteConnectOptions::new().filename(file)).await?;
        let table = "CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, email TEXT NOT NULL)";
        sqlx::query(table).execute(&pool).await?;
        let hooks = CrudHooks::new(broker, "shop", "users", HookOptions::default())?;
        Ok(Self { users: Users { pool, hooks }, provider, stop, running })
    }

    /// The routes.
    pub(crate) fn router(&self) -> Router {
        let one = get(read).put(update).delete(delete);
        Router::new().route("/users", post(create)).route("/users/{id}", one).with_state(self.users.clone())
    }

    /// Lets what is in progress finish.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        drop(self.stop);
        self.running.await??;
        self.users.pool.close().await;
        Ok(self.provider.close().await?)
    }
}

/// Subscribes what the folder's plugins ask for.
async fn bind(broker: &Broker, plugins: &Path) -> anyhow::Result<()> {
    let granted = r#"
        [signup-guard]
        grants = { config = ["blocked-domains"] }
        config = { blocked-domains = "spam.example" }
    "#;
    let host = Host::new(host::Options { plugins: toml::from_str(granted)?, ..host::Options::default() }, None)?;
    let folder = Folder::open(host.clone(), plugins)?;
    Follower::new(host, folder, broker.clone()).look().await?;
    Ok(())
}

/// Whoever the proxy in front says it is.
fn actor(headers: &HeaderMap) -> Actor {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    Actor {
        user_id: text("x-user-id").map(|id| id.parse().map_or_else(|_| UserId::Text(id.into()), UserId::Number)),
        user_name: text("x-user-name"),
        trace_parent: text("traceparent"),
        ..Actor::default()
    }
}

/// Why nothing was done.
enum Refusal {
    Vetoed(tidegate::capture::hooks::Veto),
    NotFound,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl axum::response::IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Vetoed(veto) => (StatusCode::UNPROCESSABLE_ENTITY, Json(veto)).into_response(),
            Self::NotFound => StatusCode::NOT_FOUND.into_response(),
            Self::Database(error) => {
                (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": error.to_string()}))).into_response()
            }
        }
    }
}

async fn create(State(users): State<Users>, headers: HeaderMap, Json(new): Json<NewUser>) -> Result<Response, Refusal> {
    let actor = actor(&headers);
    users.hooks.before(&Operation::create(&new), &actor).await.map_err(Refusal::Vetoed)?;
    let insert = sqlx::query_as("INSERT INTO users (name, email) VALUES (?, ?) RETURNING id, name, email");
    let user: User = insert.bind(&new.name).bind(&new.email).fetch_one(&users.pool).await?;
    users.hooks.after(&Operation::create(&user), &actor).await;
    Ok((StatusCode::CREATED, Json(user)).into_response())
}

async fn read(State(users): State<Users>, headers: HeaderMap, Part(id): Part<i64>) -> Result<Json<User>, Refusal> {
    let select = sqlx::query_as("SELECT id, name, email FROM users WHERE id = ?").bind(id);
    let user: User = select.fetch_optional(&users.pool).await?.ok_or(Refusal::NotFound)?;
    // Switched off unless the options say otherwise.
    users.hooks.after(&Operation::read(&user), &actor(&headers)).await;
    Ok(Json(user))
}

async fn update(
    State(users): State<Users>,
    headers: HeaderMap,
    Part(id): Part<i64>,
    Json(new): Json<NewUser>,
) -> Result<Json<User>, Refusal> {
    let (actor, operation) = (actor(&headers), Operation::update(&id, &new));
    users.hooks.before(&operation, &actor).await.map_err(Refusal::Vetoed)?;
    let update = sqlx::query_as("UPDATE users SET name = ?, email = ? WHERE id = ? RETURNING id, name, email");
    let updated = update.bind(&new.name).bind(&new.email).bind(id).fetch_optional(&users.pool).await?;
    let user: User = updated.ok_or(Refusal::NotFound)?;
    users.hooks.after(&operation, &actor).await;
    Ok(Json(user))
}

async fn delete(State(users): State<Users>, headers: HeaderMap, Part(id): Part<i64>) -> Result<StatusCode, Refusal> {
    let (actor, operation) = (actor(&headers), Operation::delete(&id));
    users.hooks.before(&operation, &actor).await.map_err(Refusal::Vetoed)?;
    let deleted = sqlx::query("DELETE FROM users WHERE id = ?").bind(id).execute(&users.pool).await?;
    if deleted.rows_affected() == 0 {
        return Err(Refusal::NotFound);
    }
    users.hooks.after(&operation, &actor).await;
    Ok(StatusCode::NO_CONTENT)
}
