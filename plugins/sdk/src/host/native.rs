//! The host of the tests: every function asks the [`testing::Host`](crate::testing::Host) of the thread that it runs on.

use super::Attributes;
use crate::{
    Fault,
    log::Level,
    testing::{Change, LogLine, Published, with_state},
};

pub(crate) fn log(level: Level, message: &str, fields: Attributes) {
    with_state(|state| state.logs.push(LogLine { level, message: message.to_owned(), fields }));
}

pub(crate) fn config(key: &str) -> Option<String> {
    with_state(|state| state.grants.config(key).then(|| state.config.get(key).cloned()).flatten())
}

pub(crate) fn subscription() -> String {
    with_state(|state| state.subscription.clone())
}

pub(crate) fn attempt() -> u32 {
    with_state(|state| state.attempt)
}

pub(crate) fn max_attempts() -> u32 {
    with_state(|state| state.max_attempts)
}

pub(crate) fn remaining_ms() -> u64 {
    with_state(|state| state.remaining_ms)
}

pub(crate) fn idempotency_key() -> String {
    with_state(|state| format!("{}/test-event", state.subscription))
}

pub(crate) fn is_replay() -> bool {
    with_state(|state| state.replay)
}

/// Outside of a batch there is one turn, and it has begun.
pub(crate) fn turn(index: u32) {
    with_state(|state| state.take_turn(index));
}

pub(crate) fn kv_get(bucket: &str, key: &str) -> Result<Option<Vec<u8>>, Fault> {
    with_state(|state| Ok(state.bucket(bucket)?.get(key).cloned()))
}

/// Nothing expires here: a test is over before a lifetime is.
pub(crate) fn kv_set(bucket: &str, key: &str, value: Vec<u8>, _ttl_s: Option<u32>) -> Result<(), Fault> {
    with_state(|state| state.write(bucket, key, Change::Set(value)))
}

pub(crate) fn kv_delete(bucket: &str, key: &str) -> Result<(), Fault> {
    with_state(|state| state.write(bucket, key, Change::Delete))
}

pub(crate) fn kv_increment(bucket: &str, key: &str, by: i64) -> Result<i64, Fault> {
    with_state(|state| {
        let before = match state.bucket(bucket)?.get(key) {
            None => 0,
            Some(bytes) => number(bytes).ok_or_else(|| {
                Fault::new("invalid-value", format!("value of {key} in bucket {bucket} is not a number"))
            })?,
        };
        let sum = before
            .checked_add(by)
            .ok_or_else(|| Fault::new("invalid-value", format!("value of {key} in bucket {bucket} would overflow")))?;
        state.write(bucket, key, Change::Add(by))?;
        Ok(sum)
    })
}

pub(crate) fn publish(
    event_type: &str,
    content_type: &str,
    payload: Vec<u8>,
    attributes: Attributes,
) -> Result<String, Fault> {
    with_state(|state| {
        state.grants.publish(event_type)?;
        state.check_turn()?;
        state.ids = state.ids.saturating_add(1);
        let id = format!("test-published-{}", state.ids);
        state.work.published.push(Published {
            id: id.clone(),
            event_type: event_type.to_owned(),
            content_type: content_type.to_owned(),
            payload,
            attributes,
        });
        Ok(id)
    })
}

/// Numbers are kept as their decimal digits.
pub(crate) fn number(bytes: &[u8]) -> Option<i64> {
    core::str::from_utf8(bytes).ok()?.parse().ok()
}
