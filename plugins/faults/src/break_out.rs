//! The two ways out of a handler that good code never takes, apart from the rest because the lints forbid them there.

/// Executes the instruction that traps; the process ends where there is no such instruction.
pub(crate) fn trap() -> ! {
    #[cfg(target_arch = "wasm32")]
    core::arch::wasm32::unreachable();
    #[cfg(not(target_arch = "wasm32"))]
    std::process::abort()
}

/// Panics with this message.
#[expect(clippy::panic, reason = "this is what it is for")]
pub(crate) fn panic_with(message: &str) -> ! {
    panic!("{message}")
}
