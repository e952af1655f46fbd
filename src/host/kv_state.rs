//! Keys and values of a context as llama.cpp saves them: found in its bytes, taken out as vectors, put back changed.
//!
//! The layout is llama.cpp's of the version that is compiled in (`llama_kv_cache::state_write`): magic, sequence; per cache
//! (a model with sliding windows has two) streams, cells with their positions, then K rows and V rows or columns of each
//! layer. Invariant: every byte belongs to something that was recognised, or the state is refused; putting back what was
//! taken out changes nothing.

use crate::error::{Error, ErrorKind, Result};

/// ggml's number for f32, the only type that is taken: what is measured must not have been rounded before.
const F32: u32 = 0;
const CELLS_MAX: u32 = 1 << 24;
const LAYERS_MAX: u32 = 4096;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Keys, as attention sees them (rotated by position).
    Key,
    /// Values.
    Value,
}

/// The keys or values of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which.
    pub side: Side,
    /// Number of the layer among those that have a cache of their own.
    pub layer: usize,
    /// Tokens.
    pub cells: usize,
    /// Values of a token, all heads.
    pub row: usize,
    at: usize,
    /// Stored column by column.
    transposed: bool,
}

/// A saved state.
#[derive(Debug, Clone)]
pub struct KvState {
    bytes: Vec<u8>,
    parts: Vec<Part>,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn refused(what: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the KV state of this model is not one that flea can take apart: {what}"),
    )
}

impl Cursor<'_> {
    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let end = self
            .at
            .checked_add(len)
            .ok_or_else(|| refused("it is too long"))?;
        let part = self
            .bytes
            .get(self.at..end)
            .ok_or_else(|| refused("it ends too early"))?;
        self.at = end;
        Ok(part)
    }

    fn word(&mut self) -> Result<u32> {
        let word = self.take(4)?;
        Ok(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
    }

    fn bounded(&mut self, most: u32, what: &str) -> Result<usize> {
        let value = self.word()?;
        if value > most {
            return Err(refused(&format!("{value} {what}")));
        }
        Ok(value as usize)
    }

    fn f32_type(&mut self) -> Result<()> {
        match self.word()? {
            F32 => Ok(()),
            other => Err(refused(&format!(
                "its numbers are of ggml type {other}, not f32"
            ))),
        }
    }
}

impl KvState {
    /// Takes a state apart.
    ///
    /// # Errors
    /// `Unsupported`: recurrent models, several positions per token, or another layout.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let mut cursor = Cursor {
            bytes: &bytes,
            at: 8,
        };
        let mut parts = Vec::new();
        let mut layers = 0;
        while cursor.at < bytes.len() {
            layers += cache(&mut cursor, layers, &mut parts)?;
        }
        if parts.is_empty() {
            return Err(refused("there are no keys and values in it"));
        }
        Ok(Self { bytes, parts })
    }

    /// What is in it.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The bytes to give back to llama.cpp.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The rows of a part, token after token.
    #[must_use]
    pub fn rows(&self, part: &Part) -> Vec<f32> {
        let value = |index: usize| {
            let b = &self.bytes[part.at + 4 * index..][..4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        };
        (0..part.cells * part.row)
            .map(|index| value(part.place(index)))
            .collect()
    }

    /// Puts rows back.
    pub fn set_rows(&mut self, part: &Part, rows: &[f32]) {
        for (index, value) in rows.iter().enumerate().take(part.cells * part.row) {
            self.bytes[part.at + 4 * part.place(index)..][..4]
                .copy_from_slice(&value.to_le_bytes());
        }
    }
}

impl Part {
    /// Where a value stands, of which rows say `index`.
    const fn place(&self, index: usize) -> usize {
        if self.transposed {
            index % self.row * self.cells + index / self.row
        } else {
            index
        }
    }
}

/// One cache: how many layers it has.
fn cache(cursor: &mut Cursor<'_>, first_layer: usize, parts: &mut Vec<Part>) -> Result<usize> {
    if cursor.word()? != 1 {
        return Err(refused("it has several streams"));
    }
    let cells = cursor.bounded(CELLS_MAX, "cells")?;
    if cells == 0 {
        return Ok(0);
    }
    for _ in 0..cells {
        cursor.word()?;
        if cursor.word()? > 1 {
            return Err(refused("a cell belongs to several sequences"));
        }
        if cursor.word()? != 0 {
            return Err(refused("its cells have more than a position"));
        }
    }
    let transposed = cursor.bounded(1, "as a flag")? == 1;
    let layers = cursor.bounded(LAYERS_MAX, "layers")?;
    cursor.take(8)?;
    for side in [Side::Key, Side::Value] {
        for layer in 0..layers {
            cursor.f32_type()?;
            let by_columns = transposed && side == Side::Value;
            let row = if by_columns {
                cursor.word()?;
                cursor.bounded(1 << 20, "values in a row")?
            } else {
                let row_bytes = cursor.bounded(1 << 22, "bytes in a row")?;
                if cursor.word()? != 0 {
                    return Err(refused("its rows are too long"));
                }
                row_bytes / 4
            };
            let at = cursor.at;
            cursor.take(cells * row * 4)?;
            parts.push(Part {
                side,
                layer: first_layer + layer,
                cells,
                row,
                at,
                transposed: by_columns,
            });
        }
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two cells, one layer with keys of 3 and values of 2, stored as llama.cpp does with and without flash attention.
    fn state(transposed: u32) -> Vec<u8> {
        let mut words: Vec<u32> = vec![0x6767_6d6c, 0, 1, 2, 0, 1, 0, 1, 1, 0, transposed, 1, 0, 0];
        words.extend([F32, 12, 0]);
        words.extend((0..6).map(|value| (value as f32).to_bits()));
        if transposed == 1 {
            words.extend([F32, 4, 2]);
            words.extend([10.0f32, 12.0, 11.0, 13.0].map(f32::to_bits));
        } else {
            words.extend([F32, 8, 0]);
            words.extend([10.0f32, 11.0, 12.0, 13.0].map(f32::to_bits));
        }
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn rows_are_the_same_however_they_are_stored() {
        for transposed in [0, 1] {
            let mut state = KvState::parse(state(transposed)).expect("a state");
            let parts = state.parts().to_vec();
            assert_eq!(
                (parts.len(), parts[0].side, parts[1].side),
                (2, Side::Key, Side::Value)
            );
            assert_eq!(state.rows(&parts[0]), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            assert_eq!(state.rows(&parts[1]), [10.0, 11.0, 12.0, 13.0]);
            let before = state.bytes().to_vec();
            let rows = state.rows(&parts[1]);
            state.set_rows(&parts[1], &rows);
            assert_eq!(state.bytes(), before);
            state.set_rows(&parts[1], &[1.0, 2.0, 3.0, 4.0]);
            assert_eq!(state.rows(&parts[1]), [1.0, 2.0, 3.0, 4.0]);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let good = state(0);
        for len in 0..good.len() {
            assert!(
                KvState::parse(good[..len].to_vec()).is_err(),
                "cut at {len}"
            );
        }
        for (word, value) in [
            (2, 2),
            (3, u32::MAX),
            (5, 9),
            (6, 4),
            (10, 2),
            (11, u32::MAX),
            (14, 1),
            (15, u32::MAX),
        ] {
            let mut bad = good.clone();
            bad[4 * word..][..4].copy_from_slice(&u32::to_le_bytes(value));
            assert!(KvState::parse(bad).is_err(), "word {word}");
        }
    }
}
