//! Compiled code by digest, in a folder that only this user can write to.
//!
//! The cache is a shortcut and nothing else: whatever goes wrong with it, the component is compiled again. Code that
//! this process's user did not write is never loaded: that is what the folder's mode is checked for. Several processes
//! may share the folder: entries appear whole, by renaming, and one that another process removed is compiled again.

use std::fs::{self, File};
use std::hash::{Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::error::{Error, Result};

/// Length of the checksum before the code.
const CHECKSUM: usize = 32;

/// What an entry's name ends in.
const ENTRY: &str = ".code";

/// What the name of a file ends in that is being written.
const UNFINISHED: &str = ".part";

/// A file that is older is not being written any more: whoever began it is gone.
const WRITING: Duration = Duration::from_secs(60 * 60);

/// An entry in use is marked as such again when its mark is older.
const MARKED: Duration = Duration::from_secs(24 * 60 * 60);

/// How much is kept, and for how long.
#[derive(Clone, Copy)]
struct Bounds {
    /// Entries that nobody used for so long are removed.
    unused: Duration,
    /// What all entries may have together, in bytes; the ones unused for longest go first.
    size: u64,
}

/// A version that comes back after a month has been forgotten by everybody, and a gigabyte is ten thousand small
/// plugins or sixty in Python.
const BOUNDS: Bounds = Bounds { unused: Duration::from_secs(30 * 24 * 60 * 60), size: 1 << 30 };

/// A folder that may become a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    /// Whether somebody asked for it: then one that cannot be used is an error.
    pub(super) required: bool,
}

/// A folder of compiled components.
pub(super) struct Cache {
    folder: PathBuf,
    bounds: Bounds,
    /// Names of entries that this process has loaded or written, and the digests that live as long as their plugins.
    used: Mutex<Vec<(String, Weak<str>)>>,
}

impl Cache {
    /// Makes the folder where it is missing, and clears it of what nobody uses. `None` when it cannot be used and
    /// nobody asked for it, which is said in the log.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `host.cache`, for a folder that was asked for and is not private or not writable.
    pub(super) fn open(Folder { path, required }: &Folder) -> Result<Option<Self>> {
        match private(path) {
            Ok(()) => {
                let cache = Self { folder: path.clone(), bounds: BOUNDS, used: Mutex::default() };
                cache.prune();
                Ok(Some(cache))
            }
            Err(error) if *required => {
                Err(Error::invalid("host.cache", path.to_string_lossy(), format!("cannot be used: {error}")))
            }
            Err(error) => {
                let folder = path.display();
                tracing::warn!(%folder, %error, "compiled code is not kept: set host.cache to another folder or \"off\"");
                Ok(None)
            }
        }
    }

    /// The compiled form of the component with this digest, if it was kept whole by such an engine.
    pub(super) fn get(&self, engine: &Engine, digest: &Arc<str>) -> Option<Component> {
        let name = name(engine, digest);
        let path = self.folder.join(&name);
        let kept = fs::read(&path).ok()?;
        let Some(code) = kept.get(CHECKSUM..).filter(|code| kept.starts_with(&checksum(&name, code))) else {
            tracing::warn!(path = %path.display(), "compiled code is damaged, the component is compiled again");
            return None;
        };
        // An engine of the same settings may still have no room for it in its pool.
        let component = load(engine, code)?;
        mark(&path);
        self.uses(name, digest);
        Some(component)
    }

    /// Keeps the compiled form of the component with this digest.
    pub(super) fn put(&self, engine: &Engine, digest: &Arc<str>, component: &Component) {
        let name = name(engine, digest);
        if let Err(error) = self.write(&name, component) {
            tracing::warn!(folder = %self.folder.display(), error = format!("{error:#}"), "compiled code is not kept");
        }
        self.uses(name, digest);
        self.prune();
    }

    fn write(&self, name: &str, component: &Component) -> wasmtime::Result<()> {
        let code = component.serialize()?;
        let mut file = tempfile::Builder::new().suffix(UNFINISHED).tempfile_in(&self.folder)?;
        file.write_all(&checksum(name, &code))?;
        file.write_all(&code)?;
        file.persist(self.folder.join(name))?;
        Ok(())
    }

    fn uses(&self, name: String, digest: &Arc<str>) {
        let mut used = self.used.lock();
        used.retain(|(_, plugin)| plugin.strong_count() > 0);
        used.push((name, Arc::downgrade(digest)));
    }

    fn is_used(&self, name: &str) -> bool {
        let used = self.used.lock();
        used.iter().any(|(known, plugin)| known == name && plugin.strong_count() > 0)
    }

    /// Removes what is beyond the bounds, whatever engine it is for, and what was never finished. What this process
    /// uses stays, and is marked so that other processes let it be.
    fn prune(&self) {
        let mut entries = self.entries().unwrap_or_default();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.marked));
        let mut size = 0_u64;
        for Entry { path, name, age, length, .. } in entries {
            size = size.saturating_add(length);
            let is_over = age > self.bounds.unused || size > self.bounds.size;
            if name.ends_with(UNFINISHED) {
                remove_if(age > WRITING, &path);
            } else if !self.is_used(&name) {
                remove_if(is_over, &path);
            } else if age > MARKED {
                mark(&path);
            }
        }
    }

    /// The files that are ours; any others in the folder are nobody's business.
    fn entries(&self) -> std::io::Result<Vec<Entry>> {
        let now = SystemTime::now();
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let metadata = entry.metadata().ok()?;
            let is_ours = metadata.is_file() && (name.ends_with(ENTRY) || name.ends_with(UNFINISHED));
            let marked = metadata.modified().ok().filter(|_| is_ours)?;
            let age = now.duration_since(marked).unwrap_or_default();
            Some(Entry { path: entry.path(), name, marked, age, length: metadata.len() })
        };
        Ok(fs::read_dir(&self.folder)?.filter_map(|entry| read(entry.ok()?)).collect())
    }
}

/// A file of the cache.
struct Entry {
    path: PathBuf,
    name: String,
    /// When it was written or used last.
    marked: SystemTime,
    age: Duration,
    length: u64,
}

fn remove_if(condition: bool, path: &Path) {
    if condition && let Err(error) = fs::remove_file(path) {
        // Another process may have been faster.
        tracing::debug!(path = %path.display(), %error, "compiled code cannot be removed");
    }
}

/// Notes that an entry was used now. Without the mark it goes earlier, and no harm is done.
fn mark(path: &Path) {
    let marked = File::options().write(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = marked {
        tracing::debug!(path = %path.display(), %error, "compiled code cannot be marked as used");
    }
}

/// An entry's name stands for the component and for the engine's version and settings: code of another engine is
/// never even opened.
fn name(engine: &Engine, digest: &str) -> String {
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{}-{:016x}{ENTRY}", digest.replace(':', "-"), hasher.finish())
}

/// Over the name too: an entry under another's name is as wrong as a damaged one.
fn checksum(name: &str, code: &[u8]) -> [u8; CHECKSUM] {
    Sha256::new().chain_update(name).chain_update(code).finalize().into()
}

#[expect(unsafe_code, reason = "loading compiled code is unsafe by nature; see the comment on why this code is ours")]
fn load(engine: &Engine, code: &[u8]) -> Option<Component> {
    // SAFETY: the code was written by `Cache::write` of this user with an engine of the same fingerprint: the folder
    // was refused unless it is this user's and nobody else can write to it, and the checksum shows that it is whole.
    unsafe { Component::deserialize(engine, code) }.ok()
}

/// The compiled form of a component for another engine of the same settings.
///
/// # Errors
/// Those of the engine, when its settings differ.
#[expect(unsafe_code, reason = "loading compiled code is unsafe by nature; see the comment on why this code is ours")]
pub(super) fn copy(component: &Component, engine: &Engine) -> wasmtime::Result<Component> {
    let code = component.serialize()?;
    // SAFETY: the code was made by this process, and has not left it.
    unsafe { Component::deserialize(engine, code) }
}

#[cfg(unix)]
fn private(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};

    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let metadata = fs::symlink_metadata(folder)?;
    let refuse = |reason: &str| Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, reason.to_owned()));
    if !metadata.is_dir() {
        return refuse("must be a folder");
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return refuse("must be accessible to its owner only: chmod 700 it, or name a folder that does not exist yet");
    }
    // A file that we make there shows who we are, without asking the system by other means.
    if tempfile::tempfile_in(folder)?.metadata()?.uid() != metadata.uid() {
        return refuse("must belong to the user that runs tidegate");
    }
    Ok(())
}

#[cfg(not(unix))]
fn private(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn component(engine: &Engine) -> Component {
        Component::from_binary(engine, &wat::parse_str("(component)").unwrap()).unwrap()
    }

    fn digest(n: u8) -> Arc<str> {
        format!("sha256:{n:02}").into()
    }

    fn open(parent: &tempfile::TempDir) -> Cache {
        let folder = Folder { path: parent.path().join("code"), required: true };
        Cache::open(&folder).unwrap().unwrap()
    }

    /// The names in the folder, sorted.
    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<_> = cache.entries().unwrap().into_iter().map(|entry| entry.name).collect();
        names.sort();
        names
    }

    fn age(cache: &Cache, name: &str, age: Duration) {
        let file = File::options().write(true).open(cache.folder.join(name)).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    #[test]
    fn what_was_kept_is_found_again_by_digest() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let cache = open(&parent);
        assert!(cache.get(&engine, &digest(1)).is_none());
        cache.put(&engine, &digest(1), &component(&engine));
        assert!(cache.get(&engine, &digest(1)).is_some());
        assert!(cache.get(&engine, &digest(2)).is_none());
    }

    #[test]
    fn damaged_code_is_not_loaded_and_is_replaced() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let cache = open(&parent);
        cache.put(&engine, &digest(1), &component(&engine));
        let path = cache.folder.join(name(&engine, &digest(1)));
        let whole = fs::read(&path).unwrap();
        for (length, byte) in [(0, None), (10, None), (whole.len() - 1, None), (whole.len(), Some(CHECKSUM + 100))] {
            let mut damaged = whole.get(..length).unwrap().to_vec();
            if let Some(byte) = byte {
                damaged[byte] ^= 1;
            }
            fs::write(&path, damaged).unwrap();
            assert!(cache.get(&engine, &digest(1)).is_none(), "{length} {byte:?}");
        }
        cache.put(&engine, &digest(1), &component(&engine));
        assert!(cache.get(&engine, &digest(1)).is_some(), "rebuilt");
    }

    #[test]
    fn code_under_the_name_of_another_component_is_not_loaded() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let cache = open(&parent);
        cache.put(&engine, &digest(1), &component(&engine));
        let [one, two] = [1, 2].map(|n| cache.folder.join(name(&engine, &digest(n))));
        fs::rename(one, two).unwrap();
        assert!(cache.get(&engine, &digest(2)).is_none());
    }

    #[test]
    fn code_of_another_engine_is_not_found() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let cache = open(&parent);
        cache.put(&engine, &digest(1), &component(&engine));
        let other = Engine::new(wasmtime::Config::new().consume_fuel(true)).unwrap();
        assert!(cache.get(&other, &digest(1)).is_none());
    }

    #[test]
    fn code_that_nobody_used_for_long_goes_whatever_engine_it_is_for() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let other = Engine::new(wasmtime::Config::new().consume_fuel(true)).unwrap();
        let cache = open(&parent);
        let kept = digest(9);
        for (engine, digest) in [(&engine, &digest(1)), (&other, &digest(1)), (&engine, &digest(2)), (&engine, &kept)] {
            cache.put(engine, digest, &component(engine));
        }
        let foreign = cache.folder.join("notes.txt");
        fs::write(&foreign, "not ours").unwrap();
        fs::write(cache.folder.join("a.part"), "begun by a process that is gone").unwrap();
        fs::write(cache.folder.join("b.part"), "being written").unwrap();
        for old in [name(&engine, &digest(1)), name(&other, &digest(1)), name(&engine, &kept), "a.part".to_owned()] {
            age(&cache, &old, 31 * DAY);
        }
        age(&cache, &name(&engine, &digest(2)), 29 * DAY);
        cache.prune();
        let mut expected = vec![name(&engine, &digest(2)), name(&engine, &kept), "b.part".to_owned()];
        expected.sort();
        assert_eq!(names(&cache), expected);
        assert!(foreign.exists());
        let marked = |name: &str| cache.entries().unwrap().into_iter().find(|entry| entry.name == name).unwrap().age;
        assert!(marked(&name(&engine, &kept)) < DAY, "what is in use is marked again, for other processes to see");
        drop(kept);
        age(&cache, &name(&engine, &digest(9)), 31 * DAY);
        assert_eq!(names(&open(&parent)).len(), 2, "nobody uses it any more, and opening clears it away");
    }

    #[test]
    fn beyond_the_size_what_was_unused_for_longest_goes_first() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let mut cache = open(&parent);
        for n in 1..=5 {
            cache.put(&engine, &digest(n), &component(&engine));
            age(&cache, &name(&engine, &digest(n)), u32::from(n) * DAY);
        }
        let oldest = digest(5);
        let lengths: Vec<_> = cache.entries().unwrap().into_iter().map(|entry| entry.length).collect();
        cache.bounds.size = lengths[0] * 2;
        cache.uses(name(&engine, &oldest), &oldest);
        cache.prune();
        assert_eq!(names(&cache), [1, 2, 5].map(|n| name(&engine, &digest(n))), "the oldest is in use");
    }

    #[test]
    fn using_an_entry_keeps_it_longer() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let cache = open(&parent);
        cache.put(&engine, &digest(1), &component(&engine));
        age(&cache, &name(&engine, &digest(1)), 29 * DAY);
        assert!(cache.get(&engine, &digest(1)).is_some());
        assert!(cache.entries().unwrap()[0].age < DAY);
    }

    #[test]
    fn two_processes_on_one_folder_find_whole_entries_or_none() {
        let (parent, engine) = (tempfile::tempdir().unwrap(), Engine::default());
        let component = component(&engine);
        let work = |remove: bool| {
            let cache = open(&parent);
            for n in 0..200_u8 {
                let digest = digest(n % 4);
                cache.put(&engine, &digest, &component);
                if remove {
                    remove_if(true, &cache.folder.join(name(&engine, &digest)));
                }
                let path = cache.folder.join(name(&engine, &digest));
                if let Ok(kept) = fs::read(path) {
                    let code = kept.get(CHECKSUM..).unwrap();
                    assert!(kept.starts_with(&checksum(&name(&engine, &digest), code)));
                }
            }
        };
        std::thread::scope(|scope| {
            for remove in [true, false, false] {
                scope.spawn(move || work(remove));
            }
        });
        assert!(names(&open(&parent)).iter().all(|name| name.ends_with(ENTRY)), "nothing unfinished is left");
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_is_not_private_is_refused_when_asked_for_and_passed_over_otherwise() {
        use std::os::unix::fs::{PermissionsExt as _, symlink};

        let parent = tempfile::tempdir().unwrap();
        let path = |name: &str| parent.path().join(name);
        fs::create_dir(path("open")).unwrap();
        fs::set_permissions(path("open"), fs::Permissions::from_mode(0o770)).unwrap();
        fs::write(path("file"), "").unwrap();
        fs::create_dir(path("private")).unwrap();
        fs::set_permissions(path("private"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink(path("private"), path("link")).unwrap();
        for (name, words) in [("open", "chmod 700"), ("file", "exists"), ("link", "must be a folder"), ("file/sub", "")]
        {
            let folder = Folder { path: path(name), required: true };
            let error = Cache::open(&folder).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("host.cache") && error.contains(words), "{error}");
            assert!(Cache::open(&Folder { required: false, ..folder }).unwrap().is_none(), "{name}");
        }
        let made = Folder { path: path("a/b"), required: true };
        assert!(Cache::open(&made).unwrap().is_some());
        assert_eq!(fs::metadata(&made.path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
