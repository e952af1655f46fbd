//! The pool: all memory that weights may take, allocated once when the plan is made.
//!
//! It holds exactly what the plan says: the resident pages and the slots. A slot is *aimed* at a run of pages, filled by
//! the reader, *published*, and aimed elsewhere when its lease is back. The pool belongs to one thread (the engine's);
//! it allocates nothing and takes no lock after it is made. The caller's part: no aim while a read into that slot is in
//! flight or a lease on its layer is out. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

use super::private::Private;
use super::report::{PageProbe, PageReport};
use super::shared::Shared;
use super::topology::Binding;
use super::window::Windows;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{PageRun, Plan};
use crate::units::{PAGE_2M, PAGE_4K};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Where a pool's memory lies and how a slot serves the next layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Backing {
    /// Anonymous memory; a slot's pages are moved to the layer's place. The MMU guards every lease.
    #[default]
    Private,
    /// A memfd that other processes can map; layers that share a slot alias it.
    Shared,
}

/// How to make a pool.
#[derive(Debug, Clone, Default)]
pub struct PoolOptions {
    /// The NUMA node to take the memory from; `None` = anywhere.
    pub binding: Option<Binding>,
    /// Set by another thread to give up while the memory is being allocated.
    pub cancel: Option<Arc<AtomicBool>>,
    /// Private backing: give pages their memory while the first pass reads, instead of all of it first. What runs out then is
    /// told by [`Pool::check_filled`].
    pub fill_behind: bool,
}

/// All memory for weights of one model.
#[derive(Debug)]
pub struct Pool {
    store: Store,
    probe: PageProbe,
    geometry: Geometry,
    #[cfg(feature = "faults")]
    poison: bool,
}

#[derive(Debug)]
enum Store {
    Private(Private),
    Shared(Shared),
}

/// The figures of a plan that both backings need.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub(super) page_bytes: u64,
    pub(super) slots_count: u32,
    pub(super) slot_pages: u64,
}

impl Geometry {
    /// Bytes of `pages`; bounded by the windows that the run was checked against.
    pub(super) fn bytes(&self, pages: u64) -> usize {
        (pages * self.page_bytes) as usize
    }

    /// A run's address in its window and its length in bytes.
    pub(super) fn place(&self, windows: &Windows, run: &PageRun) -> Result<(usize, usize)> {
        let bytes = |pages: u64| pages.checked_mul(self.page_bytes);
        let (Some(offset), Some(len)) = (bytes(run.first_page), bytes(run.page_count)) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{run:?} passes the end of every file"),
            ));
        };
        Ok((windows.place(run.shard_index, offset, len)?, len as usize))
    }

    pub(super) fn ring_bytes(&self) -> u64 {
        u64::from(self.slots_count) * self.slot_pages * self.page_bytes
    }
}

impl Pool {
    /// Allocates, binds and populates everything the plan wants.
    ///
    /// # Errors
    /// `Refused` when that much memory is not free, `NoMemory` when it ran out on the way, `Canceled`, `Invalid` for a plan that does not
    /// fit the windows. Nothing stays allocated.
    pub fn new(
        windows: Arc<Windows>,
        plan: &Plan,
        backing: Backing,
        options: &PoolOptions,
    ) -> Result<Self> {
        if plan.page_bytes != PAGE_2M && plan.page_bytes != PAGE_4K {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "pages of {} bytes; 4096 and 2097152 are possible",
                    plan.page_bytes
                ),
            ));
        }
        let (store, probe, geometry) = match backing {
            Backing::Private => {
                let (store, probe) = Private::new(windows, plan, options)?;
                let geometry = store.geometry();
                (Store::Private(store), probe, geometry)
            }
            Backing::Shared if plan.experts.is_some() => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "experts are fetched one by one in the private backing only",
                ));
            }
            Backing::Shared => {
                let (store, probe) = Shared::new(windows, plan, options)?;
                let geometry = store.geometry();
                (Store::Shared(store), probe, geometry)
            }
        };
        Ok(Self {
            store,
            probe,
            geometry,
            #[cfg(feature = "faults")]
            poison: std::env::var("FLEA_FAULT").is_ok_and(|text| text.contains("poison")),
        })
    }

    /// The backing it was made with.
    #[must_use]
    pub fn backing(&self) -> Backing {
        match self.store {
            Store::Private(_) => Backing::Private,
            Store::Shared(_) => Backing::Shared,
        }
    }

    /// Slots that exist: the plan's, or in the shared backing those its ring uses.
    #[must_use]
    pub fn slots_count(&self) -> u32 {
        self.geometry.slots_count
    }

    /// Makes a slot serve a run: from now on its window pages are the slot's, writable for the reader and not yet to be read. Returns
    /// where the reader writes. What the slot served before can no longer be touched (private backing).
    ///
    /// The caller sees to it that no read into the slot is in flight and no lease on what it served is out.
    ///
    /// # Errors
    /// `Invalid` when the run is not one for this slot, `Io` when the slot or the place is quarantined, `NoMemory` when the kernel has no
    /// mapping left; the slot can be aimed again.
    pub fn aim(&mut self, slot: u32, run: &PageRun) -> Result<*mut u8> {
        let target = match &mut self.store {
            Store::Private(store) => store.aim(slot, run)?,
            Store::Shared(store) => store.aim(slot, run)?,
        };
        self.poison(target, run);
        Ok(target)
    }

    /// With faults: what is read before it has come is not what was there before.
    fn poison(&self, _target: *mut u8, _run: &PageRun) {
        #[cfg(feature = "faults")]
        if self.poison {
            // SAFETY: aim returned the run's writable bytes, which nobody may read before publish.
            unsafe { std::ptr::write_bytes(_target, 0xA5, self.geometry.bytes(_run.page_count)) };
        }
    }

    /// [`Pool::aim`] for a run of another slot of the shared backing. Only who maps the pool's file at
    /// [`Pool::ring_offset_bytes`] sees it there; the windows of this process show the slot of the plan.
    ///
    /// # Errors
    /// Those of [`Pool::aim`]; `Unsupported` in the private backing, where every slot serves every run.
    pub fn aim_away(&mut self, slot: u32, run: &PageRun) -> Result<*mut u8> {
        let target = match &mut self.store {
            Store::Private(_) => {
                let context = "the private backing has no slots of a run's own";
                return Err(Error::new(ErrorKind::Unsupported, context));
            }
            Store::Shared(store) => store.aim_away(slot, run)?,
        };
        self.poison(target, run);
        Ok(target)
    }

    /// All bytes of the slot are in: its window pages become readable, and only that.
    ///
    /// # Errors
    /// `Invalid` for a slot that is not aimed.
    pub fn publish(&mut self, slot: u32) -> Result<()> {
        match &mut self.store {
            Store::Private(store) => store.publish(slot),
            Store::Shared(store) => store.publish(slot),
        }
    }

    /// To be asked before a read into a pool that is filled behind.
    ///
    /// # Errors
    /// `NoMemory` when there was none left for the rest of it.
    pub fn check_filled(&self) -> Result<()> {
        match &self.store {
            Store::Private(store) => store.check_filled(),
            Store::Shared(_) => Ok(()),
        }
    }

    /// Where the reader writes a resident run (or a part of one); null when the run is not resident.
    #[must_use]
    pub fn resident_target(&self, run: &PageRun) -> *mut u8 {
        match &self.store {
            Store::Private(store) => store.resident_target(run),
            Store::Shared(store) => store.resident_target(run),
        }
    }

    /// All bytes of a resident run (or of a part of one) are in: its pages become readable, and only that.
    ///
    /// # Errors
    /// `Invalid` for a run that is not resident, else what mprotect says.
    pub fn publish_resident(&mut self, run: &PageRun) -> Result<()> {
        match &mut self.store {
            Store::Private(store) => store.publish_resident(run),
            Store::Shared(_) => Ok(()),
        }
    }

    /// Gives a slot up for ever, because the kernel may still write into it: never aimed, reused or freed, not even when the pool is
    /// dropped. Its place stays readable, for a host that holds a lease on the part that had arrived.
    pub fn quarantine(&mut self, slot: u32) {
        match &mut self.store {
            Store::Private(store) => store.quarantine(slot),
            Store::Shared(store) => store.quarantine(slot),
        }
    }

    /// The same for the resident pages: a read into them was never given back.
    pub fn quarantine_resident(&mut self) {
        match &mut self.store {
            Store::Private(store) => store.quarantine_resident(),
            Store::Shared(store) => store.quarantine_resident(),
        }
    }

    /// The page size and share of huge pages, measured now.
    ///
    /// # Errors
    /// `Io` when /proc/self/smaps cannot be read.
    pub fn page_report(&self) -> Result<PageReport> {
        self.probe.report()
    }

    /// Measures this pool from other threads. Its answer means nothing once the pool is dropped.
    #[must_use]
    pub fn probe(&self) -> PageProbe {
        self.probe.clone()
    }

    /// The pool's file, opened anew for reading only: for a client's own mapping.
    ///
    /// # Errors
    /// `Unsupported` in the private backing, whose memory nobody else can see.
    pub fn read_only_fd(&self) -> Result<OwnedFd> {
        match &self.store {
            Store::Private(_) => Err(Error::new(
                ErrorKind::Unsupported,
                "the private backing has no file to hand out; open the pool with the shared backing",
            )),
            Store::Shared(store) => store.read_only_fd(),
        }
    }

    /// Bytes of memory that the pool's file holds now, as the kernel counts; 0 in the private backing.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        match &self.store {
            Store::Private(_) => 0,
            Store::Shared(store) => store.held_bytes(),
        }
    }

    /// The memory that other devices may copy out of; `None` in the private backing, whose pages move.
    #[cfg(feature = "cuda")]
    pub(super) fn shared_memory(&self) -> Option<&Arc<super::shared::Memory>> {
        match &self.store {
            Store::Private(_) => None,
            Store::Shared(store) => Some(store.memory()),
        }
    }

    /// Where slot 0 begins in the pool's file; each slot is as long as the plan says. 0 in the private backing.
    #[must_use]
    pub fn ring_offset_bytes(&self) -> u64 {
        match &self.store {
            Store::Private(_) => 0,
            Store::Shared(store) => store.ring_offset_bytes(),
        }
    }

    /// Where a client finds a resident run or a slot's run in [`Pool::read_only_fd`]: its file offset.
    #[must_use]
    pub fn file_offset_bytes(&self, run: &PageRun) -> Option<u64> {
        match &self.store {
            Store::Private(_) => None,
            Store::Shared(store) => store.file_offset_bytes(run),
        }
    }
}

/// The resident run that holds all of `run`, and how many pages into it `run` begins. `resident` is sorted and disjoint.
pub(super) fn find_resident(resident: &[PageRun], run: &PageRun) -> Option<(usize, u64)> {
    let after = resident.partition_point(|have| {
        (have.shard_index, have.first_page) <= (run.shard_index, run.first_page)
    });
    let index = after.checked_sub(1)?;
    let have = &resident[index];
    let skip = run.first_page - have.first_page.min(run.first_page);
    let inside =
        have.shard_index == run.shard_index && skip.checked_add(run.page_count)? <= have.page_count;
    inside.then_some((index, skip))
}

/// Checks that the resident runs are sorted and disjoint and that no transient run touches one.
pub(super) fn check_disjoint(plan: &Plan) -> Result<()> {
    let mut runs: Vec<&PageRun> = plan
        .layers
        .iter()
        .filter_map(|layer| layer.transient.as_ref())
        .chain(&plan.resident)
        .collect();
    if let Some(experts) = &plan.experts {
        runs.extend(experts.units.iter().map(|unit| &unit.run));
    }
    runs.sort_unstable();
    let sorted = plan.resident.is_sorted();
    let clash = runs.windows(2).find(|pair| {
        pair[0].shard_index == pair[1].shard_index
            && pair[0].first_page.saturating_add(pair[0].page_count) > pair[1].first_page
    });
    match clash {
        None if sorted => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Internal,
            format!("the plan's runs overlap or are not sorted: {clash:?}"),
        )),
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "pool_guard_tests.rs"]
mod guard_tests;
