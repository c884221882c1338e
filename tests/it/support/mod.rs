//! What tests share: real servers of our own, and a checker of what they promised.

pub(crate) mod certificates;
mod child;
pub(crate) mod guests;
pub(crate) mod history;
pub(crate) mod instance;
pub(crate) mod nats;
pub(crate) mod orders;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod redis;
pub(crate) mod server;
pub(crate) mod stream;
pub(crate) mod tapped;
pub(crate) mod wire;
