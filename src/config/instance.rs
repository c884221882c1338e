//! The name of this process: what the configuration says, else the host's name, else a fixed one.

use crate::error::{Error, Result};

/// The name where nothing better is known.
const FALLBACK: &str = "tidegate-instance";

/// Where Linux keeps the host's name.
const FILES: [&str; 2] = ["/proc/sys/kernel/hostname", "/etc/hostname"];

/// The name that `configured` means, with `${NAME}` replaced by what `variable` knows.
///
/// # Errors
/// [`Error::Invalid`] naming `instance_id` for a `${` without `}`, or an unknown variable.
pub(super) fn resolve(configured: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String> {
    let host = || variable("HOSTNAME").filter(|name| !name.is_empty()).or_else(host_name);
    let expanded = expand(configured, |name| match name {
        "HOSTNAME" => Some(host().unwrap_or_else(|| FALLBACK.to_owned())),
        other => variable(other),
    })?;
    match expanded.trim() {
        "" => Ok(host().unwrap_or_else(|| FALLBACK.to_owned())),
        name => Ok(name.to_owned()),
    }
}

fn host_name() -> Option<String> {
    let names = FILES.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    names.map(|name| name.trim().to_owned()).find(|name| !name.is_empty() && name != "(none)")
}

fn expand(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String> {
    let refuse = |reason: String| Err(Error::invalid("instance_id", text, reason));
    let (mut expanded, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, behind)) = after.split_once('}') else { return refuse("has a ${ without }".to_owned()) };
        let Some(value) = variable(name) else { return refuse(format!("needs the environment variable {name}")) };
        expanded.push_str(before);
        expanded.push_str(&value);
        rest = behind;
    }
    Ok(expanded + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(configured: &str) -> Result<String> {
        resolve(configured, |name| match name {
            "HOSTNAME" => Some("node-7".to_owned()),
            "ZONE" => Some("eu".to_owned()),
            _ => None,
        })
    }

    /// BEHAVIOURS C11.
    #[test]
    fn the_configured_name_wins_over_the_hosts() {
        for (configured, expected) in
            [("api-1", "api-1"), ("${HOSTNAME}", "node-7"), ("${ZONE}-${HOSTNAME}-x", "eu-node-7-x"), ("", "node-7")]
        {
            assert_eq!(named(configured).unwrap(), expected);
        }
        assert!(!resolve("", |_| None).unwrap().is_empty());
        assert!(named("${ZONE").unwrap_err().to_string().contains("without }"));
        assert!(named("${REGION}").unwrap_err().to_string().contains("variable REGION"));
    }
}
