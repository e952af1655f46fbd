//! Where a GPU's bytes come from: models in host memory, and where in their pools the bytes of the files lie.
//!
//! Invariant: bytes are copied under a lease of the model below, which is given back when the copy is done. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: the lower of the two engines of a GPU.

use std::sync::Arc;
use std::time::Duration;

use super::less;
use super::packed::stored_catalog;
use crate::engine::layout::Layout;
use crate::engine::{BudgetReport, BudgetSpec, Model, OpenOptions, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::coded_file::{CodedFile, Tiles};
use crate::mem::Backing;
use crate::mem::cuda::unpack::Batch;
use crate::mem::cuda::{Context, Event, Stage, Unpacker};
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
    packed: Option<Packed>,
}

/// Where weights are coded: in which tiles, and what unpacks them.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    pub(super) file: Arc<CodedFile>,
    pub(super) unpacker: Arc<Unpacker>,
}

/// What was asked of the driver for some weights.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Copied {
    pub(super) copies: u64,
    /// Over the link.
    pub(super) bytes: u64,
    /// Of those, out of pinned memory.
    pub(super) pinned_bytes: u64,
    /// Weights that are unpacked in VRAM.
    pub(super) unpacked_bytes: u64,
}

/// How what is read once is planned.
const PLAN_ONCE: PlanOptions = PlanOptions {
    slots_count: SLOTS_DEFAULT,
    page_bytes: PAGE_4K,
};

/// Everything a GPU's bytes come from.
#[derive(Debug, Default)]
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
        (context, packed): (&Arc<Context>, Option<&Packed>),
    ) -> Result<Self> {
        let stored = |catalog: Catalog| match packed {
            Some(packed) => stored_catalog(&packed.file, &catalog),
            None => Ok(catalog),
        };
        let (once, first_layers) = resident_catalog(catalog, vram, layout);
        let once = stored(once)?;
        let once_bytes = smallest_budget_bytes(&once, &PLAN_ONCE)?;
        let resident = match once.layers.is_empty() {
            true => None,
            false => {
                let options = OpenOptions {
                    budget: BudgetSpec::Pool(once_bytes),
                    slots_count: PLAN_ONCE.slots_count,
                    page_bytes: Some(PLAN_ONCE.page_bytes),
                    ..below_options(options, RESIDENT)
                };
                let source = Source::open(once, files, options, (context, packed), first_layers)?;
                source.stage.pinned().pin_all();
                Some(Arc::new(source))
            }
        };
        let below = match vram.plan.transient_layers_count() {
            0 => None,
            _ => {
                let options = OpenOptions {
                    budget: less(options.budget, once_bytes),
                    ..below_options(options, STREAMED)
                };
                let below = stored(vram.below.clone())?;
                let source = Source::open(below, files, options, (context, packed), Vec::new())?;
                Some(Arc::new(source))
            }
        };
        Ok(Self { below, resident })
    }
}

/// The least host memory with which the models below can be opened.
///
/// # Errors
/// As [`smallest_budget_bytes`].
pub(super) fn least_bytes(
    catalog: &Catalog,
    vram: &VramPlan,
    layout: &Layout,
    options: &OpenOptions,
    packed: Option<&CodedFile>,
) -> Result<u64> {
    let stored = |catalog: Catalog| match packed {
        Some(file) => stored_catalog(file, &catalog),
        None => Ok(catalog),
    };
    let once = stored(resident_catalog(catalog, vram, layout).0)?;
    let below = match vram.plan.transient_layers_count() {
        0 => 0,
        _ => smallest_budget_bytes(
            &stored(vram.below.clone())?,
            &PlanOptions {
                slots_count: options.slots_count,
                page_bytes: options.page_bytes.unwrap_or(PAGE_4K),
            },
        )?,
    };
    Ok(smallest_budget_bytes(&once, &PLAN_ONCE)? + below)
}

/// The layers of a model below are those of the model above.
const STREAMED: (u32, bool) = (0, true);
/// What is read once, and stays.
const RESIDENT: (u32, bool) = (1, false);

/// How a model below is opened: copies go out of memory that does not move, waits and leases are events of the model above
/// alone.
fn below_options(options: &OpenOptions, (number, has_layers): (u32, bool)) -> OpenOptions {
    let trace = options.trace.as_ref();
    OpenOptions {
        backing: Backing::Shared,
        defer_plan: false,
        experts: false,
        trace: trace.map(|trace| Arc::new(trace.below(number, has_layers))),
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
        (context, packed): (&Arc<Context>, Option<&Packed>),
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
            packed: packed.cloned(),
        })
    }

    /// The layer of this model that holds a piece of a resident fetch.
    pub(super) fn layer_of_piece(&self, fetch: u32, request: u32) -> u32 {
        self.first_layers.get(fetch as usize).copied().unwrap_or(0) + request
    }

    /// What of the files is streamed, as it lies there.
    pub(super) fn catalog(&self) -> &Catalog {
        self.model.catalog()
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
        let file = match &self.packed {
            Some(packed) => packed.file.stored(file)?.extent,
            None => *file,
        };
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

    /// A word in which is told whether what is unpacked for one request was damaged.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn begin(&self) -> Result<Option<u32>> {
        let unpacker = self.packed.as_ref().map(|packed| &packed.unpacker);
        unpacker.map(|unpacker| unpacker.begin()).transpose()
    }

    /// Sets a mark behind everything asked for a request.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn record(&self, word: Option<u32>) -> Result<Event> {
        match (&self.packed, word) {
            (Some(packed), Some(word)) => packed.unpacker.record(&self.stage, word),
            _ => self.stage.record(),
        }
    }

    /// Whether what was unpacked for a request, whose mark has been passed, is what was packed.
    ///
    /// # Errors
    /// `Format`, with tensor, tile and offset, where the file is damaged; `Io` where it is not.
    pub(super) fn check(&self, word: Option<u32>, pieces: &[Piece]) -> Result<()> {
        let (Some(packed), Some(word)) = (&self.packed, word) else {
            return Ok(());
        };
        if !packed.unpacker.is_damaged(word) {
            return Ok(());
        }
        // The kernel tells that, the decoder here tells what.
        for piece in pieces.iter().filter(|piece| piece.file.len_bytes > 0) {
            let mut weights = vec![0; piece.file.len_bytes as usize];
            packed.file.read(piece.file.offset_bytes, &mut weights)?;
        }
        let context = "weights were damaged between the drive and the GPU, and are not in the file; try again, and test memory and link";
        Err(Error::new(ErrorKind::Io, context))
    }

    /// Has leased weights copied to an address in VRAM, and unpacked where they are coded.
    ///
    /// # Errors
    /// `Internal` for bytes that are not in the pool; what the driver says.
    pub(super) fn copy(&self, file: &Extent, to: u64, word: Option<u32>) -> Result<Copied> {
        let (Some(packed), Some(word)) = (&self.packed, word) else {
            return self.copy_stored(file, to);
        };
        let stored = packed.file.stored(file)?;
        match &stored.tiles {
            None => self.copy_stored(&stored.extent, to),
            Some(tiles) => {
                let part = tiles.skip_bytes..tiles.skip_bytes + file.len_bytes;
                self.copy_tiles(&packed.unpacker, (tiles, &stored.extent), (part, to), word)
            }
        }
    }

    fn copy_tiles(
        &self,
        unpacker: &Unpacker,
        (tiles, extent): (&Tiles<'_>, &Extent),
        (part, to): (std::ops::Range<u64>, u64),
        word: u32,
    ) -> Result<Copied> {
        let (head, places) = tiles.around();
        let batch = Batch {
            head: &head,
            tiles_bytes: extent.len_bytes,
            places: &places,
            elements: tiles.elements(),
        };
        let mut copied = Copied::default();
        let weights_bytes = part.end - part.start;
        let copy = |to: u64| {
            copied = self.copy_stored(extent, to)?;
            Ok(())
        };
        unpacker.unpack(&self.stage, &batch, copy, (part, to), word)?;
        let around_bytes = (head.len() + places.len()) as u64;
        Ok(Copied {
            copies: copied.copies + 2,
            bytes: copied.bytes + around_bytes,
            pinned_bytes: copied.pinned_bytes + around_bytes,
            unpacked_bytes: weights_bytes,
        })
    }

    /// Copies bytes of the files as they are.
    fn copy_stored(&self, file: &Extent, to: u64) -> Result<Copied> {
        let mut copied = Copied::default();
        while copied.bytes < file.len_bytes {
            let at = file.offset_bytes + copied.bytes;
            let segment = self.segment(file.shard_index, at)?;
            let len = (file.end_bytes() - at).min(segment.end_bytes - at);
            let offset = segment.pool_bytes + (at - segment.start_bytes);
            let pinned_bytes = self
                .stage
                .copy_in(to + copied.bytes, offset, len as usize)?;
            copied.pinned_bytes += pinned_bytes as u64;
            copied.copies += 1;
            copied.bytes += len;
        }
        Ok(copied)
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
