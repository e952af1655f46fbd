//! Residency: which pages a layer could stream, how many of them it does, and which run of them that is.
//!
//! Three steps. *Survey*: every page with planned bytes belongs to one layer or is shared; per layer, the longest stretch
//! of its own pages could be transient, everything else is always resident. *Need*: the smallest slot size `t` whose
//! arithmetic fits the budget, then the leftover pages given back. *Choice*: inside each stretch, the run whose first use
//! is latest. All of it works on page ranges, never page by page: 400 GB in 4 KiB pages are a hundred million pages.

use std::collections::VecDeque;

use super::PageRun;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, Layer, Use};
use crate::units::{Extent, KIB};

/// A hole of fewer bytes between two stretches of one layer is read along: at drive rate it costs less than a second
/// request would. The same bound the catalog merges extents by.
const GAP_BYTES_MAX: u64 = 64 * KIB;

/// `pages` in bytes, at most `u64::MAX`: for messages about budgets no machine has.
pub(super) fn saturating_bytes(pages: u128, page_bytes: u64) -> u64 {
    u64::try_from(pages.saturating_mul(u128::from(page_bytes))).unwrap_or(u64::MAX)
}

/// The first page an extent touches, and one past the last. The extent is not empty.
fn page_range(extent: &Extent, page_bytes: u64) -> (u64, u64) {
    let first = extent.offset_bytes / page_bytes;
    (first, (extent.end_bytes() - 1) / page_bytes + 1)
}

/// Consecutive pages with planned bytes, all of one layer or all shared.
#[derive(Debug, Clone, Copy)]
struct Segment {
    run: PageRun,
    /// The one layer whose bytes are here; `None` where there are several.
    owner: Option<u32>,
}

/// Where a layer begins or ends to touch pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    shard_index: u32,
    page: u64,
    layer_index: u32,
    opens: bool,
}

/// What the file offers: for each layer the stretch that could be transient, and everything that cannot.
#[derive(Debug)]
pub(super) struct Ground {
    /// Per layer, its longest run of pages of its own; `None` when it has no page to itself.
    stretches: Vec<Option<PageRun>>,
    /// Always resident, sorted.
    fixed: Vec<PageRun>,
}

impl Ground {
    /// Surveys the pages of `catalog`.
    pub(super) fn survey(catalog: &Catalog, page_bytes: u64) -> Result<Self> {
        let segments = segments(&edges(catalog, page_bytes)?, catalog.layers.len());
        let stretches = longest_stretches(&segments, catalog.layers.len(), page_bytes);
        let is_fixed = |segment: &&Segment| match segment.owner {
            Some(layer) => !stretches[layer as usize].is_some_and(|s| holds(&s, &segment.run)),
            None => true,
        };
        let fixed = segments.iter().filter(is_fixed).map(|s| s.run).collect();
        Ok(Self { stretches, fixed })
    }

    /// Pages that are resident under every budget.
    pub(super) fn always_resident_pages(&self) -> u64 {
        self.fixed.iter().map(|run| run.page_count).sum()
    }

    /// `L_i`: the pages each layer could stream.
    pub(super) fn lengths(&self) -> impl Iterator<Item = u64> + '_ {
        self.stretches.iter().map(|s| s.map_or(0, |s| s.page_count))
    }

    #[cfg(test)]
    pub(super) fn stretches(&self) -> &[Option<PageRun>] {
        &self.stretches
    }

    /// Every page that no run streams: sorted, disjoint, neighbours merged.
    pub(super) fn resident(&self, runs: &[Option<PageRun>]) -> Vec<PageRun> {
        let mut pieces = self.fixed.clone();
        for (stretch, run) in self.stretches.iter().zip(runs) {
            match (stretch, run) {
                (Some(stretch), Some(run)) => pieces.extend(around(stretch, run)),
                (Some(stretch), None) => pieces.push(*stretch),
                (None, _) => {}
            }
        }
        pieces.retain(|piece| piece.page_count > 0);
        pieces.sort_unstable();
        merge(&pieces)
    }
}

fn holds(outer: &PageRun, inner: &PageRun) -> bool {
    outer.shard_index == inner.shard_index
        && outer.first_page <= inner.first_page
        && inner.end_page() <= outer.end_page()
}

/// What is left of `stretch` before and after `run`.
fn around(stretch: &PageRun, run: &PageRun) -> [PageRun; 2] {
    let piece = |first_page: u64, end_page: u64| PageRun {
        shard_index: stretch.shard_index,
        first_page,
        page_count: end_page - first_page,
    };
    [
        piece(stretch.first_page, run.first_page),
        piece(run.end_page(), stretch.end_page()),
    ]
}

/// Runs in any order, overlapping or not, as sorted disjoint ones with neighbours merged.
pub(super) fn union(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    runs.retain(|run| run.page_count > 0);
    runs.sort_unstable();
    let mut merged: Vec<PageRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            Some(last)
                if last.shard_index == run.shard_index && run.first_page <= last.end_page() =>
            {
                last.page_count = last.end_page().max(run.end_page()) - last.first_page;
            }
            _ => merged.push(run),
        }
    }
    merged
}

fn merge(sorted: &[PageRun]) -> Vec<PageRun> {
    let mut merged: Vec<PageRun> = Vec::with_capacity(sorted.len());
    for run in sorted {
        match merged.last_mut() {
            Some(last)
                if last.shard_index == run.shard_index && last.end_page() == run.first_page =>
            {
                last.page_count += run.page_count;
            }
            _ => merged.push(*run),
        }
    }
    merged
}

/// Both ends of every run of pages that a layer touches, sorted by place.
fn edges(catalog: &Catalog, page_bytes: u64) -> Result<Vec<Edge>> {
    let mut edges = Vec::new();
    for (layer_index, layer) in (0u32..).zip(&catalog.layers) {
        for run in touched_runs(catalog, layer, page_bytes)? {
            let ends = [(run.first_page, true), (run.end_page(), false)];
            edges.extend(ends.map(|(page, opens)| Edge {
                shard_index: run.shard_index,
                page,
                layer_index,
                opens,
            }));
        }
    }
    edges.sort_unstable();
    Ok(edges)
}

/// The pages a layer touches. Uses that follow one another in the file make one run, so that a layer of a thousand
/// tensors costs no more than a layer of one; runs that overlap all the same are harmless.
///
/// The catalog has been checked when it was made; a use outside its file would make pages that cannot be read, so it is
/// an error here too.
fn touched_runs(catalog: &Catalog, layer: &Layer, page_bytes: u64) -> Result<Vec<PageRun>> {
    let mut runs: Vec<PageRun> = Vec::new();
    for extent in layer.uses.iter().map(|u| &u.extent) {
        let shard = catalog.shards.get(extent.shard_index as usize);
        if shard.is_none_or(|shard| extent.end_bytes() > shard.len_bytes) {
            return Err(outside_file(layer, extent));
        }
        if extent.len_bytes == 0 {
            continue;
        }
        let (first_page, end_page) = page_range(extent, page_bytes);
        match runs.last_mut() {
            Some(last)
                if last.shard_index == extent.shard_index
                    && (last.first_page..=last.end_page()).contains(&first_page) =>
            {
                last.page_count = last.end_page().max(end_page) - last.first_page;
            }
            _ => runs.push(PageRun {
                shard_index: extent.shard_index,
                first_page,
                page_count: end_page - first_page,
            }),
        }
    }
    Ok(runs)
}

pub(super) fn outside_file(layer: &Layer, extent: &Extent) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "layer {} has {} bytes at offset {} of shard {}, which is not that long",
            layer.label, extent.len_bytes, extent.offset_bytes, extent.shard_index
        ),
    )
}

/// Walks the edges of all layers once and tells, between each two, whose pages these are.
fn segments(edges: &[Edge], layers_count: usize) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut open_count = vec![0u32; layers_count];
    let mut present_count = 0u32;
    // The sum of the indices of the layers present: with one layer present it is that layer.
    let mut present_sum = 0u64;
    for (at, edge) in edges.iter().enumerate() {
        let open = &mut open_count[edge.layer_index as usize];
        if edge.opens {
            *open += 1;
            if *open == 1 {
                present_count += 1;
                present_sum += u64::from(edge.layer_index);
            }
        } else {
            *open -= 1;
            if *open == 0 {
                present_count -= 1;
                present_sum -= u64::from(edge.layer_index);
            }
        }
        let Some(next) = edges.get(at + 1) else { break };
        // With no layer present the next edge may be in another shard, or far away.
        if present_count == 0 || next.page == edge.page {
            continue;
        }
        let owner = (present_count == 1).then_some(present_sum as u32);
        let run = PageRun {
            shard_index: edge.shard_index,
            first_page: edge.page,
            page_count: next.page - edge.page,
        };
        match segments.last_mut() {
            Some(last) if last.owner == owner && adjoins(&last.run, &run) => {
                last.run.page_count += run.page_count;
            }
            _ => segments.push(Segment { run, owner }),
        }
    }
    segments
}

fn adjoins(left: &PageRun, right: &PageRun) -> bool {
    left.shard_index == right.shard_index && left.end_page() == right.first_page
}

/// Per layer the longest stretch; of equals, the first in the file. Pages without planned bytes belong to the stretch
/// they lie in (they are read along, or resident along), so that a stretch of L pages costs L pages either way.
fn longest_stretches(
    segments: &[Segment],
    layers_count: usize,
    page_bytes: u64,
) -> Vec<Option<PageRun>> {
    let mut longest: Vec<Option<PageRun>> = vec![None; layers_count];
    let mut current: Option<(u32, PageRun)> = None;
    for segment in segments {
        let Some(owner) = segment.owner else {
            current = None;
            continue;
        };
        let stretch = match current {
            Some((layer, stretch))
                if layer == owner && near(&stretch, &segment.run, page_bytes) =>
            {
                PageRun {
                    page_count: segment.run.end_page() - stretch.first_page,
                    ..stretch
                }
            }
            _ => segment.run,
        };
        current = Some((owner, stretch));
        let best = &mut longest[owner as usize];
        if best.is_none_or(|best| best.page_count < stretch.page_count) {
            *best = Some(stretch);
        }
    }
    longest
}

fn near(left: &PageRun, right: &PageRun, page_bytes: u64) -> bool {
    left.shard_index == right.shard_index
        && (right.first_page - left.end_page()).saturating_mul(page_bytes) < GAP_BYTES_MAX
}

/// The arithmetic of one slot size: `held + slots * t + always_resident` pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    /// `t`.
    pub(super) slot_pages: u64,
    /// As asked for; the ring is empty when `t` is 0.
    pub(super) slots_count: u32,
    /// What the layers hold beyond a slot: the sum of `max(0, L_i - t)`.
    pub(super) held_pages: u128,
    /// Shared pages and pages apart from their layer's stretch.
    pub(super) always_resident_pages: u64,
}

impl Need {
    fn at(ground: &Ground, slots_count: u32, slot_pages: u64) -> Self {
        let held = |length: u64| u128::from(length.saturating_sub(slot_pages));
        Self {
            slot_pages,
            slots_count,
            held_pages: ground.lengths().map(held).sum(),
            always_resident_pages: ground.always_resident_pages(),
        }
    }

    /// The need that is smallest. A slot one page smaller saves `slots` pages and makes every layer of at least that
    /// length hold one more, so the need falls with `t` as long as more than `slots` layers are longer, and rises after:
    /// the bottom is at the length of the layer that comes after the `slots` longest.
    pub(super) fn smallest(ground: &Ground, slots_count: u32) -> Self {
        let mut lengths: Vec<u64> = ground.lengths().collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let slot_pages = lengths.get(slots_count as usize).copied().unwrap_or(0);
        Self::at(ground, slots_count, slot_pages)
    }

    /// The need with the smallest `t` that fits, which streams least; `None` when even the smallest need does not fit.
    /// Up to the bottom the need falls with `t`, so the smallest `t` that fits is found by halving. Because one page
    /// less would not fit, more than `slots` layers fill their slot: a plan that streams always uses all its slots.
    pub(super) fn within(ground: &Ground, slots_count: u32, budget_pages: u64) -> Option<Self> {
        let fits = |need: &Self| need.pages() <= u128::from(budget_pages);
        let mut best = Self::smallest(ground, slots_count);
        if !fits(&best) {
            return None;
        }
        let mut too_small = 0;
        while too_small < best.slot_pages {
            let middle = too_small + (best.slot_pages - too_small) / 2;
            let need = Self::at(ground, slots_count, middle);
            if fits(&need) {
                best = need;
            } else {
                too_small = middle + 1;
            }
        }
        Some(best)
    }

    pub(super) fn ring_pages(&self) -> u128 {
        u128::from(self.slots_count) * u128::from(self.slot_pages)
    }

    fn pages(&self) -> u128 {
        self.held_pages + self.ring_pages() + u128::from(self.always_resident_pages)
    }

    pub(super) fn bytes(&self, page_bytes: u64) -> u64 {
        saturating_bytes(self.pages(), page_bytes)
    }

    /// How many pages each layer streams: `min(L_i, t)`, or `t - 1` for as many layers as there are pages left over in
    /// the budget, the first of the pass first. There are fewer pages left over than layers that fill their slot, since
    /// otherwise a smaller `t` had fitted. A fixed order of giving means that no layer ever streams more under a larger
    /// budget.
    pub(super) fn distribute(&self, ground: &Ground, budget_pages: u64) -> Vec<u64> {
        let mut left_over = u128::from(budget_pages) - self.pages();
        let share = |length: u64| {
            if length >= self.slot_pages && self.slot_pages > 0 && left_over > 0 {
                left_over -= 1;
                self.slot_pages - 1
            } else {
                length.min(self.slot_pages)
            }
        };
        ground.lengths().map(share).collect()
    }
}

/// For each layer its transient run of `run_pages` pages; `None` for 0.
pub(super) fn choose_runs(
    catalog: &Catalog,
    ground: &Ground,
    run_pages: &[u64],
    page_bytes: u64,
) -> Vec<Option<PageRun>> {
    let choose = |((layer, stretch), &page_count): ((&Layer, &Option<PageRun>), &u64)| {
        let stretch = (*stretch).filter(|_| page_count > 0)?;
        Some(latest_run(&layer.uses, &stretch, page_count, page_bytes))
    };
    let layers = catalog.layers.iter().zip(&ground.stretches);
    layers.zip(run_pages).map(choose).collect()
}

/// One use as the choice of a run sees it: pages `first..end`, first needed at `order`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Touch {
    first: u64,
    end: u64,
    order: u16,
}

/// Of all runs of `page_count` pages in `stretch`, the one whose first use is latest; of equals, the first in the file.
///
/// The first use of a run changes only where, moving along, it leaves a tensor behind or reaches the next one, so only
/// those places are looked at, with the tensors under the run kept in a queue of candidates for the minimum.
fn latest_run(uses: &[Use], stretch: &PageRun, page_count: u64, page_bytes: u64) -> PageRun {
    let touches = touches(uses, stretch, page_bytes);
    let last_start = stretch.end_page() - page_count;
    let mut starts = vec![stretch.first_page];
    for touch in &touches {
        starts.push(touch.end);
        // The first start at which the run reaches this tensor.
        starts.push((touch.first + 1).saturating_sub(page_count));
    }
    starts.retain(|start| (stretch.first_page..=last_start).contains(start));
    starts.sort_unstable();
    starts.dedup();

    let mut coming = touches.iter().peekable();
    let mut under: VecDeque<&Touch> = VecDeque::new();
    // A run in a hole has no use at all: `None`, which is less than any order, so that it is never preferred.
    let mut best: Option<(Option<u16>, u64)> = None;
    for start in starts {
        while let Some(touch) = coming.next_if(|touch| touch.first < start + page_count) {
            while under.back().is_some_and(|last| {
                // A later neighbour that is needed no later and stays no shorter stands for this one.
                last.order >= touch.order && last.end <= touch.end
            }) {
                under.pop_back();
            }
            under.push_back(touch);
        }
        under.retain(|touch| touch.end > start);
        let first_use = under.iter().map(|touch| touch.order).min();
        if best.is_none_or(|(order, _)| first_use > order) {
            best = Some((first_use, start));
        }
    }
    PageRun {
        shard_index: stretch.shard_index,
        first_page: best.map_or(stretch.first_page, |(_, start)| start),
        page_count,
    }
}

/// The uses that touch `stretch`, by place.
fn touches(uses: &[Use], stretch: &PageRun, page_bytes: u64) -> Vec<Touch> {
    let mut touches: Vec<Touch> = uses
        .iter()
        .filter(|u| u.extent.shard_index == stretch.shard_index && u.extent.len_bytes > 0)
        .map(|u| {
            let (first, end) = page_range(&u.extent, page_bytes);
            Touch {
                first,
                end,
                order: u.order,
            }
        })
        .filter(|touch| touch.first < stretch.end_page() && stretch.first_page < touch.end)
        .collect();
    touches.sort_unstable();
    touches
}
