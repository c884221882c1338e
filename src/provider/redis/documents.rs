//! Documents: a hash per collection, and a sorted set for the order of its keys.

use std::time::Duration;

use redis::Value;

use super::link::Script;
use super::{RedisProvider, as_micros, row};
use crate::error::Result;
use crate::provider::{Document, Expect, rules};

static CHANGE: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/documents.lua"),
    include_str!("lua/change_document.lua")
));
static LIST: Script = Script::new(concat!(
    include_str!("lua/prelude.lua"),
    include_str!("lua/documents.lua"),
    include_str!("lua/list_documents.lua")
));

/// The most keys that one call looks at.
const PAGE: usize = 500;

impl RedisProvider {
    /// Stores or removes a document: its new revision, or whether it was there to be removed.
    pub(super) async fn change_document(
        &self,
        collection: &str,
        key: &str,
        value: Option<&[u8]>,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Result<u64> {
        self.link.check_open()?;
        rules::check_document_name(collection, key)?;
        let action = "change a document";
        let mut command = self.call(action, &CHANGE).await?;
        let expected = match expect {
            Expect::Any => String::new(),
            Expect::Absent => "absent".to_owned(),
            Expect::Revision(revision) => revision.to_string(),
        };
        command.arg(collection).arg(key).arg(expected);
        command.arg(ttl.map_or_else(String::new, |ttl| as_micros(ttl).to_string()));
        if let Some(value) = value {
            command.arg(value);
        }
        let mut answer = row::list(self.link.run(action, &CHANGE, &command).await?).into_iter();
        let (is_done, told) = (row::number(answer.next().unwrap_or_default()), answer.next().unwrap_or_default());
        let told = row::text(told);
        if is_done == 1 {
            Ok(told.parse().unwrap_or(0))
        } else {
            Err(expect.conflict(collection, key, told.parse().ok()))
        }
    }

    pub(super) async fn find_document(&self, collection: &str, key: &str) -> Result<Option<Document>> {
        let action = "read a document";
        let mut command = self.call(action, &LIST).await?;
        command.arg(collection).arg("-").arg(PAGE).arg(key);
        let answer = self.link.run(action, &LIST, &command).await?;
        Ok(read(answer).0.into_iter().next().map(|(_, document)| document))
    }

    pub(super) async fn page_of_documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<(String, Document)>> {
        self.link.check_open()?;
        let action = "list documents";
        let (mut listed, mut after) = (Vec::new(), after.map(str::to_owned));
        while listed.len() < max {
            let mut command = self.call(action, &LIST).await?;
            let from = after.as_ref().map_or_else(|| "-".to_owned(), |after| format!("({after}"));
            command.arg(collection).arg(from).arg((max - listed.len()).min(PAGE));
            let (found, last) = read(self.link.run(action, &LIST, &command).await?);
            listed.extend(found);
            after = last;
            if after.is_none() {
                break;
            }
        }
        Ok(listed)
    }
}

/// Documents in threes of key, revision and value, and the key that stands alone at the end where there may be more.
fn read(answer: Value) -> (Vec<(String, Document)>, Option<String>) {
    let (mut parts, mut documents) = (row::list(answer).into_iter(), Vec::new());
    while let Some(key) = parts.next() {
        let key = row::text(key);
        let (Some(revision), Some(value)) = (parts.next(), parts.next()) else { return (documents, Some(key)) };
        documents.push((key, Document { value: row::bytes(value).into(), revision: row::number(revision) }));
    }
    (documents, None)
}
