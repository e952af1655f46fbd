//! A model on a GPU: the same leases, with weights in VRAM.
//!
//! Two engines, one above the other. Below stands a [`super::Model`] in host memory over just what the upper plan does not keep in
//! VRAM: it reads the drive into pinned slots and keeps what fits. Above, the same bookkeeping (`state`) hands out slots of
//! VRAM; `feed` fills them with copies that begin as soon as the bytes below have landed. What stays in VRAM is read once,
//! through a small model of its own, which then goes.
//!
//! Where [`OpenOptions::defer_plan`] is set only VRAM is taken at open, so that addresses are known; host memory is planned
//! and everything starts with the first lease or hint.
//!
//! Invariants: a lease of a layer is given when the event behind its last copy is done, not before; a slot is written
//! again only behind the events of those who read it ([`GpuModel::release_after`]); no device is ever synchronised; host
//! memory is released to the drive only when the copy out of it is done. Place in
//! `file -> catalog -> plan -> reader -> pool -> **lease** -> host`, on the far side of the link.

mod direct;
mod feed;
mod opening;
mod packed;
mod several;
mod source;
mod sums;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::layout::{Layout, Spans};
use super::leases::thread_id;
use super::options::{BudgetSpec, OpenOptions};
use super::state::{Need, State};
use super::stats::{BudgetReport, Fallback, Stats};
use super::trace::Trace;
use super::wait::{Asked, Hall};
use crate::error::{Error, ErrorKind, Result};
use crate::io::coded_file::CodedFile;
use crate::io::{ReaderKind, ShardFile, mirror};
use crate::mem::cuda::{Context, Event, Stream, Unpacker, VramPool};
use crate::model::Catalog;
use crate::plan::image::Places;
use crate::plan::tiers::VRAM_PAGE_BYTES;
use crate::plan::{self, Plan, TierShare, VramPlan};
use crate::units::MIB;
use direct::Direct;
use feed::{Core, Counted, Feed};
pub use opening::catalog_of;
use opening::{open_files, start_direct, unpacking};
pub use several::{Gpus, Part};
use source::{Source, Sources};

/// Copied, waited for and counted as one: short enough that compute can begin while a layer arrives, long enough that an
/// event for each costs nothing.
const PIECE_BYTES: u64 = 4 * MIB;

/// Which GPU, and how much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuOptions {
    /// Its number, from 0.
    pub index: u32,
    /// VRAM for weights.
    pub vram_bytes: u64,
    /// Slots in VRAM.
    pub slots_count: u32,
}

/// Counters of a model on a GPU since it was opened.
#[derive(Debug, Clone, Default)]
pub struct GpuStats {
    /// Leases given.
    pub acquires: u64,
    /// Leases that came back.
    pub releases: u64,
    /// Slots of VRAM filled.
    pub loads: u64,
    /// Acquires that waited.
    pub stalls: u64,
    /// Time they waited.
    pub stall_ns: u64,
    /// Bytes copied into VRAM over the link.
    pub h2d_bytes: u64,
    /// Of those: out of pinned memory.
    pub h2d_pinned_bytes: u64,
    /// Of those: into resident pages, once.
    pub h2d_resident_bytes: u64,
    /// Copies asked for.
    pub copies: u64,
    /// Weights that came coded and were unpacked in VRAM.
    pub unpacked_bytes: u64,
    /// Host memory that is pinned.
    pub pinned_bytes: u64,
    /// Why not all of it can be.
    pub not_pinned: Option<String>,
    /// What the model below has done: its drive, its memory.
    pub host: Stats,
    /// Bytes read from the drive, those of resident pages included.
    pub bytes_read: u64,
    /// Of those, what cuFile read, past host memory.
    pub direct_bytes: u64,
}

/// A model on a GPU.
#[derive(Debug)]
pub struct GpuModel {
    // Dropped first: it ends the threads that use the rest.
    feed: OnceLock<Feed>,
    /// What is not opened yet.
    waiting: Mutex<Option<Waiting>>,
    core: Arc<Core>,
    catalog: Catalog,
    vram: VramPlan,
    spans: Spans,
    places: Places,
    packed: Option<Arc<CodedFile>>,
    /// Why it is not read by cuFile, though it was asked for.
    not_direct: Option<Fallback>,
}

/// What host memory is planned from, once the host has all of its own.
#[derive(Debug)]
struct Waiting {
    files: Arc<[ShardFile]>,
    options: OpenOptions,
}

impl GpuModel {
    /// Opens the model at `path` (see [`super::read_catalog`]), or a compressed one, with weights on a GPU. `options` say how the
    /// rest is held in host memory and read; their backing is not looked at. With [`ReaderKind::Gds`] it is not held there,
    /// where cuFile works; else [`GpuStats::host`] tells why not.
    ///
    /// # Errors
    /// Those of [`super::Model::open`]; `Refused` when VRAM or memory do not do, with the arithmetic; `Unsupported` and
    /// `NotFound` without driver or GPU.
    pub fn open(path: &Path, gpu: &GpuOptions, options: OpenOptions) -> Result<Self> {
        let (packed, catalog, files) = open_files(path)?;
        let files: Arc<[ShardFile]> = mirror::open(files, &options.mirrors)?.into();
        Self::of((packed, catalog, files), gpu, options)
    }

    /// [`GpuModel::open`] for a catalog and shards that are at hand.
    fn of(
        (packed, catalog, files): (Option<Arc<CodedFile>>, Catalog, Arc<[ShardFile]>),
        gpu: &GpuOptions,
        options: OpenOptions,
    ) -> Result<Self> {
        let context = Context::new(gpu.index)?;
        let wants_direct = options.reader.kind == ReaderKind::Gds;
        let (direct, not_direct) = match wants_direct {
            true => start_direct(&context, &files, packed.is_some()),
            false => (None, None),
        };
        // What unpacks or reads works in VRAM, too.
        let unpacker_bytes = packed
            .as_ref()
            .map_or(0, |_| Unpacker::vram_bytes(PIECE_BYTES));
        let direct_bytes = direct.as_ref().map_or(0, |_| Direct::vram_bytes());
        let weights_bytes = gpu.vram_bytes.saturating_sub(unpacker_bytes + direct_bytes);
        let vram = VramPlan::new(&catalog, weights_bytes, gpu.slots_count)?;
        let pool = VramPool::new(&context, vram.image.len_bytes, &vram.plan)?;
        let layout = Arc::new(layout_of(&vram));
        let page_bytes = options
            .page_bytes
            .unwrap_or_else(|| plan::default_page_bytes(&catalog));
        let mut options = OpenOptions {
            page_bytes: Some(page_bytes),
            ..options
        };
        if wants_direct {
            options.reader.kind = ReaderKind::Auto;
        }
        let slots_count = layout.slots_count as usize;
        let core = Arc::new(Core {
            hall: Hall {
                state: Mutex::new(State::new(Arc::clone(&layout), None)),
                changed: Condvar::new(),
                trace: options
                    .trace
                    .clone()
                    .map_or_else(OnceLock::new, OnceLock::from),
            },
            layout,
            pieces: vram.image.pieces.concat(),
            below: OnceLock::new(),
            resident: Mutex::new(None),
            direct,
            relay: Stream::new(&context)?,
            pool,
            last_uses: Mutex::new((0..slots_count).map(|_| Vec::new()).collect()),
            bell: feed::Bell::default(),
            retired: feed::Bell::default(),
            stop: AtomicBool::new(false),
            counted: Counted::default(),
        });
        log::info!(
            "plan: vram_resident_bytes={} vram_ring_bytes={} link_bytes_per_pass={}",
            vram.plan.resident_bytes,
            vram.plan.ring_bytes,
            vram.link_bytes_per_pass()
        );
        let defer_plan = options.defer_plan;
        let model = Self {
            feed: OnceLock::new(),
            waiting: Mutex::new(Some(Waiting { files, options })),
            core,
            spans: Spans::new(&vram.image.catalog),
            places: Places::new(&vram.image),
            catalog,
            vram,
            packed,
            not_direct,
        };
        if !defer_plan {
            model.start()?;
        }
        Ok(model)
    }

    /// Plans host memory and starts to read, once. What is refused may be tried again.
    fn start(&self) -> Result<()> {
        if self.is_started() {
            return Ok(());
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Waiting { files, options }) = waiting.as_ref() else {
            return Ok(());
        };
        let core = &self.core;
        let context = core.pool.context();
        let options = &OpenOptions {
            trace: core.hall.trace.get().cloned(),
            ..options.clone()
        };
        let sources = match &core.direct {
            Some(_) => Sources::default(),
            None => {
                let unpacking = unpacking(context, self.packed.as_ref())?;
                let on = (context, unpacking.as_ref());
                Sources::open(&self.catalog, &self.vram, &core.layout, files, options, on)?
            }
        };
        if let Some(below) = sources.below {
            let _ = core.below.set(below);
        }
        *core.resident.lock().unwrap_or_else(PoisonError::into_inner) = sources.resident;
        *waiting = None;
        match Feed::start(core) {
            Ok(feed) => {
                let _ = self.feed.set(feed);
                Ok(())
            }
            // Its threads end the model with them: from now on this is every answer.
            Err(error) => {
                core.hall.state().fatal = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Sends events to `trace` from now on: for who opens with a deferred plan. As [`super::Model::trace_into`].
    pub fn trace_into(&self, trace: Arc<Trace>) {
        if !self.is_started() {
            let _ = self.core.hall.trace.set(trace);
        }
    }

    /// Whether host memory is planned.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.feed.get().is_some()
    }

    /// Whether weights come past host memory.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.core.direct.is_some()
    }

    /// The compressed model that this one is, if it is one: its catalog has offsets of its own.
    #[must_use]
    pub fn packed(&self) -> Option<&CodedFile> {
        self.packed.as_deref()
    }

    /// Bytes of the files that come over the link in each pass: fewer than the weights where these are compressed.
    #[must_use]
    pub fn link_bytes_per_pass(&self) -> u64 {
        match self.core.below.get() {
            Some(below) => below.catalog().layer_bytes(),
            None => self.vram.link_bytes_per_pass(),
        }
    }

    /// What is in the files.
    #[must_use]
    pub const fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The plan of VRAM and the image it is made for.
    #[must_use]
    pub const fn vram(&self) -> &VramPlan {
        &self.vram
    }

    /// The plan of the host memory below; `None` where everything is in VRAM.
    #[must_use]
    pub fn host_plan(&self) -> Option<&Plan> {
        self.core.below.get().and_then(|below| below.plan())
    }

    /// The budget that the host memory below was planned for; `None` where everything is in VRAM, or nothing planned yet.
    #[must_use]
    pub fn host_budget(&self) -> Option<BudgetReport> {
        self.core.below.get().and_then(|below| below.budget())
    }

    /// Where each layer's bytes stay between two passes; of a compressed model those below VRAM are counted as they lie in
    /// the file.
    #[must_use]
    pub fn shares(&self) -> Vec<TierShare> {
        match (self.host_plan(), self.core.below.get()) {
            (Some(lower), Some(below)) => {
                let mut shares = self.vram.shares(&self.catalog, lower);
                for (share, stored) in shares.iter_mut().zip(&below.catalog().layers) {
                    share.drive_bytes = stored.bytes.saturating_sub(share.memory_bytes);
                }
                shares
            }
            // Nothing is streamed, or all of it past host memory.
            _ => {
                let layers = self.catalog.layers.iter().zip(&self.vram.below.layers);
                layers
                    .map(|(layer, streamed)| TierShare {
                        vram_bytes: layer.bytes - streamed.bytes,
                        memory_bytes: 0,
                        drive_bytes: streamed.bytes,
                    })
                    .collect()
            }
        }
    }

    /// The GPU.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        self.core.pool.context()
    }

    /// The pool in VRAM, to hand to other processes.
    #[must_use]
    pub fn pool(&self) -> &VramPool {
        &self.core.pool
    }

    /// The constant address, on the GPU, of byte `offset_bytes` of a shard. To be read under a lease of its layer only.
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> Option<u64> {
        let place = self.places.of(shard_index, offset_bytes)?;
        Some(self.core.pool.base() + place)
    }

    /// The layer that the weight byte at an address on the GPU belongs to. Lock-free.
    #[must_use]
    pub fn layer_of(&self, address: u64) -> Option<u32> {
        let place = address.checked_sub(self.core.pool.base())?;
        self.spans.layer_at(0, place)
    }

    /// Waits until a layer (or only `range`, an address on the GPU and a length) is in VRAM, and keeps it there until
    /// [`GpuModel::release`]. As [`super::Model::acquire`].
    ///
    /// # Errors
    /// As [`super::Model::acquire`]; `Io` when the GPU is lost.
    pub fn acquire(
        &self,
        layer: u32,
        range: Option<(u64, u64)>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let need = self.need(layer, range)?;
        self.start()?;
        let asked = Asked::by_this_thread(layer, need);
        let wake = || self.core.bell.ring();
        self.core.hall.acquire(&wake, asked, timeout)
    }

    /// Says which layers will be acquired next, in order. As [`super::Model::hint`].
    ///
    /// # Errors
    /// `Invalid` for a layer that is not there; those of a deferred plan.
    pub fn hint(&self, layers: &[u32]) -> Result<()> {
        layers
            .iter()
            .try_for_each(|layer| self.check_layer(*layer))?;
        self.start()?;
        let hungry = {
            let mut state = self.core.hall.state();
            state.hint(layers);
            std::mem::take(&mut state.hungry)
        };
        if hungry {
            self.core.bell.ring();
        }
        Ok(())
    }

    /// Gives a lease back; nothing on the GPU reads the layer any more.
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired.
    pub fn release(&self, layer: u32) -> Result<()> {
        self.check_layer(layer)?;
        let hungry = {
            let mut state = self.core.hall.state();
            let last = state.release(layer, thread_id())?;
            if let (Some(trace), true) = (self.core.hall.trace.get(), last) {
                trace.released(layer);
            }
            std::mem::take(&mut state.hungry)
        };
        if hungry {
            self.core.bell.ring();
        }
        Ok(())
    }

    /// Gives a lease back while the GPU still reads the layer: its slot is written again only when `event`, recorded
    /// behind the last kernel that reads it, is done. The host does not wait.
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired.
    pub fn release_after(&self, layer: u32, event: Event) -> Result<()> {
        self.check_layer(layer)?;
        // Before the lease is back: from then on the slot may be given away.
        let slot = self
            .core
            .layout
            .fixed_slot
            .get(layer as usize)
            .copied()
            .flatten();
        if let Some(slot) = slot {
            let mut uses = self.core.last_uses();
            // Events that are done say nothing any more; an event that failed stays and fails the next copy.
            uses[slot as usize].retain(|event| !matches!(event.is_done(), Ok(true)));
            uses[slot as usize].push(event);
        }
        self.release(layer)
    }

    /// The stream in which events of hosts are waited for: [`Stream::behind`] gives what [`GpuModel::release_after`] takes.
    #[must_use]
    pub fn relay(&self) -> &Stream {
        &self.core.relay
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> GpuStats {
        let core = &self.core;
        let mut host = core
            .below
            .get()
            .map_or_else(Stats::default, |below| below.stats());
        host.fallbacks.extend(self.not_direct.clone());
        let direct_bytes = core.direct.as_ref().map_or(0, Direct::bytes_read);
        let pins = core.below.get().map(|below| below.stage().pinned());
        let counted = &core.counted;
        let state = core.hall.state();
        GpuStats {
            acquires: state.acquires,
            releases: state.releases,
            loads: state.loads,
            stalls: state.stalls,
            stall_ns: state.stall_ns,
            h2d_bytes: counted.h2d_bytes.load(Ordering::Relaxed),
            h2d_pinned_bytes: counted.h2d_pinned_bytes.load(Ordering::Relaxed),
            h2d_resident_bytes: counted.h2d_resident_bytes.load(Ordering::Relaxed),
            copies: counted.copies.load(Ordering::Relaxed),
            unpacked_bytes: counted.unpacked_bytes.load(Ordering::Relaxed),
            pinned_bytes: pins.map_or(0, |pins| pins.pinned_bytes()),
            not_pinned: pins
                .and_then(|pins| pins.failure())
                .map(|error| error.to_string()),
            bytes_read: host.bytes_read + core.resident_bytes_read() + direct_bytes,
            direct_bytes,
            host,
        }
    }

    fn check_layer(&self, layer: u32) -> Result<()> {
        let count = self.catalog.layers.len();
        if (layer as usize) < count {
            return Ok(());
        }
        let context = format!("layer {layer} does not exist, the model has {count} layers");
        Err(Error::new(ErrorKind::Invalid, context))
    }

    fn need(&self, layer: u32, range: Option<(u64, u64)>) -> Result<Need> {
        self.check_layer(layer)?;
        let Some((address, len)) = range else {
            return Ok(Need::Whole);
        };
        let start = address.checked_sub(self.core.pool.base());
        let span = start.and_then(|start| Some((start, start.checked_add(len)?)));
        let inside = |start: u64, end: u64| {
            let extents = &self.vram.image.catalog.layers[layer as usize].extents;
            let holds = |extent: &crate::units::Extent| {
                extent.offset_bytes <= start && end <= extent.end_bytes()
            };
            len > 0 && extents.iter().any(holds)
        };
        match span {
            Some((start_bytes, end_bytes)) if inside(start_bytes, end_bytes) => Ok(Need::Bytes {
                shard_index: 0,
                start_bytes,
                end_bytes,
            }),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!("{len} bytes at {address:#x} of the GPU are not in layer {layer}"),
            )),
        }
    }
}

/// What there is to copy: the image's fetches, cut into pieces.
fn layout_of(vram: &VramPlan) -> Layout {
    let slots = vram.plan.layers.iter().filter_map(|layer| layer.slot_index);
    let slots_count = slots.max().map_or(0, |slot| slot + 1);
    Layout::new(
        &vram.image.catalog,
        &vram.plan,
        PIECE_BYTES,
        slots_count,
        true,
    )
}

impl Core {
    fn last_uses(&self) -> std::sync::MutexGuard<'_, Vec<Vec<Event>>> {
        self.last_uses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn resident_source(&self) -> Option<Arc<Source>> {
        self.resident
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Read for resident pages; asked under the lock in which the model they came from gives its count away and goes.
    fn resident_bytes_read(&self) -> u64 {
        let source = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        let gone_bytes = self.counted.resident_read_bytes.load(Ordering::Relaxed);
        gone_bytes + source.as_ref().map_or(0, |source| source.bytes_read())
    }
}

const _: () = assert!(PIECE_BYTES.is_multiple_of(VRAM_PAGE_BYTES));

/// What bounds host memory, as bytes for weights or as all of it, with what is set aside already.
fn less(budget: BudgetSpec, set_aside_bytes: u64) -> BudgetSpec {
    match budget {
        BudgetSpec::Pool(bytes) => BudgetSpec::Pool(bytes.saturating_sub(set_aside_bytes)),
        // What is set aside is memory of the process by then, which the budget counts as the host's.
        memory @ BudgetSpec::Memory(_) => memory,
    }
}
