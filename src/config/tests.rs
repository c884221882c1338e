//! What the configuration promises.

use super::*;

fn load(extension: &str, text: &str, environment: &[(&str, &str)]) -> Result<Config> {
    let mut file = tempfile::Builder::new().suffix(extension).tempfile().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(&Sources { file: Some(file.path().into()), environment: environment.collect(), flags: Vec::new() })
}

fn refused(extension: &str, text: &str, environment: &[(&str, &str)]) -> String {
    load(extension, text, environment).expect_err(text).to_string()
}

/// The YAML of the original broker's README.
const ORIGINAL: &str = r#"
event_broker:
  enabled: true
  provider: memory  # memory, redis, nats, database
  mode: sync
  worker_count: 7
  buffer_size: 500
  instance_id: "${HOSTNAME}"
  redis:
    stream_name: "resolvespec:events"
    consumer_group: "resolvespec-workers"
    max_len: 10000
    host: "localhost"
    port: 6379
    password: ""
    db: 0
  nats:
    url: "nats://localhost:4222"
    stream_name: "RESOLVESPEC_EVENTS"
    subjects:
      - "events.>"
    storage: "file"
    max_age: 24h
  database:
    table_name: "events"
    channel: "resolvespec_events"
    poll_interval: 1s
  retry_policy:
    max_retries: 5
    initial_delay: 250ms
    max_delay: 1m30s
    backoff_factor: 3.0
"#;

/// BEHAVIOURS F8.
#[test]
fn the_original_brokers_yaml_loads_unchanged() {
    let config = load(".yaml", ORIGINAL, &[("HOSTNAME", "node-7")]).unwrap();
    assert!(config.enabled);
    assert_eq!((config.provider.as_str(), config.broker.mode), ("memory:", broker::Mode::Sync));
    assert_eq!((config.broker.worker_count.get(), config.broker.buffer_size.get()), (7, 500));
    assert_eq!(config.broker.instance_id, "node-7");
    let retry = &config.broker.retry;
    assert_eq!((retry.max_retries, retry.initial_delay.as_millis(), retry.max_delay.as_secs()), (5, 250, 90));
}

/// BEHAVIOURS F8.
#[test]
fn the_original_brokers_defaults_are_kept() {
    let config = load(".yml", "event_broker: {}\n", &[]).unwrap();
    assert!(!config.enabled);
    assert_eq!((config.provider.as_str(), config.broker.worker_count.get()), ("memory:", 10));
    assert!(load(".yaml", "event_broker:\n", &[]).is_ok());
}

/// BEHAVIOURS F8, E9.
#[test]
fn the_original_brokers_redis_is_ours() {
    let redis =
        ORIGINAL.replace("provider: memory", "provider: redis").replace("password: \"\"", "password: \"p@ss/1\"");
    let config = load(".yaml", &redis, &[]).unwrap();
    assert_eq!(config.provider, "redis://localhost:6379/0");
    assert_eq!((config.redis.namespace.as_str(), config.redis.max_len), ("resolvespec:events", Some(10_000)));
    assert_eq!((config.redis.password.as_deref(), &config.redis.url), (Some("p@ss/1"), &config.provider));
    assert!(!config.to_toml().unwrap().contains("p@ss"));
    let short = load(".yaml", "event_broker: {provider: redis}\n", &[]).unwrap();
    assert_eq!((short.provider.as_str(), short.redis.max_len), ("redis://localhost:6379/0", None));
    let own =
        load(".toml", "provider = \"rediss://:hunter2@db:1/2?namespace=x\"\n[redis]\ndurability = \"storage\"", &[])
            .unwrap();
    assert!(!own.to_toml().unwrap().contains("hunter2"), "{}", own.to_toml().unwrap());
    assert_eq!(own.redis.durability, Some(crate::provider::Durability::Storage));
}

/// BEHAVIOURS F8, E10.
#[test]
fn the_original_brokers_nats_is_ours() {
    let config = load(".yaml", &ORIGINAL.replace("provider: memory", "provider: nats"), &[]).unwrap();
    assert_eq!((config.provider.as_str(), &config.nats.url), ("nats://localhost:4222", &config.provider));
    assert_eq!((config.nats.namespace.as_str(), config.nats.storage), ("RESOLVESPEC_EVENTS", nats::Storage::File));
    assert_eq!((config.nats.subjects.len(), config.nats.max_age.map(|age| age.as_secs())), (1, Some(86_400)));
    let short = load(".yaml", "event_broker: {provider: nats, nats: {storage: memory}}\n", &[]).unwrap();
    assert_eq!((short.provider.as_str(), short.nats.storage), ("nats://localhost:4222", nats::Storage::Memory));
    let own = "provider = \"tls://app:hunter2@db:1?namespace=x\"\n[nats]\ntoken = \"hunter2\"\nmax_bytes = \"1 GB\"";
    let own = load(".toml", own, &[]).unwrap();
    assert!(!own.to_toml().unwrap().contains("hunter2"), "{}", own.to_toml().unwrap());
    assert_eq!(own.nats.max_bytes.map(|bytes| bytes.as_u64()), Some(1_000_000_000));
    assert!(refused(".yaml", "event_broker: {provider: nats, nats: {storage: tape}}", &[]).contains("storage"));
}

/// BEHAVIOURS F8.
#[test]
fn a_provider_that_is_not_served_is_named() {
    let with = |name: &str| refused(".yaml", &ORIGINAL.replace("provider: memory", &format!("provider: {name}")), &[]);
    assert!(with("kafka").contains("unknown provider: kafka"));
    for (url, words) in [
        ("amqp://app:hunter2@db/x", "unknown provider: amqp; this version serves memory:, sqlite://PATH"),
        ("nats:", "names no server"),
        ("tls:localhost", "must be tls://HOST"),
        ("postgres:app", "must be postgres://USER"),
        ("postgresql://", "names no server"),
        ("kafka://x", "unknown provider: kafka"),
        ("sqlite:", "names no file"),
        ("sqlite:x.db", "must be sqlite://PATH"),
        ("memory:x", "nothing behind it"),
        ("redis:", "names no server"),
        ("redis:localhost", "must be redis://HOST"),
        ("", "unknown provider: "),
    ] {
        let error = refused(".toml", &format!("provider = \"{url}\""), &[]);
        assert!(error.contains(words) && !error.contains("hunter2"), "{error}");
    }
}

/// BEHAVIOURS F8: the original's settings of its database load; only the address, which it had in code, is new.
#[test]
fn the_original_brokers_database_is_a_postgresql_once_it_has_an_address() {
    let text = ORIGINAL.replace("provider: memory", "provider: database");
    let refusal = refused(".yaml", &text, &[]);
    assert!(refusal.contains("TIDEGATE_PROVIDER") && refusal.contains("postgres://"), "{refusal}");
    let config = load(".yaml", &text, &[("TIDEGATE_PROVIDER", "postgres://app:hunter2@db/x")]).unwrap();
    assert_eq!(ProviderUrl::parse(&config.provider).unwrap(), ProviderUrl::Postgres);
    assert_eq!(config.postgres.url, "postgres://app:hunter2@db/x");
    assert_eq!(config.postgres.poll_interval.as_secs(), 1);
    assert_eq!(config.provider_shown(), "postgres://app:***@db/x");
    assert!(!config.to_toml().unwrap().contains("hunter2"));
}

#[test]
fn the_environment_wins_over_the_file_and_flags_over_both() {
    let environment = [
        ("TIDEGATE_PROVIDER", "memory:"),
        ("TIDEGATE_BROKER__WORKER_COUNT", "4"),
        ("TIDEGATE_BROKER__RETRY__INITIAL_DELAY", "50ms"),
        ("TIDEGATE_INSTANCE_ID", "42"),
        ("TIDEGATE_URL", "http://elsewhere:1"),
        ("TIDEGATE_TOKEN", "not a setting"),
        ("TIDEGATE_PORT_7700_TCP", "tcp://10.0.0.1:7700"),
        ("TIDEGATE_SERVICE_HOST", "10.0.0.1"),
        ("PATH", "/bin"),
    ];
    let config = load(".toml", "provider = \"sqlite://x.db\"\n[broker]\nworker_count = 2\n", &environment).unwrap();
    assert_eq!((config.provider.as_str(), config.broker.worker_count.get()), ("memory:", 4));
    assert_eq!((config.broker.retry.initial_delay.as_millis(), config.broker.instance_id.as_str()), (50, "42"));
    let flags = vec![Setting::new("provider", "sqlite://flag.db", "--provider")];
    let environment = vec![("TIDEGATE_PROVIDER".to_owned(), "memory:".to_owned())];
    let config = Config::load(&Sources { file: None, environment, flags }).unwrap();
    assert_eq!(config.provider, "sqlite://flag.db");
}

#[test]
fn a_bad_setting_is_refused_with_its_key_and_a_suggestion() {
    let rows: [(&str, &str, &[&str]); 23] = [
        (".toml", "providr = \"memory:\"", &["providr", "did you mean provider?"]),
        (".toml", "[broker]\nworker_cuont = 1", &["broker.worker_cuont", "did you mean worker_count?"]),
        (".toml", "[brokr]\nworker_count = 1", &["brokr", "did you mean broker?"]),
        (".toml", "[broker]\nworker_count = 0", &["broker.worker_count", "nonzero"]),
        (".toml", "[broker]\nworker_count = \"many\"", &["broker.worker_count", "many"]),
        (".toml", "[broker]\nlease = \"soon\"", &["broker.lease", "soon"]),
        (".toml", "[broker.retry]\nbackoff_factor = 0.5", &["broker.retry.backoff_factor", "at least 1"]),
        (".toml", "[broker.retry]\nmax_delay = \"1ms\"", &["broker.retry.max_delay", "shorter"]),
        (".toml", "listen = \"localhost\"", &["listen", "localhost"]),
        (".toml", "listen = \"0.0.0.0:7700\"", &["listen", "needs tokens"]),
        (".toml", "[limits]\nmax_payload = \"lots\"", &["limits.max_payload", "lots"]),
        (".toml", "[host.limits]\nkv_bytes = \"0 B\"", &["host.limits.kv_bytes", "leaves nothing"]),
        (".toml", "[host.limits]\nhost_calls = 0", &["host.limits.host_calls", "leaves nothing"]),
        (".toml", "[plugins.a.limits]\ntimeout = \"0s\"", &["plugins.a.limits.timeout", "leaves nothing"]),
        (".toml", "[plugins.a.limits]\nhost_calls = 0", &["plugins.a.limits", "leaves nothing"]),
        (".toml", "[postgres]\nschema = \"a-b\"", &["postgres.schema", "letters, digits"]),
        (".toml", "[postgres]\nmax_connections = 1", &["postgres.max_connections", "at least 2"]),
        (".toml", "[postgres]\nstatement_timeout = \"0s\"", &["postgres.statement_timeout", "1ms"]),
        (".toml", "[limits]\nmax_payload = \"1 GiB\"", &["http.max_body", "twice limits.max_payload"]),
        (".toml", "listen = ", &["config", "is not TOML"]),
        (".yaml", "listen: [", &["config", "is not YAML"]),
        (".yaml", "event_broker:\n  worker_cuont: 1", &["event_broker.worker_cuont", "did you mean worker_count?"]),
        (".yaml", "event_broker: {}\nserver: {}", &["server", "beside event_broker"]),
    ];
    for (extension, text, words) in rows {
        let error = refused(extension, text, &[]);
        for word in words {
            assert!(error.contains(word), "{text}: {word} in {error}");
        }
    }
    assert!(refused(".json", "{}", &[]).contains(".toml, .yaml or .yml"));
    let error = refused(".toml", "", &[("TIDEGATE_BROKER__WORKER_CUONT", "1")]);
    assert!(error.contains("set by TIDEGATE_BROKER__WORKER_CUONT") && error.contains("worker_count?"), "{error}");
    assert!(refused(".toml", "", &[("TIDEGATE_LISTEN__PORT", "1")]).contains("listen"));
    assert!(refused(".toml", "", &[("TIDEGATE___X", "1")]).contains("names no setting"));
}

#[test]
fn what_is_shown_loads_again() {
    let config =
        load(".toml", "provider = \"memory:\"\ninstance_id = \"a\"\n[limits]\nmetric_types = 3\n", &[]).unwrap();
    let shown = config.to_toml().unwrap();
    assert_eq!(load(".toml", &shown, &[]).unwrap(), config, "{shown}");
}

#[test]
fn an_empty_file_means_the_defaults() {
    let config = load(".toml", "", &[]).unwrap();
    assert_eq!(
        (config.listen.to_string().as_str(), config.provider.as_str()),
        ("127.0.0.1:7700", "sqlite://tidegate.db")
    );
    assert_eq!(config.limits.max_payload.as_u64(), 1 << 20);
    assert_eq!(load(".yaml", "", &[]).unwrap(), config);
}

/// The XDG base directory specification: a path that is not absolute counts as none.
#[test]
fn compiled_code_is_kept_in_the_users_own_cache_folder() {
    let rows: [(&[(&str, &str)], &str); 6] = [
        (&[("XDG_CACHE_HOME", "/var/cache/me"), ("HOME", "/home/me")], "/var/cache/me/tidegate"),
        (&[("HOME", "/home/me")], "/home/me/.cache/tidegate"),
        (&[("XDG_CACHE_HOME", ""), ("HOME", "/home/me")], "/home/me/.cache/tidegate"),
        (&[("XDG_CACHE_HOME", "cache"), ("HOME", "/home/me")], "/home/me/.cache/tidegate"),
        (&[("HOME", "")], "none"),
        (&[], "none"),
    ];
    for (environment, expected) in rows {
        let folder = load(".toml", "", environment).unwrap().host.user_cache;
        assert_eq!(folder.map_or("none".into(), |folder| folder.display().to_string()), expected, "{environment:?}");
    }
    let config = load(".toml", "", &[("TIDEGATE_HOST__CACHE", "off")]).unwrap();
    assert_eq!(config.host.cache, host::CodeCache::Off);
    let words = refused(".toml", "[host]\ncache = \"\"", &[]);
    assert!(words.contains("host.cache") && words.contains("\"off\""), "{words}");
}
