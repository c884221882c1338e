//! A folder of plugins: what is in it is served, and what changes in it is replaced.
//!
//! Notifications are hints without content. The truth is always read again from the folder, by digest, and what to do
//! about a difference is a pure decision. Subscriptions are bound elsewhere, from the [`Change`]s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::component::digest;
use super::load::Refused;
use super::manifest::Manifest;
use super::registry::{Host, Plugin, Refusal};
use crate::error::{Error, Result};
use crate::handler::Handler;

/// How long a folder must be quiet before it is read: a copy in progress is many notifications.
const QUIET: Duration = Duration::from_millis(200);

/// The longest wait for quiet: a file that is written all the time must not keep others from being loaded.
const PATIENCE: Duration = Duration::from_secs(5);

/// What happened to a plugin.
#[derive(Clone)]
pub enum Change {
    /// A version became active, the first of its name or in place of another.
    Loaded {
        /// The plugin's name.
        name: Arc<str>,
        /// What it says about itself, its subscriptions included.
        manifest: Arc<Manifest>,
        /// Calls whatever version is active, this one for now.
        handler: Arc<dyn Handler>,
    },
    /// No file has this name any more.
    Removed {
        /// The plugin's name.
        name: Arc<str>,
    },
}

/// A folder whose `*.wasm` files are the plugins of a host.
pub struct Folder {
    host: Host,
    directory: PathBuf,
    files: Files,
    hints: Arc<Notify>,
    /// Whether a hint was seen that no reading has answered yet.
    stale: bool,
    _watcher: RecommendedWatcher,
}

/// What is known of each file.
type Files = BTreeMap<PathBuf, Known>;

/// The digests of the files that are there; `None` for one that cannot be read.
type Seen = BTreeMap<PathBuf, Option<String>>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    digest: Option<String>,
    claim: Claim,
}

/// What a file has to do with a plugin's name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Claim {
    /// The active version came from it; it may hold a refused one by now.
    Owns(String),
    /// It holds a plugin of this name that was refused, be it that another file owns the name.
    Wants(String),
    /// It holds nothing that could be told.
    Nothing,
}

impl Folder {
    /// Begins to watch a folder. Nothing is loaded before the first [`scan`](Self::scan).
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `plugins` when there is no such folder or it cannot be watched.
    pub fn open(host: Host, directory: &Path) -> Result<Self> {
        let refuse = |words: String| Error::invalid("plugins", directory.to_string_lossy(), words);
        if !directory.is_dir() {
            return Err(refuse("must be an existing folder".to_owned()));
        }
        let hints = Arc::new(Notify::new());
        let hint = Arc::clone(&hints);
        let told = move |event: notify::Result<notify::Event>| {
            // An error means that something was missed.
            if event.map_or(true, |event| is_change(event.kind)) {
                hint.notify_one();
            }
        };
        let watch = |mut watcher: RecommendedWatcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        };
        let watcher = notify::recommended_watcher(told).and_then(watch);
        let _watcher = watcher.map_err(|error| refuse(format!("cannot be watched: {error}")))?;
        Ok(Self { host, directory: directory.to_owned(), files: Files::new(), hints, stale: true, _watcher })
    }

    /// Waits until something changed and the folder is quiet again. Before the first scan it waits for quiet only.
    ///
    /// Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        if !self.stale {
            self.hints.notified().await;
            self.stale = true;
        }
        let latest = Instant::now() + PATIENCE;
        while Instant::now() < latest && timeout(QUIET, self.hints.notified()).await.is_ok() {}
    }

    /// Reads the folder and loads what differs. A candidate that is refused leaves the version before it serving.
    ///
    /// To be awaited to its end: the changes are told once.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the folder itself cannot be read; all plugins stay as they are.
    pub async fn scan(&mut self) -> Result<Vec<Change>> {
        self.stale = false;
        let seen = self.read().await?;
        let before = owned(&self.files);
        let mut loaded = Vec::new();
        let to_load = to_load(&self.files, &seen);
        self.drop_missing(&seen);
        for path in to_load {
            loaded.extend(self.load(path).await);
        }
        let gone: Vec<String> = before.difference(&owned(&self.files)).cloned().collect();
        gone.iter().for_each(|name| self.host.remove(name));
        let removed = gone.into_iter().map(|name| Change::Removed { name: name.into() });
        Ok(removed.chain(loaded).collect())
    }

    async fn read(&self) -> Result<Seen> {
        let directory = self.directory.clone();
        let work = tokio::task::spawn_blocking(move || read(&directory)).await;
        let read = work.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        read.map_err(|error| {
            Error::invalid("plugins", self.directory.to_string_lossy(), format!("cannot be read: {error}"))
        })
    }

    fn drop_missing(&mut self, seen: &Seen) {
        let host = &self.host;
        self.files.retain(|path, _| {
            let stays = seen.contains_key(path);
            if !stays {
                host.forget_refusal(&path.to_string_lossy());
            }
            stays
        });
    }

    async fn load(&mut self, path: PathBuf) -> Option<Change> {
        let origin = path.to_string_lossy().into_owned();
        let read = tokio::fs::read(&path).await;
        let digest = read.as_ref().ok().map(|bytes| digest(bytes));
        let candidate = match read {
            Ok(bytes) => self.host.candidate(bytes.into()).await,
            Err(error) => Err(Refused { plugin: None, reason: format!("cannot be read: {error}") }),
        };
        let free = candidate.and_then(|plugin| self.if_free(&path, plugin));
        let earlier = self.files.remove(&path).map(|known| known.claim);
        let name = free.as_ref().map_or_else(|refused| refused.plugin.clone(), |plugin| Some(plugin.name().to_owned()));
        let claim = claim(name, free.is_ok(), earlier);
        self.files.insert(path, Known { digest: digest.clone(), claim });
        match free {
            Ok(plugin) => {
                self.host.forget_refusal(&origin);
                self.activate(plugin)
            }
            Err(Refused { plugin, reason }) => {
                self.host.refuse(Refusal { origin, plugin, digest, error: reason, at: Timestamp::now() });
                None
            }
        }
    }

    /// The candidate, unless another file has its name.
    fn if_free(&self, path: &Path, plugin: Plugin) -> Result<Plugin, Refused> {
        match owner(&self.files, plugin.name()).filter(|owner| *owner != path) {
            None => Ok(plugin),
            Some(owner) => {
                let reason = format!("has the name of the plugin in {}: remove one of the two files", owner.display());
                Err(Refused { plugin: Some(plugin.name().to_owned()), reason })
            }
        }
    }

    /// Swaps a version in, unless it is the active one already.
    fn activate(&self, plugin: Plugin) -> Option<Change> {
        let active = self.host.active(plugin.name());
        if active.is_some_and(|active| active.digest() == plugin.digest()) {
            return None;
        }
        let plugin = self.host.activate(plugin);
        let (name, manifest) = (Arc::from(plugin.name()), Arc::clone(plugin.manifest()));
        Some(Change::Loaded { handler: self.host.handler(&name), name, manifest })
    }
}

/// What a file has to do with a name after it was read: a refused candidate leaves what the file owned before.
fn claim(name: Option<String>, accepted: bool, earlier: Option<Claim>) -> Claim {
    match (accepted, name, earlier) {
        (true, Some(name), _) => Claim::Owns(name),
        (_, _, Some(Claim::Owns(name))) => Claim::Owns(name),
        (_, Some(name), _) => Claim::Wants(name),
        (_, None, _) => Claim::Nothing,
    }
}

/// The files to load, in order: those that are new or differ, then those whose name may have become free.
fn to_load(known: &Files, seen: &Seen) -> Vec<PathBuf> {
    let differs = |path: &PathBuf, digest: &Option<String>| known.get(path).is_none_or(|file| file.digest != *digest);
    let changed: BTreeSet<&PathBuf> =
        seen.iter().filter(|(path, digest)| differs(path, digest)).map(|(path, _)| path).collect();
    let may_be_free = |name: &str| match owner(known, name) {
        None => false,
        Some(owner) => !seen.contains_key(owner) || changed.contains(&owner.to_owned()),
    };
    let waiting = known.iter().filter(|(path, file)| {
        let wants = matches!(&file.claim, Claim::Wants(name) if may_be_free(name));
        wants && seen.contains_key(*path) && !changed.contains(path)
    });
    changed.iter().copied().chain(waiting.map(|(path, _)| path)).cloned().collect()
}

/// The names that files own.
fn owned(files: &Files) -> BTreeSet<String> {
    let names = files.values().filter_map(|file| match &file.claim {
        Claim::Owns(name) => Some(name.clone()),
        Claim::Wants(_) | Claim::Nothing => None,
    });
    names.collect()
}

fn owner<'a>(files: &'a Files, name: &str) -> Option<&'a Path> {
    let owns = |file: &Known| matches!(&file.claim, Claim::Owns(owned) if owned == name);
    files.iter().find(|(_, file)| owns(file)).map(|(path, _)| path.as_path())
}

fn read(directory: &Path) -> std::io::Result<Seen> {
    let mut seen = Seen::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "wasm") {
            let digest = std::fs::read(&path).ok().map(|bytes| digest(&bytes));
            seen.insert(path, digest);
        }
    }
    Ok(seen)
}

/// Reading files is told as well, and would be answered by reading them again.
fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(rows: &[(&str, &str, Claim)]) -> Files {
        let file = |(path, digest, claim): &(&str, &str, Claim)| {
            (PathBuf::from(path), Known { digest: Some((*digest).to_owned()), claim: claim.clone() })
        };
        rows.iter().map(file).collect()
    }

    fn seen(rows: &[(&str, &str)]) -> Seen {
        rows.iter().map(|(path, digest)| (PathBuf::from(path), Some((*digest).to_owned()))).collect()
    }

    fn owns(name: &str) -> Claim {
        Claim::Owns(name.to_owned())
    }

    fn wants(name: &str) -> Claim {
        Claim::Wants(name.to_owned())
    }

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn only_what_differs_is_loaded() {
        let files = known(&[("a", "1", owns("x")), ("b", "2", owns("y")), ("gone", "3", owns("z"))]);
        assert_eq!(to_load(&files, &seen(&[("a", "1"), ("b", "9"), ("c", "4")])), paths(&["b", "c"]));
        assert_eq!(to_load(&Files::new(), &seen(&[("b", "1"), ("a", "1")])), paths(&["a", "b"]));
    }

    #[test]
    fn a_bad_candidate_is_tried_once() {
        let files = known(&[("a", "bad", owns("x")), ("b", "bad", Claim::Nothing), ("c", "bad", wants("v"))]);
        assert!(to_load(&files, &seen(&[("a", "bad"), ("b", "bad"), ("c", "bad")])).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_tried_again_when_it_can() {
        let unreadable = Known { digest: None, claim: Claim::Nothing };
        let files = Files::from([(PathBuf::from("a"), unreadable)]);
        assert!(to_load(&files, &Seen::from([(PathBuf::from("a"), None)])).is_empty());
        assert_eq!(to_load(&files, &seen(&[("a", "1")])), paths(&["a"]));
    }

    #[test]
    fn a_file_that_wants_a_taken_name_gets_its_turn_when_the_owner_goes_or_changes() {
        let files = known(&[("a", "1", wants("x")), ("b", "2", owns("x"))]);
        assert!(to_load(&files, &seen(&[("a", "1"), ("b", "2")])).is_empty());
        assert_eq!(to_load(&files, &seen(&[("a", "1")])), paths(&["a"]));
        assert_eq!(to_load(&files, &seen(&[("a", "1"), ("b", "3")])), paths(&["b", "a"]));
    }

    #[test]
    fn a_refused_candidate_leaves_the_file_what_it_owned() {
        assert_eq!(claim(None, false, Some(owns("x"))), owns("x"));
        assert_eq!(claim(Some("y".into()), false, Some(owns("x"))), owns("x"));
        assert_eq!(claim(Some("y".into()), true, Some(owns("x"))), owns("y"));
        assert_eq!(claim(Some("y".into()), false, Some(Claim::Nothing)), wants("y"));
        assert_eq!(claim(None, false, Some(wants("y"))), Claim::Nothing);
        assert_eq!(claim(None, false, None), Claim::Nothing);
    }

    #[test]
    fn reading_a_file_is_no_change() {
        use notify::event::{CreateKind, RemoveKind};

        assert!(!is_change(EventKind::Access(AccessKind::Open(AccessMode::Read))));
        assert!(!is_change(EventKind::Access(AccessKind::Close(AccessMode::Read))));
        assert!(is_change(EventKind::Access(AccessKind::Close(AccessMode::Write))));
        assert!(is_change(EventKind::Create(CreateKind::File)) && is_change(EventKind::Remove(RemoveKind::File)));
        assert!(is_change(EventKind::Any) && is_change(EventKind::Other));
    }
}
