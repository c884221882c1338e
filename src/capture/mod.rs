//! Turning an application's own writes into events: in its transaction, by its database, or around its calls.
//!
//! | | who writes the event | when it is seen |
//! |---|---|---|
//! | [`outbox`] | the application, in its own transaction | once that commits |
//! | [`triggers`] | the database, for every statement on a table | once the writer's transaction commits |
//! | [`hooks`] | the application's code, around its operations | at once, by way of a broker |
//!
//! The first two leave rows in the inbox of the store, which a broker that is open on it moves into the log. They need no
//! broker in the writer's process. Nothing here reads an inbox.

pub mod hooks;
pub mod outbox;
pub mod triggers;

pub use hooks::CrudHooks;
pub use outbox::Outbox;
pub use triggers::Capture;
