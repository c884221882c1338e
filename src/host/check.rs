//! Checking a file or a whole folder as a server would load it, short of serving it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::claims::{Claim, stand_back};
use super::component;
use super::files::{list, read, shown};
use super::manifest::Manifest;
use super::options::Options;
use super::registry::{Checked, check};
use crate::error::{Error, Result};

/// A file that was checked.
#[derive(Debug)]
pub struct CheckedFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says about itself, where that can be read.
    pub manifest: Option<Manifest>,
    /// What was found, or why a server would refuse it.
    pub outcome: Result<Checked>,
}

/// Checks a file, or every candidate of a folder, also against each other.
///
/// # Errors
/// [`Error::NotFound`] when there is nothing at `path`, [`Error::Invalid`] for a folder that cannot be read. What is wrong
/// with a file is told in its [`CheckedFile`].
pub async fn check_files(options: &Options, path: &Path) -> Result<Vec<CheckedFile>> {
    if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Err(Error::not_found("file", shown(path)));
    }
    if !path.is_dir() {
        return Ok(vec![check_file(options, path.to_owned()).await]);
    }
    let unreadable = |error| Error::invalid("folder", shown(path), format!("cannot be read: {error}"));
    let mut files = Vec::new();
    for path in list(path).map_err(unreadable)?.files.into_keys() {
        files.push(check_file(options, path).await);
    }
    let claim = |file: &CheckedFile| Some((file.path.clone(), Claim::of(&file.outcome.as_ref().ok()?.manifest)));
    let mut back = stand_back(&BTreeMap::new(), &files.iter().filter_map(claim).collect());
    for file in &mut files {
        if let Some((name, owner)) = back.remove(&file.path) {
            file.outcome = Err(Error::plugin(shown(&file.path), name.taken_by(&owner)));
        }
    }
    Ok(files)
}

async fn check_file(options: &Options, path: PathBuf) -> CheckedFile {
    let origin = shown(&path);
    match read(&path, options.max_component).bytes {
        Err(reason) => CheckedFile { path, manifest: None, outcome: Err(Error::plugin(origin, reason)) },
        Ok(bytes) => {
            let manifest = component::manifest(&bytes).ok().map(|(manifest, _)| manifest);
            CheckedFile { path, manifest, outcome: check(options, &origin, bytes).await }
        }
    }
}
