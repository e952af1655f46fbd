//! What the page cache holds of a file, and how to empty it: a measurement of the drive has to begin cold and to know it.
//!
//! Place: beside the reader; only measurements and tests use it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{GIB, PAGE_4K};

/// cachestat(2), by the one number it has on all machines that libc knows it of.
const SYS_CACHESTAT: libc::c_long = 451;
/// Mapped at once: one byte of answer for each page of it.
const SPAN_BYTES: u64 = GIB;
/// For so long pages may be on their way in: the kernel drops none that is being read ahead.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many bytes of the file the page cache holds, as mincore says.
///
/// # Errors
/// The file cannot be opened, mapped or asked about.
pub fn cached_bytes(path: &Path) -> Result<u64> {
    let failed = |what: &str| Error::last_os(format_args!("{what} {}", path.display()));
    let file = open(path)?;
    let len_bytes = file
        .metadata()
        .map_err(|error| Error::from_io(&error, format_args!("look at {}", path.display())))?
        .len();
    let mut cached_count = 0_u64;
    let mut offset_bytes = 0;
    while offset_bytes < len_bytes {
        let span_bytes = (len_bytes - offset_bytes).min(SPAN_BYTES) as usize;
        let mut pages = vec![0_u8; span_bytes.div_ceil(PAGE_4K as usize)];
        // SAFETY: a fresh mapping of the open file without access, asked about and unmapped here; mincore writes one
        // byte for each page of it, and there are as many.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                span_bytes,
                libc::PROT_NONE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset_bytes as libc::off_t,
            );
            if map == libc::MAP_FAILED {
                return Err(failed("map"));
            }
            let asked = libc::mincore(map, span_bytes, pages.as_mut_ptr());
            let error = failed("mincore on");
            libc::munmap(map, span_bytes);
            if asked != 0 {
                return Err(error);
            }
        }
        cached_count += pages.iter().map(|page| u64::from(page & 1)).sum::<u64>();
        offset_bytes += span_bytes as u64;
    }
    Ok(cached_count * PAGE_4K)
}

/// Drops the file from the page cache and proves it.
///
/// # Errors
/// `Busy` when part of it stays (somebody maps it, or it is not on a disk); those of [`cached_bytes`].
pub fn make_cold(path: &Path) -> Result<()> {
    let file = open(path)?;
    // Pages that are not written back yet would stay.
    file.sync_all()
        .map_err(|error| Error::from_io(&error, format_args!("sync {}", path.display())))?;
    let began = Instant::now();
    loop {
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|errno| {
            let context = format_args!("drop {} from the page cache", path.display());
            Error::os(errno as i32, context)
        })?;
        // A page on its way in is in no answer of mincore's, stays where it is, and makes what comes next warm.
        let held_bytes = match held_bytes(&file) {
            Some(bytes) => bytes,
            None => cached_bytes(path)?,
        };
        match held_bytes {
            0 => return Ok(()),
            _ if began.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            bytes => {
                let context = format!(
                    "{}: {bytes} bytes stay in the page cache, so nothing measured on it is cold; is another program \
                     using it?",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Busy, context));
            }
        }
    }
}

/// What the page cache has of the file, pages on their way in among them; `None` before Linux 6.5.
fn held_bytes(file: &File) -> Option<u64> {
    /// `struct cachestat_range`: all of the file.
    #[repr(C)]
    struct Range {
        offset_bytes: u64,
        len_bytes: u64,
    }
    let range = Range {
        offset_bytes: 0,
        len_bytes: 0,
    };
    // `struct cachestat`: pages in the cache, dirty, under writeback, evicted, recently evicted.
    let mut pages = [0_u64; 5];
    // SAFETY: the kernel reads a range and writes five numbers; both live through the call.
    let status = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            pages.as_mut_ptr(),
            0,
        )
    };
    (status == 0).then(|| pages[0] * PAGE_4K)
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|error| Error::from_io(&error, format_args!("open {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_read_is_warm_until_it_is_made_cold() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, vec![3; (1 << 20) + 5]).unwrap();
        std::fs::read(&path).unwrap();
        assert_eq!(cached_bytes(&path).unwrap(), (1 << 20) + PAGE_4K);
        let held = || held_bytes(&File::open(&path).unwrap());
        assert!(held().is_none_or(|bytes| bytes == (1 << 20) + PAGE_4K));
        make_cold(&path).unwrap();
        assert_eq!(cached_bytes(&path).unwrap(), 0);
        assert!(held().is_none_or(|bytes| bytes == 0));
        assert_eq!(
            cached_bytes(&directory.path().join("missing"))
                .unwrap_err()
                .kind(),
            ErrorKind::NotFound
        );
    }
}
