//! The one integration binary: what tidegate promises, seen from outside.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

mod bad_input;
mod broker;
mod capture_postgres;
mod capture_sqlite;
mod commit_order;
mod confinement;
mod crash;
mod edges;
mod failover;
mod feed;
mod host;
mod hooks;
mod house;
mod instances;
mod nats;
mod nats_server;
mod outbox;
mod postgres;
mod redis;
mod redis_server;
mod relay;
mod reload;
mod replicas;
mod restart;
mod stream;
mod support;
mod verdicts;
