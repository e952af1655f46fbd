// Quantised weights to 16-bit floats: Q4_0, Q8_0, Q4_K, Q6_K and MXFP4, each to IEEE half and to bfloat16.
//
// The values are those of ggml's dequantize_row_*: the same products in single precision, each rounded, never fused; then rounded to
// 16 bits. A thread takes 8 bytes of codes (of Q6_K those that belong together), so that what it writes is 16 bytes at a time. Blocks of
// 17, 18, 34 and 210 bytes lie at odd places: their codes are loaded a byte or two at a time, from lines that the neighbours need as well.
// What is written is four times what is read, or twice: the writes set the pace.
#include "portable.cuh"

constexpr u32 DEQUANTISE_THREADS = 256;

template <bool TO_BFLOAT>
DEVICE u32 narrowed(float value) {
  return TO_BFLOAT ? bfloat_of_float(value) : half_of_float(value);
}

// Eight neighbours; `value(i)` is the i-th.
template <bool TO_BFLOAT, typename Value>
DEVICE void store_eight(u16 *out, Value value) {
  quad eight;
  UNROLL
  for (u32 i = 0; i < 4; ++i)
    eight.word[i] = narrowed<TO_BFLOAT>(value(2 * i)) | narrowed<TO_BFLOAT>(value(2 * i + 1)) << 16;
  *reinterpret_cast<quad *>(out) = eight;
}

DEVICE u16 load_16(const u8 *at) { return *reinterpret_cast<const u16 *>(at); }
DEVICE u32 load_32(const u8 *at) { return *reinterpret_cast<const u32 *>(at); }

// Eight bytes from an address that is even, or any.
DEVICE pair load_even(const u8 *at) {
  return pair{{load_16(at) | u32(load_16(at + 2)) << 16, load_16(at + 4) | u32(load_16(at + 6)) << 16}};
}
DEVICE pair load_odd(const u8 *at) {
  pair bytes = {{0, 0}};
  UNROLL
  for (u32 i = 0; i < 8; ++i) bytes.word[i / 4] |= u32(at[i]) << 8 * (i % 4);
  return bytes;
}

DEVICE u32 byte_of(const pair &bytes, u32 i) { return bytes.word[i / 4] >> 8 * (i % 4) & 0xffu; }
DEVICE int low(const pair &bytes, u32 i) { return int(byte_of(bytes, i) & 15u); }
DEVICE int high(const pair &bytes, u32 i) { return int(byte_of(bytes, i) >> 4); }
DEVICE float signed_byte(u32 byte) { return float(int(byte ^ 0x80u) - 128); }

// Q4_0, 32 values in 18 bytes: scale; codes of i and i + 16 in byte i. A unit is 8 bytes of codes.
template <bool TO_BFLOAT>
DEVICE void q4_0_unit(const u8 *block, u32 unit, u16 *out) {
  const float scale = float_of_half(load_16(block));
  const pair codes = load_even(block + 2 + 8 * unit);
  out += 8 * unit;
  store_eight<TO_BFLOAT>(out, [&](u32 i) { return times(float(low(codes, i) - 8), scale); });
  store_eight<TO_BFLOAT>(out + 16, [&](u32 i) { return times(float(high(codes, i) - 8), scale); });
}

// Q8_0, 32 values in 34 bytes: scale; signed codes. A unit is 8 of them.
template <bool TO_BFLOAT>
DEVICE void q8_0_unit(const u8 *block, u32 unit, u16 *out) {
  const float scale = float_of_half(load_16(block));
  const pair codes = load_even(block + 2 + 8 * unit);
  store_eight<TO_BFLOAT>(out + 8 * unit, [&](u32 i) { return times(signed_byte(byte_of(codes, i)), scale); });
}

// The 6-bit scale and minimum of sub-block j, out of 12 bytes.
struct scale_and_minimum {
  float scale, minimum;
};
DEVICE scale_and_minimum scale_q4_k(const u32 *scales, u32 j) {
  const u32 at = 8 * (j % 4);
  const u32 first = scales[0] >> at & 0xffu, second = scales[1] >> at & 0xffu, third = scales[2] >> at & 0xffu;
  if (j < 4) return {float(first & 63u), float(second & 63u)};
  return {float((third & 15u) | first >> 6 << 4), float(third >> 4 | second >> 6 << 4)};
}

// Q4_K, 256 values in 144 bytes: two scales, 12 bytes of scales and minima; four times 32 bytes with the codes of i and i + 32.
// A unit is 8 bytes of codes. A tensor is aligned to 16 bytes, and so is each block.
template <bool TO_BFLOAT>
DEVICE void q4_k_unit(const u8 *block, u32 unit, u16 *out) {
  const quad head = *reinterpret_cast<const quad *>(block);
  const float scale = float_of_half(u16(head.word[0])), minimum = float_of_half(u16(head.word[0] >> 16));
  const u32 quarter = unit / 4, part = unit % 4;
  const pair codes = *reinterpret_cast<const pair *>(block + 16 + 32 * quarter + 8 * part);
  const scale_and_minimum lower = scale_q4_k(head.word + 1, 2 * quarter), upper = scale_q4_k(head.word + 1, 2 * quarter + 1);
  const float lower_scale = times(scale, lower.scale), lower_minimum = times(minimum, lower.minimum);
  const float upper_scale = times(scale, upper.scale), upper_minimum = times(minimum, upper.minimum);
  out += 64 * quarter + 8 * part;
  store_eight<TO_BFLOAT>(out, [&](u32 i) { return minus(times(lower_scale, float(low(codes, i))), lower_minimum); });
  store_eight<TO_BFLOAT>(out + 32, [&](u32 i) { return minus(times(upper_scale, float(high(codes, i))), upper_minimum); });
}

// Q6_K, 256 values in 210 bytes: lower 4 bits (128 bytes), upper 2 bits (64), 16 signed scales, one scale for all. A unit is the 32
// values of 8 bytes of upper bits.
template <bool TO_BFLOAT>
DEVICE void q6_k_unit(const u8 *block, u32 unit, u16 *out) {
  const u32 half = unit / 4, part = unit % 4;
  const pair first = load_even(block + 64 * half + 8 * part), second = load_even(block + 64 * half + 32 + 8 * part);
  const pair upper = load_even(block + 128 + 32 * half + 8 * part);
  const u8 *scales = block + 192 + 8 * half + part / 2;
  const float scale = float_of_half(load_16(block + 208));
  out += 128 * half + 8 * part;
  UNROLL
  for (u32 quarter = 0; quarter < 4; ++quarter) {
    const float own = times(scale, signed_byte(scales[2 * quarter]));
    const pair &lower = quarter % 2 == 0 ? first : second;
    store_eight<TO_BFLOAT>(out + 32 * quarter, [&](u32 i) {
      const int four = quarter < 2 ? low(lower, i) : high(lower, i);
      const int two = int(byte_of(upper, i) >> 2 * quarter & 3u);
      return times(own, float((four | two << 4) - 32));
    });
  }
}

// MXFP4, 32 values in 17 bytes: exponent; codes of i and i + 16 in byte i. A unit is 8 bytes of codes. A code is a sign and a
// number of half units: 0 1 2 3 4 6 8 12, each a nibble here.
DEVICE float mxfp4_value(int code) {
  const int half_units = int(0xc8643210u >> 4 * (code & 7) & 15u);
  return float(code & 8 ? -half_units : half_units);
}
template <bool TO_BFLOAT>
DEVICE void mxfp4_unit(const u8 *block, u32 unit, u16 *out) {
  const u32 exponent = block[0];
  // Half of 2^(exponent - 127): the two smallest are no normal numbers.
  const float scale = float_of_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
  const pair codes = load_odd(block + 1 + 8 * unit);
  out += 8 * unit;
  store_eight<TO_BFLOAT>(out, [&](u32 i) { return times(mxfp4_value(low(codes, i)), scale); });
  store_eight<TO_BFLOAT>(out + 16, [&](u32 i) { return times(mxfp4_value(high(codes, i)), scale); });
}

// `blocks` of a tensor, aligned to 16 bytes, to `out`, aligned to 16. Any number of CUDA blocks: they take turns.
#define DEQUANTISE(NAME, TO, TO_BFLOAT, UNITS, BLOCK_BYTES, ELEMENTS)                                                     \
  KERNEL(DEQUANTISE_THREADS) flea_dequantise_##NAME##_##TO(const u8 *blocks, u64 block_count, u16 *out) {                 \
    THREADS(t, DEQUANTISE_THREADS) {                                                                                      \
      const u64 step = u64(BLOCK_COUNT) * DEQUANTISE_THREADS, unit_count = block_count * UNITS;                           \
      for (u64 unit = u64(BLOCK_INDEX) * DEQUANTISE_THREADS + t; unit < unit_count; unit += step) {                       \
        const u64 block = unit / UNITS;                                                                                   \
        NAME##_unit<TO_BFLOAT>(blocks + block * BLOCK_BYTES, u32(unit % UNITS), out + block * ELEMENTS);                  \
      }                                                                                                                   \
    }                                                                                                                     \
  }
#define DEQUANTISE_BOTH(NAME, UNITS, BLOCK_BYTES, ELEMENTS)       \
  DEQUANTISE(NAME, f16, false, UNITS, BLOCK_BYTES, ELEMENTS)      \
  DEQUANTISE(NAME, bf16, true, UNITS, BLOCK_BYTES, ELEMENTS)

DEQUANTISE_BOTH(q4_0, 2, 18, 32)
DEQUANTISE_BOTH(q8_0, 4, 34, 32)
DEQUANTISE_BOTH(q4_k, 16, 144, 256)
DEQUANTISE_BOTH(q6_k, 8, 210, 256)
DEQUANTISE_BOTH(mxfp4, 2, 17, 32)
