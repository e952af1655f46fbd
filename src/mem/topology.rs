//! NUMA: which node a drive hangs on, and how memory and threads get there.
//!
//! With feature `numa` nodes are found and bound through hwloc, without it (libflea.so) through /sys and system calls; the node of a
//! drive is read from /sys in both, because the file names a device number and nothing more. On a machine with one node binding is a no-op
//! that says so: nothing was lost. Memory is bound strictly, so it is only bound to a node that has it free: the kernel would answer a full
//! node with the OOM killer. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: where pool and reader are put.
#![allow(unsafe_code)]

use super::limits::meminfo_bytes;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HumanBytes;
use std::fs::{File, read_to_string};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// More nodes than any Linux has (CONFIG_NODES_SHIFT is 10 at most): a bound on what /sys is believed.
#[cfg(any(test, not(feature = "numa")))]
const NODES_MAX: u32 = 1024;
/// More CPUs than any Linux has.
#[cfg(any(test, not(feature = "numa")))]
const CPUS_MAX: u32 = 1 << 16;

/// A NUMA node with memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The kernel's number of it.
    pub index: u32,
    /// Its CPUs; empty for a node of memory only.
    pub cpus: Vec<u32>,
}

/// What came of binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// There is one node: nothing to bind, nothing lost.
    SingleNode,
    /// Bound to the node.
    Node(u32),
}

/// The NUMA nodes of this machine.
#[derive(Debug)]
pub struct Topology {
    nodes: Vec<Node>,
    sys: PathBuf,
    #[cfg(feature = "numa")]
    hwloc: hwlocality::Topology,
}

/// A node to put memory on.
#[derive(Debug, Clone)]
pub struct Binding {
    /// The machine.
    pub topology: Arc<Topology>,
    /// The kernel's number of the node.
    pub node_index: u32,
}

impl Binding {
    /// Binds a range without memory to the node, which must have `need_bytes` free.
    ///
    /// # Safety
    /// The range belongs to flea and is mapped.
    pub(super) unsafe fn bind_memory(
        &self,
        address: usize,
        len: usize,
        need_bytes: u64,
    ) -> Result<Bound> {
        // SAFETY: per this function's contract.
        unsafe {
            self.topology
                .bind_memory(self.node_index, address, len, need_bytes)
        }
    }
}

impl Topology {
    /// Finds the nodes.
    ///
    /// # Errors
    /// `Unsupported` when hwloc cannot read this machine (feature `numa`).
    pub fn detect() -> Result<Self> {
        #[cfg(feature = "numa")]
        {
            let hwloc = hwlocality::Topology::new()
                .map_err(|error| Error::new(ErrorKind::Unsupported, format!("hwloc: {error}")))?;
            Ok(Self {
                nodes: hwloc_nodes(&hwloc),
                sys: PathBuf::from("/sys"),
                hwloc,
            })
        }
        #[cfg(not(feature = "numa"))]
        Ok(Self {
            nodes: sysfs_nodes(Path::new("/sys")),
            sys: PathBuf::from("/sys"),
        })
    }

    /// How many nodes have memory; 1 on a machine that does not know NUMA.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.len().max(1)
    }

    /// The nodes with memory, in the kernel's order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The CPUs of a node, for pinning the threads that serve it.
    #[must_use]
    pub fn cpus_of(&self, node_index: u32) -> &[u32] {
        self.node(node_index).map_or(&[], |node| &node.cpus)
    }

    fn node(&self, node_index: u32) -> Option<&Node> {
        self.nodes.iter().find(|node| node.index == node_index)
    }

    /// The node that the drive under an open file hangs on; `None` when the machine does not say (virtual machines, network, overlay,
    /// a volume over drives of several nodes).
    ///
    /// # Errors
    /// `Io` when the file cannot be looked at.
    pub fn node_of_file(&self, file: &File) -> Result<Option<u32>> {
        let device = file
            .metadata()
            .map_err(|error| Error::from_io(&error, "fstat of a shard"))?
            .dev();
        Ok(node_of_device(
            &self.sys,
            libc::major(device),
            libc::minor(device),
        ))
    }

    /// Binds a range to a node.
    ///
    /// # Safety
    /// The range belongs to flea and is mapped.
    unsafe fn bind_memory(
        &self,
        node_index: u32,
        address: usize,
        len: usize,
        need_bytes: u64,
    ) -> Result<Bound> {
        let Some(node) = self.node(node_index) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("NUMA node {node_index} has no memory or does not exist"),
            ));
        };
        if self.node_count() == 1 {
            return Ok(Bound::SingleNode);
        }
        let path = self
            .sys
            .join(format!("devices/system/node/node{}/meminfo", node.index));
        let free_bytes = node_free(&read_to_string(path).unwrap_or_default());
        if free_bytes < need_bytes {
            return Err(Error::new(
                ErrorKind::NoMemory,
                format!(
                    "NUMA node {node_index} has {} free, {} are needed",
                    HumanBytes(free_bytes),
                    HumanBytes(need_bytes)
                ),
            ));
        }
        // SAFETY: per this function's contract.
        unsafe { self.bind_range(node_index, address, len)? };
        Ok(Bound::Node(node_index))
    }

    /// Binds a range, whatever the node has free.
    ///
    /// # Safety
    /// The range belongs to flea and is mapped.
    #[cfg(feature = "numa")]
    unsafe fn bind_range(&self, node_index: u32, address: usize, len: usize) -> Result<()> {
        use hwlocality::memory::binding::{MemoryBindingFlags, MemoryBindingPolicy};
        let failed = |what: String| {
            Error::new(
                ErrorKind::Unsupported,
                format!("bind memory to NUMA node {node_index}: {what}"),
            )
        };
        let node = self
            .hwloc
            .node_with_os_index(node_index as usize)
            .and_then(|object| object.nodeset())
            .ok_or_else(|| failed("hwloc does not know it".to_owned()))?;
        let start = address as *const std::mem::MaybeUninit<u8>;
        // SAFETY: mapped per this function's contract; hwloc takes the address and the length and reads nothing.
        let range = unsafe { std::slice::from_raw_parts(start, len) };
        self.hwloc
            .bind_memory_area(
                range,
                node,
                MemoryBindingPolicy::Bind,
                MemoryBindingFlags::STRICT,
            )
            .map_err(|error| failed(error.to_string()))
    }

    /// Binds a range, whatever the node has free.
    ///
    /// # Safety
    /// The range belongs to flea and is mapped.
    #[cfg(not(feature = "numa"))]
    unsafe fn bind_range(&self, node_index: u32, address: usize, len: usize) -> Result<()> {
        const WORD_BITS: u32 = libc::c_ulong::BITS;
        let mut mask = [0 as libc::c_ulong; (NODES_MAX / WORD_BITS) as usize];
        mask[(node_index / WORD_BITS) as usize] |= 1 << (node_index % WORD_BITS);
        // SAFETY: mbind changes the placement of pages to come, on a range of ours; the mask lives over the call. The
        // kernel reads one bit fewer than it is told (mbind(2), BUGS), hence the + 1.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                address,
                len,
                libc::MPOL_BIND,
                mask.as_ptr(),
                NODES_MAX + 1,
                0,
            )
        };
        if rc != 0 {
            return Err(Error::last_os(format!(
                "bind {len} bytes at {address:#x} to NUMA node {node_index}"
            )));
        }
        Ok(())
    }

    /// Keeps the calling thread on the CPUs of a node.
    ///
    /// # Errors
    /// `NotFound` for a node without CPUs, else what the system says.
    pub fn pin_thread(&self, node_index: u32) -> Result<Bound> {
        let cpus = self.cpus_of(node_index);
        if cpus.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("NUMA node {node_index} has no CPU to pin a thread to"),
            ));
        }
        if self.node_count() == 1 {
            return Ok(Bound::SingleNode);
        }
        self.pin_to(cpus)?;
        Ok(Bound::Node(node_index))
    }

    #[cfg(feature = "numa")]
    fn pin_to(&self, cpus: &[u32]) -> Result<()> {
        use hwlocality::cpu::{binding::CpuBindingFlags, cpuset::CpuSet};
        let mut set = CpuSet::new();
        for &cpu in cpus {
            set.set(cpu as usize);
        }
        self.hwloc
            .bind_cpu(&set, CpuBindingFlags::THREAD)
            .map_err(|error| {
                Error::new(
                    ErrorKind::Unsupported,
                    format!("pin a thread to CPUs {cpus:?}: {error}"),
                )
            })
    }

    #[cfg(not(feature = "numa"))]
    fn pin_to(&self, cpus: &[u32]) -> Result<()> {
        let mut words = vec![0 as libc::c_ulong; (CPUS_MAX / libc::c_ulong::BITS) as usize];
        for &cpu in cpus {
            words[(cpu / libc::c_ulong::BITS) as usize] |= 1 << (cpu % libc::c_ulong::BITS);
        }
        // SAFETY: the set is larger than the kernel's own and lives over the call; 0 is the calling thread.
        let rc = unsafe {
            libc::sched_setaffinity(0, std::mem::size_of_val(&words[..]), words.as_ptr().cast())
        };
        if rc != 0 {
            return Err(Error::last_os(format!("pin a thread to CPUs {cpus:?}")));
        }
        Ok(())
    }
}

#[cfg(feature = "numa")]
fn hwloc_nodes(hwloc: &hwlocality::Topology) -> Vec<Node> {
    use hwlocality::object::types::ObjectType;
    let mut nodes: Vec<Node> = hwloc
        .objects_with_type(ObjectType::NUMANode)
        .filter_map(|object| {
            let cpus = object.cpuset().map_or_else(Vec::new, |set| {
                set.iter_set().map(|cpu| usize::from(cpu) as u32).collect()
            });
            let index = u32::try_from(object.os_index()?).ok()?;
            Some(Node { index, cpus })
        })
        .collect();
    nodes.sort_unstable_by_key(|node| node.index);
    nodes
}

/// Nodes with memory, as /sys/devices/system/node tells; none where the kernel knows no NUMA.
#[cfg(any(test, not(feature = "numa")))]
fn sysfs_nodes(sys: &Path) -> Vec<Node> {
    let directory = sys.join("devices/system/node");
    let list = |name: &str, end: u32| {
        let text = read_to_string(directory.join(name)).ok()?;
        parse_list(&text, end)
    };
    let indexes = list("has_memory", NODES_MAX)
        .or_else(|| list("online", NODES_MAX))
        .unwrap_or_default();
    indexes
        .into_iter()
        .map(|index| Node {
            index,
            cpus: list(&format!("node{index}/cpulist"), CPUS_MAX).unwrap_or_default(),
        })
        .collect()
}

/// The kernel's lists: `0-3,8,10-11`. `None` for anything else, and for numbers not below `end`.
#[cfg(any(test, not(feature = "numa")))]
fn parse_list(text: &str, end: u32) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= end {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// What a node can give: free pages and those that reclaim takes first. Lines read `Node 1 MemFree:  123 kB`.
fn node_free(meminfo: &str) -> u64 {
    let text: String = meminfo
        .lines()
        .filter_map(|line| Some(line.strip_prefix("Node ")?.split_once(' ')?.1))
        .flat_map(|line| [line, "\n"])
        .collect();
    ["MemFree", "Active(file)", "Inactive(file)", "SReclaimable"]
        .iter()
        .filter_map(|name| meminfo_bytes(&text, name))
        .sum()
}

/// The node of a block device: the first device above it that names one. A volume (dm, md) is where all its parts are.
fn node_of_device(sys: &Path, major: u32, minor: u32) -> Option<u32> {
    let link = sys.join(format!("dev/block/{major}:{minor}"));
    node_of_directory(&link.canonicalize().ok()?, 0)
}

/// Volumes on volumes deeper than this are not followed.
const STACK_MAX: u32 = 8;

fn node_of_directory(device: &Path, depth: u32) -> Option<u32> {
    if depth > STACK_MAX {
        return None;
    }
    for directory in device.ancestors() {
        for name in ["numa_node", "device/numa_node"] {
            if let Some(node) = numa_node(&directory.join(name)) {
                return Some(node);
            }
        }
        // A drive with several paths (nvme-subsysN) has its controllers beside it; a volume lists its parts.
        let parts = match directory.file_name().and_then(|name| name.to_str()) {
            Some(name) if name.starts_with("nvme-subsys") => links(directory, "nvme"),
            _ => links(&directory.join("slaves"), ""),
        };
        if !parts.is_empty() {
            let mut nodes = parts.iter().map(|part| node_of_directory(part, depth + 1));
            let first = nodes.next()??;
            return nodes.all(|node| node == Some(first)).then_some(first);
        }
        if directory.file_name().is_some_and(|name| name == "devices") {
            break;
        }
    }
    None
}

/// -1 is the kernel's "unknown".
fn numa_node(path: &Path) -> Option<u32> {
    read_to_string(path).ok()?.trim().parse().ok()
}

/// Links of a directory whose names begin so, followed.
fn links(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()))
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .filter_map(|entry| entry.path().canonicalize().ok())
        .collect()
}

#[cfg(test)]
#[path = "topology_tests.rs"]
mod tests;
