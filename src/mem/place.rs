//! A place: an address range of a host's own tensor that has memory only while it is needed, and gives that memory to
//! another place without copying.
//!
//! Weights have windows and a pool; this is for what a host writes itself, keys and values. The address never changes.
//! A closed place has no memory and any touch is a SIGSEGV; a place opened anew reads zeros; a place that takes the
//! memory of another keeps the other's bytes until somebody writes. Always one mapping, moved as a whole (moves across
//! two fail before Linux 6.17). Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the pool.
#![allow(unsafe_code)]

use super::host::{self, Protection};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{PAGE_2M, PAGE_4K, align_up};

/// Below this huge pages would mostly be padding.
const HUGE_FROM_BYTES: usize = 4 * PAGE_2M as usize;

/// See the module's head.
#[derive(Debug)]
pub struct Place {
    base: usize,
    len: usize,
    open: bool,
    /// Bytes from the start that have memory for sure.
    populated: usize,
}

impl Place {
    /// Reserves a closed place of at least `len_bytes`.
    ///
    /// # Errors
    /// `Invalid` for nothing, `NoMemory` when the address space is short.
    pub fn reserve(len_bytes: u64) -> Result<Self> {
        let len = align_up(len_bytes, PAGE_4K).filter(|len| *len > 0);
        let len =
            len.ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{len_bytes} bytes")))?;
        Ok(Self {
            base: host::reserve(len)?,
            len: len as usize,
            open: false,
            populated: 0,
        })
    }

    /// Where it is. To be touched only while it is open.
    #[must_use]
    pub const fn address(&self) -> usize {
        self.base
    }

    /// Its length: whole pages.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.len
    }

    /// Whether it has memory.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.open
    }

    /// Lets it have memory, zeros, as it is touched.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(&mut self) -> Result<()> {
        if self.open {
            return Ok(());
        }
        // SAFETY: our own reservation, closed, so nobody refers to its contents.
        unsafe {
            host::protect(self.base, self.len, Protection::ReadWrite)?;
            host::want_huge_pages(self.base, self.len, self.len >= HUGE_FROM_BYTES)?;
        }
        self.open = true;
        Ok(())
    }

    /// Opens it with the memory, and the bytes, of another of the same length, which is closed by that.
    ///
    /// # Errors
    /// `Invalid` for another length, or where this one is open or the other is not; what the kernel says.
    pub fn open_with(&mut self, other: &mut Self) -> Result<()> {
        if self.len != other.len || self.open || !other.open {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "a place of {} bytes cannot take the memory of one of {}",
                    self.len, other.len
                ),
            ));
        }
        // SAFETY: two reservations of ours; whoever computed with the other has given it back (the caller's part: no
        // reference is handed out, addresses only).
        unsafe {
            host::protect(other.base, other.len, Protection::None)?;
            host::move_pages(other.base, self.base, self.len)?;
            host::reserve_fixed(other.base, other.len)?;
            host::protect(self.base, self.len, Protection::ReadWrite)?;
        }
        self.open = true;
        self.populated = other.populated;
        other.open = false;
        other.populated = 0;
        Ok(())
    }

    /// Gives its memory back.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn close(&mut self) -> Result<()> {
        if !self.open {
            return Ok(());
        }
        // SAFETY: our own reservation; nobody computes with it (the caller's part, as above).
        unsafe { host::reserve_fixed(self.base, self.len)? };
        self.open = false;
        self.populated = 0;
        Ok(())
    }

    /// Gives the first `len_bytes` memory now: a read of the drive into memory that is not there yet runs at a tenth of
    /// the speed.
    ///
    /// # Errors
    /// `Invalid` where it is closed or shorter; `NoMemory`.
    pub fn populate(&mut self, len_bytes: usize) -> Result<()> {
        self.check(0, len_bytes)?;
        let len = len_bytes.next_multiple_of(PAGE_4K as usize);
        if len > self.populated {
            // SAFETY: open, so mapped read-write; nobody computes with it while it is filled (the caller's part).
            unsafe { host::populate(self.base + self.populated, len - self.populated)? };
            self.populated = len;
        }
        Ok(())
    }

    /// Bytes of it.
    ///
    /// # Errors
    /// `Invalid` where it is closed or shorter.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> Result<&[u8]> {
        self.check(offset, len)?;
        // SAFETY: open and within the mapping; nobody else writes, says the caller.
        Ok(unsafe { std::slice::from_raw_parts((self.base + offset) as *const u8, len) })
    }

    /// Bytes of it, to be written.
    ///
    /// # Errors
    /// `Invalid` where it is closed or shorter.
    ///
    /// # Safety
    /// Nobody else looks at them while the slice lives.
    pub unsafe fn bytes_mut(&mut self, offset: usize, len: usize) -> Result<&mut [u8]> {
        self.check(offset, len)?;
        // SAFETY: open and within the mapping; nobody else looks, says the caller.
        Ok(unsafe { std::slice::from_raw_parts_mut((self.base + offset) as *mut u8, len) })
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if self.open && fits {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{len} bytes at {offset} of a place of {} bytes that is {}",
                self.len,
                if self.open { "open" } else { "closed" }
            ),
        ))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // SAFETY: reserved by us; whoever knew the address is gone (the owner's part).
        if let Err(error) = unsafe { host::unmap(self.base, self.len) } {
            log::error!("a place not given back: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(place: &mut Place, value: u8) {
        let len = place.len_bytes();
        // SAFETY: only this test knows the place.
        unsafe { place.bytes_mut(0, len) }.unwrap().fill(value);
    }

    fn all(place: &Place, value: u8) -> bool {
        // SAFETY: only this test knows the place.
        let bytes = unsafe { place.bytes(0, place.len_bytes()) }.unwrap();
        bytes.iter().all(|byte| *byte == value)
    }

    #[test]
    fn memory_moves_with_its_bytes_and_the_old_place_is_closed() {
        for len in [5000, PAGE_2M * 5 + 4096] {
            let (mut one, mut two) = (Place::reserve(len).unwrap(), Place::reserve(len).unwrap());
            let address = two.address();
            one.open().unwrap();
            assert!(all(&one, 0));
            fill(&mut one, 7);
            for _ in 0..3 {
                two.open_with(&mut one).unwrap();
                assert!(all(&two, 7) && !one.is_open());
                assert_eq!(two.address(), address);
                // SAFETY: only this test knows the place.
                assert!(unsafe { one.bytes(0, 1) }.is_err());
                one.open_with(&mut two).unwrap();
                assert!(all(&one, 7));
            }
            one.close().unwrap();
            one.open().unwrap();
            assert!(all(&one, 0), "a place opened anew reads zeros");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(Place::reserve(0).unwrap_err().kind(), ErrorKind::Invalid);
        assert!(Place::reserve(u64::MAX).is_err());
        let (mut one, mut two) = (Place::reserve(4096).unwrap(), Place::reserve(8192).unwrap());
        assert!(one.open_with(&mut two).is_err(), "the other is closed");
        two.open().unwrap();
        assert!(one.open_with(&mut two).is_err(), "another length");
        assert!(two.populate(8193).is_err());
        two.populate(8192).unwrap();
        // SAFETY: only this test knows the place.
        assert!(unsafe { two.bytes(4096, 4097) }.is_err());
    }
}
