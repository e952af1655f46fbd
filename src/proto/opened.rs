//! A model, wherever it is: in this process or in the daemon. The same calls, the same results.

use super::Attached;
use crate::engine::{BudgetReport, Model, OpenOptions, Stats, Trace};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Backing;
use crate::model::Catalog;
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

/// An open model.
#[derive(Debug)]
pub enum Opened {
    /// In this process.
    Local(Box<Model>),
    /// In the daemon.
    Daemon(Box<Attached>),
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

    /// What is in the files.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        match self {
            Self::Local(model) => model.catalog(),
            Self::Daemon(model) => model.catalog(),
        }
    }

    /// The plan's figures, once it is made.
    #[must_use]
    pub fn plan(&self) -> Option<PlanFigures> {
        match self {
            Self::Local(model) => model.plan().map(|plan| PlanFigures {
                slot_bytes: plan.slot_pages * plan.page_bytes,
                resident_bytes: plan.resident_bytes,
                ring_bytes: plan.ring_bytes,
                streamed_bytes_per_pass: plan.streamed_bytes_per_pass,
                expert_cache_bytes: plan.cache_bytes(),
            }),
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
        }
    }

    /// The page size of the plan.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        match self {
            Self::Local(model) => model.page_bytes(),
            Self::Daemon(model) => model.figures().page_bytes,
        }
    }

    /// How many slots the ring has, or will have.
    #[must_use]
    pub fn slots_count(&self) -> u32 {
        match self {
            Self::Local(model) => model.slots_count(),
            Self::Daemon(model) => model.figures().slots_count,
        }
    }

    /// Where the weights live.
    #[must_use]
    pub fn backing(&self) -> Backing {
        match self {
            Self::Local(model) => model.backing(),
            Self::Daemon(_) => Backing::Shared,
        }
    }

    /// See [`Model::trace_into`]. The daemon traces nothing for its clients: false.
    pub fn trace_into(&self, trace: Arc<Trace>) -> bool {
        match self {
            Self::Local(model) => model.trace_into(trace),
            Self::Daemon(_) => return false,
        }
        true
    }

    /// What is known about the drive, in words: request length and depth come from it where none are given.
    #[must_use]
    pub fn profile(&self) -> String {
        match self {
            Self::Local(model) => model.profile().to_string(),
            Self::Daemon(_) => "the daemon's".to_owned(),
        }
    }

    /// The constant address of a byte of a shard. Readable only under a lease of its layer.
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> *const u8 {
        match self {
            Self::Local(model) => model.address(shard_index, offset_bytes),
            Self::Daemon(model) => model.address(shard_index, offset_bytes),
        }
    }

    /// The layer that the weight byte at `address` belongs to. Lock-free.
    #[must_use]
    pub fn layer_of(&self, address: usize) -> Option<u32> {
        match self {
            Self::Local(model) => model.layer_of(address),
            Self::Daemon(model) => model.layer_of(address),
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
        }
    }

    /// True when routed experts are acquired by their ranges. In the daemon they come with their layer.
    #[must_use]
    pub fn experts_on_demand(&self) -> bool {
        match self {
            Self::Local(model) => model.experts_on_demand(),
            Self::Daemon(_) => false,
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
        }
    }

    /// See [`Model::hint_ranges`]. In the daemon experts come with their layer, and [`Opened::hint`] is for layers: nothing.
    ///
    /// # Errors
    /// Those of [`Model::hint_ranges`].
    pub fn hint_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        match self {
            Self::Local(model) => model.hint_ranges(ranges),
            Self::Daemon(_) => Ok(()),
        }
    }

    /// Bytes of a row of the table at this place among the tensors; `None` where [`Opened::read_rows`] does not read it.
    #[must_use]
    pub fn row_bytes(&self, tensor_index: usize) -> Option<u64> {
        match self {
            Self::Local(model) => model.row_bytes(tensor_index),
            Self::Daemon(_) => None,
        }
    }

    /// See [`Model::read_rows`]. A daemon does not read rows.
    ///
    /// # Errors
    /// Those of [`Model::read_rows`]; `Unsupported` in the daemon.
    pub fn read_rows(&self, address: usize, ids: &[u32], out: &mut [u8]) -> Result<()> {
        match self {
            Self::Local(model) => model.read_rows(address, ids, out),
            Self::Daemon(_) => Err(Error::new(
                ErrorKind::Unsupported,
                "rows are not read through a daemon: no tensor of such a model has FLEA_TENSOR_ROWS",
            )),
        }
    }

    /// What the row readers hold in memory.
    #[must_use]
    pub fn rows_bytes(&self) -> u64 {
        match self {
            Self::Local(model) => model.rows_bytes(),
            Self::Daemon(_) => 0,
        }
    }

    /// True for an address in a window, where a host's loader must not write.
    #[must_use]
    pub fn in_window(&self, address: usize) -> bool {
        match self {
            Self::Local(model) => model.in_window(address),
            Self::Daemon(model) => model.layer_of(address).is_some(),
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
        }
    }

    /// Counters so far, without those of memory where they would have to be measured: see [`Model::counters`].
    #[must_use]
    pub fn counters(&self) -> Stats {
        match self {
            Self::Local(model) => model.counters(),
            Self::Daemon(model) => model.stats(),
        }
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match self {
            Self::Local(model) => model.stats(),
            Self::Daemon(model) => model.stats(),
        }
    }
}
