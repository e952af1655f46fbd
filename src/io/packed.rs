//! The file of a compressed model: a first page that says what it is, parts on pages, a directory, a trailer.
//!
//! The directory stands at the end because lengths are known last and the file is written once, front to back. Invariant:
//! the parts of a [`Directory`] that [`open`] gives lie inside the file and, in their order, make up every byte of the
//! original, once; nothing it says is believed before it is bounded. Place: `file` of
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`; docs/packed-format.md describes it.

use serde::{Deserialize, Serialize};

use super::ShardFile;
use crate::error::{Error, ErrorKind, Result};
use crate::model::coded::{ELEMENTS_MAX, HEAD_BYTES, Places};
use crate::units::{MIB, PAGE_4K};

/// The first and the last eight bytes.
pub const MAGIC: [u8; 8] = *b"FLEAPACK";
/// Of the format.
pub const VERSION: u32 = 1;
/// Bytes at the end: where the directory is (u64), its bytes (u64) and CRC32C (u32), version (u32), magic.
pub const TRAILER_BYTES: usize = 32;
/// The longest directory that is read. A part takes about 300 bytes and 11 more per MiB; the largest known models have
/// 150 000 tensors and 2 TB.
const DIRECTORY_BYTES_MAX: u64 = 256 << 20;
/// Behind magic and version, for whoever looks into the file.
const NOTICE: &str = "\n\nA model that flea pack --compress made. It is no GGUF: flea pack --decompress gives that back.\n\
    The format: docs/packed-format.md in flea's sources.\n";

/// How a part is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Coding {
    /// As it was.
    Stored,
    /// Weights of 16 bits in tiles.
    Tiles,
}

/// A run of bytes of the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The tensor's name; none for the header and what lies between tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// How it is stored.
    pub coding: Coding,
    /// Where it stands in the original.
    pub offset_bytes: u64,
    /// Its length there.
    pub len_bytes: u64,
    /// Zeros that follow it there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub zeros_bytes: u64,
    /// Where it lies in this file.
    pub at_bytes: u64,
    /// Its length in this file.
    pub coded_bytes: u64,
    /// CRC32C of its original bytes.
    pub crc32c: u32,
    /// CRC32C of each MiB of it in this file; the last may be shorter.
    pub pieces: Vec<u32>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for a reference.
const fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Part {
    /// What to call it in a message.
    #[must_use]
    pub fn label(&self) -> String {
        self.tensor.as_ref().map_or_else(
            || {
                format!(
                    "the part without a tensor at offset {} of the original",
                    self.offset_bytes
                )
            },
            |name| format!("tensor '{name}'"),
        )
    }
}

/// What is in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Name of the original file.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// What it is made of, in its order.
    pub parts: Vec<Part>,
}

/// The first page.
#[must_use]
pub fn preamble() -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_4K as usize);
    page.extend(MAGIC);
    page.extend(VERSION.to_le_bytes());
    page.extend(NOTICE.as_bytes());
    page.resize(PAGE_4K as usize, 0);
    page
}

/// The last bytes.
#[must_use]
pub fn trailer(at_bytes: u64, directory: &[u8]) -> [u8; TRAILER_BYTES] {
    let mut trailer = [0; TRAILER_BYTES];
    trailer[..8].copy_from_slice(&at_bytes.to_le_bytes());
    trailer[8..16].copy_from_slice(&(directory.len() as u64).to_le_bytes());
    trailer[16..20].copy_from_slice(&::crc32c::crc32c(directory).to_le_bytes());
    trailer[20..24].copy_from_slice(&VERSION.to_le_bytes());
    trailer[24..].copy_from_slice(&MAGIC);
    trailer
}

/// Whether a file begins as a compressed model does.
///
/// # Errors
/// `Io`.
pub fn is_packed(file: &ShardFile) -> Result<bool> {
    let mut first = [0; MAGIC.len()];
    if file.len_bytes() < first.len() as u64 {
        return Ok(false);
    }
    file.read_exact_at(0, &mut first)?;
    Ok(first == MAGIC)
}

/// Reads and checks the directory of a compressed model.
///
/// # Errors
/// `Format` for another kind of file, another version, or a directory that contradicts itself; `Truncated` where the end
/// is missing; `Checksum`; `Io`.
pub fn open(file: &ShardFile) -> Result<Directory> {
    let fault = |kind, what: &str| {
        Err(Error::new(
            kind,
            format!("{}: {what}", file.path().display()),
        ))
    };
    let mut first = [0; 12];
    if file.len_bytes() >= first.len() as u64 {
        file.read_exact_at(0, &mut first)?;
    }
    if first[..8] != MAGIC {
        return fault(
            ErrorKind::Format,
            "not a compressed model: it does not begin with \"FLEAPACK\"",
        );
    }
    if first[8..] != VERSION.to_le_bytes() {
        return fault(
            ErrorKind::Format,
            "a compressed model of another version of the format than 1; use the flea that made it",
        );
    }
    let mut last = [0; TRAILER_BYTES];
    let trailer_at = file.len_bytes().saturating_sub(TRAILER_BYTES as u64);
    if trailer_at >= PAGE_4K {
        file.read_exact_at(trailer_at, &mut last)?;
    }
    if last[24..] != MAGIC || last[20..24] != VERSION.to_le_bytes() {
        return fault(
            ErrorKind::Truncated,
            "its end is missing, with the directory in it; the file is incomplete, fetch it again",
        );
    }
    let (at_bytes, len_bytes) = (u64_at(&last, 0), u64_at(&last, 8));
    if len_bytes > DIRECTORY_BYTES_MAX || at_bytes.checked_add(len_bytes) != Some(trailer_at) {
        return fault(ErrorKind::Format, "its last bytes name no directory");
    }
    let mut bytes = vec![0; len_bytes as usize];
    file.read_exact_at(at_bytes, &mut bytes)?;
    if last[16..20] != ::crc32c::crc32c(&bytes).to_le_bytes() {
        return fault(
            ErrorKind::Checksum,
            "its directory is damaged (CRC32C); fetch the file again",
        );
    }
    let directory: Directory = match serde_json::from_slice(&bytes) {
        Ok(directory) => directory,
        Err(error) => return fault(ErrorKind::Format, &format!("its directory: {error}")),
    };
    match check(&directory, at_bytes) {
        Ok(()) => Ok(directory),
        Err(what) => fault(ErrorKind::Format, &format!("its directory: {what}")),
    }
}

fn u64_at(bytes: &[u8; TRAILER_BYTES], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// `end_bytes`: where the directory begins.
fn check(directory: &Directory, end_bytes: u64) -> std::result::Result<(), String> {
    let mut offset_bytes = 0_u64;
    for part in &directory.parts {
        let is_inside = part.at_bytes >= PAGE_4K
            && part.at_bytes.is_multiple_of(PAGE_4K)
            && part
                .at_bytes
                .checked_add(part.coded_bytes)
                .is_some_and(|end| end <= end_bytes);
        let elements = part.len_bytes / 2;
        let is_possible = match part.coding {
            Coding::Stored => part.coded_bytes == part.len_bytes,
            Coding::Tiles => {
                part.len_bytes.is_multiple_of(2)
                    && (1..=ELEMENTS_MAX).contains(&elements)
                    && part.coded_bytes > HEAD_BYTES as u64 + Places::bytes(elements)
            }
        };
        let has_pieces = part.pieces.len() as u64 == part.coded_bytes.div_ceil(MIB);
        if part.offset_bytes != offset_bytes || !is_inside || !is_possible || !has_pieces {
            return Err(format!(
                "{} cannot be where or what it is said to be",
                part.label()
            ));
        }
        offset_bytes = offset_bytes
            .checked_add(part.len_bytes)
            .and_then(|end| end.checked_add(part.zeros_bytes))
            .ok_or_else(|| format!("{} ends beyond any file", part.label()))?;
    }
    if offset_bytes != directory.bytes {
        return Err(format!(
            "its parts make up {offset_bytes} bytes of an original of {}",
            directory.bytes
        ));
    }
    Ok(())
}
