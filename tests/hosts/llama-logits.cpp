// A stock llama.cpp host for the tests: greedy generation through nothing but llama.h, raw logits to a file.
//
// Knows nothing of flea. It loads the backends like llama.cpp's own programs do (GGML_BACKEND_PATH included), runs the model on
// --device FLEA or on the CPU (--device none), without the repacked weight layouts, and writes one row of n_vocab f32 per
// generated token: the logits the token was chosen from, as `flea run --logits` does. Equal files mean bit-identical
// inference. --experts FILE writes which experts were chosen. With --contexts N, N threads generate with N contexts of one model and must all get the same rows.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

struct Options {
    std::string model;
    std::string output;
    std::string device = "none";
    std::string lora;
    std::string experts;
    std::string load_mode = "auto";
    std::string on_device;  // tensors whose names match are put on the device, as -ot does
    std::vector<llama_token> tokens;
    int generate = 8;
    int threads = 2;
    int ubatch = 512;
    int context = 512;
    int contexts = 1;
    int layers_on_device = -1;
    bool repack = false;
    bool verbose = false;
    llama_flash_attn_type flash_attention = LLAMA_FLASH_ATTN_TYPE_AUTO;
};

const char usage[] =
    "usage: llama-logits -m MODEL --prompt-tokens 1,5,9 [-n N] [-o LOGITS] [--device FLEA|FLEA0,FLEA1|none] [--threads N] [--ubatch N]\n"
    "                    [--ctx N] [--contexts N] [--ngl N] [--lora FILE] [--load-mode auto|none|mmap|dio] [--repack]\n"
    "                    [--flash-attn auto|on|off] [--experts FILE] [--on-device REGEX] [-v]\n";

std::vector<llama_token> parse_tokens(const std::string & text) {
    std::vector<llama_token> tokens;
    for (const char * at = text.c_str(); *at != '\0';) {
        char * end = nullptr;
        tokens.push_back((llama_token) strtol(at, &end, 10));
        if (end == at) { throw std::runtime_error("bad token list: " + text); }
        at = *end == ',' ? end + 1 : end;
    }
    return tokens;
}

llama_flash_attn_type parse_flash_attention(const std::string & text) {
    if (text == "on") { return LLAMA_FLASH_ATTN_TYPE_ENABLED; }
    if (text == "off") { return LLAMA_FLASH_ATTN_TYPE_DISABLED; }
    return LLAMA_FLASH_ATTN_TYPE_AUTO;
}

Options parse(int argc, char ** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (name == "--repack") { options.repack = true; continue; }
        if (name == "-v") { options.verbose = true; continue; }
        if (i + 1 >= argc) { throw std::runtime_error("unknown option or missing value: " + name); }
        const std::string value = argv[++i];
        if (name == "-m") { options.model = value; }
        else if (name == "-o") { options.output = value; }
        else if (name == "-n") { options.generate = std::stoi(value); }
        else if (name == "--prompt-tokens") { options.tokens = parse_tokens(value); }
        else if (name == "--device") { options.device = value; }
        else if (name == "--lora") { options.lora = value; }
        else if (name == "--experts") { options.experts = value; }
        else if (name == "--on-device") { options.on_device = value; }
        else if (name == "--load-mode") { options.load_mode = value; }
        else if (name == "--threads") { options.threads = std::stoi(value); }
        else if (name == "--ubatch") { options.ubatch = std::stoi(value); }
        else if (name == "--ctx") { options.context = std::stoi(value); }
        else if (name == "--contexts") { options.contexts = std::stoi(value); }
        else if (name == "--ngl") { options.layers_on_device = std::stoi(value); }
        else if (name == "--flash-attn") { options.flash_attention = parse_flash_attention(value); }
        else { throw std::runtime_error("unknown option: " + name); }
    }
    if (options.model.empty() || options.tokens.empty()) { throw std::runtime_error("a model and tokens are needed"); }
    return options;
}

struct Result {
    std::vector<llama_token> tokens;
    std::vector<float> logits;
    std::string error;
};

llama_token greedy(const float * row, int count) {
    int best = 0;
    for (int i = 1; i < count; ++i) {
        if (row[i] > row[best]) { best = i; }
    }
    return best;
}

// One line for each layer and token: the layer, then the experts that the router chose.
bool log_experts(ggml_tensor * tensor, bool ask, void * file) {
    const char prefix[] = "ffn_moe_topk-";
    if (strncmp(tensor->name, prefix, sizeof(prefix) - 1) != 0) { return !ask; }
    if (ask) { return true; }
    std::vector<int32_t> ids((size_t) tensor->ne[0]);
    for (int64_t token = 0; token < tensor->ne[1]; ++token) {
        ggml_backend_tensor_get(tensor, ids.data(), (size_t) token * tensor->nb[1], ids.size() * sizeof(int32_t));
        fputs(tensor->name + sizeof(prefix) - 1, (FILE *) file);
        for (const int32_t id : ids) { fprintf((FILE *) file, " %d", id); }
        fputc('\n', (FILE *) file);
    }
    return true;
}

void generate(llama_model * model, llama_adapter_lora * lora, const Options & options, Result & result) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) options.context;
    params.n_batch = (uint32_t) options.context;
    params.n_ubatch = (uint32_t) options.ubatch;
    params.n_threads = params.n_threads_batch = options.threads;
    params.flash_attn_type = options.flash_attention;
    FILE * experts = options.experts.empty() ? nullptr : fopen(options.experts.c_str(), "w");
    if (!options.experts.empty() && !experts) { result.error = "cannot write " + options.experts; return; }
    if (experts) {
        params.cb_eval = log_experts;
        params.cb_eval_user_data = experts;
    }
    llama_context * context = llama_init_from_model(model, params);
    if (!context) { result.error = "no context"; return; }
    if (lora) {
        float scale = 1.0f;
        llama_set_adapters_lora(context, &lora, 1, &scale);
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> batch = options.tokens;
    for (int i = 0; i < options.generate; ++i) {
        const int32_t status = llama_decode(context, llama_batch_get_one(batch.data(), (int32_t) batch.size()));
        if (status != 0) { result.error = "llama_decode: " + std::to_string(status); break; }
        const float * row = llama_get_logits_ith(context, -1);
        result.logits.insert(result.logits.end(), row, row + n_vocab);
        batch = { greedy(row, n_vocab) };
        result.tokens.push_back(batch[0]);
    }
    llama_free(context);
    if (experts && fclose(experts) != 0) { result.error = "cannot write " + options.experts; }
}

uint64_t fnv(const std::vector<float> & values) {
    uint64_t hash = 0xcbf29ce484222325ull;
    const auto * bytes = reinterpret_cast<const unsigned char *>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(float); ++i) { hash = (hash ^ bytes[i]) * 0x100000001b3ull; }
    return hash;
}

void write(const std::string & path, const std::vector<float> & values) {
    FILE * file = fopen(path.c_str(), "wb");
    if (!file || fwrite(values.data(), sizeof(float), values.size(), file) != values.size() || fclose(file) != 0) {
        throw std::runtime_error("cannot write " + path);
    }
}

std::vector<ggml_backend_dev_t> devices_of(const Options & options) {
    std::vector<ggml_backend_dev_t> devices;
    std::istringstream names(options.device == "none" ? "" : options.device);
    for (std::string name; std::getline(names, name, ',');) {
        devices.push_back(ggml_backend_dev_by_name(name.c_str()));
        if (!devices.back()) { throw std::runtime_error("no device " + name); }
    }
    devices.push_back(nullptr);
    return devices;
}

int run(const Options & options) {
    if (!options.verbose) {
        llama_log_set([](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) { fputs(text, stderr); }
        }, nullptr);
    }
    ggml_backend_load_all();
    llama_backend_init();
    std::vector<ggml_backend_dev_t> devices = devices_of(options);
    llama_model_params params = llama_model_default_params();
    params.devices = devices.data();
    params.n_gpu_layers = options.layers_on_device;
    params.use_extra_bufts = options.repack;
    llama_model_tensor_buft_override overrides[2] = {};
    if (!options.on_device.empty() && devices[0]) {
        overrides[0] = { options.on_device.c_str(), ggml_backend_dev_buffer_type(devices[0]) };
        params.tensor_buft_overrides = overrides;
    }
    params.load_mode = llama_load_mode_from_str(options.load_mode.c_str());
    llama_model * model = llama_model_load_from_file(options.model.c_str(), params);
    if (!model) { throw std::runtime_error("cannot load " + options.model); }
    llama_adapter_lora * lora = options.lora.empty() ? nullptr : llama_adapter_lora_init(model, options.lora.c_str());
    if (!options.lora.empty() && !lora) { throw std::runtime_error("cannot load " + options.lora); }

    std::vector<Result> results((size_t) options.contexts);
    std::vector<std::thread> threads;
    for (Result & result : results) {
        threads.emplace_back([&] { generate(model, lora, options, result); });
    }
    for (std::thread & thread : threads) { thread.join(); }
    llama_model_free(model);

    printf("{\"token_ids\":[");
    for (size_t i = 0; i < results[0].tokens.size(); ++i) { printf("%s%d", i ? "," : "", results[0].tokens[i]); }
    printf("],\"logits_hash\":\"%016llx\"}\n", (unsigned long long) fnv(results[0].logits));
    for (const Result & result : results) {
        if (!result.error.empty()) { throw std::runtime_error(result.error); }
        if (result.logits != results[0].logits) { throw std::runtime_error("the contexts disagree"); }
    }
    if (!options.output.empty()) { write(options.output, results[0].logits); }
    return 0;
}

}  // namespace

int main(int argc, char ** argv) {
    Options options;
    try {
        options = parse(argc, argv);
    } catch (const std::exception & error) {
        fprintf(stderr, "llama-logits: %s\n%s", error.what(), usage);
        return 2;
    }
    try {
        return run(options);
    } catch (const std::exception & error) {
        fprintf(stderr, "llama-logits: %s\n", error.what());
        return 1;
    }
}
