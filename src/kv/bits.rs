//! Indices of 1 to 8 bits, and runs of mixed widths, packed into bytes from the lowest bit up.
//!
//! Eight indices of `bits` bits are exactly `bits` bytes, which is what makes packing and unpacking straight lines.

/// Bytes that `count` indices of `bits` bits take.
#[must_use]
pub const fn packed_bytes(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(8)
}

/// Packs indices; `out` has [`packed_bytes`] bytes.
pub fn pack(indices: &[u8], bits: u32, out: &mut [u8]) {
    let width = bits as usize;
    for (group, bytes) in indices.chunks(8).zip(out.chunks_mut(width)) {
        let mut word = 0u64;
        for (place, index) in group.iter().enumerate() {
            word |= u64::from(*index) << (place * width);
        }
        let len = bytes.len();
        bytes.copy_from_slice(&word.to_le_bytes()[..len]);
    }
}

/// Unpacks as many indices as `out` is long; `packed` has [`packed_bytes`] bytes.
pub fn unpack(packed: &[u8], bits: u32, out: &mut [u8]) {
    match bits {
        1 => unpack_width::<1>(packed, out),
        2 => unpack_width::<2>(packed, out),
        3 => unpack_width::<3>(packed, out),
        4 => unpack_width::<4>(packed, out),
        5 => unpack_width::<5>(packed, out),
        6 => unpack_width::<6>(packed, out),
        7 => unpack_width::<7>(packed, out),
        _ => out.copy_from_slice(&packed[..out.len()]),
    }
}

fn unpack_width<const WIDTH: usize>(packed: &[u8], out: &mut [u8]) {
    let mask = (1u64 << WIDTH) - 1;
    let whole = out.len() / 8 * 8;
    let mut groups = out.chunks_exact_mut(8);
    let mut bytes = packed.chunks_exact(WIDTH);
    for (group, bytes) in (&mut groups).zip(&mut bytes) {
        let mut word = [0; 8];
        word[..WIDTH].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (place, index) in group.iter_mut().enumerate() {
            *index = ((word >> (place * WIDTH)) & mask) as u8;
        }
    }
    let rest = groups.into_remainder();
    let mut word = 0u64;
    for (place, byte) in packed[packed_bytes(whole, WIDTH as u32)..]
        .iter()
        .take(8)
        .enumerate()
    {
        word |= u64::from(*byte) << (8 * place);
    }
    for (place, index) in rest.iter_mut().enumerate() {
        *index = ((word >> (place * WIDTH)) & mask) as u8;
    }
}

/// Writes values of any width one after the other.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
    word: u64,
    used: u32,
}

impl<'a> Writer<'a> {
    /// Writes to the front of `out`.
    pub const fn new(out: &'a mut [u8]) -> Self {
        Self {
            out,
            at: 0,
            word: 0,
            used: 0,
        }
    }

    /// Appends the low `bits` (at most 32) of `value`, whose other bits are 0.
    #[inline]
    pub fn put(&mut self, value: u32, bits: u32) {
        self.word |= u64::from(value) << self.used;
        self.used += bits;
        while self.used >= 8 {
            self.out[self.at] = self.word as u8;
            self.at += 1;
            self.word >>= 8;
            self.used -= 8;
        }
    }

    /// Writes what is left of the last byte.
    pub fn finish(self) {
        if self.used > 0 {
            self.out[self.at] = self.word as u8;
        }
    }
}

/// Reads what [`Writer`] wrote; beyond the end come zeros.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    word: u64,
    have: u32,
}

impl<'a> Reader<'a> {
    /// Reads from the front of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            word: 0,
            have: 0,
        }
    }

    /// The next `bits` (at most 32).
    #[inline]
    pub fn take(&mut self, bits: u32) -> u32 {
        while self.have < bits {
            let byte = self.bytes.get(self.at).copied().unwrap_or(0);
            self.word |= u64::from(byte) << self.have;
            self.at += 1;
            self.have += 8;
        }
        let value = self.word & ((1u64 << bits) - 1);
        self.word >>= bits;
        self.have -= bits;
        value as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packed_indices_come_back(bits in 1u32..=8, raw in proptest::collection::vec(any::<u8>(), 1..300)) {
            let indices: Vec<u8> = raw.iter().map(|byte| (u32::from(*byte) & ((1 << bits) - 1)) as u8).collect();
            let mut packed = vec![0; packed_bytes(indices.len(), bits)];
            pack(&indices, bits, &mut packed);
            let mut back = vec![0; indices.len()];
            unpack(&packed, bits, &mut back);
            prop_assert_eq!(&back, &indices);
        }

        #[test]
        fn mixed_widths_come_back(values in proptest::collection::vec((any::<u32>(), 0u32..=32), 0..200)) {
            let values: Vec<(u32, u32)> =
                values.iter().map(|(v, bits)| ((u64::from(*v) & ((1u64 << bits) - 1)) as u32, *bits)).collect();
            let total: u32 = values.iter().map(|(_, bits)| bits).sum();
            let mut bytes = vec![0; (total as usize).div_ceil(8)];
            let mut writer = Writer::new(&mut bytes);
            values.iter().for_each(|(value, bits)| writer.put(*value, *bits));
            writer.finish();
            let mut reader = Reader::new(&bytes);
            for (value, bits) in values {
                prop_assert_eq!(reader.take(bits), value);
            }
        }
    }
}
