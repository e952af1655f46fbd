//! The view of a client: windows of its own, into which it maps pages of a pool that another process owns.
//!
//! The client maps read-only and only what a lease of its guards; the pool's owner decides where in its file each run
//! lies. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: where a host in another process looks.
#![allow(unsafe_code)]

use super::host::{self, Protection};
use super::window::Windows;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::PageRun;
use nix::sys::stat::fstat;
use std::os::fd::{AsFd, OwnedFd};

/// A pool's file, as its owner hands it out.
#[derive(Debug)]
pub struct PoolFile {
    fd: OwnedFd,
    len_bytes: u64,
}

impl PoolFile {
    /// Takes a descriptor of a pool.
    ///
    /// # Errors
    /// What fstat says.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let stat = fstat(&fd).map_err(|errno| Error::os(errno as i32, "look at the pool"))?;
        Ok(Self {
            fd,
            len_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        })
    }
}

impl Windows {
    /// Maps `run` of a pool, which begins at `offset_bytes` of its file, read-only at its place in these windows. What
    /// was mapped there before is gone; where both hold the same bytes, whoever reads meanwhile notices nothing.
    ///
    /// # Errors
    /// `Invalid` for a run outside the windows or the pool; what mmap says.
    pub fn show(
        &self,
        pool: &PoolFile,
        run: &PageRun,
        page_bytes: u64,
        offset_bytes: u64,
    ) -> Result<()> {
        let bytes = |pages: u64| pages.checked_mul(page_bytes);
        let (first, len) = (bytes(run.first_page), bytes(run.page_count));
        let end = len.and_then(|len| offset_bytes.checked_add(len));
        match (first, len, end) {
            (Some(first), Some(len), Some(end)) if end <= pool.len_bytes && len > 0 => {
                let address = self.place(run.shard_index, first, len)?;
                // SAFETY: a place in these windows, which are flea's; what it shows is only read under leases.
                unsafe {
                    host::map_shared_fixed(
                        address,
                        host::to_usize(len)?,
                        pool.fd.as_fd(),
                        offset_bytes,
                        Protection::Read,
                    )
                }
            }
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{run:?} at {offset_bytes} of a pool of {} bytes",
                    pool.len_bytes
                ),
            )),
        }
    }
}
