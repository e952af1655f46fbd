//! The kernels of kernels/*.cu on the processor, under AddressSanitizer and UBSan, against references in Rust: every byte the
//! same. The references for quantised types are held against ggml itself, where llama.cpp is linked.
#![cfg(feature = "cli")]

#[path = "common/quantised.rs"]
mod quantised;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use flea::model::coded;
use flea::model::tiles::{Damage, Decoder, TILE_BYTES, tile_count};
use half::f16;
use quantised::{Random, TYPES, blocks, to_bfloat, to_half};

/// Compiles a C++ source of kernels/check once, with warnings as errors.
fn compiled(name: &str, options: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{name}"));
    let temporary = program.with_extension(std::process::id().to_string());
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .arg(root.join(format!("kernels/check/{name}.cpp")))
        .arg("-o")
        .arg(&temporary)
        .arg("-ldl")
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler}: {said}");
    std::fs::rename(&temporary, &program).expect("rename");
    program
}

/// What runs a kernel: processor.cpp under sanitizers, or the program that FLEA_KERNELS_ON names (device.cpp, on a GPU).
fn runner() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(device) = std::env::var_os("FLEA_KERNELS_ON") {
            return device.into();
        }
        let options = [
            "-Wno-unused-function",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
        ];
        compiled("processor", &options)
    })
}

/// Runs a kernel in `blocks` blocks on these bytes and gives what it wrote.
fn run(kernel: &str, blocks: u32, bytes: &[u8], arguments: &[u64]) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory");
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    std::fs::write(&input, bytes).expect("write");
    let ended = Command::new(runner())
        .args([kernel, &blocks.to_string()])
        .args([&input, &output])
        .args(arguments.iter().map(u64::to_string))
        .output()
        .expect("the kernel runs");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{kernel} {arguments:?}: {said}");
    std::fs::read(&output).expect("read")
}

#[test]
fn checksums_are_those_of_crc32c() {
    let mut random = Random(1);
    let lens = [
        1,
        15,
        511,
        512,
        513,
        4096,
        32_767,
        32_768,
        32_769,
        300_000,
        1 << 20,
        (1 << 20) + 4,
        3_500_001,
    ];
    for (index, len) in lens.into_iter().enumerate() {
        let bytes = random.bytes(len);
        let expected: Vec<u8> = bytes
            .chunks(1 << 20)
            .flat_map(|piece| crc32c::crc32c(piece).to_le_bytes())
            .collect();
        for blocks in [1, 3 + index as u32] {
            assert_eq!(run("crc32c", blocks, &bytes, &[]), expected, "{len} bytes");
        }
    }
    // The check value of the standard.
    assert_eq!(
        run("crc32c", 1, b"123456789", &[]),
        0xe306_9283_u32.to_le_bytes()
    );
}

/// What the kernel says: the first damaged tile, if any, and the weights.
fn unpack(
    coded: &[u8],
    elements: u64,
    first: u64,
    tiles: u64,
    blocks: u32,
) -> (Option<u32>, Vec<u8>) {
    let mut out = run("unpack", blocks, coded, &[elements, first, tiles]);
    let weights = out.split_off(4);
    let damaged = u32::from_le_bytes(out.try_into().expect("four bytes"));
    ((damaged != u32::MAX).then_some(damaged), weights)
}

#[test]
fn what_was_packed_is_unpacked() {
    let mut random = Random(2);
    let mut tame = random.weights(11 * 8192 + 4321);
    // A tile that stays raw, and one with every pattern there is.
    let noise = random.bytes(TILE_BYTES);
    tame[2 * TILE_BYTES..3 * TILE_BYTES].copy_from_slice(&noise);
    let elements = tame.len() as u64 / 2;
    let coded = coded::encode(&tame).expect("weights");
    for blocks in [1, 2, 5] {
        let (damaged, weights) = unpack(&coded, elements, 0, tile_count(elements), blocks);
        assert_eq!(damaged, None);
        assert!(weights == tame, "{blocks} blocks");
    }
    // Any run of tiles on its own.
    for (first, tiles) in [(0, 1), (2, 1), (3, 7), (11, 1), (10, 2)] {
        let (damaged, weights) = unpack(&coded, elements, first, tiles, 2);
        let begin = first as usize * TILE_BYTES;
        assert_eq!(damaged, None);
        assert!(weights == tame[begin..(begin + tiles as usize * TILE_BYTES).min(tame.len())]);
    }
}

#[test]
fn tiles_of_every_length_are_unpacked() {
    let mut random = Random(3);
    for elements in [1, 2, 3, 4, 5, 127, 128, 129, 1000, 8191, 8192, 8193] {
        for weights in [
            random.weights(elements),
            random.bytes(2 * elements),
            vec![0x3c; 2 * elements],
        ] {
            let coded = coded::encode(&weights).expect("weights");
            let count = elements as u64;
            let (damaged, out) = unpack(&coded, count, 0, tile_count(count), 1);
            assert_eq!(damaged, None, "{elements}");
            assert!(out == weights, "{elements}");
        }
    }
}

/// The kernel finds what the decoder in Rust finds (but for padding, which it does not look at), and touches nothing that it
/// must not: the sanitizers watch.
#[test]
fn damage_is_found_and_does_no_harm() {
    let mut random = Random(4);
    let weights = random.weights(3 * 8192 + 100);
    let elements = weights.len() as u64 / 2;
    let coded = coded::encode(&weights).expect("weights");
    let places_at = coded.len() - coded::Places::bytes(elements) as usize;
    let places = coded::Places::from_bytes(&coded[places_at..], elements, coded.len() as u64)
        .expect("places");
    let head = coded.first_chunk().expect("a head");
    let decoder = Decoder::new(&coded::read_head(head, elements).expect("a table"));
    let mut found = 0;
    for _ in 0..60 {
        let mut bytes = coded.clone();
        for _ in 0..1 + random.next() % 3 {
            let at = coded::HEAD_BYTES + random.next() as usize % (places_at - coded::HEAD_BYTES);
            bytes[at] ^= 1 << (random.next() % 8);
        }
        let mut out = vec![0; weights.len()];
        let mut expected = None;
        for (tile, out) in (0_u32..).zip(out.chunks_mut(TILE_BYTES)) {
            let place = places.tile(u64::from(tile));
            match decoder.decode(&bytes[place.start as usize..place.end as usize], out) {
                Ok(()) | Err(Damage::Padding) => {}
                Err(_) => expected = expected.or(Some(tile)),
            }
        }
        let (damaged, unpacked) = unpack(&bytes, elements, 0, tile_count(elements), 1);
        assert_eq!(damaged, expected);
        assert!(damaged.is_some() || unpacked == out);
        found += u32::from(damaged.is_some());
    }
    assert!(found > 10, "{found} of 60");
    // Tables and places that are anything.
    for round in 0..40 {
        let mut bytes = coded.clone();
        let range = if round % 2 == 0 {
            32..coded::HEAD_BYTES
        } else {
            places_at..coded.len()
        };
        for _ in 0..3 {
            let at = range.start + random.next() as usize % range.len();
            bytes[at] = random.next() as u8;
        }
        let (damaged, unpacked) = unpack(&bytes, elements, 0, tile_count(elements), 1);
        assert!(damaged.is_some() || unpacked == weights || round % 2 == 0);
    }
}

#[test]
fn quantised_weights_become_the_same_floats() {
    for kind in &TYPES {
        let bytes = blocks(kind, 700);
        let values: Vec<f32> = bytes
            .chunks(kind.block_bytes)
            .flat_map(kind.values)
            .collect();
        for (to, narrow) in [
            ("f16", to_half as fn(f32) -> [u8; 2]),
            ("bf16", to_bfloat as fn(f32) -> [u8; 2]),
        ] {
            let expected: Vec<u8> = values.iter().flat_map(|&value| narrow(value)).collect();
            let kernel = format!("dequantise_{}_{to}", kind.name);
            for grid in [1, 7] {
                let shape = [kind.block_bytes as u64, kind.elements as u64];
                let out = run(&kernel, grid, &bytes, &shape);
                let first = expected
                    .chunks(2)
                    .zip(out.chunks(2))
                    .position(|(a, b)| a != b);
                assert_eq!((first, out.len()), (None, expected.len()), "{kernel}");
            }
        }
    }
}

/// Every half there is, through a Q8_0 block whose codes are 1: what the conversions of the shim make of it.
#[test]
fn every_half_survives_the_conversions() {
    let mut bytes = Vec::new();
    for scale in 0..=u16::MAX {
        bytes.extend(scale.to_le_bytes());
        bytes.extend([1; 32]);
    }
    let halves = run("dequantise_q8_0_f16", 3, &bytes, &[34, 32]);
    let bfloats = run("dequantise_q8_0_bf16", 3, &bytes, &[34, 32]);
    for scale in 0..=u16::MAX {
        let value = f16::from_bits(scale).to_f32();
        let at = usize::from(scale) * 64;
        assert_eq!(halves[at..at + 2], to_half(value), "{scale:04x}");
        assert_eq!(bfloats[at..at + 2], to_bfloat(value), "{scale:04x}");
    }
}

/// The references above are ggml's own values, bit for bit.
#[cfg(feature = "run")]
#[test]
#[allow(unsafe_code)]
fn the_references_are_ggmls() {
    for kind in &TYPES {
        let bytes = blocks(kind, 700);
        let mut values = vec![0_f32; 700 * kind.elements];
        // SAFETY: the traits of a type are constants of ggml; to_float reads whole blocks and writes as many values.
        unsafe {
            let traits = &*llama_cpp_sys_2::ggml_get_type_traits(kind.ggml_type as _);
            let to_float = traits.to_float.expect("a quantised type");
            to_float(
                bytes.as_ptr().cast(),
                values.as_mut_ptr(),
                values.len() as i64,
            );
        }
        let reference = bytes.chunks(kind.block_bytes).flat_map(kind.values);
        for (index, (ggml, own)) in values.iter().zip(reference).enumerate() {
            let same = ggml.to_bits() == own.to_bits() || ggml.is_nan() && own.is_nan();
            assert!(same, "{} value {index}: {ggml} and {own}", kind.name);
        }
    }
}

/// kernels/flea.fatbin was built from these sources. `scripts/build-kernels.sh --check` builds it again where the compiler is.
#[test]
fn the_fatbin_is_of_these_sources() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let ended = Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", "SHA256SUMS"])
        .current_dir(&kernels)
        .output()
        .expect("sha256sum runs");
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(
        ended.status.success(),
        "run scripts/build-kernels.sh: {said}"
    );
    let sums = std::fs::read_to_string(kernels.join("SHA256SUMS")).expect("the sums");
    let mut listed: Vec<&str> = sums
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    listed.sort_unstable();
    let mut there: Vec<String> = std::fs::read_dir(&kernels)
        .expect("kernels")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| {
            [".cu", ".cuh", ".fatbin"]
                .iter()
                .any(|end| name.ends_with(end))
        })
        .collect();
    there.sort_unstable();
    assert_eq!(listed, there);
}

/// What scripts/gpu-check.sh compiles on the machine with the GPU compiles here, and says when there is none.
#[test]
fn the_runner_for_gpus_says_what_is_missing() {
    let program = compiled("device", &[]);
    let ended = Command::new(program).arg("info").output().expect("it runs");
    let (said, complained) = (
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr),
    );
    match ended.status.code() {
        Some(0) => assert!(said.starts_with("{\"gpu\":"), "{said}"),
        Some(3) => assert!(
            complained.contains("no CUDA driver") || complained.contains("cu"),
            "{complained}"
        ),
        code => panic!("{code:?}: {complained}"),
    }
}

/// Rates of the kernels beside copies in the same run. FLEA_KERNELS_REPORT: the file for the JSON; FLEA_KERNELS_MIB: what they
/// work on, a multiple of 4.
#[test]
#[ignore = "measures a GPU: scripts/gpu-check.sh"]
fn rates_beside_a_copy() {
    let device = std::env::var_os("FLEA_KERNELS_ON").expect("FLEA_KERNELS_ON names the runner");
    let report = std::env::var_os("FLEA_KERNELS_REPORT").expect("FLEA_KERNELS_REPORT names a file");
    let mib = std::env::var("FLEA_KERNELS_MIB").map_or(512, |text| text.parse().expect("MiB"));
    let weights = Random(9).weights((mib / 4) << 20);
    let directory = tempfile::tempdir().expect("a directory");
    let input = directory.path().join("coded");
    std::fs::write(&input, coded::encode(&weights).expect("weights")).expect("write");
    let ended = Command::new(device)
        .args(["bandwidth", &mib.to_string()])
        .arg(&input)
        .arg((weights.len() / 2).to_string())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
    let mut rates: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    rates["unpack_ratio"] = serde_json::json!(
        std::fs::metadata(&input).expect("there").len() as f64 / weights.len() as f64
    );
    std::fs::write(report, format!("{rates}\n")).expect("write");
}
