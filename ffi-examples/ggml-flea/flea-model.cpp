// One streamed model: its catalog as the device needs it, and the moments of its life that others have to hear of.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>

#include <fcntl.h>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

bool ends_with(const char * text, const char * suffix) {
    const size_t length = strlen(text);
    const size_t suffix_length = strlen(suffix);
    return length >= suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

bool starts_with(const char * text, const char * prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

// The number of the block that a tensor belongs to; -1 for none.
int block_of(const char * name) {
    int block = -1;
    return sscanf(name, "blk.%d.", &block) == 1 ? block : -1;
}

// Places the layers as llama.cpp counts them: block n is n, the head is the number of blocks. It gives unit n to the first device
// whose sum of shares, as a part of all, is more than n / units: so the sums stand half a unit before the first of the next GPU, where no
// rounding reaches.
void divide(Model & model, const std::vector<int> & first_blocks, int blocks_count) {
    double before = 0;
    for (size_t i = 0; i < model.gpus.size(); ++i) {
        const bool is_last = i + 1 == model.gpus.size();
        const double end = is_last ? blocks_count + 1 : std::min(first_blocks[i + 1], blocks_count) - 0.5;
        model.splits.push_back(end - before);
        before = end;
    }
}

// Everything of the model's files that is in the page cache and not mapped.
void drop_page_cache(Model * model) {
    for (const int fd : model->advice_fds) {
        if (fd >= 0) { posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); }
    }
}

}  // namespace

Model::~Model() {
    for (const int fd : advice_fds) {
        if (fd >= 0) { close(fd); }
    }
    if (owned) { flea_model_close(handle); }
}

// Fills in what the catalog says; false when nothing in the file is streamed (projector, adapter).
bool read_catalog(Model & model) {
    model.info.struct_size = sizeof(model.info);
    if (flea_model_info(model.handle, &model.info) != FLEA_OK) { return false; }
    for (uint32_t place = 0; place < std::min(model.info.gpu_count, (uint32_t) gpus_max); ++place) {
        flea_gpu gpu = {};
        gpu.struct_size = sizeof(gpu);
        if (flea_model_gpu(model.handle, place, &gpu) != FLEA_OK) { return false; }
        model.gpus.push_back(gpu);
    }
    std::vector<int> first_blocks(model.gpus.size(), std::numeric_limits<int>::max());
    std::vector<uint64_t> gpu_bytes(model.gpus.size(), 0);
    int blocks_count = 0;
    std::vector<uint64_t> layer_bytes(model.info.layer_count, 0);
    bool has_base_weights = false;
    for (uint32_t i = 0; i < model.info.tensor_count; ++i) {
        flea_tensor tensor = {};
        tensor.struct_size = sizeof(tensor);
        if (flea_model_tensor_at(model.handle, i, &tensor) != FLEA_OK) { continue; }
        blocks_count = std::max(blocks_count, block_of(tensor.name) + 1);
        const bool has_rows = (tensor.flags & FLEA_TENSOR_ROWS) && tensor.shape[1] > 0;
        if (tensor.layer < 0 && !has_rows) { continue; }
        if (tensor.layer >= 0) {
            has_base_weights = has_base_weights || !is_adapter_name(tensor.name);
            const uint64_t layers = (uint64_t) (tensor.layer_last - tensor.layer) + 1;
            for (int32_t layer = tensor.layer; layer <= tensor.layer_last; ++layer) {
                layer_bytes[(size_t) layer] += tensor.bytes / layers;
            }
        }
        auto weight = std::make_unique<Weight>();
        weight->model = &model;
        weight->layer = tensor.layer;
        weight->layer_last = tensor.layer_last;
        weight->rows_per_layer = tensor.rows_per_layer;
        weight->bytes = tensor.bytes;
        weight->data = const_cast<void *>(tensor.data);
        const auto is_on = [&](const flea_gpu & gpu) { return (int64_t) gpu.gpu_index == tensor.gpu_index; };
        const auto gpu = std::find_if(model.gpus.begin(), model.gpus.end(), is_on);
        if (gpu != model.gpus.end()) {
            const size_t place = (size_t) (gpu - model.gpus.begin());
            weight->place = (int) place;
            gpu_bytes[place] += tensor.bytes;
            if (const int block = block_of(tensor.name); block >= 0) { first_blocks[place] = std::min(first_blocks[place], block); }
        }
        if (has_rows) { weight->row_bytes = tensor.bytes / tensor.shape[1]; }
        if (tensor.flags & FLEA_TENSOR_EXPERTS) { weight->experts = (uint32_t) tensor.shape[2]; }
        model.by_address.emplace(tensor.data, weight.get());
        model.weights.emplace(tensor.name, std::move(weight));
    }
    if (model.gpus.size() > 1) {
        divide(model, first_blocks, blocks_count);
        model.gpu_bytes = std::move(gpu_bytes);
    }
    for (const uint64_t bytes : layer_bytes) { model.largest_layer_bytes = std::max(model.largest_layer_bytes, bytes); }
    return has_base_weights && std::string(model.info.architecture ? model.info.architecture : "") != "clip";
}

bool Weight::serves(const ggml_tensor * op, int src_index) const {
    if (row_bytes && op->op == GGML_OP_GET_ROWS && src_index == 0) { return true; }
    if (layer < 0) {
        // A view of it is only a name for a place; whatever reads it gets a copy from the scheduler.
        return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_PERMUTE ||
               op->op == GGML_OP_TRANSPOSE;
    }
    return !is_cut() || (op->op == GGML_OP_MUL_MAT && src_index == 0);
}

bool holds(const Model & model, const ggml_tensor * tensor) {
    flea_tensor info = {};
    info.struct_size = sizeof(info);
    return flea_model_tensor(model.handle, tensor->name, &info) == FLEA_OK && info.type == (uint32_t) tensor->type &&
           info.bytes == ggml_nbytes(tensor);
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

uint32_t placed_layers(const Model & model) {
    std::vector<bool> placed(model.info.layer_count, false);
    for (const auto & entry : model.weights) {
        if (!entry.second->placed || entry.second->layer < 0) { continue; }
        for (int32_t layer = entry.second->layer; layer <= entry.second->layer_last; ++layer) { placed[(size_t) layer] = true; }
    }
    return (uint32_t) std::count(placed.begin(), placed.end(), true);
}

void model_before_acquire(Model * model) {
    if (model->planned.load(std::memory_order_acquire)) { return; }
    drop_page_cache(model);  // what is left of the host's own loading; the pool is about to need the memory
    pending_bytes = reserved_untouched_bytes() + kv_ring_bytes();
    const uint32_t placed = placed_layers(*model);
    if (placed < model->info.layer_count && !model->warned.exchange(true)) {
        log_line(LogLevel::warn, "%s: llama.cpp kept %u of %u layers in ordinary memory, where they are not streamed; -ngl 99 -fit off "
                 "puts all of them on FLEA, a smaller -c or -ub leaves room for them", model->path.c_str(),
                 model->info.layer_count - placed, model->info.layer_count);
    }
}

void model_acquired(Model * model) {
    if (model->planned.load(std::memory_order_acquire)) { return; }
    flea_info info = {};
    info.struct_size = sizeof(info);
    const bool known = flea_model_info(model->handle, &info) == FLEA_OK;
    if (known && info.expert_cache_bytes > 0) { model->fetches_experts.store(true, std::memory_order_release); }
    if (model->planned.exchange(true, std::memory_order_acq_rel) || !known) { return; }
    const auto mib = [](uint64_t bytes) { return (unsigned long long) (bytes >> 20); };
    log_line(LogLevel::info, "%s: model %llu MiB, memory %llu MiB, of it weights %llu MiB: %llu MiB resident, %llu MiB streamed per pass",
             model->path.c_str(), mib(info.model_bytes), mib(info.total_bytes), mib(info.weight_budget_bytes), mib(info.resident_bytes),
             mib(info.streamed_bytes_per_pass));
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

}  // namespace ggml_flea
