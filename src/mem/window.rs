//! Windows: one address range per shard that mirrors the file, so that a tensor's address is `base + file offset` for
//! the life of the model.
//!
//! A window is reserved whole and empty (any touch is a SIGSEGV); the pool gives memory to the places that are resident
//! or in a slot. Base and length are multiples of 2 MiB, with 2 MiB of untouchable guard behind, so offset and address
//! agree modulo 2 MiB and no huge page reaches out of a window. Address arithmetic takes no lock: the bases never change.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: where the host looks.
#![allow(unsafe_code)]

use super::host;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, PAGE_2M, align_up};
use std::sync::atomic::{AtomicBool, Ordering};

/// The windows of a model, one per shard.
#[derive(Debug)]
pub struct Windows {
    windows: Vec<Window>,
    /// (base, shard) in ascending order of base: what [`Windows::locate`] searches.
    by_base: Vec<(usize, u32)>,
}

#[derive(Debug)]
struct Window {
    base: usize,
    len_bytes: u64,
    mapped_bytes: usize,
    /// Set when the kernel may still write into it: its addresses are never given back.
    kept: AtomicBool,
}

impl Windows {
    /// Reserves a window for each shard of the given length.
    ///
    /// # Errors
    /// `Invalid` for an empty shard, `NoMemory` when the address space is short.
    pub fn reserve(shard_len_bytes: &[u64]) -> Result<Self> {
        let mut windows = Self {
            windows: Vec::with_capacity(shard_len_bytes.len()),
            by_base: Vec::with_capacity(shard_len_bytes.len()),
        };
        for (shard, &len_bytes) in shard_len_bytes.iter().enumerate() {
            let window = Window::reserve(len_bytes).map_err(|error| {
                let text = format!(
                    "window of shard {shard} ({}): {error}",
                    HumanBytes(len_bytes)
                );
                error.with_context(text)
            })?;
            windows.by_base.push((window.base, shard as u32));
            windows.windows.push(window);
        }
        windows.by_base.sort_unstable();
        Ok(windows)
    }

    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        self.windows.len()
    }

    /// Where a shard's window begins; null for a shard that does not exist.
    #[must_use]
    pub fn base(&self, shard_index: u32) -> *mut u8 {
        self.windows
            .get(shard_index as usize)
            .map_or(std::ptr::null_mut(), |window| window.base as *mut u8)
    }

    /// The address of a file offset; null outside the shard. Readable only under a lease.
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> *mut u8 {
        match self.windows.get(shard_index as usize) {
            Some(window) if offset_bytes < window.len_bytes => {
                (window.base + offset_bytes as usize) as *mut u8
            }
            _ => std::ptr::null_mut(),
        }
    }

    /// The shard and file offset of an address; `None` outside every shard. Lock-free.
    #[must_use]
    pub fn locate(&self, address: usize) -> Option<(u32, u64)> {
        let after = self.by_base.partition_point(|&(base, _)| base <= address);
        let (base, shard) = *self.by_base.get(after.checked_sub(1)?)?;
        let offset_bytes = (address - base) as u64;
        (offset_bytes < self.windows[shard as usize].len_bytes).then_some((shard, offset_bytes))
    }

    /// The place of a byte range that may reach past the file's end into the window's rounding.
    pub(super) fn place(
        &self,
        shard_index: u32,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<usize> {
        let window = self.windows.get(shard_index as usize);
        let end = offset_bytes.checked_add(len_bytes);
        match (window, end) {
            (Some(window), Some(end)) if end <= window.span_bytes() => {
                Ok(window.base + offset_bytes as usize)
            }
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{len_bytes} bytes at offset {offset_bytes} of shard {shard_index} lie outside its window"
                ),
            )),
        }
    }

    /// Never gives the addresses of a shard back: the kernel may still write there.
    pub(super) fn keep(&self, shard_index: u32) {
        if let Some(window) = self.windows.get(shard_index as usize) {
            window.kept.store(true, Ordering::Release);
        }
    }

    /// Address ranges of all windows: (base, bytes).
    pub(super) fn ranges(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.windows
            .iter()
            .map(|window| (window.base, window.mapped_bytes))
    }
}

impl Window {
    fn reserve(len_bytes: u64) -> Result<Self> {
        if len_bytes == 0 {
            return Err(Error::new(ErrorKind::Invalid, "the shard is empty"));
        }
        let mapped_bytes = align_up(len_bytes, PAGE_2M)
            .and_then(|span| span.checked_add(PAGE_2M))
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "longer than the address space"))?;
        let base = host::reserve(mapped_bytes)?;
        Ok(Self {
            base,
            len_bytes,
            mapped_bytes: mapped_bytes as usize,
            kept: AtomicBool::new(false),
        })
    }

    /// What may hold memory: the file rounded up to 2 MiB, without the guard.
    fn span_bytes(&self) -> u64 {
        self.mapped_bytes as u64 - PAGE_2M
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: reserved by us; the pool and every lease hold the windows alive, so nobody looks here any more.
        if let Err(error) = unsafe { host::unmap(self.base, self.mapped_bytes) } {
            log::error!("window not given back: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_mirror_the_files() {
        let lens = [10 * PAGE_2M + 17, 1, PAGE_2M];
        let windows = Windows::reserve(&lens).unwrap();
        assert_eq!(windows.shard_count(), 3);
        for (shard, &len) in lens.iter().enumerate() {
            let shard = shard as u32;
            let base = windows.base(shard) as usize;
            assert_eq!(base as u64 % PAGE_2M, 0);
            for offset in [0, len / 2, len - 1] {
                let address = windows.address(shard, offset) as usize;
                assert_eq!(address, base + offset as usize);
                assert_eq!(windows.locate(address), Some((shard, offset)));
            }
            assert!(windows.address(shard, len).is_null());
            assert_eq!(windows.locate(base + len as usize), None);
            assert_eq!(windows.locate(base - 1), None);
        }
        assert!(windows.base(3).is_null());
        assert_eq!(windows.locate(0), None);
        assert_eq!(windows.locate(usize::MAX), None);
    }

    #[test]
    fn a_place_may_reach_into_the_rounding_and_no_further() {
        let windows = Windows::reserve(&[PAGE_2M + 1]).unwrap();
        assert!(windows.place(0, PAGE_2M, PAGE_2M).is_ok());
        assert!(windows.place(0, PAGE_2M, PAGE_2M + 1).is_err());
        assert!(windows.place(0, u64::MAX, 2).is_err());
        assert!(windows.place(1, 0, 1).is_err());
    }

    #[test]
    fn impossible_windows_are_errors() {
        assert_eq!(
            Windows::reserve(&[0]).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert_eq!(
            Windows::reserve(&[u64::MAX]).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        let error = Windows::reserve(&[1, 1 << 60]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        assert!(error.to_string().contains("shard 1"), "{error}");
    }
}
