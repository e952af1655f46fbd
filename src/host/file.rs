//! The `FILE*` through which llama.cpp loads: it reads headers and host-kept tensors for real, in pieces that leave no
//! page cache behind, and for a weight that lies in a window it says "read" and touches nothing. Which of the two a read
//! is follows from where llama.cpp wants the bytes, not from the file offset: a tied embedding is loaded twice from one
//! offset, once as rows the host keeps, once as a head that flea streams. Invariant: no byte is written into a window.
//! Stands beside the last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
//!
//! The stream is unbuffered: glibc would otherwise copy the tail of every read through its own memory into the
//! destination, which for a window without memory is a fault.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, ErrorKind, Result};
use crate::host::header::{Source, VirtualFile};
use crate::io::ShardFile;
use crate::units::Extent;

/// Small reads (header fields of a few bytes) are served from a piece of this size.
const PIECE_BYTES: usize = 256 << 10;

/// Says whether an address lies in a window.
pub type InWindow = Box<dyn Fn(*const c_void) -> bool + Send>;

/// The open stream and what stands behind it.
pub struct ModelFile {
    stream: *mut libc::FILE,
    // Boxed: the stream keeps its address. Declared after the stream, which is closed first (see Drop).
    state: Box<State>,
}

struct State {
    file: VirtualFile,
    shards: Vec<ShardFile>,
    in_window: Option<InWindow>,
    position_bytes: u64,
    piece: Vec<u8>,
    piece_of: Option<Extent>,
    read_bytes: u64,
    skipped_bytes: u64,
    error: Option<Error>,
}

#[repr(C)]
struct CookieFunctions {
    read: Option<extern "C" fn(*mut c_void, *mut c_char, usize) -> isize>,
    write: Option<extern "C" fn(*mut c_void, *const c_char, usize) -> isize>,
    seek: Option<extern "C" fn(*mut c_void, *mut i64, c_int) -> c_int>,
    close: Option<extern "C" fn(*mut c_void) -> c_int>,
}

unsafe extern "C" {
    fn fopencookie(
        cookie: *mut c_void,
        mode: *const c_char,
        functions: CookieFunctions,
    ) -> *mut libc::FILE;
}

impl std::fmt::Debug for ModelFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFile")
            .field("read_bytes", &self.state.read_bytes)
            .field("skipped_bytes", &self.state.skipped_bytes)
            .finish_non_exhaustive()
    }
}

impl ModelFile {
    /// Opens the stream over the shards; reads whose destination `in_window` knows are skipped.
    ///
    /// # Errors
    /// `NoMemory` where libc cannot make a stream.
    pub fn open(
        file: VirtualFile,
        shards: Vec<ShardFile>,
        in_window: Option<InWindow>,
    ) -> Result<Self> {
        let mut state = Box::new(State {
            file,
            shards,
            in_window,
            position_bytes: 0,
            piece: Vec::new(),
            piece_of: None,
            read_bytes: 0,
            skipped_bytes: 0,
            error: None,
        });
        let functions = CookieFunctions {
            read: Some(on_read),
            write: None,
            seek: Some(on_seek),
            close: None,
        };
        let cookie = std::ptr::from_mut(state.as_mut()).cast::<c_void>();
        // SAFETY: the mode is a C string; the cookie is a boxed State that outlives the stream: Drop closes the stream first,
        // and nothing else borrows it while a callback runs (callbacks run inside libc calls on the stream only).
        let stream = unsafe { fopencookie(cookie, c"rb".as_ptr(), functions) };
        if stream.is_null() {
            return Err(
                Error::last_os("open a stream over the model").with_kind(ErrorKind::NoMemory)
            );
        }
        // SAFETY: the stream is open and nothing has been read from it yet, as setvbuf demands.
        unsafe { libc::setvbuf(stream, std::ptr::null_mut(), libc::_IONBF, 0) };
        Ok(Self { stream, state })
    }

    /// The stream, for `llama_model_load_from_file_ptr`.
    pub(crate) const fn stream(&self) -> *mut libc::FILE {
        self.stream
    }

    /// Bytes read from the shards so far.
    #[must_use]
    pub const fn read_bytes(&self) -> u64 {
        self.state.read_bytes
    }

    /// Bytes that llama.cpp asked for and that stay where they are.
    #[must_use]
    pub const fn skipped_bytes(&self) -> u64 {
        self.state.skipped_bytes
    }

    /// The error that a read met, if one did: llama.cpp only knows that it failed.
    pub fn take_error(&mut self) -> Option<Error> {
        self.state.error.take()
    }
}

impl Drop for ModelFile {
    fn drop(&mut self) {
        // SAFETY: the stream was opened by fopencookie and is closed once; the cookie is still alive.
        unsafe { libc::fclose(self.stream) };
    }
}

/// The State behind a cookie.
///
/// # Safety
/// `cookie` is the pointer given to fopencookie by [`ModelFile::open`].
unsafe fn state<'a>(cookie: *mut c_void) -> &'a mut State {
    // SAFETY: promised by the caller; libc locks the stream during a callback, so there is one reference at a time.
    unsafe { &mut *cookie.cast::<State>() }
}

fn set_errno(errno: c_int) {
    // SAFETY: __errno_location gives the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno };
}

extern "C" fn on_read(cookie: *mut c_void, target: *mut c_char, len_bytes: usize) -> isize {
    // SAFETY: libc passes the cookie of this stream.
    let state = unsafe { state(cookie) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let inside = state
            .in_window
            .as_ref()
            .is_some_and(|in_window| in_window(target.cast_const().cast()));
        if inside {
            return Ok(state.skip(len_bytes));
        }
        // SAFETY: fread's caller promises len_bytes writable bytes at target, and they are not a window's.
        let target = unsafe { std::slice::from_raw_parts_mut(target.cast::<u8>(), len_bytes) };
        state.read(target)
    }));
    match outcome {
        Ok(Ok(read)) => isize::try_from(read).unwrap_or(isize::MAX),
        Ok(Err(error)) => {
            set_errno(error.errno().unwrap_or(libc::EIO));
            state.error.get_or_insert(error);
            -1
        }
        Err(_) => {
            set_errno(libc::EIO);
            -1
        }
    }
}

extern "C" fn on_seek(cookie: *mut c_void, offset: *mut i64, whence: c_int) -> c_int {
    // SAFETY: libc passes the cookie of this stream and a valid pointer to the wanted offset.
    let (state, offset) = unsafe { (state(cookie), &mut *offset) };
    let base = match whence {
        libc::SEEK_SET => 0,
        libc::SEEK_CUR => state.position_bytes,
        libc::SEEK_END => state.file.len_bytes(),
        _ => return -1,
    };
    match base
        .checked_add_signed(*offset)
        .map(|at| (at, i64::try_from(at)))
    {
        Some((at, Ok(signed))) => {
            state.position_bytes = at;
            *offset = signed;
            0
        }
        _ => -1,
    }
}

impl State {
    fn skip(&mut self, len_bytes: usize) -> usize {
        let left_bytes = self.file.len_bytes().saturating_sub(self.position_bytes);
        let skipped = left_bytes.min(len_bytes as u64);
        self.position_bytes += skipped;
        self.skipped_bytes += skipped;
        skipped as usize
    }

    fn read(&mut self, target: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < target.len() {
            let rest = &mut target[done..];
            let Some(source) = self.file.source(self.position_bytes, rest.len() as u64) else {
                break;
            };
            let taken = match source {
                Source::Made(bytes) => {
                    rest[..bytes.len()].copy_from_slice(bytes);
                    bytes.len()
                }
                Source::Zeros(len_bytes) => {
                    rest[..len_bytes as usize].fill(0);
                    len_bytes as usize
                }
                Source::Shard(extent) => self.read_shard(extent, rest)?,
            };
            self.position_bytes += taken as u64;
            done += taken;
        }
        Ok(done)
    }

    /// Reads the start of `extent` into `target`, as far as one piece or one request reaches.
    fn read_shard(&mut self, extent: Extent, target: &mut [u8]) -> Result<usize> {
        let len_bytes = extent.len_bytes as usize;
        let held = self.piece_of.is_some_and(|piece| {
            piece.shard_index == extent.shard_index
                && (piece.offset_bytes..piece.end_bytes()).contains(&extent.offset_bytes)
        });
        let shard = &self.shards[extent.shard_index as usize];
        if !held && len_bytes >= PIECE_BYTES {
            let taken = len_bytes.min(16 * PIECE_BYTES);
            shard.read_exact_at(extent.offset_bytes, &mut target[..taken])?;
            self.read_bytes += taken as u64;
            return Ok(taken);
        }
        if !held {
            let start_bytes = crate::units::align_down(extent.offset_bytes, 4096);
            let piece_bytes = (shard.len_bytes() - start_bytes).min(PIECE_BYTES as u64);
            self.piece.resize(piece_bytes as usize, 0);
            self.piece_of = None;
            shard.read_exact_at(start_bytes, &mut self.piece)?;
            self.read_bytes += piece_bytes;
            self.piece_of = Some(Extent {
                shard_index: extent.shard_index,
                offset_bytes: start_bytes,
                len_bytes: piece_bytes,
            });
        }
        let piece_offset =
            self.piece_of
                .map_or(0, |piece| extent.offset_bytes - piece.offset_bytes) as usize;
        let taken = len_bytes.min(self.piece.len() - piece_offset);
        target[..taken].copy_from_slice(&self.piece[piece_offset..piece_offset + taken]);
        Ok(taken)
    }
}
