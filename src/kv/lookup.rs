//! Tables that are read one value at a time.
//!
//! The compiler turns a loop of table reads into gather instructions, which take three times as long as plain loads on
//! CPUs that got microcode against Downfall (AVX-512, 2.5 GHz: 150 against 50 ns for 128 values). Relaxed atomic loads
//! are plain loads that it leaves alone. Nothing here is ever written after it was made.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// `N` values; an index is taken modulo `N`, a power of two.
pub struct Lookup<const N: usize>(Box<[AtomicU32; N]>);

impl<const N: usize> Lookup<N> {
    /// A table of what `value` gives for 0 to N - 1.
    #[must_use]
    pub fn new(value: impl Fn(usize) -> f32) -> Self {
        const { assert!(N.is_power_of_two()) };
        Self(Box::new(std::array::from_fn(|index| {
            AtomicU32::new(value(index).to_bits())
        })))
    }

    /// The value at `index` modulo N.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        f32::from_bits(self.0[index & (N - 1)].load(Ordering::Relaxed))
    }
}

/// Two values for each byte: what two neighbouring indices of at most 4 bits stand for.
pub struct Pairs(Box<[AtomicU64; 256]>);

impl Pairs {
    /// The table for indices of `bits` bits, the first in the lower ones.
    #[must_use]
    pub fn new(bits: u32, value: impl Fn(usize) -> f32) -> Self {
        let mask = (1usize << bits) - 1;
        let half = |index: usize| u64::from(value(index & mask).to_bits());
        Self(Box::new(std::array::from_fn(|byte| {
            AtomicU64::new(half(byte) | half(byte >> bits) << 32)
        })))
    }

    /// The two values of a byte.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, byte: u8) -> [f32; 2] {
        let word = self.0[byte as usize].load(Ordering::Relaxed);
        [
            f32::from_bits(word as u32),
            f32::from_bits((word >> 32) as u32),
        ]
    }
}

impl<const N: usize> Clone for Lookup<N> {
    fn clone(&self) -> Self {
        Self::new(|index| self.get(index))
    }
}

impl Clone for Pairs {
    fn clone(&self) -> Self {
        Self(Box::new(std::array::from_fn(|byte| {
            AtomicU64::new(self.0[byte].load(Ordering::Relaxed))
        })))
    }
}

impl<const N: usize> fmt::Debug for Lookup<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lookup<{N}>")
    }
}

impl fmt::Debug for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pairs")
    }
}
