//! The one integration binary: what tidegate promises, seen from outside.

mod broker;
mod crash;
mod house;
mod support;
