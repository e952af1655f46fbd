// Runs a kernel on the processor: tests/kernels.rs compiles it with AddressSanitizer and UBSan and compares bytes.
//
//   processor crc32c BLOCKS IN OUT
//   processor unpack BLOCKS IN OUT ELEMENTS FIRST_TILE TILES     OUT: first damaged tile u32, weights
//   processor dequantise_TYPE_TO BLOCKS IN OUT BLOCK_BYTES ELEMENTS
//
// IN and OUT are files. Memory is exactly as long as the kernel may touch, so that a byte too far is found.
#include "../flea.cu"

#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>

namespace {

[[noreturn]] void fail(const std::string &why) {
  std::fprintf(stderr, "processor: %s\n", why.c_str());
  std::exit(1);
}

// Aligned as tensors in VRAM are.
struct memory {
  u8 *bytes;
  u64 len;
  memory(u64 len, int fill) : bytes(static_cast<u8 *>(::operator new(len, std::align_val_t{128}))), len(len) {
    std::memset(bytes, fill, len);
  }
  ~memory() { ::operator delete(bytes, std::align_val_t{128}); }
  memory(const memory &) = delete;
  memory &operator=(const memory &) = delete;
};

u64 length(const char *path) {
  FILE *file = std::fopen(path, "rb");
  if (!file || std::fseek(file, 0, SEEK_END) != 0) fail(std::string("cannot open ") + path);
  const long len = std::ftell(file);
  std::fclose(file);
  return u64(len);
}

void read(const char *path, memory &into) {
  FILE *file = std::fopen(path, "rb");
  if (!file || std::fread(into.bytes, 1, into.len, file) != into.len) fail(std::string("cannot read ") + path);
  std::fclose(file);
}

void write(const char *path, const memory &first, const memory &second) {
  FILE *file = std::fopen(path, "wb");
  if (!file || std::fwrite(first.bytes, 1, first.len, file) != first.len ||
      std::fwrite(second.bytes, 1, second.len, file) != second.len || std::fclose(file) != 0)
    fail(std::string("cannot write ") + path);
}

template <typename Kernel>
void launch(u32 blocks, Kernel kernel) {
  // Last block first: the order must not matter.
  for (u32 index = blocks; index-- > 0;) {
    block_at_hand = {index, blocks};
    kernel();
  }
}

using dequantise = void (*)(const u8 *, u64, u16 *);
struct named {
  const char *name;
  dequantise kernel;
};
const named KERNELS[] = {
    {"dequantise_q4_0_f16", flea_dequantise_q4_0_f16},   {"dequantise_q4_0_bf16", flea_dequantise_q4_0_bf16},
    {"dequantise_q8_0_f16", flea_dequantise_q8_0_f16},   {"dequantise_q8_0_bf16", flea_dequantise_q8_0_bf16},
    {"dequantise_q4_k_f16", flea_dequantise_q4_k_f16},   {"dequantise_q4_k_bf16", flea_dequantise_q4_k_bf16},
    {"dequantise_q6_k_f16", flea_dequantise_q6_k_f16},   {"dequantise_q6_k_bf16", flea_dequantise_q6_k_bf16},
    {"dequantise_mxfp4_f16", flea_dequantise_mxfp4_f16}, {"dequantise_mxfp4_bf16", flea_dequantise_mxfp4_bf16},
};

}  // namespace

int main(int argc, char **argv) {
  if (argc < 5) fail("usage: see kernels/check/processor.cpp");
  const std::string what = argv[1];
  const u32 blocks = u32(std::strtoul(argv[2], nullptr, 10));
  const auto number = [&](int index) {
    if (index >= argc) fail("an argument is missing");
    return u64(std::strtoull(argv[index], nullptr, 10));
  };
  memory in(length(argv[3]), 0), nothing(0, 0);
  read(argv[3], in);
  if (what == "crc32c") {
    memory sums(4 * ((in.len + PIECE_BYTES - 1) / PIECE_BYTES), 0);
    launch(blocks, [&] { flea_crc32c(in.bytes, in.len, reinterpret_cast<u32 *>(sums.bytes)); });
    write(argv[4], sums, nothing);
    return 0;
  }
  if (what == "unpack") {
    const u64 elements = number(5), first = number(6), tiles = number(7);
    const u64 left = elements - first * TILE_ELEMENTS, all = tiles * TILE_ELEMENTS;
    memory damaged(4, 0xff), weights(2 * (left < all ? left : all), 0xa5);
    launch(blocks, [&] {
      flea_unpack(in.bytes, in.len, elements, first, tiles, reinterpret_cast<u16 *>(weights.bytes),
                  reinterpret_cast<u32 *>(damaged.bytes));
    });
    write(argv[4], damaged, weights);
    return 0;
  }
  for (const named &each : KERNELS) {
    if (what != each.name) continue;
    const u64 count = in.len / number(5);
    memory out(2 * count * number(6), 0xa5);
    launch(blocks, [&] { each.kernel(in.bytes, count, reinterpret_cast<u16 *>(out.bytes)); });
    write(argv[4], out, nothing);
    return 0;
  }
  fail("no kernel " + what);
}
