//! What the kernel tells about a file's filesystem: its name, and what O_DIRECT is on it.
//!
//! Nothing is inferred by trying: small misaligned reads sometimes succeed where larger ones fail.
//! Place: part of `file` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::statfs;
use nix::sys::statvfs::fstatvfs;

/// What statx says about O_DIRECT.
pub(super) enum Stated {
    /// Works with this alignment of memory and offset.
    Aligned(u64),
    /// Does not work on this file.
    No,
    /// The kernel (before 6.1) or the filesystem does not say.
    Unknown,
}

pub(super) fn direct_alignment(file: &File) -> Stated {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is an empty C string as AT_EMPTY_PATH wants it, and `answer` is a
    // statx-sized place that outlives the call.
    let status = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    if status != 0 {
        return Stated::Unknown;
    }
    // SAFETY: zeroed is a valid statx (integers only), and the kernel filled it.
    let answer = unsafe { answer.assume_init() };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Stated::Unknown;
    }
    match answer.stx_dio_mem_align.max(answer.stx_dio_offset_align) {
        0 => Stated::No,
        align => Stated::Aligned(u64::from(align)),
    }
}

/// Name of FUSE here.
pub(super) const FUSE: &str = "fuse";

/// What a file lies on.
pub(super) struct Filesystem {
    /// Its name for people.
    pub(super) name: &'static str,
    /// What tells it from every other one of its kind, where it says that: `f_fsid`, made of its UUID as a rule.
    pub(super) id: Option<u64>,
    /// Whether its files are memory already.
    pub(super) in_memory: bool,
}

impl Filesystem {
    pub(super) fn of(file: &File) -> Self {
        let Ok(answer) = statfs::fstatfs(file) else {
            return Self {
                name: "this filesystem",
                id: None,
                in_memory: false,
            };
        };
        let name = match answer.filesystem_type() {
            statfs::EXT4_SUPER_MAGIC => "ext4",
            statfs::XFS_SUPER_MAGIC => "xfs",
            statfs::BTRFS_SUPER_MAGIC => "btrfs",
            statfs::F2FS_SUPER_MAGIC => "f2fs",
            statfs::OVERLAYFS_SUPER_MAGIC => "overlayfs",
            statfs::TMPFS_MAGIC => "tmpfs",
            statfs::HUGETLBFS_MAGIC => "hugetlbfs",
            statfs::FUSE_SUPER_MAGIC => FUSE,
            statfs::NFS_SUPER_MAGIC => "nfs",
            statfs::SMB_SUPER_MAGIC => "smb",
            statfs::PROC_SUPER_MAGIC => "procfs",
            statfs::SYSFS_MAGIC => "sysfs",
            // Not in nix: ramfs, zfs, squashfs, cifs.
            statfs::FsType(0x8584_58f6) => "ramfs",
            statfs::FsType(0x2fc1_2fc1) => "zfs",
            statfs::FsType(0x7371_7368) => "squashfs",
            statfs::FsType(0xff53_4d42) => "cifs",
            _ => "this filesystem",
        };
        Self {
            name,
            id: identity(file, name),
            in_memory: matches!(name, "tmpfs" | "ramfs" | "hugetlbfs"),
        }
    }
}

fn identity(file: &File, name: &str) -> Option<u64> {
    let id = fstatvfs(file).ok()?.filesystem_id() as u64;
    // btrfs mixes the number of the subvolume into the upper half; all of them lie on the same drives.
    let id = if name == "btrfs" {
        id & u64::from(u32::MAX)
    } else {
        id
    };
    (id != 0).then_some(id)
}
