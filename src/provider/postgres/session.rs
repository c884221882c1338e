//! One call's connection: every statement on it has a bound, and what is left half done is not used again.
//!
//! The order in which transactions lock rows is the same everywhere, so that none can wait for one that waits for it:
//! the advisory lock of operators or the lock of claims, `deliveries` by seq and subscription, `documents` by name,
//! `progress` by seq, and `head` last.
//!
//! Statements of every event are written so that the server keeps one plan for them and does not make it anew for each call,
//! which would take longer than following it. An array is a subquery, `(SELECT $1::bigint[])`: then a plan for these values is
//! guessed to be no cheaper than one for any. Rows are looked up by `seq = ANY(ARRAY[i.seq])`: unlike `seq = i.seq` that leads to
//! the index alone, and to no walk through a whole table that was small when the plan was made.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use tokio::time::timeout;

use super::Store;
use super::lend::Lent;
use super::trouble::{Step, Trouble};

/// A statement with what is bound to it.
pub(super) type Statement<'q> = Query<'q, Postgres, PgArguments>;

/// A connection for one call.
pub(super) struct Session<'a> {
    pub(super) store: &'a Store,
    lent: Lent<'a>,
    limit: Duration,
    in_transaction: bool,
}

impl Store {
    /// A connection.
    pub(super) async fn session(&self) -> Step<Session<'_>> {
        let lent = self.connections.lend().await?;
        Ok(Session { store: self, lent, limit: self.limit, in_transaction: false })
    }

    /// A statement. `{s}` stands for the schema, and `{now}` for the time, which is the first parameter where a test
    /// keeps the clock.
    pub(super) fn statement<'q>(&self, text: &str) -> Statement<'q> {
        sqlx::query(AssertSqlSafe(self.text(text))).persistent(self.options.prepared)
    }

    pub(super) fn text(&self, text: &str) -> String {
        text.replace("{now}", NOW).replace("{s}", &self.schema)
    }
}

/// The server's clock, unless the first parameter says what time it is.
const NOW: &str = "coalesce($1::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)";

impl Session<'_> {
    /// All rows that a statement answers.
    pub(super) async fn rows(&mut self, statement: Statement<'_>) -> Step<Vec<PgRow>> {
        let is_single = self.begin_single().await?;
        let fetched = timeout(self.limit, statement.fetch_all(self.lent.connection()?)).await;
        let rows = fetched.map_err(|_| Trouble::Late(self.limit))??;
        self.commit_single(is_single).await?;
        Ok(rows)
    }

    /// The one row that a statement answers.
    pub(super) async fn row(&mut self, statement: Statement<'_>) -> Step<PgRow> {
        self.rows(statement).await?.pop().ok_or_else(|| sqlx::Error::RowNotFound.into())
    }

    /// How many rows a statement changed.
    pub(super) async fn execute(&mut self, statement: Statement<'_>) -> Step<u64> {
        let is_single = self.begin_single().await?;
        let executed = timeout(self.limit, statement.execute(self.lent.connection()?)).await;
        let changed = executed.map_err(|_| Trouble::Late(self.limit))??.rows_affected();
        self.commit_single(is_single).await?;
        Ok(changed)
    }

    /// What is not prepared for good is prepared and executed in two steps. A pooler must not take the server away in
    /// between, and it does not within a transaction.
    async fn begin_single(&mut self) -> Step<bool> {
        let is_single = !self.store.options.prepared && !self.in_transaction;
        if is_single {
            self.begin().await?;
        }
        Ok(is_single)
    }

    async fn commit_single(&mut self, is_single: bool) -> Step<()> {
        if is_single { self.commit().await } else { Ok(()) }
    }

    /// Executes text without parameters, several statements at once if need be.
    async fn plain(&mut self, text: &str) -> Step<()> {
        let statement = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
        let executed = timeout(self.limit, statement.execute(self.lent.connection()?)).await;
        executed.map_err(|_| Trouble::Late(self.limit))??;
        Ok(())
    }

    /// Begins a transaction.
    pub(super) async fn begin(&mut self) -> Step<()> {
        self.begin_with("BEGIN").await
    }

    /// Begins a transaction whose statements all see the same, and which changes nothing. Its plans are made for it
    /// alone, so that the server may choose among all kinds.
    pub(super) async fn begin_reading(&mut self) -> Step<()> {
        self.begin_with(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL plan_cache_mode = force_custom_plan; \
             SET LOCAL enable_sort = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_bitmapscan = on; \
             SET LOCAL enable_mergejoin = on; SET LOCAL enable_seqscan = on",
        )
        .await
    }

    /// Begins a transaction for an operator's change: one at a time, and with more time than others.
    pub(super) async fn begin_operating(&mut self) -> Step<()> {
        self.limit = self.limit.saturating_mul(OPERATING);
        let timeout = self.store.options.statement_timeout.saturating_mul(OPERATING).as_millis();
        self.begin_with(&format!("BEGIN; SET LOCAL statement_timeout = {timeout}")).await?;
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended('tidegate operate ' || $1, 0))";
        let lock = self.store.statement(lock).bind(self.store.schema.clone());
        self.execute(lock).await.map(drop)
    }

    /// Begins the transaction of a claim that has its turn, of which there is one at a time over all processes. `false`, and no
    /// transaction, when another one takes long: a process that stands still must not hold up the others.
    pub(super) async fn begin_turn(&mut self) -> Step<bool> {
        // Not an advisory lock: three processes that drained a backlog wrote 5 % less log with this one, which writers do
        // not mind. That its waiting holds up less cleaning is likely, and was not shown.
        let begun = self
            .begin_with(&format!(
                "BEGIN; SET LOCAL lock_timeout = '{}ms'; \
                 LOCK TABLE {}.subscriptions IN SHARE UPDATE EXCLUSIVE MODE; SET LOCAL lock_timeout = DEFAULT",
                TURN.as_millis(),
                self.store.schema,
            ))
            .await;
        match begun {
            Ok(()) => Ok(true),
            Err(Trouble::Crossed(_)) => {
                self.store.turn.missed();
                self.plain("ROLLBACK").await?;
                self.in_transaction = false;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn begin_with(&mut self, text: &str) -> Step<()> {
        self.in_transaction = true;
        self.plain(text).await
    }

    /// Commits.
    pub(super) async fn commit(&mut self) -> Step<()> {
        self.plain("COMMIT").await?;
        self.in_transaction = false;
        Ok(())
    }

    /// Ends the call: what it began and did not commit is undone, and the connection goes back if it is in order.
    pub(super) async fn finish<T>(mut self, result: Step<T>) -> Step<T> {
        let spared = result.as_ref().err().is_none_or(Trouble::spares_connection);
        if spared && (!self.in_transaction || self.plain("ROLLBACK").await.is_ok()) {
            self.lent.give_back();
        }
        result
    }
}

/// How long other processes' turns are waited for: many claims of thousands.
const TURN: Duration = Duration::from_secs(1);

/// How much longer than other statements an operator's may take.
const OPERATING: u32 = 10;
