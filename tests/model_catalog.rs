//! The catalog on models of known shape: layers, heads, experts, row tables, split files, safetensors.

#[path = "support/gguf_bytes.rs"]
mod gguf_bytes;

use flea::error::{ErrorKind, Result};
use flea::model::catalog::{self, Catalog, EXTENT_GAP_BYTES, Experts, LayerSpan};
use flea::model::gguf::{self, ShardHeader};
use flea::model::{DType, Format, LayerKind, Role, safetensors};
use gguf_bytes::GgufBytes;
use proptest::prelude::*;
use std::path::Path;

fn header(file: &GgufBytes, path: &str) -> ShardHeader {
    let (bytes, len_bytes) = file.build();
    gguf::parse_shard(Path::new(path), len_bytes, &mut &bytes[..]).unwrap()
}

fn catalog(file: &GgufBytes) -> Catalog {
    catalog::from_gguf(vec![header(file, "m.gguf")]).unwrap()
}

fn labels(catalog: &Catalog) -> Vec<&str> {
    catalog
        .layers
        .iter()
        .map(|layer| layer.label.as_str())
        .collect()
}

#[test]
fn a_llama_has_its_blocks_and_then_its_head() {
    let catalog = catalog(&GgufBytes::llama(3, 64, 128, 100, true));
    assert_eq!(labels(&catalog), ["blk.0", "blk.1", "blk.2", "output"]);
    assert_eq!(
        (catalog.format, catalog.architecture.as_str()),
        (Format::Gguf(3), "llama")
    );
    assert_eq!(
        (catalog.name.as_deref(), catalog.context_length),
        (Some("tiny"), Some(2048))
    );
    assert!(!catalog.tied_embeddings);
    assert_eq!(catalog.architecture_number("block_count"), Some(3));

    let block = &catalog.layers[1];
    assert_eq!(block.kind, LayerKind::Block(1));
    assert_eq!(block.bytes, 2 * 64 * 4 + 2 * (4 * 64 * 64 + 3 * 64 * 128));
    assert_eq!(block.extents.len(), 1);
    let order = |name: &str| {
        let (index, tensor) = catalog.tensor(name).unwrap();
        assert_eq!(
            tensor.layers,
            Some(LayerSpan {
                first: 1,
                last: 1,
                rows_per_layer: 0
            })
        );
        block
            .uses
            .iter()
            .find(|used| used.tensor_index as usize == index)
            .unwrap()
            .order
    };
    assert!(order("blk.1.attn_norm.weight") < order("blk.1.attn_q.weight"));
    assert!(order("blk.1.attn_output.weight") < order("blk.1.ffn_gate.weight"));
    assert!(order("blk.1.ffn_up.weight") < order("blk.1.ffn_down.weight"));

    let (_, rows) = catalog.tensor("token_embd.weight").unwrap();
    assert!(rows.host_kept && rows.layers.is_none() && rows.role.is_row_table());
    assert_eq!(rows.row_bytes(), Some(128));
    assert_eq!(catalog.host_tensor_bytes, 128 * 100);
    assert_eq!(catalog.types[0].dtype, DType::F16);
    let sum: u64 = catalog.types.iter().map(|share| share.bytes).sum();
    assert_eq!(sum, catalog.model_bytes);
    assert!(catalog.tensor("nothing.weight").is_none());
}

#[test]
fn a_large_head_is_cut_and_its_pieces_cover_it() {
    // Blocks of 82 432 bytes; an output of 160 000 x 64 halves is 20 MB.
    let catalog = catalog(&GgufBytes::llama(2, 64, 128, 160_000, true));
    let (index, output) = catalog.tensor("output.weight").unwrap();
    let span = output.layers.unwrap();
    let largest = catalog.layers[0].bytes;
    assert_eq!(
        (span.first, span.last),
        (2, catalog.layers.len() as u32 - 1)
    );
    let mut next_row = 0;
    for (place, layer) in catalog.layers[2..].iter().enumerate() {
        let LayerKind::Head {
            first_row,
            row_count,
        } = layer.kind
        else {
            panic!("{} is no piece of the head", layer.label);
        };
        assert_eq!(first_row, next_row);
        assert_eq!(
            layer.label,
            format!("output[{first_row}..{}]", first_row + row_count)
        );
        assert_eq!(row_count % 16, 0);
        assert_eq!(first_row / span.rows_per_layer, place as u64);
        let piece = layer
            .uses
            .iter()
            .find(|used| used.tensor_index as usize == index)
            .unwrap();
        assert_eq!(
            piece.extent.offset_bytes,
            output.extent.offset_bytes + first_row * 128
        );
        assert_eq!(piece.extent.len_bytes, row_count * 128);
        // The norm is with the first piece, which has to fit with it.
        assert_eq!(layer.uses.len(), if place == 0 { 2 } else { 1 });
        assert!(layer.bytes <= largest);
        next_row += row_count;
    }
    assert_eq!(next_row, 160_000);
    let (_, norm) = catalog.tensor("output_norm.weight").unwrap();
    assert_eq!(
        norm.layers,
        Some(LayerSpan {
            first: 2,
            last: 2,
            rows_per_layer: 0
        })
    );
}

#[test]
fn a_tied_embedding_is_the_hosts_and_the_heads() {
    let tied = catalog(&GgufBytes::llama(2, 64, 128, 100, false));
    assert!(tied.tied_embeddings);
    let (_, rows) = tied.tensor("token_embd.weight").unwrap();
    assert!(rows.host_kept);
    assert_eq!(rows.layers.unwrap().first, 2);
    assert_eq!(
        tied.layer_bytes() + tied.host_tensor_bytes,
        tied.model_bytes + rows.extent.len_bytes
    );
    // An encoder has no output norm, hence no head.
    let encoder = catalog(
        &GgufBytes::new("bert")
            .tensor("token_embd.weight", &[32, 100], DType::F16)
            .tensor("token_types.weight", &[32, 2], DType::F32)
            .tensor("blk.0.attn_q.weight", &[32, 32], DType::F16),
    );
    assert_eq!(labels(&encoder), ["blk.0"]);
    assert!(!encoder.tied_embeddings);
    // lfm2 files call the last norm after the embeddings.
    let lfm2 = |architecture: &str| {
        catalog(
            &GgufBytes::new(architecture)
                .tensor("token_embd.weight", &[32, 100], DType::F16)
                .tensor("token_embd_norm.weight", &[32], DType::F32)
                .tensor("blk.0.shortconv.conv.weight", &[3, 32], DType::F32),
        )
    };
    assert!(lfm2("lfm2").tied_embeddings && !lfm2("bert").tied_embeddings);
}

#[test]
fn experts_are_told_apart() {
    let moe = catalog(
        &GgufBytes::new("qwen3moe")
            .u32("qwen3moe.expert_count", 8)
            .u32("qwen3moe.expert_used_count", 2)
            .u32("qwen3moe.expert_shared_count", 1)
            .tensor("blk.0.ffn_gate_inp.weight", &[64, 8], DType::F32)
            .tensor("blk.0.ffn_up_exps.weight", &[64, 32, 8], DType::Q8_0)
            .tensor("blk.0.ffn_up_shexp.weight", &[64, 32], DType::Q8_0)
            .tensor("blk.1.ffn_up.5.weight", &[64, 32], DType::Q8_0),
    );
    assert_eq!(
        (
            moe.expert_count,
            moe.experts_used_count,
            moe.shared_expert_count
        ),
        (Some(8), Some(2), Some(1))
    );
    let (_, merged) = moe.tensor("blk.0.ffn_up_exps.weight").unwrap();
    assert_eq!(merged.experts, Some(Experts { first: 0, count: 8 }));
    let each_bytes = 32 * 68;
    let third = merged.expert_extent(3).unwrap();
    assert_eq!(
        third.offset_bytes,
        merged.extent.offset_bytes + 3 * each_bytes
    );
    assert_eq!(third.len_bytes, each_bytes);
    assert_eq!(merged.expert_extent(8), None);
    let (_, single) = moe.tensor("blk.1.ffn_up.5.weight").unwrap();
    assert_eq!(single.expert_extent(5), Some(single.extent));
    assert_eq!(
        (single.expert_extent(4), single.expert_extent(6)),
        (None, None)
    );
    let (_, shared) = moe.tensor("blk.0.ffn_up_shexp.weight").unwrap();
    assert_eq!((shared.role, shared.experts), (Role::SharedExpert, None));
}

#[test]
fn drafting_layers_are_not_part_of_a_pass() {
    let file = |drafting: u32| {
        catalog(
            &GgufBytes::new("glm4moe")
                .u32("glm4moe.block_count", 3)
                .u32("glm4moe.nextn_predict_layers", drafting)
                .tensor("blk.0.attn_q.weight", &[32, 32], DType::F16)
                .tensor("blk.1.attn_q.weight", &[32, 32], DType::F16)
                .tensor("blk.2.attn_q.weight", &[32, 32], DType::F16)
                .tensor("blk.2.nextn.eh_proj.weight", &[64, 32], DType::F16),
        )
    };
    let with = file(1);
    assert_eq!(labels(&with), ["blk.0", "blk.1"]);
    assert_eq!(with.unused_tensor_bytes, 32 * 32 * 2 + 64 * 32 * 2);
    let (_, skipped) = with.tensor("blk.2.attn_q.weight").unwrap();
    assert_eq!(
        (skipped.layers, skipped.host_kept, skipped.role),
        (None, false, Role::NextToken)
    );
    assert_eq!(labels(&file(0)), ["blk.0", "blk.1", "blk.2"]);
    assert_eq!(
        labels(&file(3)),
        ["blk.0", "blk.1", "blk.2"],
        "all of it cannot be drafting"
    );
}

/// A layer in several places: small gaps are read over, large ones and other layers' bytes are not.
#[test]
fn extents_merge_only_over_small_gaps() {
    let names = ["blk.0.a", "blk.0.b", "blk.0.c", "blk.1.a", "blk.0.d"];
    let mut file = GgufBytes::new("llama");
    for name in names {
        file = file.tensor(name, &[256], DType::F32);
    }
    let gap = EXTENT_GAP_BYTES;
    let offsets = [
        0,
        1024 + gap - 32,
        2048 + 2 * gap,
        3072 + 2 * gap,
        4096 + 2 * gap,
    ];
    let bytes = file.build_with_offsets(&offsets);
    let header = gguf::parse_shard(Path::new("m"), 1 << 20, &mut &bytes[..]).unwrap();
    let data = header.data_offset_bytes;
    let catalog = catalog::from_gguf(vec![header]).unwrap();
    let places: Vec<_> = catalog.layers[0]
        .extents
        .iter()
        .map(|extent| (extent.offset_bytes - data, extent.len_bytes))
        .collect();
    assert_eq!(
        places,
        [
            (0, 1024 + gap - 32 + 1024),
            (offsets[2], 1024),
            (offsets[4], 1024)
        ]
    );
}

fn part(number: u16, count: u16, tensors: &[&str]) -> GgufBytes {
    let mut file = GgufBytes::new("llama")
        .u16("split.no", number)
        .u16("split.count", count)
        .raw(
            "split.tensors.count",
            gguf_bytes::typed(5, &3_i32.to_le_bytes()),
        );
    for name in tensors {
        file = file.tensor(name, &[32, 32], DType::F16);
    }
    file
}

fn refused(headers: Vec<ShardHeader>, words: &[&str]) {
    let error = catalog::from_gguf(headers).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format, "{error}");
    for word in words {
        assert!(
            error.context().contains(word),
            "'{word}' is not in: {error}"
        );
    }
}

#[test]
fn split_files_must_belong_together() {
    let one = || {
        header(
            &part(0, 2, &["blk.0.attn_q.weight", "blk.1.attn_q.weight"]),
            "m-00001-of-00002.gguf",
        )
    };
    let two = || {
        header(
            &part(1, 2, &["blk.1.ffn_up.weight"]),
            "m-00002-of-00002.gguf",
        )
    };
    let whole = catalog::from_gguf(vec![one(), two()]).unwrap();
    assert_eq!((whole.shards.len(), whole.layers.len()), (2, 2));
    let shards: Vec<u32> = whole.layers[1]
        .extents
        .iter()
        .map(|extent| extent.shard_index)
        .collect();
    assert_eq!(shards, [0, 1], "a layer may lie in two files");
    refused(
        vec![one()],
        &["m-00001-of-00002.gguf", "part 1 of 2", "part 1 of 1"],
    );
    refused(
        vec![two(), one()],
        &["m-00002-of-00002.gguf", "part 2 of 2", "part 1 of 2"],
    );
    let plain = || header(&GgufBytes::llama(1, 32, 32, 32, true), "plain.gguf");
    refused(vec![plain(), plain()], &["no part of a split model"]);
    let short = header(&part(1, 2, &[]), "m-00002-of-00002.gguf");
    refused(
        vec![one(), short],
        &["split.tensors.count is 3", "hold 2 tensors"],
    );
    let twice = header(
        &part(1, 2, &["blk.0.attn_q.weight"]),
        "m-00002-of-00002.gguf",
    );
    refused(
        vec![one(), twice],
        &["'blk.0.attn_q.weight'", "m-00001-of-00002.gguf already"],
    );
    let (bytes, len_bytes) = part(5, 2, &[]).build();
    let error = gguf::parse_shard(Path::new("m"), len_bytes, &mut &bytes[..]).unwrap_err();
    assert!(
        error.context().contains("split.no is 5 of split.count 2"),
        "{error}"
    );
    assert_eq!(
        catalog::from_gguf(Vec::new()).unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

/// A safetensors file of f16 tensors one behind the other: its header and its length.
fn safetensors_file(tensors: &[(&str, &[u64])]) -> (Vec<u8>, u64) {
    let mut at = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|(name, shape)| {
            let begin = at;
            at += 2 * shape.iter().product::<u64>();
            format!(r#""{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{begin},{at}]}}"#)
        })
        .collect();
    let json = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{}}}"#,
        entries.join(",")
    );
    safetensors_bytes(&json, at)
}

fn safetensors_bytes(json: &str, data_bytes: u64) -> (Vec<u8>, u64) {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    let len_bytes = bytes.len() as u64 + data_bytes;
    (bytes, len_bytes)
}

fn parse(path: &str, (bytes, len_bytes): &(Vec<u8>, u64)) -> Result<safetensors::ShardHeader> {
    safetensors::parse_shard(Path::new(path), *len_bytes, &mut &bytes[..])
}

const MODEL: &[(&str, &[u64])] = &[
    ("lm_head.weight", &[90, 32]),
    ("model.embed_tokens.weight", &[100, 32]),
    ("model.layers.0.mlp.down_proj.weight", &[32, 64]),
    ("model.layers.0.self_attn.q_proj.weight", &[32, 32]),
    ("model.norm.weight", &[32]),
    ("visual.patch_embed.weight", &[8, 3, 2, 14, 14]),
];

#[test]
fn safetensors_make_the_same_catalog() {
    let header = parse("model.safetensors", &safetensors_file(MODEL)).unwrap();
    assert_eq!(header.metadata.text("format"), Some("pt"));
    let config = br#"{"model_type":"qwen2","tie_word_embeddings":false,
        "text_config":{"max_position_embeddings":4096,"num_local_experts":0}}"#;
    let config = safetensors::parse_config(Path::new("config.json"), config).unwrap();
    let catalog = catalog::from_safetensors(vec![header], None, Some(&config)).unwrap();
    assert_eq!(labels(&catalog), ["blk.0", "output"]);
    assert_eq!(
        (catalog.architecture.as_str(), catalog.context_length),
        ("qwen2", Some(4096))
    );
    assert_eq!(
        (catalog.expert_count, catalog.tied_embeddings),
        (None, false)
    );
    let (_, down) = catalog
        .tensor("model.layers.0.mlp.down_proj.weight")
        .unwrap();
    assert_eq!((down.shape, down.dims), ([64, 32, 1, 1], 2));
    let (_, patch) = catalog.tensor("visual.patch_embed.weight").unwrap();
    assert_eq!(
        (patch.shape, patch.dims, patch.host_kept),
        ([14, 14, 2, 24], 4, true)
    );
    let q = catalog
        .tensor("model.layers.0.self_attn.q_proj.weight")
        .unwrap()
        .0 as u32;
    let order = |index: u32| {
        let mut uses = catalog.layers[0].uses.iter();
        uses.find(|used| used.tensor_index == index).unwrap().order
    };
    assert!(
        order(q)
            < order(
                catalog
                    .tensor("model.layers.0.mlp.down_proj.weight")
                    .unwrap()
                    .0 as u32
            )
    );
}

#[test]
fn safetensors_cut_at_every_byte_are_refused() {
    let whole = safetensors_file(MODEL);
    for cut in 0..whole.0.len() {
        let error = parse("m", &(whole.0[..cut].to_vec(), cut as u64)).expect_err("a cut header");
        assert_eq!(error.kind(), ErrorKind::Truncated, "{cut}: {error}");
        let error = parse("m", &(whole.0[..cut].to_vec(), whole.1)).expect_err("a shrunk file");
        assert_eq!(error.kind(), ErrorKind::Truncated, "{cut}: {error}");
    }
    let error = parse("m", &(whole.0.clone(), whole.1 - 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
    assert!(
        error.context().contains("'visual.patch_embed.weight'"),
        "{error}"
    );
    let error = parse("m", &(whole.0.clone(), whole.1 + 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format, "{error}");
    for place in 0..whole.0.len() {
        for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut hostile = whole.clone();
            hostile.0[place] ^= flip;
            if let Ok(header) = parse("m", &hostile) {
                assert!(
                    header
                        .tensors
                        .iter()
                        .all(|tensor| tensor.end_bytes() <= hostile.1)
                );
                let _ = catalog::from_safetensors(vec![header], None, None);
            }
        }
    }
}

#[test]
fn hostile_safetensors_are_named() {
    let entry = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let a = entry("F16", "[4]", 0, 8);
    for (json, data, words) in [
        (
            format!(r#"{{"x":{}}}"#, entry("F7", "[4]", 0, 8)),
            8,
            ["tensor 'x'", "F7"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F16", "[5]", 0, 8)),
            8,
            ["tensor 'x'", "takes 10 bytes"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F16", "[4]", 8, 0)),
            8,
            ["tensor 'x'", "8 to 0"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F16", "[4]", 8, 16)),
            16,
            ["tensor 'x'", "begins at offset"],
        ),
        (
            format!(
                r#"{{"x":{}}}"#,
                entry("F16", "[9223372036854775807,4]", 0, 8)
            ),
            8,
            ["tensor 'x'", "impossible shape"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F4", "[3]", 0, 2)),
            2,
            ["tensor 'x'", "impossible shape"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F16", "[1,1,1,1,1,1,1,1,4]", 0, 8)),
            8,
            ["tensor 'x'", "9 dimensions"],
        ),
        (
            format!(r#"{{"x":{}}}"#, entry("F16", "[-4]", 0, 8)),
            8,
            ["tensor 'x'", "-4"],
        ),
        (
            format!(r#"{{"x":{a},"x":{a}}}"#),
            8,
            ["tensor 'x'", "twice"],
        ),
        (
            format!(r#"{{"x":{a},"y":{}}}"#, entry("F16", "[4]", 4, 12)),
            12,
            ["tensor 'y'", "inside tensor 'x'"],
        ),
        (
            format!(r#"{{"x":{a}}}"#),
            9,
            ["the tensors end at", "the file at"],
        ),
        ("[]".to_owned(), 0, ["header is wrong", "object"]),
        ("{".repeat(5000), 0, ["header is wrong", "line 1"]),
    ] {
        let error = parse("m.safetensors", &safetensors_bytes(&json, data)).expect_err(&json);
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
        for word in words {
            assert!(
                error.context().contains(word),
                "'{word}' is not in: {error}"
            );
        }
    }
    for claimed in [100_000_001, u64::MAX] {
        let bytes = [&u64::to_le_bytes(claimed)[..], b"{}"].concat();
        let error = parse("m", &(bytes, u64::MAX)).unwrap_err();
        assert!(
            error.context().contains("not a safetensors file"),
            "{error}"
        );
    }
}

#[test]
fn an_index_leads_to_its_files_and_nowhere_else() {
    let path = Path::new("/models/x/model.safetensors.index.json");
    let parse_index = |json: &str| safetensors::parse_index(path, json.as_bytes());
    let index = parse_index(
        r#"{"metadata":{"total_size":1},"weight_map":{"lm_head.weight":"b.safetensors","model.norm.weight":"a.safetensors"}}"#,
    )
    .unwrap();
    assert_eq!(index.shard_names, ["a.safetensors", "b.safetensors"]);
    assert_eq!(
        index.shard_paths(path)[1],
        Path::new("/models/x/b.safetensors")
    );
    for (json, words) in [
        (
            r#"{"weight_map":{"x":"../../etc/passwd"}}"#,
            "plain file name",
        ),
        (r#"{"weight_map":{"x":"/etc/passwd"}}"#, "plain file name"),
        (r#"{"weight_map":{"x":".."}}"#, "plain file name"),
        (r#"{"weight_map":{"x":""}}"#, "plain file name"),
        (r#"{"weight_map":{}}"#, "names 0 files"),
        (r#"{"weight_map":{"x":"a","x":"b"}}"#, "twice"),
        (r#"{"weights":{}}"#, "weight_map"),
        ("", "EOF"),
    ] {
        let error = parse_index(json).expect_err(json);
        assert!(error.context().contains(words), "{error}");
    }

    let a = || {
        parse(
            "a.safetensors",
            &safetensors_file(&[("model.norm.weight", &[32])]),
        )
        .unwrap()
    };
    let b = || {
        parse(
            "b.safetensors",
            &safetensors_file(&[("lm_head.weight", &[10, 32])]),
        )
        .unwrap()
    };
    let whole = catalog::from_safetensors(vec![a(), b()], Some(&index), None).unwrap();
    assert_eq!(labels(&whole), ["output"]);
    let swapped = catalog::from_safetensors(vec![b(), a()], Some(&index), None).unwrap_err();
    assert!(
        swapped
            .context()
            .contains("does not place tensor 'lm_head.weight'"),
        "{swapped}"
    );
    let wider = parse_index(
        r#"{"weight_map":{"lm_head.weight":"b.safetensors","model.norm.weight":"a.safetensors","gone":"a.safetensors"}}"#,
    )
    .unwrap();
    let missing = catalog::from_safetensors(vec![a(), b()], Some(&wider), None).unwrap_err();
    assert!(missing.context().contains("tensor 'gone'"), "{missing}");
}

proptest! {
    /// Whatever the vocabulary, every row of the head is in exactly one piece.
    #[test]
    fn heads_of_any_size_are_covered(vocab in 1_u64..50_000, embd in 1_u64..5, untied in any::<bool>()) {
        let catalog = catalog(&GgufBytes::llama(2, embd * 16, 64, vocab, untied));
        let name = if untied { "output.weight" } else { "token_embd.weight" };
        let (index, matrix) = catalog.tensor(name).unwrap();
        let mut pieces: Vec<_> = catalog.layers.iter().flat_map(|layer| &layer.uses)
            .filter(|used| used.tensor_index as usize == index).map(|used| used.extent).collect();
        pieces.sort_unstable();
        prop_assert_eq!(pieces[0].offset_bytes, matrix.extent.offset_bytes);
        prop_assert_eq!(pieces.last().unwrap().end_bytes(), matrix.extent.end_bytes());
        prop_assert!(pieces.windows(2).all(|pair| pair[0].end_bytes() == pair[1].offset_bytes));
        let span = matrix.layers.unwrap();
        prop_assert_eq!((span.last - span.first + 1) as usize, pieces.len());
        prop_assert_eq!(span.rows_per_layer == 0, pieces.len() == 1);
    }
}
