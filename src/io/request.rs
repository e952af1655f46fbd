//! The life of one request, the same for both readers: what to ask the kernel for next, and what its answer means.
//!
//! Invariants: a short read is continued from its last whole 4 KiB; 0 before the end is truncation; EIO, EAGAIN and
//! EINTR are retried with backoff, a bounded number of times and never past the deadline; what a request asks for past
//! the end of the file is zeroed. Nothing here allocates before a request fails.
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use super::direct::{ShardFile, is_aligned};
use super::fault::{Fate, Injector};
use super::{Completion, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{PAGE_4K, align_down, align_up};

/// The first retry waits 2 ms, each further one four times as long: 2, 8, 32, 128 ms. A drive that resets answers
/// within tens of milliseconds; a drive that is gone costs 170 ms with the default of four retries.
const BACKOFF_FIRST: Duration = Duration::from_millis(2);
const BACKOFF_MOST: Duration = Duration::from_millis(512);

/// Linux moves at most 0x7ffff000 bytes per read; a request stays well under it.
pub const REQUEST_MOST_BYTES: u64 = 1 << 30;

/// What holds for every request of a reader.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) deadline: Duration,
    pub(super) retries: u32,
}

/// One read to ask the kernel for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u32,
    pub(super) target: *mut u8,
    pub(super) fate: Fate,
}

/// What comes after an answer of the kernel.
#[derive(Debug)]
pub(super) enum Step {
    /// Ask again at once.
    Ask,
    /// Ask again after this pause.
    Pause(Duration),
    /// It is over.
    Finished(Result<()>),
}

/// What a request is about, kept also while a thread has the rest of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Label {
    pub(super) key: u64,
    pub(super) shard_index: u32,
    pub(super) deadline: Instant,
    offset_bytes: u64,
    /// How many of the bytes asked for the file holds; the rest is zeroed.
    held_bytes: u64,
}

impl Label {
    /// The error of a request whose deadline has passed.
    pub(super) fn late(&self, files: &[ShardFile], rules: &Rules) -> Error {
        Error::new(
            ErrorKind::Timeout,
            format!(
                "{}: read of {} bytes at {} not done within {:.1} s; the drive hangs or is overloaded (see dmesg)",
                files[self.shard_index as usize].path().display(),
                self.held_bytes,
                self.offset_bytes,
                rules.deadline.as_secs_f64()
            ),
        )
    }

    /// The completion of this request.
    pub(super) const fn completion(&self, result: Result<()>, returned: bool) -> Completion {
        Completion {
            key: self.key,
            result,
            returned,
        }
    }
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) label: Label,
    len_bytes: u64,
    target: *mut u8,
    done_bytes: u64,
    attempts: u32,
    fate: Fate,
}

// SAFETY: the target is only written through while the request is in flight, and `Reader::submit` has its caller
// promise that nobody else touches that memory until the completion is handed over, on whatever thread.
unsafe impl Send for Flight {}

impl Flight {
    /// Checks a request and starts its clock.
    pub(super) fn new(request: &Request, files: &[ShardFile], rules: &Rules) -> Result<Self> {
        let Some(file) = files.get(request.shard_index as usize) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "request for shard {} of {}",
                    request.shard_index,
                    files.len()
                ),
            ));
        };
        let aligned = is_aligned(request.offset_bytes, request.len_bytes, request.target);
        let sized = (1..=REQUEST_MOST_BYTES).contains(&request.len_bytes);
        if !aligned || !sized || request.target.is_null() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{}: request of {} bytes at {} into {:p}: all three must be multiples of 4096, and 4 KiB to 1 GiB long",
                    file.path().display(),
                    request.len_bytes,
                    request.offset_bytes,
                    request.target
                ),
            ));
        }
        Ok(Self {
            label: Label {
                key: request.key,
                shard_index: request.shard_index,
                deadline: Instant::now() + rules.deadline,
                offset_bytes: request.offset_bytes,
                held_bytes: file
                    .len_bytes()
                    .saturating_sub(request.offset_bytes)
                    .min(request.len_bytes),
            },
            len_bytes: request.len_bytes,
            target: request.target,
            done_bytes: 0,
            attempts: 0,
            fate: Fate::default(),
        })
    }

    /// True for a request that lies wholly past the end of the file: nothing to read, only to zero.
    pub(super) const fn is_past_end(&self) -> bool {
        self.label.held_bytes == 0
    }

    /// True when a fault has the last read never come back.
    pub(super) const fn is_stuck(&self) -> bool {
        self.fate.stuck
    }

    /// Where the next read begins, relative to the request: whole 4 KiB, so that O_DIRECT takes it.
    const fn resume_bytes(&self) -> u64 {
        align_down(self.done_bytes, PAGE_4K)
    }

    /// The next read. Asks for whole 4 KiB up to the end of the file and no further.
    pub(super) fn ask(&mut self, injector: &Injector) -> Ask {
        self.fate = injector.next_read(self.label.shard_index);
        let start = self.resume_bytes();
        let end = align_up(self.label.held_bytes, PAGE_4K)
            .map_or(self.len_bytes, |e| e.min(self.len_bytes));
        let mut len = end - start;
        if self.fate.short && len > PAGE_4K {
            len = align_down(len / 2, PAGE_4K).max(PAGE_4K);
        }
        Ask {
            offset_bytes: self.label.offset_bytes + start,
            len_bytes: len as u32, // at most REQUEST_MOST_BYTES
            // SAFETY: start < held_bytes <= len_bytes, and the submitter vouched for len_bytes at target.
            target: unsafe { self.target.add(start as usize) },
            fate: self.fate,
        }
    }

    /// Takes the kernel's answer to the last ask: bytes, or a negative errno.
    pub(super) fn answer(
        &mut self,
        result: i64,
        files: &[ShardFile],
        rules: &Rules,
        counters: &mut Tally,
    ) -> Step {
        let file = &files[self.label.shard_index as usize];
        let result = if self.fate.eio {
            -i64::from(libc::EIO)
        } else {
            result
        };
        match result {
            1.. => self.advance(result as u64, files, rules, counters),
            0 => {
                let at = self.label.offset_bytes + self.resume_bytes();
                Step::Finished(Err(file.ended_at(
                    at,
                    self.label.offset_bytes,
                    self.label.held_bytes,
                )))
            }
            _ => {
                let errno = (-result) as i32;
                match errno {
                    libc::EIO | libc::EAGAIN | libc::EINTR => {
                        counters.retries += 1;
                        self.again(errno, file, rules)
                    }
                    _ => Step::Finished(Err(self.failed(errno, file))),
                }
            }
        }
    }

    fn advance(
        &mut self,
        read_bytes: u64,
        files: &[ShardFile],
        rules: &Rules,
        counters: &mut Tally,
    ) -> Step {
        let file = &files[self.label.shard_index as usize];
        counters.reads += 1;
        counters.bytes += read_bytes;
        let resumed = self.resume_bytes();
        self.done_bytes = self.done_bytes.max(resumed + read_bytes);
        if self.done_bytes >= self.label.held_bytes {
            return Step::Finished(Ok(()));
        }
        counters.shorts += 1;
        if self.resume_bytes() > resumed {
            return if Instant::now() < self.label.deadline {
                Step::Ask
            } else {
                Step::Finished(Err(self.label.late(files, rules)))
            };
        }
        // Less than 4 KiB came. Either the file now ends here, or the drive stumbles.
        if let Err(error) = file.check_unchanged()
            && error.kind() == ErrorKind::Truncated
        {
            return Step::Finished(Err(error));
        }
        counters.retries += 1;
        self.again(libc::EAGAIN, file, rules)
    }

    fn again(&mut self, errno: i32, file: &ShardFile, rules: &Rules) -> Step {
        self.attempts += 1;
        if self.attempts > rules.retries {
            return Step::Finished(Err(self.failed(errno, file)));
        }
        let pause = BACKOFF_FIRST
            .saturating_mul(4_u32.saturating_pow(self.attempts - 1))
            .min(BACKOFF_MOST);
        if Instant::now() + pause >= self.label.deadline {
            return Step::Finished(Err(self.failed(errno, file)));
        }
        Step::Pause(pause)
    }

    /// Zeroes what the request asks for past the end of the file. To be called before it completes.
    pub(super) fn zero_tail(&self) {
        let tail = (self.len_bytes - self.label.held_bytes) as usize;
        if tail > 0 {
            // SAFETY: the submitter vouched for len_bytes of writable memory at target that nobody else touches, and
            // the kernel is done with it.
            unsafe {
                self.target
                    .add(self.label.held_bytes as usize)
                    .write_bytes(0, tail);
            }
        }
    }

    /// Inverts the bytes that the injector names, as a drive that lies would.
    pub(super) fn flip(&self, injector: &Injector) {
        for &(shard_index, offset_bytes) in injector.flips() {
            let here = offset_bytes.wrapping_sub(self.label.offset_bytes);
            if shard_index == self.label.shard_index && here < self.label.held_bytes {
                // SAFETY: here < len_bytes; otherwise as in zero_tail.
                unsafe { *self.target.add(here as usize) ^= 0xFF };
            }
        }
    }

    fn failed(&self, errno: i32, file: &ShardFile) -> Error {
        let remedy = match errno {
            libc::EIO => "the drive failed; see dmesg and smartctl",
            libc::EAGAIN => "the kernel kept putting it off; the drive may be overloaded",
            libc::EFAULT => "the memory it was to land in is not writable",
            libc::EINVAL => "the filesystem refuses this O_DIRECT read",
            libc::ECANCELED => "it was cancelled",
            libc::ESTALE | libc::ENXIO | libc::ENODEV => "the drive or its mount went away",
            _ => "the read failed",
        };
        Error::os(
            errno,
            format_args!(
                "{}: read of {} bytes at {} after {} attempts: {remedy}",
                file.path().display(),
                self.label.held_bytes,
                self.label.offset_bytes,
                self.attempts.max(1)
            ),
        )
    }

    /// Drops the request's pages behind where it came through the page cache.
    pub(super) fn drop_behind(&self, files: &[ShardFile]) {
        let file = &files[self.label.shard_index as usize];
        file.dropped_behind(self.label.offset_bytes, self.label.held_bytes);
    }
}

/// Sums over answered reads.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) bytes: u64,
    pub(super) reads: u64,
    pub(super) retries: u64,
    pub(super) shorts: u64,
}

impl Tally {
    pub(super) const fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.reads += other.reads;
        self.retries += other.retries;
        self.shorts += other.shorts;
    }
}

/// How long at least one request was in flight.
#[derive(Debug, Default)]
pub(super) struct Busy {
    active: usize,
    since: Option<Instant>,
    total: Duration,
}

impl Busy {
    pub(super) const fn active(&self) -> usize {
        self.active
    }

    pub(super) fn enter(&mut self) {
        self.active += 1;
        self.since.get_or_insert_with(Instant::now);
    }

    pub(super) fn leave(&mut self) {
        self.active -= 1;
        if self.active == 0
            && let Some(since) = self.since.take()
        {
            self.total += since.elapsed();
        }
    }

    pub(super) fn total_ns(&self) -> u64 {
        let running = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        u64::try_from((self.total + running).as_nanos()).unwrap_or(u64::MAX)
    }
}
