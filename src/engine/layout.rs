//! What the reader has to fetch, derived once from catalog and plan: fetches, the layers that need them, and addresses.
//!
//! A *fetch* is one run of pages that is read as a whole: a transient run (one layer's, lands in a slot), or a piece
//! of the resident pages (lands in place, once). Resident pages are cut where the set of layers that use them changes,
//! so a page that straddles two layers is a fetch of its own and whoever needs it first has it read.
//! Invariant: every planned byte of a layer lies in exactly one of the layer's fetches.

use crate::model::Catalog;
use crate::plan::{ExpertPlan, PageRun, Plan, Unit};
use std::ops::Range;

/// One run of pages that is read as a whole.
#[derive(Debug, Clone)]
pub struct Fetch {
    /// Where it lies in the shard.
    pub run: PageRun,
    /// Bytes of the run.
    pub len_bytes: u64,
    /// The layer whose transient run this is; `None` for resident pages.
    pub transient_of: Option<u32>,
    /// How many requests it takes.
    pub request_count: u32,
}

/// A byte range of a shard that belongs to one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    shard_index: u32,
    start_bytes: u64,
    end_bytes: u64,
    layer: u32,
}

/// The address book of a catalog: which layer a byte of a shard belongs to. Needs no plan.
#[derive(Debug)]
pub struct Spans {
    sorted: Vec<Span>,
}

impl Spans {
    /// Collects the planned bytes of every layer.
    #[must_use]
    pub fn new(catalog: &Catalog) -> Self {
        let mut sorted = Vec::new();
        for (layer, entry) in (0u32..).zip(&catalog.layers) {
            for part in &entry.uses {
                let extent = part.extent;
                if extent.len_bytes > 0 {
                    sorted.push(Span {
                        shard_index: extent.shard_index,
                        start_bytes: extent.offset_bytes,
                        end_bytes: extent.end_bytes(),
                        layer,
                    });
                }
            }
        }
        sorted.sort_unstable();
        Self { sorted }
    }

    /// The layer that byte `offset_bytes` of a shard belongs to.
    #[must_use]
    pub fn layer_at(&self, shard_index: u32, offset_bytes: u64) -> Option<u32> {
        let after = self.sorted.partition_point(|span| {
            (span.shard_index, span.start_bytes) <= (shard_index, offset_bytes)
        });
        let span = self.sorted.get(after.checked_sub(1)?)?;
        (span.shard_index == shard_index && offset_bytes < span.end_bytes).then_some(span.layer)
    }

    /// The layer that byte `offset_bytes` of a shard belongs to, and where the tensor's part in that layer ends.
    #[must_use]
    pub(super) fn part_at(&self, shard_index: u32, offset_bytes: u64) -> Option<(u32, u64)> {
        let after = self.sorted.partition_point(|span| {
            (span.shard_index, span.start_bytes) <= (shard_index, offset_bytes)
        });
        let span = self.sorted.get(after.checked_sub(1)?)?;
        (span.shard_index == shard_index && offset_bytes < span.end_bytes)
            .then_some((span.layer, span.end_bytes))
    }
}

/// All fetches of a plan.
#[derive(Debug)]
pub struct Layout {
    /// Page size of the plan.
    pub page_bytes: u64,
    /// Bytes of one read request; the last one of a fetch may be shorter.
    pub request_bytes: u64,
    /// The fetches; a fetch is named by its place in here.
    pub fetches: Vec<Fetch>,
    /// Per layer: its resident fetches, then its transient one.
    pub of_layer: Vec<Vec<u32>>,
    /// Per layer: the slot its transient run must use (shared backing), if it must.
    pub fixed_slot: Vec<Option<u32>>,
    /// How many slots the ring has.
    pub slots_count: u32,
    /// The experts' part of the plan. Fetch `first_unit + n` is that of unit n.
    pub experts: Option<ExpertPlan>,
    /// The fetch of the first unit.
    pub first_unit: u32,
}

impl Layout {
    /// Derives the fetches. `fixed_slots`: whether each layer has its own place in the ring (shared backing).
    #[must_use]
    pub fn new(
        catalog: &Catalog,
        plan: &Plan,
        request_bytes: u64,
        slots_count: u32,
        fixed_slots: bool,
    ) -> Self {
        let mut layout = Self {
            page_bytes: plan.page_bytes,
            request_bytes,
            fetches: Vec::new(),
            of_layer: vec![Vec::new(); catalog.layers.len()],
            fixed_slot: plan
                .layers
                .iter()
                .map(|layer| layer.slot_index.filter(|_| fixed_slots))
                .collect(),
            slots_count,
            experts: plan.experts.clone(),
            first_unit: u32::MAX,
        };
        layout.add_resident(catalog, plan);
        for (layer, entry) in (0u32..).zip(&plan.layers) {
            if let Some(run) = entry.transient {
                let index = layout.add(run, Some(layer));
                layout.of_layer[layer as usize].push(index);
            }
        }
        layout.first_unit = u32::try_from(layout.fetches.len()).unwrap_or(u32::MAX);
        for unit in plan.experts.iter().flat_map(|experts| &experts.units) {
            layout.add(unit.run, None);
        }
        layout
    }

    /// Slots of the ring and of experts.
    pub fn all_slots_count(&self) -> u32 {
        let experts = self.experts.as_ref();
        self.slots_count + experts.map_or(0, ExpertPlan::slots_count)
    }

    /// The units; none where layers are streamed with all they have.
    pub fn units(&self) -> &[Unit] {
        self.experts.as_ref().map_or(&[], |experts| &experts.units)
    }

    /// The unit that a fetch brings.
    pub fn unit_of(&self, fetch: u32) -> Option<u32> {
        (self.experts.is_some() && fetch >= self.first_unit).then(|| fetch - self.first_unit)
    }

    /// True for a fetch of pages that stay for good.
    pub fn is_resident(&self, fetch: u32) -> bool {
        let transient = self.fetches[fetch as usize].transient_of.is_some();
        !transient && self.unit_of(fetch).is_none()
    }

    /// How many such fetches there are.
    pub fn residents_count(&self) -> u32 {
        let all = 0..self.fetches.len() as u32;
        all.filter(|fetch| self.is_resident(*fetch)).count() as u32
    }

    /// The units that have bytes in a range of a shard.
    pub fn units_in(&self, shard_index: u32, start_bytes: u64, end_bytes: u64) -> Range<u32> {
        let units = self.units();
        let before = |unit: &Unit| {
            (unit.extent.shard_index, unit.extent.end_bytes()) <= (shard_index, start_bytes)
        };
        let until = |unit: &Unit| {
            (unit.extent.shard_index, unit.extent.offset_bytes) < (shard_index, end_bytes)
        };
        let first = units.partition_point(before);
        let end = units.partition_point(until).max(first);
        first as u32..end as u32
    }

    fn add(&mut self, run: PageRun, transient_of: Option<u32>) -> u32 {
        let len_bytes = run.page_count * self.page_bytes;
        let request_count =
            u32::try_from(len_bytes.div_ceil(self.request_bytes)).unwrap_or(u32::MAX);
        self.fetches.push(Fetch {
            run,
            len_bytes,
            transient_of,
            request_count,
        });
        u32::try_from(self.fetches.len() - 1).unwrap_or(u32::MAX)
    }

    /// Cuts the resident pages where the set of layers using them changes, and gives each piece to its layers.
    fn add_resident(&mut self, catalog: &Catalog, plan: &Plan) {
        let parts = resident_parts(catalog, plan);
        let mut cuts: Vec<(u32, u64)> = parts
            .iter()
            .flat_map(|part| [(part.shard_index, part.first), (part.shard_index, part.end)])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        // Each elementary piece between two neighbouring cuts of a shard has one fixed set of layers.
        let mut piece_of_cut = vec![None; cuts.len()];
        for part in &parts {
            let from = cuts.partition_point(|cut| *cut < (part.shard_index, part.first));
            let to = cuts.partition_point(|cut| *cut < (part.shard_index, part.end));
            for cut in from..to {
                let fetch = *piece_of_cut[cut].get_or_insert_with(|| {
                    let (shard_index, first_page) = cuts[cut];
                    let page_count = cuts[cut + 1].1 - first_page;
                    self.add(
                        PageRun {
                            shard_index,
                            first_page,
                            page_count,
                        },
                        None,
                    )
                });
                let list = &mut self.of_layer[part.layer as usize];
                if !list.contains(&fetch) {
                    list.push(fetch);
                }
            }
        }
    }

    /// The byte range of the shard that request `request` of a fetch covers.
    #[must_use]
    pub fn request_range(&self, fetch: u32, request: u32) -> (u64, u64) {
        let entry = &self.fetches[fetch as usize];
        let start = u64::from(request) * self.request_bytes;
        let len = self.request_bytes.min(entry.len_bytes - start);
        (entry.run.first_page * self.page_bytes + start, len)
    }
}

/// A range of resident pages `[first, end)` that one layer needs.
struct ResidentPart {
    shard_index: u32,
    first: u64,
    end: u64,
    layer: u32,
}

/// For every layer, the pages of its bytes that are not in its transient run; neighbouring ranges are joined.
fn resident_parts(catalog: &Catalog, plan: &Plan) -> Vec<ResidentPart> {
    let page = plan.page_bytes;
    let mut parts: Vec<ResidentPart> = Vec::new();
    let units = plan.experts.as_ref();
    let units = units.map_or(&[][..], |experts| &experts.units);
    for (layer, entry) in (0u32..).zip(&catalog.layers) {
        let transient = plan.layers[layer as usize].transient;
        let mut ranges: Vec<(u32, u64, u64)> = Vec::new();
        for part in entry.uses.iter().filter(|part| part.extent.len_bytes > 0) {
            let first = part.extent.offset_bytes / page;
            let end = part.extent.end_bytes().div_ceil(page);
            let shard_index = part.extent.shard_index;
            match transient.filter(|run| run.shard_index == shard_index) {
                Some(run) => {
                    ranges.push((shard_index, first, end.min(run.first_page)));
                    ranges.push((shard_index, first.max(run.first_page + run.page_count), end));
                }
                None => push_without(units, shard_index, first, end, &mut ranges),
            }
        }
        ranges.retain(|range| range.1 < range.2);
        ranges.sort_unstable();
        for (shard_index, first, end) in ranges {
            match parts.last_mut() {
                Some(last)
                    if last.layer == layer
                        && last.shard_index == shard_index
                        && first <= last.end =>
                {
                    last.end = last.end.max(end);
                }
                _ => parts.push(ResidentPart {
                    shard_index,
                    first,
                    end,
                    layer,
                }),
            }
        }
    }
    parts
}

/// Pages `first..end` but for the runs of units in there.
fn push_without(
    units: &[Unit],
    shard_index: u32,
    first: u64,
    end: u64,
    ranges: &mut Vec<(u32, u64, u64)>,
) {
    let from = units.partition_point(|unit| {
        (unit.run.shard_index, unit.run.end_page()) <= (shard_index, first)
    });
    let mut at = first;
    for unit in &units[from..] {
        if unit.run.shard_index != shard_index || unit.run.first_page >= end {
            break;
        }
        ranges.push((shard_index, at, unit.run.first_page));
        at = unit.run.end_page();
    }
    ranges.push((shard_index, at, end));
}
