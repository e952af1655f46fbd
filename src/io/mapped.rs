//! A file mapped into memory, the way llama.cpp reads embeddings: to measure what that costs.
//!
//! Invariant: reads are checked against the mapping's length. Should the file shrink meanwhile, the kernel ends the
//! process (SIGBUS): only measurements use this, on files of their own or with nobody writing to them.
//! Place: beside the reader.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, Result};

/// A file's bytes at an address, read-only.
#[derive(Debug)]
pub struct Mapped {
    start: NonNull<u8>,
    len_bytes: usize,
}

impl Mapped {
    /// Maps the whole file, nothing populated. `random` tells the kernel not to read ahead (MADV_RANDOM).
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    pub fn open(path: &Path, random: bool) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::from_io(&error, format_args!("map {}", path.display()));
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        let len_bytes = usize::try_from(len).map_err(|_| {
            let context = format!("{}: {len} bytes cannot be mapped", path.display());
            Error::new(ErrorKind::Invalid, context)
        })?;
        // SAFETY: a fresh read-only mapping of an open file at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        let mapped = (start != libc::MAP_FAILED).then(|| NonNull::new(start.cast::<u8>()));
        let Some(start) = mapped.flatten() else {
            return Err(failed(std::io::Error::last_os_error()));
        };
        let mapped = Self { start, len_bytes };
        if random {
            // SAFETY: the range is the mapping just made; the advice changes no contents.
            let status =
                unsafe { libc::madvise(start.as_ptr().cast(), len_bytes, libc::MADV_RANDOM) };
            if status != 0 {
                return Err(failed(std::io::Error::last_os_error()));
            }
        }
        Ok(mapped)
    }

    /// Copies the bytes from `offset_bytes` on, faulting their pages in.
    ///
    /// # Errors
    /// `Invalid` for a range that is not in the file.
    pub fn copy(&self, offset_bytes: u64, out: &mut [u8]) -> Result<()> {
        let end = usize::try_from(offset_bytes)
            .ok()
            .and_then(|begin| begin.checked_add(out.len()));
        if end.is_none_or(|end| end > self.len_bytes) {
            let context = format!(
                "{} bytes at {offset_bytes} of a mapping of {}",
                out.len(),
                self.len_bytes
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        // SAFETY: the range was checked against the mapping, which is readable while self lives, and `out` is memory
        // of somebody else.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().add(offset_bytes as usize),
                out.as_mut_ptr(),
                out.len(),
            );
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the very mapping made in `open`, unmapped once; nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_has_the_files_bytes_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("table");
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        for random in [false, true] {
            let mapped = Mapped::open(&path, random).unwrap();
            let mut out = [0; 100];
            mapped.copy(4050, &mut out).unwrap();
            assert_eq!(out, bytes[4050..4150]);
            assert_eq!(
                mapped.copy(9901, &mut out).unwrap_err().kind(),
                ErrorKind::Invalid
            );
            assert_eq!(
                mapped.copy(u64::MAX, &mut out).unwrap_err().kind(),
                ErrorKind::Invalid
            );
        }
        assert_eq!(
            Mapped::open(directory.path().join("none").as_path(), false)
                .unwrap_err()
                .kind(),
            ErrorKind::NotFound
        );
    }
}
