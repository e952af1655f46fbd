//! Writes a container front to back: parts on pages, with the CRC32C of each MiB; then the directory and the trailer.

use std::io::Write;

use crate::error::{Error, ErrorKind, Result};
use crate::io::packed::{Directory, preamble, trailer};
use crate::tools::synth::file::OutputFile;
use crate::units::{MIB, PAGE_4K};

/// What was written of one part.
#[derive(Debug)]
pub struct Stored {
    pub at_bytes: u64,
    pub coded_bytes: u64,
    pub pieces: Vec<u32>,
}

/// A container being written.
#[derive(Debug)]
pub struct Writer {
    output: OutputFile,
    at_bytes: u64,
    /// Where the part at hand begins.
    part_at_bytes: u64,
    /// CRC32C of its MiBs; the last one grows.
    pieces: Vec<u32>,
}

impl Writer {
    /// Writes the first page.
    pub fn new(output: OutputFile) -> Result<Self> {
        let mut writer = Self {
            output,
            at_bytes: 0,
            part_at_bytes: 0,
            pieces: Vec::new(),
        };
        writer.write(&preamble())?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at_bytes += bytes.len() as u64;
        self.output
            .write_all(bytes)
            .map_err(|error| Error::from_io(&error, "write the compressed model"))
    }

    /// A part begins here.
    pub fn start(&mut self) {
        self.part_at_bytes = self.at_bytes;
        self.pieces.clear();
    }

    /// More of the part.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.write(bytes)?;
        let mut in_part = self.at_bytes - self.part_at_bytes - bytes.len() as u64;
        while !bytes.is_empty() {
            let room = (MIB - in_part % MIB).min(bytes.len() as u64);
            let (now, later) = bytes.split_at(room as usize);
            if in_part.is_multiple_of(MIB) {
                self.pieces.push(0);
            }
            if let Some(crc32c) = self.pieces.last_mut() {
                *crc32c = ::crc32c::crc32c_append(*crc32c, now);
            }
            in_part += room;
            bytes = later;
        }
        Ok(())
    }

    /// The part ends here; the next one begins on a page of its own.
    pub fn end(&mut self) -> Result<Stored> {
        let stored = Stored {
            at_bytes: self.part_at_bytes,
            coded_bytes: self.at_bytes - self.part_at_bytes,
            pieces: std::mem::take(&mut self.pieces),
        };
        let padding = self.at_bytes.next_multiple_of(PAGE_4K) - self.at_bytes;
        self.write(&vec![0; padding as usize])?;
        Ok(stored)
    }

    /// Directory and trailer, all of it to the drive, and the name. Gives the length.
    pub fn finish(mut self, directory: Directory) -> Result<u64> {
        let bytes = serde_json::to_vec(&directory).map_err(|error| {
            Error::new(ErrorKind::Internal, format!("write the directory: {error}"))
        })?;
        let last = trailer(self.at_bytes, &bytes);
        self.write(&bytes)?;
        self.write(&last)?;
        self.output.sync()?;
        self.output.commit()?;
        Ok(self.at_bytes)
    }
}
