//! One model in the daemon: its board, its stream, and the plan in force.
//!
//! A plan never changes: a new budget makes a new one, under a new generation. The gate is closed, the clients give back
//! what they hold (or are revoked), the old pool goes back to the system, the new one is made and the gate opens again.
//! So the two pools are never there at the same time and the budget holds at every moment. Everything that takes time
//! runs on the daemon's worker thread; the reactor only ever looks.

use super::settings::Settings;
use crate::engine::board::{self, Board};
use crate::engine::serve::Failure;
use crate::engine::share::{Group, Member};
use crate::engine::{BudgetSpec, FallbackKind, Model, OpenOptions, STALL_BOUNDS_NS, Shared, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{ReaderOptions, ShardFile};
use crate::mem::Backing;
use crate::model::{Catalog, records};
use crate::plan::{self, PlanOptions};
use crate::proto::plan::{Figures, Placed, describe, holds_max};
use crate::proto::snapshot::ModelState;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the worker looks whether the leases of an old plan are back.
const DRAIN_LOOK: Duration = Duration::from_millis(1);

/// How long after clients were revoked those that hold leases by then are.
const REVOKE_AGAIN: Duration = Duration::from_millis(50);

/// What a plan says to clients, ready to be told.
#[derive(Debug, Clone)]
pub struct Told {
    /// Its figures.
    pub figures: Figures,
    /// Where its runs lie.
    pub runs: Arc<Vec<Placed>>,
}

#[derive(Debug)]
struct Inner {
    model: Option<Arc<Model>>,
    told: Option<Told>,
    state: &'static str,
    /// Measured when the pool was made: it stays as it is.
    huge_page_share: f64,
    fallbacks: Vec<String>,
    /// Counters of the streams of earlier plans.
    before: Counters,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    bytes_read: u64,
    reads: u64,
    retries: u64,
    read_ns: u64,
    loads: u64,
    stalls: u64,
    stall_ns: u64,
    stall_counts: [u64; STALL_BOUNDS_NS.len() + 1],
}

/// A model that clients can attach to.
#[derive(Debug)]
pub struct Hosted {
    /// Its number.
    pub id: u32,
    /// Where it lies, links resolved.
    pub path: PathBuf,
    /// Its board.
    pub board: Arc<Board>,
    /// The smallest weight budget that works.
    pub smallest_bytes: u64,
    /// The budget beyond which nothing is gained: all of it resident.
    pub largest_bytes: u64,
    /// Kept when memory is wanted for another.
    pub pinned: AtomicBool,
    /// When somebody last attached or left, for who has to go first.
    pub used: Mutex<Instant>,
    /// Its catalog as rows.
    pub rows: Vec<records::Record>,
    weight: AtomicU32,
    catalog: Arc<Catalog>,
    files: Arc<[ShardFile]>,
    options: PlanOptions,
    reader: ReaderOptions,
    numa: bool,
    require_huge_pages: bool,
    member: Arc<Member>,
    cancel: Arc<AtomicBool>,
    inner: Mutex<Inner>,
}

impl Hosted {
    /// A model of which nothing is in memory yet. `cancel` stops the filling of its pools.
    ///
    /// # Errors
    /// `Unsupported` for a model without layers; what the planner says about its files.
    pub fn new(
        id: u32,
        path: PathBuf,
        (catalog, files): (Catalog, Vec<ShardFile>),
        settings: &Settings,
        (group, cancel): (&Arc<Group>, &Arc<AtomicBool>),
        weight: u32,
    ) -> Result<Self> {
        let options = PlanOptions {
            slots_count: settings.slots_count,
            page_bytes: settings
                .page_bytes
                .unwrap_or_else(|| plan::default_page_bytes(&catalog)),
        };
        if catalog.layers.is_empty() {
            let context = format!("{}: no layers, nothing to stream", path.display());
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let layers = u32::try_from(catalog.layers.len()).unwrap_or(u32::MAX);
        let board = Board::new(layers, holds_max(settings.slots_count) as usize)?;
        let whole = plan::plan(&catalog, u64::MAX, &options)?;
        Ok(Self {
            id,
            path,
            board: Arc::new(board),
            smallest_bytes: plan::smallest_budget_bytes(&catalog, &options)?,
            largest_bytes: whole.resident_bytes + whole.ring_bytes,
            pinned: AtomicBool::new(false),
            used: Mutex::new(Instant::now()),
            rows: records::rows(&catalog).collect(),
            weight: AtomicU32::new(weight),
            catalog: Arc::new(catalog),
            files: files.into(),
            options,
            reader: ReaderOptions {
                kind: settings.reader,
                depth: settings.depth,
                request_bytes: settings.request_bytes,
                ..ReaderOptions::default()
            },
            numa: settings.numa,
            require_huge_pages: settings.require_huge_pages,
            member: group.join(weight),
            cancel: Arc::clone(cancel),
            inner: Mutex::new(Inner {
                model: None,
                told: None,
                state: "loading",
                huge_page_share: 0.0,
                fallbacks: Vec::new(),
                before: Counters::default(),
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its share against other models.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Changes that share.
    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight, Ordering::Relaxed);
        self.member.set_weight(weight);
    }

    /// True while its paths lead to the files that it was opened from, unchanged: hosts read headers from there.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.files.iter().all(ShardFile::is_current)
    }

    /// Clients that are attached.
    #[must_use]
    pub fn clients_count(&self) -> u32 {
        u32::try_from(self.board.clients().len()).unwrap_or(u32::MAX)
    }

    /// What its present plan may take; 0 without one.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        let inner = self.inner();
        inner
            .told
            .as_ref()
            .map_or(0, |told| told.figures.weight_budget_bytes)
    }

    /// The plan in force, for a client, with a descriptor of its pool.
    ///
    /// # Errors
    /// `Again` while a new plan is being made, `Connection` when there will be none.
    pub fn plan(&self) -> Result<(Told, OwnedFd)> {
        let inner = self.inner();
        match (&inner.model, &inner.told) {
            (Some(model), Some(told)) => Ok((told.clone(), model.pool_fd()?)),
            _ if inner.state == "failed" || inner.state == "unloaded" => Err(Error::new(
                ErrorKind::Connection,
                "the daemon has unloaded the model",
            )),
            _ => Err(Error::new(
                ErrorKind::Again,
                "a new plan is being made; ask again",
            )),
        }
    }

    fn model(&self) -> Option<Arc<Model>> {
        self.inner().model.clone()
    }

    /// A client waits for something, or gave something back.
    pub fn wake(&self) {
        if let Some(model) = self.model() {
            model.wake();
        }
    }

    /// Clients that have held a layer for longer than `timeout` while others wanted its slot.
    #[must_use]
    pub fn overdue(&self, timeout: Duration) -> Vec<u64> {
        self.model()
            .map_or_else(Vec::new, |model| model.overdue(timeout))
    }

    /// Why a layer does not come.
    #[must_use]
    pub fn failure(&self, layer: u32) -> Option<Failure> {
        self.model()?.failure(layer)
    }

    /// True when a layer has a transient run in the plan in force.
    #[must_use]
    pub fn streams(&self, layer: u32) -> bool {
        let inner = self.inner();
        let told = inner.told.as_ref();
        told.is_some_and(|told| told.runs.iter().any(|run| run.layer == Some(layer)))
    }

    /// Most transient layers a client may hold now.
    #[must_use]
    pub fn holds_max(&self) -> u32 {
        let inner = self.inner();
        inner
            .told
            .as_ref()
            .map_or(u32::MAX, |told| told.figures.holds_max)
    }

    /// Makes a plan for `budget_bytes` and puts it in force; returns when the old pool's memory is back with the system and
    /// the new one is filled with room. `revoke` is told who still holds leases of the old plan after `patience`.
    /// On an error the old plan is in force again, or, if that cannot be had any more, the smallest.
    ///
    /// # Errors
    /// `Refused`, `NoMemory`: what the planner and the system say.
    pub fn change(
        &self,
        budget_bytes: u64,
        patience: Duration,
        revoke: &dyn Fn(Vec<u64>),
    ) -> Result<()> {
        let before_bytes = self.budget_bytes();
        plan::plan(&self.catalog, budget_bytes, &self.options)?.require_ring()?;
        self.drain(patience, revoke);
        self.take_down();
        let made = self.set_up(budget_bytes);
        let Err(error) = made else { return Ok(()) };
        for fallback_bytes in [before_bytes, self.smallest_bytes] {
            if fallback_bytes > 0 && self.set_up(fallback_bytes).is_ok() {
                return Err(error);
            }
        }
        self.close("failed");
        Err(error)
    }

    /// Waits until no client holds anything.
    fn drain(&self, patience: Duration, revoke: &dyn Fn(Vec<u64>)) {
        let Some(model) = self.model() else { return };
        self.inner().state = "changing";
        self.board.set_gate(board::GATE_DRAINING);
        model.set_draining(true);
        drop(model);
        // Who attaches from here on finds the gate closed: it holds nothing, whatever its page says, and cannot keep us.
        let began = Instant::now();
        let (mut revoked, mut before) = (None::<Instant>, Vec::new());
        loop {
            let holding = self.board.holding(began);
            if holding.is_empty() {
                return;
            }
            let due = revoked.map_or(began.elapsed() > patience, |at| at.elapsed() > REVOKE_AGAIN);
            if due {
                // A client that only looks whether it may raises its hold for a moment: two looks do not meet it.
                revoke(both(&holding, &before));
                revoked = Some(Instant::now());
            }
            before = holding;
            std::thread::sleep(DRAIN_LOOK);
        }
    }

    /// Ends the stream and gives the pool back.
    fn take_down(&self) {
        let model = {
            let mut inner = self.inner();
            inner.told = None;
            inner.model.take()
        };
        self.board.clear();
        let Some(mut model) = model else { return };
        // The reactor may be looking at it this moment; the last one to let go would end the stream, and must be us.
        let model = loop {
            match Arc::try_unwrap(model) {
                Ok(model) => break model,
                Err(shared) => model = shared,
            }
            std::thread::yield_now();
        };
        let stats = model.counters();
        drop(model);
        self.inner().before.add(&stats);
        self.board.clear();
    }

    fn set_up(&self, budget_bytes: u64) -> Result<()> {
        let options = OpenOptions {
            budget: BudgetSpec::Pool(budget_bytes),
            backing: Backing::Shared,
            reader: self.reader.clone(),
            slots_count: self.options.slots_count,
            page_bytes: Some(self.options.page_bytes),
            numa: self.numa,
            shared: Shared {
                board: Some(Arc::clone(&self.board)),
                share: Some(Arc::clone(&self.member)),
                cancel: Some(Arc::clone(&self.cancel)),
            },
            ..OpenOptions::default()
        };
        let model = Model::again(Arc::clone(&self.catalog), Arc::clone(&self.files), options)?;
        self.check_pages(&model)?;
        let (mut figures, runs) = describe(&model)?;
        let stats = model.stats();
        let generation = self.board.generation().wrapping_add(1).max(1);
        figures.generation = generation;
        self.board.set_generation(generation);
        {
            let mut inner = self.inner();
            inner.model = Some(Arc::new(model));
            inner.told = Some(Told {
                figures,
                runs: Arc::new(runs),
            });
            inner.state = "ready";
            inner.huge_page_share = stats.huge_page_share;
            inner.fallbacks = stats
                .fallbacks
                .iter()
                .map(|fallback| fallback.kind.name().to_owned())
                .collect();
        }
        self.board.set_gate(board::GATE_OPEN);
        Ok(())
    }

    /// Small pages where the settings ask for huge ones are an error, not a slower pool.
    fn check_pages(&self, model: &Model) -> Result<()> {
        let fallbacks = model.stats().fallbacks;
        let small = fallbacks
            .iter()
            .find(|f| f.kind == FallbackKind::SmallPages);
        match small {
            Some(small) if self.require_huge_pages => Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{}: huge_pages = \"require\", but {}; set vm.nr_hugepages or vm.nr_overcommit_hugepages",
                    self.path.display(),
                    small.reason
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Ends the model: its clients' next calls say so.
    pub fn close(&self, why: &'static str) {
        self.inner().state = why;
        self.board.set_gate(board::GATE_CLOSED);
        self.take_down();
    }

    /// Everything there is to say about it. Quick: the reactor asks.
    #[must_use]
    pub fn snapshot(&self) -> ModelState {
        let mut out = ModelState::default();
        let (model, told, before) = {
            let inner = self.inner();
            out.state = inner.state.to_owned();
            out.huge_page_share = inner.huge_page_share;
            out.fallbacks.clone_from(&inner.fallbacks);
            (inner.model.clone(), inner.told.clone(), inner.before)
        };
        let figures = told.map(|told| told.figures).unwrap_or_default();
        let mut out = ModelState {
            id: self.id,
            path: self.path.display().to_string(),
            architecture: self.catalog.architecture.clone(),
            pinned: self.pinned.load(Ordering::Relaxed),
            weight: self.weight(),
            clients: self.clients_count(),
            generation: figures.generation,
            layers: self.board.layer_count(),
            model_bytes: self.catalog.model_bytes,
            weight_budget_bytes: figures.weight_budget_bytes,
            smallest_budget_bytes: self.smallest_bytes,
            resident_bytes: figures.resident_bytes,
            ring_bytes: figures.ring_bytes,
            slots_count: figures.slots_count,
            page_bytes: self.options.page_bytes,
            streamed_bytes_per_pass: figures.streamed_bytes_per_pass,
            acquires_total: self.board.acquires(),
            put_off_total: self.board.put_off(),
            away_loads_total: self.board.away(),
            ..out
        };
        before.tell(&mut out);
        if let Some(model) = model {
            let stats = model.counters();
            out.pool_bytes = model.pool_held_bytes();
            out.reader = stats.reader.name().to_owned();
            out.direct_io = stats.direct_io;
            out.mispredicts_total = stats.mispredicts;
            out.slots_free = stats.slots.free;
            out.slots_used = stats.slots.used;
            out.slots_quarantined = stats.slots.quarantined;
            let mut all = before;
            all.add(&stats);
            all.tell(&mut out);
        }
        out
    }
}

/// Who is in both lists.
fn both(one: &[u64], other: &[u64]) -> Vec<u64> {
    let shared = one.iter().filter(|id| other.contains(id));
    shared.copied().collect()
}

impl Counters {
    fn add(&mut self, stats: &Stats) {
        self.bytes_read += stats.bytes_read;
        self.reads += stats.reads;
        self.retries += stats.retries;
        self.read_ns += stats.read_ns;
        self.loads += stats.loads;
        self.stalls += stats.stalls;
        self.stall_ns += stats.stall_ns;
        for (all, more) in self.stall_counts.iter_mut().zip(stats.stall_counts) {
            *all += more;
        }
    }

    fn tell(&self, out: &mut ModelState) {
        out.bytes_read_total = self.bytes_read;
        out.reads_total = self.reads;
        out.retries_total = self.retries;
        out.read_ns_total = self.read_ns;
        out.loads_total = self.loads;
        out.stalls_total = self.stalls;
        out.stall_ns_total = self.stall_ns;
        out.stall_counts = self.stall_counts.to_vec();
    }
}
