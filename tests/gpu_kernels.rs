//! The kernels through the driver's API, as flea calls them: bit for bit what the references in Rust give. On the fake GPU, where the
//! same sources run on the processor, late, as everything there; on a real one with FLEA_TEST_GPU=N.
#![cfg(all(feature = "cuda", feature = "cli"))]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;
#[path = "common/quantised.rs"]
mod quantised;

use std::sync::Arc;

use common::{flea, json, number, output};
use fake_cuda::with_gpu;
use flea::ErrorKind;
use flea::mem::cuda::{
    Coded, Context, Kernels, NO_DAMAGE, Narrow, Quantised, Span, Stream, VramArea,
};
use flea::model::coded;
use flea::model::tiles::{TILE_BYTES, tile_count};
use quantised::{Random, TYPES, blocks, to_bfloat, to_half};

const MIB: u64 = 1 << 20;

/// A GPU with the kernels, and memory for what they work on.
struct Bench {
    stream: Stream,
    kernels: Kernels,
    areas: Vec<VramArea>,
    context: Arc<Context>,
}

impl Bench {
    fn new() -> Self {
        let gpu = std::env::var("FLEA_TEST_GPU").ok();
        if gpu.is_none() {
            fake_cuda::Driver::load();
        }
        let index = gpu.map_or(0, |text| text.parse().expect("FLEA_TEST_GPU: a number"));
        let context = Context::new(index).expect("the GPU");
        Self {
            stream: Stream::new(&context).expect("a stream"),
            kernels: Kernels::load(&context).expect("the kernels"),
            areas: Vec::new(),
            context,
        }
    }

    /// VRAM of just this length.
    fn take(&mut self, len_bytes: usize) -> Span {
        let area = VramArea::new(&self.context, len_bytes as u64).expect("VRAM");
        let span = area.span(0, len_bytes as u64).expect("a span");
        self.areas.push(area);
        span
    }

    fn put(&mut self, bytes: &[u8]) -> Span {
        let span = self.take(bytes.len());
        span.write(&self.stream, bytes).expect("written");
        span
    }

    fn read(&self, span: Span) -> Vec<u8> {
        span.read(&self.stream).expect("read")
    }

    fn kind_of(&self, result: flea::Result<()>) -> ErrorKind {
        result.expect_err("an error").kind()
    }
}

#[test]
fn sums_of_a_slot_are_those_of_crc32c() {
    let mut bench = Bench::new();
    let mut random = Random(11);
    for len in [1, 4096, 300_000, 1 << 20, (2 << 20) + 5, 3_500_001] {
        let bytes = random.bytes(len);
        let at = bench.put(&bytes);
        let words = 4 * len.div_ceil(MIB as usize);
        let sums = bench.put(&vec![0; words]);
        bench
            .kernels
            .checksums(&bench.stream, at, sums)
            .expect("asked for");
        let expected: Vec<u8> = bytes
            .chunks(MIB as usize)
            .flat_map(|piece| crc32c::crc32c(piece).to_le_bytes())
            .collect();
        assert_eq!(bench.read(sums), expected, "{len} bytes");
        bench.areas.clear();
    }
}

#[test]
fn quantised_types_become_the_same_floats() {
    let mut bench = Bench::new();
    for (kind, which) in TYPES.iter().zip(Quantised::ALL) {
        assert_eq!(kind.name, which.name());
        assert_eq!(kind.block_bytes as u64, which.block_bytes());
        assert_eq!(kind.elements as u64, which.block_elements());
        let bytes = blocks(kind, 700);
        let from = bench.put(&bytes);
        let values: Vec<f32> = bytes
            .chunks(kind.block_bytes)
            .flat_map(kind.values)
            .collect();
        for (to, narrow) in [
            (Narrow::F16, to_half as fn(f32) -> [u8; 2]),
            (Narrow::BF16, to_bfloat as fn(f32) -> [u8; 2]),
        ] {
            let expected: Vec<u8> = values.iter().flat_map(|&value| narrow(value)).collect();
            let out = bench.take(expected.len());
            let asked = bench
                .kernels
                .dequantise(&bench.stream, (which, to), from, out);
            asked.expect("asked for");
            assert!(bench.read(out) == expected, "{} to {to:?}", kind.name);
        }
        bench.areas.clear();
    }
}

#[test]
fn packed_weights_are_unpacked_and_damage_is_told() {
    let mut bench = Bench::new();
    let mut random = Random(12);
    let mut weights = random.weights(21 * 8192 + 777);
    let noise = random.bytes(TILE_BYTES);
    weights[3 * TILE_BYTES..4 * TILE_BYTES].copy_from_slice(&noise);
    let elements = weights.len() as u64 / 2;
    let mut bytes = coded::encode(&weights).expect("weights");
    for (first, end) in [(0, tile_count(elements)), (3, 4), (5, 22), (21, 22)] {
        let coded = Coded {
            bytes: bench.put(&bytes),
            elements,
        };
        let begin = first as usize * TILE_BYTES;
        let expected = &weights[begin..(end as usize * TILE_BYTES).min(weights.len())];
        let out = bench.take(expected.len());
        let damaged = bench.put(&NO_DAMAGE.to_le_bytes());
        let asked = bench
            .kernels
            .unpack(&bench.stream, coded, first..end, out, damaged);
        asked.expect("asked for");
        assert_eq!(bench.read(damaged), NO_DAMAGE.to_le_bytes());
        assert!(bench.read(out) == expected, "tiles {first}..{end}");
        bench.areas.clear();
    }
    // Words of a tile in the middle.
    let places_at = bytes.len() - coded::Places::bytes(elements) as usize;
    let places = coded::Places::from_bytes(&bytes[places_at..], elements, bytes.len() as u64)
        .expect("places");
    let tile = places.tile(9);
    for at in tile.start as usize + 128..tile.start as usize + 160 {
        bytes[at + 8192] ^= 0x55;
    }
    let coded = Coded {
        bytes: bench.put(&bytes),
        elements,
    };
    let out = bench.take(weights.len());
    let damaged = bench.put(&NO_DAMAGE.to_le_bytes());
    let tiles = 0..tile_count(elements);
    let asked = bench
        .kernels
        .unpack(&bench.stream, coded, tiles, out, damaged);
    asked.expect("asked for");
    assert_eq!(bench.read(damaged), 9_u32.to_le_bytes());
}

/// What a kernel would touch beyond its memory is refused before it starts.
#[test]
fn spans_are_checked_before_a_kernel_starts() {
    let mut bench = Bench::new();
    let (at, word) = (bench.take(3 << 20), bench.take(16));
    let sums = |at: Span, to: Span| bench.kernels.checksums(&bench.stream, at, to);
    let two = word.first(8).expect("a part");
    assert_eq!(bench.kind_of(sums(at, two)), ErrorKind::Invalid);
    let shifted = bench.areas[0].span(8, 64).expect("a span");
    assert_eq!(bench.kind_of(sums(shifted, word)), ErrorKind::Invalid);
    assert!(bench.areas[0].span((4 << 20) - 1, 2).is_err());
    assert!(bench.areas[0].span(0, 0).is_err());
    let whole = (Quantised::Q8_0, Narrow::F16);
    let blocks = |len: u64, to: u64| {
        let (from, to) = (
            at.first(len).expect("a part"),
            at.first(to).expect("a part"),
        );
        bench.kernels.dequantise(&bench.stream, whole, from, to)
    };
    assert_eq!(bench.kind_of(blocks(35, 1 << 20)), ErrorKind::Invalid);
    assert_eq!(bench.kind_of(blocks(340, 639)), ErrorKind::Invalid);
    let coded = |elements: u64, tiles: std::ops::Range<u64>, out: u64| {
        let bytes = at.first(40_000).expect("a part");
        let out = at.first(out).expect("a part");
        let coded = Coded { bytes, elements };
        bench.kernels.unpack(&bench.stream, coded, tiles, out, word)
    };
    assert_eq!(
        bench.kind_of(coded(8192, 0..2, 1 << 20)),
        ErrorKind::Invalid
    );
    assert_eq!(
        bench.kind_of(coded(8192, 1..1, 1 << 20)),
        ErrorKind::Invalid
    );
    assert_eq!(bench.kind_of(coded(8192, 0..1, 16_383)), ErrorKind::Invalid);
    assert_eq!(
        bench.kind_of(coded(1 << 34, 0..1, 1 << 20)),
        ErrorKind::Invalid
    );
}

#[test]
fn the_bench_tells_rates_beside_a_copy() {
    let mut command = flea();
    command.args([
        "bench",
        "kernels",
        "--size",
        "2MiB",
        "--rounds",
        "2",
        "--seconds",
        "1ms",
    ]);
    let answer = json(with_gpu(
        command.arg("--json"),
        &[("FAKE_CUDA_DELAY_US", "0")],
    ));
    assert_eq!(answer["gpu"], "Fake GPU 0");
    let kernels = answer["kernels"].as_array().expect("kernels");
    assert_eq!(kernels.len(), 12);
    for kernel in kernels {
        for figure in ["traffic_gb_per_second", "result_gb_per_second", "of_copy"] {
            assert!(number(kernel, figure) > 0.0, "{kernel}");
        }
    }
    assert_eq!(kernels[11]["name"], "unpack");
    let ratio = number(&answer["unpack"], "coded_ratio");
    assert!((0.6..0.75).contains(&ratio), "{ratio}");
    assert!(number(&answer["unpack"], "of_link") > 0.0);
    let mut command = flea();
    command.args([
        "bench",
        "kernels",
        "--size",
        "1MiB",
        "--rounds",
        "1",
        "--seconds",
        "1ms",
    ]);
    let said = output(with_gpu(&mut command, &[("FAKE_CUDA_DELAY_US", "0")]));
    let table = String::from_utf8_lossy(&said.stdout);
    for part in [
        "Fake GPU 0",
        "copy within VRAM",
        "verify (crc32c)",
        "q6_k to bf16",
        "pinned memory",
    ] {
        assert!(table.contains(part), "{table}");
    }
}

#[test]
fn kernels_that_cannot_be_had_are_clear_errors() {
    for (state, parts) in [
        (
            ("FAKE_CUDA_IMAGE", "refuse"),
            &[
                "load flea's kernels",
                "Fake GPU 0",
                "compute capability 8.0",
            ][..],
        ),
        (
            ("FAKE_CUDA_KERNEL", "flea_unpack"),
            &["find the kernel flea_unpack", "built wrong"],
        ),
        (("FAKE_CUDA_LOST_AFTER", "3"), &["GPU is lost"]),
        (("FAKE_CUDA_MEMORY", "67108864"), &["nvidia-smi"]),
    ] {
        let mut command = flea();
        command.args(["bench", "kernels", "--size", "2MiB", "--rounds", "1"]);
        let said = output(with_gpu(&mut command, &[state]));
        let text = String::from_utf8_lossy(&said.stderr);
        assert!(!said.status.success(), "{state:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{state:?}: no '{part}' in {text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    }
}
