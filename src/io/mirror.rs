//! Several copies of a model on several drives: each request goes to the copy that will have it first.
//!
//! A wrapper around one [`Reader`] whose files are the shards of every copy, one copy behind the other. Every copy has a
//! queue of its own, as long as the fastest copy takes for its depth: a slow drive gets what it can do in that time, and one
//! that cannot do a single request nothing but a probe now and then. A copy that fails is dropped, its requests go to the
//! others, and it is said. Invariants: bytes are handed out only from copies that had not changed when the last of them was
//! read; a request whose memory the kernel keeps is never asked for again. Without mirrors every call is passed on as it is.
//! Place: `reader` of `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

mod lanes;
mod probe;
mod same;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{
    Completion, Counters, DEPTH_MOST, Reader, ReaderKind, ReaderOptions, Request, ShardFile, Waker,
    default_depth, default_request_bytes,
};
use crate::error::{Error, ErrorKind, Result};
use crate::units::PAGE_2M;

use lanes::{Sent, Spread};
pub use same::{MIRRORS_MAX, open};

/// How long a dropped reader waits for its probe.
const DROP_BOUND: Duration = Duration::from_secs(2);

/// What is known about each copy, for whoever shows it.
#[derive(Debug)]
pub struct Copies(Vec<Source>);

#[derive(Debug)]
struct Source {
    directory: PathBuf,
    bytes: AtomicU64,
    dropped: AtomicBool,
}

/// One copy's figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyStats {
    /// Where it lies.
    pub directory: PathBuf,
    /// What was read from it.
    pub bytes_read: u64,
    /// It failed and is used no more.
    pub is_dropped: bool,
}

impl Copies {
    /// The copies in `files`, each of `shards_count` shards.
    #[must_use]
    pub fn new(files: &[ShardFile], shards_count: usize) -> Self {
        let firsts = files.iter().step_by(shards_count.max(1));
        let copies = firsts.map(|file| Source {
            directory: file.path().parent().unwrap_or(Path::new(".")).to_path_buf(),
            bytes: AtomicU64::new(0),
            dropped: AtomicBool::new(false),
        });
        Self(copies.collect())
    }

    /// How many there are, the model itself included.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether somebody found that it cannot be used.
    pub(super) fn is_dropped(&self, copy: usize) -> bool {
        self.0[copy].dropped.load(Ordering::Relaxed)
    }

    fn directory(&self, copy: usize) -> &Path {
        &self.0[copy].directory
    }

    /// A copy is used no more; said once.
    pub(super) fn drop_one(&self, copy: usize, reason: &Error) {
        if !self.0[copy].dropped.swap(true, Ordering::Relaxed) {
            log::warn!(
                "the copy in {} is used no more: {reason}",
                self.directory(copy).display()
            );
        }
    }

    /// All copies, the model itself first; nothing where there is only the model.
    #[must_use]
    pub fn stats(&self) -> Vec<CopyStats> {
        if self.0.len() == 1 {
            return Vec::new();
        }
        let copies = self.0.iter().map(|copy| CopyStats {
            directory: copy.directory.clone(),
            bytes_read: copy.bytes.load(Ordering::Relaxed),
            is_dropped: copy.dropped.load(Ordering::Relaxed),
        });
        copies.collect()
    }
}

/// A reader over all copies of a model. Submit and wait from one thread.
#[derive(Debug)]
pub struct Mirrored {
    reader: Reader,
    files: Arc<[ShardFile]>,
    shards_count: usize,
    spread: Option<Spread>,
}

impl Mirrored {
    /// A reader over `files`: the shards of the model, and behind them those of each copy. `options.depth` counts for each.
    ///
    /// # Errors
    /// Those of [`Reader::new`].
    pub fn new(
        files: Arc<[ShardFile]>,
        copies: Arc<Copies>,
        options: &ReaderOptions,
    ) -> Result<Self> {
        let copies_count = copies.count().max(1);
        let shards_count = files.len() / copies_count;
        if copies_count == 1 {
            return Ok(Self {
                reader: Reader::new(Arc::clone(&files), options)?,
                files,
                shards_count,
                spread: None,
            });
        }
        let mut options = options.clone();
        if options.request_bytes == 0 {
            let page_bytes = if options.page_bytes == 0 {
                PAGE_2M
            } else {
                options.page_bytes
            };
            options.request_bytes = default_request_bytes(page_bytes);
        }
        if options.depth == 0 {
            options.depth = default_depth(options.request_bytes);
        }
        let depth = options.depth.min(DEPTH_MOST / copies_count as u32).max(1);
        options.depth = depth * copies_count as u32;
        options.drives_count = copies_count as u32;
        let spread = Spread::new(copies, depth, u64::from(options.request_bytes))?;
        Ok(Self {
            reader: Reader::new(Arc::clone(&files), &options)?,
            files,
            shards_count,
            spread: Some(spread),
        })
    }

    /// See [`Reader::kind`].
    #[must_use]
    pub const fn kind(&self) -> ReaderKind {
        self.reader.kind()
    }

    /// See [`Reader::fallback`].
    #[must_use]
    pub fn fallback(&self) -> Option<String> {
        self.reader.fallback()
    }

    /// See [`Reader::free`].
    #[must_use]
    pub fn free(&self) -> usize {
        let free = self.reader.free();
        self.spread
            .as_ref()
            .map_or(free, |spread| spread.free().min(free))
    }

    /// See [`Reader::in_flight`].
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match &self.spread {
            Some(spread) => spread.sent.len() - usize::from(spread.probe.is_out()),
            None => self.reader.in_flight(),
        }
    }

    /// See [`Reader::waker`].
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.reader.waker()
    }

    /// See [`Reader::counters`].
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.reader.counters()
    }

    /// See [`Reader::drain`].
    pub fn drain(&mut self, bound: Duration) -> Vec<u64> {
        let mut kept = self.reader.drain(bound);
        if let Some(spread) = &mut self.spread
            && spread.probe.is_out()
        {
            spread.probe.came_back(!kept.contains(&probe::KEY));
        }
        kept.retain(|key| *key != probe::KEY);
        kept
    }

    /// Looks whether a shard is what it was when it was opened, and each of its copies. A copy that is not is dropped and the
    /// others go on: its bytes were looked at as they came ([`Mirrored::wait`]). A change of the model itself is an error
    /// each time: catalog, rows and what the host keeps are from there.
    ///
    /// # Errors
    /// As [`ShardFile::check_unchanged`], for the model and for the last copy that is left.
    pub fn check_unchanged(&mut self, shard_index: u32) -> Result<()> {
        let Some(spread) = &mut self.spread else {
            return self.files[shard_index as usize].check_unchanged();
        };
        let mut outcome = Ok(());
        for lane in 0..spread.lanes.len() {
            let is_model = lane == 0;
            if spread.lanes[lane].is_dropped && !is_model {
                continue;
            }
            let file = &self.files[lane * self.shards_count + shard_index as usize];
            if let Err(error) = file.check_unchanged() {
                let others_go_on = spread.drop_lane(lane, &error);
                if !others_go_on || (is_model && is_change(&error)) {
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    /// Takes a request for a shard of the model; which copy serves it is decided here.
    ///
    /// # Errors
    /// As [`Reader::submit`].
    ///
    /// # Safety
    /// As [`Reader::submit`].
    pub unsafe fn submit(&mut self, request: Request) -> Result<()> {
        let Some(spread) = &self.spread else {
            // SAFETY: the caller's promise is the same.
            return unsafe { self.reader.submit(request) };
        };
        let lane = spread
            .choose(request.len_bytes, false)
            .ok_or_else(|| Error::new(ErrorKind::Busy, "mirrors: every copy has its requests"))?;
        // SAFETY: the caller's promise is the same.
        unsafe { self.send(request, lane) }
    }

    /// # Safety
    /// As [`Reader::submit`].
    unsafe fn send(&mut self, request: Request, lane: usize) -> Result<()> {
        let shard_index = (lane * self.shards_count) as u32 + request.shard_index;
        let aimed = Request {
            shard_index,
            ..request
        };
        // SAFETY: by this function's contract; only the file differs.
        unsafe { self.reader.submit(aimed)? };
        if let Some(spread) = &mut self.spread {
            spread.lanes[lane].begin(request.len_bytes, Instant::now());
            spread.sent.push(Sent { request, lane });
        }
        Ok(())
    }

    /// See [`Reader::flush`].
    ///
    /// # Errors
    /// Those of [`Reader::flush`].
    pub fn flush(&mut self) -> Result<()> {
        self.reader.flush()
    }

    /// See [`Reader::wait`]. A read that failed, or whose file was written to before its last byte was here, is asked of
    /// another copy, and only when there is none it is a completion.
    ///
    /// # Errors
    /// As [`Reader::wait`].
    pub fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) -> Result<()> {
        self.probe()?;
        let Some(spread) = &mut self.spread else {
            return self.reader.wait(timeout, out);
        };
        let mut sorted = std::mem::take(&mut spread.sorted);
        self.reader.wait(timeout, &mut sorted)?;
        spread.look(Instant::now());
        for completion in sorted.drain(..) {
            if let Some(completion) = self.settle(completion)? {
                out.push(completion);
            }
        }
        if let Some(spread) = &mut self.spread {
            spread.sorted = sorted;
        }
        Ok(())
    }

    /// Tries a copy that is left out, where it is time for that and there is something to read at all.
    fn probe(&mut self) -> Result<()> {
        let room = self.reader.free() > 0;
        let Some(spread) = self.spread.as_mut().filter(|_| room) else {
            return Ok(());
        };
        let Some(like) = spread.sent.last().map(|sent| sent.request) else {
            return Ok(());
        };
        let Some((request, lane)) = spread.probe.request(&like).zip(spread.probe_due()) else {
            return Ok(());
        };
        spread.probe.went_out();
        // SAFETY: the memory is the probe's own, in use for no other read, and given up where the kernel keeps it.
        let sent = unsafe { self.send(request, lane) };
        if let (Err(_), Some(spread)) = (&sent, &mut self.spread) {
            spread.probe.came_back(true);
        }
        sent
    }

    /// Books a completion; `None` when its request was sent to another copy, or was a probe.
    fn settle(&mut self, completion: Completion) -> Result<Option<Completion>> {
        let Some(spread) = &mut self.spread else {
            return Ok(Some(completion));
        };
        let place = spread
            .sent
            .iter()
            .position(|sent| sent.request.key == completion.key);
        let Some(place) = place else {
            return Ok(Some(completion));
        };
        let Sent { request, lane } = spread.sent.swap_remove(place);
        spread.end(lane, request.len_bytes);
        let is_probe = request.key == probe::KEY;
        if is_probe {
            spread.probe.came_back(completion.returned);
        }
        let file = &self.files[lane * self.shards_count + request.shard_index as usize];
        // Each request answers for itself, by a look (an fstat, below a microsecond) at its file after its last byte. One
        // look for a whole fetch comes too late: another fetch may have had the copy dropped in between.
        let failure = match &completion.result {
            Ok(()) => file.check_unchanged().err(),
            Err(error) => Some(error.clone()),
        };
        let Some(error) = failure else {
            let held = file.len_bytes().saturating_sub(request.offset_bytes);
            let bytes = request.len_bytes.min(held);
            spread.copies.0[lane]
                .bytes
                .fetch_add(bytes, Ordering::Relaxed);
            return Ok((!is_probe).then_some(completion));
        };
        spread.drop_lane(lane, &error);
        if is_probe {
            return Ok(None);
        }
        let failed = Completion {
            result: Err(error),
            ..completion
        };
        let other = spread.choose(request.len_bytes, true);
        match other.filter(|&other| failed.returned && other != lane) {
            // SAFETY: the memory is the submitter's until a completion is handed out, and this one is not.
            Some(other) => match unsafe { self.send(request, other) } {
                Ok(()) => Ok(None),
                Err(_) => Ok(Some(failed)),
            },
            None => Ok(Some(failed)),
        }
    }

    /// The length to cut requests to.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        self.spread.as_ref().map_or_else(
            || u64::from(self.reader.request_bytes()),
            |spread| spread.request_bytes,
        )
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        // The probe's memory must not go before the kernel is done with it.
        let is_out = |spread: &Spread| spread.probe.is_out();
        if self.spread.as_ref().is_some_and(is_out) {
            self.drain(DROP_BOUND);
        }
    }
}

/// The file was written to, as opposed to a drive that does not answer.
pub(super) const fn is_change(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Changed | ErrorKind::Truncated)
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
