//! What `tidegate doctor` finds: in the server's views, in its settings, and in our own tables.
//!
//! Every look is a call of its own, so that one which the server refuses does not spoil the others. Nothing is changed,
//! and nobody else's statement is shown.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::listen::Hearing;
use super::row::unsigned;
use super::session::Statement;
use super::trouble::{Step, Trouble};
use super::{PostgresProvider, Store, open};
use crate::error::Result;
use crate::provider::finding::{seconds, size, whole};
use crate::provider::{Examine, Finding};

/// From when on something is worth a word.
pub(super) struct Limits {
    /// How long a transaction may be open.
    pub(super) held: Duration,
    /// How long a delivery may be due.
    pub(super) lag: Duration,
    /// How many rows may wait in the inbox.
    pub(super) inbox: i64,
    /// After how long the first row of the inbox must be another one.
    pub(super) again: Duration,
    /// How many dead rows a table may have, and how long ago it was vacuumed if it has more.
    pub(super) dead: (i64, Duration),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            held: Duration::from_secs(60),
            lag: Duration::from_secs(5 * 60),
            inbox: 10_000,
            again: Duration::from_secs(3),
            dead: (50_000, Duration::from_secs(5 * 60)),
        }
    }
}

const SETTINGS: &str = "SELECT name, setting FROM pg_settings WHERE setting = 'off' \
    AND name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'autovacuum', 'track_counts') ORDER BY name";
/// What is open in another database holds nothing back here.
const HELD: &str = "SELECT a.pid, coalesce(a.application_name, ''), coalesce(a.usename::text, ''), coalesce(a.state, ''), \
    extract(epoch FROM clock_timestamp() - a.xact_start)::bigint FROM pg_stat_activity a \
    WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type = 'client backend' \
    AND (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL OR a.state LIKE 'idle in transaction%') \
    AND extract(epoch FROM clock_timestamp() - a.xact_start)::bigint >= $1 ORDER BY a.xact_start LIMIT 10";
const HIDDEN: &str = "SELECT count(*) FROM pg_stat_activity a WHERE a.datname = current_database() \
    AND a.usename <> current_user AND NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')";
const PREPARED: &str = "SELECT p.gid, p.owner::text, extract(epoch FROM clock_timestamp() - p.prepared)::bigint \
    FROM pg_prepared_xacts p WHERE p.database = current_database() \
    AND extract(epoch FROM clock_timestamp() - p.prepared)::bigint >= $1 ORDER BY p.prepared LIMIT 10";
const SLOTS: &str = "SELECT s.slot_name::text, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn), 0)::bigint \
    FROM pg_replication_slots s WHERE NOT s.active \
    AND (s.restart_lsn IS NOT NULL OR s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL) ORDER BY s.slot_name LIMIT 10";
const DEAD: &str = "SELECT t.relname::text, t.n_live_tup, t.n_dead_tup, \
    extract(epoch FROM clock_timestamp() - greatest(t.last_autovacuum, t.last_vacuum))::bigint \
    FROM pg_stat_user_tables t WHERE t.schemaname = $1 ORDER BY t.relname";
const INDEXES: &str = "SELECT c.relname::text, i.indisvalid AND i.indisready FROM pg_index i \
    JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1";
const CLOCK: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
const INBOX: &str = "SELECT count(*), min(position) FROM {s}.inbox";
/// For how many seconds the delivery that has waited longest has been due, for each subscription that has one.
pub(super) const LAG: &str = "SELECT s.name, ({now} - l.since) / 1000000 AS lag FROM {s}.subscriptions s CROSS JOIN LATERAL \
    (SELECT min(o.since) AS since FROM ( \
    (SELECT d.due AS since FROM {s}.deliveries d WHERE d.subscription = s.id AND d.stage = 0 ORDER BY d.seq LIMIT 1) \
    UNION ALL (SELECT d.due FROM {s}.deliveries d WHERE d.subscription = s.id AND d.stage = 1 ORDER BY d.due LIMIT 1) \
    UNION ALL (SELECT d.lease_end FROM {s}.deliveries d WHERE d.subscription = s.id AND d.stage = 2 \
    ORDER BY d.lease_end LIMIT 1)) o) l WHERE l.since <= {now}";

#[async_trait]
impl Examine for PostgresProvider {
    async fn examine(&self) -> Result<Vec<Finding>> {
        self.examine_with(&Limits::default()).await
    }
}

impl PostgresProvider {
    /// As [`Examine::examine`], with other limits.
    pub(super) async fn examine_with(&self, limits: &Limits) -> Result<Vec<Finding>> {
        let store = &*self.store;
        store.check_open()?;
        let mut all = vec![store.hearing()];
        let looks = [
            ("settings", store.settings().await),
            ("open transactions", store.held(limits).await),
            ("prepared transactions", store.prepared_transactions(limits).await),
            ("replication slots", store.slots().await),
            ("dead rows", store.dead_rows(limits).await),
            ("indexes", store.indexes().await),
            ("clock", store.clocks().await),
            ("inbox", store.inbox(limits).await),
            ("lag", store.lag(limits).await),
        ];
        for (name, found) in looks {
            match found {
                Ok(found) => all.extend(found),
                Err(Trouble::Store(error)) if error.as_database_error().is_some() => all.push(unseen(name, &error)),
                Err(trouble) => return Err(trouble.told(format!("look at {name}"))),
            }
        }
        Ok(all)
    }
}

/// The server refused a look.
fn unseen(name: &str, error: &sqlx::Error) -> Finding {
    Finding::warning(
        "not-examined",
        format!("{name}: the server would not tell ({error})"),
        "What cannot be looked at may be wrong: give the user what docs/postgres.md lists under Permissions, and run \
         `tidegate migrate` where a table is missing.",
    )
}

impl Store {
    /// What a statement answers, over a connection of its own.
    async fn asked(&self, statement: Statement<'_>) -> Step<Vec<PgRow>> {
        let mut session = self.session().await?;
        let rows = session.rows(statement).await;
        session.finish(rows).await
    }

    fn hearing(&self) -> Finding {
        let hearing = self.relay.ears.borrow().hearing;
        match hearing {
            Hearing::Listening => Finding::ok("hints", "notifications of other processes are heard"),
            Hearing::Deaf => Finding::warning(
                "no-notifications",
                "notifications do not come through this connection, as behind a pooler in transaction mode",
                "Processes learn of each other's writes every postgres.poll_interval only. Connect to the server itself or \
                 to a pool in session mode; otherwise set postgres.prepared = false and the bounds of the user, as \
                 docs/postgres.md says under Connections.",
            ),
            Hearing::Away | Hearing::Starting => Finding::warning(
                "no-listener",
                "no connection that listens for notifications could be made in time",
                "Processes learn of each other's writes every postgres.poll_interval only. See whether the server has \
                 connections left (max_connections, the user's CONNECTION LIMIT).",
            ),
        }
    }

    async fn settings(&self) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(SETTINGS)).await?;
        let names: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        if names.is_empty() {
            return Ok(vec![Finding::ok("settings", "commits reach stable storage, and autovacuum is on")]);
        }
        Ok(names.iter().map(|name| switched_off(name)).collect())
    }

    async fn held(&self, limits: &Limits) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(HELD).bind(whole(limits.held))).await?;
        let mut found = rows.iter().map(transaction).collect::<sqlx::Result<Vec<_>>>()?;
        let hidden = self.asked(self.statement(HIDDEN)).await?;
        let hidden: i64 = hidden.first().map_or(Ok(0), |row| row.try_get(0))?;
        match (found.is_empty(), hidden) {
            (_, 1..) => found.push(Finding::ok(
                "hidden-sessions",
                format!(
                    "{hidden} sessions of other users were not looked at: GRANT pg_read_all_stats to this user to see \
                     whether they hold transactions open"
                ),
            )),
            (true, _) => found.push(Finding::ok("transactions", "no transaction has been open for long")),
            (false, _) => {}
        }
        Ok(found)
    }

    async fn prepared_transactions(&self, limits: &Limits) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(PREPARED).bind(whole(limits.held))).await?;
        let found = rows.iter().map(|row| {
            let (id, owner, age): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            Ok(Finding::warning(
                "prepared-transaction",
                format!("prepared transaction '{id}' of {owner} has waited for {}", seconds(age)),
                format!(
                    "{HOLDS_BACK} It outlives its session and a restart: COMMIT PREPARED '{0}' or ROLLBACK PREPARED '{0}'.",
                    id.replace('\'', "''")
                ),
            ))
        });
        Ok(found.collect::<sqlx::Result<_>>()?)
    }

    async fn slots(&self) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(SLOTS)).await?;
        let found = rows.iter().map(|row| {
            let (name, kept): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Finding::warning(
                "idle-slot",
                format!("nobody reads replication slot {name}, for which {} of log are kept", size(unsigned(kept))),
                format!(
                    "It keeps write-ahead log until the disk is full, and may keep dead rows. Bring its reader back, or \
                     SELECT pg_drop_replication_slot('{}').",
                    name.replace('\'', "''")
                ),
            ))
        });
        Ok(found.collect::<sqlx::Result<_>>()?)
    }

    async fn dead_rows(&self, limits: &Limits) -> Step<Vec<Finding>> {
        let (most, since) = (limits.dead.0, whole(limits.dead.1));
        let (mut found, mut total) = (Vec::new(), 0_i64);
        for row in self.asked(self.statement(DEAD).bind(self.options.schema.clone())).await? {
            let (table, live, dead): (String, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let vacuumed: Option<i64> = row.try_get(3)?;
            total = total.saturating_add(dead);
            if dead < most || dead < live / 4 || vacuumed.is_some_and(|age| age < since) {
                continue;
            }
            let last =
                vacuumed.map_or_else(|| "never vacuumed".to_owned(), |age| format!("vacuumed {} ago", seconds(age)));
            found.push(Finding::warning(
                "dead-rows",
                format!("{table} has {dead} dead rows beside {live} live ones, and was {last}"),
                format!(
                    "Tables and indexes grow, and claims and figures take longer. See what holds vacuum back (the other \
                     findings), that autovacuum has workers left, and VACUUM {}.{table}.",
                    self.schema
                ),
            ));
        }
        if found.is_empty() {
            found.push(Finding::ok("vacuum", format!("vacuum keeps up: {total} dead rows in all tables")));
        }
        Ok(found)
    }

    async fn indexes(&self) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(INDEXES).bind(self.options.schema.clone())).await?;
        let there = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        let there = there.collect::<sqlx::Result<Vec<(String, bool)>>>()?;
        let mut found: Vec<Finding> = open::indexes()
            .into_iter()
            .filter(|(name, _)| !there.iter().any(|(is_there, _)| is_there == name))
            .map(|(name, make)| self.missing(&name, &make))
            .collect();
        found.extend(there.iter().filter(|(_, is_valid)| !is_valid).map(|(name, _)| {
            Finding::problem(
                "invalid-index",
                format!("index {name} is not valid"),
                format!(
                    "It costs every write and helps no reader, and a unique one guards nothing: REINDEX INDEX \
                     CONCURRENTLY {}.{name}.",
                    self.schema
                ),
            )
        }));
        if found.is_empty() {
            found.push(Finding::ok("indexes", "all indexes are there and valid"));
        }
        Ok(found)
    }

    fn missing(&self, name: &str, make: &str) -> Finding {
        let advice =
            "Without it statements read whole tables, and a unique one guards nothing. Make it as the tables' owner:";
        let schema = &self.options.schema;
        let statement = format!("SET search_path = \"{schema}\"; {make}");
        Finding::problem("missing-index", format!("index {name} is missing"), format!("{advice} {statement};"))
    }

    async fn clocks(&self) -> Step<Vec<Finding>> {
        let mut session = self.session().await?;
        let before = crate::event::now().as_microsecond();
        let row = session.row(self.statement(CLOCK)).await;
        let after = crate::event::now().as_microsecond();
        let server = session.finish(row).await?.try_get(0)?;
        Ok(vec![Finding::of_clocks(server, before, after)])
    }

    async fn inbox(&self, limits: &Limits) -> Step<Vec<Finding>> {
        let (rows, first) = self.inbox_now().await?;
        let Some(first) = first else { return Ok(vec![Finding::ok("inbox", "nothing waits in the inbox")]) };
        tokio::time::sleep(limits.again).await;
        let (_, still) = self.inbox_now().await?;
        let advice = "What triggers and applications leave there becomes events late, or not at all:";
        Ok(vec![if still == Some(first) {
            Finding::warning(
                "inbox-stands-still",
                format!("{rows} rows wait in the inbox, and nobody has taken the first for {:?}", limits.again),
                format!("{advice} see that `tidegate serve` runs on this schema, what its log says, and broker.poll."),
            )
        } else if rows > limits.inbox {
            Finding::warning(
                "inbox-backlog",
                format!("{rows} rows wait in the inbox"),
                format!(
                    "{advice} when the number does not fall, more is written than can be taken; write less at once."
                ),
            )
        } else {
            Finding::ok("inbox", format!("{rows} rows wait in the inbox, and are being taken"))
        }])
    }

    async fn inbox_now(&self) -> Step<(i64, Option<i64>)> {
        let rows = self.asked(self.statement(INBOX)).await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    async fn lag(&self, limits: &Limits) -> Step<Vec<Finding>> {
        let rows = self.asked(self.statement(LAG).bind(self.now())).await?;
        let mut found = Vec::new();
        for row in rows {
            let (name, lag): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            if lag >= whole(limits.lag) {
                found.push(Finding::warning(
                    "subscription-lag",
                    format!("a delivery to {name} has been due for {}", seconds(lag)),
                    "Its handler is too slow, paused or not there: see `tidegate subscriptions list`, its concurrency and \
                     rate, and whether `tidegate serve` runs.",
                ));
            }
        }
        if found.is_empty() {
            found.push(Finding::ok("lag", "no delivery has been due for long"));
        }
        Ok(found)
    }
}

const HOLDS_BACK: &str =
    "Rows that died since then cannot be vacuumed away: tables grow, and claims and figures take longer.";

fn transaction(row: &PgRow) -> sqlx::Result<Finding> {
    let (pid, application, user): (i32, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let (state, age): (String, i64) = (row.try_get(3)?, row.try_get(4)?);
    let named = if application.is_empty() { "an unnamed application".to_owned() } else { application };
    let state = if state.is_empty() { String::new() } else { format!(" ({state})") };
    Ok(Finding::warning(
        "held-transaction",
        format!("process {pid} of {named}, user {user}, has had a transaction open for {}{state}", seconds(age)),
        format!(
            "{HOLDS_BACK} Have the application end it, or SELECT pg_terminate_backend({pid}); \
             idle_in_transaction_session_timeout for its user keeps it from coming back."
        ),
    ))
}

fn switched_off(name: &str) -> Finding {
    let why = match name {
        "fsync" | "full_page_writes" => {
            "A crash of the machine can destroy the whole database, not only what is newest"
        }
        "synchronous_commit" => "An acknowledged event can be lost when the server crashes",
        _ => "Dead rows are never removed: tables grow without end, and everything gets slow",
    };
    let how = match name {
        "synchronous_commit" => "switch it on for the user: ALTER ROLE … SET synchronous_commit = on".to_owned(),
        _ => format!("switch it on: ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()"),
    };
    Finding::problem("setting-off", format!("{name} is off"), format!("{why}: {how}."))
}
