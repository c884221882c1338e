//! `POST /v1/replays`: a stretch of the log, delivered again.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use jiff::Timestamp;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::app::App;
use super::body::{self, Members};
use super::problem::Problem;
use crate::broker::Replay;
use crate::error::{Error, Result};
use crate::pattern::Pattern;

/// `POST /v1/replays`.
pub(super) async fn start(State(app): State<App>, headers: HeaderMap, body: Body) -> Result<Json<Value>, Problem> {
    body::require_json(&headers)?;
    let bytes = body::read(body, body::SMALL, app.options.body_timeout).await?;
    let broker = app.broker()?;
    let replay = wanted(body::json(&bytes)?, |name| broker.subscription(name).map(|found| found.subscription.pattern))?;
    let dry_run = replay.dry_run;
    let deliveries = broker.replay(replay).await?;
    Ok(Json(json!({"deliveries": deliveries, "dry_run": dry_run})))
}

/// Reads the request; `own` tells the pattern of the subscription, which is meant unless the request names another.
fn wanted(raw: &RawValue, own: impl Fn(&str) -> Result<Pattern>) -> Result<Replay> {
    let members = Members::of(raw, "")?;
    members.only(&["subscription", "pattern", "from_seq", "to_seq", "from", "to", "dry_run"])?;
    let subscription = members.text("subscription")?;
    let subscription = subscription.ok_or_else(|| Error::invalid("subscription", "", "is required"))?;
    let pattern = members.text("pattern")?.map(|pattern| Pattern::parse(&pattern)).transpose()?;
    let (from_seq, to_seq) = (members.read("from_seq", "a seq")?, members.read("to_seq", "a seq")?);
    let from = members.read::<Timestamp>("from", "an RFC 3339 instant")?;
    let to = members.read::<Timestamp>("to", "an RFC 3339 instant")?;
    let dry_run = members.read("dry_run", "true or false")?.unwrap_or_default();
    let pattern = pattern.map_or_else(|| own(&subscription), Ok)?;
    Ok(Replay { subscription: subscription.into(), pattern, from_seq, to_seq, from, to, missing_only: false, dry_run })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_names_its_subscription_and_means_its_pattern() {
        let own = |_: &str| Pattern::parse("shop.*");
        let read = |text: &str| wanted(&RawValue::from_string(text.to_owned()).unwrap(), own);
        let replay = read(r#"{"subscription":"a","from_seq":3,"dry_run":true}"#).unwrap();
        assert_eq!((replay.from_seq, replay.dry_run, replay.pattern.as_str()), (Some(3), true, "shop.*"));
        let wider = read(r#"{"subscription":"a","pattern":"*"}"#).unwrap();
        assert_eq!(wider.pattern.as_str(), "*");
        for (text, words) in [
            ("{}", "subscription: is required"),
            (r#"{"subscription":"a","from_seq":-1}"#, "from_seq: must be a seq"),
            (r#"{"subscription":"a","pattern":"a..b"}"#, "pattern: a segment cannot be empty"),
            (r#"{"subscription":"a","form":"2026-01-01T00:00:00Z"}"#, "did you mean from?"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
