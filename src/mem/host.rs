//! The system calls of the memory room, each in a wrapper that says what failed, where, and what would mend it.
//!
//! Addresses are `usize`, so that the structs that keep them stay `Send`; a range is always whole pages. Every wrapper
//! is `unsafe` for one reason: it changes what an address means, so the range has to belong to flea and nobody may hold
//! a reference into it. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: beneath the pool.
#![allow(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::units::{HumanBytes, PAGE_2M, PAGE_4K, align_up};
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

/// `MFD_NOEXEC_SEAL` of Linux 6.3: the memfd can never become executable. Older kernels answer EINVAL.
const MFD_NOEXEC_SEAL: libc::c_uint = 0x8;

/// What may be done with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    /// Any touch is a SIGSEGV.
    None,
    /// A host may compute with it.
    Read,
    /// The reader may fill it.
    ReadWrite,
}

impl Protection {
    const fn bits(self) -> libc::c_int {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// Reserves `len_bytes` of address space aligned to 2 MiB, without memory: any touch is a SIGSEGV, children of fork do
/// not see it. The range is the caller's until [`unmap`].
pub(super) fn reserve(len_bytes: u64) -> Result<usize> {
    let len = to_usize(len_bytes)?;
    let slack = PAGE_2M as usize;
    let wide = len.checked_add(slack).ok_or_else(|| too_long(len_bytes))?;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice disturbs nothing.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            wide,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(failed("reserve address space for", 0, wide));
    }
    let start = start as usize;
    let base = (start + slack - 1) & !(slack - 1);
    // SAFETY: head and tail are parts of the mapping made above that nobody has seen yet.
    unsafe {
        if base > start {
            unmap(start, base - start)?;
        }
        if start + wide > base + len {
            unmap(base + len, start + wide - base - len)?;
        }
        dont_fork(base, len)?;
    }
    Ok(base)
}

/// Puts a range back to what [`reserve`] made of it: its memory is freed, any touch is a SIGSEGV.
///
/// # Safety
/// The range lies in a reservation of flea and nothing refers to its contents.
pub(super) unsafe fn reserve_fixed(address: usize, len: usize) -> Result<()> {
    // SAFETY: per this function's contract the range is flea's to replace.
    let got = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(failed("take memory back from", address, len));
    }
    // SAFETY: the same range.
    unsafe { dont_fork(address, len) }
}

/// Maps `len` bytes of `fd` from `offset_bytes` at exactly `address`, shared with everyone who maps that file.
///
/// # Safety
/// The range lies in a reservation of flea and nothing refers to its contents.
pub(super) unsafe fn map_shared_fixed(
    address: usize,
    len: usize,
    fd: BorrowedFd<'_>,
    offset_bytes: u64,
    protection: Protection,
) -> Result<()> {
    let offset = libc::off_t::try_from(offset_bytes).map_err(|_| too_long(offset_bytes))?;
    // SAFETY: per this function's contract the range is flea's to replace; the fd is open for the call.
    let got = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            protection.bits(),
            libc::MAP_SHARED | libc::MAP_FIXED,
            fd.as_raw_fd(),
            offset,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(failed("map shared memory at", address, len));
    }
    // SAFETY: the same range.
    unsafe { dont_fork(address, len) }
}

/// Changes what may be done with a range. Works across several mappings.
///
/// # Safety
/// The range lies in a reservation of flea; nobody holds a reference that the new protection would break.
pub(super) unsafe fn protect(address: usize, len: usize, protection: Protection) -> Result<()> {
    // SAFETY: per this function's contract.
    let rc = unsafe { libc::mprotect(address as *mut libc::c_void, len, protection.bits()) };
    if rc != 0 {
        return Err(failed("change the protection of", address, len));
    }
    Ok(())
}

/// Moves the pages of `from` to `to`, page tables only; `from` stays reserved and empty. The source must lie inside
/// one mapping (moves across two fail before Linux 6.17).
///
/// # Safety
/// Both ranges lie in reservations of flea, do not overlap, nothing refers to the contents of either, and no read of
/// the kernel into `from` is in flight.
pub(super) unsafe fn move_pages(from: usize, to: usize, len: usize) -> Result<()> {
    // SAFETY: per this function's contract.
    let got = unsafe {
        libc::mremap(
            from as *mut libc::c_void,
            len,
            len,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP,
            to as *mut libc::c_void,
        )
    };
    if got != libc::MAP_FAILED {
        return Ok(());
    }
    let error = failed("move a slot to", to, len);
    Err(match error.errno() {
        Some(libc::EINVAL) => Error::new(
            ErrorKind::Unsupported,
            format!(
                "{error} (from {from:#x}); MREMAP_DONTUNMAP needs Linux 5.7: use the shared backing on older kernels"
            ),
        ),
        _ => error,
    })
}

/// Gives a range back to the system.
///
/// # Safety
/// The range belongs to flea and nothing refers to it.
pub(super) unsafe fn unmap(address: usize, len: usize) -> Result<()> {
    // SAFETY: per this function's contract.
    if unsafe { libc::munmap(address as *mut libc::c_void, len) } != 0 {
        return Err(failed("unmap", address, len));
    }
    Ok(())
}

/// Children of fork do not get the range: a child's copy-on-write would take the pages that a read is aimed at.
///
/// # Safety
/// The range belongs to flea.
unsafe fn dont_fork(address: usize, len: usize) -> Result<()> {
    // SAFETY: advice only; per this function's contract on a range of flea.
    unsafe { advise(address, len, libc::MADV_DONTFORK, "keep from children") }
}

/// Asks for huge pages in a range. EINVAL (a kernel built without them) is not an error: page_report measures what came.
///
/// # Safety
/// The range belongs to flea.
pub(super) unsafe fn want_huge_pages(address: usize, len: usize, wanted: bool) -> Result<()> {
    let advice = if wanted {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    // SAFETY: advice only; per this function's contract on a range of flea.
    match unsafe { advise(address, len, advice, "choose the page size of") } {
        Err(error) if error.errno() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// madvise.
///
/// # Safety
/// The range belongs to flea and `advice` does not drop its contents.
unsafe fn advise(address: usize, len: usize, advice: libc::c_int, verb: &str) -> Result<()> {
    // SAFETY: per this function's contract.
    if unsafe { libc::madvise(address as *mut libc::c_void, len, advice) } != 0 {
        return Err(failed(verb, address, len));
    }
    Ok(())
}

/// 0 = not tried, 1 = the kernel knows MADV_POPULATE_WRITE, 2 = it does not.
static POPULATE_KNOWN: AtomicU8 = AtomicU8::new(0);

/// Gives every page of a writable range memory now, so that no read has to fault it in (a read into unpopulated memory runs at a tenth
/// of the speed). Before Linux 5.14 the pages are touched instead.
///
/// # Safety
/// The range belongs to flea, is mapped read-write, and nobody else writes to it.
pub(super) unsafe fn populate(address: usize, len: usize) -> Result<()> {
    if POPULATE_KNOWN.load(Ordering::Relaxed) != 2 {
        loop {
            // SAFETY: keeps contents; per this function's contract on a range of flea.
            match unsafe { advise(address, len, libc::MADV_POPULATE_WRITE, "populate") } {
                Ok(()) => {
                    POPULATE_KNOWN.store(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(error) => match error.errno() {
                    Some(libc::EINTR | libc::EAGAIN) => continue,
                    Some(libc::EINVAL) if POPULATE_KNOWN.load(Ordering::Relaxed) != 1 => break,
                    _ => return Err(error),
                },
            }
        }
        POPULATE_KNOWN.store(2, Ordering::Relaxed);
    }
    // SAFETY: per this function's contract.
    unsafe { touch(address, len) };
    Ok(())
}

/// Whether the kernel can populate: known after the first [`populate`].
pub(super) fn can_populate() -> bool {
    POPULATE_KNOWN.load(Ordering::Relaxed) != 2
}

/// As [`populate`], beside reads into the same range: a part that is not writable any more, because its bytes have been read and
/// published, is passed over. False when the kernel cannot (before Linux 5.14): touching would write over what was read.
///
/// # Safety
/// The range belongs to flea and stays mapped.
pub(super) unsafe fn populate_beside_reads(address: usize, len: usize) -> Result<bool> {
    // SAFETY: keeps contents; per this function's contract on a range of flea.
    match unsafe { advise(address, len, libc::MADV_POPULATE_WRITE, "populate") } {
        Ok(()) => Ok(true),
        Err(error) => match error.errno() {
            Some(libc::EINTR | libc::EAGAIN | libc::EFAULT) => Ok(true),
            Some(libc::EINVAL) => Ok(can_populate()),
            _ => Err(error),
        },
    }
}

/// Writes one byte of every page back to itself.
///
/// # Safety
/// As for [`populate`].
unsafe fn touch(address: usize, len: usize) {
    for at in (address..address + len).step_by(PAGE_4K as usize) {
        let byte = at as *mut u8;
        // SAFETY: inside the mapped, writable range; volatile, so that the compiler keeps the write.
        unsafe { byte.write_volatile(byte.read_volatile()) };
    }
}

/// A memfd of `len_bytes` for the shared backing: close-on-exec, mode 0400, not yet sealed. `huge` asks for reserved 2 MiB pages.
pub(super) fn memfd(len_bytes: u64, huge: bool) -> Result<OwnedFd> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if huge {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    let mut raw = memfd_create(flags | MFD_NOEXEC_SEAL);
    if raw < 0 && errno() == libc::EINVAL {
        raw = memfd_create(flags);
    }
    if raw < 0 {
        return Err(Error::last_os(format!(
            "memfd_create for a pool of {}",
            HumanBytes(len_bytes)
        )));
    }
    // SAFETY: the call above returned a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    resize(&fd, len_bytes)?;
    Ok(fd)
}

fn memfd_create(flags: libc::c_uint) -> libc::c_int {
    // SAFETY: the name is a C string literal; the call has no other precondition.
    unsafe { libc::memfd_create(c"flea-pool".as_ptr(), flags) }
}

/// A nameless file on a tmpfs, of mode 0400.
pub(super) fn nameless_file(directory: &str, len_bytes: u64) -> Result<OwnedFd> {
    let path = CString::new(directory)
        .map_err(|_| Error::new(ErrorKind::Invalid, format!("mount point {directory:?}")))?;
    // SAFETY: the path is a C string that lives over the call.
    let raw = unsafe {
        libc::open(
            path.as_ptr(),
            libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC,
            0o400,
        )
    };
    if raw < 0 {
        return Err(Error::last_os(format!(
            "open a nameless file in {directory}"
        )));
    }
    // SAFETY: the call above returned a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // Pages beyond the mount's size would be a SIGBUS, or EFAULT when populated: neither says what is wrong.
    let free_bytes = free_bytes_of(&fd)?;
    if free_bytes < len_bytes {
        return Err(Error::new(
            ErrorKind::NoMemory,
            format!(
                "{} are free in {directory}, {} are needed: mount it with a larger size=",
                HumanBytes(free_bytes),
                HumanBytes(len_bytes)
            ),
        ));
    }
    resize(&fd, len_bytes)?;
    Ok(fd)
}

fn free_bytes_of(fd: &OwnedFd) -> Result<u64> {
    let space = nix::sys::statvfs::fstatvfs(fd)
        .map_err(|code| Error::os(code as i32, "ask a tmpfs for its free space"))?;
    Ok(space
        .fragment_size()
        .saturating_mul(space.blocks_available()))
}

fn resize(fd: &OwnedFd, len_bytes: u64) -> Result<()> {
    let len = libc::off_t::try_from(len_bytes).map_err(|_| too_long(len_bytes))?;
    let what = || format!("size a shared pool to {}", HumanBytes(len_bytes));
    // SAFETY: plain calls on a descriptor that we own.
    unsafe {
        if libc::ftruncate(fd.as_raw_fd(), len) != 0 || libc::fchmod(fd.as_raw_fd(), 0o400) != 0 {
            return Err(Error::last_os(what()));
        }
    }
    Ok(())
}

/// Seals the size for ever. Not FUTURE_WRITE: the owner must be able to punch holes when its budget shrinks.
pub(super) fn seal_size(fd: &OwnedFd) -> Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a plain call on a descriptor that we own.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(Error::last_os("seal the size of the shared pool"));
    }
    Ok(())
}

/// True when the file behind `fd` can never become shorter.
pub(super) fn sealed_against_shrinking(fd: &OwnedFd) -> bool {
    // SAFETY: a plain call on a descriptor that we own.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Maps the first `len` bytes of `fd` anywhere, shared with whoever maps that file.
pub(super) fn map_words(fd: BorrowedFd<'_>, len: usize, writable: bool) -> Result<usize> {
    let protection = if writable {
        Protection::ReadWrite
    } else {
        Protection::Read
    };
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; the fd is open for the call.
    let got = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection.bits(),
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(failed("map shared words,", 0, len));
    }
    // SAFETY: the mapping made just now.
    unsafe { dont_fork(got as usize, len)? };
    Ok(got as usize)
}

/// Gives all memory of a file back to the system, also where other processes still map it: they see zeros.
pub(super) fn punch_whole(fd: BorrowedFd<'_>, len: usize) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain call on a descriptor that is open for the call.
    if unsafe { libc::fallocate(fd.as_raw_fd(), mode, 0, len as libc::off_t) } != 0 {
        return Err(Error::last_os(format!("give {len} bytes of a pool back")));
    }
    Ok(())
}

/// Bytes of memory that a file holds now.
pub(super) fn held_bytes(fd: BorrowedFd<'_>) -> u64 {
    // st_blocks counts units of 512 bytes on every filesystem.
    nix::sys::stat::fstat(fd).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

/// Opens the file behind `fd` again, for reading only: what a client may be given.
pub(super) fn reopen_read_only(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::fs::File::open(&link)
        .map(OwnedFd::from)
        .map_err(|error| Error::from_io(&error, format!("reopen {link} read-only")))
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A length for the kernel; only a 32-bit machine can refuse one.
pub(super) fn to_usize(len_bytes: u64) -> Result<usize> {
    let rounded = align_up(len_bytes, PAGE_4K).ok_or_else(|| too_long(len_bytes))?;
    usize::try_from(rounded).map_err(|_| too_long(len_bytes))
}

fn too_long(len_bytes: u64) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("a range of {len_bytes} bytes does not fit this machine's address space"),
    )
}

/// The error of the last call, with what is known to bring it about.
fn failed(verb: &str, address: usize, len: usize) -> Error {
    let what = format!("{verb} {len} bytes at {address:#x}");
    let code = errno();
    Error::os(code, what_and_remedy(&what, code))
}

fn what_and_remedy(what: &str, code: i32) -> String {
    match code {
        libc::ENOMEM => format!(
            "{what} (likely causes: more mappings than vm.max_map_count = {}; vm.overcommit_memory = {} with its limit reached; \
             `ulimit -v`; no memory left; see sysctl and ulimit)",
            sysctl("max_map_count"),
            sysctl("overcommit_memory"),
        ),
        libc::EAGAIN => format!("{what} (locked memory is over `ulimit -l`)"),
        libc::EFAULT => format!("{what} (not a range that can be written)"),
        _ => what.to_owned(),
    }
}

fn sysctl(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/vm/{name}"))
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_is_aligned_and_can_be_given_back() {
        let base = reserve(5 * PAGE_2M + PAGE_4K).unwrap();
        assert_eq!(base as u64 % PAGE_2M, 0);
        // SAFETY: our own reservation, with no other user.
        unsafe {
            protect(base, 1 << 20, Protection::ReadWrite).unwrap();
            populate(base, 1 << 20).unwrap();
            (base as *mut u8).write(7);
            reserve_fixed(base, 1 << 20).unwrap();
            unmap(base, 5 * PAGE_2M as usize + PAGE_4K as usize).unwrap();
        }
    }

    #[test]
    fn touching_keeps_what_is_there() {
        let base = reserve(PAGE_2M).unwrap();
        // SAFETY: our own reservation, with no other user.
        unsafe {
            protect(base, PAGE_2M as usize, Protection::ReadWrite).unwrap();
            ((base + 4096) as *mut u8).write(9);
            touch(base, PAGE_2M as usize);
            assert_eq!(((base + 4096) as *mut u8).read(), 9);
            unmap(base, PAGE_2M as usize).unwrap();
        }
    }

    #[test]
    fn errors_name_address_length_and_remedy() {
        let error = reserve(u64::MAX - (64 << 20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        assert!(error.to_string().contains("max_map_count"), "{error}");
        // SAFETY: the kernel refuses the range before it touches anything: it lies above user space.
        let error = unsafe { protect(usize::MAX & !0xfff, 4096, Protection::Read) }.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("4096 bytes at 0xfffffffffffff000"),
            "{error}"
        );
        assert!(reserve(u64::MAX).is_err());
    }

    #[test]
    fn a_moved_place_is_empty_and_its_pages_arrive() {
        let base = reserve(4 * PAGE_2M).unwrap();
        let len = PAGE_2M as usize;
        // SAFETY: our own reservation, with no other user.
        unsafe {
            protect(base, len, Protection::ReadWrite).unwrap();
            (base as *mut u8).write(42);
            protect(base, len, Protection::None).unwrap();
            move_pages(base, base + 2 * len, len).unwrap();
            protect(base + 2 * len, len, Protection::Read).unwrap();
            assert_eq!(((base + 2 * len) as *const u8).read(), 42);
            unmap(base, 4 * len).unwrap();
        }
    }
}
