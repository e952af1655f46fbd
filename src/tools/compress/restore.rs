//! `flea pack --decompress`: the original GGUF out of a container, byte for byte, every part checked.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::canceled;
use super::team::{self, Batch};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::packed::{self, Coding, Part};
use crate::model::coded::{self, HEAD_BYTES, Places};
use crate::model::tiles::{Decoder, TILE_BYTES};
use crate::tools::pack::{PackOptions, check_not_input};
use crate::tools::synth::file::{OutputFile, check_space, check_target};
use crate::units::MIB;

/// MiBs that are read before their tiles are decoded: enough for every thread to have some.
const PIECES: usize = 8;

/// What was written.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Its length.
    pub bytes: u64,
    /// Length of the compressed model.
    pub packed_bytes: u64,
    /// Parts, with their CRC32C compared.
    pub parts_count: usize,
    /// Name of the original file.
    pub original: String,
    /// Bytes of the weights that were decoded.
    pub weights_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// How long the threads decoded, together.
    pub coding_seconds: f64,
}

/// Writes the GGUF that `options.model`, a compressed one, was made of; `tell` hears done and total bytes.
///
/// # Errors
/// `Format`, `Truncated`, `Checksum`: what is wrong with the compressed model, with file, tensor and offset. `Invalid` for
/// an output that exists or is the input; `Refused` when the disk has no room; `Canceled`.
pub fn decompress(
    options: &PackOptions,
    stop: &AtomicBool,
    mut tell: impl FnMut(u64, u64),
) -> Result<Restored> {
    let began = Instant::now();
    let file = ShardFile::open(&options.model)?;
    let directory = packed::open(&file)?;
    check_target(&options.output, options.force)?;
    let files = [file];
    check_not_input(&options.output, &files)?;
    let [file] = files;
    check_space(&options.output, directory.bytes)?;
    let output = OutputFile::create(&options.output, directory.bytes, options.force)?;
    let mut restore = Restore {
        file: &file,
        output,
        stop,
        options,
        crc32c: 0,
        done_bytes: 0,
        weights_bytes: 0,
        coding: Duration::ZERO,
    };
    for part in &directory.parts {
        restore
            .part(part)
            .map_err(|error| name(&file, part, &error))?;
        tell(restore.done_bytes, directory.bytes);
    }
    file.check_unchanged()?;
    let (weights_bytes, coding) = (restore.weights_bytes, restore.coding);
    let mut output = restore.output;
    output.sync()?;
    output.commit()?;
    Ok(Restored {
        bytes: directory.bytes,
        packed_bytes: file.len_bytes(),
        parts_count: directory.parts.len(),
        original: directory.file,
        weights_bytes,
        seconds: began.elapsed().as_secs_f64(),
        coding_seconds: coding.as_secs_f64(),
    })
}

/// The same error with file, part and offset where it lacks them.
fn name(file: &ShardFile, part: &Part, error: &Error) -> Error {
    match error.kind() {
        ErrorKind::Format | ErrorKind::Checksum => Error::new(
            error.kind(),
            format!(
                "{}: {} at offset {}: {error}; fetch the file again",
                file.path().display(),
                part.label(),
                part.at_bytes
            ),
        ),
        _ => error.clone(),
    }
}

struct Restore<'a> {
    file: &'a ShardFile,
    output: OutputFile,
    stop: &'a AtomicBool,
    options: &'a PackOptions,
    /// Of the part at hand.
    crc32c: u32,
    done_bytes: u64,
    weights_bytes: u64,
    coding: Duration,
}

impl Restore<'_> {
    fn part(&mut self, part: &Part) -> Result<()> {
        self.crc32c = 0;
        match part.coding {
            Coding::Stored => self.stored(part)?,
            Coding::Tiles => self.tiles(part)?,
        }
        if self.crc32c != part.crc32c {
            return Err(Error::new(
                ErrorKind::Checksum,
                format!(
                    "its bytes have the CRC32C {:08x} and not {:08x}",
                    self.crc32c, part.crc32c
                ),
            ));
        }
        let zeros = vec![0; part.zeros_bytes.min(MIB) as usize];
        let mut left_bytes = part.zeros_bytes;
        while left_bytes > 0 {
            let len = left_bytes.min(MIB);
            self.write(&zeros[..len as usize])?;
            left_bytes -= len;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(canceled(&self.options.output));
        }
        self.done_bytes += bytes.len() as u64;
        self.output.write_all(bytes).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("write {}", self.options.output.display()),
            )
        })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc32c = ::crc32c::crc32c_append(self.crc32c, bytes);
        self.write(bytes)
    }

    /// Appends some pieces, each compared with its CRC32C, to `bytes`.
    fn read_pieces(&self, part: &Part, first: usize, bytes: &mut Vec<u8>) -> Result<()> {
        for (index, &expected) in part.pieces.iter().enumerate().skip(first).take(PIECES) {
            let at = index as u64 * MIB;
            let from = bytes.len();
            bytes.resize(from + (part.coded_bytes - at).min(MIB) as usize, 0);
            self.file
                .read_exact_at(part.at_bytes + at, &mut bytes[from..])?;
            let found = ::crc32c::crc32c(&bytes[from..]);
            if found != expected {
                return Err(Error::new(
                    ErrorKind::Checksum,
                    format!(
                        "the MiB at its offset {at} has the CRC32C {found:08x} and not {expected:08x}"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn stored(&mut self, part: &Part) -> Result<()> {
        let mut bytes = Vec::new();
        for first in (0..part.pieces.len()).step_by(PIECES) {
            bytes.clear();
            self.read_pieces(part, first, &mut bytes)?;
            self.put(&bytes)?;
        }
        Ok(())
    }

    fn tiles(&mut self, part: &Part) -> Result<()> {
        let elements = part.len_bytes / 2;
        let mut head = [0; HEAD_BYTES];
        self.file.read_exact_at(part.at_bytes, &mut head)?;
        let decoder = Decoder::new(&coded::read_head(&head, elements)?);
        let mut places = vec![0; Places::bytes(elements) as usize];
        let places_at = part.coded_bytes - places.len() as u64;
        self.file
            .read_exact_at(part.at_bytes + places_at, &mut places)?;
        let places = Places::from_bytes(&places, elements, part.coded_bytes)?;
        // What was read and not decoded, and where it begins.
        let (mut bytes, mut at_bytes) = (Vec::new(), 0);
        let mut weights = Vec::new();
        let mut next = 0;
        for first in (0..part.pieces.len()).step_by(PIECES) {
            self.read_pieces(part, first, &mut bytes)?;
            let read_bytes = at_bytes + bytes.len() as u64;
            let begin = next;
            while next < places.tile_count() && places.tile(next).end <= read_bytes {
                next += 1;
            }
            if next == begin {
                continue;
            }
            let end = (next * TILE_BYTES as u64).min(part.len_bytes);
            weights.resize((end - begin * TILE_BYTES as u64) as usize, 0);
            let batch = Batch {
                places: &places,
                bytes: &bytes,
                at_bytes,
            };
            self.coding += team::decode(&decoder, batch, begin..next, &mut weights)?;
            self.weights_bytes += weights.len() as u64;
            self.put(&weights)?;
            let done = places.tile(next - 1).end;
            bytes.drain(..(done - at_bytes) as usize);
            at_bytes = done;
        }
        Ok(())
    }
}
