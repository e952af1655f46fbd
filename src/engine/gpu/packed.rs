//! A compressed model (docs/packed-format.md) as a GPU's weights come from it: coded tiles over the link, unpacked in VRAM.
//!
//! The catalog is that of the original, but for its offsets: they count in a file that nobody wrote, in which the decoded parts
//! lie in the order of the compressed file. So a run of weights is a run of tiles, and what is planned for the one can be
//! read from the other. Invariant: every tensor is a part of its own, with a table and places that were checked. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: beside the catalog, below the two engines of a GPU.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::packed::{self, Coding, Part};
use crate::model::coded::{self, HEAD_BYTES, Places};
use crate::model::tiles::{Decoder, Frequencies, TILE_BYTES};
use crate::model::{Catalog, Layer, Shard, Use, catalog, gguf};
use crate::units::Extent;

/// Where decoded parts begin in the file that nobody wrote: GGUF's own alignment.
const ALIGN_BYTES: u64 = 32;
/// The longest header that is believed: ten times the largest known.
const HEADER_BYTES_MAX: u64 = 1 << 30;

/// A compressed model, open.
#[derive(Debug)]
pub struct PackedModel {
    file: ShardFile,
    /// In the order of the file; where each begins, decoded, ascends.
    parts: Vec<PackedPart>,
    len_bytes: u64,
}

#[derive(Debug)]
struct PackedPart {
    label: String,
    /// In the file that nobody wrote.
    offset_bytes: u64,
    len_bytes: u64,
    /// In the compressed file.
    at_bytes: u64,
    coded_bytes: u64,
    coding: Option<Table>,
}

/// What is needed to take tiles of a tensor out of their order.
#[derive(Debug)]
struct Table {
    frequencies: Frequencies,
    places: Places,
}

/// Weights as they lie in the compressed file.
#[derive(Debug)]
pub(super) struct Stored<'a> {
    /// Whole tiles, or the bytes themselves.
    pub(super) extent: Extent,
    /// How to decode them, where they are coded.
    pub(super) tiles: Option<Tiles<'a>>,
}

/// Tiles that hold some weights.
#[derive(Debug)]
pub(super) struct Tiles<'a> {
    part: &'a PackedPart,
    table: &'a Table,
    range: Range<u64>,
    /// Of the first tile, what comes before the weights.
    pub(super) skip_bytes: u64,
}

impl Tiles<'_> {
    /// Weights in these tiles.
    pub(super) fn elements(&self) -> u64 {
        let begin = self.range.start * TILE_BYTES as u64;
        let end = (self.range.end * TILE_BYTES as u64).min(self.part.len_bytes);
        (end - begin) / 2
    }

    /// What makes them a coded tensor of their own: the head before them, and their places behind them.
    pub(super) fn around(&self) -> ([u8; HEAD_BYTES], Vec<u8>) {
        let mut places = Places::new();
        for tile in self.range.clone() {
            let place = self.table.places.tile(tile);
            places.push((place.end - place.start) as usize);
        }
        let head = coded::head(self.elements(), &self.table.frequencies);
        (head, places.to_bytes())
    }
}

impl PackedModel {
    /// Opens the compressed model at `path`; `None` where there is none, but perhaps a model of another kind.
    ///
    /// # Errors
    /// `Format`, `Truncated`, `Checksum`: what is wrong with it; `Io`.
    pub(super) fn open(path: &Path) -> Result<Option<(Self, Catalog, ShardFile)>> {
        if path.is_dir() {
            return Ok(None);
        }
        let (file, reader) = (ShardFile::open_buffered(path)?, ShardFile::open(path)?);
        if !packed::is_packed(&file)? {
            return Ok(None);
        }
        let mut directory = packed::open(&file)?;
        let header = read_header(&file, directory.parts.first(), directory.bytes)?;
        directory.parts.sort_by_key(|part| part.at_bytes);
        let mut model = Self {
            file,
            parts: Vec::with_capacity(directory.parts.len()),
            len_bytes: 0,
        };
        for part in &directory.parts {
            let packed = model.part(part).map_err(|error| {
                let path = model.file.path().display();
                let context = format!("{path}: {}: {error}; fetch the file again", part.label());
                Error::new(error.kind(), context)
            })?;
            model.len_bytes += part.len_bytes.next_multiple_of(ALIGN_BYTES);
            model.parts.push(packed);
        }
        let catalog = model.catalog(header, &directory.parts)?;
        Ok(Some((model, catalog, reader)))
    }

    /// A part that follows those there are.
    fn part(&self, part: &Part) -> Result<PackedPart> {
        let coding = match part.coding {
            Coding::Stored => None,
            Coding::Tiles => Some(self.table(part)?),
        };
        Ok(PackedPart {
            label: part.label(),
            offset_bytes: self.len_bytes,
            len_bytes: part.len_bytes,
            at_bytes: part.at_bytes,
            coded_bytes: part.coded_bytes,
            coding,
        })
    }

    fn table(&self, part: &Part) -> Result<Table> {
        let elements = part.len_bytes / 2;
        let mut head = [0; HEAD_BYTES];
        self.file.read_exact_at(part.at_bytes, &mut head)?;
        let frequencies = coded::read_head(&head, elements)?;
        let mut places = vec![0; Places::bytes(elements) as usize];
        let places_at = part.coded_bytes - places.len() as u64;
        self.file
            .read_exact_at(part.at_bytes + places_at, &mut places)?;
        let places = Places::from_bytes(&places, elements, part.coded_bytes)?;
        Ok(Table {
            frequencies,
            places,
        })
    }

    /// The original's catalog, with every tensor where its part lies.
    fn catalog(&self, mut header: gguf::ShardHeader, parts: &[Part]) -> Result<Catalog> {
        let wrong = |what: String| {
            let path = self.file.path().display();
            Err(Error::new(ErrorKind::Format, format!("{path}: {what}")))
        };
        if header.split.is_some() {
            return wrong("it was made of one of several files".to_owned());
        }
        let named = parts.iter().zip(&self.parts);
        let by_name: HashMap<&str, (&Part, &PackedPart)> = named
            .filter_map(|both| Some((both.0.tensor.as_deref()?, both)))
            .collect();
        for tensor in header.tensors.iter_mut().filter(|one| one.len_bytes > 0) {
            let found = by_name.get(tensor.name.as_str()).filter(|(part, _)| {
                part.offset_bytes == tensor.offset_bytes && part.len_bytes == tensor.len_bytes
            });
            let Some((_, packed)) = found else {
                return wrong(format!("tensor '{}' is no part of its own", tensor.name));
            };
            tensor.offset_bytes = packed.offset_bytes;
        }
        header.shard.len_bytes = self.len_bytes;
        catalog::from_gguf(vec![header])
    }

    /// Layers of the catalog as they lie in the compressed file.
    ///
    /// # Errors
    /// `Internal` for what is in no part.
    pub(super) fn stored_catalog(&self, catalog: &Catalog) -> Result<Catalog> {
        let layers = catalog.layers.iter().map(|layer| {
            let stored = |used: &Use| {
                Ok(Use {
                    extent: self.stored(&used.extent)?.extent,
                    ..*used
                })
            };
            let mut uses = layer.uses.iter().map(stored).collect::<Result<Vec<_>>>()?;
            uses.sort_unstable_by_key(|used| used.extent);
            let extents = merged(&uses);
            Ok(Layer {
                kind: layer.kind,
                label: layer.label.clone(),
                bytes: extents.iter().map(|extent| extent.len_bytes).sum(),
                extents,
                uses,
            })
        });
        let shard = Shard {
            path: self.file.path().to_path_buf(),
            len_bytes: self.file.len_bytes(),
        };
        Ok(catalog.of_layers(vec![shard], layers.collect::<Result<Vec<_>>>()?))
    }

    fn part_of(&self, extent: &Extent) -> Result<&PackedPart> {
        let after = self
            .parts
            .partition_point(|part| part.offset_bytes <= extent.offset_bytes);
        let part = after.checked_sub(1).map(|index| &self.parts[index]);
        part.filter(|part| extent.end_bytes() <= part.offset_bytes + part.len_bytes)
            .ok_or_else(|| {
                let context = format!("{extent:?} is in no part of a compressed model");
                Error::new(ErrorKind::Internal, context)
            })
    }

    /// Where weights lie in the compressed file.
    ///
    /// # Errors
    /// `Internal` for what is in no part.
    pub(super) fn stored(&self, extent: &Extent) -> Result<Stored<'_>> {
        let part = self.part_of(extent)?;
        let begin = extent.offset_bytes - part.offset_bytes;
        let Some(table) = &part.coding else {
            let extent = Extent {
                offset_bytes: part.at_bytes + begin,
                ..*extent
            };
            return Ok(Stored {
                extent,
                tiles: None,
            });
        };
        let tile = TILE_BYTES as u64;
        let range = begin / tile
            ..(begin + extent.len_bytes)
                .div_ceil(tile)
                .max(begin / tile + 1);
        let first = table.places.tile(range.start).start;
        let end = table.places.tile(range.end - 1).end;
        Ok(Stored {
            extent: Extent {
                offset_bytes: part.at_bytes + first,
                len_bytes: end - first,
                ..*extent
            },
            tiles: Some(Tiles {
                part,
                table,
                skip_bytes: begin - range.start * tile,
                range,
            }),
        })
    }

    /// Weights, read and decoded by the processor: what others are compared with.
    ///
    /// # Errors
    /// `Format`, with tensor, tile and offset, for damage; `Io`.
    pub fn read(&self, extent: &Extent, weights: &mut [u8]) -> Result<()> {
        let stored = self.stored(extent)?;
        let mut bytes = vec![0; stored.extent.len_bytes as usize];
        self.file
            .read_exact_at(stored.extent.offset_bytes, &mut bytes)?;
        let Some(tiles) = &stored.tiles else {
            weights.copy_from_slice(&bytes);
            return Ok(());
        };
        let decoder = Decoder::new(&tiles.table.frequencies);
        let mut decoded = vec![0; 2 * tiles.elements() as usize];
        let outs = decoded.chunks_mut(TILE_BYTES);
        let first = tiles.table.places.tile(tiles.range.start).start;
        for (tile, out) in tiles.range.clone().zip(outs) {
            let place = tiles.table.places.tile(tile);
            let coded = &bytes[(place.start - first) as usize..(place.end - first) as usize];
            decoder.decode(coded, out).map_err(|damage| {
                self.named(tiles.part, &coded::damaged(tile, place.start, damage))
            })?;
        }
        let skip = tiles.skip_bytes as usize;
        weights.copy_from_slice(&decoded[skip..skip + weights.len()]);
        Ok(())
    }

    fn named(&self, part: &PackedPart, error: &Error) -> Error {
        Error::new(
            error.kind(),
            format!(
                "{}: {} ({} bytes at offset {}): {error}; fetch the file again",
                self.file.path().display(),
                part.label,
                part.coded_bytes,
                part.at_bytes
            ),
        )
    }
}

/// The header of the original, which is its first part.
fn read_header(
    file: &ShardFile,
    first: Option<&Part>,
    len_bytes: u64,
) -> Result<gguf::ShardHeader> {
    let path = file.path();
    let header = first.filter(|part| {
        part.coding == Coding::Stored && part.tensor.is_none() && part.len_bytes <= HEADER_BYTES_MAX
    });
    let Some(header) = header else {
        let context = format!("{}: its first part is not a header", path.display());
        return Err(Error::new(ErrorKind::Format, context));
    };
    let mut bytes = vec![0; header.len_bytes as usize];
    file.read_exact_at(header.at_bytes, &mut bytes)?;
    if ::crc32c::crc32c(&bytes) != header.crc32c {
        let context = format!(
            "{}: the header of the model is damaged (CRC32C); fetch the file again",
            path.display()
        );
        return Err(Error::new(ErrorKind::Checksum, context));
    }
    gguf::parse_shard(path, len_bytes, &mut Cursor::new(bytes))
}

/// Sorted uses as disjoint extents: neighbours share the tile in which one ends and the other begins.
fn merged(uses: &[Use]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(uses.len());
    for used in uses {
        match extents.last_mut() {
            Some(last) if used.extent.offset_bytes <= last.end_bytes() => {
                let end = last.end_bytes().max(used.extent.end_bytes());
                last.len_bytes = end - last.offset_bytes;
            }
            _ => extents.push(used.extent),
        }
    }
    extents
}
