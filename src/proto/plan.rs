//! The plan of a model in the daemon, as its clients need it: which run of pages lies where in the pool's file.

use crate::engine::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::mem::PoolFile;
use crate::model::{Catalog, Layer};
use crate::plan::PageRun;
use serde::{Deserialize, Serialize};

/// One run of pages and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// The layer whose transient run it is; absent for a resident run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<u32>,
    /// The slot of a transient run: two layers of one slot are never there together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// The file of the model.
    pub shard: u32,
    /// First page in it.
    pub page: u64,
    /// Number of pages.
    pub pages: u64,
    /// First byte in the pool's file; of a transient run, while it lies in its own slot.
    pub offset: u64,
}

impl Placed {
    fn run(&self) -> PageRun {
        PageRun {
            shard_index: self.shard,
            first_page: self.page,
            page_count: self.pages,
        }
    }
}

/// What every page of the answer to `plan` says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Number of the plan. Pages of different plans do not belong together: begin again.
    pub generation: u32,
    /// Page size.
    pub page_bytes: u64,
    /// Slots of the ring.
    pub slots_count: u32,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Where slot 0 begins in the pool's file; the others follow.
    pub ring_offset: u64,
    /// Most transient layers that a client may hold.
    pub holds_max: u32,
    /// What weights may take.
    pub weight_budget_bytes: u64,
    /// What stays in memory.
    pub resident_bytes: u64,
    /// All slots.
    pub ring_bytes: u64,
    /// Read per pass.
    pub streamed_bytes_per_pass: u64,
}

/// Every run of a model's plan, transient ones first; and the figures, but for `generation`.
///
/// # Errors
/// `Internal` for a model without a plan.
pub fn describe(model: &Model) -> Result<(Figures, Vec<Placed>)> {
    let plan = model
        .plan()
        .ok_or_else(|| Error::new(ErrorKind::Internal, "no plan was made yet"))?;
    let slots_count = model.ring_slots_count();
    let placed = |run: &PageRun, layer: Option<u32>, slot: Option<u32>| Placed {
        layer,
        slot,
        shard: run.shard_index,
        page: run.first_page,
        pages: run.page_count,
        offset: model.pool_offset_bytes(run).unwrap_or(u64::MAX),
    };
    let transient = (0u32..).zip(&plan.layers).filter_map(|(layer, entry)| {
        let run = entry.transient.as_ref()?;
        Some(placed(run, Some(layer), entry.slot_index))
    });
    let resident = plan.resident.iter().map(|run| placed(run, None, None));
    let figures = Figures {
        generation: 0,
        page_bytes: plan.page_bytes,
        slots_count,
        slot_bytes: plan.slot_pages * plan.page_bytes,
        ring_offset: model.ring_offset_bytes(),
        holds_max: holds_max(slots_count),
        weight_budget_bytes: plan.weight_budget_bytes,
        resident_bytes: plan.resident_bytes,
        ring_bytes: plan.ring_bytes,
        streamed_bytes_per_pass: plan.streamed_bytes_per_pass,
    };
    Ok((figures, transient.chain(resident).collect()))
}

/// Most transient layers one client may hold on a ring of so many slots: one slot stays for the stream, one for others.
#[must_use]
pub const fn holds_max(slots_count: u32) -> u32 {
    if slots_count > 3 { slots_count - 2 } else { 1 }
}

/// A plan as a client keeps it.
#[derive(Debug)]
pub struct ClientPlan {
    /// What it says in numbers.
    pub figures: Figures,
    /// The pool.
    pub pool: PoolFile,
    transient: Vec<Option<Placed>>,
    resident: Vec<Placed>,
}

impl ClientPlan {
    /// Puts the pages of an answer together.
    ///
    /// # Errors
    /// `Connection` for a plan that cannot be one of this model.
    pub fn new(
        figures: Figures,
        pool: PoolFile,
        runs: Vec<Placed>,
        layer_count: usize,
    ) -> Result<Self> {
        let mut plan = Self {
            figures,
            pool,
            transient: vec![None; layer_count],
            resident: Vec::new(),
        };
        for run in runs {
            match run.layer {
                None => plan.resident.push(run),
                Some(layer) => match plan.transient.get_mut(layer as usize) {
                    Some(place) => *place = Some(run),
                    None => {
                        let context = format!("the daemon's plan has a layer {layer}");
                        return Err(Error::new(ErrorKind::Connection, context));
                    }
                },
            }
        }
        plan.resident
            .sort_unstable_by_key(|run| (run.shard, run.page));
        if plan.figures.page_bytes == 0 {
            let context = "the daemon's plan has pages of 0 bytes";
            return Err(Error::new(ErrorKind::Connection, context));
        }
        Ok(plan)
    }

    /// The layer's slot, if it is streamed.
    #[must_use]
    pub fn slot(&self, layer: u32) -> Option<u32> {
        self.transient.get(layer as usize)?.and_then(|run| run.slot)
    }

    /// True when the layer has a transient run.
    #[must_use]
    pub fn streams(&self, layer: u32) -> bool {
        self.transient
            .get(layer as usize)
            .is_some_and(Option::is_some)
    }

    /// For a byte range of a layer: whether it touches resident pages, and how many pages of the layer's transient run,
    /// counted from its first, have to be there.
    #[must_use]
    pub fn needs(&self, layer: u32, shard: u32, start: u64, end: u64) -> (bool, u32) {
        let Some(Some(run)) = self.transient.get(layer as usize) else {
            return (true, 0);
        };
        let page_bytes = self.figures.page_bytes;
        let (first, last) = (start / page_bytes, end.div_ceil(page_bytes));
        let run_end = run.page.saturating_add(run.pages);
        if run.shard != shard || last <= run.page || first >= run_end {
            return (true, 0);
        }
        let outside = first < run.page || last > run_end;
        let pages = last.min(run_end) - run.page;
        (outside, u32::try_from(pages).unwrap_or(u32::MAX))
    }

    /// The transient run of a layer and its place in the pool's file, when it lies in `slot`.
    ///
    /// # Errors
    /// `Connection` for a slot that the plan does not have.
    pub fn streamed(&self, layer: u32, slot: u32) -> Result<Option<(PageRun, u64)>> {
        let Some(Some(run)) = self.transient.get(layer as usize) else {
            return Ok(None);
        };
        if run.slot == Some(slot) {
            return Ok(Some((run.run(), run.offset)));
        }
        let figures = &self.figures;
        let place = u64::from(slot).checked_mul(figures.slot_bytes);
        match place.and_then(|place| place.checked_add(figures.ring_offset)) {
            Some(offset) if slot < figures.slots_count => Ok(Some((run.run(), offset))),
            _ => Err(Error::new(
                ErrorKind::Connection,
                format!(
                    "the daemon says that layer {layer} is in slot {slot}; its plan has {}",
                    figures.slots_count
                ),
            )),
        }
    }

    /// The resident pages that a layer lies in, run by run, each with its place in the pool's file.
    ///
    /// # Errors
    /// `Connection` for a page that the plan has no place for; what `each` says.
    pub fn resident_pieces(
        &self,
        catalog: &Catalog,
        layer: u32,
        mut each: impl FnMut(&PageRun, u64) -> Result<()>,
    ) -> Result<()> {
        let Some(entry) = catalog.layers.get(layer as usize) else {
            return Ok(());
        };
        let transient = self.transient[layer as usize];
        for (shard, first, end) in ranges(entry, transient, self.figures.page_bytes) {
            self.pieces(shard, first, end, &mut each)?;
        }
        Ok(())
    }

    /// The resident runs' parts in pages `[first, end)`.
    fn pieces(
        &self,
        shard: u32,
        first: u64,
        end: u64,
        each: &mut impl FnMut(&PageRun, u64) -> Result<()>,
    ) -> Result<()> {
        let from = self.resident.partition_point(|run| {
            (run.shard, run.page.saturating_add(run.pages)) <= (shard, first)
        });
        let mut at = first;
        for run in self.resident[from..]
            .iter()
            .take_while(|run| run.shard == shard && run.page < end)
        {
            let stop = run.page.saturating_add(run.pages).min(end);
            let begin = at.max(run.page);
            if begin > at {
                break;
            }
            if stop <= begin {
                continue;
            }
            let skip = (begin - run.page).saturating_mul(self.figures.page_bytes);
            let piece = PageRun {
                shard_index: shard,
                first_page: begin,
                page_count: stop - begin,
            };
            each(&piece, run.offset.saturating_add(skip))?;
            at = stop;
        }
        if at < end {
            let context = format!("the daemon's plan has no place for page {at} of shard {shard}");
            return Err(Error::new(ErrorKind::Connection, context));
        }
        Ok(())
    }
}

/// The page ranges of a layer's bytes outside its transient run, joined where they touch.
fn ranges(entry: &Layer, transient: Option<Placed>, page_bytes: u64) -> Vec<(u32, u64, u64)> {
    let mut ranges = Vec::with_capacity(entry.uses.len() * 2);
    for used in entry.uses.iter().filter(|used| used.extent.len_bytes > 0) {
        let shard = used.extent.shard_index;
        let first = used.extent.offset_bytes / page_bytes;
        let end = used.extent.end_bytes().div_ceil(page_bytes);
        match transient.filter(|run| run.shard == shard) {
            Some(run) => {
                ranges.push((shard, first, end.min(run.page)));
                ranges.push((shard, first.max(run.page.saturating_add(run.pages)), end));
            }
            None => ranges.push((shard, first, end)),
        }
    }
    ranges.retain(|range| range.1 < range.2);
    ranges.sort_unstable();
    let mut joined: Vec<(u32, u64, u64)> = Vec::with_capacity(ranges.len());
    for (shard, first, end) in ranges {
        match joined.last_mut() {
            Some(last) if last.0 == shard && first <= last.2 => last.2 = last.2.max(end),
            _ => joined.push((shard, first, end)),
        }
    }
    joined
}
