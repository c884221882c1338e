//! Capture: triggers that leave an event in the inbox for every row that a statement creates, updates or deletes.
//!
//! The triggers run inside the writer's statement, so the events commit with it or not at all, and the writer needs no
//! line of code. Here stands what is wanted of a table and what became of it; `postgres` and `sqlite` do the work.
//! Nothing here reads an inbox, and nothing is sent from a trigger.

mod body;
mod catalog;
mod postgres;
mod sqlite;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions};

use super::outbox::SCHEMA;
use crate::error::{Error, Result};
use crate::event::MAX_PAYLOAD;

/// The database whose tables are captured.
#[derive(Debug, Clone)]
pub struct Capture {
    database: Database,
}

#[derive(Debug, Clone)]
enum Database {
    Postgres { pool: PgPool, schema: String },
    Sqlite(SqlitePool),
}

impl Capture {
    /// Captures tables of a PostgreSQL database whose inbox stands in the schema `tidegate`.
    #[must_use]
    pub fn postgres(pool: PgPool) -> Self {
        Self { database: Database::Postgres { pool, schema: SCHEMA.to_owned() } }
    }

    /// Captures tables that stand in tidegate's own SQLite file.
    #[must_use]
    pub fn sqlite(pool: SqlitePool) -> Self {
        Self { database: Database::Sqlite(pool) }
    }

    /// Another schema of PostgreSQL for the inbox. SQLite has none.
    #[must_use]
    pub fn schema(self, name: &str) -> Self {
        let database = match self.database {
            Database::Postgres { pool, .. } => Database::Postgres { pool, schema: name.to_owned() },
            sqlite @ Database::Sqlite(_) => sqlite,
        };
        Self { database }
    }

    /// Connects to `postgres://…` or `sqlite://PATH`; the file must be there.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `database`, or [`Error::Store`] when nobody answers.
    pub async fn connect(url: &str) -> Result<Self> {
        let scheme = url.split(':').next().unwrap_or_default();
        let refuse = |reason: String| Error::invalid("database", scheme, reason);
        match scheme {
            "postgres" | "postgresql" => {
                let options = PgConnectOptions::from_str(url).map_err(|error| refuse(format!("is no URL: {error}")))?;
                let pool = PgPoolOptions::new().max_connections(2).connect_with(options).await;
                pool.map(Self::postgres).map_err(|error| Error::store("postgres", "connect", error))
            }
            "sqlite" => {
                let options =
                    SqliteConnectOptions::from_str(url).map_err(|error| refuse(format!("is no URL: {error}")))?;
                let pool = SqlitePoolOptions::new().max_connections(2).connect_with(options).await;
                pool.map(Self::sqlite).map_err(|error| Error::store("sqlite", format!("open {url}"), error))
            }
            _ => Err(refuse("capture needs tables: postgres://… or sqlite://PATH".to_owned())),
        }
    }

    /// Installs the triggers that the watch asks for, or brings those that are there into line with it, in one
    /// transaction. Doing it twice is fine. Writes to the table wait meanwhile.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a table or column that is not there, [`Error::Invalid`] for one that cannot be captured,
    /// [`Error::Incompatible`] when the database has no inbox, [`Error::Conflict`] when rights or a lock stand in the
    /// way, and [`Error::Store`] for other trouble. Nothing is changed then.
    pub async fn install(&self, watch: &Watch) -> Result<Status> {
        watch.validate()?;
        match &self.database {
            Database::Postgres { pool, schema } => postgres::install(pool, schema, watch).await,
            Database::Sqlite(pool) => sqlite::install(pool, watch).await,
        }
    }

    /// Every table that something was installed for, and how what stands there differs from what was asked for.
    ///
    /// # Errors
    /// What the database says.
    pub async fn status(&self) -> Result<Vec<Status>> {
        match &self.database {
            Database::Postgres { pool, schema } => postgres::status(pool, schema).await,
            Database::Sqlite(pool) => sqlite::status(pool).await,
        }
    }

    /// Removes what was installed for the table; with the last table, everything that capture has made.
    ///
    /// # Errors
    /// [`Error::NotFound`] when nothing was installed for it; otherwise as [`install`](Self::install).
    pub async fn remove(&self, table: &Table) -> Result<()> {
        match &self.database {
            Database::Postgres { pool, schema } => postgres::remove(pool, schema, table).await,
            Database::Sqlite(pool) => sqlite::remove(pool, table).await,
        }
    }
}

/// What a statement does to rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Rows that are inserted.
    Create,
    /// Rows that are changed.
    Update,
    /// Rows that are deleted; in PostgreSQL also that a table is truncated.
    Delete,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 3] = [Self::Create, Self::Update, Self::Delete];

    /// The last segment of the event's type.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// What is captured of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The table.
    pub table: Table,
    /// What is told: each once, in the order of [`Operation::ALL`].
    pub operations: Vec<Operation>,
    /// The columns that are told and whose change counts; `None` for all, also those that are added later.
    pub columns: Option<Vec<String>>,
    /// Columns that appear nowhere in an event.
    pub exclude: Vec<String>,
    /// An event whose payload would be larger, in bytes, tells of the row's key only.
    pub max_payload: u64,
}

impl Watch {
    /// All operations and all columns, and payloads of at most 1 MiB.
    #[must_use]
    pub fn new(table: Table) -> Self {
        Self {
            table,
            operations: Operation::ALL.to_vec(),
            columns: None,
            exclude: Vec::new(),
            max_payload: MAX_PAYLOAD,
        }
    }

    fn validate(&self) -> Result<()> {
        if self.operations.is_empty() {
            return Err(Error::invalid("ops", "", "at least one of create, update, delete is needed"));
        }
        if self.columns.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::invalid("columns", "", "at least one column is needed"));
        }
        if self.max_payload < LEAST_PAYLOAD {
            return Err(Error::invalid("max_payload", self.max_payload.to_string(), "must be at least 1024 bytes"));
        }
        Ok(())
    }

    fn tells(&self, operation: Operation) -> bool {
        self.operations.contains(&operation)
    }

    /// Those of `all` that are told, in their order.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a column that is named and not there, [`Error::Invalid`] for a key that is to be left out
    /// and when nothing is left to tell.
    fn told<'a>(&self, all: &[&'a str], key: &[&str]) -> Result<Vec<&'a str>> {
        let named = self.exclude.iter().chain(self.columns.iter().flatten());
        for column in named {
            if !all.contains(&column.as_str()) {
                return Err(Error::not_found("column", format!("{}.{column}", self.table)));
            }
        }
        if let Some(column) = self.exclude.iter().find(|column| key.contains(&column.as_str())) {
            return Err(Error::invalid("exclude", column, "is part of the primary key, which every event names"));
        }
        let is_told = |column: &&str| {
            self.columns.as_ref().is_none_or(|columns| columns.iter().any(|named| named == column))
                && !self.exclude.iter().any(|named| named == column)
        };
        let told: Vec<&str> = all.iter().copied().filter(|column| is_told(column)).collect();
        if told.is_empty() {
            return Err(Error::invalid("exclude", self.exclude.join(","), "leaves no column to tell of"));
        }
        Ok(told)
    }
}

/// Room for the key and the marker of a row that is too wide.
const LEAST_PAYLOAD: u64 = 1_024;

/// A table as it is named in SQL: `users`, `public.users` or `"Odd.Schema"."Größe"`. What is not in quotes is folded to lower
/// case, as PostgreSQL does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Table {
    /// The schema, where it is named.
    pub schema: Option<String>,
    /// The table's own name, as it is.
    pub name: String,
}

impl FromStr for Table {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |reason: &'static str| Error::invalid("table", text, reason);
        let (mut parts, mut part, mut is_quoted) = (Vec::new(), String::new(), false);
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '"' if is_quoted && characters.peek() == Some(&'"') => {
                    characters.next();
                    part.push('"');
                }
                '"' => is_quoted = !is_quoted,
                '.' if !is_quoted => parts.push(std::mem::take(&mut part)),
                other if is_quoted => part.push(other),
                other => part.extend(other.to_lowercase()),
            }
        }
        parts.push(part);
        if is_quoted {
            return Err(refuse("a quote is not closed"));
        }
        if parts.iter().any(String::is_empty) {
            return Err(refuse("a name is empty: write table or schema.table"));
        }
        let name = parts.pop().unwrap_or_default();
        match (parts.pop(), parts.is_empty()) {
            (schema, true) => Ok(Self { schema, name }),
            _ => Err(refuse(
                "has more than two names: write table or schema.table, with dots of a name in double quotes",
            )),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |name: &str| {
            let mut bytes = name.bytes();
            bytes.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
                && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        };
        let shown = |name: &str| if plain(name) { name.to_owned() } else { quoted(name) };
        match &self.schema {
            Some(schema) => write!(f, "{}.{}", shown(schema), shown(&self.name)),
            None => f.write_str(&shown(&self.name)),
        }
    }
}

/// How a table stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The table, as it is named in SQL.
    pub table: String,
    /// What its events are called, without the operation: `public.users`.
    pub event_type: String,
    /// What is told.
    pub operations: Vec<Operation>,
    /// The columns that are told; `None` for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// The columns that appear nowhere.
    pub exclude: Vec<String>,
    /// The largest payload, in bytes.
    pub max_payload: u64,
    /// The names of the columns that make the key; none where the table has no primary key.
    pub key: Vec<String>,
    /// How what stands there differs from what was asked for, each with what to do. Empty when all is well.
    pub drift: Vec<String>,
}

impl Status {
    fn new(table: &Table, event_type: String, watch: &Watch, key: Vec<String>, drift: Vec<String>) -> Self {
        Self {
            table: table.to_string(),
            event_type,
            operations: watch.operations.clone(),
            columns: watch.columns.clone(),
            exclude: watch.exclude.clone(),
            max_payload: watch.max_payload,
            key,
            drift,
        }
    }
}

/// The longest segment that a name becomes, in bytes: two of them and an operation fit in a type.
const SEGMENT: usize = 100;

/// A name as a segment of a type. Letters, digits and `_` stay; every other byte becomes `-` and two hexadecimal digits, so
/// that no two names become one. What gets too long ends in `-z` and a hash of the name instead.
#[must_use]
pub fn segment(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => text.push(char::from(byte)),
            _ => text.push_str(&format!("-{byte:02x}")),
        }
    }
    if text.len() <= SEGMENT {
        return text;
    }
    let beginning: String = name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').take(40).collect();
    format!("{beginning}-z{}", short_hash(name))
}

/// 128 bits of a hash of `text`, in hexadecimal digits.
fn short_hash(text: &str) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(text.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// A name in SQL's double quotes.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in SQL's single quotes. Backslashes stand for themselves in both databases.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A name as JSON, in SQL's single quotes, with what stands before and after it.
fn json_name(before: &str, name: &str, after: &str) -> String {
    literal(&format!("{before}{}{after}", serde_json::json!(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_sql_reads_it() {
        let rows = [
            ("users", None, "users", "users"),
            ("Public.Users", Some("public"), "users", "public.users"),
            ("\"Odd.One\".\"a\"\"b\"", Some("Odd.One"), "a\"b", "\"Odd.One\".\"a\"\"b\""),
            ("größe", None, "größe", "\"größe\""),
        ];
        for (text, schema, name, shown) in rows {
            let table: Table = text.parse().unwrap();
            assert_eq!((table.schema.as_deref(), table.name.as_str()), (schema, name), "{text}");
            assert_eq!(table.to_string(), shown);
            assert_eq!(shown.parse::<Table>().unwrap(), table);
        }
        for (text, words) in [("", "empty"), ("a.", "empty"), ("a.b.c", "more than two"), ("\"a", "not closed")] {
            assert!(text.parse::<Table>().unwrap_err().to_string().contains(words), "{text}");
        }
    }

    #[test]
    fn no_two_names_become_one_segment() {
        assert_eq!(segment("order_items"), "order_items");
        assert_eq!(segment("a-b"), "a-2db");
        assert_eq!(segment("größe"), "gr-c3-b6-c3-9fe");
        assert_eq!(segment("a.b"), "a-2eb");
        let long = "ü".repeat(31);
        assert!(segment(&long).len() <= SEGMENT);
        assert_ne!(segment(&long), segment(&format!("{}a", "ü".repeat(30))));
        for name in ["a-2db", "a b", "'\"\\", "表", &long] {
            let event_type = format!("{}.{}.truncate", segment(name), segment(name));
            assert!(crate::event::EventType::parse(&event_type).is_ok(), "{event_type}");
        }
        assert_ne!(segment("a-2db"), segment("a-b"));
    }

    #[test]
    fn what_is_told_follows_from_the_watch() {
        let all = ["id", "name", "password"];
        let watch = |columns: Option<&[&str]>, exclude: &[&str]| Watch {
            columns: columns.map(|columns| columns.iter().map(|&column| column.to_owned()).collect()),
            exclude: exclude.iter().map(|&column| column.to_owned()).collect(),
            ..Watch::new("users".parse().unwrap())
        };
        assert_eq!(watch(None, &[]).told(&all, &["id"]).unwrap(), all);
        assert_eq!(watch(None, &["password"]).told(&all, &["id"]).unwrap(), ["id", "name"]);
        assert_eq!(watch(Some(&["name"]), &[]).told(&all, &["id"]).unwrap(), ["name"]);
        let refused = |watch: Watch| watch.told(&all, &["id"]).unwrap_err().to_string();
        assert!(refused(watch(None, &["passwort"])).contains("users.passwort"));
        assert!(refused(watch(Some(&["nome"]), &[])).contains("users.nome"));
        assert!(refused(watch(None, &["id"])).contains("primary key"));
        assert!(refused(watch(Some(&["name"]), &["name"])).contains("leaves no column"));
    }
}
