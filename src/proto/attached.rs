//! A model in the daemon, held by a client: the calls of [`crate::engine::Model`], with the same results.
//!
//! A lease of a layer that is there is a few atomics in shared words (see [`board`]). Otherwise the client says in its
//! page what it waits for, kicks the daemon once through an eventfd, and sleeps on the layer's state word. It looks at
//! the connection a few times a second: a daemon that is gone is `Connection`, a lease that was taken back is
//! `Revoked`, and from then on every call says so. Windows are mapped layer by layer, after the layer's lease is had,
//! whenever the plan has another generation than the one that was mapped.
//! Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::fetch::{
    AttachedAnswer, check_layout, fallback, fetch_catalog, fetch_plan, fetch_state, opened,
    program_name,
};
use super::lease::Need;
use super::message::{Attach, Method, to_value};
use super::plan::{ClientPlan, Figures};
use super::snapshot::ModelState;
use super::{Control, Socket};
use crate::engine::RANGES_MAX;
use crate::engine::board::{self, place};
use crate::engine::leases::{Leases, thread_id};
use crate::engine::{BudgetReport, Latency, Spans, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::mem::{Backing, SharedWords, Windows};
use crate::model::Catalog;
use serde_json::json;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How long a client sleeps before it looks at the connection.
pub(super) const SLICE: Duration = Duration::from_millis(50);
/// How often a client that never has to sleep looks at the connection.
const LOOK: Duration = Duration::from_millis(200);

/// No state word.
pub(super) const NO_WISH: u64 = u64::MAX;

/// A model in the daemon.
#[derive(Debug)]
pub struct Attached {
    pub(super) control: Mutex<Control>,
    /// The connection once more, to look at without waiting for `control`.
    pub(super) line: Socket,
    pub(super) model: u32,
    pub(super) catalog: Catalog,
    pub(super) windows: Arc<Windows>,
    pub(super) spans: Spans,
    pub(super) area: SharedWords,
    pub(super) page: SharedWords,
    pub(super) kick: OwnedFd,
    pub(super) plan: RwLock<Arc<ClientPlan>>,
    /// Per layer: the generation whose pages its window shows (0 = none), and in the low half the slot.
    pub(super) mapped: Vec<AtomicU64>,
    pub(super) mapping: Mutex<()>,
    /// Per layer: an acquire that did not wait has said that it is wanted, when the layer's state word was this; else
    /// [`NO_WISH`].
    pub(super) wished: Vec<AtomicU64>,
    pub(super) leases: Mutex<Leases>,
    pub(super) released: Condvar,
    pub(super) lost: OnceLock<Error>,
    pub(super) began: Instant,
    pub(super) looked_ms: AtomicU64,
    pub(super) baseline: ModelState,
    pub(super) acquires: AtomicU64,
    pub(super) releases: AtomicU64,
    pub(super) stalls: AtomicU64,
    pub(super) stall_ns: AtomicU64,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attached {
    /// Attaches to the model at `path` in the daemon that listens at `socket`, which opens it if nobody has.
    ///
    /// # Errors
    /// `Connection` naming the socket; what the daemon says: `NotFound`, `Permission`, `Refused`, what is wrong with
    /// the file.
    pub fn open(socket: &Path, path: &Path) -> Result<Self> {
        let absolute = std::path::absolute(path)
            .map_err(|error| Error::from_io(&error, format_args!("{}", path.display())))?;
        let Some(path) = absolute.to_str() else {
            let context = format!("{}: the daemon takes UTF-8 paths", absolute.display());
            return Err(Error::new(ErrorKind::Invalid, context));
        };
        let mut control = Control::connect_as(socket, &program_name())?;
        let attach = to_value(&Attach {
            path: path.to_owned(),
        })?;
        let packet = control.exchange(Method::Attach, &attach)?;
        let (answer, descriptors) = opened::<AttachedAnswer>(packet)?;
        let Ok([area, page, kick]) = <[OwnedFd; 3]>::try_from(descriptors) else {
            let context = "the daemon's answer came without its shared words";
            return Err(Error::new(ErrorKind::Connection, context));
        };
        let area = SharedWords::map(area, place::area_count(answer.layers), false)?;
        let page = SharedWords::map(page, place::page_count(answer.layers), true)?;
        check_layout(&area)?;
        let catalog = fetch_catalog(&mut control)?;
        if catalog.layers.len() != answer.layers as usize {
            let context = "the daemon's catalog has another number of layers";
            return Err(Error::new(ErrorKind::Connection, context));
        }
        let plan = fetch_plan(&mut control, catalog.layers.len())?;
        let lens: Vec<u64> = catalog.shards.iter().map(|shard| shard.len_bytes).collect();
        let baseline = fetch_state(&mut control, answer.model)?;
        let line = control.socket().as_fd().try_clone_to_owned();
        let line = line.map_err(|error| Error::from_io(&error, "duplicate the connection"))?;
        Ok(Self {
            control: Mutex::new(control),
            line: Socket::from(line),
            model: answer.model,
            windows: Arc::new(Windows::reserve(&lens)?),
            spans: Spans::new(&catalog),
            mapped: catalog.layers.iter().map(|_| AtomicU64::new(0)).collect(),
            wished: catalog
                .layers
                .iter()
                .map(|_| AtomicU64::new(NO_WISH))
                .collect(),
            catalog,
            area,
            page,
            kick,
            plan: RwLock::new(Arc::new(plan)),
            mapping: Mutex::new(()),
            leases: Mutex::default(),
            released: Condvar::new(),
            lost: OnceLock::new(),
            began: Instant::now(),
            looked_ms: AtomicU64::new(0),
            baseline,
            acquires: AtomicU64::new(0),
            releases: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            stall_ns: AtomicU64::new(0),
        })
    }

    /// What is in the files.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The plan in force, in numbers.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.plan().figures.clone()
    }

    /// The budget: the daemon's pool is all there is of it in this process.
    #[must_use]
    pub fn budget(&self) -> BudgetReport {
        let weight_budget_bytes = self.plan().figures.weight_budget_bytes;
        BudgetReport {
            total_bytes: weight_budget_bytes,
            host_bytes: 0,
            weight_budget_bytes,
        }
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

    /// As [`crate::engine::Model::acquire`].
    ///
    /// # Errors
    /// Those of [`crate::engine::Model::acquire`]; `Connection` when the daemon is gone, `Revoked` when it took this
    /// client's leases back.
    pub fn acquire(
        &self,
        layer: u32,
        range: Option<(usize, usize)>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let need = self.need(layer, range)?;
        let thread = thread_id();
        self.check_alive(LOOK)?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.admit(layer, thread, deadline)?;
        if self.take(layer, need, thread)? {
            return Ok(());
        }
        self.refuse_deadlock(layer, thread)?;
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(self.ask_for(layer)?);
        }
        self.stalls.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        self.page.add(place::want(layer), board::WANT);
        let result = self.wait(layer, need, thread, deadline);
        self.page.sub(place::want(layer), 1);
        let waited = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.stall_ns.fetch_add(waited, Ordering::Relaxed);
        result
    }

    /// As [`crate::engine::Model::release`].
    ///
    /// # Errors
    /// `Invalid` when the layer is not acquired.
    pub fn release(&self, layer: u32) -> Result<()> {
        self.check_layer(layer)?;
        let last = locked(&self.leases).remove(layer, thread_id())?;
        self.page.sub(place::hold(layer), 1);
        self.releases.fetch_add(u64::from(last), Ordering::Relaxed);
        self.released.notify_all();
        self.tell_of_release();
        Ok(())
    }

    /// As [`crate::engine::Model::acquire_ranges`], a layer's lease for each range, which must lie in one layer.
    ///
    /// # Errors
    /// Those of [`Attached::acquire`]; nothing is leased then.
    pub fn acquire_ranges(
        &self,
        ranges: &[(usize, usize)],
        timeout: Option<Duration>,
    ) -> Result<()> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let layers = self.layers_of(ranges)?;
        for (index, (layer, range)) in layers.iter().zip(ranges).enumerate() {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if let Err(error) = self.acquire(*layer, Some(*range), left) {
                for layer in &layers[..index] {
                    self.release(*layer)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// As [`crate::engine::Model::release_ranges`].
    ///
    /// # Errors
    /// Those of [`Attached::release`].
    pub fn release_ranges(&self, ranges: &[(usize, usize)]) -> Result<()> {
        let layers = self.layers_of(ranges)?;
        let give_back = |layer: &u32| self.release(*layer);
        layers.iter().map(give_back).fold(Ok(()), Result::and)
    }

    fn layers_of(&self, ranges: &[(usize, usize)]) -> Result<Vec<u32>> {
        if ranges.is_empty() || ranges.len() > RANGES_MAX {
            let context = format!("{} ranges; 1 to {RANGES_MAX} are possible", ranges.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let layer_of = |(address, len): &(usize, usize)| {
            self.layer_of(*address).ok_or_else(|| {
                let context =
                    format!("{len} bytes at {address:#x} are not weights of the model's layers");
                Error::new(ErrorKind::Invalid, context)
            })
        };
        ranges.iter().map(layer_of).collect()
    }

    /// As [`crate::engine::Model::hint`].
    ///
    /// # Errors
    /// `Invalid` for a layer that is not there; `Connection`, `Revoked`.
    pub fn hint(&self, layers: &[u32]) -> Result<()> {
        for layer in layers {
            self.check_layer(*layer)?;
        }
        self.check_alive(LOOK)?;
        // A pass at a time is what a packet holds and what anybody can foresee.
        let layers = &layers[..layers.len().min(self.catalog.layers.len())];
        let answer = locked(&self.control).call(Method::Hint, &json!({ "layers": layers }));
        answer.map(drop).map_err(|error| self.explain(error))
    }

    /// Counters: of leases, this client's; of reads, the model's since this client attached, whoever caused them.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let before = &self.baseline;
        let now = fetch_state(&mut locked(&self.control), self.model);
        let now = now.unwrap_or_else(|error| {
            log::warn!("the daemon did not tell its counters: {error}");
            before.clone()
        });
        let since = |now: u64, before: u64| now.saturating_sub(before);
        Stats {
            reader: now.reader.parse().unwrap_or(ReaderKind::Auto),
            backing: Backing::Shared,
            direct_io: now.direct_io,
            fallbacks: now
                .fallbacks
                .iter()
                .filter_map(|name| fallback(name))
                .collect(),
            acquires: self.acquires.load(Ordering::Relaxed),
            releases: self.releases.load(Ordering::Relaxed),
            loads: since(now.loads_total, before.loads_total),
            bytes_read: since(now.bytes_read_total, before.bytes_read_total),
            reads: since(now.reads_total, before.reads_total),
            retries: since(now.retries_total, before.retries_total),
            stalls: self.stalls.load(Ordering::Relaxed),
            stall_ns: self.stall_ns.load(Ordering::Relaxed),
            read_ns: since(now.read_ns_total, before.read_ns_total),
            // The daemon does not tell how long each load took.
            load_latency: Latency::default(),
            mispredicts: since(now.mispredicts_total, before.mispredicts_total),
            resident_bytes: now.resident_bytes,
            page_bytes: now.page_bytes,
            huge_page_share: now.huge_page_share,
            ..Stats::default()
        }
    }

    // ---- the connection -------------------------------------------------------------------------------------

    /// Looks at the connection, unless that was done less than `every` ago.
    pub(super) fn check_alive(&self, every: Duration) -> Result<()> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        let status = self.page.load(place::REVOKED);
        if status != 0 {
            return Err(self.lose(revoked()));
        }
        let now_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let looked_ms = self.looked_ms.load(Ordering::Relaxed);
        if u128::from(now_ms.saturating_sub(looked_ms)) < every.as_millis() {
            return Ok(());
        }
        self.looked_ms.store(now_ms, Ordering::Relaxed);
        if self.line.hung_up() {
            return Err(self.explain(Error::new(
                ErrorKind::Connection,
                "the daemon has closed the connection",
            )));
        }
        Ok(())
    }

    /// Remembers what ended the connection.
    pub(super) fn lose(&self, error: Error) -> Error {
        self.lost.get_or_init(|| error).clone()
    }

    /// An error of the connection, or what the daemon said before it hung up.
    pub(super) fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Connection {
            return error;
        }
        if self.page.load(place::REVOKED) != 0 {
            return self.lose(revoked());
        }
        self.lose(error)
    }

    // ---- arguments ------------------------------------------------------------------------------------------

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
        let (shard, start) = self.windows.locate(address).ok_or_else(invalid)?;
        let end = start.checked_add(len as u64).ok_or_else(invalid)?;
        let extents = &self.catalog.layers[layer as usize].extents;
        let inside = extents.iter().any(|extent| {
            extent.shard_index == shard && extent.offset_bytes <= start && end <= extent.end_bytes()
        });
        if inside && len > 0 {
            Ok(Need::Bytes { shard, start, end })
        } else {
            Err(invalid())
        }
    }
}

fn revoked() -> Error {
    Error::new(
        ErrorKind::Revoked,
        "the daemon took this client's leases back: one was held for too long while others waited; open the model again",
    )
}
