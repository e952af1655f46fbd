//! The KV codecs against published bounds and figures: quality at stored bits, exact baselines, non-finite values,
//! determinism and hostile frames. What the figures are held against is in tests/data.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use flea::kv::quality::{Quality, compare};
use flea::kv::spec::{Choice, Codec};
use flea::kv::synth::Distribution;
use flea::kv::{Calibration, Coder, Spec, Values, frame};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::Value;

const TOKENS: usize = 2048;
const HEADS: usize = 4;

fn data(name: &str) -> Value {
    let path = format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).expect("test data")).expect("JSON")
}

fn coder(spec: &str, dim: usize) -> Coder {
    Coder::new(Spec::parse(spec, dim).expect("a spec")).expect("a coder")
}

/// The tensor of the reference: seed 0, 2048 tokens, 4 heads.
fn tensor(distribution: Distribution, dim: usize) -> &'static [f32] {
    type Made = Mutex<HashMap<(&'static str, usize), &'static [f32]>>;
    static MADE: OnceLock<Made> = OnceLock::new();
    let mut made = MADE
        .get_or_init(Made::default)
        .lock()
        .expect("no panic while held");
    made.entry((distribution.name(), dim))
        .or_insert_with(|| Vec::leak(distribution.sample(TOKENS * HEADS, dim, 0)))
}

struct Measured {
    quality: Quality,
    /// All bytes of the frame.
    stored_bits: f64,
}

fn measure(coder: &Coder, values: &[f32]) -> Measured {
    let bytes = coder.encode(Values::F32(values)).expect("encodes");
    let back = coder.decode(&bytes).expect("decodes");
    Measured {
        quality: compare(values, &back, coder.spec().dim),
        stored_bits: bytes.len() as f64 * 8.0 / values.len() as f64,
    }
}

fn named(distribution: &str) -> Distribution {
    Distribution::ALL
        .into_iter()
        .find(|d| d.name() == distribution)
        .expect("a distribution")
}

/// G6: the baseline gives the figures of the original, on its own tensors, to four digits; and the stored bits are those
/// that the original does not tell.
#[test]
fn dh013_is_the_original_to_four_digits() {
    let data = data("kv_dh013.json");
    let mut rows = 0;
    for row in data["rows"].as_array().expect("rows") {
        let number = |index: usize| row[index].as_f64().expect("a number");
        let (distribution, dim, bits) = (
            named(row[0].as_str().expect("a name")),
            number(1) as usize,
            number(2) as u32,
        );
        let found = measure(
            &coder(&format!("dh013:{bits}"), dim),
            tensor(distribution, dim),
        );
        let what = format!(
            "{} {dim} r={bits}: {:?}",
            distribution.name(),
            found.quality
        );
        let close = |value: f64, wanted: f64, digits: f64| (value - wanted).abs() <= 0.6 * digits;
        assert!(
            close(found.quality.cosine, number(4), 1e-4),
            "cosine {what}"
        );
        assert!(
            close(found.quality.norm_ratio, number(5), 1e-4),
            "norm ratio {what}"
        );
        assert!(close(found.quality.nmse, number(6), 1e-4), "nmse {what}");
        // Where four decimals say little, four digits: the original keeps its two scalars in 32 bits, we in 16.
        let relative = if bits <= 4 { 1e-3 } else { 2e-2 };
        assert!(
            (found.quality.nmse / number(6) - 1.0).abs() < relative,
            "nmse {what}"
        );
        assert!(
            (found.quality.mse / number(3) - 1.0).abs() < relative,
            "mse {what}"
        );
        let padded = dim.next_power_of_two() as f64;
        let stored = (padded * f64::from(1 + bits) + 32.0) / dim as f64;
        assert!(
            (found.stored_bits - stored).abs() < 1e-3,
            "stored {} {what}",
            found.stored_bits
        );
        rows += 1;
    }
    assert_eq!(rows, 60);
}

/// The llama.cpp formats give what numpy gave on the same tensors.
#[test]
fn q4_0_and_q8_0_are_those_of_ggml() {
    for row in data("kv_prototypes.json")["rows"].as_array().expect("rows") {
        let method = row[0].as_str().expect("a name");
        if method != "q4_0" && method != "q8_0" {
            continue;
        }
        let dim = row[2].as_u64().expect("a number") as usize;
        let found = measure(
            &coder(method, dim),
            tensor(named(row[1].as_str().expect("a name")), dim),
        );
        let wanted = row[4].as_f64().expect("a number");
        assert!(
            (found.quality.nmse / wanted - 1.0).abs() < 0.005,
            "{row}: {:?}",
            found.quality
        );
        assert!((found.stored_bits - row[3].as_f64().expect("a number")).abs() < 0.001);
    }
}

/// G1: within 1 % of the Lloyd column on a Gaussian, and no better than the bound for the sphere allows (less what a
/// fitted scale gains, one part in `dim`).
#[test]
fn tq_is_lloyd_max() {
    let theory = data("kv_theory_bounds.json");
    for (bits, row) in (1..=6).zip(theory["integer_bits"].as_array().expect("rows")) {
        for dim in [64, 128, 256] {
            let found = measure(
                &coder(&format!("tq:{bits}"), dim),
                tensor(Distribution::Gaussian, dim),
            );
            let lloyd = row["lloyd_max"].as_f64().expect("a number");
            let sphere = row["beta"][dim.to_string()].as_f64().expect("a number");
            let nmse = found.quality.nmse;
            assert!(
                nmse <= 1.01 * lloyd,
                "{bits} bits of {dim}: {nmse} against {lloyd}"
            );
            assert!(
                (nmse / sphere - 1.0).abs() < 4.0 / dim as f64,
                "{bits} bits of {dim}: {nmse} against {sphere}"
            );
            assert!(nmse > row["shannon"].as_f64().expect("a number"));
            let stored = f64::from(bits) + 16.0 / dim as f64;
            assert!((found.stored_bits - stored).abs() < 0.001);
        }
    }
    let headline = measure(&coder("tq:4", 128), tensor(Distribution::Gaussian, 128));
    assert!(
        headline.quality.cosine >= 0.9954 - 5e-5,
        "{:?}",
        headline.quality
    );
}

/// G1, G2: less error than the baseline from fewer stored bits, by the factors of the reference, in every cell.
#[test]
fn less_error_than_the_baseline_from_fewer_bits() {
    // For r = 2, 3, 4: tq at any dim, tq at dim >= 128, tq-ec.
    let goals = [(2, 5.2, 7.0, 7.5), (3, 1.8, 2.5, 2.8), (4, 1.3, 1.7, 2.0)];
    for distribution in Distribution::ALL {
        for dim in [64, 128, 256] {
            for (bits, any, long, coded) in goals {
                let values = tensor(distribution, dim);
                let base = measure(&coder(&format!("dh013:{bits}"), dim), values);
                let lloyd = measure(&coder(&format!("tq:{}", bits + 1), dim), values);
                // As many bits as the baseline has, less what scales and head take.
                let coded_with = |taken: u32| {
                    let rate = base.stored_bits - f64::from(taken) / dim as f64;
                    measure(&coder(&format!("tq-ec:{rate}"), dim), values)
                };
                let entropy = (8..20)
                    .map(coded_with)
                    .find(|found| found.stored_bits < base.stored_bits)
                    .expect("a rate with fewer stored bits");
                let what = format!("{} {dim} r={bits}", distribution.name());
                assert!(
                    lloyd.stored_bits < base.stored_bits && entropy.stored_bits < base.stored_bits,
                    "{what}"
                );
                let goal = if dim >= 128 { long } else { any };
                let gain = base.quality.nmse / lloyd.quality.nmse;
                assert!(gain >= goal, "{what}: tq gains {gain}, wanted {goal}");
                let gain = base.quality.nmse / entropy.quality.nmse;
                assert!(gain >= coded, "{what}: tq-ec gains {gain}, wanted {coded}");
            }
        }
    }
}

/// G2: within 1.45 of the rate-distortion bound at the bits that the stream really has; and the baseline's headline
/// cosine at four bits and a bit.
#[test]
fn tq_ec_is_close_to_the_bound() {
    for dim in [64, 128, 256] {
        for rate in ["2", "2.5", "3", "4", "5", "6"] {
            let values = tensor(Distribution::Gaussian, dim);
            let found = measure(&coder(&format!("tq-ec:{rate}"), dim), values);
            // The stream alone: without scales and head it is a little less than stored, so this asks for more.
            let asked: f64 = rate.parse().expect("a rate");
            let ratio = found.quality.nmse * 4f64.powf(asked);
            assert!(ratio <= 1.45, "{rate} bits of {dim}: {ratio} x 4^-R");
            assert!(
                found.quality.nmse * 4f64.powf(found.stored_bits) >= 1.40,
                "{rate} of {dim} is too good to be true"
            );
        }
    }
    for (dim, most) in [(128, 4.13), (256, 4.07)] {
        for distribution in [Distribution::Gaussian, Distribution::HeavyTail] {
            let found = measure(&coder("tq-ec:4", dim), tensor(distribution, dim));
            assert!(
                found.quality.cosine >= 0.9972 - 5e-5,
                "{dim}: {:?}",
                found.quality
            );
            assert!(
                found.stored_bits <= most,
                "{dim}: {} bits",
                found.stored_bits
            );
        }
    }
}

/// The stream costs what was asked for: no more than a hundredth of a bit beyond the rate, scales and head aside.
#[test]
fn tq_ec_keeps_to_its_rate() {
    let dim = 128;
    for rate in ["1", "2", "3.25", "4", "6", "8"] {
        let found = measure(
            &coder(&format!("tq-ec:{rate}"), dim),
            tensor(Distribution::Gaussian, dim),
        );
        let over = found.stored_bits - rate.parse::<f64>().expect("a rate");
        assert!((0.0..0.16).contains(&over), "{rate}: {over} beyond");
    }
}

/// G3: the trellis at payload bits, on vectors that it was not trained on.
#[test]
fn tcq_is_closer_to_the_bound() {
    let values = Distribution::Gaussian.sample(1024, 128, 0);
    for (bits, goal) in [(1, 1.12), (2, 1.15), (3, 1.22), (4, 1.32)] {
        let found = measure(&coder(&format!("tcq:{bits}"), 128), &values);
        let ratio = found.quality.nmse * 4f64.powi(bits);
        assert!(ratio <= goal && ratio > 1.0, "{bits} bits: {ratio} x 4^-k");
        assert!((found.stored_bits - f64::from(bits) - 16.0 / 128.0).abs() < 0.002);
    }
    for dim in [33, 64, 80, 96, 256, 1024] {
        let values = Distribution::Gaussian.sample(16, dim, 5);
        for (bits, goal) in [(1, 0.36), (2, 0.082), (3, 0.0205), (4, 0.0055)] {
            let found = measure(&coder(&format!("tcq:{bits}"), dim), &values);
            assert!(
                found.quality.nmse < goal,
                "{bits} bits of {dim}: {:?}",
                found.quality
            );
        }
    }
}

/// G4: an exact budget, a win over tq from the same bits where the vectors lie along few directions, and tq itself, said
/// aloud, where they do not. Calibrated on other tokens than are coded.
#[test]
fn spectral_wins_where_there_is_something_to_win() {
    for dim in [64, 128, 256] {
        let values = tensor(Distribution::Spectral, dim);
        let (sample, coded) = values.split_at(values.len() / 2);
        for bits in [2, 3, 4] {
            let spec = Spec::parse(&format!("spectral:{bits}"), dim).expect("a spec");
            let (spectral, calibration) = Coder::calibrated(spec, sample).expect("calibrates");
            let calibration = calibration.expect("low rank is worth a basis");
            let widths = spectral.widths().expect("spectral");
            assert_eq!(
                widths.iter().map(|w| usize::from(*w)).sum::<usize>(),
                bits * dim,
                "an exact budget"
            );
            let with = measure(&spectral, coded);
            let without = measure(&coder(&format!("tq:{bits}"), dim), coded);
            assert!(
                (with.stored_bits - without.stored_bits).abs() < 1e-9,
                "the same bits"
            );
            assert!(
                with.quality.mse < 0.5 * without.quality.mse,
                "{dim}: {:?} {:?}",
                with.quality,
                without.quality
            );
            let bytes = calibration.to_bytes();
            let again =
                Coder::with_calibration(spec, &Calibration::from_bytes(&bytes).expect("reads"))
                    .expect("a coder");
            let frame = spectral
                .encode(Values::F32(&coded[..dim * 8]))
                .expect("encodes");
            assert_eq!(
                again.decode(&frame).expect("decodes"),
                spectral.decode(&frame).expect("decodes")
            );
        }
        let isotropic = tensor(Distribution::Gaussian, dim);
        let spec = Spec::parse("spectral:3", dim).expect("a spec");
        let (fallen, none) =
            Coder::calibrated(spec, &isotropic[..isotropic.len() / 2]).expect("calibrates");
        assert!(none.is_none() && fallen.spec().codec == Codec::Tq);
        assert!(fallen.fallback().expect("said aloud").gain_bits < 0.1);
    }
}

#[test]
fn spectral_frames_need_their_calibration() {
    let dim = 64;
    let values = tensor(Distribution::Spectral, dim);
    let spec = Spec::parse("spectral:3", dim).expect("a spec");
    let coder_of = |part: &[f32]| {
        Coder::with_calibration(spec, &Calibration::fit(part, dim).expect("fits")).expect("a coder")
    };
    let (a, b) = (
        coder_of(&values[..dim * 500]),
        coder_of(&values[dim * 500..dim * 1000]),
    );
    let frame = a.encode(Values::F32(&values[..dim])).expect("encodes");
    assert!(
        b.decode(&frame)
            .expect_err("another basis")
            .to_string()
            .contains("calibration")
    );
    assert!(Coder::new(spec).is_err());
    assert!(
        Calibration::fit(&values[..dim * 10], dim).is_err(),
        "fewer vectors than directions"
    );
}

/// More bits never cost quality.
#[test]
fn error_falls_with_every_bit() {
    let dim = 128;
    for (name, rates) in [
        ("tq", 1..=8),
        ("rotor", 1..=8),
        ("dh013", 2..=8),
        ("tq-ec", 1..=8),
        ("tcq", 1..=4),
    ] {
        for distribution in Distribution::ALL {
            let values = &tensor(distribution, dim)[..dim * 256];
            let errors: Vec<f64> = rates
                .clone()
                .map(|bits| {
                    measure(&coder(&format!("{name}:{bits}"), dim), values)
                        .quality
                        .nmse
                })
                .collect();
            assert!(
                errors.windows(2).all(|pair| pair[1] < 0.7 * pair[0]),
                "{name}: {errors:?}"
            );
        }
    }
}

/// Rotors mix three channels, Hadamard all: a heavy channel shows the difference, a Gaussian none.
#[test]
fn rotors_do_not_spread_heavy_channels() {
    let gap = |distribution| {
        let values = tensor(distribution, 128);
        measure(&coder("rotor:3", 128), values).quality.nmse
            / measure(&coder("tq:3", 128), values).quality.nmse
    };
    assert!(gap(Distribution::HeavyTail) > 3.0 && (gap(Distribution::Gaussian) - 1.0).abs() < 0.03);
}

const EVERY: [&str; 9] = [
    "q8_0",
    "q4_0",
    "tq:3",
    "tq:8",
    "tq-ec:2.5",
    "tcq:2",
    "rotor:4",
    "dh013:3",
    "spectral:3",
];

fn every_coder(dim: usize) -> Vec<Coder> {
    EVERY
        .iter()
        .map(|name| {
            let choice: Choice = name.parse().expect("a choice");
            let spec = Spec::new(choice.codec, choice.rate, dim).expect("a spec");
            match choice.codec {
                Codec::Spectral => {
                    let sample = Distribution::Spectral.sample(16 * dim, dim, 9);
                    Coder::with_calibration(spec, &Calibration::fit(&sample, dim).expect("fits"))
                        .expect("a coder")
                }
                _ => Coder::new(spec).expect("a coder"),
            }
        })
        .collect()
}

/// A vector with a NaN, an infinity or an absurd length comes back bit for bit, and the others as if it were not there.
#[test]
fn odd_vectors_stay_as_they_are_and_poison_nobody() {
    let dim = 64;
    let plain = Distribution::HeavyTail.sample(16, dim, 3);
    let odd: [f32; 7] = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        -1e30,
        3e11,
        f32::from_bits(0x7fc0_1234),
    ];
    for coder in every_coder(dim) {
        let clean = coder
            .decode(&coder.encode(Values::F32(&plain)).expect("encodes"))
            .expect("decodes");
        for value in odd {
            let mut dirty = plain.clone();
            dirty[5 * dim + 17] = value;
            let frame = coder.encode(Values::F32(&dirty)).expect("encodes");
            assert!(frame.len() <= coder.bound_bytes(16));
            let back = coder.decode(&frame).expect("decodes");
            for index in (0..16).filter(|index| *index != 5) {
                assert_eq!(
                    back[index * dim..][..dim],
                    clean[index * dim..][..dim],
                    "{} {value}",
                    coder.spec()
                );
            }
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(
                bits(&back[5 * dim..][..dim]),
                bits(&dirty[5 * dim..][..dim]),
                "{} {value}",
                coder.spec()
            );
        }
    }
}

/// Zeros come back as zeros (the calibrated codec: as the mean it cannot tell them from, within its error), and vectors
/// as small as 1e-6 keep their direction.
#[test]
fn zeros_and_small_vectors_survive() {
    let dim = 64;
    for coder in every_coder(dim) {
        if coder.spec().codec == Codec::Spectral {
            continue;
        }
        let zeros = vec![0.0; 3 * dim];
        let back = coder
            .decode(&coder.encode(Values::F32(&zeros)).expect("encodes"))
            .expect("decodes");
        // The baseline clamps its length at 1e-8 as the original does.
        let most = if coder.spec().codec == Codec::Dh013 {
            1e-7
        } else {
            0.0
        };
        assert!(
            back.iter().all(|value| value.abs() <= most),
            "{}",
            coder.spec()
        );
        if matches!(
            coder.spec().codec,
            Codec::Tq | Codec::TqEc | Codec::Tcq | Codec::Rotor
        ) {
            let small: Vec<f32> = Distribution::Gaussian
                .sample(4, dim, 1)
                .iter()
                .map(|v| v * 1e-6)
                .collect();
            assert!(
                measure(&coder, &small).quality.cosine > 0.9,
                "{}",
                coder.spec()
            );
        }
    }
}

/// Halves are coded as what they stand for.
#[test]
fn halves_are_coded_like_the_singles_they_are() {
    let values = Distribution::HeavyTail.sample(8, 64, 1);
    let half: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    let brain: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    for coder in every_coder(64) {
        let single: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
        assert_eq!(
            coder.encode(Values::F16(&half)),
            coder.encode(Values::F32(&single))
        );
        let single: Vec<f32> = brain.iter().map(|v| v.to_f32()).collect();
        assert_eq!(
            coder.encode(Values::Bf16(&brain)),
            coder.encode(Values::F32(&single))
        );
    }
}

/// Frames written by this version, by their checksums: a change here breaks every file written before it.
#[test]
fn the_format_does_not_move() {
    let values = Distribution::HeavyTail.sample(32, 64, 11);
    let sums: Vec<String> = every_coder(64)[..8]
        .iter()
        .map(|coder| {
            let frame = coder.encode(Values::F32(&values)).expect("encodes");
            assert_eq!(
                frame,
                coder.encode(Values::F32(&values)).expect("encodes"),
                "the same twice"
            );
            let sum = u32::from_le_bytes(frame[24..28].try_into().expect("four bytes"));
            format!("{} {} bytes {sum:08x}", coder.spec(), frame.len())
        })
        .collect();
    assert_eq!(
        sums.join("\n"),
        include_str!("data/kv_frames.txt").trim_end()
    );
}

/// Every truncation and every flipped bit of a frame is refused; with the checksum mended as well, nothing panics.
#[test]
fn damaged_frames_are_refused() {
    let dim = 32;
    let mut values = Distribution::HeavyTail.sample(6, dim, 2);
    values[3 * dim] = f32::NAN;
    for coder in every_coder(dim) {
        let frame = coder.encode(Values::F32(&values)).expect("encodes");
        for len in 0..frame.len() {
            assert!(
                coder.decode(&frame[..len]).is_err(),
                "{} cut at {len}",
                coder.spec()
            );
        }
        for at in 0..frame.len() * 8 {
            let mut bad = frame.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(coder.decode(&bad).is_err(), "{} bit {at}", coder.spec());
            frame::reseal(&mut bad);
            if let Ok(back) = coder.decode(&bad) {
                assert_eq!(back.len() % dim, 0);
            }
        }
    }
}

/// A head that claims many vectors gets no memory for them.
#[test]
fn claims_are_checked_before_memory_is_asked_for() {
    for coder in every_coder(64) {
        let mut frame = coder.encode(Values::F32(&vec![1.0; 64])).expect("encodes");
        frame[12..16].copy_from_slice(&((1u32 << 24) - 1).to_le_bytes());
        frame::reseal(&mut frame);
        assert!(coder.decode(&frame).is_err(), "{}", coder.spec());
    }
}

#[test]
fn another_coders_frame_is_refused() {
    let frame = coder("tq:4", 64)
        .encode(Values::F32(&[1.0; 128]))
        .expect("encodes");
    assert!(
        coder("tq:3", 64).decode(&frame).is_err() && coder("tq:4", 128).decode(&frame).is_err()
    );
    assert!(
        coder("tq:4", 64)
            .decode_into(&frame, &mut [0.0; 64])
            .is_err()
    );
    assert!(coder("tq:4", 64).encode(Values::F32(&[1.0; 100])).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any values, any length, any codec: it encodes within its bound, decodes to as many values, and what is finite and
    /// of a sane size is not far off.
    #[test]
    fn anything_goes_round(
        raw in proptest::collection::vec(prop_oneof![8 => -10.0f32..10.0, 1 => any::<f32>(), 1 => Just(0.0)], 0..400),
        dim in prop_oneof![Just(32usize), Just(64), Just(96)],
        which in 0usize..EVERY.len(),
    ) {
        let mut values = raw;
        values.truncate(values.len() / dim * dim);
        let coder = &every_coder(dim)[which];
        let frame = coder.encode(Values::F32(&values)).expect("encodes");
        prop_assert!(frame.len() <= coder.bound_bytes(values.len() / dim));
        let back = coder.decode(&frame).expect("decodes");
        prop_assert_eq!(back.len(), values.len());
        for (x, y) in values.chunks_exact(dim).zip(back.chunks_exact(dim)) {
            if x.iter().all(|v| v.is_finite()) {
                prop_assert!(y.iter().all(|v| v.is_finite()));
                let (norm, error) = x.iter().zip(y).fold((0.0f64, 0.0f64), |(n, e), (a, b)| {
                    (n + f64::from(*a) * f64::from(*a), e + (f64::from(*a) - f64::from(*b)).powi(2))
                });
                // A scale that fits best never makes a vector worse than nothing; the baseline may overshoot.
                let most = match coder.spec().codec { Codec::Dh013 => 2.0, Codec::Spectral => 40.0, _ => 1.01 };
                prop_assert!(error <= most * norm + 1e-6, "{}: {error} of {norm}", coder.spec());
            }
        }
    }

    /// Random bytes, with and without a plausible head.
    #[test]
    fn any_bytes_are_decoded_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), which in 0usize..EVERY.len()) {
        let coder = &every_coder(32)[which];
        prop_assert!(coder.decode(&bytes).is_err());
        let honest = coder.encode(Values::F32(&[0.5; 64])).expect("encodes");
        if bytes.len() > frame::HEAD_BYTES {
            bytes[..frame::HEAD_BYTES].copy_from_slice(&honest[..frame::HEAD_BYTES]);
            frame::reseal(&mut bytes);
            let _ = coder.decode(&bytes);
            let _ = Calibration::from_bytes(&bytes);
        }
    }
}
