// Which file is the model, and which of its tensors are streamed.
//
// ggml tells a device no path. The GGUF files that are open while a model is loaded are the candidates; flea catalogues them,
// and a tensor belongs to the one that has its name, type and size, and had those of all tensors before. Draft models,
// projectors and adapters are other files: at most ONE model is streamed at a time (the first whose weights are placed),
// everything else stays with the host. Two open files that both fit are refused, never guessed: FLEA_MODEL decides. A
// program that has the device compiled in hands the model over instead (configure).

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include <fcntl.h>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

struct Rejection {
    int32_t status;
    std::string why;
};

struct Finder {
    std::mutex mutex;
    ggml_flea_config config = {};
    std::map<std::string, Rejection> rejected;    // first shard -> why it cannot be streamed
    std::unique_ptr<Model> current;
    std::vector<std::unique_ptr<Model>> spares;   // open at the same time as the current one, and not chosen
    std::vector<std::string> candidates;          // of the last question; when they change, another load has begun
    std::set<std::string> told;                   // messages said once
};

Finder & finder() {
    static Finder * instance = new Finder;  // never destroyed: other threads may still be in here at exit
    return *instance;
}

// Asked for by ggml's scheduler at every turn, so they are kept outside the lock.
std::atomic<bool> skips_streamed { false };
std::atomic<bool> whole_layers { false };
std::atomic<bool> guesses { false };
std::atomic<bool> configured { false };

// What the answer is for.
enum class Purpose {
    trying,   // would the device have it? Answered for several files at once, as long as they agree
    placing,  // its memory is needed now: one file, or none
};

// Either a verdict, or (streamed) the models it may belong to.
struct Choice {
    Match match;
    std::vector<Model *> models;
};

void say_once(Finder & f, LogLevel level, const std::string & text) {
    if (f.told.insert(text).second) { log_line(level, "%s", text.c_str()); }
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
    options.flags = FLEA_OPEN_DEFER_PLAN | (env.experts ? FLEA_OPEN_EXPERTS : 0);
    options.memory = env.memory.empty() ? nullptr : env.memory.c_str();
    options.mirrors = env.mirrors.empty() ? nullptr : env.mirrors.c_str();
    options.endpoint = env.endpoint.empty() ? nullptr : env.endpoint.c_str();
    options.host_pending_bytes = &pending_bytes;
    options.vram = env.vram.empty() ? nullptr : env.vram.c_str();
    options.gpus = env.gpus.size() > 1 ? env.gpu_list.c_str() : nullptr;
    options.gpu_index = env.gpus.size() > 1 ? 0 : env.gpus[0];

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
Choice make_current(Finder & f, const std::string & path, const ggml_tensor * tensor) {
    close_current(f);
    f.current = open_model(f, path);
    if (!f.current) { return { none_usable(f, { path }, tensor), {} }; }
    return { Match::streamed, { f.current.get() } };
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

// A spare becomes the current model; the one before stays as a spare if its file is still open.
void promote(Finder & f, Model * chosen) {
    const auto same = [&](const std::unique_ptr<Model> & model) { return model.get() == chosen; };
    const auto place = std::find_if(f.spares.begin(), f.spares.end(), same);
    std::unique_ptr<Model> before = std::move(f.current);
    f.current = std::move(*place);
    f.spares.erase(place);
    if (!before) { return; }
    if (std::find(f.candidates.begin(), f.candidates.end(), before->path) != f.candidates.end()) {
        f.spares.push_back(std::move(before));
    } else {
        stats_snapshot(before.get());
    }
}

// Several model files are open at once. A file that lacked one tensor of this load is not the one being loaded.
Choice choose_among(Finder & f, const ggml_tensor * tensor, Purpose purpose) {
    make_spares(f, f.candidates);
    std::vector<Model *> fitting;
    const auto look = [&](Model * model) {
        const bool has = holds(*model, tensor);
        model->missed += has ? 0 : 1;
        if (has && model->missed == 0) { fitting.push_back(model); }
    };
    if (f.current && std::find(f.candidates.begin(), f.candidates.end(), f.current->path) != f.candidates.end()) { look(f.current.get()); }
    for (const auto & spare : f.spares) { look(spare.get()); }
    if (fitting.empty()) { return { Match::unknown, {} }; }
    if (purpose == Purpose::trying) { return { Match::streamed, fitting }; }
    if (fitting.size() > 1) {
        std::string text = "several open files may be the model that is loaded; name it with FLEA_MODEL:";
        for (const std::string & path : f.candidates) { text += " " + path; }
        return { refuse(f, FLEA_E_INVALID, text), {} };
    }
    if (fitting[0] != f.current.get()) {
        if (f.current && f.current->placed_buffers_count > 0) { return { kept_beside(f, fitting[0]->path, tensor), {} }; }
        promote(f, fitting[0]);
    }
    return { Match::streamed, { f.current.get() } };
}

bool is_own(const Finder & f, int fd) {
    const auto has = [fd](const Model & model) {
        return std::find(model.own_fds.begin(), model.own_fds.end(), fd) != model.own_fds.end();
    };
    if (f.current && has(*f.current)) { return true; }
    return std::any_of(f.spares.begin(), f.spares.end(), [&](const std::unique_ptr<Model> & model) { return has(*model); });
}

void set_candidates(Finder & f, std::vector<std::string> candidates) {
    if (f.candidates == candidates) { return; }
    f.candidates = std::move(candidates);
    if (f.current) { f.current->missed = 0; }
    for (const auto & spare : f.spares) { spare->missed = 0; }
}

Choice choose(Finder & f, const ggml_tensor * tensor, Purpose purpose) {
    if (f.config.model) { return { Match::streamed, { f.current.get() } }; }
    const std::set<std::string> open = open_model_files([&](int fd) { return is_own(f, fd); });
    const std::string & wanted = environment().model;

    // Nothing open (after loading, or a host that hides its files): the model known so far, or the one that was named.
    if (open.empty()) {
        if (f.current) { return { Match::streamed, { f.current.get() } }; }
        if (wanted.empty()) { return { Match::unknown, {} }; }
        return make_current(f, first_shard_of(wanted), tensor);
    }
    std::vector<std::string> candidates;
    for (const std::string & path : open) {
        const bool usable = f.rejected.find(path) == f.rejected.end();
        if (usable && (wanted.empty() || same_file(path, first_shard_of(wanted)))) { candidates.push_back(path); }
    }
    set_candidates(f, candidates);
    if (candidates.empty()) { return { wanted.empty() ? none_usable(f, open, tensor) : none_wanted(f, open, tensor), {} }; }
    if (candidates.size() > 1) { return choose_among(f, tensor, purpose); }
    f.spares.clear();
    if (f.current && candidates[0] == f.current->path) { return { Match::streamed, { f.current.get() } }; }
    if (f.current && f.current->placed_buffers_count > 0) { return { kept_beside(f, candidates[0], tensor), {} }; }
    return make_current(f, candidates[0], tensor);
}

// What `model` has to say about a tensor.
Match look_up(const Model & model, const ggml_tensor * tensor, const Weight ** weight) {
    flea_tensor info = {};
    info.struct_size = sizeof(info);
    if (flea_model_tensor(model.handle, tensor->name, &info) != FLEA_OK) { return Match::unknown; }
    if (!holds(model, tensor)) { return Match::other; }
    const auto entry = model.weights.find(tensor->name);
    if (entry == model.weights.end()) { return Match::kept; }
    *weight = entry->second.get();
    return Match::streamed;
}

}  // namespace

Match try_weight(const ggml_tensor * tensor, const ggml_tensor * op, int src_index, bool * serves) {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    const Choice choice = choose(f, tensor, Purpose::trying);
    Match match = choice.match;
    *serves = true;
    for (const Model * model : choice.models) {
        const Weight * weight = nullptr;
        match = look_up(*model, tensor, &weight);
        *serves = *serves && (!weight || weight->serves(op, src_index));
        if (match != Match::streamed) { break; }
    }
    return match;
}

Match find_weight(const ggml_tensor * tensor, const Weight ** weight) {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    const Choice choice = choose(f, tensor, Purpose::placing);
    return choice.models.empty() ? choice.match : look_up(*choice.models[0], tensor, weight);
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
    whole_layers = config && config->whole_layers;
    guesses = config && config->guesses_experts;
    configured = false;
    kv_configure(config ? config->kv : nullptr);
    gpu_configure(nullptr);
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
    gpu_configure(model.get());
    f.config = *config;
    f.current = std::move(model);
    return FLEA_OK;
}

// In host memory it stays host memory, whoever has loaded it.
void loaded() {
    if (wants_gpu()) { skips_streamed = false; }
}

bool is_configured() { return configured.load(std::memory_order_relaxed); }

bool loader_skips_streamed() { return skips_streamed.load(std::memory_order_relaxed); }

bool guesses_experts() { return guesses.load(std::memory_order_relaxed); }

// A GPU computes faster than any link brings a layer: there is nothing to gain from its first part.
bool waits_for_parts() { return !whole_layers.load(std::memory_order_relaxed) && !wants_gpu(); }

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

bool current_splits(std::vector<double> & splits, std::vector<uint64_t> & bytes) {
    std::lock_guard<std::mutex> guard(finder().mutex);
    const Model * model = finder().current.get();
    if (!model || model->splits.empty()) { return false; }
    splits = model->splits;
    bytes = model->gpu_bytes;
    return true;
}

void look_for_model() {
    Finder & f = finder();
    std::lock_guard<std::mutex> guard(f.mutex);
    if (f.config.model || open_model_files([&](int fd) { return is_own(f, fd); }).size() != 1) { return; }
    const ggml_tensor nameless = {};  // nobody minds where this file cannot be streamed: a tensor of it will say so
    choose(f, &nameless, Purpose::trying);
}

void stats_current() {
    std::lock_guard<std::mutex> guard(finder().mutex);
    if (finder().current) { stats_snapshot(finder().current.get()); }
}

}  // namespace ggml_flea

void ggml_backend_flea_loaded(void) { ggml_flea::loaded(); }

int32_t ggml_backend_flea_configure(const ggml_flea_config * config) { return ggml_flea::configure(config); }

flea_model * ggml_backend_flea_model(void) { return ggml_flea::current_handle(); }
