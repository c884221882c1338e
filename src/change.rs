//! Changes of entities and links, as typed payloads with one documented JSON form.
//!
//! Made by applications that publish what they created, updated or deleted. Nothing here watches a database.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::event::{Event, Payload, Source, event_type};

/// What changed about an entity or a link, as the payload of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It came into being.
    Created,
    /// Its data changed.
    Updated,
    /// It is gone.
    Deleted,
}

impl Action {
    fn operation(self) -> &'static str {
        match self {
            Self::Created => "create",
            Self::Updated => "update",
            Self::Deleted => "delete",
        }
    }
}

/// A change to an entity. As JSON:
/// `{"kind":"entity","action":"created","entity_type":…,"entity_id":…,"data":…}`, without `data` when deleted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EntityChange {
    kind: &'static str,
    action: Action,
    entity_type: String,
    entity_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<serde_json::Value>,
}

impl EntityChange {
    fn new(action: Action, entity_type: &str, entity_id: &str, data: Option<serde_json::Value>) -> Self {
        Self { kind: "entity", action, entity_type: entity_type.into(), entity_id: entity_id.into(), data }
    }

    /// The entity was created with `data`.
    #[must_use]
    pub fn created(entity_type: &str, entity_id: &str, data: serde_json::Value) -> Self {
        Self::new(Action::Created, entity_type, entity_id, Some(data))
    }

    /// The entity now holds `data`.
    #[must_use]
    pub fn updated(entity_type: &str, entity_id: &str, data: serde_json::Value) -> Self {
        Self::new(Action::Updated, entity_type, entity_id, Some(data))
    }

    /// The entity is gone.
    #[must_use]
    pub fn deleted(entity_type: &str, entity_id: &str) -> Self {
        Self::new(Action::Deleted, entity_type, entity_id, None)
    }

    /// The event `<schema>.<entity type>.<create|update|delete>`, ordered by the entity's id.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) when schema or entity type are no legal segments.
    pub fn into_event(self, schema: &str) -> Result<Event> {
        let event_type = event_type(schema, &self.entity_type, self.action.operation())?;
        let mut event = Event::new(Source::Database, event_type, Payload::json(&self)?);
        event.key = Some(self.entity_id.into());
        Ok(event)
    }
}

/// A change to a link between two entities. As JSON:
/// `{"kind":"link","action":"created","link_type":…,"link_id":…,"source_id":…,"target_id":…,"metadata":…}`,
/// without `metadata` when deleted. Links are never updated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkChange {
    kind: &'static str,
    action: Action,
    link_type: String,
    link_id: String,
    source_id: String,
    target_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<serde_json::Value>,
}

impl LinkChange {
    /// The link was made, with `metadata` (JSON `null` for none).
    #[must_use]
    pub fn created(
        link_type: &str,
        link_id: &str,
        source_id: &str,
        target_id: &str,
        metadata: serde_json::Value,
    ) -> Self {
        Self::new(Action::Created, [link_type, link_id, source_id, target_id], Some(metadata))
    }

    /// The link is gone.
    #[must_use]
    pub fn deleted(link_type: &str, link_id: &str, source_id: &str, target_id: &str) -> Self {
        Self::new(Action::Deleted, [link_type, link_id, source_id, target_id], None)
    }

    fn new(action: Action, names: [&str; 4], metadata: Option<serde_json::Value>) -> Self {
        let [link_type, link_id, source_id, target_id] = names.map(str::to_owned);
        Self { kind: "link", action, link_type, link_id, source_id, target_id, metadata }
    }

    /// The event `<schema>.<link type>.<create|delete>`, ordered by the link's id.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) when schema or link type are no legal segments.
    pub fn into_event(self, schema: &str) -> Result<Event> {
        let event_type = event_type(schema, &self.link_type, self.action.operation())?;
        let mut event = Event::new(Source::Database, event_type, Payload::json(&self)?);
        event.key = Some(self.link_id.into());
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BEHAVIOURS G2.
    #[test]
    fn entity_and_link_changes_have_the_documented_json() {
        let created = EntityChange::created("order", "o-1", serde_json::json!({"total": 3}));
        assert_eq!(
            serde_json::to_string(&created).unwrap(),
            r#"{"kind":"entity","action":"created","entity_type":"order","entity_id":"o-1","data":{"total":3}}"#
        );
        let event = EntityChange::deleted("order", "o-1").into_event("shop").unwrap();
        assert_eq!(event.event_type.as_str(), "shop.order.delete");
        assert_eq!(event.key.as_deref(), Some("o-1"));
        assert_eq!(
            event.payload.bytes(),
            r#"{"kind":"entity","action":"deleted","entity_type":"order","entity_id":"o-1"}"#
        );
        let link = LinkChange::deleted("follows", "l-1", "u-1", "u-2").into_event("social").unwrap();
        assert_eq!(
            link.payload.bytes(),
            r#"{"kind":"link","action":"deleted","link_type":"follows","link_id":"l-1","source_id":"u-1","target_id":"u-2"}"#
        );
    }
}
