//! The calls of the C ABI. Their comments are the header's.

use super::handle::{Handle, handle, path, read_options, size_of_output, text, write_output};
use super::types::{
    FLEA_ABI_VERSION, flea_gpu, flea_info, flea_model, flea_open_options, flea_range,
    flea_stats_data, flea_tensor,
};
use super::{LAST, guard, invalid};
use crate::engine::{RANGES_MAX, ROWS_MAX};
use crate::error::{Error, ErrorKind, Result};
use std::ffi::{c_char, c_void};
use std::time::Duration;

/// The version of this interface that the library implements: FLEA_ABI_VERSION of its own header.
#[unsafe(no_mangle)]
pub extern "C" fn flea_abi_version() -> u32 {
    FLEA_ABI_VERSION
}

/// Opens a model: reads its headers, reserves addresses for its tensors and, unless FLEA_OPEN_DEFER_PLAN is set, makes
/// the plan, allocates the pool and begins to read.
///
/// `path`: a GGUF file, any shard of a split GGUF, a safetensors file or index, or a directory with one of them.
/// `options`: NULL for the defaults. Neither is kept, except options->host_pending_bytes.
/// `out`: receives the model; give it to flea_model_close. Set to NULL on failure.
/// Threads: any. Do not fork and use the model in the child: its memory is not there.
/// Returns FLEA_OK or: NOTFOUND, PERM, IO, FORMAT, TRUNCATED, UNSUPPORTED (the file), REFUSED (the budget), NOMEM, INVALID,
/// CONN (no daemon answers at options->endpoint).
///
/// # Safety
/// Pointers are NULL or as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_open(
    path_text: *const c_char,
    options: *const flea_open_options,
    out: *mut *mut flea_model,
) -> i32 {
    guard(|| {
        if out.is_null() {
            return Err(invalid("`out` is NULL"));
        }
        // SAFETY: not NULL, and the host's by contract.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: by this function's contract.
        let (path, options) = unsafe { (path(path_text)?, read_options(options)?) };
        let handle = Box::new(Handle::open(path, &options)?);
        // SAFETY: as above.
        unsafe { *out = Box::into_raw(handle).cast() };
        Ok(0)
    })
}

/// Closes a model: ends its reads and frees its memory. NULL is allowed.
///
/// Threads: no other call on this model may run or follow. Every pointer it gave is dead afterwards.
///
/// # Safety
/// `model` is NULL or came from flea_model_open and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_close(model: *mut flea_model) {
    guard(|| {
        if !model.is_null() {
            // SAFETY: made by Box::into_raw in flea_model_open, and given back once.
            drop(unsafe { Box::from_raw(model.cast::<Handle>()) });
        }
        Ok(0)
    });
}

/// Describes a model. Set out->struct_size first.
///
/// Threads: any. Returns FLEA_OK or INVALID.
///
/// # Safety
/// `model` is open; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_info(model: *const flea_model, out: *mut flea_info) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let handle = handle(model)?;
            let size = size_of_output(out)?;
            write_output(out, &handle.info(size), size);
        }
        Ok(0)
    })
}

/// Describes one of the GPUs that the layers are on, by its place among them (0 to flea_info.gpu_count - 1), which is that of its
/// layers. Set out->struct_size first.
///
/// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
///
/// # Safety
/// `model` is open; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_gpu(
    model: *const flea_model,
    place: u32,
    out: *mut flea_gpu,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let handle = handle(model)?;
            let size = size_of_output(out)?;
            write_output(out, &handle.gpu(place, size)?, size);
        }
        Ok(0)
    })
}

/// Finds a tensor by name. Set out->struct_size first.
///
/// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
///
/// # Safety
/// `model` is open; `name` is a string; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_tensor(
    model: *const flea_model,
    name: *const c_char,
    out: *mut flea_tensor,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let handle = handle(model)?;
            let size = size_of_output(out)?;
            let name = text(name, "the tensor's name")?
                .ok_or_else(|| invalid("the tensor's name is NULL"))?;
            let (index, _) = handle.model.catalog().tensor(name).ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("the model has no tensor '{name}'"),
                )
            })?;
            write_output(out, &handle.tensor(index, size), size);
        }
        Ok(0)
    })
}

/// Describes the tensor at place `index` (0 to flea_info.tensor_count - 1). Set out->struct_size first.
///
/// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
///
/// # Safety
/// `model` is open; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_model_tensor_at(
    model: *const flea_model,
    index: u32,
    out: *mut flea_tensor,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let handle = handle(model)?;
            let size = size_of_output(out)?;
            let count = handle.model.catalog().tensors.len();
            if index as usize >= count {
                let context = format!("tensor {index} does not exist, the model has {count}");
                return Err(Error::new(ErrorKind::NotFound, context));
            }
            write_output(out, &handle.tensor(index as usize, size), size);
        }
        Ok(0)
    })
}

/// The layer whose weight lies at `addr`, or FLEA_E_NOTFOUND. Any address inside a tensor will do.
///
/// Threads: any; takes no lock. Leaves flea_last_error as it is.
///
/// # Safety
/// `model` is open. `addr` is only compared.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_layer_of(model: *const flea_model, addr: *const c_void) -> i32 {
    // SAFETY: by this function's contract. Nothing in here panics or allocates.
    match unsafe { handle(model) } {
        Ok(handle) => match handle.model.layer_of(addr as usize) {
            Some(layer) => i32::try_from(layer).unwrap_or(i32::MAX),
            None => ErrorKind::NotFound.status(),
        },
        Err(error) => error.kind().status(),
    }
}

/// Waits until a layer is in memory and keeps it there until flea_release.
///
/// `addr`, `bytes`: NULL and 0 for the whole layer; otherwise only that range of it has to be there.
/// `timeout_ns`: below 0 waits for ever, 0 only tries.
/// Leases are counted: release as often as you acquire. Hold few: the ring has flea_info.slots_count slots.
/// Threads: any. Returns FLEA_OK or: AGAIN, TIMEOUT, BUSY (this thread holds what it would wait for), REFUSED (a deferred
/// plan does not fit), IO, TRUNCATED, CHANGED, NOMEM, INVALID. After an error the next acquire reads again.
/// Through a daemon also CONN (it went away) and REVOKED (it took a lease back that was held for too long while others
/// waited): both are final for this model; close it and open it again. Held layers stay mapped, but after REVOKED their
/// bytes may change.
///
/// # Safety
/// `model` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_acquire(
    model: *mut flea_model,
    layer: u32,
    addr: *const c_void,
    bytes: usize,
    timeout_ns: i64,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let handle = unsafe { handle(model) }?;
        handle.refresh_pending();
        let range = (!addr.is_null()).then_some((addr as usize, bytes));
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        handle.model.acquire(layer, range, timeout)?;
        Ok(0)
    })
}

/// Gives back one lease of a layer. Its bytes may change from now on. On a GPU: nothing there reads the layer any more; see
/// flea_release_after.
///
/// Threads: any, also another than the acquire's. Returns FLEA_OK or INVALID (the layer is not acquired).
///
/// # Safety
/// `model` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_release(model: *mut flea_model, layer: u32) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe { handle(model) }?.model.release(layer)?;
        Ok(0)
    })
}

/// Gives back one lease of a layer that a GPU still reads: its bytes change only when everything is done that `cuda_event`
/// stands for. The host does not wait, and may record the event anew at once.
///
/// `cuda_event`: a `CUevent` or `cudaEvent_t` of the GPU that has the layer (flea_tensor.gpu_index), recorded behind the last kernel
/// that reads it. A captured CUDA graph that reads the layer must be launched anew under each lease; its addresses stay as they are.
/// Threads: any, also another than the acquire's. Returns FLEA_OK or: INVALID (the layer is not acquired, or the model is not on
/// a GPU: use flea_release there), IO (the GPU is lost).
///
/// # Safety
/// `model` is open; `cuda_event` is alive during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_release_after(
    model: *mut flea_model,
    layer: u32,
    cuda_event: *mut c_void,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe { handle(model)?.model.release_after(layer, cuda_event) }?;
        Ok(0)
    })
}

/// Waits until all ranges are in memory and keeps them there until flea_release_ranges with the same ranges: for weights that
/// are known only at run time, such as the experts that a router chose. All reads of a call are started at once.
///
/// `ranges`: `count` of them, 1 to 65536, each inside a tensor of a layer; not kept. A range of a weight that comes with its
/// layer is a lease of that range of the layer, as flea_acquire gives it. A call gets all of its ranges or none.
/// `timeout_ns`: below 0 waits for ever, 0 starts the reads and says whether they were needed.
/// Threads: any. Returns FLEA_OK or: INVALID (a range that is not all weights), REFUSED (more experts than their cache has
/// slots: ask for fewer at a time), BUSY (this thread holds what it would wait for), UNSUPPORTED (on a GPU, where experts
/// come with their layer), and what flea_acquire returns.
///
/// # Safety
/// `model` is open; `ranges` has `count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_acquire_ranges(
    model: *mut flea_model,
    ranges: *const flea_range,
    count: usize,
    timeout_ns: i64,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let (handle, ranges) = unsafe { (handle(model)?, ranges_of(ranges, count)?) };
        handle.refresh_pending();
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        handle.model.acquire_ranges(&ranges, timeout)?;
        Ok(0)
    })
}

/// Gives back what a flea_acquire_ranges with the same ranges got. Their bytes may change from now on.
///
/// Threads: any, also another than the acquire's. Returns FLEA_OK or INVALID (they are not acquired).
///
/// # Safety
/// `model` is open; `ranges` has `count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_release_ranges(
    model: *mut flea_model,
    ranges: *const flea_range,
    count: usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let (handle, ranges) = unsafe { (handle(model)?, ranges_of(ranges, count)?) };
        handle.model.release_ranges(&ranges)?;
        Ok(0)
    })
}

/// Says which ranges flea_acquire_ranges will ask for next, in this order: the experts among them are read while nothing else
/// is asked for, into memory that no lease holds, and stay there until they were acquired once. What was said before is
/// forgotten; `count` 0 only forgets. Ranges of weights that come with their layer are passed over, and so is everything
/// where no tensor has FLEA_TENSOR_EXPERTS. A wrong hint costs time, never a wrong byte.
///
/// `ranges`: `count` of them, 0 to 65536, each inside a tensor of a layer, which may be all of it; not kept.
/// Threads: any. Returns FLEA_OK, INVALID (a range that is not all weights), or what a deferred plan says.
///
/// # Safety
/// `model` is open; `ranges` has `count` elements, and may be NULL when `count` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_hint_ranges(
    model: *mut flea_model,
    ranges: *const flea_range,
    count: usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let handle = unsafe { handle(model) }?;
        if count == 0 {
            handle.model.hint_ranges(&[])?;
            return Ok(0);
        }
        // SAFETY: by this function's contract.
        let ranges = unsafe { ranges_of(ranges, count) }?;
        handle.refresh_pending();
        handle.model.hint_ranges(&ranges)?;
        Ok(0)
    })
}

/// A host's ranges as addresses and lengths.
///
/// # Safety
/// `ranges` is NULL or has `count` elements.
unsafe fn ranges_of(ranges: *const flea_range, count: usize) -> Result<Vec<(usize, usize)>> {
    if ranges.is_null() || !(1..=RANGES_MAX).contains(&count) {
        let text = format!("`ranges` is NULL, or {count} ranges; 1 to {RANGES_MAX} are possible");
        return Err(invalid(text));
    }
    // SAFETY: not NULL, `count` elements by this function's contract.
    let ranges = unsafe { std::slice::from_raw_parts(ranges, count) };
    let range = |range: &flea_range| {
        let len = usize::try_from(range.bytes).map_err(|_| invalid("a range longer than memory"));
        Ok((range.addr as usize, len?))
    };
    ranges.iter().map(range).collect()
}

/// Copies rows of a table of embeddings, those of the tokens that are about to be computed. They are read from the file row
/// by row, many reads at once, unless the table's small cache has them.
///
/// `table`: flea_tensor.data of a tensor with FLEA_TENSOR_ROWS.
/// `rows`: `count` row numbers, in any order and more than once; not kept.
/// `out`: receives them one behind the other: `count` times flea_tensor.bytes over the second of its `shape`.
/// The first call for a table takes the memory for its reads. Where flea derives the budget from `memory` that must be before
/// the first acquire or hint of a model opened with FLEA_OPEN_DEFER_PLAN; it may be a call with `count` 0, and REFUSED says
/// that it came too late.
/// Threads: any; calls for one table wait for each other. Returns FLEA_OK or: INVALID (no such table, or a row that it does
/// not have), REFUSED, NOMEM, IO, TRUNCATED, CHANGED, TIMEOUT, UNSUPPORTED (through a daemon). `out` means nothing then.
///
/// # Safety
/// `model` is open; `rows` has `count` elements and `out` has `out_bytes` bytes; both may be NULL when `count` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_read_rows(
    model: *mut flea_model,
    table: *const c_void,
    rows: *const i32,
    count: usize,
    out: *mut c_void,
    out_bytes: usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let handle = unsafe { handle(model) }?;
        if count == 0 {
            handle.model.read_rows(table as usize, &[], &mut [])?;
            return Ok(0);
        }
        if rows.is_null() || out.is_null() || count > ROWS_MAX {
            return Err(invalid(format!(
                "`rows` or `out` is NULL, or {count} rows; at most {ROWS_MAX} are possible"
            )));
        }
        // SAFETY: not NULL, `count` elements by contract.
        let rows = unsafe { std::slice::from_raw_parts(rows, count) };
        // SAFETY: not NULL, `out_bytes` bytes by contract, and no other thread uses them during the call.
        let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<u8>(), out_bytes) };
        let row = |row: &i32| {
            u32::try_from(*row).map_err(|_| invalid(format!("row {row}: none is below 0")))
        };
        let rows: Vec<u32> = rows.iter().map(row).collect::<Result<_>>()?;
        handle.model.read_rows(table as usize, &rows, out)?;
        Ok(0)
    })
}

/// Says which layers will be acquired next, in order. flea learns the order of a pass by itself; a hint overrides it
/// once. A wrong hint costs time, never a wrong byte.
///
/// Threads: any. `layers` is not kept. Returns FLEA_OK, INVALID, or what a deferred plan says.
///
/// # Safety
/// `model` is open; `layers` has `count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_hint(
    model: *mut flea_model,
    layers: *const u32,
    count: usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        let handle = unsafe { handle(model) }?;
        if count == 0 {
            return Ok(0);
        }
        if layers.is_null() || count > 1 << 20 {
            return Err(invalid("`layers` is NULL, or more than 1048576"));
        }
        handle.refresh_pending();
        // SAFETY: not NULL, `count` elements by contract.
        let layers = unsafe { std::slice::from_raw_parts(layers, count) };
        handle.model.hint(layers)?;
        Ok(0)
    })
}

/// Counters of a model. Set out->struct_size first. Measures the pages of the pool, so do not call it in a hot loop.
///
/// Threads: any. Returns FLEA_OK or INVALID.
///
/// # Safety
/// `model` is open; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_stats(model: *const flea_model, out: *mut flea_stats_data) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let handle = handle(model)?;
            let size = size_of_output(out)?;
            write_output(out, &handle.stats(size), size);
        }
        Ok(0)
    })
}

/// The text of this thread's last failed call: path, offset, errno and remedy where there are any. Never NULL; empty
/// when nothing failed. Valid until the next call that fails on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn flea_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().text.as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// The errno of this thread's last failed call; 0 when the kernel was not the cause.
#[unsafe(no_mangle)]
pub extern "C" fn flea_last_errno() -> i32 {
    LAST.try_with(|last| last.borrow().errno).unwrap_or(0)
}

/// The name of a status, such as "FLEA_E_REFUSED"; "FLEA_E_UNKNOWN" for a number that is none. A constant string.
#[unsafe(no_mangle)]
pub extern "C" fn flea_status_name(status: i32) -> *const c_char {
    let name = match status {
        0 => c"FLEA_OK",
        -1 => c"FLEA_E_INVALID",
        -2 => c"FLEA_E_NOMEM",
        -3 => c"FLEA_E_IO",
        -4 => c"FLEA_E_FORMAT",
        -5 => c"FLEA_E_NOTFOUND",
        -6 => c"FLEA_E_AGAIN",
        -7 => c"FLEA_E_TIMEOUT",
        -8 => c"FLEA_E_BUSY",
        -9 => c"FLEA_E_CONN",
        -10 => c"FLEA_E_PERM",
        -11 => c"FLEA_E_REFUSED",
        -12 => c"FLEA_E_UNSUPPORTED",
        -13 => c"FLEA_E_TRUNCATED",
        -14 => c"FLEA_E_CHANGED",
        -15 => c"FLEA_E_CHECKSUM",
        -16 => c"FLEA_E_REVOKED",
        -17 => c"FLEA_E_CANCELED",
        -99 => c"FLEA_E_INTERNAL",
        _ => c"FLEA_E_UNKNOWN",
    };
    name.as_ptr()
}
