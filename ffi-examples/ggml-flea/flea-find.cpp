// Which file is the model, and which of its tensors are streamed.
//
// ggml tells a device no path. But while llama.cpp creates and loads its tensors it holds the model's files open, so the
// GGUF files in /proc/self/fd are the candidates; each is catalogued by flea, and a tensor belongs to the one that has its
// name, type and size. Draft models, projectors and adapters are other files: at most ONE model is streamed at a time (the
// first whose weights are placed), everything else stays with the host. Two open files that both fit are refused, never
// guessed: FLEA_MODEL decides. A program that has the device compiled in hands the model over instead (configure).

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

struct FileId {
    dev_t device;
    ino_t inode;
    bool operator<(const FileId & other) const {
        return device != other.device ? device < other.device : inode < other.inode;
    }
};

// A regular file seen in /proc/self/fd, looked at once.
struct SeenFile {
    off_t size = -1;
    time_t changed = 0;
    bool is_gguf = false;
    std::string first_shard;  // path of the model it belongs to
};

struct Rejection {
    int32_t status;
    std::string why;
};

struct Finder {
    std::mutex mutex;
    ggml_flea_config config = {};
    std::map<FileId, SeenFile> seen;
    std::map<std::string, Rejection> rejected;    // first shard -> why it cannot be streamed
    std::unique_ptr<Model> current;
    std::vector<std::unique_ptr<Model>> spares;   // open at the same time as the current one, looked at and not chosen
    std::set<std::string> told;                   // messages said once
};

Finder & finder() {
    static Finder * instance = new Finder;  // never destroyed: other threads may still be in here at exit
    return *instance;
}

// Asked for by ggml's scheduler at every turn, so it is kept outside the lock.
std::atomic<bool> skips_streamed { false };
std::atomic<bool> configured { false };

// ---- files

bool ends_with(const char * text, const char * suffix) {
    const size_t length = strlen(text);
    const size_t suffix_length = strlen(suffix);
    return length >= suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

bool starts_with(const char * text, const char * prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

// "dir/name-00003-of-00007.gguf" -> "dir/name-00001-of-00007.gguf"; any other path stays.
std::string first_shard_of(const std::string & path) {
    static const char tail[] = "-00000-of-00000.gguf";
    const size_t tail_length = sizeof(tail) - 1;
    if (path.size() < tail_length) { return path; }
    std::string result = path;
    const size_t start = path.size() - tail_length;
    for (size_t i = 0; i < tail_length; ++i) {
        const char c = path[start + i];
        if (tail[i] == '0' ? (c < '0' || c > '9') : c != tail[i]) { return path; }
        if (i >= 1 && i <= 5) { result[start + i] = i == 5 ? '1' : '0'; }
    }
    return result;
}

// The magic is read at an aligned place with an aligned length, because the host may have opened the file with O_DIRECT.
bool has_gguf_magic(int fd) {
    alignas(4096) static thread_local char page[4096];
    const ssize_t got = pread(fd, page, sizeof(page), 0);
    return got >= 4 && memcmp(page, "GGUF", 4) == 0;
}

std::vector<int> open_fds() {
    std::vector<int> result;
    DIR * directory = opendir("/proc/self/fd");
    if (!directory) { return result; }
    while (const dirent * entry = readdir(directory)) {
        const int fd = atoi(entry->d_name);
        if (entry->d_name[0] != '.' && fd != dirfd(directory)) { result.push_back(fd); }
    }
    closedir(directory);
    return result;
}

const SeenFile & look_at(Finder & f, int fd, const struct stat & status) {
    SeenFile & file = f.seen[{ status.st_dev, status.st_ino }];
    if (file.size == status.st_size && file.changed == status.st_mtime) { return file; }
    file = { status.st_size, status.st_mtime, false, "" };
    if (status.st_size < 24 || !has_gguf_magic(fd)) { return file; }
    char link[64];
    char path[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    if (length > 0) {
        file.is_gguf = true;
        file.first_shard = first_shard_of(std::string(path, (size_t) length));
    }
    return file;
}

bool is_own(const Finder & f, int fd) {
    const auto has = [fd](const Model & model) {
        return std::find(model.own_fds.begin(), model.own_fds.end(), fd) != model.own_fds.end();
    };
    if (f.current && has(*f.current)) { return true; }
    return std::any_of(f.spares.begin(), f.spares.end(), [&](const std::unique_ptr<Model> & model) { return has(*model); });
}

// The models whose files the host has open right now, by first shard.
std::set<std::string> open_models(Finder & f) {
    std::set<std::string> result;
    for (const int fd : open_fds()) {
        struct stat status;
        if (is_own(f, fd) || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) { continue; }
        if ((fcntl(fd, F_GETFL) & O_ACCMODE) == O_WRONLY) { continue; }
        const SeenFile & file = look_at(f, fd, status);
        if (file.is_gguf) { result.insert(file.first_shard); }
    }
    return result;
}

bool same_file(const std::string & a, const std::string & b) {
    struct stat sa, sb;
    return a == b || (stat(a.c_str(), &sa) == 0 && stat(b.c_str(), &sb) == 0 && sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino);
}

void say_once(Finder & f, LogLevel level, const std::string & text) {
    if (f.told.insert(text).second) { log_line(level, "%s", text.c_str()); }
}

// ---- models

std::string shard_path(const std::string & first_shard, uint32_t shard) {
    if (shard == 0) { return first_shard; }
    std::string path = first_shard;
    char number[16];
    snprintf(number, sizeof(number), "%05u", shard + 1);
    return path.replace(path.size() - strlen("00001-of-00000.gguf"), 5, number);
}

// Fills in what the catalog says; false when nothing in the file is streamed (projector, adapter).
bool read_catalog(Model & model) {
    model.info.struct_size = sizeof(model.info);
    if (flea_model_info(model.handle, &model.info) != FLEA_OK) { return false; }
    std::vector<uint64_t> layer_bytes(model.info.layer_count, 0);
    bool has_base_weights = false;
    for (uint32_t i = 0; i < model.info.tensor_count; ++i) {
        flea_tensor tensor = {};
        tensor.struct_size = sizeof(tensor);
        if (flea_model_tensor_at(model.handle, i, &tensor) != FLEA_OK || tensor.layer < 0) { continue; }
        has_base_weights = has_base_weights || !is_adapter_name(tensor.name);
        const uint64_t layers = (uint64_t) (tensor.layer_last - tensor.layer) + 1;
        for (int32_t layer = tensor.layer; layer <= tensor.layer_last; ++layer) {
            layer_bytes[(size_t) layer] += tensor.bytes / layers;
        }
        auto weight = std::make_unique<Weight>();
        weight->model = &model;
        weight->layer = tensor.layer;
        weight->layer_last = tensor.layer_last;
        weight->rows_per_layer = tensor.rows_per_layer;
        weight->bytes = tensor.bytes;
        weight->data = const_cast<void *>(tensor.data);
        model.by_address.emplace(tensor.data, weight.get());
        model.weights.emplace(tensor.name, std::move(weight));
    }
    for (const uint64_t bytes : layer_bytes) { model.largest_layer_bytes = std::max(model.largest_layer_bytes, bytes); }
    return has_base_weights && std::string(model.info.architecture ? model.info.architecture : "") != "clip";
}

// NULL and a line in f.rejected when it cannot be streamed.
std::unique_ptr<Model> open_model(Finder & f, const std::string & first_shard) {
    const Environment & env = environment();
    std::vector<int> before = open_fds();
    auto model = std::make_unique<Model>();
    model->path = first_shard;

    flea_open_options options = {};
    options.struct_size = sizeof(options);
    options.reader = env.reader;
    options.flags = FLEA_OPEN_DEFER_PLAN;
    options.memory = env.memory.empty() ? nullptr : env.memory.c_str();
    options.endpoint = env.endpoint.empty() ? nullptr : env.endpoint.c_str();
    options.host_pending_bytes = &pending_bytes;

    const int32_t status = flea_model_open(first_shard.c_str(), &options, &model->handle);
    if (status != FLEA_OK) {
        f.rejected[first_shard] = { status, flea_last_error() };
        model->handle = nullptr;
        return nullptr;
    }
    if (!read_catalog(*model)) {
        f.rejected[first_shard] = { FLEA_E_UNSUPPORTED, "no layers of a language model are in it" };
        return nullptr;
    }
    for (uint32_t shard = 0; shard < model->info.shard_count; ++shard) {
        model->advice_fds.push_back(open(shard_path(first_shard, shard).c_str(), O_RDONLY | O_CLOEXEC));
    }
    std::sort(before.begin(), before.end());
    for (const int fd : open_fds()) {
        if (!std::binary_search(before.begin(), before.end(), fd)) { model->own_fds.push_back(fd); }
    }
    log_line(LogLevel::debug, "%s: %u tensors in %u layers, %llu bytes", first_shard.c_str(), model->info.tensor_count,
             model->info.layer_count, (unsigned long long) model->info.model_bytes);
    return model;
}

void close_current(Finder & f) {
    if (!f.current) { return; }
    stats_snapshot(f.current.get());
    f.current.reset();
}

bool holds(const Model & model, const ggml_tensor * tensor) {
    flea_tensor info = {};
    info.struct_size = sizeof(info);
    return flea_model_tensor(model.handle, tensor->name, &info) == FLEA_OK && info.type == (uint32_t) tensor->type &&
           info.bytes == ggml_nbytes(tensor);
}

// A refusal is a failure of the load, said once.
Match refuse(Finder & f, int32_t status, const std::string & text) {
    if (f.told.insert(text).second) { fail(status, text); }
    return Match::refused;
}

// None of the open files can be streamed. Nobody minds, unless it is a language model that is being loaded.
Match none_usable(Finder & f, const std::set<std::string> & paths, const ggml_tensor * tensor) {
    if (!is_model_weight_name(tensor->name)) { return Match::unknown; }
    for (const std::string & path : paths) {
        const auto entry = f.rejected.find(path);
        if (entry != f.rejected.end()) { return refuse(f, entry->second.status, path + " cannot be streamed: " + entry->second.why); }
    }
    return Match::other;
}

// FLEA_MODEL names another file than those that are open.
Match none_wanted(Finder & f, const std::set<std::string> & paths, const ggml_tensor * tensor) {
    const std::string & wanted = environment().model;
    if (access(wanted.c_str(), R_OK) != 0) { return refuse(f, FLEA_E_NOTFOUND, "FLEA_MODEL=" + wanted + ": " + strerror(errno)); }
    const auto rejected = f.rejected.find(first_shard_of(wanted));
    if (rejected != f.rejected.end()) { return refuse(f, rejected->second.status, "FLEA_MODEL=" + wanted + ": " + rejected->second.why); }
    if (is_model_weight_name(tensor->name)) {
        say_once(f, LogLevel::warn, *paths.begin() + ": kept in ordinary memory, because FLEA_MODEL=" + wanted + " is another file");
    }
    return Match::other;
}

// Opens `path` as the current model.
Match make_current(Finder & f, const std::string & path, const ggml_tensor * tensor) {
    close_current(f);
    f.current = open_model(f, path);
    return f.current ? Match::streamed : none_usable(f, { path }, tensor);
}

// All candidates catalogued beside the current one. Those that are open no more are closed.
void make_spares(Finder & f, const std::vector<std::string> & candidates) {
    const auto gone = [&](const std::unique_ptr<Model> & model) {
        return std::find(candidates.begin(), candidates.end(), model->path) == candidates.end();
    };
    f.spares.erase(std::remove_if(f.spares.begin(), f.spares.end(), gone), f.spares.end());
    for (const std::string & path : candidates) {
        const auto same = [&](const std::unique_ptr<Model> & model) { return model->path == path; };
        if ((f.current && f.current->path == path) || std::any_of(f.spares.begin(), f.spares.end(), same)) { continue; }
        std::unique_ptr<Model> model = open_model(f, path);
        if (model) { f.spares.push_back(std::move(model)); }
    }
}

// The current model has weights in memory, so this one has to stay with the host.
Match kept_beside(Finder & f, const std::string & path, const ggml_tensor * tensor) {
    if (is_model_weight_name(tensor->name)) {
        say_once(f, LogLevel::warn, path + ": kept in ordinary memory; flea streams one model at a time in a process, now " + f.current->path);
    }
    return Match::other;
}

// Several model files are open at once: the one that has this tensor, if it is the only one.
Match choose_among(Finder & f, const std::vector<std::string> & candidates, const ggml_tensor * tensor) {
    make_spares(f, candidates);
    const auto fits = [&](const std::unique_ptr<Model> & model) { return holds(*model, tensor); };
    const bool current_open = f.current && std::find(candidates.begin(), candidates.end(), f.current->path) != candidates.end();
    const bool current_fits = current_open && holds(*f.current, tensor);
    const auto first = std::find_if(f.spares.begin(), f.spares.end(), fits);
    if (first == f.spares.end()) { return current_fits ? Match::streamed : Match::unknown; }
    if (current_fits || std::find_if(first + 1, f.spares.end(), fits) != f.spares.end()) {
        std::string text = "several model files are open and more than one has a tensor '" + std::string(tensor->name) +
                           "'; name the one to stream with FLEA_MODEL:";
        for (const std::string & path : candidates) { text += " " + path; }
        return refuse(f, FLEA_E_INVALID, text);
    }
    if (f.current && f.current->placed_buffers_count > 0) { return kept_beside(f, (*first)->path, tensor); }
    std::unique_ptr<Model> chosen = std::move(*first);
    f.spares.erase(first);
    if (current_open) {
        f.spares.push_back(std::move(f.current));
    } else {
        close_current(f);
    }
    f.current = std::move(chosen);
    return Match::streamed;
}

// Makes f.current the model this tensor may belong to (`streamed`), or says why there is none.
Match choose(Finder & f, const ggml_tensor * tensor) {
    if (f.config.model) { return f.current ? Match::streamed : Match::unknown; }
    const std::set<std::string> open = open_models(f);
    const std::string & wanted = environment().model;

    // Nothing open (after loading, or a host that hides its files): the model known so far, or the one that was named.
    if (open.empty()) {
        if (f.current) { return Match::streamed; }
        return wanted.empty() ? Match::unknown : make_current(f, first_shard_of(wanted), tensor);
    }
    std::vector<std::string> candidates;
    for (const std::string & path : open) {
        const bool usable = f.rejected.find(path) == f.rejected.end();
        if (usable && (wanted.empty() || same_file(path, first_shard_of(wanted)))) { candidates.push_back(path); }
    }
    if (candidates.empty()) { return wanted.empty() ? none_usable(f, open, tensor) : none_wanted(f, open, tensor); }
    if (candidates.size() > 1) { return choose_among(f, candidates, tensor); }
    f.spares.clear();
    if (f.current && candidates[0] == f.current->path) { return Match::streamed; }
    if (f.current && f.current->placed_buffers_count > 0) { return kept_beside(f, candidates[0], tensor); }
    return make_current(f, candidates[0], tensor);
}

}  // namespace

Model::~Model() {
    for (const int fd : advice_fds) {
        if (fd >= 0) { close(fd); }
    }
    if (owned) { flea_model_close(handle); }
}

bool is_adapter_name(const char * name) {
    return ends_with(name, ".lora_a") || ends_with(name, ".lora_b");
}

bool is_model_weight_name(const char * name) {
    return (starts_with(name, "blk.") || starts_with(name, "output.") || starts_with(name, "output_norm") ||
            starts_with(name, "token_embd.")) && !is_adapter_name(name);
}

bool is_weight_name(const char * name) {
    return starts_with(name, "blk.") || ends_with(name, ".weight") || ends_with(name, ".bias") || ends_with(name, "scale");
}

Match find_weight(const ggml_tensor * tensor, const Weight ** weight) {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    const Match chosen = choose(f, tensor);
    if (chosen != Match::streamed) { return chosen; }
    flea_tensor info = {};
    info.struct_size = sizeof(info);
    if (flea_model_tensor(f.current->handle, tensor->name, &info) != FLEA_OK) { return Match::unknown; }
    if (!holds(*f.current, tensor)) { return Match::other; }
    const auto entry = f.current->weights.find(tensor->name);
    if (entry == f.current->weights.end()) { return Match::kept; }
    *weight = entry->second.get();
    return Match::streamed;
}

void model_buffer_placed(Model * model) {
    std::lock_guard<std::mutex> guard(finder().mutex);
    model->placed_buffers_count++;
}

void model_buffer_freed(Model * model) {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    model->placed_buffers_count--;
    // The memory of a model that nobody uses any more is given back at once: a host may load the next one.
    if (model->placed_buffers_count == 0 && model->owned && model == f.current.get()) { close_current(f); }
}

int32_t configure(const ggml_flea_config * config) {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    if (f.current && f.current->placed_buffers_count > 0) { return FLEA_E_BUSY; }
    if (config && (config->struct_size < sizeof(ggml_flea_config) || !config->model)) { return FLEA_E_INVALID; }
    close_current(f);
    f.config = {};
    skips_streamed = config && config->loader_skips_streamed;
    configured = false;
    if (!config) { return FLEA_OK; }
    auto model = std::make_unique<Model>();
    model->owned = false;
    model->handle = config->model;
    model->path = "the model given";
    configured = true;
    if (!read_catalog(*model)) {
        fail(FLEA_E_UNSUPPORTED, "no layers of a language model are in it: nothing to stream");
        return FLEA_E_UNSUPPORTED;
    }
    f.config = *config;
    f.current = std::move(model);
    return FLEA_OK;
}

bool is_configured() { return configured.load(std::memory_order_relaxed); }

bool loader_skips_streamed() { return skips_streamed.load(std::memory_order_relaxed); }

flea_model * current_handle() {
    std::lock_guard<std::mutex> guard(finder().mutex);
    return finder().current ? finder().current->handle : nullptr;
}

bool current_sizes(uint64_t * model_bytes, uint64_t * smallest_bytes) {
    std::lock_guard<std::mutex> guard(finder().mutex);
    const Model * model = finder().current.get();
    if (!model) { return false; }
    *model_bytes = model->info.model_bytes;
    // Three slots, a straddling page per layer, what the host keeps; flea's plan says it exactly, once it is made.
    const uint64_t page_bytes = model->info.page_bytes ? model->info.page_bytes : 2u << 20;
    *smallest_bytes = 3 * (model->largest_layer_bytes + page_bytes) + (model->info.layer_count + 1) * page_bytes + model->info.host_tensor_bytes;
    return true;
}

uint32_t placed_layers(const Model & model) {
    std::vector<bool> placed(model.info.layer_count, false);
    for (const auto & entry : model.weights) {
        if (!entry.second->placed) { continue; }
        for (int32_t layer = entry.second->layer; layer <= entry.second->layer_last; ++layer) { placed[(size_t) layer] = true; }
    }
    return (uint32_t) std::count(placed.begin(), placed.end(), true);
}

void model_before_acquire(Model * model) {
    if (model->planned.load(std::memory_order_acquire)) { return; }
    drop_page_cache(model);  // what is left of the host's own loading; the pool is about to need the memory
    pending_bytes = reserved_untouched_bytes();
    const uint32_t placed = placed_layers(*model);
    if (placed < model->info.layer_count && !model->warned.exchange(true)) {
        log_line(LogLevel::warn, "%s: llama.cpp kept %u of %u layers in ordinary memory, where they are not streamed; -ngl 99 -fit off "
                 "puts all of them on FLEA, a smaller -c or -ub leaves room for them", model->path.c_str(),
                 model->info.layer_count - placed, model->info.layer_count);
    }
}

void model_acquired(Model * model) {
    if (model->planned.exchange(true, std::memory_order_acq_rel)) { return; }
    flea_info info = {};
    info.struct_size = sizeof(info);
    if (flea_model_info(model->handle, &info) != FLEA_OK) { return; }
    const auto mib = [](uint64_t bytes) { return (unsigned long long) (bytes >> 20); };
    log_line(LogLevel::info, "%s: model %llu MiB, memory %llu MiB, of it weights %llu MiB: %llu MiB resident, %llu MiB streamed per pass",
             model->path.c_str(), mib(info.model_bytes), mib(info.total_bytes), mib(info.weight_budget_bytes), mib(info.resident_bytes),
             mib(info.streamed_bytes_per_pass));
}

void stats_current() {
    std::lock_guard<std::mutex> guard(finder().mutex);
    if (finder().current) { stats_snapshot(finder().current.get()); }
}

// The page cache is dropped as a whole every so often, not piece by piece: the kernel drops only folios that lie in a range
// completely, and what read-ahead brought past the end of a tensor would stay.
void loader_read(const Weight * weight, uint64_t bytes) {
    constexpr uint64_t step_bytes = 32ull << 20;
    const uint64_t before = counters.loader_bytes.fetch_add(bytes);
    if (before / step_bytes == (before + bytes) / step_bytes) { return; }
    sample_memory();
    drop_page_cache(weight->model);
}

void drop_page_cache(Model * model) {
    for (const int fd : model->advice_fds) {
        if (fd >= 0) { posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); }
    }
}

}  // namespace ggml_flea

int32_t ggml_backend_flea_configure(const ggml_flea_config * config) { return ggml_flea::configure(config); }

flea_model * ggml_backend_flea_model(void) { return ggml_flea::current_handle(); }
