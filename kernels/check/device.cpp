// Runs a kernel of kernels/flea.fatbin on a GPU: tests/kernels.rs asks it instead of processor.cpp where FLEA_KERNELS_ON names it.
//
//   device info                                         the GPU in one line of JSON
//   device KERNEL BLOCKS IN OUT ...                     as processor.cpp
//   device bandwidth MIB CODED ELEMENTS                 each kernel beside copies, in JSON; CODED: a coded tensor
//
// Needs a C++ compiler and the driver: libcuda.so.1 is loaded at run time, and nothing of the toolkit is included. The fatbin is
// the one in FLEA_FATBIN. Exit code 3: there is no driver or no GPU.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using bytes = std::vector<u8>;

constexpr u64 PIECE_BYTES = 1 << 20;
constexpr u64 TILE_ELEMENTS = 8192;
constexpr u32 THREADS = 256;
// What a block of 256 threads does at a time: 8 spans of 32 KiB, 8 tiles.
constexpr u64 CRC_BLOCK_BYTES = 8 * (32 << 10);
constexpr u64 UNPACK_BLOCK_TILES = 8;

[[noreturn]] void fail(const std::string &why, int code = 1) {
  std::fprintf(stderr, "device: %s\n", why.c_str());
  std::exit(code);
}

// The driver's functions, as cuda.h declares them. Handles are pointers, device addresses 64-bit numbers.
using handle = void *;
using address = unsigned long long;

struct driver {
  void *library;
  int (*error_string)(int, const char **) = nullptr;

  driver() : library(dlopen("libcuda.so.1", RTLD_NOW)) {
    if (!library) fail("no CUDA driver: libcuda.so.1 cannot be loaded", 3);
    error_string = reinterpret_cast<int (*)(int, const char **)>(dlsym(library, "cuGetErrorString"));
  }

  // Calls a function by its name and fails with the driver's own words.
  template <typename... Arguments>
  void operator()(const char *name, Arguments... arguments) const {
    auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(library, name));
    if (!function) fail(std::string("the driver has no ") + name);
    const int result = function(arguments...);
    if (result == 0) return;
    const char *text = nullptr;
    if (error_string) error_string(result, &text);
    const bool is_absent = result == 100 || result == 34 || result == 3;  // no device, a stub, not initialised
    fail(std::string(name) + ": " + (text ? text : "error") + " (" + std::to_string(result) + ")", is_absent ? 3 : 1);
  }
};

struct gpu {
  driver call;
  int device = 0;
  handle context = nullptr, module = nullptr, stream = nullptr;

  gpu() {
    call("cuInit", 0u);
    int count = 0;
    call("cuDeviceGetCount", &count);
    if (count == 0) fail("no GPU", 3);
    call("cuDeviceGet", &device, 0);
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxSetCurrent", context);
    call("cuStreamCreate", &stream, 1u);
  }

  int attribute(int number) const {
    int value = 0;
    call("cuDeviceGetAttribute", &value, number, device);
    return value;
  }

  void load(const bytes &fatbin) { call("cuModuleLoadData", &module, static_cast<const void *>(fatbin.data())); }

  void launch(const char *name, u32 blocks, std::vector<void *> arguments) const {
    handle function = nullptr;
    call("cuModuleGetFunction", &function, module, name);
    call("cuLaunchKernel", function, blocks, 1u, 1u, THREADS, 1u, 1u, 0u, stream, arguments.data(), static_cast<void **>(nullptr));
  }

  // For everything asked for so far. Not for the device: the fake driver of the tests has no such call, nor does flea make one.
  void wait() const {
    handle done = nullptr;
    call("cuEventCreate", &done, 2u);
    call("cuEventRecord", done, stream);
    call("cuEventSynchronize", done);
    call("cuEventDestroy_v2", done);
  }
};

struct vram {
  const gpu &on;
  address at = 0;
  u64 len;

  vram(const gpu &on, u64 len, int fill) : on(on), len(len) {
    on.call("cuMemAlloc_v2", &at, static_cast<size_t>(len ? len : 1));
    on.call("cuMemsetD8Async", at, static_cast<unsigned char>(fill), static_cast<size_t>(len ? len : 1), on.stream);
  }
  vram(const gpu &on, const bytes &from) : vram(on, from.size(), 0) {
    if (len) on.call("cuMemcpyHtoDAsync_v2", at, static_cast<const void *>(from.data()), static_cast<size_t>(len), on.stream);
    on.wait();
  }
  ~vram() { on.call("cuMemFree_v2", at); }
  vram(const vram &) = delete;
  vram &operator=(const vram &) = delete;

  bytes read() const {
    bytes out(len);
    if (len) on.call("cuMemcpyDtoHAsync_v2", static_cast<void *>(out.data()), at, static_cast<size_t>(len), on.stream);
    on.wait();
    return out;
  }
};

bytes read(const std::string &path) {
  FILE *file = std::fopen(path.c_str(), "rb");
  if (!file) fail("cannot open " + path);
  bytes all;
  u8 some[1 << 16];
  for (size_t count; (count = std::fread(some, 1, sizeof some, file)) > 0;) all.insert(all.end(), some, some + count);
  std::fclose(file);
  return all;
}

void write(const std::string &path, const std::vector<bytes> &all) {
  FILE *file = std::fopen(path.c_str(), "wb");
  bool is_fine = file != nullptr;
  for (const bytes &each : all) is_fine = is_fine && std::fwrite(each.data(), 1, each.size(), file) == each.size();
  if (!is_fine || std::fclose(file) != 0) fail("cannot write " + path);
}

std::string environment(const char *name) {
  const char *value = std::getenv(name);
  if (!value) fail(std::string(name) + " is not set");
  return value;
}

void run_crc32c(const gpu &on, const vram &in, const vram &sums, u32 blocks) {
  address at = in.at, out = sums.at;
  u64 len = in.len;
  on.launch("flea_crc32c", blocks, {&at, &len, &out});
}

void run_unpack(const gpu &on, const vram &coded, u64 elements, u64 first, u64 tiles, const vram &out, const vram &damaged, u32 blocks) {
  address at = coded.at, weights = out.at, flag = damaged.at;
  u64 len = coded.len;
  on.launch("flea_unpack", blocks, {&at, &len, &elements, &first, &tiles, &weights, &flag});
}

void run_dequantise(const gpu &on, const std::string &kernel, const vram &in, u64 count, const vram &out, u32 blocks) {
  address at = in.at, to = out.at;
  on.launch(("flea_" + kernel).c_str(), blocks, {&at, &count, &to});
}

// Milliseconds of the fastest of some runs, by events on the device.
double fastest(const gpu &on, const std::function<void()> &work) {
  handle begin = nullptr, end = nullptr;
  on.call("cuEventCreate", &begin, 0u);
  on.call("cuEventCreate", &end, 0u);
  double best = 1e30;
  for (int round = 0; round < 12; ++round) {
    on.call("cuEventRecord", begin, on.stream);
    work();
    on.call("cuEventRecord", end, on.stream);
    on.call("cuEventSynchronize", end);
    float taken = 0;
    on.call("cuEventElapsedTime", &taken, begin, end);
    if (round >= 2 && taken < best) best = taken;
  }
  on.call("cuEventDestroy_v2", begin);
  on.call("cuEventDestroy_v2", end);
  return best;
}

double gb_per_second(u64 moved, double milliseconds) { return double(moved) / 1e6 / milliseconds; }

struct quantised {
  const char *name;
  u64 block_bytes, elements, units;
};
const quantised TYPES[] = {{"q4_0", 18, 32, 2}, {"q8_0", 34, 32, 4}, {"q4_k", 144, 256, 16}, {"q6_k", 210, 256, 8}, {"mxfp4", 17, 32, 2}};

// `traffic` is what is read and written; a copy of N bytes reads N and writes N.
void row(const char *name, u64 traffic, u64 out, double milliseconds, double copy_traffic, bool is_last = false) {
  const double rate = gb_per_second(traffic, milliseconds);
  std::printf("{\"name\":\"%s\",\"traffic_gb_per_second\":%.1f,\"result_gb_per_second\":%.1f,\"of_copy\":%.3f}%s", name, rate,
              gb_per_second(out, milliseconds), rate / copy_traffic, is_last ? "" : ",");
}

void bandwidth(const gpu &on, u64 len, const bytes &coded, u64 elements) {
  const vram one(on, len, 0x3c), other(on, len, 0);
  const double copy_ms = fastest(on, [&] { on.call("cuMemcpyDtoDAsync_v2", other.at, one.at, static_cast<size_t>(len), on.stream); });
  const double copy = gb_per_second(2 * len, copy_ms);
  void *pinned = std::aligned_alloc(PIECE_BYTES, len);
  if (!pinned) fail("no memory to copy from");
  std::memset(pinned, 0x3c, len);
  on.call("cuMemHostRegister_v2", pinned, static_cast<size_t>(len), 0u);
  const double up_ms = fastest(on, [&] {
    on.call("cuMemcpyHtoDAsync_v2", other.at, static_cast<const void *>(pinned), static_cast<size_t>(len), on.stream);
  });
  on.call("cuMemHostUnregister", pinned);
  std::free(pinned);
  std::printf("{\"bytes\":%llu,\"copy_traffic_gb_per_second\":%.1f,\"pinned_to_device_gb_per_second\":%.2f,\"kernels\":[",
              static_cast<unsigned long long>(len), copy, gb_per_second(len, up_ms));
  const vram sums(on, 4 * (len / PIECE_BYTES + 1), 0);
  const double crc_ms = fastest(on, [&] { run_crc32c(on, one, sums, u32((len + CRC_BLOCK_BYTES - 1) / CRC_BLOCK_BYTES)); });
  row("crc32c", len, len, crc_ms, copy);
  for (const quantised &type : TYPES) {
    // As many blocks as fill the second half of what there is.
    const u64 count = len / (2 * type.elements);
    const u32 blocks = u32((count * type.units + THREADS - 1) / THREADS);
    for (const char *to : {"f16", "bf16"}) {
      const std::string kernel = std::string("dequantise_") + type.name + "_" + to;
      const double ms = fastest(on, [&] { run_dequantise(on, kernel, one, count, other, blocks); });
      row(kernel.c_str(), count * (type.block_bytes + 2 * type.elements), count * 2 * type.elements, ms, copy);
    }
  }
  const vram packed(on, coded), weights(on, 2 * elements, 0), damaged(on, 4, 0xff);
  const u64 tiles = (elements + TILE_ELEMENTS - 1) / TILE_ELEMENTS;
  const u32 blocks = u32((tiles + UNPACK_BLOCK_TILES - 1) / UNPACK_BLOCK_TILES);
  const double ms = fastest(on, [&] { run_unpack(on, packed, elements, 0, tiles, weights, damaged, blocks); });
  row("unpack", packed.len + 2 * elements, 2 * elements, ms, copy, true);
  std::printf("]}\n");
}

void info(const gpu &on) {
  char name[128] = "";
  on.call("cuDeviceGetName", static_cast<char *>(name), 128, on.device);
  int version = 0;
  on.call("cuDriverGetVersion", &version);
  size_t total = 0;
  on.call("cuDeviceTotalMem_v2", &total, on.device);
  std::printf("{\"gpu\":\"%s\",\"compute_capability\":\"%d.%d\",\"multiprocessors\":%d,\"memory_bytes\":%zu,\"driver_cuda\":\"%d.%d\"}\n",
              name, on.attribute(75), on.attribute(76), on.attribute(16), total, version / 1000, version % 1000 / 10);
}

}  // namespace

int main(int argc, char **argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const auto number = [&](int index) {
    if (index >= argc) fail("an argument is missing");
    return u64(std::strtoull(argv[index], nullptr, 10));
  };
  gpu on;
  if (what == "info") {
    info(on);
    return 0;
  }
  on.load(read(environment("FLEA_FATBIN")));
  if (what == "bandwidth") {
    const u64 len = number(2) << 20;
    if (argc < 5) fail("usage: see kernels/check/device.cpp");
    bandwidth(on, len, read(argv[3]), number(4));
    return 0;
  }
  if (argc < 5) fail("usage: see kernels/check/device.cpp");
  const u32 blocks = u32(number(2));
  const vram in(on, read(argv[3]));
  if (what == "crc32c") {
    const vram sums(on, 4 * ((in.len + PIECE_BYTES - 1) / PIECE_BYTES), 0);
    run_crc32c(on, in, sums, blocks);
    write(argv[4], {sums.read()});
  } else if (what == "unpack") {
    const u64 elements = number(5), first = number(6), tiles = number(7);
    const u64 left = elements - first * TILE_ELEMENTS, all = tiles * TILE_ELEMENTS;
    const vram damaged(on, 4, 0xff), weights(on, 2 * (left < all ? left : all), 0xa5);
    run_unpack(on, in, elements, first, tiles, weights, damaged, blocks);
    write(argv[4], {damaged.read(), weights.read()});
  } else {
    const u64 count = in.len / number(5);
    const vram out(on, 2 * count * number(6), 0xa5);
    run_dequantise(on, what, in, count, out, blocks);
    write(argv[4], {out.read()});
  }
  return 0;
}
