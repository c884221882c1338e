//! What stands in a folder: which files are candidates, whether they changed, and their bytes, up to a limit.
//!
//! A symlink stands for what it leads to, so that one that is switched is a change. Nothing here knows what a plugin is.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use bytesize::ByteSize;

/// How coarse the clocks of file systems are: FAT counts two seconds at a time. A file that changed this short a time
/// before it was read may change again without looking different.
const COARSE: Duration = Duration::from_secs(2);

/// What tells two states of a file apart without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    place: Place,
    size: u64,
    modified: Option<SystemTime>,
    /// Unlike the time of modification nobody can set this one: `cp -p` shows here, and so does `chmod`.
    changed: Option<SystemTime>,
}

/// Which file or folder it is, whatever it is called. An inode is given to another file once it is free, hence the birth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

/// A folder at one moment.
pub(super) struct Listing {
    /// Which folder it was.
    pub(super) place: Place,
    /// The candidates; `None` for one that leads nowhere or cannot be asked about.
    pub(super) files: BTreeMap<PathBuf, Option<Stamp>>,
}

/// A file as it was read.
pub(super) struct Content {
    /// How it looked just before; `None` when it could not even be asked.
    pub(super) stamp: Option<Stamp>,
    /// Its bytes, or why there are none.
    pub(super) bytes: Result<Bytes, String>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let changed = changed(metadata);
        Self { place: place(metadata), size: metadata.len(), modified: metadata.modified().ok(), changed }
    }

    /// How long it has looked like this by the clock of the file system, which may be another machine's.
    pub(super) fn age(&self, now: SystemTime) -> Duration {
        let latest = self.modified.max(self.changed);
        latest.and_then(|latest| now.duration_since(latest).ok()).unwrap_or_default()
    }

    /// Whether it may change once more and look the same.
    pub(super) fn is_young(&self) -> bool {
        self.age(SystemTime::now()) < COARSE
    }
}

/// Whether a file of this name is a candidate: `*.wasm`, and neither hidden nor what editors and copiers leave behind.
fn is_candidate(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.ends_with(b".wasm") && !name.starts_with(b".") && !name.starts_with(b"~")
}

/// The candidates of a folder, sub-folders left out.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn list(directory: &Path) -> io::Result<Listing> {
    let place = place(&std::fs::metadata(directory)?);
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if !is_candidate(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(metadata) => drop(files.insert(path, Some(Stamp::of(&metadata)))),
            // What went while the folder was read is not there; a link that leads nowhere is.
            Err(_) if std::fs::symlink_metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) => {}
            Err(_) => drop(files.insert(path, None)),
        }
    }
    Ok(Listing { place, files })
}

/// Reads a file of at most `limit` bytes. No more than that is ever held in memory.
pub(super) fn read(path: &Path, limit: ByteSize) -> Content {
    let unreadable = |error: io::Error| format!("cannot be read: {error}");
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return Content { stamp: None, bytes: Err(unreadable(error)) },
    };
    // Opening a pipe would wait for whoever writes to it.
    if !metadata.is_file() {
        return Content { stamp: Some(Stamp::of(&metadata)), bytes: Err("is not a regular file".to_owned()) };
    }
    let stamp = Some(Stamp::of(&metadata));
    if metadata.len() > limit.as_u64() {
        return Content { stamp, bytes: Err(too_large(metadata.len(), limit)) };
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    let read = File::open(path).and_then(|file| file.take(limit.as_u64().saturating_add(1)).read_to_end(&mut bytes));
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let bytes = match read {
        Ok(_) if size > limit.as_u64() => Err(too_large(size, limit)),
        Ok(_) => Ok(bytes.into()),
        Err(error) => Err(unreadable(error)),
    };
    Content { stamp, bytes }
}

fn too_large(size: u64, limit: ByteSize) -> String {
    format!("has at least {size} bytes, more than the limit of {limit}: make it smaller, or raise host.max_component")
}

/// A path as it is shown, also one that is not UTF-8: two paths never look the same.
pub(super) fn shown(path: &Path) -> String {
    match path.to_str() {
        Some(text) => text.to_owned(),
        None => path.as_os_str().as_encoded_bytes().escape_ascii().to_string(),
    }
}

#[cfg(unix)]
fn place(metadata: &Metadata) -> Place {
    use std::os::unix::fs::MetadataExt as _;
    Place { device: metadata.dev(), inode: metadata.ino(), born: metadata.created().ok() }
}

#[cfg(not(unix))]
fn place(metadata: &Metadata) -> Place {
    Place { device: 0, inode: 0, born: metadata.created().ok() }
}

#[cfg(unix)]
fn changed(metadata: &Metadata) -> Option<SystemTime> {
    use std::os::unix::fs::MetadataExt as _;
    let (seconds, nanos) = (u64::try_from(metadata.ctime()).ok()?, u32::try_from(metadata.ctime_nsec()).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

#[cfg(not(unix))]
fn changed(_: &Metadata) -> Option<SystemTime> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_and_temporary_names_are_no_candidates() {
        for name in ["a.wasm", "größe.wasm", "a b.wasm", "a.b.wasm"] {
            assert!(is_candidate(OsStr::new(name)), "{name}");
        }
        let others =
            [".wasm", ".a.wasm", "..data", "~a.wasm", "a.wasm~", "a.wasm.tmp", "a.wasm.part", "a.WASM", "wasm"];
        for name in others {
            assert!(!is_candidate(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn a_file_over_the_limit_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.wasm");
        // A hole: a terabyte that takes no room, and could not be read into memory.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let content = read(&path, ByteSize::mib(1));
        let words = content.bytes.unwrap_err();
        assert!(words.contains("1099511627776 bytes, more than the limit of 1.0 MiB"), "{words}");
        std::fs::write(&path, [0; 10]).unwrap();
        assert_eq!(read(&path, ByteSize::b(10)).bytes.unwrap().len(), 10);
        assert!(read(&path, ByteSize::b(9)).bytes.is_err());
    }

    #[test]
    fn whatever_changes_about_a_file_changes_its_stamp() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.wasm");
        let stamp = || list(folder.path()).unwrap().files.remove(&path).flatten();
        std::fs::write(&path, "one").unwrap();
        let first = stamp().unwrap();
        assert_eq!(stamp(), Some(first));
        assert!(first.is_young(), "it may be written again within the same tick");
        assert!(!Stamp { modified: None, changed: Some(SystemTime::now() - COARSE * 2), ..first }.is_young());
        // Another file with the same size and time of modification, as `cp -p` and a rename make it.
        let other = folder.path().join("other");
        std::fs::write(&other, "two").unwrap();
        File::open(&other).unwrap().set_modified(first.modified.unwrap()).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_ne!(stamp(), Some(first));
    }
}
