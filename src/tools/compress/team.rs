//! Codes and decodes the tiles of one tensor on all processors. Tiles do not depend on each other, so each thread takes a
//! run of them.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::model::coded::{Places, damaged};
use crate::model::tiles::{Decoder, Encoder, Frequencies, TILE_BYTES};

/// More than these no drive can feed.
const THREADS_MAX: usize = 16;

/// How many threads there are.
pub fn threads() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX))
}

/// One thread's tools and what it made.
#[derive(Debug)]
struct Worker {
    encoder: Encoder,
    tiles: Vec<u8>,
    lens: Vec<usize>,
    checked: Vec<u8>,
}

impl Worker {
    /// Codes a run of tiles, and decodes each again: a defect here must not cost anybody a model.
    fn encode(&mut self, decoder: &Decoder, weights: &[u8]) -> Result<Duration> {
        let began = Instant::now();
        for tile in weights.chunks(TILE_BYTES) {
            let begin = self.tiles.len();
            self.encoder.encode(tile, &mut self.tiles);
            self.lens.push(self.tiles.len() - begin);
            let checked = &mut self.checked[..tile.len()];
            if decoder.decode(&self.tiles[begin..], checked).is_err() || checked != tile {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "weights that were compressed did not come back; nothing is written. This is a defect in flea: please report it",
                ));
            }
        }
        Ok(began.elapsed())
    }
}

/// The threads of one tensor.
#[derive(Debug)]
pub struct Team {
    decoder: Decoder,
    workers: Vec<Worker>,
    spent: Duration,
}

impl Team {
    /// A team with this table.
    pub fn new(frequencies: &Frequencies) -> Self {
        let worker = || Worker {
            encoder: Encoder::new(frequencies),
            tiles: Vec::new(),
            lens: Vec::new(),
            checked: vec![0; TILE_BYTES],
        };
        Self {
            decoder: Decoder::new(frequencies),
            workers: (0..threads()).map(|_| worker()).collect(),
            spent: Duration::ZERO,
        }
    }

    /// How long the threads coded, together.
    pub const fn spent(&self) -> Duration {
        self.spent
    }

    /// Codes weights; gives the tiles and their lengths, run by run.
    pub fn encode(&mut self, weights: &[u8]) -> Result<impl Iterator<Item = (&[u8], &[usize])>> {
        let tiles = weights.len().div_ceil(TILE_BYTES);
        let run_bytes = tiles.div_ceil(self.workers.len()).max(1) * TILE_BYTES;
        let decoder = &self.decoder;
        for worker in &mut self.workers {
            worker.tiles.clear();
            worker.lens.clear();
        }
        let runs = self.workers.iter_mut().zip(weights.chunks(run_bytes));
        self.spent += thread::scope(|scope| {
            let threads: Vec<_> = runs
                .map(|(worker, run)| scope.spawn(move || worker.encode(decoder, run)))
                .collect();
            join_all(threads)
        })?;
        let made = self.workers.iter();
        Ok(made.map(|worker| (worker.tiles.as_slice(), worker.lens.as_slice())))
    }
}

/// Tiles that were read, with where they lie in their coded tensor.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    pub places: &'a Places,
    /// What was read.
    pub bytes: &'a [u8],
    /// Where `bytes` begins in the coded tensor.
    pub at_bytes: u64,
}

/// Decodes the tiles `range`, all in `batch`, into `out`, which has exactly the room for them. A damaged one is told with
/// its offset in the coded tensor. Gives how long the threads took, together.
pub fn decode(
    decoder: &Decoder,
    batch: Batch<'_>,
    range: Range<u64>,
    out: &mut [u8],
) -> Result<Duration> {
    let run = (range.end - range.start).div_ceil(threads() as u64).max(1);
    let runs = out.chunks_mut(run as usize * TILE_BYTES);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(runs)
            .map(|(index, out)| {
                let first = range.start + index * run;
                scope.spawn(move || decode_run(decoder, batch, first, out))
            })
            .collect();
        join_all(threads)
    })
}

fn decode_run(decoder: &Decoder, batch: Batch<'_>, first: u64, out: &mut [u8]) -> Result<Duration> {
    let began = Instant::now();
    for (tile_index, out) in (first..).zip(out.chunks_mut(TILE_BYTES)) {
        let place = batch.places.tile(tile_index);
        let begin = (place.start - batch.at_bytes) as usize;
        let end = (place.end - batch.at_bytes) as usize;
        decoder
            .decode(&batch.bytes[begin..end], out)
            .map_err(|damage| damaged(tile_index, place.start, damage))?;
    }
    Ok(began.elapsed())
}

/// What they gave, added up; or the first error in the order of the runs, so that the same damage gives the same message.
fn join_all(threads: Vec<thread::ScopedJoinHandle<'_, Result<Duration>>>) -> Result<Duration> {
    let mut result = Ok(Duration::ZERO);
    for thread in threads {
        let ended = thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result = result.and_then(|sum| Ok(sum + ended?));
    }
    result
}
