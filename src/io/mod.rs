//! The reader: moves bytes of shards into memory at the rate of the drive, by io_uring or by pread threads.
//!
//! Both readers are one enum with the same behaviour: requests go in with [`Reader::submit`], completions come out of
//! [`Reader::wait`], from one thread. Invariants: memory belongs to the kernel from submit until the completion says
//! `returned`; a completion is never lost and never doubled; nothing is allocated per request; every way in which
//! reading is less than asked for (threads instead of io_uring, the page cache instead of O_DIRECT) can be asked about.
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`; it knows offsets and addresses,
//! neither tensors nor slots.
#![allow(unsafe_code)]

pub mod bulk;
pub mod cached;
pub mod coded_file;
pub mod direct;
pub mod fault;
mod filesystem;
#[cfg(feature = "cuda")]
pub mod gds;
pub mod mapped;
mod memory;
pub mod mirror;
pub mod packed;
mod pread;
pub mod profile;
mod request;
pub mod rows;
mod setup;
pub mod spill;
mod thread;
mod uring;

#[cfg(all(test, feature = "faults"))]
mod fault_tests;
#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

pub use direct::{DirectIo, HeaderReader, Identity, ShardFile};
pub use memory::AlignedMemory;
pub use request::REQUEST_MOST_BYTES;
pub use spill::SpillFile;
pub use thread::{pin_current_thread, wake_promptly};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{MIB, PAGE_2M, PAGE_4K};
use fault::{Faults, Injector};
use request::Rules;

/// Which reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReaderKind {
    /// io_uring, or pread threads where the system does not allow it.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// pread threads.
    Pread,
    /// cuFile, into the memory of a GPU; what it cannot be had for is read as with `Auto`.
    Gds,
}

impl ReaderKind {
    /// As it is written on command lines and in stats.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Pread => "pread",
            Self::Gds => "gds",
        }
    }
}

impl fmt::Display for ReaderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ReaderKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" | "io-uring" | "uring" => Ok(Self::IoUring),
            "pread" => Ok(Self::Pread),
            "gds" => Ok(Self::Gds),
            _ => Err(format!(
                "'{text}' is not a reader; write auto, io_uring, pread or, with a GPU, gds"
            )),
        }
    }
}

/// How to read. `Default` is right for 2 MiB pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderOptions {
    /// Which reader.
    pub kind: ReaderKind,
    /// Length of one request; 0 = [`default_request_bytes`] for `page_bytes`. The reader takes any length that is
    /// submitted: this is what [`Reader::request_bytes`] answers to whoever cuts the work.
    pub request_bytes: u32,
    /// Requests in flight; 0 = [`default_depth`].
    pub depth: u32,
    /// Page size of the memory that is read into; 0 = 2 MiB.
    pub page_bytes: u64,
    /// A request that is not done by then fails, and its memory may have to be quarantined.
    pub deadline_ns: u64,
    /// How often a failed read is tried again.
    pub retries: u32,
    /// Several threads submit and wait, one at a time and each until nothing is in flight; false binds the reader to the
    /// first.
    pub any_thread: bool,
    /// The files are those of so many drives, equally many of each, one drive behind the other; 0 = one. Threads that
    /// read have one each to themselves.
    pub drives_count: u32,
    /// CPUs for the threads of the pread reader; empty = wherever the scheduler puts them. The thread that drives a
    /// reader pins itself with [`pin_current_thread`].
    pub cpus: Vec<u32>,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            kind: ReaderKind::Auto,
            request_bytes: 0,
            depth: 0,
            page_bytes: 0,
            // The nvme driver itself gives up after 30 s, resets and tries again; virtio never does.
            deadline_ns: 30_000_000_000,
            retries: 4,
            any_thread: false,
            drives_count: 1,
            cpus: Vec::new(),
        }
    }
}

/// Length of one request for memory of this page size.
///
/// Measured 2026-11 on a virtio drive (2 busy cores, ext4, 2 GiB file), walking through 128 MiB of memory as streaming
/// does; median GB/s and CPU seconds per GB of 8 to 30 interleaved rotations of 0.3 s:
///
/// | pages | 512 KiB x 8 | 1 MiB x 8 | 1 MiB x 16 | 2 MiB x 8 | 4 MiB x 4 | 4 MiB x 8 | 8 MiB x 8 |
/// |---|---|---|---|---|---|---|---|
/// | 2 MiB | 1.66, 0.014 | 1.69, 0.012 | 1.73, 0.009 | 1.87, 0.008 | 1.86, 0.007 | 1.93, 0.005 | 1.80, 0.004 |
/// | 4 KiB | 0.88, 0.093 | 1.02, 0.082 | 1.08, 0.082 | 1.05, 0.078 | 1.09, 0.074 | 1.08, 0.073 | - |
///
/// On 2 MiB pages 4 MiB is the fastest and by far the steadiest (slowest tenth 1.82 against 1.44 with 1 MiB). On 4 KiB
/// pages a request of the drive ends at 254 segments, about 1 MiB, and longer ones are only split again; layers are
/// small there, so 1 MiB it is.
///
/// A benchmark that reads into the same few MiB again and again looks faster than any of these, because its memory
/// stays in a processor cache. 512 KiB x 8 over memory of 4 / 16 / 32 / 64 / 128 / 512 / 2048 MiB on a quiet machine:
/// 2.24 / 2.06 / 1.92 / 1.77 / 1.76 / 1.82 / 1.86 GB/s. Weights that stay cannot have that, nor does it pay to read
/// there and copy: 1.8 GB/s, and a core's time.
#[must_use]
pub const fn default_request_bytes(page_bytes: u64) -> u32 {
    if page_bytes >= PAGE_2M {
        (4 * MIB) as u32
    } else {
        MIB as u32
    }
}

/// Requests in flight for requests of this length: 32 MiB worth, 4 to 16 of them. More only makes an urgent layer wait
/// for the queue (32 MiB are 17 ms at 1.9 GB/s); see [`default_request_bytes`] for the measurement.
#[must_use]
pub const fn default_depth(request_bytes: u32) -> u32 {
    match 32 * MIB as u32 / if request_bytes == 0 { 1 } else { request_bytes } {
        0..=4 => 4,
        depth @ 5..=15 => depth,
        _ => 16,
    }
}

/// Most requests in flight.
pub const DEPTH_MOST: u32 = 256;

/// A read to be done. Offset, length and target are multiples of 4 KiB; the length may reach past the end of the file,
/// what lies there is zeroed.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Comes back in the completion.
    pub key: u64,
    /// Which of the reader's files.
    pub shard_index: u32,
    /// Where in the file.
    pub offset_bytes: u64,
    /// How many bytes.
    pub len_bytes: u64,
    /// Where to.
    pub target: *mut u8,
}

/// A request that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The key of the request.
    pub key: u64,
    /// Whether all its bytes are in place.
    pub result: Result<()>,
    /// False: the kernel still owns the memory and may write to it at any time. Quarantine it; there is no further
    /// completion for this key.
    pub returned: bool,
}

/// What a reader did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes the kernel delivered.
    pub bytes: u64,
    /// Reads the kernel answered with bytes.
    pub reads: u64,
    /// Reads that came back shorter than asked for, before the end of the file.
    pub shorts: u64,
    /// Reads tried again after EIO, EAGAIN or EINTR.
    pub retries: u64,
    /// Requests whose deadline passed.
    pub timeouts: u64,
    /// Of those, the ones the kernel has not given back yet.
    pub quarantined: u64,
    /// Time with at least one request in flight: bytes / busy_ns is GB/s.
    pub busy_ns: u64,
}

/// Moves bytes. Submit and wait from one thread: the first that uses it, but for [`ReaderOptions::any_thread`].
#[derive(Debug)]
pub enum Reader {
    /// One io_uring.
    Uring(Box<uring::UringReader>, Resolved),
    /// Two to four threads that pread.
    Pread(pread::PreadReader, Resolved),
}

/// What the options came to.
#[derive(Debug, Clone)]
pub struct Resolved {
    request_bytes: u32,
    fallback: Option<String>,
}

impl Reader {
    /// A reader over these files. `Auto` falls back to threads where io_uring is not allowed or not there (EPERM,
    /// EACCES, ENOSYS, ENOMEM, a kernel before 5.11), for compressed files, and for files on FUSE, where io_uring has been seen to complete
    /// with full length and wrong bytes after a short reply of the server; [`Reader::fallback`] then says why.
    ///
    /// # Errors
    /// `Permission`, `Unsupported` or `NoMemory` where `IoUring` is asked for and not to be had; `Unsupported` for `Gds`, which
    /// is no reader of host memory; `Invalid` for a depth
    /// over [`DEPTH_MOST`] or an unknown fault.
    pub fn new(files: Arc<[ShardFile]>, options: &ReaderOptions) -> Result<Self> {
        Self::with_faults(files, options, Faults::from_env()?)
    }

    /// [`Reader::new`] with faults given instead of read from the environment; without feature `faults` none fires.
    ///
    /// # Errors
    /// As [`Reader::new`].
    pub fn with_faults(
        files: Arc<[ShardFile]>,
        options: &ReaderOptions,
        faults: Faults,
    ) -> Result<Self> {
        let setup = Setup::new(files, options, faults)?;
        match options.kind {
            ReaderKind::Pread => setup.pread(None),
            ReaderKind::IoUring => match setup.decoded() {
                Some(reason) => Err(Error::new(ErrorKind::Unsupported, reason)),
                None => setup.uring().map_err(|refused| refused.error),
            },
            ReaderKind::Gds => Err(Error::new(
                ErrorKind::Unsupported,
                "the reader gds reads into the memory of a GPU (--gpu); for host memory write auto, io_uring or pread",
            )),
            ReaderKind::Auto => {
                if let Some(reason) = setup.decoded() {
                    return setup.pread(Some(reason));
                }
                if let Some(fuse) = setup.files.iter().find(|file| file.is_fuse()) {
                    let reason = format!(
                        "pread threads instead of io_uring: {} lies on FUSE, where io_uring can return wrong bytes",
                        fuse.path().display()
                    );
                    return setup.pread(Some(reason));
                }
                match setup.clone().uring() {
                    Ok(reader) => Ok(reader),
                    Err(refused) if refused.absent => {
                        let reason =
                            format!("pread threads instead of io_uring: {}", refused.error);
                        log::warn!("{reason}");
                        setup.pread(Some(reason))
                    }
                    Err(refused) => Err(refused.error),
                }
            }
        }
    }

    /// Which reader it is: never `Auto`.
    #[must_use]
    pub const fn kind(&self) -> ReaderKind {
        match self {
            Self::Uring(..) => ReaderKind::IoUring,
            Self::Pread(..) => ReaderKind::Pread,
        }
    }

    /// Why it is not the reader that was preferred, if it is not.
    #[must_use]
    pub fn fallback(&self) -> Option<String> {
        match self {
            Self::Uring(_, resolved) | Self::Pread(_, resolved) => resolved.fallback.clone(),
        }
    }

    /// The length to cut requests to.
    #[must_use]
    pub const fn request_bytes(&self) -> u32 {
        match self {
            Self::Uring(_, resolved) | Self::Pread(_, resolved) => resolved.request_bytes,
        }
    }

    /// How many submits fit now.
    #[must_use]
    pub fn free(&self) -> usize {
        match self {
            Self::Uring(reader, _) => reader.free(),
            Self::Pread(reader, _) => reader.free(),
        }
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Uring(reader, _) => reader.in_flight(),
            Self::Pread(reader, _) => reader.in_flight(),
        }
    }

    /// Takes a request. It is handed to the kernel by the next [`Reader::wait`] at the latest.
    ///
    /// # Errors
    /// `Busy` when [`Reader::free`] is 0, `Invalid` for a misaligned request or an unknown shard.
    ///
    /// # Safety
    /// `target` must be valid for writes of `len_bytes` and stay so, untouched by anybody else and neither moved nor
    /// unmapped, until a completion with its key says `returned`, or until [`Reader::drain`] does not list its key.
    pub unsafe fn submit(&mut self, request: Request) -> Result<()> {
        match self {
            // SAFETY: the caller's promise is the same.
            Self::Uring(reader, _) => unsafe { reader.submit(&request) },
            // SAFETY: the caller's promise is the same.
            Self::Pread(reader, _) => unsafe { reader.submit(&request) },
        }
    }

    /// Hands what was submitted to the kernel now, where it is not there yet.
    ///
    /// # Errors
    /// As [`Reader::wait`].
    pub fn flush(&mut self) -> Result<()> {
        match self {
            Self::Uring(reader, _) => reader.flush(),
            Self::Pread(..) => Ok(()),
        }
    }

    /// Waits until something completed, the waker was used or `timeout` is over (`None` = for ever), and appends the
    /// completions to `out`.
    ///
    /// # Errors
    /// Only when the reader itself is broken; failed reads are completions.
    pub fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) -> Result<()> {
        match self {
            Self::Uring(reader, _) => reader.wait(timeout, out),
            Self::Pread(reader, _) => reader.wait(timeout, out),
        }
    }

    /// A handle that ends a [`Reader::wait`] from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        match self {
            Self::Uring(reader, _) => Waker(WakerKind::Uring(reader.waker())),
            Self::Pread(reader, _) => Waker(WakerKind::Pread(reader.waker())),
        }
    }

    /// What it did so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        match self {
            Self::Uring(reader, _) => reader.counters(),
            Self::Pread(reader, _) => reader.counters(),
        }
    }

    /// Cancels what can be cancelled and waits up to `bound` for the rest, throwing completions away. Answers with the
    /// keys whose memory the kernel still owns, those of earlier `returned: false` completions included. No submit
    /// after it.
    pub fn drain(&mut self, bound: Duration) -> Vec<u64> {
        match self {
            Self::Uring(reader, _) => reader.drain(bound),
            Self::Pread(reader, _) => reader.drain(bound),
        }
    }
}

/// Ends a wait from any thread. A wake before the wait is not lost.
#[derive(Debug, Clone)]
pub struct Waker(WakerKind);

#[derive(Debug, Clone)]
enum WakerKind {
    Uring(Arc<setup::WakeEvent>),
    Pread(pread::PreadWaker),
}

impl Waker {
    /// Wakes the reader's thread.
    pub fn wake(&self) {
        match &self.0 {
            WakerKind::Uring(event) => event.wake(),
            WakerKind::Pread(waker) => waker.wake(),
        }
    }
}

/// What both readers are made from.
#[derive(Clone)]
struct Setup {
    files: Arc<[ShardFile]>,
    rules: Rules,
    depth: usize,
    any_thread: bool,
    drives_count: u32,
    cpus: Vec<u32>,
    faults: Faults,
    request_bytes: u32,
}

impl Setup {
    fn new(files: Arc<[ShardFile]>, options: &ReaderOptions, faults: Faults) -> Result<Self> {
        let page_bytes = match options.page_bytes {
            0 => PAGE_2M,
            bytes => bytes,
        };
        let request_bytes = match options.request_bytes {
            0 => default_request_bytes(page_bytes),
            bytes => bytes,
        };
        let depth = match options.depth {
            0 => default_depth(request_bytes),
            depth => depth,
        };
        let bounded = u64::from(request_bytes) <= request::REQUEST_MOST_BYTES;
        if depth > DEPTH_MOST || !u64::from(request_bytes).is_multiple_of(PAGE_4K) || !bounded {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "reader: {request_bytes} bytes per request, {depth} in flight; allowed are multiples of 4096 up to 1 GiB, and at most {DEPTH_MOST}"
                ),
            ));
        }
        Ok(Self {
            files,
            rules: Rules {
                deadline: Duration::from_nanos(options.deadline_ns.max(1)),
                retries: options.retries,
            },
            depth: depth as usize,
            any_thread: options.any_thread,
            drives_count: options.drives_count,
            cpus: options.cpus.clone(),
            faults,
            request_bytes,
        })
    }

    /// Why io_uring is not the reader of these files, where one of them has to be decoded.
    fn decoded(&self) -> Option<String> {
        let file = self.files.iter().find(|file| file.coded().is_some())?;
        Some(format!(
            "pread threads instead of io_uring: {} is compressed, and they decode it",
            file.path().display()
        ))
    }

    fn uring(self) -> std::result::Result<Reader, setup::Refused> {
        let resolved = Resolved {
            request_bytes: self.request_bytes,
            fallback: None,
        };
        let injector = Injector::new(self.faults);
        let ring = setup::build_ring(self.depth, self.any_thread)?;
        let reader = uring::UringReader::new(ring, self.files, self.rules, self.depth, injector)?;
        Ok(Reader::Uring(Box::new(reader), resolved))
    }

    fn pread(self, fallback: Option<String>) -> Result<Reader> {
        let resolved = Resolved {
            request_bytes: self.request_bytes,
            fallback,
        };
        let injector = Injector::new(self.faults);
        let reader = pread::PreadReader::new(
            self.files,
            self.rules,
            self.depth,
            injector,
            &self.cpus,
            self.drives_count as usize,
        )?;
        Ok(Reader::Pread(reader, resolved))
    }
}
