//! The plan of a mixture of experts: what every token uses is resident, experts come and go in slots of a cache.
//!
//! A *unit* is one expert's part of one stacked tensor (`ffn_up_exps` holds 128 of them): fetched, leased and evicted as a
//! whole. Invariants, each a property test in `experts_properties.rs`:
//!
//! * `resident_bytes + cache_bytes <= weight_budget_bytes`, always;
//! * every planned page is resident or in exactly one unit's run, and no unit's run holds a byte of anything else;
//! * every class of slots can hold the experts that one token uses in one layer.
//!
//! **Pages that two experts share** (an expert rarely ends on a page's edge) are resident. The other way would be to read
//! them with each of the two. With M pages for U units of u pages of their own, and a use of any unit as likely as of any
//! other: resident, a slot takes u pages and (M - U) / u units fit, so a use reads u (1 - (M - U) / uU) = u + 1 - M / U
//! pages; read twice, a slot takes u + 2 pages and a use reads (u + 2) (1 - M / (u + 2) U) = u + 2 - M / U. Resident is
//! cheaper by one page for every use, whatever M is; skew makes the last slots of a cache worth less and the difference
//! larger. So there is nothing to choose, as long as they fit, and what fits without them does not hold a layer's experts.
//!
//! Pure, like all of plan. Place: file -> catalog -> **plan** -> reader -> pool -> lease -> host.

use super::{LayerPlan, PageRun, Plan, residency};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Catalog;
use crate::units::{Extent, HumanBytes, PAGE_2M, PAGE_4K};

/// Sizes of experts this close, as a share of the larger one's, use the same slots.
const CLASS_SPREAD: u64 = 16;

/// What the planner may choose from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertOptions {
    /// 4096 or 2 MiB.
    pub page_bytes: u64,
    /// How unevenly the experts of a layer are used, for the prediction: the exponent of a Zipf law. 0: all alike, which
    /// no cache gets anything out of but its share.
    pub skew: f64,
}

impl Default for ExpertOptions {
    fn default() -> Self {
        Self {
            page_bytes: PAGE_4K,
            skew: 0.0,
        }
    }
}

/// One expert's part of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Its bytes. The first and the last few may lie in resident pages.
    pub extent: Extent,
    /// The pages that are its alone.
    pub run: PageRun,
    /// The layer that uses it.
    pub layer: u32,
    /// Its number in the layer.
    pub expert_index: u32,
    /// Which of [`ExpertPlan::classes`] its slots are of.
    pub class: u32,
}

/// Slots of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotClass {
    /// Pages of a slot: the longest run of its units.
    pub slot_pages: u64,
    /// How many units use them.
    pub units_count: u32,
    /// How many slots there are.
    pub slots_count: u32,
    /// Fewest there can be: what one token uses in one layer.
    pub slots_least_count: u32,
}

/// The part of a [`Plan`] that is about experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertPlan {
    /// All units with pages of their own, in the order of shards and offsets.
    pub units: Vec<Unit>,
    /// The sizes of slots.
    pub classes: Vec<SlotClass>,
    /// Memory of all slots.
    pub cache_bytes: u64,
    /// Bytes of all experts, their parts in resident pages included.
    pub experts_bytes: u64,
    /// Resident pages that are there because two experts share them.
    pub shared_bytes: u64,
    /// Experts of a layer that a token uses.
    pub used_count: u32,
    /// The skew that the next two figures assume.
    pub skew: f64,
    /// Predicted share of uses that find their unit in the cache, 0 to 1.
    pub hit_rate: f64,
    /// What a token reads if every use misses.
    pub used_bytes_per_token: u64,
}

impl ExpertPlan {
    /// The slots of all classes together.
    #[must_use]
    pub fn slots_count(&self) -> u32 {
        self.classes.iter().map(|class| class.slots_count).sum()
    }
}

/// True when the model has experts that can be fetched one by one: stacked in one tensor, more than a token uses.
#[must_use]
pub fn has_experts(catalog: &Catalog) -> bool {
    let stacked = |tensor: &crate::model::catalog::Tensor| {
        tensor.layers.is_some() && tensor.experts.is_some_and(|experts| experts.count > 1)
    };
    used_count(catalog).is_some() && catalog.tensors.iter().any(stacked)
}

fn used_count(catalog: &Catalog) -> Option<u32> {
    let used = catalog.experts_used_count?;
    let used = u32::try_from(used).ok()?;
    (used > 0 && catalog.expert_count.is_none_or(|all| u64::from(used) < all)).then_some(used)
}

/// The smallest weight budget for which [`plan`] gives a plan.
///
/// # Errors
/// `Invalid` for a page size that is none, `Unsupported` for a model without experts.
pub fn smallest_budget_bytes(catalog: &Catalog, options: &ExpertOptions) -> Result<u64> {
    let survey = Survey::new(catalog, options)?;
    Ok(survey.smallest_pages().saturating_mul(options.page_bytes))
}

/// Splits `weight_budget_bytes` between what every token uses and a cache of experts.
///
/// # Errors
/// `Refused` when the budget is too small, with the arithmetic; those of [`smallest_budget_bytes`].
pub fn plan(catalog: &Catalog, weight_budget_bytes: u64, options: &ExpertOptions) -> Result<Plan> {
    let mut survey = Survey::new(catalog, options)?;
    let page_bytes = options.page_bytes;
    let budget_pages = weight_budget_bytes / page_bytes;
    if budget_pages < survey.smallest_pages() {
        return Err(survey.refusal(weight_budget_bytes));
    }
    survey.fill(budget_pages);
    let cache_pages = survey.cache_pages(|class| class.slots_count);
    if survey.resident_pages + cache_pages > budget_pages {
        return Err(Error::new(
            ErrorKind::Internal,
            format!(
                "a plan of {} resident and {cache_pages} cached pages exceeds its budget of {budget_pages}; please \
                 report this",
                survey.resident_pages
            ),
        ));
    }
    let layer = |layer: &crate::model::Layer| LayerPlan {
        transient: None,
        transient_bytes: 0,
        resident_bytes: layer.bytes,
        slot_index: None,
    };
    let mut layers: Vec<LayerPlan> = catalog.layers.iter().map(layer).collect();
    for unit in &survey.units {
        let own = unit.run.extent(page_bytes, u64::MAX);
        let first = own.offset_bytes.max(unit.extent.offset_bytes);
        let end = own.end_bytes().min(unit.extent.end_bytes());
        layers[unit.layer as usize].resident_bytes -= end.saturating_sub(first);
    }
    let hit_rate = survey.hit_rate(catalog, options.skew);
    let misses = survey.used_bytes_per_token as f64 * (1.0 - hit_rate);
    Ok(Plan {
        page_bytes,
        slots_count: 0,
        slot_pages: 0,
        layers,
        resident_bytes: survey.resident_pages * page_bytes,
        ring_bytes: 0,
        streamed_bytes_per_pass: misses.round() as u64,
        weight_budget_bytes,
        smallest_budget_bytes: survey.smallest_pages() * page_bytes,
        always_resident_bytes: survey.resident_pages * page_bytes,
        resident: survey.resident,
        experts: Some(ExpertPlan {
            units: survey.units,
            cache_bytes: cache_pages * page_bytes,
            classes: survey.classes,
            experts_bytes: survey.experts_bytes,
            shared_bytes: survey.shared_pages * page_bytes,
            used_count: survey.used_count,
            skew: options.skew,
            hit_rate,
            used_bytes_per_token: survey.used_bytes_per_token,
        }),
    })
}

/// A byte range of the files that a pass may use: an expert's, or anything else of a layer.
#[derive(Debug, Clone, Copy)]
struct Part {
    extent: Extent,
    expert: Option<(u32, u32)>,
}

/// What the files hold, told apart.
#[derive(Debug)]
struct Survey {
    page_bytes: u64,
    resident: Vec<PageRun>,
    resident_pages: u64,
    shared_pages: u64,
    units: Vec<Unit>,
    classes: Vec<SlotClass>,
    experts_bytes: u64,
    used_count: u32,
    used_bytes_per_token: u64,
}

impl Survey {
    fn new(catalog: &Catalog, options: &ExpertOptions) -> Result<Self> {
        if options.page_bytes != PAGE_4K && options.page_bytes != PAGE_2M {
            let context = format!(
                "page_bytes is {}: only {PAGE_4K} and {PAGE_2M} are possible",
                options.page_bytes
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if !(options.skew >= 0.0 && options.skew.is_finite()) {
            let context = format!("{} is not a skew of experts; 0 or more is", options.skew);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let used_count = used_count(catalog).filter(|_| has_experts(catalog));
        let Some(used_count) = used_count else {
            let context = format!(
                "{}: no experts that could be fetched one by one",
                catalog.shards[0].path.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, context));
        };
        let mut survey = Self {
            page_bytes: options.page_bytes,
            resident: Vec::new(),
            resident_pages: 0,
            shared_pages: 0,
            units: Vec::new(),
            classes: Vec::new(),
            experts_bytes: 0,
            used_count,
            used_bytes_per_token: 0,
        };
        let parts = parts(catalog)?;
        survey.tell_apart(&parts);
        survey.add_up(catalog);
        survey.classify(catalog.layers.len());
        Ok(survey)
    }

    /// Gives each expert the pages that are its alone; everything else that is used is resident.
    fn tell_apart(&mut self, parts: &[Part]) {
        let page = self.page_bytes;
        let mut resident: Vec<PageRun> = Vec::new();
        let mut shared: Vec<PageRun> = Vec::new();
        // One past the last page of everything before this part, in its shard.
        let mut before = (u32::MAX, 0);
        for (index, part) in parts.iter().enumerate() {
            let extent = part.extent;
            let shard_index = extent.shard_index;
            let first = extent.offset_bytes / page;
            let end = extent.end_bytes().div_ceil(page);
            let next = parts[index + 1..]
                .first()
                .filter(|next| next.extent.shard_index == shard_index)
                .map_or(u64::MAX, |next| next.extent.offset_bytes / page);
            let taken = if before.0 == shard_index { before.1 } else { 0 };
            before = (shard_index, end.max(taken));
            let run = |first_page: u64, end_page: u64| PageRun {
                shard_index,
                first_page,
                page_count: end_page.saturating_sub(first_page),
            };
            let Some((layer, expert_index)) = part.expert else {
                resident.push(run(first, end));
                continue;
            };
            self.experts_bytes += extent.len_bytes;
            let own = run(first.max(taken), end.min(next));
            if own.page_count == 0 {
                shared.push(run(first, end));
                continue;
            }
            shared.extend([run(first, own.first_page), run(own.end_page(), end)]);
            self.units.push(Unit {
                extent,
                run: own,
                layer,
                expert_index,
                class: 0,
            });
        }
        let always_pages = count(&residency::union(resident.clone()));
        resident.extend(shared);
        self.resident = residency::union(resident);
        self.resident_pages = count(&self.resident);
        self.shared_pages = self.resident_pages - always_pages;
    }

    fn add_up(&mut self, catalog: &Catalog) {
        for tensor in &catalog.tensors {
            if let Some(experts) = tensor
                .experts
                .filter(|e| e.count > 1 && tensor.layers.is_some())
            {
                let each_bytes = tensor.extent.len_bytes / u64::from(experts.count);
                self.used_bytes_per_token +=
                    each_bytes * u64::from(self.used_count.min(experts.count));
            }
        }
    }

    /// Sorts the units into classes of about one size.
    fn classify(&mut self, layers_count: usize) {
        let mut sizes: Vec<u64> = self
            .units
            .iter()
            .map(|unit| unit.extent.len_bytes)
            .collect();
        sizes.sort_unstable_by_key(|size| std::cmp::Reverse(*size));
        sizes.dedup();
        // The largest size of each class, descending.
        let mut largest: Vec<u64> = Vec::new();
        for size in sizes {
            if largest
                .last()
                .is_none_or(|top| size < top - top / CLASS_SPREAD)
            {
                largest.push(size);
            }
        }
        // Experts that are used, per layer and class.
        let mut used = vec![0u32; largest.len() * layers_count];
        self.classes = vec![
            SlotClass {
                slot_pages: 0,
                units_count: 0,
                slots_count: 0,
                slots_least_count: 0,
            };
            largest.len()
        ];
        let mut in_tensor = 0;
        let mut previous: Option<Unit> = None;
        for unit in &mut self.units {
            let class = largest.partition_point(|top| *top >= unit.extent.len_bytes) - 1;
            unit.class = class as u32;
            let entry = &mut self.classes[class];
            entry.units_count += 1;
            entry.slot_pages = entry.slot_pages.max(unit.run.page_count);
            // Of one stack, whose experts follow each other, a token uses no more than used_count.
            let follows = previous.is_some_and(|previous| {
                (previous.layer, previous.class) == (unit.layer, unit.class)
                    && previous.expert_index < unit.expert_index
            });
            in_tensor = if follows { in_tensor + 1 } else { 1 };
            if in_tensor <= self.used_count {
                used[class * layers_count + unit.layer as usize] += 1;
            }
            previous = Some(*unit);
        }
        for (class, of_layers) in self
            .classes
            .iter_mut()
            .zip(used.chunks(layers_count.max(1)))
        {
            class.slots_least_count = of_layers.iter().copied().max().unwrap_or(0);
            class.slots_count = class.slots_least_count;
        }
    }

    fn cache_pages(&self, slots: impl Fn(&SlotClass) -> u32) -> u64 {
        let pages = |class: &SlotClass| class.slot_pages * u64::from(slots(class));
        self.classes.iter().map(pages).sum()
    }

    fn smallest_pages(&self) -> u64 {
        self.resident_pages + self.cache_pages(|class| class.slots_least_count)
    }

    /// Gives every class the same share of what it could use beyond its least, and the rest to whom it helps.
    fn fill(&mut self, budget_pages: u64) {
        let most = |class: &SlotClass| class.units_count.max(class.slots_least_count);
        let left = budget_pages - self.smallest_pages();
        let wanted = self.cache_pages(most) - self.cache_pages(|class| class.slots_least_count);
        let mut rest = left;
        for class in &mut self.classes {
            let more = u64::from(most(class) - class.slots_least_count);
            let share = u128::from(more) * u128::from(left.min(wanted)) / u128::from(wanted.max(1));
            let share = share as u32;
            class.slots_count = class.slots_least_count + share;
            rest -= class.slot_pages * u64::from(share);
        }
        for class in &mut self.classes {
            let room = most(class) - class.slots_count;
            let more = (rest / class.slot_pages.max(1)).min(u64::from(room));
            class.slots_count += more as u32;
            rest -= class.slot_pages * more;
        }
    }

    /// The share of uses that hit, over all classes by bytes.
    fn hit_rate(&self, catalog: &Catalog, skew: f64) -> f64 {
        let experts_count = catalog.expert_count.unwrap_or(1);
        let bytes = |class: &SlotClass| (class.slot_pages * u64::from(class.units_count)) as f64;
        let all: f64 = self.classes.iter().map(bytes).sum();
        if all <= 0.0 {
            return 1.0;
        }
        let hits = self.classes.iter().map(|class| {
            let share = f64::from(class.slots_count) / f64::from(class.units_count.max(1));
            bytes(class) * hit_rate(experts_count, share.min(1.0), skew)
        });
        (hits.sum::<f64>() / all).clamp(0.0, 1.0)
    }

    fn refusal(&self, weight_budget_bytes: u64) -> Error {
        let bytes = |pages: u64| HumanBytes(pages.saturating_mul(self.page_bytes));
        let smallest = self.smallest_pages();
        Error::new(
            ErrorKind::Refused,
            format!(
                "a weight budget of {} ({weight_budget_bytes} bytes) is too small: {} are used by every token and stay \
                 resident, {} of it pages that experts share, and the {} experts that a token uses in one layer take {}; \
                 the smallest budget that works is {} ({} bytes)",
                HumanBytes(weight_budget_bytes),
                bytes(self.resident_pages),
                bytes(self.shared_pages),
                self.used_count,
                bytes(smallest - self.resident_pages),
                bytes(smallest),
                smallest.saturating_mul(self.page_bytes),
            ),
        )
    }
}

/// All parts of all layers, in the order of the files; stacks of experts as one part for each.
fn parts(catalog: &Catalog) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (layer, entry) in (0u32..).zip(&catalog.layers) {
        for part in entry.uses.iter().filter(|part| part.extent.len_bytes > 0) {
            let shard = catalog.shards.get(part.extent.shard_index as usize);
            if shard.is_none_or(|shard| part.extent.end_bytes() > shard.len_bytes) {
                return Err(residency::outside_file(entry, &part.extent));
            }
            let tensor = catalog.tensors.get(part.tensor_index as usize);
            let stack = tensor.and_then(|tensor| Some((tensor, tensor.experts?)));
            let Some((tensor, experts)) = stack.filter(|(_, experts)| experts.count > 1) else {
                parts.push(Part {
                    extent: part.extent,
                    expert: None,
                });
                continue;
            };
            for expert_index in experts.first..experts.first + experts.count {
                if let Some(extent) = tensor.expert_extent(expert_index) {
                    parts.push(Part {
                        extent,
                        expert: Some((layer, expert_index)),
                    });
                }
            }
        }
    }
    parts.sort_unstable_by_key(|part| part.extent);
    Ok(parts)
}

fn count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.page_count).sum()
}

/// The share of uses that a least-recently-used cache of `share` of `experts_count` experts answers, when the expert of
/// rank r is used in proportion to r^-skew: Che's approximation, which holds for independent uses.
#[must_use]
pub fn hit_rate(experts_count: u64, share: f64, skew: f64) -> f64 {
    if share >= 1.0 {
        return 1.0;
    }
    let weights: Vec<f64> = (1..=experts_count.max(1))
        .map(|rank| (rank as f64).powf(-skew))
        .collect();
    let all: f64 = weights.iter().sum();
    let room = share * weights.len() as f64;
    // The time T after which an unused expert is gone: as many are used within T as there is room for.
    let held = |time: f64| -> f64 { weights.iter().map(|w| 1.0 - (-w / all * time).exp()).sum() };
    let (mut low, mut high) = (0.0, 1.0);
    while held(high) < room && high < 1e18 {
        high *= 2.0;
    }
    for _ in 0..64 {
        let middle = (low + high) / 2.0;
        if held(middle) < room {
            low = middle;
        } else {
            high = middle;
        }
    }
    let hits = weights
        .iter()
        .map(|w| w / all * (1.0 - (-w / all * high).exp()));
    hits.sum::<f64>().clamp(0.0, 1.0)
}

#[cfg(test)]
#[path = "experts_properties.rs"]
mod properties;
