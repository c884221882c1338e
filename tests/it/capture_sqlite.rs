//! What SQLite's statements tell once their tables are captured, and what becomes of what was installed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use sqlx::{AssertSqlSafe, Row as _};
use tidegate::broker::{Broker, EventFilter, Options};
use tidegate::capture::triggers::{Capture, Operation, Watch};
use tidegate::provider::Provider;
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::{Call, Failure, Metrics, Reply, Subscription, native};
use tokio::sync::mpsc;

/// A file that tidegate has made, with an application's tables in it.
struct Scene {
    folder: tempfile::TempDir,
    pool: SqlitePool,
    capture: Capture,
}

fn url(folder: &Path) -> String {
    format!("sqlite://{}", folder.join("app.db").display())
}

async fn provider(folder: &Path) -> SqliteProvider {
    SqliteProvider::open(sqlite::Options { url: url(folder), ..sqlite::Options::default() }).await.unwrap()
}

impl Scene {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        provider(folder.path()).await.close().await.unwrap();
        let options = SqliteConnectOptions::new().filename(folder.path().join("app.db")).foreign_keys(true);
        let pool = SqlitePool::connect_with(options).await.unwrap();
        Self { folder, capture: Capture::sqlite(pool.clone()), pool }
    }

    async fn run(&self, text: &str) {
        let mut connection = self.pool.acquire().await.unwrap();
        let result = sqlx::raw_sql(AssertSqlSafe(text.to_owned())).execute(&mut *connection).await;
        result.unwrap_or_else(|error| panic!("{text}: {error}"));
    }

    async fn told(&self) -> Vec<Value> {
        let text = "DELETE FROM inbox RETURNING type, key, payload";
        let rows = sqlx::query(text).fetch_all(&self.pool).await.unwrap();
        rows.iter()
            .map(|row| {
                let payload: Value = serde_json::from_str(row.get(2)).unwrap();
                let (event_type, key): (String, Option<String>) = (row.get(0), row.get(1));
                json!([event_type, key, payload["before"], payload["after"], payload["changed"]])
            })
            .collect()
    }

    async fn check(&self, text: &str, expected: &[&str]) {
        self.run(text).await;
        let expected: Vec<Value> = expected.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(self.told().await, expected, "{text}");
    }

    async fn drift(&self) -> Vec<String> {
        self.capture.status().await.unwrap().into_iter().flat_map(|status| status.drift).collect()
    }
}

fn all_of(table: &str) -> Watch {
    Watch::new(table.parse().unwrap())
}

#[tokio::test]
async fn every_statement_tells_what_the_truth_table_says() {
    let scene = Scene::open().await;
    scene
        .run(
            "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT COLLATE NOCASE, n REAL, b BLOB, twice AS (n * 2)); \
             CREATE TABLE two (a TEXT, b INTEGER, PRIMARY KEY (b, a)) WITHOUT ROWID; CREATE TABLE bare (a); \
             CREATE TABLE secret (id INTEGER PRIMARY KEY, a TEXT, password TEXT); \
             CREATE TABLE \"Grö'ß\"\"e\" (\"I d\" INTEGER PRIMARY KEY); \
             CREATE TABLE posts (id INTEGER PRIMARY KEY, author INTEGER REFERENCES users ON DELETE CASCADE)",
        )
        .await;
    for table in ["Users", "two", "bare", "\"Grö'ß\"\"e\"", "main.posts"] {
        scene.capture.install(&all_of(table)).await.unwrap();
    }
    scene.capture.install(&Watch { exclude: vec!["password".into()], ..all_of("secret") }).await.unwrap();
    let rows: &[(&str, &[&str])] = &[
        (
            "INSERT INTO users (id, name, n, b) VALUES (1, 'Ada \"L\"', 1.5, x'00ff'), (2, NULL, 9e999, 7)",
            &[
                r#"["main.users.create","1",null,{"id":1,"name":"Ada \"L\"","n":1.5,"b":"\\x00ff","twice":3.0},null]"#,
                r#"["main.users.create","2",null,{"id":2,"name":null,"n":"Inf","b":7,"twice":"Inf"},null]"#,
            ],
        ),
        ("UPDATE users SET name = name", &[]),
        (
            "UPDATE users SET name = 'ada \"l\"', n = 2 WHERE id = 1",
            &[
                r#"["main.users.update","1",{"id":1,"name":"Ada \"L\"","n":1.5,"b":"\\x00ff","twice":3.0},{"id":1,"name":"ada \"l\"","n":2.0,"b":"\\x00ff","twice":4.0},["name","n","twice"]]"#,
            ],
        ),
        (
            "INSERT INTO users (id, n) VALUES (2, 1) ON CONFLICT DO UPDATE SET n = 1, b = NULL",
            &[
                r#"["main.users.update","2",{"id":2,"name":null,"n":"Inf","b":7,"twice":"Inf"},{"id":2,"name":null,"n":1.0,"b":null,"twice":2.0},["n","b","twice"]]"#,
            ],
        ),
        (
            "UPDATE users SET id = 3 WHERE id = 2",
            &[
                r#"["main.users.delete","2",{"id":2,"name":null,"n":1.0,"b":null,"twice":2.0},null,null]"#,
                r#"["main.users.create","3",null,{"id":3,"name":null,"n":1.0,"b":null,"twice":2.0},null]"#,
            ],
        ),
        ("BEGIN; DELETE FROM users; ROLLBACK", &[]),
        (
            "BEGIN; SAVEPOINT s; DELETE FROM users WHERE id = 1; ROLLBACK TO s; DELETE FROM users WHERE id = 3; COMMIT",
            &[r#"["main.users.delete","3",{"id":3,"name":null,"n":1.0,"b":null,"twice":2.0},null,null]"#],
        ),
        ("INSERT INTO posts VALUES (10, 1)", &[r#"["main.posts.create","10",null,{"id":10,"author":1},null]"#]),
        (
            "DELETE FROM users",
            &[
                r#"["main.posts.delete","10",{"id":10,"author":1},null,null]"#,
                r#"["main.users.delete","1",{"id":1,"name":"ada \"l\"","n":2.0,"b":"\\x00ff","twice":4.0},null,null]"#,
            ],
        ),
        (
            "INSERT INTO two VALUES ('x,\"y', 1)",
            &[r#"["main.two.create","[1,\"x,\\\"y\"]",null,{"a":"x,\"y","b":1},null]"#],
        ),
        ("INSERT INTO bare VALUES (1)", &[r#"["main.bare.create",null,null,{"a":1},null]"#]),
        ("UPDATE bare SET a = '1'", &[r#"["main.bare.update",null,{"a":1},{"a":"1"},["a"]]"#]),
        ("DELETE FROM bare", &[r#"["main.bare.delete",null,{"a":"1"},null,null]"#]),
        ("INSERT INTO secret VALUES (1, 'a', 'SECRET')", &[r#"["main.secret.create","1",null,{"id":1,"a":"a"},null]"#]),
        ("UPDATE secret SET password = 'SECRET2'", &[]),
        (
            "INSERT INTO \"Grö'ß\"\"e\" VALUES (5)",
            &[r#"["main.Gr-c3-b6-27-c3-9f-22e.create","5",null,{"I d":5},null]"#],
        ),
    ];
    for (text, expected) in rows {
        scene.check(text, expected).await;
    }
}

#[tokio::test]
async fn wide_rows_and_wide_tables_do_not_break_the_applications_write() {
    let scene = Scene::open().await;
    let columns: Vec<String> = (0..900).map(|n| format!("c{n} DEFAULT {n}")).collect();
    scene.run(&format!("CREATE TABLE wide (id INTEGER PRIMARY KEY, {})", columns.join(", "))).await;
    scene.capture.install(&all_of("wide")).await.unwrap();
    scene.capture.install(&Watch { max_payload: 2_000, ..all_of("wide") }).await.unwrap();
    scene.run("INSERT INTO wide (id) VALUES (1)").await;
    scene.capture.install(&all_of("wide")).await.unwrap();
    scene.run("UPDATE wide SET c7 = 8").await;
    let text = "SELECT payload FROM inbox ORDER BY position";
    let payloads: Vec<String> = sqlx::query_scalar(text).fetch_all(&scene.pool).await.unwrap();
    let payloads: Vec<Value> = payloads.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
    assert_eq!((&payloads[0]["after"], &payloads[0]["pk"]), (&Value::Null, &json!({"id": 1})));
    assert!(payloads[0]["oversize"].as_u64().unwrap() > 2_000);
    assert_eq!((&payloads[1]["changed"], &payloads[1]["after"]["c899"]), (&json!(["c7"]), &json!(899)));
}

#[tokio::test]
async fn status_names_what_has_changed_and_removing_leaves_nothing() {
    let scene = Scene::open().await;
    let objects = async || -> Vec<String> {
        sqlx::query_scalar("SELECT name FROM sqlite_schema ORDER BY 1").fetch_all(&scene.pool).await.unwrap()
    };
    scene.run("CREATE TABLE a (id INTEGER PRIMARY KEY, b); CREATE TABLE c (x); CREATE VIEW v AS SELECT * FROM a").await;
    let before = objects().await;
    for table in ["a", "c"] {
        scene.capture.install(&all_of(table)).await.unwrap();
    }
    assert_eq!(scene.drift().await, [""; 0]);
    let rows = [
        ("DROP TRIGGER tidegate_update_a", "tidegate_update_a is missing"),
        ("ALTER TABLE a ADD COLUMN d", "tidegate_create_a is not as"),
        ("DROP TABLE c", "the table is gone"),
    ];
    for (text, words) in rows {
        scene.run(text).await;
        let drift = scene.drift().await.join("\n");
        assert!(drift.contains(words), "{text}: {words} in {drift}");
    }
    let creating = Watch { operations: vec![Operation::Create], ..all_of("a") };
    scene.capture.install(&creating).await.unwrap();
    scene.capture.remove(&"C".parse().unwrap()).await.unwrap();
    assert_eq!(scene.drift().await, [""; 0]);
    scene
        .check(
            "INSERT INTO a VALUES (1, 2, 3); DELETE FROM a",
            &[r#"["main.a.create","1",null,{"id":1,"b":2,"d":3},null]"#],
        )
        .await;
    let refusals = [
        ("v", "is a view"),
        ("nowhere", "table not found: nowhere"),
        ("inbox", "not the application's"),
        ("public.a", "has none but main"),
    ];
    for (table, words) in refusals {
        let text = scene.capture.install(&all_of(table)).await.unwrap_err().to_string();
        assert!(text.contains(words), "{table}: {text}");
    }
    scene.capture.remove(&"a".parse().unwrap()).await.unwrap();
    scene.run("CREATE TABLE c (x)").await;
    assert_eq!(objects().await, before);
    let foreign = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new().filename(foreign.path().join("x.db")).create_if_missing(true);
    let pool = SqlitePool::connect_with(options).await.unwrap();
    let text = Capture::sqlite(pool).install(&all_of("a")).await.unwrap_err().to_string();
    assert!(text.contains("holds no inbox"), "{text}");
}

/// From a statement of another process to a handler of ours.
#[tokio::test]
async fn a_row_that_is_written_beside_a_running_broker_is_handled() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE orders (id INTEGER PRIMARY KEY, total INTEGER)").await;
    scene.capture.install(&all_of("orders")).await.unwrap();
    let provider = Arc::new(provider(scene.folder.path()).await);
    let options = Options { instance_id: "test".into(), poll: Duration::from_secs(600), ..Options::default() };
    let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
    let (seen, mut handled) = mpsc::unbounded_channel();
    let handler = native(move |call: Call| {
        let sent = seen.send(call.event);
        async move { sent.map(|()| Reply::json(&0).unwrap()).map_err(|_| Failure::reject("gone", "")) }
    });
    broker.subscribe(Subscription::new("s", "main.orders.*".parse().unwrap()), handler).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async { drop(stopped.await) }));
    for id in 1..=3 {
        // Nothing but the hint of the store can be what is waited for: the poll is far away.
        scene.run(&format!("INSERT INTO orders VALUES ({id}, 5)")).await;
        let event = tokio::time::timeout(Duration::from_secs(60), handled.recv()).await.unwrap().unwrap();
        assert_eq!((event.event_type.as_str(), event.key.as_deref()), ("main.orders.create", Some(&*id.to_string())));
        assert_eq!((&*event.instance_id, &event.metadata["table_name"]), ("database", &json!("orders")));
    }
    scene.run("INSERT INTO inbox (type, payload) VALUES ('a.b', '{')").await;
    let refused = EventFilter { pattern: Some("tidegate.inbox.*".parse().unwrap()), ..EventFilter::default() };
    tokio::time::timeout(Duration::from_secs(60), async {
        while broker.events(&refused).await.unwrap().records.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let stats = broker.stats().await.unwrap();
    assert_eq!((stats.total_published, &stats.provider_stats.provider_specific["inbox_waiting"]), (4, &json!(0)));
    drop(stop);
    running.await.unwrap().unwrap();
}

/// What `tidegate capture` prints and how it exits.
fn command(arguments: &[&str]) -> (i32, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("capture")
        .args(arguments)
        .env_remove("TIDEGATE_CONFIG")
        .env_remove("TIDEGATE_PROVIDER")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn the_command_line_installs_shows_and_removes() {
    let scene = Scene::open().await;
    scene.run("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, password TEXT)").await;
    let url = url(scene.folder.path());
    let here = |arguments: &[&str]| command(&[arguments, &["--database", &url]].concat());
    assert_eq!(here(&["status"]).1, "no table is captured\n");
    let install = ["install", "users", "--ops", "update,create", "--exclude", "password", "--json"];
    let (code, out, _) = here(&install);
    let installed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &installed["operations"], &installed["exclude"]),
        (0, &json!(["create", "update"]), &json!(["password"]))
    );
    let (code, out, _) = here(&["status"]);
    assert!(code == 0 && out.contains("main.users.{create,update}") && out.contains("all but password"), "{out}");
    // The configured provider is the database where none is named.
    let config = scene.folder.path().join("tidegate.toml");
    std::fs::write(&config, format!("provider = \"{url}\"\n")).unwrap();
    scene.run("DROP TRIGGER tidegate_create_users").await;
    let (code, out, _) = command(&["status", "--config", config.to_str().unwrap(), "--json"]);
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, shown["captures"][0]["drift"].as_array().unwrap().len()), (1, 1), "{out}");
    assert_eq!(here(&["remove", "users"]).1, "users is no longer captured\n");
    let rows = [
        (here(&["remove", "users"]), 3, "not found"),
        (here(&["install", "nowhere"]), 3, "table not found: nowhere"),
        (here(&["install", "users", "--ops", "delte"]), 2, "delte"),
        (here(&["install", "a.b.c"]), 2, "more than two names"),
        (command(&["status", "--database", "redis://x"]), 2, "capture needs tables"),
        (command(&["status", "--database", "sqlite:///nowhere/x.db"]), 1, "open"),
    ];
    for ((code, out, err), expected, words) in rows {
        assert!(code == expected && err.contains(words), "{words}: {code} {out} {err}");
    }
    std::fs::write(&config, "provider = \"memory:\"\n").unwrap();
    let (code, _, err) = command(&["status", "--config", config.to_str().unwrap()]);
    assert!(code == 2 && err.contains("has no tables"), "{err}");
}
