//! Weights that arrive coded: tiles go into VRAM as they are, and the unpack kernel makes weights of them there.
//!
//! A few works in turn, each with room for tiles and for weights: while the kernel unpacks in one, the link fills the next. The
//! tiles, with a head before and their places behind them, are a coded tensor of their own. What was damaged is known when the
//! event of [`Unpacker::record`] is done, by the word that came back before it ([`Unpacker::is_damaged`]). Invariants: a work is
//! filled again only behind the kernel that read it; a word is used again only after [`WORDS`] others. One thread asks. Place
//! in `file -> catalog -> plan -> reader -> pool -> lease -> host`: from the pool in host memory to that in VRAM.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::area::{Span, VramArea};
use super::context::Context;
use super::kernels::{Coded, Kernels};
use super::pin::Pinned;
use super::stage::Stage;
use super::stream::{Event, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Place;
use crate::model::coded::HEAD_BYTES;
use crate::model::tiles::{TILE_BYTES, tile_count};
use crate::units::{MIB, PAGE_4K};

/// Works in turn: one is filled, one is unpacked, and two keep either from waiting.
const WORKS: usize = 4;
/// Requests that can be on their way at a time.
pub const WORDS: u32 = 1024;

/// Tiles that are a coded tensor of their own, but for what the caller copies.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Comes first.
    pub head: &'a [u8; HEAD_BYTES],
    /// Length of the tiles, which follow.
    pub tiles_bytes: u64,
    /// Come last.
    pub places: &'a [u8],
    /// Weights in the tiles.
    pub elements: u64,
}

/// Where works begin, in VRAM and in host memory.
const ALIGN_BYTES: u64 = 128;

/// Room for one batch.
#[derive(Debug)]
struct Work {
    coded: Span,
    weights: Span,
    /// In host memory, where head and places are copied from.
    around: Range<usize>,
    /// Behind the last copy into it, and behind the kernel that read it.
    filled: Option<Event>,
    free: Option<Event>,
}

/// What one thread does at a time.
#[derive(Debug)]
struct Turn {
    works: Vec<Work>,
    next: usize,
    next_word: u32,
}

/// See the module's head.
#[derive(Debug)]
pub struct Unpacker {
    // In the order in which they have to go; `drop` waits for the stream first.
    stream: Stream,
    kernels: Kernels,
    turn: Mutex<Turn>,
    words: Span,
    _area: VramArea,
    _pinned: Pinned,
    /// The words that came back, then what works copy heads and places from.
    memory: Place,
}

/// Bytes of weights that one batch can have: a piece, and a tile that it shares with the next.
const fn weights_bytes(piece_bytes: u64) -> u64 {
    piece_bytes.next_multiple_of(TILE_BYTES as u64) + TILE_BYTES as u64
}

/// Head and places of such a batch.
const fn around_bytes(piece_bytes: u64) -> u64 {
    let tiles = weights_bytes(piece_bytes) / TILE_BYTES as u64;
    (HEAD_BYTES as u64 + 4 * (tiles + 1)).next_multiple_of(ALIGN_BYTES)
}

/// Such a batch, coded: no tile is longer than its weights.
const fn coded_bytes(piece_bytes: u64) -> u64 {
    around_bytes(piece_bytes) + weights_bytes(piece_bytes)
}

impl Unpacker {
    /// VRAM that one for pieces of so many bytes takes.
    #[must_use]
    pub const fn vram_bytes(piece_bytes: u64) -> u64 {
        let work = coded_bytes(piece_bytes) + weights_bytes(piece_bytes);
        (WORDS as u64 * 4 + WORKS as u64 * work).next_multiple_of(2 * MIB)
    }

    /// One for pieces of at most so many bytes of weights.
    ///
    /// # Errors
    /// `NoMemory`; those of [`Kernels::load`]; what else the driver says.
    pub fn new(context: &Arc<Context>, piece_bytes: u64) -> Result<Self> {
        let words_bytes = u64::from(4 * WORDS);
        let around = around_bytes(piece_bytes) as usize;
        let len = words_bytes as usize + WORKS * around;
        let mut memory = Place::reserve((len as u64).next_multiple_of(PAGE_4K))?;
        memory.open()?;
        memory.populate(memory.len_bytes())?;
        let (base, len) = (memory.address(), memory.len_bytes());
        // SAFETY: the place lives in the same value and is dropped after what pins it.
        let pinned = unsafe { Pinned::new(context, base, len, len) };
        pinned.pin_all();
        let area = VramArea::new(context, Self::vram_bytes(piece_bytes))?;
        let words = area.span(0, words_bytes)?;
        let (coded, weights) = (coded_bytes(piece_bytes), weights_bytes(piece_bytes));
        let mut works = Vec::with_capacity(WORKS);
        for index in 0..WORKS {
            let begin = words_bytes as usize + index * around;
            let at = words_bytes + index as u64 * (coded + weights);
            works.push(Work {
                coded: area.span(at, coded)?,
                weights: area.span(at + coded, weights)?,
                around: begin..begin + around,
                filled: None,
                free: None,
            });
        }
        Ok(Self {
            stream: Stream::new(context)?,
            kernels: Kernels::load(context)?,
            turn: Mutex::new(Turn {
                works,
                next: 0,
                next_word: 0,
            }),
            words,
            _area: area,
            _pinned: pinned,
            memory,
        })
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A word for the batches of one request.
    ///
    /// # Errors
    /// What the driver says.
    pub fn begin(&self) -> Result<u32> {
        let mut turn = self.turn();
        let word = turn.next_word;
        turn.next_word = (word + 1) % WORDS;
        self.stream.fill(self.word(word)?.at(), 0xFF, 4)?;
        Ok(word)
    }

    fn word(&self, word: u32) -> Result<Span> {
        Span::inside(
            self.words.at(),
            self.words.len_bytes(),
            u64::from(4 * word),
            4,
        )
    }

    /// Has a batch unpacked, and bytes `part` of its weights at `to`, behind everything asked of `stage`. `copy_tiles` asks
    /// `stage` to copy the tiles to the address it is given.
    ///
    /// # Errors
    /// `Invalid` for a batch that has no room; what `copy_tiles` gives; what the driver says.
    pub fn unpack(
        &self,
        stage: &Stage,
        batch: &Batch<'_>,
        copy_tiles: impl FnOnce(u64) -> Result<()>,
        (part, to): (Range<u64>, u64),
        word: u32,
    ) -> Result<()> {
        let mut turn = self.turn();
        let index = turn.next;
        turn.next = (index + 1) % WORKS;
        let work = &mut turn.works[index];
        let (head_bytes, places_bytes) = (HEAD_BYTES as u64, batch.places.len() as u64);
        let whole = work
            .coded
            .first(head_bytes + batch.tiles_bytes + places_bytes)?;
        let weights = work.weights.first(2 * batch.elements)?;
        if part.is_empty() || part.end > weights.len_bytes() {
            let context = format!("bytes {part:?} of {} weights", batch.elements);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if let Some(free) = work.free.take() {
            stage.wait(&free)?;
        }
        self.copy_around(stage, work, batch)?;
        copy_tiles(whole.at() + head_bytes)?;
        let filled = stage.record()?;
        self.stream.wait(&filled)?;
        work.filled = Some(filled);
        let coded = Coded {
            bytes: whole,
            elements: batch.elements,
        };
        let tiles = 0..tile_count(batch.elements);
        self.kernels
            .unpack(&self.stream, coded, tiles, weights, self.word(word)?)?;
        let len = (part.end - part.start) as usize;
        self.stream
            .copy_within(to, weights.at() + part.start, len)?;
        work.free = Some(self.stream.record()?);
        Ok(())
    }

    /// Head and places, out of pinned memory of this work's own.
    fn copy_around(&self, stage: &Stage, work: &Work, batch: &Batch<'_>) -> Result<()> {
        if let Some(filled) = &work.filled {
            filled.wait()?;
        }
        let (head, places) = (batch.head.as_slice(), batch.places);
        if head.len() + places.len() > work.around.len() {
            let context = format!("{} bytes of places have no room", places.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let at = (self.memory.address() + work.around.start) as *mut u8;
        let behind = work.coded.at() + head.len() as u64 + batch.tiles_bytes;
        // SAFETY: this work's part of the memory, bounded above; the copies out of it that were asked for before are done, and
        // nobody writes it again before these are.
        unsafe {
            at.copy_from_nonoverlapping(head.as_ptr(), head.len());
            at.add(head.len())
                .copy_from_nonoverlapping(places.as_ptr(), places.len());
            stage.copy_pinned(work.coded.at(), at, head.len())?;
            stage.copy_pinned(behind, at.add(head.len()), places.len())
        }
    }

    /// Sets a mark behind everything asked of `stage` and of this one, and behind the way back of a request's word.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self, stage: &Stage, word: u32) -> Result<Event> {
        self.stream.wait(&stage.record()?)?;
        let to = (self.memory.address() + 4 * word as usize) as *mut u8;
        // SAFETY: a word of this value's memory, read only behind the event.
        unsafe { self.stream.copy_out(to, self.word(word)?.at(), 4)? };
        self.stream.record()
    }

    /// Whether a tile of a request was damaged; to be asked when the event of its [`Unpacker::record`] is done.
    #[must_use]
    pub fn is_damaged(&self, word: u32) -> bool {
        let at = (self.memory.address() + 4 * word as usize) as *const u32;
        // SAFETY: an aligned word of this value's memory, whose copy is done.
        unsafe { at.read_volatile() != super::NO_DAMAGE }
    }
}

impl Drop for Unpacker {
    fn drop(&mut self) {
        // A GPU that is lost does nothing more.
        if let Err(error) = self.stream.record().and_then(|event| event.wait()) {
            log::debug!("the end of unpacking: {error}");
        }
    }
}
