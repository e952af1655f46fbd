//! The `FILE*` through which llama.cpp loads: it reads headers and host-kept tensors for real, in pieces that leave no
//! page cache behind, and for a weight that lies in a window it says "read" and touches nothing. Which of the two a read
//! is follows from where llama.cpp wants the bytes, not from the file offset: a tied embedding is loaded twice from one
//! offset, once as rows the host keeps, once as a head that flea streams. Invariant: no byte is written into a window.
//! Stands beside the last step of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
//!
//! glibc copies everything a custom stream reads through its own memory into the destination, and a window without memory
//! faults on that. So the program is linked with `--wrap=fread` (build.rs): llama.cpp's fread calls come to
//! `__wrap_fread` first, which knows our streams and passes all others on. Only seek and tell go through the stream.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

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

/// Our open streams and the addresses of their states.
static STREAMS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

unsafe extern "C" {
    /// libc's own fread, under the name `--wrap` gives it.
    fn __real_fread(
        target: *mut c_void,
        size: usize,
        count: usize,
        stream: *mut libc::FILE,
    ) -> usize;
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
            // Nothing reads through libc: were the program linked without --wrap, loading fails instead of faulting.
            read: None,
            write: None,
            seek: Some(on_seek),
            close: None,
        };
        let cookie = std::ptr::from_mut(state.as_mut()).cast::<c_void>();
        // SAFETY: the mode is a C string; the cookie is a boxed State that outlives the stream: Drop closes the stream first,
        // and nothing else borrows it while a call on the stream runs.
        let stream = unsafe { fopencookie(cookie, c"rb".as_ptr(), functions) };
        if stream.is_null() {
            return Err(
                Error::last_os("open a stream over the model").with_kind(ErrorKind::NoMemory)
            );
        }
        streams().push((stream as usize, cookie as usize));
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
        streams().retain(|(stream, _)| *stream != self.stream as usize);
        // SAFETY: the stream was opened by fopencookie and is closed once; the cookie is still alive.
        unsafe { libc::fclose(self.stream) };
    }
}

/// The State behind a cookie.
///
/// # Safety
/// `cookie` is the pointer given to fopencookie by [`ModelFile::open`], and the stream is not used by two threads at once.
unsafe fn state<'a>(cookie: *mut c_void) -> &'a mut State {
    // SAFETY: promised by the caller; one thread loads, so there is one reference at a time.
    unsafe { &mut *cookie.cast::<State>() }
}

fn streams() -> std::sync::MutexGuard<'static, Vec<(usize, usize)>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every `fread` of the program: ours are served here, others by libc.
///
/// # Safety
/// As `fread`.
#[unsafe(no_mangle)]
unsafe extern "C" fn __wrap_fread(
    target: *mut c_void,
    size: usize,
    count: usize,
    stream: *mut libc::FILE,
) -> usize {
    let cookie = streams()
        .iter()
        .find(|(known, _)| *known == stream as usize)
        .map(|(_, state)| *state);
    let Some(cookie) = cookie else {
        // SAFETY: the caller's own promise.
        return unsafe { __real_fread(target, size, count, stream) };
    };
    let Some(len_bytes) = size.checked_mul(count).filter(|len_bytes| *len_bytes > 0) else {
        return 0;
    };
    // SAFETY: the stream is open, so its state is alive.
    let state = unsafe { state(cookie as *mut c_void) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let in_window = |in_window: &InWindow| in_window(target.cast_const());
        if state.in_window.as_ref().is_some_and(in_window) {
            return Ok(state.skip(len_bytes));
        }
        // SAFETY: fread's caller promises len_bytes writable bytes at target, and they are not a window's.
        let target = unsafe { std::slice::from_raw_parts_mut(target.cast::<u8>(), len_bytes) };
        state.read(target)
    }));
    match outcome {
        Ok(Ok(read_bytes)) => read_bytes / size,
        Ok(Err(error)) => {
            state.error.get_or_insert(error);
            0
        }
        Err(_) => 0,
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MODEL_BYTES: usize = 3 << 20;

    fn byte_at(offset: usize) -> u8 {
        (offset % 251) as u8
    }

    fn model() -> (tempfile::TempDir, ShardFile) {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("model");
        let bytes: Vec<u8> = (0..MODEL_BYTES).map(byte_at).collect();
        let mut file = std::fs::File::create(&path).expect("create");
        file.write_all(&bytes).expect("write");
        file.sync_all().expect("sync");
        let shard = ShardFile::open(&path).expect("open");
        (folder, shard)
    }

    fn seek(file: &ModelFile, offset: i64, whence: c_int) -> i64 {
        // SAFETY: the stream is open.
        unsafe {
            assert_eq!(libc::fseeko(file.stream(), offset, whence), 0);
            libc::ftello(file.stream())
        }
    }

    /// Memory that faults on any touch.
    struct Forbidden(*mut c_void, usize);

    impl Forbidden {
        fn new(len_bytes: usize) -> Self {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh anonymous mapping wherever the kernel likes.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len_bytes,
                    libc::PROT_NONE,
                    flags,
                    -1,
                    0,
                )
            };
            assert_ne!(address, libc::MAP_FAILED);
            Self(address, len_bytes)
        }
    }

    impl Drop for Forbidden {
        fn drop(&mut self) {
            // SAFETY: mapped in new, unmapped once.
            unsafe { libc::munmap(self.0, self.1) };
        }
    }

    #[test]
    fn a_read_into_a_window_touches_nothing_and_the_next_read_goes_on_behind_it() {
        let (_folder, shard) = model();
        let window = Forbidden::new(2 << 20);
        let start = window.0 as usize;
        let in_window: InWindow = Box::new(move |address| address as usize == start);
        let file = ModelFile::open(
            VirtualFile::plain(MODEL_BYTES as u64),
            vec![shard],
            Some(in_window),
        )
        .expect("a stream");
        assert_eq!(seek(&file, 0, libc::SEEK_END), MODEL_BYTES as i64);
        assert_eq!(seek(&file, 1000, libc::SEEK_SET), 1000);
        // An odd length: a stream that copies even the tail would fault.
        let odd = (1 << 20) + 777;
        // SAFETY: the callback never writes into the forbidden memory; a write would fault and fail the test.
        let read = unsafe { libc::fread(window.0, odd, 1, file.stream()) };
        assert_eq!((read, file.skipped_bytes()), (1, odd as u64));
        let mut bytes = vec![0_u8; 700_001];
        // SAFETY: the vector has the bytes asked for.
        let read = unsafe { libc::fread(bytes.as_mut_ptr().cast(), bytes.len(), 1, file.stream()) };
        assert_eq!(read, 1);
        for (index, byte) in bytes.iter().enumerate() {
            assert_eq!(*byte, byte_at(1000 + odd + index), "byte {index}");
        }
    }

    #[test]
    fn small_reads_come_from_one_piece() {
        let (_folder, shard) = model();
        let file = ModelFile::open(VirtualFile::plain(MODEL_BYTES as u64), vec![shard], None)
            .expect("a stream");
        for offset in 0..1000_usize {
            let mut byte = 0_u8;
            // SAFETY: one byte is asked for and there is room for one.
            let read = unsafe { libc::fread((&raw mut byte).cast(), 1, 1, file.stream()) };
            assert_eq!((read, byte), (1, byte_at(offset)));
        }
        assert_eq!(file.read_bytes(), PIECE_BYTES as u64);
    }

    #[test]
    fn a_shard_that_shrank_is_named() {
        let (folder, shard) = model();
        let path = folder.path().join("model");
        let mut file = ModelFile::open(VirtualFile::plain(MODEL_BYTES as u64), vec![shard], None)
            .expect("a stream");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(4096))
            .expect("truncate");
        let mut bytes = vec![0_u8; MODEL_BYTES];
        // SAFETY: the vector has the bytes asked for.
        let read = unsafe { libc::fread(bytes.as_mut_ptr().cast(), bytes.len(), 1, file.stream()) };
        assert_eq!(read, 0);
        let error = file.take_error().expect("the read failed");
        assert!(error.to_string().contains("model"), "{error}");
        assert_eq!(error.kind().exit_code(), 5, "{error}");
    }
}
