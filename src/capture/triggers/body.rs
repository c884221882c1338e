//! The text of a table's trigger function in PostgreSQL.
//!
//! A function is written for its table as the table is: its columns stand in it by name, which is the cheapest way to
//! make JSON of many rows. A table may change later, though, and a name that is no longer there would break the
//! application's write. So the function compares the columns with those it was written for, and where they differ it
//! goes the other way: rows as `jsonb`, whatever they hold, slower but never wrong. Then an excluded column that is not
//! to be found (renamed, perhaps) means that nothing of the row is told but its key.
//!
//! The comparison costs a statement of one row more than its event does. A row that is created or deleted and told whole
//! needs none: only the key's columns are named, in a way that finds NULL where one is gone. Of many such rows the first few
//! are told one by one, as statements of few rows are best told, and the others stand in the inbox many together: there no
//! column is named at all, and whoever takes them finds the key in their JSON.

use super::catalog::{KeyColumn, Relation, event_type};
use super::{Operation, Watch, json_name, literal, quoted, segment};
use crate::error::Result;

/// The old row of an update, and the row that is deleted.
const OLD: &str = "tidegate_o";
/// The new row of an update, and the row that is created.
const NEW: &str = "tidegate_n";

/// Words around the parts of a payload, and commas: what a payload has beside its parts, generously.
const AROUND: usize = 80;

/// How many rows of a statement are told one by one before others stand together. To join rows costs a statement of one row
/// as much again as its event does.
const ALONE: u64 = 8;

/// The most rows that stand in the inbox together, and the most bytes that they may come to: a text of PostgreSQL ends at 1 GiB.
const TOGETHER: u64 = 64;
const TOGETHER_BYTES: u64 = 256 << 20;

/// How the payload of a row begins that is too wide to be told.
const NOTHING: &str = "{\"before\":null,\"after\":null,\"changed\":";

/// What a text over one side becomes: [`OLD`], [`NEW`], or where rows come from.
type Text = Box<dyn Fn(&str) -> String>;

/// How rows are told: expressions over the aliases [`OLD`] and [`NEW`].
struct Telling {
    /// What follows FROM for one side, given where its rows come from.
    source: Text,
    /// A row's JSON.
    row: Text,
    /// A row's key.
    key: Text,
    /// A row's primary key as JSON.
    pk: Text,
}

/// How the old rows of an update find their new ones.
struct Pairing {
    /// Whether a side of the join has no row.
    absent: Text,
    /// What joins old and new rows.
    on: String,
    /// The names of the columns that differ, as JSON.
    changed: String,
}

/// The body of the function.
pub(super) fn body(relation: &Relation, watch: &Watch, inbox_schema: &str) -> Result<String> {
    let told = relation.told(watch)?;
    let (slow, slowly_paired) = by_jsonb(relation, watch, &told);
    let writer = Writer { relation, watch, inbox: format!("{}.inbox", quoted(inbox_schema)) };
    let branches = if relation.key.is_empty() {
        // Rows that nothing names cannot be paired, so such a table has triggers for each row.
        let (new_row, old_row) = ("(SELECT NEW.*)", "(SELECT OLD.*)");
        [
            writer.create(&slow, new_row),
            writer.update(&slow, &slowly_paired, new_row, old_row),
            writer.delete(&slow, old_row),
        ]
    } else {
        let (fast, paired) = by_name(relation, &told);
        let (new_rows, old_rows) = ("tidegate_new", "tidegate_old");
        let update = either(
            relation,
            writer.update(&fast, &paired, new_rows, old_rows),
            writer.update(&slow, &slowly_paired, new_rows, old_rows),
        );
        if told.len() == relation.columns.len() && watch.columns.is_none() {
            let whole = whole(relation);
            let few = |rows: &str| format!("(SELECT * FROM {rows} LIMIT {ALONE})");
            let created = writer.create(&whole, &few(new_rows)) + &writer.together(Operation::Create, new_rows);
            let deleted = writer.delete(&whole, &few(old_rows)) + &writer.together(Operation::Delete, old_rows);
            [created, update, deleted]
        } else {
            [
                either(relation, writer.create(&fast, new_rows), writer.create(&slow, new_rows)),
                update,
                either(relation, writer.delete(&fast, old_rows), writer.delete(&slow, old_rows)),
            ]
        }
    };
    let operations = [Operation::Create, Operation::Update, Operation::Delete];
    let names = ["INSERT", "UPDATE", "DELETE"];
    let branches: Vec<String> = operations
        .into_iter()
        .zip(names)
        .zip(branches)
        .filter(|((operation, _), _)| watch.tells(*operation))
        .map(|((_, name), branch)| format!("IF TG_OP = '{name}' THEN\n{branch}\nEND IF;\n"))
        .collect();
    // A column that is named like a variable is meant where both could be.
    Ok(format!(
        "#variable_conflict use_column\n{}{}{}RETURN NULL;\nEND",
        beginning(relation),
        branches.concat(),
        writer.truncation()
    ))
}

/// The first, where the table has the columns for which the function was written, or else the second.
fn either(relation: &Relation, by_name: String, by_jsonb: String) -> String {
    format!(
        "IF (SELECT pg_catalog.array_agg(attname::text ORDER BY attname) FROM pg_catalog.pg_attribute \
         WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped) = {} THEN\n{by_name}\nELSE\n{by_jsonb}\nEND IF;",
        shape(relation),
    )
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

/// What an application may say of itself in its session.
const SETTINGS: [&str; 6] = ["user_id", "session_id", "trace_parent", "user_name", "user_email", "user_roles"];

fn current(name: &str) -> String {
    format!("current_setting('tidegate.{name}', true)")
}

/// A setting of the session; what is no short text is cut into one.
fn setting(name: &str) -> String {
    format!("nullif(left(regexp_replace({}, '[[:cntrl:]]', '', 'g'), 255), '')", current(name))
}

/// What all events of a statement have in common. Most sessions say nothing, which one look tells.
fn beginning(relation: &Relation) -> String {
    let is_mapped = event_type(&relation.schema, &relation.name) != format!("{}.{}", relation.schema, relation.name);
    let mut names = serde_json::json!({"table_name": relation.name});
    if is_mapped && let Some(names) = names.as_object_mut() {
        names.insert("schema_name".into(), relation.schema.clone().into());
    }
    let names = literal(&names.to_string());
    let is_number = "tidegate_user ~ '^(0|-?[1-9][0-9]{0,17})$'";
    let [user, session, trace, name, email, roles] = SETTINGS.map(setting);
    format!(
        "DECLARE\n\
         tidegate_count bigint; tidegate_user text; tidegate_user_id text; tidegate_session text; tidegate_trace text; tidegate_meta text := {names};\n\
         BEGIN\n\
         IF concat({}) <> '' THEN\n\
         tidegate_user := {user};\n\
         tidegate_user_id := CASE WHEN {is_number} THEN tidegate_user ELSE to_json(tidegate_user)::text END;\n\
         tidegate_session := {session};\n\
         tidegate_trace := {trace};\n\
         tidegate_meta := jsonb_strip_nulls({names}::jsonb || jsonb_build_object('user_name', {name}, 'user_email', {email}, \
         'user_roles', to_jsonb(string_to_array({roles}, ','))))::text;\n\
         END IF;\n",
        SETTINGS.map(current).join(", "),
    )
}

/// The expressions of a row's key and its primary key, given what a column of the key is called.
fn keys(relation: &Relation, column: fn(usize, &KeyColumn) -> String) -> (Text, Text) {
    let named = || relation.key.iter().enumerate().map(|(at, key)| (key, column(at, key)));
    let names: Vec<String> = named().map(|(_, column)| column).collect();
    let is_plain = relation.key.first().is_some_and(|key| key.is_plain);
    let key = move |side: &str| match &*names {
        [only] if is_plain => format!("{side}.{only}::text"),
        [only] => format!("to_json({side}.{only}) #>> '{{}}'"),
        several => {
            let several: Vec<String> = several.iter().map(|column| format!("{side}.{column}")).collect();
            format!("json_build_array({})::text", several.join(", "))
        }
    };
    let parts: Vec<(String, String)> = named().map(|(key, column)| (key.name.clone(), column)).collect();
    // Whatever type the column has by then: this stays JSON when another type is given to it, or when it is gone.
    let pk = move |side: &str| {
        object(
            parts
                .iter()
                .map(|(name, column)| (name.as_str(), format!("coalesce(to_json({side}.{column})::text, 'null')"))),
        )
    };
    (Box::new(key), Box::new(pk))
}

/// Rows whole, whatever columns they have. A name that stands alone is looked for in the rows first, and then in what
/// stands before them: there a column of the key that is gone is found as NULL.
fn whole(relation: &Relation) -> Telling {
    let absent: Vec<String> = relation.key.iter().map(|key| format!("NULL AS {}", quoted(&key.name))).collect();
    let found: Vec<String> =
        relation.key.iter().enumerate().map(|(at, key)| format!("{} AS tidegate_{at}", quoted(&key.name))).collect();
    let source = move |rows: &str| {
        format!(
            "(SELECT {}) AS tidegate_absent CROSS JOIN LATERAL (SELECT {}, tidegate_r AS tidegate_row FROM {rows} AS tidegate_r)",
            absent.join(", "),
            found.join(", ")
        )
    };
    let (key, pk) = keys(relation, |at, _| format!("tidegate_{at}"));
    Telling {
        source: Box::new(source),
        row: Box::new(|side| format!("row_to_json({side}.tidegate_row)::text")),
        key,
        pk,
    }
}

/// The table's columns by name.
fn by_name(relation: &Relation, told: &[&str]) -> (Telling, Pairing) {
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
    let first = relation.key.first().map(|key| of(&key.name));
    let (key, pk) = keys(relation, |_, key| quoted(&key.name));
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
    let telling = Telling { source: Box::new(str::to_owned), row: Box::new(row), key, pk };
    let pairing = Pairing {
        absent: Box::new(move |side| {
            first.as_ref().map_or("false".to_owned(), |first| format!("{} IS NULL", first(side)))
        }),
        on: equal.collect::<Vec<_>>().join(" AND "),
        changed: format!(
            "to_json(array_remove(ARRAY[{}]::text[], NULL))::text",
            differing.collect::<Vec<_>>().join(", ")
        ),
    };
    (telling, pairing)
}

/// Rows as `jsonb`, whatever columns they have.
fn by_jsonb(relation: &Relation, watch: &Watch, told: &[&str]) -> (Telling, Pairing) {
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
    // What lacks a column of its key is not to be found by the rest of it.
    let named = texts(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let whole_key = |side: &str| format!("CASE WHEN {side}.j ?& {named} THEN {} END", key(side));
    let on = format!("({}) = ({})", whole_key(OLD), whole_key(NEW));
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
    let telling = Telling {
        source: Box::new(source),
        row: Box::new(|side| format!("coalesce({side}.f::text, 'null')")),
        key: Box::new(key),
        pk: Box::new(pk),
    };
    (telling, Pairing { absent: Box::new(|side| format!("{side}.j IS NULL")), on, changed })
}

/// A JSON object of expressions that give JSON.
fn object<'a>(fields: impl Iterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<String> = fields
        .enumerate()
        .map(|(at, (name, value))| format!("{} || {value}", json_name(if at == 0 { "{" } else { "," }, name, ":")))
        .collect();
    format!("{} || '}}'", fields.join(" || "))
}

/// The payload of a row that is too wide to be told, from expressions for what has changed, the key and the size.
fn too_wide(changed: &str, pk: &str, size: &str) -> String {
    format!("'{NOTHING}' || {changed} || ',\"pk\":' || {pk} || ',\"oversize\":' || ({size}) || '}}'")
}

/// Statements that write the inbox.
struct Writer<'a> {
    relation: &'a Relation,
    watch: &'a Watch,
    inbox: String,
}

impl Writer<'_> {
    fn create(&self, telling: &Telling, new: &str) -> String {
        self.alone(telling, Operation::Create, NEW, new, ["{\"before\":null,\"after\":", ",\"changed\":null,\"pk\":"])
    }

    fn delete(&self, telling: &Telling, old: &str) -> String {
        let around = ["{\"before\":", ",\"after\":null,\"changed\":null,\"pk\":"];
        self.alone(telling, Operation::Delete, OLD, old, around)
    }

    /// What follows after the first few rows that have no other side: the others, told whole, many in one row of the inbox as
    /// `provider/bundle.rs` reads them. A row that is too wide stands there as a string, the payload that says so; whether it
    /// is, is only looked at closely where it may be.
    fn together(&self, operation: Operation, rows: &str) -> String {
        let prefix = event_type(&self.relation.schema, &self.relation.name);
        let names = serde_json::json!(self.relation.key_names()).to_string();
        let value = |name: &str| format!("coalesce((e.told::json -> {})::text, 'null')", literal(name));
        let pk = object(self.relation.key.iter().map(|key| (key.name.as_str(), value(&key.name))));
        let around = AROUND + 2 * "null".len();
        let (size, limit) = (format!("octet_length(e.told) + octet_length({pk}) + {around}"), self.watch.max_payload);
        // A key is a part of its row, so that twice the row is more than all of it.
        let surely = limit.saturating_sub(around as u64) / 2;
        format!(
            "\nGET DIAGNOSTICS tidegate_count = ROW_COUNT;\nIF tidegate_count = {ALONE} THEN\n\
             INSERT INTO {} (type, schema, entity, user_id, session_id, trace_parent, metadata, rows, payload) \
             SELECT {}, {}, {}, tidegate_user_id, tidegate_session, tidegate_trace, tidegate_meta, count(*), {} || string_agg(\
             CASE WHEN octet_length(e.told) <= {surely} THEN e.told WHEN {size} <= {limit} THEN e.told \
             ELSE to_json({})::text END, ',') || ']}}' \
             FROM (SELECT row_to_json(tidegate_r)::text AS told, (row_number() OVER () - 1) / {} AS part \
             FROM (SELECT * FROM {rows} OFFSET {ALONE}) AS tidegate_r OFFSET 0) AS e GROUP BY e.part ORDER BY e.part;\nEND IF;",
            self.inbox,
            literal(&format!("{prefix}.{}", operation.as_str())),
            true_name(&self.relation.schema),
            true_name(&self.relation.name),
            literal(&format!("{{\"pk\":{names},\"rows\":[")),
            too_wide("'null'", &pk, &size),
            (TOGETHER_BYTES / limit.max(1)).clamp(1, TOGETHER),
        )
    }

    /// Rows that have no other side. What stands before and after the row's JSON is the same for all, and the shorter
    /// texts are joined first, because every step copies what it has.
    fn alone(
        &self,
        telling: &Telling,
        operation: Operation,
        side: &str,
        rows: &str,
        [before, after]: [&str; 2],
    ) -> String {
        let prefix = event_type(&self.relation.schema, &self.relation.name);
        let size = format!("octet_length(e.told) + octet_length(e.pk) + {}", AROUND + 2 * "null".len());
        let payload = format!(
            "CASE WHEN {size} > {limit} THEN {} ELSE {} || e.told || ({} || e.pk || '}}') END",
            too_wide("'null'", "e.pk", &size),
            literal(before),
            literal(after),
            limit = self.watch.max_payload,
        );
        let from = format!(
            "(SELECT {} AS key, {} AS pk, {} AS told FROM {} AS {side} OFFSET 0) AS e",
            (telling.key)(side),
            (telling.pk)(side),
            (telling.row)(side),
            (telling.source)(rows),
        );
        self.insert(&literal(&format!("{prefix}.{}", operation.as_str())), &payload, &from)
    }

    /// Pairs old and new rows by their keys. A row whose key has changed has no partner: its old key is deleted, its new
    /// one created.
    fn update(&self, telling: &Telling, pairing: &Pairing, new: &str, old: &str) -> String {
        let (absent, key, pk, row) = (&pairing.absent, &telling.key, &telling.pk, &telling.row);
        let (no_old, no_new) = (absent(OLD), absent(NEW));
        let join = if self.relation.key.is_empty() { "true" } else { &pairing.on };
        let join_kind = if self.relation.key.is_empty() { "JOIN" } else { "FULL JOIN" };
        let either = |of: &dyn Fn(&str) -> String| format!("CASE WHEN {no_new} THEN {} ELSE {} END", of(OLD), of(NEW));
        let prefix = event_type(&self.relation.schema, &self.relation.name);
        let wanted: Vec<&str> = self.watch.operations.iter().map(|operation| operation.as_str()).collect();
        let size = format!(
            "octet_length(e.before) + octet_length(e.after) + octet_length(e.changed) + octet_length(e.pk) + {AROUND}"
        );
        let payload = format!(
            "CASE WHEN {size} > {limit} THEN {} ELSE '{{\"before\":' || e.before || ',\"after\":' || e.after \
             || (',\"changed\":' || e.changed || ',\"pk\":' || e.pk || '}}') END",
            too_wide("e.changed", "e.pk", &size),
            limit = self.watch.max_payload,
        );
        let from = format!(
            "(SELECT CASE WHEN {no_old} THEN 'create' WHEN {no_new} THEN 'delete' ELSE 'update' END AS op, {} AS key, {} AS pk, \
             CASE WHEN {no_old} THEN 'null' ELSE {} END AS before, CASE WHEN {no_new} THEN 'null' ELSE {} END AS after, \
             CASE WHEN {no_old} OR {no_new} THEN 'null' ELSE {} END AS changed \
             FROM {} AS {OLD} {join_kind} {} AS {NEW} ON {join} OFFSET 0) AS e \
             WHERE e.changed <> '[]' AND e.op = ANY ({})",
            either(key),
            either(pk),
            row(OLD),
            row(NEW),
            pairing.changed,
            (telling.source)(old),
            (telling.source)(new),
            texts(&wanted),
        );
        self.insert(&format!("{} || e.op", literal(&format!("{prefix}."))), &payload, &from)
    }

    /// Writes the inbox from rows `e` that have a key.
    fn insert(&self, event_type: &str, payload: &str, from: &str) -> String {
        format!(
            "INSERT INTO {} (type, schema, entity, key, user_id, session_id, trace_parent, metadata, payload) \
             SELECT {event_type}, {}, {}, e.key, tidegate_user_id, tidegate_session, tidegate_trace, tidegate_meta, {payload} \
             FROM {from};",
            self.inbox,
            true_name(&self.relation.schema),
            true_name(&self.relation.name),
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

/// The name, where the type's segment is another and an event can carry it.
fn true_name(name: &str) -> String {
    let is_needed = segment(name) != name && !name.chars().any(char::is_control);
    if is_needed { literal(name) } else { "NULL".to_owned() }
}
