//! A model, wherever it is: in this process, in the daemon, or with its weights on a GPU. The same calls, the same results.
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: lease, whoever gives it.
#![allow(unsafe_code)]

use super::Attached;
#[cfg(feature = "cuda")]
use super::gpus;
use super::gpus::{GpuFigures, GpuShare, LinkCounters};
#[cfg(feature = "cuda")]
use crate::engine::gpu::{GpuModel, Gpus};
use crate::engine::{BudgetReport, Model, OpenOptions, Stats, Trace};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Backing;
use crate::model::Catalog;
use crate::plan::Plan;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Where a model is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint<'a> {
    /// In this process.
    Local,
    /// In the daemon that listens on this socket.
    Daemon(&'a Path),
}

impl<'a> Endpoint<'a> {
    /// Reads an endpoint as hosts write it: `unix:PATH`.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub fn parse(text: &'a str) -> Result<Self> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Daemon(Path::new(path))),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "endpoint '{text}': write unix:PATH, such as unix:{}",
                    super::SOCKET_DEFAULT
                ),
            )),
        }
    }
}

/// What the plan of an open model says in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanFigures {
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// What stays in memory.
    pub resident_bytes: u64,
    /// All slots.
    pub ring_bytes: u64,
    /// Read per pass.
    pub streamed_bytes_per_pass: u64,
    /// Slots for experts that are fetched one by one.
    pub expert_cache_bytes: u64,
}

impl PlanFigures {
    fn of(plan: &Plan) -> Self {
        Self {
            slot_bytes: plan.slot_pages * plan.page_bytes,
            resident_bytes: plan.resident_bytes,
            ring_bytes: plan.ring_bytes,
            streamed_bytes_per_pass: plan.streamed_bytes_per_pass,
            expert_cache_bytes: plan.cache_bytes(),
        }
    }

    /// Both together; a slot is then the longer one.
    #[cfg(feature = "cuda")]
    fn with(self, other: Self) -> Self {
        Self {
            slot_bytes: self.slot_bytes.max(other.slot_bytes),
            resident_bytes: self.resident_bytes + other.resident_bytes,
            ring_bytes: self.ring_bytes + other.ring_bytes,
            streamed_bytes_per_pass: self.streamed_bytes_per_pass + other.streamed_bytes_per_pass,
            expert_cache_bytes: self.expert_cache_bytes + other.expert_cache_bytes,
        }
    }
}

/// An open model.
#[derive(Debug)]
pub enum Opened {
    /// In this process.
    Local(Box<Model>),
    /// In the daemon.
    Daemon(Box<Attached>),
    /// In this process, weights on a GPU, or on several.
    #[cfg(feature = "cuda")]
    Gpu(Box<Gpus>),
}

impl Opened {
    /// Opens `path` at an endpoint. A daemon has options of its own: `options` are for this process.
    ///
    /// # Errors
    /// Those of [`Model::open`] and [`Attached::open`].
    pub fn open(path: &Path, endpoint: &Endpoint<'_>, options: OpenOptions) -> Result<Self> {
        match endpoint {
            Endpoint::Local => Ok(Self::Local(Box::new(Model::open(path, options)?))),
            Endpoint::Daemon(socket) => Ok(Self::Daemon(Box::new(Attached::open(socket, path)?))),
        }
    }

    /// Opens `path` in this process with weights on GPUs, of whose memory they may take what `gpus` say; `slots_count` 0 is the
    /// default.
    ///
    /// # Errors
    /// Those of [`Gpus::open`]; `Unsupported` in a build without CUDA.
    #[cfg(feature = "cuda")]
    pub fn open_on_gpus(
        path: &Path,
        gpus: &[GpuShare],
        slots_count: u32,
        options: OpenOptions,
    ) -> Result<Self> {
        let chosen = gpus::options(path, gpus, slots_count)?;
        Ok(Self::Gpu(Box::new(Gpus::open(path, &chosen, options)?)))
    }

    /// Opens `path` with weights on GPUs.
    ///
    /// # Errors
    /// `Unsupported`: this build has no CUDA.
    #[cfg(not(feature = "cuda"))]
    pub fn open_on_gpus(
        _path: &Path,
        _gpus: &[GpuShare],
        _slots_count: u32,
        _options: OpenOptions,
    ) -> Result<Self> {
        Err(crate::mem::gpu::not_built())
    }

    /// The plan of each GPU's memory, in the order of their layers; none where weights are in host memory.
    #[must_use]
    pub fn gpus(&self) -> Vec<GpuFigures> {
        match self {
            Self::Local(_) | Self::Daemon(_) => Vec::new(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.parts().iter().map(GpuFigures::of).collect(),
        }
    }

    /// The GPU that has a layer, by its number; `None` where weights are in host memory.
    #[must_use]
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn gpu_of(&self, layer: u32) -> Option<u32> {
        match self {
            Self::Local(_) | Self::Daemon(_) => None,
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => {
                let part = model.part_of(layer).ok()?;
                Some(part.model().context().index())
            }
        }
    }

    /// The plans of all GPUs' memory together, under the number of the first; `None` where weights are in host memory.
    #[must_use]
    pub fn gpu(&self) -> Option<GpuFigures> {
        self.gpus().into_iter().reduce(GpuFigures::with)
    }

    /// What has come over the links; zeros where weights are in host memory.
    #[must_use]
    pub fn link_counters(&self) -> LinkCounters {
        match self {
            Self::Local(_) | Self::Daemon(_) => LinkCounters::default(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => LinkCounters::of(&model.stats()),
        }
    }

    /// Whether the plan is made; on a GPU that of the host memory below it.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        match self {
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.is_started(),
            _ => self.plan().is_some(),
        }
    }

    /// What is in the files.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        match self {
            Self::Local(model) => model.catalog(),
            Self::Daemon(model) => model.catalog(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.catalog(),
        }
    }

    /// Where a byte of the catalog is in the GGUF file, of which a compressed model on a GPU has the weights in another order.
    #[must_use]
    pub fn file_offset(&self, offset_bytes: u64) -> u64 {
        match self {
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model
                .packed()
                .and_then(|packed| packed.original(offset_bytes))
                .unwrap_or(offset_bytes),
            _ => offset_bytes,
        }
    }

    /// The plan's figures, once it is made.
    #[must_use]
    pub fn plan(&self) -> Option<PlanFigures> {
        match self {
            Self::Local(model) => model.plan().map(PlanFigures::of),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model
                .host_plans()
                .map(PlanFigures::of)
                .reduce(PlanFigures::with),
            Self::Daemon(model) => {
                let figures = model.figures();
                Some(PlanFigures {
                    slot_bytes: figures.slot_bytes,
                    resident_bytes: figures.resident_bytes,
                    ring_bytes: figures.ring_bytes,
                    streamed_bytes_per_pass: figures.streamed_bytes_per_pass,
                    expert_cache_bytes: 0,
                })
            }
        }
    }

    /// The budget the plan was made for.
    #[must_use]
    pub fn budget(&self) -> Option<BudgetReport> {
        match self {
            Self::Local(model) => model.budget(),
            Self::Daemon(model) => Some(model.budget()),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.host_budget(),
        }
    }

    /// The page size of the plan.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        match self {
            Self::Local(model) => model.page_bytes(),
            Self::Daemon(model) => model.figures().page_bytes,
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => first(model).vram().plan.page_bytes,
        }
    }

    /// How many slots the ring has, or will have.
    #[must_use]
    pub fn slots_count(&self) -> u32 {
        match self {
            Self::Local(model) => model.slots_count(),
            Self::Daemon(model) => model.figures().slots_count,
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => first(model).vram().plan.slots_count,
        }
    }

    /// Where the weights live.
    #[must_use]
    pub fn backing(&self) -> Backing {
        match self {
            Self::Local(model) => model.backing(),
            Self::Daemon(_) => Backing::Shared,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => Backing::Shared,
        }
    }

    /// See [`Model::trace_into`]. The daemon traces nothing for its clients, and what several GPUs do is not traced: false.
    pub fn trace_into(&self, trace: Arc<Trace>) -> bool {
        match self {
            Self::Local(model) => model.trace_into(trace),
            Self::Daemon(_) => return false,
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => return model.trace_into(trace),
        }
        true
    }

    /// What is known about the drive, in words: request length and depth come from it where none are given.
    #[must_use]
    pub fn profile(&self) -> String {
        match self {
            Self::Local(model) => model.profile().to_string(),
            Self::Daemon(_) => "the daemon's".to_owned(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => {
                let numbers = model
                    .parts()
                    .iter()
                    .map(|part| part.model().context().index());
                let numbers: Vec<String> = numbers.map(|index| index.to_string()).collect();
                format!("GPU {}", numbers.join(", "))
            }
        }
    }

    /// The constant address of a byte of a shard. Readable only under a lease of its layer.
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> *const u8 {
        match self {
            Self::Local(model) => model.address(shard_index, offset_bytes),
            Self::Daemon(model) => model.address(shard_index, offset_bytes),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model
                .address(shard_index, offset_bytes)
                .map_or(std::ptr::null(), |address| address as usize as *const u8),
        }
    }

    /// The layer that the weight byte at `address` belongs to. Lock-free.
    #[must_use]
    pub fn layer_of(&self, address: usize) -> Option<u32> {
        match self {
            Self::Local(model) => model.layer_of(address),
            Self::Daemon(model) => model.layer_of(address),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.layer_of(address as u64),
        }
    }

    /// See [`Model::acquire`].
    ///
    /// # Errors
    /// Those of [`Model::acquire`] and [`Attached::acquire`].
    pub fn acquire(
        &self,
        layer: u32,
        range: Option<(usize, usize)>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        match self {
            Self::Local(model) => model.acquire(layer, range, timeout),
            Self::Daemon(model) => model.acquire(layer, range, timeout),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => {
                let range = range.map(|(address, len)| (address as u64, len as u64));
                model.acquire(layer, range, timeout)
            }
        }
    }

    /// See [`Model::release`].
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired.
    pub fn release(&self, layer: u32) -> Result<()> {
        match self {
            Self::Local(model) => model.release(layer),
            Self::Daemon(model) => model.release(layer),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.release(layer),
        }
    }

    /// Gives a lease back while a GPU still reads the layer: `event`, a `CUevent` of the host, is recorded behind the last
    /// kernel that does.
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired or the model is not on a GPU; what the driver says.
    ///
    /// # Safety
    /// `event` is NULL or an event of this process that is alive during the call.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub unsafe fn release_after(&self, layer: u32, event: *mut c_void) -> Result<()> {
        match self {
            Self::Local(_) | Self::Daemon(_) => Err(Error::new(
                ErrorKind::Invalid,
                "the model's weights are in host memory: release its layers when they have been read",
            )),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => {
                // SAFETY: by this function's contract.
                let event = unsafe { model.relay(layer)?.behind(event) }?;
                model.release_after(layer, event)
            }
        }
    }

    /// True when routed experts are acquired by their ranges. In the daemon and on a GPU they come with their layer.
    #[must_use]
    pub fn experts_on_demand(&self) -> bool {
        match self {
            Self::Local(model) => model.experts_on_demand(),
            _ => false,
        }
    }

    /// See [`Model::acquire_ranges`]. In the daemon each range is a lease of its layer, and must lie in one.
    ///
    /// # Errors
    /// Those of [`Model::acquire_ranges`] and [`Attached::acquire`].
    pub fn acquire_ranges(
        &self,
        ranges: &[(usize, usize)],
        timeout: Option<Duration>,
    ) -> Result<()> {
        match self {
            Self::Local(model) => model.acquire_ranges(ranges, timeout),
            Self::Daemon(model) => model.acquire_ranges(ranges, timeout),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => Err(no_ranges()),
        }
    }

    /// See [`Model::release_ranges`].
    ///
    /// # Errors
    /// `Invalid` for ranges that are not leased.
    pub fn release_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        match self {
            Self::Local(model) => model.release_ranges(ranges),
            Self::Daemon(model) => model.release_ranges(ranges),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => Err(no_ranges()),
        }
    }

    /// See [`Model::hint_ranges`]. In the daemon and on a GPU experts come with their layer, and [`Opened::hint`]
    /// is for layers: nothing.
    ///
    /// # Errors
    /// Those of [`Model::hint_ranges`].
    pub fn hint_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        match self {
            Self::Local(model) => model.hint_ranges(ranges),
            _ => Ok(()),
        }
    }

    /// Bytes of a row of the table at this place among the tensors; `None` where [`Opened::read_rows`] does not read it.
    #[must_use]
    pub fn row_bytes(&self, tensor_index: usize) -> Option<u64> {
        match self {
            Self::Local(model) => model.row_bytes(tensor_index),
            _ => None,
        }
    }

    /// See [`Model::read_rows`]. A daemon does not read rows, and for a GPU the host keeps them.
    ///
    /// # Errors
    /// Those of [`Model::read_rows`]; `Unsupported` in the daemon and on a GPU.
    pub fn read_rows(&self, address: usize, ids: &[u32], out: &mut [u8]) -> Result<()> {
        match self {
            Self::Local(model) => model.read_rows(address, ids, out),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                "rows are not read through a daemon, nor for a GPU: no tensor of such a model has FLEA_TENSOR_ROWS",
            )),
        }
    }

    /// What the row readers hold in memory.
    #[must_use]
    pub fn rows_bytes(&self) -> u64 {
        match self {
            Self::Local(model) => model.rows_bytes(),
            _ => 0,
        }
    }

    /// True for an address in a window, where a host's loader must not write.
    #[must_use]
    pub fn in_window(&self, address: usize) -> bool {
        match self {
            Self::Local(model) => model.in_window(address),
            Self::Daemon(model) => model.layer_of(address).is_some(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.layer_of(address as u64).is_some(),
        }
    }

    /// See [`Model::hint`].
    ///
    /// # Errors
    /// Those of [`Model::hint`] and [`Attached::hint`].
    pub fn hint(&self, layers: &[u32]) -> Result<()> {
        match self {
            Self::Local(model) => model.hint(layers),
            Self::Daemon(model) => model.hint(layers),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => model.hint(layers),
        }
    }

    /// Counters so far, without those of memory where they would have to be measured: see [`Model::counters`].
    #[must_use]
    pub fn counters(&self) -> Stats {
        match self {
            Self::Local(model) => model.counters(),
            Self::Daemon(model) => model.stats(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => gpu_stats(model),
        }
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match self {
            Self::Local(model) => model.stats(),
            Self::Daemon(model) => model.stats(),
            #[cfg(feature = "cuda")]
            Self::Gpu(model) => gpu_stats(model),
        }
    }
}

/// The first GPU: what all of them have alike.
#[cfg(feature = "cuda")]
fn first(model: &Gpus) -> &GpuModel {
    model.parts()[0].model()
}

/// Counters of a GPU's leases, and of the drive below them.
#[cfg(feature = "cuda")]
fn gpu_stats(model: &Gpus) -> Stats {
    let stats = model.stats();
    Stats {
        acquires: stats.acquires,
        releases: stats.releases,
        loads: stats.loads,
        stalls: stats.stalls,
        stall_ns: stats.stall_ns,
        bytes_read: stats.bytes_read,
        ..stats.host
    }
}

#[cfg(feature = "cuda")]
fn no_ranges() -> Error {
    let context = "on a GPU experts come with their layer (no tensor has FLEA_TENSOR_EXPERTS): acquire the layer";
    Error::new(ErrorKind::Unsupported, context)
}
