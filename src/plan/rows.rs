//! Which tables of embeddings are read row by row, and what that takes: memory for reads in flight and a small cache.
//!
//! A pass needs the rows of its tokens and nothing else of such a table, whatever its length. Reading rows pays where the
//! table is several times larger than the row reader; below, the host keeps it. Invariant: what a table takes is less than a
//! third of it. Pure, like all of plan. Place: file -> catalog -> **plan** -> reader -> pool -> lease -> host.

use super::{Policy, PolicyKind};
use crate::model::catalog::Tensor;
use crate::model::{Catalog, Role};
use crate::units::{KIB, MIB, PAGE_2M, PAGE_4K, align_up};

/// Shorter tables are left to the host: a row reader takes 2 MiB and more.
pub const TABLE_BYTES_LEAST: u64 = 16 * MIB;
/// Reads in flight. More gained nothing on any drive tried; see `flea probe rows`.
pub const READS_DEPTH: u32 = 128;
/// Longest read: a row of a per-layer table, which spans a few pages, in one.
pub const READ_BYTES: u32 = 16 * KIB as u32;
/// Part of the table, as a divisor, that its cache holds beside the reads in flight.
const CACHE_SHARE: u64 = 128;

/// A table that is read row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsPlan {
    /// The tensor, as index into the catalog's.
    pub tensor_index: u32,
    /// Bytes of the table.
    pub table_bytes: u64,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// How many rows.
    pub rows_count: u32,
    /// What reading them takes: reads in flight, cached pages, and what keeps account of them.
    pub memory_bytes: u64,
}

impl RowsPlan {
    fn new(tensor_index: u32, tensor: &Tensor) -> Option<Self> {
        let is_table = matches!(tensor.role, Role::TokenEmbedding | Role::PerLayerEmbedding);
        let table_bytes = tensor.extent.len_bytes;
        let row_bytes = tensor.row_bytes()?;
        let rows_count = u32::try_from(tensor.row_count()).ok()?;
        let is_whole = row_bytes.checked_mul(u64::from(rows_count)) == Some(table_bytes);
        let fits = is_table && tensor.host_kept && tensor.dims == 2 && is_whole;
        (fits && table_bytes >= TABLE_BYTES_LEAST).then(|| Self {
            tensor_index,
            table_bytes,
            row_bytes,
            rows_count,
            memory_bytes: memory_bytes(table_bytes),
        })
    }
}

/// The tables of a model that are read row by row, where the host does not keep them whole. A tied one is among them: its
/// head is streamed by itself.
#[must_use]
pub fn tables(catalog: &Catalog) -> Vec<RowsPlan> {
    let tensors = (0u32..).zip(&catalog.tensors);
    tensors
        .filter_map(|(index, tensor)| RowsPlan::new(index, tensor))
        .collect()
}

fn memory_bytes(table_bytes: u64) -> u64 {
    let staging_bytes = u64::from(READS_DEPTH) * u64::from(READ_BYTES);
    let wanted_bytes = staging_bytes + (table_bytes / CACHE_SHARE).max(MIB);
    // Memory comes in pieces of 2 MiB.
    let data_bytes = align_up(wanted_bytes, PAGE_2M).unwrap_or(wanted_bytes);
    // Two pages that are not the table's alone, at most.
    let pages_count = u32::try_from(table_bytes / PAGE_4K + 2).unwrap_or(u32::MAX);
    let slots_most = u32::try_from(2 * data_bytes / PAGE_4K).unwrap_or(u32::MAX);
    let kind = PolicyKind::default();
    let account_bytes = Policy::account_bytes(kind, pages_count, slots_most.min(pages_count))
        + u64::from(pages_count) * size_of::<u32>() as u64;
    data_bytes + account_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn a_table_takes_a_small_part_of_itself() {
        for table_bytes in [TABLE_BYTES_LEAST, 100 * MIB, GIB, 5 * GIB, 100 * GIB] {
            let taken = memory_bytes(table_bytes);
            assert!(taken >= 2 * MIB, "{table_bytes}: {taken}");
            assert!(taken <= table_bytes / 3, "{table_bytes}: {taken}");
        }
        assert!(memory_bytes(5 * GIB) < 5 * GIB / 40);
    }
}
