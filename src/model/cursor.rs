//! A bounded reader of a header: every read is checked against the bytes the file has left before anything is allocated.
//!
//! Invariants: reads go forward only and take not one byte more than asked; every error names the file, what was being
//! read and the offset. Serves [`super::gguf`] and [`super::safetensors`].
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

use super::{bad_format, fault};
use crate::error::{Error, ErrorKind, Result};
use std::fmt::Arguments;
use std::io::Read;
use std::path::Path;

/// Bytes of a whole header. The largest known GGUF header (250 000 tokens with merges) is under 20 MB; more would only make
/// a hostile file slow to refuse. safetensors has a limit of its own below this one.
pub const HEADER_BYTES_MAX: u64 = 256 << 20;

/// Reads forward through the header, counting.
pub(crate) struct Cursor<'a> {
    /// The file, for messages.
    pub(crate) path: &'a Path,
    /// Stands at `offset_bytes` of the file.
    pub(crate) source: &'a mut dyn Read,
    /// Bytes read so far.
    pub(crate) offset_bytes: u64,
    /// The file's length.
    pub(crate) len_bytes: u64,
    /// Keeps what is read, while set.
    pub(crate) record: Option<Vec<u8>>,
}

impl Cursor<'_> {
    /// Checks that the file, and the header's limit, hold that many more bytes.
    pub(crate) fn need(&self, bytes: u64, what: Arguments<'_>) -> Result<()> {
        let at = self.offset_bytes;
        if bytes > HEADER_BYTES_MAX.saturating_sub(at) {
            return Err(bad_format(
                self.path,
                format_args!(
                    "the header would be longer than {HEADER_BYTES_MAX} bytes: {what} at offset {at} claims {bytes} of them"
                ),
            ));
        }
        let left = self.len_bytes.saturating_sub(at);
        if bytes > left {
            return Err(fault(
                ErrorKind::Truncated,
                self.path,
                format_args!(
                    "the file ends inside its header: {what} at offset {at} needs {bytes} bytes and {left} are left; the file is incomplete, fetch it again"
                ),
            ));
        }
        Ok(())
    }

    /// Checks a count of things of at least `each_bytes`.
    pub(crate) fn bound_count(
        &self,
        count: u64,
        max: u64,
        each_bytes: u64,
        what: Arguments<'_>,
    ) -> Result<()> {
        if count > max {
            return Err(bad_format(
                self.path,
                format_args!("{count} {what}; at most {max} are possible"),
            ));
        }
        self.need(count * each_bytes, format_args!("{count} {what}"))
    }

    /// Checks an array's count; returns the bytes that count implies.
    pub(crate) fn bound_elements(&self, count: u64, each_bytes: u64, key: &str) -> Result<u64> {
        let bytes = count.checked_mul(each_bytes).ok_or_else(|| {
            bad_format(
                self.path,
                format_args!(
                    "key '{key}' claims {count} elements before offset {}",
                    self.offset_bytes
                ),
            )
        })?;
        self.need(bytes, format_args!("{count} elements of key '{key}'"))?;
        Ok(bytes)
    }

    pub(crate) fn fill(&mut self, out: &mut [u8], what: Arguments<'_>) -> Result<()> {
        self.need(out.len() as u64, what)?;
        self.source.read_exact(out).map_err(|error| {
            let at = self.offset_bytes;
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                return fault(
                    ErrorKind::Truncated,
                    self.path,
                    format_args!("the file ended while its header was read: {what} at offset {at}"),
                );
            }
            let place = format!("{}: reading {what} at offset {at}", self.path.display());
            Error::from_io(&error, place)
        })?;
        self.offset_bytes += out.len() as u64;
        if let Some(record) = &mut self.record {
            record.extend_from_slice(out);
        }
        Ok(())
    }

    pub(crate) fn array<const N: usize>(&mut self, what: Arguments<'_>) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: Arguments<'_>) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: Arguments<'_>) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// The length of a text, known to be in the file.
    pub(crate) fn text_len(&mut self, what: Arguments<'_>) -> Result<u64> {
        let len_bytes = self.u64(what)?;
        self.need(len_bytes, what)?;
        Ok(len_bytes)
    }

    /// Bytes whose number the caller has bounded.
    pub(crate) fn bytes(&mut self, len_bytes: u64, what: Arguments<'_>) -> Result<Vec<u8>> {
        self.need(len_bytes, what)?;
        let mut bytes = vec![0; len_bytes as usize];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    pub(crate) fn text(&mut self, max_bytes: u64, what: Arguments<'_>) -> Result<String> {
        let at = self.offset_bytes;
        let len_bytes = self.text_len(what)?;
        if len_bytes > max_bytes {
            return Err(bad_format(
                self.path,
                format_args!(
                    "{what} at offset {at} is {len_bytes} bytes long; at most {max_bytes} are possible"
                ),
            ));
        }
        String::from_utf8(self.bytes(len_bytes, what)?).map_err(|_| {
            bad_format(
                self.path,
                format_args!("{what} at offset {at} is not valid UTF-8"),
            )
        })
    }

    pub(crate) fn skip(&mut self, len_bytes: u64, what: Arguments<'_>) -> Result<()> {
        self.need(len_bytes, what)?;
        // Tokens are short and there are half a million of them: clearing a page for each would cost more than reading it.
        let mut short = [0_u8; 64];
        if len_bytes <= short.len() as u64 {
            return self.fill(&mut short[..len_bytes as usize], what);
        }
        let mut long = [0_u8; 4096];
        let mut left = len_bytes;
        while left > 0 {
            let step = left.min(long.len() as u64) as usize;
            self.fill(&mut long[..step], what)?;
            left -= step as u64;
        }
        Ok(())
    }
}
