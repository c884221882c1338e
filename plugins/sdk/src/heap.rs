//! The plugin's heap: a first mebibyte that is part of the initial memory, and growth in large steps after that.
//!
//! The standard allocator starts with nothing and grows the memory on first use. The host gives every event a fresh
//! instance, and growing costs it as much as the rest of the call. Memory that is never touched costs nothing.
//!
//! Not for WebAssembly with threads: there the feature does nothing and the standard allocator stays.
#![expect(unsafe_code, reason = "an allocator hands out raw memory")]

use core::{alloc::Layout, arch::wasm32, mem::MaybeUninit, ptr::NonNull};

use talc::{
    base::{Talc, binning::Binning},
    cell::TalcSyncCell,
    source::Source,
    wasm::WasmBinning,
};

const PAGE: usize = 64 * 1024;
/// Room for the largest payload that is usual, and for what is made of it.
const FIRST: usize = 16 * PAGE;
/// One growth serves many allocations.
const STEP_PAGES: usize = 16;

static mut ARENA: [MaybeUninit<u8>; FIRST] = [MaybeUninit::uninit(); FIRST];

#[global_allocator]
static HEAP: TalcSyncCell<Memory, WasmBinning> = TalcSyncCell::new_wasm(Memory { started: false, end: None });

/// Where the heap's memory comes from: the arena first, then new pages.
#[derive(Debug)]
struct Memory {
    started: bool,
    /// The end of the heap that grows, when there is one.
    end: Option<NonNull<u8>>,
}

// SAFETY: neither allocates nor touches the allocator other than through the reference that it is given.
unsafe impl Source for Memory {
    fn acquire<B: Binning>(heap: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        if !heap.source.started {
            heap.source.started = true;
            // SAFETY: nothing else refers to the arena, and the flag lets this run once.
            let claimed = unsafe { heap.claim((&raw mut ARENA).cast(), FIRST) };
            return claimed.map(|_| ()).ok_or(());
        }
        let needed = pages_for(layout);
        let (base, pages) = match grow(needed.max(STEP_PAGES)) {
            Some(grown) => grown,
            None => grow(needed).ok_or(())?,
        };
        let start = core::ptr::without_provenance_mut::<u8>(base);
        let length = pages.saturating_mul(PAGE);
        heap.source.end = match heap.source.end {
            // SAFETY: the new pages follow the heap directly, and `memory.grow` made them for this call alone.
            Some(end) if end.as_ptr() == start => Some(unsafe { heap.extend(end, start.wrapping_add(length)) }),
            // SAFETY: `memory.grow` made these pages for this call alone.
            _ => unsafe { heap.claim(start, length) },
        };
        heap.source.end.map(|_| ()).ok_or(())
    }
}

/// Pages that surely hold an allocation with its alignment and the allocator's own records.
fn pages_for(layout: Layout) -> usize {
    let overhead = layout.align().saturating_add(256);
    layout.size().saturating_add(overhead).div_ceil(PAGE)
}

/// The address of the first new page, and how many there are.
fn grow(pages: usize) -> Option<(usize, usize)> {
    match wasm32::memory_grow::<0>(pages) {
        usize::MAX => None,
        before => Some((before.saturating_mul(PAGE), pages)),
    }
}
