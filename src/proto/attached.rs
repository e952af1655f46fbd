//! A model in the daemon, held by a client: the calls of [`crate::engine::Model`], with the same results.
//!
//! A lease of a layer that is there is a few atomics in shared words (see [`board`]). Otherwise the client says in its
//! page what it waits for, kicks the daemon once through an eventfd, and sleeps on the layer's state word. It looks at
//! the connection a few times a second: a daemon that is gone is `Connection`, a lease that was taken back is
//! `Revoked`, and from then on every call says so. Windows are mapped layer by layer, after the layer's lease is had,
//! whenever the plan has another generation than the one that was mapped.
//! Place in `file -> catalog -> plan -> reader -> pool -> **lease** -> host`.

use super::message::{Attach, Failure, Method, from_value, to_value};
use super::plan::{ClientPlan, Figures, Placed};
use super::snapshot::ModelState;
use super::{Control, Packet, Socket};
use crate::engine::board::{self, place};
use crate::engine::leases::{Leases, thread_id};
use crate::engine::{BudgetReport, Fallback, FallbackKind, Spans, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::mem::{Backing, PoolFile, SharedWords, Windows};
use crate::model::{Catalog, records};
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How long a client sleeps before it looks at the connection.
const SLICE: Duration = Duration::from_millis(50);
/// How often a client that never has to sleep looks at the connection.
const LOOK: Duration = Duration::from_millis(200);
/// How often a client that waits asks why.
const ASK: Duration = Duration::from_secs(1);

/// Answer to `attach`; area, page and eventfd come with it.
#[derive(Debug, Deserialize)]
struct AttachedAnswer {
    model: u32,
    layers: u32,
}

/// One page of the answer to `catalog`.
#[derive(Debug, Deserialize)]
struct CatalogPage {
    rows: Vec<records::Record>,
    next: Option<u64>,
}

/// One page of the answer to `plan`; the pool's file comes with the first.
#[derive(Debug, Deserialize)]
struct PlanPage {
    #[serde(flatten)]
    figures: Figures,
    runs: Vec<Placed>,
    next: Option<u64>,
}

/// What a lease is asked for.
#[derive(Debug, Clone, Copy)]
enum Need {
    Whole,
    Bytes { shard: u32, start: u64, end: u64 },
}

/// A model in the daemon.
#[derive(Debug)]
pub struct Attached {
    control: Mutex<Control>,
    /// The connection once more, to look at without waiting for `control`.
    line: Socket,
    model: u32,
    catalog: Catalog,
    windows: Arc<Windows>,
    spans: Spans,
    area: SharedWords,
    page: SharedWords,
    kick: OwnedFd,
    plan: RwLock<Arc<ClientPlan>>,
    /// Per layer: the generation whose pages its window shows; 0 = none.
    mapped: Vec<AtomicU32>,
    mapping: Mutex<()>,
    /// Per layer: an acquire that did not wait has said that it is wanted.
    wished: Vec<AtomicBool>,
    leases: Mutex<Leases>,
    released: Condvar,
    lost: OnceLock<Error>,
    began: Instant,
    looked_ms: AtomicU64,
    baseline: ModelState,
    acquires: AtomicU64,
    releases: AtomicU64,
    stalls: AtomicU64,
    stall_ns: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
            mapped: catalog.layers.iter().map(|_| AtomicU32::new(0)).collect(),
            wished: catalog
                .layers
                .iter()
                .map(|_| AtomicBool::new(false))
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
            return Err(self.ask_for(layer));
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
        locked(&self.leases).remove(layer, thread_id())?;
        self.page.sub(place::hold(layer), 1);
        self.releases.fetch_add(1, Ordering::Relaxed);
        self.released.notify_all();
        self.tell_of_release();
        Ok(())
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
            mispredicts: since(now.mispredicts_total, before.mispredicts_total),
            resident_bytes: now.resident_bytes,
            page_bytes: now.page_bytes,
            huge_page_share: now.huge_page_share,
        }
    }

    /// Says that the layer is wanted, without waiting: the wish stands until the layer is had.
    fn ask_for(&self, layer: u32) -> Error {
        if !self.wished[layer as usize].swap(true, Ordering::AcqRel) {
            self.page.add(place::want(layer), board::WANT);
        }
        self.kick();
        Error::new(
            ErrorKind::Again,
            format!("layer {layer} is not in memory yet"),
        )
    }

    // ---- a lease --------------------------------------------------------------------------------------------

    /// Raises the hold and looks whether the layer is there; if so, it is leased and mapped.
    fn take(&self, layer: u32, need: Need, thread: u64) -> Result<bool> {
        self.page.add(place::hold(layer), 1);
        match self.look(layer, need, thread) {
            Ok(true) => Ok(true),
            other => {
                self.page.sub(place::hold(layer), 1);
                // The stream may have come by meanwhile and gone to sleep over this hold.
                self.tell_of_release();
                other
            }
        }
    }

    /// Under a raised hold: nothing that is there now is taken away.
    fn look(&self, layer: u32, need: Need, thread: u64) -> Result<bool> {
        let gate = self.area.load(place::GATE);
        if gate == board::GATE_CLOSED {
            return Err(self.lose(Error::new(
                ErrorKind::Connection,
                "the daemon has unloaded the model",
            )));
        }
        let mut leases = locked(&self.leases);
        if gate == board::GATE_DRAINING && !leases.iter().any(|(_, holder)| holder == thread) {
            return Ok(false);
        }
        let state = self.area.load(place::state(layer));
        let arrived = self.area.load(place::arrived(layer));
        let generation = self.area.load(place::GENERATION);
        let ready = state & board::READY != 0;
        let whole = matches!(need, Need::Whole);
        if !ready && (whole || state & board::RESIDENT == 0 && arrived == 0) {
            return Ok(false);
        }
        if self.plan().figures.generation != generation {
            drop(leases);
            self.fetch_plan_of(generation)?;
            leases = locked(&self.leases);
        }
        if !ready && !self.has_arrived(layer, need, state, arrived) {
            return Ok(false);
        }
        if self.mapped[layer as usize].load(Ordering::Acquire) != generation {
            self.map(layer, generation)?;
        }
        leases.add(layer, thread)?;
        if self.wished[layer as usize].swap(false, Ordering::AcqRel) {
            self.page.sub(place::want(layer), 1);
        }
        let head = self.page.load(place::RING_HEAD);
        self.page
            .store(place::RING + head as usize % place::RING_COUNT, layer);
        self.page.store(place::RING_HEAD, head.wrapping_add(1));
        self.acquires.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    fn has_arrived(&self, layer: u32, need: Need, state: u32, arrived: u32) -> bool {
        let Need::Bytes { shard, start, end } = need else {
            return false;
        };
        let (resident, pages) = self.plan().needs(layer, shard, start, end);
        (!resident || state & board::RESIDENT != 0) && arrived >= pages
    }

    /// Shows the layer's pages in its windows. The layer is held, so its plan stays in force. A page that it shares with
    /// a layer that another thread reads is there in both plans, with the same bytes.
    fn map(&self, layer: u32, generation: u32) -> Result<()> {
        let _one_at_a_time = locked(&self.mapping);
        let plan = self.plan();
        let page_bytes = plan.figures.page_bytes;
        plan.pieces(&self.catalog, layer, |run, offset_bytes| {
            self.windows.show(&plan.pool, run, page_bytes, offset_bytes)
        })?;
        self.mapped[layer as usize].store(generation, Ordering::Release);
        Ok(())
    }

    fn plan(&self) -> Arc<ClientPlan> {
        Arc::clone(&self.plan.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn fetch_plan_of(&self, generation: u32) -> Result<()> {
        let mut control = locked(&self.control);
        if self.plan().figures.generation == generation {
            return Ok(());
        }
        let plan = fetch_plan(&mut control, self.catalog.layers.len());
        let plan = plan.map_err(|error| self.explain(error))?;
        *self.plan.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(plan);
        Ok(())
    }

    /// Tells the daemon of a release, if it wants to know.
    fn tell_of_release(&self) {
        let starving = self.area.load(place::STARVING) != 0;
        if starving || self.area.load(place::GATE) != board::GATE_OPEN {
            self.kick();
        }
    }

    fn kick(&self) {
        // A full counter is a kick that the daemon has not seen yet; a closed one is found out by check_alive.
        let _ = nix::unistd::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Waits while this process holds as many streamed layers as it may.
    fn admit(&self, layer: u32, thread: u64, deadline: Option<Instant>) -> Result<()> {
        let mut leases = locked(&self.leases);
        loop {
            let plan = self.plan();
            if !plan.streams(layer) || leases.iter().any(|(held, _)| held == layer) {
                return Ok(());
            }
            let mut streamed: Vec<u32> = Vec::new();
            let mut mine = false;
            for (held, holder) in leases.iter().filter(|(held, _)| plan.streams(*held)) {
                mine |= holder == thread;
                if !streamed.contains(&held) {
                    streamed.push(held);
                }
            }
            if streamed.len() < plan.figures.holds_max as usize {
                return Ok(());
            }
            if mine {
                let context = format!(
                    "layer {layer}: a client of the daemon may hold {} streamed layers at a time, and this thread holds one of them; release it first",
                    plan.figures.holds_max
                );
                return Err(Error::new(ErrorKind::Busy, context));
            }
            let left = deadline.map_or(SLICE, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(not_in_time(layer, deadline));
            }
            let waited = self.released.wait_timeout(leases, left.min(SLICE));
            leases = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.check_alive(SLICE)?;
        }
    }

    /// A slot that this thread itself holds will never come free while it waits.
    fn refuse_deadlock(&self, layer: u32, thread: u64) -> Result<()> {
        let plan = self.plan();
        let Some(slot) = plan.slot(layer) else {
            return Ok(());
        };
        let leases = locked(&self.leases);
        let in_the_way = leases.iter().find(|(held, holder)| {
            *holder == thread && *held != layer && plan.slot(*held) == Some(slot)
        });
        match in_the_way {
            None => Ok(()),
            Some((held, _)) => Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "layer {layer} needs the slot of layer {held}, which this thread holds; release it first"
                ),
            )),
        }
    }

    fn wait(&self, layer: u32, need: Need, thread: u64, deadline: Option<Instant>) -> Result<()> {
        let at_first = self.area.load(place::state(layer));
        let mut asked = Instant::now();
        self.kick();
        loop {
            let state = self.area.load(place::state(layer));
            let gate = self.area.load(place::GATE);
            if self.take(layer, need, thread)? {
                return Ok(());
            }
            let failed = state & board::FAILED != 0;
            if failed && (state != at_first || asked.elapsed() > ASK) {
                asked = Instant::now();
                if let Some(error) = self.failure(layer, state != at_first)? {
                    return Err(error);
                }
            }
            let left = deadline.map_or(SLICE, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(not_in_time(layer, deadline));
            }
            if gate == board::GATE_OPEN {
                self.area.wait(place::state(layer), state, left.min(SLICE));
            } else {
                // Whoever holds nothing waits for the gate; whoever holds something waits for the layer, briefly.
                let left = left.min(Duration::from_millis(2));
                self.area.wait(place::state(layer), state, left);
            }
            self.check_alive(SLICE)?;
        }
    }

    /// Why a layer does not come; `None` when the daemon knows of nothing final.
    fn failure(&self, layer: u32, answered: bool) -> Result<Option<Error>> {
        let parameters = to_value(&Failure { layer })?;
        let answer = locked(&self.control).call(Method::Failure, &parameters);
        let answer = answer.map_err(|error| self.explain(error))?;
        let fatal = answer["fatal"].as_bool().unwrap_or(false);
        if !answered && !fatal {
            return Ok(None);
        }
        let status = answer["status"].as_str().unwrap_or_default();
        let kind = ErrorKind::ALL
            .into_iter()
            .find(|kind| kind.name() == status);
        let text = answer["message"].as_str().unwrap_or_default();
        Ok(kind.map(|kind| Error::new(kind, text)))
    }

    // ---- the connection -------------------------------------------------------------------------------------

    /// Looks at the connection, unless that was done less than `every` ago.
    fn check_alive(&self, every: Duration) -> Result<()> {
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
    fn lose(&self, error: Error) -> Error {
        self.lost.get_or_init(|| error).clone()
    }

    /// An error of the connection, or what the daemon said before it hung up.
    fn explain(&self, error: Error) -> Error {
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

fn not_in_time(layer: u32, deadline: Option<Instant>) -> Error {
    debug_assert!(deadline.is_some());
    Error::new(
        ErrorKind::Timeout,
        format!("layer {layer} did not arrive in time"),
    )
}

fn program_name() -> String {
    let path = std::env::current_exe().ok();
    let name = path.as_deref().and_then(Path::file_name);
    name.map_or_else(
        || "libflea".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn fallback(name: &str) -> Option<Fallback> {
    let kinds = [
        FallbackKind::Buffered,
        FallbackKind::Pread,
        FallbackKind::SmallPages,
        FallbackKind::Numa,
    ];
    let kind = kinds.into_iter().find(|kind| kind.name() == name)?;
    Some(Fallback {
        kind,
        reason: format!("the daemon: {name}"),
    })
}

fn check_layout(area: &SharedWords) -> Result<()> {
    match area.load(place::LAYOUT) {
        board::LAYOUT => Ok(()),
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the daemon's shared words have layout {other}, this libflea knows {}",
                board::LAYOUT
            ),
        )),
    }
}

fn opened<T: serde::de::DeserializeOwned>(packet: Packet) -> Result<(T, Vec<OwnedFd>)> {
    let value: Value = super::message::parse_reply(&packet.bytes)?;
    Ok((from_value(value)?, packet.descriptors))
}

fn fetch_catalog(control: &mut Control) -> Result<Catalog> {
    let mut rows = Vec::new();
    let mut from = 0;
    loop {
        let page: CatalogPage =
            from_value(control.call(Method::Catalog, &json!({ "from": from }))?)?;
        rows.extend(page.rows);
        match page.next {
            Some(next) if next > from => from = next,
            _ => return records::catalog(rows),
        }
    }
}

/// The plan in force. A plan that changes while it is being told is begun again.
fn fetch_plan(control: &mut Control, layer_count: usize) -> Result<ClientPlan> {
    'again: loop {
        let packet = control.exchange(Method::Plan, &json!({ "from": 0 }))?;
        let (first, mut descriptors) = match opened::<PlanPage>(packet) {
            // Another plan is being made at this moment.
            Err(error) if error.kind() == ErrorKind::Again => {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            other => other?,
        };
        let Some(pool) = descriptors.pop() else {
            let context = "the daemon's plan came without its pool";
            return Err(Error::new(ErrorKind::Connection, context));
        };
        let (mut runs, mut next) = (first.runs, first.next);
        while let Some(from) = next {
            let answer = control.call(Method::Plan, &json!({ "from": from }));
            if matches!(&answer, Err(error) if error.kind() == ErrorKind::Again) {
                continue 'again;
            }
            let page: PlanPage = from_value(answer?)?;
            if page.figures.generation != first.figures.generation {
                continue 'again;
            }
            runs.extend(page.runs);
            next = page.next.filter(|next| *next > from);
        }
        return ClientPlan::new(first.figures, PoolFile::new(pool)?, runs, layer_count);
    }
}

fn fetch_state(control: &mut Control, model: u32) -> Result<ModelState> {
    let models = control.list(Method::Models, "models")?;
    let states = models.into_iter().map(from_value::<ModelState>);
    let mut states = states.collect::<Result<Vec<_>>>()?.into_iter();
    states.find(|state| state.id == model).ok_or_else(|| {
        let context = format!("the daemon does not have model {model} any more");
        Error::new(ErrorKind::Connection, context)
    })
}
