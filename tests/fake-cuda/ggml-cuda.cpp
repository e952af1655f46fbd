// A libggml-cuda.so for machines without a GPU: devices CUDA0, CUDA1, ... whose memory is the fake libcuda's and whose kernels
// are ggml-cpu's.
//
// It is as strict as ggml-cuda built for debugging: every tensor of a graph has to be in a buffer of the device's own type, 128-byte
// aligned where it is a weight, with zeros behind quantised rows that are no multiple of 512; else it aborts. And as late: a graph is
// computed in the order of its stream, some time after graph_compute has returned, so that a weight whose place is written
// again too early gives another answer. Linked with a copy of ggml of its own, as the real one comes with its libggml-base.so.

#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

namespace {

constexpr size_t alignment_bytes = 128;
constexpr int64_t row_elements = 512;
constexpr size_t page_bytes = 2u << 20;

// ---- the driver

struct Location { int type; int id; };
struct AllocationProp { int type; int handle_types; Location location; void * win32; unsigned char flags[8]; };
struct AccessDesc { Location location; int flags; };

template <typename... Arguments> void call(const char * name, Arguments... arguments) {
    // The name under which flea's bindings have loaded it: there is one GPU in the process.
    static void * library = dlopen("libcuda.so", RTLD_NOW);
    GGML_ASSERT(library && "libcuda.so");
    const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(library, name));
    GGML_ASSERT(function);
    const int status = function(arguments...);
    if (status != 0) { GGML_ABORT("%s: %d", name, status); }
}

void enter(int device) {
    void * context = nullptr;
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxSetCurrent", context);
}

int device_of(ggml_backend_dev_t dev) { return (int) (intptr_t) dev->context; }

// ---- memory

struct Memory {
    int device;
    unsigned long long base = 0;
    unsigned long long handle = 0;
    size_t bytes = 0;
};

Memory & memory_of(ggml_backend_buffer_t buffer) { return *static_cast<Memory *>(buffer->context); }

void buffer_free(ggml_backend_buffer_t buffer) {
    Memory * memory = &memory_of(buffer);
    enter(memory->device);
    call("cuMemUnmap", memory->base, memory->bytes);
    call("cuMemAddressFree", memory->base, memory->bytes);
    call("cuMemRelease", memory->handle);
    delete memory;
}

void * buffer_base(ggml_backend_buffer_t buffer) { return reinterpret_cast<void *>(memory_of(buffer).base); }

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    if (tensor->view_src) {
        GGML_ASSERT(tensor->view_src->buffer->buft == buffer->buft);
        return GGML_STATUS_SUCCESS;
    }
    const size_t bytes = ggml_nbytes(tensor);
    const size_t padded = ggml_backend_buft_get_alloc_size(buffer->buft, tensor);
    if (padded > bytes && buffer->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE) { memset((char *) tensor->data + bytes, 0, padded - bytes); }
    return GGML_STATUS_SUCCESS;
}

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *) tensor->data + offset, value, size);
}
void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}
void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}
void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer_base(buffer), value, buffer->size); }

const char * type_name(ggml_backend_buffer_type_t buft) { return static_cast<const char *>(buft->context); }

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    auto * memory = new Memory { device_of(buft->device) };
    memory->bytes = (size + page_bytes - 1) / page_bytes * page_bytes;
    enter(memory->device);
    size_t free_bytes = 0, total_bytes = 0;
    call("cuMemGetInfo_v2", &free_bytes, &total_bytes);
    if (free_bytes < memory->bytes) {
        delete memory;
        return nullptr;
    }
    const Location location = { 1, memory->device };
    const AllocationProp properties = { 1, 0, location, nullptr, {} };
    const AccessDesc access = { location, 3 };
    call("cuMemCreate", &memory->handle, memory->bytes, &properties, 0ull);
    call("cuMemAddressReserve", &memory->base, memory->bytes, (size_t) 0, 0ull, 0ull);
    call("cuMemMap", memory->base, memory->bytes, (size_t) 0, memory->handle, 0ull);
    call("cuMemSetAccess", memory->base, memory->bytes, &access, (size_t) 1);
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = buffer_free;
    iface.get_base = buffer_base;
    iface.init_tensor = buffer_init_tensor;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor = buffer_set;
    iface.get_tensor = buffer_get;
    iface.clear = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, memory, size);
}

size_t type_alignment(ggml_backend_buffer_type_t) { return alignment_bytes; }

// As ggml-cuda computes it.
size_t type_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const int64_t over = tensor->ne[0] % row_elements;
    const bool padded = ggml_is_quantized(tensor->type) && over != 0;
    return ggml_nbytes(tensor) + (padded ? ggml_row_size(tensor->type, row_elements - over) : 0);
}

ggml_backend_buffer_type_t type_of(ggml_backend_dev_t dev);

// ---- computing

struct Backend {
    int device;
    ggml_backend_t cpu;
    void * stream = nullptr;
    void * event = nullptr;
};

// A graph on its way: nodes and tensors that the caller had on its stack are copied.
struct Work {
    Backend * backend;
    ggml_cgraph graph;
    std::vector<ggml_tensor *> nodes;
    std::vector<ggml_tensor *> copies;
    std::vector<std::pair<const ggml_tensor *, size_t>> zeros;  // behind which so many bytes have to be 0

    ggml_tensor * kept(ggml_tensor * tensor) {
        if (!tensor || ggml_hash_contains(&graph.visited_hash_set, tensor)) { return tensor; }
        copies.push_back(new ggml_tensor(*tensor));
        return copies.back();
    }
    ~Work() {
        for (ggml_tensor * copy : copies) { delete copy; }
    }
};

bool is_noop(const ggml_tensor * node) {
    return ggml_is_empty(node) || node->op == GGML_OP_NONE || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_VIEW ||
           node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
}

void check(const ggml_tensor * tensor, ggml_backend_dev_t dev) {
    if (!tensor->buffer || tensor->buffer->buft != type_of(dev)) { GGML_ABORT("tensor '%s' is in no buffer of this device", tensor->name); }
}

void check_weight(const ggml_tensor * tensor, ggml_backend_dev_t dev, Work & work) {
    if (tensor->buffer->usage != GGML_BACKEND_BUFFER_USAGE_WEIGHTS || tensor->view_src) { return; }
    const bool whole = ggml_hash_contains(&work.graph.visited_hash_set, const_cast<ggml_tensor *>(tensor));
    if (whole && (uintptr_t) tensor->data % alignment_bytes != 0) { GGML_ABORT("weight '%s' is not aligned", tensor->name); }
    const size_t padding = type_alloc_size(type_of(dev), tensor) - ggml_nbytes(tensor);
    if (padding > 0) { work.zeros.push_back({ tensor, padding }); }
}

void compute(void * argument) {
    Work * work = static_cast<Work *>(argument);
    for (const auto & [tensor, bytes] : work->zeros) {
        const char * behind = (const char *) tensor->data + ggml_nbytes(tensor);
        for (size_t i = 0; i < bytes; ++i) {
            if (behind[i] != 0) { GGML_ABORT("no zeros behind '%s'", tensor->name); }
        }
    }
    const ggml_status status = ggml_backend_graph_compute(work->backend->cpu, &work->graph);
    if (status != GGML_STATUS_SUCCESS) { GGML_ABORT("ggml-cpu: %d", status); }
    delete work;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & self = *static_cast<Backend *>(backend->context);
    auto * work = new Work { &self, *graph, {}, {}, {} };
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (!is_noop(node) && (node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            check(node, backend->device);
            for (ggml_tensor * src : node->src) {
                if (!src) { continue; }
                check(src, backend->device);
                check_weight(src, backend->device, *work);
            }
        }
        ggml_tensor * own = work->kept(node);
        if (own != node) {
            for (ggml_tensor *& src : own->src) { src = work->kept(src); }
        }
        work->nodes.push_back(own);
    }
    work->graph.nodes = work->nodes.data();
    enter(self.device);
    call("cuLaunchHostFunc", self.stream, &compute, (void *) work);
    return GGML_STATUS_SUCCESS;
}

void backend_synchronize(ggml_backend_t backend) {
    const auto & self = *static_cast<Backend *>(backend->context);
    enter(self.device);
    call("cuEventRecord", self.event, self.stream);
    call("cuEventSynchronize", self.event);
}

void backend_free(ggml_backend_t backend) {
    backend_synchronize(backend);
    auto * self = static_cast<Backend *>(backend->context);
    call("cuEventDestroy_v2", self->event);
    call("cuStreamDestroy_v2", self->stream);
    ggml_backend_free(self->cpu);
    delete self;
    delete backend;
}

const char * backend_name(ggml_backend_t backend) { return type_name(type_of(backend->device)); }

void backend_record(ggml_backend_t backend, ggml_backend_event_t event) {
    const auto & self = *static_cast<Backend *>(backend->context);
    enter(self.device);
    call("cuEventRecord", event->context, self.stream);
}

ggml_guid_t guid() {
    static ggml_guid guid = { 0x2c, 0xdd, 0xe8, 0x1c, 0x65, 0xb3, 0x65, 0x73, 0x6a, 0x12, 0x88, 0x61, 0x1c, 0xc9, 0xdc, 0x25 };
    return &guid;
}

// ---- devices

const char * device_name(ggml_backend_dev_t dev) { return type_name(type_of(dev)); }
const char * device_description(ggml_backend_dev_t) { return "fake GPU"; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_memory(ggml_backend_dev_t dev, size_t * free_bytes, size_t * total_bytes) {
    enter(device_of(dev));
    call("cuMemGetInfo_v2", free_bytes, total_bytes);
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.async = true;
    props->caps.events = true;
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    auto * self = new Backend { device_of(dev), ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(self->cpu, 1);
    enter(self->device);
    call("cuStreamCreate", &self->stream, 1u);
    call("cuEventCreate", &self->event, 2u);
    auto * backend = new ggml_backend {};
    backend->guid = guid();
    backend->device = dev;
    backend->context = self;
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.synchronize = backend_synchronize;
    backend->iface.graph_compute = backend_compute;
    backend->iface.event_record = backend_record;
    return backend;
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    static const ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    return ggml_backend_dev_supports_op(cpu, op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == type_name && buft->device == dev;
}

ggml_backend_event_t event_new(ggml_backend_dev_t dev) {
    enter(device_of(dev));
    void * event = nullptr;
    call("cuEventCreate", &event, 2u);
    return new ggml_backend_event { dev, event };
}
void event_free(ggml_backend_dev_t dev, ggml_backend_event_t event) {
    enter(device_of(dev));
    call("cuEventDestroy_v2", event->context);
    delete event;
}
void event_synchronize(ggml_backend_dev_t dev, ggml_backend_event_t event) {
    enter(device_of(dev));
    call("cuEventSynchronize", event->context);
}

struct Device {
    std::string name;
    ggml_backend_device device = {};
    ggml_backend_buffer_type type = {};
};

std::vector<Device *> & devices() {
    static auto * all = new std::vector<Device *>;
    return *all;
}

ggml_backend_buffer_type_t type_of(ggml_backend_dev_t dev) { return &devices()[(size_t) device_of(dev)]->type; }

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) { return type_of(dev); }

const char * reg_name(ggml_backend_reg_t) { return "CUDA"; }
size_t reg_count(ggml_backend_reg_t) { return devices().size(); }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t index) { return &devices()[index]->device; }

Device * make_device(int index, ggml_backend_reg_t reg) {
    auto * made = new Device { "CUDA" + std::to_string(index) };
    ggml_backend_device_i & iface = made->device.iface;
    iface.get_name = device_name;
    iface.get_description = device_description;
    iface.get_memory = device_memory;
    iface.get_type = device_type;
    iface.get_props = device_props;
    iface.init_backend = device_init;
    iface.get_buffer_type = device_buffer_type;
    iface.supports_op = device_supports_op;
    iface.supports_buft = device_supports_buft;
    iface.event_new = event_new;
    iface.event_free = event_free;
    iface.event_synchronize = event_synchronize;
    made->device.reg = reg;
    made->device.context = (void *) (intptr_t) index;
    made->type.iface.get_name = type_name;
    made->type.iface.alloc_buffer = type_alloc;
    made->type.iface.get_alignment = type_alignment;
    made->type.iface.get_alloc_size = type_alloc_size;
    made->type.device = &made->device;
    made->type.context = const_cast<char *>(made->name.c_str());
    return made;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg reg = {};
    if (reg.api_version != 0) { return &reg; }
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = reg_name;
    reg.iface.get_device_count = reg_count;
    reg.iface.get_device = reg_device;
    int count = 0;
    call("cuInit", 0u);
    call("cuDeviceGetCount", &count);
    for (int index = 0; index < count; ++index) { devices().push_back(make_device(index, &reg)); }
    return &reg;
}
