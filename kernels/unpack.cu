// Unpacks a tensor that flea pack --compress coded: docs/packed-format.md describes tiles, symbols and rests.
//
// One warp decodes one tile: lane l has state l of the 32. After each symbol the lanes vote who needs another word; a lane's word
// is the one at the count of votes below its own, so a warp's words are read from one place. The table of the tensor is made
// once per block, in shared memory. Nothing that the coded tensor says is believed before it is bounded: whatever the bytes
// are, a kernel reads inside of them and writes inside of the tile's weights, and tells the first tile that is damaged.
#include "portable.cuh"

constexpr u32 UNPACK_THREADS = 256;
constexpr u32 UNPACK_WARPS = UNPACK_THREADS / WARP;
constexpr u32 TILE_ELEMENTS = 8192;
constexpr u32 NEIGHBOURS = 4;
constexpr u32 GROUP = WARP * NEIGHBOURS;
constexpr u32 STATES_BYTES = 4 * WARP;
constexpr u32 TABLE_BITS = 12;
constexpr u32 TABLE_LEN = 1 << TABLE_BITS;
constexpr u32 LOW = 1 << 16;
constexpr u32 SYMBOLS = 256;
constexpr u32 FREQUENCIES_AT = 32;
constexpr u32 HEAD_BYTES = FREQUENCIES_AT + 2 * SYMBOLS;

DEVICE u32 up_to(u32 value, u32 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Four symbols and four rests become four weights; those from `count` on do not exist.
DEVICE void store_four(u16 *weights, u32 symbols, u32 rests, u32 count) {
  u32 four[NEIGHBOURS];
  UNROLL
  for (u32 k = 0; k < NEIGHBOURS; ++k) {
    const u32 rest = rests >> 8 * k & 0xffu, symbol = symbols >> 8 * k & 0xffu;
    four[k] = (rest & 0x80u) << 8 | symbol << 7 | (rest & 0x7fu);
  }
  if (count >= NEIGHBOURS) {
    *reinterpret_cast<pair *>(weights) = pair{{four[0] | four[1] << 16, four[2] | four[3] << 16}};
  } else {
    for (u32 k = 0; k < count; ++k) weights[k] = u16(four[k]);
  }
}

// A tile that kept its symbols as they are.
DEVICE void unpack_raw(const u8 *tile, u32 elements, u16 *weights) {
  const u8 *symbols = tile + up_to(elements, 4);
  LANES(lane) {
    for (u32 at = NEIGHBOURS * lane; at < elements; at += GROUP) {
      const u32 rests = *reinterpret_cast<const u32 *>(tile + at);
      store_four(weights + at, *reinterpret_cast<const u32 *>(symbols + at), rests, elements - at);
    }
  }
}

// The four rests of each lane in a group, where there are any.
DEVICE void load_rests(const u8 *rests, u32 group, u32 elements, per_lane<u32> &into) {
  LANES(lane) {
    const u32 at = group + NEIGHBOURS * lane;
    into[lane] = at < elements ? *reinterpret_cast<const u32 *>(rests + at) : 0;
  }
}

// A coded tile of `len` bytes; false for a damaged one.
DEVICE bool unpack_coded(const u32 *table, const u8 *tile, u32 len, u32 elements, u16 *weights) {
  const u32 rests_bytes = up_to(elements, 4);
  if (len < STATES_BYTES + rests_bytes) return false;
  const u8 *rests = tile + STATES_BYTES;
  const u16 *words = reinterpret_cast<const u16 *>(rests + rests_bytes);
  const u32 words_count = (len - STATES_BYTES - rests_bytes) / 2;
  per_lane<u32> state, is_wrong;
  LANES(lane) {
    state[lane] = reinterpret_cast<const u32 *>(tile)[lane];
    is_wrong[lane] = state[lane] < LOW;
  }
  if (ballot(is_wrong)) return false;
  u32 next = 0;
  // Rests are loaded a group ahead: the way from memory is as long as decoding a group or two.
  per_lane<u32> ahead;
  load_rests(rests, 0, elements, ahead);
  for (u32 group = 0; group < elements; group += GROUP) {
    per_lane<u32> symbols, four, is_low;
    LANES(lane) symbols[lane] = 0;
    LANES(lane) four[lane] = ahead[lane];
    load_rests(rests, group + GROUP, elements, ahead);
    UNROLL
    for (u32 k = 0; k < NEIGHBOURS; ++k) {
      LANES(lane) {
        const u32 entry = table[state[lane] % TABLE_LEN];
        state[lane] = ((entry >> 20) + 1) * (state[lane] >> TABLE_BITS) + (entry >> 8 & (TABLE_LEN - 1));
        symbols[lane] |= (entry & 0xffu) << 8 * k;
        is_low[lane] = state[lane] < LOW;
      }
      const u32 votes = ballot(is_low);
      LANES(lane) {
        if (is_low[lane]) {
          const u32 at = next + bits_set(votes & ((1u << lane) - 1));
          state[lane] = state[lane] << 16 | (at < words_count ? words[at] : 0u);
        }
      }
      next += bits_set(votes);
    }
    LANES(lane) {
      const u32 at = group + NEIGHBOURS * lane;
      if (at < elements) store_four(weights + at, symbols[lane], four[lane], elements - at);
    }
  }
  LANES(lane) is_wrong[lane] = state[lane] != LOW;
  const u32 used = STATES_BYTES + rests_bytes + 2 * next;
  return !ballot(is_wrong) && next <= words_count && up_to(used, 16) == len;
}

DEVICE bool unpack_tile(const u32 *table, const u8 *coded, u64 coded_bytes, u64 elements, u64 tile_index, u16 *weights) {
  const u64 tile_count = (elements + TILE_ELEMENTS - 1) / TILE_ELEMENTS;
  const u64 places_at = coded_bytes - 4 * (tile_count + 1);
  const u32 *places = reinterpret_cast<const u32 *>(coded + places_at);
  const u64 begin = 16ull * places[tile_index], end = 16ull * places[tile_index + 1];
  const u64 left = elements - tile_index * TILE_ELEMENTS;
  const u32 here = left < TILE_ELEMENTS ? u32(left) : TILE_ELEMENTS;
  const u32 raw = up_to(up_to(here, 4) + here, 16);
  if (begin < HEAD_BYTES || end <= begin || end > places_at || end - begin > raw) return false;
  if (end - begin == raw) {
    unpack_raw(coded + begin, here, weights);
    return true;
  }
  return unpack_coded(table, coded + begin, u32(end - begin), here, weights);
}

// Fills `table`, as src/model/tiles.rs describes its entries. False where the frequencies do not add up.
DEVICE bool fill_table(const u8 *coded, u32 *table) {
  SHARED u32 sums[2][SYMBOLS];
  const u16 *frequencies = reinterpret_cast<const u16 *>(coded + FREQUENCIES_AT);
  THREADS(t, UNPACK_THREADS) sums[0][t] = frequencies[t];
  u32 now = 0;
  for (u32 step = 1; step < SYMBOLS; step *= 2, now ^= 1) {
    BARRIER();
    THREADS(t, UNPACK_THREADS) sums[now ^ 1][t] = sums[now][t] + (t >= step ? sums[now][t - step] : 0);
  }
  BARRIER();
  // ends[s]: where the slots of symbol s end. It is the whole of the frequencies for the last one.
  const u32 *ends = sums[now];
  if (ends[SYMBOLS - 1] != TABLE_LEN) return false;
  THREADS(t, UNPACK_THREADS) {
    const u32 first = t * (TABLE_LEN / UNPACK_THREADS);
    // The first symbol that ends behind the first slot: 8 halvings of 256.
    u32 symbol = 0;
    for (u32 half = SYMBOLS / 2; half; half /= 2)
      if (ends[symbol + half - 1] <= first) symbol += half;
    for (u32 slot = first; slot < first + TABLE_LEN / UNPACK_THREADS; ++slot) {
      while (ends[symbol] <= slot) ++symbol;
      const u32 frequency = frequencies[symbol];
      table[slot] = (frequency - 1) << 20 | (slot - (ends[symbol] - frequency)) << 8 | symbol;
    }
  }
  BARRIER();
  return true;
}

// Decodes the tiles from `first_tile` on, `tile_count` of them, of the coded tensor of `elements` weights; `weights` is where the
// first of them goes. `coded` and `weights` are aligned to 16. `damaged` must hold 0xffffffff before; afterwards the index of the
// first damaged tile, if there is one. The host has checked that `coded_bytes` holds head and places and that the tiles exist.
// One block for each eight tiles, or fewer: they take turns.
KERNEL(UNPACK_THREADS)
flea_unpack(const u8 *coded, u64 coded_bytes, u64 elements, u64 first_tile, u64 tile_count, u16 *weights, u32 *damaged) {
  SHARED u32 table[TABLE_LEN];
  if (!fill_table(coded, table)) {
    THREADS(t, UNPACK_THREADS) {
      if (t == 0) atomic_min(damaged, u32(first_tile));
    }
    return;
  }
  WARPS(warp, UNPACK_WARPS) {
    for (u64 tile = u64(BLOCK_INDEX) * UNPACK_WARPS + warp; tile < tile_count; tile += u64(BLOCK_COUNT) * UNPACK_WARPS) {
      u16 *here = weights + tile * TILE_ELEMENTS;
      if (!unpack_tile(table, coded, coded_bytes, elements, first_tile + tile, here)) {
        LANES(lane) {
          if (lane == 0) atomic_min(damaged, u32(first_tile + tile));
        }
      }
    }
  }
}
