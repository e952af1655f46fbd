// FLEA_* variables, log lines and failures of the ggml device.
//
// Log lines go straight to stderr: several stock programs (llama-bench for one) throw ggml's own log away, and a device
// that streams less than it was asked to must be heard.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <strings.h>
#include <unistd.h>

#include "flea-device.hpp"

extern char ** environ;

namespace ggml_flea {
namespace {

constexpr const char * known_names[] = {
    "FLEA_MEMORY", "FLEA_MODEL", "FLEA_STATS", "FLEA_ENDPOINT", "FLEA_READER", "FLEA_LOG", "FLEA_FAULT", "FLEA_PROFILE",
    "FLEA_MIRROR", "FLEA_EXPERTS", "FLEA_VRAM", "FLEA_GPU", "FLEA_GGML_CUDA",
};

std::string variable(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

LogLevel parse_level(const std::string & text, std::string & error) {
    if (text.empty() || text == "warn") { return LogLevel::warn; }
    if (text == "off") { return LogLevel::off; }
    if (text == "error") { return LogLevel::error; }
    if (text == "info") { return LogLevel::info; }
    if (text == "debug" || text == "trace") { return LogLevel::debug; }
    error = "FLEA_LOG=" + text + ": expected off, error, warn, info or debug";
    return LogLevel::warn;
}

uint32_t parse_reader(const std::string & text, std::string & error) {
    if (text.empty() || text == "auto") { return FLEA_READER_AUTO; }
    if (text == "io_uring") { return FLEA_READER_IO_URING; }
    if (text == "pread") { return FLEA_READER_PREAD; }
    error = "FLEA_READER=" + text + ": expected auto, io_uring or pread";
    return FLEA_READER_AUTO;
}

bool parse_experts(const std::string & text, std::string & error) {
    if (text.empty() || text == "on") { return true; }
    if (text == "off") { return false; }
    error = "FLEA_EXPERTS=" + text + ": expected on or off";
    return true;
}

// Numbers of GPUs, each once.
std::vector<uint32_t> parse_gpus(const std::string & text, const std::string & vram, std::string & error) {
    std::vector<uint32_t> gpus;
    for (const char * at = text.c_str(); !text.empty();) {
        char * end = nullptr;
        const unsigned long index = strtoul(at, &end, 10);
        const bool is_number = *at >= '0' && *at <= '9' && (*end == '\0' || *end == ',') && index <= 1023;
        if (!is_number || std::count(gpus.begin(), gpus.end(), index) > 0 || gpus.size() == (size_t) gpus_max) {
            error = "FLEA_GPU=" + text + ": expected the number of a GPU, from 0, or of several, each once: 0,1";
            return { 0 };
        }
        gpus.push_back((uint32_t) index);
        if (*end == '\0') { break; }
        at = end + 1;
    }
    if (gpus.empty()) { return { 0 }; }
    if (vram.empty()) { error = "FLEA_GPU=" + text + " needs FLEA_VRAM: how much of its memory weights may take (8GiB, or 25%)"; }
    return gpus;
}

void warn_unknown(LogLevel level) {
    if (level < LogLevel::warn) { return; }
    for (char ** entry = environ; *entry != nullptr; ++entry) {
        if (strncmp(*entry, "FLEA_", 5) != 0) { continue; }
        const size_t length = strcspn(*entry, "=");
        bool known = false;
        for (const char * name : known_names) {
            known = known || (strlen(name) == length && strncmp(name, *entry, length) == 0);
        }
        if (!known) {
            fprintf(stderr, "flea: warning: %.*s is not a variable flea knows; did you mean one of FLEA_MEMORY, FLEA_MODEL, "
                    "FLEA_STATS, FLEA_ENDPOINT, FLEA_READER, FLEA_VRAM, FLEA_GPU, FLEA_PROFILE, FLEA_LOG?\n", (int) length, *entry);
        }
    }
}

Environment read_environment() {
    Environment result;
    result.memory   = variable("FLEA_MEMORY");
    result.mirrors  = variable("FLEA_MIRROR");
    result.model    = variable("FLEA_MODEL");
    result.stats    = variable("FLEA_STATS");
    result.endpoint = variable("FLEA_ENDPOINT");
    result.log      = parse_level(variable("FLEA_LOG"), result.error);
    result.reader   = parse_reader(variable("FLEA_READER"), result.error);
    result.experts  = parse_experts(variable("FLEA_EXPERTS"), result.error);
    result.vram      = variable("FLEA_VRAM");
    result.ggml_cuda = variable("FLEA_GGML_CUDA");
    result.gpu_list  = variable("FLEA_GPU");
    result.gpus      = parse_gpus(result.gpu_list, result.vram, result.error);
    warn_unknown(result.log);
    return result;
}

// "4GiB", "4GB", "512M", "123": bytes; 0 when it is a percentage or not a size. The engine parses it for real.
uint64_t size_estimate(const std::string & text) {
    char * end = nullptr;
    const double number = strtod(text.c_str(), &end);
    if (end == text.c_str() || number <= 0) { return 0; }
    while (*end == ' ') { ++end; }
    double unit = 1;
    const bool binary = *end != '\0' && (end[1] == '\0' || strcasecmp(end + 1, "ib") == 0);
    switch (*end) {
        case '\0': case 'b': case 'B': unit = 1; break;
        case 'k': case 'K': unit = binary ? 1024.0 : 1e3; break;
        case 'm': case 'M': unit = binary ? 1048576.0 : 1e6; break;
        case 'g': case 'G': unit = binary ? 1073741824.0 : 1e9; break;
        case 't': case 'T': unit = binary ? 1099511627776.0 : 1e12; break;
        default: return 0;
    }
    return (uint64_t) (number * unit);
}

uint64_t mem_available() {
    FILE * file = fopen("/proc/meminfo", "re");
    if (!file) { return 0; }
    char line[256];
    unsigned long long kilobytes = 0;
    while (fgets(line, sizeof(line), file) && sscanf(line, "MemAvailable: %llu", &kilobytes) != 1) {}
    fclose(file);
    return kilobytes * 1024;
}

// The limit of the memory cgroup this process is in (v1 or v2), or UINT64_MAX. Limits further up are the engine's business.
uint64_t cgroup_limit() {
    FILE * groups = fopen("/proc/self/cgroup", "re");
    if (!groups) { return UINT64_MAX; }
    char line[4096];
    std::string path;
    while (fgets(line, sizeof(line), groups)) {
        line[strcspn(line, "\n")] = '\0';
        const char * v1 = strstr(line, ":memory:");
        if (v1) {
            path = std::string("/sys/fs/cgroup/memory") + (v1 + 8) + "/memory.limit_in_bytes";
        } else if (strncmp(line, "0::", 3) == 0 && path.empty()) {
            path = std::string("/sys/fs/cgroup") + (line + 3) + "/memory.max";
        }
    }
    fclose(groups);
    unsigned long long limit = UINT64_MAX;
    FILE * file = path.empty() ? nullptr : fopen(path.c_str(), "re");
    if (file) {
        if (fscanf(file, "%llu", &limit) != 1) { limit = UINT64_MAX; }  // "max"
        fclose(file);
    }
    return limit;
}

struct Failure {
    std::mutex mutex;
    int32_t status = FLEA_OK;
    std::string text;
};

Failure & failure() {
    static Failure * instance = new Failure;  // outlives every static destructor: the stats writer reads it
    return *instance;
}

}  // namespace

const Environment & environment() {
    static const Environment * instance = new Environment(read_environment());
    return *instance;
}

void log_line(LogLevel level, const char * format, ...) {
    if (level > environment().log) { return; }
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    const char * prefix = level == LogLevel::error ? "error: " : level == LogLevel::warn ? "warning: " : "";
    fprintf(stderr, "flea: %s%s\n", prefix, text);
}

void fail(int32_t status, const std::string & what, LogLevel level) {
    {
        std::lock_guard<std::mutex> guard(failure().mutex);
        failure().status = status;
        failure().text   = what;
    }
    // A host that handed its model over asks for the failure and reports it in its own words.
    log_line(is_configured() ? LogLevel::debug : level, "%s", what.c_str());
}

void fail_flea(int32_t status, const std::string & doing, LogLevel level) {
    const char * text = flea_last_error();
    fail(status, doing + ": " + (text && *text ? text : flea_status_name(status)), level);
}

// Weights and KV cache share the budget. Where the model fits beside it, the rest of the budget is offered. Where it does not,
// each byte of KV cache is a byte streamed per pass, so a context that llama.cpp sizes by itself gets half of the budget;
// but the first 4 GiB are offered as far as any plan leaves them, and 512 MiB always, because with too little llama.cpp does
// not stop: it moves layers into ordinary memory. With too much the plan is refused, and says why.
uint64_t offered_bytes(uint64_t model_bytes, uint64_t smallest_weights_bytes) {
    constexpr uint64_t freely_bytes = 4ull << 30;
    constexpr uint64_t always_bytes = 512ull << 20;
    const std::string & memory = environment().memory;
    const bool percentage = !memory.empty() && memory.back() == '%';
    const uint64_t available = std::min(mem_available(), cgroup_limit());
    const auto rest = [](uint64_t total, uint64_t part) { return total > part ? total - part : 0; };
    if (percentage) {
        return rest(available, (uint64_t) ((double) model_bytes * strtod(memory.c_str(), nullptr) / 100.0));
    }
    const uint64_t total = memory.empty() ? available : size_estimate(memory);
    const uint64_t beside_streaming = std::min(rest(total, smallest_weights_bytes), std::max(total / 2, freely_bytes));
    return std::max({ rest(total, model_bytes), beside_streaming, always_bytes });
}

}  // namespace ggml_flea

int32_t ggml_backend_flea_last_failure(const char ** text) {
    using ggml_flea::failure;
    static thread_local std::string copy;
    std::lock_guard<std::mutex> guard(failure().mutex);
    copy = failure().text;
    if (text) { *text = copy.c_str(); }
    return failure().status;
}
