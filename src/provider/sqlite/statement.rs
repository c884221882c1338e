//! One statement for many rows: wide rows as `VALUES` with parameters, lists of integers as JSON.
//!
//! A statement costs about as much as twenty rows in it, so rows travel together; and since prepared statements are kept
//! by their text, there are only a few sizes of them.

use futures_util::future::join;
use sqlx::encode::Encode;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqliteRow};
use sqlx::types::Type;
use sqlx::{Arguments as _, AssertSqlSafe, Sqlite};

/// How many rows go into one statement.
const SIZES: [usize; 4] = [128, 32, 8, 1];

/// The parameters of a statement.
#[derive(Default)]
pub(super) struct Parameters {
    arguments: SqliteArguments,
    refused: Option<sqlx::error::BoxDynError>,
}

impl Parameters {
    /// Adds the next one.
    pub(super) fn add<'t, T: Encode<'t, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        if let Err(error) = self.arguments.add(value) {
            self.refused.get_or_insert(error);
        }
        self
    }

    fn finish(self) -> sqlx::Result<SqliteArguments> {
        match self.refused {
            Some(error) => Err(sqlx::Error::Encode(error)),
            None => Ok(self.arguments),
        }
    }
}

/// A statement over rows: `head (?,?,…),(?,?,…) tail`.
pub(super) struct Values {
    pub(super) head: &'static str,
    pub(super) columns: usize,
    pub(super) tail: &'static str,
}

impl Values {
    /// Executes it for all rows, and returns how many rows it changed.
    pub(super) async fn execute<T>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[T],
        bind: impl Fn(&T, &mut Parameters),
    ) -> sqlx::Result<u64> {
        let mut changed = 0;
        let mut parts = parts(rows).map(|part| self.prepare(part, &bind));
        let mut next = parts.next();
        while let Some(prepared) = next {
            let (text, arguments) = prepared?;
            let executing = sqlx::query_with(AssertSqlSafe(text), arguments).execute(&mut *connection);
            // SQLite works on a thread of its own: the rows after these are bound meanwhile.
            let (result, following) = join(executing, async { parts.next() }).await;
            changed += result?.rows_affected();
            next = following;
        }
        Ok(changed)
    }

    /// Executes it for all rows, and returns what it answers.
    pub(super) async fn fetch<T>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[T],
        bind: impl Fn(&T, &mut Parameters),
    ) -> sqlx::Result<Vec<SqliteRow>> {
        let mut fetched = Vec::new();
        for part in parts(rows) {
            let (text, arguments) = self.prepare(part, &bind)?;
            fetched.extend(sqlx::query_with(AssertSqlSafe(text), arguments).fetch_all(&mut *connection).await?);
        }
        Ok(fetched)
    }

    fn prepare<T>(&self, rows: &[T], bind: impl Fn(&T, &mut Parameters)) -> sqlx::Result<(String, SqliteArguments)> {
        let mut parameters = Parameters::default();
        parameters.arguments.reserve(rows.len() * self.columns, 0);
        rows.iter().for_each(|row| bind(row, &mut parameters));
        Ok((self.text(rows.len()), parameters.finish()?))
    }

    fn text(&self, rows: usize) -> String {
        let row = format!("({})", vec!["?"; self.columns].join(","));
        format!("{} {} {}", self.head, vec![row.as_str(); rows].join(","), self.tail)
    }
}

/// Cuts rows into pieces of the known sizes, the largest first.
fn parts<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = SIZES.into_iter().find(|&size| size <= rows.len())?;
        let (part, rest) = rows.split_at(size);
        rows = rest;
        Some(part)
    })
}

/// A list of integers as one JSON parameter.
pub(super) fn json_list(numbers: impl IntoIterator<Item = i64>) -> String {
    let mut text = String::from("[");
    for number in numbers {
        if text.len() > 1 {
            text.push(',');
        }
        text.push_str(&number.to_string());
    }
    text.push(']');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_of_few_sizes_and_lose_nothing() {
        let rows: Vec<usize> = (0..307).collect();
        let sizes: Vec<usize> = parts(&rows).map(<[usize]>::len).collect();
        assert_eq!(sizes, [128, 128, 32, 8, 8, 1, 1, 1]);
        assert_eq!(parts(&rows).flatten().copied().collect::<Vec<_>>(), rows);
        assert_eq!(parts(&rows[..0]).count(), 0);
    }

    #[test]
    fn a_list_is_json() {
        assert_eq!(json_list([]), "[]");
        assert_eq!(json_list([1, -2, i64::MAX]), "[1,-2,9223372036854775807]");
    }
}
