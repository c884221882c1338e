//! Compiled code by digest, in a folder that only this user can write to.
//!
//! The cache is a shortcut and nothing else: whatever goes wrong with it, the component is compiled again. Code that
//! this process's user did not write is never loaded: that is what the folder's mode is checked for.

use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::error::{Error, Result};

/// Length of the checksum before the code.
const CHECKSUM: usize = 32;

/// A folder of compiled components.
pub(super) struct Cache {
    folder: PathBuf,
    /// Stands for the engine's version and settings: code of another one is never even opened.
    fingerprint: u64,
}

impl Cache {
    /// Makes the folder where it is missing, and refuses one that others could write to.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `host.cache`.
    pub(super) fn open(folder: &Path, engine: &Engine) -> Result<Self> {
        private(folder)
            .map_err(|reason| Error::invalid("host.cache", folder.to_string_lossy(), format!("{reason}")))?;
        let mut hasher = std::hash::DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        Ok(Self { folder: folder.to_owned(), fingerprint: hasher.finish() })
    }

    /// The compiled form of the component with this digest, if it was kept whole.
    pub(super) fn get(&self, engine: &Engine, digest: &str) -> Option<Component> {
        let path = self.path(digest);
        let kept = fs::read(&path).ok()?;
        let code = kept.get(CHECKSUM..).filter(|code| kept.starts_with(&Sha256::digest(code)));
        let component = code.and_then(|code| load(engine, code));
        if component.is_none() {
            tracing::warn!(path = %path.display(), "compiled code is damaged, the component is compiled again");
        }
        component
    }

    /// Keeps the compiled form of the component with this digest.
    pub(super) fn put(&self, digest: &str, component: &Component) {
        if let Err(error) = self.write(digest, component) {
            tracing::warn!(folder = %self.folder.display(), error = format!("{error:#}"), "compiled code is not kept");
        }
    }

    fn write(&self, digest: &str, component: &Component) -> wasmtime::Result<()> {
        let code = component.serialize()?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(&Sha256::digest(&code))?;
        file.write_all(&code)?;
        file.persist(self.path(digest))?;
        Ok(())
    }

    fn path(&self, digest: &str) -> PathBuf {
        let name = digest.replace(':', "-");
        self.folder.join(format!("{name}-{:016x}.code", self.fingerprint))
    }
}

#[expect(unsafe_code, reason = "loading compiled code is unsafe by nature; see the comment on why this code is ours")]
fn load(engine: &Engine, code: &[u8]) -> Option<Component> {
    // SAFETY: the code was written by `Cache::write` of this user with an engine of the same fingerprint: the folder
    // was refused unless it is this user's and nobody else can write to it, and the checksum shows that it is whole.
    unsafe { Component::deserialize(engine, code) }.ok()
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

    fn component(engine: &Engine) -> Component {
        Component::from_binary(engine, &wat::parse_str("(component)").unwrap()).unwrap()
    }

    #[test]
    fn what_was_kept_is_found_again_by_digest() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        let cache = Cache::open(&folder.path().join("code"), &engine).unwrap();
        assert!(cache.get(&engine, "sha256:01").is_none());
        cache.put("sha256:01", &component(&engine));
        assert!(cache.get(&engine, "sha256:01").is_some());
        assert!(cache.get(&engine, "sha256:02").is_none());
    }

    #[test]
    fn damaged_code_is_not_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        let cache = Cache::open(&folder.path().join("code"), &engine).unwrap();
        cache.put("sha256:01", &component(&engine));
        let path = cache.path("sha256:01");
        let whole = fs::read(&path).unwrap();
        for (length, byte) in [(0, None), (10, None), (whole.len() - 1, None), (whole.len(), Some(CHECKSUM + 100))] {
            let mut damaged = whole.get(..length).unwrap().to_vec();
            if let Some(byte) = byte {
                damaged[byte] ^= 1;
            }
            fs::write(&path, damaged).unwrap();
            assert!(cache.get(&engine, "sha256:01").is_none(), "{length} {byte:?}");
        }
        cache.put("sha256:01", &component(&engine));
        assert!(cache.get(&engine, "sha256:01").is_some(), "rebuilt");
    }

    #[test]
    fn code_of_another_engine_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::default();
        Cache::open(&folder.path().join("code"), &engine).unwrap().put("sha256:01", &component(&engine));
        let other = Engine::new(wasmtime::Config::new().consume_fuel(true)).unwrap();
        assert!(Cache::open(&folder.path().join("code"), &other).unwrap().get(&other, "sha256:01").is_none());
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let error = Cache::open(folder.path(), &Engine::default()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("chmod 700") && error.contains("host.cache"), "{error}");
    }
}
