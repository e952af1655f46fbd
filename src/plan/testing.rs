//! Catalogs for the tests of the plan: made by hand, or random and nasty.

use std::path::PathBuf;

use proptest::prelude::*;

use super::PlanOptions;
use crate::model::{
    Catalog, DType, Layer, LayerKind, Metadata, Shard, Tensor, TensorInfo, Use, catalog, gguf,
};
use crate::units::{Extent, PAGE_2M, PAGE_4K};

/// One tensor of a made-up file: which layer uses it (`None`: kept by the host), when, how long it is, and how many bytes
/// of nothing come before it.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) layer: Option<usize>,
    pub(crate) order: u16,
    pub(crate) gap_bytes: u64,
    pub(crate) len_bytes: u64,
}

/// A catalog of `layers_count` layers from shards that are lists of pieces, with `tail_bytes` behind the last piece.
pub(crate) fn catalog_of(layers_count: usize, shards: &[Vec<Piece>], tail_bytes: u64) -> Catalog {
    let mut uses: Vec<Vec<Use>> = vec![Vec::new(); layers_count];
    let mut lens = Vec::new();
    let mut host_tensor_bytes = 0;
    let mut model_bytes = 0;
    for (shard_index, pieces) in (0u32..).zip(shards) {
        let mut at_bytes = 0;
        for piece in pieces {
            at_bytes += piece.gap_bytes;
            let extent = Extent {
                shard_index,
                offset_bytes: at_bytes,
                len_bytes: piece.len_bytes,
            };
            at_bytes += piece.len_bytes;
            model_bytes += piece.len_bytes;
            match piece.layer {
                Some(layer) => uses[layer].push(Use {
                    extent,
                    tensor_index: 0,
                    order: piece.order,
                }),
                None => host_tensor_bytes += piece.len_bytes,
            }
        }
        lens.push(at_bytes + tail_bytes);
    }
    let layers = uses.into_iter().enumerate().map(layer_of).collect();
    let shard = |(index, len_bytes): (usize, &u64)| Shard {
        path: PathBuf::from(format!("shard-{index}")),
        len_bytes: *len_bytes,
    };
    let mut catalog = smallest_catalog();
    catalog.shards = lens.iter().enumerate().map(shard).collect();
    catalog.layers = layers;
    catalog.model_bytes = model_bytes;
    catalog.host_tensor_bytes = host_tensor_bytes;
    catalog
}

/// A file of one tensor, as the model room reads it: the part of a catalog that the plan does not look at.
fn smallest_catalog() -> Catalog {
    let embedding = TensorInfo {
        name: "token_embd.weight".to_owned(),
        dtype: DType::F32,
        shape: [8, 16, 1, 1],
        dims: 2,
        offset_bytes: 4096,
        len_bytes: 512,
    };
    catalog::from_gguf(vec![gguf::ShardHeader {
        shard: Shard {
            path: PathBuf::from("made-up.gguf"),
            len_bytes: 4608,
        },
        version: 3,
        alignment_bytes: 32,
        metadata: Metadata::default(),
        key_count: 0,
        metadata_range: 24..24,
        raw_metadata: Vec::new(),
        tensors: vec![embedding],
        data_offset_bytes: 4096,
        split: None,
    }])
    .expect("a catalog of one tensor")
}

fn layer_of((index, uses): (usize, Vec<Use>)) -> Layer {
    Layer {
        kind: LayerKind::Block(index as u32),
        label: format!("blk.{index}"),
        extents: uses.iter().map(|u| u.extent).collect(),
        bytes: uses.iter().map(|u| u.extent.len_bytes).sum(),
        uses,
    }
}

/// `layers_count` equal layers in one file, one after another without gaps, each of the given tensors (order, bytes).
pub(crate) fn even_catalog(layers_count: usize, tensors: &[(u16, u64)]) -> Catalog {
    let pieces = (0..layers_count).flat_map(|layer| {
        tensors.iter().map(move |&(order, len_bytes)| Piece {
            layer: Some(layer),
            order,
            gap_bytes: 0,
            len_bytes,
        })
    });
    catalog_of(layers_count, &[pieces.collect()], 0)
}

/// Gives every use a tensor of its own: its length is the use's, its type and its rows' length those of `kinds`, in turn.
pub(crate) fn with_tensors(mut catalog: Catalog, kinds: &[(DType, u64)]) -> Catalog {
    let model = catalog.tensors[0].clone();
    catalog.tensors.clear();
    let uses = catalog.layers.iter_mut().flat_map(|layer| &mut layer.uses);
    for (index, used) in uses.enumerate() {
        let (dtype, row_elements) = kinds[index % kinds.len()];
        used.tensor_index = index as u32;
        catalog.tensors.push(Tensor {
            name: format!("tensor-{index}"),
            dtype,
            shape: [row_elements, 1, 1, 1],
            extent: used.extent,
            ..model.clone()
        });
    }
    catalog
}

/// How large the pieces of a random catalog are, in pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) layers_max: usize,
    pub(crate) pieces_max: usize,
    pub(crate) pages_max: u64,
}

/// Everything the planner meets, up to a few hundred pages.
pub(crate) const NASTY: Scale = Scale {
    layers_max: 14,
    pieces_max: 60,
    pages_max: 40,
};
/// Small enough to try every possibility.
pub(crate) const TINY: Scale = Scale {
    layers_max: 6,
    pieces_max: 12,
    pages_max: 4,
};

/// A random catalog and options that fit it: one to three shards, layers in the order of the file or not, host-kept
/// tensors between them, gaps from none to several pages, layers far larger or smaller than others, empty ones too.
pub(crate) fn any_case(scale: Scale) -> impl Strategy<Value = (Catalog, PlanOptions)> {
    let page_bytes = prop_oneof![Just(PAGE_4K), Just(PAGE_2M)];
    let slots_count = prop_oneof![4 => Just(3u32), 2 => Just(2u32), 1 => 4..=6u32];
    (page_bytes, slots_count, 1..=scale.layers_max).prop_flat_map(
        move |(page_bytes, slots, layers)| {
            let pieces =
                prop::collection::vec(any_piece(layers, page_bytes, scale), 0..=scale.pieces_max);
            let tail = prop_oneof![Just(0u64), 1..page_bytes * 2];
            (pieces, 1..=3usize, any::<bool>(), tail).prop_map(
                move |(mut pieces, shards, sorted, tail)| {
                    if sorted {
                        pieces.sort_by_key(|piece| piece.layer);
                    }
                    let per_shard = pieces.len().div_ceil(shards).max(1);
                    let shards: Vec<Vec<Piece>> =
                        pieces.chunks(per_shard).map(<[Piece]>::to_vec).collect();
                    let options = PlanOptions {
                        slots_count: slots,
                        page_bytes,
                    };
                    (catalog_of(layers, &shards, tail), options)
                },
            )
        },
    )
}

fn any_piece(layers: usize, page_bytes: u64, scale: Scale) -> impl Strategy<Value = Piece> {
    let layer = prop_oneof![9 => (0..layers).prop_map(Some), 1 => Just(None)];
    let gap_bytes = prop_oneof![
        6 => Just(0u64),
        3 => 1..32u64,
        2 => 1..64 * 1024u64,
        1 => 1..page_bytes * 20,
    ];
    let len_bytes = prop_oneof![
        2 => 0..200u64,
        3 => 1..=page_bytes,
        3 => (1..=scale.pages_max).prop_map(move |pages| pages * page_bytes),
        4 => 1..=scale.pages_max * page_bytes,
    ];
    (layer, 0..12u16, gap_bytes, len_bytes).prop_map(|(layer, order, gap_bytes, len_bytes)| Piece {
        layer,
        order,
        gap_bytes,
        len_bytes,
    })
}
