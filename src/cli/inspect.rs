//! `flea inspect MODEL`: what is in a model's files, as people read it or as one JSON object.
//!
//! Reads headers only. Formatting is apart from reading, so that it is tested on catalogs that never were files.
//! Place in the house: a window on **file -> catalog**; nothing behind it depends on it.

use crate::error::{Error, Result};
use crate::model::{Catalog, Format, Layer, LayerKind, Tensor, Value};
use crate::units::{Extent, HumanBytes};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

/// What is in a model file: its shape, its types, its layers and where they lie.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A GGUF file (of a split model: any part), a safetensors file, or a model.safetensors.index.json.
    pub model: PathBuf,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    pub json: bool,
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// List every layer of a pass.
    #[arg(long)]
    pub layers: bool,
}

/// Reads the headers of the model and prints what they say on standard output.
///
/// # Errors
/// What reading the headers gives, and a standard output that cannot be written (a reader that went away is no error).
pub fn command(args: &Args) -> Result<()> {
    let (catalog, _files) = crate::engine::read_catalog(&args.model)?;
    let text = if args.json {
        format!("{}\n", to_json(&catalog, args.tensors, args.layers))
    } else {
        to_text(&catalog, args.tensors, args.layers)
    };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::from_io(&error, "writing to standard output"))
        }
        _ => Ok(()),
    }
}

/// The catalog as tables.
#[must_use]
pub fn to_text(catalog: &Catalog, tensors: bool, layers: bool) -> String {
    let mut out = String::new();
    summary(catalog, &mut out);
    types(catalog, &mut out);
    if layers {
        layer_table(catalog, &mut out);
    }
    if tensors {
        tensor_table(catalog, &mut out);
    }
    out
}

/// One `label  value` line. Writing to a string cannot fail.
fn line(out: &mut String, label: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{label:<14} {value}");
}

fn summary(catalog: &Catalog, out: &mut String) {
    for (index, shard) in catalog.shards.iter().enumerate() {
        let label = if index == 0 { "file" } else { "" };
        let path = printable(&shard.path.to_string_lossy());
        line(
            out,
            label,
            format_args!("{path} ({})", HumanBytes(shard.len_bytes)),
        );
    }
    line(out, "format", format_name(catalog.format));
    line(out, "architecture", printable(&catalog.architecture));
    if let Some(name) = &catalog.name {
        line(out, "name", printable(name));
    }
    line(out, "parameters", human_count(catalog.parameter_count));
    let bits = 8.0 * catalog.model_bytes as f64 / catalog.parameter_count.max(1) as f64;
    let mix = catalog
        .file_type
        .map_or(String::new(), |name| format!("{name}, "));
    line(
        out,
        "weights",
        format_args!(
            "{} ({mix}{bits:.2} bits per parameter)",
            HumanBytes(catalog.model_bytes)
        ),
    );
    for (label, value) in [
        ("context", catalog.context_length),
        ("embedding", catalog.embedding_length),
        ("vocabulary", catalog.vocabulary_size),
    ] {
        if let Some(value) = value {
            line(out, label, value);
        }
    }
    if let Some(experts) = catalog.expert_count {
        let used = catalog
            .experts_used_count
            .map_or(String::new(), |n| format!(", {n} used per token"));
        let shared = catalog
            .shared_expert_count
            .map_or(String::new(), |n| format!(", {n} shared"));
        line(
            out,
            "experts",
            format_args!("{experts} per layer{used}{shared}"),
        );
    }
    pass_summary(catalog, out);
}

fn pass_summary(catalog: &Catalog, out: &mut String) {
    let blocks: Vec<u64> = bytes_of(catalog, |kind| matches!(kind, LayerKind::Block(_)));
    if let (Some(smallest), Some(largest)) = (blocks.iter().min(), blocks.iter().max()) {
        let sizes = if smallest == largest {
            format!("{} each", HumanBytes(*largest))
        } else {
            format!("{} to {}", HumanBytes(*smallest), HumanBytes(*largest))
        };
        line(out, "layers", format_args!("{} ({sizes})", blocks.len()));
    }
    let head: Vec<u64> = bytes_of(catalog, |kind| matches!(kind, LayerKind::Head { .. }));
    if !head.is_empty() {
        let pieces = match head.len() {
            1 => "in one piece".to_owned(),
            count => format!("in {count} pieces"),
        };
        let tied = if catalog.tied_embeddings {
            ", tied to the embeddings"
        } else {
            ""
        };
        let sum = HumanBytes(head.iter().sum());
        line(out, "head", format_args!("{sum} {pieces}{tied}"));
    }
    line(out, "kept by host", HumanBytes(catalog.host_tensor_bytes));
    if catalog.unused_tensor_bytes > 0 {
        line(
            out,
            "unused",
            format_args!(
                "{} (layers that only draft)",
                HumanBytes(catalog.unused_tensor_bytes)
            ),
        );
    }
}

fn bytes_of(catalog: &Catalog, wanted: impl Fn(LayerKind) -> bool) -> Vec<u64> {
    catalog
        .layers
        .iter()
        .filter(|layer| wanted(layer.kind))
        .map(|layer| layer.bytes)
        .collect()
}

fn types(catalog: &Catalog, out: &mut String) {
    let _ = writeln!(
        out,
        "\n{:<12} {:>8} {:>12} {:>7}",
        "type", "tensors", "bytes", "share"
    );
    for share in &catalog.types {
        let percent = 100.0 * share.bytes as f64 / catalog.model_bytes.max(1) as f64;
        let bytes = HumanBytes(share.bytes).to_string();
        let _ = writeln!(
            out,
            "{:<12} {:>8} {bytes:>12} {percent:>6.1}%",
            share.dtype, share.tensor_count
        );
    }
}

fn layer_table(catalog: &Catalog, out: &mut String) {
    let _ = writeln!(
        out,
        "\n{:>5}  {:<24} {:>8} {:>12}  extents (shard:offset+bytes)",
        "layer", "name", "tensors", "bytes"
    );
    for (index, layer) in catalog.layers.iter().enumerate() {
        let extents: Vec<String> = layer.extents.iter().map(extent_text).collect();
        let bytes = HumanBytes(layer.bytes).to_string();
        let _ = writeln!(
            out,
            "{index:>5}  {:<24} {:>8} {bytes:>12}  {}",
            layer.label,
            layer.uses.len(),
            extents.join(" ")
        );
    }
}

fn tensor_table(catalog: &Catalog, out: &mut String) {
    let width = catalog
        .tensors
        .iter()
        .map(|tensor| tensor.name.len())
        .max()
        .unwrap_or(0)
        .min(60);
    let _ = writeln!(
        out,
        "\n{:<width$} {:<8} {:<24} {:>14}  {:<24} role",
        "tensor", "type", "shape", "bytes", "used by"
    );
    for tensor in &catalog.tensors {
        let shape: Vec<String> = shape_of(tensor).iter().map(u64::to_string).collect();
        let _ = writeln!(
            out,
            "{:<width$} {:<8} {:<24} {:>14}  {:<24} {}",
            printable(&tensor.name),
            tensor.dtype,
            shape.join(" x "),
            tensor.extent.len_bytes,
            user_of(catalog, tensor),
            tensor.role.label()
        );
    }
}

fn user_of(catalog: &Catalog, tensor: &Tensor) -> String {
    let layers = tensor.layers.map(|span| {
        let label = |index: u32| catalog.layers[index as usize].label.as_str();
        match span.last - span.first {
            0 => label(span.first).to_owned(),
            more => format!("output in {} pieces", more + 1),
        }
    });
    match (layers, tensor.host_kept) {
        (Some(layers), true) => format!("{layers}, host"),
        (Some(layers), false) => layers,
        (None, true) => "host".to_owned(),
        (None, false) => "nothing".to_owned(),
    }
}

/// The catalog as one JSON object.
#[must_use]
pub fn to_json(catalog: &Catalog, tensors: bool, layers: bool) -> serde_json::Value {
    let mut object = json!({
        "format": format_name(catalog.format),
        "architecture": catalog.architecture,
        "name": catalog.name,
        "file_type": catalog.file_type,
        "parameter_count": catalog.parameter_count,
        "model_bytes": catalog.model_bytes,
        "host_tensor_bytes": catalog.host_tensor_bytes,
        "unused_tensor_bytes": catalog.unused_tensor_bytes,
        "layer_bytes": catalog.layer_bytes(),
        "alignment_bytes": catalog.alignment_bytes,
        "context_length": catalog.context_length,
        "block_count": catalog.block_count,
        "embedding_length": catalog.embedding_length,
        "vocabulary_size": catalog.vocabulary_size,
        "expert_count": catalog.expert_count,
        "experts_used_count": catalog.experts_used_count,
        "shared_expert_count": catalog.shared_expert_count,
        "tied_embeddings": catalog.tied_embeddings,
        "tensor_count": catalog.tensors.len(),
        "layer_count": catalog.layers.len(),
        "shards": catalog.shards.iter().map(|shard| json!({
            "path": shard.path.to_string_lossy(),
            "len_bytes": shard.len_bytes,
        })).collect::<Vec<_>>(),
        "types": catalog.types.iter().map(|share| json!({
            "type": share.dtype.name(),
            "tensor_count": share.tensor_count,
            "parameter_count": share.element_count,
            "bytes": share.bytes,
        })).collect::<Vec<_>>(),
        "metadata": metadata_json(catalog),
    });
    if layers {
        object["layers"] = catalog.layers.iter().map(layer_json).collect();
    }
    if tensors {
        object["tensors"] = catalog.tensors.iter().map(tensor_json).collect();
    }
    object
}

fn metadata_json(catalog: &Catalog) -> serde_json::Value {
    let entries = catalog.metadata.iter().map(|(key, value)| {
        let value = match value {
            Value::Unsigned(value) => json!(value),
            Value::Signed(value) => json!(value),
            Value::Float(value) => json!(value),
            Value::Bool(value) => json!(value),
            Value::Text(value) => json!(value),
            Value::LongText { len_bytes } => json!({ "text_bytes": len_bytes }),
            Value::Integers(values) => json!(values),
            Value::Array { element, count } => json!({ "array_of": element, "count": count }),
        };
        (key.to_owned(), value)
    });
    serde_json::Value::Object(entries.collect())
}

fn layer_json(layer: &Layer) -> serde_json::Value {
    let mut object = json!({
        "label": layer.label,
        "bytes": layer.bytes,
        "tensor_count": layer.uses.len(),
        "extents": layer.extents.iter().map(extent_json).collect::<Vec<_>>(),
    });
    match layer.kind {
        LayerKind::Block(number) => object["block"] = json!(number),
        LayerKind::Head {
            first_row,
            row_count,
        } => {
            object["first_row"] = json!(first_row);
            object["row_count"] = json!(row_count);
        }
    }
    object
}

fn tensor_json(tensor: &Tensor) -> serde_json::Value {
    json!({
        "name": tensor.name,
        "type": tensor.dtype.name(),
        "shape": shape_of(tensor),
        "extent": extent_json(&tensor.extent),
        "role": tensor.role.label(),
        "host_kept": tensor.host_kept,
        "first_layer": tensor.layers.map(|span| span.first),
        "last_layer": tensor.layers.map(|span| span.last),
        "experts": tensor.experts.map(|experts| experts.count),
    })
}

fn extent_json(extent: &Extent) -> serde_json::Value {
    json!({
        "shard_index": extent.shard_index,
        "offset_bytes": extent.offset_bytes,
        "len_bytes": extent.len_bytes,
    })
}

fn extent_text(extent: &Extent) -> String {
    format!(
        "{}:{}+{}",
        extent.shard_index, extent.offset_bytes, extent.len_bytes
    )
}

/// The dimensions the file names; a scalar has one of one element.
fn shape_of(tensor: &Tensor) -> &[u64] {
    &tensor.shape[..(tensor.dims as usize).clamp(1, 4)]
}

fn format_name(format: Format) -> String {
    match format {
        Format::Gguf(version) => format!("GGUF v{version}"),
        Format::Safetensors => "safetensors".to_owned(),
    }
}

/// `7.24 billion`, `1.1 million`, `512`.
fn human_count(count: u64) -> String {
    match count as f64 {
        value if value >= 1e9 => format!("{:.2} billion", value / 1e9),
        value if value >= 1e6 => format!("{:.1} million", value / 1e6),
        _ => count.to_string(),
    }
}

/// Text of a file is data: control characters do not reach the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DType, Metadata, Shard, TensorInfo, catalog, gguf};

    /// Two blocks with experts, a large head, and a name that tries to move the cursor.
    fn sample() -> Catalog {
        let mut tensors = Vec::new();
        let mut offset_bytes = 4096;
        for (name, shape, dtype) in [
            ("token_embd.weight", [64, 1600, 1, 1], DType::F16),
            ("blk.0.attn_q.weight", [64, 64, 1, 1], DType::F16),
            ("blk.0.ffn_up_exps.weight", [64, 32, 4, 1], DType::Q8_0),
            ("blk.1.attn_q.weight", [64, 64, 1, 1], DType::F16),
            ("output_norm.weight", [64, 1, 1, 1], DType::F32),
            ("rope_freqs.\u{1b}[2J", [32, 1, 1, 1], DType::F32),
        ] {
            let len_bytes = dtype.tensor_bytes(&shape).unwrap();
            tensors.push(TensorInfo {
                name: name.to_owned(),
                dtype,
                shape,
                dims: shape.iter().rposition(|&n| n > 1).unwrap_or(0) as u32 + 1,
                offset_bytes,
                len_bytes,
            });
            offset_bytes += len_bytes;
        }
        catalog::from_gguf(vec![gguf::ShardHeader {
            shard: Shard {
                path: "sample.gguf".into(),
                len_bytes: offset_bytes,
            },
            version: 3,
            alignment_bytes: 32,
            metadata: Metadata::default(),
            key_count: 0,
            metadata_range: 24..24,
            raw_metadata: Vec::new(),
            tensors,
            data_offset_bytes: 4096,
            split: None,
        }])
        .unwrap()
    }

    #[test]
    fn tables_tell_what_is_there() {
        let text = to_text(&sample(), true, true);
        for words in [
            "file           sample.gguf (",
            "format         GGUF v3",
            "layers         2 (8.0 KiB to 16.5 KiB)",
            "in 13 pieces, tied to the embeddings",
            "blk.0",
            "64 x 32 x 4",
            "experts",
            "output in 13 pieces, host",
        ] {
            assert!(text.contains(words), "'{words}' is not in:\n{text}");
        }
        assert!(
            !text.contains('\u{1b}'),
            "escape sequences reach the terminal"
        );
        let short = to_text(&sample(), false, false);
        assert!(!short.contains("attn_q") && short.contains("q8_0"));
    }

    #[test]
    fn json_is_one_object_that_adds_up() {
        let object = to_json(&sample(), true, true);
        let number = |key: &str| object[key].as_u64().unwrap();
        let sum = |list: &str, path: &dyn Fn(&serde_json::Value) -> u64| -> u64 {
            object[list].as_array().unwrap().iter().map(path).sum()
        };
        let bytes = |value: &serde_json::Value| value["bytes"].as_u64().unwrap();
        assert_eq!(sum("types", &bytes), number("model_bytes"));
        assert_eq!(sum("layers", &bytes), number("layer_bytes"));
        let lens = |value: &serde_json::Value| value["extent"]["len_bytes"].as_u64().unwrap();
        assert_eq!(sum("tensors", &lens), number("model_bytes"));
        assert_eq!(object["tied_embeddings"], true);
        assert!(!object.to_string().contains('\n'));
        let short = to_json(&sample(), false, false);
        assert!(short.get("tensors").is_none() && short.get("layers").is_none());
    }
}
