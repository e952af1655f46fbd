//! Streams a model into VRAM without computing, as [`super::bench_stream`] does into memory; [`verify`] then reads every
//! layer back and holds it against the file.
//!
//! Place: a host that only looks, beside the pipeline.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::engine::gpu::{GpuStats, Gpus, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::cuda::Readback;
use crate::plan::image::Piece;
use crate::units::MIB;

/// Read back at a time.
const STEP_BYTES: u64 = 4 * MIB;
/// How long one acquire waits before it looks whether it should stop.
const PATIENCE: Duration = Duration::from_secs(1);

/// One walk over all layers.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// From the first acquire to the last release.
    pub seconds: f64,
    /// What was copied into VRAM meanwhile.
    pub h2d_bytes: u64,
    /// What the drive delivered meanwhile.
    pub bytes_read: u64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Each pass.
    pub passes: Vec<Pass>,
    /// All of them together.
    pub seconds: f64,
    /// The model's counters at the end.
    pub stats: GpuStats,
}

/// Walks `passes_count` times over all layers.
///
/// # Errors
/// What an acquire gives; `Canceled` when `stop` is raised.
pub fn measure(model: &Gpus, passes_count: u32, stop: &AtomicBool) -> Result<Outcome> {
    let began = Instant::now();
    let mut passes = Vec::with_capacity(passes_count as usize);
    let mut before = model.stats();
    for _ in 0..passes_count {
        let begun = Instant::now();
        for layer in 0..model.catalog().layers.len() as u32 {
            acquire(model, layer, stop)?;
            model.release(layer)?;
        }
        let now = model.stats();
        passes.push(Pass {
            seconds: begun.elapsed().as_secs_f64(),
            h2d_bytes: now.h2d_bytes - before.h2d_bytes,
            bytes_read: now.bytes_read - before.bytes_read,
        });
        before = now;
    }
    Ok(Outcome {
        passes,
        seconds: began.elapsed().as_secs_f64(),
        stats: before,
    })
}

/// Waits as long as it takes, but not when asked to stop.
fn acquire(model: &Gpus, layer: u32, stop: &AtomicBool) -> Result<()> {
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Canceled, "interrupted"));
        }
        match model.acquire(layer, None, Some(PATIENCE)) {
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            result => return result,
        }
    }
}

/// Walks once more, reads every byte of every layer back as a kernel would see it, zeros behind tensors included, and
/// holds it against a plain read of the file; of a compressed one, against what the processor decodes. A layer's lease is given back while its last read is still on its way, as a
/// host with kernels does. Returns the bytes compared.
///
/// # Errors
/// `Checksum` naming the first layer, file and offset that differ; what an acquire, the driver or the plain read gives.
pub fn verify(model: &Gpus, stop: &AtomicBool) -> Result<u64> {
    let open = |path: &std::path::Path| {
        File::open(path).map_err(|error| Error::from_io(&error, format!("open {}", path.display())))
    };
    let shards = model.catalog().shards.iter();
    let files = shards
        .map(|shard| open(&shard.path))
        .collect::<Result<Vec<File>>>()?;
    let mut compared_bytes = 0;
    for part in model.parts() {
        let mut readback = Readback::new(part.model().context())?;
        for layer in part.layers().clone() {
            acquire(model, layer, stop)?;
            compared_bytes += Check {
                model,
                part,
                files: &files,
                layer,
            }
            .run(&mut readback)?;
        }
    }
    Ok(compared_bytes)
}

/// A layer that is leased.
struct Check<'a> {
    model: &'a Gpus,
    part: &'a Part,
    files: &'a [File],
    layer: u32,
}

impl Check<'_> {
    /// Reads the layer step by step and gives its lease back behind the last of them.
    fn run(&self, readback: &mut Readback) -> Result<u64> {
        let gpu = self.part.model();
        let local = self.layer - self.part.layers().start;
        let pieces = &gpu.vram().image.pieces[local as usize];
        let mut coming: Vec<Piece> = Vec::new();
        let mut compared_bytes = 0;
        let mut last = None;
        for step in pieces.iter().flat_map(cut) {
            let at = gpu.pool().base() + step.offset_bytes;
            let len = (step.end_bytes() - step.offset_bytes) as usize;
            if !readback.has_room(len) {
                compared_bytes += self.take(&mut coming, readback)?;
            }
            last = Some(readback.begin(at, len)?);
            coming.push(step);
        }
        match last {
            Some(read) => self.model.release_after(self.layer, read)?,
            None => self.model.release(self.layer)?,
        }
        Ok(compared_bytes + self.take(&mut coming, readback)?)
    }

    /// Compares everything that is on its way.
    fn take(&self, coming: &mut Vec<Piece>, readback: &mut Readback) -> Result<u64> {
        let mut compared_bytes = 0;
        for step in coming.drain(..) {
            self.compare(&step, readback.finish()?)?;
            compared_bytes += step.file.len_bytes;
        }
        Ok(compared_bytes)
    }

    fn compare(&self, step: &Piece, found: &[u8]) -> Result<()> {
        let shard = step.file.shard_index as usize;
        let path = &self.model.catalog().shards[shard].path;
        let label = &self.model.catalog().layers[self.layer as usize].label;
        let mut expected = vec![0; found.len()];
        let data = &mut expected[..step.file.len_bytes as usize];
        match self.model.packed() {
            Some(packed) => packed.read(step.file.offset_bytes, data)?,
            None => self.files[shard]
                .read_exact_at(data, step.file.offset_bytes)
                .map_err(|error| {
                    Error::from_io(&error, format!("plain read of {}", path.display()))
                })?,
        }
        match expected.iter().zip(found).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(byte) => Err(Error::new(
                ErrorKind::Checksum,
                format!(
                    "{label}: {} at offset {} differs from VRAM{}",
                    path.display(),
                    step.file.offset_bytes + byte as u64,
                    if byte as u64 >= step.file.len_bytes {
                        ", which should be zero behind the tensor"
                    } else {
                        ""
                    }
                ),
            )),
        }
    }
}

/// A piece in parts that can be read back at once.
fn cut(piece: &Piece) -> impl Iterator<Item = Piece> + use<> {
    let piece = *piece;
    let starts = (piece.offset_bytes..piece.end_bytes()).step_by(STEP_BYTES as usize);
    starts.filter_map(move |start| piece.within(start, start + STEP_BYTES))
}
