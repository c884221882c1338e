//! The inbox: reading what others left, and moving it into the log.
//!
//! Rows are read and matched on the side of the caller, and moved by the writer, which takes those only that are still
//! there: another process may have moved them meanwhile. SQLite has one writer at a time, so positions are in the order
//! of commits.

use std::collections::HashSet;

use sqlx::Row as _;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::row::signed;
use super::statement::json_list;
use super::writer::{Step, Tx};
use crate::provider::inbox::InboxRow;
use crate::provider::{Append, Appended, RouteRequest};

/// How many rows are read at once.
const PAGE: usize = 64;

/// No more rows are read beyond so many bytes of them.
const BYTES: usize = 8 << 20;

/// SQLite keeps any value in any column: texts are read as the bytes that they are, and what is too long is not read.
const ROWS: &str = "SELECT position, CAST(type AS BLOB), iif(typeof(source) = 'integer', source, -1), \
    iif(typeof(created_at) = 'integer', created_at, NULL), max(ifnull(length(CAST(payload AS BLOB)), 0), \
    ifnull(length(CAST(binary AS BLOB)), 0), ifnull(length(CAST(metadata AS BLOB)), 0)) AS size, \
    CAST(id AS BLOB), CAST(key AS BLOB), CAST(user_id AS BLOB), CAST(session_id AS BLOB), CAST(instance_id AS BLOB), \
    CAST(schema AS BLOB), CAST(entity AS BLOB), CAST(operation AS BLOB), CAST(trace_parent AS BLOB), \
    CAST(caused_by AS BLOB), CAST(content_type AS BLOB), \
    iif(length(CAST(metadata AS BLOB)) <= ?1, CAST(metadata AS BLOB), NULL), \
    iif(length(CAST(payload AS BLOB)) <= ?1, CAST(payload AS BLOB), NULL), \
    iif(length(CAST(binary AS BLOB)) <= ?1, CAST(binary AS BLOB), NULL) \
    FROM inbox WHERE position > ?2 ORDER BY position LIMIT ?3";

/// The first rows, as many as are wanted and not too large together.
pub(super) async fn read(pool: &SqlitePool, request: &RouteRequest<'_>) -> sqlx::Result<Vec<InboxRow>> {
    let (mut found, mut bytes): (Vec<InboxRow>, usize) = (Vec::new(), 0);
    while found.len() < request.max && bytes < BYTES {
        let after = found.last().map_or(i64::MIN, |row| row.position);
        let page = PAGE.min(request.max - found.len());
        let query = sqlx::query(ROWS).bind(signed(request.max_payload)).bind(after).bind(signed(page as u64));
        let rows = query.fetch_all(pool).await?;
        for row in &rows {
            let row = inbox_row(row, request.max_payload)?;
            bytes += row.payload.as_ref().map_or(0, String::len) + row.binary.as_ref().map_or(0, Vec::len);
            found.push(row);
        }
        if rows.len() < page {
            break;
        }
    }
    Ok(found)
}

fn inbox_row(row: &SqliteRow, max_payload: u64) -> sqlx::Result<InboxRow> {
    let mut unreadable = None;
    let mut text = |at: usize, column: &'static str| -> sqlx::Result<Option<String>> {
        let bytes: Option<Vec<u8>> = row.try_get(at)?;
        Ok(bytes.and_then(|bytes| String::from_utf8(bytes).map_err(|_| unreadable = Some(column)).ok()))
    };
    let mut read = InboxRow {
        position: row.try_get(0)?,
        event_type: text(1, "type")?.unwrap_or_default(),
        source: row.try_get(2)?,
        created_at: row.try_get(3)?,
        oversize: u64::try_from(row.try_get::<i64, _>(4)?).ok().filter(|&size| size > max_payload),
        id: text(5, "id")?,
        key: text(6, "key")?,
        user_id: text(7, "user_id")?,
        session_id: text(8, "session_id")?,
        instance_id: text(9, "instance_id")?,
        schema: text(10, "schema")?,
        entity: text(11, "entity")?,
        operation: text(12, "operation")?,
        trace_parent: text(13, "trace_parent")?,
        caused_by: text(14, "caused_by")?,
        content_type: text(15, "content_type")?,
        metadata: text(16, "metadata")?,
        payload: text(17, "payload")?,
        binary: row.try_get(18)?,
        rows: None,
        unreadable: None,
    };
    read.unreadable = unreadable;
    Ok(read)
}

impl Tx<'_> {
    /// Takes the rows that are still there out of the inbox, and appends what they become.
    pub(super) async fn route(&mut self, rows: &[(i64, Append)], careful: bool) -> Step<Vec<Option<Appended>>> {
        let positions = json_list(rows.iter().map(|(position, _)| *position));
        let text = "DELETE FROM inbox WHERE position IN (SELECT value FROM json_each(?)) RETURNING position";
        // What is erased from the log later must not be left behind here.
        sqlx::query("PRAGMA secure_delete = ON").execute(&mut *self.connection).await?;
        let taken: Vec<i64> = sqlx::query_scalar(text).bind(positions).fetch_all(&mut *self.connection).await?;
        sqlx::query("PRAGMA secure_delete = OFF").execute(&mut *self.connection).await?;
        let taken: HashSet<i64> = taken.into_iter().collect();
        let batch: Vec<&Append> =
            rows.iter().filter(|(position, _)| taken.contains(position)).map(|(_, append)| append).collect();
        let mut appended = self.append(&batch, careful).await?.into_iter();
        Ok(rows.iter().map(|(position, _)| taken.contains(position).then(|| appended.next()).flatten()).collect())
    }
}
