//! An event handler host: durable events, glob subscriptions, sandboxed WebAssembly handlers, retries with backoff.
//!
//! The modules in reading order: [`event`] and [`pattern`] say what is published and who is meant, [`subscription`] and
//! [`retry`] under which policy, [`handler`] what is called and [`delivery`] what becomes of it. [`provider`] is the
//! port to a store, [`broker`] what does the work, [`capture`] turns an application's own writes into events, [`feed`]
//! shows the log as it grows, [`host`] runs plugins, and [`cli`] is the command line.

pub mod error;
pub mod event;
pub mod change;
pub mod pattern;
pub mod delivery;
pub mod retry;
pub mod subscription;
pub mod handler;
pub mod metrics;
pub mod provider;
pub mod broker;
pub mod capture;
pub mod feed;
pub mod host;
pub mod http;
pub mod config;
pub mod cli;

pub use broker::{Answer, Broker, Published};
pub use change::{EntityChange, LinkChange};
pub use delivery::{Delivery, EventDetail, EventRecord, Reply, Status, Verdict};
pub use error::{Error, Result};
pub use event::{Event, EventId, EventType, Payload, Source};
pub use feed::Feed;
pub use handler::{Call, Failure, Handler, native};
pub use metrics::Metrics;
pub use pattern::Pattern;
pub use retry::RetryPolicy;
pub use subscription::Subscription;
