//! What stands behind a `flea_model*`, and how C structures of any size are read and written.

use super::types::{
    flea_gpu, flea_info, flea_model, flea_open_options, flea_stats_data, flea_tensor,
};
use super::{invalid, types};
use crate::engine::{BudgetSpec, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{ReaderKind, ReaderOptions};
use crate::mem::Backing;
use crate::proto::Opened;
use crate::proto::gpus::{GpuList, GpuShare, VramList};
use crate::proto::opened::Endpoint;
use crate::units::MemorySpec;
use std::ffi::{CStr, CString, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A model and the strings that C holds pointers to.
#[derive(Debug)]
pub struct Handle {
    pub model: Opened,
    names: Vec<CString>,
    architecture: CString,
    pending: *const u64,
    pending_bytes: Arc<AtomicU64>,
}

// SAFETY: the only field that is not Send and Sync by itself is `pending`, a pointer that flea_model_open's contract
// makes valid on every thread until the plan is made; it is only read, and only before that.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub fn open(path: PathBuf, options: &flea_open_options) -> Result<Self> {
        let pending_bytes = Arc::new(AtomicU64::new(0));
        // SAFETY: NULL or a string that is valid during the call, by flea_model_open's contract.
        let endpoint = unsafe { text(options.endpoint, "endpoint") }?;
        let endpoint = endpoint.map_or(Ok(Endpoint::Local), Endpoint::parse)?;
        if endpoint != Endpoint::Local {
            refuse_local_options(options)?;
        }
        let parsed = parse_options(options, Arc::clone(&pending_bytes))?;
        let handle_pending = options.host_pending_bytes;
        read_pending(handle_pending, &pending_bytes);
        let gpus = gpus_of(options)?;
        let model = match gpus.as_slice() {
            [] => Opened::open(&path, &endpoint, parsed)?,
            gpus => Opened::open_on_gpus(&path, gpus, options.vram_slots_count, parsed)?,
        };
        let text = |text: &str| CString::new(text.replace('\0', "?")).unwrap_or_default();
        let names = model
            .catalog()
            .tensors
            .iter()
            .map(|tensor| text(&tensor.name))
            .collect();
        let architecture = text(&model.catalog().architecture);
        Ok(Self {
            model,
            names,
            architecture,
            pending: handle_pending,
            pending_bytes,
        })
    }

    /// Takes over what the host says it has reserved, as long as no plan is made.
    pub fn refresh_pending(&self) {
        if !self.model.is_planned() {
            read_pending(self.pending, &self.pending_bytes);
        }
    }

    pub fn info(&self, struct_size: u32) -> flea_info {
        let catalog = self.model.catalog();
        let plan = self.model.plan();
        let budget = self.model.budget();
        let gpu = self.model.gpu().unwrap_or_default();
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        flea_info {
            struct_size,
            planned: u32::from(self.model.is_planned()),
            layer_count: count(catalog.layers.len()),
            tensor_count: count(catalog.tensors.len()),
            shard_count: count(catalog.shards.len()),
            page_bytes: u32::try_from(self.model.page_bytes()).unwrap_or(u32::MAX),
            slots_count: self.model.slots_count(),
            backing: match self.model.backing() {
                Backing::Private => types::FLEA_BACKING_PRIVATE,
                Backing::Shared => types::FLEA_BACKING_SHARED,
            },
            model_bytes: catalog.model_bytes,
            host_tensor_bytes: catalog.host_tensor_bytes,
            slot_bytes: plan.map_or(0, |plan| plan.slot_bytes),
            total_bytes: budget.map_or(0, |budget| budget.total_bytes),
            host_bytes: budget.map_or(0, |budget| budget.host_bytes),
            weight_budget_bytes: budget.map_or(0, |budget| budget.weight_budget_bytes),
            resident_bytes: plan.map_or(0, |plan| plan.resident_bytes),
            ring_bytes: plan.map_or(0, |plan| plan.ring_bytes),
            streamed_bytes_per_pass: plan.map_or(0, |plan| plan.streamed_bytes_per_pass),
            architecture: self.architecture.as_ptr(),
            expert_cache_bytes: plan.map_or(0, |plan| plan.expert_cache_bytes),
            rows_bytes: self.model.rows_bytes(),
            vram_budget_bytes: gpu.vram_budget_bytes,
            vram_resident_bytes: gpu.vram_resident_bytes,
            vram_ring_bytes: gpu.vram_ring_bytes,
            link_bytes_per_pass: gpu.link_bytes_per_pass,
            gpu_index: gpu.index,
            gpu_count: count(self.model.gpus().len()),
        }
    }

    /// One of the GPUs, by its place among them.
    pub fn gpu(&self, place: u32, struct_size: u32) -> Result<flea_gpu> {
        let gpus = self.model.gpus();
        let gpu = gpus.get(place as usize).ok_or_else(|| {
            let context = format!("GPU {place} of {}: the model is on no more", gpus.len());
            Error::new(ErrorKind::NotFound, context)
        })?;
        Ok(flea_gpu {
            struct_size,
            gpu_index: gpu.index,
            first_layer: gpu.first_layer,
            layer_count: gpu.layer_count,
            vram_budget_bytes: gpu.vram_budget_bytes,
            vram_resident_bytes: gpu.vram_resident_bytes,
            vram_ring_bytes: gpu.vram_ring_bytes,
            link_bytes_per_pass: gpu.link_bytes_per_pass,
            h2d_bytes: gpu.link.h2d_bytes,
            h2d_pinned_bytes: gpu.link.h2d_pinned_bytes,
            h2d_resident_bytes: gpu.link.h2d_resident_bytes,
            h2d_copies: gpu.link.copies,
            pinned_bytes: gpu.link.pinned_bytes,
        })
    }

    pub fn tensor(&self, index: usize, struct_size: u32) -> flea_tensor {
        let tensor = &self.model.catalog().tensors[index];
        let layer = |layer: u32| i32::try_from(layer).unwrap_or(i32::MAX);
        let span = tensor.layers.as_ref();
        flea_tensor {
            struct_size,
            r#type: tensor.dtype.ggml_number().unwrap_or(u32::MAX),
            layer: span.map_or(-1, |span| layer(span.first)),
            layer_last: span.map_or(-1, |span| layer(span.last)),
            rows_per_layer: span.map_or(0, |span| span.rows_per_layer),
            flags: self.tensor_flags(index),
            dims: tensor.dims,
            shape: tensor.shape,
            bytes: tensor.extent.len_bytes,
            file_offset: self.model.file_offset(tensor.extent.offset_bytes),
            shard: tensor.extent.shard_index,
            data: match span.is_some() || self.model.row_bytes(index).is_some() {
                true => self
                    .model
                    .address(tensor.extent.shard_index, tensor.extent.offset_bytes)
                    .cast(),
                false => std::ptr::null(),
            },
            name: self.names[index].as_ptr(),
            gpu_index: span
                .and_then(|span| self.model.gpu_of(span.first))
                .map_or(-1, layer),
            reserved: 0,
        }
    }

    fn tensor_flags(&self, index: usize) -> u32 {
        let tensor = &self.model.catalog().tensors[index];
        let stacked = tensor.experts.is_some_and(|experts| experts.count > 1);
        let mut flags = 0;
        if tensor.host_kept {
            flags |= types::FLEA_TENSOR_HOST_KEPT;
        }
        if stacked && tensor.layers.is_some() && self.model.experts_on_demand() {
            flags |= types::FLEA_TENSOR_EXPERTS;
        }
        if self.model.row_bytes(index).is_some() {
            flags |= types::FLEA_TENSOR_ROWS;
        }
        flags
    }

    pub fn stats(&self, struct_size: u32) -> flea_stats_data {
        let stats = self.model.stats();
        let link = self.model.link_counters();
        flea_stats_data {
            struct_size,
            reader: reader_number(stats.reader),
            direct_io: u32::from(stats.direct_io),
            fallbacks: stats
                .fallbacks
                .iter()
                .fold(0, |bits, fallback| bits | fallback.kind as u32),
            acquires: stats.acquires,
            releases: stats.releases,
            loads: stats.loads,
            bytes_read: stats.bytes_read,
            reads: stats.reads,
            retries: stats.retries,
            stalls: stats.stalls,
            stall_ns: stats.stall_ns,
            read_ns: stats.read_ns,
            mispredicts: stats.mispredicts,
            resident_bytes: stats.resident_bytes,
            page_bytes: stats.page_bytes,
            huge_page_share: stats.huge_page_share,
            expert_calls: stats.experts.calls,
            expert_hits: stats.experts.hits,
            expert_misses: stats.experts.misses,
            expert_bytes_read: stats.experts.bytes,
            rows: stats.rows.rows,
            row_reads: stats.rows.reads,
            row_bytes_read: stats.rows.bytes,
            row_page_uses: stats.rows.page_uses,
            row_page_hits: stats.rows.page_hits,
            expert_reads_ahead: stats.experts.ahead,
            expert_bytes_read_ahead: stats.experts.ahead_bytes,
            expert_bytes_unused: stats.experts.unused_bytes,
            h2d_bytes: link.h2d_bytes,
            h2d_pinned_bytes: link.h2d_pinned_bytes,
            h2d_resident_bytes: link.h2d_resident_bytes,
            h2d_copies: link.copies,
            pinned_bytes: link.pinned_bytes,
        }
    }
}

/// The model behind a handle, for programs of this crate: what the C ABI has no call for.
///
/// # Safety
/// `model` is open and stays so.
#[cfg(feature = "run")]
pub unsafe fn model_of<'a>(model: *const flea_model) -> &'a Opened {
    // SAFETY: a flea_model* is a Handle made by flea_model_open, alive by this function's contract.
    unsafe { &(*model.cast::<Handle>()).model }
}

fn read_pending(pointer: *const u64, into: &AtomicU64) {
    // SAFETY: NULL, or valid until the plan is made by the contract of flea_open_options.host_pending_bytes; callers
    // here run before that.
    if let Some(bytes) = unsafe { pointer.as_ref() } {
        into.store(*bytes, Ordering::Release);
    }
}

fn reader_number(kind: ReaderKind) -> u32 {
    match kind {
        ReaderKind::Auto => types::FLEA_READER_AUTO,
        ReaderKind::IoUring => types::FLEA_READER_IO_URING,
        ReaderKind::Pread => types::FLEA_READER_PREAD,
        // No reader of host memory is it.
        ReaderKind::Gds => types::FLEA_READER_AUTO,
    }
}

/// Memory, slots and reader are the daemon's: a host that sets them expects something that it would not get.
fn refuse_local_options(options: &flea_open_options) -> Result<()> {
    let set = [
        ("pool_bytes", options.pool_bytes != 0),
        ("memory", !options.memory.is_null()),
        ("backing", options.backing == types::FLEA_BACKING_PRIVATE),
        ("reader", options.reader != types::FLEA_READER_AUTO),
        ("slots_count", options.slots_count != 0),
        ("page_bytes", options.page_bytes != 0),
        ("request_bytes", options.request_bytes != 0),
        ("depth", options.depth != 0),
        ("vram", !options.vram.is_null()),
        ("gpus", !options.gpus.is_null()),
    ];
    match set.iter().find(|(_, set)| *set) {
        None => Ok(()),
        Some((name, _)) => Err(invalid(format!(
            "{name} is set, and so is the endpoint of a daemon, which has a {name} of its own; leave it out, or set it there (flead.toml, flea-ctl budget)"
        ))),
    }
}

/// The GPUs asked for; none for weights in host memory.
fn gpus_of(options: &flea_open_options) -> Result<Vec<GpuShare>> {
    // SAFETY: NULL or strings that are valid during the call, by flea_model_open's contract.
    let (vram, list) = unsafe { (text(options.vram, "vram")?, text(options.gpus, "gpus")?) };
    let list = match (list, options.gpu_index) {
        (None, index) => GpuList(vec![index]),
        (Some(list), 0) => list.parse().map_err(invalid)?,
        (Some(_), _) => return Err(invalid("gpus and gpu_index are set: leave gpu_index 0")),
    };
    match vram {
        Some(vram) => vram.parse::<VramList>().map_err(invalid)?.of(&list),
        None if options.gpus.is_null() => Ok(Vec::new()),
        None => Err(invalid(
            "gpus is set, and vram is not: say how much of their memory weights may take (8GiB, or 25%)",
        )),
    }
}

fn parse_options(
    options: &flea_open_options,
    host_pending_bytes: Arc<AtomicU64>,
) -> Result<OpenOptions> {
    let known_flags = types::FLEA_OPEN_DEFER_PLAN | types::FLEA_OPEN_EXPERTS;
    if options.flags & !known_flags != 0 {
        return Err(invalid(format!(
            "flea_open_options.flags has unknown bits {:#x}",
            options.flags & !known_flags
        )));
    }
    // SAFETY: NULL or a string that is valid during the call, by flea_model_open's contract.
    let memory = unsafe { text(options.memory, "memory") }?;
    let budget = match (options.pool_bytes, memory) {
        (0, None) => BudgetSpec::Memory(MemorySpec::Auto),
        (0, Some(memory)) => BudgetSpec::Memory(memory.parse().map_err(invalid)?),
        (bytes, _) => BudgetSpec::Pool(bytes),
    };
    let backing = match options.backing {
        types::FLEA_BACKING_DEFAULT | types::FLEA_BACKING_PRIVATE => Backing::Private,
        types::FLEA_BACKING_SHARED => Backing::Shared,
        other => {
            return Err(invalid(format!(
                "flea_open_options.backing {other} is unknown"
            )));
        }
    };
    let kind = match options.reader {
        types::FLEA_READER_AUTO => ReaderKind::Auto,
        types::FLEA_READER_IO_URING => ReaderKind::IoUring,
        types::FLEA_READER_PREAD => ReaderKind::Pread,
        other => {
            return Err(invalid(format!(
                "flea_open_options.reader {other} is unknown"
            )));
        }
    };
    let defaults = OpenOptions::default();
    // SAFETY: as above.
    let mirrors = unsafe { text(options.mirrors, "mirrors") }?;
    let mirrors = mirrors.unwrap_or_default().split(':');
    Ok(OpenOptions {
        trace: None,
        mirrors: mirrors
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
            .collect(),
        budget,
        defer_plan: options.flags & types::FLEA_OPEN_DEFER_PLAN != 0,
        experts: options.flags & types::FLEA_OPEN_EXPERTS != 0,
        backing,
        reader: ReaderOptions {
            kind,
            request_bytes: options.request_bytes,
            depth: options.depth,
            ..ReaderOptions::default()
        },
        slots_count: if options.slots_count == 0 {
            defaults.slots_count
        } else {
            options.slots_count
        },
        page_bytes: (options.page_bytes != 0).then_some(u64::from(options.page_bytes)),
        host_pending_bytes,
        ..defaults
    })
}

/// The handle behind a pointer.
///
/// # Safety
/// NULL, or a pointer that flea_model_open gave and flea_model_close has not taken.
pub unsafe fn handle<'a>(model: *const flea_model) -> Result<&'a Handle> {
    // SAFETY: by this function's contract.
    unsafe { model.cast::<Handle>().as_ref() }.ok_or_else(|| invalid("the model is NULL"))
}

/// A C string as text; `None` for NULL.
///
/// # Safety
/// NULL, or a NUL-terminated string that outlives the result.
pub unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: by this function's contract.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes
        .to_str()
        .map(Some)
        .map_err(|_| invalid(format!("{what} is not UTF-8")))
}

/// A C path; any bytes will do.
///
/// # Safety
/// NULL, or a NUL-terminated string.
pub unsafe fn path(pointer: *const c_char) -> Result<PathBuf> {
    if pointer.is_null() {
        return Err(invalid("the path is NULL"));
    }
    // SAFETY: by this function's contract.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    Ok(PathBuf::from(OsStr::from_bytes(bytes.to_bytes())))
}

/// Reads options of whatever size the host was compiled with: what it does not know is 0, what we do not know must be.
///
/// # Safety
/// NULL, or a pointer to `struct_size` readable bytes.
pub unsafe fn read_options(options: *const flea_open_options) -> Result<flea_open_options> {
    // SAFETY: the struct is made of integers and raw pointers, for which zero is a value.
    let mut known: flea_open_options = unsafe { std::mem::zeroed() };
    if options.is_null() {
        return Ok(known);
    }
    // SAFETY: not NULL, so by contract at least its first field can be read.
    let given = unsafe { (*options).struct_size } as usize;
    let ours = size_of::<flea_open_options>();
    if !(size_of::<u32>()..=4096).contains(&given) {
        return Err(invalid(format!(
            "flea_open_options.struct_size is {given}; set it to sizeof(flea_open_options)"
        )));
    }
    // SAFETY: both sides have min(given, ours) bytes and do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            options.cast::<u8>(),
            (&raw mut known).cast::<u8>(),
            given.min(ours),
        );
    }
    if given > ours {
        // SAFETY: the host vouches for `given` bytes.
        let beyond =
            unsafe { std::slice::from_raw_parts(options.cast::<u8>().add(ours), given - ours) };
        if beyond.iter().any(|byte| *byte != 0) {
            let context = "flea_open_options has fields that this libflea does not know yet; update it, or leave them 0";
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
    }
    Ok(known)
}

/// The `struct_size` a host has written into an output structure.
///
/// # Safety
/// NULL, or a pointer to a structure that begins with its `uint32_t struct_size`.
pub unsafe fn size_of_output<T>(out: *const T) -> Result<u32> {
    // SAFETY: by this function's contract.
    let given = unsafe { out.cast::<u32>().as_ref() }
        .ok_or_else(|| invalid("the output structure is NULL"))?;
    if (*given as usize) < size_of::<u32>() {
        return Err(invalid(
            "struct_size of the output structure is not set; write sizeof of it there first",
        ));
    }
    Ok(*given)
}

/// Writes as much of an output structure as the host has room for.
///
/// # Safety
/// `out` has `struct_size` writable bytes.
pub unsafe fn write_output<T>(out: *mut T, value: &T, struct_size: u32) {
    let len = (struct_size as usize).min(size_of::<T>());
    // SAFETY: both sides have `len` bytes; `value` is ours and cannot overlap the host's structure.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(value).cast::<u8>(),
            out.cast::<u8>(),
            len,
        )
    }
}
