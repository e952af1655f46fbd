// The C++17 twin of stream.c: a lease is a scope, a model closes itself, an error is an exception.
//
//   stream_cpp MODEL [MEMORY] [PASSES]
#include <flea.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(int32_t status, const char *what) {
  if (status != FLEA_OK) throw std::runtime_error(std::string(what) + ": " + flea_status_name(status) + ": " + flea_last_error());
}

struct CloseModel {
  void operator()(flea_model *model) const { flea_model_close(model); }
};
using Model = std::unique_ptr<flea_model, CloseModel>;

Model open(const char *path, const char *memory) {
  flea_open_options options{};
  options.struct_size = sizeof options;
  options.memory = memory;
  flea_model *model = nullptr;
  check(flea_model_open(path, &options, &model), path);
  return Model(model);
}

// A layer's weights may be read while one of these lives.
class Lease {
 public:
  Lease(flea_model *model, uint32_t layer) : model_(model), layer_(layer) {
    check(flea_acquire(model, layer, nullptr, 0, -1), "flea_acquire");
  }
  ~Lease() { flea_release(model_, layer_); }
  Lease(const Lease &) = delete;
  Lease &operator=(const Lease &) = delete;

 private:
  flea_model *model_;
  uint32_t layer_;
};

// FNV-1a over 8 bytes at a time, the rest one by one: the same sums as stream.c.
uint64_t checksum(const unsigned char *bytes, uint64_t len, uint64_t hash) {
  uint64_t i = 0;
  for (; i + 8 <= len; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, 8);
    hash = (hash ^ word) * UINT64_C(0x100000001b3);
  }
  for (; i < len; i++) hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
  return hash;
}

// The part of a tensor that a layer uses. Addresses never change, so it is looked up once.
struct Part {
  const unsigned char *data;
  uint64_t len;
};

std::vector<std::vector<Part>> parts_of_layers(flea_model *model, const flea_info &info) {
  std::vector<std::vector<Part>> layers(info.layer_count);
  for (uint32_t i = 0; i < info.tensor_count; i++) {
    flea_tensor tensor{};
    tensor.struct_size = sizeof tensor;
    check(flea_model_tensor_at(model, i, &tensor), "flea_model_tensor_at");
    if (tensor.layer < 0) continue;
    const auto *data = static_cast<const unsigned char *>(tensor.data);
    const uint64_t rows = tensor.shape[1] * tensor.shape[2] * tensor.shape[3];
    const uint64_t step = tensor.rows_per_layer > 0 ? tensor.rows_per_layer * (tensor.bytes / rows) : tensor.bytes;
    uint64_t from = 0;
    for (int32_t layer = tensor.layer; layer <= tensor.layer_last; layer++) {
      const uint64_t len = layer < tensor.layer_last ? step : tensor.bytes - from;
      layers[static_cast<size_t>(layer)].push_back({data + from, len});
      from += len;
    }
  }
  return layers;
}

void run(const char *path, const char *memory, int passes) {
  const Model model = open(path, memory);
  flea_info info{};
  info.struct_size = sizeof info;
  check(flea_model_info(model.get(), &info), "flea_model_info");
  const auto layers = parts_of_layers(model.get(), info);
  std::vector<uint64_t> sums(info.layer_count);
  for (int pass = 0; pass < passes; pass++) {
    for (uint32_t layer = 0; layer < info.layer_count; layer++) {
      const Lease lease(model.get(), layer);
      uint64_t sum = UINT64_C(0xcbf29ce484222325);
      for (const Part &part : layers[layer]) sum = checksum(part.data, part.len, sum);
      if (pass > 0 && sum != sums[layer]) throw std::runtime_error("layer " + std::to_string(layer) + " changed between passes");
      sums[layer] = sum;
    }
  }
  for (uint32_t layer = 0; layer < info.layer_count; layer++) std::printf("layer %3" PRIu32 " %016" PRIx64 "\n", layer, sums[layer]);
  flea_stats_data stats{};
  stats.struct_size = sizeof stats;
  check(flea_stats(model.get(), &stats), "flea_stats");
  std::printf("acquires %" PRIu64 " loads %" PRIu64 " bytes_read %" PRIu64 " resident_bytes %" PRIu64 "\n", stats.acquires,
              stats.loads, stats.bytes_read, stats.resident_bytes);
}

}  // namespace

int main(int argc, char **argv) {
  const int passes = argc > 3 ? std::atoi(argv[3]) : 2;
  if (argc < 2 || passes < 1) {
    std::fprintf(stderr, "usage: %s MODEL [MEMORY] [PASSES]\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argc > 2 ? argv[2] : nullptr, passes);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
