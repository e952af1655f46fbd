/* flea: streams LLM weights from NVMe into preallocated memory just before a host computes with them.
 * Generated from src/ffi by cbindgen; do not edit (make header). License: MIT OR Apache-2.0.
 *
 * A host needs five calls: flea_model_open, flea_model_tensor, flea_acquire, flea_release, flea_model_close.
 * Statuses: FLEA_OK or a negative FLEA_E_*; flea_last_error has the sentence. Structures begin with struct_size,
 * which the caller sets to sizeof; fields are only ever appended. */

#ifndef FLEA_H
#define FLEA_H

#include <stddef.h>
#include <stdint.h>

// Version of this interface. It grows when calls or fields are added; it never breaks within soname 0.
#define FLEA_ABI_VERSION 1

// Done.
#define FLEA_OK 0

// An argument is wrong.
#define FLEA_E_INVALID -1

// The system has no memory, mapping or lock for it.
#define FLEA_E_NOMEM -2

// The drive or filesystem failed.
#define FLEA_E_IO -3

// The file is not a model, or says something that cannot be.
#define FLEA_E_FORMAT -4

// No such file, tensor or layer.
#define FLEA_E_NOTFOUND -5

// Not ready, and timeout_ns was 0.
#define FLEA_E_AGAIN -6

// Not ready within timeout_ns.
#define FLEA_E_TIMEOUT -7

// This host itself holds what it would wait for; release something.
#define FLEA_E_BUSY -8

// The daemon is not reachable, or went away.
#define FLEA_E_CONN -9

// Not allowed.
#define FLEA_E_PERM -10

// The memory budget is too small; the text holds the arithmetic.
#define FLEA_E_REFUSED -11

// This kernel, build or file type cannot do it.
#define FLEA_E_UNSUPPORTED -12

// The file ends before its data does.
#define FLEA_E_TRUNCATED -13

// The file changed while in use.
#define FLEA_E_CHANGED -14

// Bytes differ from their checksum.
#define FLEA_E_CHECKSUM -15

// The lease was taken back.
#define FLEA_E_REVOKED -16

// Stopped on request.
#define FLEA_E_CANCELED -17

// A defect in flea.
#define FLEA_E_INTERNAL -99

// backing: the default of the endpoint (private in process).
#define FLEA_BACKING_DEFAULT 0

// backing: anonymous memory whose pages are moved from layer to layer.
#define FLEA_BACKING_PRIVATE 1

// backing: a memfd that several layers alias.
#define FLEA_BACKING_SHARED 2

// reader: io_uring, or pread threads where the system refuses it.
#define FLEA_READER_AUTO 0

// reader: io_uring or an error.
#define FLEA_READER_IO_URING 1

// reader: pread threads.
#define FLEA_READER_PREAD 2

// flags: make the plan, and start reading, at the first acquire instead of at open.
#define FLEA_OPEN_DEFER_PLAN 1

// flags: this host acquires tensors with FLEA_TENSOR_EXPERTS by flea_acquire_ranges, only the experts it needs; flea_acquire
// of a layer leaves them out. Without effect through a daemon and with FLEA_BACKING_SHARED: no tensor has the flag then.
#define FLEA_OPEN_EXPERTS 2

// fallbacks: O_DIRECT was refused; reads go through the page cache and are dropped behind.
#define FLEA_FALLBACK_BUFFERED 1

// fallbacks: io_uring was refused; pread threads read.
#define FLEA_FALLBACK_PREAD 2

// fallbacks: 2 MiB pages were wanted, the pool lies on 4 KiB pages.
#define FLEA_FALLBACK_SMALL_PAGES 4

// fallbacks: memory could not be bound to the drive's NUMA node.
#define FLEA_FALLBACK_NUMA 8

// A bit of flea_stats_data.fallbacks: a copy of the model failed and is used no more.
#define FLEA_FALLBACK_MIRROR 16

// fallbacks: GPUDirect Storage was refused or not believed; weights reach the GPU through host memory.
#define FLEA_FALLBACK_GDS 32

// tensor flags: rows or globals that the host keeps itself (token embeddings). A tied output head is both.
#define FLEA_TENSOR_HOST_KEPT 1

// tensor flags: routed experts, one behind the other in equal parts along the last dimension, of which only those are in
// memory that flea_acquire_ranges asked for.
#define FLEA_TENSOR_EXPERTS 2

// tensor flags: a table of embeddings whose rows flea_read_rows copies out, so that the host need not keep it. Not through a
// daemon, and not for tables of less than 16 MiB.
#define FLEA_TENSOR_ROWS 4

// type: 4-byte floats.
#define FLEA_KV_F32 0

// type: IEEE halves.
#define FLEA_KV_F16 1

// type: the upper halves of 4-byte floats.
#define FLEA_KV_BF16 2

// How to open a model. Zero it, set struct_size, then the fields that matter.
typedef struct flea_open_options {
  // sizeof(flea_open_options).
  uint32_t struct_size;
  // FLEA_BACKING_*.
  uint32_t backing;
  // FLEA_READER_*.
  uint32_t reader;
  // Slots of the ring, 2 to 64; 0 = 3.
  uint32_t slots_count;
  // 4096 or 2097152; 0 = by the size of the layers.
  uint32_t page_bytes;
  // Bytes of one read, a multiple of 4096; 0 = the default.
  uint32_t request_bytes;
  // Reads in flight, 1 to 256; 0 = the default.
  uint32_t depth;
  // FLEA_OPEN_* or 0.
  uint32_t flags;
  // The weight budget in bytes; 0 = derived from `memory`.
  uint64_t pool_bytes;
  // The budget of the whole process when pool_bytes is 0: "4GiB", or "50%" (weights: half of the model); NULL = all
  // that is free. Read during the call only.
  const char *memory;
  // NULL = in this process; "unix:PATH" = the daemon that listens there. Memory, slots, pages and reader are then the
  // daemon's: leave those fields 0, or the call is INVALID. Read during the call only.
  const char *endpoint;
  // Optional: bytes this host has reserved but not touched yet (KV cache, compute memory). Read once, when the plan
  // is made; with FLEA_OPEN_DEFER_PLAN that is in the first acquire or hint, and it must be valid until then.
  const uint64_t *host_pending_bytes;
  // Directories with copies of the model's files, separated by ':', to be read from as well; NULL = none. Read during
  // the call only.
  const char *mirrors;
  // Weights in the memory of an NVIDIA GPU: how much of it they may take, "8GiB", or "25%" of the model. NULL = in host
  // memory. What does not stay there is kept in host memory, as far as `memory` or `pool_bytes` allow, or read from the
  // drive in each pass. UNSUPPORTED where libflea is built without CUDA, or no driver is there. Read during the call only.
  const char *vram;
  // Which GPU, as the CUDA driver counts them, from 0. Without meaning where `vram` is NULL.
  uint32_t gpu_index;
  // Slots of the ring in its memory, 2 to 64; 0 = 3.
  uint32_t vram_slots_count;
  // Several GPUs by their numbers, "0,1", each of which has a run of the layers, in this order; NULL = gpu_index alone, which
  // is 0 where this is given. `vram` is then for each of them, or says one size for each: "8GiB,4GiB". The layers are divided
  // in that proportion. Read during the call only.
  const char *gpus;
} flea_open_options;

// An open model. Only ever used through a pointer.
typedef struct flea_model {
  uint8_t _private[0];
} flea_model;

// What a model is, and how it was planned. Fields marked (plan) are 0 until the plan is made.
typedef struct flea_info {
  // sizeof(flea_info), set by the caller.
  uint32_t struct_size;
  // 1 once the plan is made.
  uint32_t planned;
  // Layers of a pass: blocks, then the pieces of the output head.
  uint32_t layer_count;
  // Tensors in the files.
  uint32_t tensor_count;
  // Files of the model.
  uint32_t shard_count;
  // Page size, in bytes.
  uint32_t page_bytes;
  // Slots of the ring.
  uint32_t slots_count;
  // FLEA_BACKING_PRIVATE or FLEA_BACKING_SHARED.
  uint32_t backing;
  // All tensors of the model, in bytes.
  uint64_t model_bytes;
  // Tensors the host keeps itself, in bytes.
  uint64_t host_tensor_bytes;
  // One slot, in bytes (plan).
  uint64_t slot_bytes;
  // What the process may hold, in bytes (plan).
  uint64_t total_bytes;
  // What it holds besides weights in flea's pool, in bytes (plan).
  uint64_t host_bytes;
  // What weights may take, in bytes (plan).
  uint64_t weight_budget_bytes;
  // Weights that stay in memory, in bytes (plan).
  uint64_t resident_bytes;
  // All slots, in bytes (plan).
  uint64_t ring_bytes;
  // Bytes read per pass once the resident part is in (plan).
  uint64_t streamed_bytes_per_pass;
  // The model's architecture, such as "llama". Lives as long as the model.
  const char *architecture;
  // All slots for experts that are fetched one by one, in bytes; 0 where layers come with all they have (plan).
  uint64_t expert_cache_bytes;
  // What flea_read_rows holds in memory, in bytes: a part of host_bytes.
  uint64_t rows_bytes;
  // What weights may take of a GPU's memory, in bytes; 0 where they are in host memory. All addresses of the model are the
  // GPU's then, slots_count is that of its ring, and the figures of the plan above are those of the host memory below.
  uint64_t vram_budget_bytes;
  // Weights that stay there, in bytes.
  uint64_t vram_resident_bytes;
  // All slots there, in bytes.
  uint64_t vram_ring_bytes;
  // Bytes that come over the link (PCIe) in each pass, from host memory and drive together.
  uint64_t link_bytes_per_pass;
  // Which GPU; 0 also where there is none: see vram_budget_bytes. With several the first of them, and the figures of its memory
  // and link are those of all together: flea_model_gpu tells them apart.
  uint32_t gpu_index;
  // How many GPUs the layers are on; 0 where weights are in host memory, and from a libflea that knew only one.
  uint32_t gpu_count;
} flea_info;

// One GPU of a model.
typedef struct flea_gpu {
  // sizeof(flea_gpu), set by the caller.
  uint32_t struct_size;
  // Which GPU, as the CUDA driver counts them.
  uint32_t gpu_index;
  // Its first layer.
  uint32_t first_layer;
  // How many it has, one behind the other.
  uint32_t layer_count;
  // What weights may take of its memory, in bytes.
  uint64_t vram_budget_bytes;
  // Weights that stay there, in bytes.
  uint64_t vram_resident_bytes;
  // All slots there, in bytes.
  uint64_t vram_ring_bytes;
  // Bytes that come over its link in each pass.
  uint64_t link_bytes_per_pass;
  // Bytes copied into its memory so far.
  uint64_t h2d_bytes;
  // Of those: out of pinned memory.
  uint64_t h2d_pinned_bytes;
  // Of those: into pages that stay there, once.
  uint64_t h2d_resident_bytes;
  // Copies they took.
  uint64_t h2d_copies;
  // Host memory that is pinned for it, in bytes.
  uint64_t pinned_bytes;
} flea_gpu;

// One tensor of a model.
typedef struct flea_tensor {
  // sizeof(flea_tensor), set by the caller.
  uint32_t struct_size;
  // ggml's number of the type; 0xffffffff for a type that only safetensors has.
  uint32_t type;
  // The first layer that uses it, -1 when only the host keeps it.
  int32_t layer;
  // The last layer: greater than `layer` when the tensor is cut by rows into several layers.
  int32_t layer_last;
  // Rows in each of those layers but the last; 0 when it is not cut.
  uint64_t rows_per_layer;
  // FLEA_TENSOR_* or 0.
  uint32_t flags;
  // How many of `shape` count.
  uint32_t dims;
  // Elements per dimension, the contiguous one first. Unused ones are 1.
  uint64_t shape[4];
  // Its size in bytes.
  uint64_t bytes;
  // Where it lies in its file.
  uint64_t file_offset;
  // Which file, counted from 0.
  uint32_t shard;
  // Its constant address; NULL when `layer` is -1 and it has no FLEA_TENSOR_ROWS. Readable only while its layer is
  // acquired, and never where `layer` is -1. With flea_open_options.vram a device pointer, for the GPU alone, aligned to 128
  // bytes and, where it is quantised, followed by as many zeros as ggml's kernels read.
  const void *data;
  // Its name. Lives as long as the model.
  const char *name;
  // The GPU that it is on, as flea_open_options names it: the one whose address `data` is, and whose events
  // flea_release_after takes for its layer. -1 where `layer` is -1, and in host memory.
  int32_t gpu_index;
  // 0.
  uint32_t reserved;
} flea_tensor;

// A range of a model's addresses.
typedef struct flea_range {
  // Its first byte.
  const void *addr;
  // Its length.
  uint64_t bytes;
} flea_range;

// Counters of a model since it was opened.
typedef struct flea_stats_data {
  // sizeof(flea_stats_data), set by the caller.
  uint32_t struct_size;
  // FLEA_READER_IO_URING or FLEA_READER_PREAD.
  uint32_t reader;
  // 1 when every file is read with O_DIRECT.
  uint32_t direct_io;
  // FLEA_FALLBACK_* bits.
  uint32_t fallbacks;
  // Leases given. A further acquire of a layer that the thread holds extends its lease and is not counted.
  uint64_t acquires;
  // Releases.
  uint64_t releases;
  // Transient runs read to the end.
  uint64_t loads;
  // Bytes asked of the kernel: resident, transient, experts and rows.
  uint64_t bytes_read;
  // Requests completed.
  uint64_t reads;
  // Requests tried again.
  uint64_t retries;
  // Acquires that waited.
  uint64_t stalls;
  // Nanoseconds that acquires waited.
  uint64_t stall_ns;
  // Nanoseconds with at least one request in flight.
  uint64_t read_ns;
  // Acquires that the learned order had not foreseen.
  uint64_t mispredicts;
  // Weights that stay in memory, in bytes.
  uint64_t resident_bytes;
  // Page size of the pool, in bytes.
  uint64_t page_bytes;
  // Measured share of the pool that lies on huge pages, 0 to 1.
  double huge_page_share;
  // Calls of flea_acquire_ranges that named experts: each is a cut in the host's computing.
  uint64_t expert_calls;
  // Experts' parts of tensors that were acquired and in memory, or on their way.
  uint64_t expert_hits;
  // Experts' parts of tensors that were acquired and had to be read.
  uint64_t expert_misses;
  // Bytes read for them.
  uint64_t expert_bytes_read;
  // Rows that flea_read_rows copied out.
  uint64_t rows;
  // Reads they took.
  uint64_t row_reads;
  // Bytes of those.
  uint64_t row_bytes_read;
  // Pages that rows lay in, counted for each row.
  uint64_t row_page_uses;
  // Of those: found in the cache.
  uint64_t row_page_hits;
  // Experts' parts of tensors that were read because of flea_hint_ranges: acquired later, they are hits.
  uint64_t expert_reads_ahead;
  // Bytes read for those: not in expert_bytes_read.
  uint64_t expert_bytes_read_ahead;
  // Of those bytes: gone again before anybody acquired them.
  uint64_t expert_bytes_unused;
  // Bytes copied into a GPU's memory. On a GPU acquires, releases, loads and stalls are those of the leases there.
  uint64_t h2d_bytes;
  // Of those: out of pinned memory.
  uint64_t h2d_pinned_bytes;
  // Of those: into pages that stay there, once.
  uint64_t h2d_resident_bytes;
  // Copies they took.
  uint64_t h2d_copies;
  // Host memory that is pinned, in bytes.
  uint64_t pinned_bytes;
} flea_stats_data;

// A KV codec for vectors of one length. Opaque; it never changes, so any number of threads may use it at a time.
typedef struct flea_kv {
  uint8_t _private[0];
} flea_kv;

// What is in a frame.
typedef struct flea_kv_frame {
  // sizeof(flea_kv_frame), set by the caller.
  uint32_t struct_size;
  // Values of a vector.
  uint32_t dim;
  // Vectors in the frame.
  uint64_t count;
} flea_kv_frame;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of this interface that the library implements: FLEA_ABI_VERSION of its own header.
uint32_t flea_abi_version(void);

// Opens a model: reads its headers, reserves addresses for its tensors and, unless FLEA_OPEN_DEFER_PLAN is set, makes
// the plan, allocates the pool and begins to read.
//
// `path`: a GGUF file, any shard of a split GGUF, a safetensors file or index, or a directory with one of them.
// `options`: NULL for the defaults. Neither is kept, except options->host_pending_bytes.
// `out`: receives the model; give it to flea_model_close. Set to NULL on failure.
// Threads: any. Do not fork and use the model in the child: its memory is not there.
// Returns FLEA_OK or: NOTFOUND, PERM, IO, FORMAT, TRUNCATED, UNSUPPORTED (the file), REFUSED (the budget), NOMEM, INVALID,
// CONN (no daemon answers at options->endpoint).
int32_t flea_model_open(const char *path_text,
                        const struct flea_open_options *options,
                        struct flea_model **out);

// Closes a model: ends its reads and frees its memory. NULL is allowed.
//
// Threads: no other call on this model may run or follow. Every pointer it gave is dead afterwards.
void flea_model_close(struct flea_model *model);

// Describes a model. Set out->struct_size first.
//
// Threads: any. Returns FLEA_OK or INVALID.
int32_t flea_model_info(const struct flea_model *model, struct flea_info *out);

// Describes one of the GPUs that the layers are on, by its place among them (0 to flea_info.gpu_count - 1), which is that of its
// layers. Set out->struct_size first.
//
// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
int32_t flea_model_gpu(const struct flea_model *model,
                       uint32_t place,
                       struct flea_gpu *out);

// Finds a tensor by name. Set out->struct_size first.
//
// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
int32_t flea_model_tensor(const struct flea_model *model, const char *name, struct flea_tensor *out);

// Describes the tensor at place `index` (0 to flea_info.tensor_count - 1). Set out->struct_size first.
//
// Threads: any. Returns FLEA_OK, NOTFOUND or INVALID.
int32_t flea_model_tensor_at(const struct flea_model *model, uint32_t index, struct flea_tensor *out);

// The layer whose weight lies at `addr`, or FLEA_E_NOTFOUND. Any address inside a tensor will do.
//
// Threads: any; takes no lock. Leaves flea_last_error as it is.
int32_t flea_layer_of(const struct flea_model *model, const void *addr);

// Waits until a layer is in memory and keeps it there until flea_release.
//
// `addr`, `bytes`: NULL and 0 for the whole layer; otherwise only that range of it has to be there.
// `timeout_ns`: below 0 waits for ever, 0 only tries.
// Leases are counted: release as often as you acquire. Hold few: the ring has flea_info.slots_count slots.
// Threads: any. Returns FLEA_OK or: AGAIN, TIMEOUT, BUSY (this thread holds what it would wait for), REFUSED (a deferred
// plan does not fit), IO, TRUNCATED, CHANGED, NOMEM, INVALID. After an error the next acquire reads again.
// Through a daemon also CONN (it went away) and REVOKED (it took a lease back that was held for too long while others
// waited): both are final for this model; close it and open it again. Held layers stay mapped, but after REVOKED their
// bytes may change.
int32_t flea_acquire(struct flea_model *model,
                     uint32_t layer,
                     const void *addr,
                     size_t bytes,
                     int64_t timeout_ns);

// Gives back one lease of a layer. Its bytes may change from now on. On a GPU: nothing there reads the layer any more; see
// flea_release_after.
//
// Threads: any, also another than the acquire's. Returns FLEA_OK or INVALID (the layer is not acquired).
int32_t flea_release(struct flea_model *model,
                     uint32_t layer);

// Gives back one lease of a layer that a GPU still reads: its bytes change only when everything is done that `cuda_event`
// stands for. The host does not wait, and may record the event anew at once.
//
// `cuda_event`: a `CUevent` or `cudaEvent_t` of the GPU that has the layer (flea_tensor.gpu_index), recorded behind the last kernel
// that reads it. A captured CUDA graph that reads the layer must be launched anew under each lease; its addresses stay as they are.
// Threads: any, also another than the acquire's. Returns FLEA_OK or: INVALID (the layer is not acquired, or the model is not on
// a GPU: use flea_release there), IO (the GPU is lost).
int32_t flea_release_after(struct flea_model *model,
                           uint32_t layer,
                           void *cuda_event);

// Waits until all ranges are in memory and keeps them there until flea_release_ranges with the same ranges: for weights that
// are known only at run time, such as the experts that a router chose. All reads of a call are started at once.
//
// `ranges`: `count` of them, 1 to 65536, each inside a tensor of a layer; not kept. A range of a weight that comes with its
// layer is a lease of that range of the layer, as flea_acquire gives it. A call gets all of its ranges or none.
// `timeout_ns`: below 0 waits for ever, 0 starts the reads and says whether they were needed.
// Threads: any. Returns FLEA_OK or: INVALID (a range that is not all weights), REFUSED (more experts than their cache has
// slots: ask for fewer at a time), BUSY (this thread holds what it would wait for), UNSUPPORTED (on a GPU, where experts
// come with their layer), and what flea_acquire returns.
int32_t flea_acquire_ranges(struct flea_model *model,
                            const struct flea_range *ranges,
                            size_t count,
                            int64_t timeout_ns);

// Gives back what a flea_acquire_ranges with the same ranges got. Their bytes may change from now on.
//
// Threads: any, also another than the acquire's. Returns FLEA_OK or INVALID (they are not acquired).
int32_t flea_release_ranges(struct flea_model *model, const struct flea_range *ranges, size_t count);

// Says which ranges flea_acquire_ranges will ask for next, in this order: the experts among them are read while nothing else
// is asked for, into memory that no lease holds, and stay there until they were acquired once. What was said before is
// forgotten; `count` 0 only forgets. Ranges of weights that come with their layer are passed over, and so is everything
// where no tensor has FLEA_TENSOR_EXPERTS. A wrong hint costs time, never a wrong byte.
//
// `ranges`: `count` of them, 0 to 65536, each inside a tensor of a layer, which may be all of it; not kept.
// Threads: any. Returns FLEA_OK, INVALID (a range that is not all weights), or what a deferred plan says.
int32_t flea_hint_ranges(struct flea_model *model,
                         const struct flea_range *ranges,
                         size_t count);

// Copies rows of a table of embeddings, those of the tokens that are about to be computed. They are read from the file row
// by row, many reads at once, unless the table's small cache has them.
//
// `table`: flea_tensor.data of a tensor with FLEA_TENSOR_ROWS.
// `rows`: `count` row numbers, in any order and more than once; not kept.
// `out`: receives them one behind the other: `count` times flea_tensor.bytes over the second of its `shape`.
// The first call for a table takes the memory for its reads. Where flea derives the budget from `memory` that must be before
// the first acquire or hint of a model opened with FLEA_OPEN_DEFER_PLAN; it may be a call with `count` 0, and REFUSED says
// that it came too late.
// Threads: any; calls for one table wait for each other. Returns FLEA_OK or: INVALID (no such table, or a row that it does
// not have), REFUSED, NOMEM, IO, TRUNCATED, CHANGED, TIMEOUT, UNSUPPORTED (through a daemon). `out` means nothing then.
int32_t flea_read_rows(struct flea_model *model,
                       const void *table,
                       const int32_t *rows,
                       size_t count,
                       void *out,
                       size_t out_bytes);

// Says which layers will be acquired next, in order. flea learns the order of a pass by itself; a hint overrides it
// once. A wrong hint costs time, never a wrong byte.
//
// Threads: any. `layers` is not kept. Returns FLEA_OK, INVALID, or what a deferred plan says.
int32_t flea_hint(struct flea_model *model, const uint32_t *layers, size_t count);

// Counters of a model. Set out->struct_size first. Measures the pages of the pool, so do not call it in a hot loop.
//
// Threads: any. Returns FLEA_OK or INVALID.
int32_t flea_stats(const struct flea_model *model, struct flea_stats_data *out);

// The text of this thread's last failed call: path, offset, errno and remedy where there are any. Never NULL; empty
// when nothing failed. Valid until the next call that fails on this thread.
const char *flea_last_error(void);

// The errno of this thread's last failed call; 0 when the kernel was not the cause.
int32_t flea_last_errno(void);

// The name of a status, such as "FLEA_E_REFUSED"; "FLEA_E_UNKNOWN" for a number that is none. A constant string.
const char *flea_status_name(int32_t status);

// Makes a KV codec for vectors of `dim` values, 16 to 1024.
//
// `codec`: "q8_0", "q4_0", "tq:4" (whole bits 1 to 8), "tq-ec:3.5" (1 to 8, for disk), "tcq:3" (1 to 4), "rotor:4", "spectral:3",
// "dh013:4" (a baseline to compare with).
// `calibration`, `calibration_bytes`: for spectral what flea_kv_calibrate gave; else NULL and 0. Nothing is kept.
// `out`: receives the codec; give it to flea_kv_close. Set to NULL on failure.
// Threads: any. Returns FLEA_OK or: INVALID, and for the calibration FORMAT, TRUNCATED, CHECKSUM.
int32_t flea_kv_open(const char *codec,
                     uint32_t dim,
                     const void *calibration,
                     size_t calibration_bytes,
                     struct flea_kv **out);

// Frees a KV codec. NULL is allowed.
//
// Threads: no other call on this codec may run or follow.
void flea_kv_close(struct flea_kv *kv);

// The most bytes that flea_kv_encode can write for `count` vectors, whatever is in them (NaN and infinities are kept as
// they are, and need more); 0 when `kv` is NULL or a frame cannot hold so many.
size_t flea_kv_bound(const struct flea_kv *kv, size_t count);

// Encodes `count` vectors, one after the other in `values`, to a frame.
//
// `type`: FLEA_KV_F32, FLEA_KV_F16 or FLEA_KV_BF16. `out` has `out_bytes` bytes; flea_kv_bound says how many are enough.
// `written`: receives the length of the frame, also when `out` was too short for it.
// Threads: any. Returns FLEA_OK or INVALID.
int32_t flea_kv_encode(const struct flea_kv *kv,
                       uint32_t type,
                       const void *values,
                       size_t count,
                       void *out,
                       size_t out_bytes,
                       size_t *written);

// Says what is in a frame without decoding it. Set out->struct_size first.
//
// Threads: any. Returns FLEA_OK, or FORMAT, TRUNCATED, CHECKSUM: no frame, or a damaged one; INVALID.
int32_t flea_kv_frame_info(const void *frame, size_t frame_bytes, struct flea_kv_frame *out);

// Decodes a frame to floats, `count` vectors of dim values: exactly as many as the frame holds.
//
// Threads: any. Returns FLEA_OK, or FORMAT, TRUNCATED, CHECKSUM: no frame, or a damaged one (nothing is written then, or
// not all); INVALID: another codec's frame, or another count.
int32_t flea_kv_decode(const struct flea_kv *kv,
                       const void *frame,
                       size_t frame_bytes,
                       float *values,
                       size_t count);

// Calibrates spectral on a sample: `count` vectors of `dim` floats that will not be coded with it, at least 4 x dim of
// them. Part of the sample decides whether a basis saves 0.1 bit against tq:`bits`; where it does not, the answer is
// UNSUPPORTED and tq is the better codec.
//
// `out` has `out_bytes` bytes: 12 + 8 x dim + 2 x dim x dim are needed. `written`: receives the length.
// Threads: any. Returns FLEA_OK, INVALID or UNSUPPORTED.
int32_t flea_kv_calibrate(uint32_t dim,
                          uint32_t bits,
                          const float *values,
                          size_t count,
                          void *out,
                          size_t out_bytes,
                          size_t *written);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLEA_H */
