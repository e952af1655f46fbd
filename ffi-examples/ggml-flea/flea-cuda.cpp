// The GPU that computes, where weights are in its memory: ggml-cuda as the program has it, unmodified.
//
// Two ways to it: the program has registered the device itself, as any llama.cpp with CUDA does; or the library is loaded
// here, from a file the user names (a program like `flea run` has no ggml-cuda of its own). A library that is loaded brings
// its own copy of ggml-base. That is sound between equal versions: what the two exchange are structures and pointers to functions,
// everything with a state of its own (registry, scheduler, graphs, CPU backend) is used from the program's copy alone, and
// memory is given back through the functions of whoever made it. So versions are compared before anything is called.
//
// CUDA graphs stay on. ggml-cuda keys a captured graph by the first node of what it is given, compares every node and the
// addresses of its sources before it launches one, and copies no weights into it. Each piece that is cut where the layer
// changes is a graph_compute of its own (ggml_graph_view leaves the uid 0, so nothing is taken for unchanged unseen), launched
// when the lease is held, and given back behind an event that is recorded after the launch. An address of flea stands for one
// weight as long as the model is open, so a graph that is launched anew reads the bytes that are leased. No graph ever
// holds two pieces, so none spans the refill of a slot.
//
// Several GPUs are several devices, FLEA0, FLEA1, ..., each with the ggml-cuda of its GPU inside. Between them ggml's scheduler copies what
// one computed and the other needs, as between any two devices.

#include <algorithm>
#include <cstring>
#include <iterator>

#include <dlfcn.h>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

struct State {
    std::mutex mutex;
    bool configured = false;  // the program gave a model: FLEA_VRAM and FLEA_GPU say nothing
    std::vector<uint32_t> wanted;  // the program's, in the order of their layers
    Gpu gpus[gpus_max];
    bool told = false;
};

State & state() {
    static State * instance = new State;  // never destroyed: asked until the process ends
    return *instance;
}

// Which GPUs; none where weights are in host memory.
const std::vector<uint32_t> & wanted(const State & s) {
    static const std::vector<uint32_t> none;
    return s.configured ? s.wanted : environment().vram.empty() ? none : environment().gpus;
}

// Messages of a library with a logger of its own: errors are heard, the rest is for who debugs.
void take_log(enum ggml_log_level level, const char * text, void *) {
    std::string line(text ? text : "");
    while (!line.empty() && line.back() == '\n') { line.pop_back(); }
    if (line.empty()) { return; }
    log_line(level == GGML_LOG_LEVEL_ERROR ? LogLevel::error : LogLevel::debug, "ggml-cuda: %s", line.c_str());
}

template <typename Function> Function symbol(void * library, const char * name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

// FLEA_OK, or why `file` is of no use; then `error` has a sentence.
int32_t load(const char * file, std::string & error) {
    void * library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char * text = dlerror();
        error = std::string(text ? text : file) + "; name the libggml-cuda.so of a llama.cpp that is built with CUDA";
        return FLEA_E_NOTFOUND;
    }
    const auto version = symbol<const char * (*)()>(library, "ggml_version");
    auto entry = symbol<ggml_backend_reg_t (*)()>(library, "ggml_backend_init");
    if (!entry) { entry = symbol<ggml_backend_reg_t (*)()>(library, "ggml_backend_cuda_reg"); }
    if (!version || !entry) {
        error = std::string(file) + " is no library of ggml-cuda: it has no " + (version ? "ggml_backend_init" : "ggml_version");
        return FLEA_E_INVALID;
    }
    if (strcmp(version(), ggml_version()) != 0) {
        error = std::string(file) + " is of ggml " + version() + ", this program has ggml " + ggml_version() +
                ": build llama.cpp with CUDA from sources of that version, or leave the weights in host memory";
        return FLEA_E_UNSUPPORTED;
    }
    const auto log_set = symbol<decltype(&ggml_log_set)>(library, "ggml_log_set");
    if (log_set && log_set != &ggml_log_set) { log_set(take_log, nullptr); }
    ggml_backend_reg_t registration = entry();
    if (!registration || registration->api_version != GGML_BACKEND_API_VERSION || ggml_backend_reg_dev_count(registration) == 0) {
        error = std::string(file) + " found no GPU: see `nvidia-smi`, or leave the weights in host memory";
        return FLEA_E_NOTFOUND;
    }
    // From here on the registry has it; a library with threads and devices of its own is never unloaded.
    ggml_backend_register(registration);
    return FLEA_OK;
}

std::string device_name(uint32_t index) { return "CUDA" + std::to_string(index); }

// The device in the registry, loaded if a file is named and nobody has brought one.
int32_t find(uint32_t index, const char * file, Gpu & gpu, std::string & error) {
    const std::string name = device_name(index);
    ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
    if (!device && file && *file) {
        const int32_t status = load(file, error);
        if (status != FLEA_OK) { return status; }
        device = ggml_backend_dev_by_name(name.c_str());
    }
    if (!device) {
        error = "ggml has no device " + name + " to compute on: run a llama.cpp that is built with CUDA (GGML_CUDA=ON), or name its "
                "libggml-cuda.so (--ggml-cuda, FLEA_GGML_CUDA), or leave the weights in host memory";
        return FLEA_E_NOTFOUND;
    }
    gpu = { device, ggml_backend_dev_buffer_type(device) };
    return FLEA_OK;
}

}  // namespace

void gpu_configure(const Model * model) {
    State & s = state();
    std::lock_guard<std::mutex> guard(s.mutex);
    s.configured = model != nullptr;
    s.wanted.clear();
    if (model) {
        for (const flea_gpu & gpu : model->gpus) { s.wanted.push_back(gpu.gpu_index); }
    }
    std::fill(std::begin(s.gpus), std::end(s.gpus), Gpu());
    s.told = false;
}

bool wants_gpu() {
    State & s = state();
    std::lock_guard<std::mutex> guard(s.mutex);
    return !wanted(s).empty();
}

int places_count() {
    State & s = state();
    std::lock_guard<std::mutex> guard(s.mutex);
    return std::max(1, (int) wanted(s).size());
}

const Gpu * gpu(int place) {
    State & s = state();
    // Taken for the whole search, and alone: the registry asks every device for its name, those of this library too.
    static std::mutex searching;
    std::lock_guard<std::mutex> search(searching);
    uint32_t index = 0;
    {
        std::lock_guard<std::mutex> guard(s.mutex);
        if (place < 0 || place >= (int) wanted(s).size()) { return nullptr; }
        if (s.gpus[place].device) { return &s.gpus[place]; }
        if (s.told) { return nullptr; }
        index = wanted(s)[(size_t) place];
    }
    Gpu found;
    std::string error;
    const int32_t status = find(index, environment().ggml_cuda.c_str(), found, error);
    {
        std::lock_guard<std::mutex> guard(s.mutex);
        if (status == FLEA_OK) {
            s.gpus[place] = found;
            return &s.gpus[place];
        }
        s.told = true;
    }
    fail(status, error);
    return nullptr;
}

}  // namespace ggml_flea

int32_t ggml_backend_flea_find_gpu(uint32_t index, const char * library) {
    ggml_flea::Gpu gpu;
    std::string error;
    const int32_t status = ggml_flea::find(index, library, gpu, error);
    if (status != FLEA_OK) { ggml_flea::fail(status, error, ggml_flea::LogLevel::debug); }
    return status;
}
