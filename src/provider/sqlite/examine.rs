//! What `tidegate doctor` finds in the file: whether it is whole, how large its log and its unused room are, and where it
//! stands. Only reads.

use std::path::Path;

use async_trait::async_trait;
use sqlx::SqlitePool;

use super::SqliteProvider;
use crate::error::Result;
use crate::provider::finding::size;
use crate::provider::{Examine, Finding};

/// Larger files are not read from end to end.
const CHECKED: u64 = 1 << 30;

/// A larger log is not copied into the file as it should be.
const LARGE_LOG: u64 = 256 << 20;

/// Unused room below this is not worth a word.
const MUCH: u64 = 1 << 30;

/// What shares files between machines, as the kernel names it.
const SHARED: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "afs",
    "ceph",
    "glusterfs",
    "fuse.glusterfs",
    "fuse.sshfs",
    "fuse.s3fs",
    "lustre",
];

/// Figures of a file.
struct Size {
    bytes: u64,
    free: u64,
    log: u64,
}

#[async_trait]
impl Examine for SqliteProvider {
    async fn examine(&self) -> Result<Vec<Finding>> {
        self.check_open()?;
        let failed = self.failed("look at the file");
        let figure = async |name: &'static str| {
            let figure: i64 = sqlx::query_scalar(name).fetch_one(&self.readers).await.map_err(&failed)?;
            Ok::<_, crate::Error>(u64::try_from(figure).unwrap_or_default())
        };
        let page = figure("PRAGMA page_size").await?;
        let (pages, free) = (figure("PRAGMA page_count").await?, figure("PRAGMA freelist_count").await?);
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        let log = std::fs::metadata(log).map_or(0, |metadata| metadata.len());
        let size = Size { bytes: pages.saturating_mul(page), free: free.saturating_mul(page), log };
        let mut found = vec![whole(&self.readers, &size).await.map_err(&failed)?];
        found.extend(sizes(&size));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let place = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        found.extend(shared(&place, &mounts));
        Ok(found)
    }
}

/// Whether the file is whole.
async fn whole(readers: &SqlitePool, file: &Size) -> sqlx::Result<Finding> {
    if file.bytes > CHECKED {
        let words = format!(
            "the file has {} and was not read from end to end: stop the server and run `sqlite3 FILE 'PRAGMA quick_check'` \
             where you doubt it",
            size(file.bytes)
        );
        return Ok(Finding::ok("integrity", words));
    }
    let lines: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(5)").fetch_all(readers).await?;
    Ok(match &*lines {
        [line] if line == "ok" => Finding::ok("integrity", "the file is whole"),
        _ => Finding::problem(
            "damaged-file",
            format!("the file is damaged: {}", lines.join("; ")),
            "Events may be lost or wrong. Stop the server, keep a copy, and restore a backup, or save what can be read with \
             `sqlite3 FILE .recover`; then look at the disk.",
        ),
    })
}

fn sizes(file: &Size) -> [Finding; 2] {
    let log = match file.log {
        LARGE_LOG.. => Finding::warning(
            "large-wal",
            format!("{} stand in the write-ahead log", size(file.log)),
            "It grows while some process keeps a reading transaction open, and reading gets slower: look for a program that \
             has the file open (a shell, a backup), and end it.",
        ),
        _ => Finding::ok("wal", format!("in WAL mode, with {} in the log", size(file.log))),
    };
    let free = format!("{} of {} are not used", size(file.free), size(file.bytes));
    let free = match file.free {
        MUCH.. if file.free / 3 > file.bytes / 4 => Finding::warning(
            "unused-room",
            free,
            "The room is used again, but the disk does not get it back by itself: VACUUM while the server is stopped.",
        ),
        _ => Finding::ok("room", free),
    };
    [log, free]
}

/// The file stands on what other machines can mount too.
fn shared(path: &Path, mounts: &str) -> Option<Finding> {
    let mounted = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        // The kernel writes a space in a name so.
        Some((words.next()?.replace("\\040", " "), words.next()?))
    });
    let (folder, kind) =
        mounted.filter(|(folder, _)| path.starts_with(folder)).max_by_key(|(folder, _)| folder.len())?;
    SHARED.contains(&kind).then(|| {
        Finding::warning(
            "network-disk",
            format!("the file stands on {folder}, which is mounted over a network ({kind})"),
            "File locks and shared memory are not reliable there, which can damage the file: put it on a local disk, or use \
             PostgreSQL where machines are to share events.",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Severity;

    #[test]
    fn a_network_disk_is_told_from_a_local_one_by_the_nearest_mount() {
        let mounts = "/dev/sda / ext4 rw 0 0\nserver:/x /srv/my\\040share nfs4 rw 0 0\n/dev/sdb /srv/my\\040share/local xfs rw 0 0\n";
        let found = |path: &str| shared(Path::new(path), mounts).map(|finding| finding.what);
        assert_eq!(found("/var/t.db"), None);
        assert!(found("/srv/my share/t.db").unwrap().contains("/srv/my share"));
        assert_eq!(found("/srv/my share/local/t.db"), None);
        assert_eq!(found("/srv/my shares/t.db"), None);
        assert_eq!(shared(Path::new("/x"), ""), None);
    }

    #[test]
    fn only_large_logs_and_much_unused_room_ask_for_something() {
        let severities = |bytes, free, log| sizes(&Size { bytes, free, log }).map(|finding| finding.severity);
        assert_eq!(severities(0, 0, 0), [Severity::Ok; 2]);
        assert_eq!(severities(1 << 20, 1 << 20, LARGE_LOG - 1), [Severity::Ok; 2]);
        assert_eq!(severities(4 << 30, 1 << 30, LARGE_LOG), [Severity::Warning, Severity::Ok]);
        assert_eq!(severities(4 << 30, 7 << 29, 0), [Severity::Ok, Severity::Warning]);
    }

    #[tokio::test]
    async fn a_new_file_needs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("t.db").display());
        let provider = SqliteProvider::open(super::super::Options { url, ..Default::default() }).await.unwrap();
        let found = provider.examine().await.unwrap();
        let local: Vec<_> = found.iter().filter(|finding| finding.code != "network-disk").collect();
        assert_eq!(local.iter().map(|finding| finding.code).collect::<Vec<_>>(), ["integrity", "wal", "room"]);
        assert!(local.iter().all(|finding| finding.severity == Severity::Ok), "{local:?}");
    }
}
