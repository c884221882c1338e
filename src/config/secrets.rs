//! What is never shown: passwords, tokens, and the values of plugins' settings.

use serde_json::Value;

/// What stands in a secret's place.
const MASK: &str = "***";

/// Words that make a key's value a secret.
const WORDS: [&str; 5] = ["password", "secret", "token", "sha256", "credential"];

/// Whether the value of the last part of `key` is a secret.
pub(super) fn is_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    WORDS.iter().any(|word| last.contains(word)) && last != "tokens"
}

/// Puts the mask in place of every secret of the tree.
pub(super) fn mask(tree: &mut Value) {
    match tree {
        Value::Object(table) => table.iter_mut().for_each(|(key, value)| match value {
            Value::Null | Value::Object(_) | Value::Array(_) if key != "config" => mask(value),
            // What a plugin is configured with is the plugin's business, API keys included.
            Value::Object(settings) => settings.values_mut().for_each(|value| *value = Value::from(MASK)),
            _ if is_secret(key) => *value = Value::from(MASK),
            other => mask(other),
        }),
        Value::Array(list) => list.iter_mut().for_each(mask),
        Value::String(text) => *text = without_password(text),
        _ => {}
    }
}

/// `text` with the password of a URL masked.
pub(super) fn without_password(text: &str) -> String {
    let masked = || {
        let (scheme, rest) = text.split_once("://")?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (login, server) = authority.rsplit_once('@')?;
        let (user, _password) = login.split_once(':')?;
        Some(format!("{scheme}://{user}:{MASK}@{server}{path}"))
    };
    masked().unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn secrets_are_masked_wherever_they_stand() {
        let mut tree = json!({
            "provider": "postgres://app:hunter2@db.example/x",
            "http": {"tokens": [{"name": "ci", "sha256": "abc", "scopes": ["read"]}]},
            "plugins": {"mailer": {"config": {"api_key": "k-1"}}},
            "listen": "127.0.0.1:7700",
        });
        mask(&mut tree);
        let text = tree.to_string();
        for secret in ["hunter2", "abc", "k-1"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert_eq!(tree["provider"], "postgres://app:***@db.example/x");
        assert_eq!(tree["http"]["tokens"][0]["name"], "ci");
        assert_eq!(tree["listen"], "127.0.0.1:7700");
    }
}
