//! Capture in PostgreSQL: statement triggers with transition tables, one per operation.
//!
//! All triggers of a table call one function that is written for it, with the rights of who installed it, so that the
//! application needs none on the inbox. What was asked for is kept in a table beside the inbox, so that `status` can say
//! what has become of it. The last table that is removed takes all of that with it.

use std::borrow::Cow;

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row as _};

use super::body::body;
use super::catalog::{Relation, event_type, function_name, sql_name};
use super::{Operation, Status, Table, Watch, literal, quoted};
use crate::error::{Error, Result};

/// How long a change waits for those who use the table. Whoever comes meanwhile waits behind it.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '5s'";

/// What was asked for, by table. `shape` is what the columns were.
const CAPTURES: &str = "CREATE TABLE IF NOT EXISTS {}.captures (schema_name text NOT NULL, table_name text NOT NULL, \
    relation bigint NOT NULL, watch text NOT NULL, shape text[] NOT NULL, PRIMARY KEY (schema_name, table_name))";

/// A row of the table of captures.
struct Kept {
    schema: String,
    name: String,
    oid: i64,
    watch: Watch,
    shape: Vec<String>,
}

/// A trigger of ours that is there.
struct Found {
    table: String,
    name: String,
    is_enabled: bool,
}

/// Installs the triggers that the watch asks for.
pub(super) async fn install(pool: &PgPool, inbox: &str, watch: &Watch) -> Result<Status> {
    let failed = |action: &'static str| move |error| failed(action, &watch.table, inbox, error);
    let mut tx = pool.begin().await.map_err(failed("begin"))?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut *tx).await.map_err(failed("begin"))?;
    check_inbox(&mut tx, inbox, &watch.table).await?;
    let relation = Relation::find(&mut tx, &watch.table, inbox).await?;
    let relation = relation.ok_or_else(|| Error::not_found("table", watch.table.to_string()))?;
    let body = body(&relation, watch, inbox)?;
    let create = format!("{}.{}", quoted(inbox), quoted(&function_name(&relation.schema, &relation.name)));
    let function = format!(
        "CREATE OR REPLACE FUNCTION {create}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER \
         SET search_path = pg_catalog, pg_temp AS {}; \
         REVOKE ALL ON FUNCTION {create}() FROM PUBLIC; COMMENT ON FUNCTION {create}() IS {};",
        literal(&body),
        literal(&format!("capture of {}, made by tidegate", relation.table()))
    );
    run(&mut tx, &function).await.map_err(failed("make the trigger function"))?;
    replace_triggers(&mut tx, inbox, &relation, watch).await?;
    keep(&mut tx, inbox, &relation, watch).await.map_err(failed("note what is captured"))?;
    tx.commit().await.map_err(failed("commit"))?;
    let key = relation.key.iter().map(|column| column.name.clone()).collect();
    let event_type = event_type(&relation.schema, &relation.name);
    Ok(Status::new(&relation.table(), event_type, watch, key, Vec::new()))
}

async fn run(connection: &mut PgConnection, text: &str) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(text.to_owned())).execute(connection).await.map(drop)
}

async fn check_inbox(connection: &mut PgConnection, inbox: &str, table: &Table) -> Result<()> {
    let text = "SELECT pg_catalog.to_regclass($1) IS NOT NULL, EXISTS (SELECT 1 FROM pg_catalog.pg_attribute \
        WHERE attrelid = pg_catalog.to_regclass($1) AND attname = 'rows' AND NOT attisdropped)";
    let name = format!("{}.inbox", quoted(inbox));
    let (is_there, takes_rows): (bool, bool) = sqlx::query_as(text)
        .bind(name)
        .fetch_one(connection)
        .await
        .map_err(|error| failed("look for the inbox", table, inbox, error))?;
    let reason = match (is_there, takes_rows) {
        (true, true) => return Ok(()),
        (true, false) => "is older than this tidegate: run `tidegate migrate` first",
        (false, _) => "holds no inbox: let tidegate open this database once as its provider, or name another schema",
    };
    Err(Error::Incompatible { what: format!("schema {inbox}"), reason: reason.into() })
}

async fn replace_triggers(
    connection: &mut PgConnection,
    inbox: &str,
    relation: &Relation,
    watch: &Watch,
) -> Result<()> {
    let failed = |error| failed("replace the triggers", &watch.table, inbox, error);
    let function = function_name(&relation.schema, &relation.name);
    drop_triggers(connection, inbox, &function).await.map_err(failed)?;
    for (table, name, how) in wanted(relation, watch) {
        let text =
            format!("CREATE TRIGGER {name} AFTER {how} EXECUTE FUNCTION {}.{}()", quoted(inbox), quoted(&function));
        run(connection, &text.replace("{}", &sql_name(&table))).await.map_err(failed)?;
    }
    Ok(())
}

/// The triggers that there should be: on which table, by which name, and how; `{}` stands for the table.
fn wanted(relation: &Relation, watch: &Watch) -> Vec<(Table, &'static str, &'static str)> {
    let by_statement = [
        (Operation::Create, "tidegate_create", "INSERT ON {} REFERENCING NEW TABLE AS tidegate_new FOR EACH STATEMENT"),
        (
            Operation::Update,
            "tidegate_update",
            "UPDATE ON {} REFERENCING OLD TABLE AS tidegate_old NEW TABLE AS tidegate_new FOR EACH STATEMENT",
        ),
        (Operation::Delete, "tidegate_delete", "DELETE ON {} REFERENCING OLD TABLE AS tidegate_old FOR EACH STATEMENT"),
    ];
    let by_row = [
        (Operation::Create, "tidegate_create", "INSERT ON {} FOR EACH ROW"),
        (Operation::Update, "tidegate_update", "UPDATE ON {} FOR EACH ROW"),
        (Operation::Delete, "tidegate_delete", "DELETE ON {} FOR EACH ROW"),
    ];
    // Row triggers of a partitioned table are its partitions' too; statement triggers are its own, and see what is
    // written by its name only.
    let (kinds, partitions): (_, &[Table]) =
        if relation.key.is_empty() { (by_row, &[]) } else { (by_statement, &relation.partitions) };
    let mut all = Vec::new();
    for table in std::iter::once(&relation.table()).chain(partitions) {
        let own = kinds.iter().filter(|(operation, ..)| watch.tells(*operation));
        all.extend(own.map(|&(_, name, how)| (table.clone(), name, how)));
    }
    if watch.tells(Operation::Delete) {
        all.push((relation.table(), "tidegate_truncate", "TRUNCATE ON {} FOR EACH STATEMENT"));
    }
    all
}

async fn found(connection: &mut PgConnection, inbox: &str, function: &str) -> sqlx::Result<Vec<Found>> {
    let text = "SELECT n.nspname::text, c.relname::text, t.tgname::text, t.tgenabled IN ('O', 'A') \
        FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace \
        WHERE f.nspname = $1 AND p.proname = $2 AND NOT t.tgisinternal AND t.tgparentid = 0 ORDER BY 1, 2, 3";
    let rows = sqlx::query(text).bind(inbox).bind(function).fetch_all(connection).await?;
    let found = rows.iter().map(|row| Found {
        table: sql_name(&Table { schema: Some(row.get(0)), name: row.get(1) }),
        name: row.get(2),
        is_enabled: row.get(3),
    });
    Ok(found.collect())
}

async fn drop_triggers(connection: &mut PgConnection, inbox: &str, function: &str) -> sqlx::Result<()> {
    for Found { table, name, .. } in found(connection, inbox, function).await? {
        run(connection, &format!("DROP TRIGGER {} ON {table}", quoted(&name))).await?;
    }
    Ok(())
}

async fn keep(connection: &mut PgConnection, inbox: &str, relation: &Relation, watch: &Watch) -> sqlx::Result<()> {
    run(connection, &CAPTURES.replace("{}", &quoted(inbox))).await?;
    let text = format!(
        "INSERT INTO {}.captures VALUES ($1, $2, $3, $4, $5) ON CONFLICT (schema_name, table_name) \
         DO UPDATE SET relation = excluded.relation, watch = excluded.watch, shape = excluded.shape",
        quoted(inbox)
    );
    let watch = serde_json::json!(watch).to_string();
    let query = sqlx::query(AssertSqlSafe(text)).bind(&relation.schema).bind(&relation.name);
    query.bind(relation.oid).bind(watch).bind(&relation.columns).execute(connection).await.map(drop)
}

async fn kept(connection: &mut PgConnection, inbox: &str) -> Result<Vec<Kept>> {
    let failed = |error: sqlx::Error| Error::store("postgres", "read what is captured", error);
    let name = format!("{}.captures", quoted(inbox));
    let is_there: bool = sqlx::query_scalar("SELECT pg_catalog.to_regclass($1) IS NOT NULL")
        .bind(&name)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    if !is_there {
        return Ok(Vec::new());
    }
    let text = format!("SELECT schema_name, table_name, relation, watch, shape FROM {name} ORDER BY 1, 2");
    let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(connection).await.map_err(failed)?;
    let kept = rows.iter().map(|row| {
        let watch = serde_json::from_str(row.get(3)).map_err(|error| Error::Incompatible {
            what: format!("{name}, {}.{}", row.get::<String, _>(0), row.get::<String, _>(1)),
            reason: format!("was written by another version of tidegate: {error}").into(),
        })?;
        Ok(Kept { schema: row.get(0), name: row.get(1), oid: row.get(2), watch, shape: row.get(4) })
    });
    kept.collect()
}

/// How every captured table stands.
pub(super) async fn status(pool: &PgPool, inbox: &str) -> Result<Vec<Status>> {
    let mut connection = pool.acquire().await.map_err(|error| Error::store("postgres", "connect", error))?;
    let mut all = Vec::new();
    for kept in kept(&mut connection, inbox).await? {
        all.push(kept.status(&mut connection, inbox).await?);
    }
    Ok(all)
}

impl Kept {
    fn table(&self) -> Table {
        Table { schema: Some(self.schema.clone()), name: self.name.clone() }
    }

    async fn status(&self, connection: &mut PgConnection, inbox: &str) -> Result<Status> {
        let table = self.table();
        let (mut drift, mut key) = (Vec::new(), Vec::new());
        match Relation::find(connection, &table, inbox).await {
            Ok(Some(relation)) => {
                key = relation.key.iter().map(|column| column.name.clone()).collect();
                drift = self.drift(connection, inbox, &relation).await?;
            }
            Ok(None) => drift.push(self.gone(connection).await?),
            Err(Error::Invalid { reason, .. }) => drift.push(format!("{table} {reason}: remove its capture")),
            Err(other) => return Err(other),
        }
        Ok(Status::new(&table, event_type(&self.schema, &self.name), &self.watch, key, drift))
    }

    async fn gone(&self, connection: &mut PgConnection) -> Result<String> {
        let text = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c \
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::int8::oid";
        let row = sqlx::query(text).bind(self.oid).fetch_optional(connection).await;
        let row = row.map_err(|error| Error::store("postgres", "look for a table", error))?;
        Ok(match row.map(|row| Table { schema: Some(row.get(0)), name: row.get(1) }) {
            Some(now) => format!(
                "the table is called {now} now, and its events still {}: remove this capture and install it by the new name",
                event_type(&self.schema, &self.name)
            ),
            None => "the table is gone: remove its capture".to_owned(),
        })
    }

    async fn drift(&self, connection: &mut PgConnection, inbox: &str, relation: &Relation) -> Result<Vec<String>> {
        let failed = |error: sqlx::Error| Error::store("postgres", "look at triggers", error);
        let mut drift = Vec::new();
        let function = function_name(&self.schema, &self.name);
        let there = found(connection, inbox, &function).await.map_err(failed)?;
        let wanted = wanted(relation, &self.watch);
        for (table, name, _) in &wanted {
            let found = there.iter().find(|found| found.table == sql_name(table) && found.name == *name);
            match found {
                None => drift.push(format!("trigger {name} is missing on {table}: install again")),
                Some(found) if !found.is_enabled => drift
                    .push(format!("trigger {name} on {table} is disabled: ALTER TABLE {table} ENABLE TRIGGER {name}")),
                Some(_) => {}
            }
        }
        for Found { table, name, .. } in &there {
            if !wanted.iter().any(|(wanted, wanted_name, _)| sql_name(wanted) == *table && wanted_name == name) {
                drift.push(format!("trigger {name} on {table} is not wanted (any more): install again"));
            }
        }
        drift.extend(self.columns_drift(relation));
        if drift.is_empty() {
            drift.extend(self.function_drift(connection, inbox, relation, &function).await.map_err(failed)?);
        }
        Ok(drift)
    }

    fn columns_drift(&self, relation: &Relation) -> Vec<String> {
        let lost: Vec<&str> = missing(&self.shape, &relation.columns);
        let new: Vec<&str> = missing(&relation.columns, &self.shape);
        let mut drift = Vec::new();
        if !lost.is_empty() || !new.is_empty() {
            let words = |names: &[&str]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            drift.push(format!(
                "the columns have changed (gone: {}; new: {}); rows are told in a slower way: install again",
                words(&lost),
                words(&new)
            ));
        }
        drift.extend(self.watch.exclude.iter().filter(|column| !relation.columns.contains(column)).map(|column| {
            format!("{column}, which is to appear nowhere, is gone; events tell keys only: install again without it")
        }));
        drift
    }

    async fn function_drift(
        &self,
        connection: &mut PgConnection,
        inbox: &str,
        relation: &Relation,
        function: &str,
    ) -> sqlx::Result<Option<String>> {
        let text = "SELECT p.prosrc, p.prosecdef FROM pg_catalog.pg_proc p \
            JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = $1 AND p.proname = $2";
        let row = sqlx::query(text).bind(inbox).bind(function).fetch_optional(connection).await?;
        let there = row.map(|row| (row.get::<String, _>(0), row.get::<bool, _>(1)));
        let wanted = body(relation, &self.watch, inbox);
        Ok(match (there, wanted) {
            (None, _) => Some(format!("the function {inbox}.{function} is gone: install again")),
            (Some((text, true)), Ok(wanted)) if text == wanted => None,
            _ => Some(format!("the function {inbox}.{function} is not as this version makes it: install again")),
        })
    }
}

/// Those of `names` that `others` does not have.
fn missing<'a>(names: &'a [String], others: &[String]) -> Vec<&'a str> {
    names.iter().filter(|name| !others.contains(name)).map(String::as_str).collect()
}

/// Removes what was installed for the table.
pub(super) async fn remove(pool: &PgPool, inbox: &str, table: &Table) -> Result<()> {
    let failed = |action: &'static str| move |error| failed(action, table, inbox, error);
    let mut tx = pool.begin().await.map_err(failed("begin"))?;
    sqlx::query(LOCK_TIMEOUT).execute(&mut *tx).await.map_err(failed("begin"))?;
    let all = kept(&mut tx, inbox).await?;
    let oid: Option<i64> = sqlx::query_scalar("SELECT pg_catalog.to_regclass($1)::oid::int8")
        .bind(sql_name(table))
        .fetch_one(&mut *tx)
        .await
        .map_err(failed("look for the table"))?;
    let is_meant = |kept: &&Kept| {
        let is_named = kept.name == table.name && table.schema.as_ref().is_none_or(|schema| *schema == kept.schema);
        Some(kept.oid) == oid || (oid.is_none() && is_named)
    };
    let meant = all.iter().find(is_meant).or_else(|| {
        all.iter()
            .find(|kept| kept.name == table.name && table.schema.as_ref().is_none_or(|schema| *schema == kept.schema))
    });
    let kept = meant.ok_or_else(|| Error::not_found("capture of table", table.to_string()))?;
    let function = function_name(&kept.schema, &kept.name);
    drop_triggers(&mut tx, inbox, &function).await.map_err(failed("drop the triggers"))?;
    let drop_function = format!("DROP FUNCTION IF EXISTS {}.{}()", quoted(inbox), quoted(&function));
    run(&mut tx, &drop_function).await.map_err(failed("drop the trigger function"))?;
    let text = match all.len() {
        1 => format!("DROP TABLE {}.captures", quoted(inbox)),
        _ => format!(
            "DELETE FROM {}.captures WHERE schema_name = {} AND table_name = {}",
            quoted(inbox),
            literal(&kept.schema),
            literal(&kept.name)
        ),
    };
    run(&mut tx, &text).await.map_err(failed("forget what was captured"))?;
    tx.commit().await.map_err(failed("commit"))
}

/// Words for what PostgreSQL refuses.
pub(super) fn failed(action: &'static str, table: &Table, inbox: &str, error: sqlx::Error) -> Error {
    let Some(said) = error.as_database_error() else { return Error::store("postgres", action, error) };
    let code = said.code().unwrap_or(Cow::Borrowed("")).into_owned();
    let reason = match code.as_str() {
        "42501" => format!(
            "{}: installing needs the right TRIGGER on the table (ownership, to replace triggers), and CREATE on the schema \
             {inbox} with INSERT on its inbox",
            said.message()
        ),
        "55P03" => {
            "others have used it for more than 5 s without a pause: try again when there is less going on".to_owned()
        }
        _ => return Error::store("postgres", action, error),
    };
    Error::conflict("table", table.to_string(), reason)
}
