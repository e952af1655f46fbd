//! The plan: which pages of a model stay in memory and which are streamed, for one catalog and one weight budget.
//!
//! Every layer streams the same number of pages (`t`, the size of a slot) or one fewer, so every layer's read takes the
//! same time and a short ring hides it behind compute. Invariants, each a property test in `properties.rs`:
//!
//! * `resident_bytes + ring_bytes <= weight_budget_bytes`, always;
//! * every planned byte lies in a resident page or in its own layer's transient run, never in both;
//! * a transient run holds bytes of one layer only;
//! * no other choice of slot size and run lengths streams fewer pages, and a larger budget never streams more bytes;
//! * two layers of one slot of the shared ring are at least two apart, also across the end of a pass.
//!
//! Pure: no I/O, no unsafe, the same input gives the same plan on every machine. The work grows with the number of
//! tensors, never with the number of pages. Place in the pipeline: file -> catalog -> **plan** -> reader -> pool ->
//! lease -> host.

pub mod budget;
pub mod experts;
pub mod image;
pub mod policy;
pub mod predict;
mod residency;
mod ring;
pub mod rows;
pub mod spread;
pub mod tiers;

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(crate) mod testing;

use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, Layer, LayerKind};
use crate::units::{Extent, HumanBytes, MIB, PAGE_2M, PAGE_4K};
use residency::{Ground, Need};

pub use budget::Budget;
pub use experts::{ExpertOptions, ExpertPlan, SlotClass, Unit};
pub use image::Image;
pub use policy::{Admission, Policy, PolicyKind};
pub use predict::{DriveRate, Prediction, compute_seconds, peak_bytes, predict};
pub use rows::RowsPlan;
pub use tiers::{TierRates, TierShare, TierTimes, VramPlan};

/// Fewest slots: 1 that the host computes with, + 1 that is filled meanwhile. With fewer, drive and host take turns.
pub const SLOTS_MIN: u32 = 1 + 1;
/// Slots unless told otherwise: [`SLOTS_MIN`] + 1, so that the drive goes on while the host changes layers, and so that
/// one operation may hold two layers at once.
pub const SLOTS_DEFAULT: u32 = SLOTS_MIN + 1;
/// Most slots, as include/flea.h states. Far beyond use: a ring of 64 slots costs 64 slots of budget.
pub const SLOTS_MAX: u32 = 64;

/// Layers of this size and more are planned in 2 MiB pages: the two pages that a layer shares with its neighbours are
/// then at most an eighth of it.
const HUGE_PAGE_LAYER_BYTES: u64 = 32 * MIB;

/// Whole pages of one shard. Page n covers the file's bytes `n * page_bytes ..`; the last page may reach past the end
/// of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// Which file of the model.
    pub shard_index: u32,
    /// First page.
    pub first_page: u64,
    /// How many pages.
    pub page_count: u64,
}

impl PageRun {
    /// One past the last page.
    #[must_use]
    pub const fn end_page(&self) -> u64 {
        self.first_page + self.page_count
    }

    /// The bytes the run covers in a file of `shard_len_bytes`: clipped to its end.
    #[must_use]
    pub const fn extent(&self, page_bytes: u64, shard_len_bytes: u64) -> Extent {
        let first = self.first_page.saturating_mul(page_bytes);
        let end = self.end_page().saturating_mul(page_bytes);
        let end = if end < shard_len_bytes {
            end
        } else {
            shard_len_bytes
        };
        Extent {
            shard_index: self.shard_index,
            offset_bytes: first,
            len_bytes: end.saturating_sub(first),
        }
    }
}

/// What the planner may choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Slots of the ring, [`SLOTS_MIN`] to [`SLOTS_MAX`].
    pub slots_count: u32,
    /// 4096 or 2 MiB.
    pub page_bytes: u64,
}

impl PlanOptions {
    /// The defaults for one model: three slots, pages by the size of its layers.
    #[must_use]
    pub fn for_catalog(catalog: &Catalog) -> Self {
        Self {
            slots_count: SLOTS_DEFAULT,
            page_bytes: default_page_bytes(catalog),
        }
    }

    /// Checks the ranges that include/flea.h states.
    ///
    /// # Errors
    /// `Invalid`, naming the figure and the accepted range.
    pub fn check(&self) -> Result<()> {
        if !(SLOTS_MIN..=SLOTS_MAX).contains(&self.slots_count) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "slots_count is {}: {SLOTS_MIN} to {SLOTS_MAX} are possible, {SLOTS_DEFAULT} is the default",
                    self.slots_count
                ),
            ));
        }
        if self.page_bytes != PAGE_4K && self.page_bytes != PAGE_2M {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "page_bytes is {}: only {PAGE_4K} and {PAGE_2M} are possible",
                    self.page_bytes
                ),
            ));
        }
        Ok(())
    }
}

/// One layer's part of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// The one run that is streamed; `None` when the layer is resident altogether.
    pub transient: Option<PageRun>,
    /// Bytes of that run, clipped to the end of the file.
    pub transient_bytes: u64,
    /// The layer's own tensor bytes that lie in resident pages.
    pub resident_bytes: u64,
    /// Its slot in the shared backing's ring; `None` when nothing is streamed or no ring exists
    /// ([`Plan::require_ring`]). The private backing gives any free slot to any layer and does not look here.
    pub slot_index: Option<u32>,
}

/// Which pages are resident, which are transient, and what that costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The unit of everything below: 4096 or 2 MiB.
    pub page_bytes: u64,
    /// Slots in the ring; 0 when everything is resident.
    pub slots_count: u32,
    /// Pages of one slot: `t`. No layer's run is longer.
    pub slot_pages: u64,
    /// Parallel to the catalog's layers, in the order of a pass.
    pub layers: Vec<LayerPlan>,
    /// Every resident page: sorted by shard and page, disjoint, neighbours merged.
    pub resident: Vec<PageRun>,
    /// Memory of the resident pages, whole pages.
    pub resident_bytes: u64,
    /// Memory of the slots: `slots_count * slot_pages * page_bytes`.
    pub ring_bytes: u64,
    /// What one pass reads from the drive.
    pub streamed_bytes_per_pass: u64,
    /// The budget this plan was made for. `resident_bytes + ring_bytes` is at most this.
    pub weight_budget_bytes: u64,
    /// The smallest budget for which a plan exists, with these options.
    pub smallest_budget_bytes: u64,
    /// Pages that are resident under every budget: shared by two layers, or apart from their layer's longest stretch.
    pub always_resident_bytes: u64,
    /// The cache of experts that are fetched one by one; `None` where layers are streamed with all they have.
    pub experts: Option<ExpertPlan>,
}

impl Plan {
    /// Memory of one slot.
    #[must_use]
    pub const fn slot_bytes(&self) -> u64 {
        self.slot_pages * self.page_bytes
    }

    /// How many layers stream something: the loads of one pass.
    #[must_use]
    pub fn transient_layers_count(&self) -> u32 {
        let count = self.layers.iter().filter(|l| l.transient.is_some()).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// True when nothing is streamed.
    #[must_use]
    pub const fn is_resident(&self) -> bool {
        self.slot_pages == 0 && self.experts.is_none()
    }

    /// Memory of the experts' slots.
    #[must_use]
    pub fn cache_bytes(&self) -> u64 {
        self.experts
            .as_ref()
            .map_or(0, |experts| experts.cache_bytes)
    }

    /// Share of the planned bytes that stay in memory, 0 to 1; 1 for a model without layers.
    #[must_use]
    pub fn resident_share(&self) -> f64 {
        let planned: u64 = self.layers.iter().map(planned_bytes).sum();
        let of_units = |experts: &ExpertPlan| -> u64 {
            let pages = experts.units.iter().map(|unit| unit.run.page_count);
            pages.sum::<u64>() * self.page_bytes
        };
        let all = planned + self.experts.as_ref().map_or(0, of_units);
        if all == 0 {
            return 1.0;
        }
        let resident: u64 = self.layers.iter().map(|layer| layer.resident_bytes).sum();
        resident as f64 / all as f64
    }

    /// Checks that the shared backing can use this plan: its layers have fixed slots, and two layers of one slot have
    /// to be at least two apart. That always holds with three slots or more.
    ///
    /// # Errors
    /// `Refused`, saying how many slots would do.
    pub fn require_ring(&self) -> Result<()> {
        let transient_count = self.transient_layers_count();
        if ring::distance(transient_count, self.slots_count) >= ring::DISTANCE_MIN {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{transient_count} streamed layers on {} slots of the shared backing: the last layer and the first of \
                 the next pass would share a slot; use {SLOTS_DEFAULT} slots or the private backing",
                self.slots_count
            ),
        ))
    }
}

fn planned_bytes(layer: &LayerPlan) -> u64 {
    layer.resident_bytes.saturating_add(layer.transient_bytes)
}

/// 2 MiB pages where the typical (median) block layer has 32 MiB or more, else 4 KiB.
#[must_use]
pub fn default_page_bytes(catalog: &Catalog) -> u64 {
    let is_block = |layer: &&Layer| matches!(layer.kind, LayerKind::Block(_));
    let mut sizes: Vec<u64> = catalog
        .layers
        .iter()
        .filter(is_block)
        .map(|l| l.bytes)
        .collect();
    if sizes.is_empty() {
        sizes = catalog.layers.iter().map(|l| l.bytes).collect();
    }
    sizes.sort_unstable();
    match sizes.get(sizes.len() / 2) {
        Some(&median) if median >= HUGE_PAGE_LAYER_BYTES => PAGE_2M,
        _ => PAGE_4K,
    }
}

/// What a model is planned by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Layers are streamed with all they have.
    Layers(PlanOptions),
    /// What every token uses is resident and experts are fetched one by one; where everything fits, or where experts need
    /// more than whole layers, as `layers`.
    Experts {
        /// For a budget that the whole model fits, and for one that is too small for `experts`.
        layers: PlanOptions,
        /// For every other.
        experts: ExpertOptions,
    },
}

impl Method {
    /// The smallest weight budget that works.
    ///
    /// # Errors
    /// Those of [`smallest_budget_bytes`] and [`experts::smallest_budget_bytes`].
    pub fn smallest_budget_bytes(&self, catalog: &Catalog) -> Result<u64> {
        match self {
            Self::Layers(options) => smallest_budget_bytes(catalog, options),
            Self::Experts { layers, experts } => {
                let whole_layers = smallest_budget_bytes(catalog, layers)?;
                Ok(experts::smallest_budget_bytes(catalog, experts)?.min(whole_layers))
            }
        }
    }

    /// The plan for a budget.
    ///
    /// # Errors
    /// Those of [`plan`] and [`experts::plan`].
    pub fn plan(&self, catalog: &Catalog, weight_budget_bytes: u64) -> Result<Plan> {
        match self {
            Self::Layers(options) => plan(catalog, weight_budget_bytes, options),
            Self::Experts { layers, experts } => {
                let by_layers = plan(catalog, weight_budget_bytes, layers);
                let least_bytes = experts::smallest_budget_bytes(catalog, experts)?;
                // A few large experts can need more room than the ring.
                let too_little = weight_budget_bytes < least_bytes
                    && smallest_budget_bytes(catalog, layers)? < least_bytes;
                let is_resident = by_layers.as_ref().is_ok_and(Plan::is_resident);
                let plan = match is_resident || too_little {
                    true => by_layers?,
                    false => experts::plan(catalog, weight_budget_bytes, experts)?,
                };
                Ok(Plan {
                    smallest_budget_bytes: self.smallest_budget_bytes(catalog)?,
                    ..plan
                })
            }
        }
    }
}

/// The smallest weight budget for which [`plan`] gives a plan.
///
/// # Errors
/// `Invalid` for options out of range, or for a catalog whose layers reach past their files.
pub fn smallest_budget_bytes(catalog: &Catalog, options: &PlanOptions) -> Result<u64> {
    options.check()?;
    let ground = Ground::survey(catalog, options.page_bytes)?;
    Ok(Need::smallest(&ground, options.slots_count).bytes(options.page_bytes))
}

/// Decides for every page of `catalog` whether it is resident or transient, within `weight_budget_bytes`.
///
/// # Errors
/// `Refused` when the budget is too small: the message holds the arithmetic and the smallest budget that works.
/// `Invalid` for options out of range, or for a catalog whose layers reach past their files.
pub fn plan(catalog: &Catalog, weight_budget_bytes: u64, options: &PlanOptions) -> Result<Plan> {
    options.check()?;
    let page_bytes = options.page_bytes;
    let ground = Ground::survey(catalog, page_bytes)?;
    let smallest = Need::smallest(&ground, options.slots_count);
    let budget_pages = weight_budget_bytes / page_bytes;
    let Some(need) = Need::within(&ground, options.slots_count, budget_pages) else {
        return Err(refusal(weight_budget_bytes, &smallest, page_bytes));
    };
    let run_pages = need.distribute(&ground, budget_pages);
    let runs = residency::choose_runs(catalog, &ground, &run_pages, page_bytes);
    let slots_count = if need.slot_pages == 0 {
        0
    } else {
        options.slots_count
    };
    let layers = plan_layers(catalog, &runs, slots_count, page_bytes);
    let resident = ground.resident(&runs);
    let resident_pages: u64 = resident.iter().map(|run| run.page_count).sum();
    let ring_pages = u64::from(slots_count) * need.slot_pages;
    // The promise of the house, checked where it is made.
    if resident_pages + ring_pages > budget_pages {
        return Err(Error::new(
            ErrorKind::Internal,
            format!(
                "a plan of {resident_pages} resident and {ring_pages} ring pages exceeds its budget of {budget_pages}; \
                 please report this"
            ),
        ));
    }
    Ok(Plan {
        page_bytes,
        slots_count,
        slot_pages: need.slot_pages,
        streamed_bytes_per_pass: layers.iter().map(|layer| layer.transient_bytes).sum(),
        layers,
        resident,
        resident_bytes: resident_pages * page_bytes,
        ring_bytes: ring_pages * page_bytes,
        weight_budget_bytes,
        smallest_budget_bytes: smallest.bytes(page_bytes),
        always_resident_bytes: ground.always_resident_pages() * page_bytes,
        experts: None,
    })
}

fn plan_layers(
    catalog: &Catalog,
    runs: &[Option<PageRun>],
    slots_count: u32,
    page_bytes: u64,
) -> Vec<LayerPlan> {
    let transient_count = u32::try_from(runs.iter().flatten().count()).unwrap_or(u32::MAX);
    let mut slots = ring::assign(transient_count, slots_count).into_iter();
    let plan_layer = |(layer, run): (&Layer, &Option<PageRun>)| {
        let extent = run.map(|run| {
            let shard = &catalog.shards[run.shard_index as usize];
            run.extent(page_bytes, shard.len_bytes)
        });
        LayerPlan {
            transient: *run,
            transient_bytes: extent.map_or(0, |extent| extent.len_bytes),
            resident_bytes: bytes_outside(layer, extent),
            slot_index: run.and_then(|_| slots.next()),
        }
    };
    catalog.layers.iter().zip(runs).map(plan_layer).collect()
}

/// The layer's tensor bytes that do not lie in `run`.
fn bytes_outside(layer: &Layer, run: Option<Extent>) -> u64 {
    let outside = |extent: &Extent| match run {
        Some(run) if run.overlaps(extent) => {
            let first = run.offset_bytes.max(extent.offset_bytes);
            let end = run.end_bytes().min(extent.end_bytes());
            extent.len_bytes - (end - first)
        }
        _ => extent.len_bytes,
    };
    layer.uses.iter().map(|u| outside(&u.extent)).sum()
}

/// The arithmetic of a budget that is too small, in one sentence.
fn refusal(weight_budget_bytes: u64, smallest: &Need, page_bytes: u64) -> Error {
    let bytes = |pages: u128| HumanBytes(residency::saturating_bytes(pages, page_bytes));
    let needed = smallest.bytes(page_bytes);
    Error::new(
        ErrorKind::Refused,
        format!(
            "a weight budget of {} ({weight_budget_bytes} bytes) is too small: {} of pages are always resident, {} more \
             are what the longest layers hold beyond a slot, and the ring of {} slots x {} takes {}; the smallest \
             budget that works is {} ({needed} bytes)",
            HumanBytes(weight_budget_bytes),
            bytes(u128::from(smallest.always_resident_pages)),
            bytes(smallest.held_pages),
            smallest.slots_count,
            bytes(u128::from(smallest.slot_pages)),
            bytes(smallest.ring_pages()),
            HumanBytes(needed),
        ),
    )
}
