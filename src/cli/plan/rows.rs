//! What `flea plan` tells of embeddings that are read row by row.

use serde::Serialize;

use crate::model::Catalog;
use crate::plan::rows;
use crate::units::HumanBytes;

/// The tables, as `--json` has them.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct RowsReport {
    tables: Vec<String>,
    table_bytes: u64,
    /// Reads in flight and cache: a part of the host's memory.
    memory_bytes: u64,
}

impl RowsReport {
    /// The tables of a model; `None` where the host keeps what it has.
    pub(super) fn new(catalog: &Catalog, host_rows: bool) -> Option<Self> {
        let tables = match host_rows {
            true => Vec::new(),
            false => rows::tables(catalog),
        };
        let name = |index: u32| catalog.tensors[index as usize].name.clone();
        (!tables.is_empty()).then(|| Self {
            table_bytes: tables.iter().map(|table| table.table_bytes).sum(),
            memory_bytes: tables.iter().map(|table| table.memory_bytes).sum(),
            tables: tables
                .iter()
                .map(|table| name(table.tensor_index))
                .collect(),
        })
    }

    /// What the host keeps of its tensors, tables as they are read.
    pub(super) const fn kept_bytes(&self, host_tensor_bytes: u64) -> u64 {
        host_tensor_bytes.saturating_sub(self.table_bytes) + self.memory_bytes
    }

    /// The line for people.
    pub(super) fn text(&self) -> String {
        format!(
            "{} bytes cache ({}, the host's) for {} of {}",
            self.memory_bytes,
            HumanBytes(self.memory_bytes),
            HumanBytes(self.table_bytes),
            self.tables.join(", ")
        )
    }
}
