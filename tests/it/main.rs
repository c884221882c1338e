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
mod confinement;
mod crash;
mod edges;
mod host;
mod house;
mod redis;
mod reload;
mod restart;
mod support;
mod verdicts;
