//! Where a GPU's bytes come from: models in host memory, and where in their pools the bytes of the files lie.
//!
//! Invariant: bytes are copied under a lease of the model below, which is given back when the copy is done. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: the lower of the two engines of a GPU.

use std::sync::Arc;
use std::time::Duration;

use super::less;
use crate::engine::layout::Layout;
use crate::engine::{BudgetReport, BudgetSpec, Model, OpenOptions, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::mem::Backing;
use crate::mem::cuda::{Context, Stage};
use crate::model::{Catalog, Layer, LayerKind, Use};
use crate::plan::image::Piece;
use crate::plan::{PageRun, Plan, PlanOptions, SLOTS_DEFAULT, VramPlan, smallest_budget_bytes};
use crate::units::{Extent, PAGE_4K};

/// Bytes of a shard and where they lie in a pool.
#[derive(Debug, Clone, Copy)]
struct Segment {
    shard_index: u32,
    start_bytes: u64,
    end_bytes: u64,
    pool_bytes: u64,
}

/// A model in host memory, staged for a GPU.
#[derive(Debug)]
pub(super) struct Source {
    // The stage waits for its copies before the model's memory goes.
    stage: Stage,
    segments: Vec<Segment>,
    model: Model,
    /// Of resident fetches: the layer of the first piece of each; empty for the model that is streamed.
    first_layers: Vec<u32>,
}

/// Everything a GPU's bytes come from.
#[derive(Debug)]
pub(super) struct Sources {
    /// What is streamed in each pass; `None` where nothing is.
    pub(super) below: Option<Arc<Source>>,
    /// What stays in VRAM and is read once; `None` where nothing does.
    pub(super) resident: Option<Arc<Source>>,
}

impl Sources {
    /// Opens the models below.
    ///
    /// # Errors
    /// Those of [`Model::again`]; what the driver says.
    pub(super) fn open(
        catalog: &Catalog,
        vram: &VramPlan,
        layout: &Layout,
        files: &Arc<[ShardFile]>,
        options: &OpenOptions,
        context: &Arc<Context>,
    ) -> Result<Self> {
        let (once, first_layers) = resident_catalog(catalog, vram, layout);
        let plan_once = PlanOptions {
            slots_count: SLOTS_DEFAULT,
            page_bytes: PAGE_4K,
        };
        let once_bytes = smallest_budget_bytes(&once, &plan_once)?;
        let resident = match once.layers.is_empty() {
            true => None,
            false => {
                let options = OpenOptions {
                    budget: BudgetSpec::Pool(once_bytes),
                    slots_count: plan_once.slots_count,
                    page_bytes: Some(plan_once.page_bytes),
                    ..below_options(options)
                };
                let source = Source::open(once, files, options, context, first_layers)?;
                source.stage.pinned().pin_all();
                Some(Arc::new(source))
            }
        };
        let below = match vram.plan.transient_layers_count() {
            0 => None,
            _ => {
                let options = OpenOptions {
                    budget: less(options.budget, once_bytes),
                    ..below_options(options)
                };
                let source = Source::open(vram.below.clone(), files, options, context, Vec::new())?;
                Some(Arc::new(source))
            }
        };
        Ok(Self { below, resident })
    }
}

/// How a model below is opened: copies go out of memory that does not move, events are those of the model above.
fn below_options(options: &OpenOptions) -> OpenOptions {
    OpenOptions {
        backing: Backing::Shared,
        defer_plan: false,
        experts: false,
        trace: None,
        ..options.clone()
    }
}

/// The pieces of resident fetches, each as a layer of its own, in the order in which they are asked for; and per fetch the
/// layer of its first piece.
fn resident_catalog(catalog: &Catalog, vram: &VramPlan, layout: &Layout) -> (Catalog, Vec<u32>) {
    let all = vram.image.pieces.concat();
    let (mut layers, mut first_layers) = (Vec::new(), Vec::new());
    for (index, fetch) in (0u32..).zip(&layout.fetches) {
        first_layers.push(u32::try_from(layers.len()).unwrap_or(u32::MAX));
        if fetch.transient_of.is_some() {
            continue;
        }
        for request in 0..fetch.request_count {
            let (start, len) = layout.request_range(index, request);
            layers.push(once_layer(
                layers.len(),
                &pieces_between(&all, start, start + len),
            ));
        }
    }
    (
        catalog.of_layers(catalog.shards.clone(), layers),
        first_layers,
    )
}

fn once_layer(index: usize, pieces: &[Piece]) -> Layer {
    let mut extents: Vec<Extent> = pieces
        .iter()
        .map(|piece| piece.file)
        .filter(|file| file.len_bytes > 0)
        .collect();
    extents.sort_unstable();
    let uses = extents.iter().map(|extent| Use {
        extent: *extent,
        tensor_index: 0,
        order: 0,
    });
    Layer {
        kind: LayerKind::Block(u32::try_from(index).unwrap_or(u32::MAX)),
        label: format!("resident[{index}]"),
        bytes: extents.iter().map(|extent| extent.len_bytes).sum(),
        uses: uses.collect(),
        extents,
    }
}

/// What lies in `[start, end)` of the image. `sorted` by place.
pub(super) fn pieces_between(sorted: &[Piece], start: u64, end: u64) -> Vec<Piece> {
    let first = sorted.partition_point(|piece| piece.end_bytes() <= start);
    let behind = sorted[first..].iter();
    behind
        .take_while(|piece| piece.offset_bytes < end)
        .filter_map(|piece| piece.within(start, end))
        .collect()
}

impl Source {
    fn open(
        catalog: Catalog,
        files: &Arc<[ShardFile]>,
        options: OpenOptions,
        context: &Arc<Context>,
        first_layers: Vec<u32>,
    ) -> Result<Self> {
        let model = Model::again(Arc::new(catalog), Arc::clone(files), options)?;
        let stage = model.stage(context)?;
        let plan = model.plan().ok_or_else(no_plan)?;
        let segments = segments(&model, plan)?;
        Ok(Self {
            stage,
            segments,
            model,
            first_layers,
        })
    }

    /// The layer of this model that holds a piece of a resident fetch.
    pub(super) fn layer_of_piece(&self, fetch: u32, request: u32) -> u32 {
        self.first_layers.get(fetch as usize).copied().unwrap_or(0) + request
    }

    pub(super) fn plan(&self) -> Option<&Plan> {
        self.model.plan()
    }

    pub(super) fn budget(&self) -> Option<BudgetReport> {
        self.model.budget()
    }

    pub(super) fn stats(&self) -> Stats {
        self.model.stats()
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.model.counters().bytes_read
    }

    pub(super) const fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Leases bytes of a layer once they have landed.
    ///
    /// # Errors
    /// As [`Model::acquire`].
    pub(super) fn acquire(&self, layer: u32, file: &Extent, patience: Duration) -> Result<()> {
        let address = self.model.address(file.shard_index, file.offset_bytes) as usize;
        let range = (address, file.len_bytes as usize);
        self.model.acquire(layer, Some(range), Some(patience))
    }

    /// Gives such leases back.
    pub(super) fn release(&self, layer: u32, count: u32) {
        for _ in 0..count {
            if let Err(error) = self.model.release(layer) {
                log::error!("a staged lease could not be given back: {error}");
            }
        }
    }

    /// Copies leased bytes of the files to an address in VRAM. Returns copies asked for and bytes that were pinned.
    ///
    /// # Errors
    /// `Internal` for bytes that are not in the pool; what the driver says.
    pub(super) fn copy(&self, file: &Extent, to: u64) -> Result<(u64, u64)> {
        let (mut copies, mut pinned_bytes, mut done) = (0, 0, 0);
        while done < file.len_bytes {
            let at = file.offset_bytes + done;
            let segment = self.segment(file.shard_index, at)?;
            let len = (file.end_bytes() - at).min(segment.end_bytes - at);
            let offset = segment.pool_bytes + (at - segment.start_bytes);
            pinned_bytes += self.stage.copy_in(to + done, offset, len as usize)? as u64;
            copies += 1;
            done += len;
        }
        Ok((copies, pinned_bytes))
    }

    fn segment(&self, shard_index: u32, at: u64) -> Result<&Segment> {
        let after = self.segments.partition_point(|segment| {
            (segment.shard_index, segment.start_bytes) <= (shard_index, at)
        });
        let found = after
            .checked_sub(1)
            .map(|index| &self.segments[index])
            .filter(|segment| segment.shard_index == shard_index && at < segment.end_bytes);
        found.ok_or_else(|| {
            let context = format!("byte {at} of shard {shard_index} is leased and not in the pool");
            Error::new(ErrorKind::Internal, context)
        })
    }
}

fn no_plan() -> Error {
    Error::new(ErrorKind::Internal, "a model below a GPU has no plan")
}

/// Every run of the plan and where it lies in the pool, sorted.
fn segments(model: &Model, plan: &Plan) -> Result<Vec<Segment>> {
    let transient = plan
        .layers
        .iter()
        .filter_map(|layer| layer.transient.as_ref());
    let mut segments = plan
        .resident
        .iter()
        .chain(transient)
        .map(|run: &PageRun| {
            Ok(Segment {
                shard_index: run.shard_index,
                start_bytes: run.first_page * plan.page_bytes,
                end_bytes: run.end_page() * plan.page_bytes,
                pool_bytes: model.pool_offset_bytes(run).ok_or_else(no_plan)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    segments.sort_unstable_by_key(|segment| (segment.shard_index, segment.start_bytes));
    Ok(segments)
}
