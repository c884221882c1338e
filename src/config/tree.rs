//! Settings laid over a tree, and errors that say which key, set where, meant to be what.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result, nearest};

/// What environment variables of ours begin with.
const PREFIX: &str = "TIDEGATE_";

/// Variables of the command line's client, and of the choice of the file; no settings.
const NO_SETTINGS: [&str; 3] = ["TIDEGATE_URL", "TIDEGATE_TOKEN", "TIDEGATE_CONFIG"];

/// What Kubernetes puts into the environment of every container beside a service named `tidegate`; no settings either.
const NOT_OURS: [&str; 2] = ["TIDEGATE_SERVICE_", "TIDEGATE_PORT"];

/// One value for one key.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The key's path from the root.
    path: Vec<String>,
    text: String,
    /// Who says so, such as `--listen`.
    origin: String,
}

impl Setting {
    /// `text` for the key `path` (parts joined by dots), as `origin` says.
    #[must_use]
    pub fn new(path: &str, text: impl Into<String>, origin: impl Into<String>) -> Self {
        Self { path: path.split('.').map(str::to_owned).collect(), text: text.into(), origin: origin.into() }
    }

    /// The text as the number, truth value or list that it reads as; a string otherwise.
    fn guessed(&self) -> Value {
        let parsed = toml::from_str::<Map<String, Value>>(&format!("v = {}", self.text));
        match parsed.ok().and_then(|mut table| table.remove("v")) {
            Some(value @ (Value::Number(_) | Value::Bool(_) | Value::Array(_) | Value::Object(_))) => value,
            _ => Value::String(self.text.clone()),
        }
    }
}

/// The settings in `environment`: `TIDEGATE_BROKER__WORKER_COUNT` is `broker.worker_count`.
///
/// # Errors
/// [`Error::Invalid`] for a variable whose name has an empty part.
pub(super) fn from_environment(environment: &[(String, String)]) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    for (name, value) in environment {
        let is_setting = !NO_SETTINGS.contains(&name.as_str()) && !NOT_OURS.iter().any(|start| name.starts_with(start));
        let Some(key) = name.strip_prefix(PREFIX).filter(|_| is_setting) else { continue };
        let path = key.to_ascii_lowercase().replace("__", ".");
        if path.split('.').any(str::is_empty) {
            return Err(Error::invalid(name.clone(), value, "names no setting: write TIDEGATE_<TABLE>__<KEY>"));
        }
        settings.push(Setting::new(&path, value, name));
    }
    // The environment has no order of its own; two variables for one key would otherwise take turns.
    settings.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(settings)
}

/// `base` with `settings` laid over it, as a `T`. `origin` names where `base` was read.
///
/// # Errors
/// [`Error::Invalid`] naming the key, its value and its origin.
pub(super) fn read<T: DeserializeOwned>(mut base: Value, settings: &[Setting], origin: Option<&str>) -> Result<T> {
    for setting in settings {
        insert(&mut base, setting, setting.guessed())?;
    }
    let error = match serde_path_to_error::deserialize(&base) {
        Ok(read) => return Ok(read),
        Err(error) => error,
    };
    // A name such as "42" reads as a number until it is known that a text is wanted.
    let path = error.path().to_string();
    if let Some(setting) = settings.iter().find(|setting| setting.path.join(".") == path) {
        insert(&mut base, setting, Value::String(setting.text.clone()))?;
        if let Ok(read) = serde_path_to_error::deserialize(&base) {
            return Ok(read);
        }
    }
    Err(explain(&base, &path, &error.inner().to_string(), settings, origin))
}

fn insert(base: &mut Value, setting: &Setting, value: Value) -> Result<()> {
    let mut place = base;
    for part in &setting.path {
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let Value::Object(table) = place else {
            let reason = format!("{part} cannot be set below what is no table (set by {})", setting.origin);
            return Err(Error::invalid(setting.path.join("."), &setting.text, reason));
        };
        place = table.entry(part.clone()).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

/// What the reader's words mean for whoever wrote the key.
fn explain(base: &Value, path: &str, words: &str, settings: &[Setting], origin: Option<&str>) -> Error {
    let unknown = words.strip_prefix("unknown field ").map(quoted_names);
    let (key, reason) = match unknown.as_deref() {
        Some([given, known @ ..]) => {
            // The path may or may not end in the unknown key itself, depending on the kind of map.
            let parent = path.strip_suffix(given.as_str()).unwrap_or(path).trim_matches('.');
            let key = if parent.is_empty() { given.clone() } else { format!("{parent}.{given}") };
            (key, format!("is not a setting{}", hint(given, known)))
        }
        _ => (path.to_owned(), words.to_owned()),
    };
    let value = lookup(base, &key).map(Value::to_string).unwrap_or_default();
    let shown = if super::secrets::is_secret(&key) { "***" } else { value.trim_matches('"') };
    let by = settings.iter().rev().find(|setting| is_at(&setting.path, &key)).map(|setting| setting.origin.as_str());
    let by = by.or(origin).map(|origin| format!(" (set by {origin})")).unwrap_or_default();
    Error::invalid(key, shown, format!("{reason}{by}"))
}

fn hint(given: &str, known: &[String]) -> String {
    match nearest(given, known.iter().map(String::as_str)) {
        Some(name) => format!("; did you mean {name}?"),
        None => format!("; known here: {}", known.join(", ")),
    }
}

/// The names that stand between backquotes.
fn quoted_names(words: &str) -> Vec<String> {
    words.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn lookup<'a>(base: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(base, |value, part| value.get(part))
}

/// Whether a setting of `path` is what stands at `key`, or around it, or below it.
fn is_at(path: &[String], key: &str) -> bool {
    let path = path.join(".");
    path == key || key.starts_with(&format!("{path}.")) || path.starts_with(&format!("{key}."))
}
