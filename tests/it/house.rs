//! The house keeps its shape: which module may know which, and what no source may hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tidegate::config::{Config, Sources};

/// Who may import whom. `*` stands for everything.
const TABLE: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("event", &["error"]),
    ("change", &["event", "error"]),
    ("pattern", &["event", "error"]),
    ("delivery", &["event", "error"]),
    ("retry", &["delivery", "event", "error"]),
    ("subscription", &["event", "error", "pattern", "retry"]),
    ("handler", &["delivery", "event", "error"]),
    ("metrics", &["delivery", "event"]),
    ("provider", &["delivery", "event", "pattern", "subscription", "error"]),
    ("host", &["delivery", "event", "handler", "subscription", "retry", "pattern", "metrics", "error"]),
    ("broker", &["delivery", "event", "handler", "subscription", "retry", "pattern", "metrics", "error", "provider"]),
    ("capture", &["delivery", "event", "provider", "broker", "error"]),
    ("feed", &["event", "pattern", "provider", "metrics", "error"]),
    ("http", &["broker", "feed", "host", "delivery", "event", "subscription", "retry", "pattern", "metrics", "error"]),
    ("config", &["broker", "host", "http", "provider", "retry", "metrics", "error"]),
    ("cli", &["*"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, &mut found);
    found
        .into_iter()
        .map(|path| (path.strip_prefix(&root).unwrap().to_owned(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

/// The first path segment, without `.rs`.
fn module_of(path: &Path) -> String {
    path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// Code without its tests and comments: imports there bind nobody.
fn production(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The modules named in `crate::module…` and `crate::{module…, …}` paths.
fn imports(code: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => drop(found.insert(word(rest))),
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                found.extend(list.split(',').map(|item| word(item.trim())).filter(|item| !item.is_empty()));
            }
        }
    }
    found
}

#[test]
fn no_module_imports_what_the_table_does_not_allow() {
    let table: BTreeMap<_, _> = TABLE.iter().copied().collect();
    let reexports = ["Result", "Error"];
    let mut broken = Vec::new();
    for (path, text) in all_sources() {
        let module = module_of(&path);
        let Some(allowed) = table.get(module.as_str()) else { panic!("{module} is not in the table") };
        if allowed.contains(&"*") {
            continue;
        }
        for import in imports(&production(&text)) {
            let legal = import == module || allowed.contains(&import.as_str()) || reexports.contains(&import.as_str());
            if !legal {
                broken.push(format!("{} imports {import}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn ideas_know_no_runtime_and_no_store() {
    for (path, text) in all_sources() {
        let module = module_of(&path);
        let forbidden: &[&str] = match module.as_str() {
            "error" | "event" | "change" | "pattern" | "delivery" | "retry" | "subscription" | "handler"
            | "metrics" => &["tokio::", "sqlx::", "wasmtime", "std::fs", "std::net"],
            "broker" | "feed" => &["sqlx::", "wasmtime", "axum::", "std::fs", "std::env"],
            "host" => &["sqlx::", "axum::"],
            "provider" => &["wasmtime", "axum::"],
            _ => &[],
        };
        let code = production(&text);
        for word in forbidden {
            assert!(!code.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn providers_do_not_know_each_other() {
    let names = ["memory", "sqlite", "postgres", "redis", "nats"];
    for (path, text) in all_sources() {
        let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs")).collect();
        let ["provider", own, ..] = parts[..] else { continue };
        if !names.contains(&own) {
            continue;
        }
        for other in names.iter().filter(|name| **name != own) {
            let code = production(&text);
            assert!(!code.contains(&format!("provider::{other}")), "{} mentions {other}", path.display());
        }
    }
}

#[test]
fn only_serve_names_both_a_provider_and_the_host() {
    for (path, text) in all_sources() {
        let code = production(&text);
        let both = code.contains("provider::") && (code.contains("host::Host") || code.contains("host::{"));
        let allowed = path.ends_with("cli/serve.rs") || matches!(module_of(&path).as_str(), "config" | "lib");
        assert!(!both || allowed, "{}", path.display());
    }
}

#[test]
fn every_source_says_what_it_is() {
    for (path, text) in all_sources() {
        assert!(text.starts_with("//!"), "{} has no opening comment", path.display());
    }
}

#[test]
fn the_interface_in_the_sdk_is_the_hosts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let host = std::fs::read_to_string(root.join("wit/plugin.wit")).unwrap();
    let sdk = std::fs::read_to_string(root.join("plugins/sdk/wit/plugin.wit")).unwrap();
    assert_eq!(host, sdk);
}

/// The names between backquotes in the last column of the table of invariants.
fn tests_named_by_the_architecture() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let section = text.split("## Invariants, and the tests that hold them").nth(1).unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let held_by = rows.filter_map(|row| row.trim_end_matches('|').rsplit_once('|')).map(|(_, held_by)| held_by);
    held_by.flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned)).collect()
}

#[test]
fn every_test_that_the_architecture_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    sources(&root.join("src"), &mut paths);
    sources(&root.join("tests"), &mut paths);
    let code: String = paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let named = tests_named_by_the_architecture();
    assert!(named.len() > 30, "only {} tests are named", named.len());
    let missing: Vec<_> = named.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/configuration.md")).unwrap();
    let documented = text.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let load = |text: &str| {
        let file = folder.path().join("tidegate.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(&Sources { file: Some(file), ..Sources::default() }).unwrap()
    };
    assert_eq!(load(documented), load(""));
    let (defaults, documented) = (load("").to_json(), documented.to_owned());
    for key in defaults.as_object().unwrap().values().filter_map(|part| part.as_object()).flat_map(|part| part.keys()) {
        assert!(documented.contains(&format!("{key} = ")) || documented.contains(&format!(".{key}]")), "{key}");
    }
}
