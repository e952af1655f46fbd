//! Tests of packing: the same tensors and keys, on pages, in the order of use; joined splits; nothing left behind.

use super::*;
use crate::tools::synth::shape::{Arch, Quant, Shape, Wish};
use crate::tools::synth::{Spec, generate};
use std::collections::BTreeMap;

fn model(directory: &Path, arch: Arch, split_bytes: Option<u64>) -> PathBuf {
    let wish = Wish {
        layers: Some(3),
        embd: Some(256),
        heads: Some(4),
        vocab: Some(512),
        ..Wish::default()
    };
    let spec = Spec {
        shape: Shape::choose(arch, Quant::Q4KM, &wish).unwrap(),
        seed: 5,
        router_skew: 0.0,
        split_bytes,
        force: false,
    };
    let path = directory.join("model.gguf");
    let report = generate(&spec, &path, &AtomicBool::new(false), |_, _| {}).unwrap();
    report.files[0].clone()
}

fn options(model: &Path, output: &Path) -> PackOptions {
    PackOptions {
        model: model.to_path_buf(),
        output: output.to_path_buf(),
        force: false,
    }
}

fn run(options: &PackOptions) -> Result<Packed> {
    pack(options, &AtomicBool::new(false), |_, _| {})
}

/// Name, type, shape and bytes of every tensor.
fn contents(path: &Path) -> BTreeMap<String, (u32, [u64; 4], Vec<u8>)> {
    let (catalog, files) = read_catalog(path).unwrap();
    let tensors = catalog.tensors.iter().map(|tensor| {
        let mut bytes = vec![0; tensor.extent.len_bytes as usize];
        files[tensor.extent.shard_index as usize]
            .read_exact_at(tensor.extent.offset_bytes, &mut bytes)
            .unwrap();
        let number = tensor.dtype.ggml_number().unwrap();
        (tensor.name.clone(), (number, tensor.shape, bytes))
    });
    tensors.collect()
}

fn raw_entries(path: &Path) -> Vec<(String, Vec<u8>)> {
    let file = ShardFile::open(path).unwrap();
    let header =
        gguf::parse_shard_with_raw_metadata(path, file.len_bytes(), &mut file.header_reader())
            .unwrap();
    entries(&header.raw_metadata, header.key_count)
        .unwrap()
        .into_iter()
        .map(|(key, range)| {
            let key = String::from_utf8(key.to_vec()).unwrap();
            (key, header.raw_metadata[range].to_vec())
        })
        .collect()
}

fn without(entries: Vec<(String, Vec<u8>)>, keys: &[&str]) -> Vec<(String, Vec<u8>)> {
    let kept = entries.into_iter();
    kept.filter(|(key, _)| !keys.contains(&key.as_str()))
        .collect()
}

#[test]
fn the_same_model_on_pages_in_the_order_of_use() {
    for arch in Arch::ALL {
        let directory = tempfile::tempdir().unwrap();
        let before = model(directory.path(), arch, None);
        let after = directory.path().join("packed.gguf");
        let packed = run(&options(&before, &after)).unwrap();
        assert_eq!(packed.bytes, std::fs::metadata(&after).unwrap().len());
        assert!(contents(&before) == contents(&after), "{arch}");
        assert_eq!(
            without(raw_entries(&before), &[ALIGNMENT_KEY]),
            without(raw_entries(&after), &[ALIGNMENT_KEY])
        );
        let (catalog, _files) = read_catalog(&after).unwrap();
        assert_eq!(catalog.alignment_bytes, PAGE_4K);
        let on_pages =
            |tensor: &crate::model::Tensor| tensor.extent.offset_bytes.is_multiple_of(PAGE_4K);
        assert!(catalog.tensors.iter().all(on_pages));
        // Within a layer offsets rise with the order of use, and each layer begins behind the one before.
        let mut last = 0;
        for layer in &catalog.layers {
            let mut uses: Vec<_> = layer.uses.iter().collect();
            uses.sort_by_key(|used| (used.order, used.extent.offset_bytes));
            // A tied head is the host's embedding and lies in front.
            for used in uses
                .iter()
                .filter(|used| !catalog.tensors[used.tensor_index as usize].host_kept)
            {
                assert!(used.extent.offset_bytes >= last, "{arch} {}", layer.label);
                last = used.extent.offset_bytes;
            }
        }
    }
}

#[test]
fn parts_are_joined() {
    let directory = tempfile::tempdir().unwrap();
    let part = model(directory.path(), Arch::Llama, Some(200_000));
    let after = directory.path().join("joined.gguf");
    let packed = run(&options(&part, &after)).unwrap();
    assert!(packed.files_count > 1);
    assert!(contents(&part) == contents(&after));
    let keys: Vec<String> = raw_entries(&after)
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    assert!(
        !keys.iter().any(|key| key.starts_with("split.")),
        "{keys:?}"
    );
    let mut gone = SPLIT_KEYS.to_vec();
    gone.push(ALIGNMENT_KEY);
    assert_eq!(
        without(raw_entries(&part), &gone),
        without(raw_entries(&after), &gone)
    );
    // Packed again it is the same file: nothing is left to do.
    let again = directory.path().join("again.gguf");
    assert_eq!(run(&options(&after, &again)).unwrap().moved_count, 0);
    assert!(std::fs::read(&after).unwrap() == std::fs::read(&again).unwrap());
}

#[test]
fn nothing_is_overwritten_or_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let before = model(directory.path(), Arch::Llama, None);
    let original = std::fs::read(&before).unwrap();
    let itself = PackOptions {
        force: true,
        ..options(&before, &before)
    };
    assert_eq!(run(&itself).unwrap_err().kind(), ErrorKind::Invalid);
    assert!(std::fs::read(&before).unwrap() == original);
    let output = directory.path().join("out.gguf");
    let stopped = pack(
        &options(&before, &output),
        &AtomicBool::new(true),
        |_, _| {},
    );
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Canceled);
    // In the middle of the copy, too.
    let stop = AtomicBool::new(false);
    let halfway = pack(&options(&before, &output), &stop, |_, _| {
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(halfway.unwrap_err().kind(), ErrorKind::Canceled);
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    std::fs::write(&output, "mine").unwrap();
    assert_eq!(
        run(&options(&before, &output)).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
}

#[test]
fn keys_are_walked_to_the_byte_or_not_at_all() {
    let mut raw = Vec::new();
    let key = |raw: &mut Vec<u8>, name: &str, number: u32| {
        raw.extend((name.len() as u64).to_le_bytes());
        raw.extend(name.as_bytes());
        raw.extend(number.to_le_bytes());
    };
    key(&mut raw, "a", 10);
    raw.extend(7u64.to_le_bytes());
    key(&mut raw, "b", 9);
    raw.extend(8u32.to_le_bytes());
    raw.extend(2u64.to_le_bytes());
    for text in ["x", "yz"] {
        raw.extend((text.len() as u64).to_le_bytes());
        raw.extend(text.as_bytes());
    }
    let found = entries(&raw, 2).unwrap();
    assert_eq!(found[0], (&b"a"[..], 0..21));
    assert_eq!(found[1], (&b"b"[..], 21..raw.len()));
    assert_eq!(entries(&raw, 1), None, "bytes are left");
    assert_eq!(entries(&raw[..raw.len() - 1], 2), None);
    let mut unknown = Vec::new();
    key(&mut unknown, "c", 99);
    assert_eq!(entries(&unknown, 1), None);
}
