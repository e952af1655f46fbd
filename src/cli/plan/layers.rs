//! What `flea plan --layers` tells of every layer.

use serde::Serialize;

use crate::cli::table::{Align, Table};
use crate::model::Catalog;
use crate::plan::Plan;
use crate::units::HumanBytes;

/// One layer, as `--json` has it.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct LayerReport {
    layer: usize,
    label: String,
    bytes: u64,
    resident_bytes: u64,
    transient_bytes: u64,
    shard_index: Option<u32>,
    /// Where in the shard the streamed run begins.
    transient_offset_bytes: Option<u64>,
    transient_pages: u64,
    slot_index: Option<u32>,
}

/// Every layer of a plan.
pub(super) fn layer_reports(catalog: &Catalog, plan: &Plan) -> Vec<LayerReport> {
    let layers = catalog.layers.iter().zip(&plan.layers).enumerate();
    layers
        .map(|(index, (layer, planned))| LayerReport {
            layer: index,
            label: layer.label.clone(),
            bytes: layer.bytes,
            resident_bytes: planned.resident_bytes,
            transient_bytes: planned.transient_bytes,
            shard_index: planned.transient.map(|run| run.shard_index),
            transient_offset_bytes: planned
                .transient
                .map(|run| run.first_page * plan.page_bytes),
            transient_pages: planned.transient.map_or(0, |run| run.page_count),
            slot_index: planned.slot_index,
        })
        .collect()
}

/// The table for people.
pub(super) fn layer_table(layers: &[LayerReport]) -> Table {
    let mut table = Table::new(&[
        ("layer", Align::Right),
        ("label", Align::Left),
        ("size", Align::Right),
        ("resident", Align::Right),
        ("streamed", Align::Right),
        ("pages", Align::Right),
        ("shard", Align::Right),
        ("from offset", Align::Right),
        ("slot", Align::Right),
    ]);
    for layer in layers {
        table.row([
            layer.layer.to_string(),
            layer.label.clone(),
            HumanBytes(layer.bytes).to_string(),
            HumanBytes(layer.resident_bytes).to_string(),
            HumanBytes(layer.transient_bytes).to_string(),
            layer.transient_pages.to_string(),
            or_dash(layer.shard_index),
            or_dash(layer.transient_offset_bytes),
            or_dash(layer.slot_index),
        ]);
    }
    table
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
