// The ggml device FLEA: registration, device, backend.
//
// One device, or one for each of several GPUs, of type GPU (ACCEL would make llama.cpp switch flash attention off) with one buffer type for weights, KV cache
// and compute. It computes with the CPU or CUDA backend the host has already; what it adds is that weights are where they are
// needed when they are needed. The same source is a plugin (libggml-flea.so through GGML_BACKEND_PATH) and part of `flea`.

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

constexpr uint64_t fit_margin_bytes = 1ull << 30;  // what llama.cpp's "fit" wants to stay free on a device

template <typename Function> Function cpu_function(const char * name) {
    return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

using threadpool_new_t  = ggml_threadpool_t (*)(ggml_threadpool_params *);
using threadpool_free_t = void (*)(ggml_threadpool_t);
using set_threadpool_t  = void (*)(ggml_backend_t, ggml_threadpool_t);

Stream & stream_of(ggml_backend_t backend) { return *static_cast<Stream *>(backend->context); }

void free_threadpool(Stream & stream) {
    const auto set_threadpool = cpu_function<set_threadpool_t>("ggml_backend_cpu_set_threadpool");
    const auto threadpool_free = cpu_function<threadpool_free_t>("ggml_threadpool_free");
    if (!stream.threadpool) { return; }
    set_threadpool(stream.inner, nullptr);
    threadpool_free(stream.threadpool);
    stream.threadpool = nullptr;
}

// Threads that stay: without a pool of its own the CPU backend of a build without OpenMP would start its threads anew for
// each piece.
void set_n_threads(ggml_backend_t backend, int n_threads) {
    Stream & stream = stream_of(backend);
    if (stream.threads_count == n_threads) { return; }
    stream.threads_count = n_threads;
    if (gpu()) { return; }
    const auto set = cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads");
    const auto set_threadpool = cpu_function<set_threadpool_t>("ggml_backend_cpu_set_threadpool");
    const auto threadpool_new = cpu_function<threadpool_new_t>("ggml_threadpool_new");
    if (set) { set(stream.inner, n_threads); }
    if (!set_threadpool || !threadpool_new || !cpu_function<threadpool_free_t>("ggml_threadpool_free")) { return; }
    free_threadpool(stream);
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    stream.threadpool = threadpool_new(&params);
    if (stream.threadpool) { set_threadpool(stream.inner, stream.threadpool); }
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    Stream & stream = stream_of(backend);
    stream.abort_callback = callback;
    stream.abort_data = data;
    if (gpu()) { return; }  // asked between two pieces
    const auto set = cpu_function<ggml_backend_set_abort_callback_t>("ggml_backend_set_abort_callback");
    if (set) { set(stream.inner, callback, data); }
}

// ---- backend

int place_of(ggml_backend_dev_t dev) { return (int) (intptr_t) dev->context; }

const char * backend_name(ggml_backend_t backend) { return name_of(place_of(backend->device)); }

void backend_free(ggml_backend_t backend) {
    delete &stream_of(backend);
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) { return graph_compute(stream_of(backend), graph); }

// ggml-cuda keeps apart, before memory is laid out, what it will compute as one.
void backend_optimize(ggml_backend_t backend, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    const ggml_backend_t inner = stream_of(backend).inner;
    if (inner->iface.graph_optimize) { inner->iface.graph_optimize(inner, graph, params); }
}

// Everything the device does is finished when the call returns, so an event has always happened.
void event_record(ggml_backend_t, ggml_backend_event_t) {}
void event_wait(ggml_backend_t, ggml_backend_event_t) {}

ggml_guid_t backend_guid() {
    static ggml_guid guid = { 0x66, 0x6c, 0x65, 0x61, 0x9c, 0x1b, 0x4f, 0x0e, 0x8a, 0x75, 0x31, 0xd2, 0x5c, 0x40, 0xe6, 0x17 };
    return &guid;
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    auto stream = std::make_unique<Stream>(place_of(dev));
    if (!stream->inner) {
        if (!wants_gpu()) { fail(FLEA_E_UNSUPPORTED, "this program has no ggml CPU backend to compute with"); }
        return nullptr;
    }
    auto * backend = new ggml_backend {};
    backend->guid = backend_guid();
    backend->device = dev;
    backend->context = stream.release();
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = backend_compute;
    if (gpu()) { backend->iface.graph_optimize = backend_optimize; }
    backend->iface.event_record = event_record;
    backend->iface.event_wait = event_wait;
    return backend;
}

// ---- device

const char * device_name(ggml_backend_dev_t dev) { return name_of(place_of(dev)); }

const char * device_description(ggml_backend_dev_t) {
    static const std::string text = "weights streamed from NVMe, memory " +
        (environment().memory.empty() ? std::string("automatic") : environment().memory);
    return text.c_str();
}

// What is free on one of several GPUs. llama.cpp divides the layers in this proportion where it is not told otherwise, so it is the
// one in which flea has divided them; and no GPU has less than it takes, nor more for keys, values and computing than there is.
bool divided_memory(int place, size_t * free) {
    look_for_model();
    std::vector<double> splits;
    std::vector<uint64_t> bytes;
    if (!current_splits(splits, bytes) || place >= (int) splits.size()) { return false; }
    double weights = 0;
    double rest = std::numeric_limits<double>::max();
    for (size_t i = 0; i < splits.size(); ++i) {
        const ggml_backend_dev_t inner = inner_device((int) i);
        if (!inner) { return false; }
        size_t inner_free = 0;
        size_t inner_total = 0;
        ggml_backend_dev_memory(inner, &inner_free, &inner_total);
        weights = std::max(weights, ((double) bytes[i] + fit_margin_bytes) / splits[i]);
        rest = std::min(rest, (double) inner_free / splits[i]);
    }
    *free = (size_t) ((weights + rest) * splits[(size_t) place]);
    return true;
}

// llama.cpp's "fit" pass keeps all layers here only if the model fits into what is promised, plus its margin, plus KV and
// compute. The weights do fit, by streaming; KV and compute get what the budget leaves.
void device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    uint64_t model_bytes = 0;
    uint64_t smallest_bytes = 0;
    const ggml_backend_dev_t inner = inner_device(place_of(dev));
    if (places_count() > 1 && divided_memory(place_of(dev), free)) {
        *total = *free;
        return;
    }
    if (!inner || !current_sizes(&model_bytes, &smallest_bytes)) {
        ggml_backend_dev_memory(inner ? inner : cpu_device(), free, total);
        return;
    }
    if (gpu()) {
        // The pool is taken already: what is free is for keys, values and computing.
        ggml_backend_dev_memory(inner, free, total);
        *free = *total = model_bytes + fit_margin_bytes + *free;
        return;
    }
    *free = *total = model_bytes + fit_margin_bytes + offered_bytes(model_bytes, smallest_bytes);
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

// async, host_buffer and events make the loader read in pieces of 1 MiB that it hands over (set_tensor drops them); without
// them it allocates a copy of each tensor. No mmap support: AUTO then reads instead of populating a map of the whole file.
void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.async = true;
    props->caps.host_buffer = true;
    props->caps.buffer_from_host_ptr = false;
    props->caps.events = true;
    props->caps.mmap_support = false;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) { return buffer_type(place_of(dev)); }
ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t) { return host_buffer_type(); }

// Before a model is loaded its tensors are tried out in empty buffers: there only the name says whether the device will have
// the weight. What is not in the plan (globals, short tables of embeddings, second models) has to stay with the host.
bool supports_future_weight(const ggml_tensor * op, int src_index, const ggml_tensor * tensor) {
    if (!is_weight_name(tensor->name)) { return true; }  // KV cache of a dry run
    bool serves = false;
    switch (try_weight(tensor, op, src_index, &serves)) {
        case Match::streamed: return serves;
        case Match::refused:  return true;  // init_tensor then makes the load fail, instead of the host taking it all
        case Match::kept:
        case Match::other:
        case Match::unknown:  break;
    }
    return false;
}

bool supports_source(int place, const ggml_tensor * op, int src_index) {
    const ggml_tensor * src = op->src[src_index];
    const ggml_tensor * root = src->view_src ? src->view_src : src;
    if (!root->buffer) { return true; }
    const bool is_ours = ggml_flea::place_of(root->buffer->buft) == place;
    if (is_ours && root->buffer->size == 0) { return supports_future_weight(op, src_index, root); }
    if (const Weight * weight = weight_of(root)) { return weight->place == place && weight->serves(op, src_index); }
    // A GPU gets copies of what is in host memory from the scheduler.
    return is_ours || gpu() || ggml_backend_buffer_is_host(root->buffer);
}

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    const int place = place_of(dev);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (op->src[i] && !supports_source(place, op, i)) { return false; }
    }
    const ggml_backend_dev_t inner = inner_device(place);
    return inner && ggml_backend_dev_supports_op(inner, op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    if (const int owner = ggml_flea::place_of(buft); owner >= 0) { return owner == place_of(dev); }
    const Gpu * on = gpu(place_of(dev));
    return on ? ggml_backend_dev_supports_buft(on->device, buft) : ggml_backend_buft_is_host(buft);
}

ggml_backend_event_t event_new(ggml_backend_dev_t dev) { return new ggml_backend_event { dev, nullptr }; }
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) { delete event; }
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) {}

// ---- registration

const char * reg_name(ggml_backend_reg_t) { return "FLEA"; }
size_t reg_device_count(ggml_backend_reg_t) { return (size_t) places_count(); }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t index) { return device((int) index); }

void * reg_function(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) { return reinterpret_cast<void *>(set_n_threads); }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) { return reinterpret_cast<void *>(set_abort_callback); }
    return nullptr;
}

ggml_backend_device make_device(int place) {
    ggml_backend_device dev = {};
    dev.context = (void *) (intptr_t) place;
    dev.reg = ggml_backend_flea_reg();
    dev.iface.get_name = device_name;
    dev.iface.get_description = device_description;
    dev.iface.get_memory = device_memory;
    dev.iface.get_type = device_type;
    dev.iface.get_props = device_props;
    dev.iface.init_backend = device_init;
    dev.iface.get_buffer_type = device_buffer_type;
    dev.iface.get_host_buffer_type = device_host_buffer_type;
    dev.iface.supports_op = device_supports_op;
    dev.iface.supports_buft = device_supports_buft;
    dev.iface.event_new = event_new;
    dev.iface.event_free = event_free;
    dev.iface.event_synchronize = event_synchronize;
    return dev;
}

ggml_backend_reg make_reg() {
    ggml_backend_reg reg = {};
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = reg_name;
    reg.iface.get_device_count = reg_device_count;
    reg.iface.get_device = reg_device;
    reg.iface.get_proc_address = reg_function;
    return reg;
}

}  // namespace

const char * name_of(int place) {
    static const auto names = [] {
        std::array<std::string, gpus_max> made;
        for (size_t i = 0; i < made.size(); ++i) { made[i] = "FLEA" + std::to_string(i); }
        return made;
    }();
    return places_count() > 1 ? names[(size_t) place].c_str() : "FLEA";
}

ggml_backend_dev_t device(int place) {
    static auto devices = [] {
        std::array<ggml_backend_device, gpus_max> made;
        for (int i = 0; i < gpus_max; ++i) { made[(size_t) i] = make_device(i); }
        return made;
    }();
    return &devices[(size_t) place];
}

ggml_backend_dev_t cpu_device() {
    static const ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return dev;
}

ggml_backend_dev_t inner_device(int place) {
    if (!wants_gpu()) { return cpu_device(); }
    const Gpu * on = gpu(place);
    return on ? on->device : nullptr;
}

Stream::Stream(int place) : place(place), guesses_experts(ggml_flea::guesses_experts()) {
    const ggml_backend_dev_t dev = inner_device(place);
    inner = dev ? ggml_backend_dev_init(dev, nullptr) : nullptr;
    // None in a build without copies between GPUs: leases then wait for the GPU.
    if (inner && gpu()) { event = ggml_backend_event_new(dev); }
}

Stream::~Stream() {
    if (!inner) { return; }
    if (event) { ggml_backend_event_free(event); }
    if (threadpool) { free_threadpool(*this); }
    ggml_backend_free(inner);
}

}  // namespace ggml_flea

int32_t ggml_backend_flea_split(float * shares, size_t count) {
    std::vector<double> splits;
    std::vector<uint64_t> bytes;
    const bool divided = ggml_flea::current_splits(splits, bytes);
    if (!shares || count < (divided ? splits.size() : 1)) { return FLEA_E_INVALID; }
    std::fill(shares, shares + count, 0.0f);
    if (!divided) { splits = { 1 }; }
    std::copy(splits.begin(), splits.end(), shares);
    return (int32_t) splits.size();
}

ggml_backend_reg_t ggml_backend_flea_reg(void) {
    static ggml_backend_reg reg = ggml_flea::make_reg();
    ggml_flea::stats_start();
    return &reg;
}

#if defined(GGML_FLEA_SHARED)
// The plugin's entry. ggml checks its own API version; but device and graph structs move between releases without it, so
// the device runs with the very version it was built from, or not at all.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    const char * host = ggml_version();
    if (strcmp(host, GGML_FLEA_BUILT_FOR) != 0) {
        ggml_flea::fail(FLEA_E_UNSUPPORTED, std::string("this device was built for ggml " GGML_FLEA_BUILT_FOR ", the program has ggml ") + host +
                                                "; build it with: make ggml-flea LLAMA_CPP=<source of that program's llama.cpp>");
        return nullptr;
    }
    if (!ggml_flea::environment().error.empty()) {
        ggml_flea::fail(FLEA_E_INVALID, ggml_flea::environment().error);
        return nullptr;
    }
    return ggml_backend_flea_reg();
}
#endif
