// graph_compute: the walk that makes streaming work.
//
// The nodes of a graph come in the order of computation, and each weight knows its layer. The graph is cut where the layer
// changes; each piece is computed by an inner CPU or CUDA backend while that one layer is leased. Because the whole graph is seen
// ahead, flea is told the order before it starts. At most one lease is held by a stream at a time (two or more only
// for a node whose weights lie in several layers), it is given back before the next is taken, and none outlives the call: any
// number of contexts make progress with three slots.

#include <algorithm>
#include <chrono>
#include <thread>

#include "flea-device.hpp"

namespace ggml_flea {

bool wants_abort(const Stream * stream) {
    return stream && stream->abort_callback && stream->abort_callback(stream->abort_data);
}

bool is_computed(const ggml_tensor * node) { return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0; }

// rms_norm and the mul after it are one operation for the CPU backend as long as they are in one graph.
bool is_fused_pair(const ggml_tensor * first, const ggml_tensor * second) {
    return first->op == GGML_OP_RMS_NORM && second->op == GGML_OP_MUL && (second->src[0] == first || second->src[1] == first);
}

namespace {

constexpr int64_t wait_ns = 1000000000;  // one attempt; in between the host's abort callback is asked
constexpr std::chrono::seconds busy_limit { 120 };

// ---- cutting

bool can_cut_rows(const ggml_tensor * node, const Weight * weight) {
    const ggml_tensor * matrix = node->src[0];
    // ggml-cuda reads quantised rows in steps of 512, past the last one of a band: what lies there has to be numbers.
    if (wants_gpu() && ((ggml_is_quantized(matrix->type) && matrix->ne[0] % 512 != 0) || node->ne[2] != 1 || node->ne[3] != 1)) { return false; }
    return node->op == GGML_OP_MUL_MAT && weight_of(matrix) == weight && matrix->data == weight->data && matrix->ne[2] == 1 &&
           matrix->ne[3] == 1 && ggml_nbytes(matrix) == weight->bytes;
}

struct Use {
    Model * model = nullptr;
    int32_t layer = -1;
    int32_t layer_last = -1;
    Step::Kind kind = Step::plain;
};

// The layers one node needs. A cut weight as the matrix of MUL_MAT is computed piece by piece; anything else that
// needs more than one layer gets all of them together.
Use use_of(const ggml_tensor * node) {
    Use use;
    if (!is_computed(node)) { return use; }
    if (const Weight * table = table_of(node)) { return { table->model, -1, -1, Step::rows }; }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = node->src[i];
        const Weight * weight = src ? weight_of(src) : nullptr;
        if (!weight || weight->layer < 0) { continue; }
        if (!use.model) {
            use = { weight->model, weight->layer, weight->layer_last, weight->is_cut() ? Step::together : Step::plain };
            if (weight->is_cut() && i == 0 && can_cut_rows(node, weight)) { use.kind = Step::cut; }
            continue;
        }
        if (weight->layer == use.layer && weight->layer_last == use.layer_last) { continue; }
        use.layer = std::min(use.layer, weight->layer);
        use.layer_last = std::max(use.layer_last, weight->layer_last);
        use.kind = Step::together;
    }
    return use;
}

// A run of nodes: the weights of one layer, and the keys and values of one.
struct Piece {
    Use use;
    int32_t kv = -1;

    bool has_room_for(const Use & other, int32_t other_kv) const {
        const bool same_weights = !other.model || !use.model || (use.layer == other.layer && use.model == other.model);
        return same_weights && (other_kv < 0 || kv < 0 || kv == other_kv);
    }
    void add(const Use & other, int32_t other_kv) {
        if (other.model) { use = other; }
        if (other_kv >= 0) { kv = other_kv; }
    }
};

void push(std::vector<Step> & steps, int begin, int end, const Piece & piece) {
    const Use & use = piece.use;
    if (begin < end) { steps.push_back({ begin, end, use.model, use.layer, use.layer_last, use.kind, piece.kv }); }
}

void cut_graph(ggml_cgraph * graph, std::vector<Step> & steps) {
    steps.clear();
    const int count = ggml_graph_n_nodes(graph);
    int begin = 0;
    Piece piece;
    for (int i = 0; i < count; ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const Use use = use_of(node);
        const int32_t kv = kv_layer_of(node);
        if (!use.model && kv < 0) { continue; }
        if (use.kind != Step::plain) {
            push(steps, begin, i, piece);
            push(steps, i, i + 1, { use, kv });
            begin = i + 1;
            piece = Piece();
            continue;
        }
        // Nodes before a piece's first weight belong to it.
        if (!piece.has_room_for(use, kv)) {
            const int cut = i > begin && is_fused_pair(ggml_graph_node(graph, i - 1), node) ? i - 1 : i;
            push(steps, begin, cut, piece);
            begin = cut;
            piece = Piece();
        }
        piece.add(use, kv);
    }
    push(steps, begin, count, piece);
}

// ---- hints

void tell_order(Stream & stream) {
    Model * model = nullptr;
    stream.order.clear();
    for (const Step & step : stream.steps) {
        if (!step.model || step.kind == Step::rows) { continue; }
        model = step.model;
        for (int32_t layer = step.layer; layer <= step.layer_last; ++layer) {
            if (stream.order.empty() || stream.order.back() != (uint32_t) layer) { stream.order.push_back((uint32_t) layer); }
        }
    }
    if (!model) { return; }
    model_before_acquire(model);  // the first hint makes the plan as much as the first acquire would
    std::lock_guard<std::mutex> guard(model->hint_mutex);
    if (model->last_hint[stream.place] == stream.order) { return; }
    const int32_t status = flea_hint(model->handle, stream.order.data(), stream.order.size());
    if (status != FLEA_OK) {  // costs waits, never wrong bytes
        log_line(LogLevel::debug, "hint: %s", flea_last_error());
        return;
    }
    model->last_hint[stream.place] = stream.order;
}

// A graph that ended early leaves the engine in the middle of its order: the next one says it anew.
void forget_order(const Stream & stream) {
    for (const Step & step : stream.steps) {
        if (!step.model) { continue; }
        std::lock_guard<std::mutex> guard(step.model->hint_mutex);
        step.model->last_hint[stream.place].clear();
        return;
    }
}

// ---- computing

// The same operation on a band of rows of its matrix: strides of the result stay, so each band lands in its place. On a GPU
// one column of the result at a time, for cuBLAS writes none whose columns lie apart: the band is read again for each, but it is
// in VRAM by then.
struct Bands {
    ggml_tensor matrix;
    std::vector<ggml_tensor> inputs;
    std::vector<ggml_tensor> results;
    std::vector<ggml_tensor *> nodes;

    Bands(const ggml_tensor * node, int64_t first, int64_t end)
        : matrix(*node->src[0]), inputs(gpu() ? (size_t) node->ne[1] : 1, *node->src[1]), results(inputs.size(), *node) {
        matrix.data  = (char *) matrix.data + first * (int64_t) matrix.nb[1];
        matrix.ne[1] = end - first;
        matrix.nb[2] = matrix.nb[3] = matrix.nb[1] * (size_t) matrix.ne[1];
        for (size_t column = 0; column < results.size(); ++column) {
            ggml_tensor & result = results[column];
            result.data  = (char *) result.data + first * (int64_t) result.nb[0] + column * result.nb[1];
            result.ne[0] = end - first;
            result.src[0] = &matrix;
            result.src[1] = &inputs[column];
            inputs[column].data = (char *) inputs[column].data + column * inputs[column].nb[1];
            if (results.size() > 1) { inputs[column].ne[1] = result.ne[1] = 1; }
            nodes.push_back(&result);
        }
    }
    Bands(const Bands &) = delete;
    Bands & operator=(const Bands &) = delete;
};

ggml_status compute_cut(Stream & stream, ggml_cgraph * graph, const Step & step, Lease & lease, int32_t * status) {
    ggml_tensor * node = ggml_graph_node(graph, step.begin);
    const Weight * weight = weight_of(node->src[0]);
    const int64_t rows = node->src[0]->ne[1];
    const int64_t rows_per_layer = (int64_t) weight->rows_per_layer;
    for (int32_t layer = step.layer; layer <= step.layer_last; ++layer) {
        const int64_t first = (int64_t) (layer - step.layer) * rows_per_layer;
        const int64_t end = layer == step.layer_last ? rows : std::min(rows, first + rows_per_layer);
        *status = lease.take(step.model, (uint32_t) layer, &stream);
        if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }

        Bands bands(node, first, end);
        const ggml_status computed = compute_instead(stream, graph, step.begin, bands.nodes);
        if (computed != GGML_STATUS_SUCCESS) { return computed; }
    }
    return GGML_STATUS_SUCCESS;
}

// All layers of the step at once, in ascending order. When flea says that the slots cannot all be had, everything is
// given back before the next try: two streams in here never wait for each other.
int32_t take_together(const Step & step, const Stream & stream, std::vector<std::unique_ptr<Lease>> & leases) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
        int32_t status = FLEA_OK;
        for (int32_t layer = step.layer; layer <= step.layer_last && status == FLEA_OK; ++layer) {
            leases.push_back(std::make_unique<Lease>());
            leases.back()->bind(&stream);
            status = leases.back()->try_take(step.model, (uint32_t) layer);
        }
        if (status == FLEA_OK) { return status; }
        leases.clear();
        const bool retry = status == FLEA_E_BUSY || status == FLEA_E_TIMEOUT || status == FLEA_E_AGAIN;
        if (!retry || std::chrono::steady_clock::now() - start > busy_limit) { return status; }
        if (wants_abort(&stream)) { return FLEA_E_CANCELED; }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

ggml_status compute_together(Stream & stream, ggml_cgraph * graph, const Step & step, int32_t * status) {
    std::vector<std::unique_ptr<Lease>> leases;
    *status = take_together(step, stream, leases);
    if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
    return compute_nodes(stream, graph, step.begin, step.end);
}

ggml_status compute_step(Stream & stream, ggml_cgraph * graph, const Step & step, Lease & lease, int32_t * status) {
    switch (step.kind) {
        case Step::cut:
            return compute_cut(stream, graph, step, lease, status);
        case Step::together:
            lease.release();
            return compute_together(stream, graph, step, status);
        case Step::rows:
            return compute_rows(stream, graph, step, status);
        case Step::plain:
            break;
    }
    if (step.model) {
        if (has_routed(graph, step)) {
            // The first lease makes the plan, which says whether experts are fetched one by one.
            *status = lease.take(step.model, (uint32_t) step.layer, &stream);
            if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
            if (step.model->fetches_experts.load(std::memory_order_acquire)) { return compute_routed(stream, graph, step, status); }
        }
        if (waits_for_parts() && !lease.take_if_ready(step.model, (uint32_t) step.layer)) {
            return compute_arriving(stream, graph, step, lease, status);
        }
        *status = lease.take(step.model, (uint32_t) step.layer, &stream);
        if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
    }
    return compute_nodes(stream, graph, step.begin, step.end);
}

}  // namespace

ggml_status compute_nodes(Stream & stream, ggml_cgraph * graph, int begin, int end) {
    if (begin == end) { return GGML_STATUS_SUCCESS; }
    counters.pieces++;
    ggml_cgraph piece = ggml_graph_view(graph, begin, end);
    return ggml_backend_graph_compute_async(stream.inner, &piece);
}

ggml_status compute_instead(Stream & stream, ggml_cgraph * graph, int index, std::vector<ggml_tensor *> & nodes) {
    counters.pieces++;
    ggml_cgraph piece = ggml_graph_view(graph, index, index + 1);
    piece.nodes = nodes.data();
    piece.n_nodes = (int) nodes.size();
    return ggml_backend_graph_compute_async(stream.inner, &piece);
}

// ---- leases

int32_t Lease::try_take(Model * model, uint32_t layer) {
    if (model_ == model && layer_ == layer) { return FLEA_OK; }
    release();
    model_before_acquire(model);
    const int32_t status = flea_acquire(model->handle, layer, nullptr, 0, wait_ns);
    if (status == FLEA_OK) { hold(model, layer); }
    return status;
}

bool Lease::take_if_ready(Model * model, uint32_t layer) {
    if (model_ == model && layer_ == layer) { return true; }
    release();
    model_before_acquire(model);
    const int32_t status = flea_acquire(model->handle, layer, nullptr, 0, 0);
    // Anything but "not yet" is for the caller's own attempt to find and report.
    if (status != FLEA_OK) { return status != FLEA_E_AGAIN; }
    hold(model, layer);
    return true;
}

void Lease::hold(Model * model, uint32_t layer) {
    model_ = model;
    layer_ = layer;
    model_acquired(model);
}

int32_t Lease::take(Model * model, uint32_t layer, const Stream * stream) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
        const int32_t status = try_take(model, layer);
        if (status != FLEA_E_TIMEOUT && status != FLEA_E_BUSY) { return status; }
        if (wants_abort(stream)) { return FLEA_E_CANCELED; }
        // BUSY while this stream holds nothing: other threads of the host hold every slot, and they do come back.
        // TIMEOUT: the reader has its own deadline and turns a dead drive into an error.
        if (status == FLEA_E_BUSY) {
            if (std::chrono::steady_clock::now() - start > busy_limit) { return status; }
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }
}

void Lease::release() {
    if (!model_) { return; }
    int32_t status = FLEA_OK;
    if (stream_ && stream_->event) {
        // The slot is filled anew behind what the GPU was asked to do; nobody waits here. ggml-cuda keeps its event in `context`.
        ggml_backend_event_record(stream_->event, stream_->inner);
        status = flea_release_after(model_->handle, layer_, stream_->event->context);
        counters.releases_behind_gpu++;
        if (status != FLEA_OK) {
            // Nobody will wait for the GPU then but this thread.
            log_line(LogLevel::debug, "layer %u: %s", layer_, flea_last_error());
            ggml_backend_synchronize(stream_->inner);
            status = flea_release(model_->handle, layer_);
        }
    } else {
        if (stream_) { ggml_backend_synchronize(stream_->inner); }
        status = flea_release(model_->handle, layer_);
    }
    if (status != FLEA_OK) { fail_flea(status, "releasing layer " + std::to_string(layer_)); }
    model_ = nullptr;
}

// ---- the entry

namespace {

void report(Model & model, int32_t layer, int32_t status) {
    if (status == FLEA_E_REFUSED || status == FLEA_E_NOMEM) {
        // No plan: the same words for every decode that the host tries again are said once.
        fail_flea(status, model.path, model.refused.exchange(true) ? LogLevel::debug : LogLevel::error);
    } else {
        fail_flea(status, model.path + (layer < 0 ? ": rows of embeddings" : ": layer " + std::to_string(layer)));
    }
}

// Keys and values of a step are there, and what the step will write of them is told: before it is computed, because the rows
// count as written also where it fails half way.
bool with_kv_of(const Step & step, ggml_cgraph * graph, KvLease & kv, int32_t * status) {
    *status = kv.take(step.kv);
    if (*status == FLEA_OK) { *status = kv.wrote(graph, step); }
    if (*status != FLEA_OK && *status != FLEA_E_CANCELED && *status != FLEA_E_UNSUPPORTED) {  // the latter has been told
        fail(*status, "keys and values of layer " + std::to_string(step.kv) + " could not be brought into memory");
    }
    return *status == FLEA_OK;
}

}  // namespace

ggml_status graph_compute(Stream & stream, ggml_cgraph * graph) {
    counters.graphs++;
    cut_graph(graph, stream.steps);
    int32_t status = prepare_rows(graph, stream.steps);
    if (status != FLEA_OK) { return GGML_STATUS_FAILED; }
    const WeightsOnGpu on_gpu;
    tell_order(stream);
    tell_first_experts(stream, graph);
    Lease lease;
    lease.bind(&stream);
    KvLease kv;
    for (const Step & step : stream.steps) {
        // The CPU backend asks by itself while it computes.
        const bool is_aborted = gpu() && wants_abort(&stream);
        if (is_aborted) { status = FLEA_E_CANCELED; }
        const bool has_kv = !is_aborted && with_kv_of(step, graph, kv, &status);
        const ggml_status computed = has_kv ? compute_step(stream, graph, step, lease, &status) : GGML_STATUS_FAILED;
        if (computed == GGML_STATUS_SUCCESS) { continue; }
        const bool is_failure = has_kv && status != FLEA_OK && status != FLEA_E_CANCELED;
        if (is_failure) {
            report(*step.model, step.layer, status);
            // ggml-cuda ends the process at its next call when the GPU is lost: now or never.
            if (gpu() && status == FLEA_E_IO && is_configured()) { log_line(LogLevel::error, "layer %d: %s", step.layer, flea_last_error()); }
        }
        lease.release();
        ggml_backend_synchronize(stream.inner);
        forget_order(stream);
        forget_experts(stream);
        return status == FLEA_E_CANCELED ? GGML_STATUS_ABORTED : computed;
    }
    lease.release();
    ggml_backend_synchronize(stream.inner);  // to the host this device does nothing behind its back
    forget_experts(stream);
    sample_memory();
    return GGML_STATUS_SUCCESS;
}

}  // namespace ggml_flea
