//! What tests share: real servers of our own, and a checker of what they promised.

pub(crate) mod history;
pub(crate) mod redis;
pub(crate) mod server;
pub(crate) mod wire;
