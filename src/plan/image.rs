//! The image: how a model's layers lie in the memory of a GPU.
//!
//! In host memory a window mirrors the file. A GPU asks for more than a file gives: every tensor begins at a multiple of
//! [`ALIGN_BYTES`], and behind a quantised tensor whose rows are no multiple of [`ROW_ELEMENTS`] lie zeros, because ggml's
//! kernels read whole rows of that length. So the layers are laid out anew, in one address range that is planned as if it
//! were a file: residency, runs and slots are those of [`super::plan`]. Invariants, property-tested in `image_tests.rs`:
//! every planned byte of the files has one place, no two places share a byte, a tensor that is cut over several layers
//! stays in one piece, every layer begins at a page of its own (but for the rest of a tensor that began before), and
//! tensors of a layer keep the order of the file, so that a run of pages is a run of the file. Pure. Part of plan:
//! file -> catalog -> **plan** -> reader -> pool -> lease -> host.

use std::path::PathBuf;

use super::PageRun;
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Catalog, Layer, Shard, Tensor, Use};
use crate::units::{Extent, align_up};

/// Where a tensor may begin in the memory of a GPU: ggml-cuda's alignment.
pub const ALIGN_BYTES: u64 = 128;
/// Elements that ggml's CUDA kernels read at a time: `MATRIX_ROW_PADDING`.
pub const ROW_ELEMENTS: u64 = 512;

/// Bytes of a file and where they lie in the image, with the zeros behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the image.
    pub offset_bytes: u64,
    /// The bytes in the file; empty for zeros alone.
    pub file: Extent,
    /// Zeros that have to follow.
    pub padding_bytes: u64,
}

impl Piece {
    /// One past its last byte in the image.
    #[must_use]
    pub const fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.file.len_bytes + self.padding_bytes
    }

    /// What of it lies in `[first, end)` of the image.
    #[must_use]
    pub fn within(&self, first: u64, end: u64) -> Option<Self> {
        let from = self.offset_bytes.max(first);
        let until = self.end_bytes().min(end);
        if from >= until {
            return None;
        }
        let data_end = self.offset_bytes + self.file.len_bytes;
        let (data_from, data_until) = (from.min(data_end), until.min(data_end));
        Some(Self {
            offset_bytes: from,
            file: Extent {
                offset_bytes: self.file.offset_bytes + (data_from - self.offset_bytes),
                len_bytes: data_until - data_from,
                ..self.file
            },
            padding_bytes: until - from - (data_until - data_from),
        })
    }
}

/// A model laid out for a GPU.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its length: whole pages.
    pub len_bytes: u64,
    /// The layers at their places in the image, which is the one shard: what is planned.
    pub catalog: Catalog,
    /// Per layer, what lies where, sorted by place.
    pub pieces: Vec<Vec<Piece>>,
    /// Zeros behind tensors, all together.
    pub padding_bytes: u64,
}

impl Image {
    /// Lays a model out in pages of `page_bytes`, a power of two and a multiple of [`ALIGN_BYTES`].
    ///
    /// # Errors
    /// `Invalid` for a page size that is none, and for a model longer than an address space.
    pub fn new(catalog: &Catalog, page_bytes: u64) -> Result<Self> {
        if !page_bytes.is_power_of_two() || page_bytes < ALIGN_BYTES {
            let context = format!("pages of {page_bytes} bytes cannot hold tensors for a GPU");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut builder = Builder {
            catalog,
            at_bytes: 0,
            last: None,
            padding_bytes: 0,
        };
        let mut layers = Vec::with_capacity(catalog.layers.len());
        let mut pieces = Vec::with_capacity(catalog.layers.len());
        for layer in &catalog.layers {
            let placed = builder.layer(layer, page_bytes).ok_or_else(too_long)?;
            pieces.push(placed.iter().map(|(piece, _)| *piece).collect::<Vec<_>>());
            layers.push(image_layer(layer, &placed));
        }
        let len_bytes = align_up(builder.at_bytes, page_bytes).ok_or_else(too_long)?;
        let shard = Shard {
            path: PathBuf::from("the image in VRAM"),
            len_bytes,
        };
        Ok(Self {
            len_bytes,
            padding_bytes: builder.padding_bytes,
            catalog: catalog.of_layers(vec![shard], layers),
            pieces,
        })
    }

    /// What of a layer lies in a run of pages, sorted by place.
    #[must_use]
    pub fn pieces_in(&self, layer: usize, run: &PageRun, page_bytes: u64) -> Vec<Piece> {
        let (first, end) = (run.first_page * page_bytes, run.end_page() * page_bytes);
        let pieces = self.pieces.get(layer).map_or(&[][..], Vec::as_slice);
        pieces
            .iter()
            .filter_map(|piece| piece.within(first, end))
            .collect()
    }
}

/// Where bytes of the files lie in an image.
#[derive(Debug)]
pub struct Places {
    sorted: Vec<Piece>,
}

impl Places {
    /// Those of an image.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let mut sorted: Vec<Piece> = image.pieces.iter().flatten().copied().collect();
        sorted.sort_unstable_by_key(|piece| piece.file);
        Self { sorted }
    }

    /// The place of byte `offset_bytes` of a shard; `None` for bytes that no layer uses.
    #[must_use]
    pub fn of(&self, shard_index: u32, offset_bytes: u64) -> Option<u64> {
        let after = self.sorted.partition_point(|piece| {
            (piece.file.shard_index, piece.file.offset_bytes) <= (shard_index, offset_bytes)
        });
        let piece = self.sorted.get(after.checked_sub(1)?)?;
        let inside = piece.file.shard_index == shard_index && offset_bytes < piece.file.end_bytes();
        inside.then(|| piece.offset_bytes + (offset_bytes - piece.file.offset_bytes))
    }
}

fn too_long() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "the layers are longer than an address space",
    )
}

/// Places layers one behind the other.
struct Builder<'a> {
    catalog: &'a Catalog,
    at_bytes: u64,
    /// The tensor placed last and where its part ended in the file.
    last: Option<(u32, Extent)>,
    padding_bytes: u64,
}

impl Builder<'_> {
    fn layer(&mut self, layer: &Layer, page_bytes: u64) -> Option<Vec<(Piece, Use)>> {
        let mut uses: Vec<&Use> = layer
            .uses
            .iter()
            .filter(|u| u.extent.len_bytes > 0)
            .collect();
        // A cut tensor must stay in one piece: its beginning goes last, so that the next layer can go on with it.
        uses.sort_by_key(|used| (self.turn(used), used.extent));
        let goes_on = uses.first().is_some_and(|used| self.goes_on(used));
        if !goes_on && !uses.is_empty() {
            self.at_bytes = align_up(self.at_bytes, page_bytes)?;
        }
        uses.into_iter()
            .map(|used| Some((self.place(used)?, *used)))
            .collect()
    }

    fn place(&mut self, used: &Use) -> Option<Piece> {
        if !self.goes_on(used) {
            self.at_bytes = align_up(self.at_bytes, ALIGN_BYTES)?;
        }
        let padding_bytes = match self.tensor(used) {
            Some(tensor) if used.extent.end_bytes() == tensor.extent.end_bytes() => {
                padding_bytes(tensor)
            }
            _ => 0,
        };
        let piece = Piece {
            offset_bytes: self.at_bytes,
            file: used.extent,
            padding_bytes,
        };
        self.at_bytes = self
            .at_bytes
            .checked_add(used.extent.len_bytes)?
            .checked_add(padding_bytes)?;
        self.padding_bytes += padding_bytes;
        self.last = Some((used.tensor_index, used.extent));
        Some(piece)
    }

    /// Whether a part begins where the last one ended, in one tensor.
    fn goes_on(&self, used: &Use) -> bool {
        self.last.is_some_and(|(tensor_index, last)| {
            tensor_index == used.tensor_index
                && last.shard_index == used.extent.shard_index
                && last.end_bytes() == used.extent.offset_bytes
                && self.begins_inside(used)
        })
    }

    fn begins_inside(&self, used: &Use) -> bool {
        self.tensor(used)
            .is_some_and(|tensor| used.extent.offset_bytes > tensor.extent.offset_bytes)
    }

    /// The rest of a tensor that began before comes first, whole tensors follow, one that is cut here comes last.
    fn turn(&self, used: &Use) -> u8 {
        let is_cut = self
            .tensor(used)
            .is_some_and(|tensor| used.extent.end_bytes() < tensor.extent.end_bytes());
        match (self.begins_inside(used), is_cut) {
            (true, _) => 0,
            (false, false) => 1,
            (false, true) => 2,
        }
    }

    fn tensor(&self, used: &Use) -> Option<&Tensor> {
        self.catalog.tensors.get(used.tensor_index as usize)
    }
}

/// The zeros that ggml-cuda wants behind a tensor: a quantised one whose rows are no multiple of [`ROW_ELEMENTS`].
#[must_use]
pub fn padding_bytes(tensor: &Tensor) -> u64 {
    let is_quantised = tensor.dtype.ggml_number().is_some() && tensor.dtype.block_elements() > 1;
    let short = tensor.shape[0] % ROW_ELEMENTS;
    if !is_quantised || short == 0 {
        return 0;
    }
    tensor
        .dtype
        .row_bytes(ROW_ELEMENTS - short)
        .unwrap_or_default()
}

fn image_layer(layer: &Layer, placed: &[(Piece, Use)]) -> Layer {
    let uses: Vec<Use> = placed
        .iter()
        .map(|(piece, used)| Use {
            extent: Extent {
                shard_index: 0,
                offset_bytes: piece.offset_bytes,
                len_bytes: piece.end_bytes() - piece.offset_bytes,
            },
            ..*used
        })
        .collect();
    Layer {
        kind: layer.kind,
        label: layer.label.clone(),
        extents: uses.iter().map(|used| used.extent).collect(),
        bytes: uses.iter().map(|used| used.extent.len_bytes).sum(),
        uses,
    }
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
