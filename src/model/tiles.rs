//! Lossless coding of 16-bit weights, made so that a GPU can undo it: docs/packed-format.md has the format and its reasons.
//!
//! A weight is cut in two bytes: the *symbol*, bits 14 to 7 (the exponent of a bfloat16; exponent and three bits of mantissa
//! of a half), and the *rest*, sign and lower mantissa, which nothing can shorten. Symbols are coded by a range variant of
//! asymmetric numeral systems with one table per tensor, 32 states in turn, one for each lane of a warp. A *tile* is what is
//! decoded on its own: 8192 weights. A tile that would not get shorter keeps its symbols as they are.
//! Invariants: what [`Encoder::encode`] gives, [`Decoder::decode`] turns back into the same bytes, whatever they mean; any
//! other bytes are decoded or refused, never a panic; no tile is longer than its weights and 16 bytes.
//! Place: between `reader` and `pool` of `file -> catalog -> plan -> reader -> pool -> lease -> host`; pure.

use std::fmt;

/// Weights of a tile; the last one of a tensor may have fewer.
pub const TILE_ELEMENTS: usize = 8192;
/// Bytes of a whole tile's weights.
pub const TILE_BYTES: usize = 2 * TILE_ELEMENTS;
/// What the beginning of a tile is aligned to in its coded tensor: GPUs load 16 bytes at a time.
pub const ALIGN_BYTES: usize = 16;
/// States that share a tile: the lanes of a warp.
const LANES: usize = 32;
/// Neighbours that one lane decodes, so that it loads 4 and stores 8 bytes at a time.
const NEIGHBOURS: usize = 4;
/// Weights that all lanes decode together.
const GROUP: usize = LANES * NEIGHBOURS;
/// Bytes of the states at the beginning of a tile.
const STATES_BYTES: usize = 4 * LANES;
/// Probabilities are multiples of 2^-12: the table has 16 KiB then, and a multiprocessor's shared memory holds several.
const TABLE_BITS: u32 = 12;
const TABLE_LEN: usize = 1 << TABLE_BITS;
/// States stay in 2^16 to 2^32: one 16-bit word at most is moved per symbol.
const LOW: u32 = 1 << 16;
/// More words than the longest coded tile has: those of raw symbols, less the states.
const WORDS_MAX: usize = TILE_ELEMENTS / 2;
/// Bytes of [`Frequencies`] in a file.
pub const FREQUENCIES_BYTES: usize = 512;

const _: () = assert!(TILE_ELEMENTS.is_multiple_of(GROUP) && WORDS_MAX.is_power_of_two());

/// What is wrong with a tile or a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// A length that no tile of so many weights has.
    Length,
    /// A state where none can be.
    State,
    /// The symbols do not end where the tile does.
    End,
    /// Something in the padding.
    Padding,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "its length is impossible",
            Self::State => "it begins with a state that is impossible",
            Self::End => "its symbols do not end where it ends",
            Self::Padding => "its padding is not zero",
        })
    }
}

const fn symbol(weight: u16) -> u8 {
    (weight >> 7) as u8
}

const fn rest(weight: u16) -> u8 {
    (weight >> 8 & 0x80 | weight & 0x7f) as u8
}

const fn join(symbol: u8, rest: u8) -> u16 {
    (rest as u16 & 0x80) << 8 | (symbol as u16) << 7 | rest as u16 & 0x7f
}

/// Tiles of a tensor of so many weights.
#[must_use]
pub const fn tile_count(elements: u64) -> u64 {
    elements.div_ceil(TILE_ELEMENTS as u64)
}

/// Bytes of a tile that keeps its symbols as they are: the longest there is.
#[must_use]
pub const fn raw_bytes(elements: usize) -> usize {
    (elements.next_multiple_of(4) + elements).next_multiple_of(ALIGN_BYTES)
}

/// Adds up how often each symbol occurs in little-endian weights.
pub fn count(weights: &[u8], counts: &mut [u64; 256]) {
    // Two sets of counters: neighbours are often alike, and an addition that waits for the one before costs its latency.
    let mut other = [0_u64; 256];
    for pair in weights.as_chunks::<4>().0 {
        counts[usize::from(symbol(u16::from_le_bytes([pair[0], pair[1]])))] += 1;
        other[usize::from(symbol(u16::from_le_bytes([pair[2], pair[3]])))] += 1;
    }
    if let [low, high] = weights.as_chunks::<4>().1 {
        counts[usize::from(symbol(u16::from_le_bytes([*low, *high])))] += 1;
    }
    for (sum, more) in counts.iter_mut().zip(other) {
        *sum += more;
    }
}

/// How often each symbol occurs, in parts of 4096. Every symbol that occurs has at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frequencies([u16; 256]);

impl Frequencies {
    /// From counts; `None` where nothing was counted.
    #[must_use]
    pub fn new(counts: &[u64; 256]) -> Option<Self> {
        let total: u128 = counts.iter().map(|&count| u128::from(count)).sum();
        if total == 0 {
            return None;
        }
        let share = |&count: &u64| match count {
            0 => 0,
            _ => (u128::from(count) * TABLE_LEN as u128 / total).max(1) as u16,
        };
        let mut frequencies: Vec<u16> = counts.iter().map(share).collect();
        // Rounding leaves a few parts over, rare symbols may have taken too many: the most frequent one notices it least.
        let mut sum: i32 = frequencies.iter().map(|&f| i32::from(f)).sum();
        while sum != TABLE_LEN as i32 {
            let most = (0..256).max_by_key(|&s| frequencies[s]).unwrap_or(0);
            let change =
                (TABLE_LEN as i32 - sum).clamp(-(i32::from(frequencies[most]) / 16).max(1), 64);
            frequencies[most] = (i32::from(frequencies[most]) + change) as u16;
            sum += change;
        }
        frequencies.try_into().ok().map(Self)
    }

    /// As they stand in a file.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; FREQUENCIES_BYTES] {
        let mut bytes = [0; FREQUENCIES_BYTES];
        for (place, frequency) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            *place = frequency.to_le_bytes();
        }
        bytes
    }

    /// What [`Self::to_bytes`] gave; `None` unless they add up to one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; FREQUENCIES_BYTES]) -> Option<Self> {
        let mut frequencies = [0; 256];
        for (frequency, place) in frequencies.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *frequency = u16::from_le_bytes(*place);
        }
        let sum: usize = frequencies.iter().map(|&f| usize::from(f)).sum();
        (sum == TABLE_LEN).then_some(Self(frequencies))
    }

    /// About how many bytes the symbols of these counts take.
    #[must_use]
    pub fn coded_bytes(&self, counts: &[u64; 256]) -> u64 {
        let bits = |(&count, &frequency): (&u64, &u16)| match frequency {
            0 => 0.0,
            _ => count as f64 * (f64::from(TABLE_BITS) - f64::from(frequency).log2()),
        };
        (counts.iter().zip(&self.0).map(bits).sum::<f64>() / 8.0) as u64
    }

    /// Where each symbol's slots begin.
    fn starts(&self) -> [u16; 256] {
        let mut next = 0;
        self.0.map(|frequency| {
            let start = next;
            next += frequency;
            start
        })
    }
}

/// Writes tiles of one tensor.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// Frequency and start of each symbol.
    symbols: [(u32, u32); 256],
    likeliest: u8,
    /// Symbols of the tile at hand, padded to whole groups.
    tile: Box<[u8; TILE_ELEMENTS]>,
    words: Vec<u16>,
}

impl Encoder {
    /// An encoder with this table.
    #[must_use]
    pub fn new(frequencies: &Frequencies) -> Self {
        let starts = frequencies.starts();
        let likeliest = (0..=255_u8).max_by_key(|&s| frequencies.0[usize::from(s)]);
        Self {
            // A symbol that was not counted has neither: these only keep the arithmetic below defined.
            symbols: std::array::from_fn(|s| {
                (
                    u32::from(frequencies.0[s].max(1)),
                    u32::from(starts[s]).min(TABLE_LEN as u32 - 1),
                )
            }),
            likeliest: likeliest.unwrap_or(0),
            tile: Box::new([0; TILE_ELEMENTS]),
            words: Vec::with_capacity(TILE_ELEMENTS),
        }
    }

    /// Appends the tile of these little-endian weights (1 to [`TILE_ELEMENTS`]) to `out`, padded with zeros to
    /// [`ALIGN_BYTES`]. Weights whose symbols were counted for the table come back from it; others need not.
    pub fn encode(&mut self, weights: &[u8], out: &mut Vec<u8>) {
        let weights = weights.as_chunks::<2>().0;
        let elements = weights.len();
        let begin = out.len();
        out.resize(begin + STATES_BYTES, 0);
        for (place, weight) in self.tile.iter_mut().zip(weights) {
            let weight = u16::from_le_bytes(*weight);
            *place = symbol(weight);
            out.push(rest(weight));
        }
        let rests_end = begin + STATES_BYTES + elements.next_multiple_of(4);
        out.resize(rests_end, 0);
        let padded = elements.next_multiple_of(GROUP);
        self.tile[elements..padded].fill(self.likeliest);
        let states = self.encode_symbols(padded);
        let coded_bytes = (rests_end - begin + 2 * self.words.len()).next_multiple_of(ALIGN_BYTES);
        if coded_bytes < raw_bytes(elements) {
            for (place, state) in out[begin..].as_chunks_mut::<4>().0.iter_mut().zip(states) {
                *place = state.to_le_bytes();
            }
            out.extend(self.words.iter().rev().flat_map(|word| word.to_le_bytes()));
            out.resize(begin + coded_bytes, 0);
        } else {
            out.drain(begin..begin + STATES_BYTES);
            out.extend(&self.tile[..elements]);
            out.resize(begin + raw_bytes(elements), 0);
        }
    }

    /// Last symbol first, as a stack: the decoder takes them off in order. Leaves the words last first.
    fn encode_symbols(&mut self, padded: usize) -> [u32; LANES] {
        let mut states = [LOW; LANES];
        self.words.clear();
        for group in self.tile[..padded].as_chunks::<GROUP>().0.iter().rev() {
            for neighbour in (0..NEIGHBOURS).rev() {
                for (lane, state) in states.iter_mut().enumerate().rev() {
                    let symbol = group[lane * NEIGHBOURS + neighbour];
                    let (frequency, start) = self.symbols[usize::from(symbol)];
                    if u64::from(*state) >= u64::from(frequency) << (32 - TABLE_BITS) {
                        self.words.push(*state as u16);
                        *state >>= 16;
                    }
                    *state = ((*state / frequency) << TABLE_BITS) + *state % frequency + start;
                }
            }
        }
        states
    }
}

/// Reads tiles of one tensor.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// For each slot its symbol (8 bits), its place among the symbol's slots (12) and the symbol's frequency less 1 (12).
    table: Box<[u32; TABLE_LEN]>,
}

impl Decoder {
    /// A decoder with this table.
    #[must_use]
    pub fn new(frequencies: &Frequencies) -> Self {
        let mut table = Box::new([0; TABLE_LEN]);
        let mut slots = table.iter_mut();
        for (symbol, &frequency) in (0..).zip(&frequencies.0) {
            let frequency = u32::from(frequency);
            for (place, slot) in (0..frequency).zip(slots.by_ref()) {
                *slot = (frequency - 1) << 20 | place << 8 | symbol;
            }
        }
        Self { table }
    }

    /// Decodes one tile, as long as its bytes are, into as many weights as `out` has room for.
    ///
    /// # Errors
    /// What is wrong with the tile.
    pub fn decode(&self, tile: &[u8], out: &mut [u8]) -> Result<(), Damage> {
        let elements = out.len() / 2;
        let rests_bytes = elements.next_multiple_of(4);
        let raw = raw_bytes(elements);
        if out.is_empty()
            || out.len() > TILE_BYTES
            || !out.len().is_multiple_of(2)
            || tile.len() > raw
            || !tile.len().is_multiple_of(ALIGN_BYTES)
        {
            return Err(Damage::Length);
        }
        if tile.len() == raw {
            let (rests, symbols) = tile.split_at(rests_bytes);
            let (symbols, padding) = symbols.split_at(elements);
            join_all(symbols, &rests[..elements], out);
            return if padding
                .iter()
                .chain(&rests[elements..])
                .any(|&byte| byte != 0)
            {
                Err(Damage::Padding)
            } else {
                Ok(())
            };
        }
        let Some((states, rests)) = tile.split_at_checked(STATES_BYTES) else {
            return Err(Damage::Length);
        };
        let Some((rests, words)) = rests.split_at_checked(rests_bytes) else {
            return Err(Damage::Length);
        };
        let (states, rests) = (read_states(states)?, &rests[..rests_bytes]);
        let used = self.decode_symbols(states, words, &rests[..elements], out)?;
        let end = (STATES_BYTES + rests_bytes + 2 * used).next_multiple_of(ALIGN_BYTES);
        if end != tile.len() {
            return Err(Damage::End);
        }
        if words[2 * used..]
            .iter()
            .chain(&rests[elements..])
            .any(|&byte| byte != 0)
        {
            return Err(Damage::Padding);
        }
        Ok(())
    }

    /// Gives how many words it took.
    fn decode_symbols(
        &self,
        mut states: [u32; LANES],
        words: &[u8],
        rests: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Damage> {
        // Of its full length, so that a place in it needs no check; what reads beyond the words is found at the end.
        let mut copied = [0_u16; WORDS_MAX];
        let words = words.as_chunks::<2>().0;
        for (place, word) in copied.iter_mut().zip(words) {
            *place = u16::from_le_bytes(*word);
        }
        let mut next = 0_usize;
        let mut symbols = [0_u8; GROUP];
        for (rests, out) in rests.chunks(GROUP).zip(out.chunks_mut(2 * GROUP)) {
            for neighbour in 0..NEIGHBOURS {
                for (lane, state) in states.iter_mut().enumerate() {
                    let entry = self.table[*state as usize % TABLE_LEN];
                    symbols[lane * NEIGHBOURS + neighbour] = entry as u8;
                    // Below 2^32: the frequency is at most 2^12, the rest of the state below 2^20.
                    let state_next = ((entry >> 20) + 1)
                        .wrapping_mul(*state >> TABLE_BITS)
                        .wrapping_add(entry >> 8 & (TABLE_LEN as u32 - 1));
                    // Without a branch: whether a word is needed is anybody's guess.
                    let refilled = state_next << 16 | u32::from(copied[next % WORDS_MAX]);
                    let is_low = state_next < LOW;
                    *state = if is_low { refilled } else { state_next };
                    next += usize::from(is_low);
                }
            }
            join_all(&symbols[..rests.len()], rests, out);
        }
        if next > words.len() || states != [LOW; LANES] {
            return Err(Damage::End);
        }
        Ok(next)
    }
}

fn join_all(symbols: &[u8], rests: &[u8], out: &mut [u8]) {
    let weights = out.as_chunks_mut::<2>().0.iter_mut();
    for ((weight, &symbol), &rest) in weights.zip(symbols).zip(rests) {
        *weight = join(symbol, rest).to_le_bytes();
    }
}

fn read_states(bytes: &[u8]) -> Result<[u32; LANES], Damage> {
    let mut states = [0; LANES];
    for (state, bytes) in states.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *state = u32::from_le_bytes(*bytes);
        if *state < LOW {
            return Err(Damage::State);
        }
    }
    Ok(states)
}

#[cfg(test)]
#[path = "tiles_tests.rs"]
mod tests;
