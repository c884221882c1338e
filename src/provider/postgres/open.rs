//! Opening: what is refused and why, the schema and its versions, and the pool.

use std::str::FromStr as _;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use super::Options;
use super::trouble::explain;
use crate::error::{Error, Result};
use crate::provider::finding::{Opening, pending};

/// The schemas in the order of their versions, each changing what the one before left.
const MIGRATIONS: [&str; 2] = [include_str!("schema.sql"), include_str!("rows.sql")];

/// The oldest server that is served: 14.
const OLDEST: i32 = 140_000;

/// How long one migration may take, and how long a replica waits for another's.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long to leave a server alone that is still starting.
const STARTING: Duration = Duration::from_millis(100);

/// The longest name that PostgreSQL does not cut.
const MAX_NAME: usize = 63;

/// How long a transaction of ours may stand still on the server: what a frozen process holds is freed then.
const IDLE: Duration = Duration::from_secs(10);

/// Statements here are written for indexes and nested loops. Plans are kept, and one that was made while a table was
/// empty must not sort or scan it once it is large.
const PLANS: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; \
    SET enable_mergejoin = off; SET enable_sort = off; SET jit = off;";

/// An open store.
pub(super) struct Opened {
    pub(super) pool: PgPool,
    /// The schema, quoted.
    pub(super) schema: String,
    /// The server, the database and the user, without the password.
    pub(super) place: String,
    /// The server's version, such as `15.6`.
    pub(super) server: String,
}

/// The version that this binary serves.
pub(super) fn served() -> i32 {
    i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX)
}

/// The indexes that the schema has beside those of keys: the name of each, and the statement that makes it.
pub(super) fn indexes() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for migration in MIGRATIONS {
        let lines: Vec<&str> = migration.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
        for statement in lines.join(" ").split(';') {
            let words: Vec<&str> = statement.split_whitespace().collect();
            if let ["CREATE", "INDEX", name, ..] | ["CREATE", "UNIQUE", "INDEX", name, ..] = *words {
                found.push((name.to_owned(), words.join(" ")));
            }
        }
    }
    found
}

/// Connects, brings the schema up to date if that is wanted, and opens the pool.
pub(super) async fn open(options: &Options, opening: Opening) -> Result<Opened> {
    let schema = quoted(&options.schema)?;
    let (connect, place) = connect_options(options)?;
    let refused = |error| refusal(&place, &options.schema, error);
    let connecting = tokio::time::timeout(options.acquire_timeout, reach(&connect));
    let late = || {
        let words = "the server did not answer within postgres.acquire_timeout: check address, port and firewall";
        Error::store("postgres", format!("connect to {place}"), words)
    };
    let mut connection = connecting.await.map_err(|_| late())?.map_err(refused)?;
    let preparing = async {
        // In a transaction, so that a pooler leaves us on one connection.
        let mut tx = connection.begin().await.map_err(refused)?;
        let server = look(&mut tx, &place).await?;
        tx.commit().await.map_err(refused)?;
        match opening {
            Opening::Migrate => migrate(&mut connection, options, &schema, &place).await?,
            Opening::AsItIs => is_up_to_date(&mut connection, options, &schema, &place).await?,
        }
        Ok::<_, Error>(server)
    };
    let slow = || Error::store("postgres", format!("bring {place} up to date"), "it took longer than five minutes");
    let server = tokio::time::timeout(PATIENCE, preparing).await.map_err(|_| slow())??;
    // Whether the server hears the goodbye makes no difference.
    drop(tokio::time::timeout(Duration::from_secs(5), connection.close()).await);
    Ok(Opened { pool: pool(options, connect), schema, place, server })
}

/// Connects, and waits for a server that is still starting.
async fn reach(connect: &PgConnectOptions) -> sqlx::Result<PgConnection> {
    loop {
        let answer = connect.connect().await;
        let code = answer.as_ref().err().and_then(sqlx::Error::as_database_error).and_then(|error| error.code());
        if code.as_deref() != Some("57P03") {
            return answer;
        }
        tokio::time::sleep(STARTING).await;
    }
}

fn pool(options: &Options, connect: PgConnectOptions) -> PgPool {
    let settings = format!(
        "{PLANS} SET statement_timeout = {}; SET idle_in_transaction_session_timeout = {};",
        options.statement_timeout.as_millis(),
        IDLE.as_millis()
    );
    let settings = options.prepared.then_some(settings);
    PgPoolOptions::new()
        .max_connections(options.max_connections)
        .acquire_timeout(options.acquire_timeout)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            let settings = settings.clone();
            Box::pin(async move {
                match settings {
                    Some(settings) => sqlx::raw_sql(AssertSqlSafe(settings)).execute(connection).await.map(drop),
                    None => Ok(()),
                }
            })
        })
        .connect_lazy_with(connect)
}

/// What the URL says, and where that is in words without a password.
fn connect_options(options: &Options) -> Result<(PgConnectOptions, String)> {
    let scheme = options.url.split(':').next().unwrap_or_default();
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err(Error::invalid("provider", scheme, "must begin with postgres:// or postgresql://"));
    }
    let parsed = PgConnectOptions::from_str(&options.url).map_err(|error| {
        let reason =
            format!("is no URL of a PostgreSQL database: {error}; write postgres://USER:PASSWORD@HOST/DATABASE");
        Error::invalid("provider", format!("{scheme}://…"), reason)
    })?;
    let database = parsed.get_database().unwrap_or_else(|| parsed.get_username()).to_owned();
    let host = parsed.get_socket().map_or_else(|| parsed.get_host().to_owned(), |path| path.display().to_string());
    let place = format!("{}@{host}:{}/{database}", parsed.get_username(), parsed.get_port());
    let name = parsed.get_application_name().unwrap_or("tidegate").to_owned();
    let cache = if options.prepared { 200 } else { 0 };
    // A pooler would refuse a setting that it does not know, and no number here is a float.
    let parsed = parsed.application_name(&name).statement_cache_capacity(cache).extra_float_digits(None);
    Ok((parsed.disable_statement_logging(), place))
}

/// The name as an identifier in SQL.
///
/// # Errors
/// [`Error::Invalid`] naming `schema`.
pub(super) fn quoted(schema: &str) -> Result<String> {
    let mut characters = schema.chars();
    let begins = characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_');
    let is_name = begins && characters.all(|one| one.is_ascii_alphanumeric() || one == '_');
    if !is_name || schema.len() > MAX_NAME || schema.starts_with("pg_") {
        let reason = "must be a name of up to 63 letters, digits and _, not beginning with a digit or pg_";
        return Err(Error::invalid("schema", schema, reason));
    }
    Ok(format!("\"{schema}\""))
}

/// Why a store cannot be opened: what the operator can change is told as a bad setting.
fn refusal(place: &str, schema: &str, error: sqlx::Error) -> Error {
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
    let reason = match code.as_str() {
        "28P01" | "28000" => "the server refused user or password: check the URL and pg_hba.conf".to_owned(),
        "3D000" => "there is no such database: create it first (createdb)".to_owned(),
        "42501" => format!(
            "permission is missing: let its owner run `tidegate migrate`, or GRANT CREATE ON DATABASE to this user \
             (or create schema {schema} and make this user its owner)"
        ),
        "25006" => "is a standby, which can only be read: name the primary".to_owned(),
        _ => return Error::store("postgres", format!("open {place}"), explain(error)),
    };
    Error::invalid("provider", place, reason)
}

/// Refuses servers that cannot be used, and returns the version of one that can.
async fn look(connection: &mut PgConnection, place: &str) -> Result<String> {
    let text = "SELECT current_setting('server_version_num')::int, current_setting('server_version'), \
                pg_is_in_recovery(), current_setting('server_encoding')";
    let failed = |error| refusal(place, "", error);
    let (number, version, is_standby, encoding): (i32, String, bool, String) =
        sqlx::query_as(text).persistent(false).fetch_one(connection).await.map_err(failed)?;
    let version = version.split(' ').next().unwrap_or_default().to_owned();
    let refuse = |reason: String| Err(Error::invalid("provider", place, reason));
    match () {
        () if number < OLDEST => refuse(format!("runs PostgreSQL {version}: 14 or newer is needed")),
        () if is_standby => refuse("is a standby, which can only be read: name the primary".to_owned()),
        () if encoding != "UTF8" => refuse(format!("the database has encoding {encoding}: make one with UTF8")),
        () => Ok(version),
    }
}

/// How a schema stands.
enum Stand {
    /// There is none.
    Absent,
    /// It is there, and holds nothing.
    Empty,
    /// It holds tables, and none of them is ours.
    Foreign,
    /// It is ours, in this version.
    Version(i32),
}

async fn stand(connection: &mut PgConnection, schema: &str, quoted: &str) -> sqlx::Result<Stand> {
    let text = "SELECT n.oid IS NOT NULL, \
        (SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid), \
        EXISTS (SELECT 1 FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = 'tidegate_versions') \
        FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = $1";
    let (is_there, relations, is_ours): (bool, i64, bool) =
        sqlx::query_as(text).bind(schema).persistent(false).fetch_one(&mut *connection).await?;
    if !is_ours {
        return Ok(match (is_there, relations) {
            (false, _) => Stand::Absent,
            (true, 0) => Stand::Empty,
            (true, _) => Stand::Foreign,
        });
    }
    let text = AssertSqlSafe(format!("SELECT coalesce(max(version), 0) FROM {quoted}.tidegate_versions"));
    let version: i32 = sqlx::query_scalar(text).persistent(false).fetch_one(connection).await?;
    Ok(Stand::Version(version))
}

/// Brings the schema up to date, in one transaction that no two replicas are in at once.
async fn migrate(connection: &mut PgConnection, options: &Options, quoted: &str, place: &str) -> Result<()> {
    let (schema, failed) = (options.schema.as_str(), |error| refusal(place, &options.schema, error));
    // The common case takes no lock and needs no permission to change anything.
    let mut tx = connection.begin().await.map_err(failed)?;
    if let Stand::Version(version) = stand(&mut tx, schema, quoted).await.map_err(failed)?
        && check(version, schema, place)?
    {
        return tx.commit().await.map_err(failed);
    }
    let lock = "SELECT pg_advisory_xact_lock(hashtextextended('tidegate migrate ' || $1, 0))";
    sqlx::query(lock).bind(schema).persistent(false).execute(&mut *tx).await.map_err(failed)?;
    let done = match stand(&mut tx, schema, quoted).await.map_err(failed)? {
        Stand::Version(version) if check(version, schema, place)? => return Ok(()),
        Stand::Version(version) => version,
        Stand::Foreign => return Err(foreign(schema, place)),
        Stand::Absent => {
            let text = AssertSqlSafe(format!("CREATE SCHEMA {quoted}"));
            sqlx::raw_sql(text).execute(&mut *tx).await.map_err(failed)?;
            0
        }
        Stand::Empty => 0,
    };
    let text = format!(
        "SET LOCAL search_path = {quoted}, pg_catalog; SET LOCAL client_min_messages = warning; \
         CREATE TABLE IF NOT EXISTS tidegate_versions \
         (version integer PRIMARY KEY, migrated_at timestamptz NOT NULL DEFAULT now(), binary_version text NOT NULL)"
    );
    sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *tx).await.map_err(failed)?;
    for (version, migration) in (1..).zip(MIGRATIONS).skip(usize::try_from(done).unwrap_or(0)) {
        sqlx::raw_sql(migration).execute(&mut *tx).await.map_err(failed)?;
        let record = "INSERT INTO tidegate_versions (version, binary_version) VALUES ($1, $2)";
        let record = sqlx::query(record).bind(version).bind(env!("CARGO_PKG_VERSION")).persistent(false);
        record.execute(&mut *tx).await.map_err(failed)?;
        tracing::info!(version, schema, "the schema was brought up to date");
    }
    tx.commit().await.map_err(failed)
}

/// Refuses a schema that a migration would change.
async fn is_up_to_date(connection: &mut PgConnection, options: &Options, quoted: &str, place: &str) -> Result<()> {
    let (schema, failed) = (options.schema.as_str(), |error| refusal(place, &options.schema, error));
    let mut tx = connection.begin().await.map_err(failed)?;
    let stand = stand(&mut tx, schema, quoted).await.map_err(failed)?;
    tx.commit().await.map_err(failed)?;
    let lacks = match stand {
        Stand::Version(version) if check(version, schema, place)? => return Ok(()),
        Stand::Version(version) => format!("has version {version}, and this binary needs {}", served()),
        Stand::Foreign => return Err(foreign(schema, place)),
        Stand::Absent | Stand::Empty => "is not made yet".to_owned(),
    };
    Err(pending(format!("{schema} of {place}"), lacks))
}

fn foreign(schema: &str, place: &str) -> Error {
    let reason = "is used by something else: name another one with postgres.schema";
    Error::Incompatible { what: format!("schema {schema} of {place}"), reason: reason.into() }
}

/// Whether the schema needs nothing; refuses one of a newer binary.
fn check(version: i32, schema: &str, place: &str) -> Result<bool> {
    let served = served();
    if version > served {
        let reason = format!("has version {version}, this binary knows up to {served}: use a newer tidegate");
        return Err(Error::Incompatible { what: format!("schema {schema} of {place}"), reason: reason.into() });
    }
    Ok(version == served)
}
