// The device's memory.
//
// llama.cpp allocates one ggml buffer for all weights of a buffer type, and others for KV cache and compute. All of them are
// anonymous memory that is only reserved (MAP_NORESERVE) until it is touched. init_tensor then moves streamed weights out of
// it: their data pointer is their place in flea's window, so the space reserved for them is never touched. Reading such
// a weight needs a lease; writing it is a no-op, because the host's loader brings bytes that flea reads by itself.
//
// Two buffer types: FLEA, which is not host memory (so the loader stages what it reads and hands it over in pieces
// instead of writing into windows that are not writable), and FLEA_Host, plain memory whose reserved part we know.
//
// With weights in the memory of a GPU a buffer of FLEA for anything but weights is one of ggml-cuda itself. Only the one for
// streamed weights is ours: it reserves addresses and no memory, and from the first computation on its type is ggml-cuda's,
// whose checks it then passes like any other.

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <set>

#include <sys/mman.h>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {

uint64_t pending_bytes = 0;

namespace {

constexpr size_t alignment_bytes = 64;
constexpr size_t page_bytes = 4096;
// From here on the kernel is asked for 2 MiB pages; below, they would mostly be padding.
constexpr size_t huge_from_bytes = 8u << 20;
// A context made after the plan may add this much; more would break the budget.
constexpr uint64_t slack_bytes = 32ull << 20;

struct Memory {
    char * base = nullptr;
    size_t size_bytes = 0;
    uint64_t placed_bytes = 0;   // reserved for weights that stand in a window: never touched
    Model * model = nullptr;     // whose weights are placed here
    ggml_backend_buffer_t buffer = nullptr;
    int place = -1;              // of its device; -1: memory of the host
    // On a GPU: buffers of ggml-cuda. The first knows the way to its memory; the others hold tensors that are not streamed.
    std::vector<ggml_backend_buffer_t> beside;
    bool has_kv = false;         // keys and values whose place is elsewhere
};

struct Live {
    std::mutex mutex;
    std::set<Memory *> all;
    uint64_t planned_bytes = 0;  // reserved when the plan was made; 0 before
    int computing = 0;           // graphs on a GPU
};

Live & live() {
    static Live * instance = new Live;
    return *instance;
}

uint64_t resident_bytes(const Memory & memory) {
    constexpr size_t step_bytes = 256u << 20;
    std::vector<unsigned char> pages(step_bytes / page_bytes);
    uint64_t resident = 0;
    for (size_t start = 0; start < memory.size_bytes; start += step_bytes) {
        const size_t bytes = std::min(step_bytes, memory.size_bytes - start);
        if (mincore(memory.base + start, bytes, pages.data()) != 0) { continue; }
        for (size_t page = 0; page < bytes / page_bytes; ++page) { resident += (pages[page] & 1) ? page_bytes : 0; }
    }
    return resident;
}

uint64_t reserved_locked() {
    uint64_t total = 0;
    for (const Memory * memory : live().all) { total += memory->size_bytes - memory->placed_bytes; }
    return total;
}

// Everything reserved when the plan was made is in its host_bytes. More than that has no place in the budget.
bool fits_after_plan(size_t bytes) {
    std::lock_guard<std::mutex> guard(live().mutex);
    const uint64_t planned = live().planned_bytes;
    if (planned == 0 || is_configured()) { return true; }  // a host that gave the model answers for its own memory
    const uint64_t wanted = reserved_locked() + bytes;
    if (wanted <= planned + slack_bytes) { return true; }
    const std::string numbers = std::to_string(bytes >> 20) + " MiB more are asked for, " + std::to_string((wanted - planned) >> 20) +
                                " MiB beyond what was reserved when the plan was made";
    if (environment().memory.empty()) {
        log_line(LogLevel::warn, "%s; no FLEA_MEMORY is set, so they are given, beyond the automatic budget", numbers.c_str());
        return true;
    }
    fail(FLEA_E_REFUSED, numbers + ": refused, FLEA_MEMORY=" + environment().memory +
                             " is for everything. Create all contexts before the first decode, with the largest sizes first");
    return false;
}

Memory & memory_of(ggml_backend_buffer_t buffer) { return *static_cast<Memory *>(buffer->context); }

void free_buffer(ggml_backend_buffer_t buffer) {
    Memory * memory = &memory_of(buffer);
    {
        std::lock_guard<std::mutex> guard(live().mutex);
        live().all.erase(memory);
        if (memory->model) { live().planned_bytes = 0; }
    }
    munmap(memory->base, memory->size_bytes);
    for (const ggml_backend_buffer_t beside : memory->beside) { ggml_backend_buffer_free(beside); }
    if (memory->has_kv) { kv_remove(); }
    if (memory->model) { model_buffer_freed(memory->model); }
    delete memory;
}

void * get_base(ggml_backend_buffer_t buffer) { return memory_of(buffer).base; }

void place(Memory & memory, ggml_tensor * tensor, const Weight * weight) {
    tensor->data = weight->data;
    weight->placed = true;
    const bool first = memory.model == nullptr;
    {
        std::lock_guard<std::mutex> guard(live().mutex);
        memory.model = weight->model;
        memory.placed_bytes = std::min<uint64_t>(memory.size_bytes, memory.placed_bytes + GGML_PAD(weight->bytes, alignment_bytes));
    }
    if (first) { model_buffer_placed(weight->model); }
    counters.placed_tensors++;
    counters.placed_bytes += weight->bytes;
}

// Keys and values have their memory elsewhere: what is reserved for them here is never touched.
ggml_status place_kv(Memory & memory, ggml_tensor * tensor) {
    if (!kv_place(tensor)) { return GGML_STATUS_FAILED; }
    std::lock_guard<std::mutex> guard(live().mutex);
    memory.has_kv = true;
    memory.placed_bytes = std::min<uint64_t>(memory.size_bytes, memory.placed_bytes + GGML_PAD(ggml_nbytes(tensor), alignment_bytes));
    return GGML_STATUS_SUCCESS;
}

// A tensor that is not streamed, in memory of the GPU that ggml-cuda allocates.
ggml_status place_beside(Memory & memory, ggml_tensor * tensor) {
    const Gpu * on = gpu(memory.place);
    const bool writable = !loader_skips_streamed();  // else the loader would write there as if it were host memory
    ggml_backend_buffer_t beside = nullptr;
    if (on && writable) { beside = ggml_backend_buft_alloc_buffer(on->buft, ggml_backend_buft_get_alloc_size(on->buft, tensor)); }
    if (!beside) {
        fail(writable ? FLEA_E_NOMEM : FLEA_E_UNSUPPORTED, std::string("no memory of the GPU for tensor '") + tensor->name + "', which is not streamed");
        return GGML_STATUS_FAILED;
    }
    memory.beside.push_back(beside);
    tensor->data = ggml_backend_buffer_get_base(beside);
    return ggml_backend_buffer_init_tensor(beside, tensor);
}

ggml_status place_unstreamed(Memory & memory, ggml_tensor * tensor) {
    return memory.beside.empty() ? GGML_STATUS_SUCCESS : place_beside(memory, tensor);
}

// llama.cpp has divided the layers over the devices in another way than flea over their GPUs.
ggml_status misplaced(const Memory & memory, const ggml_tensor * tensor, const Weight * weight) {
    std::string splits;
    for (const double split : weight->model->splits) { splits += (splits.empty() ? "" : ",") + std::to_string(split); }
    fail(FLEA_E_INVALID, std::string("tensor '") + tensor->name + "' is on the GPU of " + name_of(weight->place) + ", and was placed on " +
                             name_of(memory.place) + ": give llama.cpp all of flea's devices in their order (--device), all layers (-ngl 99), "
                             "and no split of its own, or -ts " + splits);
    return GGML_STATUS_FAILED;
}

// Called for weights, and for every compute tensor of every graph: names are looked at first.
ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    if (kv_wants(tensor)) { return place_kv(memory_of(buffer), tensor); }
    if (tensor->view_src) { return GGML_STATUS_SUCCESS; }
    if (tensor->op != GGML_OP_NONE || !is_weight_name(tensor->name)) { return place_unstreamed(memory_of(buffer), tensor); }
    const Weight * weight = nullptr;
    switch (find_weight(tensor, &weight)) {
        case Match::streamed:
            if (memory_of(buffer).model && memory_of(buffer).model != weight->model) { break; }
            if (memory_of(buffer).place != weight->place) { return misplaced(memory_of(buffer), tensor, weight); }
            place(memory_of(buffer), tensor, weight);
            return GGML_STATUS_SUCCESS;
        case Match::kept:
        case Match::other:
            return place_unstreamed(memory_of(buffer), tensor);  // the host asked for it here (-ot): ordinary memory
        case Match::refused:
            return GGML_STATUS_FAILED;
        case Match::unknown:
            if (!is_model_weight_name(tensor->name)) { return place_unstreamed(memory_of(buffer), tensor); }
            break;
    }
    fail(FLEA_E_NOTFOUND, std::string("tensor '") + tensor->name + "' (" + std::to_string(ggml_nbytes(tensor)) +
                              " bytes) is in no model file that this process has open; name the file with FLEA_MODEL");
    return GGML_STATUS_FAILED;
}

// The buffer of ggml-cuda that knows the way to what a buffer of ours holds; NULL where that is host memory.
ggml_backend_buffer_t cuda_of(ggml_backend_buffer_t buffer) {
    const Memory & memory = memory_of(buffer);
    return memory.beside.empty() ? nullptr : memory.beside[0];
}

// Does `access` on the bytes of a streamed cache under a lease. ggml has no way to report a failure: it has been logged, and the
// next computation with the layer fails with it.
template <typename Access> void with_kv(const KvTensor * kv, const ggml_tensor * tensor, size_t offset, size_t size, bool writes, Access access) {
    KvLease lease;
    int32_t status = lease.take((int32_t) kv->layer);
    if (status == FLEA_OK) {
        access((char *) tensor->data + offset);
        const uint64_t at = (uint64_t) ((const char *) tensor->data - (const char *) kv->data) + offset;
        if (writes) { status = lease.wrote(kv, at, size); }
    }
    if (status != FLEA_OK) { fail(status, std::string("keys and values: tensor '") + tensor->name + "'"); }
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    if (const KvTensor * kv = kv_of(tensor)) {
        with_kv(kv, tensor, offset, size, true, [&](char * at) { memset(at, value, size); });
    } else if (weight_of(tensor)) {
        return;
    } else if (const ggml_backend_buffer_t cuda = cuda_of(buffer)) {
        cuda->iface.memset_tensor(cuda, tensor, value, offset, size);
    } else {
        memset((char *) tensor->data + offset, value, size);
    }
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (const KvTensor * kv = kv_of(tensor)) {
        with_kv(kv, tensor, offset, size, true, [&](char * at) { memcpy(at, data, size); });
    } else if (const Weight * weight = weight_of(tensor)) {
        loader_read(weight, size);
    } else if (const ggml_backend_buffer_t cuda = cuda_of(buffer)) {
        cuda->iface.set_tensor(cuda, tensor, data, offset, size);
    } else {
        memcpy((char *) tensor->data + offset, data, size);
    }
}

// Copies leased bytes of a weight out.
void copy_out(ggml_backend_buffer_t buffer, char * to, const char * from, size_t size) {
    const ggml_backend_buffer_t cuda = cuda_of(buffer);
    if (!cuda) {
        memcpy(to, from, size);
        return;
    }
    ggml_tensor bytes = {};
    bytes.data = const_cast<char *>(from);
    cuda->iface.get_tensor(cuda, &bytes, to, 0, size);
}

// A weight is copied layer by layer: a cut head need not fit into memory as a whole.
void get_weight(ggml_backend_buffer_t buffer, const Weight * weight, const ggml_tensor * tensor, char * data, size_t offset, size_t size) {
    const size_t view_offset = (size_t) ((const char *) tensor->data - (const char *) weight->data);
    if (weight->experts) {
        const int32_t status = read_experts(weight, view_offset + offset, view_offset + offset + size, data);
        if (status != FLEA_OK) {
            fail_flea(status, std::string("reading tensor '") + tensor->name + "'");
            memset(data, 0, size);  // as below
        }
        return;
    }
    if (weight->layer < 0) {
        const int32_t status = read_table(weight, view_offset + offset, view_offset + offset + size, data);
        if (status != FLEA_OK) {
            fail_flea(status, std::string("reading tensor '") + tensor->name + "'");
            memset(data, 0, size);  // as below
        }
        return;
    }
    const uint64_t row_bytes = weight->is_cut() ? ggml_row_size(tensor->type, (tensor->view_src ? tensor->view_src : tensor)->ne[0]) : 0;
    for (int32_t layer = weight->layer; layer <= weight->layer_last; ++layer) {
        const uint64_t piece_bytes = weight->is_cut() ? weight->rows_per_layer * row_bytes : weight->bytes;
        const uint64_t start = piece_bytes * (uint64_t) (layer - weight->layer);
        const uint64_t end = layer == weight->layer_last ? weight->bytes : start + piece_bytes;
        const uint64_t from = std::max<uint64_t>(start, view_offset + offset);
        const uint64_t to = std::min<uint64_t>(end, view_offset + offset + size);
        if (from >= to) { continue; }
        Lease lease;
        const int32_t status = lease.take(weight->model, (uint32_t) layer, nullptr);
        if (status != FLEA_OK) {
            fail_flea(status, std::string("reading tensor '") + tensor->name + "'");
            memset(data, 0, size);  // ggml has no way to report it; zeros are at least no other tensor's bytes
            return;
        }
        copy_out(buffer, data + (from - view_offset - offset), (const char *) weight->data + from, to - from);
    }
}

void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    if (const KvTensor * kv = kv_of(tensor)) {
        memset(data, 0, size);  // what stays where the lease is refused
        with_kv(kv, tensor, offset, size, false, [&](const char * at) { memcpy(data, at, size); });
    } else if (const Weight * weight = weight_of(tensor)) {
        get_weight(buffer, weight, tensor, (char *) data, offset, size);
    } else if (const ggml_backend_buffer_t cuda = cuda_of(buffer)) {
        cuda->iface.get_tensor(cuda, tensor, data, offset, size);
    } else {
        memcpy(data, (const char *) tensor->data + offset, size);
    }
}

bool cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    if (cuda_of(buffer)) { return false; }  // ggml then gets and sets
    const ggml_backend_buffer_t from = src->view_src ? src->view_src->buffer : src->buffer;
    if (weight_of(src) || weight_of(dst) || kv_of(src) || kv_of(dst)) { return false; }
    if (place_of(from->buft) < 0 && !ggml_backend_buffer_is_host(from)) { return false; }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

// Fresh pages are zero already, and pages given back are fresh again: clearing never makes memory.
void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    Memory & memory = memory_of(buffer);
    if (memory.has_kv) { kv_clear(); }
    if (value == 0) {
        madvise(memory.base, memory.size_bytes, MADV_DONTNEED);
    } else if (!memory.model) {
        memset(memory.base, value, memory.size_bytes);
    }
}

ggml_backend_buffer_i buffer_interface() {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = free_buffer;
    iface.get_base      = get_base;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor    = set_tensor;
    iface.get_tensor    = get_tensor;
    iface.cpy_tensor    = cpy_tensor;
    iface.clear         = clear;
    return iface;
}

// What ggml asked the sizes of on this thread since a buffer was made: it does so right before it makes one for tensors
// that are known, and it does not say which they are.
struct Asked {
    size_t bytes;
    bool is_streamed;
};
thread_local std::vector<Asked> asked;

void note(const ggml_tensor * tensor, size_t bytes) {
    if (tensor->op != GGML_OP_NONE || tensor->view_src) {  // a graph is laid out
        asked.clear();
        return;
    }
    bool serves = false;
    const Match match = is_weight_name(tensor->name) ? try_weight(tensor, tensor, 0, &serves) : Match::other;
    // What is refused has to come to init_tensor, which makes the load fail, and not whole into the GPU's memory.
    asked.push_back({ bytes, match == Match::streamed || match == Match::refused });
}

// True when a buffer of that size is for tensors of which some are streamed: the last ones that fill it.
bool is_for_weights(size_t size) {
    size_t sum = 0;
    bool has_streamed = false;
    for (size_t i = asked.size(); i-- > 0 && sum < size;) {
        sum += asked[i].bytes;
        has_streamed = has_streamed || asked[i].is_streamed;
    }
    asked.clear();
    return has_streamed && sum == size;
}

size_t alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * tensor) {
    const Gpu * on = gpu(place_of(buft));
    if (!on) { return ggml_nbytes(tensor); }
    const size_t bytes = ggml_backend_buft_get_alloc_size(on->buft, tensor);
    note(tensor, GGML_PAD(bytes, ggml_backend_buft_get_alignment(on->buft)));
    return bytes;
}

size_t alignment(ggml_backend_buffer_type_t buft) {
    const Gpu * on = gpu(place_of(buft));
    return on ? ggml_backend_buft_get_alignment(on->buft) : alignment_bytes;
}

// Memory of the GPU for keys, values and computing.
ggml_backend_buffer_t alloc_on(const Gpu & on, size_t size) {
    const ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(on.buft, size);
    if (!buffer) {
        fail(FLEA_E_NOMEM, std::to_string((size >> 20) + 1) + " MiB of the GPU's memory for keys, values and computing cannot be had beside the "
                           "weights: give weights less of it (--vram, FLEA_VRAM), or take a smaller context or batch");
    }
    return buffer;
}

// A buffer of ours, which may have nothing but addresses.
ggml_backend_buffer_t alloc_own(ggml_backend_buffer_type_t buft, size_t size, const Gpu * on) {
    const size_t bytes = std::max(page_bytes, (size_t) GGML_PAD(size, page_bytes));
    void * base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        fail(FLEA_E_NOMEM, "cannot reserve " + std::to_string(bytes) + " bytes of address space: " + strerror(errno) +
                               "; with vm.overcommit_memory=2 or a low 'ulimit -v' a model larger than memory cannot be loaded");
        return nullptr;
    }
    if (bytes >= huge_from_bytes) { madvise(base, bytes, MADV_HUGEPAGE); }
    auto memory = std::make_unique<Memory>();
    memory->base = static_cast<char *>(base);
    memory->size_bytes = bytes;
    if (on) {
        memory->placed_bytes = bytes;  // whatever stands here has its memory elsewhere
        memory->beside.push_back(alloc_on(*on, page_bytes));
        if (!memory->beside[0]) {
            munmap(base, bytes);
            return nullptr;
        }
    }
    ggml_backend_buffer_i iface = buffer_interface();
    memory->place = place_of(buft);
    if (memory->place >= 0) { iface.init_tensor = init_tensor; }
    memory->buffer = ggml_backend_buffer_init(buft, iface, memory.get(), size);
    std::lock_guard<std::mutex> guard(live().mutex);
    return (*live().all.insert(memory.release()).first)->buffer;
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const bool is_device = place_of(buft) >= 0;
    const Gpu * on = is_device ? gpu(place_of(buft)) : nullptr;
    if (is_device && !on && wants_gpu()) { return nullptr; }
    if (on && !is_for_weights(size)) { return alloc_on(*on, size); }
    // The buffer for weights is made before any plan, so what comes after one is real memory.
    if (!on && !fits_after_plan(std::max(page_bytes, (size_t) GGML_PAD(size, page_bytes)))) { return nullptr; }
    return alloc_own(buft, size, on);
}

const char * name_flea(ggml_backend_buffer_type_t buft) { return name_of(place_of(buft)); }
const char * name_host(ggml_backend_buffer_type_t) { return "FLEA_Host"; }
bool is_host_flea(ggml_backend_buffer_type_t) { return loader_skips_streamed(); }
bool is_host_always(ggml_backend_buffer_type_t) { return true; }

size_t alignment_host(ggml_backend_buffer_type_t) { return alignment_bytes; }

ggml_backend_buffer_type make_type(int place, const char * (*name)(ggml_backend_buffer_type_t), bool (*is_host)(ggml_backend_buffer_type_t)) {
    ggml_backend_buffer_type type = {};
    type.iface.get_name      = name;
    type.iface.alloc_buffer  = alloc_buffer;
    type.iface.get_alignment = alignment_host;
    type.iface.is_host       = is_host;
    type.device              = device(place);
    return type;
}

}  // namespace

ggml_backend_buffer_type_t buffer_type(int place) {
    static const auto types = [] {
        std::array<ggml_backend_buffer_type, gpus_max> made;
        for (int i = 0; i < gpus_max; ++i) {
            made[(size_t) i] = make_type(i, name_flea, is_host_flea);
            made[(size_t) i].iface.get_alignment  = alignment;
            made[(size_t) i].iface.get_alloc_size = alloc_size;
        }
        return made;
    }();
    return const_cast<ggml_backend_buffer_type_t>(&types[(size_t) place]);
}

int place_of(ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == name_flea ? (int) (intptr_t) buft->device->context : -1;
}

ggml_backend_buffer_type_t host_buffer_type() {
    static ggml_backend_buffer_type type = make_type(0, name_host, is_host_always);
    return &type;
}

// By address, because tensor->extra is not ours to use: to the CPU backend an extra means a repacked layout, and it then takes
// other kernels (with other roundings) than for a plain weight.
const Weight * weight_of(const ggml_tensor * tensor) {
    const ggml_tensor * root = tensor->view_src ? tensor->view_src : tensor;
    // Not by its type, which is ggml-cuda's while a GPU computes.
    if (!root->buffer || root->buffer->iface.free_buffer != free_buffer) { return nullptr; }
    const Memory & memory = memory_of(root->buffer);
    const char * data = static_cast<const char *>(root->data);
    if (!memory.model || (data >= memory.base && data < memory.base + memory.size_bytes)) { return nullptr; }
    const auto entry = memory.model->by_address.find(data);
    return entry == memory.model->by_address.end() ? nullptr : entry->second;
}

// Only while something is computed: a scheduler that met ggml-cuda's type here would let a CUDA device of its own compute with
// these weights, without any lease.
WeightsOnGpu::WeightsOnGpu() : on_(gpu() != nullptr) {
    if (!on_) { return; }
    std::lock_guard<std::mutex> guard(live().mutex);
    live().computing++;
    for (const Memory * memory : live().all) {
        if (!memory->beside.empty()) { memory->buffer->buft = memory->beside[0]->buft; }
    }
}

WeightsOnGpu::~WeightsOnGpu() {
    if (!on_) { return; }
    std::lock_guard<std::mutex> guard(live().mutex);
    if (--live().computing > 0) { return; }
    for (const Memory * memory : live().all) {
        if (!memory->beside.empty()) { memory->buffer->buft = buffer_type(memory->place); }
    }
}

uint64_t reserved_bytes() {
    std::lock_guard<std::mutex> guard(live().mutex);
    return reserved_locked();
}

uint64_t reserved_untouched_bytes() {
    std::lock_guard<std::mutex> guard(live().mutex);
    uint64_t total = 0;
    for (const Memory * memory : live().all) {
        const uint64_t reserved = memory->size_bytes - memory->placed_bytes;
        // Beside placed weights there is only rounding: not worth asking the kernel about terabytes of reserved space.
        const uint64_t resident = memory->placed_bytes > 0 ? 0 : resident_bytes(*memory);
        total += reserved > resident ? reserved - resident : 0;
    }
    live().planned_bytes = reserved_locked();
    return total;
}

}  // namespace ggml_flea

const uint64_t * ggml_backend_flea_pending_bytes(void) { return &ggml_flea::pending_bytes; }
