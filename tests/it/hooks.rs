//! Hooks around an application's operations, and the example that uses them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::broker::{Broker, EventFilter, Options};
use tidegate::capture::CrudHooks;
use tidegate::capture::hooks::{Actor, HookOptions, Operation};
use tidegate::event::UserId;
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::provider::{EventFilter as Filter, Provider};
use tidegate::{Call, Event, Failure, Metrics, Reply, Source, Subscription, native};
use tokio::sync::oneshot;

use crate::support::{server, wire};

#[path = "../../examples/signup/app.rs"]
mod app;

/// A running broker on memory.
struct Scene {
    broker: Broker,
    _stop: oneshot::Sender<()>,
}

impl Scene {
    async fn open() -> Self {
        let provider = Arc::new(MemoryProvider::open(memory::Options::default()).unwrap());
        let options = Options { instance_id: "app".into(), ..Options::default() };
        let (broker, service) = Broker::open(provider, options, Metrics::default()).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(service.run(async { drop(stopped.await) }));
        Self { broker, _stop: stop }
    }

    fn hooks(&self, options: HookOptions) -> CrudHooks {
        CrudHooks::new(self.broker.clone(), "public", "users", options).unwrap()
    }

    async fn subscribe<F, R>(&self, name: &str, pattern: &str, handler: F)
    where
        F: Fn(Call) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Reply, Failure>> + Send + 'static,
    {
        self.broker.subscribe(Subscription::new(name, pattern.parse().unwrap()), native(handler)).await.unwrap();
    }

    /// Oldest first.
    async fn events(&self) -> Vec<Arc<Event>> {
        let records = self.broker.events(&EventFilter::default()).await.unwrap().records;
        records.into_iter().rev().map(|record| record.event).collect()
    }
}

fn everything() -> [Operation; 4] {
    let user = json!({"id": 7, "name": "Ada"});
    [Operation::create(&user), Operation::read(&user), Operation::update(&7, &user), Operation::delete(&7)]
}

/// BEHAVIOURS F1–F4.
#[tokio::test]
async fn every_operation_but_reading_is_told_as_it_is() {
    let scene = Scene::open().await;
    let hooks = scene.hooks(HookOptions::default());
    let actor = Actor {
        user_id: Some(UserId::Number(5)),
        user_name: Some("Grace".into()),
        user_email: Some("grace@example.org".into()),
        user_roles: vec!["admin".into()],
        session_id: Some("s-1".into()),
        trace_parent: Some("t-1".into()),
    };
    for operation in everything() {
        hooks.after(&operation, &actor).await;
    }
    hooks.after(&Operation::create(&json!({"name": "nobody's"})), &Actor::default()).await;
    let events = scene.events().await;
    let told: Vec<(&str, Value)> =
        events.iter().map(|event| (event.event_type.as_str(), event.payload.parse().unwrap())).collect();
    assert_eq!(
        told,
        [
            ("public.users.create", json!({"id": 7, "name": "Ada"})),
            ("public.users.update", json!({"id": 7, "data": {"id": 7, "name": "Ada"}})),
            ("public.users.delete", json!({"id": 7})),
            ("public.users.create", json!({"name": "nobody's"})),
        ]
    );
    let first = &events[0];
    assert_eq!((first.source, &*first.instance_id, first.key.as_deref()), (Source::Database, "app", Some("7")));
    let parts = [&first.schema, &first.entity, &first.operation].map(|part| part.as_deref().unwrap());
    assert_eq!(parts, ["public", "users", "create"]);
    assert_eq!((&first.user_id, first.session_id.as_deref()), (&Some(UserId::Number(5)), Some("s-1")));
    let metadata = json!({"table_name": "users", "user_name": "Grace", "user_email": "grace@example.org", "user_roles": ["admin"]});
    assert_eq!((json!(first.metadata), first.trace_parent.as_deref()), (metadata, Some("t-1")));
    let last = &events[3];
    assert_eq!((&last.user_id, json!(last.metadata)), (&Some(UserId::Number(0)), json!({"table_name": "users"})));
}

/// BEHAVIOURS F1.
#[tokio::test]
async fn every_operation_has_its_switch() {
    let scene = Scene::open().await;
    let off = HookOptions { create: false, read: false, update: false, delete: false, ..HookOptions::default() };
    let options = [
        HookOptions { create: true, ..off.clone() },
        HookOptions { read: true, ..off.clone() },
        HookOptions { update: true, ..off.clone() },
        HookOptions { delete: true, ..off.clone() },
        off,
    ];
    for options in options {
        let hooks = scene.hooks(options);
        for operation in everything() {
            hooks.before(&operation, &Actor::default()).await.unwrap();
            hooks.after(&operation, &Actor::default()).await;
        }
    }
    let types: Vec<String> = scene.events().await.iter().map(|event| event.event_type.to_string()).collect();
    let both = |name: &str| [format!("public.users.before-{name}"), format!("public.users.{name}")];
    assert_eq!(types, ["create", "read", "update", "delete"].map(both).concat());
}

/// BEHAVIOURS F3.
#[tokio::test]
async fn what_has_no_json_form_is_told_as_that() {
    let scene = Scene::open().await;
    let broken = std::collections::BTreeMap::from([((1, 2), 3)]);
    scene.hooks(HookOptions::default()).after(&Operation::create(&broken), &Actor::default()).await;
    assert_eq!(scene.events().await[0].payload.bytes(), r#"{"error":"failed to serialize payload"}"#);
}

/// BEHAVIOURS F5.
#[tokio::test]
async fn an_event_that_cannot_be_published_fails_no_operation() {
    let scene = Scene::open().await;
    let hooks = scene.hooks(HookOptions::default());
    let huge = Operation::create(&"x".repeat(2 << 20));
    assert_eq!(hooks.before(&huge, &Actor::default()).await, Ok(()));
    assert_eq!(hooks.after(&huge, &Actor::default()).await, None);
    let hostile = Actor { session_id: Some("a\u{0}b".into()), ..Actor::default() };
    assert_eq!(hooks.clone().after(&Operation::delete(&1), &hostile).await, None);
    assert_eq!((hooks.failures(), scene.events().await.len()), (3, 0));
    assert!(CrudHooks::new(scene.broker.clone(), "public", "no entity", HookOptions::default()).is_err());
}

#[tokio::test]
async fn whoever_rejects_a_before_hook_vetoes_the_operation_with_reasons() {
    let scene = Scene::open().await;
    let hooks = scene.hooks(HookOptions::default());
    let create = |name: &str| Operation::create(&json!({"name": name}));
    assert_eq!(hooks.before(&create("nobody listens"), &Actor::default()).await, Ok(()));
    scene
        .subscribe("names", "public.users.before-*", |call| async move {
            let user: Value = call.event.payload.parse()?;
            match user["name"].as_str() {
                Some("root") => Err(Failure::reject("name-reserved", "root is taken")),
                Some("odd") => Ok(Reply::json(&json!({"accepted": false, "reasons": ["odd-name"]}))?),
                Some("mute") => Ok(Reply::json(&json!({"accepted": false}))?),
                _ => Ok(Reply::json(&json!({"accepted": true, "reasons": []}))?),
            }
        })
        .await;
    scene
        .subscribe("ages", "public.users.before-create", |call| async move {
            let user: Value = call.event.payload.parse()?;
            if user["name"] == "root" { Err(Failure::reject("too-young", "")) } else { Ok(Reply::json(&"fine")?) }
        })
        .await;
    let veto = hooks.before(&create("root"), &Actor::default()).await.unwrap_err();
    assert_eq!(veto.to_string(), "vetoed: too-young; name-reserved: root is taken");
    assert_eq!(
        json!(veto),
        json!({"reasons": [
            {"subscription": "ages", "code": "too-young", "message": ""},
            {"subscription": "names", "code": "name-reserved", "message": "root is taken"},
        ]})
    );
    let codes = async |name: &str| -> Vec<String> {
        let veto = hooks.before(&create(name), &Actor::default()).await.err();
        veto.into_iter().flat_map(|veto| veto.reasons).map(|reason| reason.code).collect()
    };
    assert_eq!(codes("odd").await, ["odd-name"]);
    assert_eq!(codes("mute").await, ["refused"]);
    assert_eq!(codes("Ada").await, [""; 0]);
    assert_eq!(hooks.failures(), 0);
}

/// A handler that is broken or slow objects to nothing.
#[tokio::test]
async fn who_fails_otherwise_or_is_too_slow_vetoes_nothing() {
    let scene = Scene::open().await;
    let hooks = scene.hooks(HookOptions { patience: Duration::from_millis(50), ..HookOptions::default() });
    scene.subscribe("flaky", "public.users.before-create", |_| async { Err(Failure::retry("later", "")) }).await;
    scene.subscribe("slow", "public.users.before-delete", |_| std::future::pending()).await;
    assert_eq!(hooks.before(&Operation::create(&1), &Actor::default()).await, Ok(()));
    assert_eq!(hooks.before(&Operation::delete(&1), &Actor::default()).await, Ok(()));
}

/// The example, with the plugin: a veto keeps the row from being stored, and what is stored is told.
#[tokio::test]
async fn a_plugin_vetoes_an_insert_of_the_example() {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    std::fs::create_dir(&plugins).unwrap();
    std::fs::copy(server::built_plugins().join("signup-guard.wasm"), plugins.join("signup-guard.wasm")).unwrap();
    let file = folder.path().join("signup.db");
    let app = app::App::open(&file, Some(&plugins)).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = axum::serve(listener, app.router()).with_graceful_shutdown(async { drop(stopped.await) });
    let serving = tokio::spawn(serving.into_future());

    let json_type = [("content-type", "application/json"), ("x-user-id", "42")];
    let send = |method: &'static str, path: &'static str, body: &'static str| {
        let url = url.clone();
        async move { wire::send(&url, method, path, &json_type, body).await }
    };
    let stored = send("POST", "/users", r#"{"name":"Ada","email":"ada@example.org"}"#).await;
    assert_eq!((stored.status, stored.json()["id"].as_i64()), (201, Some(1)), "{stored:?}");
    let vetoed = send("POST", "/users", r#"{"name":" ","email":"eve@mailinator.com"}"#).await;
    let codes: Vec<Value> =
        vetoed.json()["reasons"].as_array().unwrap().iter().map(|reason| reason["code"].clone()).collect();
    assert_eq!((vetoed.status, json!(codes)), (422, json!(["name-missing", "email-disposable"])), "{vetoed:?}");
    assert_eq!(send("GET", "/users/2", "").await.status, 404);
    assert_eq!(send("PUT", "/users/1", r#"{"name":"Ada L","email":"ada@example.org"}"#).await.status, 200);
    assert_eq!(send("GET", "/users/1", "").await.json()["name"], "Ada L");
    assert_eq!(send("DELETE", "/users/1", "").await.status, 204);
    drop(stop);
    serving.await.unwrap().unwrap();
    app.close().await.unwrap();

    let options = sqlite::Options { url: format!("sqlite://{}", file.display()), ..sqlite::Options::default() };
    let provider = SqliteProvider::open(options).await.unwrap();
    let records = provider.list(&Filter::default()).await.unwrap().records;
    let types: Vec<&str> = records.iter().rev().map(|record| record.event.event_type.as_str()).collect();
    let [asked, made] = ["shop.users.before-create", "shop.users.create"];
    let rest = ["shop.users.before-update", "shop.users.update", "shop.users.before-delete", "shop.users.delete"];
    assert_eq!(types, [&[asked, made, asked][..], &rest[..]].concat());
    assert!(records.iter().all(|record| record.event.user_id == Some(UserId::Number(42))));
    provider.close().await.unwrap();
}
