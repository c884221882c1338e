//! `tidegate tail`: follows the feed of a server, over breaks of the connection.
//!
//! It comes back to the place that it got to, so that nothing is shown twice and nothing is left out. Where the server
//! cannot go on from there, that is said on standard error.

use std::io::{self, ErrorKind, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use reqwest::Response;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::{self, Client, ClientError};
use super::exit::Exit;
use super::sse::{SseEvent, SseReader};
use super::table::short;
use crate::event::JSON;

/// How long to wait before the connection is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// A stream that is silent for so long is broken: the server says every 15 seconds that it is there.
const SILENCE: Duration = Duration::from_secs(45);

/// The widest payload in a line.
const WIDE: usize = 100;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only types that this pattern matches. Repeatable: one of them must
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// Begin after this seq; or at the beginning of what is kept; or with the latest, which is the default
    #[arg(long, value_name = "SEQ|beginning|latest")]
    since: Option<String>,
    /// Only from this source
    #[arg(long)]
    source: Option<String>,
    /// Only of this user
    #[arg(long, value_name = "ID")]
    user_id: Option<String>,
    /// End after so many events
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// End after this time, such as 30s
    #[arg(long = "for", value_name = "DURATION", value_parser = super::publish::duration)]
    period: Option<Duration>,
    #[command(flatten)]
    pub(super) client: client::Args,
}

/// What is shown of an event.
#[derive(Deserialize)]
struct Event<'a> {
    id: String,
    seq: Option<u64>,
    r#type: String,
    source: String,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    content_type: String,
    created_at: String,
}

/// Follows until it is told to stop, the limit is reached or the time is over.
pub(super) async fn run(args: Args) -> Result<Exit> {
    let mut tail = Tail::new(&args)?;
    let period = async {
        match args.period {
            Some(period) => tokio::time::sleep(period).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = tail.follow() => ended,
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| Exit::Done).context("cannot listen for signals"),
        () = period => Ok(Exit::Done),
    }
}

/// A feed that is followed.
struct Tail {
    client: Client,
    query: Vec<(&'static str, Option<String>)>,
    as_json: bool,
    /// How many events are still to be shown.
    left: Option<u64>,
    /// Where to come back to, and the log that this is of.
    place: Option<String>,
    epoch: Option<String>,
    has_heading: bool,
}

/// What to do after an event.
#[derive(PartialEq)]
enum Then {
    GoOn,
    End,
}

impl Tail {
    fn new(args: &Args) -> Result<Self> {
        let mut query: Vec<_> = args.patterns.iter().map(|pattern| ("pattern", Some(pattern.clone()))).collect();
        query.extend([("source", args.source.clone()), ("user_id", args.user_id.clone())]);
        query.push(("since", args.since.clone()));
        Ok(Self {
            client: Client::new(&args.client)?,
            query,
            as_json: args.client.json,
            left: args.limit,
            place: None,
            epoch: None,
            has_heading: false,
        })
    }

    async fn follow(&mut self) -> Result<Exit> {
        if self.left == Some(0) {
            return Ok(Exit::Done);
        }
        let (mut pause, mut has_been_there) = (BACK_OFF.0, false);
        loop {
            match self.connect().await {
                Ok(stream) => {
                    has_been_there = true;
                    let before = self.place.clone();
                    if self.read(stream).await? == Then::End {
                        return Ok(Exit::Done);
                    }
                    // A server that takes the connection and says nothing new is not asked in a tight loop.
                    pause = if self.place == before { pause } else { BACK_OFF.0 };
                    eprintln!("the stream broke off; connecting again");
                }
                Err(error) if has_been_there && may_pass(&error) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }

    async fn connect(&mut self) -> Result<Response> {
        let mut query = self.query.clone();
        query.push(("epoch", self.epoch.clone()));
        let stream = self.client.stream(&["stream"], &query, self.place.as_deref()).await?;
        let epoch = stream.headers().get("tidegate-epoch").and_then(|value| value.to_str().ok());
        self.epoch = epoch.map(str::to_owned);
        Ok(stream)
    }

    /// Shows what comes until the stream breaks off.
    async fn read(&mut self, mut stream: Response) -> Result<Then> {
        let mut reader = SseReader::default();
        // Whatever ends a stream, the place is known and the connection is tried again.
        while let Ok(Ok(Some(piece))) = tokio::time::timeout(SILENCE, stream.chunk()).await {
            for event in reader.read(&piece) {
                if self.take(event)? == Then::End {
                    return Ok(Then::End);
                }
            }
        }
        Ok(Then::GoOn)
    }

    fn take(&mut self, event: SseEvent) -> Result<Then> {
        let then = match &event.data {
            Some(data) if event.name == "reset" => {
                self.tell_reset(data);
                // The log may have been made anew since the stream began.
                self.epoch = None;
                Then::GoOn
            }
            Some(data) => self.show(data)?,
            None => Then::GoOn,
        };
        // Not before it is shown: what is not, comes again.
        self.place = event.id.or(self.place.take());
        Ok(then)
    }

    fn tell_reset(&self, data: &str) {
        if self.as_json {
            eprintln!("{data}");
            return;
        }
        #[derive(Deserialize)]
        struct Reset {
            from_seq: u64,
        }
        let from =
            serde_json::from_str::<Reset>(data).map_or_else(|_| "what is new".to_owned(), |r| r.from_seq.to_string());
        eprintln!("reset: events were missed that are no longer kept, or the log is another one; going on from {from}");
    }

    fn show(&mut self, data: &str) -> Result<Then> {
        let mut text = if self.as_json { one_line(data) } else { self.line(data)? };
        text.push('\n');
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // That nobody reads any more is no failure.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Then::End),
            written => written.context("cannot write to standard output")?,
        }
        self.left = self.left.map(|left| left.saturating_sub(1));
        Ok(if self.left == Some(0) { Then::End } else { Then::GoOn })
    }

    fn line(&mut self, data: &str) -> Result<String> {
        let event: Event<'_> = serde_json::from_str(data).context("the server sent what is no event")?;
        let seq = event.seq.map_or_else(|| "-".to_owned(), |seq| seq.to_string());
        let payload = match event.payload {
            Some(raw) => raw.get().to_owned(),
            // What reads as nothing may be a null.
            None if event.content_type == JSON => "null".to_owned(),
            None => event.content_type,
        };
        let cells = [seq, event.created_at, event.r#type, event.source, short(&event.id, 40), short(&payload, WIDE)];
        let line = columns(cells);
        if std::mem::replace(&mut self.has_heading, true) {
            return Ok(line);
        }
        let heading = ["SEQ", "CREATED", "TYPE", "SOURCE", "ID", "PAYLOAD"].map(str::to_owned);
        Ok(format!("{}\n{line}", columns(heading)))
    }
}

/// Cells at fixed places, since nobody knows what comes: those that are wider push the rest aside.
fn columns([seq, created, r#type, source, id, payload]: [String; 6]) -> String {
    format!("{seq:<8}  {created:<27}  {type:<28}  {source:<9}  {id:<36}  {payload}")
}

/// JSON on one line. A line break in it is white space: within a text it would be escaped.
fn one_line(json: &str) -> String {
    json.replace(['\n', '\r'], " ")
}

/// Whether it makes sense to try again.
fn may_pass(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. }) => true,
        Some(ClientError::Refused { status, .. }) => matches!(status, 429 | 500..=599),
        None => false,
    }
}
