//! Reads VRAM back: how a program without kernels sees what a GPU would compute with.
//!
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: a host that only looks.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::context::Context;
use super::pin::Pinned;
use super::stream::{Event, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::mem::Place;
use crate::units::MIB;

/// Most that can be on its way at a time.
pub const READ_BYTES_MAX: usize = (16 * MIB) as usize;

/// Pinned memory, and a stream of its own that copies into it.
#[derive(Debug)]
pub struct Readback {
    // In the order in which they have to go; `drop` waits for the stream first.
    stream: Stream,
    _pinned: Pinned,
    memory: Place,
    /// What is on its way, oldest first: where in the memory, and when it is there.
    coming: VecDeque<(Range<usize>, Event)>,
    /// How far the memory is taken.
    taken: usize,
}

impl Readback {
    /// Takes the memory.
    ///
    /// # Errors
    /// `NoMemory`; what the driver says. That memory cannot be pinned is no error: the driver then copies it aside.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let mut memory = Place::reserve(READ_BYTES_MAX as u64)?;
        memory.open()?;
        memory.populate(READ_BYTES_MAX)?;
        let (base, len) = (memory.address(), memory.len_bytes());
        let stream = Stream::new(context)?;
        // SAFETY: the place lives in the same value and is dropped after what pins it.
        let pinned = unsafe { Pinned::new(context, base, len, len) };
        pinned.pin_all();
        Ok(Self {
            stream,
            _pinned: pinned,
            memory,
            coming: VecDeque::new(),
            taken: 0,
        })
    }

    /// Whether so many bytes more can be asked for before others are taken.
    #[must_use]
    pub const fn has_room(&self, len: usize) -> bool {
        len <= READ_BYTES_MAX - self.taken
    }

    /// Asks for bytes of VRAM. They may change again once the event given is done.
    ///
    /// # Errors
    /// `Invalid` for more than there is room for; what the driver says.
    pub fn begin(&mut self, at: u64, len: usize) -> Result<Event> {
        if len == 0 || !self.has_room(len) {
            let text = format!(
                "{len} bytes cannot be read back beside {} others",
                self.taken
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let target = (self.memory.address() + self.taken) as *mut u8;
        // SAFETY: memory of this value; nobody looks at it before `finish` has waited, and drop waits too.
        unsafe { self.stream.copy_out(target, at, len)? };
        let place = self.taken..self.taken + len;
        self.coming.push_back((place, self.stream.record()?));
        self.taken += len;
        self.stream.record()
    }

    /// The oldest bytes asked for.
    ///
    /// # Errors
    /// `Invalid` when nothing was asked for; what the driver says.
    pub fn finish(&mut self) -> Result<&[u8]> {
        let Some((place, event)) = self.coming.pop_front() else {
            return Err(Error::new(ErrorKind::Invalid, "nothing is being read back"));
        };
        event.wait()?;
        if self.coming.is_empty() {
            self.taken = 0;
        }
        // SAFETY: the copy into it is done, and no other can begin while the slice lives.
        unsafe { self.memory.bytes(place.start, place.len()) }
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        // A GPU that is lost copies no more.
        if let Err(error) = self.stream.record().and_then(|event| event.wait()) {
            log::debug!("the end of a readback: {error}");
        }
    }
}
