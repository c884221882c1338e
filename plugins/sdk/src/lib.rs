//! The crate that tidegate plugins written in Rust start from.
//!
//! A plugin is one function and one line:
//!
//! ```
//! use tidegate_plugin::prelude::*;
//!
//! #[derive(serde::Deserialize)]
//! struct Order {
//!     customer: String,
//!     total_cents: i64,
//! }
//!
//! tidegate_plugin::plugin!(count);
//!
//! fn count(Json(order): Json<Order>) -> Result<(), Failure> {
//!     let total = kv::bucket("totals").increment(&order.customer, order.total_cents)?;
//!     info!("order counted", customer = order.customer, total = total);
//!     Ok(())
//! }
//! # fn main() {}
//! ```
//!
//! What the function takes and gives back is up to it: see [`Handler`]. What it may do is up to the operator: the
//! plugin asks in `plugin.toml`, and whatever was not granted fails with the fault code `denied`.
//!
//! On every target but WebAssembly the same functions talk to [`testing::Host`], so that a handler is tested with plain
//! `cargo test`, without a host and without a WebAssembly toolchain.
//!
//! Deliberately absent: async (the host runs many instances instead), clocks (an event carries its time, and an attempt
//! knows what is left of it), files and sockets (a plugin has none).

#[cfg(target_family = "wasm")]
#[doc(hidden)]
pub mod bindings;
pub mod config;
pub mod delivery;
mod event;
pub mod events;
mod handler;
#[cfg(all(target_family = "wasm", not(target_feature = "atomics"), feature = "heap"))]
mod heap;
mod host;
pub mod kv;
pub mod log;
mod outcome;
#[cfg(not(target_family = "wasm"))]
pub mod testing;

pub use event::{Event, Json};
pub use handler::{BatchHandler, Handler, Outcome};
pub use outcome::{Failure, Fault, OrFail, Reply};

/// What most handlers need, for one `use` line.
pub mod prelude {
    pub use crate::{
        Event, Failure, Json, OrFail, Reply, config, debug, delivery, error, events, info, kv, trace, warn,
    };
}

/// Makes the plugin out of one function, which must be a [`Handler`].
///
/// ```
/// # use tidegate_plugin::{Event, Reply};
/// tidegate_plugin::plugin!(greet);
///
/// fn greet(event: Event) -> Reply {
///     Reply::text(format!("hello, {}", event.id))
/// }
/// # fn main() {}
/// ```
///
/// `batch` lets the host hand over many events in one call, which costs far less per event. The function is called for
/// one after the other, each in its [turn](delivery::turn), and need not know:
///
/// ```
/// # use tidegate_plugin::Event;
/// tidegate_plugin::plugin!(greet, batch);
/// # fn greet(_: Event) {}
/// # fn main() {}
/// ```
///
/// A function of its own can do for all at once what need not be done for each. It must be a [`BatchHandler`]:
///
/// ```
/// # use tidegate_plugin::{Event, Failure, delivery, config};
/// tidegate_plugin::plugin!(greet, batch = greet_all);
///
/// fn greet_all(events: &[Event]) -> Vec<Result<(), Failure>> {
///     let greeting = config::get("greeting");
///     let greet = |(index, event): (usize, &Event)| {
///         delivery::turn(index);
///         tidegate_plugin::info!("greeted", id = event.id, with = greeting.is_some());
///         Ok(())
///     };
///     events.iter().enumerate().map(greet).collect()
/// }
/// # fn greet(_: Event) {}
/// # fn main() {}
/// ```
///
/// A function may look whether the plugin can work at all, before a new version takes over. It takes nothing and gives
/// back a `Result<(), E>` whose error can be shown, and refuses the version. Key-value data is empty while it runs, and
/// nothing that it writes is kept:
///
/// ```
/// # use tidegate_plugin::Event;
/// tidegate_plugin::plugin!(greet, self_check = is_configured);
///
/// fn is_configured() -> Result<(), &'static str> {
///     tidegate_plugin::config::get("greeting").map(drop).ok_or("setting greeting is missing")
/// }
/// # fn greet(_: Event) {}
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! plugin {
    ($handler:path) => {
        #[cfg(target_family = "wasm")]
        const _: () = {
            struct Plugin;

            impl $crate::__export::Guest for Plugin {
                fn handle(
                    event: $crate::__export::Event,
                ) -> ::core::result::Result<::core::option::Option<$crate::__export::Reply>, $crate::__export::Failure>
                {
                    $crate::__export::call(&$handler, event)
                }
            }

    $crate::__export::export!(Plugin with_types_in $crate::bindings);
        };

        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || $crate::__export::check(&$handler);
    };
    ($handler:path, batch $(, self_check = $self_check:path)?) => {
        $crate::plugin!($handler $(, self_check = $self_check)?);

        #[cfg(target_family = "wasm")]
        $crate::__export_batch!(|batch| $crate::__export::call_in_turn(&$handler, batch));
    };
    ($handler:path, batch = $batch:path $(, self_check = $self_check:path)?) => {
        $crate::plugin!($handler $(, self_check = $self_check)?);

        #[cfg(target_family = "wasm")]
        $crate::__export_batch!(|batch| $crate::__export::call_batch(&$batch, batch));

        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || $crate::__export::check_batch(&$batch);
    };
    ($handler:path, self_check = $self_check:path) => {
        $crate::plugin!($handler);

        #[cfg(target_family = "wasm")]
        const _: () = {
            struct Checked;

            impl $crate::__export::SelfCheck for Checked {
                fn self_check() -> ::core::result::Result<(), ::std::string::String> {
                    $crate::__export::self_check($self_check)
                }
            }

    $crate::__export::export_self_check!(Checked with_types_in $crate::bindings::self_check);
        };

        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || drop($crate::__export::self_check($self_check));
    };
}

/// A part of what [`plugin!`] expands to. Not for use by hand.
#[doc(hidden)]
#[macro_export]
macro_rules! __export_batch {
    ($call:expr) => {
        const _: () = {
            struct Batched;

            impl $crate::__export::BatchGuest for Batched {
                fn handle_batch(
                    events: ::std::vec::Vec<$crate::__export::PackedEvent>,
                    attributes: ::std::vec::Vec<(u32, u32)>,
                    text: ::std::string::String,
                ) -> ::std::vec::Vec<
                    ::core::result::Result<::core::option::Option<$crate::__export::Reply>, $crate::__export::Failure>,
                > {
                    let call: fn($crate::__export::Batch) -> _ = $call;
                    call($crate::__export::Batch { events, attributes, text })
                }
            }

    $crate::__export::export_batch!(Batched with_types_in $crate::bindings::batch);
        };
    };
}

/// What [`plugin!`] expands to. Not for use by hand: it changes without notice.
#[doc(hidden)]
pub mod __export {
    #[cfg(target_family = "wasm")]
    pub use crate::bindings::{
        batch::{
            export_batch,
            exports::tidegate::plugin::packed_batch_handler::{Guest as BatchGuest, PackedEvent},
        },
        export,
        exports::tidegate::plugin::handler::{Event, Failure, Guest, Reply},
        self_check::{export_self_check, exports::tidegate::plugin::lifecycle::Guest as SelfCheck},
    };
    #[cfg(target_family = "wasm")]
    pub use crate::host::Batch;

    /// One call from the host, in the types of the interface.
    #[cfg(target_family = "wasm")]
    pub fn call<Arguments>(handler: &impl crate::Handler<Arguments>, event: Event) -> Result<Option<Reply>, Failure> {
        #[cfg(feature = "panic-log")]
        crate::log::panics();
        answer(handler.call(event.into()))
    }

    /// One call with many events, each handled in its turn.
    #[cfg(target_family = "wasm")]
    pub fn call_in_turn<Arguments>(
        handler: &impl crate::Handler<Arguments>,
        batch: Batch,
    ) -> Vec<Result<Option<Reply>, Failure>> {
        #[cfg(feature = "panic-log")]
        crate::log::panics();
        crate::handler::in_turn(handler, batch.unpack()).into_iter().map(answer).collect()
    }

    /// One call with many events, all handled at once.
    #[cfg(target_family = "wasm")]
    pub fn call_batch(handler: &impl crate::BatchHandler, batch: Batch) -> Vec<Result<Option<Reply>, Failure>> {
        #[cfg(feature = "panic-log")]
        crate::log::panics();
        let events: Vec<crate::Event> = batch.unpack().collect();
        handler.call(&events).into_iter().map(answer).collect()
    }

    #[cfg(target_family = "wasm")]
    fn answer(result: Result<Option<crate::Reply>, crate::Failure>) -> Result<Option<Reply>, Failure> {
        match result {
            Ok(reply) => Ok(reply.map(Into::into)),
            Err(failure) => Err(failure.into()),
        }
    }

    /// The self-check, with its error as text.
    pub fn self_check<E: core::fmt::Display>(check: impl FnOnce() -> Result<(), E>) -> Result<(), String> {
        #[cfg(all(target_family = "wasm", feature = "panic-log"))]
        crate::log::panics();
        check().map_err(|why| why.to_string())
    }

    /// Makes the compiler look at the handler where there is nothing to export.
    #[cfg(not(target_family = "wasm"))]
    pub fn check<Arguments>(_handler: &impl crate::Handler<Arguments>) {}

    /// The same for a handler of batches.
    #[cfg(not(target_family = "wasm"))]
    pub fn check_batch(_handler: &impl crate::BatchHandler) {}
}
