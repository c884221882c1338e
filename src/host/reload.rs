//! A folder of plugins: what is in it is served, and what changes in it is replaced.
//!
//! Notifications are hints without content, and a slow poll stands behind them. The truth is always read again from the
//! folder: names and stamps each time, bytes where those differ, and only what has another digest is built. Subscriptions
//! are bound elsewhere, from the [`Change`]s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use futures_util::stream;
use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use super::claims::{Claim, Name, stand_back};
use super::component::digest;
use super::files::{self, Content, Listing, Place, Stamp, shown};
use super::load::Refused;
use super::manifest::Manifest;
use super::registry::{Host, Plugin, Refusal};
use super::reloader::{Reloader, Request};
use crate::error::{Error, Result};
use crate::handler::Handler;

/// How long a folder must be quiet before it is read: what is put there together is loaded together.
const QUIET: Duration = Duration::from_millis(100);

/// The longest wait for quiet: a file that is written all the time must not keep others from being loaded.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a file that is no sound component must stay the same before it is refused: until then it may be half written.
const SETTLED: Duration = Duration::from_secs(2);

/// How often the folder is looked at although nothing hinted at a change: network folders send no notifications, and
/// others lose some.
const POLL: Duration = Duration::from_secs(5);

/// Files that are read and loaded side by side. The engine bounds how many of them are compiled at once.
const AT_ONCE: usize = 4;

/// Requests that wait for the follower; further ones wait to be sent.
const REQUESTS: usize = 16;

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
    /// No file has this name any more. The version that it had stays callable until [`Host::remove`], which is for whoever
    /// has taken it from those who call it.
    Removed {
        /// The plugin's name.
        name: Arc<str>,
    },
}

impl Change {
    /// The plugin's name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::Loaded { name, .. } | Self::Removed { name } => name,
        }
    }
}

/// A folder whose `*.wasm` files are the plugins of a host.
pub struct Folder {
    host: Host,
    directory: PathBuf,
    files: Files,
    watch: Watch,
    /// Whether a hint was seen that no reading has answered yet.
    stale: bool,
    looked_at: Option<Instant>,
    requests: mpsc::Receiver<Request>,
    /// Those who asked for a reading, and are answered once what came of it is in force.
    asked: Vec<Request>,
    reloader: Reloader,
}

/// What is known of each file.
type Files = BTreeMap<PathBuf, Known>;

/// The files that are there, and how they look.
type Seen = BTreeMap<PathBuf, Option<Stamp>>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    stamp: Option<Stamp>,
    /// Whether it may have changed since it was read and look the same.
    young: bool,
    digest: Option<String>,
    /// The names of the version that is served of it; a refused candidate leaves them.
    holds: Option<Claim>,
    state: State,
}

/// What came of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Served,
    Refused,
    /// Refused because another file has a name that it needs.
    StandsBack,
    /// No sound component, or not yet. Unchanged since then.
    Unfinished(Instant),
}

/// A file that was looked at again.
struct Look {
    path: PathBuf,
    stamp: Option<Stamp>,
    digest: Option<String>,
    found: Found,
}

enum Found {
    /// What it was before.
    Same,
    /// The version that is served by its name already.
    Active(Arc<Plugin>),
    New(Box<Plugin>),
    Refused(Refused),
}

impl Look {
    /// The names that it needs, where it can be served.
    fn claim(&self) -> Option<Claim> {
        match &self.found {
            Found::Active(plugin) => Some(Claim::of(plugin.manifest())),
            Found::New(plugin) => Some(Claim::of(plugin.manifest())),
            Found::Same | Found::Refused(_) => None,
        }
    }
}

/// Who tells of changes in a folder.
struct Watch {
    hints: Arc<Notify>,
    /// The folder that is watched, which may have another name by now.
    place: Option<Place>,
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Watches nothing yet.
    fn idle() -> Self {
        Self { hints: Arc::default(), place: None, _watcher: None }
    }

    /// Watches what `directory` leads to. Where that is not possible there is the poll.
    fn begin(&mut self, directory: &Path, place: Place) {
        let hint = Arc::clone(&self.hints);
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
        if let Err(error) = &watcher {
            tracing::warn!(directory = %directory.display(), %error, every = ?POLL, "the folder of plugins is only polled");
        }
        (self.place, self._watcher) = (Some(place), watcher.ok());
    }
}

impl Folder {
    /// Begins to follow a folder. Nothing is loaded before the first [`scan`](Self::scan).
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `plugins` when there is no such folder.
    pub fn open(host: Host, directory: &Path) -> Result<Self> {
        if !directory.is_dir() {
            return Err(Error::invalid("plugins", shown(directory), "must be an existing folder"));
        }
        let (sender, requests) = mpsc::channel(REQUESTS);
        Ok(Self {
            reloader: Reloader::new(host.clone(), sender),
            host,
            directory: directory.to_owned(),
            files: Files::new(),
            watch: Watch::idle(),
            stale: true,
            looked_at: None,
            requests,
            asked: Vec::new(),
        })
    }

    /// Asks whoever follows this folder to look at it now.
    #[must_use]
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Waits until it is time to [`scan`](Self::scan): something changed and the folder is quiet again, somebody asked,
    /// or nothing hinted at a change for a while. Before the first scan it waits for quiet only.
    ///
    /// Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        if !self.stale {
            let due = due(&self.files, self.looked_at.unwrap_or_else(Instant::now));
            tokio::select! {
                () = self.watch.hints.notified() => self.stale = true,
                () = sleep_until(due) => return,
                asked = self.requests.recv() => {
                    self.asked.extend(asked);
                    return;
                }
            }
        }
        let latest = Instant::now() + PATIENCE;
        while Instant::now() < latest && timeout(QUIET, self.watch.hints.notified()).await.is_ok() {}
    }

    /// Reads what differs in the folder and loads it, or everything when a [`Reloader`] asked. A candidate that is refused
    /// leaves the version before it serving.
    ///
    /// To be awaited to its end: the changes are told once. Who asked is answered by [`answer`](Self::answer).
    ///
    /// # Errors
    /// [`Error::Invalid`] when the folder itself cannot be read; all plugins stay as they are.
    pub async fn scan(&mut self) -> Result<Vec<Change>> {
        while let Ok(asked) = self.requests.try_recv() {
            self.asked.push(asked);
        }
        self.stale = false;
        let (now, first) = (Instant::now(), self.looked_at.is_none());
        self.looked_at = Some(now);
        let seen = self.list().await?.files;
        let before = held(&self.files);
        self.forget_missing(&seen);
        let thorough = !self.asked.is_empty();
        let paths = to_look_at(&self.files, &seen, thorough, held(&self.files) != before, now);
        let looks = self.look_at(paths, thorough).await;
        let candidates = looks.iter().filter_map(|look| Some((look.path.clone(), look.claim()?))).collect();
        let mut back = stand_back(&held(&self.files), &candidates);
        let mut loaded = Vec::new();
        for look in looks {
            let back = back.remove(&look.path);
            let unchanged_since = self.unchanged_since(&look, first);
            let patience = if thorough { Duration::ZERO } else { SETTLED };
            loaded.extend(self.take(look, back, unchanged_since, patience));
        }
        let gone = names(&before).difference(&names(&held(&self.files))).cloned().collect::<Vec<_>>();
        let removed = gone.into_iter().map(|name| Change::Removed { name: name.into() });
        Ok(removed.chain(loaded).collect())
    }

    /// Tells those who asked what came of it, once the changes of the last [`scan`](Self::scan) are in force.
    pub fn answer(&mut self, outcome: impl Fn() -> Result<()>) {
        for asked in self.asked.drain(..) {
            // Who asked may have gone.
            let _ = asked.send(outcome());
        }
    }

    /// Lists the folder. One that was removed and made again, or is reached by another link, is watched anew first.
    async fn list(&mut self) -> Result<Listing> {
        // Whatever is there when it can be read again is watched anew.
        let listing = self.list_once().await.inspect_err(|_| self.watch.place = None)?;
        if self.watch.place == Some(listing.place) {
            return Ok(listing);
        }
        self.watch.begin(&self.directory, listing.place);
        self.list_once().await
    }

    async fn list_once(&self) -> Result<Listing> {
        let directory = self.directory.clone();
        let listing = blocking(move || files::list(&directory)).await.and_then(std::convert::identity);
        listing.map_err(|error| Error::invalid("plugins", shown(&self.directory), format!("cannot be read: {error}")))
    }

    fn forget_missing(&mut self, seen: &Seen) {
        let host = &self.host;
        self.files.retain(|path, _| {
            let stays = seen.contains_key(path);
            if !stays {
                host.forget_refusal(&shown(path));
            }
            stays
        });
    }

    /// Looks at files side by side; what came of it is in their order.
    async fn look_at(&self, paths: Vec<PathBuf>, thorough: bool) -> Vec<Look> {
        let looks = paths.into_iter().map(|path| {
            // What is waiting for something else than other bytes is looked at whatever they are.
            let same = self.files.get(&path).filter(|known| !thorough && is_final(known));
            look_at(self.host.clone(), same.and_then(|known| known.digest.clone()), path)
        });
        stream::iter(looks).buffered(AT_ONCE).collect().await
    }

    /// Since when the file has looked as it does.
    fn unchanged_since(&self, look: &Look, first: bool) -> Instant {
        let now = Instant::now();
        match self.files.get(&look.path) {
            Some(Known { stamp, state: State::Unfinished(since), .. }) if *stamp == look.stamp => *since,
            // What lay there at the start was not seen before; its own times have to do.
            None if first => {
                let age = look.stamp.map_or(SETTLED, |stamp| stamp.age(SystemTime::now()));
                now.checked_sub(age).unwrap_or(now)
            }
            _ => now,
        }
    }

    /// Takes over what was found in a file, and says what changed by that.
    fn take(
        &mut self,
        look: Look,
        back: Option<(Name, PathBuf)>,
        unchanged_since: Instant,
        patience: Duration,
    ) -> Option<Change> {
        let Look { path, stamp, digest, found } = look;
        let known = self.files.remove(&path);
        let young = stamp.is_some_and(|stamp| stamp.is_young());
        let holds = known.as_ref().and_then(|known| known.holds.clone());
        let origin = shown(&path);
        // Where the candidate does not say whose version it wants to be, it is taken for one of what its file serves.
        let own = holds.as_ref().map(|claim| claim.plugin.clone());
        let refuse = |plugin: Option<String>, reason: String| {
            let plugin = plugin.or_else(|| own.clone());
            let refusal =
                Refusal { origin: origin.clone(), plugin, digest: digest.clone(), error: reason, at: Timestamp::now() };
            self.host.refuse(refusal);
        };
        let (holds, state, change) = match (found, back) {
            (Found::Same, _) => (holds, known.map_or(State::Refused, |known| known.state), None),
            (Found::Refused(Refused { plugin: None, .. }), _) if unchanged_since.elapsed() < patience => {
                tracing::debug!(origin, "no sound component yet");
                (holds, State::Unfinished(unchanged_since), None)
            }
            (Found::Refused(Refused { plugin, reason }), _) => {
                refuse(plugin, reason);
                (holds, State::Refused, None)
            }
            (found, Some((name, owner))) => {
                let plugin = match found {
                    Found::New(plugin) => Some(plugin.name().to_owned()),
                    Found::Active(plugin) => Some(plugin.name().to_owned()),
                    Found::Same | Found::Refused(_) => None,
                };
                refuse(plugin, name.taken_by(&owner));
                (holds, State::StandsBack, None)
            }
            (Found::Active(plugin), None) => {
                self.host.forget_refusal(&origin);
                (Some(Claim::of(plugin.manifest())), State::Served, None)
            }
            (Found::New(plugin), None) => {
                self.host.forget_refusal(&origin);
                let plugin = self.host.activate(*plugin);
                let (name, manifest) = (Arc::from(plugin.name()), Arc::clone(plugin.manifest()));
                let change = Change::Loaded { handler: self.host.handler(&name), name, manifest };
                (Some(Claim::of(plugin.manifest())), State::Served, Some(change))
            }
        };
        self.files.insert(path, Known { stamp, young, digest, holds, state });
        change
    }
}

/// Reads a file and makes a candidate of it, unless it has the digest `same`.
async fn look_at(host: Host, same: Option<String>, path: PathBuf) -> Look {
    let (file, limit) = (path.clone(), host.options().max_component);
    let work = move || {
        let Content { stamp, bytes } = files::read(&file, limit);
        (stamp, bytes.map(|bytes| (digest(&bytes), bytes)))
    };
    let (stamp, read) = match blocking(work).await {
        Ok(read) => read,
        Err(error) => (None, Err(format!("cannot be read: {error}"))),
    };
    let (digest, found) = match read {
        Err(reason) => (None, Found::Refused(Refused { plugin: None, reason })),
        Ok((digest, _)) if same.as_ref() == Some(&digest) => (Some(digest), Found::Same),
        Ok((digest, bytes)) => {
            let found = match host.active_of(&digest) {
                Some(active) => Found::Active(active),
                None => match host.candidate(digest.as_str().into(), bytes).await {
                    Ok(plugin) => Found::New(Box::new(plugin)),
                    Err(refused) => Found::Refused(refused),
                },
            };
            (Some(digest), found)
        }
    };
    Look { path, stamp, digest, found }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)
}

/// Whether other bytes are all that can make a difference to what came of the file.
fn is_final(known: &Known) -> bool {
    matches!(known.state, State::Served | State::Refused)
}

/// The files to look at, in order: those that may have changed, or all; and when names may have become free, those that
/// stand back.
fn to_look_at(known: &Files, seen: &Seen, thorough: bool, freed: bool, now: Instant) -> Vec<PathBuf> {
    let differs = |path: &PathBuf, stamp: &Option<Stamp>| {
        let is_due = |file: &Known| matches!(file.state, State::Unfinished(since) if now >= since + SETTLED);
        known.get(path).is_none_or(|file| thorough || file.stamp != *stamp || file.young || is_due(file))
    };
    let changed: BTreeSet<&PathBuf> =
        seen.iter().filter(|(path, stamp)| differs(path, stamp)).map(|(path, _)| path).collect();
    let waits = |path: &PathBuf| known.get(path).is_some_and(|file| file.state == State::StandsBack);
    let is_wanted = |path: &&PathBuf| changed.contains(*path) || waits(path) && (freed || !changed.is_empty());
    seen.keys().filter(is_wanted).cloned().collect()
}

/// When the folder is to be looked at again although nothing hints at a change.
fn due(known: &Files, looked_at: Instant) -> Instant {
    let unfinished = known.values().filter_map(|file| match file.state {
        State::Unfinished(since) => Some(since + SETTLED),
        _ => None,
    });
    unfinished.fold(looked_at + POLL, Ord::min)
}

/// What files have by what is served of them.
fn held(files: &Files) -> BTreeMap<PathBuf, Claim> {
    files.iter().filter_map(|(path, file)| Some((path.clone(), file.holds.clone()?))).collect()
}

/// The plugins among them.
fn names(held: &BTreeMap<PathBuf, Claim>) -> BTreeSet<String> {
    held.values().map(|claim| claim.plugin.clone()).collect()
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

    fn known(state: State) -> Known {
        Known { stamp: None, young: false, digest: Some("d".to_owned()), holds: None, state }
    }

    fn files(rows: Vec<(&str, Known)>) -> Files {
        rows.into_iter().map(|(path, known)| (PathBuf::from(path), known)).collect()
    }

    /// Files that look as they did.
    fn seen(names: &[&str]) -> Seen {
        names.iter().map(|name| (PathBuf::from(name), None)).collect()
    }

    /// The stamp of a file that is there.
    fn stamp() -> Option<Stamp> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.wasm"), "").unwrap();
        files::list(folder.path()).unwrap().files.into_values().next().unwrap()
    }

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn only_what_may_differ_is_looked_at() {
        let now = Instant::now();
        let young = Known { young: true, ..known(State::Served) };
        let files = files(vec![("a", known(State::Served)), ("b", known(State::Refused)), ("c", young)]);
        assert_eq!(to_look_at(&files, &seen(&["a", "b"]), false, true, now), paths(&[]));
        assert_eq!(to_look_at(&files, &seen(&["a", "b", "c", "new"]), false, false, now), paths(&["c", "new"]));
        let changed = Seen::from([("a".into(), None), ("b".into(), stamp())]);
        assert_eq!(to_look_at(&files, &changed, false, false, now), paths(&["b"]));
        assert_eq!(to_look_at(&files, &seen(&["a", "b"]), true, false, now), paths(&["a", "b"]));
    }

    #[test]
    fn who_stands_back_gets_a_turn_when_anything_else_moves() {
        let now = Instant::now();
        let files = files(vec![("a", known(State::StandsBack)), ("b", known(State::Served))]);
        assert_eq!(to_look_at(&files, &seen(&["a", "b"]), false, false, now), paths(&[]));
        assert_eq!(to_look_at(&files, &seen(&["a"]), false, true, now), paths(&["a"]));
        let changed = Seen::from([("a".into(), None), ("b".into(), stamp())]);
        assert_eq!(to_look_at(&files, &changed, false, false, now), paths(&["a", "b"]));
    }

    #[test]
    fn what_may_be_half_written_is_looked_at_again_once_it_has_settled() {
        let now = Instant::now();
        let files = files(vec![("a", known(State::Unfinished(now))), ("b", known(State::Served))]);
        assert_eq!(to_look_at(&files, &seen(&["a", "b"]), false, false, now), paths(&[]));
        assert_eq!(to_look_at(&files, &seen(&["a", "b"]), false, false, now + SETTLED), paths(&["a"]));
        assert_eq!(due(&files, now), now + SETTLED);
        assert_eq!(due(&Files::new(), now), now + POLL);
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
