// A layer that is still being read: compute starts with the part that is there.
//
// The transient part of a layer is the one that is used last, and what has been read of it may be leased range by range.
// So the nodes of a layer are computed in runs, each as far as its weights have arrived, and the wait is for the first
// weight that has not. Only where the layer is not ready: a layer that is there is computed in one piece.

#include <algorithm>
#include <vector>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

constexpr int64_t wait_ns = 1000000000;  // one attempt; in between the host's abort callback is asked

// The leases on ranges of one layer; all are given back together, after the last node that uses them.
class RangeLeases {
  public:
    RangeLeases(Model * model, uint32_t layer) : model_(model), layer_(layer) {}
    RangeLeases(const RangeLeases &) = delete;
    RangeLeases & operator=(const RangeLeases &) = delete;
    ~RangeLeases() {
        for (size_t i = 0; i < held_.size(); ++i) {
            const int32_t status = flea_release(model_->handle, layer_);
            if (status != FLEA_OK) { fail_flea(status, "releasing a part of layer " + std::to_string(layer_)); }
        }
    }

    // Leases every weight of a node. Stops at the first that cannot be had within timeout_ns.
    int32_t take_node(const ggml_tensor * node, int64_t timeout_ns) {
        if (!is_computed(node)) { return FLEA_OK; }
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            const Weight * weight = node->src[i] ? weight_of(node->src[i]) : nullptr;
            if (!weight || weight->layer < 0 || std::find(held_.begin(), held_.end(), weight) != held_.end()) { continue; }
            const int32_t status = flea_acquire(model_->handle, layer_, weight->data, weight->bytes, timeout_ns);
            if (status != FLEA_OK) { return status; }
            held_.push_back(weight);
        }
        return FLEA_OK;
    }

  private:
    Model * model_;
    uint32_t layer_;
    std::vector<const Weight *> held_;
};

bool is_patience(int32_t status) {
    return status == FLEA_E_AGAIN || status == FLEA_E_TIMEOUT || status == FLEA_E_BUSY;
}

// The end of the run of nodes from `begin` whose weights are there. Waits for those of the first node; *status says what
// went wrong when nothing can be computed.
int arrived_until(const Stream & stream, ggml_cgraph * graph, int begin, int end, RangeLeases & leases, int32_t * status) {
    // Two nodes that the CPU backend computes as one stay together.
    const bool fused = begin + 1 < end && is_fused_pair(ggml_graph_node(graph, begin), ggml_graph_node(graph, begin + 1));
    int at = begin + (fused ? 2 : 1);
    for (int i = begin; i < at; ++i) {
        while ((*status = leases.take_node(ggml_graph_node(graph, i), wait_ns)) != FLEA_OK) {
            if (!is_patience(*status)) { return begin; }
            if (wants_abort(&stream)) {
                *status = FLEA_E_CANCELED;
                return begin;
            }
        }
    }
    while (at < end && leases.take_node(ggml_graph_node(graph, at), 0) == FLEA_OK) { ++at; }
    if (at < end && at - 1 > begin && is_fused_pair(ggml_graph_node(graph, at - 1), ggml_graph_node(graph, at))) { --at; }
    return at;
}

}  // namespace

ggml_status compute_arriving(Stream & stream, ggml_cgraph * graph, const Step & step, Lease & lease, int32_t * status) {
    RangeLeases leases(step.model, (uint32_t) step.layer);
    for (int at = step.begin; at < step.end;) {
        const int until = arrived_until(stream, graph, at, step.end, leases, status);
        if (until == at) { return GGML_STATUS_FAILED; }
        const ggml_status computed = compute_nodes(stream, graph, at, until);
        if (computed != GGML_STATUS_SUCCESS) { return computed; }
        if (until < step.end) { counters.early_pieces++; }
        at = until;
    }
    // flea looks once more at the file when a layer is whole: a range was leased before that, so ask for the verdict.
    *status = lease.take(step.model, (uint32_t) step.layer, &stream);
    return *status == FLEA_OK ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

}  // namespace ggml_flea
