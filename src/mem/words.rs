//! Words of memory that two processes share: atomics in a memfd of fixed size, and the futex on each of them.
//!
//! The memfd is sealed against shrinking, so neither side can make the other fault. Every access is one atomic
//! operation on an index that is checked, so whatever the other side writes is only ever a wrong number. One side may
//! map it read-only. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beneath leases between
//! processes.
#![allow(unsafe_code)]

use super::host;
use crate::error::{Error, ErrorKind, Result};
use nix::sys::stat::fstat;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

/// Most words one area may have: 4 MiB.
pub const WORDS_MAX: usize = 1 << 20;

/// An area of shared words.
#[derive(Debug)]
pub struct SharedWords {
    base: usize,
    count: usize,
    writable: bool,
    fd: OwnedFd,
}

impl SharedWords {
    /// A new area of `count` words, all zero.
    ///
    /// # Errors
    /// `Invalid` for more than [`WORDS_MAX`]; what memfd_create and mmap say.
    pub fn create(count: usize) -> Result<Self> {
        if count == 0 || count > WORDS_MAX {
            let context = format!("an area of {count} shared words, {WORDS_MAX} are possible");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let fd = host::memfd((count * 4) as u64, false)?;
        host::seal_size(&fd)?;
        Self::mapped(fd, count, true)
    }

    /// Maps an area that another process made.
    ///
    /// # Errors
    /// `Invalid` when it is smaller than `count` words or could still shrink; what mmap says.
    pub fn map(fd: OwnedFd, count: usize, writable: bool) -> Result<Self> {
        let len = fstat(&fd)
            .map_err(|errno| Error::os(errno as i32, "ask for the size of shared words"))?
            .st_size;
        let fits = usize::try_from(len).is_ok_and(|len| len / 4 >= count) && count > 0;
        if !fits || count > WORDS_MAX || !host::sealed_against_shrinking(&fd) {
            let context = format!("shared words of {len} bytes are not what was announced");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Self::mapped(fd, count, writable)
    }

    fn mapped(fd: OwnedFd, count: usize, writable: bool) -> Result<Self> {
        let base = host::map_words(fd.as_fd(), count * 4, writable)?;
        Ok(Self {
            base,
            count,
            writable,
            fd,
        })
    }

    /// How many words.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The area's descriptor, as writable as this side is.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The area opened anew for reading only.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_only_fd(&self) -> Result<OwnedFd> {
        host::reopen_read_only(self.fd.as_fd())
    }

    fn word(&self, index: usize) -> Option<&AtomicU32> {
        if index >= self.count {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as self and cannot shrink (sealed); aligned; only ever
        // accessed as an atomic, here and in the other process.
        Some(unsafe { AtomicU32::from_ptr((self.base as *mut u32).add(index)) })
    }

    fn writable_word(&self, index: usize) -> Option<&AtomicU32> {
        self.word(index).filter(|_| self.writable)
    }

    /// Reads a word; 0 outside the area.
    #[must_use]
    pub fn load(&self, index: usize) -> u32 {
        self.word(index).map_or(0, |word| word.load(SeqCst))
    }

    /// Writes a word. Nothing happens outside the area, or where it is mapped read-only.
    pub fn store(&self, index: usize, value: u32) {
        if let Some(word) = self.writable_word(index) {
            word.store(value, SeqCst);
        }
    }

    /// Adds, wrapping, and gives the value before; see [`SharedWords::store`].
    pub fn add(&self, index: usize, value: u32) -> u32 {
        self.writable_word(index)
            .map_or(0, |word| word.fetch_add(value, SeqCst))
    }

    /// Subtracts, wrapping, and gives the value before; see [`SharedWords::store`].
    pub fn sub(&self, index: usize, value: u32) -> u32 {
        self.writable_word(index)
            .map_or(0, |word| word.fetch_sub(value, SeqCst))
    }

    /// Sleeps while a word is `expected`, at most for `timeout`. May return early; look again.
    pub fn wait(&self, index: usize, expected: u32, timeout: Duration) {
        let Some(word) = self.word(index) else { return };
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: the word and the time live over the call; FUTEX_WAIT only reads the word.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                &raw const time,
            );
        }
    }

    /// Wakes everybody who sleeps on a word, in all processes.
    pub fn wake(&self, index: usize) {
        if let Some(word) = self.word(index) {
            // SAFETY: the word lives over the call; FUTEX_WAKE does not touch it.
            unsafe {
                libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
            }
        }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references to words do not outlive self.
        if let Err(error) = unsafe { host::unmap(self.base, self.count * 4) } {
            log::error!("fd {}: shared words: {error}", self.fd.as_raw_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn both_sides_see_one_memory_and_the_reader_cannot_write() {
        let owner = SharedWords::create(100).unwrap();
        let reader = SharedWords::map(owner.read_only_fd().unwrap(), 100, false).unwrap();
        owner.store(7, 42);
        assert_eq!(reader.load(7), 42);
        reader.store(7, 1);
        assert_eq!((owner.load(7), reader.add(7, 1)), (42, 0));
        assert_eq!(owner.load(100), 0);
        owner.store(1 << 30, 1);
        // A read-only descriptor gives no writable mapping, whatever the other side asks for.
        assert!(SharedWords::map(owner.read_only_fd().unwrap(), 100, true).is_err());
    }

    #[test]
    fn an_area_that_is_too_small_or_may_shrink_is_refused() {
        let owner = SharedWords::create(10).unwrap();
        let fd = owner.read_only_fd().unwrap();
        assert_eq!(
            SharedWords::map(fd, 5000, false).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        let unsealed = host::memfd(4096, false).unwrap();
        assert_eq!(
            SharedWords::map(unsealed, 10, true).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert!(SharedWords::create(0).is_err());
        assert!(SharedWords::create(WORDS_MAX + 1).is_err());
    }

    #[test]
    fn a_sleeper_on_a_read_only_mapping_is_woken() {
        let owner = Arc::new(SharedWords::create(4).unwrap());
        let reader = SharedWords::map(owner.read_only_fd().unwrap(), 4, false).unwrap();
        let waker = Arc::clone(&owner);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            waker.store(0, 1);
            waker.wake(0);
        });
        let began = Instant::now();
        while reader.load(0) == 0 {
            reader.wait(0, 0, Duration::from_secs(20));
        }
        assert!(began.elapsed() < Duration::from_secs(10));
        thread.join().unwrap();
        reader.wait(0, 0, Duration::from_secs(20));
        reader.wait(0, 1, Duration::from_millis(1));
    }
}
