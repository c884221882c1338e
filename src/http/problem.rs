//! Refusals as RFC 9457 `application/problem+json`.
//!
//! Every answer that is not a success is made here, so that a client meets one shape only. Which status an [`Error`]
//! gets is decided here and nowhere else.

use std::fmt::Display;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::{Error, quote};

/// What is said to a client that must come back when a store is unreachable or the host is starting, in seconds.
const COME_BACK: Duration = Duration::from_secs(1);

/// A refusal.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    field: Option<String>,
    value: Option<String>,
    retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Body<'a> {
    r#type: String,
    title: &'static str,
    status: u16,
    detail: &'a str,
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
}

impl Problem {
    /// A refusal with a stable `code` and words for people.
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), field: None, value: None, retry_after: None }
    }

    /// 400: what was sent cannot even be read.
    pub(crate) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// 400 for a query parameter.
    pub(crate) fn query(name: &str, value: &str, reason: impl Display) -> Self {
        let mut problem = Self::malformed(format!("{name}: {reason} (got {})", quote(value)));
        problem.field = Some(name.to_owned());
        problem.value = Some(unquoted(&quote(value)).to_owned());
        problem
    }

    /// 503: not now, for `reason`.
    pub(crate) fn unavailable(code: &'static str, reason: impl Into<String>) -> Self {
        let mut problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, reason);
        problem.retry_after = Some(COME_BACK);
        problem
    }

    /// 413 for a body of at least `size` bytes.
    pub(crate) fn body_too_large(size: u64, limit: u64) -> Self {
        Error::TooLarge { field: "body".into(), size, limit }.into()
    }

    /// The code, for logs.
    pub(crate) fn code(&self) -> &'static str {
        self.code
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = error.code();
        let mut problem = Self::new(status_of(&error), code, explained(&error));
        match error {
            Error::Invalid { field, value, .. } => {
                problem.field = Some(field.into_owned());
                problem.value = Some(unquoted(&value).to_owned());
            }
            Error::TooLarge { field, .. } => problem.field = Some(field.into_owned()),
            Error::Overloaded { retry_after, .. } => problem.retry_after = Some(retry_after),
            Error::Stopped(_) | Error::Store { .. } => problem.retry_after = Some(COME_BACK),
            _ => {}
        }
        problem
    }
}

fn status_of(error: &Error) -> StatusCode {
    match error {
        Error::Invalid { .. } | Error::Plugin { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        Error::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        Error::NotFound { .. } => StatusCode::NOT_FOUND,
        Error::Conflict { .. } => StatusCode::CONFLICT,
        Error::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
        Error::Stopped(_) | Error::Store { .. } => StatusCode::SERVICE_UNAVAILABLE,
        Error::Incompatible { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The error's words. A store's cause stays in the log: it may name hosts and statements that are not the client's.
fn explained(error: &Error) -> String {
    if let Error::Store { source, .. } = error {
        tracing::error!(error = %error, cause = %source, "a request failed in the store");
    }
    error.to_string()
}

/// A quoted value without its quotes; the mark of a shortened one stays.
fn unquoted(quoted: &str) -> &str {
    let inner = quoted.strip_prefix('"').unwrap_or(quoted);
    inner.strip_suffix('"').unwrap_or(inner)
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = Body {
            r#type: format!("urn:tidegate:problem:{}", self.code),
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code,
            field: self.field.as_deref(),
            value: self.value.as_deref(),
        };
        let text = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (self.status, text).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The known name that is most like `given`, as words to append to a refusal; empty when none is near.
pub(crate) fn suggestion<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    crate::error::nearest(given, known).map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_error_has_its_status() {
        let store = || Error::store("sqlite", "append 1 events", "disk full");
        let rows = [
            (Error::invalid("type", "a b", "bad"), 422, false),
            (Error::TooLarge { field: "payload".into(), size: 2, limit: 1 }, 413, false),
            (Error::not_found("event", "x"), 404, false),
            (Error::conflict("subscription", "x", "taken"), 409, false),
            (Error::Overloaded { reason: "1 of 1".into(), retry_after: Duration::from_millis(1_200) }, 429, true),
            (Error::Stopped("broker"), 503, true),
            (store(), 503, true),
        ];
        for (error, status, retry) in rows {
            let response = Problem::from(error).into_response();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), retry, "{status}");
        }
        let overloaded = Error::Overloaded { reason: "full".into(), retry_after: Duration::from_millis(1_200) };
        assert_eq!(Problem::from(overloaded).into_response().headers()[header::RETRY_AFTER], "2");
        assert!(!Problem::from(store()).detail.contains("disk full"));
    }

    #[test]
    fn a_problem_names_field_and_value_without_quotes() {
        let problem = Problem::from(Error::invalid("type", "a b", "must not hold spaces"));
        assert_eq!((problem.field.as_deref(), problem.value.as_deref()), (Some("type"), Some("a b")));
        assert_eq!(problem.detail, "type: must not hold spaces (got \"a b\")");
    }
}
