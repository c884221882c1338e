//! The bound on chains of events: a handler's event calls a handler, whose event calls a handler, and so on.
//!
//! Handlers that publish what they subscribe to, each by itself or in a ring, would go on for ever. Every event knows how
//! far it is from one that no handler published; who publishes beyond the limit is not allowed to, and hears which chain
//! it was. An embedding application that publishes from a handler of its own through the broker, not through the
//! handler's effects, begins a new chain.

use super::Shared;
use crate::delivery::{Fault, Verdict};
use crate::event::{Event, EventId, EventType};
use crate::handler::Outcome;

/// The most events of a chain that are named.
const NAMED: usize = 32;

/// The outcome, unless it publishes an event that is too far from the beginning of its chain: then a dead letter that
/// names the chain, and of which nothing is published or written.
pub(super) async fn bounded(shared: &Shared, cause: &Event, outcome: Outcome) -> Outcome {
    let limit = shared.options.max_depth;
    let is_short = cause.depth < limit || outcome.verdict != Verdict::Ok;
    let (Some(published), false) = (outcome.effects.published.first(), is_short) else { return outcome };
    let chain = chain(shared, cause).await;
    let mut links: Vec<&str> = chain.iter().rev().map(|(_, event_type)| event_type.as_str()).collect();
    if chain.len() < usize::try_from(cause.depth).unwrap_or(usize::MAX).saturating_add(1) {
        links.insert(0, "…");
    }
    let message = format!(
        "publishing {} would make a chain of more than {limit} events that handlers published \
         (limits.max_depth): {}",
        published.event_type,
        links.join(" → "),
    );
    let details = chain.into_iter().rev().map(|(id, event_type)| (event_type.to_string(), id.to_string()));
    let fault = Fault { details: details.collect(), ..Fault::new("too-deep", message) };
    Outcome { trace: outcome.trace, ..Outcome::failed(Verdict::Denied, fault) }
}

/// The event and what led to it, backwards, as far as the store still has it.
async fn chain(shared: &Shared, last: &Event) -> Vec<(EventId, EventType)> {
    let mut links = vec![(last.id.clone(), last.event_type.clone())];
    let mut before = last.caused_by.clone();
    while let Some(id) = before.take().filter(|_| links.len() < NAMED) {
        match shared.provider.get(id.as_str()).await {
            Ok(Some(detail)) => {
                let event = &detail.record.event;
                links.push((event.id.clone(), event.event_type.clone()));
                before.clone_from(&event.caused_by);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(error = %error, event = %id, "cannot read what an event was caused by"),
        }
    }
    links
}
