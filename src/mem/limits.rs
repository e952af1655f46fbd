//! How much memory there is, and how much this process holds.
//!
//! Free memory is the least of what the machine and every memory cgroup above us (v1 and v2) still give. Held memory is
//! what a budget pays for: anonymous, shared and huge pages, not file pages that the kernel takes back at will. Pages
//! of MFD_HUGETLB are charged to no memory cgroup and count here all the same. The parsers are pure functions on text.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: what the budget is drawn from.

use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The least that is left to the rest of the machine when flea chooses for itself.
pub const MARGIN_MIN_BYTES: u64 = 256 * MIB;
/// The share left to the rest of the machine when flea chooses for itself, in percent.
pub const MARGIN_PERCENT: u64 = 3;

/// What may still be allocated, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeMemory {
    /// Bytes that can be had without the OOM killer.
    pub bytes: u64,
    /// The limit that sets it: `MemAvailable`, or the path of a cgroup.
    pub set_by: String,
}

/// The least of MemAvailable and what is free under every memory cgroup above this process. No margin is taken off.
///
/// # Errors
/// `Io` when /proc cannot be read.
pub fn free_memory() -> Result<FreeMemory> {
    let text = read("/proc/meminfo")?;
    let available = meminfo_bytes(&text, "MemAvailable")
        .or_else(|| meminfo_bytes(&text, "MemFree"))
        .ok_or_else(|| Error::new(ErrorKind::Io, "/proc/meminfo has no MemAvailable"))?;
    let mut least = FreeMemory {
        bytes: available,
        set_by: "MemAvailable".to_owned(),
    };
    for (directory, bytes) in cgroup_free() {
        if bytes < least.bytes {
            least = FreeMemory {
                bytes,
                set_by: directory.display().to_string(),
            };
        }
    }
    Ok(least)
}

/// What flea takes when nobody says how much: [`free_memory`] less max(256 MiB, 3 %).
///
/// # Errors
/// As [`free_memory`].
pub fn available_memory_bytes() -> Result<u64> {
    free_memory().map(|free| less_margin(free.bytes))
}

/// `free_bytes` less max(256 MiB, 3 %); 0 where that is more than there is.
#[must_use]
pub fn less_margin(free_bytes: u64) -> u64 {
    let share = free_bytes / 100 * MARGIN_PERCENT;
    free_bytes.saturating_sub(share.max(MARGIN_MIN_BYTES))
}

/// Refuses what would not fit, with the arithmetic.
///
/// # Errors
/// `Refused` when `need_bytes` is more than [`free_memory`].
pub fn check_free(need_bytes: u64, what: &str) -> Result<()> {
    let free = free_memory()?;
    if need_bytes <= free.bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{what} needs {need_bytes} bytes, but only {} are free (set by {}): {} too many; grant less memory",
            free.bytes,
            free.set_by,
            need_bytes - free.bytes
        ),
    ))
}

/// Memory this process holds now: anonymous + shared + huge pages. Pages mapped at several addresses count once.
///
/// # Errors
/// `Io` when /proc cannot be read.
pub fn process_memory_bytes() -> Result<u64> {
    let status = Status::parse(&read("/proc/self/status")?);
    let held = held_bytes(&status)?;
    SEEN_MAX_BYTES.fetch_max(held, Ordering::Relaxed);
    Ok(held)
}

/// The most memory this process has held: the larger of every [`process_memory_bytes`] so far and the kernel's own high-water mark
/// less the file pages and double counts of now.
///
/// # Errors
/// `Io` when /proc cannot be read.
pub fn peak_memory_bytes() -> Result<u64> {
    let status = Status::parse(&read("/proc/self/status")?);
    let held = held_bytes(&status)?;
    let counted_now = status.anonymous_bytes + status.shared_bytes + status.huge_bytes;
    let peak = status
        .peak_bytes
        .saturating_sub(status.file_bytes)
        .saturating_add(status.huge_bytes)
        .saturating_sub(counted_now.saturating_sub(held));
    let peak = peak.max(held);
    Ok(SEEN_MAX_BYTES.fetch_max(peak, Ordering::Relaxed).max(peak))
}

/// The most pages of any kind that were mapped into this process since the last [`forget_resident_peak`], file pages as
/// well: what `VmHWM` says. Not what it holds, see [`peak_memory_bytes`]; for comparing with mmap.
///
/// # Errors
/// `Io` when /proc cannot be read.
pub fn resident_peak_bytes() -> Result<u64> {
    Ok(Status::parse(&read("/proc/self/status")?).peak_bytes)
}

/// Sets the kernel's high-water mark to what is mapped now.
///
/// # Errors
/// `Io` when /proc cannot be written.
pub fn forget_resident_peak() -> Result<()> {
    let path = "/proc/self/clear_refs";
    std::fs::write(path, "5").map_err(|error| Error::from_io(&error, format!("write {path}")))
}

/// The largest figure that [`process_memory_bytes`] has returned.
static SEEN_MAX_BYTES: AtomicU64 = AtomicU64::new(0);

/// Anonymous memory as it is; shared and huge pages by walking the mappings, only if there are any.
fn held_bytes(status: &Status) -> Result<u64> {
    let mut held = status.anonymous_bytes;
    if status.shared_bytes > 0 {
        held += read("/proc/self/smaps_rollup")
            .ok()
            .and_then(|text| meminfo_bytes(&text, "Pss_Shmem"))
            .unwrap_or(status.shared_bytes);
    }
    if status.huge_bytes > 0 {
        held += unique_huge_bytes(&read("/proc/self/smaps")?).min(status.huge_bytes);
    }
    Ok(held)
}

/// The lines of /proc/self/status that count.
#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    anonymous_bytes: u64,
    shared_bytes: u64,
    file_bytes: u64,
    huge_bytes: u64,
    peak_bytes: u64,
}

impl Status {
    fn parse(text: &str) -> Self {
        let bytes = |name| meminfo_bytes(text, name).unwrap_or(0);
        Self {
            anonymous_bytes: bytes("RssAnon"),
            shared_bytes: bytes("RssShmem"),
            file_bytes: bytes("RssFile"),
            huge_bytes: bytes("HugetlbPages"),
            peak_bytes: bytes("VmHWM"),
        }
    }
}

/// `Name:   123 kB` out of meminfo, status or smaps_rollup.
pub(super) fn meminfo_bytes(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(kilobytes)
}

/// `   123 kB` as bytes.
pub(super) fn kilobytes(value: &str) -> Option<u64> {
    let number: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    number.checked_mul(1024)
}

/// Huge pages of /proc/self/smaps, a shared file's once: its largest mapping stands for it, because the pool maps the whole of its memfd
/// and the windows only parts.
fn unique_huge_bytes(smaps: &str) -> u64 {
    let mut private_bytes = 0;
    let mut shared: BTreeMap<&str, u64> = BTreeMap::new();
    let mut file = "";
    for line in smaps.lines() {
        if let Some(value) = line.strip_prefix("Shared_Hugetlb:") {
            count_largest(&mut shared, file, value);
        } else if let Some(value) = line.strip_prefix("Private_Hugetlb:") {
            // "Private" says that one process maps it: a memfd that nobody else maps is private in this sense.
            if file == "0" {
                private_bytes += kilobytes(value).unwrap_or(0);
            } else {
                count_largest(&mut shared, file, value);
            }
        } else if let Some((_, inode)) = mapping_header(line) {
            file = inode;
        }
    }
    private_bytes + shared.values().sum::<u64>()
}

fn count_largest<'a>(shared: &mut BTreeMap<&'a str, u64>, file: &'a str, value: &str) {
    let bytes = kilobytes(value).unwrap_or(0);
    let largest = shared.entry(file).or_default();
    *largest = bytes.max(*largest);
}

/// `7f00-7f10 rw-s 00000000 00:0f 1234  /memfd:x` as its addresses and inode; `None` for any other line of smaps.
pub(super) fn mapping_header(line: &str) -> Option<((usize, usize), &str)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let inode = words.nth(3)?;
    Some(((start, end), inode))
}

/// Which of the two cgroup interfaces a directory speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy per controller.
    V1,
    /// One hierarchy for all.
    V2,
}
use CgroupVersion as Version;

/// The cgroup directories that this process is in and that count memory, of both interfaces where a machine has both.
#[must_use]
pub fn own_memory_cgroups() -> Vec<(PathBuf, CgroupVersion)> {
    let (Ok(own), Ok(mounts)) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo")) else {
        return Vec::new();
    };
    [Version::V1, Version::V2]
        .into_iter()
        .filter_map(|version| {
            let directory = cgroup_directories(&own, &mounts, version)
                .into_iter()
                .next()?;
            // A v2 mount beside v1 hierarchies has no memory controller; the root of v2 has none of these files.
            let counter = match version {
                Version::V1 => "memory.usage_in_bytes",
                Version::V2 => "memory.current",
            };
            directory
                .join(counter)
                .exists()
                .then_some((directory, version))
        })
        .collect()
}

/// Every directory from our memory cgroup up to the root of its mount that sets a limit, with what is free under it.
fn cgroup_free() -> Vec<(PathBuf, u64)> {
    let (Ok(own), Ok(mounts)) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo")) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for version in [Version::V1, Version::V2] {
        for directory in cgroup_directories(&own, &mounts, version) {
            if let Some(bytes) = free_under(&directory, version) {
                found.push((directory, bytes));
            }
        }
    }
    found
}

/// The chain of cgroup directories, deepest first, as /proc/self/cgroup and /proc/self/mountinfo give it.
fn cgroup_directories(own: &str, mountinfo: &str, version: Version) -> Vec<PathBuf> {
    let Some(path) = own_cgroup(own, version) else {
        return Vec::new();
    };
    let Some((root, mount_point)) = cgroup_mount(mountinfo, version) else {
        return Vec::new();
    };
    // In a container the mount may begin below the path that /proc names (bind mount), or the path may lie outside it
    // (another namespace): then only the mount itself is known to be above us.
    let below = match path.strip_prefix(root.as_str()) {
        Some(rest) if root == "/" || rest.is_empty() || rest.starts_with('/') => rest,
        _ => "",
    };
    let top = PathBuf::from(mount_point);
    let mut directory = top.clone();
    for part in below.split('/').filter(|part| !part.is_empty()) {
        if part == ".." {
            return vec![top];
        }
        directory.push(part);
    }
    let mut chain = Vec::new();
    while directory != top {
        chain.push(directory.clone());
        if !directory.pop() {
            break;
        }
    }
    chain.push(top);
    chain
}

/// Our own path in the memory hierarchy: `4:memory:/a/b` (v1) or `0::/a/b` (v2).
fn own_cgroup(text: &str, version: Version) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let number = fields.next()?;
        let controllers = fields.next()?;
        let path = fields.next()?;
        let ours = match version {
            Version::V1 => controllers.split(',').any(|name| name == "memory"),
            Version::V2 => number == "0" && controllers.is_empty(),
        };
        ours.then(|| path.to_owned())
    })
}

/// Root and mount point of the memory hierarchy: fields 4 and 5 of mountinfo, with octal escapes undone.
fn cgroup_mount(mountinfo: &str, version: Version) -> Option<(String, String)> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.nth(1).unwrap_or("");
        let ours = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        ours.then(|| (unescape(root), unescape(point)))
    })
}

/// Undoes mountinfo's `\040` for a space and its like.
pub(super) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        if let Some(byte) = octal {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What is free under one cgroup; `None` where it sets no limit.
fn free_under(directory: &Path, version: Version) -> Option<u64> {
    let file = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
    let (limits, usage) = match version {
        Version::V1 => (["memory.limit_in_bytes", ""], "memory.usage_in_bytes"),
        Version::V2 => (["memory.max", "memory.high"], "memory.current"),
    };
    let limit_bytes = limits
        .iter()
        .filter(|name| !name.is_empty())
        .filter_map(|name| limit_of(&file(name)?))
        .min()?;
    let used_bytes = file(usage)?.trim().parse().ok()?;
    let reclaimable_bytes = file("memory.stat").map_or(0, |text| reclaimable(&text));
    Some(free_below_limit(limit_bytes, used_bytes, reclaimable_bytes))
}

/// The page cache of a full cgroup is given up before the OOM killer comes; what is over the limit is never negative.
fn free_below_limit(limit_bytes: u64, used_bytes: u64, reclaimable_bytes: u64) -> u64 {
    limit_bytes.saturating_sub(used_bytes.saturating_sub(reclaimable_bytes))
}

/// A limit; `None` for `max` and for v1's "no limit" (the largest multiple of the page size).
fn limit_of(text: &str) -> Option<u64> {
    let bytes: u64 = text.trim().parse().ok()?;
    (bytes < i64::MAX as u64 / 2).then_some(bytes)
}

/// File pages that reclaim can take, from memory.stat: both lists, as MemAvailable counts them, with everything below in v1
/// (`total_`; v2 counts the whole tree by itself). Shmem is on the anonymous lists, so it is not among them.
fn reclaimable(stat: &str) -> u64 {
    let field = |name: &str| {
        stat.lines().find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .trim()
                .parse::<u64>()
                .ok()
        })
    };
    ["inactive_file", "active_file"]
        .iter()
        .map(|name| {
            field(&format!("total_{name}"))
                .or_else(|| field(name))
                .unwrap_or(0)
        })
        .sum()
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| Error::from_io(&error, format!("read {path}")))
}

#[cfg(test)]
#[path = "limits_tests.rs"]
pub(super) mod tests;
