//! A model that is open: the one public heart of the crate.
//!
//! Opening reads headers and reserves windows. The plan is made at open, or (`defer_plan`) at the first acquire, when
//! the host's own memory is known; with it the pool is allocated and the stream starts. From then on a host acquires
//! a layer, computes with the weights at their constant addresses, and releases it.

use super::latency::Histogram;
use super::layout::{Layout, Spans};
use super::leases::thread_id;
use super::open::read_catalog;
use super::options::{BudgetSpec, OpenOptions};
use super::placement;
use super::reading::{profile_of, reader_options};
use super::rows::Table;
use super::state::{Need, State};
use super::stats::{BudgetReport, Fallback};
use super::stream::{self, Core, Started};
use super::trace::Trace;
use super::wait::{Asked, Hall};
use crate::error::{Error, ErrorKind, Result};
use crate::io::mirror::{self, Copies};
use crate::io::profile::Found;
use crate::io::{Counters, ReaderOptions, ShardFile, Waker};
use crate::mem::{Backing, Binding, Pool, PoolOptions, Windows, limits};
use crate::model::Catalog;
use crate::plan::{self, ExpertOptions, Method, Plan, PlanOptions, budget};
use crate::units::{MemorySpec, PAGE_4K};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// What exists once the plan is made.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) plan: Plan,
    pub(super) budget: BudgetReport,
    pub(super) layout: Arc<Layout>,
    pub(super) core: Arc<Core>,
    pub(super) started: Started,
    pub(super) not_bound: Option<Fallback>,
    pub(super) thread: Option<JoinHandle<()>>,
}

/// A model that is open.
#[derive(Debug)]
pub struct Model {
    // Dropped first: it ends the stream, which uses files and windows.
    pub(super) running: OnceLock<Running>,
    pub(super) starting: Mutex<()>,
    pub(super) catalog: Arc<Catalog>,
    /// The shards, and behind them those of every mirror.
    pub(super) files: Arc<[ShardFile]>,
    pub(super) copies: Arc<Copies>,
    pub(super) windows: Arc<Windows>,
    pub(super) spans: Spans,
    pub(super) options: OpenOptions,
    pub(super) page_bytes: u64,
    pub(super) experts_allowed: bool,
    pub(super) tables: Box<[Table]>,
    pub(super) trace: OnceLock<Arc<Trace>>,
}

impl Model {
    /// Opens the model at `path` (see [`read_catalog`] for what may stand there).
    ///
    /// # Errors
    /// Those of [`read_catalog`]; `Refused` with the arithmetic when the budget is too small (unless the plan is
    /// deferred: then the first acquire says so); `NoMemory` when the system does not give what was planned.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self> {
        let (catalog, files) = read_catalog(path)?;
        Self::from_parts(catalog, files, options)
    }

    /// [`Model::open`] for a catalog and shards that are at hand.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub fn from_parts(
        catalog: Catalog,
        files: Vec<ShardFile>,
        options: OpenOptions,
    ) -> Result<Self> {
        let files = mirror::open(files, &options.mirrors)?;
        Self::again(Arc::new(catalog), files.into(), options)
    }

    /// [`Model::from_parts`] for parts that another model has as well: the daemon makes a new one for each plan.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub fn again(
        catalog: Arc<Catalog>,
        files: Arc<[ShardFile]>,
        options: OpenOptions,
    ) -> Result<Self> {
        if catalog.layers.is_empty() {
            let context = format!(
                "{}: no layers in this model, nothing to stream",
                catalog.shards[0].path.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let lens: Vec<u64> = catalog.shards.iter().map(|shard| shard.len_bytes).collect();
        let experts_allowed = options.experts
            && options.backing == Backing::Private
            && plan::experts::has_experts(&catalog);
        let model = Self {
            experts_allowed,
            tables: Table::all(&catalog),
            running: OnceLock::new(),
            starting: Mutex::new(()),
            windows: Arc::new(Windows::reserve(&lens)?),
            spans: Spans::new(&catalog),
            page_bytes: options
                .page_bytes
                .unwrap_or_else(|| plan::default_page_bytes(&catalog)),
            copies: Arc::new(Copies::new(&files, lens.len())),
            catalog,
            files,
            trace: options
                .trace
                .clone()
                .map_or_else(OnceLock::new, OnceLock::from),
            options,
        };
        if !model.options.defer_plan {
            model.running()?;
        }
        Ok(model)
    }

    /// Sends events to `trace` from the plan on: for who opens with a deferred plan. Only the first one counts, and one
    /// given too late gets nothing.
    pub fn trace_into(&self, trace: Arc<Trace>) {
        let _ = self.trace.set(trace);
    }

    /// What is in the files.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The plan, once it is made.
    #[must_use]
    pub fn plan(&self) -> Option<&Plan> {
        self.running.get().map(|running| &running.plan)
    }

    /// The budget the plan was made for.
    #[must_use]
    pub fn budget(&self) -> Option<BudgetReport> {
        self.running.get().map(|running| running.budget)
    }

    /// The page size of the plan.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.plan().map_or(self.page_bytes, |plan| plan.page_bytes)
    }

    /// How many slots the ring has, or will have.
    #[must_use]
    pub fn slots_count(&self) -> u32 {
        self.plan()
            .map_or(self.options.slots_count, |plan| plan.slots_count)
    }

    /// The backing asked for.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.options.backing
    }

    /// What is known about the drive of the first shard: request length and depth come from it where none are given.
    #[must_use]
    pub fn profile(&self) -> Found {
        profile_of(&self.files[0])
    }

    /// The constant address of byte `offset_bytes` of a shard. Readable only under a lease of its layer.
    #[must_use]
    pub fn address(&self, shard_index: u32, offset_bytes: u64) -> *const u8 {
        self.windows.address(shard_index, offset_bytes).cast_const()
    }

    /// The layer that the weight byte at `address` belongs to. Lock-free.
    #[must_use]
    pub fn layer_of(&self, address: usize) -> Option<u32> {
        let (shard_index, offset_bytes) = self.windows.locate(address)?;
        self.spans.layer_at(shard_index, offset_bytes)
    }

    /// True for an address in a window: where a host's loader must not write.
    #[must_use]
    pub fn in_window(&self, address: usize) -> bool {
        self.windows.locate(address).is_some()
    }

    /// Waits until a layer (or only `range`, an address and a length in its window) is in memory, and keeps it there
    /// until [`Model::release`]. Counted: as many releases as acquires. `timeout`: `None` for ever, zero to try.
    ///
    /// # Errors
    /// `Invalid` for a layer or range that is not there; `Again` and `Timeout` when it is not ready in time; `Busy`
    /// when this thread itself holds what it would wait for; `Refused` when a deferred plan does not fit; and what the
    /// drive said: `Io`, `Truncated`, `Changed`. After an error the next acquire reads again.
    pub fn acquire(
        &self,
        layer: u32,
        range: Option<(usize, usize)>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let need = self.need(layer, range)?;
        self.acquire_need(layer, need, timeout)
    }

    /// [`Model::acquire`] for a range that has been looked at.
    pub(super) fn acquire_need(
        &self,
        layer: u32,
        need: Need,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let running = self.running()?;
        if let Need::Bytes {
            shard_index,
            start_bytes,
            end_bytes,
        } = need
            && !running
                .layout
                .units_in(shard_index, start_bytes, end_bytes)
                .is_empty()
        {
            let context = format!(
                "layer {layer}: experts of this model come one by one; acquire them with flea_acquire_ranges"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let asked = Asked::by_this_thread(layer, need);
        let wake = || running.started.waker.wake();
        running.core.hall.acquire(&wake, asked, timeout)
    }

    /// Gives a lease back. May be called on another thread than the acquire.
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired.
    pub fn release(&self, layer: u32) -> Result<()> {
        self.check_layer(layer)?;
        let running = self.running.get().ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!("layer {layer} is released but nothing was ever acquired"),
            )
        })?;
        let wake = {
            let mut state = running.core.state();
            let last = state.release(layer, thread_id())?;
            if let (Some(trace), true) = (running.core.hall.trace.get(), last) {
                trace.released(layer);
            }
            std::mem::take(&mut state.hungry)
        };
        if wake {
            running.started.waker.wake();
        }
        Ok(())
    }

    /// Says which layers will be acquired next, in order. Overrides what was learned, once.
    ///
    /// # Errors
    /// `Invalid` for a layer that is not there; those of a deferred plan.
    pub fn hint(&self, layers: &[u32]) -> Result<()> {
        for layer in layers {
            self.check_layer(*layer)?;
        }
        let running = self.running()?;
        let wake = {
            let mut state = running.core.state();
            state.hint(layers);
            std::mem::take(&mut state.hungry)
        };
        if wake {
            running.started.waker.wake();
        }
        Ok(())
    }

    /// What the stream works on, and how to wake it, once the plan is made.
    pub(super) fn core_and_waker(&self) -> Option<(&Core, &Waker)> {
        let running = self.running.get()?;
        Some((&running.core, &running.started.waker))
    }

    fn check_layer(&self, layer: u32) -> Result<()> {
        let count = self.catalog.layers.len();
        if (layer as usize) < count {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!("layer {layer} does not exist, the model has {count} layers"),
        ))
    }

    fn need(&self, layer: u32, range: Option<(usize, usize)>) -> Result<Need> {
        self.check_layer(layer)?;
        let Some((address, len)) = range else {
            return Ok(Need::Whole);
        };
        let invalid = || {
            Error::new(
                ErrorKind::Invalid,
                format!("{len} bytes at {address:#x} are not in layer {layer}"),
            )
        };
        let (shard_index, start_bytes) = self.windows.locate(address).ok_or_else(invalid)?;
        let end_bytes = start_bytes.checked_add(len as u64).ok_or_else(invalid)?;
        let inside = self.catalog.layers[layer as usize]
            .extents
            .iter()
            .any(|extent| {
                extent.shard_index == shard_index
                    && extent.offset_bytes <= start_bytes
                    && end_bytes <= extent.end_bytes()
            });
        if inside && len > 0 {
            Ok(Need::Bytes {
                shard_index,
                start_bytes,
                end_bytes,
            })
        } else {
            Err(invalid())
        }
    }

    /// The running part; makes the plan and starts the stream the first time.
    pub(super) fn running(&self) -> Result<&Running> {
        if let Some(running) = self.running.get() {
            return Ok(running);
        }
        let _one_at_a_time = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = self.running.get() {
            return Ok(running);
        }
        let running = self.start()?;
        Ok(self.running.get_or_init(|| running))
    }

    fn start(&self) -> Result<Running> {
        let (plan, budget) = self.make_plan()?;
        if self.options.backing == Backing::Shared {
            plan.require_ring()?;
        }
        log::info!(
            "plan: resident_bytes={} streamed_bytes_per_pass={} ring_bytes={} page_bytes={} total_bytes={} host_bytes={}",
            plan.resident_bytes,
            plan.streamed_bytes_per_pass,
            plan.ring_bytes,
            plan.page_bytes,
            budget.total_bytes,
            budget.host_bytes
        );
        let (binding, not_bound) = if self.options.numa {
            placement::of_drive(&self.files[0])
        } else {
            (None, None)
        };
        let pool = self.new_pool(&plan, binding.clone())?;
        let fixed_slots = self.options.backing == Backing::Shared;
        let reader = reader_options(&self.options.reader, plan.page_bytes, &self.files[0]);
        let request_bytes = u64::from(reader.request_bytes);
        let layout = Arc::new(Layout::new(
            &self.catalog,
            &plan,
            request_bytes,
            pool.slots_count(),
            fixed_slots,
        ));
        let core = self.new_core(pool, &layout);
        let (thread, started) = self.spawn_stream(&core, &layout, reader, binding)?;
        Ok(Running {
            plan,
            budget,
            layout,
            core,
            started,
            not_bound,
            thread: Some(thread),
        })
    }

    fn new_pool(&self, plan: &Plan, binding: Option<Binding>) -> Result<Pool> {
        let options = PoolOptions {
            binding,
            cancel: self.options.shared.cancel.clone(),
            fill_behind: true,
        };
        let windows = Arc::clone(&self.windows);
        Pool::new(windows, plan, self.options.backing, &options)
    }

    fn new_core(&self, pool: Pool, layout: &Arc<Layout>) -> Arc<Core> {
        let board = self.options.shared.board.clone();
        Arc::new(Core {
            hall: Hall {
                state: Mutex::new(State::new(Arc::clone(layout), board)),
                changed: Condvar::new(),
                trace: self.trace.clone(),
            },
            pool: Mutex::new(pool),
            counters: Mutex::new(Counters::default()),
            copies: Arc::clone(&self.copies),
            load_latency: Histogram::default(),
            stop: AtomicBool::new(false),
        })
    }

    /// Starts the stream's thread, and waits until it can read.
    fn spawn_stream(
        &self,
        core: &Arc<Core>,
        layout: &Arc<Layout>,
        reader: ReaderOptions,
        binding: Option<Binding>,
    ) -> Result<(JoinHandle<()>, Started)> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (core, layout) = (Arc::clone(core), Arc::clone(layout));
        let (files, shared) = (Arc::clone(&self.files), self.options.shared.clone());
        let thread = std::thread::Builder::new()
            .name("flea-stream".to_owned())
            .spawn(move || {
                if let Some(binding) = binding
                    && let Err(error) = binding.topology.pin_thread(binding.node_index)
                {
                    log::warn!("the stream's thread is not pinned to its drive's node: {error}");
                }
                stream::run(&core, &layout, &files, &reader, &shared, &sender);
            })
            .map_err(|error| Error::from_io(&error, "start the stream's thread"))?;
        let lost = |_| {
            let context = "the stream's thread ended before it began";
            Error::new(ErrorKind::Internal, context)
        };
        match receiver.recv().map_err(lost).and_then(|started| started) {
            Ok(started) => Ok((thread, started)),
            Err(error) => {
                // It holds the pool: only when it is gone is the memory free for another attempt.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    fn make_plan(&self) -> Result<(Plan, BudgetReport)> {
        let (process_bytes, host_bytes) = host_bytes(&self.options)?;
        let layers = PlanOptions {
            slots_count: self.options.slots_count,
            page_bytes: self.page_bytes,
        };
        let method = match self.experts_allowed {
            true => Method::Experts {
                layers,
                experts: ExpertOptions {
                    page_bytes: self.options.page_bytes.unwrap_or(PAGE_4K),
                    ..ExpertOptions::default()
                },
            },
            false => Method::Layers(layers),
        };
        match self.options.budget {
            BudgetSpec::Pool(bytes) => {
                let total_bytes = host_bytes.saturating_add(bytes);
                let report = BudgetReport {
                    total_bytes,
                    host_bytes,
                    weight_budget_bytes: bytes,
                };
                Ok((method.plan(&self.catalog, bytes)?, report))
            }
            BudgetSpec::Memory(spec) => {
                let (budget, plan) = budget::resolve_and_plan(
                    &self.catalog,
                    spec,
                    available_bytes(spec, process_bytes)?,
                    host_bytes,
                    &method,
                )?;
                Ok((plan, budget))
            }
        }
    }
}

/// What the process holds now, and all that it needs besides weights.
///
/// # Errors
/// What reading them gives.
pub(super) fn host_bytes(options: &OpenOptions) -> Result<(u64, u64)> {
    let process_bytes = limits::process_memory_bytes()?;
    let pending_bytes = options.host_pending_bytes.load(Ordering::Acquire);
    let host_bytes = process_bytes
        .saturating_add(pending_bytes)
        .saturating_add(budget::HOST_RESERVE_BYTES);
    Ok((process_bytes, host_bytes))
}

/// The most that a process may hold altogether which holds `process_bytes` now.
///
/// # Errors
/// What reading the limits gives.
pub(super) fn available_bytes(spec: MemorySpec, process_bytes: u64) -> Result<u64> {
    // The margin is for a total that flea chooses; one that the user names may take all that is free.
    let free_bytes = match spec {
        MemorySpec::Auto => limits::available_memory_bytes()?,
        MemorySpec::Bytes(_) | MemorySpec::Percent(_) => limits::free_memory()?.bytes,
    };
    // What the process holds already is part of its total, so it counts as available to it.
    Ok(free_bytes.saturating_add(process_bytes))
}

impl Drop for Running {
    fn drop(&mut self) {
        self.core.stop.store(true, Ordering::Release);
        self.started.waker.wake();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the stream's thread had panicked");
        }
    }
}
