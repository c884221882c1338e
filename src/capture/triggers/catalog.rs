//! What PostgreSQL's catalogue says of a table that is to be captured.

use sqlx::{PgConnection, Row as _};

use super::{Table, Watch, segment, short_hash};
use crate::error::{Error, Result};

/// A table that can be captured.
pub(super) struct Relation {
    pub(super) oid: i64,
    pub(super) schema: String,
    pub(super) name: String,
    /// In the order of the table.
    pub(super) columns: Vec<String>,
    /// The primary key's columns, in its order; none where there is no primary key.
    pub(super) key: Vec<KeyColumn>,
    /// Every table below a partitioned one that rows can be written to directly.
    pub(super) partitions: Vec<Table>,
}

/// A column of a primary key.
pub(super) struct KeyColumn {
    pub(super) name: String,
    /// The operator that the key's index calls equal, as it is named in SQL. It may be an extension's.
    pub(super) equals: String,
    /// Whether its text does not follow from the session's settings.
    pub(super) is_plain: bool,
}

const RELATION: &str = "SELECT c.oid::int8, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text, \
    c.relispartition FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.oid = pg_catalog.to_regclass($1)";

const COLUMNS: &str = "SELECT attname::text FROM pg_catalog.pg_attribute \
    WHERE attrelid = $1::int8::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum";

/// Strategy 3 of a btree is equality.
const KEY: &str = "SELECT a.attname::text, t.typname::text, s.nspname::text, o.oprname::text \
    FROM pg_catalog.pg_index i \
    CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY AS k(attnum, opclass, at) \
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
    JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
    JOIN pg_catalog.pg_opclass c ON c.oid = k.opclass \
    JOIN pg_catalog.pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype \
    AND m.amoprighttype = c.opcintype AND m.amopstrategy = 3 \
    JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr JOIN pg_catalog.pg_namespace s ON s.oid = o.oprnamespace \
    WHERE i.indrelid = $1::int8::oid AND i.indisprimary ORDER BY k.at";

const PARTITIONS: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_partition_tree($1::int8::oid::regclass) p \
    JOIN pg_catalog.pg_class c ON c.oid = p.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
    WHERE p.relid <> $1::int8::oid AND c.relkind IN ('r', 'p') ORDER BY 1, 2";

impl Relation {
    /// Reads the catalogue. `None` when there is no such table.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is not a table, or one that cannot be captured.
    pub(super) async fn find(connection: &mut PgConnection, table: &Table, inbox: &str) -> Result<Option<Self>> {
        let failed = |error| super::postgres::failed("read the catalogue", table, inbox, error);
        let found = sqlx::query(RELATION).bind(sql_name(table)).fetch_optional(&mut *connection).await;
        let Some(row) = found.map_err(failed)? else { return Ok(None) };
        let (oid, schema, name): (i64, String, String) = (row.get(0), row.get(1), row.get(2));
        refuse_what_is_no_table(table, row.get(3), row.get(4))?;
        if schema == inbox {
            return Err(Error::invalid("table", table.to_string(), "is tidegate's own: capturing it would never end"));
        }
        if row.get(5) {
            return Err(Error::invalid("table", table.to_string(), "is a partition: capture the partitioned table"));
        }
        let columns = sqlx::query_scalar(COLUMNS).bind(oid).fetch_all(&mut *connection).await.map_err(failed)?;
        let key = sqlx::query(KEY).bind(oid).fetch_all(&mut *connection).await.map_err(failed)?;
        let key = key.iter().map(|row| KeyColumn::new(row.get(0), row.get(1), row.get(2), row.get(3))).collect();
        let partitions = sqlx::query(PARTITIONS).bind(oid).fetch_all(&mut *connection).await.map_err(failed)?;
        let partitions = partitions.iter().map(|row| Table { schema: Some(row.get(0)), name: row.get(1) }).collect();
        Ok(Some(Self { oid, schema, name, columns, key, partitions }))
    }

    /// The table by its full name.
    pub(super) fn table(&self) -> Table {
        Table { schema: Some(self.schema.clone()), name: self.name.clone() }
    }

    /// The names of the key's columns.
    pub(super) fn key_names(&self) -> Vec<&str> {
        self.key.iter().map(|column| column.name.as_str()).collect()
    }

    /// The columns that are told.
    pub(super) fn told(&self, watch: &Watch) -> Result<Vec<&str>> {
        let all: Vec<&str> = self.columns.iter().map(String::as_str).collect();
        watch.told(&all, &self.key_names())
    }
}

impl KeyColumn {
    fn new(name: String, type_name: &str, schema: &str, operator: &str) -> Self {
        Self {
            name,
            equals: format!("OPERATOR({}.{operator})", super::quoted(schema)),
            is_plain: matches!(type_name, "int2" | "int4" | "int8" | "numeric" | "text" | "varchar" | "uuid"),
        }
    }
}

fn refuse_what_is_no_table(table: &Table, kind: &str, persistence: &str) -> Result<()> {
    let reason = match (kind, persistence) {
        ("v" | "m", _) => "is a view: capture the tables behind it",
        ("f", _) => "is a foreign table, whose triggers cannot see all rows of a statement: capture it where it lives",
        ("r" | "p", "t") => "is a temporary table, and gone with its session",
        ("r" | "p", _) => return Ok(()),
        _ => "is not a table",
    };
    Err(Error::invalid("table", table.to_string(), reason))
}

/// What the events of a table are called, without the operation.
pub(super) fn event_type(schema: &str, name: &str) -> String {
    format!("{}.{}", segment(schema), segment(name))
}

/// The name of a table's trigger function.
pub(super) fn function_name(schema: &str, name: &str) -> String {
    format!("capture_{}", short_hash(&format!("{}.{}", super::quoted(schema), super::quoted(name))))
}

/// A table in SQL, every name in quotes.
pub(super) fn sql_name(table: &Table) -> String {
    match &table.schema {
        Some(schema) => format!("{}.{}", super::quoted(schema), super::quoted(&table.name)),
        None => super::quoted(&table.name),
    }
}
