// Keys and values with less memory than they need: the device's part of `flea run --kv-disk`.
//
// llama.cpp asks the device's buffer type for the KV cache and calls init_tensor for each of its tensors: the tensors of
// a layer are then placed where the program that gave `ggml_flea_kv` says, and have memory only under a lease. Which
// layer's cache a node touches is seen by address, as with weights; which rows it writes stands in the indices of
// SET_ROWS, which are inputs of the graph. Caches that are no rows of cells (transposed values, without flash
// attention) are refused.

#include <algorithm>
#include <cstdio>

#include "flea-device.hpp"

namespace ggml_flea {

namespace {

struct Cache {
    std::mutex mutex;
    ggml_flea_kv calls = {};
    std::unordered_map<const void *, std::unique_ptr<KvTensor>> tensors;  // by address
};

Cache & cache() {
    static Cache * instance = new Cache;
    return *instance;
}

// Asked for with every node: there is mostly none.
std::atomic<bool> streamed { false };

// Nodes that only describe memory.
bool is_view(const ggml_tensor * node) {
    return node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
           node->op == GGML_OP_TRANSPOSE;
}

int32_t wrote_rows(const ggml_flea_kv & calls, const KvTensor & kv, uint64_t first, uint64_t end) {
    end = std::min(end, kv.rows_count);
    return first < end ? calls.wrote(calls.context, kv.layer, kv.side, first, end) : FLEA_OK;
}

// The rows that SET_ROWS writes: one index per row of the source.
int32_t wrote_indices(const ggml_flea_kv & calls, const KvTensor & kv, const ggml_tensor * node) {
    const ggml_tensor * indices = node->src[1];
    if (node->ne[0] != kv.row_elements || !ggml_is_contiguous(indices)) {
        fail(FLEA_E_UNSUPPORTED, "--kv-disk needs a cache of whole rows, and this model's values are transposed: it has no flash attention");
        return FLEA_E_UNSUPPORTED;
    }
    uint64_t first = kv.rows_count;
    uint64_t end = 0;
    for (int64_t i = 0; i < ggml_nelements(indices); ++i) {
        const int64_t row = indices->type == GGML_TYPE_I64 ? static_cast<const int64_t *>(indices->data)[i]
                                                           : static_cast<const int32_t *>(indices->data)[i];
        first = std::min<uint64_t>(first, (uint64_t) row);
        end   = std::max<uint64_t>(end, (uint64_t) row + 1);
    }
    return wrote_rows(calls, kv, first, end);
}

}  // namespace

void kv_configure(const ggml_flea_kv * calls) {
    streamed = calls != nullptr;
    cache().calls = calls ? *calls : ggml_flea_kv {};
}

uint64_t kv_ring_bytes() {
    const ggml_flea_kv & calls = cache().calls;
    return streamed ? calls.ring_bytes(calls.context) : 0;
}

bool kv_wants(const ggml_tensor * tensor) {
    unsigned layer = 0;
    char side = 0;
    int read = 0;
    return streamed && !tensor->view_src && sscanf(tensor->name, "cache_%c_l%u%n", &side, &layer, &read) == 2 &&
           tensor->name[read] == '\0' && (side == 'k' || side == 'v');
}

bool kv_place(ggml_tensor * tensor) {
    Cache & c = cache();
    auto kv = std::make_unique<KvTensor>();
    char side = 0;
    sscanf(tensor->name, "cache_%c_l%u", &side, &kv->layer);
    kv->side         = side == 'v' ? 1 : 0;
    kv->row_elements = tensor->ne[0];
    kv->row_bytes    = tensor->nb[1];
    kv->rows_count   = (uint64_t) (tensor->ne[1] * tensor->ne[2] * tensor->ne[3]);
    kv->data         = c.calls.place(c.calls.context, kv->layer, kv->side, kv->rows_count, kv->row_bytes);
    if (!kv->data) {
        fail(FLEA_E_NOMEM, std::string("no place for '") + tensor->name + "'");
        return false;
    }
    tensor->data = kv->data;
    std::lock_guard<std::mutex> guard(c.mutex);
    c.tensors[kv->data] = std::move(kv);
    return true;
}

const KvTensor * kv_of(const ggml_tensor * tensor) {
    if (!streamed) { return nullptr; }
    const ggml_tensor * root = tensor->view_src ? tensor->view_src : tensor;
    if (!root->buffer || place_of(root->buffer->buft) < 0) { return nullptr; }
    Cache & c = cache();
    std::lock_guard<std::mutex> guard(c.mutex);
    const auto entry = c.tensors.find(root->data);
    return entry == c.tensors.end() ? nullptr : entry->second.get();
}

void kv_clear() {
    const ggml_flea_kv & calls = cache().calls;
    if (calls.clear(calls.context) != FLEA_OK) { log_line(LogLevel::error, "keys and values were not cleared"); }
}

void kv_remove() {
    Cache & c = cache();
    if (!streamed) { return; }
    if (c.calls.remove(c.calls.context) != FLEA_OK) { log_line(LogLevel::error, "keys and values were not given back"); }
    std::lock_guard<std::mutex> guard(c.mutex);
    c.tensors.clear();
}

int32_t kv_layer_of(const ggml_tensor * node) {
    if (!streamed || is_view(node)) { return -1; }
    const KvTensor * kv = kv_of(node);
    for (int i = 0; i < GGML_MAX_SRC && !kv; ++i) { kv = node->src[i] ? kv_of(node->src[i]) : nullptr; }
    return kv ? (int32_t) kv->layer : -1;
}

// ---- leases

int32_t KvLease::take(int32_t layer) {
    if (layer == layer_ || layer < 0) { return FLEA_OK; }
    release();
    const ggml_flea_kv & calls = cache().calls;
    const int32_t status = calls.acquire(calls.context, (uint32_t) layer);
    if (status == FLEA_OK) { layer_ = layer; }
    return status;
}

int32_t KvLease::wrote(ggml_cgraph * graph, const Step & step) {
    if (step.kv < 0) { return FLEA_OK; }
    const ggml_flea_kv & calls = cache().calls;
    for (int i = step.begin; i < step.end; ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const KvTensor * kv = is_view(node) ? nullptr : kv_of(node);
        if (!kv) { continue; }
        // Whatever else is computed into a cache (a shift of positions) may have touched all of it.
        const int32_t status = node->op == GGML_OP_SET_ROWS ? wrote_indices(calls, *kv, node) : wrote_rows(calls, *kv, 0, kv->rows_count);
        if (status != FLEA_OK) { return status; }
    }
    return FLEA_OK;
}

int32_t KvLease::wrote(const KvTensor * kv, uint64_t offset, uint64_t bytes) {
    return wrote_rows(cache().calls, *kv, offset / kv->row_bytes, (offset + bytes + kv->row_bytes - 1) / kv->row_bytes);
}

void KvLease::release() {
    if (layer_ < 0) { return; }
    const ggml_flea_kv & calls = cache().calls;
    if (calls.release(calls.context, (uint32_t) layer_) != FLEA_OK) { log_line(LogLevel::error, "releasing keys and values failed"); }
    layer_ = -1;
}

}  // namespace ggml_flea
