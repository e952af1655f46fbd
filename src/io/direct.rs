//! One shard, opened for reading: what it is, how it may be read, and whether it is still the same file.
//!
//! Invariants: only regular files with bytes in them are opened, and opening never waits (a FIFO, a device or a
//! directory is an error, not a hang). O_DIRECT reads keep offset, length and memory at multiples of 4 KiB, whatever
//! finer alignment the filesystem admits. A file that is read through the page cache says so, and its pages are
//! dropped behind. Place: `file` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

use super::coded_file::{CodedFile, Offsets};
use super::filesystem::{FUSE, Filesystem, Stated, direct_alignment};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{PAGE_2M, PAGE_4K, align_down, align_up};

/// Read-ahead of the header reader. Headers with a vocabulary are 5-10 MB; 256 KiB keeps the system calls few
/// without pulling weights into the page cache.
const HEADER_READ_BYTES: usize = 256 << 10;

/// Largest single read through the page cache; the pages are dropped after each, so this bounds what it holds.
const CACHED_READ_BYTES: usize = 1 << 20;

/// How the bytes of a shard travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectIo {
    /// O_DIRECT, and the filesystem states its alignment: the page cache is not involved.
    Direct,
    /// O_DIRECT was accepted, but the filesystem does not say what it makes of it (btrfs, FUSE, network filesystems).
    Unverified {
        /// Which filesystem, and what that means.
        reason: String,
    },
    /// Through the page cache, with the pages dropped behind.
    Buffered {
        /// Why O_DIRECT is not used.
        reason: String,
    },
}

impl DirectIo {
    /// True for reads that the page cache has no part in, as far as the filesystem tells.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        matches!(self, Self::Direct)
    }

    /// What to tell the user: nothing for plain O_DIRECT.
    #[must_use]
    pub fn fallback(&self) -> Option<&str> {
        match self {
            Self::Direct => None,
            Self::Unverified { reason } | Self::Buffered { reason } => Some(reason),
        }
    }
}

impl fmt::Display for DirectIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Unverified { reason } => write!(f, "direct, unverified ({reason})"),
            Self::Buffered { reason } => write!(f, "buffered ({reason})"),
        }
    }
}

/// What makes a file the same file: a reader that sees another identity reads something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Device of the filesystem.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Length.
    pub len_bytes: u64,
    /// Time of the last write. Not the change time: that moves when the file is unlinked, which harms nobody.
    pub modified_ns: i128,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len_bytes: metadata.size(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
        }
    }

    fn same_file(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }
}

/// Whether O_DIRECT is tried at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    PreferDirect,
    Buffered,
}

/// A shard, open for reading.
#[derive(Debug)]
pub struct ShardFile {
    path: PathBuf,
    identity: Identity,
    /// Decoded where it is compressed: then it is there as if it were the original.
    len_bytes: u64,
    coded: Option<Arc<CodedFile>>,
    filesystem: &'static str,
    filesystem_id: Option<u64>,
    direct: DirectIo,
    /// What the readers read from: O_DIRECT, or plain where that is not to be had.
    weights: File,
    /// Headers and odd ranges: plain, without kernel read-ahead, pages dropped behind.
    cached: File,
}

impl ShardFile {
    /// Opens a regular, non-empty file and finds out how it can be read. Never waits and never reads weights.
    ///
    /// # Errors
    /// `NotFound`, `Permission`; `Format` for anything that is not a regular file with bytes in it; `Changed` when the
    /// path is replaced while it is being opened; `Io` otherwise.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, Policy::PreferDirect)
    }

    /// [`ShardFile::open`] through the page cache on purpose, pages dropped behind: to compare, and to try the fallback
    /// where O_DIRECT works.
    ///
    /// # Errors
    /// As [`ShardFile::open`].
    pub fn open_buffered(path: &Path) -> Result<Self> {
        Self::open_with(path, Policy::Buffered)
    }

    /// [`ShardFile::open`] of a compressed model (docs/packed-format.md): what is read is the original, decoded on the way.
    ///
    /// # Errors
    /// As [`ShardFile::open`]; what is wrong with the compressed model.
    pub fn open_decoded(path: &Path) -> Result<Self> {
        let coded = CodedFile::open(Self::open(path)?, Offsets::Original)?;
        let mut file = Self::open(path)?;
        // The tables were read through the first descriptor: both must be of one file, and it must still be that.
        coded.check_same(&file)?;
        file.len_bytes = coded.len_bytes();
        file.coded = Some(Arc::new(coded));
        Ok(file)
    }

    fn open_with(path: &Path, policy: Policy) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::from_io(&error, format_args!("open {}", path.display()));
        // Looked at before it is opened, because opening a device can do something, and again after.
        require_file_with_bytes(path, &std::fs::metadata(path).map_err(failed)?)?;
        let (cached, metadata) = open_regular(path, 0).map_err(failed)?;
        require_file_with_bytes(path, &metadata)?;
        let identity = Identity::of(&metadata);
        // Headers are read front to back in pieces of our own choice. With read-ahead (8 MiB on some machines) the
        // kernel would pull weights into the page cache that the header does not need.
        advise(&cached, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        let filesystem = Filesystem::of(&cached);
        let (weights, direct) = open_for_weights(path, &identity, &filesystem, policy)?;
        Ok(Self {
            path: path.to_path_buf(),
            identity,
            len_bytes: identity.len_bytes,
            coded: None,
            filesystem: filesystem.name,
            filesystem_id: filesystem.id,
            direct,
            weights,
            cached,
        })
    }

    /// Where the open file really lies, links resolved, as the kernel says now.
    ///
    /// # Errors
    /// What /proc/self/fd says.
    pub fn real_path(&self) -> Result<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.weights.as_raw_fd());
        std::fs::read_link(&link).map_err(|error| Error::from_io(&error, link))
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length when it was opened.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What decodes it, where it is compressed.
    #[must_use]
    pub const fn coded(&self) -> Option<&Arc<CodedFile>> {
        self.coded.as_ref()
    }

    /// How its bytes travel.
    #[must_use]
    pub const fn direct(&self) -> &DirectIo {
        &self.direct
    }

    /// Name of the filesystem it lies on.
    #[must_use]
    pub const fn filesystem(&self) -> &'static str {
        self.filesystem
    }

    /// What tells that filesystem from others of its kind.
    pub(super) const fn filesystem_id(&self) -> Option<u64> {
        self.filesystem_id
    }

    /// What it was when it was opened.
    #[must_use]
    pub const fn identity(&self) -> Identity {
        self.identity
    }

    /// True while the path leads to the file that is open here, as it was when it was opened.
    #[must_use]
    pub fn is_current(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|metadata| Identity::of(&metadata) == self.identity)
    }

    /// Looks whether the open file is still as long and as old as when it was opened. A deleted file passes: its bytes
    /// stay until it is closed. Costs one fstat (below a microsecond).
    ///
    /// # Errors
    /// `Truncated` when it became shorter, `Changed` when it was written to.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self.weights.metadata().map_err(|error| {
            Error::from_io(&error, format_args!("fstat {}", self.path.display()))
        })?;
        let now = Identity::of(&metadata);
        let was = &self.identity;
        if now.len_bytes < was.len_bytes {
            return Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "{}: was {} bytes when it was opened and is {} now; restore the file and open it again",
                    self.path.display(),
                    was.len_bytes,
                    now.len_bytes
                ),
            ));
        }
        if now != *was {
            return Err(Error::new(
                ErrorKind::Changed,
                format!(
                    "{}: was written to while in use (length {} -> {}, modified {} ns later); open it again",
                    self.path.display(),
                    was.len_bytes,
                    now.len_bytes,
                    now.modified_ns - was.modified_ns
                ),
            ));
        }
        Ok(())
    }

    /// The file from its first byte, for parsers. Reads little ahead and leaves nothing in the page cache.
    #[must_use]
    pub fn header_reader(&self) -> HeaderReader<'_> {
        HeaderReader {
            shard: self,
            bytes: vec![0; HEADER_READ_BYTES],
            start: 0,
            end: 0,
            offset_bytes: 0,
        }
    }

    /// Fills `bytes` from `offset_bytes` on, any alignment, and leaves nothing in the page cache: for what a host keeps
    /// itself.
    ///
    /// # Errors
    /// `Truncated` when the range reaches past the end, `Io` when the drive fails.
    pub fn read_exact_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let end = bytes.len().min(done + CACHED_READ_BYTES);
            let at = offset_bytes.saturating_add(done as u64);
            let read = self.read_cached(at, &mut bytes[done..end])?;
            if read == 0 {
                return Err(self.ended_at(at, offset_bytes, bytes.len() as u64));
            }
            done += read;
        }
        Ok(())
    }

    /// One read through the page cache, dropped behind; 0 at the end of the file.
    fn read_cached(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<usize> {
        if let Some(coded) = &self.coded {
            return coded.fill(offset_bytes, bytes);
        }
        loop {
            match self.cached.read_at(bytes, offset_bytes) {
                Ok(read) => {
                    // Whoever wrote the file may have left it cached in folios of up to 2 MiB, which go only as a
                    // whole: the range reaches back to where such a folio begins.
                    let start = align_down(offset_bytes, PAGE_2M);
                    drop_behind(&self.cached, start, offset_bytes + read as u64 - start);
                    return Ok(read);
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    return Err(Error::from_io(
                        &error,
                        format_args!("read {} at {offset_bytes}", self.path.display()),
                    ));
                }
            }
        }
    }

    /// The error for a file that ends before `offset_bytes + len_bytes`.
    pub(super) fn ended_at(&self, at_bytes: u64, offset_bytes: u64, len_bytes: u64) -> Error {
        let now = self
            .weights
            .metadata()
            .map_or(self.len_bytes(), |metadata| metadata.size());
        Error::new(
            ErrorKind::Truncated,
            format!(
                "{}: read of {len_bytes} bytes at {offset_bytes} ended at {at_bytes}; the file was {} bytes when opened and is {now} now; restore it and open it again",
                self.path.display(),
                self.len_bytes()
            ),
        )
    }

    /// One plain pread into 4 KiB-aligned memory at a 4 KiB-aligned offset: the cross-check of the readers.
    ///
    /// # Errors
    /// `Invalid` for a misaligned range, `Io` with errno when the drive fails.
    pub fn read_aligned_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<usize> {
        if !is_aligned(offset_bytes, bytes.len() as u64, bytes.as_ptr()) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "read {} at {offset_bytes}: offset, length and memory must be multiples of 4096",
                    self.path.display()
                ),
            ));
        }
        if let Some(coded) = &self.coded {
            return coded.fill(offset_bytes, bytes);
        }
        let read = self.weights.read_at(bytes, offset_bytes).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("read {} at {offset_bytes}", self.path.display()),
            )
        })?;
        self.dropped_behind(offset_bytes, read as u64);
        Ok(read)
    }

    /// The descriptor the readers read from.
    pub(super) fn weights_fd(&self) -> RawFd {
        self.weights.as_raw_fd()
    }

    /// To be called after each read of weights: where they came through the page cache, they leave it.
    pub(super) fn dropped_behind(&self, offset_bytes: u64, len_bytes: u64) {
        if !self.direct.is_direct() {
            drop_behind(&self.weights, offset_bytes, len_bytes);
        }
    }

    /// io_uring over FUSE: see [`super::Reader::new`].
    pub(super) fn is_fuse(&self) -> bool {
        self.filesystem == FUSE
    }
}

/// The rule for every O_DIRECT read of the house: finer alignments (512 and less) exist, but trying them out lies:
/// small misaligned reads sometimes succeed.
pub(super) fn is_aligned(offset_bytes: u64, len_bytes: u64, target: *const u8) -> bool {
    (offset_bytes | len_bytes | target.addr() as u64).is_multiple_of(PAGE_4K)
}

/// A shard from its first byte, read ahead by 256 KiB. See [`ShardFile::header_reader`].
#[derive(Debug)]
pub struct HeaderReader<'a> {
    shard: &'a ShardFile,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    offset_bytes: u64,
}

impl Read for HeaderReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.start == self.end {
            let read = self
                .shard
                .read_cached(self.offset_bytes, &mut self.bytes)
                .map_err(std::io::Error::other)?;
            self.start = 0;
            self.end = read;
            self.offset_bytes += read as u64;
        }
        let count = out.len().min(self.end - self.start);
        out[..count].copy_from_slice(&self.bytes[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }
}

/// Opens without ever waiting (a FIFO without a writer would wait for ever), and takes O_NONBLOCK off again: io_uring
/// would answer EAGAIN for it instead of waiting for the drive.
fn open_regular(path: &Path, extra_flags: i32) -> std::io::Result<(File, Metadata)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | extra_flags)
        .open(path)?;
    let metadata = file.metadata()?;
    let kept = OFlag::from_bits_retain(extra_flags & libc::O_DIRECT);
    fcntl(&file, FcntlArg::F_SETFL(kept))?;
    Ok((file, metadata))
}

fn require_file_with_bytes(path: &Path, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let problem = if kind.is_dir() {
        "is a directory"
    } else if kind.is_fifo() {
        "is a FIFO"
    } else if kind.is_socket() {
        "is a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "is a device"
    } else if !kind.is_file() {
        "is not a regular file"
    } else if metadata.size() == 0 {
        "is empty"
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Format,
        format!(
            "{} {problem}: not a model file; give the path of a .gguf or .safetensors file",
            path.display()
        ),
    ))
}

/// The descriptor for the weights, and how it reads.
fn open_for_weights(
    path: &Path,
    identity: &Identity,
    filesystem: &Filesystem,
    policy: Policy,
) -> Result<(File, DirectIo)> {
    let reason = match try_direct(path, identity, filesystem, policy)? {
        Attempt::Opened(file, direct) => return Ok((file, direct)),
        Attempt::Declined(reason) => reason,
    };
    let (file, metadata) = open_regular(path, 0)
        .map_err(|error| Error::from_io(&error, format_args!("open {}", path.display())))?;
    require_same(path, identity, &metadata)?;
    // Our requests are large, in flight together and planned: read-ahead would only read a neighbour's pages, and
    // build large folios across request borders that POSIX_FADV_DONTNEED then leaves in place.
    advise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    Ok((file, DirectIo::Buffered { reason }))
}

enum Attempt {
    Opened(File, DirectIo),
    Declined(String),
}

fn try_direct(
    path: &Path,
    identity: &Identity,
    filesystem: &Filesystem,
    policy: Policy,
) -> Result<Attempt> {
    if policy == Policy::Buffered {
        return Ok(Attempt::Declined("the page cache was asked for".into()));
    }
    if filesystem.in_memory {
        return Ok(Attempt::Declined(format!(
            "{} holds the file in memory: there is no drive to read",
            filesystem.name
        )));
    }
    let (file, metadata) = match open_regular(path, libc::O_DIRECT) {
        Ok(opened) => opened,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return Ok(Attempt::Declined(format!(
                "{} refuses O_DIRECT",
                filesystem.name
            )));
        }
        Err(error) => {
            return Err(Error::from_io(
                &error,
                format_args!("open {} with O_DIRECT", path.display()),
            ));
        }
    };
    require_same(path, identity, &metadata)?;
    Ok(match direct_alignment(&file) {
        Stated::Aligned(align) if align > PAGE_4K => Attempt::Declined(format!(
            "{} wants O_DIRECT aligned to {align} bytes, flea aligns to 4096",
            filesystem.name
        )),
        Stated::Aligned(_) => probe_read(file, DirectIo::Direct, filesystem),
        Stated::No => Attempt::Declined(format!("{} has no O_DIRECT here", filesystem.name)),
        Stated::Unknown => {
            let reason = format!(
                "{} takes O_DIRECT without saying whether it bypasses the page cache",
                filesystem.name
            );
            probe_read(file, DirectIo::Unverified { reason }, filesystem)
        }
    })
}

/// One block by O_DIRECT: some layers accept the flag at open and fail the first read.
fn probe_read(file: File, direct: DirectIo, filesystem: &Filesystem) -> Attempt {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let mut block = Box::new(Block([0; 4096]));
    match file.read_at(&mut block.0, 0) {
        Ok(_) => Attempt::Opened(file, direct),
        Err(error) => Attempt::Declined(format!(
            "the first O_DIRECT read failed on {}: {error}",
            filesystem.name
        )),
    }
}

fn require_same(path: &Path, identity: &Identity, metadata: &Metadata) -> Result<()> {
    if Identity::of(metadata).same_file(identity) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Changed,
        format!(
            "{}: another file took this name while it was being opened; open it again",
            path.display()
        ),
    ))
}

/// Takes the pages of a range out of the page cache, whole pages around it included.
fn drop_behind(file: &File, offset_bytes: u64, len_bytes: u64) {
    let start = align_down(offset_bytes, PAGE_4K);
    let end = align_up(offset_bytes.saturating_add(len_bytes), PAGE_4K).unwrap_or(u64::MAX);
    if end > start {
        advise(
            file,
            start,
            end - start,
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
    }
}

/// Advice is a wish: a filesystem that does not know it loses nothing but memory, which the cgroup's reclaim gets back.
fn advise(file: &File, offset_bytes: u64, len_bytes: u64, advice: PosixFadviseAdvice) {
    let (Ok(offset), Ok(len)) = (
        libc::off_t::try_from(offset_bytes),
        libc::off_t::try_from(len_bytes),
    ) else {
        return;
    };
    if let Err(errno) = posix_fadvise(file, offset, len, advice) {
        log::debug!("posix_fadvise({advice:?}) failed: {errno}");
    }
}
