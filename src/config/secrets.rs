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

/// `text` with the password of a URL masked, whether it stands before the server or among the parameters.
pub(super) fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let split = rest.split_once('?').filter(|(before, after)| before.contains('@') || !after.contains('@'));
    let (address, parameters) = split.map_or((rest, None), |(before, after)| (before, Some(after)));
    let login = || {
        let (login, server) = address.rsplit_once('@')?;
        let (user, _password) = login.split_once(':')?;
        Some(format!("{user}:{MASK}@{server}"))
    };
    let address = login().unwrap_or_else(|| address.to_owned());
    let masked = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) if is_secret(name) => format!("{name}={MASK}"),
        _ => parameter.to_owned(),
    };
    let parameters = parameters.map(|all| all.split('&').map(masked).collect::<Vec<_>>().join("&"));
    let parameters = parameters.map(|all| format!("?{all}")).unwrap_or_default();
    format!("{scheme}://{address}{parameters}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_password_is_masked_wherever_a_url_has_it() {
        let rows = [
            ("postgres://a:b@h/d", "postgres://a:***@h/d"),
            ("postgres://a:p/q@r@h:1/d?sslmode=require", "postgres://a:***@h:1/d?sslmode=require"),
            ("postgres://h/d?user=a&password=b&x=1", "postgres://h/d?user=a&password=***&x=1"),
            ("postgres://a@h/d", "postgres://a@h/d"),
            ("postgres://a:b?c@h/d", "postgres://a:***@h/d"),
            ("sqlite://x:y.db", "sqlite://x:y.db"),
            ("memory:", "memory:"),
        ];
        for (url, shown) in rows {
            assert_eq!(without_password(url), shown);
        }
    }

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
