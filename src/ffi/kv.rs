//! The calls for KV codecs. Their comments are the header's.

#![allow(non_camel_case_types)]

use super::handle::text;
use super::{guard, invalid};
use crate::error::{Error, ErrorKind, Result};
use crate::kv::spec::COUNT_MAX;
use crate::kv::{Calibration, Choice, Codec, Coder, Spec, Values, frame};
use half::{bf16, f16};
use std::ffi::{c_char, c_void};

/// type: 4-byte floats.
pub const FLEA_KV_F32: u32 = 0;
/// type: IEEE halves.
pub const FLEA_KV_F16: u32 = 1;
/// type: the upper halves of 4-byte floats.
pub const FLEA_KV_BF16: u32 = 2;

/// A KV codec for vectors of one length. Opaque; it never changes, so any number of threads may use it at a time.
#[repr(C)]
#[derive(Debug)]
pub struct flea_kv {
    _private: [u8; 0],
}

/// What is in a frame.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_kv_frame {
    /// sizeof(flea_kv_frame), set by the caller.
    pub struct_size: u32,
    /// Values of a vector.
    pub dim: u32,
    /// Vectors in the frame.
    pub count: u64,
}

fn missing(name: &str) -> Error {
    invalid(format!("`{name}` is NULL"))
}

/// # Safety
/// NULL, or from flea_kv_open and not closed.
unsafe fn coder<'a>(kv: *const flea_kv) -> Result<&'a Coder> {
    // SAFETY: made by Box::into_raw in flea_kv_open, by this function's contract.
    unsafe { kv.cast::<Coder>().as_ref() }.ok_or_else(|| missing("kv"))
}

/// # Safety
/// `data` is NULL or has `len` elements.
unsafe fn slice<'a, T>(data: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() || !data.is_aligned() {
        return Err(invalid(format!("`{name}` is NULL or not aligned")));
    }
    // SAFETY: not NULL, aligned, `len` elements by contract.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// Values of `count` vectors; refuses counts whose bytes would overflow.
fn value_count(count: usize, dim: usize) -> Result<usize> {
    if count > COUNT_MAX {
        return Err(invalid(format!(
            "{count} vectors: a frame holds up to {COUNT_MAX}"
        )));
    }
    Ok(count * dim)
}

/// Copies an answer of any length to the caller's memory and says how long it is.
///
/// # Safety
/// `out` has `out_bytes` bytes; `written` is writable.
unsafe fn give(
    bytes: &[u8],
    out: *mut c_void,
    out_bytes: usize,
    written: *mut usize,
) -> Result<i32> {
    if written.is_null() {
        return Err(missing("written"));
    }
    // SAFETY: not NULL, writable by contract.
    unsafe { *written = bytes.len() };
    if bytes.len() > out_bytes {
        return Err(invalid(format!(
            "{} bytes are needed, `out` has {out_bytes}",
            bytes.len()
        )));
    }
    if out.is_null() {
        return Err(missing("out"));
    }
    // SAFETY: not NULL, with room for so many bytes by contract; ours is memory of its own.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.cast::<u8>(), bytes.len()) };
    Ok(0)
}

/// Makes a KV codec for vectors of `dim` values, 16 to 1024.
///
/// `codec`: "q8_0", "q4_0", "tq:4" (whole bits 1 to 8), "tq-ec:3.5" (1 to 8, for disk), "tcq:3" (1 to 4), "rotor:4", "spectral:3",
/// "dh013:4" (a baseline to compare with).
/// `calibration`, `calibration_bytes`: for spectral what flea_kv_calibrate gave; else NULL and 0. Nothing is kept.
/// `out`: receives the codec; give it to flea_kv_close. Set to NULL on failure.
/// Threads: any. Returns FLEA_OK or: INVALID, and for the calibration FORMAT, TRUNCATED, CHECKSUM.
///
/// # Safety
/// Pointers are NULL or as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_open(
    codec: *const c_char,
    dim: u32,
    calibration: *const c_void,
    calibration_bytes: usize,
    out: *mut *mut flea_kv,
) -> i32 {
    guard(|| {
        if out.is_null() {
            return Err(missing("out"));
        }
        // SAFETY: not NULL, and the host's by contract.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: a string or NULL by contract.
        let name = unsafe { text(codec, "the codec's name") }?.ok_or_else(|| missing("codec"))?;
        let spec = Spec::parse(name, dim as usize)?;
        // SAFETY: by this function's contract.
        let bytes = unsafe { slice(calibration.cast::<u8>(), calibration_bytes, "calibration") }?;
        let coder = match (spec.codec, bytes) {
            (Codec::Spectral, bytes) if !bytes.is_empty() => {
                Coder::with_calibration(spec, &Calibration::from_bytes(bytes)?)?
            }
            (_, []) => Coder::new(spec)?,
            _ => return Err(invalid(format!("'{name}' takes no calibration"))),
        };
        // SAFETY: as above.
        unsafe { *out = Box::into_raw(Box::new(coder)).cast() };
        Ok(0)
    })
}

/// Frees a KV codec. NULL is allowed.
///
/// Threads: no other call on this codec may run or follow.
///
/// # Safety
/// `kv` is NULL or came from flea_kv_open and was not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_close(kv: *mut flea_kv) {
    guard(|| {
        if !kv.is_null() {
            // SAFETY: made by Box::into_raw in flea_kv_open, and given back once.
            drop(unsafe { Box::from_raw(kv.cast::<Coder>()) });
        }
        Ok(0)
    });
}

/// The most bytes that flea_kv_encode can write for `count` vectors, whatever is in them (NaN and infinities are kept as
/// they are, and need more); 0 when `kv` is NULL or a frame cannot hold so many.
///
/// # Safety
/// `kv` is NULL or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_bound(kv: *const flea_kv, count: usize) -> usize {
    // SAFETY: by this function's contract.
    match unsafe { coder(kv) } {
        Ok(coder) if count <= COUNT_MAX => coder.bound_bytes(count),
        _ => 0,
    }
}

/// Encodes `count` vectors, one after the other in `values`, to a frame.
///
/// `type`: FLEA_KV_F32, FLEA_KV_F16 or FLEA_KV_BF16. `out` has `out_bytes` bytes; flea_kv_bound says how many are enough.
/// `written`: receives the length of the frame, also when `out` was too short for it.
/// Threads: any. Returns FLEA_OK or INVALID.
///
/// # Safety
/// `kv` is open; `values` has count x dim elements of `type`, aligned; the others are as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_encode(
    kv: *const flea_kv,
    r#type: u32,
    values: *const c_void,
    count: usize,
    out: *mut c_void,
    out_bytes: usize,
    written: *mut usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let coder = coder(kv)?;
            let len = value_count(count, coder.spec().dim)?;
            let values = match r#type {
                FLEA_KV_F32 => Values::F32(slice(values.cast(), len, "values")?),
                FLEA_KV_F16 => Values::F16(slice(values.cast::<f16>(), len, "values")?),
                FLEA_KV_BF16 => Values::Bf16(slice(values.cast::<bf16>(), len, "values")?),
                other => return Err(invalid(format!("{other} is no FLEA_KV type"))),
            };
            give(&coder.encode(values)?, out, out_bytes, written)
        }
    })
}

/// Says what is in a frame without decoding it. Set out->struct_size first.
///
/// Threads: any. Returns FLEA_OK, or FORMAT, TRUNCATED, CHECKSUM: no frame, or a damaged one; INVALID.
///
/// # Safety
/// `frame` has `frame_bytes` bytes; `out` has the bytes its struct_size says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_frame_info(
    frame: *const c_void,
    frame_bytes: usize,
    out: *mut flea_kv_frame,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let size = super::handle::size_of_output(out)?;
            let opened = frame::open(slice(frame.cast::<u8>(), frame_bytes, "frame")?)?;
            let info = flea_kv_frame {
                struct_size: size,
                dim: opened.spec.dim as u32,
                count: opened.count as u64,
            };
            super::handle::write_output(out, &info, size);
        }
        Ok(0)
    })
}

/// Decodes a frame to floats, `count` vectors of dim values: exactly as many as the frame holds.
///
/// Threads: any. Returns FLEA_OK, or FORMAT, TRUNCATED, CHECKSUM: no frame, or a damaged one (nothing is written then, or
/// not all); INVALID: another codec's frame, or another count.
///
/// # Safety
/// `kv` is open; `frame` has `frame_bytes` bytes; `values` has count x dim floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_decode(
    kv: *const flea_kv,
    frame: *const c_void,
    frame_bytes: usize,
    values: *mut f32,
    count: usize,
) -> i32 {
    guard(|| {
        // SAFETY: by this function's contract.
        unsafe {
            let coder = coder(kv)?;
            let len = value_count(count, coder.spec().dim)?;
            if len > 0 && (values.is_null() || !values.is_aligned()) {
                return Err(invalid("`values` is NULL or not aligned"));
            }
            let frame = slice(frame.cast::<u8>(), frame_bytes, "frame")?;
            let out = if len == 0 {
                &mut []
            } else {
                std::slice::from_raw_parts_mut(values, len)
            };
            coder.decode_into(frame, out)?;
        }
        Ok(0)
    })
}

/// Calibrates spectral on a sample: `count` vectors of `dim` floats that will not be coded with it, at least 4 x dim of
/// them. Part of the sample decides whether a basis saves 0.1 bit against tq:`bits`; where it does not, the answer is
/// UNSUPPORTED and tq is the better codec.
///
/// `out` has `out_bytes` bytes: 12 + 8 x dim + 2 x dim x dim are needed. `written`: receives the length.
/// Threads: any. Returns FLEA_OK, INVALID or UNSUPPORTED.
///
/// # Safety
/// `values` has count x dim floats; the others are as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flea_kv_calibrate(
    dim: u32,
    bits: u32,
    values: *const f32,
    count: usize,
    out: *mut c_void,
    out_bytes: usize,
    written: *mut usize,
) -> i32 {
    guard(|| {
        let choice: Choice = format!("spectral:{bits}").parse()?;
        let spec = Spec::new(choice.codec, choice.rate, dim as usize)?;
        let len = value_count(count, spec.dim)?;
        // SAFETY: by this function's contract.
        let sample = unsafe { slice(values, len, "values") }?;
        let (coder, calibration) = Coder::calibrated(spec, sample)?;
        let calibration = calibration.ok_or_else(|| {
            let gain = coder.fallback().map_or(0.0, |fallback| fallback.gain_bits);
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "a basis would save {gain:.3} bits per value of these vectors: use tq:{bits}"
                ),
            )
        })?;
        // SAFETY: by this function's contract.
        unsafe { give(&calibration.to_bytes(), out, out_bytes, written) }
    })
}
