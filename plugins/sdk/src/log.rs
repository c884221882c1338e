//! Log lines, kept with the attempt and shown in the host's log.
//!
//! Keep the message constant and put what varies into fields: [`info!`](crate::info) and its siblings make that short.
//! There is no filter here: the host decides what it keeps, up to its limit per attempt.

use core::fmt::Display;

use crate::host;

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Steps inside of a handler.
    Trace,
    /// What helps while developing.
    Debug,
    /// What happened.
    Info,
    /// What someone should look at one day.
    Warn,
    /// What someone should look at now.
    Error,
}

impl Level {
    #[cfg(target_family = "wasm")]
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Trace => 0,
            Self::Debug => 1,
            Self::Info => 2,
            Self::Warn => 3,
            Self::Error => 4,
        }
    }
}

/// Writes one line. The macros are shorter.
pub fn emit(level: Level, message: &str, fields: &[(&str, &dyn Display)]) {
    let fields = fields.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())).collect();
    host::log(level, message, fields);
}

/// Sends the message of every panic to the log, because a plugin that traps can no longer say anything.
#[cfg(all(target_family = "wasm", feature = "panic-log"))]
pub(crate) fn panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = info.payload_as_str().unwrap_or("the handler panicked");
        match info.location() {
            Some(place) => emit(Level::Error, message, &[("panicked_at", place)]),
            None => emit(Level::Error, message, &[]),
        }
    }));
}

/// Writes a line at a [`Level`]: `log!(Level::Warn, "stock is low", sku = order.sku)`. Values are shown by `Display`.
#[macro_export]
macro_rules! log {
    ($level:expr, $message:expr $(, $name:ident = $value:expr)* $(,)?) => {
        $crate::log::emit($level, $message, &[$((stringify!($name), &$value as &dyn ::core::fmt::Display)),*])
    };
}

/// Writes a line at [`Level::Trace`], see [`log!`](crate::log!).
#[macro_export]
macro_rules! trace { ($($line:tt)+) => { $crate::log!($crate::log::Level::Trace, $($line)+) }; }

/// Writes a line at [`Level::Debug`], see [`log!`](crate::log!).
#[macro_export]
macro_rules! debug { ($($line:tt)+) => { $crate::log!($crate::log::Level::Debug, $($line)+) }; }

/// Writes a line at [`Level::Info`], see [`log!`](crate::log!).
#[macro_export]
macro_rules! info { ($($line:tt)+) => { $crate::log!($crate::log::Level::Info, $($line)+) }; }

/// Writes a line at [`Level::Warn`], see [`log!`](crate::log!).
#[macro_export]
macro_rules! warn { ($($line:tt)+) => { $crate::log!($crate::log::Level::Warn, $($line)+) }; }

/// Writes a line at [`Level::Error`], see [`log!`](crate::log!).
#[macro_export]
macro_rules! error { ($($line:tt)+) => { $crate::log!($crate::log::Level::Error, $($line)+) }; }
