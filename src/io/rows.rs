//! The row reader: rows of a table in a shard, fetched by their ids, a few pages each, and never the whole table.
//!
//! Embeddings are such tables: of hundreds of thousands of rows a token needs one. A call gets any number of ids. Their
//! pages are looked up in a small cache of 4 KiB pages; what is missing is read with O_DIRECT, many reads in flight,
//! pages side by side in one read, a page that several rows share once. Rows are copied out as their pages arrive, so
//! nothing is pinned and a call may be larger than the cache.
//!
//! Invariants: all memory is taken and prefaulted when the reader is made, within a budget; a place that the kernel
//! reads into belongs to one read; a page enters the cache only after its last byte arrived; a call either fills all of
//! its output or fails, and nothing of a call that failed stays in the cache. Where there are copies of the model, one whose
//! drive fails is used no more and the next one serves.
//! Place: a user of `reader` in `file -> catalog -> plan -> reader -> pool -> lease -> host`.
#![allow(unsafe_code)]

mod cache;
mod options;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use super::fault::Faults;
use super::mirror::{Copies, is_change};
use super::{AlignedMemory, Completion, Reader, ReaderKind, ReaderOptions, Request, ShardFile};
use crate::error::{Error, ErrorKind, Result};

use crate::units::PAGE_4K;
pub use options::{RowOptions, RowTable};

use cache::PageCache;
use options::slots_within;

/// How long a dropped reader waits for its reads.
const DRAIN_BOUND: Duration = Duration::from_secs(5);
/// No want follows.
const NONE: u32 = u32::MAX;

/// What was asked for, and what it took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowCounters {
    /// Rows handed out.
    pub rows: u64,
    /// Pages that rows lay in, counted for each row.
    pub page_uses: u64,
    /// Of those: found in the cache.
    pub page_hits: u64,
    /// Of those: on their way already, for another row of the same call.
    pub page_shared: u64,
    /// Reads submitted.
    pub reads: u64,
    /// Bytes those asked for, whole pages.
    pub bytes: u64,
}

/// One read being put together or in flight.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Pages of the table, relative to its first.
    first_page: u32,
    pages_count: u32,
    /// The first of the wants that it serves.
    wants: u32,
}

impl Run {
    const fn holds(&self, page: u32) -> bool {
        self.first_page <= page && page < self.first_page + self.pages_count
    }
}

/// A row of the call that waits for a run. One row can wait for several.
#[derive(Debug, Clone, Copy)]
struct Want {
    id: u32,
    /// Place in the caller's list.
    index: u32,
    next: u32,
}

/// Reads rows of one table. Any thread, one at a time.
#[derive(Debug)]
pub struct RowReader {
    table: RowTable,
    files: Arc<[ShardFile]>,
    /// The copies that the files are, one behind the other; `None` where there is one.
    copies: Option<Arc<Copies>>,
    /// The one that is read.
    copy: usize,
    reader: Reader,
    /// `None` only while it is dropped.
    memory: Option<AlignedMemory>,
    read_bytes: u64,
    /// Where in the file the table's first page begins.
    base_bytes: u64,
    cache: PageCache,
    cache_begin: usize,
    runs: Vec<Run>,
    /// Places of the staging memory that no read uses.
    vacant: Vec<u32>,
    /// The run to be submitted next, while it grows.
    open: Option<Run>,
    wants: Vec<Want>,
    order: Vec<(u32, u32)>,
    completions: Vec<Completion>,
    /// The reader failed as a whole: what is in flight is unknown.
    broken: bool,
    counters: RowCounters,
    memory_bytes: u64,
}

impl RowReader {
    /// A reader of `table`, with all its memory.
    ///
    /// # Errors
    /// `Invalid` for a table that is not in its file or options out of range; `Refused` for a budget that does not hold
    /// the reads in flight; `NoMemory`; those of [`Reader::new`].
    pub fn new(files: Arc<[ShardFile]>, table: RowTable, options: &RowOptions) -> Result<Self> {
        Self::with_faults((files, None), table, options, Faults::from_env()?)
    }

    /// [`RowReader::new`] where the files are `copies` of a model, one behind the other: if the drive of one fails, the next one
    /// serves.
    ///
    /// # Errors
    /// As [`RowReader::new`].
    pub fn of_copies(
        files: Arc<[ShardFile]>,
        copies: Arc<Copies>,
        table: RowTable,
        options: &RowOptions,
    ) -> Result<Self> {
        let files = (files, Some(copies));
        Self::with_faults(files, table, options, Faults::from_env()?)
    }

    /// With faults given instead of read from the environment.
    fn with_faults(
        (files, copies): (Arc<[ShardFile]>, Option<Arc<Copies>>),
        table: RowTable,
        options: &RowOptions,
        faults: Faults,
    ) -> Result<Self> {
        options.check()?;
        table.check(&files)?;
        let base_bytes = table.offset_bytes / PAGE_4K * PAGE_4K;
        let end_bytes = table.end_bytes().unwrap_or(u64::MAX);
        let pages_count = u32::try_from((end_bytes - base_bytes).div_ceil(PAGE_4K))
            .ok()
            .filter(|count| *count < NONE)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "a table of 16 TiB and more"))?;
        let slots = slots_within(options, pages_count)?;
        let staging_bytes = options.staging_bytes();
        let memory = AlignedMemory::new(staging_bytes + u64::from(slots) * PAGE_4K, PAGE_4K)?;
        let reader_options = ReaderOptions {
            kind: options.reader,
            request_bytes: options.read_bytes,
            depth: options.depth,
            page_bytes: PAGE_4K,
            // A call leaves nothing in flight.
            any_thread: true,
            drives_count: copies.as_ref().map_or(1, |copies| copies.count() as u32),
            ..ReaderOptions::default()
        };
        let depth = options.depth as usize;
        Ok(Self {
            table,
            reader: Reader::with_faults(Arc::clone(&files), &reader_options, faults)?,
            files,
            copies,
            copy: 0,
            memory_bytes: memory.len_bytes()
                + PageCache::account_bytes(options.policy, pages_count, slots),
            memory: Some(memory),
            read_bytes: u64::from(options.read_bytes),
            base_bytes,
            cache: PageCache::new(options.policy, pages_count, slots),
            cache_begin: staging_bytes as usize,
            runs: vec![
                Run {
                    first_page: 0,
                    pages_count: 0,
                    wants: NONE
                };
                depth
            ],
            vacant: (0..options.depth).rev().collect(),
            open: None,
            wants: Vec::new(),
            order: Vec::new(),
            completions: Vec::with_capacity(depth),
            broken: false,
            counters: RowCounters::default(),
        })
    }

    /// Which file the table is read from.
    fn shard_index(&self) -> u32 {
        let copies_count = self.copies.as_ref().map_or(1, |copies| copies.count());
        let shards_count = self.files.len() / copies_count.max(1);
        (self.copy * shards_count) as u32 + self.table.shard_index
    }

    fn file(&self) -> &ShardFile {
        &self.files[self.shard_index() as usize]
    }

    /// The table.
    #[must_use]
    pub const fn table(&self) -> RowTable {
        self.table
    }

    /// What it did so far.
    #[must_use]
    pub const fn counters(&self) -> RowCounters {
        self.counters
    }

    /// What the kernel delivered.
    #[must_use]
    pub fn reader_counters(&self) -> super::Counters {
        self.reader.counters()
    }

    /// Which reader it became.
    #[must_use]
    pub const fn reader_kind(&self) -> ReaderKind {
        self.reader.kind()
    }

    /// Everything that is less than asked for: threads instead of io_uring, the page cache instead of O_DIRECT.
    #[must_use]
    pub fn fallbacks(&self) -> Vec<String> {
        let file = self.file();
        let mut fallbacks: Vec<String> = self.reader.fallback().into_iter().collect();
        fallbacks.extend(file.direct().fallback().map(str::to_owned));
        fallbacks
    }

    /// All memory it holds: at most the budget, rounded up to 2 MiB. Lists of a call grow with its ids, 20 bytes each.
    #[must_use]
    pub const fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Pages that the cache has room for.
    #[must_use]
    pub const fn cache_pages(&self) -> u32 {
        self.cache.capacity()
    }

    /// The rows of `ids`, one behind the other, into `out`. Ids may come in any order and more than once.
    ///
    /// # Errors
    /// `Invalid` for an id that the table does not have, or an `out` of another length; `Changed` or `Truncated` when
    /// the file was written to; `Io`, `Timeout` when the drive fails. What is in `out` then means nothing.
    pub fn read(&mut self, ids: &[u32], out: &mut [u8]) -> Result<()> {
        self.check_call(ids, out)?;
        self.pass_over_dropped();
        while let Err(error) = self.read_from_one(ids, out) {
            // A file that turned out to have changed has left pages there.
            self.cache.clear();
            self.turn_to_next(error)?;
        }
        self.counters.rows += ids.len() as u64;
        Ok(())
    }

    /// What the stream found out about copies need not be found out again.
    fn pass_over_dropped(&mut self) {
        let Some(copies) = &self.copies else { return };
        while self.copy + 1 < copies.count() && copies.is_dropped(self.copy) {
            self.copy += 1;
        }
    }

    /// The next copy, after one whose drive failed, or one other than the model itself that was written to.
    ///
    /// # Errors
    /// `error`, where the next copy would be no answer to it or there is none.
    fn turn_to_next(&mut self, error: Error) -> Result<()> {
        let is_of_copy = match error.kind() {
            ErrorKind::Io | ErrorKind::Timeout => true,
            _ => is_change(&error) && self.copy > 0,
        };
        let copies = self
            .copies
            .as_ref()
            .filter(|copies| is_of_copy && !self.broken && self.copy + 1 < copies.count());
        let Some(copies) = copies else {
            return Err(error);
        };
        copies.drop_one(self.copy, &error);
        self.copy += 1;
        Ok(())
    }

    /// The whole call, from the copy that is in use.
    fn read_from_one(&mut self, ids: &[u32], out: &mut [u8]) -> Result<()> {
        self.wants.clear();
        self.order.clear();
        self.order.extend(ids.iter().copied().zip(0..));
        // By place in the file: neighbours and equals come one after the other.
        self.order.sort_unstable();
        let reads_before = self.counters.reads;
        let mut result = self.fetch_all(out);
        // Also after a failure: no read of this call may outlive it, its places and wants are used again.
        self.open = None;
        while self.reader.in_flight() > 0 && !self.broken {
            result = result.and(self.reap(out));
        }
        result?;
        self.repeat(out);
        if self.counters.reads > reads_before {
            self.file().check_unchanged()?;
        }
        Ok(())
    }

    /// Starts all reads of the call.
    fn fetch_all(&mut self, out: &mut [u8]) -> Result<()> {
        let mut before = None;
        for next in 0..self.order.len() {
            let (id, index) = self.order[next];
            if before == Some(id) {
                let pages = self.pages_of(id).count() as u64;
                self.counters.page_uses += pages;
                self.counters.page_shared += pages;
            } else {
                self.fetch(id, index, out)?;
            }
            before = Some(id);
        }
        self.submit_open(out)
    }

    /// Rows asked for more than once were fetched once.
    fn repeat(&self, out: &mut [u8]) {
        let row_bytes = self.table.row_bytes as usize;
        for pair in self.order.windows(2) {
            let ((id, from), (same, to)) = (pair[0], pair[1]);
            if id == same {
                let from = from as usize * row_bytes;
                out.copy_within(from..from + row_bytes, to as usize * row_bytes);
            }
        }
    }

    fn check_call(&self, ids: &[u32], out: &[u8]) -> Result<()> {
        let path = self.file().path().display();
        if self.broken {
            let context = format!("{path}: the row reader failed before; make another one");
            return Err(Error::new(ErrorKind::Io, context));
        }
        let count = self.table.rows_count;
        if let Some(id) = ids.iter().find(|id| **id >= count) {
            let context = format!("{path}: row {id} of a table of {count} rows");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let wanted = (ids.len() as u64).checked_mul(self.table.row_bytes);
        if wanted != Some(out.len() as u64) || ids.len() >= NONE as usize {
            let context = format!(
                "{path}: {} rows of {} bytes do not go into {} bytes",
                ids.len(),
                self.table.row_bytes,
                out.len()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }

    /// Where a row lies, from the table's first page on.
    fn row_begin(&self, id: u32) -> u64 {
        self.table.offset_bytes - self.base_bytes + u64::from(id) * self.table.row_bytes
    }

    /// The pages of a row, from the table's first page on.
    fn pages_of(&self, id: u32) -> std::ops::RangeInclusive<u32> {
        let begin = self.row_begin(id);
        let last = begin + self.table.row_bytes - 1;
        // Both below pages_count.
        (begin / PAGE_4K) as u32..=(last / PAGE_4K) as u32
    }

    /// Copies what is in the cache and sees to it that the rest is read.
    fn fetch(&mut self, id: u32, index: u32, out: &mut [u8]) -> Result<()> {
        let mut told = false;
        for page in self.pages_of(id) {
            self.counters.page_uses += 1;
            if let Some(slot) = self.cache.find(page) {
                self.counters.page_hits += 1;
                let from = self.cache_begin + slot as usize * PAGE_4K as usize;
                self.copy(index, id, (page, 1), from, out);
                continue;
            }
            // A page that rows share is the last of one and the first of the next: the open run has it.
            if self.open.is_some_and(|run| run.holds(page)) {
                self.counters.page_shared += 1;
            } else if self.extend(page, out)? {
                told = false;
            }
            if !told {
                self.want(id, index);
                told = true;
            }
        }
        Ok(())
    }

    /// Adds a page to the open run, or opens another one; true then.
    fn extend(&mut self, page: u32, out: &mut [u8]) -> Result<bool> {
        let most = (self.read_bytes / PAGE_4K) as u32;
        if let Some(run) = &mut self.open
            && run.first_page + run.pages_count == page
            && run.pages_count < most
        {
            run.pages_count += 1;
            return Ok(false);
        }
        self.submit_open(out)?;
        self.open = Some(Run {
            first_page: page,
            pages_count: 1,
            wants: NONE,
        });
        Ok(true)
    }

    /// The open run serves this row, too.
    fn want(&mut self, id: u32, index: u32) {
        if let Some(run) = &mut self.open {
            self.wants.push(Want {
                id,
                index,
                next: run.wants,
            });
            run.wants = self.wants.len() as u32 - 1;
        }
    }

    /// Hands the open run to the kernel, waiting for a vacant place if there is none.
    fn submit_open(&mut self, out: &mut [u8]) -> Result<()> {
        let Some(run) = self.open else { return Ok(()) };
        while self.vacant.is_empty() || self.reader.free() == 0 {
            if self.broken || self.reader.in_flight() == 0 {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    "row reader: no place is left, the kernel never gave them back",
                ));
            }
            self.reap(out)?;
        }
        let (Some(place), Some(memory)) = (self.vacant.pop(), &self.memory) else {
            return Err(Error::new(ErrorKind::Internal, "row reader: no place"));
        };
        self.open = None;
        self.runs[place as usize] = run;
        let len_bytes = u64::from(run.pages_count) * PAGE_4K;
        let request = Request {
            key: u64::from(place),
            shard_index: self.shard_index(),
            offset_bytes: self.base_bytes + u64::from(run.first_page) * PAGE_4K,
            len_bytes,
            // SAFETY: place < depth, and the memory begins with depth places of read_bytes each.
            target: unsafe {
                memory
                    .as_ptr()
                    .add(place as usize * self.read_bytes as usize)
            },
        };
        // SAFETY: the place was vacant, so this read alone uses it; it becomes vacant again only when the completion
        // says that the memory is back. A run is at most read_bytes long. The memory is leaked if the drop's drain
        // fails.
        unsafe { self.reader.submit(request)? };
        self.counters.reads += 1;
        self.counters.bytes += len_bytes;
        Ok(())
    }

    /// Waits for completions, copies what they brought to the rows that want it, and into the cache. The first failure
    /// is the answer, when all completions are dealt with.
    fn reap(&mut self, out: &mut [u8]) -> Result<()> {
        let mut completions = std::mem::take(&mut self.completions);
        let mut result = self.reader.wait(None, &mut completions);
        self.broken |= result.is_err();
        for completion in completions.drain(..) {
            let place = completion.key as u32; // one of the places
            if completion.result.is_ok() {
                self.deliver(place, out);
            }
            result = result.and(completion.result);
            if completion.returned {
                self.vacant.push(place);
            }
        }
        self.completions = completions;
        result
    }

    fn deliver(&mut self, place: u32, out: &mut [u8]) {
        let run = self.runs[place as usize];
        let from = place as usize * self.read_bytes as usize;
        let mut next = run.wants;
        while next != NONE {
            let want = self.wants[next as usize];
            self.copy(
                want.index,
                want.id,
                (run.first_page, run.pages_count),
                from,
                out,
            );
            next = want.next;
        }
        let Some(memory) = &mut self.memory else {
            return;
        };
        let bytes = memory.bytes_mut();
        for page in 0..run.pages_count {
            if let Some(slot) = self.cache.admit(run.first_page + page) {
                let source = from + page as usize * PAGE_4K as usize;
                let target = self.cache_begin + slot as usize * PAGE_4K as usize;
                bytes.copy_within(source..source + PAGE_4K as usize, target);
            }
        }
    }

    /// Copies the part of row `id` that lies in `pages` (first and count), which are in memory at `from`.
    fn copy(&self, index: u32, id: u32, pages: (u32, u32), from: usize, out: &mut [u8]) {
        let Some(memory) = &self.memory else { return };
        let row_begin = self.row_begin(id);
        let pages_begin = u64::from(pages.0) * PAGE_4K;
        let begin = row_begin.max(pages_begin);
        let end =
            (row_begin + self.table.row_bytes).min(pages_begin + u64::from(pages.1) * PAGE_4K);
        let len = (end - begin) as usize;
        let target = u64::from(index) * self.table.row_bytes + (begin - row_begin);
        let source = from + (begin - pages_begin) as usize;
        out[target as usize..][..len].copy_from_slice(&memory.bytes()[source..][..len]);
    }
}

impl Drop for RowReader {
    fn drop(&mut self) {
        let kept = self.reader.drain(DRAIN_BOUND);
        if !kept.is_empty()
            && let Some(memory) = self.memory.take()
        {
            log::error!(
                "row reader: {} reads never came back from the kernel; their memory is left to it",
                kept.len()
            );
            memory.leak();
        }
    }
}
