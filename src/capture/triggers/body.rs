//! The text of a table's trigger function in PostgreSQL.
//!
//! A function is written for its table as the table is: its columns stand in it by name, which is the cheapest way to
//! make JSON of many rows. A table may change later, though, and a name that is no longer there would break the
//! application's write. So the function compares the columns with those it was written for, and where they differ it
//! goes the other way: rows as `jsonb`, whatever they hold, slower but never wrong. Then an excluded column that is not
//! to be found (renamed, perhaps) means that nothing of the row is told but its key.

use super::catalog::{Relation, event_type};
use super::{Operation, Watch, json_name, literal, quoted, segment};
use crate::error::Result;

/// The old row of an update, and the row that is deleted.
const OLD: &str = "tidegate_o";
/// The new row of an update, and the row that is created.
const NEW: &str = "tidegate_n";

/// Words around the parts of a payload, and commas: what a payload has beside its parts, generously.
const AROUND: usize = 80;

/// How rows are told: expressions over the aliases [`OLD`] and [`NEW`].
struct Telling {
    /// What follows FROM for one side, given where its rows come from.
    source: Box<dyn Fn(&str) -> String>,
    /// A row's JSON.
    row: Box<dyn Fn(&str) -> String>,
    /// A row's key.
    key: Box<dyn Fn(&str) -> String>,
    /// A row's primary key as JSON.
    pk: Box<dyn Fn(&str) -> String>,
    /// Whether a side of the join has no row.
    absent: Box<dyn Fn(&str) -> String>,
    /// What joins old and new rows.
    on: String,
    /// The names of the columns that differ, as JSON.
    changed: String,
}

/// The body of the function.
pub(super) fn body(relation: &Relation, watch: &Watch, inbox_schema: &str) -> Result<String> {
    let told = relation.told(watch)?;
    let slow = by_jsonb(relation, watch, &told);
    let writer = Writer { relation, watch, inbox: format!("{}.inbox", quoted(inbox_schema)) };
    let (new_row, old_row) = ("(SELECT NEW.*)", "(SELECT OLD.*)");
    let work = if relation.key.is_empty() {
        // Rows that nothing names cannot be paired, so such a table has triggers for each row.
        writer.operations(&slow, new_row, old_row)
    } else {
        let fast = by_name(relation, &told);
        let (new_rows, old_rows) = ("tidegate_new", "tidegate_old");
        format!(
            "IF (SELECT pg_catalog.array_agg(attname::text ORDER BY attname) FROM pg_catalog.pg_attribute \
             WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped) = {} THEN\n{}ELSE\n{}END IF;\n",
            shape(relation),
            writer.operations(&fast, new_rows, old_rows),
            writer.operations(&slow, new_rows, old_rows),
        )
    };
    Ok(format!("{}BEGIN\n{}{work}RETURN NULL;\nEND", declarations(relation), writer.truncation()))
}

/// The columns, sorted, as an array.
fn shape(relation: &Relation) -> String {
    let mut names: Vec<&str> = relation.columns.iter().map(String::as_str).collect();
    names.sort_unstable();
    texts(&names)
}

fn texts(names: &[&str]) -> String {
    let list: Vec<String> = names.iter().map(|name| literal(name)).collect();
    format!("ARRAY[{}]::text[]", list.join(", "))
}

/// A setting of the session that the application may have made; what is no short text is cut into one.
fn setting(name: &str) -> String {
    format!(
        "nullif(left(regexp_replace(coalesce(current_setting('tidegate.{name}', true), ''), '[[:cntrl:]]', '', 'g'), 255), '')"
    )
}

fn declarations(relation: &Relation) -> String {
    let is_mapped = event_type(&relation.schema, &relation.name) != format!("{}.{}", relation.schema, relation.name);
    let schema_name = if is_mapped { format!("'schema_name', {}, ", literal(&relation.schema)) } else { String::new() };
    let is_number = "tidegate_user ~ '^(0|-?[1-9][0-9]{0,17})$'";
    format!(
        "DECLARE\n\
         tidegate_user text := {};\n\
         tidegate_user_id text := CASE WHEN {is_number} THEN tidegate_user ELSE to_json(tidegate_user)::text END;\n\
         tidegate_session text := {};\n\
         tidegate_trace text := {};\n\
         tidegate_meta text := jsonb_strip_nulls(jsonb_build_object({schema_name}'table_name', {}, 'user_name', {}, \
         'user_email', {}, 'user_roles', to_jsonb(string_to_array({}, ','))))::text;\n",
        setting("user_id"),
        setting("session_id"),
        setting("trace_parent"),
        literal(&relation.name),
        setting("user_name"),
        setting("user_email"),
        setting("user_roles"),
    )
}

/// The table's columns by name.
fn by_name(relation: &Relation, told: &[&str]) -> Telling {
    let of = |column: &str| {
        let column = quoted(column);
        move |side: &str| format!("{side}.{column}")
    };
    let is_whole = told.len() == relation.columns.len();
    let list: Vec<_> = told.iter().map(|column| of(column)).collect();
    let row = move |side: &str| match is_whole {
        true => format!("row_to_json({side})::text"),
        false => {
            let columns: Vec<String> = list.iter().map(|column| column(side)).collect();
            format!("(SELECT row_to_json(tidegate_r)::text FROM (SELECT {}) AS tidegate_r)", columns.join(", "))
        }
    };
    let (first, is_plain) = relation.key.first().map(|key| (of(&key.name), key.is_plain)).unzip();
    let names: Vec<_> = relation.key.iter().map(|key| of(&key.name)).collect();
    let key = move |side: &str| match (&*names, is_plain) {
        ([only], Some(true)) => format!("{}::text", only(side)),
        ([only], _) => format!("to_json({}) #>> '{{}}'", only(side)),
        (several, _) => {
            let several: Vec<String> = several.iter().map(|column| column(side)).collect();
            format!("json_build_array({})::text", several.join(", "))
        }
    };
    let parts: Vec<_> = relation.key.iter().map(|key| (key.name.clone(), of(&key.name))).collect();
    // Whatever type the column has by then: this stays JSON when another type is given to it.
    let pk = move |side: &str| {
        object(parts.iter().map(|(name, column)| (name.as_str(), format!("to_json({})::text", column(side)))))
    };
    let equal = relation.key.iter().map(|key| {
        let column = of(&key.name);
        format!("{} {} {}", column(OLD), key.equals, column(NEW))
    });
    let mut sorted = told.to_vec();
    sorted.sort_unstable();
    let differing = sorted.iter().map(|name| {
        let column = of(name);
        // As bytes: not every type has an equality, and not every equality means that nothing changed.
        format!("CASE WHEN record_image_ne(ROW({}), ROW({})) THEN {} END", column(OLD), column(NEW), literal(name))
    });
    Telling {
        source: Box::new(str::to_owned),
        row: Box::new(row),
        key: Box::new(key),
        pk: Box::new(pk),
        absent: Box::new(move |side| {
            first.as_ref().map_or("false".to_owned(), |first| format!("{} IS NULL", first(side)))
        }),
        on: equal.collect::<Vec<_>>().join(" AND "),
        changed: format!(
            "to_json(array_remove(ARRAY[{}]::text[], NULL))::text",
            differing.collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Rows as `jsonb`, whatever columns they have.
fn by_jsonb(relation: &Relation, watch: &Watch, told: &[&str]) -> Telling {
    let exclude: Vec<&str> = watch.exclude.iter().map(String::as_str).collect();
    let filtered = match (&watch.columns, exclude.is_empty()) {
        (Some(_), _) => format!(
            "(SELECT jsonb_object_agg(c.key, c.value) FROM jsonb_each(r.j) AS c WHERE c.key = ANY ({}))",
            texts(told)
        ),
        (None, true) => "r.j".to_owned(),
        (None, false) => format!("CASE WHEN r.j ?& {0} THEN r.j - {0} END", texts(&exclude)),
    };
    let source = move |rows: &str| {
        format!(
            "(SELECT r.j, {filtered} AS f FROM (SELECT to_jsonb(tidegate_r) AS j FROM {rows} AS tidegate_r OFFSET 0) AS r \
             OFFSET 0)"
        )
    };
    let names: Vec<String> = relation.key.iter().map(|key| key.name.clone()).collect();
    let keys = names.clone();
    let key = move |side: &str| match &*keys {
        [] => "NULL::text".to_owned(),
        [only] => format!("{side}.j ->> {}", literal(only)),
        several => {
            let several: Vec<String> = several.iter().map(|name| format!("{side}.j -> {}", literal(name))).collect();
            format!("json_build_array({})::text", several.join(", "))
        }
    };
    let on = format!("({}) = ({})", key(OLD), key(NEW));
    let pk = move |side: &str| match &*names {
        [] => "'null'".to_owned(),
        names => object(
            names
                .iter()
                .map(|name| (name.as_str(), format!("coalesce(({side}.j -> {})::text, 'null')", literal(name)))),
        ),
    };
    let changed = format!(
        "CASE WHEN {OLD}.f IS NULL OR {NEW}.f IS NULL THEN 'null' ELSE (SELECT coalesce(jsonb_agg(c.key ORDER BY c.key COLLATE \"C\"), '[]')::text \
         FROM jsonb_each({NEW}.f) AS c WHERE {OLD}.f -> c.key IS DISTINCT FROM c.value) END"
    );
    Telling {
        source: Box::new(source),
        row: Box::new(|side| format!("coalesce({side}.f::text, 'null')")),
        key: Box::new(key),
        pk: Box::new(pk),
        absent: Box::new(|side| format!("{side}.j IS NULL")),
        on,
        changed,
    }
}

/// A JSON object of expressions that give JSON.
fn object<'a>(fields: impl Iterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<String> = fields
        .enumerate()
        .map(|(at, (name, value))| format!("{} || {value}", json_name(if at == 0 { "{" } else { "," }, name, ":")))
        .collect();
    format!("{} || '}}'", fields.join(" || "))
}

/// Statements that write the inbox.
struct Writer<'a> {
    relation: &'a Relation,
    watch: &'a Watch,
    inbox: String,
}

impl Writer<'_> {
    /// One branch per operation, with rows from these places.
    fn operations(&self, telling: &Telling, new: &str, old: &str) -> String {
        let nothing = || "'null'".to_owned();
        let create = self.insert(
            Parts {
                operation: "'create'".to_owned(),
                key: (telling.key)(NEW),
                pk: (telling.pk)(NEW),
                before: nothing(),
                after: (telling.row)(NEW),
                changed: nothing(),
            },
            &format!("{} AS {NEW}", (telling.source)(new)),
        );
        let delete = self.insert(
            Parts {
                operation: "'delete'".to_owned(),
                key: (telling.key)(OLD),
                pk: (telling.pk)(OLD),
                before: (telling.row)(OLD),
                after: nothing(),
                changed: nothing(),
            },
            &format!("{} AS {OLD}", (telling.source)(old)),
        );
        let update = self.update(telling, new, old);
        format!(
            "IF TG_OP = 'INSERT' THEN\n{create}\nELSIF TG_OP = 'UPDATE' THEN\n{update}\nELSIF TG_OP = 'DELETE' THEN\n{delete}\nEND IF;\n"
        )
    }

    /// Pairs old and new rows by their keys. A row whose key has changed has no partner: its old key is deleted, its new
    /// one created.
    fn update(&self, telling: &Telling, new: &str, old: &str) -> String {
        let (absent, key, pk, row) = (&telling.absent, &telling.key, &telling.pk, &telling.row);
        let (no_old, no_new) = (absent(OLD), absent(NEW));
        let join = if self.relation.key.is_empty() { "true" } else { &telling.on };
        let join_kind = if self.relation.key.is_empty() { "JOIN" } else { "FULL JOIN" };
        let either = |of: &dyn Fn(&str) -> String| format!("CASE WHEN {no_new} THEN {} ELSE {} END", of(OLD), of(NEW));
        let parts = Parts {
            operation: format!("CASE WHEN {no_old} THEN 'create' WHEN {no_new} THEN 'delete' ELSE 'update' END"),
            key: either(key),
            pk: either(pk),
            before: format!("CASE WHEN {no_old} THEN 'null' ELSE {} END", row(OLD)),
            after: format!("CASE WHEN {no_new} THEN 'null' ELSE {} END", row(NEW)),
            changed: format!("CASE WHEN {no_old} OR {no_new} THEN 'null' ELSE {} END", telling.changed),
        };
        let from =
            format!("{} AS {OLD} {join_kind} {} AS {NEW} ON {join}", (telling.source)(old), (telling.source)(new));
        self.insert(parts, &from)
    }

    fn insert(&self, parts: Parts, from: &str) -> String {
        let Parts { operation, key, pk, before, after, changed } = parts;
        let prefix = literal(&format!("{}.", event_type(&self.relation.schema, &self.relation.name)));
        let wanted: Vec<&str> = self.watch.operations.iter().map(|operation| operation.as_str()).collect();
        let size = format!(
            "octet_length(e.before) + octet_length(e.after) + octet_length(e.changed) + octet_length(e.pk) + {AROUND}"
        );
        let payload = format!(
            "CASE WHEN {size} > {limit} THEN '{{\"before\":null,\"after\":null,\"changed\":' || e.changed || ',\"pk\":' || e.pk \
             || ',\"oversize\":' || ({size}) || '}}' ELSE '{{\"before\":' || e.before || ',\"after\":' || e.after \
             || ',\"changed\":' || e.changed || ',\"pk\":' || e.pk || '}}' END",
            limit = self.watch.max_payload,
        );
        format!(
            "INSERT INTO {} (type, schema, entity, key, user_id, session_id, trace_parent, metadata, payload) \
             SELECT {prefix} || e.op, {}, {}, e.key, tidegate_user_id, tidegate_session, tidegate_trace, tidegate_meta, {payload} \
             FROM (SELECT {operation} AS op, {key} AS key, {pk} AS pk, {before} AS before, {after} AS after, {changed} AS changed \
             FROM {from} OFFSET 0) AS e WHERE e.changed <> '[]' AND e.op = ANY ({});",
            self.inbox,
            true_name(&self.relation.schema),
            true_name(&self.relation.name),
            texts(&wanted),
        )
    }

    /// One event, whatever the table held. Nobody learns which rows there were, the database included.
    fn truncation(&self) -> String {
        if !self.watch.tells(Operation::Delete) {
            return String::new();
        }
        let prefix = event_type(&self.relation.schema, &self.relation.name);
        format!(
            "IF TG_OP = 'TRUNCATE' THEN\nINSERT INTO {} (type, schema, entity, user_id, session_id, trace_parent, metadata, payload) \
             VALUES ({}, {}, {}, tidegate_user_id, tidegate_session, tidegate_trace, tidegate_meta, \
             '{{\"before\":null,\"after\":null,\"changed\":null,\"pk\":null}}');\nRETURN NULL;\nEND IF;\n",
            self.inbox,
            literal(&format!("{prefix}.truncate")),
            true_name(&self.relation.schema),
            true_name(&self.relation.name),
        )
    }
}

/// The parts of an event, as expressions.
struct Parts {
    operation: String,
    key: String,
    pk: String,
    before: String,
    after: String,
    changed: String,
}

/// The name, where the type's segment is another and an event can carry it.
fn true_name(name: &str) -> String {
    let is_needed = segment(name) != name && !name.chars().any(char::is_control);
    if is_needed { literal(name) } else { "NULL".to_owned() }
}
