//! A compressed model (docs/packed-format.md) as a file of weights: where they lie coded, and read and decoded by the processor.
//!
//! Offsets count either in the original, which is then there as if it had been decompressed, or in a file that nobody
//! wrote, in which the decoded parts lie in the order of the compressed file: there a run of weights is a run of tiles, which
//! is what a GPU wants that unpacks them itself. Invariant: every coded part has a table and places that were checked. Place:
//! `file` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;

use super::packed::{self, Coding, Directory, Part};
use super::{AlignedMemory, ShardFile};
use crate::error::{Error, ErrorKind, Result};
use crate::model::coded::{self, HEAD_BYTES, Places};
use crate::model::tiles::{Decoder, Frequencies, TILE_BYTES};
use crate::units::{Extent, MIB, PAGE_2M, PAGE_4K};

/// Where decoded parts begin in the file that nobody wrote: GGUF's own alignment.
const ALIGN_BYTES: u64 = 32;
/// The longest header that is believed: ten times the largest known.
const HEADER_BYTES_MAX: u64 = 1 << 30;

/// In what offsets count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offsets {
    /// In the original.
    Original,
    /// In the decoded parts, in the order of the compressed file.
    Stored,
}

/// A compressed model, open.
#[derive(Debug)]
pub struct CodedFile {
    file: ShardFile,
    /// Sorted by where they begin, decoded.
    parts: Vec<CodedPart>,
    len_bytes: u64,
}

/// A part of it.
#[derive(Debug)]
pub struct CodedPart {
    /// What the directory says of it.
    pub part: Part,
    /// Where it begins, in the offsets of the file.
    pub offset_bytes: u64,
    table: Option<Table>,
}

/// What is needed to take tiles of a tensor out of their order.
#[derive(Debug)]
struct Table {
    frequencies: Frequencies,
    places: Places,
}

/// Weights as they lie in the compressed file.
#[derive(Debug)]
pub struct Stored<'a> {
    /// Whole tiles, or the bytes themselves.
    pub extent: Extent,
    /// How to decode them, where they are coded.
    pub tiles: Option<Tiles<'a>>,
}

/// Tiles that hold some weights.
#[derive(Debug)]
pub struct Tiles<'a> {
    part: &'a CodedPart,
    table: &'a Table,
    range: Range<u64>,
    /// Of the first tile, what comes before the weights.
    pub skip_bytes: u64,
}

impl Tiles<'_> {
    /// Weights in these tiles.
    #[must_use]
    pub fn elements(&self) -> u64 {
        let begin = self.range.start * TILE_BYTES as u64;
        let end = (self.range.end * TILE_BYTES as u64).min(self.part.part.len_bytes);
        (end - begin) / 2
    }

    /// What makes them a coded tensor of their own: the head before them, and their places behind them.
    #[must_use]
    pub fn around(&self) -> ([u8; HEAD_BYTES], Vec<u8>) {
        let mut places = Places::new();
        for tile in self.range.clone() {
            let place = self.table.places.tile(tile);
            places.push((place.end - place.start) as usize);
        }
        let head = coded::head(self.elements(), &self.table.frequencies);
        (head, places.to_bytes())
    }
}

/// Memory that a thread reads into before it decodes.
#[derive(Debug)]
struct Scratch {
    stored: AlignedMemory,
    stored_bytes: usize,
    tile: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

impl CodedFile {
    /// Opens a compressed model, of which `file` is open.
    ///
    /// # Errors
    /// `Format`, `Truncated`, `Checksum`: what is wrong with it; `Io`.
    pub fn open(file: ShardFile, offsets: Offsets) -> Result<Self> {
        let Directory { bytes, parts, .. } = packed::open(&file)?;
        let mut coded = Self {
            file,
            parts: Vec::with_capacity(parts.len()),
            len_bytes: 0,
        };
        let mut parts = parts;
        if offsets == Offsets::Stored {
            parts.sort_by_key(|part| part.at_bytes);
        }
        for part in parts {
            let offset_bytes = match offsets {
                Offsets::Original => part.offset_bytes,
                Offsets::Stored => coded.len_bytes,
            };
            let table = coded
                .table(&part)
                .map_err(|error| coded.named(&part, &error))?;
            coded.len_bytes = offset_bytes + part.len_bytes.next_multiple_of(ALIGN_BYTES);
            coded.parts.push(CodedPart {
                part,
                offset_bytes,
                table,
            });
        }
        if offsets == Offsets::Original {
            coded.len_bytes = bytes;
        }
        Ok(coded)
    }

    fn table(&self, part: &Part) -> Result<Option<Table>> {
        if part.coding == Coding::Stored {
            return Ok(None);
        }
        let elements = part.len_bytes / 2;
        let mut head = [0; HEAD_BYTES];
        self.file.read_exact_at(part.at_bytes, &mut head)?;
        let frequencies = coded::read_head(&head, elements)?;
        let mut places = vec![0; Places::bytes(elements) as usize];
        let places_at = part.coded_bytes - places.len() as u64;
        self.file
            .read_exact_at(part.at_bytes + places_at, &mut places)?;
        let places = Places::from_bytes(&places, elements, part.coded_bytes)?;
        Ok(Some(Table {
            frequencies,
            places,
        }))
    }

    fn named(&self, part: &Part, error: &Error) -> Error {
        Error::new(
            error.kind(),
            format!(
                "{}: {} ({} bytes at offset {}): {error}; fetch the file again",
                self.path().display(),
                part.label(),
                part.coded_bytes,
                part.at_bytes
            ),
        )
    }

    /// That another opening of the same path found the same file, and that it is still what its tables were read from.
    ///
    /// # Errors
    /// `Changed`, `Truncated`.
    pub(super) fn check_same(&self, other: &ShardFile) -> Result<()> {
        if other.identity() != self.file.identity() {
            let path = other.path().display();
            let context =
                format!("{path}: was replaced or written to while it was opened; open it again");
            return Err(Error::new(ErrorKind::Changed, context));
        }
        self.file.check_unchanged()
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Length of the compressed file.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    /// Its length, decoded.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What it is made of.
    #[must_use]
    pub fn parts(&self) -> &[CodedPart] {
        &self.parts
    }

    /// The bytes of its first part, which is the header of the original.
    ///
    /// # Errors
    /// `Format` where it is something else; `Checksum`; `Io`.
    pub fn header(&self) -> Result<Vec<u8>> {
        let is_header = |part: &&CodedPart| {
            let part = &part.part;
            part.offset_bytes == 0
                && part.coding == Coding::Stored
                && part.tensor.is_none()
                && part.len_bytes <= HEADER_BYTES_MAX
        };
        let path = self.path().display();
        let Some(header) = self.parts.iter().find(is_header) else {
            let context = format!("{path}: its first part is not a header");
            return Err(Error::new(ErrorKind::Format, context));
        };
        let mut bytes = vec![0; header.part.len_bytes as usize];
        self.file.read_exact_at(header.part.at_bytes, &mut bytes)?;
        if ::crc32c::crc32c(&bytes) != header.part.crc32c {
            let context = format!(
                "{path}: the header of the model is damaged (CRC32C); fetch the file again"
            );
            return Err(Error::new(ErrorKind::Checksum, context));
        }
        Ok(bytes)
    }

    fn part_at(&self, offset_bytes: u64) -> Option<(usize, &CodedPart)> {
        let after = self
            .parts
            .partition_point(|part| part.offset_bytes <= offset_bytes);
        let index = after.checked_sub(1)?;
        Some((index, &self.parts[index]))
    }

    /// Where a byte of a part is in the original.
    #[must_use]
    pub fn original(&self, offset_bytes: u64) -> Option<u64> {
        let (_, part) = self.part_at(offset_bytes)?;
        Some(part.part.offset_bytes + (offset_bytes - part.offset_bytes))
    }

    /// Where weights lie in the compressed file.
    ///
    /// # Errors
    /// `Internal` for what is not in one part.
    pub fn stored(&self, extent: &Extent) -> Result<Stored<'_>> {
        let part = self.part_at(extent.offset_bytes).map(|(_, part)| part);
        let inside =
            |part: &&CodedPart| extent.end_bytes() <= part.offset_bytes + part.part.len_bytes;
        let part = part.filter(inside).ok_or_else(|| {
            let context = format!("{extent:?} is in no part of a compressed model");
            Error::new(ErrorKind::Internal, context)
        })?;
        let begin = extent.offset_bytes - part.offset_bytes;
        let Some(table) = &part.table else {
            let extent = Extent {
                offset_bytes: part.part.at_bytes + begin,
                ..*extent
            };
            return Ok(Stored {
                extent,
                tiles: None,
            });
        };
        let tile = TILE_BYTES as u64;
        let end = (begin + extent.len_bytes)
            .div_ceil(tile)
            .max(begin / tile + 1);
        let range = begin / tile..end;
        let first = table.places.tile(range.start).start;
        let end = table.places.tile(range.end - 1).end;
        Ok(Stored {
            extent: Extent {
                offset_bytes: part.part.at_bytes + first,
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

    /// Bytes of the compressed file that are read for a run of the decoded one: whole tiles, and none for the zeros between
    /// parts.
    ///
    /// # Errors
    /// As [`CodedFile::stored`].
    pub fn stored_len_bytes(&self, run: &Extent) -> Result<u64> {
        let first = self.part_at(run.offset_bytes).map_or(0, |(index, _)| index);
        let parts = self.parts[first..].iter();
        let lens = parts
            .take_while(|part| part.offset_bytes < run.end_bytes())
            .map(|part| {
                let begin = run.offset_bytes.max(part.offset_bytes);
                let end = run.end_bytes().min(part.offset_bytes + part.part.len_bytes);
                if begin >= end {
                    return Ok(0);
                }
                let inside = Extent {
                    offset_bytes: begin,
                    len_bytes: end - begin,
                    ..*run
                };
                Ok(self.stored(&inside)?.extent.len_bytes)
            });
        lens.sum()
    }

    /// Weights that lie in one part, read and decoded.
    ///
    /// # Errors
    /// `Format`, with tensor, tile and offset, for damage; `Internal` for what is in no part; `Io`.
    pub fn read(&self, offset_bytes: u64, weights: &mut [u8]) -> Result<()> {
        let stored = self.stored(&Extent {
            shard_index: 0,
            offset_bytes,
            len_bytes: weights.len() as u64,
        })?;
        SCRATCH.with_borrow_mut(|scratch| {
            let scratch = Scratch::of(scratch, stored.extent.len_bytes)?;
            let bytes = read_stored(&self.file, &stored.extent, &mut scratch.stored)?;
            match &stored.tiles {
                None => weights.copy_from_slice(bytes),
                Some(tiles) => decode(tiles, bytes, &mut scratch.tile, weights)
                    .map_err(|error| self.named(&tiles.part.part, &error))?,
            }
            Ok(())
        })
    }

    /// Fills memory from an offset on, up to the end, over parts and the zeros between them. Gives how many bytes there were.
    ///
    /// # Errors
    /// As [`CodedFile::read`].
    pub fn fill(&self, offset_bytes: u64, bytes: &mut [u8]) -> Result<usize> {
        let len = self
            .len_bytes
            .saturating_sub(offset_bytes)
            .min(bytes.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let at = offset_bytes + done as u64;
            let (index, inside_until) = match self.part_at(at) {
                Some((index, part)) => (index + 1, part.offset_bytes + part.part.len_bytes),
                None => (0, 0),
            };
            let zeros_until = self
                .parts
                .get(index)
                .map_or(self.len_bytes, |next| next.offset_bytes);
            let until = if at < inside_until {
                inside_until
            } else {
                zeros_until
            };
            let step = (until - at).min((len - done) as u64).min(STEP_BYTES) as usize;
            let part = &mut bytes[done..done + step];
            if at < inside_until {
                self.read(at, part)?;
            } else {
                part.fill(0);
            }
            done += step;
        }
        Ok(len)
    }
}

/// Read and decoded at a time.
const STEP_BYTES: u64 = 4 * MIB;

impl Scratch {
    /// This thread's, with room for so many bytes anywhere in a page.
    fn of(scratch: &mut Option<Self>, stored_bytes: u64) -> Result<&mut Self> {
        let wanted = stored_bytes + 2 * PAGE_4K;
        let fits = scratch
            .as_ref()
            .is_some_and(|scratch| scratch.stored_bytes as u64 >= wanted);
        if !fits {
            let len = wanted.next_multiple_of(PAGE_2M);
            *scratch = Some(Self {
                stored: AlignedMemory::new(len, PAGE_2M)?,
                stored_bytes: len as usize,
                tile: vec![0; TILE_BYTES],
            });
        }
        scratch
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "no memory to decode in"))
    }
}

/// Reads an extent by whole pages, past the page cache where that is possible.
fn read_stored<'a>(
    file: &ShardFile,
    extent: &Extent,
    memory: &'a mut AlignedMemory,
) -> Result<&'a [u8]> {
    let begin = extent.offset_bytes / PAGE_4K * PAGE_4K;
    let skip = (extent.offset_bytes - begin) as usize;
    let wanted = skip + extent.len_bytes as usize;
    let whole = wanted.next_multiple_of(PAGE_4K as usize);
    let mut done = 0;
    while done < wanted {
        let pages = &mut memory.bytes_mut()[done..whole];
        let got = file.read_aligned_at(begin + done as u64, pages)?;
        done += got;
        // Only the end of the file ends anywhere but at a page.
        if done < wanted && (got == 0 || !done.is_multiple_of(PAGE_4K as usize)) {
            return Err(file.ended_at(begin + done as u64, extent.offset_bytes, extent.len_bytes));
        }
    }
    Ok(&memory.bytes_mut()[skip..wanted])
}

/// Decodes tiles into weights; `tile` is room for one of which only a part is wanted.
fn decode(tiles: &Tiles<'_>, bytes: &[u8], tile: &mut [u8], weights: &mut [u8]) -> Result<()> {
    let decoder = Decoder::new(&tiles.table.frequencies);
    let first = tiles.table.places.tile(tiles.range.start).start;
    let (mut done, mut skip) = (0, tiles.skip_bytes as usize);
    for index in tiles.range.clone() {
        let place = tiles.table.places.tile(index);
        let coded = &bytes[(place.start - first) as usize..(place.end - first) as usize];
        let whole = 2 * coded::elements_of(index, tiles.part.part.len_bytes / 2);
        let damaged = |damage| coded::damaged(index, place.start, damage);
        let len = (whole - skip).min(weights.len() - done);
        let out = &mut weights[done..done + len];
        if len == whole {
            decoder.decode(coded, out).map_err(damaged)?;
        } else {
            let tile = &mut tile[..whole];
            decoder.decode(coded, tile).map_err(damaged)?;
            out.copy_from_slice(&tile[skip..skip + len]);
        }
        done += len;
        skip = 0;
    }
    Ok(())
}
