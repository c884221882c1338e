//! `tidegate publish`: one event from arguments, or several from a file of JSON lines.

use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use reqwest::Method;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::client::{self, Client};
use super::exit::{Exit, Usage};
use super::{print, print_line, view};
use crate::event::JSON;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The event's type, such as shop.orders.create
    #[arg(value_name = "TYPE", required_unless_present = "from")]
    event_type: Option<String>,
    /// The payload: JSON, @FILE, or - for standard input; null when not given
    #[arg(short, long, value_name = "JSON|@FILE|-")]
    payload: Option<String>,
    /// The payload's content type; anything but application/json travels as base64
    #[arg(long, value_name = "TYPE", requires = "payload")]
    content_type: Option<String>,
    /// Wait until the event is handled, at most this long (5s unless given), and show what came of it
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "5s",
          value_parser = duration)]
    wait: Option<Duration>,
    /// The event's id; the same id again is a duplicate and handled once. Default: a fresh one
    #[arg(long)]
    id: Option<String>,
    /// database, websocket, frontend, system or internal [default: internal]
    #[arg(long)]
    source: Option<String>,
    /// Events of one key are handled in order by subscriptions that ask for it
    #[arg(long)]
    key: Option<String>,
    /// The user behind the event: a number or a text
    #[arg(long, value_name = "ID")]
    user_id: Option<String>,
    /// The session behind the event
    #[arg(long, value_name = "ID")]
    session_id: Option<String>,
    /// Metadata; the value may be JSON, else it is a text. Repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, Value)>,
    /// Publish every line of this file, one event's JSON each; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["event_type", "payload", "id", "source", "key", "user_id",
          "session_id", "metadata"])]
    from: Option<PathBuf>,
    #[command(flatten)]
    pub(super) client: client::Args,
}

/// An event as it is sent.
#[derive(Serialize)]
struct Body<'a> {
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    metadata: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    parsed.ok_or_else(|| "must be a duration such as 5s or 500ms".to_owned())
}

fn pair(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

/// Publishes, and shows what came of it.
pub(super) async fn run(args: Args) -> Result<Exit> {
    let client = Client::new(&args.client)?;
    let mut exit = Exit::Done;
    for event in events(&args)? {
        let query = [("wait", args.wait.map(|wait| format!("{}ms", wait.as_millis())))];
        let patience = args.wait.unwrap_or_default();
        let answer = client.send_json(Method::POST, &["events"], &query, &event, patience).await?;
        let ended = show(&answer, &args)?;
        exit = if ended == Exit::Done { exit } else { ended };
    }
    Ok(exit)
}

/// The events to publish, each as the JSON that is sent.
fn events(args: &Args) -> Result<Vec<Box<RawValue>>> {
    if let Some(file) = &args.from {
        let text = String::from_utf8(read(&format!("@{}", file.display()))?).context("the events are not UTF-8")?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        return lines.map(|(index, line)| json(line, &format!("line {} of {}", index + 1, file.display()))).collect();
    }
    let is_json = args.content_type.as_deref().is_none_or(|content_type| content_type == JSON);
    let payload = args.payload.as_deref().map(read).transpose()?;
    let (mut raw, mut encoded) = (None, None);
    match payload {
        Some(bytes) if is_json => {
            let text = String::from_utf8(bytes).map_err(|_| Usage("--payload: is not UTF-8".to_owned()))?;
            raw = Some(json(&text, "--payload")?);
        }
        Some(bytes) => encoded = Some(BASE64.encode(bytes)),
        None => {}
    }
    let body = Body {
        r#type: args.event_type.as_deref().unwrap_or_default(),
        id: args.id.as_deref(),
        source: args.source.as_deref(),
        key: args.key.as_deref(),
        user_id: args.user_id.as_deref().map(|id| id.parse::<i64>().map_or_else(|_| Value::from(id), Value::from)),
        session_id: args.session_id.as_deref(),
        metadata: args.metadata.iter().cloned().collect(),
        payload: raw,
        payload_base64: encoded,
        content_type: args.content_type.as_deref(),
    };
    Ok(vec![serde_json::value::to_raw_value(&body)?])
}

/// The bytes that an argument names: itself, `@FILE`, or `-`.
fn read(argument: &str) -> Result<Vec<u8>> {
    match argument.strip_prefix('@') {
        None if argument != "-" => Ok(argument.as_bytes().to_vec()),
        Some(file) if file != "-" => {
            std::fs::read(file).map_err(|error| Usage(format!("cannot read {file}: {error}")).into())
        }
        _ => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
            Ok(bytes)
        }
    }
}

fn json(text: &str, place: &str) -> Result<Box<RawValue>> {
    let hint = "a text needs quotes of its own: '\"text\"'";
    RawValue::from_string(text.trim().to_owned())
        .map_err(|error| Usage(format!("{place}: is not JSON: {error}; {hint}")).into())
}

fn show(answer: &Bytes, args: &Args) -> Result<Exit> {
    if args.wait.is_none() {
        if args.client.json {
            return print_line(answer);
        }
        let view::Published { id, seq, status, duplicate } = serde_json::from_slice(answer)?;
        let note = if duplicate { ", a duplicate: nothing new was stored" } else { "" };
        return print_line(format!("{id} seq {seq} {status}{note}"));
    }
    let event: view::Event = serde_json::from_slice(answer)?;
    if args.client.json {
        print_line(answer)?;
    } else {
        print(format!("{} seq {} {} {}\n", event.id, event.seq(), event.r#type, event.status))?;
        print(view::indented(&view::deliveries(&event.deliveries)))?;
    }
    match event.status.as_str() {
        "completed" => Ok(Exit::Done),
        "failed" => Ok(Exit::Failed),
        open => {
            let waited = args.wait.unwrap_or_default();
            eprintln!("event {} is still {open} after {waited:?}", event.id);
            Ok(Exit::Failed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn sent(line: &[&str]) -> Result<String> {
        let Line { args } = Line::try_parse_from(["publish"].iter().chain(line))?;
        Ok(events(&args)?.iter().map(|event| event.get().to_owned()).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn arguments_become_the_events_members() {
        let line = [
            "a.b",
            "--payload",
            "{ \"n\":1.50 }",
            "--key",
            "k",
            "--user-id",
            "7",
            "--metadata",
            "n=1",
            "--metadata",
            "t=x=y",
        ];
        let expected = r#"{"type":"a.b","key":"k","user_id":7,"metadata":{"n":1,"t":"x=y"},"payload":{ "n":1.50 }}"#;
        assert_eq!(sent(&line).unwrap(), expected);
        assert_eq!(sent(&["a", "--user-id", "u-1"]).unwrap(), r#"{"type":"a","user_id":"u-1"}"#);
        let binary = sent(&["a", "--payload", "hi", "--content-type", "text/plain"]).unwrap();
        assert_eq!(binary, r#"{"type":"a","payload_base64":"aGk=","content_type":"text/plain"}"#);
    }

    #[test]
    fn a_wait_without_a_time_is_five_seconds() {
        let wait = |line: &[&str]| Line::try_parse_from(line).unwrap().args.wait;
        assert_eq!(wait(&["publish", "a", "--wait"]), Some(Duration::from_secs(5)));
        assert_eq!(wait(&["publish", "--wait=250ms", "a"]), Some(Duration::from_millis(250)));
        assert_eq!(wait(&["publish", "a"]), None);
        assert!(Line::try_parse_from(["publish", "a", "--wait=soon"]).is_err());
        assert!(Line::try_parse_from(["publish"]).is_err());
    }

    #[test]
    fn a_payload_that_is_not_json_is_refused_with_a_hint() {
        let error = sent(&["a", "--payload", "hello"]).unwrap_err().to_string();
        assert!(error.contains("--payload: is not JSON") && error.contains("quotes of its own"), "{error}");
    }
}
