//! From tensors to layers: fills a [`Catalog`] from the checked headers of all shards.
//!
//! Invariants: every byte a layer uses is in exactly one layer, and extents of different layers never overlap, because they
//! are merged in one walk over all uses in the order of the files.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::catalog::{
    Catalog, EXTENT_GAP_BYTES, Experts, Layer, LayerKind, LayerSpan, Tensor, TypeShare, Use,
};
use super::head::rows_per_piece;
use super::roles::{Meaning, Naming, Place, Role, classify};
use super::{DType, Shard, TENSOR_COUNT_MAX, TensorInfo, bad_format};
use crate::error::Result;
use crate::units::Extent;
use std::collections::BTreeMap;

/// Fills a catalog from the tensors of all shards.
pub(crate) struct Builder {
    catalog: Catalog,
    /// Parallel to the catalog's tensors.
    meanings: Vec<Meaning>,
    /// What the metadata say about tied embeddings.
    tied: Option<bool>,
    /// How many blocks at the end only draft.
    drafting: u64,
}

impl Builder {
    /// Joins the tensors of all shards; each name once.
    pub(crate) fn new(
        mut catalog: Catalog,
        naming: Naming,
        tied: Option<bool>,
        drafting: u64,
        parts: Vec<(Shard, Vec<TensorInfo>)>,
    ) -> Result<Self> {
        let mut meanings = Vec::new();
        for (shard_index, (shard, infos)) in parts.into_iter().enumerate() {
            for info in infos {
                let meaning = classify(naming, &info.name);
                let index = catalog.tensors.len() as u32;
                if let Some(other) = catalog.by_name.insert(info.name.clone(), index) {
                    let other = catalog.tensors[other as usize].extent.shard_index as usize;
                    let what = format!(
                        "tensor '{}' is in {} already",
                        info.name,
                        catalog.shards[other].path.display()
                    );
                    return Err(bad_format(&shard.path, what));
                }
                catalog
                    .tensors
                    .push(tensor(shard_index as u32, info, meaning));
                meanings.push(meaning);
            }
            catalog.shards.push(shard);
        }
        let path = &catalog.shards[0].path;
        let count = catalog.tensors.len() as u64;
        if count == 0 {
            return Err(bad_format(
                path,
                "holds no tensors (a vocabulary or template, not a model)",
            ));
        }
        if count > TENSOR_COUNT_MAX {
            return Err(bad_format(
                path,
                format_args!("{count} tensors; at most {TENSOR_COUNT_MAX} are possible"),
            ));
        }
        Ok(Self {
            catalog,
            meanings,
            tied,
            drafting,
        })
    }

    /// Sorts the tensors into layers.
    pub(crate) fn build(mut self) -> Result<Catalog> {
        self.settle_output_norm();
        let mut owners = Vec::new();
        self.add_blocks(&mut owners);
        self.add_head(&mut owners);
        self.merge_extents(owners);
        self.sum_up()?;
        Ok(self.catalog)
    }

    /// lfm2 files call the norm before the head `token_embd_norm`.
    fn settle_output_norm(&mut self) {
        if !self.catalog.architecture.starts_with("lfm2") {
            return;
        }
        if let Some((index, _)) = self.catalog.tensor("token_embd_norm.weight") {
            self.catalog.tensors[index].role = Role::OutputNorm;
            self.meanings[index] = Meaning {
                place: Place::Head,
                role: Role::OutputNorm,
                order: 0,
                expert_index: None,
            };
        }
    }

    fn add_blocks(&mut self, owners: &mut Vec<(u32, Use)>) {
        let drafting_from = match (self.catalog.block_count, self.drafting) {
            (Some(blocks), drafting) if drafting > 0 && drafting < blocks => blocks - drafting,
            _ => u64::MAX,
        };
        let mut blocks: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (index, meaning) in self.meanings.iter().enumerate() {
            let used = self.catalog.tensors[index].extent.len_bytes > 0;
            match meaning.place {
                Place::Block(number) if u64::from(number) < drafting_from && used => {
                    blocks.entry(number).or_default().push(index);
                }
                Place::Block(number) if u64::from(number) >= drafting_from => {
                    self.catalog.tensors[index].role = Role::NextToken;
                }
                _ => {}
            }
        }
        for (number, indices) in blocks {
            let layer_index = self.catalog.layers.len() as u32;
            let uses: Vec<Use> = indices.iter().map(|&index| self.whole(index)).collect();
            for &index in &indices {
                self.catalog.tensors[index].layers = Some(LayerSpan {
                    first: layer_index,
                    last: layer_index,
                    rows_per_layer: 0,
                });
            }
            self.push_layer(
                LayerKind::Block(number),
                format!("blk.{number}"),
                uses,
                owners,
            );
        }
    }

    /// The matrix of the head: `output`, or the token embedding where there is none and the model has an output norm (an
    /// encoder has neither).
    fn head_matrix(&self) -> Option<usize> {
        let is_matrix = |tensor: &Tensor| tensor.dims >= 2 && tensor.extent.len_bytes > 0;
        let with_role = |role: Role| {
            self.catalog
                .tensors
                .iter()
                .position(|tensor| tensor.role == role && is_matrix(tensor))
        };
        let has_norm = self
            .catalog
            .tensors
            .iter()
            .any(|tensor| tensor.role == Role::OutputNorm);
        with_role(Role::Output).or_else(|| {
            (has_norm && self.tied != Some(false))
                .then(|| with_role(Role::TokenEmbedding))
                .flatten()
        })
    }

    fn add_head(&mut self, owners: &mut Vec<(u32, Use)>) {
        let matrix = self.head_matrix();
        let rest: Vec<usize> = (0..self.meanings.len())
            .filter(|&index| self.meanings[index].place == Place::Head && Some(index) != matrix)
            .filter(|&index| self.catalog.tensors[index].extent.len_bytes > 0)
            .collect();
        if matrix.is_none() && rest.is_empty() {
            return;
        }
        self.catalog.tied_embeddings =
            matrix.is_some_and(|index| self.catalog.tensors[index].role == Role::TokenEmbedding);
        let first_layer = self.catalog.layers.len() as u32;
        let pieces = matrix.map_or_else(
            || vec![(0, 0, None)],
            |index| self.head_pieces(index, &rest),
        );
        for (place, &(first_row, row_count, piece)) in pieces.iter().enumerate() {
            let mut uses: Vec<Use> = piece.into_iter().collect();
            if place == 0 {
                uses.extend(rest.iter().map(|&index| self.whole(index)));
            }
            let label = match (matrix, pieces.len()) {
                (None, _) => "output_norm".to_owned(),
                (_, 1) => "output".to_owned(),
                _ => format!("output[{first_row}..{}]", first_row + row_count),
            };
            let kind = LayerKind::Head {
                first_row,
                row_count,
            };
            self.push_layer(kind, label, uses, owners);
        }
        for &index in &rest {
            self.catalog.tensors[index].layers = Some(LayerSpan {
                first: first_layer,
                last: first_layer,
                rows_per_layer: 0,
            });
        }
        if let Some(index) = matrix {
            self.catalog.tensors[index].layers = Some(LayerSpan {
                first: first_layer,
                last: first_layer + pieces.len() as u32 - 1,
                rows_per_layer: if pieces.len() > 1 { pieces[0].1 } else { 0 },
            });
        }
    }

    /// The pieces of the head's matrix: first row, rows, bytes.
    fn head_pieces(&self, matrix: usize, rest: &[usize]) -> Vec<(u64, u64, Option<Use>)> {
        let tensor = &self.catalog.tensors[matrix];
        let rows = tensor.row_count();
        let whole = Use {
            order: 10,
            ..self.whole(matrix)
        };
        let extra_bytes: u64 = rest
            .iter()
            .map(|&index| self.catalog.tensors[index].extent.len_bytes)
            .sum();
        let largest = self.catalog.layers.iter().map(|layer| layer.bytes).max();
        let cut = tensor
            .row_bytes()
            .filter(|bytes| tensor.dims == 2 && bytes * rows == tensor.extent.len_bytes)
            .and_then(|bytes| {
                rows_per_piece(rows, bytes, extra_bytes, largest.unwrap_or(0))
                    .map(|per_piece| (bytes, per_piece))
            });
        let Some((row_bytes, per_piece)) = cut else {
            return vec![(0, rows, Some(whole))];
        };
        (0..rows.div_ceil(per_piece))
            .map(|place| {
                let first_row = place * per_piece;
                let row_count = per_piece.min(rows - first_row);
                let extent = Extent {
                    offset_bytes: tensor.extent.offset_bytes + first_row * row_bytes,
                    len_bytes: row_count * row_bytes,
                    ..tensor.extent
                };
                (first_row, row_count, Some(Use { extent, ..whole }))
            })
            .collect()
    }

    fn whole(&self, index: usize) -> Use {
        Use {
            extent: self.catalog.tensors[index].extent,
            tensor_index: index as u32,
            order: self.meanings[index].order,
        }
    }

    fn push_layer(
        &mut self,
        kind: LayerKind,
        label: String,
        mut uses: Vec<Use>,
        owners: &mut Vec<(u32, Use)>,
    ) {
        uses.sort_unstable_by_key(|used| used.extent);
        let index = self.catalog.layers.len() as u32;
        owners.extend(uses.iter().map(|&used| (index, used)));
        self.catalog.layers.push(Layer {
            kind,
            label,
            extents: Vec::new(),
            bytes: uses.iter().map(|used| used.extent.len_bytes).sum(),
            uses,
        });
    }

    /// Walks all uses in the order of the files: neighbours of one layer become one extent. What lies between two of them is
    /// padding or the host's, never another layer's.
    fn merge_extents(&mut self, mut owners: Vec<(u32, Use)>) {
        owners.sort_unstable_by_key(|(_, used)| used.extent);
        let mut previous = None;
        for (layer_index, used) in owners {
            let extents = &mut self.catalog.layers[layer_index as usize].extents;
            match extents.last_mut() {
                Some(last)
                    if previous == Some(layer_index)
                        && last.shard_index == used.extent.shard_index
                        && used.extent.offset_bytes - last.end_bytes() < EXTENT_GAP_BYTES =>
                {
                    last.len_bytes = used.extent.end_bytes() - last.offset_bytes;
                }
                _ => extents.push(used.extent),
            }
            previous = Some(layer_index);
        }
    }

    fn sum_up(&mut self) -> Result<()> {
        let catalog = &mut self.catalog;
        let mut types: BTreeMap<DType, TypeShare> = BTreeMap::new();
        for (tensor, meaning) in catalog.tensors.iter_mut().zip(&self.meanings) {
            tensor.host_kept = meaning.place == Place::Host;
            let bytes = tensor.extent.len_bytes;
            // Lengths are disjoint parts of files, so bytes cannot overflow; elements of ternary types are four per byte.
            catalog.model_bytes += bytes;
            catalog.parameter_count = catalog
                .parameter_count
                .saturating_add(tensor.element_count());
            match (tensor.host_kept, tensor.layers) {
                (true, _) => catalog.host_tensor_bytes += bytes,
                (false, None) => catalog.unused_tensor_bytes += bytes,
                _ => {}
            }
            let share = types.entry(tensor.dtype).or_insert(TypeShare {
                dtype: tensor.dtype,
                tensor_count: 0,
                element_count: 0,
                bytes: 0,
            });
            share.tensor_count += 1;
            share.element_count = share.element_count.saturating_add(tensor.element_count());
            share.bytes += bytes;
        }
        catalog.types = types.into_values().collect();
        catalog
            .types
            .sort_by_key(|share| (std::cmp::Reverse(share.bytes), share.dtype));
        if catalog.layers.is_empty() && catalog.model_bytes == 0 {
            return Err(bad_format(
                &catalog.shards[0].path,
                "every tensor is empty; this is no model",
            ));
        }
        Ok(())
    }
}

fn tensor(shard_index: u32, info: TensorInfo, meaning: Meaning) -> Tensor {
    Tensor {
        experts: experts(&info, meaning),
        extent: Extent {
            shard_index,
            offset_bytes: info.offset_bytes,
            len_bytes: info.len_bytes,
        },
        name: info.name,
        dtype: info.dtype,
        shape: info.shape,
        dims: info.dims,
        role: meaning.role,
        host_kept: false,
        layers: None,
    }
}

/// One expert of its own, or a stack of them along the third dimension.
fn experts(info: &TensorInfo, meaning: Meaning) -> Option<Experts> {
    if !meaning.role.is_routed_expert() {
        return None;
    }
    if let Some(first) = meaning.expert_index {
        return Some(Experts { first, count: 1 });
    }
    let count = u32::try_from(info.shape[2]).ok()?;
    (info.dims == 3 && count > 0 && info.len_bytes.is_multiple_of(u64::from(count)))
        .then_some(Experts { first: 0, count })
}
