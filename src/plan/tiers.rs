//! Tiers: which bytes of a model stay in VRAM, which in pinned host memory, and which come from the drive each pass.
//!
//! Two plans of one kind, one above the other. The upper plans the model's [`Image`] within the VRAM budget: `t` pages of
//! every layer come over the link (PCIe) in each pass, the rest stays. The lower plans just what comes over the link within
//! the memory budget: `n` pages of every layer come from the drive, the rest is kept in pinned memory. Both streams run at
//! the same time, so a pass takes
//!
//! ```text
//! max(link bytes / link rate, drive bytes / drive rate, compute)
//! ```
//!
//! and since every layer has the same share of each, link and drive finish every layer together where they balance:
//! `drive bytes = link bytes * drive rate / link rate` ([`balance`]). More host memory than that only spares the drive;
//! less leaves the link waiting. Invariants, property-tested in `tiers_tests.rs`: every byte of a layer is in exactly one
//! tier; neither budget is passed; more VRAM never sends more pages over the link, more memory never reads more from the
//! drive.
//! Pure. Part of plan: file -> catalog -> **plan** -> reader -> pool -> lease -> host.

use super::image::Image;
use super::residency::{Ground, Need};
use super::{PageRun, Plan, PlanOptions, plan};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, Layer, Use};
use crate::units::{Extent, PAGE_2M};

/// Pages of VRAM: what NVIDIA's GPUs map memory in.
pub const VRAM_PAGE_BYTES: u64 = PAGE_2M;

/// The upper plan: VRAM above, whatever is below.
#[derive(Debug, Clone)]
pub struct VramPlan {
    /// The model as it lies in VRAM.
    pub image: Image,
    /// Its pages: resident in VRAM, or in a slot of VRAM.
    pub plan: Plan,
    /// What comes over the link in each pass: the same layers with nothing else in them, where the files have it.
    pub below: Catalog,
}

/// One layer's bytes of the files, by where they stay between two passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierShare {
    /// In VRAM.
    pub vram_bytes: u64,
    /// In host memory.
    pub memory_bytes: u64,
    /// On the drive.
    pub drive_bytes: u64,
}

impl TierShare {
    /// What comes over the link.
    #[must_use]
    pub const fn link_bytes(&self) -> u64 {
        self.memory_bytes + self.drive_bytes
    }
}

impl VramPlan {
    /// Plans `catalog` within `vram_bytes` for weights, with a ring of `slots_count` slots in VRAM.
    ///
    /// # Errors
    /// `Refused`, with the arithmetic and the smallest VRAM that works; `Invalid` as [`plan`].
    pub fn new(catalog: &Catalog, vram_bytes: u64, slots_count: u32) -> Result<Self> {
        let options = PlanOptions {
            slots_count,
            page_bytes: VRAM_PAGE_BYTES,
        };
        let image = Image::new(catalog, VRAM_PAGE_BYTES)?;
        let plan = plan(&image.catalog, vram_bytes, &options).map_err(|error| {
            let context = format!("VRAM: {}", error.context());
            error.with_context(context)
        })?;
        // A slot of VRAM stands at fixed places, as in the shared backing.
        plan.require_ring()?;
        let layers = (0..catalog.layers.len())
            .map(|index| {
                let run = plan.layers[index].transient;
                part(catalog, &image, index, run.as_slice())
            })
            .collect();
        let below = catalog.of_layers(catalog.shards.clone(), layers);
        Ok(Self { image, plan, below })
    }

    /// Bytes of the files that come over the link in each pass.
    #[must_use]
    pub fn link_bytes_per_pass(&self) -> u64 {
        self.below.layer_bytes()
    }

    /// Where each layer's bytes stay, with `below` planned as `lower`.
    #[must_use]
    pub fn shares(&self, catalog: &Catalog, lower: &Plan) -> Vec<TierShare> {
        let layers = catalog.layers.iter().zip(&self.below.layers);
        layers
            .zip(&lower.layers)
            .map(|((layer, below), planned)| TierShare {
                vram_bytes: layer.bytes - below.bytes,
                memory_bytes: planned.resident_bytes,
                drive_bytes: below.bytes - planned.resident_bytes,
            })
            .collect()
    }
}

/// What of a layer lies in runs of the image, where the files have it.
fn part(catalog: &Catalog, image: &Image, index: usize, runs: &[PageRun]) -> Layer {
    let layer = &catalog.layers[index];
    let holds = |used: &Use, file: &Extent| {
        used.extent.shard_index == file.shard_index
            && (used.extent.offset_bytes..used.extent.end_bytes()).contains(&file.offset_bytes)
    };
    let mut uses: Vec<Use> = runs
        .iter()
        .flat_map(|run| image.pieces_in(index, run, VRAM_PAGE_BYTES))
        .filter(|piece| piece.file.len_bytes > 0)
        .filter_map(|piece| {
            let whole = layer.uses.iter().find(|used| holds(used, &piece.file))?;
            Some(Use {
                extent: piece.file,
                ..*whole
            })
        })
        .collect();
    uses.sort_unstable_by_key(|used| used.extent);
    Layer {
        kind: layer.kind,
        label: layer.label.clone(),
        extents: uses.iter().map(|used| used.extent).collect(),
        bytes: uses.iter().map(|used| used.extent.len_bytes).sum(),
        uses,
    }
}

/// How fast the two ways into VRAM are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TierRates {
    /// From the drive into host memory.
    pub drive_bytes_per_second: f64,
    /// From pinned host memory into VRAM.
    pub link_bytes_per_second: f64,
}

/// What sets the speed of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading from the drive.
    Drive,
    /// The link into VRAM.
    Link,
    /// Computing.
    Compute,
}

impl Bound {
    /// As it is printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drive => "drive",
            Self::Link => "link",
            Self::Compute => "compute",
        }
    }
}

/// What a pass takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TierTimes {
    /// All bytes over the link.
    pub link_seconds: f64,
    /// The drive's bytes.
    pub drive_seconds: f64,
    /// Computing, as given.
    pub compute_seconds: f64,
    /// The longest of them.
    pub bound: Bound,
}

impl TierTimes {
    /// The times of `shares` at these rates.
    ///
    /// # Errors
    /// `Invalid` for rates that are not positive or a time that is negative.
    pub fn new(shares: &[TierShare], rates: &TierRates, compute_seconds: f64) -> Result<Self> {
        let rates_given = [rates.drive_bytes_per_second, rates.link_bytes_per_second];
        let is_rate = |rate: &f64| *rate > 0.0 && rate.is_finite();
        let is_time = compute_seconds >= 0.0 && compute_seconds.is_finite();
        if !rates_given.iter().all(is_rate) || !is_time {
            let context = format!("{rates:?} and {compute_seconds} s are nothing to predict with");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let sum = |bytes: fn(&TierShare) -> u64| shares.iter().map(bytes).sum::<u64>() as f64;
        let link_seconds = sum(TierShare::link_bytes) / rates.link_bytes_per_second;
        let drive_seconds = sum(|share| share.drive_bytes) / rates.drive_bytes_per_second;
        let bound = if compute_seconds >= link_seconds.max(drive_seconds) {
            Bound::Compute
        } else if link_seconds >= drive_seconds {
            Bound::Link
        } else {
            Bound::Drive
        };
        Ok(Self {
            link_seconds,
            drive_seconds,
            compute_seconds,
            bound,
        })
    }

    /// One pass: drive, link and compute work at the same time.
    #[must_use]
    pub const fn seconds_per_pass(&self) -> f64 {
        self.link_seconds
            .max(self.drive_seconds)
            .max(self.compute_seconds)
    }
}

/// The least weight budget in host memory with which the drive finishes no later than the link: what `below` would then
/// keep in memory, and its ring. `None` where the drive is as fast as the link, so that no byte needs to be kept.
///
/// # Errors
/// As [`plan`].
pub fn balance(below: &Catalog, options: &PlanOptions, rates: &TierRates) -> Result<Option<u64>> {
    if rates.drive_bytes_per_second >= rates.link_bytes_per_second {
        return Ok(None);
    }
    options.check()?;
    let link_bytes = below.layer_bytes() as f64;
    let share = rates.drive_bytes_per_second / rates.link_bytes_per_second;
    let drive_pages = (link_bytes * share) as u64 / options.page_bytes;
    let ground = Ground::survey(below, options.page_bytes)?;
    let lengths: Vec<u64> = ground.lengths().collect();
    // Longer slots than those of the smallest budget would cost memory and not save any.
    let smallest = Need::smallest(&ground, options.slots_count);
    let slot_pages = level(&lengths, drive_pages).min(smallest.slot_pages);
    let kept: u64 = lengths
        .iter()
        .map(|length| length.saturating_sub(slot_pages))
        .sum();
    let ring = u64::from(options.slots_count) * slot_pages;
    let pages = kept + ring + ground.always_resident_pages();
    Ok(Some(pages.saturating_mul(options.page_bytes)))
}

/// The largest `t` with which `sum_i min(L_i, t)` is at most `pages`: with the lengths in order, the layers shorter than
/// `t` give all they have and the others `t` each, so it is a division once it is known how many are shorter.
fn level(lengths: &[u64], pages: u64) -> u64 {
    let mut sorted = lengths.to_vec();
    sorted.sort_unstable();
    let mut given = 0;
    for (index, &length) in sorted.iter().enumerate() {
        let rest = (sorted.len() - index) as u64;
        if given + length * rest > pages {
            return (pages - given) / rest;
        }
        given += length;
    }
    sorted.last().copied().unwrap_or(0)
}

#[cfg(test)]
#[path = "tiers_tests.rs"]
mod tests;
