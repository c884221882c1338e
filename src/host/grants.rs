//! What a plugin may do: its requests against the operator's grants, and its imports against its requests.
//!
//! Pure decisions, closed by default: what nobody requested is not linked, and what nobody granted keeps the plugin
//! from being loaded at all, with the line to add to the configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use super::bindings::{BATCH_HANDLER, HANDLER, MAJOR, PACKAGE, PACKED_BATCH_HANDLER, VERSION};
use super::component::Interface;
use super::manifest::{Capabilities, Manifest};
use super::options::{Options, PluginOptions};
use super::wasi::{WASI_0_2, WASI_0_3};
use crate::event::EventType;
use crate::pattern::Pattern;

/// What a loaded plugin may do.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Powers {
    /// Buckets that it may read and write.
    pub(super) kv: BTreeSet<String>,
    /// Types that it may publish.
    pub(super) events: Vec<Pattern>,
    /// Its settings: every key that it may ask for, with the value where the operator gave one.
    pub(super) config: BTreeMap<String, Option<String>>,
    /// Whether it was built for WASI 0.2, and is given a WASI in which nothing is granted.
    pub(super) wasi: bool,
    /// The same for WASI 0.3.
    pub(super) wasi_3: bool,
}

impl Powers {
    /// Whether it may publish events of this type.
    pub(super) fn may_publish(&self, event_type: &EventType) -> bool {
        self.events.iter().any(|pattern| pattern.matches(event_type))
    }
}

/// What a plugin with this manifest and interface may do under these options.
///
/// # Errors
/// Words that name the import or the missing grant, and what to add where.
pub(super) fn decide(
    manifest: &Manifest,
    interface: &Interface,
    options: &PluginOptions,
) -> std::result::Result<Powers, String> {
    check_exports(&interface.exports)?;
    check_grants(manifest, &options.grants)?;
    for import in &interface.imports {
        check_import(import, &manifest.capabilities)?;
    }
    let requested = &manifest.capabilities;
    let imports_wasi = |version: &str| {
        let mut imports = interface.imports.iter().map(|import| parts(import));
        imports.any(|(package, _, built_for)| package.starts_with("wasi:") && built_for.starts_with(version))
    };
    let value = |key: &String| (key.clone(), options.config.get(key).cloned());
    Ok(Powers {
        kv: requested.kv.iter().cloned().collect(),
        events: requested.events.clone(),
        config: requested.config.iter().map(value).collect(),
        wasi: imports_wasi("0.2."),
        wasi_3: imports_wasi("0.3."),
    })
}

/// The most events of a batch that neither the plugin nor its operator says anything about: at this many the call itself
/// costs next to nothing per event.
const MAX_BATCH: u32 = 64;

/// The most events that one call of the plugin may have; 1 where they are handled one by one.
///
/// # Errors
/// Words for a manifest that asks for batches without the export that takes them.
pub(super) fn max_batch(
    manifest: &Manifest,
    interface: &Interface,
    options: &PluginOptions,
) -> std::result::Result<usize, String> {
    let wished = manifest.batch.max.map(NonZeroU32::get);
    if ![BATCH_HANDLER, PACKED_BATCH_HANDLER].iter().any(|name| has_export(&interface.exports, name)) {
        return match wished {
            None | Some(1) => Ok(1),
            Some(max) => Err(format!(
                "asks for batches (batch.max = {max} in its plugin.toml) and does not export {BATCH_HANDLER}: \
                 export it, with the SDK by plugin!(…, batch), or leave batch.max out"
            )),
        };
    }
    let allowed = options.batch.max.map_or(u32::MAX, NonZeroU32::get);
    Ok(usize::try_from(wished.unwrap_or(MAX_BATCH).min(allowed)).unwrap_or(usize::MAX))
}

/// The name of an interface in parts: `wasi:io/poll@0.2.6` is `("wasi:io", "poll", "0.2.6")`.
pub(super) fn parts(name: &str) -> (&str, &str, &str) {
    let (path, version) = name.split_once('@').unwrap_or((name, ""));
    let (package, interface) = path.split_once('/').unwrap_or((path, ""));
    (package, interface, version)
}

/// The version of an interface's package that this host serves, which goes on with that of the interface.
pub(super) fn served(name: &str) -> Option<&'static str> {
    match parts(name) {
        (PACKAGE, _, version) if is_served(version) => Some(VERSION),
        (package, _, version) if package.starts_with("wasi:") && !is_pre_release(version) => {
            [WASI_0_2, WASI_0_3].into_iter().find(|served| served.get(..4) == version.get(..4))
        }
        _ => None,
    }
}

fn is_served(version: &str) -> bool {
    version.split('.').next() == Some(MAJOR) && !is_pre_release(version)
}

/// Nothing is compatible with a pre-release, not even the release.
fn is_pre_release(version: &str) -> bool {
    version.contains('-')
}

fn other_version(version: &str) -> String {
    match is_pre_release(version) {
        true => format!(
            "was built for {PACKAGE} {version}, a pre-release that nothing else is compatible with: \
             build it for {VERSION}"
        ),
        false => format!(
            "was built for {PACKAGE} {version}, and this host serves {MAJOR}.x: \
             build it for {VERSION}, or run it on a tidegate that serves {version}"
        ),
    }
}

/// Whether these exports have the interface of this name in a version that is served.
pub(super) fn has_export(exports: &[String], interface: &str) -> bool {
    exports.iter().any(|name| name.split('@').next() == Some(interface) && is_served(parts(name).2))
}

/// A plugin exports the handler. What exports something else is told what it is.
pub(super) fn check_exports(exports: &[String]) -> std::result::Result<(), String> {
    let mut versions = exports.iter().filter(|name| parts(name).0 == PACKAGE).map(|name| parts(name).2);
    if has_export(exports, HANDLER) {
        return Ok(());
    }
    if let Some(version) = versions.find(|version| !is_served(version)) {
        return Err(other_version(version));
    }
    let exports_one_of =
        |names: &[&str]| exports.iter().any(|name| name.split('@').next().is_some_and(|n| names.contains(&n)));
    if exports_one_of(&["wasi:cli/run"]) {
        return Err(format!(
            "is a WASI command and not a plugin: it has to export {HANDLER} instead of a main function"
        ));
    }
    if exports_one_of(&["wasi:http/incoming-handler", "wasi:http/handler"]) {
        return Err(format!(
            "is a WASI HTTP service and not a plugin: it has to export {HANDLER}, which gets events instead of requests"
        ));
    }
    let exported = match exports {
        [] => "nothing".to_owned(),
        names => names.join(", "),
    };
    Err(format!(
        "exports {exported}, but a plugin exports {HANDLER}@{MAJOR}.0.0: \
         generate its bindings for the world {PACKAGE}/plugin"
    ))
}

/// Everything that is requested must be granted.
fn check_grants(manifest: &Manifest, grants: &Capabilities) -> std::result::Result<(), String> {
    let requested = &manifest.capabilities;
    let missing = Capabilities {
        kv: requested.kv.iter().filter(|name| !grants.kv.contains(name)).cloned().collect(),
        events: requested.events.iter().filter(|wish| !is_covered(wish, &grants.events)).cloned().collect(),
        config: requested.config.iter().filter(|key| !grants.config.contains(key)).cloned().collect(),
        http: requested.http.iter().filter(|origin| !grants.http.contains(origin)).cloned().collect(),
    };
    match lines(&missing).as_slice() {
        [] => Ok(()),
        lines => Err(format!(
            "requests what is not granted: if it may, add {} to [plugins.{}.grants] in the configuration",
            lines.join(" and "),
            manifest.name
        )),
    }
}

/// The section of the configuration that grants a plugin all that it requests, when not all of that is granted yet.
#[must_use]
pub fn needed_grants(manifest: &Manifest, options: &Options) -> Option<String> {
    let granted = options.plugins.get(&manifest.name).map(|plugin| plugin.grants.clone());
    check_grants(manifest, &granted.unwrap_or_default()).err()?;
    Some(format!("[plugins.{}.grants]\n{}\n", manifest.name, lines(&manifest.capabilities).join("\n")))
}

/// Capabilities as lines of TOML, those that are empty left out.
fn lines(capabilities: &Capabilities) -> Vec<String> {
    let Capabilities { kv, events, config, http } = capabilities;
    [line("kv", kv), line("events", events), line("config", config), line("http", http)].into_iter().flatten().collect()
}

fn line<T: ToString>(capability: &str, names: &[T]) -> Option<String> {
    let names: Vec<String> = names.iter().map(|name| format!("{:?}", name.to_string())).collect();
    (!names.is_empty()).then(|| format!("{capability} = [{}]", names.join(", ")))
}

/// A wish is covered by the same pattern, by one for everything, or, when it is a plain type, by one that matches it.
fn is_covered(wish: &Pattern, grants: &[Pattern]) -> bool {
    let plain = EventType::parse(wish.as_str()).ok();
    grants.iter().any(|grant| {
        grant.as_str() == wish.as_str()
            || matches!(grant.as_str(), "*" | "**")
            || plain.as_ref().is_some_and(|event_type| grant.matches(event_type))
    })
}

fn check_import(import: &str, requested: &Capabilities) -> std::result::Result<(), String> {
    let (package, interface, version) = parts(import);
    match (package, interface) {
        (PACKAGE, _) if !is_served(version) => Err(other_version(version)),
        (PACKAGE, "types" | "delivery" | "log") => Ok(()),
        (PACKAGE, "config") => needs_request(import, "config", "the settings", requested.config.is_empty()),
        (PACKAGE, "events") => needs_request(import, "events", "the types", requested.events.is_empty()),
        (PACKAGE, "kv") => needs_request(import, "kv", "the buckets", requested.kv.is_empty()),
        (PACKAGE, _) => Err(format!("imports {import}, which this host does not have: run it on a newer tidegate")),
        ("wasi:http", _) => Err(format!("imports {import}: outbound HTTP is not offered by this version of tidegate")),
        ("wasi:cli" | "wasi:clocks" | "wasi:filesystem" | "wasi:io" | "wasi:random" | "wasi:sockets", _) => {
            match served(import) {
                Some(_) => Ok(()),
                None => Err(format!(
                    "imports {import}, and this host serves WASI {WASI_0_2} and {WASI_0_3} and what is older of the same \
                     two: build it for wasm32-wasip2"
                )),
            }
        }
        _ => Err(format!(
            "imports {import}, which this host does not offer: a plugin may import interfaces of {PACKAGE} and of WASI{}",
            instead(package).map_or_else(String::new, |ours| format!("; {PACKAGE}/{ours} does what it is for"))
        )),
    }
}

/// What we have in place of a WASI draft.
fn instead(package: &str) -> Option<&'static str> {
    match package {
        "wasi:keyvalue" => Some("kv"),
        "wasi:config" => Some("config"),
        "wasi:logging" => Some("log"),
        "wasi:messaging" => Some("events"),
        _ => None,
    }
}

fn needs_request(import: &str, key: &str, what: &str, is_empty: bool) -> std::result::Result<(), String> {
    match is_empty {
        false => Ok(()),
        true => Err(format!(
            "imports {import} without requesting it: name {what} that it uses as {key} = [...] \
             under [capabilities] in its plugin.toml, or build it for a world without that import"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANDLE: &str = "tidegate:plugin/handler@1.0.0";

    fn manifest(capabilities: &str) -> Manifest {
        Manifest::parse(&format!("name = \"totals\"\nversion = \"1.0.0\"\n[capabilities]\n{capabilities}\n")).unwrap()
    }

    fn options(grants: &str) -> PluginOptions {
        toml::from_str(&format!("grants = {{ {grants} }}\nconfig = {{ currency = \"EUR\", secret = \"s\" }}")).unwrap()
    }

    fn decided(imports: &[&str], requests: &str, grants: &str) -> std::result::Result<Powers, String> {
        let imports = imports.iter().map(|&name| name.to_owned()).collect();
        let interface = Interface { imports, exports: vec![HANDLE.to_owned()] };
        decide(&manifest(requests), &interface, &options(grants))
    }

    /// Invariant 10: a plugin can do nothing that the operator did not grant.
    #[test]
    fn a_request_without_a_grant_is_refused_with_the_line_to_add() {
        let requests = "kv = [\"totals\", \"other\"]\nevents = [\"shop.totals.*\"]";
        let words = decided(&[], requests, "kv = [\"other\"]").unwrap_err();
        let line = "add kv = [\"totals\"] and events = [\"shop.totals.*\"] to [plugins.totals.grants]";
        assert!(words.contains(line), "{words}");
        let enough = "kv = [\"other\", \"totals\"], events = [\"shop.totals.*\"]";
        assert!(decided(&[], requests, enough).is_ok());

        let mut host = Options::default();
        let section = needed_grants(&manifest(requests), &host).unwrap();
        assert_eq!(section, format!("[plugins.totals.grants]\n{requests}\n"), "ready for the configuration");
        host.plugins.insert("totals".to_owned(), options(enough));
        assert_eq!(needed_grants(&manifest(requests), &host), None);
    }

    #[test]
    fn an_import_without_a_request_is_refused_by_its_name() {
        for (interface, key) in [("kv", "kv = "), ("events", "events = "), ("config", "config = ")] {
            let import = format!("tidegate:plugin/{interface}@1.0.0");
            let words = decided(&[&import], "", "kv = [\"totals\"], events = [\"**\"]").unwrap_err();
            assert!(words.contains(&import) && words.contains(key), "{words}");
        }
    }

    #[test]
    fn what_is_not_needed_is_not_given() {
        let all = "kv = [\"a\", \"b\"], events = [\"**\"], config = [\"currency\", \"secret\"]";
        let powers = decided(&["tidegate:plugin/config@1.0.0"], "config = [\"currency\"]", all).unwrap();
        assert_eq!(powers.config, BTreeMap::from([("currency".to_owned(), Some("EUR".to_owned()))]));
        assert!(powers.kv.is_empty() && powers.events.is_empty() && !powers.wasi);
    }

    #[test]
    fn a_grant_covers_its_own_pattern_everything_or_a_plain_type() {
        let rows = [
            ("shop.totals.*", "shop.totals.*", true),
            ("shop.totals.update", "shop.*.update", true),
            ("shop.totals.*", "*", true),
            ("shop.totals.*", "**", true),
            ("shop.totals.*", "shop.**", false),
            ("*", "shop.**", false),
            ("shop.totals.update", "shop.orders.*", false),
        ];
        for (wish, grant, expected) in rows {
            let powers = decided(&[], &format!("events = [{wish:?}]"), &format!("events = [{grant:?}]"));
            assert_eq!(powers.is_ok(), expected, "{wish} under {grant}");
        }
    }

    #[test]
    fn imports_that_cannot_be_served_are_refused_in_words() {
        let rows = [
            ("tidegate:plugin/log@2.1.0", "built for tidegate:plugin 2.1.0, and this host serves 1.x"),
            ("tidegate:plugin/mail@1.4.0", "run it on a newer tidegate"),
            ("wasi:http/outgoing-handler@0.2.6", "outbound HTTP"),
            ("tidegate:plugin/log@0.9.0", "this host serves 1.x"),
            ("tidegate:plugin/log@1.1.0-rc.1", "1.1.0-rc.1, a pre-release that nothing else is compatible with"),
            ("wasi:cli/stdout@0.4.0", "this host serves WASI 0.2.12 and 0.3.0"),
            ("wasi:cli/stdout@0.3.0-rc-2026-02-09", "this host serves WASI 0.2.12 and 0.3.0"),
            ("wasi:cli/stdout@0.2.0-rc-2023-12-05", "this host serves WASI 0.2.12 and 0.3.0"),
            (
                "wasi:keyvalue/store@0.2.0-draft",
                "does not offer: a plugin may import interfaces of tidegate:plugin and of WASI; tidegate:plugin/kv does",
            ),
            ("wasi:config/store@0.2.0-rc.1", "tidegate:plugin/config does what it is for"),
            ("wasi:logging/logging@0.1.0-draft", "tidegate:plugin/log does"),
            ("wasi:messaging/producer@0.2.0-draft", "tidegate:plugin/events does"),
            ("wasi:nn/inference@0.2.0", "of tidegate:plugin and of WASI"),
            ("acme:db/query@1.0.0", "acme:db/query@1.0.0, which this host does not offer"),
            ("now", "now, which this host does not offer"),
        ];
        for (import, words) in rows {
            let refused = decided(&[import], "", "").unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
        let free = ["tidegate:plugin/types@1.0.0", "tidegate:plugin/delivery@1.0.0", "tidegate:plugin/log@1.2.0"];
        assert_eq!(decided(&free, "", ""), Ok(Powers::default()));
        let powers = |import| decided(&[import], "", "").map(|powers| (powers.wasi, powers.wasi_3)).unwrap();
        assert_eq!(powers("wasi:clocks/wall-clock@0.2.3"), (true, false));
        assert_eq!(powers("wasi:clocks/system-clock@0.3.0"), (false, true));
    }

    #[test]
    fn batches_need_their_export_and_the_smaller_wish_counts() {
        let with = |exports: &[&str], wish: &str, allowed: &str| {
            let manifest = Manifest::parse(&format!("name = \"totals\"\nversion = \"1.0.0\"\n{wish}\n")).unwrap();
            let exports = exports.iter().map(|&name| name.to_owned()).collect();
            max_batch(&manifest, &Interface { imports: Vec::new(), exports }, &toml::from_str(allowed).unwrap())
        };
        let both = [HANDLE, "tidegate:plugin/batch-handler@1.0.0"];
        assert_eq!(with(&[HANDLE], "", ""), Ok(1));
        assert_eq!(with(&[HANDLE], "[batch]\nmax = 1", "batch = { max = 9 }"), Ok(1));
        assert_eq!(with(&both, "", ""), Ok(64));
        assert_eq!(with(&[HANDLE, "tidegate:plugin/packed-batch-handler@1.0.0"], "", ""), Ok(64));
        assert_eq!(with(&both, "[batch]\nmax = 500", ""), Ok(500));
        assert_eq!(with(&both, "[batch]\nmax = 500", "batch = { max = 8 }"), Ok(8));
        assert_eq!(with(&both, "[batch]\nmax = 5", "batch = { max = 8 }"), Ok(5));
        let refused = with(&[HANDLE], "[batch]\nmax = 5", "").unwrap_err();
        assert!(refused.contains("batch.max = 5") && refused.contains("tidegate:plugin/batch-handler"), "{refused}");
    }

    #[test]
    fn a_component_of_another_world_is_told_what_it_is() {
        let rows: [(&[&str], &str); 9] = [
            (&[], "exports nothing, but a plugin exports tidegate:plugin/handler@1.0.0"),
            (&["acme:web/serve@0.1.0"], "exports acme:web/serve@0.1.0, but a plugin"),
            (&["wasi:cli/run@0.2.6"], "WASI command"),
            (&["wasi:cli/run@0.3.0"], "WASI command"),
            (&["wasi:http/incoming-handler@0.2.6"], "WASI HTTP service"),
            (&["wasi:http/handler@0.3.0"], "WASI HTTP service"),
            (&["tidegate:plugin/handler@0.1.0"], "built for tidegate:plugin 0.1.0"),
            (&["tidegate:plugin/handler@1.0.0-rc.1"], "1.0.0-rc.1, a pre-release"),
            (&["tidegate:plugin/handler@2.0.0"], "built for tidegate:plugin 2.0.0"),
        ];
        for (exports, words) in rows {
            let exports: Vec<String> = exports.iter().map(|&name| name.to_owned()).collect();
            let refused = check_exports(&exports).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
        assert!(check_exports(&["memory".to_owned(), "tidegate:plugin/handler@1.3.0".to_owned()]).is_ok());
    }
}
