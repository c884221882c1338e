//! Rows of a captured table that stand in an inbox together: what the payload of each event is, and its key.
//!
//! For a store, what surrounds the JSON of a row in a payload costs about as much as that JSON, and so does a row of its
//! inbox. Hence the rows that a statement created or deleted are left as the store tells them, many in one, and the rest is
//! done here.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// The most rows of one bundle: more than triggers leave together, and few enough to become events in one step.
const MOST: usize = 1_000;

/// What the payload of such a row of the inbox holds.
#[derive(Deserialize)]
struct Bundle<'a> {
    /// The names of the primary key's columns.
    pk: Vec<String>,
    /// Rows as objects. One that is too wide to be told is a string: the payload that says so.
    #[serde(borrow)]
    rows: Vec<&'a RawValue>,
}

/// A payload that stands as it is, as far as it is of interest here.
#[derive(Deserialize)]
struct Told<'a> {
    #[serde(borrow)]
    pk: Columns<'a>,
}

type Columns<'a> = HashMap<String, &'a RawValue>;

/// What one row of the table becomes.
#[derive(Debug, PartialEq)]
pub(super) struct Part {
    /// The ordering key: the primary key as text, or as a JSON array where it has several columns.
    pub(super) key: Option<String>,
    pub(super) payload: String,
}

/// Takes a bundle apart.
///
/// # Errors
/// [`Error::Invalid`] naming `payload` where it is no bundle, or `type` where that is no creation or deletion.
pub(super) fn parts(event_type: &str, payload: &str) -> Result<Vec<Part>> {
    let around = match event_type.rsplit('.').next() {
        Some("create") => ["{\"before\":null,\"after\":", ",\"changed\":null,\"pk\":{"],
        Some("delete") => ["{\"before\":", ",\"after\":null,\"changed\":null,\"pk\":{"],
        _ => return Err(Error::invalid("type", event_type, "must end with create or delete where rows are given")),
    };
    let Bundle { pk, rows } = read(payload)?;
    if rows.len() > MOST {
        return Err(Error::invalid(
            "payload",
            payload,
            format!("holds {} rows of a table: at most {MOST}", rows.len()),
        ));
    }
    let labels: Vec<String> = pk.iter().map(|name| format!("{}:", serde_json::Value::from(name.as_str()))).collect();
    rows.into_iter().map(|row| part(&pk, &labels, row.get(), around)).collect()
}

/// `labels` are the names as they stand in JSON.
fn part(pk: &[String], labels: &[String], row: &str, [before, after]: [&str; 2]) -> Result<Part> {
    if row.starts_with('"') {
        let payload: String = read(row)?;
        let Told { pk: columns } = read(&payload)?;
        let key = key(&values(pk, &columns))?;
        return Ok(Part { key, payload });
    }
    let columns: Columns<'_> = read(row)?;
    let values = values(pk, &columns);
    let mut payload = String::with_capacity(before.len() + row.len() + after.len() + 64);
    payload.extend([before, row, after]);
    for (at, (label, value)) in labels.iter().zip(&values).enumerate() {
        payload.extend([if at == 0 { "" } else { "," }, label, value]);
    }
    payload.push_str("}}");
    Ok(Part { key: key(&values)?, payload })
}

fn read<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|error| Error::invalid("payload", text, format!("does not hold rows of a table: {error}")))
}

/// The JSON of these columns; null for one that is not there (any more).
fn values<'a>(names: &[String], columns: &Columns<'a>) -> Vec<&'a str> {
    names.iter().map(|name| columns.get(name).map_or("null", |value| value.get())).collect()
}

/// As `to_json(column) #>> '{}'` and `json_build_array(column, …)::text` have it in PostgreSQL: statements that tell each row by
/// itself give the same row the same key.
fn key(values: &[&str]) -> Result<Option<String>> {
    match values {
        [] | ["null"] => Ok(None),
        [text] if text.starts_with('"') => read(text).map(Some),
        [other] => Ok(Some((*other).to_owned())),
        several => Ok(Some(format!("[{}]", several.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payloads(event_type: &str, payload: &str) -> Vec<(Option<String>, String)> {
        parts(event_type, payload).unwrap().into_iter().map(|part| (part.key, part.payload)).collect()
    }

    #[test]
    fn rows_become_payloads_byte_for_byte() {
        let row = "{\"id\":7,\"name\":\"Ü \\\"x\\\"\",\"doc\":{\n \"a\" : 1.50 }}";
        let bundle = format!("{{\"pk\":[\"id\"],\"rows\":[{row},{{\"id\":8}}]}}");
        let created = payloads("public.users.create", &bundle);
        assert_eq!(created[0].1, format!("{{\"before\":null,\"after\":{row},\"changed\":null,\"pk\":{{\"id\":7}}}}"));
        assert_eq!(created[1].0.as_deref(), Some("8"));
        let deleted = payloads("public.users.delete", &bundle);
        assert_eq!(deleted[0].1, format!("{{\"before\":{row},\"after\":null,\"changed\":null,\"pk\":{{\"id\":7}}}}"));
        assert_eq!((deleted[0].0.as_deref(), deleted.len()), (Some("7"), 2));
    }

    #[test]
    fn keys_are_those_that_the_store_would_give() {
        let rows = [
            ("[\"a\"]", "{\"a\":\"x \\\"y\\\" \\u00fc\"}", Some("x \"y\" ü"), "{\"a\":\"x \\\"y\\\" \\u00fc\"}"),
            ("[\"a\"]", "{\"a\":1.50}", Some("1.50"), "{\"a\":1.50}"),
            ("[\"a\"]", "{\"a\":null}", None, "{\"a\":null}"),
            ("[\"gone\"]", "{\"a\":1}", None, "{\"gone\":null}"),
            (
                "[\"b\",\"A \\\"q\\\"\"]",
                "{\"A \\\"q\\\"\":\"x\",\"b\":2}",
                Some("[2, \"x\"]"),
                "{\"b\":2,\"A \\\"q\\\"\":\"x\"}",
            ),
            ("[\"a\",\"gone\"]", "{\"a\":1}", Some("[1, null]"), "{\"a\":1,\"gone\":null}"),
        ];
        for (pk, row, key, told) in rows {
            let parts = payloads("a.b.create", &format!("{{\"pk\":{pk},\"rows\":[{row}]}}"));
            assert_eq!(parts[0].0.as_deref(), key, "{row}");
            assert!(parts[0].1.ends_with(&format!(",\"pk\":{told}}}")), "{}", parts[0].1);
        }
    }

    #[test]
    fn a_row_that_is_too_wide_stands_as_it_is() {
        let wide = "{\"before\":null,\"after\":null,\"changed\":null,\"pk\":{\"id\":\"w\"},\"oversize\":2000000}";
        let bundle = serde_json::json!({"pk": ["id"], "rows": [wide]}).to_string();
        assert_eq!(payloads("a.b.create", &bundle), [(Some("w".to_owned()), wide.to_owned())]);
    }

    #[test]
    fn what_is_no_bundle_is_told_in_words() {
        let rows = [
            ("a.b.create", "{", "does not hold rows"),
            ("a.b.create", "[]", "does not hold rows"),
            ("a.b.create", "{\"pk\":[\"id\"],\"rows\":[7]}", "does not hold rows"),
            ("a.b.create", "{\"pk\":[\"id\"],\"rows\":[\"{\"]}", "does not hold rows"),
            ("a.b.update", "{\"pk\":[],\"rows\":[]}", "create or delete"),
        ];
        for (event_type, payload, words) in rows {
            let error = parts(event_type, payload).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(parts("a.b.create", "{\"pk\":[],\"rows\":[]}").unwrap(), []);
        let of = |count: usize| format!("{{\"pk\":[],\"rows\":[{}]}}", vec!["{}"; count].join(","));
        assert_eq!(parts("a.b.create", &of(MOST)).unwrap().len(), MOST);
        assert!(parts("a.b.create", &of(MOST + 1)).unwrap_err().to_string().contains("holds 1001 rows"));
    }
}
