//! Rows of a model's tables of embeddings, read when the tokens are known: what hosts do not have to keep.
//!
//! Rows are copied out and lie in no window: at constant addresses every few of their pages would be a mapping of its own,
//! and a process has 65530 of them. Invariants: a row reader takes its memory before the plan is made, so that the plan
//! counts it as the host's; what a call copies out is the file's bytes, or a copy's where its drive failed, or the call
//! fails. Place: beside the stream in `file -> catalog -> plan -> reader -> pool -> lease -> host`; it uses `reader` alone.

use super::model::Model;
use super::options::BudgetSpec;
use super::stats::{Fallback, FallbackKind, RowStats, Stats};
use crate::error::{Error, ErrorKind, Result};
use crate::io::ReaderKind;
use crate::io::rows::{RowOptions, RowReader, RowTable};
use crate::model::Catalog;
use crate::plan::{RowsPlan, rows};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most rows in one call.
pub const ROWS_MAX: usize = 1 << 24;

/// One table, and its reader once somebody wants rows of it.
#[derive(Debug)]
pub(super) struct Table {
    plan: RowsPlan,
    reader: Mutex<Option<RowReader>>,
}

impl Table {
    /// The tables of a model.
    pub(super) fn all(catalog: &Catalog) -> Box<[Self]> {
        let table = |plan| Self {
            plan,
            reader: Mutex::new(None),
        };
        rows::tables(catalog).into_iter().map(table).collect()
    }

    fn reader(&self) -> MutexGuard<'_, Option<RowReader>> {
        // Nothing panics while it is held; if it did, the reader knows by itself that it is broken.
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Model {
    /// Bytes of a row of the table at this place among the tensors; `None` where [`Model::read_rows`] does not read it.
    #[must_use]
    pub fn row_bytes(&self, tensor_index: usize) -> Option<u64> {
        let of_tensor = |table: &&Table| table.plan.tensor_index as usize == tensor_index;
        self.tables
            .iter()
            .find(of_tensor)
            .map(|table| table.plan.row_bytes)
    }

    /// Copies the rows `ids` of the table at `address` to `out`, one behind the other. Ids may come in any order and more
    /// than once. The first call for a table takes the memory that its reads need: with a budget for the whole process
    /// that has to be before the plan is made, and it may name no rows.
    ///
    /// # Errors
    /// `Invalid` for an address that is no such table's first, a row that the table does not have, or an `out` of another
    /// length; `Refused` when the plan is made already; `NoMemory`; `Io`, `Truncated`, `Changed`, `Timeout` as the drive
    /// says. What is in `out` then means nothing.
    pub fn read_rows(&self, address: usize, ids: &[u32], out: &mut [u8]) -> Result<()> {
        let table = self.table_at(address)?;
        if ids.len() > ROWS_MAX {
            let context = format!("{} rows; at most {ROWS_MAX} are possible", ids.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut reader = table.reader();
        let reader = match &mut *reader {
            Some(reader) => reader,
            none => none.insert(self.row_reader(&table.plan)?),
        };
        reader.read(ids, out)
    }

    /// What the row readers hold in memory.
    #[must_use]
    pub fn rows_bytes(&self) -> u64 {
        let readers = self.tables.iter().map(Table::reader);
        let bytes = |reader: MutexGuard<'_, Option<RowReader>>| {
            reader.as_ref().map_or(0, RowReader::memory_bytes)
        };
        readers.map(bytes).sum()
    }

    fn table_at(&self, address: usize) -> Result<&Table> {
        let begins = |table: &&Table| {
            let extent = self.catalog.tensors[table.plan.tensor_index as usize].extent;
            self.address(extent.shard_index, extent.offset_bytes) as usize == address
        };
        self.tables.iter().find(begins).ok_or_else(|| {
            let context = format!("no table that is read row by row begins at {address:#x}");
            Error::new(ErrorKind::Invalid, context)
        })
    }

    fn row_reader(&self, plan: &RowsPlan) -> Result<RowReader> {
        let tensor = &self.catalog.tensors[plan.tensor_index as usize];
        if self.plan().is_some() && matches!(self.options.budget, BudgetSpec::Memory(_)) {
            let context = format!(
                "'{}': its rows are wanted for the first time after the plan was made, which has no room for them; read \
                 rows of every table once, or none of them, before the first acquire",
                tensor.name
            );
            return Err(Error::new(ErrorKind::Refused, context));
        }
        let table = RowTable {
            shard_index: tensor.extent.shard_index,
            offset_bytes: tensor.extent.offset_bytes,
            row_bytes: plan.row_bytes,
            rows_count: plan.rows_count,
        };
        let options = RowOptions {
            budget_bytes: plan.memory_bytes,
            depth: rows::READS_DEPTH,
            read_bytes: rows::READ_BYTES,
            reader: self.options.reader.kind,
            ..RowOptions::default()
        };
        let copies = Arc::clone(&self.copies);
        RowReader::of_copies(self.files.clone(), copies, table, &options)
    }

    /// What reading rows has done so far.
    pub(super) fn add_rows_to(&self, stats: &mut Stats) {
        for table in &self.tables {
            let reader = table.reader();
            let Some(reader) = &*reader else { continue };
            let (rows, kernel) = (reader.counters(), reader.reader_counters());
            let sum = &mut stats.rows;
            *sum = RowStats {
                rows: sum.rows + rows.rows,
                reads: sum.reads + rows.reads,
                bytes: sum.bytes + rows.bytes,
                page_uses: sum.page_uses + rows.page_uses,
                page_hits: sum.page_hits + rows.page_hits,
            };
            stats.bytes_read += kernel.bytes;
            stats.reads += kernel.reads;
            stats.retries += kernel.retries;
            let asked = self.options.reader.kind;
            if reader.reader_kind() == ReaderKind::Pread && asked != ReaderKind::Pread {
                stats.fallbacks.push(Fallback {
                    kind: FallbackKind::Pread,
                    reason: "rows of embeddings are read by pread threads".to_owned(),
                });
            }
        }
    }
}
