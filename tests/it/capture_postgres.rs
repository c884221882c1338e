//! What PostgreSQL's statements tell once their tables are captured, and what becomes of what was installed.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool, Row as _};
use tidegate::capture::triggers::{Capture, Operation, Watch};
use tidegate::provider::RouteRequest;
use tidegate::provider::inbox::InboxRow;
use tidegate::provider::postgres::{Options, PostgresProvider};
use tidegate::{Event, EventType};

use tokio::sync::{mpsc, oneshot};

use crate::support::postgres::Postgres;

/// A database of our own with an inbox.
struct Scene {
    name: String,
    pool: PgPool,
    capture: Capture,
    /// Whether a column is added to each table once it is captured, so that its triggers are no longer what they were
    /// written for. It appears in no row that is compared.
    is_drifted: bool,
}

const DRIFT: &str = "added_later";

impl Scene {
    async fn open() -> Self {
        let server = Postgres::shared();
        let name = server.fresh_name();
        server.psql("postgres", &format!("CREATE DATABASE {name}"));
        let url = server.url(&name);
        let options = Options { url: url.clone(), max_connections: 2, ..Options::default() };
        drop(PostgresProvider::open(options).await.unwrap());
        let pool = PgPool::connect(&url).await.unwrap();
        Self { name, capture: Capture::postgres(pool.clone()), pool, is_drifted: false }
    }

    /// Runs statements as an application would, in one go.
    async fn run(&self, text: &str) {
        self.try_run(text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
    }

    async fn try_run(&self, text: &str) -> sqlx::Result<()> {
        let mut connection = self.pool.acquire().await.unwrap().detach();
        let result = sqlx::raw_sql(AssertSqlSafe(text.to_owned())).execute(&mut connection).await;
        connection.close().await.unwrap();
        result.map(drop)
    }

    async fn watch(&self, watch: &Watch) {
        self.capture.install(watch).await.unwrap();
        if self.is_drifted {
            self.run(&format!("ALTER TABLE {} ADD COLUMN {DRIFT} int", watch.table)).await;
        }
    }

    async fn watch_all(&self, tables: &[&str]) {
        for table in tables {
            self.watch(&all_of(table)).await;
        }
    }

    /// Empties the inbox: for each row its type, key, what was before and after, and what has changed, sorted.
    async fn told(&self) -> Vec<Value> {
        let mut told: Vec<Value> = self
            .rows()
            .await
            .into_iter()
            .map(|mut row| {
                let payload = &mut row["payload"];
                for side in ["before", "after"] {
                    payload[side].as_object_mut().map(|side| side.remove(DRIFT));
                }
                json!([
                    row["type"],
                    row["key"],
                    row["payload"]["before"],
                    row["payload"]["after"],
                    row["payload"]["changed"]
                ])
            })
            .collect();
        told.sort_by_key(Value::to_string);
        told
    }

    /// Runs the statement, and compares what it told.
    async fn check(&self, text: &str, expected: &[&str]) {
        self.run(text).await;
        let mut expected: Vec<Value> = expected.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        expected.sort_by_key(Value::to_string);
        assert_eq!(self.told().await, expected, "{text}");
    }

    /// The whole payloads, and the other columns, in order. Rows that stand together are taken apart, as the broker does it.
    async fn rows(&self) -> Vec<Value> {
        let text = "WITH gone AS (DELETE FROM tidegate.inbox RETURNING *) SELECT to_jsonb(gone)::text FROM gone ORDER BY position";
        let rows: Vec<String> = sqlx::query_scalar(text).fetch_all(&self.pool).await.unwrap();
        let parse = |text: &String| {
            let mut row: Value = serde_json::from_str(text).unwrap();
            row["metadata"] = serde_json::from_str(row["metadata"].as_str().unwrap()).unwrap();
            taken_apart(&row).into_iter().map(move |(key, payload)| {
                let mut row = row.clone();
                (row["key"], row["payload"]) = (key, payload);
                row
            })
        };
        rows.iter().flat_map(parse).collect()
    }

    /// What waits in the inbox.
    async fn inbox(&self) -> Vec<InboxRow> {
        let text = "SELECT type, key, metadata, payload, rows FROM tidegate.inbox ORDER BY position";
        let rows = sqlx::query(text).fetch_all(&self.pool).await.unwrap();
        let row = |row: &PgRow| InboxRow {
            event_type: row.get(0),
            key: row.get(1),
            metadata: row.get(2),
            payload: row.get(3),
            rows: row.get(4),
            ..InboxRow::default()
        };
        rows.iter().map(row).collect()
    }

    /// Empties the inbox: type, key and payload of the events that the broker makes of it, sorted.
    async fn events(&self) -> Vec<(String, Option<String>, String)> {
        let matcher = |_: &EventType| -> Arc<[Arc<str>]> { [].into() };
        let request = RouteRequest { matcher: &matcher, max: 1, max_payload: u64::MAX };
        let rows = self.inbox().await;
        self.run("DELETE FROM tidegate.inbox").await;
        let events = rows.into_iter().flat_map(|row| row.into_appends(&request).unwrap()).map(|append| append.event);
        let told = |event: Arc<Event>| {
            let payload = String::from_utf8(event.payload.bytes().to_vec()).unwrap();
            (event.event_type.to_string(), event.key.as_deref().map(str::to_owned), payload)
        };
        let mut events: Vec<_> = events.map(told).collect();
        events.sort();
        events
    }

    async fn drift(&self) -> Vec<String> {
        self.capture.status().await.unwrap().into_iter().flat_map(|status| status.drift).collect()
    }
}

/// The key and the payload of each event that a row of the inbox stands for.
fn taken_apart(row: &Value) -> Vec<(Value, Value)> {
    let payload = row["payload"].as_str().unwrap();
    if row["rows"].is_null() {
        return vec![(row["key"].clone(), serde_json::from_str(payload).unwrap())];
    }
    let matcher = |_: &EventType| -> Arc<[Arc<str>]> { [].into() };
    let request = RouteRequest { matcher: &matcher, max: 1, max_payload: u64::MAX };
    let together = InboxRow {
        event_type: row["type"].as_str().unwrap().to_owned(),
        payload: Some(payload.to_owned()),
        rows: Some(1),
        ..InboxRow::default()
    };
    let events: Vec<_> = together.into_appends(&request).unwrap().into_iter().map(|append| append.event).collect();
    assert_eq!(events.len() as u64, row["rows"].as_u64().unwrap());
    let apart = |event: Arc<Event>| (json!(event.key), event.payload.parse().unwrap());
    events.into_iter().map(apart).collect()
}

fn all_of(table: &str) -> Watch {
    Watch::new(table.parse().unwrap())
}

/// The truth table: what each kind of statement tells.
async fn truth(is_drifted: bool) {
    let scene = Scene { is_drifted, ..Scene::open().await };
    rows_and_batches(&scene).await;
    keys_that_move(&scene).await;
    transactions(&scene).await;
    kinds_of_values(&scene).await;
    relations(&scene).await;
    filters(&scene).await;
    scene.run("DROP SCHEMA tidegate CASCADE").await;
    scene.pool.close().await;
    Postgres::shared().psql("postgres", &format!("DROP DATABASE {}", scene.name));
}

#[tokio::test]
async fn every_statement_tells_what_the_truth_table_says() {
    truth(false).await;
}

/// The same table, while every trigger was written for other columns than its table has now.
#[tokio::test]
async fn every_statement_tells_the_same_after_its_table_has_changed() {
    truth(true).await;
}

async fn rows_and_batches(scene: &Scene) {
    scene.run("CREATE TABLE users (id int PRIMARY KEY, name text, n numeric(6,2))").await;
    scene.watch_all(&["public.users"]).await;
    let rows: &[(&str, &[&str])] = &[
        (
            "INSERT INTO users VALUES (1, 'Ada', 1.50)",
            &[r#"["public.users.create","1",null,{"id":1,"name":"Ada","n":1.50},null]"#],
        ),
        (
            "INSERT INTO users VALUES (2, 'Bob', NULL), (3, NULL, 0)",
            &[
                r#"["public.users.create","2",null,{"id":2,"name":"Bob","n":null},null]"#,
                r#"["public.users.create","3",null,{"id":3,"name":null,"n":0.00},null]"#,
            ],
        ),
        ("INSERT INTO users SELECT 9 WHERE false", &[]),
        ("INSERT INTO users VALUES (1, 'again', 0) ON CONFLICT DO NOTHING", &[]),
        (
            "INSERT INTO users VALUES (1, 'Eve', 1.50), (4, 'Dan', 4) ON CONFLICT (id) DO UPDATE SET name = excluded.name",
            &[
                r#"["public.users.update","1",{"id":1,"name":"Ada","n":1.50},{"id":1,"name":"Eve","n":1.50},["name"]]"#,
                r#"["public.users.create","4",null,{"id":4,"name":"Dan","n":4.00},null]"#,
            ],
        ),
        (
            "UPDATE users SET name = 'Ada', n = 2 WHERE id = 1",
            &[
                r#"["public.users.update","1",{"id":1,"name":"Eve","n":1.50},{"id":1,"name":"Ada","n":2.00},["n","name"]]"#,
            ],
        ),
        ("UPDATE users SET name = name", &[]),
        (
            "UPDATE users SET name = 'x' WHERE id IN (1, 2, 3) AND name IS NOT NULL",
            &[
                r#"["public.users.update","1",{"id":1,"name":"Ada","n":2.00},{"id":1,"name":"x","n":2.00},["name"]]"#,
                r#"["public.users.update","2",{"id":2,"name":"Bob","n":null},{"id":2,"name":"x","n":null},["name"]]"#,
            ],
        ),
        (
            "UPDATE users SET name = CASE id WHEN 3 THEN 'three' ELSE name END WHERE id IN (2, 3)",
            &[r#"["public.users.update","3",{"id":3,"name":null,"n":0.00},{"id":3,"name":"three","n":0.00},["name"]]"#],
        ),
        (
            "UPDATE users SET n = NULL WHERE id = 4",
            &[r#"["public.users.update","4",{"id":4,"name":"Dan","n":4.00},{"id":4,"name":"Dan","n":null},["n"]]"#],
        ),
        ("UPDATE users SET n = 1 WHERE id = 99", &[]),
        (
            "DELETE FROM users WHERE id IN (2, 4)",
            &[
                r#"["public.users.delete","2",{"id":2,"name":"x","n":null},null,null]"#,
                r#"["public.users.delete","4",{"id":4,"name":"Dan","n":null},null,null]"#,
            ],
        ),
        ("DELETE FROM users WHERE false", &[]),
        (
            "MERGE INTO users u USING (VALUES (1, 'm'), (5, 'new'), (3, 'gone')) AS s(id, name) ON u.id = s.id \
             WHEN MATCHED AND s.name = 'gone' THEN DELETE WHEN MATCHED THEN UPDATE SET name = s.name \
             WHEN NOT MATCHED THEN INSERT (id, name) VALUES (s.id, s.name)",
            &[
                r#"["public.users.update","1",{"id":1,"name":"x","n":2.00},{"id":1,"name":"m","n":2.00},["name"]]"#,
                r#"["public.users.create","5",null,{"id":5,"name":"new","n":null},null]"#,
                r#"["public.users.delete","3",{"id":3,"name":"three","n":0.00},null,null]"#,
            ],
        ),
        (
            "COPY users (id, name) FROM PROGRAM 'printf \"6\\tsix\\n7\\t\\\\\\\\N\\n\"'",
            &[
                r#"["public.users.create","6",null,{"id":6,"name":"six","n":null},null]"#,
                r#"["public.users.create","7",null,{"id":7,"name":null,"n":null},null]"#,
            ],
        ),
        (
            "WITH gone AS (DELETE FROM users WHERE id > 5 RETURNING id) INSERT INTO users SELECT 8, count(*)::text FROM gone",
            &[
                r#"["public.users.delete","6",{"id":6,"name":"six","n":null},null,null]"#,
                r#"["public.users.delete","7",{"id":7,"name":null,"n":null},null,null]"#,
                r#"["public.users.create","8",null,{"id":8,"name":"2","n":null},null]"#,
            ],
        ),
        ("TRUNCATE users", &[r#"["public.users.truncate",null,null,null,null]"#]),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
}

async fn keys_that_move(scene: &Scene) {
    scene
        .run("CREATE TABLE k (id int PRIMARY KEY DEFERRABLE, v text); CREATE TABLE two (a text, b int, v int, PRIMARY KEY (b, a))")
        .await;
    scene.run("INSERT INTO k VALUES (1, 'a'), (2, 'b'), (3, 'c')").await;
    scene.watch_all(&["k", "two"]).await;
    let rows: &[(&str, &[&str])] = &[
        (
            "UPDATE k SET id = 10 WHERE id = 1",
            &[
                r#"["public.k.delete","1",{"id":1,"v":"a"},null,null]"#,
                r#"["public.k.create","10",null,{"id":10,"v":"a"},null]"#,
            ],
        ),
        (
            "UPDATE k SET id = id + 1 WHERE id < 10",
            &[
                r#"["public.k.delete","2",{"id":2,"v":"b"},null,null]"#,
                r#"["public.k.update","3",{"id":3,"v":"c"},{"id":3,"v":"b"},["v"]]"#,
                r#"["public.k.create","4",null,{"id":4,"v":"c"},null]"#,
            ],
        ),
        (
            "INSERT INTO two VALUES ('x,\"y', 1, 5)",
            &[r#"["public.two.create","[1, \"x,\\\"y\"]",null,{"a":"x,\"y","b":1,"v":5},null]"#],
        ),
        (
            "UPDATE two SET v = 6",
            &[r#"["public.two.update","[1, \"x,\\\"y\"]",{"a":"x,\"y","b":1,"v":5},{"a":"x,\"y","b":1,"v":6},["v"]]"#],
        ),
        (
            "UPDATE two SET b = 2",
            &[
                r#"["public.two.delete","[1, \"x,\\\"y\"]",{"a":"x,\"y","b":1,"v":6},null,null]"#,
                r#"["public.two.create","[2, \"x,\\\"y\"]",null,{"a":"x,\"y","b":2,"v":6},null]"#,
            ],
        ),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
    // Without a primary key nothing pairs rows but the row trigger, and nothing orders them.
    scene.run("CREATE TABLE bare (a int, b text)").await;
    scene.watch_all(&["bare"]).await;
    let rows: &[(&str, &[&str])] = &[
        (
            "INSERT INTO bare VALUES (1, 'x'), (1, 'x')",
            &[
                r#"["public.bare.create",null,null,{"a":1,"b":"x"},null]"#,
                r#"["public.bare.create",null,null,{"a":1,"b":"x"},null]"#,
            ],
        ),
        (
            "UPDATE bare SET b = 'y'",
            &[
                r#"["public.bare.update",null,{"a":1,"b":"x"},{"a":1,"b":"y"},["b"]]"#,
                r#"["public.bare.update",null,{"a":1,"b":"x"},{"a":1,"b":"y"},["b"]]"#,
            ],
        ),
        ("UPDATE bare SET b = b", &[]),
        (
            "DELETE FROM bare WHERE ctid = (SELECT min(ctid) FROM bare)",
            &[r#"["public.bare.delete",null,{"a":1,"b":"y"},null,null]"#],
        ),
        ("TRUNCATE bare", &[r#"["public.bare.truncate",null,null,null,null]"#]),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
}

async fn transactions(scene: &Scene) {
    scene.run("CREATE TABLE tx (id int PRIMARY KEY)").await;
    scene.watch_all(&["tx"]).await;
    let create = |id: u32| format!(r#"["public.tx.create","{id}",null,{{"id":{id}}},null]"#);
    let rows: &[(&str, &[String])] = &[
        ("BEGIN; INSERT INTO tx VALUES (1); ROLLBACK", &[]),
        (
            "BEGIN; INSERT INTO tx VALUES (1); SAVEPOINT s; INSERT INTO tx VALUES (2); ROLLBACK TO s; INSERT INTO tx VALUES (3); COMMIT",
            &[create(1), create(3)],
        ),
        ("DO $$ BEGIN INSERT INTO tx VALUES (4); RAISE EXCEPTION 'no'; EXCEPTION WHEN OTHERS THEN NULL; END $$", &[]),
        ("DO $$ BEGIN FOR i IN 5..6 LOOP INSERT INTO tx VALUES (i); END LOOP; END $$", &[create(5), create(6)]),
    ];
    for (text, expected) in rows {
        scene.check(text, &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
}

async fn kinds_of_values(scene: &Scene) {
    scene
        .run(
            "CREATE DOMAIN short AS varchar(5); CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (x int, y text); \
             CREATE TABLE kinds (id uuid PRIMARY KEY, j json, jb jsonb, list int[], d short, m mood, p pair, b bytea, t timestamptz, \
             f float8, g int GENERATED ALWAYS AS (cardinality(list)) STORED)",
        )
        .await;
    scene.watch_all(&["kinds"]).await;
    let id = "00000000-0000-0000-0000-000000000001";
    let row = |list: &str, g: u32, f: &str| {
        format!(
            r#"{{"id":"{id}","j":{{"a":[1,null]}},"jb":"s","list":{list},"d":"abc","m":"glad","p":{{"x":1,"y":"z"}},"b":"\\x00ff","t":"2026-01-02T03:04:05+00:00","f":{f},"g":{g}}}"#
        )
    };
    let (first, second, third) = (row("[1,2]", 2, "\"NaN\""), row("[7]", 1, "\"NaN\""), row("[7]", 1, "1.5"));
    let rows = [
        (
            format!(
                "SET timezone = 'UTC'; INSERT INTO kinds VALUES ('{id}', '{{\"a\":[1,null]}}', '\"s\"', '{{1,2}}', 'abc', 'glad', \
                 ROW(1, 'z'), '\\x00ff', '2026-01-02 03:04:05Z', 'NaN')"
            ),
            format!(r#"["public.kinds.create","{id}",null,{first},null]"#),
        ),
        (
            "SET timezone = 'UTC'; UPDATE kinds SET list = '{7}'".to_owned(),
            format!(r#"["public.kinds.update","{id}",{first},{second},["g","list"]]"#),
        ),
        (
            "SET timezone = 'UTC'; UPDATE kinds SET f = 1.5, j = j".to_owned(),
            format!(r#"["public.kinds.update","{id}",{second},{third},["f"]]"#),
        ),
    ];
    for (text, expected) in rows {
        scene.run(&text).await;
        let expected: Value = serde_json::from_str(&expected).unwrap();
        assert_eq!(scene.told().await, [expected], "{text}");
    }
}

async fn relations(scene: &Scene) {
    scene
        .run(
            "CREATE TABLE parents (id int PRIMARY KEY); \
             CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents ON DELETE CASCADE ON UPDATE CASCADE); \
             CREATE TABLE parts (id int, at date, v int, PRIMARY KEY (id, at)) PARTITION BY RANGE (at); \
             CREATE TABLE parts_25 PARTITION OF parts FOR VALUES FROM ('2025-01-01') TO ('2026-01-01'); \
             CREATE TABLE parts_26 (v int, at date NOT NULL, id int NOT NULL, PRIMARY KEY (id, at)); \
             ALTER TABLE parts ATTACH PARTITION parts_26 FOR VALUES FROM ('2026-01-01') TO ('2027-01-01'); \
             CREATE SCHEMA \"Odd.Schema\"; CREATE TABLE \"Odd.Schema\".\"Grö\"\"ße\" (\"I d\" int PRIMARY KEY, \"n\" text, \"op'\" int); \
             INSERT INTO parents VALUES (1), (2); INSERT INTO children VALUES (10, 1), (11, 1), (12, 2)",
        )
        .await;
    scene.watch_all(&["parents", "children", "public.parts", "\"Odd.Schema\".\"Grö\"\"ße\""]).await;
    let rows: &[(&str, &[&str])] = &[
        (
            "DELETE FROM parents WHERE id = 1",
            &[
                r#"["public.parents.delete","1",{"id":1},null,null]"#,
                r#"["public.children.delete","10",{"id":10,"parent":1},null,null]"#,
                r#"["public.children.delete","11",{"id":11,"parent":1},null,null]"#,
            ],
        ),
        (
            "UPDATE parents SET id = 3",
            &[
                r#"["public.parents.delete","2",{"id":2},null,null]"#,
                r#"["public.parents.create","3",null,{"id":3},null]"#,
                r#"["public.children.update","12",{"id":12,"parent":2},{"id":12,"parent":3},["parent"]]"#,
            ],
        ),
        (
            "TRUNCATE parents CASCADE",
            &[
                r#"["public.parents.truncate",null,null,null,null]"#,
                r#"["public.children.truncate",null,null,null,null]"#,
            ],
        ),
        (
            "INSERT INTO parts VALUES (1, '2025-05-05', 1), (2, '2026-06-06', 2)",
            &[
                r#"["public.parts.create","[1, \"2025-05-05\"]",null,{"id":1,"at":"2025-05-05","v":1},null]"#,
                r#"["public.parts.create","[2, \"2026-06-06\"]",null,{"id":2,"at":"2026-06-06","v":2},null]"#,
            ],
        ),
        (
            "INSERT INTO parts_26 (id, at, v) VALUES (3, '2026-07-07', 3)",
            &[r#"["public.parts.create","[3, \"2026-07-07\"]",null,{"id":3,"at":"2026-07-07","v":3},null]"#],
        ),
        (
            "UPDATE parts SET v = 9 WHERE id = 2",
            &[
                r#"["public.parts.update","[2, \"2026-06-06\"]",{"id":2,"at":"2026-06-06","v":2},{"id":2,"at":"2026-06-06","v":9},["v"]]"#,
            ],
        ),
        (
            "UPDATE parts SET at = '2025-06-06' WHERE id = 2",
            &[
                r#"["public.parts.delete","[2, \"2026-06-06\"]",{"id":2,"at":"2026-06-06","v":9},null,null]"#,
                r#"["public.parts.create","[2, \"2025-06-06\"]",null,{"id":2,"at":"2025-06-06","v":9},null]"#,
            ],
        ),
        (
            "DELETE FROM parts WHERE id < 3",
            &[
                r#"["public.parts.delete","[1, \"2025-05-05\"]",{"id":1,"at":"2025-05-05","v":1},null,null]"#,
                r#"["public.parts.delete","[2, \"2025-06-06\"]",{"id":2,"at":"2025-06-06","v":9},null,null]"#,
            ],
        ),
        ("TRUNCATE parts", &[r#"["public.parts.truncate",null,null,null,null]"#]),
        (
            "INSERT INTO \"Odd.Schema\".\"Grö\"\"ße\" VALUES (1, 'ß', 2)",
            &[r#"["Odd-2eSchema.Gr-c3-b6-22-c3-9fe.create","1",null,{"I d":1,"n":"ß","op'":2},null]"#],
        ),
        (
            "UPDATE \"Odd.Schema\".\"Grö\"\"ße\" SET \"op'\" = 3",
            &[
                r#"["Odd-2eSchema.Gr-c3-b6-22-c3-9fe.update","1",{"I d":1,"n":"ß","op'":2},{"I d":1,"n":"ß","op'":3},["op'"]]"#,
            ],
        ),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
    scene.run("DELETE FROM \"Odd.Schema\".\"Grö\"\"ße\"").await;
    let row = scene.rows().await.remove(0);
    assert_eq!((&row["schema"], &row["entity"]), (&json!("Odd.Schema"), &json!("Grö\"ße")));
    assert_eq!(row["metadata"], json!({"schema_name": "Odd.Schema", "table_name": "Grö\"ße"}));
    assert_eq!(row["payload"]["pk"], json!({"I d": 1}));
}

async fn filters(scene: &Scene) {
    scene.run("CREATE TABLE f (id int PRIMARY KEY, a text, password text, seen int)").await;
    scene.run("CREATE TABLE g (id int PRIMARY KEY, a text, b text)").await;
    scene.watch(&Watch { exclude: vec!["password".into(), "seen".into()], ..all_of("f") }).await;
    scene
        .watch(&Watch {
            columns: Some(vec!["a".into()]),
            operations: vec![Operation::Create, Operation::Update],
            ..all_of("g")
        })
        .await;
    let rows: &[(&str, &[&str])] = &[
        ("INSERT INTO f VALUES (1, 'a', 'SECRET', 0)", &[r#"["public.f.create","1",null,{"id":1,"a":"a"},null]"#]),
        ("UPDATE f SET password = 'SECRET2', seen = seen + 1", &[]),
        (
            "UPDATE f SET password = 'SECRET3', a = 'b'",
            &[r#"["public.f.update","1",{"id":1,"a":"a"},{"id":1,"a":"b"},["a"]]"#],
        ),
        ("DELETE FROM f", &[r#"["public.f.delete","1",{"id":1,"a":"b"},null,null]"#]),
        ("INSERT INTO g VALUES (1, 'a', 'b')", &[r#"["public.g.create","1",null,{"a":"a"},null]"#]),
        ("UPDATE g SET b = 'c'", &[]),
        ("UPDATE g SET a = 'c'", &[r#"["public.g.update","1",{"a":"a"},{"a":"c"},["a"]]"#]),
        ("DELETE FROM g", &[]),
        ("TRUNCATE g", &[]),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
}

/// Who did it comes from settings of the transaction, whatever they hold.
#[tokio::test]
async fn settings_of_the_transaction_say_who_did_it() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE users (id int PRIMARY KEY)").await;
    scene.watch_all(&["users"]).await;
    let set = |name: &str, value: &str| format!("SELECT set_config('tidegate.{name}', '{value}', true);");
    let user = |id: &str, n: u32| format!("BEGIN; {} INSERT INTO users VALUES ({n}); COMMIT;", set("user_id", id));
    let all = ["session_id", "trace_parent", "user_name", "user_email"].map(|name| set(name, &format!("my {name}")));
    let everything = format!(
        "BEGIN; {}{}{} INSERT INTO users VALUES (9); COMMIT; INSERT INTO users VALUES (10)",
        set("user_id", "17"),
        all.concat(),
        set("user_roles", "admin,editor")
    );
    for text in [user("007", 1), user("-5", 2), user("Ada \"L\"\n", 3), user(&"9".repeat(300), 4), everything] {
        scene.run(&text).await;
    }
    let rows = scene.rows().await;
    let users: Vec<Option<&str>> = rows.iter().map(|row| row["user_id"].as_str()).collect();
    let long = format!("\"{}\"", "9".repeat(255));
    let expected = [Some("\"007\""), Some("-5"), Some("\"Ada \\\"L\\\"\""), Some(&*long), Some("17"), None];
    assert_eq!(users, expected);
    assert_eq!(
        (&rows[4]["session_id"], &rows[4]["trace_parent"]),
        (&json!("my session_id"), &json!("my trace_parent"))
    );
    assert_eq!(
        rows[4]["metadata"],
        json!({"table_name": "users", "user_name": "my user_name", "user_email": "my user_email", "user_roles": ["admin", "editor"]})
    );
    assert_eq!(rows[5]["metadata"], json!({"table_name": "users"}));
    assert_eq!(rows[5]["payload"], json!({"before": null, "after": {"id": 10}, "changed": null, "pk": {"id": 10}}));
}

/// The application's write goes on; the event carries the key.
#[tokio::test]
async fn a_row_that_is_too_wide_is_told_by_its_key() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE docs (id int PRIMARY KEY, body text)").await;
    scene.watch(&Watch { max_payload: 2_000, ..all_of("docs") }).await;
    scene.run("INSERT INTO docs VALUES (1, repeat('x', 5000)), (2, 'short')").await;
    scene.run("UPDATE docs SET body = repeat('é', 1000) WHERE id = 2").await;
    scene.run("INSERT INTO docs VALUES (3, repeat(E'\\x01', 30000000))").await;
    let payloads: Vec<Value> = scene.rows().await.into_iter().map(|mut row| row["payload"].take()).collect();
    assert!(payloads[0]["oversize"].as_u64().unwrap() > 5_000);
    assert_eq!((&payloads[0]["after"], &payloads[0]["pk"]), (&Value::Null, &json!({"id": 1})));
    assert_eq!(payloads[1]["after"]["body"], "short");
    assert_eq!((&payloads[2]["changed"], payloads[2]["oversize"].is_u64()), (&json!(["body"]), true));
    assert!(payloads[3]["oversize"].as_u64().unwrap() > 180_000_000);
}

/// From a statement of the application to a handler, by way of triggers and outbox, in the order of commits.
#[tokio::test]
async fn a_row_that_is_written_beside_a_running_broker_is_handled() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE orders (id int PRIMARY KEY, total int)").await;
    scene.watch_all(&["orders"]).await;
    let url = Postgres::shared().url(&scene.name);
    let provider = PostgresProvider::open(Options { url, max_connections: 4, ..Options::default() }).await.unwrap();
    let options = tidegate::broker::Options { instance_id: "test".into(), ..Default::default() };
    let opened = tidegate::Broker::open(Arc::new(provider), options, tidegate::Metrics::default()).await;
    let (broker, service) = opened.unwrap();
    let (seen, mut handled) = mpsc::unbounded_channel();
    let handler = tidegate::native(move |call: tidegate::Call| {
        let sent = seen.send(call.event);
        async move { sent.map(|()| tidegate::Reply::json(&0).unwrap()).map_err(|_| tidegate::Failure::reject("gone", "")) }
    });
    broker.subscribe(tidegate::Subscription::new("s", "public.orders.*".parse().unwrap()), handler).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async { drop(stopped.await) }));
    for text in
        ["INSERT INTO orders VALUES (1, 5)", "BEGIN; UPDATE orders SET total = 6; ROLLBACK", "DELETE FROM orders"]
    {
        scene.run(text).await;
    }
    let mut tx = scene.pool.begin().await.unwrap();
    let payload = tidegate::Payload::json(&json!({"id": 1})).unwrap();
    let event = tidegate::Event::new(tidegate::Source::Internal, "public.orders.refund".parse().unwrap(), payload);
    tidegate::capture::outbox::publish(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    let mut seqs = Vec::new();
    let mut types = Vec::new();
    for _ in 0..3 {
        let event = tokio::time::timeout(Duration::from_secs(60), handled.recv()).await.unwrap().unwrap();
        types.push(event.event_type.to_string());
        seqs.push(event.seq.unwrap());
    }
    types.sort();
    seqs.sort_unstable();
    assert_eq!(types, ["public.orders.create", "public.orders.delete", "public.orders.refund"]);
    assert_eq!(seqs, [1, 2, 3]);
    assert_eq!(broker.stats().await.unwrap().total_published, 3);
    drop(stop);
    running.await.unwrap().unwrap();
}

/// Types of keys, with a row for each number `i`.
const KINDS: [(&str, &str); 13] = [
    ("id int PRIMARY KEY, v json", "i, (E'{\\n \"a\" : ' || i || '.50 }')::json"),
    ("id text PRIMARY KEY, v text", "'k \"' || i || E'\\\\ \\n\\t ü', CASE i WHEN 12 THEN NULL ELSE '' END"),
    ("id numeric PRIMARY KEY, v numeric", "CASE i WHEN 12 THEN 'NaN' ELSE i * 1.50 END, 'NaN'"),
    ("id float8 PRIMARY KEY", "CASE i WHEN 12 THEN '-Infinity' ELSE i / 7.0 END"),
    ("id uuid PRIMARY KEY", "lpad(i::text, 32, '0')::uuid"),
    ("id timestamptz PRIMARY KEY", "to_timestamp(1e9 + i / 3.0)"),
    ("id bytea PRIMARY KEY", "decode(lpad(i::text, 4, '0'), 'hex')"),
    ("id int[] PRIMARY KEY", "ARRAY[i, NULL]"),
    ("id jsonb PRIMARY KEY", "jsonb_build_object('b', i, 'a', 'x')"),
    ("id char(5) PRIMARY KEY", "i::text"),
    ("id positive PRIMARY KEY", "i"),
    ("a int, b text, PRIMARY KEY (b, a)", "i, 'x \"' || i"),
    ("\"Ä \"\"q\"\"\" int PRIMARY KEY, \"\\\" int GENERATED ALWAYS AS (7) STORED", "i"),
];

/// Key and payload of a row are the same, byte for byte, whether it is told alone or stands with others.
#[tokio::test]
async fn a_row_is_told_the_same_alone_and_among_many() {
    let scene = Scene::open().await;
    scene.run("CREATE DOMAIN positive AS int CHECK (value > 0)").await;
    for (at, (columns, row)) in KINDS.into_iter().enumerate() {
        let table = format!("kind_{at}");
        scene.run(&format!("CREATE TABLE {table} ({columns})")).await;
        scene.watch(&all_of(&table)).await;
        let insert =
            |from: u32, to: u32| format!("INSERT INTO {table} SELECT {row} FROM generate_series({from}, {to}) i;");
        let delete = format!("DELETE FROM {table};");
        scene.run(&(insert(1, 20) + &delete)).await;
        assert_eq!(scene.inbox().await.iter().filter(|row| row.rows == Some(12)).count(), 2, "{columns}");
        let many = scene.events().await;
        let singly: Vec<String> = (1..=20).map(|i| insert(i, i) + &delete).collect();
        scene.run(&singly.concat()).await;
        assert!(scene.inbox().await.iter().all(|row| row.rows.is_none()), "{columns}");
        let alone = scene.events().await;
        assert_eq!((many.len(), many), (40, alone), "{columns}");
    }
    // A column of the key that is gone is told as null by both.
    scene
        .run("ALTER TABLE kind_0 RENAME COLUMN id TO other; INSERT INTO kind_0 SELECT i FROM generate_series(1, 9) i")
        .await;
    let told = scene.events().await;
    let renamed = |(_, key, payload): &(String, Option<String>, String)| {
        key.is_none() && payload.ends_with(",\"v\":null},\"changed\":null,\"pk\":{\"id\":null}}")
    };
    assert!(told.len() == 9 && told.iter().all(renamed), "{told:?}");
}

/// As many as go into one row of the inbox, in the order in which the statement had them, wide ones among them.
#[tokio::test]
async fn many_rows_of_a_statement_stand_together_and_in_their_order() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE many (id int PRIMARY KEY, body text)").await;
    scene.watch(&Watch { max_payload: 2_000, ..all_of("many") }).await;
    let places = "SELECT array_agg(rows ORDER BY position) FROM tidegate.inbox";
    let places = async || sqlx::query_scalar::<_, Vec<Option<i32>>>(places).fetch_one(&scene.pool).await.unwrap();
    let after_the_first = |more: &[i32]| [vec![None; 8], more.iter().copied().map(Some).collect()].concat();
    // The second is wider than half of what may be told, and told.
    let body = "CASE i WHEN 70 THEN repeat('x', 3000) WHEN 71 THEN repeat('y', 1000) ELSE 'b' END";
    scene.run(&format!("INSERT INTO many SELECT i, {body} FROM generate_series(1, 150) i")).await;
    assert_eq!(places().await, after_the_first(&[64, 64, 14]));
    let created = scene.rows().await;
    let ids: Vec<String> = created.iter().map(|row| row["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, (1..=150).map(|id| id.to_string()).collect::<Vec<_>>());
    let wide = &created[69]["payload"];
    assert_eq!(
        (&wide["after"], &wide["pk"], wide["oversize"].as_u64().unwrap() > 3_000),
        (&Value::Null, &json!({"id": 70}), true)
    );
    assert_eq!(created[70]["payload"]["after"], json!({"id": 71, "body": "y".repeat(1_000)}));
    scene.run("DELETE FROM many WHERE id <= 65").await;
    assert_eq!(places().await, after_the_first(&[57]));
    let deleted = scene.rows().await;
    assert_eq!((deleted.len(), &deleted[64]["type"]), (65, &json!("public.many.delete")));
    assert_eq!(
        deleted[64]["payload"],
        json!({"before": {"id": 65, "body": "b"}, "after": null, "changed": null, "pk": {"id": 65}})
    );
    scene.run("DELETE FROM many WHERE id <= 73").await;
    assert_eq!(places().await, after_the_first(&[]));
    assert_eq!(scene.rows().await.len(), 8);
}

/// The columns are the same, so the trigger takes the way that it was written for them.
#[tokio::test]
async fn a_key_of_another_type_is_still_told() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE a (id int PRIMARY KEY, b text)").await;
    scene.watch_all(&["a"]).await;
    scene.run("ALTER TABLE a ALTER COLUMN id TYPE text").await;
    let told = r#"["public.a.create","\"",null,{"id":"\"","b":"x"},null]"#;
    scene.check("INSERT INTO a VALUES ('\"', 'x')", &[told]).await;
    scene.run("UPDATE a SET b = 'y'").await;
    assert_eq!(scene.rows().await[0]["payload"]["pk"], json!({"id": "\""}));
}

/// In one session, whose triggers have run before with the key as it was. A column may be named like anything that the
/// trigger names itself.
#[tokio::test]
async fn a_key_that_is_renamed_or_dropped_breaks_no_write() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE a (tg_op int, tidegate_meta text, b int, PRIMARY KEY (tg_op, tidegate_meta))").await;
    scene.watch_all(&["a"]).await;
    let mut session = scene.pool.acquire().await.unwrap();
    let mut told = async |text: &str| {
        let text = format!("{text}; UPDATE a SET b = 3; DELETE FROM a");
        sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *session).await.unwrap();
        let rows = scene.rows().await;
        rows.iter().map(|row| json!([row["type"], row["key"], row["payload"]["pk"]])).collect::<Vec<_>>()
    };
    let row = |operation: &str, key: &str, pk: &Value| json!([format!("public.a.{operation}"), key, pk]);
    let pk = json!({"tg_op": 1, "tidegate_meta": "m"});
    let rows = ["create", "update", "delete"].map(|operation| row(operation, "[1, \"m\"]", &pk));
    assert_eq!(told("INSERT INTO a VALUES (1, 'm', 2)").await, rows);
    let rows = [
        (
            "ALTER TABLE a RENAME tg_op TO x; INSERT INTO a VALUES (1, 'm', 2)",
            "[null, \"m\"]",
            json!({"tg_op": null, "tidegate_meta": "m"}),
        ),
        (
            "ALTER TABLE a DROP tidegate_meta; INSERT INTO a VALUES (1, 2)",
            "[null, null]",
            json!({"tg_op": null, "tidegate_meta": null}),
        ),
    ];
    for (text, key, pk) in rows {
        // Nothing names the row any more, so the update has no pair.
        let mut found = told(text).await;
        found.sort_by_key(Value::to_string);
        let expected = ["create", "create", "delete", "delete"].map(|operation| row(operation, key, &pk));
        assert_eq!(found, expected, "{text}");
    }
}

/// The application's role has no rights on the inbox, and cannot use the function for anything else.
#[tokio::test]
async fn who_writes_the_table_needs_no_right_on_the_inbox() {
    let scene = Scene::open().await;
    let role = format!("app_{}", scene.name);
    scene
        .run(&format!(
            "CREATE ROLE {role}; CREATE TABLE users (id int PRIMARY KEY, name text); GRANT ALL ON users TO {role}; \
             GRANT CREATE ON SCHEMA public TO {role}"
        ))
        .await;
    scene.watch_all(&["users"]).await;
    scene.run(&format!("SET ROLE {role}; INSERT INTO users VALUES (1, 'a'); UPDATE users SET name = 'b'")).await;
    assert_eq!(scene.told().await.len(), 2);
    let refused = scene.try_run(&format!("SET ROLE {role}; SELECT * FROM tidegate.inbox")).await.unwrap_err();
    assert!(refused.to_string().contains("permission denied"), "{refused}");
    // A search path of the application's own does not lead the function astray.
    scene
        .run(&format!(
            "SET ROLE {role}; CREATE TABLE inbox (position int); CREATE FUNCTION to_json(int) RETURNS json LANGUAGE sql AS 'SELECT null::json'; \
             SET search_path = public, pg_catalog; INSERT INTO users VALUES (2, 'c')"
        ))
        .await;
    assert_eq!(scene.told().await.len(), 1);
    let function: String = sqlx::query_scalar("SELECT proname::text FROM pg_proc WHERE proname LIKE 'capture_%'")
        .fetch_one(&scene.pool)
        .await
        .unwrap();
    let theft = format!(
        "SET ROLE {role}; CREATE TABLE bait (id int PRIMARY KEY, name text); CREATE TRIGGER t AFTER INSERT ON bait \
         REFERENCING NEW TABLE AS tidegate_new FOR EACH STATEMENT EXECUTE FUNCTION tidegate.{function}()"
    );
    assert!(scene.try_run(&theft).await.unwrap_err().to_string().contains("permission denied"));
    scene.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn status_names_what_is_no_longer_as_it_was_asked_for() {
    let scene = Scene::open().await;
    let run = async |text: &str| scene.run(text).await;
    run("CREATE TABLE a (id int PRIMARY KEY, name text, password text); \
         CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (10)")
    .await;
    let watch = Watch { exclude: vec!["password".into()], ..all_of("a") };
    scene.watch(&watch).await;
    scene.watch_all(&["p"]).await;
    assert_eq!(scene.drift().await, [""; 0]);
    let rows = [
        ("ALTER TABLE a DISABLE TRIGGER tidegate_update", "tidegate_update on public.a is disabled"),
        ("DROP TRIGGER tidegate_create ON a", "tidegate_create is missing"),
        ("ALTER TABLE a ADD COLUMN more int", "new: more"),
        ("ALTER TABLE a RENAME COLUMN password TO secret", "password, which is to appear nowhere, is gone"),
        ("CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)", "tidegate_create is missing on public.p2"),
        ("ALTER TABLE p RENAME TO q", "is called public.q now"),
        ("DROP TABLE a", "the table is gone"),
    ];
    for (text, words) in rows {
        run(text).await;
        let drift = scene.drift().await.join("\n");
        assert!(drift.contains(words), "{text}: {words} in {drift}");
        if text.contains("RENAME COLUMN") {
            // What was to appear nowhere still appears nowhere.
            run("ALTER TABLE a ENABLE TRIGGER ALL; INSERT INTO a VALUES (1, 'n', 'SECRET'); UPDATE a SET secret = 'SECRET2'").await;
            let told = serde_json::to_string(&scene.rows().await).unwrap();
            assert!(!told.contains("SECRET") && told.contains("\"pk\":{\"id\":1}"), "{told}");
        }
    }
    // By its new name, or by the one that it was captured by.
    scene.capture.remove(&"q".parse().unwrap()).await.unwrap();
    scene.capture.remove(&"public.a".parse().unwrap()).await.unwrap();
    assert!(scene.capture.remove(&"a".parse().unwrap()).await.unwrap_err().to_string().contains("not found"));
}

#[tokio::test]
async fn installing_again_mends_and_changes_and_removing_leaves_nothing() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE a (id int PRIMARY KEY, b text); CREATE TABLE c (x int)").await;
    let before = objects(&scene).await;
    scene.watch_all(&["a", "c"]).await;
    scene.watch_all(&["a"]).await;
    scene.run("ALTER TABLE a ADD COLUMN d int; DROP TRIGGER tidegate_delete ON a").await;
    assert!(!scene.drift().await.is_empty());
    let watch = Watch { operations: vec![Operation::Create], ..all_of("a") };
    let status = scene.capture.install(&watch).await.unwrap();
    assert_eq!(
        (status.table.as_str(), status.event_type.as_str(), status.key),
        ("public.a", "public.a", vec!["id".to_owned()])
    );
    assert_eq!(scene.drift().await, [""; 0]);
    scene
        .check(
            "INSERT INTO a VALUES (1); DELETE FROM a; TRUNCATE a",
            &[r#"["public.a.create","1",null,{"id":1,"b":null,"d":null},null]"#],
        )
        .await;
    scene.run("CREATE OR REPLACE FUNCTION pg_temp.x() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    let function: String =
        sqlx::query_scalar("SELECT tgfoid::regproc::text FROM pg_trigger WHERE tgrelid = 'a'::regclass")
            .fetch_one(&scene.pool)
            .await
            .unwrap();
    scene
        .run(&format!(
            "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        ))
        .await;
    assert!(scene.drift().await.join("").contains("not as this version makes it"));
    for table in ["public.a", "c"] {
        scene.capture.remove(&table.parse().unwrap()).await.unwrap();
    }
    scene.run("ALTER TABLE a DROP COLUMN d").await;
    assert_eq!(objects(&scene).await, before);
    assert!(scene.capture.status().await.unwrap().is_empty());
}

/// Every trigger, function and table there is.
async fn objects(scene: &Scene) -> Vec<String> {
    let text = "SELECT 't ' || tgname || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal UNION ALL \
        SELECT 'f ' || oid::regprocedure FROM pg_proc WHERE pronamespace::regnamespace::text IN ('tidegate', 'public') UNION ALL \
        SELECT 'r ' || oid::regclass FROM pg_class WHERE relnamespace::regnamespace::text IN ('tidegate', 'public') ORDER BY 1";
    sqlx::query_scalar(text).fetch_all(&scene.pool).await.unwrap()
}

#[tokio::test]
async fn what_cannot_be_captured_is_refused_with_what_to_do() {
    let scene = Scene::open().await;
    let role = format!("weak_{}", scene.name);
    scene
        .run(&format!(
            "CREATE TABLE a (id int PRIMARY KEY); CREATE VIEW v AS SELECT * FROM a; CREATE SEQUENCE s; CREATE EXTENSION file_fdw; \
             CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; CREATE FOREIGN TABLE f (x text) SERVER files OPTIONS (filename '/dev/null'); \
             CREATE TABLE p (id int) PARTITION BY RANGE (id); CREATE TABLE p1 PARTITION OF p DEFAULT; \
             CREATE TABLE \"Caps\" (id int); CREATE ROLE {role} LOGIN; GRANT USAGE, CREATE ON SCHEMA tidegate TO {role}"
        ))
        .await;
    let exclude = |columns: &[&str]| Watch { exclude: columns.iter().map(|&c| c.to_owned()).collect(), ..all_of("a") };
    let rows = [
        (all_of("nowhere.at_all"), "table not found: nowhere.at_all"),
        (all_of("Caps"), "table not found: caps"),
        (all_of("v"), "is a view"),
        (all_of("s"), "is not a table"),
        (all_of("f"), "is a foreign table"),
        (all_of("p1"), "is a partition: capture the partitioned table"),
        (all_of("tidegate.inbox"), "tidegate's own"),
        (exclude(&["nope"]), "column not found: a.nope"),
        (exclude(&["id"]), "primary key"),
        (Watch { operations: Vec::new(), ..all_of("a") }, "at least one of"),
        (Watch { max_payload: 10, ..all_of("a") }, "at least 1024 bytes"),
    ];
    for (watch, words) in rows {
        let text = scene.capture.install(&watch).await.unwrap_err().to_string();
        assert!(text.contains(words), "{words}: {text}");
    }
    let url = Postgres::shared().url(&scene.name).replace("postgres@", &format!("{role}@"));
    let text = Capture::connect(&url).await.unwrap().install(&all_of("public.a")).await.unwrap_err().to_string();
    assert!(text.contains("permission denied") && text.contains("TRIGGER"), "{text}");
    let text =
        Capture::postgres(scene.pool.clone()).schema("other").install(&all_of("a")).await.unwrap_err().to_string();
    assert!(text.contains("holds no inbox"), "{text}");
    // Of a version whose inbox cannot take what the triggers leave: they would break the application's writes.
    scene.run("ALTER TABLE tidegate.inbox RENAME COLUMN rows TO later").await;
    let text = scene.capture.install(&all_of("a")).await.unwrap_err().to_string();
    assert!(text.contains("older than this tidegate") && text.contains("tidegate migrate"), "{text}");
    scene.run("ALTER TABLE tidegate.inbox RENAME COLUMN later TO rows").await;
    let mut holder = PgConnection::connect(&Postgres::shared().url(&scene.name)).await.unwrap();
    sqlx::raw_sql("BEGIN; LOCK TABLE a").execute(&mut holder).await.unwrap();
    let text = scene.capture.install(&all_of("a")).await.unwrap_err().to_string();
    assert!(text.contains("more than 5 s"), "{text}");
    drop(holder);
    assert!(scene.capture.status().await.unwrap().is_empty());
    scene.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}
