//! Documents, and the key-value writes of settlements.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::Store;
use super::row::{as_micros, limit, signed, unsigned};
use super::session::Session;
use super::trouble::{Step, Trouble};
use crate::delivery::{KvChange, KvWrite};
use crate::provider::{Document, Expect, rules};

const GET: &str = "SELECT value, revision FROM {s}.documents WHERE collection = $2 AND key = $3 \
    AND (expires IS NULL OR expires > {now})";
const LIST: &str = "SELECT key, value, revision FROM {s}.documents WHERE collection = $2 AND key {after} $3 \
    AND (expires IS NULL OR expires > {now}) ORDER BY key LIMIT $4";
/// Stores whatever stands, or only where nothing does.
const PUT: &str = "INSERT INTO {s}.documents AS d (collection, key, value, revision, expires) \
    VALUES ($2, $3, $4, nextval('{s}.revisions'), {now} + $5) ON CONFLICT (collection, key) DO UPDATE \
    SET value = excluded.value, expires = excluded.expires, revision = nextval('{s}.revisions') \
    WHERE $6 OR d.expires <= {now} RETURNING revision";
const REPLACE: &str = "UPDATE {s}.documents SET value = $4, expires = {now} + $5, revision = nextval('{s}.revisions') \
    WHERE collection = $2 AND key = $3 AND revision = $6 AND (expires IS NULL OR expires > {now}) RETURNING revision";
const DELETE: &str = "DELETE FROM {s}.documents WHERE collection = $2 AND key = $3 \
    AND ($4::bigint IS NULL OR revision = $4) AND (expires IS NULL OR expires > {now})";
/// Some of what has expired, without waiting for anybody.
const EXPIRE: &str = "DELETE FROM {s}.documents WHERE (collection, key) IN (SELECT collection, key FROM {s}.documents \
    WHERE expires <= (SELECT {now}) ORDER BY expires LIMIT $2 FOR UPDATE SKIP LOCKED)";

/// What is not there cannot be locked: a row that has expired since ever stands for it within the transaction.
const RESERVE: &str = "INSERT INTO {s}.documents (collection, key, value, revision, expires) \
    SELECT i.collection, i.key, '', 0, 0 FROM unnest($1::bytea[], $2::bytea[]) AS i(collection, key) \
    ON CONFLICT DO NOTHING";
const LOCK: &str = "SELECT {now}, d.collection, d.key, d.value, d.expires \
    FROM unnest($2::bytea[], $3::bytea[]) AS i(collection, key) \
    JOIN {s}.documents d ON d.collection = i.collection AND d.key = i.key \
    ORDER BY d.collection, d.key FOR UPDATE OF d";
const CHANGE: &str = "UPDATE {s}.documents d SET value = i.value, expires = i.expires, \
    revision = nextval('{s}.revisions') FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bigint[]) \
    AS i(collection, key, value, expires) WHERE d.collection = i.collection AND d.key = i.key";
const REMOVE: &str = "DELETE FROM {s}.documents d USING unnest($1::bytea[], $2::bytea[]) AS i(collection, key) \
    WHERE d.collection = i.collection AND d.key = i.key";

/// How many expired documents one step removes.
const EXPIRE_STEP: i64 = 1_000;

/// How often documents that others remove meanwhile are looked for.
const RESERVE_TRIES: usize = 10;

/// The names of many documents, as columns.
fn columns<'a>(names: impl Iterator<Item = Name<'a>>) -> (Vec<&'a [u8]>, Vec<&'a [u8]>) {
    names.map(|(collection, key)| (collection.as_bytes(), key.as_bytes())).unzip()
}

fn document(row: &PgRow, at: usize) -> sqlx::Result<Document> {
    let value = Bytes::copy_from_slice(row.try_get(at)?);
    Ok(Document { value, revision: unsigned(row.try_get(at + 1)?) })
}

impl Store {
    /// The document, if it is there and has not expired.
    pub(super) async fn document(&self, collection: &str, key: &str) -> Step<Option<Document>> {
        let mut session = self.session().await?;
        let statement = self.statement(GET).bind(self.now()).bind(collection.as_bytes()).bind(key.as_bytes());
        let rows = session.rows(statement).await;
        let rows = session.finish(rows).await?;
        Ok(rows.first().map(|row| document(row, 0)).transpose()?)
    }

    /// Stores a document if it stands as expected: its new revision.
    pub(super) async fn put(
        &self,
        collection: &str,
        key: &str,
        value: &Bytes,
        expect: Expect,
        ttl: Option<Duration>,
    ) -> Step<u64> {
        rules::check_document_name(collection, key)?;
        let text = if matches!(expect, Expect::Revision(_)) { REPLACE } else { PUT };
        let statement = self.statement(text).bind(self.now()).bind(collection.as_bytes()).bind(key.as_bytes());
        let statement = statement.bind(&**value).bind(ttl.map(as_micros));
        let statement = match expect {
            Expect::Revision(revision) => statement.bind(signed(revision)),
            Expect::Any => statement.bind(true),
            Expect::Absent => statement.bind(false),
        };
        let mut session = self.session().await?;
        let rows = session.rows(statement).await;
        let rows = session.finish(rows).await?;
        match rows.first() {
            Some(row) => Ok(unsigned(row.try_get(0)?)),
            None => Err(self.conflict(collection, key, expect).await?),
        }
    }

    /// Removes a document if it stands as expected. `false` when there was none.
    pub(super) async fn delete(&self, collection: &str, key: &str, expect: Expect) -> Step<bool> {
        rules::check_document_name(collection, key)?;
        let revision = match expect {
            Expect::Any => None,
            // No document has it.
            Expect::Absent => Some(-1),
            Expect::Revision(revision) => Some(signed(revision)),
        };
        let statement = self.statement(DELETE).bind(self.now()).bind(collection.as_bytes()).bind(key.as_bytes());
        let mut session = self.session().await?;
        let removed = session.execute(statement.bind(revision)).await;
        if session.finish(removed).await? > 0 {
            return Ok(true);
        }
        let stands = self.document(collection, key).await?.map(|document| document.revision);
        match expect {
            Expect::Any => Ok(false),
            _ if expect.holds(stands) => Ok(false),
            _ => Err(expect.conflict(collection, key, stands).into()),
        }
    }

    async fn conflict(&self, collection: &str, key: &str, expect: Expect) -> Step<Trouble> {
        let stands = self.document(collection, key).await?.map(|document| document.revision);
        Ok(expect.conflict(collection, key, stands).into())
    }

    /// A page of a collection.
    pub(super) async fn documents(
        &self,
        collection: &str,
        after: Option<&str>,
        max: usize,
    ) -> Step<Vec<(String, Document)>> {
        let text = LIST.replace("{after}", if after.is_some() { ">" } else { ">=" });
        let statement = self.statement(&text).bind(self.now()).bind(collection.as_bytes());
        let statement = statement.bind(after.unwrap_or_default().as_bytes()).bind(limit(max));
        let mut session = self.session().await?;
        let rows = session.rows(statement).await;
        let rows = session.finish(rows).await?;
        let named = |row: &PgRow| -> sqlx::Result<(String, Document)> {
            Ok((String::from_utf8_lossy(row.try_get(0)?).into_owned(), document(row, 1)?))
        };
        Ok(rows.iter().map(named).collect::<sqlx::Result<_>>()?)
    }

    /// Drops what has expired.
    pub(super) async fn expire(&self) -> Step<()> {
        loop {
            let mut session = self.session().await?;
            let removed = session.execute(self.statement(EXPIRE).bind(self.now()).bind(EXPIRE_STEP)).await;
            if session.finish(removed).await? < EXPIRE_STEP.unsigned_abs() {
                return Ok(());
            }
        }
    }
}

/// What a document is: its value and when it expires, or nothing.
type Stands = Option<(Bytes, Option<i64>)>;
type Name<'a> = (&'a str, &'a str);

/// The documents that a batch of settlements writes, locked until the transaction ends.
#[derive(Default)]
pub(super) struct Shelf<'a> {
    now: i64,
    stands: BTreeMap<Name<'a>, Stands>,
    changed: BTreeSet<Name<'a>>,
}

impl<'a> Shelf<'a> {
    /// Locks what is to be written, in the order of names.
    pub(super) async fn lock(session: &mut Session<'_>, writes: impl Iterator<Item = &'a KvWrite>) -> Step<Self> {
        let names: BTreeSet<Name<'a>> = writes
            .map(|write| (write.bucket.as_str(), write.key.as_str()))
            .filter(|(bucket, key)| rules::check_document_name(bucket, key).is_ok())
            .collect();
        let mut shelf = Self::default();
        if names.is_empty() {
            return Ok(shelf);
        }
        let store = session.store;
        let (collections, keys) = columns(names.iter().copied());
        for _ in 0..RESERVE_TRIES {
            session.execute(store.statement(RESERVE).bind(&collections).bind(&keys)).await?;
            let lock = store.statement(LOCK).bind(store.now()).bind(&collections).bind(&keys);
            let rows = session.rows(lock).await?;
            // What another transaction removed while this one waited for it is gone: then it is reserved anew.
            if rows.len() == names.len() {
                for (name, row) in names.iter().zip(&rows) {
                    shelf.now = row.try_get(0)?;
                    let expires: Option<i64> = row.try_get(4)?;
                    let is_live = expires.is_none_or(|expires| expires > shelf.now);
                    let value = Bytes::copy_from_slice(row.try_get(3)?);
                    shelf.stands.insert(*name, is_live.then_some((value, expires)));
                }
                return Ok(shelf);
            }
        }
        Err(sqlx::Error::Protocol("documents were removed again and again while they were written".to_owned()).into())
    }

    /// Applies the writes of a success in memory. `Err` says which one cannot be applied, and then none was.
    pub(super) fn write(&mut self, writes: &'a [KvWrite]) -> std::result::Result<(), String> {
        let mut changes: BTreeMap<Name<'a>, Stands> = BTreeMap::new();
        for KvWrite { bucket, key, change } in writes {
            let refuse = |reason: String| format!("key {key:?} of bucket {bucket:?}: {reason}");
            rules::check_document_name(bucket, key).map_err(|error| refuse(error.to_string()))?;
            let name: Name<'a> = (bucket, key);
            let becomes = match change {
                KvChange::Set { value, ttl } => {
                    Some((value.clone(), ttl.map(|ttl| self.now.saturating_add(as_micros(ttl)))))
                }
                KvChange::Delete => None,
                KvChange::Increment { by } => {
                    let before = changes.get(&name).or_else(|| self.stands.get(&name)).cloned().flatten();
                    let sum = rules::incremented(before.as_ref().map(|(value, _)| &**value), *by).map_err(refuse)?;
                    Some((sum.to_string().into(), before.and_then(|(_, expires)| expires)))
                }
            };
            changes.insert(name, becomes);
        }
        self.changed.extend(changes.keys());
        self.stands.extend(changes);
        Ok(())
    }

    /// Stores what was written.
    pub(super) async fn store(&self, session: &mut Session<'_>) -> Step<()> {
        let (kept, gone): (Vec<_>, Vec<_>) = self.stands.iter().partition(|(_, stands)| stands.is_some());
        let store = session.store;
        if !gone.is_empty() {
            let (collections, keys) = columns(gone.iter().map(|(name, _)| **name));
            session.execute(store.statement(REMOVE).bind(collections).bind(keys)).await?;
        }
        let kept: Vec<_> = kept.into_iter().filter(|(name, _)| self.changed.contains(*name)).collect();
        if kept.is_empty() {
            return Ok(());
        }
        let (collections, keys) = columns(kept.iter().map(|(name, _)| **name));
        let values: Vec<&[u8]> = kept.iter().filter_map(|(_, stands)| stands.as_ref()).map(|one| &*one.0).collect();
        let expires: Vec<Option<i64>> =
            kept.iter().filter_map(|(_, stands)| stands.as_ref()).map(|one| one.1).collect();
        let change = store.statement(CHANGE).bind(collections).bind(keys).bind(values).bind(expires);
        session.execute(change).await.map(drop)
    }
}
