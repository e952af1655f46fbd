//! Hostile headers at the parser: whatever the bytes say, an error that names the file, never a panic, a hang or a large
//! allocation.

#[path = "support/gguf_bytes.rs"]
mod gguf_bytes;

use flea::error::{ErrorKind, Result};
use flea::model::catalog::{self, Catalog};
use flea::model::gguf::{self, ShardHeader};
use flea::model::{DType, LayerKind, TENSOR_COUNT_MAX, Value, safetensors};
use gguf_bytes::{GgufBytes, text, typed};
use proptest::prelude::*;
use std::path::Path;

const PATH: &str = "hostile.gguf";

fn parse(bytes: &[u8], len_bytes: u64) -> Result<ShardHeader> {
    gguf::parse_shard(Path::new(PATH), len_bytes, &mut &bytes[..])
}

fn refused(bytes: &[u8], len_bytes: u64, kind: ErrorKind, words: &[&str]) {
    let error = parse(bytes, len_bytes).expect_err("must be refused");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.context().starts_with(PATH), "{error}");
    for word in words {
        assert!(
            error.context().contains(word),
            "'{word}' is not in: {error}"
        );
    }
}

fn rich() -> GgufBytes {
    GgufBytes::llama(2, 64, 128, 100, true)
        .texts("tokenizer.ggml.tokens", &["<s>", "", "hello"])
        .i32s("llama.attention.head_count_kv", &[2, -1])
        .raw("general.flag", typed(7, &[1]))
        .raw("general.ratio", typed(6, &1.5_f32.to_le_bytes()))
        .tensor("rope_freqs.weight", &[32], DType::F32)
}

/// What every accepted header must keep, whatever was done to it.
fn check_invariants(header: ShardHeader) {
    let len_bytes = header.shard.len_bytes;
    for tensor in &header.tensors {
        assert!(tensor.offset_bytes >= header.data_offset_bytes && tensor.end_bytes() <= len_bytes);
    }
    if let Ok(catalog) = catalog::from_gguf(vec![header]) {
        check_catalog(&catalog);
    }
}

fn check_catalog(catalog: &Catalog) {
    let mut extents: Vec<_> = catalog
        .layers
        .iter()
        .flat_map(|layer| layer.extents.clone())
        .collect();
    extents.sort_unstable();
    assert!(extents.windows(2).all(|pair| !pair[0].overlaps(&pair[1])));
    for layer in &catalog.layers {
        let sum: u64 = layer.uses.iter().map(|used| used.extent.len_bytes).sum();
        assert_eq!(layer.bytes, sum);
        for used in &layer.uses {
            assert!(layer.extents.iter().any(|extent| {
                extent.shard_index == used.extent.shard_index
                    && extent.offset_bytes <= used.extent.offset_bytes
                    && extent.end_bytes() >= used.extent.end_bytes()
            }));
        }
    }
    let both: u64 = catalog
        .tensors
        .iter()
        .filter(|tensor| tensor.host_kept && tensor.layers.is_some())
        .map(|tensor| tensor.extent.len_bytes)
        .sum();
    assert_eq!(
        catalog.model_bytes + both,
        catalog.layer_bytes() + catalog.host_tensor_bytes + catalog.unused_tensor_bytes
    );
}

#[test]
fn a_header_is_consumed_to_its_end_and_no_further() {
    let (mut bytes, len_bytes) = rich().build();
    let header_bytes = bytes.len() as u64;
    bytes.extend_from_slice(b"tensor data");
    let mut source = &bytes[..];
    let path = Path::new(PATH);
    let header = gguf::parse_shard_with_raw_metadata(path, len_bytes, &mut source).unwrap();
    assert_eq!(source, b"tensor data");
    let range = header.metadata_range.start as usize..header.metadata_range.end as usize;
    assert_eq!(range.start as u64, gguf::PREAMBLE_BYTES);
    assert_eq!(header.raw_metadata, bytes[range]);
    assert!(parse(&bytes, len_bytes).unwrap().raw_metadata.is_empty());
    assert_eq!(header.data_offset_bytes, header_bytes.next_multiple_of(32));
    let metadata = &header.metadata;
    assert_eq!(metadata.array_count("tokenizer.ggml.tokens"), Some(3));
    assert_eq!(
        metadata.get("llama.attention.head_count_kv"),
        Some(&Value::Integers(vec![2, -1]))
    );
    assert_eq!(metadata.get("general.flag"), Some(&Value::Bool(true)));
    assert_eq!(metadata.get("general.ratio"), Some(&Value::Float(1.5)));
}

#[test]
fn cut_at_every_byte_it_is_truncated() {
    let (bytes, len_bytes) = rich().build();
    for cut in 0..bytes.len() {
        let shorter = parse(&bytes[..cut], cut as u64).expect_err("a cut header");
        assert_eq!(shorter.kind(), ErrorKind::Truncated, "{cut}: {shorter}");
        // The file was whole when it was opened, and shrank.
        let shrank = parse(&bytes[..cut], len_bytes).expect_err("a shrunk file");
        assert_eq!(shrank.kind(), ErrorKind::Truncated, "{cut}: {shrank}");
    }
    let header = parse(&bytes, len_bytes).unwrap();
    for tensor in &header.tensors {
        let len_bytes = tensor.end_bytes() - 1;
        refused(&bytes, len_bytes, ErrorKind::Truncated, &["incomplete"]);
    }
}

#[test]
fn no_flipped_byte_panics() {
    let (bytes, len_bytes) = rich().build();
    let (mut accepted, mut rejected) = (0_u32, 0_u32);
    for place in 0..bytes.len() {
        let old = bytes[place];
        let flips = (0..8).map(|bit| old ^ (1 << bit)).chain([0, 0xff, !old]);
        for new in flips {
            let mut hostile = bytes.clone();
            hostile[place] = new;
            match parse(&hostile, len_bytes) {
                Ok(header) => {
                    accepted += 1;
                    check_invariants(header);
                }
                Err(error) => {
                    rejected += 1;
                    let named = error.context().starts_with(PATH);
                    let kind = error.kind();
                    assert!(named && matches!(kind, ErrorKind::Format | ErrorKind::Truncated));
                }
            }
        }
    }
    // Names and values may change into other names and values; counts, lengths, types and offsets may not.
    assert!(
        accepted > 1000 && rejected > 1000,
        "{accepted} and {rejected}"
    );
}

#[test]
fn what_is_no_gguf_is_named() {
    refused(b"", 0, ErrorKind::Truncated, &["magic"]);
    let zip = b"PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    refused(zip, 33, ErrorKind::Format, &["not a GGUF"]);
    let (bytes, len_bytes) = rich().build();
    let version = |version: [u8; 4]| [&bytes[..4], &version, &bytes[8..]].concat();
    for (number, words) in [
        ([1, 0, 0, 0], &["version 1", "convert"][..]),
        ([0, 0, 0, 3], &["big-endian", "version 3"]),
        ([4, 0, 0, 0], &["version 4 is unknown"]),
        ([0; 4], &["version 0 is unknown"]),
    ] {
        refused(&version(number), len_bytes, ErrorKind::Format, words);
    }
    let second = parse(&version([2, 0, 0, 0]), len_bytes).unwrap();
    assert_eq!(second.version, 2);
}

#[test]
fn absurd_counts_cost_nothing() {
    let (bytes, _) = rich().build();
    // The longer file claims to be huge, so only the limits stand between the counts and the memory.
    for len_bytes in [bytes.len() as u64, u64::MAX] {
        for (place, what) in [(8, "tensors"), (16, "metadata keys")] {
            for count in [TENSOR_COUNT_MAX + 1, u64::MAX, 1 << 63] {
                let mut hostile = bytes.clone();
                hostile[place..place + 8].copy_from_slice(&count.to_le_bytes());
                refused(&hostile, len_bytes, ErrorKind::Format, &[what, "at most"]);
            }
        }
    }
    let mut hostile = bytes.clone();
    hostile[8..16].copy_from_slice(&TENSOR_COUNT_MAX.to_le_bytes());
    let len_bytes = bytes.len() as u64;
    refused(
        &hostile,
        len_bytes,
        ErrorKind::Truncated,
        &["1048576 tensors"],
    );
}

#[test]
fn absurd_lengths_cost_nothing() {
    let array = |element: u32, count: u64| {
        typed(
            9,
            &[&element.to_le_bytes()[..], &count.to_le_bytes()].concat(),
        )
    };
    for (what, value) in [
        ("a long text", typed(8, &(1_u64 << 40).to_le_bytes())),
        ("a longer text", typed(8, &u64::MAX.to_le_bytes())),
        ("many bytes", array(0, 1 << 40)),
        ("a product that wraps", array(10, 1 << 61)),
        ("many texts", array(8, u64::MAX)),
        ("many arrays", array(9, 1 << 40)),
    ] {
        let bytes = GgufBytes::new("llama").raw("bad", value).build().0;
        let error = parse(&bytes, 1 << 50).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Format, "{what}: {error}");
        assert!(error.context().contains("key 'bad'"), "{what}: {error}");
        let error = parse(&bytes, bytes.len() as u64).expect_err(what);
        let kind = error.kind();
        assert!(
            matches!(kind, ErrorKind::Format | ErrorKind::Truncated),
            "{what}: {error}"
        );
    }
}

#[test]
fn arrays_nest_only_so_deep() {
    let nested = |depth: usize| {
        // Innermost: one byte. Each level around it: an array of one array.
        let mut value = [&0_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &[7]].concat();
        for _ in 1..depth {
            value = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &value].concat();
        }
        let value = typed(9, &value);
        GgufBytes::llama(1, 32, 32, 32, true)
            .raw("deep", value)
            .build()
    };
    let (bytes, len_bytes) = nested(4);
    let header = parse(&bytes, len_bytes).unwrap();
    assert_eq!(header.metadata.array_count("deep"), Some(1));
    for depth in [5, 2000] {
        let (bytes, len_bytes) = nested(depth);
        refused(
            &bytes,
            len_bytes,
            ErrorKind::Format,
            &["'deep'", "deeper than 4"],
        );
    }
}

#[test]
fn keys_and_names_are_checked() {
    let model = || GgufBytes::llama(1, 32, 32, 32, true);
    let check = |file: GgufBytes, words: &[&str]| {
        let (bytes, len_bytes) = file.build();
        refused(&bytes, len_bytes, ErrorKind::Format, words);
    };
    check(
        model().u32("llama.block_count", 3),
        &["'llama.block_count'", "twice"],
    );
    check(model().u32("", 3), &["is empty", "offset"]);
    check(
        model().raw("odd", typed(13, &[0; 8])),
        &["'odd'", "value type 13"],
    );
    check(
        model().tensor("blk.0.attn_q.weight", &[32], DType::F32),
        &["'blk.0.attn_q.weight'", "twice"],
    );
    check(model().tensor("", &[32], DType::F32), &["no name"]);
    check(
        model().tensor(&"x".repeat(256), &[32], DType::F32),
        &["256 bytes long", "at most 255"],
    );

    let (mut bytes, len_bytes) = model().build();
    let find = |bytes: &[u8], what: &[u8]| {
        bytes
            .windows(what.len())
            .position(|window| window == what)
            .unwrap()
    };
    let value = find(&bytes, b"tiny");
    bytes[value] = 0xff;
    assert!(
        parse(&bytes, len_bytes).is_ok(),
        "shown as well as it goes, not refused"
    );
    let key = find(&bytes, b"general");
    bytes[key] = 0xff;
    refused(&bytes, len_bytes, ErrorKind::Format, &["key 0", "UTF-8"]);
}

#[test]
fn alignment_is_a_bounded_power_of_two() {
    for alignment in [1_u32, 8, 32, 4096, 2 << 20] {
        let file = GgufBytes::llama(1, 32, 32, 32, true).align(alignment);
        let (bytes, len_bytes) = file.build();
        let header = parse(&bytes, len_bytes).unwrap();
        assert_eq!(header.alignment_bytes, u64::from(alignment));
        assert_eq!(header.data_offset_bytes % u64::from(alignment), 0);
    }
    for alignment in [0_u32, 48, 1 << 31, u32::MAX] {
        let file = GgufBytes::llama(1, 32, 32, 32, true).u32("general.alignment", alignment);
        let (bytes, len_bytes) = file.build();
        refused(&bytes, len_bytes, ErrorKind::Format, &["general.alignment"]);
    }
    let (bytes, len_bytes) = GgufBytes::new("llama")
        .text("general.alignment", "32")
        .build();
    refused(&bytes, len_bytes, ErrorKind::Format, &["general.alignment"]);
}

#[test]
fn tensors_must_lie_where_they_can() {
    let file = GgufBytes::new("llama")
        .tensor("blk.0.ffn_up.weight", &[32, 4], DType::F32)
        .tensor("blk.0.ffn_down.weight", &[32, 4], DType::F32);
    let data = (file.build().0.len() as u64).next_multiple_of(32);
    // Any order and holes are legal.
    for (first, second) in [(0, 512), (4096, 0)] {
        let bytes = file.build_with_offsets(&[first, second]);
        assert!(parse(&bytes, data + 8192).is_ok());
    }
    let down = "'blk.0.ffn_down.weight'";
    let inside = "inside tensor 'blk.0.ffn_up.weight'";
    for (second, kind, words) in [
        (480, ErrorKind::Format, [down, inside]),
        (
            0,
            ErrorKind::Format,
            ["tensor 'blk.0.ffn_", "inside tensor 'blk.0.ffn_"],
        ),
        (
            520,
            ErrorKind::Format,
            [down, "520, no multiple of the alignment 32"],
        ),
        (1 << 40, ErrorKind::Truncated, [down, "incomplete"]),
        (u64::MAX - 31, ErrorKind::Format, [down, "beyond any file"]),
    ] {
        let bytes = file.build_with_offsets(&[0, second]);
        refused(&bytes, data + 8192, kind, &words);
    }
}

#[test]
fn types_and_shapes_are_checked() {
    let name = "'blk.0.ffn_up.weight'";
    let mut file = GgufBytes::new("llama").tensor("blk.0.ffn_up.weight", &[256, 4], DType::Q4_K);
    let (bytes, len_bytes) = file.build();
    assert_eq!(
        parse(&bytes, len_bytes).unwrap().tensors[0].len_bytes,
        4 * 144
    );
    let at = bytes.len() - 12;
    for number in [4_u32, 5, 31, 36, 43, 1000, u32::MAX] {
        let mut hostile = bytes.clone();
        hostile[at..at + 4].copy_from_slice(&number.to_le_bytes());
        let words = [name, "unknown type", &number.to_string()];
        refused(&hostile, len_bytes, ErrorKind::Format, &words);
    }
    for (shape, words) in [
        (vec![u64::MAX - 255, 4], [name, "more elements"]),
        (vec![1 << 40, 1 << 40], [name, "more elements"]),
        (vec![256, u64::MAX], [name, "more elements"]),
        (vec![255, 4], [name, "rows of 255"]),
        (vec![256, 1, 1, 1, 1], [name, "5 dimensions"]),
    ] {
        file.tensors[0].1 = shape;
        let bytes = file.build_with_offsets(&[0]);
        refused(&bytes, 1 << 60, ErrorKind::Format, &words);
    }
}

/// Five megabytes of tokens cost one walk and nothing to keep.
#[test]
fn a_tokenizer_is_walked_not_kept() {
    let tokens: Vec<String> = (0..150_000)
        .map(|i| format!("token-number-{i:019}"))
        .collect();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let (bytes, len_bytes) = GgufBytes::llama(1, 32, 32, 32, true)
        .texts("tokenizer.ggml.tokens", &tokens)
        .text("tokenizer.chat_template", &"x".repeat(20_000))
        .build();
    assert!(bytes.len() > 5_000_000);
    let header = parse(&bytes, len_bytes).unwrap();
    let count = 150_000;
    let element = "string";
    assert_eq!(
        header.metadata.get("tokenizer.ggml.tokens"),
        Some(&Value::Array { element, count })
    );
    assert_eq!(
        header.metadata.get("tokenizer.chat_template"),
        Some(&Value::LongText { len_bytes: 20_000 })
    );
    let catalog = catalog::from_gguf(vec![header]).unwrap();
    assert_eq!(catalog.vocabulary_size, Some(count));
}

#[test]
fn a_file_without_tensors_is_no_model() {
    let (bytes, len_bytes) = GgufBytes::new("llama").texts("tokens", &["a"]).build();
    let header = parse(&bytes, len_bytes).unwrap();
    let error = catalog::from_gguf(vec![header]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format);
    assert!(error.context().contains("no tensors"), "{error}");
}

#[test]
fn a_failing_source_is_an_io_error() {
    struct Failing;
    impl std::io::Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(5))
        }
    }
    let path = Path::new(PATH);
    let error = gguf::parse_shard(path, 1000, &mut Failing).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
    let error = safetensors::parse_shard(path, 1000, &mut Failing).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
}

fn arbitrary_file() -> impl Strategy<Value = GgufBytes> {
    let ggml = DType::ALL
        .iter()
        .copied()
        .filter(|dtype| dtype.ggml_number().is_some());
    let types = prop::sample::select(ggml.collect::<Vec<_>>());
    let parts = vec!["attn_q", "ffn_down", "ffn_up_exps", "novel", "attn_norm"];
    let place = (0_u32..5, prop::sample::select(parts));
    let tensors = prop::collection::btree_map(place, (1_u64..4, 0_u64..9, types), 1..20);
    let head = (any::<bool>(), 1_u64..40, "[a-z]{0,9}");
    (tensors, 0_u32..13, head).prop_map(|(tensors, shift, (untied, vocab, name))| {
        let mut file = GgufBytes::new("llama")
            .align(1 << shift)
            .text("general.name", &name);
        for ((block, part), (blocks, rows, dtype)) in tensors {
            let row = blocks * dtype.block_elements();
            file = file.tensor(&format!("blk.{block}.{part}.weight"), &[row, rows], dtype);
        }
        file = file
            .tensor("token_embd.weight", &[16, vocab], DType::F16)
            .tensor("output_norm.weight", &[16], DType::F32);
        if untied {
            file = file.tensor("output.weight", &[16, vocab], DType::F16);
        }
        file
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(file in arbitrary_file()) {
        let (bytes, len_bytes) = file.build();
        let header = parse(&bytes, len_bytes).unwrap();
        prop_assert_eq!(header.alignment_bytes, file.alignment);
        prop_assert_eq!(header.tensors.len(), file.tensors.len());
        for (read, (name, shape, dtype)) in header.tensors.iter().zip(&file.tensors) {
            prop_assert_eq!((&read.name, read.dtype), (name, *dtype));
            prop_assert_eq!(&read.shape[..shape.len()], &shape[..]);
            prop_assert_eq!(read.offset_bytes % file.alignment, 0);
        }
        let catalog = catalog::from_gguf(vec![header]).unwrap();
        check_catalog(&catalog);
        let last = catalog.layers.last().unwrap();
        let is_head = matches!(last.kind, LayerKind::Head { .. });
        prop_assert!(is_head);
        prop_assert_eq!(catalog.tied_embeddings, catalog.tensor("output.weight").is_none());
    }

    #[test]
    fn random_bytes_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600), len_bytes in any::<u64>(),
    ) {
        let path = Path::new(PATH);
        for len_bytes in [len_bytes, bytes.len() as u64] {
            let _ = parse(&bytes, len_bytes);
            let _ = safetensors::parse_shard(path, len_bytes, &mut &bytes[..]);
        }
        let _ = safetensors::parse_index(path, &bytes);
        let _ = safetensors::parse_config(path, &bytes);
        let counts = [2_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat();
        let stamp = [&b"GGUF\x03\0\0\0"[..], &counts, &text("k")].concat();
        for (to, from) in bytes.iter_mut().zip(stamp) {
            *to = from;
        }
        if let Ok(header) = parse(&bytes, len_bytes) {
            check_invariants(header);
        }
    }
}
