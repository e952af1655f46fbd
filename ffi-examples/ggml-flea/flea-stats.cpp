// Counters and FLEA_STATS: one JSON object, with the names of `flea run --json`, written when the process ends, also after
// a failure. It is written to a temporary file and renamed, so that a reader sees all of it or nothing.

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "flea-device.hpp"

namespace ggml_flea {

Counters counters;

namespace {

struct Snapshot {
    std::mutex mutex;
    bool taken = false;
    std::string path;
    flea_info info = {};
    flea_stats_data stats = {};
    uint32_t layers_placed = 0;
};

Snapshot & snapshot() {
    static Snapshot * instance = new Snapshot;
    return *instance;
}

// Anonymous, shared and huge memory of this process now; page cache it has mapped is not its own.
uint64_t process_memory_bytes() {
    FILE * file = fopen("/proc/self/status", "re");
    if (!file) { return 0; }
    char line[256];
    uint64_t total = 0;
    while (fgets(line, sizeof(line), file)) {
        unsigned long long kilobytes = 0;
        if (sscanf(line, "RssAnon: %llu", &kilobytes) == 1 || sscanf(line, "RssShmem: %llu", &kilobytes) == 1 ||
            sscanf(line, "HugetlbPages: %llu", &kilobytes) == 1) {
            total += kilobytes * 1024;
        }
    }
    fclose(file);
    return total;
}

std::string quoted(const std::string & text) {
    std::string result = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            result += '\\';
            result += c;
        } else if ((unsigned char) c < 0x20) {
            char escape[8];
            snprintf(escape, sizeof(escape), "\\u%04x", (unsigned) (unsigned char) c);
            result += escape;
        } else {
            result += c;
        }
    }
    return result + "\"";
}

class Object {
  public:
    void raw(const char * name, const std::string & value) {
        text_ += (text_.empty() ? "{" : ",") + quoted(name) + ":" + value;
    }
    void number(const char * name, uint64_t value) { raw(name, std::to_string(value)); }
    void real(const char * name, double value) {
        char text[64];
        snprintf(text, sizeof(text), "%.6g", value);
        raw(name, text);
    }
    void string(const char * name, const std::string & value) { raw(name, quoted(value)); }
    void boolean(const char * name, bool value) { raw(name, value ? "true" : "false"); }
    std::string finish() const { return text_ + "}\n"; }

  private:
    std::string text_;
};

std::string fallback_list(uint32_t bits) {
    static const struct { uint32_t bit; const char * name; } names[] = {
        { FLEA_FALLBACK_BUFFERED, "buffered" },
        { FLEA_FALLBACK_PREAD, "pread" },
        { FLEA_FALLBACK_SMALL_PAGES, "small_pages" },
        { FLEA_FALLBACK_NUMA, "numa" },
        { FLEA_FALLBACK_MIRROR, "mirror" },
        { FLEA_FALLBACK_GDS, "gds" },
    };
    std::string list;
    for (const auto & entry : names) {
        if (bits & entry.bit) { list += (list.empty() ? "" : ",") + quoted(entry.name); }
    }
    return "[" + list + "]";
}

std::string json(const Snapshot & s) {
    const flea_info & info = s.info;
    const flea_stats_data & stats = s.stats;
    const double read_seconds = (double) stats.read_ns / 1e9;
    Object object;
    object.string("device", "FLEA");
    object.string("model", s.path);
    object.number("model_bytes", info.model_bytes);
    object.number("total_bytes", info.total_bytes);
    object.number("host_bytes", info.host_bytes);
    object.number("weight_budget_bytes", info.weight_budget_bytes);
    object.number("resident_bytes", info.resident_bytes);
    object.number("streamed_bytes_per_pass", info.streamed_bytes_per_pass);
    object.number("loader_bytes", counters.loader_bytes);
    object.raw("fallbacks", fallback_list(stats.fallbacks));
    object.number("bytes_read", stats.bytes_read);
    object.real("read_gb_per_second", read_seconds > 0 ? (double) stats.bytes_read / 1e9 / read_seconds : 0);
    object.real("stall_seconds", (double) stats.stall_ns / 1e9);
    object.number("acquires", stats.acquires);
    object.number("loads", stats.loads);
    object.string("reader", stats.reader == FLEA_READER_PREAD ? "pread" : stats.reader == FLEA_READER_IO_URING ? "io_uring" : "none");
    object.boolean("direct_io", stats.direct_io != 0);
    object.number("page_bytes", stats.page_bytes);
    object.real("huge_page_share", stats.huge_page_share);
    object.number("peak_memory_bytes", counters.peak_memory_bytes);
    object.number("mispredicts", stats.mispredicts);
    object.number("layers", info.layer_count);
    object.number("layers_placed", s.layers_placed);
    object.number("placed_tensors", counters.placed_tensors);
    object.number("placed_bytes", counters.placed_bytes);
    object.number("host_tensor_bytes", info.host_tensor_bytes);
    object.number("graphs", counters.graphs);
    object.number("pieces", counters.pieces);
    object.number("early_pieces", counters.early_pieces);
    object.number("expert_cache_bytes", info.expert_cache_bytes);
    object.number("expert_hits", stats.expert_hits);
    object.number("expert_misses", stats.expert_misses);
    object.number("expert_bytes_read", stats.expert_bytes_read);
    object.number("expert_cuts", counters.expert_cuts);
    object.number("expert_groups", counters.expert_groups);
    object.number("rows_bytes", info.rows_bytes);
    object.number("rows", stats.rows);
    object.number("row_reads", stats.row_reads);
    object.number("row_bytes_read", stats.row_bytes_read);
    object.number("row_cuts", counters.row_cuts);
    object.number("expert_reads_ahead", stats.expert_reads_ahead);
    object.number("expert_bytes_read_ahead", stats.expert_bytes_read_ahead);
    object.number("expert_bytes_unused", stats.expert_bytes_unused);
    object.number("expert_guesses", counters.expert_guesses);
    object.number("expert_guesses_right", counters.expert_guesses_right);
    object.number("gpus", info.gpu_count);
    object.number("vram_budget_bytes", info.vram_budget_bytes);
    object.number("vram_resident_bytes", info.vram_resident_bytes);
    object.number("vram_ring_bytes", info.vram_ring_bytes);
    object.number("link_bytes_per_pass", info.link_bytes_per_pass);
    object.number("h2d_bytes", stats.h2d_bytes);
    object.number("h2d_pinned_bytes", stats.h2d_pinned_bytes);
    object.number("h2d_resident_bytes", stats.h2d_resident_bytes);
    object.number("pinned_bytes", stats.pinned_bytes);
    object.number("releases_behind_gpu", counters.releases_behind_gpu);
    const char * text = nullptr;
    const int32_t status = ggml_backend_flea_last_failure(&text);
    object.raw("error", status == FLEA_OK ? "null" : "{\"status\":" + quoted(flea_status_name(status)) + ",\"message\":" + quoted(text) + "}");
    return object.finish();
}

bool write_all(const std::string & path, const std::string & text) {
    FILE * file = fopen(path.c_str(), "we");
    if (!file) { return false; }
    const bool written = fwrite(text.data(), 1, text.size(), file) == text.size();
    return fclose(file) == 0 && written;
}

void write_stats() {
    const std::string & path = environment().stats;
    const std::string temporary = path + ".tmp." + std::to_string(getpid());
    std::lock_guard<std::mutex> guard(snapshot().mutex);
    sample_memory();
    if (!write_all(temporary, json(snapshot())) || rename(temporary.c_str(), path.c_str()) != 0) {
        log_line(LogLevel::error, "FLEA_STATS=%s: %s", path.c_str(), strerror(errno));
        unlink(temporary.c_str());
    }
}

void at_end() {
    stats_current();
    if (!environment().stats.empty()) { write_stats(); }
}

}  // namespace

void sample_memory() {
    const uint64_t now = process_memory_bytes();
    uint64_t peak = counters.peak_memory_bytes.load(std::memory_order_relaxed);
    while (now > peak && !counters.peak_memory_bytes.compare_exchange_weak(peak, now)) {}
}

// The model with the most acquires is the one a reader of the file asks about; a model that was only looked at never
// replaces one that was used.
void stats_snapshot(Model * model) {
    flea_stats_data stats = {};
    stats.struct_size = sizeof(stats);
    flea_info info = {};
    info.struct_size = sizeof(info);
    if (flea_stats(model->handle, &stats) != FLEA_OK || flea_model_info(model->handle, &info) != FLEA_OK) { return; }
    info.architecture = nullptr;  // dies with the model
    std::lock_guard<std::mutex> guard(snapshot().mutex);
    if (snapshot().taken && stats.acquires < snapshot().stats.acquires) { return; }
    snapshot().taken = true;
    snapshot().path  = model->path;
    snapshot().info  = info;
    snapshot().layers_placed = placed_layers(*model);
    snapshot().stats = stats;
}

void stats_start() {
    static std::once_flag once;
    std::call_once(once, [] { atexit(at_end); });
}

}  // namespace ggml_flea

uint64_t ggml_backend_flea_releases_behind_gpu(void) { return ggml_flea::counters.releases_behind_gpu; }

uint64_t ggml_backend_flea_loader_bytes(void) { return ggml_flea::counters.loader_bytes; }

uint64_t ggml_backend_flea_expert_cuts(void) { return ggml_flea::counters.expert_cuts; }
uint64_t ggml_backend_flea_expert_guesses(uint64_t * right) {
    if (right) { *right = ggml_flea::counters.expert_guesses_right; }
    return ggml_flea::counters.expert_guesses;
}
uint64_t ggml_backend_flea_early_pieces(void) { return ggml_flea::counters.early_pieces; }
