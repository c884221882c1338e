//! `/v1/dead-letters`: what failed for good, and giving it another chance.

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::app::App;
use super::body::{self, Members};
use super::problem::Problem;
use super::query::Query;
use crate::broker::{DeadLetter, DeadLetterFilter};
use crate::delivery::Verdict;
use crate::error::{Error, Result};
use crate::pattern::Pattern;

#[derive(Serialize)]
pub(super) struct Page {
    dead_letters: Vec<DeadLetter>,
    next_cursor: Option<String>,
}

/// What both calls filter by.
const FILTERS: [&str; 6] = ["subscription", "event_id", "type", "verdict", "digest", "since"];

/// `GET /v1/dead-letters`.
pub(super) async fn list(State(app): State<App>, RawQuery(raw): RawQuery) -> Result<Json<Page>, Problem> {
    let [subscription, event_id, pattern, verdict, digest, since] = FILTERS;
    let known = [subscription, event_id, pattern, verdict, digest, since, "limit", "cursor"];
    let query = Query::parse(raw.as_deref(), &known)?;
    let filter = DeadLetterFilter {
        subscription: query.owned("subscription"),
        event_id: query.owned("event_id"),
        pattern: query.parsed("type", Pattern::parse)?,
        verdict: query.parsed("verdict", Verdict::parse)?,
        digest: query.owned("digest"),
        since: query.instant("since")?,
        after: query.parsed("cursor", |text| {
            cursor(text).ok_or("is no cursor: pass what an earlier page gave as next_cursor")
        })?,
        limit: query.limit()?,
    };
    let page = app.broker()?.dead_letters(&filter).await?;
    let next_cursor = page.next.map(|(seq, subscription)| format!("{seq}:{subscription}"));
    Ok(Json(Page { dead_letters: page.letters, next_cursor }))
}

fn cursor(text: &str) -> Option<(u64, String)> {
    let (seq, subscription) = text.split_once(':')?;
    Some((seq.parse().ok()?, subscription.to_owned()))
}

/// `POST /v1/dead-letters/redrive`.
pub(super) async fn redrive(State(app): State<App>, headers: HeaderMap, body: Body) -> Result<Json<Value>, Problem> {
    body::require_json(&headers)?;
    let bytes = body::read(body, body::SMALL, app.options.body_timeout).await?;
    let filter = wanted(body::json(&bytes)?)?;
    let redriven = app.broker()?.redrive(filter).await?;
    Ok(Json(json!({"redriven": redriven})))
}

/// The letters that a redrive is about. All of them only when that is said in so many words.
fn wanted(raw: &RawValue) -> Result<DeadLetterFilter> {
    let members = Members::of(raw, "")?;
    let [subscription, event_id, pattern, verdict, digest, since] = FILTERS;
    members.only(&[subscription, event_id, pattern, verdict, digest, since, "limit", "all"])?;
    let all = members.read::<bool>("all", "true or false")?.unwrap_or_default();
    let filter = DeadLetterFilter {
        subscription: members.text("subscription")?,
        event_id: members.text("event_id")?,
        pattern: members.text("type")?.map(|text| Pattern::parse(&text)).transpose()?,
        verdict: members.text("verdict")?.map(|text| Verdict::parse(&text)).transpose()?,
        digest: members.text("digest")?,
        since: members.read::<Timestamp>("since", "an RFC 3339 instant")?,
        after: None,
        limit: members.read::<usize>("limit", "a number")?.unwrap_or_default(),
    };
    let filtered = FILTERS.iter().any(|name| members.raw(name).is_some_and(|raw| raw.get() != "null"));
    match (all, filtered) {
        (true, true) => Err(Error::invalid("all", "true", "cannot be given beside a filter")),
        (false, false) => {
            let reason = "is needed to redrive every dead letter: say \"all\": true, or give a filter \
                          (subscription, event_id, type, verdict, digest, since)";
            Err(Error::invalid("all", "false", reason))
        }
        _ => Ok(filter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<DeadLetterFilter> {
        wanted(&RawValue::from_string(text.to_owned()).unwrap())
    }

    #[test]
    fn a_redrive_says_what_it_is_about() {
        assert!(read(r#"{"all":true}"#).is_ok());
        assert_eq!(read(r#"{"verdict":"timeout"}"#).unwrap().verdict, Some(Verdict::Timeout));
        let rows = [
            ("{}", "all: is needed"),
            (r#"{"all":false}"#, "all: is needed"),
            (r#"{"subscription":null}"#, "all: is needed"),
            (r#"{"limit":5}"#, "all: is needed"),
            (r#"{"all":true,"type":"*"}"#, "all: cannot be given beside"),
            (r#"{"verdict":"tired"}"#, "verdict: must be one of"),
            (r#"{"subscripton":"a"}"#, "did you mean subscription?"),
            (r#"{"since":"yesterday"}"#, "since: must be an RFC 3339"),
        ];
        for (text, words) in rows {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_cursor_survives_any_name() {
        assert_eq!(cursor("17:a:b"), Some((17, "a:b".to_owned())));
        assert_eq!(cursor("17"), None);
        assert_eq!(cursor("x:a"), None);
    }
}
