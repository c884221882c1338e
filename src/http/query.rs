//! Query strings, read strictly: an unknown parameter is refused, never ignored, and so is a repeated one where it is not
//! a list.

use std::time::Duration;

use jiff::Timestamp;

use super::problem::{Problem, suggestion};

/// The most entries of a page.
pub(super) const MAX_LIMIT: usize = 1_000;

/// The entries of a page for which no limit was given.
const DEFAULT_LIMIT: usize = 50;

/// The parameters of one request.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads `raw`, in which only the `known` names may stand.
    ///
    /// # Errors
    /// 400 naming the parameter.
    pub(super) fn parse(raw: Option<&str>, known: &[&str]) -> Result<Self, Problem> {
        Self::parse_repeatable(raw, known, &[])
    }

    /// As [`parse`](Self::parse), where some names may be given several times.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub(super) fn parse_repeatable(raw: Option<&str>, known: &[&str], repeatable: &[&str]) -> Result<Self, Problem> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (name, value) in form_urlencoded::parse(raw.unwrap_or_default().as_bytes()) {
            if !known.contains(&&*name) {
                let hint = suggestion(&name, known.iter().copied());
                return Err(Problem::query(&name, &value, format!("is not a parameter of this call{hint}")));
            }
            if !repeatable.contains(&&*name) && pairs.iter().any(|(earlier, _)| *earlier == name) {
                return Err(Problem::query(&name, &value, "is given twice"));
            }
            pairs.push((name.into_owned(), value.into_owned()));
        }
        Ok(Self(pairs))
    }

    /// The value of `name`.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Every value of `name`.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The value of `name` as an owned text.
    pub(super) fn owned(&self, name: &str) -> Option<String> {
        self.text(name).map(str::to_owned)
    }

    /// The value of `name` as `parse` reads it.
    ///
    /// # Errors
    /// 400 naming parameter and value, with `parse`'s words.
    pub(super) fn parsed<T, E: Into<Reason>>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, Problem> {
        self.text(name)
            .map(|value| parse(value).map_err(|error| Problem::query(name, value, error.into().0)))
            .transpose()
    }

    /// An instant.
    pub(super) fn instant(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        self.parsed(name, |text| {
            text.parse::<Timestamp>().map_err(|_| "must be an RFC 3339 instant such as 2026-01-31T12:00:00Z")
        })
    }

    /// A duration.
    pub(super) fn duration(&self, name: &str) -> Result<Option<Duration>, Problem> {
        self.parsed(name, |text| {
            let signed = text.parse::<jiff::SignedDuration>().ok();
            signed.and_then(|signed| signed.try_into().ok()).ok_or("must be a duration such as 5s or 500ms")
        })
    }

    /// The size of the page asked for.
    pub(super) fn limit(&self) -> Result<usize, Problem> {
        let limit = self.parsed("limit", |text| match text.parse() {
            Ok(limit @ 1..=MAX_LIMIT) => Ok(limit),
            _ => Err("must be a number from 1 to 1000"),
        })?;
        Ok(limit.unwrap_or(DEFAULT_LIMIT))
    }
}

/// Words for what is wrong with a value, without the field and value that the caller adds.
pub(super) struct Reason(String);

impl From<&str> for Reason {
    fn from(words: &str) -> Self {
        Self(words.to_owned())
    }
}

impl From<crate::Error> for Reason {
    fn from(error: crate::Error) -> Self {
        match error {
            crate::Error::Invalid { reason, .. } => Self(reason.into_owned()),
            other => Self(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse as _;

    fn refused(raw: &str) -> bool {
        let known = ["type", "limit", "wait", "from"];
        let read = Query::parse(Some(raw), &known).and_then(|query| {
            query.limit()?;
            query.duration("wait")?;
            query.instant("from")
        });
        read.is_err_and(|problem| problem.into_response().status() == 400)
    }

    #[test]
    fn what_is_not_known_or_not_legal_is_refused() {
        for raw in [
            "tpye=a",
            "type=a&type=b",
            "limit=0",
            "limit=1001",
            "limit=-1",
            "limit=ten",
            "limit=",
            "wait=5",
            "wait=-5s",
            "wait=soon",
            "from=yesterday",
            "from=2026-01-31",
        ] {
            assert!(refused(raw), "{raw}");
        }
        for raw in ["", "type=a.*&limit=1000", "wait=500ms", "wait=1m30s", "from=2026-01-31T12:00:00%2B01:00"] {
            assert!(!refused(raw), "{raw}");
        }
    }
}
