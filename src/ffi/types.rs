//! Constants and structures of the C ABI. Numbers are never changed or reused; structures only grow at their end.

#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_void};

/// Version of this interface. It grows when calls or fields are added; it never breaks within soname 0.
pub const FLEA_ABI_VERSION: u32 = 1;

/// Done.
pub const FLEA_OK: i32 = 0;
/// An argument is wrong.
pub const FLEA_E_INVALID: i32 = -1;
/// The system has no memory, mapping or lock for it.
pub const FLEA_E_NOMEM: i32 = -2;
/// The drive or filesystem failed.
pub const FLEA_E_IO: i32 = -3;
/// The file is not a model, or says something that cannot be.
pub const FLEA_E_FORMAT: i32 = -4;
/// No such file, tensor or layer.
pub const FLEA_E_NOTFOUND: i32 = -5;
/// Not ready, and timeout_ns was 0.
pub const FLEA_E_AGAIN: i32 = -6;
/// Not ready within timeout_ns.
pub const FLEA_E_TIMEOUT: i32 = -7;
/// This host itself holds what it would wait for; release something.
pub const FLEA_E_BUSY: i32 = -8;
/// The daemon is not reachable, or went away.
pub const FLEA_E_CONN: i32 = -9;
/// Not allowed.
pub const FLEA_E_PERM: i32 = -10;
/// The memory budget is too small; the text holds the arithmetic.
pub const FLEA_E_REFUSED: i32 = -11;
/// This kernel, build or file type cannot do it.
pub const FLEA_E_UNSUPPORTED: i32 = -12;
/// The file ends before its data does.
pub const FLEA_E_TRUNCATED: i32 = -13;
/// The file changed while in use.
pub const FLEA_E_CHANGED: i32 = -14;
/// Bytes differ from their checksum.
pub const FLEA_E_CHECKSUM: i32 = -15;
/// The lease was taken back.
pub const FLEA_E_REVOKED: i32 = -16;
/// Stopped on request.
pub const FLEA_E_CANCELED: i32 = -17;
/// A defect in flea.
pub const FLEA_E_INTERNAL: i32 = -99;

/// backing: the default of the endpoint (private in process).
pub const FLEA_BACKING_DEFAULT: u32 = 0;
/// backing: anonymous memory whose pages are moved from layer to layer.
pub const FLEA_BACKING_PRIVATE: u32 = 1;
/// backing: a memfd that several layers alias.
pub const FLEA_BACKING_SHARED: u32 = 2;

/// reader: io_uring, or pread threads where the system refuses it.
pub const FLEA_READER_AUTO: u32 = 0;
/// reader: io_uring or an error.
pub const FLEA_READER_IO_URING: u32 = 1;
/// reader: pread threads.
pub const FLEA_READER_PREAD: u32 = 2;

/// flags: make the plan, and start reading, at the first acquire instead of at open.
pub const FLEA_OPEN_DEFER_PLAN: u32 = 1;

/// flags: this host acquires tensors with FLEA_TENSOR_EXPERTS by flea_acquire_ranges, only the experts it needs; flea_acquire
/// of a layer leaves them out. Without effect through a daemon and with FLEA_BACKING_SHARED: no tensor has the flag then.
pub const FLEA_OPEN_EXPERTS: u32 = 2;

/// fallbacks: O_DIRECT was refused; reads go through the page cache and are dropped behind.
pub const FLEA_FALLBACK_BUFFERED: u32 = 1;
/// fallbacks: io_uring was refused; pread threads read.
pub const FLEA_FALLBACK_PREAD: u32 = 2;
/// fallbacks: 2 MiB pages were wanted, the pool lies on 4 KiB pages.
pub const FLEA_FALLBACK_SMALL_PAGES: u32 = 4;
/// fallbacks: memory could not be bound to the drive's NUMA node.
pub const FLEA_FALLBACK_NUMA: u32 = 8;
/// A bit of flea_stats_data.fallbacks: a copy of the model failed and is used no more.
pub const FLEA_FALLBACK_MIRROR: u32 = 16;
/// fallbacks: GPUDirect Storage was refused or not believed; weights reach the GPU through host memory.
pub const FLEA_FALLBACK_GDS: u32 = 32;

/// tensor flags: rows or globals that the host keeps itself (token embeddings). A tied output head is both.
pub const FLEA_TENSOR_HOST_KEPT: u32 = 1;
/// tensor flags: routed experts, one behind the other in equal parts along the last dimension, of which only those are in
/// memory that flea_acquire_ranges asked for.
pub const FLEA_TENSOR_EXPERTS: u32 = 2;

/// tensor flags: a table of embeddings whose rows flea_read_rows copies out, so that the host need not keep it. Not through a
/// daemon, and not for tables of less than 16 MiB.
pub const FLEA_TENSOR_ROWS: u32 = 4;

/// How to open a model. Zero it, set struct_size, then the fields that matter.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_open_options {
    /// sizeof(flea_open_options).
    pub struct_size: u32,
    /// FLEA_BACKING_*.
    pub backing: u32,
    /// FLEA_READER_*.
    pub reader: u32,
    /// Slots of the ring, 2 to 64; 0 = 3.
    pub slots_count: u32,
    /// 4096 or 2097152; 0 = by the size of the layers.
    pub page_bytes: u32,
    /// Bytes of one read, a multiple of 4096; 0 = the default.
    pub request_bytes: u32,
    /// Reads in flight, 1 to 256; 0 = the default.
    pub depth: u32,
    /// FLEA_OPEN_* or 0.
    pub flags: u32,
    /// The weight budget in bytes; 0 = derived from `memory`.
    pub pool_bytes: u64,
    /// The budget of the whole process when pool_bytes is 0: "4GiB", or "50%" (weights: half of the model); NULL = all
    /// that is free. Read during the call only.
    pub memory: *const c_char,
    /// NULL = in this process; "unix:PATH" = the daemon that listens there. Memory, slots, pages and reader are then the
    /// daemon's: leave those fields 0, or the call is INVALID. Read during the call only.
    pub endpoint: *const c_char,
    /// Optional: bytes this host has reserved but not touched yet (KV cache, compute memory). Read once, when the plan
    /// is made; with FLEA_OPEN_DEFER_PLAN that is in the first acquire or hint, and it must be valid until then.
    pub host_pending_bytes: *const u64,
    /// Directories with copies of the model's files, separated by ':', to be read from as well; NULL = none. Read during
    /// the call only.
    pub mirrors: *const c_char,
    /// Weights in the memory of an NVIDIA GPU: how much of it they may take, "8GiB", or "25%" of the model. NULL = in host
    /// memory. What does not stay there is kept in host memory, as far as `memory` or `pool_bytes` allow, or read from the
    /// drive in each pass. UNSUPPORTED where libflea is built without CUDA, or no driver is there. Read during the call only.
    pub vram: *const c_char,
    /// Which GPU, as the CUDA driver counts them, from 0. Without meaning where `vram` is NULL.
    pub gpu_index: u32,
    /// Slots of the ring in its memory, 2 to 64; 0 = 3.
    pub vram_slots_count: u32,
    /// Several GPUs by their numbers, "0,1", each of which has a run of the layers, in this order; NULL = gpu_index alone, which
    /// is 0 where this is given. `vram` is then for each of them, or says one size for each: "8GiB,4GiB". The layers are divided
    /// in that proportion. Read during the call only.
    pub gpus: *const c_char,
}

/// What a model is, and how it was planned. Fields marked (plan) are 0 until the plan is made.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_info {
    /// sizeof(flea_info), set by the caller.
    pub struct_size: u32,
    /// 1 once the plan is made.
    pub planned: u32,
    /// Layers of a pass: blocks, then the pieces of the output head.
    pub layer_count: u32,
    /// Tensors in the files.
    pub tensor_count: u32,
    /// Files of the model.
    pub shard_count: u32,
    /// Page size, in bytes.
    pub page_bytes: u32,
    /// Slots of the ring.
    pub slots_count: u32,
    /// FLEA_BACKING_PRIVATE or FLEA_BACKING_SHARED.
    pub backing: u32,
    /// All tensors of the model, in bytes.
    pub model_bytes: u64,
    /// Tensors the host keeps itself, in bytes.
    pub host_tensor_bytes: u64,
    /// One slot, in bytes (plan).
    pub slot_bytes: u64,
    /// What the process may hold, in bytes (plan).
    pub total_bytes: u64,
    /// What it holds besides weights in flea's pool, in bytes (plan).
    pub host_bytes: u64,
    /// What weights may take, in bytes (plan).
    pub weight_budget_bytes: u64,
    /// Weights that stay in memory, in bytes (plan).
    pub resident_bytes: u64,
    /// All slots, in bytes (plan).
    pub ring_bytes: u64,
    /// Bytes read per pass once the resident part is in (plan).
    pub streamed_bytes_per_pass: u64,
    /// The model's architecture, such as "llama". Lives as long as the model.
    pub architecture: *const c_char,
    /// All slots for experts that are fetched one by one, in bytes; 0 where layers come with all they have (plan).
    pub expert_cache_bytes: u64,
    /// What flea_read_rows holds in memory, in bytes: a part of host_bytes.
    pub rows_bytes: u64,
    /// What weights may take of a GPU's memory, in bytes; 0 where they are in host memory. All addresses of the model are the
    /// GPU's then, slots_count is that of its ring, and the figures of the plan above are those of the host memory below.
    pub vram_budget_bytes: u64,
    /// Weights that stay there, in bytes.
    pub vram_resident_bytes: u64,
    /// All slots there, in bytes.
    pub vram_ring_bytes: u64,
    /// Bytes that come over the link (PCIe) in each pass, from host memory and drive together.
    pub link_bytes_per_pass: u64,
    /// Which GPU; 0 also where there is none: see vram_budget_bytes. With several the first of them, and the figures of its memory
    /// and link are those of all together: flea_model_gpu tells them apart.
    pub gpu_index: u32,
    /// How many GPUs the layers are on; 0 where weights are in host memory, and from a libflea that knew only one.
    pub gpu_count: u32,
}

/// One tensor of a model.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_tensor {
    /// sizeof(flea_tensor), set by the caller.
    pub struct_size: u32,
    /// ggml's number of the type; 0xffffffff for a type that only safetensors has.
    pub r#type: u32,
    /// The first layer that uses it, -1 when only the host keeps it.
    pub layer: i32,
    /// The last layer: greater than `layer` when the tensor is cut by rows into several layers.
    pub layer_last: i32,
    /// Rows in each of those layers but the last; 0 when it is not cut.
    pub rows_per_layer: u64,
    /// FLEA_TENSOR_* or 0.
    pub flags: u32,
    /// How many of `shape` count.
    pub dims: u32,
    /// Elements per dimension, the contiguous one first. Unused ones are 1.
    pub shape: [u64; 4],
    /// Its size in bytes.
    pub bytes: u64,
    /// Where it lies in its file.
    pub file_offset: u64,
    /// Which file, counted from 0.
    pub shard: u32,
    /// Its constant address; NULL when `layer` is -1 and it has no FLEA_TENSOR_ROWS. Readable only while its layer is
    /// acquired, and never where `layer` is -1. With flea_open_options.vram a device pointer, for the GPU alone, aligned to 128
    /// bytes and, where it is quantised, followed by as many zeros as ggml's kernels read.
    pub data: *const c_void,
    /// Its name. Lives as long as the model.
    pub name: *const c_char,
    /// The GPU that it is on, as flea_open_options names it: the one whose address `data` is, and whose events
    /// flea_release_after takes for its layer. -1 where `layer` is -1, and in host memory.
    pub gpu_index: i32,
    /// 0.
    pub reserved: u32,
}

/// One GPU of a model.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_gpu {
    /// sizeof(flea_gpu), set by the caller.
    pub struct_size: u32,
    /// Which GPU, as the CUDA driver counts them.
    pub gpu_index: u32,
    /// Its first layer.
    pub first_layer: u32,
    /// How many it has, one behind the other.
    pub layer_count: u32,
    /// What weights may take of its memory, in bytes.
    pub vram_budget_bytes: u64,
    /// Weights that stay there, in bytes.
    pub vram_resident_bytes: u64,
    /// All slots there, in bytes.
    pub vram_ring_bytes: u64,
    /// Bytes that come over its link in each pass.
    pub link_bytes_per_pass: u64,
    /// Bytes copied into its memory so far.
    pub h2d_bytes: u64,
    /// Of those: out of pinned memory.
    pub h2d_pinned_bytes: u64,
    /// Of those: into pages that stay there, once.
    pub h2d_resident_bytes: u64,
    /// Copies they took.
    pub h2d_copies: u64,
    /// Host memory that is pinned for it, in bytes.
    pub pinned_bytes: u64,
}

/// Counters of a model since it was opened.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_stats_data {
    /// sizeof(flea_stats_data), set by the caller.
    pub struct_size: u32,
    /// FLEA_READER_IO_URING or FLEA_READER_PREAD.
    pub reader: u32,
    /// 1 when every file is read with O_DIRECT.
    pub direct_io: u32,
    /// FLEA_FALLBACK_* bits.
    pub fallbacks: u32,
    /// Leases given. A further acquire of a layer that the thread holds extends its lease and is not counted.
    pub acquires: u64,
    /// Releases.
    pub releases: u64,
    /// Transient runs read to the end.
    pub loads: u64,
    /// Bytes asked of the kernel: resident, transient, experts and rows.
    pub bytes_read: u64,
    /// Requests completed.
    pub reads: u64,
    /// Requests tried again.
    pub retries: u64,
    /// Acquires that waited.
    pub stalls: u64,
    /// Nanoseconds that acquires waited.
    pub stall_ns: u64,
    /// Nanoseconds with at least one request in flight.
    pub read_ns: u64,
    /// Acquires that the learned order had not foreseen.
    pub mispredicts: u64,
    /// Weights that stay in memory, in bytes.
    pub resident_bytes: u64,
    /// Page size of the pool, in bytes.
    pub page_bytes: u64,
    /// Measured share of the pool that lies on huge pages, 0 to 1.
    pub huge_page_share: f64,
    /// Calls of flea_acquire_ranges that named experts: each is a cut in the host's computing.
    pub expert_calls: u64,
    /// Experts' parts of tensors that were acquired and in memory, or on their way.
    pub expert_hits: u64,
    /// Experts' parts of tensors that were acquired and had to be read.
    pub expert_misses: u64,
    /// Bytes read for them.
    pub expert_bytes_read: u64,
    /// Rows that flea_read_rows copied out.
    pub rows: u64,
    /// Reads they took.
    pub row_reads: u64,
    /// Bytes of those.
    pub row_bytes_read: u64,
    /// Pages that rows lay in, counted for each row.
    pub row_page_uses: u64,
    /// Of those: found in the cache.
    pub row_page_hits: u64,
    /// Experts' parts of tensors that were read because of flea_hint_ranges: acquired later, they are hits.
    pub expert_reads_ahead: u64,
    /// Bytes read for those: not in expert_bytes_read.
    pub expert_bytes_read_ahead: u64,
    /// Of those bytes: gone again before anybody acquired them.
    pub expert_bytes_unused: u64,
    /// Bytes copied into a GPU's memory. On a GPU acquires, releases, loads and stalls are those of the leases there.
    pub h2d_bytes: u64,
    /// Of those: out of pinned memory.
    pub h2d_pinned_bytes: u64,
    /// Of those: into pages that stay there, once.
    pub h2d_resident_bytes: u64,
    /// Copies they took.
    pub h2d_copies: u64,
    /// Host memory that is pinned, in bytes.
    pub pinned_bytes: u64,
}

/// A range of a model's addresses.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct flea_range {
    /// Its first byte.
    pub addr: *const c_void,
    /// Its length.
    pub bytes: u64,
}

/// An open model. Only ever used through a pointer.
#[repr(C)]
#[derive(Debug)]
pub struct flea_model {
    _private: [u8; 0],
}
