//! What the ggml device calls to place, lease and clear keys and values: the struct `ggml_flea_kv` of `ggml-flea.h`.
//! Invariant: no panic crosses into C++; after a failure the text is there for `last_error`. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: between the device and its ring of keys and values.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::{Shared, panicked};
use crate::error::{ErrorKind, Result};

/// `ggml_flea_kv`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvCalls {
    struct_size: u32,
    context: *const c_void,
    place: extern "C" fn(*const c_void, u32, u32, u64, u64) -> *mut c_void,
    acquire: extern "C" fn(*const c_void, u32) -> i32,
    wrote: extern "C" fn(*const c_void, u32, u32, u64, u64) -> i32,
    release: extern "C" fn(*const c_void, u32) -> i32,
    clear: extern "C" fn(*const c_void) -> i32,
    remove: extern "C" fn(*const c_void) -> i32,
    ring_bytes: extern "C" fn(*const c_void) -> u64,
}

pub(super) fn calls(shared: &Arc<Shared>) -> KvCalls {
    KvCalls {
        struct_size: size_of::<KvCalls>() as u32,
        context: Arc::as_ptr(shared).cast(),
        place,
        acquire,
        wrote,
        release,
        clear,
        remove,
        ring_bytes,
    }
}

/// Does `call`; a failure is kept for whoever asks why, and is what `on_error` makes of it.
fn guarded<T>(
    context: *const c_void,
    call: impl FnOnce(&Shared) -> Result<T>,
    on_error: impl FnOnce(ErrorKind) -> T,
) -> T {
    // SAFETY: the context is the `Shared` of a `KvDisk` that outlives the device's configuration (see `Streamed`).
    let shared = unsafe { &*context.cast::<Shared>() };
    let result = catch_unwind(AssertUnwindSafe(|| call(shared)));
    let result = result.unwrap_or_else(|_| Err(panicked()));
    match result {
        Ok(value) => value,
        Err(error) => {
            let kind = error.kind();
            // A stop is no failure: the next acquire may well be granted.
            if kind != ErrorKind::Canceled {
                shared.fail(error);
            }
            on_error(kind)
        }
    }
}

fn status(context: *const c_void, call: impl FnOnce(&Shared) -> Result<()>) -> i32 {
    guarded(
        context,
        |shared| call(shared).map(|()| 0),
        ErrorKind::status,
    )
}

extern "C" fn place(
    context: *const c_void,
    layer: u32,
    side: u32,
    rows_count: u64,
    row_bytes: u64,
) -> *mut c_void {
    guarded(
        context,
        |shared| {
            let address = shared.place(layer as usize, side as usize & 1, rows_count, row_bytes)?;
            Ok(address as *mut c_void)
        },
        |_| std::ptr::null_mut(),
    )
}

extern "C" fn acquire(context: *const c_void, layer: u32) -> i32 {
    status(context, |shared| shared.acquire(layer as usize))
}

extern "C" fn wrote(context: *const c_void, layer: u32, side: u32, first: u64, end: u64) -> i32 {
    status(context, |shared| {
        shared.wrote(layer as usize, side as usize & 1, first..end)
    })
}

extern "C" fn release(context: *const c_void, layer: u32) -> i32 {
    status(context, |shared| shared.release(layer as usize))
}

extern "C" fn clear(context: *const c_void) -> i32 {
    status(context, Shared::clear)
}

extern "C" fn remove(context: *const c_void) -> i32 {
    status(context, Shared::remove)
}

extern "C" fn ring_bytes(context: *const c_void) -> u64 {
    guarded(context, |shared| Ok(shared.sizes().2), |_| 0)
}
