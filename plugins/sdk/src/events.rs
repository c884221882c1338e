//! Publishing events from a handler. The types must be requested in `plugin.toml` (`events = ["shop.totals.*"]`).
//!
//! What an attempt publishes is published when it succeeds, together with what it wrote, or not at all. Do not publish
//! the type that you subscribe to without a way out: that is a loop, and the host ends it as one.

use serde::Serialize;

use crate::{Fault, host};

/// Publishes `payload` as JSON and gives back the new event's id.
pub fn publish(event_type: &str, payload: &impl Serialize) -> Result<String, Fault> {
    publish_with(event_type, payload, &[])
}

/// The same with attributes: `key` for ordering, `metadata.<name>` with a JSON value for anything else.
pub fn publish_with(event_type: &str, payload: &impl Serialize, attributes: &[(&str, &str)]) -> Result<String, Fault> {
    let payload = serde_json::to_vec(payload).map_err(|why| {
        Fault::new("invalid-payload", format!("payload of {event_type} cannot be written as JSON: {why}"))
    })?;
    publish_bytes(event_type, "application/json", payload, attributes)
}

/// Publishes bytes of any content type.
pub fn publish_bytes(
    event_type: &str,
    content_type: &str,
    payload: impl Into<Vec<u8>>,
    attributes: &[(&str, &str)],
) -> Result<String, Fault> {
    let attributes = attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    host::publish(event_type, content_type, payload.into(), attributes)
}
