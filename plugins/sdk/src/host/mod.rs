//! The one seam between this crate and what runs the plugin: the real host, or the one of the tests.
//!
//! Both files have the same functions. Nothing else in the crate asks which target it is compiled for.

#[cfg(not(target_family = "wasm"))]
mod native;
#[cfg(target_family = "wasm")]
mod wasm;

#[cfg(not(target_family = "wasm"))]
pub(crate) use native::*;
#[cfg(target_family = "wasm")]
pub use wasm::Batch;
#[cfg(target_family = "wasm")]
pub(crate) use wasm::*;

/// Names and values.
pub(crate) type Attributes = Vec<(String, String)>;

#[cfg(test)]
mod tests {
    #[test]
    fn the_interface_in_this_crate_is_the_one_that_the_host_serves() {
        assert_eq!(include_str!("../../wit/plugin.wit"), include_str!("../../../../wit/plugin.wit"));
    }
}
