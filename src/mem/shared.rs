//! The shared backing: one memfd that other processes can map read-only, and windows that alias it.
//!
//! The file holds the resident runs one after the other, then the slots. The pool maps it whole, read-write, for the
//! reader; the windows map each run read-only at the place of the plan, so layers that share a slot see the same pages. That costs no move and
//! gives no guard: a lease is a promise here. Its size is sealed (SHRINK, GROW, SEAL; not FUTURE_WRITE, which would forbid the owner
//! to punch holes). Huge pages are looked for in the order reserved, memfd, tmpfs.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the daemon's pool.
#![allow(unsafe_code)]

use super::fill::Fill;
use super::host::{self, Protection};
use super::limits::unescape;
use super::pool::{Geometry, PoolOptions, check_disjoint, find_resident};
use super::private::quarantined;
use super::report::{Fallback, PageProbe, PageSource, ProbeData};
use super::window::Windows;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{PageRun, Plan};
use crate::units::PAGE_2M;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Shared memory of a pool.
#[derive(Debug)]
pub(super) struct Shared {
    geometry: Geometry,
    resident: Vec<PageRun>,
    /// Page of the file where each resident run begins.
    resident_pages: Vec<u64>,
    /// Runs and their slots, sorted by run.
    ring: Vec<(PageRun, u32)>,
    slots: Vec<Slot>,
    /// Window places that alias the file.
    aliases: Vec<PageRun>,
    memory: Arc<Memory>,
    /// Last: the windows outlive what was mapped into them.
    windows: Arc<Windows>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    aimed: bool,
    quarantined: bool,
}

impl Shared {
    pub(super) fn new(
        windows: Arc<Windows>,
        plan: &Plan,
        options: &PoolOptions,
    ) -> Result<(Self, PageProbe)> {
        check_disjoint(plan)?;
        let ring = ring_of(plan)?;
        let slots_count = ring.iter().map(|&(_, slot)| slot + 1).max().unwrap_or(0);
        let geometry = Geometry {
            page_bytes: plan.page_bytes,
            slots_count,
            slot_pages: plan.slot_pages,
        };
        let mut resident_pages = Vec::with_capacity(plan.resident.len());
        let mut pages = 0;
        for run in &plan.resident {
            resident_pages.push(pages);
            pages += run.page_count;
        }
        for run in ring.iter().map(|(run, _)| run).chain(&plan.resident) {
            geometry.place(&windows, run)?;
        }
        let pool_bytes = pages * plan.page_bytes + geometry.ring_bytes();
        let (memory, source, fallbacks) = Memory::allocate(pool_bytes, plan.page_bytes, options)?;
        let probe = PageProbe {
            inner: Arc::new(ProbeData {
                ranges: vec![(memory.base, memory.len)],
                pool_bytes,
                wanted_bytes: plan.page_bytes,
                source,
                fallbacks,
            }),
        };
        let mut store = Self {
            geometry,
            resident: plan.resident.clone(),
            resident_pages,
            slots: vec![Slot::default(); slots_count as usize],
            aliases: Vec::with_capacity(plan.resident.len() + ring.len()),
            ring,
            memory: Arc::new(memory),
            windows,
        };
        store.alias_windows()?;
        Ok((store, probe))
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Maps every run of the plan into its window, read-only.
    fn alias_windows(&mut self) -> Result<()> {
        let runs: Vec<PageRun> = self
            .resident
            .iter()
            .chain(self.ring.iter().map(|(run, _)| run))
            .copied()
            .collect();
        for run in runs {
            let (address, len) = self.geometry.place(&self.windows, &run)?;
            let Some(offset_bytes) = self.file_offset_bytes(&run) else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{run:?} has no place in the pool"),
                ));
            };
            self.aliases.push(run);
            // SAFETY: a place in our windows that nothing else is mapped at (check_disjoint).
            unsafe {
                host::map_shared_fixed(
                    address,
                    len,
                    self.memory.fd.as_fd(),
                    offset_bytes,
                    Protection::Read,
                )?;
            }
        }
        Ok(())
    }

    /// The slot that serves exactly this run.
    fn slot_of(&self, run: &PageRun) -> Option<u32> {
        let index = self.ring.binary_search_by(|(have, _)| have.cmp(run)).ok()?;
        Some(self.ring[index].1)
    }

    pub(super) fn file_offset_bytes(&self, run: &PageRun) -> Option<u64> {
        let page = match find_resident(&self.resident, run) {
            Some((index, skip)) => self.resident_pages[index] + skip,
            None => self.slot_page(self.slot_of(run)?),
        };
        Some(page * self.geometry.page_bytes)
    }

    pub(super) fn aim(&mut self, slot: u32, run: &PageRun) -> Result<*mut u8> {
        match self.slot_of(run) {
            Some(own) if own == slot => self.aim_away(slot, run),
            other => Err(Error::new(
                ErrorKind::Invalid,
                format!("{run:?} is served by slot {other:?} of the plan, not by slot {slot}"),
            )),
        }
    }

    /// Where a run of the ring goes in any slot. Our own windows show it in the slot of the plan only.
    pub(super) fn aim_away(&mut self, slot: u32, run: &PageRun) -> Result<*mut u8> {
        let known = self.slot_of(run).is_some();
        let state = match self.slots.get_mut(slot as usize) {
            Some(state) if known => state,
            _ => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{run:?} is not a run for slot {slot} of the plan"),
                ));
            }
        };
        if state.quarantined {
            return Err(quarantined(slot));
        }
        state.aimed = true;
        let offset = self.geometry.bytes(self.slot_page(slot));
        Ok((self.memory.base + offset) as *mut u8)
    }

    /// Page of the file where a slot begins: behind the resident ones.
    fn slot_page(&self, slot: u32) -> u64 {
        let resident: u64 = self.resident.iter().map(|run| run.page_count).sum();
        resident + u64::from(slot) * self.geometry.slot_pages
    }

    pub(super) fn ring_offset_bytes(&self) -> u64 {
        self.slot_page(0) * self.geometry.page_bytes
    }

    pub(super) fn publish(&mut self, slot: u32) -> Result<()> {
        match self.slots.get(slot as usize) {
            Some(state) if state.aimed && !state.quarantined => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!("slot {slot} is not aimed: nothing to publish"),
            )),
        }
    }

    pub(super) fn resident_target(&self, run: &PageRun) -> *mut u8 {
        find_resident(&self.resident, run).map_or(std::ptr::null_mut(), |(index, skip)| {
            let page = self.resident_pages[index] + skip;
            (self.memory.base + self.geometry.bytes(page)) as *mut u8
        })
    }

    pub(super) fn quarantine(&mut self, slot: u32) {
        if let Some(state) = self.slots.get_mut(slot as usize) {
            state.quarantined = true;
            self.memory.keep();
        }
    }

    pub(super) fn quarantine_resident(&mut self) {
        self.memory.keep();
    }

    pub(super) fn read_only_fd(&self) -> Result<OwnedFd> {
        host::reopen_read_only(self.memory.fd.as_fd())
    }

    pub(super) fn held_bytes(&self) -> u64 {
        host::held_bytes(self.memory.fd.as_fd())
    }

    /// The memory, which lives as long as whoever copies out of it.
    #[cfg(feature = "cuda")]
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for run in &self.aliases {
            let Ok((address, len)) = self.geometry.place(&self.windows, run) else {
                continue;
            };
            // SAFETY: an alias that nobody leases any more (the caller's part). The reader writes through the pool's own mapping.
            if let Err(error) = unsafe { host::reserve_fixed(address, len) } {
                log::error!("window alias not given back: {error}");
            }
        }
    }
}

/// The runs of the plan and the slots it gives them, sorted by run.
fn ring_of(plan: &Plan) -> Result<Vec<(PageRun, u32)>> {
    let mut ring = Vec::with_capacity(plan.layers.len());
    for (index, layer) in plan.layers.iter().enumerate() {
        let Some(run) = layer.transient else { continue };
        match layer.slot_index {
            Some(slot)
                if slot < plan.slots_count && (1..=plan.slot_pages).contains(&run.page_count) =>
            {
                ring.push((run, slot));
            }
            other => {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!(
                        "layer {index}: slot {other:?} of {} does not take {} pages of {}",
                        plan.slots_count, run.page_count, plan.slot_pages
                    ),
                ));
            }
        }
    }
    ring.sort_unstable();
    Ok(ring)
}

/// The memfd and the pool's own mapping of it.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) base: usize,
    pub(super) len: usize,
    /// The kernel may still write into it.
    kept: AtomicBool,
    fd: OwnedFd,
}

impl Memory {
    fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// The best pages there are: each source is tried until one gives all of the memory.
    fn allocate(
        len_bytes: u64,
        page_bytes: u64,
        options: &PoolOptions,
    ) -> Result<(Self, PageSource, Vec<Fallback>)> {
        let mut reasons = Vec::new();
        for source in sources(page_bytes) {
            let last = source == PageSource::Memfd;
            match Self::from_source(&source, len_bytes, page_bytes, options) {
                Ok((memory, mut fallbacks)) => {
                    if last && page_bytes >= PAGE_2M {
                        reasons.extend(why_no_thp());
                        let reason = reasons.join("; ");
                        fallbacks.push(Fallback::SmallPages { reason });
                    }
                    return Ok((memory, source, fallbacks));
                }
                // Huge pages that are not there are the next source's chance; what the whole pool lacks, or a wish to stop, is not.
                Err(error) if last || error.kind() == ErrorKind::Canceled => return Err(error),
                Err(error)
                    if source == PageSource::Hugetlb && error.kind() == ErrorKind::NoMemory =>
                {
                    reasons.push(format!("{source}: too few are free (vm.nr_hugepages)"));
                }
                Err(error) => reasons.push(format!("{source}: {error}")),
            }
        }
        Err(Error::new(
            ErrorKind::Internal,
            "no source of shared memory",
        ))
    }

    fn from_source(
        source: &PageSource,
        len_bytes: u64,
        page_bytes: u64,
        options: &PoolOptions,
    ) -> Result<(Self, Vec<Fallback>)> {
        // An empty pool (nothing resident, nothing transient) still has a file to hand out.
        let len_bytes = len_bytes.max(page_bytes);
        let hugetlb = *source == PageSource::Hugetlb;
        let mut fill = Fill::begin(
            len_bytes,
            page_bytes,
            !hugetlb,
            options.binding.as_ref(),
            options.cancel.as_deref(),
        )?;
        let fd = match source {
            PageSource::Tmpfs(point) => host::nameless_file(point, len_bytes)?,
            _ => host::memfd(len_bytes, hugetlb)?,
        };
        let memory = Self {
            base: host::reserve(len_bytes)?,
            len: host::to_usize(len_bytes)?,
            kept: AtomicBool::new(false),
            fd,
        };
        // SAFETY: reserved just now; nobody else knows the range.
        unsafe {
            host::map_shared_fixed(
                memory.base,
                memory.len,
                memory.fd.as_fd(),
                0,
                Protection::ReadWrite,
            )?;
            fill.range(memory.base, memory.len, !hugetlb)?;
        }
        if !matches!(source, PageSource::Tmpfs(_)) {
            host::seal_size(&memory.fd)?;
        }
        Ok((memory, fill.fallbacks))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: our own mapping; no slot is quarantined, so nobody writes here any more.
        if let Err(error) = unsafe { host::unmap(self.base, self.len) } {
            log::error!("shared pool not given back: {error}");
        }
        // A client that still maps the file would keep its memory alive: its leases are back, so it has no use for it.
        if let Err(error) = host::punch_whole(self.fd.as_fd(), self.len) {
            log::error!("shared pool: {error}");
        }
    }
}

/// Where to look for pages, best first; always ends with a plain memfd.
fn sources(page_bytes: u64) -> Vec<PageSource> {
    let mut sources = Vec::new();
    if page_bytes >= PAGE_2M {
        sources.push(PageSource::Hugetlb);
        if shmem_thp(
            &setting("shmem_enabled"),
            &setting("hugepages-2048kB/shmem_enabled"),
        ) {
            sources.push(PageSource::MemfdHuge);
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        sources.extend(huge_tmpfs(&mounts).into_iter().map(PageSource::Tmpfs));
    }
    sources.push(PageSource::Memfd);
    sources
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

fn setting(name: &str) -> String {
    std::fs::read_to_string(format!("{THP}/{name}")).unwrap_or_default()
}

fn why_no_thp() -> Option<String> {
    let on = shmem_thp(
        &setting("shmem_enabled"),
        &setting("hugepages-2048kB/shmem_enabled"),
    );
    (!on).then(|| format!("{THP}/shmem_enabled gives a memfd none (advise would)"))
}

/// True when a memfd can have transparent huge pages. Since Linux 6.10 each size has a switch of its own, which may inherit the general one.
fn shmem_thp(general: &str, of_this_size: &str) -> bool {
    let chosen = |text: &str| {
        let word = text
            .split('[')
            .nth(1)
            .and_then(|rest| rest.split(']').next());
        word.map(str::to_owned)
    };
    let gives = |word: Option<String>| {
        matches!(
            word.as_deref(),
            Some("always" | "within_size" | "advise" | "force")
        )
    };
    match chosen(of_this_size).as_deref() {
        None | Some("inherit") => gives(chosen(general)),
        _ => gives(chosen(of_this_size)),
    }
}

/// Writable tmpfs mounts that give huge pages, as /proc/self/mountinfo tells.
fn huge_tmpfs(mountinfo: &str) -> Vec<String> {
    let point = |line: &str| {
        let (left, right) = line.split_once(" - tmpfs ")?;
        let mut left = left.split(' ').skip(4);
        let (point, own_options) = (left.next()?, left.next()?);
        let options = right.split(' ').nth(1)?;
        let huge = options
            .split(',')
            .any(|option| matches!(option, "huge=always" | "huge=within_size" | "huge=advise"));
        let writable = [own_options, options]
            .iter()
            .all(|list| list.split(',').next() != Some("ro"));
        (huge && writable).then(|| unescape(point))
    };
    mountinfo.lines().filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switches_of_shmem_huge_pages() {
        let never = "always within_size advise [never] deny force\n";
        let advise = "always within_size [advise] never deny force\n";
        let inherit = "always [inherit] within_size advise never\n";
        assert!(!shmem_thp(never, inherit));
        assert!(shmem_thp(advise, inherit));
        assert!(shmem_thp(advise, ""), "before Linux 6.10");
        assert!(!shmem_thp(
            advise,
            "always inherit within_size advise [never]"
        ));
        assert!(shmem_thp(
            never,
            "[always] inherit within_size advise never"
        ));
        assert!(!shmem_thp("", ""));
    }

    #[test]
    fn only_writable_huge_tmpfs_mounts_count() {
        let mounts = "\
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684096k
26 24 0:24 / /mnt/a\\040b rw,relatime shared:3 - tmpfs tmpfs rw,huge=always
27 24 0:25 / /mnt/ro ro,relatime - tmpfs tmpfs rw,huge=always
28 24 0:26 / /mnt/rosuper rw,relatime - tmpfs tmpfs ro,huge=always
29 24 0:27 / /mnt/never rw - tmpfs tmpfs rw,huge=never
30 24 0:28 / /huge rw - hugetlbfs none rw,pagesize=2M
";
        assert_eq!(huge_tmpfs(mounts), ["/mnt/a b"]);
    }
}
