// Experts that are fetched one by one: the graph runs up to a MUL_MAT_ID, the ids that the router chose are read, exactly
// those experts are leased, and the graph goes on.
//
// All operations of a layer that follow the same ids (gate, up, down) are served by one lease where the cache has room for
// it, so that their reads are in flight together; what is missing for the last of them still arrives while the others are
// computed. Where it has not, as for the many experts that a long prompt needs, each
// operation is computed in groups of experts: the rows of a group are copied out, multiplied, and copied back. The CPU
// backend multiplies the rows of one expert at a time, and all rows of an expert are in one group, so the result is the same
// to the last bit.
//
// A long batch chooses nearly all experts of every layer, whatever the router says: then flea is told to read the next
// layer's while this one is computed.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

constexpr int64_t wait_ns = 1000000000;  // one attempt; in between the host's abort callback is asked
constexpr std::chrono::seconds busy_limit { 120 };
// Below this share of a layer's experts, reading all of them ahead reads too much that nobody uses.
constexpr double whole_layer_share = 0.9;
// What the rows of a group may take: half of what a budget holds back for things nobody counted (32 MiB).
constexpr size_t scratch_bytes_max = 16u << 20;

const Weight * routed_weight(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT_ID || !is_computed(node)) { return nullptr; }
    const Weight * weight = weight_of(node->src[0]);
    return weight && weight->experts ? weight : nullptr;
}

// Where one expert lies.
flea_range range_of(const ggml_tensor * node, int32_t expert) {
    const ggml_tensor * stack = node->src[0];
    return { (const char *) stack->data + (size_t) expert * stack->nb[2], stack->nb[2] };
}

int next_routed(ggml_cgraph * graph, int begin, int end) {
    int i = begin;
    while (i < end && !routed_weight(ggml_graph_node(graph, i))) { ++i; }
    return i;
}

// Calls visit(index) for the operations in [begin, end) that follow the ids which the one at `begin` follows; ends where other
// ids are followed, and returns where that is.
template <typename Visit> int visit_routed(ggml_cgraph * graph, int begin, int end, Visit visit) {
    const ggml_tensor * first = ggml_graph_node(graph, begin);
    int i = begin;
    for (; i < end; ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!routed_weight(node)) { continue; }
        if (node->src[2] != first->src[2] || node->src[0]->ne[2] != first->src[0]->ne[2]) { break; }
        visit(i);
    }
    return i;
}

// A lease on experts; given back by the destructor.
class ExpertLease {
  public:
    explicit ExpertLease(Model * model) : model_(model) {}
    ExpertLease(const ExpertLease &) = delete;
    ExpertLease & operator=(const ExpertLease &) = delete;
    ~ExpertLease() { release(); }

    std::vector<flea_range> ranges;  // fill, then take

    // Has what is missing read. FLEA_OK: nothing is, and all of them are leased. FLEA_E_REFUSED: they do not fit into the cache
    // together.
    int32_t ask() {
        const int32_t status = flea_acquire_ranges(model_->handle, ranges.data(), ranges.size(), 0);
        held_ = status == FLEA_OK;
        return status;
    }

    int32_t take(const Stream & stream) {
        const auto start = std::chrono::steady_clock::now();
        for (;;) {
            const int32_t status = flea_acquire_ranges(model_->handle, ranges.data(), ranges.size(), wait_ns);
            held_ = status == FLEA_OK;
            if (status != FLEA_E_TIMEOUT && status != FLEA_E_BUSY) { return status; }
            if (wants_abort(&stream)) { return FLEA_E_CANCELED; }
            if (status == FLEA_E_BUSY && std::chrono::steady_clock::now() - start > busy_limit) { return status; }
        }
    }

    void release() {
        if (!held_) { return; }
        held_ = false;
        const int32_t status = flea_release_ranges(model_->handle, ranges.data(), ranges.size());
        if (status != FLEA_OK) { fail_flea(status, "releasing experts"); }
    }

  private:
    Model * model_;
    bool held_ = false;
};

// The experts that the ids name, ascending, and how often each. False for an id that no expert has.
bool chosen(const ggml_tensor * node, std::vector<int32_t> & experts, std::vector<int64_t> & uses) {
    const ggml_tensor * ids = node->src[2];
    const int64_t count = node->src[0]->ne[2];
    uses.assign((size_t) count, 0);
    experts.clear();
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + (size_t) token * ids->nb[1] + (size_t) slot * ids->nb[0]);
            if (id < 0 || id >= count) {
                fail(FLEA_E_INVALID, std::string("'") + node->name + "': the router chose expert " + std::to_string(id) + ", and '" +
                                         node->src[0]->name + "' has " + std::to_string(count));
                return false;
            }
            if (uses[(size_t) id]++ == 0) { experts.push_back(id); }
        }
    }
    std::sort(experts.begin(), experts.end());
    return true;
}

// ---- in groups

struct Pair { int64_t token, slot; };

void set_shape(ggml_tensor & tensor, void * data, int64_t columns, int64_t rows, int64_t layers) {
    tensor.data = data;
    tensor.view_src = nullptr;
    tensor.view_offs = 0;
    tensor.ne[0] = columns;
    tensor.ne[1] = rows;
    tensor.ne[2] = layers;
    tensor.ne[3] = 1;
    tensor.nb[0] = ggml_type_size(tensor.type);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) { tensor.nb[i] = tensor.nb[i - 1] * (size_t) tensor.ne[i - 1]; }
}

// The rows of a node that belong to the experts of a group, as an operation of their own.
ggml_status compute_rows(Stream & stream, ggml_cgraph * graph, int index, const std::vector<bool> & in_group) {
    ggml_tensor * node = ggml_graph_node(graph, index);
    const ggml_tensor * input = node->src[1];
    const ggml_tensor * ids = node->src[2];
    std::vector<Pair> pairs;
    std::vector<int32_t> group_ids;
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + (size_t) token * ids->nb[1] + (size_t) slot * ids->nb[0]);
            if (!in_group[(size_t) id]) { continue; }
            pairs.push_back({ token, slot });
            group_ids.push_back(id);
        }
    }
    const size_t in_bytes = (size_t) input->ne[0] * ggml_type_size(input->type);
    const size_t out_bytes = (size_t) node->ne[0] * sizeof(float);
    std::vector<char> rows_in(in_bytes * pairs.size());
    std::vector<char> rows_out(out_bytes * pairs.size());
    for (size_t i = 0; i < pairs.size(); ++i) {
        const char * row = (const char *) input->data + (size_t) (pairs[i].slot % input->ne[1]) * input->nb[1] +
                           (size_t) pairs[i].token * input->nb[2];
        memcpy(rows_in.data() + i * in_bytes, row, in_bytes);
    }
    const int64_t count = (int64_t) pairs.size();
    ggml_tensor group_input = *input;
    set_shape(group_input, rows_in.data(), input->ne[0], 1, count);
    ggml_tensor group_chosen = *ids;
    set_shape(group_chosen, group_ids.data(), 1, count, 1);
    ggml_tensor result = *node;
    set_shape(result, rows_out.data(), node->ne[0], 1, count);
    result.src[1] = &group_input;
    result.src[2] = &group_chosen;
    std::vector<ggml_tensor *> nodes { &result };
    const ggml_status computed = compute_instead(stream, graph, index, nodes);
    if (computed != GGML_STATUS_SUCCESS) { return computed; }
    for (size_t i = 0; i < pairs.size(); ++i) {
        char * row = (char *) node->data + (size_t) pairs[i].slot * node->nb[1] + (size_t) pairs[i].token * node->nb[2];
        memcpy(row, rows_out.data() + i * out_bytes, out_bytes);
    }
    return computed;
}

// The end of the group that begins at `first`: at most `most` experts, whose rows take no more than the scratch memory.
size_t group_end(const ggml_tensor * node, const std::vector<int32_t> & experts, const std::vector<int64_t> & uses, size_t first,
                 size_t most) {
    const size_t row_bytes = ((size_t) node->src[1]->ne[0] + (size_t) node->ne[0]) * sizeof(float);
    size_t bytes = 0;
    size_t end = first;
    while (end < experts.size() && end - first < most) {
        bytes += (size_t) uses[(size_t) experts[end]] * row_bytes;
        if (bytes > scratch_bytes_max && end > first) { break; }
        ++end;
    }
    return end;
}

void fill(std::vector<flea_range> & ranges, const ggml_tensor * node, const std::vector<int32_t> & experts, size_t first, size_t end) {
    ranges.clear();
    for (size_t i = first; i < end; ++i) { ranges.push_back(range_of(node, experts[i])); }
}

// One operation, so many experts at a time as the cache takes; while a group is computed the next one is read.
ggml_status compute_groups(Stream & stream, ggml_cgraph * graph, int index, Model * model, const std::vector<int32_t> & experts,
                           const std::vector<int64_t> & uses, int32_t * status) {
    const ggml_tensor * node = ggml_graph_node(graph, index);
    size_t most = experts.size();
    bool is_sized = false;
    std::vector<bool> in_group;
    std::vector<flea_range> next;
    for (size_t first = 0; first < experts.size();) {
        ExpertLease lease(model);
        size_t end = 0;
        for (;;) {
            end = group_end(node, experts, uses, first, most);
            fill(lease.ranges, node, experts, first, end);
            *status = lease.take(stream);
            if (*status != FLEA_E_REFUSED || most == 1) { break; }
            most = (most + 1) / 2;
        }
        if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
        if (end - first == experts.size()) { return compute_nodes(stream, graph, index, index + 1); }
        if (!is_sized) {
            // Room for the next group beside this one.
            most = std::max<size_t>(1, std::min(most, end - first) / 2);
            is_sized = true;
        }
        if (end < experts.size()) {
            fill(next, node, experts, end, group_end(node, experts, uses, end, most));
            // Begun, or there is no room: the group's own turn will tell.
            if (flea_acquire_ranges(model->handle, next.data(), next.size(), 0) == FLEA_OK) {
                flea_release_ranges(model->handle, next.data(), next.size());
            }
        }
        in_group.assign((size_t) node->src[0]->ne[2], false);
        for (size_t i = first; i < end; ++i) { in_group[(size_t) experts[i]] = true; }
        const ggml_status computed = compute_rows(stream, graph, index, in_group);
        counters.expert_groups++;
        if (computed != GGML_STATUS_SUCCESS) { return computed; }
        first = end;
    }
    return GGML_STATUS_SUCCESS;
}

// ---- ahead

// The share of a layer's experts that an operation uses if its tokens choose evenly and each for itself.
double even_share(const ggml_tensor * node) {
    const double one = (double) node->src[2]->ne[0] / (double) node->src[0]->ne[2];
    return 1.0 - std::pow(1.0 - one, (double) node->src[2]->ne[1]);
}

// Tells flea to read `now`, and then all experts of the operations that follow the next router after `from`, if nearly all of
// them will be chosen.
void tell_next(Stream & stream, ggml_cgraph * graph, int from, const std::vector<flea_range> & now) {
    if (!stream.reads_ahead) { return; }
    const int count = ggml_graph_n_nodes(graph);
    const int next = next_routed(graph, from, count);
    if (next == count) { return; }
    const ggml_tensor * node = ggml_graph_node(graph, next);
    if (std::min(even_share(node), stream.chosen_share) < whole_layer_share) { return; }
    stream.ahead = now;
    visit_routed(graph, next, count, [&](int index) {
        const Weight * weight = routed_weight(ggml_graph_node(graph, index));
        stream.ahead.push_back({ weight->data, weight->bytes });
    });
    stream.hinted = routed_weight(node)->model;
    if (flea_hint_ranges(stream.hinted->handle, stream.ahead.data(), stream.ahead.size()) != FLEA_OK) {
        log_line(LogLevel::debug, "hint: %s", flea_last_error());  // costs waits, never wrong bytes
    }
}

// The same with a guess at what a few tokens will choose.
void tell_guess(Stream & stream, ggml_cgraph * graph, int from, const ggml_tensor * ids) {
    const int count = ggml_graph_n_nodes(graph);
    const int next = stream.guesses_experts ? next_routed(graph, from, count) : count;
    if (next == count || !guess_choice(stream, ids, ggml_graph_node(graph, next)->src[2])) { return; }
    stream.ahead.clear();
    visit_routed(graph, next, count, [&](int index) {
        for (const int32_t expert : stream.guess) { stream.ahead.push_back(range_of(ggml_graph_node(graph, index), expert)); }
    });
    stream.hinted = routed_weight(ggml_graph_node(graph, next))->model;
    if (flea_hint_ranges(stream.hinted->handle, stream.ahead.data(), stream.ahead.size()) != FLEA_OK) {
        log_line(LogLevel::debug, "hint: %s", flea_last_error());
    }
}

// How many of its experts a long batch has chosen is the best guess for the next layer.
void note_choice(Stream & stream, const ggml_tensor * node, size_t chosen_count) {
    if (even_share(node) < whole_layer_share) { return; }
    stream.chosen_share = (double) chosen_count / (double) node->src[0]->ne[2];
}

// ---- all at once

// An operation, and where its ranges begin among those of all that follow the same ids.
struct Last { int index; size_t first_range; };

// Computes what comes before the last operation. After it the lease is to be taken for the last one.
ggml_status compute_before(Stream & stream, ggml_cgraph * graph, int begin, const Last & last, ExpertLease & lease, int32_t * status) {
    std::vector<flea_range> rest(lease.ranges.begin() + (ptrdiff_t) last.first_range, lease.ranges.end());
    lease.ranges.resize(last.first_range);
    *status = lease.take(stream);
    if (*status != FLEA_OK) { return GGML_STATUS_FAILED; }
    const ggml_status computed = compute_nodes(stream, graph, begin, last.index);
    // Before more is waited for: two threads that keep some could wait for each other.
    lease.release();
    lease.ranges = std::move(rest);
    if (computed == GGML_STATUS_SUCCESS) { *status = FLEA_E_AGAIN; }
    return computed;
}

}  // namespace

bool has_routed(ggml_cgraph * graph, const Step & step) {
    return next_routed(graph, step.begin, step.end) < step.end;
}

void tell_first_experts(Stream & stream, ggml_cgraph * graph) { tell_next(stream, graph, 0, {}); }

void forget_experts(Stream & stream) {
    if (!stream.hinted) { return; }
    flea_hint_ranges(stream.hinted->handle, nullptr, 0);
    stream.hinted = nullptr;
}

ggml_status compute_routed(Stream & stream, ggml_cgraph * graph, const Step & step, int32_t * status) {
    std::vector<int32_t> experts;
    std::vector<int64_t> uses;
    for (int at = step.begin; at < step.end;) {
        const int routed = next_routed(graph, at, step.end);
        ggml_status computed = compute_nodes(stream, graph, at, routed);
        if (computed != GGML_STATUS_SUCCESS || routed == step.end) { return computed; }
        counters.expert_cuts++;
        const ggml_tensor * node = ggml_graph_node(graph, routed);
        if (!chosen(node, experts, uses)) { return GGML_STATUS_FAILED; }

        // Everything that follows the same ids, up to where others are needed.
        ExpertLease lease(step.model);
        Last last { routed, 0 };
        const int end = visit_routed(graph, routed, step.end, [&](int index) {
            last = { index, lease.ranges.size() };
            for (const int32_t expert : experts) { lease.ranges.push_back(range_of(ggml_graph_node(graph, index), expert)); }
        });
        judge_guess(stream, node->src[2], experts);
        note_choice(stream, node, experts.size());
        tell_next(stream, graph, end, lease.ranges);
        // The last layer of a batch of which nobody wants a result has no rows.
        *status = experts.empty() ? FLEA_OK : lease.ask();
        int begin = *status == FLEA_OK || *status == FLEA_E_REFUSED ? routed : last.index;
        if (begin > routed) {
            computed = compute_before(stream, graph, routed, last, lease, status);
            if (*status == FLEA_E_REFUSED) {
                begin = routed;
            } else if (computed != GGML_STATUS_SUCCESS) {
                return computed;
            }
        }
        if (*status != FLEA_OK && *status != FLEA_E_REFUSED) { *status = lease.take(stream); }
        if (*status == FLEA_OK) {
            tell_guess(stream, graph, end, node->src[2]);
            computed = compute_nodes(stream, graph, begin, end);
            at = end;
        } else if (*status == FLEA_E_REFUSED) {
            // Not even one layer's fit: what is read ahead would only be in the way of the groups.
            stream.reads_ahead = false;
            forget_experts(stream);
            // What comes before `begin` is computed, and its inputs may be gone.
            computed = compute_groups(stream, graph, begin, step.model, experts, uses, status);
            at = begin + 1;
        } else {
            return GGML_STATUS_FAILED;
        }
        if (computed != GGML_STATUS_SUCCESS) { return computed; }
    }
    return GGML_STATUS_SUCCESS;
}

int32_t read_experts(const Weight * weight, uint64_t from, uint64_t to, char * data) {
    const uint64_t each = weight->bytes / weight->experts;
    for (uint64_t at = from; at < to;) {
        const uint64_t end = std::min(to, (at / each + 1) * each);
        const flea_range range = { (const char *) weight->data + at, end - at };
        const int32_t status = flea_acquire_ranges(weight->model->handle, &range, 1, -1);
        if (status != FLEA_OK) { return status; }
        memcpy(data + (at - from), range.addr, range.bytes);
        flea_release_ranges(weight->model->handle, &range, 1);
        at = end;
    }
    return FLEA_OK;
}

}  // namespace ggml_flea
