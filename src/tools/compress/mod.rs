//! `flea pack --compress` and `--decompress`: a GGUF with its 16-bit weights coded without loss, and the same GGUF back.
//!
//! docs/packed-format.md describes the file. It is a container of its own and no GGUF: a program that does not know it says
//! so at its first bytes, instead of computing with what it takes for weights. Parts are in the order of use, each on a page
//! of its own, so that a layer is one run of reads; the directory knows where each stood, and what comes back is the
//! original to the byte. Invariants: every tile is decoded again and compared before it is written; every part carries the
//! CRC32C of its original bytes, and of each MiB as it is stored; the output is there completely or not at all.
//! Place: a tool beside the pipeline; the codec is `model::tiles`, which the reader can use between drive and slot.

mod restore;
mod team;
mod writer;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

pub use restore::{Restored, decompress};

use super::pack::{PackOptions, check_not_input, order_of_use};
use super::synth::file::{OutputFile, check_space, check_target};
use crate::engine::read_catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::io::ShardFile;
use crate::io::packed::{Coding, Directory, Part};
use crate::model::coded::{self, ELEMENTS_MAX, HEAD_BYTES, Places};
use crate::model::tiles::{self, Frequencies, TILE_BYTES, tile_count};
use crate::model::{Catalog, DType, Format};
use crate::units::{MIB, PAGE_4K};

use team::Team;
use writer::Writer;

/// Read at a time: 512 tiles, so that each thread has some.
const STEP_BYTES: u64 = 8 * MIB;
/// A tensor up to this length is read once and kept; a longer one is read for its table and again for its tiles.
const HELD_BYTES_MAX: u64 = 256 * MIB;
/// What must be gained, as a part of the whole: decoding costs time, and less than this is not worth it.
const GAIN_PART: u64 = 32;

/// What was written.
#[derive(Debug, Clone)]
pub struct Compressed {
    /// Its length.
    pub bytes: u64,
    /// Length of the input.
    pub input_bytes: u64,
    /// Tensors.
    pub tensors_count: usize,
    /// Tensors that are coded.
    pub coded_count: usize,
    /// Bytes of the weights that are coded, before.
    pub weights_bytes: u64,
    /// Bytes of the weights that are coded, after.
    pub coded_bytes: u64,
    /// How many threads coded.
    pub threads_count: usize,
    /// How long it took.
    pub seconds: f64,
    /// How long the threads were at it together: to code tiles, and to decode and compare them.
    pub coding_seconds: f64,
}

/// A part of the original file: the header, a tensor, or what lies between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Source {
    tensor_index: Option<usize>,
    begin_bytes: u64,
    end_bytes: u64,
    /// Zeros that follow it.
    zeros_bytes: u64,
}

impl Source {
    const fn len_bytes(&self) -> u64 {
        self.end_bytes - self.begin_bytes
    }
}

/// What all steps of one run need.
struct Job<'a> {
    path: &'a Path,
    file: &'a ShardFile,
    stop: &'a AtomicBool,
    output: &'a Path,
}

impl Job<'_> {
    fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(canceled(self.output));
        }
        Ok(())
    }

    /// The bytes of `begin..end` in steps of [`STEP_BYTES`], each read while the one before is worked on.
    fn read(
        &self,
        begin_bytes: u64,
        end_bytes: u64,
        mut each: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let step_at = |at: u64| -> Result<Vec<u8>> {
            self.check_stop()?;
            let mut step = vec![0; (end_bytes - at).min(STEP_BYTES) as usize];
            self.file.read_exact_at(at, &mut step)?;
            Ok(step)
        };
        if end_bytes - begin_bytes <= STEP_BYTES {
            return each(&step_at(begin_bytes)?);
        }
        std::thread::scope(|scope| {
            let (sender, steps) = sync_channel::<Result<Vec<u8>>>(1);
            scope.spawn(move || {
                for at in (begin_bytes..end_bytes).step_by(STEP_BYTES as usize) {
                    let step = step_at(at);
                    let is_last = step.is_err();
                    // Nobody listens any more where the work has failed.
                    if sender.send(step).is_err() || is_last {
                        return;
                    }
                }
            });
            steps.into_iter().try_for_each(|step| each(&step?))
        })
    }
}

fn canceled(output: &Path) -> Error {
    let context = format!("interrupted; {} is not written", output.display());
    Error::new(ErrorKind::Canceled, context)
}

/// Compresses `options.model` into `options.output`; `tell` hears done and total bytes.
///
/// # Errors
/// What is wrong with the model; `Unsupported` for safetensors, a model in several files, or one without 16-bit weights
/// that get shorter; `Invalid` for an output that exists or is the input; `Refused` when the disk has no room; `Canceled`.
pub fn compress(
    options: &PackOptions,
    stop: &AtomicBool,
    mut tell: impl FnMut(u64, u64),
) -> Result<Compressed> {
    let began = Instant::now();
    let (catalog, files) = read_catalog(&options.model)?;
    let file = check_model(&options.model, &catalog, &files)?;
    check_target(&options.output, options.force)?;
    check_not_input(&options.output, &files)?;
    let job = Job {
        path: &options.model,
        file,
        stop,
        output: &options.output,
    };
    let sources = sources(&job, &catalog)?;
    // The most it can be: every part as it is, on pages of its own, and the directory.
    let most_bytes = file.len_bytes()
        + (PAGE_4K + 512) * (sources.len() as u64 + 2)
        + file.len_bytes() / MIB * 16;
    check_space(&options.output, most_bytes)?;
    let output = OutputFile::create(&options.output, most_bytes, options.force)?;
    let mut writer = Writer::new(output)?;
    let mut parts = Vec::with_capacity(sources.len());
    let mut done_bytes = 0;
    let mut coding = Duration::ZERO;
    for source in in_order_of_use(&catalog, &sources) {
        let part = write_part(&job, &mut writer, &catalog, &source, &mut coding)?;
        done_bytes += part.len_bytes + part.zeros_bytes;
        tell(done_bytes, file.len_bytes());
        parts.push(part);
    }
    let coded: Vec<&Part> = parts
        .iter()
        .filter(|part| part.coding == Coding::Tiles)
        .collect();
    if coded.is_empty() {
        return Err(nothing_to_gain(&options.model));
    }
    let mut compressed = Compressed {
        bytes: 0,
        input_bytes: file.len_bytes(),
        tensors_count: catalog.tensors.len(),
        coded_count: coded.len(),
        weights_bytes: coded.iter().map(|part| part.len_bytes).sum(),
        coded_bytes: coded.iter().map(|part| part.coded_bytes).sum(),
        threads_count: team::threads(),
        seconds: 0.0,
        coding_seconds: coding.as_secs_f64(),
    };
    file.check_unchanged()?;
    parts.sort_by_key(|part| part.offset_bytes);
    let name = options.model.file_name().unwrap_or_default();
    compressed.bytes = writer.finish(Directory {
        file: name.to_string_lossy().into_owned(),
        bytes: file.len_bytes(),
        parts,
    })?;
    compressed.seconds = began.elapsed().as_secs_f64();
    Ok(compressed)
}

fn check_model<'a>(
    path: &Path,
    catalog: &Catalog,
    files: &'a [ShardFile],
) -> Result<&'a ShardFile> {
    let unsupported = |what: &str| {
        let context = format!("{}: {what}", path.display());
        Err(Error::new(ErrorKind::Unsupported, context))
    };
    if !matches!(catalog.format, Format::Gguf(_)) {
        return unsupported("only GGUF models can be compressed");
    }
    let [file] = files else {
        return unsupported(
            "is one of several files; join them first: flea pack MODEL -o joined.gguf",
        );
    };
    if !catalog.tensors.iter().any(|tensor| is_16_bit(tensor.dtype)) {
        return Err(nothing_to_gain(path));
    }
    Ok(file)
}

fn is_16_bit(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

fn nothing_to_gain(path: &Path) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "{}: no bf16 or f16 weights that would get shorter (quantised weights hold no redundancy that is left to take)",
            path.display()
        ),
    )
}

/// The original file cut up, in its order: every byte is in one source or among the zeros behind it.
fn sources(job: &Job<'_>, catalog: &Catalog) -> Result<Vec<Source>> {
    let mut order: Vec<usize> = (0..catalog.tensors.len())
        .filter(|&index| catalog.tensors[index].extent.len_bytes > 0)
        .collect();
    order.sort_by_key(|&index| catalog.tensors[index].extent.offset_bytes);
    let mut sources: Vec<Source> = Vec::with_capacity(order.len() + 1);
    let mut at = 0;
    for index in order {
        let extent = catalog.tensors[index].extent;
        push_gap(job, &mut sources, at, extent.offset_bytes)?;
        sources.push(Source {
            tensor_index: Some(index),
            begin_bytes: extent.offset_bytes,
            end_bytes: extent.end_bytes(),
            zeros_bytes: 0,
        });
        at = extent.end_bytes();
    }
    push_gap(job, &mut sources, at, job.file.len_bytes())?;
    Ok(sources)
}

/// What lies between two tensors is padding as a rule: then it is only counted.
fn push_gap(job: &Job<'_>, sources: &mut Vec<Source>, begin: u64, end: u64) -> Result<()> {
    if begin >= end {
        return Ok(());
    }
    if let Some(before) = sources.last_mut() {
        let mut is_zero = true;
        job.read(begin, end, |bytes| {
            is_zero &= bytes.iter().all(|&byte| byte == 0);
            Ok(())
        })?;
        if is_zero {
            before.zeros_bytes = end - begin;
            return Ok(());
        }
    }
    sources.push(Source {
        tensor_index: None,
        begin_bytes: begin,
        end_bytes: end,
        zeros_bytes: 0,
    });
    Ok(())
}

/// The header and what is no tensor first, then tensors as they are used.
fn in_order_of_use(catalog: &Catalog, sources: &[Source]) -> Vec<Source> {
    let mut turn = vec![0; catalog.tensors.len()];
    for (place, index) in order_of_use(catalog).into_iter().enumerate() {
        turn[index] = place + 1;
    }
    let mut sources = sources.to_vec();
    sources.sort_by_key(|source| source.tensor_index.map_or(0, |index| turn[index]));
    sources
}

fn write_part(
    job: &Job<'_>,
    writer: &mut Writer,
    catalog: &Catalog,
    source: &Source,
    coding: &mut Duration,
) -> Result<Part> {
    let tensor = source.tensor_index.map(|index| &catalog.tensors[index]);
    let mut bytes = Bytes {
        job,
        source,
        held: None,
    };
    let mut frequencies = None;
    if tensor.is_some_and(|tensor| is_16_bit(tensor.dtype)) {
        frequencies = worthwhile(&mut bytes)?;
    }
    writer.start();
    let mut crc32c = 0;
    if let Some(frequencies) = &frequencies {
        *coding += write_tiles(&bytes, writer, frequencies, &mut crc32c)?;
    } else {
        bytes.each(|step| {
            crc32c = ::crc32c::crc32c_append(crc32c, step);
            writer.put(step)
        })?;
    }
    let stored = writer.end()?;
    Ok(Part {
        tensor: tensor.map(|tensor| tensor.name.clone()),
        coding: frequencies.map_or(Coding::Stored, |_| Coding::Tiles),
        offset_bytes: source.begin_bytes,
        len_bytes: source.len_bytes(),
        zeros_bytes: source.zeros_bytes,
        at_bytes: stored.at_bytes,
        coded_bytes: stored.coded_bytes,
        crc32c,
        pieces: stored.pieces,
    })
}

/// The bytes of one source, kept from the first time they are read where they are not too many.
struct Bytes<'a> {
    job: &'a Job<'a>,
    source: &'a Source,
    held: Option<Vec<u8>>,
}

impl Bytes<'_> {
    fn each(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let source = self.source;
        match &self.held {
            Some(held) => held.chunks(STEP_BYTES as usize).try_for_each(|step| {
                self.job.check_stop()?;
                each(step)
            }),
            None => self.job.read(source.begin_bytes, source.end_bytes, each),
        }
    }

    fn each_first(&mut self, mut each: impl FnMut(&[u8])) -> Result<()> {
        let len_bytes = self.source.len_bytes();
        let mut held =
            (len_bytes <= HELD_BYTES_MAX).then(|| Vec::with_capacity(len_bytes as usize));
        self.each(|step| {
            if let Some(held) = &mut held {
                held.extend_from_slice(step);
            }
            each(step);
            Ok(())
        })?;
        self.held = held;
        Ok(())
    }
}

/// The table for a tensor that gets shorter by it.
fn worthwhile(bytes: &mut Bytes<'_>) -> Result<Option<Frequencies>> {
    let len_bytes = bytes.source.len_bytes();
    let elements = len_bytes / 2;
    if elements > ELEMENTS_MAX || !len_bytes.is_multiple_of(2) {
        return Ok(None);
    }
    let mut counts = [0; 256];
    bytes.each_first(|step| tiles::count(step, &mut counts))?;
    let Some(frequencies) = Frequencies::new(&counts) else {
        return Ok(None);
    };
    // Head, places, and per tile its states and padding.
    let around = HEAD_BYTES as u64 + Places::bytes(elements) + tile_count(elements) * (128 + 8);
    let expected = elements + frequencies.coded_bytes(&counts) + around;
    Ok((expected < len_bytes - len_bytes / GAIN_PART).then_some(frequencies))
}

/// Gives how long the threads coded, together.
fn write_tiles(
    bytes: &Bytes<'_>,
    writer: &mut Writer,
    frequencies: &Frequencies,
    crc32c: &mut u32,
) -> Result<Duration> {
    writer.put(&coded::head(bytes.source.len_bytes() / 2, frequencies))?;
    let mut team = Team::new(frequencies);
    let mut places = Places::new();
    bytes.each(|weights| {
        *crc32c = ::crc32c::crc32c_append(*crc32c, weights);
        let runs = match team.encode(weights) {
            Ok(runs) => runs,
            Err(error) => {
                // Weights that are not those that were counted do not come back either.
                bytes.job.file.check_unchanged()?;
                let context = format!("{}: {error}", bytes.job.path.display());
                return Err(error.with_context(context));
            }
        };
        for (tiles, lens) in runs {
            writer.put(tiles)?;
            lens.iter().for_each(|&len| places.push(len));
        }
        Ok(())
    })?;
    writer.put(&places.to_bytes())?;
    Ok(team.spent())
}

const _: () = assert!((STEP_BYTES as usize).is_multiple_of(TILE_BYTES));
