//! A web application whose users are hooked: a plugin may veto a new user, and every change is told.
//!
//! ```text
//! make plugins
//! cargo run --example signup -- target/plugins
//! curl -i localhost:3000/users -H 'content-type: application/json' -d '{"name":"Ada","email":"ada@example.org"}'
//! curl -i localhost:3000/users -H 'content-type: application/json' -d '{"name":"Eve","email":"eve@mailinator.com"}'
//! ```
//!
//! The first is stored (201); of the second the plugin `signup-guard` says why not (422). Users and events stand in one
//! SQLite file, so that it runs anywhere. With PostgreSQL the pool and the provider are others, and the hooks the same.

mod app;

use std::path::PathBuf;

use app::App;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let plugins = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = std::env::current_dir()?;
    let app = App::open(&folder.join("signup.db"), plugins.as_deref()).await?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    println!("users at http://{}/users, events in signup.db", listener.local_addr()?);
    axum::serve(listener, app.router()).with_graceful_shutdown(async { drop(tokio::signal::ctrl_c().await) }).await?;
    app.close().await
}
