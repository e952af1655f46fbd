// The kernels of kernels/flea.cu, compiled for the processor, for the fake driver. One thread runs them: kernels/portable.cuh keeps
// what is shared in a CUDA block, and which block it is, in static memory.
#include "../../kernels/flea.cu"

#include "kernels.h"

namespace {

template <typename T>
T *pointer(unsigned long long address) {
  return reinterpret_cast<T *>(static_cast<__UINTPTR_TYPE__>(address));
}

template <typename Kernel>
void launch(unsigned blocks, Kernel kernel) {
  // Last block first: the order must not matter.
  for (u32 index = blocks; index-- > 0;) {
    block_at_hand = {index, blocks};
    kernel();
  }
}

void run_crc32c(unsigned blocks, const u64 *p) {
  launch(blocks, [&] { flea_crc32c(pointer<u8>(p[0]), p[1], pointer<u32>(p[2])); });
}
unsigned touches_crc32c(const u64 *p, FakeSpan *spans) {
  spans[0] = {p[0], p[1], 1, 0};
  spans[1] = {p[2], 4 * ((p[1] + PIECE_BYTES - 1) / PIECE_BYTES), 1, 1};
  return 2;
}

void run_unpack(unsigned blocks, const u64 *p) {
  launch(blocks, [&] { flea_unpack(pointer<u8>(p[0]), p[1], p[2], p[3], p[4], pointer<u16>(p[5]), pointer<u32>(p[6])); });
}
unsigned touches_unpack(const u64 *p, FakeSpan *spans) {
  const u64 left = p[2] - p[3] * TILE_ELEMENTS, all = p[4] * TILE_ELEMENTS;
  spans[0] = {p[0], p[1], 1, 0};
  spans[1] = {p[5], 2 * (left < all ? left : all), 0, 1};
  spans[2] = {p[6], 4, 1, 1};
  return 3;
}

template <void (*KERNEL_OF_TYPE)(const u8 *, u64, u16 *)>
void run_dequantise(unsigned blocks, const u64 *p) {
  launch(blocks, [&] { KERNEL_OF_TYPE(pointer<u8>(p[0]), p[1], pointer<u16>(p[2])); });
}
template <u32 BLOCK_BYTES, u32 ELEMENTS>
unsigned touches_dequantise(const u64 *p, FakeSpan *spans) {
  spans[0] = {p[0], p[1] * BLOCK_BYTES, 1, 0};
  spans[1] = {p[2], p[1] * ELEMENTS * 2, 0, 1};
  return 2;
}

#define BOTH(TYPE, BLOCK_BYTES, ELEMENTS)                                                                                            \
  {"flea_dequantise_" #TYPE "_f16", 3, run_dequantise<flea_dequantise_##TYPE##_f16>, touches_dequantise<BLOCK_BYTES, ELEMENTS>}, \
  {"flea_dequantise_" #TYPE "_bf16", 3, run_dequantise<flea_dequantise_##TYPE##_bf16>, touches_dequantise<BLOCK_BYTES, ELEMENTS>}

const FakeKernel KERNELS[] = {
    {"flea_crc32c", 3, run_crc32c, touches_crc32c},
    {"flea_unpack", 7, run_unpack, touches_unpack},
    BOTH(q4_0, 18, 32),
    BOTH(q8_0, 34, 32),
    BOTH(q4_k, 144, 256),
    BOTH(q6_k, 210, 256),
    BOTH(mxfp4, 17, 32),
};

}  // namespace

const FakeKernel *fake_kernel(const char *name) {
  for (const FakeKernel &kernel : KERNELS)
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  return nullptr;
}
