//! An event handler host: durable events, glob subscriptions, sandboxed WebAssembly handlers, retries with backoff.
//!
//! The modules in reading order: [`event`] and [`pattern`] say what is published and who is meant, [`subscription`] and
//! [`retry`] under which policy, [`handler`] what is called and [`delivery`] what becomes of it.

pub mod broker;
pub mod cli;
pub mod delivery;
pub mod error;
pub mod event;
pub mod handler;
pub mod host;
pub mod metrics;
pub mod pattern;
pub mod provider;
pub mod retry;
pub mod subscription;

pub use broker::Broker;
pub use delivery::{Delivery, EventDetail, EventRecord, Reply, Status, Verdict};
pub use error::{Error, Result};
pub use event::{Event, EventId, EventType, Payload, Source};
pub use handler::{Call, Failure, Handler, native};
pub use pattern::Pattern;
pub use retry::RetryPolicy;
pub use subscription::Subscription;
