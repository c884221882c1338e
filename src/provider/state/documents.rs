//! Documents in memory, by collection and key.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use bytes::Bytes;

use super::work::as_micros;
use crate::delivery::{KvChange, KvWrite};
use crate::error::Result;
use crate::provider::{Document, Expect, rules};

#[derive(Clone)]
struct Entry {
    value: Bytes,
    revision: u64,
    /// Microseconds since the Unix epoch.
    expires: Option<i64>,
}

impl Entry {
    fn is_live(&self, now: i64) -> bool {
        self.expires.is_none_or(|expires| expires > now)
    }

    fn document(&self) -> Document {
        Document { value: self.value.clone(), revision: self.revision }
    }
}

/// All documents.
#[derive(Default)]
pub(in crate::provider) struct Shelf {
    collections: HashMap<String, BTreeMap<String, Entry>>,
    /// The last revision given out, of any document: one that is removed and made again never repeats one.
    revision: u64,
}

/// What a key-value write leads to: the value and its expiry, or nothing.
pub(in crate::provider) struct Change {
    collection: String,
    key: String,
    becomes: Option<(Bytes, Option<i64>)>,
}

impl Shelf {
    /// The last revision given out.
    pub(in crate::provider) fn revision(&self) -> u64 {
        self.revision
    }

    /// Every document with its expiry, in the order of collections and keys.
    pub(in crate::provider) fn contents(&self) -> Vec<(&str, &str, Document, Option<i64>)> {
        let mut all: Vec<_> = self
            .collections
            .iter()
            .flat_map(|(collection, documents)| {
                documents.iter().map(|(key, entry)| (&**collection, &**key, entry.document(), entry.expires))
            })
            .collect();
        all.sort_unstable_by_key(|&(collection, key, ..)| (collection, key));
        all
    }

    /// Puts a document back as it stood.
    pub(in crate::provider) fn restore(
        &mut self,
        collection: String,
        key: String,
        document: Document,
        expires: Option<i64>,
    ) {
        let entry = Entry { value: document.value, revision: document.revision, expires };
        self.collections.entry(collection).or_default().insert(key, entry);
    }

    /// Goes on from this revision.
    pub(in crate::provider) fn resume(&mut self, revision: u64) {
        self.revision = revision;
    }

    fn live(&self, collection: &str, key: &str, now: i64) -> Option<&Entry> {
        self.collections.get(collection)?.get(key).filter(|entry| entry.is_live(now))
    }

    pub(in crate::provider) fn get(&self, collection: &str, key: &str, now: i64) -> Option<Document> {
        self.live(collection, key, now).map(Entry::document)
    }

    pub(in crate::provider) fn check(&self, collection: &str, key: &str, expect: Expect, now: i64) -> Result<bool> {
        rules::check_document_name(collection, key)?;
        let revision = self.live(collection, key, now).map(|entry| entry.revision);
        if expect.holds(revision) { Ok(revision.is_some()) } else { Err(expect.conflict(collection, key, revision)) }
    }

    pub(in crate::provider) fn put(&mut self, collection: &str, key: &str, value: Bytes, expires: Option<i64>) -> u64 {
        self.revision += 1;
        let entry = Entry { value, revision: self.revision, expires };
        if let Some(documents) = self.collections.get_mut(collection) {
            documents.insert(key.to_owned(), entry);
        } else {
            self.collections.insert(collection.to_owned(), BTreeMap::from([(key.to_owned(), entry)]));
        }
        self.revision
    }

    pub(in crate::provider) fn remove(&mut self, collection: &str, key: &str) {
        if let Some(documents) = self.collections.get_mut(collection) {
            documents.remove(key);
            if documents.is_empty() {
                self.collections.remove(collection);
            }
        }
    }

    pub(in crate::provider) fn list(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
        now: i64,
    ) -> Vec<(String, Document)> {
        let Some(documents) = self.collections.get(collection) else { return Vec::new() };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let live = documents.range::<str, _>((from, Bound::Unbounded)).filter(|(_, entry)| entry.is_live(now));
        live.take(max).map(|(key, entry)| (key.clone(), entry.document())).collect()
    }

    /// Whether a document has expired that is still here.
    pub(in crate::provider) fn is_overdue(&self, now: i64) -> bool {
        self.collections.values().flat_map(BTreeMap::values).any(|entry| !entry.is_live(now))
    }

    /// Drops what has expired.
    pub(in crate::provider) fn expire(&mut self, now: i64) {
        self.collections.retain(|_, documents| {
            documents.retain(|_, entry| entry.is_live(now));
            !documents.is_empty()
        });
    }

    /// What these writes lead to, in order; `Err` says which one cannot be applied, and why.
    pub(in crate::provider) fn plan(&self, writes: &[KvWrite], now: i64) -> std::result::Result<Vec<Change>, String> {
        let mut changes: Vec<Change> = Vec::with_capacity(writes.len());
        for write in writes {
            let KvWrite { bucket, key, change } = write;
            let refuse = |reason: String| format!("key {key:?} of bucket {bucket:?}: {reason}");
            rules::check_document_name(bucket, key).map_err(|error| refuse(error.to_string()))?;
            let becomes = match change {
                KvChange::Set { value, ttl } => {
                    Some((value.clone(), ttl.map(|ttl| now.saturating_add(as_micros(ttl)))))
                }
                KvChange::Delete => None,
                KvChange::Increment { by } => {
                    let stored = self.planned(&changes, bucket, key, now);
                    let sum = rules::incremented(stored.as_ref().map(|(value, _)| &**value), *by).map_err(refuse)?;
                    Some((sum.to_string().into(), stored.and_then(|(_, expires)| expires)))
                }
            };
            changes.push(Change { collection: bucket.clone(), key: key.clone(), becomes });
        }
        Ok(changes)
    }

    /// How a document will stand after `changes`.
    fn planned(&self, changes: &[Change], collection: &str, key: &str, now: i64) -> Option<(Bytes, Option<i64>)> {
        match changes.iter().rev().find(|change| change.collection == collection && change.key == key) {
            Some(change) => change.becomes.clone(),
            None => self.live(collection, key, now).map(|entry| (entry.value.clone(), entry.expires)),
        }
    }

    pub(in crate::provider) fn apply(&mut self, changes: Vec<Change>) {
        for Change { collection, key, becomes } in changes {
            match becomes {
                Some((value, expires)) => drop(self.put(&collection, &key, value, expires)),
                None => self.remove(&collection, &key),
            }
        }
    }
}
