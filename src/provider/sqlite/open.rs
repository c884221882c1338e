//! Opening a database: what is refused and why, the schema, and the connections.

use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use super::Options;
use crate::error::{Error, Result};
use crate::provider::finding::{Opening, pending};

/// The schemas in the order of their versions, each changing what the one before left.
const MIGRATIONS: [&str; 3] = [include_str!("schema.sql"), include_str!("depth.sql"), include_str!("inbox.sql")];

/// The version of the schema that this binary serves.
pub(super) fn served() -> i64 {
    MIGRATIONS.len() as i64
}

/// What the header of our databases says that they are: "tide".
const APPLICATION: i64 = 0x7469_6465;

/// How long a writer waits for another process.
const BUSY: Duration = Duration::from_secs(10);

/// The connections of an open database.
pub(super) struct Opened {
    pub(super) writer: SqliteConnection,
    pub(super) checkpointer: SqliteConnection,
    pub(super) readers: SqlitePool,
    pub(super) path: PathBuf,
}

/// Opens the database, and makes it or brings it up to date if that is wanted.
pub(super) async fn open(options: &Options, opening: Opening) -> Result<Opened> {
    let path = path(&options.url)?;
    if opening == Opening::AsItIs {
        is_up_to_date(&path).await?;
    }
    let failed = |action: &'static str| move |error: sqlx::Error| Error::store("sqlite", action, error);
    let connect = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY)
        .pragma("cache_size", "-32768")
        // A task of its own does it.
        .pragma("wal_autocheckpoint", "0")
        .statement_cache_capacity(200)
        // A claim's rows cross to this side in one go, without a change of threads for every few.
        .row_buffer_size(1_024)
        .disable_statement_logging();
    let mut writer = connect.clone().connect().await.map_err(|error| cannot_open(&path, error))?;
    check_locks(&mut writer, &connect, &path).await?;
    migrate(&mut writer, &path).await?;
    let checkpointer = connect.clone().connect().await.map_err(failed("open a connection for checkpoints"))?;
    let readers = SqlitePoolOptions::new()
        .max_connections(options.readers.max(1))
        .min_connections(0)
        .test_before_acquire(false)
        .connect_with(connect.create_if_missing(false).pragma("query_only", "ON"))
        .await
        .map_err(failed("open readers"))?;
    Ok(Opened { writer, checkpointer, readers, path })
}

/// Refuses a database that a migration would make or change.
async fn is_up_to_date(path: &Path) -> Result<()> {
    let lacks = |reason: String| Err(pending(path.display().to_string(), reason));
    if !path.exists() {
        return lacks("is not made yet".to_owned());
    }
    let failed = |error| cannot_open(path, error);
    let connect = SqliteConnectOptions::new().filename(path).busy_timeout(BUSY).pragma("query_only", "ON");
    let mut connection = connect.disable_statement_logging().connect().await.map_err(failed)?;
    let done = version(&mut connection, path).await;
    drop(connection.close().await);
    match done? {
        0 => lacks("holds nothing yet".to_owned()),
        version if version < served() => lacks(format!("has version {version}, and this binary needs {}", served())),
        _ => Ok(()),
    }
}

/// The file that the URL names, which must be one that can be written.
fn path(url: &str) -> Result<PathBuf> {
    let refuse = |reason: String| Err(Error::invalid("provider", url, reason));
    let parsed = SqliteConnectOptions::from_str(url);
    let Some(rest) = url.strip_prefix("sqlite:") else { return refuse("must begin with sqlite://".to_owned()) };
    if rest.trim_start_matches('/').is_empty() || rest.contains(":memory:") || rest.contains('?') {
        return refuse("must name a file, as in sqlite://tidegate.db (for a store in memory use memory:)".to_owned());
    }
    let Ok(parsed) = parsed else { return refuse("is not a URL of a SQLite file".to_owned()) };
    let path = parsed.get_filename().to_owned();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return refuse(format!("the directory {} does not exist: make it first", parent.display()));
    }
    if path.is_dir() {
        return refuse("is a directory: name a file".to_owned());
    }
    if path.metadata().is_ok_and(|metadata| metadata.permissions().readonly()) {
        return refuse("the file may only be read: make it writable".to_owned());
    }
    Ok(path)
}

fn cannot_open(path: &Path, error: sqlx::Error) -> Error {
    let text = error.to_string();
    let reason = if text.contains("not a database") {
        "is not a SQLite database: name another file"
    } else if text.contains("readonly") || text.contains("unable to open") {
        "cannot be written: check who owns it and its directory"
    } else {
        return Error::store("sqlite", format!("open {}", path.display()), error);
    };
    Error::invalid("provider", path.display().to_string(), reason)
}

/// Refuses a place where a second connection does not see that the first one writes.
async fn check_locks(writer: &mut SqliteConnection, connect: &SqliteConnectOptions, path: &Path) -> Result<()> {
    let refused = |error| cannot_open(path, error);
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *writer).await.map_err(refused)?;
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *writer).await.map_err(refused)?;
    let mut second = connect.clone().busy_timeout(Duration::ZERO).connect().await.map_err(refused)?;
    let both = sqlx::query("BEGIN IMMEDIATE").execute(&mut second).await.is_ok();
    // Nothing was written, so closing undoes nothing.
    drop(second.close().await);
    sqlx::query("ROLLBACK").execute(&mut *writer).await.map_err(refused)?;
    if both || mode != "wal" {
        let reason = "is where file locks or shared memory do not work (a network share?): use a local disk";
        return Err(Error::invalid("provider", path.display().to_string(), reason));
    }
    Ok(())
}

/// Brings the schema up to date, in one transaction.
async fn migrate(writer: &mut SqliteConnection, path: &Path) -> Result<()> {
    let failed = |error| Error::store("sqlite", "bring the schema up to date", error);
    let mut tx = writer.begin_with("BEGIN IMMEDIATE").await.map_err(|error| cannot_open(path, error))?;
    let (version, served) = (version(&mut tx, path).await?, served());
    let done = usize::try_from(version).unwrap_or(0);
    for migration in MIGRATIONS.into_iter().skip(done) {
        sqlx::raw_sql(migration).execute(&mut *tx).await.map_err(failed)?;
    }
    if done == 0 {
        let text = "INSERT INTO head (only, head, pruned, total, revision, epoch) VALUES (1, 0, 0, 0, 0, ?)";
        let epoch = uuid::Uuid::new_v4().to_string();
        sqlx::query(text).bind(epoch).execute(&mut *tx).await.map_err(failed)?;
    }
    if version < served {
        let text = format!("PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {served}");
        sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *tx).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)
}

/// The version of the schema; refuses that of a newer binary, and a database of something else.
async fn version(connection: &mut SqliteConnection, path: &Path) -> Result<i64> {
    let failed = |error| cannot_open(path, error);
    let mut number = async |text: &'static str| sqlx::query_scalar::<_, i64>(text).fetch_one(&mut *connection).await;
    let version = number("PRAGMA user_version").await.map_err(failed)?;
    let application = number("PRAGMA application_id").await.map_err(failed)?;
    let tables = number("SELECT count(*) FROM sqlite_schema").await.map_err(failed)?;
    let incompatible = |reason: String| Error::Incompatible { what: path.display().to_string(), reason: reason.into() };
    if tables > 0 && application != APPLICATION {
        return Err(incompatible("is a database of something else: name another file".to_owned()));
    }
    let served = served();
    if version > served {
        let reason = format!("has schema {version}, this binary knows up to {served}: use a newer tidegate");
        return Err(incompatible(reason));
    }
    Ok(version)
}
