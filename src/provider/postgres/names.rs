//! The numbers that stand for subscriptions in rows. They never change, so they are remembered.

use std::collections::BTreeSet;
use std::sync::Arc;

use sqlx::Row as _;

use super::Store;
use super::append::Numbers;
use super::session::Session;
use super::trouble::Step;

const FIND: &str = "SELECT s.name, s.id FROM unnest($1::text[]) AS i(name) JOIN {s}.subscriptions s ON s.name = i.name";
const MAKE: &str = "INSERT INTO {s}.subscriptions (name) SELECT unnest($1::text[]) ON CONFLICT (name) DO NOTHING";

impl Store {
    /// Those of `names` that are remembered, and the rest.
    fn remembered<'n>(&self, names: impl Iterator<Item = &'n Arc<str>>) -> (Numbers, BTreeSet<&'n str>) {
        let remembered = self.names.lock();
        let (mut numbers, mut missing) = (Numbers::new(), BTreeSet::new());
        for name in names {
            if numbers.contains_key(name) {
                continue;
            }
            match remembered.get(name) {
                Some(&number) => drop(numbers.insert(Arc::clone(name), number)),
                None => drop(missing.insert(&**name)),
            }
        }
        (numbers, missing)
    }

    /// The number of a subscription that was looked up before.
    pub(super) fn number(&self, name: &str) -> Option<i32> {
        self.names.lock().get(name).copied()
    }

    fn remember(&self, found: &Numbers) {
        let mut remembered = self.names.lock();
        remembered.extend(found.iter().map(|(name, &number)| (Arc::clone(name), number)));
    }
}

impl Session<'_> {
    /// The numbers of subscriptions; a new name gets one, in a transaction of its own.
    pub(super) async fn numbers<'n>(&mut self, names: impl Iterator<Item = &'n Arc<str>>) -> Step<Numbers> {
        let (mut numbers, missing) = self.store.remembered(names);
        if missing.is_empty() {
            return Ok(numbers);
        }
        let mut found = self.find(&missing).await?;
        let new: Vec<&str> = missing.iter().copied().filter(|name| !found.contains_key(*name)).collect();
        if !new.is_empty() {
            let statement = self.store.statement(MAKE).bind(new);
            self.execute(statement).await?;
            found = self.find(&missing).await?;
        }
        self.store.remember(&found);
        numbers.extend(found);
        Ok(numbers)
    }

    /// The numbers of those subscriptions that have one.
    pub(super) async fn known_numbers<'n>(&mut self, names: impl Iterator<Item = &'n Arc<str>>) -> Step<Numbers> {
        let (mut numbers, missing) = self.store.remembered(names);
        if !missing.is_empty() {
            let found = self.find(&missing).await?;
            self.store.remember(&found);
            numbers.extend(found);
        }
        Ok(numbers)
    }

    async fn find(&mut self, names: &BTreeSet<&str>) -> Step<Numbers> {
        let statement = self.store.statement(FIND).bind(names.iter().copied().collect::<Vec<_>>());
        let rows = self.rows(statement).await?;
        let found = rows.iter().map(|row| Ok((row.try_get::<&str, _>(0)?.into(), row.try_get(1)?)));
        Ok(found.collect::<sqlx::Result<_>>()?)
    }
}
