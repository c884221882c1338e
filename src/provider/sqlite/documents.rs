//! Documents, and the key-value writes of settlements.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::sqlite::{SqliteConnection, SqlitePool, SqliteRow};

use super::row::{signed, unsigned};
use super::statement::{Parameters, Values};
use super::writer::{Step, Tx, as_micros};
use crate::delivery::{KvChange, KvWrite, Next};
use crate::error::Result;
use crate::provider::{Document, Expect, Settlement, rules};

const WANTED: Values = Values {
    head: "WITH v(collection, key) AS (VALUES",
    columns: 2,
    tail: ") SELECT d.collection, d.key, d.value, d.expires FROM v \
           JOIN documents d ON d.collection = v.collection AND d.key = v.key",
};
const PUT: Values = Values {
    head: "INSERT OR REPLACE INTO documents (collection, key, value, revision, expires) VALUES",
    columns: 5,
    tail: "",
};
const DELETE: Values =
    Values { head: "DELETE FROM documents WHERE (collection, key) IN (VALUES", columns: 2, tail: ")" };

/// A change to one document, whoever asks for it.
pub(super) struct Put {
    pub(super) collection: String,
    pub(super) key: String,
    /// `None` removes it.
    pub(super) value: Option<Bytes>,
    pub(super) expect: Expect,
    pub(super) ttl: Option<Duration>,
}

/// What a document becomes: its value and when it expires, or nothing.
type Becomes = Option<(Bytes, Option<i64>)>;
type Name<'a> = (&'a str, &'a str);

impl Tx<'_> {
    /// Changes a document if it stands as expected: its new revision, or whether it was there to be removed.
    pub(super) async fn put(&mut self, put: &Put) -> Step<Result<u64>> {
        let Put { collection, key, value, expect, ttl } = put;
        if let Err(error) = rules::check_document_name(collection, key) {
            return Ok(Err(error));
        }
        let text =
            "SELECT revision FROM documents WHERE collection = ? AND key = ? AND (expires IS NULL OR expires > ?)";
        let query = sqlx::query_scalar(text).bind(&**collection).bind(&**key).bind(self.now);
        let stands: Option<i64> = query.fetch_optional(&mut *self.connection).await?;
        let stands = stands.map(unsigned);
        if !expect.holds(stands) {
            return Ok(Err(expect.conflict(collection, key, stands)));
        }
        let expires = ttl.map(|ttl| self.now.saturating_add(as_micros(ttl)));
        let becomes: Becomes = value.as_ref().map(|value| (value.clone(), expires));
        let is_kept = becomes.is_some();
        let revision = self.apply(BTreeMap::from([((&**collection, &**key), becomes)])).await?;
        Ok(Ok(if is_kept { revision } else { u64::from(stands.is_some()) }))
    }

    /// Applies the writes of a success. `Err` says which one cannot be applied, and then none was.
    pub(super) async fn write(&mut self, settlement: &Settlement) -> Step<std::result::Result<(), String>> {
        if settlement.next != Next::Complete || settlement.writes.is_empty() {
            return Ok(Ok(()));
        }
        let added = settlement.writes.iter().filter(|write| matches!(write.change, KvChange::Increment { .. }));
        let added: BTreeSet<Name<'_>> = added.map(|write| (&*write.bucket, &*write.key)).collect();
        let added: Vec<Name<'_>> = added.into_iter().collect();
        let rows = WANTED
            .fetch(self.connection, &added, |name, to| {
                to.add(name.0).add(name.1);
            })
            .await?;
        let mut stored: BTreeMap<Name<'_>, Becomes> = BTreeMap::new();
        for row in &rows {
            let expires: Option<i64> = row.try_get(3)?;
            if expires.is_none_or(|expires| expires > self.now) {
                let value = Bytes::from(row.try_get::<Vec<u8>, _>(2)?);
                stored.insert((row.try_get(0)?, row.try_get(1)?), Some((value, expires)));
            }
        }
        match plan(&settlement.writes, &stored, self.now) {
            Err(reason) => Ok(Err(reason)),
            Ok(changes) => self.apply(changes).await.map(|_| Ok(())),
        }
    }

    /// Stores and removes documents, and returns the last revision given out.
    async fn apply(&mut self, changes: BTreeMap<Name<'_>, Becomes>) -> Step<u64> {
        let (kept, gone): (Vec<_>, Vec<_>) = changes.into_iter().partition(|(_, becomes)| becomes.is_some());
        let gone: Vec<Name<'_>> = gone.into_iter().map(|(name, _)| name).collect();
        DELETE
            .execute(self.connection, &gone, |name, to| {
                to.add(name.0).add(name.1);
            })
            .await?;
        if kept.is_empty() {
            return Ok(0);
        }
        let advance = "UPDATE head SET revision = revision + ? RETURNING revision";
        let count = kept.len() as i64;
        let last: i64 = sqlx::query_scalar(advance).bind(count).fetch_one(&mut *self.connection).await?;
        let rows: Vec<_> = (last - count + 1..).zip(kept).collect();
        let bind = |(revision, ((collection, key), becomes)): &(i64, (Name<'_>, Becomes)), to: &mut Parameters| {
            let value = becomes.as_ref().map(|(value, _)| &**value);
            let expires = becomes.as_ref().and_then(|&(_, expires)| expires);
            to.add(*collection).add(*key).add(value).add(*revision).add(expires);
        };
        PUT.execute(self.connection, &rows, bind).await?;
        Ok(unsigned(last))
    }
}

/// What writes in their order lead to, given what is stored under the keys that are added to.
fn plan<'a>(
    writes: &'a [KvWrite],
    stored: &BTreeMap<Name<'_>, Becomes>,
    now: i64,
) -> std::result::Result<BTreeMap<Name<'a>, Becomes>, String> {
    let mut changes: BTreeMap<Name<'a>, Becomes> = BTreeMap::new();
    for KvWrite { bucket, key, change } in writes {
        let refuse = |reason: String| format!("key {key:?} of bucket {bucket:?}: {reason}");
        rules::check_document_name(bucket, key).map_err(|error| refuse(error.to_string()))?;
        let name: Name<'a> = (bucket, key);
        let becomes = match change {
            KvChange::Set { value, ttl } => Some((value.clone(), ttl.map(|ttl| now.saturating_add(as_micros(ttl))))),
            KvChange::Delete => None,
            KvChange::Increment { by } => {
                let before = changes.get(&name).or_else(|| stored.get(&name)).cloned().flatten();
                let sum = rules::incremented(before.as_ref().map(|(value, _)| &**value), *by).map_err(refuse)?;
                Some((sum.to_string().into(), before.and_then(|(_, expires)| expires)))
            }
        };
        changes.insert(name, becomes);
    }
    Ok(changes)
}

fn document(row: &SqliteRow, at: usize) -> sqlx::Result<Document> {
    let value = row.try_get::<Vec<u8>, _>(at)?.into();
    Ok(Document { value, revision: unsigned(row.try_get(at + 1)?) })
}

/// The document, if it is there and has not expired.
pub(super) async fn get(pool: &SqlitePool, collection: &str, key: &str, now: i64) -> sqlx::Result<Option<Document>> {
    let text = "SELECT value, revision FROM documents \
                WHERE collection = ? AND key = ? AND (expires IS NULL OR expires > ?)";
    let row = sqlx::query(text).bind(collection).bind(key).bind(now).fetch_optional(pool).await?;
    row.map(|row| document(&row, 0)).transpose()
}

/// A page of a collection.
pub(super) async fn list(
    pool: &SqlitePool,
    collection: &str,
    after: Option<&str>,
    max: usize,
    now: i64,
) -> sqlx::Result<Vec<(String, Document)>> {
    let text = "SELECT key, value, revision FROM documents WHERE collection = ?1 AND (?2 IS NULL OR key > ?2) \
                AND (expires IS NULL OR expires > ?3) ORDER BY key LIMIT ?4";
    let query = sqlx::query(text).bind(collection).bind(after).bind(now).bind(signed(max as u64));
    let rows = query.fetch_all(pool).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, document(row, 1)?))).collect()
}

/// Drops what has expired.
pub(super) async fn expire(connection: &mut SqliteConnection, now: i64) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM documents WHERE expires <= ?").bind(now).execute(connection).await?;
    Ok(())
}
