// CRC32C of each MiB of a slot, to compare with what the packed file (or anybody's list) says.
//
// A CRC is linear: that of a message is the sum (XOR) of those of its words alone, each moved up by what follows it. So lane
// l of a warp takes the 16 bytes at 16 l of every row of 512, keeps four sums, and moves them up by a row before it adds
// the next. Moving up is the product with a constant in GF(2)[x] modulo the polynomial, a linear map of 32 bits: it is taken
// apart into 5 bits at a time, and each lane holds one entry of each of the seven tables of 32, so that a look-up is a
// shuffle: no table in memory, no bank conflicts. A warp does a span of 32 KiB, moves its sum up to the end of the MiB, and adds
// it there. Bits are reflected as the polynomial of CRC32C (0x82f63b78) has them: the lowest bit stands for the highest power.
#include "portable.cuh"

constexpr u32 CRC_THREADS = 256;
constexpr u32 CRC_WARPS = CRC_THREADS / WARP;
constexpr u32 PIECE_BYTES = 1 << 20;
constexpr u32 SPAN_BYTES = 32 << 10;
constexpr u32 ROW_BYTES = 16 * WARP;
constexpr u32 POLYNOMIAL = 0x82f63b78u;
constexpr u32 ONE = 0x80000000u;  // x^0
constexpr u32 TABLES = 7;

// a * b modulo the polynomial.
constexpr u32 product_constant(u32 a, u32 b) {
  u32 sum = 0;
  for (int bit = 0; bit < 32; ++bit) {
    if (a & (ONE >> bit)) sum ^= b;
    b = b >> 1 ^ (b & 1u ? POLYNOMIAL : 0u);
  }
  return sum;
}

// x^exponent.
constexpr u32 power_constant(u64 exponent) {
  u32 result = ONE, base = ONE >> 1;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) result = product_constant(result, base);
    base = product_constant(base, base);
  }
  return result;
}

struct crc_tables {
  u32 up[32];           // x^(8 * 2^i): moves up by 2^i bytes
  u32 row[TABLES][32];  // the product of l << 5 k with BY_ROW
  u32 lane[32];         // what moves up the words of lane l by the lanes behind it
};

constexpr u32 BY_WORD = power_constant(32);
constexpr u32 BY_ROW = power_constant(8ull * ROW_BYTES);

constexpr crc_tables make_tables() {
  crc_tables tables{};
  u32 power = power_constant(8);
  for (u32 i = 0; i < 32; ++i) {
    tables.up[i] = power;
    power = product_constant(power, power);
  }
  for (u32 k = 0; k < TABLES; ++k)
    for (u32 l = 0; l < 32; ++l) tables.row[k][l] = product_constant(l << 5 * k, BY_ROW);
  for (u32 l = 0; l < 32; ++l) tables.lane[l] = power_constant(128ull * (31 - l));
  return tables;
}

TABLE crc_tables CRC_TABLES = make_tables();

DEVICE u32 product(u32 a, u32 b) {
  u32 sum = 0;
  for (u32 bit = 0; bit < 32; ++bit) {
    sum ^= b & (0u - (a >> (31 - bit) & 1u));
    b = b >> 1 ^ (POLYNOMIAL & (0u - (b & 1u)));
  }
  return sum;
}

// Moves a sum up by so many bytes.
DEVICE u32 moved_up(u32 sum, u64 bytes) {
  for (u32 i = 0; bytes; ++i, bytes >>= 1)
    if (bytes & 1) sum = product(sum, CRC_TABLES.up[i]);
  return sum;
}

// The seven tables of the product with BY_ROW: table k is for the bits from 5 k on, and lane l holds its entry l.
struct row_tables {
  per_lane<u32> table[TABLES];
};

DEVICE u32 by_row(const row_tables &tables, u32 sum) {
  u32 result = 0;
  UNROLL
  for (u32 k = 0; k < TABLES; ++k) result ^= shuffled(tables.table[k], sum >> 5 * k);
  return result;
}

// The sum of whole rows, as if nothing followed.
DEVICE u32 sum_of_rows(const row_tables &tables, const u8 *rows, u32 row_count) {
  per_lane<quad> sums;
  LANES(lane) sums[lane] = quad{{0, 0, 0, 0}};
  UNROLL_4
  for (u32 row = 0; row < row_count; ++row) {
    LANES(lane) {
      const quad bytes = reinterpret_cast<const quad *>(rows + u64(row) * ROW_BYTES)[lane];
      UNROLL
      for (u32 i = 0; i < 4; ++i) sums[lane].word[i] = by_row(tables, sums[lane].word[i]) ^ bytes.word[i];
    }
  }
  per_lane<u32> whole;
  LANES(lane) {
    u32 sum = 0;
    UNROLL
    for (u32 i = 0; i < 4; ++i) sum = product(sum ^ sums[lane].word[i], BY_WORD);
    whole[lane] = product(sum, CRC_TABLES.lane[lane]);
  }
  // Halved five times, every lane has the sum of all.
  UNROLL
  for (u32 step = 1; step < WARP; step *= 2) {
    per_lane<u32> other;
    LANES(lane) other[lane] = shuffled(whole, lane + step);
    LANES(lane) whole[lane] ^= other[lane];
  }
  return shuffled(whole, 0);
}

// `sums` must be zero before; afterwards it holds the CRC32C of each MiB of the `bytes` bytes at `at`, which is aligned to 16.
// One block for each 256 KiB, or fewer: they take turns.
KERNEL(CRC_THREADS) flea_crc32c(const u8 *at, u64 bytes, u32 *sums) {
  const u64 span_count = (bytes + SPAN_BYTES - 1) / SPAN_BYTES;
  WARPS(warp, CRC_WARPS) {
    row_tables tables;
    LANES(lane) {
      UNROLL
      for (u32 k = 0; k < TABLES; ++k) tables.table[k][lane] = CRC_TABLES.row[k][lane];
    }
    for (u64 span = u64(BLOCK_INDEX) * CRC_WARPS + warp; span < span_count; span += u64(BLOCK_COUNT) * CRC_WARPS) {
      const u64 begin = span * SPAN_BYTES;
      const u64 left = bytes - begin;
      const u32 len = left < SPAN_BYTES ? u32(left) : SPAN_BYTES;
      const u32 rows_bytes = len / ROW_BYTES * ROW_BYTES;
      u32 sum = sum_of_rows(tables, at + begin, len / ROW_BYTES);
      // What is behind the last whole row of the slot, byte by byte.
      for (u32 i = rows_bytes; i < len; ++i) {
        sum ^= at[begin + i];
        for (u32 bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (POLYNOMIAL & (0u - (sum & 1u)));
      }
      const u64 piece = begin / PIECE_BYTES;
      const u64 piece_end = (piece + 1) * PIECE_BYTES < bytes ? (piece + 1) * PIECE_BYTES : bytes;
      sum = moved_up(sum, piece_end - begin - len);
      // The first span brings what a CRC32C begins and ends with.
      if (begin % PIECE_BYTES == 0) sum ^= moved_up(0xffffffffu, piece_end - begin) ^ 0xffffffffu;
      LANES(lane) {
        if (lane == 0) atomic_xor(&sums[piece], sum);
      }
    }
  }
}
