//! A tensor in tiles: the head with the table, the tiles, and where each of them begins.
//!
//! Layout, little-endian: `FLT1`, weights per tile u32, weights u64, 16 zeros, 256 frequencies u16; the tiles one behind
//! the other, each a multiple of 16 bytes; for each tile, and for the end of the last one, its place u32 in units of
//! 16 bytes from its beginning. The places stand at the end because they are known last; a GPU has all of it before it
//! starts. Invariant: [`Places`] are ascending, inside the coded tensor, and no tile is longer than one can be.
//! Place: between `reader` and `pool` of `file -> catalog -> plan -> reader -> pool -> lease -> host`; pure.

use std::ops::Range;

use super::tiles::{
    ALIGN_BYTES, Damage, Decoder, Encoder, FREQUENCIES_BYTES, Frequencies, TILE_BYTES,
    TILE_ELEMENTS, raw_bytes, tile_count,
};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"FLT1";
const FREQUENCIES_AT: usize = 32;
/// Bytes before the first tile.
pub const HEAD_BYTES: usize = FREQUENCIES_AT + FREQUENCIES_BYTES;
/// Weights of one coded tensor: 2^32 places of 16 bytes hold more than these, even where no tile gets shorter.
pub const ELEMENTS_MAX: u64 = 1 << 34;

const _: () = assert!(HEAD_BYTES.is_multiple_of(ALIGN_BYTES));

/// The head of a coded tensor.
#[must_use]
pub fn head(elements: u64, frequencies: &Frequencies) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&(TILE_ELEMENTS as u32).to_le_bytes());
    head[8..16].copy_from_slice(&elements.to_le_bytes());
    head[FREQUENCIES_AT..].copy_from_slice(&frequencies.to_bytes());
    head
}

/// The table of a coded tensor of `elements` weights.
///
/// # Errors
/// `Format`: the head is not that of such a tensor.
pub fn read_head(head: &[u8; HEAD_BYTES], elements: u64) -> Result<Frequencies> {
    let wrong = |what: &str| Error::new(ErrorKind::Format, format!("its coded form {what}"));
    if head[..4] != MAGIC {
        return Err(wrong("does not begin with FLT1"));
    }
    if head[4..8] != (TILE_ELEMENTS as u32).to_le_bytes() {
        return Err(wrong("has tiles of another length than 8192 weights"));
    }
    if head[8..16] != elements.to_le_bytes() || elements > ELEMENTS_MAX || elements == 0 {
        return Err(wrong(
            "is of another number of weights than the directory says",
        ));
    }
    let mut frequencies = [0; FREQUENCIES_BYTES];
    frequencies.copy_from_slice(&head[FREQUENCIES_AT..]);
    Frequencies::from_bytes(&frequencies)
        .filter(|_| head[16..FREQUENCIES_AT] == [0; 16])
        .ok_or_else(|| wrong("has a table of frequencies that do not add up to 4096"))
}

/// Where each tile lies in its coded tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// In bytes from the coded tensor's beginning; the last is the end of the last tile.
    offsets: Vec<u64>,
}

impl Places {
    /// Bytes at the end that hold the places of the tiles of `elements` weights.
    #[must_use]
    pub const fn bytes(elements: u64) -> u64 {
        4 * (tile_count(elements) + 1)
    }

    /// No tile yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            offsets: vec![HEAD_BYTES as u64],
        }
    }

    /// The next tile has so many bytes.
    pub fn push(&mut self, tile_bytes: usize) {
        let end = self.offsets.last().copied().unwrap_or(HEAD_BYTES as u64);
        self.offsets.push(end + tile_bytes as u64);
    }

    /// As they stand at the end.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let unit = |offset: &u64| ((offset / ALIGN_BYTES as u64) as u32).to_le_bytes();
        self.offsets.iter().flat_map(unit).collect()
    }

    /// What stands at the end of a coded tensor of `elements` weights and `coded_bytes` bytes.
    ///
    /// # Errors
    /// `Format`: a place where no tile can begin or end, with its number and its offset.
    pub fn from_bytes(bytes: &[u8], elements: u64, coded_bytes: u64) -> Result<Self> {
        let tiles_end = coded_bytes.checked_sub(Self::bytes(elements));
        let offsets: Vec<u64> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|place| u64::from(u32::from_le_bytes(*place)) * ALIGN_BYTES as u64)
            .collect();
        if offsets.len() as u64 != tile_count(elements) + 1 {
            let context = "its coded form is too short for the places of its tiles";
            return Err(Error::new(ErrorKind::Format, context));
        }
        let wrong = |tile: usize| {
            Error::new(
                ErrorKind::Format,
                format!(
                    "the place of its tile {tile} (at offset {} of its coded form) is impossible",
                    tiles_end.unwrap_or(0) + 4 * tile as u64
                ),
            )
        };
        if offsets[0] != HEAD_BYTES as u64 {
            return Err(wrong(0));
        }
        for (tile, pair) in offsets.windows(2).enumerate() {
            let longest = raw_bytes(elements_of(tile as u64, elements)) as u64;
            let len = pair[1].checked_sub(pair[0]);
            if len.is_none_or(|len| len == 0 || len > longest) {
                return Err(wrong(tile + 1));
            }
        }
        if offsets.last().copied() != tiles_end {
            return Err(wrong(offsets.len() - 1));
        }
        Ok(Self { offsets })
    }

    /// Where a tile lies, in bytes.
    #[must_use]
    pub fn tile(&self, tile_index: u64) -> Range<u64> {
        let index = tile_index as usize;
        self.offsets[index]..self.offsets[index + 1]
    }

    /// How many tiles there are.
    #[must_use]
    pub fn tile_count(&self) -> u64 {
        self.offsets.len() as u64 - 1
    }
}

impl Default for Places {
    fn default() -> Self {
        Self::new()
    }
}

/// Weights of a tile of a tensor of `elements` weights.
#[must_use]
pub fn elements_of(tile_index: u64, elements: u64) -> usize {
    let begin = tile_index * TILE_ELEMENTS as u64;
    elements.saturating_sub(begin).min(TILE_ELEMENTS as u64) as usize
}

/// What a tile is told to be that cannot be decoded; `at_bytes` is its offset in its coded tensor.
#[must_use]
pub fn damaged(tile_index: u64, at_bytes: u64, damage: Damage) -> Error {
    let context =
        format!("tile {tile_index} at offset {at_bytes} of its coded form is damaged: {damage}");
    Error::new(ErrorKind::Format, context)
}

/// The coded form of weights that are all in memory; `None` for no weights, or more than can be coded.
#[must_use]
pub fn encode(weights: &[u8]) -> Option<Vec<u8>> {
    let weights = &weights[..weights.len() & !1];
    let elements = weights.len() as u64 / 2;
    let mut counts = [0; 256];
    super::tiles::count(weights, &mut counts);
    let frequencies = Frequencies::new(&counts).filter(|_| elements <= ELEMENTS_MAX)?;
    let mut encoder = Encoder::new(&frequencies);
    let mut coded = head(elements, &frequencies).to_vec();
    let mut places = Places::new();
    for tile in weights.chunks(TILE_BYTES) {
        let begin = coded.len();
        encoder.encode(tile, &mut coded);
        places.push(coded.len() - begin);
    }
    coded.extend(places.to_bytes());
    Some(coded)
}

/// The weights of a coded tensor that is all in memory, as many as `out` has room for.
///
/// # Errors
/// `Format`: what is wrong with it, and at which of its offsets.
pub fn decode(coded: &[u8], out: &mut [u8]) -> Result<()> {
    let elements = out.len() as u64 / 2;
    let tiles_end = (coded.len() as u64).checked_sub(Places::bytes(elements));
    let (Some(head), Some(tiles_end)) = (coded.first_chunk(), tiles_end) else {
        return Err(Error::new(
            ErrorKind::Format,
            format!("its coded form of {} bytes is too short", coded.len()),
        ));
    };
    let decoder = Decoder::new(&read_head(head, elements)?);
    let places = &coded[tiles_end as usize..];
    let places = Places::from_bytes(places, elements, coded.len() as u64)?;
    for (tile_index, out) in (0..).zip(out.chunks_mut(TILE_BYTES)) {
        let place = places.tile(tile_index);
        decoder
            .decode(&coded[place.start as usize..place.end as usize], out)
            .map_err(|damage| damaged(tile_index, place.start, damage))?;
    }
    Ok(())
}
