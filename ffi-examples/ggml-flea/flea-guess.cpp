// Guesses which experts the next layer's router will choose, so that the drive, idle while this layer is computed, reads them.
//
// The guess is the next router's own: its norm and its matrix, applied to the state that this layer's router saw, which a
// layer changes only a little. Computed here in plain loops, a fraction of what a piece of a graph costs to start; it need not
// be exact to the last bit, for a wrong guess costs time and never a wrong byte. Off unless the program asks for it, and it
// turns itself off where more of its guesses are wrong than right.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "flea-device.hpp"

namespace ggml_flea {
namespace {

// More tokens choose so many experts that there is little to guess.
constexpr int64_t tokens_max = 4;
// Guesses before the first look at how many were right.
constexpr uint64_t judged_after = 512;
// How far up a choice's sources its router is looked for.
constexpr int depth_max = 16;

// A choice of the plain kind: a matrix of floats times the scaled RMS norm of the state.
struct Router {
    const ggml_tensor * matrix = nullptr;
    const ggml_tensor * scale = nullptr;
    const ggml_tensor * norm = nullptr;
    const Weight * weight = nullptr;
};

bool is_float(const ggml_tensor * tensor) { return tensor->type == GGML_TYPE_F32 && tensor->nb[0] == sizeof(float); }

bool router_of(const ggml_tensor * ids, Router & router) {
    const ggml_tensor * node = ids;
    for (int depth = 0; node && depth < depth_max; ++depth, node = node->src[0]) {
        router.weight = node->op == GGML_OP_MUL_MAT && node->src[0] ? weight_of(node->src[0]) : nullptr;
        if (router.weight) { break; }
    }
    if (!router.weight) { return false; }
    router.matrix = node->src[0];
    const ggml_tensor * scaled = node->src[1];
    if (scaled->op != GGML_OP_MUL || scaled->src[0]->op != GGML_OP_RMS_NORM) { return false; }
    router.norm = scaled->src[0];
    router.scale = scaled->src[1];
    const Weight * scale = weight_of(router.scale);
    return scale && scale->layer == router.weight->layer && is_float(router.matrix) && is_float(router.scale) &&
           is_float(router.norm->src[0]) && router.matrix->ne[0] == router.norm->ne[0];
}

// Eight sums side by side, for the processor's vectors.
float dot(const float * a, const float * b, int64_t count) {
    float sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        for (int lane = 0; lane < 8; ++lane) { sums[lane] += a[i + lane] * b[i + lane]; }
    }
    float sum = 0;
    for (const float lane : sums) { sum += lane; }
    for (; i < count; ++i) { sum += a[i] * b[i]; }
    return sum;
}

// Appends the `used` experts that `router` would choose for one token's state.
void choose(const Router & router, const float * state, int64_t used, std::vector<int32_t> & experts) {
    const int64_t width = router.matrix->ne[0];
    const int64_t count = router.matrix->ne[1];
    float epsilon = 0;
    memcpy(&epsilon, router.norm->op_params, sizeof(epsilon));
    const float root = 1.0f / std::sqrt(dot(state, state, width) / (float) width + epsilon);
    std::vector<float> scaled((size_t) width);
    const float * scale = (const float *) router.scale->data;
    for (int64_t i = 0; i < width; ++i) { scaled[(size_t) i] = state[i] * root * scale[i]; }
    std::vector<std::pair<float, int32_t>> scores((size_t) count);
    for (int64_t i = 0; i < count; ++i) {
        const float * row = (const float *) ((const char *) router.matrix->data + (size_t) i * router.matrix->nb[1]);
        scores[(size_t) i] = { -dot(row, scaled.data(), width), (int32_t) i };
    }
    std::partial_sort(scores.begin(), scores.begin() + used, scores.end());
    for (int64_t i = 0; i < used; ++i) { experts.push_back(scores[(size_t) i].second); }
}

}  // namespace

void judge_guess(Stream & stream, const ggml_tensor * ids, const std::vector<int32_t> & chosen) {
    if (stream.guess.empty()) { return; }
    uint64_t right = 0;
    for (const int32_t expert : stream.guess) { right += std::binary_search(chosen.begin(), chosen.end(), expert); }
    const uint64_t all = stream.guess.size();
    const bool same = stream.guess_of == ids;
    stream.guess.clear();
    // What was not begun must not be in the way of what is needed now.
    forget_experts(stream);
    if (!same) { return; }
    counters.expert_guesses += all;
    counters.expert_guesses_right += right;
    stream.guessed += all;
    stream.guessed_right += right;
    if (stream.guessed >= judged_after && 2 * stream.guessed_right < stream.guessed) {
        stream.guesses_experts = false;
        log_line(LogLevel::info, "experts are guessed no more: %llu of %llu guesses were right",
                 (unsigned long long) stream.guessed_right, (unsigned long long) stream.guessed);
    }
}

bool guess_choice(Stream & stream, const ggml_tensor * ids, const ggml_tensor * next_ids) {
    if (!stream.guesses_experts || ids->ne[1] > tokens_max) { return false; }
    Router now, next;
    if (!router_of(ids, now) || !router_of(next_ids, next)) { return false; }
    const ggml_tensor * state = now.norm->src[0];
    if (state->ne[0] != next.matrix->ne[0] || next_ids->ne[1] > ggml_nrows(state) || next_ids->ne[0] > next.matrix->ne[1]) { return false; }
    Lease lease;
    if (!lease.take_if_ready(next.weight->model, (uint32_t) next.weight->layer) || !lease.is_held()) { return false; }
    // Where only the last rows go on to the next layer, those are guessed for.
    const int64_t first = ggml_nrows(state) - next_ids->ne[1];
    for (int64_t token = first; token < ggml_nrows(state); ++token) {
        choose(next, (const float *) ((const char *) state->data + (size_t) token * state->nb[1]), next_ids->ne[0], stream.guess);
    }
    std::sort(stream.guess.begin(), stream.guess.end());
    stream.guess.erase(std::unique(stream.guess.begin(), stream.guess.end()), stream.guess.end());
    stream.guess_of = next_ids;
    return !stream.guess.empty();
}

}  // namespace ggml_flea
