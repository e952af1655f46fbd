// Embeddings that are read row by row: the graph runs up to a GET_ROWS, the ids are read, exactly those rows are copied out of
// the file, and the operation is computed with them in place of the table.
//
// The CPU backend treats each row by itself, so the result is the same to the last bit. The table's own address is a place in
// flea's window that never has memory.

#include <algorithm>
#include <string>
#include <vector>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

// Rows copied out at a time: a quarter of what a budget holds back for things nobody counted (32 MiB).
constexpr size_t scratch_bytes_max = 8u << 20;

// Rows [first, first + count) of the node's result, as an operation of their own on the rows copied out.
ggml_status compute_band(Stream & stream, ggml_cgraph * graph, int index, std::vector<char> & rows, size_t first, size_t count) {
    const ggml_tensor * node = ggml_graph_node(graph, index);
    std::vector<int32_t> places(count);
    for (size_t i = 0; i < count; ++i) { places[i] = (int32_t) i; }

    ggml_tensor table = *node->src[0];
    table.data = rows.data();
    table.view_src = nullptr;
    table.view_offs = 0;
    table.ne[1] = (int64_t) count;
    table.nb[2] = table.nb[3] = table.nb[1] * count;
    ggml_tensor ids = *node->src[1];
    ids.data = places.data();
    ids.view_src = nullptr;
    ids.view_offs = 0;
    ids.ne[0] = (int64_t) count;
    ids.nb[0] = sizeof(int32_t);
    ids.nb[1] = ids.nb[2] = ids.nb[3] = sizeof(int32_t) * count;
    ggml_tensor band = *node;
    band.data = (char *) band.data + first * band.nb[1];
    band.ne[1] = (int64_t) count;
    band.src[0] = &table;
    band.src[1] = &ids;
    std::vector<ggml_tensor *> nodes { &band };
    const ggml_status computed = compute_instead(stream, graph, index, nodes);
    ggml_backend_synchronize(stream.inner);  // the rows are overwritten by the next band
    return computed;
}

// One list of ids and a whole table: what llama.cpp looks embeddings up with.
bool is_plain(const ggml_tensor * node, const Weight * weight) {
    const ggml_tensor * table = node->src[0];
    const ggml_tensor * ids = node->src[1];
    return table->data == weight->data && ggml_nbytes(table) == weight->bytes && table->ne[2] == 1 && table->ne[3] == 1 &&
           table->nb[1] == weight->row_bytes && ids->type == GGML_TYPE_I32 && ids->ne[1] == 1 && ids->ne[2] == 1 && ids->ne[3] == 1;
}

}  // namespace

const Weight * table_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_GET_ROWS || !is_computed(node)) { return nullptr; }
    const Weight * weight = weight_of(node->src[0]);
    return weight && weight->row_bytes ? weight : nullptr;
}

int32_t prepare_rows(ggml_cgraph * graph, const std::vector<Step> & steps) {
    for (const Step & step : steps) {
        if (step.kind != Step::rows) { continue; }
        const ggml_tensor * node = ggml_graph_node(graph, step.begin);
        const Weight * weight = table_of(node);
        if (weight->reads_rows.load(std::memory_order_acquire)) { continue; }
        const int32_t status = flea_read_rows(step.model->handle, weight->data, nullptr, 0, nullptr, 0);
        if (status != FLEA_OK) {
            fail_flea(status, step.model->path + ": rows of '" + node->src[0]->name + "'");
            return status;
        }
        weight->reads_rows.store(true, std::memory_order_release);
    }
    return FLEA_OK;
}

ggml_status compute_rows(Stream & stream, ggml_cgraph * graph, const Step & step, int32_t * status) {
    const ggml_tensor * node = ggml_graph_node(graph, step.begin);
    const Weight * weight = table_of(node);
    const ggml_tensor * ids = node->src[1];
    counters.row_cuts++;
    if (!is_plain(node, weight)) {
        fail(FLEA_E_UNSUPPORTED, std::string("'") + node->name + "' looks rows of '" + node->src[0]->name +
                                     "' up in a way that flea does not know; leave that table to the host");
        return GGML_STATUS_FAILED;
    }
    const size_t count = (size_t) ids->ne[0];
    const size_t most = std::max<size_t>(1, scratch_bytes_max / weight->row_bytes);
    std::vector<int32_t> wanted(count);
    for (size_t i = 0; i < count; ++i) { wanted[i] = *(const int32_t *) ((const char *) ids->data + i * ids->nb[0]); }
    std::vector<char> rows(std::min(count, most) * weight->row_bytes);
    for (size_t first = 0; first < count; first += most) {
        const size_t band = std::min(most, count - first);
        *status = flea_read_rows(step.model->handle, weight->data, wanted.data() + first, band, rows.data(), band * weight->row_bytes);
        if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
        const ggml_status computed = compute_band(stream, graph, step.begin, rows, first, band);
        if (computed != GGML_STATUS_SUCCESS) { return computed; }
    }
    return GGML_STATUS_SUCCESS;
}

int32_t read_table(const Weight * weight, uint64_t from, uint64_t to, char * data) {
    std::vector<char> row(weight->row_bytes);
    for (uint64_t at = from; at < to;) {
        const int32_t number = (int32_t) (at / weight->row_bytes);
        const uint64_t begin = (uint64_t) number * weight->row_bytes;
        const uint64_t end = std::min(to, begin + weight->row_bytes);
        const int32_t status = flea_read_rows(weight->model->handle, weight->data, &number, 1, row.data(), row.size());
        if (status != FLEA_OK) { return status; }
        std::copy(row.begin() + (ptrdiff_t) (at - begin), row.begin() + (ptrdiff_t) (end - begin), data + (at - from));
        at = end;
    }
    return FLEA_OK;
}

}  // namespace ggml_flea
