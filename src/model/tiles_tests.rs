//! Tests of tiles and coded tensors: everything comes back, nothing grows beyond its bound, damage is found or harmless.

use super::*;
use crate::error::ErrorKind;
use crate::model::coded;
use half::{bf16, f16};
use proptest::prelude::*;

/// splitmix64, as the sum of twelve: near normal to four standard deviations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12)
            .map(|_| (self.next() >> 11) as f64 / (1_u64 << 53) as f64)
            .sum();
        (sum - 6.0) as f32
    }
}

fn gaussian_bf16(elements: usize, std: f32) -> Vec<u8> {
    let mut random = Random(1);
    (0..elements)
        .flat_map(|_| bf16::from_f32(std * random.normal()).to_le_bytes())
        .collect()
}

fn comes_back(weights: &[u8]) -> usize {
    let form = coded::encode(weights).expect("weights");
    let mut out = vec![0xa5; weights.len()];
    coded::decode(&form, &mut out).expect("what was encoded");
    assert!(out == weights, "{} weights", weights.len() / 2);
    let bound = weights.len()
        + coded::HEAD_BYTES
        + (4 + ALIGN_BYTES) * (tile_count(weights.len() as u64 / 2) as usize + 1);
    assert!(form.len() <= bound, "{} of {bound}", form.len());
    form.len()
}

#[test]
fn a_weight_is_its_symbol_and_its_rest() {
    for weight in 0..=u16::MAX {
        assert_eq!(join(symbol(weight), rest(weight)), weight);
    }
    // A bfloat16's symbol is its exponent.
    assert_eq!(symbol(bf16::from_f32(-1.0).to_bits()), 127);
}

/// What DFloat11 and others report for trained weights is 0.67 to 0.70; the entropy of a Gaussian's exponent is 2.55 bits.
#[test]
fn gaussian_weights_shrink_to_two_thirds() {
    let weights = gaussian_bf16(40 * TILE_ELEMENTS + 777, 0.02);
    let ratio = comes_back(&weights) as f64 / weights.len() as f64;
    assert!((0.65..0.68).contains(&ratio), "bf16 {ratio}");
    let mut random = Random(2);
    let halves: Vec<u8> = (0..100_000)
        .flat_map(|_| f16::from_f32(0.02 * random.normal()).to_le_bytes())
        .collect();
    let ratio = comes_back(&halves) as f64 / halves.len() as f64;
    assert!((0.82..0.87).contains(&ratio), "f16 {ratio}");
}

#[test]
fn every_pattern_comes_back() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    comes_back(&all);
    let nans: Vec<u8> = (0..20_000_u16)
        .flat_map(|payload| (0x7f80 | (payload % 128) | (payload << 15)).to_le_bytes())
        .collect();
    comes_back(&nans);
    for one in [0_u16, 0x8000, 0x3f80, 0xffff] {
        // One symbol costs nothing: what remains are the rests and the states.
        let weights = one.to_le_bytes().repeat(TILE_ELEMENTS);
        assert!(comes_back(&weights) < TILE_ELEMENTS + 1000);
    }
}

#[test]
fn what_cannot_shrink_stays_as_it_is() {
    let mut random = Random(3);
    let noise: Vec<u8> = (0..10 * TILE_BYTES).map(|_| random.next() as u8).collect();
    assert!(comes_back(&noise) > noise.len());
    // One wild tile among tame ones is raw, and the table that it spoils still serves the others.
    let mut mixed = gaussian_bf16(20 * TILE_ELEMENTS, 1.0);
    mixed[..TILE_BYTES].copy_from_slice(&noise[..TILE_BYTES]);
    assert!(comes_back(&mixed) < mixed.len() * 3 / 4);
}

/// The model may change between counting and coding: what was not counted is coded wrongly, which a check finds, and no panic.
#[test]
fn symbols_that_were_not_counted_do_no_harm() {
    let mut counts = [0; 256];
    count(&gaussian_bf16(1000, 0.1), &mut counts);
    let frequencies = Frequencies::new(&counts).unwrap();
    let weights: Vec<u8> = (0..=u16::MAX)
        .step_by(8)
        .flat_map(u16::to_le_bytes)
        .collect();
    let mut tile = Vec::new();
    Encoder::new(&frequencies).encode(&weights, &mut tile);
    let mut out = vec![0; weights.len()];
    let decoded = Decoder::new(&frequencies).decode(&tile, &mut out);
    assert!(decoded.is_err() || out != weights || tile.len() == raw_bytes(TILE_ELEMENTS));
}

#[test]
fn tables_hold_every_symbol_and_add_up() {
    let mut counts = [1_u64; 256];
    counts[7] = u64::MAX / 2;
    let frequencies = Frequencies::new(&counts).unwrap();
    assert!(frequencies.0.iter().all(|&f| f >= 1));
    assert_eq!(
        Frequencies::from_bytes(&frequencies.to_bytes()).as_ref(),
        Some(&frequencies)
    );
    let mut wrong = frequencies.to_bytes();
    wrong[14] ^= 1;
    assert_eq!(Frequencies::from_bytes(&wrong), None);
    assert_eq!(Frequencies::new(&[0; 256]), None);
    let mut one = [0; 256];
    one[255] = 3;
    assert_eq!(Frequencies::new(&one).unwrap().0[255], 4096);
}

/// A coded tensor cut short or with a byte changed is refused, or (where a rest was hit) gives other weights: never a panic.
#[test]
fn damage_is_an_error_that_names_its_place() {
    let weights = gaussian_bf16(2 * TILE_ELEMENTS + 100, 0.1);
    let form = coded::encode(&weights).unwrap();
    let mut out = vec![0; weights.len()];
    for len in (0..form.len()).step_by(7) {
        let error = coded::decode(&form[..len], &mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Format, "{len}");
    }
    let mut unnoticed = 0;
    for at in (0..form.len()).step_by(11) {
        let mut damaged = form.clone();
        damaged[at] ^= 0x10;
        match coded::decode(&damaged, &mut out) {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Format);
                assert!(error.context().contains("coded form"), "{error}");
            }
            Ok(()) => {
                assert!(out != weights, "a change at {at} makes no difference");
                unnoticed += 1;
            }
        }
    }
    // The rests carry no redundancy, two thirds of the record: that is what checksums are for.
    assert!(unnoticed > 0 && unnoticed < form.len() / 11);
}

fn any_weights() -> impl Strategy<Value = Vec<u8>> {
    let flat = proptest::collection::vec(any::<u16>(), 1..3000);
    let skewed = (any::<u16>(), proptest::collection::vec(0_u16..600, 1..3000))
        .prop_map(|(base, offsets)| offsets.iter().map(|o| base.wrapping_add(*o)).collect());
    let long =
        (any::<u64>(), 1_usize..3 * TILE_ELEMENTS, 1_u32..16).prop_map(|(seed, len, bits)| {
            let mut random = Random(seed);
            (0..len)
                .map(|_| (random.next() >> (64 - bits)) as u16)
                .collect::<Vec<u16>>()
        });
    prop_oneof![flat, skewed, long]
        .prop_map(|weights| weights.into_iter().flat_map(u16::to_le_bytes).collect())
}

proptest! {
    #[test]
    fn all_weights_come_back(weights in any_weights()) {
        comes_back(&weights);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        tile in proptest::collection::vec(any::<u8>(), 0..2000),
        elements in 0_usize..9000,
        counts in proptest::collection::vec(0_u64..50, 256),
    ) {
        let counts: [u64; 256] = counts.try_into().unwrap();
        if let Some(frequencies) = Frequencies::new(&counts) {
            let decoder = Decoder::new(&frequencies);
            let mut out = vec![0; 2 * elements];
            let _ = decoder.decode(&tile, &mut out);
            // Lengths that may be a tile's, and states that are possible.
            let mut tile = tile;
            tile.truncate(tile.len() & !15);
            for state in tile.as_chunks_mut::<4>().0.iter_mut().take(32) {
                state[2] |= 1;
            }
            let _ = decoder.decode(&tile, &mut out);
        }
    }

    #[test]
    fn any_coded_tensor_is_decoded_or_refused(
        weights in any_weights(),
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4),
    ) {
        let mut form = coded::encode(&weights).unwrap();
        for (at, value) in changes {
            let at = usize::from(at) % form.len();
            form[at] = value;
        }
        let mut out = vec![0; weights.len()];
        let _ = coded::decode(&form, &mut out);
    }
}
