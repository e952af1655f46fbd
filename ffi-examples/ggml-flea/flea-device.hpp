// Internal header of the ggml device FLEA.
//
//   ggml-flea.cpp    registration, device, backend: what ggml calls first
//   flea-files.cpp   the GGUF files this process has open
//   flea-find.cpp    which of them is the model that is being loaded, and which of its tensors are streamed
//   flea-model.cpp   one streamed model: catalog, life
//   flea-buffer.cpp  memory: streamed weights stand in flea's windows, everything else is plain anonymous memory
//   flea-graph.cpp   graph_compute: cut where the layer changes, acquire, compute, release
//   flea-cuda.cpp     the GPU that computes, where weights are in its memory
//   flea-arriving.cpp  the same for a layer that is still being read: compute with the part that is there
//   flea-experts.cpp   experts that are fetched one by one: cut where a router has chosen
//   flea-guess.cpp   which experts the next layer's router will choose
//   flea-kv.cpp      keys and values that are moved out of memory
//   flea-rows.cpp      embeddings that are read row by row: cut where tokens are looked up
//   flea-stats.cpp   counters, FLEA_STATS
//   flea-env.cpp     FLEA_* variables, log lines
//
// Invariant that everything rests on: a weight's bytes are touched only between flea_acquire and flea_release of its
// layer, and those of a table of embeddings never: its rows are copied out; a lease never outlives the graph_compute (or get_tensor) that took it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "flea.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-flea.h"
#include "ggml-impl.h"
#include "ggml.h"

namespace ggml_flea {

// ---- flea-env.cpp

enum class LogLevel { off, error, warn, info, debug };

struct Environment {
    std::string memory;    // FLEA_MEMORY; empty = automatic
    std::string mirrors;   // FLEA_MIRROR: directories with copies, separated by ':'
    std::string model;     // FLEA_MODEL; empty = search
    std::string stats;     // FLEA_STATS; empty = none
    bool experts = true;   // FLEA_EXPERTS=off: experts come with their layer
    std::string endpoint;  // FLEA_ENDPOINT; empty = in this process
    std::string vram;      // FLEA_VRAM; empty = weights in host memory
    std::vector<uint32_t> gpus;  // FLEA_GPU; the first where FLEA_VRAM alone is set
    std::string gpu_list;    // the same as flea takes it
    std::string ggml_cuda;   // FLEA_GGML_CUDA; empty = the program has the device
    uint32_t reader = FLEA_READER_AUTO;
    LogLevel log = LogLevel::warn;
    std::string error;     // set when a variable has a value that cannot be understood
};

const Environment & environment();

void log_line(LogLevel level, const char * format, ...) __attribute__((format(printf, 2, 3)));

// Records a failure for FLEA_STATS and ggml_backend_flea_last_failure, and logs it. `what` is one line.
void fail(int32_t status, const std::string & what, LogLevel level = LogLevel::error);
// The same with flea's own words for the status it just returned on this thread.
void fail_flea(int32_t status, const std::string & doing, LogLevel level = LogLevel::error);

// Bytes that a budget in the form of FLEA_MEMORY offers beside the weights; only an estimate for llama.cpp's "fit" pass.
uint64_t offered_bytes(uint64_t model_bytes, uint64_t smallest_weights_bytes);

// ---- flea-files.cpp

std::string first_shard_of(const std::string & path);
std::string shard_path(const std::string & first_shard, uint32_t shard);
bool same_file(const std::string & a, const std::string & b);
std::vector<int> open_fds();
// First shards of the GGUF files that are open for reading; `is_own` tells which descriptors are flea's own.
std::set<std::string> open_model_files(const std::function<bool(int)> & is_own);

// ---- flea-model.cpp

struct Model;

constexpr int gpus_max = 16;  // llama_max_devices()

// One streamed tensor, as the catalog describes it. Lives as long as its Model.
struct Weight {
    Model * model = nullptr;
    int32_t layer = -1;    // -1: no layer has it, only its rows are looked up
    int32_t layer_last = -1;
    uint64_t rows_per_layer = 0;
    uint64_t bytes = 0;
    void * data = nullptr;
    int place = 0;         // of its GPU among those that the model is on
    uint32_t experts = 0;  // so many, acquired one by one; 0: comes with its layer
    uint64_t row_bytes = 0;  // of a table whose rows are read as they are looked up; 0: none
    mutable std::atomic<bool> placed { false };  // some tensor of the host stands here
    mutable std::atomic<bool> reads_rows { false };  // flea holds the memory for it

    bool is_cut() const { return layer_last > layer; }
    // True for an operand of an operation that the device can compute.
    bool serves(const ggml_tensor * op, int src_index) const;
};

struct Model {
    flea_model * handle = nullptr;
    bool owned = true;              // opened, and to be closed, by the device
    std::string path;               // first shard
    flea_info info = {};
    std::vector<flea_gpu> gpus;     // empty: weights are in host memory
    std::vector<double> splits;     // with several GPUs, how many of llama.cpp's layers each has: see divide
    std::vector<uint64_t> gpu_bytes;  // and what they have
    uint64_t largest_layer_bytes = 0;
    std::vector<int> advice_fds;    // one per shard, for posix_fadvise on what the host's loader reads
    std::vector<int> own_fds;       // everything flea and we have open of it: in /proc/self/fd, but no sign of a host
    std::unordered_map<std::string, std::unique_ptr<Weight>> weights;
    std::unordered_map<const void *, const Weight *> by_address;
    size_t missed = 0;  // tensors asked for while its file was open, and not in it; guarded by the finder's mutex
    size_t placed_buffers_count = 0;  // live ggml buffers that hold placed weights; guarded by the finder's mutex
    std::atomic<bool> planned { false };
    std::atomic<bool> fetches_experts { false };  // the plan has a cache of experts
    std::atomic<bool> warned { false };  // that layers are missing
    std::atomic<bool> refused { false };  // that there is no plan; a host tries again with every decode
    std::mutex hint_mutex;
    std::vector<uint32_t> last_hint[gpus_max];  // per GPU

    Model() = default;
    Model(const Model &) = delete;
    Model & operator=(const Model &) = delete;
    ~Model();
};

// Fills in what the catalog says; false when nothing in the file is streamed (projector, adapter).
bool read_catalog(Model & model);
// True when the model has a tensor of that name, type and size.
bool holds(const Model & model, const ggml_tensor * tensor);
// True for names that only weights of a language model have: an unknown one of these is a weight we failed to find.
bool is_model_weight_name(const char * name);
// True for any name that looks like a weight of some file.
bool is_weight_name(const char * name);
bool is_adapter_name(const char * name);
// Layers of which the host placed at least one weight on this device.
uint32_t placed_layers(const Model & model);
// Called before the first acquire: tells flea what is reserved but untouched.
void model_before_acquire(Model * model);
// Called after each acquire: the first one has made the plan.
void model_acquired(Model * model);
// What the host's loader just read of a weight: counted, and dropped from the page cache.
void loader_read(const Weight * weight, uint64_t bytes);

// ---- flea-find.cpp

enum class Match {
    streamed,  // in the plan of the model that is streamed (or about to be)
    kept,      // in that model's file, but the host keeps it (rows, globals)
    other,     // belongs to a file that is not streamed (a second model), so the host has to keep it
    unknown,   // not a tensor of any open model file
    refused,   // it is unclear which file it is in, or that file cannot be streamed; the reason has been logged
};

// Says of a tensor that has no memory yet where it would be, and whether the device could then compute `op` with it. Any
// thread.
Match try_weight(const ggml_tensor * tensor, const ggml_tensor * op, int src_index, bool * serves);
// Finds a tensor by name, type and size, to place it now. On `streamed` *weight is set. Any thread.
Match find_weight(const ggml_tensor * tensor, const Weight ** weight);

void model_buffer_placed(Model * model);
void model_buffer_freed(Model * model);
int32_t configure(const ggml_flea_config * config);
bool is_configured();  // a host that has the device compiled in gave the model
bool loader_skips_streamed();
bool guesses_experts();  // the program wants experts of a few tokens guessed
bool waits_for_parts();  // compute starts with the part of a layer that is there
void loaded();           // the host's loader has finished
flea_model * current_handle();
// model_bytes and the smallest weight budget (an estimate) of the current model; false when none is known yet.
bool current_sizes(uint64_t * model_bytes, uint64_t * smallest_bytes);
// Where a GPU's layers are a part of the current model's: how many llama.cpp counts on each, and their bytes. False: none known, or
// one device has all.
bool current_splits(std::vector<double> & splits, std::vector<uint64_t> & bytes);
// Before any tensor is asked for: the model whose file is open. llama.cpp divides layers over devices first.
void look_for_model();

// ---- flea-cuda.cpp

// The device of ggml-cuda that computes, and its memory.
struct Gpu {
    ggml_backend_dev_t device = nullptr;
    ggml_backend_buffer_type_t buft = nullptr;
};

// What the program's model says; NULL: FLEA_VRAM and FLEA_GPU say it.
void gpu_configure(const Model * model);
// Weights shall be in the memory of a GPU.
bool wants_gpu();
// How many devices FLEA is: one for each GPU, or one.
int places_count();
// The GPU at a place among them. NULL where weights are in host memory, and where the GPU cannot be had, which has been logged.
const Gpu * gpu(int place = 0);

// ---- flea-buffer.cpp

ggml_backend_buffer_type_t buffer_type(int place);
ggml_backend_buffer_type_t host_buffer_type();
// The place of the device whose buffer type it is; -1 for anybody else's.
int place_of(ggml_backend_buffer_type_t buft);

// The streamed weight behind a tensor (through view_src), or NULL.
const Weight * weight_of(const ggml_tensor * tensor);

// While a GPU computes: the buffers of weights are what ggml-cuda takes for its own.
class WeightsOnGpu {
  public:
    WeightsOnGpu();
    WeightsOnGpu(const WeightsOnGpu &) = delete;
    WeightsOnGpu & operator=(const WeightsOnGpu &) = delete;
    ~WeightsOnGpu();

  private:
    bool on_;
};
uint64_t reserved_bytes();            // live buffers, placed weights left out
uint64_t reserved_untouched_bytes();  // the part of it without memory
extern uint64_t pending_bytes;        // what flea reads when it makes the plan

// ---- flea-graph.cpp

// A run of graph nodes computed under one lease.
struct Step {
    int begin = 0;
    int end = 0;
    Model * model = nullptr;       // NULL: touches no streamed weight
    int32_t layer = -1;
    int32_t layer_last = -1;       // > layer: see kind
    enum Kind { plain, cut, together, rows } kind = plain;  // rows: layer is -1
    int32_t kv = -1;               // the layer whose keys and values it touches; -1: none that are streamed
};

// State of one ggml backend object (a context of the host has its own).
struct Stream {
    int place = 0;                   // of the device
    ggml_backend_t inner = nullptr;  // the CPU or CUDA backend that computes
    ggml_backend_event_t event = nullptr;  // on a GPU: recorded behind each piece
    ggml_threadpool_t threadpool = nullptr;
    int threads_count = 0;
    ggml_abort_callback abort_callback = nullptr;
    void * abort_data = nullptr;
    std::vector<Step> steps;
    std::vector<uint32_t> order;
    // Experts that are read ahead of their use.
    bool reads_ahead = true;          // as long as the cache holds what a batch needs of one layer
    double chosen_share = 1.0;        // of a layer's experts, by the last batch that could have chosen all
    Model * hinted = nullptr;         // the model that was told what comes next
    std::vector<flea_range> ahead;
    bool guesses_experts = false;     // of a few tokens
    std::vector<int32_t> guess;       // of what follows guess_of, ascending
    const ggml_tensor * guess_of = nullptr;
    uint64_t guessed = 0;
    uint64_t guessed_right = 0;

    explicit Stream(int place);
    ~Stream();
};

ggml_status graph_compute(Stream & stream, ggml_cgraph * graph);
bool wants_abort(const Stream * stream);
// False for the branches of a graph that llama.cpp builds and does not choose: their inputs hold anything, and the CPU backend
// passes them over.
bool is_computed(const ggml_tensor * node);
// Compute nodes of a graph as a piece of its own, or others in the place of the one at `index`. A GPU may still be at it when
// these return.
ggml_status compute_nodes(Stream & stream, ggml_cgraph * graph, int begin, int end);
ggml_status compute_instead(Stream & stream, ggml_cgraph * graph, int index, std::vector<ggml_tensor *> & nodes);
// True for two nodes that the CPU backend computes as one, if they are in one graph.
bool is_fused_pair(const ggml_tensor * first, const ggml_tensor * second);

// A lease on one layer: taken with wait(), given back by the destructor or by release().
class Lease {
  public:
    Lease() = default;
    ~Lease() { release(); }
    Lease(const Lease &) = delete;
    Lease & operator=(const Lease &) = delete;

    // Any lease held before is given back first. Waits as long as it takes; `stream` may be NULL (no abort callback).
    int32_t take(Model * model, uint32_t layer, const Stream * stream);
    // One attempt of at most a second: FLEA_OK, FLEA_E_BUSY, FLEA_E_TIMEOUT or an error.
    int32_t try_take(Model * model, uint32_t layer);
    // Without waiting. False: the layer is still being read.
    bool take_if_ready(Model * model, uint32_t layer);
    void release();
    bool is_held() const { return model_ != nullptr; }
    // What is leased is read by pieces of this stream; given back behind the last of them.
    void bind(const Stream * stream) { stream_ = stream; }

  private:
    void hold(Model * model, uint32_t layer);

    const Stream * stream_ = nullptr;
    Model * model_ = nullptr;
    uint32_t layer_ = 0;
};

// ---- flea-kv.cpp

// One tensor of a KV cache that is streamed.
struct KvTensor {
    uint32_t layer = 0;
    uint32_t side = 0;  // 0 keys, 1 values
    int64_t row_elements = 0;
    uint64_t row_bytes = 0;
    uint64_t rows_count = 0;
    void * data = nullptr;
};

void kv_configure(const ggml_flea_kv * calls);  // NULL: keys and values stay in memory
uint64_t kv_ring_bytes();                       // memory that they will take; 0 where they are not streamed
bool kv_wants(const ggml_tensor * tensor);      // a tensor of a cache, to be placed
bool kv_place(ggml_tensor * tensor);
const KvTensor * kv_of(const ggml_tensor * tensor);  // through view_src; NULL for all else
int32_t kv_layer_of(const ggml_tensor * node);       // the layer whose keys and values a node reads or writes; -1: none
void kv_clear();
void kv_remove();

// A lease on the keys and values of one layer.
class KvLease {
  public:
    KvLease() = default;
    ~KvLease() { release(); }
    KvLease(const KvLease &) = delete;
    KvLease & operator=(const KvLease &) = delete;

    // Gives the one held before back; a negative layer changes nothing.
    int32_t take(int32_t layer);
    // Tells which rows a step has written.
    int32_t wrote(ggml_cgraph * graph, const Step & step);
    int32_t wrote(const KvTensor * kv, uint64_t offset, uint64_t bytes);
    void release();

  private:
    int32_t layer_ = -1;
};

// ---- flea-arriving.cpp

// Computes a step whose layer is still being read, as its weights arrive. Ends with a lease on the whole layer.
ggml_status compute_arriving(Stream & stream, ggml_cgraph * graph, const Step & step, Lease & lease, int32_t * status);

// ---- flea-experts.cpp

// True when a step has operations whose experts are fetched one by one.
bool has_routed(ggml_cgraph * graph, const Step & step);
// Before the first step, and after the last: says which experts a long batch will need first; forgets what was said.
void tell_first_experts(Stream & stream, ggml_cgraph * graph);
void forget_experts(Stream & stream);
// Computes such a step, whose layer is leased.
ggml_status compute_routed(Stream & stream, ggml_cgraph * graph, const Step & step, int32_t * status);
// Copies bytes [from, to) of a weight whose experts are fetched one by one.
int32_t read_experts(const Weight * weight, uint64_t from, uint64_t to, char * data);

// ---- flea-guess.cpp

// Guesses, from what the router behind `ids` saw, what the one behind `next_ids` will choose: stream.guess. False where it
// cannot or shall not.
bool guess_choice(Stream & stream, const ggml_tensor * ids, const ggml_tensor * next_ids);
// Compares the last guess with what was chosen, ascending.
void judge_guess(Stream & stream, const ggml_tensor * ids, const std::vector<int32_t> & chosen);

// ---- flea-rows.cpp

// The table that a node looks rows up in, if flea reads them; else NULL.
const Weight * table_of(const ggml_tensor * node);
// Takes the memory for the tables that a graph looks up in. Before the plan is made, which counts it.
int32_t prepare_rows(ggml_cgraph * graph, const std::vector<Step> & steps);
// Computes such a node.
ggml_status compute_rows(Stream & stream, ggml_cgraph * graph, const Step & step, int32_t * status);
// Copies bytes [from, to) of such a table.
int32_t read_table(const Weight * weight, uint64_t from, uint64_t to, char * data);

// ---- ggml-flea.cpp

ggml_backend_dev_t device(int place);
ggml_backend_dev_t cpu_device();
// The device that computes: a GPU or the CPU; NULL when it cannot be had.
ggml_backend_dev_t inner_device(int place);
const char * name_of(int place);  // FLEA; FLEA0, FLEA1, ... where there are several

// ---- flea-stats.cpp

struct Counters {
    std::atomic<uint64_t> loader_bytes { 0 };
    std::atomic<uint64_t> placed_tensors { 0 };
    std::atomic<uint64_t> placed_bytes { 0 };
    std::atomic<uint64_t> graphs { 0 };
    std::atomic<uint64_t> pieces { 0 };
    std::atomic<uint64_t> early_pieces { 0 };  // computed before their layer was whole
    std::atomic<uint64_t> expert_cuts { 0 };   // graphs cut to see what a router chose
    std::atomic<uint64_t> expert_groups { 0 };  // parts of operations whose experts did not fit into the cache together
    std::atomic<uint64_t> expert_guesses { 0 };  // experts guessed for the next layer
    std::atomic<uint64_t> expert_guesses_right { 0 };
    std::atomic<uint64_t> releases_behind_gpu { 0 };  // leases given back behind an event
    std::atomic<uint64_t> row_cuts { 0 };  // graphs cut to see which rows are looked up
    std::atomic<uint64_t> peak_memory_bytes { 0 };
};

extern Counters counters;

void sample_memory();              // updates the peak
void stats_snapshot(Model * model);  // remembers a model's counters; called before it is closed
void stats_current();              // the same for the current model, if there is one
void stats_start();                // registers the writer for the end of the process

}  // namespace ggml_flea
