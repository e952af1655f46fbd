//! A file that is there completely or not at all: written without a name, synced, then given its own.
//!
//! Ended before [`OutputFile::commit`] (an error, Ctrl-C, a panic, SIGKILL) it leaves nothing: see `publish`. The space is
//! reserved before the first byte, so a full disk is known at once. Written with O_DIRECT where the filesystem has it:
//! three times as fast as through the page cache and a sync here, a model of many gigabytes does not displace what else is
//! cached, and a measurement on it begins cold.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::statvfs::statvfs;

use super::publish::{Unpublished, directory};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, MIB, PAGE_4K};

/// One write to the drive. 8 MiB keep it busy without a second write in flight.
const STAGING_BYTES: usize = 8 * MIB as usize;
/// What O_DIRECT wants of memory, offset and length.
const ALIGN_BYTES: usize = PAGE_4K as usize;

/// A file being written.
#[derive(Debug)]
pub struct OutputFile {
    unpublished: Unpublished,
    path: PathBuf,
    /// Replace what has the name.
    force: bool,
    /// Memory of one write and a page more; the aligned part begins at `staging_begin`.
    staging: Vec<u8>,
    staging_begin: usize,
    staged_bytes: usize,
    /// What is in the file already, without what is staged.
    written_bytes: u64,
}

/// Refuses an output that stands already (unless `force`), is no regular file, or has no directory to stand in.
///
/// # Errors
/// `Invalid`, `NotFound`, `Permission`.
pub fn check_target(path: &Path, force: bool) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => Err(Error::new(
            ErrorKind::Invalid,
            format!("{shown} exists and is not a regular file; choose another name"),
        )),
        Ok(_) if !force => Err(exists(path)),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = directory(path);
            fs::metadata(parent).map(drop).map_err(|error| {
                Error::from_io(
                    &error,
                    format!("directory {} for {shown}", parent.display()),
                )
            })
        }
        Err(error) => Err(Error::from_io(&error, format!("look at {shown}"))),
    }
}

fn exists(path: &Path) -> Error {
    let context = format!("{} exists; use --force to replace it", path.display());
    Error::new(ErrorKind::Invalid, context)
}

/// Refuses when the filesystem of `path` has less than `needed_bytes` free.
///
/// # Errors
/// `Refused` with ENOSPC.
pub fn check_space(path: &Path, needed_bytes: u64) -> Result<()> {
    let parent = directory(path);
    let found = statvfs(parent)
        .map_err(|errno| Error::os(errno as i32, format!("free space of {}", parent.display())))?;
    let free_bytes = (found.blocks_available() as u64).saturating_mul(found.fragment_size() as u64);
    if free_bytes < needed_bytes {
        return Err(no_space(path, needed_bytes, Some(free_bytes)));
    }
    Ok(())
}

fn no_space(path: &Path, needed_bytes: u64, free_bytes: Option<u64>) -> Error {
    let free = free_bytes.map_or(String::new(), |free| {
        format!(
            ", and {} has {} free",
            directory(path).display(),
            HumanBytes(free)
        )
    });
    Error::os(
        libc::ENOSPC,
        format!(
            "{} needs {}{free}",
            path.display(),
            HumanBytes(needed_bytes)
        ),
    )
    .with_kind(ErrorKind::Refused)
}

impl OutputFile {
    /// Begins a file that is to become `path`, and reserves `len_bytes` for it.
    ///
    /// # Errors
    /// The directory cannot be written, or the disk is full.
    pub fn create(path: &Path, len_bytes: u64, force: bool) -> Result<Self> {
        let unpublished = Unpublished::create(path)
            .map_err(|error| Error::from_io(&error, format!("create {}", path.display())))?;
        let staging = vec![0; STAGING_BYTES + ALIGN_BYTES];
        let output = Self {
            unpublished,
            path: path.to_owned(),
            force,
            staging_begin: staging.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES),
            staging,
            staged_bytes: 0,
            written_bytes: 0,
        };
        output.reserve(len_bytes)?;
        Ok(output)
    }

    fn reserve(&self, len_bytes: u64) -> Result<()> {
        let len = i64::try_from(len_bytes).map_err(|_| no_space(&self.path, len_bytes, None))?;
        match fallocate(self.unpublished.file(), FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            // The filesystem cannot reserve; the writes themselves will tell.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(Errno::ENOSPC) => Err(no_space(&self.path, len_bytes, None)),
            Err(errno) => Err(Error::os(
                errno as i32,
                format!(
                    "reserve {} for {}",
                    HumanBytes(len_bytes),
                    self.path.display()
                ),
            )),
        }
    }

    /// Everything to the drive. The file has no name yet.
    ///
    /// # Errors
    /// The drive or filesystem failed.
    pub fn sync(&mut self) -> Result<()> {
        let len_bytes = self.written_bytes + self.staged_bytes as u64;
        self.write_staged()
            .and_then(|()| self.unpublished.file().set_len(len_bytes))
            .and_then(|()| self.unpublished.file().sync_all())
            .map_err(|error| Error::from_io(&error, format!("write {}", self.path.display())))?;
        // Nothing is cached after O_DIRECT; without it the pages are clean now and can go.
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        if let Err(errno) = posix_fadvise(self.unpublished.file(), 0, 0, advice) {
            log::debug!("drop cached pages of {}: {errno}", self.path.display());
        }
        Ok(())
    }

    /// Whole pages: zeros fill the last one, and [`OutputFile::sync`] cuts them off again.
    fn write_staged(&mut self) -> io::Result<()> {
        let padded = self.staged_bytes.next_multiple_of(ALIGN_BYTES);
        let staged = &mut self.staging[self.staging_begin..][..padded];
        staged[self.staged_bytes..].fill(0);
        let file = self.unpublished.file();
        file.write_all_at(staged, self.written_bytes)?;
        self.written_bytes += self.staged_bytes as u64;
        self.staged_bytes = 0;
        Ok(())
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// `Invalid` where another file got it first and is not to be replaced; what renaming and syncing give. A file without
    /// its name is gone when it is dropped.
    pub fn commit(&mut self) -> Result<()> {
        let shown = self.path.display();
        let published = self.unpublished.publish(self.force);
        published.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => exists(&self.path),
            _ => Error::from_io(&error, format!("give {shown} its name")),
        })?;
        // The name is only as lasting as the directory that holds it.
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(|error| Error::from_io(&error, format!("sync the directory of {shown}")))
    }

    /// Takes the name away again, where this file still has it.
    pub fn withdraw(&self) {
        self.unpublished.withdraw();
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.staged_bytes == STAGING_BYTES {
            self.write_staged()?;
        }
        let count = bytes.len().min(STAGING_BYTES - self.staged_bytes);
        self.staging[self.staging_begin + self.staged_bytes..][..count]
            .copy_from_slice(&bytes[..count]);
        self.staged_bytes += count;
        Ok(count)
    }

    /// Nothing: a page that is not full cannot be written on its own. [`OutputFile::sync`] ends the file.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_dropped_early_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let mut output = OutputFile::create(&path, 4096, false).unwrap();
        output.write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(output);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_committed_file_has_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let mut output = OutputFile::create(&path, 1 << 20, false).unwrap();
        output.write_all(b"whole").unwrap();
        output.sync().unwrap();
        output.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn pieces_of_any_length_come_out_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let mut expected: Vec<u8> = Vec::new();
        let mut output = OutputFile::create(&path, 20 << 20, false).unwrap();
        for (index, len) in [1, 4095, 8 << 20, 9_000_001, 0, 77].into_iter().enumerate() {
            let piece: Vec<u8> = (0..len).map(|i| (i * 31 + index) as u8).collect();
            output.write_all(&piece).unwrap();
            expected.extend(piece);
        }
        output.sync().unwrap();
        output.commit().unwrap();
        assert!(fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        fs::write(&path, b"mine").unwrap();
        let kind = |result: Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(check_target(&path, false)), ErrorKind::Invalid);
        assert_eq!(check_target(&path, true), Ok(()));
        assert_eq!(
            kind(check_target(directory.path(), true)),
            ErrorKind::Invalid
        );
        let nowhere = directory.path().join("no/m.gguf");
        assert_eq!(kind(check_target(&nowhere, true)), ErrorKind::NotFound);
        let lost = OutputFile::create(&nowhere, 1, false).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::NotFound, "{lost}");
    }

    /// What the one has written whole is published whole while the other is in the middle, and the other way round.
    #[test]
    fn two_writers_do_not_meet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let begin = |force, text: &[u8]| {
            let mut output = OutputFile::create(&path, 1 << 20, force).unwrap();
            output.write_all(text).unwrap();
            output
        };
        for force in [false, true] {
            let mut first = begin(force, b"the first, whole");
            let mut second = begin(true, b"the second");
            first.sync().unwrap();
            first.commit().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"the first, whole");
            second.write_all(b", whole").unwrap();
            second.sync().unwrap();
            second.commit().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"the second, whole");
            // Nothing asked this one to replace what has come meanwhile.
            let mut third = begin(false, b"the third");
            third.sync().unwrap();
            let refused = third.commit().unwrap_err();
            assert!(refused.to_string().contains("--force"), "{refused}");
            drop(third);
            assert_eq!(fs::read(&path).unwrap(), b"the second, whole");
            drop((first, second));
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_full_disk_is_refused_first() {
        let directory = tempfile::tempdir().unwrap();
        let error = check_space(&directory.path().join("m"), u64::MAX).unwrap_err();
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::Refused, Some(libc::ENOSPC))
        );
    }
}
