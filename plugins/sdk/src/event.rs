//! The event that a handler is called with, and its payload as a Rust type.
//!
//! Nothing is parsed before it is asked for, and nothing is copied: the payload's bytes move from the host to the handler.

use serde::de::DeserializeOwned;

use crate::Failure;

/// A fact that happened, as the host hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The event's id: a UUID, or what its publisher chose.
    pub id: String,
    /// Its place in the log: dense, and in commit order.
    pub sequence: u64,
    /// Its dotted type, such as `shop.orders.create`.
    pub event_type: String,
    /// Where it came from: `database`, `websocket`, `frontend`, `system` or `internal`.
    pub source: String,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    /// What the payload is, by default `application/json`.
    pub content_type: String,
    /// The payload, byte for byte as it was published.
    pub payload: Vec<u8>,
    /// Everything else that is known about the event. The methods below name the usual ones.
    pub attributes: Vec<(String, String)>,
}

impl Event {
    /// The payload as `T`. A payload of another shape is rejected with the code `invalid-payload`: it will not be of the
    /// right shape at the next attempt either.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.payload).map_err(|why| {
            Failure::reject(
                "invalid-payload",
                format!("payload of {} is not what this handler reads: {why}", self.event_type),
            )
        })
    }

    /// The payload as text, when it is UTF-8.
    pub fn text(&self) -> Option<&str> {
        core::str::from_utf8(&self.payload).ok()
    }

    /// One attribute by its name on the wire, such as `user-id`.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        let (_, value) = self.attributes.iter().find(|(known, _)| known == name)?;
        Some(value)
    }

    /// The first of the type's three segments, or what the publisher said.
    pub fn schema(&self) -> Option<&str> {
        self.attribute("schema")
    }

    /// The second of the type's three segments, or what the publisher said.
    pub fn entity(&self) -> Option<&str> {
        self.attribute("entity")
    }

    /// The last of the type's three segments, or what the publisher said.
    pub fn operation(&self) -> Option<&str> {
        self.attribute("operation")
    }

    /// The ordering key.
    pub fn key(&self) -> Option<&str> {
        self.attribute("key")
    }

    /// Who caused the event; numbers arrive as their digits.
    pub fn user_id(&self) -> Option<&str> {
        self.attribute("user-id")
    }

    /// The session that the event came from.
    pub fn session_id(&self) -> Option<&str> {
        self.attribute("session-id")
    }

    /// The tidegate instance that took the event in.
    pub fn instance_id(&self) -> Option<&str> {
        self.attribute("instance-id")
    }

    /// The event whose handler published this one.
    pub fn caused_by(&self) -> Option<&str> {
        self.attribute("caused-by")
    }

    /// The W3C trace context of the publisher.
    pub fn trace_parent(&self) -> Option<&str> {
        self.attribute("trace-parent")
    }

    /// One metadata entry as `T`; `None` when it is absent or of another shape.
    pub fn metadata<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let entry = self.attributes.iter().find(|(known, _)| known.strip_prefix("metadata.") == Some(name));
        serde_json::from_str(&entry?.1).ok()
    }
}

/// A handler's argument that is the payload read as `T`, see [`Event::json`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Json<T>(pub T);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing;

    #[test]
    fn a_payload_of_another_shape_is_rejected_by_name() {
        let event = testing::event("shop.orders.create", &json!({"customer": 7}));
        #[derive(Debug, serde::Deserialize)]
        struct Order {
            #[expect(dead_code, reason = "only its type matters")]
            customer: String,
        }
        let failure = event.json::<Order>().unwrap_err();
        assert!(!failure.is_retry());
        assert_eq!(failure.code(), "invalid-payload");
        assert!(failure.message().contains("shop.orders.create"), "{failure}");
        assert!(failure.message().contains("invalid type: integer `7`"), "{failure}");
    }

    #[test]
    fn attributes_and_metadata_are_found_by_name() {
        let event = testing::event("shop.orders.create", &json!({}))
            .with_attribute("user-id", "42")
            .with_attribute("metadata.source-page", "\"checkout\"");
        assert_eq!(event.user_id(), Some("42"));
        assert_eq!(event.schema(), Some("shop"));
        assert_eq!(event.operation(), Some("create"));
        assert_eq!(event.session_id(), None);
        assert_eq!(event.metadata::<String>("source-page").as_deref(), Some("checkout"));
        assert_eq!(event.metadata::<u8>("source-page"), None);
    }
}
