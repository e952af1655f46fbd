//! A spill file: what a process moves out of memory and reads back itself. It has no name, so that nothing stays behind,
//! however the process ends.
//!
//! Invariants: O_DIRECT where the filesystem has it, and it says so where not; offsets, lengths and memory are whole
//! pages of 4 KiB; a read or write is complete or an error that names the directory, the offset and the remedy. Place:
//! beside `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::direct::{DirectIo, is_aligned};
use super::filesystem::{Filesystem, Stated, direct_alignment};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, PAGE_4K};

/// A nameless file in a directory.
#[derive(Debug)]
pub struct SpillFile {
    directory: PathBuf,
    file: File,
    direct: DirectIo,
}

impl SpillFile {
    /// Makes one in `directory`.
    ///
    /// # Errors
    /// `NotFound`, `Permission`, `Invalid` for something that is no directory, `Io`.
    pub fn create(directory: &Path) -> Result<Self> {
        let failed = |error: &io::Error| {
            Error::from_io(
                error,
                format_args!(
                    "make a file in {}; name a directory that exists, can be written to and lies on a drive",
                    directory.display()
                ),
            )
        };
        let metadata = std::fs::metadata(directory).map_err(|error| failed(&error))?;
        if !metadata.is_dir() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{} is not a directory; name one", directory.display()),
            ));
        }
        let (file, direct) = match nameless(directory, libc::O_DIRECT) {
            Ok(file) => judge(file, directory).map_err(|error| failed(&error))?,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let reason = "the filesystem refuses O_DIRECT".to_owned();
                let file = nameless(directory, 0).map_err(|error| failed(&error))?;
                (file, DirectIo::Buffered { reason })
            }
            Err(error) => return Err(failed(&error)),
        };
        Ok(Self {
            directory: directory.to_path_buf(),
            file,
            direct,
        })
    }

    /// How its bytes travel.
    #[must_use]
    pub const fn direct(&self) -> &DirectIo {
        &self.direct
    }

    /// Makes it `len_bytes` long. `reserve` takes the room on the drive now, so that it cannot be missing later.
    ///
    /// # Errors
    /// `Io` with ENOSPC or EDQUOT where the room is not there.
    pub fn set_len(&self, len_bytes: u64, reserve: bool) -> Result<()> {
        let failed = |error: &io::Error| {
            Error::from_io(
                error,
                format_args!(
                    "make room for {} of keys and values in {}; free some, name another directory or take a smaller --ctx",
                    HumanBytes(len_bytes),
                    self.directory.display()
                ),
            )
        };
        self.file
            .set_len(len_bytes)
            .map_err(|error| failed(&error))?;
        let Ok(len) = libc::off_t::try_from(len_bytes) else {
            return Ok(());
        };
        if !reserve || len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::empty(), 0, len) {
            // A filesystem that cannot reserve says so when it is written to.
            Ok(()) | Err(Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(failed(&errno.into())),
        }
        Ok(())
    }

    /// Fills `bytes` from `offset_bytes` on.
    ///
    /// # Errors
    /// `Invalid` for a misaligned range, `Truncated` behind the end, `Io`.
    pub fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<()> {
        self.check(offset_bytes, bytes)?;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset_bytes + done as u64;
            match self.file.read_at(&mut bytes[done..], at) {
                Ok(0) => {
                    return Err(Error::new(
                        ErrorKind::Truncated,
                        format!("{} ends at {at}", self.name()),
                    ));
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let what = format_args!("read {} at {at}; look at the drive", self.name());
                    return Err(Error::from_io(&error, what));
                }
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `offset_bytes`.
    ///
    /// # Errors
    /// `Invalid` for a misaligned range, `Io`.
    pub fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.check(offset_bytes, bytes)?;
        self.file.write_all_at(bytes, offset_bytes).map_err(|error| {
            Error::from_io(
                &error,
                format_args!(
                    "write {} bytes of {} at {offset_bytes}; free some room or name another directory",
                    bytes.len(),
                    self.name()
                ),
            )
        })
    }

    fn check(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        if is_aligned(offset_bytes, bytes.len() as u64, bytes.as_ptr()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{} at {offset_bytes}: offset, length and memory must be multiples of 4096",
                self.name()
            ),
        ))
    }

    fn name(&self) -> String {
        format!("the nameless file in {}", self.directory.display())
    }
}

/// O_TMPFILE, or a file whose name is taken away at once where the filesystem has none.
fn nameless(directory: &Path, flags: i32) -> io::Result<File> {
    let options = |flags| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        options.custom_flags(flags);
        options
    };
    match options(libc::O_TMPFILE | flags).open(directory) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        other => return other,
    }
    let path = directory.join(format!(".flea-{}-{}", std::process::id(), next_number()));
    let file = options(flags).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// A number that differs between two files of one process.
fn next_number() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// What O_DIRECT is worth on this file.
fn judge(file: File, directory: &Path) -> io::Result<(File, DirectIo)> {
    let filesystem = Filesystem::of(&file);
    let declined = |reason: String| -> io::Result<(File, DirectIo)> {
        Ok((nameless(directory, 0)?, DirectIo::Buffered { reason }))
    };
    if filesystem.in_memory {
        return declined(format!(
            "{} holds files in memory: nothing is gained",
            filesystem.name
        ));
    }
    match direct_alignment(&file) {
        Stated::Aligned(align) if align <= PAGE_4K => Ok((file, DirectIo::Direct)),
        Stated::Aligned(align) => declined(format!(
            "{} wants O_DIRECT aligned to {align} bytes",
            filesystem.name
        )),
        Stated::No => declined(format!("{} has no O_DIRECT here", filesystem.name)),
        Stated::Unknown => {
            let reason = format!(
                "{} takes O_DIRECT without saying whether it bypasses the page cache",
                filesystem.name
            );
            Ok((file, DirectIo::Unverified { reason }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::AlignedMemory;

    #[test]
    fn what_is_written_is_read_and_the_directory_stays_empty() {
        let directory = tempfile::tempdir().unwrap();
        let spill = SpillFile::create(directory.path()).unwrap();
        spill.set_len(3 * PAGE_4K, true).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let mut memory = AlignedMemory::new(2 * PAGE_4K, PAGE_4K).unwrap();
        let bytes = memory.bytes_mut();
        bytes[..4096].fill(9);
        spill.write_at(PAGE_4K, &bytes[..4096]).unwrap();
        bytes[..8192].fill(1);
        spill.read_at(0, &mut bytes[..8192]).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 0));
        assert!(bytes[4096..8192].iter().all(|byte| *byte == 9));
        let error = spill.read_at(3 * PAGE_4K, &mut bytes[..4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
        let error = spill.read_at(1, &mut bytes[..4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }

    #[test]
    fn no_directory_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let error = SpillFile::create(&missing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("missing"), "{error}");
        std::fs::write(&missing, b"a file").unwrap();
        let error = SpillFile::create(&missing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let spill = SpillFile::create(directory.path()).unwrap();
        let error = spill.set_len(1 << 60, true).unwrap_err();
        assert!(error.to_string().contains("--ctx"), "{error}");
    }
}
