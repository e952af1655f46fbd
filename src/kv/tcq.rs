//! `tcq`: trellis-coded quantisation after a Hadamard rotation, for KV that is written once and read often.
//!
//! Each value is one of 4096 levels, chosen by a window of 12 bits that slides over the vector's bit string by `bits` per
//! value; the string is a ring (tail-biting), so that no bit is spent on a start. The encoder finds the best string by
//! dynamic programming over the 4096 windows; the decoder only looks levels up. Record: the string, then the scale.

use half::f16;

use super::bits::packed_bytes;
use super::lookup::Lookup;
use super::rotate::Hadamard;
use super::scalar::Spare;
use super::scale;
use super::vector::{dot, length};

/// Bits of a window; a multiple of every width from 1 to 4.
const WINDOW: u32 = 12;
pub(super) const STATES: usize = 1 << WINDOW;
/// Values on each side of the ring's seam that the first, open search looks at: with 24 the error at 2 bits is 1 % more.
const SEAM: usize = 40;
/// The levels of all windows for 1, 2, 3 and 4 bits, as f16: part of the format. Trained by `tcq_train`.
const LEVELS: &[u8; 4 * 2 * STATES] = include_bytes!("tcq_levels.bin");
/// The place of the decision in a cost: its lowest bits, which weigh nothing.
const DECISION: u32 = 15;
const IMPOSSIBLE: f32 = 1e30;

/// The codec for one rate and length.
#[derive(Debug, Clone)]
pub struct Tcq {
    rotation: Hadamard,
    /// The level of a window as the decoder reads it: the newest bits highest.
    levels: Lookup<STATES>,
    /// The same as the encoder counts: the newest bits lowest.
    mirrored: Box<[f32; STATES]>,
    bits: u32,
    dim: usize,
}

/// What the search works in.
#[derive(Debug)]
pub struct Search {
    /// Of each window.
    costs: Box<[u32; STATES]>,
    /// Of each history, with the decision in its lowest bits.
    best: Vec<u32>,
    /// For each value and history the predecessor's lost bits.
    decisions: Vec<u8>,
}

impl Search {
    /// For vectors of `dim` values.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self {
            costs: Box::new([0; STATES]),
            best: vec![0; STATES],
            decisions: vec![0; dim.max(2 * SEAM) * (STATES / 2)],
        }
    }
}

/// The window with its groups of `bits` in the opposite order.
const fn mirror(window: usize, bits: u32) -> usize {
    let (mut from, mut to, mut left) = (window, 0, WINDOW);
    while left > 0 {
        to = to << bits | from & ((1 << bits) - 1);
        from >>= bits;
        left -= bits;
    }
    to
}

impl Tcq {
    /// With `bits` from 1 to 4.
    #[must_use]
    pub fn new(bits: u32, dim: usize) -> Self {
        let table = LEVELS.chunks_exact(2 * STATES).nth(bits as usize - 1);
        let levels: Vec<f32> = table
            .into_iter()
            .flat_map(|table| table.chunks_exact(2))
            .map(|level| f16::from_le_bytes([level[0], level[1]]).to_f32())
            .collect();
        Self::with_levels(bits, dim, &levels)
    }

    /// With levels of its own, one per window.
    pub(super) fn with_levels(bits: u32, dim: usize, levels: &[f32]) -> Self {
        let mirrored = Box::new(std::array::from_fn(|window| levels[mirror(window, bits)]));
        Self {
            rotation: Hadamard::new(dim),
            levels: Lookup::new(|window| levels[window]),
            mirrored,
            bits,
            dim,
        }
    }

    /// The windows that a ring's values are looked up with.
    #[cfg(test)]
    pub(super) fn windows(&self, record: &[u8]) -> Vec<usize> {
        let total = self.dim * self.bits as usize;
        let bit = |at: usize| usize::from(record[at / 8] >> (at % 8) & 1);
        let window = WINDOW as usize;
        let first = |index: usize| (index + 1) * self.bits as usize + total * window - window;
        (0..self.dim)
            .map(|index| {
                (0..window).fold(0, |state, place| {
                    state | bit((first(index) + place) % total) << place
                })
            })
            .collect()
    }

    fn string_bytes(&self) -> usize {
        packed_bytes(self.dim, self.bits)
    }

    /// Bytes of a record.
    #[must_use]
    pub fn record_bytes(&self) -> usize {
        self.string_bytes() + 2
    }

    /// Encodes `x`, which is overwritten; false where it cannot be held.
    pub fn encode(
        &self,
        x: &mut [f32],
        record: &mut [u8],
        spare: &mut Spare,
        search: &mut Search,
    ) -> bool {
        let Some(norm) = length(x) else { return false };
        let deviation = norm / (self.dim as f32).sqrt();
        self.rotation.forward(x, &mut spare.values);
        let inverse = if norm > 0.0 { 1.0 / deviation } else { 0.0 };
        x.iter_mut().for_each(|value| *value *= inverse);
        match self.bits {
            1 => self.find::<1, 2>(x, search, &mut spare.indices),
            2 => self.find::<2, 4>(x, search, &mut spare.indices),
            3 => self.find::<3, 8>(x, search, &mut spare.indices),
            _ => self.find::<4, 16>(x, search, &mut spare.indices),
        }
        let (string, tail) = record.split_at_mut(self.string_bytes());
        super::bits::pack(&spare.indices[..self.dim], self.bits, string);
        self.look_up(string, &mut spare.values[..self.dim]);
        let fit = dot(x, &spare.values) / dot(&spare.values, &spare.values);
        let Some(code) = scale::encode(deviation * fit.max(0.0)) else {
            return false;
        };
        tail.copy_from_slice(&code.to_le_bytes());
        true
    }

    /// The best ring of `dim` groups of `BITS` bits for `x`.
    fn find<const BITS: u32, const GROUP: usize>(
        &self,
        x: &[f32],
        search: &mut Search,
        groups: &mut [u8],
    ) {
        // First the seam alone, open at both ends, to learn which history the ring should have there.
        // Short rings go round several times.
        let around = (0..2 * SEAM).map(|step| x[(step + SEAM * self.dim - SEAM) % self.dim]);
        self.sweep::<BITS, GROUP>(around, None, search);
        let last = cheapest(search, |_| true);
        let mut history = 0;
        trace::<BITS>(search, last, 2 * SEAM, |step, state| {
            if step == SEAM {
                history = state >> BITS;
            }
        });
        self.sweep::<BITS, GROUP>(x.iter().copied(), Some(history), search);
        let mask = (STATES >> BITS) - 1;
        let last = cheapest(search, |state| state & mask == history);
        trace::<BITS>(search, last, self.dim, |step, state| {
            groups[step] = (state & ((1 << BITS) - 1)) as u8;
        });
    }

    /// Costs of all windows after all values, and the decisions on the way. `GROUP` is 2^BITS. Three plain loops per
    /// value, each of which becomes vector instructions; one loop for all three does not.
    fn sweep<const BITS: u32, const GROUP: usize>(
        &self,
        x: impl Iterator<Item = f32>,
        history: Option<usize>,
        search: &mut Search,
    ) {
        let histories = STATES / GROUP;
        let best = &mut search.best[..histories];
        best.fill(history.map_or(0.0, |_| IMPOSSIBLE).to_bits());
        if let Some(history) = history {
            best[history] = 0.0f32.to_bits();
        }
        for (step, value) in x.enumerate() {
            if step > 0 {
                best.fill(u32::MAX);
                for (lost, costs) in search.costs.chunks_exact(histories).enumerate() {
                    for (best, cost) in best.iter_mut().zip(costs) {
                        *best = (*best).min((cost & !DECISION) | lost as u32);
                    }
                }
            }
            let decisions = &mut search.decisions[step * histories..][..histories];
            for (decision, best) in decisions.iter_mut().zip(best.iter()) {
                *decision = (best & DECISION) as u8;
            }
            for (group, best) in search
                .costs
                .as_chunks_mut::<GROUP>()
                .0
                .iter_mut()
                .zip(best.iter())
            {
                *group = [best & !DECISION; GROUP];
            }
            for (cost, level) in search.costs.iter_mut().zip(self.mirrored.iter()) {
                let miss = value - level;
                *cost = (f32::from_bits(*cost) + miss * miss).to_bits();
            }
        }
    }

    /// The levels of a ring.
    fn look_up(&self, string: &[u8], out: &mut [f32]) {
        match self.bits {
            1 => self.slide::<1>(string, out),
            2 => self.slide::<2>(string, out),
            3 => self.slide::<3>(string, out),
            _ => self.slide::<4>(string, out),
        }
    }

    fn slide<const BITS: usize>(&self, string: &[u8], out: &mut [f32]) {
        let window = WINDOW as usize;
        let total = out.len() * BITS;
        // The window of value i covers the bits before (i + 1) BITS. The first ones reach back over the seam.
        let bit = |at: usize| usize::from(string[at / 8] >> (at % 8) & 1);
        let mut state = 0;
        for back in (1..=window).rev() {
            state = state >> 1 | bit((total * window - back) % total) << (window - 1);
        }
        let head = window.next_multiple_of(8 * BITS) / BITS;
        let (first, rest) = out.split_at_mut(head.min(out.len()));
        for (index, value) in first.iter_mut().enumerate() {
            for place in 0..BITS {
                state = state >> 1 | bit(index * BITS + place) << (window - 1);
            }
            *value = self.levels.get(state);
        }
        // From here eight values begin at a whole byte, and the bits they need lie in the 8 bytes from two before it.
        let mut groups = rest.chunks_exact_mut(8);
        let mut at = head * BITS / 8 - 2;
        for group in &mut groups {
            let word = match string[at..].first_chunk::<8>() {
                Some(bytes) => u64::from_le_bytes(*bytes),
                None => string[at..]
                    .iter()
                    .rev()
                    .fold(0, |word, byte| word << 8 | u64::from(*byte)),
            } >> (16 + BITS - window);
            for (place, value) in group.iter_mut().enumerate() {
                *value = self.levels.get((word >> (place * BITS)) as usize);
            }
            at += BITS;
        }
        let done = (out.len() / 8 * 8).max(head);
        for (index, value) in out.iter_mut().enumerate().skip(done) {
            let first = (index + 1) * BITS - window;
            let state = (0..window).fold(0, |state, place| state | bit(first + place) << place);
            *value = self.levels.get(state);
        }
    }

    /// Decodes a record.
    pub fn decode(&self, record: &[u8], out: &mut [f32], spare: &mut Spare) {
        let (string, tail) = record.split_at(self.string_bytes());
        let scale = scale::decode(u16::from_le_bytes([tail[0], tail[1]]));
        self.look_up(string, out);
        out.iter_mut().for_each(|value| *value *= scale);
        self.rotation.inverse(out, &mut spare.values);
    }
}

fn cheapest(search: &Search, allowed: impl Fn(usize) -> bool) -> usize {
    let costs = search.costs.iter().enumerate();
    costs
        .filter(|(state, _)| allowed(*state))
        .min_by_key(|(_, cost)| **cost)
        .map_or(0, |(state, _)| state)
}

/// Walks back from the state after the last step and tells the state after each.
fn trace<const BITS: u32>(
    search: &Search,
    last: usize,
    steps: usize,
    mut tell: impl FnMut(usize, usize),
) {
    let histories = STATES >> BITS;
    let mut state = last;
    for step in (0..steps).rev() {
        tell(step, state);
        let history = state >> BITS;
        let lost = usize::from(search.decisions[step * histories + history]);
        state = history | lost << (WINDOW - BITS);
    }
}
