//! The ggml device FLEA, compiled into this program, and the model it streams: opened through the C ABI like any host
//! does, handed to the device, and asked for its figures. Invariants: the handle outlives every llama model that is
//! placed on the device (drop order in `Session`); one streamed model per process at a time. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: lease to host.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_cpp_sys_2 as llama;

use crate::engine::Stats;
use crate::error::{Error, ErrorKind, Result};
use crate::ffi::calls;
use crate::ffi::handle::model_of;
use crate::ffi::types::{self, flea_info, flea_model, flea_open_options, flea_stats_data};
use crate::host::context::Devices;
use crate::host::figures::{Figures, GpuFigures};
use crate::host::kv_disk::{KvCalls, KvDisk};
use crate::proto::Opened;

#[repr(C)]
struct Config {
    struct_size: u32,
    loader_skips_streamed: bool,
    whole_layers: bool,
    model: *mut flea_model,
    kv: *const KvCalls,
    guesses_experts: bool,
}

// ffi-examples/ggml-flea/ggml-flea.h
unsafe extern "C" {
    fn ggml_backend_flea_reg() -> llama::ggml_backend_reg_t;
    fn ggml_backend_flea_configure(config: *const Config) -> i32;
    fn ggml_backend_flea_pending_bytes() -> *const u64;
    fn ggml_backend_flea_find_gpu(index: u32, library: *const c_char) -> i32;
    fn ggml_backend_flea_split(shares: *mut f32, count: usize) -> i32;
    fn ggml_backend_flea_loaded();
    fn ggml_backend_flea_releases_behind_gpu() -> u64;
    fn ggml_backend_flea_early_pieces() -> u64;
    fn ggml_backend_flea_expert_cuts() -> u64;
    fn ggml_backend_flea_expert_guesses(right: *mut u64) -> u64;
    fn ggml_backend_flea_last_failure(text: *mut *const c_char) -> i32;
}

/// How a model is streamed.
#[derive(Debug, Clone, Default)]
pub struct StreamOptions {
    /// Memory for everything the process holds, as in `FLEA_MEMORY`; `None` = automatic.
    pub memory: Option<String>,
    /// The daemon to stream from, `unix:PATH`; `None` = in this process. Everything else is then the daemon's.
    pub endpoint: Option<String>,
    /// FLEA_BACKING_*.
    pub backing: u32,
    /// FLEA_READER_*.
    pub reader: u32,
    /// 0 = default.
    pub slots_count: u32,
    /// 0 = by layer size.
    pub page_bytes: u32,
    /// 0 = default.
    pub request_bytes: u32,
    /// 0 = default.
    pub depth: u32,
    /// Compute with a layer only when all of it is in memory.
    pub whole_layers: bool,
    /// Stream a layer with all its experts instead of fetching those that are chosen.
    pub whole_experts: bool,
    /// Read ahead what the next layer's router will probably choose.
    pub expert_prefetch: bool,
    /// The host keeps tables of embeddings whole instead of reading their rows.
    pub host_rows: bool,
    /// Directories with copies of the model.
    pub mirrors: Vec<PathBuf>,
    /// Weights on a GPU, which computes; `None` = in host memory.
    pub gpu: Option<GpuRun>,
}

/// Which GPUs compute, and how much of their memory weights may take.
#[derive(Debug, Clone)]
pub struct GpuRun {
    /// Their numbers, from 0, in the order of the layers they have.
    pub indices: Vec<u32>,
    /// A size, or a share of the model; one for each GPU, or one that each has.
    pub vram: String,
    /// 0 = default.
    pub slots_count: u32,
    /// ggml's library for it: this program has none of its own.
    pub library: Option<PathBuf>,
}

/// The streamed model.
#[derive(Debug)]
pub struct Streamed {
    handle: Arc<Handle>,
    /// One, or one for each GPU.
    devices: Vec<llama::ggml_backend_dev_t>,
    /// How many of llama.cpp's layers each of them has, and zeros, as llama.cpp wants it.
    split: Vec<f32>,
    /// Names of the tables whose rows are read.
    row_tables: Vec<String>,
    /// Last: the device calls it until it is configured anew (see `drop`).
    kv_disk: Option<KvDisk>,
}

/// The model's handle, closed with the last reference: the loader's stream and a monitor keep one while they may ask.
#[derive(Debug)]
pub struct Handle(*mut flea_model);

// SAFETY: every call of the C ABI but open and close may be made from any thread (include/flea.h); close happens in Drop,
// when no other reference is left.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened by flea_model_open, closed once, and no lease is held between two decodes.
        unsafe { calls::flea_model_close(self.0) };
    }
}

/// How often a graph was cut to see which experts a router had chosen.
fn expert_cuts() -> u64 {
    // SAFETY: reads a counter, from any thread.
    unsafe { ggml_backend_flea_expert_cuts() }
}

/// Looks for ggml's own devices of the GPUs.
fn find_gpus(gpu: &GpuRun) -> Result<()> {
    let library = gpu
        .library
        .as_ref()
        .map(|path| CString::new(path.as_os_str().as_encoded_bytes()))
        .transpose()
        .map_err(|_| Error::new(ErrorKind::Invalid, "a NUL byte in --ggml-cuda"))?;
    let library = library
        .as_ref()
        .map_or(std::ptr::null(), |path| path.as_ptr());
    // SAFETY: NULL or a path that lives over the call.
    let find = |index: &u32| match unsafe { ggml_backend_flea_find_gpu(*index, library) } {
        0.. => Ok(()),
        status => Err(last_failure()
            .unwrap_or_else(|| Error::new(kind_of(status), "ggml has no device for the GPU"))),
    };
    gpu.indices.iter().try_for_each(find)
}

/// How many devices there are, and what each has of the layers.
fn devices_split() -> Result<(usize, Vec<f32>)> {
    // SAFETY: no preconditions.
    let mut split = vec![0.0; unsafe { llama::llama_max_devices() }];
    // SAFETY: the call writes as many numbers as there are.
    let count = unsafe { ggml_backend_flea_split(split.as_mut_ptr(), split.len()) };
    match usize::try_from(count) {
        Ok(count) => Ok((count, split)),
        Err(_) => {
            let context = "more GPUs than llama.cpp has devices for";
            Err(Error::new(kind_of(count), context))
        }
    }
}

/// The directories as the C ABI takes them.
fn mirror_list(directories: &[PathBuf]) -> Result<CString> {
    let mut list = Vec::new();
    for directory in directories {
        let bytes = directory.as_os_str().as_encoded_bytes();
        if bytes.contains(&b':') || bytes.contains(&0) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "--mirror {}: a path with a colon cannot be named; give a link to it",
                    directory.display()
                ),
            ));
        }
        if !list.is_empty() {
            list.push(b':');
        }
        list.extend(bytes);
    }
    CString::new(list).map_err(|_| Error::new(ErrorKind::Invalid, "a NUL byte in --mirror"))
}

/// flea's last error on this thread as an [`Error`] of the status `status`.
fn last_error(status: i32) -> Error {
    // SAFETY: the text lives until the next call on this thread and is copied here.
    let text = unsafe { CStr::from_ptr(calls::flea_last_error()) }
        .to_string_lossy()
        .into_owned();
    Error::new(kind_of(status), text)
}

fn kind_of(status: i32) -> ErrorKind {
    ErrorKind::ALL
        .into_iter()
        .find(|kind| kind.status() == status)
        .unwrap_or(ErrorKind::Internal)
}

impl Streamed {
    /// Opens the model (no weight is read, no plan is made yet), hands it to the device and registers the device.
    ///
    /// # Errors
    /// Those of `flea_model_open`; `Busy` when another model is streamed.
    pub fn open(path: &Path, options: &StreamOptions, kv_disk: Option<KvDisk>) -> Result<Self> {
        let nul = |_| {
            Error::new(
                ErrorKind::Invalid,
                "a NUL byte in the path or the memory size",
            )
        };
        let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(nul)?;
        let memory = options
            .memory
            .clone()
            .map(CString::new)
            .transpose()
            .map_err(nul)?;
        let endpoint = options
            .endpoint
            .clone()
            .map(CString::new)
            .transpose()
            .map_err(nul)?;
        let mirrors = mirror_list(&options.mirrors)?;
        let gpu = options.gpu.as_ref();
        let vram = gpu
            .map(|gpu| CString::new(gpu.vram.as_str()))
            .transpose()
            .map_err(nul)?;
        let gpus = gpu.map_or_else(String::new, |gpu| {
            let numbers: Vec<String> = gpu.indices.iter().map(u32::to_string).collect();
            numbers.join(",")
        });
        let gpus = CString::new(gpus).map_err(nul)?;
        // SAFETY: all-zero is a valid flea_open_options: the defaults (include/flea.h).
        let mut raw: flea_open_options = unsafe { std::mem::zeroed() };
        raw.struct_size = size_of::<flea_open_options>() as u32;
        raw.backing = options.backing;
        raw.reader = options.reader;
        raw.slots_count = options.slots_count;
        raw.page_bytes = options.page_bytes;
        raw.request_bytes = options.request_bytes;
        raw.depth = options.depth;
        raw.mirrors = mirrors.as_ptr();
        raw.flags = types::FLEA_OPEN_DEFER_PLAN;
        if !options.whole_experts {
            raw.flags |= types::FLEA_OPEN_EXPERTS;
        }
        raw.memory = memory
            .as_ref()
            .map_or(std::ptr::null(), |text| text.as_ptr());
        raw.endpoint = endpoint
            .as_ref()
            .map_or(std::ptr::null(), |text| text.as_ptr());
        if let (Some(gpu), Some(vram)) = (gpu, &vram) {
            raw.vram = vram.as_ptr();
            raw.gpus = gpus.as_ptr();
            raw.vram_slots_count = gpu.slots_count;
        }
        // SAFETY: the pointer is valid for the life of the program (ggml-flea.h).
        raw.host_pending_bytes = unsafe { ggml_backend_flea_pending_bytes() };
        let mut model = std::ptr::null_mut();
        // SAFETY: path and options are valid for the call, `model` receives the handle.
        let status =
            unsafe { calls::flea_model_open(path.as_ptr(), &raw const raw, &raw mut model) };
        if status < 0 {
            return Err(last_error(status));
        }
        let handle = Arc::new(Handle(model));
        if let Some(gpu) = gpu {
            find_gpus(gpu)?;
        }
        let kv_calls = kv_disk.as_ref().map(KvDisk::calls);
        let config = Config {
            struct_size: size_of::<Config>() as u32,
            loader_skips_streamed: true,
            whole_layers: options.whole_layers,
            model,
            kv: kv_calls
                .as_ref()
                .map_or(std::ptr::null(), std::ptr::from_ref),
            guesses_experts: options.expert_prefetch,
        };
        // SAFETY: both structs are copied; handle and `kv_disk` outlive the llama model (drop order in Session).
        let status = unsafe { ggml_backend_flea_configure(&raw const config) };
        if status < 0 {
            let failure = last_failure();
            // SAFETY: NULL forgets what was given, which ends with this function.
            unsafe { ggml_backend_flea_configure(std::ptr::null()) };
            return Err(failure.unwrap_or_else(|| {
                Error::new(
                    kind_of(status),
                    "the ggml device streams another model already",
                )
            }));
        }
        let (count, split) = devices_split()?;
        // SAFETY: the registration is one static object, with so many devices; registering it twice is harmless but avoided
        // by Session.
        let devices = unsafe {
            let registration = ggml_backend_flea_reg();
            if llama::ggml_backend_reg_by_name(llama::ggml_backend_reg_name(registration)).is_null()
            {
                llama::ggml_backend_register(registration);
            }
            let device = |place| llama::ggml_backend_reg_dev_get(registration, place);
            (0..count).map(device).collect()
        };
        let row_tables = match options.host_rows {
            true => Vec::new(),
            false => handle.row_tables(),
        };
        Ok(Self {
            handle,
            devices,
            split,
            row_tables,
            kv_disk,
        })
    }

    /// The devices weights are placed on.
    pub(crate) fn devices(&self) -> Devices<'_> {
        Devices {
            devices: &self.devices,
            split: &self.split,
            tables: &self.row_tables,
        }
    }

    /// Keys and values that are moved out of memory.
    pub(crate) const fn kv_disk(&self) -> Option<&KvDisk> {
        self.kv_disk.as_ref()
    }

    /// llama.cpp has read what it reads by itself.
    pub(crate) fn loaded(&self) {
        // SAFETY: sets a flag of the device, from any thread.
        unsafe { ggml_backend_flea_loaded() };
    }

    /// Why computing failed, if it was here.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.kv_disk()
            .and_then(KvDisk::failure)
            .or_else(last_failure)
    }

    /// Says whether an address lies in a window, where nothing but flea writes.
    pub(crate) fn in_window(&self) -> crate::host::file::InWindow {
        let handle = Arc::clone(&self.handle);
        Box::new(move |address: *const c_void| handle.model().in_window(address as usize))
    }

    /// The model's handle.
    pub(crate) fn handle(&self) -> Arc<Handle> {
        Arc::clone(&self.handle)
    }
}

impl Handle {
    /// The model behind the handle: what the C ABI has no call for.
    pub(crate) fn model(&self) -> &Opened {
        // SAFETY: opened by flea_model_open, which gives a live handle, and closed only in Drop.
        unsafe { model_of(self.0) }
    }

    /// Counters that only grow: those of the engine, and the device's cuts.
    pub(crate) fn counters(&self) -> (Stats, u64) {
        (self.model().counters(), expert_cuts())
    }

    /// Names of the tables of embeddings whose rows can be read.
    fn row_tables(&self) -> Vec<String> {
        let model = self.model();
        let tensors = model.catalog().tensors.iter().enumerate();
        tensors
            .filter(|(index, _)| model.row_bytes(*index).is_some())
            .map(|(_, tensor)| tensor.name.clone())
            .collect()
    }

    /// Figures of the plan.
    ///
    /// # Errors
    /// Those of `flea_model_info`.
    pub fn info(&self) -> Result<flea_info> {
        // SAFETY: all-zero is a valid flea_info to be filled.
        let mut info: flea_info = unsafe { std::mem::zeroed() };
        info.struct_size = size_of::<flea_info>() as u32;
        // SAFETY: the handle is open, info is ours.
        let status = unsafe { calls::flea_model_info(self.0, &raw mut info) };
        if status < 0 {
            Err(last_error(status))
        } else {
            Ok(info)
        }
    }

    /// Counters.
    ///
    /// # Errors
    /// Those of `flea_stats`.
    pub fn stats(&self) -> Result<flea_stats_data> {
        // SAFETY: all-zero is a valid flea_stats_data to be filled.
        let mut stats: flea_stats_data = unsafe { std::mem::zeroed() };
        stats.struct_size = size_of::<flea_stats_data>() as u32;
        // SAFETY: the handle is open, stats is ours.
        let status = unsafe { calls::flea_stats(self.0, &raw mut stats) };
        if status < 0 {
            Err(last_error(status))
        } else {
            Ok(stats)
        }
    }

    /// Writes plan and counters into `figures`.
    pub(crate) fn fill(&self, figures: &mut Figures) -> Result<()> {
        let (info, stats) = (self.info()?, self.stats()?);
        // Everything in the memory of a GPU: no budget of host memory was made.
        if info.planned != 0 && info.total_bytes > 0 {
            figures.total_bytes = Some(info.total_bytes);
            figures.host_bytes = Some(info.host_bytes);
            figures.weight_budget_bytes = Some(info.weight_budget_bytes);
            figures.resident_bytes = Some(info.resident_bytes);
            figures.streamed_bytes_per_pass = Some(info.streamed_bytes_per_pass);
            figures.expert_cache_bytes = info.expert_cache_bytes;
        }
        figures.fallbacks = FALLBACKS
            .iter()
            .filter(|(bit, _)| stats.fallbacks & bit != 0)
            .map(|(_, name)| *name)
            .collect();
        figures.mirrors = self.model().stats().mirrors;
        let each = self.model().gpus();
        figures.gpu = (!each.is_empty()).then(|| GpuFigures {
            each,
            // SAFETY: reads a counter, from any thread.
            releases_behind_gpu: unsafe { ggml_backend_flea_releases_behind_gpu() },
        });
        figures.bytes_read = stats.bytes_read;
        figures.read_seconds = stats.read_ns as f64 / 1e9;
        figures.stall_seconds = stats.stall_ns as f64 / 1e9;
        figures.acquires = stats.acquires;
        figures.loads = stats.loads;
        // SAFETY: reads a counter, from any thread.
        figures.early_pieces = unsafe { ggml_backend_flea_early_pieces() };
        figures.expert_cuts = expert_cuts();
        // SAFETY: as above; the number is ours to be written.
        figures.expert_guesses =
            unsafe { ggml_backend_flea_expert_guesses(&raw mut figures.expert_guesses_right) };
        figures.expert_hits = stats.expert_hits;
        figures.expert_misses = stats.expert_misses;
        figures.expert_bytes_read = stats.expert_bytes_read;
        figures.expert_reads_ahead = stats.expert_reads_ahead;
        figures.expert_bytes_read_ahead = stats.expert_bytes_read_ahead;
        figures.expert_bytes_unused = stats.expert_bytes_unused;
        figures.rows_bytes = info.rows_bytes;
        figures.rows = stats.rows;
        figures.row_reads = stats.row_reads;
        figures.row_bytes_read = stats.row_bytes_read;
        figures.reader = match stats.reader {
            types::FLEA_READER_PREAD => "pread",
            _ => "io_uring",
        };
        figures.direct_io = stats.direct_io != 0;
        figures.page_bytes = stats.page_bytes;
        figures.huge_page_share = stats.huge_page_share;
        Ok(())
    }
}

/// The names of flea_stats_data.fallbacks' bits, as `--json` lists them.
const FALLBACKS: [(u32, &str); 6] = [
    (types::FLEA_FALLBACK_BUFFERED, "buffered"),
    (types::FLEA_FALLBACK_PREAD, "pread"),
    (types::FLEA_FALLBACK_SMALL_PAGES, "small_pages"),
    (types::FLEA_FALLBACK_NUMA, "numa"),
    (types::FLEA_FALLBACK_MIRROR, "mirror"),
    (types::FLEA_FALLBACK_GDS, "gds"),
];

impl Drop for Streamed {
    fn drop(&mut self) {
        // SAFETY: NULL forgets the model; the llama model is gone by now (drop order in Session).
        unsafe { ggml_backend_flea_configure(std::ptr::null()) };
    }
}

/// Why the device failed last, if it did.
#[must_use]
pub fn last_failure() -> Option<Error> {
    let mut text = std::ptr::null();
    // SAFETY: the text lives until this thread asks again, and is copied here.
    let status = unsafe { ggml_backend_flea_last_failure(&raw mut text) };
    if status >= 0 || text.is_null() {
        return None;
    }
    // SAFETY: not NULL, NUL-terminated.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // The device has no path to name; flea's own words name it where it matters.
    let text = text.strip_prefix("the model given: ").unwrap_or(&text);
    Some(Error::new(kind_of(status), text))
}
