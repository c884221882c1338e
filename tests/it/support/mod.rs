//! What tests share: real servers of our own, and a checker of what they promised.

pub mod history;
pub mod server;
