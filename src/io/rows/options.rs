//! Which table, and how to read it: what may be asked for, and how many cached pages a budget leaves.

use super::cache::PageCache;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{DEPTH_MOST, ReaderKind, ShardFile};
use crate::plan::PolicyKind;
use crate::units::{HumanBytes, KIB, PAGE_2M, PAGE_4K, align_down};

/// Where the rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowTable {
    /// Which of the reader's files.
    pub shard_index: u32,
    /// Where row 0 begins, any alignment.
    pub offset_bytes: u64,
    /// Length of a row, any alignment.
    pub row_bytes: u64,
    /// How many rows.
    pub rows_count: u32,
}

impl RowTable {
    /// Behind the last row; `None` beyond 64 bits.
    pub(super) const fn end_bytes(&self) -> Option<u64> {
        match self.row_bytes.checked_mul(self.rows_count as u64) {
            Some(len) => self.offset_bytes.checked_add(len),
            None => None,
        }
    }

    pub(super) fn check(&self, files: &[ShardFile]) -> Result<()> {
        let Some(file) = files.get(self.shard_index as usize) else {
            let context = format!("rows of shard {} of {}", self.shard_index, files.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        };
        if self.row_bytes == 0 || self.rows_count == 0 {
            let context = format!(
                "{}: a table of {} rows of {} bytes has nothing to read",
                file.path().display(),
                self.rows_count,
                self.row_bytes
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if self.end_bytes().is_none_or(|end| end > file.len_bytes()) {
            let context = format!(
                "{}: {} rows of {} bytes at {} reach past its end at {}",
                file.path().display(),
                self.rows_count,
                self.row_bytes,
                self.offset_bytes,
                file.len_bytes()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }
}

/// How to read rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowOptions {
    /// All memory of the row reader: places of reads in flight, cached pages, and what keeps account of them.
    pub budget_bytes: u64,
    /// Reads in flight.
    pub depth: u32,
    /// Longest read: neighbours are joined up to this length.
    pub read_bytes: u32,
    /// What leaves the cache.
    pub policy: PolicyKind,
    /// Which reader.
    pub reader: ReaderKind,
}

impl Default for RowOptions {
    fn default() -> Self {
        Self {
            budget_bytes: 32 << 20,
            // More in flight gained nothing on any drive tried; see `flea probe rows`.
            depth: 128,
            read_bytes: 64 * KIB as u32,
            policy: PolicyKind::default(),
            reader: ReaderKind::Auto,
        }
    }
}

impl RowOptions {
    pub(super) fn check(&self) -> Result<()> {
        let read_bytes = u64::from(self.read_bytes);
        if !(1..=DEPTH_MOST).contains(&self.depth)
            || !(PAGE_4K..=PAGE_2M).contains(&read_bytes)
            || !read_bytes.is_multiple_of(PAGE_4K)
        {
            let context = format!(
                "row reader: {} reads of at most {read_bytes} bytes; 1 to {DEPTH_MOST} reads of 4 KiB to 2 MiB, in \
                 whole pages, are possible",
                self.depth
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }

    pub(super) fn staging_bytes(&self) -> u64 {
        u64::from(self.depth) * u64::from(self.read_bytes)
    }
}

/// How many cached pages the budget leaves.
pub(super) fn slots_within(options: &RowOptions, pages_count: u32) -> Result<u32> {
    let staging_bytes = options.staging_bytes();
    // What keeps account of the pages costs as much as if all of the budget were slots: a little more than it will be.
    let most = u32::try_from(options.budget_bytes / PAGE_4K).unwrap_or(u32::MAX);
    let account_bytes =
        PageCache::account_bytes(options.policy, pages_count, most.min(pages_count));
    let left_bytes = options.budget_bytes.saturating_sub(account_bytes);
    // Memory comes in pieces of 2 MiB.
    let data_bytes = align_down(left_bytes, PAGE_2M);
    if data_bytes < staging_bytes {
        let context = format!(
            "row reader: {} for {} reads of {} in flight and {} to keep account of {pages_count} pages do not fit into \
             {}; raise the budget or lower the depth",
            HumanBytes(staging_bytes),
            options.depth,
            HumanBytes(u64::from(options.read_bytes)),
            HumanBytes(account_bytes),
            HumanBytes(options.budget_bytes)
        );
        return Err(Error::new(ErrorKind::Refused, context));
    }
    let slots = (data_bytes - staging_bytes) / PAGE_4K;
    Ok(u32::try_from(slots).map_or(pages_count, |slots| slots.min(pages_count)))
}
