//! Who may have which name, when files of a folder want the same: pure decisions.
//!
//! A plugin has a name, and its subscriptions have theirs. Each belongs to one file at a time. Who has a name keeps it;
//! among newcomers the first by path gets it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::shown;
use super::manifest::Manifest;

/// The names that a plugin needs for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    /// The plugin's own.
    pub(super) plugin: String,
    subscriptions: BTreeSet<Arc<str>>,
}

/// A name that only one plugin can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// A plugin's.
    Plugin(String),
    /// A subscription's.
    Subscription(Arc<str>),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plugin(name) => write!(f, "the name {name}"),
            Self::Subscription(name) => write!(f, "a subscription called {name}"),
        }
    }
}

impl Name {
    /// Why a candidate that needs this name is refused.
    pub(super) fn taken_by(&self, owner: &Path) -> String {
        format!("needs {self}, which the plugin in {} has: remove or rename one", shown(owner))
    }
}

impl Claim {
    /// What a plugin with this manifest needs.
    pub(super) fn of(manifest: &Manifest) -> Self {
        let subscriptions = manifest.subscriptions().into_iter().map(|subscription| subscription.name).collect();
        Self { plugin: manifest.name.clone(), subscriptions }
    }

    fn names(&self) -> impl Iterator<Item = Name> {
        let own = std::iter::once(Name::Plugin(self.plugin.clone()));
        own.chain(self.subscriptions.iter().cloned().map(Name::Subscription))
    }
}

/// The candidates that must stand back, each with the name that it cannot have and the file that has it.
///
/// `held` is what files have by what is served of them. A candidate that is accepted gives up what its file held.
pub(super) fn stand_back(
    held: &BTreeMap<PathBuf, Claim>,
    candidates: &BTreeMap<PathBuf, Claim>,
) -> BTreeMap<PathBuf, (Name, PathBuf)> {
    let mut back = BTreeMap::new();
    // One that stands back keeps what its file held, which may be what another one was about to get.
    while let Some((path, name, owner)) = first_conflict(held, candidates, &back) {
        back.insert(path, (name, owner));
    }
    back
}

fn first_conflict(
    held: &BTreeMap<PathBuf, Claim>,
    candidates: &BTreeMap<PathBuf, Claim>,
    back: &BTreeMap<PathBuf, (Name, PathBuf)>,
) -> Option<(PathBuf, Name, PathBuf)> {
    let advances = |path: &&PathBuf| candidates.contains_key(*path) && !back.contains_key(*path);
    let mut owners: BTreeMap<Name, &Path> = BTreeMap::new();
    for (path, claim) in held.iter().filter(|(path, _)| !advances(path)) {
        owners.extend(claim.names().map(|name| (name, path.as_path())));
    }
    let is_update = |path: &PathBuf, claim: &Claim| held.get(path).is_some_and(|held| held.plugin == claim.plugin);
    let advancing = candidates.iter().filter(|(path, _)| advances(path));
    let (updates, others): (Vec<_>, Vec<_>) = advancing.partition(|(path, claim)| is_update(path, claim));
    for (path, claim) in updates.into_iter().chain(others) {
        if let Some((name, owner)) = claim.names().find_map(|name| Some((name.clone(), *owners.get(&name)?))) {
            return Some((path.clone(), name, owner.to_owned()));
        }
        owners.extend(claim.names().map(|name| (name, path.as_path())));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of a path, a plugin's name and its subscriptions.
    fn claims(rows: &[(&str, &str, &[&str])]) -> BTreeMap<PathBuf, Claim> {
        let claim = |(path, plugin, subscriptions): &(&str, &str, &[&str])| {
            let subscriptions = subscriptions.iter().map(|&name| name.into()).collect();
            (PathBuf::from(path), Claim { plugin: (*plugin).to_owned(), subscriptions })
        };
        rows.iter().map(claim).collect()
    }

    /// `path` cannot have `name` because of `owner`.
    fn shown(back: &BTreeMap<PathBuf, (Name, PathBuf)>) -> Vec<String> {
        back.iter().map(|(path, (name, owner))| format!("{}: {name}: {}", path.display(), owner.display())).collect()
    }

    #[test]
    fn who_has_a_name_keeps_it_and_the_first_newcomer_gets_it() {
        let held = claims(&[("b", "x", &["x"])]);
        assert_eq!(shown(&stand_back(&held, &claims(&[("a", "x", &[])]))), ["a: the name x: b"]);
        let both = claims(&[("a", "x", &[]), ("b", "x", &[])]);
        assert_eq!(shown(&stand_back(&BTreeMap::new(), &both)), ["b: the name x: a"]);
        assert_eq!(shown(&stand_back(&held, &both)), ["a: the name x: b"], "b is a new version of what it holds");
    }

    #[test]
    fn a_subscription_of_another_plugin_is_not_taken_over() {
        let held = claims(&[("a", "x", &["totals"])]);
        let wants = claims(&[("b", "y", &["other", "totals"])]);
        assert_eq!(shown(&stand_back(&held, &wants)), ["b: a subscription called totals: a"]);
        let freed = claims(&[("a", "x", &[]), ("b", "y", &["totals"])]);
        assert!(stand_back(&held, &freed).is_empty(), "the new version of a no longer asks for it");
    }

    #[test]
    fn two_files_can_swap_their_plugins_and_a_chain_moves_up() {
        let held = claims(&[("a", "x", &["s"]), ("b", "y", &["t"])]);
        assert!(stand_back(&held, &claims(&[("a", "y", &["t"]), ("b", "x", &["s"])])).is_empty());
        assert!(stand_back(&held, &claims(&[("a", "z", &[]), ("c", "x", &["s"])])).is_empty());
    }

    #[test]
    fn one_that_stands_back_keeps_what_it_had() {
        let held = claims(&[("a", "x", &[]), ("b", "y", &[])]);
        let wants = claims(&[("a", "y", &[]), ("c", "x", &[])]);
        assert_eq!(shown(&stand_back(&held, &wants)), ["a: the name y: b", "c: the name x: a"]);
    }
}
