//! Capture in SQLite: row triggers that write the inbox of the same file.
//!
//! SQLite has no transition tables and no settings of a session, so there is a trigger for each row, and events name no
//! user. What SQLite cannot say in JSON is told as text: bytes as `\x` and hexadecimal digits, as PostgreSQL writes them,
//! and infinities. A table whose columns change keeps its triggers as they were: `status` says so.

use sqlx::{AssertSqlSafe, Row as _, SqliteConnection, SqlitePool};

use super::{Operation, Status, Table, Watch, json_name, literal, quoted, segment};
use crate::error::{Error, Result};

/// The schema of every event: SQLite's name for the file itself.
const SCHEMA: &str = "main";

/// What was asked for, by table.
const CAPTURES: &str =
    "CREATE TABLE IF NOT EXISTS tidegate_captures (table_name TEXT PRIMARY KEY, watch TEXT NOT NULL)";

/// The tables of the store itself.
const OWN: [&str; 9] = [
    "inbox",
    "head",
    "events",
    "subscriptions",
    "deliveries",
    "attempts",
    "progress",
    "documents",
    "tidegate_captures",
];

/// A table that can be captured.
struct Relation {
    name: String,
    columns: Vec<String>,
    key: Vec<String>,
}

fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> Error {
    move |error| Error::store("sqlite", action, error)
}

/// Installs the triggers that the watch asks for.
pub(super) async fn install(pool: &SqlitePool, watch: &Watch) -> Result<Status> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed("begin"))?;
    if !is_there(&mut tx, "inbox").await? {
        return Err(Error::Incompatible {
            what: "the database".to_owned(),
            reason: "holds no inbox: let tidegate open the file once as its provider, and keep your tables in it"
                .into(),
        });
    }
    let relation = Relation::find(&mut tx, &watch.table).await?;
    let relation = relation.ok_or_else(|| Error::not_found("table", watch.table.to_string()))?;
    let triggers = relation.triggers(watch)?;
    drop_triggers(&mut tx, &relation.name).await?;
    for (_, text) in &triggers {
        run(&mut tx, text).await.map_err(failed("make a trigger"))?;
    }
    run(&mut tx, CAPTURES).await.map_err(failed("note what is captured"))?;
    let text = "INSERT INTO tidegate_captures VALUES (?, ?) \
        ON CONFLICT (table_name) DO UPDATE SET watch = excluded.watch";
    let note = sqlx::query(text).bind(&relation.name).bind(serde_json::json!(watch).to_string());
    note.execute(&mut *tx).await.map_err(failed("note what is captured"))?;
    tx.commit().await.map_err(failed("commit"))?;
    Ok(relation.status(watch, Vec::new()))
}

async fn run(connection: &mut SqliteConnection, text: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(text.to_owned())).execute(connection).await.map(drop)
}

async fn is_there(connection: &mut SqliteConnection, name: &str) -> Result<bool> {
    let text = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?";
    let count: i64 =
        sqlx::query_scalar(text).bind(name).fetch_one(connection).await.map_err(failed("look for a table"))?;
    Ok(count > 0)
}

/// Our triggers on a table: their names, and the statements that made them.
async fn found(connection: &mut SqliteConnection, table: &str) -> Result<Vec<(String, String)>> {
    let names = Operation::ALL.map(|operation| trigger_name(operation, table));
    let text = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name IN (?, ?, ?) ORDER BY name";
    let [create, update, delete] = &names;
    let query = sqlx::query(text).bind(create).bind(update).bind(delete);
    let rows = query.fetch_all(connection).await.map_err(failed("look for triggers"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn drop_triggers(connection: &mut SqliteConnection, table: &str) -> Result<()> {
    for (name, _) in found(connection, table).await? {
        run(connection, &format!("DROP TRIGGER {}", quoted(&name))).await.map_err(failed("drop a trigger"))?;
    }
    Ok(())
}

/// Triggers of a file share one space of names.
fn trigger_name(operation: Operation, table: &str) -> String {
    format!("tidegate_{}_{table}", operation.as_str())
}

/// How every captured table stands.
pub(super) async fn status(pool: &SqlitePool) -> Result<Vec<Status>> {
    let mut connection = pool.acquire().await.map_err(failed("connect"))?;
    let mut all = Vec::new();
    for (name, watch) in kept(&mut connection).await? {
        let table = Table { schema: None, name: name.clone() };
        let relation = match Relation::find(&mut connection, &table).await {
            Ok(found) => found.ok_or_else(|| "the table is gone: remove its capture".to_owned()),
            Err(Error::Invalid { reason, .. }) => Err(format!("{name} {reason}: remove its capture")),
            Err(other) => return Err(other),
        };
        all.push(match relation {
            Ok(relation) => {
                let drift = drift(&mut connection, &relation, &watch).await?;
                relation.status(&watch, drift)
            }
            Err(words) => Relation { name, columns: Vec::new(), key: Vec::new() }.status(&watch, vec![words]),
        });
    }
    Ok(all)
}

async fn kept(connection: &mut SqliteConnection) -> Result<Vec<(String, Watch)>> {
    if !is_there(connection, "tidegate_captures").await? {
        return Ok(Vec::new());
    }
    let text = "SELECT table_name, watch FROM tidegate_captures ORDER BY table_name";
    let rows = sqlx::query(text).fetch_all(connection).await.map_err(failed("read what is captured"))?;
    let kept = rows.iter().map(|row| {
        let watch = serde_json::from_str(row.get(1)).map_err(|error| Error::Incompatible {
            what: format!("tidegate_captures, {}", row.get::<String, _>(0)),
            reason: format!("was written by another version of tidegate: {error}").into(),
        })?;
        Ok((row.get(0), watch))
    });
    kept.collect()
}

async fn drift(connection: &mut SqliteConnection, relation: &Relation, watch: &Watch) -> Result<Vec<String>> {
    let there = found(connection, &relation.name).await?;
    let wanted = match relation.triggers(watch) {
        Ok(wanted) => wanted,
        Err(error) => return Ok(vec![format!("{error}: install again")]),
    };
    let mut drift = Vec::new();
    for (name, text) in &wanted {
        match there.iter().find(|(known, _)| known == name) {
            None => drift.push(format!("trigger {name} is missing: install again")),
            Some((_, known)) if known != text => drift.push(format!(
                "trigger {name} is not as this version makes it for the columns that the table has now: install again"
            )),
            Some(_) => {}
        }
    }
    for (name, _) in &there {
        if !wanted.iter().any(|(wanted, _)| wanted == name) {
            drift.push(format!("trigger {name} is not wanted: install again"));
        }
    }
    Ok(drift)
}

/// Removes what was installed for the table.
pub(super) async fn remove(pool: &SqlitePool, table: &Table) -> Result<()> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed("begin"))?;
    let all = kept(&mut tx).await?;
    let name = all.iter().map(|(name, _)| name).find(|name| name.eq_ignore_ascii_case(&table.name));
    let name = name.ok_or_else(|| Error::not_found("capture of table", table.to_string()))?;
    drop_triggers(&mut tx, name).await?;
    let text = match all.len() {
        1 => "DROP TABLE tidegate_captures".to_owned(),
        _ => format!("DELETE FROM tidegate_captures WHERE table_name = {}", literal(name)),
    };
    run(&mut tx, &text).await.map_err(failed("forget what was captured"))?;
    tx.commit().await.map_err(failed("commit"))
}

impl Relation {
    /// The table of this name, in any case of letters as SQLite has it.
    async fn find(connection: &mut SqliteConnection, table: &Table) -> Result<Option<Self>> {
        let refuse = |reason: &'static str| Err(Error::invalid("table", table.to_string(), reason));
        if table.schema.as_ref().is_some_and(|schema| schema != SCHEMA) {
            return refuse("has a schema: SQLite has none but main");
        }
        let text = "SELECT name, type, sql LIKE 'create virtual%' FROM sqlite_schema \
            WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE";
        let row = sqlx::query(text).bind(&table.name).fetch_optional(&mut *connection).await;
        let Some(row) = row.map_err(failed("look for a table"))? else { return Ok(None) };
        let (name, kind, is_virtual): (String, String, bool) = (row.get(0), row.get(1), row.get(2));
        if kind == "view" {
            return refuse("is a view: capture the tables behind it");
        }
        if is_virtual {
            return refuse("is a virtual table, which has no triggers");
        }
        if OWN.contains(&name.as_str()) || name.starts_with("sqlite_") {
            return refuse("is not the application's: capturing it would never end");
        }
        // 1 is a hidden column of a virtual table; 2 and 3 are generated ones.
        let text = "SELECT name, pk FROM pragma_table_xinfo(?) WHERE hidden <> 1 ORDER BY cid";
        let rows = sqlx::query(text).bind(&name).fetch_all(connection).await.map_err(failed("read the columns"))?;
        let columns = rows.iter().map(|row| row.get(0)).collect();
        let mut key: Vec<(i64, String)> =
            rows.iter().map(|row| (row.get(1), row.get(0))).filter(|&(place, _)| place > 0).collect();
        key.sort();
        Ok(Some(Self { name, columns, key: key.into_iter().map(|(_, name)| name).collect() }))
    }

    fn status(&self, watch: &Watch, drift: Vec<String>) -> Status {
        let table = Table { schema: None, name: self.name.clone() };
        Status::new(&table, self.event_type(), watch, self.key.clone(), drift)
    }

    fn event_type(&self) -> String {
        format!("{SCHEMA}.{}", segment(&self.name))
    }

    /// The triggers: their names, and the statements that make them.
    fn triggers(&self, watch: &Watch) -> Result<Vec<(String, String)>> {
        let all: Vec<&str> = self.columns.iter().map(String::as_str).collect();
        let key: Vec<&str> = self.key.iter().map(String::as_str).collect();
        let told = watch.told(&all, &key)?;
        let made = watch.operations.iter().map(|&operation| {
            let name = trigger_name(operation, &self.name);
            let (what, body) = self.body(operation, watch, &told);
            let text =
                format!("CREATE TRIGGER {} AFTER {what} ON {} BEGIN {body} END", quoted(&name), quoted(&self.name));
            (name, text)
        });
        Ok(made.collect())
    }

    fn body(&self, operation: Operation, watch: &Watch, told: &[&str]) -> (&'static str, String) {
        let nothing = || "'null'".to_owned();
        let created = || self.insert(watch, Operation::Create, "NEW", &nothing(), &row("NEW", told), &nothing());
        let deleted = || self.insert(watch, Operation::Delete, "OLD", &row("OLD", told), &nothing(), &nothing());
        match operation {
            Operation::Create => ("INSERT", format!("{};", created())),
            Operation::Delete => ("DELETE", format!("{};", deleted())),
            Operation::Update => {
                let changed = format!("'[' || substr({}, 2) || ']'", changes(told));
                let update = self.insert(watch, operation, "NEW", &row("OLD", told), &row("NEW", told), &changed);
                let (same, any) = (self.same_key(), changes(told));
                let mut text = format!("{update} WHERE {same} AND {any} <> '';");
                // An update that changes the key deletes the old one and creates the new one.
                for (operation, insert) in [(Operation::Delete, deleted()), (Operation::Create, created())] {
                    if watch.tells(operation) && !self.key.is_empty() {
                        text.push_str(&format!(" {insert} WHERE NOT ({same});"));
                    }
                }
                ("UPDATE", text)
            }
        }
    }

    fn same_key(&self) -> String {
        let same = self.key.iter().map(|column| {
            let column = quoted(column);
            format!("OLD.{column} COLLATE BINARY IS NEW.{column}")
        });
        let same = same.collect::<Vec<_>>().join(" AND ");
        if same.is_empty() { "1".to_owned() } else { same }
    }

    /// What leaves one event, without its end: conditions may follow.
    fn insert(
        &self,
        watch: &Watch,
        operation: Operation,
        side: &str,
        before: &str,
        after: &str,
        changed: &str,
    ) -> String {
        let size = "length(CAST(b AS BLOB)) + length(CAST(a AS BLOB)) + length(CAST(c AS BLOB)) + length(CAST(p AS BLOB)) + 80";
        let payload = format!(
            "CASE WHEN {size} > {} THEN '{{\"before\":null,\"after\":null,\"changed\":' || c || ',\"pk\":' || p || ',\"oversize\":' \
             || ({size}) || '}}' ELSE '{{\"before\":' || b || ',\"after\":' || a || ',\"changed\":' || c || ',\"pk\":' || p || '}}' END",
            watch.max_payload
        );
        let entity = if segment(&self.name) == self.name { "NULL".to_owned() } else { literal(&self.name) };
        format!(
            "INSERT INTO inbox (type, entity, key, metadata, payload) SELECT {}, {entity}, {}, {}, {payload} \
             FROM (SELECT {before} AS b, {after} AS a, {changed} AS c, {} AS p)",
            literal(&format!("{}.{}", self.event_type(), operation.as_str())),
            self.key(side),
            literal(&serde_json::json!({"table_name": self.name}).to_string()),
            self.pk(side),
        )
    }

    fn key(&self, side: &str) -> String {
        match &*self.key {
            [] => "NULL".to_owned(),
            [only] => format!("CAST({} AS TEXT)", said(side, only)),
            several => {
                let several: Vec<String> =
                    several.iter().map(|column| format!("json_quote({})", said(side, column))).collect();
                format!("'[' || {} || ']'", several.join(" || ',' || "))
            }
        }
    }

    fn pk(&self, side: &str) -> String {
        let key: Vec<&str> = self.key.iter().map(String::as_str).collect();
        if key.is_empty() { "'null'".to_owned() } else { row(side, &key) }
    }
}

/// A value that JSON can hold.
fn said(side: &str, column: &str) -> String {
    let value = format!("{side}.{}", quoted(column));
    format!(
        "CASE typeof({value}) WHEN 'blob' THEN '\\x' || lower(hex({value})) \
         WHEN 'real' THEN iif(abs({value}) <= 1.7976931348623157e308, {value}, CAST({value} AS TEXT)) ELSE {value} END"
    )
}

/// A row's columns as a JSON object.
fn row(side: &str, columns: &[&str]) -> String {
    let fields = columns.iter().enumerate().map(|(at, column)| {
        let name = json_name(if at == 0 { "{" } else { "," }, column, ":");
        format!("{name} || json_quote({})", said(side, column))
    });
    format!("{} || '}}'", joined(&fields.collect::<Vec<_>>()))
}

/// The names of the columns that differ, each after a comma; an empty text when none does.
fn changes(columns: &[&str]) -> String {
    let names = columns.iter().map(|column| {
        let value = quoted(column);
        // A change of the kind of value alone, from 1 to '1', counts too; one of letters' case does whatever the collation.
        let differs =
            format!("OLD.{value} COLLATE BINARY IS NOT NEW.{value} OR typeof(OLD.{value}) <> typeof(NEW.{value})");
        format!("iif({differs}, {}, '')", json_name(",", column, ""))
    });
    joined(&names.collect::<Vec<_>>())
}

/// Texts one after the other, as a tree: SQLite bounds how deep an expression is, and a table may have many columns.
fn joined(parts: &[String]) -> String {
    match parts {
        [] => "''".to_owned(),
        [only] => only.clone(),
        several => {
            let (left, right) = several.split_at(several.len() / 2);
            format!("({} || {})", joined(left), joined(right))
        }
    }
}
