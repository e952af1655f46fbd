//! Tests of compressing and restoring: the same bytes come back, whatever they are; damage is told and never written out.

use super::*;
use crate::io::packed as packed_file;
use crate::tools::gguf_write::{Metadata, TensorInfo, Value, Writer as GgufWriter};
use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
use crate::tools::synth::{Spec, generate};
use std::io::Write;
use std::path::PathBuf;

fn model(directory: &Path, quant: Quant, split_bytes: Option<u64>) -> PathBuf {
    let wish = Wish {
        layers: Some(2),
        embd: Some(256),
        heads: Some(4),
        vocab: Some(512),
        ..Wish::default()
    };
    let spec = Spec {
        shape: Shape::choose(Arch::Llama, quant, &wish).unwrap(),
        seed: 5,
        router_skew: 0.0,
        split_bytes,
        force: false,
    };
    let path = directory.join("model.gguf");
    let report = generate(&spec, &path, &AtomicBool::new(false), |_, _| {}).unwrap();
    report.files[0].clone()
}

/// A model of one tensor of each of these types and contents, with bytes of padding that are not zero behind the last.
fn odd_model(path: &Path, tensors: &[(u32, u64, Vec<u8>)], tail: &[u8]) {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", &Value::Text("llama".to_owned()));
    let infos = tensors
        .iter()
        .enumerate()
        .map(|(index, (ggml_type, elements, bytes))| {
            let info = TensorInfo {
                name: format!("blk.{index}.ffn_up.weight"),
                shape: vec![*elements],
                ggml_type: *ggml_type,
                offset_bytes: 0,
            };
            (info, bytes.len() as u64)
        });
    let mut writer = GgufWriter::new(Vec::new(), &metadata, infos.collect(), 32).unwrap();
    for (_, _, bytes) in tensors {
        writer.write(bytes).unwrap();
    }
    let mut file = writer.finish().unwrap();
    file.write_all(tail).unwrap();
    std::fs::write(path, file).unwrap();
}

fn options(model: &Path, output: &Path) -> PackOptions {
    PackOptions {
        model: model.to_path_buf(),
        output: output.to_path_buf(),
        force: false,
    }
}

fn run(model: &Path, output: &Path) -> Result<Compressed> {
    compress(&options(model, output), &AtomicBool::new(false), |_, _| {})
}

fn restore(packed: &Path, output: &Path) -> Result<Restored> {
    decompress(&options(packed, output), &AtomicBool::new(false), |_, _| {})
}

fn comes_back(model: &Path) -> Compressed {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("m.fleapack");
    let back = directory.path().join("back.gguf");
    let compressed = run(model, &packed).unwrap();
    assert_eq!(compressed.bytes, std::fs::metadata(&packed).unwrap().len());
    let restored = restore(&packed, &back).unwrap();
    assert!(std::fs::read(model).unwrap() == std::fs::read(&back).unwrap());
    assert_eq!(restored.bytes, compressed.input_bytes);
    assert_eq!(
        restored.original,
        model.file_name().unwrap().to_string_lossy()
    );
    compressed
}

#[test]
fn a_model_comes_back_to_the_byte() {
    for (quant, low, high) in [(Quant::Bf16, 0.60, 0.72), (Quant::F16, 0.75, 0.90)] {
        let directory = tempfile::tempdir().unwrap();
        let compressed = comes_back(&model(directory.path(), quant, None));
        assert!(compressed.coded_count > 10, "{compressed:?}");
        let ratio = compressed.coded_bytes as f64 / compressed.weights_bytes as f64;
        assert!((low..high).contains(&ratio), "{quant}: {ratio}");
    }
}

/// Several steps of several tiles, a tensor that does not end with a tile, noise, norms, quantised weights, a tail that is
/// no padding.
#[test]
fn whatever_the_file_holds_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("odd.gguf");
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state >> 33
    };
    let tame: Vec<u8> = (0..5_000_001)
        .flat_map(|_| (0x3c00 + (next() & next() & 0x3ff) as u16).to_le_bytes())
        .collect();
    let noise: Vec<u8> = (0..400_000).map(|_| next() as u8).collect();
    let tensors = [
        (30, 5_000_001, tame.clone()),
        (1, 200_000, noise),
        (0, 7, vec![1; 28]),
        (8, 64, vec![0x81; 68]),
        (1, 100_001, tame[..200_002].to_vec()),
        (30, 1, vec![0xc1, 0x7f]),
    ];
    odd_model(&path, &tensors, b"not padding");
    let compressed = comes_back(&path);
    assert_eq!((compressed.tensors_count, compressed.coded_count), (6, 2));
}

#[test]
fn what_has_nothing_to_gain_or_cannot_be_done_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let packed = directory.path().join("m.fleapack");
    let kind = |result: Result<Compressed>| {
        assert!(!packed.exists());
        result.unwrap_err().kind()
    };
    let quantised = model(directory.path(), Quant::Q8_0, None);
    assert_eq!(kind(run(&quantised, &packed)), ErrorKind::Unsupported);
    let noise: Vec<u8> = (0..200_000_u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8)
        .collect();
    let incompressible = directory.path().join("noise.gguf");
    odd_model(&incompressible, &[(1, 100_000, noise)], b"");
    assert_eq!(kind(run(&incompressible, &packed)), ErrorKind::Unsupported);
    let parts = tempfile::tempdir().unwrap();
    let part = model(parts.path(), Quant::Bf16, Some(500_000));
    let error = run(&part, &packed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.context().contains("flea pack MODEL -o"), "{error}");
    let itself = PackOptions {
        force: true,
        ..options(&quantised, &quantised)
    };
    let stop = AtomicBool::new(false);
    assert!(compress(&itself, &stop, |_, _| {}).is_err());
}

#[test]
fn interrupted_it_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let model = model(directory.path(), Quant::Bf16, None);
    let packed = directory.path().join("m.fleapack");
    let stop = AtomicBool::new(false);
    let halfway = |_, _| stop.store(true, Ordering::Relaxed);
    let error = compress(&options(&model, &packed), &stop, halfway).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Canceled);
    stop.store(false, Ordering::Relaxed);
    run(&model, &packed).unwrap();
    let back = directory.path().join("back.gguf");
    let error = decompress(&options(&packed, &back), &stop, halfway).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Canceled);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    // And neither overwrites what is there.
    assert_eq!(run(&model, &packed).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        restore(&packed, &model).unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

/// Every byte of the container is guarded: changed anywhere but in the padding, nothing is written, and the message names
/// the file, and the tensor and offset where there is one.
#[test]
fn damage_anywhere_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let model = model(directory.path(), Quant::Bf16, None);
    let packed = directory.path().join("m.fleapack");
    run(&model, &packed).unwrap();
    let whole = std::fs::read(&packed).unwrap();
    let parts = packed_file::open(&ShardFile::open(&packed).unwrap())
        .unwrap()
        .parts;
    let back = directory.path().join("back.gguf");
    let damaged = directory.path().join("damaged.fleapack");
    let fails = |bytes: &[u8]| {
        std::fs::write(&damaged, bytes).unwrap();
        let error = restore(&damaged, &back).unwrap_err();
        assert_eq!(error.kind().exit_code(), 5, "{error}");
        assert!(error.context().contains("damaged.fleapack"), "{error}");
        assert!(!back.exists());
        error
    };
    for part in &parts {
        for at in [0, 20, 40, part.coded_bytes / 2, part.coded_bytes - 1] {
            let mut bytes = whole.clone();
            bytes[(part.at_bytes + at.min(part.coded_bytes - 1)) as usize] ^= 0x40;
            let error = fails(&bytes);
            assert!(error.context().contains(&part.label()), "{error}");
            let offset = format!("at offset {}", part.at_bytes);
            assert!(error.context().contains(&offset), "{error}");
        }
    }
    for at in [
        0,
        9,
        whole.len() - 1,
        whole.len() - 10,
        whole.len() - 30,
        whole.len() - 60,
    ] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fails(&bytes);
    }
    for len in [1, 11, 4096, whole.len() / 2, whole.len() - 1] {
        fails(&whole[..len]);
    }
}

/// A directory that checks out against its CRC32C and lies all the same.
#[test]
fn a_directory_that_lies_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let model = model(directory.path(), Quant::Bf16, None);
    let packed = directory.path().join("m.fleapack");
    run(&model, &packed).unwrap();
    let whole = std::fs::read(&packed).unwrap();
    let honest = packed_file::open(&ShardFile::open(&packed).unwrap()).unwrap();
    let coded = honest
        .parts
        .iter()
        .position(|part| part.coding == Coding::Tiles)
        .unwrap();
    let lies: [fn(&mut packed_file::Directory, usize); 9] = [
        |directory, part| directory.parts[part].len_bytes += 2,
        |directory, part| directory.parts[part].len_bytes = 1 << 60,
        |directory, part| directory.parts[part].coded_bytes = u64::MAX,
        |directory, part| directory.parts[part].at_bytes = 1 << 40,
        |directory, part| directory.parts[part].at_bytes += 1,
        |directory, part| directory.parts[part].coding = Coding::Stored,
        |directory, part| directory.parts[part].pieces.clear(),
        |directory, part| directory.parts[part].zeros_bytes = u64::MAX,
        |directory, _| directory.bytes += 1,
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        let mut lying = honest.clone();
        lie(&mut lying, coded);
        let text = serde_json::to_vec(&lying).unwrap();
        let at = u64::from_le_bytes(whole[whole.len() - 32..][..8].try_into().unwrap());
        let mut bytes = whole[..at as usize].to_vec();
        bytes.extend(&text);
        bytes.extend(packed_file::trailer(at, &text));
        std::fs::write(&packed, bytes).unwrap();
        let error = restore(&packed, &directory.path().join("back.gguf")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Format, "{index}: {error}");
    }
}

#[test]
fn a_compressed_model_is_no_gguf_but_is_read_as_the_original() {
    let directory = tempfile::tempdir().unwrap();
    let model = model(directory.path(), Quant::Bf16, None);
    let packed = directory.path().join("m.gguf");
    run(&model, &packed).unwrap();
    let (original, files) = read_catalog(&model).unwrap();
    let (catalog, decoded) = read_catalog(&packed).unwrap();
    assert_eq!(catalog.tensors, original.tensors);
    assert_eq!(catalog.layers, original.layers);
    // Any bytes, from anywhere: over tensors, tiles, and what lies between them.
    let len = files[0].len_bytes();
    assert_eq!(decoded[0].len_bytes(), len);
    let mut at = 0;
    while at < len {
        let step = (at * 7919 % 300_007 + 1).min(len - at) as usize;
        let (mut expected, mut found) = (vec![0; step], vec![0xa5; step]);
        files[0].read_exact_at(at, &mut expected).unwrap();
        decoded[0].read_exact_at(at, &mut found).unwrap();
        assert!(expected == found, "{step} bytes at {at}");
        at += step as u64;
    }
    let error = decoded[0].read_exact_at(len - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated);
    // As it lies it is no GGUF, and says what it is.
    let raw = ShardFile::open(&packed).unwrap();
    let error = crate::model::gguf::parse_shard(&packed, raw.len_bytes(), &mut raw.header_reader());
    let error = error.unwrap_err();
    assert!(error.context().contains("--decompress"), "{error}");
    let error = restore(&model, &directory.path().join("back.gguf")).unwrap_err();
    assert!(
        error.context().contains("not a compressed model"),
        "{error}"
    );
}
