//! `/v1/subscriptions`: who gets what, and the operator's knobs.

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::app::{App, Named};
use super::body::{self, Members};
use super::problem::{Problem, suggestion};
use super::query::Query;
use crate::broker::{SubscriptionPatch, SubscriptionStatus};
use crate::error::{Error, Result};
use crate::subscription::{HandlerRef, Subscription};

#[derive(Serialize)]
pub(super) struct Listing {
    subscriptions: Vec<SubscriptionStatus>,
}

/// `GET /v1/subscriptions`.
pub(super) async fn list(State(app): State<App>, RawQuery(raw): RawQuery) -> Result<Json<Listing>, Problem> {
    Query::parse(raw.as_deref(), &[])?;
    Ok(Json(Listing { subscriptions: app.broker()?.subscriptions() }))
}

/// `POST /v1/subscriptions`: adds or replaces one.
pub(super) async fn declare(
    State(app): State<App>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<SubscriptionStatus>), Problem> {
    let subscription: Subscription = read(&app, &headers, body, &["name", "pattern"]).await?;
    if let HandlerRef::Plugin(plugin) = &subscription.handler {
        let reason = "must be native: the subscriptions of a plugin are what its manifest says";
        return Err(Error::invalid("handler", format!("plugin:{plugin}"), reason).into());
    }
    let (broker, name) = (app.broker()?, subscription.name.clone());
    broker.declare(subscription).await?;
    Ok((StatusCode::CREATED, Json(broker.subscription(&name)?)))
}

/// `PATCH /v1/subscriptions/{name}`.
pub(super) async fn patch(
    State(app): State<App>,
    Named(name): Named,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<SubscriptionStatus>, Problem> {
    let patch: SubscriptionPatch = read(&app, &headers, body, &[]).await?;
    Ok(Json(app.broker()?.patch_subscription(&name, patch).await?))
}

/// `DELETE /v1/subscriptions/{name}`.
pub(super) async fn remove(State(app): State<App>, Named(name): Named) -> Result<StatusCode, Problem> {
    app.broker()?.unsubscribe(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn read<T: DeserializeOwned>(
    app: &App,
    headers: &HeaderMap,
    body: Body,
    required: &[&'static str],
) -> Result<T, Problem> {
    body::require_json(headers)?;
    let bytes = body::read(body, body::SMALL, app.options.body_timeout).await?;
    Ok(typed(body::json(&bytes)?, required)?)
}

/// The object as a `T`, which knows its own members; what it says about one becomes an error that names it.
fn typed<T: DeserializeOwned>(raw: &RawValue, required: &[&'static str]) -> Result<T> {
    let members = Members::of(raw, "")?;
    if let Some(missing) = required.iter().find(|name| members.raw(name).is_none()) {
        return Err(Error::invalid(*missing, "", "is required"));
    }
    let mut reader = serde_json::Deserializer::from_str(raw.get());
    serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let words = error.inner().to_string();
        let words = words.split(" at line ").next().unwrap_or_default();
        let (field, reason) = explained(&path, words);
        let value = members.raw(field.split('.').next().unwrap_or_default()).map_or("", |raw| raw.get());
        Error::invalid(field.clone(), value, reason)
    })
}

/// Field and reason, from where a reader stopped and what it said.
fn explained(path: &str, words: &str) -> (String, String) {
    let quoted: Vec<&str> = words.split('`').skip(1).step_by(2).collect();
    match quoted.split_first() {
        Some((given, known)) if words.starts_with("unknown field") => {
            let field = if path == "." || path.ends_with(given) { path } else { &format!("{path}.{given}") };
            let field = if field == "." { given } else { field };
            let hint = suggestion(given, known.iter().copied());
            (field.to_owned(), format!("is not a field that may be given{hint}"))
        }
        _ => (path.to_owned(), words.strip_prefix(&format!("{path}: ")).unwrap_or(words).to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_subscription_is_named() {
        let rows = [
            (r#"{"pattern":"*"}"#, "name: is required"),
            (
                r#"{"name":"a","pattern":"*","concurency":4}"#,
                "concurency: is not a field that may be given; did you mean concurrency?",
            ),
            (r#"{"name":"a","pattern":"a..b"}"#, "pattern: a segment cannot be empty"),
            (r#"{"name":"a","pattern":"*","concurrency":0}"#, "concurrency: "),
            (r#"{"name":"a","pattern":"*","retry":{"max_retrys":1}}"#, "retry.max_retrys: is not a field"),
            (r#"{"name":"a","pattern":"*","timeout":"soon"}"#, "timeout: "),
        ];
        for (text, words) in rows {
            let raw = RawValue::from_string(text.to_owned()).unwrap();
            let error = typed::<Subscription>(&raw, &["name", "pattern"]).unwrap_err().to_string();
            assert!(error.starts_with(words), "{text}: {error}");
        }
    }
}
