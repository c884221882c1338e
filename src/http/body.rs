//! Request bodies: their media type, their size, and JSON objects read member by member.
//!
//! Nothing here knows what a member means. Values stay raw text until their owner reads them, so that a payload is
//! kept byte for byte.

use std::fmt;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::problem::{Problem, suggestion};
use crate::error::Error;

/// Room for any request that is not an event, in bytes.
pub(super) const SMALL: u64 = 64 * 1024;

/// Reads a whole body of at most `limit` bytes within `patience`.
///
/// # Errors
/// 413 over the limit, 400 when the client breaks off, 408 when it is too slow.
pub(super) async fn read(body: Body, limit: u64, patience: Duration) -> Result<Bytes, Problem> {
    let slow = || Problem::new(StatusCode::REQUEST_TIMEOUT, "too_slow", format!("no whole body within {patience:?}"));
    tokio::time::timeout(patience, collect(body, limit)).await.unwrap_or_else(|_| Err(slow()))
}

async fn collect(body: Body, limit: u64) -> Result<Bytes, Problem> {
    let mut whole = BytesMut::new();
    let mut stream = body.into_data_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| Problem::malformed(format!("the body broke off: {error}")))?;
        let size = (whole.len() + chunk.len()) as u64;
        if size > limit {
            return Err(Problem::body_too_large(size, limit));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

/// The media type without its parameters, in lower case; `None` when the request names none.
///
/// # Errors
/// 415 for a charset other than UTF-8, or a header that is no text.
pub(super) fn media_type(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(None) };
    let text = value.to_str().map_err(|_| unsupported("content-type holds what is no text"))?;
    let mut parts = text.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default().to_ascii_lowercase();
    let charset = parts.find_map(|part| part.to_ascii_lowercase().strip_prefix("charset=").map(str::to_owned));
    match charset.as_deref().map(|charset| charset.trim_matches('"')) {
        None | Some("utf-8" | "utf8" | "us-ascii") => Ok(Some(essence)),
        Some(other) => Err(unsupported(format!("charset {other} is not served: send UTF-8"))),
    }
}

/// Refuses a body that is not JSON by its own account.
///
/// # Errors
/// 415.
pub(super) fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    match media_type(headers)?.as_deref() {
        Some(crate::event::JSON) => Ok(()),
        Some(other) => Err(unsupported(format!("content-type {other} is not served here: send application/json"))),
        None => Err(unsupported("content-type is missing: send application/json")),
    }
}

/// 415.
pub(super) fn unsupported(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
}

/// `body` as JSON into `T`.
///
/// # Errors
/// 400 with the place where the text stops being JSON, or the byte at which it stops being UTF-8.
pub(super) fn json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Problem::malformed(format!("body is not UTF-8 from byte {} on", error.valid_up_to())))?;
    if text.trim().is_empty() {
        return Err(Problem::malformed("body is empty: send JSON"));
    }
    serde_json::from_str(text).map_err(|error| Problem::malformed(format!("body is not JSON: {error}")))
}

/// The members of a JSON object, in the order of the text, values unread.
pub(super) struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Members<'a> {
    /// Reads an object's members. `field` names the object in errors; empty for the whole body.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `raw` is no object, or has a member twice.
    pub(super) fn of(raw: &'a RawValue, field: &str) -> Result<Self, Error> {
        let named = if field.is_empty() { "body" } else { field };
        let members: Self = serde_json::from_str(raw.get())
            .map_err(|_| Error::invalid(named.to_owned(), raw.get(), "must be a JSON object"))?;
        for (index, (name, value)) in members.0.iter().enumerate() {
            if members.0.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(Error::invalid(name.clone(), value.get(), "is given twice"));
            }
        }
        Ok(members)
    }

    /// Refuses members that are not `known`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the member, with a suggestion when one is near.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Error> {
        let Some((name, value)) = self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) else {
            return Ok(());
        };
        let hint = suggestion(name, known.iter().copied());
        Err(Error::invalid(name.clone(), value.get(), format!("is not a field that may be given{hint}")))
    }

    /// All members in the order of the text.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &'a RawValue)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// The raw value of `name`, unless it is absent.
    pub(super) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().find(|(known, _)| known == name).map(|&(_, value)| value)
    }

    /// The value of `name`, unless it is absent or null.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying that it must be `what`.
    pub(super) fn read<T: Deserialize<'a>>(&self, name: &'static str, what: &str) -> Result<Option<T>, Error> {
        match self.raw(name) {
            None => Ok(None),
            Some(raw) if raw.get() == "null" => Ok(None),
            Some(raw) => serde_json::from_str(raw.get())
                .map(Some)
                .map_err(|error| Error::invalid(name, raw.get(), format!("must be {what}{}", detail(&error)))),
        }
    }

    /// The text under `name`, unless it is absent or null.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is no string.
    pub(super) fn text(&self, name: &'static str) -> Result<Option<String>, Error> {
        self.read(name, "a string")
    }
}

/// What a parser says beyond "wrong type", such as a number out of range; without its place in a text of one value.
fn detail(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if text.starts_with("invalid type") || error.is_eof() {
        return String::new();
    }
    format!(": {}", text.split(" at line ").next().unwrap_or_default())
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<String, &'de RawValue>()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// How deep arrays and objects stand inside each other in `json`, which a parser has already accepted.
pub(super) fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0_usize);
    let (mut in_string, mut escaped) = (false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_what_is_nested_outside_strings() {
        for (json, expected) in [("1", 0), ("[]", 1), (r#"{"a":[1,{"b":"[[[["}]}"#, 3), (r#"["\"[[", "]"]"#, 1)] {
            assert_eq!(depth(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn members_are_read_once_and_by_name() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let twice = raw(r#"{"a":1,"\u0061":2}"#);
        assert_eq!(Members::of(&twice, "").err().unwrap().to_string(), "a: is given twice (got \"2\")");
        let list = raw("[1]");
        assert!(Members::of(&list, "[3]").err().unwrap().to_string().starts_with("[3]: must be a JSON object"));
        let typo = raw(r#"{"tpye":1}"#);
        let error = Members::of(&typo, "").unwrap().only(&["type", "payload"]).unwrap_err().to_string();
        assert!(error.contains("did you mean type?"), "{error}");
    }

    #[test]
    fn a_media_type_is_read_without_its_parameters() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(text));
            media_type(&headers)
        };
        assert_eq!(of("Application/JSON; Charset=\"UTF-8\"").unwrap().as_deref(), Some("application/json"));
        assert!(of("application/json; charset=latin1").is_err());
        assert_eq!(media_type(&HeaderMap::new()).unwrap(), None);
    }
}
