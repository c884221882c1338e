//! The host of plugins: what a component is and asks for, how it is built, and how it runs.

pub mod component;
pub mod guest;
pub mod manifest;
