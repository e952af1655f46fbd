//! Memory of the reader's own tools: anonymous, 2 MiB aligned, on huge pages where the kernel grants them, prefaulted.
//!
//! Weights never land here; pools do that. This is what `flea bench raw` and the tests read into.
//! Place: beside `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{PAGE_2M, PAGE_4K, align_up};

/// Prefaulted memory, 2 MiB aligned, a whole number of 2 MiB long.
#[derive(Debug)]
pub struct AlignedMemory {
    start: NonNull<u8>,
    len_bytes: usize,
    mapping: NonNull<u8>,
    mapping_bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for AlignedMemory {}

impl AlignedMemory {
    /// At least `len_bytes`, zeroed. `page_bytes` below 2 MiB keeps it off huge pages, to measure what they are worth.
    ///
    /// # Errors
    /// `NoMemory`.
    pub fn new(len_bytes: u64, page_bytes: u64) -> Result<Self> {
        let sizes = align_up(len_bytes.max(1), PAGE_2M)
            .and_then(|len| Some((len, len.checked_add(PAGE_2M)?)))
            .and_then(|(len, all)| Some((usize::try_from(len).ok()?, usize::try_from(all).ok()?)));
        let Some((len_bytes, mapping_bytes)) = sizes else {
            return Err(Error::new(
                ErrorKind::NoMemory,
                format!("{len_bytes} bytes of memory are more than an address space"),
            ));
        };
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapping_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let mapped = (mapping != libc::MAP_FAILED).then(|| NonNull::new(mapping.cast::<u8>()));
        let Some(mapping) = mapped.flatten() else {
            return Err(
                Error::last_os(format_args!("map {mapping_bytes} bytes of memory"))
                    .with_kind(ErrorKind::NoMemory),
            );
        };
        let ahead = mapping.addr().get().next_multiple_of(PAGE_2M as usize) - mapping.addr().get();
        let memory = Self {
            // SAFETY: the mapping is 2 MiB longer than needed, so the aligned start and len_bytes lie within it.
            start: unsafe { mapping.add(ahead) },
            len_bytes,
            mapping,
            mapping_bytes,
        };
        memory.prefault(page_bytes)?;
        Ok(memory)
    }

    /// Huge pages have to be asked for before the pages exist, and the pages before the drive writes to them:
    /// O_DIRECT into memory that is not there yet ran at 0.27 GiB/s.
    fn prefault(&self, page_bytes: u64) -> Result<()> {
        let advice = if page_bytes >= PAGE_2M {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // SAFETY: the range is ours; the advice changes no contents. A kernel without huge pages refuses it, and the
        // memory is then on 4 KiB pages, which huge_page_share tells.
        let _ = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len_bytes, advice) };
        // SAFETY: the range is ours and writable; populating changes no contents.
        let status = unsafe {
            libc::madvise(
                self.start.as_ptr().cast(),
                self.len_bytes,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if status == 0 {
            return Ok(());
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        if errno == libc::EINVAL {
            // Linux before 5.14: touch the pages by hand.
            for offset in (0..self.len_bytes).step_by(PAGE_4K as usize) {
                // SAFETY: within the mapping.
                unsafe { self.start.add(offset).write_volatile(0) };
            }
            return Ok(());
        }
        Err(Error::os(
            errno,
            format_args!("populate {} bytes of memory", self.len_bytes),
        )
        .with_kind(ErrorKind::NoMemory))
    }

    /// First byte.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes as u64
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, initialised by the kernel, and borrowed with self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_bytes) }
    }

    /// Its bytes, to write.
    pub const fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped, initialised by the kernel, and borrowed uniquely with self.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }

    /// Which part of it is on 2 MiB pages, as /proc/self/smaps has it; `None` where that cannot be read.
    #[must_use]
    pub fn huge_page_share(&self) -> Option<f64> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let first = self.start.addr().get();
        let mut huge_kib = 0;
        let mut inside = false;
        for line in smaps.lines() {
            if let Some((from, to)) = mapping_range(line) {
                inside = from < first + self.len_bytes && first < to;
            } else if let Some(kib) = line.strip_prefix("AnonHugePages:")
                && inside
            {
                huge_kib += kib.trim().trim_end_matches(" kB").parse::<u64>().ok()?;
            }
        }
        // The mapping may have grown together with a neighbour.
        Some((huge_kib as f64 * 1024.0 / self.len_bytes as f64).min(1.0))
    }

    /// Never unmapped: for memory that the kernel still writes to.
    pub fn leak(self) {
        std::mem::forget(self);
    }
}

/// `7f00-8000 rw-p ...` of smaps.
fn mapping_range(line: &str) -> Option<(usize, usize)> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        usize::from_str_radix(from, 16).ok()?,
        usize::from_str_radix(to, 16).ok()?,
    ))
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        // SAFETY: the very mapping made in `new`, unmapped once; borrows of it have ended.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_bytes) };
    }
}
