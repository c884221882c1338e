//! Logs who created, updated or deleted what, one line per change.
//!
//! The line names the fields that changed and never their values: a log is read by more people than the data is.
//! It keeps nothing itself and judges nothing: an event whose payload it cannot read is logged all the same.

use serde_json::{Map, Value};
use tidegate_plugin::prelude::*;

tidegate_plugin::plugin!(record, batch);

fn record(event: Event) {
    let payload: Map<String, Value> = event.json().unwrap_or_default();
    let fields: Vec<&str> = changed(&payload).keys().map(String::as_str).collect();
    let id = match payload.get("entity_id").or_else(|| payload.get("id")) {
        Some(Value::String(id)) => id.clone(),
        Some(id) => id.to_string(),
        None => event.key().unwrap_or("unknown").to_owned(),
    };
    info!(
        "changed",
        who = event.user_id().unwrap_or("nobody"),
        operation = event.operation().unwrap_or("unknown"),
        schema = event.schema().unwrap_or("unknown"),
        entity = event.entity().unwrap_or("unknown"),
        id = id,
        fields = fields.join(","),
        source = event.source,
        session = event.session_id().unwrap_or("none"),
        event = event.id,
        sequence = event.sequence,
        at_ms = event.created_at_ms,
    );
}

/// The row that changed: what an update says it changed, else the data of an entity change, else the payload itself.
fn changed(payload: &Map<String, Value>) -> &Map<String, Value> {
    let part = |name| payload.get(name).and_then(Value::as_object);
    part("changes").or_else(|| part("data")).unwrap_or(payload)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tidegate_plugin::{
        Event,
        testing::{self, Host, LogLine},
    };

    use super::record;

    fn line(event: Event) -> LogLine {
        let host = Host::for_manifest(include_str!("../plugin.toml")).unwrap();
        assert_eq!(host.deliver(record, event), Ok(None));
        let mut lines = host.logs();
        assert_eq!(lines.len(), 1);
        lines.remove(0)
    }

    #[test]
    fn a_change_is_one_line_that_says_who_and_what() {
        let payload = json!({
            "kind": "entity", "action": "updated", "entity_type": "orders", "entity_id": "o-20260117-0001",
            "data": {"status": "paid", "total_cents": 4599},
        });
        let event = testing::event("shop.orders.update", &payload)
            .with_attribute("user-id", "42")
            .with_attribute("session-id", "s-9");
        let line = line(event);
        assert_eq!(line.message, "changed");
        for (name, value) in [
            ("who", "42"),
            ("operation", "update"),
            ("schema", "shop"),
            ("entity", "orders"),
            ("id", "o-20260117-0001"),
            ("fields", "status,total_cents"),
            ("session", "s-9"),
            ("event", "test-event"),
            ("sequence", "1"),
        ] {
            assert_eq!(line.field(name), Some(value), "{name}");
        }
    }

    #[test]
    fn values_never_reach_the_log() {
        let line = line(testing::event("shop.users.create", &json!({"id": 7, "data": {"password": "correct horse"}})));
        assert_eq!(line.field("id"), Some("7"));
        assert_eq!(line.field("fields"), Some("password"));
        assert!(!format!("{line:?}").contains("correct horse"));
    }

    #[test]
    fn a_plain_row_is_a_change_of_its_columns() {
        let line = line(testing::event("shop.carts.update", &json!({"id": "cart-5", "items": 3})));
        assert_eq!(line.field("id"), Some("cart-5"));
        assert_eq!(line.field("fields"), Some("id,items"));
    }

    #[test]
    fn what_cannot_be_read_is_logged_all_the_same() {
        let mut event = testing::event("shop.carts.delete", &json!(null)).with_attribute("key", "cart-5");
        event.payload = vec![0xff, 0x00];
        let line = line(event);
        assert_eq!(line.field("operation"), Some("delete"));
        assert_eq!(line.field("id"), Some("cart-5"));
        assert_eq!(line.field("who"), Some("nobody"));
    }
}
