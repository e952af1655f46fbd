//! Reads a file round and round through a [`Reader`] for a while: what `flea bench raw` and `flea probe` measure with.
//!
//! Invariant: safe to call, because the memory is owned for the time of the reading and, should the kernel keep a
//! request, leaked instead of freed. Place: a user of `reader` in `file -> catalog -> plan -> reader -> pool -> ...`.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{AlignedMemory, Completion, Reader, ReaderOptions, Request, ShardFile};
use crate::error::{Error, ErrorKind, Result};

/// How long a reader may take to give its memory back after a measurement.
const DRAIN_BOUND: Duration = Duration::from_secs(5);

/// What was read, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Swept {
    /// Bytes of the file that arrived.
    pub bytes: u64,
    /// From the first submit to the last completion.
    pub wall: Duration,
}

/// In which order requests are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// One behind the other.
    #[default]
    Sequential,
    /// Anywhere in the file; the number is where the dice stand.
    Random(u64),
}

/// Where to go on reading: the sweep's points continue each other, so that none re-reads what a drive's cache holds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    /// Offset of the next request.
    pub offset_bytes: u64,
    /// What comes after it.
    pub order: Order,
}

impl Cursor {
    /// The offset of the next request, within the file, and a step on.
    fn take(&mut self, request_bytes: u64, file_bytes: u64) -> u64 {
        match &mut self.order {
            Order::Sequential => {
                if self.offset_bytes >= file_bytes {
                    self.offset_bytes = 0;
                }
                let offset_bytes = self.offset_bytes;
                self.offset_bytes += request_bytes;
                offset_bytes
            }
            Order::Random(state) => {
                // xorshift64*: the upper half of the product is as good as dice get for this.
                *state ^= *state >> 12;
                *state ^= *state << 25;
                *state ^= *state >> 27;
                let dice = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
                // Whole requests only: a short one at the end would count as a fast one.
                dice % (file_bytes / request_bytes).max(1) * request_bytes
            }
        }
    }
}

/// Reads shard 0 in the cursor's order, around its end if need be, for `span`, into `memory`, which is lent and comes back.
///
/// # Errors
/// The first failed read; `NoMemory` when the memory is smaller than depth times request. The memory is gone when the
/// kernel did not give it back.
pub fn sweep(
    files: &Arc<[ShardFile]>,
    options: &ReaderOptions,
    memory: AlignedMemory,
    cursor: &mut Cursor,
    span: Duration,
) -> Result<(Swept, AlignedMemory)> {
    let mut reader = Reader::new(Arc::clone(files), options)?;
    let result = run(&mut reader, &memory, cursor, files[0].len_bytes(), span);
    let kept = reader.drain(DRAIN_BOUND);
    if !kept.is_empty() {
        memory.leak();
        return Err(result.err().unwrap_or_else(|| {
            Error::new(ErrorKind::Timeout, "reads never came back from the kernel")
        }));
    }
    Ok((result?, memory))
}

fn run(
    reader: &mut Reader,
    memory: &AlignedMemory,
    cursor: &mut Cursor,
    file_bytes: u64,
    span: Duration,
) -> Result<Swept> {
    let request_bytes = u64::from(reader.request_bytes());
    let depth = reader.free() as u64;
    if depth * request_bytes > memory.len_bytes() {
        return Err(Error::new(
            ErrorKind::NoMemory,
            format!(
                "{depth} requests of {request_bytes} bytes do not fit into {} bytes",
                memory.len_bytes()
            ),
        ));
    }
    // Oldest place first: with more memory than is in flight the reading walks through all of it, as streaming does.
    let mut places: VecDeque<u64> = (0..memory.len_bytes() / request_bytes).collect();
    let mut out: Vec<Completion> = Vec::with_capacity(depth as usize);
    let mut bytes = 0;
    let start = Instant::now();
    loop {
        while reader.free() > 0 && start.elapsed() < span {
            let Some(place) = places.pop_front() else {
                break;
            };
            let offset_bytes = cursor.take(request_bytes, file_bytes);
            let request = Request {
                key: place,
                shard_index: 0,
                offset_bytes,
                len_bytes: request_bytes,
                // SAFETY: place < len_bytes / request_bytes, so the whole place lies within the memory.
                target: unsafe { memory.as_ptr().add((place * request_bytes) as usize) },
            };
            // SAFETY: a place is used by one request at a time; the memory lives until the reader is drained, and is
            // leaked if that fails.
            unsafe { reader.submit(request)? };
            bytes += request_bytes.min(file_bytes - offset_bytes);
        }
        if reader.in_flight() == 0 {
            break;
        }
        reader.wait(None, &mut out)?;
        for completion in out.drain(..) {
            completion.result?;
            places.push_back(completion.key);
        }
    }
    Ok(Swept {
        bytes,
        wall: start.elapsed(),
    })
}
