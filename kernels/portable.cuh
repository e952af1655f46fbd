// What the kernels are written against, so that one source compiles with nvcc for a GPU and with g++ for a processor.
//
// A kernel is a function over one CUDA block. Where lanes work on their own it says LANES or THREADS; on a GPU each thread goes
// once through such a region, on a processor the region is a loop over all of them. What a lane keeps from one region to the
// next is a per_lane<T>: a register there, an array here. Votes, shuffles and barriers stand between regions, where all lanes
// of a warp (all warps of a block) are at the same place. So no fibers are needed, and sanitizers see plain loops.
//
// Nothing of the CUDA toolkit is included: fixed widths and conversions are our own, so that the compiler alone is enough.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "the widths that the formats have");

constexpr u32 WARP = 32;

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// A table that lanes read at different places: in memory, not in the constant bank, which would serve them one by one.
#define TABLE static __device__ const
#define SHARED __shared__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define THREADS(t, count) \
  for (u32 t = threadIdx.x, t##_once = 1; t##_once; t##_once = 0)
#define WARPS(w, count) \
  for (u32 w = threadIdx.x / WARP, w##_once = 1; w##_once; w##_once = 0)
#define LANES(l) \
  for (u32 l = threadIdx.x % WARP, l##_once = 1; l##_once; l##_once = 0)
#define BARRIER() __syncthreads()
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define BLOCK_INDEX blockIdx.x
#define BLOCK_COUNT gridDim.x

template <typename T>
struct per_lane {
  T value;
  DEVICE T &operator[](u32) { return value; }
  DEVICE const T &operator[](u32) const { return value; }
};

// The value of lane `from` modulo 32, told to each lane. All lanes of the warp must come here together.
DEVICE u32 shuffled(const per_lane<u32> &values, u32 from) { return __shfl_sync(0xffffffffu, values.value, from); }
// A bit for each lane whose value is not zero.
DEVICE u32 ballot(const per_lane<u32> &values) { return __ballot_sync(0xffffffffu, values.value != 0); }
DEVICE u32 bits_set(u32 word) { return __popc(word); }
DEVICE void atomic_xor(u32 *at, u32 value) { atomicXor(at, value); }
DEVICE void atomic_min(u32 *at, u32 value) { atomicMin(at, value); }
// Two roundings, as the formats' references have them: never one fused operation.
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE float minus(float a, float b) { return __fsub_rn(a, b); }
DEVICE float float_of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of_float(float value) { return __float_as_uint(value); }
DEVICE float float_of_half(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
// To nearest, ties to even; NaN becomes 0x7fff. So are all conversions here.
DEVICE u16 half_of_float(float value) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
DEVICE u16 bfloat_of_float(float value) {
  u16 bfloat;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(value));
  return bfloat;
}

#else

#include <cstring>

#define DEVICE static inline
#define TABLE static const
#define SHARED static
#define KERNEL(threads) extern "C" void
#define THREADS(t, count) for (u32 t = 0; t < (count); ++t)
#define WARPS(w, count) for (u32 w = 0; w < (count); ++w)
#define LANES(l) for (u32 l = 0; l < WARP; ++l)
#define BARRIER() ((void)0)
#define UNROLL
#define UNROLL_4
#define BLOCK_INDEX (block_at_hand.index)
#define BLOCK_COUNT (block_at_hand.count)

// Which block the caller runs, and how many there are: kernels/check/processor.cpp sets it.
struct block_of_grid {
  u32 index, count;
};
static block_of_grid block_at_hand = {0, 1};

template <typename T>
struct per_lane {
  T values[WARP];
  T &operator[](u32 lane) { return values[lane]; }
  const T &operator[](u32 lane) const { return values[lane]; }
};

DEVICE u32 shuffled(const per_lane<u32> &values, u32 from) { return values[from % WARP]; }
DEVICE u32 ballot(const per_lane<u32> &values) {
  u32 votes = 0;
  LANES(lane) votes |= u32(values[lane] != 0) << lane;
  return votes;
}
DEVICE u32 bits_set(u32 word) { return u32(__builtin_popcount(word)); }
DEVICE void atomic_xor(u32 *at, u32 value) { *at ^= value; }
DEVICE void atomic_min(u32 *at, u32 value) { *at = value < *at ? value : *at; }
// -ffp-contract=off keeps them apart.
DEVICE float times(float a, float b) { return a * b; }
DEVICE float minus(float a, float b) { return a - b; }
DEVICE float float_of_bits(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
DEVICE u32 bits_of_float(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float float_of_half(u16 half) {
  const u32 sign = u32(half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return float_of_bits(sign | bits_of_float(magnitude));
}
DEVICE u16 half_of_float(float value) {
  const u32 bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
  const u16 sign = u16(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return u16(sign | 0x7c00u);  // 65520 and more: infinity
  if (magnitude < 0x38800000u) {                             // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves the multiple, rounded, in the lower bits of the sum's mantissa.
    const float sum = float_of_bits(magnitude) + 0.5f;
    return u16(sign | (bits_of_float(sum) - 0x3f000000u));
  }
  const u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return u16(sign | (rounded - 0x38000000u) >> 13);
}

DEVICE u16 bfloat_of_float(float value) {
  const u32 bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif

// Sixteen bytes that are loaded or stored at once.
struct alignas(16) quad {
  u32 word[4];
};
struct alignas(8) pair {
  u32 word[2];
};
