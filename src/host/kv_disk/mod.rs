//! Keys and values that do not fit in memory: `flea run --kv-disk DIR`.
//!
//! llama.cpp allocates the KV cache through the buffer type of the device that holds the layer, and that device is
//! flea's: it places each tensor of the cache in an address range that has memory only while its layer is computed with,
//! and it sees every node before it is computed, so it knows which layer's cache a part of the graph touches and which
//! rows it writes (`flea-kv.cpp`). So the cache streams as weights do, without a patch: a ring of a few layers has
//! memory, a worker writes what is new of a layer that has been used and reads the layers that come next, in the pages that
//! the former leaves. The file mirrors the tensors and has no name: nothing stays behind.
//!
//! Raw pages give the very bits that a run without a drive gives. With a codec the rows that are old enough are coded
//! once, and memory gets what the codec made of them at that moment; the answer is another one then, but the same in
//! every run.
//!
//! Invariants: nobody computes with a layer that is at work; a failed read or write fails the layer and everything after
//! it; a place without its layer has no memory, so a touch is a SIGSEGV and never another layer's rows. `ring` decides,
//! `part` moves, `seam` is what the device calls. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`:
//! beside the host's leases.

mod part;
mod ring;
mod seam;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::io::SpillFile;
use crate::kv::Choice;
use part::{Part, Traffic};
use ring::{Dirty, Job, Ring};

pub use part::{GROUP_ROWS, RECENT_ROWS};
pub(crate) use seam::KvCalls;

/// Layers of which keys and values have memory, where nobody says how many.
pub const SLOTS_DEFAULT: u32 = 3;
/// From so many bytes of keys on a thread for the values pays: it costs 50 us.
const AT_ONCE_FROM_BYTES: usize = 512 << 10;
/// How long a wait lasts before the stop flag is looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// Where keys and values go.
#[derive(Debug, Clone)]
pub struct KvDiskOptions {
    /// The directory of the file.
    pub directory: PathBuf,
    /// Layers that have memory.
    pub slots_count: u32,
    /// How old rows are coded; `None` = as they are.
    pub codec: Option<Choice>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct KvDiskFigures {
    /// Layers with a cache.
    pub layers_count: usize,
    /// Layers that have memory at a time.
    pub slots_count: usize,
    /// All keys and values of the whole context.
    pub cache_bytes: u64,
    /// The memory for them.
    pub ring_bytes: u64,
    /// Read from the drive.
    pub bytes_read: u64,
    /// Written to it.
    pub bytes_written: u64,
    /// How often a layer's cache was needed.
    pub acquires: u64,
    /// How often it was not there yet.
    pub waits: u64,
    /// How long that took.
    pub stall_seconds: f64,
    /// How often a layer was brought in.
    pub loads: u64,
    /// Rows that were coded: their bytes in memory.
    pub coded_raw_bytes: u64,
    /// And on the drive.
    pub coded_bytes: u64,
    /// O_DIRECT, as far as the filesystem tells.
    pub direct_io: bool,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    /// Number in the ring of each of the model's layers.
    index_of: Vec<Option<usize>>,
    failed: Option<Error>,
    figures: KvDiskFigures,
    traffic: Traffic,
}

#[derive(Debug)]
struct Store {
    spill: SpillFile,
    /// Keys, values; by number in the ring.
    layers: Vec<[Option<Part>; 2]>,
    len_bytes: u64,
    heads: usize,
}

#[derive(Debug)]
struct Shared {
    options: KvDiskOptions,
    stop: &'static AtomicBool,
    /// The worker is to end; set under the lock of `state`.
    ended: AtomicBool,
    /// Lock order: state, then store. The worker holds the store alone while it moves bytes.
    state: Mutex<State>,
    store: Mutex<Store>,
    changed: Condvar,
}

/// See the module's head.
#[derive(Debug)]
pub struct KvDisk {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

/// A panic elsewhere has been reported; what is behind the lock is as valid as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvDisk {
    /// Makes the file and starts the worker.
    ///
    /// # Errors
    /// As [`SpillFile::create`].
    pub fn open(options: &KvDiskOptions, stop: &'static AtomicBool) -> Result<Self> {
        let spill = SpillFile::create(&options.directory)?;
        if let Some(reason) = spill.direct().fallback() {
            ::log::warn!("--kv-disk {}: {reason}", options.directory.display());
        }
        let figures = KvDiskFigures {
            direct_io: spill.direct().is_direct(),
            ..KvDiskFigures::default()
        };
        let shared = Arc::new(Shared {
            options: options.clone(),
            stop,
            ended: AtomicBool::new(false),
            state: Mutex::new(State {
                ring: Ring::new(options.slots_count as usize, options.codec.is_some()),
                index_of: Vec::new(),
                failed: None,
                figures,
                traffic: Traffic::default(),
            }),
            store: Mutex::new(Store {
                spill,
                layers: Vec::new(),
                len_bytes: 0,
                heads: 0,
            }),
            changed: Condvar::new(),
        });
        let for_worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name("flea-kv".to_owned())
            .spawn(move || for_worker.work())
            .map_err(|error| {
                Error::from_io(&error, "start the thread that moves keys and values")
            })?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// Heads of a row: what a codec has to know before the cache is placed.
    pub fn set_heads(&self, heads: usize) {
        lock(&self.shared.store).heads = heads;
    }

    /// The cache has been placed: takes the room on the drive. A failure of placing is told here.
    ///
    /// # Errors
    /// What placing met; no room on the drive.
    pub fn ready(&self) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let store = lock(&self.shared.store);
        if store.layers.is_empty() {
            ::log::warn!(
                "--kv-disk: this model has no keys and values, only a state of fixed size, which stays in memory"
            );
        }
        // Coded rows leave holes: what will be needed is not known.
        let reserve = self.shared.options.codec.is_none();
        store.spill.set_len(store.len_bytes, reserve)
    }

    /// Why it failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        lock(&self.shared.state).failed.clone()
    }

    /// What came of it so far.
    #[must_use]
    pub fn figures(&self) -> KvDiskFigures {
        let (layers_count, slots_count, ring_bytes, cache_bytes) = self.shared.sizes();
        let state = lock(&self.shared.state);
        KvDiskFigures {
            layers_count,
            slots_count,
            cache_bytes,
            ring_bytes,
            bytes_read: state.traffic.bytes_read,
            bytes_written: state.traffic.bytes_written,
            coded_raw_bytes: state.traffic.raw_bytes,
            coded_bytes: state.traffic.coded_bytes,
            ..state.figures.clone()
        }
    }

    /// What the device calls; valid as long as `self`.
    pub(crate) fn calls(&self) -> KvCalls {
        seam::calls(&self.shared)
    }
}

impl Drop for KvDisk {
    fn drop(&mut self) {
        let state = lock(&self.shared.state);
        self.shared.ended.store(true, Ordering::Relaxed);
        drop(state);
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            ::log::error!("the thread that moves keys and values panicked");
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Layers, slots, bytes of the ring, bytes of the cache.
    fn sizes(&self) -> (usize, usize, u64, u64) {
        let store = lock(&self.store);
        let bytes = store
            .layers
            .iter()
            .map(|layer| layer.iter().flatten().map(Part::len_bytes).sum::<u64>());
        let largest = bytes.clone().max().unwrap_or(0);
        let slots = store.layers.len().min(self.options.slots_count as usize);
        (
            store.layers.len(),
            slots,
            largest * slots as u64,
            bytes.sum(),
        )
    }

    /// A tensor of the cache: its address.
    fn place(&self, layer: usize, side: usize, rows_count: u64, row_bytes: u64) -> Result<usize> {
        let mut state = lock(&self.state);
        let mut store = lock(&self.store);
        if state.index_of.len() <= layer {
            state.index_of.resize(layer + 1, None);
        }
        let index = match state.index_of[layer] {
            Some(index) => index,
            None => {
                state.ring.push();
                store.layers.push([None, None]);
                store.layers.len() - 1
            }
        };
        state.index_of[layer] = Some(index);
        let codec = self.options.codec.map(|choice| (choice, store.heads));
        let part = Part::new(rows_count, row_bytes, store.len_bytes, codec)?;
        let address = part.address();
        store.len_bytes += part.len_bytes();
        store.layers[index][side] = Some(part);
        Ok(address)
    }

    fn index(state: &State, layer: usize) -> Result<usize> {
        let index = state.index_of.get(layer).copied().flatten();
        index.ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("layer {layer} has no keys and values on the drive"),
            )
        })
    }

    /// Waits until a layer is there and keeps it there.
    fn acquire(&self, layer: usize) -> Result<()> {
        let mut state = lock(&self.state);
        let index = Self::index(&state, layer)?;
        state.figures.acquires += 1;
        let mut since = None;
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let there = state.ring.acquire(index);
            // Also when it is there: the worker may now read further ahead.
            self.changed.notify_all();
            if there {
                break;
            }
            if self.stopped() {
                return Err(Error::new(ErrorKind::Canceled, "stopped"));
            }
            if since.is_none() {
                since = Some(Instant::now());
                state.figures.waits += 1;
            }
            let waited = self.changed.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(since) = since {
            state.figures.stall_seconds += since.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Rows that were written under the lease.
    fn wrote(&self, layer: usize, side: usize, rows: Range<u64>) -> Result<()> {
        let mut state = lock(&self.state);
        let index = Self::index(&state, layer)?;
        state.ring.wrote(index, side, rows);
        Ok(())
    }

    fn release(&self, layer: usize) -> Result<()> {
        let mut state = lock(&self.state);
        let index = Self::index(&state, layer)?;
        state.ring.release(index);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Forgets every row, when nothing is at work.
    fn clear(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while !state.ring.is_idle() {
            let waited = self.changed.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.ring.is_leased() {
            return Err(Error::new(
                ErrorKind::Busy,
                "keys and values cannot be cleared while they are computed with",
            ));
        }
        state.ring.clear();
        let mut store = lock(&self.store);
        for part in store.layers.iter_mut().flatten().flatten() {
            part.clear()?;
        }
        Ok(())
    }

    /// The cache is gone: every place with it.
    fn remove(&self) -> Result<()> {
        self.clear()?;
        let mut state = lock(&self.state);
        let mut store = lock(&self.store);
        let settles = self.options.codec.is_some();
        state.ring = Ring::new(self.options.slots_count as usize, settles);
        state.index_of.clear();
        store.layers.clear();
        store.len_bytes = 0;
        Ok(())
    }

    fn fail(&self, error: Error) {
        lock(&self.state).failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// The worker's life.
    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if self.ended.load(Ordering::Relaxed) {
                return;
            }
            let job = match &state.failed {
                None => state.ring.next_job(),
                Some(_) => None,
            };
            let Some(job) = job else {
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let mut traffic = Traffic::default();
            // Whoever waits for the layer must hear of it, whatever happens.
            let run = AssertUnwindSafe(|| self.run(&job, &mut traffic));
            let result = catch_unwind(run).unwrap_or_else(|_| Err(panicked()));
            state = lock(&self.state);
            state.ring.done(&job);
            state.figures.loads += u64::from(matches!(job, Job::Load { .. }));
            state.traffic.add(&traffic);
            if let Err(error) = result {
                state.failed.get_or_insert(error);
            }
            self.changed.notify_all();
        }
    }

    /// Gives a layer the memory that was taken from another, and its rows.
    fn bring(
        &self,
        parts: &mut [Option<Part>; 2],
        taken: &mut [Option<Part>; 2],
        spill: &SpillFile,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let goes_on = || !self.stopped() && !self.ended.load(Ordering::Relaxed);
        let bring = |part: Option<&mut Part>, other: Option<&mut Part>| -> Result<Traffic> {
            let mut traffic = Traffic::default();
            if let Some(part) = part {
                part.open_with(other)?;
                part.load(spill, &goes_on, &mut traffic)?;
            }
            Ok(traffic)
        };
        let written_bytes = parts.iter().flatten().map(Part::written_bytes);
        let at_once = written_bytes.min().unwrap_or(0) >= AT_ONCE_FROM_BYTES;
        let ([keys, values], [old_keys, old_values]) = (parts, taken);
        let moved = both(
            at_once,
            || bring(keys.as_mut(), old_keys.as_mut()),
            || bring(values.as_mut(), old_values.as_mut()),
        )?;
        moved.iter().for_each(|more| traffic.add(more));
        Ok(())
    }

    fn run(&self, job: &Job, traffic: &mut Traffic) -> Result<()> {
        let mut store = lock(&self.store);
        let Store { spill, layers, .. } = &mut *store;
        match job {
            Job::Settle { layer, dirty } => {
                for (part, rows) in layers[*layer].iter_mut().zip(dirty) {
                    if let (Some(part), Some(rows)) = (part, rows) {
                        part.settle(spill, rows, traffic)?;
                    }
                }
                Ok(())
            }
            Job::Load { layer, from } => {
                let mut taken = [None, None];
                if let Some((victim, dirty)) = from {
                    write_back(&mut layers[*victim], spill, dirty, traffic)?;
                    taken = std::mem::take(&mut layers[*victim]);
                }
                let mut result = self.bring(&mut layers[*layer], &mut taken, spill, traffic);
                if let Some((victim, _)) = from {
                    // What the newcomer had no use for: a layer without values, another length.
                    for part in taken.iter_mut().flatten() {
                        result = result.and_then(|()| part.close());
                    }
                    layers[*victim] = taken;
                }
                result
            }
        }
    }
}

/// Both at once where it pays: two requests for the drive, two cores for the codec.
fn both(
    at_once: bool,
    keys: impl FnOnce() -> Result<Traffic>,
    values: impl FnOnce() -> Result<Traffic> + Send,
) -> Result<[Traffic; 2]> {
    if !at_once {
        return Ok([keys()?, values()?]);
    }
    std::thread::scope(|scope| {
        let values = scope.spawn(values);
        let keys = keys();
        let values = values.join().unwrap_or_else(|_| Err(panicked()));
        Ok([keys?, values?])
    })
}

fn panicked() -> Error {
    Error::new(
        ErrorKind::Internal,
        "a panic while keys and values were moved",
    )
}

fn write_back(
    parts: &mut [Option<Part>; 2],
    spill: &SpillFile,
    dirty: &Dirty,
    traffic: &mut Traffic,
) -> Result<()> {
    for (part, rows) in parts.iter_mut().zip(dirty) {
        if let (Some(part), Some(rows)) = (part, rows) {
            part.write_back(spill, rows, traffic)?;
        }
    }
    Ok(())
}
