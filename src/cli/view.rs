//! What is read of the server's answers to be shown. What is not shown is not read.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::table::{Table, short};
use crate::delivery::Fault;

/// The widest error or reply in a line.
const WIDE: usize = 80;

#[derive(Deserialize)]
pub(super) struct Published {
    pub(super) id: String,
    pub(super) seq: u64,
    pub(super) status: String,
    pub(super) duplicate: bool,
}

#[derive(Deserialize)]
pub(super) struct EventPage {
    pub(super) events: Vec<Event>,
    pub(super) next_cursor: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Event {
    pub(super) id: String,
    pub(super) seq: Option<u64>,
    pub(super) source: String,
    pub(super) r#type: String,
    pub(super) status: String,
    pub(super) retry_count: u32,
    pub(super) error: Option<String>,
    pub(super) payload: Option<Box<RawValue>>,
    pub(super) payload_base64: Option<String>,
    pub(super) content_type: String,
    pub(super) key: Option<String>,
    pub(super) instance_id: String,
    pub(super) created_at: String,
    pub(super) completed_at: Option<String>,
    pub(super) caused_by: Option<String>,
    pub(super) metadata: Box<RawValue>,
    #[serde(default)]
    pub(super) deliveries: Vec<Delivery>,
}

impl Event {
    /// Its place in the log, where it has one.
    pub(super) fn seq(&self) -> String {
        self.seq.map_or_else(|| "-".to_owned(), |seq| seq.to_string())
    }
}

#[derive(Deserialize)]
pub(super) struct Delivery {
    pub(super) subscription: String,
    pub(super) status: String,
    pub(super) verdict: Option<String>,
    pub(super) error: Option<String>,
    pub(super) completed_at: Option<String>,
    pub(super) attempts: Vec<Attempt>,
}

impl Delivery {
    /// Who handles it, how its last attempt ended (or where it stands), how many there were, and what came of it.
    pub(super) fn cells(&self) -> [String; 4] {
        let verdict = self.verdict.clone().unwrap_or_else(|| self.status.clone());
        [self.subscription.clone(), verdict, self.attempts.len().to_string(), self.remark()]
    }

    /// Why it did not succeed, or else what the handler answered.
    fn remark(&self) -> String {
        let reply = self.attempts.last().and_then(|attempt| attempt.reply.as_ref());
        match (&self.error, reply) {
            (Some(error), _) => short(error, WIDE),
            (None, Some(reply)) => short(&reply.text(), WIDE),
            (None, None) => String::new(),
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Attempt {
    pub(super) number: u32,
    pub(super) verdict: String,
    pub(super) duration_us: u64,
    pub(super) worker: String,
    pub(super) error: Option<Fault>,
    pub(super) reply: Option<Reply>,
}

#[derive(Deserialize)]
pub(super) struct Reply {
    body: Option<Box<RawValue>>,
    content_type: String,
}

impl Reply {
    fn text(&self) -> String {
        self.body.as_ref().map_or_else(|| self.content_type.clone(), |body| body.get().to_owned())
    }
}

/// One line per delivery.
pub(super) fn deliveries<'a>(all: impl IntoIterator<Item = &'a Delivery>) -> String {
    let mut table = Table::new(&["SUBSCRIPTION", "STATUS", "VERDICT", "ATTEMPTS", "REMARK"]);
    for delivery in all {
        table.row([
            delivery.subscription.clone(),
            delivery.status.clone(),
            delivery.verdict.clone().unwrap_or_default(),
            delivery.attempts.len().to_string(),
            delivery.remark(),
        ]);
    }
    table.render("no subscription matches")
}

/// Each line of `text` two places to the right.
pub(super) fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
