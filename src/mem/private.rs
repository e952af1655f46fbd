//! The private backing: anonymous memory in place for resident pages, and slots whose pages are *moved* to the place
//! of the layer they serve.
//!
//! A slot's pages are numbered; their order never changes. Page k of a slot that serves a run of n pages lies at the run's
//! place when k < n, else at place k of the slot's own parking range outside the windows. The kernel moves only what lies in one mapping
//! (before Linux 6.17), so a slot is a list of pieces: a piece is cut once, at a length that some run has, and never joined again.
//! That neighbouring mappings may merge is a bonus that nothing here relies on.
//!
//! Slots of experts stand behind those of the ring, one size after the other: the same thing, only more of them. They get
//! their memory when they are first aimed (`fresh`), so that clearing it and reading go on side by side; and they get it in
//! huge pages whatever the plan's pages are. A part of one that was moved keeps lying in one piece of memory, and the
//! drive writes into a few long pieces instead of many short ones: 4 KiB pages cost half of its speed.
//!
//! A move is: old place PROT_NONE, mremap, old place reserved anew (it is not even mapped memory then, and costs no mapping of its own),
//! new place read-write for the read, PROT_READ at publish. So a host that looks at a place without a lease gets SIGSEGV, not another
//! layer's bytes; only where a read is under way, or will be the first, it sees what has come so far, or zeros. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the default pool.
#![allow(unsafe_code)]

use super::behind::FillBehind;
use super::fill::Fill;
use super::fresh::Fresh;
use super::host::{self, Protection};
use super::pool::{Geometry, PoolOptions, check_disjoint, find_resident};
use super::report::{PageProbe, PageSource, ProbeData};
use super::slot::{Aim, Piece, Slot};
use super::window::Windows;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{ExpertPlan, PageRun, Plan};
use crate::units::{HumanBytes, PAGE_2M};
use std::collections::HashMap;
use std::sync::Arc;

/// Anonymous memory of a pool.
#[derive(Debug)]
pub(super) struct Private {
    geometry: Geometry,
    resident: Vec<PageRun>,
    /// The ring's, then those of experts.
    slots: Vec<Slot>,
    /// Which slot of experts lies at which address.
    places: HashMap<usize, u32>,
    parking: Option<Parking>,
    /// Slots of experts that have no memory yet.
    fresh: Fresh,
    resident_kept: bool,
    /// Joined by drop before the memory goes.
    behind: Option<FillBehind>,
    /// Last: the windows outlive what was mapped into them.
    windows: Arc<Windows>,
}

impl Private {
    pub(super) fn new(
        windows: Arc<Windows>,
        plan: &Plan,
        options: &PoolOptions,
    ) -> Result<(Self, PageProbe)> {
        check_disjoint(plan)?;
        let streams = plan.layers.iter().any(|layer| layer.transient.is_some());
        let geometry = Geometry {
            page_bytes: plan.page_bytes,
            slots_count: if streams { plan.slots_count } else { 0 },
            slot_pages: plan.slot_pages,
        };
        for run in plan
            .layers
            .iter()
            .filter_map(|layer| layer.transient.as_ref())
        {
            geometry.place(&windows, run)?;
            check_length(&geometry, geometry.slot_pages, run)?;
        }
        let experts = plan.experts.as_ref();
        for unit in experts.iter().flat_map(|experts| &experts.units) {
            geometry.place(&windows, &unit.run)?;
        }
        let expert_slots = experts.map_or(0, ExpertPlan::slots_count);
        check_mappings(experts)?;
        // From here on `store` gives back what it has, whatever fails.
        let mut store = Self {
            geometry,
            resident: Vec::with_capacity(plan.resident.len()),
            slots: Vec::with_capacity((geometry.slots_count + expert_slots) as usize),
            places: HashMap::with_capacity(2 * expert_slots as usize),
            parking: None,
            fresh: Fresh::default(),
            resident_kept: false,
            behind: None,
            windows,
        };
        let resident_pages: u64 = plan.resident.iter().map(|run| run.page_count).sum();
        let pool_bytes =
            resident_pages * plan.page_bytes + geometry.ring_bytes() + plan.cache_bytes();
        let mut fill = Fill::begin(
            pool_bytes,
            plan.page_bytes,
            true,
            options.binding.as_ref(),
            options.cancel.as_deref(),
        )?;
        store.make_slots(plan, &mut fill, options.fill_behind)?;
        store.make_resident(plan, &mut fill, options.fill_behind)?;
        if options.fill_behind {
            store.fill_behind(plan)?;
        }
        let probe = store.probe(pool_bytes, fill);
        Ok((store, probe))
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The slots, parked. `behind`: they get their memory later.
    fn make_slots(&mut self, plan: &Plan, fill: &mut Fill<'_>, behind: bool) -> Result<()> {
        let ring_len = host::to_usize(self.geometry.ring_bytes())?;
        let cache_len = host::to_usize(plan.cache_bytes())?;
        if ring_len + cache_len == 0 {
            return Ok(());
        }
        let parking = Parking::reserve((ring_len + cache_len) as u64)?;
        let (base, len) = (parking.base, parking.len);
        self.parking = Some(parking);
        // SAFETY: reserved just now; nobody else knows the range.
        unsafe {
            host::protect(base, len, Protection::ReadWrite)?;
            if ring_len > 0 && behind {
                fill.range_later(base, ring_len)?;
            } else if ring_len > 0 {
                fill.range(base, ring_len, true)?;
            }
            if cache_len > 0 {
                fill.range_later(base + ring_len, cache_len)?;
                host::want_huge_pages(base + ring_len, cache_len, true)?;
                if !behind {
                    fill.range(base + ring_len, cache_len, false)?;
                }
            }
            host::protect(base, len, Protection::None)?;
        }
        let cuts = lengths_count(plan.layers.iter().filter_map(|layer| layer.transient));
        let mut address = base;
        for _ in 0..self.geometry.slots_count {
            address = self.push_slot(address, self.geometry.slot_pages, cuts);
        }
        let Some(experts) = &plan.experts else {
            return Ok(());
        };
        for (class, entry) in (0u32..).zip(&experts.classes) {
            let units = experts.units.iter().filter(|unit| unit.class == class);
            let cuts = lengths_count(units.map(|unit| unit.run));
            let (first_slot, begin) = (self.slots.len(), address);
            for _ in 0..entry.slots_count {
                address = self.push_slot(address, entry.slot_pages, cuts);
            }
            if behind {
                let slots = first_slot as u32..self.slots.len() as u32;
                let slot_len = self.geometry.bytes(entry.slot_pages);
                self.fresh.add(slots, begin, slot_len);
            }
        }
        Ok(())
    }

    /// One slot parked at `address`; returns where the next one is. `cuts`: how many lengths its runs have.
    fn push_slot(&mut self, address: usize, page_count: u64, cuts: usize) -> usize {
        // Room for every cut there can be: aim never allocates.
        let mut pieces = Vec::with_capacity(cuts + 1);
        pieces.push(Piece {
            first_page: 0,
            page_count,
            address,
        });
        self.slots.push(Slot {
            parking: address,
            page_count,
            pieces,
            aimed: None,
            unused: false,
            quarantined: false,
        });
        address + self.geometry.bytes(page_count)
    }

    /// Resident pages, in place and writable.
    fn make_resident(&mut self, plan: &Plan, fill: &mut Fill<'_>, behind: bool) -> Result<()> {
        for run in &plan.resident {
            let (address, len) = self.geometry.place(&self.windows, run)?;
            // Remembered first, so that a failure half way is undone by drop.
            self.resident.push(*run);
            // SAFETY: a place in our windows that no slot is ever aimed at (check_disjoint).
            unsafe {
                host::protect(address, len, Protection::ReadWrite)?;
                if behind {
                    fill.range_later(address, len)?;
                } else {
                    fill.range(address, len, true)?;
                }
            }
        }
        Ok(())
    }

    /// Lets the ring's slots lie where the first pass wants them, and begins to give everything its memory in the order in
    /// which that pass reads it: clearing the slots alone would put the first token off by half a second.
    fn fill_behind(&mut self, plan: &Plan) -> Result<()> {
        let transient = plan.layers.iter().filter_map(|layer| layer.transient);
        let first: Vec<PageRun> = transient.take(self.geometry.slots_count as usize).collect();
        for (slot, run) in (0..).zip(&first) {
            self.aim(slot, run)?;
            self.slots[slot as usize].unused = true;
        }
        let mut runs = [first.as_slice(), self.resident.as_slice()].concat();
        runs.sort_unstable();
        let places = runs
            .iter()
            .map(|run| self.geometry.place(&self.windows, run))
            .collect::<Result<Vec<_>>>()?;
        if !places.is_empty() {
            let hurry_bytes = host::to_usize(self.geometry.ring_bytes())?;
            // SAFETY: writable places of this pool, which nothing reads into yet.
            unsafe {
                host::populate(places[0].0, self.geometry.bytes(1))?;
                if !host::can_populate() {
                    // Before Linux 5.14 nothing can be given memory beside reads, and a slot is read into again and again.
                    for run in &first {
                        let (address, len) = self.geometry.place(&self.windows, run)?;
                        host::populate(address, len)?;
                    }
                }
            }
            // SAFETY: places in our windows, mapped until drop, which joins; writable until their bytes have been read. A slot
            // that has moved on leaves its place without access.
            self.behind = Some(unsafe { FillBehind::begin(&places, hurry_bytes)? });
        }
        Ok(())
    }

    fn probe(&self, pool_bytes: u64, fill: Fill<'_>) -> PageProbe {
        let mut ranges: Vec<(usize, usize)> = self.windows.ranges().collect();
        ranges.extend(
            self.parking
                .as_ref()
                .map(|parking| (parking.base, parking.len)),
        );
        let wanted_bytes = self.geometry.page_bytes;
        PageProbe {
            inner: Arc::new(ProbeData {
                ranges,
                pool_bytes,
                wanted_bytes,
                source: if wanted_bytes >= PAGE_2M {
                    PageSource::AnonymousHuge
                } else {
                    PageSource::Anonymous
                },
                fallbacks: fill.fallbacks,
            }),
        }
    }

    pub(super) fn aim(&mut self, slot: u32, run: &PageRun) -> Result<*mut u8> {
        let (address, len) = self.geometry.place(&self.windows, run)?;
        self.park_unused(slot, address, len)?;
        self.check_free_place(slot, run, address, len)?;
        self.clear_place(slot, address)?;
        let geometry = self.geometry;
        let index = slot;
        let slot = &mut self.slots[slot as usize];
        check_length(&geometry, slot.page_count, run)?;
        // SAFETY: a slot that was never aimed is parked and out of reach, and so are those behind it.
        unsafe { self.fresh.give_memory(index)? };
        let of_expert = index >= geometry.slots_count;
        if of_expert && let Some(old) = slot.aimed {
            self.places.remove(&old.address);
        }
        let aim = Aim {
            address,
            len,
            shard_index: run.shard_index,
        };
        let there = slot
            .aimed
            .is_some_and(|now| now.address == address && now.len == len);
        if !there {
            slot.aimed = None;
            if slot.touches(&geometry, address, len) {
                // A run that overlaps the present one: a page cannot move onto its own slot's pages.
                slot.lay_out(&geometry, address, 0)?;
            }
            slot.lay_out(&geometry, address, run.page_count)?;
        }
        // SAFETY: the run's pages lie there now; no lease is out on it (the caller's part).
        unsafe { host::protect(address, len, Protection::ReadWrite)? };
        slot.aimed = Some(aim);
        slot.unused = false;
        if of_expert {
            self.places.insert(address, index);
        }
        Ok(address as *mut u8)
    }

    /// Parks slots that were laid here when the pool was made, and that the first pass does not use here.
    fn park_unused(&mut self, slot: u32, address: usize, len: usize) -> Result<()> {
        let geometry = self.geometry;
        let ring = &mut self.slots[..geometry.slots_count as usize];
        for (_, other) in (0..).zip(ring).filter(|(index, _)| *index != slot) {
            if other.unused && other.touches(&geometry, address, len) {
                other.lay_out(&geometry, address, 0)?;
                other.unused = false;
                other.aimed = None;
            }
        }
        Ok(())
    }

    /// Parks the slot of experts that still lies where `slot` goes: it was given to another unit and not aimed there yet.
    /// The unit whose place this is has no other slot, so nobody leases what lies there and no read goes there.
    fn clear_place(&mut self, slot: u32, address: usize) -> Result<()> {
        let stale = self.places.get(&address).copied();
        if let Some(stale) =
            stale.filter(|stale| *stale != slot && slot >= self.geometry.slots_count)
        {
            self.places.remove(&address);
            let stale = &mut self.slots[stale as usize];
            stale.aimed = None;
            stale.lay_out(&self.geometry, address, 0)?;
        }
        Ok(())
    }

    /// Refuses an aim that would destroy resident pages or another slot's.
    fn check_free_place(&self, slot: u32, run: &PageRun, address: usize, len: usize) -> Result<()> {
        let Some(own) = self.slots.get(slot as usize) else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("slot {slot}: the pool has {}", self.slots.len()),
            ));
        };
        if own.quarantined {
            return Err(quarantined(slot));
        }
        let after = self.resident.partition_point(|have| have <= run);
        let near = &self.resident[after.saturating_sub(1)..self.resident.len().min(after + 1)];
        let resident = near.iter().find(|have| {
            have.shard_index == run.shard_index
                && have.first_page < run.first_page + run.page_count
                && run.first_page < have.first_page + have.page_count
        });
        if let Some(have) = resident {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{run:?} is not transient: {have:?} is resident"),
            ));
        }
        if slot >= self.geometry.slots_count {
            // The runs of experts are fixed and disjoint, so only a slot at the very same place can be in the way.
            let other = self.places.get(&address).filter(|other| **other != slot);
            return match other {
                Some(&other) if self.slots[other as usize].quarantined => Err(quarantined(other)),
                _ => Ok(()),
            };
        }
        for (index, other) in self.slots.iter().enumerate() {
            if index == slot as usize || !other.touches(&self.geometry, address, len) {
                continue;
            }
            return Err(if other.quarantined {
                quarantined(index as u32)
            } else {
                Error::new(
                    ErrorKind::Invalid,
                    format!("{run:?} is where slot {index} is; slot {slot} cannot be aimed there"),
                )
            });
        }
        Ok(())
    }

    pub(super) fn publish(&mut self, slot: u32) -> Result<()> {
        let aimed = self
            .slots
            .get(slot as usize)
            .filter(|slot| !slot.quarantined)
            .and_then(|slot| slot.aimed);
        let Some(aim) = aimed else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("slot {slot} is not aimed: nothing to publish"),
            ));
        };
        // SAFETY: the slot's own place; the reader is done with it (the caller's part).
        unsafe { host::protect(aim.address, aim.len, Protection::Read) }
    }

    /// What kept the pool from getting its memory.
    pub(super) fn check_filled(&self) -> Result<()> {
        self.behind.as_ref().map_or(Ok(()), FillBehind::check)
    }

    pub(super) fn resident_target(&self, run: &PageRun) -> *mut u8 {
        let place = find_resident(&self.resident, run)
            .and_then(|_| self.geometry.place(&self.windows, run).ok());
        place.map_or(std::ptr::null_mut(), |(address, _)| address as *mut u8)
    }

    pub(super) fn publish_resident(&mut self, run: &PageRun) -> Result<()> {
        let (address, len) = self.geometry.place(&self.windows, run)?;
        // A readable place that is not resident would show zeros where a host without a lease has to fault.
        if find_resident(&self.resident, run).is_none() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{run:?} is not resident: nothing to publish"),
            ));
        }
        // SAFETY: the pool's own pages; the reader is done with them (the caller's part).
        unsafe { host::protect(address, len, Protection::Read) }
    }

    pub(super) fn quarantine(&mut self, slot: u32) {
        let Some(slot) = self.slots.get_mut(slot as usize) else {
            return;
        };
        slot.quarantined = true;
        if let Some(parking) = &mut self.parking {
            parking.kept = true;
        }
        if let Some(aim) = slot.aimed {
            self.windows.keep(aim.shard_index);
            // The place stays as it is, readable and writable: a host may hold a lease on the part that had arrived, and a
            // thread that decodes may yet write. The drive's trouble must not become their crash. Nobody gets a new lease:
            // the layer's fetch has failed.
        }
    }

    pub(super) fn quarantine_resident(&mut self) {
        self.resident_kept = true;
        for run in &self.resident {
            self.windows.keep(run.shard_index);
        }
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // The thread that fills must be gone before its places are.
        self.behind = None;
        let tell = |result: Result<()>| {
            if let Err(error) = result {
                log::error!("pool memory not given back: {error}");
            }
        };
        for slot in self.slots.iter().filter(|slot| !slot.quarantined) {
            for piece in &slot.pieces {
                let len = self.geometry.bytes(piece.page_count);
                // SAFETY: the slot's own pages, which nobody leases or fills any more (the caller's part).
                tell(unsafe { host::reserve_fixed(piece.address, len) });
            }
        }
        for run in self.resident.iter().filter(|_| !self.resident_kept) {
            if let Ok((address, len)) = self.geometry.place(&self.windows, run) {
                // SAFETY: the pool's own pages, which nobody leases or fills any more (the caller's part).
                tell(unsafe { host::reserve_fixed(address, len) });
            }
        }
    }
}

/// Where pages of slots stay that no run needs: outside the windows, never readable.
#[derive(Debug)]
struct Parking {
    base: usize,
    len: usize,
    /// A quarantined slot has pages here.
    kept: bool,
}

impl Parking {
    fn reserve(len_bytes: u64) -> Result<Self> {
        Ok(Self {
            base: host::reserve(len_bytes)?,
            len: host::to_usize(len_bytes)?,
            kept: false,
        })
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // SAFETY: reserved by us, and no slot is quarantined.
        if let Err(error) = unsafe { host::unmap(self.base, self.len) } {
            log::error!("parking range not given back: {error}");
        }
    }
}

/// Every unit's place is a mapping, or a hole between two, and so are the pages beside it; a slot may have a page parked.
fn check_mappings(experts: Option<&ExpertPlan>) -> Result<()> {
    let Some(experts) = experts else {
        return Ok(());
    };
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    let limit = limit.ok().and_then(|text| text.trim().parse::<u64>().ok());
    let needed = 2 * experts.units.len() as u64 + 2 * u64::from(experts.slots_count()) + 4096;
    match limit {
        Some(limit) if needed > limit => Err(Error::new(
            ErrorKind::NoMemory,
            format!(
                "{} parts of experts need up to {needed} mappings and the system allows {limit}; raise it (sysctl \
                 vm.max_map_count={}), or stream experts with their layer (--whole-experts, FLEA_EXPERTS=off)",
                experts.units.len(),
                needed.next_power_of_two()
            ),
        )),
        _ => Ok(()),
    }
}

/// How many different lengths the runs have.
fn lengths_count(runs: impl Iterator<Item = PageRun>) -> usize {
    let mut lengths: Vec<u64> = runs.map(|run| run.page_count).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths.len()
}

fn check_length(geometry: &Geometry, slot_pages: u64, run: &PageRun) -> Result<()> {
    if (1..=slot_pages).contains(&run.page_count) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "{run:?} is not a run for slots of {slot_pages} pages ({})",
            HumanBytes(slot_pages * geometry.page_bytes)
        ),
    ))
}

/// The error of a slot, or of a place, that the kernel has not given back.
pub(super) fn quarantined(slot: u32) -> Error {
    Error::new(
        ErrorKind::Io,
        format!(
            "slot {slot} is quarantined: the kernel never gave back a read into it; check the drive (dmesg), then reopen the model"
        ),
    )
}
